"""Policy optimisation: roll out, score, estimate advantages, update; one weight copy throughout,
and every algorithm a row of algorithms.py.

Read `train_policy` from top to bottom. What holds for all algorithms, with sources in config.py:
  1. advantages are functions (advantages.py) of the scores, of the KL to a frozen reference where
     it is placed in the reward (-coef k1 at every token), and of values where there is a critic:
     read at the position before the token, from a linear head on the policy's own trunk; 0 after
     the end. With `critic.model` the values are those of another model (critic.py), which is
     trained by itself on the same minibatches, before the policy. Whichever it is begins with the
     first rollout's mean return for its bias, and what has no baseline is counted from that return:
     a constant added to the reward changes no course;
  2. whitening and normalisation are over the whole batch of a step, once, before any split;
  3. old log-probabilities come from the training forward, not from the sampler: before the first
     optimizer step of a rollout the ratio is exactly 1, because scoring cuts the batch into the
     very micro-batches that the first epoch trains on. With one optimizer step a rollout, and
     advantages that need neither values nor the KL, nothing is scored: the training forward is the
     scorer. What the sampler said is compared with it at every step (`sampling/logp_diff_*`),
     before the weights change;
  4. without a critic there is no value head, and with a KL coefficient of 0 no reference;
  5. a replay buffer's completions train beside the new ones, in micro-batches of their own, with
     the old log-probabilities that they came with.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fusedrl.engine.actor import HybridActor
from fusedrl.engine.base.errors import ConfigError
from fusedrl.engine.base.ordering import shuffled
from fusedrl.engine.base.packing import IGNORE, PackedBatch
from fusedrl.engine.config import PolicyConfig
from fusedrl.engine.data.mixture import Mixture
from fusedrl.engine.model.heads import ValueHead
from fusedrl.engine.optim.learner import Learner
from fusedrl.engine.policy.advantages import Signals, estimate, find_advantage
from fusedrl.engine.policy.control import Control
from fusedrl.engine.policy.critic import SeparateCritic, TrainedCritic, critic_of
from fusedrl.engine.policy.metrics import Meter, measure, value_metrics
from fusedrl.engine.policy.objectives import (
    ValueScale,
    behaviour,
    entropy_coefficient,
    head_loss,
    make_objective,
    minibatch_weights,
    objective_loss,
    two_steps,
)
from fusedrl.engine.policy.ptx import Ptx, load_ptx
from fusedrl.engine.policy.trpo import check_trust_region, trust_region_update
from fusedrl.engine.rewards.rewards import RewardSet, load_reward
from fusedrl.engine.rollout.prompts import read_prompts
from fusedrl.engine.rollout.reference import Reference, load_reference
from fusedrl.engine.rollout.replay import ReplayBuffer, Replayed, with_replay
from fusedrl.engine.rollout.rollout import Prompt, Rollout, rollout
from fusedrl.engine.runs.run import Run
from fusedrl.engine.watch.monitor import Monitor
from fusedrl.engine.watch.plan import cache_for
from fusedrl.kernels.linear_full_kl import linear_full_kl
from fusedrl.kernels.objective import PolicyObjective
from fusedrl.kernels.policy_loss import ValueStats, value_loss

Cuts = list[list[list[int]]]  # [minibatch][micro-batch] -> sequence indices


@dataclass(frozen=True)
class PolicyResult:
    """Place of the trained policy, and the last step's metrics."""

    model: str
    steps: int
    metrics: dict[str, float]


