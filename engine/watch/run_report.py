"""Runs on the terminal and as JSON: samples over time; metrics at the beginning, half-way and at
the end; several runs side by side."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from typing import Any

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from fusedrl.engine.base.errors import ConfigError
from fusedrl.engine.base.printable import printable, shortened
from fusedrl.engine.watch.run_files import RunRecord, Series, config_differences

SHOWN = {  # metric or pattern -> unit; "" for a number without one
    "loss": "",
    "eval_loss": "",
    "accuracy": "share",
    "eval_accuracy": "share",
    "eval_rewards/accuracies": "share",
    "eval_rewards/margins": "nats x beta",
    "reward": "",
    "rewards/*": "",
    "gold/*": "",
    "eval_reward": "",
    "eval_rewards/*/mean": "",
    "eval_gold/*/mean": "",
    "eval_pass@*": "share",
    "kl": "nats",
    "eval_kl": "nats",
    "kl_coef": "",
    "entropy": "nats/token",
    "perplexity": "",
    "perplexity_ref": "",
    "eval_perplexity_ref": "",
    "completions/mean_length": "tokens",
    "completions/clipped_ratio": "share",
    "completions/repeated_trigrams": "share",
    "completions/distinct_trigrams": "share",
    "clip_ratio/region_mean": "share",
    "policy/approxkl_avg": "nats/token",
    "val/explained_variance": "share",
    "sampling/sampling_logp_difference/max": "nats",
    "grad_norm": "",
    "learning_rate": "",
    "tokens_per_s": "tokens/s",
    "timing/step": "s",
    "timing/*": "s",
    "mem/peak_gib": "GiB",
    "mem/*_gib": "GiB",
}
VALUES = ("first", "middle", "last", "least", "most")
LONGEST = 2000  # characters of a text that are shown


def samples_table(run: RunRecord, columns: int = 4) -> Table:
    """Return a table of completions with their scores: a row for each held-out prompt, and at most
    `columns` evaluations: the first, the last, and others evenly between.

    Raises:
        ConfigError: the run was not evaluated, or `columns` is below 1.
    """
    if columns < 1:
        raise ConfigError(f"samples: expected columns >= 1, got {columns}")
    if not run.samples:
        broken = [note for note in run.notes if note.startswith("samples_eval.jsonl:")]
        raise ConfigError(
            f"{run.directory}: expected a run directory with samples_eval.jsonl, but it has no "
            f"held-out samples; {broken[0] if broken else 'train with --evaluation.data FILE'}"
        )
    by_prompt: defaultdict[str, dict[int, Text]] = defaultdict(dict)
    for sample in run.samples:
        scores = ", ".join(
            f"{name} {'invalid' if value is None else format(value, '.3g')}"
            for name, value in sample.scores.items()
        )
        by_prompt[sample.prompt][sample.step] = Text.assemble(
            (f"{scores}\n", "bold"), _shown(sample.completion)
        )
    steps = spread(sorted({sample.step for sample in run.samples}), columns)
    table = Table(
        title=Text(f"{run.name}: completions of the same prompts, drawn alike, at several steps"),
        title_justify="left",
        show_lines=True,
    )
    for name in ("prompt", *(f"step {step}" for step in steps)):
        table.add_column(name, ratio=1)
    for prompt, found in by_prompt.items():
        table.add_row(Text(_shown(prompt)), *(found.get(step, Text("")) for step in steps))
    return table


def _shown(text: str) -> str:
    return printable(shortened(text.strip(), LONGEST))


@dataclass(frozen=True)
class Final:
    """A metric in five numbers, of its `count` finite values."""

    first: float
    middle: float
    last: float
    least: float
    most: float
    count: int


def final_values(run: RunRecord) -> dict[str, Final]:
    """Return the main metrics of a run, those of SHOWN that have a finite value."""
    found = {}
    for name in shown_metrics([run]):
        values = run.series[name].finite
        if len(values):
            found[name] = Final(
                first=float(values[0]),
                middle=float(values[len(values) // 2]),
                last=float(values[-1]),
                least=float(values.min()),
                most=float(values.max()),
                count=len(values),
            )
    return found


def shown_metrics(runs: Sequence[RunRecord]) -> list[str]:
    """Return the names of the main metrics that any of the runs has, in the order of SHOWN."""
    known = sorted({name for run in runs for name in run.series if not name.endswith("_stderr")})
    return list(
        dict.fromkeys(name for pattern in SHOWN for name in known if fnmatch(name, pattern))
    )


def unit_of(name: str) -> str:
    """Return the unit of a main metric, "" if it has none."""
    return next((unit for pattern, unit in SHOWN.items() if fnmatch(name, pattern)), "")


def metrics_table(run: RunRecord, values: Sequence[str] = VALUES) -> Table:
    """Return a table of a run's main metrics. `values` are those of VALUES to show: first, middle
    and last value, least and most."""
    title = Text(f"{run.name}: {run.steps:,} steps, {run.status}")
    table = Table(title=title, title_justify="left", box=SIMPLE)
    table.add_column("")
    for heading in values:
        table.add_column(heading, justify="right")
    table.add_column("unit")
    for name, found in final_values(run).items():
        shown = (f"{getattr(found, value):.4g}" for value in values)
        table.add_row(Text(name), *shown, unit_of(name))
    return table


def comparison_tables(runs: Sequence[RunRecord]) -> list[Table]:
    """Return the last values of several runs side by side, and the options that differ."""
    finals = [final_values(run) for run in runs]
    last = Table(title="Last values", title_justify="left", box=SIMPLE)
    options = Table(title="Options that differ", title_justify="left", box=SIMPLE)
    for table, justify in ((last, "right"), (options, "left")):
        table.add_column("")
        for run in runs:
            table.add_column(Text(run.name), justify=justify)  # type: ignore[arg-type]
    last.add_column("unit")
    last.add_row("steps", *(f"{run.steps:,}" for run in runs), "")
    for name in shown_metrics(runs):
        row = [f"{found[name].last:.4g}" if name in found else "" for found in finals]
        if any(row):
            last.add_row(Text(name), *row, unit_of(name))
    differences = config_differences(runs)
    for name, values in differences.items():
        options.add_row(Text(name), *(Text("" if v is None else v) for v in values))
    return [last, options] if differences else [last]


def summary(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """Return what is known of some runs as JSON values: of each its status, the five numbers of
    every metric (all null if none of its values is finite), alarms, calibration and options; and
    the options that differ."""
    return {
        "runs": [
            {
                "name": run.name,
                "directory": str(run.directory),
                "stage": run.stage,
                "status": run.status,
                "steps": run.steps,
                "total_steps": run.total,
                "seconds": run.seconds,
                "metrics": {name: _five(one) for name, one in sorted(run.series.items())},
                "alarms": [asdict(alarm) for alarm in run.alarms],
                "calibration": run.calibration,
                "config": run.config,
                "notes": run.notes,
            }
            for run in runs
        ],
        "differences": config_differences(runs) if len(runs) > 1 else {},
    }


def _five(series: Series) -> dict[str, float | int | None]:
    values = series.finite
    empty = not len(values)
    return {
        "first": None if empty else float(values[0]),
        "last": None if empty else float(values[-1]),
        "least": None if empty else float(values.min()),
        "most": None if empty else float(values.max()),
        "mean": None if empty else float(values.mean()),
        "count": len(values),
        "not_finite": len(series.values) - len(values),
        "last_step": int(series.steps[-1]),
    }


def spread(items: list[int], count: int) -> list[int]:
    """Choose at most `count` of the items: the first, the last, and others evenly between."""
    if len(items) <= count or count < 2:
        return items if len(items) <= count else items[-1:]
    return [items[round(index * (len(items) - 1) / (count - 1))] for index in range(count)]
