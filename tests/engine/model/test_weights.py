import contextlib
import errno
import json
import os
import resource
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support.tiny import write_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fusedrl.engine import HybridActor, LoRAConfig
from fusedrl.engine.model import weights as weights_module
from fusedrl.engine.model.configuration import model_config
from fusedrl.engine.model.decoder import Decoder
from fusedrl.engine.model.directories import resolve_directory
from fusedrl.engine.model.heads import (
    VALUE_HEAD_FILE,
    RewardModel,
    save_reward_model,
    save_value_head,
)
from fusedrl.engine.model.weights import (
    hf_views,
    load_decoder,
    load_tokenizer,
    replacing,
    save_pretrained,
)
from fusedrl.engine.policy.critic import SeparateCritic

SMALL = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
KINDS = {
    "tied": {"model_type": "qwen3", "head_dim": 8, "tie_word_embeddings": True},
    "untied": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "qwen2": {"model_type": "qwen2"},
    "mistral": {"model_type": "mistral"},
    "phi3": {"model_type": "phi3", "sliding_window": 9, "partial_rotary_factor": 0.7},
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
    "gpt_neox": {"model_type": "gpt_neox", "rotary_pct": 0.7, "tie_word_embeddings": False},
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 24,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "n_inner": 20,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}


@pytest.fixture
def saved(tmp_path):
    """A directory as transformers writes it."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**SMALL | KINDS["tied"])).save_pretrained(
        tmp_path / "model"
    )
    return tmp_path / "model"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 3000])
def test_round_trip_is_bitwise_and_transformers_reads_it(
    tmp_path, kind, dtype, max_shard_bytes, device
):
    decoder = Decoder.random(model_config(SMALL | KINDS[kind]), 3, dtype=dtype, device=device)
    save_pretrained(decoder, tmp_path / "a", max_shard_bytes=max_shard_bytes)
    again = load_decoder(tmp_path / "a", dtype=dtype, device=device)
    assert all(
        torch.equal(p, q) for p, q in zip(decoder.parameters(), again.parameters(), strict=True)
    )
    save_pretrained(again, tmp_path / "b", max_shard_bytes=max_shard_bytes)
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert ("model.safetensors" in files) == (max_shard_bytes > 10**6)
    assert ("model.safetensors.index.json" in files) == (max_shard_bytes < 10**6)
    assert files == sorted(p.name for p in (tmp_path / "b").iterdir())
    assert all(
        (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        for name in files
    )
    peer, report = AutoModelForCausalLM.from_pretrained(tmp_path / "a", output_loading_info=True)
    peer = peer.to(device)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert peer.dtype == dtype
    for name, view in hf_views(decoder).items():
        assert torch.equal(
            peer.state_dict()[name.replace("embed_out", "lm_head")].view(view.shape), view
        ), name
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]  # and no temporary


@pytest.mark.parametrize("kind", KINDS)
def test_reads_what_transformers_writes(tmp_path, kind, device):
    torch.manual_seed(0)
    peer = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SMALL | KINDS[kind])).to(device)
    peer.save_pretrained(tmp_path, max_shard_size="5KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    ours = load_decoder(tmp_path, dtype="float32", device=device)
    state = peer.state_dict()
    views = hf_views(ours)
    assert len(state) == len(views) + ours.config.tie_embeddings
    assert all(
        torch.equal(state[name.replace("embed_out", "lm_head")].view(view.shape), view)
        for name, view in views.items()
    )
    assert all(p.requires_grad and p.is_leaf for p in ours.parameters())


def test_dtypes(saved, device):
    assert load_decoder(saved, dtype="float32", device=device).dtype == torch.float32
    assert load_decoder(saved, dtype="bfloat16", device=device).embedding.dtype == torch.bfloat16
    assert torch.equal(
        load_decoder(saved, dtype="bfloat16", device=device).embedding,
        load_decoder(saved, dtype="float32", device=device).embedding.bfloat16(),
    )
    with pytest.raises(ValueError, match="expected dtype auto, float32"):
        load_decoder(saved, dtype="int8", device=device)


def test_views_share_the_fused_storage(saved, device):
    decoder = load_decoder(saved, dtype="float32", device=device)
    views = hf_views(decoder)
    with torch.no_grad():
        views["model.layers.1.self_attn.k_proj.weight"].fill_(7.0)
        views["model.layers.0.mlp.up_proj.weight"].fill_(8.0)
    assert (decoder.layers[1].qkv_proj[32:48] == 7).all()
    assert (decoder.layers[0].gate_up_proj[20:] == 8).all()
    assert not any(view.requires_grad for view in views.values())


def test_everything_travels(tmp_path, shared, device):
    source = shared / "models" / "stories260k"
    copy = tmp_path / "source"
    shutil.copytree(source, copy)
    os.chmod(copy, 0o755)
    (copy / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [2, 5], "temperature": 0.7, "do_sample": True})
    )
    tokenizer = AutoTokenizer.from_pretrained(copy)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    decoder = load_decoder(copy, dtype="float32", device=device)
    save_pretrained(decoder, tmp_path / "out", tokenizer=tokenizer)
    assert (
        json.loads((tmp_path / "out" / "generation_config.json").read_text())["temperature"] == 0.7
    )
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    )
    back = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert back("Once upon a time").input_ids == tokenizer("Once upon a time").input_ids
    assert back.chat_template == tokenizer.chat_template
    stored, original = (
        load_file(tmp_path / "out" / "model.safetensors"),
        load_file(source / "model.safetensors"),
    )
    assert stored.keys() == original.keys()
    assert all(torch.equal(stored[name], original[name]) for name in stored)


def test_a_second_copy_of_a_tied_head_is_ignored(saved, device):
    state = load_file(saved / "model.safetensors")
    more = {
        "lm_head.weight": torch.ones(40, 24, device=device),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4, device=device),
    }
    save_file(state | more, saved / "model.safetensors")
    assert torch.equal(
        load_decoder(saved, dtype="float32", device=device).head_weight.cpu(),
        state["model.embed_tokens.weight"],
    )


# ---- bad input -----------------------------------------------------------------------------------
def test_directories_without_weights(saved, tmp_path, device):
    (saved / "model.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError,
        match=r"has no weights: expected model.safetensors or model.safetensors.index.json",
    ):
        load_decoder(saved, dtype="float32", device=device)
    (saved / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(
        FileNotFoundError, match=r"pickled weights only.*refused; convert them.*save_pretrained"
    ):
        load_decoder(saved, dtype="float32", device=device)
    with pytest.raises(FileNotFoundError, match="expected a model directory or a Hugging Face id"):
        load_decoder(tmp_path / "nowhere", dtype="float32", device=device)


def test_tensors_that_do_not_fit_are_listed(saved, device):
    state = load_file(saved / "model.safetensors")
    state["model.layers.0.input_layernorm.bias"] = torch.zeros(24, device=device)
    state["model.norm.weight"] = torch.ones(23, device=device)
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, saved / "model.safetensors")
    with pytest.raises(ValueError) as raised:
        load_decoder(saved, dtype="float32", device=device)
    for line in (
        "missing: model.layers.1.mlp.up_proj.weight",
        "unexpected: model.layers.0.input_layernorm.bias",
        "shape of model.norm.weight: expected [24], got [23]",
    ):
        assert line in str(raised.value)


@pytest.mark.parametrize(
    "shard",
    [
        "../model.safetensors",
        "/etc/passwd",
        "sub/model.safetensors",
        "..",
        "",
        "x" * 256,
        "é" * 128,
    ],
)
def test_weight_maps_that_leave_the_directory(saved, shard, device):
    (saved / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model.norm.weight": shard}})
    )
    with pytest.raises(ValueError, match="expected the name of a file in this directory"):
        load_decoder(saved, dtype="float32", device=device)


def test_links_and_special_files_in_a_weight_map(saved, tmp_path, device):
    index = saved / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "shard.safetensors"}}))
    shutil.copy(saved / "model.safetensors", tmp_path / "outside.safetensors")
    (saved / "shard.safetensors").symlink_to(tmp_path / "outside.safetensors")
    with pytest.raises(ValueError, match="a link out of the directory or a special file"):
        load_decoder(saved, dtype="float32", device=device)
    (saved / "shard.safetensors").unlink()
    os.mkfifo(saved / "shard.safetensors")
    with pytest.raises(ValueError, match=r"shard\.safetensors: expected a regular file"):
        load_decoder(saved, dtype="float32", device=device)
    (saved / "shard.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="incomplete"):
        load_decoder(saved, dtype="float32", device=device)
    index.write_text(json.dumps({"weight_map": {"absent": "model.safetensors"}}))
    with pytest.raises(ValueError, match="tensors that their file does not hold: absent"):
        load_decoder(saved, dtype="float32", device=device)
    index.write_text(json.dumps({"weight_map": [1]}))
    with pytest.raises(ValueError, match="expected a weight_map"):
        load_decoder(saved, dtype="float32", device=device)


def test_the_links_of_the_hub_cache_are_followed(saved, tmp_path, device):
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "abc", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in saved.iterdir():
        shutil.copy(path, blobs / f"hash-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/hash-{path.name}")
    (blobs / "index").write_text(
        json.dumps(
            {
                "weight_map": dict.fromkeys(
                    load_file(saved / "model.safetensors"), "model.safetensors"
                )
            }
        )
    )
    (snapshot / "model.safetensors.index.json").symlink_to("../../blobs/index")
    assert torch.equal(
        load_decoder(snapshot, dtype="float32", device=device).embedding,
        load_decoder(saved, dtype="float32", device=device).embedding,
    )


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.bool, torch.complex64], ids=str)
def test_weights_that_are_no_floats_are_refused(saved, dtype, device):
    """What they stand for is not known: scales of quantised weights, or another file."""
    path = saved / "model.safetensors"
    tensors = {name: (100 * t).to(dtype) for name, t in load_file(path).items()}
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"expected F64, F32, F16, BF16, got (I32|I8|BOOL|C64)"):
        load_decoder(saved, device=device)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json", "x.json"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_pipes_and_devices_in_a_directory_are_named(saved, name, kind, device):
    (saved / name).unlink(missing_ok=True)
    os.mkfifo(saved / name) if kind == "pipe" else (saved / name).symlink_to("/dev/zero")
    for load in (load_decoder, load_tokenizer):
        with pytest.raises(ValueError, match=rf"{name}: expected a regular file"):
            load(saved)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_files(saved, keep, device):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(
        ValueError, match=r"model.safetensors: not a whole safetensors file .*truncated or damaged"
    ):
        load_decoder(saved, dtype="float32", device=device)


def test_auto_map_is_ignored_with_a_warning(saved, tmp_path, device):
    raw = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(
        json.dumps(raw | {"auto_map": {"AutoModelForCausalLM": "evil.Model"}})
    )
    with pytest.warns(UserWarning, match="auto_map is ignored"):
        decoder = load_decoder(saved, dtype="float32", device=device)
    save_pretrained(decoder, tmp_path / "out")
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_ids_go_to_the_hub_and_say_so_when_it_is_away(monkeypatch, saved, device):
    import huggingface_hub

    asked = []

    def download(name, *, allow_patterns):
        asked.append((name, allow_patterns))
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(
        FileNotFoundError,
        match=r"'owner/name' is no directory here, and the Hugging Face hub cannot be reached",
    ):
        load_decoder("owner/name", dtype="float32", device=device)
    assert asked[0][0] == "owner/name"
    assert "*.safetensors" in asked[0][1]
    assert not any("bin" in pattern for pattern in asked[0][1])
    for path in ("./owner/name", "a/b/c", "../x", "/nowhere/x"):
        with pytest.raises(FileNotFoundError):
            resolve_directory(path)
    assert len(asked) == 1

    def local(name, *, local_files_only):
        assert local_files_only
        raise FileNotFoundError(name)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", local)
    with pytest.raises(FileNotFoundError, match=r"^nosuch does not exist"):
        load_decoder("nosuch", dtype="float32", device=device)
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, allow_patterns: str(saved)
    )
    assert resolve_directory("owner/name") == saved


# ---- saving over and dying in between ------------------------------------------------------------
def test_saving_replaces_a_model_and_nothing_else(tmp_path, device):
    decoder = Decoder.random(model_config(SMALL | KINDS["tied"]), 0, device=device)
    out = tmp_path / "out"
    save_pretrained(decoder, out, max_shard_bytes=3000)
    save_pretrained(decoder, out)
    # no shard of the earlier save
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "model.safetensors"]
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"thesis.txt"):
        save_pretrained(decoder, out)
    assert (out / "thesis.txt").read_text() == "mine"
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="it is a file"):
        save_pretrained(decoder, tmp_path / "file")
    (tmp_path / "empty").mkdir()
    save_pretrained(decoder, tmp_path / "empty")
    assert sorted(os.listdir(tmp_path)) == ["empty", "file", "out"]


def test_a_save_that_fails_leaves_the_old_model(tmp_path, monkeypatch, device):
    decoder = Decoder.random(model_config(SMALL | KINDS["tied"]), 0, device=device)
    save_pretrained(decoder, tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    with torch.no_grad():
        decoder.norm.fill_(3.0)

    def no_space(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights_module, "save_file", no_space)
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(decoder, tmp_path / "out")
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(decoder, tmp_path / "new")
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


@contextlib.contextmanager
def no_file_above(limit):
    """A disk that is full after so many bytes of a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("limit", [0, 200, 1_000, 2_500])
