"""Several processes that train one model: with as many lanes, the bits of one process; whatever
ends one of them ends all."""

import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors import safe_open
from tests.support.behaviour import cases, differences, read_run
from tests.support.launched import (
    LANES,
    REWARDS,
    command,
    ended,
    ranks_env,
    start,
    steps_of,
    wait_for_a_step,
)
from tests.support.ranks import comparable, together
from tests.support.ranks import start as start_ranks

from fusedrl.engine.cli import processes
from fusedrl.engine.cli.main import main
from fusedrl.engine.parallel.ranks import Ranks

pytestmark = pytest.mark.cpu_only("processes of gloo")
CASES = (
    "sft held_out",
    "reward",
    "dpo sigmoid",
    "kto",
    "rejection",
    "ppo",
    "grpo bfloat16",
    "ppo critic",
    "ppo lambdas",
    "ppo lora",
    "ppo replay",
    "ppo refill",
    "ppo ptx",
    "ppo evaluation",
    "ppo speculate",
    "ppo strict",
    "trpo",
)
ROOT = Path(__file__).parents[3]


def alike(furnished, sizes, names, options=LANES):
    one = together(1, furnished, names, options)
    for size in sizes:
        several = together(size, furnished, names, options)
        for name in names:
            assert differences(one[name], several[name]) == [], (size, name)
    return one


def test_two_ranks_have_the_bits_of_one(furnished):
    one = alike(furnished, [2], CASES)
    for name in CASES:
        assert any("optimizer" in key for key in one[name]), "moments were compared"
        assert one[name]["metrics.jsonl"]


def test_four_ranks_have_the_bits_of_one(furnished):
    alike(furnished, [4], ("ppo", "grpo bfloat16", "dpo sigmoid"))


@pytest.mark.full
def test_every_case_has_the_bits_of_one(furnished):
    """On 2 and 4 ranks, every row and option."""
    alike(furnished, [2, 4], list(cases()))


def test_another_number_of_lanes_gives_other_bits(furnished):
    """The control: each rank one lane, as by default. The run is the same within rounding."""
    one = together(1, furnished, ["ppo"], LANES)["ppo"]
    two = together(2, furnished, ["ppo"], [])["ppo"]
    assert two == together(2, furnished, ["ppo"], [])["ppo"], "the same run twice"
    weights = {name: tensors for name, tensors in one.items() if name.endswith("model.safetensors")}
    assert weights
    same = [
        tensor == two[name][key]
        for name, tensors in weights.items()
        for key, tensor in tensors.items()
    ]
    assert sum(same) < len(same) / 2
    first, second = (run["metrics.jsonl"][0] for run in (one, two))
    assert first["reward"] == second["reward"]
    assert first["grad_norm"] == pytest.approx(second["grad_norm"], rel=1e-5)


# ---- killed --------------------------------------------------------------------------------------
SAVED = [*LANES, "--run.save_every", "1", "--optim.schedule", "constant"]


def killed_and_resumed(furnished, undisturbed, meeting, case, resume_on):
    """Kill a rank of two as that meeting begins, go on with so many ranks, and compare with the
    undisturbed run. Returns whether the run came so far."""
    shutil.rmtree(furnished / "run", ignore_errors=True)
    ranks = start_ranks(2, furnished, [case], SAVED, kill=(meeting % 2, meeting))
    codes = []
    for child in ranks:
        child.communicate(timeout=240)
        codes.append(child.returncode)
    if codes == [0, 0]:
        return False
    assert -signal.SIGKILL in codes
    assert codes.count(0) == 0, "nobody ends well"
    resume = [*SAVED, "--run.resume", "true"]
    saved = list((furnished / "run").glob("checkpoints/step_*"))
    if not saved and (furnished / "run" / "metrics.jsonl").exists():
        shutil.rmtree(furnished / "run")  # records and no checkpoint: refused, and begun anew
    children = start_ranks(resume_on, furnished, [case], resume, fresh=False)
    said = [child.communicate(timeout=240)[1] for child in children]
    assert [child.returncode for child in children] == [0] * resume_on, said
    record = json.loads((furnished / f"record-{resume_on}.json").read_text(encoding="utf-8"))
    assert differences(undisturbed, record[case]) == [], (meeting, resume_on)
    return True


@pytest.fixture(scope="module")
def undisturbed(furnished):
    return together(1, furnished, ["ppo", "grpo bfloat16"], SAVED)


@pytest.mark.parametrize(("meeting", "resume_on"), [(9, 1), (40, 4), (61, 2)])
def test_a_rank_that_is_killed_loses_no_step(furnished, undisturbed, meeting, resume_on):
    assert killed_and_resumed(furnished, undisturbed["ppo"], meeting, "ppo", resume_on)


