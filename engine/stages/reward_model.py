"""Training of reward models on pairs or ranked lists (preference/comparisons.py). A reward model is
the trunk of a language model with one linear layer; its score is read at the last token."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fusedrl.engine.base.draws import seed_generators
from fusedrl.engine.base.errors import ConfigError
from fusedrl.engine.base.ordering import data_order, shuffled
from fusedrl.engine.base.packing import PackedBatch, split_by_tokens
from fusedrl.engine.base.tables import console, show
from fusedrl.engine.config import RewardModelConfig
from fusedrl.engine.data.mixture import Mixture, mix
from fusedrl.engine.data.readers import Source
from fusedrl.engine.data.tokenize import end_of_text
from fusedrl.engine.model.heads import RewardModel, save_reward_model
from fusedrl.engine.model.lora import add_adapter
from fusedrl.engine.model.weights import load_decoder, load_tokenizer
from fusedrl.engine.optim.learner import Learner, Update
from fusedrl.engine.parallel.lanes import costs_of
from fusedrl.engine.parallel.ranks import ALONE, Ranks, joined
from fusedrl.engine.preference.comparisons import (
    Comparison,
    Pairs,
    centre_loss,
    encode_preferences,
    load_preferences,
    preference_loss,
)
from fusedrl.engine.preference.reward_report import (
    RewardReport,
    report_table,
    reward_report,
    save_report,
)
from fusedrl.engine.runs.files import write_file
from fusedrl.engine.runs.run import Run, held_out
from fusedrl.kernels.runtime.faults import raise_faults

__all__ = [
    "RewardModelResult",
    "cross_fitted_margins",
    "evaluate",
    "gradients",
    "new_model",
    "report",
    "score_pairs",
    "train_reward_model",
]


@dataclass(frozen=True)
class RewardModelResult:
    """Path of the reward model's directory, the last step's metrics, and the accuracy on held-out
    examples with its 95% interval (nan if no examples were held out)."""

    model: str
    steps: int
    metrics: dict[str, float]
    accuracy: float
    interval: tuple[float, float]
    held_out: int


def train_reward_model(config: RewardModelConfig) -> RewardModelResult:
    """Train a reward model on preferences.

    The run directory receives config.json, metrics.jsonl, checkpoints and, with `denoise_folds`,
    denoise.json. At the end it receives report.json (accuracy and calibration on held-out examples)
    and model/ (a *ForSequenceClassification with one label, loadable by transformers).

    Raises:
        DataError, ConfigError, OSError: the data or the configuration cannot be used, or a file
            cannot be read or written; nothing half-written is left behind.
        RuntimeError: five updates in a row had a non-finite gradient.
    """
    with joined(config.parallel.lanes, device=config.device) as ranks:
        return _train(config, ranks)


def _train(config: RewardModelConfig, ranks: Ranks) -> RewardModelResult:
    seed_generators(config.run.seed)
    tokenizer = load_tokenizer(config.model)
    model, learner = new_model(config, ranks)
    with Run(config, None, ranks) as run:
        train, held = mix(config.data, partial(_read, config, model, tokenizer, run)).split(
            lambda comparisons: _hold_out(comparisons, config)
        )
        if config.denoise_folds:
            del model, learner  # the models of the folds need the memory
            train = _denoised(train, config, run, ranks)
            model, learner = new_model(config, ranks)
        for step, chosen in run.steps(train, config.pairs_per_step, config.epochs, model=learner):
            last = step == run.total - 1
            with run.time("train"), learner.update(step, run.total) as update:
                metrics = gradients(update, model, chosen, config)
            metrics |= {
                "grad_norm": update.grad_norm,
                "step_tokens": float(sum(c.tokens for c in chosen)),
            } | learner.metrics()
            if last or (config.eval_every and (step + 1) % config.eval_every == 0):
                with run.time("evaluate"):
                    found = report(
                        model,
                        held,
                        config.tokens_per_microbatch,
                        config.label_noise,
                        by_prompt=config.by_prompt,
                    )
                    metrics |= found.metrics() if found is not None else {}
            if last:
                if found is not None:
                    run.write("report.json", partial(save_report, found))
                    if config.run.progress and ranks.first:
                        show(report_table(found), console(sys.stderr))
                if config.normalize != "none":
                    with run.time("normalize"):
                        _normalize(model, train.examples, config)
                    metrics["score_shift"] = model.shift
            run.log(step, metrics)
        # if the run had finished already, the shift is in its metrics
        model.shift = run.last_metrics.get("score_shift", model.shift)
        known = run.last_metrics
        interval = (
            known.get("eval_accuracy_low", math.nan),
            known.get("eval_accuracy_high", math.nan),
        )
        path = run.finish(
            lambda directory: save_reward_model(model, directory, tokenizer=tokenizer)
        )
        return RewardModelResult(
            path, run.total, known, known.get("eval_accuracy", math.nan), interval, len(held)
        )


def _read(
    config: RewardModelConfig, model: RewardModel, tokenizer: Any, run: Run, source: Source
) -> list[Comparison]:
    """Return the preferences of a file as token ids."""
    trunk = model.decoder.config
    limit = min(trunk.max_positions, config.max_length or trunk.max_positions)
    examples, unusable = load_preferences(
        source,
        tokenizer,
        soft_labels=config.soft_labels,
        skip_bad_lines=config.skip_bad_lines,
        rejects=run.rejects(),
    )
    for reason, count in unusable.items():
        run.message(
            f"preferences: {count} of {len(examples) + sum(unusable.values())} are not "
            f"used: {reason}"
        )
    encoded, dropped = encode_preferences(
        tokenizer, examples, end_of_text(tokenizer, trunk.eos_token_ids), limit
    )
    run.message(f"preferences: {dropped}")
    return [comparison for _, comparison in encoded]


def new_model(config: RewardModelConfig, ranks: Ranks = ALONE) -> tuple[RewardModel, Learner]:
    """Return the reward model that a run begins with, and the learner that trains it."""
    decoder = load_decoder(config.model, dtype=config.dtype, device=config.device)
    decoder.checkpoint_activations = config.checkpoint_activations
    if config.lora is not None:
        add_adapter(decoder, config.lora, seed=config.run.seed)
    model = RewardModel.from_decoder(
        decoder, seed=config.run.seed, imitation=config.imitation_coef > 0
    )
    return model, Learner(model, config.optim, ranks=ranks)


def _hold_out(
    comparisons: list[Comparison], config: RewardModelConfig
) -> tuple[list[Comparison], list[Comparison]]:
    """Split the comparisons of one file into (train, held out)."""
    if not config.by_prompt:
        return held_out(comparisons, config.eval_fraction, config.run.seed)
    rows: dict[tuple[int, ...], list[Comparison]] = {}
    for c in comparisons:
        rows.setdefault(tuple(c.prompt), []).append(c)
    train, held = held_out(list(rows.values()), config.eval_fraction, config.run.seed)
    return [c for group in train for c in group], [c for group in held for c in group]


# ---- one step ------------------------------------------------------------------------------------
def gradients(
    update: Update, model: RewardModel, chosen: Sequence[Comparison], config: RewardModelConfig
) -> dict[str, float]:
    """Add the gradient of one step's loss to the parameters' gradients, micro-batch by micro-batch.
    Return the step's metrics.

        loss = ranking + center_coef * centre + imitation_coef * cross-entropy of the best answers'
        tokens

    Each term is a mean over the whole step (over examples, examples and tokens), so the split into
    micro-batches does not change the gradient. All scores of an example come from one forward.
    """
    device, weight = model.decoder.device, sum(c.weight for c in chosen)
    tokens = sum(len(c.completions[i]) for c in chosen for i in c.preferred)
    groups = _split(chosen, config.tokens_per_microbatch, update.lanes)
    work = update.share(groups, costs_of([c.tokens for c in chosen], groups))
    nothing = torch.zeros((), device=device)
    for index in work:
        group = [chosen[i] for i in index]
        batch = _batch(group, device)
        hidden_NH = model.hidden(batch)
        scores = model.scores(batch, hidden_NH)
        ranking = loss = preference_loss(
            scores, group, label_noise=config.label_noise, total_weight=weight
        )
        if config.center_coef:
            loss = loss + config.center_coef * centre_loss(scores, group, total_weight=weight)
        imitation = nothing
        if config.imitation_coef and any(c.preferred for c in group):
            imitation = -model.imitation_logp(batch, hidden_NH) / tokens
            loss = loss + config.imitation_coef * imitation
        work.backward(loss)
        with torch.no_grad():
            pairs = Pairs.of(group, total_weight=weight, device=device)
            margin = scores[pairs.better_P] - scores[pairs.worse_P]
            right = (pairs.share_P * (margin > 0)).sum()
            far = (pairs.share_P * margin).sum()
        work.tell(*(x.detach() for x in (loss, ranking, imitation, right, far)))
    names = ("loss", "ranking_loss", "imitation_loss", "accuracy", "margin")
    sums = dict.fromkeys(names, nothing)
    for row in work.rows():
        sums = {name: sums[name] + value for name, value in zip(names, row, strict=True)}
    raise_faults(device)  # where the host reads the loss anyway
    left_out = set() if config.imitation_coef else {"imitation_loss"}
    left_out |= set() if config.imitation_coef or config.center_coef else {"ranking_loss"}
    return {name: value.item() for name, value in sums.items() if name not in left_out}


def _split(
    comparisons: Sequence[Comparison], tokens_per_microbatch: int, lanes: int = 1
) -> list[list[int]]:
    """Split comparisons into micro-batches for `lanes` equal shares; the completions of a
    comparison stay together."""
    sized = [(i, c.tokens) for i, c in enumerate(comparisons)]
    return split_by_tokens(sized, tokens_per_microbatch, lanes)


def _batch(comparisons: Sequence[Comparison], device: torch.device) -> PackedBatch:
    """Pack all completions into a batch, each after its prompt. The action mask marks the tokens to
    imitate."""
    return PackedBatch.from_masked(
        (
            (c.prompt + completion, [False] * len(c.prompt) + [i in c.preferred] * len(completion))
            for c in comparisons
            for i, completion in enumerate(c.completions)
        ),
        device=device,
    )


# ---- noisy labels --------------------------------------------------------------------------------
def cross_fitted_margins(
    config: RewardModelConfig, comparisons: Sequence[Comparison], ranks: Ranks = ALONE
) -> list[float]:
    """Return the margin of each comparison: the mean over its pairs of the better answer's score
    minus the worse one's. The scores come from a reward model that was not trained on any
    comparison of the same prompt.

    The comparisons are split by prompt into `denoise_folds` parts. For each part, a model is
    trained on all other parts with the settings in `config`, and deleted after scoring the part.

    Raises:
        ConfigError: there are fewer prompts than parts.
    """
    prompts = list(dict.fromkeys(tuple(c.prompt) for c in comparisons))
    if len(prompts) < config.denoise_folds:
        raise ConfigError(
            f"denoise_folds = {config.denoise_folds} needs as many different prompts, and the "
            f"training examples have {len(prompts)}"
        )
    part = {
        prompts[index]: place % config.denoise_folds
        for place, index in enumerate(shuffled(len(prompts), config.run.seed, "folds"))
    }
    margins = [0.0] * len(comparisons)
    for fold in range(config.denoise_folds):
        inside, outside = (
            [i for i, c in enumerate(comparisons) if (part[tuple(c.prompt)] == fold) is wanted]
            for wanted in (True, False)
        )
        model, learner = new_model(config, ranks)
        total = math.ceil(len(outside) * config.epochs / config.pairs_per_step)
        for step in range(total):
            start = step * config.pairs_per_step
            order = data_order(
                len(outside),
                config.run.seed,
                start,
                min(start + config.pairs_per_step, len(outside) * config.epochs),
            )
            with learner.update(step, total) as update:
                gradients(update, model, [comparisons[outside[i]] for i in order], config)
        asked = [comparisons[i] for i in inside]
        better, worse = score_pairs(model, asked, config.tokens_per_microbatch)
        for i, differences in zip(
            inside, (better - worse).split([len(c.pairs) for c in asked]), strict=True
        ):
            margins[i] = differences.mean().item()
    return margins


def _denoised(
    train: Mixture[Comparison], config: RewardModelConfig, run: Run, ranks: Ranks
) -> Mixture[Comparison]:
    """Leave out the examples that the models of the other folds contradict. The margins are saved
    in <run>/denoise.json, which a resumed run reads."""
    path = run.directory / "denoise.json"
    if run.start and path.is_file():
        margins = json.loads(path.read_bytes())["margins"]
    else:
        margins = cross_fitted_margins(config, train.examples, ranks)
        told = json.dumps({"threshold": config.denoise_threshold, "margins": margins}) + "\n"
        run.write("denoise.json", partial(write_file, data=told.encode()))
    noisy = iter([margin < -config.denoise_threshold for margin in margins])

    def leave_out(source: list[Comparison]) -> tuple[list[Comparison], list[Comparison]]:
        marked = [(next(noisy), c) for c in source]
        return [c for flag, c in marked if not flag], [c for flag, c in marked if flag]

    kept, left_out = train.split(leave_out)
    run.message(
        f"preferences: {len(left_out)} of {len(margins)} are left out: a model that has not seen "
        "them contradicts them by more than "
        f"{config.denoise_threshold:g}"
    )
    return kept


# ---- scores --------------------------------------------------------------------------------------
@torch.no_grad()
def _score(
    model: RewardModel, comparisons: Sequence[Comparison], tokens_per_microbatch: int
) -> list[Tensor]:
    """Return for each comparison the scores [K] of its completions."""
    found = [torch.empty(0)] * len(comparisons)
    for index in _split(comparisons, tokens_per_microbatch):
        group = [comparisons[i] for i in index]
        for i, scores in zip(
            index,
            model(_batch(group, model.decoder.device)).split([len(c.ranks) for c in group]),
            strict=True,
        ):
            found[i] = scores
    return found


def score_pairs(
    model: RewardModel, comparisons: Sequence[Comparison], tokens_per_microbatch: int
) -> tuple[Tensor, Tensor]:
    """Return the scores [P] of the better answers and of the worse answers of all pairs, comparison
    by comparison in the order of `Comparison.pairs`."""
    scores_M = torch.cat(
        [
            *_score(model, comparisons, tokens_per_microbatch),
            torch.empty(0, device=model.decoder.device),
        ]
    )
    pairs = Pairs.of(comparisons, device=model.decoder.device)
    return scores_M[pairs.better_P], scores_M[pairs.worse_P]


def _normalize(
    model: RewardModel, comparisons: Sequence[Comparison], config: RewardModelConfig
) -> None:
    """Shift scores so that the best answers have mean 0 (Stiennon et al., 2020, appendix). If
    `normalize` is "mean_std", also scale them to variance 1 (Ziegler et al., 2019, 2.1). The scale
    is multiplied into the head's weight, so any program that loads the saved model uses it."""
    scores = _score(model, comparisons, config.tokens_per_microbatch)
    best = torch.cat([s[c.best] for s, c in zip(scores, comparisons, strict=True)]).double()
    spread = best.std(correction=0).item() if config.normalize == "mean_std" else 1.0
    scale = 1 / spread if spread > 0 else 1.0
    model.shift = (model.shift + best.mean().item()) * scale
    with torch.no_grad():
        model.head.weight.mul_(scale)


