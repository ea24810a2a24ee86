"""Code shared by the Triton and the CUDA C++ op of sample: allocation of the results, and the
stride of the parameters."""

from __future__ import annotations

import torch
from torch import Tensor

# token ids, logp, logp_processed, entropy, kept count [B]; kept ids [capacity] and offsets [B + 1],
# both [0] if they are not requested
Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def empty_outputs(logits_BV: Tensor, kept_capacity: int | None) -> Outputs:
    """Allocate outputs for a launch to fill."""
    B = logits_BV.shape[0]
    ids, logp = (
        logits_BV.new_empty(B, dtype=torch.int64),
        logits_BV.new_empty(B, dtype=torch.float32),
    )
    kept, offsets = (0, 0) if kept_capacity is None else (kept_capacity, B + 1)
    return (
        ids,
        logp,
        torch.empty_like(logp),
        torch.empty_like(logp),
        torch.empty_like(ids),
        logits_BV.new_empty(kept, dtype=torch.int32),
        logits_BV.new_empty(offsets, dtype=torch.int64),
    )


def step(parameter: Tensor | None) -> int:
    """Return the stride of a [B] or [1] parameter from one row to the next."""
    return int(parameter is not None and parameter.numel() > 1)
