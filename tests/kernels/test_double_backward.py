"""Gradients computed by hand carry no graph. A second derivative through them must be refused, not taken for zero."""
import pytest
import torch

from fusedrl.kernels import native
from fusedrl.kernels.attention import varlen_attention
from fusedrl.kernels.linear_logprob import linear_logprob
from fusedrl.kernels.logprob import logprob
from fusedrl.kernels.policy_loss import policy_loss

pytestmark = pytest.mark.skipif(not native.capability, reason=native.reason)
IDS = torch.tensor([1, 0, 3])
OPS = {
    "logprob": lambda x, impl: logprob(x, IDS, impl=impl),
    "linear_logprob": lambda x, impl: linear_logprob(x, x.detach().flip(0), IDS % 3, impl=impl),
    "varlen_attention": lambda x, impl: varlen_attention(*(x.view(3, 1, 4),) * 3, torch.tensor([0, 3], dtype=torch.int32), max_length=3, impl=impl),
    "policy_loss": lambda x, impl: policy_loss(x[:, 0], x.detach()[:, 1], x.detach()[:, 2], torch.ones(3) / 3, impl=impl)[0],
}


@pytest.mark.parametrize("name", OPS)
def test_refused_by_the_native_ops(name):
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with pytest.raises(RuntimeError, match="double backward"):
        (gradient,) = torch.autograd.grad(OPS[name](x, "cpp").square().sum(), x, create_graph=True)
        gradient.square().sum().backward()


@pytest.mark.parametrize("name", ["logprob", "policy_loss"])
def test_defined_by_the_references(name):
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (gradient,) = torch.autograd.grad(OPS[name](x, "torch").square().sum(), x, create_graph=True)
    gradient.square().sum().backward()
    assert x.grad.abs().sum() > 0
