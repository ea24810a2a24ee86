"""Ops on one layer of the paged cache: paged_attention, paged_prefill, rope_and_cache."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
from torch import Tensor

from fusedrl.engine.tools.verify import definitions
from fusedrl.engine.tools.verify.grid import Bound, Entry, Problem, Tensors
from fusedrl.kernels import kv_cache, paged_attention, paged_prefill

from .common import BF16, FLOATS, floats, laid_out, no_worse, peer_of, uniform


def _caches(blocks: int, heads: int, D: int, S: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return (k_cache, v_cache) filled with NaN."""
    return torch.full((blocks, heads, D, S), math.nan, dtype=dtype), torch.full(
        (blocks, heads, S, D), math.nan, dtype=dtype
    )


def _paged_problem(case: SimpleNamespace, generator: torch.Generator) -> Problem:
    """Make a problem whose blocks are assigned at random. Entries of the table and the caches that
    no row needs, also after a row's last position, hold invalid values."""
    B, (Hq, Hkv, D), S = len(case.lengths), case.heads, case.size
    needed = [-(-n // S) for n in case.lengths]
    k_cache, v_cache = _caches(sum(needed) + 2, Hkv, D, S, case.dtype)
    table = torch.full((B, max(needed, default=0) + 1), -1, dtype=torch.int32)
    deal, at = torch.randperm(sum(needed) + 2, generator=generator).int(), 0
    for b, (length, count) in enumerate(zip(case.lengths, needed, strict=True)):
        table[b, :count] = deal[at : at + count]
        at += count
        for p in range(length):
            block = int(table[b, p // S])
            k_cache[block, :, :, p % S], v_cache[block, :, p % S] = floats(
                generator, 2, Hkv, D, dtype=case.dtype
            ).unbind()
    x = {
        "q": laid_out(floats(generator, B, Hq, D, dtype=case.dtype), case.layout),
        "k_cache": k_cache,
        "v_cache": v_cache,
        "block_table": table,
        "context_lens": torch.tensor(case.lengths, dtype=torch.int32),
    }
    return Problem(x, {"window": case.window, "softcap": case.softcap})


def _paged_work(problem: Problem, got: Tensors) -> tuple[int, int]:
    """Count the work: keys and values that are attended to are read once for all query heads."""
    _, heads, D, _ = problem.x["k_cache"].shape
    tokens = int(problem.x["context_lens"].sum())
    return 2 * tokens * heads * D * problem.x["k_cache"].element_size() + 2 * problem.x[
        "q"
    ].nbytes, 4 * tokens * problem.x["q"].shape[1] * D


PAGED_ATTENTION = Entry(
    "paged_attention",
    paged_attention._IMPLS,
    {
        "lengths": ((5, 0, 20), (), (1,), (129, 2), (33,) * 9, (700, 1)),
        "heads": ((4, 2, 8), (3, 3, 18), (8, 1, 64)),
        "size": (16, 32, 64),
        "window": (None, 1, 17),
        "softcap": (None, 3.0),
        "dtype": FLOATS,
        "layout": ("plain", "misaligned"),
    },
    _paged_problem,
    forward=lambda x, s, impl: {"o": paged_attention.paged_attention(**x, **s, impl=impl)},
    definition=lambda x, s: {"o": definitions.paged_attention(**x, **s)},
    # Contract: at most twice what rounding costs, and 1e-5 (a rounding more in a narrow dtype).
    bounds=lambda problem, want: {
        "o": Bound(
            0.0,
            1e-5
            + no_worse(
                problem,
                want,
                peer_of(PAGED_ATTENTION, problem, problem.x["q"].dtype),
                1.0,
                1.0,
                2.0,
            )["o"].atol,
        )
    },
    cost=lambda case: sum(case.lengths) * case.heads[0] * case.heads[2],
    timed={
        "cpu": {"lengths": (256,) * 16, "heads": (8, 2, 64)},
        "cuda": {"lengths": (1024,) * 64, "heads": (32, 8, 128), "dtype": BF16},
    },
    work=_paged_work,
)


def _prefill_problem(case: SimpleNamespace, generator: torch.Generator) -> Problem:
    """Make a problem of the last tokens of some rows, behind the prefixes that are in the cache."""
    of_rows = _paged_problem(case, generator)
    rows: list[int] = []
    lens: list[int] = []
    for b, (length, count) in enumerate(zip(case.lengths, case.queries, strict=False)):
        lens += range(max(0, length - count) + 1, length + 1)
        rows += [b] * min(count, length)
    q = floats(generator, len(rows), case.heads[0], case.heads[2], dtype=case.dtype)
    x = of_rows.x | {
        "q": laid_out(q, case.layout),
        "rows": torch.tensor(rows, dtype=torch.int64),
        "context_lens": torch.tensor(lens, dtype=torch.int32),
    }
    return Problem(x, of_rows.settings)


def _query_by_query(x: dict, s: dict) -> Tensors:
    """Attend by the definition of paged_attention, each query over the blocks of its row."""
    x = dict(x)
    x["block_table"] = x["block_table"][x.pop("rows")]
    return {"o": definitions.paged_attention(**x, **s)}


PAGED_PREFILL = Entry(
    "paged_prefill",
    paged_prefill._IMPLS,
    {
        "lengths": ((9, 20, 5), (70,), (129, 2), (700, 33)),
        "queries": ((5, 17, 1), (33, 1), (0, 2), (1, 0)),
        "heads": ((4, 2, 8), (3, 3, 18), (8, 1, 64)),
        "size": (16, 32, 64),
        "window": (None, 1, 17),
        "softcap": (None, 3.0),
        "dtype": FLOATS,
        "layout": ("plain", "misaligned"),
    },
    _prefill_problem,
    forward=lambda x, s, impl: {"o": paged_prefill.paged_prefill(**x, **s, impl=impl)},
    definition=_query_by_query,
    # as paged_attention
    bounds=lambda problem, want: {
        "o": Bound(
            0.0,
            1e-5
            + no_worse(
                problem, want, peer_of(PAGED_PREFILL, problem, problem.x["q"].dtype), 1.0, 1.0, 2.0
            )["o"].atol,
        )
    },
    cost=lambda case: sum(case.queries) * max(case.lengths) * case.heads[0] * case.heads[2],
    timed={
        "cpu": {"lengths": (256,), "queries": (256,), "heads": (8, 2, 64)},
        "cuda": {
            "lengths": (1024,) * 8,
            "queries": (1024,) * 8,
            "heads": (32, 8, 128),
            "dtype": BF16,
        },
    },
    work=lambda problem, got: (
        2 * problem.x["q"].nbytes,
        4 * int(problem.x["context_lens"].sum()) * problem.x["q"].shape[1] * got["o"].shape[2],
    ),
)


def _rope_and_cache_problem(case: SimpleNamespace, generator: torch.Generator) -> Problem:
    N, (Hq, Hkv), D, S = case.N, case.heads, case.D, case.size
    blocks = N // S + 2
    k_cache, v_cache = _caches(blocks, Hkv, D, S, case.dtype)
    slots = torch.randperm(blocks * S, generator=generator)[:N]
    slots[2::3] = -1  # padding
    angles = 100 * uniform(generator, N, D // 2)
    x = {
        "qkv": laid_out(floats(generator, N, (Hq + 2 * Hkv) * D, dtype=case.dtype), case.layout),
        "cos": angles.cos(),
        "sin": angles.sin(),
        "k_cache": k_cache,
        "v_cache": v_cache,
        "slots": slots,
    }
    if case.norm:
        x |= {
            name: (1 + 0.3 * floats(generator, D)).to(case.dtype) for name in ("q_norm", "k_norm")
        }
    return Problem(x, {"num_heads": Hq})


def _rope_and_cache(x: dict, s: dict, impl: str | None) -> Tensors:
    """Run the op; return also the caches, to check that unwritten slots are still NaN."""
    return {
        "q": kv_cache.rope_and_cache(**x, **s, impl=impl),
        "k_cache": x["k_cache"],
        "v_cache": x["v_cache"],
    }


ROPE_AND_CACHE = Entry(
    "rope_and_cache",
    kv_cache._IMPLS,
    {
        "N": (7, 0, 1, 33, 127),
        "heads": ((3, 1), (1, 1), (8, 4)),
        "D": (8, 2, 34, 80, 128),
        "size": (16, 5, 64),
        "norm": (True, False),
        "dtype": FLOATS,
        "layout": ("plain", "padded", "misaligned"),
    },
    _rope_and_cache_problem,
    _rope_and_cache,
    definition=lambda x, s: definitions.rope_and_cache(**{"q_norm": None, "k_norm": None} | x, **s),
    bounds=lambda problem, want: no_worse(
        problem, want, peer_of(ROPE_AND_CACHE, problem, problem.x["qkv"].dtype), 1.0
    ),
    triton={"N": (5, 0, 1, 9)},
    writes=("k_cache", "v_cache"),
    cost=lambda case: case.N * case.D * (case.heads[0] + 2 * case.heads[1]),
    timed={
        "cpu": {"N": 2048, "heads": (8, 2), "D": 64},
        "cuda": {"N": 16384, "heads": (32, 8), "D": 128, "dtype": BF16},
    },
    work=lambda problem, got: (2 * problem.x["qkv"].nbytes + 2 * problem.x["cos"].nbytes, 0),
)
