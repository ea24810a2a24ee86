"""PackedBatch: the only type of batch. It holds flat tokens, sequence boundaries, and columns
(tensors with a number per token or per sequence), without padding.

Shapes    N tokens, B sequences. Sequence b owns the slots cu_seqlens[b] : cu_seqlens[b + 1].
Alignment Slot t of a per-token column holds the number of token t given the tokens before it. What
          a model computes at slot t - 1 (the prediction of token t, the value of the state before
          it) is moved to slot t by `to_next`. The first slot of a sequence has no prediction: it is
          never an action and its columns are 0.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusedrl.kernels.kept import Kept

if TYPE_CHECKING:
    from fusedrl.engine.base.completion import Completion

IGNORE = -100
_PER_TOKEN = (
    "token_ids",
    "positions",
    "action_mask",
    "loss_mask",
    "held",
    "rollout_logp",
    "old_logp",
    "old_entropy",
    "ref_logp",
    "values",
    "rollout_values",
    "advantages",
    "returns",
    "weights",
    "token_rewards",
    "weights_versions",
    "turn_states",
)
_PER_SEQUENCE = (
    "scores",
    "group_ids",
    "greedy_scores",
    "reward_parts",
    "token_totals",
    "cut_off",
    "last_values",
)


def cost_of(tokens: int) -> int:
    """Return the cost of a forward and backward pass over a sequence, in arbitrary units:
    proportional to its tokens, plus a quadratic part for attention."""
    return tokens * (4096 + tokens)


def split_by_tokens(
    sized: Iterable[tuple[int, int]], tokens_per_microbatch: int, lanes: int = 1
) -> list[list[int]]:
    """Group (index, tokens) items into micro-batches of at most `tokens_per_microbatch` tokens.
    Items are taken longest first, so that each micro-batch has similar lengths; an item above the
    limit gets a micro-batch of its own. The result depends on the arguments alone.

    Args:
        lanes: into how many equal shares the micro-batches will be dealt. Above 1 their number is a
            multiple of it, where there are as many items, and their costs are as even as can be.
    """
    if tokens_per_microbatch < 1:
        raise ValueError(f"expected tokens_per_microbatch >= 1, got {tokens_per_microbatch}")
    items = sorted(sized, key=lambda item: (-item[1], item[0]))
    parts: list[list[int]] = []
    room = 0
    for index, tokens in items:
        if not parts or tokens > room:
            parts.append([])
            room = tokens_per_microbatch
        parts[-1].append(index)
        room -= tokens
    if lanes == 1 or not items:
        return parts
    count = len(parts)
    while True:
        count = min(len(items), -(-count // lanes) * lanes)
        if (even := _evenly(items, tokens_per_microbatch, count)) is not None:
            return even
        count += 1


def _evenly(
    items: Sequence[tuple[int, int]], tokens_per_microbatch: int, count: int
) -> list[list[int]] | None:
    """Group items, sorted by falling length, into `count` micro-batches, each item into the one
    with the lowest cost so far that has room for it; None if an item finds no room."""
    parts: list[list[int]] = [[] for _ in range(count)]
    room, costs = [tokens_per_microbatch] * count, [0] * count
    for index, tokens in items:
        open_ = [p for p in range(count) if tokens <= room[p] or not parts[p]]
        if not open_:
            return None
        part = min(open_, key=lambda p: (costs[p], p))
        parts[part].append(index)
        room[part] -= tokens
        costs[part] += cost_of(tokens)
    return parts


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """Sequences laid end to end.

    token_ids [N] int64; cu_seqlens [B+1] int32; positions [N] int64, from 0 in every sequence;
    action_mask [N] bool, True where the policy chose the token (the EOS that ended it included).
    The other columns are optional: bool [N] loss_mask, the actions that the loss is over (None: all
    of them), and held, the actions that it holds near the policy of the rollout; float32 [N]
    log-probabilities, entropies, values, advantages, returns, loss weights and token rewards,
    int64 [N] weights_versions, int64 [N] turn_states, equal at turns that answer equal
    observations, float32 [B] scores and scores of the same
    prompt's greedy completion, int64 [B] group_ids, equal for sequences of the same prompt, float32
    [B, K] reward_parts, what `scores` are the weighted sum of (NaN: does not apply), float32 [B]
    token_totals, the part of a score that accrued at single tokens, bool [B] cut_off, sequences
    whose end is none for the critic, float32 [B] last_values, the value of the state after the last
    token of those (0 for others). `rollout_logp` and `rollout_values` come from the sampler, for
    comparison. Training uses the numbers of the training forward, whose bits the next forward
    reproduces. `kept` has one row per slot: the ids that the slot's token was drawn from (those
    that top-k, top-p or min-p left; an empty row: the whole vocabulary). The token is scored over
    these ids alone. `lengths` are the sequences'
    lengths on the host.
    """

    token_ids: Tensor
    cu_seqlens: Tensor
    positions: Tensor
    action_mask: Tensor
    lengths: tuple[int, ...]
    loss_mask: Tensor | None = None
    held: Tensor | None = None
    rollout_logp: Tensor | None = None
    old_logp: Tensor | None = None
    old_entropy: Tensor | None = None
    ref_logp: Tensor | None = None
    values: Tensor | None = None
    rollout_values: Tensor | None = None
    advantages: Tensor | None = None
    returns: Tensor | None = None
    weights: Tensor | None = None
    token_rewards: Tensor | None = None
    weights_versions: Tensor | None = None
    turn_states: Tensor | None = None
    scores: Tensor | None = None
    group_ids: Tensor | None = None
    greedy_scores: Tensor | None = None
    reward_parts: Tensor | None = None
    token_totals: Tensor | None = None
    cut_off: Tensor | None = None
    last_values: Tensor | None = None
    kept: Kept | None = None

    def __post_init__(self) -> None:
        n, b = sum(self.lengths), len(self.lengths)
        if self.kept is not None and self.kept.offsets.shape != (n + 1,):
            raise ValueError(
                f"PackedBatch: expected kept of {n} rows, got {len(self.kept.offsets) - 1}"
            )
        if self.cu_seqlens.shape != (b + 1,):
            raise ValueError(
                f"PackedBatch: expected cu_seqlens [{b + 1}] for {b} lengths, got "
                f"{list(self.cu_seqlens.shape)}"
            )
        for names, size in ((_PER_TOKEN, n), (_PER_SEQUENCE, b)):
            for name in names:
                column = getattr(self, name)
                more = ("K",) if name == "reward_parts" else ()
                if column is not None and (len(column) != size or column.ndim != 1 + len(more)):
                    raise ValueError(
                        f"PackedBatch: expected {name} [{', '.join((str(size), *more))}], got "
                        f"{list(column.shape)}"
                    )

    # ---- building --------------------------------------------------------------------------------
    @classmethod
    def from_sequences(
        cls,
        sequences: Iterable[tuple[Sequence[int], Sequence[int]]],
        *,
        device: torch.device | str | None = None,
    ) -> PackedBatch:
        """Pack (prompt ids, completion ids) pairs; the completion tokens are the actions.

        Raises:
            ValueError: a sequence has no prompt token before its first action (its logprob would
                have no condition).
        """
        ids: list[int] = []
        sizes: list[int] = []  # lengths of prompts and completions in turn
        for index, (prompt, completion) in enumerate(sequences):
            if not len(prompt) and len(completion):
                raise ValueError(
                    f"PackedBatch: sequence {index} has {len(completion)} completion tokens and no "
                    "prompt token; give it at least a BOS"
                )
            ids.extend(prompt)
            ids.extend(completion)
            sizes += (len(prompt), len(completion))
        sizes_B2 = torch.tensor(sizes, dtype=torch.int64).view(-1, 2)
        actions = (
            torch.tensor([False, True]).repeat(len(sizes_B2)).repeat_interleave(sizes_B2.flatten())
        )
        return cls._of(
            torch.tensor(ids, dtype=torch.int64), actions, sizes_B2.sum(1).tolist(), device
        )

    @classmethod
    def from_masked(
        cls,
        sequences: Iterable[tuple[Sequence[int], Sequence[bool]]],
        *,
        device: torch.device | str | None = None,
    ) -> PackedBatch:
        """Pack (ids, actions) pairs, such as conversations in which the assistant speaks more than
        once.

        Raises:
            ValueError: ids and actions have different lengths, or a first token is an action (its
                logprob would have no condition).
        """
        listed = list(sequences)
        for index, (tokens, chosen) in enumerate(listed):
            if len(tokens) != len(chosen) or (len(chosen) and chosen[0]):
                raise ValueError(
                    f"PackedBatch: expected an action flag for each token of sequence {index} and "
                    f"none on its first, got {len(tokens)} tokens and "
                    f"{len(chosen)} flags"
                    + (", the first of them set" if len(chosen) and chosen[0] else "")
                )
        ids = [token for tokens, _ in listed for token in tokens]
        actions = [bool(flag) for _, chosen in listed for flag in chosen]
        return cls._of(
            torch.tensor(ids, dtype=torch.int64),
            torch.tensor(actions, dtype=torch.bool),
            [len(tokens) for tokens, _ in listed],
            device,
        )

    @classmethod
    def _of(
        cls,
        token_ids: Tensor,
        action_mask: Tensor,
        lengths: Sequence[int],
        device: torch.device | str | None,
    ) -> PackedBatch:
        sizes = torch.tensor(lengths, dtype=torch.int64)
        ends = sizes.cumsum(0)
        cu_seqlens = torch.cat([ends.new_zeros(1), ends])
        positions = torch.arange(int(sizes.sum())) - torch.repeat_interleave(cu_seqlens[:-1], sizes)
        return cls(
            token_ids.to(device),
            cu_seqlens.int().to(device),
            positions.to(device),
            action_mask.to(device),
            tuple(int(n) for n in lengths),
        )

    @classmethod
    def from_completions(
        cls,
        prompts: Sequence[Any],
        outs: Sequence[Sequence[Completion]],
        *,
        device: torch.device | str | None = None,
    ) -> PackedBatch:
        """Pack completions, one sequence each, prompt by prompt. The sampler's log-probabilities
        become `rollout_logp`, and its values `rollout_values` if all completions have them. `kept`
        is set if top-k, top-p or min-p excluded part of the vocabulary for any token.

        The prompt ids are those that the sampler used (`Completion.prompt_ids`); nothing is
        tokenised again. Pass the same `prompts` as to `generate`; prompts that are token ids are
        checked against the completions.
        """
        if len(prompts) != len(outs):
            raise ValueError(
                f"PackedBatch.from_completions: {len(prompts)} prompts and {len(outs)} lists of "
                "completions; expected one list per prompt"
            )
        flat = [completion for group in outs for completion in group]
        for index, (prompt, group) in enumerate(zip(prompts, outs, strict=True)):
            is_ids = (
                not isinstance(prompt, str)
                and len(prompt) > 0
                and all(isinstance(token, int) for token in prompt)
            )
            if is_ids and any(list(completion.prompt_ids) != list(prompt) for completion in group):
                raise ValueError(
                    f"PackedBatch.from_completions: prompt {index} is not the one its completions "
                    "were generated from"
                )
        batch = cls.from_sequences(((c.prompt_ids, c.token_ids) for c in flat), device=device)
        rollout = torch.zeros(batch.num_tokens)
        versions = torch.zeros(batch.num_tokens, dtype=torch.int64)
        completed = batch.action_mask.cpu()
        rollout[completed] = torch.tensor(
            [x for c in flat for x in c.logprobs], dtype=torch.float32
        )
        versions[completed] = torch.tensor(
            [v for c in flat for v in c.weights_versions], dtype=torch.int64
        )
        # all tokens of a completion, except those added by `extend`
        actions = completed.clone()
        if any(c.action_mask is not None for c in flat):
            chosen = [
                x
                for c in flat
                for x in (c.action_mask if c.action_mask is not None else [True] * len(c.token_ids))
            ]
            actions[completed] = torch.tensor(chosen, dtype=torch.bool)
        batch = replace(
            batch,
            action_mask=actions.to(device),
            rollout_logp=rollout.to(device),
            weights_versions=versions.to(device),
            kept=_kept(flat, device),
        )
        if not flat or any(c.values is None for c in flat):
            return batch
        values = torch.zeros(batch.num_tokens)
        values[completed] = torch.tensor(
            [x for c in flat for x in c.values or ()], dtype=torch.float32
        )
        return replace(batch, rollout_values=values.to(device))

    @classmethod
    def concat(cls, batches: Sequence[PackedBatch]) -> PackedBatch:
        """Join batches: all sequences in order, with the columns that every batch has. Raise
        ValueError if there are no batches."""
        if not batches:
            raise ValueError("PackedBatch.concat: expected one batch or more, got none")
        found = {
            name: [getattr(batch, name) for batch in batches]
            for name in (*_PER_TOKEN, *_PER_SEQUENCE)
        }
        columns = {
            name: torch.cat(parts)
            for name, parts in found.items()
            if all(part is not None for part in parts)
        }
        lengths = tuple(n for batch in batches for n in batch.lengths)
        device = batches[0].device
        kept = None
        if any(batch.kept is not None for batch in batches):
            parts = [batch.kept or Kept.whole(batch.num_tokens, device) for batch in batches]
            kept = Kept.concat(parts)
        return cls(cu_seqlens=_bounds(lengths, device), lengths=lengths, kept=kept, **columns)

    # ---- sizes -----------------------------------------------------------------------------------
    @property
    def num_tokens(self) -> int:
        """Number of tokens of all sequences."""
        return sum(self.lengths)

    @property
    def num_sequences(self) -> int:
        """Number of sequences."""
        return len(self.lengths)

    @property
    def max_length(self) -> int:
        """Length of the longest sequence."""
        return max(self.lengths, default=0)

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""
        return self.token_ids.device

    @property
    def trained_mask(self) -> Tensor:
        """[N] bool: the actions that the loss is over."""
        return self.action_mask if self.loss_mask is None else self.loss_mask

    # ---- what a model computes at a slot, and what it says of the next one -----------------------
    def labels(self) -> Tensor:
        """[N] int64. Slot t holds the token at t + 1 if that token is an action of the same
        sequence, else IGNORE."""
        labels = torch.full_like(self.token_ids, IGNORE)
        if self.num_tokens:
            labels[:-1] = torch.where(self.action_mask[1:], self.token_ids[1:], IGNORE)
        return labels  # a first slot is never an action, so nothing crosses a boundary

    def kept_of_labels(self) -> Kept | None:
        """Rows of `kept` aligned with `labels`: row t has the ids that the token at t + 1 was drawn
        from."""
        if self.kept is None or not self.num_tokens:
            return None
        # the first slot is no action, and its row is empty
        ids, offsets = self.kept
        return Kept(ids, torch.cat([offsets[1:], offsets[-1:]]))

    @staticmethod
    def to_next(x_N: Tensor) -> Tensor:
        """Move each number at slot t - 1 to slot t; slot 0 becomes 0. Differentiable. Mask the
        result: the first slot of every later sequence receives the last number of the sequence
        before it."""
        return torch.cat([x_N.new_zeros(min(1, x_N.shape[0])), x_N[:-1]])

    @staticmethod
    def to_previous(x_N: Tensor) -> Tensor:
        """Move each number at slot t to slot t - 1, whose hidden state predicts token t; the last
        slot becomes 0. If a column is 0 at first slots, no number moves into another sequence.
        Differentiable."""
        return torch.cat([x_N[1:], x_N.new_zeros(min(1, x_N.shape[0]))])

    @staticmethod
    def counts_before(mask_N: Tensor) -> Tensor:
        """Return [N + 1] int64: the number of True slots before each slot, and before the end."""
        return torch.cat([mask_N.new_zeros(1, dtype=torch.int64), mask_N.cumsum(0)])

    # ---- parts -----------------------------------------------------------------------------------
    def with_columns(self, **columns: Tensor | Kept | None) -> PackedBatch:
        """Return the same batch with these columns set."""
        return replace(self, **columns)  # type: ignore[arg-type]

    def column(self, name: str) -> Tensor:
        """Return an optional column. Raise ValueError if it was not filled."""
        column = getattr(self, name)
        if column is None:
            raise ValueError(
                f"PackedBatch: the column {name} is not filled; set it by with_columns({name}=...)"
            )
        return column

    def slots(self, sequences: Sequence[int]) -> Tensor:
        """Return [n] int64, the token slots of these sequences, in this order."""
        starts = list(accumulate(self.lengths, initial=0))
        parts = [torch.arange(starts[b], starts[b + 1]) for b in sequences]
        return (torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)).to(self.device)

    def select(self, sequences: Sequence[int]) -> PackedBatch:
        """Return the batch of these sequences, in this order, with all their columns."""
        slots, rows = (
            self.slots(sequences),
            torch.tensor(list(sequences), dtype=torch.int64, device=self.device),
        )
        picked: dict[str, Any] = {
            name: column[slots]
            for name in _PER_TOKEN
            if (column := getattr(self, name)) is not None
        }
        picked |= {
            name: column[rows]
            for name in _PER_SEQUENCE
            if (column := getattr(self, name)) is not None
        }
        lengths = tuple(self.lengths[b] for b in sequences)
        kept = None if self.kept is None else self.kept.select(slots)
        return PackedBatch(
            cu_seqlens=_bounds(lengths, self.device), lengths=lengths, kept=kept, **picked
        )

    def split(
        self,
        tokens_per_microbatch: int,
        sequences: Sequence[int] | None = None,
        apart: Collection[int] = (),
        lanes: int = 1,
    ) -> list[list[int]]:
        """Partition `sequences` (by default all) into micro-batches: see `split_by_tokens`.
        Sequences in `apart` are not mixed with others: their micro-batches come last."""
        members = range(self.num_sequences) if sequences is None else sequences
        return [
            group
            for among in (False, True)
            for group in split_by_tokens(
                [(b, self.lengths[b]) for b in members if (b in apart) is among],
                tokens_per_microbatch,
                lanes,
            )
        ]

    def micro_batches(
        self, tokens_per_microbatch: int, sequences: Sequence[int] | None = None
    ) -> Iterator[PackedBatch]:
        """Yield the micro-batches of `split` as batches."""
        return (self.select(group) for group in self.split(tokens_per_microbatch, sequences))

    def to(self, device: torch.device | str) -> PackedBatch:
        """Return the same batch on `device`."""
        moved = {
            f.name: value.to(device)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor | Kept)
        }
        return replace(self, **moved)  # type: ignore[arg-type]

    # ---- padded views: only at the borders -------------------------------------------------------
    def to_padded(self, x_N: Tensor, *, fill: float | int | bool = 0) -> Tensor:
        """Return a column [N, ...] as [B, T, ...]: sequences are left-aligned, with `fill` after
        them."""
        out = x_N.new_full((self.num_sequences, self.max_length, *x_N.shape[1:]), fill)
        out[self._valid()] = x_N
        return out

    def from_padded(self, x_BT: Tensor) -> Tensor:
        """Return [B, T, ...] as [N, ...]: the inverse of `to_padded`."""
        if x_BT.shape[:2] != (self.num_sequences, self.max_length):
            raise ValueError(
                f"PackedBatch.from_padded: expected [{self.num_sequences}, {self.max_length}, "
                f"...], got {list(x_BT.shape)}"
            )
        return x_BT[self._valid()]

    def _valid(self) -> Tensor:
        lengths = (self.cu_seqlens[1:] - self.cu_seqlens[:-1])[:, None]
        return torch.arange(self.max_length, device=self.device)[None] < lengths


def _bounds(lengths: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32, device=device)


def _kept(completions: Sequence[Completion], device: torch.device | str | None) -> Kept | None:
    """Return `kept` of the slots of these completions, each after its prompt; None if no token was
    drawn from a part of the vocabulary."""
    if not any(len(row) for c in completions for row in c.kept or ()):
        return None
    rows: list[Sequence[int]] = []
    for c in completions:
        rows += [()] * len(c.prompt_ids)
        rows += c.kept if c.kept is not None else [()] * len(c.token_ids)
    return Kept.of_lists(rows, device or "cpu")
