"""fusedrl plan: its byte counts against autograd's saved tensors, the allocator, the optimizer's
state, the KV pool, and a process's own peak.

One file: the terms of one sum, as in plan.py.
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from fusedrl.engine import CacheConfig, HybridActor, PackedBatch
from fusedrl.engine.base.errors import ConfigError
from fusedrl.engine.base.memory import parse_memory
from fusedrl.engine.cli.main import main
from fusedrl.engine.config import (
    CriticConfig,
    LoRAConfig,
    OptimConfig,
    ParallelConfig,
    PolicyConfig,
    RewardModelConfig,
    SFTConfig,
)
from fusedrl.engine.generation.cache import block_bytes
from fusedrl.engine.generation.sampler import SamplingParams
from fusedrl.engine.model.configuration import model_config
from fusedrl.engine.model.decoder import Decoder
from fusedrl.engine.model.heads import RewardModel, ValueHead
from fusedrl.engine.model.lora import add_adapter
from fusedrl.engine.optim.adamw import make_optimizer
from fusedrl.engine.parallel.lanes import owners_of
from fusedrl.engine.policy.critic import SeparateCritic
from fusedrl.engine.watch.plan import Planner, cache_for, plan
from fusedrl.kernels.runtime import native

needs_kernels = pytest.mark.skipif(
    not native.capability, reason="the native extension is not built"
)
SIZES = {
    "vocab_size": 90,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
}
KINDS = {
    "llama": {"model_type": "llama"},
    "qwen3 tied": {"model_type": "qwen3", "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "sliding_window": 9},
    "wide": {
        "model_type": "llama",
        "attention_bias": True,
        "num_key_value_heads": 6,
        "intermediate_size": 240,
    },
    "olmo2": {"model_type": "olmo2"},
    "gemma2": {"model_type": "gemma2", "sliding_window": 9, "query_pre_attn_scalar": 8},
    "gpt_neox": {"model_type": "gpt_neox", "rotary_pct": 0.5},
    "gpt2": {"model_type": "gpt2", "n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 256},
}
STAGES = {
    "sft": SFTConfig("m", "d"),
    "reward": RewardModelConfig("m", "d"),
    "ppo": PolicyConfig("m", "d", ("r.py:r",)),
    "imitation": RewardModelConfig("m", "d", imitation_coef=0.5),
}


def planner(sizes, stage="ppo", dtype="float32", **more):
    """Of a stage whose log-probabilities are computed by themselves, as `forward` does."""
    config = replace(STAGES[stage], dtype=dtype, device="cpu")
    planned = Planner(model_config(sizes), config, **more)
    planned._apart = stage != "reward"
    return planned


def batch(tokens, vocabulary, sequences=4):
    draw = torch.Generator().manual_seed(0)
    n = tokens // sequences
    return PackedBatch.from_sequences(
        (
            torch.randint(vocabulary, (n // 4,), generator=draw).tolist(),
            torch.randint(vocabulary, (n - n // 4,), generator=draw).tolist(),
        )
        for _ in range(sequences)
    )


def forward(model, packed):
    """The outputs that a stage's loss reads."""
    if isinstance(model, RewardModel):
        hidden = model.hidden(packed)
        return [
            model.scores(packed, hidden),
            *([model.imitation_logp(packed, hidden)] if model.imitates else []),
        ]
    hidden = model.forward(packed)
    return [
        *model.logprobs(packed, hidden),
        *([] if model.value_head is None else [model.values(packed, hidden)]),
    ]


def model_of(sizes, stage, dtype):
    return heads_on(Decoder.random(model_config(sizes), 0, dtype=getattr(torch, dtype)), stage)


def heads_on(decoder, stage):
    if stage in ("reward", "imitation"):
        return RewardModel.from_decoder(decoder, imitation=stage == "imitation")
    return HybridActor(
        decoder, value_head=ValueHead(decoder.config.hidden_size) if stage == "ppo" else None
    )


def held_bytes(model, packed):
    """Bytes of the distinct storages that autograd holds between the passes, but for the
    parameters."""
    ours = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ours:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        outs = forward(model, packed)
    assert all(out.requires_grad for out in outs[:1])
    return sum(held.values())


