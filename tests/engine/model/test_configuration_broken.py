"""A config.json that is broken, whatever is wrong with it, ends in one message that names the file;
nothing of its size is allocated."""

import json
import shutil
import time
import tracemalloc

import pytest

from fusedrl.engine.cli.main import main
from fusedrl.engine.model.configuration import model_config
from fusedrl.engine.model.families import FAMILIES
from fusedrl.engine.model.weights import load_config, load_decoder

pytestmark = pytest.mark.cpu_only("configurations")

HUGE = 10**30
DEEP = "[" * 100_000 + "]" * 100_000
CHANGES = {  # of the tiny Llama's
    "model_type null": {"model_type": None},
    "model_type an object": {"model_type": {"a": 1}},
    "model_type a list": {"model_type": ["llama"]},
    "model_type unknown": {"model_type": "llama\u202e" * 50},
    "layers a text": {"num_hidden_layers": "2"},
    "layers a fraction": {"num_hidden_layers": 2.5},
    "layers negative": {"num_hidden_layers": -2},
    "layers none": {"num_hidden_layers": 0},
    "layers absurd": {"num_hidden_layers": HUGE},
    "layers a billion": {"num_hidden_layers": 10**9},
    "layers true": {"num_hidden_layers": True},
    "hidden_size NaN": {"hidden_size": float("nan")},
    "hidden_size absurd": {"hidden_size": HUGE},
    "hidden_size missing": {"hidden_size": ...},
    "vocab_size infinite": {"vocab_size": float("inf")},
    "vocab_size a list": {"vocab_size": [32]},
    "heads that do not divide": {"num_attention_heads": 5, "head_dim": None},
    "kv heads that do not divide": {"num_key_value_heads": 3},
    "head_dim odd": {"head_dim": 7},
    "intermediate_size missing": {"intermediate_size": ...},
    "positions a text": {"max_position_embeddings": "many"},
    "eps a text": {"rms_norm_eps": "1e-5"},
    "eps NaN": {"rms_norm_eps": float("nan")},
    "eps infinite": {"rms_norm_eps": float("inf")},
    "eps negative": {"rms_norm_eps": -1e-5},
    "eps an object": {"rms_norm_eps": {}},
    "range a list": {"initializer_range": [0.02]},
    "range NaN": {"initializer_range": float("nan")},
    "tied a text": {"tie_word_embeddings": "false"},
    "bias a number": {"attention_bias": 3},
    "bias a list": {"mlp_bias": []},
    "theta a text": {"rope_theta": "10000"},
    "theta negative": {"rope_theta": -1.0},
    "theta NaN": {"rope_theta": float("nan")},
    "theta absurd": {"rope_theta": HUGE},
    "scaling a text": {"rope_scaling": "linear"},
    "scaling a list": {"rope_scaling": [1, 2]},
    "scaling of a kind that is none": {"rope_scaling": {"rope_type": ["linear"]}},
    "scaling by a text": {"rope_scaling": {"rope_type": "linear", "factor": "2"}},
    "scaling by 0": {"rope_scaling": {"rope_type": "linear", "factor": 0}},
    "scaling by nothing": {"rope_scaling": {"rope_type": "linear"}},
    "scaling by NaN": {"rope_scaling": {"rope_type": "yarn", "factor": float("nan")}},
    "yarn of theta 1": {"rope_theta": 1.0, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
    "yarn within an object": {"rope_scaling": {"rope_type": "yarn", "beta_fast": {"a": 1}}},
    "llama3 of equal factors": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 1.0,
        }
    },
    "activation a list": {"hidden_act": ["silu"]},
    "activation a number": {"hidden_act": 3},
    "eos a text": {"eos_token_id": "2"},
    "eos nested": {"eos_token_id": [[2]]},
    "eos a fraction": {"eos_token_id": 2.0},
    "eos absurd": {"eos_token_id": HUGE},
    "bos an object": {"bos_token_id": {}},
    "pad true": {"pad_token_id": True},
    "quantised": {"quantization_config": {"bits": 4}},
}
FILES = {  # whole files
    "empty": b"",
    "a list": b"[]",
    "null": b"null",
    "a number": b"1e999",
    "cut": b'{"model_type": "llama", "hidden',
    "no UTF-8": b'{"model_type": "\xff\xfe"}',
    "UTF-16": '{"model_type": "llama"}'.encode("utf-16"),
    "nested": DEEP.encode(),
    "nested within": b'{"model_type": "llama", "x": ' + DEEP.encode() + b"}",
    "a number of 10,000 digits": b'{"model_type": "llama", "hidden_size": ' + b"9" * 10_000 + b"}",
    "NUL": b"\0" * 100,
}
OF_FAMILIES = {
    "gemma3_text": [
        {"sliding_window_pattern": 0, "layer_types": None},
        {"sliding_window_pattern": "6", "layer_types": None},
        {"layer_types": 5},
        {"layer_types": [["full_attention"]]},
        {"layer_types": ["other", "full_attention"]},
        {"sliding_window": 2.5},
        {"query_pre_attn_scalar": float("nan")},
        {"final_logit_softcapping": "30"},
    ],
    "qwen2": [
        {"use_sliding_window": "no"},
        {"use_sliding_window": True, "max_window_layers": "1"},
        {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": HUGE},
    ],
    "smollm3": [
        {"no_rope_layers": 3},
        {"no_rope_layers": ["a", "b"]},
        {"no_rope_layers": [1]},
        {"no_rope_layers": None, "no_rope_layer_interval": 0},
        {"no_rope_layers": None, "no_rope_layer_interval": "4"},
    ],
    "gpt2": [{"scale_attn_weights": "yes"}, {"n_inner": 0}, {"n_positions": HUGE}],
    "gpt_neox": [{"use_parallel_residual": "yes"}, {"rotary_pct": {}}, {"rotary_pct": 7}],
    "phi3": [{"partial_rotary_factor": "half"}, {"partial_rotary_factor": 0.01}],
}


@pytest.fixture(scope="module")
def directory(tiny_model, tmp_path_factory):
    made = tmp_path_factory.mktemp("broken") / "model"
    shutil.copytree(tiny_model, made)
    return made


def changed(directory, change, tiny_model):
    raw = json.loads((tiny_model / "config.json").read_text()) | change
    raw = {key: value for key, value in raw.items() if value is not ...}
    (directory / "config.json").write_text(json.dumps(raw))


def refused(directory):
    """Model and command refuse it in a moment, with little memory, and name the file."""
    file = str(directory / "config.json")
    tracemalloc.start()
    began = time.monotonic()
    try:
        with pytest.raises(ValueError) as told:
            load_config(directory)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert str(told.value).startswith(file), told.value
    assert len(str(told.value)) < 900, told.value
    assert peak < 100e6
    assert time.monotonic() - began < 20  # on a busy machine
    return str(told.value)


@pytest.mark.parametrize("what", CHANGES)
def test_an_entry_that_is_wrong(directory, tiny_model, what):
    changed(directory, CHANGES[what], tiny_model)
    refused(directory)


@pytest.mark.parametrize("what", FILES)
def test_a_file_that_is_none(directory, what):
    (directory / "config.json").write_bytes(FILES[what])
    refused(directory)


@pytest.mark.parametrize(
    ("family", "change"), [(f, change) for f, all_of in OF_FAMILIES.items() for change in all_of]
)
def test_entries_of_single_families(directory, tiny_model, family, change):
    ours = json.loads((tiny_model / "config.json").read_text()) | {"model_type": family}
    theirs = {FAMILIES[family].keys.get(key, key): value for key, value in ours.items()}
    theirs |= {"hidden_act": None, FAMILIES[family].keys.get("hidden_act", "hidden_act"): None}
    (directory / "config.json").write_text(json.dumps(theirs))
    assert model_config(directory).model_type == family  # the change alone is what is refused
    (directory / "config.json").write_text(json.dumps(theirs | change))
    refused(directory)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vocab_size": 2_000_000_000}, "describes a model of at least"),
        ({"num_hidden_layers": 10_000}, "describes a model of at least"),
        ({"hidden_size": 64}, "the tensors do not fit its config.json"),
    ],
)
def test_sizes_that_the_weights_cannot_have_take_no_memory(directory, tiny_model, change, said):
    changed(directory, change, tiny_model)
    with pytest.raises(ValueError, match=said) as told:
        load_decoder(directory)
    assert str(directory) in str(told.value)


