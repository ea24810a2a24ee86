"""A PEFT model and an actor on one copy of the weights, base and adapter."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from fusedrl.engine import HybridActor, PackedBatch, SamplingParams

peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")

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
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROMPT = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18]
GREEDY = SamplingParams(max_new_tokens=12, temperature=0.0)


def wrapped(kind="llama", base=None, **options) -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(**SIZES | {"model_type": kind} | (base or {}))
    options = {"r": 3, "lora_alpha": 6, "target_modules": ALL, "init_lora_weights": False} | options
    return peft.get_peft_model(
        AutoModelForCausalLM.from_config(config), peft.LoraConfig(task_type="CAUSAL_LM", **options)
    )


def check(model: nn.Module, actor: HybridActor) -> list[int]:
    """The completion is PEFT's greedy one, and its log-probabilities are PEFT's."""
    ((out,),) = actor.generate([PROMPT], GREEDY)
    ids = torch.tensor([PROMPT + out.token_ids], device=actor.decoder.device)
    with torch.no_grad():
        logp = model(ids).logits[0, len(PROMPT) - 1 : -1].float().log_softmax(-1)
    assert logp.argmax(-1).tolist() == out.token_ids
    theirs = logp.max(-1).values.cpu()
    torch.testing.assert_close(torch.tensor(out.logprobs), theirs, rtol=1e-4, atol=1e-4)
    batch = PackedBatch.from_completions([PROMPT], [[out]], device=actor.decoder.device)
    scored = actor.score(batch).logp[batch.action_mask].cpu()
    torch.testing.assert_close(scored, theirs, rtol=1e-4, atol=1e-4)
    return out.token_ids


@pytest.mark.parametrize(
    "kind, base, options",
    [
        ("llama", {"tie_word_embeddings": True}, {}),
        ("llama", {"attention_bias": True}, {"target_modules": ["q_proj", "v_proj"]}),
        ("qwen2", {}, {"use_rslora": True, "target_modules": ["down_proj", "k_proj"]}),
        ("phi3", {}, {"target_modules": "all-linear"}),
    ],
)
def test_base_and_adapter_are_one_copy(kind, base, options, device):
    model = wrapped(kind, base, **options).to(device)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    held = dict(model.named_parameters())
    actor = HybridActor.from_module(model)
    after = dict(model.named_parameters())
    assert all(after[name] is held[name] for name in before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    ours = {p.untyped_storage().data_ptr(): p.nbytes for p in actor.decoder.parameters()}
    bounds = [(p.data_ptr(), p.data_ptr() + p.nbytes) for p in actor.decoder.parameters()]
    assert sum(ours.values()) == sum(p.nbytes for p in model.parameters())
    for p in model.parameters():
        assert any(start <= p.data_ptr() < end for start, end in bounds)
    check(model, actor)


def test_the_actor_follows_what_trains_disables_and_merges_the_adapter(device):
    model = wrapped().to(device)
    actor = HybridActor.from_module(model)
    on = check(model, actor)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    assert {p.grad for p in model.parameters()} == {None}
    for _ in range(3):
        version = actor.weights_version
        ids = torch.tensor([PROMPT], device=device)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        check(model, actor)
        assert actor.weights_version == version + 1
    trained = check(model, actor)
    assert trained != on

    with model.disable_adapter():
        off = check(model, actor)
        assert not actor.decoder.adapter_enabled
    assert off != trained
    assert check(model, actor) == trained, "no prefix of the other state was reused"
    with actor.disable_adapter():
        assert actor.generate([PROMPT], GREEDY)[0][0].token_ids == off
    assert check(model, actor) == trained

    model.merge_adapter()
    assert check(model, actor) == trained
    assert not actor.decoder.adapter_enabled, "the weights hold it"
    model.unmerge_adapter()
    assert check(model, actor) == trained
    assert actor.decoder.adapter_enabled
    copied = HybridActor(copy.deepcopy(actor.decoder))
    with model.disable_adapter():
        assert copied.generate([PROMPT], GREEDY)[0][0].token_ids == trained


def test_another_adapter_keeps_its_memory_and_is_refused_while_it_is_active(device):
    """TRL adds "ref" beside the adapter that it trains."""
    model = wrapped()
    model.add_adapter("ref", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model = model.to(device)
    actor = HybridActor.from_module(model)
    own = check(model, actor)
    model.set_adapter("ref")
    with pytest.raises(RuntimeError, match=r"'default' is neither on, off nor merged.*set_adapter"):
        actor.generate([PROMPT], GREEDY)
    model.set_adapter("default")
    assert check(model, actor) == own
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.set_scale("default", 3)
    with pytest.raises(RuntimeError, match=r"scale 2\.0, 6\.0 and 2\.0"):
        actor.generate([PROMPT], GREEDY)
    layer.scaling["default"] = 2.0
    layer.enable_adapters(False)
    with pytest.raises(RuntimeError, match=r"disabled \[False, True\]"):
        actor.generate([PROMPT], GREEDY)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(use_dora=True), "DoraLinearVariant, expected W x"),
        (dict(lora_bias=True), "a bias of its own"),
        (dict(rank_pattern={"layers.0.self_attn.q_proj": 2}), "one rank, alpha and scale"),
        (dict(layers_to_transform=[1]), "the same linear layers of every decoder layer"),
        (dict(target_modules=["q_proj", "lm_head"]), "different: lm_head"),
        (dict(target_modules=["q_proj", "embed_tokens"]), "Embedding"),
        (dict(target_modules=["q_proj"], modules_to_save=["lm_head"]), "modules_to_save"),
    ],
)
@pytest.mark.cpu_only("refused before anything is computed")
def test_what_the_decoder_does_not_compute_is_refused_and_left_as_it_was(change, message):
    model = wrapped(base={"tie_word_embeddings": False}, **change)
    places = [p.data_ptr() for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        HybridActor.from_module(model)
    assert places == [p.data_ptr() for p in model.parameters()]


@pytest.mark.cpu_only("refused before anything is computed")
def test_other_kinds_and_mixed_dtypes_are_refused_with_the_remedy():
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES))
    soft = peft.get_peft_model(
        copy.deepcopy(plain),
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    )
    with pytest.raises(ValueError, match=r"expected a PEFT model with LoRA, got .* PROMPT_TUNING"):
        HybridActor.from_module(soft)
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"])
    half = copy.deepcopy(plain).to(torch.bfloat16)
    with pytest.raises(TypeError, match="autocast_adapter_dtype=False"):
        HybridActor.from_module(peft.get_peft_model(copy.deepcopy(half), settings))
    HybridActor.from_module(peft.get_peft_model(half, settings, autocast_adapter_dtype=False))
    merged = peft.get_peft_model(plain, settings)
    merged.merge_adapter()
    with pytest.raises(ValueError, match=r"it is merged at .*unmerge or enable it"):
        HybridActor.from_module(merged)
