"""What a policy run is given and cannot mean: refused before any device work with a message that
says what was expected and why, or defined."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fusedrl.engine.base.errors import ConfigError, DataError
from fusedrl.engine.base.packing import PackedBatch
from fusedrl.engine.cli.main import main
from fusedrl.engine.config import (
    GenerationConfig,
    KLConfig,
    LoRAConfig,
    LossConfig,
    OptimConfig,
    PenaltyConfig,
    PolicyConfig,
    RejectionConfig,
    RewardModelConfig,
    RunConfig,
)
from fusedrl.engine.config.algorithms import ADVANTAGES, ALGORITHMS
from fusedrl.engine.data.readers import load_pairs, load_ranked
from fusedrl.engine.policy.advantages import Signals, estimate, find_advantage
from fusedrl.engine.policy.objectives import make_objective, minibatch_weights, objective_loss
from fusedrl.engine.rewards.rewards import RewardError, RewardSet, load_reward
from fusedrl.engine.stages import policy
from fusedrl.engine.stages.policy import train_policy
from fusedrl.engine.stages.rejection import train_rejection
from fusedrl.engine.stages.reward_model import train_reward_model
from fusedrl.kernels.ranking_loss import kwise_ranking_loss


def config(algorithm="ppo", **kwargs):
    return PolicyConfig("m", "d", ("r.py:f",), algorithm, **kwargs)


# what is asked for -> the words that its refusal cannot do without
OPTIONS = {
    # groups of one
    **{
        f"one completion for {name}": (
            lambda name=name: config(name, samples_per_prompt=1),
            ("samples_per_prompt > 1", name, "teaches nothing"),
        )
        for name, row in ALGORITHMS.items()
        if ADVANTAGES[row.advantage] == "group"
    },
    "refills of single completions": (
        lambda: config(refill_tries=2),
        ("refill_tries", "0 with samples_per_prompt = 1"),
    ),
    # the KL
    **{
        f"{name} in the reward": (
            lambda name=name: KLConfig(placement="reward", estimator=name),
            ("k1 with kl.placement = reward", "moves the optimum"),
        )
        for name in ("k2", "k3", "abs", "full")
    },
    "k3 of sequences": (
        lambda: KLConfig(level="sequence", estimator="k3"),
        ("kl.level", "kl.estimator = k2"),
    ),
    "the KL to come beside the reward": (
        lambda: KLConfig(level="future", placement="reward"),
        ("kl.level", "future only with loss"),
    ),
    "a target for no KL": (
        lambda: KLConfig(coef=0.0, target=6.0),
        ("kl.target", "it is multiplied, so 0 stays 0"),
    ),
    "a negative KL": (lambda: KLConfig(coef=-1.0), ("kl.coef >= 0",)),
    "an infinite KL": (lambda: KLConfig(coef=math.inf), ("kl.coef",)),
    "a place that there is not": (
        lambda: KLConfig(placement="rewards"),
        ("kl.placement reward or loss", "'rewards'"),
    ),
    "an estimator that there is not": (lambda: KLConfig(estimator="k4"), ("kl.estimator", "'k4'")),
    "a level that there is not": (lambda: KLConfig(level="tokens"), ("kl.level", "'tokens'")),
    "both forms of the penalty": (
        lambda: PenaltyConfig(target=0.1, kl_min=0.1, kl_max=0.2),
        ("either target, or both kl_min and kl_max",),
    ),
    "half a penalty": (
        lambda: PenaltyConfig(kl_min=0.1),
        ("either target, or both kl_min and kl_max",),
    ),
    "thresholds the wrong way round": (
        lambda: PenaltyConfig(kl_min=0.2, kl_max=0.1),
        ("penalty.kl_min", "below kl_max"),
    ),
    # the loss
    "an aggregation that there is not": (
        lambda: LossConfig(aggregation="mean"),
        ("loss.aggregation one of token_mean", "'mean'"),
    ),
    "a bound of another objective": (
        lambda: make_objective(config("grpo", loss=LossConfig(clip_max=5.0)), 1.0),
        ("does not use clip_max",),
    ),
    "a dual clip below the ratio": (lambda: LossConfig(dual_clip=1.0), ("loss.dual_clip > 1",)),
    "no room for values": (lambda: LossConfig(value_clip=0.0), ("loss.value_clip > 0", "null")),
    "a value loss that is climbed": (
        lambda: LossConfig(value_coef=-0.1),
        ("loss.value_coef >= 0",),
    ),
    "a discount above 1": (lambda: LossConfig(gamma=1.1), (r"loss.gamma in [0, 1]",)),
    # the scores
    "a buffer longer than completions": (
        lambda: config(overlong_buffer=65),
        ("overlong_buffer", "64"),
    ),
    "weights of other rewards": (
        lambda: config(reward_weights=(1.0, 2.0)),
        ("reward_weights with as many numbers as there are rewards, 1",),
    ),
    "a weight that is no number": (
        lambda: config(reward_weights=(math.nan,)),
        ("reward_weights to be finite",),
    ),
    "a number of its groups that is none": (
        lambda: config(optim=OptimConfig(lr=math.inf)),
        ("optim.lr to be finite, got inf",),
    ),
    "one of a list": (lambda: config(optim=OptimConfig(betas=(0.0, math.nan))), ("optim.betas",)),
    "no model": (lambda: PolicyConfig("", "d", ("r.py:f",), "grpo"), ("expected model",)),
    "a decay that grows": (lambda: OptimConfig(weight_decay=-1.0), ("optim.weight_decay >= 0",)),
    "more than all of the probability": (
        lambda: GenerationConfig(top_p=1.5),
        ("generation.top_p in (0, 1]",),
    ),
    "less than none of it": (lambda: GenerationConfig(min_p=-0.5), ("generation.min_p in [0, 1]",)),
    "more invalid than all": (
        lambda: config(max_invalid_fraction=1.5),
        (r"max_invalid_fraction in [0, 1]",),
    ),
    "no disagreement at all": (lambda: config(max_logp_diff=0.0), ("max_logp_diff > 0",)),
    # sampling
    "a truncated sampler and a natural gradient": (
        lambda: config("trpo", generation=GenerationConfig(top_p=0.9)),
        ("without top_k, top_p and min_p", "trpo", "(0, 0.9, 0.0)"),
    ),
    "a truncated sampler and the whole vocabulary's KL": (
        lambda: config(
            "grpo",
            generation=GenerationConfig(top_k=5),
            kl=KLConfig(coef=0.1, placement="loss", estimator="full"),
        ),
        ("without top_k, top_p and min_p", "kl.estimator = full", "k1, k2 or k3"),
    ),
    "a greedy sampler": (
        lambda: config(generation=GenerationConfig(temperature=0.0)),
        ("generation.temperature > 0", "do not explore"),
    ),
    "prompts without a token": (lambda: config(max_prompt_length=0), ("max_prompt_length >= 1",)),
    "more minibatches than completions": (
        lambda: config(prompts_per_step=2, minibatches=3),
        ("minibatches <=", "= 2"),
    ),
    "an adapter that is not there": (
        lambda: config(reference="adapter_off"),
        ("without lora", "no adapter to switch off"),
    ),
}


@pytest.mark.parametrize("what", OPTIONS)
def test_contradictory_options(what):
    make, words = OPTIONS[what]
    with pytest.raises(ConfigError) as caught:
        make()
    assert all(
        word in str(caught.value)
        for word in ("expected" if "does not use" not in words[0] else "", *words)
    ), str(caught.value)


def test_what_is_not_refused():
    """The neighbours of what is: one number further everything is a run."""
    for make in (
        lambda: config("grpo", samples_per_prompt=2),
        lambda: KLConfig(placement="loss", estimator="k3"),
        lambda: KLConfig(coef=0.0),
        lambda: config(score_clip=0.1),
        lambda: LossConfig(value_clip=None),
        lambda: config(max_invalid_fraction=1.0),
        lambda: config("dapo", refill_tries=0),
        lambda: config("remax", samples_per_prompt=2),
    ):
        make()


# ---- columns -------------------------------------------------------------------------------------
@pytest.fixture
def run(tiny_model, tmp_path, write_jsonl):
    def make(
        rows,
        reward="def f(completions, **columns):\n    return [1.0] * len(completions)\n",
        **kwargs,
    ):
        (tmp_path / "rewards.py").write_text(reward)
        return PolicyConfig(
            str(tiny_model),
            write_jsonl("data.jsonl", rows),
            (f"{tmp_path / 'rewards.py'}:f",),
            "grpo",
            samples_per_prompt=2,
            steps=1,
            prompts_per_step=2,
            generation=GenerationConfig(max_new_tokens=4),
            optim=OptimConfig(lr=1e-3),
            run=RunConfig(dir=str(tmp_path / "run"), progress=False),
            **kwargs,
        )

    return make


@pytest.mark.parametrize(
    "rows, words",
    [
        ([{"question": "w1"}], ("prompt",)),
        ([{"prompt": "w1"}, {"promt": "w2"}], (":2: missing column", "found 'promt'")),
        ([{"prompt": 3}], ("prompt", "string")),
        (
            [{"prompt": "w1", "completions": "x"}],
            ("completions", "argument of every reward", "rename"),
        ),
        ([], ("no usable row",)),
    ],
)
def test_data_without_its_columns(run, rows, words):
    chosen = run(rows)
    with pytest.raises((DataError, ConfigError)) as caught:
        train_policy(chosen)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not (Path(chosen.run.dir) / "model").exists()


def test_a_reward_without_its_column(run):
    needs_gold = (
        "def f(completions, gold):\n    return [float(c == g) for c, g in zip(completions, gold)]\n"
    )
    with pytest.raises(
        RewardError,
        match="reward 'f' needs the column 'gold' of the data, which has answer beside the prompt; "
        "add it there, or give",
    ):
        train_policy(run([{"prompt": "w1 w2", "answer": "w3"}], needs_gold))
    rewards = RewardSet(
        [
            load_reward(
                lambda completions, gold=None: [0.0 if gold is None else 1.0] * len(completions)
            )
        ]
    )
    assert rewards.score(["p"], ["c"], [[1]], [[2]]).total == [0.0]


@pytest.mark.parametrize(
    "advantage, words",
    [("gae", "values"), ("td0", "values"), ("remax", "greedy_scores"), ("grpo", "group_ids")],
)
def test_a_batch_without_its_columns(advantage, words):
    batch = PackedBatch.from_sequences([([1], [2, 3])]).with_columns(
        scores=torch.ones(1), old_logp=torch.zeros(3), ref_logp=torch.zeros(3)
    )
    if advantage == "gae":  # of a critic that says 0: what is trained on it is refused
        ready = estimate(config(), Signals(batch)).with_columns(weights=torch.ones(3))
        with pytest.raises(
            ValueError, match="the column values is not filled; set it by with_columns"
        ):
            objective_loss(
                config(),
                make_objective(config(), 1.0),
                0.0,
                ready,
                torch.zeros(3),
                None,
                torch.zeros(3),
            )
        return
    with pytest.raises(
        ValueError, match=f"the column {words} is not filled; set it by with_columns"
    ):
        find_advantage(advantage).function(Signals(batch))


# ---- ties, and nothing at all --------------------------------------------------------------------
def test_ties(tiny_model, tmp_path, write_jsonl):
    """Of pairs and lists: dropped and counted; within a list they form no pair; data of ties alone
    is refused; of scores, no lead."""
    tie = {"prompt": "w1", "chosen": "w2", "rejected": "w2"}
    pairs, dropped = load_pairs(write_jsonl("pairs.jsonl", [tie, tie | {"rejected": "w3"}]))
    assert (len(pairs), dropped) == (1, {"the answers are equal": 1})
    lists = [
        {"prompt": "w1", "completions": ["w2", "w3"], "ranks": ranks} for ranks in ([1, 1], [1, 2])
    ]
    ranked, dropped = load_ranked(write_jsonl("lists.jsonl", lists))
    assert (len(ranked), dropped) == (1, {"all answers tie": 1})
    with pytest.raises(DataError, match="the answers are equal"):
        train_reward_model(
            RewardModelConfig(
                str(tiny_model),
                write_jsonl("ties.jsonl", [tie] * 3),
                run=RunConfig(dir=str(tmp_path / "rm"), progress=False),
            )
        )
    scores, groups = torch.tensor([1.0, 1.0, 0.0]), torch.tensor([0, 3], dtype=torch.int32)
    tied = kwise_ranking_loss(scores, torch.tensor([1, 1, 2]), groups)
    assert tied == pytest.approx(math.log1p(math.exp(-1.0))), "two pairs of three, and their mean"
    batch = PackedBatch.from_sequences([([1], [2])] * 3).with_columns(
        scores=torch.tensor([2.0, 2.0, 1.0]), group_ids=torch.zeros(3, dtype=torch.int64)
    )
    assert not find_advantage("pass_at_k").function(Signals(batch)).any()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_empty_completions_are_defined(algorithm):
    """A completion without a token has a score and nothing to learn from; a batch of nothing but
    such has a loss of 0 and no gradient."""
    row, chosen = ALGORITHMS[algorithm], config(algorithm, kl=KLConfig(coef=0.1))
    for lengths in ([3, 0, 2, 4], [0, 0]):
        batch = PackedBatch.from_sequences([([1, 2], [3] * n) for n in lengths])
        zeros = torch.zeros(batch.num_tokens)
        batch = batch.with_columns(
            scores=torch.arange(float(len(lengths))),
            group_ids=torch.zeros(len(lengths), dtype=torch.int64),
            greedy_scores=torch.ones(len(lengths)),
            old_logp=zeros - 1,
            ref_logp=zeros - 2,
            values=zeros,
        )
        batch = estimate(chosen, Signals.of(chosen, batch, 0.1, 0.0))
        batch = batch.with_columns(weights=minibatch_weights(chosen, batch))
        logp = (zeros - 1).requires_grad_()
        values = zeros.clone() if ADVANTAGES[row.advantage] == "critic" else None
        loss, stats, _ = objective_loss(
            chosen, make_objective(chosen, 1.0), 0.1, batch, logp, None, values
        )
        loss.backward()
        assert loss.isfinite()
        assert logp.grad.isfinite().all()
        assert not logp.grad[~batch.action_mask].any()
        assert stats.tokens == sum(lengths)
        assert sum(lengths) or loss == 0


def test_nothing_of_a_refused_run_is_left_or_loaded(run, monkeypatch):
    """A contradiction that only the registered functions can tell is told before the model is
    read."""
    monkeypatch.setattr(
        policy.HybridActor, "from_pretrained", lambda *a, **k: pytest.fail("the model was loaded")
    )
    chosen = run([{"prompt": "w1"}], loss=LossConfig(clip_max=3.0))
    with pytest.raises(ConfigError, match="does not use clip_max"):
        train_policy(chosen)
    assert not Path(chosen.run.dir).exists()


def test_flat_groups_are_counted(run):
    """Groups of equal scores are no error: the share is logged, and without a KL nothing moves."""
    chosen = run([{"prompt": "w1"}, {"prompt": "w2"}], kl=KLConfig(coef=0.0))
    train_policy(chosen)
    row = json.loads((Path(chosen.run.dir) / "metrics.jsonl").read_text())
    assert (row["frac_reward_zero_std"], row["grad_norm"]) == (1.0, 0.0)


# ---- functions of loss.objective and loss.advantage ----------------------------------------------
FUNCTIONS = """
import sys
import torch

