import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification

from fusedrl.engine.base.packing import PackedBatch
from fusedrl.engine.model.configuration import model_config
from fusedrl.engine.model.decoder import Decoder
from fusedrl.engine.model.heads import (
    RewardHead,
    RewardModel,
    ValueHead,
    load_reward_model,
    load_value_head,
    save_reward_model,
    save_value_head,
)
from fusedrl.engine.model.weights import load_decoder

SMALL = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
KINDS = {
    "tied": {"model_type": "qwen3", "head_dim": 8, "tie_word_embeddings": True},
    "untied": {"model_type": "llama", "tie_word_embeddings": False},
    "mistral": {"model_type": "mistral", "sliding_window": 5},
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
SEQUENCES = [[5, 6, 7, 8, 9, 10, 11], [3], [4, 4, 9]]


@pytest.fixture
def batch():
    return PackedBatch.from_sequences([(s, []) for s in SEQUENCES])


def padded(device):
    ids = torch.zeros(3, 7, dtype=torch.int64, device=device)
    for row, s in zip(ids, SEQUENCES, strict=True):
        row[: len(s)] = torch.tensor(s, device=device)
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def test_value_head_starts_at_zero_and_speaks_float32(tmp_path, device):
    head = ValueHead(24)
    hidden = torch.randn(5, 24, device=device)
    assert torch.equal(head(hidden), torch.zeros(5, device=device))
    with torch.no_grad():
        head.weight.normal_()
        head.bias.fill_(0.5)
    torch.testing.assert_close(head(hidden), hidden @ head.weight[0] + 0.5)
    assert head(hidden.bfloat16()).dtype == torch.float32
    assert head(hidden[:0]).shape == (0,)
    save_value_head(head, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["value_head.safetensors"]
    assert torch.equal(load_value_head(tmp_path, 24)(hidden), head(hidden))
    with pytest.raises(ValueError, match=r"expected weight \[1, 25\], got \[1, 24\]"):
        load_value_head(tmp_path, 25)
    save_file({"weight": torch.zeros(1, 24, device=device)}, tmp_path / "value_head.safetensors")
    with pytest.raises(ValueError, match=r"expected bias \[1\], got none"):
        load_value_head(tmp_path, 24)
    with pytest.raises(FileNotFoundError, match="expected a value head at"):
        load_value_head(tmp_path / "x", 24)


@pytest.mark.parametrize("strict", [False, True])
def test_a_value_head_says_the_same_in_any_unit(strict, tmp_path, device):
    """And is saved in the rewards' own, with its level."""
    torch.manual_seed(0)
    head, hidden = ValueHead(24, device=device), torch.randn(50, 24, device=device)
    with torch.no_grad():
        head.weight.normal_()
        head.bias.fill_(0.5)
    before = head(hidden, strict=strict)
    weight = head.weight.detach().clone()
    head.count_in(4.0)
    assert torch.equal(head.weight, weight / 4)
    assert torch.equal(head(hidden, strict=strict), before)
    for unit in (1e-5, 3e4, 0.3):
        head.count_in(unit)
        torch.testing.assert_close(head(hidden, strict=strict), before)
    head.raise_by(100.0)
    raised = head(hidden, strict=strict)
    torch.testing.assert_close(raised, before + 100)
    assert [name for name, _ in head.named_parameters()] == ["weight", "bias"]
    save_value_head(head, tmp_path)
    assert load_file(tmp_path / "value_head.safetensors").keys() == {"weight", "bias"}
    loaded = load_value_head(tmp_path, 24, device=device)
    assert (loaded.level.item(), loaded.unit.item()) == (0.0, 1.0)
    torch.testing.assert_close(loaded(hidden, strict=strict), raised)
    restored = ValueHead(24, device=device)
    restored.load_state_dict(dict(head.named_parameters()), strict=False)
    restored.restore(head.level.item(), head.unit.item())
    assert torch.equal(restored(hidden, strict=strict), raised)


def test_reward_head_initialisation():
    weight = RewardHead(4095, seed=1).weight
    assert abs(weight.std().item() * 64 - 1) < 0.05
    assert torch.equal(weight, RewardHead(4095, seed=1).weight)
    assert not torch.equal(weight, RewardHead(4095, seed=2).weight)


def test_scores_are_read_at_the_last_token(batch, device):
    model = RewardModel.from_decoder(
        Decoder.random(model_config(SMALL | KINDS["tied"]), 0, device=device)
    )
    scores = model(batch)
    assert scores.dtype == torch.float32
    for b, sequence in enumerate(SEQUENCES):
        alone = PackedBatch.from_sequences([(sequence, [])])
        hidden = model.decoder(alone.token_ids, alone.positions, alone.cu_seqlens, alone.max_length)
        torch.testing.assert_close(
            scores[b], (hidden[-1] * model.head.weight[0]).sum(), rtol=1e-5, atol=1e-5
        )
    model.shift = 0.75
    torch.testing.assert_close(model(batch), scores - 0.75)
    scores.sum().backward()
    assert model.head.weight.grad is not None
    assert model.decoder.embedding.grad is not None
    with pytest.raises(ValueError, match="sequence 1 is empty"):
        model(PackedBatch.from_sequences([([1], []), ([], [])]))


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_gives_the_same_scores(tmp_path, batch, kind, device):
    model = RewardModel.from_decoder(
        Decoder.random(model_config(SMALL | KINDS[kind]), 0, device=device)
    )
    save_reward_model(model, tmp_path / "rm")
    peer, report = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "rm", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert peer.config.num_labels == 1
    with torch.no_grad():
        torch.testing.assert_close(
            model(batch), peer(**padded(device)).logits[:, 0], rtol=1e-5, atol=1e-5
        )
    assert "lm_head.weight" not in load_file(tmp_path / "rm" / "model.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_reads_what_transformers_writes(tmp_path, batch, kind, device):
    torch.manual_seed(0)
    peer = AutoModelForSequenceClassification.from_config(
        AutoConfig.for_model(**SMALL | KINDS[kind], num_labels=1)
    ).eval()
    peer.save_pretrained(tmp_path)
    model = load_reward_model(tmp_path)
    assert model.shift == 0.0
    with torch.no_grad():
        torch.testing.assert_close(
            model(batch), peer(**padded(device)).logits[:, 0], rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_with_its_shift(tmp_path, batch, kind, device):
    model = RewardModel.from_decoder(
        Decoder.random(model_config(SMALL | KINDS[kind]), 0, device=device), seed=3
    )
    model.shift = 0.1 + 0.2  # a float that needs all its digits
    save_reward_model(model, tmp_path / "rm")
    again = load_reward_model(tmp_path / "rm")
    assert again.shift == model.shift
    assert torch.equal(again(batch), model(batch))
    save_reward_model(again, tmp_path / "again")
    for path in (tmp_path / "rm").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    assert json.loads((tmp_path / "rm" / "config.json").read_text())["architectures"][0].endswith(
        "ForSequenceClassification"
    )


def test_refuses_what_is_no_reward_model(tmp_path, device):
    model = RewardModel.from_decoder(
        Decoder.random(model_config(SMALL | KINDS["untied"]), 0, device=device)
    )
    save_reward_model(model, tmp_path / "rm")
    with pytest.raises(
        ValueError, match=r"is a reward model .* and a language model is expected here"
    ):
        load_decoder(tmp_path / "rm")
    path = tmp_path / "rm" / "model.safetensors"
    state = load_file(path)
    save_file(state | {"score.weight": torch.zeros(2, 24, device=device)}, path)
    with pytest.raises(
        ValueError, match=r"shape of score.weight: expected \[1, 24\], got \[2, 24\]"
    ):
        load_reward_model(tmp_path / "rm")
    raw = json.loads((tmp_path / "rm" / "config.json").read_text())
    (tmp_path / "rm" / "config.json").write_text(json.dumps(raw | {"fusedrl_score_shift": "x"}))
    with pytest.raises(ValueError, match="expected a number for fusedrl_score_shift"):
        load_reward_model(tmp_path / "rm")
