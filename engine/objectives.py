"""What an update minimises, by name: the kernel's objectives with the engine's bounds, and those that users register; with KL, entropy and values beside.

    loss = sum_t w_t (policy term_t + kl_coef kl_t - entropy_coef H_t) + value_coef sum_t w_t value term_t

A registered objective gives the policy terms: f(logp_N, old_logp_N, advantages_N, batch) -> [N], differentiable in logp_N; weights, KL, entropy and statistics
are added around it. The built-in ones are fused (kernels/policy_loss.py).
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusedrl.engine.algorithms import BOUNDS, OBJECTIVES, resolve
from fusedrl.engine.config import PolicyConfig
from fusedrl.engine.errors import ConfigError
from fusedrl.engine.packing import PackedBatch
from fusedrl.kernels.policy_loss import PolicyObjective, PolicyStats, ValueStats, policy_loss, policy_value_loss, token_weights

ObjectiveFunction = Callable[[Tensor, Tensor, Tensor, PackedBatch], Tensor]
Objective = PolicyObjective | ObjectiveFunction
_REGISTERED: dict[str, ObjectiveFunction] = {}
_NONE = PolicyObjective(kind="reinforce")  # of advantages that are 0


def register_objective(name: str) -> Callable[[ObjectiveFunction], ObjectiveFunction]:
    """Make a function known as `loss.objective = name`."""
    def register(function: ObjectiveFunction) -> ObjectiveFunction:
        _REGISTERED[name] = function
        return function

    return register


def make_objective(config: PolicyConfig, penalty: float) -> Objective:
    """The configuration's objective; `penalty` is the coefficient of ppo_penalty, which adapts.

    Raises:
        ConfigError: an unknown name, or a bound that the objective has no use for.
    """
    found = resolve("objective", config.objective, OBJECTIVES | _REGISTERED)
    bounds = {name: value for name in BOUNDS if (value := getattr(config.loss, name)) is not None}
    if not isinstance(found, tuple):
        if bounds:
            raise ConfigError(f"config: the objective {config.objective} has no use for loss.{', loss.'.join(bounds)}; leave them out")
        return found
    kind, _ = found
    if kind == "kl_penalty":
        bounds.setdefault("beta", penalty)
    try:
        return PolicyObjective(kind=kind, **bounds)
    except ValueError as error:
        raise ConfigError(f"config: loss: {error}") from error


def minibatch_weights(config: PolicyConfig, batch: PackedBatch) -> Tensor:
    """[N] weights of one optimizer step's tokens; its cut into micro-batches then changes nothing."""
    aggregation = config.loss.aggregation
    longest = config.generation.max_new_tokens if aggregation == "sequence_sum_norm" else None
    return token_weights(batch.action_mask, aggregation, cu_seqlens=batch.cu_seqlens, max_length=longest)


def entropy_coefficient(config: PolicyConfig, batch: PackedBatch) -> float:
    """The weight of the entropy in the loss of a rollout. With an entropy target the slope of entropy_coef |H - target| in H, the mean entropy of the batch's
    actions (its column old_entropy): the same for all of a rollout's micro-batches, however they are cut."""
    loss = config.loss
    if loss.entropy_target is None:
        return loss.entropy_coef
    mean = batch.column("old_entropy")[batch.action_mask].double().mean().item()
    return loss.entropy_coef * (1.0 if mean < loss.entropy_target else -1.0)


def objective_loss(config: PolicyConfig, objective: Objective, kl_coef: float, batch: PackedBatch, logp_N: Tensor, entropy_N: Tensor | None,
                   values_N: Tensor | None, full_kl_N: Tensor | None = None, *,
                   entropy_coef: float | None = None) -> tuple[Tensor, PolicyStats, ValueStats | None]:
    """The loss of a micro-batch with the columns weights, old_logp and advantages; values, returns where a critic is trained; ref_logp with the KL in the loss.

    Args:
        kl_coef: the coefficient now, wherever the KL is placed.
        logp_N, entropy_N, values_N: of the policy and critic that are trained. full_kl_N: KL(policy || reference) at each token, for kl.estimator = full.
        entropy_coef: in place of the configuration's, as `entropy_coefficient` gives it.
    """
    loss, kl = config.loss, config.kl
    old_N, advantages_N, weights_N = batch.column("old_logp"), batch.column("advantages"), batch.column("weights")
    penalised = kl.placement == "loss" and kl_coef > 0 and kl.estimator != "full"
    fused = isinstance(objective, PolicyObjective)
    entropy_coef = loss.entropy_coef if entropy_coef is None else entropy_coef
    common: dict[str, Any] = {
        "objective": objective if fused else _NONE, "entropy": entropy_N, "entropy_coef": entropy_coef, "cu_seqlens": batch.cu_seqlens,
        "ref_logp": batch.column("ref_logp") if penalised else None, "kl_coef": kl_coef if penalised else 0.0,
        "kl_estimator": kl.estimator if penalised else "k3", "kl_level": "sequence" if penalised and kl.level == "sequence" else "token",
    }
    value_stats = None
    if values_N is None:
        total, stats = policy_loss(logp_N, old_N, advantages_N if fused else torch.zeros_like(advantages_N), weights_N, **common)
    else:
        total, stats, value_stats = policy_value_loss(
            logp_N, old_N, advantages_N if fused else torch.zeros_like(advantages_N), weights_N, values_N, batch.column("values"), batch.column("returns"),
            value_clip=loss.value_clip, value_coef=loss.value_coef, **common)
    terms_N = [] if isinstance(objective, PolicyObjective) else [objective(logp_N, old_N, advantages_N, batch)]
    terms_N += [] if full_kl_N is None else [kl_coef * full_kl_N]
    for term_N in terms_N:
        if term_N.shape != logp_N.shape:
            raise ValueError(f"objective {config.objective}: expected [{len(logp_N)}] terms, one per token, got {list(term_N.shape)}")
        added = (weights_N * torch.where(weights_N != 0, term_N, 0)).sum()
        total, stats = total + added, stats._replace(loss=stats.loss + added.detach())
    return total, stats, value_stats
