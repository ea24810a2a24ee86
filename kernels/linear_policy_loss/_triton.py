"""linear_policy_loss in Triton. The kernel of the product also computes the scores, and the
gradient is computed while the chunk's logits are in memory.

The mathematics and numerics are those of __init__.py. Rows are scored by linear_logprob/_triton.py
and their coefficients formed by policy_loss/_triton.py: loss and statistics equal those of the two
ops in sequence on the rows that count. The only difference is the order in which the compiler adds
32 columns, which it chooses for each tile size (under the interpreter every bit is equal).

    R rows -> product, whose epilogue keeps the logits and the row statistics -> coefficients ->
    active rows appended to the gradients dz C - R pending rows of dz, or the end -> d hidden = dz
    weight, d weight += dz^T hidden

Workspace  R V float32 logits and C V gradients of hidden's dtype. Active rows are collected over
           several chunks, so that the last two products have many rows even when few rows are
           active. If the workspace holds the gradients of all rows, C = N, and the products run
           once: weight's gradient is written once, in its dtype. Otherwise C >= 2 R, and every
           flush adds to a float32 sum. R is a multiple of the product's tile size if the workspace
           holds at least one tile. Rows are padded to whole cache lines. The row statistics take
           another 3/32 of a byte per logit. By default (`linear_head.workspace`) R = 1,024 and C =
           2,048; a lender of memory (`scratch`) makes both larger where it has room.
Bytes      a chunk reads weight (V H s), writes its logits and reads them once; dz is written once
           and read twice. A flush after the first reads and writes the float32 gradient of weight,
           8 V H.
Host       if a gradient is needed, the host reads which rows have a weight, and which rows of each
           chunk are active, while the device waits. Otherwise it reads nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fusedrl.kernels.linear_head import add_product, product
from fusedrl.kernels.linear_logprob._triton import (
    BLOCK_ROWS,
    HeadOf,
    Rows,
    Scores,
    logits_gradient,
    padded,
    score,
    unscored,
)
from fusedrl.kernels.objective import COEFFICIENTS, PolicyStats
from fusedrl.kernels.policy_loss._triton import policy_value_loss_triton

_STATS = len(PolicyStats._fields)


_SLAB = 32 << 20  # bytes of float32 sums that stay in a GPU's cache
_FEWEST = 512  # rows of a chunk by which one read of weight takes less time than its product


def rows_of(workspace_bytes: int, M: int, V: int, itemsize: int) -> tuple[int, int]:
    """Return how many of M rows of logits, and of gradients, the workspace holds: at least one
    each. All gradients if they leave room for a chunk, so that their products run once."""
    width = max(1, padded(V))
    rest = workspace_bytes // width - M * itemsize  # beside all gradients, bytes per column
    if rest >= 4 * min(M, _FEWEST):
        R, C = min(M, rest // 4), M
    else:
        R = max(1, workspace_bytes // (width * (4 + 2 * itemsize)))
        C = max(R, (workspace_bytes // width - 4 * R) // itemsize)
    if BLOCK_ROWS < R < M:
        R -= R % BLOCK_ROWS
        if C < M:
            C = max(R, (workspace_bytes // width - 4 * R) // itemsize)
    return min(R, M), min(C, M)


# ---- custom op: what torch.compile sees ----------------------------------------------------------
class Gradients:
    """Sums of the requested gradients. Those of weight and bias are float32 while more is to
    come, and of the weight's dtype at the end."""

    def __init__(self, hidden: Tensor, weight: Tensor, wanted: tuple[bool, bool, bool]) -> None:
        self._wanted, self._weight = wanted, weight
        self.hidden = torch.zeros_like(hidden) if wanted[0] else None
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None

    def add(self, hidden: Tensor, dz_AV: Tensor, members_A: Tensor, last: bool) -> None:
        """Add the products with the logits' gradients of some rows of hidden."""
        weight, (_, for_weight, for_bias) = self._weight, self._wanted
        if self.hidden is not None:
            self.hidden[members_A] = product(dz_AV, weight).to(hidden.dtype)
        if for_weight and self.weight is not None:
            add_product(self.weight, dz_AV.t(), hidden[members_A])
        elif (
            for_weight and last
        ):  # nothing is added to it: a slab at a time, no float32 sum of it all
            self.weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
            hidden_AH, step = hidden[members_A], max(128, _SLAB // max(1, 4 * weight.shape[1]))
            for v in range(0, weight.shape[0], step):
                self.weight[v : v + step] = product(dz_AV[:, v : v + step].t(), hidden_AH)
        elif for_weight:
            self.weight = product(dz_AV.t(), hidden[members_A])
        if for_bias:
            sums = dz_AV.sum(0, dtype=torch.float32)
            self.bias = sums if self.bias is None else self.bias.add_(sums)

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of hidden, weight and bias; those not requested are empty."""
        weight, (_, for_weight, for_bias) = self._weight, self._wanted
        if for_weight and self.weight is None:
            self.weight = torch.zeros_like(weight)
        if for_bias and self.bias is None:
            self.bias = weight.new_zeros(weight.shape[0])
        found = (self.hidden, self.weight, self.bias)
        hidden, weight_grad, bias = (
            weight.new_zeros(0) if t is None else t if t is self.hidden else t.to(weight.dtype)
            for t in found
        )
        return hidden, weight_grad, bias


@torch.library.custom_op("fusedrl::linear_policy_loss_triton", mutates_args=())
def _linear_policy_loss_triton(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    weights: Tensor,
    ref_logp: Tensor | None,
    correction: Tensor | None,
    sequence_log_ratio: Tensor | None,
    kl_sum: Tensor | None,
    temperatures: Tensor | None,
    kind: str,
    kl_estimator: str,
    kl_gradient: str,
    coefficients: list[float],
    temperature: float,
    softcap: float,
    workspace_bytes: int,
    scratch: Tensor | None,
    for_hidden: bool,
    for_weight: bool,
    for_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute loss, statistics, logp and entropy [N] (0 where the weight is 0), and the loss's
    gradients for a unit upstream gradient. Gradients that are not requested are empty. `scratch`:
    bytes to compute in, whose contents are lost; None allocates `workspace_bytes`."""
    head = HeadOf(weight, bias, temperature, softcap)
    backward = for_hidden or for_weight or for_bias
    if backward:
        index, count = (weights != 0).nonzero().squeeze(1), None
    # nothing to read: rows without a weight go last, and the kernels stop at the first of them
    else:
        index, count = (weights == 0).to(torch.uint8).argsort(stable=True), (weights != 0).sum()
    M = index.numel()
    weights_M = weights[index]
    columns = [
        None if t is None else t[index]
        for t in (old_logp, advantages, ref_logp, correction, sequence_log_ratio, kl_sum)
    ]
    rows = Rows(
        index,
        token_ids[index],
        None if temperatures is None else temperatures[index].float(),
        count,
    )
    scores = unscored(rows)

    def policy(begin: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return (loss, statistics, d loss / d logp) of rows [begin, end)."""
        logp, entropy = scores.logp[begin:end], scores.entropy[begin:end]
        old, advantage, ref, *derived = (None if t is None else t[begin:end] for t in columns)
        loss, stats, grad, _ = policy_value_loss_triton(
            *(logp, logp if old is None else old, advantage, weights_M[begin:end], entropy),
            *(None, None, None, ref, *derived),
            *(kind, kl_estimator, kl_gradient, coefficients),
        )
        return loss, stats[:_STATS], grad

    grads = Gradients(hidden, weight, (for_hidden, for_weight, for_bias))
    if not backward:
        score(hidden, head, rows, scores, 0, M, workspace_bytes)
    else:
        entropy_grad = weights_M * -coefficients[COEFFICIENTS.index("entropy_coef")]
        _walk(hidden, head, rows, scores, policy, entropy_grad, grads, workspace_bytes, scratch)
    loss, stats, _ = policy(0, M)
    live_N = weights != 0  # rows without one were not scored
    logp_N, entropy_N = (
        torch.where(live_N, torch.zeros_like(weights).index_copy_(0, index, x), 0)
        for x in (scores.logp, scores.entropy)
    )
    return (
        loss,
        stats.clone(),
        logp_N,
        entropy_N,
        *grads.results(),
    )


def _walk(
    hidden: Tensor,
    head: HeadOf,
    rows: Rows,
    scores: Scores,
    policy: Callable[[int, int], tuple[Tensor, Tensor, Tensor]],
    entropy_grad: Tensor,
    grads: Gradients,
    workspace_bytes: int,
    scratch: Tensor | None,
) -> None:
    """Score the rows and add up their gradients, chunk by chunk. Rows whose gradient is 0 are left
    out of the products."""
    M, V = rows.row.numel(), head.weight.shape[0]
    room = workspace_bytes if scratch is None else scratch.numel()
    R, C = rows_of(room, M, V, hidden.dtype.itemsize)
    logits_RV, dz_CV = _matrices(scratch, hidden, R, C, padded(V))
    pending: list[Tensor] = []  # rows of hidden whose gradients stand in dz, in order
    held = 0
    for begin in range(0, M, max(1, R)):
        end = min(begin + R, M)
        score(hidden, head, rows, scores, begin, end, workspace_bytes, logits_RV)
        _, _, g = policy(begin, end)
        h = entropy_grad[begin:end]
        active = ((g != 0) | (h != 0)).nonzero().squeeze(1)
        here = Rows(
            rows.row[begin:end],
            rows.ids[begin:end],
            None if rows.temperatures is None else rows.temperatures[begin:end],
        )
        scored = Scores(*(column[begin:end] for column in scores))
        place = dz_CV[held : held + active.numel()]
        logits_gradient(g, h, logits_RV, head, here, scored, active, place, finished=True)
        pending.append(here.row[active])
        held += active.numel()
        if held and (held + min(R, M - end) > C or end == M):
            grads.add(hidden, dz_CV[:held, :V], torch.cat(pending), last=end == M)
            pending, held = [], 0


def _matrices(
    scratch: Tensor | None, hidden: Tensor, R: int, C: int, width: int
) -> tuple[Tensor, Tensor]:
    """Return memory for R rows of float32 logits and C rows of their gradients, inside `scratch`
    if it is given and holds them."""
    logits_bytes, itemsize = 4 * R * width, hidden.dtype.itemsize
    needed = logits_bytes + itemsize * C * width
    if scratch is None or scratch.numel() < needed:
        return (
            hidden.new_empty(R, width, dtype=torch.float32),
            hidden.new_empty(C, width),
        )
    return (
        scratch[:logits_bytes].view(torch.float32).view(R, width),
        scratch[logits_bytes:needed].view(hidden.dtype).view(C, width),
    )


@_linear_policy_loss_triton.register_fake
def _(hidden: Tensor, weight: Tensor, *rest: object) -> tuple[Tensor, ...]:
    for_hidden, for_weight, for_bias = rest[-3:]
    loss = hidden.new_empty((), dtype=torch.float32)
    N = hidden.shape[0]
    return (
        loss,
        loss.new_empty(_STATS),
        loss.new_empty(N),
        loss.new_empty(N),
        hidden.new_empty(hidden.shape if for_hidden else 0),
        weight.new_empty(weight.shape if for_weight else 0),
        weight.new_empty(weight.shape[0] if for_bias else 0),
    )


# ---- autograd: forward has formed the gradients --------------------------------------------------
def _setup_context(ctx, inputs, output) -> None:
    _, *rows, grads = output[:4] + (output[4:],)
    ctx.mark_non_differentiable(*rows, *grads)
    ctx.save_for_backward(*grads)
    ctx.has, ctx.parameters = inputs[-3:], len(inputs)


def _backward(ctx, loss_grad: Tensor, *unused: Tensor):
    if torch.is_grad_enabled():  # create_graph: the gradients would pass for constants
        raise RuntimeError(
            "linear_policy_loss: expected one backward pass, got a double backward "
            "(create_graph=True), which this op does not have"
        )
    grads = [
        grad * loss_grad if wanted else None
        for grad, wanted in zip(ctx.saved_tensors, ctx.has, strict=True)
    ]
    return *grads, *(None,) * (ctx.parameters - len(grads))


_linear_policy_loss_triton.register_autograd(_backward, setup_context=_setup_context)
