"""Monte Carlo, TD, k-step and GAE on a chain whose every path is enumerated: bias and variance with
a critic that is wrong, in float64.

A walk starts at position 0; each step goes up with probability 0.6, else down, and pays
sin(position) + noise of +-1; it ends after T steps. The critic is the true value plus 1 and a tenth
of a normal number, another in every state. An estimate of Q(s_0, a_0) is the advantage plus V(s_0),
which the kernels call the return; its bias is against the true Q, its variance over what follows.
"""

import math
from functools import cache
from itertools import pairwise, product

import pytest
import torch

from fusedrl.kernels.gae import gae, k_step_advantages, td_advantages

T, UP, GAMMA = 6, 0.6, 0.9
SEED_OF_ERRORS = 3


@cache
def true_value(position: int, left: int) -> float:
    return (
        0.0
        if left == 0
        else sum(
            chance * (math.sin(position + step) + GAMMA * true_value(position + step, left - 1))
            for chance, step in ((UP, 1), (1 - UP, -1))
        )
    )


@cache
def chain(device):
    """(chances [P], rewards [P, T], values [P, T], Q of the first step [P]) of all paths: steps,
    and the sign of the noise of each step's reward."""
    errors = torch.randn(
        4 * T, T, generator=torch.Generator().manual_seed(SEED_OF_ERRORS), dtype=torch.float64
    ).to(device)
    chances, rewards, values, truth = [], [], [], []
    for steps in product((1, -1), repeat=T):
        for noise in product((1.0, -1.0), repeat=T):
            position, chance, r, v = 0, 1.0, [], []
            for t, step in enumerate(steps):
                v.append(true_value(position, T - t) + 1 + 0.1 * float(errors[position, t]))
                position += step
                chance *= (UP if step == 1 else 1 - UP) * 0.5
                r.append(math.sin(position) + noise[t])
            chances.append(chance), rewards.append(r), values.append(v)
            truth.append(math.sin(steps[0]) + GAMMA * true_value(steps[0], T - 1))
    return tuple(
        torch.tensor(x, dtype=torch.float64, device=device)
        for x in (chances, rewards, values, truth)
    )


def judge(device, estimate) -> tuple[float, float]:
    """(root mean square of the bias over first actions, mean variance), of an estimate of Q [P]."""
    chances, _, _, truth = chain(device)
    bias, variance = 0.0, 0.0
    for q in truth.unique():
        here = truth == q
        p = chances[here] / chances[here].sum()
        mean = (p * estimate[here]).sum()
        bias += float(chances[here].sum() * (mean - q) ** 2)
        variance += float(chances[here].sum() * (p * (estimate[here] - mean) ** 2).sum())
    return math.sqrt(bias), variance


def k_steps(device, k):
    _, rewards, values, _ = chain(device)
    return k_step_advantages(rewards, values, k, gamma=GAMMA, impl="torch")[1][:, 0]


def with_lambda(device, lam):
    _, rewards, values, _ = chain(device)
    return gae(rewards, values, gamma=GAMMA, lam=lam, impl="torch")[1][:, 0]


def test_the_chain_is_what_it_says(device):
    chances, rewards, _, _ = chain(device)
    assert chances.sum() == pytest.approx(1.0)
    discounted = (rewards * GAMMA ** torch.arange(T, device=device).double()).sum(1)
    assert (chances * discounted).sum() == pytest.approx(true_value(0, T))


@pytest.mark.parametrize(
    "family, ladder",
    [(k_steps, range(1, T + 1)), (with_lambda, (0.0, 0.25, 0.5, 0.75, 0.9, 0.95, 1.0))],
    ids=["k-step", "gae"],
)
def test_bias_falls_and_variance_rises(family, ladder, device):
    biases, variances = zip(*(judge(device, family(device, x)) for x in ladder), strict=True)
    assert all(a > b for a, b in pairwise(biases)), biases
    assert all(a < b for a, b in pairwise(variances)), variances
    assert biases[-1] < 1e-12, "the whole return owes nothing to the critic"
    assert biases[0] > 0.5
    assert variances[-1] > 2 * variances[0]


