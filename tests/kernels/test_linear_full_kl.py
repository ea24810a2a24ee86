import pytest
import torch

from fusedrl.kernels.full_kl import DIRECTIONS, full_kl, full_kl_reference
from fusedrl.kernels.linear_full_kl import linear_full_kl, linear_full_kl_reference
from fusedrl.kernels.runtime import native


def make(device, N, H, V, H_ref=None, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed + N)
    H_ref = H_ref or H
    shapes = {
        "hidden": (N, H),
        "weight": (V, H),
        "ref_hidden": (N, H_ref),
        "ref_weight": (V, H_ref),
        "bias": (V,),
        "ref_bias": (V,),
    }
    return {
        name: torch.randn(shape, generator=generator).to(device).to(dtype)
        for name, shape in shapes.items()
    }


def run(x, g, impl, function=None, **options):
    """kl and the gradients of hidden, weight and bias."""
    x = {name: t.clone().requires_grad_() for name, t in x.items()}
    if function is None:
        kl = linear_full_kl(
            x["hidden"],
            x["weight"],
            x["ref_hidden"],
            x["ref_weight"],
            bias=x.get("bias"),
            ref_bias=x.get("ref_bias"),
            impl=impl,
            **options,
        )
    else:
        kl = function(
            x["hidden"],
            x["weight"],
            x["ref_hidden"],
            x["ref_weight"],
            x.get("bias"),
            x.get("ref_bias"),
            **options,
        )
    kl.backward(g.to(kl.dtype))
    assert x["ref_hidden"].grad is None
    assert x["ref_weight"].grad is None
    return [kl.detach(), *(x[name].grad for name in ("hidden", "weight", "bias") if name in x)]


# No rows, one, several chunks with a short last one, a workspace below one row; another hidden size
# for the reference; with and without bias.
@pytest.mark.each_impl("linear_full_kl")
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
    ("N", "H", "V", "H_ref", "workspace"),
    [
        (0, 8, 33, None, None),
        (1, 5, 31, 7, 1),
        (7, 16, 130, 9, 3 * 8 * 130),
        (9, 16, 1025, None, None),
    ],
)
def test_matches_float64(impl, direction, N, H, V, H_ref, workspace, device):
    x = make(device, N, H, V, H_ref)
    g = torch.randn(N, device=device)
    for T, names in ((1.0, x), (1.7, ("hidden", "weight", "ref_hidden", "ref_weight"))):
        part = {name: x[name] for name in names}
        got = run(part, g, impl, temperature=T, direction=direction, workspace_bytes=workspace)
        want = run(
            {name: t.double() for name, t in part.items()},
            g,
            None,
            linear_full_kl_reference,
            temperature=T,
            direction=direction,
        )
        for ours, expected in zip(got, want, strict=True):
            assert ours.dtype == torch.float32
            torch.testing.assert_close(
                ours.double(), expected, atol=2e-5 * max(1.0, H**0.5 / 4), rtol=2e-5
            )


