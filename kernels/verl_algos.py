"""verl's functions of verl.trainer.ppo.core_algos, by their names and argument orders, computed by
this package's ops.

    advantages   compute_gae_advantage_return, compute_grpo_outcome_advantage,
                 compute_grpo_vectorized_outcome_advantage, compute_rloo_outcome_advantage,
                 compute_rloo_vectorized_outcome_advantage,
                 compute_reinforce_plus_plus_outcome_advantage,
                 compute_reinforce_plus_plus_baseline_outcome_advantage,
                 compute_remax_outcome_advantage
    losses       compute_policy_loss, compute_policy_loss_vanilla, _gspo, _gpg, _sapo, _cispo,
                 _geo_mean, compute_value_loss, compute_entropy_loss
    the rest     agg_loss, kl_penalty, kl_penalty_forward, compute_rewards

Inputs and outputs are verl's, with these differences. Results at masked tokens are 0, where verl
leaves what its sums happen to hold, and masked tokens may be NaN. Results are float32 (float64 for
float64). A group whose scores are all equal has advantages of exactly 0. In gspo and geo_mean log
ratios beyond 20 are clamped (verl: 10, and not at all). Where a rollout weight is 0, that token is
not in the metrics. GRPO and its like return one tensor twice, as verl does.

Shapes    B sequences, T tokens: everything per token is [B, T], `response_mask` is 1 where a token
          counts. `index` [B] names the prompt of each sequence: an array of any values.
Source    verl 0.9.1 (verl/trainer/ppo/core_algos.py). It is not imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusedrl.kernels.adapters import entropy_from_logits
from fusedrl.kernels.gae import discounted_returns, gae
from fusedrl.kernels.kl import MAX_LOG_RATIO, token_kl
from fusedrl.kernels.normalize import group_normalize, masked_whiten
from fusedrl.kernels.objective import PolicyObjective, PolicyStats
from fusedrl.kernels.policy_loss import policy_loss, value_loss

_KL = {
    "kl": "k1",
    "k1": "k1",
    "abs": "abs",
    "mse": "k2",
    "k2": "k2",
    "low_var_kl": "k3",
    "k3": "k3",
}
_KL_BOUND = 10.0  # of k3
_MODES = (
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "seq-mean-token-mean",
)
_REINFORCE = PolicyObjective(kind="reinforce")


def _impl(x: Tensor) -> str | None:
    return "torch" if x.dtype == torch.float64 else None  # only torch takes float64


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---- advantages ----------------------------------------------------------------------------------
def compute_gae_advantage_return(
    token_level_rewards: Tensor,
    values: Tensor,
    response_mask: Tensor,
    gamma: float | Tensor,
    lam: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """Return (advantages, returns) of GAE, the advantages whitened over all unmasked tokens."""
    mask = response_mask != 0
    advantages, returns = gae(
        token_level_rewards,
        values,
        mask=mask,
        gamma=float(gamma),
        lam=float(lam),
        impl=_impl(token_level_rewards),
    )
    return _whitened(advantages, mask), returns


def compute_grpo_outcome_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Sequence[Any] | np.ndarray,
    epsilon: float = 1e-6,
    norm_adv_by_std_in_grpo: bool = True,
    config: Any = None,
) -> tuple[Tensor, Tensor]:
    """Return GRPO's advantages twice: a score less its group's mean, divided by the group's
    standard deviation (unless told not to). A score that is alone in its group keeps its value."""
    scores, ids, alone = _groups(token_level_rewards, index)
    method = "grpo" if norm_adv_by_std_in_grpo else "dr_grpo"
    found = group_normalize(scores, ids, method=method, eps=epsilon, impl=_impl(scores)).advantages
    single = scores / (1 + epsilon) if norm_adv_by_std_in_grpo else scores
    return _spread(torch.where(alone, single, found), response_mask)


compute_grpo_vectorized_outcome_advantage = compute_grpo_outcome_advantage


def compute_rloo_outcome_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Sequence[Any] | np.ndarray,
    epsilon: float = 1e-6,
    config: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Return RLOO's advantages twice: a score less the mean of the others of its group. A score
    that is alone keeps its value."""
    scores, ids, alone = _groups(token_level_rewards, index)
    found = group_normalize(scores, ids, method="rloo", impl=_impl(scores)).advantages
    return _spread(torch.where(alone, scores, found), response_mask)


