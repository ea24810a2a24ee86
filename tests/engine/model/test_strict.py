"""strict=True: the scorer says of every token, bit for bit, what the sampler said; and a negative
control that shows the test can fail."""

import random

import pytest
import torch

from fusedrl.engine import CacheConfig, HybridActor, PackedBatch, SamplingParams
from fusedrl.engine.model.configuration import model_config
from fusedrl.engine.model.decoder import Decoder
from fusedrl.kernels.runtime import native

pytestmark = pytest.mark.skipif(not native.capability, reason="the native extension is not built")
SIZES = {
    "vocab_size": 61,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.25,
    "eos_token_id": 2,
    "bos_token_id": 1,
}
KINDS = {
    "llama": {"model_type": "llama", "attention_bias": True, "tie_word_embeddings": False},
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "sliding_window": 9},
    "phi3": {"model_type": "phi3", "sliding_window": 9, "partial_rotary_factor": 0.5},
    "smollm3": {"model_type": "smollm3", "no_rope_layer_interval": 2},
    "olmo2": {"model_type": "olmo2"},
    "gemma2": {
        "model_type": "gemma2",
        "head_dim": 8,
        "sliding_window": 9,
        "query_pre_attn_scalar": 5,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "head_dim": 8,
        "sliding_window": 9,
        "sliding_window_pattern": 2,
        "final_logit_softcapping": 3.0,
    },
    "gpt_neox": {"model_type": "gpt_neox", "hidden_size": 48, "rotary_pct": 0.5},
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 48,
        "n_layer": 2,
        "n_head": 6,
        "n_positions": 128,
        "n_inner": 56,
    },
}
ROOMY = CacheConfig(block_size=4)
# chunks of prefills, preemption
TIGHT = CacheConfig(block_size=4, num_blocks=26, max_sequences=5, max_tokens_per_step=7)


def prompts(count, seed=0):
    draw = random.Random(seed)
    return [[1] + [draw.randrange(3, 61) for _ in range(draw.randrange(30))] for _ in range(count)]


def make(device, kind="llama", dtype=torch.float32, cache=ROOMY, strict=True, **more):
    return HybridActor(
        Decoder.random(model_config(SIZES | KINDS[kind]), 0, dtype=dtype, device=device),
        cache=cache,
        strict=strict,
        **more,
    )


def said(outs):
    return [(c.token_ids, c.logprobs) for group in outs for c in group]


def packed(device, asked, outs):
    return PackedBatch.from_completions(asked, outs, device=device)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scorer_and_sampler_agree_to_the_bit(kind, dtype, device):
    asked = prompts(9)
    for cache in (ROOMY, TIGHT):
        actor = make(device, kind, dtype, cache)
        for params in (
            SamplingParams(max_new_tokens=24, n=2, seed=1),
            SamplingParams(max_new_tokens=24, temperature=0.7, seed=2),
            SamplingParams(max_new_tokens=24, temperature=0.0),
        ):
            batch = packed(device, asked, actor.generate(asked, params))
            for cut in (None, 1, 50):
                scored = actor.score(
                    batch, temperature=params.temperature, tokens_per_microbatch=cut
                )
                assert torch.equal(scored.logp, batch.rollout_logp), (
                    cache,
                    params.temperature,
                    cut,
                )


def test_requests_of_several_temperatures_and_with_a_bias_in_one_batch(device):
    asked, actor = prompts(6), make(device)
    kinds = zip((1.0, 0.6, 1.7) * 2, ({}, {5: 1.0}) * 3, strict=True)
    params = [
        SamplingParams(max_new_tokens=15, temperature=t, logit_bias=bias, seed=3)
        for t, bias in kinds
    ]
    outs = actor.generate(asked, params)
    for prompt, group, p in zip(asked, outs, params, strict=True):
        batch = packed(device, [prompt], [group])
        assert torch.equal(actor.score(batch, temperature=p.temperature).logp, batch.rollout_logp)