@needs_kernels
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_are_what_autograd_holds(kind, stage, dtype):
    sizes = SIZES | KINDS[kind]
    model, planned = model_of(sizes, stage, dtype), planner(sizes, stage, dtype)
    for tokens in (40, 200):
        for checkpointed in (False, True):
            model.decoder.checkpoint_activations = checkpointed
            found, expected = (
                planned.activation_bytes(tokens, checkpointed) + planned._kept_logits(tokens),
                held_bytes(model, batch(tokens, 90)),
            )
            assert found == pytest.approx(expected, rel=0.05), (tokens, checkpointed)


@needs_kernels
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_gradients_and_optimizer_are_exact(kind, stage, dtype):
    sizes = SIZES | KINDS[kind]
    model, planned = model_of(sizes, stage, dtype), planner(sizes, stage, dtype)
    optimizer = make_optimizer(model.named_parameters(), lr=1e-3, accumulate="float32")
    sum(out.sum() for out in forward(model, batch(40, 90))).backward()
    optimizer.step()
    assert planned.weights == sum(p.nbytes for p in model.parameters())
    assert planned.gradients == sum(g.nbytes for g in optimizer.gradients().values())
    assert planned.optimizer == sum(t.nbytes for t in optimizer.state_dict().values())
    assert planned.reference == (
        sum(p.nbytes for p in model.decoder.parameters()) if stage == "ppo" else 0
    )


def test_without_a_critic_a_policy_is_what_sft_trains():
    for dtype in ("float32", "bfloat16"):
        sft, *free = (
            Planner(
                model_config(SIZES | KINDS["llama"]), replace(config, dtype=dtype, device="cpu")
            )
            for config in (
                STAGES["sft"],
                PolicyConfig("m", "d", ("r.py:r",), "dapo"),
                PolicyConfig("m", "d", ("r.py:r",), "grpo"),
            )
        )
        for planned in free:
            assert (planned.weights, planned.gradients, planned.optimizer) == (
                sft.weights,
                sft.gradients,
                sft.optimizer,
            )
            assert planned.activation_bytes(200, False) == sft.activation_bytes(200, False)
        # grpo has a KL, dapo none
        assert [planned.reference for planned in free] == [0, sft.weights]


@needs_kernels
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("llama", ("all-linear",)),
        ("qwen3 tied", ("all-linear",)),
        ("wide", ("q_proj", "v_proj", "gate_proj", "down_proj")),
    ],
)
def test_adapters(kind, targets, dtype):
    sizes, lora = SIZES | KINDS[kind], LoRAConfig(rank=6, targets=targets)
    for stage in ("reward", "imitation", "sft", "ppo"):
        config = replace(STAGES[stage], dtype=dtype, device="cpu", lora=lora)
        planned = Planner(model_config(sizes), config)
        planned._apart = stage != "reward"
        decoder = Decoder.random(model_config(sizes), 0, dtype=getattr(torch, dtype))
        base, everything = (
            sum(p.nbytes for p in decoder.parameters()),
            sum(p.numel() for p in decoder.parameters()),
        )
        add_adapter(decoder, lora)
        model = heads_on(decoder, stage)
        optimizer = make_optimizer(model.named_parameters(), lr=1e-3, accumulate="float32")
        sum(out.sum() for out in forward(model, batch(40, 90))).backward()
        optimizer.step()
        assert planned.weights == sum(p.nbytes for p in model.parameters())
        assert (
            planned.gradients
            == sum(g.nbytes for g in optimizer.gradients().values())
            < 0.5 * 4 * everything
        )
        assert planned.optimizer == sum(t.nbytes for t in optimizer.state_dict().values())
        assert planned.reference == 0
        for tokens in (40, 200):
            for checkpointed in (False, True):
                model.decoder.checkpoint_activations = checkpointed
                found = planned.activation_bytes(tokens, checkpointed)
                assert found + planned._kept_logits(tokens) == pytest.approx(
                    held_bytes(model, batch(tokens, 90)), rel=0.05
                )
    assert Planner(model_config(sizes), replace(config, reference="frozen")).reference == base
    # on a CPU it is the same memory
    assert Planner(model_config(sizes), replace(config, reference="host")).reference == base
    full = Planner(model_config(sizes), replace(config, lora=None))
    assert planned.parts(200, False).peak < full.parts(200, False).peak


