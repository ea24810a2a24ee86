"""Estimators of KL(pi || ref) from one sampled token's log-probabilities.

    k1  = logp - ref_logp                                  unbiased; the only one that belongs in a reward
    k2  = k1^2 / 2                                         biased; as a loss its expected gradient per state is that of the KL
    k3  = expm1(-k1) + k1, at least 0                      unbiased, never negative; as a loss it follows KL(ref || pi)
    abs = |k1|

Shapes    any, the same for both; one estimate an element.
Bytes     8 B read and 4 B written an element.
Numerics  -k1 is clamped to +-20 inside the exponential (k3 stays finite up to 4.9e8). k3 carries the rounding of logp - ref_logp along (C++) or
          works in float64 (torch): the exponential would turn it into a relative error of 1e-6.
Source    Schulman (2020), Approximating KL Divergence.
"""
from __future__ import annotations

import torch
from torch import Tensor

from fusedrl.kernels import native
from fusedrl.kernels.checks import check_dtype, describe
from fusedrl.kernels.dispatch import Implementations

ESTIMATORS = ("k1", "k2", "k3", "abs")  # the order of KlEstimator in csrc/cpu/kl.h
MAX_LOG_RATIO = 20.0
_IMPLS = Implementations("token_kl", cpu=("cpp", "torch"), cuda=("torch",))


def check_estimator(op: str, estimator: str) -> None:
    """Raises ValueError unless `estimator` is one of ESTIMATORS."""
    if estimator not in ESTIMATORS:
        raise ValueError(f"{op}: expected an estimator of {', '.join(ESTIMATORS)}, got {estimator!r}")


# ---- reference -------------------------------------------------------------------------------------------------------
def token_kl_reference(logp_N: Tensor, ref_logp_N: Tensor, estimator: str) -> Tensor:
    """The definition, on any device and in any float dtype (float64 is the oracle)."""
    k1 = logp_N - ref_logp_N
    if estimator == "k1":
        return k1
    if estimator == "k2":
        return 0.5 * k1 * k1
    if estimator == "abs":
        return k1.abs()
    exact = logp_N.double() - ref_logp_N.double()
    return (torch.expm1((-exact).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)) + exact).clamp(min=0.0).to(k1.dtype)


# ---- custom op: what torch.compile sees --------------------------------------------------------------------------------
if native.capability:
    @torch.library.register_fake("fusedrl::token_kl")
    def _(logp: Tensor, ref_logp: Tensor, estimator: int) -> Tensor:
        return torch.empty_like(logp, memory_format=torch.contiguous_format)


# ---- public ------------------------------------------------------------------------------------------------------------
def token_kl(logp: Tensor, ref_logp: Tensor, *, estimator: str, impl: str | None = None) -> Tensor:
    """One estimate of KL(pi || ref), in nats, for every sampled token.

    Args:
        logp, ref_logp: log-probabilities of the sampled tokens, of one shape, float32 (the torch implementation also float64).
        estimator: "k1", "k2", "k3" or "abs" (formulas at the top of this file).
        impl: "cpp" or "torch"; by default the best one for the device.
    Returns:
        The estimates in the inputs' shape and dtype. A value only: it carries no gradient (which estimator to differentiate is another question).
    Raises:
        ValueError: unknown estimator, shapes or devices that do not agree. TypeError: dtypes. RuntimeError: `impl` cannot run here.
    """
    op = "token_kl"
    check_estimator(op, estimator)
    if logp.shape != ref_logp.shape or logp.device != ref_logp.device or logp.dtype != ref_logp.dtype:
        raise ValueError(f"{op}: expected logp and ref_logp of one shape, dtype and device, got {describe(logp)} and {describe(ref_logp)}")
    chosen_impl = _IMPLS.choose(logp.device, impl)
    check_dtype(op, "logp", logp, (torch.float32, torch.float64) if chosen_impl == "torch" else (torch.float32,))
    logp, ref_logp = logp.detach(), ref_logp.detach()
    if chosen_impl == "torch":
        return token_kl_reference(logp, ref_logp, estimator)
    return torch.ops.fusedrl.token_kl(logp, ref_logp, ESTIMATORS.index(estimator))
