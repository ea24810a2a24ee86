"""Options beside options: every pair runs and keeps what each of the two promises alone, or is
refused with a message.

Each pair is a run of three steps through the command line, held to what does not depend on how the
pair is built:
interrupted in its last step and resumed it is bitwise the undisturbed run; the first update finds
the ratios at exactly 1; sampler and trainer agree, exactly under strict; recomputing activations,
evaluating and guessing tokens leave the other option's run as it was, to the bit; a constant added
to the reward leaves its course; its first completions are those of the plain run.
"""

from __future__ import annotations

import itertools
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.behaviour import (
    OF_CRITICS,
    POLICY,
    POLICY_OPTIONS,
    SFT_OPTIONS,
    cases,
    command,
    differences,
    furnish,
    read_run,
    run_case,
)

from fusedrl.engine.model.wide import narrow_products

pytestmark = [pytest.mark.cpu_only("runs are held to bits, which is promised on a CPU")]

SAMPLES_DIFFER = {
    "bfloat16",
    "lambdas",
    "refill",
    "top_p",
    "environment",
}  # from the plain run's, in the first step already
REFUSED = ({"held", "chosen"},)  # pairs that contradict each other
OFFSET = 7.0
MORTAL = """
import functools, os

def mortal(function):
    @functools.wraps(function)
    def counted(*args, **columns):
        with open("calls", "a") as file:
            file.write(".")
        if os.path.exists("dies_at") and os.path.getsize("calls") == int(open("dies_at").read()):
            raise KeyboardInterrupt
        return function(*args, **columns)
    return counted

likes_w3 = mortal(likes_w3)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Iterator[dict[str, Any]]:
    """The working directory of the runs, and what has been run in it."""
    directory, before = tmp_path_factory.mktemp("interactions"), Path.cwd()
    furnish(directory)
    with (directory / "rewards.py").open("a", encoding="utf-8") as file:
        file.write(MORTAL)
    os.chdir(directory)
    try:
        yield {}
    finally:
        os.chdir(before)


def _arguments(row: str, *names: str) -> list[str]:
    return [
        "train",
        row,
        *POLICY,
        *itertools.chain.from_iterable(POLICY_OPTIONS[name] for name in names),
    ]


def _run(ran: dict[str, Any], row: str, *names: str) -> dict[str, Any]:
    """What a run with these options computes, and {"calls": of its reward}; each is run once a
    module."""
    key = " ".join((row, *names))
    if key not in ran:
        ran[key] = _counted(_arguments(row, *names))
    return ran[key]


def _counted(arguments: list[str]) -> dict[str, Any]:
    Path("calls").unlink(missing_ok=True)
    return run_case(arguments) | {
        "calls": Path("calls").stat().st_size if Path("calls").exists() else 0
    }


def _steps(found: dict[str, Any]) -> list[dict[str, Any]]:
    return [line for line in found["metrics.jsonl"] if line["step"] > 0]


def _trained(found: dict[str, Any]) -> dict[str, Any]:
    """Weights, and the metrics of the steps less those of evaluation and of guessed tokens."""
    parts = {
        name: part
        for name, part in found.items()
        if name.startswith(("model/", "critic/", "adapter/"))
    }
    return parts | {
        "steps": [
            {
                key: value
                for key, value in line.items()
                if not key.startswith(("eval_", "speculation/"))
            }
            for line in _steps(found)
        ]
    }


def _same_course(steps: list[dict[str, Any]], shifted: list[dict[str, Any]], rounded: bool) -> None:
    """rounded: gradients are rounded to bfloat16 on the way, so that a last bit of the values may
    become one of bfloat16."""
    rel, abs_ = (2e-2, 1e-3) if rounded else (1e-4, 1e-5)
    for line, other in zip(steps, shifted, strict=True):
        assert other["reward"] - line["reward"] == pytest.approx(OFFSET, abs=1e-6)
        for key in ("kl", "entropy", "grad_norm", "completions/mean_length"):
            if key in line:
                assert other[key] == pytest.approx(line[key], rel=rel, abs=abs_), key


def _resumed(found: dict[str, Any], arguments: list[str], *more: str) -> dict[str, Any]:
    """The same run once more, interrupted half-way in a call of its reward, then resumed with more
    options."""
    shutil.rmtree("run")
    Path("calls").unlink()
    Path("dies_at").write_text(str(found["calls"] // 2 + 1), encoding="utf-8")
    try:
        assert command(arguments)[0] == 130
    finally:
        Path("dies_at").unlink()
    code, said = command([*arguments, "--run.resume", "true", *more])
    assert code == 0, said
    return read_run(Path("run"))


def _resumes_bitwise(found: dict[str, Any], arguments: list[str]) -> None:
    undisturbed = {name: part for name, part in found.items() if name != "calls"}
    assert differences(undisturbed, _resumed(found, arguments)) == []


PAIRS = [
    (row, a, b)
    for row in ("ppo", "grpo")
    for a, b in itertools.combinations(POLICY_OPTIONS, 2)
    if not (row == "grpo" and {a, b}.intersection(OF_CRITICS))
]


@pytest.mark.parametrize(
    "row, a, b",
    [pytest.param(*pair, marks=[pytest.mark.full] if pair[0] == "grpo" else []) for pair in PAIRS],
)
def test_pair(place, row, a, b):
    names = {a, b}
    found = _run(place, row, a, b)
    if names in REFUSED:
        assert found == {"refused": 2, "calls": 0}
        return
    steps = _steps(found)
    assert [line["step"] for line in steps] == [1, 2, 3]
    for line in steps:
        assert (line["policy/first_ratio_min"], line["policy/first_ratio_max"]) == (1.0, 1.0)
        assert line["sampling/sampling_logp_difference/max"] <= (
            0.0 if "strict" in names else 2e-2 if "bfloat16" in names else 1e-4
        )
        assert line["grad_norm"] > 0
    for neutral, other in ((a, b), (b, a)):
        if neutral in ("checkpointed", "evaluation", "speculate"):
            assert differences(_trained(_run(place, row, other)), _trained(found)) == []
    if "offset" in names:
        rounded = "bfloat16" in names and narrow_products(torch.device("cpu"), torch.bfloat16)
        _same_course(_steps(_run(place, row, *(names - {"offset"}))), steps, rounded)
    if not names & SAMPLES_DIFFER:
        plain = _steps(_run(place, row))[0]
        assert steps[0]["completions/mean_length"] == plain["completions/mean_length"]
        assert steps[0]["reward"] == pytest.approx(
            plain["reward"] + OFFSET * ("offset" in names), abs=1e-6
        )
    _resumes_bitwise(found, _arguments(row, a, b))


@pytest.mark.parametrize("before", ["false", "true"])
def test_guessing_may_be_switched_in_a_resumed_run(place, before):
    after = "true" if before == "false" else "false"
    arguments = [*_arguments("ppo"), "--generation.speculate"]
    found = _counted([*arguments, before])
    resumed = _resumed(found, [*arguments, before], "--generation.speculate", after)
    assert differences(_trained(found), _trained(resumed)) == []
    drafted = ["speculation/drafted" in line for line in _steps(resumed)]
    assert set(drafted) == {True, False}


STAGE_PAIRS = [
    (stage, a, b)
    for stage in ("sft", "reward", "dpo", "kto")
    for a, b in itertools.combinations(SFT_OPTIONS, 2)
    if f"{stage} {a}" in cases() and f"{stage} {b}" in cases()
]


@pytest.mark.parametrize("stage, a, b", STAGE_PAIRS)
def test_pair_of_a_stage_on_data(place, stage, a, b):
    base = cases()[stage if stage != "dpo" else "dpo sigmoid"]

    def run(*names: str) -> dict[str, Any]:
        return run_case(
            [*base, *itertools.chain.from_iterable(SFT_OPTIONS[name] for name in names)]
        )

    found = run(a, b)
    assert all(math.isfinite(line["loss"]) for line in _steps(found))
    if "checkpointed" in (a, b):
        assert differences(_trained(run(a if b == "checkpointed" else b)), _trained(found)) == []
