"""gae on CPU, one thread, against the textbook loop over T on torch tensors (a [B] vector a step), and shaped_gae against the same chain written in torch.

    python -m bench.bench_gae
"""
from __future__ import annotations

import torch
from bench.harness import Row, contest, one_thread, report

from fusedrl.kernels.gae import gae, shaped_gae

GAMMA, LAM, KL_COEF = 1.0, 0.95, 0.05


def python_loop(rewards_BT: torch.Tensor, values_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
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
    """KL-shaped rewards, the loop, whitening; right-padded sequences, one eager op after the other."""
    rewards_BT = torch.where(mask_BT, -KL_COEF * (logp_BT - ref_logp_BT), 0)
    rewards_BT[torch.arange(len(scores_B)), mask_BT.sum(1) - 1] += scores_B
    advantages_BT, returns_BT = python_loop(rewards_BT, torch.where(mask_BT, values_BT, 0))
    chosen = advantages_BT[mask_BT]
    whitened = (advantages_BT - chosen.mean()) * torch.rsqrt(chosen.var(unbiased=False) + 1e-8)
    return torch.where(mask_BT, whitened, 0), torch.where(mask_BT, returns_BT, 0)


def close(ours, theirs) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=5e-5, rtol=5e-5)


def contests(B: int, T: int) -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    rewards, values, logp = (torch.randn(B, T, generator=generator) for _ in range(3))
    # Two float32 read and two written a token.
    rows = contest("gae", f"{B} x {T}", "float32",
                   {"fusedrl": lambda: gae(rewards, values, gamma=GAMMA, lam=LAM), "python loop over T": lambda: python_loop(rewards, values)},
                   bytes_moved=16 * B * T, same=close, rounds=11)
    mask = torch.arange(T)[None] < torch.randint(T // 2, T + 1, (B, 1), generator=generator)
    ref_logp, scores = logp + 0.1 * torch.randn(B, T, generator=generator), torch.randn(B, generator=generator)
    # Three float32 and the mask read, three float32 written; whitening reads and writes the advantages and reads the mask once more.
    rows += contest("shaped_gae, whitened", f"{B} x {T}", "float32",
                    {"fusedrl": lambda: shaped_gae(logp, ref_logp, values, scores, mask=mask, cu_seqlens=None, kl_coef=KL_COEF, gamma=GAMMA, lam=LAM)[:2],
                     "python loop over T": lambda: python_chain(logp, ref_logp, values, scores, mask)},
                    bytes_moved=34 * B * T, same=close, rounds=11)
    return rows


def main() -> None:
    one_thread()
    report("gae", [row for B, T in ((64, 2048), (512, 512), (8, 16384)) for row in contests(B, T)])


if __name__ == "__main__":
    main()
