"""logprob in torch: the definition, on any device and in any float dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedrl.kernels.kept import Kept


def logprob_reference(
    logits: Tensor,
    token_ids: Tensor,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    kept: Kept | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute (logp, entropy) by definition, differentiably, on any device and in any float dtype.
    Tests measure the other implementations against its float64 result."""
    ignored = token_ids == ignore_index
    in_range = (token_ids >= 0) & (token_ids < logits.shape[-1])
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)).masked_fill(
        ignored[..., None], 0.0
    )  # an ignored row may hold anything
    if kept is not None:
        z = z.masked_fill(~_kept_mask(kept, logits.shape[-1]).view(logits.shape), -torch.inf)
    top = z.detach().amax(-1, keepdim=True).nan_to_num(nan=torch.nan, posinf=torch.nan, neginf=0.0)
    d = (z - top) / (
        temperature[..., None].to(z.dtype) if isinstance(temperature, Tensor) else temperature
    )
    missing = d == -torch.inf
    d = d.masked_fill(missing, 0.0)
    e = torch.exp(d).masked_fill(missing, 0.0)
    S = e.sum(-1)
    empty = S == 0
    S = S.masked_fill(empty, 1.0)
    label = token_ids.long().clamp(0, logits.shape[-1] - 1)[..., None]
    logp = d.gather(-1, label).squeeze(-1) - torch.log(S)
    logp = torch.where(missing.gather(-1, label).squeeze(-1) & ~S.isnan(), -torch.inf, logp)
    logp = torch.where(ignored, 0.0, torch.where(in_range, logp, torch.nan))
    entropy = torch.where(ignored | empty, 0.0, torch.log(S) - (d * e).sum(-1) / S)
    return logp, entropy


def _kept_mask(kept: Kept, V: int) -> Tensor:
    """Return [N, V] bool, True at kept tokens. The host reads no values: all sizes follow from the
    sizes of `kept`."""
    N = kept.offsets.numel() - 1
    row_K = torch.searchsorted(
        kept.offsets[1:],
        torch.arange(kept.token_ids.numel(), device=kept.offsets.device),
        right=True,
    )  # N behind the last row
    mask = kept.token_ids.new_zeros(N + 1, V, dtype=torch.bool).index_put(
        (row_K, kept.token_ids.long().clamp(0, V - 1)), row_K.new_ones((), dtype=torch.bool)
    )
    return mask[:N] | (kept.offsets.diff() == 0)[:, None]
