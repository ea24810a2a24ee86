import math

import pytest
import torch

from fusedrl.kernels.policy_loss import (
    PolicyObjective,
    PolicyStats,
    policy_loss,
    policy_value_loss,
    token_weights,
    value_loss,
)
from fusedrl.kernels.runtime import native

DUAL = PolicyObjective(clip_low=0.2, clip_high=0.28, dual_clip=3.0)
OBJECTIVES = {
    "clip": PolicyObjective(),
    "dual": DUAL,
    "ratio": PolicyObjective(kind="ratio"),
    "reinforce": PolicyObjective(kind="reinforce"),
}


def close(got, want, scale=1.0):
    torch.testing.assert_close(
        got.detach().double(), want.detach().double(), rtol=2e-6, atol=1e-6 * scale
    )


def definition(
    device, logp, old_logp, advantages, weights, objective, entropy=None, entropy_coef=0.0
):
    """The textbook's minimum and maximum over the unmasked tokens alone, in float64; loss and its
    gradients by autograd."""
    live = weights != 0
    logp, old_logp, A, w = (t[live].double() for t in (logp, old_logp, advantages, weights))
    logp.requires_grad_()
    d = logp - old_logp
    ratio = d.clamp(-20, 20).exp()
    if objective.kind == "reinforce":
        term = -A * logp
    else:
        term = -A * ratio
        if objective.kind == "clip":
            term = torch.maximum(
                term, -A * ratio.clamp(1 - objective.clip_low, 1 + objective.clip_high)
            )
            if objective.dual_clip is not None:
                term = torch.where(A < 0, torch.minimum(term, -A * objective.dual_clip), term)
    if entropy is not None:
        term = term - entropy_coef * entropy[live].double()
    loss = (w * term).sum()
    grad = torch.zeros(len(live), dtype=torch.float64, device=device)
    grad[live] = torch.autograd.grad(loss, logp)[0]
    return loss.detach(), grad, d.detach(), ratio.detach(), A, (w * term).abs().sum().item()


