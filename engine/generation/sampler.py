"""Sampling options of a caller, and the same options for all running sequences as arrays."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TypeGuard, cast

import numpy as np

from fusedrl.kernels.runtime.checks import LEAST_TEMPERATURE

_INT64 = 2**63
_FLOAT32 = float(np.finfo(np.float32).max)
_NEUTRAL = {"top_k": 0, "top_p": 1, "min_p": 0}  # values that exclude no token


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, Integral) and not isinstance(value, bool)


@dataclass(frozen=True)
class SamplingParams:
    """Options for drawing completions.

    Attributes:
        max_new_tokens: largest number of tokens of a completion, its EOS included.
        temperature: divides the logits; 0 is greedy.
        top_p, top_k, min_p: restrict the draw, in the order top-k (0: all), top-p in (0, 1], min-p
            in [0, 1].
        n: completions per prompt.
        seed: keys every draw, together with the request id, the sample index and the position.
        stop_token_ids: tokens that end a completion, in addition to the EOS ids of tokenizer and
            model.
        min_new_tokens: number of tokens before which no token that ends a completion is drawn.
        stop: strings that end a completion as soon as its text contains one. The text then ends
            before the string, and the tokens end after it. A string that is a special token of the
            tokenizer, such as <|im_end|>, is treated as one of stop_token_ids, since texts contain
            no special tokens.
        banned_token_ids: tokens that are never drawn.
        logit_bias: token id -> number added to that logit before the draw; `logprobs` stay those of
            the model's own distribution.
        return_kept: completions list the tokens that each token could be drawn from
            (`Completion.kept`), and their logprobs are those of this restricted distribution. A
            trainer can then score the distribution that was sampled. Not allowed with logit_bias,
            which no set of tokens describes.

    Raises:
        TypeError, ValueError: a field is outside its range; the message names it.
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    n: int = 1
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    min_new_tokens: int = 0
    stop: tuple[str, ...] = ()
    banned_token_ids: tuple[int, ...] = ()
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    return_kept: bool = False

    def __post_init__(self) -> None:
        for name, low in (
            ("max_new_tokens", 1),
            ("top_k", 0),
            ("n", 1),
            ("seed", -_INT64),
            ("min_new_tokens", 0),
        ):
            value = getattr(self, name)
            if not _is_int(value):
                raise TypeError(f"SamplingParams: expected {name} to be an integer, got {value!r}")
            if not low <= value < _INT64:
                raise ValueError(
                    f"SamplingParams: expected {name} >= "
                    f"{low}{'' if low >= 0 else ' and < 2**63'}, got {value}"
                )
        for name, rule, inside in (
            (
                "temperature",
                f"0 (greedy) or from {LEAST_TEMPERATURE:.2g} on, and finite",
                lambda x: x == 0 or LEAST_TEMPERATURE <= x < math.inf,
            ),
            ("top_p", "in (0, 1]", lambda x: 0 < x <= 1),
            ("min_p", "in [0, 1]", lambda x: 0 <= x <= 1),
        ):
            value = getattr(self, name)
            if not isinstance(value, Real) or isinstance(value, bool):
                raise TypeError(f"SamplingParams: expected {name} to be a number, got {value!r}")
            if not inside(value):
                raise ValueError(f"SamplingParams: expected {name} {rule}, got {value}")
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                "SamplingParams: expected min_new_tokens <= max_new_tokens, got "
                f"{self.min_new_tokens} > {self.max_new_tokens}"
            )
        self._take_lists()

    def _take_lists(self) -> None:
        """Convert ids, stop strings and biases to tuples."""
        # Lists, a single stop string and a dict of biases are accepted, too. Stored as tuples, they
        # keep the dataclass hashable.
        for name in ("stop_token_ids", "banned_token_ids"):
            ids = getattr(self, name)
            if (
                isinstance(ids, str | bytes)
                or not isinstance(ids, Sequence)
                or any(not _is_int(t) or t < 0 for t in ids)
            ):
                raise TypeError(
                    f"SamplingParams: expected {name} to be token ids >= 0, got {ids!r}"
                )
            object.__setattr__(self, name, tuple(int(t) for t in ids))
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, Sequence) or any(
            not isinstance(text, str) or not text for text in stop
        ):
            raise TypeError(
                f"SamplingParams: expected stop to be strings that are not empty, got {self.stop!r}"
            )
        object.__setattr__(self, "stop", tuple(stop))
        pairs = tuple(
            self.logit_bias.items() if isinstance(self.logit_bias, Mapping) else self.logit_bias
        )
        for pair in pairs:
            if (
                len(pair) != 2
                or not _is_int(pair[0])
                or pair[0] < 0
                or not isinstance(pair[1], Real)
                or not abs(pair[1]) <= _FLOAT32
            ):
                raise TypeError(
                    "SamplingParams: expected logit_bias to map token ids >= 0 to numbers that are "
                    "finite in float32, "
                    f"got {pair!r}; banned_token_ids bans a token"
                )
        object.__setattr__(
            self, "logit_bias", tuple(sorted((int(token), float(bias)) for token, bias in pairs))
        )
        if self.return_kept and pairs:
            raise ValueError(
                "SamplingParams: expected no logit_bias with return_kept (a bias moves the "
                f"probabilities of the tokens that are left, too), got {dict(self.biases())}"
            )

    @property
    def truncates(self) -> bool:
        """Whether `logprobs` differ from those of the distribution that is sampled: a token that
        the model gives probability can never be drawn, or is drawn more or less often."""
        return self.temperature > 0 and (
            self.top_k > 0
            or self.top_p < 1
            or self.min_p > 0
            or self.min_new_tokens > 0
            or bool(self.banned_token_ids)
            or bool(self.logit_bias)
        )

    def biases(self) -> tuple[tuple[int, float], ...]:
        """Return `logit_bias` as (token id, number) pairs, ordered by id."""
        # __post_init__ has converted a dict to this type
        return cast("tuple[tuple[int, float], ...]", self.logit_bias)

    def token_ids(self) -> tuple[int, ...]:
        """Return every token id that a field names."""
        return (
            *self.stop_token_ids,
            *self.banned_token_ids,
            *(token for token, _ in self.biases()),
        )


