"""Generalised advantage estimation (GAE), alone or fused with KL-shaped rewards and whitening; also
k-step advantages, temporal differences and discounted returns.

    delta_t = r_t + gamma V_{t+1} - V_t
    A_t = delta_t + gamma lam A_{t+1}         returns_t = A_t + V_t
    A_t^k   = sum_{i < k} gamma^i delta_{t+i}: k rewards, then gamma^k V_{t+k}, less V_t
            (k_step_advantages; lam = 0 is k = 1, lam = 1 every k >= n)
    With n steps left GAE = (1 - lam) sum_{k < n} lam^(k-1) A^k + lam^(n-1) A^n.
    lam     one number, or one of each sequence (gae alone)
    r_t     = token_rewards_t - kl_coef KL_t, plus the clipped score at the last unmasked token
            (shaped_gae)

    t + 1 is the next *unmasked* token of the sequence: tokens whose mask is False (padding,
    observations, a tool's tokens) are skipped, and their outputs are 0. After the last unmasked
    token V is 0, or last_values[b] for a truncated episode. As a linear recurrence GAE is an
    associative scan from the right over (a, b): (gamma lam, delta) at unmasked tokens, the identity
    (1, 0) at masked ones.

Shapes    N tokens in B sequences: packed [N] with cu_seqlens [B + 1] int32, or [B, T].
Bytes     gae 8 read, 8 written; shaped_gae 12 read, 12 written, plus the mask; whitening 8 more. On
          a GPU the launches dominate the time, so there is one launch (and one more to whiten).
Numerics  the recurrence is float32 whatever the input; sums over tokens and moments are wider.
          Every sum has a fixed order, so results are deterministic. Before whitening, a sequence's
          advantages depend neither on the thread count nor on the other sequences. Masked values
          are never used. k-step windows are summed by doubling (Triton: from two blocks), never as
          a difference of suffix sums, which cancels.
Source    Schulman et al. (2016), eqs. 14 to 16; the reward Ziegler et al. (2019), eq. 2; gaps as in
          multi-turn rollouts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusedrl.kernels.gae import _cuda  # noqa: F401  (registers fusedrl::gae_cuda and fusedrl::shaped_gae_cuda)
from fusedrl.kernels.gae._reference import (
    ShapedGAE,
    gae_reference,
    k_step_advantages_reference,
    shaped_gae_reference,
)
from fusedrl.kernels.kl import ESTIMATORS, check_estimator
from fusedrl.kernels.runtime import native
from fusedrl.kernels.runtime.checks import FLOATS, check, check_dtype, describe
from fusedrl.kernels.runtime.dispatch import Implementations
from fusedrl.kernels.runtime.triton import triton

if triton is not None:
    from fusedrl.kernels.gae import _triton  # noqa: F401  (registers fusedrl::gae_triton, shaped_gae_triton and k_step_advantages_triton)

_GAE = Implementations("gae", cpu=("cpp", "torch", "triton"), cuda=("triton", "torch", "cuda"))
_K_STEP = Implementations(
    "k_step_advantages", cpu=("cpp", "torch", "triton"), cuda=("triton", "torch")
)
_SHAPED = Implementations(
    "shaped_gae", cpu=("cpp", "torch", "triton"), cuda=("triton", "torch", "cuda")
)


# ---- custom ops: what torch.compile sees ---------------------------------------------------------
if native.capability:

    @torch.library.register_fake("fusedrl::gae")
    def _(rewards, values, mask, cu_seqlens, gamma, lam, last_values):
        like = torch.empty_like(rewards, memory_format=torch.contiguous_format)
        return like, torch.empty_like(like)

    @torch.library.register_fake("fusedrl::k_step_advantages")
    def _(rewards, values, mask, cu_seqlens, k, gamma, last_values):
        like = torch.empty_like(rewards, memory_format=torch.contiguous_format)
        return like, torch.empty_like(like)

    @torch.library.register_fake("fusedrl::shaped_gae")
    def _(
        logp,
        ref_logp,
        values,
        scores,
        mask,
        cu_seqlens,
        kl_coef,
        kl_coef_tensor,
        kl_estimator,
        gamma,
        lam,
        token_rewards,
        score_clip,
        whiten,
        whiten_unbiased,
    ):
        like = torch.empty_like(logp, memory_format=torch.contiguous_format)
        return (
            like,
            torch.empty_like(like),
            torch.empty_like(like),
            torch.empty_like(scores),
            torch.empty_like(scores),
        )


# ---- public --------------------------------------------------------------------------------------
def _prepare(op: str, impl: str, tensors: dict[str, Tensor | None]) -> list[Any]:
    """Detach the tensors and convert them to the dtype that `impl` computes in: float64 if any
    tensor is float64 (torch only), else float32."""
    for name, tensor in tensors.items():
        check_dtype(op, name, tensor, FLOATS if impl == "torch" else FLOATS[:3])
    wide = (
        torch.float64
        if any(t is not None and t.dtype == torch.float64 for t in tensors.values())
        else torch.float32
    )
    return [None if t is None else t.detach().to(wide) for t in tensors.values()]


def _check_layout(
    op: str,
    name: str,
    first: Tensor,
    cu_seqlens: Tensor | None,
    per_sequence: dict[str, Tensor | None],
    gamma: float,
    lam: float | Tensor,
) -> None:
    """Check the sizes and coefficients of gae and shaped_gae that patterns cannot express. Numbers
    of a tensor are not read."""
    if cu_seqlens is None and first.ndim != 2:
        raise ValueError(
            f"{op}: expected {name} [B, T], or [N] together with cu_seqlens [B + 1], got "
            f"{describe(first)} and no cu_seqlens"
        )
    check_dtype(op, "cu_seqlens", cu_seqlens, (torch.int32,))
    for other, tensor in per_sequence.items():
        if (
            tensor is not None
            and cu_seqlens is not None
            and cu_seqlens.shape[0] != tensor.shape[0] + 1
        ):
            raise ValueError(
                f"{op}: expected cu_seqlens [B + 1] for {other} [B], got {describe(cu_seqlens)} "
                f"and {describe(tensor)}"
            )
    if cu_seqlens is not None and cu_seqlens.shape[0] < 1:
        raise ValueError(
            f"{op}: expected cu_seqlens [B + 1], got {describe(cu_seqlens)}; no sequences are a "
            "single 0"
        )
    for other, value in (("gamma", gamma), ("lam", lam)):
        if not isinstance(value, Tensor) and not 0.0 <= value <= 1.0:
            raise ValueError(f"{op}: expected {other} within [0, 1], got {value}")


def gae(
    rewards: Tensor,
    values: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    gamma: float = 1.0,
    lam: float | Tensor = 0.95,
    last_values: Tensor | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute generalised advantage estimates and returns (equations at the top of this file).

    Args:
        rewards, values: [N] with `cu_seqlens`, or [B, T]; float32, or bf16 and fp16, which are
            converted to float32 (float64 with the torch implementation only). values[t] is the
            value of the state before token t.
        mask: bool in the shape of `rewards`. False tokens are skipped, may hold anything, and get
            outputs of 0. If None, no token is masked.
        cu_seqlens: [B + 1] int32, ascending from 0 to N (checked on CPU by "cpp"; not checked on a
            GPU).
        gamma, lam: discount and lambda, within [0, 1]. `lam` may be a float tensor [B], a lambda of
            each sequence, whose numbers are not checked; only "torch" computes that, on every
            device.
        last_values: [B] value of the state after each sequence's last token, for truncated
            episodes. If None, these values are 0.
        impl: "cpp", "torch", "triton" or "cuda"; by default the best one for the device.
    Returns:
        (advantages, returns) in the shape of `rewards`, float32 (float64 for float64). They carry
        no gradient: the inputs are detached.
    Raises:
        ValueError: sizes, devices or coefficients do not fit.
        TypeError: a dtype is not supported.
        RuntimeError: `impl` cannot run on this machine.
    """
    if isinstance(lam, Tensor):
        if impl not in (None, "torch"):
            raise ValueError(
                f"gae: expected impl 'torch' with a lam of each sequence, got {impl!r}; leave impl "
                "out"
            )
        impl, lam = "torch", lam.detach()
    rewards, values, last_values, chosen_impl = _prepare_gae(
        "gae", _GAE, rewards, values, mask, cu_seqlens, gamma, lam, last_values, impl
    )
    call = gae_reference if chosen_impl == "torch" else _native("gae", chosen_impl)
    return call(rewards, values, mask, cu_seqlens, gamma, lam, last_values)


