"""How much each token of a rollout is worth: the advantage functions behind ALGORITHMS, and those
that users register.

    r_t = -coef k1_t at every token, plus the clipped score at the last
            (coef 0 unless the KL is placed in the reward)
    R   = sum_t r_t = score - coef KL                                        of a completion

A completion that was cut off, where loss.bootstrap_truncated is set, has V(s_{T+1}) behind its last
token in place of the score: an end that the limit of length made is not one of the task (Pardo et
al., 2018, Time limits in reinforcement learning). Kept beside V, the score would be paid twice, and
a constant in it would reward running into the limit. What accrued at single tokens stays.

One file: each advantage is a few lines over the same `Signals`.

A function takes `Signals` and returns advantages [N], or (advantages, returns) where a critic is
trained on the returns. An advantage that is the same for all tokens of a completion is
computed from R and spread by `per_token`; one that looks ahead is computed from r_t. The kernels do
the arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TypeVar

import torch
from torch import Tensor

from fusedrl.engine.base.blame import blame, per_token, place_of
from fusedrl.engine.base.errors import ConfigError
from fusedrl.engine.base.packing import PackedBatch
from fusedrl.engine.config import PolicyConfig, TurnsConfig
from fusedrl.engine.config.algorithms import ADVANTAGES, Needs, resolve
from fusedrl.engine.policy.chance import beyond_chance
from fusedrl.engine.policy.turn_credit import of_turns, turn_numbers
from fusedrl.kernels.gae import (
    ShapedGAE,
    discounted_returns,
    gae,
    k_step_advantages,
    shaped_gae,
)
from fusedrl.kernels.kl import token_kl
from fusedrl.kernels.normalize import group_normalize, masked_whiten
from fusedrl.kernels.objective import token_weights

GRPO_EPS = 1e-4  # added to a group's standard deviation, as in TRL


@dataclass(frozen=True)
class Signals:
    """Inputs of an advantage function. N tokens, B completions.

    Attributes:
        batch: batch with the columns scores and group_ids [B]. Depending on the algorithm, it also
            has old_logp, ref_logp and values [N], and greedy_scores [B]. Completions of one prompt
            have the same group id; a group may have any size, since invalid completions are left
            out.
        gamma, lam, k: discount, lambda of GAE, number of rewards in a k-step advantage.
        kl_coef: coefficient of the KL in the reward.
        future_kl_coef: coefficient of the KL of the tokens to come, which `estimate` subtracts.
        score_clip: scores are clipped to +-score_clip.
        baseline: mean of all returns of earlier steps.
        reward_weights: weight of each of `batch.reward_parts`; None: 1 each.
        lam_critic: lambda of the returns that a critic learns; None: as for the advantages.
        lam_alpha: alpha of a lambda for each completion (`lam_of_length`); None: `lam`.
        turns: what the turns of a trajectory are credited with.
        level: mean return of the first rollout. `settled` computes baseline and level for the first
            rollout itself, so that a constant added to all rewards changes no advantage. If rewards
            have moved since then, `settled` corrects both; they are then tensors [B].
    """

    batch: PackedBatch
    gamma: float = 1.0
    lam: float = 0.95
    k: int = 5
    kl_coef: float = 0.0
    future_kl_coef: float = 0.0
    score_clip: float | None = None
    baseline: float | Tensor = 0.0
    level: float | Tensor = 0.0
    reward_weights: tuple[float, ...] | None = None
    lam_critic: float | None = None
    lam_alpha: float | None = None
    turns: TurnsConfig = field(default_factory=TurnsConfig)

    @classmethod
    def of(
        cls,
        config: PolicyConfig,
        batch: PackedBatch,
        kl_coef: float,
        baseline: float,
        level: float = 0.0,
    ) -> Signals:
        """Build the signals from a step's batch. `kl_coef` is the current KL coefficient, whether
        the KL is placed in the reward or in the loss."""
        loss, kl = config.loss, config.kl
        return cls(
            batch,
            loss.gamma,
            loss.lam,
            loss.k,
            kl_coef if kl.placement == "reward" else 0.0,
            kl_coef if kl.level == "future" else 0.0,
            config.score_clip or None,
            baseline,
            level,
            # 1: of an environment, and of penalties
            (
                *(config.reward_weights or (1.0,) * len(config.reward)),
                *((1.0,) if config.plays else ()),
                1.0,
            ),
            loss.lam_critic,
            loss.lam_alpha,
            config.turns,
        )

    def settled(self, first: bool = True) -> tuple[Signals, float]:
        """Return the signals with baseline, level and values corrected to be right on average, and
        the overall correction of the values.

        The level is corrected by the mean of R - level, the baseline by the mean of R - baseline.
        Values are corrected by the mean over completions of the mean of G_t - V_t over
        their tokens. Values that are too low on average would make the last token of every
        completion look like a gain, whatever the token is. Values that are too high would make it
        look like a loss, and the critic's own training steps are too short to mend this at once.
        Completions whose end is bootstrapped say nothing of this: their G moves with V.

        The first rollout applies the whole correction. Later rollouts apply only the
        part of it that chance does not explain (`beyond_chance`), so a real shift of all rewards is
        still followed at once. Each of their
        completions is corrected by the completions of the other prompts: a baseline that depends on
        the completion itself would bias its gradient.
        """
        batch, short, level, baseline = self.batch, 0.0, self.level, self.baseline
        prompts_B = (
            torch.arange(batch.num_sequences, device=batch.device)
            if batch.group_ids is None
            else batch.group_ids
        )

        def off(x_B: Tensor, answered_B: Tensor) -> tuple[float, Tensor]:
            if first:
                mean = x_B[answered_B].mean().item() if answered_B.any() else 0.0
                return mean, torch.full_like(x_B, mean)
            return beyond_chance(x_B, prompts_B, answered_B)

        if batch.values is not None:
            weights_N = token_weights(
                batch.action_mask, "sequence_mean_token_mean", cu_seqlens=batch.cu_seqlens
            ).double()
            short_B, weight_B = self._sums(weights_N * self._targets[0]), self._sums(weights_N)
            told_B = weight_B > 0 if batch.cut_off is None else (weight_B > 0) & ~batch.cut_off
            short, each_B = off(short_B / weight_B.clamp(min=1e-30), told_B)
            each_N = torch.repeat_interleave(
                each_B, batch.cu_seqlens.long().diff(), output_size=batch.num_tokens
            )
            columns = {
                name: x
                for name in ("values", "rollout_values")
                if (x := getattr(batch, name)) is not None
            }
            batch = batch.with_columns(
                **{
                    name: torch.where(batch.positions > 0, x_N + each_N, x_N).to(x_N.dtype)
                    for name, x_N in columns.items()
                }
            )
            if batch.last_values is not None:
                after_B = batch.last_values + each_B.to(batch.last_values.dtype)
                batch = batch.with_columns(
                    last_values=torch.where(batch.column("cut_off"), after_B, 0.0)
                )
        totals_B = self.totals.double()
        everyone_B = torch.ones_like(totals_B, dtype=torch.bool)
        if first:
            level = baseline = off(totals_B, everyone_B)[0]
        else:
            level, baseline = (
                (start + off(totals_B - start, everyone_B)[1]).to(self.totals.dtype)
                for start in (level, baseline)
            )
        return replace(self, batch=batch, baseline=baseline, level=level), short

    def unit(self, before: float | None, first: bool = False) -> float | None:
        """Return the unit of values after this rollout: the standard deviation of G over all
        actions, without the completion that adds most to it.

        The unit changes by at most a factor of 2 from `before`, the previous unit. If all returns
        are equal, it stays `before`. With fewer than four completions, the unit is the root mean
        square of G - V. In the first rollout (`first`), V is the mean of G itself, so fewer than
        four completions leave the unit at `before`.
        """
        mask_N, few = self.batch.action_mask, self.batch.num_sequences < 4
        if not mask_N.any() or (few and first):
            return before
        returns_N = torch.where(mask_N, self._targets[1], 0.0).double()
        if few:
            found = self._targets[0][mask_N].double().square().mean().sqrt().item()
        else:
            count_B, mean = self.lengths.double(), returns_N.sum() / mask_N.sum()
            off_N = torch.where(mask_N, returns_N - mean, 0.0)
            count, total, square = (
                x.sum() - x for x in (count_B, self._sums(off_N), self._sums(off_N.square()))
            )  # sums over all completions but one
            variance_B = square / count.clamp(min=1) - (total / count.clamp(min=1)).square()
            found = math.sqrt(max(0.0, variance_B.min().item()))
        if not found > 1e-6 * max(returns_N.abs().max().item(), 1e-30):  # rounding
            return before
        return found if before is None else min(2 * before, max(before / 2, found))

    def _sums(self, x_N: Tensor) -> Tensor:
        """Return [B] sums over completions, added in a fixed order."""
        return (
            torch.segment_reduce(x_N, "sum", lengths=self.batch.cu_seqlens.long().diff())
            if len(x_N)
            else x_N
        )

    @cached_property
    def _targets(self) -> tuple[Tensor, Tensor]:
        """(G - V, G) [N]."""
        return _learned_baseline(self)

    @cached_property
    def shaped(self) -> ShapedGAE:
        """Return GAE and its intermediate results, not whitened. Without a critic, values are 0."""
        batch = self.batch
        zeros_N = torch.zeros(batch.num_tokens, device=batch.device)
        old_N, values_N = (
            zeros_N if column is None else column for column in (batch.old_logp, batch.values)
        )
        if self.kl_coef and (batch.old_logp is None or batch.ref_logp is None):
            raise ValueError(
                "advantages: expected old_logp and ref_logp with a KL coefficient of "
                f"{self.kl_coef} in the reward, got a batch without"
            )
        ref_N = old_N if batch.old_logp is None or batch.ref_logp is None else batch.ref_logp
        scores_B, clip = batch.column("scores"), self.score_clip
        if batch.cut_off is not None:
            scores_B = scores_B if clip is None else scores_B.clamp(-clip, clip)
            accrued_B = torch.zeros_like(scores_B) if (t := batch.token_totals) is None else t
            scores_B, clip = torch.where(batch.cut_off, accrued_B, scores_B), None
        return shaped_gae(
            old_N,
            ref_N,
            values_N,
            scores_B,
            mask=batch.action_mask,
            cu_seqlens=batch.cu_seqlens,
            kl_coef=self.kl_coef,
            gamma=self.gamma,
            lam=self.lam,
            token_rewards=batch.token_rewards,
            score_clip=clip,
            whiten=False,
        )

    @property
    def rewards(self) -> Tensor:
        """[N] rewards r_t; 0 where masked."""
        return self.shaped.rewards

    @property
    def totals(self) -> Tensor:
        """[B] return R of each completion; without the score where the end is bootstrapped."""
        return self.shaped.score_per_sequence - self.kl_coef * self.shaped.kl_per_sequence

    @property
    def group_ids(self) -> Tensor:
        """[B] int64 ids that are equal for completions of the same prompt."""
        return self.batch.column("group_ids")

    @cached_property
    def lengths(self) -> Tensor:
        """[B] int64 number of unmasked tokens of each completion."""
        before = self.batch.counts_before(self.batch.action_mask)
        return before[self.batch.cu_seqlens.long()].diff()

    @property
    def lam_of_length(self) -> float | Tensor:
        """Lambda of the advantages: `lam`, or with `lam_alpha` [B] max(0, 1 - 1 / (alpha l)) of a
        completion of l tokens. What comes k tokens later counts lambda^k, so that a fixed lambda of
        0.95 leaves nothing of a score 1,000 tokens away; this one leaves exp(-1 / alpha) of it
        whatever the length (Yue et al., 2025, VAPO)."""
        if self.lam_alpha is None:
            return self.lam
        tokens_B = self.lengths.double().clamp(min=1)
        return (1 - 1 / (self.lam_alpha * tokens_B)).clamp(min=0)

    def ahead(self, lam: float | Tensor) -> tuple[Tensor, Tensor]:
        """Return (advantages, returns) [N] of GAE with this lambda, one or [B]."""
        batch = self.batch
        return gae(
            self.rewards,
            batch.column("values"),
            mask=batch.action_mask,
            cu_seqlens=batch.cu_seqlens,
            gamma=self.gamma,
            lam=lam,
            last_values=batch.last_values,
        )

    def per_token(self, x_B: Tensor) -> Tensor:
        """Return [N]: the number of a completion at each of its unmasked tokens, 0 elsewhere."""
        sizes = self.batch.cu_seqlens.long().diff()
        return torch.where(
            self.batch.action_mask,
            torch.repeat_interleave(x_B, sizes, output_size=self.batch.num_tokens),
            0.0,
        )

    def per_group(self, x_B: Tensor, reduce: str) -> Tensor:
        """[B] float64: of each completion, the "sum", "min" or "max" of x over its group. In a
        fixed order."""
        if not len(x_B):
            return x_B.double()
        order = torch.sort(self.group_ids, stable=True).indices
        _, inverse, counts = torch.unique_consecutive(
            self.group_ids[order], return_inverse=True, return_counts=True
        )
        reduced_B = torch.segment_reduce(x_B.double()[order], reduce, lengths=counts)[inverse]
        return torch.empty_like(reduced_B).scatter(0, order, reduced_B)

    def within_groups(self, method: str, eps: float = 0.0) -> Tensor:
        """Return [N]: R compared with those of the group by `group_normalize`, at each token. Of
        trajectories whose credit is by turn, what `turns.credit` says."""
        turns, compare = self.turns, partial(group_normalize, method=method, eps=eps)
        by_turn = partial(of_turns, self.batch, self.rewards, turns.gamma, compare)
        if turns.credit == "turn":
            return by_turn(turn_numbers(self.batch))
        whole_N = self.per_token(compare(self.totals, self.group_ids).advantages)
        if turns.credit == "trajectory":
            return whole_N
        return whole_N + turns.state_weight * by_turn(self.batch.column("turn_states"))


AdvantageFunction = Callable[[Signals], Tensor | tuple[Tensor, Tensor]]
F = TypeVar("F", bound=AdvantageFunction)


@dataclass(frozen=True)
class Advantage:
    """Advantage function, and what it needs besides scores: "critic", "group", "greedy" or
    nothing."""

    function: AdvantageFunction
    needs: Needs = ""


_KNOWN: dict[str, Advantage] = {}


def register_advantage(name: str, needs: Needs = "") -> Callable[[F], F]:
    """Register a function under the name that `loss.advantage` refers to.

    Args:
        name: a new name, or the name of a built-in advantage to replace.
        needs: "critic" (values are computed and trained), "group" (several completions of a
            prompt), "greedy" (the column greedy_scores), "" (none of these). The needs of a
            built-in name are fixed in ADVANTAGES.

    Raises:
        ValueError: the name is built in and has other needs than given.
    """
    declared = ADVANTAGES.get(name, needs)
    if needs not in ("", declared):
        raise ValueError(
            f"register_advantage: expected needs {declared!r} of the built-in {name!r}, got "
            f"{needs!r}; give the function another name"
        )

    def register(function: F) -> F:
        _KNOWN[name] = Advantage(function, declared)
        return function

    return register


def _built_in(name: str) -> Callable[[F], F]:
    """Register a function under a built-in name, with the needs that ADVANTAGES gives for it."""
    return register_advantage(name, ADVANTAGES[name])


def find_advantage(name: str) -> Advantage:
    """Return the advantage with this name, or the function at this dotted path. Raise ConfigError
    if there is none."""
    found = resolve("advantage", name, _KNOWN)
    if isinstance(found, Advantage):
        return found
    return next((known for known in _KNOWN.values() if known.function is found), Advantage(found))


def estimate(config: PolicyConfig, signals: Signals) -> PackedBatch:
    """Return the batch with the column `advantages`, and with `returns` if a critic is trained.

    Raises:
        ConfigError: a user's function raised, or returned something other than advantages or
            (advantages, returns).
    """
    batch, loss = signals.batch, config.loss
    advantages_N, returns_N = _call(config.advantage, signals)
    if signals.future_kl_coef:
        kl_N = torch.where(
            batch.action_mask,
            token_kl(batch.column("old_logp"), batch.column("ref_logp"), estimator="k1"),
            0.0,
        )
        to_go_N = discounted_returns(
            kl_N, mask=batch.action_mask, cu_seqlens=batch.cu_seqlens, gamma=loss.gamma
        )
        advantages_N = advantages_N - signals.future_kl_coef * (to_go_N - kl_N)
    if loss.discount_states:
        before = batch.counts_before(batch.action_mask)
        steps = before[:-1] - torch.repeat_interleave(
            before[batch.cu_seqlens[:-1].long()],
            batch.cu_seqlens.long().diff(),
            output_size=batch.num_tokens,
        )
        advantages_N = advantages_N * (loss.gamma ** steps.double()).to(advantages_N.dtype)
    if loss.whiten:
        advantages_N = masked_whiten(advantages_N, batch.action_mask)
    if loss.advantage_clip:
        advantages_N = advantages_N.clamp(-loss.advantage_clip, loss.advantage_clip)
    return (
        batch.with_columns(advantages=advantages_N)
        if returns_N is None
        else batch.with_columns(advantages=advantages_N, returns=returns_N)
    )


def _call(name: str, signals: Signals) -> tuple[Tensor, Tensor | None]:
    """Return (advantages, returns) of the function with this name."""
    function = find_advantage(name).function
    if getattr(function, "__module__", None) == __name__:  # built in: its errors are not the user's
        found = function(signals)
        return found if isinstance(found, tuple) else (found, None)
    what = f"the advantage {name}"
    found = blame(what, partial(function, signals), ConfigError, function)
    parts = found if isinstance(found, tuple) else (found,)
    what, like_N = f"{what}, {place_of(function)}", signals.batch.action_mask
    if len(parts) not in (1, 2):
        raise ConfigError(
            f"{what}: expected it to return advantages, or advantages and returns, got a tuple of "
            f"{len(parts)}"
        )
    hint = "; Signals.per_token spreads one per completion"
    tensors = [per_token(what, part, "numbers", like_N, hint) for part in parts]
    return tensors[0], tensors[1] if len(tensors) == 2 else None


# ---- with a critic -------------------------------------------------------------------------------
@_built_in("gae")
def _gae(x: Signals) -> tuple[Tensor, Tensor]:
    """Return the advantages of GAE, and for the critic the returns of another lambda where
    `lam_critic` gives one (Yuan et al., 2025, VC-PPO: 1 for the critic, so that its own errors are
    no part of its target, and .95 for the policy)."""
    if x.lam_alpha is None and x.batch.last_values is None:
        advantages_N, returns_N = x.shaped.advantages, x.shaped.returns
    else:
        advantages_N, returns_N = x.ahead(x.lam_of_length)
    return advantages_N, returns_N if x.lam_critic is None else x.ahead(x.lam_critic)[1]


@_built_in("learned_baseline")
def _learned_baseline(x: Signals) -> tuple[Tensor, Tensor]:
    """G_t - V(s_t)."""
    return x.ahead(1.0)


@_built_in("td0")
def _td0(x: Signals) -> tuple[Tensor, Tensor]:
    """r_t + gamma V(s_{t+1}) - V(s_t)."""
    return x.ahead(0.0)


@_built_in("k_step")
def _k_step(x: Signals) -> tuple[Tensor, Tensor]:
    return k_step_advantages(
        x.rewards,
        x.batch.column("values"),
        x.k,
        mask=x.batch.action_mask,
        cu_seqlens=x.batch.cu_seqlens,
        gamma=x.gamma,
        last_values=x.batch.last_values,
    )


# ---- of a completion alone -----------------------------------------------------------------------
@_built_in("none")
def _none(x: Signals) -> Tensor:
    """Return 0 at every token: the loss has other terms, and rewards are only measured."""
    return torch.zeros_like(x.batch.action_mask, dtype=torch.float32)


@_built_in("monte_carlo")
def _monte_carlo(x: Signals) -> Tensor:
    """Return R at every token, minus the level. Without the level, the noise of the gradient would
    grow with a constant in the reward (it is the b of Williams, 1992)."""
    return x.per_token(x.totals - x.level)


@_built_in("reward_to_go")
def _reward_to_go(x: Signals) -> Tensor:
    """Return G_t minus the level, for the reason given in `_monte_carlo`."""
    to_go_N = discounted_returns(
        x.rewards, mask=x.batch.action_mask, cu_seqlens=x.batch.cu_seqlens, gamma=x.gamma
    )
    return torch.where(
        x.batch.action_mask, to_go_N - x.per_token(torch.zeros_like(x.totals) + x.level), 0.0
    )


@_built_in("running_mean")
def _running_mean(x: Signals) -> Tensor:
    """Return R - b, where b is the mean R of all earlier steps. If the other prompts of this
    rollout contradict b, they correct it (`Signals.settled`). Either way b does not depend on the
    completion it is subtracted from. The first rollout uses its own mean as b, which leaves (B - 1)
    / B of the gradient."""
    return x.per_token(x.totals - x.baseline)


@_built_in("remax")
def _remax(x: Signals) -> Tensor:
    """Return the reward-to-go minus the score of the same prompt's greedy completion."""
    greedy_B = x.batch.column("greedy_scores")
    to_go_N = discounted_returns(
        x.rewards, mask=x.batch.action_mask, cu_seqlens=x.batch.cu_seqlens, gamma=x.gamma
    )
    return to_go_N - x.per_token(
        greedy_B if x.score_clip is None else greedy_B.clamp(-x.score_clip, x.score_clip)
    )