class SamplingTable:
    """Sampling options of the running sequences, one row per slot, in arrays, so that a step
    touches no Python object per sequence."""

    def __init__(self, slots: int) -> None:
        self._numbers = {
            name: np.zeros(slots) for name in ("temperature", "top_k", "top_p", "min_p")
        }
        self._keys = np.zeros((slots, 4), dtype=np.int64)
        self._stops = np.full((slots, 1), -1, dtype=np.int64)  # -1 is no token
        # length from which on a stop token may be drawn
        self._first_stop = np.zeros(slots, dtype=np.int64)
        self.watched = np.zeros(slots, dtype=bool)  # whether the text is searched for stop strings
        self.returns_kept = np.zeros(slots, dtype=bool)
        self._banned: list[tuple[int, ...]] = [()] * slots
        self._bias: list[tuple[tuple[int, float], ...]] = [()] * slots
        self._bans, self._biased = np.zeros(slots, dtype=bool), np.zeros(slots, dtype=bool)

    def put(
        self,
        slot: int,
        params: SamplingParams,
        request_id: int,
        sample: int,
        stop_ids: frozenset[int],
        num_prompt: int,
    ) -> None:
        """Assign row `slot` to sample `sample` of request `request_id`, whose prompt has
        `num_prompt` tokens."""
        for name, column in self._numbers.items():
            column[slot] = getattr(params, name)
        self._keys[slot] = (params.seed, request_id, sample, 0)
        if len(stop_ids) >= self._stops.shape[1]:
            self._stops = np.pad(
                self._stops,
                ((0, 0), (0, len(stop_ids) + 1 - self._stops.shape[1])),
                constant_values=-1,
            )
        self._stops[slot] = -1
        self._stops[slot, : len(stop_ids)] = sorted(stop_ids)
        self._first_stop[slot] = num_prompt + params.min_new_tokens
        self.watched[slot], self.returns_kept[slot] = bool(params.stop), params.return_kept
        self._banned[slot], self._bias[slot] = params.banned_token_ids, params.biases()
        self._bans[slot], self._biased[slot] = (
            bool(params.banned_token_ids),
            bool(params.logit_bias),
        )

    def arguments(
        self, slots: np.ndarray, fixed: bool
    ) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """Return temperature, top_k, top_p and min_p for `sample`: as a column if these slots
        differ, as a number if they agree. If `fixed`, a number is used only for a value that
        restricts nothing, since numbers are part of a captured step."""
        columns, numbers = {}, {}
        for name, column in self._numbers.items():
            values = column[slots]
            if (values == values[0]).all() and (not fixed or values[0] == _NEUTRAL.get(name)):
                numbers[name] = float(values[0])
            else:
                columns[name] = values
        return columns, numbers

    def keys(self, slots: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Return [R, 4] int64: (seed, request id, sample index, position of the token to draw)."""
        keys = self._keys[slots]
        keys[:, 3] = positions
        return keys

    def stops(self, slots: np.ndarray) -> np.ndarray:
        """Return [W, R] int64: the tokens that end each sequence. At least one per sequence is -1,
        which is no token."""
        return np.ascontiguousarray(self._stops[slots].T)

    def suppresses(self, slots: np.ndarray, lengths: np.ndarray) -> bool:
        """Whether some token may not be drawn by one of these sequences: it is banned, or would end
        a completion too early."""
        return bool((lengths < self._first_stop[slots]).any() or self._bans[slots].any())

    def suppressed(self, slots: np.ndarray, lengths: np.ndarray) -> dict[str, np.ndarray]:
        """Return the columns suppress_ids and suppress_until, [R, W] int64, or nothing if all
        tokens may be drawn. A sequence with fewer than suppress_until tokens may not draw the id in
        suppress_ids. Rows are padded by repeating an entry."""
        if not self.suppresses(slots, lengths):
            return {}
        stops = self._stops[slots]
        ids = np.where(stops >= 0, stops, stops[:, :1])
        until = np.where(ids >= 0, self._first_stop[slots][:, None], 0)
        ids = np.maximum(ids, 0)
        banned = _padded([self._banned[slot] for slot in slots.tolist()], -1, np.int64)
        if banned.size:
            # an id that is banned and a stop token must have the same length in both places
            until[(ids[:, :, None] == banned[:, None]).any(2)] = _INT64 - 1
            none = banned[:, :1] < 0
            more = np.where(none, ids[:, :1], np.where(banned >= 0, banned, banned[:, :1]))
            ids, until = (
                np.hstack([ids, more]),
                np.hstack(
                    [until, np.broadcast_to(np.where(none, until[:, :1], _INT64 - 1), more.shape)]
                ),
            )
        return {"suppress_ids": ids, "suppress_until": until}

    def biases(self, slots: np.ndarray) -> dict[str, np.ndarray]:
        """Return the columns bias_ids [R, W] int64 and bias_values [R, W] float32, to be added to
        the logits, or nothing without biases. Rows are padded with a bias of 0 for id 0."""
        if not self._biased[slots].any():
            return {}
        rows = [self._bias[slot] for slot in slots.tolist()]
        return {
            "bias_ids": _padded([[token for token, _ in row] for row in rows], 0, np.int64),
            "bias_values": _padded([[value for _, value in row] for row in rows], 0, np.float32),
        }

    def is_stop(self, slots: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Return [..., R] bool: whether the token ends the sequence."""
        return (self._stops[slots] == tokens[..., None]).any(axis=-1)


def _padded(rows: Sequence[Sequence[float]], fill: int, dtype: type) -> np.ndarray:
    """Return the rows as an array [R, W]. W is the longest row's length, rounded up to a power of
    two so that few widths occur; it is 0 if all rows are empty."""
    longest = max(map(len, rows))
    out: np.ndarray = np.full(
        (len(rows), 1 << (longest - 1).bit_length() if longest else 0), fill, dtype=dtype
    )
    for row, values in zip(out, rows, strict=True):
        row[: len(values)] = values
    return out
