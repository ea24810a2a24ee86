"""The kinds of PolicyObjective, the reference-KL term and the rollout correction, against
definitions written a second time.

One file: the definitions, which every kind is held against.
"""

import math
from functools import partial

import pytest
import torch

from fusedrl.kernels.linear_policy_loss import linear_policy_loss
from fusedrl.kernels.objective import KINDS
from fusedrl.kernels.policy_loss import (
    KL_ESTIMATORS,
    PolicyObjective,
    RolloutCorrection,
    policy_loss,
    policy_loss_reference,
    policy_value_loss,
)

OBJECTIVES = {kind: PolicyObjective(kind=kind) for kind in KINDS} | {
    "gspo": PolicyObjective(kind="gspo", clip_low=0.1, clip_high=0.15),
    "cispo": PolicyObjective(kind="cispo", clip_max=1.3),
    "kl_penalty": PolicyObjective(kind="kl_penalty", beta=0.3),
    "dro": PolicyObjective(kind="dro", beta=0.2),
    "sapo": PolicyObjective(kind="sapo", tau_positive=1.5, tau_negative=3.0),
}
BOUNDS = [0, 9, 9, 10, 43, 60]  # an empty sequence, one of one token, one that is masked


def close(got, want, scale=1.0):
    torch.testing.assert_close(
        got.detach().double(), want.detach().double(), rtol=2e-6, atol=1e-6 * scale
    )


def bounds(device):
    return torch.tensor(BOUNDS, dtype=torch.int32, device=device)


def problem(device, seed=0, spread=0.4):
    generator = torch.Generator().manual_seed(seed)
    N = BOUNDS[-1]
    old_logp = -torch.rand(N, generator=generator).to(device) * 5
    names = ("logp", "ref_logp", "rollout_logp")
    inputs = {
        name: old_logp + spread * torch.randn(N, generator=generator).to(device) for name in names
    }
    inputs |= {
        "old_logp": old_logp,
        "advantages": torch.randn(N, generator=generator).to(device),
        "entropy": torch.rand(N, generator=generator).to(device) * 4,
    }
    weights = torch.where(
        torch.rand(N, generator=generator).to(device) < 0.7,
        0.5 + torch.rand(N, generator=generator).to(device),
        0,
    )
    weights[43:] = 0.0
    return inputs, weights


def loss_of(inputs, weights, impl="torch", **settings):
    inputs = dict(inputs)
    return policy_loss(
        inputs.pop("logp"),
        inputs.pop("old_logp"),
        inputs.pop("advantages"),
        weights,
        impl=impl,
        cu_seqlens=bounds(weights.device),
        **{
            k: v
            for k, v in inputs.items()
            if k != "rollout_logp" or "rollout_correction" in settings
        },
        **settings,
    )


# ---- the kinds -----------------------------------------------------------------------------------
# kind -> (advantage, ratio, term, d term / d logp) at old_logp 0, so that logp = log ratio; each
# side of each bound.
L = math.log
BY_HAND = {
    "ratio": [(2.0, 4.0, -8.0, -8.0), (-2.0, 0.1, 0.2, 0.2)],
    "reinforce": [(2.0, 4.0, -2 * L(4), -2.0), (-3.0, 0.5, 3 * L(0.5), 3.0)],
    "kl_penalty": [
        (2.0, 4.0, -8 + 0.3 * (3 - L(4)), -8 + 0.3 * 3),
        (-2.0, 0.5, 1 + 0.3 * (-0.5 - L(0.5)), 1 - 0.3 * 0.5),
    ],
    "cispo": [
        (2.0, 1.2, -2.4 * L(1.2), -2.4),
        (2.0, 4.0, -2.6 * L(4), -2.6),
        (-2.0, 4.0, 2.6 * L(4), 2.6),
        (-2.0, 0.1, 0.2 * L(0.1), 0.2),
    ],
    "sapo": [
        (2.0, 1.0, -4 / 1.5, -2.0),
        (-2.0, 1.0, 4 / 3.0, 2.0),
        (2.0, 3.0, -8 / 1.5 / (1 + math.exp(-3)), -8 * 3 * math.exp(-3) / (1 + math.exp(-3)) ** 2),
    ],
    "dro": [
        (2.0, 4.0, -2 * L(4) + 0.1 * L(4) ** 2, -2 + 0.2 * L(4)),
        (-2.0, 0.5, 2 * L(0.5) + 0.1 * L(0.5) ** 2, 2 + 0.2 * L(0.5)),
    ],
    "gspo": [
        (2.0, 1.1, -2.2, -2.2),
        (2.0, 1.2, -2.3, 0.0),
        (-2.0, 0.95, 1.9, 1.9),
        (-2.0, 0.8, 1.8, 0.0),
        (2.0, 0.5, -1.0, -1.0),
    ],
    "geometric_mean": [
        (2.0, 1.2, -2.4, -2.4),
        (2.0, 2.0, -2 * math.exp(0.4), 0.0),
        (-2.0, 0.5, 2 * math.exp(-0.4), 0.0),
        (-2.0, 2.0, 4.0, 4.0),
    ],
}


