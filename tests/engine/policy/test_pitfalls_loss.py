"""Bugs that others shipped, in advantages, losses and what is carried from step to step: each check
passes on the product and refuses the faulty variant that stands beside it. Numbers are those of the
list in docs/algorithms.md, which names the tests of the other items too.
"""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fusedrl.engine.base.errors import ConfigError
from fusedrl.engine.base.packing import PackedBatch
from fusedrl.engine.config import (
    GenerationConfig,
    KLConfig,
    LossConfig,
    OptimConfig,
    PolicyConfig,
    RunConfig,
)
from fusedrl.engine.config.algorithms import ADVANTAGES
from fusedrl.engine.policy.advantages import Signals, estimate, find_advantage
from fusedrl.engine.policy.control import Control, KLController
from fusedrl.engine.policy.metrics import measure
from fusedrl.engine.policy.objectives import make_objective, minibatch_weights, objective_loss
from fusedrl.engine.stages import policy
from fusedrl.engine.stages.policy import train_policy
from fusedrl.kernels.normalize import group_normalize, masked_whiten
from fusedrl.kernels.policy_loss import value_loss

GROUP = [name for name, needs in ADVANTAGES.items() if needs == "group"]


def config(algorithm="grpo", **kwargs):
    return PolicyConfig(
        "m",
        "d",
        ("r.py:f",),
        algorithm,
        **({"generation": GenerationConfig(max_new_tokens=8)} | kwargs),
    )


def rollout(device, lengths, scores, groups=None, seed=0):
    """Completions of these lengths; NaN where there is no action."""
    rng = torch.Generator().manual_seed(seed)
    batch = PackedBatch.from_sequences([([1, 2], [3] * n) for n in lengths], device=device)
    columns = {
        name: torch.where(
            batch.action_mask, torch.randn(batch.num_tokens, generator=rng).to(device), math.nan
        )
        for name in ("old_logp", "ref_logp", "values")
    }
    return batch.with_columns(
        scores=torch.tensor(scores, device=device),
        group_ids=torch.tensor(groups or [0] * len(lengths), device=device),
        **columns,
    )


def slopes(chosen, batch, logp, kl_coef=0.0):
    """[N] d loss / d logp of a whole minibatch."""
    leaf = logp.clone().requires_grad_()
    batch = batch.with_columns(
        weights=minibatch_weights(chosen, batch) if batch.weights is None else batch.weights,
        old_logp=batch.old_logp.nan_to_num(),
    )
    loss, stats, _ = objective_loss(
        chosen, make_objective(chosen, 1.0), kl_coef, batch, leaf, None, None
    )
    loss.backward()
    return leaf.grad, stats


# ---- normalisation: 10, 11 -----------------------------------------------------------------------
X = torch.tensor([3.0, 1.0, -2.0, 6.0, 100.0, 100.0])
LIVE = torch.tensor([True] * 4 + [False] * 2)


@pytest.mark.filterwarnings("ignore:std")
@pytest.mark.parametrize(
    "x, mask, wrong",
    [
        # SkyRL #1305: moments of the pads too
        (X, LIVE, lambda x, m: torch.where(m, (x - x.mean()) / (x.std() + 1e-8), 0)),
        # OpenRLHF #1240: NaN x 0
        (
            torch.where(LIVE, X, math.nan),
            LIVE,
            lambda x, m: ((x * m) - (x * m).sum() / m.sum()) * m,
        ),
        # ROLL #475: the standard deviation of one
        (X[:1], LIVE[:1], lambda x, m: (x - x.mean()) / (x.std() + 1e-8)),
    ],
    ids=["unmasked mean", "NaN times 0", "one token"],
)
def test_10_whitening(x, mask, wrong, device):
    x, mask = x.to(device), mask.to(device)
    live = x[mask].double()
    right = torch.zeros(len(x), dtype=torch.float64, device=device)
    right[mask] = (live - live.mean()) / (live.var(correction=0) + 1e-8).sqrt()

    def check(found):
        torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-5)

    check(masked_whiten(x, mask))
    with pytest.raises(AssertionError):
        check(wrong(x, mask))


def test_10_one_number_a_completion_is_not_broadcast_against_another(monkeypatch, device):
    """scores [B] less a mean [B, 1] is [B, B] (OpenRLHF #1250): sizes are checked, with a
    message."""
    batch = rollout(device, [3, 3], [1.0, 5.0])

    def broadcast(x: Signals):
        return x.totals - x.totals.view(2, 1)

    monkeypatch.setitem(sys.modules, "my_advantages", SimpleNamespace(broadcast=broadcast))
    with pytest.raises(
        ValueError,
        match=r"return \[10\] numbers, one per token, got \[2, 2\]; Signals.per_token spreads one "
        r"per completion",
    ):
        estimate(config(loss=LossConfig(advantage="my_advantages.broadcast")), Signals(batch))


