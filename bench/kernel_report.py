"""Write docs/kernel-report.md: registers, shared memory and spills of every GPU kernel, compiled
for every target without a GPU. `make kernel-report`

The Triton kernels are those of the tables `OFFLINE_KERNELS`, the CUDA C++ kernels those of
`OFFLINE_SOURCES`; tests/offline_compile.py describes these tables. The report has no date: it
changes only if a kernel or a compiler changes.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Iterator
from typing import Any

from bench.harness import RESULTS
from bench.tables import replace_between
from tests.offline_compile import TARGETS, compile_one, cuda_sources, kernels, nvidia_usage

from fusedrl.kernels.runtime import nvrtc

REPORT = RESULTS.parents[1] / "docs" / "kernel-report.md"
BEGIN, END = "<!-- kernels:begin -->", "<!-- kernels:end -->"
Usage = dict[str, Any]  # registers, spills, shared; or error


def triton_kernels() -> Iterator[tuple[str, dict[str, Usage]]]:
    """(module.name, target -> usage), in the order of the tables."""
    for name, entry in kernels([]).items():
        used: dict[str, Usage] = {}
        for target, spec in TARGETS.items():
            if target not in entry.get("targets", TARGETS):
                continue
            try:
                used[target] = compile_one(entry, spec)
            except Exception as error:  # one broken kernel must not hide the others
                used[target] = {"error": f"{type(error).__name__}: {error}"}
        yield name, used


def cuda_kernels() -> Iterator[tuple[str, dict[str, Usage]]]:
    """(file, kernel and options, target -> usage), in the order of the tables."""
    targets = [target for target, (backend, *_) in TARGETS.items() if backend == "cuda"]
    for source, options, _ in cuda_sources():
        used = {
            target: nvidia_usage(nvrtc.compile_cubin(source, options, target)) for target in targets
        }
        for kernel in sorted(used[targets[0]]):
            yield (
                f"{source}: {kernel} {' '.join(options)}".strip(),
                {target: used[target][kernel] for target in targets},
            )


def table(rows: list[tuple[str, dict[str, Usage]]]) -> list[str]:
    """A Markdown row a kernel: registers a thread / shared bytes a block, for each target."""
    targets = [target for target in TARGETS if any(target in used for _, used in rows)]
    lines = [f"| kernel | {' | '.join(targets)} |", "|---" * (len(targets) + 1) + "|"]
    return lines + [
        f"| `{name}` | {' | '.join(_cell(used.get(target)) for target in targets)} |"
        for name, used in rows
    ]


def _cell(usage: Usage | None) -> str:
    if usage is None:
        return "not used there"
    if "error" in usage:
        return "**does not compile**"
    return f"{usage['registers']} / {usage['shared']}" + (
        f", **{usage['spills']} spilled**" if usage["spills"] else ""
    )


def render(
    triton_rows: list[tuple[str, dict[str, Usage]]], cuda_rows: list[tuple[str, dict[str, Usage]]]
) -> str:
    import triton

    compiler = importlib.metadata.version("nvidia-cuda-nvrtc")
    cells = [usage for _, used in (*triton_rows, *cuda_rows) for usage in used.values()]
    spilled, broken = (
        sum(bool(usage.get("spills")) for usage in cells),
        sum("error" in usage for usage in cells),
    )
    return "\n".join(
        [
            f"{len(cells)} compilations, {spilled} with spills, {broken} failed.",
            "",
            f"## Triton {triton.__version__}: {len(triton_rows)} kernels",
            "",
            *table(triton_rows),
            "",
            f"## CUDA C++, NVRTC {compiler}: {len(cuda_rows)} kernels",
            "",
            *table(cuda_rows),
        ]
    )


def main() -> None:
    if os.environ.get("TRITON_INTERPRET"):
        sys.exit(
            "kernel-report: expected TRITON_INTERPRET unset: under the interpreter there is "
            "nothing to compile"
        )
    fault = nvrtc.loading_fault()
    if fault is not None:
        sys.exit(
            f"kernel-report: expected NVRTC, got {fault}; pip install cuda-bindings "
            "nvidia-cuda-nvrtc (`make venv` does)"
        )
    found: list[tuple[str, dict[str, Usage]]] = []
    for name, used in triton_kernels():
        print(
            f"{name:64}",
            "  ".join(f"{target} {_cell(usage)}" for target, usage in used.items()),
            flush=True,
        )
        found.append((name, used))
    cuda = list(cuda_kernels())
    for name, used in cuda:
        print(
            f"{name:64}",
            "  ".join(f"{target} {_cell(usage)}" for target, usage in used.items()),
            flush=True,
        )
    REPORT.write_text(
        replace_between(REPORT.read_text(encoding="utf-8"), BEGIN, END, render(found, cuda)),
        encoding="utf-8",
    )
    wrong = [
        f"{name} on {target}: {usage.get('error', 'spills')}"
        for name, used in (*found, *cuda)
        for target, usage in used.items()
        if "error" in usage or usage["spills"]
    ]
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
