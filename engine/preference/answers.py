"""Answers labelled as wanted or not, as token ids; and the prompts with their neighbours' answers
that KTO estimates its KL from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fusedrl.engine.base.packing import PackedBatch, split_by_tokens
from fusedrl.engine.data.formats import detect, named
from fusedrl.engine.data.readers import (
    PairExample,
    ReadOptions,
    Source,
    UnpairedExample,
    load_pairs,
    load_unpaired,
)
from fusedrl.engine.data.rows import read_rows
from fusedrl.engine.data.tokenize import (
    count_tokens,
    drop_longer,
    encode_completion,
    encode_prompt,
    end_of_text,
)


@dataclass(frozen=True)
class TokenAnswer:
    """Answer to a prompt as token ids, and whether it is wanted."""

    prompt: list[int]
    answer: list[int]
    wanted: bool


def is_unpaired(source: Source) -> bool:
    """Whether a file holds labelled answers, not pairs, judged by its first recognisable row."""
    if source.format is not None:
        return UnpairedExample in named(source.format).reads
    for one in read_rows(source):
        entry = None if one.fault else detect(one.row, UnpairedExample)
        if entry is not None:
            return UnpairedExample in entry.reads
    return True


def read_answers(
    source: Source,
    tokenizer: Any,
    eos_ids: Sequence[int],
    limit: int,
    *,
    skip_bad_lines: bool,
    rejects: Path | None,
    tell: Callable[[str], None],
) -> list[TokenAnswer]:
    """Read the labelled answers of one file, or both answers of each of its pairs. One is left
    out if it has more than `limit` tokens with its prompt. The numbers of what is left out are
    reported by `tell`.

    Raises:
        DataError: the file has bad lines (all are listed) or nothing usable, the model has no
            tokenizer or no EOS, or all answers are left out.
    """
    options = ReadOptions(count_tokens=partial(count_tokens, tokenizer))
    common = dict(skip_bad_lines=skip_bad_lines, rejects=rejects, options=options)
    rows: Sequence[UnpairedExample | PairExample]
    rows, unusable = (load_unpaired if is_unpaired(source) else load_pairs)(source, **common)  # type: ignore[arg-type]
    for reason, count in unusable.items():
        total = len(rows) + sum(unusable.values())
        tell(f"answers: {count} of {total} rows are not used: {reason}")
    end = end_of_text(tokenizer, eos_ids)
    answers = []
    for row in rows:
        prompt = encode_prompt(tokenizer, row.prompt, row.tools)
        answers += [
            TokenAnswer(
                prompt, encode_completion(tokenizer, text, end, first=not row.prompt), wanted
            )
            for text, wanted in _labelled(row)
        ]
    kept, dropped = drop_longer(answers, limit, lambda one: len(one.prompt) + len(one.answer))
    tell(f"answers: {dropped}")
    return kept


def _labelled(row: UnpairedExample | PairExample) -> Iterator[tuple[str, bool]]:
    """Yield the texts of a row, and whether each is wanted."""
    if isinstance(row, UnpairedExample):
        yield row.completion, row.label
    else:
        yield row.chosen, True
        yield row.rejected, False


def mismatched(answers: Sequence[TokenAnswer], limit: int) -> list[tuple[list[int], list[int]]]:
    """Return each prompt with the answer of the next one, the last with that of the first
    (Ethayarajh et al., 2024, section 3.2). An answer is cut to what fits `limit` tokens with the
    prompt. Fewer than two answers have no neighbour, and give nothing."""
    if len(answers) < 2:
        return []
    return [
        (one.prompt, other.answer[: max(1, limit - len(one.prompt))])
        for one, other in zip(answers, [*answers[1:], answers[0]], strict=True)
    ]


def packed(
    sequences: Sequence[tuple[list[int], list[int]]],
    tokens_per_microbatch: int,
    device: Any,
    lanes: int = 1,
) -> tuple[PackedBatch, list[list[int]]]:
    """Return (batch, cuts) of prompts with answers; each entry of `cuts` lists the sequences of a
    micro-batch, and the micro-batches make `lanes` equal shares."""
    batch = PackedBatch.from_sequences(sequences, device=device)
    return batch, split_by_tokens(list(enumerate(batch.lengths)), tokens_per_microbatch, lanes)