@pytest.mark.each_impl("policy_value_loss")
@pytest.mark.parametrize("kind", BY_HAND)
def test_every_branch_by_hand(impl, kind, device):
    for A, ratio, term, slope in BY_HAND[kind]:
        logp = torch.tensor([math.log(ratio)], requires_grad=True, device=device)
        loss, stats = policy_loss(
            logp,
            torch.zeros(1, device=device),
            torch.tensor([A], device=device),
            torch.tensor([0.25], device=device),
            objective=OBJECTIVES[kind],
            cu_seqlens=torch.tensor([0, 1], device=device),
            impl=impl,
        )
        loss.backward()
        close(loss, torch.tensor(0.25 * term, device=device))
        close(logp.grad, torch.tensor([0.25 * slope], device=device))
        if kind in ("gspo", "geometric_mean"):
            assert (stats.clip_fraction_low + stats.clip_fraction_high).item() == float(slope == 0)


# Two tokens share s = exp((log 1.5 + log 0.9) / 2); geometric_mean cuts the first at 0.4. Each has
# its own advantage.
@pytest.mark.each_impl("policy_value_loss")
def test_sequence_kinds_token_by_token(impl, device):
    d = torch.tensor([1.5, 0.9], device=device).log()
    for kind, s, slopes in (
        ("gspo", math.sqrt(1.35), (1, 0)),
        ("geometric_mean", math.exp((0.4 + L(0.9)) / 2), (0, 1)),
    ):
        logp = d.clone().requires_grad_()
        objective = PolicyObjective(
            kind=kind, clip_high=0.17 if kind == "gspo" else 0.4, clip_low=0.1
        )
        advantages = torch.tensor(
            [2.0, 3.0] if kind == "geometric_mean" else [-2.0, 3.0], device=device
        )
        if kind == "gspo":
            slopes = (1, 1)
        loss, _ = policy_loss(
            logp,
            torch.zeros(2, device=device),
            advantages,
            torch.tensor([1.0, 0.5], device=device),
            objective=objective,
            cu_seqlens=torch.tensor([0, 2], device=device),
            impl=impl,
        )
        loss.backward()
        close(loss, -s * (advantages[0] + 0.5 * advantages[1]))
        close(
            logp.grad,
            -s
            * advantages
            * torch.tensor([1.0, 0.5], device=device)
            * torch.tensor(slopes, device=device),
        )


def definition(device, kind, objective, logp, old_logp, A, w):
    """The whole loss over unmasked tokens in float64, sequences one by one where the kind asks for
    it."""
    d = logp - old_logp
    ratio, beta = d.exp(), objective.beta or 0.0
    if kind == "clip":
        return (w * torch.maximum(-A * ratio, -A * ratio.clamp(0.8, 1.2))).sum()
    if kind == "cispo":
        return -(w * A * ratio.detach().clamp(max=objective.clip_max) * logp).sum()
    if kind == "sapo":
        tau = torch.where(
            A > 0,
            torch.tensor(objective.tau_positive, device=device).double(),
            torch.tensor(objective.tau_negative, device=device).double(),
        )
        return -(w * A * 4 / tau / (1 + torch.exp(-tau * (ratio - 1)))).sum()
    return {
        "ratio": -(w * A * ratio),
        "reinforce": -(w * A * logp),
        "dro": -(w * (A * logp - beta / 2 * d * d)),
        "kl_penalty": w * (-A * ratio + beta * (ratio - 1 - d)),
    }[kind].sum()