@pytest.mark.full
@pytest.mark.parametrize("case", ["ppo", "grpo bfloat16"])
def test_a_rank_killed_at_any_meeting_loses_no_step(furnished, undisturbed, case):
    meeting, tried = 1, 0
    while killed_and_resumed(furnished, undisturbed[case], meeting, case, (1, 2, 4)[meeting % 3]):
        meeting, tried = meeting + 1, tried + 1
    assert tried > 60


# ---- through the command line ------------------------------------------------------------------
REWARD_RUN = [
    *("--model", "m", "--data", "pairs.jsonl", "--pairs_per_step", "12", "--device", "cpu"),
    *("--run.dir", "judge", "--run.progress", "false"),
]


def test_an_error_on_one_rank_ends_all_with_its_message_and_the_step_before_is_saved(furnished):
    code, said = ended(start(furnished, "fails_on_one", 6, "failed", 2))
    assert code == 2, said
    assert said.count("fusedrl: error:") == 1
    assert "reward 'fails_on_one' raised ValueError: only here" in said
    told = "step 1 is in failed/checkpoints/step_00000001; go on with: fusedrl resume failed\n"
    assert told in said
    assert steps_of(furnished, "failed") == [1]


def test_a_rank_that_dies_is_told_of_and_the_run_goes_on_with_any_number_of_ranks(furnished):
    """And is then the run that nothing disturbed."""
    code, said = ended(start(furnished, "dies_on_one", 3, "killed", 2, "--run.save_every", "1"))
    assert code != 0
    assert "another rank is gone" in said
    assert "go on with: fusedrl resume killed\n" in said
    assert steps_of(furnished, "killed") == [1]
    rest = ["--run.save_every", "1", "--run.resume", "true"]
    code, said = ended(start(furnished, "dies_on_one", 3, "killed", 4, *rest, "--run.keep", "9"))
    assert code != 0  # of four ranks one dies at its second call, too
    assert steps_of(furnished, "killed")[-1] == 2
    code, said = ended(start(furnished, "dies_on_one", 3, "killed", 1, *rest))
    assert code == 0, said
    code, said = ended(
        start(furnished, "dies_on_one", 3, "undisturbed", 1, "--run.save_every", "1")
    )
    assert code == 0, said
    found = [comparable(read_run(furnished / name)) for name in ("killed", "undisturbed")]
    assert differences(*found) == []


def test_a_signal_lets_the_step_end_on_all_ranks_and_saves_it(furnished):
    process = start(furnished, "slow", 200, "stopped", 2)
    metrics = furnished / "stopped" / "metrics.jsonl"
    wait_for_a_step(metrics)
    process.send_signal(signal.SIGTERM)
    code, said = ended(process)
    assert code == 143, said
    last = json.loads(metrics.read_text(encoding="utf-8").splitlines()[-1])["step"]
    assert steps_of(furnished, "stopped")[-1] == last
    assert said.count("the run stops when this step is complete and saved") == 1


def test_a_rank_that_dies_before_all_have_joined_ends_the_others(furnished, monkeypatch, capfd):
    monkeypatch.setattr(processes, "GRACE", 1.0)
    monkeypatch.chdir(furnished)
    store = furnished / "lonely-store"
    words = command(furnished, "length", 2, "lonely", 1)
    dies = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"]
    both = processes.Processes()
    began = time.monotonic()
    both.start([[*words, "--place", f"0,2,{os.getpid()},{store}"], dies], ranks_env())
    assert both.wait() == 128 + signal.SIGKILL
    assert time.monotonic() - began < 60
    assert "rank 1 of 2 was ended by SIGKILL" in capfd.readouterr().err


def test_ctrl_c_and_signals_of_the_run_reach_all(furnished):
    for number, more in ((signal.SIGINT, []), (signal.SIGQUIT, ["--run.signals", "SIGQUIT"])):
        name = f"signal{int(number)}"
        process = start(furnished, "slow", 200, name, 2, *more)
        wait_for_a_step(furnished / name / "metrics.jsonl")
        process.send_signal(number)
        code, said = ended(process)
        assert code == 128 + number, said
        assert "Traceback" not in said


def test_a_failure_between_a_word_and_its_tensors_does_not_meet(monkeypatch):
    """The others wait for tensors there, and would take the word for them."""
    ranks, met = Ranks(0, 2), []
    monkeypatch.setattr(Ranks, "_meet", lambda self, what, failure: met.append(what) or [])
    with pytest.raises(MemoryError) as caught, ranks.meeting("sums"):
        raise MemoryError
    assert ranks.fail(caught.value) is False
    assert met == ["sums"]
    with pytest.raises(TypeError):
        ranks.gather("values", object())
    assert met == ["sums"], "what cannot be told is found before the others are met"


