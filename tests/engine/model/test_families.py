import json

import pytest
import torch
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from fusedrl.engine.model.configuration import model_config
from fusedrl.engine.model.families import FAMILIES

LLAMA = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}


GPT2 = {"model_type": "gpt2", "vocab_size": 32, "n_embd": 32, "n_layer": 4, "n_head": 4}


@pytest.mark.parametrize(
    "model_type", [name for name in FAMILIES if name not in ("gpt2", "gpt_neox")]
)
def test_missing_keys_are_what_transformers_assumes(model_type):
    small = {key: value for key, value in LLAMA.items() if key != "model_type"} | {
        "num_key_value_heads": 2
    }
    theirs, ours = (
        AutoConfig.for_model(model_type, **small),
        model_config(small | {"model_type": model_type}),
    )
    assert ours.max_positions == theirs.max_position_embeddings
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 8)
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.bos_token_id == theirs.bos_token_id
    assert ours.eos_token_ids == (() if theirs.eos_token_id is None else (theirs.eos_token_id,))
    assert ours.tie_embeddings == theirs.tie_word_embeddings
    assert {*ours.windows, 0} == {getattr(theirs, "sliding_window", None) or 0, 0}
    assert ours.pad_token_id == theirs.pad_token_id
    # A file with all the keys says the same.
    assert model_config(theirs.to_dict()) == ours


def test_gpt2_has_names_of_its_own():
    theirs, ours = AutoConfig.for_model(**GPT2), model_config(GPT2)
    assert (
        ours.hidden_size,
        ours.num_layers,
        ours.num_heads,
        ours.num_kv_heads,
        ours.head_dim,
        ours.intermediate_size,
    ) == (32, 4, 4, 4, 8, 128)
    assert ours.max_positions == theirs.n_positions == 1024
    assert ours.norm_eps == theirs.layer_norm_epsilon
    assert (ours.bos_token_id, ours.eos_token_ids, ours.pad_token_id) == (
        theirs.bos_token_id,
        (theirs.eos_token_id,),
        theirs.pad_token_id,
    )
    assert ours.tie_embeddings == theirs.tie_word_embeddings
    assert (ours.activation, ours.gated, ours.layer_norm, ours.learned_positions) == (
        "gelu_tanh",
        False,
        True,
        True,
    )
    assert model_config(theirs.to_dict()) == ours
    # Keys that GPT-2 does not have are not read, as in transformers.
    assert (
        model_config(GPT2 | {"num_key_value_heads": 2, "intermediate_size": 7, "rms_norm_eps": 0.5})
        == ours
    )
    assert model_config(GPT2 | {"n_inner": 7, "activation_function": "gelu"}).intermediate_size == 7
    assert model_config(GPT2 | {"n_embd": 20}).head_dim == 5


def test_gpt_neox_has_some_names_of_its_own():
    raw = LLAMA | {"model_type": "gpt_neox"}
    theirs, ours = (
        AutoConfig.for_model(**raw),
        model_config(raw | {"num_key_value_heads": 2, "rms_norm_eps": 0.5}),
    )
    assert (ours.num_kv_heads, ours.head_dim, ours.max_positions) == (
        4,
        8,
        theirs.max_position_embeddings,
    )
    assert (ours.norm_eps, ours.qkv_bias, ours.o_bias, ours.parallel) == (
        theirs.layer_norm_eps,
        True,
        True,
        theirs.use_parallel_residual,
    )
    assert (ours.bos_token_id, ours.eos_token_ids, ours.tie_embeddings) == (
        theirs.bos_token_id,
        (theirs.eos_token_id,),
        theirs.tie_word_embeddings,
    )
    assert ours.inv_freq == (1.0,)  # a quarter of each head turns
    assert model_config(theirs.to_dict()) == ours
    other = model_config(
        raw
        | {
            "rotary_pct": 0.5,
            "rotary_emb_base": 100,
            "use_parallel_residual": False,
            "attention_bias": False,
        }
    )
    assert other.inv_freq == pytest.approx((1.0, 0.1))
    assert not other.parallel
    assert not other.qkv_bias


ROPES = {
    "default": {"rope_type": "default", "rope_theta": 77.0},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.5},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}
YARNS = [
    {"factor": 0.5},
    {"attention_factor": 1.5},
    {"mscale": 0.7, "mscale_all_dim": 1.3},
    {"truncate": False},
    {"beta_fast": 4, "beta_slow": 2},
    {"factor": None, "original_max_position_embeddings": 512},
    {"original_max_position_embeddings": 6},
]


