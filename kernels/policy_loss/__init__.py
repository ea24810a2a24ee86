"""The policy objectives and the value loss: values, gradients and every statistic from one pass
over the tokens.

    d         = logp - old_logp
    ratio     = exp(clamp(d, -20, 20)), without gradient beyond the clamp
    policy    l_t = correction_t term_t + kl_coef kl_t - entropy_coef H_t; objective.py has the term
              of every kind and the correction
    value     v_t = max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2) / 2
    loss      = sum_t weights_t l_t + value_coef sum_t weights_t v_t

The KL term, k = logp - ref_logp, tokens drawn from the policy:

    estimator   value               slope by logp       as a loss, per state (or for completions of
                                                        one token) its expected gradient is
    k1          k                   1                   0: the value is right, the gradient is noise
                                                        and nothing else
    k2          k^2 / 2             k                   that of KL(pi || ref); the value is biased
    k3          e^-k - 1 + k        1 - e^-k            that of KL(ref || pi), the other direction;
                                                        the value is right
    abs         |k|                 sign(k)             of no KL

`kl_gradient` names the estimator whose slope is taken when it is not that of the value:
kl_estimator="k3", kl_gradient="k2" reports and adds an unbiased KL and follows KL(pi || ref). The
default k3 alone is what most systems do: it follows the forward KL. Over completions of several
tokens every token-level loss drops the term by which a token changes the states that follow, and
with it part of the gradient of the KL between completions; exact are k1 in the reward with
reward-to-go, and kl_level="sequence" with k2: K^2 / 2 for K = sum_t k_t, written per token as K k_t
/ 2 with the slope K (the weights have to be one number a sequence). Beyond |k| = 20 k3 is cut
inside the exponential and its slope is 0. The tests establish each of these by enumeration.

Shapes    N tokens. weights_N == 0 means masked: what the other inputs hold there is never read into
          anything.
Bytes     policy 16 N read (4 N more for each of entropy, ref_logp, the correction and what a
          sequence kind adds) and 4 N written; value 8 N (12 N with a clip) and 4 N; forward.
          Backward scales: 8 N a gradient. What a token takes from its sequence is formed before, by
          torch.
Numerics  float32 terms; sums over fixed blocks, then in double in block order: no atomics, the same
          bits every run and for any thread count. exp and k3 come from one expansion without
          cancellation: d == 0 gives ratio 1.0 and KLs 0.0 exactly. A ratio on a bound is inside.
          The explained variance is formed from deviations about block means (Chan's merge), never
          from E[x^2] - E[x]^2.
Source    objective.py; the value loss: Schulman et al. (2017), eq. 9, clipped; k1, k2, k3: Schulman
          (2020), Approximating KL divergence.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fusedrl.kernels.objective import (
    KL_ESTIMATORS,
    PolicyObjective,
    PolicyStats,
    RolloutCorrection,
    ValueStats,
    check_bounds,
    token_weights,
)
from fusedrl.kernels.policy_loss import _cuda  # noqa: F401  (registers fusedrl::policy_value_loss_cuda)
from fusedrl.kernels.policy_loss._reference import (
    _CLIP,
    PolicyPart,
    policy_loss_reference,
    value_loss_reference,
)
from fusedrl.kernels.runtime import native
from fusedrl.kernels.runtime.checks import check, check_dtype
from fusedrl.kernels.runtime.dispatch import Implementations
from fusedrl.kernels.runtime.triton import triton

if triton is not None:
    from fusedrl.kernels.policy_loss import _triton  # noqa: F401  (registers fusedrl::policy_value_loss_triton)

__all__ = [
    "KL_ESTIMATORS",
    "PolicyObjective",
    "PolicyStats",
    "RolloutCorrection",
    "ValueStats",
    "policy_loss",
    "policy_loss_reference",
    "policy_value_loss",
    "token_weights",
    "value_loss",
    "value_loss_reference",
]

_IMPLS = Implementations(
    "policy_value_loss", cpu=("cpp", "torch", "triton"), cuda=("triton", "torch", "cuda")
)
_POLICY_FIELDS = len(PolicyStats._fields)


# ---- custom op: what torch.compile sees ----------------------------------------------------------
if native.capability:

    @torch.library.register_fake("fusedrl::policy_value_loss_forward")
    def _(
        logp: Tensor | None,
        old_logp: Tensor | None,
        advantages: Tensor | None,
        weights: Tensor,
        entropy: Tensor | None,
        values: Tensor | None,
        *rest: object,
    ) -> tuple[Tensor, ...]:
        N = weights.numel()
        sizes = (
            (),
            (_POLICY_FIELDS + len(ValueStats._fields),),
            (0 if logp is None else N,),
            (0 if values is None else N,),
        )
        return tuple(weights.new_empty(size) for size in sizes)


def _fused(
    impl: str,
    policy: PolicyPart,
    weights: Tensor,
    values: Tensor | None,
    old_values: Tensor | None,
    returns: Tensor | None,
    value_clip: float | None,
    value_coef: float,
) -> tuple[Tensor, PolicyStats, ValueStats]:
    op = getattr(
        torch.ops.fusedrl, "policy_value_loss" if impl == "cpp" else f"policy_value_loss_{impl}"
    )
    old_logp = policy.logp if policy.old_logp is None else policy.old_logp
    clip, old_values = (math.inf, None) if value_clip is None else (value_clip, old_values)
    loss, stats, *_ = op(
        policy.logp,
        old_logp,
        policy.advantages,
        weights,
        policy.entropy,
        values,
        old_values,
        returns,
        policy.ref_logp,
        *policy.derived(weights),
        *policy.settings(clip, value_coef),
    )
    each = stats.unbind()
    return loss, PolicyStats(*each[:_POLICY_FIELDS]), ValueStats(*each[_POLICY_FIELDS:])


# ---- public --------------------------------------------------------------------------------------
def policy_value_loss(
    logp: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    weights: Tensor,
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    *,
    objective: PolicyObjective = _CLIP,
    value_clip: float | None = None,
    value_coef: float = 0.1,
    ref_logp: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    kl_gradient: str | None = None,
    kl_level: str = "token",
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    rollout_logp: Tensor | None = None,
    rollout_correction: RolloutCorrection | None = None,
    cu_seqlens: Tensor | None = None,
    impl: str | None = None,
) -> tuple[Tensor, PolicyStats, ValueStats]:
    """`policy_loss` + value_coef * `value_loss` over the same tokens and weights, in one pass.

    Args: those of the two functions; `value_clip` is the value loss's `clip`.
    Returns:
        (loss, PolicyStats, ValueStats); each statistics' `loss` is its own part, the value's
        without the coefficient.
    Raises: as the two functions.
    """
    policy = PolicyPart(
        logp=logp,
        old_logp=old_logp,
        advantages=advantages,
        objective=objective,
        ref_logp=ref_logp,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
        kl_gradient=kl_gradient,
        kl_level=kl_level,
        entropy=entropy,
        entropy_coef=entropy_coef,
        rollout_logp=rollout_logp,
        rollout_correction=rollout_correction,
        cu_seqlens=cu_seqlens,
    )
    chosen = _checked(
        "policy_value_loss",
        impl,
        policy,
        value_clip,
        weights=weights,
        values=values,
        old_values=old_values,
        returns=returns,
    )
    if chosen == "torch":
        loss, policy_stats = policy.reference(weights, policy.derived(weights))
        value, value_stats = value_loss_reference(
            values, old_values, returns, weights, clip=value_clip
        )
        return loss + value_coef * value, policy_stats, value_stats
    return _fused(chosen, policy, weights, values, old_values, returns, value_clip, value_coef)


def policy_loss(
    logp: Tensor,
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
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    rollout_logp: Tensor | None = None,
    rollout_correction: RolloutCorrection | None = None,
    cu_seqlens: Tensor | None = None,
    impl: str | None = None,
) -> tuple[Tensor, PolicyStats]:
    """sum_t weights_t (correction_t * policy term_t + kl_coef * kl_t - entropy_coef * entropy_t).

    Args:
        logp: [N] float32 log-probabilities of the tokens under the policy that is trained.
        old_logp: [N], under the policy of the last rollout or scoring, constant. None, for kind
            "reinforce" only: the policy is that policy, and the ratio statistics say so (ratio 1,
            KL 0). "reinforce" uses it for the statistics alone.
        advantages: [N], constant.
        weights: [N], constant, as from `token_weights`; 0 means masked: the token counts nowhere,
            and may be NaN in every other input.
        objective: the policy term.
        ref_logp: [N], under the reference policy, constant; for the KL term and its statistic.
        kl_coef: the term's factor.
        kl_estimator: "k1", "k2", "k3" or "abs", the term's value.
        kl_gradient: whose slope it has, by default the same one's: k1's is useless, k2's follows
            KL(pi || ref), k3's KL(ref || pi) (see the top of this file).
        kl_level: "token"; or "sequence", with kl_estimator "k2" and cu_seqlens: half the square of
            the sequence's log ratio.
        entropy: [N] of the policy's distribution at each token, for the bonus and the statistics.
        entropy_coef: the bonus's factor.
        rollout_logp: [N], under the program that sampled, constant.
        rollout_correction: what becomes of exp(old_logp - rollout_logp); both or neither.
        cu_seqlens: [B + 1] int32 or int64, from 0 to N; for the kinds gspo and geometric_mean and
            whatever has level "sequence".
        impl: "cpp", "triton", "cuda" or "torch" (which also takes float64); by default the best one
            for the device.
    Returns:
        (loss, PolicyStats): a scalar, differentiable once (with "torch" any number of times) in
        `logp` and `entropy` only. A log ratio beyond +-20 is cut inside the exponential and has no
        gradient there ("reinforce" and "dro" have no exponential in their loss, and the one of
        "cispo" has no gradient anyway).
    Raises:
        ValueError: sizes or devices that do not agree, a coefficient without its tensor, a missing
            old_logp or cu_seqlens, an unknown estimator or level.
        TypeError: dtypes.
        RuntimeError: `impl` cannot run here, or a double backward.
    """
    policy = PolicyPart(
        logp=logp,
        old_logp=old_logp,
        advantages=advantages,
        objective=objective,
        ref_logp=ref_logp,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
        kl_gradient=kl_gradient,
        kl_level=kl_level,
        entropy=entropy,
        entropy_coef=entropy_coef,
        rollout_logp=rollout_logp,
        rollout_correction=rollout_correction,
        cu_seqlens=cu_seqlens,
    )
    chosen = _checked("policy_loss", impl, policy, None, weights=weights)
    if chosen == "torch":
        return policy.reference(weights, policy.derived(weights))
    loss, stats, _ = _fused(chosen, policy, weights, None, None, None, None, 0.0)
    return loss, stats


def value_loss(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    weights: Tensor,
    *,
    clip: float | None = None,
    impl: str | None = None,
) -> tuple[Tensor, ValueStats]:
    """sum_t weights_t max((values - returns)^2, (values clipped to within `clip` of old_values -
    returns)^2) / 2.

    Args:
        values: [N] float32, of the critic that is trained.
        old_values: [N], of the critic at the rollout, constant; not read, and may be None, without
            a clip.
        returns, weights: [N], constant; weights as in `policy_loss`.
        clip: how far a value may move from the old one before the gradient stops; None: no bound.
        impl: "cpp", "triton", "cuda" or "torch" (which also takes float64); by default the best one
            for the device.
    Returns:
        (loss, ValueStats): a scalar, differentiable once (with "torch" any number of times) in
        `values` only.
    Raises:
        ValueError: sizes or devices that do not agree, a clip that is not positive or has no
            old_values.
        TypeError: dtypes.
        RuntimeError: `impl` cannot run here, or a double backward.
    """
    chosen = _checked(
        "value_loss",
        impl,
        PolicyPart(),
        clip,
        weights=weights,
        values=values,
        old_values=old_values,
        returns=returns,
    )
    if chosen == "torch":
        return value_loss_reference(values, old_values, returns, weights, clip=clip)
    loss, _, stats = _fused(chosen, PolicyPart(), weights, values, old_values, returns, clip, 1.0)
    return loss, stats


def _checked(
    op: str, impl: str | None, policy: PolicyPart, clip: float | None, **values: Tensor | None
) -> str:
    """Refuse what cannot be served; the name of the implementation that serves the rest."""
    tensors = dict(values)
    if op != "value_loss":
        tensors = {
            name: getattr(policy, name) for name in ("logp", "old_logp", "advantages")
        } | tensors
        tensors |= {name: getattr(policy, name) for name in ("ref_logp", "entropy", "rollout_logp")}
    for name, tensor in tensors.items():
        if tensor is None and name not in (
            "entropy",
            "old_logp",
            "old_values",
            "ref_logp",
            "rollout_logp",
        ):
            raise TypeError(f"{op}: expected a tensor for {name}, got None")
    (N, *_) = check(
        op,
        {name: (tensor, "N") for name, tensor in tensors.items()}
        | {"cu_seqlens": (policy.cu_seqlens, "E")},
    )
    if op != "value_loss":
        check_policy(op, policy, N)
        if policy.entropy_coef and policy.entropy is None:
            raise ValueError(
                f"{op}: expected entropy with entropy_coef {policy.entropy_coef!r}, got None"
            )
    if clip is not None and (not clip > 0 or tensors["old_values"] is None):
        given = "no old_values" if tensors["old_values"] is None else "old_values"
        raise ValueError(
            f"{op}: expected a clip > 0 and old_values with it, or no clip, got clip {clip!r} and "
            f"{given}"
        )
    device = next(tensor.device for tensor in tensors.values() if tensor is not None)
    chosen = _IMPLS.choose(device, impl)
    for name, tensor in tensors.items():
        check_dtype(
            op,
            name,
            tensor,
            (torch.float32, torch.float64) if chosen == "torch" else (torch.float32,),
        )
    return chosen


def check_policy(op: str, policy: PolicyPart, N: int) -> None:
    """Raise unless the settings of the policy part fit together; tensors' sizes are checked before,
    their dtypes after."""
    objective, correction, cu_seqlens = (
        policy.objective,
        policy.rollout_correction,
        policy.cu_seqlens,
    )
    # else an old_logp that is missing is the policy's own
    known = policy.logp is not None or objective.by_sequence
    if policy.old_logp is None and objective.kind != "reinforce" and known:
        raise ValueError(
            f"{op}: expected old_logp for kind {objective.kind!r}, got None; on-policy, pass "
            "logp.detach()"
        )
    if policy.kl_coef and policy.ref_logp is None:
        raise ValueError(f"{op}: expected ref_logp with kl_coef {policy.kl_coef!r}, got None")
    for name, estimator in (
        ("kl_estimator", policy.kl_estimator),
        ("kl_gradient", policy.kl_gradient or "k1"),
    ):
        if estimator not in KL_ESTIMATORS:
            raise ValueError(
                f"{op}: expected {name} to be one of {', '.join(KL_ESTIMATORS)}, got {estimator!r}"
            )
    if policy.kl_level not in ("token", "sequence"):
        raise ValueError(
            f"{op}: expected kl_level to be token or sequence, got {policy.kl_level!r}"
        )
    if policy.kl_level == "sequence" and (policy.kl_estimator, policy.kl_gradient or "k2") != (
        "k2",
        "k2",
    ):
        raise ValueError(
            f"{op}: expected kl_estimator k2 with kl_level sequence, got {policy.kl_estimator!r} "
            f"and kl_gradient {policy.kl_gradient!r}"
        )
    if (policy.rollout_logp is None) != (correction is None):
        raise ValueError(
            f"{op}: expected rollout_logp and rollout_correction together, got "
            f"{'rollout_correction' if correction else 'rollout_logp'} alone"
        )
    if correction is not None and policy.old_logp is None:
        raise ValueError(f"{op}: expected old_logp with a rollout_correction, got None")
    by_sequence = {
        f"kind {objective.kind!r}": objective.by_sequence,
        "kl_level 'sequence'": policy.kl_level == "sequence",
        "rollout_correction by sequence": correction is not None and correction.by_sequence,
    }
    for reason, needed in by_sequence.items():
        if needed and cu_seqlens is None:
            raise ValueError(f"{op}: expected cu_seqlens with {reason}, got None")
    if cu_seqlens is not None:
        check_dtype(op, "cu_seqlens", cu_seqlens, (torch.int32, torch.int64))
        if cu_seqlens.numel() == 0:
            raise ValueError(
                f"{op}: expected cu_seqlens [B + 1], which is [0] for no sequences, got an empty "
                "tensor"
            )
        check_bounds(op, cu_seqlens, N)
