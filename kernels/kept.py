"""Kept: which tokens truncation left in each row, as a CSR of ids; what `sample` hands to
`logprob`."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Kept(NamedTuple):
    """Row n kept token_ids[offsets[n]:offsets[n + 1]], ascending; an empty row is the whole
    vocabulary (nothing was truncated)."""

    # [K] int32, K at least offsets[-1]; what lies behind offsets[-1] means nothing
    token_ids: Tensor
    offsets: Tensor  # [N + 1] int64, ascending from 0
