"""TRPO: its parts against linear algebra, where it ends against the exact optimum, its lower bound
by enumeration, and its step on a language model.

One file: the enumerable problem that parts and whole are tried on.
"""

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tests.engine.model.test_decoder import MODELS, SIZES
from tests.engine.policy.test_closed_forms import (
    BETA,
    EOS,
    OFFSETS,
    PROMPTS,
    STATES,
    T,
    Tree,
    column,
    config_of,
    prepared,
    sample,
)
from tests.engine.watch.test_plan import MEDIUM, allocator_peak, model_of
from tests.engine.watch.test_plan import batch as plan_batch

from fusedrl.engine import CacheConfig
from fusedrl.engine.actor import HybridActor
from fusedrl.engine.base.errors import ConfigError
from fusedrl.engine.base.packing import IGNORE
from fusedrl.engine.config import (
    CriticConfig,
    GenerationConfig,
    KLConfig,
    LoRAConfig,
    LossConfig,
    OptimConfig,
    PolicyConfig,
    PtxConfig,
    RunConfig,
    TRPOConfig,
)
from fusedrl.engine.model.configuration import model_config
from fusedrl.engine.model.heads import ValueHead
from fusedrl.engine.model.weights import load_decoder
from fusedrl.engine.optim.learner import Learner
from fusedrl.engine.optim.natural_gradient import conjugate_gradient, line_search, natural_step
from fusedrl.engine.policy import trpo
from fusedrl.engine.policy.advantages import find_advantage
from fusedrl.engine.policy.control import Control
from fusedrl.engine.policy.objectives import make_objective, objective_loss
from fusedrl.engine.runs.checkpoint import latest_checkpoint
from fusedrl.engine.stages import policy
from fusedrl.engine.stages.policy import recount, train_policy
from fusedrl.engine.watch.plan import Planner
from fusedrl.kernels.runtime import native


# ---- the parts -----------------------------------------------------------------------------------
def positive_definite(device, n=12, seed=0):
    rng = torch.Generator().manual_seed(seed)
    root, b = (
        torch.randn(n, n, generator=rng, dtype=torch.float64).to(device),
        torch.randn(n, generator=rng, dtype=torch.float64).to(device),
    )
    return root @ root.T + torch.eye(n, dtype=torch.float64, device=device), b


def test_conjugate_gradient_solves(device):
    A, b = positive_definite(device)
    calls = []
    x, residual = conjugate_gradient(lambda v: calls.append(1) or A @ v, b, 40, tolerance=1e-12)
    torch.testing.assert_close(x, torch.linalg.solve(A, b), rtol=1e-9, atol=1e-12)
    assert len(calls) <= 16
    assert residual <= 1e-12
    for iterations in (1, 4):  # cut short it says by how much it is wrong, and still descends
        x, residual = conjugate_gradient(lambda v: A @ v, b, iterations)
        assert residual == pytest.approx(((A @ x - b).norm() / b.norm()).item(), rel=1e-6)
        assert torch.dot(x, b) > 0
    x, residual = conjugate_gradient(lambda v: A @ v, torch.zeros_like(b), 10)
    assert not x.any()
    assert residual == 0.0
    x, _ = conjugate_gradient(lambda v: -A @ v, b, 10)  # not positive definite: no step, and no NaN
    assert not x.any()


def test_the_full_move_is_as_long_as_the_bound_allows(device):
    F, descent = positive_definite(device)
    for damping, max_kl in ((0.0, 0.01), (3.0, 0.5)):
        step = natural_step(
            descent, lambda v: F @ v, TRPOConfig(max_kl=max_kl, damping=damping, cg_iterations=40)
        )
        longer = natural_step(
            descent,
            lambda v: F @ v,
            TRPOConfig(max_kl=max_kl, damping=damping),
            whole=lambda v: F @ v / 4,
        )
        torch.testing.assert_close(
            longer.move_P,
            2
            * natural_step(
                descent, lambda v: F @ v, TRPOConfig(max_kl=max_kl, damping=damping)
            ).move_P,
        )
        x = torch.linalg.solve(
            F + damping * torch.eye(len(F), dtype=torch.float64, device=device), descent
        )
        torch.testing.assert_close(
            step.move_P, x * math.sqrt(2 * max_kl / (x @ F @ x)), rtol=1e-4, atol=0
        )
        # of F itself, whatever the damping
        assert (step.move_P @ F @ step.move_P).item() / 2 == pytest.approx(max_kl, rel=1e-9)
        assert step.decrease == pytest.approx((descent @ step.move_P).item(), rel=1e-12)
    nothing = natural_step(torch.zeros_like(descent), lambda v: F @ v, TRPOConfig())
    assert (nothing.decrease, nothing.move_P.any().item()) == (0.0, False)


