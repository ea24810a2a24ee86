"""Policy optimisation: what keeps the policy near its reference, advantage and loss, and the run itself."""
from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from fusedrl.engine.algorithms import ADVANTAGES, ALGORITHMS, BOUNDS, OBJECTIVES, Algorithm
from fusedrl.engine.config.base import GenerationConfig, LoRAConfig, OptimConfig, RunConfig, either, require
from fusedrl.engine.config.monitor import AlarmConfig, EvaluationConfig
from fusedrl.engine.config.off_policy import CorrectionConfig, ReplayConfig

OF_ALGORITHM: Any = None  # the default of a field that the algorithm's row fills in where it is left out
_AGGREGATIONS = ("token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum", "sequence_sum_norm")


@dataclass(frozen=True)
class KLConfig:
    """What keeps the policy near its reference, and where it acts. The place decides what is converged to, not only how fast:

    reward  -coef * k1 at every token (Ziegler et al., 2019). Exact: the optimum is ref * exp(reward / coef), whatever is done to advantages.
    loss    + coef * kl_t in the loss, with the gradient of the estimator at each token. The usual k3 follows KL(ref || pi) and k2 KL(pi || ref), but both
            forget that a token changes the states behind it, and a normalised advantage rescales coef prompt by prompt. Exact are k2 and
            full with level="future", and k2 with level="sequence", which is noisy.

    Fields without a default here take the algorithm's (algorithms.py).

    Args:
        coef: the coefficient, or its initial value when it adapts; 0 is none, and then no reference is loaded.
        placement: reward or loss.
        estimator: in the loss k1, k2, k3, abs, or full, which is no estimate but the KL over the whole vocabulary (one more forward of the reference); in
            the reward only k1, since any other drops a term of the gradient.
        level: in the loss, of tokens or (k2) of whole sequences; future (k2, full): of tokens, and the advantage is less coef times the k1 of the tokens
            to come, which is what tokens alone leave out.
        through_ratio: in the loss, the estimator (k1, k3) times the ratio, both with their gradients: that of KL(pi || ref) at each state, also where the
            tokens are another policy's, as in later epochs and from a replay buffer (DeepSeek-V3.2, 2025, unbiased KL estimate).
        target: KL per sequence, in nats, that the coefficient adapts to; None keeps it fixed.
        horizon: episodes over which the coefficient adapts.
        measure: load the reference and report the KL even where the coefficient is 0.
    """

    coef: float = OF_ALGORITHM
    placement: Literal["reward", "loss"] = OF_ALGORITHM
    estimator: Literal["k1", "k2", "k3", "abs", "full"] = OF_ALGORITHM
    level: Literal["token", "sequence", "future"] = "token"
    through_ratio: bool = False
    target: float | None = None
    horizon: float = 10_000.0
    measure: bool = False

    def __post_init__(self) -> None:
        require(self.coef is None or 0 <= self.coef < math.inf, "kl.coef", ">= 0", self.coef)
        require(self.placement in (None, "reward", "loss"), "kl.placement", "reward or loss", self.placement)
        require(self.estimator in (None, "k1", "k2", "k3", "abs", "full"), "kl.estimator", "k1, k2, k3, abs or full", self.estimator)
        require(self.level in ("token", "sequence", "future"), "kl.level", "token, sequence or future", self.level)
        require(self.target is None or (self.target > 0 and self.coef != 0), "kl.target", "> 0 with a coefficient > 0 (it is multiplied, so 0 stays 0)",
                 (self.target, self.coef))
        require(self.horizon > 0, "kl.horizon", "> 0", self.horizon)
        require(self.placement != "reward" or self.estimator in (None, "k1"), "kl.estimator", "k1 with kl.placement = reward (any other drops a term of "
                 "the gradient of the KL there and moves the optimum; put it into the loss)", self.estimator)
        fitting = {"token": None, "sequence": (None, "k2"), "future": (None, "k2", "full")}[self.level]
        require(fitting is None or (self.placement != "reward" and self.estimator in fitting), "kl.level", "sequence only with kl.placement = loss and "
                 "kl.estimator = k2, future only with loss and k2 or full", (self.level, self.placement, self.estimator))
        require(not self.through_ratio or (self.placement != "reward" and self.estimator in (None, "k1", "k3") and self.level == "token"), "kl.through_ratio",
                "only with kl.placement = loss, kl.estimator = k1 or k3, and kl.level = token", (self.placement, self.estimator, self.level))

    def filled(self, row: Algorithm) -> KLConfig:
        """With the row's values where nothing was said."""
        placement = self.placement or ("loss" if self.level != "token" or self.through_ratio else row.kl_placement)
        usual = "k1" if placement == "reward" else "k2" if self.level != "token" else "k3"
        usual = row.kl_estimator if usual == "k3" and row.kl_placement == "loss" and not self.through_ratio else usual
        return replace(self, coef=either(self.coef, row.kl_coef), placement=placement, estimator=self.estimator or usual)


