"""Policy optimisation: advantage and loss, and the run itself."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from fusedrl.engine.config.algorithms import ADVANTAGES, ALGORITHMS, BOUNDS, OBJECTIVES, Algorithm
from fusedrl.engine.config.base import (
    GenerationConfig,
    LoRAConfig,
    OptimConfig,
    RunConfig,
    check_values,
    either,
    require,
)
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

_AGGREGATIONS = (
    "token_mean",
    "sequence_mean_token_mean",
    "sequence_mean_token_sum",
    "sequence_sum_norm",
)


@dataclass(frozen=True)
class LossConfig:
    """Advantage and loss. Defaults of PPO: Ziegler et al. (2019) and Stiennon et al. (2020), as
    re-implemented by Huang et al. (2024). Fields without a default here take the algorithm's
    (algorithms.py), and the bounds of a ratio those of the objective (kernels/objective.py).

    Args:
        advantage: in place of the algorithm's: a name, or module.function.
        objective: in place of the algorithm's: a name, or module.function.
        gamma: discount per token.
        lam: lambda of GAE.
        k: of k-step advantages, the steps ahead.
        discount_states: weigh the advantage of token t by gamma^t, as in Sutton and Barto's
            REINFORCE; nobody does for language models.
        whiten: advantages to mean 0 and variance 1 (population) over the whole batch of a step.
        advantage_clip: advantages are then clipped to +- this; 0 leaves them.
        clip_low: the ratio is clipped below at 1 - clip_low.
        clip_high: the ratio is clipped above at 1 + clip_high.
        dual_clip: bound on ratio x |A| for negative advantages; None is off.
        clip_max: of cispo, the cap on the ratio.
        tau_positive: of sapo, the temperature of the gate where A > 0.
        tau_negative: of sapo, the temperature of the gate where A < 0.
        beta: of dro, the weight of the square; of ppo_penalty, a fixed coefficient in place of the
            adaptive one.
        value_clip: values move at most this far from the old ones; None is off.
        value_coef: weight of the value loss. A critic of its own has gradients of its own, so that
            there the weight acts through epsilon and clip alone.
        entropy_coef: weight of the entropy bonus.
        entropy_target: in place of the bonus, entropy_coef |H - entropy_target|, H the mean entropy
            of the rollout's tokens in nats, is minimised (Zheng et al., 2023): below the target
            entropy is a bonus, above it a cost. A target above log(vocabulary), such as their 35,
            is a bonus always.
        aggregation: how token losses become one number.
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

    def __post_init__(self) -> None:
        require(0 <= self.gamma <= 1, "loss.gamma", "in [0, 1]", self.gamma)
        require(0 <= self.lam <= 1, "loss.lam", "in [0, 1]", self.lam)
        require(self.k >= 1, "loss.k", ">= 1", self.k)
        require(
            self.advantage_clip is None or self.advantage_clip >= 0,
            "loss.advantage_clip",
            ">= 0",
            self.advantage_clip,
        )
        require(
            self.entropy_target is None or (self.entropy_target >= 0 and self.entropy_coef > 0),
            "loss.entropy_target",
            ">= 0 with loss.entropy_coef > 0, which weighs the distance to it",
            (self.entropy_target, self.entropy_coef),
        )
        require(
            self.clip_low is None or 0 < self.clip_low < 1,
            "loss.clip_low",
            "in (0, 1)",
            self.clip_low,
        )
        require(
            self.clip_high is None or self.clip_high > 0, "loss.clip_high", "> 0", self.clip_high
        )
        require(
            self.dual_clip is None or self.dual_clip > 1, "loss.dual_clip", "> 1", self.dual_clip
        )
        require(
            self.value_clip is None or self.value_clip > 0,
            "loss.value_clip",
            "> 0, or null for none",
            self.value_clip,
        )
        require(self.value_coef >= 0, "loss.value_coef", ">= 0", self.value_coef)
        require(self.entropy_coef >= 0, "loss.entropy_coef", ">= 0", self.entropy_coef)
        require(
            self.aggregation in (None, *_AGGREGATIONS),
            "loss.aggregation",
            f"one of {', '.join(_AGGREGATIONS)}",
            self.aggregation,
        )

    def filled(self, row: Algorithm) -> LossConfig:
        """With the row's values, and its objective's, where nothing was said."""
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
class PolicyConfig:
    """Policy optimisation by any of the ALGORITHMS; by default PPO with a value head on the
    policy's trunk and the KL inside the reward.

    Fields without a default here are filled in from the algorithm's row as the object is made; make
    another one for another algorithm.

    Args:
        model: directory or id of the policy to train; its initial weights are the reference.
        data: JSONL file (.gz too) with a "prompt" column, or preference pairs, whose common prefix
            is the prompt.
        reward: rewards, each file.py:function, or a directory of a reward model.
        algorithm: ppo, grpo, rloo, ...: a row of algorithms.py.
        reward_weights: one weight per reward; None weighs each 1.
        monitor_reward: rewards that are measured at every step and never trained on, as
            gold/<name>/mean.
        steps: rollouts, each followed by epochs x minibatches optimizer steps (trpo: by one step of
            the policy and epochs of its values).
        prompts_per_step: prompts of one rollout.
        samples_per_prompt: completions of each prompt.
        epochs: passes over a rollout.
        minibatches: optimizer steps of one pass; by default the algorithm's, but no more than
            prompts_per_step.
        tokens_per_microbatch: tokens of one forward and backward.
        checkpoint_activations: keep layers' inputs alone and compute the rest again in the backward
            pass: less memory, one more forward.
        max_prompt_length: longer prompts are dropped before the first step and counted; None is
            what fits the model with max_new_tokens.
        scale_scores: divide scores by the standard deviation (over count - 1) of all of this run so
            far, before they are clipped (Zheng et al., 2023, PPO-max). It is a KL coefficient
            multiplied by that deviation. First the mean of the first rollout is taken off, a
            constant, which moves no optimum.
        normalize_scores: the same, less the mean of all of this run so far.
        score_clip: scores are then clipped to +- this; 0 leaves them. Without scale_scores or
            normalize_scores they are clipped as the reward gave them: of rewards far from 0 nothing
            is left (score_clip_fraction).
        missing_eos_penalty: subtracted from the score of a completion that did not end by itself.
        overlong_buffer: tokens before max_new_tokens over which overlong_penalty rises from 0 to
            its whole; 0 is off.
        overlong_penalty: subtracted from the score of a completion of max_new_tokens.
        refill_tries: dynamic sampling: how often, at most, groups whose scores are all equal are
            replaced by those of other prompts; 0 keeps them.
        max_invalid_fraction: of a rollout's rewards (raised, NaN, wrong type); above it the run
            stops, below it those samples are left out.
        max_logp_diff: mean absolute difference between sampler and trainer log-probabilities above
            which the run stops.
        strict: the trainer's log-probabilities are bitwise the sampler's, at the cost of one more
            forward in training (float32 and bfloat16).
        skip_bad_lines: write malformed lines to <run>/rejects.jsonl and go on, instead of stopping
            with all of them listed.
        dtype: of the parameters: auto is float32 on CPU and bfloat16 on CUDA.
        device: cpu, cuda, or None for the best there is.
        lora: train adapters on the frozen model; lora.rank, lora.alpha, lora.targets or lora.rslora
            turns it on. <run>/model then holds them merged, <run>/adapter by themselves.
        replay: train on earlier rollouts, too; replay.capacity, replay.fraction or replay.max_age
            turns it on.
        ptx: learn texts in the same optimizer steps, so that the policy does not forget them;
            ptx.data turns it on.
        reference: frozen is a second copy of the weights; adapter_off is the policy with its
            adapter switched off, which takes no memory; host is a copy in the host's memory that
            comes to the GPU to score; auto is adapter_off with lora and frozen without.
        critic: for algorithms that have one. None is a value head on the policy's trunk, trained
            with it by one loss; critic.warmup_steps trains that head alone at first, and
            critic.model is a critic of its own in its place, which <run>/critic then holds.
        evaluation: on held-out prompts while training; evaluation.data turns it on.
        alarm: what is done about signs of reward hacking.
    """

    model: str
    data: str
    reward: tuple[str, ...]
    algorithm: str = "ppo"
    reward_weights: tuple[float, ...] | None = None
    monitor_reward: tuple[str, ...] = ()
    steps: int = 100
    prompts_per_step: int = 64
    samples_per_prompt: int = OF_ALGORITHM
    epochs: int = OF_ALGORITHM
    minibatches: int = OF_ALGORITHM
    tokens_per_microbatch: int = 8192
    checkpoint_activations: bool = False
    max_prompt_length: int | None = None
    scale_scores: bool = False
    normalize_scores: bool = OF_ALGORITHM
    score_clip: float | None = OF_ALGORITHM
    missing_eos_penalty: float = 0.0
    overlong_buffer: int = 0
    overlong_penalty: float = 1.0
    refill_tries: int = OF_ALGORITHM
    max_invalid_fraction: float = 0.1
    max_logp_diff: float = 0.05
    strict: bool = False
    skip_bad_lines: bool = False
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str | None = None
    lora: LoRAConfig | None = None
    replay: ReplayConfig | None = None
    ptx: PtxConfig | None = None
    reference: Literal["auto", "frozen", "adapter_off", "host"] = "auto"
    critic: CriticConfig | None = None
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    kl: KLConfig = field(default_factory=KLConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    penalty: PenaltyConfig = field(default_factory=PenaltyConfig)
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)
    trpo: TRPOConfig = field(default_factory=TRPOConfig)
    evaluation: EvaluationConfig | None = None
    alarm: AlarmConfig = field(default_factory=AlarmConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        check_values(self)
        require(
            self.algorithm in ALGORITHMS,
            "algorithm",
            f"to be one of {', '.join(ALGORITHMS)}",
            self.algorithm,
        )
        row = self.row
        # also in place of a row's own objective
        on_policy = self.objective in ("reinforce", "trpo")
        critic = self.critic and replace(self.critic, optim=self.critic.optim.filled(row.eps))
        for name, value in (
            ("samples_per_prompt", either(self.samples_per_prompt, row.samples_per_prompt)),
            ("epochs", either(self.epochs, row.epochs)),
            (
                "minibatches",
                either(
                    self.minibatches,
                    1 if on_policy else max(1, min(row.minibatches, self.prompts_per_step)),
                ),
            ),
            ("optim", self.optim.filled(row.eps)),
            ("critic", critic),
            ("refill_tries", either(self.refill_tries, row.refill_tries)),
            ("normalize_scores", either(self.normalize_scores, row.normalize_scores)),
            ("score_clip", either(self.score_clip, row.score_clip)),
            ("kl", self.kl.filled(row)),
            ("loss", self.loss.filled(row)),
        ):
            object.__setattr__(self, name, value)
        for name in (
            "steps",
            "prompts_per_step",
            "samples_per_prompt",
            "epochs",
            "minibatches",
            "tokens_per_microbatch",
        ):
            require(getattr(self, name) >= 1, name, ">= 1", getattr(self, name))
        require(
            self.score_clip is None or self.score_clip >= 0, "score_clip", ">= 0", self.score_clip
        )
        require(
            len(self.reward) >= 1,
            "reward",
            "at least one file.py:function or reward-model directory",
            self.reward,
        )
        require(
            self.reward_weights is None or len(self.reward_weights) == len(self.reward),
            "reward_weights",
            f"{len(self.reward)} numbers, one per reward",
            self.reward_weights,
        )
        require(
            self.max_prompt_length is None or self.max_prompt_length >= 1,
            "max_prompt_length",
            ">= 1, or null for what fits",
            self.max_prompt_length,
        )
        require(
            0 <= self.max_invalid_fraction <= 1,
            "max_invalid_fraction",
            "in [0, 1]",
            self.max_invalid_fraction,
        )
        require(self.max_logp_diff > 0, "max_logp_diff", "> 0", self.max_logp_diff)
        require(
            self.reference != "adapter_off" or self.lora is not None,
            "reference",
            "frozen, host or auto without lora (there is no adapter to switch off)",
            self.reference,
        )
        require(
            self.critic is None or ADVANTAGES.get(self.advantage, "critic") == "critic",
            "critic",
            f"to be left out with {self.algorithm}, whose advantage "
            f"{self.advantage} has no use for values (the options contradict each other); ppo, a2c "
            "and others have a critic",
            self.critic,
        )
        require(
            self.critic is None or self.critic.warmup_steps < self.steps,
            "critic.warmup_steps",
            f"< steps = {self.steps}, else no policy is trained",
            self.critic and self.critic.warmup_steps,
        )
        require(
            self.critic is None
            or self.critic.model != "trunk"
            or self.critic.warmup_steps > 0
            or self.critic.optim == OptimConfig(),
            "critic.optim",
            "only with critic.model (policy is a copy of its weights) or critic.warmup_steps: a "
            "head on the policy's trunk is trained by optim, with the "
            "policy",
            "neither",
        )
        rollouts = self.prompts_per_step * self.samples_per_prompt
        require(
            self.minibatches <= rollouts,
            "minibatches",
            f"<= prompts_per_step x samples_per_prompt = {rollouts}",
            self.minibatches,
        )
        require(
            not self.generation.truncates,
            "generation",
            "without top_k, top_p and min_p (the trainer scores the full distribution, "
            "so a truncated sampler biases every ratio; use temperature)",
            (self.generation.top_k, self.generation.top_p, self.generation.min_p),
        )
        require(
            self.generation.temperature > 0,
            "generation.temperature",
            "> 0 (greedy rollouts do not explore)",
            self.generation.temperature,
        )
        require(
            self.samples_per_prompt > 1 or ADVANTAGES.get(self.advantage) != "group",
            "samples_per_prompt",
            f"> 1 for {self.algorithm} (its advantage, "
            f"{self.advantage}, compares the completions of one prompt: one alone has the "
            "advantage 0 and teaches nothing; 8 is usual)",
            self.samples_per_prompt,
        )
        if self.objective == "trpo":
            require(
                self.minibatches == 1,
                "minibatches",
                "1 with the objective trpo (its one step is on the whole rollout)",
                self.minibatches,
            )
            require(
                self.replay is None,
                "replay",
                "to be left out with the objective trpo (its bound is about one rollout)",
                self.replay,
            )
            require(
                self.dtype != "bfloat16",
                "dtype",
                "float32 with the objective trpo (its step is rounded away in 16 bits)",
                self.dtype,
            )
            require(
                self.kl.coef == 0 or self.kl.estimator != "full",
                "kl.estimator",
                "k1, k2, k3 or abs with the objective trpo",
                self.kl.estimator,
            )
        require(
            0 <= self.overlong_buffer <= self.generation.max_new_tokens,
            "overlong_buffer",
            f"within 0 and generation.max_new_tokens = {self.generation.max_new_tokens}",
            self.overlong_buffer,
        )
        require(
            self.objective != "reinforce" or (self.replay is None and not self.correction.bypass),
            "loss.objective",
            "with a ratio (importance, ppo_clip, "
            "...) for replay and correction.bypass: without one the tokens of another policy count "
            "as this one's own",
            self.objective,
        )
        require(
            self.refill_tries == 0 or (self.refill_tries > 0 and self.samples_per_prompt > 1),
            "refill_tries",
            ">= 0, and 0 with samples_per_prompt = 1",
            self.refill_tries,
        )

    @property
    def title(self) -> str:
        """What the run is called on the terminal."""
        return self.algorithm

    @property
    def row(self) -> Algorithm:
        """The algorithm's row."""
        return ALGORITHMS[self.algorithm]

    @property
    def advantage(self) -> str:
        """The advantage's name: the loss's own, or the algorithm's."""
        return self.loss.advantage or self.row.advantage

    @property
    def objective(self) -> str:
        """The objective's name: the loss's own, or the algorithm's."""
        return self.loss.objective or self.row.objective

    @property
    def own_critic(self) -> CriticConfig | None:
        """The critic, where it is one of its own and no head on the policy's trunk."""
        return None if self.critic is None or self.critic.model == "trunk" else self.critic

    @property
    def critic_warmup(self) -> int:
        """How many rollouts train the critic alone."""
        return 0 if self.critic is None else self.critic.warmup_steps

    @property
    def idle_bounds(self) -> tuple[str, ...]:
        """What bounds ratios or values here and never acts, as with one optimizer step a rollout
        all of them are what they were: `name value`."""
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
    def needs_reference(self) -> bool:
        """Whether anything is compared with a reference."""
        return self.kl.coef > 0 or self.kl.measure

    @property
    def reference_kind(self) -> str:
        """`reference`, with auto resolved: frozen, adapter_off or host."""
        return (
            self.reference
            if self.reference != "auto"
            else "frozen"
            if self.lora is None
            else "adapter_off"
        )
