"""Ranking losses of reward models.

    pairwise   -mean log sigmoid(chosen - rejected - margin)

Shapes    B pairs, one score each.
Bytes     12 B read and 4 B written: nothing; one call instead of six is the point on small batches.
Numerics  softplus(-d) in its stable form: finite, with the right slope, for any finite d.
Source    Bradley and Terry (1952); Stiennon et al. (2020), eq. 1; the margin is Llama 2's (Touvron et al., 2023, eq. 2).
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedrl.kernels import native
from fusedrl.kernels.checks import FLOATS, check, check_dtype
from fusedrl.kernels.dispatch import Implementations

_IMPLS = Implementations("pairwise_ranking_loss", cpu=("cpp", "torch"), cuda=("torch",))


# ---- reference -------------------------------------------------------------------------------------------------------
def pairwise_ranking_loss_reference(chosen_B: Tensor, rejected_B: Tensor, margin_B: Tensor | None = None) -> Tensor:
    """The definition, differentiable, on any device and in any float dtype (float64 is the oracle)."""
    difference = chosen_B - rejected_B if margin_B is None else chosen_B - rejected_B - margin_B
    return F.softplus(-difference).sum() / max(1, difference.numel())


# ---- custom op: what torch.compile sees --------------------------------------------------------------------------------
if native.capability:
    @torch.library.register_fake("fusedrl::pairwise_ranking_loss_forward")
    def _(chosen: Tensor, rejected: Tensor, margin: Tensor | None) -> tuple[Tensor, Tensor]:
        return chosen.new_empty(()), torch.empty_like(chosen, memory_format=torch.contiguous_format)


# ---- public ------------------------------------------------------------------------------------------------------------
def pairwise_ranking_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | None = None, *, impl: str | None = None) -> Tensor:
    """Mean of -log sigmoid(chosen - rejected - margin): the Bradley-Terry loss of a pairwise reward model.

    Args:
        chosen, rejected: [B] scores of the preferred and the other completion, of one dtype (float32; the torch implementation also float64).
        margin: [B], by how much the preferred one should win; None is 0.
        impl: "cpp" or "torch"; by default the best one for the device.
    Returns:
        A scalar; 0 for no pairs. Differentiable in all three.
    Raises:
        ValueError: sizes or devices that do not agree. TypeError: dtypes. RuntimeError: `impl` cannot run here.
    """
    op = "pairwise_ranking_loss"
    check(op, {"chosen": (chosen, "B"), "rejected": (rejected, "B"), "margin": (margin, "B")})
    chosen_impl = _IMPLS.choose(chosen.device, impl)
    for name, tensor in (("chosen", chosen), ("rejected", rejected), ("margin", margin)):
        check_dtype(op, name, tensor, FLOATS if chosen_impl == "torch" else (torch.float32,))
    if chosen_impl == "torch":
        return pairwise_ranking_loss_reference(chosen, rejected, margin)
    return torch.ops.fusedrl.pairwise_ranking_loss(chosen, rejected, margin)
