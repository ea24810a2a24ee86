"""A run on the terminal: what fits is shown, whole and once; the terminal may change its size or go
away; elsewhere there are plain lines."""

import io
import json
import math
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from tests.support.screen import Terminal, seen
from tests.support.tiny import write_model

from fusedrl.engine.actor import HybridActor
from fusedrl.engine.base.activity import Activity
from fusedrl.engine.base.packing import PackedBatch
from fusedrl.engine.config import (
    DPOConfig,
    KTOConfig,
    OptimConfig,
    PolicyConfig,
    RejectionConfig,
    RewardModelConfig,
    SFTConfig,
)
from fusedrl.engine.generation.sampler import SamplingParams
from fusedrl.engine.optim.learner import Learner
from fusedrl.engine.parallel.ranks import ALONE
from fusedrl.engine.runs import terminal
from fusedrl.engine.runs.columns import (
    POLICY,
    Column,
    cell,
    columns_of,
    fitting,
    name_in,
    width_of,
)
from fusedrl.engine.runs.facts import facts_of
from fusedrl.engine.runs.terminal import Progress

pytestmark = pytest.mark.cpu_only("what is shown is the same on every device")
ROOT = Path(__file__).resolve().parents[3]
UNSET = {"COLUMNS": "", "LINES": ""}  # they would stand for the size of the terminal
VALUES = {
    "reward": 0.25,
    "kl": 3.0,
    "completions/mean_length": 40.0,
    "completions/clipped_ratio": 0.5,
    "timing/step": 1.0,
    "tokens_per_s": 12345.6,
    "frac_reward_zero_std": 0.125,
    "entropy": 2.0,
    "clip_ratio/region_mean": 0.01,
    "val/explained_variance": -0.5,
    "grad_norm": 1e-5,
    "learning_rate": 1e-6,
    "mem/peak_gib": 3.5,
}
# steps of a run on a terminal: waits for its cue before the last part
SCRIPT = f"""
import contextlib, sys, time
from fusedrl.engine.base.activity import Activity
from fusedrl.engine.runs import terminal
terminal.SECONDS_BETWEEN_ROWS, terminal.SECONDS_BETWEEN_DRAWS = 0.0, 0.02
values, steps, activity = {VALUES!r}, int(sys.argv[1]), Activity()
names = tuple(sys.argv[2:])
shown = terminal.Progress(steps, title="grpo", activity=activity, names=names)
shown.header([("model", "tiny \\U0001f600 \\u05d0\\u05d1")])
with shown:
    for step in range(1, steps + 1):
        if step == steps // 2 + 1:
            activity.begin("generating", "completions", 64)
            activity.done, activity.tokens = 37, 5120
            print("half-way")
            with contextlib.suppress(EOFError, OSError):
                input()
            time.sleep(0.1)
        held_out = {{"eval_reward": 0.75, "eval_reward_stderr": 0.125}} if step == steps else {{}}
        shown.update(step, values | held_out)
"""


def _start(width: int, *arguments: str, height: int = 24, **options) -> Terminal:
    return Terminal(
        [sys.executable, "-c", SCRIPT, *arguments],
        width,
        height,
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TERM": "xterm", **UNSET},
        cwd=ROOT,
        **options,
    )


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_a_row_a_step_that_fits_and_nothing_left_of_what_moved(width):
    shown = _start(width, "40")
    shown.read("tokens/s")
    shown.read("37/64")
    shown.type("go\r")
    shown.read()
    assert shown.wait() == 0
    assert "\x1b[?25l" not in shown.output, "the cursor is hidden"
    lines = seen(shown.output, width)
    assert "grpo  model  tiny 😀 אב" in lines
    rows = [line for line in lines if re.match(r" *\d+/40 ", line)]
    assert [int(row.split("/")[0]) for row in rows] == list(range(1, 41))
    heads = [line for line in lines if re.match(" *step  ", line) and "held out" not in line]
    assert len(heads) == 3, "the heading is repeated as it scrolls away"
    assert all(len(line) < width for line in [*rows, *heads])
    there = [c for c in POLICY if name_in(c, VALUES)]
    expected = fitting(there, width - 1, 5)
    assert [w for c in expected for w in c.heading.split()] == heads[0].split()[1:]
    assert rows[0].split()[1:] == [cell(c, VALUES[c.metric]) for c in expected]
    assert 3 < len(expected) <= len(there)
    if width == 200:
        assert expected == there
    assert "  step 40, held out: reward 0.75 ± 0.12" in lines
    assert not [line for line in lines if "left" in line or "generating" in line]


