"""checkpoint_activations: the same gradients, bit for bit, for less memory."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fusedrl.engine import HybridActor, PackedBatch
from fusedrl.engine.config import RunConfig, SFTConfig
from fusedrl.engine.model.configuration import model_config
from fusedrl.engine.model.decoder import Decoder, Layer
from fusedrl.engine.model.heads import RewardModel
from fusedrl.engine.stages.sft import train_sft
from fusedrl.kernels.runtime import native

SIZES = {
    "vocab_size": 61,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
KINDS = {
    "llama": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "sliding_window": 5},
}


def batch(device):
    draw = torch.Generator().manual_seed(1)
    return PackedBatch.from_sequences(
        (
            (
                torch.randint(61, (n,), generator=draw).tolist(),
                torch.randint(61, (m,), generator=draw).tolist(),
            )
            for n, m in ((1, 12), (5, 0), (7, 20), (3, 1))
        ),
        device=device,
    )


def trained(device, actor, packed=None):
    """The loss's bits and every gradient's."""
    packed = packed or batch(device)
    for parameter in actor.parameters():
        parameter.grad = None
    logp, entropy = actor.logprobs(packed, actor.forward(packed))
    loss = (logp.square() + 0.1 * entropy).sum()
    loss.backward()
    return [loss.detach(), *(p.grad for p in actor.parameters() if p.grad is not None)]


def equal(found, expected):
    return len(found) == len(expected) and all(
        torch.equal(a, b) for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("strict", [False, True], ids=["fast", "strict"])
def test_gradients_are_the_same_bits(kind, dtype, strict, device):
    if strict and not native.capability:
        pytest.skip("the native extension is not built")
    actor = HybridActor(
        Decoder.random(model_config(SIZES | KINDS[kind]), 0, dtype=dtype, device=device),
        strict=strict,
    )
    plain = trained(device, actor)
    actor.decoder.checkpoint_activations = True
    checkpointed = trained(device, actor)
    assert equal(checkpointed, plain)
    assert equal(trained(device, actor), plain), "and again"
    with torch.no_grad():
        actor.decoder.norm.mul_(1.5)
    assert not equal(trained(device, actor), plain), "the comparison can fail"


def test_with_the_weights_of_a_module_that_someone_else_trains(device):
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SIZES | KINDS["qwen3"])).to(
        device
    )
    actor = HybridActor.from_module(module)
    plain = trained(device, actor)
    actor.decoder.checkpoint_activations = True
    assert equal(trained(device, actor), plain)


def test_a_reward_model_trains_on_a_checkpointed_trunk(device):
    model = RewardModel.from_decoder(
        Decoder.random(model_config(SIZES | KINDS["llama"]), 0, device=device)
    )
    grads = []
    for checkpointed in (False, True):
        model.decoder.checkpoint_activations = checkpointed
        grads.append(
            torch.autograd.grad(
                model(batch(device)).square().sum(), list(model.parameters()), allow_unused=True
            )
        )
    assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_the_layers_run_twice_and_scoring_runs_them_once(monkeypatch, device):
    actor = HybridActor(Decoder.random(model_config(SIZES | KINDS["llama"]), 0, device=device))
    actor.decoder.checkpoint_activations = True
    runs = []
    forward = Layer.forward
    monkeypatch.setattr(
        Layer, "forward", lambda self, *args: (runs.append(1), forward(self, *args))[1]
    )
    trained(device, actor)
    assert len(runs) == 2 * 4
    runs.clear()
    actor.score(batch(device))
    assert len(runs) == 4


def peak_bytes(decoder, packed):
    """The most memory that one forward and backward holds beyond what was there, as torch's CPU
    allocator counts it."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as recorded:
        decoder(
            packed.token_ids, packed.positions, packed.cu_seqlens, packed.max_length
        ).sum().backward()
    events = recorded.profiler.kineto_results.events()
    total, peak = 0, 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


def test_the_peak_is_lower(device):
    config = model_config(SIZES | KINDS["llama"] | {"num_hidden_layers": 8})
    decoder, packed = (
        Decoder.random(config, 0, device=device),
        PackedBatch.from_sequences([([1] * 64, [])] * 32, device=device),
    )
    peaks = []
    for checkpointed in (False, True):
        decoder.zero_grad()
        decoder.checkpoint_activations = checkpointed
        peaks.append(peak_bytes(decoder, packed))
    N, H = packed.num_tokens, config.hidden_size
    assert peaks[1] < 0.4 * peaks[0], peaks
    assert peaks[1] > 2 * 7 * N * H * 4, "the boundaries at least"


def test_a_run_ends_in_the_same_model_and_may_change_its_mind(tiny_model, write_jsonl, tmp_path):
    data = write_jsonl(
        "sft.jsonl", [{"prompt": "w1 w2", "completion": f" w{i} w{i + 1}"} for i in range(12)]
    )
    config = SFTConfig(str(tiny_model), data, sequences_per_step=4)
    runs = [RunConfig(dir=str(tmp_path / name), progress=False) for name in "ab"]
    results = [
        train_sft(replace(config, run=run, checkpoint_activations=checkpointed))
        for run, checkpointed in zip(runs, (False, True), strict=True)
    ]
    a, b = ((tmp_path / name / "model" / "model.safetensors").read_bytes() for name in "ab")
    assert a == b
    resumed = train_sft(
        replace(config, run=replace(runs[0], resume=True), checkpoint_activations=True)
    )
    assert resumed.metrics == results[0].metrics
