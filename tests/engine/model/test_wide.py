"""float32 between bfloat16 parameters on a CPU: the layers against float64, the training forward
against the sampler and against float64."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

from fusedrl.engine import CacheConfig, HybridActor, PackedBatch, SamplingParams
from fusedrl.engine.config import LoRAConfig
from fusedrl.engine.model import decoder as decoder_module
from fusedrl.engine.model import wide
from fusedrl.engine.model.configuration import model_config
from fusedrl.engine.model.decoder import Decoder
from fusedrl.engine.model.step import activation_dtype
from fusedrl.kernels.runtime.dispatch import unavailable, use_impl

BF16 = torch.bfloat16
ULP = 2.0**-7  # of bfloat16, relative: twice the largest rounding error


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + 17 * sum(shape))).to(
        dtype
    )


@pytest.fixture(params=[False, True], ids=["wide", "narrow"])
def narrow(request, monkeypatch):
    """Whether the processor multiplies bfloat16: the backward pass's products of what is rounded to
    it (elsewhere torch computes the same more slowly)."""
    monkeypatch.setattr(wide, "_multiplies_bfloat16", lambda: request.param)
    return request.param


# ---- the layers ----------------------------------------------------------------------------------
def linear_in_float64(x, weight, bias, grad):
    leaves = [
        None if t is None else t.detach().double().requires_grad_() for t in (x, weight, bias)
    ]
    y = F.linear(*leaves)
    return y, torch.autograd.grad(y, [t for t in leaves if t is not None], grad.double())


def check_linear(x, weight, bias, grad, function=wide.linear, narrow=False):
    """narrow: a rounding of half an ulp to each factor that is no bfloat16, and to what comes
    out."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, weight, bias)]
    y = function(*leaves)
    grads = torch.autograd.grad(y, [t for t in leaves if t is not None], grad)
    want, want_grads = linear_in_float64(x, weight, bias, grad)
    scale = weight.shape[1] ** 0.5
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=3e-6 * scale)
    sizes = [grad.abs().double() @ weight.abs().double(), grad.abs().double().T @ x.abs().double()]
    sizes = [0.51 * ULP * narrow * size for size in sizes]
    _within(grads[0], want_grads[0], 1e-5, 3e-6 * len(weight) ** 0.5, sizes[0], narrow)
    for found, exact, size in zip(grads[1:], want_grads[1:], (2 * sizes[1], 0.0), strict=False):
        assert found.dtype == BF16
        # rounded once
        _within(found, exact, 0.51 * ULP, 1e-5 * (1 + len(x)) ** 0.5, size, False)


def _within(found, exact, relative, absolute, size, rounded):
    relative += 0.51 * ULP * rounded
    assert bool(((found.double() - exact).abs() <= relative * exact.abs() + absolute + size).all())


@pytest.mark.parametrize(
    "N, K, O", [(0, 5, 3), (1, 1, 1), (1, 7, 9), (33, 40, 61), (300, 64, 17), (3, 0, 2)]
)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tile", [1, 600, wide.TILE])  # a row at a time, some rows, all of them
def test_linear_against_float64(N, K, O, bias, tile, monkeypatch, narrow):
    monkeypatch.setattr(wide, "TILE", tile)
    check_linear(
        rand(N, K),
        rand(O, K, seed=1, dtype=BF16),
        rand(O, seed=2, dtype=BF16) if bias else None,
        rand(N, O, seed=3),
        narrow=narrow,
    )


@pytest.mark.parametrize("N", [300, 4_000, 40_000])
def test_gradients_of_many_tokens_are_not_biased(N, narrow):
    """Rounding is as often up as down: the sum of N products of one sign is
    within its own rounding, and the mean error a small part of that."""
    x, weight, grad = rand(N, 24) + 3, rand(17, 24, seed=1, dtype=BF16), rand(N, 17, seed=3) + 2
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    found = torch.autograd.grad(wide.linear(x, weight), leaves, grad)[1].double()
    exact = grad.double().T @ x.detach().double()
    assert ((found / exact - 1).abs() <= 0.51 * ULP).all()
    assert abs((found / exact - 1).mean().item()) <= 0.05 * ULP


def test_linear_in_bfloat16_would_not_pass():
    x, weight, grad = rand(300, 64), rand(17, 64, seed=1, dtype=BF16), rand(300, 17, seed=3)
    with pytest.raises(AssertionError):
        check_linear(
            x,
            weight,
            None,
            grad,
            lambda x, weight, bias: F.linear(x.to(BF16), weight, bias).float(),
        )