def test_moving_lines_say_where_the_run_and_its_step_are():
    shown = _start(80, "10")
    shown.read("5,120 tokens")
    moving = seen(shown.output, 80)
    at = max(i for i, line in enumerate(moving) if line.startswith("grpo "))
    assert re.fullmatch(r"grpo [━╌]+ 5/10 steps  0:00:00  about 0:00:0\d left", moving[at])
    assert re.fullmatch(
        r"  generating: 37/64 completions, 5,120 tokens, [\d,]+ tokens/s", moving[at + 1]
    )
    shown.type("go\r")
    shown.read()
    assert shown.wait() == 0


def test_whole_names_on_request():
    shown = _start(60, "4", "kl", "val/*", "entrpy")
    shown.type("go\r")
    lines = seen(shown.read(), 60)
    assert shown.wait() == 0
    assert "grpo 3/4  kl 3  val/explained_variance -0.5" in lines
    told = "grpo: run.columns: no metric of step 1 is called 'entrpy'; did you mean entropy?"
    assert " ".join(lines).count(told) == 1


def test_a_terminal_that_changes_its_size():
    shown = _start(120, "20")
    shown.read("37/64")
    shown.resize(60)
    shown.type("go\r")
    shown.read()
    assert shown.wait() == 0
    before, after = shown.output.split("half-way")
    wide, narrow = (
        max(len(row) for row in re.findall(r"\r?\n?( *\d+/20 [^\r\n\x1b]*)", part))
        for part in (before, after)
    )
    assert narrow < 60 < wide
    assert len(re.findall(r" step +reward", after)) == 1, "a new heading, of fewer columns"


def test_a_terminal_that_is_closed_does_not_end_the_program():
    shown = _start(80, "20", nohup=True)
    shown.read("37/64")
    shown.close()  # input() then fails, and every line that is written
    assert shown.wait() == 0


def test_a_terminal_that_cannot_move_its_cursor_gets_plain_lines():
    shown = Terminal(
        [sys.executable, "-c", SCRIPT, "4"],
        80,
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TERM": "dumb", **UNSET},
        cwd=ROOT,
    )
    shown.type("go\r")
    shown.read()
    assert shown.wait() == 0
    assert "\x1b" not in shown.output
    assert "grpo 1/4  reward 0.25  kl 3" in shown.output


# ---- a run ---------------------------------------------------------------------------------------
@pytest.fixture
def run_on_terminal(tmp_path):
    """Start a GRPO run on a terminal, in a directory of its own."""
    write_model(tmp_path / "m")
    rows = [{"prompt": f"w{i} w{i + 1}"} for i in range(8)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rewards.py").write_text(
        "import time\n"
        "def slow(prompts, completions, completion_ids, **columns):\n"
        "    time.sleep(0.3)\n"
        "    return [float(len(ids) % 2) for ids in completion_ids]\n"
    )

    def start(*options: str, nohup: bool = False) -> Terminal:
        return Terminal(
            [
                *(sys.executable, "-m", "fusedrl.engine.cli", "train", "grpo", "--model", "m"),
                *("--data", "prompts.jsonl", "--reward", "rewards.py:slow", "--device", "cpu"),
                *("--prompts_per_step", "2", "--samples_per_prompt", "2", "--run.dir", "run"),
                *("--generation.max_new_tokens", "4", *options),
            ],
            100,
            cwd=tmp_path,
            env=os.environ
            | {
                "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
                "TERM": "xterm",
                "OMP_NUM_THREADS": "1",
                **UNSET,
            },
            nohup=nohup,
        )

    return start


def _steps(directory: Path) -> list[int]:
    return [
        json.loads(line)["step"] for line in (directory / "metrics.jsonl").read_text().splitlines()
    ]


def test_ctrl_c_saves_the_run_and_leaves_the_terminal_as_it_was(run_on_terminal, tmp_path):
    shown = run_on_terminal("--steps", "1000")
    shown.read("3/1000 ")
    shown.type("\x03")
    shown.read()
    assert shown.wait() == 128 + signal.SIGINT
    assert "the run stops when this step is complete and saved" in shown.output
    assert "go on with: fusedrl resume run" in " ".join(shown.output.split())
    assert "\x1b[?25l" not in shown.output
    steps = _steps(tmp_path / "run")
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) < 100
    assert (tmp_path / "run" / "checkpoints" / f"step_{steps[-1]:08d}").is_dir()
    lines = seen(shown.output, 100)
    assert not [line for line in lines if "about" in line and "left" in line]
    # the header
    assert any(re.match(r"grpo  model    m: llama, 16.54k parameters$", line) for line in lines)
    assert any(line.startswith("grpo  device   cpu, 1 thread, float32") for line in lines)


@pytest.mark.full
def test_a_run_goes_on_where_its_terminal_is_closed(run_on_terminal, tmp_path):
    shown = run_on_terminal("--steps", "5", nohup=True)
    shown.read("2/5 ")
    shown.close()
    assert shown.wait() == 0
    assert _steps(tmp_path / "run") == [1, 2, 3, 4, 5]
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


