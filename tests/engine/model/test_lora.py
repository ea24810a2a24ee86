"""LoRA: against float64 and transformers, unmerged wherever the model is read, off without a trace,
in PEFT's files, and in training.

One file: the adapted model, which every reader of weights is tried on.
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.engine.model.test_decoder import MODELS, SIZES, copy_of, logits, peer_and_ours, some_ids
from torch import nn
from transformers import AutoModelForCausalLM

from fusedrl.engine import CacheConfig, HybridActor, PackedBatch, SamplingParams
from fusedrl.engine.base.errors import ConfigError
from fusedrl.engine.config import LoRAConfig
from fusedrl.engine.generation import blocks
from fusedrl.engine.model.adapters import inputs, slices
from fusedrl.engine.model.configuration import model_config
from fusedrl.engine.model.decoder import Decoder
from fusedrl.engine.model.lora import adapter_views, add_adapter
from fusedrl.engine.model.lora_files import load_adapter, save_adapter
from fusedrl.engine.model.weights import hf_views, save_pretrained
from fusedrl.engine.optim.adamw import make_optimizer
from fusedrl.engine.rollout.reference import OnHost
from fusedrl.kernels.runtime import native

# biases, tied, QK-norm, fused names, gated by GELU, norms behind
FAMILIES = ["llama-biases", "qwen2", "qwen3", "phi3", "gemma2", "gemma3", "olmo2"]
SOME = LoRAConfig(rank=3, alpha=5.0, targets=("v_proj", "o_proj", "q_proj", "down_proj", "up_proj"))
CPP = pytest.mark.skipif(not native.capability, reason=native.reason)


def settings(name):
    return LoRAConfig(rank=4, alpha=6.0) if name in ("qwen2", "phi3", "gemma3") else SOME


def trained(device, decoder, scale=0.2, seed=9):
    """The same decoder with a B that says something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in decoder.named_parameters():
            if name.endswith("_b") and p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=generator).to(device) * scale)
    return decoder


def tiny(device, name="llama-biases", dtype=torch.float32, lora=None, seed=0):
    decoder = Decoder.random(model_config(SIZES | MODELS[name]), seed, dtype=dtype, device=device)
    if lora is not None:
        add_adapter(decoder, lora)
    return decoder


def multiplied_out(decoder):
    """Hugging Face name -> W + alpha / r B A in float64, from the names alone."""
    views = {name: view.double() for name, view in hf_views(decoder).items()}
    adapters = {name: view.double() for name, view in adapter_views(decoder).items()}
    for name in adapters:
        if name.endswith(".lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            views[f"{module}.weight"] = views[f"{module}.weight"] + decoder.lora.scale * (
                adapters[f"{module}.lora_B.weight"] @ adapters[name]
            )
    return views


def eager(peer, decoder):
    """The transformers model in float64 with every adapted linear as PEFT computes it: base(x) +
    scale * B(A(x)); and its A and B by name."""
    peer, parts = peer.double(), {}
    views = hf_views(decoder)
    peer.load_state_dict({name: view.double() for name, view in views.items()}, strict=False)

    class Adapted(nn.Module):
        def __init__(self, base, a, b):
            super().__init__()
            self.base, self.a, self.b = base, nn.Parameter(a.double()), nn.Parameter(b.double())

        def forward(self, x):
            return self.base(x) + decoder.lora.scale * (x @ self.a.T @ self.b.T)

    adapters = adapter_views(decoder)
    for name in [
        n.removesuffix(".lora_A.weight") for n in adapters if n.endswith(".lora_A.weight")
    ]:
        module = Adapted(
            peer.get_submodule(name),
            adapters[f"{name}.lora_A.weight"],
            adapters[f"{name}.lora_B.weight"],
        )
        peer.set_submodule(name, module)
        parts |= {f"{name}.lora_A.weight": module.a, f"{name}.lora_B.weight": module.b}
    return peer, parts


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_gradients_against_float64(name, device):
    peer, ours = peer_and_ours(device, name)
    add_adapter(ours, settings(name))
    trained(device, ours)
    peer, parts = eager(peer, ours)
    ids = some_ids(device)
    got, want = logits(device, ours, ids), peer(ids[None]).logits[0]
    base = logits(device, copy_of(peer_and_ours(device, name)[0], torch.float32), ids)
    assert (got - base).abs().max() > 0.05
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=5e-5)
    weight = (
        torch.randn(got.shape, generator=torch.Generator().manual_seed(1)).to(device) / got.numel()
    )
    (got * weight).sum().backward()
    (want * weight).sum().backward()
    assert all((p.grad is not None) == (".lora." in key) for key, p in ours.named_parameters())
    with torch.no_grad():
        for p in ours.parameters():
            if p.requires_grad:
                p.copy_(p.grad)
    for key, grad in adapter_views(ours).items():
        torch.testing.assert_close(
            grad.double(),
            parts[key].grad,
            rtol=1e-4,
            atol=1e-6,
            msg=lambda m, key=key: f"{key}: {m}",
        )


