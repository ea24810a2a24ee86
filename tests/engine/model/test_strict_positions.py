"""strict=True at positions far from 0: the bits of a token are its own at every position up to the
model's limit, whatever is computed beside it.

Positions are large where `decode_step` is called over a cache whose earlier blocks are filled,
which costs no decoding of all that comes before.
"""

import random

import pytest
import torch
from tests.engine.model import test_strict

from fusedrl.engine import CacheConfig, HybridActor, PackedBatch, SamplingParams
from fusedrl.engine.config import LoRAConfig
from fusedrl.engine.model.configuration import model_config
from fusedrl.engine.model.decoder import Decoder
from fusedrl.engine.model.families import FAMILIES
from fusedrl.engine.model.heads import ValueHead
from fusedrl.engine.model.lora import add_adapter
from fusedrl.engine.model.step import decode_step
from fusedrl.kernels.runtime import native

pytestmark = pytest.mark.skipif(not native.capability, reason="the native extension is not built")
LIMIT, S, SHARED_BLOCKS, CHUNK = 65536, 16, 40, 7
KINDS = test_strict.KINDS | {"qwen2": {"model_type": "qwen2"}}
ROPES = {
    "linear": {"factor": 2.5},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "yarn, scaled": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "attention_factor": 1.5,
    },
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}
SCALED = {
    name: {"model_type": "llama", "rope_parameters": {"rope_type": name, "rope_theta": 1e4} | more}
    for name, more in ROPES.items()
}
SCALED["two tables"] = KINDS["gemma3"] | {
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
}
SCALED["wide heads"] = {
    "model_type": "llama",
    "head_dim": 40,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
}
POSITIONS = (130, 1_000, 40_000, LIMIT - 1)
# chunks of prefills, preemption
TIGHT = CacheConfig(block_size=4, num_blocks=90, max_sequences=5, max_tokens_per_step=23)


def decoder_of(device, kind, dtype, limit, seed=0):
    sizes = test_strict.SIZES | {"max_position_embeddings": limit} | (KINDS | SCALED)[kind]
    return Decoder.random(
        model_config(sizes | ({"n_positions": limit} if kind == "gpt2" else {})),
        seed,
        dtype=dtype,
        device=device,
    )


