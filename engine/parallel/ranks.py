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
import math
import platform
import signal
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from importlib import metadata
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fusedrl.engine.base import errors
from fusedrl.engine.base.errors import (
    SAID,
    ConfigError,
    Elsewhere,
    SetupError,
    Stopped,
    as_machine_fault,
    ran_out,
)

T = TypeVar("T")
LANES = 8  # default if sums must not depend on the number of ranks
_INTERRUPTED = 130  # exit code of a run that Ctrl-C ended
_WORD = "fusedrl/failed"  # where a rank that fails within an exchange leaves its message
_LONGEST = 4000  # characters of an error message that are sent to the other ranks
# errors that are raised under their own names on the ranks that did not fail themselves
_KNOWN = {
    name: kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, Exception)
} | {kind.__name__: kind for kind in (RuntimeError, ValueError, FileNotFoundError, OSError)}


class _Lost(SetupError):
    """Another rank is gone, or does not come."""


class Ranks:
    """All processes of a run, seen from one of them.

    Attributes:
        rank, size: number of this process, from 0, and number of processes.
        lanes: number of lanes of sums over all ranks (lanes.py).
        moved: bytes that this rank sent of gradients, and received of parameters and of everything
            else ("experience"), as if an all-reduce went round a ring.
        loads: for each division of an update's work, the load of the busiest rank divided by the
            mean load.
        drawn: tokens that each rank generated, by its number.
        waited: seconds in which this rank waited until all had come to a meeting.
        exchanged: seconds in which it exchanged tensors.
        worked: seconds of each phase of a step without those two.
        inside: whether the ranks exchange tensors now.
        told: whether all ranks know of a failure, so that none waits for another any more.
        stopped: what a signal raised before the run began, in case that a library swallowed it.
    """

    def __init__(self, rank: int = 0, size: int = 1, lanes: int | None = None) -> None:
        self.rank, self.size, self.lanes = rank, size, size if lanes is None else lanes
        self.moved: Counter[str] = Counter()
        self.loads: list[float] = []
        self.drawn: Counter[int] = Counter()
        self.waited = self.exchanged = 0.0
        self.worked: dict[str, float] = {}
        self.told = self.inside = self.holding = False
        self.held: BaseException | None = None
        self.stopped: Stopped | None = None
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
        others any more, since they wait for the tensors. So the block should do nothing else: what
        needs memory comes before it. Errors are those of `meet`."""
        with self._whole():
            if self.size > 1:
                self._meet(what, "")
            self.inside = True
            yield
            self.inside = False

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """Hold back what a signal handler would raise (`interrupt`) until the end of the block. The
        other ranks are in the same exchange: one that broke off would answer them with the next."""
        before, self.holding = self.holding, True
        try:
            yield
        finally:
            self.holding = before
            held, self.held = (self.held, None) if not before else (None, self.held)
        if held is not None:
            raise held

    def interrupt(self, error: BaseException) -> None:
        """Raise `error` out of a signal handler: at once, or at the end of the exchange with other
        ranks in which the signal came."""
        if not self.holding:
            raise error
        self.held = error

    def _meet(self, what: str, failure: str) -> list[str]:
        """Exchange the purpose of the meeting, and whether a rank failed. Raise the error of
        another rank, unless this rank failed as well; then return the failures of all."""
        if self.stopped is not None and not failure:
            raise self.stopped
        with self._whole():
            return self._met_all(what, failure)

    def _met_all(self, what: str, failure: str) -> list[str]:
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
        self.moved["experience"] += (self.size - 1) * longest
        return [
            bytes(row[:length].tolist()).decode()
            for row, length in zip(everyone, lengths, strict=True)
        ]

    def _theirs(self, said: Sequence[str]) -> BaseException:
        rank = next(rank for rank, text in enumerate(said) if text)
        return self._error_of(rank, said[rank])

    def _error_of(self, rank: int, text: str) -> BaseException:
        """Return the error that another rank reported."""
        name, _, message = text.partition(": ")
        if name in ("Stopped", "KeyboardInterrupt", "SystemExit"):
            return Stopped(int(message) if message.isdecimal() else _INTERRUPTED)
        kind = _KNOWN.get(name, RuntimeError)
        shown = message if name in _KNOWN else text
        marked = type(kind.__name__, (kind, Elsewhere), {})
        return marked(f"rank {rank} of {self.size}: {shown}")

    def fail(self, error: BaseException) -> bool:
        """Report to the other ranks, in their next meeting, that this rank failed; only the first
        call does so. Return whether they know and can still meet."""
        if self.size == 1 or self.told:
            return True
        text = f"{type(error).__name__}: {error}"[:_LONGEST]
        if self.inside:
            if not isinstance(error, _Lost | Elsewhere):
                self._leave_word(text)
            return False
        try:
            said = self._meet("an error", text)
        except Exception:  # some rank is gone, so no meeting is possible any more
            return False
        if text in said[: self.rank]:
            error.add_note(SAID)
        return self.told

    def _leave_word(self, text: str) -> None:
        """Write a failure where the others look when the exchange of tensors breaks off."""
        with suppress(Exception):  # without a store, they say where they waited
            _store().set(_WORD, json.dumps([self.rank, text]))

    def _word(self) -> BaseException | None:
        """Return the failure that another rank has left, if there is one."""
        with suppress(Exception):
            store = _store()
            if store.check([_WORD]):
                rank, text = json.loads(store.get(_WORD))
                return None if rank == self.rank else self._error_of(rank, text)
        return None

    def _call(self, what: str, collective: Callable[[], Any]) -> None:
        began = time.perf_counter()
        try:
            collective()
            seconds = time.perf_counter() - began
            if self.inside:
                self.exchanged += seconds
            else:
                self.waited += seconds
        except RuntimeError as error:  # every failure of a backend is one
            if ran_out(error):
                raise
            if (theirs := self._word()) is not None:
                raise theirs from error
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            late = "timed out" in str(error).lower() or "timeout" in str(error).lower()
            raise _Lost(
                f"parallel: rank {self.rank} of {self.size} waited at {what!r} (meeting "
                f"{self._met}) and another rank "
                + ("did not come in time" if late else "is gone")
                + f" ({reason}); its own output says why. Start all ranks again: a run that is "
                "resumed goes on from its last checkpoint"
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

    def own(self, what: str, mine: str | None) -> None:
        """Raise SetupError if another rank has the same value; None is no value."""
        for rank, theirs in enumerate(self.gather(what, mine)):
            if rank != self.rank and mine is not None and theirs == mine:
                one, other = sorted((rank, self.rank))
                raise SetupError(
                    f"parallel: expected each rank to have a {what} of its own, and ranks {one} "
                    f"and {other} have the same ({mine}); start at most as many as there are, each "
                    "with another in CUDA_VISIBLE_DEVICES or with all of them, or set --device cpu"
                )

    # ---- tensors ---------------------------------------------------------------------------------
    def sum(self, what: str, *columns: Tensor) -> None:
        """Fill in, in place, what other ranks computed. Each element is 0 on all ranks but one, so
        the sum is exact."""
        if self.size == 1:
            return
        wires = [column.contiguous() for column in columns]
        with self.meeting(what):
            for wire in wires:
                self._call(what, partial(dist.all_reduce, wire))
                self.moved["experience"] += 2 * (self.size - 1) * wire.nbytes // self.size
        for column, wire in zip(columns, wires, strict=True):
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
        self.moved["experience"] += (self.size - 1) * padded.nbytes
        return [row[:size] for row, size in zip(everyone, sizes, strict=True)]

    def to_owners(self, what: str, flat: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """Send the first `sizes[0]` numbers to rank 0, the next `sizes[1]` to rank 1, and so on.
        Return what every rank sent here, in the order of the ranks. Errors are those of `meet`."""
        if self.size == 1:
            return [flat]
        mine = sizes[self.rank]
        out, arriving = flat.new_empty(self.size * mine), [mine] * self.size
        with self.meeting(what):
            self._call(what, lambda: dist.all_to_all_single(out, flat, arriving, list(sizes)))
        self.moved[what] += (len(flat) - mine) * flat.itemsize
        return list(out.view(self.size, mine))

    def from_owner(self, what: str, owner: int, flat: Tensor) -> None:
        """Fill `flat`, in place, with the owner's values. Call it inside a meeting."""
        if self.size == 1:
            return
        self._call(what, lambda: dist.broadcast(flat, owner))
        self.moved[what] += flat.nbytes if owner != self.rank else 0

    # ---- what it came to -------------------------------------------------------------------------
    @contextmanager
    def working(self, phase: str) -> Iterator[None]:
        """Count the seconds of the block, without those in which this rank waited or exchanged
        tensors, as work of a phase."""
        began, apart = time.perf_counter(), self.waited + self.exchanged
        yield
        apart = self.waited + self.exchanged - apart
        seconds = time.perf_counter() - began - apart
        self.worked[phase] = self.worked.get(phase, 0.0) + seconds

    def metrics(self) -> dict[str, float]:
        """Return metrics of the work divided since the last call; nothing if there is a single
        rank. Errors are those of `meet`."""
        if self.size == 1:
            return {}
        found = {f"parallel/{name}_bytes": float(count) for name, count in self.moved.items()}
        found["timing/waiting"], found["timing/exchange"] = self.waited, self.exchanged
        if self.loads:
            found["parallel/imbalance"] = max(self.loads)
        if drawn := sum(self.drawn.values()):
            found["parallel/imbalance_tokens"] = max(self.drawn.values()) * self.size / drawn
        times = self.gather("times", self.worked)
        for rank, worked in enumerate(times):
            found |= {f"parallel/rank{rank}/{phase}": s for phase, s in worked.items()}
        whole = [math.fsum(worked.values()) for worked in times]
        if sum(whole):
            found["parallel/imbalance_time"] = max(whole) * self.size / math.fsum(whole)
        self.moved, self.drawn, self.worked = Counter(), Counter(), {}
        self.loads, self.waited, self.exchanged = [], 0.0, 0.0
        return found


