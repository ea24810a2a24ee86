"""What the Triton and the CUDA C++ op of policy_value_loss share: shapes of the results, and the gradient, which the forward pass has formed."""
from __future__ import annotations

import torch
from torch import Tensor

from fusedrl.kernels.objective import PolicyStats, ValueStats
from fusedrl.kernels.runtime.checks import refuse_double_backward

STATS = len(PolicyStats._fields) + len(ValueStats._fields)
_PARAMETERS = 25
_LOGP, _WEIGHTS, _ENTROPY, _VALUES, _ENTROPY_COEF = 0, 3, 4, 5, 22  # their places among the op's parameters


def outputs(logp: Tensor | None, weights: Tensor, values: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss [], statistics [STATS], and d loss / d logp and d loss / d values [N] (empty where that part is absent), to be written."""
    N = weights.numel()
    sizes: tuple[tuple[int, ...], ...] = ((), (STATS,), (0 if logp is None else N,), (0 if values is None else N,))
    loss, stats, logp_grad, values_grad = (weights.new_empty(size) for size in sizes)
    return loss, stats, logp_grad, values_grad


def attach(op: torch.library.CustomOpDef) -> None:
    """Give an op of policy_value_loss's parameters its fake and its autograd."""
    op.register_fake(lambda logp, old_logp, advantages, weights, entropy, values, *rest: outputs(logp, weights, values))
    op.register_autograd(_backward, setup_context=_setup)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, stats, logp_grad, values_grad = output
    ctx.mark_non_differentiable(stats, logp_grad, values_grad)
    ctx.save_for_backward(logp_grad, inputs[_WEIGHTS], values_grad)
    ctx.entropy_coef = inputs[_ENTROPY_COEF]


def _backward(ctx, loss_grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    refuse_double_backward("policy_value_loss")
    logp_grad, weights, values_grad = ctx.saved_tensors
    grads: list[Tensor | None] = [None] * _PARAMETERS
    if ctx.needs_input_grad[_LOGP]:
        grads[_LOGP] = logp_grad * loss_grad
    if ctx.needs_input_grad[_ENTROPY]:
        grads[_ENTROPY] = weights * (loss_grad * -ctx.entropy_coef)
    if ctx.needs_input_grad[_VALUES]:
        grads[_VALUES] = values_grad * loss_grad
    return tuple(grads)
