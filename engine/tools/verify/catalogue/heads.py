"""Ops that apply a head to hidden states: linear_logprob, linear_full_kl, linear_policy_loss."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
from torch import Tensor

from fusedrl.engine.tools.verify import definitions
from fusedrl.engine.tools.verify.grid import Bound, Entry, Problem, Tensors
from fusedrl.kernels import full_kl, linear_full_kl, linear_logprob, linear_policy_loss

from .common import BF16, F32, FLOATS, floats, laid_out, uniform
from .losses import (
    CORRECTIONS,
    KL_TERMS,
    OBJECTIVES,
    TOKEN_LEVELS,
    defined_stats,
    policy_settings,
    stats_of,
    token_columns,
)
from .rows import csr


# ---- heads ---------------------------------------------------------------------------------------
def _head(case: SimpleNamespace, generator: torch.Generator) -> tuple[dict, dict, Tensor]:
    """Return the tensors and settings that the three linear ops share, and a mask of the live
    rows."""
    N, H, V, dtype = case.N, case.H, case.V, case.dtype
    hidden, weight = floats(generator, N, H), 2 * floats(generator, V, H) / math.sqrt(H)
    live = uniform(generator, N) < {"all": 2.0, "random": 0.7, "none": -1.0}[case.mask]
    hidden = laid_out(
        hidden.to(dtype).masked_fill(~live[:, None], math.nan),
        case.layout if case.layout != "transposed" else "plain",
    )
    weight = (
        laid_out(weight.to(dtype), case.layout) if case.layout != "misaligned" else weight.to(dtype)
    )
    x = {"hidden": hidden, "weight": weight} | (
        {"bias": floats(generator, V, dtype=dtype)} if case.bias else {}
    )
    rows = case.workspace
    return x, {"workspace_bytes": None if rows is None else 4 * rows * V}, live


def _spread(problem: Problem) -> float:
    """Return the largest absolute logit; the products' rounding error is proportional to it."""
    hidden, weight = problem.x["hidden"].float().nan_to_num(), problem.x["weight"].float()
    return max(1.0, float((hidden @ weight.t()).abs().max())) if hidden.numel() else 1.0


def _head_bounds(problem: Problem, want: Tensors, per_row: tuple[str, ...]) -> dict[str, Bound]:
    """Return the contract's bounds: atol 1e-5 max |z|, rtol 1e-5 sqrt(H / 1024). Narrow inputs are
    widened before the products, so outputs have float32's bounds, and gradients those plus one
    rounding."""
    H, dtype = problem.x["hidden"].shape[1], problem.x["hidden"].dtype
    atol, rtol = 1e-5 * _spread(problem), 1e-5 * max(1.0, math.sqrt(H / 1024))
    bounds = {name: Bound(rtol, atol) for name in per_row}
    for name in want:
        if name.startswith("d "):
            size = max(1.0, float(want[name].abs().max())) if want[name].numel() else 1.0
            bounds[name] = (
                Bound(rtol, atol * size)
                if dtype == F32
                else Bound(torch.finfo(dtype).eps, 1e-4 * size, rounded=True)
            )
    return bounds


_HEAD_LEVELS = {
    "N": (7, 0, 1, 33, 127),
    "H": (16, 5, 64, 300),
    "V": (33, 2, 31, 1023, 1025, 32000),
    "dtype": FLOATS,
    "bias": (False, True),
    "mask": ("random", "all", "none"),
    "layout": ("plain", "padded", "misaligned", "transposed"),
    "workspace": (None, 1, 3),
    "temperature": (1.0, 0.7, "by row"),
}
_HEAD_TRITON = {"N": (7, 0, 1, 9), "H": (16, 5, 64), "V": (33, 2, 31, 129)}


def _fits_head(case: SimpleNamespace) -> bool:
    return case.V <= 1025 or (case.N <= 33 and case.H <= 64 and case.workspace is None)


def _head_cost(case: SimpleNamespace) -> int:
    return case.N * case.V * (8 if case.workspace else 1)


_TIMED_HEAD = {
    "cpu": {"N": 256, "H": 256, "V": 8192, "mask": "all"},
    "cuda": {"N": 2048, "H": 1024, "V": 32000, "mask": "all", "dtype": BF16},
}


