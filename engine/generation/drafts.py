"""Drafts: guesses at the next tokens of a completion, from texts that were drawn before. A step may
compute several guessed tokens of a sequence at once (speculation.py). A wrong guess costs time and
changes nothing.

For each prompt, the guesses come from the prompt itself, from what the call has drawn for it (the
completion itself and the other samples), and from what earlier calls drew for it. How often each
token followed the last one, two, three, four and eight tokens is counted. The next token is guessed
to be the one that followed most often the longest of these contexts that occurred before.

How likely a guess is right is learnt within a call, from the guesses that were tried: by the length
of the context, and by the share of its most frequent continuation.

Source    Saxena (2023), prompt lookup decoding; Shao et al. (2025), Beat the long tail:
          distribution-aware speculative decoding, for drafts from earlier epochs.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fusedrl.engine.base.completion import Completion
from fusedrl.engine.base.errors import CheckpointError
from fusedrl.engine.config import GenerationConfig
from fusedrl.engine.model.step import rows_alone

_CONTEXTS = (8, 4, 3, 2, 1)  # tokens of a context, the longest first
# before any guess was tried: its chance over the share of its continuation, by context. Measured on
# 128 texts of SmolLM2-135M at temperatures 0.6 and 1, and rounded to what lies between the two
_FIRST_CHANCES = (0.7, 0.45, 0.35, 0.25, 0.15)
_SHARES = 5  # shares of the most frequent continuation are told apart in so many steps
_TRIED = 8  # guesses that these chances count as
_COMPLETIONS = 16  # of a prompt, the newest ones are kept
_TOKENS = 1 << 22  # of all prompts


class Draft(NamedTuple):
    """Guessed next tokens of a sequence. `chances`: how likely each is right, together with all
    before it. `kinds`: what tells each guess's chance, for `Drafts.judge`."""

    token_ids: list[int]
    chances: list[float]
    kinds: list[int]


class _Counts:
    """How often each token followed each context, in the texts of one prompt."""

    def __init__(self, prompt_ids: Sequence[int], texts: Iterable[Sequence[int]]) -> None:
        self._followed: dict[tuple[int, ...], dict[int, int]] = {}
        self._prompt = list(prompt_ids)
        self._seen: dict[int, int] = {}  # by sequence: tokens that are counted
        self._count(self._prompt, 1)
        for text in texts:
            self.add(text)

    def add(self, text: Sequence[int], seen: int = 0) -> None:
        """Count a completion from its token `seen` on."""
        tail = self._prompt[-_CONTEXTS[0] :]
        before = [*tail, *text[max(0, seen - _CONTEXTS[0]) : seen]][-_CONTEXTS[0] :]
        self._count([*before, *text[seen:]], len(before))

    def follow(self, sequence: int, text: Sequence[int]) -> None:
        """Count what is new in the completion of a sequence."""
        seen = self._seen.get(sequence, 0)
        if len(text) > seen:
            self.add(text, seen)
            self._seen[sequence] = len(text)

    def _count(self, tokens: list[int], start: int) -> None:
        for at in range(start, len(tokens)):
            token = tokens[at]
            for size in _CONTEXTS:
                if size <= at:
                    counts = self._followed.setdefault(tuple(tokens[at - size : at]), {})
                    # the newest of equally frequent ones comes last
                    counts[token] = counts.pop(token, 0) + 1

    def guess(self, tokens: list[int]) -> tuple[int, float, int] | None:
        """Return the likeliest next token, its share of what followed the longest known context,
        and the index of this context's length. None if no context is known."""
        for index, size in enumerate(_CONTEXTS):
            counts = self._followed.get(tuple(tokens[-size:]))
            if counts is not None and size <= len(tokens):
                most = max(reversed(counts), key=counts.__getitem__)
                return most, counts[most] / sum(counts.values()), index
        return None


