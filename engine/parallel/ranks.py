"""Ranks: the processes that train together, one device each. How they exchange data, and how they
end together.

Every rank runs the same program on the same data. What is small (experience, advantages, the split
into micro-batches, controllers) is whole on all ranks, and only what is expensive is divided. So
all ranks meet in the same order: a meeting is a point where each rank waits for all. Each meeting
begins with a word about its purpose. A rank that failed reports this in the next meeting of the
other ranks, whichever that is, and all ranks end with its message. Ranks that have taken different
paths raise an error instead of waiting for ever.

    with joined(config) as ranks:        # a single rank if torch.distributed is not initialised
        mine = parts[ranks.rank]
        ranks.sum("old_logp", column)    # 0 wherever another rank computed it

Nothing here pickles: a message is JSON, or tensors.
"""

from __future__ import annotations

import json
import platform
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fusedrl.engine.base import errors
from fusedrl.engine.base.errors import SAID, ConfigError, Elsewhere, SetupError, Stopped

T = TypeVar("T")
LANES = 8  # default if sums must not depend on the number of ranks
_INTERRUPTED = 130  # exit code of a run that Ctrl-C ended
_LONGEST = 4000  # characters of an error message that are sent to the other ranks
# errors that are raised under their own names on the ranks that did not fail themselves
_KNOWN = {
    name: kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, Exception)
} | {kind.__name__: kind for kind in (RuntimeError, ValueError, FileNotFoundError, OSError)}


