"""Lambdas of actor and critic, lambdas by length, and ends that the critic's value continues:
against loops in float64."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from tests.engine.policy.test_advantages import rollout

from fusedrl.engine.actor import HybridActor
from fusedrl.engine.base.errors import ConfigError
from fusedrl.engine.base.packing import PackedBatch
from fusedrl.engine.config import GenerationConfig, LossConfig, PolicyConfig
from fusedrl.engine.model.configuration import model_config
from fusedrl.engine.model.decoder import Decoder
from fusedrl.engine.model.heads import ValueHead
from fusedrl.engine.policy.advantages import Signals, estimate, find_advantage
from fusedrl.engine.policy.critic import SeparateCritic
from fusedrl.kernels.gae import gae

COEF, GAMMA, CLIP = 0.3, 0.9, 0.8
GROUPS = [0, 0, 1, 1, 2, 2, 3, 3]
CUT = [True, False, True, True, False, False, True, False]


def signals(device, **options):
    """A rollout with NaN under its masks, half of it cut off."""
    batch = rollout(device, GROUPS, seed=4)
    cut = torch.tensor(CUT, device=device)
    after = torch.linspace(-2.0, 3.0, len(GROUPS), device=device)
    columns = {"cut_off": cut, "last_values": torch.where(cut, after, 0.0)}
    if not options.pop("bootstrap", True):
        columns = {}
    return Signals(batch.with_columns(**columns), gamma=GAMMA, kl_coef=COEF, **options)


def by_loops(x, lam_of, ahead=math.inf):
    """[N] advantages: each token's own sum over the tokens that follow, `ahead` of them at most."""
    batch, out = x.batch, torch.zeros(x.batch.num_tokens, dtype=torch.float64)
    old, ref, value, score = (
        column.double().tolist()
        for column in (batch.old_logp, batch.ref_logp, batch.values, batch.scores)
    )
    cut = [False] * len(GROUPS) if batch.cut_off is None else batch.cut_off.tolist()
    after = [0.0] * len(GROUPS) if batch.last_values is None else batch.last_values.tolist()
    for b, (start, end) in enumerate(pairwise(batch.cu_seqlens.tolist())):
        row = [t for t in range(start, end) if batch.action_mask[t]]
        lam = lam_of(len(row))
        placed = (
            score[b] if x.score_clip is None else max(-x.score_clip, min(x.score_clip, score[b]))
        )
        r = [-COEF * (old[t] - ref[t]) for t in row]
        r[-1] += 0.0 if cut[b] else placed
        v = [value[t] for t in row] + [after[b]]
        delta = [r[i] + GAMMA * v[i + 1] - v[i] for i in range(len(row))]
        for i, t in enumerate(row):
            last = min(len(row), i + ahead)
            out[t] = sum((GAMMA * lam) ** (j - i) * delta[j] for j in range(i, int(last)))
    return out


