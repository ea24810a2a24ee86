import math

import pytest
import torch

from fusedrl.kernels.runtime import native
from fusedrl.kernels.swiglu import _swiglu_triton, activate, swiglu, swiglu_reference


def tensors(device, N, F, dtype=torch.float32, scale=2.0):
    """gate_up and the upstream gradient."""
    generator = torch.Generator().manual_seed(N + F)
    return (torch.randn(N, 2 * F, generator=generator).to(device) * scale).to(dtype), torch.randn(
        N, F, generator=generator
    ).to(device).to(dtype)


def run(gate_up, dy, function, **options):
    leaf = gate_up.detach().requires_grad_()
    y = function(leaf, **options)
    return y.detach(), torch.autograd.grad(y, leaf, dy)[0]


def eager(gate_up):
    """As transformers computes it: silu is rounded to the dtype before it is multiplied."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


# F: one; around a vector of 8 or 16 and Triton's block of 1024. Scales: where sigmoid is curved,
# and where it has gone to 0 or 1 (exp(200) overflows).
@pytest.mark.each_impl("swiglu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "N,F,scale",
    [
        (0, 3, 1.0),
        (1, 1, 1.0),
        (5, 7, 2.0),
        (3, 16, 2.0),
        (9, 33, 10.0),
        (4, 172, 2.0),
        (3, 1025, 2.0),
        (2, 40, 100.0),
    ],
)
def test_against_float64(impl, dtype, N, F, scale, device):
    gate_up, dy = tensors(device, N, F, dtype, scale)
    exact = run(gate_up.double(), dy.double(), swiglu_reference)
    for ours, theirs, want in zip(
        run(gate_up, dy, swiglu, impl=impl), run(gate_up, dy, eager), exact, strict=True
    ):
        assert ours.dtype == dtype
        assert ours.shape == want.shape
        assert ours.isfinite().all()
        if N == 0:
            continue
        eps = torch.finfo(dtype).eps * want.abs().max()
        error, bound = (ours.double() - want).abs().max(), (theirs.double() - want).abs().max()
        assert error <= bound + 2 * eps, f"{error / eps:.2f} eps, torch {bound / eps:.2f}"


@pytest.mark.each_impl("swiglu", interpreted=False)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_once(impl, dtype, device):
    gate_up, dy = tensors(device, 40, 64, dtype)
    want = run(gate_up.double(), dy.double(), swiglu_reference)
    for ours, exact in zip(run(gate_up, dy, swiglu, impl=impl), want, strict=True):
        assert (ours != exact.to(dtype)).float().mean() < 1e-3
    # rounded twice: this test tells the difference
    assert (eager(gate_up) != want[0].to(dtype)).float().mean() > 0.05


@pytest.mark.each_impl("swiglu")
def test_far_from_zero_keeps_its_digits(impl, device):
    """Relative accuracy where 1 - sigmoid(gate) and sigmoid(gate) are tiny: a naive 1 - s is 0 from
    17 on, and e^-gate overflows below -88."""
    gate = torch.tensor(
        [-80.0, -60.0, -20.0, -1.0, 0.0, 1.0, 20.0, 60.0, 90.0, 200.0, -200.0], device=device
    )
    gate_up = torch.cat([gate, torch.ones_like(gate)])[None]
    ours = run(gate_up, torch.ones(1, len(gate), device=device), swiglu, impl=impl)
    want = run(gate_up.double(), torch.ones(1, len(gate), device=device).double(), swiglu_reference)
    for got, exact in zip(ours, want, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=5e-6, atol=1e-37)


@pytest.mark.each_impl("swiglu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_below_the_normal_numbers(impl, dtype, device):
    """e^-88 is no normal float32, but times 3e38 and more it is seen."""
    gate_up = torch.tensor(
        [[-88.0] * 40 + [3e38] * 20 + [math.inf] * 20], dtype=dtype, device=device
    )
    got = swiglu(gate_up, impl=impl).double()
    want = swiglu_reference(gate_up.double())
    rtol = 5e-6 if dtype == torch.float32 else 8e-3
    torch.testing.assert_close(got, want, rtol=rtol, atol=0)


@pytest.mark.each_impl("swiglu")
def test_strides_runs_and_poison(impl, device):
    wide, dy = torch.randn(6, 60, device=device), torch.randn(1, 12, device=device).expand(6, 12)
    got, want = (
        run(wide[:, 4:28], dy, swiglu, impl=impl),
        run(wide[:, 4:28].clone(), dy.clone(), swiglu, impl=impl),
    )
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    poisoned = wide[:, 4:28].clone()
    poisoned[2] = torch.nan
    dirty, others = run(poisoned, dy, swiglu, impl=impl), torch.arange(6, device=device) != 2
    assert all(
        torch.equal(a[others], b[others]) and b[2].isnan().all()
        for a, b in zip(want, dirty, strict=True)
    )


@pytest.mark.cpu_only("the C++ kernels")
@pytest.mark.skipif(not native.capability, reason=native.reason)
def test_threads_change_nothing(device):
    inputs = tensors(device, 1500, 96)
    one = run(*inputs, swiglu, impl="cpp")
    try:
        torch.set_num_threads(3)
        three = run(*inputs, swiglu, impl="cpp")
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


def test_reference_gradcheck(device):
    assert torch.autograd.gradcheck(swiglu, (tensors(device, 3, 5)[0].double().requires_grad_(),))


@pytest.mark.each_impl("swiglu", but=("torch",))
def test_opcheck_and_compile(impl, device):
    gate_up, dy = tensors(device, 3, 8)
    gate_up.requires_grad_()
    torch.library.opcheck(torch.ops.fusedrl.swiglu if impl == "cpp" else _swiglu_triton, (gate_up,))
    compiled = torch.compile(swiglu, fullgraph=True, backend="aot_eager")
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            run(gate_up, dy, compiled, impl=impl), run(gate_up, dy, swiglu, impl=impl), strict=True
        )
    )


@pytest.mark.cpu_only("values are read on the host, or an implementation is named, on a CPU alone")
def test_refuses_what_it_does_not_support(device):
    with pytest.raises(ValueError, match="as many gates as ups, got 5 columns"):
        swiglu(torch.zeros(3, 5, device=device))
    with pytest.raises(ValueError, match=r"does not fit its pattern \[N, 2F\]"):
        swiglu(torch.zeros(3, device=device))
    with pytest.raises(ValueError, match="contiguous last dimension"):
        swiglu(torch.zeros(4, 3, device=device).t())
    with pytest.raises(TypeError, match="expected gate_up of dtype"):
        swiglu(torch.zeros(3, 4, dtype=torch.int64, device=device))
    with pytest.raises(RuntimeError, match="these can: torch"):
        swiglu(torch.zeros(3, 4, dtype=torch.float64, device=device), impl="cpp")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu"])
def test_activate(activation, gated, dtype, device):
    gate_up, _ = tensors(device, 5, 33, dtype)
    wide = gate_up.double()
    x, up = wide.chunk(2, dim=-1) if gated else (wide, 1.0)
    inner = {
        "silu": torch.sigmoid,
        "gelu_tanh": lambda x: torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)),
        "gelu": torch.special.ndtr,
    }
    got, want = activate(gate_up, activation, gated=gated), x * inner[activation](x) * up
    assert got.dtype == dtype
    assert got.shape == want.shape
    eps = torch.finfo(dtype).eps
    # 1 + erf(x) cancels below 0, in torch's kernel
    torch.testing.assert_close(got.double(), want, rtol=2 * eps, atol=8 * eps)
