"""Parts of a policy run: its distance from a reference, how a penalty adapts, a critic of its own,
TRPO's step, pretraining texts."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from fusedrl.engine.config.algorithms import Algorithm
from fusedrl.engine.config.base import OptimConfig, check, either

# the default of a field that the algorithm's row fills in where it is left out
OF_ALGORITHM: Any = None


@dataclass(frozen=True)
class KLConfig:
    """The KL that keeps the policy near its reference, and where it acts.

    The place decides what is converged to, not only how fast:

    reward  -coef * k1 at every token (Ziegler et al., 2019). Exact: the optimum is ref * exp(reward
            / coef), whatever is done to advantages.
    loss    + coef * kl_t in the loss, with the gradient of the estimator at each token. The usual
            k3 follows KL(ref || pi) and k2 KL(pi || ref), but both forget that a token changes the
            states behind it, and a normalised advantage rescales coef prompt by prompt. Exact are
            k2 and full with level="future", and k2 with level="sequence", which is noisy.

    Fields without a default here take the algorithm's (algorithms.py).

    Args:
        coef: the coefficient, or its initial value when it adapts; 0 is none, and then no reference
            is loaded.
        placement: reward or loss.
        estimator: in the loss k1, k2, k3, abs, or full, which is no estimate but the KL over the
            whole vocabulary (one more forward of the reference); in the reward only k1, since any
            other drops a term of the gradient.
        level: in the loss, of tokens or (k2) of whole sequences; future (k2, full): of tokens, and
            the advantage is less coef times the k1 of the tokens to come, which is what tokens
            alone leave out.
        through_ratio: in the loss, the estimator (k1, k3) times the ratio, both with their
            gradients: that of KL(pi || ref) at each state, also where the tokens are another
            policy's, as in later epochs and from a replay buffer (DeepSeek-V3.2, 2025, unbiased KL
            estimate).
        target: KL per sequence, in nats, that the coefficient adapts to (policy/control.py says
            how, and how fast); None keeps it fixed.
        horizon: adapt as Ziegler et al. (2019) do, by at most 0.2 x sequences of a step / horizon;
            they have 10,000. It has to fit the run: with 64 sequences a step that is 14% in 100
            steps. None adapts by steps, not by sequences.
        measure: load the reference and report the KL even where the coefficient is 0.
    """

    coef: float = OF_ALGORITHM
    placement: Literal["reward", "loss"] = OF_ALGORITHM
    estimator: Literal["k1", "k2", "k3", "abs", "full"] = OF_ALGORITHM
    level: Literal["token", "sequence", "future"] = "token"
    through_ratio: bool = False
    target: float | None = None
    horizon: float | None = None
    measure: bool = False

    def __post_init__(self) -> None:
        check(
            self,
            "kl",
            ("coef", self.coef is None or 0 <= self.coef < math.inf, ">= 0"),
            ("placement", self.placement in (None, "reward", "loss"), "reward or loss"),
            (
                "estimator",
                self.estimator in (None, "k1", "k2", "k3", "abs", "full"),
                "k1, k2, k3, abs or full",
            ),
            ("level", self.level in ("token", "sequence", "future"), "token, sequence or future"),
            (
                "target",
                self.target is None or (self.target > 0 and self.coef != 0),
                "> 0 with a coefficient > 0 (it is multiplied, so 0 stays 0; kl.coef 0.05 is a "
                "usual start)",
                (self.target, self.coef),
            ),
            (
                "horizon",
                self.horizon is None or (self.horizon > 0 and self.target is not None),
                "> 0, and only with kl.target",
                (self.horizon, self.target),
            ),
            (
                "estimator",
                self.placement != "reward" or self.estimator in (None, "k1"),
                "k1 with kl.placement = reward (any other drops a term of the gradient of the KL "
                "there and moves the optimum; put it into the loss)",
            ),
        )
        fitting = {"token": None, "sequence": (None, "k2"), "future": (None, "k2", "full")}[
            self.level
        ]
        check(
            self,
            "kl",
            (
                "level",
                fitting is None or (self.placement != "reward" and self.estimator in fitting),
                "sequence only with kl.placement = loss and kl.estimator = k2, future only with "
                "loss and k2 or full",
                (self.level, self.placement, self.estimator),
            ),
            (
                "through_ratio",
                not self.through_ratio
                or (
                    self.placement != "reward"
                    and self.estimator in (None, "k1", "k3")
                    and (self.level == "token")
                ),
                "only with kl.placement = loss, kl.estimator = k1 or k3, and kl.level = token",
                (self.placement, self.estimator, self.level),
            ),
        )

    def filled(self, row: Algorithm) -> KLConfig:
        """Return these options with the algorithm's values where nothing was said."""
        placement = self.placement or (
            "loss" if self.level != "token" or self.through_ratio else row.kl_placement
        )
        usual = "k1" if placement == "reward" else "k2" if self.level != "token" else "k3"
        usual = (
            row.kl_estimator
            if usual == "k3" and row.kl_placement == "loss" and not self.through_ratio
            else usual
        )
        return replace(
            self,
            coef=either(self.coef, row.kl_coef),
            placement=placement,
            estimator=self.estimator or usual,
        )


