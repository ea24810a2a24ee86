"""The loss of a micro-batch of a policy update, computed from hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedrl.engine.actor import HybridActor
from fusedrl.engine.base.packing import IGNORE, PackedBatch
from fusedrl.engine.config import PolicyConfig
from fusedrl.engine.policy.control import Control
from fusedrl.engine.policy.objectives import (
    Objective,
    ValueScale,
    behaviour,
    entropy_coefficient,
    head_loss,
    make_objective,
    objective_loss,
    two_steps,
)
from fusedrl.engine.rollout.reference import Reference
from fusedrl.kernels.linear_full_kl import linear_full_kl
from fusedrl.kernels.objective import PolicyObjective, PolicyStats, ValueStats


class MicroLoss(NamedTuple):
    """Loss of a micro-batch, and the quantities that it was computed from."""

    loss: Tensor  # 0-d, differentiable
    policy: PolicyStats
    value: ValueStats | None
    logp: Tensor  # [N] float32, as is entropy: both of the policy before this update
    entropy: Tensor
    batch: PackedBatch  # has old_logp, and the advantages that the loss used
    dropped: Tensor | None  # number of tokens that correction.off_policy_delta left out

    @property
    def numbers(self) -> tuple[Tensor, ...]:
        """All statistics, 0-d each, in the order that `statistics` reads."""
        dropped = () if self.dropped is None else (self.dropped,)
        return *self.policy, *(self.value or ()), *dropped

    def of_tokens(self) -> Tensor:
        """Return [3, N]: log-probabilities, entropies, and log ratios to the policy before the
        update. The log ratios are 0 where nothing is trained."""
        ratio = self.logp.detach() - self.batch.column("old_logp")
        return torch.stack(
            [self.logp, self.entropy, torch.where(self.batch.trained_mask, ratio, 0.0)]
        )


def statistics(
    numbers: Sequence[Tensor], loss: RolloutLoss
) -> tuple[PolicyStats, ValueStats | None, Tensor | None]:
    """Return the statistics (policy, value, dropped) of a micro-batch from its `numbers`."""
    policy, rest = len(PolicyStats._fields), len(PolicyStats._fields) + len(ValueStats._fields)
    valued = loss.actor.value_head is not None
    left = numbers[rest if valued else policy :]
    return (
        PolicyStats(*numbers[:policy]),
        ValueStats(*numbers[policy:rest]) if valued else None,
        left[0] if left else None,
    )


@dataclass(frozen=True)
class RolloutLoss:
    """Loss function of the updates on one rollout, the same for all its micro-batches, however the
    rollout is split.

    Attributes:
        kl_coef, entropy_coef: current coefficients.
        value: scale of the value loss.
        apart: reason why log-probabilities are computed in a step before the loss (`two_steps`);
            None if the head computes both in one pass.
    """

    config: PolicyConfig
    actor: HybridActor
    reference: Reference | None
    objective: Objective
    kl_coef: float
    entropy_coef: float
    value: ValueScale
    apart: str | None

    @classmethod
    def of(
        cls,
        config: PolicyConfig,
        actor: HybridActor,
        reference: Reference | None,
        batch: PackedBatch,
        control: Control,
    ) -> RolloutLoss:
        """Derive the loss function from the whole batch of a rollout."""
        objective = make_objective(config, control.penalty.coef)
        scored = batch.old_logp is not None or config.correction.bypass
        return cls(
            config,
            actor,
            reference,
            objective,
            control.kl.coef,
            entropy_coefficient(config, batch),
            ValueScale.of(config, batch, control.unit or 1.0),
            two_steps(config, objective, strict=actor.strict, scored=scored),
        )

    def __call__(self, batch: PackedBatch) -> MicroLoss:
        """Return the loss of a micro-batch, which needs the column weights. Without the column
        old_logp the ratio is exactly 1."""
        config, actor = self.config, self.actor
        hidden = actor.forward(batch)
        values = actor.values(batch, hidden) if actor.value_head is not None else None
        whole = None
        if self.reference is not None and config.kl.estimator == "full":
            whole = _full_kl(actor, self.reference, batch, hidden, config)
        options: dict[str, Any] = {"entropy_coef": self.entropy_coef, "value": self.value}
        if self.apart is None and isinstance(self.objective, PolicyObjective):
            batch, dropped = behaviour(config.correction, batch, None)
            loss, policy, value, logp, entropy = head_loss(
                config,
                self.objective,
                self.kl_coef,
                batch,
                actor,
                hidden,
                values,
                whole,
                **options,
            )
            policy = _with_kl(policy, whole)
            return MicroLoss(loss, policy, value, logp, entropy, _scored(batch, logp), dropped)
        logp, entropy = actor.logprobs(batch, hidden, temperature=config.generation.temperature)
        batch, dropped = behaviour(config.correction, _scored(batch, logp), logp)
        loss, policy, value = objective_loss(
            config, self.objective, self.kl_coef, batch, logp, entropy, values, whole, **options
        )
        policy = _with_kl(policy, whole)
        return MicroLoss(loss, policy, value, logp.detach(), entropy.detach(), batch, dropped)


def _with_kl(found: PolicyStats, kl_N: Tensor | None) -> PolicyStats:
    """Return the statistics with the mean of the exact KL, which is 0 where there is no action."""
    if kl_N is None:
        return found
    return found._replace(ref_kl=kl_N.detach().sum() / found.tokens.clamp(min=1))


def _scored(batch: PackedBatch, logp: Tensor) -> PackedBatch:
    """Return the batch with the column old_logp, set to `logp` if the batch has none."""
    return batch if batch.old_logp is not None else batch.with_columns(old_logp=logp.detach())


def _full_kl(
    actor: HybridActor,
    reference: Reference,
    batch: PackedBatch,
    hidden_NH: Tensor,
    config: PolicyConfig,
) -> Tensor:
    """Return [N] the divergence of policy and reference over the whole vocabulary, of the
    distribution that each action was drawn from; 0 elsewhere. Differentiable. Models of one
    tokenizer may have padded the vocabulary differently: tokens that one of them lacks are left
    out."""
    theirs_NH, head_VH = reference.hidden(batch)
    vocabulary = min(len(head_VH), len(actor.decoder.head_weight))
    kl_N = linear_full_kl(
        hidden_NH,
        actor.decoder.head_weight[:vocabulary],
        theirs_NH,
        head_VH[:vocabulary],
        temperature=config.generation.temperature,
        mask=batch.labels() != IGNORE,
        direction=config.kl.direction,
    )
    return torch.where(batch.action_mask, batch.to_next(kl_N), 0.0)
