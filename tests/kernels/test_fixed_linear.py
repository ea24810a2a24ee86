"""fixed_linear: right, and the same bits for a row whatever stands around it."""

import functools

import pytest
import torch

from fusedrl.kernels.fixed_linear import fixed_linear
from fusedrl.kernels.runtime import native
from fusedrl.kernels.split_linear import halves

CPP = pytest.mark.skipif(not native.capability, reason=str(native.reason))
SIZES = [
    (1, 1, 1),
    (3, 257, 5),
    (64, 256, 32),
    (65, 300, 33),
    (130, 24, 100),
    (0, 8, 4),
    (5, 0, 3),
    (5, 8, 0),
]


def inputs(device, N, K, O, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(shape, generator=generator).to(device).to(dtype)
        for shape in ((N, K), (O, K), (O,))
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.each_impl("fixed_linear", interpreted=False)
def test_against_float64(size, dtype, impl, device):
    x, w, b = inputs(device, *size, dtype)
    for bias in (b, None):
        expected = x.double() @ w.double().T + (b.double() if bias is not None else 0.0)
        ours = fixed_linear(x, w, bias, impl=impl)
        assert ours.dtype == torch.float32
        # float32 sums of rounded inputs
        bound = 1e-6 * (x.double().abs() @ w.double().abs().T + 1.0)
        assert bool(((ours.double() - expected).abs() <= bound).all())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.each_impl("fixed_linear", interpreted=False)
def test_softcap_against_float64(size, impl, device):
    x, w, b = inputs(device, *size)
    for bias in (b, None):
        expected = 2.5 * torch.tanh(
            (x.double() @ w.double().T + (b.double() if bias is not None else 0.0)) / 2.5
        )
        bound = 2e-6 * (x.double().abs() @ w.double().abs().T + 1.0)
        assert bool(
            (
                (fixed_linear(x, w, bias, softcap=2.5, impl=impl).double() - expected).abs()
                <= bound
            ).all()
        )


@pytest.mark.cpu_only("the C++ kernels; Triton's rows are below")
@CPP
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_its_companions(dtype, softcap, device):
    x, w, b = inputs(device, 131, 300, 70, dtype)
    run = functools.partial(fixed_linear, softcap=softcap, impl="cpp")
    whole = run(x, w, b)
    assert torch.equal(whole, run(x, w, b))
    for n in (0, 1, 63, 64, 127, 130):
        assert torch.equal(run(x[n : n + 1], w, b), whole[n : n + 1])
        assert torch.equal(run(x[max(0, n - 32) : n + 1], w, b)[-1], whole[n])
    strange = torch.cat([torch.full_like(x[:40], torch.nan), x])
    assert torch.equal(run(strange, w, b)[40:], whole)


@pytest.mark.cpu_only("the C++ kernels, which have a way for few rows and one for many")
@CPP
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("K", [1, 15, 16, 31, 33, 64, 255, 257, 576])
@pytest.mark.parametrize("O", [1, 15, 16, 17, 32, 47, 70])
def test_few_rows_have_the_bits_of_many(O, K, dtype, device):
    x, w, b = inputs(device, 70, K, O, dtype)
    whole = fixed_linear(x, w, b, impl="cpp")
    for n in (1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 65, 66):
        for bias in (b, None):
            expected = whole if bias is not None else fixed_linear(x, w, impl="cpp")
            assert torch.equal(fixed_linear(x[-n:], w, bias, impl="cpp"), expected[-n:]), n
    spoilt = x[:3].clone()
    spoilt[0], spoilt[2] = torch.nan, torch.inf
    assert torch.equal(fixed_linear(spoilt, w, b, impl="cpp")[1], whole[1])


@pytest.mark.cpu_only("what its BLAS does")
@CPP
def test_the_negative_control(device):
    """The BLAS's rows do depend on their number, or the test above would show nothing."""
    x, w, _ = inputs(device, 131, 300, 70)
    whole = x @ w.T
    assert any(not torch.equal(x[n : n + 1] @ w.T, whole[n : n + 1]) for n in range(131))


@pytest.mark.cpu_only("threads of the C++ kernels")
@CPP
def test_threads_change_nothing(device):
    x, w, b = inputs(device, 70, 512, 3000)
    one = fixed_linear(x, w, b, impl="cpp")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(fixed_linear(x, w, b, impl="cpp"), one)
    finally:
        torch.set_num_threads(before)


@pytest.mark.cpu_only("the C++ kernels; Triton's are below")
@CPP
def test_strides_compile_and_opcheck(device):
    x, w, b = inputs(device, 9, 20, 12)
    wide = torch.randn(9, 40, device=device)
    wide[:, ::2] = x
    assert torch.equal(
        fixed_linear(wide[:, ::2], w.T.contiguous().T, b, impl="cpp"),
        fixed_linear(x, w, b, impl="cpp"),
    )
    torch.library.opcheck(torch.ops.fusedrl.fixed_linear.default, (x, w, b))
    torch.library.opcheck(torch.ops.fusedrl.fixed_linear.default, (x, w, None, 2.0))
    compiled = torch.compile(lambda x: fixed_linear(x, w, b), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), fixed_linear(x, w, b))


