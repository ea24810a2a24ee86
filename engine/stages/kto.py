"""KTO: train a policy on single answers that are labelled as wanted or not, without sampling,
without pairs and without a reward model. The loss is in preference/losses.py.

At each step policy and reference first score the step's prompts with the answers of their
neighbours, which estimates their KL, z; then the answers are trained on, in micro-batches that do
not change the step's gradient. Before the first update policy and reference agree bit for
bit, so z and every log-ratio are exactly 0, and the loss is half of the mean weight.
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
from fusedrl.engine.config import KTOConfig
from fusedrl.engine.data.mixture import mix
from fusedrl.engine.data.readers import Source
from fusedrl.engine.optim.learner import Learner, Update
from fusedrl.engine.parallel.lanes import costs_of
from fusedrl.engine.parallel.ranks import Ranks, joined
from fusedrl.engine.preference.answers import TokenAnswer, mismatched, packed, read_answers
from fusedrl.engine.preference.losses import answer_sums, kto_loss
from fusedrl.engine.rollout.reference import Reference, load_reference
from fusedrl.engine.runs.run import Run, held_out
from fusedrl.kernels.runtime.faults import raise_faults

Cuts = list[list[int]]  # [micro-batch] -> answers


@dataclass(frozen=True)
class KTOResult:
    """Path of the trained policy's directory, the last step's metrics, and the accuracy on held-out
    answers with its 95% interval (nan if none were held out)."""

    model: str
    steps: int
    metrics: dict[str, float]
    accuracy: float
    interval: tuple[float, float]
    held_out: int


def train_kto(config: KTOConfig) -> KTOResult:
    """Train a policy on labelled answers.

    The run directory receives config.json, metrics.jsonl, checkpoints and, at the end, model/
    (loadable by transformers).

    Raises:
        DataError, ConfigError, OSError: the data or the configuration cannot be used, or a file
            cannot be read or written; nothing half-written is left behind.
        RuntimeError: five updates in a row had a non-finite gradient.
    """
    with joined(config.parallel.lanes, device=config.device) as ranks:
        return _train(config, ranks)


def _train(config: KTOConfig, ranks: Ranks) -> KTOResult:
    seed_generators(config.run.seed)
    actor = HybridActor.from_pretrained(config.model, dtype=config.dtype, device=config.device)
    actor.ranks = ranks
    actor.decoder.checkpoint_activations = config.checkpoint_activations
    if config.lora is not None:
        actor.add_adapter(config.lora, seed=config.run.seed)
    reference = load_reference(config, actor)
    learner = Learner(actor, config.optim, ranks=ranks)
    with Run(config, None, ranks) as run:
        limit = longest_of(actor, config)

        def read(source: Source) -> list[TokenAnswer]:
            return read_answers(
                source,
                actor.tokenizer,
                actor.decoder.config.eos_token_ids,
                limit,
                skip_bad_lines=config.skip_bad_lines,
                rejects=run.rejects(),
                tell=run.message,
            )

        train, held = mix(config.data, read).split(
            lambda answers: held_out(answers, config.eval_fraction, config.run.seed)
        )
        everything = train.draw(config.run.seed, 0, len(train))
        wanted = sum(one.wanted for one in everything)
        if warning := config.imbalance(wanted, len(everything) - wanted):
            run.message(warning)
        for step, answers in run.steps(
            train, config.answers_per_step, config.epochs, model=learner
        ):
            with run.time("reference"):
                z = reference_point(actor, reference, answers, config)
                batch, cuts = with_reference(actor, reference, answers, config)
            with run.time("train"), learner.update(step, run.total) as update:
                logp, loss = _backward(update, actor, batch, cuts, answers, z, config)
            raise_faults(actor.decoder.device)  # where the host reads the loss anyway
            metrics = {"loss": loss} | describe(batch, logp, answers, z, config)
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
        low, high = (last.get(f"eval_rewards/accuracies_{x}", math.nan) for x in ("low", "high"))
        return KTOResult(
            run.finish(actor.save_pretrained),
            run.total,
            last,
            last.get("eval_rewards/accuracies", math.nan),
            (low, high),
            len(held),
        )


def longest_of(actor: HybridActor, config: KTOConfig) -> int:
    """Return the largest number of tokens of a prompt with its answer."""
    most = actor.decoder.config.max_positions
    return min(most, config.max_length or most)


@torch.no_grad()
def reference_point(
    actor: HybridActor, reference: Reference, answers: Sequence[TokenAnswer], config: KTOConfig
) -> float:
    """Return z, the estimate of KL(pi || ref) in nats per answer: the mean log-ratio of prompts
    with their neighbours' answers, or 0 where that is negative, or with fewer than two answers."""
    sequences = mismatched(answers, longest_of(actor, config))
    if not sequences:
        return 0.0
    batch, cuts = packed(
        sequences, config.tokens_per_microbatch, actor.decoder.device, actor.ranks.lanes
    )
    batch = batch.with_columns(ref_logp=reference.score(batch, partition=cuts).logp)
    ratios_B = answer_sums(batch, actor.score(batch, partition=cuts).logp, ratios=True)
    return max(0.0, ratios_B.mean().item())