def saved_bytes(forward, ours):
    """What a forward pass keeps for its backward pass, without the storages that are `ours`."""
    held: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ours:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        value = forward()
    assert value.requires_grad
    return sum(held.values())


@needs_kernels
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "qwen3 tied", "gpt2"])
def test_a_critic_of_its_own(tmp_path, kind, dtype):
    """Exact weights, gradients and moments beside the policy's, its own activations, and of
    gradients and activations those of whichever takes more."""
    wide = SIZES | KINDS[kind] | ({"n_embd": 96} if kind == "gpt2" else {"hidden_size": 96})
    (tmp_path / "config.json").write_text(json.dumps(wide))
    alone = planner(SIZES | KINDS["llama"], dtype=dtype, cache=CacheConfig(num_blocks=1))
    config = replace(
        STAGES["ppo"],
        critic=CriticConfig(str(tmp_path), optim=OptimConfig()),
        dtype=dtype,
        device="cpu",
    )
    planned = Planner(model_config(SIZES | KINDS["llama"]), config, cache=CacheConfig(num_blocks=1))
    critic = SeparateCritic(
        Decoder.random(
            replace(model_config(wide), tie_embeddings=True), 0, dtype=getattr(torch, dtype)
        ),
        ValueHead(96),
    )
    optimizer = make_optimizer(critic.named_parameters(), lr=1e-3, accumulate="float32")
    critic(batch(40, 90)).sum().backward()
    optimizer.step()
    head = 4 * (48 + 1)  # which the policy's trunk has no more
    assert planned.weights == alone.weights - head + sum(p.nbytes for p in critic.parameters())
    assert planned.optimizer == alone.optimizer - 2 * head - 8 + sum(
        t.nbytes for t in optimizer.state_dict().values()
    )
    apart = planned._phases[0]
    assert apart.gradients == sum(g.nbytes for g in optimizer.gradients().values())
    assert planned.gradients == alone.gradients - head
    for tokens in (40, 200):
        for checkpointed in (False, True):
            critic.decoder.checkpoint_activations = checkpointed
            ours = {p.untyped_storage().data_ptr() for p in critic.parameters()}
            assert apart.activation_bytes(tokens, checkpointed) == pytest.approx(
                saved_bytes(lambda tokens=tokens: critic(batch(tokens, 90)), ours), rel=0.05
            )
            parts = planned.parts(tokens, checkpointed)
            fixed = (
                planned.weights
                + planned.reference
                + planned.optimizer
                + planned.kv_pool
                + planned.rotary
            )
            peaks = [
                fixed
                + phase.gradients
                + phase.beyond_pool(tokens, checkpointed)
                + phase.workspace_bytes(tokens, checkpointed)
                for phase in (apart, planned)
            ]
            assert parts.peak == max(peaks)
    # the wider one's
    assert planned.parts(200, False).gradients == apart.gradients > planned.gradients

    same = Planner(
        model_config(SIZES | KINDS["llama"]),
        replace(config, critic=CriticConfig("policy")),
        cache=CacheConfig(num_blocks=1),
    )
    assert same.parts(200, False).peak < planned.parts(200, False).peak


def test_moments_of_8_bits_are_exact():
    pytest.importorskip("torchao.optim")
    sizes = SIZES | KINDS["llama"] | {"hidden_size": 64, "intermediate_size": 128}
    for dtype in ("float32", "bfloat16"):
        model = model_of(sizes, "ppo", dtype)
        optimizer = make_optimizer(model.named_parameters(), lr=1e-3, state="int8")
        sum(out.sum() for out in forward(model, batch(40, 90))).backward()
        with torch.compiler.set_stance("force_eager"):
            optimizer.step()
        config = replace(STAGES["ppo"], dtype=dtype, device="cpu", optim=OptimConfig(state="int8"))
        found = Planner(model_config(sizes), config).optimizer
        assert found == sum(t.nbytes for t in optimizer.state_dict().values())
        assert (
            found
            < planner(sizes, "ppo", dtype).optimizer - 5 * model.decoder.layers[0].qkv_proj.numel()
        )


