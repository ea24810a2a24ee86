"""Every advantage against its definition, written out in float64 one completion at a time: groups
of unequal size, masks with gaps, one sample, no rows.
One file: definitions and properties share their batches."""

import itertools
import math
import random
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from tests.engine.policy.enumeration import deviation, standardised

from fusedrl.engine.base.errors import ConfigError
from fusedrl.engine.base.packing import PackedBatch
from fusedrl.engine.config import GenerationConfig, KLConfig, LossConfig, PolicyConfig
from fusedrl.engine.config.algorithms import ADVANTAGES
from fusedrl.engine.policy.advantages import GRPO_EPS, Signals, estimate, find_advantage
from fusedrl.engine.policy.objectives import (
    ValueScale,
    make_objective,
    minibatch_weights,
    objective_loss,
)

COEF, GAMMA, LAM, K, BASELINE, LEVEL = 0.3, 0.9, 0.8, 2, 0.7, 0.4


def rollout(device, groups, seed=0, lengths=None) -> PackedBatch:
    """Completions of these prompts with everything that an advantage may read; NaN under the
    mask."""
    rng = torch.Generator().manual_seed(seed)
    lengths = lengths or [2 + int(torch.randint(1, 6, (), generator=rng).item()) for _ in groups]
    batch = PackedBatch.from_sequences([([1, 2], [3] * (n - 2)) for n in lengths]).to(device)
    mask = batch.action_mask.clone()
    for start, n in zip(batch.cu_seqlens.tolist(), lengths, strict=False):
        if n >= 6:
            mask[start + 3] = False  # an observation in the middle
    n, b = batch.num_tokens, len(groups)
    columns = {
        name: torch.where(mask, torch.randn(n, generator=rng).to(device), math.nan)
        for name in ("old_logp", "ref_logp", "values")
    }
    greedy = torch.randn(100, generator=rng).to(device)
    ids = torch.tensor(groups, dtype=torch.int64, device=device)
    return PackedBatch(
        batch.token_ids,
        batch.cu_seqlens,
        batch.positions,
        mask,
        batch.lengths,
        scores=torch.randn(b, generator=rng).to(device) * 2,
        group_ids=ids,
        greedy_scores=greedy[ids],
        **columns,
    )


def pair_advantages(beta, scores, ratios, members) -> dict[int, float]:
    """DPO's pull on the best and the worst completion of each group that is no tie."""
    found, groups = {}, {tuple(m) for m in members.values()}
    pairs = [(max(m, key=scores.__getitem__), min(m, key=scores.__getitem__), m) for m in groups]
    pairs = [(w, l, m) for w, l, m in pairs if scores[w] > scores[l]]
    for w, l, m in pairs:
        chance = 1 / (1 + math.exp(beta * (ratios[w] - ratios[l])))
        found[w] = len(m) * len(groups) / len(pairs) * beta * chance
        found[l] = -found[w]
    return found