def with_reference(
    actor: HybridActor, reference: Reference, answers: Sequence[TokenAnswer], config: KTOConfig
) -> tuple[PackedBatch, Cuts]:
    """Pack answers into a batch with the column ref_logp; return it with its micro-batches."""
    batch, cuts = packed(
        [(one.prompt, one.answer) for one in answers],
        config.tokens_per_microbatch,
        actor.decoder.device,
        actor.ranks.lanes,
    )
    return batch.with_columns(ref_logp=reference.score(batch, partition=cuts).logp), cuts


def losses(ratios_B: Tensor, answers: Sequence[TokenAnswer], z: float, config: KTOConfig) -> Tensor:
    """Return the losses [B] of answers from their log-ratios."""
    return kto_loss(
        ratios_B,
        wanted_of(answers, ratios_B.device),
        z,
        beta=config.beta,
        desirable_weight=config.desirable_weight,
        undesirable_weight=config.undesirable_weight,
    )


def _backward(
    update: Update,
    actor: HybridActor,
    batch: PackedBatch,
    cuts: Cuts,
    answers: Sequence[TokenAnswer],
    z: float,
    config: KTOConfig,
) -> tuple[Tensor, float]:
    """Add the gradient of a step's loss, the mean over its answers. Return the log-probabilities
    [N] and the loss."""
    logp_N = torch.zeros(batch.num_tokens, device=batch.device)
    work = update.share(cuts, costs_of(batch.lengths, cuts))
    for cut in work:
        micro = batch.select(cut)
        logp, _ = actor.logprobs(micro, actor.forward(micro))
        ratios = answer_sums(micro, logp, ratios=True)
        work.backward(losses(ratios, [answers[i] for i in cut], z, config).sum() / len(answers))
        logp_N[batch.slots(cut)] = logp.detach()
    actor.ranks.sum("log-probabilities", logp_N)
    loss = work.loss()
    return logp_N, 0.0 if loss is None else loss.item()


def wanted_of(answers: Sequence[TokenAnswer], device: torch.device) -> Tensor:
    """Return [B] bool: which answers are wanted."""
    return torch.tensor([one.wanted for one in answers], dtype=torch.bool, device=device)


def describe(
    batch: PackedBatch, logp_N: Tensor, answers: Sequence[TokenAnswer], z: float, config: KTOConfig
) -> dict[str, float]:
    """Return means over wanted (chosen) and unwanted (rejected) answers, under TRL's metric names;
    those of a kind that the step lacks are absent. rewards/... are beta (log pi - log ref),
    logps/... the log-probabilities, kl is z. rewards/accuracies is the share of answers whose
    log-ratio lies on the label's side of z; on it counts as wrong."""
    ratios, logps = (answer_sums(batch, logp_N, ratios=which) for which in (True, False))
    wanted = wanted_of(answers, ratios.device)
    found = {"kl": z, "rewards/accuracies": _right(ratios, wanted, z) / len(answers)}
    for name, these in (("chosen", wanted), ("rejected", ~wanted)):
        if these.any():
            found[f"rewards/{name}"] = config.beta * ratios[these].mean().item()
            found[f"logps/{name}"] = logps[these].mean().item()
    if "rewards/chosen" in found and "rewards/rejected" in found:
        found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
    return found


def _right(ratios_B: Tensor, wanted_B: Tensor, z: float) -> int:
    """Return the number of answers whose log-ratio lies on the label's side of z."""
    return int(torch.where(wanted_B, ratios_B > z, ratios_B < z).sum())


@torch.no_grad()
def evaluate(
    actor: HybridActor, reference: Reference, answers: Sequence[TokenAnswer], config: KTOConfig
) -> dict[str, float]:
    """Return loss, z, margin and accuracy on held-out answers, with the accuracy's 95% interval; an
    empty dictionary if there are no answers."""
    if not answers:
        return {}
    z = reference_point(actor, reference, answers, config)
    batch, cuts = with_reference(actor, reference, answers, config)
    logp_N = actor.score(batch, partition=cuts).logp
    ratios = answer_sums(batch, logp_N, ratios=True)
    found = describe(batch, logp_N, answers, z, config)
    low, high = wilson_interval(_right(ratios, wanted_of(answers, ratios.device), z), len(answers))
    told = ("kl", "rewards/margins", "rewards/accuracies")
    return {
        "eval_loss": losses(ratios, answers, z, config).mean().item(),
        "eval_answers": float(len(answers)),
        **{f"eval_{name}": found[name] for name in told if name in found},
        "eval_rewards/accuracies_low": low,
        "eval_rewards/accuracies_high": high,
    }