def test_the_ends_of_both_ladders_are_td_and_monte_carlo(device):
    _, rewards, values, _ = chain(device)
    td = td_advantages(rewards, values, gamma=GAMMA, impl="torch")[1][:, 0]
    to_go = (rewards * GAMMA ** torch.arange(T, device=device).double()).sum(1)
    for family, first, last in ((k_steps, 1, T), (with_lambda, 0.0, 1.0)):
        torch.testing.assert_close(family(device, first), td, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(family(device, last), to_go, rtol=1e-12, atol=1e-12)


def test_with_the_true_values_nothing_is_biased_and_td_varies_least(device):
    _, rewards, values, _ = chain(device)
    positions = torch.tensor(
        [
            [0, *torch.tensor(steps).cumsum(0).tolist()][:T]
            for steps in product((1, -1), repeat=T)
            for _ in range(2**T)
        ],
        device=device,
    )
    true = torch.tensor(
        [[true_value(int(s), T - t) for t, s in enumerate(row)] for row in positions.tolist()],
        dtype=torch.float64,
        device=device,
    )
    assert not torch.allclose(true, values)
    found = [
        judge(device, gae(rewards, true, gamma=GAMMA, lam=lam, impl="torch")[1][:, 0])
        for lam in (0.0, 0.5, 1.0)
    ]
    assert all(bias < 1e-12 for bias, _ in found)
    assert found[0][1] < found[1][1] < found[2][1]


# ---- what GAE is ---------------------------------------------------------------------------------
def paths(device, n=5, steps=9, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(n, steps, generator=rng, dtype=torch.float64).to(device), torch.randn(
        n, steps, generator=rng, dtype=torch.float64
    ).to(device)


@pytest.mark.parametrize("lam", [0.0, 0.3, 0.95, 1.0])
def test_gae_is_its_sums(lam, device):
    """sum (gamma lam)^l delta, and (1 - lam) sum_{k < n} lam^(k-1) A^k + lam^(n-1) A^n with n steps
    left."""
    rewards, values = paths(device)
    n, (found, _) = rewards.shape[1], gae(rewards, values, gamma=GAMMA, lam=lam, impl="torch")
    delta = td_advantages(rewards, values, gamma=GAMMA, impl="torch")[0]
    A, wrong = (
        {
            k: k_step_advantages(rewards, values, k, gamma=GAMMA, impl="torch")[0]
            for k in range(1, n + 1)
        },
        [],
    )
    for t in range(n):
        left = n - t
        torch.testing.assert_close(
            found[:, t],
            sum((GAMMA * lam) ** i * delta[:, t + i] for i in range(left)),
            rtol=1e-12,
            atol=1e-12,
        )
        mixture = (
            sum((1 - lam) * lam ** (k - 1) * A[k][:, t] for k in range(1, left))
            + lam ** (left - 1) * A[left][:, t]
        )
        torch.testing.assert_close(found[:, t], mixture, rtol=1e-12, atol=1e-12)
        # the sum as if the episode went on
        short = sum((1 - lam) * lam ** (k - 1) * A[k][:, t] for k in range(1, left + 1))
        wrong.append((short - found[:, t]).abs().max().item())
    assert max(wrong) > 0.1 or lam == 0.0


def test_an_exponential_moving_average_is_not_gae(device):
    """Erratum E4: EMA_k = (1 - lam) EMA_{k-1} + lam A^k, the convention of S3, weighs the *longest*
    advantage most; GAE puts (1 - lam) lam^(k-1) on A^k."""
    lam, n = 0.8, 9
    rewards, values = paths(device)
    A = torch.stack(
        [
            k_step_advantages(rewards, values, k, gamma=GAMMA, impl="torch")[0][:, 0]
            for k in range(1, n + 1)
        ]
    )
    found = gae(rewards, values, gamma=GAMMA, lam=lam, impl="torch")[0][:, 0]
    average = A[0]
    for advantage in A[1:]:
        average = (1 - lam) * average + lam * advantage
    assert (average - found).abs().max() > 0.05
    weights = torch.tensor(
        [(1 - lam) * lam ** (k - 1) for k in range(1, n)] + [lam ** (n - 1)],
        dtype=torch.float64,
        device=device,
    )
    assert weights.sum() == pytest.approx(1.0)
    torch.testing.assert_close(weights @ A, found, rtol=1e-12, atol=1e-12)
