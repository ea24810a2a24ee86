"""Layers and the decoder: rms_norm, rope, swiglu, fixed_linear, varlen_attention, decode_step."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fusedrl.engine.model import layer, step
from fusedrl.engine.tools.verify import definitions
from fusedrl.engine.tools.verify.grid import EPS, Bound, Entry, Problem, Tensors
from fusedrl.kernels import attention, fixed_linear, rms_norm, rope, swiglu

from .common import BF16, F16, F32, FLOATS, floats, laid_out, no_worse, peer_of, uniform

# ---- layers --------------------------------------------------------------------------------------


def _rms_norm_problem(case: SimpleNamespace, generator: torch.Generator) -> Problem:
    shape = (case.N, case.H) if case.heads == 0 else (case.N, case.heads, case.H)
    x = {
        "x": laid_out(
            (case.size * floats(generator, *shape) + case.offset).to(case.dtype), case.layout
        ),
        "weight": (1 + 0.3 * floats(generator, case.H)).to(case.dtype),
    }
    upstream = {"y": floats(generator, *shape, dtype=case.dtype)}
    if case.residual:
        x["residual"] = (case.size * floats(generator, *shape)).to(case.dtype)
        upstream["sum"] = floats(generator, *shape, dtype=case.dtype)
    return Problem(x, {"eps": 1e-5, "offset": case.weight_offset}, upstream)


def _rms_norm(x: dict, s: dict, impl: str | None) -> Tensors:
    result = rms_norm.rms_norm(**x, **s, impl=impl)
    return dict(zip(("y", "sum"), result, strict=True)) if "residual" in x else {"y": result}


def _rms_norm_definition(x: dict, s: dict) -> Tensors:
    total = x["x"] + x["residual"] if "residual" in x else x["x"]
    y = definitions.rms_norm(total, x["weight"], s["eps"], s["offset"])
    return {"y": y, "sum": total} if "residual" in x else {"y": y}


def _rms_norm_bounds(problem: Problem, want: Tensors) -> dict[str, Bound]:
    """Return the bounds. With a single value per row, the terms of its gradient cancel, so only
    their rounding is left. The weight's gradient is a float32 sum over rows of terms of size 1."""
    bounds = no_worse(
        problem,
        want,
        peer_of(RMS_NORM, problem, problem.x["x"].dtype),
        4.0 if problem.x["x"].shape[-1] <= 2 else 0.0,
        2.0,
    )
    summed, rows = bounds["d weight"], problem.x["x"].shape[:-1].numel()
    return bounds | {"d weight": Bound(summed.rtol, summed.atol + 16 * EPS * math.sqrt(rows))}


RMS_NORM = Entry(
    "rms_norm",
    rms_norm._IMPLS,
    {
        "N": (7, 0, 1, 33, 127, 4096),
        "H": (33, 1, 2, 31, 128, 1023, 2051),
        "heads": (0, 2),
        "dtype": FLOATS,
        "residual": (True, False),
        "size": (1.0, 1e-4, 1e3),
        "offset": (0.0, 100.0),
        "weight_offset": (0.0, 1.0),
        "layout": ("plain", "padded", "misaligned"),
    },
    _rms_norm_problem,
    _rms_norm,
    _rms_norm_definition,
    _rms_norm_bounds,
    ("x", "weight", "residual"),
    {"N": (7, 0, 1, 9)},
    cost=lambda case: case.N * case.H * max(1, case.heads),
    fits=lambda case: case.N * case.H * max(1, case.heads) <= 1 << 21,
    timed={"cpu": {"N": 2048, "H": 1536}, "cuda": {"N": 16384, "H": 4096, "dtype": BF16}},
)


