"""Policy optimisation: roll out, score, estimate advantages, update. There is one copy of the
weights throughout. config/algorithms.py defines the algorithms.

Read `train_policy` from top to bottom. These rules hold for all algorithms (sources in config/):
  1. Advantages are functions (policy/advantages.py) of the scores; of the KL to a frozen reference,
     if the KL is in the reward (-coef k1 at every token); and of values, if there is a critic. A
     linear head on the policy's own trunk gives the value at the position before each token; the
     value after the end is 0, or with loss.bootstrap_truncated the critic's own where a completion
     was cut off. With `critic.model`, another model gives the values
     (policy/critic.py) and is trained on the same minibatches, before the policy. Either critic's
     values start at the first rollout's mean return, and methods without a baseline subtract the
     running mean of returns, so a constant added to the reward does not change training.
  2. Whitening and normalisation are over the whole batch of a step, once, before any split.
  3. Old log-probabilities come from the training forward, not from the sampler. Scoring uses the
     same micro-batches as the first epoch, so before a rollout's first optimizer step the ratio is
     exactly 1. With one optimizer step a rollout, and advantages that need neither values nor the
     KL, there is no scoring: the training forward gives the old log-probabilities. At every step
     they are compared with the sampler's, before the weights change (the metrics `sampling/...`).
  4. Without a critic there is no value head, and with a KL coefficient of 0 no reference.
  5. Replayed completions train together with the new ones, in separate micro-batches, and keep the
     old log-probabilities that they were stored with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fusedrl.engine.actor import HybridActor
from fusedrl.engine.base.draws import seed_generators
from fusedrl.engine.base.errors import ConfigError
from fusedrl.engine.base.packing import PackedBatch
from fusedrl.engine.config import PolicyConfig
from fusedrl.engine.config.algorithms import ADVANTAGES
from fusedrl.engine.data.mixture import Mixture
from fusedrl.engine.data.readers import parse_data
from fusedrl.engine.data.rows import check_source
from fusedrl.engine.generation.drafts import Drafts, drafts_of, warn_of_drafts
from fusedrl.engine.model.heads import ValueHead
from fusedrl.engine.optim.learner import Learner
from fusedrl.engine.parallel.lanes import costs_of
from fusedrl.engine.parallel.ranks import Ranks, joined
from fusedrl.engine.policy.advantages import (
    Signals,
    estimate,
    find_advantage,
)
from fusedrl.engine.policy.chosen import of_chosen_tokens
from fusedrl.engine.policy.control import Control
from fusedrl.engine.policy.critic import SeparateCritic, TrainedCritic, critic_of, update_critic
from fusedrl.engine.policy.metrics import Meter, measure
from fusedrl.engine.policy.micro_loss import RolloutLoss, statistics
from fusedrl.engine.policy.minibatches import Cuts, cuts_of, updates_of, weighted_by
from fusedrl.engine.policy.objectives import (
    leaves_out,
    make_objective,
    two_steps,
    without_gradient,
)
from fusedrl.engine.policy.ptx import Ptx, load_ptx
from fusedrl.engine.policy.trpo import check_trust_region, trust_region_update
from fusedrl.engine.rewards.environments import (
    EnvironmentReward,
    Environments,
    environments_of,
)
from fusedrl.engine.rewards.functions import Reward
from fusedrl.engine.rewards.pool import Workers
from fusedrl.engine.rewards.rewards import RewardSet, load_functions
from fusedrl.engine.rollout.prompts import longest_of, read_prompts
from fusedrl.engine.rollout.reference import Reference, load_reference
from fusedrl.engine.rollout.replay import ReplayBuffer, Replayed, with_replay
from fusedrl.engine.rollout.rollout import Rollout, reward_loader, rollout
from fusedrl.engine.rollout.sampled import Prompt
from fusedrl.engine.runs.run import Run
from fusedrl.engine.watch.monitor import Monitor
from fusedrl.engine.watch.plan import cache_for, demand_of


@dataclass(frozen=True)
class PolicyResult:
    """Path of the trained policy's directory, and the last step's metrics."""

    model: str
    steps: int
    metrics: dict[str, float]


def train_policy(config: PolicyConfig) -> PolicyResult:
    """Train a policy by `config.algorithm`.

    The run directory receives config.json, metrics.jsonl, samples.jsonl, checkpoints and, at the
    end, model/ (loadable by transformers; a value head is in value_head.safetensors). If the critic
    is a separate model, it is saved in critic/; another run can load it as its critic.model.

    Raises:
        DataError, RewardError, ConfigError, OSError: the data, a reward or the configuration cannot
            be used, or a file cannot be read or written; nothing half-written is left behind.
        RuntimeError: five updates in a row had a non-finite gradient, or the log-probabilities of
            sampler and trainer differ by more than `max_logp_diff`.
    """
    with joined(config.parallel.lanes, config.strict, config.device) as ranks:
        return _train(config, ranks)


def _train(config: PolicyConfig, ranks: Ranks) -> PolicyResult:
    needs = find_advantage(config.advantage).needs
    _check(config, needs)
    judged = [config.data] + ([config.evaluation.data] if config.evaluation is not None else [])
    functions = load_functions((*config.reward, *config.monitor_reward), *judged)
    parts = _load(config, needs, ranks, functions)
    actor, control, own_critic, head = parts.actor, parts.control, parts.own_critic, parts.head
    with parts.workers, Run(config, config.steps, ranks) as run:
        _announce(config, needs, run, parts.drafts)
        prompts, ptx = read_prompts(config, actor, run), load_ptx(config, actor, run)
        judges, games = (parts.rewards, parts.gold), parts.environments
        monitor = Monitor(config, actor, parts.reference, *judges, run, games)
        longest = max(longest_of(prompts), monitor.longest)
        actor.limit_cache(*demand_of(config, actor.decoder.config, longest, ranks.size))
        run.restore(
            model=parts.learner,
            control=control,
            critic=None if parts.critic is None else parts.critic.learner,
            replay=parts.replay,
            drafts=parts.drafts,
        )
        # checkpoints of old versions have no count of prompts
        control.drawn = control.drawn or run.start * config.prompts_per_step
        if head is not None and run.start:
            head.restore(control.value_level, control.unit or 1.0)
        monitor.begin()
        for step in range(run.start, config.steps):
            learns = step >= config.critic_warmup
            with run.time("generate_and_reward"):
                draw, greedy = partial(_draw, prompts, config, control), needs == "greedy"
                experience = rollout(
                    actor, draw, *judges, config, games, greedy=greedy, drafts=parts.drafts
                )
            batch, totals, cuts = _judged(config, parts, experience, step, run)
            with run.time("train"), actor.lend_cache(*([] if own_critic is None else [own_critic])):
                found = _trained(config, parts, batch, cuts, step, ptx, meter := Meter())
                metrics = experience.metrics | found
            if recount(control, head) and own_critic is None:
                actor.mark_updated()
            control.update(metrics if learns else {}, totals)
            if warning := control.kl.warning():
                run.message(warning)
            parts.remember(batch, step)
            metrics |= monitor.after(step, metrics)
            run.log(step, metrics)
            run.samples(step, experience.samples(4), experience.columns, meter.columns)
            run.save_if_due(step)
        if own_critic is not None:
            run.write("critic", partial(own_critic.save_pretrained, tokenizer=actor.tokenizer))
        if config.lora is not None:
            run.write("adapter", partial(actor.save_adapter, base_model=config.model))
        return PolicyResult(run.finish(actor.save_pretrained), config.steps, run.last_metrics)


# ---- before the first step -----------------------------------------------------------------------
@dataclass(frozen=True)
class _Parts:
    """The models of a run, their learners, and the state that is carried from step to step. gold:
    rewards that are only measured, not trained on. scores_first: whether old log-probabilities,
    values or the KL are needed before the update.
    """

    actor: HybridActor
    reference: Reference | None
    rewards: RewardSet
    gold: RewardSet | None
    environments: Environments | None
    workers: Workers
    learner: Learner
    critic: TrainedCritic | None
    control: Control
    replay: ReplayBuffer | None
    drafts: Drafts | None
    scores_first: bool

    def remember(self, batch: PackedBatch, step: int) -> None:
        """Keep what later steps use of a step's completions, once its update is done."""
        if self.replay is not None:
            self.replay.add(batch, step)
        if self.drafts is not None:
            self.drafts.keep()

    @property
    def own_critic(self) -> SeparateCritic | None:
        """The critic, if it is a separate model; else None."""
        model = None if self.critic is None else self.critic.model
        return model if isinstance(model, SeparateCritic) else None

    @property
    def head(self) -> ValueHead | None:
        """Value head of the policy or of its critic; None if there is no critic."""
        return self.actor.value_head if self.own_critic is None else self.own_critic.head