def random_inputs(device, N, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    old_logp = -torch.rand(N, generator=generator).to(device) * 5
    logp = old_logp + 0.5 * torch.randn(N, generator=generator).to(device)
    advantages = scale * torch.randn(N, generator=generator).to(device)
    weights = torch.where(
        torch.rand(N, generator=generator).to(device) < 0.7,
        0.5 + torch.rand(N, generator=generator).to(device),
        0,
    )
    return logp, old_logp, advantages, weights, torch.rand(N, generator=generator).to(device) * 4


# ---- the values ----------------------------------------------------------------------------------
# (advantage, ratio, term, d term / d logp), bounds 0.8 and 1.28, dual clip 3: below, inside, above,
# beyond, for each sign.
BY_HAND = [
    (2.0, 0.5, -1.0, -1.0),
    (2.0, 1.0, -2.0, -2.0),
    (2.0, 1.25, -2.5, -2.5),
    (2.0, 1.5, -2.56, 0.0),
    (2.0, 4.0, -2.56, 0.0),
    (-2.0, 0.5, 1.6, 0.0),
    (-2.0, 0.9, 1.8, 1.8),
    (-2.0, 1.5, 3.0, 3.0),
    (-2.0, 2.9, 5.8, 5.8),
    (-2.0, 4.0, 6.0, 0.0),
    (0.0, 4.0, 0.0, 0.0),
    (0.0, 0.1, 0.0, 0.0),
]


@pytest.mark.each_impl("policy_value_loss")
def test_every_branch_by_hand(impl, device):
    for A, ratio, term, slope in BY_HAND:
        logp = torch.tensor([math.log(ratio)], requires_grad=True, device=device)
        loss, stats = policy_loss(
            logp,
            torch.zeros(1, device=device),
            torch.tensor([A], device=device),
            torch.tensor([0.25], device=device),
            objective=DUAL,
            impl=impl,
        )
        loss.backward()
        close(loss, torch.tensor(0.25 * term, device=device))
        close(logp.grad, torch.tensor([0.25 * slope], device=device))
        fractions = [
            float(A < 0 and ratio < 0.8),
            float(A > 0 and ratio > 1.28),
            float(A < 0 and ratio > 3),
        ]
        assert [
            stats.clip_fraction_low.item(),
            stats.clip_fraction_high.item(),
            stats.clip_fraction_dual.item(),
        ] == fractions


def test_the_branches_tell_wrong_variants_apart():
    def clip(r):
        return min(max(r, 0.8), 1.28)

    def right(A, r):
        return min(max(-A * r, -A * clip(r)), -A * 3) if A < 0 else max(-A * r, -A * clip(r))

    wrong = [
        lambda A, r: max(-A * r, -A * clip(r)),  # dual clip ignored
        lambda A, r: min(right(A, r), -A * 3),  # dual clip for both signs
        lambda A, r: min(-A * r, -A * clip(r)),  # the optimistic side
        lambda A, r: -A * clip(r),
        lambda A, r: -A * r,
    ]
    for A, ratio, term, _ in BY_HAND:
        assert right(A, ratio) == pytest.approx(term)
    for variant in wrong:
        assert any(variant(A, ratio) != pytest.approx(term) for A, ratio, term, _ in BY_HAND)


# 0 and 1 tokens; around a vector; one more than two tiles and a block. A third of the tokens is
# masked, and NaN there.
@pytest.mark.each_impl("policy_value_loss")
@pytest.mark.parametrize("N", [0, 1, 33, 4097])
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("with_entropy", [False, True])
def test_matches_the_definition_in_float64(impl, N, name, with_entropy, device):
    objective, (logp, old_logp, advantages, weights, entropy) = (
        OBJECTIVES[name],
        random_inputs(device, N, seed=N),
    )
    coef = 0.02 if with_entropy else 0.0
    want, want_grad, d, ratio, A, _ = definition(
        device,
        logp,
        old_logp,
        advantages,
        weights,
        objective,
        entropy if with_entropy else None,
        coef,
    )
    masked = weights == 0
    inputs = [
        torch.where(masked, math.nan, t).requires_grad_()
        for t in (logp, old_logp, advantages, entropy)
    ]
    loss, stats = policy_loss(
        *inputs[:3],
        weights,
        objective=objective,
        entropy=inputs[3] if with_entropy else None,
        entropy_coef=coef,
        impl=impl,
    )
    loss.backward()
    n = len(ratio)
    close(loss / max(1, n), want / max(1, n))  # a mean: the terms of the sum cancel
    close(inputs[0].grad, want_grad)
    assert inputs[1].grad is None
    assert inputs[2].grad is None
    assert not inputs[0].grad[masked].any()
    if with_entropy:
        close(inputs[3].grad, -coef * weights)
        close(stats.entropy, entropy[~masked].double().sum() / max(1, n))
    clips, bounded = objective.bounds, objective.kind == "clip"
    assert torch.equal(stats.loss, loss)
    expected = {
        "tokens": n,
        "approx_kl_k1": -d.sum() / max(1, n),
        "approx_kl_k2": (d**2).sum() / 2 / max(1, n),
        "approx_kl_k3": (d.expm1() - d).sum() / max(1, n),
        "ratio_mean": ratio.mean() if n else 1,
        "ratio_min": ratio.min() if n else 1,
        "ratio_max": ratio.max() if n else 1,
        "effective_sample_size": ratio.sum() ** 2 / (ratio**2).sum() if n else 0,
        "clamped_fraction": 0,
        "clip_fraction_low": bounded * ((A < 0) & (ratio < clips[0])).sum() / max(1, n),
        "clip_fraction_high": bounded * ((A > 0) & (ratio > clips[1])).sum() / max(1, n),
        "clip_fraction_dual": bounded * ((A < 0) & (ratio > clips[2])).sum() / max(1, n),
    }
    for field, value in expected.items():
        close(getattr(stats, field), torch.as_tensor(value, device=device))
    for tensor in (loss, *stats):
        assert tensor.dtype == torch.float32
        assert tensor.shape == ()
    assert not any(tensor.requires_grad for tensor in stats)


# Advantages of 0 and of 1e6, log ratios of 1e4: finite, cut where the exponential is, and counted.
@pytest.mark.each_impl("policy_value_loss")
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e6])
def test_extreme_inputs(impl, name, scale, device):
    d = torch.tensor(
        [1e4, -1e4, 20.5, -20.5, 19.5, -19.5, 0.1, 1e-4, 0.0], device=device
    ).repeat_interleave(2)
    advantages, weights = (
        scale * torch.tensor([1.0, -1.0], device=device).repeat(9),
        torch.linspace(0.5, 1.5, 18, device=device),
    )
    old_logp = torch.full((18,), -0.25, device=device)
    logp = old_logp + d
    want, want_grad, exact, _, _, size = definition(
        device, logp, old_logp, advantages, weights, OBJECTIVES[name]
    )
    logp.requires_grad_()
    loss, stats = policy_loss(
        logp, old_logp, advantages, weights, objective=OBJECTIVES[name], impl=impl
    )
    loss.backward()
    close(loss / 18, want / 18, max(1, size / 18))
    close(logp.grad, want_grad, max(1, scale))
    close(stats.clamped_fraction, torch.tensor(8 / 18, device=device))
    close(stats.approx_kl_k1, -exact.mean())
    close(stats.approx_kl_k2, (exact**2).mean() / 2)
    assert all(torch.isfinite(tensor) for tensor in (loss, *stats))
    if name != "reinforce":
        assert not logp.grad[:8].any()


