"""The policy objectives and the value loss: values, gradients and every statistic from one pass over the tokens.

    d       = logp - old_logp                    ratio = exp(clamp(d, -20, 20)), without gradient beyond the clamp
    clip      l_t = max(-A ratio, -A clip(ratio, 1 - clip_low, 1 + clip_high)); where A < 0 at most -A dual_clip
    ratio     l_t = -A ratio
    reinforce l_t = -A logp
    value     v_t = max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2) / 2
    loss    = sum_t weights_t (l_t - entropy_coef H_t) + value_coef sum_t weights_t v_t

Shapes    N tokens. weights_N == 0 means masked: what the other inputs hold there is never read into anything.
Bytes     policy 16 N read (20 N with entropy) and 4 N written; value 8 N (12 N with a clip) and 4 N; forward. Backward scales: 8 N a gradient.
Numerics  float32 terms; sums over fixed blocks, then in double in block order: no atomics, the same bits every run and for any thread count.
          exp and k3 come from one expansion without cancellation: d == 0 gives ratio 1.0 and KLs 0.0 exactly. A ratio on a bound is inside.
          The explained variance is formed from deviations about block means (Chan's merge), never from E[x^2] - E[x]^2.
Source    Schulman et al. (2017), eq. 7 and 9; the dual clip is Ye et al. (2020), eq. 5; k1, k2, k3: Schulman (2020), Approximating KL divergence.
"""
from __future__ import annotations

import math

import torch
from torch import Tensor

from fusedrl.kernels import native
from fusedrl.kernels.checks import check, check_dtype
from fusedrl.kernels.dispatch import Implementations, unavailable
from fusedrl.kernels.objective import PolicyObjective, PolicyStats, ValueStats, token_weights

if unavailable("triton", "cuda") is None:
    from fusedrl.kernels import policy_loss_triton  # noqa: F401  (registers fusedrl::policy_value_loss_triton)

__all__ = ["PolicyObjective", "PolicyStats", "ValueStats", "policy_loss", "policy_loss_reference", "policy_value_loss", "token_weights", "value_loss",
           "value_loss_reference"]

_IMPLS = Implementations("policy_value_loss", cpu=("cpp", "torch", "triton"), cuda=("triton", "torch"))
_CLIP = PolicyObjective()
_CLAMP = 20.0
_POLICY_FIELDS = len(PolicyStats._fields)


# ---- reference -------------------------------------------------------------------------------------------------------
def policy_loss_reference(logp_N: Tensor, old_logp_N: Tensor | None, advantages_N: Tensor, weights_N: Tensor, *, objective: PolicyObjective = _CLIP,
                          entropy_N: Tensor | None = None, entropy_coef: float = 0.0) -> tuple[Tensor, PolicyStats]:
    """The definition, differentiable, on any device and in any float dtype (float64 is the oracle)."""
    live = weights_N != 0
    logp, advantages, weights = torch.where(live, logp_N, 0), torch.where(live, advantages_N.detach(), 0), weights_N.detach()
    old_logp = logp.detach() if old_logp_N is None else torch.where(live, old_logp_N.detach(), 0)
    d = logp - old_logp
    clamped = torch.where(d > _CLAMP, _CLAMP, torch.where(d < -_CLAMP, -_CLAMP, d))  # clamp() would give NaN a zero gradient
    ratio = clamped.exp()
    lower, upper, dual = objective.bounds
    high, low, too_far = (advantages > 0) & (ratio > upper), (advantages < 0) & (ratio < lower), (advantages < 0) & (ratio > dual)
    bounded = torch.where(high, upper, torch.where(low, lower, torch.where(too_far, dual, ratio)))
    terms = -advantages * (logp if objective.kind == "reinforce" else bounded)
    if entropy_N is not None:
        terms = terms - entropy_coef * torch.where(live, entropy_N, 0)
    loss = (weights * terms).sum()

    with torch.no_grad():
        tokens = live.sum().to(loss.dtype)
        seen, any_token = tokens.clamp(min=1), tokens > 0
        infinity = ratio.new_full((1,), math.inf)
        k3 = (clamped.expm1() - d).clamp(min=0)
        live_ratio = torch.where(live, ratio, 0)
        stats = PolicyStats(
            loss=loss.detach(),
            clip_fraction_low=low.sum() / seen,
            clip_fraction_high=high.sum() / seen,
            clip_fraction_dual=too_far.sum() / seen,
            approx_kl_k1=-d.sum() / seen,
            approx_kl_k2=(d * d).sum() / 2 / seen,
            approx_kl_k3=k3.sum() / seen,
            ratio_mean=torch.where(any_token, live_ratio.sum() / seen, 1),
            ratio_min=torch.where(any_token, torch.cat([torch.where(live, ratio, math.inf), infinity]).amin(), 1),
            ratio_max=torch.where(any_token, torch.cat([torch.where(live, ratio, -math.inf), -infinity]).amax(), 1),
            effective_sample_size=torch.where(any_token, live_ratio.sum() ** 2 / (live_ratio**2).sum(), 0),
            clamped_fraction=(d.abs() > _CLAMP).sum() / seen,
            entropy=torch.zeros_like(tokens) if entropy_N is None else torch.where(live, entropy_N, 0).sum() / seen,
            tokens=tokens,
        )
    return loss, stats


