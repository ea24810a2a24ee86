"""full_kl in torch: the definition, on any device and in any float dtype."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_LN2 = math.log(2.0)
_LOWEST = -1e30  # a logit so far below the row's maximum is a mask and counts as -inf


def full_kl_reference(
    logits: Tensor, ref_logits: Tensor, mask: Tensor | None, temperature: float, direction: str
) -> Tensor:
    """Compute full_kl by its definition, differentiable in the logits, on any device and in any
    float dtype. Tests measure the other implementations against its float64 result."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    own, other = (logits, ref_logits) if direction == "reverse" else (ref_logits, logits)
    absent, missing = (_scaled(x.detach().to(wide), temperature) <= _LOWEST for x in (own, other))
    infinite = (~absent & missing).any(-1) & (direction != "jsd")
    # neither NaN nor +inf
    infinite &= (logits.detach().amax(-1) < torch.inf) & (ref_logits.amax(-1) < torch.inf)
    unread = (infinite if mask is None else infinite | ~mask)[..., None]
    (logp, p, no_p), (logr, r, no_r) = (
        _log_softmax(x.to(wide).masked_fill(unread, 0.0), temperature) for x in (logits, ref_logits)
    )
    if direction == "reverse":
        kl = torch.where(no_p, 0, p * (logp - logr)).sum(-1)
    elif direction == "forward":
        kl = torch.where(no_r, 0, r * (logr - logp)).sum(-1)
    else:
        of_p = torch.where(no_p, 0, p * torch.where(no_r, _LN2, _LN2 - F.softplus(logr - logp)))
        of_r = torch.where(no_r, 0, r * torch.where(no_p, _LN2, _LN2 - F.softplus(logp - logr)))
        kl = 0.5 * (of_p.sum(-1) + of_r.sum(-1))
    # rounding may give a KL below 0; the gradient is not clamped
    kl = kl + (kl.clamp(0.0, _LN2 if direction == "jsd" else torch.inf) - kl).detach()
    kl = torch.where(infinite, torch.inf, kl)
    return kl if mask is None else torch.where(mask, kl, 0)


def _scaled(z: Tensor, temperature: float) -> Tensor:
    """Return (z - the row's maximum) / temperature; NaN in a row that holds NaN or +inf."""
    top = z.detach().amax(-1, keepdim=True).nan_to_num(nan=torch.nan, posinf=torch.nan, neginf=0.0)
    return (z - top) / temperature


def _log_softmax(z: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return (log p, p, whether p is 0); log p is finite even where p is 0."""
    d = _scaled(z, temperature)
    absent = d <= _LOWEST
    d = d.masked_fill(absent, 0.0)
    e = torch.exp(d).masked_fill(absent, 0.0)
    S = e.sum(-1, keepdim=True)
    S = S.masked_fill(S == 0, 1.0)
    return d - torch.log(S), e / S, absent
