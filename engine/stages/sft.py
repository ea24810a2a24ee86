"""Supervised fine-tuning (SFT): cross-entropy on demonstrations, averaged over all the completion
tokens of an optimizer step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

from fusedrl.engine.actor import HybridActor
from fusedrl.engine.base.draws import seed_generators
from fusedrl.engine.base.packing import PackedBatch
from fusedrl.engine.config import SFTConfig
from fusedrl.engine.data.mixture import mix
from fusedrl.engine.data.readers import ReadOptions, Source, load_demonstrations, load_dialogues
from fusedrl.engine.data.tokenize import (
    count_tokens,
    encode_demonstrations,
    encode_dialogues,
    end_of_text,
)
from fusedrl.engine.optim.learner import Learner
from fusedrl.engine.parallel.lanes import costs_of
from fusedrl.engine.parallel.ranks import Ranks, joined
from fusedrl.engine.runs.run import Run, held_out
from fusedrl.kernels.runtime.faults import raise_faults

Tokens = tuple[list[int], list[bool]]  # token ids, and for each whether it is trained on


@dataclass(frozen=True)
class SFTResult:
    """Path of the trained model's directory, and the last step's metrics."""

    model: str
    steps: int
    metrics: dict[str, float]


def train_sft(config: SFTConfig) -> SFTResult:
    """Fine-tune a language model on demonstrations.

    The run directory receives config.json, metrics.jsonl, checkpoints and, at the end, model/
    (loadable by transformers).

    Raises:
        DataError, ConfigError, OSError: the data or the configuration cannot be used, or a file
            cannot be read or written; nothing half-written is left behind.
        RuntimeError: five updates in a row had a non-finite gradient.
    """
    with joined(config.parallel.lanes, device=config.device) as ranks:
        return _train(config, ranks)


def _train(config: SFTConfig, ranks: Ranks) -> SFTResult:
    seed_generators(config.run.seed)
    actor = HybridActor.from_pretrained(config.model, dtype=config.dtype, device=config.device)
    actor.ranks = ranks
    actor.decoder.checkpoint_activations = config.checkpoint_activations
    if config.lora is not None:
        actor.add_adapter(config.lora, seed=config.run.seed)
    learner = Learner(actor, config.optim, ranks=ranks)
    with Run(config, None, ranks) as run:
        train, held = mix(config.data, partial(_read, config, actor, run)).split(
            lambda sequences: held_out(sequences, config.eval_fraction, config.run.seed)
        )

        def held_loss() -> dict[str, float]:
            with run.apart("evaluate"):
                return {"eval_loss": cross_entropy(actor, held, config.tokens_per_microbatch)}

        for step, chosen in run.steps(
            train, config.sequences_per_step, config.epochs, model=learner
        ):
            if step == 0 and held and config.eval_every:
                run.record(0, held_loss())
            batch = PackedBatch.from_masked(chosen, device=actor.decoder.device)
            tokens = int(batch.action_mask.sum())
            groups = batch.split(config.tokens_per_microbatch, lanes=learner.ranks.lanes)
            with run.time("train"), learner.update(step, run.total) as update:
                work = update.share(groups, costs_of(batch.lengths, groups))
                for group in work:
                    micro = batch.select(group)
                    # the denominator is the whole step's
                    work.backward(actor.cross_entropy(micro, actor.forward(micro), 1 / tokens))
                total = work.loss()
            raise_faults(actor.decoder.device)  # where the host reads the loss anyway
            loss = 0.0 if total is None else total.item()
            metrics = {
                "loss": loss,
                "perplexity": math.exp(min(80.0, loss)),
                "grad_norm": update.grad_norm,
                "step_tokens": float(batch.num_tokens),
            } | learner.metrics()
            if held and (
                step == run.total - 1 or (config.eval_every and (step + 1) % config.eval_every == 0)
            ):
                metrics |= held_loss()
            run.log(step, metrics)
        if config.lora is not None:
            run.write("adapter", partial(actor.save_adapter, base_model=config.model))
        return SFTResult(run.finish(actor.save_pretrained), run.total, run.last_metrics)


def _read(config: SFTConfig, actor: HybridActor, run: Run, source: Source) -> list[Tokens]:
    """Return the demonstrations of a file as token ids, with a mask of the tokens to train on."""
    trunk = actor.decoder.config
    limit = min(trunk.max_positions, config.max_length or trunk.max_positions)
    end, rejects = end_of_text(actor.tokenizer, trunk.eos_token_ids), run.rejects()
    if config.every_turn:
        dialogues, unusable = load_dialogues(
            source, skip_bad_lines=config.skip_bad_lines, rejects=rejects
        )
        for reason, count in unusable.items():
            run.message(
                f"dialogues: {count} of {len(dialogues) + sum(unusable.values())} are not "
                f"used: {reason}"
            )
        sequences, dropped = encode_dialogues(actor.tokenizer, dialogues, end, limit)
    else:
        examples = load_demonstrations(
            source,
            skip_bad_lines=config.skip_bad_lines,
            rejects=rejects,
            options=ReadOptions(count_tokens=partial(count_tokens, actor.tokenizer)),
        )
        pairs, dropped = encode_demonstrations(actor.tokenizer, examples, end, limit)
        sequences = [
            (prompt + completion, [False] * len(prompt) + [True] * len(completion))
            for prompt, completion in pairs
        ]
    run.message(f"demonstrations: {dropped}")
    return sequences


def cross_entropy(actor: HybridActor, sequences: list[Tokens], tokens_per_microbatch: int) -> float:
    """Return the mean negative log-probability of the completion tokens, in nats."""
    batch = PackedBatch.from_masked(sequences, device=actor.decoder.device)
    logp = actor.score(batch, partition=batch.split(tokens_per_microbatch)).logp
    return -logp[batch.action_mask].double().mean().item()