def train_policy(config: PolicyConfig) -> PolicyResult:
    """Train a policy by `config.algorithm`.

    The run directory receives config.json, metrics.jsonl, samples.jsonl, checkpoints and, at the
    end, model/ (loadable by transformers; a critic's value_head.safetensors lies beside the
    weights) and critic/ (of one of its own, to be the critic.model of another run).

    Raises:
        DataError, RewardError, ConfigError, OSError: as their messages say; nothing half-written is
        left behind. RuntimeError: five updates in a row had a non-finite gradient, or sampler and
        trainer disagree by more than `max_logp_diff`.
    """
    needs = find_advantage(config.advantage).needs
    if needs == "group" and config.samples_per_prompt == 1:
        raise ConfigError(
            f"config: expected samples_per_prompt > 1 for the advantage {config.advantage}, which "
            "compares the completions of one prompt"
        )
    # a mistake in its name or bounds is told before anything is loaded
    objective = make_objective(config, config.penalty.coef)
    if config.critic is not None and needs != "critic":
        raise ConfigError(
            f"config: expected no critic with the advantage {config.advantage}, which has no use "
            "for values; leave critic out"
        )
    check_trust_region(config)
    trust_region = config.objective == "trpo"
    kl_in_advantage = config.kl.coef > 0 and (
        config.kl.placement == "reward" or config.kl.level == "future"
    )
    on_trunk = needs == "critic" and config.own_critic is None
    several = config.epochs * config.minibatches > 1 and not config.correction.bypass
    scored_first = (
        on_trunk
        or kl_in_advantage
        or trust_region
        or several
        or config.replay is not None
        or config.loss.entropy_target is not None
    )

    torch.manual_seed(config.run.seed)
    actor = HybridActor.from_pretrained(
        config.model,
        dtype=config.dtype,
        device=config.device,
        value_head=on_trunk,
        strict=config.strict,
        cache=cache_for(config),
    )
    actor.decoder.checkpoint_activations = config.checkpoint_activations
    if config.kl.estimator == "full" and actor.decoder.config.logit_softcap:
        raise ConfigError(
            "config: kl.estimator full reads logits that are not capped, and this model caps its "
            "own; use k2 or k3"
        )
    if config.lora is not None:
        actor.add_adapter(config.lora, seed=config.run.seed)
    reference = load_reference(config, actor) if config.needs_reference else None
    rewards = RewardSet(
        [
            load_reward(spec, device=actor.decoder.device, tokenizer=actor.tokenizer)
            for spec in config.reward
        ],
        config.reward_weights,
    )
    gold = [
        load_reward(spec, device=actor.decoder.device, tokenizer=actor.tokenizer)
        for spec in config.monitor_reward
    ]
    measured_only = RewardSet(gold) if gold else None
    learner = Learner(actor, config.optim)
    critic = critic_of(config, actor)
    own_critic = (
        critic.model if critic is not None and isinstance(critic.model, SeparateCritic) else None
    )
    control = Control(config)
    replay = None if config.replay is None else ReplayBuffer(config.replay, config.run.seed)

    with Run(config, config.steps) as run:
        if config.idle_bounds:
            run.message(
                "one optimizer step a rollout, so that every ratio is 1: "
                f"{', '.join(config.idle_bounds)} will never act; raise minibatches or epochs "
                "where they should"
            )
        why = two_steps(
            config, objective, strict=config.strict, scored=scored_first or config.correction.bypass
        )
        if why is not None and not trust_region:
            run.message(
                "log-probabilities are computed by themselves before the loss, one product over "
                f"the head more: {why}"
            )
        prompts, ptx = read_prompts(config, actor, run), load_ptx(config, actor, run)
        monitor = Monitor(config, actor, reference, rewards, measured_only, run)
        run.restore(
            model=learner,
            control=control,
            critic=None if critic is None else critic.learner,
            replay=replay,
        )
        # a checkpoint of before prompts were counted
        control.drawn = control.drawn or run.start * config.prompts_per_step
        head = actor.value_head if own_critic is None else own_critic.head
        if head is not None and run.start:
            head.restore(control.value_level, control.unit or 1.0)
        monitor.begin()
        for step in range(run.start, config.steps):
            with run.time("generate_and_reward"):
                experience = rollout(
                    actor,
                    partial(_draw, prompts, config, control),
                    rewards,
                    config,
                    greedy=needs == "greedy",
                    gold=measured_only,
                )
            learns = step >= config.critic_warmup
            with run.time("score"):
                batch = control.scaled(experience.batch)
                cuts = cuts_of(batch, config, step, epoch=0)
                batch = score(
                    actor if scored_first or not learns else None,
                    reference,
                    batch,
                    cuts,
                    config.generation.temperature,
                )
                if own_critic is not None:
                    batch = batch.with_columns(
                        values=own_critic.score(
                            batch, [group for minibatch in cuts for group in minibatch]
                        )
                    )
            with run.time("advantage"):
                signals = Signals.of(
                    config, batch, control.kl.coef, control.returns.mean, control.level or 0.0
                )
                signals = settle(signals, control, head)
                if own_critic is None and head is not None:
                    actor.mark_updated()
                batch = estimate(config, signals)
            with run.time("train"), actor.lend_cache(*([] if own_critic is None else [own_critic])):
                metrics = experience.metrics
                if critic is not None and step < critic.rollouts:
                    metrics |= update_critic(critic, batch, cuts, config, control, step)
                    if own_critic is None:
                        actor.mark_updated()
                if not learns:
                    metrics |= measure(batch, control.kl.coef, config)
                elif trust_region:
                    metrics |= trust_region_update(
                        actor, reference, learner, batch, cuts, config, control, step, ptx
                    )
                else:
                    replayed = (
                        None
                        if replay is None
                        else replay.draw(step, batch.num_sequences, batch.device)
                    )
                    metrics |= update(
                        actor, reference, learner, batch, cuts, config, control, step, ptx, replayed
                    )
            if recount(control, head) and own_critic is None:
                actor.mark_updated()
            control.update(metrics if learns else {}, signals.totals)
            if warning := control.kl.warning():
                run.message(warning)
            if replay is not None:
                replay.add(batch, step)
            metrics |= monitor.after(step, metrics)
            run.log(step, metrics)
            run.samples(step, _samples(experience))
            run.save_if_due(step)
        if own_critic is not None:
            own_critic.save_pretrained(run.directory / "critic", tokenizer=actor.tokenizer)
        if config.lora is not None:
            actor.save_adapter(run.directory / "adapter", base_model=config.model)
        return PolicyResult(run.finish(actor.save_pretrained), config.steps, run.last_metrics)


