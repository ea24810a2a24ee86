"""What every stage's configuration is made of: the optimizer, adapters, the run directory, how
completions are sampled."""

from __future__ import annotations

import difflib
import math
import signal
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Literal, Protocol

from fusedrl.engine.base.errors import ConfigError


def require(condition: bool, where: str, expected: str, found: object) -> None:
    """Raises ConfigError unless the condition holds."""
    if not condition:
        raise ConfigError(f"config: expected {where} {expected}, got {found!r}")


def check_values(config: Any) -> None:
    """What holds for every stage: all numbers are finite, model and data are named. Raises
    ConfigError."""

    def check(value: Any, name: str) -> None:
        if is_dataclass(value):
            for one in fields(value):
                check(getattr(value, one.name), f"{name}.{one.name}" if name else one.name)
        for number in value if isinstance(value, tuple) else (value,):
            require(
                not isinstance(number, float) or math.isfinite(number), name, "to be finite", value
            )

    check(config, "")
    require(bool(config.model), "model", "a directory or id of a model", config.model)
    require(bool(config.data), "data", "a file", config.data)
    max_length = getattr(config, "max_length", None)
    require(
        max_length is None or max_length >= 2,
        "max_length",
        ">= 2, or null for the model's own limit",
        max_length,
    )


def either(value: Any, usual: Any) -> Any:
    """The value, or what is usual where it was left out."""
    return usual if value is None else value


