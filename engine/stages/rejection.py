"""Rejection-sampling fine-tuning: sample, score, keep the best completions, train on them by
cross-entropy, and repeat with the new weights.

Each step draws prompts_per_step prompts and samples_per_prompt completions of each, keeps the best,
and makes epochs x minibatches optimizer steps on them. The loss is a mean over all the completion
tokens of a minibatch, however the minibatch is split into micro-batches. There is no ratio and no
reference: every kept completion is imitated, and no other. If no sample of a prompt is kept, the
prompt is skipped and counted. If no sample of a step is kept, the step trains nothing (`updates`
is 0).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from fusedrl.engine.actor import HybridActor
from fusedrl.engine.base.draws import seed_generators
from fusedrl.engine.base.ordering import shuffled
from fusedrl.engine.base.packing import PackedBatch
from fusedrl.engine.config import RejectionConfig
from fusedrl.engine.generation.drafts import drafts_of, warn_of_drafts
from fusedrl.engine.optim.learner import Learner
from fusedrl.engine.parallel.lanes import costs_of
from fusedrl.engine.parallel.ranks import Ranks, joined
from fusedrl.engine.rewards.pool import Workers
from fusedrl.engine.rewards.rewards import RewardSet, load_functions
from fusedrl.engine.rollout.prompts import longest_of, read_prompts
from fusedrl.engine.rollout.rollout import Rollout, reward_loader, rollout
from fusedrl.engine.rollout.sampled import Prompt
from fusedrl.engine.runs.metrics import read_rows
from fusedrl.engine.runs.run import Run
from fusedrl.engine.watch.monitor import FlatRewards
from fusedrl.engine.watch.plan import cache_for, demand_of
from fusedrl.kernels.runtime.faults import raise_faults

Drawn = tuple[list[Prompt], int]  # prompts, and the number of the first


@dataclass(frozen=True)
class RejectionResult:
    """Path of the trained policy's directory, and the last step's metrics."""

    model: str
    steps: int
    metrics: dict[str, float]


def train_rejection(config: RejectionConfig) -> RejectionResult:
    """Train a policy on the best of its own samples.

    The run directory receives config.json, metrics.jsonl, samples.jsonl, checkpoints and, at the
    end, model/ (loadable by transformers).

    Raises:
        DataError, RewardError, ConfigError, OSError: the data, a reward or the configuration cannot
            be used, or a file cannot be read or written; nothing half-written is left behind.
        RuntimeError: five updates in a row had a non-finite gradient.
    """
    with joined(config.parallel.lanes, device=config.device) as ranks:
        return _train(config, ranks)


def _train(config: RejectionConfig, ranks: Ranks) -> RejectionResult:
    functions = load_functions(config.reward, config.data)
    seed_generators(config.run.seed)
    actor = HybridActor.from_pretrained(
        config.model,
        dtype=config.dtype,
        device=config.device,
        cache=cache_for(config, ranks.size),
    )
    actor.ranks = ranks
    actor.decoder.checkpoint_activations = config.checkpoint_activations
    if config.lora is not None:
        actor.add_adapter(config.lora, seed=config.run.seed)
    load = reward_loader(workers := Workers(config.reward_workers, config.reward_timeout), actor)
    rewards = RewardSet([load(one) for one in functions], config.reward_weights, ranks)
    learner = Learner(actor, config.optim, ranks=ranks)
    with workers, Run(config, config.steps, ranks) as run:
        prompts = read_prompts(config, actor, run)
        longest = longest_of(prompts)
        actor.limit_cache(*demand_of(config, actor.decoder.config, longest, ranks.size))
        flat = _flat_rewards(config, run)
        drafts = drafts_of(config.generation, actor.decoder.device)
        if idle := warn_of_drafts(config.generation, drafts):
            run.message(idle)
        run.restore(model=learner, drafts=drafts)
        for step in range(run.start, config.steps):

            def draw(count: int, first: int = step * config.prompts_per_step) -> Drawn:
                return prompts.draw(config.run.seed, first, first + count), first

            with run.time("generate_and_reward"):
                experience = rollout(actor, draw, rewards, None, config, drafts=drafts)
            kept = best(experience, config.keep, config.min_score)
            with run.time("train"), actor.lend_cache():
                metrics = (
                    experience.metrics
                    | _describe(experience, kept, config)
                    | imitate(actor, learner, experience.batch, kept, config, step)
                )
            if drafts is not None:
                drafts.keep()
            if said := flat.update(metrics):
                run.message(f"step {step + 1}: {said}")
            run.log(step, metrics)
            run.samples(
                step,
                [
                    {
                        "prompt": experience.prompts[b].prompt,
                        "completion": experience.completions[b].text,
                        "score": experience.batch.column("scores")[b].item(),
                    }
                    for b in kept[:4]
                ],
                experience.columns,
            )
            run.save_if_due(step)
        if config.lora is not None:
            run.write("adapter", partial(actor.save_adapter, base_model=config.model))
        return RejectionResult(run.finish(actor.save_pretrained), config.steps, run.last_metrics)


def _flat_rewards(config: RejectionConfig, run: Run) -> FlatRewards:
    """Return the detector of flat rewards, as a resumed run's rows left it."""
    flat = FlatRewards(
        "group" if config.min_score is None else "",
        config.prompts_per_step * config.samples_per_prompt,
        config.generation.max_new_tokens,
    )
    for row in read_rows(run.directory / "metrics.jsonl"):
        flat.update(row)
    return flat


