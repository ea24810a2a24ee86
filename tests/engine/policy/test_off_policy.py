"""Tokens that the policy did not sample as it is now: importance sampling by enumeration, the
corrections, the KL through the ratio, the sequence ratio."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from tests.engine.policy.test_closed_forms import (
    BETA,
    EOS,
    OFFSETS,
    PROMPTS,
    STATES,
    T,
    Tree,
    V,
    config_of,
    fixed_point,
    optimise,
    reverse_kl,
)

from fusedrl.engine.base.errors import ConfigError
from fusedrl.engine.base.packing import PackedBatch
from fusedrl.engine.config import CorrectionConfig, KLConfig, LossConfig, PolicyConfig
from fusedrl.engine.policy.advantages import Signals, estimate
from fusedrl.engine.policy.objectives import (
    behaviour,
    make_objective,
    minibatch_weights,
    objective_loss,
    ratio_kl,
)
from fusedrl.kernels.runtime.dispatch import use_impl

NAN = float("nan")


# ---- importance sampling itself ------------------------------------------------------------------
def test_the_variance_of_an_importance_weighted_mean(device):
    """E_q[f p / q] = E_p[f] and Var_q = E_p[f^2 p / q] - E_p[f]^2, over 7 outcomes; the further q
    is from p, the larger, and what is sampled says so."""
    rng = torch.Generator().manual_seed(0)
    p, f = (
        torch.randn(7, generator=rng, dtype=torch.float64).to(device).softmax(0),
        torch.randn(7, generator=rng, dtype=torch.float64).to(device),
    )
    away = torch.randn(7, generator=rng, dtype=torch.float64).to(device)
    variances, covered = [], []
    for far in (0.0, 1.0, 3.0, 6.0):
        q = (p.log() + far * away).softmax(0)
        x = f * p / q
        mean = (q * x).sum()
        torch.testing.assert_close(mean, (p * f).sum())
        by_definition = (q * (x - mean) ** 2).sum()
        torch.testing.assert_close(by_definition, (p * f**2 * p / q).sum() - (p * f).sum() ** 2)
        variances.append(by_definition.item())
        drawn = x[
            torch.multinomial(q.cpu(), 200 * 100, replacement=True, generator=rng).to(device)
        ].view(200, 100)
        assert (drawn.mean() - mean).abs() < 5 * (by_definition / 20_000).sqrt()
        covered.append(
            ((drawn.mean(1) - mean).abs() <= 2 * drawn.std(1) / 10).double().mean().item()
        )
    assert variances == sorted(variances)
    assert variances[-1] > 1000 * variances[0]
    assert covered[0] > 0.9  # intervals of 100 draws hold the mean
    # and do not where p and q are far: the draws do not even see what they lack
    assert covered[-1] < 0.5


# ---- every completion of the task, with its probability ------------------------------------------
def everything(device, policy):
    """(batch, states [N], probability [B] under `policy` [STATES, V] and the prompts) of all 682
    completions."""
    rows, states, chances = [], [], []
    for prompt in range(PROMPTS):
        for n in range(1, T + 1):
            for head in itertools.product(range(EOS), repeat=n - 1):
                for last in range(V) if n == T else (EOS,):
                    tokens, code, path = [*head, last], prompt, []
                    for d, token in enumerate(tokens):
                        path.append(OFFSETS[d] + code)
                        code = code * EOS + token
                    rows.append(([0], tokens))
                    states += [0, *path]
                    chances.append(
                        sum(policy[s, a].item() for s, a in zip(path, tokens, strict=True))
                    )
    batch = PackedBatch.from_sequences(rows, device=device)
    states = torch.tensor(states, device=device)
    chance = torch.tensor(chances, dtype=torch.float64, device=device).exp() / PROMPTS
    assert chance.sum().item() == pytest.approx(1.0)
    scores = Tree.random(device).rewards[states, batch.token_ids][batch.cu_seqlens[1:].long() - 1]
    return (
        batch.with_columns(scores=scores, group_ids=torch.arange(len(chance), device=device)),
        states,
        chance,
    )


def table(device, seed, sd=0.7):
    return (
        torch.randn(STATES, V, generator=torch.Generator().manual_seed(seed))
        .to(device)
        .mul(sd)
        .double()
        .log_softmax(1)
    )


def gather(batch, states, logp):
    return torch.where(batch.action_mask, logp[states, batch.token_ids], 0.0)


def true_gradient(device, logits):
    """Of J, by the recursion over the tree."""
    tree, logp = Tree.random(device), logits.log_softmax(1)
    value = tree.backward(
        lambda s, q: (logp[s].exp() * (q - BETA * (logp[s] - tree.ref[s].double()))).sum(1)
    ).mean()
    return torch.autograd.grad(value, logits)[0]


def expected_gradient(device, config, logits, mu, *, rollout=True):
    """Of -loss over completions drawn from mu, exactly: each weighs its probability. Scored by the
    policy itself; float32, as the engine runs."""
    batch, states, chance = everything(device, mu)
    logp = gather(batch, states, logits.log_softmax(1)).float()
    said = gather(batch, states, mu).float()
    batch = batch.with_columns(
        old_logp=logp.detach(),
        ref_logp=gather(batch, states, Tree.random(device).ref),
        rollout_logp=said if rollout else logp.detach(),
    )
    batch = estimate(config, Signals.of(config, batch, config.kl.coef, 0.0))
    weights = (
        minibatch_weights(config, batch)
        * torch.repeat_interleave(chance, torch.tensor(batch.lengths, device=device)).float()
        * batch.num_sequences
    )
    batch, _ = behaviour(config.correction, batch.with_columns(weights=weights), logp)
    loss, stats, _ = objective_loss(
        config, make_objective(config, 1.0), config.kl.coef, batch, logp, None, None
    )
    return -torch.autograd.grad(loss, logits)[0], stats


def relative(got, want):
    return ((got - want).norm() / want.norm()).item()


EXACT = CorrectionConfig(kind="truncated", level="sequence", high=1e9)


@pytest.mark.parametrize("advantage", ["monte_carlo", "reward_to_go"])
def test_a_corrected_sampler_gives_the_gradient_of_the_policy_itself(advantage, device):
    logits = table(device, 1).requires_grad_()
    mu, want = table(device, 2), true_gradient(device, logits)
    errors = {}
    for name, correction in (
        ("none", CorrectionConfig()),
        ("exact", EXACT),
        ("token", CorrectionConfig(kind="truncated", high=1e9)),
        ("truncated", CorrectionConfig(kind="truncated", level="sequence")),
        ("masked", CorrectionConfig(kind="masked", level="sequence")),
    ):
        config = config_of("reinforce", loss=LossConfig(advantage=advantage), correction=correction)
        errors[name] = relative(expected_gradient(device, config, logits, mu)[0], want)
        on_policy = relative(
            expected_gradient(device, config, logits, logits.detach().log_softmax(1))[0], want
        )
        assert on_policy < 1e-5
    assert errors["exact"] < 1e-5
    assert errors["none"] > 0.5
    # right at each state, and the states are still the sampler's
    assert 0.01 < errors["token"] < errors["none"]
    assert errors["truncated"] > 0.01
    assert errors["masked"] > 0.01


def test_the_sequence_ratio_to_the_sampler_is_exact_too(device):
    """bypass: the ratio itself is pi / mu, and where it is not clipped nothing is left out; a
    second correction would square it."""
    logits = table(device, 1).requires_grad_()
    mu, want = table(device, 2), true_gradient(device, logits)
    config = config_of(
        "sequence_ratio",
        loss=LossConfig(clip_low=0.999999, clip_high=1e9),
        correction=CorrectionConfig(bypass=True),
    )
    assert relative(expected_gradient(device, config, logits, mu)[0], want) < 1e-5
    squared = replace(config, correction=EXACT)
    # old_logp is the policy's: the ratio is 1, the weight the whole correction
    both, _ = expected_gradient(device, squared, logits, mu)
    assert relative(both, want) < 1e-5
    batch, states, _ = everything(device, mu)
    batch = batch.with_columns(
        rollout_logp=gather(batch, states, mu).float(),
        old_logp=torch.zeros(batch.num_tokens, device=device),
    )
    assert torch.equal(
        behaviour(config.correction, batch, batch.old_logp)[0].old_logp, batch.rollout_logp
    )


def test_off_policy_reinforce_with_a_learned_baseline(device):
    """theta += a gamma^t delta grad pi / pi' (S1): advantage learned_baseline, objective
    importance, discount_states; in later epochs and from a buffer."""
    config = config_of(
        "reinforce_learned",
        epochs=4,
        loss=LossConfig(objective="importance", gamma=0.9, discount_states=True, value_clip=None),
    )
    logits = table(device, 1).requires_grad_()
    mu, tree = table(device, 2), Tree.random(device)
    batch, states, _ = everything(device, mu)
    values = torch.where(
        batch.action_mask,
        torch.randn(STATES, generator=torch.Generator().manual_seed(3)).to(device)[states],
        0.0,
    )
    batch = batch.with_columns(
        old_logp=gather(batch, states, mu).float(),
        ref_logp=gather(batch, states, tree.ref),
        values=values,
    )
    batch = estimate(config, Signals.of(config, batch, config.kl.coef, 0.0))
    batch = batch.with_columns(weights=minibatch_weights(config, batch))
    logp = gather(batch, states, logits.log_softmax(1)).float()
    loss, *_ = objective_loss(
        config,
        make_objective(config, 1.0),
        config.kl.coef,
        batch,
        logp,
        None,
        values.clone().requires_grad_(),
    )
    got = -torch.autograd.grad(loss, logits)[0]
    want = 0.0  # by the seed's line, a completion and a step at a time
    pi = logits.log_softmax(1)
    for b in range(batch.num_sequences):
        slots = batch.slots([b])[1:].tolist()
        rewards = [-BETA * (batch.old_logp[s] - batch.ref_logp[s]).item() for s in slots]
        rewards[-1] += batch.scores[b].item()
        for t, s in enumerate(slots):
            G = sum(0.9**k * r for k, r in enumerate(rewards[t:]))
            want = (
                want
                + 0.9**t
                * (G - values[s].item())
                * (pi[states[s], batch.token_ids[s]] - mu[states[s], batch.token_ids[s]]).exp()
            )
    want = torch.autograd.grad(want / batch.num_sequences, logits)[0]
    assert relative(got, want) < 1e-5


# ---- the KL through the ratio --------------------------------------------------------------------
@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_the_kl_through_the_ratio_has_the_gradient_of_the_kl_at_each_state(estimator, device):
    """Of KL(pi || ref), whoever sampled; without the ratio it is that of another thing off policy,
    and on policy that of nothing (k1) or KL(ref || pi) (k3)."""
    z = torch.tensor([0.3, -1.0, 0.8, 0.1], dtype=torch.float64, requires_grad=True, device=device)
    ref, other = (
        torch.tensor(x, dtype=torch.float64, device=device).log_softmax(0)
        for x in ([-0.5, 0.2, 0.4, 1.0], [1.0, 0.0, -1.0, 0.5])
    )
    pi, mask = z.log_softmax(0), torch.ones(4, dtype=torch.bool, device=device)
    value = (pi.exp() * (pi - ref)).sum()
    (want,) = torch.autograd.grad(value, z, retain_graph=True)
    for mu in (pi.detach(), other):
        term = (mu.exp() * ratio_kl(pi, mu, ref, mask, estimator)).sum()
        torch.testing.assert_close(term, value)
        torch.testing.assert_close(
            torch.autograd.grad(term, z, retain_graph=True)[0], want, rtol=1e-10, atol=1e-12
        )
        plain = (
            mu.exp() * (pi - ref if estimator == "k1" else torch.expm1(ref - pi) + pi - ref)
        ).sum()
        assert relative(torch.autograd.grad(plain, z, retain_graph=True)[0], want) > 0.1
        detached = (
            (mu.exp() * (pi - mu).exp().detach())
            * (pi - ref if estimator == "k1" else torch.expm1(ref - pi) + pi - ref)
        ).sum()
        assert relative(torch.autograd.grad(detached, z, retain_graph=True)[0], want) > 0.1


def test_the_kl_through_the_ratio_at_its_edges(device):
    logp = torch.tensor([-1.0, 500.0, -500.0, NAN, 0.25], requires_grad=True, device=device)
    mask = torch.tensor([True, True, True, False, True], device=device)
    for estimator in ("k1", "k3"):
        term = ratio_kl(
            logp,
            torch.tensor([-1.0, 0.0, 0.0, NAN, 0.25], device=device),
            torch.tensor([-1.0, 0.0, 0.0, NAN, 0.0], device=device),
            mask,
            estimator,
        )
        assert term.isfinite().all()
        (grad,) = torch.autograd.grad(term.sum(), logp)
        assert grad.isfinite().all()
        assert term[0] == term[3] == grad[3] == 0.0
        # on policy: k1 + 1, and k1
        assert grad[4].item() == pytest.approx(0.25 + (1.0 if estimator == "k1" else 0.0))
        if estimator == "k3":
            assert grad[1] == grad[2] == 0.0  # beyond the clamps
    broken = ratio_kl(
        torch.tensor([NAN], device=device),
        torch.zeros(1, device=device),
        torch.zeros(1, device=device),
        torch.tensor([True], device=device),
        "k3",
    )
    assert broken.isnan().all()  # an unmasked NaN is not hidden


def test_tokens_in_the_loss_leave_out_what_a_token_changes_behind_it(device):
    """Against the gradient of the KL of whole completions: through the ratio the error is that of
    k2 and of full, and plain k3 is further off."""
    logits = table(device, 4).requires_grad_()
    logp, ref = logits.log_softmax(1), table(device, 5)
    batch, states, chance = everything(device, logp.detach())
    here, there = gather(batch, states, logp), gather(batch, states, ref)
    each = torch.repeat_interleave(chance, torch.tensor(batch.lengths, device=device))
    index = torch.repeat_interleave(
        torch.arange(batch.num_sequences, device=device), torch.tensor(batch.lengths, device=device)
    )
    lp, lr = (
        torch.zeros(batch.num_sequences, dtype=torch.float64, device=device).index_add(0, index, x)
        for x in (here, there)
    )
    (want,) = torch.autograd.grad(
        ((lp - lp.detach()).exp() * chance * (lp - lr)).sum(), logits, retain_graph=True
    )

    def error(term):
        return relative(
            torch.autograd.grad((each * term).sum(), logits, retain_graph=True)[0], want
        )

    k = here - there
    full = torch.where(batch.action_mask, (logp.exp() * (logp - ref)).sum(1)[states], 0.0)
    errors = {
        "full": error(full),
        "k2": error(k * k / 2),
        "k3": error(torch.expm1(-k) + k),
        **{
            f"rho {e}": error(ratio_kl(here, here.detach(), there, batch.action_mask, e))
            for e in ("k1", "k3")
        },
    }
    for name in ("k2", "rho k1", "rho k3"):
        assert errors[name] == pytest.approx(errors["full"], rel=1e-9), name
    assert 0.3 < errors["full"] < errors["k3"]


def test_what_does_not_go_with_it():
    for kl in (
        dict(placement="reward", through_ratio=True),
        dict(estimator="k2", through_ratio=True),
        dict(estimator="full", through_ratio=True),
        dict(level="sequence", through_ratio=True),
    ):
        with pytest.raises(
            ConfigError,
            match=r"kl\.through_ratio only with kl\.placement = loss, kl\.estimator = k1 or k3",
        ):
            KLConfig(**kl)
    for algorithm in ("ppo", "grpo", "reinforce_pp_baseline"):
        config = PolicyConfig("m", "d", ("r.py:f",), algorithm, kl=KLConfig(through_ratio=True))
        assert (config.kl.placement, config.kl.estimator) == ("loss", "k3")
        assert replace(config, steps=7).kl == config.kl
    with pytest.raises(ConfigError, match=r"objective sequence_ratio does not use dual_clip"):
        make_objective(
            PolicyConfig("m", "d", ("r.py:f",), "sequence_ratio", loss=LossConfig(dual_clip=3.0)),
            1.0,
        )


@pytest.mark.parametrize("epochs", [1, pytest.param(4, marks=pytest.mark.full)])
def test_where_the_kl_through_the_ratio_ends(epochs, device):
    """Where k2 and the full KL end (test_closed_forms.py)."""
    tree = Tree.random(device)
    expected = tree.gap(fixed_point(device, tree, reverse_kl))
    config = config_of("rloo", epochs=epochs, kl=KLConfig(coef=BETA, through_ratio=True))
    assert optimise(
        device, config, updates=400 if epochs == 1 else 1000, lr=0.1 if epochs == 1 else 0.05
    ) == pytest.approx(expected, abs=0.01 * min(epochs, 2))


# ---- the sequence ratio --------------------------------------------------------------------------
def test_the_sequence_ratio_is_its_definition(device):
    """mean over completions of max(-R s, -R clip(s)), s the product of their ratios: value and
    gradient, in float64."""
    rng = torch.Generator().manual_seed(0)
    lengths = (1, 5, 3, 7, 2, 4)
    batch = PackedBatch.from_sequences([([1], [2] * n) for n in lengths], device=device)
    mask = batch.action_mask.clone()
    mask[batch.slots([3])[3]] = False  # an observation inside a completion
    batch = replace(batch, action_mask=mask)
    N = batch.num_tokens
    old = torch.where(mask, -torch.rand(N, generator=rng, dtype=torch.float64).to(device) * 3, NAN)
    logp = torch.where(
        mask, old + 0.2 * torch.randn(N, generator=rng, dtype=torch.float64).to(device), NAN
    )
    logp[batch.slots([5])[1]] += 30.0  # beyond the clamp
    R = torch.tensor([1.0, -2.0, 3.0, 0.5, -1.5, 1.0], dtype=torch.float64, device=device)
    advantages = torch.where(
        mask, torch.repeat_interleave(R, torch.tensor(batch.lengths, device=device)), NAN
    )
    config = PolicyConfig("m", "d", ("r.py:f",), "sequence_ratio")
    assert (config.advantage, config.kl.placement, config.loss.aggregation) == (
        "monte_carlo",
        "reward",
        "sequence_mean_token_mean",
    )
    batch = batch.with_columns(
        old_logp=old, advantages=advantages, weights=minibatch_weights(config, batch).double()
    )
    logp.requires_grad_()
    with use_impl("torch"):
        loss, _, _ = objective_loss(
            config, make_objective(config, 1.0), 0.0, batch, logp, None, None
        )
    (got,) = torch.autograd.grad(loss, logp)
    want, ratios = 0.0, []
    for b in range(len(lengths)):
        live = [t for t in batch.slots([b]).tolist() if mask[t]]
        log_s = sum(logp[t] - old[t] for t in live)
        s = (
            log_s.exp()
            if abs(log_s.item()) <= 20
            else torch.tensor(math.exp(20.0), dtype=torch.float64, device=device)
        )
        ratios.append(s.item())
        want = want - torch.minimum(R[b] * s, R[b] * s.clamp(0.8, 1.2)) / len(lengths)
    torch.testing.assert_close(loss, want, rtol=1e-7, atol=1e-9)
    (expected,) = torch.autograd.grad(want, logp)
    torch.testing.assert_close(got[mask], expected[mask], rtol=1e-6, atol=1e-9)
    assert not got[~mask].any()
    assert any(0.8 < s < 1.2 for s in ratios)
    assert any(
        (s > 1.2 and r > 0) or (s < 0.8 and r < 0) for s, r in zip(ratios, R.tolist(), strict=True)
    )  # clipped, without gradient
    assert any(
        (s > 1.2 and r < 0) or (s < 0.8 and r > 0) for s, r in zip(ratios, R.tolist(), strict=True)
    )  # beyond, and pulled back


def test_a_kl_outside_the_ratio_has_no_gradient(device):
    """Erratum 12: -beta log(pi / ref), differentiated as it is printed, is 0 on average; detached
    in the reward it is the gradient of the KL."""
    logits = table(device, 1).requires_grad_()
    want = true_gradient(device, logits)
    mu = logits.detach().log_softmax(1)
    inside, outside = (
        expected_gradient(device, config_of("sequence_ratio", kl=kl), logits, mu)[0]
        for kl in (KLConfig(coef=BETA), KLConfig(coef=BETA, placement="loss", estimator="k1"))
    )
    reward_alone = expected_gradient(
        device, config_of("sequence_ratio", kl=KLConfig(coef=0.0)), logits, mu
    )[0]
    assert relative(inside, want) < 1e-5
    assert relative(outside, want) > 0.2
    assert relative(outside, reward_alone) > 0.0


@pytest.mark.full
@pytest.mark.parametrize(
    "name, config, least",
    [
        ("sequence_ratio", config_of("sequence_ratio"), 0.96),
        (
            "off-policy reinforce",
            config_of(
                "reinforce_learned",
                epochs=4,
                loss=LossConfig(objective="importance", value_clip=None),
            ),
            0.99,
        ),
    ],
)
def test_the_optimum_is_reached(name, config, least, device):
    assert optimise(device, config, updates=1000, lr=0.05) >= least