# ---- held-out preferences ------------------------------------------------------------------------
def report(
    model: RewardModel,
    comparisons: Sequence[Comparison],
    tokens_per_microbatch: int,
    label_noise: float = 0.0,
    *,
    by_prompt: bool = False,
) -> RewardReport | None:
    """Report accuracy and calibration on comparisons; None if there are none. With `by_prompt`, all
    comparisons of one prompt share one vote."""
    if not comparisons:
        return None
    better, worse = score_pairs(model, comparisons, tokens_per_microbatch)
    numbers: dict[tuple[int, ...], int] = {}
    units = [
        numbers.setdefault(tuple(c.prompt) if by_prompt else (index,), len(numbers))
        for index, c in enumerate(comparisons)
    ]
    listed = [
        (unit, len(c.completions[i]) - len(c.completions[j]), c.label)
        for unit, c in zip(units, comparisons, strict=True)
        for i, j in c.pairs
    ]
    examples, lengths, labels = zip(*listed, strict=True)
    return reward_report(better - worse, examples, lengths, labels, label_noise=label_noise)


def evaluate(
    model: RewardModel,
    comparisons: Sequence[Comparison],
    tokens_per_microbatch: int,
    label_noise: float = 0.0,
) -> dict[str, float]:
    """Return the report's main figures as metrics; an empty dictionary if there is nothing to
    judge. Equal scores count as wrong."""
    found = report(model, comparisons, tokens_per_microbatch, label_noise)
    return {} if found is None else found.metrics()