def _native(op: str, impl: str) -> Callable[..., Any]:
    return getattr(torch.ops.fusedrl, op if impl == "cpp" else f"{op}_{impl}")


def _prepare_gae(
    op: str,
    table: Implementations,
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    gamma: float,
    lam: float | Tensor,
    last_values: Tensor | None,
    impl: str | None,
) -> tuple[Tensor, Tensor, Tensor | None, str]:
    """Run the checks shared by gae, td_advantages and k_step_advantages. Return (rewards, values,
    last_values, implementation)."""
    tokens = "N" if cu_seqlens is not None else "B T"
    lam_B = lam if isinstance(lam, Tensor) else None
    per_sequence = {"last_values": last_values, "lam": lam_B}
    _check_layout(op, "rewards", rewards, cu_seqlens, per_sequence, gamma, lam)
    check(
        op,
        {
            "rewards": (rewards, tokens),
            "values": (values, tokens),
            "mask": (mask, tokens),
            "cu_seqlens": (cu_seqlens, "B+1"),
            "last_values": (last_values, "B"),
            "lam": (lam_B, "B"),
        },
    )
    check_dtype(op, "mask", mask, (torch.bool,))
    check_dtype(op, "lam", lam_B, FLOATS)
    chosen_impl = table.choose(rewards.device, impl)
    rewards, values, last_values = _prepare(
        op, chosen_impl, {"rewards": rewards, "values": values, "last_values": last_values}
    )
    return rewards, values, last_values, chosen_impl