def test_gradients_of_a_base_that_is_not_frozen(device):
    ours, plain = tiny(device, lora=SOME), tiny(device)
    ours.requires_grad_(True)
    weight = torch.randn(23, SIZES["vocab_size"], generator=torch.Generator().manual_seed(1)).to(
        device
    )
    for decoder in (ours, plain):
        (logits(device, decoder, some_ids(device)) * weight).sum().backward()
    theirs = dict(plain.named_parameters())
    for name, p in ours.named_parameters():  # with B = 0 they are those without an adapter
        if ".lora." not in name:
            torch.testing.assert_close(p.grad, theirs[name].grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_new_adapter_changes_no_bit(name, dtype, device):
    plain, ours, ids = (
        tiny(device, name, dtype),
        tiny(device, name, dtype, settings(name)),
        some_ids(device),
    )
    assert ours.adapter_enabled
    assert {p.dtype for p in ours.parameters()} == {dtype}
    for generating in (False, True):
        assert torch.equal(
            logits(device, ours, ids, generating), logits(device, plain, ids, generating)
        )
    outs = [
        HybridActor(decoder).generate([[1, 5, 7], [3]], SamplingParams(max_new_tokens=9, seed=2))
        for decoder in (plain, ours)
    ]
    assert outs[0] == outs[1]


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=CPP)])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_sampler_says_what_the_trainer_computes(name, strict, device):
    actor = HybridActor(
        trained(device, tiny(device, name, lora=settings(name))),
        cache=CacheConfig(block_size=4, num_blocks=24, max_sequences=4, max_tokens_per_step=7),
        strict=strict,
    )
    prompts = [some_ids(device, length=n, seed=n).tolist() for n in (1, 23, 9, 6)]
    batch = PackedBatch.from_completions(
        prompts, actor.generate(prompts, SamplingParams(max_new_tokens=16, n=2, seed=1))
    ).to(device)
    difference = (actor.score(batch).logp - batch.rollout_logp).abs().max()
    assert difference == 0 if strict else difference <= 1e-4
    with actor.disable_adapter():
        # without the adapter they are another model's
        assert (actor.score(batch).logp - batch.rollout_logp).abs().max() > 1e-2


@CPP
def test_strict_gradients_are_the_plain_ones(device):
    grads = []
    for strict in (False, True):
        actor = HybridActor(trained(device, tiny(device, "qwen3", lora=SOME)), strict=strict)
        batch = PackedBatch.from_sequences([([1, 4, 5], [6, 7, 8]), ([2], [9, 3])]).to(device)
        hidden = actor.forward(batch)
        with actor.disable_adapter():
            assert not actor.forward(batch).requires_grad  # nothing that is trained is in it
            # the recomputed forward is that of the time of the forward
            actor.logprobs(batch, hidden)[0].sum().backward()
        grads.append({name: p.grad for name, p in actor.named_parameters() if p.requires_grad})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-5)


