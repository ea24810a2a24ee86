"""fusedrl verify: it passes what is right, shows whatever is wrong as a row, and needs nothing but
the package and torch."""

import functools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fusedrl.engine.base.errors import ConfigError
from fusedrl.engine.cli.main import main
from fusedrl.engine.tools.verify import promises, report
from fusedrl.engine.tools.verify.catalogue import CATALOGUE
from fusedrl.engine.tools.verify.grid import examine
from fusedrl.engine.tools.verify.ops import small_tiles, time_op
from fusedrl.engine.tools.verify.promises import PROMISES
from fusedrl.kernels.runtime import native

CPU = torch.device("cpu")
PLANTED = """
import ctypes, time, torch
from fusedrl.engine.tools.verify.grid import Bound, Entry, Problem
from fusedrl.kernels.runtime.dispatch import CannotServe, Implementations

calls = 0

def wavers(x):
    global calls
    calls += 1
    return x * (2 + calls * 2**-22)

def raises(x):
    raise ValueError("planted: no such shape")

def spoils(x):
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

def refuses(x):
    raise CannotServe("planted: not on a Sunday")

def writes(x):
    x.mul_(2)
    return x

def entry(op, function, impls=("torch",)):
    return Entry(op, Implementations(op, impls, impls), {"N": (5, 0, 33)},
                 lambda case, draw: Problem({"x": torch.randn(case.N, generator=draw)}),
                 lambda x, s, impl: {"y": function(x["x"])}, lambda x, s: {"y": 2 * x["x"]},
                 lambda problem, want: {"y": Bound(1e-6)},
                 timed={"cpu": {"N": 4096}})

CATALOGUE = {e.op: e for e in (
    entry("right", lambda x: 2 * x), entry("wrong", lambda x: 2.001 * x),
    entry("nan", lambda x: x * float("nan")), entry("wavers", wavers), entry("raises", raises),
    entry("spoils", spoils), entry("refuses", refuses), entry("writes", writes),
    entry("dies", lambda x: ctypes.string_at(0)), entry("hangs", lambda x: time.sleep(1e6)),
    entry("short", lambda x: 2 * x[1:]), entry("absent", lambda x: x, ("cuda", "torch")),
    entry("last", lambda x: 2 * x))}
"""


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """A catalogue of ops that go wrong in every way."""
    (tmp_path / "planted_ops.py").write_text(PLANTED)
    monkeypatch.syspath_prepend(str(tmp_path))
    return functools.partial(report.verify_machine, catalogue="planted_ops")


