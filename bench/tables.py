"""Render bench/results/*.json into the README, between its markers: `make tables`."""

from __future__ import annotations

import re
from itertools import groupby
from pathlib import Path
from typing import Any

from bench.harness import RESULTS, Result, contest_of, read_results

README = RESULTS.parents[1] / "README.md"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


def render(folder: Path = RESULTS) -> str:
    """One Markdown row a contest, a table a device, and below it the runs that measured it."""
    devices: dict[str, list[tuple[str, list[Result]]]] = {}
    for path in sorted(folder.glob("*.json")):
        for contest, results in groupby(read_results(path), key=contest_of):
            devices.setdefault(contest[-1] or "CPU", []).append((path.stem, list(results)))
    return "\n\n".join(_table(device, contests) for device, contests in sorted(devices.items()))


def _table(device: str, contests: list[tuple[str, list[Result]]]) -> str:
    lines = [
        f"**{device}**",
        "",
        "| what | shape | ours, ms (p20, p80) | of the ceiling | others' median / ours |",
        "|---|---|---|---|---|",
    ]
    lines += [_line([row for row, _ in results]) for _, results in contests]
    machines: dict[str, dict[str, dict[str, int]]] = {}  # where -> file -> commit -> contests
    for file, results in contests:
        run = results[0][1]
        commits = machines.setdefault(_where(run), {}).setdefault(file, {})
        commits[run["commit"]] = commits.get(run["commit"], 0) + 1
    for where, files in machines.items():
        lines += [
            "",
            f"Measured on {where}: "
            f"{', '.join(_commits(file, commits) for file, commits in files.items())}.",
        ]
    return "\n".join(lines)


def _line(rows: list[dict[str, Any]]) -> str:
    ours, *others = rows
    times = f"{ours['p50_ms']:.4g} ({ours['p20_ms']:.4g}, {ours['p80_ms']:.4g})"
    ceiling = "" if ours["percent_of_ceiling"] is None else f"{ours['percent_of_ceiling']:.3g}%"
    ratios = [f"{row['contestant']} **{row['ratio']:.3g}x**" for row in others] + [
        f"{name} {value:.3g}" for name, value in ours.get("extra", {}).items()
    ]
    what = ours["what"] + (f", {ours['note']}" if ours["note"] else "")
    return (
        f"| {what} | {ours['shape']} {ours['dtype']} | {times} | {ceiling} | {', '.join(ratios)} |"
    )


def _where(run: dict[str, Any]) -> str:
    device = (
        f"{run['gpu']} ({run['driver and clocks']})"
        if run["gpu"]
        else f"{run['cpu']}, {run['capability']}, {run['threads']} thread"
    )
    names = ("python", "torch", *(("triton", "liger-kernel") if run["gpu"] else ("transformers",)))
    versions = ", ".join(f"{name} {run[name]}" for name in names if name in run)
    ceilings = (
        f"; ceilings {run['copy_gb_per_s']:.4g} GB/s, {run['gemm_gflop_per_s'] / 1e3:.3g} TFLOP/s"
        if "copy_gb_per_s" in run
        else ""
    )
    memory = f"; freed memory {run['freed_memory']}" if "freed_memory" in run else ""
    return f"{device}; {versions}{ceilings}{memory}; {run['date']}"


def _commits(file: str, commits: dict[str, int]) -> str:
    """A file measured at several commits says how many of its contests each of them measured."""
    if len(commits) == 1:
        return f"{file} at `{next(iter(commits))}`"
    return f"{file} at " + " and ".join(
        f"`{commit}` ({count} contests)" for commit, count in commits.items()
    )


def replace_between(text: str, begin: str, end: str, inside: str) -> str:
    """`text` with what stands between its two markers replaced. Raises ValueError when it does not
    have them."""
    if begin not in text or end not in text:
        raise ValueError(
            f"expected {begin} ... {end} in the file that the table goes to, and found none; put "
            "both lines where it belongs"
        )
    return re.sub(
        f"{re.escape(begin)}.*{re.escape(end)}",
        lambda _: f"{begin}\n{inside}\n{end}",
        text,
        flags=re.DOTALL,
    )


def main() -> None:
    README.write_text(
        replace_between(README.read_text(encoding="utf-8"), BEGIN, END, render()), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
