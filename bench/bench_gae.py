"""gae compared with the textbook loop over T on torch tensors (a [B] vector per step), and
shaped_gae compared with the same chain of steps in torch."""

from __future__ import annotations

import pytest
import torch
from bench.harness import DEVICE, Random, agree, implementations, on

from fusedrl.kernels import gae as module
from fusedrl.kernels.gae import gae, shaped_gae

GAMMA, LAM, KL_COEF = 1.0, 0.95, 0.05


def python_loop(
    rewards_BT: torch.Tensor, values_BT: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """GAE as trainers write it."""
    running, next_value, reversed_advantages = 0.0, 0.0, []
    for t in reversed(range(rewards_BT.shape[1])):
        delta = rewards_BT[:, t] + GAMMA * next_value - values_BT[:, t]
        running = delta + GAMMA * LAM * running
        next_value = values_BT[:, t]
        reversed_advantages.append(running)
    advantages_BT = torch.stack(reversed_advantages[::-1], dim=1)
    return advantages_BT, advantages_BT + values_BT


def python_chain(logp_BT, ref_logp_BT, values_BT, scores_B, mask_BT):
    """KL-shaped rewards, the loop, whitening; right-padded sequences, one eager op after the
    other."""
    rewards_BT = torch.where(mask_BT, -KL_COEF * (logp_BT - ref_logp_BT), 0)
    rewards_BT[torch.arange(len(scores_B), device=DEVICE), mask_BT.sum(1) - 1] += scores_B
    advantages_BT, returns_BT = python_loop(rewards_BT, torch.where(mask_BT, values_BT, 0))
    chosen = advantages_BT[mask_BT]
    whitened = (advantages_BT - chosen.mean()) * torch.rsqrt(chosen.var(unbiased=False) + 1e-8)
    return torch.where(mask_BT, whitened, 0), torch.where(mask_BT, returns_BT, 0)


@pytest.mark.parametrize(
    "B, T", on(cpu=[(64, 2048), (512, 512), (8, 16384)], cuda=[(512, 4096), (64, 16384)])
)
def bench_gae(contest, B, T):
    random = Random()
    rewards, values = random.normal(B, T), random.normal(B, T)
    contestants = {
        name: lambda impl=impl: gae(rewards, values, gamma=GAMMA, lam=LAM, impl=impl)
        for name, impl in implementations(module, "gae").items()
    }
    # Two float32 read and two written a token.
    contest(
        "gae",
        f"{B} x {T}",
        torch.float32,
        {**contestants, "python loop over T": lambda: python_loop(rewards, values)},
        bytes_moved=16 * B * T,
        same=agree(5e-5, 5e-5),
    )


@pytest.mark.parametrize(
    "B, T", on(cpu=[(256, 1024), (64, 2048), (8, 16384)], cuda=[(256, 4096), (64, 16384)])
)
def bench_shaped_gae(contest, B, T):
    random = Random()
    values, logp = random.normal(B, T), random.normal(B, T)
    ref_logp, scores = logp + 0.1 * random.normal(B, T), random.normal(B)
    mask = torch.arange(T, device=DEVICE)[None] < random.integers(T // 2, T + 1, B, 1)

    def ours(impl: str):
        return lambda: shaped_gae(
            logp,
            ref_logp,
            values,
            scores,
            mask=mask,
            cu_seqlens=None,
            kl_coef=KL_COEF,
            gamma=GAMMA,
            lam=LAM,
            impl=impl,
        )[:2]

    contestants = {name: ours(impl) for name, impl in implementations(module, "shaped_gae").items()}
    # Three float32 and the mask read, three float32 written; whitening reads and writes the
    # advantages and reads the mask once more.
    contest(
        "shaped_gae, whitened",
        f"{B} x {T}",
        torch.float32,
        {
            **contestants,
            "python loop over T": lambda: python_chain(logp, ref_logp, values, scores, mask),
        },
        bytes_moved=34 * B * T,
        same=agree(5e-5, 5e-5),
    )
