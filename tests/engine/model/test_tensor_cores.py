"""bfloat16 as a GPU computes it, on a CPU: sampler against trainer, gradients against float64, what
is held; and strict through the Triton composition."""

import random
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

from fusedrl.engine import CacheConfig, HybridActor, PackedBatch, SamplingParams
from fusedrl.engine.config import LoRAConfig
from fusedrl.engine.model import step as step_module
from fusedrl.engine.model import wide
from fusedrl.engine.model.configuration import model_config
from fusedrl.engine.model.decoder import Decoder
from fusedrl.engine.model.heads import ValueHead
from fusedrl.engine.model.step import allocate_cache, cache_dtype
from fusedrl.engine.model.strict import strict_step
from fusedrl.engine.model.weights import load_decoder
from fusedrl.kernels import split_linear as split_module
from fusedrl.kernels.runtime.dispatch import Implementations, unavailable
from fusedrl.kernels.split_linear import halves, split_linear
from fusedrl.kernels.swiglu import activate, activate_rows

pytestmark = pytest.mark.skipif(
    unavailable("triton", "cpu") is not None, reason="no triton interpreter"
)
BF16 = torch.bfloat16
ULP = 2.0**-7  # of bfloat16, relative: twice the largest rounding error
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
    "phi3": {"model_type": "phi3", "sliding_window": 9, "partial_rotary_factor": 0.5},
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
PROMPTS = [[1, *range(3, 3 + n)] for n in (1, 7, 2, 21, 5, 11, 3, 30)]


@pytest.fixture
def tensor_cores(monkeypatch):
    """The dtypes and the composition of a GPU. Each op of the composition is the CPU's best: the
    interpreter takes a second a token."""
    monkeypatch.setattr(
        step_module,
        "_IMPLS",
        Implementations("decode_step", cpu=("triton", "torch", "cpp"), cuda=("triton", "torch")),
    )
    monkeypatch.setattr(step_module, "_INTERPRETED", None)


@pytest.fixture
def interpreted(monkeypatch, tensor_cores):
    """The same, with the kernels themselves."""
    monkeypatch.setattr(step_module, "_INTERPRETED", "triton")


def decoder_of(device, kind, dtype=BF16, **changes):
    return Decoder.random(
        model_config(SIZES | KINDS[kind] | changes), 0, dtype=dtype, device=device
    )


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + 17 * sum(shape))).to(
        dtype
    )


def differences(device, actor, asked=PROMPTS, tokens=40, n=2):
    """|what the sampler said - what the trainer computes| of every action."""
    batch = PackedBatch.from_completions(
        asked,
        actor.generate(asked, SamplingParams(max_new_tokens=tokens, n=n, seed=1)),
        device=device,
    )
    return (actor.score(batch).logp - batch.rollout_logp)[batch.action_mask].double().abs()


# ---- sampler and trainer -------------------------------------------------------------------------
def check_contract(found, least):
    assert len(found) >= least
    assert found.mean() <= 1e-3
    assert found.max() <= 2e-2


def test_sampler_and_trainer_agree_on_a_real_model(tensor_cores, shared, monkeypatch, device):
    actor = HybridActor(load_decoder(shared / "models" / "stories260k", dtype=BF16, device=device))
    assert (actor.decoder.activation_dtype, actor.decoder.cache_dtype) == (
        torch.float32,
        torch.float16,
    )
    asked = [[1]] * 16
    check_contract(differences(device, actor, asked, 100, 1), 1500)
    assert actor._generation().cache.k.dtype == torch.float16
    # The negative control: the same rounding points, with inputs of products rounded to bfloat16
    # once.
    monkeypatch.setattr(
        split_module, "halves", lambda x, dtype: (x.to(dtype), torch.zeros_like(x, dtype=dtype))
    )
    actor.release_cache()
    with pytest.raises(AssertionError):
        check_contract(differences(device, actor, asked, 100, 1), 1500)