@pytest.mark.each_impl("policy_value_loss")
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("gspo", "geometric_mean")])
def test_token_kinds_match_the_definition(impl, kind, device):
    inputs, weights = problem(device, seed=1)
    live = weights != 0
    wide = {name: x[live].double() for name, x in inputs.items()}
    wide["logp"].requires_grad_()
    want = definition(
        device,
        kind,
        OBJECTIVES[kind],
        wide["logp"],
        wide["old_logp"],
        wide["advantages"],
        weights[live].double(),
    )
    (want_grad,) = torch.autograd.grad(want, wide["logp"])
    logp = torch.where(live, inputs["logp"], math.nan).requires_grad_()
    loss, stats = policy_loss(
        logp,
        inputs["old_logp"],
        inputs["advantages"],
        weights,
        objective=OBJECTIVES[kind],
        impl=impl,
    )
    loss.backward()
    close(loss / live.sum(), want / live.sum())
    close(logp.grad[live], want_grad)
    assert not logp.grad[~live].any()
    if kind == "cispo":
        close(
            stats.clip_fraction_high,
            ((wide["logp"] - wide["old_logp"]).exp() > 1.3).double().mean(),
        )


# With one advantage and one weight a sequence the per-token form is the sequence objective,
# differentiated through the mean.
@pytest.mark.each_impl("policy_value_loss")
@pytest.mark.parametrize("kind", ["gspo", "geometric_mean"])
@pytest.mark.parametrize("spread", [0.1, 0.8])
def test_sequence_kinds_are_the_sequence_objective(impl, kind, spread, device):
    inputs, weights = problem(device, seed=2, spread=spread)
    objective, live = OBJECTIVES[kind], weights != 0
    logp64 = inputs["logp"].double().requires_grad_()
    want, advantages, weights = 0.0, torch.zeros(60, device=device), torch.zeros(60, device=device)
    for b, A in enumerate((0.7, 1.0, -1.3, -0.4, 2.0)):
        span = torch.arange(BOUNDS[b], BOUNDS[b + 1], device=device)
        tokens = span[live[span]]
        if not len(tokens):
            continue
        advantages[tokens], weights[tokens] = A, 1 / (3 * len(tokens))
        d = logp64[tokens] - inputs["old_logp"][tokens].double()
        if kind == "gspo":
            s = d.mean().exp()
            want = want + torch.maximum(-A * s, -A * s.clamp(0.9, 1.15)) / 3
        else:
            want = want - A * (d.clamp(max=0.4) if A > 0 else d.clamp(min=-0.4)).mean().exp() / 3
    (want_grad,) = torch.autograd.grad(want, logp64)
    logp = torch.where(live, inputs["logp"], math.nan).requires_grad_()
    loss, _ = policy_loss(
        logp,
        inputs["old_logp"],
        torch.where(live, advantages, math.nan),
        weights,
        objective=objective,
        cu_seqlens=bounds(device),
        impl=impl,
    )
    loss.backward()
    close(loss, want)
    close(logp.grad, want_grad)


# ---- everything together -------------------------------------------------------------------------
SETTINGS = {
    "k3": {"kl_coef": 0.3},
    "k2 under k3": {"kl_coef": 0.3, "kl_gradient": "k2"},
    "k1": {"kl_coef": 0.3, "kl_estimator": "k1", "kl_gradient": "abs"},
    "sequence": {"kl_coef": 0.05, "kl_estimator": "k2", "kl_level": "sequence"},
    "truncated": {"rollout_correction": RolloutCorrection(cap=1.2)},
    "masked sequence and k2": {
        "kl_coef": 0.1,
        "kl_estimator": "k2",
        "entropy_coef": 0.05,
        "rollout_correction": RolloutCorrection(
            kind="masked", level="sequence", cap=3.0, floor=0.2
        ),
    },
}


