"""Ranking losses of reward models.

    pairwise   -mean log sigmoid(chosen - rejected - margin)
    K-wise     mean over prompts of (mean over the prompt's pairs with rank_w < rank_l of -log
               sigmoid(s_w - s_l))

Shapes    pairwise: B pairs of scores. K-wise: M scores of B prompts; prompt b has the scores
          cu_groups[b] : cu_groups[b + 1].
Bytes     12 B read and 4 B written, which is negligible; on small batches the gain is one call
          instead of six. K-wise, torch forms M x M differences. Pairwise, Triton is one launch of
          one program. K-wise, Triton is two launches. The first has one program per prompt, for K x
          K comparisons in tiles (twice, since the number of pairs divides the slopes). The second
          takes the mean over the prompts and scales the slopes.
Numerics  softplus(-d) in its stable form: finite, with the right slope, for any finite d. Sums in a
          fixed order, over pairs or prompts in float64.
Source    Bradley and Terry (1952); Stiennon et al. (2020), eq. 1; the margin is Llama 2's (Touvron
          et al., 2023, eq. 2); K-wise InstructGPT's (Ouyang et al., 2022, eq. 1), all pairs of a
          prompt together and every prompt alike, however many completions it has.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedrl.kernels.runtime import native
from fusedrl.kernels.runtime.checks import FLOATS, check, check_dtype, refuse_double_backward
from fusedrl.kernels.runtime.dispatch import Implementations
from fusedrl.kernels.runtime.triton import tl, triton

_IMPLS = Implementations(
    "pairwise_ranking_loss", cpu=("cpp", "torch", "triton"), cuda=("triton", "torch")
)
_KWISE = Implementations(
    "kwise_ranking_loss", cpu=("cpp", "torch", "triton"), cuda=("triton", "torch")
)
_CHUNK = 1024  # pairs, prompts or scores at a time
_TILE = 16  # completions of a prompt per tile, compared with equally many


# ---- reference -----------------------------------------------------------------------------------
def pairwise_ranking_loss_reference(
    chosen_B: Tensor, rejected_B: Tensor, margin_B: Tensor | None = None
) -> Tensor:
    """Compute the result by its definition, differentiably, on any device and in any float dtype.
    Tests measure the other implementations against its float64 result."""
    difference = chosen_B - rejected_B if margin_B is None else chosen_B - rejected_B - margin_B
    return F.softplus(-difference).sum() / max(1, difference.numel())


def kwise_ranking_loss_reference(scores_M: Tensor, ranks_M: Tensor, cu_groups: Tensor) -> Tensor:
    """Compute the result by its definition over all M x M pairs, differentiably, on any device and
    in any float dtype. Tests measure the other implementations against its float64 result."""
    group_M = torch.searchsorted(
        cu_groups[1:], torch.arange(len(scores_M), device=scores_M.device), right=True
    )
    pair_MM = (group_M[:, None] == group_M) & (ranks_M[:, None] < ranks_M)
    pairs_B = torch.zeros(len(cu_groups) - 1, dtype=torch.int64, device=scores_M.device).index_add(
        0, group_M, pair_MM.sum(1)
    )
    loss_MM = torch.where(
        pair_MM, F.softplus(-torch.where(pair_MM, scores_M[:, None] - scores_M, 0)), 0
    )
    return (loss_MM.sum(1) / pairs_B[group_M].clamp(min=1)).sum() / (pairs_B > 0).sum().clamp(min=1)


# ---- Triton --------------------------------------------------------------------------------------
if triton is not None:

    @triton.jit
    def _terms(d):
        """Return softplus(-d), sigmoid(-d) and sigmoid(d)."""
        e = tl.exp(-tl.abs(d))
        large = 1.0 / (1.0 + e)
        small = e * large
        return (
            tl.log(1.0 + e) + tl.where(d < 0.0, -d, 0.0),
            tl.where(d < 0.0, large, small),
            tl.where(d < 0.0, small, large),
        )

    @triton.jit(do_not_specialize=["B"])
    def _pairwise_kernel(
        chosen_ptr, rejected_ptr, margin_ptr, loss_ptr, slope_ptr, B, CHUNK: tl.constexpr
    ):
        lane = tl.arange(0, CHUNK)
        sums = tl.zeros([CHUNK], tl.float64)
        for at in range(0, B, CHUNK):
            inside = at + lane < B
            d = tl.load(chosen_ptr + at + lane, mask=inside, other=0.0) - tl.load(
                rejected_ptr + at + lane, mask=inside, other=0.0
            )
            if margin_ptr is not None:
                d -= tl.load(margin_ptr + at + lane, mask=inside, other=0.0)
            loss, sigmoid, _ = _terms(d)
            tl.store(slope_ptr + at + lane, -sigmoid / B, mask=inside)
            sums += tl.where(inside, loss, 0.0)
        tl.store(loss_ptr, (tl.sum(sums) / tl.where(B > 0, B, 1)).to(tl.float32))

    @triton.jit
    def _kwise_kernel(
        scores_ptr, ranks_ptr, cu_groups_ptr, slope_ptr, mean_ptr, paired_ptr, TILE: tl.constexpr
    ):
        """Compute, for one prompt, the mean over its pairs, the slopes of this mean, and whether
        the prompt has a pair."""
        b = tl.program_id(0)
        start, end = tl.load(cu_groups_ptr + b), tl.load(cu_groups_ptr + b + 1)
        lane = tl.arange(0, TILE)
        better_than = tl.zeros([TILE], tl.int32)
        for first in range(start, end, TILE):
            i = first + lane
            rank = tl.load(ranks_ptr + i, mask=i < end, other=0)
            for other in range(start, end, TILE):
                j = other + lane
                both = (i < end)[:, None] & (j < end)[None, :]
                better_than += tl.sum(
                    (
                        both
                        & (rank[:, None] < tl.load(ranks_ptr + j, mask=j < end, other=0)[None, :])
                    ).to(tl.int32),
                    axis=1,
                )
        pairs = tl.sum(better_than)
        share = 1.0 / tl.where(pairs > 0, pairs, 1).to(tl.float32)
        total = tl.full([], 0.0, tl.float64)
        for first in range(start, end, TILE):
            i = first + lane
            rank = tl.load(ranks_ptr + i, mask=i < end, other=0)
            score = tl.load(scores_ptr + i, mask=i < end, other=0.0)
            slope = tl.zeros([TILE], tl.float32)
            for other in range(start, end, TILE):
                j = other + lane
                both = (i < end)[:, None] & (j < end)[None, :]
                other_rank = tl.load(ranks_ptr + j, mask=j < end, other=0)
                loss, lost, won = _terms(
                    score[:, None] - tl.load(scores_ptr + j, mask=j < end, other=0.0)[None, :]
                )
                wins = both & (rank[:, None] < other_rank[None, :])
                loses = both & (rank[:, None] > other_rank[None, :])
                total += tl.sum(tl.where(wins, loss, 0.0)).to(tl.float64)
                slope += tl.sum(tl.where(wins, -lost, tl.where(loses, won, 0.0)), axis=1)
            tl.store(slope_ptr + i, slope * share, mask=i < end)
        tl.store(mean_ptr + b, total / tl.where(pairs > 0, pairs, 1))
        tl.store(paired_ptr + b, (pairs > 0).to(tl.int32))

    @triton.jit(do_not_specialize=["B", "M"])
    def _mean_kernel(mean_ptr, paired_ptr, loss_ptr, slope_ptr, B, M, CHUNK: tl.constexpr):
        # Every program sums over all prompts in the same order, then divides its share of the
        # slopes by the number of prompts that have pairs.
        lane = tl.arange(0, CHUNK)
        sums = tl.zeros([CHUNK], tl.float64)
        counts = tl.zeros([CHUNK], tl.int32)
        for at in range(0, B, CHUNK):
            sums += tl.load(mean_ptr + at + lane, mask=at + lane < B, other=0.0)
            counts += tl.load(paired_ptr + at + lane, mask=at + lane < B, other=0)
        prompts = tl.sum(counts)
        prompts = tl.where(prompts > 0, prompts, 1)
        if tl.program_id(0) == 0:
            tl.store(loss_ptr, (tl.sum(sums) / prompts).to(tl.float32))
        i = tl.program_id(0) * CHUNK + lane
        tl.store(slope_ptr + i, tl.load(slope_ptr + i, mask=i < M, other=0.0) / prompts, mask=i < M)

    # What tests/offline_compile.py compiles.
    _KINDS = {
        "ranks_ptr": "*i64",
        "cu_groups_ptr": "*i32",
        "mean_ptr": "*fp64",
        "paired_ptr": "*i32",
        "B": "i32",
        "M": "i32",
    }
    OFFLINE_KERNELS = {
        name: {
            "kernel": kernel,
            "signature": {
                key: _KINDS.get(key, "*fp32") for key in kernel.arg_names if key not in constexprs
            },
            "constexprs": constexprs,
            "num_warps": 1 if name == "kwise" else 4,
        }
        for name, kernel, constexprs in (
            ("pairwise", _pairwise_kernel, {"CHUNK": _CHUNK}),
            ("pairwise_no_margin", _pairwise_kernel, {"CHUNK": _CHUNK, "margin_ptr": None}),
            ("kwise", _kwise_kernel, {"TILE": _TILE}),
            ("mean", _mean_kernel, {"CHUNK": _CHUNK}),
        )
    }


# ---- launchers, and the ops that torch.compile sees ----------------------------------------------
@torch.library.custom_op("fusedrl::pairwise_ranking_loss_triton", mutates_args=())
def _pairwise_triton(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the loss and d loss / d chosen for a unit upstream gradient. The derivatives with
    respect to `rejected` and `margin` are its negative."""
    chosen, rejected, margin = (
        chosen.contiguous(),
        rejected.contiguous(),
        None if margin is None else margin.contiguous(),
    )
    loss, slope_B = chosen.new_empty(()), torch.empty_like(chosen)
    _pairwise_kernel[(1,)](chosen, rejected, margin, loss, slope_B, chosen.numel(), CHUNK=_CHUNK)
    return loss, slope_B


