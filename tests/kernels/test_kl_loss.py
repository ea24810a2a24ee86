import itertools
import math

import pytest
import torch

from fusedrl.kernels.full_kl import full_kl
from fusedrl.kernels.kl import ESTIMATORS, kl_loss, token_kl

VALUE = {
    "k1": lambda d: d,
    "k2": lambda d: d * d / 2,
    "k3": lambda d: max(0.0, math.expm1(max(-20, min(20, -d))) + d),
    "abs": abs,
}
SLOPE = {
    "k1": lambda d: 1.0,
    "k2": lambda d: d,
    "k3": lambda d: 0.0 if abs(d) > 20 else -math.expm1(-d),
    "abs": lambda d: math.copysign(1.0, d),
}


def run(logp, ref_logp, weights, impl, **options):
    logp = logp.clone().requires_grad_()
    loss = kl_loss(logp, ref_logp, weights, impl=impl, **options)
    (2.0 * loss).backward()
    return loss.detach(), logp.grad / 2.0


def make(device, N, scale, seed=0):
    generator = torch.Generator().manual_seed(seed + N)
    logp = -torch.rand(N, generator=generator).to(device) * 5
    weights = torch.where(
        torch.rand(N, generator=generator).to(device) < 0.7,
        torch.rand(N, generator=generator).to(device) - 0.2,
        0,
    )
    return logp, logp + torch.randn(N, generator=generator).to(device) * scale, weights


# None, one, around a vector and a block; log ratios within and beyond the clamp; every pair of
# value and gradient; NaN where the weight is 0.
@pytest.mark.each_impl("kl_loss")
@pytest.mark.parametrize(("N", "scale"), [(0, 1.0), (1, 1.0), (17, 1e-3), (33, 30.0), (5000, 1.0)])
def test_token_level_is_the_definition(impl, N, scale, device):
    logp, ref_logp, weights = make(device, N, scale)
    for estimator, gradient in itertools.product(ESTIMATORS, ESTIMATORS):
        hidden = [torch.where(weights != 0, x, float("nan")) for x in (logp, ref_logp)]
        loss, slope = run(*hidden, weights, impl, estimator=estimator, gradient=gradient)
        ratios = (logp.double() - ref_logp.double()).tolist()
        terms = [
            w * VALUE[estimator](d) if w else 0.0
            for w, d in zip(weights.tolist(), ratios, strict=True)
        ]
        want = torch.tensor(
            [
                w * SLOPE[gradient](d) if w else 0.0
                for w, d in zip(weights.tolist(), ratios, strict=True)
            ],
            device=device,
        )
        assert loss.item() == pytest.approx(
            math.fsum(terms), rel=1e-6, abs=1e-6 * max(1.0, sum(map(abs, terms)))
        )
        torch.testing.assert_close(slope, want, atol=1e-6, rtol=1e-5)


@pytest.mark.each_impl("kl_loss")
def test_sequence_level_is_the_definition(impl, device):
    lengths = [0, 3, 1, 40, 0, 7]
    logp, ref_logp, weights = make(device, sum(lengths), 0.5)
    weights[3] = 0.0  # a sequence that does not count
    cu = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    for estimator, gradient in itertools.product(ESTIMATORS, ESTIMATORS):
        hidden = [torch.where(weights != 0, x, float("nan")) for x in (logp, ref_logp)]
        loss, slope = run(
            *hidden,
            weights,
            impl,
            estimator=estimator,
            gradient=gradient,
            level="sequence",
            cu_seqlens=cu,
        )
        total, want = 0.0, torch.zeros(sum(lengths), device=device)
        for first, end in itertools.pairwise(cu.tolist()):
            live = [t for t in range(first, end) if weights[t]]
            if live:
                ratio = math.fsum(logp[t].item() - ref_logp[t].item() for t in live)
                weight = math.fsum(weights[t].item() for t in live) / len(live)
                total += weight * VALUE[estimator](ratio)
                want[live] = weight * SLOPE[gradient](ratio)
        assert loss.item() == pytest.approx(total, rel=2e-6, abs=1e-6)
        torch.testing.assert_close(slope, want, atol=1e-6, rtol=1e-5)


