"""linear_policy_loss: from hidden states to the policy loss and its gradients through the head. It
neither stores the logits nor computes any of them twice.

    z = hidden weight^T + bias, softcapped
    logp_n, H_n of z_n as in kernels/logprob
    loss = sum_n weights_n l_n(logp_n, H_n) as in kernels/policy_loss
    g_n = d loss / d logp_n         h_n = d loss / d H_n
    dz_nj = (g_n (1[j = y_n] - p_nj) - h_n p_nj (log p_nj + H_n)) / T
    d hidden = dz weight         d weight = dz^T hidden    d bias = sum_n dz_n

Weights and coefficients are known before the head runs. So the forward forms the gradient of each
chunk of rows while it holds the chunk's logits, and overwrites the logits with it. The backward
only scales these gradients by the upstream gradient.

Shapes    N rows, H hidden size, V vocabulary size, M rows whose weight is not 0. A of these are
          active: g_n or h_n is not 0.
Flops     2 M H V + 4 A H V. Masked rows are left out of every product. Without a KL and an entropy
          term, rows that are clipped or have advantage 0 are left out of the last two products. The
          kinds and levels that need whole sequences score all rows first: 2 M H V more.
Memory    the workspace of one chunk, the gradients, a few numbers per row. On a GPU the workspace
          may be memory that is idle elsewhere (`scratch`).
Numerics  those of logprob and policy_loss; products and weight gradient in float32 whatever the
          dtype of hidden and weight. A row that is left out would add exact zeros, so leaving it
          out only changes how the products group the other rows.
Host      the host reads which rows have a weight, then which rows of each chunk are active; on a
          GPU this synchronises. Triton reads nothing if no gradient is needed.
Source    the losses and chunked heads of the files named above; rows with zero gradient are dropped
          as in cut cross-entropy, but exactly.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedrl.kernels.linear_head import check_head, product, workspace
from fusedrl.kernels.linear_logprob import finish, linear_logprob, linear_logprob_reference
from fusedrl.kernels.logprob import check_ids, logprob, logprob_reference
from fusedrl.kernels.objective import PolicyObjective, PolicyStats, RolloutCorrection
from fusedrl.kernels.policy_loss import check_policy, policy_loss_reference
from fusedrl.kernels.policy_loss._reference import Derived, PolicyPart
from fusedrl.kernels.runtime import native
from fusedrl.kernels.runtime.checks import check, check_dtype
from fusedrl.kernels.runtime.dispatch import Implementations
from fusedrl.kernels.runtime.triton import triton

if triton is not None:
    from fusedrl.kernels.linear_policy_loss import _triton  # noqa: F401  (registers fusedrl::linear_policy_loss_triton)

_IMPLS = Implementations(
    "linear_policy_loss", cpu=("cpp", "torch", "triton"), cuda=("triton", "torch")
)
_CLIP = PolicyObjective()
_IGNORED = -100


class LinearPolicyLoss(NamedTuple):
    """Result of `linear_policy_loss`. The last two fields are constants, float32 (float64 for
    float64), and 0 where the weight is 0."""

    loss: Tensor  # [], differentiable in hidden, weight and bias
    stats: PolicyStats
    logp: Tensor  # [N]
    entropy: Tensor  # [N] nats


# ---- reference -----------------------------------------------------------------------------------
def linear_policy_loss_reference(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    token_ids_N: Tensor,
    old_logp_N: Tensor | None,
    advantages_N: Tensor,
    weights_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    **settings: Any,
) -> LinearPolicyLoss:
    """Compute the result by its definition, differentiably, on any device and in any float dtype.
    Tests measure the other implementations against its float64 result. `settings` are passed to
    policy_loss_reference."""
    ids = torch.where(weights_N != 0, token_ids_N, _IGNORED)
    logp_N, entropy_N = linear_logprob_reference(
        hidden_NH, weight_VH, ids, bias_V, temperature, softcap
    )
    loss, stats = policy_loss_reference(
        logp_N, old_logp_N, advantages_N, weights_N, entropy_N=entropy_N, **settings
    )
    return LinearPolicyLoss(loss, stats, logp_N.detach(), entropy_N.detach())


# ---- torch, a chunk at a time --------------------------------------------------------------------
def _chunks(rows: Tensor, N: int, V: int, workspace_bytes: int | None) -> tuple[Tensor, ...]:
    size = max(1, workspace(workspace_bytes, N, V, rows.device) // (4 * V))
    return rows.split(size) if rows.numel() else ()


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden,
        weight,
        bias,
        token_ids,
        weights,
        temperature,
        softcap,
        part,
        derived,
        workspace_bytes,
    ):
        rows = (weights != 0).nonzero().squeeze(1)
        N, V, wide = (
            hidden.shape[0],
            weight.shape[0],
            torch.promote_types(weight.dtype, torch.float32),
        )
        logp_N, entropy_N = hidden.new_zeros(2, N, dtype=wide).unbind()
        grads = [
            torch.zeros_like(t, dtype=t.dtype if t is hidden else wide)
            if t is not None and needed
            else None
            for t, needed in zip((hidden, weight, bias), ctx.needs_input_grad[:3], strict=True)
        ]
        for index in _chunks(rows, N, V, workspace_bytes):
            ids, scale = (
                token_ids[index],
                temperature[index] if isinstance(temperature, Tensor) else temperature,
            )
            z_RV = product(hidden[index], weight.t())
            with torch.enable_grad():
                z_RV.requires_grad_()
                capped = finish(z_RV, bias, softcap)
                if z_RV.is_cuda and z_RV.dtype != torch.float64:  # kernels do not support float64
                    logp_R, entropy_R = logprob(capped, ids, temperature=scale, entropy=True)
                else:
                    logp_R, entropy_R = logprob_reference(capped, ids, scale)
                logp_N[index], entropy_N[index] = logp_R.detach(), entropy_R.detach()
                if not any(ctx.needs_input_grad[:3]):
                    continue
                g_R, h_R = _coefficients(
                    part, derived, logp_N[index], entropy_N[index], weights, index
                )
                (dz_RV,) = torch.autograd.grad((logp_R, entropy_R), z_RV, (g_R, h_R))
            active = ((g_R != 0) | (h_R != 0)).nonzero().squeeze(1)
            dz_AV, index_A = (
                (dz_RV, index)
                if active.numel() == index.numel()
                else (dz_RV[active], index[active])
            )
            if grads[0] is not None:
                grads[0][index_A] = product(dz_AV, weight).to(hidden.dtype)
            if grads[1] is not None:
                grads[1] += product(dz_AV.t(), hidden[index_A])
            if grads[2] is not None:
                grads[2] += dz_AV.sum(0)
        loss, stats = part._replace(logp=logp_N, entropy=entropy_N).reference(weights, derived)
        ctx.save_for_backward(
            *(
                None if g is None else g.to(t.dtype)
                for g, t in zip(grads, (hidden, weight, bias), strict=True)
            ),
            hidden,
            weight,
            bias,
        )
        stats = torch.stack(list(stats))
        ctx.mark_non_differentiable(stats, logp_N, entropy_N)
        return loss, stats, logp_N, entropy_N

    @staticmethod
    def backward(ctx, loss_grad, *_):
        *grads, hidden, weight, bias = ctx.saved_tensors
        return (
            *(
                None if g is None else _Scaled.apply(g, loss_grad, of)
                for g, of in zip(grads, (hidden, weight, bias), strict=True)
            ),
            *(None,) * 7,
        )


class _Scaled(torch.autograd.Function):
    """Return gradient * scale. A double backward raises, since the dependence of the gradient on
    the input `of` is no longer known."""

    @staticmethod
    def forward(ctx, gradient, scale, of):
        return gradient * scale

    @staticmethod
    def backward(ctx, _grad):
        raise RuntimeError(
            "linear_policy_loss: expected one backward pass, got a double backward; use "
            "linear_policy_loss_reference for second derivatives"
        )


def _coefficients(
    part: PolicyPart,
    derived: Derived,
    logp_R: Tensor,
    entropy_R: Tensor,
    weights_N: Tensor,
    index_R: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return d loss / d logp and d loss / d entropy for the rows of a chunk. Each row's derivatives
    depend only on that row."""

    def rows(column: Tensor | None) -> Tensor | None:
        return None if column is None else column[index_R]

    logp_R, entropy_R = logp_R.requires_grad_(), entropy_R.requires_grad_()
    here = part._replace(
        logp=logp_R,
        entropy=entropy_R,
        old_logp=rows(part.old_logp),
        advantages=rows(part.advantages),
        ref_logp=rows(part.ref_logp),
    )
    loss, _ = here.reference(weights_N[index_R], Derived(*map(rows, derived)))
    g_R, h_R = torch.autograd.grad(loss, (logp_R, entropy_R), materialize_grads=True)
    return g_R, h_R


