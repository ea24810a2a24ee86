"""Every policy algorithm as data: an advantage, an objective, where the KL goes, how tokens are weighted, and what is usual.

One loop (stages/policy.py) runs them all. A row's numbers are defaults: whatever a configuration names itself beats them. Advantages are functions in
advantages.py, objectives are in objectives.py; both take more by registration or by dotted path. This file imports nothing heavy: the command line reads it.

Sources   reinforce: Williams (1992), Sutton and Barto, 13.3 and 13.4; actor_critic, a2c: ibid. 13.5, Mnih et al. (2016); ppo, ppo_penalty: Schulman et al.
          (2017), eqs. 7 and 8; KL in the reward, 0.05: Ziegler et al. (2019), Huang et al. (2024); trpo: Schulman et al. (2015), the critic's ten passes
          as stable-baselines3 has them; rloo: Ahmadian et al. (2024); grpo: Shao et al. (2024), with its 0.04; dr_grpo: Liu et al. (2025); dapo: Yu et al.
          (2025); gspo: Zheng et al. (2025); cispo: MiniMax-M1 (2025); sapo: Gao et al. (2025); gmpo: Zhao et al. (2025); dro: Richemond et al. (2024);
          reinforce_pp: Hu (2025); remax: Li et al. (2024); opo: Hao et al. (2025); gpg: Chu et al. (2025); pass_at_k: Chen et al. (2025), as verl has it;
          sequence_ratio: the objective by which courses introduce PPO for language models, without advantages: for study.
ppo_max   Zheng et al. (2023), Secrets of RLHF in Large Language Models, part I, with the numbers of their code (MOSS-RLHF). What it adds to ppo are seven
          things, each an option of its own:
            1. KL in the reward                      kl.coef 0.02 (their English script: 0.01)
            2. scores normalised, then clipped       normalize_scores, or scale_scores alone (less one constant); score_clip 10
            3. advantages normalised, then clipped   loss.whiten; loss.advantage_clip 0.5
            4. the policy's clip                     loss.clip_low, loss.clip_high 0.2
            5. the critic's clip                     loss.value_clip 0.2
            6. an entropy target                     loss.entropy_coef, loss.entropy_target: off here, and of weight 0 there
            7. a pretraining loss                    off here: it needs data
          and one pass over each rollout, with a critic that starts from the reward model (critic.model). The English run that they published has less:
          scale_scores, both clips, kl.coef 0.01, a policy's lr of 5e-7 and a critic's of 1.5e-6. The ratio, and with it 4 and 5, needs more than one
          optimizer step a rollout (minibatches, epochs).
          What moves the optimum, ref exp(r / beta): 2, since dividing scores by s is a KL coefficient of s beta (taking a mean off moves nothing), and a
          clip of scores that binds; 6; 7. Of an exact critic every advantage is 0 there, so 3, 4 and 5 leave it where it is.
"""
from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fusedrl.engine.errors import ConfigError

