"""GDPO's advantage: each reward normalised by itself."""

import math

import torch
from tests.engine.policy.enumeration import deviation, standardised

from fusedrl.engine.base.packing import PackedBatch
from fusedrl.engine.policy.advantages import GRPO_EPS, Signals, find_advantage


def test_gdpo_normalises_each_reward_by_itself(device):
    """Two rewards and penalties, by loops; the second reward does not apply to two completions, and
    the third group is flat in every part."""
    parts = [
        [0.0, 100.0, 0.0],
        [1.0, math.nan, -0.5],
        [1.0, 300.0, 0.0],
        [0.0, -50.0, 0.0],
        [0.0, 20.0, 0.0],
        [1.0, math.nan, 0.0],
        [0.1, 4001.1, -1.0],
        [0.1, 4001.1, -1.0],
        [0.1, 4001.1, -1.0],
    ]
    groups, weights = [4, 4, 4, 2, 2, 2, 9, 9, 9], (2.0, 0.5, 1.0)
    batch = PackedBatch.from_sequences([([1], [2, 3])] * len(parts), device=device).with_columns(
        scores=torch.zeros(len(parts), device=device),
        group_ids=torch.tensor(groups, device=device),
        reward_parts=torch.tensor(parts, device=device),
    )
    sums = [0.0] * len(parts)
    for g in set(groups):
        for k, weight in enumerate(weights):
            there = [i for i, h in enumerate(groups) if h == g and not math.isnan(parts[i][k])]
            for i, x in zip(there, standardised([parts[i][k] for i in there]), strict=True):
                sums[i] += weight * x
    expected = torch.tensor(sums, dtype=torch.float64, device=device) / (deviation(sums) + GRPO_EPS)
    found = find_advantage("gdpo").function(Signals(batch, reward_weights=weights))
    found = found[batch.action_mask].view(-1, 2).double()
    torch.testing.assert_close(found, expected[:, None].expand(-1, 2), rtol=1e-5, atol=1e-6)
    assert (found[-3:] == 0).all(), "a flat group is left out of training exactly"
    larger = batch.reward_parts * torch.tensor([1e3, 1, 1], device=device)
    scaled = Signals(batch.with_columns(reward_parts=larger), reward_weights=weights)
    again = find_advantage("gdpo").function(scaled)
    torch.testing.assert_close(
        again[batch.action_mask].view(-1, 2).double(), found, rtol=1e-3, atol=1e-3
    )
