"""Supervised fine-tuning: cross-entropy of demonstrations, a mean over all the completion tokens of an optimizer step."""
from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch

from fusedrl.engine.actor import HybridActor
from fusedrl.engine.base.packing import PackedBatch
from fusedrl.engine.config import SFTConfig
from fusedrl.engine.data.mixture import mix
from fusedrl.engine.data.readers import ReadOptions, Source, load_demonstrations, load_dialogues
from fusedrl.engine.data.tokenize import count_tokens, encode_demonstrations, encode_dialogues, end_of_text
from fusedrl.engine.optim.adamw import measure_optimizer, optimizer_of
from fusedrl.engine.optim.schedule import learning_rate
from fusedrl.engine.runs.run import Run, held_out
from fusedrl.kernels.faults import raise_faults

Tokens = tuple[list[int], list[bool]]  # ids, and which of them are to be learnt


@dataclass(frozen=True)
class SFTResult:
    """Where the trained model is, and the last step's metrics."""

    model: str
    steps: int
    metrics: dict[str, float]


def train_sft(config: SFTConfig) -> SFTResult:
    """Fine-tune a language model on demonstrations.

    The run directory receives config.json, metrics.jsonl, checkpoints and, at the end, model/ (loadable by transformers).

    Raises:
        DataError, ConfigError, OSError: as their messages say; nothing half-written is left behind.
        RuntimeError: five updates in a row had a non-finite gradient.
    """
    torch.manual_seed(config.run.seed)
    actor = HybridActor.from_pretrained(config.model, dtype=config.dtype, device=config.device)
    actor.decoder.checkpoint_activations = config.checkpoint_activations
    if config.lora is not None:
        actor.add_adapter(config.lora, seed=config.run.seed)
    optim = config.optim
    optimizer = optimizer_of(optim, actor.named_parameters())
    with Run(config, None) as run:
        trunk = actor.decoder.config
        limit = min(trunk.max_positions, config.max_length or trunk.max_positions)

        def read(source: Source) -> list[Tokens]:
            end, rejects = end_of_text(actor.tokenizer, trunk.eos_token_ids), run.directory / "rejects.jsonl"
            if config.every_turn:
                dialogues, unusable = load_dialogues(source, skip_bad_lines=config.skip_bad_lines, rejects=rejects)
                for reason, count in unusable.items():
                    run.message(f"dialogues: {count} of {len(dialogues) + sum(unusable.values())} are not used: {reason}")
                sequences, dropped = encode_dialogues(actor.tokenizer, dialogues, end, limit)
            else:
                examples = load_demonstrations(source, skip_bad_lines=config.skip_bad_lines, rejects=rejects,
                                               options=ReadOptions(count_tokens=partial(count_tokens, actor.tokenizer)))
                pairs, dropped = encode_demonstrations(actor.tokenizer, examples, end, limit)
                sequences = [(prompt + completion, [False] * len(prompt) + [True] * len(completion)) for prompt, completion in pairs]
            run.message(f"demonstrations: {dropped}")
            return sequences

        train, held = mix(config.data, read).split(lambda sequences: held_out(sequences, config.eval_fraction, config.run.seed))
        run.total = math.ceil(len(train) * config.epochs / config.sequences_per_step)
        run.restore(model=actor, optimizer=optimizer)

        def held_loss() -> dict[str, float]:
            with run.apart("evaluate"):
                return {"eval_loss": cross_entropy(actor, held, config.tokens_per_microbatch)}

        if held and config.eval_every and run.start == 0:
            run.metrics.log(0, held_loss())
        for step in range(run.start, run.total):
            start = step * config.sequences_per_step
            chosen = train.draw(config.run.seed, start, min(start + config.sequences_per_step, len(train) * config.epochs))
            batch = PackedBatch.from_masked(chosen, device=actor.decoder.device)
            tokens = int(batch.action_mask.sum())
            with run.time("train"):
                optimizer.zero_grad()
                loss = torch.zeros((), device=actor.decoder.device)
                for group in batch.split(config.tokens_per_microbatch):
                    micro = batch.select(group)
                    logp, _ = actor.logprobs(micro, actor.forward(micro))
                    part = -logp.sum() / tokens  # logp is 0 off the completions; the denominator is the whole step's
                    part.backward()
                    loss += part.detach()
                optimizer.lr = learning_rate(optim, step, run.total)
                result = optimizer.step(max_grad_norm=optim.max_grad_norm or None)
                run.check_update(result)
                actor.mark_updated()
            raise_faults(actor.decoder.device)  # where the host reads the loss anyway
            metrics = {"loss": loss.item(), "perplexity": math.exp(min(80.0, loss.item())), "lr": optimizer.lr, "grad_norm": result.grad_norm,
                       "num_tokens": float(batch.num_tokens)} | measure_optimizer(optimizer)
            if held and (step == run.total - 1 or (config.eval_every and (step + 1) % config.eval_every == 0)):
                metrics |= held_loss()
            run.log(step, metrics)
            run.save_if_due(step)
        if config.lora is not None:
            actor.save_adapter(run.directory / "adapter", base_model=config.model)
        return SFTResult(run.finish(actor.save_pretrained), run.total, run.last_metrics)


def cross_entropy(actor: HybridActor, sequences: list[Tokens], tokens_per_microbatch: int) -> float:
    """Mean negative log-probability of the completion tokens, in nats."""
    batch = PackedBatch.from_masked(sequences, device=actor.decoder.device)
    logp = actor.score(batch, partition=batch.split(tokens_per_microbatch)).logp
    return -logp[batch.action_mask].double().mean().item()
