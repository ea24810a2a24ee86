"""Numbers that stop being finite at a chosen step: the run skips what it can, and where it cannot
go on it stops with its last good checkpoint named; going on from that, without the fault, is
bitwise the run that never had it."""

import math
import re
from dataclasses import replace

import pytest
import torch
from tests.support import torture
from tests.support.behaviour import furnish

from fusedrl.engine.base.errors import RewardError
from fusedrl.engine.optim.adamw import Optimizer
from fusedrl.engine.policy.critic import SeparateCritic
from fusedrl.engine.rewards.rewards import RewardSet
from fusedrl.engine.runs.checkpoint import latest_checkpoint
from fusedrl.engine.runs.metrics import read_rows
from fusedrl.engine.runs.run import Run
from fusedrl.engine.stages import policy

pytestmark = pytest.mark.cpu_only("bitwise resumption is promised on a CPU")
STEPS, AT = 8, 2  # steps of a run, and those complete when the fault comes


@pytest.fixture
def config(tmp_path):
    furnish(tmp_path)

    def make(stage, name, **options):
        found = torture.config_of(stage, tmp_path, tmp_path / name)
        steps = {"steps": STEPS} if hasattr(found, "steps") else {"epochs": 4}
        return replace(found, **steps | options)

    return make


def planted(monkeypatch, plant, once=False):
    """From the update after AT complete steps on, call `plant(optimizer)` before each (or that one
    alone)."""
    done, step, log = [0, 0], Optimizer.step, Run.log

    def logged(self, index, metrics):
        log(self, index, metrics)
        done[0] = index + 1

    def struck(self, **options):
        if done[0] >= AT and not (once and done[1]):
            done[1] += 1
            plant(self)
        return step(self, **options)

    monkeypatch.setattr(Run, "log", logged)
    monkeypatch.setattr(Optimizer, "step", struck)


def grads_of(optimizer):
    return [p.grad for p in optimizer._params.values() if p.grad is not None]


def stops(config, error, said):
    """Run it, and return the step of the checkpoint that the message names."""
    with pytest.raises(error, match=said) as told:
        torture.train(config)
    notes = " ".join(getattr(told.value, "__notes__", ()))
    named = re.search(r"step (\d+) is in (\S+step_\d+); go on with", notes)
    assert named, notes
    found = latest_checkpoint(config.run.dir)
    assert (found.step, str(found.path)) == (int(named[1]), named[2])
    for group in found.tensors.values():
        for name, tensor in group.items():
            assert not tensor.is_floating_point() or bool(tensor.isfinite().all()), name
    return found.step


def goes_on_as_if_nothing_had_been(config, make, stage, monkeypatch):
    monkeypatch.undo()
    torture.train(replace(config, run=replace(config.run, resume=True)))
    whole = make(stage, "whole")
    torture.train(whole)
    ours, theirs = (torture.left_by(torture.Path(c.run.dir)) for c in (config, whole))
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []


# ---- gradients -----------------------------------------------------------------------------------
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_one_gradient_costs_one_update(config, monkeypatch, stage, value):
    before = {}

    def plant(optimizer):
        before.update({n: p.detach().clone() for n, p in optimizer._params.items()})
        grads_of(optimizer)[0].view(-1)[0] = value

    planted(monkeypatch, plant, once=True)
    seen, step = [], Optimizer.step

    def look(self, **options):
        found = step(self, **options)
        if before and not seen:
            seen.append(all(p.equal(before[n]) for n, p in self._params.items()))
        return found

    monkeypatch.setattr(Optimizer, "step", look)
    one = config(stage, "run")
    torture.train(one)
    rows = list(read_rows(f"{one.run.dir}/metrics.jsonl"))
    assert seen == [True], "the update that was left out wrote to the weights"
    assert all(("skipped_updates" in row) == (row["step"] > AT) for row in rows)
    assert rows[-1]["skipped_updates"] == 1.0


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "grpo", "ppo"])
def test_gradients_that_stay_broken_end_the_run(config, monkeypatch, stage):
    planted(monkeypatch, lambda o: grads_of(o)[0].fill_(math.nan))
    one = config(stage, "run")
    step = stops(one, RuntimeError, "5 updates of the .* in a row had a non-finite gradient")
    assert step >= AT


# ---- moments and weights -------------------------------------------------------------------------
@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_broken_moments_reach_no_checkpoint(config, monkeypatch, stage):
    def plant(optimizer):
        for name, moment in optimizer.state_dict().items():
            if name.endswith(".exp_avg"):
                moment.view(-1)[0] = math.nan

    planted(monkeypatch, plant, once=True)
    one = config(stage, "run")
    assert stops(one, (RuntimeError, ValueError), "not finite|non-finite|NaN|finite") == AT
    goes_on_as_if_nothing_had_been(one, config, stage, monkeypatch)


def test_broken_logits_end_the_run_before_a_token_is_drawn_of_them(config, monkeypatch):
    rollout, calls = policy.rollout, []

    def struck(actor, *args, **options):
        calls.append(1)
        if len(calls) == AT + 1:
            with torch.no_grad():
                actor.decoder.norm.fill_(math.nan)
        return rollout(actor, *args, **options)

    monkeypatch.setattr(policy, "rollout", struck)
    one = config("grpo", "run")
    assert stops(one, (RuntimeError, ValueError), "NaN|finite") == AT
    goes_on_as_if_nothing_had_been(one, config, "grpo", monkeypatch)


# ---- rewards and values --------------------------------------------------------------------------
def goes_wrong(monkeypatch, owner, name, change):
    """After AT complete steps, what `name` returns goes through `change`."""
    done, original, log = [0], getattr(owner, name), Run.log

    def logged(self, index, metrics):
        log(self, index, metrics)
        done[0] = index + 1

    def struck(*args, **options):
        found = original(*args, **options)
        return change(found) if done[0] >= AT else found

    monkeypatch.setattr(Run, "log", logged)
    monkeypatch.setattr(owner, name, struck)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_broken_rewards_end_the_run(config, monkeypatch, value):
    goes_wrong(monkeypatch, RewardSet, "_call", lambda found: [[value] * 4])
    one = config("grpo", "run")
    assert stops(one, RewardError, "finite") == AT
    goes_on_as_if_nothing_had_been(one, config, "grpo", monkeypatch)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_values_reach_no_checkpoint(config, monkeypatch, value):
    goes_wrong(
        monkeypatch,
        SeparateCritic,
        "score",
        lambda found: found.with_columns(values=torch.full_like(found.values, value)),
    )
    one = config("ppo", "run")
    assert stops(one, (RuntimeError, ValueError), "finite") >= AT
