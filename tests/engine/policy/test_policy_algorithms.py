"""Every algorithm through the one loop on a tiny model: what is loaded, what is scored, what is
logged, and that runs resume bitwise.

One file: one configuration that all cases vary.
"""

import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch

from fusedrl.engine.actor import HybridActor
from fusedrl.engine.base.errors import ConfigError
from fusedrl.engine.cli.main import parse_config
from fusedrl.engine.config import (
    CorrectionConfig,
    GenerationConfig,
    KLConfig,
    LossConfig,
    OptimConfig,
    PenaltyConfig,
    PolicyConfig,
    ReplayConfig,
    RunConfig,
)
from fusedrl.engine.config.algorithms import ADVANTAGES, ALGORITHMS, OBJECTIVES
from fusedrl.engine.model.weights import load_decoder
from fusedrl.engine.policy import advantages, objectives
from fusedrl.engine.policy.advantages import Signals, register_advantage
from fusedrl.engine.policy.objectives import make_objective, register_objective
from fusedrl.engine.runs.run import Run
from fusedrl.engine.stages import policy
from fusedrl.engine.stages.policy import train_policy

TABLE = (Path(__file__).resolve().parents[3] / "docs" / "algorithms.md").read_text(encoding="utf-8")
REWARDS = """
def likes_w3(prompts, completions, completion_ids, **columns):
    return [float(sum(word == "w3" for word in text.split())) for text in completions]

def ids(prompts, completions, completion_ids, **columns):
    return [float(sum(ids) % 7) for ids in completion_ids]

def rarely(prompts, completions, completion_ids, **columns):
    return [float(ids[0] == 7) for ids in completion_ids]

def never(prompts, completions, completion_ids, **columns):
    return [1.0] * len(completions)

def sometimes_nan(prompts, completions, completion_ids, **columns):
    return [float("nan") if i % 5 == 0 else float(i % 2) for i, ids in enumerate(completion_ids)]
"""


@pytest.fixture
def make(tiny_model, tiny_teacher, tmp_path, write_jsonl, device):
    (tmp_path / "rewards.py").write_text(REWARDS)
    data = write_jsonl(
        "prompts.jsonl",
        [{"prompt": " ".join(f"w{(3 * i + j) % 28}" for j in range(1 + i % 5))} for i in range(12)],
    )

    def config(algorithm="grpo", reward="likes_w3", name="run", run=None, **kwargs):
        defaults = dict(
            device=str(device),
            dtype="float32",
            steps=2,
            prompts_per_step=4,
            samples_per_prompt=3,
            tokens_per_microbatch=60,
            generation=GenerationConfig(max_new_tokens=6),
            optim=OptimConfig(lr=3e-3, schedule="constant"),
            run=RunConfig(dir=str(tmp_path / name), progress=False, **(run or {})),
            reference_model=str(tiny_teacher) if algorithm == "distill" else None,
        )
        return PolicyConfig(
            str(tiny_model),
            data,
            (f"{tmp_path / 'rewards.py'}:{reward}",),
            algorithm,
            **(defaults | kwargs),
        )

    return config


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


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_trains(make, algorithm, device):
    config = make(algorithm)
    train_policy(config)
    rows = _metrics(config)
    critic = ADVANTAGES[config.advantage] == "critic"
    assert (Path(config.run.dir) / "model" / "value_head.safetensors").exists() == critic
    for row in rows:
        assert all(
            value == value and abs(value) < 1e6
            for value in row.values()
            if isinstance(value, float)
        )
        assert row["sampling/sampling_logp_difference/max"] <= 1e-4
        assert row["policy/first_ratio_min"] == row["policy/first_ratio_max"] == 1.0
        assert row["entropy"] > 1.0
        assert {
            "reward",
            "reward_std",
            "frac_reward_zero_std",
            "completions/clipped_ratio",
            "grad_norm",
        } <= row.keys()
        assert ("kl" in row) == (config.kl.coef > 0 and algorithm != "distill")
        assert ("divergence" in row) == (algorithm == "distill")
        assert ("loss/value_avg" in row) == ("val/explained_variance" in row) == critic
    start = dict(load_decoder(config.model, dtype="float32", device=device).named_parameters())
    assert (
        max((p - start[name]).abs().max().item() for name, p in _weights(device, config).items())
        > 1e-4
    )