class Drafts:
    """Texts drawn for each prompt, and guesses from them. Give one object to all calls of
    `generate` that draw for the same prompts, one call at a time.

    What a call draws serves that call, and later ones once `keep` was called.

    Attributes:
        of_call: of this process in this call, the guesses that were computed, those of them that
            were right, and the sequences that were computed with guesses, each once per step.
        totals: the same, of all processes and of all calls that have ended since `keep`.
        newest: number of calls of `keep`.
    """

    def __init__(self) -> None:
        # by digest of the prompt, the newest prompt last
        self._texts: OrderedDict[bytes, list[array[int]]] = OrderedDict()
        self._tokens = 0
        self._fresh: list[tuple[bytes, array[int]]] = []
        self.newest = 0
        self.totals = [0, 0, 0]
        self.begin()

    # ---- within a call ---------------------------------------------------------------------------
    def begin(self) -> None:
        """Begin a call: what was learnt of chances is forgotten."""
        self._counts: dict[bytes, _Counts] = {}
        self._finished: dict[bytes, list[tuple[int, Sequence[int]]]] = {}
        self.of_call = [0, 0, 0]
        # [contexts x shares], guesses tried and guesses that were right
        kinds = len(_CONTEXTS) * (_SHARES + 1)
        self._tried = [float(_TRIED)] * kinds
        self._right = [
            _TRIED * chance * share / _SHARES
            for chance in _FIRST_CHANCES
            for share in range(_SHARES + 1)
        ]

    def guess(
        self, prompt_ids: Sequence[int], sequence: int, text: list[int], most: int, least: float
    ) -> Draft:
        """Guess at most `most` tokens that follow `text`, the completion so far. Stop before a
        guess whose chance is below `least`. `sequence`: a number that tells the completion from
        the others of the call."""
        key = _digest(prompt_ids)
        counts = self._counts.get(key)
        if counts is None:
            counts = self._counts[key] = _Counts(prompt_ids, self._texts.get(key, ()))
        for other, whole in self._finished.pop(key, ()):
            counts.follow(other, whole)
        counts.follow(sequence, text)
        draft, chance = Draft([], [], []), 1.0
        tokens = [*prompt_ids[-_CONTEXTS[0] :], *text[-_CONTEXTS[0] :]]
        while len(draft.token_ids) < most and (found := counts.guess(tokens)) is not None:
            token, share, context = found
            kind = context * (_SHARES + 1) + int(share * _SHARES)
            chance *= self._right[kind] / self._tried[kind]
            if chance < least:
                break
            draft.token_ids.append(token)
            draft.chances.append(chance)
            draft.kinds.append(kind)
            tokens.append(token)
        return draft

    def judge(self, kinds: Sequence[int], right: int) -> None:
        """Note that of a sequence's guesses of these kinds the first `right` were right."""
        for at, more in enumerate((len(kinds), right, 1)):
            self.of_call[at] += more
        for at, kind in enumerate(kinds[: right + 1]):  # the rest was never put to the test
            self._tried[kind] += 1
            self._right[kind] += at < right

    def finish(self, prompt_ids: Sequence[int], sequence: int, text: Sequence[int]) -> None:
        """Note that a completion is finished."""
        self._finished.setdefault(_digest(prompt_ids), []).append((sequence, text))

    # ---- from call to call -----------------------------------------------------------------------
    def end(self, outs: Sequence[Sequence[Completion]], of_ranks: Sequence[Sequence[int]]) -> None:
        """End a call that drew these completions. `of_ranks`: `of_call` of every process."""
        self.totals = [sum(column) for column in zip(self.totals, *of_ranks, strict=True)]
        self.begin()
        for one in (completion for group in outs for completion in group):
            self._fresh.append((_digest(one.prompt_ids), array("i", one.token_ids)))

    def metrics(self) -> dict[str, float]:
        """Return the metrics of the calls since `keep`."""
        drafted, accepted, verifications = self.totals
        found = {"speculation/drafted": float(drafted), "speculation/accepted": float(accepted)}
        if verifications:
            found["speculation/tokens_per_verification"] = 1 + accepted / verifications
        return found

    def keep(self) -> None:
        """Let later calls draw on what earlier ones drew, and begin to count anew. Of each prompt
        the newest 16 completions are kept, of all of them 4 million tokens; prompts that were not
        drawn for the longest are dropped first."""
        for key, text in self._fresh:
            texts = self._texts.setdefault(key, [])
            self._texts.move_to_end(key)
            texts.append(text)
            self._tokens += len(text)
            if len(texts) > _COMPLETIONS:
                self._tokens -= len(texts.pop(0))
        while self._tokens > _TOKENS:
            _, dropped = self._texts.popitem(last=False)
            self._tokens -= sum(map(len, dropped))
        self._fresh.clear()
        self.begin()
        self.newest += 1
        self.totals = [0, 0, 0]

    # ---- checkpoints -----------------------------------------------------------------------------
    def tensors(self) -> dict[str, Tensor]:
        """Return what later calls draw on, as tensors."""
        flat = array("i")
        for texts in self._texts.values():
            for text in texts:
                flat.extend(text)
        return {
            "prompts": torch.tensor([list(key) for key in self._texts], dtype=torch.uint8),
            "counts": torch.tensor(list(map(len, self._texts.values())), dtype=torch.int64),
            "lengths": torch.tensor(
                [len(text) for texts in self._texts.values() for text in texts], dtype=torch.int64
            ),
            "token_ids": torch.tensor(flat, dtype=torch.int32),
            "newest": torch.tensor([self.newest]),
        }

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Restore what `tensors` returned. Raise CheckpointError if `saved` is something else."""
        try:
            keys = [bytes(row) for row in saved["prompts"].tolist()]
            counts, lengths = saved["counts"].tolist(), saved["lengths"].tolist()
            flat, newest = array("i", saved["token_ids"].tolist()), int(saved["newest"][0])
        except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
            raise CheckpointError(
                f"checkpoint: drafts holds no texts that this version reads ({error}); start in "
                "another --run.dir"
            ) from error
        if len(keys) != len(counts) or sum(counts) != len(lengths) or sum(lengths) != len(flat):
            raise CheckpointError(
                f"checkpoint: drafts holds {len(keys)} prompts, {len(lengths)} texts and "
                f"{len(flat)} tokens that do not belong together; start in another --run.dir"
            )
        self._texts.clear()
        self._fresh.clear()
        at = iter(lengths)
        start = 0
        for key, count in zip(keys, counts, strict=True):
            texts = self._texts[key] = []
            for _ in range(count):
                length = next(at)
                texts.append(flat[start : start + length])
                start += length
        self._tokens, self.newest = len(flat), newest
        self.begin()


def _digest(prompt_ids: Sequence[int]) -> bytes:
    return hashlib.blake2b(array("q", prompt_ids).tobytes(), digest_size=16).digest()


# ---- of a run ------------------------------------------------------------------------------------
def drafts_of(
    generation: GenerationConfig, device: torch.device, plays: bool = False
) -> Drafts | None:
    """Return what a stage's rollouts guess next tokens from; None without the option, or where
    guesses cannot be used. `plays`: completions are trajectories, whose turns are not guessed."""
    return Drafts() if generation.speculate and rows_alone(device) and not plays else None


def warn_of_drafts(generation: GenerationConfig, drafts: Drafts | None) -> str:
    """Return what to say where the option has no effect, or nothing."""
    if not generation.speculate or drafts is not None:
        return ""
    return (
        "generation.speculate has no effect here: it needs single completions, a CPU and the C++ "
        "kernels (fusedrl doctor), where a row of a step does not depend on the rows beside it"
    )