@pytest.mark.parametrize("kind", ROPES)
def test_rope_in_both_spellings(kind, device):
    rope = ROPES[kind]
    new = model_config(LLAMA | {"head_dim": 64, "rope_parameters": rope})
    theirs = AutoConfig.for_model(**LLAMA | {"head_dim": 64, "rope_parameters": dict(rope)})
    if kind == "default":
        want = 77.0 ** -(torch.arange(0, 64, 2, device=device) / 64)
    else:
        want, scale = ROPE_INIT_FUNCTIONS[kind](theirs, "cpu")
        assert new.rope_scale == scale
    torch.testing.assert_close(
        torch.tensor(new.inv_freq, device=device), want.to(device), rtol=1e-6, atol=0
    )
    for key in ("rope_type", "type"):  # transformers < 5, and before 4.43
        scaling = {k: v for k, v in rope.items() if k not in ("rope_theta", "rope_type")} | {
            key: kind
        }
        old = model_config(
            LLAMA
            | {
                "head_dim": 64,
                "rope_theta": rope["rope_theta"],
                "rope_scaling": None if kind == "default" else scaling,
            }
        )
        assert old.inv_freq == new.inv_freq
    if kind == "llama3":
        plain = model_config(LLAMA | {"head_dim": 64, "rope_theta": 5e5})
        # kept, blended and divided waves
        assert len({round(a / b, 3) for a, b in zip(new.inv_freq, plain.inv_freq, strict=True)}) > 2


@pytest.mark.parametrize("change", YARNS, ids=str)
def test_yarn(change, device):
    rope = ROPES["yarn"] | change
    ours = model_config(LLAMA | {"head_dim": 64, "rope_parameters": rope})
    want, scale = ROPE_INIT_FUNCTIONS["yarn"](
        AutoConfig.for_model(**LLAMA | {"head_dim": 64, "rope_parameters": dict(rope)}), "cpu"
    )
    torch.testing.assert_close(
        torch.tensor(ours.inv_freq, device=device), want.to(device), rtol=1e-6, atol=0
    )
    assert ours.rope_scale == pytest.approx(scale, rel=1e-12)


def test_ropes_of_layers():
    few = LLAMA | {"num_key_value_heads": 2}
    assert model_config(few | {"model_type": "smollm3"}).ropes == (0, 0, 0, -1)
    assert model_config(few | {"model_type": "smollm3", "no_rope_layers": [0, 1, 1, 0]}).ropes == (
        -1,
        0,
        0,
        -1,
    )
    gemma = few | {"model_type": "gemma3_text", "sliding_window_pattern": 3}
    old = model_config(
        gemma
        | {
            "rope_theta": 500.0,
            "rope_local_base_freq": 20.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        }
    )
    assert old.ropes == (1, 1, 0, 1)
    assert old.inv_freq[1] == pytest.approx(500.0 ** (-2 / 256) / 8)
    assert old.local_inv_freq[1] == pytest.approx(20.0 ** (-2 / 256))
    nested = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 500.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
    }
    assert model_config(gemma | {"rope_parameters": nested}) == old
    theirs = AutoConfig.for_model(
        **gemma
        | {
            "rope_theta": 500.0,
            "rope_local_base_freq": 20.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        }
    )
    assert model_config(theirs.to_dict()) == old
    partial = model_config(LLAMA | {"model_type": "phi3", "partial_rotary_factor": 0.5})
    assert len(partial.inv_freq) == 2


@pytest.mark.parametrize(
    "options, windows",
    [
        ({"model_type": "mistral", "sliding_window": 7}, (7, 7, 7, 7)),
        ({"model_type": "mistral", "sliding_window": None}, (0, 0, 0, 0)),
        ({"model_type": "mistral"}, (4096,) * 4),
        ({"model_type": "llama", "sliding_window": 7}, (0, 0, 0, 0)),
        ({"model_type": "qwen2", "sliding_window": 7, "use_sliding_window": False}, (0, 0, 0, 0)),
        (
            {
                "model_type": "qwen2",
                "sliding_window": 7,
                "use_sliding_window": True,
                "max_window_layers": 3,
            },
            (0, 0, 0, 7),
        ),
        (
            {
                "model_type": "qwen3",
                "sliding_window": 7,
                "use_sliding_window": True,
                "layer_types": [
                    "sliding_attention",
                    "full_attention",
                    "sliding_attention",
                    "full_attention",
                ],
            },
            (7, 0, 7, 0),
        ),
        ({"model_type": "phi3", "sliding_window": 7}, (7, 7, 7, 7)),
        ({"model_type": "smollm3", "sliding_window": 7}, (0, 0, 0, 0)),
        (
            {
                "model_type": "smollm3",
                "sliding_window": 7,
                "use_sliding_window": True,
                "no_rope_layer_interval": 2,
            },
            (0, 7, 0, 7),
        ),
        ({"model_type": "gemma2", "sliding_window": 7}, (7, 0, 7, 0)),
        (
            {"model_type": "gemma3_text", "sliding_window": 7, "sliding_window_pattern": 3},
            (7, 7, 0, 7),
        ),
    ],
)
def test_windows(options, windows):
    assert model_config(LLAMA | {"num_key_value_heads": 2} | options).windows == windows


