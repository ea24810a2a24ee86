"""make first-light: every step is a line whatever becomes of it, from a checkout that nobody
installed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from bench import first_light
from bench.first_light import Step

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def few_steps(monkeypatch, tmp_path):
    """A part of steps that end in every way; returns (exit code, what was found, what was printed
    by the steps)."""

    def go(*steps: Step, minutes: float = 8.0):
        monkeypatch.setattr(first_light, "steps", lambda part, device, scratch: iter(steps))
        options = ["--device", "cpu", "--out", str(tmp_path / "out"), "--minutes", str(minutes)]
        monkeypatch.setattr(sys, "argv", ["first_light.py", "truth", *options])
        code = first_light.main()
        return (
            code,
            json.loads((tmp_path / "out/truth.json").read_text()),
            (tmp_path / "out/truth.txt").read_text(),
        )

    return go


def test_a_step_that_fails_or_hangs_is_a_line_and_the_next_one_begins(few_steps, tmp_path):
    written = tmp_path / "written.json"
    half, whole = (
        ("-c", f"print('aloud'); open({str(written)!r}, 'w').write({content!r})")
        for content in ("[1", "[1]")
    )
    code, found, text = few_steps(
        Step("fails", ("-c", "raise SystemExit(7)"), 60),
        Step("lacks", (), 300, lacking="no such tool"),
        Step("half", half, 60, json=written),
        Step("speaks", whole, 60, json=written),
        Step("hangs", ("-c", "import time; time.sleep(600)"), 60),
        minutes=0.5,
    )
    assert code == 1
    assert {name: step["state"] for name, step in found.items()} == {
        "fails": "exit status 7",
        "hangs": found["hangs"]["state"],
        "lacks": "skipped",
        "half": "ok, half a file",
        "speaks": "ok",
    }
    assert found["lacks"]["why"] == "no such tool"
    assert found["speaks"]["found"] == [1]
    assert "==== speaks\naloud" in text
    assert found["hangs"]["state"].startswith("stopped after")
    assert found["hangs"]["seconds"] < 40, "it may use what the others left, and no more"


def test_a_slow_step_cannot_take_the_seconds_of_the_next(few_steps):
    code, found, _ = few_steps(
        Step("slow", ("-c", "import time; time.sleep(600)"), 40),
        Step("next", ("-c", "print('done')"), 440),
        minutes=0.25,
    )
    assert code == 1
    assert found["slow"]["state"] == "stopped after 1 s"
    assert found["next"]["state"] == "ok"


def test_the_minutes_of_a_part_are_a_number_above_0(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["first_light.py", "truth", "--minutes", "0"])
    with pytest.raises(SystemExit) as ended:
        first_light.main()
    assert ended.value.code == 2
    assert "expected --minutes above 0, got 0" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["truth", "engine", "kernels"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_steps_have_names_and_ask_for_what_is_there(part, device, tmp_path):
    steps = list(first_light.steps(part, device, tmp_path))
    assert len({step.name for step in steps}) == len(steps) > 5
    assert sum(step.most for step in steps) <= first_light.SECONDS, "each has what it is kept"
    for step in steps:
        assert step.most > 0
        for word in step.command:
            if word.startswith(("tests/", "bench/")):
                assert (ROOT / word).is_file(), word


def test_the_checkout_is_the_package():
    """Without site-packages: neither an installation nor torch."""
    program = (
        "import importlib.util as u; print(*(u.find_spec(f'fusedrl.{name}').origin for name "
        "in ('kernels.gae', 'kernels.attention')))"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", program],
        env=first_light.environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert [Path(path).resolve() for path in done.stdout.split()] == [
        ROOT / "kernels" / name / "__init__.py" for name in ("gae", "attention")
    ]


def test_the_first_contest_of_a_file():
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "--collect-only",
        "--first",
        "1",
        "bench/bench_gae.py",
        "bench/bench_rope.py",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert [line.split("::")[0] for line in done.stdout.splitlines() if "::" in line] == [
        "bench/bench_gae.py",
        "bench/bench_rope.py",
    ]
