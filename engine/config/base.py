"""Parts of every stage's configuration: optimizer, adapters, run directory, sampling of
completions."""

from __future__ import annotations

import difflib
import json
import math
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from operator import attrgetter
from os import PathLike
from typing import Any, Literal

from fusedrl.engine.base.errors import ConfigError


def require(condition: bool, where: str, expected: str, found: object) -> None:
    """Raise ConfigError unless the condition holds."""
    if not condition:
        raise ConfigError(f"config: expected {where} {expected}, got {_short(found)}")


def _short(found: object) -> str:
    """Return a value as a message shows it; of a group of options those that are not the usual
    ones."""
    if not is_dataclass(found) or isinstance(found, type):
        return repr(found)
    changed = [
        f"{one.name} = {getattr(found, one.name)!r}"
        for one in fields(found)
        if getattr(found, one.name) != one.default and not is_dataclass(getattr(found, one.name))
    ]
    return ", ".join(changed) or "its usual options"


def check(config: Any, group: str, *rows: tuple[Any, ...]) -> None:
    """Raise ConfigError for the first check whose condition does not hold.

    Args:
        config: the object whose fields are checked.
        group: prefix of the object's options ("optim" for optim.lr); "" for options without a
            prefix.
        rows: checks (field, condition, what is expected[, what was found]). By default the field's
            value is what was found. The field "" stands for the whole group.
    """
    for field_, condition, expected, *found in rows:
        where = ".".join(name for name in (group, field_) if name)
        require(condition, where, expected, found[0] if found else attrgetter(field_)(config))


def settle_data(config: Any) -> None:
    """Write `config.data` as one text. A path, a mapping (such as {"path": FILE, "columns":
    {"prompt": "question"}}), a source and a list of these become JSON."""
    data = config.data
    if not isinstance(data, str):
        object.__setattr__(config, "data", data_text(data))


def data_text(data: Any) -> str:
    """Return as one text what a data option was given from Python or YAML.

    Raises:
        ConfigError: it is neither a path, a mapping nor a list.
    """
    if isinstance(data, str | PathLike):
        return str(data)
    return "" if not data else json.dumps(_data_json(data))


def _data_json(data: Any) -> Any:
    if is_dataclass(data) and not isinstance(data, type):
        data = {key: value for key, value in vars(data).items() if value not in (None, {})}
    if isinstance(data, str | PathLike):
        return str(data)
    if isinstance(data, Mapping):
        return {str(key): _plain_value(value) for key, value in data.items()}
    require(isinstance(data, list | tuple), "data", "a file, a mapping or a list of these", data)
    return [_data_json(entry) for entry in data]


def _plain_value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): one if one is None else str(one) for key, one in value.items()}
    return value if isinstance(value, str | int | float | list | tuple | None) else str(value)


def check_values(config: StageConfig) -> None:
    """Raise ConfigError unless all numbers are finite, and model and data are not empty."""

    def finite(value: Any, name: str) -> None:
        if is_dataclass(value):
            for one in fields(value):
                finite(getattr(value, one.name), f"{name}.{one.name}" if name else one.name)
        for number in value if isinstance(value, tuple) else (value,):
            holds = not isinstance(number, float) or math.isfinite(number)
            require(holds, name, "to be finite", value)

    finite(config, "")
    check(
        config,
        "",
        ("model", bool(config.model), "a directory or id of a model"),
        ("data", bool(config.data), "a file"),
    )