def test_activation_checkpointing_gives_the_same_gradients(device):
    grads = []
    for checkpointed in (False, True):
        decoder = trained(device, tiny(device, "qwen2", lora=SOME))
        decoder.checkpoint_activations = checkpointed
        out = logits(device, decoder, some_ids(device)).square().sum()
        with decoder.disable_adapter():
            out.backward()
        grads.append([p.grad for p in decoder.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_tokens_as_a_merged_transformers_model(name, tmp_path, device):
    actor = HybridActor(
        trained(device, tiny(device, name, lora=settings(name))),
        cache=CacheConfig(block_size=4, num_blocks=24, max_sequences=4, max_tokens_per_step=7),
    )
    prompts = [some_ids(device, length=n, seed=n).tolist() for n in (1, 23, 9)]
    actor.save_pretrained(tmp_path / "merged")
    peer = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", attn_implementation="eager"
    ).eval()
    for prompt, (completion,) in zip(
        prompts,
        actor.generate(prompts, SamplingParams(max_new_tokens=12, temperature=0.0)),
        strict=True,
    ):
        with torch.no_grad():
            logp = torch.log_softmax(
                peer(torch.tensor([prompt + completion.token_ids], device=device)).logits[
                    0, len(prompt) - 1 : -1
                ],
                -1,
            )
        assert completion.token_ids == logp.argmax(-1).tolist()
        torch.testing.assert_close(
            torch.tensor(completion.logprobs, device=device), logp.max(-1).values, rtol=0, atol=1e-4
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama-biases", "phi3", "gemma3"])
def test_what_is_saved_is_merged_and_rounded_once(name, dtype, tmp_path, device):
    decoder = trained(device, tiny(device, name, dtype, settings(name)))
    before = {key: p.clone() for key, p in decoder.named_parameters()}
    save_pretrained(decoder, tmp_path / "merged", max_shard_bytes=4000)
    saved = {}
    for path in (tmp_path / "merged").glob("*.safetensors"):
        saved |= load_file(path)
    want = multiplied_out(decoder)
    assert saved.keys() == want.keys()
    plain = hf_views(decoder)
    for key, tensor in saved.items():
        assert tensor.dtype == dtype
        # half a step of the dtype: one rounding
        step = torch.finfo(dtype).eps / 2 * want[key].abs() + 2e-7
        assert ((tensor.double() - want[key]).abs() <= step).all(), key
        assert f"{key.removesuffix('.weight')}.lora_A.weight" in adapter_views(
            decoder
        ) or torch.equal(tensor, plain[key])
    # saving merges nothing in place
    assert all(torch.equal(before[key], p) for key, p in decoder.named_parameters())
    with decoder.disable_adapter():
        save_pretrained(decoder, tmp_path / "base")
    assert all(
        torch.equal(tensor, plain[key])
        for key, tensor in load_file(tmp_path / "base/model.safetensors").items()
    )


# ---- on and off ----------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_off_is_the_base_to_the_bit_and_on_again_after_an_error(dtype, device):
    plain, ours, ids = (
        tiny(device, "qwen3", dtype),
        trained(device, tiny(device, "qwen3", dtype, SOME)),
        some_ids(device),
    )
    on = [logits(device, ours, ids, generating) for generating in (False, True)]
    with ours.disable_adapter():
        assert not ours.adapter_enabled
        with ours.disable_adapter():
            pass
        for generating in (False, True):
            assert torch.equal(
                logits(device, ours, ids, generating), logits(device, plain, ids, generating)
            )
    with pytest.raises(KeyError), ours.disable_adapter():
        raise KeyError("out")
    assert ours.adapter_enabled
    for generating, before in zip((False, True), on, strict=True):
        assert not torch.equal(before, logits(device, plain, ids, generating))
        assert torch.equal(logits(device, ours, ids, generating), before)
    with plain.disable_adapter():  # nothing to switch off
        assert not plain.adapter_enabled
    assert plain.weights().adapter is None


def test_cached_prefixes_are_not_shared_across_a_switch(monkeypatch, device):
    prompt, params = (
        [some_ids(device, length=20).tolist()],
        SamplingParams(max_new_tokens=6, temperature=0.0),
    )
    actor, fresh = (
        HybridActor(
            trained(device, tiny(device, "qwen2", lora=SOME)), cache=CacheConfig(block_size=4)
        )
        for _ in range(2)
    )
    plain = HybridActor(tiny(device, "qwen2"), cache=CacheConfig(block_size=4))
    on = fresh.generate(prompt, params)
    assert actor.generate(prompt, params) == on
    with actor.disable_adapter():
        off = actor.generate(prompt, params)
        assert [c.logprobs for c in off[0]] == [
            c.logprobs for c in plain.generate(prompt, params)[0]
        ]
    assert actor.generate(prompt, params)[0][0].logprobs == on[0][0].logprobs
    monkeypatch.setattr(blocks, "_ROOTS", {True: 0, False: 0})
    stale = HybridActor(
        trained(device, tiny(device, "qwen2", lora=SOME)), cache=CacheConfig(block_size=4)
    )
    stale.generate(prompt, params)
    # the negative control: with the prefix of the other weights the numbers differ
    with stale.disable_adapter():
        assert stale.generate(prompt, params)[0][0].logprobs != off[0][0].logprobs


def test_a_changed_adapter_is_another_version(device):
    actor = HybridActor(tiny(device, "qwen2"), cache=CacheConfig(block_size=4))
    prompt, params = (
        [some_ids(device, length=20).tolist()],
        SamplingParams(max_new_tokens=4, temperature=0.0),
    )
    first = actor.generate(prompt, params)
    actor.add_adapter(LoRAConfig(rank=2, alpha=4.0))
    assert actor.weights_version == 1
    assert [c.logprobs for c in actor.generate(prompt, params)[0]] == [c.logprobs for c in first[0]]
    trained(device, actor.decoder)
    actor.mark_updated()
    assert actor.generate(prompt, params) == another(actor).generate(prompt, params)


def another(actor):
    other = HybridActor(actor.decoder, cache=CacheConfig(block_size=4))
    other.weights_version = actor.weights_version
    return other


def test_only_adapters_change_in_training(device):
    actor = HybridActor(tiny(device, "qwen3"))
    actor.add_adapter(SOME, seed=3)
    before = {name: p.detach().clone() for name, p in actor.named_parameters()}
    optimizer = make_optimizer(actor.named_parameters(), lr=1e-2, weight_decay=0.1)
    assert all(".lora." in name for name in optimizer.state_dict())
    batch = PackedBatch.from_sequences([([1, 4, 5], [6, 7, 8])]).to(device)
    losses = []
    for _ in range(20):
        loss = -actor.logprobs(batch, actor.forward(batch))[0].sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    for name, p in actor.named_parameters():
        assert torch.equal(p, before[name]) != (".lora." in name)
        assert p.grad is None or ".lora." in name


def test_bfloat16_adapters_follow_small_steps(device):
    # On the bfloat16 grid 1e-5 is less than half a step of almost every A; the float32 masters
    # collect it.
    decoder = tiny(device, "qwen2", torch.bfloat16, SOME)
    optimizer = make_optimizer(decoder.named_parameters(), lr=1e-5)
    masters = {name for name in optimizer.state_dict() if name.endswith(".master")}
    assert len(masters) == sum(p.requires_grad for p in decoder.parameters())


# ---- initialisation and settings -----------------------------------------------------------------
def test_initialised_as_peft_does():
    decoder = Decoder(
        model_config(
            SIZES | MODELS["qwen2"] | {"hidden_size": 96, "intermediate_size": 200, "head_dim": 64}
        )
    )
    add_adapter(decoder, LoRAConfig(rank=64, alpha=16.0), seed=1)
    for name, view in adapter_views(decoder).items():
        if "lora_B" in name:
            assert not view.any()
        else:
            bound = 1 / math.sqrt(view.shape[1])  # kaiming_uniform_ with a = sqrt(5)
            assert view.abs().max() <= bound
            assert view.std() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    again = Decoder(decoder.config)
    add_adapter(again, LoRAConfig(rank=64, alpha=16.0), seed=1)
    assert all(
        torch.equal(x, y)
        for x, y in zip(adapter_views(decoder).values(), adapter_views(again).values(), strict=True)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, r"expected lora.rank >= 1, got 0"),
        ({"alpha": 0.0}, r"expected lora.alpha > 0, got 0.0"),
        ({"targets": ()}, "one target or more"),
        ({"targets": ("q_prj",)}, r"did you mean q_proj\?\), got 'q_prj'"),
        ({"targets": ("lm_head",)}, "of all-linear, q_proj, .* got 'lm_head'"),
    ],
)
def test_settings_that_cannot_be(change, message):
    with pytest.raises(ConfigError, match=message):
        LoRAConfig(**change)