def _check(config: PolicyConfig, needs: str | None) -> None:
    """Raise, before anything is loaded, ConfigError if options contradict the advantage or the
    objective, and DataError or FileNotFoundError if a data file is missing."""
    named = [part.data for part in (config, config.evaluation, config.ptx) if part is not None]
    for source in (source for data in named for source in parse_data(data)):
        check_source(source)
    if needs == "group" and config.samples_per_prompt == 1:
        raise ConfigError(
            f"config: expected samples_per_prompt > 1 for the advantage {config.advantage}, which "
            "compares the completions of one prompt"
        )
    if config.algorithm == "distill" and config.reference_model is None:
        raise ConfigError("config: expected reference_model, the teacher that distill learns from")
    make_objective(config, config.penalty.coef)
    if config.critic is not None and needs != "critic":
        raise ConfigError(
            f"config: expected no critic with the advantage {config.advantage}, which has no use "
            "for values; leave critic out"
        )
    check_trust_region(config)


def _in_advantage(config: PolicyConfig) -> bool:
    """Whether the advantages depend on the KL to the reference."""
    return config.kl.coef > 0 and (config.kl.placement == "reward" or config.kl.level == "future")


def _scores_first(config: PolicyConfig, needs: str | None) -> bool:
    """Whether the policy scores a rollout before the update; if not, the update's own forward gives
    the old log-probabilities."""
    return (
        (needs == "critic" and config.own_critic is None)
        or _in_advantage(config)
        or config.objective == "trpo"
        or (config.epochs * config.minibatches > 1 and not config.correction.bypass)
        or config.replay is not None
        or config.loss.entropy_target is not None
        or config.loss.chooses_tokens
    )


