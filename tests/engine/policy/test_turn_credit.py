"""What the turns of a trajectory are credited with: the papers' formulas in loops beside
`within_groups`, GAE over the gaps that observations leave, and nothing of what stands at
observations."""

import math
from dataclasses import replace

import pytest
import torch

from fusedrl.engine.base.packing import PackedBatch
from fusedrl.engine.config import LossConfig, PolicyConfig, TurnsConfig
from fusedrl.engine.policy.advantages import GRPO_EPS, Signals, estimate
from fusedrl.engine.policy.turn_credit import turn_numbers
from fusedrl.engine.rewards.rewards import moved_rewards

GAMMA = 0.9
# of each trajectory: its group, and its turns: (tokens, reward, state) each
TRAJECTORIES = [
    (0, [(2, 1.0, 5), (1, 0.0, 6), (3, 2.0, 7)]),
    (0, [(1, 0.5, 5), (2, 1.0, 7)]),
    (0, [(4, -1.0, 5)]),
    (3, [(1, 7.0, 5), (1, 7.0, 5)]),
    (3, [(2, 7.0, 5), (3, 8.0, 9)]),
    (8, [(2, 3.0, 5)]),  # a group of one
]


def batch_of(device, gap=2, offset=0.0):
    sequences, rewards, states = [], [], []
    for _, turns in TRAJECTORIES:
        mask, own, state = [False] * 3, [0.0] * 0, [0] * 3
        for index, (tokens, reward, of) in enumerate(turns):
            observed = gap if index else 0
            mask += [False] * observed + [True] * tokens
            state += [0] * observed + [of] * tokens
            own += [0.0] * (observed + tokens - 1) + [reward + offset * (index == 0)]
        sequences.append(([1] * len(mask), mask))
        rewards.append(own)
        states += state
    batch = PackedBatch.from_masked(sequences, device=device)
    return batch.with_columns(
        scores=torch.tensor([sum(own) for own in rewards], device=device),
        group_ids=torch.tensor([group for group, _ in TRAJECTORIES], device=device),
        token_rewards=moved_rewards(batch, rewards)[0],
        turn_states=torch.tensor(states, device=device),
    )


def config_of(algorithm, credit, **options):
    turns = TurnsConfig(credit=credit, gamma=GAMMA, **options)
    return PolicyConfig("m", "d", (), algorithm, environment="e.py:E", turns=turns)


def compared(value, others, method):
    """Of one return among all of its group, itself included."""
    mean, n = sum(others) / len(others), len(others)
    if n == 1 or len(set(others)) == 1:
        return 0.0
    if method == "rloo":
        return (value - mean) * n / (n - 1)
    spread = math.sqrt(sum((x - mean) ** 2 for x in others) / (n - 1)) + GRPO_EPS
    return (value - mean) / (spread if method == "grpo" else 1.0)


def expected(method, credit, weight=1.0):
    """By loops over trajectories and turns."""
    returns = []
    for group, turns in TRAJECTORIES:
        for index in range(len(turns)):
            to_go = sum(GAMMA**j * reward for j, (_, reward, _) in enumerate(turns[index:]))
            returns.append((group, turns[index][2] if credit == "state" else index, to_go))
    totals = [(group, sum(reward for _, reward, _ in turns)) for group, turns in TRAJECTORIES]
    found, at = [], 0
    for group, turns in TRAJECTORIES:
        whole = compared(
            sum(reward for _, reward, _ in turns), [x for g, x in totals if g == group], method
        )
        for tokens, _, _ in turns:
            _, kind, to_go = returns[at]
            at += 1
            own = compared(to_go, [x for g, k, x in returns if (g, k) == (group, kind)], method)
            found += [own if credit == "turn" else whole + weight * own] * tokens
    return found


