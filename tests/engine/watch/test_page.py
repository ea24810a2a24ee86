"""The page of a run as a file: what it holds, whatever the run holds; the command line around it.
What a browser makes of it is in tests/engine/watch/test_page_in_browser.py."""

import json
import math
import re
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser

import numpy as np
import pytest
from tests.support.runs import CALIBRATION, metrics, samples, write_lines, write_run

from fusedrl.engine.cli.main import main
from fusedrl.engine.watch.page.charts import BUCKETS, MOST_POINTS, Points, charts, thin
from fusedrl.engine.watch.page.follow import follow
from fusedrl.engine.watch.page.page import HERE, duration, page
from fusedrl.engine.watch.page.texts import word_difference
from fusedrl.engine.watch.run_files import RunFiles, Series, open_runs

pytestmark = pytest.mark.cpu_only("files alone")


class Reader(HTMLParser):
    """The tags of a page, and the text of each kind of element."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "br", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, text):
        for tag in set(self.open):
            self.text.setdefault(tag, []).append(text)

    def of(self, tag: str) -> str:
        return "".join(self.text.get(tag, []))


def page_of(*directories) -> str:
    return page([files.read() for files in open_runs(directories)])


def data_of(html: str) -> dict:
    return json.loads(re.search(r'id="data">(.*?)</script>', html, re.DOTALL)[1])


# ---- what is on it -------------------------------------------------------------------------------
def test_the_page_of_a_run(tmp_path, capsys):
    run, file = write_run(tmp_path / "run"), tmp_path / "page.html"
    assert main(["report", str(run), "--html", str(file)]) == 0
    assert f"wrote {file}" in " ".join(capsys.readouterr().err.split())
    html = file.read_text(encoding="utf-8")
    found, data = Reader(html), data_of(html)
    assert found.open == []
    by_title = {chart["title"]: chart for chart in data["charts"]}
    for title in (
        "Reward",
        "Gold reward: g",
        "KL from the reference",
        "Entropy",
        "Length",
        "Policy loss",
        "Clip fraction",
        "Explained variance",
        "Largest difference",
        "Phases of a step",
        "Seconds of a step",
        "Peak memory",
        "some/other",
        "Calibration of run",
    ):
        assert by_title[title]["lines"], title
    reward, held = by_title["Reward"]["lines"]
    rows = [row for row in metrics(40) if "reward" in row]
    assert data["steps"][reward["x"]] == [row["step"] for row in rows]
    assert reward["y"] == pytest.approx([row["reward"] for row in rows], rel=1e-5)
    assert (held["held"], data["steps"][held["x"]]) == (True, [0, 10, 20, 30, 40])
    assert by_title["KL from the reference"]["targets"] == [{"run": 0, "value": 6.0}]
    assert data["runs"] == [{"name": "run", "alarms": [20]}]
    assert "reward hacking suspected at step 20" in html
    assert "kl.target" in found.of("code")
    assert found.of("ins") == "new wordsred "
    assert "The MIT License" in found.of("pre")
    assert "Thinned" not in html


def test_it_loads_nothing_and_lets_nothing_run(tmp_path):
    html = page_of(write_run(tmp_path))
    found = Reader(html)
    assert not [
        tag for tag, attrs in found.tags if {"src", "srcset", "style", "onclick"} & set(attrs)
    ]
    assert not [
        attrs["href"] for _, attrs in found.tags if not attrs.get("href", "#").startswith("#")
    ]
    policy = next(a["content"] for t, a in found.tags if t == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy


def test_several_runs_of_different_stages(tmp_path, capsys):
    write_run(tmp_path / "a" / "ppo")
    write_run(tmp_path / "b" / "ppo", seed=1, options={"optim": {"lr": 0.5}})
    sft = tmp_path / "sft"
    sft.mkdir()
    (sft / "config.json").write_text('{"stage": "SFTConfig", "config": {"epochs": 2}}')
    write_lines(sft / "metrics.jsonl", [{"step": s, "loss": 3 / s} for s in range(1, 30)])
    paths = [str(tmp_path / "a" / "ppo"), str(tmp_path / "b" / "ppo"), str(sft)]
    html = page_of(*paths)
    data = data_of(html)
    assert [run["name"] for run in data["runs"]] == ["a/ppo", "b/ppo", "sft"]
    by_title = {chart["title"]: chart for chart in data["charts"]}
    assert [line["run"] for line in by_title["Reward"]["lines"]] == [0, 1, 0, 1]
    assert [line["run"] for line in by_title["Loss"]["lines"]] == [2]
    assert {"Phases of a step: a/ppo", "Phases of a step: b/ppo"} <= set(by_title)
    assert "supervised fine-tuning" in html
    assert main(["report", *paths]) == 0
    shown = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in shown.splitlines()[::-1] if line.split()}
    assert rows["steps"] == ["40", "40", "29"]
    assert rows["optim.lr"] == ["0.001", "0.5"]
    assert rows["loss"] == ["0.1034"]


def test_json(tmp_path, capsys):
    run, file = write_run(tmp_path / "run"), tmp_path / "found.json"
    with open(run / "metrics.jsonl", "a") as lines:
        lines.write('{"step": 41, "reward": NaN, "only/null": null}\n')
    assert main(["report", str(run), "--json", "-"]) == 0
    told = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    (found,) = told["runs"]
    assert found["metrics"]["reward"]["not_finite"] == 1
    assert found["metrics"]["only/null"]["last"] is None
    assert found["metrics"]["eval_reward"] | {"mean": 0} == {
        "first": 0.0,
        "last": 1.0,
        "least": 0.0,
        "most": 1.0,
        "mean": 0,
        "count": 5,
        "not_finite": 0,
        "last_step": 40,
    }
    assert (found["alarms"][0]["step"], found["calibration"]) == (20, CALIBRATION)
    assert main(["report", str(run), str(run), "--json", str(file)]) == 0
    assert "reward" in capsys.readouterr().out
    assert json.loads(file.read_text()) == told


# ---- what comes in -------------------------------------------------------------------------------
HOSTILE = [
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    "\" onmouseover='alert(1)' &amp; <!-- ]]> {{ 7 * 7 }} {% raw %}",
    "null\0byte, half a pair \ud83d, \u2028 \u202e right to left override",
    "שלום עולם، مرحبا 👩‍👩‍👧‍👦🏳️‍🌈",
]


@pytest.mark.parametrize("text", HOSTILE, ids=["script", "end", "quotes", "bytes", "letters"])
def test_text_stays_text_wherever_it_stands(tmp_path, text):
    run = write_run(tmp_path, options={text: text, "algorithm": text})
    rows = samples(["", text, f"{text} and more"], text)
    for row in rows:
        row["scores"] = {text: 1.0}
    write_lines(run / "samples_eval.jsonl", rows)
    write_lines(run / "metrics.jsonl", [{"step": 1, text: 1.0}, {"step": 2, text: 2.0}])
    evidence = [{"metric": text, "kind": text, "then": 1.0, "now": 2.0, "sigma": 1.0}]
    write_lines(run / "alarms.jsonl", [{"step": 1, "evidence": evidence}])
    html = page_of(run).encode("utf-8", "replace").decode()
    found, plain = Reader(html), Reader(page_of(write_run(tmp_path / "plain")))
    kinds = {tag for tag, _ in plain.tags} | {"blockquote", "em"}
    assert {tag for tag, _ in found.tags} <= kinds
    assert [tag for tag, _ in found.tags].count("script") == 3
    assert not [a for _, a in found.tags if any(name.startswith("on") for name in a)]
    shown = text.replace("\0", "\ufffd").encode("utf-8", "replace").decode().strip()
    for element in ("article", "h3", "h4", "code", "p"):
        assert shown.split()[0] in found.of(element), element
    assert data_of(html)["charts"][0]["names"] == [text]


def test_a_long_text_is_cut_and_its_length_said(tmp_path):
    run = write_run(tmp_path)
    write_lines(run / "samples_eval.jsonl", samples(["word " * 10_000, "w" * 50_000], "p" * 3000))
    html = page_of(run)
    assert "cut: 49,999 characters in all" in html  # the last blank is no part of it
    assert "cut: 50,000 characters in all" in html
    assert "cut: 3,000 characters in all" in html
    assert "w" * 2001 not in html
    assert len(html) < 500_000


def test_runs_that_are_half_there(tmp_path):
    whole = write_run(tmp_path / "whole")
    for name in ("metrics.jsonl", "config.json", "samples_eval.jsonl"):
        half = tmp_path / f"only {name}"
        half.mkdir()
        (half / name).write_bytes((whole / name).read_bytes())
        html = page_of(half)
        assert Reader(html).open == []
        assert ("no metrics.jsonl" in html) == (name != "metrics.jsonl")
    html = page_of(*(tmp_path / f"only {name}" for name in ("config.json", "metrics.jsonl")), whole)
    assert Reader(html).open == []
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "metrics.jsonl").write_text("")
    assert "metrics.jsonl: no metrics yet" in page_of(empty)


def test_metrics_without_a_finite_value_are_gaps(tmp_path, capsys):
    rows = [{"step": s, "reward": None, "kl": math.nan if s == 2 else 1.0} for s in range(1, 5)]
    write_lines(tmp_path / "metrics.jsonl", rows)
    html = page_of(tmp_path)
    charts = {chart["title"]: chart["lines"][0]["y"] for chart in data_of(html)["charts"]}
    assert charts["Reward"] == [None] * 4
    assert charts["KL from the reference"] == [1.0, None, 1.0, 1.0]
    assert "5 values are not finite: gaps in the curves" in html
    assert main(["report", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "5 values are not finite" in shown
    assert re.search(r"kl +1 +1 +1 +1 +1", shown)


@pytest.mark.parametrize("folder", ["/proc", "/sys", "{tmp}/none", "{tmp}/file/x"])
def test_a_page_that_cannot_be_written(tmp_path, capsys, folder):
    (tmp_path / "file").write_text("x")
    run = write_run(tmp_path / "run")
    path = f"{folder.format(tmp=tmp_path)}/page.html"
    code = main(["report", str(run), "--html", path])
    assert code in (2, 3)
    told = capsys.readouterr().err
    assert told.startswith("fusedrl: error: ")
    assert path in told or "does not exist" in told or "file/x" in told
    assert "Traceback" not in told


def test_what_the_command_line_refuses(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    for arguments, said in (
        (["report", str(tmp_path)], f"runs there: {run}"),
        (["report", str(run), str(tmp_path / "no")], "no does not exist"),
        (["report", str(run), "--html", str(tmp_path)], "is a directory"),
        (["report", str(run), "--html", "-"], "expected a file to write the page to"),
        (["report"], "required: RUN"),
        (["watch", str(run)], "required: --html"),
        (["watch", str(run), "--html", "x.html", "--every", "0"], "at least 1"),
        (["watch", str(run), "--html", "x.html", "--every", "nan"], "at least 1"),
    ):
        assert main(arguments) == 2
        assert said in capsys.readouterr().err


def test_the_old_page_stays_where_a_new_one_fails(tmp_path, monkeypatch):
    from fusedrl.engine.runs import files
    from fusedrl.engine.watch.page.page import write_page

    run, path = RunFiles(write_run(tmp_path / "run")).read(), tmp_path / "page.html"
    path.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_page([run], path)
    assert path.read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["page.html", "run"]


# ---- long runs -----------------------------------------------------------------------------------
def test_thinning_keeps_means_spikes_and_gaps():
    steps = np.arange(1.0, 100_001.0)
    values = np.sin(steps / 5000)
    values[50_000] = 99.0
    values[10_000:10_400] = np.nan
    x, mean, low, high, most = thin(Series(steps, values))
    assert len(x) == len(mean) == BUCKETS
    assert most == 200
    assert (np.diff(x) > 0).all()
    assert np.nanmax(high) == 99.0
    assert high[np.isfinite(high)].tolist().count(99.0) == 1
    assert np.nanmax(mean) < 2
    assert np.isnan(mean).sum() == 2
    finite = np.isfinite(mean)
    assert ((low <= mean) & (mean <= high))[finite].all()
    assert np.allclose(mean[:40], [values[i : i + 200].mean() for i in range(0, 8000, 200)])


def test_steps_that_are_far_apart_are_thinned_by_steps():
    steps = np.concatenate([np.arange(0.0, 5000.0), np.arange(1e6, 1e6 + 5)])
    x, mean, _, _, _ = thin(Series(steps, steps))
    assert len(x) == 4  # five thousand steps are three of the five hundred spans
    assert x[-1] == 1e6 + 2
    assert mean[-1] == 1e6 + 2


def test_only_long_series_are_thinned(tmp_path):
    rows = [{"step": s, "reward": s % 7} for s in range(MOST_POINTS)]
    write_lines(tmp_path / "metrics.jsonl", rows)
    points = Points()
    charts([RunFiles(tmp_path).read()], points)
    assert (points.thinned, len(points.steps[0])) == (1, MOST_POINTS)
    write_lines(tmp_path / "metrics.jsonl", [*rows, {"step": MOST_POINTS, "reward": 0}])
    html = page_of(tmp_path)
    line = data_of(html)["charts"][0]["lines"][0]
    assert len(line["y"]) == len(line["lo"]) == len(line["hi"]) == BUCKETS
    assert "a point is the mean of up to 3 steps" in html


@pytest.mark.full
def test_a_hundred_thousand_steps(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    names = [f"metric/{n}" for n in range(50)]
    with open(run / "metrics.jsonl", "w") as file:
        for step in range(1, 100_001):
            row = {"step": step, "reward": math.sin(step)}
            row |= {name: 1 / (step + n) for n, name in enumerate(names)}
            file.write(json.dumps(row) + "\n")
    began = time.process_time()
    html = page_of(run)
    assert time.process_time() - began < 10
    assert len(html) < 10_000_000


def test_very_many_metrics(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", [{"step": 1} | {f"m{n}": n for n in range(1000)}])
    html = page_of(tmp_path)
    assert "700 more metrics are in metrics.jsonl and not drawn" in html
    assert len(data_of(html)["charts"]) == 300


# ---- words ---------------------------------------------------------------------------------------
def difference(before: str, after: str) -> list[tuple[str, str]] | None:
    found = word_difference(before, after)
    return None if found is None else [(piece.kind, piece.text) for piece in found]


def test_word_differences():
    assert difference("the cat sat.", "the old cat sat.") == [
        ("same", "the "),
        ("new", "old "),
        ("same", "cat sat."),
    ]
    assert difference("a big dog", "a dog") == [("same", "a "), ("gone", "big "), ("same", "dog")]
    assert difference("it is red, now", "it is red now") == [
        ("same", "it is red"),
        ("gone", ", "),
        ("same", " now"),
    ] or difference("it is red, now", "it is red now") == [
        ("same", "it is red "),
        ("gone", ", "),
        ("same", "now"),
    ]
    assert difference("lamp ", "lamp") == [("same", "lamp")]  # blanks are no difference
    assert difference("私は猫が好き", "私は犬が好き") == [
        ("same", "私は"),
        ("gone", "猫"),
        ("new", "犬"),
        ("same", "が好き"),
    ]
    assert difference("one two three", "four five six") is None
    assert difference("", "") == []
    family = "👩‍👩‍👧‍👦"
    assert difference(f"x {family} y", f"x {family}! y z") == [
        ("same", f"x {family}"),
        ("new", "!"),
        ("same", " y"),
        ("new", " z"),
    ] or any(family in text for _, text in difference(f"x {family} y", f"x {family}! y z"))


@pytest.mark.parametrize(
    "after", ["the " * 400, "the a " * 200, "".join(map(chr, range(33, 2000)))]
)
def test_texts_that_repeat_themselves_are_compared_quickly(after):
    began = time.process_time()
    word_difference(("the a the x, " * 200)[:2000], after)
    assert time.process_time() - began < 0.5


def test_all_of_both_texts_is_there():
    before, after = "a b, c d. e f g", "a c, d x e. f h g"
    found = difference(before, after)
    assert "".join(text for kind, text in found if kind != "gone").split() == after.split()
    kept = "".join(text for kind, text in found if kind != "new")
    assert re.sub(r"\s", "", kept) == re.sub(r"\s", "", before)


def test_durations():
    assert [duration(s) for s in (4.6, 99, 119, 3599, 3600, 40_200)] == [
        "5 s",
        "99 s",
        "2 min",
        "60 min",
        "1 h 0 min",
        "11 h 10 min",
    ]


# ---- a page that is written again and again ------------------------------------------------------
HOLD = """
import json, sys, time
from pathlib import Path
from fusedrl.engine.runs.files import RunLock
run = Path(sys.argv[1])
with RunLock(run), open(run / "metrics.jsonl", "a") as file:
    print("held", flush=True)
    for line in sys.stdin:
        file.write(line); file.flush(); print("written", flush=True)
