"""fusedrl runs, resume and train's help: how runs stand and go on, and what is shown first."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tests.engine.conftest import WORDS

from fusedrl.engine.cli.main import STAGES, main, parse_config
from fusedrl.engine.cli.runs import resumed
from fusedrl.engine.runs.checkpoint import RunLock, saved_steps
from fusedrl.engine.runs.files import is_locked
from fusedrl.engine.runs.metrics import read_rows
from fusedrl.engine.runs.status import find_runs, read_status, run_state

pytestmark = pytest.mark.cpu_only("the command line")


@pytest.fixture
def place(tmp_path, tiny_model, monkeypatch):
    """A working directory with a model, data and a reward under relative names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(tiny_model)
    rows = [{"prompt": word, "completion": f" {word} w1"} for word in WORDS[4:28]]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": w}) + "\n" for w in WORDS[4:]))
    (tmp_path / "slow.py").write_text(
        "import time\n\ndef f(prompts, completions, **columns):\n    time.sleep(0.3)\n"
        "    return [float(len(text)) for text in completions]\n"
    )
    (tmp_path / "broken.py").write_text(
        "def f(prompts, completions, **columns):\n    raise RuntimeError('no such thing')\n"
    )
    return tmp_path


SFT = ["--model=model", "--data=t.jsonl", "--sequences_per_step=8", "--run.progress=false"]
GRPO = [
    *("--model=model", "--data=p.jsonl", "--prompts_per_step=2", "--samples_per_prompt=2"),
    *("--generation.max_new_tokens=4", "--run.progress=false"),
]


def listed(capsys, *argv: str) -> list[dict]:
    capsys.readouterr()
    assert main(["runs", *argv, "--output-json", "-"]) == 0
    return json.loads(capsys.readouterr().out)


