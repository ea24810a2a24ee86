"""Completions that an update leaves out: those whose advantages are all 0, where nothing beside the
advantage has a gradient."""

import json
import math
from pathlib import Path

import pytest
import torch

from fusedrl.engine.base.packing import PackedBatch
from fusedrl.engine.config import (
    CorrectionConfig,
    CriticConfig,
    GenerationConfig,
    KLConfig,
    LoRAConfig,
    LossConfig,
    OptimConfig,
    PolicyConfig,
    ReplayConfig,
    RunConfig,
)
from fusedrl.engine.config.algorithms import ALGORITHMS
from fusedrl.engine.model.weights import load_decoder
from fusedrl.engine.policy.metrics import measure
from fusedrl.engine.policy.objectives import leaves_out, register_objective, without_gradient
from fusedrl.engine.stages import policy
from fusedrl.engine.stages.policy import advantages_first, train_policy

# of the twelve prompts every third has groups of unequal rewards, level with the others' 100
REWARDS = """
def some(prompts, completions, completion_ids, **columns):
    return [
        100.0 + (len(ids) + sum(ids) % 5 if len(prompt.split()) % 3 == 1 else 0.0)
        for prompt, ids in zip(prompts, completion_ids)
    ]

def flat(prompts, completions, completion_ids, **columns):
    return [100.1] * len(completions)
"""
LEAVING = [
    "opo",
    "gpg",
    "dr_grpo",
    "dapo",
    "gspo",
    "cispo",
    "sapo",
    "gmpo",
    "pass_at_k",
]


@pytest.fixture
def make(tiny_model, tmp_path, write_jsonl, device):
    (tmp_path / "rewards.py").write_text(REWARDS)
    data = write_jsonl(
        "prompts.jsonl",
        [{"prompt": " ".join(f"w{(3 * i + j) % 28}" for j in range(1 + i % 5))} for i in range(12)],
    )

    def config(algorithm="dr_grpo", reward="some", name="run", run=None, **kwargs):
        defaults = dict(
            device=str(device),
            dtype="float32",
            steps=3,
            prompts_per_step=6,
            samples_per_prompt=3,
            tokens_per_microbatch=40,
            minibatches=2,
            epochs=2,
            generation=GenerationConfig(max_new_tokens=6),
            optim=OptimConfig(lr=3e-3, schedule="constant"),
            run=RunConfig(dir=str(tmp_path / name), progress=False, **(run or {})),
        )
        return PolicyConfig(
            str(tiny_model),
            data,
            (f"{tmp_path / 'rewards.py'}:{reward}",),
            algorithm,
            **(defaults | kwargs),
        )

    return config


@pytest.fixture
def trained(monkeypatch, device):
    """Train, return metrics and weights; `whole`: with everything computed, in the same cuts."""
    real, cuts_of = policy.without_gradient, policy.cuts_of
    computed = []
    forward = policy.RolloutLoss.__call__

    def counted(self, batch):
        computed.append(batch.num_sequences)
        return forward(self, batch)

    def same_cuts(*args, **kwargs):
        with monkeypatch.context() as inside:
            inside.setattr(policy, "without_gradient", real)
            return cuts_of(*args, **kwargs)

    def run(config, whole=False):
        computed.clear()
        with_replay = policy.with_replay

        def same_replay(cuts, fresh, replayed, tokens, apart, lanes):
            return with_replay(cuts, fresh, replayed, tokens, real(config, replayed), lanes)

        with monkeypatch.context() as patched:
            patched.setattr(policy.RolloutLoss, "__call__", counted)
            if whole:
                patched.setattr(policy, "cuts_of", same_cuts)
                patched.setattr(policy, "with_replay", same_replay)
                patched.setattr(policy, "without_gradient", lambda *args: set())
            train_policy(config)
        where = Path(config.run.dir)
        rows = [json.loads(line) for line in (where / "metrics.jsonl").read_text().splitlines()]
        decoder = load_decoder(where / "model", dtype="float32", device=device)
        return rows, dict(decoder.named_parameters()), list(computed)

    return run


def _equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(p, other[k]) for k, p in one.items())


