"""How a rollout is cut into the optimizer steps and micro-batches of its update."""

from __future__ import annotations

import torch

from fusedrl.engine.base.ordering import shuffled
from fusedrl.engine.base.packing import PackedBatch
from fusedrl.engine.config import PolicyConfig
from fusedrl.engine.policy.objectives import minibatch_weights, without_gradient

Cuts = list[list[list[int]]]  # [minibatch][micro-batch] -> sequence indices


def cuts_of(
    batch: PackedBatch, config: PolicyConfig, step: int, epoch: int, lanes: int = 1
) -> Cuts:
    """Shuffle sequences into minibatches, and split each into micro-batches by tokens, for `lanes`
    equal shares. Sequences without a gradient get separate micro-batches. The result depends only
    on the arguments."""
    B, M = batch.num_sequences, min(config.minibatches, batch.num_sequences)
    order = shuffled(B, config.run.seed, "minibatches", step, epoch)
    apart = without_gradient(config, batch)
    parts = [order[m * B // M : (m + 1) * B // M] for m in range(M)]
    return [batch.split(config.tokens_per_microbatch, part, apart, lanes) for part in parts]


def updates_of(config: PolicyConfig, done: int, rollouts: int) -> tuple[int, int]:
    """Return the number of optimizer steps on `rollouts` rollouts, and on the first `done`."""
    each = config.epochs * config.minibatches
    return rollouts * each, done * each


def weighted_by(
    batch: PackedBatch, minibatch: list[list[int]], config: PolicyConfig
) -> PackedBatch:
    """Return the batch with the token weights of one optimizer step. Weights are over the whole
    minibatch, so the split into micro-batches does not change the gradient."""
    members = [b for group in minibatch for b in group]
    weights = torch.zeros(batch.num_tokens, device=batch.device)
    weights[batch.slots(members)] = minibatch_weights(config, batch.select(members))
    return batch.with_columns(weights=weights)
