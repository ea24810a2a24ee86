"""Preference pairs as token ids, with label, margin and weight; and how a step's pairs are packed
into a batch and split into micro-batches."""

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
    """Pair of a `PairExample` as token ids, with the same label, margin and weight."""

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
    """Read the pairs of one file, pairs labelled a tie included. A pair is left out if its longer
    side with the prompt has more than `limit` tokens, or if both answers are the same tokens. The
    numbers of pairs left out are reported by `tell`.

    Raises:
        DataError: the file has bad lines (all are listed) or nothing usable, the model has no
            tokenizer or no EOS, or all pairs are left out.
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
    pairs: Sequence[TokenPair],
    tokens_per_microbatch: int,
    device: torch.device,
    lanes: int = 1,
) -> tuple[PackedBatch, list[list[int]]]:
    """Return (batch, cuts). Sequence 2 i of the batch is the chosen side of pair i, and 2 i + 1 the
    rejected side. Each entry of `cuts` lists the pairs of a micro-batch, and the micro-batches make
    `lanes` equal shares."""
    batch = PackedBatch.from_sequences(
        ((pair.prompt, side) for pair in pairs for side in (pair.chosen, pair.rejected)),
        device=device,
    )
    sized = [(index, pair.num_tokens) for index, pair in enumerate(pairs)]
    return batch, split_by_tokens(sized, tokens_per_microbatch, lanes)


def sequences_of(cut: Sequence[int]) -> list[int]:
    """Return the sequences of the pairs `cut` in a batch made by `pack_pairs`."""
    return [sequence for index in cut for sequence in (2 * index, 2 * index + 1)]


def column_of(pairs: Sequence[TokenPair], name: str, device: torch.device) -> Tensor:
    """Return each pair's label, margin or weight, as a float64 tensor [P]."""
    return torch.tensor([getattr(pair, name) for pair in pairs], dtype=torch.float64, device=device)
