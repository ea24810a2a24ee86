import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fusedrl.engine.actor import HybridActor
from fusedrl.engine.config import (
    GenerationConfig,
    KLConfig,
    LossConfig,
    OptimConfig,
    PolicyConfig,
    RunConfig,
)
from fusedrl.engine.model.weights import load_decoder
from fusedrl.engine.rewards.rewards import RewardError
from fusedrl.engine.stages import policy
from fusedrl.engine.stages.policy import train_policy
from fusedrl.kernels.runtime import faults

REWARDS = """
def likes_w3(prompts, completions, completion_ids, **columns):
    return [float(sum(word == "w3" for word in text.split())) for text in completions]

def sometimes_nan(prompts, completions, completion_ids, **columns):
    return [float("nan") if i == 0 else float(len(ids)) for i, ids in enumerate(completion_ids)]

def by_prompt(prompts, completions, completion_ids, **columns):
    return [2.0 if prompt.split()[0] in ("w0", "w3", "w6", "w9") else -2.0 for prompt in prompts]

def mostly_nan(prompts, completions, completion_ids, **columns):
    return [float("nan")] * len(completions)

def raises(prompts, completions, completion_ids, **columns):
    raise KeyError("no such thing")

def each_w3(prompts, completions, completion_ids, **columns):
    return [[1.0 if token == 7 else 0.0 for token in ids] for ids in completion_ids]

def short(prompts, completions, completion_ids, **columns):
    return [0.0]
"""


@pytest.fixture
def ppo(tiny_model, tmp_path, write_jsonl, device):
    (tmp_path / "rewards.py").write_text(REWARDS)
    data = write_jsonl(
        "prompts.jsonl",
        [{"prompt": " ".join(f"w{(3 * i + j) % 28}" for j in range(1 + i % 5))} for i in range(12)],
    )

    def make(reward="likes_w3", name="run", **kwargs):
        defaults = dict(
            device=str(device),
            dtype="float32",
            steps=3,
            prompts_per_step=6,
            samples_per_prompt=2,
            epochs=2,
            minibatches=2,
            tokens_per_microbatch=60,
            generation=GenerationConfig(max_new_tokens=8),
            optim=OptimConfig(lr=3e-3, schedule="constant"),
            run=RunConfig(dir=str(tmp_path / name), progress=False),
        )
        return PolicyConfig(
            model=str(tiny_model),
            data=data,
            reward=(f"{tmp_path / 'rewards.py'}:{reward}",),
            **(defaults | kwargs),
        )

    return make


def _dies_after(calls, function):
    """`function` for so many calls, then what Ctrl-C raises."""
    remaining = iter(range(calls))

    def wrapped(*args, **kwargs):
        if next(remaining, None) is None:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    return wrapped


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


def test_ratio_is_exactly_one_before_the_first_update(ppo):
    config = ppo()
    train_policy(config)
    rows = _metrics(config)
    assert len(rows) == 3
    for row in rows:
        assert row["policy/first_ratio_min"] == row["policy/first_ratio_max"] == 1.0
        assert row["policy/first_approxkl"] == row["policy/first_clipfrac"] == 0.0
        assert row["sampling/sampling_logp_difference/max"] <= 1e-4
        assert row["sampling/ratio_outside_fraction"] == 0.0
        assert all(math.isfinite(v) for v in row.values() if isinstance(v, float))
    assert rows[0]["kl"] == pytest.approx(0.0, abs=1e-6)  # the policy is the reference
    assert rows[2]["kl"] > 1e-4
    assert rows[2]["policy/approxkl_avg"] > 0


@pytest.mark.cpu_only("strict mode is the C++ kernels'")
def test_strict_runs_have_no_difference_at_all(ppo):
    train_policy(ppo(strict=True))
    rows = _metrics(ppo())
    assert len(rows) == 3
    for row in rows:
        assert row["sampling/sampling_logp_difference/max"] == 0.0
        assert row["sampling/sampling_logp_difference/mean"] == 0.0
        assert row["policy/first_ratio_min"] == row["policy/first_ratio_max"] == 1.0
    assert rows[0]["kl"] == 0.0, "the reference is the policy, and scored as strictly"
    assert rows[2]["kl"] > 1e-4