def close(found, expected):
    torch.testing.assert_close(found.double().cpu(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bootstrap", [False, True])
@pytest.mark.parametrize("lam_critic", [None, 0.5, 1.0])
@pytest.mark.parametrize("alpha", [None, 0.05, 0.4])
def test_gae_of_two_lambdas_is_the_loop(bootstrap, lam_critic, alpha, device):
    """At alpha 0.05 all these completions are too short for a lambda above 0; at 0.4 some are."""
    x = signals(
        device,
        bootstrap=bootstrap,
        lam=0.8,
        lam_critic=lam_critic,
        lam_alpha=alpha,
        score_clip=CLIP,
    )
    advantages, returns = find_advantage("gae").function(x)

    def actor(tokens):
        return 0.8 if alpha is None else max(0.0, 1 - 1 / (alpha * tokens))

    close(advantages, by_loops(x, actor))
    target = by_loops(x, actor if lam_critic is None else lambda tokens: lam_critic)
    values = torch.where(x.batch.action_mask, x.batch.values, 0.0).double().cpu()
    close(returns, target + values)
    if alpha == 0.4:
        assert len(set(x.lam_of_length.tolist())) > 2


@pytest.mark.parametrize(
    "name, lam, ahead",
    [("td0", 0.0, math.inf), ("learned_baseline", 1.0, math.inf), ("k_step", 1.0, 2)],
)
def test_every_critic_sees_beyond_the_limit(name, lam, ahead, device):
    x = signals(device, k=2)
    close(find_advantage(name).function(x)[0], by_loops(x, lambda tokens: lam, ahead))


def test_a_long_completion_keeps_its_share_of_the_score(device):
    """By length exp(-1 / alpha) of a score arrives at the first token, whatever the length; by .95
    nothing of it does at 4,000 tokens. In float64 of the definition."""
    lengths = [400, 4000]
    tokens = torch.tensor(lengths, dtype=torch.float64, device=device)
    lam = 1 - 1 / (0.2 * tokens)
    share = lam ** (tokens - 1)
    assert torch.allclose(share, torch.full_like(share, math.exp(-5)), rtol=0.1)
    cu = torch.tensor([0, 400, 4400], dtype=torch.int32, device=device)
    rewards = torch.zeros(4400, device=device)
    rewards[[399, 4399]] = 1.0
    found = gae(rewards, rewards * 0, cu_seqlens=cu, lam=lam)[0]
    torch.testing.assert_close(found[[0, 400]].double(), share, rtol=1e-3, atol=0)
    assert gae(rewards, rewards * 0, cu_seqlens=cu, lam=0.95)[0][400] < 1e-30


def test_a_lambda_for_each_sequence(device):
    """Each sequence has what it has alone, padded or packed; the errors say what fits."""
    batch = signals(device).batch
    x = [torch.nan_to_num(c) for c in (batch.old_logp, batch.values)]
    lam = torch.linspace(0, 1, batch.num_sequences, device=device)
    options = dict(mask=batch.action_mask, cu_seqlens=batch.cu_seqlens, gamma=GAMMA)
    found = gae(*x, lam=lam, **options)[0]
    for b in range(batch.num_sequences):
        slots = batch.slots([b])
        alone = gae(
            *(column[slots] for column in x),
            mask=batch.action_mask[slots],
            cu_seqlens=torch.tensor([0, len(slots)], dtype=torch.int32, device=device),
            gamma=GAMMA,
            lam=float(lam[b]),
        )[0]
        torch.testing.assert_close(found[slots], alone, rtol=1e-5, atol=1e-6)
    padded = [batch.to_padded(column) for column in (*x, batch.action_mask)]
    again = gae(*padded[:2], mask=padded[2], gamma=GAMMA, lam=lam)[0]
    torch.testing.assert_close(batch.from_padded(again), found)
    with pytest.raises(ValueError, match=r"expected impl 'torch' with a lam of each sequence"):
        gae(*x, lam=lam, impl="cpp", **options)
    with pytest.raises(ValueError, match="lam"):
        gae(*x, lam=lam[:-1], **options)
    with pytest.raises(TypeError, match="lam"):
        gae(*x, lam=lam.long(), **options)


# ---- a constant in the reward --------------------------------------------------------------------
def shifted(x, constant):
    """The same rollout with a constant in each score, and values that know of it."""
    batch = x.batch.with_columns(
        scores=x.batch.scores + constant,
        values=x.batch.values + constant,
        last_values=torch.where(x.batch.cut_off, x.batch.last_values + constant, 0.0),
    )
    return replace(x, batch=batch)


@pytest.mark.parametrize("name", ["gae", "td0", "learned_baseline", "k_step"])
def test_a_constant_in_the_reward_adds_to_no_advantage(name, device):
    x = replace(signals(device, lam_critic=1.0, lam_alpha=0.4), gamma=1.0)
    found, other = (find_advantage(name).function(y)[0] for y in (x, shifted(x, 50.0)))
    torch.testing.assert_close(other, found, rtol=0, atol=2e-4)


def test_a_score_beside_the_value_would_be_paid_twice(device):
    """The faulty variant keeps the score of what was cut off: a constant then rewards running into
    the limit."""
    x = replace(signals(device), gamma=1.0)

    def kept(y):
        batch = y.batch
        rewards = replace(y, batch=batch.with_columns(cut_off=None)).rewards
        return gae(
            rewards,
            batch.values,
            mask=batch.action_mask,
            cu_seqlens=batch.cu_seqlens,
            lam=1.0,
            last_values=batch.last_values,
        )[0]

    moved = (kept(shifted(x, 50.0)) - kept(x))[x.batch.action_mask]
    assert moved.max() == pytest.approx(50, abs=1e-3)
    assert moved.min() == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("constant", [0.0, 20.0])
def test_the_first_rollout_settles_by_the_completions_that_ended(constant, device):
    """A head of zeros: afterwards V is right on average where a completion ended, and what was cut
    off has moved with it."""
    x = replace(signals(device), gamma=1.0)
    zeros = torch.where(x.batch.action_mask, 0.0, math.nan)
    batch = x.batch.with_columns(
        values=zeros, scores=x.batch.scores + constant, last_values=torch.zeros(8, device=device)
    )
    settled, short = replace(x, batch=batch).settled()
    advantages = find_advantage("learned_baseline").function(settled)[0]
    means = [
        advantages[slots][batch.action_mask[slots]].double().mean().item()
        for slots, cut in zip(map(batch.slots, ([b] for b in range(8))), CUT, strict=True)
        if not cut
    ]
    assert sum(means) / len(means) == pytest.approx(0, abs=1e-5)
    after = settled.batch.last_values.tolist()
    assert after == pytest.approx([short if cut else 0.0 for cut in CUT], rel=1e-6)
    if constant:
        assert short == pytest.approx(20, abs=5)


def test_what_accrued_at_single_tokens_stays(device):
    """Rewards of 1 and 2 at the tokens of a completion that was cut off, and a score of 10 that
    holds them: its return is 3 and the value of what comes next."""
    batch = PackedBatch.from_sequences([([1], [2, 3])], device=device).with_columns(
        scores=torch.tensor([10.0], device=device),
        token_rewards=torch.tensor([0.0, 1.0, 2.0 - 3.0], device=device),
        token_totals=torch.tensor([3.0], device=device),
        values=torch.zeros(3, device=device),
        cut_off=torch.tensor([True], device=device),
        last_values=torch.tensor([5.0], device=device),
    )
    found = find_advantage("gae").function(Signals(batch, lam=1.0, score_clip=1.0))[0]
    assert found.tolist() == [0.0, 8.0, 7.0]


# ---- where the value is read ---------------------------------------------------------------------
RAW = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def made(kind, device, dtype):
    """A policy with a head on its trunk, or one with a critic of the same weights."""
    decoder = Decoder.random(model_config(RAW), seed=1, device=device, dtype=dtype)
    head = ValueHead(32, device=device)
    torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(0))
    if kind == "apart":
        return SeparateCritic(decoder, head).score
    actor = HybridActor(decoder, value_head=head, strict=kind == "strict")

    def score(batch, partition):
        found, last_values = actor.score_with_ends(batch, partition=partition)
        return batch.with_columns(values=found.values, last_values=last_values)

    return score


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["trunk", "strict", "apart"])
def test_it_is_the_value_before_a_token_that_never_came(kind, dtype, device):
    """One more token behind a completion: the value before it is what the completion has at its
    end, whatever that token is. The last token may be an observation. 0 where it ended."""
    score = made(kind, device, dtype)
    rows = [([1, 5, 6], [7, 8]), ([1, 9], [10, 11, 12, 13]), ([1, 4, 4], [2]), ([3], [])]
    batch = PackedBatch.from_sequences(rows, device=device)
    mask = batch.action_mask.clone()
    mask[10] = False
    cut = torch.tensor([True, True, False, True], device=device)
    batch = batch.with_columns(action_mask=mask, cut_off=cut)
    scored = score(batch, [[2, 0], [1], [3]])
    longer = PackedBatch.from_sequences([(p, [*c, 30]) for p, c in rows], device=device)
    further = score(longer, [[0], [1], [2], [3]]).values[longer.cu_seqlens[1:].long() - 1]
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    expected = torch.where(cut, further, 0.0)
    torch.testing.assert_close(scored.last_values, expected, rtol=tolerance, atol=tolerance)
    assert scored.last_values[2] == 0
    assert (scored.last_values[cut].abs() > 1e-3).all()
    plain = score(batch.with_columns(cut_off=None), [[2, 0], [1], [3]])
    assert plain.last_values is None
    assert torch.equal(plain.values, scored.values)