@pytest.mark.parametrize(
    "cache",
    [
        CacheConfig(num_blocks=7),
        CacheConfig(memory_bytes=123_456),
        CacheConfig(max_sequences=9),
        None,
    ],
    ids=str,
)
def test_the_kv_pool_is_exact(cache):
    """Of a size that is given, and of the default for what a run asks for."""
    decoder = Decoder.random(model_config(SIZES | KINDS["llama"]), 0)
    planned = planner(SIZES | KINDS["llama"], cache=cache)
    actor = HybridActor(decoder, cache=cache)
    if cache is None or cache.max_sequences == 9:
        assert (planned.demand, planned.demand_met) == ((64, 256), True)
        actor.limit_cache(*planned.demand)
    actor.generate([[1]], SamplingParams(max_new_tokens=1))
    assert planned.kv_pool == actor._generator.cache.nbytes
    assert planner(SIZES | KINDS["llama"], "sft", cache=cache).kv_pool == 0


def allocator_peak(function):
    """The most memory held beyond what was there, as torch's CPU allocator counts it."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as recorded:
        function()
    total = peak = 0
    for event in sorted(
        (e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"),
        key=lambda e: e.start_ns(),
    ):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


MEDIUM = {
    "model_type": "llama",
    "vocab_size": 2000,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


@needs_kernels
@pytest.mark.parametrize(
    "stage, dtype, shape",
    [
        ("ppo", "float32", {"tie_word_embeddings": True}),
        ("ppo", "bfloat16", {"vocab_size": 8000, "num_hidden_layers": 2}),
        ("sft", "float32", {"vocab_size": 8000, "num_hidden_layers": 2}),
        ("sft", "bfloat16", {"tie_word_embeddings": True}),
        ("reward", "float32", {}),
        ("reward", "bfloat16", {}),
        ("imitation", "float32", {"tie_word_embeddings": True}),
        ("imitation", "bfloat16", {}),
    ],
    ids=lambda value: "".join(value) if isinstance(value, dict) else value,
)
def test_the_peak_is_what_the_allocator_sees(stage, dtype, shape):
    """Of a later micro-batch and the optimizer's step, beside weights, gradients and moments."""
    sizes = MEDIUM | shape
    model, planned = (
        model_of(sizes, stage, dtype),
        planner(sizes, stage, dtype, cache=CacheConfig(num_blocks=1)),
    )  # which holds next to nothing
    optimizer = make_optimizer(model.named_parameters(), lr=1e-3, accumulate="float32")

    def microbatch(packed):
        sum(out.sum() for out in forward(model, packed)).backward()

    for tokens in (32, 400):
        packed = batch(tokens, sizes["vocab_size"])
        for checkpointed in (False, True):
            model.decoder.checkpoint_activations = checkpointed
            microbatch(packed)
            optimizer.step()
            measured = allocator_peak(lambda: (microbatch(packed), optimizer.step()))  # noqa: B023
            parts = planned.parts(tokens, checkpointed)
            assert parts.activations + parts.workspace == pytest.approx(measured, rel=0.15), (
                tokens,
                checkpointed,
            )
            held = planned.weights + planned.gradients + planned.optimizer
            assert held + parts.activations + parts.workspace == pytest.approx(
                held + measured, rel=0.1
            ), (tokens, checkpointed)


# ---- what the user asks --------------------------------------------------------------------------
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_largest_micro_batch_fits_and_one_more_token_does_not(stage, checkpointed):
    planned = planner(MEDIUM, stage)
    assert planned.largest(planned.parts(0, checkpointed).fixed - 1, checkpointed) == 0
    for memory in (planned.parts(100, checkpointed).peak, 3 << 30):
        most = planned.largest(memory, checkpointed)
        assert (
            planned.parts(most, checkpointed).peak
            <= memory
            < planned.parts(most + 1, checkpointed).peak
        )
    assert planned.largest(3 << 30, True) > 2 * planned.largest(3 << 30, False)


@pytest.mark.parametrize(
    "text, count",
    [
        ("8GiB", 8 << 30),
        ("512 MiB", 512 << 20),
        ("16GB", 16 * 10**9),
        ("1.5gib", 3 << 29),
        ("1000", 1000),
        ("3kB", 3000),
    ],
)
def test_amounts_of_memory(text, count):
    assert parse_memory(text) == count


