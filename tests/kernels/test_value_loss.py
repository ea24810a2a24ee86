import math

import pytest
import torch

from fusedrl.kernels.policy_loss import ValueStats, value_loss


def close(device, got, want, rtol=2e-6, atol=1e-6):
    torch.testing.assert_close(
        got.detach().double(),
        torch.as_tensor(want, dtype=torch.float64, device=device),
        rtol=rtol,
        atol=atol,
    )


def random_inputs(device, N, seed, offset=0.0):
    generator = torch.Generator().manual_seed(seed)
    old_values = offset + torch.randn(N, generator=generator).to(device)
    values, returns = (
        old_values + 0.4 * torch.randn(N, generator=generator).to(device),
        old_values + torch.randn(N, generator=generator).to(device),
    )
    weights = torch.where(
        torch.rand(N, generator=generator).to(device) < 0.7,
        0.5 + torch.rand(N, generator=generator).to(device),
        0,
    )
    return values, old_values, returns, weights


# (value, old value, return, loss, d loss / d value), clip 0.5: inside; outside towards the return,
# away from it, and far past it.
BY_HAND = [
    (1.25, 1.0, 3.0, 0.5 * 1.75**2, -1.75),
    (2.0, 1.0, 3.0, 0.5 * 1.5**2, 0.0),
    (2.0, 1.0, -1.0, 0.5 * 3**2, 3.0),
    (0.0, 1.0, -1.0, 0.5 * 1.5**2, 0.0),
    (0.0, 1.0, 3.0, 0.5 * 3**2, -3.0),
    (4.0, 1.0, 2.0, 0.5 * 2**2, 2.0),
    (1.5, 1.0, 3.0, 0.5 * 1.5**2, -1.5),
]


@pytest.mark.each_impl("policy_value_loss")
def test_every_branch_by_hand(impl, device):
    for value, old, target, want, slope in BY_HAND:
        values = torch.tensor([value], requires_grad=True, device=device)
        loss, stats = value_loss(
            values,
            torch.tensor([old], device=device),
            torch.tensor([target], device=device),
            torch.tensor([0.25], device=device),
            clip=0.5,
            impl=impl,
        )
        loss.backward()
        assert (loss.item(), values.grad.item()) == (0.25 * want, 0.25 * slope)
        assert stats.clip_fraction.item() == float(slope == 0)


@pytest.mark.each_impl("policy_value_loss")
@pytest.mark.parametrize("N", [0, 1, 33, 4097])
@pytest.mark.parametrize("clip", [None, 0.2])
def test_matches_the_definition_in_float64(impl, N, clip, device):
    values, old_values, returns, weights = random_inputs(device, N, seed=N)
    live = weights != 0
    n = int(live.sum())
    v, o, r, w = (t[live].double() for t in (values, old_values, returns, weights))
    v.requires_grad_()
    squares = (v - r) ** 2
    if clip is not None:
        squares = torch.maximum(squares, (o + (v - o).clamp(-clip, clip) - r) ** 2)
    want = (w * squares).sum() / 2
    (want_grad,) = torch.autograd.grad(want, v)
    inputs = [
        torch.where(live, t, math.nan).requires_grad_() for t in (values, old_values, returns)
    ]
    loss, stats = value_loss(*inputs, weights, clip=clip, impl=impl)
    loss.backward()
    close(device, loss / max(1, n), want.detach() / max(1, n))
    close(device, inputs[0].grad[live], want_grad)
    assert not inputs[0].grad[~live].any()
    assert inputs[1].grad is None
    assert inputs[2].grad is None
    v = v.detach()
    assert torch.equal(stats.loss, loss)
    close(device, stats.tokens, n)
    close(device, stats.value_mean, v.mean() if n else 0)
    close(device, stats.return_mean, r.mean() if n else 0)
    close(
        device,
        stats.explained_variance,
        1 - (r - v).var(correction=0) / r.var(correction=0) if n > 1 else 0,
    )
    clipped = (
        0
        if clip is None
        else ((o + (v - o).clamp(-clip, clip) - r).abs() > (v - r).abs() + 1e-9).double().sum()
        / max(1, n)
    )
    close(device, stats.clip_fraction, clipped)
    assert all(t.dtype == torch.float32 and t.shape == () and not t.requires_grad for t in stats)


