"""HybridActor.from_module: a transformers model and the actor on one storage, trained from
outside."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from fusedrl.engine import HybridActor, PackedBatch, SamplingParams
from fusedrl.engine.model.weights import hf_views

SIZES = {
    "vocab_size": 48,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "initializer_range": 0.3,
}
KINDS = {
    "llama, untied, biases": {
        "model_type": "llama",
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": False,
    },
    "qwen3, tied": {"model_type": "qwen3", "head_dim": 8, "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2"},
    "mistral": {"model_type": "mistral"},
    "phi3": {"model_type": "phi3", "sliding_window": 9, "partial_rotary_factor": 0.5},
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
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 24,
        "n_layer": 2,
        "n_head": 6,
        "n_positions": 128,
        "n_inner": 20,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
}
PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21], [3, 4]]
GREEDY = SamplingParams(max_new_tokens=12, temperature=0.0)


def model(kind: str = "qwen3, tied", dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**SIZES | KINDS[kind])).to(dtype)


def greedy(module: nn.Module) -> list[list[int]]:
    """What transformers itself completes."""
    outs = []
    for prompt in PROMPTS:
        out = module.generate(
            torch.tensor([prompt], device=module.device),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long, device=module.device),
            max_new_tokens=12,
            do_sample=False,
        )
        outs.append(out[0, len(prompt) :].tolist())
    return outs


def completed(actor: HybridActor) -> list[list[int]]:
    return [out[0].token_ids for out in actor.generate(PROMPTS, GREEDY)]


def train(module: nn.Module, steps: int = 3, **options) -> None:
    """An ordinary torch loop."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-2, **options)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        ids = torch.randint(0, SIZES["vocab_size"], (4, 16), generator=generator).to(module.device)
        module(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("kind", KINDS)
def test_the_actor_follows_the_model_that_is_trained(kind, device):
    module = model(kind).to(device)
    before = copy.deepcopy(module)
    named = dict(module.named_parameters())
    actor = HybridActor.from_module(module)
    assert all(named[name] is parameter for name, parameter in module.named_parameters())
    assert all(
        torch.equal(p, q) for p, q in zip(module.parameters(), before.parameters(), strict=True)
    )
    assert completed(actor) == greedy(module) == greedy(before)
    first = completed(actor)
    for options in ({"foreach": False}, {"foreach": True}, {"fused": True}):
        version = actor.weights_version
        train(module, **options)
        assert completed(actor) == greedy(module), options
        assert actor.weights_version == version + 1
    assert completed(actor) != first, "training must have changed something"
    assert actor.weights_version == version + 1, "nothing changed since"


def test_no_byte_is_copied_after_construction(device):
    module = model().to(device)
    actor = HybridActor.from_module(module)
    addresses = {name: view.data_ptr() for name, view in hf_views(actor.decoder).items()}
    for _ in range(2):
        assert {name: p.data_ptr() for name, p in module.named_parameters()} == addresses
        train(module)
        actor.generate(PROMPTS, GREEDY)


def test_cached_prefixes_do_not_outlive_an_update(device):
    module = model().to(device)
    actor = HybridActor.from_module(module)
    assert completed(actor) == greedy(module)  # the first prompt fills a block of the prefix cache
    with torch.no_grad():
        module.get_parameter("model.layers.0.self_attn.k_proj.weight").mul_(-2.0)
    assert completed(actor) == greedy(module)


def test_scores_are_those_of_the_model(device):
    module = model("llama, untied, biases").to(device)
    actor = HybridActor.from_module(module, value_head=True)
    train(module, 1)
    outs = actor.generate(PROMPTS, SamplingParams(max_new_tokens=9, seed=3))
    scored = actor.score(PackedBatch.from_completions(PROMPTS, outs, device=device))
    start = 0
    for prompt, (completion,) in zip(PROMPTS, outs, strict=True):
        ids = torch.tensor([prompt + completion.token_ids], device=device)
        expected = (
            module(ids)
            .logits.double()
            .log_softmax(-1)[0, :-1]
            .gather(-1, ids[0, 1:, None])[:, 0][len(prompt) - 1 :]
        )
        ours = scored.logp[start + len(prompt) : start + ids.shape[1]]
        torch.testing.assert_close(ours.double(), expected, atol=1e-5, rtol=1e-5)
        start += ids.shape[1]


def test_an_update_that_only_score_sees_is_noticed(device):
    module = model().to(device)
    actor = HybridActor.from_module(module)
    batch = PackedBatch.from_completions(PROMPTS, actor.generate(PROMPTS, GREEDY), device=device)
    train(module, 1)
    actor.score(batch)
    assert actor.weights_version == 1


def test_what_is_told_is_one_version_noticed_or_not(device):
    module = model().to(device)
    actor = HybridActor.from_module(module)
    completed(actor)
    for parameter in module.parameters():
        parameter.data.add_(0.05)
    actor.mark_updated()
    assert completed(actor) == greedy(module)
    assert actor.weights_version == 1
    train(module, 1)
    actor.mark_updated()
    assert completed(actor) == greedy(module)
    assert actor.weights_version == 2


def test_bfloat16_and_what_the_actor_trains_is_the_model(device):
    module = model(dtype=torch.bfloat16).to(device)
    actor = HybridActor.from_module(module)
    assert actor.decoder.dtype == torch.bfloat16
    with torch.no_grad():
        for parameter in actor.parameters():
            parameter.add_(1.0)
    assert all(
        torch.equal(view, dict(module.named_parameters())[name])
        for name, view in hf_views(actor.decoder).items()
    )
    assert float(module.model.norm.weight.detach().mean()) == 2.0


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_saving_writes_what_the_model_would(tmp_path, kind, device):
    from safetensors.torch import load_file

    module = model(kind).to(device)
    actor = HybridActor.from_module(module)
    train(module, 1)
    actor.save_pretrained(tmp_path / "ours")
    module.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert completed(
        HybridActor.from_module(AutoModelForCausalLM.from_pretrained(tmp_path / "ours").to(device))
    ) == greedy(module)


def reassign(module):
    module.model.layers[1].mlp.up_proj.weight = nn.Parameter(
        module.model.layers[1].mlp.up_proj.weight.detach().clone()
    )


def assigned(module):
    module.load_state_dict(
        {name: value.clone() for name, value in module.state_dict().items()}, assign=True
    )


@pytest.mark.parametrize(
    "break_it",
    [
        reassign,
        assigned,
        lambda module: module.to(torch.bfloat16),
        lambda module: delattr(module, "lm_head"),
    ],
)
def test_a_model_that_no_longer_shares_is_refused(break_it, device):
    module = model("llama, untied, biases").to(device)
    actor = HybridActor.from_module(module)
    batch = PackedBatch.from_completions(PROMPTS, actor.generate(PROMPTS, GREEDY), device=device)
    break_it(module)
    with pytest.raises(RuntimeError, match="no longer lies in the storage"):
        actor.generate(PROMPTS, GREEDY)
    with pytest.raises(RuntimeError, match="build a new actor with from_module"):
        actor.score(batch)


def test_another_models_optimizer_is_not_ours_and_nothing_is_kept_alive(device):
    module = model().to(device)
    actor = HybridActor.from_module(module)
    train(model("qwen2").to(device), 1)
    completed(actor)
    assert actor.weights_version == 0
    watched = weakref.ref(actor._watch)
    del actor
    gc.collect()
    assert watched() is None
    train(module, 1)  # the hook went with the actor


def test_models_that_do_not_fit_are_refused_and_left_alone(device):
    with pytest.raises(TypeError, match="expected a transformers model"):
        HybridActor.from_module(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="unknown model_type 'gptj'"):
        HybridActor.from_module(
            AutoModelForCausalLM.from_config(
                AutoConfig.for_model(
                    "gptj", n_embd=16, n_layer=1, n_head=2, rotary_dim=4, vocab_size=8
                )
            ).to(device)
        )
    with pytest.raises(
        ValueError,
        match=r"GPTNeoX orders the rows of gpt_neox.layers.0.attention.query_key_value.weight as "
        r"no view",
    ):
        HybridActor.from_module(
            AutoModelForCausalLM.from_config(
                AutoConfig.for_model(**SIZES | {"model_type": "gpt_neox", "rotary_pct": 1.0})
            ).to(device)
        )
    with pytest.raises(ValueError, match=r"missing: lm_head.weight\n  unexpected: score.weight"):
        HybridActor.from_module(
            AutoModelForSequenceClassification.from_config(
                AutoConfig.for_model(**SIZES | KINDS["llama, untied, biases"])
            ).to(device)
        )
    mixed = model().to(device)
    mixed.model.norm.weight.data = mixed.model.norm.weight.data.double()
    addresses = [p.data_ptr() for p in mixed.parameters()]
    with pytest.raises(
        TypeError, match=r"one dtype on one device, got torch.float32 on cpu, torch.float64 on cpu"
    ):
        HybridActor.from_module(mixed)
    assert [p.data_ptr() for p in mixed.parameters()] == addresses
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SIZES | KINDS["qwen2"]))
    with pytest.raises(TypeError, match="ordinary tensors in memory"):
        HybridActor.from_module(empty)
