"""Tokens that the loss leaves out: of completions that were cut off, of low entropy, and of high
covariance; and tokens of high covariance that the loss holds."""

import json
import math
from functools import partial
from pathlib import Path

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
from fusedrl.engine.model.weights import load_decoder
from fusedrl.engine.policy.chosen import of_chosen_tokens
from fusedrl.engine.policy.objectives import (
    make_objective,
    minibatch_weights,
    objective_loss,
    without_gradient,
)
from fusedrl.engine.stages.policy import train_policy

LENGTHS = [130, 1, 7, 1000, 40, 0, 333]


@pytest.fixture
def batch(device):
    """Completions of many lengths after prompts of two; what is no action has columns of NaN."""
    found = PackedBatch.from_sequences([([1, 2], [3] * n) for n in LENGTHS], device=device)
    generator = torch.Generator().manual_seed(0)

    def column(scale):
        x = torch.randn(found.num_tokens, generator=generator).to(device) * scale
        return torch.where(found.action_mask, x, math.nan)

    return found.with_columns(
        old_logp=-column(2.0).abs(), old_entropy=column(1.0).abs(), advantages=column(1.5)
    )


def config(**changes):
    return PolicyConfig("m", "d", ("r.py:f",), changes.pop("algorithm", "dapo"), **changes)


# ---- which tokens --------------------------------------------------------------------------------
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("quantile", [1e-9, 0.2, 0.5, 0.999])
def test_the_highest_entropies_keep_their_advantage(batch, quantile, masked):
    if masked:  # the longest completion is cut off
        batch = batch.with_columns(loss_mask=batch.action_mask & (batch.positions < 500))
    over = (batch.action_mask if batch.loss_mask is None else batch.loss_mask).tolist()
    found = of_chosen_tokens(
        config(loss=LossConfig(top_entropy_quantile=quantile)), batch, step=3
    ).advantages
    entropy = batch.old_entropy.tolist()
    order = sorted((t for t, x in enumerate(over) if x), key=lambda t: -entropy[t])
    kept = set(order[: max(1, math.ceil(quantile * len(order)))])
    for t in order:
        assert found[t].item() == (batch.advantages[t].item() if t in kept else 0.0)
    assert torch.equal(batch.advantages.isnan() & batch.action_mask, batch.action_mask & False)


def test_equal_entropies_are_kept_together(batch):
    same = batch.with_columns(old_entropy=torch.ones_like(batch.old_entropy))
    found = of_chosen_tokens(config(loss=LossConfig(top_entropy_quantile=0.1)), same, 0)
    at = batch.action_mask
    assert torch.equal(found.advantages[at], batch.advantages[at])


def test_tokens_of_a_covariance_are_drawn(batch):
    """Against the definition by loops; another step draws others, the same step the same."""
    mask = batch.action_mask.tolist()
    logp, advantages = batch.old_logp.double().tolist(), batch.advantages.double().tolist()
    live = [t for t, x in enumerate(mask) if x]
    mean_logp, mean_a = (sum(x[t] for t in live) / len(live) for x in (logp, advantages))
    inside = {t for t in live if 1.0 < (logp[t] - mean_logp) * (advantages[t] - mean_a) < 5.0}
    assert 50 < len(inside) < len(live) / 2
    seen = []
    for ratio, step in ((0.01, 0), (0.01, 0), (0.01, 1), (0.9, 0), (1e-6, 0)):
        changed = of_chosen_tokens(config(loss=LossConfig(clip_cov_ratio=ratio)), batch, step)
        zeros = {t for t in live if changed.advantages[t] == 0}
        assert zeros <= inside
        assert len(zeros) == min(len(inside), max(1, int(ratio * len(live))))
        assert all(changed.advantages[t] == batch.advantages[t] for t in live if t not in zeros)
        seen.append(zeros)
    assert seen[0] == seen[1] != seen[2]


@pytest.mark.parametrize("ratio", [1e-9, 0.01, 0.4])
def test_the_highest_covariances_are_held(batch, ratio):
    """Against the definition by loops; what is no action is never held, whatever NaN is there."""
    live = batch.action_mask.nonzero().flatten().tolist()
    logp, advantages = batch.old_logp.double().tolist(), batch.advantages.double().tolist()
    mean_logp, mean_a = (sum(x[t] for t in live) / len(live) for x in (logp, advantages))
    order = sorted(live, key=lambda t: -(logp[t] - mean_logp) * (advantages[t] - mean_a))
    found = of_chosen_tokens(config(loss=LossConfig(kl_cov_ratio=ratio)), batch, 0)
    assert set(found.held.nonzero().flatten().tolist()) == set(
        order[: max(1, int(ratio * len(live)))]
    )
    assert torch.equal(found.advantages[batch.action_mask], batch.advantages[batch.action_mask])