def test_a_reward_model_scores_alike_on_any_number_of_ranks(furnished):
    """Its forward passes are cut by the whole rollout."""
    with contextlib.chdir(furnished):
        assert main(["train", "reward", *REWARD_RUN]) == 0
    judge = ["--reward", "judge/model", "--monitor_reward", "judge/model"]
    alike(furnished, [2], ["ppo"], [*LANES, *judge, "--samples_per_prompt", "3"])


def test_nothing_listens_but_on_loopback(furnished):
    process = start(furnished, "slow", 200, "heard", 2)
    metrics = furnished / "heard" / "metrics.jsonl"
    wait_for_a_step(metrics)
    listening = set()
    for child in Path("/proc").glob("[0-9]*"):
        try:
            words = (child / "cmdline").read_bytes()
            if b"heard" not in words or b"--place" not in words:
                continue
            links = [os.readlink(link) for link in (child / "fd").iterdir()]
        except OSError:
            continue
        inodes = {match[1] for link in links if (match := re.match(r"socket:\[(\d+)\]", link))}
        for table, width in (("tcp", 8), ("tcp6", 32)):
            for line in (child / "net" / table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and fields[9] in inodes:
                    listening.add(fields[1][:width])
    process.send_signal(signal.SIGTERM)
    ended(process)
    assert listening, "gloo's own"
    assert listening <= {
        "0100007F",
        "00000000000000000000000001000000",
        "0000000000000000FFFF00000100007F",
    }


def test_fewer_prompts_than_ranks_and_one_micro_batch(furnished):
    """Ranks with nothing to do take part in everything."""
    few = ["--prompts_per_step", "1", "--tokens_per_microbatch", "9999"]
    runs = []
    for count in (1, 4):
        code, said = ended(start(furnished, "length", 2, f"few{count}", count, *few))
        assert code == 0, said
        runs.append(comparable(read_run(furnished / f"few{count}")))
    assert differences(*runs) == []


def test_bytes_are_those_of_the_formula(furnished):
    """A rank sends the gradients that it does not own, in float32, and receives as many
    parameters, at each of the four optimizer steps of a rollout; all ranks together
    (P - 1) of each."""
    rows = [
        json.loads(line)
        for line in (furnished / "few4" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    last = max((furnished / "few4" / "checkpoints").glob("step_*"))
    whole, owned = (
        sum(math.prod(shape) for path in paths for shape in shapes(path))
        for paths in (
            [last / "model.safetensors"],
            [last / "optimizer.00000-of-00004.safetensors"],
        )
    )
    owned = owned // 2  # two moments of each number
    steps = rows[0]["parallel/gradients_bytes"] / (4 * (whole - owned))
    assert steps == 4
    assert rows[0]["parallel/parameters_bytes"] == rows[0]["parallel/gradients_bytes"]


def shapes(path):
    with safe_open(path, framework="pt") as tensors:
        return [
            tensors.get_slice(name).get_shape()
            for name in list(tensors.keys())
            if not name.endswith(".step")
        ]


def test_ranks_with_different_commands_name_rank_and_key(furnished):
    store = furnished / "other-store"
    (furnished / "on_ranks.py").write_text(REWARDS, encoding="utf-8")
    processes = []
    for rank in (0, 1):
        words = command(furnished, "length", 2, "different", 1)
        words += ["--place", f"{rank},2,{os.getpid()},{store}", "--run.seed", str(rank)]
        processes.append(
            subprocess.Popen(
                words,
                cwd=furnished,
                env=os.environ
                | {
                    "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                    "GLOO_SOCKET_IFNAME": "lo",
                },
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    for process in processes:
        code, said = ended(process)
        assert code == 2, said
        assert "expected the same run on all ranks" in said or not said.strip()
        if said.strip():
            assert "config.run.seed is" in said


@pytest.mark.parametrize("devices", ["0", "two", "-1"])
def test_a_number_of_devices_that_is_none_is_refused(devices, capsys):
    assert main(["train", "ppo", "--devices", devices]) == 2
    assert "expected --devices to be a whole number >= 1" in capsys.readouterr().err


def test_lanes_that_the_ranks_do_not_divide_are_refused(furnished):
    code, said = ended(start(furnished, "length", 2, "three", 3))
    assert code == 2
    assert said.count("expected parallel.lanes to be a multiple of the 3 ranks, got 8") == 1
