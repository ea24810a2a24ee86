"""Code shared by the Triton and the CUDA C++ op of policy_value_loss: shapes of the results, and
the backward, which uses the gradient that the forward pass computed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fusedrl.kernels.objective import COEFFICIENTS, PolicyStats, ValueStats
from fusedrl.kernels.runtime.checks import refuse_double_backward

STATS = len(PolicyStats._fields) + len(ValueStats._fields)


class Arguments(NamedTuple):
    """Parameters of the op: tensors [N], names of the kind and of the KL's estimators, and the
    numbers of COEFFICIENTS."""

    logp: Tensor | None
    old_logp: Tensor | None
    advantages: Tensor | None
    weights: Tensor
    entropy: Tensor | None
    values: Tensor | None
    old_values: Tensor | None
    returns: Tensor | None
    ref_logp: Tensor | None
    correction: Tensor | None
    sequence_log_ratio: Tensor | None
    kl_sum: Tensor | None
    kind: str
    kl_estimator: str
    kl_gradient: str
    coefficients: list[float]

    def columns(self) -> list[Tensor | None]:
        """Return the tensors, made contiguous."""
        return [None if t is None else t.contiguous() for t in self[:-4]]

    def coefficient(self, name: str) -> float:
        return self.coefficients[COEFFICIENTS.index(name)]


_NO_GRADIENTS: dict[str, Tensor | None] = dict.fromkeys(Arguments._fields)


def outputs(
    logp: Tensor | None, weights: Tensor, values: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Allocate loss [], statistics [STATS], d loss / d logp and d loss / d values [N] for a kernel
    to write. A gradient is empty if its part is absent."""
    N = weights.numel()
    sizes: tuple[tuple[int, ...], ...] = (
        (),
        (STATS,),
        (0 if logp is None else N,),
        (0 if values is None else N,),
    )
    loss, stats, logp_grad, values_grad = (weights.new_empty(size) for size in sizes)
    return loss, stats, logp_grad, values_grad


def attach(op: torch.library.CustomOpDef) -> None:
    """Register the fake implementation and the autograd of an op with the parameters of
    policy_value_loss."""
    op.register_fake(
        lambda logp, old_logp, advantages, weights, entropy, values, *rest: outputs(
            logp, weights, values
        )
    )
    op.register_autograd(_backward, setup_context=_setup)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, stats, logp_grad, values_grad = output
    given = Arguments(*inputs)
    ctx.mark_non_differentiable(stats, logp_grad, values_grad)
    ctx.save_for_backward(logp_grad, given.weights, values_grad)
    ctx.entropy_coef = given.coefficient("entropy_coef")


def _backward(ctx, loss_grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    refuse_double_backward("policy_value_loss")
    logp_grad, weights, values_grad = ctx.saved_tensors
    needed = Arguments(*ctx.needs_input_grad)
    return tuple(
        (
            _NO_GRADIENTS
            | {
                "logp": logp_grad * loss_grad if needed.logp else None,
                "entropy": weights * (loss_grad * -ctx.entropy_coef) if needed.entropy else None,
                "values": values_grad * loss_grad if needed.values else None,
            }
        ).values()
    )
