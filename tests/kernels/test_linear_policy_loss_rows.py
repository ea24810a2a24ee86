"""Which rows are active moves no score: rows are scored in the products that score them before
their advantages are known."""

import pytest
import torch

from fusedrl.kernels.linear_logprob import linear_logprob
from fusedrl.kernels.linear_policy_loss import linear_policy_loss
from fusedrl.kernels.policy_loss import policy_loss
from fusedrl.kernels.runtime import native

pytestmark = [
    pytest.mark.cpu_only("the C++ kernels"),
    pytest.mark.skipif(not native.capability, reason=native.reason),
]
C = 40  # rows of a chunk


def problem(M, V, H, dtype, active, device):
    draw = torch.Generator().manual_seed(M * 100 + active)
    hidden = torch.randn(M, H, generator=draw).to(device, dtype).requires_grad_()
    weight = (torch.randn(V, H, generator=draw) / H**0.5).to(device, dtype).requires_grad_()
    ids, advantages = torch.randint(V, (M,), generator=draw).to(device), torch.zeros(M)
    advantages[torch.randperm(M, generator=draw)[: active * M // C + 1]] = 1.0
    return hidden, weight, ids, advantages.to(device), torch.full((M,), 1 / M, device=device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("H", "V"), [(40, 61), (64, 512), (288, 2000)])
def test_ratios_are_exactly_one_on_policy(H, V, dtype, device):
    """Over tails of all sizes: a product of one row has other bits than one of many."""
    for M in (41, 42, 43, 44, 45, 49, 52, 58, 60, 77, 79, 81, 99):
        for active in (0, 1, 3, 10, 19, 21, 40):
            hidden, weight, ids, advantages, weights = problem(M, V, H, dtype, active, device)
            logp, entropy = linear_logprob(
                hidden, weight, ids, entropy=True, workspace_bytes=C * V * 4, impl="cpp"
            )
            found = linear_policy_loss(
                hidden,
                weight,
                ids,
                logp.detach(),
                advantages,
                weights,
                workspace_bytes=C * V * 4,
                impl="cpp",
            )
            assert torch.equal(found.logp, logp.detach())
            assert torch.equal(found.entropy, entropy.detach())
            assert found.stats.ratio_min == found.stats.ratio_max == 1


@pytest.mark.parametrize("active", [0, 1, 7, 15, 19, 20, 21, 33, 40])
def test_gradients_of_few_active_rows(active, device):
    """However few of a chunk are active, over chunks that are laid aside and chunks that are
    not."""
    hidden, weight, ids, advantages, weights = problem(170, 300, 24, torch.float32, active, device)
    advantages[80:120] = 1.0  # one chunk of active rows among the others
    bias = torch.randn(300, generator=torch.Generator().manual_seed(1)).to(device).requires_grad_()
    logp, entropy = linear_logprob(hidden, weight, ids, bias=bias, entropy=True)
    old = logp.detach() - 0.1
    want = torch.autograd.grad(
        policy_loss(logp, old, advantages, weights, entropy=entropy)[0], (hidden, weight, bias)
    )
    loss = linear_policy_loss(
        hidden,
        weight,
        ids,
        old,
        advantages,
        weights,
        bias=bias,
        workspace_bytes=C * 300 * 4,
        impl="cpp",
    ).loss
    for got, exact in zip(torch.autograd.grad(loss, (hidden, weight, bias)), want, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-6 * exact.abs().max().item())
