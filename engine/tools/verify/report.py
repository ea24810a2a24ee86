"""fusedrl verify: checks everything that this machine runs, first for correctness in parallel
processes, then for speed in a single one, and prints a table and a verdict."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fusedrl.engine.base.errors import ConfigError
from fusedrl.engine.tools.verify.grid import Entry
from fusedrl.engine.tools.verify.ops import cost_of
from fusedrl.engine.tools.verify.pool import Pool, Task
from fusedrl.engine.tools.verify.promises import PROMISES
from fusedrl.kernels.runtime.dispatch import unavailable

CATALOGUE = "fusedrl.engine.tools.verify.catalogue"
Row = dict[str, Any]


def default_jobs(device: torch.device) -> int:
    """Return the number of jobs: one per processor; on a GPU at most eight, because each job takes
    GPU memory."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return min(8, cores) if device.type == "cuda" else cores


def verify_machine(
    device: torch.device,
    *,
    ops: Sequence[str] | None = None,
    engine: bool = True,
    cases: int = 6,
    full: bool = False,
    seed: int = 0,
    jobs: int | None = None,
    timeout: float = 300.0,
    catalogue: str = CATALOGUE,
    told: Callable[[Row], None] = lambda row: None,
) -> dict[str, Any]:
    """Check every implementation of every op on `device`, then the engine.

    Args:
        ops: names of the ops to check; if None, all.
        engine: whether to check the engine's promises, too.
        cases: number of random cases for each implementation.
        full: whether to run the whole grid instead.
        seed: seed of the random cases.
        jobs: number of parallel processes; if None, `default_jobs`.
        timeout: time limit of one row in seconds.
        catalogue: the module whose CATALOGUE has the entries.
        told: function called with each row as soon as it is done.
    Returns:
        {"ok", "device", "machine", "rows": [...], "seconds"}, JSON values. Of a row: "what",
        "impl", "state" ("ok"; "FAIL"; "refused": it serves none of the cases; "absent": it cannot
        run here), "cases", "failed", "error_over_bound", "cases_with_moved_bits", "ms",
        "percent_of_ceiling", "timed", "why".
    Raises:
        ConfigError: an op is unknown, or `cases` is below 0.
    """
    if cases < 0:
        raise ConfigError(f"verify: expected cases >= 0, got {cases}")
    began = time.perf_counter()
    entries: dict[str, Entry] = importlib.import_module(catalogue).CATALOGUE
    if unknown := [name for name in ops or () if name not in entries]:
        close = difflib.get_close_matches(unknown[0], entries, 1)
        raise ConfigError(
            f"verify: unknown op {unknown[0]!r}{f', did you mean {close[0]}?' if close else ''}; "
            f"expected some of {', '.join(entries)}"
        )
    jobs = jobs or default_jobs(device)
    chosen = [entries[name] for name in entries if ops is None or name in ops]
    pairs = [
        (entry, impl)
        for entry in chosen
        for impl in (entry.table.cuda if device.type == "cuda" else entry.table.cpu)
    ]
    common: Task = {"device": str(device), "catalogue": catalogue}
    tried = [(entry, impl) for entry, impl in pairs if unavailable(impl, device.type) is None]
    # start the longest tasks first
    tried.sort(key=lambda pair: (pair[1] != "triton", pair[1] != "torch", -cost_of(pair[0])))
    tasks = [
        common
        | {"do": "op", "what": entry.op, "impl": impl, "cases": cases, "full": full, "seed": seed}
        for entry, impl in tried
    ]
    tasks += (
        [common | {"do": "promise", "what": name, "impl": "engine"} for name in PROMISES]
        if engine
        else []
    )
    rows: dict[tuple[str, str], Row] = {}
    with Pool(jobs) as pool:
        for task, found in pool.answers(tasks, timeout):
            row = rows[task["what"], task["impl"]] = {
                "what": task["what"],
                "impl": task["impl"],
            } | found
            told(row)
        machine = _timed(pool, rows, common, timeout)
    absent = {
        (entry.op, impl): {"what": entry.op, "impl": impl, "state": "absent", "why": [why]}
        for entry, impl in pairs
        if (why := unavailable(impl, device.type)) is not None
    }
    order = [(entry.op, impl) for entry, impl in pairs] + [
        (name, "engine") for name in PROMISES if engine
    ]
    ordered = [(rows | absent)[key] for key in order]
    return {
        "ok": all(row["state"] != "FAIL" for row in ordered),
        "device": str(device),
        "machine": machine,
        "cases": "all" if full else cases,
        "seed": seed,
        "rows": ordered,
        "seconds": time.perf_counter() - began,
    }


