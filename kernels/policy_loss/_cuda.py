"""policy_value_loss in CUDA C++ (csrc/cuda/policy_value_loss.cu): its launches, its custom op for
torch.compile, and its gradient.

The mathematics, shapes and numerics are those of __init__.py. The kind and the estimators of the KL
term are compile-time options of the kernel; each combination that a run uses is compiled once. The
formulas per token are shared with the C++ kernels (csrc/shared/objectives.h).
"""

from __future__ import annotations

from ctypes import c_float, c_int32, c_int64

import torch
from torch import Tensor

from fusedrl.kernels.objective import COEFFICIENTS, KINDS, SEQUENCE_KINDS
from fusedrl.kernels.policy_loss import _fused as policy_loss_fused
from fusedrl.kernels.runtime import nvrtc
from fusedrl.kernels.runtime.nvrtc import Launch

_THREADS, _BLOCK, _ROWS = 256, 2048, 25  # kThreads, kBlock and kRows of policy_value_loss.cu
_SEQUENCE_KL = "sequence_k2"


def _options(kind: str, kl_estimator: str, kl_gradient: str, aligned: bool) -> tuple[str, ...]:
    return (
        f"-DALIGNED={int(aligned)}",
        f"-DKIND={kind}",
        f"-DKL_ESTIMATOR={kl_estimator}",
        f"-DKL_GRADIENT={kl_gradient}",
    )


# What tests compile: a file's sets of options.
OFFLINE_SOURCES = {
    "policy_value_loss.cu": [
        *(_options(kind, "k3", "k2" if i % 2 else "k3", True) for i, kind in enumerate(KINDS)),
        _options("clip", "k3", "k3", False),
        _options("gspo", _SEQUENCE_KL, _SEQUENCE_KL, False),
    ]
}


# ---- launcher: check, allocate, grid -------------------------------------------------------------
def _check(x: policy_loss_fused.Arguments) -> None:
    """Raise ValueError if per-sequence inputs are missing, or if there are too many or too few
    coefficients."""
    if x.logp is not None and x.kind in SEQUENCE_KINDS and x.sequence_log_ratio is None:
        raise ValueError(
            f"policy_value_loss: expected sequence_log_ratio [N] for kind {x.kind}, got None; pass "
            "cu_seqlens to the loss"
        )
    if (
        x.ref_logp is not None
        and _SEQUENCE_KL in (x.kl_estimator, x.kl_gradient)
        and x.kl_sum is None
    ):
        raise ValueError(
            "policy_value_loss: expected kl_sum [N] for the KL of sequences, got None; pass "
            "cu_seqlens to the loss"
        )
    if len(x.coefficients) != len(COEFFICIENTS):
        raise ValueError(
            f"policy_value_loss: expected {len(COEFFICIENTS)} coefficients, got "
            f"{len(x.coefficients)}"
        )


def plan_policy_value_loss(
    *given: object,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], list[Launch]]:
    """Allocate loss, statistics, d loss / d logp and d loss / d values, and plan the launches that
    write them. The gradients are for a unit upstream gradient, and empty if their part is absent.
    given: the Arguments of _fused.py."""
    x = policy_loss_fused.Arguments(*given)  # type: ignore[arg-type]
    _check(x)
    outputs = loss, stats, logp_grad, values_grad = policy_loss_fused.outputs(
        x.logp, x.weights, x.values
    )
    N = x.weights.numel()
    blocks = -(-N // _BLOCK)
    partials, inputs = x.weights.new_empty(_ROWS, blocks), x.columns()
    options = _options(
        x.kind, x.kl_estimator, x.kl_gradient, nvrtc.aligned([*inputs, logp_grad, values_grad])
    )
    coefficients = (c_float * len(COEFFICIENTS))(*x.coefficients)
    launches = []
    if blocks:
        launches.append(
            Launch(
                "policy_value_loss.cu",
                "policy_value_loss",
                (*inputs, logp_grad, values_grad, partials, c_int64(N), coefficients),
                (blocks, 1, 1),
                _THREADS,
                options,
            )
        )
    launches.append(
        Launch(
            "policy_value_loss.cu",
            "combine",
            (
                partials,
                loss,
                stats,
                c_int32(blocks),
                c_int32(x.logp is not None),
                c_int32(x.values is not None),
                c_float(x.coefficient("value_coef")),
            ),
            (1, 1, 1),
            _THREADS,
            options,
        )
    )
    return outputs, launches


# ---- custom op: what torch.compile sees ----------------------------------------------------------
@torch.library.custom_op("fusedrl::policy_value_loss_cuda", mutates_args=(), device_types="cuda")
def _policy_value_loss(
    logp: Tensor | None,
    old_logp: Tensor | None,
    advantages: Tensor | None,
    weights: Tensor,
    entropy: Tensor | None,
    values: Tensor | None,
    old_values: Tensor | None,
    returns: Tensor | None,
    ref_logp: Tensor | None,
    correction: Tensor | None,
    sequence_log_ratio: Tensor | None,
    kl_sum: Tensor | None,
    kind: str,
    kl_estimator: str,
    kl_gradient: str,
    coefficients: list[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs, launches = plan_policy_value_loss(
        logp,
        old_logp,
        advantages,
        weights,
        entropy,
        values,
        old_values,
        returns,
        ref_logp,
        correction,
        sequence_log_ratio,
        kl_sum,
        kind,
        kl_estimator,
        kl_gradient,
        coefficients,
    )
    nvrtc.run(launches, weights.device)
    return outputs


policy_loss_fused.attach(_policy_value_loss)