def test_nothing_is_loaded_or_scored_that_is_not_needed(make, monkeypatch):
    loaded, scored = [], []
    monkeypatch.setattr(
        policy,
        "load_reference",
        lambda *args, load=policy.load_reference: (loaded.append(1), load(*args))[1],
    )
    monkeypatch.setattr(
        HybridActor,
        "score_with_ends",  # what `score` calls, too
        lambda self, *a, score=HybridActor.score_with_ends, **k: (
            scored.append(1),
            score(self, *a, **k),
        )[1],
    )
    for name, kwargs, expected in (
        ("free", dict(kl=KLConfig(coef=0.0)), (0, 0)),  # the training forward is the scorer
        ("held", {}, (1, 2)),  # the reference's two steps alone
        # the advantage is made of the KL
        ("reward", dict(kl=KLConfig(placement="reward")), (1, 4)),
        ("twice", dict(kl=KLConfig(coef=0.0), epochs=2), (0, 2)),
        ("measured", dict(kl=KLConfig(coef=0.0, measure=True)), (1, 2)),
    ):
        loaded.clear(), scored.clear()
        train_policy(make(name=name, **kwargs))
        assert (len(loaded), len(scored)) == expected, name


def test_scoring_first_changes_nothing_on_policy(make, device):
    """One optimizer step a rollout: the training forward as its own scorer gives the update that a
    separate scoring gives."""
    alone, scored = make(name="alone"), make(name="scored", kl=KLConfig(placement="loss"))
    train_policy(alone)
    with pytest.MonkeyPatch.context() as patch:

        def score(actor, reference, batch, cuts, temperature, original=policy.score):
            return original(made[0], reference, batch, cuts, temperature)

        made, load = [], HybridActor.from_pretrained
        patch.setattr(policy, "score", score)
        patch.setattr(
            HybridActor, "from_pretrained", lambda *a, **k: made.append(load(*a, **k)) or made[-1]
        )
        train_policy(scored)
    for row, other in zip(_metrics(alone), _metrics(scored), strict=True):
        for name in (
            "entropy",
            "kl",
            "sampling/sampling_logp_difference/mean",
            "loss/policy_avg",
            "grad_norm",
            "perplexity",
        ):
            assert row[name] == other[name], name
    assert all(
        torch.equal(p, _weights(device, scored)[name])
        for name, p in _weights(device, alone).items()
    )


@pytest.mark.parametrize(
    "algorithm",
    [name if name == "grpo" else pytest.param(name, marks=pytest.mark.full) for name in ALGORITHMS],
)
def test_reward_rises(make, algorithm):
    epochs = 4 if algorithm.startswith("ppo") or algorithm == "dro" else 1
    config = make(
        algorithm,
        steps=20,
        prompts_per_step=12,
        samples_per_prompt=8,
        epochs=epochs,
        tokens_per_microbatch=4000,
        generation=GenerationConfig(max_new_tokens=8),
        kl=KLConfig(coef=0.01),
        optim=OptimConfig(lr=1e-2, schedule="constant"),
    )
    train_policy(config)
    rows = _metrics(config)
    assert rows[-1]["reward"] > rows[0]["reward"] + 0.5


def test_the_micro_batch_split_does_not_change_the_update(make, device):
    for algorithm in ("grpo", "gspo", "dr_grpo", "rloo"):
        moved = []
        for tokens in (25, 10_000):
            config = make(
                algorithm,
                name=f"{algorithm}{tokens}",
                steps=1,
                tokens_per_microbatch=tokens,
                # with 1e-8 the sign of a rounding error is a whole step
                optim=OptimConfig(lr=1e-3, eps=1e-5),
            )
            train_policy(config)
            moved.append(_weights(device, config))
        start = {
            name: p.detach()
            for name, p in load_decoder(
                config.model, dtype="float32", device=device
            ).named_parameters()
        }
        most = max((moved[0][name] - start[name]).abs().max().item() for name in start)
        for name in start:
            torch.testing.assert_close(moved[0][name], moved[1][name], rtol=0, atol=2e-3 * most)