def test_targets_that_a_family_does_not_have(device):
    with pytest.raises(
        ConfigError, match="Phi3 has no q_proj; it has qkv_proj, o_proj, gate_up_proj, down_proj"
    ):
        tiny(device, "phi3", lora=LoRAConfig(targets=("q_proj",)))
    with pytest.raises(ConfigError, match="Qwen2 has no qkv_proj"):
        tiny(device, "qwen2", lora=LoRAConfig(targets=("qkv_proj",)))
    with pytest.raises(ValueError, match="has an adapter already"):
        add_adapter(tiny(device, lora=SOME), SOME)
    assert LoRAConfig(rank=4, alpha=6.0).scale == 1.5
    assert LoRAConfig(rank=4, alpha=6.0, rslora=True).scale == 3.0


@pytest.mark.parametrize("name", FAMILIES)
def test_a_rank_above_what_a_projection_has_is_refused(name, device):
    decoder = tiny(device, name)
    for found in slices(decoder.config).values():
        target = found.module.rpartition(".")[2]
        sides = (found.rows, inputs(decoder.config)[found.product])
        with pytest.raises(
            ConfigError,
            match=rf"lora\.rank: expected at most {max(sides)} on {found.module}, a projection of "
            rf"{sides[0]} x {sides[1]}, got {max(sides) + 1}; lower it",
        ):
            add_adapter(decoder, LoRAConfig(rank=max(sides) + 1, targets=(target,)))
        add_adapter(tiny(device, name), LoRAConfig(rank=max(sides), targets=(target,)))
    assert decoder.lora is None
    assert all(p.requires_grad for p in decoder.parameters())