def test_whatever_goes_wrong_is_a_row_and_the_rest_is_tried(planted, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(
        report,
        "verify_machine",
        lambda *arguments, **named: planted(*arguments, **(named | {"engine": False})),
    )
    file = tmp_path / "found.json"
    command = ["verify", "--device", "cpu", "--cases", "2", "--jobs", "1", "--timeout", "3"]
    assert main([*command, "--output-json", str(file)]) == 1
    shown, found = capsys.readouterr().out, json.loads(file.read_text(), parse_constant=pytest.fail)
    rows = {(row["what"], row["impl"]): row for row in found["rows"]}
    state = {what: row["state"] for (what, impl), row in rows.items() if impl == "torch"}
    assert not found["ok"]
    assert state.pop("refuses") == "refused"
    assert state.pop("absent") == "FAIL"  # its torch half, which forgets to double
    assert rows["absent", "cuda"]["state"] == "absent"
    assert {what for what, how in state.items() if how == "ok"} == {"right", "last"}
    why = {what: rows[what, "torch"]["why"][0] for what in state if state[what] == "FAIL"}
    for what, word in {
        "wrong": "error / bound",
        "nan": "inf",
        "wavers": "second run",
        "raises": "no such shape",
        "spoils": "CUDA error",
        "writes": "wrote to its input",
        "dies": "SIGSEGV",
        "hangs": "longer than 3 s",
        "short": "inf",
    }.items():
        assert word in why[what], why[what]
        assert f"FAIL    {what}" in shown
    assert "2 of 12 rows keep their bounds on cpu" in shown
    # .0005 relative, where 1e-6 is allowed
    assert 400 < rows["wrong", "torch"]["error_over_bound"] < 600
    assert rows["right", "torch"]["ms"] > 0
    assert 0 < rows["right", "torch"]["percent_of_ceiling"] < 1e4
    assert main([*command, "--ops", "wrong,none"]) == 2
    assert "unknown op 'none'" in capsys.readouterr().err


# What a bare machine lacks: test tools, the parser of the training commands, the native extension,
# a network.
BARE = """
import socket, sys
sys.modules |= dict.fromkeys(("pytest", "_pytest", "hypothesis", "jsonargparse", "rich"))
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("fusedrl.kernels._C_"):
            raise ImportError(f"{name} is not on this machine")
sys.meta_path.insert(0, Absent())
def refused(*arguments, **named):
    raise OSError("no network")
socket.socket.connect = socket.getaddrinfo = refused
"""


def test_it_needs_neither_pytest_nor_the_extension_nor_a_network_nor_a_checkout(tmp_path):
    """Under the interpreter, which is what runs Triton where there is no GPU; from a folder that is
    no checkout."""
    (tmp_path / "sitecustomize.py").write_text(BARE)
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "TRITON_INTERPRET": "1"}
    program = (
        "import json, torch; from fusedrl.engine.tools.verify.report import verify_machine; "
        "print(json.dumps(verify_machine(torch.device('cpu'), ops=('token_kl',), cases=2, jobs=1)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["ok"], [row for row in found["rows"] if row["state"] == "FAIL"]
    ops = {row["impl"]: row["state"] for row in found["rows"] if row["what"] == "token_kl"}
    assert ops["cpp"] == "absent"
    assert ops["torch"] == "ok"
    assert ops.get("triton") in ("ok", None)
    assert [row["what"] for row in found["rows"] if row["impl"] == "engine"] == list(PROMISES)
    assert {row["what"] for row in found["rows"] if row["state"] == "refused"} == {
        "strict, float32",
        "strict, bfloat16",
    }


def test_a_row_whose_bits_depend_on_its_companions_is_seen():
    """The last row of many rounds another way, within the bound of its error."""
    entry = CATALOGUE["logprob"]

    def forward(x, s, impl):
        got = entry.forward(x, s, "torch")
        return {
            name: torch.cat([t[:-1], torch.nextafter(t[-1:], torch.zeros(()))])
            for name, t in got.items()
        }

    verdict = examine(replace(entry, forward=forward), entry.plain(N=33, grad=False), "cpp")
    assert verdict.companions == ["logp", "entropy"]
    assert max(verdict.worst.values()) <= 1
    assert len(verdict.faults()) == 2
    assert not examine(entry, entry.plain(N=33, grad=False), "torch").faults()


# ---- the engine's promises, each on something that breaks it -------------------------------------
def shifted(function):
    return lambda *arguments, **named: tuple(
        t + 1e-3 if t is not None else t for t in function(*arguments, **named)
    )


def broken_logprob(monkeypatch):
    monkeypatch.setattr(
        "fusedrl.engine.actor.linear_logprob",
        shifted(promises.HybridActor.logprobs.__globals__["linear_logprob"]),
    )


def broken_strict(monkeypatch):
    monkeypatch.setattr(
        "fusedrl.engine.actor.strict_logprob",
        shifted(promises.HybridActor.logprobs.__globals__["strict_logprob"]),
    )


def broken_weights(monkeypatch):
    """Another model, and no other reference."""
    reference = promises.reference()
    monkeypatch.setattr(promises, "reference", lambda: reference)
    monkeypatch.setattr(promises, "make", functools.partial(_other, promises.make))


def _other(make, *arguments, **named):
    actor = make(*arguments, **named)
    if torch.device(arguments[0]) == CPU and not named.get("strict"):
        with torch.no_grad():
            next(actor.parameters()).mul_(1.5)
    return actor


def broken_draws(monkeypatch):
    """Draws that follow the schedule."""
    monkeypatch.setattr(promises, "TIGHT", promises.ROOMY)
    calls = iter(range(100))
    make = promises.make
    monkeypatch.setattr(promises, "DRAWN", replace(promises.DRAWN, n=1))

    def other(*arguments, **named):
        actor = make(*arguments, **named)
        generate, seed = actor.generate, next(calls)
        actor.generate = lambda asked, params, **more: generate(
            asked, replace(params, seed=seed), **more
        )
        return actor

    monkeypatch.setattr(promises, "make", other)


@pytest.mark.parametrize("name", PROMISES)
def test_a_promise_holds(device, name):
    row = PROMISES[name](device)
    assert row["state"] == "ok" or (row["state"] == "refused" and row["why"]), row


@pytest.mark.parametrize(
    ("breaks", "names"),
    [
        (broken_logprob, ["sampler = trainer, float32", "sampler = trainer, bfloat16"]),
        (broken_strict, ["strict, float32", "strict, bfloat16"]),
        (broken_weights, ["greedy tokens = the CPU's"]),
        (broken_draws, ["more requests than slots", "captured steps = uncaptured"]),
    ],
    ids=["logprob", "strict", "weights", "draws"],
)
def test_a_promise_that_is_broken_shows(monkeypatch, breaks, names):
    breaks(monkeypatch)
    states = {name: PROMISES[name](CPU) for name in names}
    assert all(row["state"] in ("FAIL", "refused") and row["why"] for row in states.values()), (
        states
    )
    assert native.capability is None or not any(
        row["state"] == "refused" for row in states.values()
    )


def test_every_op_can_be_timed():
    """Or says nothing: what is slow to make is made as large as a GPU needs it only there."""
    with small_tiles():
        for name in ("advance_rows_", "kwise_ranking_loss"):
            entry = CATALOGUE[name]
            found = time_op(
                replace(entry, timed={kind: {"sizes": (4,) * 8} for kind in entry.timed}),
                "torch",
                CPU,
                1e10,
                1e10,
            )
            assert (name == "advance_rows_") == (found == {}), found
    for entry in CATALOGUE.values():
        for changes in entry.timed.values():
            assert set(changes) <= set(entry.levels), entry.op


def test_an_op_that_is_none():
    with pytest.raises(ConfigError, match="unknown op 'gea'"):
        report.verify_machine(CPU, ops=["gea"])


def test_no_oracle_is_left_in_the_tests():
    root = Path(__file__).resolve().parents[2]
    assert not (root / "kernels" / "grid.py").exists()
    assert not (root / "kernels" / "catalogue").exists()