# ---- custom op: what torch.compile sees ----------------------------------------------------------
if native.capability:

    @torch.library.register_fake("fusedrl::linear_policy_loss_forward")
    def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: object) -> tuple[Tensor, ...]:
        for_hidden, for_weight, for_bias = rest[-3:]
        loss = hidden.new_empty((), dtype=torch.float32)
        return (
            loss,
            loss.new_empty(len(PolicyStats._fields)),
            *(loss.new_empty(hidden.shape[0]) for _ in range(2)),
            hidden.new_empty(hidden.shape if for_hidden else (0,)),
            weight.new_empty(weight.shape if for_weight else (0,)),
            bias.new_empty(bias.shape) if for_bias and bias is not None else loss.new_empty(0),
        )


# ---- public --------------------------------------------------------------------------------------
def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    weights: Tensor,
    *,
    objective: PolicyObjective = _CLIP,
    ref_logp: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    kl_gradient: str | None = None,
    kl_level: str = "token",
    entropy_coef: float = 0.0,
    rollout_logp: Tensor | None = None,
    rollout_correction: RolloutCorrection | None = None,
    cu_seqlens: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    bias: Tensor | None = None,
    workspace_bytes: int | None = None,
    scratch: Tensor | None = None,
    impl: str | None = None,
) -> LinearPolicyLoss:
    """Compute `policy_loss(linear_logprob(hidden, weight, token_ids), ...)` in 6 N H V flops,
    forward and backward.

    Args:
        hidden, weight, bias: [N, H], [V, H] and [V] or None, of one dtype: float32, bfloat16 or
            float16 (the torch implementation also float64).
        token_ids: [N] int64 or int32. Rows whose weight is 0 may hold anything in every input.
        old_logp: [N] float32, constant. If None, the trained policy is also the old policy, and
            every ratio is exactly 1. None is not allowed for kinds by sequence, nor with a
            rollout_correction.
        advantages, weights: [N] float32, constant. These and the keywords up to cu_seqlens mean the
            same as in `policy_loss`.
        temperature: above 0; a number, or a tensor [N] (it receives no gradient). It divides the
            logits after the softcap.
        softcap: replaces the logits by softcap * tanh(logits / softcap). If None, they stay
            unchanged.
        workspace_bytes: bound of the chunk's float32 logits; the chunk holds at least one row.
            Default: the smaller of 256 MiB and an eighth of the full logits, but never less than 4
            MiB; on a GPU, 1,024 rows of logits and 2,048 of their gradients.
        scratch: [bytes] uint8, on the same device: memory that is idle, which Triton then computes
            in instead of allocating a workspace. Its contents are lost. The more it holds, the
            fewer passes over the gradient of weight. The other implementations leave it alone.
        impl: "cpp", "triton" or "torch"; by default the best one for the device.
    Returns:
        LinearPolicyLoss (loss, stats, logp, entropy). The loss is a scalar, differentiable once in
        hidden, weight and bias; the forward already computes the gradients of those that require
        one. The stats are those of `policy_loss` and always include the entropy. logp and entropy
        are those that `linear_logprob` gives for the rows with a weight, as constants.
    Raises:
        IndexError: an id is outside [0, V) in a row whose weight is not 0, on the CPU.
        ValueError: sizes, devices or settings do not fit.
        TypeError: a dtype is not supported.
        RuntimeError: `impl` cannot run on this machine, or backward is differentiated again.
    """
    op = "linear_policy_loss"
    part = PolicyPart(
        old_logp=old_logp,
        advantages=advantages,
        objective=objective,
        ref_logp=ref_logp,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
        kl_gradient=kl_gradient,
        kl_level=kl_level,
        entropy_coef=entropy_coef,
        rollout_logp=rollout_logp,
        rollout_correction=rollout_correction,
        cu_seqlens=cu_seqlens,
    )
    per_row = temperature if isinstance(temperature, Tensor) else None
    columns = {
        "old_logp": old_logp,
        "advantages": advantages,
        "weights": weights,
        "ref_logp": ref_logp,
        "rollout_logp": rollout_logp,
    }
    N, _, V, *_ = check(
        op,
        {
            "hidden": (hidden, "N H"),
            "weight": (weight, "V H"),
            "token_ids": (token_ids, "N"),
            "bias": (bias, "V"),
            "temperature": (per_row, "N"),
            **{name: (column, "N") for name, column in columns.items()},
            "cu_seqlens": (cu_seqlens, "E"),
            "scratch": (scratch, "bytes"),
        },
    )
    check_policy(op, part, N)
    chosen = _IMPLS.choose(hidden.device, impl)
    check_head(op, chosen, hidden, weight, bias, token_ids, temperature, softcap, workspace_bytes)
    for name, column in columns.items():
        check_dtype(op, name, column, (torch.promote_types(hidden.dtype, torch.float32),))
    scale = float(temperature) if per_row is None else per_row.detach()
    ids = torch.where(weights != 0, token_ids, _IGNORED)
    head: dict[str, Any] = {"bias": bias, "temperature": scale, "softcap": softcap}
    head |= {"workspace_bytes": workspace_bytes, "impl": chosen}
    derived = _scored(part, hidden, weight, ids, head).derived(weights)
    if chosen != "cpp" and hidden.device.type == "cpu" and not torch.compiler.is_compiling():
        check_ids(op, ids, V, _IGNORED)
    if chosen == "torch":
        loss, stats, logp, entropy = _Chunked.apply(
            hidden, weight, bias, token_ids, weights, scale, softcap, part, derived, workspace_bytes
        )
    else:
        arguments = (
            *(hidden, weight, bias, token_ids, old_logp, advantages, weights, ref_logp, *derived),
            *(None if per_row is None else per_row.detach(), *part.settings()),
            *(1.0 if per_row is not None else float(temperature), softcap or 0.0),
        )
        loss, stats, logp, entropy = _compiled(chosen, arguments, workspace_bytes, scratch, N, V)
    return LinearPolicyLoss(loss, PolicyStats(*stats.unbind()), logp, entropy)


