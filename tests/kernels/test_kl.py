import math

import pytest
import torch

from fusedrl.engine.tools.verify.catalogue import CATALOGUE
from fusedrl.kernels.kl import ESTIMATORS, clamped_count, token_kl, token_kl_reference
from fusedrl.kernels.runtime import native


# Sizes around a vector and Triton's block; differences where expm1(-x) + x cancels, where it grows,
# and beyond the clamp.
@pytest.mark.each_impl("token_kl")
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("N", [0, 1, 15, 17, 1000, 1024, 1025])
@pytest.mark.parametrize("scale", [1e-4, 1e-2, 1.0, 8.0, 40.0])
def test_matches_float64(impl, estimator, N, scale, device):
    generator = torch.Generator().manual_seed(N)
    logp = -torch.rand(N, generator=generator).to(device) * 20
    ref_logp = (logp + torch.randn(N, generator=generator).to(device) * scale).clamp(max=0)
    got = token_kl(logp, ref_logp, estimator=estimator, impl=impl)
    want = token_kl_reference(logp.double(), ref_logp.double(), estimator)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)
    if estimator != "k1":
        assert (got >= 0).all()


@pytest.mark.cpu_only("the C++ kernels")
@pytest.mark.skipif(not native.capability, reason=native.reason)
def test_the_exponential_errs_by_one_and_a_half_units(device):
    """In the last place of the larger term, over all that lies within the clamp."""
    near = torch.logspace(-30, 0, 50_001)
    x = torch.cat([torch.linspace(-20, 20, 400_001), near, -near]).to(device)
    got = token_kl(torch.zeros_like(x), x, estimator="k3", impl="cpp").double()
    wide = x.double()
    unit = torch.maximum(torch.expm1(wide).abs(), wide.abs()).clamp(min=1e-38) * 2**-23
    assert ((got - (torch.expm1(wide) - wide)).abs() / unit).max() < 1.5


# numpy, under the interpreter, where something is infinite
@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.each_impl("token_kl")
def test_by_hand_and_at_the_clamp(impl, device):
    logp, ref_logp = (
        torch.tensor([-1.0, -30.0, -0.5, -2.0], device=device),
        torch.tensor([-1.5, -0.5, -float("inf"), -2.0], device=device),
    )
    k3 = token_kl(logp, ref_logp, estimator="k3", impl=impl)
    torch.testing.assert_close(
        k3,
        torch.tensor(
            [math.exp(-0.5) - 1 + 0.5, math.exp(20) - 1 - 29.5, float("inf"), 0.0], device=device
        ),
        rtol=1e-6,
        atol=1e-7,
    )
    torch.testing.assert_close(
        token_kl(logp, ref_logp, estimator="k2", impl=impl)[:2],
        torch.tensor([0.125, 29.5**2 / 2], device=device),
    )
    assert token_kl(logp, ref_logp, estimator="k1", impl=impl).tolist() == [
        0.5,
        -29.5,
        float("inf"),
        0.0,
    ]
    assert token_kl(logp, ref_logp, estimator="abs", impl=impl).tolist() == [
        0.5,
        29.5,
        float("inf"),
        0.0,
    ]
    assert token_kl(
        torch.tensor(float("nan"), device=device),
        torch.tensor(0.0, device=device),
        estimator="k3",
        impl=impl,
    ).isnan()


def test_expectations_over_the_policy(device):
    """k1 and k3 are unbiased, k2 is not: by enumeration."""
    generator = torch.Generator().manual_seed(0)
    p, r = (
        torch.randn(7, generator=generator, dtype=torch.float64).to(device).log_softmax(0)
        for _ in range(2)
    )
    exact = (p.exp() * (p - r)).sum()
    mean = {e: (p.exp() * token_kl(p, r, estimator=e, impl="torch")).sum() for e in ESTIMATORS}
    torch.testing.assert_close(mean["k1"], exact)
    torch.testing.assert_close(mean["k3"], exact)
    assert abs(mean["k2"] - exact) > 1e-3