@pytest.mark.cpu_only("bitwise resumption is promised on a CPU")
@pytest.mark.parametrize(
    "algorithm, kwargs",
    [
        ("grpo", dict(kl=KLConfig(target=0.5, horizon=50))),
        ("reinforce_baseline", {}),
        ("ppo_penalty", dict(penalty=PenaltyConfig(target=1e-4), epochs=2)),
        ("remax", {}),
        ("reinforce", dict(scale_scores=True)),
    ],
)
def test_resume_continues_bitwise(make, algorithm, kwargs, device):
    whole = make(algorithm, name="whole", steps=4, run=dict(save_every=1), **kwargs)
    train_policy(whole)
    parts = replace(whole, run=replace(whole.run, dir=whole.run.dir + "_parts"))
    calls = iter(range(2))
    with pytest.MonkeyPatch.context() as patch:

        def dies(*args, original=policy.rollout, **kwargs):
            if next(calls, None) is None:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        patch.setattr(policy, "rollout", dies)
        with pytest.raises(KeyboardInterrupt):
            train_policy(parts)
    train_policy(replace(parts, run=replace(parts.run, resume=True)))
    assert all(
        torch.equal(p, _weights(device, parts)[name]) for name, p in _weights(device, whole).items()
    )
    for a, b in zip(_metrics(whole), _metrics(parts), strict=True):
        timing = {k for k in a if k.startswith(("timing/", "tokens_per_s", "mem/"))}
        assert {k: v for k, v in a.items() if k not in timing} == {
            k: v for k, v in b.items() if k not in timing
        }


def test_a_run_that_was_called_ppo_resumes(make):
    """config.json of before there were algorithms: another name of the stage, fewer options."""
    config = make("ppo", steps=2, epochs=2)
    train_policy(replace(config, steps=1))
    path = Path(config.run.dir) / "config.json"
    saved = json.loads(path.read_text())
    saved["stage"] = "PPOConfig"
    del saved["config"]["algorithm"], saved["config"]["penalty"]
    for group, names in (
        ("kl", ("placement", "estimator", "level", "measure")),
        (
            "loss",
            (
                "advantage",
                "objective",
                "k",
                "discount_states",
                "clip_max",
                "tau_positive",
                "tau_negative",
                "beta",
            ),
        ),
    ):
        for name in names:
            del saved["config"][group][name]
    path.write_text(json.dumps(saved))
    train_policy(replace(config, run=replace(config.run, resume=True)))
    assert len(_metrics(config)) == 2
    with pytest.raises(ConfigError, match=r"loss\.k: 5 -> 6"):
        train_policy(
            replace(config, loss=replace(config.loss, k=6), run=replace(config.run, resume=True))
        )


def test_the_penalty_coefficient_adapts(make):
    for name, penalty, expected in (
        ("up", PenaltyConfig(kl_min=0.0, kl_max=1e-9), 4.0),
        ("down", PenaltyConfig(target=1e3), 0.25),
    ):
        config = make("ppo_penalty", name=name, penalty=penalty, epochs=2)
        train_policy(config)
        state = sorted((Path(config.run.dir) / "checkpoints").glob("*/state.json"))[-1]
        assert json.loads(state.read_text())["penalty_coef"] == expected


def test_groups_with_invalid_samples(make):
    config = make("rloo", reward="sometimes_nan", max_invalid_fraction=0.5, steps=1)
    train_policy(config)
    row = _metrics(config)[0]
    assert row["completions/invalid"] == 3.0
    # of the samples 0 .. 11 in threes, 0, 5 and 10 are gone: 1 0 | 1 0 | 0 1 0 | 1 1
    assert row["frac_reward_zero_std"] == 0.25


@pytest.mark.parametrize(
    "kl",
    [
        KLConfig(estimator="full"),
        KLConfig(estimator="full", level="future"),
        KLConfig(level="sequence"),
        KLConfig(level="future"),
    ],
)
def test_a_kl_in_the_loss_holds_the_policy(make, kl):
    free, held = (
        make("dr_grpo", name=name, steps=6, kl=kl, optim=OptimConfig(lr=1e-2, schedule="constant"))
        for name, kl in (
            ("free", KLConfig(coef=0.0, measure=True)),
            ("held", replace(kl, coef=5.0)),
        )
    )
    train_policy(free)
    train_policy(held)
    assert _metrics(held)[-1]["kl"] < 0.5 * _metrics(free)[-1]["kl"]
    assert all(value == value for row in _metrics(held) for value in row.values())