@pytest.mark.parametrize("name", FAMILIES)
def test_slices_are_the_linear_layers(name, device):
    decoder = tiny(device, name)
    names = {
        key.removesuffix(".weight")
        for key, view in hf_views(decoder).items()
        if key.startswith("model.layers.0.") and view.ndim == 2
    }
    assert {f"model.layers.0.{found.module}" for found in slices(decoder.config).values()} == names
    views = hf_views(decoder)
    fused = [
        decoder.layers[0].qkv_proj,
        decoder.layers[0].o_proj,
        decoder.layers[0].gate_up_proj,
        decoder.layers[0].down_proj,
    ]
    for found in slices(decoder.config).values():
        assert torch.equal(
            fused[found.product][found.first : found.first + found.rows],
            views[f"model.layers.0.{found.module}.weight"],
        )


# ---- PEFT's files --------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "lora", [SOME, LoRAConfig(rank=2, alpha=3.0, rslora=True)], ids=["some", "all"]
)
def test_files_round_trip_and_hold_what_peft_reads(lora, tmp_path, device):
    decoder = trained(device, tiny(device, "qwen2", lora=lora))
    save_adapter(decoder, tmp_path / "adapter", base_model="somewhere/base")
    # a second save replaces the first
    save_adapter(decoder, tmp_path / "adapter", base_model="somewhere/base")
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (config["peft_type"], config["task_type"], config["r"], config["lora_alpha"]) == (
        "LORA",
        "CAUSAL_LM",
        lora.rank,
        lora.alpha,
    )
    assert config["base_model_name_or_path"] == "somewhere/base"
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    views, merged = hf_views(decoder), multiplied_out(decoder)
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    changed = 0
    for name, view in views.items():  # what PEFT's merge gives, from the files alone
        key = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{key}.lora_A.weight" in tensors:
            assert name.split(".")[-2] in config["target_modules"]
            a, b = tensors.pop(f"{key}.lora_A.weight"), tensors.pop(f"{key}.lora_B.weight")
            torch.testing.assert_close(
                view.double() + scale * (b.double() @ a.double()), merged[name], rtol=0, atol=1e-12
            )
            changed += 1
    assert not tensors
    assert changed == len(config["target_modules"]) * decoder.config.num_layers
    again = tiny(device, "qwen2")
    load_adapter(again, tmp_path / "adapter")
    assert (again.lora.rank, again.lora.alpha, again.lora.scale) == (
        lora.rank,
        lora.alpha,
        lora.scale,
    )
    assert torch.equal(
        logits(device, again, some_ids(device)), logits(device, decoder, some_ids(device))
    )
    assert [p.requires_grad for p in again.parameters()] == [
        p.requires_grad for p in decoder.parameters()
    ]


