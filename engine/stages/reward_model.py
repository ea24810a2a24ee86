"""A pairwise reward model: the trunk of a language model, one linear, the score at the last token, the Bradley-Terry loss."""
from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fusedrl.engine.config import RewardModelConfig
from fusedrl.engine.control import learning_rate
from fusedrl.engine.data.mixture import mix
from fusedrl.engine.data.readers import ReadOptions, Source, load_pairs
from fusedrl.engine.data.tokenize import count_tokens, encode_pairs, end_of_text
from fusedrl.engine.estimates import wilson_interval
from fusedrl.engine.model.heads import RewardModel, save_reward_model
from fusedrl.engine.model.weights import load_decoder, load_tokenizer
from fusedrl.engine.optim import make_optimizer
from fusedrl.engine.packing import PackedBatch, split_by_tokens
from fusedrl.engine.run import Run, held_out
from fusedrl.kernels.ranking_loss import pairwise_ranking_loss

Tokens = tuple[list[int], list[int]]  # prompt ids, completion ids
Pair = tuple[Tokens, Tokens]  # chosen, rejected


@dataclass(frozen=True)
class RewardModelResult:
    """Where the reward model is; accuracy on the held-out pairs with its 95% interval (nan where none were held out)."""

    model: str
    steps: int
    metrics: dict[str, float]
    accuracy: float
    interval: tuple[float, float]
    held_out: int


def train_reward_model(config: RewardModelConfig) -> RewardModelResult:
    """Train a reward model on preference pairs.

    The run directory receives config.json, metrics.jsonl, checkpoints and, at the end, model/ (a *ForSequenceClassification of one label,
    loadable by transformers).

    Raises:
        DataError, ConfigError, OSError: as their messages say; nothing half-written is left behind.
        RuntimeError: five updates in a row had a non-finite gradient.
    """
    torch.manual_seed(config.run.seed)
    tokenizer = load_tokenizer(config.model)
    model = RewardModel.from_decoder(load_decoder(config.model, dtype=config.dtype, device=config.device), seed=config.run.seed)
    model.decoder.checkpoint_activations = config.checkpoint_activations
    optim = config.optim
    optimizer = make_optimizer(model.named_parameters(), lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay,
                               state=optim.state)
    with Run(config, None) as run:
        trunk = model.decoder.config
        limit = min(trunk.max_positions, config.max_length or trunk.max_positions)

        def read(source: Source) -> list[Pair]:
            examples, unusable = load_pairs(source, skip_bad_lines=config.skip_bad_lines, rejects=run.directory / "rejects.jsonl",
                                            options=ReadOptions(count_tokens=partial(count_tokens, tokenizer)))
            for reason, count in unusable.items():
                run.message(f"pairs: {count} of {len(examples) + sum(unusable.values())} are not used: {reason}")
            encoded, dropped = encode_pairs(tokenizer, examples, end_of_text(tokenizer, trunk.eos_token_ids), limit)
            run.message(f"pairs: {dropped}")
            return [((prompt, chosen), (prompt, rejected)) for prompt, chosen, rejected in encoded]

        train, held = mix(config.data, read).split(lambda pairs: held_out(pairs, config.eval_fraction, config.run.seed))
        run.total = math.ceil(len(train) * config.epochs / config.pairs_per_step)
        run.restore(model=model, optimizer=optimizer)
        for step in range(run.start, run.total):
            start = step * config.pairs_per_step
            chosen = train.draw(config.run.seed, start, min(start + config.pairs_per_step, len(train) * config.epochs))
            with run.time("train"):
                optimizer.zero_grad()
                loss, margins = torch.zeros((), device=model.decoder.device), []
                for group in _split(chosen, config.tokens_per_microbatch):
                    winners, losers = _scores(model, [chosen[i] for i in group])
                    part = pairwise_ranking_loss(winners, losers) * (len(group) / len(chosen))
                    part.backward()
                    loss += part.detach()
                    margins.append((winners - losers).detach())
                optimizer.lr = learning_rate(optim, step, run.total)
                result = optimizer.step(max_grad_norm=optim.max_grad_norm or None)
                run.check_update(result)
            margin = torch.cat(margins)
            metrics = {"loss": loss.item(), "accuracy": (margin > 0).float().mean().item(), "margin": margin.mean().item(), "lr": optimizer.lr,
                       "grad_norm": result.grad_norm}
            if step == run.total - 1:
                with run.time("evaluate"):
                    metrics |= evaluate(model, held, config.tokens_per_microbatch)
                    if config.normalize:
                        model.shift += score_pairs(model, train.examples, config.tokens_per_microbatch)[0].double().mean().item()
                        metrics["score_shift"] = model.shift
            run.log(step, metrics)
            run.save_if_due(step, model=model, optimizer=optimizer)
        model.shift = run.last_metrics.get("score_shift", model.shift)  # a run that had finished already
        last = run.last_metrics
        interval = (last.get("eval_accuracy_low", math.nan), last.get("eval_accuracy_high", math.nan))
        path = run.finish(lambda directory: save_reward_model(model, directory, tokenizer=tokenizer))
        return RewardModelResult(path, run.total, last, last.get("eval_accuracy", math.nan), interval, len(held))


def evaluate(model: RewardModel, pairs: list[Pair], tokens_per_microbatch: int) -> dict[str, float]:
    """Loss and accuracy on held-out pairs, with the accuracy's 95% interval; nothing for no pairs. A tie counts as wrong."""
    if not pairs:
        return {}
    winners, losers = score_pairs(model, pairs, tokens_per_microbatch)
    right = int((winners > losers).sum())
    low, high = wilson_interval(right, len(pairs))
    return {"eval_loss": pairwise_ranking_loss(winners, losers).item(), "eval_accuracy": right / len(pairs), "eval_accuracy_low": low,
            "eval_accuracy_high": high, "eval_pairs": float(len(pairs))}


def _split(pairs: list[Pair], tokens_per_microbatch: int) -> list[list[int]]:
    """Micro-batches that keep the two sides of a pair together."""
    return split_by_tokens([(i, sum(len(prompt) + len(completion) for prompt, completion in pair)) for i, pair in enumerate(pairs)], tokens_per_microbatch)


def _scores(model: RewardModel, pairs: list[Pair]) -> tuple[Tensor, Tensor]:
    """[B] scores of the chosen and of the rejected side, from one forward."""
    batch = PackedBatch.from_sequences([chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs], device=model.decoder.device)
    winners, losers = model(batch).chunk(2)
    return winners, losers


@torch.no_grad()
def score_pairs(model: RewardModel, pairs: list[Pair], tokens_per_microbatch: int) -> tuple[Tensor, Tensor]:
    """[B] scores of the chosen and of the rejected sides, in the order of `pairs`."""
    winners, losers = torch.empty(len(pairs), device=model.decoder.device), torch.empty(len(pairs), device=model.decoder.device)
    for group in _split(pairs, tokens_per_microbatch):
        winners[group], losers[group] = _scores(model, [pairs[i] for i in group])
    return winners, losers
