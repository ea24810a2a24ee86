"""Kept: the token ids that truncation (top-k, top-p, min-p) left in each row. `sample` returns them
and `logprob` takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Kept(NamedTuple):
    """Token ids that truncation left in each row. Row n has token_ids[offsets[n]:offsets[n + 1]],
    ascending; an empty row means the whole vocabulary (nothing was truncated)."""

    # [K] int32, K at least offsets[-1]; entries from offsets[-1] on are meaningless
    token_ids: Tensor
    offsets: Tensor  # [N + 1] int64, ascending from 0

    @classmethod
    def whole(cls, rows: int, device: torch.device | str = "cpu") -> Kept:
        """Make `rows` rows in which nothing was truncated."""
        ids = torch.zeros(0, dtype=torch.int32, device=device)
        return cls(ids, torch.zeros(rows + 1, dtype=torch.int64, device=device))

    @classmethod
    def of_lists(cls, rows: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> Kept:
        """Build from one list of ascending ids per row; an empty list means the whole
        vocabulary."""
        sizes = torch.tensor([len(row) for row in rows], dtype=torch.int64)
        ids = np.concatenate([np.zeros(0, np.int32), *(np.asarray(row, np.int32) for row in rows)])
        offsets = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
        return cls(torch.from_numpy(ids).to(device), offsets.to(device))

    @classmethod
    def concat(cls, parts: Sequence[Kept]) -> Kept:
        """Concatenate the rows of all parts, in order; needs at least one part."""
        sizes = torch.cat([part.offsets.diff() for part in parts])
        ids = torch.cat([part.token_ids[: int(part.offsets[-1])] for part in parts])
        return cls(ids, torch.nn.functional.pad(sizes.cumsum(0), (1, 0)))

    def select(self, rows: Tensor) -> Kept:
        """Return the rows with these indices, [R] int64, in this order. On a GPU this synchronises:
        the host needs the number of their ids."""
        sizes = self.offsets.diff()[rows]
        offsets = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
        moved = torch.repeat_interleave(self.offsets[rows] - offsets[:-1], sizes)
        return Kept(self.token_ids[moved + torch.arange(len(moved), device=moved.device)], offsets)

    def only(self, rows: Tensor) -> Kept:
        """Return the same rows, but empty where `rows` [N] bool is False."""
        sizes = self.offsets.diff()
        ids = self.token_ids[: int(self.offsets[-1])][torch.repeat_interleave(rows, sizes)]
        return Kept(ids, torch.nn.functional.pad((sizes * rows).cumsum(0), (1, 0)))

    def to(self, device: torch.device | str) -> Kept:
        """Return the same rows on `device`."""
        return Kept(self.token_ids.to(device), self.offsets.to(device))