@pytest.mark.parametrize(
    "text", ["", "lots", "-1GiB", "0", "0GiB", "8G", "8 Gi B", "1e9", "nan", "GiB", "8GiBs"]
)
def test_amounts_that_are_none(text):
    with pytest.raises(ConfigError, match="expected an amount of memory above 0 such as 8GiB"):
        parse_memory(text)


def test_the_command_line(tmp_path, capsys):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(MEDIUM))
    assert (
        main(
            [
                "plan",
                "ppo",
                "--model",
                str(tmp_path),
                "--memory",
                "2GiB",
                "--device",
                "cpu",
                "--output-json",
                str(tmp_path / "plan.json"),
            ]
        )
        == 0
    )
    shown = capsys.readouterr().out
    assert all(
        word in shown
        for word in (
            "weights",
            "reference",
            "gradients",
            "optimizer",
            "KV cache",
            "activations",
            "peak",
            "checkpoint_activations",
        )
    )
    told = json.loads((tmp_path / "plan.json").read_text())
    parts = told["bytes"]
    assert parts["peak"] == sum(count for name, count in parts.items() if name != "peak")
    assert told["memory_bytes"] == 2 << 30
    assert told["peak_bytes"]["plain"] == parts["peak"] > told["peak_bytes"]["checkpointed"]
    assert plan(
        PolicyConfig(str(config), "d", ("r.py:r",), device="cpu"), memory=2 << 30
    ).to_json() == told | {"model": str(config)}, "from config.json"
    sft = ["plan", "sft", "--model", str(config), "--device", "cpu", "--memory", "1MiB"]
    assert main([*sft, "--output-json", "-"]) == 3
    small = json.loads(capsys.readouterr().out)
    assert (small["fits"], small["largest_tokens_per_microbatch"]) == (
        False,
        {"plain": 0, "checkpointed": 0},
    )
    assert main(sft) == 3
    assert "nothing fits" in capsys.readouterr().out


def test_a_gpu_that_is_elsewhere(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(MEDIUM | {"max_position_embeddings": 1 << 20}))
    asked = ["plan", "ppo", "--prompts_per_step", "256", "--model", str(tmp_path)]
    asked += ["--device", "cuda:7"]
    assert main([*asked, "--memory", "80GiB", "--output-json", "-"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["dtype"] == "bfloat16"
    left = (80 << 30) - sum(
        told["bytes"][name]
        for name in ("weights", "reference", "gradients", "optimizer", "rotary", "workspace")
    )
    assert told["bytes"]["kv_pool"] == pytest.approx(0.9 * left, rel=1e-4), "what training leaves"
    assert told["bytes"]["activations"] == 0, "they lie in it"
    assert main(asked) == 3
    assert main([*asked[:-1], "gpu", "--memory", "80GiB"]) == 2


def test_the_cache_of_a_run_is_what_training_leaves(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(MEDIUM | {"max_position_embeddings": 1 << 20}))
    config = PolicyConfig(
        str(tmp_path), "d", ("r.py:r",), device="cuda:3", tokens_per_microbatch=2048
    )
    assert cache_for(replace(config, device="cpu")) == CacheConfig()
    for free in (2 << 30, 80 << 30):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 96 << 30))
        found = plan(config, memory=free)
        assert found.fits
        assert found.parts.peak <= free
        decoder = Decoder(model_config(MEDIUM), dtype=torch.bfloat16, device="meta")
        assert (cache_for(config).num_blocks + 1) * block_bytes(
            decoder.weights(), 16
        ) == found.parts.kv_pool
        assert found.parts.kv_pool > 0.5 * free
    small = plan(
        replace(config, model=str(tmp_path)),
        memory=80 << 30,
        cache=CacheConfig(memory_fraction=0.25),
    )
    assert small.parts.kv_pool == pytest.approx((80 << 30) / 4, rel=0.01)
    (tmp_path / "config.json").write_text(json.dumps(MEDIUM))  # 256 positions
    assert cache_for(config).num_blocks == 64 * 256 // 16, "never more than the run asks for"
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30 << 20, 96 << 30))
    with pytest.raises(
        ConfigError,
        match=r"of 30.00 MiB free on cuda:3, .* take [\d.]+ MiB, and a micro-batch of 2048 tokens "
        r".* lower tokens_per_microbatch",
    ):
        cache_for(config)