# ---- without a terminal --------------------------------------------------------------------------
class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_off_the_terminal_a_plain_line_now_and_then_and_at_the_end():
    stream = io.StringIO()
    columns = columns_of(SFTConfig("m", "d"))
    with Progress(1000, stream=stream, title="sft", columns=columns) as progress:
        progress.header([("model", "tiny"), ("dtype", "float32")])
        for step in range(1, 1001):
            progress.update(step, {"loss": 1 / step, "other": 3, "learning_rate": 1e-5})
    assert stream.getvalue().splitlines() == [
        "sft  model  tiny",
        "sft  dtype  float32",
        "sft 1/1000  loss 1  learning_rate 1e-05",
        "sft 1000/1000  loss 0.001  learning_rate 1e-05",
    ]


def test_evaluations_are_always_shown():
    stream = io.StringIO()
    with Progress(9, stream=stream, columns=[Column("reward", "reward")]) as progress:
        progress.update(0, {"eval_reward": 0.5, "eval_reward_stderr": 0.1})
        for step in range(1, 4):
            found = {"eval_reward": 0.75} if step == 2 else {}
            progress.update(step, {"reward": 0.25 * step, "kl": math.nan} | found)
    assert stream.getvalue().splitlines() == [
        "train 0/9  eval_reward 0.5",
        "train 2/9  reward 0.5  eval_reward 0.75",
    ]


def test_disabled_shows_nothing():
    for stream in (io.StringIO(), _Terminal()):
        with Progress(1, False, stream=stream) as progress:
            progress.header([("model", "m")])
            progress.update(1, {"loss": 1})
        assert stream.getvalue() == ""


def test_a_stream_that_does_not_speak_unicode_gets_what_it_can():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    progress = Progress(4, stream=stream, title="sft")
    progress.header([("model", "m😀")])
    stream.flush()
    assert stream.buffer.getvalue() == b"sft  model  m?\n"
    assert progress.lines(60)[0].isascii()


@pytest.mark.parametrize("error", [OSError(5, "gone"), ValueError("closed"), BrokenPipeError()])
def test_a_reader_that_goes_away_ends_the_display_alone(error):
    class Gone(_Terminal):
        def write(self, text):
            raise error

    for kind in (Gone, type("Pipe", (Gone,), {"isatty": lambda self: False})):
        before = sys.stderr
        with Progress(3, stream=kind()) as progress:
            progress.header([("model", "m")])
            for step in (1, 2, 3):
                progress.update(step, VALUES)
        assert sys.stderr is before


