"""The correction of rollouts: weights by hand, what carries no gradient, and runs whose sampler
says something else than it does."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fusedrl.engine.base.errors import ConfigError
from fusedrl.engine.base.packing import PackedBatch
from fusedrl.engine.cli.main import parse_config
from fusedrl.engine.config import (
    CorrectionConfig,
    GenerationConfig,
    KLConfig,
    LossConfig,
    OptimConfig,
    PolicyConfig,
    RunConfig,
)
from fusedrl.engine.model.weights import load_decoder
from fusedrl.engine.policy import objectives
from fusedrl.engine.policy.objectives import (
    behaviour,
    correction_metrics,
    make_objective,
    minibatch_weights,
    objective_loss,
    register_objective,
)
from fusedrl.engine.stages import policy
from fusedrl.engine.stages.policy import train_policy

NAN = float("nan")


# ---- the correction of rollouts ------------------------------------------------------------------
def small(device, old, rollout, advantages=(1.0, 1.0, 1.0, -2.0, 1.5)):
    """Two completions of two and three tokens behind one token of prompt."""
    batch = PackedBatch.from_sequences([([1], [2, 3]), ([1], [2, 3, 4])]).to(device)
    spread = [
        torch.full((7,), NAN, device=device).masked_scatter(
            batch.action_mask, torch.tensor(x, device=device)
        )
        for x in (old, rollout, advantages)
    ]
    return batch.with_columns(old_logp=spread[0], rollout_logp=spread[1], advantages=spread[2])


W = (1.9, 1.5, 0.25, 1.0, 8.0)  # products 2.85 and 2, geometric means 1.69 and 1.26
ROLLED = (-1.0, -2.0, -0.5, -3.0, -2.5)


@pytest.mark.parametrize(
    "correction, factors, metrics",
    [
        (
            CorrectionConfig(kind="truncated"),
            (1.9, 1.5, 0.25, 1.0, 2.0),
            dict(mean=2.53, max=8.0, fraction=0.2),
        ),
        (
            CorrectionConfig(kind="truncated", high=1.0),
            (1.0, 1.0, 0.25, 1.0, 1.0),
            dict(fraction=0.6),
        ),
        (
            CorrectionConfig(kind="truncated", level="sequence", high=2.5),
            (2.5, 2.5, 2.0, 2.0, 2.0),
            dict(mean=2.425, max=2.85, fraction=0.4),
        ),
        (
            CorrectionConfig(kind="masked", high=5.0),
            (1.9, 1.5, 0.0, 1.0, 0.0),
            dict(mean=2.53, fraction=0.4),
        ),
        (
            CorrectionConfig(kind="masked", low=0.2, high=8.5),
            (1.9, 1.5, 0.25, 1.0, 8.0),
            dict(fraction=0.0),
        ),
        (
            CorrectionConfig(kind="masked", level="sequence", high=2.5),
            (0.0, 0.0, 2.0, 2.0, 2.0),
            dict(fraction=0.4),
        ),
        (
            CorrectionConfig(kind="sequence_masked", high=1.5),
            (0.0, 0.0, 0.25, 1.0, 8.0),
            dict(mean=2.53, fraction=0.4),
        ),
        (
            CorrectionConfig(kind="sequence_masked", low=0.9, high=1.2),
            (0.0, 0.0, 0.0, 0.0, 0.0),
            dict(fraction=1.0),
        ),
        (
            CorrectionConfig(kind="sequence_masked", level="sequence", high=1.5),
            (0.0, 0.0, 2.0, 2.0, 2.0),
            dict(mean=2.425, fraction=0.4),
        ),
    ],
)
def test_weights_by_hand(correction, factors, metrics, monkeypatch, device):
    """The policy term alone is multiplied, of fused and of registered objectives; the KL beside it
    is not."""
    monkeypatch.setattr(objectives, "_REGISTERED", {})
    register_objective("slope")(lambda logp, old, A, batch: -A * logp)
    batch = small(device, [r + math.log(w) for r, w in zip(ROLLED, W, strict=True)], ROLLED)
    batch = batch.with_columns(ref_logp=batch.old_logp - 1)
    mask = batch.action_mask
    for objective in ("reinforce", "slope"):
        config = PolicyConfig(
            "m",
            "d",
            ("r.py:f",),
            "grpo",
            loss=LossConfig(objective=objective, aggregation="token_mean"),
            correction=correction,
            kl=KLConfig(coef=0.5, estimator="k2"),
        )
        batch = batch.with_columns(weights=minibatch_weights(config, batch))
        logp = batch.old_logp.clone().requires_grad_()
        loss, *_ = objective_loss(config, make_objective(config, 1.0), 0.5, batch, logp, None, None)
        loss.backward()
        want = torch.tensor(
            [
                (-w * a + 0.5) / 5
                for w, a in zip(factors, batch.advantages[mask].tolist(), strict=True)
            ],
            device=device,
        )
        torch.testing.assert_close(logp.grad[mask], want)
        assert not logp.grad[~mask].any()
    found = correction_metrics(correction, batch)
    for name, value in metrics.items():
        assert found[f"correction/{name}"] == pytest.approx(value), name
    w = torch.tensor(W if correction.level == "token" else (2.85, 2.0), device=device).double()
    assert found["correction/ess"] == pytest.approx((w.sum() ** 2 / (w**2).sum() / len(w)).item())
    assert found["correction/chi2"] == pytest.approx((w**2).mean().item() - 1)
    assert correction_metrics(CorrectionConfig(), batch) == {}


def test_a_weight_carries_no_gradient_and_nothing_masked_is_read(device):
    config = PolicyConfig(
        "m",
        "d",
        ("r.py:f",),
        "reinforce",
        correction=CorrectionConfig(kind="truncated", level="sequence", high=9.0),
        kl=KLConfig(coef=0.0),
    )
    batch = small(device, [r + math.log(w) for r, w in zip(ROLLED, W, strict=True)], ROLLED)
    weights = minibatch_weights(config, batch)
    outcomes = []
    for hidden in (NAN, 0.0, math.inf):
        columns = {
            name: torch.where(batch.action_mask, getattr(batch, name), hidden)
            for name in ("old_logp", "rollout_logp", "advantages")
        }
        logp = columns["old_logp"].clone().requires_grad_()
        # the very tensor: a weight that is not detached would bring its gradient
        micro = batch.with_columns(weights=weights, **columns | {"old_logp": logp})
        loss, *_ = objective_loss(config, make_objective(config, 1.0), 0.0, micro, logp, None, None)
        loss.backward()
        outcomes.append((loss.detach(), logp.grad, correction_metrics(config.correction, micro)))
    for loss, grad, metrics in outcomes[1:]:
        assert torch.equal(loss, outcomes[0][0])
        assert torch.equal(grad, outcomes[0][1])
        assert metrics == outcomes[0][2]
    assert torch.allclose(
        outcomes[0][1][batch.action_mask],
        -torch.tensor((2.85, 2.85, 2.0, 2.0 * -2.0, 2.0 * 1.5), device=device) / 2,
    )


def test_completions_that_the_policy_has_left(device):
    """Off-policy sequence masking: of the drifted ones, tokens with a negative advantage alone."""
    batch = small(
        device, [0.0] * 5, (-1.0, -1.0, -1.0, -1.0, -1.0), advantages=(-1.0, 1.0, -3.0, 2.0, -4.0)
    )
    # means of the drift 0.15 and 0.3
    logp = torch.full((7,), NAN, device=device).masked_scatter(
        batch.action_mask, torch.tensor([-1.0, -1.3, -1.4, -1.0, -1.5], device=device)
    )
    for delta, want, count in (
        (None, (-1, 1, -3, 2, -4), None),
        (0.2, (-1, 1, 0, 2, 0), 2),
        (0.1, (0, 1, 0, 2, 0), 3),
        (0.31, (-1, 1, -3, 2, -4), 0),
    ):
        got, dropped = behaviour(CorrectionConfig(off_policy_delta=delta), batch, logp)
        assert got.advantages[batch.action_mask].tolist() == list(want)
        assert (dropped if dropped is None else dropped.item()) == count


# ---- in the loop ---------------------------------------------------------------------------------
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

    def config(algorithm="grpo", name="run", **kwargs):
        defaults = dict(
            device=str(device),
            dtype="float32",
            steps=2,
            prompts_per_step=4,
            samples_per_prompt=3,
            tokens_per_microbatch=60,
            generation=GenerationConfig(max_new_tokens=6),
            optim=OptimConfig(lr=3e-3, schedule="constant"),
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


def _same(device, a, b):
    return all(torch.equal(p, _weights(device, b)[name]) for name, p in _weights(device, a).items())


@pytest.mark.parametrize("algorithm, kwargs", [("grpo", {}), ("ppo", dict(epochs=2))])
def test_where_the_sampler_is_the_trainer_nothing_changes(make, algorithm, kwargs, device):
    """Bitwise, in strict mode: every weight is 1, and the ratio to the sampler is the ratio."""
    plain = make(algorithm, name="plain", strict=True, **kwargs)
    train_policy(plain)
    for name, correction in (
        ("truncated", CorrectionConfig(kind="truncated")),
        ("masked", CorrectionConfig(kind="masked", level="sequence")),
        ("sequence", CorrectionConfig(kind="sequence_masked")),
        ("bypass", CorrectionConfig(bypass=True)),
    ):
        config = make(algorithm, name=name, strict=True, correction=correction, **kwargs)
        train_policy(config)
        assert _same(device, plain, config)
        row = _metrics(config)[-1]
        assert row["policy/first_ratio_max"] == 1.0
        if correction.kind != "none":
            assert [row[f"correction/{x}"] for x in ("mean", "max", "fraction", "ess", "chi2")] == [
                1.0,
                1.0,
                0.0,
                1.0,
                0.0,
            ]


def _perturbed(device, monkeypatch, sd):
    """A sampler that says something else than it does."""

    def rollout(*args, original=policy.rollout, **kwargs):
        found = original(*args, **kwargs)
        noise = sd * torch.randn(
            found.batch.num_tokens, generator=torch.Generator().manual_seed(found.batch.num_tokens)
        ).to(device)
        return replace(
            found,
            batch=found.batch.with_columns(
                rollout_logp=torch.where(
                    found.batch.action_mask, found.batch.rollout_logp + noise, 0.0
                )
            ),
        )

    monkeypatch.setattr(policy, "rollout", rollout)


def test_a_sampler_that_is_off_is_reported_and_corrected(make, monkeypatch, device):
    _perturbed(device, monkeypatch, 0.3)
    runs = {
        name: make(name=name, max_logp_diff=1.0, correction=correction, kl=KLConfig(coef=0.0))
        for name, correction in (
            ("none", CorrectionConfig()),
            ("truncated", CorrectionConfig(kind="truncated", high=1.2)),
            ("masked", CorrectionConfig(kind="masked", low=0.8, high=1.2)),
            ("bypass", CorrectionConfig(bypass=True)),
            ("left", CorrectionConfig(off_policy_delta=0.01)),
        )
    }
    for config in runs.values():
        train_policy(config)
    rows = {name: _metrics(config) for name, config in runs.items()}
    for name in ("truncated", "masked", "bypass", "left"):
        assert not _same(device, runs["none"], runs[name])
    for name in ("truncated", "masked"):
        row = rows[name][0]
        assert 0.2 < row["correction/fraction"] < 0.8
        assert row["correction/max"] > 1.5
        assert 0.8 < row["correction/ess"] < 0.99
        assert 0.05 < row["correction/chi2"] < 0.3
        assert row["sampling/sampling_logp_difference/mean"] == pytest.approx(
            0.3 * math.sqrt(2 / math.pi), rel=0.3
        )
    assert "correction/mean" not in rows["none"][0]
    assert rows["bypass"][0]["policy/first_ratio_max"] > 1.3  # to the sampler
    assert rows["truncated"][0]["policy/first_ratio_max"] == 1.0  # to the scorer
    assert 0.0 < rows["left"][0]["correction/off_policy_fraction"] < 0.6
    with pytest.raises(RuntimeError, match="sampler and trainer disagree"):
        train_policy(make(name="refused"))


def test_bypass_saves_the_scoring(make, monkeypatch):
    """Several optimizer steps a rollout, and none of them needs another old_logp than the
    sampler's; its metrics are then of the first minibatch."""
    scored = []
    original = policy.score
    monkeypatch.setattr(
        policy,
        "score",
        lambda actor, *args: (scored.append(actor is not None), original(actor, *args))[1],
    )
    for name, correction in (
        ("scored", CorrectionConfig()),
        ("bypass", CorrectionConfig(bypass=True)),
    ):
        train_policy(make(name=name, epochs=2, minibatches=2, correction=correction, steps=1))
    assert scored == [True, False]
    row, other = (_metrics(make(name=name))[0] for name in ("bypass", "scored"))
    assert row["sampling/sampling_logp_difference/max"] <= 1e-4
    assert row["policy/first_ratio_max"] == pytest.approx(1.0, abs=1e-4)
    assert row["step_tokens"] == other["step_tokens"]
    assert row["entropy"] == pytest.approx(other["entropy"], rel=0.2)
    assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-2)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (
            dict(kind="truncated", bypass=True),
            r"correction\.kind none with correction\.bypass .*would square it",
        ),
        (dict(kind="truncated", low=0.5), r"correction\.low only with correction\.kind = masked"),
        (dict(low=0.5), r"correction\.low only"),
        (dict(kind="masked", low=1.5), "0 <= low <= 1 <= high"),
        (dict(kind="truncated", high=0.5), "0 <= low <= 1 <= high"),
        (dict(off_policy_delta=0.0), r"correction\.off_policy_delta > 0"),
    ],
)
def test_contradictions_are_refused(kwargs, message):
    with pytest.raises(ConfigError, match=message):
        CorrectionConfig(**kwargs)


def test_options(make):
    options = ["--model", "m", "--data", "d", "--reward", "r.py:f"]
    assert parse_config("grpo", [*options, "--correction.kind", "masked"]).correction.floor == 0.5
    assert parse_config("grpo", options).correction == CorrectionConfig()
    with pytest.raises(ConfigError, match=r"loss\.objective with a ratio .* got 'reinforce'"):
        make("gpg", correction=CorrectionConfig(bypass=True))