class Ranks:
    """All processes of a run, seen from one of them.

    Attributes:
        rank, size: number of this process, from 0, and number of processes.
        lanes: number of lanes of sums over all ranks (lanes.py).
        moved: bytes that this rank sent of gradients and received of parameters.
        loads: for each division of work, the load of the busiest rank divided by the mean load.
        waited: seconds in which ranks exchanged something or waited for one another.
        inside: whether the ranks exchange tensors now.
        told: whether all ranks know of a failure, so that none waits for another any more.
    """

    def __init__(self, rank: int = 0, size: int = 1, lanes: int | None = None) -> None:
        self.rank, self.size, self.lanes = rank, size, size if lanes is None else lanes
        self.moved: Counter[str] = Counter()
        self.loads: list[float] = []
        self.waited = 0.0
        self.told = self.inside = False
        self._met = 0

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes files and messages."""
        return self.rank == 0

    # ---- meetings --------------------------------------------------------------------------------
    def meet(self, what: str) -> None:
        """Wait until every rank has reached this meeting. `what` names its purpose.

        Raises:
            Exception: the error of a rank that failed, of the same type and with its message.
            SetupError: a rank is gone, or does not come in time.
            RuntimeError: another rank is in a different meeting.
        """
        if self.size > 1:
            self._meet(what, "")

    @contextmanager
    def meeting(self, what: str) -> Iterator[None]:
        """Meet, and exchange tensors within the block. A rank that fails inside it cannot meet the
        others any more, since they wait for the tensors. Errors are those of `meet`."""
        if self.size > 1:
            self._meet(what, "")
        self.inside = True
        yield
        self.inside = False

    def _meet(self, what: str, failure: str) -> list[str]:
        """Exchange the purpose of the meeting, and whether a rank failed. Raise the error of
        another rank, unless this rank failed as well; then return the failures of all."""
        self._met += 1
        text = failure.encode(errors="backslashreplace")
        mine = torch.tensor([zlib.crc32(what.encode()), len(text)])
        everyone = [torch.zeros_like(mine) for _ in range(self.size)]
        self._call(what, lambda: dist.all_gather(everyone, mine))
        words, lengths = zip(*(pair.tolist() for pair in everyone), strict=True)
        if any(lengths):
            said = self._texts(what, text, lengths)
            self.told = True
            if not failure:
                raise self._theirs(said)
            return said
        elif len(set(words)) > 1:
            raise RuntimeError(
                f"parallel: meeting {self._met}: rank {self.rank} is at {what!r} and others are "
                "not: ranks went different ways. Every rank must run the same program on the same "
                "data; a reward or a hook that depends on the rank is the likely cause"
            )
        return []

    def _texts(self, what: str, text: bytes, lengths: Sequence[int]) -> list[str]:
        longest = max(lengths)
        mine = torch.zeros(longest, dtype=torch.uint8)
        mine[: len(text)] = (
            torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else mine[:0]
        )
        everyone = [torch.zeros_like(mine) for _ in range(self.size)]
        self._call(what, lambda: dist.all_gather(everyone, mine))
        return [
            bytes(row[:length].tolist()).decode()
            for row, length in zip(everyone, lengths, strict=True)
        ]

    def _theirs(self, said: Sequence[str]) -> BaseException:
        rank = next(rank for rank, text in enumerate(said) if text)
        name, _, message = said[rank].partition(": ")
        if name in ("Stopped", "KeyboardInterrupt", "SystemExit"):
            return Stopped(int(message) if message.isdecimal() else _INTERRUPTED)
        kind = _KNOWN.get(name, RuntimeError)
        shown = message if name in _KNOWN else said[rank]
        marked = type(kind.__name__, (kind, Elsewhere), {})
        return marked(f"rank {rank} of {self.size}: {shown}")

    def fail(self, error: BaseException) -> bool:
        """Report to the other ranks, in their next meeting, that this rank failed; only the first
        call does so. Return whether they know."""
        if self.size == 1 or self.told:
            return True
        if self.inside:
            return False
        text = f"{type(error).__name__}: {error}"[:_LONGEST]
        try:
            said = self._meet("an error", text)
        except Exception:  # some rank is gone, so no meeting is possible any more
            return False
        if text in said[: self.rank]:
            error.add_note(SAID)
        return self.told

    def _call(self, what: str, collective: Callable[[], Any]) -> None:
        began = time.perf_counter()
        try:
            collective()
            self.waited += time.perf_counter() - began
        except RuntimeError as error:  # every failure of a backend is one
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            late = "timed out" in str(error).lower() or "timeout" in str(error).lower()
            raise SetupError(
                f"parallel: rank {self.rank} of {self.size} waited at {what!r} (meeting "
                f"{self._met}) and another rank "
                + ("did not come in time" if late else "is gone")
                + f" ({reason}); its own output says why. Start all ranks again with --run.resume "
                "true: the run goes on from its last checkpoint"
            ) from error

    # ---- small things ----------------------------------------------------------------------------
    def gather(self, what: str, value: Any) -> list[Any]:
        """Return the JSON value of every rank, in the order of the ranks. Errors are those of
        `meet`."""
        if self.size == 1:
            return [value]
        text = json.dumps(value).encode()
        with self.meeting(what):
            lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
            self._call(what, lambda: dist.all_gather(lengths, torch.tensor([len(text)])))
            texts = self._texts(what, text, [int(length) for length in lengths])
        return [json.loads(text) for text in texts]

    def once(self, what: str, function: Callable[[], T]) -> T | None:
        """Call `function` on the first rank while the other ranks wait. Return its result there,
        and None elsewhere. Errors are those of `meet`."""
        found = function() if self.first else None
        self.meet(what)
        return found

    def same(self, what: str, values: Mapping[str, Any]) -> None:
        """Raise ConfigError unless all ranks have the same JSON values. The message names the rank
        and the key that differ."""
        for rank, theirs in enumerate(self.gather(what, dict(values))):
            for key in {**values, **theirs}:
                if values.get(key) != theirs.get(key):
                    raise ConfigError(
                        f"parallel: expected the same {what} on all ranks, and {key} is "
                        f"{theirs.get(key)!r} on rank {rank} and {values.get(key)!r} on rank "
                        f"{self.rank}; start every rank with the same command, files and packages"
                    )

    # ---- tensors ---------------------------------------------------------------------------------
    def sum(self, what: str, *columns: Tensor) -> None:
        """Fill in, in place, what other ranks computed. Each element is 0 on all ranks but one, so
        the sum is exact."""
        if self.size == 1:
            return
        with self.meeting(what):
            for column in columns:
                wire = column if column.is_contiguous() else column.contiguous()
                self._call(what, partial(dist.all_reduce, wire))
                if wire is not column:
                    column.copy_(wire)

    def rows(self, what: str, mine: Tensor) -> list[Tensor]:
        """Return every rank's tensor, in the order of the ranks. The shapes may differ in the first
        dimension only."""
        if self.size == 1:
            return [mine]
        sizes = [size[0] for size in self.gather(what, list(mine.shape))]
        longest = max(sizes)
        padded = mine.new_zeros(longest, *mine.shape[1:])
        padded[: len(mine)] = mine
        everyone = [torch.zeros_like(padded) for _ in range(self.size)]
        with self.meeting(what):
            self._call(what, lambda: dist.all_gather(everyone, padded))
        return [row[:size] for row, size in zip(everyone, sizes, strict=True)]

    def to_owners(self, what: str, parts: Sequence[Tensor]) -> list[Tensor]:
        """Send the r-th part, flat, to rank r. Return the parts that every rank sent here, in the
        order of the ranks."""
        if self.size == 1:
            return [parts[0]]
        out, sizes = parts[0].new_empty(self.size * len(parts[self.rank])), [len(p) for p in parts]
        flat, arriving = torch.cat(list(parts)), [len(parts[self.rank])] * self.size
        self._call(what, lambda: dist.all_to_all_single(out, flat, arriving, sizes))
        self.moved[what] += sum(p.nbytes for rank, p in enumerate(parts) if rank != self.rank)
        return list(out.split(len(parts[self.rank])))

    def from_owner(self, what: str, owner: int, flat: Tensor) -> None:
        """Fill `flat`, in place, with the owner's values."""
        if self.size == 1:
            return
        self._call(what, lambda: dist.broadcast(flat, owner))
        self.moved[what] += flat.nbytes if owner != self.rank else 0

    # ---- what it came to -------------------------------------------------------------------------
    def metrics(self) -> dict[str, float]:
        """Return metrics of the work divided since the last call; nothing if there is a single
        rank."""
        if self.size == 1:
            return {}
        found = {f"parallel/{name}_bytes": float(count) for name, count in self.moved.items()}
        if self.loads:
            found["parallel/imbalance"] = max(self.loads)
        found["timing/waiting"] = self.waited
        self.moved, self.loads, self.waited = Counter(), [], 0.0
        return found


