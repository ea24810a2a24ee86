"""Preference pairs as token ids, with what the data says of each, and how a step's pairs are packed
and cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusedrl.engine.base.errors import DataError
from fusedrl.engine.base.packing import PackedBatch, split_by_tokens
from fusedrl.engine.data.readers import ReadOptions, Source, load_pairs
from fusedrl.engine.data.tokenize import (
    count_tokens,
    drop_longer,
    encode_completion,
    encode_prompt,
    end_of_text,
)


@dataclass(frozen=True)
class TokenPair:
    """A `PairExample` as token ids: the same label, margin and weight."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    label: float = 1.0
    margin: float = 0.0
    weight: float = 1.0

    @property
    def num_tokens(self) -> int:
        """Number of tokens of both sides with their prompts, as a micro-batch holds them."""
        return 2 * len(self.prompt) + len(self.chosen) + len(self.rejected)


def read_pairs(
    source: Source,
    tokenizer: Any,
    eos_ids: Sequence[int],
    limit: int,
    *,
    skip_bad_lines: bool,
    rejects: Path | None,
    tell: Callable[[str], None],
) -> list[TokenPair]:
    """The pairs of one file whose longer side has at most `limit` tokens, ties among them. What is
    left out is counted and told.

    Raises:
        DataError: bad lines (all of them), nothing usable, no tokenizer, no EOS, all pairs longer,
            or all of one and the same answer in tokens.
    """
    examples, unusable = load_pairs(
        source,
        skip_bad_lines=skip_bad_lines,
        rejects=rejects,
        options=ReadOptions(soft_labels=True, count_tokens=partial(count_tokens, tokenizer)),
    )
    for reason, count in unusable.items():
        tell(f"pairs: {count} of {len(examples) + sum(unusable.values())} are not used: {reason}")
    end = end_of_text(tokenizer, eos_ids)
    pairs = []
    for e in examples:
        prompt = encode_prompt(tokenizer, e.prompt, e.tools)
        chosen, rejected = (
            encode_completion(tokenizer, text, end, first=not e.prompt)
            for text in (e.chosen, e.rejected)
        )
        pairs.append(TokenPair(prompt, chosen, rejected, e.label, e.margin, e.weight))
    differing = [pair for pair in pairs if pair.chosen != pair.rejected]
    if same := len(pairs) - len(differing):
        tell(f"pairs: {same} of {len(pairs)} are not used: the answers are equal in tokens")
    if not differing:
        raise DataError(
            f"{source.path}: all {len(pairs)} pairs have answers that are equal in tokens, which "
            "nothing can be learnt from; is this the model's "
            "tokenizer?"
        )
    kept, dropped = drop_longer(
        differing, limit, lambda pair: len(pair.prompt) + max(len(pair.chosen), len(pair.rejected))
    )
    tell(f"pairs: {dropped}")
    return kept


def pack_pairs(
    pairs: Sequence[TokenPair], tokens_per_microbatch: int, device: torch.device
) -> tuple[PackedBatch, list[list[int]]]:
    """(batch, cuts): sequence 2 i is the chosen side of pair i and 2 i + 1 the rejected one; each
    cut lists the pairs of a micro-batch."""
    batch = PackedBatch.from_sequences(
        ((pair.prompt, side) for pair in pairs for side in (pair.chosen, pair.rejected)),
        device=device,
    )
    return batch, split_by_tokens(
        [(index, pair.num_tokens) for index, pair in enumerate(pairs)], tokens_per_microbatch
    )


def sequences_of(cut: Sequence[int]) -> list[int]:
    """The sequences of these pairs in a batch of `pack_pairs`."""
    return [sequence for index in cut for sequence in (2 * index, 2 * index + 1)]


def column_of(pairs: Sequence[TokenPair], name: str, device: torch.device) -> Tensor:
    """[P] float64: label, margin or weight of each pair."""
    return torch.tensor([getattr(pair, name) for pair in pairs], dtype=torch.float64, device=device)