@pytest.mark.cpu_only("what the C++ kernels serve")
@CPP
def test_refuses(device):
    x, w, _ = inputs(device, 3, 4, 5)
    with pytest.raises(ValueError, match=r"fixed_linear: weight does not fit its pattern \[O, K\]"):
        fixed_linear(x, w[:, :3])
    with pytest.raises(ValueError, match="expected a softcap above 0 or None, got 0"):
        fixed_linear(x, w, softcap=0.0)
    with pytest.raises(TypeError, match="expected weight of dtype float32"):
        fixed_linear(x, w.double())
    with pytest.raises(TypeError, match="expected x of dtype float32, bfloat16"):
        fixed_linear(x.double(), w.double(), impl="cpp")
    with pytest.raises(
        RuntimeError,
        match=r"takes x and weights of one dtype, got torch\.float32 and bfloat16; these can: "
        r"torch",
    ):
        fixed_linear(x, w.bfloat16(), impl="cpp")


# ---- Triton --------------------------------------------------------------------------------------
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
PAIRS = [(F32, F32), (BF16, BF16), (F32, BF16), (F16, BF16)]


@pytest.mark.usefixtures("triton_runs")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
def test_triton_against_float64(size, dtypes, device):
    x, w, b = (
        t.to(dtype)
        for t, dtype in zip(inputs(device, *size), (dtypes[0], dtypes[1], dtypes[1]), strict=True)
    )
    for bias, softcap in ((b, None), (None, 2.5)):
        expected = x.double() @ w.double().T + (0.0 if bias is None else b.double())
        expected = expected if softcap is None else softcap * torch.tanh(expected / softcap)
        # float32 sums; of float32 beside bfloat16 two halves hold 16 bits
        bound = (2.0**-16 if dtypes == (F32, BF16) else 2e-6) * (
            x.double().abs() @ w.double().abs().T + 1.0
        )
        assert bool(
            (
                (fixed_linear(x, w, bias, softcap=softcap, impl="triton").double() - expected).abs()
                <= bound
            ).all()
        )


@pytest.mark.usefixtures("triton_runs")
@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_triton_rounds_the_halves_as_split_linear_does(dtype, device):
    """Also in the interpreter, which by itself cuts bits off: sampler and trainer then differ by
    four times as much."""
    x, _, _ = inputs(device, 9, 64, 1)
    x = (x * 3).to(dtype)
    y = fixed_linear(x, torch.eye(64, device=device).to(BF16), impl="triton")
    hi, lo = (half.float() for half in halves(x, BF16))
    assert torch.equal(y, lo + hi)


@pytest.mark.usefixtures("triton_runs")
@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
def test_a_row_of_triton_does_not_depend_on_its_companions(dtypes, device):
    x, w, b = (
        t.to(dtype)
        for t, dtype in zip(
            inputs(device, 131, 150, 70), (dtypes[0], dtypes[1], dtypes[1]), strict=True
        )
    )
    run = functools.partial(fixed_linear, weight=w, bias=b, softcap=4.0, impl="triton")
    whole = run(x)
    assert torch.equal(whole, run(x))
    for n in (0, 31, 64, 130):
        assert torch.equal(run(x[n : n + 1]), whole[n : n + 1])
        assert torch.equal(run(x[max(0, n - 32) : n + 1])[-1], whole[n])
    strange = torch.cat([torch.full_like(x[:40], torch.nan), x])
    assert torch.equal(run(strange)[40:], whole)


@pytest.mark.usefixtures("triton_runs")
def test_triton_in_the_compiler(device):
    x, w, b = inputs(device, 3, 20, 5)
    torch.library.opcheck(torch.ops.fusedrl.fixed_linear_triton.default, (x, w, b, 2.0))
    compiled = torch.compile(
        lambda x: fixed_linear(x, w, b, impl="triton"), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(x), fixed_linear(x, w, b, impl="triton"))