ALONE = Ranks()


def versions() -> dict[str, str]:
    """Return the versions that must be the same on all ranks."""
    return {"python": platform.python_version(), "torch": torch.__version__}


def world() -> Ranks:
    """Return the processes that torch.distributed has brought together; a single one if it is not
    initialised."""
    there = dist.is_available() and dist.is_initialized()
    return Ranks(dist.get_rank(), dist.get_world_size()) if there else Ranks()


def lanes_of(lanes: int | None, strict: bool, size: int) -> int:
    """Return the number of lanes in which `size` ranks sum.

    Args:
        lanes: number of lanes; None: as many as there are ranks.
        strict: whether sums must not depend on the number of ranks. With several ranks and
            lanes=None, this sets the number to `LANES`.
    Raises:
        ConfigError: the lanes cannot be divided among the ranks.
    """
    given = lanes is not None
    if lanes is None:
        lanes = LANES if strict and size > 1 else size
    if lanes % size:
        how = "leave parallel.lanes out" if given else "name lanes that they divide"
        raise ConfigError(
            f"config: expected parallel.lanes to be a multiple of the {size} ranks, got {lanes}"
            f"{'' if given else ' (what strict sets)'}; start as many ranks as divide {lanes}, or "
            f"{how}"
        )
    return lanes


@contextmanager
def joined(lanes: int | None = None, strict: bool = False) -> Iterator[Ranks]:
    """Provide the ranks of a run within the block. An error on one rank ends all ranks, with its
    message. Arguments and errors are those of `lanes_of`."""
    ranks = world()
    try:
        ranks.lanes = lanes_of(lanes, strict, ranks.size)
        yield ranks
    except BaseException as error:
        if isinstance(error, Exception | Stopped | KeyboardInterrupt):
            ranks.fail(error)
        raise