def td_advantages(
    rewards: Tensor,
    values: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    gamma: float = 1.0,
    last_values: Tensor | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the one-step temporal differences delta_t and their returns r_t + gamma V_{t+1}. This
    is `gae` with lam = 0; arguments, results and errors are those of `gae`."""
    return gae(
        rewards,
        values,
        mask=mask,
        cu_seqlens=cu_seqlens,
        gamma=gamma,
        lam=0.0,
        last_values=last_values,
        impl=impl,
    )


def discounted_returns(
    rewards: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    gamma: float = 1.0,
    last_values: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """Compute the reward-to-go: sum_i gamma^i r_{t+i} over the unmasked tokens from t on, plus
    gamma^n last_values. Arguments and errors are those of `gae`; the result has the shape of
    `rewards` and is float32."""
    return gae(
        rewards,
        torch.zeros_like(rewards),
        mask=mask,
        cu_seqlens=cu_seqlens,
        gamma=gamma,
        lam=1.0,
        last_values=last_values,
        impl=impl,
    )[0]


def k_step_advantages(
    rewards: Tensor,
    values: Tensor,
    k: int,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    gamma: float = 1.0,
    last_values: Tensor | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute k-step advantages: k discounted rewards, plus the discounted value of the state after
    them, minus values[t] (equations at the top of this file).

    Args:
        k: number of unmasked tokens to look ahead, at least 1. Near the end of a sequence there are
            fewer, and the value after the end is `last_values` (or 0).
        others: the other arguments are those of `gae`.
    Returns:
        (advantages, returns) as `gae` returns them. The errors are also those of `gae`.
    """
    op = "k_step_advantages"
    if k < 1:
        raise ValueError(f"{op}: expected k >= 1, got {k}")
    rewards, values, last_values, chosen_impl = _prepare_gae(
        op, _K_STEP, rewards, values, mask, cu_seqlens, gamma, 1.0, last_values, impl
    )
    call = k_step_advantages_reference if chosen_impl == "torch" else _native(op, chosen_impl)
    return call(rewards, values, mask, cu_seqlens, k, gamma, last_values)


def shaped_gae(
    logp: Tensor,
    ref_logp: Tensor,
    values: Tensor,
    scores: Tensor,
    *,
    mask: Tensor,
    cu_seqlens: Tensor | None,
    kl_coef: float | Tensor,
    kl_estimator: str = "k1",
    gamma: float = 1.0,
    lam: float = 0.95,
    token_rewards: Tensor | None = None,
    score_clip: float | None = None,
    whiten: bool = True,
    whiten_unbiased: bool = False,
    allow_biased_kl: bool = False,
    impl: str | None = None,
) -> ShapedGAE:
    """Turn log-probabilities, values and scores into advantages, in four steps: KL-shaped rewards,
    GAE, returns, whitening.

    Args:
        logp, ref_logp, values: [N] with `cu_seqlens`, or [B, T] with None; float32, or bf16 and
            fp16, which are converted to float32 (float64 with "torch" only).
        scores: [B], added to the reward of each sequence's last unmasked token. The score of a
            sequence without unmasked tokens is not used.
        mask: bool in the shape of `logp`, True at the policy's own tokens. False tokens may hold
            anything and get outputs of 0.
        cu_seqlens: [B + 1] int32, ascending from 0 to N (checked on CPU by "cpp"; not checked on a
            GPU).
        kl_coef: reward subtracted per nat of KL. A float, or a float32 scalar tensor on the same
            device, which is not read on the host.
        kl_estimator: "k1". Every other estimator is biased in a reward and needs `allow_biased_kl`.
        gamma, lam: discount and lambda, within [0, 1].
        token_rewards: in the shape of `logp`, added to the reward of each token. If None, nothing
            is added.
        score_clip: if given, scores are first clipped to +-score_clip.
        whiten: True scales the advantages to mean 0 and variance 1 over all unmasked tokens of the
            call (eps 1e-8). Returns are computed before whitening.
        whiten_unbiased: True divides the variance by count - 1 instead of count.
        impl: "cpp", "torch", "triton" or "cuda"; by default the best one for the device.
    Returns:
        A `ShapedGAE`. Its tensors carry no gradient: the inputs are detached.
    Raises:
        ValueError: sizes, devices or coefficients do not fit, or a biased estimator is used without
            `allow_biased_kl`.
        TypeError: a dtype is not supported.
        RuntimeError: `impl` cannot run on this machine.
    """
    op, tokens = "shaped_gae", "N" if cu_seqlens is not None else "B T"
    check_estimator(op, kl_estimator)
    if kl_estimator != "k1" and not allow_biased_kl:
        raise ValueError(
            f"{op}: expected kl_estimator 'k1', got {kl_estimator!r}: in a reward any other "
            "estimator drops a term of the gradient of the KL and "
            "moves the optimum; pass allow_biased_kl=True if that is what you want"
        )
    if score_clip is not None and not score_clip >= 0.0:
        raise ValueError(f"{op}: expected score_clip >= 0 or None, got {score_clip}")
    _check_layout(op, "logp", logp, cu_seqlens, {"scores": scores}, gamma, lam)
    on_device = kl_coef if isinstance(kl_coef, Tensor) else None
    check(
        op,
        {
            "logp": (logp, tokens),
            "ref_logp": (ref_logp, tokens),
            "values": (values, tokens),
            "scores": (scores, "B"),
            "mask": (mask, tokens),
            "cu_seqlens": (cu_seqlens, "B+1"),
            "kl_coef": (on_device, ""),
            "token_rewards": (token_rewards, tokens),
        },
    )
    check_dtype(op, "mask", mask, (torch.bool,))
    chosen_impl = _SHAPED.choose(logp.device, impl)
    logp, ref_logp, values, scores, token_rewards, on_device = _prepare(
        op,
        chosen_impl,
        {
            "logp": logp,
            "ref_logp": ref_logp,
            "values": values,
            "scores": scores,
            "token_rewards": token_rewards,
            "kl_coef": on_device,
        },
    )
    columns = (logp, ref_logp, values, scores, mask, cu_seqlens)
    rest = (gamma, lam, token_rewards, score_clip, whiten, whiten_unbiased)
    if chosen_impl == "torch":
        coef = kl_coef if on_device is None else on_device
        return shaped_gae_reference(*columns, coef, kl_estimator, *rest)
    coef, number = kl_coef if on_device is None else 0.0, ESTIMATORS.index(kl_estimator)
    return ShapedGAE(*_native(op, chosen_impl)(*columns, coef, on_device, number, *rest))
