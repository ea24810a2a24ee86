"""Estimators of KL(pi || ref) from one sampled token's log-probabilities, and losses built from
these estimators. The exact KL over the vocabulary is in full_kl/.

    k1  = logp - ref_logp               unbiased; the only one that belongs in a reward
    k2  = k1^2 / 2                      biased; as a loss its expected gradient per state is that
                                        of the KL
    k3  = expm1(-k1) + k1, at least 0   unbiased, never negative; as a loss it follows KL(ref || pi)
    abs = |k1|

    kl_loss   value     token sum_t w_t value(k1_t)        sequence sum_b w_b value(sum_t k1_t)
              gradient  token w_t slope(k1_t) at logp_t    sequence w_b slope(sum_t k1_t) at each of
                                                           its tokens
              slope     d gradient-estimator / d k1

Shapes    logp and ref_logp have one shape, which is free; one estimate per element. A loss takes N
          tokens of B sequences.
Bytes     8 B read and 4 B written per element; kl_loss 12 and 4, and 8 in its backward.
Numerics  -k1 is clamped to +-20 inside the exponential (k3 stays finite up to 4.9e8); clamped_count
          counts how often. The exponential would turn the rounding error of logp - ref_logp into a
          relative error of 1e-6. So k3 carries this rounding error along (C++, Triton) or works in
          float64 (torch). In a loss k3's slope is 0 beyond the clamp.
Source    Schulman (2020), Approximating KL Divergence; Tang and Munos (2025), On a few pitfalls in
          KL divergence gradient estimation for RL.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedrl.kernels.full_kl import full_kl
from fusedrl.kernels.kl._reference import MAX_LOG_RATIO, kl_loss_reference, token_kl_reference
from fusedrl.kernels.linear_full_kl import linear_full_kl
from fusedrl.kernels.runtime import native
from fusedrl.kernels.runtime.checks import check_dtype, describe
from fusedrl.kernels.runtime.dispatch import Implementations
from fusedrl.kernels.runtime.triton import triton

if triton is not None:
    from fusedrl.kernels.kl import _triton  # noqa: F401  (registers fusedrl::token_kl_triton and fusedrl::kl_loss_triton)

__all__ = [
    "ESTIMATORS",
    "MAX_LOG_RATIO",
    "check_estimator",
    "clamped_count",
    "full_kl",
    "kl_loss",
    "kl_loss_reference",
    "linear_full_kl",
    "token_kl",
    "token_kl_reference",
]
ESTIMATORS = ("k1", "k2", "k3", "abs")  # the order of KlEstimator in csrc/cpu/include/kl.h
_IMPLS = Implementations("token_kl", cpu=("cpp", "torch", "triton"), cuda=("triton", "torch"))
_LOSS = Implementations("kl_loss", cpu=("cpp", "torch", "triton"), cuda=("triton", "torch"))


def check_estimator(op: str, estimator: str) -> None:
    """Raise ValueError unless `estimator` is one of ESTIMATORS."""
    if estimator not in ESTIMATORS:
        raise ValueError(
            f"{op}: expected an estimator of {', '.join(ESTIMATORS)}, got {estimator!r}"
        )


# ---- custom ops: what torch.compile sees ---------------------------------------------------------
if native.capability:

    @torch.library.register_fake("fusedrl::token_kl")
    def _(logp: Tensor, ref_logp: Tensor, estimator: int) -> Tensor:
        return torch.empty_like(logp, memory_format=torch.contiguous_format)

    @torch.library.register_fake("fusedrl::kl_loss_forward")
    def _(
        logp: Tensor,
        ref_logp: Tensor,
        weights: Tensor,
        estimator: int,
        gradient: int,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        return logp.new_empty(()), torch.empty_like(logp, memory_format=torch.contiguous_format)


# ---- public --------------------------------------------------------------------------------------
def token_kl(logp: Tensor, ref_logp: Tensor, *, estimator: str, impl: str | None = None) -> Tensor:
    """Estimate KL(pi || ref), in nats, at every sampled token.

    Args:
        logp, ref_logp: log-probabilities of the sampled tokens, of one shape, float32 (the torch
            implementation also float64).
        estimator: "k1", "k2", "k3" or "abs" (formulas at the top of this file).
        impl: "cpp", "torch" or "triton"; by default the best one for the device.
    Returns:
        The estimates in the inputs' shape and dtype. They carry no gradient: `kl_loss` chooses
        which estimator to differentiate.
    Raises:
        ValueError: the estimator is unknown, or shapes or devices do not agree.
        TypeError: a dtype is not supported.
        RuntimeError: `impl` cannot run on this machine.
    """
    op = "token_kl"
    check_estimator(op, estimator)
    if (
        logp.shape != ref_logp.shape
        or logp.device != ref_logp.device
        or logp.dtype != ref_logp.dtype
    ):
        raise ValueError(
            f"{op}: expected logp and ref_logp of one shape, dtype and device, got "
            f"{describe(logp)} and {describe(ref_logp)}"
        )
    chosen_impl = _IMPLS.choose(logp.device, impl)
    check_dtype(
        op,
        "logp",
        logp,
        (torch.float32, torch.float64) if chosen_impl == "torch" else (torch.float32,),
    )
    logp, ref_logp = logp.detach(), ref_logp.detach()
    if chosen_impl == "torch":
        return token_kl_reference(logp, ref_logp, estimator)
    call = torch.ops.fusedrl.token_kl if chosen_impl == "cpp" else torch.ops.fusedrl.token_kl_triton
    return call(logp, ref_logp, ESTIMATORS.index(estimator))


def clamped_count(logp: Tensor, ref_logp: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Count the log ratios beyond +-20, where k3 clamps its exponential and, in a loss, has no
    gradient. A count above 0 is an early sign of a policy that drifts.

    Args:
        logp, ref_logp: as in `token_kl`, on any device and in any float dtype. For `kl_loss` with
            level="sequence", pass the sums over each sequence.
        mask: bool in the shape of `logp`, such as weights != 0. False tokens are not counted and
            may hold anything. If None, every token is counted.
    Returns:
        An int64 scalar on the device of the inputs, not read on the host. NaN is not counted.
    Raises:
        ValueError: shapes or devices do not agree.
        TypeError: the mask is not bool.
    """
    op = "clamped_count"
    for other, tensor in (("ref_logp", ref_logp), ("mask", mask)):
        if tensor is not None and (tensor.shape != logp.shape or tensor.device != logp.device):
            raise ValueError(
                f"{op}: expected logp and {other} of one shape and device, got {describe(logp)} "
                f"and {describe(tensor)}"
            )
    check_dtype(op, "mask", mask, (torch.bool,))
    beyond = (logp.detach() - ref_logp.detach()).abs() > MAX_LOG_RATIO
    return (beyond if mask is None else beyond & mask).sum()