def _listed(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def either(value: Any, usual: Any) -> Any:
    """Return `value`, or `usual` if `value` is None."""
    return usual if value is None else value


@dataclass(frozen=True)
class OptimConfig:
    """Options of the optimizer, AdamW.

    Args:
        lr: peak learning rate.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment; None takes the algorithm's value, 1e-5 for ppo
            and ppo_penalty (Huang et al., 2024, "The N+ implementation details") and 1e-8 for all
            others. Parameters whose gradients are smaller than eps take shorter steps; the metric
            optim/below_epsilon is the share of such parameters.
        eps_mode: torch adds eps to the root of the unbiased second moment. tensorflow adds eps to
            the root of the biased one (Kingma and Ba, 2015, the form before section 2.1, "epsilon
            hat"). This equals torch's form with eps / sqrt(1 - beta2^t): 32 times as much at the
            first step, so that the first steps are smaller. Use tensorflow to compare a run with
            TensorFlow's (Ziegler et al., 2019).
        weight_decay: decoupled weight decay, applied to matrices only.
        schedule: after the warm-up, constant, or linear to zero at the last step.
        warmup_steps: optimizer steps of linear warm-up.
        max_grad_norm: global norm above which gradients are scaled down; 0 never scales them.
        state: number format of the moments: float32, or int8, which takes a quarter of the memory
            and needs torchao.
    """

    lr: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float | None = None
    eps_mode: Literal["torch", "tensorflow"] = "torch"
    weight_decay: float = 0.0
    schedule: Literal["constant", "linear"] = "linear"
    warmup_steps: int = 0
    max_grad_norm: float = 1.0
    state: Literal["float32", "int8"] = "float32"

    def __post_init__(self) -> None:
        check(
            self,
            "optim",
            ("lr", self.lr > 0, "> 0"),
            (
                "betas",
                len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas),
                "two numbers in [0, 1)",
            ),
            ("eps", self.eps is None or self.eps > 0, "> 0"),
            (
                "eps_mode",
                self.eps_mode == "torch" or self.state == "float32",
                "torch with optim.state = int8 (its compiled step has one epsilon)",
            ),
            ("weight_decay", self.weight_decay >= 0, ">= 0"),
            ("warmup_steps", self.warmup_steps >= 0, ">= 0"),
            ("max_grad_norm", self.max_grad_norm >= 0, ">= 0"),
        )

    def filled(self, eps: float) -> OptimConfig:
        """Return these options, with `eps` as the epsilon if none was set."""
        return self if self.eps is not None else replace(self, eps=eps)


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters on a frozen model (Hu et al., 2021).

    The weights are W + alpha / rank x B A, of which only A and B are trained. There is no dropout,
    because the sampler has none.

    Args:
        rank: rank of an adapter, the inner size of its two matrices; setting it turns adapters on.
        alpha: the adapter is scaled by alpha / rank.
        targets: linear layers to adapt, by PEFT's names: q_proj, k_proj, v_proj, o_proj, gate_proj,
            up_proj, down_proj (Phi-3: qkv_proj, gate_up_proj); all-linear adapts all of them.
        rslora: scale by alpha / sqrt(rank) instead (Kalajdzievski, 2023).
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ("all-linear",)
    rslora: bool = False

    def __post_init__(self) -> None:
        check(
            self,
            "lora",
            ("rank", self.rank >= 1, ">= 1"),
            ("alpha", self.alpha > 0, "> 0"),
            (
                "targets",
                len(self.targets) >= 1 and not isinstance(self.targets, str),
                "one target or more",
            ),
        )
        for name in self.targets:
            close = difflib.get_close_matches(name, LORA_TARGETS, 1, 0.5)
            require(
                name in LORA_TARGETS,
                "lora.targets",
                f"of {', '.join(LORA_TARGETS)}" + (f" (did you mean {close[0]}?)" if close else ""),
                name,
            )

    @property
    def scale(self) -> float:
        """Factor of the product B A in the adapted weights."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


LORA_TARGETS = (
    "all-linear",
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
    "qkv_proj",
    "gate_up_proj",
)


@dataclass(frozen=True)
class RunConfig:
    """Directory, seed, checkpoints and signals of a run.

    Args:
        dir: run directory; metrics, checkpoints and the final model go there.
        seed: seed of all random draws.
        resume: continue the run in `dir` from its newest complete checkpoint.
        restart: if `dir` holds records of a run without a complete checkpoint, move them into
            aside-1 (or the next free number) in it, and begin anew. A run that has a checkpoint is
            not touched.
        accept_changes: continue the run although its options, data, weights, tokenizer or reward
            model are not those that it was started with. What changed is written to
            <run>/changes.jsonl. Without it such a run is refused.
        save_every: steps between checkpoints, however long saving takes; 0 saves by time
            (save_minutes).
        save_minutes: minutes between checkpoints, or longer if saving would take more than 5% of
            the time. The first checkpoint is written after the first step, the last at the end. 0
            saves at the end only.
        signals: more signals, separated by commas, that save the run's state and stop it, as
            SIGINT, SIGTERM and SIGHUP do. For example SIGUSR1, which schedulers send before the
            time is up.
        keep: number of complete checkpoints to keep; the oldest are deleted first.
        keep_best: name of a metric, such as eval_reward. A step whose value is the best so far is
            saved at once, and its checkpoint is kept beside the newest ones, until a better one.
            The best is the smallest of metrics with loss or perplexity in their name, and the
            largest of all others; min:NAME and max:NAME choose. Choose a metric that is not
            measured at every step, since each new best is saved.
        progress: show live progress on the terminal.
        columns: metrics that the terminal shows, separated by commas, by their names in
            docs/metrics.md, instead of the main ones of the stage under short headings. An asterisk
            stands for any characters: kl,val/* or * for all.
        log: loggers that receive the metrics besides <run>/metrics.jsonl, separated by commas:
            wandb, tensorboard, trackio, the name of a registered one, or file.py:NAME of a class or
            a function.
    """

    dir: str = "runs/latest"
    seed: int = 0
    resume: bool = False
    restart: bool = False
    accept_changes: bool = False
    save_every: int = 0
    save_minutes: float = 10.0
    signals: str = ""
    keep: int = 2
    keep_best: str = ""
    progress: bool = True
    columns: str = ""
    log: str = ""

    def __post_init__(self) -> None:
        check(
            self,
            "run",
            ("seed", -(2**63) <= self.seed < 2**63, "an integer of 64 bits"),
            ("dir", bool(self.dir), "a directory"),
            ("save_every", self.save_every >= 0, ">= 0"),
            ("save_minutes", 0 <= self.save_minutes < math.inf, ">= 0"),
            ("keep", self.keep >= 1, ">= 1"),
        )
        for name in self.signal_names:
            require(
                name in signal.Signals.__members__ and name not in ("SIGKILL", "SIGSTOP"),
                "run.signals",
                "names of signals that a process can catch, such as SIGUSR1 or SIGUSR1,SIGUSR2",
                self.signals,
            )

    @property
    def signal_names(self) -> tuple[str, ...]:
        """Names in `signals`, one by one."""
        return tuple(name.upper() for name in _listed(self.signals))

    @property
    def column_names(self) -> tuple[str, ...]:
        """Names in `columns`, one by one."""
        return _listed(self.columns)

    @property
    def loggers(self) -> tuple[str, ...]:
        """Loggers in `log`, one by one."""
        return tuple(dict.fromkeys(_listed(self.log)))


@dataclass(frozen=True)
class ParallelConfig:
    """Options of runs on several devices.

    Args:
        lanes: number of partial sums (lanes) that gradients are added up in. It must be a multiple
            of the number of ranks (processes); runs with the same number have the same bits on any
            number of ranks. None: as many as there are ranks; with `strict` 8, if there are several
            ranks.
    """

    lanes: int | None = None

    def __post_init__(self) -> None:
        whole = self.lanes is None or (self.lanes >= 1 and self.lanes & (self.lanes - 1) == 0)
        check(self, "parallel", ("lanes", whole, "a power of two: 1, 2, 4, 8, ..."))


@dataclass(frozen=True)
class GenerationConfig:
    """Options of sampling rollouts.

    If top_k, top_p or min_p is set, the policy's log-probabilities are over the tokens that these
    options leave, and the reference's are over all tokens (docs/one-logprob.md).

    Args:
        max_new_tokens: largest number of tokens of a completion.
        temperature: number that the logits are divided by, both in sampling and in scoring.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the smallest set of tokens whose total probability reaches top_p; 1 keeps all.
        min_p: keep tokens with at least this fraction of the likeliest token's probability; 0 keeps
            all.
        stop_token_ids: token ids that end a completion, in addition to the model's own EOS.
        speculate: guess next tokens from earlier completions of the same prompt, and compute
            several of a sequence at once. It changes no bit of a completion. It saves time on a
            CPU, with a model of 100 million parameters or more, where few sequences are left and
            texts repeat one another (docs/guide.md says when).
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop_token_ids: tuple[int, ...] = ()
    speculate: bool = False

    def __post_init__(self) -> None:
        check(
            self,
            "generation",
            ("max_new_tokens", self.max_new_tokens >= 1, ">= 1"),
            ("temperature", self.temperature >= 0, ">= 0"),
            ("top_k", self.top_k >= 0, ">= 0; 0 keeps all"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]; 1 keeps all"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]; 0 keeps all"),
            ("stop_token_ids", all(token >= 0 for token in self.stop_token_ids), "token ids >= 0"),
        )

    @property
    def truncates(self) -> bool:
        """Whether top_k, top_p or min_p excludes tokens from being drawn."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """Options of every stage.

    Args:
        model: directory or id of the model to train.
        data: JSON lines, CSV (.gz too), Parquet, Arrow, or hf:ID:SPLIT; A@2,B@1 mixes several by
            weight, FILE:prompt=question reads the column "question" as "prompt" (docs/guide.md).
        tokens_per_microbatch: tokens of one forward and backward.
        checkpoint_activations: keep only the layers' inputs, and compute the rest again in the
            backward pass. This saves memory and costs one more forward.
        skip_bad_lines: write malformed lines to <run>/rejects.jsonl and continue, instead of
            stopping with a list of them.
        dtype: dtype of the parameters: auto is float32 on CPU and bfloat16 on CUDA.
        device: cpu or cuda, by default cuda if there is a GPU; None chooses so.
        lora: train adapters on the frozen model; lora.rank, lora.alpha, lora.targets or lora.rslora
            turns it on. <run>/model then holds the model with the adapters merged, <run>/adapter
            the adapters alone.

    Raises:
        ConfigError: a value is out of range, or options contradict each other.
    """

    model: str
    data: str
    tokens_per_microbatch: int = 8192
    checkpoint_activations: bool = False
    skip_bad_lines: bool = False
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str | None = None
    lora: LoRAConfig | None = None
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def check_stage(self) -> None:
        """Raise ConfigError unless the options of every stage are in range."""
        settle_data(self)
        check_values(self)
        check(self, "", ("tokens_per_microbatch", self.tokens_per_microbatch >= 1, ">= 1"))

    @property
    def title(self) -> str:
        """Name of the run on the terminal."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class GivenTextsConfig:
    """Options of the stages that learn from given texts.

    Args:
        epochs: passes over the data.
        eval_fraction: part of the data held out; its loss is reported after the last step.
        max_length: largest number of tokens of an example; longer ones are dropped and counted.
            None takes the model's own limit.
    """

    epochs: int = 1
    eval_fraction: float = 0.0
    max_length: int | None = None

    def check_texts(self) -> None:
        """Raise ConfigError unless the options of these stages are in range."""
        long_enough = self.max_length is None or self.max_length >= 2
        check(
            self,
            "",
            ("epochs", self.epochs >= 1, ">= 1"),
            ("max_length", long_enough, ">= 2, or null for the model's own limit"),
            ("eval_fraction", 0 <= self.eval_fraction < 1, "in [0, 1)"),
        )


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Options of the stages that learn from completions which the policy samples.

    Args:
        reward: one or more rewards, each file.py:function, the directory of a reward model, or a
            ready reward such as exact_match or length:budget=200 (docs/rewards.md).
        reward_weights: one weight per reward; None gives each the weight 1.
        reward_workers: worker processes (of each rank) that call reward functions while others are
            still generated, for one completion at a time; 0 calls them in this process, for a whole
            rollout at once. Reward models always run in this process (docs/rewards.md).
        reward_timeout: longest time of a call in a worker process, in seconds. A completion whose
            call takes longer is invalid, and the process is replaced.
        steps: number of rollouts, each followed by epochs x minibatches optimizer steps.
        prompts_per_step: prompts of one rollout.
        samples_per_prompt: completions of each prompt.
        epochs: passes over a rollout.
        minibatches: optimizer steps of one pass.
        max_prompt_length: largest number of tokens of a prompt; longer ones are dropped before the
            first step and counted. None takes what fits the model together with max_new_tokens.
        missing_eos_penalty: subtracted from the score of a completion that was cut off before it
            ended.
        max_invalid_fraction: largest share of a rollout's samples whose reward may be invalid (it
            raised, is NaN or of a wrong type). Above this share the run stops; up to it the invalid
            samples are left out.
    """

    model: str
    data: str
    reward: tuple[str, ...]
    steps: int
    prompts_per_step: int
    samples_per_prompt: int
    epochs: int
    minibatches: int
    reward_weights: tuple[float, ...] | None = None
    reward_workers: int = 0
    reward_timeout: float = 60.0
    max_prompt_length: int | None = None
    missing_eos_penalty: float = 0.0
    max_invalid_fraction: float = 0.1
    generation: GenerationConfig = field(default_factory=GenerationConfig)

    @property
    def plays(self) -> bool:
        """Whether an environment answers the policy's turns and rewards them."""
        return False

    def check_sampling(self) -> None:
        """Raise ConfigError unless the options of these stages are in range."""
        rewards = len(self.reward)
        check(
            self,
            "",
            ("steps", self.steps >= 1, ">= 1"),
            ("prompts_per_step", self.prompts_per_step >= 1, ">= 1"),
            ("samples_per_prompt", self.samples_per_prompt >= 1, ">= 1"),
            ("epochs", self.epochs >= 1, ">= 1"),
            ("minibatches", self.minibatches >= 1, ">= 1"),
            (
                "reward",
                rewards >= 1 or self.plays,
                "at least one file.py:function, reward-model directory or ready reward",
            ),
            (
                "reward_weights",
                self.reward_weights is None or len(self.reward_weights) == rewards,
                f"with as many numbers as there are rewards, {rewards}",
            ),
            ("reward_workers", self.reward_workers >= 0, ">= 0; 0 is this process"),
            ("reward_timeout", self.reward_timeout > 0, "> 0 seconds"),
            (
                "reward_timeout",
                self.reward_timeout == 60.0 or self.reward_workers > 0,
                "only together with reward_workers (in this process nothing can end a call)",
            ),
            (
                "max_prompt_length",
                self.max_prompt_length is None or self.max_prompt_length >= 1,
                ">= 1, or null for what fits",
            ),
            ("max_invalid_fraction", 0 <= self.max_invalid_fraction <= 1, "in [0, 1]"),
        )


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig(StageConfig):
    """Options of the stages that keep the policy near a reference, the initial weights.

    Args:
        reference: frozen is a second copy of the weights; adapter_off is the policy with its
            adapter switched off, which takes no memory; host is a copy in the host's memory that is
            moved to the GPU to score. auto is adapter_off with lora and frozen without.
        reference_model: directory or id of another model as the reference, such as a larger
            teacher; its tokenizer must have the policy's vocabulary. None: the initial weights.
    """

    reference: Literal["auto", "frozen", "adapter_off", "host"] = "auto"
    reference_model: str | None = None

    def check_reference(self) -> None:
        """Raise ConfigError unless the options of these stages are in range."""
        check(
            self,
            "",
            (
                "reference",
                self.reference != "adapter_off" or self.lora is not None,
                "frozen, host or auto without lora (there is no adapter to switch off)",
            ),
            (
                "reference",
                self.reference != "adapter_off" or self.reference_model is None,
                "frozen, host or auto with a reference_model (the policy without its adapter is "
                "not that model)",
            ),
        )

    @property
    def reference_kind(self) -> str:
        """Kind of the reference, with auto resolved: frozen, adapter_off or host."""
        if self.reference != "auto":
            return self.reference
        own = self.lora is not None and self.reference_model is None
        return "adapter_off" if own else "frozen"