@pytest.mark.parametrize("kind", KINDS)
def test_sampler_and_trainer_agree(kind, tensor_cores, device):
    actor = HybridActor(
        decoder_of(device, kind),
        cache=CacheConfig(block_size=4, num_blocks=40, max_sequences=6, max_tokens_per_step=17),
    )
    check_contract(differences(device, actor), 200)
    if kind in ("llama", "gemma2"):
        actor.add_adapter(LoRAConfig(rank=3), seed=1)
        with torch.no_grad():
            for name, p in actor.named_parameters():
                if ".lora." in name:
                    p.copy_(rand(*p.shape).mul(0.1))
        actor.mark_updated()
        check_contract(differences(device, actor), 200)


def test_the_dtypes_of_a_gpu():
    gpu, cpu = torch.device("cuda:0"), torch.device("cpu")
    assert (cache_dtype(BF16, gpu), cache_dtype(BF16, cpu)) == (torch.float16, torch.float32)
    for dtype in (torch.float32, torch.float16):
        assert cache_dtype(dtype, gpu) == cache_dtype(dtype, cpu) == dtype


# ---- the kernels that a GPU runs -----------------------------------------------------------------
def one_call(device, decoder, tokens, dtype, step, size=4):
    """Hidden states of (row, position, id) in one call over an empty cache, whose rows' blocks are
    dealt out from the end."""
    rows, positions, ids = (
        torch.tensor(column, device=device) for column in zip(*tokens, strict=True)
    )
    B, M = int(rows.max()) + 1, int(positions.max()) // size + 1
    k, v = allocate_cache(decoder.weights(), B * M, size, dtype=dtype)
    for cache in (k, v):
        cache.fill_(torch.nan)
    table = torch.arange(B * M - 1, -1, -1, dtype=torch.int32, device=device).view(B, M)
    return step(decoder.weights(), ids, positions, rows, table, k, v)


@pytest.mark.parametrize("kind", ["qwen3", "gemma2", "gpt2"])
def test_the_interpreted_composition_against_float64(kind, interpreted, device):
    ours = decoder_of(device, kind, num_hidden_layers=1, n_layer=1)
    exact = Decoder(ours.config, dtype=torch.float64, device=device)
    with torch.no_grad():
        for to, of in zip(exact.parameters(), ours.parameters(), strict=True):
            to.copy_(of)
    exact._options = ours._options  # Gemma's, which is rounded to the model's dtype
    tokens = [(0, t, 3 + t) for t in range(6)]
    want = exact(
        torch.tensor([token[2] for token in tokens], device=device),
        torch.arange(6, device=device),
        torch.tensor([0, 6], dtype=torch.int32, device=device),
        6,
    )
    for fixed in (False, True):
        got = one_call(
            device,
            ours,
            tokens,
            torch.float16,
            partial(step_module.decode_step, fixed=fixed, impl="triton"),
        )
        assert got.dtype == BF16
        # the interpreter truncates to bfloat16; q, k, v have 11 bits
        torch.testing.assert_close(got.double(), want, rtol=1.01 * ULP, atol=4e-3)


# ---- split products ------------------------------------------------------------------------------
def test_two_halves_hold_sixteen_bits(device):
    x = torch.cat(
        [
            rand(4000),
            rand(4000, seed=1).exp().mul(1e5),
            torch.tensor([0.0, -0.0, 1.0, 2.0**-100], device=device),
        ]
    )
    hi, lo = halves(x, BF16)
    assert hi.dtype == lo.dtype == BF16
    assert bool(
        ((hi.double() + lo.double() - x.double()).abs() <= 2.0**-17 * x.double().abs()).all()
    )
    half = rand(1000).to(torch.float16)
    assert torch.equal(sum(part.double() for part in halves(half, BF16)), half.double()), (
        "float16 has 11 bits"
    )


