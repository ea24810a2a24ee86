"""PPO-max: the order in which scores and advantages are normalised and clipped, that each part can
be switched off, and where what remains ends."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.engine.policy.test_closed_forms import Tree, config_of, learn

from fusedrl.engine.base.errors import ConfigError
from fusedrl.engine.base.packing import PackedBatch
from fusedrl.engine.cli.main import parse_config
from fusedrl.engine.config import (
    GenerationConfig,
    KLConfig,
    LossConfig,
    OptimConfig,
    PolicyConfig,
    RunConfig,
)
from fusedrl.engine.model.weights import load_decoder
from fusedrl.engine.policy.advantages import Signals, estimate
from fusedrl.engine.policy.control import Control
from fusedrl.engine.policy.objectives import entropy_coefficient, make_objective, objective_loss
from fusedrl.engine.stages.policy import train_policy
from fusedrl.kernels.policy_loss import value_loss

OFF = dict(normalize_scores=False, score_clip=0.0, loss=LossConfig(advantage_clip=0.0))
REWARDS = """
def likes_w3(prompts, completions, completion_ids, **columns):
    return [float(sum(word == "w3" for word in text.split())) for text in completions]
"""


@pytest.fixture
def make(tiny_model, tmp_path, write_jsonl, device):
    (tmp_path / "rewards.py").write_text(REWARDS)
    data = write_jsonl(
        "prompts.jsonl",
        [{"prompt": " ".join(f"w{(3 * i + j) % 28}" for j in range(1 + i % 5))} for i in range(12)],
    )

    def config(algorithm="ppo_max", name="run", **kwargs):
        defaults = dict(
            device=str(device),
            dtype="float32",
            steps=2,
            prompts_per_step=6,
            samples_per_prompt=2,
            epochs=2,
            minibatches=2,
            tokens_per_microbatch=60,
            generation=GenerationConfig(max_new_tokens=8),
            optim=OptimConfig(lr=3e-3),
            run=RunConfig(dir=str(tmp_path / name), progress=False),
        )
        return PolicyConfig(
            str(tiny_model),
            data,
            (f"{tmp_path / 'rewards.py'}:likes_w3",),
            algorithm,
            **(defaults | kwargs),
        )

    return config


def _rows(config):
    rows = [
        json.loads(line)
        for line in (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()
    ]
    return [
        {
            name: value
            for name, value in row.items()
            if not name.startswith(("timing/", "mem/", "tokens_per_s"))
        }
        for row in rows
    ]


def _weights(device, config):
    return {
        name: p.detach()
        for name, p in load_decoder(
            Path(config.run.dir) / "model", dtype="float32", device=device
        ).named_parameters()
    }


def _batch(device, scores):
    """Completions of 1, 2, 3, ... tokens, with values and no KL."""
    sequences = [([1, 4], [5] * (1 + i)) for i in range(len(scores))]
    batch = PackedBatch.from_sequences(sequences, device=device)
    draw = torch.Generator().manual_seed(len(scores))
    zeros = torch.zeros(batch.num_tokens, device=device)
    return batch.with_columns(
        scores=torch.tensor(scores, device=device),
        group_ids=torch.arange(len(scores), device=device),
        old_logp=zeros,
        ref_logp=zeros,
        values=torch.where(
            batch.action_mask, torch.randn(batch.num_tokens, generator=draw).to(device), 0.0
        ),
    )


# ---- scores --------------------------------------------------------------------------------------
STEPS = ([3.0, -1.0, 20.0, 0.5], [10.0, 9.0, -30.0], [2.0, 2.5, 1.0, 0.0, 90.0])


@pytest.mark.parametrize("centre", [False, True])
def test_scores_by_hand(centre, device):
    """All scores so far, these included, give the moments (the deviation over count - 1), or the
    first rollout the mean; then scaled, then clipped, then placed at the last token."""
    clip = 1.2
    config = config_of("ppo", normalize_scores=centre, scale_scores=not centre, score_clip=clip)
    control, seen = Control(config), np.empty(0)
    bound = False
    for scores in STEPS:
        seen = np.concatenate([seen, np.array(scores, dtype=np.float64)])
        expected = (np.array(scores) - (seen.mean() if centre else np.mean(STEPS[0]))) / seen.std(
            ddof=1
        )
        bound |= bool((np.abs(expected) > clip).any())
        batch = control.scaled(_batch(device, scores))
        assert batch.scores.tolist() == pytest.approx(expected.tolist(), rel=1e-5, abs=1e-6)
        rewards = Signals.of(config, batch, 0.0, 0.0).rewards
        last = batch.cu_seqlens[1:].long() - 1
        assert rewards[last].tolist() == pytest.approx(
            np.clip(expected, -clip, clip).tolist(), rel=1e-5, abs=1e-6
        )
        rewards[last] = 0.0
        assert not rewards.any()
    assert bound
    wrong = {  # what these numbers would catch
        "clipped first": np.clip(STEPS[-1], -clip, clip) / seen.std(ddof=1),
        "of the past": np.array(STEPS[-1]) / np.concatenate(STEPS[:-1]).std(ddof=1),
        "of the batch": np.array(STEPS[-1]) / np.std(STEPS[-1], ddof=1),
        "not centred": np.array(STEPS[-1]) / seen.std(ddof=1),
        "population": (np.array(STEPS[-1]) - (seen.mean() if centre else np.mean(STEPS[0])))
        / seen.std(ddof=0),
    }
    assert all(
        np.abs(np.clip(x, -clip, clip) - np.clip(expected, -clip, clip)).max() > 1e-3
        for x in wrong.values()
    )


def test_greedy_scores_and_those_of_tokens_move_along(device):
    control = Control(config_of("remax", normalize_scores=True))
    scores = torch.tensor([1.0, 4.0, 7.0], device=device)
    batch = _batch(device, scores.tolist()).with_columns(
        greedy_scores=torch.tensor([2.0, 2.0, 2.0], device=device),
        token_rewards=torch.arange(12.0, device=device),
    )
    scaled = control.scaled(batch)
    assert torch.allclose(scaled.scores - scaled.greedy_scores, (scores - 2.0) / 3.0)
    assert torch.allclose(scaled.token_rewards, torch.arange(12.0, device=device) / 3.0)
    assert torch.equal(
        Control(config_of("remax", normalize_scores=True))
        .scaled(_batch(device, [2.0, 2.0]))
        .scores,
        torch.zeros(2, device=device),
    )  # no spread to divide by
    assert Control(config_of("remax")).scaled(batch) is batch


# ---- advantages ----------------------------------------------------------------------------------
def test_advantages_by_hand(device):
    """Whitened over the batch with the population's variance, then clipped; returns are of
    before."""
    batch = _batch(device, [3.0, -1.0, 5.0, 0.5, 2.0])
    whole, plain = (
        estimate(config, Signals.of(config, batch, 0.0, 0.0))
        for config in (
            config_of("ppo_max", loss=LossConfig(advantage_clip=0.5)),
            config_of("ppo", loss=LossConfig(whiten=False)),
        )
    )
    raw, mask = plain.advantages.double().cpu().numpy(), batch.action_mask.cpu().numpy()
    live = raw[mask]
    expected = np.clip((live - live.mean()) / np.sqrt(live.var() + 1e-8), -0.5, 0.5)
    assert whole.advantages[batch.action_mask].tolist() == pytest.approx(
        expected.tolist(), abs=1e-5
    )
    assert not whole.advantages[~batch.action_mask].any()
    assert torch.equal(whole.returns, plain.returns)
    clipped_first = np.clip(live, -0.5, 0.5)
    assert (
        np.abs((clipped_first - clipped_first.mean()) / clipped_first.std() - expected).max() > 0.1
    )
    assert (np.abs(expected) == 0.5).any()
    assert (np.abs(expected) < 0.5).any()


# ---- the entropy target --------------------------------------------------------------------------
@pytest.mark.parametrize("target, sign", [(10.0, 1.0), (0.5, -1.0)])
def test_the_entropy_moves_towards_its_target(target, sign, device):
    """The gradient is that of c |mean H - target|, by float64 autograd, and in two micro-batches
    the same as in one."""
    config = config_of(
        "reinforce",
        kl=KLConfig(coef=0.0),
        loss=LossConfig(entropy_coef=0.3, entropy_target=target, aggregation="token_mean"),
    )
    batch = _batch(device, [0.0, 0.0, 0.0])
    logits = torch.randn(
        batch.num_tokens, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    ).to(device)

    def entropy_of(x):
        p = x.log_softmax(1)
        return torch.where(batch.action_mask, -(p.exp() * p).sum(1), 0.0)

    exact = logits.clone().requires_grad_()
    mean = entropy_of(exact)[batch.action_mask].mean()
    (0.3 * (mean - target).abs()).backward()
    assert (mean < target) == (sign > 0)
    batch = batch.with_columns(
        old_entropy=entropy_of(logits).float(),
        advantages=torch.zeros(batch.num_tokens, device=device),
        weights=torch.where(batch.action_mask, 1.0 / batch.action_mask.sum(), 0.0),
    )
    coefficient = entropy_coefficient(config, batch)
    assert coefficient == sign * 0.3
    for cuts in ([[0, 1, 2]], [[2], [0, 1]]):
        ours = logits.clone().requires_grad_()
        for part in cuts:
            slots = batch.slots(part)
            loss, *_ = objective_loss(
                config,
                make_objective(config, 1.0),
                0.0,
                batch.select(part),
                batch.old_logp[slots],
                entropy_of(ours)[slots].float(),
                None,
                entropy_coef=coefficient,
            )
            loss.backward()
        torch.testing.assert_close(ours.grad, exact.grad, rtol=1e-5, atol=1e-8)
    assert entropy_coefficient(config_of("ppo", loss=LossConfig(entropy_coef=0.2)), batch) == 0.2


def test_a_run_keeps_its_entropy_target(make):
    """From about 2.9 nats down towards 2.0, and up; without it the entropy stays nearer where it
    was."""
    last = {}
    for name, target in (("down", 2.0), ("up", 9.0), ("free", None)):
        loss = LossConfig(entropy_coef=3.0, entropy_target=target) if target else LossConfig()
        config = make(
            name=name,
            steps=4,
            loss=loss,
            epochs=1,
            minibatches=1,
            kl=KLConfig(coef=0.0),
            optim=OptimConfig(lr=1e-3, schedule="constant"),
        )
        train_policy(config)
        rows = _rows(config)
        last[name] = rows[-1]["entropy"]
        assert ("entropy_coef" in rows[0]) == (name != "free")
    assert last["down"] < last["free"] < last["up"]


# ---- the preset ----------------------------------------------------------------------------------
def test_the_preset_and_its_switches():
    options = ["--model", "m", "--data", "d", "--reward", "r.py:f"]
    config = parse_config("ppo_max", options)
    assert (
        config.normalize_scores,
        config.score_clip,
        config.loss.whiten,
        config.loss.advantage_clip,
    ) == (True, 10.0, True, 0.5)
    assert (config.loss.clip_low, config.loss.clip_high, config.loss.value_clip) == (0.2, 0.2, 0.2)
    assert (
        config.kl.coef,
        config.kl.placement,
        config.epochs,
        config.scale_scores,
        config.loss.entropy_coef,
    ) == (0.02, "reward", 1, False, 0.0)
    off = parse_config(
        "ppo_max",
        [
            *options,
            "--normalize_scores",
            "false",
            "--score_clip",
            "0",
            "--loss.advantage_clip",
            "0",
            "--loss.whiten",
            "false",
        ],
    )
    assert (off.normalize_scores, off.score_clip, off.loss.advantage_clip, off.loss.whiten) == (
        False,
        0.0,
        0.0,
        False,
    )
    again = replace(off, steps=7)
    assert (
        again.normalize_scores,
        again.score_clip,
        again.loss.advantage_clip,
        again.loss.whiten,
    ) == (False, 0.0, 0.0, False)


def test_switches_that_are_refused():
    plain = PolicyConfig("m", "d", ("r.py:f",))
    assert (plain.normalize_scores, plain.score_clip, plain.loss.advantage_clip) == (
        False,
        None,
        None,
    )
    for kwargs, message in (
        (dict(score_clip=-1.0), "score_clip >= 0"),
        (dict(loss=dict(advantage_clip=-0.5)), r"loss.advantage_clip >= 0"),
        (
            dict(loss=dict(entropy_target=2.0)),
            r"loss.entropy_target >= 0 with loss.entropy_coef > 0",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            PolicyConfig(
                "m",
                "d",
                ("r.py:f",),
                "ppo_max",
                **(kwargs | ({"loss": LossConfig(**kwargs["loss"])} if "loss" in kwargs else {})),
            )


def test_with_all_of_it_switched_off_it_is_ppo(make, device):
    """Bit for bit; and each part that is on makes a difference."""
    same = dict(kl=KLConfig(coef=0.05), **OFF)
    plain, off = (
        make("ppo", name="ppo", optim=OptimConfig(lr=3e-3, eps=1e-8)),
        make(name="off", **same),
    )
    train_policy(plain)
    train_policy(off)
    assert _rows(plain) == _rows(off)
    assert all(
        torch.equal(p, _weights(device, off)[name]) for name, p in _weights(device, plain).items()
    )
    for name, part in (
        ("norm", dict(normalize_scores=True)),
        ("scale", dict(scale_scores=True)),
        ("score_clip", dict(score_clip=0.5)),
        ("advantage_clip", dict(loss=LossConfig(advantage_clip=0.5))),
    ):
        config = make(name=name, **(same | part))
        train_policy(config)
        assert not all(
            torch.equal(p, _weights(device, config)[key])
            for key, p in _weights(device, plain).items()
        ), name


@pytest.mark.cpu_only("bitwise resumption is promised on a CPU")
def test_resume_continues_bitwise(make, device):
    """The moments of the scores come back, too."""
    whole, parts = (
        make(
            name=name,
            steps=3,
            optim=OptimConfig(lr=3e-3, schedule="constant", eps_mode="tensorflow"),
        )
        for name in ("whole", "parts")
    )
    train_policy(whole)
    train_policy(replace(parts, steps=2))
    train_policy(replace(parts, run=replace(parts.run, resume=True)))
    assert all(
        torch.equal(p, _weights(device, parts)[name]) for name, p in _weights(device, whole).items()
    )
    assert _rows(whole) == _rows(parts)


# ---- where it ends (with what leaves the optimum alone: test_closed_forms.py) --------------------
@pytest.mark.full
def test_dividing_scores_is_another_kl_coefficient(device):
    """With rewards of deviation 2 the policy ends at ref exp(r / (s beta)), s the deviation of all
    scores, and not at ref exp(r / beta)."""
    tree = Tree.random(device)
    tree = Tree(tree.ref, 2.0 * tree.rewards)
    logp, control = learn(
        device,
        tree,
        config_of("ppo_max", epochs=4, loss=LossConfig(value_clip=None)),
        updates=1000,
        lr=0.05,
    )
    s = control.scores.std
    assert s > 1.5
    # beta stays, the rewards are smaller
    assert Tree(tree.ref, tree.rewards / s).gap(logp) >= 0.99
    assert tree.gap(logp) < 0.9


# ---- the critic's clip ---------------------------------------------------------------------------
@pytest.mark.parametrize("scale, reached", [(1.0, True), (20.0, False)])
def test_a_value_clip_stalls_a_critic_of_large_returns(scale, reached, device):
    """Values move at most 0.2 a rollout under the clip: fine for returns of about 1, hopeless for
    those of 20, which scaling by their deviation makes 1 again. The loss of an unscaled critic
    grows with the square of the returns."""
    returns = scale * torch.tensor([1.0, -1.0, 0.5, 0.8], device=device)
    weights = torch.full((4,), 0.25, device=device)

    def after(returns, rollouts=12):
        values = torch.zeros(4, requires_grad=True, device=device)
        adam = torch.optim.Adam([values], lr=0.1)
        losses = []
        for _ in range(rollouts):
            old = values.detach().clone()
            for _ in range(20):
                adam.zero_grad()
                loss, _ = value_loss(values, old, returns, weights, clip=0.2)
                loss.backward()
                adam.step()
            losses.append(loss.item())
        return values.detach(), losses

    values, losses = after(returns)
    error = ((values - returns).square().sum() / returns.square().sum()).item()
    assert (error < 0.01) == reached
    assert losses[0] > 0.1 * scale**2
    scaled, _ = after(returns / returns.std())
    assert ((scaled - returns / returns.std()).square().mean()).item() < 0.01
