"""Groups of options of a policy run: KL to the reference, adaptive penalty, critic, TRPO's step,
pretraining texts."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from fusedrl.engine.config.algorithms import Algorithm
from fusedrl.engine.config.base import OptimConfig, check, either, settle_data

# default of a field that takes the algorithm's value if it is not set
OF_ALGORITHM: Any = None


@dataclass(frozen=True)
class KLConfig:
    """KL that keeps the policy near its reference, as part of the reward or of the loss.

    The placement decides which policy the run converges to, not only how fast:

    reward  -coef * k1 at every token (Ziegler et al., 2019). Exact: the optimum is ref * exp(reward
            / coef), however advantages are computed.
    loss    + coef * kl_t in the loss, with the gradient of the estimator at each token. The usual
            k3 has the gradient of KL(ref || pi), and k2 that of KL(pi || ref). Both ignore that a
            token changes the states after it, and normalising advantages rescales coef for each
            prompt. Exact are k2 and full with level="future", and k2 with level="sequence", which
            is noisy.

    Fields without a default here take that of the algorithm (algorithms.py).

    Args:
        coef: the coefficient, or its initial value if it adapts; with 0 there is no KL, and no
            reference is loaded.
        placement: reward or loss, where the KL is added.
        estimator: in the loss k1, k2, k3, abs or full; in the reward only k1, since any other drops
            a term of the gradient. full is the exact KL over the whole vocabulary, and costs one
            more forward of the reference.
        direction: with full, which divergence: reverse is KL(policy || reference), forward is
            KL(reference || policy), jsd is the Jensen-Shannon divergence. These are 1, 0 and 0.5 as
            the beta of generalised knowledge distillation (Agarwal et al., 2024).
        level: in the loss, whether the KL is of tokens or (k2) of whole sequences, or future (k2,
            full). future is the KL of tokens, and also subtracts from the advantage coef times the
            k1 of the later tokens, the part that token ignores.
        through_ratio: in the loss, multiply the estimator (k1, k3) by the ratio, with the gradients
            of both (DeepSeek-V3.2, 2025, unbiased KL estimate). The gradient is then that of
            KL(pi || ref) at each state, even if another policy drew the tokens, as in later epochs
            or from a replay buffer.
        target: KL per sequence, in nats, that the coefficient adapts to; None keeps the coefficient
            fixed.
        horizon: adapt as Ziegler et al. (2019) do, by at most 0.2 x sequences of a step / horizon;
            their horizon is 10,000. Choose it to fit the length of the run: 10,000 with 64
            sequences a step allows 14% in 100 steps. None adapts by steps, not by sequences.
        measure: load the reference and report the KL even if the coefficient is 0.
    """

    coef: float = OF_ALGORITHM
    placement: Literal["reward", "loss"] = OF_ALGORITHM
    estimator: Literal["k1", "k2", "k3", "abs", "full"] = OF_ALGORITHM
    direction: Literal["reverse", "forward", "jsd"] = "reverse"
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
        """Return these options, with the algorithm's values for those that were not set."""
        placement = self.placement or (
            "loss" if self.level != "token" or self.through_ratio else row.kl_placement
        )
        usual = "k1" if placement == "reward" else "k2" if self.level != "token" else "k3"
        usual = (
            row.kl_estimator
            if usual == "k3" and row.kl_placement == "loss" and not self.through_ratio
            else usual
        )
        estimator = self.estimator or usual
        check(
            self,
            "kl",
            (
                "direction",
                self.direction == "reverse" or (estimator == "full" and self.level == "token"),
                "reverse, or kl.estimator = full and kl.level = token (only the exact KL has other "
                "directions)",
                (self.direction, estimator, self.level),
            ),
        )
        return replace(
            self,
            coef=either(self.coef, row.kl_coef),
            placement=placement,
            estimator=self.estimator or usual,
        )