def _load(
    config: PolicyConfig,
    needs: str | None,
    ranks: Ranks,
    functions: Sequence[Any],
) -> _Parts:
    """Load all models; `functions` are the rewards, as `load_functions` returns them."""
    workers = Workers(config.reward_workers, config.reward_timeout)
    environments = environments_of(config, workers)
    seed_generators(config.run.seed)
    actor = HybridActor.from_pretrained(
        config.model,
        dtype=config.dtype,
        device=config.device,
        value_head=needs == "critic" and config.own_critic is None,
        strict=config.strict,
        cache=cache_for(config, ranks.size),
    )
    actor.ranks = ranks
    actor.decoder.checkpoint_activations = config.checkpoint_activations
    if config.lora is not None:
        actor.add_adapter(config.lora, seed=config.run.seed)
    reference = load_reference(config, actor) if config.needs_reference else None
    capped = actor.decoder.config.logit_softcap or (reference is not None and reference.capped)
    if config.kl.estimator == "full" and capped:
        raise ConfigError(
            "config: kl.estimator full reads logits that are not capped, and this model caps its "
            "own; use k2 or k3"
        )
    load = reward_loader(workers, actor)
    judges: list[Reward] = [load(one) for one in functions]
    counted, weights = judges[: len(config.reward)], config.reward_weights
    if environments is not None:
        weights = (*(weights or (1.0,) * len(counted)), 1.0)
        counted = [*counted, EnvironmentReward(environments)]
    rewards = RewardSet(counted, weights, ranks)
    gold = judges[len(config.reward) :]
    return _Parts(
        actor,
        reference,
        rewards,
        RewardSet(gold, ranks=ranks) if gold else None,
        environments,
        workers,
        Learner(actor, config.optim, ranks=ranks),
        critic_of(config, actor),
        Control(config),
        None if config.replay is None else ReplayBuffer(config.replay, config.run.seed),
        drafts_of(config.generation, actor.decoder.device, config.plays),
        _scores_first(config, needs),
    )


