"""The fixture that runs a contest on top of pytest-benchmark. harness.py explains how to call the
fixture, and the fields of a result."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from bench import harness
from bench.harness import Row, Times


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fusedrl")
    group.addoption(
        "--results",
        type=Path,
        metavar="DIR",
        help="write the rows of each contest to DIR/<file>.json (by default they are only printed)",
    )
    group.addoption(
        "--model",
        type=Path,
        metavar="DIR",
        default=harness.RESULTS.parents[2] / "shared/models/stories260k",
        help="the Llama-like model that bench_generate.py generates with",
    )
    group.addoption(
        "--instruct",
        type=Path,
        metavar="DIR",
        default=Path("runs/smollm2"),
        help="SmolLM2-135M-Instruct for bench_decode.py and bench_instruct.py, as "
        "examples/smollm2.py writes it",
    )
    group.addoption(
        "--questions",
        type=Path,
        metavar="FILE",
        default=harness.RESULTS.parents[2] / "shared/data/gsm8k/train.jsonl",
        help="JSON lines with `question`, such as GSM8K's, for bench_instruct.py",
    )
    group.addoption(
        "--first", type=int, metavar="N", help="the first N contests of each file alone"
    )
    group.addoption(
        "--rounds",
        type=int,
        metavar="N",
        help="time so many rounds, without a warm-up beyond the check of the answers (by default "
        "as many as "
        f"fill {harness.SECONDS} seconds, {harness.FEWEST} to {harness.MOST})",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if (most := config.getoption("--first")) is None:
        return
    seen: dict[Path, int] = {}
    for item in list(items):
        seen[item.path] = seen.get(item.path, 0) + 1
        if seen[item.path] > most:
            items.remove(item)


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker(pytest.mark.benchmark(timer=harness.clock))


def pytest_make_parametrize_id(val: object) -> str | None:
    """`-k` can select by dtype."""
    return harness.name_of(val) if isinstance(val, torch.dtype) else None


@pytest.fixture(autouse=True)
def _alone():
    """One thread for all contestants: two shared cores make OpenMP's barriers spin. Nothing
    compiled for another contest's shapes."""
    torch.set_num_threads(1)
    if "torch._dynamo" in sys.modules:  # else nothing was compiled
        torch.compiler.reset()


@pytest.fixture
def contest(benchmark, request) -> Callable[..., list[Row]]:
    """Checks that all give the same answer, then times them in turn; one contest a test.

    contest(what, shape, dtype, contestants, *, same, bytes_moved=None, flops=None, note="",
    unchecked=(), derive=None) -> rows, none if timing is off
        contestants: name -> function; the first is ours. See `harness` for what else a row holds.
        same: called with (ours, another's answer); raises AssertionError when they differ. None:
        there is nothing to compare. unchecked: contestants whose answer is not ours by
        construction, such as the bare products. derive: called with the times of each contestant,
        round by round; returns what else is to be on our row.
    """

    def run(
        what: str,
        shape: str,
        dtype: torch.dtype,
        contestants: Mapping[str, Callable[[], Any]],
        *,
        same: Callable[[Any, Any], None] | None,
        bytes_moved: int | None = None,
        flops: int | None = None,
        note: str = "",
        unchecked: Collection[str] = (),
        derive: Callable[[Times], Mapping[str, float]] | None = None,
    ) -> list[Row]:
        ours, *others = contestants
        kind = harness.name_of(dtype)
        took = harness.check_answers(what, contestants, same, unchecked)
        if benchmark.disabled:
            benchmark.pedantic(lambda: None)  # it complains of a test that does not use it
            return []
        rounds = request.config.getoption("--rounds") or harness.rounds_for(contestants)
        times: dict[str, list[float]] = {name: [] for name in contestants}
        calls = {name: harness.calls_for(f, took[name]) for name, f in contestants.items()}

        def take(name: str) -> None:
            times[name].append(harness.timed(contestants[name], calls[name]))

        def opponents() -> None:
            for name in others:
                take(name)

        file = Path(request.node.path).stem.removeprefix("bench_")
        benchmark.group = file
        benchmark.pedantic(take, args=(ours,), setup=opponents, rounds=rounds, iterations=1)
        extra = derive(times) if derive is not None else None
        rows = harness.to_rows(
            what, shape, kind, times, bytes_moved=bytes_moved, flops=flops, note=note, extra=extra
        )
        benchmark.extra_info["rows"] = [asdict(row) for row in rows]
        print("\n" + harness.as_text(rows), flush=True)
        if request.config.getoption("--results"):
            harness.merge_results(
                request.config.getoption("--results") / f"{file}.json", rows, harness.machine()
            )
        return rows

    return run
