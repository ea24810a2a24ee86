import json
import math

import pytest
import torch

from fusedrl.kernels import native
from fusedrl.kernels.normalize import RunningMoments, masked_whiten

IMPLS = ["torch", pytest.param("cpp", marks=pytest.mark.skipif(not native.capability, reason=native.reason))]


def definition(x, mask, shift_mean, unbiased, eps=1e-8):
    out, chosen = torch.zeros(x.shape, dtype=torch.float64), x.double()[mask]
    if chosen.numel():
        mean = chosen.mean()
        variance = ((chosen - mean) ** 2).sum() / max(1, chosen.numel() - unbiased)
        out[mask] = (chosen - mean) / (variance + eps).sqrt() + (0 if shift_mean else mean)
    return out


# The vector of "The N implementation details of RLHF with PPO": the variance of lm-human-preferences, and Bessel's.
@pytest.mark.parametrize("impl", IMPLS)
def test_published_vector(impl):
    x = torch.tensor([[1.2, 1.3, 1.4], [1.5, 1.6, 1.7], [1.8, 1.9, 2.0]])
    population = torch.tensor([[0.0508, 0.4381, 0.8254], [1.2127, 1.6000, 1.9873], [2.3746, 2.7619, 3.1492]])
    bessel = torch.tensor([[0.1394, 0.5046, 0.8697], [1.2349, 1.6000, 1.9651], [2.3303, 2.6954, 3.0606]])
    torch.testing.assert_close(masked_whiten(x, shift_mean=False, impl=impl), population, atol=5e-5, rtol=0)
    torch.testing.assert_close(masked_whiten(x, shift_mean=False, unbiased=True, impl=impl), bessel, atol=5e-5, rtol=0)


# Around the lanes and the blocks of the C++ kernel; a mean that cancels in E[x^2] - E[x]^2; NaN under the mask.
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("N", [0, 1, 2, 15, 17, 8192, 30001])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_matches_float64(impl, N, offset):
    generator = torch.Generator().manual_seed(N)
    x = torch.randn(N, generator=generator) + offset
    for mask in (torch.ones(N, dtype=torch.bool), torch.zeros(N, dtype=torch.bool), torch.rand(N, generator=generator) < 0.3, torch.arange(N) == N - 1):
        for shift_mean in (True, False):
            for unbiased in (True, False):
                hidden = torch.where(mask, x, float("nan"))
                got = masked_whiten(hidden, mask, shift_mean=shift_mean, unbiased=unbiased, impl=impl)
                torch.testing.assert_close(got.double(), definition(x, mask, shift_mean, unbiased), atol=1e-5, rtol=1e-5)
                assert torch.equal(got, masked_whiten(torch.where(mask, x, -1e30), mask, shift_mean=shift_mean, unbiased=unbiased, impl=impl))
    torch.testing.assert_close(masked_whiten(x, impl=impl), masked_whiten(x, torch.ones(N, dtype=torch.bool), impl=impl), atol=2e-7, rtol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_one_element_layouts_and_no_gradient(impl):
    one = torch.tensor([[3.5, float("nan")]], requires_grad=True)
    mask = torch.tensor([[True, False]])
    assert masked_whiten(one, mask, unbiased=True, impl=impl).tolist() == [[0.0, 0.0]]
    kept = masked_whiten(one, mask, shift_mean=False, impl=impl)
    assert kept.tolist() == [[3.5, 0.0]]
    assert not kept.requires_grad
    x = torch.randn(6, 7)
    torch.testing.assert_close(masked_whiten(x.t().contiguous().t(), impl=impl), masked_whiten(x, impl=impl), atol=1e-6, rtol=0)
    assert torch.equal(masked_whiten(x.bfloat16(), impl=impl), masked_whiten(x.bfloat16().float(), impl=impl))


def test_threads_change_nothing():
    x = torch.randn(100_003)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(masked_whiten(x, x > -1))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.skipif(not native.capability, reason=native.reason)
def test_opcheck_and_compile():
    x = torch.randn(3, 5)
    torch.library.opcheck(torch.ops.fusedrl.masked_whiten.default, (x, x > 0, True, False, 1e-8))
    compiled = torch.compile(masked_whiten, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, x > 0), masked_whiten(x, x > 0))


def test_refuses_what_it_does_not_support():
    with pytest.raises(ValueError, match=r"expected a mask of the shape and device of x, float32\[3\]"):
        masked_whiten(torch.zeros(3), torch.zeros(4, dtype=torch.bool))
    with pytest.raises(TypeError, match="expected mask of dtype bool"):
        masked_whiten(torch.zeros(3), torch.zeros(3))
    with pytest.raises(TypeError, match="expected x of dtype"):
        masked_whiten(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="these can: torch"):
        masked_whiten(torch.zeros(3), impl="triton")


def test_running_moments():
    generator = torch.Generator().manual_seed(0)
    parts = [1e4 + torch.randn(n, generator=generator) for n in (1, 0, 7, 300)]
    moments = RunningMoments()
    assert (moments.mean, moments.std, moments.count) == (0.0, 1.0, 0.0)
    for part in parts:
        moments.update(part)
    everything = torch.cat(parts).double()
    assert moments.count == 308
    assert math.isclose(moments.mean, everything.mean().item(), rel_tol=1e-12)
    assert math.isclose(moments.variance, everything.var(unbiased=False).item(), rel_tol=1e-9)
    assert math.isclose(moments.std, everything.std().item(), rel_tol=1e-9)


def test_running_moments_single_masked_and_resumed():
    moments = RunningMoments()
    assert moments.update(torch.tensor([2.0, float("nan")]), torch.tensor([True, False])) == (2.0, 0.0)
    assert (moments.mean, moments.std, moments.count) == (2.0, 0.0, 1.0)  # one element: no division by count - 1
    moments.update(torch.randn(5))
    other = RunningMoments()
    other.load_state_dict(json.loads(json.dumps(moments.state_dict())))
    batch = torch.randn(9)
    assert moments.update(batch) == other.update(batch)
    assert moments.state_dict() == other.state_dict()
    with pytest.raises(ValueError, match="expected finite elements"):
        moments.update(torch.tensor([1.0, float("inf")]))
    assert moments.state_dict() == other.state_dict()  # a refused batch leaves no trace