# k3 is d^2 / 2 where d is small, which 1 + d - 1 - d cannot show in float32.
@pytest.mark.each_impl("policy_value_loss", but=("torch",))
@pytest.mark.parametrize("size", [1e-4, 1e-2, 0.34, 0.35, 1.0])
def test_k3_has_no_cancellation(impl, size, device):
    d = size * torch.linspace(-1, 1, 40, device=device)
    stats = policy_loss(
        d,
        torch.zeros(40, device=device),
        torch.ones(40, device=device),
        torch.ones(40, device=device),
        impl=impl,
    )[1]
    torch.testing.assert_close(
        stats.approx_kl_k3.double(), (d.double().expm1() - d.double()).mean(), rtol=3e-6, atol=0
    )


# ---- what must be exact --------------------------------------------------------------------------
@pytest.mark.each_impl("policy_value_loss")
@pytest.mark.parametrize("N", [1, 33, 4097])
def test_before_the_first_step_the_ratio_is_exactly_one(impl, N, device):
    logp, _, advantages, weights, _ = random_inputs(device, N, seed=3)
    weights[0] = 1.0
    logp.requires_grad_()
    loss, stats = policy_loss(logp, logp.detach(), advantages, weights, objective=DUAL, impl=impl)
    loss.backward()
    exact = {
        "ratio_mean": 1,
        "ratio_min": 1,
        "ratio_max": 1,
        "approx_kl_k1": 0,
        "approx_kl_k2": 0,
        "approx_kl_k3": 0,
        "clip_fraction_low": 0,
        "clip_fraction_high": 0,
        "clip_fraction_dual": 0,
        "clamped_fraction": 0,
        "effective_sample_size": (weights != 0).sum().item(),
    }
    assert {field: getattr(stats, field).item() for field in exact} == exact
    assert torch.equal(logp.grad, -weights * advantages)


