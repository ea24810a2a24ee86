"""split_linear in Triton: the halves and the sums of torch, to the bit."""

import pytest
import torch

from fusedrl.kernels import split_linear as module
from fusedrl.kernels.split_linear import halves, split_linear

pytestmark = pytest.mark.usefixtures("triton_runs")


def numbers(device, *shape, seed=0):
    """Numbers of all magnitudes, ties between two bfloat16 among them."""
    draw = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(2**31), 2**31, shape, generator=draw).to(device).int()
    x = torch.where(bits % 3 == 0, (bits & -65536) | 0x8000, bits).view(torch.float32)
    # of numbers that are not normal the interpreter loses bits
    return torch.where((x.abs() > 1e-30) & (x.abs() < 3e38), x, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 341), (7, 1025), (0, 5), (5, 0)], ids=str)
def test_halves_are_those_of_torch(shape, dtype, device):
    draw = torch.Generator().manual_seed(1)
    x = numbers(device, *shape)
    if dtype == torch.float16:
        x = 40 * torch.randn(shape, generator=draw).to(device).half()
    both = module._split_triton(x)
    want = torch.cat(halves(x, torch.bfloat16))
    assert torch.equal(both.view(torch.int16), want.view(torch.int16))
    flipped = x.T.contiguous().T  # strides of its own
    assert torch.equal(module._split_triton(flipped).view(torch.int16), both.view(torch.int16))


def test_numbers_that_are_not_finite_give_nan(device):
    x = torch.tensor([[torch.inf, -torch.inf, torch.nan, 1.0]], device=device)
    both = module._split_triton(x)
    assert both.float().sum(0).isnan().tolist() == [True, True, True, False]


# few rows are one product of both halves, more than 256 two
@pytest.mark.parametrize("N", [1, 5, 257])
@pytest.mark.parametrize("biased", [False, True])
def test_results_are_those_of_torch(N, biased, device):
    draw = torch.Generator().manual_seed(N)
    x = torch.randn(N, 40, generator=draw).to(device)
    weight = torch.randn(33, 40, generator=draw).bfloat16().to(device)
    bias = torch.randn(33, generator=draw).bfloat16().to(device) if biased else None
    got, want = (split_linear(x, weight, bias, impl=impl) for impl in ("triton", "torch"))
    assert torch.equal(got, want)
    assert got.dtype == torch.float32
    exact = x.double() @ weight.double().T + (0.0 if bias is None else bias.double())
    assert (got - exact).abs().max() < 2e-4
    once = x.bfloat16().double() @ weight.double().T + (0.0 if bias is None else bias.double())
    assert (once - exact).abs().max() > 10 * (got - exact).abs().max()


def test_opcheck_and_compile(device):
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)).to(device)
    weight, bias = torch.ones(8, 40, device=device).bfloat16(), torch.ones(8, device=device)
    torch.library.opcheck(torch.ops.fusedrl.split_halves_triton.default, (x,))
    both = torch.randn(6, 8, generator=torch.Generator().manual_seed(1)).to(device)
    for b in (None, bias.bfloat16()):
        torch.library.opcheck(torch.ops.fusedrl.join_halves_triton.default, (both, b))
    compiled = torch.compile(split_linear, fullgraph=True, backend="aot_eager")
    want = split_linear(x, weight, bias.bfloat16(), impl="triton")
    assert torch.equal(compiled(x, weight, bias.bfloat16(), impl="triton"), want)
