"""Options of policy optimisation: advantage and loss, and the run itself."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Literal

from fusedrl.engine.config.algorithms import ADVANTAGES, ALGORITHMS, BOUNDS, OBJECTIVES, Algorithm
from fusedrl.engine.config.base import OptimConfig, ReferenceConfig, SamplingConfig, check, either
from fusedrl.engine.config.monitor import AlarmConfig, EvaluationConfig
from fusedrl.engine.config.off_policy import CorrectionConfig, ReplayConfig
from fusedrl.engine.config.parts import (
    OF_ALGORITHM,
    CriticConfig,
    KLConfig,
    PenaltyConfig,
    PtxConfig,
    TRPOConfig,
)
from fusedrl.engine.config.turns import TurnsConfig

_AGGREGATIONS = (
    "token_mean",
    "sequence_mean_token_mean",
    "sequence_mean_token_sum",
    "sequence_sum_norm",
)
# objectives whose terms are of single tokens, and 0 where the advantage is
_OF_TOKENS = ("reinforce", "importance", "ppo_clip", "dual_clip", "dapo", "cispo", "sapo")


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
    """

    advantage: str | None = None
    objective: str | None = None
    gamma: float = 1.0
    lam: float = 0.95
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

    def __post_init__(self) -> None:
        check(
            self,
            "loss",
            ("gamma", 0 <= self.gamma <= 1, "in [0, 1]"),
            ("lam", 0 <= self.lam <= 1, "in [0, 1]"),
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
        )

    @property
    def chooses_tokens(self) -> bool:
        """Whether some tokens of a rollout lose their advantage."""
        return self.top_entropy_quantile < 1 or self.clip_cov_ratio > 0

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