@pytest.mark.parametrize("method", ["grpo", "dr_grpo", "rloo"])
@pytest.mark.parametrize("credit", ["turn", "state"])
def test_turns_are_credited_by_the_formula(method, credit, device):
    options = {"state_weight": 0.5} if credit == "state" else {}
    config = config_of(method, credit, **options)
    batch = batch_of(device)
    found = estimate(config, Signals.of(config, batch, 0.0, 0.0)).advantages
    assert (found[~batch.action_mask] == 0).all()
    wanted = torch.tensor(expected(method, credit, 0.5), device=device)
    torch.testing.assert_close(found[batch.action_mask], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("credit", ["turn", "state"])
def test_credit_by_turn_does_not_look_at_the_length_of_observations(credit, device):
    config = config_of("grpo", credit)
    found = []
    for gap in (1, 7):
        batch = batch_of(device, gap)
        one = estimate(config, Signals.of(config, batch, 0.0, 0.0)).advantages
        found.append(one[batch.action_mask])
    assert found[0].equal(found[1])


@pytest.mark.parametrize("credit", ["turn", "state"])
def test_a_constant_in_the_rewards_of_the_first_turn_changes_no_advantage(credit, device):
    """It is in every return of the first turn, and there alone."""
    config = config_of("dr_grpo", credit)
    found = []
    for offset in (0.0, 1000.0):
        batch = batch_of(device, offset=offset)
        # equal observations of one trajectory would be compared with each other
        states = torch.where(batch.turn_states == 5, 100 + turn_numbers(batch), 0)
        batch = batch.with_columns(turn_states=states)
        found.append(estimate(config, Signals.of(config, batch, 0.0, 0.0)).advantages)
    torch.testing.assert_close(found[0], found[1], atol=1e-3, rtol=0)


def test_trajectories_of_one_turn_are_credited_as_completions(device):
    batch = PackedBatch.from_sequences([([1], [2] * n) for n in (2, 3, 1, 4)], device=device)
    batch = batch.with_columns(
        scores=torch.tensor([1.0, 3.0, 2.0, 2.5], device=device),
        group_ids=torch.tensor([0, 0, 1, 1], device=device),
    )
    usual = PolicyConfig("m", "d", ("r.py:f",), "grpo")
    whole = estimate(usual, Signals.of(usual, batch, 0.0, 0.0)).advantages
    config = config_of("grpo", "turn")
    assert estimate(config, Signals.of(config, batch, 0.0, 0.0)).advantages.equal(whole)


def test_gae_carries_through_observations(device):
    """The advantages are those of the same actions with nothing between them, and what stands at
    observations, NaN too, is in none."""
    config = PolicyConfig(
        "m", "d", (), "ppo", environment="e.py:E", loss=LossConfig(gamma=0.9, lam=0.8)
    )
    config = replace(config, loss=replace(config.loss, whiten=False))
    found = []
    for gap in (3, 1):
        batch = batch_of(device, gap)
        count = int(batch.action_mask.sum())
        columns = {}
        for name, seed in (("values", 1), ("old_logp", 2), ("ref_logp", 3)):
            draws = torch.arange(count, device=device) * 0.7 + seed
            column = torch.full((batch.num_tokens,), math.nan, device=device)
            columns[name] = column.masked_scatter(batch.action_mask, draws.sin())
        moved = torch.where(batch.action_mask, batch.token_rewards, math.nan)
        batch = batch.with_columns(token_rewards=moved, **columns)
        out = estimate(config, Signals.of(config, batch, 0.1, 0.0))
        assert (out.advantages[~out.action_mask] == 0).all()
        found.append((out.advantages[out.action_mask], out.returns[out.action_mask]))
    for one, other in zip(*found, strict=True):
        assert torch.isfinite(one).all()
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_the_reward_of_a_turn_is_at_its_last_token(device):
    batch = batch_of(device)
    found = Signals(batch).rewards[: batch.lengths[0]].tolist()
    #        prompt     2 tokens  gap    1    gap    3 tokens
    assert found == pytest.approx([0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 2])


def test_an_empty_batch_has_no_advantages(device):
    batch = PackedBatch.from_masked([([1, 1], [False, False])], device=device)
    batch = batch.with_columns(
        scores=torch.zeros(1, device=device),
        group_ids=torch.zeros(1, dtype=torch.int64, device=device),
    )
    config = config_of("grpo", "turn")
    assert estimate(config, Signals.of(config, batch, 0.0, 0.0)).advantages.tolist() == [0, 0]
