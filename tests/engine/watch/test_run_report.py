"""fusedrl samples and fusedrl report on a run directory."""

import json

import pytest
from tests.support.runs import write_lines

from fusedrl.engine.cli.main import main
from fusedrl.engine.watch.run_report import spread


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    directory = tmp_path / "run"
    directory.mkdir()
    metrics = [
        {"step": 0, "eval_reward": 0.125},
        *(
            {
                "step": step,
                "reward": step / 8,
                "kl": None if step == 2 else 2.0 * step,
                "gold/g/mean": -step,
                "odd": 7.7,
            }
            for step in range(1, 6)
        ),
    ]
    (directory / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in metrics) + '{"step": 6, "rew'
    )
    evidence = [
        {"metric": "reward", "kind": "proxy", "then": 0.1, "now": 0.9, "sigma": 8.0},
        {"metric": "gold/g/mean", "kind": "gold", "then": 1.0, "now": 0.2, "sigma": -6.5},
    ]
    (directory / "alarms.jsonl").write_text(json.dumps({"step": 4, "evidence": evidence}) + "\n")
    samples = [
        {
            "step": step,
            "prompt": prompt,
            "completion": f" text [{step}] of {name}",
            "scores": {"reward": step / 2, "gold/g": None},
        }
        for step in (0, 2, 4, 6, 8)
        for name, prompt in (("p", "Once"), ("m", [{"role": "user", "content": "Tell me"}]))
    ]
    (directory / "samples_eval.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in samples)
    )
    return directory


def test_samples_over_time(run, capsys):
    assert main(["samples", str(run), "--columns", "3"]) == 0
    shown = capsys.readouterr().out
    for part in (
        "step 0",
        "step 4",
        "step 8",
        "Once",
        "Tell me",
        "text [8] of m",
        "reward 4, gold/g invalid",
    ):
        assert part in shown
    assert "step 2" not in shown
    assert main(["samples", str(run), "--columns", "1"]) == 0
    assert "step 8" in (shown := capsys.readouterr().out)
    assert "step 0" not in shown


def test_report(run, capsys):
    assert main(["report", str(run)]) == 0
    shown = capsys.readouterr().out
    rows = {
        line.split()[0]: line.split()[1:]
        for line in shown.splitlines()
        if line.startswith("  ") and len(line.split()) in (6, 7)
    }
    assert rows["reward"] == ["0.125", "0.375", "0.625", "0.125", "0.625"]
    assert rows["kl"] == ["2", "8", "10", "2", "10", "nats"]
    assert rows["eval_reward"] == ["0.125"] * 5
    assert "odd" not in rows
    text = " ".join(shown.split())
    assert (
        "reward hacking suspected at step 4: the trained reward rose from 0.1 to 0.9 (8.0 standard "
        "errors) while gold/g/mean fell from 1 to 0.2" in text
    )


def test_completions_do_not_steer_the_terminal_and_are_cut(run, capsys):
    rows = [
        {
            "step": 1,
            "prompt": "\x1b]0;title\x07",
            "completion": f"A\x1b[2J\x9b31m\u202eD{'x' * 50_000}",
            "scores": {"reward": 1.0},
        }
    ]
    write_lines(run / "samples_eval.jsonl", rows)
    assert main(["samples", str(run)]) == 0
    shown = capsys.readouterr().out
    assert not set("\x1b\x07\x9b\u202e") & set(shown)
    assert "<U+202E>" in shown.replace("\n", "")
    assert len(shown) < 20_000
    assert main(["samples", str(run)]) == 0
    (run / "samples_eval.jsonl").write_text("no json\n")
    assert main(["samples", str(run)]) == 2
    assert "1 line is not readable" in capsys.readouterr().err


def test_a_page_or_a_report_writes_over_nothing_else(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewards.py").write_text("def f(): pass\n")
    (tmp_path / "data.jsonl").write_text('{"prompt": "w1"}\n' * 3)
    for command in (
        ["report", str(run), "--html", "rewards.py"],
        ["watch", str(run), "--html", "rewards.py"],
        ["report", str(run), "--json", "rewards.py"],
        ["report", str(run), "--json", "data.jsonl"],  # which begins as a report does
    ):
        assert main(command) == 2
        assert "it would be lost" in capsys.readouterr().err
    assert (tmp_path / "rewards.py").read_text() == "def f(): pass\n"
    for option, name in (("--html", "page.html"), ("--json", "report.json")):
        for _ in range(2):  # its own file is replaced
            assert main(["report", str(run), option, name]) == 0
    assert main(["report", str(run), "--compare"]) == 2
    assert "two runs or more" in capsys.readouterr().err


def test_runs_that_are_not_there(run, tmp_path, capsys):
    (run / "samples_eval.jsonl").unlink()
    for command, message in (
        (["samples", str(run)], "train with --evaluation.data FILE"),
        (["report", str(tmp_path / "no")], "no does not exist"),
        (["samples", str(tmp_path / "no")], "no does not exist"),
    ):
        assert main(command) == 2
        assert message in capsys.readouterr().err


def test_spread():
    assert spread([0, 1, 2, 3, 4, 5, 6], 3) == [0, 3, 6]
    assert spread([0, 1, 2], 4) == [0, 1, 2]
    assert spread([0, 1, 2], 2) == [0, 2]
    assert spread([0, 1, 2], 1) == [2]
    assert spread([], 3) == []