@pytest.mark.each_impl("policy_value_loss")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SETTINGS)
def test_matches_float64_and_ignores_what_is_masked(impl, kind, name, device):
    inputs, weights = problem(device, seed=3)
    settings = SETTINGS[name] | {"objective": OBJECTIVES[kind]}

    def run(inputs, weights, impl):
        leaves = {n: x.clone().requires_grad_(n in ("logp", "entropy")) for n, x in inputs.items()}
        loss, stats = loss_of(leaves, weights, impl, **settings)
        loss.backward()
        return loss, stats, leaves["logp"].grad, leaves["entropy"].grad

    want = run({n: x.double() for n, x in inputs.items()}, weights.double(), "torch")
    got = run({n: torch.where(weights == 0, math.nan, x) for n, x in inputs.items()}, weights, impl)
    close(got[0] / 60, want[0] / 60)
    close(got[2], want[2])
    close(got[3], want[3] if settings.get("entropy_coef") else torch.zeros(60, device=device))
    for field in want[1]._fields:
        close(getattr(got[1], field), getattr(want[1], field), 60 if field == "loss" else 1)
    again = run({n: torch.where(weights == 0, 1e30, x) for n, x in inputs.items()}, weights, impl)
    assert all(
        torch.equal(a, b)
        for a, b in zip((got[0], *got[1], *got[2:]), (again[0], *again[1], *again[2:]), strict=True)
    )


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if kind not in ("gspo", "geometric_mean", "cispo")]
)
@pytest.mark.parametrize("name", ["k3", "truncated"])
def test_gradcheck_of_the_reference(kind, name, device):
    inputs, weights = problem(device, seed=4)
    wide = {n: x.double() for n, x in inputs.items()}
    logp, entropy = wide.pop("logp").requires_grad_(), wide.pop("entropy").requires_grad_()

    def loss(logp, entropy):
        return loss_of(
            wide | {"logp": logp, "entropy": entropy},
            weights.double(),
            objective=OBJECTIVES[kind],
            entropy_coef=0.1,
            **SETTINGS[name],
        )[0]

    assert torch.autograd.gradcheck(loss, (logp, entropy))


@pytest.mark.each_impl("policy_value_loss", but=("torch",))
def test_every_estimator_and_far_log_ratios(impl, device):
    k = torch.tensor(
        [1e4, -1e4, 20.5, -20.5, 19.5, -19.5, 1.0, -1.0, 1e-3, -1e-3, 0.0], device=device
    )
    ones, ref = torch.ones(11, device=device), torch.full((11,), -0.25, device=device)
    for estimator in KL_ESTIMATORS:
        for gradient in KL_ESTIMATORS:
            outcomes = []
            for name, dtype in ((impl, torch.float32), ("torch", torch.float64)):
                logp = (ref + k).to(dtype).requires_grad_()
                loss, stats = policy_loss(
                    logp,
                    logp.detach(),
                    0 * ones.to(dtype),
                    ones.to(dtype),
                    ref_logp=ref.to(dtype),
                    kl_coef=1.0,
                    kl_estimator=estimator,
                    kl_gradient=gradient,
                    impl=name,
                )
                loss.backward()
                outcomes.append((loss.detach() / 11, stats.ref_kl, logp.grad))
            for got, want in zip(*outcomes, strict=True):
                torch.testing.assert_close(got.double(), want, rtol=3e-6, atol=1e-6)
            if gradient == "k3":
                assert not outcomes[0][2][:4].any()