def definition(
    name: str, batch: PackedBatch, kl_coef: float
) -> tuple[list[list[float]], list[list[float]]]:
    """(advantages, values + advantages) per completion and live token, by the formulas and loops
    alone."""
    bounds = batch.cu_seqlens.tolist()
    rows = [[t for t in range(a, b) if batch.action_mask[t]] for a, b in pairwise(bounds)]
    old, ref, value = (x.double().tolist() for x in (batch.old_logp, batch.ref_logp, batch.values))
    groups, greedy = batch.group_ids.tolist(), batch.greedy_scores.double().tolist()
    scores = batch.scores.double().tolist()
    rewards = [
        [-kl_coef * (old[t] - ref[t]) + (score if t == row[-1] else 0.0) for t in row]
        for row, score in zip(rows, scores, strict=True)
    ]
    totals = [sum(row) for row in rewards]
    members = {g: [i for i, h in enumerate(groups) if h == g] for g in groups}
    degenerate = {g for g, m in members.items() if len({totals[i] for i in m}) == 1}
    of_pairs = pair_advantages(
        kl_coef, scores, [sum(old[t] - ref[t] for t in row) for row in rows], members
    )
    out, returns = [], []
    for i, row in enumerate(rows):
        r, v, n = rewards[i], [value[t] for t in row] + [0.0], len(row)
        to_go = [sum(GAMMA ** (j - t) * r[j] for j in range(t, n)) for t in range(n)]
        delta = [r[t] + GAMMA * v[t + 1] - v[t] for t in range(n)]
        m = members[groups[i]]
        mean = sum(totals[j] for j in m) / len(m)
        std = math.sqrt(sum((totals[j] - mean) ** 2 for j in m) / max(1, len(m) - 1))
        others = [totals[j] for j in m if j != i]
        best, *rest = sorted((totals[j] for j in m), reverse=True)
        standard = [standardised([totals[j] for j in ids]) for ids in members.values()]
        of_step = [x for part in standard for x in part]
        weight = sum(len(rows[j]) for j in m)
        alone = {
            "none": 0.0,
            "monte_carlo": totals[i] - LEVEL,
            "running_mean": totals[i] - BASELINE,
            "grpo": (totals[i] - mean) / (std + GRPO_EPS),
            "dr_grpo": totals[i] - mean,
            "rloo": totals[i] - sum(others) / len(others) if others else 0.0,
            "opo": totals[i] - sum(len(rows[j]) * totals[j] for j in m) / max(1, weight),
            "gpg": (totals[i] - mean)
            * len(rows)
            / max(1, sum(g not in degenerate for g in groups)),
            "pass_at_k": best - rest[0] if rest and totals[i] == best else 0.0,
            "online_dpo": of_pairs.get(i, 0.0),
            "gdpo": standardised([totals[j] for j in m])[m.index(i)]
            / (deviation(of_step) + GRPO_EPS),
        }
        each = {
            "gae": [
                sum((GAMMA * LAM) ** (j - t) * delta[j] for j in range(t, n)) for t in range(n)
            ],
            "td0": delta[:n],
            "k_step": [
                sum(GAMMA ** (j - t) * delta[j] for j in range(t, min(n, t + K))) for t in range(n)
            ],
            "learned_baseline": [to_go[t] - v[t] for t in range(n)],
            "reward_to_go": [x - LEVEL for x in to_go],
            "remax": [x - greedy[i] for x in to_go],
        }
        advantages = each[name] if name in each else [alone[name]] * n
        out.append(advantages)
        returns.append([a + b for a, b in zip(advantages, v, strict=False)])
    return out, returns


def signals(batch, kl_coef=COEF, **kwargs):
    return Signals(batch, GAMMA, LAM, K, kl_coef=kl_coef, baseline=BASELINE, level=LEVEL, **kwargs)


def ours(name, batch, **kwargs):
    found = find_advantage(name).function(signals(batch, **kwargs))
    return found if isinstance(found, tuple) else (found, None)


def compare(device, batch, found, expected):
    assert (found[~batch.action_mask] == 0).all()
    torch.testing.assert_close(
        found[batch.action_mask].double(),
        torch.tensor([x for row in expected for x in row], dtype=torch.float64, device=device),
        rtol=2e-5,
        atol=2e-5,
    )


# a group of one, and sizes that aborted and invalid samples leave behind
UNEQUAL = [7, 7, 7, 3, 3, 9, 5, 5, 5, 5]


