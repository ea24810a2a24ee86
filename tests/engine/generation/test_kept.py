"""What truncation left travels with completions, and is what they are scored over."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

from fusedrl.engine import CacheConfig, HybridActor, PackedBatch, SamplingParams
from fusedrl.engine.model.configuration import model_config
from fusedrl.engine.model.decoder import Decoder
from fusedrl.kernels.kept import Kept
from fusedrl.kernels.linear_logprob import linear_logprob
from fusedrl.kernels.policy_loss import policy_loss
from fusedrl.kernels.runtime import native

CONFIG = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "tie_word_embeddings": True,
}
ROOMY = CacheConfig(block_size=4)
TIGHT = CacheConfig(block_size=4, num_blocks=64, max_sequences=5, max_tokens_per_step=7)
PROMPTS = [[1, *range(3, 3 + n)] for n in (0, 7, 2, 21, 5)]
WAYS = {
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.1},
    "all at 0.7": {"top_k": 12, "top_p": 0.9, "min_p": 0.02, "temperature": 0.7},
    "top_k above the vocabulary": {"top_k": 100},
    "no early end": {"top_p": 0.8, "min_new_tokens": 20},
    "banned": {"banned_token_ids": (4, 9)},
    "nothing": {},
    "greedy": {"temperature": 0.0, "top_k": 3},
}
STRICT = [
    False,
    pytest.param(
        True, marks=pytest.mark.skipif(not native.capability, reason="needs the C++ kernels")
    ),
]


def make(device, cache=ROOMY, dtype=torch.float32, **more):
    return HybridActor(
        Decoder.random(model_config(CONFIG), 0, dtype=dtype, device=device), cache=cache, **more
    )


def params(way, **more):
    return SamplingParams(**({"max_new_tokens": 40, "seed": 3, "return_kept": True} | way | more))


def dense(actor, completion):
    """[T, V] float64: the logits that drew each token, from a plain forward of the whole text."""
    ids = [*completion.prompt_ids, *completion.token_ids]
    batch = PackedBatch.from_sequences([(ids[:1], ids[1:])], device=actor.decoder.device)
    with torch.no_grad():
        hidden = actor.decoder(
            batch.token_ids, batch.positions, batch.cu_seqlens, batch.max_length
        ).double()
        logits = hidden @ actor.decoder.head_weight.double().T
    return logits[len(completion.prompt_ids) - 1 : -1].cpu()


def truncated(logits, p, length):
    """Ids left of a row, by definition, and how near to its edge the nearest other is."""
    z = logits.numpy().copy()
    banned = [*p.banned_token_ids, *([CONFIG["eos_token_id"]] if length < p.min_new_tokens else [])]
    z[banned] = -np.inf
    order = np.argsort(-z, kind="stable")
    order = order[: np.isfinite(z).sum()]
    weights = np.exp((z[order] - z[order[0]]) / p.temperature)
    edges = []
    if p.top_k and p.top_k < len(order):
        edges.append(weights[p.top_k - 1] - weights[p.top_k])
        order, weights = order[: p.top_k], weights[: p.top_k]
    if p.top_p < 1:
        share = np.cumsum(weights) / weights.sum()
        size = int(np.searchsorted(share, p.top_p)) + 1
        edges.append(np.abs(share - p.top_p).min())
        order, weights = order[:size], weights[:size]
    if p.min_p:
        edges.append(np.abs(weights - p.min_p).min())
        order = order[weights >= p.min_p]
    return sorted(order.tolist()), min(edges, default=1.0)


@pytest.mark.parametrize("way", WAYS)
def test_the_sets_are_those_of_the_definition_and_the_words_those_of_the_draw(way, device):
    actor, p = make(device), params(WAYS[way], n=2)
    seen = 0
    for outs in actor.generate(PROMPTS, p):
        for c in outs:
            assert len(c.kept) == len(c.token_ids)
            rows = zip(dense(actor, c), c.kept, c.token_ids, c.logprobs, strict=True)
            for t, (z, kept, token, logp) in enumerate(rows):
                T = p.temperature or 1.0
                if p.temperature == 0:
                    assert len(kept) == 0
                    expected = range(len(z))
                else:
                    expected, edge = truncated(z, p, t)
                    if edge < 1e-4:
                        continue
                    left_out = len(expected) < len(z)
                    assert list(kept) == (expected if left_out else [])
                assert token in expected
                x = z[list(expected)] / T
                want = float(z[token] / T - torch.logsumexp(x, 0))
                assert logp == pytest.approx(want, abs=5e-5)
                seen += 1
    assert seen > 100


@pytest.mark.parametrize("strict", STRICT)
@pytest.mark.parametrize("cache", [ROOMY, TIGHT], ids=["roomy", "tight"])
def test_what_the_sampler_says_the_trainer_computes(strict, cache, device):
    """In one call with companions that return nothing, through preemption and samples that share a
    prompt; beyond position 130."""
    actor = make(device, cache, strict=strict)
    each = [params(way, n=2, max_new_tokens=170) for way in WAYS.values()]
    plain = [dataclasses.replace(p, return_kept=False) for p in each]
    prompts = [[1, *range(3, 3 + 2 * i)] for i in range(len(each))]
    outs = actor.generate([*prompts, *prompts], [*each, *plain])
    again = actor.generate([*prompts, *prompts], [*each, *plain])
    asked, others = outs[: len(each)], outs[len(each) :]
    assert max(len(c.token_ids) for group in asked for c in group) > 130
    for group, repeated in zip(outs, again, strict=True):
        for c, d in zip(group, repeated, strict=True) if strict else ():
            assert (c.token_ids, c.logprobs) == (d.token_ids, d.logprobs)
            assert c.kept is None or all(map(np.array_equal, c.kept, d.kept))
    assert all(c.kept is None for group in others for c in group)
    for p, prompt, group in zip(each, prompts, asked, strict=True):
        batch = PackedBatch.from_completions([prompt], [group], device=device)
        scored = actor.score(batch, temperature=p.temperature).logp
        worst = (scored - batch.rollout_logp).abs().max()
        assert worst == 0 if strict else worst < 1e-4
    # alone they are drawn the same
    alone = actor.generate(prompts, each)
    assert [[c.token_ids for c in group] for group in alone] == [
        [c.token_ids for c in group] for group in asked
    ]


def test_continued_extended_aborted(device):
    """However a completion comes about, its sets stand beside its tokens."""
    actor, p = make(device), params(WAYS["top_p"], max_new_tokens=30)
    (whole,) = actor.generate([PROMPTS[1]], p)[0]
    (half,) = actor.generate([PROMPTS[1]], dataclasses.replace(p, max_new_tokens=10))[0]
    (rest,) = actor.generate([half], dataclasses.replace(p, max_new_tokens=20))[0]
    assert rest.token_ids == whole.token_ids
    assert all(map(np.array_equal, rest.kept, whole.kept))
    assert rest.logprobs == pytest.approx(whole.logprobs, abs=1e-5)
    turned = actor.extend(half, [7, 8, 9])
    (answer,) = actor.generate([turned], dataclasses.replace(p, max_new_tokens=20))[0]
    assert len(answer.kept) == len(answer.token_ids)
    assert [len(row) for row in answer.kept[10:13]] == [0, 0, 0]
    batch = PackedBatch.from_completions([PROMPTS[1]], [[answer]], device=device)
    assert (actor.score(batch).logp - batch.rollout_logp).abs().max() < 1e-4
    with pytest.raises(ValueError, match="return_kept=True"):
        actor.generate([half], dataclasses.replace(p, return_kept=False))
    with pytest.raises(ValueError, match="no logit_bias with return_kept"):
        params(WAYS["top_p"], logit_bias={3: 1.0})
    stream = actor.stream([PROMPTS[1]], params(WAYS["top_k"], max_new_tokens=200))
    actor.abort()
    for finished in stream:
        c = finished.completion
        assert len(c.kept) == len(c.token_ids)


def test_batches_carry_them(device):
    actor = make(device)
    each = [params(WAYS[way], n=2) for way in ("top_k", "nothing", "top_p", "greedy", "min_p")]
    outs = actor.generate(PROMPTS, each)
    batch = PackedBatch.from_completions(PROMPTS, outs, device=device)

    def rows(b):
        ids, offsets = b.kept.token_ids.tolist(), b.kept.offsets.tolist()
        return [ids[i:j] for i, j in itertools.pairwise(offsets)]

    expected = []
    for prompt, group in zip(PROMPTS, outs, strict=True):
        for c in group:
            expected.append([[]] * len(prompt) + [list(map(int, row)) for row in c.kept])
    assert rows(batch) == [row for part in expected for row in part]
    order = [7, 0, 3, 9, 1]
    assert rows(batch.select(order)) == [row for b in order for row in expected[b]]
    assert rows(batch.select(order).to("cpu")) == rows(batch.select(order))
    plain = batch.select([2]).with_columns(kept=None)
    both = PackedBatch.concat([plain, batch.select([0])])
    assert rows(both) == [[]] * len(expected[2]) + expected[0]
    assert batch.select([]).kept.offsets.tolist() == [0]
    whole = actor.score(batch, tokens_per_microbatch=10**6).logp
    parts = actor.score(batch, tokens_per_microbatch=64).logp
    assert (whole - parts).abs().max() < 1e-5
    untouched = PackedBatch.from_completions(PROMPTS[1:2], [outs[1][:1]], device=device)
    assert untouched.kept is None, "nothing was truncated"
    with pytest.raises(ValueError, match="kept of"):
        batch.with_columns(kept=Kept.whole(3, device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradients_of_the_head_over_what_was_kept(dtype, softcap, device):
    """Against float64 autograd of the dense definition; chunks of one row, ignored rows of NaN."""
    N, H, V = 23, 24, 67
    draw = torch.Generator().manual_seed(5)
    hidden = torch.randn(N, H, generator=draw).to(device, dtype)
    weight = torch.randn(V, H, generator=draw).to(device, dtype)
    ids = torch.randint(0, V, (N,), generator=draw).to(device)
    left = torch.rand(N, V, generator=draw).to(device) < 0.2
    left[torch.arange(N, device=device), ids] = True
    left[::4] = False
    ids[3] = -100
    hidden[3] = math.nan
    kept = Kept.of_lists([row.nonzero()[:, 0].tolist() for row in left], device)
    g, h = (torch.randn(N, generator=draw).to(device) for _ in range(2))

    def run(function, wide):
        x, w = (t.detach().to(wide).requires_grad_() for t in (hidden, weight))
        logp, entropy = function(x, w)
        (logp * g + entropy * h).sum().backward()
        return logp, entropy, x.grad, w.grad

    def definition(x, w):
        z = torch.where((ids == -100)[:, None], 0.0, x) @ w.T
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        mask = left | ~left.any(1, keepdim=True)
        log_p = (z / 0.7).masked_fill(~mask, -math.inf).log_softmax(1)
        live = ids != -100
        logp = log_p.gather(1, ids.clamp(min=0)[:, None])[:, 0]
        p = log_p.exp()
        entropy = -(p * log_p.masked_fill(p == 0, 0)).sum(1)
        return torch.where(live, logp, 0), torch.where(live, entropy, 0)

    def ours(x, w, impl=None):
        return linear_logprob(
            x,
            w,
            ids,
            temperature=0.7,
            softcap=softcap,
            entropy=True,
            kept=kept,
            workspace_bytes=4 * V,
            impl=impl,
        )

    want = run(definition, torch.float64)
    got = run(ours, dtype)
    narrow = 0.02 if dtype == torch.bfloat16 else 0.0
    for a, b in zip(got, want, strict=True):
        size = float(b.nan_to_num().abs().max())
        error = float((a.double().nan_to_num() - b.nan_to_num()).abs().max())
        assert error <= (1e-5 + narrow) * max(1.0, size)
    assert torch.equal(got[2][3], torch.zeros_like(got[2][3]))


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "scored in full"])
def test_the_gradient_is_that_of_what_was_sampled(kept, device):
    """Enumerated: the expected policy gradient over completions of one token equals the gradient of
    sum_a mu(a) r(a), mu the policy over the tokens that were left. Scored in full it does not."""
    actor = make(device)
    prompt, rewards = [1, 5, 9], torch.linspace(-1, 2, CONFIG["vocab_size"]).sin().to(device)
    with torch.no_grad():
        base = PackedBatch.from_sequences([(prompt, [3])], device=device)
        z = (actor.forward(base) @ actor.decoder.head_weight.T)[len(prompt) - 1]
    left = sorted(z.topk(6).indices.tolist())
    parameter = actor.decoder.head_weight

    def gradient_of(loss):
        return torch.autograd.grad(loss, parameter)[0]

    hidden = actor.forward(base)
    z = (hidden @ parameter.T)[len(prompt) - 1]
    mu = z[left].softmax(0)
    want = gradient_of(-(mu * rewards[left]).sum())
    batch = PackedBatch.from_sequences([(prompt, [token]) for token in left], device=device)
    rows = ([[]] * len(prompt) + [left]) * len(left)
    batch = batch.with_columns(kept=Kept.of_lists(rows, device)) if kept else batch
    logp, _ = actor.logprobs(batch, actor.forward(batch))
    weights, advantages = (torch.zeros(batch.num_tokens, device=device) for _ in range(2))
    weights[batch.action_mask] = mu.detach()
    advantages[batch.action_mask] = rewards[left]
    loss, stats = policy_loss(logp, logp.detach(), advantages, weights)
    assert (stats.ratio_min, stats.ratio_max) == (1, 1)
    got = gradient_of(loss)
    worst = float((got - want).abs().max() / want.abs().max())
    assert worst < 1e-5 if kept else worst > 0.01