def kl_loss(
    logp: Tensor,
    ref_logp: Tensor,
    weights: Tensor,
    *,
    estimator: str,
    gradient: str,
    level: str = "token",
    cu_seqlens: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """Compute a loss from estimates of KL(pi || ref) at tokens sampled from pi. `estimator` chooses
    the reported value, `gradient` the slope that is descended, and `level` tokens or sequences.

    On policy, the expected gradient per state is: for k1, 0; for k2, that of KL(pi || ref); for k3,
    that of KL(ref || pi), the other direction. So the usual default, k3 for both, does not descend
    the KL that it reports; gradient="k2" does.

    Over whole sequences every token-level loss, k2 and the exact full_kl included, ignores that a
    token changes the states after it. At three tokens this is a relative error of the gradient of
    .51 (k3: .61). Three ways have the right gradient over sequences: k1 in the reward (shaped_gae);
    level="sequence" with gradient="k2" (noisy); or token-level k2 or full_kl together with the
    detached KL of the later tokens in the advantage.

    Args:
        logp, ref_logp: [N], or any shape, float32 (the torch implementation also float64), finite
            where the weight is not 0. ref_logp is a constant.
        weights: in the shape of `logp`, as `token_weights` returns them. A token of weight 0 does
            not count, and its other inputs may hold anything.
        estimator: "k1", "k2", "k3" or "abs": the estimator that gives the loss its value.
        gradient: the estimator that gives the loss its slope.
        level: "token", or "sequence". The latter takes the estimators of the whole sequence's log
            ratio, weighted by the mean of the sequence's non-zero weights.
        cu_seqlens: [B + 1] int32, for the sequence level of packed [N]. If None, the rows of [B, T]
            are the sequences.
        impl: "cpp", "torch" or "triton"; by default the best one for the device.
    Returns:
        A scalar, 0 if there are no tokens. Differentiable in logp ("cpp" and "triton" once: a
        double backward raises).
    Raises:
        ValueError: an estimator or the level is unknown, or shapes or devices do not agree.
        TypeError: a dtype is not supported.
        RuntimeError: `impl` cannot run on this machine.
    """
    op = "kl_loss"
    check_estimator(op, estimator)
    check_estimator(op, gradient)
    if level not in ("token", "sequence"):
        raise ValueError(f"{op}: expected level to be token or sequence, got {level!r}")
    for other, tensor in (("ref_logp", ref_logp), ("weights", weights)):
        if tensor.shape != logp.shape or tensor.device != logp.device or tensor.dtype != logp.dtype:
            raise ValueError(
                f"{op}: expected logp and {other} of one shape, dtype and device, got "
                f"{describe(logp)} and {describe(tensor)}"
            )
    chosen_impl = _LOSS.choose(logp.device, impl)
    check_dtype(
        op,
        "logp",
        logp,
        (torch.float32, torch.float64) if chosen_impl == "torch" else (torch.float32,),
    )
    check_dtype(op, "cu_seqlens", cu_seqlens, (torch.int32,))
    if cu_seqlens is not None and (
        cu_seqlens.ndim != 1 or cu_seqlens.numel() < 1 or cu_seqlens.device != logp.device
    ):
        raise ValueError(
            f"{op}: expected cu_seqlens [B + 1] on {logp.device}, got {describe(cu_seqlens)}; no "
            "sequences are a single 0"
        )
    if level == "sequence" and logp.ndim != (2 if cu_seqlens is None else 1):
        raise ValueError(
            f"{op}: expected logp [N] with cu_seqlens, or [B, T] without, at the sequence level, "
            f"got {describe(logp)} and "
            f"{'no cu_seqlens' if cu_seqlens is None else describe(cu_seqlens)}"
        )
    if level == "token":
        cu_seqlens = None
    elif cu_seqlens is None:
        cu_seqlens = (
            torch.arange(logp.shape[0] + 1, dtype=torch.int32, device=logp.device) * logp.shape[1]
        )
    flat = (logp.reshape(-1), ref_logp.detach().reshape(-1), weights.detach().reshape(-1))
    if chosen_impl == "torch":
        return kl_loss_reference(*flat, estimator, gradient, cu_seqlens)
    arguments = (*flat, ESTIMATORS.index(estimator), ESTIMATORS.index(gradient), cu_seqlens)
    return (
        torch.ops.fusedrl.kl_loss(*arguments)
        if chosen_impl == "cpp"
        else torch.ops.fusedrl.kl_loss_triton(*arguments)[0]
    )
