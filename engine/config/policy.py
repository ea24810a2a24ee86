"""Options of a run of policy optimisation."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field, replace

from fusedrl.engine.config.algorithms import ADVANTAGES, ALGORITHMS, BOUNDS, Algorithm
from fusedrl.engine.config.base import OptimConfig, ReferenceConfig, SamplingConfig, check, either
from fusedrl.engine.config.loss import LossConfig
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

# objectives whose terms are of single tokens, and 0 where the advantage is
_OF_TOKENS = ("reinforce", "importance", "ppo_clip", "dual_clip", "dapo", "cispo", "sapo")


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
        self._check_lambdas()
        self._check_critic()
        self._check_truncation()
        self._check_objective()
        if self.advantage == "online_dpo":
            self._check_pairs()
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

    def _check_lambdas(self) -> None:
        """Check options that only advantages of a critic read."""
        loss = self.loss
        without = [
            name
            for name, given in (
                ("missing_eos_penalty", self.missing_eos_penalty != 0),
                ("overlong_buffer", self.overlong_buffer > 0),
                ("mask_truncated_completions", self.mask_truncated_completions),
            )
            if given
        ]
        check(
            self,
            "",
            *(
                (
                    f"loss.{name}",
                    getattr(loss, name) is None or self.advantage == "gae",
                    f"only with the advantage gae, not {self.advantage}, which has no lambda",
                )
                for name in ("lam_critic", "lam_alpha")
            ),
            (
                "loss.bootstrap_truncated",
                not loss.bootstrap_truncated or ADVANTAGES.get(self.advantage) == "critic",
                f"only with a critic: the advantage {self.advantage} has no values (ppo and a2c "
                "have)",
            ),
            (
                "loss.bootstrap_truncated",
                not loss.bootstrap_truncated or not without,
                f"without {', '.join(without)}: a completion that was cut off has no score then, "
                "and no penalty in it",
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
                f"one of {', '.join(_OF_TOKENS)} with loss.top_entropy_quantile, "
                "loss.clip_cov_ratio and loss.kl_cov_ratio: the terms of others are not of single "
                "tokens",
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

    def _check_pairs(self) -> None:
        """Check that the advantage online_dpo is the gradient of DPO's loss."""
        once = self.epochs * self.minibatches == 1 and self.replay is None
        check(
            self,
            "",
            (
                "kl.coef",
                self.kl.coef > 0 and self.kl.placement == "reward",
                "> 0 with kl.placement = reward and the advantage online_dpo (it is DPO's beta)",
                (self.kl.coef, self.kl.placement),
            ),
            (
                "minibatches",
                once,
                "1, epochs 1 and no replay with the advantage online_dpo: its loss is of pairs "
                "that the policy itself has just drawn",
                (self.minibatches, self.epochs),
            ),
            (
                "loss.aggregation",
                self.loss.aggregation == "sequence_mean_token_sum" and not self.loss.whiten,
                "sequence_mean_token_sum without loss.whiten with the advantage online_dpo (DPO's "
                "log-ratios are sums over tokens)",
                (self.loss.aggregation, self.loss.whiten),
            ),
            (
                "mask_truncated_completions",
                not self.mask_truncated_completions,
                "false with the advantage online_dpo (it would leave half a pair)",
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
        if self.loss.kl_cov_ratio:
            found.append(f"loss.kl_cov_ratio {self.loss.kl_cov_ratio:g}")
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