# ---- the same weights ----------------------------------------------------------------------------
@pytest.mark.parametrize("algorithm", LEAVING)
def test_what_is_left_out_changes_no_bit(make, trained, algorithm):
    rows, weights, computed = trained(make(algorithm, refill_tries=0))
    whole_rows, whole, whole_computed = trained(
        make(algorithm, refill_tries=0, name="whole"), whole=True
    )
    assert _equal(weights, whole)
    assert sum(computed) < sum(whole_computed) == 3 * 2 * 18
    assert sum(computed) == sum(round(36 * (1 - row["policy/left_out_fraction"])) for row in rows)
    for row, other in zip(rows, whole_rows, strict=True):
        assert row["policy/first_ratio_min"] == row["policy/first_ratio_max"] == 1.0
        assert other["policy/left_out_fraction"] == 0
        for name in (
            "entropy",
            "reward",
            "sampling/sampling_logp_difference/max",
            "step_tokens",
            "grad_norm",
        ):
            assert row[name] == other[name], name
        assert row["loss/policy_avg"] == pytest.approx(other["loss/policy_avg"], rel=1e-5, abs=1e-9)


@pytest.mark.parametrize(
    "options",
    [
        {"strict": True},
        {"dtype": "bfloat16"},
        {"lora": LoRAConfig(rank=2)},
        {"checkpoint_activations": True},
        {"replay": ReplayConfig(capacity=30, fraction=0.5, max_age=2)},
        {
            "algorithm": "pass_at_k",
            "tokens_per_microbatch": 20,
            "replay": ReplayConfig(capacity=30, fraction=0.5, max_age=3),
            "checkpoint_activations": True,
        },
        {"correction": CorrectionConfig("truncated")},
        {"correction": CorrectionConfig(off_policy_delta=1e-4)},
        {"minibatches": 1, "epochs": 1},
        {"minibatches": 1, "epochs": 1, "correction": CorrectionConfig(bypass=True)},
        {"correction": CorrectionConfig(bypass=True)},
        {"kl": KLConfig(coef=0.0, measure=True)},
        {"tokens_per_microbatch": 7},
        {"score_clip": 101.0},
    ],
    ids=lambda options: "-".join(options),
)
def test_beside_every_option(make, trained, options):
    rows, weights, computed = trained(make(**options))
    _, whole, whole_computed = trained(make(name="whole", **options), whole=True)
    assert _equal(weights, whole)
    assert sum(computed) < sum(whole_computed)
    assert all(0 < row["policy/left_out_fraction"] < 1 for row in rows)


def test_replayed_completions_are_cut_alike_where_everything_is_computed(
    make, trained, monkeypatch
):
    """What the comparisons above compare: the same micro-batches, of which some are left out."""
    seen, apart, with_replay = [], [], policy.with_replay

    def recorded(*args):
        seen.append(with_replay(*args))
        apart.append(args[-1])
        return seen[-1]

    monkeypatch.setattr(policy, "with_replay", recorded)
    options = {"replay": ReplayConfig(capacity=30, fraction=0.5, max_age=3)}
    for name in ("run", "whole"):
        trained(
            make("pass_at_k", name=name, tokens_per_microbatch=20, **options), whole=name == "whole"
        )
    count = len(seen) // 2
    assert count >= 2
    assert any(apart)
    assert seen[:count] == seen[count:]


def test_resumed_bitwise(make, trained):
    _, straight, _ = trained(make(steps=4))
    trained(make(steps=2, name="resumed"))
    rows, resumed, _ = trained(make(steps=4, name="resumed", run={"resume": True}))
    assert _equal(straight, resumed)
    assert len(rows) == 4


def test_where_all_are_flat_a_step_is_still_a_step(make, trained):
    """AdamW decays the weights and its moments move on, as where all was computed."""
    config = {"optim": OptimConfig(lr=3e-3, schedule="constant", weight_decay=0.1)}
    rows, weights, computed = trained(make(reward="flat", **config))
    _, whole, _ = trained(make(reward="flat", name="whole", **config), whole=True)
    assert _equal(weights, whole)
    assert all(row["grad_norm"] == 0 for row in rows)
    assert all(row["policy/left_out_fraction"] > 0.5 for row in rows)
    assert len(computed) == 3 * 2 * 2  # one micro-batch of each minibatch