@pytest.mark.parametrize("N", [0, 1, 33, 255, 256, 257, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_split_linear_against_float64(N, dtype):
    x, weight, bias = (
        rand(N, 70, dtype=dtype),
        rand(9, 70, seed=1, dtype=BF16),
        rand(9, seed=2, dtype=BF16),
    )
    for b in (bias, None):
        found, want = (
            split_linear(x, weight, b),
            F.linear(x.double(), weight.double(), None if b is None else b.double()),
        )
        assert found.dtype == torch.float32
        assert bool(
            (
                (found - want).abs()
                <= 2.0**-16.5 * (x.double().abs() @ weight.double().abs().T + 1)
            ).all()
        )


# ---- gradients, and what is held -----------------------------------------------------------------
def gradients(decoder, batch, weights):
    hidden = decoder(batch.token_ids, batch.positions, batch.cu_seqlens, batch.max_length)
    wanted = {name: p for name, p in decoder.named_parameters() if p is not decoder.head}
    return dict(
        zip(
            wanted,
            torch.autograd.grad(hidden, list(wanted.values()), weights.to(hidden.dtype)),
            strict=True,
        )
    )


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "gpt_neox", "gpt2"])
@pytest.mark.parametrize("scale", [1.0, 2.0**-40])  # float16 holds nothing below 2^-24
def test_gradients_against_float64(kind, scale, tensor_cores, device):
    ours = decoder_of(device, kind)
    exact = Decoder(ours.config, dtype=torch.float64, device=device)
    with torch.no_grad():
        for to, of in zip(exact.parameters(), ours.parameters(), strict=True):
            to.copy_(of)
    exact._options = ours._options
    batch = PackedBatch.from_sequences(
        [(list(range(2, 2 + n)), []) for n in (1, 20, 7)], device=device
    )
    weights = rand(28, ours.config.hidden_size).to(BF16) * scale
    found, want = (gradients(decoder, batch, weights) for decoder in (ours, exact))
    for name, grad in found.items():
        assert grad.dtype == BF16
        distance = (grad.double() - want[name]).norm() / want[name].norm().clamp_min(1e-9 * scale)
        assert distance <= 2 * ULP, (name, float(distance))