def value_loss_reference(values_N: Tensor, old_values_N: Tensor | None, returns_N: Tensor, weights_N: Tensor, *,
                         clip: float | None = None) -> tuple[Tensor, ValueStats]:
    """The definition, differentiable, on any device and in any float dtype (float64 is the oracle)."""
    live = weights_N != 0
    values, returns, weights = torch.where(live, values_N, 0), torch.where(live, returns_N.detach(), 0), weights_N.detach()
    squares = (values - returns) ** 2
    clipped = torch.zeros_like(live)
    if clip is not None and old_values_N is not None:
        old = torch.where(live, old_values_N.detach(), 0)
        bounded = torch.where(values > old + clip, old + clip, torch.where(values < old - clip, old - clip, values))
        clipped = (bounded != values) & ((bounded - returns) ** 2 > squares)
        squares = torch.where(clipped, (bounded - returns) ** 2, squares)
    loss = (weights * squares).sum() / 2

    with torch.no_grad():
        tokens = live.sum().to(loss.dtype)
        seen = tokens.clamp(min=1)
        return_mean = returns.sum() / seen
        spread, unexplained = (_squared_deviations(torch.where(live, x - x.sum() / seen, 0), seen) for x in (returns, returns - values))
        varies = spread > seen * (torch.finfo(torch.float32).eps * return_mean) ** 2
        stats = ValueStats(
            loss=loss.detach(),
            clip_fraction=clipped.sum() / seen,
            explained_variance=torch.where(varies, 1 - unexplained / spread, 0),
            value_mean=values.sum() / seen,
            return_mean=return_mean,
            tokens=tokens,
        )
    return loss, stats


def _squared_deviations(deviations_N: Tensor, seen: Tensor) -> Tensor:
    """Their sum, from deviations about a mean that was rounded."""
    return deviations_N.square().sum() - deviations_N.sum() ** 2 / seen


# ---- custom op: what torch.compile sees --------------------------------------------------------------------------------
if native.capability:
    @torch.library.register_fake("fusedrl::policy_value_loss_forward")
    def _(logp: Tensor | None, old_logp: Tensor | None, advantages: Tensor | None, weights: Tensor, entropy: Tensor | None, values: Tensor | None,
          *rest: object) -> tuple[Tensor, ...]:
        N = weights.numel()
        sizes = ((), (_POLICY_FIELDS + len(ValueStats._fields),), (0 if logp is None else N,), (0 if values is None else N,))
        return tuple(weights.new_empty(size) for size in sizes)


def _fused(impl: str, logp: Tensor | None, old_logp: Tensor | None, advantages: Tensor | None, weights: Tensor, entropy: Tensor | None,
           values: Tensor | None, old_values: Tensor | None, returns: Tensor | None, objective: PolicyObjective, entropy_coef: float,
           value_clip: float | None, value_coef: float) -> tuple[Tensor, PolicyStats, ValueStats]:
    op = torch.ops.fusedrl.policy_value_loss_triton if impl == "triton" else torch.ops.fusedrl.policy_value_loss
    old_logp = logp if old_logp is None else old_logp
    clip, old_values = (math.inf, None) if value_clip is None else (value_clip, old_values)
    loss, stats, *_ = op(logp, old_logp, advantages, weights, entropy, values, old_values, returns, objective.kind == "reinforce", *objective.bounds,
                         entropy_coef, clip, value_coef)
    each = stats.unbind()
    return loss, PolicyStats(*each[:_POLICY_FIELDS]), ValueStats(*each[_POLICY_FIELDS:])


# ---- public ------------------------------------------------------------------------------------------------------------
def policy_value_loss(logp: Tensor, old_logp: Tensor | None, advantages: Tensor, weights: Tensor, values: Tensor, old_values: Tensor | None,
                      returns: Tensor, *, objective: PolicyObjective = _CLIP, value_clip: float | None = None, value_coef: float = 0.1,
                      entropy: Tensor | None = None, entropy_coef: float = 0.0, impl: str | None = None) -> tuple[Tensor, PolicyStats, ValueStats]:
    """`policy_loss` + value_coef * `value_loss` over the same tokens and weights, in one pass.

    Args: those of the two functions; `value_clip` is the value loss's `clip`.
    Returns:
        (loss, PolicyStats, ValueStats); each statistics' `loss` is its own part, the value's without the coefficient.
    Raises: as the two functions.
    """
    op = "policy_value_loss"
    chosen = _checked(op, impl, objective, value_clip, entropy_coef, logp=logp, old_logp=old_logp, advantages=advantages, weights=weights,
                      entropy=entropy, values=values, old_values=old_values, returns=returns)
    if chosen == "torch":
        policy, policy_stats = policy_loss_reference(logp, old_logp, advantages, weights, objective=objective, entropy_N=entropy,
                                                     entropy_coef=entropy_coef)
        value, value_stats = value_loss_reference(values, old_values, returns, weights, clip=value_clip)
        return policy + value_coef * value, policy_stats, value_stats
    return _fused(chosen, logp, old_logp, advantages, weights, entropy, values, old_values, returns, objective, entropy_coef, value_clip, value_coef)


