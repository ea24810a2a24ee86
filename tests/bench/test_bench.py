"""The bench harness: what a row says, what merging keeps, what is refused, and that every op has a
bench."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from bench import conftest, harness, kernel_report, scaling_plot, tables
from tests import offline_compile

ROOT = Path(__file__).resolve().parents[2]
RUN = {
    "cpu": "a CPU",
    "capability": "AVX2",
    "gpu": None,
    "threads": 1,
    "python": "3.11",
    "torch": "2.11",
    "commit": "aaaa",
    "date": "2026-01-01",
}


def pytest_bench(*arguments):
    """pytest with the plugin of bench/, in a process of its own, as `make bench` runs it."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-c",
        "pyproject.toml",
        "-p",
        "no:cacheprovider",
        *map(str, arguments),
    ]
    # Without what xdist tells its workers: pytest-benchmark would time nothing.
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")
    }
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture
def ceilings(monkeypatch):
    monkeypatch.setattr(harness, "copy_bandwidth", lambda: 1e9)
    monkeypatch.setattr(harness, "gemm_rate", lambda: 1e12)


# ---- rows ----------------------------------------------------------------------------------------
def test_ratios_and_ceilings(ceilings):
    times = {"fusedrl": [1.0, 2.0, 9.0, 2.0, 1.5], "eager": [10.0, 30.0, 20.0, 20.0, 21.0]}
    ours, eager = harness.to_rows(
        "op",
        "2 x 3",
        "float32",
        times,
        bytes_moved=1_000_000,
        flops=10**9,
        extra={"share": 0.5},
        note="n",
    )
    assert (ours.p20_ms, ours.p50_ms, ours.p80_ms) == pytest.approx((1.4, 2.0, 3.4))
    assert (ours.ratio, eager.ratio, eager.p50_ms, ours.rounds) == (1.0, 10.0, 20.0, 5)
    # a megabyte at 1 GB/s takes 1 ms, as does a Gflop at 1 Tflop/s
    assert (ours.percent_of_ceiling, eager.percent_of_ceiling) == (50.0, 5.0)
    assert (ours.extra, eager.extra) == ({"share": 0.5}, {})
    (slow,) = harness.to_rows(
        "op", "", "", {"fusedrl": [2.0]}, bytes_moved=1_000_000, flops=4 * 10**9
    )
    assert slow.percent_of_ceiling == 200.0, "the larger of the two floors"
    assert harness.to_rows("op", "", "", {"fusedrl": [2.0]})[0].percent_of_ceiling is None


def test_different_answers_are_refused():
    one, two = (lambda: [torch.ones(3)]), (lambda: [torch.full((3,), 1.001)])
    same = harness.agree(1e-5)
    harness.check_answers("op", {"fusedrl": one, "eager": one}, same, ())
    harness.check_answers("op", {"fusedrl": one, "bare": two}, same, {"bare"})
    with pytest.raises(
        AssertionError,
        match="op: expected the answers of 'fusedrl' and 'eager' to agree before they are timed",
    ):
        harness.check_answers("op", {"fusedrl": one, "eager": two}, same, ())


def test_rounds_fill_the_time(monkeypatch):
    for seconds, expected in (
        (1e-6, harness.MOST),
        (harness.SECONDS / 20, 10),
        (10.0, harness.FEWEST),
    ):
        monkeypatch.setattr(harness, "timed", lambda function, seconds=seconds: 1e3 * seconds)
        assert harness.rounds_for({"fusedrl": print, "eager": print}) == expected


def test_implementations_leave_the_interpreter_out():
    from fusedrl.kernels import logprob

    if harness.DEVICE.type == "cpu":
        found = harness.implementations(logprob, "logprob")
        assert next(iter(found)) == "fusedrl"
        assert "triton" not in found.values()
        assert found["fusedrl, torch" if "cpp" in found.values() else "fusedrl"] == "torch"


# ---- results -------------------------------------------------------------------------------------
def rows(what, *contestants, note=""):
    return [
        harness.Row(what, "1 x 1", "float32", name, 1.0, 1.0, 1.0, 3, 1.0, note=note)
        for name in contestants
    ]


def names(path):
    return [
        (row["what"], row["contestant"], run["commit"]) for row, run in harness.read_results(path)
    ]