def saved_bytes(decoder, batch):
    """Bytes of the distinct storages that a training forward keeps, but for the parameters'."""
    own, held = {p.untyped_storage().data_ptr() for p in decoder.parameters()}, {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            # alive, so that no address comes twice
            held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        out = decoder(batch.token_ids, batch.positions, batch.cu_seqlens, batch.max_length)
    total = sum(tensor.untyped_storage().nbytes() for tensor in held.values())
    del out
    return total


def test_what_training_holds(tensor_cores, device):
    """Two bytes a number but for the residual stream: per token and layer 2 sums of H in float32;
    q, k, v; inputs of four products; what is activated."""
    batch = PackedBatch.from_sequences(
        [(list(range(2, 2 + n)), []) for n in (42, 58)], device=device
    )
    few, many = (
        saved_bytes(decoder_of(device, "llama", num_hidden_layers=L), batch) for L in (2, 6)
    )
    H, F_, qkv, out = 40, 56, 10 * 8, 6 * 8
    a_layer = (many - few) / 4 / 100
    numbers = 2 * (qkv + 2 * H + out + 3 * F_) + 2 * 4 * H
    norms = 2 * (4 + 4 * H / 100)  # 1 / rms a token, and the weights in float32
    assert a_layer == pytest.approx(numbers + norms, rel=0.01)


def test_a_backward_pass_with_activation_checkpointing_gives_the_same_bits(tensor_cores, device):
    decoder, batch = (
        decoder_of(device, "llama"),
        PackedBatch.from_sequences([(list(range(2, 2 + n)), []) for n in (9, 20)], device=device),
    )
    plain = gradients(decoder, batch, rand(29, 40))
    decoder.checkpoint_activations = True
    again = gradients(decoder, batch, rand(29, 40))
    assert all(torch.equal(grad, again[name]) for name, grad in plain.items())


def test_a_cpu_is_as_it_was():
    assert not step_module.on_tensor_cores(torch.device("cpu"))
    x, weight = rand(3, 8), rand(5, 8, seed=1, dtype=BF16)
    torch.testing.assert_close(wide.linear(x, weight), F.linear(x, weight.float()))


# ---- strict on a GPU -----------------------------------------------------------------------------
SMALL = {"num_hidden_layers": 1, "n_layer": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
ROOMY, TIGHT = (
    CacheConfig(block_size=4),
    CacheConfig(block_size=4, num_blocks=12, max_sequences=2, max_tokens_per_step=3),
)


def said(outs):
    return [(c.token_ids, c.logprobs, c.values) for group in outs for c in group]


def check_strict(device, kind, dtype):
    draw = random.Random(0)
    asked = [[1, *(draw.randrange(3, 61) for _ in range(n))] for n in (0, 5, 2)]
    params = [SamplingParams(max_new_tokens=4, seed=1, temperature=t) for t in (1.0, 0.7, 1.0)]
    decoder = decoder_of(device, kind, dtype, **SMALL)
    head = ValueHead(decoder.config.hidden_size, device=device)
    with torch.no_grad():
        head.weight.copy_(rand(*head.weight.shape))
    actor = HybridActor(decoder, strict=True, cache=ROOMY, value_head=head)
    outs = actor.generate(asked, params)
    for prompt, group, param in zip(asked, outs, params, strict=True):
        batch = PackedBatch.from_completions([prompt], [group], device=device)
        scored = actor.score(batch, temperature=param.temperature)
        assert torch.equal(scored.logp, batch.rollout_logp)
        assert torch.equal(
            scored.values[batch.action_mask], batch.rollout_values[batch.action_mask]
        )
    assert said(
        HybridActor(decoder, strict=True, cache=TIGHT, value_head=head).generate(asked, params)
    ) == said(outs), "chunks and preemption"
    return actor, asked, outs


def test_strict_through_the_kernels_of_a_gpu(interpreted, device):
    actor, asked, outs = check_strict(device, "llama", BF16)
    batch = PackedBatch.from_completions(asked, outs, device=device)
    actor.forward(batch).float().sum().backward()
    assert all(
        p.grad is not None for p in actor.decoder.parameters() if p is not actor.decoder.head
    )
    loose = HybridActor(actor.decoder, cache=ROOMY)  # the negative control
    batch = PackedBatch.from_completions(
        asked, loose.generate(asked, SamplingParams(max_new_tokens=4, seed=1)), device=device
    )
    assert not torch.equal(loose.score(batch).logp, batch.rollout_logp)


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_strict_through_the_kernels_of_a_gpu_in_every_family(kind, dtype, interpreted, device):
    check_strict(device, kind, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_a_row_alone_and_among_33(dtype, interpreted, device):
    decoder = decoder_of(device, "llama", dtype, **SMALL)
    tokens = [(b, t, 3 + (5 * b + t) % 58) for b in range(33) for t in range(3)]
    kept = cache_dtype(dtype, torch.device("cpu"))
    whole = one_call(device, decoder, tokens, kept, strict_step)
    for b in (0, 20, 32):
        alone = one_call(
            device, decoder, [(0, t, i) for row, t, i in tokens if row == b], kept, strict_step
        )
        assert torch.equal(alone, whole[3 * b : 3 * b + 3])


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("gated", [False, True])
def test_activations_a_row_at_a_time(activation, gated):
    x = rand(5, 46).mul(4)
    found, want = (
        activate_rows(x, activation, gated=gated),
        activate(x.double(), activation, gated=gated, impl="torch"),
    )
    torch.testing.assert_close(found.double(), want, rtol=2e-6, atol=1e-6)
    assert all(
        torch.equal(activate_rows(x[n : n + 1], activation, gated=gated)[0], found[n])
        for n in range(5)
    )
    assert activate_rows(x[:0], activation, gated=gated).shape == (0, 23 if gated else 46)


def test_the_products_of_a_blas_would_not_do():
    x, weight = rand(33, 300), rand(70, 300, seed=1, dtype=BF16)
    whole = split_linear(x, weight)
    assert any(not torch.equal(split_linear(x[n : n + 1], weight)[0], whole[n]) for n in range(33))


def test_strict_is_what_fits(device):
    decoder = decoder_of(device, "llama", torch.float16)
    with pytest.raises(
        ValueError,
        match=r"strict=True needs kernels whose sums have one order.*they take float32 and "
        r"bfloat16, not float16",
    ):
        HybridActor(decoder, strict=True)
    weights = decoder_of(device, "llama").weights()
    k, v = allocate_cache(weights, 1, 4, dtype=torch.float32)
    zero, table = (
        torch.zeros(1, dtype=torch.int64, device=device),
        torch.zeros(1, 1, dtype=torch.int32, device=device),
    )
    with pytest.raises(
        RuntimeError, match="'torch' cannot run on cpu: its sums follow the number of tokens"
    ):
        step_module.decode_step(weights, zero, zero, zero, table, k, v, fixed=True, impl="torch")