def test_dynamic_sampling(make, device):
    """Flat groups are replaced by others; prompts are taken from the stream one after another, also
    by a run that resumes; ids are never used twice."""
    config = make(
        "dapo", reward="rarely", name="whole", steps=3, refill_tries=2, run=dict(save_every=1)
    )
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            policy,
            "rollout",
            lambda *a, original=policy.rollout, **k: (seen.append(original(*a, **k)), seen[-1])[1],
        )
        train_policy(config)
    rows = _metrics(config)
    assert any(row["refill/generated_groups"] > 4 for row in rows)
    for row, experience in zip(rows, seen, strict=True):
        groups = experience.batch.group_ids.tolist()
        assert len(set(groups)) == row["refill/kept_groups"] <= 4
        assert 4 <= row["refill/generated_groups"] <= 12
        flat = [
            g
            for g in set(groups)
            if len(
                {s for s, h in zip(experience.batch.scores.tolist(), groups, strict=True) if h == g}
            )
            == 1
        ]
        assert not flat or len(flat) == len(set(groups))  # only where there was nothing else
    starts = [min(e.batch.group_ids.tolist()) for e in seen]
    assert starts == sorted(set(starts))
    state = json.loads(
        sorted((Path(config.run.dir) / "checkpoints").glob("*/state.json"))[-1].read_text()
    )
    assert state["drawn"] == sum(row["refill/generated_groups"] for row in rows)

    parts = replace(config, run=replace(config.run, dir=config.run.dir + "_parts"))
    train_policy(replace(parts, steps=2, optim=config.optim))
    train_policy(replace(parts, run=replace(parts.run, resume=True)))
    assert all(
        torch.equal(p, _weights(device, parts)[name])
        for name, p in _weights(device, config).items()
    )

    config = make("dapo", reward="never", name="never", steps=1, refill_tries=1)
    train_policy(config)
    row = _metrics(config)[0]
    assert (
        row["refill/generated_groups"],
        row["refill/kept_groups"],
        row["frac_reward_zero_std"],
        row["grad_norm"],
    ) == (8, 4, 1.0, 0.0)


def test_penalties_do_not_keep_a_group(make):
    """DAPO drops a prompt by its rewards. Penalties for length make the scores of such a group
    differ, and it is dropped all the same."""
    penalties = {"overlong_buffer": 4, "overlong_penalty": 2.0, "missing_eos_penalty": 1.0}
    train_policy(config := make("dapo", reward="never", steps=1, refill_tries=1, **penalties))
    row = _metrics(config)[0]
    assert row["frac_reward_zero_std"] < 1.0, "no group of different scores: nothing is tested"
    assert row["reward_std"] > 0.0
    assert (row["refill/generated_groups"], row["refill/kept_groups"]) == (8, 4)


def test_overlong_completions_cost(make):
    config = make("grpo", reward="never", steps=1, overlong_buffer=4, overlong_penalty=2.0)
    experience = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            policy,
            "rollout",
            lambda *a, original=policy.rollout, **k: (
                experience.append(original(*a, **k)),
                experience[-1],
            )[1],
        )
        train_policy(config)
    for completion, score in zip(
        experience[0].completions, experience[0].batch.scores.tolist(), strict=True
    ):
        assert score == pytest.approx(1.0 - 2.0 * max(0, len(completion.token_ids) - 2) / 4)


# ---- configuration -------------------------------------------------------------------------------
def test_rows_name_what_there_is():
    assert set(advantages._KNOWN) >= set(ADVANTAGES)
    assert all(advantages._KNOWN[name].needs == needs for name, needs in ADVANTAGES.items())
    for name, row in ALGORITHMS.items():
        config = PolicyConfig("m", "d", ("r.py:f",), name)
        assert row.advantage in ADVANTAGES
        assert row.objective in OBJECTIVES
        assert make_objective(config, 1.0).kind == OBJECTIVES[row.objective][0]
        assert (config.epochs, config.samples_per_prompt, config.kl.coef) == (
            row.epochs,
            row.samples_per_prompt,
            row.kl_coef,
        )


UPDATES = {
    "ppo": 4,
    "ppo_penalty": 4,
    "trpo": 10,
    "sequence_ratio": 4,
    "reinforce_pp": 8,
    "reinforce_pp_baseline": 8,
    "dr_grpo": 8,
    "gmpo": 8,
    "dapo": 16,
    "cispo": 16,
    "gspo": 4,
    "sapo": 4,
}  # on a rollout; of the others one


