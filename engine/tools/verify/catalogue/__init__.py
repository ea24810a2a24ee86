"""Catalogue of every public op of fusedrl.kernels: its inputs, its definition, its bounds. The
tests of the grid, of properties and of the numerical contract run over this table.

To add an op, write its definition in ../definitions, one function that makes its inputs and one
`Entry`; `tests/kernels/test_contract.py` fails until every `Implementations` table has one:

    def _double(case, generator):
        x = floats(generator, case.N, 4, dtype=case.dtype)
        upstream = floats(generator, case.N, 4)
        return Problem({"x": x}, {"factor": case.factor}, {"y": upstream}, {}, 0)

    Entry(
        "double", double_op._IMPLS,
        # the first levels are the plain case
        levels={"N": (33, 0, 1, 127), "factor": (2.0, 0.5), "dtype": FLOATS},
        make=_double,
        forward=lambda x, s, impl: {"y": double(x["x"], **s, impl=impl)},
        definition=lambda x, s: {"y": definitions.double(x["x"], **s)},
        bounds=lambda problem, want: {"y": Bound(rtol=1e-6), "d x": Bound(rtol=1e-6, rounded=True)},
        wants=("x",),  # differentiated; leave out if nothing is
        triton={"N": (5, 0, 1)},  # smaller levels for the interpreter
        # changes to the plain case that make it worth timing
        timed={"cpu": {"N": 1 << 18}, "cuda": {"N": 1 << 22}},
    )

If an op's bound is the error of rounding, not a fixed number, `no_worse` makes the bounds. If a
bound is wider than the numerical contract, or not in it, a comment next to the bound gives the
reason and the measured error.
"""

from __future__ import annotations

import torch

from fusedrl.engine.tools.verify.grid import Entry

from . import advantages, cache, heads, layers, losses, rows

MODULES = [rows, heads, losses, advantages, layers, cache]
CATALOGUE = {
    entry.op: entry
    for module in MODULES
    for entry in vars(module).values()
    if isinstance(entry, Entry)
}


def pairs(device: torch.device | str = "cpu") -> list[tuple[str, str]]:
    """List (op, implementation) of all that can run on `device`."""
    return [(op, impl) for op, entry in CATALOGUE.items() for impl in entry.implementations(device)]
