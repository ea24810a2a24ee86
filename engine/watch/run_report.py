"""Tables of a run directory for the terminal: samples over time, metrics at the beginning, half-way
and at the end, and the alarms.

They read only the files, so they also work while the run is going on.
"""

from __future__ import annotations

import math
from collections import defaultdict
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from fusedrl.engine.base.errors import ConfigError, no_such
from fusedrl.engine.runs.metrics import read_rows
from fusedrl.engine.watch.alarm import Evidence, message

SHOWN = (
    "loss",
    "eval_loss",
    "accuracy",
    "eval_accuracy",
    "eval_rewards/accuracies",
    "eval_rewards/margins",
    "reward",
    "rewards/*",
    "gold/*",
    "eval_reward",
    "eval_rewards/*/mean",
    "eval_gold/*/mean",
    "eval_pass@*",
    "kl",
    "eval_kl",
    "kl_coef",
    "entropy",
    "perplexity",
    "perplexity_ref",
    "eval_perplexity_ref",
    "completions/mean_length",
    "completions/clipped_ratio",
    "completions/repeated_trigrams",
    "completions/distinct_trigrams",
    "clip_ratio/region_mean",
    "policy/approxkl_avg",
    "val/explained_variance",
    "sampling/sampling_logp_difference/max",
    "grad_norm",
    "learning_rate",
    "tokens_per_s",
    "timing/step",
)


def samples_table(directory: str | Path, columns: int = 4) -> Table:
    """Return a table of completions with their scores: a row for each held-out prompt, and at most
    `columns` evaluations: the first, the last, and others evenly between.

    Raises:
        ConfigError: there is no run, the run was not evaluated, or `columns` is below 1.
    """
    rows = list(
        read_rows(
            _file(
                directory,
                "samples_eval.jsonl",
                "it has no held-out samples; train with --evaluation.data FILE",
            )
        )
    )
    if columns < 1:
        raise ConfigError(f"samples: expected columns >= 1, got {columns}")
    by_prompt: defaultdict[str, dict[int, Text]] = defaultdict(dict)
    for row in rows:
        scores = ", ".join(
            f"{name} {'invalid' if value is None else format(value, '.3g')}"
            for name, value in row["scores"].items()
        )
        by_prompt[_text(row["prompt"])][row["step"]] = Text.assemble(
            (f"{scores}\n", "bold"), row["completion"].strip()
        )
    steps = spread(sorted({row["step"] for row in rows}), columns)
    table = Table(
        title=f"{directory}: the same draws of the same prompts as training goes on",
        title_justify="left",
        show_lines=True,
    )
    for name in ("prompt", *(f"step {step}" for step in steps)):
        table.add_column(name, ratio=1)
    for prompt, found in by_prompt.items():
        table.add_row(Text(prompt.strip()), *(found.get(step, Text("")) for step in steps))
    return table


def metrics_table(directory: str | Path) -> Table:
    """Return a table of a run's main metrics: first, middle and last value, minimum and maximum.

    Raises:
        ConfigError: there is no run.
    """
    series: defaultdict[str, list[tuple[int, float]]] = defaultdict(list)
    lack = "there is no run; name what was --run.dir"
    for row in read_rows(_file(directory, "metrics.jsonl", lack)):
        for name, value in row.items():
            if value is not None and name != "step":
                series[name].append((row["step"], value))
    steps = sorted({step for values in series.values() for step, _ in values})
    table = Table(
        title=f"{directory}: {steps[-1] if steps else 0} steps", title_justify="left", box=SIMPLE
    )
    table.add_column("", overflow="fold")
    for heading in ("first", "middle", "last", "least", "most"):
        table.add_column(heading, justify="right")
    for pattern in SHOWN:
        for name in sorted(
            name for name in series if fnmatch(name, pattern) and not name.endswith("_stderr")
        ):
            values = [value for _, value in series[name] if math.isfinite(value)]
            table.add_row(
                name,
                *(
                    f"{value:.4g}"
                    for value in (
                        values[0],
                        values[len(values) // 2],
                        values[-1],
                        min(values),
                        max(values),
                    )
                ),
            )
    return table


def alarm_messages(directory: str | Path) -> list[str]:
    """List the messages of the reward-hacking alarm."""
    return [
        message(row["step"], [Evidence(**one) for one in row["evidence"]])
        for row in read_rows(Path(directory) / "alarms.jsonl")
    ]


def spread(items: list[int], count: int) -> list[int]:
    """Choose at most `count` of the items: the first, the last, and others evenly between."""
    if len(items) <= count or count < 2:
        return items if len(items) <= count else items[-1:]
    return [items[round(index * (len(items) - 1) / (count - 1))] for index in range(count)]


def _file(directory: str | Path, name: str, lack: str) -> Path:
    path = Path(directory) / name
    if not Path(directory).is_dir():
        raise ConfigError(
            "expected the directory of a run, and "
            f"{f'{directory} is a file' if Path(directory).exists() else no_such(directory)}"
        )
    if not path.is_file() or not path.stat().st_size:
        above = Path(directory).resolve().parent
        if (above / name).is_file():
            lack += f"; the run that it belongs to is {Path(directory).parent}"
        raise ConfigError(f"{directory}: expected a run directory with {name}, but {lack}")
    return path


def _text(prompt: Any) -> str:
    """Return a prompt's text; of a list of messages, the last message's."""
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
