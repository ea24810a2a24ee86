"""The exit code of a process to which a signal comes before its command has begun or after it has
ended."""

import os
import signal
import subprocess
import sys

import pytest

pytestmark = pytest.mark.cpu_only("processes")
# Python runs this first. It sends the signal to its own process at a moment that a name stands for.
SENDS = """
import atexit, os, signal, sys

number, moment = int(os.environ["SENT"]), os.environ["MOMENT"]

def send():
    os.kill(os.getpid(), number)

class Sends:
    def find_spec(self, name, path=None, target=None):
        if name == moment:
            sys.meta_path.remove(self)
            send()

def exit(code, leave=sys.exit):
    if moment == "its exit":
        send()
        while True:
            pass
    leave(code)

sys.meta_path.insert(0, Sends())
sys.exit = exit
if moment == "the end of Python":
    atexit.register(send)
"""
NUMBERS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


def sent(directory, moment, number, *words, to=signal.SIG_DFL):
    """Exit code of a command to which the signal comes at that moment, and what it said. `to` is
    what the process does by default on such a signal."""
    (directory / "sitecustomize.py").write_text(SENDS)
    path = os.pathsep.join([str(directory), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-m", "fusedrl", *map(str, words)],
        env=os.environ | {"PYTHONPATH": path, "SENT": str(int(number)), "MOMENT": moment},
        preexec_fn=lambda: signal.signal(number, to),
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        *(("fusedrl.engine.cli.main", number) for number in NUMBERS),
        ("torch.nn.functional", signal.SIGINT),
    ],
)
def test_while_modules_are_imported(tmp_path, tiny_model, moment, number):
    """The command's own, and one of those that abort where an exception comes into an import."""
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "w1", "completion": "w2"}\n')
    words = ["train", "sft", "--model", tiny_model, "--data", data, "--run.dir", tmp_path / "run"]
    code, said = sent(tmp_path, moment, number, *words)
    assert code == 128 + number, said
    assert said in ("", "fusedrl: interrupted\n")


@pytest.mark.parametrize("number", [*NUMBERS, signal.SIGUSR1])
@pytest.mark.parametrize("moment", ["its exit", "the end of Python"])
def test_a_code_that_is_certain_stays(tmp_path, moment, number):
    assert sent(tmp_path, moment, number, "runs", str(tmp_path)) == (0, "")
    code, said = sent(tmp_path, moment, number, "train", "nonsense")
    assert code == 2
    assert said.startswith("fusedrl: error: train: unknown stage")
    assert said.count("\n") == 1


def test_a_signal_that_was_ignored_stays_ignored(tmp_path):
    """As nohup leaves SIGHUP."""
    moment, words = "fusedrl.engine.cli.main", ["runs", str(tmp_path)]
    assert sent(tmp_path, moment, signal.SIGHUP, *words, to=signal.SIG_IGN) == (0, "")