@pytest.mark.parametrize("name", ADVANTAGES)
@pytest.mark.parametrize(
    "groups", [UNEQUAL, [4], [2, 2], []], ids=["unequal", "one", "two", "none"]
)
@pytest.mark.parametrize("kl_coef", [COEF, 0.0])
def test_definitions(name, groups, kl_coef, device):
    batch = rollout(device, groups)
    advantages, returns = definition(name, batch, kl_coef)
    found, targets = ours(name, batch, kl_coef=kl_coef)
    compare(device, batch, found, advantages)
    assert (targets is not None) == (ADVANTAGES[name] == "critic")
    if targets is not None:
        compare(device, batch, targets, returns)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_the_first_rollout_settles_what_is_counted_from(gamma, device):
    """Baseline and level are the mean R, values are right on average: of completions, not of
    tokens, so that ending is neither gain nor loss on average."""
    batch = rollout(device, UNEQUAL)
    batch = batch.with_columns(rollout_values=batch.values + 1e-3)
    signals = Signals(batch, gamma, LAM, K, kl_coef=COEF)
    settled, short = signals.settled()
    rows = [
        torch.arange(a, b, device=device)[batch.action_mask[a:b]].tolist()
        for a, b in pairwise(batch.cu_seqlens.tolist())
    ]
    rewards = [
        [-COEF * (batch.old_logp[t] - batch.ref_logp[t]).item() for t in row] for row in rows
    ]
    for row, score in zip(rewards, batch.scores.tolist(), strict=True):
        row[-1] += score
    errors = [
        [
            sum(gamma ** (j - i) * r[j] for j in range(i, len(r))) - batch.values[t].item()
            for i, t in enumerate(row)
        ]
        for row, r in zip(rows, rewards, strict=True)
    ]
    expected = sum(sum(e) / len(e) for e in errors) / len(errors)
    assert short == pytest.approx(expected, abs=1e-5)
    assert abs(short - sum(map(sum, errors)) / sum(map(len, errors))) > 1e-2  # nor that of tokens
    assert (
        settled.level
        == settled.baseline
        == pytest.approx(sum(map(sum, rewards)) / len(rewards), abs=1e-5)
    )
    for name in ("values", "rollout_values"):
        moved = getattr(settled.batch, name) - getattr(batch, name)
        assert moved[batch.action_mask].tolist() == pytest.approx(
            [short] * int(batch.action_mask.sum()), abs=1e-5
        )
    assert settled.settled()[1] == pytest.approx(0.0, abs=1e-5)
    plain = batch.with_columns(values=None, rollout_values=None)
    without = Signals(plain, gamma, LAM, K, kl_coef=COEF)
    assert without.settled() == (replace(without, baseline=settled.level, level=settled.level), 0.0)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_a_constant_adds_to_no_advantage_of_the_first_rollout(name, device):
    batch = rollout(device, UNEQUAL)
    found = [
        find_advantage(name).function(
            Signals(
                batch.with_columns(
                    scores=batch.scores + shift, greedy_scores=batch.greedy_scores + shift
                ),
                1.0,
                LAM,
                K,
                kl_coef=COEF,
            ).settled()[0]
        )
        for shift in (0.0, 100.0)
    ]
    plain, shifted = ((x[0] if isinstance(x, tuple) else x)[batch.action_mask] for x in found)
    torch.testing.assert_close(plain, shifted, rtol=1e-4, atol=1e-4)


def test_known_wrong_variants_differ(device):
    batch = rollout(device, UNEQUAL)
    right = {
        name: ours(name, batch)[0] for name in ("grpo", "dr_grpo", "rloo", "opo", "monte_carlo")
    }
    # the batch in place of the group
    whole = batch.with_columns(group_ids=torch.zeros_like(batch.group_ids))
    for name in ("grpo", "dr_grpo", "rloo", "opo"):
        assert not torch.allclose(ours(name, whole)[0], right[name], atol=1e-2), name
    for one, other in (("grpo", "dr_grpo"), ("dr_grpo", "rloo"), ("dr_grpo", "opo")):
        assert not torch.allclose(right[one], right[other], atol=1e-2)


def test_groups_may_stand_in_any_order(device):
    batch = rollout(device, UNEQUAL, lengths=[5] * 10)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(1)).to(device).tolist()
    for name, needs in ADVANTAGES.items():
        if needs == "group":
            assert torch.equal(
                ours(name, batch.select(order))[0], ours(name, batch)[0][batch.slots(order)]
            ), name


@pytest.mark.parametrize("name", [name for name, needs in ADVANTAGES.items() if needs == "group"])
def test_equal_scores_teach_nothing_whatever_their_size(name, device):
    # Pitfalls 10 and 11: E[x^2] - E[x]^2 cancels, a group of one, a flat group beside another.
    batch = rollout(device, [1, 1, 1, 2, 2, 3], lengths=[4] * 6).with_columns(
        scores=torch.tensor([1e4 + 0.1] * 3 + [0.3, 0.3, 5.0], device=device)
    )
    found = ours(name, batch, kl_coef=0.0)[0]
    limit = 2e-3 if name == "opo" else 0.0  # a weighted mean of 1e4 in float32
    assert found.abs().max() <= limit


