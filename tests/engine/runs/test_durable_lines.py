"""Files of lines are never behind a checkpoint: they are on the disk before it has its name, and a
resumed run says where they are not."""

import json
import os
import re
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

from fusedrl.engine.config import GenerationConfig, PolicyConfig, RunConfig, SFTConfig
from fusedrl.engine.runs.checkpoint import latest_checkpoint
from fusedrl.engine.stages.policy import train_policy
from fusedrl.engine.stages.sft import train_sft

pytestmark = pytest.mark.cpu_only("files")
ROWS = [{"prompt": f"w{i}", "completion": f"w{i + 1}"} for i in range(8)]


@pytest.fixture
def sft(tiny_model, tmp_path, write_jsonl):
    return SFTConfig(
        model=str(tiny_model),
        data=write_jsonl("d.jsonl", ROWS),
        sequences_per_step=2,
        run=RunConfig(dir=str(tmp_path / "run"), save_every=2, progress=False),
    )


def test_lines_are_on_the_disk_before_the_checkpoint_that_follows_them(
    tiny_model, tmp_path, write_jsonl, monkeypatch
):
    """A power loss keeps what was flushed, and here that alone: of every file as much as it had at
    its last fsync."""
    (tmp_path / "r.py").write_text(
        "def f(completions, **_):\n    return [1.0] * len(completions)\n"
    )
    config = PolicyConfig(
        model=str(tiny_model),
        data=write_jsonl("d.jsonl", ROWS),
        reward=(f"{tmp_path / 'r.py'}:f",),
        algorithm="rloo",
        samples_per_prompt=2,
        prompts_per_step=2,
        steps=3,
        generation=GenerationConfig(max_new_tokens=3),
        run=RunConfig(dir=str(tmp_path / "run"), save_every=1, progress=False),
    )
    flushed: dict[str, bytes] = {}
    seen = []
    fsync, rename = os.fsync, os.rename

    def note(descriptor):
        fsync(descriptor)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.is_file():
            flushed[path.name] = path.read_bytes()

    def named(old, new):
        if match := re.fullmatch(r"step_(\d+)", Path(new).name):
            for name in ("metrics.jsonl", "samples.jsonl"):
                steps = [json.loads(line)["step"] for line in flushed[name].splitlines()]
                seen.append((name, int(match[1]), max(steps)))
        rename(old, new)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "rename", named)
    train_policy(config)
    assert seen == [
        (name, step, step) for step in (1, 2, 3) for name in ("metrics.jsonl", "samples.jsonl")
    ]
    kept = latest_checkpoint(config.run.dir).state["lines"]
    assert kept["metrics.jsonl"] == {"lines": 3, "last": 3}
    assert kept["samples.jsonl"]["last"] == 3


@pytest.mark.parametrize(
    ("lose", "said"),
    [
        (lambda lines: lines[:-1], "expected 4 lines up to step 4.*got 3 up to step 3"),
        (lambda lines: [lines[0], *lines[2:]], "expected 4 lines up to step 4.*got 3 up to step 4"),
        (lambda lines: [], "expected 4 lines up to step 4.*got 0 up to step -1"),
        (lambda lines: lines, None),
        (lambda lines: [*lines, '{"step": 5, "lo'], None),
    ],
    ids=["the last", "one between", "all", "none", "a torn one more"],
)
def test_a_resumed_run_says_which_lines_were_lost(sft, lose, said, capsys):
    train_sft(sft)
    path = Path(sft.run.dir) / "metrics.jsonl"
    path.write_text("".join(f"{line}\n" for line in lose(path.read_text().splitlines())))
    again = replace(sft, run=replace(sft.run, resume=True))
    capsys.readouterr()
    train_sft(again)
    told = capsys.readouterr().err
    assert (said is not None) == ("they were lost or edited since" in told)
    assert said is None or re.search(rf"metrics\.jsonl: {said}", told), told


def test_checkpoints_of_older_versions_have_no_lines(sft, capsys):
    train_sft(sft)
    path = latest_checkpoint(sft.run.dir).path
    state = json.loads((path / "state.json").read_text())
    del state["lines"]
    text = json.dumps(state).encode()
    (path / "state.json").write_bytes(text)
    manifest = json.loads((path / "MANIFEST.json").read_text())
    manifest["files"]["state.json"] = {"bytes": len(text), "sha256": sha256(text).hexdigest()}
    (path / "MANIFEST.json").write_text(json.dumps(manifest))
    train_sft(replace(sft, run=replace(sft.run, resume=True)))
    assert "lost or edited" not in capsys.readouterr().err