def test_a_full_disk_names_the_target_and_the_remedy(tmp_path, limit, device):
    """Everything that is saved, whichever of its files does not fit, and whichever library
    writes it."""
    actor = HybridActor.from_pretrained(
        write_model(tmp_path / "model"), value_head=True, device=device
    )
    actor.add_adapter(LoRAConfig(rank=4))
    decoder, head, tokenizer = actor.decoder, actor.value_head, actor.tokenizer
    beside = tmp_path / "beside"
    beside.mkdir()
    saves = {
        tmp_path / "actor": actor.save_pretrained,
        tmp_path / "adapter": actor.save_adapter,
        tmp_path / "bare": lambda path: save_pretrained(decoder, path),
        tmp_path / "critic": lambda path: SeparateCritic(decoder, head).save_pretrained(path),
        tmp_path / "reward": lambda path: save_reward_model(
            RewardModel.from_decoder(decoder), path, tokenizer=tokenizer
        ),
    }
    if limit == 0:
        saves[beside / VALUE_HEAD_FILE] = lambda path: save_value_head(head, beside)
    for path, save in saves.items():
        with (
            no_file_above(limit),
            pytest.raises(OSError, match="bytes are free; free some") as told,
        ):
            save(path)
        assert (told.value.errno, told.value.filename) == (errno.EFBIG, str(path))
    assert sorted(os.listdir(tmp_path)) == ["beside", "model"]
    assert not os.listdir(beside)
    for path, save in saves.items():
        save(path)