def _announce(config: PolicyConfig, needs: str | None, run: Run, drafts: Drafts | None) -> None:
    """Print which options will have no effect, and what is computed twice."""
    if config.idle_choices:
        run.message(
            f"{', '.join(config.idle_choices)} will never act: with one optimizer step a rollout "
            "every ratio is 1; raise minibatches or epochs, or leave it out"
        )
    if said := warn_of_drafts(config.generation, drafts):
        run.message(said)
    why = two_steps(
        config,
        make_objective(config, config.penalty.coef),
        strict=config.strict,
        scored=_scores_first(config, needs) or config.correction.bypass,
    )
    if why is not None and config.objective != "trpo":
        run.message(
            "log-probabilities are computed by themselves before the loss, one product over "
            f"the head more: {why}"
        )


# ---- a step --------------------------------------------------------------------------------------
def _judged(
    config: PolicyConfig, parts: _Parts, experience: Rollout, step: int, run: Run
) -> tuple[PackedBatch, Tensor, Cuts]:
    """Return a rollout's batch with scores and advantages, the total reward of each sequence, and
    the first epoch's micro-batches.

    Advantages are estimated before scoring if possible: completions without a gradient then get
    micro-batches of their own, and scoring uses the same micro-batches as training.
    """
    batch = experience.batch
    if config.mask_truncated_completions:
        batch = batch.with_columns(loss_mask=experience.whole())
    if config.loss.bootstrap_truncated:
        batch = batch.with_columns(cut_off=experience.cut_off())
    batch, totals = parts.control.scaled(batch), None
    if advantages_first(config):
        with run.time("advantage"):
            batch, totals = _estimated(config, parts, batch)
    with run.time("score"):
        batch, cuts = _scored(config, parts, batch, step)
    if totals is None:
        with run.time("advantage"):
            batch, totals = _estimated(config, parts, batch)
    if config.loss.chooses_tokens:
        batch = of_chosen_tokens(config, batch, step)
    return batch, totals, cuts


def advantages_first(config: PolicyConfig) -> bool:
    """Whether advantages are estimated before the rollout is scored: they depend on rewards alone,
    and completions whose advantages are 0 are left out of training."""
    return (
        leaves_out(config)
        and ADVANTAGES.get(config.advantage, "critic") != "critic"
        and not _in_advantage(config)
    )


def _scored(
    config: PolicyConfig, parts: _Parts, batch: PackedBatch, step: int
) -> tuple[PackedBatch, Cuts]:
    """Return the batch with the models' log-probabilities and values, and the first epoch's
    micro-batches."""
    cuts = cuts_of(batch, config, step, 0, parts.learner.ranks.lanes)
    scored = parts.scores_first or step < config.critic_warmup
    batch = score(
        parts.actor if scored else None,
        parts.reference if config.scores_reference else None,
        batch,
        cuts,
        config.generation.temperature,
    )
    if parts.own_critic is not None:
        partition = [group for minibatch in cuts for group in minibatch]
        batch = parts.own_critic.score(batch, partition)
    return batch, cuts