def test_the_micro_batch_split_does_not_change_the_update(ppo, device):
    # One rollout, one epoch: the same samples, cut differently. Later steps may sample differently
    # and are not compared.
    results = []
    for name, tokens in (("whole", 10_000), ("cut", 25)):
        config = ppo(name=name, steps=1, epochs=1, minibatches=2, tokens_per_microbatch=tokens)
        train_policy(config)
        results.append((_weights(device, config), _metrics(config)[0]))
    (whole, row), (cut, other) = results
    start = {
        name: p.detach()
        for name, p in load_decoder(config.model, dtype="float32", device=device).named_parameters()
    }
    moved = max((whole[n] - start[n]).abs().max().item() for n in whole)
    assert moved > 1e-3
    for name in whole:
        torch.testing.assert_close(whole[name], cut[name], rtol=0, atol=2e-3 * moved)
    assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


@pytest.mark.cpu_only("bitwise resumption is promised on a CPU")
def test_resume_continues_bitwise(ppo, device):
    whole = ppo(
        name="whole",
        steps=4,
        run=RunConfig(dir=ppo(name="whole").run.dir, save_every=1, progress=False),
        kl=KLConfig(coef=0.1, target=0.5, horizon=50),
    )
    train_policy(whole)
    for stop in (1, 3):
        parts = replace(whole, run=replace(whole.run, dir=whole.run.dir + f"_parts{stop}"))
        # the process "dies" in the step after the last save
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(policy, "rollout", _dies_after(stop, policy.rollout))
            with pytest.raises(KeyboardInterrupt):
                train_policy(parts)
        train_policy(replace(parts, run=replace(parts.run, resume=True)))
        ours, theirs = _weights(device, whole), _weights(device, parts)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        for a, b in zip(_metrics(whole), _metrics(parts), strict=True):
            timing = {k for k in a if k.startswith(("timing/", "tokens_per_s", "mem/"))}
            assert {k: v for k, v in a.items() if k not in timing} == {
                k: v for k, v in b.items() if k not in timing
            }


def test_reward_rises_and_the_kl_penalty_holds_it(ppo):
    common = dict(
        steps=15,
        prompts_per_step=12,
        samples_per_prompt=4,
        minibatches=1,
        epochs=4,
        tokens_per_microbatch=4000,
        optim=OptimConfig(lr=1e-2, schedule="constant"),
    )
    free = ppo(name="free", kl=KLConfig(coef=0.0, measure=True), **common)
    held = ppo(name="held", kl=KLConfig(coef=1.0), **common)
    train_policy(free)
    train_policy(held)
    first, last, restrained = _metrics(free)[0], _metrics(free)[-1], _metrics(held)[-1]
    assert last["reward"] > first["reward"] + 1.0
    assert restrained["kl"] < 0.5 * last["kl"]


def test_the_value_head_learns_what_the_prompt_tells(ppo):
    config = ppo(
        reward="by_prompt",
        steps=25,
        prompts_per_step=24,
        samples_per_prompt=1,
        minibatches=1,
        epochs=4,
        tokens_per_microbatch=4000,
        kl=KLConfig(coef=0.0),
        loss=LossConfig(value_coef=0.5),
        optim=OptimConfig(lr=3e-3, schedule="constant"),
    )
    train_policy(config)
    rows = _metrics(config)
    assert rows[0]["val/explained_variance"] == pytest.approx(0.0, abs=1e-6)  # a head of zeros
    assert rows[-1]["val/explained_variance"] > 0.6


