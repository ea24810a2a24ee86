"""The decoder against transformers: random small models of every family, and a real one."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fusedrl.engine import CacheConfig, HybridActor, SamplingParams
from fusedrl.engine.base.packing import PackedBatch
from fusedrl.engine.generation.scheduler import Scheduler
from fusedrl.engine.model.configuration import model_config
from fusedrl.engine.model.decoder import Decoder
from fusedrl.engine.model.strict import strict_hidden
from fusedrl.engine.model.weights import hf_views, load_decoder

SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 37,
    "num_hidden_layers": 3,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": None,
    "initializer_range": 0.2,
}
# Odd head counts, one and several queries per key, a head_dim that is not H / heads, every bias,
# tied and not, windows of 5 and of some layers only.
MODELS = {
    "llama": {
        "model_type": "llama",
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
    },
    "llama-biases": {
        "model_type": "llama",
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "attention_bias": True,
        "mlp_bias": True,
        "head_dim": 6,
    },
    "llama3-rope": {
        "model_type": "llama",
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "linear-rope": {
        "model_type": "llama",
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0},
    },
    "mistral": {
        "model_type": "mistral",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 5,
    },
    "mistral-full": {
        "model_type": "mistral",
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "head_dim": 8,
        "sliding_window": None,
    },
    "qwen2": {
        "model_type": "qwen2",
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "qwen2-window": {
        "model_type": "qwen2",
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
    },
    "qwen3": {
        "model_type": "qwen3",
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
        "head_dim": 16,
        "tie_word_embeddings": True,
    },
    "qwen3-bias": {
        "model_type": "qwen3",
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 10,
        "attention_bias": True,
    },
    "dynamic-rope": {
        "model_type": "llama",
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 3.0},
    },
    "yarn-rope": {
        "model_type": "qwen3",
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 300.0,
            "factor": 4.0,
            "original_max_position_embeddings": 24,
        },
    },
    "phi3": {"model_type": "phi3", "num_attention_heads": 6, "num_key_value_heads": 3},
    "phi3-partial": {
        "model_type": "phi3",
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "sliding_window": 5,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 50.0,
            "partial_rotary_factor": 0.75,
        },
    },
    "smollm3": {
        "model_type": "smollm3",
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "no_rope_layer_interval": 2,
    },
    "smollm3-biases": {
        "model_type": "smollm3",
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "no_rope_layers": [0, 1, 0],
        "attention_bias": True,
        "mlp_bias": True,
        "use_sliding_window": True,
        "sliding_window": 5,
        "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 500.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "olmo2": {"model_type": "olmo2", "num_attention_heads": 6, "num_key_value_heads": 3},
    "olmo2-bias": {
        "model_type": "olmo2",
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
        "head_dim": 6,
        "attention_bias": True,
        "tie_word_embeddings": True,
    },
    "gemma2": {
        "model_type": "gemma2",
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 8,
        "sliding_window": 5,
        "query_pre_attn_scalar": 10,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma2-bias": {
        "model_type": "gemma2",
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 6,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "attention_bias": True,
        "tie_word_embeddings": False,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "sliding_window": 5,
        "sliding_window_pattern": 2,
        "query_pre_attn_scalar": 6,
        "final_logit_softcapping": 3.0,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
        },
    },
    "gpt2": {"model_type": "gpt2", "num_attention_heads": 3, "n_positions": 64, "bos_token_id": 1},
    "gpt_neox": {
        "model_type": "gpt_neox",
        "num_attention_heads": 3,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 50.0,
            "partial_rotary_factor": 0.5,
        },
    },
    "gpt_neox-serial": {
        "model_type": "gpt_neox",
        "num_attention_heads": 6,
        "use_parallel_residual": False,
        "rotary_pct": 1.0,
        "rotary_emb_base": 300,
        "attention_bias": False,
        "hidden_act": "gelu_new",
        "tie_word_embeddings": True,
    },
    "gpt2-odd": {
        "model_type": "gpt2",
        "hidden_size": 35,
        "num_attention_heads": 5,
        "n_layer": 3,
        "n_positions": 64,
        "n_inner": 37,
        "activation_function": "gelu",
        "tie_word_embeddings": False,
        "scale_attn_weights": False,
        "layer_norm_epsilon": 1e-3,
        "bos_token_id": 1,
    },
}
LENGTH = 23


def peer_and_ours(device, name, dtype=torch.float32):
    """A random transformers model, every parameter non-trivial, and our decoder with the same
    weights."""
    options = SIZES | MODELS[name]
    torch.manual_seed(sum(map(ord, name)))
    config = AutoConfig.for_model(**options)
    config._attn_implementation = "eager"
    peer = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for key, p in peer.named_parameters():
            is_norm = ("norm" in key and "gemma" not in name) or "ln_" in key
            p.normal_(1.0 if is_norm and "bias" not in key else 0.0, 0.2)
    peer = peer.to(device, dtype)
    return peer, copy_of(peer, dtype)


def copy_of(peer, dtype):
    ours = Decoder(model_config(peer.config.to_dict()), dtype=dtype, device=peer.device)
    state = peer.state_dict()
    views = hf_views(ours)
    assert set(state) - set(views) <= {"lm_head.weight"}
    for key, view in views.items():
        view.copy_(state[key.replace("embed_out", "lm_head")].view(view.shape))
    return ours


def logits(device, decoder, ids, generating=False):
    """Of one sequence, by the training forward or by the generation step."""
    arguments = (
        ids,
        torch.arange(len(ids), device=device),
        torch.tensor([0, len(ids)], dtype=torch.int32, device=device),
        len(ids),
    )
    hidden = strict_hidden(decoder, *arguments, block_size=4) if generating else decoder(*arguments)
    z, cap = hidden @ decoder.head_weight.T, decoder.config.logit_softcap
    return z if cap is None else cap * torch.tanh(z / cap)


def some_ids(device, vocabulary=61, length=LENGTH, seed=0):
    return torch.randint(
        1, vocabulary, (length,), generator=torch.Generator().manual_seed(seed)
    ).to(device)


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_as_transformers(name, device):
    peer, ours = peer_and_ours(device, name)
    ids = some_ids(device)
    got, want = logits(device, ours, ids), peer(ids[None]).logits[0]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-5)
    weight = (
        torch.randn(got.shape, generator=torch.Generator().manual_seed(1)).to(device) / got.numel()
    )
    (got * weight).sum().backward()
    (want * weight).sum().backward()
    grads = Decoder(ours.config)  # the same views, over our gradients
    with torch.no_grad():
        for p, q in zip(grads.parameters(), ours.parameters(), strict=True):
            p.copy_(q.grad)
    theirs = dict(peer.named_parameters())
    for key, view in hf_views(grads).items():
        want = theirs[key.replace("embed_out", "lm_head")].grad.view(view.shape)
        torch.testing.assert_close(
            view, want, rtol=1e-4, atol=2e-6, msg=lambda m, key=key: f"{key}: {m}"
        )


@pytest.fixture
def preemptions(monkeypatch):
    seen = []
    requeue = Scheduler._requeue
    monkeypatch.setattr(
        Scheduler,
        "_requeue",
        lambda self, sequence: (seen.append(sequence.id), requeue(self, sequence))[1],
    )
    return seen


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_as_transformers(name, preemptions, device):
    peer, ours = peer_and_ours(device, name)
    prompts = [some_ids(device, length=n, seed=n).tolist() for n in (1, 23, 9, 6, 12)]
    for cache in (
        CacheConfig(block_size=4),
        CacheConfig(block_size=4, num_blocks=18, max_sequences=4, max_tokens_per_step=7),
    ):
        actor = HybridActor(ours, cache=cache)
        for prompt, (completion,) in zip(
            prompts,
            actor.generate(prompts, SamplingParams(max_new_tokens=17, temperature=0.0)),
            strict=True,
        ):
            assert len(completion.token_ids) == 17
            with torch.no_grad():
                logp = torch.log_softmax(
                    peer(torch.tensor([prompt + completion.token_ids], device=device)).logits[
                        0, len(prompt) - 1 : -1
                    ],
                    -1,
                )
            assert completion.token_ids == logp.argmax(-1).tolist()
            torch.testing.assert_close(
                torch.tensor(completion.logprobs, device=device),
                logp.max(-1).values,
                rtol=0,
                atol=5e-5,
            )
        # where every layer has a window, blocks behind it are given back in time
        windowed = all(ours.config.windows)
        assert bool(preemptions) == (cache.num_blocks == 18 and not windowed)


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_errs_at_most_twice_as_much(name, device):
    peer, ours = peer_and_ours(device, name, torch.bfloat16)
    # of the rounded weights; its parity in float32 is tested above
    exact = copy_of(peer.to(torch.float32), torch.float64)
    peer = peer.to(torch.bfloat16)
    errors = torch.zeros(3, dtype=torch.float64, device=device)
    with torch.no_grad():
        for seed in range(4):
            ids = some_ids(device, seed=seed)
            want = logits(device, exact, ids)
            found = (
                logits(device, ours, ids),
                logits(device, ours, ids, generating=True),
                peer(ids[None]).logits[0],
            )
            errors += torch.stack([(x.double() - want).square().mean() for x in found])
    trained, generated, theirs = errors.sqrt().tolist()
    assert trained <= 2 * theirs, f"root mean square error {trained}, transformers' {theirs}"
    assert generated <= 2 * theirs, f"root mean square error {generated}, transformers' {theirs}"


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "mistral",
        "qwen2-window",
        "qwen3",
        "phi3-partial",
        "smollm3-biases",
        "olmo2",
        "gemma2",
        "gemma3",
        "gpt2",
        "gpt_neox",
    ],
)
def test_packed_is_each_alone(name, device):
    _, ours = peer_and_ours(device, name)
    lengths = [1, 23, 0, 7, 2, 22, 64]
    sequences = [some_ids(device, length=n, seed=n) for n in lengths]
    batch = PackedBatch.from_sequences([(s.tolist(), []) for s in sequences]).to(device)

    def forward(batch):
        return ours(batch.token_ids, batch.positions, batch.cu_seqlens, batch.max_length)

    hidden = forward(batch)
    for got, alone in zip(hidden.split(lengths), sequences, strict=True):
        torch.testing.assert_close(
            got,
            forward(PackedBatch.from_sequences([(alone.tolist(), [])]).to(device)),
            rtol=0,
            atol=2e-6 * hidden.abs().max().item(),
        )
    # Two runs agree bitwise, forward and backward.
    grads = []
    for _ in range(2):
        again = forward(batch)
        assert torch.equal(again, hidden)
        grads.append(
            torch.autograd.grad(
                again.square().sum(), [p for p in ours.parameters() if p is not ours.head]
            )
        )
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_no_tokens(device):
    ours = Decoder.random(model_config(SIZES | MODELS["qwen3"]), 0, device=device)
    hidden = ours(
        torch.zeros(0, dtype=torch.int64, device=device),
        torch.zeros(0, dtype=torch.int64, device=device),
        torch.zeros(1, dtype=torch.int32, device=device),
        0,
    )
    assert hidden.shape == (0, 24)
    hidden.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in ours.parameters())


def test_companions_with_nan_change_nothing(device):
    _, ours = peer_and_ours(device, "llama")
    batch = PackedBatch.from_sequences(
        [(some_ids(device, length=n, seed=n).tolist(), []) for n in (9, 5, 11)]
    ).to(device)
    clean = ours(batch.token_ids, batch.positions, batch.cu_seqlens, batch.max_length)
    poison = 60  # a token that only the second sequence has
    ids = torch.where(batch.token_ids == poison, 1, batch.token_ids)
    clean = ours(ids, batch.positions, batch.cu_seqlens, batch.max_length)
    ids[10] = poison
    with torch.no_grad():
        ours.embedding[poison] = torch.nan
    dirty = ours(ids, batch.positions, batch.cu_seqlens, batch.max_length)
    assert dirty[9:14].isnan().any()
    assert torch.equal(dirty[:9], clean[:9])
    assert torch.equal(dirty[14:], clean[14:])


def test_weights_are_live(device):
    ours = Decoder.random(model_config(SIZES | MODELS["qwen3"]), 0, device=device)
    weights = ours.weights()
    assert weights is ours.weights()
    assert weights.head is ours.embedding
    assert weights.layers[1].qkv is ours.layers[1].qkv_proj
    assert weights.layers[0].q_norm is ours.layers[0].q_norm
    assert weights.layers[0].qkv_bias is None
    with torch.no_grad():
        ours.layers[2].down_proj.zero_()
    assert not weights.layers[2].down.any()
    ours.to(torch.bfloat16)
    assert ours.weights().layers[0].o.dtype == torch.bfloat16
    assert ours.weights().rope_table.inv_freq.dtype == torch.float32
    # moving to bfloat16 rounds the parameters, not the frequencies
    assert ours.weights().rope_table.inv_freq.tolist() == [list(ours.config.inv_freq)]


def test_a_frozen_copy_stands_alone(device):
    ours = Decoder.random(model_config(SIZES | MODELS["qwen3"]), 0, device=device)
    ours.weights()
    reference = copy.deepcopy(ours).requires_grad_(False)
    ids = some_ids(device)
    before = logits(device, reference, ids)
    with torch.no_grad():
        for p in ours.parameters():
            p.add_(0.5)
    assert not before.requires_grad
    assert torch.equal(logits(device, reference, ids), before)
    assert reference.weights().head is reference.embedding
    assert reference.weights().layers[0].qkv is reference.layers[0].qkv_proj


def test_random_is_seeded(device):
    config = model_config(SIZES | MODELS["llama-biases"])
    one, same, other = (
        Decoder.random(config, 1, device=device),
        Decoder.random(config, 1, device=device),
        Decoder.random(config, 2, device=device),
    )
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.embedding, other.embedding)
    assert 0.18 < one.layers[0].qkv_proj.std().item() < 0.22
    assert (one.norm == 1).all()
    assert not one.layers[0].gate_up_bias.any()
    assert one.head is not None
    assert torch.equal(
        Decoder.random(config, 1, dtype=torch.bfloat16, device=device).embedding,
        one.embedding.bfloat16(),
    )


def test_a_real_model(shared, device):
    path = shared / "models" / "stories260k"
    ours, peer = (
        load_decoder(path, dtype=torch.float32, device=device),
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(device),
    )
    ids = some_ids(device, 512, 300)
    with torch.no_grad():
        got, want = logits(device, ours, ids), peer(ids[None]).logits[0]
        exact = logits(device, load_decoder(path, dtype=torch.float64, device=device), ids)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=3e-5)
    assert (got - exact).abs().max() <= 2 * (want - exact).abs().max()