def raises(*_):
    return [][0]

def leaves(*_):
    sys.exit(0)

class Silent(Exception):
    def __str__(self):
        return self.missing

def silent(*_):
    raise Silent

def nothing(*_):
    return None

def numbers(*_):
    return [1.0, 2.0]

def short(*_):
    return torch.zeros(2)

def whole(*given):
    batch = getattr(given[0], "batch", given[-1])
    return torch.zeros(batch.num_tokens, dtype=torch.int64, device=batch.device)

def three(x):
    return (x.batch.action_mask.float(),) * 3

def one_of_two(x):
    return x.batch.action_mask.float(), None

value = 3
"""
ANSWERS = {  # function -> what is said of it, wherever it stands
    "raises": r"raised IndexError: list index out of range \(.*users_functions.py:6\)",
    "leaves": r"raised SystemExit: 0 \(.*users_functions.py:9\)",
    "silent": r"raised Silent: <its text cannot be shown> \(.*users_functions.py:16\)",
    "nothing": r", nothing \(.*users_functions.py:18\): expected it to return \[\d+\] "
    r"(terms|numbers), one per token, got NoneType",
    "numbers": r", numbers \(.*users_functions.py:21\): expected .*, one per token, got list",
    "short": r"one per token, got \[2\]",
    "whole": r"one per token, got numbers of torch.int64; make them floating-point ones",
    "value": "'users_functions.value' is no function, but int",
    "no": "'users_functions.no' cannot be imported: AttributeError: ",
}


@pytest.fixture
def users(tmp_path, monkeypatch):
    (tmp_path / "users_functions.py").write_text(FUNCTIONS)
    (tmp_path / "broken_functions.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in ("users_functions", "broken_functions"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    "option, name, said",
    [
        *(("objective", *answer) for answer in ANSWERS.items()),
        *(("advantage", *answer) for answer in ANSWERS.items()),
        ("advantage", "three", "to return advantages, or advantages and returns, got a tuple of 3"),
        ("advantage", "one_of_two", "one per token, got NoneType"),
    ],
)
def test_a_function_that_raises_or_returns_something_else_is_named(run, users, option, name, said):
    full = f"users_functions.{name}"
    with pytest.raises(ConfigError, match=said) as caught:
        train_policy(run([{"prompt": "w1"}] * 2, loss=LossConfig(**{option: full})))
    assert full in str(caught.value)
    assert str(caught.value).startswith((f"the {option} {full}", "config: "))


def test_by_the_command_line_too(run, users, capsys):
    chosen = run([{"prompt": "w1"}] * 2)
    for option, name, said in (
        (
            "objective",
            "users_functions.raises",
            "the objective users_functions.raises raised Index",
        ),
        ("advantage", "users_functions.nothing", "one per token, got NoneType"),
        ("advantage", "broken_functions.f", "cannot be imported: ZeroDivisionError: division by"),
    ):
        argv = ["train", "grpo", "--model", chosen.model, "--data", chosen.data]
        argv += ["--reward", chosen.reward[0], "--prompts_per_step", "2", "--run.dir"]
        argv += [f"{chosen.run.dir}-{option}-{name}", f"--loss.{option}", name]
        assert main([*argv, "--generation.max_new_tokens", "2"]) == 2
        shown = capsys.readouterr().err
        assert said in shown
        assert "Traceback" not in shown


def test_the_errors_of_built_in_functions_are_their_own(device):
    batch = PackedBatch.from_sequences([([1], [2, 3])], device=device)
    batch = batch.with_columns(scores=torch.zeros(1, device=device))
    with pytest.raises(ValueError, match="column greedy_scores is not filled") as caught:
        estimate(config(loss=LossConfig(advantage="remax")), Signals(batch))
    assert "raised" not in str(caught.value)


# ---- what only the model can tell ----------------------------------------------------------------
@pytest.mark.parametrize("stage", ["policy", "rejection"])
def test_stop_tokens_outside_the_vocabulary_name_their_option(run, monkeypatch, stage):
    monkeypatch.setattr(
        policy.HybridActor, "generate", lambda *a, **k: pytest.fail("something was drawn")
    )
    chosen = run([{"prompt": "w1"}] * 2)
    generation = GenerationConfig(max_new_tokens=4, stop_token_ids=(3, 99999))
    message = (
        r"generation.stop_token_ids: expected token ids below the 32 of the model's vocabulary, "
        "got 99999"
    )
    with pytest.raises(ConfigError, match=message):
        if stage == "policy":
            train_policy(replace(chosen, generation=generation))
        else:
            train_rejection(
                RejectionConfig(
                    chosen.model,
                    chosen.data,
                    chosen.reward,
                    samples_per_prompt=2,
                    generation=generation,
                    run=chosen.run,
                )
            )


def test_stop_tokens_of_a_judge_do_too(run, capsys):
    chosen = run([{"prompt": "w1"}] * 2)
    argv = ["judge", "--a", chosen.model, "--b", chosen.model, "--data", chosen.data]
    assert main([*argv, "--reward", chosen.reward[0], "--stop_token_ids", "99999"]) == 2
    assert "--stop_token_ids: expected token ids below the 32" in capsys.readouterr().err


def test_a_rank_that_no_projection_has_names_its_option(run):
    with pytest.raises(
        ConfigError, match=r"lora\.rank: expected at most \d+ on self_attn\.\w+, .* got 100000"
    ):
        train_policy(run([{"prompt": "w1"}] * 2, lora=LoRAConfig(rank=100_000)))