def test_the_line_search_takes_the_first_good_length():
    settings = TRPOConfig(max_kl=0.01, backtracks=3, backtrack_ratio=0.5, accept_ratio=0.1)
    nan = float("nan")

    def search(*found, decrease=1.0):
        tried, results = [], iter(found)
        result = line_search(
            lambda fraction: tried.append(fraction) or next(results), 2.0, decrease, settings
        )
        return result.fraction, tried

    assert search((1.5, 0.005)) == (1.0, [1.0])
    # beyond the bound; too little for half a move; exactly at the bound
    assert search((1.5, 0.02), (1.99, 0.001), (1.7, 0.01)) == (0.25, [1.0, 0.5, 0.25])
    assert search((nan, 0.0), (1.5, nan), (2.1, 0.0), (2.0, 0.0)) == (0.0, [1.0, 0.5, 0.25, 0.125])
    assert search(*[(2.0, 0.0)] * 4, decrease=0.0)[0] == 0.0  # nothing to gain


# ---- where it ends -------------------------------------------------------------------------------
def visits(device, p):
    """[STATES] how often a policy comes to each state in one completion."""
    d = torch.zeros(STATES, dtype=p.dtype, device=device)
    d[:PROMPTS] = 1 / PROMPTS
    for depth in range(T - 1):
        here = slice(OFFSETS[depth], OFFSETS[depth + 1])
        d[OFFSETS[depth + 1] : OFFSETS[depth + 2]] = (d[here, None] * p[here, :EOS]).flatten()
    return d


class Table:
    """A softmax table under the step that the engine takes."""

    def __init__(self, tree):
        self.tree, self.logits = tree, tree.ref.clone()

    def step(self, d, loss_of, settings):
        """`d` [STATES]: weights of the states in the KL. `loss_of`: logits -> loss."""
        before, old = self.logits, self.logits.log_softmax(1)
        p = old.exp()
        x = before.clone().requires_grad_()
        loss = loss_of(x)
        (gradient,) = torch.autograd.grad(loss, x)

        def fisher(v):
            v = v.view_as(p)
            return (d[:, None] * p * (v - (p * v).sum(1, keepdim=True))).flatten()

        def evaluate(fraction):
            self.logits = before + fraction * move.view_as(before)
            return loss_of(self.logits).item(), (
                d * (p * (old - self.logits.log_softmax(1))).sum(1)
            ).sum().item()

        move, decrease, _ = natural_step(-gradient.flatten(), fisher, settings)
        if not (found := line_search(evaluate, loss.item(), decrease, settings)).fraction:
            self.logits = before
        assert found.kl <= settings.max_kl
        return found

    @property
    def gap(self):
        return self.tree.gap(self.logits.log_softmax(1))


def exact(device, settings, steps=100):
    """Advantages and states enumerated; the KL to the reference in the reward."""
    tree = Tree.random(device)
    table = Table(Tree(tree.ref.double(), tree.rewards.double()))
    for step in range(steps):
        old = table.logits.log_softmax(1)
        p, d, A = old.exp(), visits(device, old.exp()), torch.empty_like(old)

        def combine(here, q, old=old, p=p, A=A):
            A[here] = q - BETA * (old[here] - table.tree.ref[here])
            value = (p[here] * A[here]).sum(1)
            A[here] -= value[:, None]
            return value

        tree.backward(combine)
        d = d / d.sum()
        table.step(
            d, lambda x, d=d, A=A: -(d[:, None] * x.softmax(1) * A).sum(), settings.at(step, steps)
        )
    return table.gap


def test_the_optimum_is_reached_with_exact_gradients(device):
    settings = TRPOConfig(max_kl=0.02, damping=1e-4, schedule="linear")
    assert exact(device, settings) >= 0.999
    constant = exact(device, replace(settings, schedule="constant"))
    assert 0.97 <= constant < 0.999  # steps of constant length circle the optimum
    # the damping outweighs the curvature of states that are seldom visited
    assert exact(device, replace(settings, damping=0.1)) < 0.98