@pytest.mark.each_impl("linear_full_kl")
@pytest.mark.parametrize("workspace", [1, None], ids=["computed again", "kept"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_is_full_kl_of_the_logits(impl, direction, workspace, device):
    x = make(device, 6, 12, 77)
    mask = torch.tensor([True, True, False, True, False, True], device=device)
    g = torch.tensor([1.0, 0.0, 2.0, -1.0, 1.0, 0.5], device=device)
    poisoned = x | {
        name: torch.where(mask[:, None], x[name], float("nan")) for name in ("hidden", "ref_hidden")
    }
    got = run(poisoned, g, impl, mask=mask, direction=direction, workspace_bytes=workspace)

    def materialised(hidden, weight, ref_hidden, ref_weight, bias, ref_bias):
        return full_kl(
            hidden @ weight.t() + bias,
            ref_hidden @ ref_weight.t() + ref_bias,
            mask=mask,
            direction=direction,
            impl=impl,
        )

    for ours, expected in zip(got, run(x, g, impl, materialised), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    assert got[0][~mask].eq(0).all()
    assert got[1][[1, 2, 4]].eq(0).all()
    whole = run(x, g, impl, mask=mask, direction=direction)
    for a, b in zip(whole, run(x, g, impl, mask=mask, direction=direction), strict=True):
        assert torch.equal(a, b)
    same = linear_full_kl(
        x["hidden"], x["weight"], x["hidden"], x["weight"], direction=direction, impl=impl
    )
    assert same.eq(0).all()


# Against torch with the logits of the same dtype: widened products are closer to float64 than they
# are.
@pytest.mark.each_impl("linear_full_kl", interpreted=False)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes(impl, dtype, device):
    x = make(device, 5, 24, 90, dtype=dtype)
    g = torch.ones(5, device=device)
    got = run(x, g, impl)
    want = run({name: t.double() for name, t in x.items()}, g, None, linear_full_kl_reference)
    torch.testing.assert_close(got[0].double(), want[0], atol=1e-4, rtol=1e-5)
    for ours, expected in zip(got[1:], want[1:], strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), expected, atol=1e-4, rtol=torch.finfo(dtype).eps)
    mixed = linear_full_kl(
        x["hidden"], x["weight"], x["ref_hidden"].float(), x["ref_weight"].float(), impl=impl
    )
    torch.testing.assert_close(
        mixed,
        linear_full_kl(x["hidden"], x["weight"], x["ref_hidden"], x["ref_weight"], impl=impl),
        atol=1e-4,
        rtol=1e-5,
    )


@pytest.mark.cpu_only("the C++ kernels")
@pytest.mark.skipif(not native.capability, reason=native.reason)
def test_opcheck_compile_and_double_backward(device):
    x = make(device, 4, 6, 20)
    hidden, weight = x["hidden"].requires_grad_(), x["weight"].requires_grad_()
    mask = torch.tensor([True, False, True, True], device=device)
    heads = (hidden, weight, x["ref_hidden"], x["ref_weight"])
    torch.library.opcheck(
        torch.ops.fusedrl.linear_full_kl.default, (*heads, None, None, mask, 0.8, 0, -1)
    )
    torch.library.opcheck(
        torch.ops.fusedrl.linear_full_kl.default,
        (*heads, x["bias"].requires_grad_(), x["ref_bias"], None, 0.8, 2, 100),
    )
    compiled = torch.compile(linear_full_kl, fullgraph=True, backend="aot_eager")(*heads, mask=mask)
    assert torch.equal(compiled, linear_full_kl(*heads, mask=mask))
    with pytest.raises(
        RuntimeError, match="linear_full_kl: expected one backward pass, got a double backward"
    ):
        torch.autograd.grad(linear_full_kl(*heads).sum(), hidden, create_graph=True)


def test_refuses_what_it_does_not_support(device):
    x = make(device, 3, 4, 5, 6)
    heads = [x["hidden"], x["weight"], x["ref_hidden"], x["ref_weight"]]
    with pytest.raises(ValueError, match=r"ref_weight does not fit its pattern \[V, H_ref\]"):
        linear_full_kl(*heads[:3], x["weight"])
    with pytest.raises(ValueError, match="a direction of"):
        linear_full_kl(*heads, direction="backward")
    with pytest.raises(ValueError, match="workspace_bytes above 0 or None, got 0"):
        linear_full_kl(*heads, workspace_bytes=0)
    with pytest.raises(TypeError, match="expected weight of dtype float32"):
        linear_full_kl(heads[0], heads[1].bfloat16(), *heads[2:])


# ---- Triton --------------------------------------------------------------------------------------


# Against torch with the logits in the same dtype, both measured against float64.
@pytest.mark.usefixtures("triton_runs")
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_error_is_at_most_twice_that_of_torch(dtype, direction, device):
    x = make(device, 5, 24, 90, dtype=dtype)
    g = torch.ones(5, device=device)

    def same_dtype(hidden, weight, ref_hidden, ref_weight, bias, ref_bias):
        return full_kl_reference(
            hidden @ weight.t() + bias,
            (ref_hidden @ ref_weight.t() + ref_bias).detach(),
            None,
            1.0,
            direction,
        )

    want = run(
        {name: t.double() for name, t in x.items()},
        g,
        None,
        linear_full_kl_reference,
        direction=direction,
    )
    theirs, got = (
        run(x, g, None, same_dtype),
        run(x, g, "triton", direction=direction, workspace_bytes=5 * 90 * 4),
    )
    for name, a, b, exact in zip(
        ("kl", "hidden", "weight", "bias"), got, theirs, want, strict=True
    ):
        assert a.dtype == (torch.float32 if name == "kl" else dtype)
        ours_off, theirs_off = ((t.double() - exact).abs().max() for t in (a, b))
        truncated = (
            torch.finfo(dtype).eps * exact.abs().max()
            if dtype == torch.bfloat16 and name != "kl"
            else 0.0
        )
        # to bfloat16 the interpreter cuts, it does not round
        assert ours_off <= 2 * theirs_off + truncated + 1e-6, (name, ours_off, theirs_off)


@pytest.mark.usefixtures("triton_runs")
def test_triton_opcheck_compile_and_double_backward(device):
    x = make(device, 4, 6, 20)
    hidden, weight, bias = (x[name].requires_grad_() for name in ("hidden", "weight", "bias"))
    mask = torch.tensor([True, False, True, True], device=device)
    heads = (hidden, weight, x["ref_hidden"], x["ref_weight"])
    torch.library.opcheck(
        torch.ops.fusedrl.linear_full_kl_triton.default,
        (*heads, bias, x["ref_bias"], mask, 0.8, 0, 500),
    )
    compiled = torch.compile(linear_full_kl, fullgraph=True, backend="aot_eager")(
        *heads, mask=mask, impl="triton"
    )
    assert torch.equal(compiled, linear_full_kl(*heads, mask=mask, impl="triton"))
    with pytest.raises(
        RuntimeError, match="linear_full_kl: expected one backward pass, got a double backward"
    ):
        torch.autograd.grad(linear_full_kl(*heads, impl="triton").sum(), hidden, create_graph=True)