def test_one_token_is_enough_to_be_computed(make, device):
    batch = PackedBatch.from_sequences(
        [([1, 2], [3 + i, 4, 5][: 1 + i % 3]) for i in range(6)], device=device
    )
    advantages_B = torch.tensor([0.0, 1.5, -0.0, -2.0, 0.0, 0.0], device=device)
    sizes = batch.cu_seqlens.long().diff()
    advantages_N = torch.where(batch.action_mask, advantages_B.repeat_interleave(sizes), 0.0)
    advantages_N[batch.slots([5])[-1]] = -1e-30
    advantages_N[batch.slots([4])[0]] = 3.0  # of the prompt: no action
    assert without_gradient(make(), batch.with_columns(advantages=advantages_N)) == {0, 2, 4}
    advantages_N[batch.slots([0])[-1]] = math.nan  # must not pass unseen
    assert without_gradient(make(), batch.with_columns(advantages=advantages_N)) == {2, 4}


# ---- where nothing is left out -------------------------------------------------------------------
@register_objective("left_out_test")
def _of_its_own(logp_N, old_logp_N, advantages_N, batch):
    return -(advantages_N + 1) * logp_N


@pytest.mark.parametrize(
    "algorithm, options",
    [
        ("grpo", {}),  # the KL in the loss
        ("dr_grpo", {"loss": LossConfig(entropy_coef=0.01)}),
        ("dr_grpo", {"loss": LossConfig(objective="left_out_test")}),
        ("dr_grpo", {"loss": LossConfig(objective="ppo_penalty")}),
        ("dr_grpo", {"loss": LossConfig(objective="dro")}),
        ("dr_grpo", {"loss": LossConfig(objective="trpo"), "minibatches": 1, "epochs": 1}),
    ],
)
def test_what_has_a_gradient_beside_the_advantage_is_computed(make, trained, algorithm, options):
    config = make(algorithm, steps=1, **options)
    assert not leaves_out(config)
    assert not advantages_first(config)
    rows, _, _ = trained(config)
    assert "policy/left_out_fraction" not in rows[0]


@pytest.mark.parametrize("critic", [None, CriticConfig(model="policy")])
def test_what_a_critic_learns_from_is_computed(make, critic, device):
    config = make("ppo", kl=KLConfig(coef=0.0), samples_per_prompt=1, critic=critic)
    batch = PackedBatch.from_sequences([([1], [2, 3])] * 2, device=device)
    zeros = torch.zeros(batch.num_tokens, device=device)
    batch = batch.with_columns(advantages=zeros, returns=zeros)
    assert without_gradient(config, batch) == (set() if critic is None else {0, 1})


def test_every_row_is_one_or_the_other():
    """A new row of the table of algorithms is decided on here."""
    found = [
        name
        for name in ALGORITHMS
        if advantages_first(PolicyConfig("m", "d", ("r",), name, run=RunConfig("x")))
    ]
    assert sorted(found) == sorted(LEAVING)


def test_before_advantages_are_known_nothing_is_left_out(make, device):
    batch = PackedBatch.from_sequences([([1], [2, 3])], device=device)
    assert without_gradient(make(), batch) == set()
    empty = PackedBatch.from_sequences([([1], [])], device=device)
    zeros = torch.zeros(1, device=device)
    assert without_gradient(make(), empty.with_columns(advantages=zeros)) == {0}


# ---- metrics -------------------------------------------------------------------------------------
def test_metrics_of_a_rollout_that_was_scored_in_part(make, device):
    """Sampler and trainer are compared where both spoke; the KL is of all completions, by what the
    sampler said of the others."""
    config = make(kl=KLConfig(coef=0.0, measure=True))
    batch = PackedBatch.from_sequences([([1], [2, 3]), ([1], [4, 5, 6])], device=device)
    rolled = torch.where(batch.action_mask, -1.0, 0.0)
    old = torch.where(batch.positions == 1, -1.25, rolled)  # .25 off at the first of each
    scored = torch.zeros(batch.num_tokens, dtype=torch.bool, device=device)
    scored[batch.slots([0])] = True
    batch = batch.with_columns(
        rollout_logp=rolled,
        old_logp=torch.where(scored, old, rolled),
        old_entropy=torch.where(scored, 2.0, 0.0),
        ref_logp=torch.where(batch.action_mask, -3.0, 0.0),
        scores=torch.zeros(2, device=device),
    )
    config = PolicyConfig(**(vars(config) | {"max_logp_diff": 1.0}))
    found = measure(batch, 0.0, config, scored)
    assert found["entropy"] == pytest.approx(2.0)
    assert found["sampling/sampling_logp_difference/mean"] == pytest.approx(0.125)
    assert found["sampling/sampling_logp_difference/max"] == pytest.approx(0.25)
    assert found["kl"] == pytest.approx(((1.75 + 2.0) + 3 * 2.0) / 2)
