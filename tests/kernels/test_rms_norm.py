import pytest
import torch

from fusedrl.engine.tools.verify.grid import interpreted
from fusedrl.kernels.rms_norm import _rms_norm_triton, rms_norm, rms_norm_reference
from fusedrl.kernels.runtime import native

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-5


def tensors(device, shape, dtype, with_residual, seed=0):
    """x, weight, residual (or None), and upstream gradients of y and of the sum."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    x, residual, dy, dsum = (
        torch.randn(shape, generator=generator).to(device).to(dtype) for _ in range(4)
    )
    weight = (1 + 0.3 * torch.randn(shape[-1], generator=generator).to(device)).to(dtype)
    return x, weight, residual if with_residual else None, dy, dsum


def run(x, weight, residual, dy, dsum, impl, offset=0.0):
    """[y, sum (with a residual), gradients of x, weight and residual]; impl None is the
    reference."""
    leaves = [t.detach().requires_grad_() for t in (x, weight, residual) if t is not None]
    added = leaves[2] if residual is not None else None
    if impl is None:
        y, total = rms_norm_reference(leaves[0], leaves[1], EPS, added, offset)
    elif residual is None:
        y, total = rms_norm(leaves[0], leaves[1], eps=EPS, offset=offset, impl=impl), None
    else:
        y, total = rms_norm(leaves[0], leaves[1], eps=EPS, residual=added, offset=offset, impl=impl)
    if residual is None:
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]
    return [y.detach(), total.detach(), *torch.autograd.grad((y, total), leaves, (dy, dsum))]


def assert_no_worse(got, same_dtype, exact, floor=0.0):
    """Ours errs at most as much as torch in the same dtype, and a rounding or two of the largest
    value (or of `floor`, where that cancels)."""
    for ours, theirs, want in zip(got, same_dtype, exact, strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.shape == want.shape
        if want.numel() == 0:
            continue
        eps = torch.finfo(ours.dtype).eps * want.abs().max().clamp(min=floor)
        error, bound = (ours.double() - want).abs().max(), (theirs.double() - want).abs().max()
        assert error <= bound + (4 if ours.dtype == torch.float32 else 1) * eps, (
            f"{error / eps:.2f} eps, torch {bound / eps:.2f}"
        )


# Rows: none, one, around the 64 of a C++ chunk. H: one value, odd ones, around a vector of 8 or 16
# and four of them, around Triton's tile of 2048.
@pytest.mark.each_impl("rms_norm")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        (0, 5),
        (1, 1),
        (3, 7),
        (2, 16),
        (65, 33),
        (130, 64),
        (9, 173),
        (3, 2051),
        (0, 2, 8),
        (7, 3, 24),
        (33, 2, 8),
    ],
)
def test_against_float64(impl, dtype, shape, device):
    if interpreted(impl, device) and dtype == torch.float16 and shape[0] > 9:
        return  # the interpreter is slow, and bfloat16 goes the same way
    for with_residual, offset in ((False, 0.0), (True, 0.0), (True, 1.0)):
        inputs = tensors(device, shape, dtype, with_residual)
        exact = run(*(t if t is None else t.double() for t in inputs), None, offset)
        # A single value is its own rms: its gradient is nothing but what cancels.
        assert_no_worse(
            run(*inputs, impl, offset),
            run(*inputs, None, offset),
            exact,
            floor=4.0 if shape[-1] == 1 else 0.0,
        )


# Large rows, offsets that make every square alike, and values so small that eps decides.
@pytest.mark.each_impl("rms_norm", interpreted=False)
@pytest.mark.parametrize("scale,offset", [(1.0, 0.0), (1.0, 100.0), (1e-4, 0.0), (1e4, 0.0)])
def test_scales(impl, scale, offset, device):
    x, weight, residual, dy, dsum = tensors(device, (5, 9001), torch.float32, True)
    inputs = x * scale + offset, weight, residual * scale, dy, dsum
    exact = run(*(t.double() for t in inputs), None)
    assert_no_worse(run(*inputs, impl), run(*inputs, None), exact)


@pytest.mark.each_impl("rms_norm")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_where_transformers_does(impl, dtype, device):
    if interpreted(impl, device) and dtype == torch.bfloat16:
        pytest.skip("the interpreter truncates to bfloat16")
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x, weight, residual, *_ = tensors(device, (9, 40), dtype, True)
    norm = LlamaRMSNorm(40, EPS).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(weight)
        y, total = rms_norm(x, weight, eps=EPS, residual=residual, impl=impl)
        assert torch.equal(total, x + residual)
        # A sum in another order may move a value across a rounding boundary; all but a few must be
        # the same bits.
        assert (y != norm(total)).sum() <= 4
        assert (rms_norm(x, weight, eps=EPS, impl=impl) != norm(x)).sum() <= 4
        once = (
            x.double()
            * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + EPS)
            * weight.double()
        ).to(dtype)
        # rounded once instead of twice: this test tells the difference
        assert (once != norm(x)).sum() > 20


@pytest.mark.each_impl("rms_norm")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_where_gemma_does(impl, dtype, device):
    if interpreted(impl, device) and dtype == torch.bfloat16:
        pytest.skip("the interpreter truncates to bfloat16")
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm

    x, weight, residual, *_ = tensors(device, (9, 40), dtype, True)
    weight = weight - 1
    norm = Gemma2RMSNorm(40, EPS).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(weight)
        y, total = rms_norm(x, weight, eps=EPS, residual=residual, offset=1.0, impl=impl)
        assert (y != norm(total)).sum() <= 4
        # 1 + weight rounded first: this test tells the difference
        rounded = rms_norm(x, weight + 1, eps=EPS, impl=impl)
        assert (
            (rms_norm(x, weight, eps=EPS, offset=1.0, impl=impl) != norm(x)).sum()
            <= 4
            < 20
            < (rounded != norm(x)).sum()
        )


@pytest.mark.each_impl("rms_norm")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_beside_float32(impl, dtype, device):
    """The bits of the widened weight, and a gradient in the weight's own dtype."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(5, 33, generator=draw).to(device)
    weight = torch.randn(33, generator=draw).to(device).to(dtype).requires_grad_()
    wide = weight.detach().float().requires_grad_()
    for offset in (0.0, 1.0):
        got, want = (rms_norm(x, w, eps=EPS, offset=offset, impl=impl) for w in (weight, wide))
        assert got.dtype == torch.float32
        assert torch.equal(got, want)
    (gradient,), (exact,) = (
        torch.autograd.grad(y.square().sum(), w) for y, w in ((got, weight), (want, wide))
    )
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient.float(), exact, rtol=2**-7, atol=1e-5)


