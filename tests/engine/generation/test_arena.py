"""The KV cache's memory, lent to training: the same gradients to the bit, the same tokens
afterwards, and nothing handed out while a tensor reads it."""

import random

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fusedrl.engine import CacheConfig, HybridActor, PackedBatch, SamplingParams
from fusedrl.engine.config import PolicyConfig
from fusedrl.engine.generation import arena as arena_module
from fusedrl.engine.generation.arena import Arena
from fusedrl.engine.model.configuration import model_config
from fusedrl.engine.model.decoder import Decoder
from fusedrl.engine.model.heads import ValueHead
from fusedrl.engine.watch.plan import Planner
from fusedrl.kernels.runtime import native

SIZES = {
    "vocab_size": 61,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
KINDS = {
    "llama": {"model_type": "llama", "attention_bias": True},
    "qwen3 tied": {"model_type": "qwen3", "tie_word_embeddings": True},
    "gemma2": {"model_type": "gemma2", "sliding_window": 9, "query_pre_attn_scalar": 8},
}
PROMPTS = [[1, 4, 9], [1], [1, 7, 8, 30, 41, 5, 5, 9], [1, 50]]
PARAMS = SamplingParams(max_new_tokens=20, n=2)
POOL = CacheConfig(num_blocks=2000, max_sequences=8)  # more than training needs


@pytest.fixture(autouse=True)
def small_counts(monkeypatch):
    monkeypatch.setattr(arena_module, "_SMALLEST", 256)


def make(device, kind="llama", dtype=torch.float32, cache=POOL, **options):
    decoder, head = (
        Decoder.random(model_config(SIZES | KINDS[kind]), 0, dtype=dtype, device=device),
        ValueHead(40),
    )
    torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(1))
    return HybridActor(decoder, value_head=head.to(device), cache=cache, **options)


def train(actor, batch, parts=3):
    """Gradients after a few micro-batches that add up, and the losses."""
    for parameter in actor.parameters():
        parameter.grad = None
    losses = []
    for part in range(parts):
        micro = batch.select(range(part, batch.num_sequences, parts))
        hidden = actor.forward(micro)
        logp, entropy = actor.logprobs(micro, hidden)
        loss = (logp.square() + 0.1 * entropy + actor.values(micro, hidden).square()).sum()
        loss.backward()
        losses.append(loss.detach())
    return [*losses, *(p.grad for p in actor.parameters())]


def equal(found, expected):
    return len(found) == len(expected) and all(
        torch.equal(a, b) for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["plain", "checkpointed", "strict"])
@pytest.mark.parametrize("blocks", [2000, 100, 5])
def test_gradients_are_the_same_bits(kind, dtype, mode, blocks, device):
    if mode == "strict" and (not native.capability or device.type != "cpu"):
        pytest.skip(
            "strict mode is the C++ kernels', and they are not built or serve no such device"
        )
    actor = make(
        device,
        kind,
        dtype,
        CacheConfig(num_blocks=blocks, max_sequences=8),
        strict=mode == "strict",
    )
    actor.decoder.checkpoint_activations = mode == "checkpointed"
    batch = PackedBatch.from_completions(
        PROMPTS,
        actor.generate(PROMPTS, PARAMS if blocks > 5 else SamplingParams(max_new_tokens=20)),
        device=device,
    )
    expected = train(actor, batch)
    with actor.lend_cache() as arena:
        assert equal(train(actor, batch), expected)
        assert 0 < arena.peak <= arena.capacity == actor._generator.cache.nbytes
        assert equal(train(actor, batch), expected), "and again, in the same memory"
        assert arena.used == 0


@pytest.mark.cpu_only("the plan is of what the C++ kernels save")
@pytest.mark.skipif(not native.capability, reason="the native extension is not built")
@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_it_holds_what_the_plan_says_is_held(checkpointed, device):
    actor = make(device)
    actor.decoder.checkpoint_activations = checkpointed
    actor.generate(PROMPTS, PARAMS)
    batch = PackedBatch.from_sequences(
        ((torch.randint(61, (5,)).tolist(), torch.randint(61, (45,)).tolist()) for _ in range(12)),
        device=device,
    )
    planned = Planner(
        model_config(SIZES | KINDS["llama"]),
        PolicyConfig("m", "d", ("r.py:r",), dtype="float32", device="cpu"),
    )
    with actor.lend_cache() as arena:
        train(actor, batch, parts=1)
        kept = 4 * int(batch.action_mask.sum()) * SIZES["vocab_size"]  # logits wait
        assert arena.peak == pytest.approx(
            planned.activation_bytes(batch.num_tokens, checkpointed) + kept, rel=0.06
        )