# ---- within a group ------------------------------------------------------------------------------
@_built_in("grpo")
def _grpo(x: Signals) -> Tensor:
    """Return (R - mean) / (std + eps) of the group; std has Bessel's correction."""
    return x.within_groups("grpo", GRPO_EPS)


@_built_in("dr_grpo")
def _dr_grpo(x: Signals) -> Tensor:
    """R - mean of the group."""
    return x.within_groups("dr_grpo")


@_built_in("rloo")
def _rloo(x: Signals) -> Tensor:
    """Return R minus the mean R of the other completions in the group."""
    return x.within_groups("rloo")


@_built_in("opo")
def _opo(x: Signals) -> Tensor:
    """Return R - sum(length R) / sum(length) of the group. This baseline has the least variance if
    the gradient of a score grows with the completion's length."""
    weighted = x.per_group(x.lengths * x.totals.double(), "sum") / x.per_group(
        x.lengths, "sum"
    ).clamp(min=1)
    return x.per_token((x.totals - weighted).to(x.totals.dtype))


@_built_in("gpg")
def _gpg(x: Signals) -> Tensor:
    """Return (R - mean) alpha, alpha = completions / completions in groups whose R are not all
    equal."""
    centred, flat = group_normalize(x.totals, x.group_ids, method="dr_grpo")
    return x.per_token(centred * (len(flat) / (~flat).sum().clamp(min=1)))