def test_a_sibling_without_tokens_has_a_score_but_no_token(device):
    batch = rollout(device, [1, 1, 1], lengths=[4, 2, 5])
    for name in ADVANTAGES:
        found, _ = ours(name, batch)
        assert found.isfinite().all()
        assert (found[~batch.action_mask] == 0).all()


# ---- estimate ------------------------------------------------------------------------------------
def config(algorithm="grpo", **kwargs):
    return PolicyConfig(
        "m", "d", ("r.py:f",), algorithm, generation=GenerationConfig(max_new_tokens=8), **kwargs
    )


def test_whitening_is_over_live_tokens_alone(device):
    batch = rollout(device, UNEQUAL)
    found = estimate(
        config("reinforce_pp", loss=LossConfig(gamma=GAMMA)), signals(batch)
    ).advantages
    expected = torch.tensor(
        [x for row in definition("reward_to_go", batch, COEF)[0] for x in row],
        dtype=torch.float64,
        device=device,
    )
    torch.testing.assert_close(
        found[batch.action_mask].double(),
        (expected - expected.mean()) / (expected.var(correction=0) + 1e-8).sqrt(),
        rtol=1e-5,
        atol=1e-5,
    )
    assert (found[~batch.action_mask] == 0).all()
    alone = estimate(config("reinforce_pp"), signals(rollout(device, [1], lengths=[3]))).advantages
    assert (alone == 0).all()


def test_discounted_states(device):
    batch = rollout(device, UNEQUAL)
    plain = estimate(config("reinforce", loss=LossConfig(gamma=GAMMA)), signals(batch)).advantages
    found = estimate(
        config("reinforce", loss=LossConfig(gamma=GAMMA, discount_states=True)), signals(batch)
    ).advantages
    bounds = batch.cu_seqlens.tolist()
    for a, b in pairwise(bounds):
        live = [t for t in range(a, b) if batch.action_mask[t]]
        torch.testing.assert_close(
            found[live],
            plain[live] * torch.tensor([GAMMA**i for i in range(len(live))], device=device),
        )


def test_the_kl_to_come(device):
    batch = rollout(device, UNEQUAL)
    chosen = config("rloo", kl=KLConfig(coef=COEF, level="future"))
    assert (chosen.kl.placement, chosen.kl.estimator) == ("loss", "k2")
    found = estimate(chosen, Signals.of(chosen, batch, COEF, 0.0)).advantages
    plain = ours("rloo", batch, kl_coef=0.0)[0]
    bounds = batch.cu_seqlens.tolist()
    for a, b in pairwise(bounds):
        live = [t for t in range(a, b) if batch.action_mask[t]]
        for i, t in enumerate(live):
            later = sum(float(batch.old_logp[s] - batch.ref_logp[s]) for s in live[i + 1 :])
            assert float(found[t]) == pytest.approx(float(plain[t]) - COEF * later, abs=1e-5)


def test_scores_are_clipped_before_anything_else(device):
    batch = rollout(device, UNEQUAL)
    clipped = batch.with_columns(
        scores=batch.scores.clamp(-1, 1), greedy_scores=batch.greedy_scores.clamp(-1, 1)
    )
    for name in ADVANTAGES:
        assert torch.equal(ours(name, batch, score_clip=1.0)[0], ours(name, clipped)[0]), name


def test_mistakes(device):
    batch = rollout(device, [1, 1])
    with pytest.raises(ConfigError, match=r"expected loss\.advantage to be one of dr_grpo, gae"):
        find_advantage("nothing")
    with pytest.raises(ValueError, match="old_logp and ref_logp with a KL coefficient"):
        _ = Signals(
            PackedBatch.from_sequences([([1], [2])])
            .to(device)
            .with_columns(scores=torch.zeros(1, device=device)),
            kl_coef=0.1,
        ).rewards
    with pytest.raises(ValueError, match="column greedy_scores is not filled"):
        ours(
            "remax",
            PackedBatch.from_sequences([([1], [2])])
            .to(device)
            .with_columns(scores=torch.zeros(1, device=device)),
            kl_coef=0.0,
        )
    with pytest.raises(ValueError, match=r"return \[\d+\] numbers, one per token, got \[2\]"):
        estimate(
            config(loss=LossConfig(advantage=f"{__name__}.one_per_completion")), signals(batch)
        )