@pytest.mark.each_impl("kl_loss")
def test_sequence_level_of_padded_and_packed_rows(impl, device):
    logp, ref_logp, _ = make(device, 12, 0.5)
    uniform = torch.full((12,), 0.25, device=device)
    padded = kl_loss(
        logp[:12].view(3, 4),
        ref_logp[:12].view(3, 4),
        uniform.view(3, 4),
        estimator="k2",
        gradient="k2",
        level="sequence",
        impl=impl,
    )
    cu = torch.tensor([0, 4, 8, 12], dtype=torch.int32, device=device)
    assert torch.equal(
        padded,
        kl_loss(
            logp[:12],
            ref_logp[:12],
            uniform,
            estimator="k2",
            gradient="k2",
            level="sequence",
            cu_seqlens=cu,
            impl=impl,
        ),
    )
    both = [
        kl_loss(
            logp[:12],
            ref_logp[:12],
            uniform,
            estimator="k1",
            gradient="k1",
            level=level,
            cu_seqlens=cu,
            impl=impl,
        )
        for level in ("token", "sequence")
    ]
    torch.testing.assert_close(*both)


# A policy over five tokens, enumerated: the loss of each token, weighted by its probability, has
# the expected gradient that the docstring states.
@pytest.mark.each_impl("kl_loss")
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_what_each_gradient_descends(impl, estimator, device):
    generator = torch.Generator().manual_seed(0)
    z, ref_z = torch.randn(2, 5, generator=generator).to(device)
    z.requires_grad_()
    logp, ref_logp = torch.log_softmax(z, -1), torch.log_softmax(ref_z, -1)
    expected = {
        name: torch.autograd.grad(
            full_kl(z[None], ref_z[None], direction=name, impl="torch").sum(), z
        )[0]
        for name in ("reverse", "forward")
    }
    want = {
        "k1": torch.zeros(5, device=device),
        "k2": expected["reverse"],
        "k3": expected["forward"],
    }
    loss = kl_loss(
        logp, ref_logp, logp.detach().exp(), estimator=estimator, gradient="k1", impl=impl
    )
    exact = full_kl(z.detach()[None], ref_z[None], impl="torch")[0]
    if estimator in ("k1", "k3"):
        torch.testing.assert_close(loss, exact)
    else:
        assert (loss - exact).abs() > 1e-2
    for gradient, direction in want.items():
        got = torch.autograd.grad(
            kl_loss(
                logp,
                ref_logp,
                logp.detach().exp(),
                estimator=estimator,
                gradient=gradient,
                impl=impl,
            ),
            z,
            retain_graph=True,
        )[0]
        torch.testing.assert_close(got, direction, atol=1e-6, rtol=1e-5)
    assert (expected["reverse"] - expected["forward"]).abs().max() > 1e-2


# Two tokens, the second's policy depending on the first: sequence k2 follows the KL of the
# sequences, token k2 does not.
@pytest.mark.each_impl("kl_loss")
def test_only_the_sequence_level_follows_the_sequence_kl(impl, device):
    generator = torch.Generator().manual_seed(1)
    first, second, ref_first, ref_second = (
        torch.randn(shape, generator=generator).to(device) for shape in ((3,), (3, 3), (3,), (3, 3))
    )
    first.requires_grad_()
    pairs = list(itertools.product(range(3), range(3)))
    logps = [torch.log_softmax(x, -1) for x in (first, second, ref_first, ref_second)]
    logp, ref_logp = (
        torch.stack([torch.stack([a[i], b[i, j]]) for i, j in pairs])
        for a, b in (logps[:2], logps[2:])
    )
    p = logp.sum(1).exp()
    exact = torch.autograd.grad((p * (logp - ref_logp).sum(1)).sum(), first, retain_graph=True)[0]
    weights = p.detach()[:, None].expand(9, 2).contiguous()
    got = {
        level: torch.autograd.grad(
            kl_loss(logp, ref_logp, weights, estimator="k1", gradient="k2", level=level, impl=impl),
            first,
            retain_graph=True,
        )[0]
        for level in ("token", "sequence")
    }
    torch.testing.assert_close(got["sequence"], exact, atol=1e-6, rtol=1e-5)
    assert (got["token"] - exact).norm() > 0.1 * exact.norm()