Needs = Literal["", "critic", "group", "greedy"]
# Built-in advantages, and what each needs beside scores: a critic's values, several completions of a prompt, or the score of the greedy completion.
ADVANTAGES: dict[str, Needs] = {
    "gae": "critic", "learned_baseline": "critic", "td0": "critic", "k_step": "critic",
    "monte_carlo": "", "reward_to_go": "", "running_mean": "",
    "grpo": "group", "dr_grpo": "group", "rloo": "group", "opo": "group", "gpg": "group", "pass_at_k": "group",
    "remax": "greedy",
}
# Built-in objectives: a kind of kernels/objective.py, and the bounds it has here where a configuration names none.
OBJECTIVES: dict[str, tuple[str, dict[str, float]]] = {
    "reinforce": ("reinforce", {}),
    "importance": ("ratio", {}),
    "ppo_clip": ("clip", {"clip_low": 0.2, "clip_high": 0.2}),
    "dual_clip": ("clip", {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": 3.0}),
    "dapo": ("clip", {"clip_low": 0.2, "clip_high": 0.28}),
    "ppo_penalty": ("kl_penalty", {}),  # beta is the adaptive coefficient
    "trpo": ("ratio", {}),  # minimised within a bound on the KL: stages/trpo.py
    "gspo": ("gspo", {"clip_low": 3e-4, "clip_high": 4e-4}),
    "cispo": ("cispo", {"clip_max": 5.0}),
    "sapo": ("sapo", {"tau_positive": 1.0, "tau_negative": 1.05}),
    "gmpo": ("geometric_mean", {"clip_low": 0.4, "clip_high": 0.4}),
    "dro": ("dro", {"beta": 1.0}),
    "sequence_ratio": ("sequence_ratio", {"clip_low": 0.2, "clip_high": 0.2}),  # a function in objectives.py
}
BOUNDS = ("clip_low", "clip_high", "dual_clip", "clip_max", "tau_positive", "tau_negative", "beta")  # what an objective may use of LossConfig


@dataclass(frozen=True)
class Algorithm:
    """One row: see the columns of the table in the README."""

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
    refill_tries: int = 0
    normalize_scores: bool = False
    score_clip: float | None = None
    advantage_clip: float | None = None


_SUM = "sequence_mean_token_sum"  # the policy gradient as it is derived: log-probabilities of whole completions, a mean over completions
_MEAN = "sequence_mean_token_mean"


def _group(title: str, advantage: str, objective: str, aggregation: str, *, kl_coef: float = 0.0, kl_estimator: str = "k3", whiten: bool = False,
           refill_tries: int = 0) -> Algorithm:
    """A row of eight completions of each prompt, whose KL, if any, is in the loss."""
    return Algorithm(title, advantage, objective, aggregation, kl_placement="loss", kl_coef=kl_coef, kl_estimator=kl_estimator, whiten=whiten,
                     samples_per_prompt=8, refill_tries=refill_tries)


ALGORITHMS: dict[str, Algorithm] = {
    "ppo": Algorithm("PPO: a clipped ratio and a critic", "gae", "ppo_clip", "token_mean", kl_coef=0.05, whiten=True, epochs=4),
    "ppo_penalty": Algorithm("PPO with an adaptive KL penalty in place of the clip", "gae", "ppo_penalty", "token_mean", kl_coef=0.05, whiten=True, epochs=4),
    "trpo": Algorithm("TRPO: a natural gradient step within a KL, and a critic", "gae", "trpo", "token_mean", kl_coef=0.05, whiten=True, epochs=10),
    "ppo_max": Algorithm("PPO-max: scores and advantages normalised and clipped", "gae", "ppo_clip", "token_mean", kl_coef=0.02, whiten=True,
                         normalize_scores=True, score_clip=10.0, advantage_clip=0.5),
    "a2c": Algorithm("advantage actor-critic, k steps ahead", "k_step", "reinforce", _SUM, kl_coef=0.05),
    "actor_critic": Algorithm("actor-critic, one step ahead", "td0", "reinforce", _SUM, kl_coef=0.05),
    "reinforce": Algorithm("REINFORCE with reward-to-go", "reward_to_go", "reinforce", _SUM, kl_coef=0.05),
    "reinforce_baseline": Algorithm("REINFORCE less the running mean of past returns", "running_mean", "reinforce", _SUM, kl_coef=0.05),
    "reinforce_learned": Algorithm("REINFORCE less a learned baseline", "learned_baseline", "reinforce", _SUM, kl_coef=0.05),
    "reinforce_pp": Algorithm("REINFORCE++: token returns, whitened over the batch", "reward_to_go", "ppo_clip", "token_mean", kl_coef=0.01, whiten=True),
    "reinforce_pp_baseline": _group("REINFORCE++ less the group's mean", "dr_grpo", "ppo_clip", "token_mean", kl_coef=0.01, kl_estimator="k2",
                                    whiten=True),
    "rloo": Algorithm("leave-one-out baseline", "rloo", "ppo_clip", _SUM, kl_coef=0.05, samples_per_prompt=4),
    "remax": Algorithm("REINFORCE less the greedy completion's score", "remax", "reinforce", _SUM, kl_coef=0.05),
    "opo": _group("length-weighted baseline, exactly on policy", "opo", "reinforce", "token_mean"),
    "gpg": _group("group policy gradient", "gpg", "reinforce", "token_mean"),
    "grpo": _group("advantages within the group", "grpo", "ppo_clip", _MEAN, kl_coef=0.04),
    "dr_grpo": _group("GRPO without its two divisions", "dr_grpo", "ppo_clip", "sequence_sum_norm"),
    "dapo": _group("GRPO with a higher upper clip, a mean over tokens, dynamic sampling", "grpo", "dapo", "token_mean", refill_tries=3),
    "gspo": _group("GRPO with the sequence's ratio", "grpo", "gspo", _MEAN),
    "cispo": _group("GRPO with a capped importance weight", "grpo", "cispo", "token_mean"),
    "sapo": _group("GRPO with a soft gate in place of the clip", "grpo", "sapo", _MEAN),
    "gmpo": _group("GRPO with the geometric mean of the ratios", "grpo", "gmpo", _MEAN),
    "pass_at_k": _group("GRPO for the best of a group", "pass_at_k", "ppo_clip", _MEAN),
    "dro": Algorithm("direct reward optimisation with a critic", "learned_baseline", "dro", "token_mean"),
    "sequence_ratio": Algorithm("a completion's clipped ratio times its reward, for study", "monte_carlo", "sequence_ratio", _MEAN, kl_coef=0.05, epochs=4),
}


def resolve(what: str, name: str, known: Mapping[str, Any]) -> Any:
    """`known[name]`, or the attribute that a dotted path names.

    Raises:
        ConfigError: neither; names those known.
    """
    if name in known:
        return known[name]
    module, dot, attribute = name.rpartition(".")
    expected = f"config: expected loss.{what} to be one of {', '.join(sorted(known))}, or module.function"
    if not dot:
        raise ConfigError(f"{expected}; got {name!r}")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{expected}; {name!r} cannot be imported: {error}") from error