@pytest.mark.parametrize("objective", ["importance", "ppo_clip", "cispo"])
def test_the_loss_of_held_tokens_is_the_papers(batch, objective, device):
    """-A ratio, with |log ratio| more where a token is held: loss and gradient by a loop in
    float64 (of the objectives that bound the ratio, the difference to a loss without)."""
    chosen = config(loss=LossConfig(kl_cov_ratio=0.2, kl_cov_coef=0.7, objective=objective))
    plain = config(loss=LossConfig(objective=objective))
    whole = of_chosen_tokens(chosen, batch, 0)
    mask = batch.action_mask
    whole = whole.with_columns(weights=torch.where(mask, 1 / 1511, 0.0).to(device))
    noise = torch.randn(batch.num_tokens, generator=torch.Generator().manual_seed(1)).to(device)
    found = {}
    for name, one in (("held", chosen), ("plain", plain)):
        logp = torch.where(mask, batch.old_logp + 0.2 * noise, math.nan).requires_grad_()
        with_held = whole if name == "held" else whole.with_columns(held=None)
        made = make_objective(one, 1.0)
        loss, stats, _ = objective_loss(one, made, 0.0, with_held, logp, None, None)
        loss.backward()
        assert stats.loss.item() == pytest.approx(loss.item(), rel=1e-6)
        found[name] = loss.item(), torch.where(mask, logp.grad, 0.0)
    total, policy = 0.0, 0.0
    slope = torch.zeros(batch.num_tokens, dtype=torch.float64, device=device)
    for t in mask.nonzero().flatten().tolist():
        d = (logp[t].detach() - batch.old_logp[t]).double().item()
        policy -= batch.advantages[t].item() * math.exp(d) / 1511
        if whole.held[t]:
            total += 0.7 * abs(d) / 1511
            slope[t] = 0.7 * math.copysign(1, d) / 1511
    assert found["held"][0] - found["plain"][0] == pytest.approx(total, rel=1e-3)
    if objective == "importance":
        assert found["plain"][0] == pytest.approx(policy, rel=1e-4)
    moved = (found["held"][1] - found["plain"][1]).double()
    torch.testing.assert_close(moved, slope, rtol=1e-4, atol=1e-8)


def test_held_tokens_without_an_advantage_are_not_left_out(batch):
    flat = batch.with_columns(advantages=torch.zeros_like(batch.advantages))
    held = torch.zeros_like(batch.action_mask)
    held[5] = True
    chosen = config(loss=LossConfig(kl_cov_ratio=0.2))
    assert without_gradient(chosen, flat) == set(range(7))
    assert without_gradient(chosen, flat.with_columns(held=held)) == set(range(1, 7))


def test_nothing_is_chosen_of_nothing(device):
    empty = PackedBatch.from_sequences([([1, 2], [])], device=device)
    columns = {name: torch.zeros(2, device=device) for name in ("old_logp", "old_entropy")}
    empty = empty.with_columns(advantages=torch.zeros(2, device=device), **columns)
    loss = LossConfig(top_entropy_quantile=0.5, kl_cov_ratio=0.5)
    assert not of_chosen_tokens(config(loss=loss), empty, 0).advantages.any()


# ---- what is cut off -----------------------------------------------------------------------------
@pytest.mark.parametrize(
    "aggregation",
    ["token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum", "sequence_sum_norm"],
)
def test_weights_are_over_what_is_left(batch, aggregation):
    """The weights of completions that stay are those of a batch without the others."""
    gone, stays = {0, 3}, [1, 2, 4, 5, 6]
    owner = torch.repeat_interleave(
        torch.arange(len(LENGTHS), device=batch.device), batch.cu_seqlens.long().diff()
    )
    left = sum(owner == b for b in stays).bool()
    masked = batch.with_columns(loss_mask=batch.action_mask & left)
    chosen = config(loss=LossConfig(aggregation=aggregation))
    found = minibatch_weights(chosen, masked)
    assert torch.equal(found[left], minibatch_weights(chosen, batch.select(stays)))
    assert not found[~left].any()
    assert without_gradient(chosen, masked.with_columns(advantages=None)) == gone | {5}, (
        "the empty one has nothing either"
    )
    loud = config(loss=LossConfig(aggregation=aggregation, entropy_coef=0.1))
    assert without_gradient(loud, masked) == gone | {5}
    assert without_gradient(loud, batch) == set()


@pytest.fixture
def make(tiny_model, tmp_path, write_jsonl, device):
    (tmp_path / "rewards.py").write_text(
        "def some(completions, completion_ids, **columns):\n"
        "    return [100.0 + len(set(ids)) + (3 if i % 3 else 0) for i, ids in"
        " enumerate(completion_ids)]\n"
    )
    data = write_jsonl("prompts.jsonl", [{"prompt": f"w{i % 28} w3"} for i in range(12)])

    def made(name="run", **changes):
        defaults = dict(
            algorithm="grpo",
            device=str(device),
            dtype="float32",
            steps=2,
            prompts_per_step=6,
            samples_per_prompt=4,
            tokens_per_microbatch=40,
            minibatches=2,
            mask_truncated_completions=True,
            generation=GenerationConfig(max_new_tokens=6),
            optim=OptimConfig(lr=3e-3, schedule="constant", weight_decay=0.0),
            run=RunConfig(dir=str(tmp_path / name), progress=False),
        )
        return PolicyConfig(
            str(tiny_model), data, (f"{tmp_path / 'rewards.py'}:some",), **(defaults | changes)
        )

    return made