# ---- what the estimators do: algorithms.md 2.8, over every token of a small vocabulary -----------
def test_which_kl_each_estimator_follows(device):
    z = torch.tensor([0.3, -1.0, 0.8, 0.1], dtype=torch.float64, requires_grad=True, device=device)
    ref = torch.tensor([-0.5, 0.2, 0.4, 1.0], dtype=torch.float64, device=device).log_softmax(0)
    pi = z.log_softmax(0)
    (reverse,) = torch.autograd.grad((pi.exp() * (pi - ref)).sum(), z, retain_graph=True)
    (forward,) = torch.autograd.grad((ref.exp() * (ref - pi)).sum(), z, retain_graph=True)
    value = (pi.exp() * (pi - ref)).sum()

    def of(estimator, gradient=None):
        loss, _ = policy_loss_reference(
            pi,
            pi.detach(),
            torch.zeros(4, device=device),
            pi.detach().exp(),
            ref_logp_N=ref,
            kl_coef=1.0,
            kl_estimator=estimator,
            kl_gradient=gradient,
        )
        return loss, torch.autograd.grad(loss, z, retain_graph=True)[0]

    zero = torch.zeros(4, dtype=torch.float64, device=device)
    for estimator, right_value, grad in (
        ("k1", True, zero),
        ("k2", False, reverse),
        ("k3", True, forward),
    ):
        loss, got = of(estimator)
        assert bool((loss - value).abs() < 1e-12) == right_value
        torch.testing.assert_close(got, grad, rtol=1e-10, atol=1e-12)
    loss, got = of("k3", "k2")
    torch.testing.assert_close((loss, got), (value, reverse), rtol=1e-10, atol=1e-12)
    assert (reverse - forward).norm() > 0.1 * reverse.norm()


# All 8 completions of three binary tokens under a policy with its own logit for every prefix: only
# the sequence level has the gradient of the KL between completions.
def test_over_completions_only_the_sequence_level_is_exact(device):
    generator = torch.Generator().manual_seed(5)
    z, z_ref = (
        torch.randn(7, generator=generator, dtype=torch.float64).to(device) for _ in range(2)
    )
    z.requires_grad_()

    def logps(z):
        rows = []
        for word in range(8):
            bits, node, row = [(word >> i) & 1 for i in (2, 1, 0)], 0, []
            for bit in bits:
                row.append(torch.nn.functional.logsigmoid(z[node] if bit else -z[node]))
                node = 2 * node + 1 + bit
            rows.append(torch.stack(row))
        return torch.stack(rows)

    logp, ref = logps(z), logps(z_ref)
    chance = logp.sum(1).exp()
    (want,) = torch.autograd.grad((chance * (logp.sum(1) - ref.sum(1))).sum(), z, retain_graph=True)
    weights = chance.detach()[:, None].expand(8, 3).reshape(24)

    def error(estimator, level):
        loss, _ = policy_loss_reference(
            logp.reshape(24),
            logp.detach().reshape(24),
            torch.zeros(24, device=device),
            weights,
            ref_logp_N=ref.reshape(24),
            kl_coef=1.0,
            kl_estimator=estimator,
            kl_level=level,
            cu_seqlens=torch.arange(0, 25, 3, device=device),
        )
        return (
            (torch.autograd.grad(loss, z, retain_graph=True)[0] - want).norm() / want.norm()
        ).item()

    assert error("k2", "sequence") < 1e-12
    assert all(error(estimator, "token") > 0.1 for estimator in ("k1", "k2", "k3"))


# ---- the rollout correction ----------------------------------------------------------------------
@pytest.mark.each_impl("policy_value_loss")
@pytest.mark.parametrize(
    "correction,factors",
    [
        (RolloutCorrection(cap=2.0), (2.0, 0.5, 1.0, 2.0)),
        (RolloutCorrection(kind="masked", cap=2.0), (0.0, 0.5, 1.0, 2.0)),
        (RolloutCorrection(kind="masked", cap=4.0, floor=0.6), (4.0, 0.0, 1.0, 2.0)),
        (RolloutCorrection(level="sequence", cap=10.0), (2.0, 2.0, 2.0, 2.0)),
        (RolloutCorrection(level="sequence", cap=1.5), (1.5, 1.5, 1.5, 1.5)),
        (RolloutCorrection(kind="masked", level="sequence", cap=1.5), (0.0, 0.0, 0.0, 0.0)),
        # geometric means sqrt(2) and sqrt(2)
        (RolloutCorrection(kind="sequence_masked", cap=1.5), (4.0, 0.5, 1.0, 2.0)),
        (RolloutCorrection(kind="sequence_masked", cap=1.4), (0.0, 0.0, 0.0, 0.0)),
        (RolloutCorrection(kind="sequence_masked", cap=2.0, floor=1.4), (4.0, 0.5, 1.0, 2.0)),
        (RolloutCorrection(kind="sequence_masked", cap=2.0, floor=1.5), (0.0, 0.0, 0.0, 0.0)),
        (
            RolloutCorrection(kind="sequence_masked", level="sequence", cap=1.5),
            (2.0, 2.0, 2.0, 2.0),
        ),
    ],
)
def test_the_correction_scales_the_policy_term_alone(impl, correction, factors, device):
    old_logp = torch.tensor([4.0, 0.5, 1.0, 2.0], device=device).log()
    bounds, weights, factors = (
        torch.tensor([0, 2, 4], device=device),
        torch.tensor([0.5, 1.0, 1.5, 2.0], device=device),
        torch.tensor(factors, device=device),
    )
    logp, entropy = (
        old_logp.clone().requires_grad_(),
        torch.ones(4, requires_grad=True, device=device),
    )
    loss, stats = policy_loss(
        logp,
        old_logp,
        torch.ones(4, device=device),
        weights,
        ref_logp=old_logp - 1,
        kl_coef=0.5,
        kl_estimator="k2",
        entropy=entropy,
        entropy_coef=0.1,
        rollout_logp=torch.zeros(4, device=device),
        rollout_correction=correction,
        cu_seqlens=bounds,
        impl=impl,
    )
    loss.backward()
    close(loss, (weights * (-factors + 0.25 - 0.1)).sum())
    close(logp.grad, weights * (-factors + 0.5))
    close(entropy.grad, -0.1 * weights)
    close(stats.correction_mean, factors.mean())