def settle(signals: Signals, control: Control, head: ValueHead | None) -> Signals:
    """Settle what advantages are counted from, before there are any: of the first rollout the mean
    of its returns, of every rollout the level of values. The unit that they show is for the next
    rollout (`recount`); the first one's is its own."""
    first = control.level is None
    signals, short = signals.settled(first=first)
    if head is None or signals.batch.values is None:
        return signals
    head.raise_by(short)
    control.value_level, control.next_unit = head.level.item(), signals.unit(control.unit, first)
    if first:
        recount(control, head)
    return signals


def recount(control: Control, head: ValueHead | None) -> bool:
    """The unit that the last rollout showed is that of values from now on. Returns whether it is
    another; then parameters were written, which a step may do only where its update begins or at
    its end: until then what is in memory is the step before, whole."""
    if head is None or control.next_unit is None or control.next_unit == control.unit:
        return False
    control.unit = control.next_unit
    head.count_in(control.unit)
    return True


# ---- the batch, and how it is cut ----------------------------------------------------------------
def _draw(
    prompts: Mixture[Prompt], config: PolicyConfig, control: Control, count: int
) -> tuple[list[Prompt], int]:
    """The next `count` prompts of the stream, and the number of the first in it."""
    first = control.drawn
    control.drawn += count
    return prompts.draw(config.run.seed, first, first + count), first


