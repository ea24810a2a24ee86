import random

import pytest
import torch

from fusedrl.engine.base.completion import Completion
from fusedrl.engine.base.packing import IGNORE, PackedBatch, cost_of, split_by_tokens

SEQUENCES = [([5, 6], [7, 8, 9]), ([1], []), ([2], [3]), ([4, 4, 4], [4])]


def test_layout_labels_and_alignment(device):
    batch = PackedBatch.from_sequences(SEQUENCES, device=device)
    assert batch.token_ids.tolist() == [5, 6, 7, 8, 9, 1, 2, 3, 4, 4, 4, 4]
    assert batch.cu_seqlens.tolist() == [0, 5, 6, 8, 12]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 0, 0, 1, 0, 1, 2, 3]
    assert batch.action_mask.int().tolist() == [0, 0, 1, 1, 1, 0, 0, 1, 0, 0, 0, 1]
    # The label stands one slot before its token, never across a boundary, and only where that token
    # is an action.
    i = IGNORE
    assert batch.labels().tolist() == [i, 7, 8, 9, i, i, 3, i, i, i, 4, i]
    labels = batch.labels()
    moved = PackedBatch.to_next(torch.where(labels == i, 0, labels))
    assert torch.equal(moved[batch.action_mask], batch.token_ids[batch.action_mask])
    assert not moved[~batch.action_mask].any()


def test_counts_before_a_slot(device):
    batch = PackedBatch.from_sequences(SEQUENCES, device=device)
    counts = batch.counts_before(batch.action_mask)
    assert counts.tolist() == [0, 0, 0, 1, 2, 3, 3, 3, 4, 4, 4, 4, 5]
    assert counts[batch.cu_seqlens.long()].diff().tolist() == [3, 0, 1, 1]
    empty = PackedBatch.from_sequences([], device=device)
    assert empty.counts_before(empty.action_mask).tolist() == [0]


def test_columns_follow_their_sequences(device):
    batch = PackedBatch.from_sequences(SEQUENCES, device=device).with_columns(
        old_logp=torch.arange(12.0, device=device),
        scores=torch.tensor([10.0, 11, 12, 13], device=device),
    )
    part = batch.select([2, 0])
    assert part.lengths == (2, 5)
    assert part.old_logp.tolist() == [6, 7, 0, 1, 2, 3, 4]
    assert part.scores.tolist() == [12, 10]
    assert part.cu_seqlens.dtype == torch.int32
    assert batch.select([]).num_tokens == 0
    back = torch.empty(12, device=device)
    for group in batch.split(6):
        back[batch.slots(group)] = batch.select(group).old_logp
    assert torch.equal(back, batch.old_logp)


def test_split_covers_everything_once_and_keeps_to_the_budget():
    lengths = [9, 1, 4, 4, 3, 12, 1, 1]
    parts = split_by_tokens(enumerate(lengths), 8)
    assert sorted(i for part in parts for i in part) == list(range(8))
    assert all(len(part) == 1 or sum(lengths[i] for i in part) <= 8 for part in parts)
    assert parts[0] == [5]
    assert split_by_tokens([], 8) == []
    with pytest.raises(ValueError, match="tokens_per_microbatch >= 1"):
        split_by_tokens([(0, 1)], 0)


@pytest.mark.parametrize("lanes", [2, 4, 8])
def test_micro_batches_for_lanes_are_a_multiple_of_them_and_even(lanes):
    """Two devices once shared four micro-batches of 7,207 tokens whose last one was half empty: one
    waited for a fifth of the update."""
    rng = random.Random(3)
    lengths = [rng.randint(60, 150) for _ in range(64)]
    parts = split_by_tokens(enumerate(lengths), 2048, lanes)
    assert sorted(i for part in parts for i in part) == list(range(64))
    assert len(parts) % lanes == 0
    assert len(parts) <= -(-sum(lengths) // 2048) + lanes
    costs = [sum(cost_of(lengths[i]) for i in part) for part in parts]
    assert all(sum(lengths[i] for i in part) <= 2048 for part in parts)
    assert max(costs) < 1.1 * min(costs)


def test_micro_batches_for_lanes_with_few_or_long_sequences():
    assert split_by_tokens([(7, 3)], 8, 4) == [[7]]
    assert split_by_tokens([], 8, 4) == []
    assert sorted(split_by_tokens(enumerate([3, 3, 3]), 100, 8)) == [[0], [1], [2]]
    # a sequence above the limit is alone; the rest keep to it, also where even shares do not fit
    parts = split_by_tokens(enumerate([50, 5, 5, 5, 5, 5, 5]), 8, 2)
    assert [0] in parts
    assert sorted(i for part in parts for i in part) == list(range(7))
    assert all(len(part) == 1 for part in parts)
    assert split_by_tokens(enumerate([9, 1, 4, 4]), 8, 1) == split_by_tokens(
        enumerate([9, 1, 4, 4]), 8
    )


def test_padded_round_trip(device):
    batch = PackedBatch.from_sequences(SEQUENCES, device=device)
    padded = batch.to_padded(batch.token_ids, fill=-1)
    assert padded.tolist() == [
        [5, 6, 7, 8, 9],
        [1, -1, -1, -1, -1],
        [2, 3, -1, -1, -1],
        [4, 4, 4, 4, -1],
    ]
    assert torch.equal(batch.from_padded(padded), batch.token_ids)
    with pytest.raises(ValueError, match=r"expected \[4, 5"):
        batch.from_padded(padded[:, :4])


def test_from_completions_uses_the_ids_that_were_generated_from(device):
    def completion(prompt, tokens):
        return Completion(
            prompt_ids=prompt,
            token_ids=tokens,
            logprobs=[-0.5 * t for t in tokens],
            text="",
            finish_reason="stop",
            weights_versions=[3] * len(tokens),
        )

    outs = [[completion([1, 2], [3]), completion([1, 2], [4, 5])], [completion([9], [8])]]
    batch = PackedBatch.from_completions([[1, 2], "any text"], outs, device=device)
    assert batch.lengths == (3, 4, 2)
    assert batch.rollout_logp.tolist() == [0, 0, -1.5, 0, 0, -2.0, -2.5, 0, -4.0]
    assert batch.weights_versions.tolist() == [0, 0, 3, 0, 0, 3, 3, 0, 3]
    with pytest.raises(ValueError, match="prompt 0 is not the one"):
        PackedBatch.from_completions([[1, 7], "any text"], outs, device=device)
    with pytest.raises(ValueError, match="1 prompts and 2 lists"):
        PackedBatch.from_completions([[1, 2]], outs, device=device)


def test_refuses_what_cannot_be(device):
    with pytest.raises(ValueError, match="no prompt token"):
        PackedBatch.from_sequences([([], [1])], device=device)
    with pytest.raises(ValueError, match=r"expected scores \[4\], got \[3\]"):
        PackedBatch.from_sequences(SEQUENCES, device=device).with_columns(
            scores=torch.zeros(3, device=device)
        )
    assert PackedBatch.from_sequences([], device=device).num_sequences == 0