def test_merging_replaces_a_contest_and_keeps_the_rest(tmp_path):
    path = tmp_path / "op.json"
    first_format = [
        {k: v for k, v in dataclasses.asdict(row).items() if k != "extra"}
        for row in (*rows("a", "fusedrl", "eager"), *rows("b", "fusedrl"))
    ]
    path.write_text(json.dumps({"machine": RUN, "rows": first_format}))
    later = {**RUN, "commit": "bbbb"}
    harness.merge_results(path, rows("a", "fusedrl", "torch.compile"), later)
    harness.merge_results(path, rows("a", "fusedrl", note="half"), later)
    harness.merge_results(path, rows("c", "fusedrl"), later)
    # eager's old ratio went with the ours that it was a ratio to; the contest kept its place; b
    # says that it is of the first run
    assert names(path) == [
        ("a", "fusedrl", "bbbb"),
        ("a", "torch.compile", "bbbb"),
        ("b", "fusedrl", "aaaa"),
        ("a", "fusedrl", "bbbb"),
        ("c", "fusedrl", "bbbb"),
    ]
    assert len(json.loads(path.read_text())["runs"]) == 2
    harness.merge_results(path, rows("b", "fusedrl"), later)
    assert [run["commit"] for run in json.loads(path.read_text())["runs"]] == ["bbbb"]
    harness.merge_results(
        path, rows("b", "fusedrl"), {**later, "gpu": "a GPU", "driver and clocks": "1"}
    )
    assert [row["what"] for row, _ in harness.read_results(path)] == [
        "a",
        "a",
        "b",
        "a",
        "c",
        "b",
    ], "a GPU's rows stand beside a CPU's"
    assert [file.name for file in tmp_path.iterdir()] == ["op.json"]


def test_tables(tmp_path):
    harness.merge_results(tmp_path / "op.json", rows("a", "fusedrl", "eager"), RUN)
    harness.merge_results(tmp_path / "op.json", rows("b", "fusedrl"), {**RUN, "commit": "bbbb"})
    harness.merge_results(
        tmp_path / "op.json",
        rows("b", "fusedrl"),
        {**RUN, "gpu": "a GPU", "driver and clocks": "570, 1980 MHz"},
    )
    text = tables.render(tmp_path)
    assert text.index("**CPU**") < text.index("**a GPU**")
    assert "| a | 1 x 1 float32 | 1 (1, 1) |  | eager **1x** |" in text
    assert "op at `aaaa` (1 contests) and `bbbb` (1 contests)." in text
    assert "a GPU (570, 1980 MHz); python 3.11" in text
    assert tables.replace_between("x <b> old <e> y", "<b>", "<e>", "new") == "x <b>\nnew\n<e> y"
    with pytest.raises(ValueError, match="put both lines"):
        tables.replace_between("nothing", "<b>", "<e>", "new")


def test_the_committed_results_fit_the_tables_of_the_pages():
    text = tables.render()
    contests = {
        (path.stem, harness.contest_of(result))
        for path in harness.RESULTS.glob("*.json")
        for result in harness.read_results(path)
    }
    assert text.count("\n| ") - text.count("\n| what |") == len(contests) > 0
    assert tables.BEGIN + "\n" + text + "\n" + tables.END in tables.NUMBERS.read_text(
        encoding="utf-8"
    ), "run `make tables`"
    short = tables.render_short()
    assert f"{tables.SHORT_BEGIN}\n{short}\n{tables.SHORT_END}" in tables.README.read_text(
        encoding="utf-8"
    ), "run `make tables`"
    assert 5 <= short.count("\n") - 1 <= 8
    extras = [
        row["extra"] for row, _ in harness.read_results(harness.RESULTS / "linear_policy_loss.json")
    ]
    (share,) = [extra["ours / eager's, %"] for extra in extras if "ours / eager's, %" in extra]
    assert f"in {round(share)}% of the memory" in short


# ---- memory --------------------------------------------------------------------------------------
def builder():
    return {"a tensor": lambda: torch.ones(16 << 20)}


@pytest.mark.skipif(
    not Path("/proc/self/status").exists() or harness.DEVICE.type == "cuda",
    reason="reads resident pages",
)
def test_peak_memory():
    assert (
        64 << 20 <= harness.peak_memory("tests.bench.test_bench", "builder", "a tensor") < 96 << 20
    )


def test_peak_memory_refuses_inputs_that_hide_it(monkeypatch):
    monkeypatch.setattr(harness, "resident", {"VmRSS": 100 << 20, "VmHWM": 200 << 20}.__getitem__)
    with pytest.raises(RuntimeError, match="made without a peak of their own, got one of 100 MiB"):
        harness._measure_peak("tests.bench.test_bench", "builder", "a tensor")


