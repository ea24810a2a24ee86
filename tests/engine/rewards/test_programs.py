"""The reward `code`: programs that are right, wrong, endless, greedy, or leave things behind."""

import time
from pathlib import Path

import pytest

from fusedrl.engine.base.errors import RewardError
from fusedrl.engine.rewards.programs import code, program_of, run_program
from fusedrl.engine.rewards.rewards import RewardSet, load_reward

pytestmark = pytest.mark.cpu_only("processes")

LIMITS = {"seconds": 1.0, "memory": 512 << 20}


def test_tests_in_python_are_run_behind_the_program():
    said = [
        "Here:\n```python\ndef f(x):\n    return x + 1\n```\nDone.",
        "def f(x): return x + 2",
        "```\ndef f(x):\n    return x + 1",  # cut off before the block closed
        "```bash\nls\n```",
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "def f(x): return x + 1\n'''",
        "not Python",
        "",
    ]
    tests = ["assert f(1) == 2"] * len(said)
    assert code(said, tests=tests) == [1, 0, 1, 0, 0, 0, 0, 0, 0]
    assert code(["x = 1"], tests=[None]) == [None]
    # MBPP's column, several of them, and a share
    many = [["assert f(1) == 2", "assert f(2) == 9"]]
    assert code(said[:1], test_list=many) == [0.0]
    assert code(said[:1], test_list=many, partial_credit=True) == [0.5]


def test_what_a_program_reads_and_prints():
    cases = [{"input": "2\n", "output": "4 \n"}, {"input": "3", "output": "6\n\n"}]
    good, bad = "print(int(input()) * 2)", "print(int(input()) ** 2)"
    assert code([good, bad], tests=[cases, cases]) == [1.0, 0.0]
    assert code([bad], tests=[cases], partial_credit=True) == [0.5]
    emoji = [{"output": "\U0001f600 \u05e9\u05dc\u05d5\u05dd"}]
    assert code(["print('\U0001f600 \u05e9\u05dc\u05d5\u05dd')"], tests=[emoji]) == [1.0]


def test_the_last_block_that_may_be_python():
    assert program_of("```py\na\n```\n```json\n{}\n```") == "a\n"
    assert program_of("```\na\n```\n```python\nb\n```") == "b\n"
    assert program_of("<think>```\na\n```</think>b") == "b"


@pytest.mark.parametrize(
    "program, code, ended",
    [
        ("import time; time.sleep(60)", -9, "time"),
        ("while True: pass", -9, "time"),
        ("while True: print('x' * 100000)", -9, "output"),
        ("import sys\nwhile True: sys.stderr.write('x' * 100000)", -9, "output"),
        ("x = bytearray(2 << 30)", 1, "itself"),
        ("f = open('x', 'wb')\nfor i in range(99): f.write(bytes(1 << 20))", 1, "itself"),
        ("import signal\nsignal.pthread_sigmask(0, range(1, 65))\nwhile True: pass", -9, "time"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", -11, "itself"),
        ("import os; os.close(1); os.close(2); os.close(0)", 0, "itself"),
        ("def f(): f()\nf()", 1, "itself"),
    ],
)
def test_limits(program, code, ended):
    began = time.monotonic()
    # who ends itself has time for it on a busy machine
    seconds = {"seconds": 8.0} if ended == "itself" else {}
    ran = run_program(program, "", **LIMITS | seconds)
    assert (ran.code, ran.ended) == (code, ended), ran.stderr[-300:]
    assert time.monotonic() - began < 20
    assert len(ran.stdout) + len(ran.stderr) < 2 << 20


def _alive(word: str) -> list[str]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            said = entry.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if word in said:
            found.append(said)
    return found


@pytest.mark.parametrize(
    "program",
    [
        # processes that leave the group, whose parent is gone
        "import os, sys\nfor _ in range(8):\n    if not os.fork():\n        os.setsid()\n"
        "        os.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(60)', "
        "'WORD'])\nprint('done')",
        # a bomb
        "import os, sys\nsys.argv.append('WORD')\nwhile True:\n    try: os.fork()\n"
        "    except OSError: pass",
    ],
    ids=["orphans", "bomb"],
)
def test_no_process_is_left(program, tmp_path):
    word = f"left-{tmp_path.name}"
    ran = run_program(program.replace("WORD", word), "", **LIMITS)
    assert ran.ended in ("itself", "time")
    assert not _alive(word)


def test_a_program_sees_no_environment_and_an_empty_directory(monkeypatch):
    monkeypatch.setenv("SECRET_KEY", "s3cret")
    ran = run_program(
        "import os; print(os.listdir(), 's3cret' in str(os.environ), os.getcwd())", "", **LIMITS
    )
    listed, secret, where = ran.stdout.split()
    assert (listed, secret) == ("['program.py']", "False")
    assert not Path(where).exists()


def test_columns_that_hold_no_tests():
    for wrong in (3, [], [1], [{"input": "1"}], [{"output": 2}], ["a", {"output": "b"}]):
        with pytest.raises(RewardError, match="expected tests to be Python, a list of Python"):
            code(["x"], tests=[wrong])
    with pytest.raises(RewardError, match="one of the columns tests, test_list, test"):
        code(["x"], gold=["1"])
    with pytest.raises(RewardError, match="seconds > 0"):
        code(["x"], tests=["1"], seconds=0)


def test_by_its_name():
    rewards = RewardSet([load_reward("code:seconds=2,jobs=2")])
    found = rewards.score(
        ["p"] * 2, ["f = 1", "f = 2"], [[1]] * 2, [[1]] * 2, {"tests": ["assert f == 1"] * 2}
    )
    assert found.total == [1.0, 0.0]
