"""Table of the policy algorithms: advantage, objective, place of the KL, weighting of tokens, and
usual numbers of each.

One loop (stages/policy.py) runs all algorithms. The numbers in the table are defaults: an option
that a configuration sets replaces them. Advantages are functions in policy/advantages.py,
objectives in policy/objectives.py; more can be registered, or named by dotted path. This file
imports no large package, because the command line reads it.

Sources   reinforce: Williams (1992), Sutton and Barto, 13.3 and 13.4; actor_critic, a2c: ibid.
          13.5, Mnih et al. (2016); ppo, ppo_penalty: Schulman et al. (2017), eqs. 7 and 8; KL in
          the reward, 0.05: Ziegler et al. (2019), Huang et al. (2024); trpo: Schulman et al.
          (2015), the critic's ten passes as stable-baselines3 has them; rloo: Ahmadian et al.
          (2024); grpo: Shao et al. (2024), with its 0.04; dr_grpo: Liu et al. (2025); dapo: Yu et
          al. (2025); gspo: Zheng et al. (2025); cispo: MiniMax-M1 (2025); sapo: Gao et al. (2025);
          gmpo: Zhao et al. (2025); dro: Richemond et al. (2024); reinforce_pp: Hu (2025); remax: Li
          et al. (2024); opo: Hao et al. (2025); gpg: Chu et al. (2025); pass_at_k: Tang et al.
          (2025), Optimizing Language Models for Inference Time Objectives using Reinforcement
          Learning, without verl's division by the group's standard deviation; gdpo: Liu et al.
          (2026), Group reward-Decoupled Normalization Policy Optimization; distill: Agarwal et al.
          (2024), GKD, with lambda 1: every completion is the student's own; online_dpo: Guo et al.
          (2024), Direct Language Model Alignment from Online AI Feedback, with the beta of their
          DPO as the KL's coefficient; sequence_ratio: the
          objective by which courses introduce PPO for language models, without advantages: for
          study.
Updates   optimizer steps on one rollout are epochs x minibatches; with one step every ratio is
          exactly 1, and bounds on ratios have no effect. Defaults and their sources:
            ppo, ppo_penalty       4 epochs: Ziegler et al. (2019), Huang et al. (2024)
            dapo                   16: mini-batches of 512 of 512 x 16 completions (section 4.1)
            cispo                  16 "rounds of off-policy updates per generation batch" (section
                                   3.1)
            dr_grpo, gmpo          8: rollouts of 128 x 8 completions in batches of 128, as in Dr.
                                   GRPO's scripts, whose setting GMPO uses
            reinforce_pp           8, with and without the group's mean: OpenRLHF, rollouts of 1024
                                   in batches of 128
            gspo, sapo             4 mini-batches (section 5.1 of each)
            grpo                   1: "a single update following each exploration stage" (section
                                   4.2). DeepSeek-R1 (2025) has 16: minibatches 16
            sequence_ratio         4 epochs, as ppo
            ppo_max                1: in train_ppo_zh.sh of their code a batch has as many
                                   completions as a rollout
            all others             1: their gradient is that of the policy which drew the samples
          These numbers belong to the algorithm's own objective: with loss.objective trpo or
          reinforce the default is one minibatch. It is never more than the prompts of a step.
Epsilon   of Adam: 1e-5 in ppo and ppo_penalty, which follow the numbers of Huang et al. (2024);
          elsewhere 1e-8. Gradients of large models are small in each parameter, so that 1e-5
          shortens their steps (docs/metrics.md, optim/below_epsilon).
ppo_max   Zheng et al. (2023), Secrets of RLHF in Large Language Models, part I, with the numbers of
          their code (MOSS-RLHF). It adds seven things to ppo, each with its own option:
            1. KL in the reward                      kl.coef 0.02 (their English script: 0.01)
            2. scores normalised, then clipped       normalize_scores, or scale_scores alone (less
               one constant); score_clip 10
            3. advantages normalised, then clipped   loss.whiten; loss.advantage_clip 0.5
            4. the policy's clip                     loss.clip_low, loss.clip_high 0.2
            5. the critic's clip                     loss.value_clip 0.2
            6. an entropy target                     loss.entropy_coef, loss.entropy_target: off
               here, and of weight 0 there
            7. a pretraining loss                    off here: it needs data
          It also makes one pass over each rollout, and has a critic that starts from the reward
          model (critic.model), and Adam's usual epsilon. Their published English run has less:
          scale_scores, both clips, kl.coef 0.01, a policy's lr of 5e-7 and a critic's of 1.5e-6.
          4 and 5 have an effect only with more than one optimizer step per rollout (minibatches,
          epochs). The optimum, ref exp(r / beta), is changed by 2, 6 and 7 only. Of 2, dividing
          scores by s acts as a KL coefficient of s beta, and a clip changes the scores that it
          reaches; subtracting a mean changes nothing. 3, 4 and 5 do not move the policy away from
          the optimum: with an exact critic, every advantage there is 0.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fusedrl.engine.base.blame import told
from fusedrl.engine.base.errors import ConfigError, Stopped

Needs = Literal["", "critic", "group", "greedy"]
# Built-in advantages, and what each needs in addition to scores: a critic's values, several
# completions of a prompt, or the score of the greedy completion.
ADVANTAGES: dict[str, Needs] = {
    "none": "",
    "gae": "critic",
    "learned_baseline": "critic",
    "td0": "critic",
    "k_step": "critic",
    "monte_carlo": "",
    "reward_to_go": "",
    "running_mean": "",
    "grpo": "group",
    "dr_grpo": "group",
    "rloo": "group",
    "opo": "group",
    "gpg": "group",
    "pass_at_k": "group",
    "gdpo": "group",
    "online_dpo": "group",
    "remax": "greedy",
}
# Built-in objectives: a kind in kernels/objective.py, and its default bounds, which apply if a
# configuration sets none.
OBJECTIVES: dict[str, tuple[str, dict[str, float]]] = {
    "reinforce": ("reinforce", {}),
    "importance": ("ratio", {}),
    "ppo_clip": ("clip", {"clip_low": 0.2, "clip_high": 0.2}),
    "dual_clip": ("clip", {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": 3.0}),
    "dapo": ("clip", {"clip_low": 0.2, "clip_high": 0.28}),
    "ppo_penalty": ("kl_penalty", {}),  # beta is the adaptive coefficient
    "trpo": ("ratio", {}),  # minimised within a bound on the KL: policy/trpo.py
    "gspo": ("gspo", {"clip_low": 3e-4, "clip_high": 4e-4}),
    "cispo": ("cispo", {"clip_max": 5.0}),
    "sapo": ("sapo", {"tau_positive": 1.0, "tau_negative": 1.05}),
    "gmpo": ("geometric_mean", {"clip_low": 0.4, "clip_high": 0.4}),
    "dro": ("dro", {"beta": 1.0}),
    # a function in policy/objectives.py
    "sequence_ratio": ("sequence_ratio", {"clip_low": 0.2, "clip_high": 0.2}),
}
# fields of LossConfig that an objective may use
BOUNDS = ("clip_low", "clip_high", "dual_clip", "clip_max", "tau_positive", "tau_negative", "beta")


@dataclass(frozen=True)
class Algorithm:
    """One entry of ALGORITHMS: the parts of an algorithm, and its usual numbers.

    Attributes:
        title: name of the algorithm in messages.
        advantage: name of its advantage, one of ADVANTAGES.
        objective: name of its objective, one of OBJECTIVES.
        aggregation: how the losses of tokens become one number (`LossConfig.aggregation`).
        kl_placement: whether the KL to the reference is part of the reward or of the loss.
        kl_coef: the KL's factor; with 0 there is no KL, and no reference is loaded.
        kl_estimator: how the KL of a token is estimated: k1, k2, k3, abs or full.
        whiten: scale advantages to mean 0 and variance 1 over the batch of a step.
        samples_per_prompt: completions of each prompt.
        epochs: passes over a rollout.
        minibatches: optimizer steps of a pass.
        eps: epsilon of Adam.
        refill_tries: how often, at most, groups whose scores are all equal are replaced by groups
            of other prompts.
        normalize_scores: subtract the mean of all scores of the run so far, then divide by their
            standard deviation.
        score_clip: largest absolute value of a score; None sets no bound.
        advantage_clip: largest absolute value of an advantage; None sets no bound.
    """

    title: str
    advantage: str
    objective: str
    aggregation: str
    kl_placement: Literal["reward", "loss"] = "reward"
    kl_coef: float = 0.0
    kl_estimator: str = "k1"
    whiten: bool = False
    samples_per_prompt: int = 1
    epochs: int = 1
    minibatches: int = 1
    eps: float = 1e-8
    refill_tries: int = 0
    normalize_scores: bool = False
    score_clip: float | None = None
    advantage_clip: float | None = None


# the policy gradient as it is derived: log-probabilities of whole completions, a mean over
# completions
_SUM = "sequence_mean_token_sum"
_MEAN = "sequence_mean_token_mean"


def _group(
    title: str,
    advantage: str,
    objective: str,
    aggregation: str,
    *,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    whiten: bool = False,
    minibatches: int = 1,
    refill_tries: int = 0,
) -> Algorithm:
    """Return an algorithm with eight completions per prompt, whose KL, if any, is in the loss."""
    return Algorithm(
        title,
        advantage,
        objective,
        aggregation,
        kl_placement="loss",
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
        whiten=whiten,
        samples_per_prompt=8,
        minibatches=minibatches,
        refill_tries=refill_tries,
    )


ALGORITHMS: dict[str, Algorithm] = {
    "ppo": Algorithm(
        "PPO: a clipped ratio and a critic",
        "gae",
        "ppo_clip",
        "token_mean",
        kl_coef=0.05,
        whiten=True,
        epochs=4,
        eps=1e-5,
    ),
    "ppo_penalty": Algorithm(
        "PPO with an adaptive KL penalty in place of the clip",
        "gae",
        "ppo_penalty",
        "token_mean",
        kl_coef=0.05,
        whiten=True,
        epochs=4,
        eps=1e-5,
    ),
    "trpo": Algorithm(
        "TRPO: a natural gradient step within a KL, and a critic",
        "gae",
        "trpo",
        "token_mean",
        kl_coef=0.05,
        whiten=True,
        epochs=10,
    ),
    "ppo_max": Algorithm(
        "PPO-max: scores and advantages normalised and clipped",
        "gae",
        "ppo_clip",
        "token_mean",
        kl_coef=0.02,
        whiten=True,
        normalize_scores=True,
        score_clip=10.0,
        advantage_clip=0.5,
    ),
    "a2c": Algorithm(
        "advantage actor-critic, k steps ahead", "k_step", "reinforce", _SUM, kl_coef=0.05
    ),
    "actor_critic": Algorithm(
        "actor-critic, one step ahead", "td0", "reinforce", _SUM, kl_coef=0.05
    ),
    "reinforce": Algorithm(
        "REINFORCE with reward-to-go", "reward_to_go", "reinforce", _SUM, kl_coef=0.05
    ),
    "reinforce_baseline": Algorithm(
        "REINFORCE less the running mean of past returns",
        "running_mean",
        "reinforce",
        _SUM,
        kl_coef=0.05,
    ),
    "reinforce_learned": Algorithm(
        "REINFORCE less a learned baseline", "learned_baseline", "reinforce", _SUM, kl_coef=0.05
    ),
    "reinforce_pp": Algorithm(
        "REINFORCE++: token returns, whitened over the batch",
        "reward_to_go",
        "ppo_clip",
        "token_mean",
        kl_coef=0.01,
        whiten=True,
        minibatches=8,
    ),
    "reinforce_pp_baseline": _group(
        "REINFORCE++ less the group's mean",
        "dr_grpo",
        "ppo_clip",
        "token_mean",
        kl_coef=0.01,
        kl_estimator="k2",
        whiten=True,
        minibatches=8,
    ),
    "rloo": Algorithm(
        "leave-one-out baseline", "rloo", "ppo_clip", _SUM, kl_coef=0.05, samples_per_prompt=4
    ),
    "remax": Algorithm(
        "REINFORCE less the greedy completion's score", "remax", "reinforce", _SUM, kl_coef=0.05
    ),
    "opo": _group("length-weighted baseline, exactly on policy", "opo", "reinforce", "token_mean"),
    "gpg": _group("group policy gradient", "gpg", "reinforce", "token_mean"),
    "grpo": _group("advantages within the group", "grpo", "ppo_clip", _MEAN, kl_coef=0.04),
    "dr_grpo": _group(
        "GRPO without its two divisions", "dr_grpo", "ppo_clip", "sequence_sum_norm", minibatches=8
    ),
    "dapo": _group(
        "GRPO with a higher upper clip, a mean over tokens, dynamic sampling",
        "grpo",
        "dapo",
        "token_mean",
        minibatches=16,
        refill_tries=3,
    ),
    "gspo": _group("GRPO with the sequence's ratio", "grpo", "gspo", _MEAN, minibatches=4),
    "cispo": _group(
        "GRPO with a capped importance weight", "grpo", "cispo", "token_mean", minibatches=16
    ),
    "sapo": _group(
        "GRPO with a soft gate in place of the clip", "grpo", "sapo", _MEAN, minibatches=4
    ),
    "gmpo": _group(
        "GRPO with the geometric mean of the ratios", "grpo", "gmpo", _MEAN, minibatches=8
    ),
    "pass_at_k": _group("GRPO for the best of a group", "pass_at_k", "ppo_clip", _MEAN),
    "gdpo": _group(
        "GRPO whose rewards are normalised each by itself", "gdpo", "ppo_clip", _MEAN, kl_coef=0.04
    ),
    "distill": Algorithm(
        "on-policy distillation: the whole distribution of a teacher, on the policy's own samples",
        "none",
        "reinforce",
        "token_mean",
        kl_placement="loss",
        kl_coef=1.0,
        kl_estimator="full",
    ),
    "online_dpo": Algorithm(
        "online DPO: the better of two samples is preferred to the worse",
        "online_dpo",
        "reinforce",
        _SUM,
        kl_coef=0.1,
        samples_per_prompt=2,
    ),
    "dro": Algorithm(
        "direct reward optimisation with a critic", "learned_baseline", "dro", "token_mean"
    ),
    "sequence_ratio": Algorithm(
        "a completion's clipped ratio times its reward, for study",
        "monte_carlo",
        "sequence_ratio",
        _MEAN,
        kl_coef=0.05,
        epochs=4,
    ),
}


def resolve(what: str, name: str, known: Mapping[str, Any]) -> Any:
    """Return `known[name]`, or the function that a dotted path names.

    Raises:
        ConfigError: `name` is neither known nor importable, or is not a function. The message lists
            the known names.
    """
    if name in known:
        return known[name]
    module, dot, attribute = name.rpartition(".")
    expected = (
        f"config: expected loss.{what} to be one of {', '.join(sorted(known))}, or module.function"
    )
    if not dot:
        raise ConfigError(f"{expected}; got {name!r}")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (KeyboardInterrupt, Stopped):
        raise
    except BaseException as error:  # a user's module may raise anything
        raise ConfigError(f"{expected}; {name!r} cannot be imported: {told(error)}") from error
    if not callable(found):
        raise ConfigError(f"{expected}; {name!r} is no function, but {type(found).__name__}")
    return found