# Returns far from 0, the first of them far from the rest, more than a block of them: E[x^2] -
# E[x]^2 has no correct digit left.
@pytest.mark.each_impl("policy_value_loss")
@pytest.mark.parametrize("offset", [1e4, 1e6])
def test_explained_variance_does_not_cancel(impl, offset, device):
    values, _, returns, weights = random_inputs(device, 9001, seed=1, offset=offset)
    returns[0], weights[0] = 0.0, 1.0
    live = weights != 0
    v, r = values[live].double(), returns[live].double()
    for first in (0, 1):
        stats = value_loss(values[first:], None, returns[first:], weights[first:], impl=impl)[1]
        close(
            device,
            stats.explained_variance,
            1 - (r - v)[first:].var(correction=0) / r[first:].var(correction=0),
            rtol=2e-5,
        )


# A constant return explains nothing, whatever the rounding of its mean; a perfect critic explains
# everything.
@pytest.mark.each_impl("policy_value_loss")
def test_explained_variance_at_its_ends(impl, device):
    values, _, returns, weights = random_inputs(device, 777, seed=2)
    for constant in (0.0, 0.1, 1e5 / 3):
        assert (
            value_loss(values, None, torch.full_like(values, constant), weights, impl=impl)[
                1
            ].explained_variance
            == 0
        )
    assert value_loss(returns, None, returns, weights, impl=impl)[1].explained_variance == 1


@pytest.mark.each_impl("policy_value_loss")
def test_a_value_inside_the_clip_keeps_its_gradient(impl, device):
    values, _, returns, weights = random_inputs(device, 500, seed=3, offset=3.0)
    # old + (value - old) is not the value in float32
    old_values = values + torch.linspace(-0.19, 0.19, 500, device=device)
    values.requires_grad_()
    loss, stats = value_loss(values, old_values, returns, weights, clip=0.2, impl=impl)
    loss.backward()
    assert stats.clip_fraction == 0
    torch.testing.assert_close(values.grad, weights * (values.detach() - returns))


@pytest.mark.each_impl("policy_value_loss")
def test_without_a_clip_the_old_values_are_not_read(impl, device):
    values, old_values, returns, weights = random_inputs(device, 50, seed=4)
    outcomes = [
        value_loss(values, old, returns, weights, impl=impl)
        for old in (None, old_values, old_values * math.nan)
    ]
    assert all(
        torch.equal(a, b)
        for loss, stats in outcomes
        for a, b in zip((loss, *stats), (outcomes[0][0], *outcomes[0][1]), strict=True)
    )


def test_refuses_what_it_does_not_support(device):
    x = torch.zeros(3, device=device)
    with pytest.raises(
        ValueError,
        match=r"expected a clip > 0 and old_values with it, or no clip, got clip 0.2 and no "
        r"old_values",
    ):
        value_loss(x, None, x, x, clip=0.2)
    with pytest.raises(ValueError, match="expected a clip > 0"):
        value_loss(x, x, x, x, clip=-0.1)
    with pytest.raises(ValueError, match=r"returns does not fit its pattern \[N\]"):
        value_loss(x, x, torch.zeros(1, 3, device=device), x)
    with pytest.raises(TypeError, match="expected weights of dtype float32"):
        value_loss(x, x, x, x > 0)


def test_statistics_are_named_as_documented():
    assert all(
        field in ValueStats.__doc__ or field in ("value_mean", "return_mean", "tokens")
        for field in ValueStats._fields
    )
