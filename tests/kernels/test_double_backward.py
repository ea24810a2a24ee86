"""Gradients computed by hand carry no graph. A second derivative through them must be refused, not
taken for zero."""

import pytest
import torch

from fusedrl.kernels.attention import varlen_attention
from fusedrl.kernels.linear_logprob import linear_logprob
from fusedrl.kernels.logprob import logprob
from fusedrl.kernels.policy_loss import policy_loss
from fusedrl.kernels.runtime.dispatch import unavailable


def ids(x):
    return x.new_tensor([1, 0, 3], dtype=torch.int64)


OPS = {
    "logprob": lambda x, impl: logprob(x, ids(x), impl=impl),
    "linear_logprob": lambda x, impl: linear_logprob(x, x.detach().flip(0), ids(x) % 3, impl=impl),
    "varlen_attention": lambda x, impl: varlen_attention(
        *(x.view(3, 1, 4),) * 3, x.new_tensor([0, 3], dtype=torch.int32), max_length=3, impl=impl
    ),
    "policy_loss": lambda x, impl: policy_loss(
        x[:, 0], x.detach()[:, 1], x.detach()[:, 2], x.new_ones(3) / 3, impl=impl
    )[0],
}


@pytest.mark.parametrize("name", OPS)
def test_refused_by_the_fused_ops(name, device):
    fused = "cpp" if device.type == "cpu" else "triton"
    if unavailable(fused, device.type):
        pytest.skip(str(unavailable(fused, device.type)))
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    with pytest.raises(RuntimeError, match=r"double backward|no autograd formula"):
        (gradient,) = torch.autograd.grad(
            OPS[name](x.bfloat16() if (name, fused) == ("varlen_attention", "triton") else x, fused)
            .square()
            .sum(),
            x,
            create_graph=True,
        )
        gradient.square().sum().backward()


@pytest.mark.parametrize("name", ["logprob", "policy_loss"])
def test_defined_by_the_references(name, device):
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    (gradient,) = torch.autograd.grad(OPS[name](x, "torch").square().sum(), x, create_graph=True)
    gradient.square().sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("name", OPS)
def test_the_fused_ops_refuse_forward_mode(name, device):
    fused = "cpp" if device.type == "cpu" else "triton"
    if unavailable(fused, device.type):
        pytest.skip(str(unavailable(fused, device.type)))
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).to(device)
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(lambda x: OPS[name](x, fused), (x,), (x,))


def test_forward_mode_goes_by_torch_s_operations(device):
    """A tangent is never taken for zero."""
    generator = torch.Generator().manual_seed(0)
    x, tangent = (torch.randn(3, 4, generator=generator).to(device) for _ in range(2))

    def plain(x):
        return torch.log_softmax(x, -1).gather(1, ids(x)[:, None])[:, 0]

    _, got = torch.func.jvp(lambda x: logprob(x, ids(x)), (x,), (tangent,))
    torch.testing.assert_close(got, torch.func.jvp(plain, (x,), (tangent,))[1])
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        again = torch.autograd.forward_ad.unpack_dual(logprob(dual, ids(x))).tangent
    torch.testing.assert_close(again, got)