def _timed(
    pool: Pool, rows: dict[tuple[str, str], Row], common: Task, timeout: float
) -> dict[str, Any]:
    """Time every implementation that passed its checks, one at a time, and add the results to its
    row. Return the machine and its ceilings."""
    ((_, machine),) = pool.answers([common | {"do": "machine"}], max(timeout, 120.0), alone=True)
    if "copy_gb_per_s" not in machine:
        return machine
    ceilings = {
        "bandwidth": machine["copy_gb_per_s"] * 1e9,
        "rate": machine["gemm_gflop_per_s"] * 1e9,
    }
    tasks = [
        common | ceilings | {"do": "time", "what": what, "impl": impl}
        for (what, impl), row in rows.items()
        if impl != "engine" and row["state"] == "ok"
    ]
    for task, found in pool.answers(tasks, timeout, alone=True):
        row = rows[task["what"], task["impl"]]
        if found.get("state") == "FAIL":
            row |= {"state": "FAIL", "why": [f"while it was timed: {why}" for why in found["why"]]}
        else:
            row |= found
    return machine


# ---- the table -----------------------------------------------------------------------------------
def line_of(row: Row) -> str:
    """Format a row as a line of the table."""

    def number(key: str, form: str) -> str:
        value = row.get(key)
        return "-" if value is None else value if isinstance(value, str) else format(value, form)

    bits = (
        "-"
        if "cases_with_moved_bits" not in row
        else "equal"
        if not row["cases_with_moved_bits"]
        else "differ"
    )
    cells = (
        row["state"],
        row["what"],
        row["impl"],
        number("cases", "d"),
        number("error_over_bound", ".3g"),
        bits,
        number("ms", ".4g"),
        number("percent_of_ceiling", ".3g"),
    )
    return _FORM.format(*cells).rstrip()


_FORM = "{:8}{:28}{:14}{:>6}{:>14}{:>8}{:>11}{:>10}"
_HEAD = _FORM.format(
    "", "op or promise", "implementation", "cases", "error/bound", "bits", "ms", "% ceiling"
)


def print_report(found: dict[str, Any]) -> None:
    """Print on standard output the table, the faults, the checks that were not run, and the
    verdict."""
    rows, machine = found["rows"], found["machine"]
    print(_HEAD)
    for row in rows:
        if row["state"] != "absent":
            print(line_of(row))
    for row in (row for row in rows if row["state"] in ("FAIL", "refused")):
        print(f"\n{row['state']} {row['what']} [{row['impl']}]")
        for why in row["why"][:3]:
            print(f"    {why}")
        if len(row["why"]) > 3:
            print(f"    and {len(row['why']) - 3} more")
    reasons: dict[str, list[str]] = {}
    for row in (row for row in rows if row["state"] == "absent"):
        reasons.setdefault(f"{row['impl']}: {row['why'][0]}", []).append(row["what"])
    for why, names in reasons.items():
        print(f"\nnot tried, {len(names)} ops: {why}")
    if "copy_gb_per_s" in machine:
        print(
            f"\nceilings {machine['copy_gb_per_s']:.4g} GB/s, {machine['gemm_gflop_per_s']:.5g} "
            f"GFLOP/s; torch {torch.__version__}; ms: one call from "
            "Python, forward and backward; data that fit a cache may pass the ceiling"
        )
    elif machine:
        print(f"\nnothing was timed: {machine['why'][0]}")
    bad = sum(row["state"] == "FAIL" for row in rows)
    tried = sum(row["state"] in ("ok", "FAIL") for row in rows)
    print(
        f"{tried - bad} of {tried} rows keep their bounds on {found['device']}, in "
        f"{found['seconds']:.0f} s" + (f"; {bad} FAIL" if bad else "")
    )


def tell(row: Row) -> None:
    """Print a row on standard error as soon as it is done, so that a long run shows progress."""
    print(line_of(row), file=sys.stderr, flush=True)