def policy_loss(logp: Tensor, old_logp: Tensor | None, advantages: Tensor, weights: Tensor, *, objective: PolicyObjective = _CLIP,
                entropy: Tensor | None = None, entropy_coef: float = 0.0, impl: str | None = None) -> tuple[Tensor, PolicyStats]:
    """sum_t weights_t (policy term_t - entropy_coef * entropy_t).

    Args:
        logp: [N] float32 log-probabilities of the tokens under the policy that is trained.
        old_logp: [N], under the policy of the last rollout or scoring, constant. None, for kind "reinforce" only: the policy is that
            policy, and the ratio statistics say so (ratio 1, KL 0). "reinforce" uses it for the statistics alone.
        advantages: [N], constant.
        weights: [N], constant, as from `token_weights`; 0 means masked: the token counts nowhere, and may be NaN in every other input.
        objective: the policy term.
        entropy: [N] of the policy's distribution at each token, for the bonus and the statistics. entropy_coef: the bonus's factor.
        impl: "cpp", "triton" or "torch" (which also takes float64); by default the best one for the device.
    Returns:
        (loss, PolicyStats): a scalar, differentiable once (with "torch" any number of times) in `logp` and `entropy` only. A log ratio
        beyond +-20 is cut inside the exponential and has no gradient there ("reinforce" has no exponential in its loss).
    Raises:
        ValueError: sizes or devices that do not agree, an `entropy_coef` without entropy, a missing old_logp. TypeError: dtypes.
        RuntimeError: `impl` cannot run here, or a double backward.
    """
    op = "policy_loss"
    chosen = _checked(op, impl, objective, None, entropy_coef, logp=logp, old_logp=old_logp, advantages=advantages, weights=weights, entropy=entropy)
    if chosen == "torch":
        return policy_loss_reference(logp, old_logp, advantages, weights, objective=objective, entropy_N=entropy, entropy_coef=entropy_coef)
    loss, stats, _ = _fused(chosen, logp, old_logp, advantages, weights, entropy, None, None, None, objective, entropy_coef, None, 0.0)
    return loss, stats


def value_loss(values: Tensor, old_values: Tensor | None, returns: Tensor, weights: Tensor, *, clip: float | None = None,
               impl: str | None = None) -> tuple[Tensor, ValueStats]:
    """sum_t weights_t max((values - returns)^2, (values clipped to within `clip` of old_values - returns)^2) / 2.

    Args:
        values: [N] float32, of the critic that is trained. old_values: [N], of the critic at the rollout, constant; not read, and may be
            None, without a clip. returns, weights: [N], constant; weights as in `policy_loss`.
        clip: how far a value may move from the old one before the gradient stops; None: no bound.
        impl: "cpp", "triton" or "torch" (which also takes float64); by default the best one for the device.
    Returns:
        (loss, ValueStats): a scalar, differentiable once (with "torch" any number of times) in `values` only.
    Raises:
        ValueError: sizes or devices that do not agree, a clip that is not positive or has no old_values. TypeError: dtypes.
        RuntimeError: `impl` cannot run here, or a double backward.
    """
    chosen = _checked("value_loss", impl, _CLIP, clip, 0.0, values=values, old_values=old_values, returns=returns, weights=weights)
    if chosen == "torch":
        return value_loss_reference(values, old_values, returns, weights, clip=clip)
    loss, _, stats = _fused(chosen, None, None, None, weights, None, values, old_values, returns, _CLIP, 0.0, clip, 1.0)
    return loss, stats


def _checked(op: str, impl: str | None, objective: PolicyObjective, clip: float | None, entropy_coef: float, **tensors: Tensor | None) -> str:
    """Refuse what cannot be served; the name of the implementation that serves the rest."""
    for name, tensor in tensors.items():
        if tensor is None and name not in ("entropy", "old_logp", "old_values"):
            raise TypeError(f"{op}: expected a tensor for {name}, got None")
    check(op, {name: (tensor, "N") for name, tensor in tensors.items()})
    if "logp" in tensors and tensors["old_logp"] is None and objective.kind != "reinforce":
        raise ValueError(f"{op}: expected old_logp for kind {objective.kind!r}, got None; on-policy, pass logp.detach()")
    if entropy_coef and tensors.get("entropy") is None:
        raise ValueError(f"{op}: expected entropy with entropy_coef {entropy_coef!r}, got None")
    if clip is not None and (not clip > 0 or tensors["old_values"] is None):
        given = "no old_values" if tensors["old_values"] is None else "old_values"
        raise ValueError(f"{op}: expected a clip > 0 and old_values with it, or no clip, got clip {clip!r} and {given}")
    device = next(tensor.device for tensor in tensors.values() if tensor is not None)
    chosen = _IMPLS.choose(device, impl)
    for name, tensor in tensors.items():
        check_dtype(op, name, tensor, (torch.float32, torch.float64) if chosen == "torch" else (torch.float32,))
    return chosen