def one_per_completion(x):
    return x.totals


# ---- pitfalls of the loss around them ------------------------------------------------------------
def gradient(chosen, batch, parts, logp, kl_coef=COEF):
    """d loss / d logp of a minibatch cut into these parts."""
    logp = logp.clone().requires_grad_()
    weighted = batch.with_columns(
        weights=minibatch_weights(chosen, batch), old_logp=batch.old_logp.nan_to_num()
    )
    for part in parts:
        micro, slots = weighted.select(part), batch.slots(part)
        loss, *_ = objective_loss(
            chosen, make_objective(chosen, 1.0), kl_coef, micro, logp[slots], None, None
        )
        loss.backward()
    return logp.grad


@pytest.mark.parametrize("algorithm", ["grpo", "dr_grpo", "dapo", "gspo", "rloo", "cispo", "gmpo"])
def test_any_split_gives_the_same_gradient(algorithm, device):
    # Pitfall 12: denominators are those of the whole minibatch, and nothing is divided by the
    # number of micro-batches or by G.
    batch = rollout(device, UNEQUAL)
    chosen = config(algorithm)
    batch = estimate(chosen, signals(batch, kl_coef=0.0))
    logp = (
        batch.old_logp.nan_to_num()
        + 0.1 * torch.randn(batch.num_tokens, generator=torch.Generator().manual_seed(3)).to(device)
    ) * batch.action_mask
    whole = gradient(chosen, batch, [list(range(10))], logp)
    for parts in ([[i] for i in range(10)], [[9, 0, 4], [1, 2], [3, 5, 6, 7, 8]]):
        torch.testing.assert_close(
            gradient(chosen, batch, parts, logp), whole, rtol=1e-5, atol=1e-8
        )
    assert whole.abs().max() > 1e-3
    assert (whole[~batch.action_mask] == 0).all()


def test_lengths_do_not_weigh_a_sequence_objective(device):
    # Pitfall 13: under gspo each completion has one ratio and one weight, however long it is;
    # masked tokens are not in its mean.
    batch = rollout(device, [1, 1], lengths=[4, 9])
    chosen = config("gspo")
    batch = estimate(chosen, signals(batch, kl_coef=0.0))
    logp = torch.where(batch.action_mask, batch.old_logp, 0.0)
    grad = gradient(chosen, batch, [[0, 1]], logp, kl_coef=0.0)
    sums = [grad[batch.slots([i])].sum().item() for i in range(2)]
    assert sums[0] == pytest.approx(-sums[1], rel=1e-5)  # A and -A


def test_flat_groups_still_feel_the_kl(device):
    # Pitfall 11: with no variance in a group the loss is its KL alone, and the metric says so; it
    # is not silently skipped.
    batch = rollout(device, [1, 1], lengths=[4, 4]).with_columns(
        scores=torch.ones(2, device=device)
    )
    chosen = config("grpo")
    batch = estimate(chosen, signals(batch, kl_coef=0.0))
    assert (batch.advantages == 0).all()
    assert (
        gradient(chosen, batch, [[0, 1]], torch.where(batch.action_mask, batch.old_logp, 0.0))
        .abs()
        .max()
        > 1e-3
    )


# ---- the unit of values --------------------------------------------------------------------------
def test_values_are_learned_in_units_of_the_returns(device):
    """Rewards a hundred times as large: the values' loss and what its clip stops are the same in
    their unit, so that the policy's gradient keeps its share."""
    generator = torch.Generator().manual_seed(0)
    small = PackedBatch.from_sequences([([1, 2], [3, 4, 5]), ([1], [6, 7])]).to(device)
    N = small.num_tokens
    old, returns, values, logp = (torch.randn(N, generator=generator).to(device) for _ in range(4))
    chosen = PolicyConfig("m", "d", ("r.py:f",), "ppo")
    found = []
    for times in (1.0, 100.0, 1e-4):
        batch = small.with_columns(
            values=old * times,
            returns=returns * times,
            old_logp=torch.zeros(N, device=device),
            advantages=torch.zeros(N, device=device),
            weights=small.action_mask / 5,
        )
        trained = (values * times).requires_grad_()
        scale = ValueScale.of(chosen, batch, 0.7 * times)
        loss, _, stats = objective_loss(
            chosen, make_objective(chosen, 1.0), 0.0, batch, logp, None, trained, value=scale
        )
        loss.backward()
        found.append((loss.item(), stats.clip_fraction.item(), trained.grad * times))
    for other in found[1:]:
        assert other[0] == pytest.approx(found[0][0], rel=1e-5)
        assert other[1] == found[0][1] > 0
        torch.testing.assert_close(other[2], found[0][2], rtol=1e-4, atol=1e-7)
    off = (returns - old)[small.action_mask].double().square().mean().sqrt().item()
    batch = small.with_columns(values=old, returns=returns)
    # what is far off is divided by how far
    assert ValueScale.of(chosen, batch, 1e-3) == ValueScale(2e-4, pytest.approx(off))
    assert ValueScale.of(chosen, batch, 1e3) == ValueScale(200.0, 1e3)
    assert ValueScale.of(chosen, small, 3.0).error == 3.0  # no critic