ALONE = Ranks()


def _store() -> Any:
    """Return the store through which the processes found one another."""
    group = dist.group.WORLD
    if group is None:
        raise RuntimeError("torch.distributed is not initialised")
    return group.get_group_store()


def versions() -> dict[str, str]:
    """Return the versions that must be the same on all ranks: Python's, and those of the packages
    that decide what is computed; "absent" for one that is not installed."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("fusedrl", "transformers", "tokenizers", "safetensors", "triton", "torchao"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def world() -> Ranks:
    """Return the processes that torch.distributed has brought together; a single one if it is not
    initialised."""
    there = dist.is_available() and dist.is_initialized()
    return Ranks(dist.get_rank(), dist.get_world_size()) if there else Ranks()


def card(device: str | None = None) -> str | None:
    """Return the identity of the GPU on which this process computes; None if it is on a CPU.
    `device` is the device of the configuration."""
    if device == "cpu" or not torch.cuda.is_available():
        return None
    index = None if device is None else torch.device(device).index
    return str(torch.cuda.get_device_properties(index).uuid)


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
        ways = [f"start as many ranks as divide {lanes}"]
        if size & (size - 1) == 0:  # a power of two, as lanes are
            ways.append(f"set --parallel.lanes {size} or more")
        if given and not strict:
            ways.append("leave parallel.lanes out")
        raise ConfigError(
            f"config: expected parallel.lanes to be a multiple of the {size} ranks, got {lanes}"
            f"{'' if given else ' (what strict sets)'}; {', or '.join(ways)}"
        )
    return lanes


@contextmanager
def _heeding(ranks: Ranks) -> Iterator[None]:
    """Let signals that would end this process wait for the end of an exchange with other ranks."""

    def stop(number: int, _: object) -> None:
        ranks.stopped = ranks.stopped or Stopped(128 + number)
        ranks.interrupt(ranks.stopped)

    before = {}
    if ranks.size > 1 and threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def joined(
    lanes: int | None = None, strict: bool = False, device: str | None = None
) -> Iterator[Ranks]:
    """Provide the ranks of a run within the block. An error on one rank ends all ranks, with its
    message. Arguments and errors are those of `lanes_of`, and:

    Args:
        device: the device of the configuration.
    Raises:
        SetupError: two ranks compute on the same GPU, or memory ran out.
    """
    ranks = world()
    with _heeding(ranks):
        try:
            ranks.lanes = lanes_of(lanes, strict, ranks.size)
            ranks.own("GPU", card(device) if ranks.size > 1 else None)
            yield ranks
        except BaseException as error:
            told = ranks.stopped or as_machine_fault(error)
            if isinstance(told, Exception | Stopped | KeyboardInterrupt):
                ranks.fail(told)
            if told is not error:
                raise told from error
            raise
