"""Direct preference optimisation (DPO): train a policy on pairs, without sampling and without a
reward model. The losses are in preference/losses.py.

A reference scores each step's pairs in the micro-batches of training, in the same precision. So
before the first update its log-probabilities equal the policy's bit for bit, h is exactly 0 and the
sigmoid loss exactly log 2. There is no dropout. A micro-batch holds both sides of its pairs; the
split of a step into micro-batches does not change its gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fusedrl.engine.actor import HybridActor
from fusedrl.engine.base.draws import seed_generators
from fusedrl.engine.base.estimates import wilson_interval
from fusedrl.engine.base.packing import PackedBatch
from fusedrl.engine.config import DPOConfig
from fusedrl.engine.data.mixture import mix
from fusedrl.engine.data.readers import Source
from fusedrl.engine.optim.learner import Learner, Update
from fusedrl.engine.parallel.lanes import costs_of
from fusedrl.engine.parallel.ranks import Ranks, joined
from fusedrl.engine.preference.losses import Of, PairScores, pair_loss, pair_scores
from fusedrl.engine.preference.pairs import (
    TokenPair,
    column_of,
    pack_pairs,
    read_pairs,
    sequences_of,
)
from fusedrl.engine.rollout.reference import Reference, load_reference
from fusedrl.engine.runs.run import Run, held_out
from fusedrl.kernels.runtime.faults import raise_faults

Cuts = list[list[int]]  # [micro-batch] -> pairs


@dataclass(frozen=True)
class DPOResult:
    """Path of the trained policy's directory, the last step's metrics, and the accuracy on held-out
    pairs with its 95% interval (nan if no pairs were held out)."""

    model: str
    steps: int
    metrics: dict[str, float]
    accuracy: float
    interval: tuple[float, float]
    held_out: int


def train_dpo(config: DPOConfig) -> DPOResult:
    """Train a policy on preference pairs.

    The run directory receives config.json, metrics.jsonl, checkpoints and, at the end, model/
    (loadable by transformers).

    Raises:
        DataError, ConfigError, OSError: the data or the configuration cannot be used, or a file
            cannot be read or written; nothing half-written is left behind.
        RuntimeError: five updates in a row had a non-finite gradient.
    """
    with joined(config.parallel.lanes, device=config.device) as ranks:
        return _train(config, ranks)


def _train(config: DPOConfig, ranks: Ranks) -> DPOResult:
    seed_generators(config.run.seed)
    actor = HybridActor.from_pretrained(config.model, dtype=config.dtype, device=config.device)
    actor.ranks = ranks
    actor.decoder.checkpoint_activations = config.checkpoint_activations
    if config.lora is not None:
        actor.add_adapter(config.lora, seed=config.run.seed)
    reference = load_reference(config, actor) if config.needs_reference else None
    learner = Learner(actor, config.optim, ranks=ranks)
    with Run(config, None, ranks) as run:
        trunk = actor.decoder.config
        limit = min(trunk.max_positions, config.max_length or trunk.max_positions)

        def read(source: Source) -> list[TokenPair]:
            return read_pairs(
                source,
                actor.tokenizer,
                trunk.eos_token_ids,
                limit,
                skip_bad_lines=config.skip_bad_lines,
                rejects=run.rejects(),
                tell=run.message,
            )

        train, held = mix(config.data, read).split(
            lambda pairs: held_out(pairs, config.eval_fraction, config.run.seed)
        )
        for step, pairs in run.steps(train, config.pairs_per_step, config.epochs, model=learner):
            batch, cuts = pack_pairs(
                pairs, config.tokens_per_microbatch, actor.decoder.device, ranks.lanes
            )
            if reference is not None:
                with run.time("reference"):
                    batch = with_reference(reference, batch, cuts)
            with run.time("train"), learner.update(step, run.total) as update:
                scores, loss = _backward(update, actor, batch, cuts, pairs, config)
            raise_faults(actor.decoder.device)  # where the host reads the loss anyway
            metrics = {"loss": loss} | describe(scores, pairs, config)
            metrics |= {
                "grad_norm": update.grad_norm,
                "step_tokens": float(batch.num_tokens),
            } | learner.metrics()
            if step == run.total - 1:
                with run.time("evaluate"):
                    metrics |= evaluate(actor, reference, held, config)
            run.log(step, metrics)
        if config.lora is not None:
            run.write("adapter", partial(actor.save_adapter, base_model=config.model))
        last = run.last_metrics
        interval = (
            last.get("eval_rewards/accuracies_low", math.nan),
            last.get("eval_rewards/accuracies_high", math.nan),
        )
        return DPOResult(
            run.finish(actor.save_pretrained),
            run.total,
            last,
            last.get("eval_rewards/accuracies", math.nan),
            interval,
            len(held),
        )


def with_reference(reference: Reference, batch: PackedBatch, cuts: Cuts) -> PackedBatch:
    """Return the batch with the column ref_logp, scored in the micro-batches `cuts`."""
    return batch.with_columns(
        ref_logp=reference.score(batch, partition=[sequences_of(cut) for cut in cuts]).logp
    )


def _backward(
    update: Update,
    actor: HybridActor,
    batch: PackedBatch,
    cuts: Cuts,
    pairs: Sequence[TokenPair],
    config: DPOConfig,
) -> tuple[PairScores, float]:
    """Add the gradient of a step's loss, the weighted mean over its pairs. Return the scores of the
    pairs and the loss."""
    total = sum(pair.weight for pair in pairs)
    logp_N = torch.zeros(batch.num_tokens, device=batch.device)
    work = update.share(cuts, costs_of(batch.lengths, map(sequences_of, cuts)))
    for cut in work:
        micro = batch.select(sequences_of(cut))
        logp, _ = actor.logprobs(micro, actor.forward(micro))
        scores = pair_scores(micro, logp)
        work.backward((weighted_loss(scores, [pairs[i] for i in cut], config) / total).double())
        logp_N[batch.slots(sequences_of(cut))] = logp.detach()
    actor.ranks.sum("log-probabilities", logp_N)
    loss = work.loss()
    return pair_scores(batch, logp_N), 0.0 if loss is None else loss.item()


def weighted_loss(scores: PairScores, pairs: Sequence[TokenPair], config: DPOConfig) -> Tensor:
    """Return the sum over pairs of weight x loss."""
    label_P, margin_P, weight_P = (
        column_of(pairs, name, scores.h.device) for name in ("label", "margin", "weight")
    )
    loss_P = pair_loss(
        config.loss,
        scores,
        label_P,
        margin_P + config.margin,
        beta=config.beta,
        label_smoothing=config.label_smoothing,
        nll_coef=config.nll_coef,
    )
    return (weight_P * loss_P).sum()


def compared(config: DPOConfig) -> Of:
    """Return which number of answers is reported and judged: log-ratios, or without a reference
    mean log-probabilities per token."""
    return "ratio" if config.needs_reference else "mean"


def describe(scores: PairScores, pairs: Sequence[TokenPair], config: DPOConfig) -> dict[str, float]:
    """Return means over pairs, under TRL's metric names. rewards/chosen and rewards/rejected are
    beta (log pi - log ref), or without a reference beta (log pi per token); rewards/margins is
    their difference. rewards/accuracies is how often that difference has the label's sign; pairs
    labelled a tie do not count. drift/chosen is how much less likely the chosen answers are than
    under the reference, in nats per token. It often rises together with the margins; nll_coef
    limits it."""
    of = compared(config)
    chosen, rejected = (config.beta * x for x in scores.of_answers(of))
    found = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "logps/chosen": scores.chosen_logp,
        "logps/rejected": scores.rejected_logp,
    }
    right, judged = agreement(scores.h_of(of), pairs)
    metrics = {name: values.mean().item() for name, values in found.items()}
    if judged:
        metrics["rewards/accuracies"] = right / judged
    if config.needs_reference:
        drift = 0.0 - scores.chosen_ratio.sum() / scores.chosen_tokens.sum()
        metrics["drift/chosen"] = drift.item()
    return metrics


def agreement(h_P: Tensor, pairs: Sequence[TokenPair]) -> tuple[int, int]:
    """Return the number of pairs whose h has the label's sign, and the number of pairs that are not
    labelled a tie. An h of 0 counts as wrong."""
    signs = torch.sign(column_of(pairs, "label", h_P.device) - 0.5)
    return int((h_P * signs > 0).sum()), int((signs != 0).sum())


@torch.no_grad()
def evaluate(
    actor: HybridActor,
    reference: Reference | None,
    pairs: Sequence[TokenPair],
    config: DPOConfig,
) -> dict[str, float]:
    """Return loss, margin and accuracy on held-out pairs, with the accuracy's 95% interval; an
    empty dictionary if there are no pairs."""
    if not pairs:
        return {}
    batch, cuts = pack_pairs(pairs, config.tokens_per_microbatch, actor.decoder.device)
    if reference is not None:
        batch = with_reference(reference, batch, cuts)
    scores = pair_scores(
        batch, actor.score(batch, partition=[sequences_of(cut) for cut in cuts]).logp
    )
    h_P = scores.h_of(compared(config))
    found = {
        "eval_loss": weighted_loss(scores, pairs, config).item()
        / sum(pair.weight for pair in pairs),
        "eval_pairs": float(len(pairs)),
        "eval_rewards/margins": config.beta * h_P.mean().item(),
    }
    right, judged = agreement(h_P, pairs)
    if judged:
        low, high = wilson_interval(right, judged)
        found |= {
            "eval_rewards/accuracies": right / judged,
            "eval_rewards/accuracies_low": low,
            "eval_rewards/accuracies_high": high,
        }
    return found