def test_the_library_itself_reads_and_writes_them(tmp_path, device):
    peft = pytest.importorskip("peft", reason="the peft library is not installed")
    for name in ("qwen2", "gemma3", "phi3"):
        peer, ours = peer_and_ours(device, name)
        add_adapter(ours, settings(name))
        trained(device, ours)
        save_adapter(ours, tmp_path / name)
        model = peft.PeftModel.from_pretrained(peer, tmp_path / name)
        ids = some_ids(device)
        torch.testing.assert_close(
            logits(device, ours, ids), model(ids[None]).logits[0], rtol=1e-5, atol=5e-5
        )
        model.save_pretrained(tmp_path / f"{name}-theirs")
        again = copy_of(peer_and_ours(device, name)[0], torch.float32)
        load_adapter(again, tmp_path / f"{name}-theirs")
        assert torch.equal(logits(device, again, ids), logits(device, ours, ids))


def test_files_that_are_refused(tmp_path, device):
    decoder = tiny(device, "qwen2", lora=SOME)
    save_adapter(decoder, tmp_path / "good")
    with pytest.raises(ValueError, match="has no adapter; give it one with add_adapter"):
        save_adapter(tiny(device), tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"has no adapter_config\.json"):
        load_adapter(tiny(device), tmp_path)
    config, weights = (
        json.loads((tmp_path / "good/adapter_config.json").read_text()),
        load_file(tmp_path / "good/adapter_model.safetensors"),
    )
    first = next(iter(weights))

    def refused(message, changed_config=None, changed_weights=None, model="qwen2"):
        bad = tmp_path / "bad"
        bad.mkdir(exist_ok=True)
        (bad / "adapter_config.json").write_text(json.dumps(config | (changed_config or {})))
        save_file(
            weights if changed_weights is None else changed_weights,
            bad / "adapter_model.safetensors",
        )
        fresh = tiny(device, model)
        with pytest.raises(ValueError, match=message):
            load_adapter(fresh, bad)
        assert fresh.lora is None

    refused("expected plain LoRA on linear layers, got {'use_dora': True}", {"use_dora": True})
    refused("got {'modules_to_save': .'lm_head'.}", {"modules_to_save": ["lm_head"]})
    refused("got {'init_lora_weights': 'pissa'}", {"init_lora_weights": "pissa"})
    refused("got {'corda_config'", {"corda_config": {"corda_method": "kpm"}})
    refused("got {'rank_pattern'", {"rank_pattern": {"q_proj": 4}})
    refused("expected numbers for r and lora_alpha", {"r": None})
    refused(
        f"missing: {first}",
        None,
        {name: tensor for name, tensor in weights.items() if name != first},
    )
    refused(
        "unexpected: base_model.model.lm_head.lora_A.weight",
        None,
        weights | {"base_model.model.lm_head.lora_A.weight": torch.zeros(3, 2, device=device)},
    )
    refused("expected .5, .*got .3,", {"r": 5})
    refused("the adapter is not one of this Qwen3", None, None, "qwen3")


# ---- references, and the stages ------------------------------------------------------------------
def test_a_reference_on_the_host_scores_the_same_bits(device):
    actor, other = HybridActor(tiny(device, "gemma3")), HybridActor(tiny(device, "gemma3"))
    batch = PackedBatch.from_sequences([([1, 4, 5], [6, 7, 8]), ([2], [9, 3])]).to(device)
    host = OnHost(other, torch.device("cpu"))
    for _ in range(2):
        assert torch.equal(
            host.score(batch, temperature=0.7, partition=[[1], [0]]).logp,
            actor.score(batch, temperature=0.7, partition=[[1], [0]]).logp,
        )
    with pytest.raises(ValueError, match="partition"):
        host.score(batch, partition=[[0]])
    assert torch.equal(host.score(batch).logp, actor.score(batch).logp)