def test_11_groups_by_hand(device):
    """Scores 1, 2, 3, 6 of one prompt: mean 3, Bessel's deviation sqrt(14 / 3); of lengths 1, 1, 2,
    4 the weighted mean is 33 / 8."""
    batch = rollout(device, [1, 1, 2, 4], [1.0, 2.0, 3.0, 6.0])
    sd = math.sqrt(14 / 3)
    by_hand = {
        "dr_grpo": [-2, -1, 0, 3],
        "gpg": [-2, -1, 0, 3],
        "rloo": [-8 / 3, -4 / 3, 0, 4],
        "grpo": [x / (sd + 1e-4) for x in (-2, -1, 0, 3)],
        "opo": [1 - 33 / 8, 2 - 33 / 8, 3 - 33 / 8, 6 - 33 / 8],
        "pass_at_k": [0, 0, 0, 3],
        "online_dpo": [0, 0, 0, 0],  # its beta is the KL's coefficient, which is 0 here
        "gdpo": [x / (sd + 1e-4) / (sd / (sd + 1e-4) + 1e-4) for x in (-2, -1, 0, 3)],
    }
    assert set(by_hand) == set(GROUP)
    for name, expected in by_hand.items():
        found = find_advantage(name).function(Signals(batch))
        torch.testing.assert_close(
            found[batch.cu_seqlens[1:].long() - 1],
            torch.tensor([float(x) for x in expected], device=device),
            rtol=1e-6,
            atol=1e-6,
        )


def test_11_one_alone_is_refused_and_not_trained_on_silently(device):
    for name in GROUP:
        with pytest.raises(ConfigError, match="teaches nothing"):
            config("grpo", samples_per_prompt=1, loss=LossConfig(advantage=name))
    batch = rollout(device, [3], [5.0])
    assert not any(find_advantage(name).function(Signals(batch)).any() for name in GROUP), (
        "what the refusal speaks of"
    )


@pytest.mark.parametrize(
    "wrong",
    [
        # NeMo-RL #4158: E[x^2] - E[x]^2
        lambda s: (s - s.mean()) / ((s * s).mean() - s.mean() ** 2).clamp(min=0).sqrt().add(1e-6),
        # rounding of the mean over a deviation of rounding
        lambda s: (s - s.mean()) / (s.std() + 1e-6),
    ],
    ids=["squares less square", "equal scores over eps"],
)
def test_11_equal_scores_have_no_advantage(wrong, device):
    scores = torch.full((7,), 4001.1, device=device)

    def check(found):
        assert found.abs().max() == 0.0

    check(group_normalize(scores, group_size=7, method="grpo", eps=1e-6).advantages)
    with pytest.raises(AssertionError):
        check(wrong(scores))


def test_11_small_differences_of_large_scores(device):
    scores = torch.tensor([10000.0, 10000.01, 10000.02, 10000.03], device=device)
    wide = scores.double()
    right = (wide - wide.mean()) / (wide.std() + 1e-6)

    def check(found):
        torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-5)

    check(group_normalize(scores, group_size=4, method="grpo", eps=1e-6).advantages)
    with pytest.raises(AssertionError):
        check(
            (scores - scores.mean())
            / (((scores * scores).mean() - scores.mean() ** 2).clamp(min=0).sqrt() + 1e-6)
        )


def test_11_a_sibling_without_actions_counts_with_its_score(device):
    """Its score is placed at no token; a group mean of placed rewards would take it for 0 (OpenRLHF
    #1239)."""
    batch = rollout(device, [3, 0, 3], [4.0, 4.0, 1.0])
    signals = Signals(batch)
    last = batch.cu_seqlens[1:].long() - 1

    def check(totals):
        advantages = group_normalize(totals, batch.group_ids, method="dr_grpo").advantages
        torch.testing.assert_close(advantages, torch.tensor([1.0, 1.0, -2.0], device=device))

    check(signals.totals)
    assert find_advantage("dr_grpo").function(signals)[last[[0, 2]]].tolist() == [1.0, -2.0]
    with pytest.raises(AssertionError):
        check(torch.stack([part.sum() for part in signals.rewards.split(list(batch.lengths))]))