def sampled(device, config, steps, n=4096, seed=1, lr=0.05, offset=0.0):
    """As `exact`, with the loop's own advantages, objective and weights on sampled batches; the KL
    and the Fisher matrix are of the sampled states."""
    table, rng = Table(Tree.random(device).shifted(offset)), torch.Generator().manual_seed(seed)
    needs, control = find_advantage(config.advantage).needs, Control(config)
    objective = make_objective(config, 0.0)
    critic, every_state = ValueHead(STATES, device=device), torch.eye(STATES, device=device)
    adam = torch.optim.Adam(critic.parameters(), lr=lr)
    groups = torch.arange(n, device=device) // config.samples_per_prompt
    for step in range(steps):
        batch, states, at = sample(table.tree, table.logits.log_softmax(1), groups, rng)
        mask = batch.action_mask
        if needs == "critic":
            batch = batch.with_columns(values=column(critic(every_state).detach(), states, mask))
        batch, totals = prepared(config, batch, control, critic)
        d = torch.bincount(states[mask], minlength=STATES) / mask.sum()
        table.step(
            d,
            lambda x, at=at, mask=mask, batch=batch: objective_loss(
                config,
                objective,
                control.kl.coef,
                batch,
                column(x.log_softmax(1).view(-1), at, mask),
                None,
                None,
            )[0],
            config.trpo.at(step, steps),
        )
        for _ in range(config.epochs if needs == "critic" else 0):
            adam.zero_grad()
            (
                batch.weights * (column(critic(every_state), states, mask) - batch.returns) ** 2
            ).sum().backward()
            adam.step()
        recount(control, critic)
        control.update({}, totals)
    return table.gap


@pytest.mark.parametrize(
    "row, loss, offset",
    [
        ("trpo", LossConfig(), 3.0),
        pytest.param("trpo", LossConfig(), 0.0, marks=pytest.mark.full),
        pytest.param("trpo", LossConfig(), -3.0, marks=pytest.mark.full),
        pytest.param("rloo", LossConfig(objective="trpo"), 0.0, marks=pytest.mark.full),
    ],
)
def test_the_optimum_is_reached_from_samples(row, loss, offset, device):
    """With rewards that are centred or not."""
    settings = TRPOConfig(max_kl=0.01, damping=1e-4, schedule="linear")
    assert sampled(device, config_of(row, loss=loss, trpo=settings), 100, offset=offset) >= 0.995


# ---- the lower bound -----------------------------------------------------------------------------
def test_the_lower_bound_holds_and_is_needed(device):
    """eta(new) >= L_old(new) - C max_s KL(old || new), C = 4 eps gamma / (1 - gamma)^2, eps = max
    |A_old| (Schulman et al., 2015, theorem 1): on random MDPs, for random policies near and far,
    everything enumerated. Without the penalty L alone promises too much."""
    S, A, gamma = 5, 3, 0.8
    rng = torch.Generator().manual_seed(0)
    optimistic, tightest = 0, math.inf

    def normal(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64).to(device)

    for _ in range(20):
        P, r, start = normal(S, A, S).softmax(-1), normal(S, A), normal(S).softmax(0)

        def evaluate(p, P=P, r=r, start=start):
            """(eta, discounted visits [S], advantages [S, A]) of a policy."""
            moves = torch.einsum("sa,sat->st", p, P)
            values = torch.linalg.solve(
                torch.eye(S, dtype=torch.float64, device=device) - gamma * moves, (p * r).sum(1)
            )
            d = torch.linalg.solve(
                torch.eye(S, dtype=torch.float64, device=device) - gamma * moves.T, start
            )
            return (start @ values).item(), d, r + gamma * P @ values - values[:, None]

        logits = normal(S, A)
        old = logits.softmax(1)
        eta, d, advantages = evaluate(old)
        assert (d[:, None] * old * r).sum().item() == pytest.approx(eta)  # eta, the other way round
        assert (old * advantages).sum(1).abs().max() < 1e-12
        C = 4 * advantages.abs().max().item() * gamma / (1 - gamma) ** 2
        for scale in (0.01, 0.1, 1.0, 5.0):
            new = (logits + scale * normal(S, A)).softmax(1)
            surrogate = eta + (d[:, None] * new * advantages).sum().item()
            kl = (old * (old / new).log()).sum(1).max().item()
            found = evaluate(new)[0]
            assert found >= surrogate - C * kl
            optimistic += found < surrogate
            tightest = min(tightest, (found - surrogate) / (advantages.abs().max().item() * kl))
    assert optimistic > 20
    assert tightest < -0.2  # so that a constant of 0.2 eps would not do