@pytest.mark.each_impl("token_kl")
def test_shapes_layouts_and_no_gradient(impl, device):
    logp, ref_logp = -torch.rand(5, 6, device=device), -torch.rand(5, 6, device=device)
    want = token_kl(logp, ref_logp, estimator="k3", impl=impl)
    got = token_kl(
        logp.t().contiguous().t().requires_grad_(),
        ref_logp[:1].expand(5, 6),
        estimator="k3",
        impl=impl,
    )
    assert not got.requires_grad
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=0)
    assert want.shape == (5, 6)


@pytest.mark.each_impl("token_kl", but=("torch",))
def test_opcheck_and_compile(impl, device):
    logp, ref_logp = -torch.rand(5, device=device), -torch.rand(5, device=device)
    op = torch.ops.fusedrl.token_kl if impl == "cpp" else torch.ops.fusedrl.token_kl_triton
    torch.library.opcheck(op.default, (logp, ref_logp, 2))
    compiled = torch.compile(token_kl, fullgraph=True, backend="aot_eager")
    assert torch.equal(
        compiled(logp, ref_logp, estimator="k3", impl=impl),
        token_kl(logp, ref_logp, estimator="k3", impl=impl),
    )


# k3 without the rounding of the difference: what the bound above is there to catch.
def test_the_rounding_of_the_difference_matters(device):
    logp = -torch.rand(1000, generator=torch.Generator().manual_seed(0)).to(device) * 0.5
    ref_logp = logp + 15 + torch.rand(1000, generator=torch.Generator().manual_seed(1)).to(device)
    want = token_kl_reference(logp.double(), ref_logp.double(), "k3")
    plain = torch.expm1((ref_logp - logp).double()) + (logp - ref_logp).double()
    assert ((plain - want).abs() > 2e-7 * want).any()
    for impl in {*CATALOGUE["token_kl"].implementations(device)} - {"torch"}:
        assert (
            (token_kl(logp, ref_logp, estimator="k3", impl=impl).double() - want).abs()
            <= 2e-7 * want
        ).all()


# One that is at the bound, one beyond on either side, what is no number, and what the mask hides.
def test_the_clamps_are_counted(device):
    logp = torch.tensor([-1.0, -21.0, -22.0, 0.0, float("nan"), float("-inf"), 0.0], device=device)
    ref_logp = torch.tensor([-1.5, -1.0, -1.0, -20.5, 0.0, -1.0, -20.0], device=device)
    mask = torch.tensor([True, True, True, True, True, False, True], device=device)
    assert clamped_count(logp, ref_logp).item() == 3
    assert clamped_count(logp, ref_logp, mask=mask).item() == 2
    assert clamped_count(logp[:0], ref_logp[:0]).item() == 0
    assert torch.equal(
        torch.compile(clamped_count, fullgraph=True, backend="aot_eager")(
            logp, ref_logp, mask=mask
        ),
        torch.tensor(2, device=device),
    )
    with pytest.raises(ValueError, match="expected logp and mask of one shape and device"):
        clamped_count(logp, ref_logp, mask=mask[:3])
    with pytest.raises(TypeError, match="expected mask of dtype bool"):
        clamped_count(logp, ref_logp, mask=mask.int())


@pytest.mark.cpu_only("values are read on the host, or an implementation is named, on a CPU alone")
def test_refuses_what_it_does_not_support(device):
    with pytest.raises(ValueError, match="expected an estimator of k1, k2, k3, abs, got 'k4'"):
        token_kl(torch.zeros(3, device=device), torch.zeros(3, device=device), estimator="k4")
    with pytest.raises(ValueError, match=r"of one shape, dtype and device, got float32\[3\]"):
        token_kl(torch.zeros(3, device=device), torch.zeros(4, device=device), estimator="k1")
    with pytest.raises(TypeError, match="expected logp of dtype float32"):
        token_kl(
            torch.zeros(3, dtype=torch.bfloat16, device=device),
            torch.zeros(3, dtype=torch.bfloat16, device=device),
            estimator="k1",
        )
    with pytest.raises(RuntimeError, match="these can: torch"):
        token_kl(
            torch.zeros(3, device=device),
            torch.zeros(3, device=device),
            estimator="k1",
            impl="cuda",
        )
