"""Signals to a run on several devices, however they arrive: from a terminal, from torch's launcher,
and where a rank cannot hear them. Nothing is lost, and no process is left."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.support.behaviour import differences, read_run
from tests.support.launched import (
    command,
    ended,
    heeds_ctrl_c,
    ranks_env,
    start,
    steps_of,
    wait_for_a_step,
)
from tests.support.ranks import comparable
from tests.support.screen import Terminal

from fusedrl.engine.cli.processes import LAST
from fusedrl.engine.runs.status import run_state

pytestmark = pytest.mark.cpu_only("processes of gloo")


STEPS = 6
ALONE = {"OMP_NUM_THREADS": "1"}  # the bits are those of so many threads


def children_of(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def state_of(pid):
    """The letter of its state; a zombie is gone."""
    try:
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""
    return letter.replace("Z", "")


def wait_until(holds, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def all_end(pids):
    wait_until(lambda: not any(state_of(pid) for pid in pids))


@pytest.fixture(scope="module")
def undisturbed(furnished):
    code, said = ended(start(furnished, "slow", STEPS, "undisturbed", 1, variables=ALONE))
    assert code == 0, said
    return comparable(read_run(furnished / "undisturbed"))


def goes_on(directory, run, devices, undisturbed):
    """`fusedrl resume` on so many devices ends with the undisturbed run."""
    words = [sys.executable, "-m", "fusedrl", "resume", run, "--devices", str(devices)]
    subprocess.run(words, cwd=directory, env=ranks_env() | ALONE, check=True, timeout=240)
    assert differences(undisturbed, comparable(read_run(directory / run))) == []


@pytest.mark.parametrize(
    ("stopped", "number"),
    [
        ([1], signal.SIGINT),
        pytest.param([0], signal.SIGTERM, marks=pytest.mark.full),
        pytest.param([0, 1], signal.SIGINT, marks=pytest.mark.full),
    ],
)
def test_the_third_signal_kills_ranks_that_cannot_hear_it(furnished, stopped, number):
    name = f"stopped-{'-'.join(map(str, stopped))}-{int(number)}"
    process = start(furnished, "slow", 200, name, 2, "--run.save_every", "1")
    wait_until(lambda: steps_of(furnished, name))
    ranks = children_of(process.pid)
    for rank in stopped:
        os.kill(ranks[rank], signal.SIGSTOP)
    time.sleep(0.5)
    began = time.monotonic()
    for _ in range(3):
        process.send_signal(number)
        time.sleep(0.2)
    code, said = ended(process)
    assert code == 128 + number, said
    assert time.monotonic() - began < LAST + 30
    all_end(ranks)
    told = json.loads((furnished / name / "status.json").read_text())
    assert told["state"] == "interrupted"
    for rank in stopped:
        assert f"rank {rank} of 2 (pid {ranks[rank]}, stopped)" in told["message"]
    assert told["message"].endswith(f"go on with: fusedrl resume {name}")
    assert f"go on with: fusedrl resume {name}\n" in said
    assert run_state(furnished / name).message == told["message"]
    assert "Traceback" not in said


def test_ctrl_c_on_a_terminal_ends_the_run_saved_and_resumed_to_the_same_bits(
    furnished, undisturbed
):
    """The terminal sends it to the whole foreground group; each rank hears it once."""
    words = command(furnished, "slow", STEPS, "typed", 2)
    terminal = Terminal(words, 100, cwd=furnished, env=ranks_env() | ALONE)
    wait_for_a_step(furnished / "typed" / "metrics.jsonl")
    ranks = children_of(terminal.process.pid)
    assert len(ranks) == 2
    terminal.type("\x03")
    said = terminal.read()
    assert terminal.wait() == 128 + signal.SIGINT, said
    assert said.count("the run stops when this step is complete and saved") == 1
    assert "Traceback" not in said
    all_end(ranks)
    assert steps_of(furnished, "typed")[-1] < STEPS
    goes_on(furnished, "typed", 1, undisturbed)


def test_ctrl_z_on_a_terminal_stops_the_ranks_too(furnished):
    words = command(furnished, "slow", 200, "paused", 2)
    terminal = Terminal(words, 100, cwd=furnished, env=ranks_env() | ALONE)
    metrics = furnished / "paused" / "metrics.jsonl"
    wait_for_a_step(metrics)
    everyone = [terminal.process.pid, *children_of(terminal.process.pid)]
    terminal.type("\x1a")
    wait_until(lambda: {state_of(pid) for pid in everyone} == {"T"})
    before = metrics.read_bytes()
    time.sleep(1.0)
    assert metrics.read_bytes() == before
    terminal.process.send_signal(signal.SIGCONT)
    wait_until(lambda: len(metrics.read_bytes()) > len(before))
    terminal.type("\x03")
    assert terminal.wait() == 128 + signal.SIGINT, terminal.output
    all_end(everyone[1:])


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.full)]
)
def test_signals_to_torchrun_end_the_run_saved_and_resumed_to_the_same_bits(
    furnished, undisturbed, number
):
    name = f"torchrun-{int(number)}"
    words = command(furnished, "slow", STEPS, name, 1)
    at = words.index("-m")
    words[at:at] = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = words[: words.index("--devices")]
    agent = subprocess.Popen(
        words,
        cwd=furnished,
        env=ranks_env() | ALONE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heeds_ctrl_c,
    )
    wait_for_a_step(furnished / name / "metrics.jsonl")
    ranks = children_of(agent.pid)
    agent.send_signal(number)
    code, said = ended(agent)
    assert code != 0
    all_end(ranks)
    assert said.count("the run stops when this step is complete and saved") == 1
    assert json.loads((furnished / name / "status.json").read_text())["state"] == "interrupted"
    assert steps_of(furnished, name)[-1] < STEPS
    goes_on(furnished, name, 2, undisturbed)


@pytest.mark.full
@pytest.mark.parametrize("chain", [(1, 2, 4, 1), (1, 4, 2, 8, 1)])
def test_a_run_that_changes_its_number_of_ranks_at_each_signal_is_the_undisturbed_one(
    furnished, chain
):
    """GRPO in bfloat16; the number of ranks of each part of the run."""
    more = ["--dtype", "bfloat16", "--prompts_per_step", "8", "--samples_per_prompt", "2"]
    more += ["--tokens_per_microbatch", "20"]
    steps, whole, parts = 2 * len(chain), f"whole-{len(chain)}", f"parts-{len(chain)}"
    code, said = ended(
        start(furnished, "slow", steps, whole, 1, *more, stage="grpo", variables=ALONE)
    )
    assert code == 0, said
    words = command(furnished, "slow", steps, parts, chain[0], *more, stage="grpo")
    done = 0
    for number, ranks in enumerate(chain):
        if number:
            words = [sys.executable, "-m", "fusedrl", "resume", parts, "--devices", str(ranks)]
        process = subprocess.Popen(
            words, cwd=furnished, env=ranks_env() | ALONE, stderr=subprocess.PIPE, text=True
        )
        if number < len(chain) - 1:
            wait_until(lambda before=done: rows_of(furnished / parts) > before, 200)
            process.send_signal(signal.SIGTERM)
        code, said = ended(process)
        assert code == (0 if number == len(chain) - 1 else 128 + signal.SIGTERM), said
        assert done < rows_of(furnished / parts) <= steps
        done = rows_of(furnished / parts)
    assert differences(*(comparable(read_run(furnished / run)) for run in (whole, parts))) == []


def rows_of(run):
    metrics = run / "metrics.jsonl"
    return len(metrics.read_bytes().splitlines()) if metrics.exists() else 0
