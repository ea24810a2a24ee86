"""Whatever goes wrong on one of several processes ends all of them, with one message that says what
to do. Runs are processes of their own."""

import contextlib
import json
import os
import re
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch
from tests.engine.parallel.test_lanes import Together
from tests.support.launched import (
    command,
    ended,
    ranks_env,
    start,
    steps_of,
    wait_for_a_step,
)

from fusedrl.engine.base.errors import ConfigError, SetupError, Stopped, as_machine_fault
from fusedrl.engine.cli import devices
from fusedrl.engine.cli.main import main
from fusedrl.engine.cli.processes import Processes
from fusedrl.engine.parallel import ranks as ranks_module
from fusedrl.engine.parallel.ranks import Ranks, joined, lanes_of

pytestmark = pytest.mark.cpu_only("processes of gloo")
METRICS = (Path(__file__).parents[3] / "docs" / "metrics.md").read_text(encoding="utf-8")


# ---- one rank runs out of memory, or has a bug ---------------------------------------------------
@pytest.mark.parametrize("where", ["before", "inside"])
def test_all_end_with_the_message_of_the_rank_that_ran_out_of_memory(furnished, where):
    """An allocation of 2^62 bytes fails on rank 1 in its second step: before tensors are exchanged,
    where the last step is saved; and within the collective, where nobody can meet any more."""
    code, said = ended(start(furnished, f"short_{where}", 6, f"short_{where}", 2))
    assert code == 3, said
    assert said.count("fusedrl: error:") == 1, said
    assert "fusedrl: error: out of memory in train (" in said
    assert "tried to allocate 4611686018427387904 bytes" in said
    assert "lower tokens_per_microbatch" in said
    assert "Traceback" not in said
    assert "another rank is gone" not in said
    assert f"go on with: fusedrl resume short_{where}\n" in said
    assert steps_of(furnished, f"short_{where}") == [1]


def test_a_bug_on_one_rank_shows_one_traceback(furnished):
    """Of the rank that has it; the other ends without one, and says nothing of its own."""
    code, said = ended(start(furnished, "broken_on_one", 6, "broken", 2))
    assert code == 1, said
    assert said.count("Traceback (most recent call last)") == 1
    assert said.count("KeyError: 'a bug on rank 1'") == 1
    assert steps_of(furnished, "broken") == [1]


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nGPU 0 has"), True),
        (RuntimeError("Cuda failure 2 'out of memory'"), True),
        (RuntimeError("the sizes of tensors must match"), False),
        (SetupError("out of memory in train (x)"), False),
        (KeyError("out of memory"), False),
    ],
)
def test_what_counts_as_a_shortage_of_memory(error, is_one):
    told = as_machine_fault(error, "in score")
    assert (told is not error) == is_one
    if is_one:
        assert isinstance(told, SetupError)
        assert str(told).startswith("out of memory in score (")
        assert "\n" not in str(told)


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (
            torch.AcceleratorError(
                "CUDA error: unspecified launch failure\nCUDA kernel errors", 719
            ),
            True,
        ),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), True),
        (RuntimeError("HIP error: invalid device function"), True),
        (RuntimeError("logits hold NaN"), False),
        (ValueError("CUDA error: no"), False),
        (SetupError("CUDA error: said already"), False),
    ],
)
def test_what_counts_as_a_device_that_failed(error, is_one):
    told = as_machine_fault(error, "in rollout")
    assert (told is not error) == is_one
    if is_one:
        assert isinstance(told, SetupError)
        assert str(told).startswith("the device failed in rollout (")
        assert "last checkpoint in a new process" in str(told)
        assert "\n" not in str(told)