# ---- the fixture ---------------------------------------------------------------------------------
TINY = """
import time
import pytest
import torch
from bench import harness
from bench.harness import agree

harness.copy_bandwidth, harness.gemm_rate = (lambda: 1e9), (lambda: 1e12)  # seconds saved

@pytest.mark.parametrize("n", [1, 2])
def bench_sleep(contest, n):
    def sleep(seconds):
        def call():
            time.sleep(seconds)
            return [torch.ones(2)]
        return call
    contest("sleep", f"{n}", torch.float32, {"fusedrl": sleep(0.01), "eager": sleep(0.04)},
            same=agree(1e-5), bytes_moved=8,
            derive=lambda times: {"rounds seen": len(times["eager"])})

def bench_wrong(contest):
    answers = {"fusedrl": lambda: [torch.ones(1)], "eager": lambda: [torch.zeros(1)]}
    contest("wrong", "1", torch.float32, answers, same=agree(1e-5))
"""


def test_a_contest_through_the_fixture(tmp_path):
    file, results, saved = tmp_path / "bench_tiny.py", tmp_path / "results", tmp_path / "saved.json"
    file.write_text(TINY)
    common = (
        "-p",
        "bench.conftest",
        "--benchmark-enable",
        "--rounds",
        3,
        "--results",
        results,
        file,
    )
    done = pytest_bench(*common, f"--benchmark-json={saved}")
    assert "2 passed" in done.stdout, done.stdout + done.stderr
    assert "1 failed" in done.stdout
    assert "expected the answers of 'fusedrl' and 'eager' to agree" in done.stdout
    found = harness.read_results(results / "tiny.json")
    assert [(row["what"], row["shape"], row["contestant"]) for row, _ in found] == [
        ("sleep", n, who) for n in "12" for who in ("fusedrl", "eager")
    ]
    (ours, run), (eager, _), *_ = found
    assert ours["rounds"] == 3
    assert ours["extra"] == {"rounds seen": 3}
    assert ours["p50_ms"] >= 5
    assert eager["ratio"] == pytest.approx(eager["p50_ms"] / ours["p50_ms"], abs=1e-3)
    assert run["threads"] == 1
    assert (run["copy_gb_per_s"], run["gemm_gflop_per_s"]) == (1.0, 1000.0)
    # pytest-benchmark's own statistics are those of our row
    benches = json.loads(saved.read_text())["benchmarks"]
    assert [bench["stats"]["rounds"] for bench in benches] == [3, 3]
    assert benches[0]["stats"]["median"] * 1e3 == pytest.approx(ours["p50_ms"], abs=1e-3)
    assert benches[0]["extra_info"]["rows"][1]["contestant"] == "eager"

    # a selection replaces its own contest and leaves the other
    assert "1 passed" in pytest_bench(*common[:-1], f"{file}::bench_sleep[2]").stdout
    assert harness.read_results(results / "tiny.json")[:2] == found[:2]
    assert harness.read_results(results / "tiny.json")[2:] != found[2:]


contest = conftest.contest  # the fixture


def test_without_benchmark_enable_answers_are_checked_and_nothing_is_timed(contest):
    calls = []
    contestants = {
        name: lambda name=name: calls.append(name) or [torch.ones(1)]
        for name in ("fusedrl", "eager")
    }
    assert contest("op", "1", torch.float32, contestants, same=harness.agree(0.0)) == []
    assert calls == ["fusedrl", "eager"]


# ---- the bench files -----------------------------------------------------------------------------
def test_every_op_has_a_bench():
    ops = {
        path.stem
        for path in (ROOT / "kernels").glob("*.py")
        if " = Implementations(" in path.read_text(encoding="utf-8")
    }
    benches = {path.stem.removeprefix("bench_") for path in (ROOT / "bench").glob("bench_*.py")}
    # bench_generate.py measures decode_step: a step has no opponent but a generation has.
    missing = ops - benches - {"dispatch", "decode_step"}
    assert not missing, f"add bench/bench_<op>.py for {sorted(missing)}"
    contract = {
        "logprob",
        "linear_logprob",
        "linear_policy_loss",
        "kl",
        "full_kl",
        "linear_full_kl",
        "gae",
        "normalize",
        "policy_loss",
        "ranking_loss",
        "attention",
        "paged_attention",
        "kv_cache",
        "sampling",
        "rms_norm",
        "swiglu",
        "rope",
    }
    assert contract <= benches