def test_rewards_that_fail(ppo):
    train_policy(ppo(reward="sometimes_nan", name="some", steps=1))
    assert _metrics(ppo(name="some"))[0]["completions/invalid"] == 1.0
    with pytest.raises(RewardError, match="none of the 12 samples has a valid reward"):
        train_policy(ppo(reward="mostly_nan", name="tolerant", max_invalid_fraction=1.0))
    for reward, message in (
        ("mostly_nan", "12 of 12 samples have no valid reward"),
        ("raises", "KeyError"),
        ("short", "12"),
    ):
        config = ppo(reward=reward, name=reward)
        with pytest.raises(RewardError, match=message):
            train_policy(config)
        assert not (Path(config.run.dir) / "model").exists()


@pytest.mark.cpu_only("it writes the CPU's flag")
def test_what_a_kernel_reported_stops_the_step(ppo):
    faults.flag("logprob", torch.device("cpu")).fill_(1)
    with pytest.raises(IndexError, match="logprob: expected token ids"):
        train_policy(ppo(steps=1))
    faults.raise_faults()


def test_what_comes_out_is_loadable(ppo, device):
    from transformers import AutoModelForCausalLM

    config = ppo(steps=1)
    result = train_policy(config)
    actor = HybridActor.from_pretrained(
        result.model, value_head=True, dtype="float32", device=device
    )
    theirs = AutoModelForCausalLM.from_pretrained(result.model).to(device)
    ids = torch.tensor([[1, 5, 6, 7]], device=device)
    from fusedrl.engine.base.packing import PackedBatch

    batch = PackedBatch.from_sequences([([1, 5, 6, 7], [])], device=device)
    ours = actor.forward(batch) @ actor.decoder.head_weight.T
    torch.testing.assert_close(ours, theirs(ids).logits[0], rtol=1e-4, atol=1e-4)
    assert actor.value_head.weight.abs().sum() > 0  # it was trained, saved and read back


def test_a_run_directory_is_one_run(ppo, device):
    from fusedrl.engine.base.errors import ConfigError

    config = ppo(steps=1)
    train_policy(config)
    with pytest.raises(ConfigError, match="holds a run"):
        train_policy(config)
    changed = replace(config, loss=LossConfig(lam=0.5), run=replace(config.run, resume=True))
    with pytest.raises(ConfigError, match="lam"):
        train_policy(changed)
    before = _weights(device, config)
    # finished already: nothing changes
    train_policy(replace(config, run=replace(config.run, resume=True)))
    assert all(torch.equal(before[name], p) for name, p in _weights(device, config).items())
    assert len(_metrics(config)) == 1


def test_rewards_of_tokens_are_credited_where_they_accrue(ppo, monkeypatch):
    """Each reward stands at its token, and the return of the whole completion is the score."""
    seen = []
    original = policy.estimate
    monkeypatch.setattr(
        policy,
        "estimate",
        lambda config, signals: seen.append(signals) or original(config, signals),
    )
    train_policy(ppo("each_w3", steps=1, kl=KLConfig(coef=0.0)))
    (signals,) = seen
    batch = signals.batch
    expected = torch.where(batch.action_mask & (batch.token_ids == 7), 1.0, 0.0)
    assert expected.any()
    assert torch.allclose(signals.rewards, expected, atol=1e-6)
    assert torch.equal(signals.totals, batch.scores)


def test_prompts_of_several_files_come_in_the_proportions_of_their_weights(
    ppo, write_jsonl, monkeypatch
):
    config = ppo(
        "by_prompt", steps=2, prompts_per_step=8, samples_per_prompt=1, epochs=1, minibatches=1
    )
    other, seen = write_jsonl("other.jsonl", [{"prompt": "w20 w21 w22", "x": 1}]), []
    original = policy.rollout
    monkeypatch.setattr(
        policy,
        "rollout",
        lambda *args, **kwargs: seen.append(original(*args, **kwargs)) or seen[-1],
    )
    train_policy(replace(config, data=f"{config.data}@3,{other}@1"))
    assert [sum("x" in prompt.columns for prompt in step.prompts) for step in seen] == [2, 2]