# ---- on a language model -------------------------------------------------------------------------
REWARD = """
def likes_w3(prompts, completions, completion_ids, **columns):
    return [float(sum(word == "w3" for word in text.split())) for text in completions]

def same(prompts, completions, completion_ids, **columns):
    return [1.0] * len(completions)

def huge(prompts, completions, completion_ids, **columns):
    return [3e38 * (-1) ** i for i in range(len(completions))]
"""


@pytest.fixture
def make(tiny_model, tmp_path, write_jsonl, device):
    (tmp_path / "rewards.py").write_text(REWARD)
    data = write_jsonl(
        "prompts.jsonl",
        [{"prompt": " ".join(f"w{(3 * i + j) % 28}" for j in range(1 + i % 5))} for i in range(12)],
    )

    def config(algorithm="trpo", name="run", reward="likes_w3", run=None, **kwargs):
        defaults = dict(
            device=str(device),
            dtype="float32",
            steps=2,
            prompts_per_step=12,
            samples_per_prompt=2,
            tokens_per_microbatch=100,
            generation=GenerationConfig(max_new_tokens=6),
            trpo=TRPOConfig(fisher_fraction=1.0),
            optim=OptimConfig(lr=1e-2, schedule="constant"),
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


def all_logp(decoder, batch, temperature=1.0):
    """[R, V] float64 log-probabilities at the slots with an action behind."""
    with torch.no_grad():
        hidden = decoder(batch.token_ids, batch.positions, batch.cu_seqlens, batch.max_length)
        return (hidden.double() @ decoder.head_weight.double().T / temperature).log_softmax(1)[
            batch.labels() != IGNORE
        ]


@pytest.fixture
def watched(monkeypatch):
    """Of each update: the batch, and log-probabilities over the vocabulary before it and after
    it."""
    seen = []

    def update(
        actor, reference, learner, batch, cuts, config, *rest, original=policy.trust_region_update
    ):
        before = all_logp(actor.decoder, batch, config.generation.temperature)
        metrics = original(actor, reference, learner, batch, cuts, config, *rest)
        seen.append(
            (
                batch,
                before,
                all_logp(actor.decoder, batch, config.generation.temperature),
                learner.optimizer,
            )
        )
        return metrics

    monkeypatch.setattr(policy, "trust_region_update", update)
    return seen


def test_every_step_keeps_its_bound_and_the_reward_rises(make, watched):
    config = make(
        steps=8,
        prompts_per_step=24,
        tokens_per_microbatch=4000,
        generation=GenerationConfig(max_new_tokens=8, temperature=0.8),
        kl=KLConfig(coef=0.01),
        trpo=TRPOConfig(max_kl=0.1, fisher_fraction=0.9),
    )
    train_policy(config)
    rows = _metrics(config)
    for row, (batch, before, after, optimizer) in zip(rows, watched, strict=True):
        kl = (before.exp() * (before - after)).sum(1).mean().item()
        assert row["trpo/kl"] == pytest.approx(kl, rel=2e-3)
        assert 0.005 < row["trpo/kl"] <= 0.1
        assert row["policy/last_approxkl"] == row["trpo/kl"]
        assert row["trpo/accepted"] == 1.0
        old, logp = (
            x.gather(1, batch.labels()[batch.labels() != IGNORE][:, None])[:, 0]
            for x in (before, after)
        )
        A = batch.advantages[batch.action_mask].double()
        assert row["trpo/improvement"] == pytest.approx(
            (((logp - old).exp() - 1) * A).mean().item(), rel=1e-3, abs=1e-6
        )
        assert row["trpo/improvement"] >= 0.1 * row["trpo/expected_improvement"] > 0
        assert row["policy/first_ratio_min"] == row["policy/first_ratio_max"] == 1.0
        assert row["val/ratio_min"] < 1.0 < row["val/ratio_max"]
        assert set(optimizer.state_dict()) == {
            f"value_head.{name}.{key}"
            for name in ("weight", "bias")
            for key in ("step", "exp_avg", "exp_avg_sq")
        }
    assert sum(row["reward"] for row in rows[-3:]) / 3 > rows[0]["reward"] + 0.4
    assert rows[-1]["val/explained_variance"] > 0.05  # the head learned


def test_a_step_that_is_not_accepted_leaves_every_bit(make, watched, device):
    refused = TRPOConfig(
        max_kl=50.0, backtracks=0, accept_ratio=0.99, damping=10.0, fisher_fraction=1.0
    )
    config = make(
        "grpo", steps=1, kl=KLConfig(coef=0.0), loss=LossConfig(objective="trpo"), trpo=refused
    )
    train_policy(config)
    (row,) = _metrics(config)
    assert (
        row["trpo/accepted"]
        == row["trpo/kl"]
        == row["trpo/fraction"]
        == row["trpo/improvement"]
        == 0.0
    )
    start = dict(load_decoder(config.model, dtype="float32", device=device).named_parameters())
    assert all(torch.equal(p, start[name]) for name, p in _weights(device, config).items())
    config = make(
        "grpo",
        name="same",
        reward="same",
        steps=1,
        kl=KLConfig(coef=0.0),
        loss=LossConfig(objective="trpo"),
    )
    train_policy(config)  # nothing to learn: no gradient, no step
    assert _metrics(config)[0]["trpo/accepted"] == 0.0
    assert all(torch.equal(p, start[name]) for name, p in _weights(device, config).items())


def test_gradients_that_are_not_finite_change_nothing(make, monkeypatch, device):
    # such rewards are refused otherwise
    monkeypatch.setattr("fusedrl.engine.rewards.functions.LARGEST", math.inf)
    config = make(
        "reinforce",
        steps=1,
        kl=KLConfig(coef=0.0),
        reward="huge",
        loss=LossConfig(objective="trpo", advantage="monte_carlo"),
    )
    train_policy(config)
    (row,) = _metrics(config)
    assert row["skipped_updates"] == 1.0
    start = dict(load_decoder(config.model, dtype="float32", device=device).named_parameters())
    assert all(torch.equal(p, start[name]) for name, p in _weights(device, config).items())


def test_a_row_of_them_stops_the_run(make, monkeypatch):
    """Although the critic's steps between them are sound."""
    gradient = trpo.Surrogate.gradient

    def broken(self):
        loss, found_P = gradient(self)
        return loss, found_P.fill_(math.nan)

    monkeypatch.setattr(trpo.Surrogate, "gradient", broken)
    config = make(steps=9, prompts_per_step=2, epochs=2)
    with pytest.raises(
        RuntimeError, match="5 updates of the model in a row had a non-finite gradient norm"
    ):
        train_policy(config)
    assert len(_metrics(config)) == 4


def test_values_are_trained_on_a_trunk_that_is_a_constant(make, monkeypatch):
    """Every gradient step of the critic moves the head alone, and is one of the value loss on all
    of the rollout."""
    seen = []

    def train_values(values, learner, micros, config, step, unit, original=trpo.train_values):
        optimizer = learner.optimizer
        head = [p for name, p in optimizer._params.items() if name.startswith("value_head")]
        trunk = [
            p.detach().clone()
            for name, p in optimizer._params.items()
            if name.startswith("decoder")
        ]
        weight, bias = (p.detach().double() for p in head)
        loss = 0.0
        for value, micro in zip(values, micros, strict=True):
            v = value().detach().double()
            loss += (micro.weights.double() * (v - micro.returns.double()) ** 2).sum().item() / 2
        found = original(values, learner, micros, config, step, unit)
        seen.append(
            (
                loss,
                found["loss/value_avg"],
                torch.equal(weight, head[0].double()) or torch.equal(bias, head[1].double()),
            )
        )
        assert all(
            torch.equal(a, p)
            for a, p in zip(
                trunk,
                (p for n, p in optimizer._params.items() if n.startswith("decoder")),
                strict=True,
            )
        )
        return found

    monkeypatch.setattr(trpo, "train_values", train_values)
    train_policy(make(epochs=1, prompts_per_step=4, loss=LossConfig(value_clip=None)))
    for loss, reported, stayed in seen:
        assert reported == pytest.approx(loss, rel=1e-5)
        assert not stayed
    assert len(seen) == 2


def test_the_split_changes_nothing_and_the_draw_of_states_little(make, device):
    moved, start = (
        {},
        dict(load_decoder(make().model, dtype="float32", device=device).named_parameters()),
    )
    for name, tokens, fraction in (("whole", 10_000, 1.0), ("cut", 60, 1.0), ("half", 10_000, 0.5)):
        config = make(
            name=name,
            steps=1,
            kl=KLConfig(coef=0.0),
            tokens_per_microbatch=tokens,
            trpo=TRPOConfig(fisher_fraction=fraction),
        )
        train_policy(config)
        moved[name] = torch.cat(
            [(p - start[n]).double().flatten() for n, p in _weights(device, config).items()]
        )
    assert (moved["cut"] - moved["whole"]).norm() < 2e-3 * moved["whole"].norm()
    assert torch.cosine_similarity(moved["half"], moved["whole"], dim=0) > 0.7
    assert (moved["half"] - moved["whole"]).norm() > 1e-2 * moved["whole"].norm()


@pytest.mark.cpu_only("bitwise resumption is promised on a CPU")
def test_resume_continues_bitwise(make, device):
    whole = make(
        name="whole",
        steps=3,
        prompts_per_step=6,
        run=dict(save_every=1),
        trpo=TRPOConfig(fisher_fraction=0.5, schedule="linear"),
    )
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
    assert all(
        name.startswith("value_head.")
        for name in latest_checkpoint(parts.run.dir).tensors["optimizer"]
    )
    train_policy(replace(parts, run=replace(parts.run, resume=True)))
    ours, theirs = _weights(device, whole), _weights(device, parts)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for a, b in zip(_metrics(whole), _metrics(parts), strict=True):
        timing = {k for k in a if k.startswith(("timing/", "tokens_per_s", "mem/"))}
        assert {k: v for k, v in a.items() if k not in timing} == {
            k: v for k, v in b.items() if k not in timing
        }
    head = [
        HybridActor.from_pretrained(
            Path(c.run.dir) / "model", value_head=True, dtype="float32", device=device
        ).value_head.weight
        for c in (whole, parts)
    ]
    assert torch.equal(*head)
    assert head[0].any()


@pytest.mark.parametrize(
    "more",
    [
        dict(lora=LoRAConfig(rank=2)),
        pytest.param(dict(strict=True), marks=pytest.mark.full),
        pytest.param(dict(checkpoint_activations=True), marks=pytest.mark.full),
        pytest.param(
            dict(kl=KLConfig(coef=0.1, placement="loss", estimator="k3")), marks=pytest.mark.full
        ),
    ],
)
def test_it_runs_with(make, more, watched):
    config = make(steps=1, prompts_per_step=4, **more)
    train_policy(config)
    (row,), ((_, before, after, _),) = _metrics(config), watched
    assert row["trpo/accepted"] == 1.0
    assert row["trpo/kl"] == pytest.approx(
        (before.exp() * (before - after)).sum(1).mean().item(), rel=1e-2
    )


def test_texts_are_a_part_of_the_step(make, write_jsonl):
    """With a coefficient that drowns the rewards, the step is one of the texts: they become
    likelier, and what the line search compares includes them."""
    texts = write_jsonl("texts.jsonl", [{"text": "w1 w2 w3 w4"}, {"text": "w5 w6"}])
    config = make(
        steps=3,
        prompts_per_step=4,
        ptx=PtxConfig(texts, coef=1000.0, sequences_per_step=2),
        trpo=TRPOConfig(max_kl=0.05, fisher_fraction=1.0),
    )
    train_policy(config)
    rows = _metrics(config)
    assert all(row["trpo/accepted"] for row in rows)
    for row, later in pairwise(rows):  # the same two texts each time
        assert row["loss/ptx"] - later["loss/ptx"] == pytest.approx(
            row["trpo/improvement"] / 1000, rel=0.05
        )
        assert row["loss/ptx"] - later["loss/ptx"] > 0.01


@pytest.mark.skipif(not native.capability, reason="the plan is of the C++ kernels")
def test_the_plan_counts_its_vectors(device):
    sizes, tokens = MEDIUM | {"tie_word_embeddings": True}, 400
    config = PolicyConfig(
        "m",
        "d",
        ("r.py:r",),
        "trpo",
        dtype="float32",
        device="cpu",
        trpo=TRPOConfig(cg_iterations=2, fisher_fraction=1.0),
        epochs=1,
    )
    planned, actor, packed = (
        Planner(model_config(sizes), config, cache=CacheConfig(num_blocks=1)),
        model_of(sizes, "ppo", "float32"),
        plan_batch(tokens, 2000),
    )
    learner, scored, noise = (
        Learner(actor, OptimConfig(lr=1e-3)),
        actor.score(packed),
        torch.randn(2, packed.num_tokens).to(device),
    )
    packed = packed.with_columns(
        old_logp=scored.logp,
        old_entropy=scored.entropy,
        values=scored.values,
        rollout_logp=scored.logp,
        advantages=noise[0],
        returns=noise[1],
        scores=torch.zeros(packed.num_sequences, device=device),
    )
    measured = allocator_peak(
        lambda: trpo.trust_region_update(
            actor,
            None,
            learner,
            packed,
            [[list(range(packed.num_sequences))]],
            config,
            Control(config),
            0,
        )
    )
    parts = planned.parts(tokens, False)
    assert parts.gradients + parts.optimizer + parts.activations + parts.workspace == pytest.approx(
        measured, rel=0.15
    )
    assert (
        planned.optimizer
        > 2.9
        * Planner(
            model_config(sizes), replace(config, loss=LossConfig(objective="ppo_clip"))
        ).optimizer
    )


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(minibatches=2), "minibatches 1 with the objective trpo"),
        (dict(dtype="bfloat16"), "dtype float32 with the objective trpo"),
        (
            dict(kl=KLConfig(coef=0.1, placement="loss", estimator="full")),
            "kl.estimator k1, k2, k3 or abs with the objective trpo",
        ),
    ],
)
def test_what_is_refused(kwargs, message):
    with pytest.raises(ConfigError, match=message):
        PolicyConfig("m", "d", ("r.py:f",), "trpo", **kwargs)