def test_rows_have_their_papers_updates():
    for name in ALGORITHMS:
        config = PolicyConfig("m", "d", ("r.py:f",), name)
        assert config.epochs * config.minibatches == UPDATES.get(name, 1), name
    small = PolicyConfig("m", "d", ("r.py:f",), "dapo", prompts_per_step=3)
    assert small.minibatches == 3, "a prompt's completions each, at least in number"
    assert (
        PolicyConfig("m", "d", ("r.py:f",), "dapo", prompts_per_step=3, minibatches=20).minibatches
        == 20
    ), "said is said"
    for objective in ("reinforce", "trpo"):
        assert (
            PolicyConfig(
                "m", "d", ("r.py:f",), "dapo", loss=LossConfig(objective=objective)
            ).minibatches
            == 1
        )
    (line,) = [line for line in TABLE.splitlines() if line.startswith("| algorithm |")]
    assert line.split("|")[-3:-1] == [" epochs ", " minibatches "]
    for name in ALGORITHMS:
        (line,) = [
            line
            for line in TABLE.splitlines()
            if line.startswith(f"| `{name}`") and line.count("|") == 9
        ]
        row = ALGORITHMS[name]
        told = [int(cell.split()[0]) for cell in line.split("|")[-4:-1]]
        assert told == [row.samples_per_prompt, row.epochs, row.minibatches], name


def test_no_two_rows_are_one_algorithm(make, device):
    """After two steps with the rows' own numbers no two policies are the same."""
    found = {}
    for name in ALGORITHMS:
        config = make(
            name,
            name=name,
            prompts_per_step=4,
            samples_per_prompt=None,
            reward="ids",
            optim=OptimConfig(lr=3e-3, schedule="constant"),
        )
        train_policy(config)
        found[name] = torch.cat([p.flatten() for p in _weights(device, config).values()])
    same = [(a, b) for a, b in combinations(found, 2) if torch.equal(found[a], found[b])]
    assert not same


@pytest.mark.parametrize(
    "algorithm, more, told",
    [
        ("grpo", {}, None),
        ("grpo", dict(loss=LossConfig(clip_low=0.1)), "loss.clip_low 0.1 will never act"),
        ("grpo", dict(loss=LossConfig(clip_low=0.2)), None),
        ("a2c", {}, None),
        ("a2c", dict(loss=LossConfig(value_clip=0.4)), "loss.value_clip 0.4 will never act"),
        ("gspo", dict(minibatches=1), "loss.clip_low 0.0003, loss.clip_high 0.0004"),
        ("ppo_penalty", dict(epochs=1), "penalty, loss.value_clip"),
        ("sapo", dict(minibatches=1), "loss.tau_positive 1, loss.tau_negative 1.05"),
        ("cispo", dict(minibatches=1), "loss.clip_max 5"),
        ("grpo", dict(minibatches=2), None),
        ("gspo", {}, None),
        ("ppo", {}, None),
        ("reinforce", {}, None),
        ("opo", {}, None),
        ("trpo", {}, None),
        ("grpo", dict(replay=ReplayConfig()), None),
        ("grpo", dict(correction=CorrectionConfig(bypass=True)), None),
        ("grpo", dict(loss=LossConfig(objective="importance")), None),
    ],
)
def test_bounds_that_were_chosen_and_never_act_are_told_at_the_start(
    make, monkeypatch, algorithm, more, told
):
    said = []
    monkeypatch.setattr(Run, "message", lambda self, text: said.append(text))
    options = dict(kl=KLConfig(), prompts_per_step=3, samples_per_prompt=None) | more
    train_policy(make(algorithm, steps=1, **options))
    found = [text for text in said if "will never act" in text]
    assert len(found) == (told is not None)
    assert told is None or told in found[0]


