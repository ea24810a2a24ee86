"""Options of the advantage and the loss of a policy run."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from fusedrl.engine.config.algorithms import BOUNDS, OBJECTIVES, Algorithm
from fusedrl.engine.config.base import check, either
from fusedrl.engine.config.parts import OF_ALGORITHM

_AGGREGATIONS = (
    "token_mean",
    "sequence_mean_token_mean",
    "sequence_mean_token_sum",
    "sequence_sum_norm",
)


@dataclass(frozen=True)
class LossConfig:
    """Options of the advantage and the loss.

    The defaults of PPO are those of Ziegler et al. (2019) and Stiennon et al. (2020), as
    re-implemented by Huang et al. (2024). Fields without a default here take that of the algorithm,
    and the bounds of a ratio take that of the objective (both in algorithms.py).

    Args:
        advantage: name or module.function of an advantage, to replace the algorithm's.
        objective: name or module.function of an objective, to replace the algorithm's.
        gamma: discount per token.
        lam: lambda of GAE.
        lam_critic: lambda of the returns that the critic learns, where it is another one than the
            policy's; None: the same. Yuan et al. (2025, VC-PPO) and Yue et al. (2025, VAPO) take 1.
        lam_alpha: give each completion of l tokens the lambda max(0, 1 - 1 / (lam_alpha l)) in
            place of `lam` (VAPO, who take 0.05). The critic then needs a lambda of its own or has
            the same. None is off.
        bootstrap_truncated: a completion that was cut off has the critic's value of what comes next
            behind its last token, in place of its score: the limit of length is no end of the task
            (Pardo et al., 2018). Rewards of single tokens and the KL stay.
        k: number of steps ahead in k-step advantages.
        discount_states: multiply the advantage of token t by gamma^t, as in Sutton and Barto's
            REINFORCE; this is not usual for language models.
        whiten: scale advantages to mean 0 and variance 1 (population) over the whole batch of a
            step.
        advantage_clip: clip advantages, after whitening, to +- this; 0 does not clip.
        clip_low: the ratio is clipped below at 1 - clip_low.
        clip_high: the ratio is clipped above at 1 + clip_high.
        dual_clip: bound on the ratio for negative advantages, so that the loss is at most dual_clip
            x |A|; None is off.
        clip_max: with cispo, the cap on the ratio.
        tau_positive: with sapo, the temperature of the gate for A > 0.
        tau_negative: with sapo, the temperature of the gate for A < 0.
        beta: with dro, the weight of the squared term; with ppo_penalty, a fixed coefficient
            instead of the adaptive one.
        value_clip: values move at most this far from the old ones; None is off.
        value_coef: weight of the value loss. A separate critic has gradients of its own, which the
            weight only scales; there it matters only through Adam's epsilon and gradient clipping.
        entropy_coef: weight of the entropy bonus.
        entropy_target: minimise entropy_coef |H - entropy_target| instead of adding the bonus
            (Zheng et al., 2023). H is the mean entropy of the rollout's tokens in nats. Below the
            target, entropy is rewarded; above it, penalised. A target above log(vocabulary), such
            as their 35, always rewards entropy.
        aggregation: how token losses become one number.
        top_entropy_quantile: share of a rollout's tokens, those of the highest entropy, that keep
            their advantage; the others get 0 (Wang et al., 2025, Beyond the 80/20 Rule, who take
            0.2). 1 keeps all.
        clip_cov_ratio: share of a rollout's tokens, drawn among those whose covariance of
            log-probability and advantage is between clip_cov_low and clip_cov_high, that get the
            advantage 0 (Cui et al., 2025, The Entropy Mechanism, Clip-Cov, who take 0.0002). 0 is
            off.
        clip_cov_low: covariance above which tokens may be drawn.
        clip_cov_high: covariance below which they may be.
        kl_cov_ratio: share of a rollout's tokens, those of the highest covariance of
            log-probability and advantage, that are held near the policy of the rollout (Cui et al.,
            2025, KL-Cov, who take 0.002 for 7B parameters and 0.0002 for 32B, with the objective
            importance). 0 is off.
        kl_cov_coef: weight of |log pi - log pi_old| at those tokens, in the loss; their beta is 1.
    """

    advantage: str | None = None
    objective: str | None = None
    gamma: float = 1.0
    lam: float = 0.95
    lam_critic: float | None = None
    lam_alpha: float | None = None
    bootstrap_truncated: bool = False
    k: int = 5
    discount_states: bool = False
    whiten: bool = OF_ALGORITHM
    advantage_clip: float | None = OF_ALGORITHM
    clip_low: float | None = None
    clip_high: float | None = None
    dual_clip: float | None = None
    clip_max: float | None = None
    tau_positive: float | None = None
    tau_negative: float | None = None
    beta: float | None = None
    value_clip: float | None = 0.2
    value_coef: float = 0.1
    entropy_coef: float = 0.0
    entropy_target: float | None = None
    aggregation: Literal[
        "token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum", "sequence_sum_norm"
    ] = OF_ALGORITHM
    top_entropy_quantile: float = 1.0
    clip_cov_ratio: float = 0.0
    clip_cov_low: float = 1.0
    clip_cov_high: float = 5.0
    kl_cov_ratio: float = 0.0
    kl_cov_coef: float = 1.0

    def __post_init__(self) -> None:
        check(
            self,
            "loss",
            ("gamma", 0 <= self.gamma <= 1, "in [0, 1]"),
            ("lam", 0 <= self.lam <= 1, "in [0, 1]"),
            ("lam_critic", self.lam_critic is None or 0 <= self.lam_critic <= 1, "in [0, 1]"),
            (
                "lam_alpha",
                self.lam_alpha is None or 0 < self.lam_alpha < math.inf,
                "> 0, or null for one lambda",
            ),
            ("k", self.k >= 1, ">= 1"),
            ("advantage_clip", self.advantage_clip is None or self.advantage_clip >= 0, ">= 0"),
            (
                "entropy_target",
                self.entropy_target is None or (self.entropy_target >= 0 and self.entropy_coef > 0),
                ">= 0 with loss.entropy_coef > 0, which weighs the distance to it",
                (self.entropy_target, self.entropy_coef),
            ),
            ("clip_low", self.clip_low is None or 0 < self.clip_low < 1, "in (0, 1)"),
            ("clip_high", self.clip_high is None or self.clip_high > 0, "> 0"),
            ("dual_clip", self.dual_clip is None or self.dual_clip > 1, "> 1"),
            ("value_clip", self.value_clip is None or self.value_clip > 0, "> 0, or null for none"),
            ("value_coef", self.value_coef >= 0, ">= 0"),
            ("entropy_coef", self.entropy_coef >= 0, ">= 0"),
            (
                "aggregation",
                self.aggregation in (None, *_AGGREGATIONS),
                f"one of {', '.join(_AGGREGATIONS)}",
            ),
            ("top_entropy_quantile", 0 < self.top_entropy_quantile <= 1, "in (0, 1]"),
            ("clip_cov_ratio", 0 <= self.clip_cov_ratio < 1, "in [0, 1)"),
            (
                "clip_cov_low",
                self.clip_cov_low < self.clip_cov_high,
                "below loss.clip_cov_high",
                (self.clip_cov_low, self.clip_cov_high),
            ),
            ("kl_cov_ratio", 0 <= self.kl_cov_ratio < 1, "in [0, 1)"),
            (
                "kl_cov_ratio",
                self.kl_cov_ratio == 0 or self.clip_cov_ratio == 0,
                "0 with loss.clip_cov_ratio (both say what becomes of the same tokens; choose one)",
            ),
            ("kl_cov_coef", 0 < self.kl_cov_coef < math.inf, "> 0 (kl_cov_ratio 0 is off)"),
        )

    @property
    def chooses_tokens(self) -> bool:
        """Whether some tokens of a rollout lose their advantage, or are held."""
        return self.top_entropy_quantile < 1 or self.clip_cov_ratio > 0 or self.kl_cov_ratio > 0

    def filled(self, row: Algorithm) -> LossConfig:
        """Return these options, with the values of the algorithm and of its objective for those
        that were not set."""
        usual = OBJECTIVES.get(self.objective or row.objective, ("", {}))[1]
        bounds = {name: either(getattr(self, name), usual.get(name)) for name in BOUNDS}
        return replace(
            self,
            whiten=either(self.whiten, row.whiten),
            advantage_clip=either(self.advantage_clip, row.advantage_clip),
            aggregation=self.aggregation or row.aggregation,
            **bounds,
        )