def test_11_a_flat_group_is_still_held_near_the_reference(device):
    """Its loss is the KL alone; to skip it would let it drift (TRL #7068)."""
    batch = rollout(device, [4, 4, 4, 4], [1.0, 1.0, 0.0, 2.0], [0, 0, 1, 1])
    chosen = config("grpo")
    batch = estimate(chosen, Signals(batch))
    at = torch.where(batch.action_mask, batch.old_logp, 0.0)
    flat = batch.slots([0, 1])

    def check(grad):
        assert grad[flat].abs().max() > 1e-3

    check(slopes(chosen, batch, at, kl_coef=0.3)[0])
    skipped = batch.with_columns(weights=minibatch_weights(chosen, batch).index_fill(0, flat, 0.0))
    with pytest.raises(AssertionError):
        check(slopes(chosen, skipped, at, kl_coef=0.3)[0])


# ---- ratios and aggregation: 13, 14, 17 ----------------------------------------------------------
def sequence_ratios(batch, logp, reduce):
    """Of each completion, exp of the mean or the sum of its log ratios; `all` takes masked slots
    in."""
    d = logp - batch.old_logp.nan_to_num()
    parts, masks = d.split(list(batch.lengths)), batch.action_mask.split(list(batch.lengths))
    return [
        float({"mean": part[keep].mean, "sum": part[keep].sum, "all": part.mean}[reduce]().exp())
        for part, keep in zip(parts, masks, strict=True)
    ]


@pytest.mark.parametrize("wrong", ["sum", "all"])
def test_13_gspo_has_one_ratio_a_completion_the_geometric_mean(wrong, device):
    """Not their product (TRL #5814, NeMo-RL #2269: 17x), and no masked token in it (Soup #723)."""
    chosen = config("gspo", loss=LossConfig(clip_low=0.9, clip_high=9.0))
    batch = rollout(device, [2, 6], [1.0, -1.0])
    batch = estimate(chosen, Signals(batch))
    logp = torch.where(batch.action_mask, batch.old_logp.nan_to_num() + 0.3, 0.7)
    grad, _ = slopes(chosen, batch, logp)
    found = [
        float(grad[batch.slots([b])].sum() / -(batch.advantages[batch.slots([b])][-1] / 2))
        for b in range(2)
    ]

    def check(ratios):
        assert found == pytest.approx(ratios, rel=1e-4)

    check(sequence_ratios(batch, logp, "mean"))
    assert found == pytest.approx([math.exp(0.3)] * 2, rel=1e-4)
    with pytest.raises(AssertionError):
        check(sequence_ratios(batch, logp, wrong))


def test_13_gspo_does_not_weigh_by_length(device):
    """Every completion pulls alike; summed over tokens, or a mean over all tokens, the longer one
    pulls more (TRL #3823)."""
    batch = rollout(device, [2, 6], [1.0, -1.0])

    def check(aggregation):
        chosen = config("gspo", loss=LossConfig(aggregation=aggregation))
        ready = estimate(chosen, Signals(batch))
        grad, _ = slopes(chosen, ready, torch.where(ready.action_mask, ready.old_logp, 0.0))
        pulls = [abs(float(grad[ready.slots([b])].sum())) for b in range(2)]
        assert pulls[0] == pytest.approx(pulls[1], rel=1e-5)

    check(config("gspo").loss.aggregation)
    for wrong in ("token_mean", "sequence_mean_token_sum"):
        with pytest.raises(AssertionError):
            check(wrong)


def test_17_the_ratio_is_to_the_policy_of_the_rollout(device):
    """exp(logp - logp.detach()) is always 1: nothing is ever clipped (torchforge #571). The loop
    scores first wherever there is a second update."""
    chosen = config("rloo", epochs=2, samples_per_prompt=2)
    batch = estimate(chosen, Signals(rollout(device, [4, 4], [1.0, -1.0])))
    logp = torch.where(batch.action_mask, batch.old_logp.nan_to_num() + 0.5, 0.0)

    def check(batch):
        grad, stats = slopes(chosen, batch, logp)
        assert stats.ratio_mean.item() == pytest.approx(math.exp(0.5), rel=1e-5)
        assert stats.clip_fraction_high == 0.5
        assert not grad[batch.slots([0])].any(), (
            "beyond its bound the better completion pulls no more"
        )

    check(batch)
    with pytest.raises(AssertionError):
        check(batch.with_columns(old_logp=logp.detach().clone()))