def test_the_command_is_the_row():
    options = ["--model", "m", "--data", "d", "--reward", "r.py:f"]
    config = parse_config("dapo", [*options, "--loss.clip_low", "0.1", "--kl.coef", "0.02"])
    assert (
        config.algorithm,
        config.loss.clip_low,
        config.loss.clip_high,
        config.kl.coef,
        config.kl.placement,
    ) == ("dapo", 0.1, 0.28, 0.02, "loss")
    assert parse_config("grpo", options) == PolicyConfig("m", "d", ("r.py:f",), "grpo")
    with pytest.raises(ConfigError, match=r"algorithm is 'ppo', and the command says train grpo"):
        parse_config("grpo", [*options, "--algorithm", "ppo"])


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (
            dict(algorithm="grpo", samples_per_prompt=1),
            "samples_per_prompt > 1 for grpo .*one alone has the advantage 0 and teaches nothing",
        ),
        (dict(algorithm="rloo", samples_per_prompt=1), "samples_per_prompt > 1 for rloo"),
        (dict(algorithm="grp"), "algorithm to be one of ppo, "),
        (dict(algorithm="grpo", epochs=0), "epochs >= 1"),
        (dict(refill_tries=1), "refill_tries >= 0, and 0 with samples_per_prompt = 1"),
        (dict(overlong_buffer=65), "overlong_buffer within 0 and generation.max_new_tokens = 64"),
    ],
)
def test_what_is_refused(kwargs, message):
    with pytest.raises(ConfigError, match=message):
        PolicyConfig("m", "d", ("r.py:f",), **kwargs)


def test_what_the_loss_refuses(make, monkeypatch):
    with pytest.raises(ConfigError, match="any other drops a term of the gradient"):
        KLConfig(placement="reward", estimator="k3")
    with pytest.raises(
        ConfigError,
        match=r"kl\.level sequence only with kl\.placement = loss and kl\.estimator = k2",
    ):
        KLConfig(placement="loss", estimator="k3", level="sequence")
    with pytest.raises(ConfigError, match=r"either target, or both kl_min and kl_max"):
        PenaltyConfig(target=0.1, kl_min=0.1, kl_max=0.2)
    monkeypatch.setattr(advantages, "_KNOWN", dict(advantages._KNOWN))
    register_advantage("compares", needs="group")(raw_scores)
    with pytest.raises(ConfigError, match=r"samples_per_prompt > 1 for the advantage compares"):
        train_policy(make("reinforce", samples_per_prompt=1, loss=LossConfig(advantage="compares")))
    for loss, message in (
        (LossConfig(objective="nothing"), "expected loss.objective to be one of .*got 'nothing'"),
        (LossConfig(advantage="no.such"), "'no.such' cannot be imported"),
        (LossConfig(clip_max=3.0), "does not use clip_max"),
    ):
        with pytest.raises(ConfigError, match=message):
            train_policy(make(loss=loss))


# ---- what users register -------------------------------------------------------------------------
def raw_scores(x: Signals) -> torch.Tensor:
    return x.per_token(x.totals - x.level)


def test_what_an_advantage_needs_is_declared_once(monkeypatch):
    monkeypatch.setattr(advantages, "_KNOWN", {})
    with pytest.raises(KeyError):
        advantages._built_in("not_in_the_table")
    for name in ("rloo", "gae"):
        advantages._built_in(name)(raw_scores)
        register_advantage(name)(raw_scores)
        register_advantage(name, ADVANTAGES[name])(raw_scores)
        assert advantages._KNOWN[name].needs == ADVANTAGES[name]
        with pytest.raises(
            ValueError, match=f"needs '{ADVANTAGES[name]}' of the built-in '{name}'"
        ):
            register_advantage(name, "greedy")
    register_advantage("mine", "greedy")(raw_scores)
    assert advantages._KNOWN["mine"].needs == "greedy"


def test_registered_functions_and_dotted_paths(make, monkeypatch, device):
    monkeypatch.setattr(advantages, "_KNOWN", dict(advantages._KNOWN))
    monkeypatch.setattr(objectives, "_REGISTERED", {})
    register_advantage("mine")(raw_scores)

    @register_objective("my_ratio")
    def my_ratio(logp_N, old_logp_N, advantages_N, batch):
        return -advantages_N * (logp_N - old_logp_N).exp()

    import sys

    monkeypatch.setitem(sys.modules, "my_module", sys.modules[__name__])
    runs = {}
    for name, loss in (
        ("built_in", LossConfig(advantage="monte_carlo", objective="importance")),
        ("mine", LossConfig(advantage="mine", objective="my_ratio")),
        ("dotted", LossConfig(advantage="my_module.raw_scores", objective="importance")),
    ):
        config = make(name=name, loss=loss, epochs=2)
        train_policy(config)
        runs[name] = _weights(device, config)
    for name in ("mine", "dotted"):
        for key, weight in runs["built_in"].items():
            torch.testing.assert_close(runs[name][key], weight, rtol=1e-4, atol=1e-5)