@dataclass(frozen=True)
class PenaltyConfig:
    """The adaptive KL coefficient of the objective ppo_penalty.

    It adapts to the KL from the policy of the rollout to that of the last pass, per token: either
    between two thresholds, or around a target d: thresholds d / 1.5 and 1.5 d (Schulman et
    al., 2017, section 4). Above the upper one the coefficient is doubled, below the lower one
    halved.

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
        check(
            self,
            "penalty",
            ("coef", self.coef > 0, "> 0"),
            ("target", self.target is None or self.target > 0, "> 0"),
            (
                "penalty",
                (self.kl_min is None) == (self.kl_max is None)
                and (self.target is None or self.kl_min is None),
                "either target, or both kl_min and kl_max",
                (self.target, self.kl_min, self.kl_max),
            ),
            (
                "kl_min",
                self.kl_min is None or self.kl_max is None or 0 <= self.kl_min < self.kl_max,
                ">= 0 and below kl_max",
                (self.kl_min, self.kl_max),
            ),
        )

    @property
    def thresholds(self) -> tuple[float, float]:
        """(lower, upper)."""
        if self.kl_min is not None and self.kl_max is not None:
            return self.kl_min, self.kl_max
        target = 0.01 if self.target is None else self.target
        return target / 1.5, target * 1.5


@dataclass(frozen=True)
class CriticConfig:
    """The critic: a value head on the policy's trunk, or another decoder with a linear head.

    The latter takes the memory of a second model.

    One of its own may be of any size and family that has the policy's vocabulary. It is optimised
    by itself, so neither its gradients nor their norm reach the policy. InstructGPT and MOSS start
    it from the reward model. Either kind begins with its bias at the mean return of the first
    rollout (of a model that has a head already: moved by what it is short of), so that a constant
    added to the reward changes nothing but that bias.

    Args:
        model: trunk, a head of zeros on the policy's trunk, or the one saved beside its weights;
            for one of its own, where it starts from: policy, a copy of the policy's initial
            weights; another language model; <run>/critic of an earlier run (the value head beside
            the weights is read, else one of zeros is made); or a reward model, whose score, at
            every position, is then the first value.
        warmup_steps: of `steps`, the first so many rollouts train the critic alone (Zheng et al.,
            2023, pre-train it so); the policy (and with it the trunk), its learning rate and the
            adaptive coefficients stand still meanwhile.
        optim: of a critic of its own, as the policy's; of a head on the trunk while it warms up:
            afterwards one loss trains both, with the policy's `optim`.
    """

    model: str = "trunk"
    warmup_steps: int = 0
    optim: OptimConfig = field(default_factory=OptimConfig)

    def __post_init__(self) -> None:
        check(
            self,
            "critic",
            ("model", bool(self.model), "trunk, policy, or a directory or id of a model"),
            ("warmup_steps", self.warmup_steps >= 0, ">= 0"),
        )


@dataclass(frozen=True)
class TRPOConfig:
    """The step of the objective trpo: along the natural gradient, as far as a KL allows.

    The values are those of Schulman et al. (2015), and Spinning Up's for the line search. The
    policy has no learning rate: optim is the value head's alone, on the value loss without
    loss.value_coef, and epochs are its passes. In float32.

    Args:
        max_kl: bound on KL(old || new), in nats per token, a mean over the tokens of the rollout,
            over the whole vocabulary.
        cg_iterations: of conjugate gradient, each a product with the Fisher matrix.
        damping: added to the Fisher matrix's diagonal. Where it outweighs the curvature the step is
            that of plain gradient descent: smaller is nearer to the natural gradient, and takes
            more iterations: where trpo/cg_residual stays above 1, they were too few.
        fisher_fraction: of a rollout's completions, those whose states the Fisher matrix of these
            products is of. The length of the step and the bound are of all of them.
        backtracks: how often, at most, the step is shortened; if none of the lengths keeps the
            bound and improves, the weights stay as they are.
        backtrack_ratio: what it is shortened by.
        accept_ratio: of the improvement that the gradient promises, the least to accept.
        schedule: of the bound's root, the length of a step: constant, or linear to zero at the last
            step. With the KL to the reference in the reward steps of constant length end up
            circling the optimum.
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
        check(
            self,
            "trpo",
            ("max_kl", self.max_kl > 0, "> 0"),
            ("cg_iterations", self.cg_iterations >= 1, ">= 1"),
            ("damping", self.damping >= 0, ">= 0"),
            ("fisher_fraction", 0 < self.fisher_fraction <= 1, "in (0, 1]"),
            ("backtracks", self.backtracks >= 0, ">= 0"),
            ("backtrack_ratio", 0 < self.backtrack_ratio < 1, "in (0, 1)"),
            ("accept_ratio", 0 <= self.accept_ratio < 1, "in [0, 1)"),
        )

    def at(self, step: int, total: int) -> TRPOConfig:
        """Return these options with the bound of step `step` (from 0) of `total`."""
        return (
            self
            if self.schedule == "constant"
            else replace(self, max_kl=self.max_kl * (1 - step / total) ** 2)
        )


