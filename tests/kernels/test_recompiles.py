"""Lengths and coefficients are run-time arguments: no Triton kernel is compiled anew for another
one.

Under the interpreter nothing is compiled, and a launch needs a GPU. So a process without the
interpreter runs the launchers as they are and stops each launch at `JITFunction.run`, where Triton
looks into its cache: the key is the one that Triton's own binder gives for the arguments on an H100
(types, the constexprs' values, and which integers are 1 or divisible by 16, which pointers are
aligned to 16 bytes). Two things are replaced: dispatch is told that Triton may serve CPU tensors,
and memory comes zeroed, because no kernel writes to it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fusedrl.engine.tools.verify.catalogue import pairs

pytest.importorskip("triton")
pytestmark = pytest.mark.cpu_only("keys of Triton's cache, without a launch")

SCRIPT = """
import dataclasses, json, sys
sys.path[:0] = {path!r}
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime import jit
from fusedrl.kernels.runtime import dispatch
from fusedrl.kernels.objective import PolicyObjective

torch.set_num_threads(1)
torch.empty, torch.empty_like = torch.zeros, torch.zeros_like
torch.Tensor.new_empty = torch.Tensor.new_zeros
dispatch._WHY_NOT["triton", "cpu"] = None
backend, binders, keys = make_backend(GPUTarget("cuda", 90, 32)), {{}}, set()

def lookup(self, *args, grid, warmup, **kwargs):
    if self not in binders:
        binders[self] = jit.create_function_from_signature(self.signature, self.params, backend)
    _, specialization, options = binders[self](*args, **kwargs)
    name = f"{{self.__module__}}.{{self.__name__}}"
    keys.add(f"{{name}} {{specialization}} {{sorted(options.items())}}")

jit.JITFunction.run = lookup
from fusedrl.engine.tools.verify.catalogue import CATALOGUE, pairs
from fusedrl.engine.tools.verify.grid import run

# 20 lengths of every kind: 1, multiples of 16, odd, even; below, at and beyond tiles.
LENGTHS = [2, 3, 7, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 100, 127, 128, 129, 160, 200, 255]
report = {{}}
for op in {ops!r}:
    entry, rounds = CATALOGUE[op], []
    for extra, scale in ((0, 1.0), (16 * 67, 0.93)):  # the same residues, and other coefficients
        keys.clear()
        for i, length in enumerate(LENGTHS):
            length += extra
            changes = {{"N": length}} if "N" in entry.levels else {{}}
            if "V" in entry.levels:
                changes["V"] = LENGTHS[(7 * i) % 20] + extra
            if "shape" in entry.levels:
                packed = ("packed", (length, 3, 0, length))
                changes["shape"] = packed if i % 2 else ("padded", (3, length))
            if "lengths" in entry.levels:
                changes["lengths"] = (length, 1, 3)
            if "sizes" in entry.levels:
                changes["sizes"] = (2,) * length
            if op == "group_normalize":
                changes["N"], changes["groups"] = 4 * length, "ids"
            problem = entry.problem(entry.plain(**changes))
            settings = {{name: value * scale if isinstance(value, float) else value
                        for name, value in problem.settings.items()}}
            if scale != 1.0 and "objective" in settings:
                settings["objective"] = PolicyObjective(clip_low=0.1, clip_high=0.3)
            run(entry, dataclasses.replace(problem, settings=settings, period=0), "triton")
        rounds.append(set(keys))
    report[op] = [sorted(rounds[0]), sorted(rounds[1] - rounds[0])]
# One that does compile again: the width of a feed-forward layer is a constexpr.
keys.clear()
for width in (8, 24, 40):
    entry = CATALOGUE["swiglu"]
    run(entry, entry.problem(entry.plain(F=width)), "triton")
report["widths"] = [sorted(keys), []]
print(json.dumps(report))
"""
# variants a kernel of one op: integers that are 1, divisible by 16 or neither; seen are at most 2
MOST = 4


@pytest.fixture(scope="module")
def report():
    ops = [op for op, impl in pairs() if impl == "triton"]
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in ("TRITON_INTERPRET", "FUSEDRL_IMPL")
    }
    code = SCRIPT.format(path=[str(Path(__file__).parent), *(p for p in sys.path if p)], ops=ops)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("op", [op for op, impl in pairs() if impl == "triton"])
def test_another_length_compiles_nothing(report, op):
    first, added = report[op]
    assert first, "no kernel was launched"
    assert not added, "compiled again for longer inputs or other coefficients:\n" + "\n".join(added)
    kernels = {key.split(" ")[0] for key in first}
    for kernel in kernels:
        assert sum(key.split(" ")[0] == kernel for key in first) <= MOST, "\n".join(
            key for key in first if key.startswith(kernel)
        )


def test_a_constexpr_is_seen(report):
    keys, _ = report["widths"]
    assert len({key.split(" ")[0] for key in keys}) == 2
    assert len(keys) == 2 * 3