@dataclass(frozen=True)
class PenaltyConfig:
    """The coefficient of the objective ppo_penalty, which adapts to the KL from the policy of the rollout to that of the last pass, per token.

    Either between two thresholds, or around a target d: thresholds d / 1.5 and 1.5 d (Schulman et al., 2017, section 4). Above the upper one the coefficient
    is doubled, below the lower one halved.

    Args:
        coef: its initial value.
        target: nats per token; None: thresholds.
        kl_min, kl_max: the thresholds, in nats per token, in place of a target.
    """

    coef: float = 1.0
    target: float | None = None
    kl_min: float | None = None
    kl_max: float | None = None

    def __post_init__(self) -> None:
        require(self.coef > 0, "penalty.coef", "> 0", self.coef)
        require(self.target is None or self.target > 0, "penalty.target", "> 0", self.target)
        require((self.kl_min is None) == (self.kl_max is None) and (self.target is None or self.kl_min is None), "penalty",
                 "either target, or both kl_min and kl_max", (self.target, self.kl_min, self.kl_max))
        require(self.kl_min is None or self.kl_max is None or 0 <= self.kl_min < self.kl_max, "penalty.kl_min", ">= 0 and below kl_max",
                 (self.kl_min, self.kl_max))

    @property
    def thresholds(self) -> tuple[float, float]:
        """(lower, upper)."""
        if self.kl_min is not None and self.kl_max is not None:
            return self.kl_min, self.kl_max
        target = 0.01 if self.target is None else self.target
        return target / 1.5, target * 1.5


@dataclass(frozen=True)
class CriticConfig:
    """A critic of its own in place of a value head on the policy's trunk: another decoder and a linear head on it.

    It may be of any size and family that has the policy's vocabulary. It is optimised by itself, so neither its gradients nor their norm reach the policy.
    InstructGPT and MOSS start it from the reward model.

    Args:
        model: where it starts from: policy, a copy of the policy's initial weights; another language model; <run>/critic of an earlier run (the value head
            beside the weights is read, else one of zeros is made); or a reward model, whose score, at every position, is then the first value.
        warmup_steps: of `steps`, the first so many rollouts train the critic alone (Zheng et al., 2023, pre-train it so); the policy, its learning rate and the
            adaptive coefficients stand still meanwhile.
        optim: as the policy's.
    """

    model: str = "policy"
    warmup_steps: int = 0
    optim: OptimConfig = field(default_factory=OptimConfig)

    def __post_init__(self) -> None:
        require(bool(self.model), "critic.model", "policy, or a directory or id of a model", self.model)
        require(self.warmup_steps >= 0, "critic.warmup_steps", ">= 0", self.warmup_steps)