@pytest.fixture
def ppo(tiny_model, tmp_path, write_jsonl):
    from fusedrl.engine.config import GenerationConfig, OptimConfig, PolicyConfig, RunConfig

    (tmp_path / "rewards.py").write_text(
        "def short(prompts, completions, **columns):\n    return [-float(len(text)) for text in "
        "completions]\n"
    )
    data = write_jsonl(
        "prompts.jsonl",
        [{"prompt": " ".join(f"w{(3 * i + j) % 28}" for j in range(1 + i % 5))} for i in range(12)],
    )

    def make(name="run", **kwargs):
        defaults = dict(
            steps=2,
            prompts_per_step=6,
            samples_per_prompt=2,
            epochs=2,
            minibatches=2,
            tokens_per_microbatch=60,
            lora=LoRAConfig(rank=4, alpha=8.0),
            generation=GenerationConfig(max_new_tokens=8),
            optim=OptimConfig(lr=1e-2, schedule="constant"),
            run=RunConfig(dir=str(tmp_path / name), progress=False, save_every=1),
        )
        return PolicyConfig(
            model=str(tiny_model),
            data=data,
            reward=(f"{tmp_path / 'rewards.py'}:short",),
            **(defaults | kwargs),
        )

    return make


def rows(config):
    timing = ("timing/", "tokens_per_s", "mem/")
    lines = (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith(timing)} for line in lines
    ]


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=CPP)])
def test_ppo_against_the_policy_with_its_adapter_off(ppo, strict, tiny_model, tmp_path, device):
    from fusedrl.engine.stages.policy import train_policy

    config = ppo(strict=strict)
    result = train_policy(config)
    first, second = rows(config)
    assert first["kl"] == 0.0  # the same bits, not about the same numbers
    assert second["kl"] > 1e-4
    for row in (first, second):
        assert row["policy/first_ratio_min"] == row["policy/first_ratio_max"] == 1.0
        assert row["sampling/sampling_logp_difference/max"] <= (0.0 if strict else 1e-4)
    saved = load_file(
        sorted((Path(config.run.dir) / "checkpoints").iterdir())[-1] / "model.safetensors"
    )
    assert saved.keys() == {
        name for name in saved if ".lora." in name or name.startswith("value_head.")
    }
    merged = HybridActor.from_pretrained(result.model)
    unmerged = HybridActor.from_pretrained(tiny_model)
    unmerged.load_adapter(Path(config.run.dir) / "adapter")
    batch = PackedBatch.from_sequences([([1, 4, 5], [6, 7, 8]), ([2], [9, 3])]).to(device)
    torch.testing.assert_close(
        merged.score(batch).logp, unmerged.score(batch).logp, rtol=0, atol=1e-5
    )
    assert not torch.equal(
        merged.score(batch).logp, HybridActor.from_pretrained(tiny_model).score(batch).logp
    )
    if not strict:  # the kinds of reference say the same
        for kind in ("frozen", "host"):
            other = ppo(name=kind, reference=kind)
            train_policy(other)
            assert rows(other) == [first, second]


def test_resuming_continues_bitwise(ppo):
    from fusedrl.engine.stages import policy

    whole = ppo(name="whole", steps=3)
    policy.train_policy(whole)
    parts = replace(ppo(name="parts", steps=3), steps=1)
    policy.train_policy(parts)
    policy.train_policy(replace(parts, steps=3, run=replace(parts.run, resume=True)))
    assert rows(whole) == rows(parts)
    ours, theirs = (
        load_file(Path(config.run.dir) / "adapter/adapter_model.safetensors")
        for config in (whole, parts)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    changed = replace(
        parts, lora=LoRAConfig(rank=5, alpha=8.0), steps=3, run=replace(parts.run, resume=True)
    )
    with pytest.raises(ConfigError, match=r"lora\.rank: 4 -> 5"):
        policy.train_policy(changed)


def test_sft_takes_an_adapter(tiny_model, tmp_path, write_jsonl):
    from fusedrl.engine.config import OptimConfig, RunConfig, SFTConfig
    from fusedrl.engine.stages.sft import train_sft

    data = write_jsonl(
        "sft.jsonl", [{"prompt": f"w{i}", "completion": f" w{i + 1} w{i + 2}"} for i in range(20)]
    )
    config = SFTConfig(
        str(tiny_model),
        data,
        epochs=6,
        sequences_per_step=10,
        lora=LoRAConfig(rank=4, alpha=16.0),
        optim=OptimConfig(lr=2e-2),
        run=RunConfig(str(tmp_path / "run"), progress=False),
    )
    result = train_sft(config)
    losses = [row["loss"] for row in rows(config)]
    assert losses[-1] < 0.8 * losses[0]
    before, after = (
        load_file(Path(path) / "model.safetensors") for path in (tiny_model, result.model)
    )
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        f"model.layers.{i}.{at}.weight"
        for i in range(2)
        for at in (
            *(f"self_attn.{x}_proj" for x in "qkvo"),
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        )
    }