@dataclass(frozen=True)
class PolicyConfig(ReferenceConfig, SamplingConfig):
    """Policy optimisation by any of the ALGORITHMS.

    By default it is PPO with a value head on the policy's trunk and the KL inside the reward.
    Fields without a default here take that of the algorithm (algorithms.py) when the object is
    made. To change the algorithm, make a new object: `dataclasses.replace` keeps the numbers of the
    old algorithm.

    Args:
        model: directory or id of the policy to train; its initial weights are the reference, unless
            reference_model names another.
        data: a file or hf:ID (docs/guide.md) with a "prompt" field in each row, or preference
            pairs, whose common prefix is the prompt.
        algorithm: name of an algorithm in algorithms.py: ppo, grpo, rloo, ...
        monitor_reward: rewards that are measured at every step but never trained on; reported as
            gold/<name>/mean.
        steps: number of rollouts, each followed by epochs x minibatches optimizer steps (trpo: by
            one step of the policy and `epochs` passes that train its values).
        minibatches: optimizer steps of one pass; by default the algorithm's, but no more than
            prompts_per_step.
        scale_scores: subtract the mean of the first rollout's scores, then divide by the standard
            deviation (over count - 1) of all scores of the run so far (Zheng et al., 2023,
            PPO-max). The subtraction does not change the optimal policy; the division has the
            effect of multiplying the KL coefficient by the deviation.
        normalize_scores: as scale_scores, but subtract the mean of all scores of the run so far.
        score_clip: clip scores to +- this, after scale_scores or normalize_scores; 0 does not clip.
            Without these two options the reward's own numbers are clipped: if all of them are
            beyond the bound, nothing is learned from them. The metric score_clip_fraction is the
            share that was clipped.
        overlong_buffer: number of tokens before max_new_tokens over which overlong_penalty rises
            from 0 to its full value; 0 is off.
        overlong_penalty: subtracted from the score of a completion that has max_new_tokens tokens.
        mask_truncated_completions: leave completions that were cut off out of the loss (Yu et al.,
            2025, DAPO, overlong filtering). Their rewards still count in their group's mean.
        refill_tries: dynamic sampling: how often, at most, groups whose rewards are all equal are
            replaced by groups of other prompts; 0 keeps them. Compared are the rewards alone,
            before penalties for length or a missing end.
        max_logp_diff: stop the run if the mean absolute difference between the log-probabilities of
            sampler and trainer is above this.
        strict: make the trainer's log-probabilities bitwise equal to the sampler's, at the cost of
            one more forward in training (float32 and bfloat16).
        replay: also train on earlier rollouts; replay.capacity, replay.fraction or replay.max_age
            turns it on.
        ptx: train on given texts in the same optimizer steps, so that the policy does not forget
            them; ptx.data turns it on.
        critic: critic of the algorithms that need one. By default it is a value head on the
            policy's trunk, trained with the policy by one loss. critic.warmup_steps trains the
            critic alone at first; critic.model makes it a separate model, saved in <run>/critic.
        evaluation: evaluate on held-out prompts during training; evaluation.data turns it on.
        alarm: what to do about signs of reward hacking.
        environment: file.py:NAME of a class with `reset` and `step`, which answers the policy's
            turns and rewards them (docs/guide.md); its rewards are added to those of `reward`,
            which may be left out. It runs in the reward_workers, if there are any.
        tools: file.py:NAME of functions that the policy may call in its turns. The rewards are
            those of `reward`.
        turns: how long trajectories may be, and what a turn is credited with.
    """

    model: str
    data: str
    reward: tuple[str, ...]
    algorithm: str = "ppo"
    _: KW_ONLY
    steps: int = 100
    prompts_per_step: int = 64
    samples_per_prompt: int = OF_ALGORITHM
    epochs: int = OF_ALGORITHM
    minibatches: int = OF_ALGORITHM
    monitor_reward: tuple[str, ...] = ()
    scale_scores: bool = False
    normalize_scores: bool = OF_ALGORITHM
    score_clip: float | None = OF_ALGORITHM
    overlong_buffer: int = 0
    overlong_penalty: float = 1.0
    mask_truncated_completions: bool = False
    refill_tries: int = OF_ALGORITHM
    max_logp_diff: float = 0.05
    strict: bool = False
    replay: ReplayConfig | None = None
    ptx: PtxConfig | None = None
    critic: CriticConfig | None = None
    kl: KLConfig = field(default_factory=KLConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    penalty: PenaltyConfig = field(default_factory=PenaltyConfig)
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)
    trpo: TRPOConfig = field(default_factory=TRPOConfig)
    evaluation: EvaluationConfig | None = None
    alarm: AlarmConfig = field(default_factory=AlarmConfig)
    environment: str | None = None
    tools: tuple[str, ...] = ()
    turns: TurnsConfig = field(default_factory=TurnsConfig)

    def __post_init__(self) -> None:
        known = ", ".join(ALGORITHMS)
        check(self, "", ("algorithm", self.algorithm in ALGORITHMS, f"to be one of {known}"))
        self._fill()
        self.check_stage()
        self.check_sampling()
        self.check_reference()
        self._check_completions()
        self._check_critic()
        self._check_truncation()
        self._check_objective()
        self._check_turns()

    def _fill(self) -> None:
        """Take the algorithm's values for options that were not set."""
        row = self.row
        steps = max(1, min(row.minibatches, self.prompts_per_step))
        # also in place of a row's own objective
        on_policy = self.objective in ("reinforce", "trpo")
        critic = self.critic and replace(self.critic, optim=self.critic.optim.filled(row.eps))
        for name, value in (
            ("reward", self.reward or (("none",) if self.advantage == "none" else ())),
            ("samples_per_prompt", either(self.samples_per_prompt, row.samples_per_prompt)),
            ("epochs", either(self.epochs, row.epochs)),
            ("minibatches", either(self.minibatches, 1 if on_policy else steps)),
            ("optim", self.optim.filled(row.eps)),
            ("critic", critic),
            ("refill_tries", either(self.refill_tries, row.refill_tries)),
            ("normalize_scores", either(self.normalize_scores, row.normalize_scores)),
            ("score_clip", either(self.score_clip, row.score_clip)),
            ("kl", self.kl.filled(row)),
            ("loss", self.loss.filled(row)),
        ):
            object.__setattr__(self, name, value)

    def _check_completions(self) -> None:
        rollouts = self.prompts_per_step * self.samples_per_prompt
        longest = self.generation.max_new_tokens
        check(
            self,
            "",
            ("score_clip", self.score_clip is None or self.score_clip >= 0, ">= 0"),
            ("max_logp_diff", self.max_logp_diff > 0, "> 0"),
            (
                "minibatches",
                self.minibatches <= rollouts,
                f"<= prompts_per_step x samples_per_prompt = {rollouts}",
            ),
            (
                "generation.temperature",
                self.generation.temperature > 0,
                "> 0 (greedy rollouts do not explore)",
            ),
            (
                "samples_per_prompt",
                self.samples_per_prompt > 1 or ADVANTAGES.get(self.advantage) != "group",
                f"> 1 for {self.algorithm} (its advantage, {self.advantage}, compares the "
                "completions of one prompt: one alone has the advantage 0 and teaches nothing; 8 "
                "is usual)",
            ),
            (
                "overlong_buffer",
                0 <= self.overlong_buffer <= longest,
                f"within 0 and generation.max_new_tokens = {longest}",
            ),
            (
                "refill_tries",
                self.refill_tries == 0 or (self.refill_tries > 0 and self.samples_per_prompt > 1),
                ">= 0, and 0 with samples_per_prompt = 1",
            ),
        )

    def _check_critic(self) -> None:
        if self.critic is None:
            return
        on_trunk = self.critic.model == "trunk" and self.critic.warmup_steps == 0
        check(
            self,
            "",
            (
                "critic",
                ADVANTAGES.get(self.advantage, "critic") == "critic",
                f"to be left out with {self.algorithm}, whose advantage {self.advantage} has no "
                "use for values (the options contradict each other); ppo, a2c and others have a "
                "critic",
            ),
            (
                "critic.warmup_steps",
                self.critic.warmup_steps < self.steps,
                f"< steps = {self.steps}, else no policy is trained",
            ),
            (
                "critic.optim",
                not on_trunk or self.critic.optim == OptimConfig().filled(self.row.eps),
                "only with critic.model (policy is a copy of its weights) or critic.warmup_steps: "
                "a head on the policy's trunk is trained by optim, with the policy",
                "neither",
            ),
        )

    def _check_truncation(self) -> None:
        if not self.generation.truncates:
            return
        truncated = (self.generation.top_k, self.generation.top_p, self.generation.min_p)
        check(
            self,
            "",
            (
                "generation",
                self.objective != "trpo",
                "without top_k, top_p and min_p with the objective trpo (its Fisher matrix and its "
                "bound are of the whole vocabulary)",
                truncated,
            ),
            (
                "generation",
                self.kl.estimator != "full" or not self.needs_reference,
                "without top_k, top_p and min_p with kl.estimator = full (the KL of the whole "
                "vocabulary is not that of what was sampled; use k1, k2 or k3)",
                truncated,
            ),
        )

    def _check_objective(self) -> None:
        check(
            self,
            "",
            (
                "kl.coef",
                self.advantage != "none" or (self.kl.coef > 0 and self.kl.placement == "loss"),
                "> 0 with kl.placement = loss and the advantage none: there is nothing else to "
                "learn from",
                (self.kl.coef, self.kl.placement),
            ),
            (
                "reference_model",
                self.reference_model is None or self.needs_reference,
                "only with a KL to it: set kl.coef above 0, or kl.measure",
            ),
            (
                "loss.objective",
                self.objective != "reinforce"
                or (self.replay is None and not self.correction.bypass),
                "with a ratio (importance, ppo_clip, ...) for replay and correction.bypass: "
                "without one the tokens of another policy count as this one's own",
                self.objective,
            ),
            (
                "loss.objective",
                not self.loss.chooses_tokens or self.objective in _OF_TOKENS,
                f"one of {', '.join(_OF_TOKENS)} with loss.top_entropy_quantile and "
                "loss.clip_cov_ratio: the terms of others are not of single tokens",
                self.objective,
            ),
        )
        if self.advantage == "gdpo":
            self._check_parts()
        if self.objective != "trpo":
            return
        check(
            self,
            "",
            (
                "minibatches",
                self.minibatches == 1,
                "1 with the objective trpo (its one step is on the whole rollout)",
            ),
            (
                "replay",
                self.replay is None,
                "to be left out with the objective trpo (its bound is about one rollout)",
            ),
            (
                "dtype",
                self.dtype != "bfloat16",
                "float32 with the objective trpo (its step is rounded away in 16 bits)",
            ),
            (
                "kl.estimator",
                self.kl.coef == 0 or self.kl.estimator != "full",
                "k1, k2, k3 or abs with the objective trpo",
            ),
        )

    def _check_parts(self) -> None:
        """Check options that act on the sum of all rewards, which gdpo does not use."""
        placed = self.kl.coef > 0 and self.kl.placement == "reward"
        found = {
            "scale_scores": self.scale_scores,
            "normalize_scores": self.normalize_scores,
            "score_clip": bool(self.score_clip),
            "kl.placement reward": placed,
        }
        acting = [name for name, acts in found.items() if acts]
        check(
            self,
            "",
            (
                "loss.advantage",
                not acting,
                f"another one than gdpo with {', '.join(acting)}, which acts on the sum of all "
                "rewards: gdpo normalises each reward by itself",
                self.advantage,
            ),
        )

    def _check_turns(self) -> None:
        """Check options of trajectories, and those that are about single completions."""
        grouped = self.advantage in ("grpo", "dr_grpo", "rloo")
        check(
            self,
            "",
            (
                "tools",
                not self.tools or self.environment is None,
                "to be left out with an environment, which may call tools itself",
            ),
            (
                "reward",
                bool(self.reward) or not self.tools,
                "at least one with tools, whose results are not rewarded",
            ),
            (
                "turns",
                self.turns == TurnsConfig() or self.plays,
                "only together with environment or tools",
            ),
            (
                "turns.credit",
                self.turns.credit == "trajectory" or grouped,
                "trajectory with an advantage other than grpo, dr_grpo and rloo (methods with a "
                f"critic have the reward of each turn at its end); this one is {self.advantage}",
            ),
        )
        if not self.plays:
            return
        check(
            self,
            "",
            (
                "overlong_buffer",
                self.overlong_buffer == 0,
                "0 with environment or tools: max_new_tokens is of one turn there",
            ),
            (
                "loss.advantage",
                ADVANTAGES.get(self.advantage) != "greedy",
                "another one than remax with environment or tools: a greedy trajectory would have "
                "to be played, too",
                self.advantage,
            ),
        )

    @property
    def plays(self) -> bool:
        """Whether an environment answers the policy's turns and rewards them."""
        return self.environment is not None or bool(self.tools)

    @property
    def title(self) -> str:
        """Name of the run on the terminal."""
        return self.algorithm

    @property
    def row(self) -> Algorithm:
        """Entry of the algorithm in ALGORITHMS."""
        return ALGORITHMS[self.algorithm]

    @property
    def advantage(self) -> str:
        """Name of the advantage: `loss.advantage` if set, else the algorithm's."""
        return self.loss.advantage or self.row.advantage

    @property
    def objective(self) -> str:
        """Name of the objective: `loss.objective` if set, else the algorithm's."""
        return self.loss.objective or self.row.objective

    @property
    def own_critic(self) -> CriticConfig | None:
        """Options of the critic if it is a separate model. None if the critic is a head on the
        policy's trunk, or there is no critic."""
        return None if self.critic is None or self.critic.model == "trunk" else self.critic

    @property
    def critic_warmup(self) -> int:
        """Number of rollouts that train the critic alone."""
        return 0 if self.critic is None else self.critic.warmup_steps

    @property
    def idle_bounds(self) -> tuple[str, ...]:
        """List the options (`name value`) that bound ratios or values but have no effect in this
        run: with one optimizer step per rollout, neither has changed yet."""
        if (
            self.epochs * self.minibatches > 1
            or self.replay is not None
            or self.correction.bypass
            or self.objective == "trpo"
        ):
            return ()
        found = [
            f"loss.{name} {value:g}"
            for name in BOUNDS
            if (value := getattr(self.loss, name)) is not None
        ]
        found += ["penalty"] if self.objective == "ppo_penalty" and self.loss.beta is None else []
        has_values = ADVANTAGES.get(self.advantage, "critic") == "critic"
        return tuple(
            found
            + (
                [f"loss.value_clip {self.loss.value_clip:g}"]
                if has_values and self.loss.value_clip is not None
                else []
            )
        )

    @property
    def exact_kl(self) -> bool:
        """Whether the loss has the exact KL to the reference."""
        return self.kl.coef > 0 and self.kl.estimator == "full"

    @property
    def scores_reference(self) -> bool:
        """Whether the reference scores each rollout before its update. It need not where rewards
        play no part and the loss has the exact KL; then kl.measure asks for it."""
        exact = self.advantage == "none" and self.exact_kl
        return self.needs_reference and (
            not exact or self.kl.measure or self.kl.target is not None or self.kl.level != "token"
        )

    @property
    def idle_choices(self) -> tuple[str, ...]:
        """List those of `idle_bounds` that were chosen: by default they have another value, or an
        effect."""
        usual = PolicyConfig(self.model, self.data, self.reward or ("none",), self.algorithm)
        return tuple(one for one in self.idle_bounds if one not in usual.idle_bounds)

    @property
    def needs_reference(self) -> bool:
        """Whether the run needs a reference model."""
        return self.kl.coef > 0 or self.kl.measure
