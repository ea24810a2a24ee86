"""Ranking losses of reward models.

    pairwise   -mean log sigmoid(chosen - rejected - margin)
    K-wise     mean over prompts of (mean over the prompt's pairs with rank_w < rank_l of -log sigmoid(s_w - s_l))

Shapes    B pairs, one score each; or M scores of B prompts, prompt b owning cu_groups[b] : cu_groups[b + 1].
Bytes     12 B read and 4 B written: nothing; one call instead of six is the point on small batches. K-wise torch forms M x M differences.
Numerics  softplus(-d) in its stable form: finite, with the right slope, for any finite d.
Source    Bradley and Terry (1952); Stiennon et al. (2020), eq. 1; the margin is Llama 2's (Touvron et al., 2023, eq. 2); K-wise InstructGPT's
          (Ouyang et al., 2022, eq. 1), all pairs of a prompt together and every prompt alike, however many completions it has.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedrl.kernels import native
from fusedrl.kernels.checks import FLOATS, check, check_dtype
from fusedrl.kernels.dispatch import Implementations

_IMPLS = Implementations("pairwise_ranking_loss", cpu=("cpp", "torch"), cuda=("torch",))
_KWISE = Implementations("kwise_ranking_loss", cpu=("cpp", "torch"), cuda=("torch",))


# ---- reference -------------------------------------------------------------------------------------------------------
def pairwise_ranking_loss_reference(chosen_B: Tensor, rejected_B: Tensor, margin_B: Tensor | None = None) -> Tensor:
    """The definition, differentiable, on any device and in any float dtype (float64 is the oracle)."""
    difference = chosen_B - rejected_B if margin_B is None else chosen_B - rejected_B - margin_B
    return F.softplus(-difference).sum() / max(1, difference.numel())


def kwise_ranking_loss_reference(scores_M: Tensor, ranks_M: Tensor, cu_groups: Tensor) -> Tensor:
    """The definition over all M x M pairs, differentiable, on any device and in any float dtype (float64 is the oracle)."""
    group_M = torch.searchsorted(cu_groups[1:], torch.arange(len(scores_M), device=scores_M.device), right=True)
    pair_MM = (group_M[:, None] == group_M) & (ranks_M[:, None] < ranks_M)
    pairs_B = torch.zeros(len(cu_groups) - 1, dtype=torch.int64, device=scores_M.device).index_add(0, group_M, pair_MM.sum(1))
    loss_MM = torch.where(pair_MM, F.softplus(-torch.where(pair_MM, scores_M[:, None] - scores_M, 0)), 0)
    return (loss_MM.sum(1) / pairs_B[group_M].clamp(min=1)).sum() / (pairs_B > 0).sum().clamp(min=1)


# ---- custom ops: what torch.compile sees -------------------------------------------------------------------------------
if native.capability:
    @torch.library.register_fake("fusedrl::pairwise_ranking_loss_forward")
    def _(chosen: Tensor, rejected: Tensor, margin: Tensor | None) -> tuple[Tensor, Tensor]:
        return chosen.new_empty(()), torch.empty_like(chosen, memory_format=torch.contiguous_format)

    @torch.library.register_fake("fusedrl::kwise_ranking_loss_forward")
    def _(scores: Tensor, ranks: Tensor, cu_groups: Tensor) -> tuple[Tensor, Tensor]:
        return scores.new_empty(()), torch.empty_like(scores, memory_format=torch.contiguous_format)


# ---- public ------------------------------------------------------------------------------------------------------------
def pairwise_ranking_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | None = None, *, impl: str | None = None) -> Tensor:
    """Mean of -log sigmoid(chosen - rejected - margin): the Bradley-Terry loss of a pairwise reward model.

    Args:
        chosen, rejected: [B] scores of the preferred and the other completion, of one dtype (float32; the torch implementation also float64).
        margin: [B], by how much the preferred one should win; None is 0.
        impl: "cpp" or "torch"; by default the best one for the device.
    Returns:
        A scalar; 0 for no pairs. Differentiable in all three ("cpp" once: a double backward raises).
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


def kwise_ranking_loss(scores: Tensor, ranks: Tensor, cu_groups: Tensor, *, impl: str | None = None) -> Tensor:
    """The loss of a reward model from K ranked completions of each prompt, all its pairs together; K may differ from prompt to prompt.

    Args:
        scores: [M] float32 (the torch implementation also float64), the completions of a prompt side by side.
        ranks: [M] int64 or int32, 1 is best (only their order matters); completions of equal rank form no pair.
        cu_groups: [B + 1] int32, ascending from 0 to M: where each prompt's completions begin (checked on CPU by "cpp").
        impl: "cpp" or "torch"; by default the best one for the device.
    Returns:
        A scalar: the mean over a prompt's pairs, then over the prompts that have one; 0 if none has. Differentiable in scores ("cpp" once).
    Raises:
        ValueError: sizes, devices or cu_groups. TypeError: dtypes. RuntimeError: `impl` cannot run here.
    """
    op = "kwise_ranking_loss"
    check(op, {"scores": (scores, "M"), "ranks": (ranks, "M"), "cu_groups": (cu_groups, "B+1")})
    if len(cu_groups) < 1:
        raise ValueError(f"{op}: expected cu_groups [B + 1], got an empty tensor; no prompts are a single 0")
    chosen_impl = _KWISE.choose(scores.device, impl)
    check_dtype(op, "scores", scores, FLOATS if chosen_impl == "torch" else (torch.float32,))
    check_dtype(op, "ranks", ranks, (torch.int64, torch.int32))
    check_dtype(op, "cu_groups", cu_groups, (torch.int32,))
    call = kwise_ranking_loss_reference if chosen_impl == "torch" else torch.ops.fusedrl.kwise_ranking_loss
    return call(scores, ranks, cu_groups)