def test_generating_with_an_adapter_from_the_command_line(tiny_model, tmp_path, capsys, device):
    from fusedrl.engine.cli.main import main

    actor = HybridActor.from_pretrained(tiny_model)
    actor.add_adapter(LoRAConfig(rank=2, alpha=4.0))
    trained(device, actor.decoder, scale=1.0)
    actor.save_adapter(tmp_path / "adapter")
    ((want,),) = actor.generate(["w1 w2"], SamplingParams(max_new_tokens=8, temperature=0.0))
    said = []
    for more in ([], ["--adapter", str(tmp_path / "adapter")]):
        assert (
            main(
                [
                    "generate",
                    "--model",
                    str(tiny_model),
                    "--prompt",
                    "w1 w2",
                    "--greedy",
                    "--max_new_tokens",
                    "8",
                    *more,
                ]
            )
            == 0
        )
        said.append(capsys.readouterr().out.strip())
    assert said[1] == f"w1 w2 {want.text.strip()}".strip()
    assert said[0] != said[1]
    assert (
        main(["generate", "--model", str(tiny_model), "--prompt", "w1", "--adapter", str(tmp_path)])
        == 2
    )


def test_a_layout_that_adapters_do_not_know(device):
    sizes = {
        "model_type": "gpt2",
        "vocab_size": 61,
        "n_embd": 24,
        "n_layer": 1,
        "n_head": 3,
        "n_positions": 32,
        "eos_token_id": 2,
        "bos_token_id": 1,
    }
    decoder = Decoder.random(model_config(sizes), 0, device=device)
    with pytest.raises(
        ConfigError, match="GPT2 lays out its projections in a way that adapters do not know yet"
    ):
        add_adapter(decoder, LoRAConfig(targets=("q_proj",)))
    assert decoder.lora is None


def test_a_reference_that_cannot_be(ppo):
    with pytest.raises(ConfigError, match="there is no adapter to switch off"):
        ppo(lora=None, reference="adapter_off")


def test_options_of_the_command_line(tmp_path):
    from fusedrl.engine.cli.main import parse_config

    needed = ["--model", "m", "--data", "d", "--reward", "r.py:f"]
    assert parse_config("ppo", needed).lora is None
    assert parse_config("ppo", [*needed, "--lora.rank", "8"]).lora == LoRAConfig(rank=8)
    assert parse_config(
        "sft", ["--model", "m", "--data", "d", "--lora.targets", '["q_proj"]']
    ).lora.targets == ("q_proj",)
    (tmp_path / "run.yaml").write_text("lora: {rank: 4}\nreference: frozen\n")
    config = parse_config(
        "ppo", [*needed, "--config", str(tmp_path / "run.yaml"), "--lora.alpha", "3"]
    )
    assert (config.lora, config.reference) == (LoRAConfig(rank=4, alpha=3.0), "frozen")
    (tmp_path / "none.yaml").write_text("lora: null\n")
    assert parse_config("ppo", [*needed, "--config", str(tmp_path / "none.yaml")]).lora is None
    for options, message in (
        (["--lora.rank", "0"], "^config: expected lora.rank >= 1, got 0$"),
        (["--lora.rank", "many"], '"lora.rank": expected a whole number, got many$'),
        (["--lora.rnk", "8"], "did you mean --lora.rank"),
        (["--lora.targets", "[qproj]"], "did you mean q_proj"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_config("ppo", [*needed, *options])
