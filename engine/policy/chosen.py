"""Which tokens of a rollout keep their advantage, and which are held near its policy."""

from __future__ import annotations

import math

import torch

from fusedrl.engine.base.ordering import shuffled
from fusedrl.engine.base.packing import PackedBatch
from fusedrl.engine.config import PolicyConfig


def of_chosen_tokens(config: PolicyConfig, batch: PackedBatch, step: int) -> PackedBatch:
    """Return the batch with the advantage 0 at tokens that the options of the loss leave out, and
    with the column held if the loss holds some. The choice is made once a rollout, by the policy
    before its update (old_logp, old_entropy), so the split into minibatches does not change it. The
    papers choose anew in each minibatch.

    top_entropy_quantile  keeps the q n actions of the highest entropy, and those that equal the
                          last of them (Wang et al., 2025, eq. 5)
    clip_cov_ratio        drops c n actions, drawn from those with
                          low < (logp - mean logp) (A - mean A) < high
                          (Cui et al., 2025, eqs. 10 and 11)
    kl_cov_ratio          holds the k n actions of the highest such covariance (KL-Cov of the same
                          source); of equal ones the first

    n is the number of actions that the loss is over.
    """
    loss, mask_N = config.loss, batch.trained_mask
    advantages_N, n = batch.column("advantages"), int(mask_N.sum())
    if not n:
        return batch
    if loss.top_entropy_quantile < 1:
        entropy_N = batch.column("old_entropy")
        last = max(1, math.ceil(loss.top_entropy_quantile * n))
        least = entropy_N[mask_N].kthvalue(n - last + 1).values
        advantages_N = torch.where(entropy_N >= least, advantages_N, 0.0)
    if loss.clip_cov_ratio or loss.kl_cov_ratio:
        logp_N, of_N = (
            x_N.double() - x_N[mask_N].double().mean()
            for x_N in (batch.column("old_logp"), batch.column("advantages"))
        )
        covariance_N = logp_N * of_N
    if loss.kl_cov_ratio:
        ranked = torch.where(mask_N, covariance_N, -math.inf).sort(descending=True, stable=True)
        highest = ranked.indices[: max(1, int(loss.kl_cov_ratio * n))]
        batch = batch.with_columns(held=torch.zeros_like(mask_N).index_fill(0, highest, True))
    if loss.clip_cov_ratio:
        apart_N = (covariance_N > loss.clip_cov_low) & (covariance_N < loss.clip_cov_high)
        among = (apart_N & mask_N).nonzero().flatten()
        most = min(len(among), max(1, int(loss.clip_cov_ratio * n)))
        drawn = shuffled(len(among), config.run.seed, "clip_cov", step)[:most]
        advantages_N = advantages_N.index_fill(0, among[drawn], 0.0)
    return batch.with_columns(advantages=advantages_N)