"""


@pytest.fixture
def running(tmp_path):
    """A run whose process writes what it is told, and ends with its input."""
    run = write_run(tmp_path / "run", 3)
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "held\n"
        yield run, process
        process.kill()


def until(path, *texts):
    for _ in range(200):
        html = path.read_text(encoding="utf-8") if path.exists() else ""
        assert html == "" or html.endswith("</html>")  # never half a page
        if html and all(text in html for text in texts):
            return html
        time.sleep(0.05)
    pytest.fail(f"{texts} did not come")


def watch(run, page, **options):
    command = [sys.executable, "-m", "fusedrl.engine.cli", "watch", str(run), "--html", str(page)]
    return subprocess.Popen(
        [*command, "--every", "1"], stderr=subprocess.PIPE, text=True, **options
    )


def test_watch_writes_until_the_run_ends(running, tmp_path):
    (run, process), page = running, tmp_path / "page.html"
    with watch(run, page) as watching:
        html = until(page, "3 of 40 steps", "running")
        assert 'id="live"' in html
        assert data_of(html)["live"] == 1
        process.stdin.write('{"step": 17, "reward": 4.0}\n')
        process.stdin.flush()
        until(page, "17 of 40 steps")
        process.stdin.close()
        told = watching.stderr.read()
        assert watching.wait(20) == 0
    assert "run stopped at step 17" in told
    html = page.read_text()
    assert 'id="live"' not in html
    assert data_of(html)["live"] == 0


def test_watch_ends_by_ctrl_c(running, tmp_path):
    (run, _), page = running, tmp_path / "page.html"
    with watch(run, page) as watching:
        until(page, 'id="live"')
        watching.send_signal(signal.SIGINT)
        told = watching.stderr.read()
        assert watching.wait(20) == 0
    assert "ended at step 3" in told
    assert "Traceback" not in told
    assert 'id="live"' not in page.read_text()


def test_watch_of_a_run_that_is_over(tmp_path):
    said = []
    run, page = write_run(tmp_path / "run"), tmp_path / "page.html"
    assert "nothing is running: run stopped at step 40" in follow(
        open_runs([run]), page, 10.0, said.append
    )
    assert said == []
    assert 'id="live"' not in page.read_text()


# ---- how it is made ------------------------------------------------------------------------------
def test_reports_need_no_torch(tmp_path):
    run = write_run(tmp_path / "run")
    code = (
        "import sys; from fusedrl.engine.cli.main import main; "
        f"code = main(['report', {str(run)!r}, '--html', {str(tmp_path / 'p.html')!r}]); "
        "sys.exit(code or 'torch' in sys.modules)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert told.returncode == 0, told.stderr


def test_the_library_is_the_one_that_is_named():
    import hashlib

    from fusedrl.engine.watch.page.page import LIBRARY

    script = (HERE / "uplot" / "uPlot.iife.min.js").read_bytes()
    assert f"(v{LIBRARY})".encode() in script[:80]
    assert hashlib.sha256(script).hexdigest() == (
        "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f"
    )
