"""Arena: memory that stands idle between rollouts, lent to the training forward.

Inside `holding`, what autograd saves for the backward pass is copied here as it is saved, so that
the original goes when the forward pass lets go of it. A copy is of a whole storage and made once,
so views and tensors saved twice stay what they were: same bits, same strides. What is small or
belongs to `keep` (the parameters) is saved as ever, and so is what no longer fits.

Every copy is a storage of its own over a range of the lent bytes. The range is free when that
storage has died, which is asked at the next copy: nothing can be handed out while a tensor reads
it, however it got there. Ranges form a stack, since a backward pass lets go of what was saved last
first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

_SMALLEST = 1 << 14  # bytes: below, a copy costs more than it frees
_ALIGNMENT = 256


@dataclass(eq=False)
class _Region:
    """One lent storage and the stack of ranges in it: (end, the storage over it)."""

    storage: torch.UntypedStorage
    ranges: list[tuple[int, StorageWeakRef]] = field(default_factory=list)

    def take(self, size: int) -> torch.UntypedStorage | None:
        start = -(-self.settle() // _ALIGNMENT) * _ALIGNMENT
        if start + size > self.storage.nbytes():
            return None
        # a storage of its own, which keeps the lent one alive
        found: torch.UntypedStorage = self.storage[start : start + size]
        self.ranges.append((start + size, StorageWeakRef(found)))
        return found

    def settle(self) -> int:
        """The end of what is in use."""
        while self.ranges and self.ranges[-1][1].expired():
            self.ranges.pop()
        return self.ranges[-1][0] if self.ranges else 0


class Arena:
    """The bytes of `lent`, whose contents are lost. `keep`: tensors that outlive the graph anyway
    and are never copied."""

    def __init__(self, lent: Iterable[Tensor], keep: Iterable[Tensor] = ()) -> None:
        self._regions = [_Region(tensor.untyped_storage()) for tensor in lent]
        self._device = self._regions[0].storage.device
        self._keep = {tensor.untyped_storage()._cdata for tensor in keep}
        # by the original's address: it, its version, the copy
        self._copies: dict[int, tuple[StorageWeakRef, int, StorageWeakRef]] = {}
        self._prune_at = 64
        self.peak = 0  # bytes in use at the most

    @property
    def capacity(self) -> int:
        """Bytes lent."""
        return sum(region.storage.nbytes() for region in self._regions)

    @property
    def used(self) -> int:
        """Bytes that some tensor still reads, and what lies below them."""
        return sum(region.settle() for region in self._regions)

    @contextlib.contextmanager
    def holding(self) -> Iterator[None]:
        """Keep here, within the block, the saved tensors of graphs that are built."""
        with saved_tensors_hooks(self._pack, lambda held: held):
            yield

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = (
            tensor.untyped_storage()
            if type(tensor) is Tensor and tensor.layout == torch.strided
            else None
        )
        if (
            storage is None
            or storage.nbytes() < _SMALLEST
            or storage.device != self._device
            or storage._cdata in self._keep
            or self._holds(storage)
        ):
            return tensor
        copy = self._copied(storage, tensor._version)
        return tensor if copy is None else _over(copy, tensor)

    def _holds(self, storage: torch.UntypedStorage) -> bool:
        """Whether it is one of ours already, as what a checkpointed layer got in is."""
        at = storage.data_ptr()
        return any(
            region.storage.data_ptr() <= at < region.storage.data_ptr() + region.storage.nbytes()
            for region in self._regions
        )

    def _copied(self, storage: torch.UntypedStorage, version: int) -> torch.UntypedStorage | None:
        key = storage._cdata
        if key in self._copies:  # a weak reference keeps the address from being used again
            original, then, copy = self._copies[key]
            if not original.expired() and then == version:
                known = torch.UntypedStorage._new_with_weak_ptr(copy.cdata)
                if known is not None:
                    return known
        made = next(
            (
                found
                for region in self._regions
                if (found := region.take(storage.nbytes())) is not None
            ),
            None,
        )
        if made is None:
            return None
        made.copy_(storage)
        self.peak = max(
            self.peak, sum(region.ranges[-1][0] for region in self._regions if region.ranges)
        )
        if len(self._copies) >= self._prune_at:
            self._copies = {
                k: entry
                for k, entry in self._copies.items()
                if not entry[0].expired() and not entry[2].expired()
            }
            self._prune_at = 64 + 2 * len(self._copies)
        self._copies[key] = (StorageWeakRef(storage), version, StorageWeakRef(made))
        return made


def _over(storage: torch.UntypedStorage, like: Tensor) -> Tensor:
    """The tensor that `like` is, over another storage."""
    return torch.empty(0, dtype=like.dtype, device=like.device).set_(
        storage, like.storage_offset(), like.size(), like.stride()
    )
