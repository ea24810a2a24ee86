"""Arena: memory that is unused during training, such as the KV cache, lent to the forward pass and
to the head's workspace.

Inside `holding`, tensors that autograd saves for the backward pass are copied into this memory, so
that the originals are freed as soon as the forward pass drops them. A whole storage is copied, and
only once, so views and tensors saved twice keep the same bits and strides. Tensors that are small,
that belong to `keep` (the parameters), or that no longer fit are saved as usual.

Every copy is a separate storage over a range of the lent bytes. The range is free once that storage
has died, which is checked at the next copy. So no range is reused while any tensor reads it. Ranges
form a stack, since a backward pass drops the tensors saved last first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

_SMALLEST = 1 << 14  # bytes of a storage below which a copy costs more than it frees
_ALIGNMENT = 256


@dataclass(eq=False)
class _Region:
    """One lent storage and the stack of ranges in it: (end of the range, the storage over it)."""

    storage: torch.UntypedStorage
    ranges: list[tuple[int, StorageWeakRef]] = field(default_factory=list)

    def take(self, size: int) -> torch.UntypedStorage | None:
        start = -(-self.settle() // _ALIGNMENT) * _ALIGNMENT
        if start + size > self.storage.nbytes():
            return None
        # a separate storage, which keeps the lent one alive
        found: torch.UntypedStorage = self.storage[start : start + size]
        self.ranges.append((start + size, StorageWeakRef(found)))
        return found

    def left(self) -> int:
        """Return the bytes behind the top of the stack."""
        return max(0, self.storage.nbytes() - -(-self.settle() // _ALIGNMENT) * _ALIGNMENT)

    def settle(self) -> int:
        """Drop ranges whose storage has died from the top of the stack. Return the end of the range
        on top."""
        while self.ranges and self.ranges[-1][1].expired():
            self.ranges.pop()
        return self.ranges[-1][0] if self.ranges else 0


class Arena:
    """Memory of the tensors in `lent`, whose contents are lost. `keep`: tensors that outlive the
    graph anyway and are never copied."""

    def __init__(self, lent: Iterable[Tensor], keep: Iterable[Tensor] = ()) -> None:
        self._regions = [_Region(tensor.untyped_storage()) for tensor in lent]
        self._device = self._regions[0].storage.device
        self._keep = {tensor.untyped_storage()._cdata for tensor in keep}
        # address of the original -> (original, its version, copy)
        self._copies: dict[int, tuple[StorageWeakRef, int, StorageWeakRef]] = {}
        self._prune_at = 64
        self.peak = 0  # largest number of bytes in use

    @property
    def capacity(self) -> int:
        """Number of bytes lent."""
        return sum(region.storage.nbytes() for region in self._regions)

    @property
    def used(self) -> int:
        """Number of bytes up to the end of the last range that some tensor still reads."""
        return sum(region.settle() for region in self._regions)

    @contextlib.contextmanager
    def holding(self) -> Iterator[None]:
        """Store in this memory the tensors that autograd saves for graphs built within the
        block."""
        with saved_tensors_hooks(self._pack, lambda held: held):
            yield

    def spare(self, most: int) -> Tensor | None:
        """Take up to `most` bytes that nothing occupies, as one uint8 tensor of any contents, or
        None if there are none. They are free again once the tensor is dropped."""
        region = max(self._regions, key=_Region.left)
        size = min(most, region.left() // _ALIGNMENT * _ALIGNMENT)
        found = region.take(size) if size > 0 else None
        if found is None:
            return None
        return torch.empty(0, dtype=torch.uint8, device=self._device).set_(found, 0, (size,), (1,))

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
        """Whether the storage already lies in this memory, as the input of a checkpointed layer
        may."""
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
    """Return a tensor with the shape and strides of `like` over another storage."""
    return torch.empty(0, dtype=like.dtype, device=like.device).set_(
        storage, like.storage_offset(), like.size(), like.stride()
    )