def computes_in_scratch(device: torch.device) -> bool:
    """Whether `linear_policy_loss` has a use for `scratch` on this device."""
    return _IMPLS.choose(device, None) == "triton"


def _scored(
    part: PolicyPart, hidden: Tensor, weight: Tensor, ids: Tensor, head: dict[str, Any]
) -> PolicyPart:
    """Return the part; if it is by sequence, first fill in its log-probabilities. A token's term
    then needs numbers of its whole sequence before the token's chunk is reached."""
    if not part.by_sequence:
        return part
    with torch.no_grad():
        logp, _ = linear_logprob(hidden, weight, ids, entropy=True, ignore_index=_IGNORED, **head)
    return part._replace(logp=logp)


def _compiled(
    impl: str,
    arguments: tuple[Any, ...],
    workspace_bytes: int | None,
    scratch: Tensor | None,
    N: int,
    V: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Call the C++ or the Triton op. The C++ op finds out by itself which gradients are needed."""
    if impl == "cpp":
        return torch.ops.fusedrl.linear_policy_loss(
            *arguments, -1 if workspace_bytes is None else workspace_bytes
        )
    wanted = (torch.is_grad_enabled() and t is not None and t.requires_grad for t in arguments[:3])
    check_dtype("linear_policy_loss", "scratch", scratch, (torch.uint8,))
    hidden = arguments[0]
    room = workspace(workspace_bytes, N, V, hidden.device, gradients=hidden.dtype.itemsize)
    if scratch is not None and scratch.numel() < room:
        scratch = None
    found = torch.ops.fusedrl.linear_policy_loss_triton(*arguments, room, scratch, *wanted)
    return found[:4]