@pytest.mark.each_impl("rms_norm")
def test_strides(impl, device):
    wide = torch.randn(6, 5, 24, device=device)
    weight, upstream = torch.randn(24, device=device), torch.randn(6, 2, 24, device=device)
    heads = wide[:, 1:3]  # a slice of a fused projection
    got, want = (
        run(heads, weight, None, upstream, None, impl),
        run(heads.clone(), weight, None, upstream, None, impl),
    )
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    rows, other = wide.flatten(1)[:, 8:32], wide.flatten(1)[:, 40:64]
    got = run(rows, weight, other, rows, other, impl)
    want = run(rows.clone(), weight, other.clone(), rows.clone(), other.clone(), impl)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    # the same row for every token, and a gradient that is broadcast
    one = torch.randn(24, device=device).expand(6, 24)
    got, want = (
        run(one, weight, None, one, None, impl),
        run(one.clone(), weight, None, one.clone(), None, impl),
    )
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.each_impl("rms_norm")
def test_only_some_gradients(impl, device):
    x, weight, residual, dy, dsum = tensors(device, (5, 12), torch.float32, True)
    full = run(x, weight, residual, dy, dsum, impl)
    leaf = x.clone().requires_grad_()
    y, total = rms_norm(leaf, weight, eps=EPS, residual=residual, impl=impl)  # a frozen weight
    assert torch.equal(torch.autograd.grad((y, total), leaf, (dy, dsum))[0], full[2])
    leaf = x.clone().requires_grad_()
    y, total = rms_norm(leaf, weight, eps=EPS, residual=residual, impl=impl)  # only the sum is used
    assert torch.equal(torch.autograd.grad(total, leaf, dsum)[0], dsum)
    wanted = weight.clone().requires_grad_()
    y, total = rms_norm(x, wanted, eps=EPS, residual=residual, impl=impl)  # only the weight learns
    assert torch.equal(torch.autograd.grad(y, wanted, dy)[0], full[3])
    with torch.no_grad():
        assert torch.equal(rms_norm(x, weight, eps=EPS, residual=residual, impl=impl)[0], full[0])