def test_a_process_killed_in_mid_save_leaves_no_half_model(tmp_path):
    program = (
        "import os, signal, sys\nfrom fusedrl.engine.model.weights import replacing\nwith "
        "replacing(sys.argv[1]) as directory:\n"
        "    (directory / 'config.json').write_text('half')\n    os.kill(os.getpid(), "
        "signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path / "out")], check=False)
    assert killed.returncode == -9
    assert not (tmp_path / "out").exists()
    with replacing(tmp_path / "out") as directory:
        (directory / "config.json").write_text("whole")
    assert (tmp_path / "out" / "config.json").read_text() == "whole"


def test_both_names_of_gpt_neox_heads(tmp_path, device):
    decoder = Decoder.random(model_config(SMALL | KINDS["gpt_neox"]), 3, device=device)
    save_pretrained(decoder, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    assert "embed_out.weight" in state, "what transformers 4 reads"
    assert state["gpt_neox.layers.0.attention.query_key_value.weight"].shape == (72, 24)
    state["lm_head.weight"] = state.pop("embed_out.weight")
    masks = {
        f"gpt_neox.layers.0.attention.{name}": torch.ones(1, 1, 64, 64, device=device)
        for name in ("bias", "masked_bias", "rotary_emb.inv_freq")
    }
    save_file(state | masks, tmp_path / "model.safetensors")
    assert all(
        torch.equal(p, q)
        for p, q in zip(
            decoder.parameters(),
            load_decoder(tmp_path, dtype="float32", device=device).parameters(),
            strict=True,
        )
    )
    state["gpt_neox.layers.1.attention.query_key_value.bias"] = torch.zeros(71, device=device)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(
        ValueError,
        match=r"shape of gpt_neox.layers.1.attention.query_key_value.bias: expected \[72\], got "
        r"\[71\]",
    ):
        load_decoder(tmp_path, dtype="float32", device=device)