def test_a_signal_while_the_ranks_tell_one_another_is_not_lost(furnished, monkeypatch):
    """It comes when this rank has told already that it has had none: alone, it stops all the
    same."""
    original, told = Ranks.gather, []

    def gather(self, what, value):
        found = original(self, what, value)
        if what == "the end of a step":
            told.append(value)
            if len(told) == 1:
                os.kill(os.getpid(), signal.SIGTERM)
        return found

    monkeypatch.setattr(Ranks, "gather", gather)
    words = command(furnished, "length", 5, "told", 1)
    with contextlib.chdir(furnished):
        assert main(words[words.index("train") :]) == 128 + signal.SIGTERM
    assert [code for code, _ in told] == [None]
    assert steps_of(furnished, "told")[-1] == 1


def test_a_signal_to_one_of_two_after_it_has_told_ends_both_after_the_next_step(furnished):
    code, said = ended(start(furnished, "signalled_late", 5, "signalled", 2))
    assert code == 128 + signal.SIGTERM, said
    assert "Traceback" not in said
    assert steps_of(furnished, "signalled")[-1] == 2
    rows = (furnished / "signalled" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2]


def test_what_a_signal_raises_waits_for_the_end_of_an_exchange():
    """One of two ranks broke off between the lengths and the text of an exchange, and told of it in
    a meeting of another size: the backend ended the process."""
    ranks = Ranks()
    with pytest.raises(Stopped), ranks.meeting("weights"):
        with ranks.meeting("a part"):
            ranks.interrupt(Stopped(130))
        assert ranks.holding  # a meeting within a meeting is its part
    assert ranks.held is None
    with pytest.raises(Stopped):
        ranks.interrupt(Stopped(130))
    with pytest.raises(RuntimeError, match="broken"), ranks.meeting("weights"):
        ranks.interrupt(Stopped(130))
        raise RuntimeError("broken")
    ranks.meet("nothing is left of the signal")
    assert ranks.held is None


@pytest.mark.parametrize("pause", [0.01, 0.08])
def test_three_signals_to_every_rank_end_the_run_as_one_that_was_interrupted(furnished, pause):
    run = furnished / f"impatient-{pause}"
    process = start(furnished, "length", 400, run.name, 2)
    wait_for_a_step(run / "metrics.jsonl")
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for _ in range(3):
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(rank), signal.SIGINT)
        time.sleep(pause)
    code, said = ended(process)
    assert code == 128 + signal.SIGINT, said
    assert "terminate called" not in said
    assert "Traceback" not in said
    assert json.loads((run / "status.json").read_text())["state"] == "interrupted"


# ---- processes, their parent and their cores -----------------------------------------------------
def test_the_processes_end_with_the_one_that_started_them(furnished):
    """A launcher that is killed can tell nobody; the step is completed and saved all the same."""
    process = start(furnished, "slow", 200, "orphans", 2)
    metrics = furnished / "orphans" / "metrics.jsonl"
    wait_for_a_step(metrics)
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(ranks) == 2
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and any(
        Path("/proc", rank, "exe").exists() for rank in ranks
    ):
        time.sleep(0.05)
    assert not [rank for rank in ranks if Path("/proc", rank, "exe").exists()]
    process.stderr.close()
    last = json.loads(metrics.read_text(encoding="utf-8").splitlines()[-1])["step"]
    assert steps_of(furnished, "orphans")[-1] == last < 200


def test_a_process_whose_parent_ended_before_it_began_ends_too(furnished):
    gone = subprocess.Popen(["true"])
    gone.wait()
    words = [*command(furnished, "length", 2, "late", 1), "--place"]
    words += [f"0,2,{gone.pid},{furnished / 'late-store'}"]
    found = subprocess.run(
        words, cwd=furnished, env=ranks_env(), capture_output=True, text=True, timeout=240
    )
    assert found.returncode == 3, found.stderr
    assert "the process that started this one for --devices is gone" in found.stderr
    assert not (furnished / "late").exists()