def test_token_ids_come_from_both_files(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps(LLAMA | {"eos_token_id": [5, 6], "bos_token_id": None})
    )
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"eos_token_id": 7, "bos_token_id": 4, "pad_token_id": 3})
    )
    config = model_config(tmp_path)
    assert (config.bos_token_id, config.eos_token_ids, config.pad_token_id) == (4, (5, 6, 7), 3)
    assert config.raw_generation == {"eos_token_id": 7, "bos_token_id": 4, "pad_token_id": 3}
    assert (
        model_config(LLAMA | {"architectures": ["LlamaForSequenceClassification"]}).family.name
        == "Llama"
    )


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"model_type": "gptj"},
            f"unknown model_type 'gptj'; known: {', '.join(FAMILIES)}",
        ),
        ({"model_type": "gpt2"}, "expected a positive whole number for 'n_layer', got None"),
        (GPT2 | {"n_embd": 30}, "n_embd 30 is not a multiple of n_head 4"),
        (
            GPT2 | {"activation_function": "relu"},
            "expected activation_function 'gelu_new', got 'relu'",
        ),
        (GPT2 | {"add_cross_attention": True}, "add_cross_attention is not implemented"),
        (
            GPT2 | {"scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx is not implemented",
        ),
        (GPT2 | {"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn is not implemented"),
        ({"model_type": None}, "unknown model_type None"),
        ({"vocab_size": None}, "expected a positive whole number for 'vocab_size', got None"),
        ({"hidden_size": "32"}, "expected a positive whole number for 'hidden_size', got '32'"),
        (
            {"num_key_value_heads": 3},
            "num_attention_heads 4 is not a multiple of num_key_value_heads 3",
        ),
        ({"num_attention_heads": 5}, "hidden_size 32 is not a multiple"),
        ({"head_dim": 7}, "expected an even head_dim"),
        ({"hidden_act": "gelu"}, "expected hidden_act 'silu', got 'gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantised weights"),
        (
            {"rope_scaling": {"type": "longrope", "factor": 2.0}},
            "supported kinds: default, linear, dynamic, yarn, llama3",
        ),
        (
            {
                "model_type": "phi3",
                "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.0]},
            },
            r"RoPE \{'type': 'longrope'\} is not implemented for Phi3",
        ),
        (
            {"model_type": "phi3", "rope_scaling": {"type": "yarn", "factor": 2.0}},
            "not implemented for Phi3; supported kinds: default",
        ),
        (
            {"model_type": "phi3", "partial_rotary_factor": 0.4},
            "leaves an even number of a head's 8 values",
        ),
        (
            {"model_type": "smollm3", "no_rope_layers": [1, 1, 0]},
            "expected no_rope_layers for 4 layers",
        ),
        (
            {"model_type": "gemma2", "hidden_activation": "silu"},
            "expected hidden_activation 'gelu_pytorch_tanh', got 'silu'",
        ),
        (
            {"model_type": "gemma2", "use_bidirectional_attention": True},
            "use_bidirectional_attention",
        ),
        (
            {"model_type": "gemma2", "final_logit_softcapping": -1.0},
            "expected a number above 0 for 'final_logit_softcapping', got -1.0",
        ),
        (
            {"model_type": "gemma3_text", "attn_logit_softcapping": 50.0},
            "attn_logit_softcapping is not implemented for Gemma 3",
        ),
        (
            {"model_type": "gemma3_text", "rope_scaling": {"type": "yarn", "factor": 2.0}},
            "scale attention alike in all layers",
        ),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 2.0}},
            "needs low_freq_factor, high_freq_factor",
        ),
        ({"partial_rotary_factor": 0.5}, "on whole heads"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "alike in all layers"),
        (
            {
                "model_type": "qwen3",
                "num_key_value_heads": 2,
                "use_sliding_window": True,
                "layer_types": ["full_attention"],
            },
            "expected 4 layer_types",
        ),
        (
            {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": -1},
            "expected a positive sliding_window",
        ),
    ],
)
def test_refuses_what_it_does_not_support(change, message):
    with pytest.raises(ValueError, match=message):
        model_config(LLAMA | change)


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected a model directory with a config.json"):
        model_config(tmp_path)
    for text, message in (
        ("{", "expected a JSON object: "),
        ("[1]", "expected a JSON object, got list"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=f"config.json: {message}"):
            model_config(tmp_path)
