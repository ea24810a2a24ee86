import itertools
import math

import pytest
import torch

from fusedrl.engine.tools.verify.catalogue import CATALOGUE
from fusedrl.kernels.ranking_loss import (
    kwise_ranking_loss,
    kwise_ranking_loss_reference,
    pairwise_ranking_loss,
    pairwise_ranking_loss_reference,
)
from fusedrl.kernels.runtime import native
from fusedrl.kernels.runtime.dispatch import unavailable


# 0 and 1 pairs; sizes around a vector and Triton's chunk; differences so large that exp overflows
# when written naively.
@pytest.mark.each_impl("pairwise_ranking_loss")
@pytest.mark.parametrize("B", [0, 1, 7, 16, 33, 1024, 1025])
@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
@pytest.mark.parametrize("with_margin", [False, True])
def test_matches_float64(impl, B, scale, with_margin, device):
    generator = torch.Generator().manual_seed(B)
    inputs = [
        torch.randn(B, generator=generator).to(device) * scale
        for _ in range(3 if with_margin else 2)
    ]
    ours = [t.clone().requires_grad_() for t in inputs]
    want = [t.double().requires_grad_() for t in inputs]
    loss, expected = pairwise_ranking_loss(*ours, impl=impl), pairwise_ranking_loss_reference(*want)
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=1e-6)
    loss.backward()
    expected.backward()
    for got, reference in zip(ours, want, strict=True):
        torch.testing.assert_close(got.grad.double(), reference.grad, rtol=1e-5, atol=1e-6)


def test_reference_against_the_definition(device):
    chosen, rejected = (
        torch.tensor([2.0, -1.0], dtype=torch.float64, device=device),
        torch.tensor([0.5, 0.25], dtype=torch.float64, device=device),
    )
    margin = torch.tensor([0.25, 0.0], dtype=torch.float64, device=device)
    by_hand = -torch.log(1 / (1 + torch.exp(-(chosen - rejected - margin)))).mean()
    torch.testing.assert_close(
        pairwise_ranking_loss(chosen, rejected, margin, impl="torch"), by_hand
    )
    inputs = tuple(t.requires_grad_() for t in (chosen, rejected, margin))
    assert torch.autograd.gradcheck(pairwise_ranking_loss_reference, inputs)


@pytest.mark.each_impl("pairwise_ranking_loss", but=("torch",))
def test_opcheck_and_compile(impl, device):
    chosen, rejected = (
        torch.randn(5, requires_grad=True, device=device),
        torch.randn(5, requires_grad=True, device=device),
    )
    for margin in (None, torch.randn(5, device=device)):
        op = (
            torch.ops.fusedrl.pairwise_ranking_loss
            if impl == "cpp"
            else torch.ops.fusedrl.pairwise_ranking_loss_triton
        )
        torch.library.opcheck(op.default, (chosen, rejected, margin))
    if impl == "cpp":
        torch.library.opcheck(
            torch.ops.fusedrl.pairwise_ranking_loss_forward.default,
            (chosen.detach(), rejected.detach(), None),
        )
    compiled = torch.compile(pairwise_ranking_loss, fullgraph=True, backend="aot_eager")
    assert torch.equal(
        compiled(chosen, rejected, impl=impl), pairwise_ranking_loss(chosen, rejected, impl=impl)
    )
    strided = torch.stack([chosen, rejected], 1).unbind(1)
    assert torch.equal(
        pairwise_ranking_loss(*strided, impl=impl),
        pairwise_ranking_loss(chosen, rejected, impl=impl),
    )


@pytest.mark.cpu_only("values are read on the host, or an implementation is named, on a CPU alone")
def test_refuses_what_it_does_not_support(device):
    with pytest.raises(ValueError, match=r"rejected does not fit its pattern \[B\] with .*'B': 3"):
        pairwise_ranking_loss(torch.zeros(3, device=device), torch.zeros(4, device=device))
    with pytest.raises(TypeError, match="expected chosen of dtype"):
        pairwise_ranking_loss(
            torch.zeros(3, dtype=torch.int64, device=device),
            torch.zeros(3, dtype=torch.int64, device=device),
        )
    with pytest.raises(RuntimeError, match="this op has torch, cpp, triton; these can: torch"):
        pairwise_ranking_loss(
            torch.zeros(3, device=device), torch.zeros(3, device=device), impl="cuda"
        )


@pytest.mark.each_impl("pairwise_ranking_loss", but=("torch",))
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_double_backward_is_refused_not_wrong(impl, which, device):
    inputs = [torch.randn(4, device=device) for _ in range(3)]
    x = inputs[which].requires_grad_()
    for loss in (
        pairwise_ranking_loss(*inputs, impl=impl),
        kwise_ranking_loss(
            x,
            torch.arange(4, device=device),
            torch.tensor([0, 4], dtype=torch.int32, device=device),
            impl=impl,
        ),
    ):
        with pytest.raises(
            RuntimeError, match="ranking_loss: expected one backward pass, got a double backward"
        ):
            torch.autograd.grad(loss, x, create_graph=True)
    (slope,) = torch.autograd.grad(
        pairwise_ranking_loss(*inputs, impl="torch"), x, create_graph=True
    )
    assert torch.autograd.grad(slope.square().sum(), x)[0].abs().sum() > 0


# ---- K-wise --------------------------------------------------------------------------------------
def kwise_by_hand(scores, ranks, groups):
    means = []
    for first, end in itertools.pairwise(groups):
        pairs = [
            math.log1p(math.exp(-abs(d))) + max(-d, 0.0)
            for i in range(first, end)
            for j in range(first, end)
            if ranks[i] < ranks[j]
            for d in [scores[i] - scores[j]]
        ]
        means += [math.fsum(pairs) / len(pairs)] if pairs else []
    return math.fsum(means) / len(means) if means else 0.0


