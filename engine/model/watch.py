"""Watch: checks whether the weights that are read are still those that are trained, and whether
they have changed.

A decoder's parameters are read in two ways: the training forward goes through its modules, the
sampler through one flat tuple of tensors (`Decoder.weights`). A transformers model may also share
the storage (sharing.py). Whenever weights are read, three checks make sure that all of these still
see the same weights:

    structure      every module and parameter is the same object as before, under the same name and
                   at the same address in memory
    counts         autograd's count of in-place writes to each parameter, and the number of steps of
                   `torch.optim` optimizers on parameters, since fused optimizers skip that count
    fingerprint    the memory itself, for uncounted writes (through `.data`, numpy, DLPack, a
                   replayed graph)

Cost      structure and counts: under a microsecond a parameter. The fingerprint is the first row of
          every parameter, bit for bit, and the sum of every row's bits as 64-bit integers. It reads
          the weights once, in about half the time of a decoding step of one sequence, at the start
          of every call that generates. During a stream only the first rows are checked, each time
          the stream resumes after its consumer ran.
Found     at the start of a call: every write that changes one element or one row, or the order of
          rows or of columns.
Missed    words of 8 bytes that change places within a single row that is not the first; changes of
          several words of a row that cancel as integers. Within a stream, until the next call:
          uncounted writes that change no first row. beside.py watches what modules compute with in
          addition to their parameters.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import sys
import threading
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import fields, replace
from itertools import chain
from operator import attrgetter, is_
from types import FrameType
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from fusedrl.engine.model.adapters import LayerAdapter, inputs, targets
from fusedrl.engine.model.beside import Beside, classes, differences
from fusedrl.engine.model.decoder import Decoder, Layer
from fusedrl.engine.model.peft_adapters import PeftAdapter, shared_views
from fusedrl.engine.model.sharing import shared_config

Depth = Literal["counts", "first rows", "all"]

_count = attrgetter("_version")


# whose methods the hooks of all optimizers call. A hook of each watch's own would be removed where
# the watch is collected, which may be while torch goes through the hooks
_WATCHES: weakref.WeakSet[Watch] = weakref.WeakSet()


@functools.cache
def _listen() -> None:
    """Have every watch told, from now on, before and after each step of a torch optimizer."""

    def before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for watch in list(_WATCHES):
            if watch._shares:
                watch._check_gradients(optimizer)
            watch._stepping(optimizer)

    def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for watch in list(_WATCHES):
            watch._stepped(optimizer)

    register_optimizer_step_pre_hook(before)
    register_optimizer_step_post_hook(after)


class Watch:
    """Watch over a decoder, and over the transformers model that shares its storage, if there is
    one.

    `version` counts the changes that were noticed, or reported by `mark`. Several threads may use
    one Watch.
    """

    def __init__(self, decoder: Decoder, module: nn.Module | None = None) -> None:
        self.version = 0
        self._decoder, self._module = decoder, module
        self._lock = threading.RLock()
        # held while the weights are read or written, and by which thread's optimizer
        self._still, self._writer = threading.Lock(), 0
        self._step: FrameType | None = None  # of that optimizer's step
        self._ending = threading.Lock()
        self._steps = 0
        self._kinds = classes(decoder)
        self._shapes = {
            name: p.shape for name, p in decoder.named_parameters() if ".lora." not in name
        }
        self._module_kinds = {} if module is None else classes(module)
        self._beside = [Beside(decoder, "the decoder", "the sampler does not run")]
        if module is not None:
            self._beside.append(Beside(module, "the shared model", "the actor does not run"))
            self._read, self._books = shared_config(module), _books(module)
        self._counts: list[int] = []
        self._rows: Tensor | None = None
        self._sums: Tensor | None = None
        self._take()
        self._shares = module is not None
        _WATCHES.add(self)
        _listen()

    # ---- looking ---------------------------------------------------------------------------------
    def look(self, depth: Depth | None = None, *, lightly: bool = False) -> int:
        """Check the weights and return their present version. It is a new one if the weights were
        written to, or replaced, since the last check.

        Args:
            depth: how much to compare before generating: counted writes only, the first rows of the
                parameters as well, or all of their memory. None: counted writes only, for callers
                that read the present weights and keep nothing computed from them.
            lightly: do not check addresses, shapes, strides and dtypes (which can change on their
                own only by an assignment to `.data`), nor anything besides the parameters. For
                callers that have made a full check just before.
        Raises:
            RuntimeError: the weights have changed in a way that cannot be tracked; the message says
                what to do. The recorded state is unchanged, so the next check raises the same error
                unless the change was undone.
        """
        with self._lock:
            moved = self._moved(lightly)
            if moved:
                self._take()
            elif not lightly:
                for beside in self._beside:
                    beside.look(deep=depth == "all")
            if (
                not lightly
                and self._module is not None
                and _books(self._module, self._books) is not self._books
            ):
                self._follow_config(self._module)
            counts = [self._steps, *map(_count, self._counted)]
            changed = moved or counts != self._counts
            self._counts = counts
            if changed:
                self._rows = self._sums = None
            if depth is not None:
                changed |= self._written(depth)
            self.version += changed
            return self.version

    def mark(self) -> None:
        """Record that the weights changed: increase the version by one, whether or not the change
        would have been noticed."""
        with self._lock:
            before = self.version
            self.look()
            self.version = before + 1
            self._rows = self._sums = None

    def _moved(self, lightly: bool) -> bool:
        """Whether a module or a parameter was replaced, or moved in memory."""
        if list(chain.from_iterable(self._slots)) != self._names or not all(
            map(is_, chain.from_iterable(map(dict.values, self._slots)), self._held)
        ):
            return True
        if lightly or self._decoder.lora is not self._lora:
            return self._decoder.lora is not self._lora
        return (
            list(map(Tensor.data_ptr, self._parameters)) != self._addresses
            or list(map(_layout, self._parameters)) != self._layouts
        )

    def _written(self, depth: Depth) -> bool:
        """Whether the memory differs from the last fingerprint. If there is no fingerprint, take
        one."""
        if self._rows is None or self._sums is None:
            self._rows, self._sums = self._first_rows(), self._row_sums()
            return False
        if depth == "counts":
            return False
        rows = self._first_rows()
        sums = self._row_sums() if depth == "all" else self._sums
        if torch.equal(rows, self._rows) and (sums is self._sums or torch.equal(sums, self._sums)):
            return False
        self._rows, self._sums = rows, sums if depth == "all" else self._row_sums()
        return True

    @torch.no_grad()
    def _first_rows(self) -> Tensor:
        """Return the first rows of the parameters as bits, so that NaN equals itself. The views are
        made anew each time: stored views would keep memory that the weights no longer use."""
        firsts = [p[0] if p.ndim > 1 else p for p in self._own]
        return torch.cat([*firsts, *(_rest(p) for p in self._ragged)]).view(torch.uint8)

    @torch.no_grad()
    def _row_sums(self) -> Tensor:
        return torch.cat([torch.sum(_words(p), 1) for p in self._own if p.ndim > 1])

    # ---- what is watched -------------------------------------------------------------------------
    def _take(self) -> None:
        """Record the present weights, if the sampler can use them, and let the sampler read
        them."""
        self._check_decoder()
        if self._module is not None:
            self._check_module(self._module)
        for beside in self._beside:
            beside.take()
        self._decoder._settle()
        trees = [self._decoder] if self._module is None else [self._decoder, self._module]
        tables: list[dict[str, Any]] = [
            table
            for tree in trees
            for part in tree.modules()
            for table in (part._parameters, part._modules)
            if table
        ]
        self._slots = tables
        self._names, self._held = (
            list(chain.from_iterable(tables)),
            [value for table in tables for value in table.values()],
        )
        self._parameters = [p for tree in trees for p in tree.parameters()]
        self._addresses, self._layouts = (
            list(map(Tensor.data_ptr, self._parameters)),
            list(map(_layout, self._parameters)),
        )
        self._ids = {id(p) for p in self._parameters}
        self._places = set(self._addresses)
        self._lora = self._decoder.lora
        self._counted = [p for p in self._parameters if not p.is_inference()]
        self._counts = [self._steps, *map(_count, self._counted)]
        self._own = list(self._decoder.parameters())
        self._ragged = [p for p in self._own if p.ndim > 1 and _together(p) > 1]
        self._rows = self._sums = None

    def _check_decoder(self) -> None:
        decoder = self._decoder
        found = dict(decoder.named_parameters(remove_duplicate=False))
        names = {name for name in found if ".lora." not in name}
        shard = next(
            (type(p.data).__name__ for p in found.values() if type(p.data) is not Tensor), None
        )
        kinds = {(p.dtype, p.device) for p in found.values()}
        if shard is not None:
            _refuse(
                f"its parameters are {shard}s",
                "this actor is one process on one device: shard another copy, or train without "
                "sharding",
            )
        if strange := sorted(names ^ self._shapes.keys()) + differences(
            self._kinds, classes(decoder)
        ):
            _refuse(
                f"{', '.join(strange[:4])} of it came, went or changed its class",
                "take off what replaced it (prune.remove, remove_parametrizations, "
                "remove_weight_norm), or load the weights into a new actor; for adapters there is "
                "actor.add_adapter",
            )
        for name, p in found.items():
            if not p.is_contiguous():
                _refuse(f"{name} has strides {p.stride()}", "assign a contiguous tensor")
        for name, shape in self._shapes.items():
            if found[name].shape != shape:
                _refuse(
                    f"{name} is {list(found[name].shape)}, expected {list(shape)}",
                    "change the model's sizes with transformers, save it, and load that",
                )
        if len(kinds) != 1:
            _refuse(
                "its parameters are "
                f"{', '.join(sorted(f'{dtype} on {device}' for dtype, device in kinds))}, expected "
                "one dtype on one device",
                "cast and move all of it, by actor.decoder.to(...)",
            )
        if decoder.device.type == "meta":
            _refuse(
                "its parameters have no memory (device meta)",
                "load the weights with HybridActor.from_pretrained",
            )
        self._check_adapter()

    def _check_adapter(self) -> None:
        decoder = self._decoder
        adapters = [layer.lora for layer in decoder.layers]
        if decoder.lora is None:
            fits = not any(adapter is not None for adapter in adapters)
        else:
            want = LayerAdapter(
                tuple(targets(decoder.config, decoder.lora).values()),
                inputs(decoder.config),
                decoder.lora,
                decoder.dtype,
                torch.device("meta"),
            )
            fits = all(
                type(adapter) is LayerAdapter
                and adapter.rows == want.rows
                and adapter.scale == want.scale
                and adapter.shapes() == want.shapes()
                for adapter in adapters
            )
        if not fits:
            _refuse(
                f"the adapters of its layers are not those of decoder.lora = {decoder.lora}",
                "add one with actor.add_adapter or load_adapter; to take it off, "
                "set decoder.lora and every layer's lora to None",
            )

    def _check_module(self, module: nn.Module) -> None:
        views = shared_views(self._decoder)
        followed = cast("PeftAdapter | None", self._decoder.followed)
        found = dict(module.named_parameters(remove_duplicate=False))
        ours = {id(found.get(name)) for name in views}
        problems = [
            name
            for name, view in views.items()
            if name not in found
            or type(found[name].data) is not Tensor
            or not _same_place(found[name], view)
        ]
        problems += [
            name
            for name, p in found.items()
            if id(p) not in ours and (followed is None or not followed.another(name))
        ]
        problems += differences(self._module_kinds, classes(module))
        if problems:
            more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
            raise RuntimeError(
                f"HybridActor: {problems[0]}{more} of the shared model no longer lies in the "
                "storage that it generates from (the model was cast, "
                "moved, wrapped, sharded, pruned, resized, given an adapter or to another actor, "
                "or loaded with assign=True); change weights in "
                "place, undo it, or build a new actor with from_module"
            )

    def _follow_config(self, module: nn.Module) -> None:
        """Update the configuration after somebody wrote to it: take over entries that do not affect
        any computation, such as the ids that end a completion."""
        books = _books(module)
        try:
            now = shared_config(module)
        except ValueError as error:
            raise RuntimeError(
                "HybridActor: the shared model's config is one that the actor cannot follow: "
                f"{error}; set it back, or "
                "build a new actor"
            ) from error
        kept = {
            name: getattr(self._read, name)
            for name in ("bos_token_id", "pad_token_id", "eos_token_ids", "initializer_range")
        }
        if changed := [
            f.name
            for f in fields(now)
            if f.compare and getattr(replace(now, **kept), f.name) != getattr(self._read, f.name)
        ]:
            raise RuntimeError(
                f"HybridActor: the shared model's config was changed: by it {', '.join(changed)} "
                "would be another, and neither its "
                "modules nor the actor were built so; set it back, or save the model with it and "
                "load that"
            )
        followed = {name: getattr(now, name) for name in (*kept, "raw", "raw_generation")}
        self._decoder.config = replace(self._decoder.config, **followed)
        for layer in cast(Iterable[Layer], self._decoder.layers):
            layer.config = self._decoder.config
        self._read, self._books = now, books
        for beside in self._beside:
            beside.expect()

    # ---- threads ---------------------------------------------------------------------------------
    @contextlib.contextmanager
    def still(self) -> Iterator[None]:
        """Keep `torch.optim` optimizers of other threads from writing to the weights within the
        block. Wait first for an optimizer step in progress to end; a step that begins later waits
        for the block. A step that raised an error has ended."""
        entered = self._enter()
        try:
            yield
        finally:
            if entered:
                self._still.release()

    def _enter(self) -> bool:
        """Wait until no other thread reads or writes the weights, then lock them. Return False if
        an optimizer step of this thread holds the lock already."""
        while True:
            if (writer := self._writer) and not self._under_way():
                self._end(writer)
            if self._writer == threading.get_ident():
                return False
            if self._still.acquire(timeout=0.05):
                return True

    def _under_way(self) -> bool:
        """Whether the optimizer step that began last is still on the stack of its thread. (The post
        hook does not run for a step that raised an error.)"""
        frame = sys._current_frames().get(self._writer)
        while frame is not None and frame is not self._step:
            frame = frame.f_back
        return frame is not None

    def _end(self, writer: int) -> None:
        with self._ending:
            if self._writer == writer != 0:
                self._steps += 1  # it may have written before it raised
                self._writer, self._step = 0, None
                self._still.release()

    def _stepping(self, optimizer: Optimizer) -> None:
        """Let an optimizer step that begins wait for the decoding step of another thread."""
        if self._ours(optimizer) and self._enter():  # not within a step of a class above
            # of the function that calls the hooks and the step
            self._writer, self._step = threading.get_ident(), sys._getframe(2)

    # ---- optimizers ------------------------------------------------------------------------------
    def _stepped(self, optimizer: Optimizer) -> None:
        """Count an optimizer step on a parameter, or on a tensor that begins at a parameter's
        address. Needed because fused optimizers write without increasing autograd's count."""
        self._steps += self._ours(optimizer)
        if self._step is sys._getframe(2):
            self._end(threading.get_ident())

    def _ours(self, optimizer: Optimizer) -> bool:
        return any(
            id(p) in self._ids
            or (type(p) in (Tensor, nn.Parameter) and p.data_ptr() in self._places)
            for group in optimizer.param_groups
            for p in group["params"]
        )

    def _check_gradients(self, optimizer: Optimizer) -> None:
        """Check that gradients have the memory layout of their parameters, because fused optimizers
        pair values by position in memory. Autograd makes them so, but an assigned gradient may
        differ, and a parameter of [in, out] is a transposed view here."""
        fused = {
            id(p) for group in optimizer.param_groups if group.get("fused") for p in group["params"]
        }
        if self._module is None or not fused:
            return
        for name, p in self._module.named_parameters():
            if (
                id(p) in fused
                and p.grad is not None
                and any(
                    a != b
                    for a, b, size in zip(p.grad.stride(), p.stride(), p.shape, strict=True)
                    if size > 1
                )
            ):
                raise RuntimeError(
                    f"HybridActor: the gradient of {name} has strides {p.grad.stride()} but the "
                    f"parameter {p.stride()}, and a fused optimizer "
                    "would pair the wrong values; write gradients with p.grad.copy_, or use "
                    "fused=False"
                )