@dataclass(frozen=True)
class TRPOConfig:
    """The step of the objective trpo: along the natural gradient, as far as a KL allows.

    The values are those of Schulman et al. (2015), and Spinning Up's for the line search. The policy has no learning rate: optim is the value head's alone, on
    the value loss without loss.value_coef, and epochs are its passes. In float32.

    Args:
        max_kl: bound on KL(old || new), in nats per token, a mean over the tokens of the rollout, over the whole vocabulary.
        cg_iterations: of conjugate gradient, each a product with the Fisher matrix.
        damping: added to the Fisher matrix's diagonal. Where it outweighs the curvature the step is that of plain gradient descent: smaller is nearer to the
            natural gradient, and takes more iterations: where trpo/cg_residual stays above 1, they were too few.
        fisher_fraction: of a rollout's completions, those whose states the Fisher matrix of these products is of. The length of the step and the bound are of
            all of them.
        backtracks: how often, at most, the step is shortened; if none of the lengths keeps the bound and improves, the weights stay as they are.
        backtrack_ratio: what it is shortened by.
        accept_ratio: of the improvement that the gradient promises, the least to accept.
        schedule: of the bound's root, the length of a step: constant, or linear to zero at the last step. With the KL to the reference in the reward steps of
            constant length end up circling the optimum.
    """

    max_kl: float = 0.01
    cg_iterations: int = 10
    damping: float = 0.1
    fisher_fraction: float = 0.1
    backtracks: int = 10
    backtrack_ratio: float = 0.8
    accept_ratio: float = 0.1
    schedule: Literal["constant", "linear"] = "constant"

    def __post_init__(self) -> None:
        require(self.max_kl > 0, "trpo.max_kl", "> 0", self.max_kl)
        require(self.cg_iterations >= 1, "trpo.cg_iterations", ">= 1", self.cg_iterations)
        require(self.damping >= 0, "trpo.damping", ">= 0", self.damping)
        require(0 < self.fisher_fraction <= 1, "trpo.fisher_fraction", "in (0, 1]", self.fisher_fraction)
        require(self.backtracks >= 0, "trpo.backtracks", ">= 0", self.backtracks)
        require(0 < self.backtrack_ratio < 1, "trpo.backtrack_ratio", "in (0, 1)", self.backtrack_ratio)
        require(0 <= self.accept_ratio < 1, "trpo.accept_ratio", "in [0, 1)", self.accept_ratio)

    def at(self, step: int, total: int) -> TRPOConfig:
        """With the bound of step `step` (from 0) of `total`."""
        return self if self.schedule == "constant" else replace(self, max_kl=self.max_kl * (1 - step / total) ** 2)


@dataclass(frozen=True)
class PtxConfig:
    """Pretraining in every optimizer step of the policy, against forgetting: PPO-ptx.

    The loss gains coef times the mean cross-entropy of a draw of texts (Ouyang et al., 2022, eq. 2).

    Args:
        data: as of sft: JSONL with {"text"}, which is learned whole, {"prompt", "completion"}, ...; several files mix by weight.
        coef: in nats of the loss per nat of a token; 0 is none. InstructGPT's 27.8 stands beside a policy loss of its own scale; watch loss/ptx.
        sequences_per_step: texts of one optimizer step, of which a rollout has epochs x minibatches (trpo: one).
        max_length: longer texts are dropped and counted; None is the model's own limit.
        learn_prompts: where rows have a prompt, learn it as well.
    """

    data: str = ""
    coef: float = 27.8
    sequences_per_step: int = 32
    max_length: int | None = None
    learn_prompts: bool = False

    def __post_init__(self) -> None:
        require(bool(self.data), "ptx.data", "a file of texts beside the other options of ptx", self.data)
        require(self.coef >= 0, "ptx.coef", ">= 0", self.coef)
        require(self.sequences_per_step >= 1, "ptx.sequences_per_step", ">= 1", self.sequences_per_step)
        require(self.max_length is None or self.max_length >= 2, "ptx.max_length", ">= 2", self.max_length)


