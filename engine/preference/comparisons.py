"""Preferences among completions, and the losses that reward models are trained with.

    x       = r(better) - r(worse) - margin
    nll(x)  = -log((1 - e) sigmoid(x) + e sigmoid(-x))
    pair    = p nll(x) + (1 - p) nll(-x)

    e = label_noise, the rate at which annotators' labels are flipped; with 0 the model of Bradley
        and Terry
    p = label, the probability that the first completion really is the better one

    loss    = sum_b weight_b mean over b's pairs of pair / sum_b weight_b
    centre  = the same mean of (r(better) + r(worse))^2

All preferences are ranked lists: a pair is a list of two. A list of K completions gives up to K (K
- 1) / 2 pairs; two completions of equal rank give none. The pairs of a list are not independent, so
a list counts once, however long it is.

Noise     With flip rate e, the loss above is the exact negative log-likelihood of the labels, so
          its optimum is the true difference of scores. Label smoothing, (1 - e) nll(x) + e nll(-x),
          has its optimum at a smaller difference even if labels are clean. For a pair that a
          confident model contradicts, smoothing grows without bound; the likelihood stops at -log
          e, and the pair's gradient vanishes.
Source    Bradley and Terry (1952); Ouyang et al. (2022), eq. 1 (K-wise); Touvron et al. (2023),
          Llama 2, eq. 2 (margin); Eisenstein et al. (2023), Helping or herding?, section 3.2
          (centring). Some lecture notes print the pairwise loss without its minus sign; the loss to
          minimise is -log sigmoid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedrl.engine.base.errors import DataError
from fusedrl.engine.data.formats import detect, named
from fusedrl.engine.data.readers import (
    PairExample,
    RankedExample,
    ReadOptions,
    Source,
    load_pairs,
    load_ranked,
)
from fusedrl.engine.data.rows import read_rows
from fusedrl.engine.data.tokenize import (
    Dropped,
    count_tokens,
    drop_longer,
    encode_completion,
    encode_prompt,
)
from fusedrl.kernels.ranking_loss import kwise_ranking_loss

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Example = PairExample | RankedExample


@dataclass(frozen=True)
class Comparison:
    """Comparison of K >= 2 completions of a prompt, as token ids: rank 1 is best, equal ranks are
    ties. `margin`, `label` and `weight` hold for every pair and mean the same as in `PairExample`.

    Raises:
        DataError: the number of ranks is not the number of completions, or all ranks are equal.
    """

    prompt: list[int]
    completions: tuple[list[int], ...]
    ranks: tuple[int, ...]
    margin: float = 0.0
    label: float = 1.0
    weight: float = 1.0

    def __post_init__(self) -> None:
        if len(self.completions) != len(self.ranks) or len(set(self.ranks)) < 2:
            raise DataError(
                "comparison: expected completions and as many ranks, two of which differ, got "
                f"{len(self.completions)} and {self.ranks}"
            )

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Indices (better, worse) of all pairs that are not ties."""
        order = range(len(self.ranks))
        return [(i, j) for i in order for j in order if self.ranks[i] < self.ranks[j]]

    @property
    def best(self) -> list[int]:
        """Indices of the completions with the best rank."""
        return [i for i, rank in enumerate(self.ranks) if rank == min(self.ranks)]

    @property
    def preferred(self) -> list[int]:
        """Indices of the completions to imitate: the best ones, or none if the label is at most
        0.5."""
        return self.best if self.label > 0.5 else []

    @property
    def tokens(self) -> int:
        """Number of tokens of all completions, each with the prompt."""
        return sum(len(self.prompt) + len(completion) for completion in self.completions)


# ---- from files ----------------------------------------------------------------------------------
def is_ranked(source: Source) -> bool:
    """Whether a file holds ranked lists, not pairs, judged by its first recognisable row."""
    if source.format is not None:
        return RankedExample in named(source.format).reads
    for one in read_rows(source):
        entry = None if one.fault else detect(one.row, RankedExample)
        if entry is not None:
            return RankedExample in entry.reads
    return False


def load_preferences(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    *,
    soft_labels: bool = False,
    skip_bad_lines: bool = False,
    rejects: str | Path | None = None,
) -> tuple[list[Example], dict[str, int]]:
    """Read the ranked lists or the pairs of a file. Return them, and for each reason how many rows
    were dropped. Errors are those of `readers.load_prompts`."""
    options = ReadOptions(soft_labels=soft_labels, count_tokens=partial(count_tokens, tokenizer))
    if is_ranked(source):
        lists, dropped = load_ranked(
            source, skip_bad_lines=skip_bad_lines, rejects=rejects, options=options
        )
        return list(lists), dropped
    pairs, dropped = load_pairs(
        source, skip_bad_lines=skip_bad_lines, rejects=rejects, options=options
    )
    return list(pairs), dropped


def encode_preferences(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], eos_id: int, limit: int
) -> tuple[list[tuple[Example, Comparison]], Dropped]:
    """Encode examples; return each with its token ids. An example is dropped if the prompt with any
    of its completions has more than `limit` tokens. Raise DataError if all are dropped."""
    return drop_longer(
        [(example, _encode(tokenizer, example, eos_id)) for example in examples],
        limit,
        lambda item: len(item[1].prompt) + max(map(len, item[1].completions)),
    )