def test_what_is_generated_next_is_what_would_have_been(device):
    def run(lend):
        actor = make(device, cache=CacheConfig(num_blocks=60, max_sequences=8))
        outs = [actor.generate(PROMPTS, PARAMS)]
        pool = actor._generator.cache.k.data_ptr()
        for number in range(2):
            batch = PackedBatch.from_completions(PROMPTS, outs[-1], device=device)
            if lend:
                with actor.lend_cache() as arena:
                    train(actor, batch)
                assert arena.peak > 0
                actor._generator.cache.v[:, :, 0] = float("nan")
            else:
                train(actor, batch)
            if number:  # once with the very same weights, for which prefixes were cached
                with torch.no_grad():
                    for p in actor.parameters():
                        p -= 0.01 * p.grad
                actor.mark_updated()
            outs.append(actor.generate(PROMPTS, PARAMS))
            assert actor._generator.cache.k.data_ptr() == pool, (
                "neither unmapped nor allocated anew"
            )
        return [[(c.token_ids, c.logprobs) for group in out for c in group] for out in outs]

    assert run(lend=True) == run(lend=False)


def test_without_a_cache_nothing_is_lent(device):
    actor = make(device)
    with actor.lend_cache() as arena:
        assert arena is None
        actor.generate(PROMPTS, PARAMS)
        assert actor._generator is not None


def test_refuses_what_is_in_flight_and_what_wants_the_cache(device):
    actor = make(device)
    stream = actor.stream(PROMPTS, [SamplingParams(max_new_tokens=m, n=2) for m in (4, 20, 20, 20)])
    next(stream)
    with (
        pytest.raises(
            RuntimeError,
            match=r"cannot be lent: \d completions are in flight; let their streams .* or abort",
        ),
        actor.lend_cache(),
    ):
        pass
    actor.abort()
    with actor.lend_cache() as arena:
        assert arena.capacity > 0
        for ask in (actor.generate, actor.stream):
            with pytest.raises(
                RuntimeError, match="the KV cache is lent to training; leave the lend_cache"
            ):
                ask(PROMPTS, PARAMS)
        with actor.lend_cache() as inner:
            assert inner is None, "lent once is lent"
    assert len(list(stream)) == 7
    actor.generate(PROMPTS, PARAMS)


def test_a_graph_that_outlives_the_block(device):
    actor = make(device)
    batch = PackedBatch.from_completions(PROMPTS, actor.generate(PROMPTS, PARAMS), device=device)
    expected = train(actor, batch, parts=1)
    kept = []
    with (
        pytest.raises(
            RuntimeError,
            match=r"\d+ bytes of the cache still belong to a graph .* call backward inside it",
        ),
        actor.lend_cache(),
    ):
        hidden = actor.forward(batch)
        logp, entropy = actor.logprobs(batch, hidden)
        kept.append((logp.square() + 0.1 * entropy + actor.values(batch, hidden).square()).sum())
    for p in actor.parameters():
        p.grad = None
    actor.generate(PROMPTS, PARAMS)  # in memory of its own
    kept[0].backward()
    assert equal([kept[0].detach(), *(p.grad for p in actor.parameters())], expected), (
        "the graph kept what it had"
    )


def test_an_error_inside_leaves_an_actor_that_generates(device):
    actor = make(device)
    outs = actor.generate(PROMPTS, PARAMS)
    batch = PackedBatch.from_completions(PROMPTS, outs, device=device)
    with pytest.raises(ZeroDivisionError) as caught, actor.lend_cache():
        graph = actor.forward(batch)
        raise ZeroDivisionError
    assert caught.traceback
    again = actor.generate(PROMPTS, PARAMS)
    assert [c.token_ids for group in again for c in group] == [
        c.token_ids for group in outs for c in group
    ]
    graph.sum().backward()