def test_the_geometric_mean_is_of_unmasked_tokens(device):
    old_logp, weights = (
        torch.tensor([4.0, math.nan, 1.0, 3.0, math.nan], device=device).log(),
        torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0], device=device),
    )
    # means 2 with the first two unmasked, 3 with the rest; cube roots would be below
    correction = RolloutCorrection(kind="sequence_masked", cap=2.5)
    rollout_logp = torch.tensor([0.0, math.nan, 0.0, 0.0, math.inf], device=device)
    stats = policy_loss(
        old_logp,
        old_logp,
        torch.ones(5, device=device),
        weights,
        rollout_logp=rollout_logp,
        rollout_correction=correction,
        cu_seqlens=torch.tensor([0, 3, 5], device=device),
    )[1]
    close(stats.correction_mean, torch.tensor((4.0 + 1.0 + 0.0) / 3, device=device))


def test_without_a_correction_its_mean_is_one(device):
    x = torch.zeros(3, device=device)
    assert policy_loss(x, x, x, x + 1)[1].correction_mean == 1
    assert (
        policy_loss(x, x, x, x, rollout_logp=x, rollout_correction=RolloutCorrection())[
            1
        ].correction_mean
        == 1
    )


# ---- refusals, torch's own checks ----------------------------------------------------------------
@pytest.mark.cpu_only("values are read on the host, or an implementation is named, on a CPU alone")
def test_refuses_what_does_not_fit_together(device):
    x, wide = torch.zeros(3, device=device), torch.tensor([0, 3], device=device)
    for objective, message in (
        (
            {"kind": "gspo", "dual_clip": 3.0},
            "kind 'gspo' does not use dual_clip; leave it at None, got 3.0",
        ),
        ({"kind": "cispo", "clip_max": 0.0}, "expected a finite clip_max > 0"),
        ({"kind": "sapo", "tau_negative": math.inf}, "expected a finite tau_negative > 0"),
        ({"kind": "dro", "beta": -1.0}, "expected beta >= 0"),
        ({"beta": 0.1}, "kind 'clip' does not use beta"),
    ):
        with pytest.raises(ValueError, match=message):
            PolicyObjective(**objective)
    for correction, message in (
        ({"kind": "tis"}, "expected kind to be truncated, masked or sequence_masked"),
        ({"level": "word"}, "expected level"),
        ({"cap": 0.0}, "expected cap > 0"),
        ({"floor": 0.5}, "expected 0 <= floor < cap, and 0 unless masked"),
    ):
        with pytest.raises(ValueError, match=message):
            RolloutCorrection(**correction)
    for settings, message in (
        ({"kl_coef": 0.1}, "expected ref_logp with kl_coef 0.1"),
        ({"ref_logp": x, "kl_estimator": "k4"}, "expected kl_estimator"),
        ({"ref_logp": x, "kl_gradient": "full"}, "expected kl_gradient"),
        ({"ref_logp": x, "kl_level": "word"}, "kl_level"),
        (
            {"ref_logp": x, "kl_level": "sequence", "cu_seqlens": wide},
            "expected kl_estimator k2 with kl_level sequence",
        ),
        (
            {"ref_logp": x, "kl_level": "sequence", "kl_estimator": "k2"},
            "expected cu_seqlens with kl_level 'sequence'",
        ),
        ({"rollout_logp": x}, "together, got rollout_logp alone"),
        ({"rollout_correction": RolloutCorrection()}, "together, got rollout_correction alone"),
        (
            {"rollout_logp": x, "rollout_correction": RolloutCorrection(level="sequence")},
            "expected cu_seqlens with rollout_corr",
        ),
        (
            {"rollout_logp": x, "rollout_correction": RolloutCorrection(kind="sequence_masked")},
            "with rollout_correction by sequ",
        ),
        ({"objective": PolicyObjective(kind="gspo")}, "expected cu_seqlens with kind 'gspo'"),
        (
            {"cu_seqlens": torch.tensor([0, 4], device=device)},
            "expected cu_seqlens to rise from 0 to 3",
        ),
        ({"ref_logp": torch.zeros(4, device=device)}, "ref_logp does not fit its pattern"),
    ):
        with pytest.raises(ValueError, match=message):
            policy_loss(x, x, x, x, **settings)
    with pytest.raises(TypeError, match="expected cu_seqlens of dtype int32, int64"):
        policy_loss(x, x, x, x, cu_seqlens=x)


