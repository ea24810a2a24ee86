"""Distillation on the policy's own samples: the loss against its definition, runs that come nearer
to a teacher, and teachers that cannot be used."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.support.tiny import write_model

from fusedrl.engine.actor import HybridActor
from fusedrl.engine.base.errors import ConfigError
from fusedrl.engine.base.packing import PackedBatch
from fusedrl.engine.config import (
    GenerationConfig,
    KLConfig,
    OptimConfig,
    PolicyConfig,
    RunConfig,
)
from fusedrl.engine.generation.sampler import SamplingParams
from fusedrl.engine.policy.control import Control
from fusedrl.engine.policy.micro_loss import RolloutLoss
from fusedrl.engine.policy.objectives import minibatch_weights
from fusedrl.engine.rollout.reference import load_reference
from fusedrl.engine.stages.policy import train_policy
from fusedrl.engine.watch.plan import Planner, read_model_config

TEMPERATURE = 0.8


@pytest.fixture
def make(tiny_model, tiny_teacher, tmp_path, write_jsonl, device):
    rows = [{"prompt": f"w{i % 28} w{(5 * i + 1) % 28}"} for i in range(32)]
    data = write_jsonl("prompts.jsonl", rows)

    def config(name="run", **changes):
        defaults = dict(
            algorithm="distill",
            reference_model=str(tiny_teacher),
            device=str(device),
            dtype="float32",
            steps=12,
            prompts_per_step=16,
            tokens_per_microbatch=120,
            generation=GenerationConfig(max_new_tokens=12),
            optim=OptimConfig(lr=1e-2, schedule="constant"),
            run=RunConfig(dir=str(tmp_path / name), progress=False),
        )
        return PolicyConfig(str(tiny_model), data, ("none",), **(defaults | changes))

    return config


def metrics_of(config):
    text = (Path(config.run.dir) / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def defined(direction, ours, theirs):
    """The divergence of each row in float64, as beta 1, 0 and 0.5 of generalised distillation have
    it: beta KL(teacher || mixture) + (1 - beta) KL(student || mixture)."""
    p, r = (torch.log_softmax(z.double() / TEMPERATURE, -1) for z in (ours, theirs))
    if direction == "reverse":
        return (p.exp() * (p - r)).sum(-1)
    if direction == "forward":
        return (r.exp() * (r - p)).sum(-1)
    m = torch.logaddexp(p, r) - math.log(2)
    return 0.5 * (r.exp() * (r - m)).sum(-1) + 0.5 * (p.exp() * (p - m)).sum(-1)


@pytest.mark.parametrize("direction", ["reverse", "forward", "jsd"])
def test_the_gradient_is_that_of_the_definition(make, direction, device):
    """Of a teacher with other sizes, and a vocabulary that is padded further."""
    config = make(
        kl=KLConfig(direction=direction),
        generation=GenerationConfig(max_new_tokens=12, temperature=TEMPERATURE),
    )
    actor = HybridActor.from_pretrained(config.model, dtype="float32", device=device)
    reference = load_reference(config, actor)
    prompts = [[1, 5, 9], [1, 20], [1, 7, 8, 9, 10]]
    params = SamplingParams(max_new_tokens=12, temperature=TEMPERATURE, n=3, seed=4)
    batch = PackedBatch.from_completions(prompts, actor.generate(prompts, params), device=device)
    zeros = torch.zeros(batch.num_tokens, device=device)
    batch = batch.with_columns(advantages=zeros, weights=minibatch_weights(config, batch))
    loss_of = RolloutLoss.of(config, actor, reference, batch, Control(config))
    found = loss_of(batch)
    found.loss.backward()
    ours = {name: p.grad.clone() for name, p in actor.decoder.named_parameters()}
    actor.decoder.zero_grad(set_to_none=True)

    hidden = actor.forward(batch)
    theirs, head = reference.hidden(batch)
    V = len(actor.decoder.head_weight)
    assert len(head) == V + 8
    rows = torch.tensor(
        [t for t in range(batch.num_tokens - 1) if batch.action_mask[t + 1]], device=device
    )
    student = hidden[rows].double() @ actor.decoder.head_weight.double().T
    teacher = theirs[rows].double() @ head[:V].double().T
    divergence = defined(direction, student, teacher)
    assert divergence.min() > 0.01
    divergence.mean().backward()
    assert math.isclose(found.loss.item(), divergence.mean().item(), rel_tol=1e-5)
    assert math.isclose(found.policy.ref_kl.item(), divergence.mean().item(), rel_tol=1e-5)
    for name, p in actor.decoder.named_parameters():
        scale = p.grad.abs().max().item()
        assert (ours[name] - p.grad).abs().max().item() <= 2e-5 * scale + 1e-9, name


@pytest.mark.parametrize("direction", ["reverse", "forward", "jsd"])
def test_a_student_comes_nearer_to_its_teacher(make, direction, monkeypatch):
    """And the teacher scores nothing beside the loss."""
    from fusedrl.engine.rollout.reference import Frozen

    monkeypatch.setattr(Frozen, "score", None)
    config = make(kl=KLConfig(direction=direction))
    train_policy(config)
    rows = metrics_of(config)
    assert rows[-1]["divergence"] < 0.75 * rows[0]["divergence"]
    assert rows[0]["loss/policy_avg"] == pytest.approx(rows[0]["divergence"], rel=1e-5)
    assert all(row["reward"] == 0 for row in rows)


def test_the_kl_to_a_teacher_is_a_term_of_any_row(make, tmp_path):
    """With weight enough, a reward that wants something else is overruled."""
    (tmp_path / "rewards.py").write_text(
        "def short(prompts, completions, completion_ids, **_):\n"
        "    return [100.0 - len(ids) for ids in completion_ids]\n"
    )
    kl = KLConfig(coef=1.0, placement="loss", estimator="full")
    config = replace(
        make(algorithm="grpo", kl=kl, samples_per_prompt=4, prompts_per_step=4),
        reward=(f"{tmp_path / 'rewards.py'}:short",),
    )
    train_policy(config)
    rows = metrics_of(config)
    assert rows[-1]["divergence"] < 0.8 * rows[0]["divergence"]
    assert rows[-1]["kl"] < rows[0]["kl"]


def test_measured_rewards_and_the_kl_of_sequences_on_request(make, tmp_path):
    (tmp_path / "rewards.py").write_text(
        "def length(prompts, completions, completion_ids, **_):\n"
        "    return [100.0 + len(ids) for ids in completion_ids]\n"
    )
    config = make(
        monitor_reward=(f"{tmp_path / 'rewards.py'}:length",),
        kl=KLConfig(measure=True),
        steps=2,
    )
    train_policy(config)
    assert {"gold/length/mean", "kl", "divergence"} <= metrics_of(config)[-1].keys()


def test_with_an_adapter_the_reference_is_the_teacher(make):
    from fusedrl.engine.config import LoRAConfig

    config = make(lora=LoRAConfig(rank=4), steps=4)
    assert config.reference_kind == "frozen"
    train_policy(config)
    rows = metrics_of(config)
    assert rows[0]["divergence"] > 0.1  # not 0, as to the policy without its adapter
    assert rows[-1]["divergence"] < rows[0]["divergence"]


def test_what_cannot_be_learnt_from_is_refused(make, tiny_model, tmp_path):
    with pytest.raises(ConfigError, match="expected reference_model, the teacher"):
        train_policy(make(reference_model=None))
    with pytest.raises(ConfigError, match=r"kl.coef > 0 with kl.placement = loss"):
        make(kl=KLConfig(coef=0.0))
    with pytest.raises(ConfigError, match=r"kl.direction reverse, or kl.estimator = full"):
        make(algorithm="grpo", kl=KLConfig(direction="jsd"))
    with pytest.raises(ConfigError, match="only with a KL to it"):
        make(algorithm="dapo", samples_per_prompt=4)
    other = write_model(tmp_path / "other")
    text = (other / "tokenizer.json").read_text(encoding="utf-8")
    (other / "tokenizer.json").write_text(text.replace('"w3"', '"W3"'), encoding="utf-8")
    with pytest.raises(ConfigError, match="1 of the policy's are not the same there, such as 'w3'"):
        train_policy(make(reference_model=str(other)))
    (tmp_path / "empty").mkdir()
    with pytest.raises((ConfigError, FileNotFoundError), match="empty"):
        train_policy(make(reference_model=str(tmp_path / "empty")))


def test_plan_counts_the_teacher(make, tiny_model, tiny_teacher):
    def reference(config):
        return Planner(read_model_config(config.model), config).reference

    weights = sum(
        p.nbytes
        for p in HybridActor.from_pretrained(
            str(tiny_teacher), dtype="float32", device="cpu"
        ).decoder.parameters()
    )
    assert reference(make()) == weights
    assert reference(make(reference_model=str(tiny_model))) < weights / 2
