"""Best-of-n: sample n completions of a prompt, keep the one that scores highest; the baseline that
needs no training.

KL(best of n || policy) <= log n - (n - 1) / n          equal where no two completions can score
                                                        alike and each is improbable; the bound
                                                        always holds
                                                        (Beirami et al., 2024; as an equality in
                                                        Stiennon et al., 2020, appendix G.3)
E[best of k] ~ sum_i C(i - 1, k - 1) / C(n, k) s_(i)    s_(1) <= ... <= s_(n) the scores of n >= k
                                                        samples: the mean over all subsets of k,
                                                        unbiased
                                                        (Nakano et al., 2021, WebGPT, appendix I)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusedrl.engine.actor import HybridActor
from fusedrl.engine.base.completion import Completion
from fusedrl.engine.base.errors import RewardError
from fusedrl.engine.config import GenerationConfig
from fusedrl.engine.data.records import PromptExample
from fusedrl.engine.data.tokenize import encode_prompt
from fusedrl.engine.rewards.rewards import RewardSet
from fusedrl.engine.rollout.rollout import params_of


@dataclass(frozen=True)
class BestOf:
    """The n completions of a prompt with their scores (NaN if a reward is invalid), and the index
    of the best."""

    completions: list[Completion]
    scores: list[float]
    index: int

    @property
    def best(self) -> Completion:
        """Completion with the highest score."""
        return self.completions[self.index]

    @property
    def score(self) -> float:
        """Score of the best completion."""
        return self.scores[self.index]


def best_of_n(
    actor: HybridActor,
    prompts: Sequence[PromptExample],
    rewards: RewardSet,
    n: int,
    generation: GenerationConfig,
    seed: int,
) -> list[BestOf]:
    """Sample n completions of each prompt and choose the best; among equal ones, the first.

    Args:
        prompts: prompts with their columns, which are passed to the rewards.
        generation: options of sampling.
        seed: seed of the samples.
    Raises:
        ValueError: n < 1, or greedy sampling, whose completions are all the same.
        RewardError: a reward raised or did not return one value per completion, or no completion of
            a prompt has a valid reward.
    """
    if n < 1 or generation.temperature == 0:
        raise ValueError(
            f"best_of_n: expected n >= 1 and a temperature above 0, got n = {n} and "
            f"{generation.temperature}; greedy completions are all one"
        )
    ids = [
        encode_prompt(actor.tokenizer, example.prompt, example.columns.get("tools"))
        for example in prompts
    ]
    outs = actor.generate(ids, params_of(generation, n=n, seed=seed))
    flat = [
        (example, tokens, completion)
        for example, tokens, group in zip(prompts, ids, outs, strict=True)
        for completion in group
    ]
    columns = {
        name: [example.columns.get(name) for example, _, _ in flat]
        for name in sorted({name for example in prompts for name in example.columns})
    }
    scored = rewards.score(
        [example.prompt for example, _, _ in flat],
        [c.text for _, _, c in flat],
        [tokens for _, tokens, _ in flat],
        [c.token_ids for _, _, c in flat],
        columns,
        keys=[(seed, number, c.sample) for number, group in enumerate(outs) for c in group],
    )
    found = []
    for number, group in enumerate(outs):
        scores = scored.total[number * n : (number + 1) * n]
        index = first_best(scores)
        if index is None:
            reason = next(reason for sample, _, reason in scored.invalid if sample // n == number)
            raise RewardError(
                f"best_of_n: none of the {n} completions of prompt {number + 1} has a valid "
                f"reward; the first: {reason}"
            )
        found.append(BestOf(group, scores, index))
    return found


def first_best(scores: Sequence[float]) -> int | None:
    """Return the index of the highest score; among equal scores, the first. Return None if all are
    NaN."""
    return max(
        (i for i, score in enumerate(scores) if not math.isnan(score)),
        key=lambda i: (scores[i], -i),
        default=None,
    )


def best_of_n_kl(n: int) -> float:
    """Return log n - (n - 1) / n nats: the largest KL of the best of n samples from the
    distribution that they are drawn from."""
    return math.log(n) - (n - 1) / n


def expected_best(scores_PN: Tensor, k: int, values_PN: Tensor | None = None) -> Tensor:
    """Return [P] float64: for each prompt, an unbiased estimate of the expected score of the best
    of k fresh samples. It is computed from the scores of N >= k samples.

    Args:
        scores_PN: scores of N independent samples of each of P prompts.
        values_PN: numbers to report for the best sample in place of its score, such as a gold
            reward (the reward that the score only approximates); None: the score.
    Raises:
        ValueError: k outside 1 .. N, or scores that are NaN.
    """
    N = scores_PN.shape[-1]
    if not 1 <= k <= N or bool(scores_PN.isnan().any()):
        raise ValueError(
            f"expected_best: expected 1 <= k <= {N}, the samples of a prompt, and scores that are "
            f"numbers, got k = {k}"
            + (
                " and NaN among the scores: leave invalid samples out"
                if bool(scores_PN.isnan().any())
                else ""
            )
        )
    order = scores_PN.argsort(dim=-1, stable=True)
    weights = torch.tensor(
        [math.comb(i, k - 1) / math.comb(N, k) for i in range(N)],
        dtype=torch.float64,
        device=scores_PN.device,
    )
    return (
        torch.gather(scores_PN if values_PN is None else values_PN, -1, order).double() * weights
    ).sum(-1)
