"""Render bench/results/*.json into the README, between its markers: `make tables`."""
from __future__ import annotations

import json
import re
from itertools import groupby

from bench.harness import RESULTS

README = RESULTS.parents[1] / "README.md"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


def render() -> str:
    """One Markdown row per contest, and the machines they were measured on."""
    lines = ["| what | shape | ours, ms (p20, p80) | of the ceiling | others' median / ours |", "|---|---|---|---|---|"]
    machines: dict[str, list[str]] = {}
    for path in sorted(RESULTS.glob("*.json")):
        results = json.loads(path.read_text(encoding="utf-8"))
        m = results["machine"]
        versions = ", ".join(f"{name} {m[name]}" for name in ("python", "torch", "transformers") if name in m)
        where = f"{m['gpu'] or m['cpu']}, {m['capability']}, {m['threads']} thread; {versions}"
        machines.setdefault(f"{where}; {m['date']}", []).append(f"{path.stem} at `{m['commit']}`")
        for _, rows in groupby(results["rows"], key=lambda row: (row["what"], row["shape"], row["dtype"], row["note"])):
            ours, *others = rows
            times = f"{ours['p50_ms']:.4g} ({ours['p20_ms']:.4g}, {ours['p80_ms']:.4g})"
            ceiling = "" if ours["percent_of_ceiling"] is None else f"{ours['percent_of_ceiling']:.3g}%"
            ratios = ", ".join(f"{row['contestant']} **{row['ratio']:.3g}x**" for row in others)
            what = ours["what"] + (f", {ours['note']}" if ours["note"] else "")
            lines.append(f"| {what} | {ours['shape']} {ours['dtype']} | {times} | {ceiling} | {ratios} |")
    return "\n".join([*lines, "", *(f"Measured on {where}: {', '.join(names)}." for where, names in machines.items())])


def main() -> None:
    text = README.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise SystemExit(f"{README} has no {BEGIN} ... {END}")
    README.write_text(re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n{render()}\n{END}", text, flags=re.DOTALL), encoding="utf-8")


if __name__ == "__main__":
    main()