# ---- the arena itself ----------------------------------------------------------------------------
def lent(device, bytes_=1 << 16):
    return Arena(
        [
            torch.empty(bytes_, dtype=torch.uint8, device=device),
            torch.empty(bytes_ // 2, dtype=torch.uint8, device=device),
        ]
    )


def inside(arena, tensor):
    return arena._holds(tensor.untyped_storage())


def test_views_of_one_storage_are_copied_once_and_keep_their_strides(device):
    arena, x = lent(device), torch.randn(3, 40, 8).to(device)
    views = [x, x[1], x.transpose(1, 2), x[:, ::3], x.expand(2, 3, 40, 8), x.view(torch.int32)]
    packed = [arena._pack(view.detach()) for view in views]
    assert len({p.untyped_storage()._cdata for p in packed}) == 1
    assert all(inside(arena, p) for p in packed)
    for view, p in zip(views, packed, strict=True):
        assert torch.equal(view, p)
        assert (view.stride(), view.storage_offset(), view.dtype) == (
            p.stride(),
            p.storage_offset(),
            p.dtype,
        )
    assert arena.used == x.nbytes
    assert arena._pack(packed[2]) is packed[2], "what is in there stays there"
    before = packed[0].clone()
    x += 1
    assert torch.equal(arena._pack(x), x), "written to in between: another copy"
    assert torch.equal(packed[0], before)


def test_what_is_left_where_it_is(device):
    weight = torch.randn(40, 40, requires_grad=True, device=device)
    arena = Arena([torch.empty(1 << 16, dtype=torch.uint8, device=device)], keep=[weight])
    for tensor in (
        weight.t(),
        weight[3:],
        torch.randn(10).to(device),
        torch.empty(0, device=device),
        torch.randn(1 << 15).to(device),
        torch.randn(20, 20).to(device).to_sparse(),
        torch.empty(90, device="meta"),
        torch.nn.Parameter(torch.randn(100).to(device)),
    ):
        assert arena._pack(tensor) is tensor
    assert arena.used == arena.peak == 0


def test_a_storage_at_the_address_of_a_dead_one_is_another(device):
    arena = lent(device, 1 << 20)
    seen = set()
    for number in range(300):
        x = torch.full((200,), float(number), device=device)
        seen.add(x.data_ptr())
        assert arena._pack(x).eq(number).all()
        del x
    assert len(seen) < 300, "addresses were used again"
    assert arena.used == 0
    assert len(arena._copies) < 200


def test_a_range_is_free_when_nothing_reads_it(device):
    arena = lent(device)
    x, y, z = (torch.randn(100).to(device) for _ in range(3))
    a, b, c = (arena._pack(t) for t in (x, y, z))
    assert [t.data_ptr() - a.data_ptr() for t in (a, b, c)] == [0, 512, 1024]
    view = b[10:20].view(2, 5)
    del b, c
    assert arena.used == 512 + 400, "a view of b still reads it"
    assert torch.equal(view.flatten(), y[10:20])
    del a
    assert arena.used == 512 + 400, "free, but below what is in use"
    del view
    assert arena.used == 0


def test_a_gradient_that_is_a_saved_tensor_survives(device):
    class Stored(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x * 2)
            return x.square().sum()

        @staticmethod
        def backward(ctx, grad):
            # as a loss does that computed its gradient in the forward pass
            return ctx.saved_tensors[0]

    arena, x = lent(device), torch.randn(100, requires_grad=True, device=device)
    with arena.holding():
        Stored.apply(x).backward()
        assert inside(arena, x.grad)
        y = torch.randn(100, requires_grad=True, device=device)
        for _ in range(5):
            (y * 3).exp().sum().backward()
    assert torch.equal(x.grad, 2 * x.detach())


def test_random_graphs_in_random_memory(device):
    """Functions of all sorts, shared and dropped graphs, checkpoints, in regions of any size: the
    same gradients as without."""
    draw = random.Random(0)

    def step(x, w, number):
        kind = number % 5
        if kind == 0:
            return torch.tanh(x @ w)
        if kind == 1:
            return x * torch.sigmoid(x.flip(0)) + x
        if kind == 2:
            return torch.cat([x[:, 5:].exp().clamp(max=3), x[:, :5]], 1)
        if kind == 3:
            return checkpoint(lambda x: (x @ w.t()).relu().sin() + x, x, use_reentrant=False)
        return (
            torch.nn.functional.layer_norm(x, (20,)).view(2, -1, 20).transpose(0, 1).reshape(-1, 20)
        )

    for _ in range(20):
        size, kinds, seed = (
            draw.choice([300, 5000, 40_000]),
            [draw.randrange(5) for _ in range(draw.randint(1, 12))],
            draw.randrange(1000),
        )

        def gradients(kinds=kinds, seed=seed):
            torch.manual_seed(seed)
            x, w = (
                torch.randn(8, 20, requires_grad=True, device=device),
                torch.randn(20, 20, requires_grad=True, device=device),
            )
            dropped = step(x, w, 0)
            out = x
            for number in kinds:
                out = step(out, w, number)
            del dropped
            out.square().sum().backward(retain_graph=True)
            (out.sum() * 2).backward()
            return [x.grad, w.grad if w.grad is not None else x.grad]

        expected, arena = gradients(), lent(device, size)
        with arena.holding():
            found = gradients()
        assert equal(found, expected)
        del found
        assert arena.used == 0