# ---- returns and values: 16, 21, 27 --------------------------------------------------------------
def test_16_returns_are_sums_to_the_end_without_the_kl_of_pads(device):
    """Not the rewards themselves, and nothing of masked slots in them (rlhf-book #216)."""
    batch = rollout(device, [3, 2], [1.0, -2.0])
    kl = torch.where(batch.action_mask, batch.old_logp - batch.ref_logp, 0.0)
    right = torch.zeros(batch.num_tokens, device=device)
    for b, (start, end) in enumerate(
        zip(batch.cu_seqlens.tolist(), batch.cu_seqlens.tolist()[1:], strict=False)
    ):
        for t in range(start + 2, end):
            right[t] = batch.scores[b] - 0.3 * kl[t:end].sum()

    def check(returns):
        torch.testing.assert_close(returns, right, rtol=1e-5, atol=1e-5)

    signals = Signals(batch, gamma=1.0, lam=1.0, kl_coef=0.3)
    check(find_advantage("learned_baseline").function(signals)[1])
    check(find_advantage("reward_to_go").function(signals))
    with pytest.raises(AssertionError):
        check(signals.rewards)
    leaking = signals.rewards.clone()
    leaking[1] -= 0.3 * 2.0  # the KL of a prompt slot, summed along
    with pytest.raises(AssertionError):
        check(
            torch.cat(
                [part.flip(0).cumsum(0).flip(0) for part in leaking.split(list(batch.lengths))]
            )
        )


def test_21_scaled_scores_keep_the_value_loss_in_its_units(device):
    """Rewards that grow from 4 to 20 multiply the value loss by 25 (DeepSpeedExamples #556);
    divided by their running deviation they do not."""
    rng = torch.Generator().manual_seed(0)
    raw = [
        size * torch.randn(256, generator=rng).to(device)
        for size in (4.0, 4.0, 20.0, 20.0, 20.0, 20.0)
    ]
    control, empty = (
        Control(config("ppo", scale_scores=True)),
        PackedBatch.from_sequences([([1], [2])] * 256, device=device),
    )

    def check(scores):
        losses = [
            float(
                value_loss(
                    torch.zeros(256, device=device),
                    torch.zeros(256, device=device),
                    x,
                    torch.full((256,), 1 / 256, device=device),
                )[0]
            )
            for x in scores
        ]
        assert max(losses) < 6 * losses[0]

    check([control.scaled(empty.with_columns(scores=x)).scores for x in raw])
    with pytest.raises(AssertionError):
        check(raw)


def fitted(device, returns, clip, rollouts=30, steps=8, share=0.02):
    """The largest relative error left after so many rollouts of clipped regression, each of whose
    steps goes a share of the way."""
    values, weights = (
        torch.zeros(4, requires_grad=True, device=device),
        torch.full((4,), 0.25, device=device),
    )
    for _ in range(rollouts):
        old = values.detach().clone()
        for _ in range(steps):
            (grad,) = torch.autograd.grad(
                value_loss(values, old, returns, weights, clip=clip)[0], values
            )
            values = (values - 4 * share * grad).detach().requires_grad_()
    return float((values - returns).abs().max() / returns.abs().max())


def test_27_a_value_clip_is_in_the_units_of_the_returns(device):
    """Moves of 0.2 a rollout stall a critic whose returns are hundreds (RLlib #2921): scale_scores,
    or value_clip null."""
    returns = torch.tensor([300.0, -200.0, 120.0, 50.0], device=device)

    def check(error):
        assert error < 0.1

    check(fitted(device, returns / returns.std(), 0.2))
    check(fitted(device, returns, None))
    with pytest.raises(AssertionError):
        check(fitted(device, returns, 0.2))


# ---- metrics and coefficients: 22, 26, 29 --------------------------------------------------------
def test_26_a_coefficient_is_never_set_to_zero_silently():
    """A small or decaying one stays what it is, and one that makes no sense is refused (OpenRLHF's
    guard set 0)."""
    with pytest.raises(ConfigError, match=r"kl\.coef >= 0, got -0\.1"):
        KLConfig(coef=-0.1)
    with pytest.raises(ConfigError, match=r"it is multiplied, so 0 stays 0"):
        KLConfig(coef=0.0, target=6.0)

    def check(controller):
        for _ in range(200):
            controller.update(0.0, 512)
        assert 0.0 < controller.coef < 0.2

    check(KLController(KLConfig(coef=0.2, target=6.0)))

    class Guarded(KLController):
        def update(self, kl, episodes):
            super().update(kl, episodes)
            self.coef = self.coef if self.coef > 0.05 else 0.0

    with pytest.raises(AssertionError):
        check(Guarded(KLConfig(coef=0.2, target=6.0)))


