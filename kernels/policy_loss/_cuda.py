"""policy_value_loss in CUDA C++ (csrc/cuda/policy_value_loss.cu): what is launched, the op that torch.compile sees, and its gradient.

The mathematics, shapes and numerics are those of policy_loss.py. The kinds and the estimators of the KL term are numbers here, as in the other
implementations, and compile-time options of the kernel: each kind that a run uses is compiled once.
"""
from __future__ import annotations

from ctypes import c_float, c_int32, c_int64

import torch
from torch import Tensor

from fusedrl.kernels.policy_loss import _fused as policy_loss_fused
from fusedrl.kernels.runtime import nvrtc
from fusedrl.kernels.runtime.nvrtc import Launch

_THREADS, _BLOCK, _ROWS = 256, 2048, 25  # kThreads, kBlock and kRows of policy_value_loss.cu
_SEQUENCE_KINDS = (4, 7)  # gspo and geometric_mean, which read sequence_log_ratio
_SEQUENCE_KL = 4


def _options(kind: int, kl_estimator: int, kl_gradient: int, aligned: bool) -> tuple[str, ...]:
    return f"-DALIGNED={int(aligned)}", f"-DKIND={kind}", f"-DKL_ESTIMATOR={kl_estimator}", f"-DKL_GRADIENT={kl_gradient}"


# What tests compile: a file's sets of options.
OFFLINE_SOURCES = {"policy_value_loss.cu": [
    *(_options(kind, 2, 1 if kind % 2 else 2, True) for kind in range(9)), _options(0, 2, 2, False), _options(4, _SEQUENCE_KL, _SEQUENCE_KL, False),
]}


# ---- launcher: check, allocate, grid -----------------------------------------------------------------------------------
def plan_policy_value_loss(
    logp: Tensor | None, old_logp: Tensor | None, advantages: Tensor | None, weights: Tensor, entropy: Tensor | None, values: Tensor | None,
    old_values: Tensor | None, returns: Tensor | None, ref_logp: Tensor | None, correction: Tensor | None, sequence_log_ratio: Tensor | None,
    kl_sum: Tensor | None, kind: int, lower: float, upper: float, dual: float, tau_positive: float, tau_negative: float, beta: float, kl_coef: float,
    kl_estimator: int, kl_gradient: int, entropy_coef: float, value_clip: float, value_coef: float,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], list[Launch]]:
    """Loss, statistics, and d loss / d logp and d loss / d values for a unit upstream gradient (empty where that part is absent), to be written."""
    if logp is not None and kind in _SEQUENCE_KINDS and sequence_log_ratio is None:
        raise ValueError(f"policy_value_loss: expected sequence_log_ratio [N] for kind {kind}, got None; pass cu_seqlens to the loss")
    if ref_logp is not None and _SEQUENCE_KL in (kl_estimator, kl_gradient) and kl_sum is None:
        raise ValueError("policy_value_loss: expected kl_sum [N] for the KL of sequences, got None; pass cu_seqlens to the loss")
    outputs = loss, stats, logp_grad, values_grad = policy_loss_fused.outputs(logp, weights, values)
    N = weights.numel()
    blocks = -(-N // _BLOCK)
    partials = weights.new_empty(_ROWS, blocks)
    inputs = [None if t is None else t.contiguous() for t in (logp, old_logp, advantages, weights, entropy, values, old_values, returns, ref_logp,
                                                              correction, sequence_log_ratio, kl_sum)]
    options = _options(kind, kl_estimator, kl_gradient, nvrtc.aligned([*inputs, logp_grad, values_grad]))
    coefficients = map(c_float, (lower, upper, dual, tau_positive, tau_negative, beta, kl_coef, entropy_coef, value_clip, value_coef))
    launches = []
    if blocks:
        launches.append(Launch("policy_value_loss.cu", "policy_value_loss", (*inputs, logp_grad, values_grad, partials, c_int64(N), *coefficients),
                               (blocks, 1, 1), _THREADS, options))
    launches.append(Launch("policy_value_loss.cu", "combine", (
        partials, loss, stats, c_int32(blocks), c_int32(logp is not None), c_int32(values is not None), c_float(value_coef)), (1, 1, 1), _THREADS, options))
    return outputs, launches


# ---- custom op: what torch.compile sees --------------------------------------------------------------------------------
@torch.library.custom_op("fusedrl::policy_value_loss_cuda", mutates_args=(), device_types="cuda")
def _policy_value_loss(
    logp: Tensor | None, old_logp: Tensor | None, advantages: Tensor | None, weights: Tensor, entropy: Tensor | None, values: Tensor | None,
    old_values: Tensor | None, returns: Tensor | None, ref_logp: Tensor | None, correction: Tensor | None, sequence_log_ratio: Tensor | None,
    kl_sum: Tensor | None, kind: int, lower: float, upper: float, dual: float, tau_positive: float, tau_negative: float, beta: float, kl_coef: float,
    kl_estimator: int, kl_gradient: int, entropy_coef: float, value_clip: float, value_coef: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs, launches = plan_policy_value_loss(
        logp, old_logp, advantages, weights, entropy, values, old_values, returns, ref_logp, correction, sequence_log_ratio, kl_sum, kind, lower, upper,
        dual, tau_positive, tau_negative, beta, kl_coef, kl_estimator, kl_gradient, entropy_coef, value_clip, value_coef)
    nvrtc.run(launches, weights.device)
    return outputs


policy_loss_fused.attach(_policy_value_loss)