@pytest.mark.parametrize(
    "change",
    [
        {"eos_token_id": "2"},
        {"eos_token_id": [[1]]},
        {"bos_token_id": 1.5},
        {"pad_token_id": {"a": 1}},
    ],
)
def test_the_file_beside_it_is_named(directory, tiny_model, change):
    changed(directory, {"bos_token_id": None, "pad_token_id": None}, tiny_model)
    beside = directory / "generation_config.json"
    beside.write_text(json.dumps(change))
    try:
        with pytest.raises(ValueError) as told:
            load_config(directory)
        assert str(told.value).startswith(str(beside))
    finally:
        beside.unlink()


@pytest.mark.parametrize("what", ["eps a text", "scaling a text", "model_type an object"])
def test_the_command_line_says_it_in_one_line(directory, tiny_model, what, capsys):
    changed(directory, CHANGES[what], tiny_model)
    assert main(["generate", "--model", str(directory), "--prompt", "w1"]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"fusedrl: error: {directory / 'config.json'}: expected") or (
        "unknown model_type" in told
    )
    assert "Traceback" not in told


def test_what_is_no_list_of_architectures_is_no_reward_model(directory, tiny_model):
    for value in (5, "LlamaForSequenceClassification", {"a": 1}, [None], None):
        changed(directory, {"architectures": value}, tiny_model)
        load_decoder(directory)