def test_tokens_and_logprobs_do_not_depend_on_the_schedule(device):
    asked = prompts(33)
    params = SamplingParams(max_new_tokens=20, seed=4)
    ids = list(range(33))
    among = make(device).generate(asked, params, request_ids=ids)
    assert said(make(device, cache=TIGHT).generate(asked, params, request_ids=ids)) == said(
        among
    ), "chunks and preemption"
    backwards = make(device).generate(asked[::-1], params, request_ids=ids[::-1])
    assert said(backwards[::-1]) == said(among)
    for index in (0, 7, 19, 32):
        alone = make(device)
        assert said(alone.generate([asked[index]], params, request_ids=[index])) == said(
            [among[index]]
        ), "companions"
        assert said(alone.generate([asked[index]], params, request_ids=[index])) == said(
            [among[index]]
        ), "a prefix hit"


@pytest.mark.cpu_only("on a GPU the sampler's products are the BLAS's")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cpu_samples_without_regard_to_companions(dtype, device):
    asked = prompts(33)
    params = SamplingParams(max_new_tokens=20, seed=4)
    among = make(device, strict=False, dtype=dtype).generate(asked, params)
    alone = [
        make(device, strict=False, dtype=dtype).generate([prompt], params, request_ids=[index])[0]
        for index, prompt in enumerate(asked)
    ]
    assert said(alone) == said(among)


def test_the_negative_control_differs(device):
    asked = prompts(33)
    params = SamplingParams(max_new_tokens=20, seed=4)
    actor = make(device, strict=False)
    batch = packed(device, asked, actor.generate(asked, params))
    assert not torch.equal(actor.score(batch).logp, batch.rollout_logp)


def test_continued_and_extended_completions(device):
    actor = make(device)
    ((first,),) = actor.generate(
        [[1, 5, 6, 7, 8, 9, 10]], SamplingParams(max_new_tokens=18, seed=5, banned_token_ids=(2,))
    )
    ((second,),) = actor.generate(
        [actor.extend(first, [11, 12, 13])], SamplingParams(max_new_tokens=18, seed=5)
    )
    batch = packed(device, [first.prompt_ids], [[second]])
    assert torch.equal(actor.score(batch).logp, batch.rollout_logp)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_the_ordinary_forward(kind, device):
    asked = prompts(5)
    strict, plain = make(device, kind), make(device, kind, strict=False)
    batch = packed(device, asked, strict.generate(asked, SamplingParams(max_new_tokens=12, seed=1)))
    grads = []
    for actor in (strict, plain):
        hidden = actor.forward(batch)
        logp, entropy = actor.logprobs(batch, hidden, temperature=0.9)
        (
            logp * torch.linspace(-1, 1, len(logp), device=device)
            + 0.1 * entropy
            + 0.01 * hidden.square().sum(-1)
        ).sum().backward()
        grads.append({name: p.grad for name, p in actor.named_parameters()})
    assert all(g is not None for g in grads[0].values())
    for name, ours in grads[0].items():
        assert float((ours - grads[1][name]).abs().max()) <= 1e-4 * float(
            grads[1][name].abs().max()
        ), name


def test_frozen_parameters_and_no_gradient(device):
    actor = make(device)
    batch = packed(
        device, [[1, 2, 3]], actor.generate([[1, 2, 3]], SamplingParams(max_new_tokens=4))
    )
    actor.decoder.embedding.requires_grad_(False)
    hidden = actor.forward(batch)
    hidden.sum().backward()
    assert actor.decoder.embedding.grad is None
    assert actor.decoder.norm.grad is not None
    for parameter in actor.parameters():
        parameter.requires_grad_(False)
    assert not actor.forward(batch).requires_grad


def test_a_backward_behind_the_step_is_refused(device):
    actor = make(device)
    batch = packed(
        device, [[1, 2, 3]], actor.generate([[1, 2, 3]], SamplingParams(max_new_tokens=4))
    )
    hidden = actor.forward(batch)
    with torch.no_grad():
        actor.decoder.norm.mul_(2.0)
    with pytest.raises(
        RuntimeError, match="the weights changed between the forward and the backward pass"
    ):
        hidden.sum().backward()


def test_refuses_what_it_cannot_keep(device):
    with pytest.raises(
        ValueError, match=r"strict=True needs kernels whose sums have one order.*float64 on cpu"
    ):
        make(device, dtype=torch.float64)
    with pytest.raises(ValueError, match="use strict=False"):
        HybridActor(Decoder(model_config(SIZES | KINDS["llama"]), device="meta"), strict=True)


def test_no_tokens(device):
    actor = make(device)
    batch = PackedBatch.from_sequences([], device=device)
    assert actor.score(batch).logp.shape == (0,)