class Cache:
    """Blocks of random keys and values that stand before every token, and of its own for every
    row's last tokens."""

    def __init__(self, decoder, rows):
        draw, dtype, weights = (
            torch.Generator().manual_seed(1),
            decoder.activation_dtype,
            decoder.weights(),
        )
        L, heads, D = len(weights.layers), weights.num_kv_heads, weights.head_dim
        self.shared = [
            torch.randn(L, SHARED_BLOCKS, *shape, generator=draw).to(
                weights.embedding.device, dtype
            )
            for shape in ((heads, D, S), (heads, S, D))
        ]
        self.weights, self.rows = weights, rows
        self.reset()

    def reset(self):
        own = 2 * len(self.rows)
        self.k, self.v = (
            torch.cat([x, x[:, :1].expand(-1, own, *x.shape[2:])], 1).contiguous()
            for x in self.shared
        )

    def run(self, tokens, impl="cpp"):
        """Hidden states of tokens [(row, position)], all in one call. `rows` are the last
        positions; a row's two last blocks are its own."""
        table = torch.arange(-(-LIMIT // S), dtype=torch.int32) * 7 % SHARED_BLOCKS
        table = table.repeat(len(self.rows), 1)
        for b, last in enumerate(self.rows):
            for back in range(2):
                if last // S >= back:
                    table[b, last // S - back] = SHARED_BLOCKS + 2 * b + back
        device = self.weights.embedding.device
        rows, positions, table = (
            *(torch.tensor(column, device=device) for column in zip(*tokens, strict=True)),
            table.to(device),
        )
        return decode_step(
            self.weights,
            (positions * 31 + rows) % 61,
            positions,
            rows,
            table,
            self.k,
            self.v,
            impl=impl,
        )

    def own(self, row):
        return [
            x[:, SHARED_BLOCKS + 2 * row : SHARED_BLOCKS + 2 * row + 2].clone()
            for x in (self.k, self.v)
        ]


def chunk(row, last):
    return [(row, position) for position in range(max(0, last - CHUNK + 1), last + 1)]


@pytest.mark.parametrize("kind", [*KINDS, *SCALED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_tokens_bits_are_its_own_at_every_position(kind, dtype, device):
    """A chunk of tokens that ends at the position, alone in one call, against the same token by
    token, and among tokens of every other position."""
    lasts = (3, *POSITIONS)
    cache = Cache(decoder_of(device, kind, dtype, LIMIT), lasts)
    everyone = [token for row, last in enumerate(lasts) for token in chunk(row, last)]
    random.Random(0).shuffle(everyone)
    among = dict(zip(everyone, cache.run(everyone), strict=True))
    caches = [cache.own(row) for row in range(len(lasts))]
    cache.reset()
    for row, last in enumerate(lasts):
        alone = dict(zip(chunk(row, last), cache.run(chunk(row, last)), strict=True))
        assert all(map(torch.equal, cache.own(row), caches[row])), (
            f"keys and values at position {last}"
        )
        assert all(torch.equal(alone[token], among[token]) for token in alone), (
            f"companions at position {last}"
        )
    cache.reset()
    for row, last in enumerate(lasts):
        for token in chunk(row, last):
            assert torch.equal(cache.run([token])[0], among[token]), (
                f"one token a call, at position {token[1]}"
            )


def test_every_family_is_tried():
    assert {kind["model_type"] for kind in KINDS.values()} == set(FAMILIES)
    assert {kind["rope_parameters"].get("rope_type", "two") for kind in SCALED.values()} == {
        "linear",
        "dynamic",
        "yarn",
        "llama3",
        "two",
        "default",
    }


@pytest.mark.parametrize("kind", ["gemma3", "gpt_neox", "yarn, scaled", "wide heads"])
def test_a_token_far_out_is_right(kind, device):
    """Against float64. A float32 angle is off by 0.002 at position 40,000, and with it the keys by
    up to 6e-4 of their size."""
    ours, exact = (
        Cache(decoder_of(device, kind, torch.float32, LIMIT).to(dtype), (40_000,))
        for dtype in (torch.float32, torch.float64)
    )
    exact.k, exact.v = ours.k.double(), ours.v.double()
    last = chunk(0, 40_000)[-2:]
    got, want = ours.run(last).double(), exact.run(last, "torch")
    assert float((got - want).abs().max()) <= 2e-5 * float(want.abs().max())
    # of the first layer, which no other rounding has reached
    keys, exact_keys = (cache.own(0)[0][0].double() for cache in (ours, exact))
    assert float((keys - exact_keys).abs().max()) <= 5e-7 * float(exact_keys.abs().max())


def prompts(lengths, seed=0):
    draw = random.Random(seed)
    return [[1] + [draw.randrange(3, 61) for _ in range(n - 1)] for n in lengths]


def actor_of(device, kind, dtype, cache, limit=512, lora=False, values=False):
    decoder = decoder_of(device, kind, dtype, limit)
    draw = torch.Generator().manual_seed(3)
    if lora:
        add_adapter(decoder, LoRAConfig(rank=3))
    head = ValueHead(decoder.config.hidden_size, device=device) if values else None
    with torch.no_grad():
        for p in [p for name, p in decoder.named_parameters() if ".lora." in name] + (
            list(head.parameters()) if head else []
        ):
            p.copy_(0.2 * torch.randn(p.shape, generator=draw))
    return HybridActor(decoder, cache=cache, strict=True, value_head=head)


@pytest.mark.parametrize(
    "kind,dtype,lora,values",
    [
        ("llama", torch.float32, False, True),
        ("llama", torch.bfloat16, True, True),
        ("gemma3", torch.bfloat16, False, False),
        ("gpt_neox", torch.float32, False, False),
        ("yarn, scaled", torch.float32, False, True),
        ("llama3", torch.bfloat16, False, False),
    ],
    ids=str,
)
def test_scorer_and_sampler_agree_beyond_the_first_hundred_tokens(
    kind, dtype, lora, values, device
):
    asked, params = (
        prompts((120, 97, 126, 5, 133, 64)),
        SamplingParams(max_new_tokens=40, seed=1, banned_token_ids=(1, 2)),
    )
    said = []
    for cache in (CacheConfig(block_size=4), TIGHT):
        actor = actor_of(device, kind, dtype, cache, lora=lora, values=values)
        outs = actor.generate(asked, params)
        batch = PackedBatch.from_completions(asked, outs, device=device)
        for cut in (None, 150):
            scored = actor.score(batch, tokens_per_microbatch=cut)
            assert torch.equal(scored.logp, batch.rollout_logp)
            if values:
                assert torch.equal(
                    scored.values[batch.action_mask], batch.rollout_values[batch.action_mask]
                )
        # alone, and behind a prefix that is cached
        again = actor.generate(asked[4:5], params, request_ids=[4])[0][0]
        assert (again.token_ids, again.logprobs) == (outs[4][0].token_ids, outs[4][0].logprobs)
        said.append([(c.token_ids, c.logprobs, c.values) for group in outs for c in group])
    assert said[0] == said[1], "chunks and preemption"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_real_model(shared, dtype, device):
    draw = random.Random(0)
    asked = [[1] + [draw.randrange(3, 500) for _ in range(19)] for _ in range(4)]
    actor = HybridActor.from_pretrained(
        shared / "models" / "stories260k", dtype=dtype, strict=True, device=device
    )
    batch = PackedBatch.from_completions(
        asked,
        actor.generate(asked, SamplingParams(max_new_tokens=150, seed=1, banned_token_ids=(1, 2))),
        device=device,
    )
    assert len(batch.rollout_logp[batch.action_mask]) == 600
    assert torch.equal(actor.score(batch).logp, batch.rollout_logp)


@pytest.mark.full
@pytest.mark.parametrize("kind", [*KINDS, *SCALED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_past_a_thousand_tokens(kind, dtype, device):
    """Truly prefilled and decoded, with companions that are short, preemption, and a prefix that is
    cached."""
    asked, params = (
        prompts((1_015, 17, 700, 1_100)),
        SamplingParams(max_new_tokens=60, seed=1, banned_token_ids=(1, 2)),
    )
    cache = CacheConfig(block_size=16, num_blocks=150, max_sequences=8, max_tokens_per_step=200)
    actor = actor_of(device, kind, dtype, cache, limit=2048, values=True)
    for _ in range(2):  # the second time behind cached prefixes
        batch = PackedBatch.from_completions(asked, actor.generate(asked, params), device=device)
        scored = actor.score(batch)
        assert torch.equal(scored.logp, batch.rollout_logp)
        assert torch.equal(
            scored.values[batch.action_mask], batch.rollout_values[batch.action_mask]
        )