def rows_and_weights(made, device):
    train_policy(made)
    where = Path(made.run.dir)
    rows = [json.loads(line) for line in (where / "metrics.jsonl").read_text().splitlines()]
    decoder = load_decoder(where / "model", dtype="float32", device=device)
    return rows, dict(decoder.named_parameters())


@pytest.mark.parametrize("algorithm", ["grpo", "ppo", "dr_grpo", "gspo", "trpo", "dro"])
def test_what_was_cut_off_trains_nothing(make, tiny_model, tmp_path, device, algorithm):
    """Few completions of one token end: where none does the weights stand still, and every metric
    is a number."""
    group = algorithm in ("grpo", "dr_grpo", "gspo")
    made = partial(
        make,
        algorithm=algorithm,
        samples_per_prompt=2 if group else 1,
        minibatches=1,
        prompts_per_step=2 if group else 4,
        steps=1,
        generation=GenerationConfig(max_new_tokens=1),
    )
    for seed in range(20):
        run = RunConfig(dir=str(tmp_path / str(seed)), seed=seed, progress=False)
        rows, after = rows_and_weights(made(run=run), device)
        if rows[0]["completions/clipped_ratio"] == 1:
            break
    assert rows[0]["completions/clipped_ratio"] == 1
    assert all(math.isfinite(x) for x in rows[0].values() if isinstance(x, float)), rows[0]
    before = dict(load_decoder(tiny_model, dtype="float32", device=device).named_parameters())
    assert all(torch.equal(after[name], x) for name, x in before.items())


def test_the_others_train_and_the_split_does_not_matter(make, device):
    rows, one = rows_and_weights(make(), device)
    assert 0 < rows[0]["completions/clipped_ratio"] < 1
    _, kept = rows_and_weights(make("kept", mask_truncated_completions=False), device)
    assert any(not torch.equal(one[name], kept[name]) for name in one)
    _, small = rows_and_weights(make("small", tokens_per_microbatch=9), device)
    for name in one:
        torch.testing.assert_close(small[name], one[name], rtol=1e-4, atol=1e-5)


def test_held_tokens_stay_nearer(make, device):
    """A loss that holds every second token moves the policy less; with one optimizer step a rollout
    it does nothing, which the run says."""
    loss = dict(objective="importance")
    options = dict(mask_truncated_completions=False, epochs=4, steps=1)
    free, _ = rows_and_weights(make(**options, loss=LossConfig(**loss)), device)
    held = LossConfig(**loss, kl_cov_ratio=0.5, kl_cov_coef=20.0)
    near, _ = rows_and_weights(make("held", **options, loss=held), device)
    assert near[0]["policy/last_approxkl"] < 0.7 * free[0]["policy/last_approxkl"]
    idle = make(loss=held, epochs=1, minibatches=1).idle_choices
    assert "loss.kl_cov_ratio 0.5" in idle


# ---- bad input -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("words", "changes"),
    [
        ("top_entropy_quantile", {"loss": {"top_entropy_quantile": 0.0}}),
        ("top_entropy_quantile", {"loss": {"top_entropy_quantile": 1.1}}),
        ("clip_cov_ratio", {"loss": {"clip_cov_ratio": -0.1}}),
        ("clip_cov_low", {"loss": {"clip_cov_low": 5.0}}),
        ("kl_cov_ratio in", {"loss": {"kl_cov_ratio": 1.0}}),
        ("kl_cov_coef > 0", {"loss": {"kl_cov_ratio": 0.1, "kl_cov_coef": 0.0}}),
        ("choose one", {"loss": {"kl_cov_ratio": 0.1, "clip_cov_ratio": 0.1}}),
        ("single tokens", {"algorithm": "gspo", "loss": {"kl_cov_ratio": 0.1}}),
        ("single tokens", {"algorithm": "gspo", "loss": {"top_entropy_quantile": 0.2}}),
        ("single tokens", {"algorithm": "trpo", "loss": {"clip_cov_ratio": 0.1}}),
        ("gdpo normalises each reward", {"algorithm": "gdpo", "scale_scores": True}),
        ("gdpo normalises each reward", {"algorithm": "gdpo", "score_clip": 5.0}),
        (
            "gdpo normalises each reward",
            {"algorithm": "gdpo", "kl": KLConfig(coef=0.1, placement="reward")},
        ),
    ],
)
def test_options_that_cannot_be(words, changes):
    loss = changes.pop("loss", {})
    with pytest.raises(ConfigError, match=words):
        config(**changes, loss=LossConfig(**loss))