@dataclass(frozen=True)
class PtxConfig:
    """Pretraining in every optimizer step of the policy, against forgetting: PPO-ptx.

    The loss gains coef times the mean cross-entropy of a draw of texts (Ouyang et al., 2022, eq.
    2).

    Args:
        data: as of sft: JSONL with {"text"}, which is learned whole, {"prompt", "completion"}, ...;
            several files mix by weight.
        coef: in nats of the loss per nat of a token; 0 is none. InstructGPT's 27.8 stands beside a
            policy loss of its own scale; watch loss/ptx.
        sequences_per_step: texts of one optimizer step, of which a rollout has epochs x minibatches
            (trpo: one).
        max_length: longer texts are dropped and counted; None is the model's own limit.
        learn_prompts: where rows have a prompt, learn it as well.
    """

    data: str = ""
    coef: float = 27.8
    sequences_per_step: int = 32
    max_length: int | None = None
    learn_prompts: bool = False

    def __post_init__(self) -> None:
        check(
            self,
            "ptx",
            ("data", bool(self.data), "a file of texts beside the other options of ptx"),
            ("coef", self.coef >= 0, ">= 0"),
            ("sequences_per_step", self.sequences_per_step >= 1, ">= 1"),
            ("max_length", self.max_length is None or self.max_length >= 2, ">= 2"),
        )
