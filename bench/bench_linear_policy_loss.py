"""linear_policy_loss, forward and backward, compared with its products alone, with our
linear_logprob and policy_loss, with eager PyTorch and with torch.compile. Also its time by the
number of active rows, and its memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from bench.harness import (
    DEVICE,
    Random,
    Times,
    agree,
    compiled,
    implementations,
    liger,
    on,
    peak_memory,
)
from torch import Tensor

from fusedrl.kernels import linear_policy_loss as module
from fusedrl.kernels.linear_logprob import linear_logprob
from fusedrl.kernels.linear_policy_loss import linear_policy_loss
from fusedrl.kernels.policy_loss import policy_loss

((N, H, V),) = on(cpu=[(2048, 512, 32000)], cuda=[(8192, 4096, 151936)])
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
SEQUENCES = 8  # of one advantage each, as Liger has it
SHAPE = f"{N} x {H} x {V}"
Columns = tuple[Tensor, Tensor, Tensor, Tensor]  # ids, old_logp, advantages, weights


# ---- the opponents: what a careful author writes with tensor operations --------------------------
def eager(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    weights: Tensor,
) -> Tensor:
    """PPO's clipped loss through the head, with the entropy as a statistic."""
    logits = (hidden @ weight.t()).float()
    logps = logits.log_softmax(-1)
    logp = logps.gather(-1, ids[:, None]).squeeze(-1)
    with torch.no_grad():
        -(logps.exp() * logps).sum(-1).mean()
    ratio = (logp - old_logp).exp()
    return (weights * torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))).sum()


def two_steps(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    weights: Tensor,
) -> Tensor:
    logp, entropy = linear_logprob(hidden, weight, ids, entropy=True)
    return policy_loss(logp, old_logp, advantages, weights, entropy=entropy)[0]


def liger_loss(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    weights: Tensor,
) -> Tensor:
    loss = liger("chunked_loss.LigerFusedLinearGRPOLoss")(
        beta=0.0, use_ref_model=False, loss_type="bnpo"
    )
    ids_BT, old_BT = (x.view(SEQUENCES, -1) for x in (ids, old_logp))
    out = loss(
        hidden.view(SEQUENCES, -1, H),
        weight,
        ids_BT,
        torch.ones_like(old_BT),
        advantages.view(SEQUENCES, -1)[:, 0],
        old_per_token_logps=old_BT,
    )
    return out[0] if isinstance(out, tuple) else out


def ours(impl: str) -> Callable[..., Tensor]:
    return lambda *arguments: linear_policy_loss(*arguments, impl=impl)[0]


# ---- inputs --------------------------------------------------------------------------------------
def head() -> tuple[list[Tensor], Tensor, Tensor]:
    """[hidden, weight], ids, weights; made in place, so that the peak of memory is that of the
    call."""
    random = Random()
    hidden, weight = (
        torch.empty(N, H, dtype=DTYPE, device=DEVICE),
        torch.empty(V, H, dtype=DTYPE, device=DEVICE),
    )
    hidden.normal_(generator=random.generator)
    weight.normal_(std=H**-0.5, generator=random.generator)
    return (
        [hidden.requires_grad_(), weight.requires_grad_()],
        random.integers(0, V, N),
        torch.full((N,), 1 / N, device=DEVICE),
    )