@pytest.mark.each_impl("policy_value_loss")
@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("keep", ["some", "none"])
def test_what_is_masked_changes_nothing(impl, poison, keep, device):
    logp, old_logp, advantages, weights, entropy = random_inputs(device, 2100, seed=7)
    values, old_values, returns = logp + 1, old_logp + 1, advantages + 2
    if keep == "none":
        weights = torch.zeros_like(weights)

    def run(*inputs):
        logp, old_logp, advantages, entropy, values, old_values, returns = (
            t.clone() for t in inputs
        )
        leaves = [t.requires_grad_() for t in (logp, entropy, values)]
        loss, policy, value = policy_value_loss(
            logp,
            old_logp,
            advantages,
            weights,
            values,
            old_values,
            returns,
            objective=DUAL,
            value_clip=0.2,
            entropy=entropy,
            entropy_coef=0.1,
            impl=impl,
        )
        loss.backward()
        return [loss.detach(), *policy, *value, *(leaf.grad for leaf in leaves)]

    inputs = (logp, old_logp, advantages, entropy, values, old_values, returns)
    clean, dirty = run(*inputs), run(*(torch.where(weights == 0, poison, t) for t in inputs))
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    assert all(torch.isfinite(t).all() for t in dirty)
    if keep == "none":
        assert all(not t.any() for t in (dirty[0], *dirty[-3:]))


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
@pytest.mark.each_impl("policy_value_loss")
def test_nan_that_is_not_masked_is_not_hidden(impl, device):
    logp, old_logp, advantages, weights, _ = random_inputs(device, 50, seed=1)
    weights[20], logp[20] = 1.0, math.nan
    logp.requires_grad_()
    loss, stats = policy_loss(logp, old_logp, advantages, weights, impl=impl)
    loss.backward()
    assert all(
        torch.isnan(t)
        for t in (
            loss,
            stats.loss,
            stats.ratio_mean,
            stats.ratio_min,
            stats.ratio_max,
            stats.approx_kl_k3,
            logp.grad[20],
        )
    )
    assert torch.isnan(logp.grad).sum() == 1


@pytest.mark.each_impl("policy_value_loss", but=("torch",))
def test_same_bits_every_run_and_for_any_number_of_threads(impl, device):
    logp, old_logp, advantages, weights, entropy = random_inputs(
        device, 100_003 if impl == "cpp" else 5000, seed=11
    )

    def run():
        out = policy_value_loss(
            logp,
            old_logp,
            advantages,
            weights,
            entropy,
            old_logp,
            advantages,
            value_clip=0.2,
            entropy=entropy,
            impl=impl,
        )
        return torch.stack([out[0], *out[1], *out[2]])

    first = run()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(run(), first)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(run(), first)


# More blocks than one chunk of the kernel that adds them up holds: 524,288 tokens, or two blocks of
# a smaller chunk.
@pytest.mark.usefixtures("triton_runs")
def test_blocks_are_added_up_chunk_by_chunk(monkeypatch, device):
    logp, old_logp, advantages, weights, entropy = random_inputs(device, 9000, seed=12)
    outcomes = []
    for chunk in (256, 2):
        monkeypatch.setattr("fusedrl.kernels.policy_loss._triton._CHUNK", chunk)
        loss, policy, value = policy_value_loss(
            logp,
            old_logp,
            advantages,
            weights,
            entropy,
            old_logp,
            advantages + 100,
            entropy=entropy,
            impl="triton",
        )
        outcomes.append(torch.stack([loss, *policy, *value]))
    torch.testing.assert_close(*outcomes, rtol=1e-6, atol=1e-6)


@pytest.mark.cpu_only("the C++ kernels")
@pytest.mark.skipif(not native.capability, reason=native.reason)
def test_strided_inputs_and_untouched_inputs(device):
    wide = torch.stack(random_inputs(device, 300, seed=5), dim=1)
    before = wide.clone()
    columns, copies = wide.unbind(1), [c.contiguous() for c in wide.unbind(1)]
    assert torch.equal(
        policy_loss(*columns[:4], impl="cpp")[0], policy_loss(*copies[:4], impl="cpp")[0]
    )
    assert torch.equal(wide, before)


