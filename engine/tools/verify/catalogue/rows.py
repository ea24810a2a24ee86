"""Ops on rows of logits: logprob, logprob_, full_kl, sample; and advance_rows_, the end of a
decoding step."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
from torch import Tensor

from fusedrl.engine.tools.verify import definitions
from fusedrl.engine.tools.verify.grid import EPS, Bound, Entry, Problem, Tensors
from fusedrl.kernels import advance_rows, full_kl, logprob, sampling
from fusedrl.kernels.kept import Kept

from .common import BF16, F32, FLOATS, PERIOD, floats, laid_out, repeat, uniform

VOCABULARIES = (33, 2, 31, 1023, 1025, 32000, 50257, 65537, 128256, 151936, 256000)


# ---- rows of logits ------------------------------------------------------------------------------
LOGITS = (
    "sd 1",
    "sd 10",
    "sd 100",
    "+1e4",
    "-1e4",
    "65504",
    "all equal",
    "about -200",
    "1% -inf",
    "99.99% -inf",
)


def logits_of(kind: str, R: int, V: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Make logits [R, V] of a kind. In a "-inf" kind, one column is finite in every row but one,
    which is -inf throughout."""
    z = floats(generator, R, V)
    if kind.startswith("sd"):
        z = z * float(kind[3:])
    elif kind == "65504":  # the largest of float16, next to ordinary ones
        z = torch.where(uniform(generator, R, V) < 0.5, 65504.0, z)
    elif kind == "all equal":
        z = torch.full_like(z, 0.3)
    elif kind == "about -200":
        z = z * 0.01 - 200.0
    elif kind.endswith("-inf"):
        z = z.masked_fill(uniform(generator, R, V) < float(kind.split("%")[0]) / 100, -math.inf)
        z[:, V // 2] = 1.5
        z[R // 2] = -math.inf
    else:
        z = z + float(kind)
    return z.to(dtype)


def _row_case(case: SimpleNamespace) -> bool:
    """Whether a case fits into 3 GiB and some seconds. At N = 4096 large vocabularies are tested
    with one row repeated, and the largest without a gradient, which would be 2 GiB."""
    if case.N == 4096:
        return case.dtype == BF16 and (
            case.V <= 1025
            or (
                case.layout == "expanded"
                and case.V in (32000, 256000)
                and not (case.grad and case.V > 32000)
            )
        )
    # a few rows of many blocks take seconds under the interpreter
    return not (5 <= case.N <= 9 and case.V > 32000) and case.N * case.V <= 1 << 25


def _elements(case: SimpleNamespace) -> int:
    return case.N * case.V


def _logprob_problem(case: SimpleNamespace, generator: torch.Generator) -> Problem:
    R = min(PERIOD, case.N) or 1
    z = logits_of(case.logits, R, case.V, case.dtype, generator)
    ids = {
        "random": torch.randint(0, case.V, (R,), generator=generator),
        "first": torch.zeros(R, dtype=torch.int64),
        "last": torch.full((R,), case.V - 1),
        "-100": torch.randint(0, case.V, (R,), generator=generator),
    }[case.labels]
    T: float | Tensor = (
        0.3 + 2 * uniform(generator, R) if case.temperature == "by row" else case.temperature
    )
    upstream = {"logp": floats(generator, R)} | (
        {"entropy": floats(generator, R)} if case.entropy else {}
    )
    if R > 4:
        for g in upstream.values():
            g[R - 1] = 0.0  # a row that no gradient reaches
    if case.labels == "-100":
        ids[::3] = -100
        z[::3] = math.nan  # an ignored row may hold anything
    period = 0
    if case.layout == "expanded":
        z = z[:1].expand(case.N, case.V)
        ids[:] = ids[0]
    elif case.N > R:
        z, period = repeat(z, case.N), R
    N, period = case.N, R if case.N > R else period
    ids, T = repeat(ids, N), repeat(T, N) if isinstance(T, Tensor) else T
    x = {
        "logits": z[:N] if case.layout == "expanded" else laid_out(z[:N], case.layout),
        "token_ids": ids,
    }
    if isinstance(T, Tensor):
        x["temperature"] = T
    hidden = {"logits": (ids == -100)[:, None]}
    # as rows of a mask; the CSR is made where the op is called. Every fourth row lists nothing, and
    # some labels were not kept
    if case.kept:
        kept = uniform(generator, R, case.V) < 0.3
        kept[:, case.V // 2] = True
        kept[1:, :].scatter_(1, ids[1:R, None].clamp(min=0), True)
        kept[::4] = False
        x["kept"] = repeat(kept, N)
        hidden["logits"] = hidden["logits"] | _not_kept(x["kept"])
    return Problem(
        x,
        {"entropy": case.entropy} | ({} if isinstance(T, Tensor) else {"temperature": T}),
        {name: repeat(g, N) for name, g in upstream.items()} if case.grad else {},
        hidden,
        period,
    )


def _not_kept(kept_NV: Tensor) -> Tensor:
    """Return a mask of the tokens that truncation removed; none in rows that list no kept token."""
    return ~kept_NV & kept_NV.any(-1, keepdim=True)


def csr(kept_NV: Tensor) -> Kept:
    """Convert a bool mask to CSR form (the column numbers of each row, one row after another)."""
    return Kept(
        kept_NV.nonzero()[:, 1].int(), torch.nn.functional.pad(kept_NV.sum(-1).cumsum(0), (1, 0))
    )


def _logprob_outputs(result: object, s: dict) -> Tensors:
    return {"logp": result[0], "entropy": result[1]} if s["entropy"] else {"logp": result}


def _logprob_definition(x: dict, s: dict) -> Tensors:
    logp, entropy = definitions.logprob(
        x["logits"],
        x["token_ids"],
        x["temperature"] if "temperature" in x else s["temperature"],
        x.get("kept"),
    )
    return {"logp": logp, "entropy": entropy} if s["entropy"] else {"logp": logp}


def _logprob_bounds(problem: Problem, want: Tensors) -> dict[str, Bound]:
    V = problem.x["logits"].shape[-1]
    bounds = {
        "logp": Bound(rtol=0.0, atol=8 * EPS * want["logp"].abs().clamp(min=1.0)),
        "entropy": Bound(atol=1e-5 * max(1.0, math.log(V))),
    }
    if "d logits" in want:
        rows = want["logp"].shape[0]
        g, h = (
            problem.upstream.get(name, torch.zeros(1)).double()[:rows].abs()[:, None]
            for name in ("logp", "entropy")
        )
        atol = 1e-6 * (g + h)
        narrow = problem.x["logits"].dtype != F32
        eps = torch.finfo(problem.x["logits"].dtype).eps
        bounds["d logits"] = (
            Bound(rtol=eps, atol=atol + 1e-6, rounded=True)
            if narrow
            else Bound(rtol=1e-5, atol=atol + 1e-30)
        )
    return bounds


_ROW_LEVELS = {
    "V": VOCABULARIES,
    "N": (5, 0, 1, 33, 127, 4096),
    "dtype": FLOATS,
    "layout": ("plain", "padded", "misaligned", "expanded"),
}
_TIMED_ROWS = {"cpu": {"N": 256, "V": 32000}, "cuda": {"N": 2048, "V": 128256, "dtype": BF16}}
_TRITON_ROWS = {"N": (5, 0, 1, 9), "V": (33, 2, 31, 1023, 1025, 4097, 32000, 65537, 256000)}


def _logprob_entry(function: object, **changes: object) -> Entry:
    levels = (
        _ROW_LEVELS
        | {
            "logits": LOGITS,
            "labels": ("random", "-100", "first", "last"),
            "temperature": (1.0, 0.7, "by row"),
            "entropy": (True, False),
            "grad": (True, False),
            "kept": (False, True),
        }
        | changes.pop("levels", {})
    )

    def forward(x: dict, s: dict, impl: str | None) -> Tensors:
        # in place: not a leaf
        logits = x["logits"].view_as(x["logits"]) if function is logprob.logprob_ else x["logits"]
        kept = csr(x["kept"]) if "kept" in x else None
        return _logprob_outputs(
            function(
                logits,
                x["token_ids"],
                temperature=x.get("temperature", s.get("temperature")),
                entropy=s["entropy"],
                kept=kept,
                impl=impl,
            ),
            s,
        )

    def fits(case: SimpleNamespace) -> bool:
        return _row_case(case) and not (
            case.kept and (case.N * case.V > 1 << 22 or case.layout == "expanded")
        )

    return Entry(
        function.__name__,
        logprob._IMPLS,
        levels,
        _logprob_problem,
        forward,
        _logprob_definition,
        _logprob_bounds,
        ("logits",),
        _TRITON_ROWS,
        fits=fits,
        cost=_elements,
        rows=frozenset({"logits", "token_ids", "temperature", "kept"}),
        timed=_TIMED_ROWS,
        **changes,
    )


LOGPROB, LOGPROB_ = (
    _logprob_entry(logprob.logprob),
    _logprob_entry(
        logprob.logprob_, writes=("logits",), levels={"layout": ("plain", "padded", "misaligned")}
    ),
)


# ---- full_kl -------------------------------------------------------------------------------------
def _full_kl_problem(case: SimpleNamespace, generator: torch.Generator) -> Problem:
    R = min(PERIOD, case.N) or 1
    z = logits_of(case.logits, R, case.V, F32, generator)
    x = (z + floats(generator, R, case.V) * case.apart).to(case.dtype)
    z, g = z.to(case.dtype), floats(generator, R)
    mask = uniform(generator, R) < 0.7 if case.masked and case.layout != "expanded" else None
    if mask is not None:
        z, x = z.masked_fill(~mask[:, None], math.nan), x.masked_fill(~mask[:, None], math.nan)
    # the result of 0 times the NaN of a row with +inf is not specified
    if R > 4 and bool((x[R - 1] < math.inf).all()):
        g[R - 1] = 0.0
    if case.layout == "expanded":
        z, x = z[R - 1 :].expand(case.N, case.V), x[R - 1 :].expand(case.N, case.V)
    else:
        z, x = (laid_out(repeat(t, case.N), case.layout) for t in (z, x))
    mask = None if mask is None else repeat(mask, case.N)
    tensors = {"logits": z, "ref_logits": x} | ({} if mask is None else {"mask": mask})
    hidden = {} if mask is None else dict.fromkeys(("logits", "ref_logits"), ~mask[:, None])
    return Problem(
        tensors,
        {"temperature": case.temperature, "direction": case.direction},
        {"kl": repeat(g, case.N)} if case.grad else {},
        hidden,
        R if case.N > R else 0,
    )


def _full_kl_bounds(problem: Problem, want: Tensors) -> dict[str, Bound]:
    # The contract names no bound. Measured: at most 2.8e-6 max(1, KL), where float16 logits around
    # 1e4 lie 30 apart; elsewhere below 6e-7. In the gradient p (l - KL) carries the rounding of l
    # and KL.
    bounds = {"kl": Bound(rtol=4e-6, atol=2e-6)}
    if "d logits" in want:
        g = problem.upstream["kl"][: want["kl"].shape[0]].double().abs()
        large = want["kl"].nan_to_num(nan=1.0, posinf=1.0).clamp(min=1.0)
        atol = (1e-6 * g * large)[:, None] + 1e-30
        narrow = problem.x["logits"].dtype != F32
        eps = torch.finfo(problem.x["logits"].dtype).eps
        bounds["d logits"] = (
            Bound(rtol=eps, atol=atol + 1e-6, rounded=True)
            if narrow
            else Bound(rtol=1e-5, atol=atol)
        )
    return bounds


FULL_KL = Entry(
    "full_kl",
    full_kl._IMPLS,
    _ROW_LEVELS
    | {
        "logits": LOGITS,
        "apart": (1.0, 1e-3, 30.0),
        "direction": full_kl.DIRECTIONS,
        "temperature": (1.0, 0.7),
        "masked": (False, True),
        "grad": (True, False),
    },
    _full_kl_problem,
    forward=lambda x, s, impl: {
        "kl": full_kl.full_kl(x["logits"], x["ref_logits"], mask=x.get("mask"), **s, impl=impl)
    },
    definition=lambda x, s: {
        "kl": definitions.full_kl(x["logits"], x["ref_logits"], x.get("mask"), **s)
    },
    bounds=_full_kl_bounds,
    wants=("logits",),
    triton=_TRITON_ROWS,
    fits=_row_case,
    cost=_elements,
    rows=frozenset({"logits", "ref_logits", "mask"}),
    timed=_TIMED_ROWS,
)


# ---- sample --------------------------------------------------------------------------------------
def _sample_problem(case: SimpleNamespace, generator: torch.Generator) -> Problem:
    R = min(PERIOD, case.N) or 1
    z = logits_of(case.logits, R, case.V, F32, generator)
    z[(z == -math.inf).all(-1)] = 0.0  # a row with nothing to draw is refused
    keys = torch.randint(-(2**62), 2**62, (R, 4), generator=generator)
    x = {
        "logits": laid_out(repeat(z.to(case.dtype), case.N), case.layout),
        "keys": repeat(keys, case.N),
    }
    if case.suppressed and case.V > 2:
        suppress = uniform(generator, R, case.V) < 0.3
        suppress[:, case.V // 2] = False
        x["suppress"] = repeat(suppress, case.N)
    return Problem(x, dict(case.setting), period=R if case.N > R else 0)


def _sample(x: dict, s: dict, impl: str | None) -> Tensors:
    drawn = sampling.sample(
        x["logits"], keys=x["keys"], suppress=x.get("suppress"), **s, impl=impl
    )._asdict()
    return {name: t for name, t in drawn.items() if isinstance(t, Tensor)}


_SETTINGS = (
    {"temperature": 1.0},
    {"temperature": 0.0},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
)
SAMPLE = Entry(
    "sample",
    sampling._IMPLS,
    {
        "V": VOCABULARIES,
        "N": (5, 0, 1, 33, 127),
        "dtype": FLOATS,
        "layout": ("plain", "padded", "misaligned"),
        "logits": LOGITS,
        "setting": _SETTINGS,
        "suppressed": (False, True),
        "grad": (False,),
    },
    _sample_problem,
    _sample,
    definition=lambda x, s: definitions.sample(**{"suppress": None} | x, **s),
    bounds=lambda problem, want: (
        {
            "token_ids": Bound(),
            "kept_count": Bound(),
            "entropy": Bound(atol=1e-5 * max(1.0, math.log(problem.x["logits"].shape[-1]))),
        }
        | {
            name: Bound(atol=8 * EPS * want[name].abs().clamp(min=1.0))
            for name in ("logp", "logp_processed")
        }
    ),
    triton=_TRITON_ROWS,
    fits=_row_case,
    cost=_elements,
    rows=frozenset({"logits", "keys", "suppress"}),
    timed={"cpu": {"N": 64, "V": 32000}, "cuda": {"N": 256, "V": 128256}},
)


# ---- behind the sampler --------------------------------------------------------------------------
WRITTEN = (
    "token_ids",
    "positions",
    "finished",
    "ring_tokens",
    "ring_logp",
    "cursor",
    "ring_values",
)


def _advance_rows_problem(case: SimpleNamespace, generator: torch.Generator) -> Problem:
    def ids(*shape: int) -> Tensor:
        return torch.randint(0, 9, shape, generator=generator)

    R, at = case.R, ids(case.R)
    x = {
        "drawn": ids(R) - 1,
        "logp": floats(generator, R),
        "stops": ids(case.W, R) - 1,
        "last_positions": at + ids(R) - 2,
        "token_ids": ids(R),
        "positions": torch.stack([at + 1, at]),
        "finished": ids(R) == 0,
        "ring_tokens": ids(case.K, R),
        "ring_logp": torch.full((case.K, R), math.nan),
        "cursor": torch.tensor([case.K - 1]),
        "values": floats(generator, R),
        "ring_values": torch.full((case.K, R), math.nan),
    }
    return Problem(x, {})


def _advance_rows(x: dict, impl: str | None) -> Tensors:
    advance_rows.advance_rows_(**x, impl=impl)
    return {name: x[name] for name in WRITTEN}


ADVANCE_ROWS = Entry(
    "advance_rows_",
    advance_rows._IMPLS,
    {"R": (7, 0, 1, 255, 257, 700), "W": (2, 0, 1, 5), "K": (3, 1, 8)},
    _advance_rows_problem,
    forward=lambda x, s, impl: _advance_rows(x, impl),
    definition=lambda x, s: definitions.advance_rows(x),
    bounds=lambda problem, want: dict.fromkeys(WRITTEN, Bound()),
    writes=WRITTEN,
    cost=lambda case: case.R * (case.W + case.K),
)