def columns(leaves: list[Tensor], ids: Tensor, weights: Tensor, active: Tensor) -> Columns:
    """On policy, so that nothing is clipped; with no KL and no entropy bonus a zero advantage is a
    zero gradient."""
    with torch.no_grad():
        old_logp = linear_logprob(*leaves, ids)
    return (
        ids,
        old_logp,
        torch.where(active, Random(1).normal(SEQUENCES).repeat_interleave(N // SEQUENCES), 0.0),
        weights,
    )


def both(
    loss: Callable[..., Tensor], leaves: list[Tensor], arguments: Columns
) -> Callable[[], tuple[Tensor, ...]]:
    """The contestant: the loss and its gradients in hidden and weight."""

    def call() -> tuple[Tensor, ...]:
        value = loss(*leaves, *arguments)
        return value.detach(), *torch.autograd.grad(value, leaves)

    return call


same = (
    agree(rtol=2e-2, of_max=2e-2)
    if torch.bfloat16 == DTYPE
    else agree(rtol=1e-4, atol=1e-6, of_max=1e-5)
)


# ---- memory --------------------------------------------------------------------------------------
def memory_case() -> dict[str, Callable[[], object]]:
    """Ours and eager with every row active: a ratio below 1 is not clipped at a positive advantage.
    Computing old_logp would leave a peak of its own."""
    leaves, ids, weights = head()
    arguments = (ids, torch.zeros(N, device=DEVICE), torch.ones(N, device=DEVICE), weights)
    return {
        "fusedrl": both(lambda *a: linear_policy_loss(*a)[0], leaves, arguments),
        "eager": both(eager, leaves, arguments),
    }


def memory(_: Times) -> dict[str, float]:
    """Peak beyond the inputs and the weight gradient, each contestant in a process of its own; see
    `peak_memory`."""
    gradient = V * H * DTYPE.itemsize
    mine, theirs = (
        peak_memory("bench.bench_linear_policy_loss", "memory_case", name) - gradient
        for name in ("fusedrl", "eager")
    )
    return {
        "peak memory beyond inputs and weight gradient, MB": mine / 1e6,
        "eager's, MB": theirs / 1e6,
        "ours / eager's, %": 100 * mine / theirs,
    }


# ---- the contests --------------------------------------------------------------------------------
@pytest.mark.parametrize("share", [1.0, 0.5, 0.1])
def bench_forward_backward(contest, share):
    leaves, ids, weights = head()
    active = Random(2).uniform(N) < share
    arguments = columns(leaves, ids, weights, active)
    contestants = {
        name: both(ours(impl), leaves, arguments)
        for name, impl in implementations(module, "linear_policy_loss").items()
    }
    contestants |= {
        "fusedrl, two steps": both(two_steps, leaves, arguments),
        "eager": both(eager, leaves, arguments),
    }
    if share == 1.0:
        contestants["torch.compile"] = both(compiled(eager), leaves, arguments)
        if liger("chunked_loss.LigerFusedLinearGRPOLoss"):
            contestants["Liger GRPO loss"] = both(liger_loss, leaves, arguments)
        gradient = Random(3).normal(N, V, dtype=DTYPE)

        def products() -> None:
            """The three products alone, on logits and gradients that exist already."""
            with torch.no_grad():
                leaves[0] @ leaves[1].t(), gradient @ leaves[1], gradient.t() @ leaves[0]

        contestants["its three products"] = products
    # 2 N H V for the logits, and 4 for each active row's part in the two gradients.
    contest(
        "linear_policy_loss fwd + bwd",
        SHAPE,
        DTYPE,
        contestants,
        flops=int((2 + 4 * active.float().mean().item()) * N * H * V),
        same=same,
        unchecked={"its three products"},
        note=f"{share:.0%} of the rows active",
        derive=memory if share == 1.0 else None,
    )


def bench_rows_left_out(contest):
    """Measure the cost of the backward products when half of the rows are active.

    The three calls differ in their advantages alone: all rows are scored in each, and with none
    active no gradient is formed. So (half - none) over (all - none), round by round, is the cost of
    forming half of the gradients and multiplying them, relative to all.
    """
    leaves, ids, weights = head()
    at = torch.arange(N, device=DEVICE)
    loss = ours(next(iter(implementations(module, "linear_policy_loss").values())))
    shares = {"fusedrl": at >= 0, "half of the rows active": at % 2 == 0, "no row active": at < 0}

    def left(times: Times) -> dict[str, float]:
        every, half, none = (torch.tensor(values, dtype=torch.float64) for values in times.values())
        return {"backward products, half / all": ((half - none) / (every - none)).median().item()}

    contest(
        "linear_policy_loss, rows left out",
        SHAPE,
        DTYPE,
        {
            name: both(loss, leaves, columns(leaves, ids, weights, active))
            for name, active in shares.items()
        },
        same=None,
        derive=left,
    )
