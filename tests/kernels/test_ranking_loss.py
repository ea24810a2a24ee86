import pytest
import torch

from fusedrl.kernels import native
from fusedrl.kernels.ranking_loss import pairwise_ranking_loss, pairwise_ranking_loss_reference

IMPLS = ["torch", pytest.param("cpp", marks=pytest.mark.skipif(not native.capability, reason=native.reason))]


# 0 and 1 pairs; sizes around a vector; differences so large that exp overflows when written naively.
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("B", [0, 1, 7, 16, 33])
@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
@pytest.mark.parametrize("with_margin", [False, True])
def test_matches_float64(impl, B, scale, with_margin):
    generator = torch.Generator().manual_seed(B)
    inputs = [torch.randn(B, generator=generator) * scale for _ in range(3 if with_margin else 2)]
    ours = [t.clone().requires_grad_() for t in inputs]
    want = [t.double().requires_grad_() for t in inputs]
    loss, expected = pairwise_ranking_loss(*ours, impl=impl), pairwise_ranking_loss_reference(*want)
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=1e-6)
    loss.backward()
    expected.backward()
    for got, reference in zip(ours, want, strict=True):
        torch.testing.assert_close(got.grad.double(), reference.grad, rtol=1e-5, atol=1e-6)


def test_reference_against_the_definition():
    chosen, rejected = torch.tensor([2.0, -1.0], dtype=torch.float64), torch.tensor([0.5, 0.25], dtype=torch.float64)
    margin = torch.tensor([0.25, 0.0], dtype=torch.float64)
    by_hand = -torch.log(1 / (1 + torch.exp(-(chosen - rejected - margin)))).mean()
    torch.testing.assert_close(pairwise_ranking_loss(chosen, rejected, margin, impl="torch"), by_hand)
    inputs = tuple(t.requires_grad_() for t in (chosen, rejected, margin))
    assert torch.autograd.gradcheck(pairwise_ranking_loss_reference, inputs)


@pytest.mark.skipif(not native.capability, reason=native.reason)
def test_opcheck_and_compile():
    chosen, rejected = torch.randn(5, requires_grad=True), torch.randn(5, requires_grad=True)
    torch.library.opcheck(torch.ops.fusedrl.pairwise_ranking_loss.default, (chosen, rejected, None))
    torch.library.opcheck(torch.ops.fusedrl.pairwise_ranking_loss_forward.default, (chosen.detach(), rejected.detach(), None))
    compiled = torch.compile(pairwise_ranking_loss, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(chosen, rejected), pairwise_ranking_loss(chosen, rejected))


def test_refuses_what_it_does_not_support():
    with pytest.raises(ValueError, match=r"rejected does not fit its pattern \[B\] with .*'B': 3"):
        pairwise_ranking_loss(torch.zeros(3), torch.zeros(4))
    with pytest.raises(TypeError, match="expected chosen of dtype"):
        pairwise_ranking_loss(torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="this op has torch, cpp; these can: torch"):
        pairwise_ranking_loss(torch.zeros(3), torch.zeros(3), impl="triton")
