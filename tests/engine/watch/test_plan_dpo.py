"""fusedrl plan of DPO and of rejection sampling: against the objects that the stages make, and the
allocator."""

import json
from dataclasses import replace

import pytest
import torch
from tests.engine.watch.test_plan import (
    KINDS,
    MEDIUM,
    SIZES,
    allocator_peak,
    held_bytes,
    model_of,
    needs_kernels,
)

from fusedrl.engine.cli.main import main
from fusedrl.engine.config import DPOConfig, LoRAConfig, PolicyConfig, RejectionConfig, SFTConfig
from fusedrl.engine.generation.cache import CacheConfig, KVCache
from fusedrl.engine.model.configuration import model_config
from fusedrl.engine.optim.adamw import make_optimizer
from fusedrl.engine.preference.losses import pair_scores
from fusedrl.engine.preference.pairs import TokenPair, pack_pairs, sequences_of
from fusedrl.engine.rollout.reference import load_reference
from fusedrl.engine.stages.dpo import weighted_loss, with_reference
from fusedrl.engine.watch.plan import Planner, cache_for

DPO, REJECTION = DPOConfig("m", "d"), RejectionConfig("m", "d", ("r.py:r",))


def pairs_of(count, length, vocabulary):
    draw = torch.Generator().manual_seed(0)

    def ids(n):
        return torch.randint(vocabulary, (n,), generator=draw).tolist()

    return [
        TokenPair(ids(length // 2), ids(length // 2), ids(length - length // 2))
        for _ in range(count)
    ]


def dpo_of(sizes, dtype, directory, **options):
    """(policy, reference, config) of a DPO run on a random model."""
    model = model_of(sizes, "sft", dtype)
    model.save_pretrained(directory)
    config = replace(DPO, model=str(directory), dtype=dtype, device="cpu", **options)
    if config.lora is not None:
        model.add_adapter(config.lora)
    return model, load_reference(config, model), config


@needs_kernels
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "qwen3 tied"])
@pytest.mark.parametrize("lora", [None, LoRAConfig(rank=4)], ids=["full", "lora"])
def test_dpo(tmp_path, kind, dtype, lora):
    sizes = SIZES | KINDS[kind]
    model, reference, config = dpo_of(sizes, dtype, tmp_path, lora=lora)
    planned = Planner(model_config(sizes), config)
    optimizer = make_optimizer(model.named_parameters(), lr=1e-3, accumulate="float32")
    pairs = pairs_of(4, 30, 90)
    batch, cuts = pack_pairs(pairs, 10_000, torch.device("cpu"))
    batch = with_reference(reference, batch, cuts)

    class Loss:  # what the stage makes of a micro-batch, as held_bytes wants it
        value_head = None
        parameters = model.parameters
        micro = batch.select(sequences_of(cuts[0]))

        @staticmethod
        def forward(packed):
            return packed

        @staticmethod
        def logprobs(packed, _):
            return [
                weighted_loss(
                    pair_scores(packed, model.logprobs(packed, model.forward(packed))[0]),
                    [pairs[i] for i in cuts[0]],
                    config,
                )
            ]

    for checkpointed in (False, True):
        model.decoder.checkpoint_activations = checkpointed
        found = planned.activation_bytes(batch.num_tokens, checkpointed)
        assert found + planned._kept_logits(batch.num_tokens) == pytest.approx(
            held_bytes(Loss, Loss.micro), rel=0.05
        )
    Loss.logprobs(Loss.micro, None)[0].backward()
    optimizer.step()
    assert planned.weights == sum(p.nbytes for p in model.parameters())
    assert planned.gradients == sum(g.nbytes for g in optimizer.gradients().values())
    assert planned.optimizer == sum(t.nbytes for t in optimizer.state_dict().values())
    assert planned.reference == (
        0 if lora is not None else sum(p.nbytes for p in reference._actor.decoder.parameters())
    )
    assert planned.kv_pool == 0
    host = Planner(model_config(sizes), replace(config, reference="host"))
    assert host.reference == sum(
        p.nbytes for name, p in model.decoder.named_parameters() if "lora" not in name
    ), "on a CPU it is the same memory"


