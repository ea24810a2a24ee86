import math

import pytest
import torch

from fusedrl.kernels import native
from fusedrl.kernels.dispatch import unavailable
from fusedrl.kernels.linear_logprob import linear_logprob, linear_logprob_reference

CPP = pytest.param("cpp", marks=pytest.mark.skipif(not native.capability, reason=native.reason))
TRITON = pytest.param("triton", marks=pytest.mark.skipif(unavailable("triton", "cpu") is not None, reason="needs the interpreter of triton"))
IMPLS = ["torch", CPP, TRITON]


def problem(N, H, V, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed + N * 7919 + V)
    hidden, weight = torch.randn(N, H, generator=generator).to(dtype), (torch.randn(V, H, generator=generator) * 2 / math.sqrt(H)).to(dtype)
    ids, bias = torch.randint(0, V, (N,), generator=generator), torch.randn(V, generator=generator).to(dtype)
    if N > 3:
        ids[0], ids[1], ids[3] = 0, V - 1, -100
        hidden[3] = torch.nan  # an ignored row may hold anything
    g, h = torch.randn(N, generator=generator), torch.randn(N, generator=generator)
    if N > 5:
        g[4] = h[4] = 0.0  # a row that no gradient reaches
    return hidden, weight, ids, bias, g, h


def run(function, hidden, weight, ids, bias, g, h, **options):
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (hidden, weight, bias)]
    logp, entropy = function(leaves[0], leaves[1], ids, leaves[2], **options)
    ((logp * g.to(logp.dtype)).sum() + (entropy * h.to(logp.dtype)).sum()).backward()
    return [logp.detach(), entropy.detach(), *(leaf.grad for leaf in leaves if leaf is not None)]


def ours(impl, **rest):
    return lambda hidden, weight, ids, bias, **options: linear_logprob(hidden, weight, ids, bias=bias, entropy=True, impl=impl, **options, **rest)


def doubled(tensors):
    return [t.double() if t is not None and t.is_floating_point() else t for t in tensors]


# No rows, one row, a few, several chunks (workspaces of 1, 3 and 8 rows, and the default); V off the vector size and past one block.
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("N,H,V", [(0, 8, 33), (1, 8, 33), (7, 5, 2), (33, 16, 1025), (20, 64, 3000)])
@pytest.mark.parametrize("variant", ["plain", "bias", "softcap", "temperatures"])
def test_matches_float64(impl, N, H, V, variant):
    hidden, weight, ids, bias, g, h = problem(N, H, V)
    options = {"softcap": 3.0} if variant == "softcap" else {}
    options["temperature"] = torch.linspace(0.3, 3.0, N) if variant == "temperatures" else 0.7
    bias = bias if variant in ("bias", "softcap") else None
    wide = {**options, "temperature": options["temperature"].double() if variant == "temperatures" else 0.7}
    want = run(linear_logprob_reference, *doubled((hidden, weight, ids, bias, g, h)), **wide)
    scale = max(1.0, float((hidden.nan_to_num() @ weight.t()).abs().max())) if N else 1.0
    for rows in (1, 3, 8, None):
        got = run(ours(impl, workspace_bytes=None if rows is None else rows * V * 4), hidden, weight, ids, bias, g, h, **options)
        assert got[0].dtype == got[1].dtype == torch.float32
        for name, a, b in zip(("logp", "entropy", "hidden", "weight", "bias"), got, want, strict=False):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5 * scale, msg=lambda text, name=name: f"{name}: {text}")
        assert N < 4 or ((got[0][3], got[1][3]) == (0, 0) and (got[2][3] == 0).all())
        assert N < 6 or (got[2][4] == 0).all()


# Logits are float32 whatever the weight, and so is the sum of the weight's gradient over 20 chunks of one row.
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(impl, dtype):
    hidden, weight, ids, bias, g, h = problem(20, 64, 1500, dtype)
    want = run(linear_logprob_reference, *doubled((hidden, weight, ids, bias, g, h)))
    for rows in (1, 64):
        got = run(ours(impl, workspace_bytes=rows * 1500 * 4), hidden, weight, ids, bias, g, h)
        assert got[2].dtype == got[3].dtype == got[4].dtype == dtype
        for a, b in zip(got[:2], want[:2], strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-4)
        for a, b in zip(got[2:], want[2:], strict=True):  # one rounding
            torch.testing.assert_close(a.double(), b.to(dtype).double(), rtol=torch.finfo(dtype).eps, atol=1e-4 * float(b.abs().max()))