def _estimated(
    config: PolicyConfig, parts: _Parts, batch: PackedBatch
) -> tuple[PackedBatch, Tensor]:
    """Return the batch with advantages and returns, and the total reward of each sequence."""
    control = parts.control
    signals = Signals.of(config, batch, control.kl.coef, control.returns.mean, control.level or 0.0)
    signals = settle(signals, control, parts.head)
    if parts.own_critic is None and parts.head is not None:
        parts.actor.mark_updated()
    batch = estimate(config, signals).with_columns(reward_parts=None)  # replay has no use for them
    return batch, signals.totals


def _trained(
    config: PolicyConfig,
    parts: _Parts,
    batch: PackedBatch,
    cuts: Cuts,
    step: int,
    ptx: Ptx | None,
    meter: Meter,
) -> dict[str, float]:
    """Train critic and policy on a rollout and return the metrics."""
    actor, control, critic = parts.actor, parts.control, parts.critic
    metrics: dict[str, float] = {}
    if critic is not None and step < critic.rollouts:
        metrics |= update_critic(critic, batch, cuts, config, control, step)
        if parts.own_critic is None:
            actor.mark_updated()
    if step < config.critic_warmup:
        return metrics | measure(batch, control.kl.coef, config)
    of_policy = (actor, parts.reference, parts.learner, batch, cuts, config, control, step, ptx)
    if config.objective == "trpo":
        return metrics | trust_region_update(*of_policy)
    replay = parts.replay
    drawn = None if replay is None else replay.draw(step, batch.num_sequences, batch.device)
    return metrics | update(*of_policy, drawn, meter)


def settle(signals: Signals, control: Control, head: ValueHead | None) -> Signals:
    """Correct the baseline and the values before advantages are estimated: the first rollout by its
    mean return, later ones by their mean error beyond chance. The value head's new scale (`unit`)
    takes effect in `recount`, after this rollout's update; for the first rollout at once."""
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
    """Rescale the value head to the unit that the last rollout's returns gave; return whether the
    unit changed. A change writes parameters, so a step calls this only when its update begins or
    ends: in between, memory must hold the complete previous step."""
    if head is None or control.next_unit is None or control.next_unit == control.unit:
        return False
    control.unit = control.next_unit
    head.count_in(control.unit)
    return True


# ---- the batch, and how it is cut ----------------------------------------------------------------
def _draw(
    prompts: Mixture[Prompt], config: PolicyConfig, control: Control, count: int
) -> tuple[list[Prompt], int]:
    """Return the next `count` prompts of the stream, and the index of the first one."""
    first = control.drawn
    control.drawn += count
    return prompts.draw(config.run.seed, first, first + count), first