@needs_kernels
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_peak_of_a_step_of_dpo_is_what_the_allocator_sees(tmp_path, dtype):
    sizes = MEDIUM | {"vocab_size": 8000, "num_hidden_layers": 2}
    model, reference, config = dpo_of(sizes, dtype, tmp_path)
    planned, optimizer = (
        Planner(model_config(sizes), config),
        make_optimizer(model.named_parameters(), lr=1e-3, accumulate="float32"),
    )
    pairs = pairs_of(8, 40, 8000)

    def step():
        optimizer.zero_grad()
        batch, cuts = pack_pairs(pairs, 240, torch.device("cpu"))
        batch = with_reference(reference, batch, cuts)
        for cut in cuts:
            micro = batch.select(sequences_of(cut))
            logp, _ = model.logprobs(micro, model.forward(micro))
            weighted_loss(pair_scores(micro, logp), [pairs[i] for i in cut], config).backward()
        optimizer.step()

    step()
    optimizer.zero_grad()
    parts, measured = planned.parts(240, False), allocator_peak(step)
    assert parts.gradients + parts.activations + parts.workspace == pytest.approx(
        measured, rel=0.15
    )


def test_rejection_is_sft_with_a_cache_and_rewards(tmp_path):
    shape = model_config(SIZES | KINDS["llama"])
    reward = tmp_path / "reward"
    reward.mkdir()
    (reward / "config.json").write_text(json.dumps(SIZES | KINDS["llama"]))
    for dtype in ("float32", "bfloat16"):
        sft, found, policy = (
            Planner(
                shape, replace(config, dtype=dtype, device="cpu"), cache=CacheConfig(num_blocks=7)
            )
            for config in (
                SFTConfig("m", "d"),
                REJECTION,
                PolicyConfig("m", "d", ("r.py:r",), "dapo"),
            )
        )
        assert (found.weights, found.gradients, found.optimizer, found.reference) == (
            sft.weights,
            sft.gradients,
            sft.optimizer,
            0,
        )
        assert found.activation_bytes(200, True) == sft.activation_bytes(200, True)
        decoder = model_of(SIZES | KINDS["llama"], "sft", dtype).decoder
        assert (
            found.kv_pool
            == policy.kv_pool
            == KVCache(
                CacheConfig(num_blocks=7), decoder.weights(), 256, decoder.cache_dtype
            ).nbytes
            > 0
        )
        judged = Planner(
            shape, replace(REJECTION, reward=("r.py:r", str(reward)), dtype=dtype, device="cpu")
        )
        assert (
            judged.reference
            == sum(p.nbytes for name, p in decoder.named_parameters() if name != "head") + 4 * 48
        )
    assert cache_for(replace(REJECTION, device="cpu")) == CacheConfig()


def test_the_command_line(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(MEDIUM))
    told = {}
    for stage in ("sft", "dpo", "rejection"):
        assert (
            main(
                [
                    "plan",
                    stage,
                    "--model",
                    str(tmp_path),
                    "--device",
                    "cpu",
                    "--memory",
                    "2GiB",
                    "--output-json",
                    "-",
                ]
            )
            == 0
        )
        told[stage] = json.loads(capsys.readouterr().out)["bytes"]
    assert told["dpo"]["reference"] == told["sft"]["weights"]
    assert told["dpo"]["kv_pool"] == told["sft"]["reference"] == 0
    assert told["rejection"]["kv_pool"] > 0
    assert (
        main(
            [
                "plan",
                "dpo",
                "--model",
                str(tmp_path),
                "--device",
                "cpu",
                "--lora.rank",
                "4",
                "--output-json",
                "-",
            ]
        )
        == 0
    )
    assert json.loads(capsys.readouterr().out)["bytes"]["reference"] == 0