# ---- gradients -----------------------------------------------------------------------------------
@pytest.mark.each_impl("policy_value_loss")
def test_any_upstream_gradient(impl, device):
    logp, old_logp, advantages, weights, entropy = random_inputs(device, 40, seed=2)
    logp.requires_grad_()
    entropy.requires_grad_()
    loss, _ = policy_loss(
        logp, old_logp, advantages, weights, entropy=entropy, entropy_coef=0.5, impl=impl
    )
    unit = torch.autograd.grad(loss, (logp, entropy), retain_graph=True)
    for got, want in zip(
        torch.autograd.grad((loss * 3) ** 2 / 2, (logp, entropy), retain_graph=True),
        unit,
        strict=True,
    ):
        close(got, 9 * loss * want)
    assert all(
        torch.equal(a, b)
        for a, b in zip(torch.autograd.grad(loss, (logp, entropy)), unit, strict=True)
    )  # nothing was overwritten
    detached, _ = policy_loss(logp.detach(), old_logp, advantages, weights, impl=impl)
    assert not detached.requires_grad


@pytest.mark.each_impl("policy_value_loss", but=("torch",))
def test_double_backward_is_refused(impl, device):
    logp, old_logp, advantages, weights, entropy = random_inputs(device, 40, seed=2)
    leaves = [t.requires_grad_() for t in (logp, entropy, entropy.detach().clone())]
    loss = policy_value_loss(
        logp, old_logp, advantages, weights, leaves[2], None, advantages, entropy=entropy, impl=impl
    )[0]
    for leaf in leaves:
        with pytest.raises(RuntimeError, match="double backward"):
            torch.autograd.grad(
                (leaf * torch.autograd.grad(loss, leaf, create_graph=True)[0]).sum(), leaf
            )


@pytest.mark.each_impl("policy_value_loss", but=("torch",))
def test_both_losses_at_once_are_the_two_apart(impl, device):
    logp, old_logp, advantages, weights, entropy = random_inputs(device, 500, seed=9)
    values = entropy.clone()
    logp.requires_grad_()
    values.requires_grad_()
    loss, policy, value = policy_value_loss(
        logp,
        old_logp,
        advantages,
        weights,
        values,
        old_logp,
        advantages,
        objective=DUAL,
        value_clip=0.5,
        value_coef=0.25,
        impl=impl,
    )
    both = torch.autograd.grad(loss, (logp, values))
    policy_alone, policy_stats = policy_loss(
        logp, old_logp, advantages, weights, objective=DUAL, impl=impl
    )
    value_alone, value_stats = value_loss(
        values, old_logp, advantages, weights, clip=0.5, impl=impl
    )
    close(loss, policy_alone + 0.25 * value_alone)
    assert (policy, value) == (policy_stats, value_stats)
    assert torch.equal(both[0], torch.autograd.grad(policy_alone, logp)[0])
    assert torch.equal(both[1], 0.25 * torch.autograd.grad(value_alone, values)[0])


# Any split into micro-batches, with the weights of the whole: the gradients are the same ones, and
# the losses add up.
@pytest.mark.each_impl("policy_value_loss")
def test_micro_batches_change_nothing(impl, device):
    logp, old_logp, advantages, _, _ = random_inputs(device, 120, seed=4)
    weights = token_weights(torch.rand(120, device=device) < 0.6, "token_mean")
    logp.requires_grad_()
    whole, _ = policy_loss(logp, old_logp, advantages, weights, impl=impl)
    (want,) = torch.autograd.grad(whole, logp)
    cuts = (slice(0, 7), slice(7, 50), slice(50, 120))
    parts = [
        policy_loss(*(t[cut] for t in (logp, old_logp, advantages, weights)), impl=impl)[0]
        for cut in cuts
    ]
    close(sum(parts), whole)
    assert torch.equal(torch.autograd.grad(sum(parts), logp)[0], want)


# ---- reinforce without an old policy, refusals, torch's own checks -------------------------------
@pytest.mark.each_impl("policy_value_loss")
def test_reinforce_needs_no_old_policy(impl, device):
    logp, old_logp, advantages, weights, _ = random_inputs(device, 33, seed=6)
    reinforce = OBJECTIVES["reinforce"]
    alone, stats = policy_loss(logp, None, advantages, weights, objective=reinforce, impl=impl)
    assert torch.equal(
        alone, policy_loss(logp, old_logp, advantages, weights, objective=reinforce, impl=impl)[0]
    )
    assert (stats.ratio_min, stats.ratio_max, stats.approx_kl_k3) == (1, 1, 0)


