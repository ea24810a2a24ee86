"""Values of the generation step: what the value head says of the state before each token is what
`score` says of it."""

from dataclasses import replace

import pytest
import torch

from fusedrl.engine import CacheConfig, HybridActor, PackedBatch, SamplingParams
from fusedrl.engine.config import PolicyConfig
from fusedrl.engine.generation.generator import Generator
from fusedrl.engine.generation.graphs import StepGraphs
from fusedrl.engine.model.configuration import model_config
from fusedrl.engine.model.decoder import Decoder
from fusedrl.engine.model.heads import ValueHead
from fusedrl.engine.policy.metrics import measure
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
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "tie_word_embeddings": True,
}
ROOMY = CacheConfig(block_size=4)
# chunks of prefills, preemption
TIGHT = CacheConfig(block_size=4, num_blocks=26, max_sequences=5, max_tokens_per_step=7)
PROMPTS = [[1, *range(3, 3 + n)] for n in (0, 7, 2, 21, 5, 11, 3, 30, 1)]
PARAMS = SamplingParams(max_new_tokens=24, n=2, seed=1, stop_token_ids=(5, 6, 7))  # of many lengths
strict_only = pytest.mark.skipif(
    not native.capability, reason="strict mode needs the native extension"
)


def head(device, seed=0):
    made = ValueHead(CONFIG["hidden_size"], device=device)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
    return made


def make(device, cache=ROOMY, value_head=True, dtype=torch.float32, **more):
    return HybridActor(
        Decoder.random(model_config(CONFIG), 0, dtype=dtype, device=device),
        cache=cache,
        value_head=head(device) if value_head else None,
        **more,
    )


def compared(device, actor, asked, outs):
    """(the sampler's values, the training forward's), of every action."""
    batch = PackedBatch.from_completions(asked, outs, device=device)
    return [
        column[batch.action_mask]
        for column in (batch.column("rollout_values"), actor.score(batch).values)
    ]