@_built_in("pass_at_k")
def _pass_at_k(x: Signals) -> Tensor:
    """Give the best completion of a group its lead over the second best, and the other completions
    0. If two completions tie for the best, all get 0.

    This is the leave-one-out advantage of the best of G (Tang et al., 2025, Optimizing Language
    Models for Inference Time Objectives using Reinforcement Learning). verl's function of this
    method divides it by the group's standard deviation unless norm_adv_by_std_in_grpo is off; here
    nothing is divided, since the expected gradient is then that of E[best of G], times 1 / G.
    """
    order = torch.sort(x.totals, descending=True, stable=True).indices
    order = order[torch.sort(x.group_ids[order], stable=True).indices]
    ids, totals = x.group_ids[order], x.totals[order]
    first = torch.cat([ids.new_ones(min(1, len(ids)), dtype=torch.bool), ids[1:] != ids[:-1]])
    paired = torch.cat([ids[1:] == ids[:-1], ids.new_zeros(min(1, len(ids)), dtype=torch.bool)])
    lead = torch.where(first & paired, totals - torch.roll(totals, -1), 0.0)
    return x.per_token(torch.zeros_like(lead).scatter(0, order, lead))


@_built_in("gdpo")
def _gdpo(x: Signals) -> Tensor:
    """Return S / (std + eps) over the completions of the step, where

        S = sum_k weight_k (r_k - mean_k) / (std_k + eps)

    with the mean and the standard deviation of reward k over the completions of the group that it
    applies to (Liu et al., 2026, GDPO). Penalties for length and for a missing end count as one
    more reward of weight 1. All standard deviations have Bessel's correction. The mean of S is 0
    in every group, so the paper's subtraction of it over the step is left out. A batch without
    reward_parts has one reward, R.
    """
    parts_BK, weights = x.batch.reward_parts, x.reward_weights
    if parts_BK is None:
        parts_BK, weights = x.totals[:, None], None
    sums_B = torch.zeros_like(x.totals, dtype=torch.float64)
    weights = weights or (1.0,) * parts_BK.shape[1]
    for weight, part_B in zip(weights, parts_BK.double().T, strict=True):
        sums_B += weight * _standardised(x, part_B)
    spread = sums_B.std() if len(sums_B) > 1 else 0.0
    return x.per_token((sums_B / (spread + GRPO_EPS)).to(x.totals.dtype))