@pytest.mark.cpu_only("values are read on the host, or an implementation is named, on a CPU alone")
def test_refuses_what_it_does_not_support(device):
    x = torch.zeros(3, device=device)
    with pytest.raises(
        ValueError, match=r"expected kind to be one of clip, ratio, reinforce, .*, got 'ppo'"
    ):
        PolicyObjective(kind="ppo")
    with pytest.raises(
        ValueError, match=r"kind 'ratio' does not use clip_high; leave it at None, got 0.3"
    ):
        PolicyObjective(kind="ratio", clip_high=0.3)
    with pytest.raises(ValueError, match="expected dual_clip > 1"):
        PolicyObjective(dual_clip=0.5)
    with pytest.raises(ValueError, match="expected 0 <= clip_low <= 1"):
        PolicyObjective(clip_low=1.5)
    with pytest.raises(ValueError, match="expected clip_high >= 0"):
        PolicyObjective(clip_high=math.nan)
    with pytest.raises(
        ValueError, match=r"advantages does not fit its pattern \[N\] with .*'N': 3"
    ):
        policy_loss(x, x, torch.zeros(4, device=device), x)
    with pytest.raises(TypeError, match="expected logp of dtype float32"):
        policy_loss(x.bfloat16(), x, x, x)
    with pytest.raises(TypeError, match="expected a tensor for advantages, got None"):
        policy_loss(x, x, None, x)
    with pytest.raises(ValueError, match="expected old_logp for kind 'clip', got None"):
        policy_loss(x, None, x, x)
    with pytest.raises(ValueError, match=r"expected entropy with entropy_coef 0.1, got None"):
        policy_loss(x, x, x, x, entropy_coef=0.1)
    with pytest.raises(RuntimeError, match="implementation 'cuda' cannot run"):
        policy_loss(x, x, x, x, impl="cuda")


def op_arguments(device, parts):
    x = [torch.rand(9, device=device) for _ in range(8)]
    policy = (
        [t.requires_grad_(i == 0) for i, t in enumerate(x[:3])] if "policy" in parts else [None] * 3
    )
    entropy = x[4].requires_grad_() if "policy" in parts else None
    value = [x[5].requires_grad_(), x[6], x[7]] if "value" in parts else [None] * 3
    extras = [torch.rand(9, device=device) for _ in range(4)] if "policy" in parts else [None] * 4
    return (
        *policy,
        x[3],
        entropy,
        *value,
        *extras,
        "clip",
        "k3",
        "k2",
        [0.8, 1.2, math.inf, 1.0, 1.0, 0.0, 0.3, 0.1, 0.2, 0.5],
    )


@pytest.mark.parametrize("parts", ["policy", "value", "policy and value"])
@pytest.mark.each_impl("policy_value_loss", only=("cpp", "triton"))
def test_opcheck(impl, parts, device):
    arguments = op_arguments(device, parts)
    if impl == "triton":
        torch.library.opcheck(torch.ops.fusedrl.policy_value_loss_triton.default, arguments)
        return
    torch.library.opcheck(torch.ops.fusedrl.policy_value_loss.default, arguments)
    constants = tuple(t.detach() if isinstance(t, torch.Tensor) else t for t in arguments)
    torch.library.opcheck(torch.ops.fusedrl.policy_value_loss_forward.default, constants)


@pytest.mark.each_impl("policy_value_loss", but=("torch",))
def test_compiles_as_one_graph(impl, device):
    logp, old_logp, advantages, weights, entropy = random_inputs(device, 40, seed=8)

    def step(logp, values):
        loss, policy, value = policy_value_loss(
            logp, old_logp, advantages, weights, values, None, advantages, objective=DUAL, impl=impl
        )
        return loss * 2, torch.stack([*policy, *value])

    outcomes = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in (logp, entropy)]
        loss, stats = function(*leaves)
        outcomes.append([loss.detach(), stats, *torch.autograd.grad(loss, leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


def test_statistics_are_named_as_documented():
    assert all(field in PolicyStats.__doc__ for field in PolicyStats._fields)
