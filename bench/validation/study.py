"""Code shared by the studies: a grid of training runs over several processes, their results in
bench/results/validation/<study>.json, and tables and plots of these results.

A run is a function of one JSON-able specification, {"method": ..., "seed": ..., ...}, and returns
numbers; specification and numbers together are one row of the results. Runs are spread over as many
processes as there are cores, with one thread each. A run is skipped if the results already have a
row of the same specification and commit.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from bench.harness import RESULTS

from fusedrl.engine.actor import HybridActor
from fusedrl.engine.config import GenerationConfig
from fusedrl.engine.data.readers import load_prompts
from fusedrl.engine.rewards.rewards import RewardSet, load_reward
from fusedrl.engine.tools.machine import describe_machine
from fusedrl.engine.watch.evaluate import Evaluation, evaluate

ROOT = RESULTS.parents[1]
Spec = Mapping[str, Any]
RunFunction = Callable[[dict[str, Any], Path], dict[str, Any]]


def run_grid(
    study: str, function: RunFunction, specs: Iterable[Spec], work: Path, workers: int
) -> list[dict[str, Any]]:
    """The rows of all specifications, in their order, saved as each comes in.

    Args:
        function: at the top of a module; called with a specification and a directory of its own.
        work: where runs leave their models and metrics. workers: processes; 0: none but this one.
    """
    torch.set_num_threads(1)
    machine = describe_machine(torch.device("cpu"))
    wanted = [dict(spec) for spec in specs]
    rows = {
        _key(row["spec"]): row
        for row in read_rows(study)
        if row["run"]["commit"] == machine["commit"] and not machine["commit"].endswith("+changes")
    }
    missing = [spec for spec in wanted if _key(spec) not in rows]
    for spec, found in _results(function, missing, work / study, workers):
        rows[_key(spec)] = {"spec": spec, **found, "run": machine}
        print(
            f"{study}: {_name(spec)}: "
            + ", ".join(
                f"{name} {value:.4g}" for name, value in found.items() if isinstance(value, float)
            ),
            flush=True,
        )
        _write(study, [rows[_key(each)] for each in wanted if _key(each) in rows])
    return [rows[_key(spec)] for spec in wanted]


def _results(
    function: RunFunction, specs: Sequence[dict[str, Any]], work: Path, workers: int
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    if not workers:
        yield from ((spec, _timed(function, spec, work / _name(spec))) for spec in specs)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        waiting = {pool.submit(_timed, function, spec, work / _name(spec)): spec for spec in specs}
        yield from ((waiting[done], done.result()) for done in as_completed(waiting))


def _timed(function: RunFunction, spec: dict[str, Any], directory: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    began = time.perf_counter()
    return function(spec, _fresh(directory)) | {"seconds": time.perf_counter() - began}


def _fresh(directory: Path) -> Path:
    """A directory that nothing is in: what an interrupted run left stays beside it."""
    found, number = directory, 1
    while found.exists():
        number += 1
        found = directory.with_name(f"{directory.name}.{number}")
    found.mkdir(parents=True)
    return found


def _key(spec: Spec) -> str:
    return json.dumps(spec, sort_keys=True)


def _name(spec: Spec) -> str:
    return "-".join(re.sub(r"\W+", "_", str(value)) for value in spec.values())


def path_of(study: str) -> Path:
    """The study's rows."""
    return RESULTS / "validation" / f"{study}.json"


def read_rows(study: str) -> list[dict[str, Any]]:
    """Return each row with the run that measured it; an empty result if the study has not run."""
    path = path_of(study)
    if not path.is_file():
        return []
    content = json.loads(path.read_text(encoding="utf-8"))
    return [row | {"run": content["runs"][row["run"]]} for row in content["rows"]]


def _write(study: str, rows: Sequence[dict[str, Any]]) -> None:
    runs: list[dict[str, Any]] = []
    for row in rows:
        if row["run"] not in runs:
            runs.append(row["run"])
    path = path_of(study)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n  ".join(json.dumps(row | {"run": runs.index(row["run"])}) for row in rows)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(
        f'{{"runs": {json.dumps(runs, indent=1)},\n "rows": [\n  {lines}\n]}}\n', encoding="utf-8"
    )
    os.replace(unfinished, path)


# ---- measuring a policy --------------------------------------------------------------------------
def measure(
    policy: str,
    reference: str,
    data: str | Path,
    rewards: Mapping[str, str],
    generation: GenerationConfig,
    *,
    samples: int,
    seed: int = 1,
) -> dict[str, float]:
    """Rewards, KL to the reference, perplexity under it and length of fresh samples, with standard
    errors."""
    actor, base = (HybridActor.from_pretrained(path) for path in (policy, reference))
    sets = {
        name: RewardSet([load_reward(spec, tokenizer=actor.tokenizer)])
        for name, spec in rewards.items()
    }
    return numbers(
        evaluate(actor, base, load_prompts(str(data)) * samples, sets, generation, seed=seed)
    )


def numbers(found: Evaluation) -> dict[str, float]:
    """Convert an evaluation to the fields of a row."""
    row = {
        "kl": found.kl.mean,
        "kl_error": found.kl.error,
        "perplexity_ref": found.perplexity,
        "length": found.length.mean,
        "ended": found.ended.mean,
        "samples": float(len(found.completions)),
    }
    for name, estimate in found.rewards.items():
        row |= {name: estimate.mean, f"{name}_error": estimate.error}
    return row


# ---- over seeds ----------------------------------------------------------------------------------
def over_seeds(rows: Sequence[Mapping[str, Any]], value: str) -> tuple[float, float]:
    """Return mean and standard error over rows that differ by their seeds. The error of a single
    row is nan."""
    found = [float(row[value]) for row in rows]
    mean = math.fsum(found) / len(found)
    spread = (
        math.sqrt(math.fsum((x - mean) ** 2 for x in found) / (len(found) - 1))
        if len(found) > 1
        else math.nan
    )
    return mean, spread / math.sqrt(len(found))


def grouped(rows: Sequence[Mapping[str, Any]], *names: str) -> dict[tuple, list[Mapping[str, Any]]]:
    """Rows by what their specifications have under these names, in order of appearance."""
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row["spec"].get(name) for name in names), []).append(row)
    return groups


def plus_minus(mean_and_error: tuple[float, float], digits: int = 2) -> str:
    """Format a table as Markdown."""
    mean, error = mean_and_error
    return f"{mean:.{digits}f}" + ("" if math.isnan(error) else f" ± {error:.{digits}f}")