@torch.library.custom_op("fusedrl::kwise_ranking_loss_triton", mutates_args=())
def _kwise_triton(scores: Tensor, ranks: Tensor, cu_groups: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss and d loss / d scores for a unit upstream gradient."""
    M, B = scores.numel(), cu_groups.numel() - 1
    loss, slope_M = (
        scores.new_empty(()),
        torch.empty_like(scores, memory_format=torch.contiguous_format),
    )
    mean_B, paired_B = (
        scores.new_empty(B, dtype=torch.float64),
        scores.new_empty(B, dtype=torch.int32),
    )
    if B:
        _kwise_kernel[(B,)](
            scores.contiguous(),
            ranks.contiguous(),
            cu_groups.contiguous(),
            slope_M,
            mean_B,
            paired_B,
            TILE=_TILE,
            num_warps=1,
        )
    _mean_kernel[(max(1, triton.cdiv(M, _CHUNK)),)](
        mean_B, paired_B, loss, slope_M, B, M, CHUNK=_CHUNK
    )
    return loss, slope_M


def _forward_fake(scores: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor]:
    return scores.new_empty(()), torch.empty_like(scores, memory_format=torch.contiguous_format)


_pairwise_triton.register_fake(lambda chosen, rejected, margin: _forward_fake(chosen))
_kwise_triton.register_fake(lambda scores, ranks, cu_groups: _forward_fake(scores))
if native.capability:
    torch.library.register_fake("fusedrl::pairwise_ranking_loss_forward", _forward_fake)
    torch.library.register_fake("fusedrl::kwise_ranking_loss_forward", _forward_fake)


# ---- autograd (that of the C++ implementation is in C++) -----------------------------------------
def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _pairwise_backward(ctx, loss_grad: Tensor, _slope_grad: Tensor):
    refuse_double_backward("pairwise_ranking_loss")
    chosen_grad = ctx.saved_tensors[0] * loss_grad
    return chosen_grad, -chosen_grad, -chosen_grad if ctx.needs_input_grad[2] else None


def _kwise_backward(ctx, loss_grad: Tensor, _slope_grad: Tensor):
    refuse_double_backward("kwise_ranking_loss")
    return ctx.saved_tensors[0] * loss_grad, None, None


_pairwise_triton.register_autograd(_pairwise_backward, setup_context=_setup_context)
_kwise_triton.register_autograd(_kwise_backward, setup_context=_setup_context)


# ---- public --------------------------------------------------------------------------------------
def pairwise_ranking_loss(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None = None, *, impl: str | None = None
) -> Tensor:
    """Compute the mean of -log sigmoid(chosen - rejected - margin): the Bradley-Terry loss of a
    pairwise reward model.

    Args:
        chosen, rejected: [B] scores of the preferred and the other completion, of one dtype
            (float32; the torch implementation also float64).
        margin: [B], by how much the score of the preferred completion should exceed the other. If
            None, 0.
        impl: "cpp", "torch" or "triton"; by default the best one for the device.
    Returns:
        A scalar, 0 if there are no pairs. Differentiable in chosen, rejected and margin ("cpp" and
        "triton" once: a double backward raises).
    Raises:
        ValueError: sizes or devices do not agree.
        TypeError: a dtype is not supported.
        RuntimeError: `impl` cannot run on this machine.
    """
    op = "pairwise_ranking_loss"
    check(op, {"chosen": (chosen, "B"), "rejected": (rejected, "B"), "margin": (margin, "B")})
    chosen_impl = _IMPLS.choose(chosen.device, impl)
    for name, tensor in (("chosen", chosen), ("rejected", rejected), ("margin", margin)):
        check_dtype(op, name, tensor, FLOATS if chosen_impl == "torch" else (torch.float32,))
    if chosen_impl == "torch":
        return pairwise_ranking_loss_reference(chosen, rejected, margin)
    return (
        _pairwise_triton(chosen, rejected, margin)[0]
        if chosen_impl == "triton"
        else torch.ops.fusedrl.pairwise_ranking_loss(chosen, rejected, margin)
    )


def kwise_ranking_loss(
    scores: Tensor, ranks: Tensor, cu_groups: Tensor, *, impl: str | None = None
) -> Tensor:
    """Compute the loss of a reward model over all pairs of K ranked completions of each prompt. K
    may differ from prompt to prompt.

    Args:
        scores: [M] float32 (the torch implementation also float64), the completions of one prompt
            next to each other.
        ranks: [M] int64 or int32, lower is better; only their order matters. Completions of equal
            rank form no pair.
        cu_groups: [B + 1] int32, ascending from 0 to M: the index at which each prompt's
            completions begin, then M (checked on CPU by "cpp").
        impl: "cpp", "torch" or "triton"; by default the best one for the device.
    Returns:
        A scalar: the mean over each prompt's pairs, then the mean over the prompts that have pairs;
        0 if no prompt has pairs. Differentiable in scores ("cpp" and "triton" once).
    Raises:
        ValueError: sizes, devices or cu_groups do not fit.
        TypeError: a dtype is not supported.
        RuntimeError: `impl` cannot run on this machine.
    """
    op = "kwise_ranking_loss"
    check(op, {"scores": (scores, "M"), "ranks": (ranks, "M"), "cu_groups": (cu_groups, "B+1")})
    if len(cu_groups) < 1:
        raise ValueError(
            f"{op}: expected cu_groups [B + 1], got an empty tensor; no prompts are a single 0"
        )
    chosen_impl = _KWISE.choose(scores.device, impl)
    check_dtype(op, "scores", scores, FLOATS if chosen_impl == "torch" else (torch.float32,))
    check_dtype(op, "ranks", ranks, (torch.int64, torch.int32))
    check_dtype(op, "cu_groups", cu_groups, (torch.int32,))
    if chosen_impl == "torch":
        return kwise_ranking_loss_reference(scores, ranks, cu_groups)
    return (
        _kwise_triton(scores, ranks, cu_groups)[0]
        if chosen_impl == "triton"
        else torch.ops.fusedrl.kwise_ranking_loss(scores, ranks, cu_groups)
    )