def compute_rloo_vectorized_outcome_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Sequence[Any] | np.ndarray,
    epsilon: float = 1e-6,
    config: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Return RLOO's advantages twice; 0 for a score that is alone in its group."""
    scores, ids, _ = _groups(token_level_rewards, index)
    found = group_normalize(scores, ids, method="rloo", impl=_impl(scores)).advantages
    return _spread(found, response_mask)


def compute_reinforce_plus_plus_outcome_advantage(
    token_level_rewards: Tensor, response_mask: Tensor, config: Any = None, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Return (advantages, returns): discounted rewards to go, and the same whitened. `config` has
    gamma."""
    mask = response_mask != 0
    returns = discounted_returns(
        token_level_rewards,
        mask=mask,
        gamma=float(config.gamma),
        impl=_impl(token_level_rewards),
    )
    return _whitened(returns, mask), returns


def compute_reinforce_plus_plus_baseline_outcome_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Sequence[Any] | np.ndarray,
    epsilon: float = 1e-6,
    config: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Return the advantages of REINFORCE++ with a baseline twice: a score less its group's mean,
    whitened over all tokens."""
    scores, ids, alone = _groups(token_level_rewards, index)
    found = group_normalize(scores, ids, method="dr_grpo", impl=_impl(scores)).advantages
    spread, _ = _spread(torch.where(alone, scores, found), response_mask)
    whitened = _whitened(spread, response_mask != 0)
    return whitened, whitened


def compute_remax_outcome_advantage(
    token_level_rewards: Tensor,
    reward_baselines: Tensor,
    response_mask: Tensor,
    config: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Return (advantages, returns) of ReMax: rewards to go, less the greedy completion's reward
    [B] in the advantages."""
    mask = response_mask != 0
    returns = discounted_returns(token_level_rewards, mask=mask, impl=_impl(token_level_rewards))
    return torch.where(mask, returns - reward_baselines[:, None], 0), returns


def _groups(rewards_BT: Tensor, index: Sequence[Any] | np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """Return scores [B], group ids [B], and whether a score is alone in its group."""
    _, ids, counts = np.unique(np.asarray(index), return_inverse=True, return_counts=True)
    scores = _wide(rewards_BT.detach()).sum(-1)
    alone = torch.from_numpy(counts[ids.reshape(-1)] == 1)
    return scores, torch.from_numpy(ids.reshape(-1)).to(scores.device), alone.to(scores.device)


def _spread(advantages_B: Tensor, response_mask: Tensor) -> tuple[Tensor, Tensor]:
    spread = advantages_B[:, None] * response_mask
    return spread, spread


def _whitened(x: Tensor, mask: Tensor) -> Tensor:
    return masked_whiten(x, mask, unbiased=True, impl=_impl(x))


# ---- how tokens are added up ---------------------------------------------------------------------
def agg_loss(
    loss_mat: Tensor,
    loss_mask: Tensor,
    loss_agg_mode: str,
    dp_size: int = 1,
    batch_num_tokens: int | None = None,
    global_batch_size: int | None = None,
    loss_scale_factor: int | None = None,
) -> Tensor:
    """Return the sum of the unmasked losses [B, T] with the weights of an aggregation, a scalar
    with gradient.

    Raises:
        ValueError: an unknown mode, or with several processes no size of the global batch.
    """
    weights = _weights(
        loss_mask,
        loss_agg_mode,
        dp_size,
        batch_num_tokens,
        global_batch_size,
        loss_scale_factor,
        dtype=torch.promote_types(loss_mat.dtype, torch.float32),
    )
    return torch.where(weights != 0, loss_mat, 0).mul(weights).sum()


def _weights(
    mask: Tensor,
    mode: str,
    dp_size: int = 1,
    batch_num_tokens: int | None = None,
    global_batch_size: int | None = None,
    loss_scale_factor: int | None = None,
    *,
    dtype: torch.dtype,
) -> Tensor:
    """Return the weight [B, T] of every token."""
    if mode not in _MODES:
        raise ValueError(f"Invalid loss_agg_mode: {mode}: expected one of {', '.join(_MODES)}")
    mask = mask.to(dtype)
    if mode == "token-sum":
        return mask * dp_size
    by_tokens = mode == "token-mean"
    count = batch_num_tokens if by_tokens else global_batch_size
    if count is None and dp_size > 1:
        name = "(global) batch_num_tokens" if by_tokens else "global_batch_size"
        raise ValueError(f"{name} is required when dp_size > 1")
    own = mask.sum(-1, keepdim=True)
    if count is None:
        total = mask.sum() if by_tokens else (own > 0).sum()
        # a batch without tokens has no loss; verl's is NaN
        weights = mask * dp_size / total.clamp(min=1)
    else:
        weights = mask * dp_size / count
    if mode == "seq-mean-token-mean":
        return weights / (own + 1e-8)
    if mode == "seq-mean-token-sum-norm":
        return weights / (mask.shape[-1] if loss_scale_factor is None else loss_scale_factor)
    return weights


# ---- losses --------------------------------------------------------------------------------------
def compute_policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    cliprange: float | None = None,
    cliprange_low: float | None = None,
    cliprange_high: float | None = None,
    clip_ratio_c: float = 3.0,
    loss_agg_mode: str = "token-mean",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (loss, clip fraction, KL of old and new, fraction beyond the dual clip)."""
    low = cliprange if cliprange_low is None else cliprange_low
    high = cliprange if cliprange_high is None else cliprange_high
    loss, stats = _loss(
        PolicyObjective(kind="clip", clip_low=low, clip_high=high, dual_clip=clip_ratio_c),
        old_log_prob,
        log_prob,
        advantages,
        response_mask,
        loss_agg_mode,
    )
    return loss, _clipped(stats), stats.approx_kl_k1, stats.clip_fraction_dual


def compute_policy_loss_vanilla(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """Return (loss, metrics) of the clipped objective with a dual clip. `config` has clip_ratio,
    clip_ratio_low, clip_ratio_high, clip_ratio_c and global_batch_info, as verl's ActorConfig."""
    low, high = _clips(config)
    kind = PolicyObjective(
        kind="clip", clip_low=low, clip_high=high, dual_clip=config.get("clip_ratio_c", 3.0)
    )
    tensors = (old_log_prob, log_prob, advantages, response_mask)
    loss, stats = _loss(kind, *tensors, loss_agg_mode, config, rollout_is_weights)
    return loss, _metrics(stats, _clipped(stats))


def compute_policy_loss_gspo(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "seq-mean-token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """Return (loss, metrics) of the clipped objective with one ratio per sequence. A sequence's
    gradient is shared out evenly over its tokens, which is verl's where advantages and weights are
    the same for all of them."""
    low, high = _clips(config)
    tensors = (old_log_prob, log_prob, advantages, response_mask)
    loss, stats = _loss(
        PolicyObjective(kind="gspo", clip_low=low, clip_high=high),
        *tensors,
        loss_agg_mode,
        config,
        rollout_is_weights,
    )
    return loss, _metrics(stats, _clipped(stats))


def compute_policy_loss_gpg(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """Return (loss, {}) of the policy gradient without ratio and clip."""
    tensors = (None, log_prob, advantages, response_mask)
    loss, _ = _loss(_REINFORCE, *tensors, loss_agg_mode, config, rollout_is_weights)
    return loss, {}


def compute_policy_loss_sapo(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "seq-mean-token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """Return (loss, metrics) of the soft gate with `config.tau_pos` and `config.tau_neg`. Whatever
    `loss_agg_mode` says, it is seq-mean-token-mean, as in verl."""
    loss, stats = _loss(
        PolicyObjective(
            kind="sapo", tau_positive=float(config.tau_pos), tau_negative=float(config.tau_neg)
        ),
        old_log_prob,
        log_prob,
        advantages,
        response_mask,
        "seq-mean-token-mean",
        config,
        rollout_is_weights,
    )
    return loss, _metrics(stats, torch.zeros(()))


def compute_policy_loss_cispo(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """Return (loss, metrics) of the policy gradient weighted by ratios that are clipped on both
    sides and have no gradient."""
    low, high = _clips(config)
    d = torch.where(response_mask != 0, _wide(log_prob.detach() - old_log_prob), 0)
    ratio = d.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    clipped = ratio.clamp(1 - low, 1 + high)
    tensors = (old_log_prob, log_prob, advantages * clipped, response_mask)
    loss, stats = _loss(_REINFORCE, *tensors, loss_agg_mode, config, rollout_is_weights)
    count = (response_mask != 0).sum().clamp(min=1)
    return loss, _metrics(stats, (ratio != clipped).sum() / count, dual=False)


def compute_policy_loss_geo_mean(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """Return (loss, metrics) of the clipped geometric mean of a sequence's ratios times the mean
    of its advantages, a mean over all B sequences whatever `loss_agg_mode` says."""
    low, high = _clips(config)
    mask = _wide(response_mask != 0)
    own = mask.sum(-1, keepdim=True) + 1e-8
    mean = torch.where(mask != 0, advantages, 0).sum(-1, keepdim=True) / own
    weights = mask / own / len(mask)
    if rollout_is_weights is not None:
        logs = torch.where(mask != 0, (rollout_is_weights + 1e-10).log(), 0)
        weights = weights * (logs.sum(-1, keepdim=True) / own).exp()
    loss, stats = _weighted(
        PolicyObjective(kind="geometric_mean", clip_low=low, clip_high=high),
        old_log_prob,
        log_prob,
        mean.expand(mask.shape),
        weights,
    )
    d = torch.where(mask != 0, log_prob.detach() - old_log_prob, 0)
    beyond, count = (d != d.clamp(-low, high)) & (mask != 0), mask.sum() + 1e-8
    over, under = ((beyond & side).sum() / count for side in (advantages > 0, advantages < 0))
    return loss, _metrics(stats, over) | {"actor/pg_clipfrac_lower": under.item()}


def _clips(config: Any) -> tuple[float, float]:
    if config is None:
        raise ValueError("expected verl's ActorConfig as config, got None")
    return (
        config.clip_ratio if config.clip_ratio_low is None else config.clip_ratio_low,
        config.clip_ratio if config.clip_ratio_high is None else config.clip_ratio_high,
    )


def _loss(
    objective: PolicyObjective,
    old_log_prob: Tensor | None,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    mode: str,
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, PolicyStats]:
    info: dict[str, Any] = {} if config is None else dict(config.global_batch_info)
    weights = _weights(
        response_mask, mode, **info, dtype=torch.promote_types(log_prob.dtype, torch.float32)
    )
    if rollout_is_weights is not None:
        weights = torch.where(weights != 0, weights * rollout_is_weights, 0)
    return _weighted(objective, old_log_prob, log_prob, advantages, weights)


def _flat(x: Tensor) -> Tensor:
    return _wide(x).reshape(-1)


def _weighted(
    objective: PolicyObjective,
    old_log_prob: Tensor | None,
    log_prob: Tensor,
    advantages: Tensor,
    weights: Tensor,
) -> tuple[Tensor, PolicyStats]:
    B, T = log_prob.shape
    logp = _flat(log_prob)
    ends = T * torch.arange(B + 1, device=log_prob.device)
    return policy_loss(
        logp,
        None if old_log_prob is None else _flat(old_log_prob),
        _flat(advantages),
        _flat(weights),
        objective=objective,
        cu_seqlens=ends if objective.by_sequence else None,
        impl=_impl(logp),
    )


def _clipped(stats: PolicyStats) -> Tensor:
    return stats.clip_fraction_low + stats.clip_fraction_high


def _metrics(stats: PolicyStats, clipped: Tensor, dual: bool = True) -> dict[str, float]:
    return {
        "actor/pg_clipfrac": clipped.item(),
        "actor/ppo_kl": stats.approx_kl_k1.item(),
        "actor/pg_clipfrac_lower": stats.clip_fraction_dual.item() if dual else 0.0,
    }


def compute_value_loss(
    vpreds: Tensor,
    returns: Tensor,
    values: Tensor,
    response_mask: Tensor,
    cliprange_value: float,
    loss_agg_mode: str = "token-mean",
    dp_size: int = 1,
    batch_num_tokens: int | None = None,
    global_batch_size: int | None = None,
    loss_scale_factor: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (loss, clip fraction) of values that may move `cliprange_value` from the old ones."""
    wide = torch.promote_types(vpreds.dtype, torch.float32)
    weights = _weights(
        response_mask,
        loss_agg_mode,
        dp_size,
        batch_num_tokens,
        global_batch_size,
        loss_scale_factor,
        dtype=wide,
    )
    tensors = (x.to(wide).reshape(-1) for x in (vpreds, values, returns, weights))
    loss, stats = value_loss(*tensors, clip=cliprange_value, impl=_impl(vpreds))
    return loss, stats.clip_fraction


def compute_entropy_loss(
    logits: Tensor, response_mask: Tensor, loss_agg_mode: str = "token-mean"
) -> Tensor:
    """Return the aggregated entropy of logits [B, T, V], a scalar with gradient."""
    return agg_loss(entropy_from_logits(logits), response_mask, loss_agg_mode)


# ---- KL ------------------------------------------------------------------------------------------
def kl_penalty(logprob: Tensor, ref_logprob: Tensor, kl_penalty: str) -> Tensor:
    """Return the estimate of the KL at every token, differentiable in `logprob` alone.

    Args:
        kl_penalty: kl or k1, abs, mse or k2, low_var_kl or k3 (at most 10). With a + behind it, the
            value is the estimator's and the gradient that of k2.
    Raises:
        ValueError: another name.
    """
    return _with_slope(logprob, ref_logprob, kl_penalty)


def _with_slope(logprob: Tensor, ref_logprob: Tensor, estimator: str) -> Tensor:
    name = estimator.removesuffix("+")
    value = kl_penalty_forward(logprob.detach(), ref_logprob.detach(), name)
    d = (logprob - ref_logprob).detach()
    kind = "k2" if estimator.endswith("+") else _KL[name]
    if kind == "k3":
        slope = torch.where((d.abs() <= MAX_LOG_RATIO) & (value < _KL_BOUND), -torch.expm1(-d), 0)
    else:
        slope = {"k1": torch.ones_like(d), "abs": d.sign(), "k2": d}[kind]
    return value + (logprob - logprob.detach()) * slope


def kl_penalty_forward(logprob: Tensor, ref_logprob: Tensor, kl_penalty: str) -> Tensor:
    """Return the values of `kl_penalty`, without gradient unless `logprob` has one."""
    if kl_penalty not in _KL:
        raise ValueError(f"kl_penalty: expected one of {', '.join(_KL)}, got {kl_penalty!r}")
    if logprob.requires_grad:
        return _with_slope(logprob, ref_logprob, kl_penalty)
    wide = torch.promote_types(logprob.dtype, torch.float32)
    estimator = _KL[kl_penalty]
    value = token_kl(
        logprob.to(wide), ref_logprob.to(wide), estimator=estimator, impl=_impl(logprob)
    )
    return value.clamp(max=_KL_BOUND) if estimator == "k3" else value


def compute_rewards(
    token_level_scores: Tensor, old_log_prob: Tensor, ref_log_prob: Tensor, kl_ratio: float
) -> Tensor:
    """Return the scores less kl_ratio times k1 at every token."""
    return token_level_scores - kl_ratio * kl_penalty(old_log_prob, ref_log_prob, "k1")


NAMES = tuple(name for name in globals() if name.startswith(("compute_", "agg_", "kl_penalty")))