def of_scores(device, scores, values=None):
    """Completions with these scores, and one value for each of a completion's tokens."""
    lengths = [1 + b % 3 for b in range(len(scores))]
    batch = PackedBatch.from_sequences([([1, 2], [3] * n) for n in lengths]).to(device)
    batch = batch.with_columns(scores=torch.tensor(scores, dtype=torch.float32, device=device))
    if values is not None:
        each = torch.tensor(
            [value for value, n in zip(values, lengths, strict=True) for _ in range(n + 2)],
            device=device,
        )
        batch = batch.with_columns(values=torch.where(batch.action_mask, each, 0.0))
    return batch


def test_the_unit_is_a_deviation_that_no_single_completion_makes(device):
    """Against numpy, leaving each completion out in turn; under one outlier of a hundred
    deviations; how fast it follows; of rewards that are all alike."""
    rng = random.Random(1)
    scores = [rng.gauss(0, 1) for _ in range(32)]
    lengths = [1 + b % 3 for b in range(32)]

    def expected(scores):
        tokens = [
            np.repeat(scores[:b] + scores[b + 1 :], lengths[:b] + lengths[b + 1 :]).std()
            for b in range(len(scores))
        ]
        return pytest.approx(min(tokens), rel=1e-5)

    def unit(scores, before=None, first=False):
        return Signals(of_scores(device, scores, [0.0] * len(scores))).unit(before, first)

    assert unit(scores) == expected(scores)
    assert unit([x + 1000 for x in scores]) == pytest.approx(unit(scores), rel=1e-3)
    assert unit([x * 2.0**20 for x in scores]) == unit(scores) * 2.0**20
    assert unit([-100.0, *scores[1:]]) == expected([-100.0, *scores[1:]])
    assert 0.8 < unit([-100.0, *scores[1:]]) / unit(scores) < 1.25
    found = unit(scores)
    assert unit(scores, before=found) == found
    assert unit([50 * x for x in scores], before=found) == 2 * found
    assert unit([x / 50 for x in scores], before=found) == found / 2
    assert unit([3.0] * 32) is None
    assert unit([1e6 + 1e-3 * x for x in scores], before=2.5) == 2.5  # rounding
    assert unit([0.7], first=True) is None
    # too few to leave one out, and values that are their own mean
    assert unit([0.5, 3.0], first=True) is None
    assert unit([0.5, 3.0]) == pytest.approx(np.sqrt(np.mean(np.square([0.5, 3.0, 3.0]))))
    assert unit([0.5, 3.0], before=1.0) == 2.0
    assert unit([]) is None


def said(x):
    """What `beyond_chance` is of the means of prompts."""
    n, c = len(x), np.mean(x)
    s2 = np.var(x, ddof=1) / n * (n - 1) / (n - 3) if n > 3 else math.inf
    return c - s2 / c if c**2 > s2 else 0.0