def test_every_bench_file_collects():
    done = pytest_bench("--collect-only", "bench")
    assert done.returncode == 0, done.stdout + done.stderr
    for path in (ROOT / "bench").glob("bench_*.py"):
        op = path.stem.removeprefix("bench_")
        unfinished = (
            op in ("paged_attention", "kv_cache") and not (ROOT / "kernels" / f"{op}.py").exists()
        )
        assert (
            unfinished
            or f"bench/{path.name}:" in done.stdout
            or f"bench/{path.name}::" in done.stdout
        ), f"{path.name} has no contest\n{done.stdout}"


# ---- the kernel report ---------------------------------------------------------------------------
def test_kernel_report():
    used = {
        "sm_90": {"registers": 64, "spills": 0, "shared": 128},
        "gfx942": {"registers": 40, "spills": 8, "shared": 0},
    }
    broken = {"sm_90": {"error": "no"}, "gfx942": {"registers": 1, "spills": 0, "shared": 0}}
    assert kernel_report.table([("a.b", used), ("c", broken)]) == [
        "| kernel | sm_90 | gfx942 |",
        "|---|---|---|",
        "| `a.b` | 64 / 128 | 40 / 0, **8 spilled** |",
        "| `c` | **does not compile** | 1 / 0 |",
    ]


def test_the_kernel_report_names_every_kernel():
    text = kernel_report.REPORT.read_text(encoding="utf-8")
    tables.replace_between(text, kernel_report.BEGIN, kernel_report.END, "")
    missing = [name for name in offline_compile.kernels([]) if f"`{name}`" not in text]
    missing += [
        f"{source} {options}"
        for source, options, _ in offline_compile.cuda_sources()
        if not re.search(
            rf"`{re.escape(source)}: \w+{''.join(' ' + re.escape(option) for option in options)}`",
            text,
        )
    ]
    assert not missing, f"run `make kernel-report`; docs/kernel-report.md lacks {missing}"
    spilled = re.findall(r"\| `.*(?:spilled|does not compile).*", text)
    assert not spilled


# ---- the scaling plot ----------------------------------------------------------------------------
def test_the_scaling_plot_and_its_exponents(tmp_path):
    pytest.importorskip("matplotlib", reason="the extra `docs` is not installed")

    def row(what, shape, speed, percent):
        return {
            "what": what,
            "shape": shape,
            "dtype": "float32",
            "contestant": "fusedrl",
            "note": "",
            "percent_of_ceiling": percent,
            "extra": {"tokens/s": speed},
        }

    rows = [
        row("decode, sequences", "1 x 128", 100.0, 10.0),
        row("decode, sequences", "4 x 128", 400.0, 20.0),
        row("decode, sequences", "16 x 128", 800.0, 20.0),
        row("decode, context", "16 x 256", 400.0, 20.0),
        row("decode, context", "16 x 128", 800.0, 20.0),
    ]
    results = tmp_path / "scaling.json"
    results.write_text(json.dumps({"runs": [RUN], "rows": [r | {"run": 0} for r in rows]}))
    (tmp_path / "engine-numbers.md").write_text(
        f"before\n{scaling_plot.BEGIN}\nold\n{scaling_plot.END}\nafter\n"
    )
    scaling_plot.draw(results, tmp_path)
    page, plot = (
        (tmp_path / "engine-numbers.md").read_text(),
        (tmp_path / "scaling.svg").read_text(),
    )
    assert "| 4 | 400 | 10 | 20.0% | 1.00 |\n| 16 | 800 | 20 | 20.0% | 0.50 |" in page
    assert "| 128 | 800 | 20 | 20.0% |  |\n| 256 | 400 | 40 | 20.0% | -1.00 |" in page
    assert page.startswith("before\n")
    assert page.endswith("after\n")
    assert "old" not in page
    groups = ElementTree.fromstring(plot).findall(".//{http://www.w3.org/2000/svg}g[@id]")
    marked = {
        group.get("id"): len(group.findall(".//{http://www.w3.org/2000/svg}use"))
        for group in groups
        if group.get("id") in scaling_plot.PANELS
    }
    assert marked == {"decode, sequences": 3, "decode, context": 2}
    results.write_text(json.dumps({"runs": [RUN], "rows": [rows[0] | {"run": 0}]}))
    with pytest.raises(ValueError, match=r"make bench BENCH=bench/bench_scaling\.py"):
        scaling_plot.draw(results, tmp_path)