def test_linear_keeps_its_input_and_the_weight_and_differentiates_what_is_asked():
    x, weight, bias, held = (
        rand(6, 8),
        rand(5, 8, seed=1, dtype=BF16),
        rand(5, seed=2, dtype=BF16),
        [],
    )
    for asked in ((True, False, False), (False, True, False), (False, False, True)):
        leaves = [
            t.detach().requires_grad_(a) for t, a in zip((x, weight, bias), asked, strict=True)
        ]
        with saved_tensors_hooks(lambda t: (held.append(t.data_ptr()), t)[1], lambda t: t):
            y = wide.linear(*leaves)
        y.sum().backward()
        assert [leaf.grad is not None for leaf in leaves] == list(asked)
    assert set(held) <= {x.data_ptr(), weight.data_ptr()}


def test_one_dtype_is_torchs_own_to_the_bit(device):
    for dtype in (torch.float32, BF16, torch.float64):
        x, weight, bias = (
            rand(6, 8, dtype=dtype),
            rand(5, 8, seed=1, dtype=dtype),
            rand(5, seed=2, dtype=dtype),
        )
        assert torch.equal(wide.linear(x, weight, bias), F.linear(x, weight, bias))
        assert torch.equal(
            wide.embed(torch.tensor([3, 0], device=device), weight, dtype),
            F.embedding(torch.tensor([3, 0], device=device), weight),
        )


def test_an_embeddings_gradient_is_rounded_when_its_sum_is_complete(device):
    ids = torch.cat(
        [
            torch.zeros(2000, dtype=torch.int64, device=device),
            torch.tensor([7, 3, 7], device=device),
        ]
    )  # token 0 is met often, most never
    table, grad = rand(9, 5, dtype=BF16), rand(2003, 5, seed=1) + 0.3

    def gradient(function):
        leaf = table.detach().requires_grad_()
        out = function(leaf)
        out.backward(grad)
        return out.detach(), leaf.grad

    out, found = gradient(lambda leaf: wide.embed(ids, leaf, torch.float32))
    assert torch.equal(out, table[ids].float())
    exact = torch.zeros(9, 5, dtype=torch.float64, device=device).index_add_(0, ids, grad.double())
    torch.testing.assert_close(found.double(), exact, rtol=0.51 * ULP, atol=1e-6)
    assert found.dtype == BF16
    assert not found[[1, 2, 4, 5, 6, 8]].any()
    _, rounded_each_time = gradient(lambda leaf: F.embedding(ids, leaf).float())
    assert not torch.allclose(rounded_each_time.double(), exact, rtol=2 * ULP)
    leaf = table.detach().requires_grad_()
    wide.embed(ids[:0], leaf, torch.float32).sum().backward()
    assert not leaf.grad.any()


# ---- the decoder ---------------------------------------------------------------------------------
SIZES = {
    "vocab_size": 61,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "eos_token_id": 2,
    "bos_token_id": 1,
}
KINDS = {
    "llama": {"model_type": "llama", "attention_bias": True, "tie_word_embeddings": False},
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": True},
    "olmo2": {"model_type": "olmo2"},
    "gemma2": {
        "model_type": "gemma2",
        "head_dim": 8,
        "sliding_window": 9,
        "query_pre_attn_scalar": 5,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gpt_neox": {"model_type": "gpt_neox", "hidden_size": 48, "rotary_pct": 0.5},
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 48,
        "n_layer": 3,
        "n_head": 6,
        "n_positions": 128,
        "n_inner": 56,
    },
}
ROOMY = CacheConfig(block_size=4)
# chunks of prefills, preemption
TIGHT = CacheConfig(block_size=4, num_blocks=26, max_sequences=5, max_tokens_per_step=7)
PROMPTS = [[1, *range(3, 3 + n)] for n in (1, 7, 2, 21, 5, 11, 3, 30)]


def actor_of(device, kind, cache=ROOMY):
    return HybridActor(
        Decoder.random(model_config(SIZES | KINDS[kind]), 0, dtype=BF16, device=device), cache=cache
    )


def differences(device, actor, asked=PROMPTS, tokens=40):
    """|what the sampler said - what the trainer computes| of every action."""
    batch = PackedBatch.from_completions(
        asked,
        actor.generate(asked, SamplingParams(max_new_tokens=tokens, n=2, seed=1)),
        device=device,
    )
    return (actor.score(batch).logp - batch.rollout_logp)[batch.action_mask].double().abs()


@pytest.mark.parametrize("kind", KINDS)
def test_sampler_and_trainer_agree(kind, device):
    for cache in (ROOMY, TIGHT):
        found = differences(device, actor_of(device, kind, cache))
        assert len(found) > 200
        assert found.mean() <= 1e-4
        assert found.max() <= 2e-2
    if kind in ("llama", "gemma2"):
        actor = actor_of(device, kind)
        actor.add_adapter(LoRAConfig(rank=3), seed=1)
        with torch.no_grad():
            for name, p in actor.named_parameters():
                if ".lora." in name:
                    p.copy_(rand(*p.shape).mul(0.1))
        found = differences(device, actor)
        assert found.mean() <= 1e-4
        assert found.max() <= 2e-2