def _head_work(problem: Problem, got: Tensors) -> tuple[int, int]:
    """Count the products: the policy's forward, twice as much for its backward, and the reference's
    forward."""
    (N, H), V = problem.x["hidden"].shape, problem.x["weight"].shape[0]
    moved = sum(
        problem.x[name].nbytes
        for name in ("hidden", "weight", "ref_hidden", "ref_weight")
        if name in problem.x
    )
    reference = problem.x["ref_hidden"].shape[1] if "ref_hidden" in problem.x else 0
    return moved + sum(t.nbytes for t in got.values()), 2 * N * V * (3 * H + reference)


def _by_row(case: SimpleNamespace, generator: torch.Generator, x: dict, settings: dict) -> None:
    if case.temperature == "by row":
        x["temperature"] = 0.3 + 2 * uniform(generator, case.N)
    else:
        settings["temperature"] = case.temperature


def _linear_logprob_problem(case: SimpleNamespace, generator: torch.Generator) -> Problem:
    x, settings, live = _head(case, generator)
    x["token_ids"] = torch.where(
        live, torch.randint(0, case.V, (case.N,), generator=generator), -100
    )
    _by_row(case, generator, x, settings)
    if case.kept:
        # every third row lists nothing; all labels but the first were kept
        kept = uniform(generator, case.N, case.V) < 0.3
        kept[1:].scatter_(1, x["token_ids"][1:, None].clamp(min=0), True)
        kept[::3] = False
        x["kept"] = kept
    g, h = floats(generator, case.N), floats(generator, case.N)
    g[3:5], h[3:5] = 0.0, 0.0  # rows that no gradient reaches
    return Problem(
        x,
        settings | {"softcap": case.softcap},
        {"logp": g, "entropy": h},
        {"hidden": ~live[:, None]},
    )


def _linear_logprob(x: dict, s: dict, impl: str | None) -> Tensors:
    x = x | ({"kept": csr(x["kept"])} if "kept" in x else {})
    logp, entropy = linear_logprob.linear_logprob(**x, **s, entropy=True, impl=impl)
    return {"logp": logp, "entropy": entropy}


def _linear_logprob_definition(x: dict, s: dict) -> Tensors:
    T = x.get("temperature", s.get("temperature"))
    logp, entropy = definitions.linear_logprob(
        x["hidden"], x["weight"], x["token_ids"], x.get("bias"), T, s["softcap"], x.get("kept")
    )
    return {"logp": logp, "entropy": entropy}


LINEAR_LOGPROB = Entry(
    "linear_logprob",
    linear_logprob._IMPLS,
    _HEAD_LEVELS | {"softcap": (None, 3.0), "kept": (False, True)},
    _linear_logprob_problem,
    _linear_logprob,
    _linear_logprob_definition,
    lambda problem, want: _head_bounds(problem, want, ("logp", "entropy")),
    ("hidden", "weight", "bias"),
    _HEAD_TRITON,
    _fits_head,
    _head_cost,
    timed=_TIMED_HEAD,
    work=_head_work,
)


def _linear_full_kl_problem(case: SimpleNamespace, generator: torch.Generator) -> Problem:
    x, settings, live = _head(case, generator)
    H_ref = case.H + case.wider
    x["ref_hidden"] = floats(generator, case.N, H_ref, dtype=case.dtype).masked_fill(
        ~live[:, None], math.nan
    )
    x["ref_weight"] = (2 * floats(generator, case.V, H_ref) / math.sqrt(H_ref)).to(case.dtype)
    if case.mask != "all":
        x["mask"] = live
    g = floats(generator, case.N)
    g[3:5] = 0.0
    settings["workspace_bytes"] = settings["workspace_bytes"] and 2 * settings["workspace_bytes"]
    return Problem(
        x,
        settings | {"temperature": case.temperature, "direction": case.direction},
        {"kl": g},
        dict.fromkeys(("hidden", "ref_hidden"), ~live[:, None]),
    )