# Sequences longer than a chunk of the Triton kernel; 40 nats over the whole, where float32 sums
# would show in the exponential of k3. numpy, under the interpreter, where something is infinite
@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.each_impl("kl_loss")
def test_long_sequences_twice_the_same_and_companions_change_nothing(impl, device):
    lengths = [1500, 3, 2100]
    logp, ref_logp, weights = make(device, sum(lengths), 0.01)
    ref_logp = ref_logp - 0.005
    weights = weights * 1e-6
    cu = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    options = {"estimator": "k3", "gradient": "k3", "level": "sequence", "impl": impl}
    loss, slope = run(logp, ref_logp, weights, cu_seqlens=cu, **options)
    want, expected = run(
        logp.double(),
        ref_logp.double(),
        weights.double(),
        cu_seqlens=cu,
        **(options | {"impl": "torch"}),
    )
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=0)
    torch.testing.assert_close(slope.double(), expected, rtol=1e-5, atol=0)
    assert all(
        map(torch.equal, (loss, slope), run(logp, ref_logp, weights, cu_seqlens=cu, **options))
    )
    strided = torch.stack([logp, ref_logp, weights], 1).unbind(1)
    assert all(map(torch.equal, (loss, slope), run(*strided, cu_seqlens=cu, **options)))
    other = torch.where(torch.arange(len(logp), device=device) < 1503, ref_logp, float("inf"))
    assert torch.equal(run(logp, other, weights, cu_seqlens=cu, **options)[1][:1503], slope[:1503])


@pytest.mark.each_impl("kl_loss")
def test_value_opcheck_and_double_backward(impl, device):
    logp, ref_logp, weights = make(device, 20, 0.3)
    loss = kl_loss(
        logp,
        ref_logp,
        torch.full((20,), 0.05, device=device),
        estimator="k3",
        gradient="k2",
        impl=impl,
    )
    torch.testing.assert_close(loss, token_kl(logp, ref_logp, estimator="k3", impl=impl).mean())
    logp.requires_grad_()
    cu = torch.tensor([0, 5, 20], dtype=torch.int32, device=device)
    if impl != "torch":
        for bounds in (None, cu):
            torch.library.opcheck(
                getattr(
                    torch.ops.fusedrl, "kl_loss" if impl == "cpp" else "kl_loss_triton"
                ).default,
                (logp, ref_logp, weights, 2, 1, bounds),
            )
            if impl == "cpp":
                torch.library.opcheck(
                    torch.ops.fusedrl.kl_loss_forward.default,
                    (logp.detach(), ref_logp, weights, 2, 1, bounds),
                )
        with pytest.raises(
            RuntimeError, match="kl_loss: expected one backward pass, got a double backward"
        ):
            torch.autograd.grad(
                kl_loss(logp, ref_logp, weights, estimator="k2", gradient="k2", impl=impl),
                logp,
                create_graph=True,
            )
        (slope,) = torch.autograd.grad(
            kl_loss(logp, ref_logp, weights, estimator="k1", gradient="k2", impl="torch"),
            logp,
            create_graph=True,
        )
        torch.testing.assert_close(torch.autograd.grad(slope.sum(), logp)[0], weights)
    if impl == "cpp":
        with pytest.raises(
            ValueError, match="to ascend from 0 to the number of tokens, 20, got 0 to 5"
        ):
            kl_loss(
                logp,
                ref_logp,
                weights,
                estimator="k2",
                gradient="k2",
                level="sequence",
                cu_seqlens=cu[:2],
                impl=impl,
            )


@pytest.mark.each_impl("kl_loss")
def test_compiled_and_refused(impl, device):
    logp, ref_logp, weights = make(device, 20, 0.3)
    logp.requires_grad_()
    cu = torch.tensor([0, 5, 20], dtype=torch.int32, device=device)
    for options in (
        {"estimator": "k3", "gradient": "k2"},
        {"estimator": "k1", "gradient": "k2", "level": "sequence", "cu_seqlens": cu},
    ):
        compiled = torch.compile(kl_loss, fullgraph=True, backend="aot_eager")(
            logp, ref_logp, weights, impl=impl, **options
        )
        eager = kl_loss(logp, ref_logp, weights, impl=impl, **options)
        assert torch.equal(compiled, eager)
        torch.testing.assert_close(
            *(torch.autograd.grad(x, logp)[0] for x in (compiled, eager)), atol=0, rtol=0
        )
    with pytest.raises(ValueError, match="expected an estimator of k1, k2, k3, abs, got 'k4'"):
        kl_loss(logp, ref_logp, weights, estimator="k1", gradient="k4", impl=impl)
    with pytest.raises(ValueError, match="level to be token or sequence, got 'batch'"):
        kl_loss(logp, ref_logp, weights, estimator="k1", gradient="k1", level="batch", impl=impl)
    with pytest.raises(ValueError, match=r"logp \[N\] with cu_seqlens, or \[B, T\] without"):
        kl_loss(logp, ref_logp, weights, estimator="k1", gradient="k1", level="sequence", impl=impl)
    with pytest.raises(ValueError, match="logp and weights of one shape"):
        kl_loss(logp, ref_logp, weights[:3], estimator="k1", gradient="k1", impl=impl)