def _encode(tokenizer: PreTrainedTokenizerBase, example: Example, eos_id: int) -> Comparison:
    texts = (
        example.completions
        if isinstance(example, RankedExample)
        else (example.chosen, example.rejected)
    )
    prompt = encode_prompt(tokenizer, example.prompt, example.tools)
    completions = tuple(
        encode_completion(tokenizer, text, eos_id, first=not example.prompt) for text in texts
    )
    if isinstance(example, RankedExample):
        return Comparison(prompt, completions, example.ranks)
    return Comparison(prompt, completions, (1, 2), example.margin, example.label, example.weight)


# ---- pairs ---------------------------------------------------------------------------------------
class Pairs(NamedTuple):
    """Pairs [P] of some comparisons. `better_P` and `worse_P` index the completions of all
    comparisons in order. `share_P` is each pair's weight in the mean over comparisons."""

    better_P: Tensor  # int64, into the completions
    worse_P: Tensor
    margin_P: Tensor
    label_P: Tensor
    share_P: Tensor

    @classmethod
    def of(
        cls,
        comparisons: Sequence[Comparison],
        *,
        total_weight: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Pairs:
        """List the pairs of `comparisons`. If these are only a part of the comparisons that the
        mean is over, `total_weight` is the weight of all."""
        total = total_weight if total_weight is not None else sum(c.weight for c in comparisons)
        rows: list[tuple[int, int, float, float, float]] = []
        first = 0
        for c in comparisons:
            found = c.pairs
            rows += [
                (first + i, first + j, c.margin, c.label, c.weight / len(found) / total)
                for i, j in found
            ]
            first += len(c.completions)
        better, worse, margin, label, share = zip(*rows, strict=True) if rows else ((),) * 5
        numbers = (
            torch.tensor(values, dtype=dtype, device=device) for values in (margin, label, share)
        )
        return cls(
            torch.tensor(better, dtype=torch.int64, device=device),
            torch.tensor(worse, dtype=torch.int64, device=device),
            *numbers,
        )


def preference_nll(x: Tensor, label_noise: float = 0.0) -> Tensor:
    """-log((1 - e) sigmoid(x) + e sigmoid(-x)), finite for any finite x; 0 <= e < 0.5."""
    if label_noise == 0.0:
        return F.softplus(-x)
    return -torch.logaddexp(
        math.log1p(-label_noise) + F.logsigmoid(x), math.log(label_noise) + F.logsigmoid(-x)
    )


def pair_nll(difference_P: Tensor, label_P: Tensor, label_noise: float = 0.0) -> Tensor:
    """Return the negative log-likelihood [P] of soft labels; for a label of 1, exactly that of a
    hard label."""
    nll_P = preference_nll(difference_P, label_noise)
    return torch.where(
        label_P == 1,
        nll_P,
        label_P * nll_P + (1 - label_P) * preference_nll(-difference_P, label_noise),
    )


def preference_loss(
    scores_M: Tensor,
    comparisons: Sequence[Comparison],
    *,
    label_noise: float = 0.0,
    total_weight: float | None = None,
) -> Tensor:
    """Return the weighted mean loss of comparisons, `loss` at the top of this file.

    Args:
        scores_M: scores of all completions, comparison by comparison.
        label_noise: the rate at which labels are flipped, in [0, 0.5).
        total_weight: weight of all comparisons of the step, if these are only a micro-batch of it.
            The losses of the micro-batches then sum to the step's loss.
    Returns:
        A scalar, differentiable in the scores; 0 for no comparisons.
    """
    if not comparisons:
        return scores_M.sum()
    if (
        label_noise == 0.0
        and scores_M.dtype == torch.float32
        and all((c.margin, c.label, c.weight) == (0.0, 1.0, 1.0) for c in comparisons)
    ):
        ranks_M = torch.tensor(
            [rank for c in comparisons for rank in c.ranks],
            dtype=torch.int64,
            device=scores_M.device,
        )
        sizes = torch.tensor([0, *(len(c.ranks) for c in comparisons)], dtype=torch.int32)
        share = 1.0 if total_weight is None else len(comparisons) / total_weight
        return (
            kwise_ranking_loss(
                scores_M, ranks_M, sizes.cumsum(0, dtype=torch.int32).to(scores_M.device)
            )
            * share
        )
    p = Pairs.of(
        comparisons, total_weight=total_weight, device=scores_M.device, dtype=scores_M.dtype
    )
    return (
        p.share_P
        * pair_nll(scores_M[p.better_P] - scores_M[p.worse_P] - p.margin_P, p.label_P, label_noise)
    ).sum()


def centre_loss(
    scores_M: Tensor, comparisons: Sequence[Comparison], *, total_weight: float | None = None
) -> Tensor:
    """Return the mean of (r(better) + r(worse))^2, weighted as in `preference_loss`. It draws the
    average score towards 0; the ranking loss does not determine that average."""
    p = Pairs.of(
        comparisons, total_weight=total_weight, device=scores_M.device, dtype=scores_M.dtype
    )
    return (p.share_P * (scores_M[p.better_P] + scores_M[p.worse_P]).square()).sum()