@pytest.mark.each_impl("rms_norm")
def test_rows_stand_alone_and_runs_agree(impl, device):
    inputs = tensors(device, (9, 40), torch.float32, True)
    first, again = run(*inputs, impl), run(*inputs, impl)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    x, weight, residual, dy, dsum = inputs
    x = x.clone()
    x[4] = torch.nan
    dirty = run(x, weight, residual, dy, dsum, impl)
    others = torch.arange(9, device=device) != 4
    for clean, poisoned in zip(
        (first[0], first[1], first[2]), (dirty[0], dirty[1], dirty[2]), strict=True
    ):
        assert torch.equal(clean[others], poisoned[others])
    assert dirty[0][4].isnan().all()


@pytest.mark.cpu_only("the C++ kernels")
@pytest.mark.skipif(not native.capability, reason=native.reason)
def test_threads_change_nothing(device):
    inputs = tensors(device, (1500, 96), torch.float32, True)
    one = run(*inputs, "cpp")
    try:
        torch.set_num_threads(3)
        three = run(*inputs, "cpp")
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


def test_reference_gradcheck(device):
    x, weight, residual, *_ = (
        t.double().requires_grad_() for t in tensors(device, (3, 5), torch.float32, True)
    )
    for offset in (0.0, 1.0):
        assert torch.autograd.gradcheck(
            lambda x, w, r, offset=offset: rms_norm(x, w, eps=EPS, residual=r, offset=offset),
            (x, weight, residual),
        )


@pytest.mark.each_impl("rms_norm", but=("torch",))
@pytest.mark.parametrize("with_residual", [False, True])
def test_opcheck_and_compile(impl, with_residual, device):
    x, weight, residual, dy, dsum = tensors(device, (3, 2, 8), torch.float32, with_residual)
    leaves = [t if t is None else t.requires_grad_() for t in (x, weight, residual)]
    op = torch.ops.fusedrl.rms_norm if impl == "cpp" else _rms_norm_triton
    torch.library.opcheck(op, (*leaves, EPS, 1.0))

    def both(x, weight, residual):
        out = rms_norm(x, weight, eps=EPS, residual=residual, impl=impl)
        return (out * dy).sum() if residual is None else (out[0] * dy).sum() + (out[1] * dsum).sum()

    wanted = [t for t in leaves if t is not None]
    eager = torch.autograd.grad(both(*leaves), wanted)
    compiled = torch.autograd.grad(
        torch.compile(both, fullgraph=True, backend="aot_eager")(*leaves), wanted
    )
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))


@pytest.mark.cpu_only("values are read on the host, or an implementation is named, on a CPU alone")
def test_refuses_what_it_does_not_support(device):
    x, weight = torch.zeros(3, 4, device=device), torch.ones(4, device=device)
    with pytest.raises(ValueError, match=r"weight does not fit its pattern \[H\] with .*'H': 4"):
        rms_norm(x, torch.ones(5, device=device), eps=EPS)
    with pytest.raises(ValueError, match="residual does not fit"):
        rms_norm(x, weight, eps=EPS, residual=torch.zeros(2, 4, device=device))
    with pytest.raises(TypeError, match="expected weight of dtype float16"):
        rms_norm(x.half(), weight, eps=EPS)
    with pytest.raises(TypeError, match="expected weight of dtype float32, bfloat16, float16"):
        rms_norm(x, weight.double(), eps=EPS)
    with pytest.raises(TypeError, match="expected x of dtype"):
        rms_norm(x.long(), weight.long(), eps=EPS)
    with pytest.raises(ValueError, match="contiguous last dimension"):
        rms_norm(torch.zeros(4, 3, device=device).t(), weight, eps=EPS)
    with pytest.raises(ValueError, match="at least one value"):
        rms_norm(torch.zeros(3, 0, device=device), torch.ones(0, device=device), eps=EPS)
    with pytest.raises(RuntimeError, match="of float64: implementation 'cpp' cannot run"):
        rms_norm(x.double(), weight.double(), eps=EPS, impl="cpp")
    with pytest.raises(RuntimeError, match="rows above 8192: implementation 'triton' cannot run"):
        rms_norm(
            torch.zeros(1, 8193, device=device),
            torch.ones(8193, device=device),
            eps=EPS,
            impl="triton",
        )