def test_a_trainer_that_rounds_activations_would_not(monkeypatch, device):
    actor = actor_of(device, "llama")
    outs = actor.generate(PROMPTS, SamplingParams(max_new_tokens=40, n=2, seed=1))
    batch = PackedBatch.from_completions(PROMPTS, outs, device=device)
    monkeypatch.setattr(decoder_module, "activation_dtype", lambda dtype: dtype)
    assert (actor.score(batch).logp - batch.rollout_logp)[batch.action_mask].abs().mean() > 1e-3


def test_on_a_real_model(shared, device):
    actor = HybridActor.from_pretrained(
        shared / "models" / "stories260k", dtype="bfloat16", device="cpu"
    )
    found = differences(device, actor, [[1, 5 + i, 40 + i] for i in range(12)], 64)
    assert len(found) > 1000
    assert found.mean() <= 1e-4
    assert found.max() <= 2e-2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_hidden_states_and_gradients_are_those_of_float64_but_for_one_rounding(
    kind, checkpointed, device, narrow
):
    """narrow: gradients but for a rounding of what goes into each product of the backward pass."""
    ours = Decoder.random(model_config(SIZES | KINDS[kind]), 0, dtype=BF16, device=device)
    exact = Decoder(ours.config, dtype=torch.float64, device=device)
    with torch.no_grad():
        for to, of in zip(exact.parameters(), ours.parameters(), strict=True):
            to.copy_(of)
    exact._options = ours._options  # Gemma's, which is rounded to the model's dtype
    batch = PackedBatch.from_sequences(
        [(list(range(2, 2 + n)), []) for n in (1, 20, 7)], device=device
    )
    outs, grads = [], []
    ours.checkpoint_activations = checkpointed
    for decoder in (ours, exact):
        hidden = decoder(batch.token_ids, batch.positions, batch.cu_seqlens, batch.max_length)
        assert hidden.dtype == decoder.dtype
        weights = rand(*hidden.shape).to(BF16).to(hidden.dtype)
        grads.append(
            torch.autograd.grad(
                hidden, [p for p in decoder.parameters() if p is not decoder.head], weights
            )
        )
        outs.append(hidden.detach().double())
    torch.testing.assert_close(outs[0], outs[1], rtol=0.51 * ULP, atol=1e-4)
    for found, want in zip(*grads, strict=True):
        if narrow and want.norm() > 0:
            assert (found.double() - want).norm() <= ULP * want.norm()
            along = (found.double() * want).sum() / want.square().sum()
            assert abs(along - 1) <= 0.5 * ULP
            continue
        torch.testing.assert_close(
            found.double(), want, rtol=0.51 * ULP, atol=1e-4 * max(1.0, want.abs().max().item())
        )


def test_the_forward_pass_does_not_know_of_it(monkeypatch, device):
    """Log-probabilities have the same bits whether the backward pass is narrow or not."""
    found = []
    for answer in (False, True):
        monkeypatch.setattr(wide, "_multiplies_bfloat16", lambda answer=answer: answer)
        actor = actor_of(device, "llama")
        outs = actor.generate(PROMPTS, SamplingParams(max_new_tokens=9, seed=1))
        batch = PackedBatch.from_completions(PROMPTS, outs, device=device)
        found.append(actor.score(batch).logp)
    assert torch.equal(*found)


def test_a_cpus_sampler_computes_and_caches_in_float32(device):
    actor = actor_of(device, "llama")
    assert actor.decoder.activation_dtype == torch.float32
    actor.generate([PROMPTS[1]], SamplingParams(max_new_tokens=5))
    assert actor._generation().cache.k.dtype == torch.float32
    with use_impl("torch"):
        assert actor.decoder.activation_dtype == torch.float32
        assert differences(device, actor, PROMPTS[:3], 20).max() <= 2e-2
    assert activation_dtype(BF16) == torch.float32
    for dtype in (torch.float32, torch.float16, torch.float64):
        assert (
            Decoder(
                model_config(SIZES | KINDS["llama"]), dtype=dtype, device=device
            ).activation_dtype
            == dtype
        )
    if unavailable("triton", "cpu") is None:
        with use_impl("triton"):
            assert actor.decoder.activation_dtype == torch.float32
            assert actor.decoder.cache_dtype == actor._generation().cache.k.dtype == torch.float16