def test_the_time_left_follows_the_newest_steps(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    progress = Progress(100, stream=io.StringIO(), start=10)
    assert progress.left(now[0]) is None
    for step in range(11, 61):
        now[0] += 1.0 if step <= 40 else 3.0
        progress.update(step, {})
    assert progress.left(now[0]) == pytest.approx(3.0 * 40)
    assert progress.left(now[0] + 2.0) == pytest.approx(3.0 * 40 - 2.0)
    assert progress.left(now[0] + 1e6) == 0.0


def test_a_metric_that_a_step_lacks_leaves_the_heading_as_it_is(monkeypatch):
    monkeypatch.setattr(terminal, "SECONDS_BETWEEN_ROWS", 0.0)
    monkeypatch.setattr(terminal, "SECONDS_BETWEEN_DRAWS", 1000.0)
    stream = _Terminal()
    with Progress(9, stream=stream, columns=[Column("a", "a"), Column("b", "b")]) as progress:
        for step, values in enumerate(({"b": 1.0}, {"a": 2.0}, {"b": 3.0}), 1):
            progress.update(step, values)
    lines = [line.split() for line in seen(stream.getvalue(), 80)]
    assert [line for line in lines if line] == [
        *(["step", "b"], ["1/9", "1"], ["step", "a", "b"], ["2/9", "2", "-"], ["3/9", "-", "3"])
    ]


# ---- columns -------------------------------------------------------------------------------------
def test_columns_have_whole_headings_and_numbers_that_fit():
    for config in (SFTConfig, RewardModelConfig, DPOConfig, KTOConfig):
        assert columns_of(config("m", "d")) != POLICY
    assert columns_of(RejectionConfig("m", "d", ("r.py:f",)))[1].metric == "kept/reward"
    assert columns_of(PolicyConfig("m", "d", ("r.py:f",))) == POLICY
    stages = (SFTConfig, DPOConfig, KTOConfig)
    for column in {c for cls in stages for c in columns_of(cls("m", "d"))} | {*POLICY}:
        for value in (0.0, -1.23456e-5, 1e30, -1e300, 123456.789, math.nan, -math.inf, 0.5):
            assert len(cell(column, value)) <= width_of(column), (column, value)
    assert cell(Column("x", "x", "%", 100.0, 1), 0.123456) == "12.3"
    assert cell(Column("x", "x"), None) == "-"
    assert name_in(Column("gold/*/mean", "gold"), {"gold/b/mean": 1.0, "gold/a/mean": 2.0}) == (
        "gold/a/mean"
    )


def test_every_column_is_a_metric_of_the_page():
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    stages = (SFTConfig, RewardModelConfig, DPOConfig, KTOConfig)
    shown = {c.metric for cls in stages for c in columns_of(cls("m", "d"))}
    shown |= {c.metric for c in (*POLICY, *columns_of(RejectionConfig("m", "d", ("r.py:f",))))}
    assert not [name for name in shown if f"`{name.replace('*', '<name>')}`" not in page]


# ---- what a run is doing -------------------------------------------------------------------------
def test_loops_count_what_they_do(tiny_model):
    actor = HybridActor.from_pretrained(tiny_model, device="cpu", dtype="float32")
    outs = actor.generate([[4, 5], [6, 7, 8]], SamplingParams(max_new_tokens=6, n=3, seed=1))
    drawn = sum(len(c.token_ids) for out in outs for c in out)
    a = actor.activity
    assert (a.name, a.unit, a.done, a.total, a.tokens) == ("generating", "completions", 6, 6, drawn)
    batch = PackedBatch.from_completions([[4, 5], [6, 7, 8]], outs)
    groups = batch.split(16)
    actor.score(batch, partition=groups)
    assert (a.name, a.done, a.total) == ("scoring", len(groups), len(groups))
    learner = Learner(actor, OptimConfig())
    assert learner.activity is a
    states = []
    with learner.update(2, 10) as update:
        work = update.share(groups, [1] * len(groups))
        for group in work:
            states.append((a.name, a.done, a.total, a.update))
            micro = batch.select(group)
            work.backward(actor.cross_entropy(micro, actor.forward(micro), 1.0))
    assert states == [("training the model", i, len(groups), (3, 10)) for i in range(len(groups))]
    assert (a.done, a.update) == (len(groups), None)


def test_moving_lines_name_the_phase():
    activity = Activity()
    progress = Progress(10, stream=io.StringIO(), activity=activity)
    assert progress.lines(80)[1] == "  "
    before = activity.enter("evaluate")
    assert progress.lines(80)[1] == "  evaluating"
    activity.begin("generating", "completions", 4)
    assert progress.lines(80)[1] == "  evaluating, generating: 0/4 completions"
    activity.enter(before)
    activity.enter("train")
    activity.begin("training the model", "micro-batches", 3)
    activity.done, activity.update = 1, (5, 40)
    assert progress.lines(80)[1] == ("  training the model: 1/3 micro-batches, optimizer step 5/40")
    for width in (10, 30, 60):
        assert all(len(line) <= width for line in progress.lines(width))


def test_the_head_of_a_run(tiny_model):
    actor = HybridActor.from_pretrained(tiny_model, device="cpu", dtype="bfloat16")
    config = PolicyConfig(str(tiny_model), "d", ("r.py:f",), "grpo", prompts_per_step=3)
    facts = dict(facts_of(config, Learner(actor, OptimConfig()), ALONE, 5, 20))
    numbers = sum(p.numel() for p in actor.parameters())
    assert facts["run"] == (
        "runs/latest: 20 steps, from step 6 on of 3 prompts x 8 completions of at most 64 tokens"
    )
    assert facts["model"] == f"{tiny_model}: llama, {numbers / 1000:.4g}k parameters"
    assert facts["device"] == f"cpu, {torch.get_num_threads()} thread, bfloat16"
    assert facts["kernels"].split(";")[0] in ("cpp", "torch")
    assert f"weights {2 * numbers / 2**20:.2f} MiB" in facts["memory"]
    assert f"optimizer {12 * numbers / 2**20:.2f} MiB" in facts["memory"]
    assert "KV cache" in facts["memory"]


def test_what_it_costs_to_show_a_step_and_to_count(monkeypatch):
    """Rows share the terminal's pace: steps that are faster than it do not write."""
    stream = _Terminal()
    monkeypatch.setattr(terminal, "SECONDS_BETWEEN_DRAWS", 1000.0)
    with Progress(10**6, stream=stream) as progress:
        progress.update(1, VALUES)
        length, began = len(stream.getvalue()), time.monotonic()
        for step in range(2, 100):
            progress.update(step, VALUES)
        if time.monotonic() - began < terminal.SECONDS_BETWEEN_ROWS:
            assert len(stream.getvalue()) == length