def test_defaults_of_each_kind():
    assert {
        kind: PolicyObjective(kind=kind).bounds
        for kind in ("clip", "gspo", "cispo", "geometric_mean", "ratio")
    } == {
        "clip": (0.8, 1.2, math.inf),
        "gspo": (1 - 3e-4, 1 + 4e-4, math.inf),
        "cispo": (-math.inf, 5.0, math.inf),
        "geometric_mean": (-0.4, 0.4, math.inf),
        "ratio": (-math.inf, math.inf, math.inf),
    }
    assert list(PolicyObjective(kind="sapo").coefficients.values())[3:5] == [1.0, 1.05]


@pytest.mark.each_impl("policy_value_loss", but=("torch",))
@pytest.mark.parametrize("kind", ["gspo", "sapo"])
def test_compiles_as_one_graph(impl, kind, device):
    inputs, weights = problem(device, seed=8)

    def step(logp, values):
        loss, policy, value = policy_value_loss(
            logp,
            inputs["old_logp"],
            inputs["advantages"],
            weights,
            values,
            None,
            inputs["advantages"],
            objective=OBJECTIVES[kind],
            ref_logp=inputs["ref_logp"],
            kl_estimator="k2",
            kl_level="sequence",
            kl_coef=0.1,
            rollout_logp=inputs["rollout_logp"],
            rollout_correction=RolloutCorrection(),
            cu_seqlens=bounds(device),
            impl=impl,
        )
        return loss * 2, torch.stack([*policy, *value])

    outcomes = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in (inputs["logp"], inputs["entropy"])]
        loss, stats = function(*leaves)
        outcomes.append([loss.detach(), stats, *torch.autograd.grad(loss, leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


def test_an_objective_by_its_name_alone_is_refused_in_words(device):
    x = torch.zeros(2, device=device)
    head = {
        "hidden": torch.zeros(2, 4, device=device),
        "weight": torch.zeros(5, 4, device=device),
        "token_ids": torch.zeros(2, dtype=torch.int64, device=device),
    }
    tokens = {"old_logp": x, "advantages": x, "weights": x}
    values = {"values": x, "old_values": None, "returns": x}
    for call in (
        partial(policy_loss, logp=x, **tokens),
        partial(policy_value_loss, logp=x, **tokens, **values),
        partial(linear_policy_loss, **head, **tokens),
    ):
        with pytest.raises(TypeError, match=r"PolicyObjective, got 'clip'; write .*kind='clip'"):
            call(objective="clip")
        with pytest.raises(TypeError, match="expected rollout_correction to be a RolloutCorr"):
            call(rollout_correction="truncated", rollout_logp=x)