def test_a_level_follows_rewards_that_moved_and_no_outlier(device):
    """Of values, baseline and level alike, against numpy: the head takes what all prompts say, and
    each completion what the others say, so that no part of its own reward is taken off."""
    rng = random.Random(2)
    scores = np.array([rng.gauss(0, 1) for _ in range(64)])
    scores = ((scores - scores.mean()) / scores.std(ddof=1)).tolist()

    def short(scores, level=0.0):
        batch = of_scores(device, scores, [level] * len(scores))
        settled, short = Signals(batch, baseline=level, level=level).settled(first=False)
        plain, nothing = Signals(of_scores(device, scores), baseline=level, level=level).settled(
            first=False
        )
        assert nothing == 0.0
        off = [x - level for x in scores]
        others = [level + said(off[:b] + off[b + 1 :]) for b in range(len(off))]
        for found in (settled.level, settled.baseline, plain.level, plain.baseline):
            assert found.tolist() == pytest.approx(others, abs=1e-4 * (1 + abs(level)))
        each = [y for y, n in zip(others, batch.lengths, strict=True) for _ in range(n - 2)]
        assert settled.batch.values[batch.action_mask].tolist() == pytest.approx(
            each, abs=1e-4 * (1 + abs(level))
        )
        assert short == pytest.approx(said(off) if off else 0.0, abs=1e-5 * (1 + abs(level)))
        return short

    assert short(scores) == 0.0
    for moved in (0.5, 1.0, 10.0, -10.0):
        assert 0.85 < short([x + moved for x in scores]) / moved < 1
        assert short([x + moved for x in scores], level=moved) == pytest.approx(0.0, abs=1e-5)
    for outlier in (-300.0, 300.0):
        assert abs(short([outlier, *scores[1:]])) < 0.01
        # and where it was followed at first, that is taken back
        assert abs(short(scores, level=outlier / 64) + outlier / 64) < 0.01
    assert short([5.0, 5.1, 5.2]) == 0.0  # three say nothing of chance
    assert 4.0 < short([5.0, 5.1, 5.2, 4.9, 5.0]) < 5.1
    assert Signals(of_scores(device, [5.0], [0.0])).settled()[1] == 5.0
    assert short([]) == 0.0


def test_completions_of_a_prompt_are_one_witness(device):
    """16 completions of one prompt say nothing of the others; 5 prompts with 4 each count as 5."""
    rng = random.Random(3)

    def short(prompts, per):
        means = [10 + rng.gauss(0, 1) for _ in range(prompts)]
        scores = [m + rng.gauss(0, 0.1) for m in means for _ in range(per)]
        batch = of_scores(device, scores, [0.0] * len(scores)).with_columns(
            group_ids=torch.arange(prompts, device=device).repeat_interleave(per)
        )
        settled, short = Signals(batch).settled(first=False)
        each = np.reshape(scores, (prompts, per)).mean(1)
        assert short == pytest.approx(said(each), rel=1e-4, abs=1e-6)
        expected = [said(np.delete(each, b // per)) for b in range(len(scores))]
        assert settled.level.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)
        return short

    assert short(1, 16) == 0.0
    assert 8 < short(5, 4) < 12


@pytest.mark.parametrize("name", ["running_mean", "monte_carlo", "learned_baseline"])
@pytest.mark.parametrize("n", [5, 8])
def test_what_a_level_follows_leaves_the_gradient_unbiased(name, n, device):
    """A bandit of two arms, enumerated: the mean over all draws of n arms of sum (indicator of arm
    1 - its probability) x advantage is the gradient of the mean reward, whatever the level is and
    however far it is corrected."""
    p, rewards = 0.3, (0.2, 1.7)
    total = 0.0
    for drawn in itertools.product((0, 1), repeat=n):
        scores = torch.tensor([rewards[arm] for arm in drawn], device=device)
        batch = PackedBatch.from_sequences([([1], [2])] * n).to(device).with_columns(scores=scores)
        batch = (
            batch.with_columns(values=torch.where(batch.action_mask, 0.4, 0.0))
            if name == "learned_baseline"
            else batch
        )
        settled, _ = Signals(batch, baseline=0.4, level=0.4).settled(first=False)
        found = find_advantage(name).function(settled)
        A = (found[0] if isinstance(found, tuple) else found)[batch.action_mask].tolist()
        total += (
            math.prod((1 - p, p)[arm] for arm in drawn)
            * sum((arm - p) * x for arm, x in zip(drawn, A, strict=True))
            / n
        )
    assert total == pytest.approx(p * (1 - p) * (rewards[1] - rewards[0]), rel=1e-4)
