"""A policy run that is watched: held-out evaluation that changes nothing, samples over time, gold
rewards, and the alarm with its consequences.

One file: the run that all that watches is tried on.
"""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fusedrl.engine.actor import HybridActor
from fusedrl.engine.base.errors import ConfigError, DataError, RewardError
from fusedrl.engine.cli.main import main, parse_config
from fusedrl.engine.config import (
    AlarmConfig,
    EvaluationConfig,
    GenerationConfig,
    KLConfig,
    LoRAConfig,
    OptimConfig,
    PolicyConfig,
    RunConfig,
)
from fusedrl.engine.generation.sampler import SamplingParams
from fusedrl.engine.model.weights import load_decoder
from fusedrl.engine.policy import micro_loss
from fusedrl.engine.policy.advantages import find_advantage
from fusedrl.engine.rollout.rollout import Sample, _flat
from fusedrl.engine.rollout.sampled import Prompt
from fusedrl.engine.stages import policy
from fusedrl.engine.stages.policy import train_policy
from fusedrl.engine.watch.monitor import FlatRewards

REWARDS = """
import random
import torch

def likes_w3(prompts, completions, completion_ids, **columns):
    return [float(sum(word == "w3" for word in text.split())) for text in completions]

def fresh(prompts, completions, completion_ids, **columns):
    return [len(set(ids)) / len(ids) for ids in completion_ids]

def draws(prompts, completions, completion_ids, **columns):
    return torch.rand(len(completions))

def odd(prompts, completions, completion_ids, **columns):
    return [float(len(ids) % 2) for ids in completion_ids]

def partly(prompts, completions, completion_ids, **columns):
    kinds = (None, float("nan"), 5.0)
    return [kinds[i % 3] for i in range(len(completions))]

def never(prompts, completions, completion_ids, **columns):
    return [0.1] * len(completions)

def of_prompt(prompts, completions, completion_ids, **columns):
    return [float(len(prompt)) for prompt in prompts]

def far(prompts, completions, completion_ids, **columns):
    return [10.0 + len(set(ids)) / len(ids) for ids in completion_ids]

def raises(prompts, completions, completion_ids, **columns):
    raise KeyError("no such thing")
"""


@pytest.fixture
def make(tiny_model, tmp_path, write_jsonl):
    (tmp_path / "rewards.py").write_text(REWARDS)
    # a whole block of the cache that training and held-out prompts begin with
    shared = " ".join(f"w{i % 28}" for i in range(16))
    data = write_jsonl(
        "prompts.jsonl",
        [
            {"prompt": " ".join([shared, *(f"w{(3 * i + j) % 28}" for j in range(1 + i % 5))])}
            for i in range(12)
        ],
    )
    held = write_jsonl(
        "held_out.jsonl",
        [
            {
                "prompt": " ".join([shared, *(f"w{(5 * i + j) % 28}" for j in range(1 + i % 5))]),
                "row": i,
            }
            for i in range(7)
        ],
    )

    def config(
        algorithm="grpo", name="run", reward="likes_w3", gold=(), evaluation=True, **options
    ):
        defaults = dict(
            steps=4,
            prompts_per_step=4,
            tokens_per_microbatch=60,
            generation=GenerationConfig(max_new_tokens=6),
            optim=OptimConfig(lr=3e-3, schedule="constant"),
            run=RunConfig(dir=str(tmp_path / name), progress=False, save_every=1),
        )
        if evaluation is True:
            evaluation = EvaluationConfig(held, every=2, prompts=5, samples_per_prompt=2, show=2)
        return PolicyConfig(
            str(tiny_model),
            data,
            (f"{tmp_path / 'rewards.py'}:{reward}",),
            algorithm,
            evaluation=evaluation or None,
            monitor_reward=tuple(f"{tmp_path / 'rewards.py'}:{one}" for one in gold),
            **(defaults | options),
        )

    return config


def _rows(config, name="metrics.jsonl"):
    return [json.loads(line) for line in (Path(config.run.dir) / name).read_text().splitlines()]


def _steps(config):
    """What training wrote: no timings, no evaluation."""
    return [
        {
            k: v
            for k, v in row.items()
            if not k.startswith(("timing/", "mem/", "tokens_per_s", "eval_"))
        }
        for row in _rows(config)
        if row["step"]
    ]


def _weights(config):
    return {
        name: p.detach()
        for name, p in load_decoder(Path(config.run.dir) / "model").named_parameters()
    }


