"""The KV cache of a run is what its prompts, samples and lengths can use, and the plan says so."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fusedrl.engine.actor import HybridActor
from fusedrl.engine.base.errors import DataError
from fusedrl.engine.cli.main import main
from fusedrl.engine.config import (
    EvaluationConfig,
    GenerationConfig,
    PolicyConfig,
    RejectionConfig,
    RunConfig,
)
from fusedrl.engine.generation.generator import Generator
from fusedrl.engine.generation.sampler import SamplingParams
from fusedrl.engine.generation.scheduler import Scheduler
from fusedrl.engine.model.weights import load_decoder, read_model_config
from fusedrl.engine.stages.policy import train_policy
from fusedrl.engine.stages.rejection import train_rejection
from fusedrl.engine.watch.plan import demand_of, plan

REWARD = """
def length(prompts, completions, completion_ids, **columns):
    return [float(len(ids)) for ids in completion_ids]
"""


@pytest.fixture
def make(tiny_model, tmp_path, write_jsonl):
    (tmp_path / "rewards.py").write_text(REWARD)

    def rows(name, longest):
        prompts = [{"prompt": " ".join(f"w{i}" for i in range(n + 1))} for n in range(longest)]
        return write_jsonl(name, prompts)

    def config(kind=PolicyConfig, longest=20, **kwargs):
        defaults = dict(
            device="cpu",
            dtype="float32",
            steps=2,
            prompts_per_step=5,
            samples_per_prompt=3,
            generation=GenerationConfig(max_new_tokens=7),
            run=RunConfig(dir=str(tmp_path / "run"), progress=False),
        )
        if "evaluated" in kwargs:
            prompts, samples, length = kwargs.pop("evaluated")
            kwargs["evaluation"] = EvaluationConfig(
                rows("held_out.jsonl", length), prompts=prompts, samples_per_prompt=samples
            )
        data = rows("prompts.jsonl", longest)
        reward = (f"{tmp_path / 'rewards.py'}:length",)
        return kind(str(tiny_model), data, reward, **(defaults | kwargs))

    return config


@pytest.fixture
def pools(monkeypatch):
    """(bytes, most sequences that ran at once) of the caches that a run makes."""
    made, running, preempted = [], [], []
    begin, schedule = Generator.__init__, Scheduler.schedule
    make_room = Scheduler._make_room_to_decode

    def counted(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        made.append(self.cache.nbytes)

    def watched(self, *args, **kwargs):
        found = schedule(self, *args, **kwargs)
        running.append(sum(one is not None for one in self._by_slot))
        return found

    def noticed(self):
        preempted.append(make_room(self))
        return preempted[-1]

    monkeypatch.setattr(Generator, "__init__", counted)
    monkeypatch.setattr(Scheduler, "schedule", watched)
    monkeypatch.setattr(Scheduler, "_make_room_to_decode", noticed)
    return lambda: (set(made), max(running), sum(preempted))


@pytest.mark.parametrize(
    "options, demand",
    [
        ({}, (15, 28)),
        ({"max_prompt_length": 9}, (15, 16)),
        ({"longest": 60}, (15, 64)),  # the model's positions: longer prompts are dropped
        ({"evaluated": (0, 2, 12)}, (24, 28)),  # all of twelve
        ({"evaluated": (8, 4, 33)}, (32, 41)),
        ({"evaluated": (33, 1, 33)}, (33, 41)),
        ({"algorithm": "remax", "samples_per_prompt": 1}, (5, 28)),
        ({"algorithm": "ppo"}, (15, 28)),
        ({"algorithm": "dapo", "refill_tries": 2}, (15, 28)),
        ({"kind": RejectionConfig, "keep": 1}, (15, 28)),
    ],
    ids=str,
)
def test_a_run_has_the_cache_that_was_planned(make, pools, options, demand):
    config = make(**options)
    found = plan(config)
    assert found.demand_met
    if "evaluated" in options and options["evaluated"][0] == 0:
        assert found.demand.sequences == 256  # how many they are is not counted in a plan
    else:
        assert found.demand == demand
    (train_rejection if isinstance(config, RejectionConfig) else train_policy)(config)
    sizes, running, preempted = pools()
    assert (sizes, preempted) == ({found.parts.kv_pool}, 0)
    assert running == demand[0]


def test_a_quarter_of_the_machine_is_no_longer_taken(make):
    found = plan(make())
    assert found.parts.kv_pool < 1 << 20
    assert found.to_json()["kv_cache"] == {"sequences": 15, "tokens": 28, "bound_by": "demand"}


def test_memory_bounds_what_would_be_more(make, monkeypatch):
    monkeypatch.setattr("os.sysconf", lambda name: 256)  # a machine of 64 KiB
    found = plan(make(), memory=1 << 30)
    assert not found.demand_met
    assert found.to_json()["kv_cache"]["bound_by"] == "memory"
    assert found.parts.kv_pool <= 1 << 14


def test_without_data_the_lengths_are_the_models(make, tiny_model, capsys):
    asked = ["plan", "grpo", "--model", str(tiny_model), "--device", "cpu", "--output-json", "-"]
    assert main(asked) == 0
    whole = json.loads(capsys.readouterr().out)["kv_cache"]
    assert whole == {"sequences": 256, "tokens": 64, "bound_by": "demand"}
    short = ["--max_prompt_length", "10", "--generation.max_new_tokens", "7"]
    assert main([*asked, *short]) == 0
    assert json.loads(capsys.readouterr().out)["kv_cache"]["tokens"] == 17
    config = make(longest=12)
    assert main([*asked, *short, "--data", config.data]) == 0
    assert json.loads(capsys.readouterr().out)["kv_cache"]["tokens"] == 17
    assert main([*asked, *short[2:], "--data", config.data]) == 0
    assert json.loads(capsys.readouterr().out)["kv_cache"]["tokens"] == 20
    assert main([*asked[:-2], *short[2:], "--data", config.data]) == 0
    assert "KV cache: 256 sequences of 20 tokens" in " ".join(capsys.readouterr().out.split())


def test_data_that_a_run_would_refuse(make, tmp_path):
    config = make()
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "w1"}\n{"nonsense"\n')
    with pytest.raises(DataError, match="jsonl:2: not JSON"):
        plan(config)
    assert plan(replace(config, skip_bad_lines=True)).demand.tokens == 9
    assert not list(tmp_path.glob("**/rejects*"))
    (tmp_path / "prompts.jsonl").unlink()
    assert plan(config).demand.tokens == 64


def test_a_limited_cache(tiny_model, device):
    """More sequences wait, a longer one is refused."""
    actor = HybridActor(load_decoder(tiny_model, dtype="float32", device=device))
    params = SamplingParams(max_new_tokens=20)
    roomy = actor.generate([[1, 2, 3]] * 5, params)
    actor.release_cache()
    actor.limit_cache(2, 32)
    tight = actor.generate([[1, 2, 3]] * 5, params)
    assert [[c.token_ids for c in one] for one in tight] == [
        [c.token_ids for c in one] for one in roomy
    ]
    assert actor._generator.cache.num_blocks == 2 * 2 + 1
    actor.release_cache()
    actor.limit_cache(1, 32)
    with pytest.raises(ValueError, match="need 3 KV blocks of 16 tokens, and the cache has 2"):
        actor.generate([[1] * 20], params)


def test_demand_of_a_model_without_room(make):
    config = make(generation=GenerationConfig(max_new_tokens=500))
    assert demand_of(config, read_model_config(config.model)) == (15, 64)


def test_an_option_that_is_nearly_one_of_plans(tiny_model, capsys):
    asked = ["plan", "grpo", "--model", str(tiny_model), "--device", "cpu"]
    for wrong, right in (("--memry", "--memory"), ("--output-jsn", "--output-json")):
        assert main([*asked, wrong, "8GiB"]) == 2
        assert f"unknown option '{wrong}', did you mean {right}?" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["data", "held_out"])
def test_data_that_is_not_there_is_found_before_the_model_is_loaded(make, monkeypatch, missing):
    config = make(evaluated=(2, 1, 3))
    (Path(config.data).parent / {"data": "prompts", "held_out": "held_out"}[missing]).with_suffix(
        ".jsonl"
    ).unlink()
    monkeypatch.setattr(HybridActor, "from_pretrained", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(FileNotFoundError, match="no such data file"):
        train_policy(config)
    assert not Path(config.run.dir).exists()
