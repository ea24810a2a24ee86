"""Completions of many prompts in a file: whole, interrupted, and gone on with."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from tests.support.ranks import ROOT
from tests.support.talkers import write_talker

from fusedrl.engine.cli.main import main

pytestmark = pytest.mark.cpu_only("bits of a CPU")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_talker(tmp_path_factory.mktemp("talker"))


def told(capsys, *argv):
    code = main(["generate", *map(str, argv)])
    said = capsys.readouterr()
    return code, said.out, said.err


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def asked(model, write_jsonl, tmp_path):
    rows = [
        {"prompt": "hi", "gold": "2"},
        {"prompt": [{"role": "user", "content": "\u05e9 \U0001f600"}], "gold": None},
        {"prompt": "hi", "gold": "3"},
    ]
    return [
        "--model", model, "--data", write_jsonl("prompts.jsonl", rows),
        "--output", tmp_path / "out.jsonl", "--n", 2, "--max_new_tokens", 10,
    ]  # fmt: skip


def test_a_row_for_each_completion(asked, tmp_path, capsys):
    code, out, err = told(capsys, *asked, "--logprobs")
    assert code == 0, err
    assert "out.jsonl: 6 completions of 3 prompts; " in out
    rows = rows_of(tmp_path / "out.jsonl")
    assert [(row["index"], row["sample"]) for row in rows] == [
        (i, s) for i in range(3) for s in range(2)
    ]
    for row in rows:
        assert row["completion_tokens"] == len(row["completion_ids"]) == len(row["logprobs"]) <= 10
        assert all(logp <= 0 for logp in row["logprobs"])
        assert row["finish_reason"] in ("stop", "length")
    assert rows[0]["prompt_tokens"] == 2
    assert (rows[0]["gold"], rows[2]["gold"]) == ("2", None)
    assert rows[2]["completion"][0]["role"] == "assistant"
    assert rows[0]["completion"] != rows[4]["completion"]  # a prompt twice, with draws of its own
    assert not list(tmp_path.glob("out.jsonl.*"))
    # what comes out goes in: a reward is tried on it
    assert main(["reward-check", "exact_match", "--data", str(tmp_path / "out.jsonl")]) == 0


def test_what_is_there_is_not_overwritten(asked, tmp_path, capsys):
    (tmp_path / "out.jsonl").write_text("mine\n")
    code, _, err = told(capsys, *asked)
    assert (code, "exists; name another file" in err) == (2, True)
    assert (tmp_path / "out.jsonl").read_text() == "mine\n"


@pytest.mark.parametrize("cut", [0, 30, 300, 700, 1000, -1, -20])
def test_an_interrupted_file_goes_on_to_the_same_bytes(asked, tmp_path, capsys, cut):
    """Cut off anywhere: within the first line, a row, or behind one of two samples."""
    code, _, _ = told(capsys, *asked)
    assert code == 0
    out, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    whole = out.read_bytes()
    head = _first_line(asked, tmp_path, capsys)
    out.unlink(missing_ok=True)
    part.write_bytes((head + whole)[: cut if cut else None])
    code, said, err = told(capsys, *asked)
    assert code == 0, err
    assert out.read_bytes() == whole
    if cut == 0:
        assert "(3 were there); 0 tokens" in said.replace("; 0", "; 0")


def _first_line(asked, tmp_path, capsys):
    """The line that an unfinished file begins with, seen while another process would hold it."""
    part = tmp_path / "out.jsonl.part"
    (tmp_path / "out.jsonl").rename(tmp_path / "kept")
    part.write_bytes(b"{")
    from fusedrl.engine.rollout import to_file

    seen = []
    finished = to_file._finished

    def look(out, count):
        seen.append(part.read_bytes())
        return finished(out, count)

    to_file._finished = look
    try:
        assert told(capsys, *asked)[0] == 0
    finally:
        to_file._finished = finished
    return seen[0]


def test_other_settings_are_refused(asked, tmp_path, capsys):
    part = tmp_path / "out.jsonl.part"
    part.write_text('{"settings": {"seed": 5}}\n')
    code, _, err = told(capsys, *asked)
    assert code == 2
    assert "was begun with" in err
    part.write_text("a diary\n")
    code, _, err = told(capsys, *asked)
    assert (code, part.read_text()) == (2, "a diary\n")
    assert "was not written by this command" in err


def test_two_at_once_are_refused(asked, tmp_path, capsys):
    with open(tmp_path / "out.jsonl.part", "wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        code, _, err = told(capsys, *asked)
    assert (code, "another process is writing" in err) == (3, True)


def test_prompts_that_are_too_long_are_left_out_and_said(model, write_jsonl, tmp_path, capsys):
    data = write_jsonl("long.jsonl", [{"prompt": "x" * 600}, {"prompt": "hi"}])
    options = ["--model", model, "--data", data, "--output", tmp_path / "o", "--max_new_tokens", 9]
    code, out, _ = told(capsys, *options)
    assert code == 0
    assert "1 completions of 1 prompts; 1 prompts of more than 503 tokens were left out" in out
    assert [row["index"] for row in rows_of(tmp_path / "o")] == [1]
    data = write_jsonl("all.jsonl", [{"prompt": "x" * 600}])
    code, _, err = told(capsys, *options[:2], "--data", data, "--output", tmp_path / "p")
    assert (code, "all 1 prompts are longer than" in err) == (2, True)


def test_mistakes(model, write_jsonl, tmp_path, capsys):
    plain = write_talker(tmp_path / "plain", template=None)
    rows = [{"prompt": "a"}, {"prompt": [{"role": "user", "content": "b"}]}]
    talk = write_jsonl("talk.jsonl", rows)
    (tmp_path / "empty.jsonl").touch()
    out = ["--output", tmp_path / "o"]
    for argv, message in (
        (
            ["--model", plain, "--data", talk, *out],
            "prompt 2: the prompt is a list of messages",
        ),
        (["--model", model, "--data", tmp_path / "empty.jsonl", *out], "the file is empty"),
        (["--model", model, "--data", talk], "--data FILE together with --output FILE"),
        (["--model", model, "--prompt", "a", *out], "--data FILE together with --output FILE"),
        (["--model", model, "--prompt", "a", "--logprobs"], "--logprobs is for --data"),
        (["--model", model, "--prompt", "a", "--data", talk], "not allowed with"),
        (["--model", model], "--prompt"),
        (["--model", model, "--data", talk, "--output", tmp_path / "no/o"], "does not exist"),
        (["--model", model, "--data", talk, *out, "--max_new_tokens", 512], "--max_new_tokens"),
        (["--model", model, "--data", talk, *out, "--best_of", 2, "--reward", "x"], "--best_of is"),
    ):
        code, _, err = told(capsys, *argv)
        assert code == 2, (argv, err)
        assert message in err, err
    assert not (tmp_path / "o").exists()


@pytest.mark.full
def test_ctrl_c_says_how_to_go_on(model, write_jsonl, tmp_path):
    data = write_jsonl("many.jsonl", [{"prompt": f"p{i}"} for i in range(1500)])
    command = [
        *(sys.executable, "-m", "fusedrl.engine.cli", "generate", "--model", str(model)),
        *("--data", data, "--output", str(tmp_path / "o"), "--max_new_tokens", "60"),
    ]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    part, last = tmp_path / "o.part", time.monotonic() + 60
    while not (part.exists() and part.stat().st_size > 3000):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < last
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "the same command goes on" in err
    assert not (tmp_path / "o").exists()
    assert len(part.read_text().splitlines()) > 2