def _dies_after(calls, function):
    remaining = iter(range(calls))

    def wrapped(*args, **kwargs):
        if next(remaining, None) is None:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    return wrapped


# ---- evaluation ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(algorithm="remax", strict=True),
        dict(lora=LoRAConfig(rank=2)),
        dict(algorithm="dapo"),
        dict(algorithm="ppo", reward="draws"),
    ],
)
def test_training_is_bitwise_what_it_is_without(make, options):
    plain, watched = (
        make(name="plain", evaluation=False, **options),
        make(name="watched", **{"gold": ("draws",)} | options),
    )
    train_policy(replace(plain, monitor_reward=(), alarm=AlarmConfig(action="off")))
    train_policy(watched)
    ours, theirs = _weights(plain), _weights(watched)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    added = {
        "alarm/reward_hacking",
        *(name for name in _rows(watched)[-1] if name.startswith("gold/")),
    }
    assert [{k: v for k, v in row.items() if k not in added} for row in _steps(watched)] == _steps(
        plain
    )
    assert _rows(plain, "samples.jsonl") == _rows(watched, "samples.jsonl")
    assert [row["step"] for row in _rows(watched) if "eval_reward" in row] == [0, 2, 4]


def test_cached_prefixes_of_held_out_prompts_are_forgotten(make):
    """Otherwise a rollout would find some of its prompts' blocks, and not compute them with its own
    companions."""
    from fusedrl.engine.watch import monitor

    cached = []
    original = monitor.evaluate

    def evaluate(actor, *args, **kwargs):
        result = original(actor, *args, **kwargs)
        cached.append(len(actor._generation().scheduler.blocks._cache))
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(monitor, "evaluate", evaluate)
        config = make(evaluation=EvaluationConfig(make().data, every=1))
        train_policy(config)
    assert cached == [0] * 5


def test_evaluation_uses_request_ids_of_its_own_and_the_same_draws(make):
    seen = []
    original = HybridActor.generate

    def generate(self, prompts, params=None, request_ids=None, finished=None, drafts=None):
        outs = original(self, prompts, params, request_ids)
        seen.append(
            (
                list(request_ids),
                params,
                [completion.token_ids for out in outs for completion in out],
            )
        )
        return outs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HybridActor, "generate", generate)
        # the policy does not move, so the same draws are the same completions
        config = make(optim=OptimConfig(lr=1e-12))
        train_policy(config)
    evaluations = [entry for entry in seen if entry[0][0] < 0]
    rollouts = {number for ids, _, _ in seen for number in ids if number >= 0}
    assert [ids for ids, _, _ in evaluations] == [[-1, -2, -3, -4, -5]] * 3
    assert rollouts == set(range(16))
    assert evaluations[0][2] == evaluations[1][2] == evaluations[2][2]
    assert len({tuple(tokens) for tokens in evaluations[0][2]}) > 5
    assert evaluations[0][1].n == 2


def test_what_an_evaluation_reports(make, tiny_model):
    config = make(
        reward="odd",
        gold=("fresh",),
        generation=GenerationConfig(max_new_tokens=5, temperature=0.8),
        algorithm="ppo",
    )
    train_policy(config)
    rows = _rows(config)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    first = rows[0]
    # by hand: the untrained model on those prompts, with those draws
    actor = HybridActor.from_pretrained(tiny_model)
    prompts = [
        row["prompt"]
        for row in _rows(
            replace(config, run=replace(config.run, dir=str(Path(config.data).parent))),
            "held_out.jsonl",
        )
    ]
    from fusedrl.engine.base.ordering import shuffled

    chosen = [prompts[i] for i in shuffled(7, 0, "held-out prompts")[:5]]
    outs = actor.generate(
        chosen, SamplingParams(max_new_tokens=5, temperature=0.8, n=2, seed=0), [-1, -2, -3, -4, -5]
    )
    lengths = [len(c.token_ids) for out in outs for c in out]
    scores = [float(length % 2) for length in lengths]
    per_prompt = [(a + b) / 2 for a, b in zip(scores[::2], scores[1::2], strict=True)]
    assert first["eval_reward"] == pytest.approx(sum(scores) / 10)
    assert first["eval_reward_stderr"] == pytest.approx(
        torch.tensor(per_prompt, dtype=torch.float64).std().item() / 5**0.5
    )
    assert first["eval_pass@1"] == first["eval_reward"]
    assert first["eval_pass@2"] == pytest.approx(
        sum(a or b for a, b in zip(scores[::2], scores[1::2], strict=True)) / 5
    )
    assert first["eval_completions/mean_length"] == pytest.approx(sum(lengths) / 10)
    assert first["eval_gold/fresh/mean"] == pytest.approx(
        sum(len(set(c.token_ids)) / len(c.token_ids) for out in outs for c in out) / 10
    )
    assert first["eval_completions/clipped_ratio"] == pytest.approx(
        sum(c.finish_reason != "stop" for out in outs for c in out) / 10
    )
    assert first["eval_kl"] == first["eval_kl_stderr"] == 0.0
    assert first["eval_perplexity"] == first["eval_perplexity_ref"] > 1
    assert rows[-1]["eval_kl"] != 0.0
    assert rows[-1]["timing/evaluate"] > 0
    samples = _rows(config, "samples_eval.jsonl")
    assert [(row["step"], row["prompt"]) for row in samples] == [
        (step, prompt) for step in (0, 2, 4) for prompt in chosen[:2]
    ]
    assert samples[0]["completion"] == outs[0][0].text
    assert samples[0]["scores"] == {
        "reward": scores[0],
        "gold/fresh": pytest.approx(len(set(outs[0][0].token_ids)) / lengths[0]),
    }


