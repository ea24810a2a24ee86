"""Metrics: valid JSON always, resume without duplicates or gaps."""

import json
import math
import time

import pytest
import torch

from fusedrl.engine.runs.metrics import JsonLines, Metrics


def _read(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_one_line_per_step_readable_at_once(tmp_path):
    with Metrics(tmp_path) as metrics:
        assert metrics.log(1, {"loss": 2, "kl": torch.tensor(0.5)}) == {"loss": 2.0, "kl": 0.5}
        assert _read(tmp_path) == [{"step": 1, "loss": 2.0, "kl": 0.5}]
        metrics.log(2, {"loss": math.nan, "kl": math.inf, "entropy": -math.inf})
    assert (
        (tmp_path / "metrics.jsonl")
        .read_text()
        .endswith('{"step": 2, "loss": null, "kl": null, "entropy": null}\n')
    )


def test_timings_add_up_and_start_over(tmp_path):
    with Metrics(tmp_path) as metrics:
        for _ in range(2):
            with metrics.time("generate"):
                time.sleep(0.01)
        with pytest.raises(KeyError), metrics.time("train"):
            raise KeyError
        record = metrics.log(1, {})
        assert record.keys() == {"timing/generate", "timing/train"}
        assert record["timing/generate"] >= 0.02
        assert metrics.log(2, {}) == {}
    assert _read(tmp_path)[0]["timing/generate"] == record["timing/generate"]


def test_a_new_run_starts_afresh(tmp_path):
    for _ in range(2):
        with Metrics(tmp_path) as metrics:
            metrics.log(1, {"loss": 1})
            assert metrics.last() == {}
    assert len(_read(tmp_path)) == 1


@pytest.mark.parametrize(
    "torn",
    [b"", b'{"step": 4, "lo', b'{"step": 3}', b"\x00\x00", b'{"step": 9}\n', b'{"step": 2}\n{"st'],
)
@pytest.mark.parametrize("step", [0, 1, 2, 3])
def test_resume_neither_repeats_nor_skips_a_step(tmp_path, torn, step):
    with Metrics(tmp_path) as metrics:
        for done in (1, 2, 3):
            metrics.log(done, {"loss": done, "bad": math.nan})
    if torn == b'{"step": 2}\n{"st':  # a whole line of an earlier step is kept as it is
        torn = b'{"st'
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(torn)
    with Metrics(tmp_path, resume_step=step) as metrics:
        assert metrics.last() == pytest.approx(
            {"loss": step, "bad": math.nan} if step else {}, nan_ok=True
        )
        for done in range(step + 1, 6):
            metrics.log(done, {"loss": done, "bad": 0})
    assert [(row["step"], row["loss"]) for row in _read(tmp_path)] == [
        (1, 1),
        (2, 2),
        (3, 3),
        (4, 4),
        (5, 5),
    ]


def test_resume_without_a_file(tmp_path):
    with Metrics(tmp_path / "run", resume_step=7) as metrics:
        metrics.log(8, {"loss": 1})
    assert [row["step"] for row in _read(tmp_path / "run")] == [8]


def test_json_lines_refuse_what_json_has_not(tmp_path):
    with JsonLines(tmp_path / "samples.jsonl") as lines:
        with pytest.raises(ValueError):
            lines.append({"step": 1, "score": math.nan})
        lines.append({"step": 1, "text": "a\nb\u2028€"})
    with JsonLines(tmp_path / "samples.jsonl", resume_step=1) as lines:
        assert lines.last == {"step": 1, "text": "a\nb\u2028€"}


def test_what_was_written_up_to_a_step(tmp_path):
    with JsonLines(tmp_path / "x.jsonl") as lines:
        assert lines.written(5) == {"lines": 0, "last": -1}
        for step in (0, 1, 1, 3):
            lines.append({"step": step})
        assert lines.sync(1) == {"lines": 3, "last": 1}
        assert lines.sync(2) == {"lines": 3, "last": 1}
        assert lines.written(9) == {"lines": 4, "last": 3}
    with JsonLines(tmp_path / "x.jsonl", resume_step=1) as lines:
        assert lines.written(9) == {"lines": 3, "last": 1}


@pytest.mark.parametrize(
    "line",
    ['{"step": 1.5}', '{"step": true, "a": 1', '{"step": "1"}', '{"step": 1e999}', "[" * 9999],
)
def test_lines_of_others_are_no_steps(tmp_path, line):
    (tmp_path / "x.jsonl").write_text('{"step": 1}\n' + line + "\n")
    with JsonLines(tmp_path / "x.jsonl", resume_step=4) as lines:
        assert lines.written(4) == {"lines": 1, "last": 1}