@torch.no_grad()
def score(
    actor: HybridActor | None,
    reference: Reference | None,
    batch: PackedBatch,
    cuts: Cuts,
    temperature: float,
) -> PackedBatch:
    """Fill old_logp, old_entropy, values (if the actor has a value head) and ref_logp by the
    training forward, in the micro-batches `cuts`. If `actor` or `reference` is None, its columns
    stay empty."""
    partition = [group for minibatch in cuts for group in minibatch]
    if actor is not None:
        ours, last_B = actor.score_with_ends(batch, temperature, partition=partition)
        batch = batch.with_columns(old_logp=ours.logp, old_entropy=ours.entropy)
        if ours.values is not None:
            batch = batch.with_columns(values=ours.values, last_values=last_B)
    if reference is not None:
        # The reference is scored over all tokens. If it were truncated to the kept tokens, too, a
        # policy that narrows to tokens the reference never gives would have no KL to it.
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
    meter: Meter | None = None,
) -> dict[str, float]:
    """Make epochs x minibatches optimizer steps on a rollout and replayed completions; each adds
    the gradient of `ptx`. Micro-batches without a gradient are left out, but a minibatch that has
    only such micro-batches keeps one of them. Return the metrics."""
    loss_of = RolloutLoss.of(config, actor, reference, batch, control)
    total_updates, done = updates_of(
        config, step - config.critic_warmup, config.steps - config.critic_warmup
    )
    meter = meter or Meter()
    measured = None if batch.old_logp is None else measure(batch, control.kl.coef, config)
    fresh, lanes = batch.num_sequences, learner.ranks.lanes
    if replayed is not None:
        apart = without_gradient(config, replayed.batch)
        first_cuts = with_replay(
            first_cuts, fresh, replayed.batch, config.tokens_per_microbatch, apart, lanes
        )
        batch = PackedBatch.concat([batch, replayed.batch])
    idle, trained, given = without_gradient(config, batch), 0, 0
    for epoch in range(config.epochs):
        for minibatch in first_cuts if epoch == 0 else cuts_of(batch, config, step, epoch, lanes):
            weighted = weighted_by(batch, minibatch, config)
            last = epoch == config.epochs - 1
            moving = [group for group in minibatch if not idle.issuperset(group)] or minibatch[:1]
            trained += sum(map(len, moving))
            given += sum(map(len, minibatch))
            # log-probabilities, entropies, and log ratios to the old policy
            seen = torch.zeros(3, batch.num_tokens, device=batch.device)
            with learner.update(done, total_updates) as one:
                work = one.share(moving, costs_of(batch.lengths, moving))
                for group in work:
                    micro = loss_of(weighted.select(group))
                    work.backward(micro.loss)
                    work.tell(*micro.numbers)
                    if measured is None or last:
                        seen[:, batch.slots(group)] = micro.of_tokens()
                if measured is None or last:
                    learner.ranks.sum("log-probabilities", seen)
                if measured is None:
                    measured = _measured(batch, minibatch, moving, seen[:2], config, control)
                first = epoch == 0 and minibatch is first_cuts[0]
                for group, numbers in zip(moving, work.rows(), strict=True):
                    # only the first epoch has micro-batches of replayed completions alone
                    old = epoch == 0 and group[0] >= fresh
                    found = statistics(numbers, loss_of)
                    meter.add(*found, epoch, first=first and not old, replayed=old)
                if ptx is not None:
                    ptx.backward(actor, done, one)
            if last:
                slots = batch.slots([b for group in moving for b in group])
                meter.add_ratios(seen[2, slots][batch.trained_mask[slots]])
            meter.grad_norms.append(one.grad_norm)
            done += 1
    # the next phase needs the memory: keep only weights, optimizer state and cache
    learner.release()
    metrics = (measured or {}) | meter.metrics(config.exact_kl) | learner.metrics()
    if config.loss.entropy_target is not None:
        metrics["entropy_coef"] = loss_of.entropy_coef
    if advantages_first(config) or trained < given:
        metrics["policy/left_out_fraction"] = 1 - trained / given
    for beside in (ptx.metrics() if ptx is not None else {}, replayed.metrics if replayed else {}):
        metrics |= beside
    return metrics


def _measured(
    batch: PackedBatch,
    minibatch: list[list[int]],
    trained: list[list[int]],
    seen_2N: Tensor,
    config: PolicyConfig,
    control: Control,
) -> dict[str, float]:
    """Return the metrics of a rollout that was not scored before its update. They come from the
    log-probabilities and entropies of the first minibatch, before the weights change; with
    correction.bypass a rollout has several minibatches."""
    scored_N = torch.zeros(batch.num_tokens, dtype=torch.bool, device=batch.device)
    scored_N[batch.slots([b for group in trained for b in group])] = True
    scored_N &= batch.trained_mask
    members = sorted(b for group in minibatch for b in group)
    first = batch.with_columns(
        old_logp=torch.where(scored_N, seen_2N[0], batch.column("rollout_logp")),
        old_entropy=seen_2N[1],
    ).select(members)
    found = measure(first, control.kl.coef, config, scored_N[batch.slots(members)])
    return found | {"step_tokens": float(batch.num_tokens)}