def cuts_of(batch: PackedBatch, config: PolicyConfig, step: int, epoch: int) -> Cuts:
    """Sequences shuffled into minibatches, and each minibatch cut into micro-batches by tokens; a
    function of the seed, step and epoch."""
    B, M = batch.num_sequences, min(config.minibatches, batch.num_sequences)
    order = shuffled(B, config.run.seed, "minibatches", step, epoch)
    return [
        batch.split(config.tokens_per_microbatch, order[m * B // M : (m + 1) * B // M])
        for m in range(M)
    ]


@torch.no_grad()
def score(
    actor: HybridActor | None,
    reference: Reference | None,
    batch: PackedBatch,
    cuts: Cuts,
    temperature: float,
) -> PackedBatch:
    """Fill old_logp, old_entropy, values (of an actor with a value head) and ref_logp from the
    training forward, micro-batch by micro-batch in the cuts that the first epoch trains on. None:
    its columns stay empty."""
    partition = [group for minibatch in cuts for group in minibatch]
    if actor is not None:
        ours = actor.score(batch, temperature=temperature, partition=partition)
        batch = batch.with_columns(old_logp=ours.logp, old_entropy=ours.entropy)
        batch = batch if ours.values is None else batch.with_columns(values=ours.values)
    if reference is not None:
        # the reference is the whole model: over the tokens that truncation left alone, a policy
        # that narrows to what the reference never says would be at no distance from it
        whole = batch.with_columns(kept=None)
        batch = batch.with_columns(
            ref_logp=reference.score(whole, temperature=temperature, partition=partition).logp
        )
    return batch


# ---- the update ----------------------------------------------------------------------------------
def update(
    actor: HybridActor,
    reference: Reference | None,
    learner: Learner,
    batch: PackedBatch,
    first_cuts: Cuts,
    config: PolicyConfig,
    control: Control,
    step: int,
    ptx: Ptx | None = None,
    replayed: Replayed | None = None,
) -> dict[str, float]:
    """epochs x minibatches optimizer steps on one rollout and what is replayed beside it; the
    gradient of `ptx` is added to each."""
    objective = make_objective(config, control.penalty.coef)
    total_updates, done = _updates(
        config, step - config.critic_warmup, config.steps - config.critic_warmup
    )
    entropy_coef, value = (
        entropy_coefficient(config, batch),
        ValueScale.of(config, batch, control.unit or 1.0),
    )
    meter, apart = (
        Meter(),
        two_steps(
            config,
            objective,
            strict=actor.strict,
            scored=batch.old_logp is not None or config.correction.bypass,
        ),
    )
    measured = None if batch.old_logp is None else measure(batch, control.kl.coef, config)
    fresh = batch.num_sequences
    if replayed is not None:
        first_cuts = with_replay(first_cuts, fresh, replayed.batch, config.tokens_per_microbatch)
        batch = PackedBatch.concat([batch, replayed.batch])
    for epoch in range(config.epochs):
        for minibatch in first_cuts if epoch == 0 else cuts_of(batch, config, step, epoch):
            weighted = _weighted(batch, minibatch, config)
            # log-probabilities and entropies
            seen = torch.zeros(2, batch.num_tokens, device=batch.device)
            with learner.update(done, total_updates) as one:
                for group in minibatch:
                    micro = weighted.select(group)
                    hidden = actor.forward(micro)
                    values = actor.values(micro, hidden) if actor.value_head is not None else None
                    full = (
                        _full_kl(actor, reference, micro, hidden, config)
                        if reference is not None and config.kl.estimator == "full"
                        else None
                    )
                    if apart is None and isinstance(objective, PolicyObjective):
                        micro, dropped = behaviour(config.correction, micro, None)
                        loss, policy_stats, value_stats, logp, entropy = head_loss(
                            config,
                            objective,
                            control.kl.coef,
                            micro,
                            actor,
                            hidden,
                            values,
                            full,
                            entropy_coef=entropy_coef,
                            value=value,
                        )
                        micro = (
                            micro
                            if micro.old_logp is not None
                            else micro.with_columns(old_logp=logp)
                        )
                    else:
                        logp, entropy = actor.logprobs(
                            micro, hidden, temperature=config.generation.temperature
                        )
                        micro = (
                            micro
                            if micro.old_logp is not None
                            else micro.with_columns(old_logp=logp.detach())
                        )
                        micro, dropped = behaviour(config.correction, micro, logp)
                        loss, policy_stats, value_stats = objective_loss(
                            config,
                            objective,
                            control.kl.coef,
                            micro,
                            logp,
                            entropy,
                            values,
                            full,
                            entropy_coef=entropy_coef,
                            value=value,
                        )
                    if measured is None:
                        seen[:, batch.slots(group)] = torch.stack([logp.detach(), entropy.detach()])
                    one.backward(loss)
                    # only in the first pass are there micro-batches of replayed completions alone
                    old = epoch == 0 and group[0] >= fresh
                    meter.add(
                        policy_stats,
                        value_stats,
                        epoch,
                        first=epoch == 0 and minibatch is first_cuts[0] and not old,
                        replayed=old,
                        dropped=dropped,
                    )
                    if epoch == config.epochs - 1:
                        meter.add_ratios(micro, logp)
                # of what was seen before the weights change: all, or with correction.bypass the
                # first minibatch
                if measured is None:
                    members = sorted(b for group in minibatch for b in group)
                    first = batch.with_columns(old_logp=seen[0], old_entropy=seen[1]).select(
                        members
                    )
                    measured = measure(first, control.kl.coef, config) | {
                        "num_tokens": float(batch.num_tokens)
                    }
                if ptx is not None:
                    ptx.backward(actor, done)
            meter.grad_norms.append(one.grad_norm)
            done += 1
    # what runs next runs beside the weights, the optimizer's state and the cache alone
    learner.release()
    metrics = (measured or {}) | meter.metrics() | learner.metrics()
    metrics |= {} if config.loss.entropy_target is None else {"entropy_coef": entropy_coef}
    return (
        metrics
        | (ptx.metrics() if ptx is not None else {})
        | (replayed.metrics if replayed is not None else {})
    )


def update_critic(
    critic: TrainedCritic,
    batch: PackedBatch,
    first_cuts: Cuts,
    config: PolicyConfig,
    control: Control,
    step: int,
) -> dict[str, float]:
    """The same passes over the same minibatches for what of a critic is trained by itself: its
    gradients and the policy's are never there together."""
    model, learner, rollouts = critic
    total_updates, done = _updates(config, step, rollouts)
    stats: list[ValueStats] = []
    norms: list[float] = []
    scale = ValueScale.of(config, batch, control.unit or 1.0)
    for epoch in range(config.epochs):
        for minibatch in first_cuts if epoch == 0 else cuts_of(batch, config, step, epoch):
            weighted = _weighted(batch, minibatch, config)
            with learner.update(done, total_updates) as one:
                for group in minibatch:
                    micro = weighted.select(group)
                    old, returns, weights = (
                        micro.column(name) for name in ("values", "returns", "weights")
                    )
                    loss, value_stats = value_loss(
                        model(micro), old, returns, weights, clip=scale.clip
                    )
                    one.backward(config.loss.value_coef / scale.error**2 * loss)
                    stats.append(value_stats)
            norms.append(one.grad_norm)
            done += 1
    learner.release()
    return (
        value_metrics(stats, len(norms))
        | {"critic/grad_norm": sum(norms) / len(norms)}
        | learner.metrics("critic/lr", "critic/")
    )


def _updates(config: PolicyConfig, done: int, rollouts: int) -> tuple[int, int]:
    """(optimizer steps on `rollouts` of them, on the `done` first)."""
    each = config.epochs * config.minibatches
    return rollouts * each, done * each


def _weighted(batch: PackedBatch, minibatch: list[list[int]], config: PolicyConfig) -> PackedBatch:
    """The batch with the token weights of one optimizer step: over its whole minibatch, so that the
    cut into micro-batches does not change the gradient."""
    members = [b for group in minibatch for b in group]
    weights = torch.zeros(batch.num_tokens, device=batch.device)
    weights[batch.slots(members)] = minibatch_weights(config, batch.select(members))
    return batch.with_columns(weights=weights)


def _full_kl(
    actor: HybridActor,
    reference: Reference,
    batch: PackedBatch,
    hidden_NH: Tensor,
    config: PolicyConfig,
) -> Tensor:
    """[N] KL(policy || reference) of the distribution that each action was drawn from, over the
    whole vocabulary; differentiable. 0 elsewhere."""
    theirs_NH, head_VH = reference.hidden(batch)
    kl_N = linear_full_kl(
        hidden_NH,
        actor.decoder.head_weight,
        theirs_NH,
        head_VH,
        temperature=config.generation.temperature,
        mask=batch.labels() != IGNORE,
    )
    return torch.where(batch.action_mask, batch.to_next(kl_N), 0.0)


def _samples(experience: Rollout, count: int = 4) -> list[dict]:
    return [
        {"prompt": p.prompt, "completion": c.text, "finish_reason": c.finish_reason, "score": s}
        for p, c, s in zip(
            experience.prompts[:count],
            experience.completions[:count],
            experience.batch.column("scores")[:count].tolist(),
            strict=True,
        )
    ]