LINEAR_FULL_KL = Entry(
    "linear_full_kl",
    linear_full_kl._IMPLS,
    _HEAD_LEVELS | {"wider": (0, 3), "direction": full_kl.DIRECTIONS, "temperature": (1.0, 0.7)},
    _linear_full_kl_problem,
    forward=lambda x, s, impl: {"kl": linear_full_kl.linear_full_kl(**x, **s, impl=impl)},
    definition=lambda x, s: {
        "kl": definitions.linear_full_kl(
            x["hidden"],
            x["weight"],
            x["ref_hidden"],
            x["ref_weight"],
            x.get("bias"),
            x.get("mask"),
            s["temperature"],
            s["direction"],
        )
    },
    bounds=lambda problem, want: _head_bounds(problem, want, ("kl",)),
    wants=("hidden", "weight", "bias"),
    triton=_HEAD_TRITON,
    fits=_fits_head,
    cost=_head_cost,
    timed=_TIMED_HEAD,
    work=_head_work,
)


def _linear_policy_problem(case: SimpleNamespace, generator: torch.Generator) -> Problem:
    x, settings, _ = _head(SimpleNamespace(**{**vars(case), "mask": "all"}), generator)
    x["token_ids"] = torch.randint(0, case.V, (case.N,), generator=generator)
    _by_row(case, generator, x, settings)
    T = x.get("temperature", settings.get("temperature"))
    bias = x["bias"].float() if "bias" in x else None
    logp, _ = definitions.linear_logprob(
        x["hidden"].float(), x["weight"].float(), x["token_ids"], bias, T, None
    )
    columns, live = token_columns(
        SimpleNamespace(**{**vars(case), "layout": "plain"}), generator, logp
    )
    del columns["logp"]
    x["hidden"][~live], x["token_ids"][~live] = math.nan, 10**9
    settings |= policy_settings(case, columns)
    hidden = {"hidden": ~live[:, None]} | {
        name: ~live for name in columns if name not in ("weights", "cu_seqlens")
    }
    return Problem(x | columns, settings, {"loss": torch.tensor(1.5)}, hidden)


def _linear_policy(x: dict, s: dict, impl: str | None) -> Tensors:
    found = linear_policy_loss.linear_policy_loss(**x, **s, impl=impl)
    return stats_of(found.loss, found.stats) | {"logp": found.logp, "entropy": found.entropy}


def _linear_policy_definition(x: dict, s: dict) -> Tensors:
    s = {name: value for name, value in s.items() if name != "workspace_bytes"}
    *loss, logp, entropy = definitions.linear_policy_loss(**{"bias": None} | s | x)
    return defined_stats(*loss) | {"logp": logp, "entropy": entropy}


def _linear_policy_bounds(problem: Problem, want: Tensors) -> dict[str, Bound]:
    """Return the heads' bounds, scaled: the gradient's coefficients multiply errors by the
    advantages, and the loss is a sum over rows."""
    advantages, dtype = problem.x["advantages"].nan_to_num(), problem.x["hidden"].dtype
    size = 1.0 + (float(advantages.abs().max()) if advantages.numel() else 0.0)
    atol = 2e-5 * _spread(problem) * size
    bounds = {
        name: Bound(1e-5, atol * len(advantages) if name in ("loss", "0.loss") else atol)
        for name in want
    }
    for name in (
        name for name in want if name.startswith("d ") and dtype != F32 and want[name].numel()
    ):
        bounds[name] = Bound(
            torch.finfo(dtype).eps,
            1e-4 * size * max(1.0, float(want[name].abs().max())),
            rounded=True,
        )
    return bounds


LINEAR_POLICY_LOSS = Entry(
    "linear_policy_loss",
    linear_policy_loss._IMPLS,
    _HEAD_LEVELS
    | {
        "mask": TOKEN_LEVELS["mask"],
        "apart": (0.5, 0.0),
        "advantages": ("normal", "0", "+-1"),
        "objective": tuple(OBJECTIVES),
        "kl": KL_TERMS,
        "correction": CORRECTIONS,
        "entropy_coef": (0.05, 0.0),
    },
    _linear_policy_problem,
    _linear_policy,
    _linear_policy_definition,
    _linear_policy_bounds,
    ("hidden", "weight", "bias"),
    _HEAD_TRITON,
    _fits_head,
    _head_cost,
    timed=_TIMED_HEAD,
    work=_head_work,
)