def test_the_options_of_a_run_are_the_plans(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(MEDIUM))
    (tmp_path / "run.yaml").write_text(
        f"model: {tmp_path}\ndata: d.jsonl\ntokens_per_microbatch: 100\ncheckpoint_activations: "
        "true\ndtype: bfloat16\n"
    )
    assert (
        main(
            [
                "plan",
                "reward",
                "--config",
                str(tmp_path / "run.yaml"),
                "--device",
                "cpu",
                "--output-json",
                "-",
                "--tokens_per_microbatch",
                "50",
            ]
        )
        == 0
    )
    told = json.loads(capsys.readouterr().out)
    assert (told["tokens_per_microbatch"], told["checkpoint_activations"], told["dtype"]) == (
        50,
        True,
        "bfloat16",
    )


@pytest.mark.parametrize(
    "options, message",
    [
        (
            ["sft", "--model", "{}/none", "--device", "cpu"],
            "none does not exist; expected a model directory or a Hugging Face id",
        ),
        (["sft", "--model", "{}/odd.json", "--device", "cpu"], "unknown model_type 'bert'"),
        (["sft", "--model", "{}/broken.json", "--device", "cpu"], "expected a JSON object"),
        (
            ["sft", "--model", "{}", "--device", "cpu", "--memory", "lots"],
            "expected an amount of memory above 0",
        ),
        (["sft", "--device", "cpu"], "expected --model, which cannot be left out"),
        (["pppo", "--model", "{}"], "unknown stage 'pppo', did you mean ppo?"),
        (
            ["sft", "--model", "{}", "--tokens_per_microbach", "5"],
            "did you mean --tokens_per_microbatch?",
        ),
        (["sft", "--model", "{}", "--memory"], "--memory"),
    ],
)
def test_errors_are_one_message_and_exit_2(options, message, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(MEDIUM))
    (tmp_path / "odd.json").write_text('{"model_type": "bert"}')
    (tmp_path / "broken.json").write_text("{")
    assert main(["plan", *(option.format(tmp_path) for option in options)]) == 2
    assert message in capsys.readouterr().err


def test_the_exit_code_says_whether_the_run_fits(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(MEDIUM))
    command = ["plan", "sft", "--model", str(tmp_path), "--device", "cpu", "--memory"]
    assert main([*command, "1MiB"]) == 3
    assert "nothing fits" in capsys.readouterr().out
    assert main([*command, "64GiB"]) == 0


def test_help(capsys):
    assert main(["plan", "--help"]) == 0
    assert main(["plan", "ppo", "--help"]) == 0
    assert "--memory AMOUNT" in capsys.readouterr().out
    assert main(["plan"]) == 2


# ---- a process of its own, with a model of a GiB -------------------------------------------------
GIBIBYTE = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 18,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}


