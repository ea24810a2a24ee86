"""The policy objectives and the value loss: their values, gradients and statistics from one pass
over the tokens.

    d         = logp - old_logp
    ratio     = exp(clamp(d, -20, 20)), without gradient beyond the clamp
    policy    l_t = correction_t term_t + kl_coef kl_t - entropy_coef H_t; objective.py has the term
              of every kind and the correction
    value     v_t = max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2) / 2
    loss      = sum_t weights_t l_t + value_coef sum_t weights_t v_t

The KL term, with k = logp - ref_logp and tokens drawn from the policy:

    estimator   value               slope by logp       as a loss, per state (or for completions of
                                                        one token) its expected gradient is
    k1          k                   1                   0: the value is right, the gradient is noise
                                                        and nothing else
    k2          k^2 / 2             k                   that of KL(pi || ref); the value is biased
    k3          e^-k - 1 + k        1 - e^-k            that of KL(ref || pi), the other direction;
                                                        the value is right
    abs         |k|                 sign(k)             of no KL

`kl_gradient` names the estimator that gives the slope, if it is not the one that gives the value.
kl_estimator="k3" with kl_gradient="k2" reports and adds an unbiased KL and descends KL(pi || ref).
The default, k3 for both, is what most systems use: it descends KL(ref || pi).

Over completions of several tokens, every token-level loss ignores that a token changes the states
after it. So it misses part of the gradient of the KL between completions. Two ways are exact. One
is k1 in the reward with reward-to-go. The other is kl_level="sequence" with k2: K^2 / 2 for K =
sum_t k_t, written per token as K k_t / 2 with the slope K (all weights of a sequence must be
equal). Beyond |k| = 20, k3 is clamped inside the exponential and its slope is 0. The tests
establish each of these by enumeration.

Shapes    N tokens. weights_N == 0 means masked: the other inputs of a masked token never affect a
          result.
Bytes     forward: policy 16 N read (4 N more for each of entropy, ref_logp, the correction and the
          input of a sequence kind) and 4 N written; value 8 N (12 N with a clip) and 4 N. Backward
          only scales the gradients: 8 N for each. The per-sequence inputs are computed before, by
          torch.
Numerics  float32 terms; sums over fixed blocks, then in double in block order: no atomics, the same
          bits every run and for any thread count. exp and k3 come from one expansion without
          cancellation: d == 0 gives ratio 1.0 and KLs 0.0 exactly. A ratio equal to a bound is not
          clipped. The explained variance is formed from deviations about block means (Chan's
          merge), never from E[x^2] - E[x]^2.
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
    """Compute `policy_loss` + value_coef * `value_loss` over the same tokens and weights, in one
    pass.

    Args: those of the two functions; `value_clip` is the `clip` of `value_loss`.
    Returns:
        (loss, PolicyStats, ValueStats). `PolicyStats.loss` is the policy part; `ValueStats.loss` is
        the value part without value_coef.
    Raises: the errors of the two functions.
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
    """Compute sum_t weights_t (correction_t * policy term_t + kl_coef * kl_t - entropy_coef *
    entropy_t).

    Args:
        logp: [N] float32 log-probabilities of the tokens under the trained policy.
        old_logp: [N] log-probabilities under the policy that sampled or last scored the tokens;
            constant. Only kind "reinforce" allows None: the trained policy is then the old policy
            (ratio 1, KL 0). "reinforce" uses `old_logp` only for statistics.
        advantages: [N], constant.
        weights: [N], constant, as `token_weights` returns them. 0 means masked: the token does not
            count, and may be NaN in every other input.
        objective: the policy term.
        ref_logp: [N] log-probabilities under the reference policy, constant; for the KL term and
            its statistic.
        kl_coef: factor of the KL term.
        kl_estimator: "k1", "k2", "k3" or "abs"; gives the KL term its value.
        kl_gradient: estimator that gives the KL term its slope; by default `kl_estimator`. The
            slope of k1 is useless, that of k2 descends KL(pi || ref), that of k3 KL(ref || pi) (see
            the top of this file).
        kl_level: "token", or "sequence": half the square of the sequence's log ratio. The latter
            needs kl_estimator "k2" and cu_seqlens.
        entropy: [N] entropy of the policy's distribution at each token, for the entropy bonus and
            the statistics.
        entropy_coef: factor of the entropy bonus.
        rollout_logp: [N] log-probabilities that the sampling program computed, constant.
        rollout_correction: how to use exp(old_logp - rollout_logp) as a weight. Give `rollout_logp`
            and `rollout_correction` together, or neither.
        cu_seqlens: [B + 1] int32 or int64, from 0 to N; needed by the kinds gspo and geometric_mean
            and by every "sequence" level.
        impl: "cpp", "triton", "cuda" or "torch" (which also takes float64); by default the best one
            for the device.
    Returns:
        (loss, PolicyStats). The loss is a scalar, differentiable once (with "torch" any number of
        times) in `logp` and `entropy` only. A log ratio beyond +-20 is clamped inside the
        exponential and has no gradient through it ("reinforce" and "dro" have no exponential in
        their loss, and the one of "cispo" has no gradient anyway).
    Raises:
        ValueError: sizes or devices do not agree, a coefficient lacks its tensor, old_logp or
            cu_seqlens is missing, or an estimator or level is unknown.
        TypeError: a dtype is not supported.
        RuntimeError: `impl` cannot run on this machine, or backward is differentiated again.
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
    """Compute sum_t weights_t max((values - returns)^2, (clipped - returns)^2) / 2, where `clipped`
    is `values` limited to old_values +- clip.

    Args:
        values: [N] float32, from the trained critic.
        old_values: [N], from the critic at the rollout, constant. Read only if `clip` is given;
            otherwise may be None.
        returns, weights: [N], constant; weights as in `policy_loss`.
        clip: distance from its old value at which a value's gradient stops. If None, there is no
            bound.
        impl: "cpp", "triton", "cuda" or "torch" (which also takes float64); by default the best one
            for the device.
    Returns:
        (loss, ValueStats). The loss is a scalar, differentiable once (with "torch" any number of
        times) in `values` only.
    Raises:
        ValueError: sizes or devices do not agree, or the clip is not positive or has no old_values.
        TypeError: a dtype is not supported.
        RuntimeError: `impl` cannot run on this machine, or backward is differentiated again.
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
    """Raise if the arguments do not fit; return the name of the implementation to use."""
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


def check_objective(
    op: str, objective: PolicyObjective, correction: RolloutCorrection | None = None
) -> None:
    """Raise TypeError unless these are an objective, and a correction or None."""
    for name, given, kind in (
        ("objective", objective, PolicyObjective),
        ("rollout_correction", correction or RolloutCorrection(), RolloutCorrection),
    ):
        if not isinstance(given, kind):
            how = f"{kind.__name__}({f'kind={given!r}' if isinstance(given, str) else '...'})"
            raise TypeError(
                f"{op}: expected {name} to be a {kind.__name__}, got {given!r:.80}; write {how}"
            )


def check_policy(op: str, policy: PolicyPart, N: int) -> None:
    """Raise unless the settings of the policy part fit together. The caller checks the tensors'
    sizes before, and their dtypes after."""
    objective, correction, cu_seqlens = (
        policy.objective,
        policy.rollout_correction,
        policy.cu_seqlens,
    )
    check_objective(op, objective, correction)
    # otherwise a missing old_logp means that the policy is its own old policy
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