def _refuse(what: str, remedy: str) -> None:
    raise RuntimeError(
        f"HybridActor: the decoder can no longer be generated from: {what}; {remedy}"
    )


def _books(module: nn.Module, before: list[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
    """Return a copy of the entries of a transformers model's configurations; `before` itself if
    nothing has changed."""
    now = [
        vars(found)
        for name in ("config", "generation_config")
        if (found := getattr(module, name, None)) is not None
    ]
    return before if before is not None and now == before else copy.deepcopy(now)


def _layout(p: Tensor) -> tuple[torch.Size, tuple[int, ...], torch.dtype]:
    return p.shape, p.stride(), p.dtype


def _same_place(p: Tensor, view: Tensor) -> bool:
    return (
        p.data_ptr() == view.data_ptr() and p.device == view.device and _layout(p) == _layout(view)
    )


def _words(p: Tensor) -> Tensor:
    """Return the memory of a matrix as [R, C] int64, by rows, or by the smallest number of rows
    that make whole words. Remaining last rows are left out (see `_rest`)."""
    size = p.element_size()
    if p.storage_offset() * size % 8:
        p = p.clone()
    if p.shape[1] * size % 8 == 0:
        return p.view(torch.int64)
    together = _together(p)
    R = len(p) // together
    return p[: R * together].view(-1).view(torch.int64).view(R, together * p.shape[1] * size // 8)


def _together(p: Tensor) -> int:
    return 8 // math.gcd(8, p.shape[1] * p.element_size())


def _rest(p: Tensor) -> Tensor:
    """Return the rows of a matrix that `_words` leaves out."""
    return p[len(p) - len(p) % _together(p) :].reshape(-1)