# ---- configuration -------------------------------------------------------------------------------
def config(algorithm="ppo", loss=None, **options):
    return PolicyConfig("m", "d", ("r.py:f",), algorithm, loss=loss or LossConfig(), **options)


def test_whitening_is_over_the_actors_advantages_alone(device):
    """The critic's returns are those of its own lambda, not whitened."""
    chosen = config(loss=LossConfig(lam_critic=1.0, lam_alpha=0.4))
    x = Signals.of(chosen, signals(device).batch, 0.3, 0.0)
    assert (x.lam_critic, x.lam_alpha) == (1.0, 0.4)
    batch = estimate(chosen, x)
    live = batch.advantages[batch.action_mask]
    assert live.mean().abs() < 1e-6
    assert live.std(correction=0) == pytest.approx(1, rel=1e-5)
    torch.testing.assert_close(batch.returns, x.ahead(1.0)[1])


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(loss=dict(lam_critic=1.5)), r"loss\.lam_critic in \[0, 1\], got 1\.5"),
        (dict(loss=dict(lam_alpha=0.0)), r"loss\.lam_alpha > 0, or null for one lambda"),
        (
            dict(algorithm="a2c", loss=dict(lam_critic=1.0)),
            "only with the advantage gae, not k_step",
        ),
        (
            dict(algorithm="grpo", loss=dict(lam_alpha=0.05)),
            "only with the advantage gae, not grpo",
        ),
        (dict(algorithm="grpo", loss=dict(bootstrap_truncated=True)), "only with a critic"),
        (
            dict(loss=dict(bootstrap_truncated=True), missing_eos_penalty=1.0),
            "without missing_eos_penalty: a completion that was cut off has no score then",
        ),
        (
            dict(
                loss=dict(bootstrap_truncated=True),
                mask_truncated_completions=True,
                overlong_buffer=2,
                generation=GenerationConfig(max_new_tokens=8),
            ),
            "without overlong_buffer, mask_truncated_completions",
        ),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        config(**(options | {"loss": LossConfig(**options["loss"])}))
