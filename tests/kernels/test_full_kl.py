import math

import pytest
import torch

from fusedrl.engine.tools.verify.grid import interpreted
from fusedrl.kernels.full_kl import DIRECTIONS, full_kl, full_kl_reference
from fusedrl.kernels.runtime.dispatch import unavailable

INF = float("inf")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Triton's block cut to 32 columns: the interpreter costs time by lane, and the running maxima
    come into play."""
    if unavailable("triton", "cpu") is None:
        from fusedrl.kernels.full_kl import _triton as full_kl_triton

        monkeypatch.setattr(full_kl_triton, "_BLOCK", 32)


def make(device, N, V, scale=3.0, apart=1.0, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed + V)
    z = torch.randn(N, V, generator=generator).to(device) * scale
    return z.to(dtype), (z + torch.randn(N, V, generator=generator).to(device) * apart).to(dtype)


def by_hand(z, x, T, direction):
    """Sums over the columns of the textbook, in float64."""
    p, r = torch.softmax(z.double() / T, -1), torch.softmax(x.double() / T, -1)
    m = (p + r) / 2
    kl = lambda a, b: torch.where(a > 0, a * (torch.log(a) - torch.log(b)), 0).sum(-1)  # noqa: E731
    return {"reverse": kl(p, r), "forward": kl(r, p), "jsd": (kl(p, m) + kl(r, m)) / 2}[direction]


def gradient(z, x, g, impl, **options):
    z = z.clone().requires_grad_()
    kl = full_kl(z, x, impl=impl, **options)
    kl.backward(g)
    return kl.detach(), z.grad


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_reference_is_the_textbook(direction, device):
    z, x = make(device, 4, 19, dtype=torch.float64)
    for T in (1.0, 0.7):
        torch.testing.assert_close(
            full_kl(z, x, temperature=T, direction=direction, impl="torch"),
            by_hand(z, x, T, direction),
        )
        assert torch.autograd.gradcheck(
            lambda y, T=T: full_kl_reference(y, x, None, T, direction), z.clone().requires_grad_()
        )
    hidden = x.clone()
    hidden[:, :5] = z[:, :5] = -INF  # masked in both: as if the columns were not there
    assert torch.autograd.gradcheck(
        lambda y: full_kl_reference(torch.cat([z[:, :5], y], -1), hidden, None, 1.0, direction),
        z[:, 5:].clone().requires_grad_(),
    )


# One column; around a vector, two, a block of 1024 and one of Triton's; logits far apart, large,
# nearly equal, offset by 1e4.
@pytest.mark.each_impl("full_kl")
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("V", [1, 2, 31, 33, 1023, 1025, 2500])
def test_matches_float64(impl, direction, V, device):
    N = 3
    if interpreted(impl, device) and V > 100:
        pytest.skip("the interpreter takes milliseconds a block of 32")
    g = torch.tensor([1.0, -2.5, 0.3], device=device)
    for scale, apart, offset, T in (
        (3.0, 1.0, 0.0, 1.0),
        (1.0, 1e-3, 0.0, 0.7),
        (10.0, 30.0, 0.0, 1.5),
        (1.0, 1.0, 1e4, 0.7),
        (100.0, 100.0, 0.0, 1.0),
    ):
        z, x = make(device, N, V, scale, apart)
        z, x = z + offset, x + offset
        kl, grad = gradient(z, x, g, impl, temperature=T, direction=direction)
        want, want_grad = gradient(
            z.double(), x.double(), g.double(), "torch", temperature=T, direction=direction
        )
        assert kl.dtype == torch.float32
        torch.testing.assert_close(kl.double(), want, atol=2e-6, rtol=4e-6)
        # p (l - KL): l and KL carry the rounding of their size
        torch.testing.assert_close(
            grad.double(), want_grad, atol=2e-6 * max(1.0, want.max().item()), rtol=2e-5
        )


@pytest.mark.each_impl("full_kl")
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_logits_round_only_the_gradient(impl, direction, dtype, device):
    z, x = make(device, 4, 130, dtype=dtype)
    g = torch.tensor([1.0, 2.0, -3.0, 0.0], device=device)
    kl, grad = gradient(z, x, g, impl, direction=direction)
    want, want_grad = gradient(z.double(), x.double(), g.double(), "torch", direction=direction)
    assert kl.dtype == torch.float32
    assert grad.dtype == dtype
    torch.testing.assert_close(kl.double(), want, atol=2e-6, rtol=4e-6)
    torch.testing.assert_close(grad.double(), want_grad, atol=1e-6, rtol=torch.finfo(dtype).eps)
    assert grad[3].eq(0).all()


@pytest.mark.each_impl("full_kl")
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("V", [33, 77])
def test_properties(impl, direction, V, device):
    z, x = make(device, 3, V, scale=2.0, apart=2.0)
    g = torch.ones(3, device=device)
    kl, grad = gradient(z, x, g, impl, direction=direction)
    assert (kl > 0).all()
    assert grad.double().sum(-1).abs().max() < 2e-6
    if direction == "jsd":
        far, near = torch.full((1, V), -1e4, device=device), torch.full((1, V), -1e4, device=device)
        far[0, 0] = near[0, V - 1] = 1e4
        assert full_kl(far, near, direction=direction, impl=impl).item() == pytest.approx(
            math.log(2.0), abs=1e-7
        )
        torch.testing.assert_close(
            full_kl(x, z, direction=direction, impl=impl), kl, atol=1e-6, rtol=1e-6
        )
    same, none = gradient(z, z, g, impl, direction=direction)
    assert same.eq(0).all()
    assert none.abs().max() < 2e-7
    for shift in (-200.0, 1e3):  # all negative: phantom columns of 0 would take all the weight
        moved, _ = gradient(z + shift, x + shift, g, impl, direction=direction)
        torch.testing.assert_close(moved, kl, atol=1e-3, rtol=1e-3)
    assert torch.equal(full_kl(z[:1], x[:1], direction=direction, impl=impl), kl[:1])  # companions
    again, grad_again = gradient(z, x, g, impl, direction=direction)
    assert torch.equal(again, kl)
    assert torch.equal(grad_again, grad)
    # row strides, and canaries behind the rows
    wide, wide_ref = (
        torch.full((3, 2 * V), float("nan"), device=device),
        torch.full((3, V + 5), float("nan"), device=device),
    )
    wide[:, :V], wide_ref[:, :V] = z, x
    strided, strided_grad = gradient(wide[:, :V], wide_ref[:, :V], g, impl, direction=direction)
    assert torch.equal(strided, kl)
    assert torch.equal(strided_grad, grad)


@pytest.mark.each_impl("full_kl")
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_lowest_number_masks_as_minus_infinity_does(impl, direction, temperature, device):
    """Libraries mask by finfo.min, too; divided by a temperature it may be -inf, or not."""
    z, x = make(device, 6, 70, seed=2)
    z[0, 3:9] = x[0, 3:9] = -INF
    z[1, :40], x[2, 40:] = -INF, -INF
    x[3, 69], z[4, 0] = -INF, -INF
    found = [
        gradient(
            own,
            other,
            torch.ones(6, device=device),
            impl,
            direction=direction,
            temperature=temperature,
        )
        for own, other in (
            (z, x),
            tuple(t.clamp_min(torch.finfo(torch.float32).min) for t in (z, x)),
        )
    ]
    for masked, lowest in zip(*found, strict=True):
        torch.testing.assert_close(lowest, masked, atol=0, rtol=0)
    if direction == "reverse":
        assert found[1][0][[2, 3]].eq(INF).all()


@pytest.mark.each_impl("full_kl")
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_minus_infinity_contributes_nothing(impl, direction, device):
    z, x = make(device, 8, 70, seed=1)
    z[0, :69] = x[0, :69] = -INF  # all but one
    z[1, 1::2] = x[1, 1::2] = -INF
    z[2, :40] = -INF  # p = 0 < r
    x[3, 40:] = -INF  # p > 0 = r
    z[4] = x[4] = -INF
    z[5], x[6] = -INF, -INF
    z[7, 0] = -200.0  # p underflows where r is absent: still infinite
    x[7, 0] = -INF
    kl, grad = gradient(z, x, torch.ones(8, device=device), impl, direction=direction)
    want, want_grad = gradient(
        z.double(),
        x.double(),
        torch.ones(8, dtype=torch.float64, device=device),
        "torch",
        direction=direction,
    )
    torch.testing.assert_close(kl.double(), want, atol=2e-6, rtol=4e-6)
    torch.testing.assert_close(grad.double(), want_grad, atol=2e-6, rtol=2e-5)
    present = z[1] > -INF
    compact, _ = gradient(
        z[1:2, present], x[1:2, present], torch.ones(1, device=device), impl, direction=direction
    )
    torch.testing.assert_close(kl[1:2], compact, atol=1e-6, rtol=1e-6)
    assert grad[1, ~present].eq(0).all()
    ln2 = math.log(2.0)
    special = {
        "reverse": [0, INF, 0, 0, INF, INF],
        "forward": [INF, 0, 0, INF, 0, 0],
        "jsd": [0, 0, 0, ln2 / 2, ln2 / 2, 0],
    }[direction]
    for row, value in zip((2, 3, 4, 5, 6, 7), special, strict=True):
        if value or row == 4:
            assert kl[row].item() == pytest.approx(value)
            if row in (4, 5, 6) or value == INF:
                assert grad[row].eq(0).all()
    assert not grad.isnan().any()


@pytest.mark.each_impl("full_kl")
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_broken_and_masked_rows_stay_to_themselves(impl, direction, device):
    z, x = make(device, 6, 70)
    g = torch.ones(6, device=device)
    clean, clean_grad = gradient(z, x, g, impl, direction=direction)
    z[0, 3], z[1, 69], x[2, 0], x[3, 33] = float("nan"), INF, float("nan"), INF
    z[0, 5] = x[1, 7] = -INF
    kl, grad = gradient(z, x, g, impl, direction=direction)
    assert kl[:4].isnan().all()
    assert grad[:4].isnan().all()
    assert torch.equal(kl[4:], clean[4:])
    assert torch.equal(grad[4:], clean_grad[4:])
    mask = torch.tensor([False, False, False, False, True, False], device=device)
    kl, grad = gradient(z, x, g, impl, direction=direction, mask=mask)
    assert torch.equal(kl[4], clean[4])
    assert torch.equal(grad[4], clean_grad[4])
    assert kl[~mask].eq(0).all()
    assert grad[~mask].eq(0).all()
    shaped = full_kl(
        z.view(2, 3, 70), x.view(2, 3, 70), mask=mask.view(2, 3), direction=direction, impl=impl
    )
    assert torch.equal(shaped, kl.view(2, 3))
    assert full_kl(z[:0], x[:0], direction=direction, impl=impl).shape == (0,)


@pytest.mark.each_impl("full_kl")
def test_opcheck_and_compile(impl, device):
    z, x = make(device, 3, 40)
    z.requires_grad_()
    mask = torch.tensor([True, False, True], device=device)
    if impl == "cpp":
        torch.library.opcheck(torch.ops.fusedrl.full_kl.default, (z, x, mask, 0.9, 2))
        kl, stats = torch.ops.fusedrl.full_kl_forward(z.detach(), x, None, 0.9, 0)
        torch.library.opcheck(
            torch.ops.fusedrl.full_kl_forward.default, (z.detach(), x, mask, 0.9, 1)
        )
        torch.library.opcheck(
            torch.ops.fusedrl.full_kl_backward.default, (kl, z.detach(), x, stats, 0.9, 0)
        )
        with pytest.raises(
            RuntimeError, match="full_kl: expected one backward pass, got a double backward"
        ):
            torch.autograd.grad(full_kl(z, x, impl=impl).sum(), z, create_graph=True)
    if impl == "triton":
        torch.library.opcheck(
            torch.ops.fusedrl.full_kl_triton.default,
            (z, x, mask, 0.9, 2),
            test_utils=("test_schema", "test_faketensor"),
        )
    compiled = torch.compile(full_kl, fullgraph=True, backend="aot_eager")(
        z, x, mask=mask, direction="reverse", impl=impl
    )
    eager = full_kl(z, x, mask=mask, impl=impl)
    torch.testing.assert_close(compiled, eager, atol=0, rtol=0)
    torch.testing.assert_close(
        *(torch.autograd.grad(kl.sum(), z)[0] for kl in (compiled, eager)), atol=0, rtol=0
    )


def test_refuses_what_it_does_not_support(device):
    z = torch.zeros(2, 5, device=device)
    with pytest.raises(ValueError, match="a direction of reverse, forward, jsd, got 'k1'"):
        full_kl(z, z, direction="k1")
    with pytest.raises(ValueError, match="a temperature above 0, got 0"):
        full_kl(z, z, temperature=0)
    with pytest.raises(ValueError, match=r"above 0 .at least 1.2e-38., got 1e-39"):
        full_kl(z, z, temperature=1e-39)
    with pytest.raises(ValueError, match=r"ref_logits does not fit its pattern \[d0, V\]"):
        full_kl(z, z[:, :4])
    with pytest.raises(TypeError, match="expected ref_logits of dtype float32"):
        full_kl(z, z.bfloat16())
    with pytest.raises(ValueError, match="contiguous last dimension"):
        full_kl(torch.zeros(5, 2, device=device).t(), z)
    with pytest.raises(ValueError, match="expected a vocabulary"):
        full_kl(z[:, :0], z[:, :0])
