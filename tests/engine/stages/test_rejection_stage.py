"""fusedrl train rejection on the tiny model: what is kept, what is learnt from it, and that cuts,
resuming and empty rounds do what they should."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from fusedrl.engine.base.errors import ConfigError, RewardError
from fusedrl.engine.base.packing import PackedBatch
from fusedrl.engine.cli.main import main
from fusedrl.engine.config import (
    GenerationConfig,
    LoRAConfig,
    OptimConfig,
    RejectionConfig,
    RunConfig,
)
from fusedrl.engine.model.weights import load_decoder
from fusedrl.engine.rollout.rollout import Rollout
from fusedrl.engine.stages import rejection
from fusedrl.engine.stages.rejection import best, train_rejection

REWARDS = """
def likes_w3(prompts, completions, completion_ids, **columns):
    return [float(sum(word == "w3" for word in text.split())) for text in completions]

def sometimes_nan(prompts, completions, completion_ids, **columns):
    return [float("nan") if i == 0 else float(len(ids)) for i, ids in enumerate(completion_ids)]

def nothing(prompts, completions, completion_ids, **columns):
    return [float("nan")] * len(completions)

def same(prompts, completions, completion_ids, **columns):
    return [2.0] * len(completions)
"""


@pytest.fixture
def config(tiny_model, tmp_path, write_jsonl, device):
    (tmp_path / "rewards.py").write_text(REWARDS)
    data = write_jsonl(
        "prompts.jsonl",
        [{"prompt": " ".join(f"w{(3 * i + j) % 28}" for j in range(1 + i % 5))} for i in range(12)],
    )

    def make(reward="likes_w3", name="run", **options):
        defaults = dict(
            device=str(device),
            dtype="float32",
            steps=3,
            prompts_per_step=6,
            samples_per_prompt=4,
            tokens_per_microbatch=60,
            generation=GenerationConfig(max_new_tokens=8),
            optim=OptimConfig(lr=3e-3, schedule="constant"),
            run=RunConfig(dir=str(tmp_path / name), progress=False),
        )
        return RejectionConfig(
            model=str(tiny_model),
            data=data,
            reward=(f"{tmp_path / 'rewards.py'}:{reward}",),
            **(defaults | options),
        )

    return make


def _metrics(config):
    return [
        json.loads(line)
        for line in (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()
    ]


def _weights(device, config):
    return {
        name: p.detach()
        for name, p in load_decoder(
            Path(config.run.dir) / "model", dtype="float32", device=device
        ).named_parameters()
    }


# ---- what is kept --------------------------------------------------------------------------------
def _rollout(device, scores, groups):
    batch = PackedBatch.from_sequences((([1], [2]) for _ in scores), device=device).with_columns(
        scores=torch.tensor(scores, device=device), group_ids=torch.tensor(groups, device=device)
    )
    return Rollout(batch, [], [], {})


def test_the_best_of_each_prompt_are_kept(device):
    found = _rollout(device, [1.0, 3.0, 3.0, 0.5, -2.0, -1.0, 7.0], [5, 5, 5, 5, 9, 9, 2])
    assert best(found, 1, None) == [1, 5, 6]  # of equal scores the first
    assert best(found, 2, None) == [1, 2, 4, 5, 6]
    assert best(found, 4, None) == [0, 1, 2, 3, 4, 5, 6]
    assert best(found, 4, 1.0) == [0, 1, 2, 6]
    assert best(found, 1, 3.0) == [1, 6]
    assert best(found, 4, 8.0) == []


# ---- the stage -----------------------------------------------------------------------------------
def test_the_reward_rises(config):
    result = train_rejection(
        config(
            steps=12,
            prompts_per_step=12,
            samples_per_prompt=8,
            keep=2,
            tokens_per_microbatch=4000,
            minibatches=2,
            optim=OptimConfig(lr=1e-2, schedule="constant"),
        )
    )
    rows = _metrics(config())
    assert rows[-1]["reward"] > rows[0]["reward"] + 1.0
    for row in rows:
        assert row["kept/reward"] >= row["reward"]
        assert row["kept/fraction"] == 0.25
        assert (row["kept/prompts_skipped"], row["updates"]) == (0.0, 2.0)
        assert all(math.isfinite(value) for value in row.values())
    assert result.metrics["reward"] == rows[-1]["reward"]
    AutoModelForCausalLM.from_pretrained(result.model)


def test_prompts_and_samples_are_new_ones_at_every_step(config, monkeypatch):
    seen = []
    original = rejection.rollout
    monkeypatch.setattr(
        rejection, "rollout", lambda *args, **more: seen.append(original(*args, **more)) or seen[-1]
    )
    # two passes over the 12 prompts, by the same weights
    train_rejection(config(steps=4, optim=OptimConfig(lr=1e-12)))
    prompts = [{prompt.prompt for prompt in step.prompts} for step in seen]
    assert [len(step) for step in prompts] == [6] * 4
    assert not prompts[0] & prompts[1]
    assert prompts[0] | prompts[1] == prompts[2] | prompts[3]
    drawn = [
        {
            (p.prompt, tuple(c.token_ids))
            for p, c in zip(step.prompts, step.completions, strict=True)
        }
        for step in seen
    ]
    assert len((drawn[0] | drawn[1]) & (drawn[2] | drawn[3])) <= 12, (
        "a prompt that comes again gets other samples"
    )
    assert sorted({group for step in seen for group in step.batch.group_ids.tolist()}) == list(
        range(24)
    )


def test_the_first_loss_is_the_cross_entropy_of_the_kept(config, monkeypatch):
    seen = []
    original = rejection.imitate
    monkeypatch.setattr(
        rejection,
        "imitate",
        lambda actor, optimizer, batch, kept, *rest: (
            seen.append((batch, kept)) or original(actor, optimizer, batch, kept, *rest)
        ),
    )
    one = config(steps=1, keep=2)
    train_rejection(one)
    ((batch, kept),) = seen
    model = AutoModelForCausalLM.from_pretrained(one.model, dtype=torch.float64)
    total = count = 0
    for b in kept:
        alone = batch.select([b])
        with torch.no_grad():
            logp = model(alone.token_ids[None]).logits[0].log_softmax(-1)
        for t in alone.action_mask.nonzero()[:, 0].tolist():
            total, count = total - logp[t - 1, alone.token_ids[t]].item(), count + 1
    assert len(kept) == 12
    (row,) = _metrics(one)
    assert row["loss"] == pytest.approx(total / count, rel=1e-5)
    assert row["kept/mean_length"] == pytest.approx(count / len(kept))


def test_the_micro_batch_split_does_not_change_the_update(config):
    norms = []
    for name, tokens in (("whole", 10_000), ("cut", 12)):
        one = config(name=name, steps=1, keep=2, tokens_per_microbatch=tokens)
        train_rejection(one)
        norms.append(_metrics(one)[0]["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


@pytest.mark.cpu_only("bitwise resumption is promised on a CPU")
@pytest.mark.parametrize("lora", [None, LoRAConfig(rank=4)], ids=["full", "lora"])
def test_resume_continues_bitwise(config, lora, device):
    def of(name):
        made = config(name=name, steps=4, keep=2, minibatches=2, epochs=2, lora=lora)
        return replace(made, run=replace(made.run, save_every=1))

    whole, parts = of("whole"), of("parts")
    train_rejection(whole)
    original, calls = rejection.rollout, iter(range(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            rejection,
            "rollout",
            lambda *a, **more: (
                original(*a, **more)
                if next(calls, None) is not None
                else (_ for _ in ()).throw(KeyboardInterrupt)
            ),
        )
        with pytest.raises(KeyboardInterrupt):
            train_rejection(parts)
    train_rejection(replace(parts, run=replace(parts.run, resume=True)))
    ours, theirs = _weights(device, whole), _weights(device, parts)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    a, b = (
        [
            {k: v for k, v in row.items() if not k.startswith(("timing/", "tokens_per_s", "mem/"))}
            for row in _metrics(c)
        ]
        for c in (whole, parts)
    )
    assert a == b
    assert len(a) == 4
    assert (Path(whole.run.dir) / "adapter").is_dir() is (lora is not None)


def test_prompts_without_a_good_sample_are_skipped_and_empty_rounds_train_nothing(config, device):
    some = config(name="some", keep=4, min_score=1.0)
    train_rejection(some)
    rows = _metrics(some)
    assert any(0 < row["kept/prompts_skipped"] < 6 for row in rows)
    assert all(row["kept/reward"] >= 1.0 for row in rows if row["updates"])
    none = config(name="none", keep=4, min_score=100.0, steps=2)
    train_rejection(none)
    start = {
        name: p.detach()
        for name, p in load_decoder(none.model, dtype="float32", device=device).named_parameters()
    }
    for row in _metrics(none):
        assert (row["updates"], row["kept/fraction"], row["kept/prompts_skipped"]) == (
            0.0,
            0.0,
            6.0,
        )
        assert "loss" not in row
        assert "kept/reward" not in row
    assert all(torch.equal(start[name], p) for name, p in _weights(device, none).items())


def test_invalid_rewards(config):
    train_rejection(config("sometimes_nan", name="some", steps=1))
    (row,) = _metrics(config(name="some"))
    assert row["completions/invalid"] == 1.0
    with pytest.raises(RewardError, match="24 of 24 samples have no valid reward"):
        train_rejection(config("nothing", name="none"))


def test_rewards_that_tell_nothing_apart_are_said(config, capsys):
    train_rejection(config("same", steps=2))
    lines = [
        line for line in capsys.readouterr().err.splitlines() if "nothing to learn from" in line
    ]
    assert len(lines) == 1
    assert "rejection: step 1: in this rollout the rewards were all equal (now 2)" in lines[0]


def test_a_truncated_sampler_and_few_kept_for_many_minibatches(config):
    one = config(
        steps=2,
        prompts_per_step=3,
        keep=2,
        minibatches=6,
        min_score=1.0,
        generation=GenerationConfig(max_new_tokens=6, top_p=0.9, temperature=0.7),
    )
    train_rejection(one)
    for row in _metrics(one):
        assert row["updates"] == min(6, round(row["kept/fraction"] * 12))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"keep": 5}, "keep <= samples_per_prompt = 4"),
        ({"keep": 4}, "a min_score beside it"),
        ({"keep": 0}, "keep >= 1"),
        ({"steps": 0}, "steps >= 1"),
        ({"minibatches": 7}, "minibatches <= prompts_per_step x keep = 6"),
        ({"generation": GenerationConfig(temperature=0.0)}, "temperature > 0"),
        ({"min_score": math.nan, "keep": 4}, "min_score to be finite"),
        ({"reward_weights": (1.0, 2.0)}, "with as many numbers as there are rewards, 1"),
    ],
)
def test_contradictions_are_refused(config, options, message):
    with pytest.raises(ConfigError, match=message):
        config(**options)


def test_the_commands(tiny_model, tmp_path, write_jsonl, capsys):
    (tmp_path / "rewards.py").write_text(REWARDS)
    base = ["--model", str(tiny_model), "--device", "cpu", "--run.progress", "false"]
    prompts = write_jsonl("p.jsonl", [{"prompt": "w1 w2"}, {"prompt": "w3"}])
    assert (
        main(
            [
                "train",
                "rejection",
                *base,
                "--data",
                prompts,
                "--reward",
                f"{tmp_path / 'rewards.py'}:likes_w3",
                "--steps",
                "1",
                "--prompts_per_step",
                "2",
                "--samples_per_prompt",
                "3",
                "--generation.max_new_tokens",
                "5",
                "--run.dir",
                str(tmp_path / "r"),
            ]
        )
        == 0
    )
    assert json.loads((tmp_path / "r" / "config.json").read_text())["stage"] == "RejectionConfig"
    assert len((tmp_path / "r" / "samples.jsonl").read_text().splitlines()) == 2


def test_the_commands_of_dpo(tiny_model, tmp_path, write_jsonl, capsys):
    base = ["--model", str(tiny_model), "--device", "cpu", "--run.progress", "false"]
    pairs = write_jsonl(
        "pairs.jsonl", [{"prompt": "w1", "chosen": f"w{i}", "rejected": "w20"} for i in range(8)]
    )
    assert (
        main(
            [
                "train",
                "dpo",
                *base,
                "--data",
                pairs,
                "--loss",
                "ipo",
                "--lora.rank",
                "2",
                "--run.dir",
                str(tmp_path / "d"),
            ]
        )
        == 0
    )
    assert (tmp_path / "d" / "adapter").is_dir()
    assert json.loads((tmp_path / "d" / "config.json").read_text())["config"]["optim"]["lr"] == 1e-6
    capsys.readouterr()
    for arguments, message in (
        (["dpo", "--beta", "0"], "beta > 0"),
        (["dpo", "--loss", "ipo", "--label_smoothing", "0.1"], "label_smoothing 0 with loss ipo"),
        (["dpo", "--loss", "dpo"], "one of sigmoid, ipo, ipo_mean, hinge, robust, simpo, orpo"),
        (["dpo", "--bta", "1"], "did you mean --beta?"),
        (["rejection", "--reward", "r.py:f", "--keep", "9"], "keep <= samples_per_prompt = 8"),
    ):
        assert main(["train", arguments[0], "--model", "m", "--data", "d", *arguments[1:]]) == 2
        assert message in capsys.readouterr().err
    assert main(["train", "dpo", "--help-all"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "--nll_coef" in shown
    assert "sums" in shown