@dataclass(frozen=True)
class LossConfig:
    """Advantage and loss. Defaults of PPO: Ziegler et al. (2019) and Stiennon et al. (2020), as re-implemented by Huang et al. (2024). Fields without a
    default here take the algorithm's (algorithms.py), and the bounds of a ratio those of the objective (kernels/objective.py).

    Args:
        advantage: in place of the algorithm's: a name, or module.function.
        objective: in place of the algorithm's: a name, or module.function.
        gamma: discount per token.
        lam: lambda of GAE.
        k: of k-step advantages, the steps ahead.
        discount_states: weigh the advantage of token t by gamma^t, as in Sutton and Barto's REINFORCE; nobody does for language models.
        whiten: advantages to mean 0 and variance 1 (population) over the whole batch of a step.
        advantage_clip: advantages are then clipped to +- this; 0 leaves them.
        clip_low: the ratio is clipped below at 1 - clip_low.
        clip_high: the ratio is clipped above at 1 + clip_high.
        dual_clip: bound on ratio x |A| for negative advantages; None is off.
        clip_max: of cispo, the cap on the ratio.
        tau_positive: of sapo, the temperature of the gate where A > 0.
        tau_negative: of sapo, the temperature of the gate where A < 0.
        beta: of dro, the weight of the square; of ppo_penalty, a fixed coefficient in place of the adaptive one.
        value_clip: values move at most this far from the old ones; None is off.
        value_coef: weight of the value loss. A critic of its own has gradients of its own, so that there the weight acts through epsilon and clip alone.
        entropy_coef: weight of the entropy bonus.
        entropy_target: in place of the bonus, entropy_coef |H - entropy_target|, H the mean entropy of the rollout's tokens in nats, is minimised (Zheng et
            al., 2023): below the target entropy is a bonus, above it a cost. A target above log(vocabulary), such as their 35, is a bonus always.
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
    aggregation: Literal["token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum", "sequence_sum_norm"] = OF_ALGORITHM

    def __post_init__(self) -> None:
        require(0 <= self.gamma <= 1, "loss.gamma", "in [0, 1]", self.gamma)
        require(0 <= self.lam <= 1, "loss.lam", "in [0, 1]", self.lam)
        require(self.k >= 1, "loss.k", ">= 1", self.k)
        require(self.advantage_clip is None or self.advantage_clip >= 0, "loss.advantage_clip", ">= 0", self.advantage_clip)
        require(self.entropy_target is None or (self.entropy_target >= 0 and self.entropy_coef > 0), "loss.entropy_target",
                 ">= 0 with loss.entropy_coef > 0, which weighs the distance to it", (self.entropy_target, self.entropy_coef))
        require(self.clip_low is None or 0 < self.clip_low < 1, "loss.clip_low", "in (0, 1)", self.clip_low)
        require(self.clip_high is None or self.clip_high > 0, "loss.clip_high", "> 0", self.clip_high)
        require(self.dual_clip is None or self.dual_clip > 1, "loss.dual_clip", "> 1", self.dual_clip)
        require(self.value_clip is None or self.value_clip > 0, "loss.value_clip", "> 0, or null for none", self.value_clip)
        require(self.value_coef >= 0, "loss.value_coef", ">= 0", self.value_coef)
        require(self.entropy_coef >= 0, "loss.entropy_coef", ">= 0", self.entropy_coef)
        require(self.aggregation in (None, *_AGGREGATIONS), "loss.aggregation", f"one of {', '.join(_AGGREGATIONS)}", self.aggregation)

    def filled(self, row: Algorithm) -> LossConfig:
        """With the row's values, and its objective's, where nothing was said."""
        usual = OBJECTIVES.get(self.objective or row.objective, ("", {}))[1]
        bounds = {name: either(getattr(self, name), usual.get(name)) for name in BOUNDS}
        return replace(self, whiten=either(self.whiten, row.whiten), advantage_clip=either(self.advantage_clip, row.advantage_clip),
                       aggregation=self.aggregation or row.aggregation, **bounds)


@dataclass(frozen=True)
class PolicyConfig:
    """Policy optimisation by any of the ALGORITHMS; by default PPO with a value head on the policy's trunk and the KL inside the reward.

    Fields without a default here are filled in from the algorithm's row as the object is made; make another one for another algorithm.

    Args:
        model: directory or id of the policy to train; its initial weights are the reference.
        data: JSONL file (.gz too) with a "prompt" column, or preference pairs, whose common prefix is the prompt.
        reward: rewards, each file.py:function, or a directory of a reward model.
        algorithm: ppo, grpo, rloo, ...: a row of algorithms.py.
        reward_weights: one weight per reward; None weighs each 1.
        monitor_reward: rewards that are measured at every step and never trained on, as gold/<name>/mean.
        steps: rollouts, each followed by epochs x minibatches optimizer steps (trpo: by one step of the policy and epochs of its values).
        prompts_per_step: prompts of one rollout.
        samples_per_prompt: completions of each prompt.
        epochs: passes over a rollout.
        minibatches: optimizer steps of one pass.
        tokens_per_microbatch: tokens of one forward and backward.
        checkpoint_activations: keep layers' inputs alone and compute the rest again in the backward pass: less memory, one more forward.
        max_prompt_length: longer prompts are dropped before the first step and counted; None is what fits the model with max_new_tokens.
        scale_scores: divide scores by the standard deviation (over count - 1) of all of this run so far, before they are clipped (Zheng et al., 2023, PPO-max).
            It is a KL coefficient multiplied by that deviation.
        normalize_scores: take the mean of all of this run so far off, too.
        score_clip: scores are then clipped to +- this; 0 leaves them.
        missing_eos_penalty: subtracted from the score of a completion that did not end by itself.
        overlong_buffer: tokens before max_new_tokens over which overlong_penalty rises from 0 to its whole; 0 is off.
        overlong_penalty: subtracted from the score of a completion of max_new_tokens.
        refill_tries: dynamic sampling: how often, at most, groups whose scores are all equal are replaced by those of other prompts; 0 keeps them.
        max_invalid_fraction: of a rollout's rewards (raised, NaN, wrong type); above it the run stops, below it those samples are left out.
        max_logp_diff: mean absolute difference between sampler and trainer log-probabilities above which the run stops.
        strict: the trainer's log-probabilities are bitwise the sampler's, at the cost of one more forward in training (CPU).
        skip_bad_lines: write malformed lines to <run>/rejects.jsonl and go on, instead of stopping with all of them listed.
        dtype: of the parameters: auto is float32 on CPU and bfloat16 on CUDA.
        device: cpu, cuda, or None for the best there is.
        lora: train adapters on the frozen model; lora.rank, lora.alpha, lora.targets or lora.rslora turns it on. <run>/model then holds them merged,
            <run>/adapter by themselves.
        replay: train on earlier rollouts, too; replay.capacity, replay.fraction or replay.max_age turns it on.
        ptx: learn texts in the same optimizer steps, so that the policy does not forget them; ptx.data turns it on.
        reference: frozen is a second copy of the weights; adapter_off is the policy with its adapter switched off, which takes no memory; host is a copy in
            the host's memory that comes to the GPU to score; auto is adapter_off with lora and frozen without.
        critic: a critic of its own, for algorithms that have one; critic.model, critic.warmup_steps or critic.optim turns it on. None is a value head on the
            policy's trunk, trained with it by one loss. <run>/critic then holds it.
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
    minibatches: int = 1
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
        require(self.algorithm in ALGORITHMS, "algorithm", f"to be one of {', '.join(ALGORITHMS)}", self.algorithm)
        row = self.row
        for name, value in (("samples_per_prompt", either(self.samples_per_prompt, row.samples_per_prompt)), ("epochs", either(self.epochs, row.epochs)),
                            ("refill_tries", either(self.refill_tries, row.refill_tries)),
                            ("normalize_scores", either(self.normalize_scores, row.normalize_scores)), ("score_clip", either(self.score_clip, row.score_clip)),
                            ("kl", self.kl.filled(row)), ("loss", self.loss.filled(row))):
            object.__setattr__(self, name, value)
        for name in ("steps", "prompts_per_step", "samples_per_prompt", "epochs", "minibatches", "tokens_per_microbatch"):
            require(getattr(self, name) >= 1, name, ">= 1", getattr(self, name))
        require(self.score_clip is None or self.score_clip >= 0, "score_clip", ">= 0", self.score_clip)
        require(len(self.reward) >= 1, "reward", "at least one file.py:function or reward-model directory", self.reward)
        require(self.reward_weights is None or len(self.reward_weights) == len(self.reward), "reward_weights",
                 f"{len(self.reward)} numbers, one per reward", self.reward_weights)
        require(self.reward_weights is None or all(map(math.isfinite, self.reward_weights)), "reward_weights", "finite numbers", self.reward_weights)
        require(self.max_prompt_length is None or self.max_prompt_length >= 1, "max_prompt_length", ">= 1, or null for what fits", self.max_prompt_length)
        require(0 <= self.max_invalid_fraction <= 1, "max_invalid_fraction", "in [0, 1]", self.max_invalid_fraction)
        require(self.max_logp_diff > 0, "max_logp_diff", "> 0", self.max_logp_diff)
        require(self.reference != "adapter_off" or self.lora is not None, "reference", "frozen, host or auto without lora (there is no adapter to switch off)",
                 self.reference)
        require(self.critic is None or ADVANTAGES.get(self.advantage, "critic") == "critic", "critic", f"to be left out with {self.algorithm}, whose advantage "
                 f"{self.advantage} has no use for values (the options contradict each other); ppo, a2c and others have a critic", self.critic)
        require(self.critic is None or self.critic.warmup_steps < self.steps, "critic.warmup_steps", f"< steps = {self.steps}, else no policy is trained",
                 self.critic and self.critic.warmup_steps)
        rollouts = self.prompts_per_step * self.samples_per_prompt
        require(self.minibatches <= rollouts, "minibatches", f"<= prompts_per_step x samples_per_prompt = {rollouts}", self.minibatches)
        require(not self.generation.truncates, "generation", "without top_k, top_p and min_p (the trainer scores the full distribution, "
                 "so a truncated sampler biases every ratio; use temperature)", (self.generation.top_k, self.generation.top_p, self.generation.min_p))
        require(self.generation.temperature > 0, "generation.temperature", "> 0 (greedy rollouts do not explore)", self.generation.temperature)
        require(self.samples_per_prompt > 1 or ADVANTAGES.get(self.advantage) != "group", "samples_per_prompt", f"> 1 for {self.algorithm} (its advantage, "
                 f"{self.advantage}, compares the completions of one prompt: one alone has the advantage 0 and teaches nothing; 8 is usual)",
                 self.samples_per_prompt)
        if self.objective == "trpo":
            require(self.minibatches == 1, "minibatches", "1 with the objective trpo (its one step is on the whole rollout)", self.minibatches)
            require(self.replay is None, "replay", "to be left out with the objective trpo (its bound is about one rollout)", self.replay)
            require(self.dtype != "bfloat16", "dtype", "float32 with the objective trpo (its step is rounded away in 16 bits)", self.dtype)
            require(self.kl.coef == 0 or self.kl.estimator != "full", "kl.estimator", "k1, k2, k3 or abs with the objective trpo", self.kl.estimator)
        require(0 <= self.overlong_buffer <= self.generation.max_new_tokens, "overlong_buffer", "within 0 and generation.max_new_tokens = "
                 f"{self.generation.max_new_tokens}", self.overlong_buffer)
        require(self.objective != "reinforce" or (self.replay is None and not self.correction.bypass), "loss.objective", "with a ratio (importance, ppo_clip, "
                "...) for replay and correction.bypass: without one the tokens of another policy count as this one's own", self.objective)
        require(self.refill_tries == 0 or (self.refill_tries > 0 and self.samples_per_prompt > 1), "refill_tries", ">= 0, and 0 with samples_per_prompt = 1",
                 self.refill_tries)

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
    def needs_reference(self) -> bool:
        """Whether anything is compared with a reference."""
        return self.kl.coef > 0 or self.kl.measure

    @property
    def reference_kind(self) -> str:
        """`reference`, with auto resolved: frozen, adapter_off or host."""
        return self.reference if self.reference != "auto" else "frozen" if self.lora is None else "adapter_off"