@pytest.fixture(scope="module")
def noted(furnished):
    """A run of two ranks with twice as many threads as there are cores, evaluated by a reward that
    notes its calls: (directory of the run, notes by rank)."""
    cores = len(os.sched_getaffinity(0))
    held_out = ["--evaluation.data", "prompts.jsonl", "--evaluation.prompts", "5"]
    held_out += ["--evaluation.samples_per_prompt", "2", "--evaluation.every", "1"]
    words = [*held_out, "--monitor_reward", "on_ranks.py:noted"]
    process = start(
        furnished, "length", 1, "noted", 2, *words, variables={"OMP_NUM_THREADS": str(2 * cores)}
    )
    code, said = ended(process)
    assert code == 0, said
    notes = [
        [json.loads(line) for line in (furnished / f"notes-{rank}").read_text().splitlines()]
        for rank in (0, 1)
    ]
    return furnished / "noted", notes


def test_each_process_has_its_share_of_the_cores(noted):
    share = max(1, len(os.sched_getaffinity(0)) // 2)
    assert {note["threads"] for notes in noted[1] for note in notes} == {share}


def test_a_reward_that_is_only_measured_is_divided_as_well(noted):
    """In the step and in evaluation: no completion is scored twice."""
    directory, notes = noted
    calls = [[note["completions"] for note in rank] for rank in notes]
    assert all(min(rank) > 0 for rank in calls), "both ranks have work"
    steps, evaluations = 4, 2 * 5 * 2  # before the first step and after it
    assert sum(map(sum, calls)) == steps + evaluations, calls
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert all("eval_gold/noted/mean" in row for row in rows[:1] + rows[-1:])


def test_metrics_of_the_division_are_those_of_the_page(noted):
    rows = [json.loads(line) for line in (noted[0] / "metrics.jsonl").read_text().splitlines()]
    found = {
        name: value
        for name, value in rows[-1].items()
        if name.startswith("parallel/") or name in ("timing/waiting", "timing/exchange")
    }
    section = METRICS.partition("## Several devices")[2].partition("\n## ")[0]
    listed = re.findall(r"^\| `([^`]+)` \|", section, flags=re.MULTILINE)
    phases = ("generate_and_reward", "score", "advantage", "train", "evaluate")
    expected = {
        name.replace("<k>", str(rank)).replace("<phase>", phase)
        for name in listed
        for rank in (0, 1)
        for phase in phases
    }
    assert set(found) == expected
    assert all(value >= 0 for value in found.values())
    for name in ("parallel/imbalance", "parallel/imbalance_tokens", "parallel/imbalance_time"):
        assert 1 <= found[name] <= 2
    busy = [sum(found[f"parallel/rank{rank}/{phase}"] for phase in phases) for rank in (0, 1)]
    assert found["parallel/imbalance_time"] == pytest.approx(max(busy) / sum(busy) * 2)
    whole = rows[-1]["timing/step"]
    assert max(busy) <= whole


# ---- what ranks must have in common, and what not ------------------------------------------------
def placed(directory, name, *, other):
    """Two processes of a run, the second with other working directory or paths."""
    words = command(directory, "length", 2, str(directory / name), 1)
    found = []
    for rank, more in enumerate(({}, other)):
        options = {"cwd": directory, "env": ranks_env()} | more
        place = f"{rank},2,{os.getpid()},{directory / name}-store"
        found.append(
            subprocess.Popen(
                [*words, "--place", place], stderr=subprocess.PIPE, text=True, **options
            )
        )
    return [ended(process) for process in found]


def test_ranks_with_other_data_name_rank_and_key(furnished, tmp_path):
    for name in ("m", "on_ranks.py"):
        (tmp_path / name).symlink_to(furnished / name)
    lines = (furnished / "prompts.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "prompts.jsonl").write_text("".join(lines[:-1]))
    for code, said in placed(furnished, "other-data", other={"cwd": tmp_path}):
        assert code == 2, said
        assert "expected the same run on all ranks, and data_sha256 is" in said or not said.strip()
    assert not list((furnished / "other-data").glob("*"))


def test_ranks_with_other_packages_name_rank_and_key(furnished, tmp_path):
    information = tmp_path / "torchao-0.0.1.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: torchao\nVersion: 0.0.1")
    env = ranks_env()
    env["PYTHONPATH"] = os.pathsep.join([str(tmp_path), env["PYTHONPATH"]])
    found = placed(furnished, "other-packages", other={"env": env})
    assert [code for code, _ in found] == [2, 2], found
    said = "".join(said for _, said in found)
    assert "torchao is '0.0.1' on rank 1" in said
    assert "same command, files and packages" in said


def by_two(check):
    """What `check` raises on each of two ranks, threads of this process."""
    table, barrier, found = [None, None], threading.Barrier(2), [None, None]

    def run(rank):
        try:
            check(Together(rank, 2, 2, table, barrier))
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


def test_two_ranks_on_one_card_are_refused():
    same = by_two(lambda ranks: ranks.own("GPU", "GPU-5f2c"))
    for error in same:
        assert isinstance(error, SetupError)
        assert "ranks 0 and 1 have the same (GPU-5f2c)" in str(error)
        assert "CUDA_VISIBLE_DEVICES" in str(error)
    assert by_two(lambda ranks: ranks.own("GPU", f"GPU-{ranks.rank}")) == [None, None]
    assert by_two(lambda ranks: ranks.own("GPU", None)) == [None, None], "no cards, no question"


def test_the_ranks_of_a_run_are_asked_for_their_cards(monkeypatch):
    asked = []
    monkeypatch.setattr(ranks_module, "card", lambda device: asked.append(device) or "GPU-1")
    monkeypatch.setattr(ranks_module.Ranks, "gather", lambda self, what, value: [value, value])
    monkeypatch.setattr(ranks_module, "world", lambda: ranks_module.Ranks(1, 2))
    monkeypatch.setattr(ranks_module.Ranks, "fail", lambda self, error: True)
    with pytest.raises(SetupError, match="ranks 0 and 1 have the same"), joined(device="cuda"):
        pass
    assert asked == ["cuda"]


@pytest.mark.parametrize(
    ("rank", "there", "taken"), [(1, 2, 1), (1, 1, 0), (3, 8, 3), (2, 2, None)]
)
def test_a_process_takes_the_card_with_its_number_or_the_only_one(rank, there, taken, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    if taken is None:
        with pytest.raises(SetupError, match=rf"process {rank} .* sees {there}"):
            devices._take_card(rank, there)
    else:
        devices._take_card(rank, there)
        assert chosen == [taken]


def test_one_device_for_all_processes_is_refused(capsys):
    with pytest.raises(ConfigError, match=r"expected --device cuda with --devices 2, got cuda:0"):
        devices.launch(["train"], 2, "cuda:0", Processes())


def test_fewer_cards_than_processes_are_refused_unless_the_run_is_on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(SetupError, match="expected --devices 2 to be at most the 1 GPUs"):
        devices._check_cards("train", 2, None)
    devices._check_cards("train", 2, "cpu")


@pytest.mark.parametrize(
    ("lanes", "strict", "size", "remedy"),
    [
        (None, True, 3, r"got 8 \(what strict sets\); start as many ranks as divide 8$"),
        (None, True, 16, r"divide 8, or set --parallel.lanes 16 or more$"),
        (8, True, 16, r"got 8; start as many ranks as divide 8, or set --parallel.lanes 16 or mor"),
        (8, False, 6, r"got 8; start as many ranks as divide 8, or leave parallel.lanes out$"),
    ],
)
def test_the_remedy_for_lanes_is_one_that_helps(lanes, strict, size, remedy):
    with pytest.raises(ConfigError, match=remedy):
        lanes_of(lanes, strict, size)
    if "16 or" in remedy:
        assert lanes_of(16, strict, size) == 16


def test_strict_on_three_devices_says_what_helps(furnished):
    words = command(furnished, "length", 2, "three-strict", 3)
    at = words.index("--parallel.lanes")
    words[at : at + 2] = ["--strict", "true"]
    found = subprocess.run(
        words, cwd=furnished, env=ranks_env(), capture_output=True, text=True, timeout=240
    )
    assert found.returncode == 2, found.stderr
    assert found.stderr.count("got 8 (what strict sets); start as many ranks as divide 8") == 1