@pytest.mark.parametrize("cache", [ROOMY, TIGHT], ids=["roomy", "tight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_they_are_those_of_the_training_forward(cache, dtype, device):
    actor = make(device, cache, dtype=dtype)
    outs = actor.generate(PROMPTS, PARAMS)
    assert len({len(c.token_ids) for group in outs for c in group}) > 3
    assert all(len(c.values) == len(c.token_ids) for group in outs for c in group)
    sampler, trainer = compared(device, actor, PROMPTS, outs)
    # a rounded hidden state may fall on the other side
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(sampler, trainer, rtol=0, atol=tolerance)
    assert sampler.std() > 0.5
    with pytest.raises(AssertionError):  # the state after the token
        torch.testing.assert_close(sampler[1:], trainer[:-1], rtol=0, atol=tolerance)


def test_the_generated_tokens_do_not_depend_on_them(device):
    with_values, without = (
        make(device).generate(PROMPTS, PARAMS),
        make(device, value_head=False).generate(PROMPTS, PARAMS),
    )
    assert [replace(c, values=None) for group in with_values for c in group] == [
        c for group in without for c in group
    ]
    assert PackedBatch.from_completions(PROMPTS, without, device=device).rollout_values is None


@pytest.mark.parametrize(
    "window, graphs",
    [(1, None), (2, None), (7, None), (4, StepGraphs(lambda step, state: step))],
    ids=["1", "2", "7", "captured"],
)
def test_windows_and_captured_steps(window, graphs, device):
    actor = make(device)
    want = actor.generate(PROMPTS, PARAMS)
    generator = Generator(
        actor.decoder, None, ROOMY, window=window, graphs=graphs, value_head=actor.value_head
    )
    found = sorted(generator.run(PROMPTS, PARAMS), key=lambda f: f[:2])
    assert [f.completion.token_ids for f in found] == [c.token_ids for group in want for c in group]
    got, wanted = (
        torch.tensor([x for c in cs for x in c.values], device=device)
        for cs in ([f.completion for f in found], [c for group in want for c in group])
    )
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


def test_continued_extended_and_mixed_completions(device):
    actor, prompt, params = (
        make(device),
        [1, 5, 6, 7, 8, 9, 10],
        SamplingParams(max_new_tokens=18, seed=5, banned_token_ids=(2,)),
    )
    ((first,),) = actor.generate([prompt], params)
    ((second,),) = actor.generate([actor.extend(first, [11, 12, 13])], params)
    assert second.values[:18] == first.values
    assert second.values[18:21] == [0.0] * 3
    assert len(second.values) == len(second.token_ids) == 39
    torch.testing.assert_close(*compared(device, actor, [prompt], [[second]]), rtol=0, atol=1e-5)
    stream = actor.stream([prompt] * 3, [replace(params, max_new_tokens=n) for n in (4, 17, 17)])
    next(stream)
    actor.abort()
    partial = next(stream).completion
    assert partial.finish_reason == "aborted"
    assert 0 < len(partial.values) == len(partial.token_ids) < 17
    ((whole,),) = actor.generate([partial], params)
    torch.testing.assert_close(*compared(device, actor, [prompt], [[whole]]), rtol=0, atol=1e-5)
    ((without,),) = make(device, value_head=False).generate([prompt], params)
    ((mixed,),) = actor.generate([without], params)
    assert without.values is mixed.values is None
    assert (
        PackedBatch.from_completions(
            [prompt, prompt], [[whole], [mixed]], device=device
        ).rollout_values
        is None
    )


def test_another_head_is_noticed(device):
    actor = make(device, value_head=False)
    assert actor.generate([[1, 4]], PARAMS)[0][0].values is None
    actor.value_head = head(device, 1)
    torch.testing.assert_close(
        *compared(device, actor, [[1, 4]], actor.generate([[1, 4]], PARAMS)), rtol=0, atol=1e-5
    )
    with torch.no_grad():
        actor.value_head.bias += 3.0
    actor.mark_updated()
    torch.testing.assert_close(
        *compared(device, actor, [[1, 4]], actor.generate([[1, 4]], PARAMS)), rtol=0, atol=1e-5
    )


@strict_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strict_is_to_the_bit_whatever_shares_the_batch(dtype, device):
    actor = make(device, dtype=dtype, strict=True)
    outs = actor.generate(PROMPTS, PARAMS)
    assert torch.equal(*compared(device, actor, PROMPTS, outs))
    tight = make(device, TIGHT, dtype=dtype, strict=True).generate(PROMPTS, PARAMS)
    assert [c.values for group in tight for c in group] == [
        c.values for group in outs for c in group
    ]
    for index in (0, 3, 8):
        (alone,) = make(device, dtype=dtype, strict=True).generate(
            [PROMPTS[index]], PARAMS, request_ids=[index]
        )
        assert [c.values for c in alone] == [c.values for c in outs[index]]
        batch = PackedBatch.from_completions([PROMPTS[index]], [alone], device=device)
        assert torch.equal(
            actor.score(batch).values[batch.action_mask], batch.rollout_values[batch.action_mask]
        )


@strict_only
def test_the_strict_heads_gradient_is_the_ordinary_one(device):
    hidden, grads = torch.randn(33, 40, generator=torch.Generator().manual_seed(0)).to(device), []
    for strict in (True, False):
        made, leaf = head(device), hidden.clone().requires_grad_()
        (made(leaf, strict=strict) * torch.linspace(-1, 1, 33, device=device)).sum().backward()
        grads.append([leaf.grad, made.weight.grad, made.bias.grad])
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)


def test_the_difference_is_measured(device):
    actor, config = make(device), PolicyConfig("m", "d", ("r.py:r",))
    batch = PackedBatch.from_completions(PROMPTS, actor.generate(PROMPTS, PARAMS), device=device)
    scored = actor.score(batch)
    zeros = torch.zeros_like(scored.logp)
    batch = batch.with_columns(
        old_logp=scored.logp, old_entropy=scored.entropy, values=scored.values, returns=zeros
    )
    assert measure(batch, 0.0, config)["sampling/value_diff_max"] <= 1e-5
    at = int(batch.action_mask.nonzero()[3])
    moved = scored.values.clone()
    moved[at] += 0.25
    moved[0] = torch.nan  # no action
    assert measure(batch.with_columns(values=moved), 0.0, config)[
        "sampling/value_diff_max"
    ] == pytest.approx(0.25, abs=1e-4)
    assert "sampling/value_diff_max" not in measure(
        replace(batch, rollout_values=None), 0.0, config
    )