# K = 0, 1, 2 ... 9 and 40; all ranks tied; some tied; ranks that are not 1 ... K; nothing at all;
# differences that overflow a naive exp.
SIZES = [[], [0], [1], [2], [0, 1, 3, 0, 2, 4, 5, 6, 7, 8, 9, 1], [40, 2]]


@pytest.mark.each_impl("kwise_ranking_loss")
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_kwise_is_the_definition(impl, sizes, scale, device):
    generator = torch.Generator().manual_seed(len(sizes))
    groups = torch.tensor([0, *sizes], device=device).cumsum(0).int()
    M = int(groups[-1])
    scores = torch.randn(M, generator=generator).to(device) * scale
    for ranks in (
        torch.rand(M, generator=generator).to(device).argsort() + 1,
        torch.randint(-2, 3, (M,), generator=generator).to(device).int(),
        torch.ones(M, dtype=torch.int64, device=device),
    ):
        ours, want = scores.clone().requires_grad_(), scores.double().requires_grad_()
        loss = kwise_ranking_loss(ours, ranks, groups, impl=impl)
        assert loss.item() == pytest.approx(
            kwise_by_hand(scores.tolist(), ranks.tolist(), groups.tolist()), rel=2e-6, abs=1e-6
        )
        loss.backward()
        kwise_ranking_loss_reference(want, ranks, groups).backward()
        torch.testing.assert_close(ours.grad.double(), want.grad, rtol=1e-5, atol=1e-6)
        again = kwise_ranking_loss(scores, ranks, groups, impl=impl)
        assert torch.equal(again, loss)


@pytest.mark.each_impl("kwise_ranking_loss")
def test_kwise_of_two_is_pairwise_and_prompts_count_alike(impl, device):
    scores, two = (
        torch.randn(10, device=device),
        torch.arange(0, 11, 2, dtype=torch.int32, device=device),
    )
    want = pairwise_ranking_loss(scores[1::2], scores[::2], impl=impl)
    torch.testing.assert_close(
        kwise_ranking_loss(scores, torch.tensor([2, 1] * 5, device=device), two, impl=impl), want
    )
    a, b = torch.randn(2, device=device), torch.randn(9, device=device)
    alone = [
        kwise_ranking_loss(
            s,
            torch.arange(len(s), device=device),
            torch.tensor([0, len(s)], dtype=torch.int32, device=device),
            impl=impl,
        )
        for s in (a, b)
    ]
    # the third prompt has no pair, and may hold anything
    ranks = torch.cat(
        [
            torch.arange(2, device=device),
            torch.arange(9, device=device),
            torch.ones(3, dtype=torch.int64, device=device),
        ]
    )
    together = kwise_ranking_loss(
        torch.cat([a, b, torch.full((3,), float("nan"), device=device)]),
        ranks,
        torch.tensor([0, 2, 11, 14], dtype=torch.int32, device=device),
        impl=impl,
    )
    torch.testing.assert_close(together, (alone[0] + alone[1]) / 2)


def test_kwise_gradcheck_opcheck_and_compile(device):
    ranks, groups = (
        torch.tensor([1, 3, 3, 2, 1], device=device),
        torch.tensor([0, 3, 5], dtype=torch.int32, device=device),
    )
    assert torch.autograd.gradcheck(
        lambda s: kwise_ranking_loss_reference(s, ranks, groups),
        torch.randn(5, dtype=torch.float64, requires_grad=True, device=device),
    )
    scores = torch.randn(5, requires_grad=True, device=device)
    for impl in CATALOGUE["kwise_ranking_loss"].implementations(device):
        compiled = torch.compile(kwise_ranking_loss, fullgraph=True, backend="aot_eager")
        assert torch.equal(
            compiled(scores, ranks, groups, impl=impl),
            kwise_ranking_loss(scores, ranks, groups, impl=impl),
        )
    if native.capability and device.type == "cpu":
        torch.library.opcheck(torch.ops.fusedrl.kwise_ranking_loss.default, (scores, ranks, groups))
        torch.library.opcheck(
            torch.ops.fusedrl.kwise_ranking_loss_forward.default, (scores.detach(), ranks, groups)
        )
    if unavailable("triton", device.type) is None:
        torch.library.opcheck(
            torch.ops.fusedrl.kwise_ranking_loss_triton.default, (scores, ranks, groups)
        )


@pytest.mark.cpu_only("values are read on the host, or an implementation is named, on a CPU alone")
def test_kwise_refuses(device):
    scores, ranks, groups = (
        torch.zeros(3, device=device),
        torch.arange(3, device=device),
        torch.tensor([0, 3], dtype=torch.int32, device=device),
    )
    with pytest.raises(ValueError, match=r"ranks does not fit its pattern \[M\]"):
        kwise_ranking_loss(scores, ranks[:2], groups)
    with pytest.raises(TypeError, match="expected cu_groups of dtype int32"):
        kwise_ranking_loss(scores, ranks, groups.long())
    with pytest.raises(ValueError, match="no prompts are a single 0"):
        kwise_ranking_loss(scores, ranks, groups[:0])
    if native.capability:
        with pytest.raises(
            ValueError, match="to ascend from 0 to the number of scores, 3, got 0 to 2"
        ):
            kwise_ranking_loss(
                scores, ranks, torch.tensor([0, 2], dtype=torch.int32, device=device), impl="cpp"
            )