def best(experience: Rollout, keep: int, min_score: float | None) -> list[int]:
    """Choose the sequences to imitate: for each prompt, the `keep` best completions that score at
    least `min_score`. Of equal scores the earlier one is taken. Return their indices in the batch,
    in increasing order."""
    scores = experience.batch.column("scores").tolist()
    groups: dict[int, list[int]] = defaultdict(list)
    for index, group in enumerate(experience.batch.column("group_ids").tolist()):
        if min_score is None or scores[index] >= min_score:
            groups[group].append(index)
    return sorted(
        index
        for members in groups.values()
        for index in sorted(members, key=lambda i: (-scores[i], i))[:keep]
    )


def imitate(
    actor: HybridActor,
    learner: Learner,
    batch: PackedBatch,
    kept: Sequence[int],
    config: RejectionConfig,
    step: int,
) -> dict[str, float]:
    """Make epochs x minibatches optimizer steps of cross-entropy on the sequences `kept` of the
    batch, and return the metrics. If there are fewer sequences than minibatches, each sequence is a
    minibatch."""
    losses: list[float] = []
    norms: list[float] = []
    total = config.steps * config.epochs * config.minibatches
    for epoch in range(config.epochs):
        order, count = (
            [kept[i] for i in shuffled(len(kept), config.run.seed, "rejection", step, epoch)],
            min(config.minibatches, len(kept)),
        )
        for part in range(count):
            members = order[part * len(order) // count : (part + 1) * len(order) // count]
            tokens = int(batch.select(members).action_mask.sum())
            with learner.update(
                (step * config.epochs + epoch) * config.minibatches + part, total
            ) as update:
                groups = batch.split(config.tokens_per_microbatch, members, lanes=update.lanes)
                work = update.share(groups, costs_of(batch.lengths, groups))
                for group in work:
                    micro = batch.select(group)
                    # the denominator is the whole minibatch's
                    work.backward(actor.cross_entropy(micro, actor.forward(micro), 1 / tokens))
                loss = work.loss()
            norms.append(update.grad_norm)
            losses += [] if loss is None else [loss.item()]
    raise_faults(batch.device)
    # the next rollout needs the memory: keep only weights, optimizer state and cache
    learner.release()
    if not norms:
        return {"updates": 0.0}
    return {
        "updates": float(len(norms)),
        "loss": sum(losses) / len(losses),
        "grad_norm": sum(norms) / len(norms),
    } | learner.metrics()


def _describe(
    experience: Rollout, kept: Sequence[int], config: RejectionConfig
) -> dict[str, float]:
    """Return metrics of the samples that a step kept: their share of the batch, the number of
    prompts without one, and their mean score and length."""
    batch = experience.batch
    groups = batch.column("group_ids").tolist()
    found = {
        "kept/fraction": len(kept) / len(groups),
        "kept/prompts_skipped": float(config.prompts_per_step - len({groups[b] for b in kept})),
        "step_tokens": float(batch.num_tokens),
    }
    if kept:
        scores = batch.column("scores").tolist()
        found |= {
            "kept/reward": sum(scores[b] for b in kept) / len(kept),
            "kept/mean_length": sum(len(experience.completions[b].token_ids) for b in kept)
            / len(kept),
        }
    return found