def test_what_the_settings_refuse():
    for name, value in (
        ("max_kl", 0.0),
        ("cg_iterations", 0),
        ("damping", -1.0),
        ("fisher_fraction", 0.0),
        ("fisher_fraction", 1.1),
        ("backtracks", -1),
        ("backtrack_ratio", 1.0),
        ("accept_ratio", 1.0),
    ):
        with pytest.raises(ConfigError, match=f"expected trpo.{name} "):
            TRPOConfig(**{name: value})


def test_models_that_it_cannot_train_are_refused_before_they_are_loaded(
    make, tiny_model, tmp_path, monkeypatch
):
    capped = tmp_path / "capped"
    capped.mkdir()
    # no weights: they would be missed
    (capped / "config.json").write_text(json.dumps(SIZES | MODELS["gemma2"]))
    with pytest.raises(ConfigError, match="reads logits that are not capped"):
        train_policy(replace(make(), model=str(capped)))
    # what "auto" is on a GPU
    monkeypatch.setattr(trpo, "resolve_dtype", lambda *args: torch.bfloat16)
    monkeypatch.setattr(
        HybridActor, "from_pretrained", lambda *args, **kwargs: pytest.fail("loaded")
    )
    with pytest.raises(
        ConfigError, match="expected dtype float32 with the objective trpo, got bfloat16"
    ):
        train_policy(make())