@_built_in("online_dpo")
def _online_dpo(x: Signals) -> Tensor:
    """Return what makes REINFORCE the gradient of DPO's loss on the policy's own samples (Guo et
    al., 2024): for the completions of the highest and of the lowest score of a group

        +- n (groups / pairs) beta sigmoid(-beta h)
        h = (log pi - log ref)(best) - (log pi - log ref)(worst), sums over tokens, beta = kl_coef

    and 0 for the others of the n. While the policy is the one that drew the samples, and with a
    weight of 1 / completions for each token, the gradient is that of the mean over pairs of -log
    sigmoid(beta h). A group whose scores are all the same is a tie and no pair. Of several best
    completions the first counts, of several worst ones the last.
    """
    scores_B, ratio_B = x.shaped.score_per_sequence, x.shaped.kl_per_sequence.double()
    order = torch.sort(scores_B, descending=True, stable=True).indices
    order = order[torch.sort(x.group_ids[order], stable=True).indices]
    _, sizes = torch.unique_consecutive(x.group_ids[order], return_counts=True)
    ends = sizes.cumsum(0)
    best, worst = order[ends - sizes], order[ends - 1]
    paired = scores_B[best] > scores_B[worst]
    beta, share = x.kl_coef, len(sizes) / paired.sum().clamp(min=1).double()
    pull = sizes * share * beta * torch.sigmoid(-beta * (ratio_B[best] - ratio_B[worst]))
    pull = torch.where(paired, pull, 0.0)
    found_B = torch.zeros_like(ratio_B).index_add(0, best, pull).index_add(0, worst, -pull)
    return x.per_token(found_B.to(x.totals.dtype))


def _standardised(x: Signals, part_B: Tensor) -> Tensor:
    """Return [B] a reward less the group's mean, divided by its standard deviation plus eps. It is
    exactly 0 where the reward does not apply (NaN), or is the same in the whole group."""
    there_B = ~part_B.isnan()
    count_B = x.per_group(there_B, "sum").clamp(min=1)
    lowest_B = x.per_group(torch.where(there_B, part_B, math.inf), "min")
    # counted from the lowest one, so that equal rewards are exactly 0
    part_B = torch.where(there_B, part_B - lowest_B, 0.0)
    off_B = torch.where(there_B, part_B - x.per_group(part_B, "sum") / count_B, 0.0)
    variance_B = x.per_group(off_B.square(), "sum") / (count_B - 1).clamp(min=1)
    return off_B / (variance_B.sqrt() + GRPO_EPS)