def test_29_the_kl_is_per_completion_over_its_own_tokens(device):
    """The sum over a completion's tokens, averaged over completions: what `kl.target` is in. A mean
    per token is another unit, one over pads another number."""
    batch = rollout(device, [2, 6], [1.0, -1.0])
    chosen = config("rloo")
    batch = replace(
        batch,
        rollout_logp=batch.old_logp,
        old_entropy=torch.zeros(batch.num_tokens, device=device),
        values=None,
    )
    k1 = torch.where(batch.action_mask, batch.old_logp - batch.ref_logp, 0.0).double()
    per_completion = torch.stack([part.sum() for part in k1.split(list(batch.lengths))])

    def check(found):
        assert found == pytest.approx(float(per_completion.mean()), rel=1e-5)

    check(measure(batch, 0.1, chosen)["kl"])
    for wrong in (k1[batch.action_mask].mean(), k1.mean(), k1.sum()):
        with pytest.raises(AssertionError):
            check(float(wrong))


# ---- what a step leaves for the next: 30 ---------------------------------------------------------
CARRIED = ("kl", "returns", "scores", "level", "origin", "drawn")


@pytest.fixture
def run(tiny_model, tmp_path, write_jsonl, device):
    (tmp_path / "rewards.py").write_text(
        "def count(prompts, completion_ids, **columns):\n    return [20.0 + sum(ids) % 5 for ids "
        "in completion_ids]\n"
    )
    data = write_jsonl("prompts.jsonl", [{"prompt": f"w{i} w{i + 1}"} for i in range(12)])

    def make(name, **kwargs):
        return PolicyConfig(
            str(tiny_model),
            data,
            (f"{tmp_path / 'rewards.py'}:count",),
            "reinforce_baseline",
            device=str(device),
            dtype="float32",
            prompts_per_step=4,
            scale_scores=True,
            generation=GenerationConfig(max_new_tokens=6),
            kl=KLConfig(coef=0.3, target=0.01, horizon=8.0),
            optim=OptimConfig(lr=1e-2, eps=1e-5, schedule="constant"),
            run=RunConfig(dir=str(tmp_path / name), progress=False, save_every=1),
            **kwargs,
        )

    return make


def test_30_everything_that_is_carried_is_resumed(run, monkeypatch):
    """A run that is stopped and continued logs what an uninterrupted one does; with any one thing
    forgotten it does not."""

    def logged(config):
        rows = [
            json.loads(line)
            for line in (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()
        ]
        return [
            {
                key: value
                for key, value in row.items()
                if not key.startswith(("timing/", "tokens_per_s", "mem/"))
            }
            for row in rows
        ]

    whole = run("whole", steps=3)
    train_policy(whole)

    def check(name, forgotten=None):
        parts = run(name, steps=3)
        remaining = iter(range(2))
        with pytest.MonkeyPatch.context() as patch:

            def dies(*args, original=policy.rollout, **kwargs):
                if next(remaining, None) is None:
                    raise KeyboardInterrupt
                return original(*args, **kwargs)

            patch.setattr(policy, "rollout", dies)
            with pytest.raises(KeyboardInterrupt):
                train_policy(parts)
        with pytest.MonkeyPatch.context() as patch:
            if forgotten:

                def forgets(self, state, load=Control.load_state_dict):
                    load(
                        self,
                        state
                        | {
                            forgotten: Control(parts).state_dict()[forgotten]
                            if forgotten != "drawn"
                            else 4
                        },
                    )

                patch.setattr(Control, "load_state_dict", forgets)
            train_policy(replace(parts, run=replace(parts.run, resume=True)))
        assert logged(parts) == logged(whole)

    check("remembered")
    for name in CARRIED:
        with pytest.raises(AssertionError):
            check(f"without_{name}", name)


def test_22_a_reward_that_is_one_number_for_all_shows(run, tmp_path):
    """Collapse is reported: no spread, every group flat, no gradient of the policy."""
    (tmp_path / "rewards.py").write_text(
        "def count(prompts, completions, completion_ids, **columns):\n    return [1.0] * "
        "len(completions)\n"
    )
    flat = replace(
        run("flat", steps=1),
        algorithm="grpo",
        samples_per_prompt=2,
        scale_scores=False,
        kl=KLConfig(coef=0.0),
        loss=LossConfig(),
    )
    train_policy(flat)
    row = json.loads((Path(flat.run.dir) / "metrics.jsonl").read_text())
    assert (row["reward_std"], row["frac_reward_zero_std"], row["grad_norm"]) == (0.0, 1.0, 0.0)