def test_a_critic_of_its_own_is_trained_beside_it(make):
    """Its own optimizer takes the passes; the policy has no value head, and its step keeps the
    bound."""
    config = make(
        steps=3, critic=CriticConfig("policy", optim=OptimConfig(lr=1e-2, schedule="constant"))
    )
    train_policy(config)
    rows = _metrics(config)
    assert all(row["trpo/accepted"] == 1.0 and row["trpo/kl"] <= config.trpo.max_kl for row in rows)
    assert rows[-1]["val/explained_variance"] > rows[0]["val/explained_variance"]
    assert (Path(config.run.dir) / "critic" / "value_head.safetensors").is_file()
    assert not (Path(config.run.dir) / "model" / "value_head.safetensors").exists()


@pytest.mark.parametrize("target, rises", [(0.0, False), (100.0, True)])
def test_an_entropy_target_bends_the_step(make, target, rises):
    """The reward is constant, so that the entropy is all there is to gain."""
    config = make(
        "grpo",
        reward="same",
        kl=KLConfig(coef=0.0),
        loss=LossConfig(objective="trpo", entropy_coef=1.0, entropy_target=target),
    )
    train_policy(config)
    first, last = (_metrics(config)[i]["entropy"] for i in (0, -1))
    assert (last > first) is rises