@pytest.mark.full
@needs_kernels
@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_a_process_with_a_model_of_a_gibibyte_peaks_where_the_plan_says(checkpointed):
    script = Path(__file__).with_name("measure_peak.py")
    found = subprocess.run(
        [
            sys.executable,
            str(script),
            json.dumps({"sizes": GIBIBYTE, "tokens": 512, "checkpointed": checkpointed}),
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    told = json.loads(found.stdout.splitlines()[-1])
    assert told["weights"] > 1 << 30
    assert told["planned"] == pytest.approx(told["measured"], rel=0.1), told
    kept = sum(
        told["parts"][name] for name in ("weights", "reference", "optimizer", "kv_pool", "rotary")
    )
    assert told["rollout"] <= 1.05 * kept, (
        "a rollout after training: what training freed was given back"
    )


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2", "llama, short texts"])
def test_the_tables_of_cos_and_sin_are_planned(kind):
    """They are those of every position that a text may have, of each model that is loaded: here the
    policy and its reference."""
    kinds = KINDS | {
        "gemma3": {"model_type": "gemma3_text", "sliding_window": 9},
        "llama, short texts": KINDS["llama"],
    }
    sizes = (
        SIZES
        | kinds[kind]
        | {"max_position_embeddings": 3000}
        | ({"n_positions": 3000} if kind == "gpt2" else {})
    )
    config = replace(
        STAGES["ppo"],
        device="cpu",
        dtype="float32",
        max_prompt_length=500 if "short" in kind else None,
    )
    longest = 500 + config.generation.max_new_tokens if "short" in kind else 3000
    held = 0
    for _ in ("policy", "reference"):
        decoder = Decoder.random(model_config(sizes), 0)
        with torch.no_grad():
            HybridActor(decoder).score(batch(longest, 90, sequences=1))
        held += sum(table.nbytes for table in decoder.weights().rope_table.tensors)
    found = Planner(model_config(sizes), config)
    assert found.rotary == held
    assert (held > 0) == (kind != "gpt2")
    assert (
        found.parts(64, False).fixed
        == found.weights
        + found.reference
        + found.gradients
        + found.optimizer
        + found.kv_pool
        + held
    )
    assert Planner(
        model_config(sizes), replace(STAGES["sft"], device="cpu", max_length=300)
    ).rotary == held / 2 * (512 / (1024 if "short" in kind else 4096))


# ---- several devices -----------------------------------------------------------------------------
def test_what_a_device_holds_of_a_divided_run():
    """Moments and masters of what it owns, its share of the sequences, and the sums of lanes that
    wait; all else is whole."""
    model, settings = model_config(MEDIUM), {"dtype": "bfloat16", "device": "cpu"}
    ppo = PolicyConfig("m", "d", ("r.py:r",), "ppo", prompts_per_step=10, **settings)
    one, four = Planner(model, ppo), Planner(model, ppo, devices=4)
    for name in ("weights", "gradients", "reference", "rotary"):
        assert getattr(one, name) == getattr(four, name), name
    owned = owners_of({n: p.numel() for n, p in trained_of(four)}, 4)
    held = [
        sum(4 + 12 * p.numel() for n, p in trained_of(four) if owned[n] == rank)
        for rank in range(4)
    ]
    head = 4 + 8 * (model.hidden_size + 1)  # at most: the value head is somebody's
    assert max(held) <= four.optimizer <= max(held) + head
    assert one.optimizer / 4 <= four.optimizer < one.optimizer / 2
    samples = ppo.samples_per_prompt
    assert (one.demand.sequences, four.demand.sequences) == (10 * samples, 3 * samples)
    eight = replace(ppo, parallel=ParallelConfig(8))
    assert Planner(model, eight).gradients == 4 * one.gradients  # 8 lanes: three sums wait
    assert Planner(model, eight, devices=4).gradients == 2 * one.gradients
    assert Planner(model, eight, devices=8).gradients == one.gradients
    strict = replace(ppo, strict=True)
    assert Planner(model, strict).gradients == one.gradients
    assert Planner(model, strict, devices=2).gradients == 3 * one.gradients
    with pytest.raises(ConfigError, match="a multiple of the 3 ranks, got 8"):
        Planner(model, eight, devices=3)


def trained_of(planned):
    return [(n, p) for n, p in planned._decoder.named_parameters() if p.requires_grad]


def test_the_command_line_plans_for_several_devices(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(MEDIUM))
    command = ["plan", "sft", "--model", str(tmp_path), "--device", "cpu", "--memory", "64GiB"]
    found = []
    for devices in ("1", "4"):
        assert main([*command, "--devices", devices, "--output-json", "-"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert [one["devices"] for one in found] == [1, 4]
    assert found[1]["bytes"]["optimizer"] < found[0]["bytes"]["optimizer"] / 2
    assert main([*command, "--devices", "4"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "each of 4" in said
    assert "with tensor parallelism: computed; not built" in said
    groups, parts = found[1]["tensor_parallel_fixed_bytes"], found[1]["bytes"]
    assert sorted(groups) == ["2", "4"]
    assert parts["weights"] / 4 < groups["4"] < groups["2"] < parts["weights"] + parts["optimizer"]
    assert not found[0]["tensor_parallel_fixed_bytes"]
    assert main(command) == 0
    assert "tensor parallelism" not in capsys.readouterr().out
    assert main([*command, "--devices", "none"]) == 2