@dataclass(frozen=True)
class PenaltyConfig:
    """Adaptive KL coefficient of the objective ppo_penalty.

    It adapts to the KL per token from the policy of the rollout to the policy after the last pass.
    If this KL is above an upper threshold, the coefficient is doubled; below a lower threshold it
    is halved. The thresholds are set directly, or by a target d as d / 1.5 and 1.5 d (Schulman et
    al., 2017, section 4).

    Args:
        coef: initial value of the coefficient.
        target: KL in nats per token; None uses the thresholds, or 0.01 if these are not set either.
        kl_min, kl_max: lower and upper threshold, in nats per token, instead of a target.
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
        """Lower and upper threshold of the KL."""
        if self.kl_min is not None and self.kl_max is not None:
            return self.kl_min, self.kl_max
        target = 0.01 if self.target is None else self.target
        return target / 1.5, target * 1.5


@dataclass(frozen=True)
class CriticConfig:
    """Critic: a value head on the policy's trunk, or a separate model, a decoder with a linear
    head.

    A separate critic takes as much memory as a second model of its size.

    It may be of any size and family that has the policy's vocabulary. It has its own optimizer, so
    that its gradients and their norm do not affect the policy. InstructGPT and MOSS initialise it
    from the reward model. Either kind of critic starts with its bias at the mean return of the
    first rollout; if it already has a trained head, its values are shifted to that mean. A constant
    added to the reward therefore changes only this bias.

    Args:
        model: trunk, or what a separate critic starts from: policy, a language model, a reward
            model, or <run>/critic of an earlier run. trunk is a head on the policy's trunk: the one
            saved with the policy's weights, or else one of zeros. policy is a copy of the policy's
            initial weights. If the directory holds a value head, it is loaded; else one of zeros is
            made. A reward model's score, at every position, is the initial value.
        warmup_steps: number of rollouts, the first of `steps`, that train the critic alone (Zheng
            et al., 2023, pre-train it in this way). Meanwhile the policy (including the trunk), its
            learning rate and the adaptive coefficients do not change.
        optim: optimizer of a separate critic, or of a head on the trunk during its warm-up. After
            the warm-up one loss trains head and policy, with the policy's `optim`.
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
    """Step of the objective trpo: along the natural gradient, as far as a bound on the KL allows.

    The defaults are those of Schulman et al. (2015), and for the line search those of Spinning Up.
    The policy has no learning rate. optim and epochs apply to the value head only, which is trained
    on the value loss without loss.value_coef. Everything is computed in float32.

    Args:
        max_kl: bound on KL(old || new), in nats per token, a mean over the tokens of the rollout,
            over the whole vocabulary.
        cg_iterations: iterations of conjugate gradient, each with one product with the Fisher
            matrix.
        damping: added to the Fisher matrix's diagonal. If it is larger than the curvature, the step
            is that of plain gradient descent. A smaller number is nearer to the natural gradient
            and needs more iterations: if trpo/cg_residual stays above 1, cg_iterations is too
            small.
        fisher_fraction: share of a rollout's completions used for the Fisher matrix of these
            products. The length of the step and the bound use all completions.
        backtracks: how often, at most, the step is shortened. If no length both keeps the bound and
            improves the objective, the weights stay unchanged.
        backtrack_ratio: factor that each backtrack multiplies the step's length by.
        accept_ratio: smallest improvement to accept, as a share of the improvement that the
            gradient predicts.
        schedule: schedule of the square root of max_kl (the length of a step): constant, or linear
            to zero at the last step. If the KL to the reference is in the reward, steps of constant
            length end up circling the optimum.
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
        """Return these options, with the bound that applies at step `step` (from 0) of `total`."""
        return (
            self
            if self.schedule == "constant"
            else replace(self, max_kl=self.max_kl * (1 - step / total) ** 2)
        )


@dataclass(frozen=True)
class PtxConfig:
    """Pretraining loss in every optimizer step of the policy, against forgetting (PPO-ptx).

    The policy's loss is increased by coef times the mean cross-entropy of randomly drawn texts
    (Ouyang et al., 2022, eq. 2).

    Args:
        data: files as for sft, with {"text"}, which is learned whole, {"prompt",
            "completion"}, ...; several files are mixed by weight.
        coef: weight of the cross-entropy (nats per token) in the loss; 0 adds nothing.
            InstructGPT's 27.8 belongs to a policy loss of a different scale; watch loss/ptx.
        sequences_per_step: texts of one optimizer step. A rollout has epochs x minibatches such
            steps (trpo: one).
        max_length: largest number of tokens of a text; longer ones are dropped and counted. None
            takes the model's own limit.
        learn_prompts: if rows have a prompt, learn the prompt as well.
    """

    data: str = ""
    coef: float = 27.8
    sequences_per_step: int = 32
    max_length: int | None = None
    learn_prompts: bool = False

    def __post_init__(self) -> None:
        settle_data(self)
        check(
            self,
            "ptx",
            ("data", bool(self.data), "a file of texts beside the other options of ptx"),
            ("coef", self.coef >= 0, ">= 0"),
            ("sequences_per_step", self.sequences_per_step >= 1, ">= 1"),
            ("max_length", self.max_length is None or self.max_length >= 2, ">= 2"),
        )
