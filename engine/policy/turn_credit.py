"""Credit of single turns of a trajectory: the rewards from a turn on, compared with those of other
turns of its group.

    G_k = sum_{j >= k} gamma^(j - k) r_j        r_j: the rewards of the tokens of turn j
    A   = G_k compared among the turns of the same group and kind

A turn is a run of actions; between two of them stands at least one token that is none.

Shapes    N tokens, T turns, B sequences.
Source    kinds by equal observations: Feng et al. (2025), GiGPO, eqs. 5 to 8.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fusedrl.engine.base.packing import PackedBatch
from fusedrl.kernels.gae import discounted_returns
from fusedrl.kernels.normalize import GroupNormalized


def turn_numbers(batch: PackedBatch) -> Tensor:
    """Return [N] int64: the number of a token's turn in its sequence, from 1; 0 before the first.
    An observation has the number of the turn before it."""
    mask_N, bounds = batch.action_mask, batch.cu_seqlens.long()
    begins_N = mask_N & ~torch.cat([mask_N.new_zeros(min(1, len(mask_N))), mask_N[:-1]])
    before = PackedBatch.counts_before(begins_N)
    # a first token is no action, so that no turn goes on from one sequence into the next
    earlier_N = torch.repeat_interleave(before[bounds[:-1]], bounds.diff(), output_size=len(mask_N))
    return before[1:] - earlier_N


def of_turns(
    batch: PackedBatch,
    rewards_N: Tensor,
    gamma: float,
    compare: Callable[[Tensor, Tensor], GroupNormalized],
    kinds_N: Tensor,
) -> Tensor:
    """Return [N]: at each action what `compare` makes of its turn's G; 0 elsewhere.

    Args:
        rewards_N: rewards of tokens; those where no action is are not looked at.
        gamma: discount per turn.
        compare: returns the advantages of numbers [T] with group ids [T].
        kinds_N: int64; turns of one group whose first tokens have equal numbers are compared.
    """
    mask_N, sizes = batch.action_mask, batch.cu_seqlens.long().diff()
    if not mask_N.any():
        return torch.zeros_like(mask_N, dtype=torch.float32)
    sequences_N = torch.repeat_interleave(
        torch.arange(len(sizes), device=mask_N.device), sizes, output_size=len(mask_N)
    )
    turn_N = torch.stack([sequences_N, turn_numbers(batch)], 1)[mask_N]
    _, of_A, counts_T = torch.unique_consecutive(
        turn_N, dim=0, return_inverse=True, return_counts=True
    )
    rewards_T = torch.segment_reduce(rewards_N[mask_N].double(), "sum", lengths=counts_T)
    first_T = counts_T.cumsum(0) - counts_T
    owners_T = turn_N[first_T, 0]
    lengths_B = torch.bincount(owners_T, minlength=len(sizes))
    returns_T = discounted_returns(
        rewards_T.float(),
        mask=torch.ones_like(rewards_T, dtype=torch.bool),
        cu_seqlens=torch.cat([lengths_B.new_zeros(1), lengths_B.cumsum(0)]).int(),
        gamma=gamma,
    )
    groups_T = batch.column("group_ids")[owners_T]
    alike_T = torch.stack([groups_T, kinds_N[mask_N][first_T]], 1)
    _, compared_T = torch.unique(alike_T, dim=0, return_inverse=True)
    found_T = compare(returns_T, compared_T).advantages
    return torch.zeros_like(mask_N, dtype=found_T.dtype).masked_scatter(mask_N, found_T[of_A])