def test_without_a_reference_and_with_rewards_that_are_no_passes(make):
    config = make(kl=KLConfig(coef=0.0), steps=1, reward="fresh")
    train_policy(config)
    for row in _rows(config):
        assert "eval_kl" not in row
        assert "eval_perplexity_ref" not in row
        assert "eval_perplexity" in row
        assert not any(name.startswith("eval_pass@") for name in row)


def test_resume_continues_bitwise(make):
    whole = make(name="whole", gold=("fresh",), alarm=AlarmConfig(window=3))
    train_policy(whole)
    for stop in (1, 3):
        parts = replace(whole, run=replace(whole.run, dir=f"{whole.run.dir}_{stop}"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(policy, "rollout", _dies_after(stop, policy.rollout))
            with pytest.raises(KeyboardInterrupt):
                train_policy(parts)
        train_policy(replace(parts, run=replace(parts.run, resume=True)))
        ours, theirs = _weights(whole), _weights(parts)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        untimed = [
            [
                {
                    k: v
                    for k, v in row.items()
                    if not k.startswith(("timing/", "mem/", "tokens_per_s"))
                }
                for row in _rows(one)
            ]
            for one in (whole, parts)
        ]
        assert untimed[0] == untimed[1]
        assert _rows(whole, "samples_eval.jsonl") == _rows(parts, "samples_eval.jsonl")


def test_a_run_that_dies_before_its_first_checkpoint_starts_over(make):
    config = make()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy, "rollout", _dies_after(0, policy.rollout))
        with pytest.raises(KeyboardInterrupt):
            train_policy(config)
    assert [row["step"] for row in _rows(config)] == [0]
    train_policy(replace(config, run=replace(config.run, resume=True)))
    assert [row["step"] for row in _rows(config)] == [0, 1, 2, 3, 4]
    assert [row["step"] for row in _rows(config, "samples_eval.jsonl")] == [0, 0, 2, 2, 4, 4]


def test_a_resumed_run_may_be_watched_otherwise(make):
    config = make(steps=2, evaluation=False)
    train_policy(config)
    more = make(steps=4, gold=("fresh",), alarm=AlarmConfig(action="off"))
    train_policy(replace(more, run=replace(more.run, resume=True)))
    rows = _rows(config)
    assert ["alarm/reward_hacking" in row for row in rows] == [True, True, False, False]
    assert ["eval_reward" in row for row in rows] == [False, False, False, True]
    with pytest.raises(ConfigError, match="loss"):
        changed = replace(
            more, loss=replace(more.loss, lam=0.5), run=replace(more.run, resume=True)
        )
        train_policy(changed)


def test_held_out_prompts_that_cannot_be_used_are_refused_before_anything_is_generated(
    make, write_jsonl, monkeypatch
):
    monkeypatch.setattr(HybridActor, "generate", lambda *args, **kwargs: pytest.fail("generated"))
    for name, data, error, message in (
        ("absent", "nowhere.jsonl", FileNotFoundError, "nowhere.jsonl"),
        ("bad", write_jsonl("bad.jsonl", [{"prompt": 3}]), DataError, "bad.jsonl"),
        ("long", write_jsonl("long.jsonl", [{"prompt": "w1 " * 70}]), DataError, "longer"),
    ):
        with pytest.raises(error, match=message):
            train_policy(make(name=name, evaluation=EvaluationConfig(data)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--evaluation.every", "0"], "evaluation.every >= 1"),
        (["--evaluation.samples_per_prompt", "0"], "evaluation.samples_per_prompt >= 1"),
        (["--evaluation.prompts", "-1"], "evaluation.prompts >= 0"),
        (["--evaluation.evry", "3"], "did you mean --evaluation.every"),
        (["--alarm.window", "2"], "alarm.window >= 3"),
        (["--alarm.sigmas", "0"], "alarm.sigmas > 0"),
        (["--alarm.action", "shout"], "alarm.action"),
    ],
)
def test_options_that_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(
            "ppo",
            [
                "--model",
                "m",
                "--data",
                "d",
                "--reward",
                "x.py:f",
                "--evaluation.data",
                "h",
                *options,
            ],
        )


def test_options_of_watching():
    config = parse_config(
        "ppo",
        [
            "--model",
            "m",
            "--data",
            "d",
            "--reward",
            "x.py:f",
            "--monitor_reward",
            "y.py:g",
            "--monitor_reward",
            "z.py:h",
            "--evaluation.data",
            "h",
            "--evaluation.every",
            "3",
            "--alarm.action",
            "stop",
        ],
    )
    assert config.monitor_reward == ("y.py:g", "z.py:h")
    assert config.evaluation == EvaluationConfig("h", every=3)
    assert config.alarm == AlarmConfig(action="stop")
    assert (
        parse_config("ppo", ["--model", "m", "--data", "d", "--reward", "x.py:f"]).evaluation
        is None
    )
    with pytest.raises(ConfigError, match="evaluation"):
        parse_config(
            "ppo", ["--model", "m", "--data", "d", "--reward", "x.py:f", "--evaluation.every", "3"]
        )


def test_a_file_of_options(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "model: m\ndata: d\nreward: [x.py:f]\nmonitor_reward: [y.py:g]\n"
        "evaluation:\n  data: h\n  show: 1\nalarm:\n  action: 'off'\n"
    )
    config = parse_config(
        "ppo", ["--config", str(tmp_path / "run.yaml"), "--evaluation.every", "7"]
    )
    assert (config.evaluation, config.monitor_reward, config.alarm.action) == (
        EvaluationConfig("h", every=7, show=1),
        ("y.py:g",),
        "off",
    )


def test_the_tails_of_the_ratio_are_of_the_last_pass(make, monkeypatch):
    seen = []
    original = micro_loss.head_loss

    def head_loss(config, objective, kl_coef, micro, *rest, **options):
        found = original(config, objective, kl_coef, micro, *rest, **options)
        seen.append((found.logp - micro.old_logp)[micro.action_mask].double().exp())
        return found

    monkeypatch.setattr(micro_loss, "head_loss", head_loss)
    config = make(
        "ppo",
        steps=1,
        epochs=2,
        minibatches=2,
        samples_per_prompt=6,
        tokens_per_microbatch=10_000,
        evaluation=False,
        optim=OptimConfig(lr=3e-2),
    )
    train_policy(config)
    (row,) = _rows(config)
    assert len(seen) == 4
    ratios = torch.cat(seen[2:]).sort().values
    last = len(ratios) - 1
    assert row["val/ratio_p01"] == pytest.approx(ratios[round(0.01 * last)].item(), rel=1e-6)
    assert row["val/ratio_p99"] == pytest.approx(ratios[round(0.99 * last)].item(), rel=1e-6)
    assert row["val/ratio_outside_fraction"] == pytest.approx(
        ((ratios > 2) | (ratios < 0.5)).double().mean().item()
    )
    assert row["val/ratio_outside_fraction"] > 0
    assert row["val/ratio_p01"] < 1 < row["val/ratio_p99"]


# ---- gold rewards and the alarm ------------------------------------------------------------------
def test_gold_is_measured_and_never_trained_on(make):
    config = make(gold=("fresh", "partly"), evaluation=False, steps=2)
    train_policy(config)
    samples, rows = _rows(config, "samples.jsonl"), _rows(config)
    assert all(0 < row["gold/fresh/mean"] <= 1 for row in rows)
    # None and NaN are left out, and stop nothing
    assert all(row["gold/partly/mean"] == 5.0 for row in rows)
    assert all(
        float(sum(word == "w3" for word in row["completion"].split())) == row["score"]
        for row in samples
    )
    assert all(row["completions/invalid"] == 0 for row in rows)
    with pytest.raises(RewardError, match="'raises' raised KeyError"):
        train_policy(make(name="raises", gold=("raises",), evaluation=False))


HACK = dict(
    steps=20,
    prompts_per_step=4,
    evaluation=False,
    tokens_per_microbatch=4000,
    gold=("fresh",),
    generation=GenerationConfig(max_new_tokens=10),
    optim=OptimConfig(lr=1e-2, schedule="constant"),
    alarm=AlarmConfig(window=5),
)


def test_hacking_fires_the_alarm_once_and_a_run_that_it_stopped_goes_on(make, capsys):
    hacked = make(kl=KLConfig(coef=0.0, measure=True), **HACK)
    train_policy(hacked)
    rows = _rows(hacked)
    assert rows[-1]["reward"] > rows[0]["reward"] + 3  # the proxy rises
    assert rows[-1]["gold/fresh/mean"] < rows[0]["gold/fresh/mean"] - 0.3  # and the gold falls
    firing = [row["alarm/reward_hacking"] for row in rows]
    begins = [i for i, value in enumerate(firing) if value and not (i and firing[i - 1])]
    alarms = _rows(hacked, "alarms.jsonl")
    assert [row["step"] for row in alarms] == [i + 1 for i in begins]
    assert firing[-1] == 1.0
    assert {"proxy", "gold"} <= {one["kind"] for one in alarms[0]["evidence"]}

    config = replace(
        hacked,
        alarm=AlarmConfig(action="stop", window=5),
        run=replace(hacked.run, dir=f"{hacked.run.dir}_stop", progress=True),
    )
    with pytest.raises(SystemExit) as stopped:
        train_policy(config)
    assert stopped.value.code == 4
    assert "reward hacking suspected at step" in capsys.readouterr().err
    done = _rows(config)[-1]["step"]
    assert done == begins[0] + 1
    assert (Path(config.run.dir) / "checkpoints" / f"step_{done:08d}").is_dir()
    train_policy(
        replace(
            config,
            alarm=AlarmConfig(window=5),
            run=replace(config.run, resume=True, progress=False),
        )
    )
    assert _steps(config) == _steps(hacked)
    assert _rows(config, "alarms.jsonl") == alarms


def test_the_kl_keeps_the_alarm_silent(make):
    held = make(kl=KLConfig(coef=0.5), **HACK)
    train_policy(held)
    assert _rows(held, "alarms.jsonl") == []
    assert not any(row["alarm/reward_hacking"] for row in _rows(held))
    assert _rows(held)[-1]["reward"] > _rows(held)[0]["reward"]


def test_the_exit_code_of_the_command(make, tmp_path):
    config = make(kl=KLConfig(coef=0.0), **HACK)
    arguments = [
        "train",
        "grpo",
        "--model",
        config.model,
        "--data",
        config.data,
        "--reward",
        config.reward[0],
        "--monitor_reward",
        config.monitor_reward[0],
        "--steps",
        "20",
        "--prompts_per_step",
        "4",
        "--kl.coef",
        "0",
        "--generation.max_new_tokens",
        "10",
        "--optim.lr",
        "1e-2",
        "--optim.schedule",
        "constant",
        "--alarm.window",
        "5",
        "--alarm.action",
        "stop",
        "--run.dir",
        str(tmp_path / "command"),
        "--run.progress",
        "false",
    ]
    assert main(arguments) == 4


@pytest.mark.parametrize(
    "options, said",
    [
        (
            dict(reward="never"),
            r"the rewards were all equal (now 0.1), so that there is nothing to learn from .*\. "
            r"Likely causes: .*the reward never finds",
        ),
        (
            dict(reward="never", algorithm="ppo", evaluation=None),
            "the rewards were all equal (now 0.1)",
        ),
        (
            dict(reward="of_prompt"),
            "the rewards of each prompt were equal.*too hard for the policy, or all too easy",
        ),
        (
            dict(reward="never", algorithm="remax", evaluation=None),
            "the rewards of each prompt were equal, that of the greedy completion among them",
        ),
        (
            dict(reward="of_prompt", algorithm="remax", evaluation=None),
            "that of the greedy completion among them.*all too hard",
        ),
        (
            dict(reward="far", algorithm="ppo", evaluation=None, score_clip=5.0),
            "all scores were beyond score_clip = 5,.*centre them with normalize_scores",
        ),
    ],
    ids=["grpo", "ppo", "groups", "remax", "remax prompts", "clipped"],
)
def test_rewards_that_teach_nothing_are_said_once_in_a_row(make, capsys, options, said):
    config = make(steps=7, kl=KLConfig(coef=0.0), **options)
    config = replace(config, run=replace(config.run, progress=True))
    train_policy(config)
    lines = [
        line for line in capsys.readouterr().err.splitlines() if "nothing to learn from" in line
    ]
    assert len(lines) == 2
    assert "step 1: in this rollout " in lines[0]
    assert "Where it lasts, this is said again after 5 rollouts" in lines[0]
    assert "step 5: in the last 5 rollouts " in lines[1]
    assert all(re.search(said.replace("(", r"\(").replace(")", r"\)"), line) for line in lines)
    # the same row goes on
    train_policy(replace(config, steps=8, run=replace(config.run, resume=True)))
    assert "nothing to learn from" not in capsys.readouterr().err


def test_which_rollouts_teach_nothing(make):
    """A ppo whose prompts each score alike learns from the prompts' differences; one step that
    teaches something ends the row; other lines do not count."""

    def watching(config, completions=8):
        return FlatRewards(find_advantage(config.advantage).needs, completions, 64)

    flat, some, of_prompts = (
        {"reward": 0.1, "reward_std": std, "frac_reward_zero_std": share}
        for std, share in ((3e-9, 1.0), (0.5, 0.0), (0.5, 1.0))
    )
    for algorithm, expected in (("grpo", [1, 5, 12]), ("ppo", [1, 5, 16]), ("remax", [1, 5, 12])):
        watch = watching(make(algorithm))
        rows = (
            [flat] * 5
            + [some]
            + [of_prompts] * 2
            + [{"eval_reward": 1.0}]
            + [of_prompts, of_prompts]
            + [flat] * 6
        )
        said = [step for step, row in enumerate(rows, 1) if watch.update(row)]
        assert said == expected
    late = watching(make("ppo"))
    assert [bool(late.update(row)) for row in (some, flat, some, flat)] == [
        False,
        True,
        False,
        False,
    ], "single ones are said once a run"
    # completions alike, and better or worse than the greedy one
    differs = {"reward": 1.0, "reward_std": 0.0, "frac_reward_zero_std": 0.0}
    assert not watching(make("remax")).update(differs)
    assert watching(make("ppo")).update(differs)
    assert not watching(make("ppo"), 1).update(differs), "one completion is equal to no other"


def test_greedy_completions_count_among_those_of_their_prompt():
    prompt, completion = Prompt("p", [1], {}), SimpleNamespace(token_ids=[1], finish_reason="stop")
    samples = [
        Sample(prompt, completion, group, {}, score, score, greedy, greedy, None)
        for group, score, greedy in ((0, 1.0, 1.0), (1, 1.0, 0.0), (2, 0.0, 0.0), (2, 1.0, 1.0))
    ]
    assert _flat(samples, True) == {0}
    assert _flat(samples, False) == {0, 1}


@pytest.mark.full
def test_a_real_model_is_hacked_without_a_kl_and_held_with_one(shared, tmp_path):
    """stories260k says "happy happy happy" for a count of cheerful words; with a KL it does not.
    About two minutes."""
    examples = Path(__file__).resolve().parents[3] / "examples"
    found = {}
    for coef in (0.0, 0.3):
        config = PolicyConfig(
            str(shared / "models" / "stories260k"),
            str(examples / "prompts" / "stories.jsonl"),
            (f"{examples / 'rewards' / 'cheerful.py'}:cheerful",),
            "grpo",
            steps=60,
            prompts_per_step=8,
            monitor_reward=(f"{examples / 'rewards' / 'stories.py'}:fable",),
            kl=KLConfig(coef=coef, measure=True),
            generation=GenerationConfig(max_new_tokens=64, stop_token_ids=(1,)),
            optim=OptimConfig(lr=1e-3),
            run=RunConfig(str(tmp_path / f"kl{coef}"), progress=False),
        )
        train_policy(config)
        found[coef] = _rows(config), _rows(config, "alarms.jsonl")
    (rows, alarms), (held, silent) = found[0.0], found[0.3]
    assert rows[-1]["reward"] > rows[0]["reward"] + 20
    assert rows[-1]["gold/fable/mean"] < rows[0]["gold/fable/mean"] - 3
    assert {"proxy", "gold", "entropy", "repetition"} <= {
        one["kind"] for one in alarms[0]["evidence"]
    }
    assert silent == []
    assert held[-1]["reward"] > held[0]["reward"] + 1
    assert held[-1]["completions/repeated_trigrams"] < 0.1
