"""Online DPO: the gradient of DPO's loss on the policy's own samples, ranked by the rewards."""

import json
import math
from pathlib import Path

import pytest
import torch
from tests.engine.policy.test_advantages import rollout

from fusedrl.engine.actor import HybridActor
from fusedrl.engine.base.errors import ConfigError
from fusedrl.engine.config import (
    DPOConfig,
    GenerationConfig,
    KLConfig,
    LossConfig,
    OptimConfig,
    PolicyConfig,
    ReplayConfig,
    RunConfig,
)
from fusedrl.engine.optim.learner import Learner, Update
from fusedrl.engine.policy.advantages import Signals, find_advantage
from fusedrl.engine.preference.pairs import TokenPair, pack_pairs
from fusedrl.engine.rollout.reference import Frozen
from fusedrl.engine.stages import dpo, policy
from fusedrl.engine.stages.policy import train_policy


@pytest.fixture
def make(tiny_model, tiny_teacher, tmp_path, write_jsonl, device):
    """Runs whose reference is another model, so that h is not 0 at the first step."""
    (tmp_path / "rewards.py").write_text(
        "def likes_w3(completions, **columns):\n"
        "    return [float(sum(w == 'w3' for w in text.split())) for text in completions]\n"
    )
    data = write_jsonl("prompts.jsonl", [{"prompt": f"w{i % 28} w5"} for i in range(24)])

    def made(**changes):
        defaults = dict(
            device=str(device),
            dtype="float32",
            steps=1,
            prompts_per_step=24,
            tokens_per_microbatch=60,
            reference_model=str(tiny_teacher),
            kl=KLConfig(coef=0.2),
            generation=GenerationConfig(max_new_tokens=12),
            optim=OptimConfig(lr=3e-3, schedule="constant"),
            run=RunConfig(dir=str(tmp_path / "run"), progress=False),
        )
        reward = (f"{tmp_path / 'rewards.py'}:likes_w3",)
        return PolicyConfig(str(tiny_model), data, reward, "online_dpo", **(defaults | changes))

    return made


def rows_of(config):
    lines = (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_the_gradient_is_that_of_the_dpo_stage(make, monkeypatch, device):
    """The pairs of a rollout, given to fusedrl train dpo's own loss: the same gradient, ties left
    out of the mean in both."""
    config, seen = make(), []
    original = policy.update
    monkeypatch.setattr(
        policy,
        "update",
        lambda actor, reference, learner, batch, *rest: (
            seen.append(batch) or original(actor, reference, learner, batch, *rest)
        ),
    )
    train_policy(config)
    (batch,), (row,) = seen, rows_of(config)
    pairs, ties = [], 0
    starts = batch.cu_seqlens.tolist()
    for one in range(0, batch.num_sequences, 2):
        scores = batch.scores[one : one + 2].tolist()
        ties += scores[0] == scores[1]
        if scores[0] == scores[1]:
            continue
        best = one if scores[0] > scores[1] else one + 1
        parts = []
        for b in (best, 2 * one + 1 - best):
            ids = batch.token_ids[starts[b] : starts[b + 1]].tolist()
            prompt = int((~batch.action_mask[starts[b] : starts[b + 1]]).sum())
            parts.append((ids[:prompt], ids[prompt:]))
        pairs.append(TokenPair(parts[0][0], parts[0][1], parts[1][1]))
    assert 3 < len(pairs) < 24
    assert row["frac_reward_zero_std"] == ties / 24
    actor, reference = (
        HybridActor.from_pretrained(path, dtype="float32", device=device)
        for path in (config.model, config.reference_model)
    )
    theirs = DPOConfig("m", "d", beta=0.2, tokens_per_microbatch=60)
    packed, cuts = pack_pairs(pairs, 60, torch.device(device))
    packed = dpo.with_reference(Frozen(reference), packed, cuts)
    learner = Learner(actor, config.optim)
    learner.optimizer.zero_grad()
    scores, loss = dpo._backward(Update(learner), actor, packed, cuts, pairs, theirs)
    assert abs(loss - math.log(2)) > 1e-3, "h is not 0"
    norm = torch.cat([p.grad.flatten() for p in actor.parameters() if p.grad is not None]).norm()
    assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


def test_only_the_best_and_the_worst_are_pulled(device):
    """Groups of four, one and a tie: by hand."""
    batch = rollout(device, [1, 1, 1, 1, 2, 3, 3])
    batch = batch.with_columns(scores=torch.tensor([1.0, 5.0, -2, 3, 9, 4, 4], device=device))
    x = Signals(batch, kl_coef=0.3)
    found = find_advantage("online_dpo").function(x)
    each = [found[batch.slots([b])][batch.action_mask[batch.slots([b])]] for b in range(7)]
    ratio = x.shaped.kl_per_sequence.double().tolist()
    pull = 4 * 3 * 0.3 / (1 + math.exp(0.3 * (ratio[1] - ratio[2])))
    expected = [0.0, pull, -pull, 0.0, 0.0, 0.0, 0.0]
    for advantages, number in zip(each, expected, strict=True):
        assert advantages.tolist() == pytest.approx([number] * len(advantages), rel=1e-5)


def test_a_constant_in_the_reward_changes_nothing(device):
    batch = rollout(device, [1, 1, 2, 2])
    found = [
        find_advantage("online_dpo").function(
            Signals(batch.with_columns(scores=batch.scores * scale + shift), kl_coef=0.3)
        )
        for scale, shift in ((1, 0), (1, 64), (100, 0))
    ]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2]), "nor does their size: only the order counts"


def test_it_learns_what_the_reward_ranks_higher(make, tmp_path):
    config = make(steps=25, reference_model=None, kl=KLConfig(coef=0.1))
    train_policy(config)
    rows = rows_of(config)
    before, after = (sum(row["reward"] for row in part) / 5 for part in (rows[:5], rows[-5:]))
    assert after > before + 0.5
    assert all(row["policy/first_ratio_max"] == 1.0 for row in rows)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(kl=KLConfig(coef=0.0)), "it is DPO's beta"),
        (dict(kl=KLConfig(coef=0.1, placement="loss")), "it is DPO's beta"),
        (dict(minibatches=2), "pairs that the policy itself has just drawn"),
        (dict(epochs=2), "pairs that the policy itself has just drawn"),
        (dict(replay=ReplayConfig()), "replay"),
        (dict(loss=LossConfig(aggregation="token_mean")), "sums over tokens"),
        (dict(samples_per_prompt=1), "teaches nothing"),
        (dict(mask_truncated_completions=True), "half a pair"),
    ],
)
def test_what_is_no_gradient_of_dpo_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        PolicyConfig("m", "d", ("r.py:f",), "online_dpo", **options)