def killed(options: list[str], after: int, number: int = signal.SIGKILL) -> None:
    """Begin a run in a process of its own, and end it by a signal after so many steps."""
    run = next(Path(word.partition("=")[2]) for word in options if word.startswith("--run.dir="))
    process = subprocess.Popen(
        [sys.executable, "-m", "fusedrl.engine.cli", "train", *options],
        stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    ends = time.monotonic() + 60
    while sum(1 for _ in read_rows(run / "metrics.jsonl")) < after and time.monotonic() < ends:
        time.sleep(0.02)
    process.send_signal(number)
    process.wait(60)


def test_how_runs_stand(place, capsys):
    assert main(["train", "sft", *SFT, "--run.dir=runs/a/done"]) == 0
    assert main(["train", "grpo", *GRPO, "--reward=broken.py:f", "--run.dir=runs/failed"]) == 2
    killed(
        ["grpo", *GRPO, "--reward=slow.py:f", "--steps=40", "--run.dir=runs/cut"],
        after=2,
        number=signal.SIGTERM,
    )
    (place / "runs" / "notes").mkdir()
    by_name = {row["directory"]: row for row in listed(capsys)}
    assert sorted(by_name) == ["runs/a/done", "runs/cut", "runs/failed"]
    done, cut, failed = (by_name[name] for name in sorted(by_name))
    assert (done["stage"], done["state"], done["step"], done["total"]) == ("sft", "finished", 3, 3)
    assert done["score"][0] == "loss"
    assert done["seconds"] > 0
    assert done["next"] == "fusedrl export runs/a/done DIR"
    assert (cut["stage"], cut["state"], cut["total"]) == ("grpo", "interrupted", 40)
    assert 2 <= cut["step"] < 40
    assert cut["next"] == "fusedrl resume runs/cut"
    assert failed["state"] == "failed"
    assert "no such thing" in failed["message"]
    with RunLock("runs/cut"):
        (running,) = [row for row in listed(capsys) if row["directory"] == "runs/cut"]
        assert running["state"] == "running"
    assert main(["runs"]) == 0
    shown = capsys.readouterr().out
    assert "fusedrl resume runs/cut" in shown.splitlines()
    assert all(word in shown for word in ("finished", "interrupted", "failed", "3 of 3"))


def test_a_killed_run_is_resumed_from_another_directory_and_bitwise_the_same(place, capsys):
    options = ["grpo", *GRPO, "--reward=slow.py:f", "--steps=5", "--run.save_every=1"]
    assert main(["train", *options, "--run.dir=runs/whole"]) == 0
    killed([*options, "--run.dir=runs/cut"], after=2)
    assert run_state("runs/cut").state == "interrupted"  # it could not say so
    away = place / "away"
    away.mkdir()
    os.chdir(away)
    assert main(["resume", "../runs/cut"]) == 0, capsys.readouterr().err
    assert Path.cwd() == away
    os.chdir(place)
    assert run_state("runs/cut").state == "finished"
    ours, theirs = (
        (saved_steps(f"runs/{name}")[5] / "model.safetensors").read_bytes()
        for name in ("cut", "whole")
    )
    assert ours == theirs
    saved = json.loads(Path("runs/cut/config.json").read_bytes())["config"]["run"]["dir"]
    assert saved == "runs/cut"


def test_a_finished_run_goes_on_with_more_steps_and_in_a_new_place(place, capsys):
    assert main(["train", "grpo", *GRPO, "--reward=slow.py:f", "--steps=1", "--run.dir=one"]) == 0
    Path("one").rename("moved")
    assert main(["resume", "moved", "--steps", "2"]) == 0
    said = capsys.readouterr().err
    assert "continuing after step 1 of 2" in said
    assert run_state("moved").step == 2
    assert not Path("one").exists()
    assert main(["resume", "moved", "--steps", "1"]) == 0
    assert "finished already, at step 2" in capsys.readouterr().err
    (row,) = listed(capsys, "moved")
    assert (row["state"], row["step"], row["total"]) == ("finished", 2, 2)
    wrong = {"state": 5, "total": "x", "devices": "two", "working_directory": 7, "best": "no"}
    Path("moved/status.json").write_text(json.dumps(wrong))
    assert main(["resume", "moved"]) == 0
    assert main(["resume", "moved", "--optim.lr", "1"]) == 2
    assert "optim.lr" in capsys.readouterr().err
    assert main(["resume", "moved", "--stps", "3"]) == 2
    assert "did you mean --steps?" in capsys.readouterr().err


@pytest.mark.full
def test_a_run_of_two_devices_is_resumed_on_two(place, capfd):
    options = ["sft", *SFT, "--epochs=2", "--run.save_every=1", "--devices", "2"]
    assert main(["train", *options, "--run.dir=whole"]) == 0
    assert main(["train", *options, "--run.dir=cut"]) == 0
    assert read_status(Path("cut"))["devices"] == 2
    last = max(saved_steps("cut"))
    for path in (saved_steps("cut")[last], Path("cut/model")):
        subprocess.run(["rm", "-r", str(path)], check=True)
    assert main(["resume", "cut"]) == 0
    assert "2 ranks" in capfd.readouterr().err or read_status(Path("cut"))["devices"] == 2
    ours, theirs = (
        (saved_steps(name)[last] / "model.safetensors").read_bytes() for name in ("cut", "whole")
    )
    assert ours == theirs


def test_torchrun_resumes_on_the_processes_that_it_starts(place, monkeypatch):
    """And does not start as many again within each."""
    assert main(["train", "sft", *SFT, "--run.dir=cut"]) == 0
    status = json.loads(Path("cut/status.json").read_text())
    Path("cut/status.json").write_text(json.dumps(status | {"devices": 2}))
    assert "--devices=2" in resumed(["cut"])[2]
    assert "--devices=2" not in resumed(["cut", "--devices", "1"])[2]
    monkeypatch.setattr(torch.distributed, "is_torchelastic_launched", lambda: True)
    assert not [word for word in resumed(["cut"])[2] if word.startswith("--devices")]


@pytest.mark.full
def test_a_run_under_torchrun_goes_on_under_torchrun_and_without(place):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--standalone", "-m", "fusedrl"]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }

    def call(*argv: str) -> str:
        done = subprocess.run([*argv], env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stderr

    options = [*SFT, "--epochs=1", "--run.dir=cut", "--run.save_every=1", "--device=cpu"]
    said = call(*command, "train", "sft", *options)
    assert "go on with: fusedrl resume cut\n" in said
    for program in (command, [sys.executable, "-m", "fusedrl"]):
        shutil.rmtree("cut/model")
        shutil.rmtree(saved_steps("cut")[3])
        said = call(*program, "resume", "cut", "--run.keep", "9")
        assert "continuing after step 2 of 3" in said
        assert read_status(Path("cut"))["devices"] == 2
        assert Path("cut/model").is_dir()


def test_a_run_without_a_checkpoint_is_not_said_to_go_on(place, capsys):
    assert main(["train", "sft", *SFT, "--run.dir=runs/cut"]) == 0
    shutil.rmtree("runs/cut/model")
    Path("runs/cut/status.json").unlink()
    (row,) = listed(capsys)
    assert (row["state"], row["next"]) == ("interrupted", "fusedrl resume runs/cut")
    shutil.rmtree("runs/cut/checkpoints")
    (row,) = listed(capsys)
    assert (row["next"], row["resumes"]) == ("fusedrl report runs/cut", False)
    assert main(["runs"]) == 0
    assert "no checkpoint" in capsys.readouterr().out
    assert main(["resume", "runs/cut"]) == 2


@pytest.mark.parametrize(
    "argv, said",
    [
        (["resume", "nowhere"], "nowhere does not exist"),
        (["resume", "model"], "and not of a run"),
        (["resume", "--steps", "3"], "such as fusedrl resume runs/grpo"),
        (["resume", "."], "has no config.json of one"),
        (["runs", "nowhere"], "nowhere does not exist"),
    ],
)
def test_what_is_no_run_is_told(argv, said, place, capsys):
    assert main(argv) == 2
    assert said in capsys.readouterr().err


def test_a_torn_configuration_is_no_run(place, capsys):
    Path("torn").mkdir()
    Path("torn/config.json").write_text('{"stage": "SFTConfig", "config": ')
    assert find_runs(".") == []
    assert main(["resume", "torn"]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_looking_takes_no_lock(tmp_path):
    assert not is_locked(tmp_path)
    with RunLock(tmp_path):
        assert is_locked(tmp_path)
    assert not is_locked(tmp_path)
    with RunLock(tmp_path):
        pass


# ---- help ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "kto", "rejection", "ppo", "grpo"])
def test_help_is_a_screen_and_help_all_has_every_option(stage, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["train", stage, "--help"]) == 0
    short = capsys.readouterr().out
    assert len(short.splitlines()) <= 62
    assert all(f"--{name} " in short for name in ("model", "data", "optim.lr", "lora.rank"))
    assert f"fusedrl train {stage} --model" in short
    assert ("--critic.model" in short) == (stage == "ppo")
    assert "--optim.betas" not in short
    assert main(["train", stage, "--help-all"]) == 0
    whole = capsys.readouterr().out
    assert "--optim.betas" in whole
    assert len(whole.splitlines()) > len(short.splitlines())


def test_the_examples_of_help_parse():
    for stage in ("sft", "reward", "dpo", "kto", "rejection", "ppo", "grpo"):
        from fusedrl.engine.cli.help import example

        words = shlex.split(example(stage, STAGES[stage][0]))
        assert words[:3] == ["fusedrl", "train", stage]
        assert parse_config(stage, words[3:]).run.dir == f"runs/{stage}"


@pytest.mark.parametrize(
    "argv, command",
    [
        (
            ["sft", "--data", "my file.jsonl"],
            "fusedrl train sft --data 'my file.jsonl' --model HuggingFaceTB/SmolLM2-135M-Instruct "
            "--run.dir runs/sft",
        ),
        (
            ["grpo", "--model=m", "--run.dir", "x"],
            "fusedrl train grpo --model=m --run.dir x --data prompts.jsonl --reward "
            "my_rewards.py:helpful",
        ),
    ],
)
def test_a_missing_option_is_answered_with_a_whole_command(argv, command, capsys):
    assert main(["train", *argv]) == 2
    said = capsys.readouterr().err
    assert f"such as: {command} (fusedrl init {argv[0]}" in said
    assert main(["plan", "sft"]) == 2
    assert "such as" not in capsys.readouterr().err


def test_a_reward_given_anew_is_looked_for_where_the_command_is(place, capsys):
    options = ["grpo", *GRPO, "--reward=slow.py:f", "--steps=1", "--run.dir=runs/one"]
    assert main(["train", *options]) == 0
    away = place / "away"
    away.mkdir()
    (away / "other.py").write_text(
        "def g(completions, **_):\n    return [0.5] * len(completions)\n"
    )
    os.chdir(away)
    assert main(["resume", "../runs/one", "--reward", "other.py:g", "--steps=2"]) == 2
    said = capsys.readouterr().err
    assert "does not exist" not in said
    assert f"{away / 'other.py'}:g" in said  # another reward is a change, which is refused
    accept = ["--run.accept_changes=true", "--reward=other.py:g", "--steps=2"]
    assert main(["resume", "../runs/one", *accept]) == 0, capsys.readouterr().err
    assert list(read_rows(place / "runs/one/metrics.jsonl"))[-1]["reward"] == 0.5
    # the same file by a name that holds in both places
    os.chdir(place)
    again = ["--run.accept_changes=true", "--reward=slow.py:f", "--steps=3"]
    assert main(["resume", "runs/one", *again]) == 0, capsys.readouterr().err
    saved = json.loads((place / "runs/one/config.json").read_text())
    assert saved["config"]["reward"] == ["slow.py:f"]