def _rope_problem(case: SimpleNamespace, generator: torch.Generator) -> Problem:
    Hq, Hkv = case.heads
    q, k = (
        laid_out(floats(generator, case.N, h, case.D, dtype=case.dtype), case.layout)
        for h in (Hq, Hkv)
    )
    angles = 100 * uniform(generator, case.N, case.D // 2)
    return Problem(
        {"q": q, "k": k, "cos": angles.cos(), "sin": angles.sin()},
        {},
        {
            "q": floats(generator, case.N, Hq, case.D, dtype=case.dtype),
            "k": floats(generator, case.N, Hkv, case.D, dtype=case.dtype),
        },
    )


ROPE = Entry(
    "rope",
    rope._IMPLS,
    {
        "N": (7, 0, 1, 33, 127),
        "heads": ((3, 1), (1, 1), (8, 4), (20, 2)),
        "D": (8, 2, 34, 80, 128),
        "dtype": FLOATS,
        "layout": ("plain", "padded", "misaligned"),
    },
    _rope_problem,
    forward=lambda x, s, impl: dict(zip("qk", rope.rope(**x, impl=impl), strict=True)),
    definition=lambda x, s: {name: definitions.rope(x[name], x["cos"], x["sin"]) for name in "qk"},
    bounds=lambda problem, want: no_worse(
        problem, want, peer_of(ROPE, problem, problem.x["q"].dtype)
    ),
    wants=("q", "k"),
    triton={"N": (5, 0, 1, 9)},
    cost=lambda case: case.N * case.D * sum(case.heads),
    timed={
        "cpu": {"N": 2048, "heads": (12, 2), "D": 128},
        "cuda": {"N": 16384, "heads": (32, 8), "D": 128, "dtype": BF16},
    },
)


def _swiglu_problem(case: SimpleNamespace, generator: torch.Generator) -> Problem:
    return Problem(
        {
            "gate_up": laid_out(
                (case.size * floats(generator, case.N, 2 * case.F)).to(case.dtype), case.layout
            )
        },
        {},
        {"y": floats(generator, case.N, case.F, dtype=case.dtype)},
    )


SWIGLU = Entry(
    "swiglu",
    swiglu._IMPLS,
    {
        "N": (7, 0, 1, 33, 127),
        "F": (33, 1, 31, 1023, 1025),
        "size": (1.0, 1e-4, 100.0),
        "dtype": FLOATS,
        "layout": ("plain", "padded", "misaligned"),
    },
    _swiglu_problem,
    forward=lambda x, s, impl: {"y": swiglu.swiglu(x["gate_up"], impl=impl)},
    definition=lambda x, s: {"y": definitions.mlp_hidden(x["gate_up"], "silu", gated=True)},
    bounds=lambda problem, want: no_worse(
        problem, want, peer_of(SWIGLU, problem, problem.x["gate_up"].dtype)
    ),
    wants=("gate_up",),
    triton={"N": (5, 0, 1, 9)},
    # their products overflow float16
    cost=lambda case: case.N * case.F,
    fits=lambda case: case.dtype != F16 or case.size < 100,
    timed={"cpu": {"N": 2048, "F": 4864}, "cuda": {"N": 16384, "F": 8192, "dtype": BF16}},
)


def _rows_problem(case: SimpleNamespace, generator: torch.Generator) -> Problem:
    width = case.F * (2 if case.gated else 1)
    return Problem(
        {"x": (case.size * floats(generator, case.N, width)).to(case.dtype)},
        {"activation": case.activation, "gated": case.gated},
        {},
    )


ACTIVATE_ROWS = Entry(
    "activate_rows",
    swiglu._ROWS_IMPLS,
    {
        "N": (5, 0, 1, 9),
        "F": (33, 1, 31, 1025),
        "activation": ("silu", "gelu", "gelu_tanh"),
        "gated": (True, False),
        "size": (1.0, 1e-4, 100.0),
        "dtype": FLOATS,
    },
    _rows_problem,
    forward=lambda x, s, impl: {"y": swiglu.activate_rows(x["x"], **s)},
    definition=lambda x, s: {"y": definitions.mlp_hidden(x["x"], s["activation"], s["gated"])},
    bounds=lambda problem, want: no_worse(
        problem, want, peer_of(ACTIVATE_ROWS, problem, problem.x["x"].dtype)
    ),
    cost=lambda case: case.N * case.F,
    fits=lambda case: case.dtype != F16 or case.size < 100,
    timed={"cuda": {"N": 16384, "F": 8192, "dtype": BF16}},
)  # their products overflow float16


def _attention_problem(case: SimpleNamespace, generator: torch.Generator) -> Problem:
    N, (Hq, Hkv, D) = sum(case.lengths), case.heads
    x = {
        name: laid_out(floats(generator, N, h, D, dtype=case.dtype), case.layout)
        for name, h in (("q", Hq), ("k", Hkv), ("v", Hkv))
    }
    x["cu_seqlens"] = torch.tensor([0, *case.lengths]).cumsum(0).int()
    return Problem(
        x,
        {"max_length": max(case.lengths, default=0), "causal": case.causal, "window": case.window},
        {"o": floats(generator, N, Hq, D, dtype=case.dtype)},
    )


def _attention_work(problem: Problem, got: Tensors) -> tuple[int, int]:
    """Count the work of a causal attention: two products for each pair of positions that attend,
    and five in the backward."""
    _, Hq, D = problem.x["q"].shape
    seen = sum(n * (n + 1) // 2 for n in problem.x["cu_seqlens"].diff().tolist())
    return sum(problem.x[name].nbytes for name in "qkv") + sum(
        t.nbytes for t in got.values()
    ), 7 * 2 * seen * Hq * D


VARLEN_ATTENTION = Entry(
    "varlen_attention",
    attention._IMPLS,
    {
        "lengths": ((5, 0, 9, 1), (), (0,), (1,), (127, 1, 129), (33,) * 4),
        "heads": ((4, 2, 8), (3, 3, 18), (5, 1, 1)),
        "causal": (True, False),
        "window": (None, 1, 4, 100),
        "dtype": FLOATS,
        "layout": ("plain", "padded", "misaligned"),
    },
    _attention_problem,
    forward=lambda x, s, impl: {"o": attention.varlen_attention(**x, **s, impl=impl)},
    definition=lambda x, s: {
        "o": definitions.varlen_attention(**x, causal=s["causal"], window=s["window"])
    },
    # Count the largest value as at least 8: if a token attends only to itself, the gradients of q
    # and k are 0, but terms that cancel leave their rounding.
    bounds=lambda problem, want: no_worse(
        problem, want, peer_of(VARLEN_ATTENTION, problem, problem.x["q"].dtype), 8.0, 2.0, 2.0
    ),
    wants=("q", "k", "v"),
    triton={"lengths": ((5, 0, 9, 1), (), (0,), (1,)), "heads": ((2, 1, 8), (3, 3, 18))},
    cost=lambda case: sum(n * n for n in case.lengths),
    timed={
        "cpu": {"lengths": (300,) * 8, "heads": (8, 2, 64)},
        "cuda": {"lengths": (1024,) * 8, "heads": (32, 8, 128), "dtype": BF16},
    },
    work=_attention_work,
)


def _linear_problem(case: SimpleNamespace, generator: torch.Generator) -> Problem:
    x = {
        "x": laid_out(floats(generator, case.N, case.K, dtype=case.dtype), case.layout),
        "weight": floats(generator, case.O, case.K, dtype=case.dtype),
    }
    return Problem(
        x | ({"bias": floats(generator, case.O, dtype=case.dtype)} if case.bias else {}), {}
    )


FIXED_LINEAR = Entry(
    "fixed_linear",
    fixed_linear._IMPLS,
    {
        "N": (33, 0, 1, 64, 130),
        "K": (70, 0, 1, 256, 257, 1100),
        "O": (37, 1, 32, 300),
        "bias": (True, False),
        "dtype": (F32, BF16),
        "layout": ("plain", "padded", "misaligned"),
    },
    _linear_problem,
    forward=lambda x, s, impl: {"y": fixed_linear.fixed_linear(**x, impl=impl)},
    definition=lambda x, s: {"y": definitions.linear(x["x"], x["weight"], x.get("bias"))},
    # For a single row, BLAS sums in many parts and has little error; C++ always sums in the same
    # order: K roundings, each of half an eps.
    bounds=lambda problem, want: {
        "y": Bound(
            0.0,
            EPS / 2 * problem.x["x"].shape[1]
            + no_worse(problem, want, peer_of(FIXED_LINEAR, problem, F32), 4.0, 2.0, 2.0)["y"].atol,
        )
    },
    cost=lambda case: case.N * case.K * case.O // 64,
    timed={
        "cpu": {"N": 256, "K": 896, "O": 896},
        "cuda": {"N": 4096, "K": 4096, "O": 4096, "dtype": BF16},
    },
    work=lambda problem, got: (
        sum(t.nbytes for t in (*problem.x.values(), *got.values())),
        2 * problem.x["x"].numel() * problem.x["weight"].shape[0],
    ),
)


# What families change: options, the norms that there are, and how positions are told.
_FAMILIES: dict[str, dict] = {
    "llama": {},
    "gemma": {
        "options": {
            "attention_scale": 0.3,
            "attention_softcap": 2.0,
            "embedding_scale": 4.5,
            "norm_offset": 1.0,
            "activation": "gelu_tanh",
        },
        "behind": True,
    },
    "olmo": {"before": False, "behind": True, "together": True},
    "smollm": {"ropes": (0, -1), "pairs": 3},
    "gpt2": {
        "layer_norm": True,
        "learned": True,
        "gated": False,
        "ropes": (-1, -1),
        "options": {"activation": "gelu"},
    },
    "neox": {
        "layer_norm": True,
        "gated": False,
        "pairs": 2,
        "options": {"activation": "gelu_tanh", "parallel": True},
    },
}


_PLAIN: dict[str, Any] = {
    "options": {},
    "before": True,
    "behind": False,
    "together": False,
    "layer_norm": False,
    "learned": False,
    "gated": True,
    "ropes": (0, 0),
}


def _decode_problem(case: SimpleNamespace, generator: torch.Generator) -> Problem:
    heads, kv_heads, D, H, F, V, L, S = 4, 2, 8, 20, 27, 31, 2, 16
    family = _PLAIN | {"pairs": D // 2} | _FAMILIES[case.family]
    up = 2 * F if family["gated"] else F

    def rand(*shape: int) -> Tensor:
        return (floats(generator, *shape) * shape[-1] ** -0.5).to(case.dtype)

    def norm(size: int, present: bool = True) -> Tensor | None:
        return (
            (1 - family["options"].get("norm_offset", 0.0) + 0.2 * floats(generator, size)).to(
                case.dtype
            )
            if present
            else None
        )

    def bias(size: int, present: bool) -> Tensor | None:
        return rand(size) if present else None

    q_heads, k_heads = (heads, kv_heads) if family["together"] else (1, 1)
    layers = tuple(
        layer.LayerWeights(
            norm(H, family["before"]),
            rand((heads + 2 * kv_heads) * D, H),
            bias((heads + 2 * kv_heads) * D, case.bias),
            norm(q_heads * D, case.bias),
            norm(k_heads * D, case.bias),
            rand(H, heads * D),
            bias(H, case.bias),
            norm(H, family["before"]),
            rand(up, H),
            bias(up, case.bias),
            rand(H, F),
            bias(H, case.bias),
            case.window,
            norm(H, family["behind"]),
            norm(H, family["behind"]),
            at,
            bias(H, family["layer_norm"]),
            bias(H, family["layer_norm"]),
        )
        for at in family["ropes"]
    )
    embedding, pairs = rand(V, H), family["pairs"]
    weights = step.DecoderWeights(
        embedding,
        layers,
        norm(H),
        embedding,
        rope.RopeTable(1.0 / 100.0 ** (torch.arange(pairs) / pairs)),
        *(heads, kv_heads, D, 1e-5),
        layer.Options(**family["options"]),
        rand(64, H) if family["learned"] else None,
        bias(H, family["layer_norm"]),
    )
    if case.adapter:
        weights = weights._replace(adapter=_adapter(rand, heads * D, kv_heads * D, H, F, up, L))
    return Problem(_decode_inputs(case, generator, weights, V, S), {"weights": weights})


def _adapter(
    rand: Callable[..., Tensor], q: int, kv: int, H: int, F: int, up: int, L: int
) -> step.Adapter:
    """Make an adapter of q, v, the output, the upper half of up, and down."""
    slices = ((0, 0, q), (0, q + kv, kv), (1, 0, H), (2, up - F, F), (3, 0, H))
    adapters = tuple(
        (
            rand(6, H),
            rand(q + kv, 3),
            rand(3, q),
            rand(H, 3),
            rand(3, H),
            rand(F, 3),
            rand(3, F),
            rand(H, 3),
        )
        for _ in range(L)
    )
    return step.Adapter(adapters, slices, 0.5)


def _decode_inputs(
    case: SimpleNamespace,
    generator: torch.Generator,
    weights: step.DecoderWeights,
    V: int,
    S: int,
) -> Tensors:
    """Make the tokens of a step and the paged cache that the step writes to."""
    # Every sequence starts at its first position, with all its tokens in one call. Blocks are
    # assigned at random; the rest of the table and of the cache holds invalid values.
    positions = (
        torch.cat([torch.arange(n) for n in case.lengths])
        if case.lengths
        else torch.zeros(0, dtype=torch.int64)
    )
    rows = torch.repeat_interleave(
        torch.arange(len(case.lengths)), torch.tensor(case.lengths, dtype=torch.int64)
    )
    needed = [-(-n // S) for n in case.lengths]
    table = torch.full(
        (max(1, len(case.lengths)), max(needed, default=0) + 1), -1, dtype=torch.int32
    )
    deal, at = torch.randperm(sum(needed) + 2, generator=generator).int(), 0
    for b, count in enumerate(needed):
        table[b, :count] = deal[at : at + count]
        at += count
    k_cache, v_cache = step.allocate_cache(weights, sum(needed) + 2, S)
    return {
        "token_ids": torch.randint(0, V, (len(positions),), generator=generator),
        "positions": positions,
        "rows": rows,
        "block_table": table,
        "k_cache": k_cache.fill_(math.nan),
        "v_cache": v_cache.fill_(math.nan),
        "out_slots": torch.arange(len(positions))[::2].contiguous(),
    }


def _decode(x: dict, s: dict, impl: str | None) -> Tensors:
    """Run the op; return also the caches, to check that unwritten slots are still NaN."""
    return {
        "hidden": step.decode_step(s["weights"], **x, impl=impl),
        "k_cache": x["k_cache"],
        "v_cache": x["v_cache"],
    }


def _decode_bounds(problem: Problem, want: Tensors) -> dict[str, Bound]:
    """Return bounds of twice the error of rounding, or three times if only the outputs of attention
    and MLP are normalised, which may be tiny (one case of the grid has 1.1 times the bound of
    twice)."""
    behind = problem.settings["weights"].layers[0].input_norm is None
    dtypes = {
        "hidden": problem.settings["weights"].embedding.dtype,
        "k_cache": problem.x["k_cache"].dtype,
        "v_cache": problem.x["v_cache"].dtype,
    }
    return no_worse(
        problem, want, peer_of(DECODE_STEP, problem, dtypes), 1.0, 4.0, 3.0 if behind else 2.0
    )


DECODE_STEP = Entry(
    "decode_step",
    step._IMPLS,
    {
        "lengths": ((5, 1, 20), (), (1,), (33, 2), (1,) * 33),
        "bias": (True, False),
        "window": (0, 3, 17),
        "adapter": (False, True),
        "family": tuple(_FAMILIES),
        "dtype": (F32, BF16),
    },
    _decode_problem,
    _decode,
    lambda x, s: definitions.decode_step(**x, **s),
    _decode_bounds,
    writes=("k_cache", "v_cache"),
    triton={"lengths": ((3, 1), (), (1,), (5,))},
    cost=lambda case: sum(case.lengths) * 1000,
)
