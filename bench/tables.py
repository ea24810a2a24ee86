"""Render bench/results/*.json as tables between the markers of docs/numbers.md, and some of them in
the README: `make tables`."""

from __future__ import annotations

import re
from itertools import groupby
from pathlib import Path
from typing import Any

from bench.harness import RESULTS, Result, contest_of, read_results

README, NUMBERS = (RESULTS.parents[1] / page for page in ("README.md", "docs/numbers.md"))
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
SHORT_BEGIN, SHORT_END = "<!-- numbers:begin -->", "<!-- numbers:end -->"

# The README's rows: (file, row, shape, contestant) of a contest on a CPU, and what they are called
# there.
SHORT = {
    (
        "decode",
        "decode, 135M",
        "1 x (8 + 32)",
        "transformers",
    ): "generation, a model of 135M: 1 sequence",
    (
        "decode",
        "decode, 135M",
        "1 x (8 + 32)",
        "llama.cpp",
    ): "generation, a model of 135M: 1 sequence",
    (
        "decode",
        "decode, 135M",
        "16 x (8 + 16)",
        "llama.cpp",
    ): "generation, a model of 135M: 16 sequences",
    (
        "generate",
        "generate, sampled",
        "64 x (8 + 128)",
        "transformers",
    ): "generation, a model of 260 thousand: 64 prompts",
    (
        "instruct",
        "training pass, 135M",
        "8 of GSM8K: 1263 tokens",
        "transformers, padded",
    ): "training, a model of 135M: 8 texts of 95 to 233 tokens",
    (
        "instruct",
        "GRPO step, 135M",
        "8 of GSM8K x 8 x 128",
        "TRL",
    ): "a GRPO step, a model of 135M: 8 prompts x 8 completions x 128 tokens",
    (
        "logprob",
        "logprob + entropy, forward+backward",
        "2048 x 32000",
        "eager",
    ): "log-probability and entropy, forward and backward, 2,048 x 32,000 logits",
    (
        "linear_policy_loss",
        "linear_policy_loss fwd + bwd, 100% of the rows active",
        "2048 x 512 x 32000",
        "eager",
    ): "hidden states to policy loss, forward and backward: the same speed in 5% of the memory",
}
WITH_MODEL = {"generate", "step"}  # contests that take --model


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
    return (
        f"| {_what(ours)} | {ours['shape']} {ours['dtype']} | {times} | {ceiling} | "
        f"{', '.join(ratios)} |"
    )


def _what(row: dict[str, Any]) -> str:
    return row["what"] + (f", {row['note']}" if row["note"] else "")


def render_short(folder: Path = RESULTS) -> str:
    """The README's table. Raises KeyError where a row of SHORT was not measured."""
    lines = ["| what | beside | times as fast | command |", "|---|---|---|---|"]
    for (file, what, shape, contestant), name in SHORT.items():
        rows = [row for row, run in read_results(folder / f"{file}.json") if not run["gpu"]]
        ratios = {
            (_what(row), row["shape"], row["dtype"], row["contestant"]): row["ratio"]
            for row in rows
        }
        command = (
            "make bench "
            f'BENCH="bench/bench_{file}.py{" --model MODEL" if file in WITH_MODEL else ""}"'
        )
        beside = "torch, eager" if contestant == "eager" else contestant
        lines.append(
            f"| {name} | {beside} | **{ratios[what, shape, 'float32', contestant]:.3g}** | "
            f"`{command}` |"
        )
    return "\n".join(lines)


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
    for page, begin, end, table in (
        (NUMBERS, BEGIN, END, render()),
        (README, SHORT_BEGIN, SHORT_END, render_short()),
    ):
        page.write_text(
            replace_between(page.read_text(encoding="utf-8"), begin, end, table), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
