"""The update of TRPO: one step of optim/natural_gradient.py on the whole batch of a rollout, in
place of passes of an optimizer.

    loss   sum_t w_t (-A_t ratio_t), plus the terms that the configuration adds to an objective:
           entropy, a KL to the reference in the loss, PPO-ptx
    KL     mean over the tokens of the rollout of KL(old || new) over the whole vocabulary, in nats
           per token, of the distribution that was sampled from
    F      its Hessian at new = old (fisher.py), at the states of `trpo.fisher_fraction` of the
           completions, drawn anew at each step

The values are trained afterwards by AdamW, in `epochs` full-batch steps on the value loss alone.
The policy's trunk stays constant in these steps: only the value head learns, from the hidden states
that the policy has after its step.

Time      one forward and backward pass for the gradient; cg_iterations products with F on the
          tokens of the fraction, and one product on all tokens; and a forward pass over the batch
          for each length that the line search tries.
Memory    in addition to weights and activations, 7 vectors of the trained parameters (their old
          values, the gradient and .grad, four of conjugate gradient), and the rollout's hidden
          states twice: before and after the step. Only the value head has optimizer moments.
Source    Schulman et al. (2015), Trust region policy optimization, section 6 and appendix C.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from fusedrl.engine.actor import HybridActor
from fusedrl.engine.base.errors import ConfigError
from fusedrl.engine.base.memory import give_back
from fusedrl.engine.base.ordering import shuffled
from fusedrl.engine.base.packing import PackedBatch
from fusedrl.engine.config import PolicyConfig
from fusedrl.engine.model.weights import read_model_config, resolve_dtype
from fusedrl.engine.optim.adamw import StepResult, grad_norm
from fusedrl.engine.optim.learner import Learner
from fusedrl.engine.optim.natural_gradient import line_search, natural_step
from fusedrl.engine.optim.schedule import learning_rate
from fusedrl.engine.policy.control import Control
from fusedrl.engine.policy.fisher import FlatParameters, fisher_product, policy_kl
from fusedrl.engine.policy.metrics import Meter, measure
from fusedrl.engine.policy.objectives import (
    ValueScale,
    entropy_coefficient,
    make_objective,
    minibatch_weights,
    objective_loss,
)
from fusedrl.engine.policy.ptx import Ptx
from fusedrl.engine.rollout.reference import Reference
from fusedrl.kernels.policy_loss import value_loss

AFTER = (
    "val/ratio",
    "val/ratio_min",
    "val/ratio_max",
    "policy/approxkl_avg",
    "policy/clamped_fraction",
)  # metrics of the accepted policy
# metrics of the step, reported as trpo/<name>
NAMES = ("accepted", "kl", "improvement", "expected_improvement", "fraction", "cg_residual")


def check_trust_region(config: PolicyConfig) -> None:
    """Raise ConfigError for a model that TRPO cannot train, before the model is loaded. Do nothing
    for other objectives."""
    if config.objective != "trpo":
        return
    if (dtype := resolve_dtype(config.dtype, config.device)) != torch.float32:
        raise ConfigError(
            "config: expected dtype float32 with the objective trpo, got "
            f"{str(dtype).removeprefix('torch.')}: a step within a KL of "
            f"{config.trpo.max_kl} is rounded away in 16 bits, and Fisher products lose their sign "
            "there; set dtype float32"
        )
    if read_model_config(config.model).logit_softcap:
        raise ConfigError(
            "config: the objective trpo reads logits that are not capped, and this model caps its "
            "own; use ppo"
        )


class Surrogate:
    """Loss of a rollout under the current policy, and the KL of that policy from the one that made
    the rollout.

    Call `gradient` first, while the policy still has the weights of the rollout; `evaluate` then
    compares the current weights with these.

    Args:
        micros: micro-batches with the columns old_logp, advantages and weights; the weights are
            those of the whole rollout.
        step: number of the run's step.
    """

    def __init__(
        self,
        actor: HybridActor,
        parameters: FlatParameters,
        micros: Sequence[PackedBatch],
        config: PolicyConfig,
        control: Control,
        step: int,
        ptx: Ptx | None,
        entropy_coef: float,
    ) -> None:
        self.actor, self.parameters, self.micros, self.config, self.step, self.ptx = (
            actor,
            parameters,
            micros,
            config,
            step,
            ptx,
        )
        # statistics, and the hidden states of each micro-batch, from the latest forward passes
        self.meter, self.states = Meter(), list[Tensor]()
        self.objective, self.kl_coef, self.entropy_coef = (
            make_objective(config, control.penalty.coef),
            control.kl.coef,
            entropy_coef,
        )
        self.actions = max(1, sum(int(micro.action_mask.sum()) for micro in micros))
        self.old_P, self.old_states = parameters.values(), list[Tensor]()
        head = "embedding" if actor.decoder.head is None else "head"
        self.old_head_VH = parameters.views(self.old_P).get(
            head, actor.decoder.head_weight.detach()
        )

    def gradient(self) -> tuple[float, Tensor]:
        """Return (loss, its gradient [P])."""
        self.parameters.zero_grad()
        total = self._zeros(1)
        for micro in self.micros:
            loss = self._loss(micro)
            loss.backward()
            total += loss.detach()
        if self.ptx is not None:
            total += self.ptx.backward(self.actor, self.step)
        self.old_states = self.states
        return total.item(), self.parameters.gradient()

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float]:
        """Return (loss, KL(old || new) in nats per token)."""
        self.meter, self.states = Meter(), []
        total = self._zeros(2)
        for micro, old_NH in zip(self.micros, self.old_states, strict=True):
            total[0] += self._loss(micro)
            total[1] += (
                policy_kl(
                    self.actor,
                    micro,
                    self.states[-1],
                    old_NH,
                    self.old_head_VH,
                    self.config.generation.temperature,
                )
                / self.actions
            )
        if self.ptx is not None:
            total[0] += self.ptx.loss(self.actor, self.step)
        loss, kl = total.tolist()
        return loss, kl

    def go_back(self) -> None:
        """Restore the weights of the rollout, bitwise."""
        self.parameters.write(self.old_P)
        self.states = self.old_states

    def _loss(self, micro: PackedBatch) -> Tensor:
        hidden_NH = self.actor.forward(micro)
        self.states.append(hidden_NH.detach())
        logp_N, entropy_N = self.actor.logprobs(
            micro, hidden_NH, temperature=self.config.generation.temperature
        )
        loss, stats, _ = objective_loss(
            self.config,
            self.objective,
            self.kl_coef,
            micro,
            logp_N,
            entropy_N,
            None,
            entropy_coef=self.entropy_coef,
        )
        self.meter.add(stats, None, None, 0, first=True)
        return loss

    def _zeros(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.float64, device=self.actor.decoder.device)


def trust_region_update(
    actor: HybridActor,
    reference: Reference | None,
    learner: Learner,
    batch: PackedBatch,
    first_cuts: Sequence[Sequence[list[int]]],
    config: PolicyConfig,
    control: Control,
    step: int,
    ptx: Ptx | None = None,
) -> dict[str, float]:
    """Train the policy by one step on one rollout, and its values by `epochs` steps. If no length
    of the step is accepted, the policy's weights stay bitwise unchanged.

    Arguments and metrics are those of policy.update. `first_cuts` is one minibatch; how it is split
    into micro-batches does not change the gradient.
    """
    measured = measure(batch, control.kl.coef, config)
    weighted = batch.with_columns(weights=minibatch_weights(config, batch))
    micros = [weighted.select(group) for minibatch in first_cuts for group in minibatch]
    surrogate = Surrogate(
        actor,
        FlatParameters(actor.decoder),
        micros,
        config,
        control,
        step,
        ptx,
        entropy_coefficient(config, batch),
    )
    metrics, states = _policy_step(surrogate, batch, config, step, learner)
    if actor.value_head is not None:
        values = [
            partial(actor.values, micro, hidden_NH)
            for micro, hidden_NH in zip(micros, states, strict=True)
        ]
        metrics |= train_values(values, learner, micros, config, step, control.unit or 1.0)
    give_back(4 * sum(p.numel() for p in actor.parameters() if p.requires_grad))
    return (
        measured
        | metrics
        | {"learning_rate": learner.optimizer.lr}
        | (ptx.metrics() if ptx is not None else {})
    )


def _policy_step(
    surrogate: Surrogate, batch: PackedBatch, config: PolicyConfig, step: int, learner: Learner
) -> tuple[dict[str, float], list[Tensor]]:
    """Make the policy's step. Return its metrics, and the hidden states of each micro-batch after
    it."""
    actor, parameters, settings = (
        surrogate.actor,
        surrogate.parameters,
        config.trpo.at(step - config.critic_warmup, config.steps - config.critic_warmup),
    )
    before, gradient_P = surrogate.gradient()
    norm = grad_norm([gradient_P])
    surrogate.meter.grad_norms.append(norm)
    metrics = surrogate.meter.metrics() | dict.fromkeys((f"trpo/{name}" for name in NAMES), 0.0)
    learner.check(StepResult(norm, math.isfinite(norm)))
    if not math.isfinite(norm):
        return metrics, surrogate.states

    B = batch.num_sequences
    chosen = sorted(
        shuffled(B, config.run.seed, "fisher", step)[: math.ceil(settings.fisher_fraction * B)]
    )
    sampled, whole = (
        partial(
            fisher_product,
            actor,
            parameters,
            batch,
            batch.split(config.tokens_per_microbatch, part),
            config.generation.temperature,
        )
        for part in (chosen, range(B))
    )
    move_P, decrease, residual = natural_step(gradient_P.neg_(), sampled, settings, whole)

    def evaluate(fraction: float) -> tuple[float, float]:
        parameters.write(torch.add(surrogate.old_P, move_P, alpha=fraction))
        return surrogate.evaluate()

    found = line_search(evaluate, before, decrease, settings)
    if found.fraction:
        actor.mark_updated()
        surrogate.meter.grad_norms.append(norm)
        after = surrogate.meter.metrics()
        metrics |= {name: after[name] for name in AFTER} | {"policy/last_approxkl": found.kl}
    else:
        surrogate.go_back()
    numbers = (
        float(found.fraction > 0),
        found.kl,
        before - found.loss,
        found.fraction * decrease,
        found.fraction,
        residual,
    )
    return metrics | {
        f"trpo/{name}": number for name, number in zip(NAMES, numbers, strict=True)
    }, surrogate.states


def train_values(
    values: Sequence[Callable[[], Tensor]],
    learner: Learner,
    micros: Sequence[PackedBatch],
    config: PolicyConfig,
    step: int,
    unit: float = 1.0,
) -> dict[str, float]:
    """Train a critic on the returns of one rollout, by `epochs` optimizer steps on the whole
    rollout.

    Args:
        values: for each micro-batch, a function that returns its values [N]. Of the learner's
            parameters, the values depend only on those to be trained.
        micros: micro-batches with the columns values, returns and weights; the weights are those of
            the whole rollout.
        unit: unit of the value head.
    Returns:
        The metrics: the value loss, and the fraction of tokens that `loss.value_clip` stopped, both
        averaged over the steps.
    """
    loss_sum, clipped = torch.zeros(2, dtype=torch.float64, device=micros[0].device).unbind()
    tokens = max(1, sum(int(micro.action_mask.sum()) for micro in micros))
    scale, optimizer = (
        ValueScale.of(config, PackedBatch.concat(list(micros)), unit),
        learner.optimizer,
    )
    for epoch in range(config.epochs):
        optimizer.zero_grad()
        for micro, values_of in zip(micros, values, strict=True):
            loss, stats = value_loss(
                values_of(),
                micro.column("values"),
                micro.column("returns"),
                micro.column("weights"),
                clip=scale.clip,
            )
            (loss / scale.error**2).backward()
            loss_sum += stats.loss
            clipped += stats.clip_fraction * stats.tokens / tokens
        optimizer.lr = learning_rate(
            config.optim,
            (step - config.critic_warmup) * config.epochs + epoch,
            (config.steps - config.critic_warmup) * config.epochs,
        )
        result = optimizer.step(max_grad_norm=config.optim.max_grad_norm or None)
        if not result.applied:  # applied steps must not reset the count of skipped policy steps
            learner.check(result)
    optimizer.zero_grad()
    return {
        "loss/value_avg": loss_sum.item() / config.epochs,
        "val/clipfrac_avg": clipped.item() / config.epochs,
    }