@pytest.mark.skipif(not native.capability, reason=native.reason)
def test_weights_wider_than_one_tile():
    hidden, weight, ids, bias, g, h = problem(9, 2048, 1100, torch.bfloat16)  # 4 MiB of float32 hold 512 rows
    want = run(linear_logprob_reference, *doubled((hidden, weight, ids, bias, g, h)))
    got = run(ours("cpp"), hidden, weight, ids, bias, g, h)
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(got[2].double(), want[2], rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scoring_and_training_agree_bitwise(impl, dtype):
    hidden, weight, ids, bias, _, _ = problem(200, 32, 700, dtype)
    options = {"bias": bias, "temperature": 0.7, "impl": impl, "workspace_bytes": 37 * 700 * 4}
    with torch.no_grad():
        scored = linear_logprob(hidden, weight, ids, **options)
    trained = linear_logprob(hidden.clone().requires_grad_(), weight.clone().requires_grad_(), ids, entropy=True, **options)[0]
    assert torch.equal(scored, trained)
    assert torch.equal(linear_logprob(hidden, weight, ids, **options), scored)
    poisoned = hidden.clone()
    poisoned[ids == -100] = 1e9
    assert torch.equal(linear_logprob(poisoned, weight, ids, **options), scored)


@pytest.mark.parametrize("impl", IMPLS)
def test_two_backward_runs_agree_bitwise_and_inputs_stay(impl):
    inputs = problem(50, 16, 300)
    before = [t.clone() for t in inputs]
    first, second = (run(ours(impl, workspace_bytes=7 * 1200), *inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(inputs, before, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_only_what_is_asked_for(impl):
    hidden, weight, ids, bias, g, _ = problem(12, 8, 40)
    want = run(linear_logprob_reference, *doubled((hidden, weight, ids, bias, g, torch.zeros(12))))
    for which in range(3):
        leaves = [t.clone().requires_grad_(i == which) for i, t in enumerate((hidden, weight, bias))]
        (linear_logprob(leaves[0], leaves[1], ids, bias=leaves[2], impl=impl) * g).sum().backward()
        torch.testing.assert_close(leaves[which].grad.double(), want[2 + which], rtol=1e-5, atol=1e-5)
        assert [leaf.grad is not None for leaf in leaves] == [i == which for i in range(3)]
    ignored = torch.full((12,), -100)
    leaf = weight.clone().requires_grad_()
    logp = linear_logprob(hidden, leaf, ignored, impl=impl)
    assert torch.equal(logp, torch.zeros(12))
    logp.sum().backward()
    assert (leaf.grad == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_transposed_and_strided_inputs(impl):
    hidden, weight, ids, _, _, _ = problem(12, 8, 40)
    plain = linear_logprob(hidden, weight, ids, impl=impl)
    strided = torch.zeros(12, 11)[:, :8].copy_(hidden)
    torch.testing.assert_close(linear_logprob(strided, weight.t().contiguous().t(), ids.int(), impl=impl), plain, rtol=1e-6, atol=1e-6)


def test_reference_gradient():
    hidden, weight, _, bias, _, _ = doubled(problem(3, 4, 5))
    inputs = tuple(t.requires_grad_() for t in (hidden, weight, bias))
    ids = torch.tensor([1, -100, 4])
    for function in (lambda x, w, b: linear_logprob_reference(x, w, ids, b, 0.7, 2.0),
                     lambda x, w, b: linear_logprob(x, w, ids, bias=b, temperature=0.7, softcap=2.0, entropy=True, workspace_bytes=8, impl="torch")):
        assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.skipif(not native.capability, reason=native.reason)
def test_memory_stays_within_the_workspace():
    hidden, weight, ids, _, _, _ = problem(4000, 8, 5000)  # 80 MB of logits
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        linear_logprob(hidden, weight, ids, workspace_bytes=1 << 20)
    largest = max(event.cpu_memory_usage for event in profile.events() if event.name == "aten::empty")
    assert largest <= 1 << 20


@pytest.mark.parametrize("impl", IMPLS)
def test_refuses_what_it_does_not_support(impl):
    hidden, weight, ids = torch.zeros(3, 4), torch.zeros(5, 4), torch.tensor([0, 1, 2])
    with pytest.raises(IndexError, match=r"linear_logprob: expected token ids in \[0, 5\) or ignore_index -100, got 5 in row 2"):
        linear_logprob(hidden, weight, torch.tensor([0, 1, 5]), impl=impl)
    with pytest.raises(ValueError, match=r"weight does not fit its pattern \[V, H\] with .*'H': 4"):
        linear_logprob(hidden, torch.zeros(5, 3), ids, impl=impl)
    with pytest.raises(TypeError, match="expected weight of dtype float32, got bfloat16"):
        linear_logprob(hidden, weight.bfloat16(), ids, impl=impl)
    for wrong in ({"temperature": 0.0}, {"softcap": -1.0}, {"workspace_bytes": 0}):
        with pytest.raises(ValueError, match="above 0"):
            linear_logprob(hidden, weight, ids, impl=impl, **wrong)
    with pytest.raises(RuntimeError, match="these can: torch"):
        linear_logprob(hidden, weight, ids, impl="triton")


@pytest.mark.skipif(not native.capability, reason=native.reason)
def test_opcheck_and_compile():
    hidden, weight, ids, bias, g, h = problem(6, 8, 40)
    hidden = hidden.nan_to_num()
    leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    for entropy in (False, True):
        torch.library.opcheck(torch.ops.fusedrl.linear_logprob.default, (leaves[0], leaves[1], ids, leaves[2], 0.7, None, 0.0, entropy, -100, -1))
        torch.library.opcheck(torch.ops.fusedrl.linear_logprob_forward.default, (hidden, weight, ids, None, 0.7, None, 3.0, entropy, -100, -1))
    torch.library.opcheck(torch.ops.fusedrl.linear_logprob_backward.default,
                          (g, h, hidden, weight, ids, bias, torch.ones(6, 3), 0.7, None, 3.0, -100, -1, True, True, True))

    def loss(hidden, weight, bias):
        logp, entropy = linear_logprob(hidden, weight, ids, bias=bias, temperature=0.7, entropy=True)
        return (logp * g).sum() + (entropy * h).sum()

    grads = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    assert all(torch.equal(a, b) for a, b in zip(grads, compiled, strict=True))