@dataclass(frozen=True)
class OptimConfig:
    """AdamW.

    Args:
        lr: peak learning rate.
        betas: decay of the two moments.
        eps: added to the root of the second moment; None: the algorithm's, which is 1e-5 for ppo
            and ppo_penalty (Huang et al., 2024, "The N+ implementation details"), and 1e-8
            everywhere else. Steps of parameters whose gradients are below it are shorter:
            optim/below_epsilon says of how many.
        eps_mode: torch adds it to the root of the unbiased moment. tensorflow adds it to that of
            the biased one (Kingma and Ba, 2015, the form before section 2.1, "epsilon hat"), which
            is torch's with eps / sqrt(1 - beta2^t): 32 times as much at the first step, so that the
            first steps are smaller. Runs that are compared with TensorFlow's (Ziegler et al., 2019)
            want it.
        weight_decay: decoupled, on matrices only.
        schedule: after the warm-up, constant, or linear to zero at the last step.
        warmup_steps: optimizer steps of linear warm-up.
        max_grad_norm: the global norm above which gradients are scaled down; 0 leaves them.
        state: of the moments: float32, or int8, which takes a quarter of the memory and needs
            torchao.
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
        require(self.lr > 0, "optim.lr", "> 0", self.lr)
        require(
            len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas),
            "optim.betas",
            "two numbers in [0, 1)",
            self.betas,
        )
        require(self.eps is None or self.eps > 0, "optim.eps", "> 0", self.eps)
        require(
            self.eps_mode == "torch" or self.state == "float32",
            "optim.eps_mode",
            "torch with optim.state = int8 (its compiled step has one epsilon)",
            self.eps_mode,
        )
        require(self.weight_decay >= 0, "optim.weight_decay", ">= 0", self.weight_decay)
        require(self.warmup_steps >= 0, "optim.warmup_steps", ">= 0", self.warmup_steps)
        require(self.max_grad_norm >= 0, "optim.max_grad_norm", ">= 0", self.max_grad_norm)

    def filled(self, eps: float) -> OptimConfig:
        """With this epsilon where nothing was said."""
        return self if self.eps is not None else replace(self, eps=eps)


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters on a frozen model (Hu et al., 2021): W + alpha / rank x B A, of which A and
    B are trained. No dropout: the sampler has none.

    Args:
        rank: of A and B.
        alpha: the adapter is scaled by alpha / rank.
        targets: linear layers by PEFT's names: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj,
            down_proj (Phi-3: qkv_proj, gate_up_proj); all-linear: all.
        rslora: scale by alpha / sqrt(rank) instead (Kalajdzievski, 2023).
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ("all-linear",)
    rslora: bool = False

    def __post_init__(self) -> None:
        require(self.rank >= 1, "lora.rank", ">= 1", self.rank)
        require(self.alpha > 0, "lora.alpha", "> 0", self.alpha)
        require(
            len(self.targets) >= 1 and not isinstance(self.targets, str),
            "lora.targets",
            "one target or more",
            self.targets,
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
        """What multiplies B A."""
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
    """Where a run lives and what it keeps.

    Args:
        dir: run directory; metrics, checkpoints and the final model go there.
        seed: of everything that draws.
        resume: continue the run in `dir` from its newest complete checkpoint.
        save_every: steps between checkpoints, whatever they cost; 0 saves by the clock.
        save_minutes: minutes between checkpoints, longer where saving would take more than 5% of
            the time; the first is after the first step and the last at the end. 0 saves at the end
            only.
        signals: that stop a run with its state saved, beside SIGINT, SIGTERM and SIGHUP: such as
            SIGUSR1, which schedulers send before the time is up; several with commas.
        keep: complete checkpoints kept; the oldest go first.
        progress: live progress on the terminal.
    """

    dir: str = "runs/latest"
    seed: int = 0
    resume: bool = False
    save_every: int = 0
    save_minutes: float = 10.0
    signals: str = ""
    keep: int = 2
    progress: bool = True

    def __post_init__(self) -> None:
        require(-(2**63) <= self.seed < 2**63, "run.seed", "an integer of 64 bits", self.seed)
        require(bool(self.dir), "run.dir", "a directory", self.dir)
        require(self.save_every >= 0, "run.save_every", ">= 0", self.save_every)
        require(0 <= self.save_minutes < math.inf, "run.save_minutes", ">= 0", self.save_minutes)
        require(self.keep >= 1, "run.keep", ">= 1", self.keep)
        for name in self.signal_names:
            require(
                name in signal.Signals.__members__ and name not in ("SIGKILL", "SIGSTOP"),
                "run.signals",
                "names of signals that a process can catch, such as SIGUSR1 or SIGUSR1,SIGUSR2",
                self.signals,
            )

    @property
    def signal_names(self) -> tuple[str, ...]:
        """`signals`, one by one."""
        return tuple(name.strip().upper() for name in self.signals.split(",") if name.strip())


@dataclass(frozen=True)
class GenerationConfig:
    """How rollouts are sampled. PPO scores the distribution it samples from, so it refuses settings
    that truncate it.

    Args:
        max_new_tokens: longest completion.
        temperature: divides the logits, in sampling and in scoring alike.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the smallest set of this probability; 1 keeps all.
        min_p: keep tokens of at least this fraction of the likeliest one's probability; 0 keeps
            all.
        stop_token_ids: ids that end a completion besides the model's own EOS.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        require(self.max_new_tokens >= 1, "generation.max_new_tokens", ">= 1", self.max_new_tokens)
        require(self.temperature >= 0, "generation.temperature", ">= 0", self.temperature)
        require(self.top_k >= 0, "generation.top_k", ">= 0; 0 keeps all", self.top_k)
        require(0 < self.top_p <= 1, "generation.top_p", "in (0, 1]; 1 keeps all", self.top_p)
        require(0 <= self.min_p <= 1, "generation.min_p", "in [0, 1]; 0 keeps all", self.min_p)
        require(
            all(token >= 0 for token in self.stop_token_ids),
            "generation.stop_token_ids",
            "token ids >= 0",
            self.stop_token_ids,
        )

    @property
    def truncates(self) -> bool:
        """Whether some tokens are never drawn."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


class StageConfig(Protocol):
    """What the configurations of all stages have."""

    @property
    def model(self) -> str: ...
    @property
    def data(self) -> str: ...
    @property
    def device(self) -> str | None: ...
    @property
    def run(self) -> RunConfig: ...
    @property
    def title(self) -> str: ...
