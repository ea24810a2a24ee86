"""Every public op of fusedrl.kernels: its inputs, its float64 oracle, its bounds. The grid, the properties and the contract are tested over this table.

To add an op, write one function that makes its inputs and one `Entry`; `test_contract.py` fails until every `Implementations` table has one:

    def _double(case, generator):
        x = floats(generator, case.N, 4, dtype=case.dtype)
        return Problem({"x": x}, {"factor": case.factor}, {"y": floats(generator, case.N, 4)}, {}, 0)

    Entry(
        "double", double_op._IMPLS,
        levels={"N": (33, 0, 1, 127), "factor": (2.0, 0.5), "dtype": FLOATS},               # the first levels are the plain case
        make=_double,
        forward=lambda x, s, impl: {"y": double(x["x"], **s, impl=impl)},
        reference=lambda x, s: {"y": double_reference(x["x"], **s)},
        bounds=lambda problem, want: {"y": Bound(rtol=1e-6), "d x": Bound(rtol=1e-6, rounded=True)},
        wants=("x",),                                                                          # differentiated; leave out if nothing is
        triton={"N": (5, 0, 1)},                                                               # smaller levels for the interpreter
    )

Where an op is held to the error of torch in the same dtype and not to a number, `no_worse` makes the bounds. Bounds that are wider than the numerical
contract, or that it does not name, say why where they stand, with the measured error.
"""
from __future__ import annotations

import math
from types import SimpleNamespace

import torch
from grid import EPS, Bound, Entry, Problem, Tensors
from torch import Tensor

from fusedrl.kernels import (
    attention,
    decode_step,
    full_kl,
    gae,
    kl,
    linear_full_kl,
    linear_logprob,
    linear_policy_loss,
    logprob,
    normalize,
    policy_loss,
    ranking_loss,
    rms_norm,
    rope,
    sampling,
    swiglu,
)
from fusedrl.kernels.objective import KINDS, PolicyObjective, RolloutCorrection

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
FLOATS = (F32, BF16, F16)
VOCABULARIES = (33, 2, 31, 1023, 1025, 32000, 50257, 65537, 128256, 151936, 256000)
PERIOD = 11  # rows that differ; odd, so that no tile holds whole periods


def floats(generator: torch.Generator, *shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(shape, generator=generator).to(dtype)


def uniform(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(shape, generator=generator)


def repeat(t: Tensor, N: int) -> Tensor:
    """Rows 0 ... period - 1, 0 ... of t [period, ...], N of them."""
    return t[:N].clone() if t.shape[0] >= N else t[torch.arange(N) % t.shape[0]]


# ---- layouts: NaN around what is handed over ------------------------------------------------------------------------------
def laid_out(t: Tensor, layout: str) -> Tensor:
    """The same values in another layout; what surrounds them is NaN, so that reading it shows and writing it is seen."""
    if layout == "plain":
        return t
    if layout == "padded":  # of the last dimension
        wide = t.new_full((*t.shape[:-1], t.shape[-1] + 5), math.nan if t.is_floating_point() else True)
        wide[..., : t.shape[-1]] = t
        return wide[..., : t.shape[-1]]
    if layout == "misaligned":
        flat = t.new_full((t.numel() + 1,), math.nan if t.is_floating_point() else True)
        flat[1:] = t.reshape(-1)
        return flat[1:].view(t.shape)
    if layout == "transposed":  # of two dimensions
        return t.t().contiguous().t()
    if layout == "expanded":  # one row for all
        return t[:1].expand(t.shape) if t.shape[0] else t
    raise ValueError(layout)


# ---- rows of logits --------------------------------------------------------------------------------------------------------
LOGITS = ("sd 1", "sd 10", "sd 100", "+1e4", "-1e4", "65504", "all equal", "about -200", "1% -inf", "99.99% -inf")


def logits_of(kind: str, R: int, V: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """[R, V]. Where most are -inf, one column a row is not, and another row is -inf altogether."""
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
    """What fits into 3 GiB and some seconds. At N = 4096 the large vocabulary comes as one row for all (no gradient: it would be 2 GiB)."""
    if case.N == 4096:
        return case.dtype == BF16 and (case.V <= 1025 or (case.layout == "expanded" and case.V in (32000, 256000) and not (case.grad and case.V > 32000)))
    return not (5 <= case.N <= 9 and case.V > 32000) and case.N * case.V <= 1 << 25  # a few rows of many blocks: seconds under the interpreter


def _elements(case: SimpleNamespace) -> int:
    return case.N * case.V


def _logprob_problem(case: SimpleNamespace, generator: torch.Generator) -> Problem:
    R = min(PERIOD, case.N) or 1
    z = logits_of(case.logits, R, case.V, case.dtype, generator)
    ids = {"random": torch.randint(0, case.V, (R,), generator=generator), "first": torch.zeros(R, dtype=torch.int64),
           "last": torch.full((R,), case.V - 1), "-100": torch.randint(0, case.V, (R,), generator=generator)}[case.labels]
    T: float | Tensor = 0.3 + 2 * uniform(generator, R) if case.temperature == "by row" else case.temperature
    upstream = {"logp": floats(generator, R)} | ({"entropy": floats(generator, R)} if case.entropy else {})
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
    x = {"logits": z[:N] if case.layout == "expanded" else laid_out(z[:N], case.layout), "token_ids": ids}
    if isinstance(T, Tensor):
        x["temperature"] = T
    hidden = {"logits": (ids == -100)[:, None]}
    return Problem(x, {"entropy": case.entropy} | ({} if isinstance(T, Tensor) else {"temperature": T}),
                   {name: repeat(g, N) for name, g in upstream.items()} if case.grad else {}, hidden, period)


def _logprob_outputs(result: object, s: dict) -> Tensors:
    return {"logp": result[0], "entropy": result[1]} if s["entropy"] else {"logp": result}


def _logprob_reference(x: dict, s: dict) -> Tensors:
    logp, entropy = logprob.logprob_reference(x["logits"], x["token_ids"], x["temperature"] if "temperature" in x else s["temperature"])
    return {"logp": logp, "entropy": entropy} if s["entropy"] else {"logp": logp}


def _temperature(problem: Problem, want: Tensor) -> Tensor:
    T = problem.x.get("temperature")
    T = torch.full((want.shape[0],), float(problem.settings["temperature"])) if T is None else T[: want.shape[0]]
    return T.double()[:, None]


def _logprob_bounds(problem: Problem, want: Tensors) -> dict[str, Bound]:
    V = problem.x["logits"].shape[-1]
    bounds = {"logp": Bound(rtol=0.0, atol=8 * EPS * want["logp"].abs().clamp(min=1.0)), "entropy": Bound(atol=1e-5 * max(1.0, math.log(V)))}
    if "d logits" in want:
        rows = want["logp"].shape[0]
        g, h = (problem.upstream.get(name, torch.zeros(1)).double()[:rows].abs()[:, None] for name in ("logp", "entropy"))
        # d_j - W / S, which the entropy's gradient multiplies, is a difference of numbers up to ln V and more.
        atol = 1e-6 * (g + h * max(1.0, math.log(V))) / _temperature(problem, want["logp"])
        narrow = problem.x["logits"].dtype != F32
        eps = torch.finfo(problem.x["logits"].dtype).eps
        bounds["d logits"] = Bound(rtol=eps, atol=atol + 1e-6, rounded=True) if narrow else Bound(rtol=1e-5, atol=atol)
    return bounds


_ROW_LEVELS = {"V": VOCABULARIES, "N": (5, 0, 1, 33, 127, 4096), "dtype": FLOATS, "layout": ("plain", "padded", "misaligned", "expanded")}
_TRITON_ROWS = {"N": (5, 0, 1, 9), "V": (33, 2, 31, 1023, 1025, 4097, 32000, 65537, 256000)}


def _logprob_entry(function: object, **changes: object) -> Entry:
    levels = _ROW_LEVELS | {"logits": LOGITS, "labels": ("random", "-100", "first", "last"), "temperature": (1.0, 0.7, "by row"), "entropy": (True, False),
                            "grad": (True, False)} | changes.pop("levels", {})

    def forward(x: dict, s: dict, impl: str | None) -> Tensors:
        logits = x["logits"].view_as(x["logits"]) if function is logprob.logprob_ else x["logits"]  # in place: not a leaf
        return _logprob_outputs(function(logits, x["token_ids"], temperature=x.get("temperature", s.get("temperature")), entropy=s["entropy"], impl=impl), s)

    return Entry(function.__name__, logprob._IMPLS, levels, _logprob_problem, forward, _logprob_reference, _logprob_bounds, ("logits",), _TRITON_ROWS,
                 fits=_row_case, cost=_elements, rows=frozenset({"logits", "token_ids", "temperature"}), **changes)


# ---- full_kl ---------------------------------------------------------------------------------------------------------------
def _full_kl_problem(case: SimpleNamespace, generator: torch.Generator) -> Problem:
    R = min(PERIOD, case.N) or 1
    z = logits_of(case.logits, R, case.V, F32, generator)
    x = (z + floats(generator, R, case.V) * case.apart).to(case.dtype)
    z, g = z.to(case.dtype), floats(generator, R)
    mask = uniform(generator, R) < 0.7 if case.masked and case.layout != "expanded" else None
    if mask is not None:
        z, x = z.masked_fill(~mask[:, None], math.nan), x.masked_fill(~mask[:, None], math.nan)
    if R > 4:
        g[R - 1] = 0.0
    if case.layout == "expanded":
        z, x = z[R - 1:].expand(case.N, case.V), x[R - 1:].expand(case.N, case.V)
    else:
        z, x = (laid_out(repeat(t, case.N), case.layout) for t in (z, x))
    mask = None if mask is None else repeat(mask, case.N)
    tensors = {"logits": z, "ref_logits": x} | ({} if mask is None else {"mask": mask})
    hidden = {} if mask is None else {name: ~mask[:, None] for name in ("logits", "ref_logits")}
    return Problem(tensors, {"temperature": case.temperature, "direction": case.direction}, {"kl": repeat(g, case.N)} if case.grad else {}, hidden,
                   R if case.N > R else 0)


def _full_kl_bounds(problem: Problem, want: Tensors) -> dict[str, Bound]:
    # The contract names no bound. kl is a difference E_p[d - d_r] - (log S - log S_r): what it carries is the rounding of its larger terms.
    z, x = (problem.x[name][: want["kl"].shape[0]].double().nan_to_num(neginf=math.nan) for name in ("logits", "ref_logits"))
    apart = ((z - z.nan_to_num(nan=-math.inf).amax(-1, keepdim=True)) - (x - x.nan_to_num(nan=-math.inf).amax(-1, keepdim=True))).abs().nan_to_num(nan=0.0)
    scale = (apart.amax(-1) / problem.settings["temperature"]).clamp(min=1.0, max=1e4) if z.numel() else torch.ones_like(want["kl"])
    bounds = {"kl": Bound(rtol=4e-6, atol=2e-6)}
    if "d logits" in want:
        g = problem.upstream["kl"][: want["kl"].shape[0]].double().abs()
        large = want["kl"].nan_to_num(nan=1.0, posinf=1.0).clamp(min=1.0)
        atol = (2e-6 * g * large / problem.settings["temperature"])[:, None] + 1e-30
        narrow = problem.x["logits"].dtype != F32
        eps = torch.finfo(problem.x["logits"].dtype).eps
        bounds["d logits"] = Bound(rtol=eps, atol=atol + 1e-6, rounded=True) if narrow else Bound(rtol=2e-5, atol=atol)
    return bounds


FULL_KL = Entry(
    "full_kl", full_kl._IMPLS,
    _ROW_LEVELS | {"logits": LOGITS, "apart": (1.0, 1e-3, 30.0), "direction": full_kl.DIRECTIONS, "temperature": (1.0, 0.7), "masked": (False, True),
                   "grad": (True, False)},
    _full_kl_problem,
    forward=lambda x, s, impl: {"kl": full_kl.full_kl(x["logits"], x["ref_logits"], mask=x.get("mask"), **s, impl=impl)},
    reference=lambda x, s: {"kl": full_kl.full_kl_reference(x["logits"], x["ref_logits"], x.get("mask"), **s)},
    bounds=_full_kl_bounds, wants=("logits",), triton=_TRITON_ROWS, fits=_row_case, cost=_elements, rows=frozenset({"logits", "ref_logits", "mask"}),
)


# ---- sample ----------------------------------------------------------------------------------------------------------------
def _sample_problem(case: SimpleNamespace, generator: torch.Generator) -> Problem:
    R = min(PERIOD, case.N) or 1
    z = logits_of(case.logits, R, case.V, F32, generator)
    z[(z == -math.inf).all(-1)] = 0.0  # a row with nothing to draw is refused
    keys = torch.randint(-(2**62), 2**62, (R, 4), generator=generator)
    x = {"logits": laid_out(repeat(z.to(case.dtype), case.N), case.layout), "keys": repeat(keys, case.N)}
    if case.suppressed and case.V > 2:
        suppress = uniform(generator, R, case.V) < 0.3
        suppress[:, case.V // 2] = False
        x["suppress"] = repeat(suppress, case.N)
    return Problem(x, dict(case.setting), period=R if case.N > R else 0)


def _sample(x: dict, s: dict, impl: str | None) -> Tensors:
    return sampling.sample(x["logits"], keys=x["keys"], suppress=x.get("suppress"), **s, impl=impl)._asdict()


_SETTINGS = ({"temperature": 1.0}, {"temperature": 0.0}, {"temperature": 0.7, "top_k": 5}, {"temperature": 1.3, "top_p": 0.8}, {"temperature": 1.0, "min_p": 0.1},
             {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "min_p": 0.02})
SAMPLE = Entry(
    "sample", sampling._IMPLS,
    {"V": VOCABULARIES, "N": (5, 0, 1, 33, 127), "dtype": FLOATS, "layout": ("plain", "padded", "misaligned"), "logits": LOGITS, "setting": _SETTINGS,
     "suppressed": (False, True), "grad": (False,)},
    _sample_problem, _sample,
    reference=lambda x, s: _sample(x, s, "torch"),
    bounds=lambda problem, want: {"token_ids": Bound(), "kept_count": Bound(), "entropy": Bound(atol=1e-5 * max(1.0, math.log(problem.x["logits"].shape[-1])))}
    | {name: Bound(atol=8 * EPS * want[name].abs().clamp(min=1.0)) for name in ("logp", "logp_processed")},
    triton=_TRITON_ROWS, fits=_row_case, cost=_elements, rows=frozenset({"logits", "keys", "suppress"}),
)


# ---- heads -----------------------------------------------------------------------------------------------------------------
def _head(case: SimpleNamespace, generator: torch.Generator) -> tuple[dict, dict, Tensor]:
    """(tensors, settings, which rows count) that the three linear ops share."""
    N, H, V, dtype = case.N, case.H, case.V, case.dtype
    hidden, weight = floats(generator, N, H), 2 * floats(generator, V, H) / math.sqrt(H)
    live = uniform(generator, N) < {"all": 2.0, "random": 0.7, "none": -1.0}[case.mask]
    hidden = laid_out(hidden.to(dtype).masked_fill(~live[:, None], math.nan), case.layout if case.layout != "transposed" else "plain")
    weight = laid_out(weight.to(dtype), case.layout) if case.layout != "misaligned" else weight.to(dtype)
    x = {"hidden": hidden, "weight": weight} | ({"bias": floats(generator, V, dtype=dtype)} if case.bias else {})
    rows = case.workspace
    return x, {"workspace_bytes": None if rows is None else 4 * rows * V}, live


def _spread(problem: Problem) -> float:
    """Largest logit in size, which the products' rounding scales with."""
    hidden, weight = problem.x["hidden"].float().nan_to_num(), problem.x["weight"].float()
    return max(1.0, float((hidden @ weight.t()).abs().max())) if hidden.numel() else 1.0


def _head_bounds(problem: Problem, want: Tensors, per_row: tuple[str, ...]) -> dict[str, Bound]:
    """Contract: atol 1e-5 max |z|, rtol 1e-5 sqrt(H / 1024). Narrow inputs are widened before the products, so float32's bounds hold for the outputs,
    and gradients are that plus one rounding."""
    H, dtype = problem.x["hidden"].shape[1], problem.x["hidden"].dtype
    atol, rtol = 1e-5 * _spread(problem), 1e-5 * max(1.0, math.sqrt(H / 1024))
    bounds = {name: Bound(rtol, atol) for name in per_row}
    for name in want:
        if name.startswith("d "):
            size = max(1.0, float(want[name].abs().max())) if want[name].numel() else 1.0
            bounds[name] = Bound(rtol, atol * size) if dtype == F32 else Bound(torch.finfo(dtype).eps, 1e-4 * size, rounded=True)
    return bounds


_HEAD_LEVELS = {"N": (7, 0, 1, 33, 127), "H": (16, 5, 64, 300), "V": (33, 2, 31, 1023, 1025, 32000), "dtype": FLOATS, "bias": (False, True),
                "mask": ("random", "all", "none"), "layout": ("plain", "padded", "misaligned", "transposed"), "workspace": (None, 1, 3),
                "temperature": (1.0, 0.7, "by row")}
_HEAD_TRITON = {"N": (7, 0, 1, 9), "H": (16, 5, 64), "V": (33, 2, 31, 129)}


def _fits_head(case: SimpleNamespace) -> bool:
    return case.V <= 1025 or (case.N <= 33 and case.H <= 64 and case.workspace is None)


def _head_cost(case: SimpleNamespace) -> int:
    return case.N * case.V * (8 if case.workspace else 1)


def _by_row(case: SimpleNamespace, generator: torch.Generator, x: dict, settings: dict) -> None:
    if case.temperature == "by row":
        x["temperature"] = 0.3 + 2 * uniform(generator, case.N)
    else:
        settings["temperature"] = case.temperature


def _linear_logprob_problem(case: SimpleNamespace, generator: torch.Generator) -> Problem:
    x, settings, live = _head(case, generator)
    x["token_ids"] = torch.where(live, torch.randint(0, case.V, (case.N,), generator=generator), -100)
    _by_row(case, generator, x, settings)
    g, h = floats(generator, case.N), floats(generator, case.N)
    g[3:5], h[3:5] = 0.0, 0.0  # rows that no gradient reaches
    return Problem(x, settings | {"softcap": case.softcap}, {"logp": g, "entropy": h}, {"hidden": ~live[:, None]})


def _linear_logprob(x: dict, s: dict, impl: str | None) -> Tensors:
    logp, entropy = linear_logprob.linear_logprob(**x, **s, entropy=True, impl=impl)
    return {"logp": logp, "entropy": entropy}


def _linear_logprob_reference(x: dict, s: dict) -> Tensors:
    T = x.get("temperature", s.get("temperature"))
    return dict(zip(("logp", "entropy"), linear_logprob.linear_logprob_reference(x["hidden"], x["weight"], x["token_ids"], x.get("bias"), T, s["softcap"]),
                    strict=True))


LINEAR_LOGPROB = Entry(
    "linear_logprob", linear_logprob._IMPLS, _HEAD_LEVELS | {"softcap": (None, 3.0)}, _linear_logprob_problem, _linear_logprob, _linear_logprob_reference,
    lambda problem, want: _head_bounds(problem, want, ("logp", "entropy")), ("hidden", "weight", "bias"), _HEAD_TRITON, _fits_head, _head_cost)


def _linear_full_kl_problem(case: SimpleNamespace, generator: torch.Generator) -> Problem:
    x, settings, live = _head(case, generator)
    H_ref = case.H + case.wider
    x["ref_hidden"] = floats(generator, case.N, H_ref, dtype=case.dtype).masked_fill(~live[:, None], math.nan)
    x["ref_weight"] = (2 * floats(generator, case.V, H_ref) / math.sqrt(H_ref)).to(case.dtype)
    if case.mask != "all":
        x["mask"] = live
    g = floats(generator, case.N)
    g[3:5] = 0.0
    settings["workspace_bytes"] = settings["workspace_bytes"] and 2 * settings["workspace_bytes"]
    return Problem(x, settings | {"temperature": case.temperature, "direction": case.direction}, {"kl": g}, {n: ~live[:, None] for n in ("hidden", "ref_hidden")})


LINEAR_FULL_KL = Entry(
    "linear_full_kl", linear_full_kl._IMPLS, _HEAD_LEVELS | {"wider": (0, 3), "direction": full_kl.DIRECTIONS, "temperature": (1.0, 0.7)},
    _linear_full_kl_problem,
    forward=lambda x, s, impl: {"kl": linear_full_kl.linear_full_kl(**x, **s, impl=impl)},
    reference=lambda x, s: {"kl": linear_full_kl.linear_full_kl_reference(
        x["hidden"], x["weight"], x["ref_hidden"], x["ref_weight"], x.get("bias"), None, x.get("mask"), s["temperature"], s["direction"])},
    bounds=lambda problem, want: _head_bounds(problem, want, ("kl",)), wants=("hidden", "weight", "bias"), triton=_HEAD_TRITON, fits=_fits_head,
    cost=_head_cost)


# ---- policy and value losses -------------------------------------------------------------------------------------------------
OBJECTIVES = {kind: PolicyObjective(kind=kind) for kind in KINDS} | {
    "dual": PolicyObjective(clip_low=0.2, clip_high=0.28, dual_clip=3.0), "gspo": PolicyObjective(kind="gspo", clip_low=0.02, clip_high=0.03)}
KL_TERMS = ({}, {"kl_coef": 0.1}, {"kl_coef": 0.1, "kl_gradient": "k2"}, {"kl_coef": 0.1, "kl_estimator": "k1"}, {"kl_coef": 0.1, "kl_estimator": "abs"},
            {"kl_coef": 0.01, "kl_estimator": "k2", "kl_level": "sequence"})
CORRECTIONS = (None, RolloutCorrection(), RolloutCorrection(kind="masked", cap=1.5, floor=0.5), RolloutCorrection(kind="masked", level="sequence"))


def token_columns(case: SimpleNamespace, generator: torch.Generator, logp: Tensor | None = None) -> tuple[dict, Tensor]:
    """[N] columns of a policy loss with NaN where the weight is 0, and which tokens are live. Ratios keep clear of the bounds, where rounding decides."""
    N = case.N
    live = _token_mask(case.mask, [N], generator)
    weights = torch.where(live, 0.5 + uniform(generator, N), 0.0)
    logp = -5 * uniform(generator, N) if logp is None else logp
    away = case.apart * floats(generator, N)
    for bound in (math.log(0.8), math.log(1.2), math.log(1.28), math.log(3.0), math.log(5.0), 0.4, -0.4, math.log(0.98), math.log(1.03), 20.0, -20.0):
        away = torch.where((away - bound).abs() < 1e-4, away + 1e-3, away)
    advantages = {"normal": floats(generator, N), "0": torch.zeros(N), "+-1": torch.where(uniform(generator, N) < 0.5, -1.0, 1.0),
                  "+-1e6": torch.where(uniform(generator, N) < 0.5, -1e6, 1e6)}[case.advantages]
    columns = {"old_logp": logp - away, "ref_logp": logp - 0.3 * floats(generator, N), "rollout_logp": logp - away - 0.3 * floats(generator, N),
               "advantages": advantages}
    x = {name: laid_out(torch.where(live, t, math.nan), case.layout) for name, t in columns.items()} | {"logp": logp, "weights": weights}
    x["logp"] = laid_out(torch.where(live, logp, math.nan), case.layout)
    x["cu_seqlens"] = torch.tensor([0, N // 3, N // 3, N], dtype=torch.int32)
    return x, live


def _token_mask(kind: str, lengths: list[int], generator: torch.Generator) -> Tensor:
    """A mask over the sequences laid end to end."""
    parts = []
    for length in lengths:
        part = torch.zeros(length, dtype=torch.bool)
        part[{"all": slice(None), "none": slice(0), "first": slice(1), "last": slice(-1, None), "random": slice(None)}[kind]] = True
        parts.append(part & (uniform(generator, length) < 0.6) if kind == "random" else part)
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.bool)


_TOKEN_LEVELS = {"N": (33, 0, 1, 127, 4096, 32768), "mask": ("random", "all", "none", "first", "last"), "apart": (0.5, 1e-3, 0.0, 40.0),
                 "advantages": ("normal", "0", "+-1", "+-1e6"), "layout": ("plain", "misaligned"), "objective": tuple(OBJECTIVES), "kl": KL_TERMS,
                 "correction": CORRECTIONS, "entropy_coef": (0.05, 0.0)}


def _policy_settings(case: SimpleNamespace, x: dict) -> dict:
    settings: dict[str, object] = {"objective": OBJECTIVES[case.objective], "entropy_coef": case.entropy_coef, **case.kl}
    if case.correction is None:
        del x["rollout_logp"]
    else:
        settings["rollout_correction"] = case.correction
    return settings


def _policy_problem(case: SimpleNamespace, generator: torch.Generator) -> Problem:
    x, live = token_columns(case, generator)
    entropy = 4 * uniform(generator, case.N)
    x["entropy"] = laid_out(torch.where(live, entropy, math.nan), case.layout)
    settings = _policy_settings(case, x)
    hidden = {name: ~live for name in x if name not in ("weights", "cu_seqlens")}
    return Problem(x, settings, {"loss": torch.tensor(1.5)}, hidden)


def _stats(loss: Tensor, *stats: tuple) -> Tensors:
    return {"loss": loss} | {f"{i}.{name}": t for i, group in enumerate(stats) for name, t in group._asdict().items()}


def _policy(x: dict, s: dict, impl: str | None) -> Tensors:
    x = dict(x)
    positional = [x.pop(name) for name in ("logp", "old_logp", "advantages", "weights")]
    return _stats(*policy_loss.policy_loss(*positional, **x, **s, impl=impl))


def _policy_reference(x: dict, s: dict) -> Tensors:
    x = {f"{name}_N" if name not in ("cu_seqlens",) else name: t for name, t in x.items()}
    return _stats(*policy_loss.policy_loss_reference(*[x.pop(f"{name}_N") for name in ("logp", "old_logp", "advantages", "weights")], **x, **s))


def _scale_of_terms(problem: Problem) -> float:
    """Sum over tokens of |weight| max(1, |term|): the loss is a sum whose terms cancel, each of which carries a relative error."""
    x, live = problem.x, problem.x["weights"] != 0
    A, w = x["advantages"][live].double().abs(), x["weights"][live].double().abs()
    d = (x["logp"] - x["old_logp"])[live].double().clamp(-20, 20)
    k = (x["logp"] - x["ref_logp"])[live].double()
    return max(1.0, float((w * (A * (d.abs() + x["logp"][live].abs() + 1) * d.exp().clamp(min=1.0) * 2 + d * d + k * k + 4)).sum()))


def _policy_bounds(problem: Problem, want: Tensors) -> dict[str, Bound]:
    x, live = problem.x, problem.x["weights"] != 0
    A = torch.where(live, x["advantages"].double().abs(), 0).clamp(min=1.0)
    bounds = {name: Bound(2e-6, 1e-6) for name in want}
    # Statistics are sums of exp(d) over tokens, and d is a difference of log-probabilities rounded to float32: the oracle sees the same difference.
    bounds["loss"] = bounds["0.loss"] = Bound(2e-6, 1e-6 * _scale_of_terms(problem))
    if "d logp" in want:
        # Terms in ratio and advantage may cancel (kl_penalty: (beta - A) ratio), so the bound is of the terms, not of what is left of them.
        ratio = torch.where(live, (x["logp"] - x["old_logp"]).double().clamp(-20, 20).exp(), 0).clamp(min=1.0)
        bounds["d logp"] = Bound(2e-6 if problem.settings.get("rollout_correction") is None else 8e-6, 1e-6 * A * ratio)
    return bounds


POLICY_LOSS = Entry("policy_loss", policy_loss._IMPLS, _TOKEN_LEVELS, _policy_problem, _policy, _policy_reference, _policy_bounds, ("logp", "entropy"),
                    {"N": (33, 0, 1, 1100)}, cost=lambda case: case.N)


def _value_problem(case: SimpleNamespace, generator: torch.Generator) -> Problem:
    live = _token_mask(case.mask, [case.N], generator)
    # Clear of the clip and of the point where both squares are alike: there rounding picks the branch.
    moved, target = 0.4 * floats(generator, case.N), floats(generator, case.N)
    moved = torch.where((moved.abs() - 0.2).abs() < 1e-3, moved * 1.02, moved)
    target = torch.where(((moved + moved.clamp(-0.2, 0.2)) / 2 - target).abs() < 1e-3, target + 0.01, target)
    old = case.offset + floats(generator, case.N)
    columns = {"values": old + moved, "old_values": old, "returns": old + target}
    x = {name: laid_out(torch.where(live, t, math.nan), case.layout) for name, t in columns.items()}
    x["weights"] = torch.where(live, 0.5 + uniform(generator, case.N), 0.0)
    return Problem(x, {"clip": case.clip}, {"loss": torch.tensor(-0.75)}, {name: ~live for name in columns})


def _value_bounds(problem: Problem, want: Tensors) -> dict[str, Bound]:
    total = float(want["loss"].abs())
    x, live = problem.x, problem.x["weights"] != 0
    size = float(x["returns"][live].double().abs().max()) if bool(live.any()) else 1.0
    # Old value + clip is rounded to float32, of the size of the values: what the squared error of a clipped one carries along.
    clip = problem.settings.get("clip", problem.settings.get("value_clip"))
    rounded = 0.0 if clip is None else EPS * size * float((x["weights"][live].double() * ((x["values"] - x["returns"])[live].abs() + clip)).sum())
    bounds = {name: Bound(2e-6, 1e-6) for name in want} | {"loss": Bound(2e-6, 1e-6 * max(1.0, total) + rounded)}
    return bounds | {"0.loss": bounds["loss"], "0.explained_variance": Bound(2e-5, 1e-6), "0.clip_fraction": Bound(2e-6, 1e-6 if size < 100 else 0.05)}


VALUE_LOSS = Entry(
    "value_loss", policy_loss._IMPLS,
    {"N": (33, 0, 1, 127, 4096, 32768), "mask": ("random", "all", "none", "first", "last"), "offset": (0.0, 1e3), "clip": (None, 0.2),
     "layout": ("plain", "misaligned")},
    _value_problem,
    forward=lambda x, s, impl: _stats(*policy_loss.value_loss(x["values"], x["old_values"], x["returns"], x["weights"], **s, impl=impl)),
    reference=lambda x, s: _stats(*policy_loss.value_loss_reference(x["values"], x["old_values"], x["returns"], x["weights"], **s)),
    bounds=_value_bounds, wants=("values",), triton={"N": (33, 0, 1, 1100)}, cost=lambda case: case.N)


def _both_problem(case: SimpleNamespace, generator: torch.Generator) -> Problem:
    policy = _policy_problem(case, generator)
    value = _value_problem(SimpleNamespace(**{**vars(case), "mask": "all"}), generator)
    live = policy.x["weights"] != 0
    extra = {name: torch.where(live, value.x[name], math.nan) for name in ("values", "old_values", "returns")}
    return Problem(policy.x | extra, policy.settings | {"value_clip": case.clip, "value_coef": 0.5}, policy.upstream,
                   policy.hidden | dict.fromkeys(extra, ~live))


def _both(x: dict, s: dict, impl: str | None) -> Tensors:
    x = dict(x)
    names = ("logp", "old_logp", "advantages", "weights", "values", "old_values", "returns")
    return _stats(*policy_loss.policy_value_loss(*[x.pop(name) for name in names], **x, **s, impl=impl))


def _both_reference(x: dict, s: dict) -> Tensors:
    values = [x[name] for name in ("values", "old_values", "returns")]
    s, x = dict(s), {name: t for name, t in x.items() if name not in ("values", "old_values", "returns")}
    clip, coef = s.pop("value_clip"), s.pop("value_coef")
    policy = _policy_reference(x, s)
    value = policy_loss.value_loss_reference(*values, x["weights"], clip=clip)
    return policy | {"loss": policy["loss"] + coef * value[0]} | {f"1.{name}": t for name, t in value[1]._asdict().items()}


def _both_bounds(problem: Problem, want: Tensors) -> dict[str, Bound]:
    value = _value_bounds(problem, {"loss": want["1.loss"]} | {name.replace("1.", "0."): t for name, t in want.items() if name.startswith("1.")})
    return _policy_bounds(problem, want) | {f"1{name[1:]}": bound for name, bound in value.items() if name.startswith("0.")} | {"d values": Bound(2e-6, 1e-6)}


POLICY_VALUE_LOSS = Entry(
    "policy_value_loss", policy_loss._IMPLS, _TOKEN_LEVELS | {"offset": (0.0,), "clip": (0.2, None)}, _both_problem, _both, _both_reference, _both_bounds,
    ("logp", "entropy", "values"), {"N": (33, 0, 1, 1100)}, cost=lambda case: case.N)


def _linear_policy_problem(case: SimpleNamespace, generator: torch.Generator) -> Problem:
    x, settings, _ = _head(SimpleNamespace(**{**vars(case), "mask": "all"}), generator)
    x["token_ids"] = torch.randint(0, case.V, (case.N,), generator=generator)
    _by_row(case, generator, x, settings)
    T = x.get("temperature", settings.get("temperature"))
    logp, _ = linear_logprob.linear_logprob_reference(x["hidden"], x["weight"], x["token_ids"], x.get("bias"), T)
    columns, live = token_columns(SimpleNamespace(**{**vars(case), "layout": "plain"}), generator, logp.float())
    del columns["logp"]
    x["hidden"][~live], x["token_ids"][~live] = math.nan, 10**9
    settings |= _policy_settings(case, columns)
    hidden = {"hidden": ~live[:, None]} | {name: ~live for name in columns if name not in ("weights", "cu_seqlens")}
    return Problem(x | columns, settings, {"loss": torch.tensor(1.5)}, hidden)


def _linear_policy(x: dict, s: dict, impl: str | None) -> Tensors:
    return _stats(*linear_policy_loss.linear_policy_loss(**x, **s, impl=impl))


def _linear_policy_reference(x: dict, s: dict) -> Tensors:
    x, s = dict(x), {name: value for name, value in s.items() if name != "workspace_bytes"}
    s["temperature"] = x.pop("temperature", s.get("temperature"))
    positional = [x.pop(name) for name in ("hidden", "weight", "token_ids", "old_logp", "advantages", "weights")]
    named = {name if name == "cu_seqlens" else f"{name}_V" if name == "bias" else f"{name}_N": t for name, t in x.items()}
    return _stats(*linear_policy_loss.linear_policy_loss_reference(*positional, **named, **s))


def _linear_policy_bounds(problem: Problem, want: Tensors) -> dict[str, Bound]:
    size = 1.0 + float(problem.x["advantages"].nan_to_num().abs().max()) if problem.x["advantages"].numel() else 1.0
    bounds = {name: Bound(1e-5, 2e-5 * _spread(problem) * size) for name in want}
    return bounds | {name: Bound(b.rtol, b.atol * len(problem.x["weights"])) for name, b in bounds.items() if name in ("loss", "0.loss")} | {
        name: b if problem.x["hidden"].dtype == F32 else Bound(torch.finfo(problem.x["hidden"].dtype).eps, 1e-4 * size * max(1.0, float(want[name].abs().max())) if want[name].numel() else 0.0,
                                                               rounded=True)
        for name, b in _head_bounds(problem, want, ()).items()}


LINEAR_POLICY_LOSS = Entry(
    "linear_policy_loss", linear_policy_loss._IMPLS,
    _HEAD_LEVELS | {"mask": _TOKEN_LEVELS["mask"], "apart": (0.5, 0.0), "advantages": ("normal", "0", "+-1"), "objective": tuple(OBJECTIVES), "kl": KL_TERMS,
                    "correction": CORRECTIONS, "entropy_coef": (0.05, 0.0)},
    _linear_policy_problem, _linear_policy, _linear_policy_reference, _linear_policy_bounds, ("hidden", "weight", "bias"), _HEAD_TRITON, _fits_head, _head_cost)


# ---- estimates of a KL -----------------------------------------------------------------------------------------------------
def _token_kl_problem(case: SimpleNamespace, generator: torch.Generator) -> Problem:
    logp = -10 * uniform(generator, case.N)
    away = case.apart * floats(generator, case.N)
    away = torch.where((away.abs() - 20).abs() < 1e-3, away * 1.01, away)  # clear of the clamp, where a slope ends
    x = {"logp": laid_out(logp, case.layout), "ref_logp": laid_out(logp - away, case.layout)}
    if not hasattr(case, "level"):
        return Problem(x, {"estimator": case.estimator})
    live = _token_mask(case.mask, [case.N], generator)
    x = {name: torch.where(live, t, math.nan) for name, t in x.items()} | {"weights": torch.where(live, uniform(generator, case.N) - 0.2, 0.0)}
    if case.level == "sequence":
        x["cu_seqlens"] = torch.tensor([0, case.N // 3, case.N // 3, case.N], dtype=torch.int32)
    return Problem(x, {"estimator": case.estimator, "gradient": case.gradient, "level": case.level}, {"loss": torch.tensor(-1.25)},
                   {name: ~live for name in ("logp", "ref_logp")})


def _kl_loss_bounds(problem: Problem, want: Tensors) -> dict[str, Bound]:
    x, live = problem.x, problem.x["weights"] != 0
    d = (x["logp"] - x["ref_logp"])[live].double()
    terms = kl.token_kl_reference(d, torch.zeros_like(d), problem.settings["estimator"]).abs()
    sizes = float((x["weights"][live].double().abs() * terms).sum()) if problem.settings["level"] == "token" else float(d.abs().sum() ** 2 + math.exp(min(
        20.0, float(d.abs().sum()))))
    reach = 1.0 if problem.settings["level"] == "token" else max(1.0, float(d.abs().sum()))
    # A slope of the log ratio K of a sequence has the relative error of K, a sum of many.
    return {"loss": Bound(2e-6, 1e-6 * max(1.0, sizes)), "d logp": Bound(1e-5, 1e-6 * reach)}


TOKEN_KL = Entry(
    "token_kl", kl._IMPLS, {"N": (33, 0, 1, 127, 4096, 32768), "estimator": ("k3", "k1", "k2", "abs"), "apart": (1.0, 1e-4, 0.0, 40.0),
                            "layout": ("plain", "misaligned")}, _token_kl_problem,
    forward=lambda x, s, impl: {"kl": kl.token_kl(x["logp"], x["ref_logp"], **s, impl=impl)},
    reference=lambda x, s: {"kl": kl.token_kl_reference(x["logp"], x["ref_logp"], s["estimator"])},
    bounds=lambda problem, want: {"kl": Bound(1e-6, 1e-6)}, triton={"N": (33, 0, 1, 1100)}, cost=lambda case: case.N)

KL_LOSS = Entry(
    "kl_loss", kl._LOSS, TOKEN_KL.levels | {"gradient": ("k2", "k1", "k3", "abs"), "level": ("token", "sequence"), "mask": _TOKEN_LEVELS["mask"],
                                            "apart": (0.5, 1e-3, 0.0, 40.0)}, _token_kl_problem,
    forward=lambda x, s, impl: {"loss": kl.kl_loss(**x, **s, impl=impl)},
    reference=lambda x, s: {"loss": kl.kl_loss_reference(x["logp"], x["ref_logp"], x["weights"], s["estimator"], s["gradient"], x.get("cu_seqlens"))},
    bounds=_kl_loss_bounds, wants=("logp",), triton={"N": (33, 0, 1, 1100)}, cost=lambda case: case.N,
    fits=lambda case: not (case.level == "sequence" and (case.N > 127 or case.apart > 1)))


# ---- advantages ------------------------------------------------------------------------------------------------------------
PACKED = ((5, 0, 17, 11), (), (0,), (1,), (0, 1, 0, 2, 0), (127, 0, 129, 0), (32768,), (1,) * 127)
PADDED = ((3, 7), (2, 0), (0, 5), (1, 127), (3, 129), (2, 32768))  # [B, T]


def _sequences(case: SimpleNamespace, generator: torch.Generator) -> tuple[list[int], list[int] | None, Tensor]:
    """(lengths, [B, T] of the padded form or None, mask [N])."""
    padded = list(case.shape[1]) if case.shape[0] == "padded" else None
    lengths = [padded[1]] * padded[0] if padded else list(case.shape[1])
    return lengths, padded, _token_mask(case.mask, lengths, generator)


def _shaped(t: Tensor, padded: list[int] | None, layout: str) -> Tensor:
    if padded is None:
        return laid_out(t, "misaligned" if layout != "plain" else layout)
    return laid_out(t.view(padded), layout)


_SHAPES = tuple(("packed", lengths) for lengths in PACKED) + tuple(("padded", shape) for shape in PADDED)
_GAE_LEVELS = {"shape": _SHAPES, "mask": ("random", "all", "none", "first", "last"), "dtype": FLOATS, "layout": ("plain", "misaligned", "transposed"),
               "gamma": (1.0, 0.99, 0.0), "size": (1.0, 0.0, 1e6), "last": (True, False)}
_GAE_TRITON = {"shape": _SHAPES[:6] + _SHAPES[8:11]}


def _gae_cost(case: SimpleNamespace) -> int:
    return math.prod(case.shape[1]) if case.shape[0] == "padded" else sum(case.shape[1])


def _gae_problem(case: SimpleNamespace, generator: torch.Generator) -> Problem:
    lengths, padded, live = _sequences(case, generator)
    N = sum(lengths)
    columns = {name: (case.size * floats(generator, N)).to(case.dtype) for name in ("rewards", "values")}
    x = {name: _shaped(torch.where(live, t, math.nan), padded, case.layout) for name, t in columns.items()}
    x["mask"] = _shaped(live, padded, "plain")
    if padded is None:
        x["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0).int()
    if case.last:
        x["last_values"] = (case.size * floats(generator, len(lengths))).to(case.dtype)
    settings = {"gamma": case.gamma} | ({"k": case.k} if hasattr(case, "k") else {"lam": case.lam})
    return Problem(x, settings, hidden={name: ~x["mask"] for name in ("rewards", "values")})


def _sequential_error(problem: Problem) -> float:
    """Largest error of the recurrence as a float32 loop, one token after another: what lambda 1 is measured by."""
    x, gamma, lam = problem.x, problem.settings["gamma"], problem.settings["lam"]
    mask, worst = x["mask"].reshape(-1).tolist(), 0.0
    rewards, values = (x[name].float().reshape(-1).double().tolist() for name in ("rewards", "values"))
    bounds = x["cu_seqlens"].tolist() if "cu_seqlens" in x else [b * x["mask"].shape[1] for b in range(x["mask"].shape[0] + 1)]
    last = x["last_values"].double().tolist() if "last_values" in x else [0.0] * len(bounds)
    for b, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        live = [t for t in range(end - 1, start - 1, -1) if mask[t]]
        next_value, running, exact = last[b], torch.zeros(()).numpy().dtype.type(0), 0.0
        to32 = type(running)
        for t in live:
            delta = rewards[t] + gamma * next_value - values[t]
            running, exact, next_value = to32(to32(delta) + to32(gamma * lam) * running), delta + gamma * lam * exact, values[t]
            worst = max(worst, abs(float(running) - exact))
    return worst


def _gae_bounds(problem: Problem, want: Tensors) -> dict[str, Bound]:
    """Contract: atol 2e-5, rtol 1e-5 up to lambda .95, for values of size 1; at lambda 1 twice the error of a sequential float32 loop."""
    x = problem.x
    size = max([1.0] + [float(x[name].double().nan_to_num().abs().max()) / 4 for name in ("rewards", "values") if x[name].numel()])
    lam = problem.settings.get("lam", 1.0)
    if lam > 0.95 and "k" not in problem.settings and want["advantages"].numel():
        atol = 2 * _sequential_error(problem) + 1e-6 * size
        return dict.fromkeys(("advantages", "returns"), Bound(1e-6, atol))
    return dict.fromkeys(("advantages", "returns"), Bound(1e-5, 2e-5 * size))


def _pair(result: tuple[Tensor, Tensor]) -> Tensors:
    return dict(zip(("advantages", "returns"), result, strict=True))


def _gae_reference(x: dict, s: dict) -> Tensors:
    return _pair(gae.gae_reference(x["rewards"], x["values"], x["mask"], x.get("cu_seqlens"), s["gamma"], s["lam"], x.get("last_values")))


GAE = Entry(
    "gae", gae._GAE, _GAE_LEVELS | {"lam": (0.95, 1.0, 0.0)}, _gae_problem,
    forward=lambda x, s, impl: _pair(gae.gae(**x, **s, impl=impl)), reference=_gae_reference, bounds=_gae_bounds, triton=_GAE_TRITON, cost=_gae_cost)

TD_ADVANTAGES = Entry(
    "td_advantages", gae._GAE, {**_GAE_LEVELS, "lam": (0.0,)}, _gae_problem,
    forward=lambda x, s, impl: _pair(gae.td_advantages(**x, gamma=s["gamma"], impl=impl)), reference=_gae_reference, bounds=_gae_bounds,
    triton=_GAE_TRITON, cost=_gae_cost)

DISCOUNTED_RETURNS = Entry(
    "discounted_returns", gae._GAE, {**_GAE_LEVELS, "lam": (1.0,)},
    lambda case, generator: Problem(**{**vars(p := _gae_problem(case, generator)), "x": p.x | {"values": torch.zeros_like(p.x["rewards"])}}),
    forward=lambda x, s, impl: {"advantages": gae.discounted_returns(**{n: t for n, t in x.items() if n != "values"}, gamma=s["gamma"], impl=impl)},
    reference=lambda x, s: {"advantages": _gae_reference(x, s)["advantages"]}, bounds=_gae_bounds, triton=_GAE_TRITON, cost=_gae_cost)

K_STEP_ADVANTAGES = Entry(
    "k_step_advantages", gae._K_STEP, _GAE_LEVELS | {"k": (3, 1, 20, 1000)}, _gae_problem,
    forward=lambda x, s, impl: _pair(gae.k_step_advantages(**x, **s, impl=impl)),
    reference=lambda x, s: _pair(gae.k_step_advantages_reference(x["rewards"], x["values"], x["mask"], x.get("cu_seqlens"), s["k"], s["gamma"],
                                                                 x.get("last_values"))),
    bounds=lambda problem, want: {name: Bound(b.rtol, b.atol * (1 if problem.settings["k"] <= 20 or problem.settings["gamma"] < 1 else 10))
                                  for name, b in _gae_bounds(problem, want).items()},
    triton=_GAE_TRITON, cost=_gae_cost)


def _shaped_gae_problem(case: SimpleNamespace, generator: torch.Generator) -> Problem:
    lengths, padded, live = _sequences(case, generator)
    N = sum(lengths)
    logp = -4 * uniform(generator, N)
    columns = {"logp": logp, "ref_logp": logp + 0.3 * floats(generator, N), "values": floats(generator, N)} | (
        {"token_rewards": floats(generator, N)} if case.token_rewards else {})
    x = {name: _shaped(torch.where(live, t, math.nan).to(case.dtype), padded, case.layout) for name, t in columns.items()}
    hidden = {name: ~live.view(x["logp"].shape) for name in columns}
    x |= {"scores": floats(generator, len(lengths)).to(case.dtype) * 3, "mask": _shaped(live, padded, "plain"),
          "cu_seqlens": None if padded else torch.tensor([0, *lengths]).cumsum(0).int(), "kl_coef": torch.tensor(0.2)}
    settings = {"gamma": case.gamma, "lam": case.lam, "kl_estimator": case.estimator, "score_clip": case.clip, "whiten": case.whiten,
                "whiten_unbiased": case.unbiased, "allow_biased_kl": case.estimator != "k1"}
    return Problem(x, settings, hidden=hidden)


def _shaped_gae_reference(x: dict, s: dict) -> Tensors:
    x = {"token_rewards": None} | x
    return gae.shaped_gae_reference(x["logp"], x["ref_logp"], x["values"], x["scores"], x["mask"], x["cu_seqlens"], x["kl_coef"], s["kl_estimator"], s["gamma"],
                                    s["lam"], x["token_rewards"], s["score_clip"], s["whiten"], s["whiten_unbiased"])._asdict()


SHAPED_GAE = Entry(
    "shaped_gae", gae._SHAPED,
    {**_GAE_LEVELS, "lam": (0.95, 0.0), "estimator": ("k1", "k2", "k3", "abs"), "token_rewards": (False, True), "clip": (None, 1.0), "whiten": (True, False),
     "unbiased": (False, True)},
    _shaped_gae_problem,
    forward=lambda x, s, impl: gae.shaped_gae(**x, **s, impl=impl)._asdict(), reference=_shaped_gae_reference,
    bounds=lambda problem, want: {name: Bound(1e-5, 2e-5 if name != "kl_per_sequence" else 2e-5 * max(1.0, problem.x["logp"].numel() / 1000))
                                  for name in want},
    triton=_GAE_TRITON, cost=_gae_cost)


# ---- normalisation and ranking ---------------------------------------------------------------------------------------------
def _whiten_problem(case: SimpleNamespace, generator: torch.Generator) -> Problem:
    live = _token_mask(case.mask, [case.N], generator)
    x = torch.full((case.N,), 0.3) if case.size == 0.0 else case.size * floats(generator, case.N)
    x = torch.where(live, x + case.offset, math.nan).to(case.dtype)
    if case.layout == "transposed":
        width = next(w for w in (64, 31, 3, 1) if case.N % w == 0)
        x, live = laid_out(x.view(-1, width), "transposed"), live.view(-1, width)
    else:
        x = laid_out(x, case.layout)
    return Problem({"x": x, "mask": live}, {"shift_mean": case.shift_mean, "unbiased": case.unbiased}, hidden={"x": ~live})


MASKED_WHITEN = Entry(
    "masked_whiten", normalize._IMPLS,
    {"N": (33, 0, 1, 127, 4096, 32768), "mask": ("random", "all", "none", "first", "last"), "offset": (0.0, 1e4), "size": (1.0, 0.0, 1e6), "dtype": FLOATS,
     "layout": ("plain", "misaligned", "transposed"), "shift_mean": (True, False), "unbiased": (False, True)},
    _whiten_problem,
    forward=lambda x, s, impl: {"whitened": normalize.masked_whiten(**x, **s, impl=impl)},
    reference=lambda x, s: {"whitened": normalize.masked_whiten_reference(x["x"], x["mask"], **s)},
    bounds=lambda problem, want: {"whitened": Bound(1e-5, 1e-5)}, triton={"N": (33, 0, 1, 1100)}, cost=lambda case: case.N,
    fits=lambda case: case.dtype == F32 or (case.size <= 1.0 and not (case.dtype == F16 and case.offset)))


def _group_problem(case: SimpleNamespace, generator: torch.Generator) -> Problem:
    scores = (case.size * floats(generator, case.N) + case.offset).to(case.dtype)
    scores[: case.N // 4] = 0.1 + case.offset  # groups of a single value
    if case.groups == "ids":
        return Problem({"scores": laid_out(scores, case.layout), "group_ids": torch.randint(-3, 10, (case.N,), generator=generator) * 10**9},
                       {"method": case.method, "unbiased": case.unbiased})
    return Problem({"scores": laid_out(scores, case.layout)}, {"group_size": case.groups, "method": case.method, "unbiased": case.unbiased})


def _group_reference(x: dict, s: dict) -> Tensors:
    ids = x["group_ids"] if "group_ids" in x else torch.arange(len(x["scores"])) // s["group_size"]
    return dict(zip(("advantages", "zero_variance"), normalize.group_normalize_reference(x["scores"], ids, s["method"], 1e-6, s["unbiased"]), strict=True))


GROUP_NORMALIZE = Entry(
    "group_normalize", normalize._GROUP,
    {"N": (32, 0, 128, 4096), "groups": ("ids", 4, 1, 16), "method": normalize.GROUP_METHODS, "offset": (0.0, 1e4), "size": (1.0, 0.0), "dtype": FLOATS,
     "layout": ("plain", "misaligned"), "unbiased": (True, False)},
    _group_problem,
    forward=lambda x, s, impl: normalize.group_normalize(x["scores"], x.get("group_ids"), **s, impl=impl)._asdict(), reference=_group_reference,
    bounds=lambda problem, want: {"advantages": Bound(1e-6, 1e-6), "zero_variance": Bound()}, triton={"N": (32, 0, 128)}, cost=lambda case: case.N,
    fits=lambda case: case.dtype != F16 or not case.offset)


def _pairwise_problem(case: SimpleNamespace, generator: torch.Generator) -> Problem:
    names = ("chosen", "rejected", "margin") if case.margin else ("chosen", "rejected")
    return Problem({name: laid_out(case.size * floats(generator, case.N), case.layout) for name in names}, {}, {"loss": torch.tensor(-2.0)})


PAIRWISE_RANKING_LOSS = Entry(
    "pairwise_ranking_loss", ranking_loss._IMPLS,
    {"N": (33, 0, 1, 127, 4096), "margin": (True, False), "size": (1.0, 0.0, 30.0, 1e4), "layout": ("plain", "misaligned")}, _pairwise_problem,
    forward=lambda x, s, impl: {"loss": ranking_loss.pairwise_ranking_loss(**x, impl=impl)},
    reference=lambda x, s: {"loss": ranking_loss.pairwise_ranking_loss_reference(x["chosen"], x["rejected"], x.get("margin"))},
    bounds=lambda problem, want: dict.fromkeys(want, Bound(1e-5, 1e-6)) | {"loss": Bound(2e-6, 1e-6)}, wants=("chosen", "rejected", "margin"),
    triton={"N": (33, 0, 1, 127)}, cost=lambda case: case.N)


def _kwise_problem(case: SimpleNamespace, generator: torch.Generator) -> Problem:
    groups = torch.tensor([0, *case.sizes]).cumsum(0).int()
    M = int(groups[-1])
    ranks = {"order": torch.rand(M, generator=generator).argsort() + 1, "ties": torch.randint(-2, 3, (M,), generator=generator).int(),
             "all tied": torch.ones(M, dtype=torch.int64)}[case.ranks]
    return Problem({"scores": laid_out(case.size * floats(generator, M), case.layout), "ranks": ranks, "cu_groups": groups}, {}, {"loss": torch.tensor(3.0)})


KWISE_RANKING_LOSS = Entry(
    "kwise_ranking_loss", ranking_loss._KWISE,
    {"sizes": ((4, 0, 9, 1, 2), (), (0,), (2,), (40, 2), (2, 3, 4, 5, 6, 7, 8, 9) * 8), "ranks": ("order", "ties", "all tied"), "size": (1.0, 300.0),
     "layout": ("plain", "misaligned")}, _kwise_problem,
    forward=lambda x, s, impl: {"loss": ranking_loss.kwise_ranking_loss(**x, impl=impl)},
    reference=lambda x, s: {"loss": ranking_loss.kwise_ranking_loss_reference(**{f"{n}_M" if n != "cu_groups" else n: t for n, t in x.items()})},
    bounds=lambda problem, want: {"loss": Bound(2e-6, 1e-6), "d scores": Bound(1e-5, 1e-6)}, wants=("scores",), cost=lambda case: sum(case.sizes) ** 2)


# ---- layers ----------------------------------------------------------------------------------------------------------------
def no_worse(problem: Problem, want: Tensors, peer: Tensors, floor: float = 0.0, roundings: float = 1.0, factor: float = 1.0) -> dict[str, Bound]:
    """Bounds of an op that is held to the error of torch in the same dtype: `factor` times its largest, and a few roundings of the largest value."""
    bounds = {}
    for name, expected in want.items():
        if expected.numel() == 0:
            bounds[name] = Bound()
            continue
        dtype = peer[name].dtype
        theirs, largest = float((peer[name].double() - expected).abs().nan_to_num().max()), float(expected.abs().nan_to_num().max())
        bounds[name] = Bound(0.0, factor * theirs + (4 if dtype == F32 else roundings) * torch.finfo(dtype).eps * max(floor, largest))
    return bounds


def _peer(entry: Entry, problem: Problem) -> Tensors:
    """The reference in the dtype of the inputs."""
    from grid import run
    return run(entry, problem, None, lambda x, s, impl: entry.reference(x, s))


def _rms_norm_problem(case: SimpleNamespace, generator: torch.Generator) -> Problem:
    shape = (case.N, case.H) if case.heads == 0 else (case.N, case.heads, case.H)
    x = {"x": laid_out((case.size * floats(generator, *shape) + case.offset).to(case.dtype), case.layout),
         "weight": (1 + 0.3 * floats(generator, case.H)).to(case.dtype)}
    upstream = {"y": floats(generator, *shape, dtype=case.dtype)}
    if case.residual:
        x["residual"] = (case.size * floats(generator, *shape)).to(case.dtype)
        upstream["sum"] = floats(generator, *shape, dtype=case.dtype)
    return Problem(x, {"eps": 1e-5}, upstream)


def _rms_norm(x: dict, s: dict, impl: str | None) -> Tensors:
    result = rms_norm.rms_norm(**x, **s, impl=impl)
    return dict(zip(("y", "sum"), result, strict=True)) if "residual" in x else {"y": result}


def _rms_norm_reference(x: dict, s: dict) -> Tensors:
    y, total = rms_norm.rms_norm_reference(x["x"], x["weight"], s["eps"], x.get("residual"))
    return {"y": y, "sum": total} if "residual" in x else {"y": y}


RMS_NORM = Entry(
    "rms_norm", rms_norm._IMPLS,
    {"N": (7, 0, 1, 33, 127, 4096), "H": (33, 1, 2, 31, 128, 1023, 2051), "heads": (0, 2), "dtype": FLOATS, "residual": (True, False), "size": (1.0, 1e-4, 1e3),
     "offset": (0.0, 100.0), "layout": ("plain", "padded", "misaligned")},
    _rms_norm_problem, _rms_norm, _rms_norm_reference,
    # A single value is its own rms: its gradient is nothing but what cancels. The weight's gradient is a sum over rows.
    lambda problem, want: no_worse(problem, want, _peer(RMS_NORM, problem), 4.0 if problem.x["x"].shape[-1] <= 2 else 0.0, 2.0), ("x", "weight", "residual"),
    {"N": (7, 0, 1, 9)}, cost=lambda case: case.N * case.H * max(1, case.heads), fits=lambda case: case.N * case.H * max(1, case.heads) <= 1 << 21)


def _rope_problem(case: SimpleNamespace, generator: torch.Generator) -> Problem:
    Hq, Hkv = case.heads
    q, k = (laid_out(floats(generator, case.N, h, case.D, dtype=case.dtype), case.layout) for h in (Hq, Hkv))
    angles = 100 * uniform(generator, case.N, case.D // 2)
    return Problem({"q": q, "k": k, "cos": angles.cos(), "sin": angles.sin()}, {},
                   {"q": floats(generator, case.N, Hq, case.D, dtype=case.dtype), "k": floats(generator, case.N, Hkv, case.D, dtype=case.dtype)})


ROPE = Entry(
    "rope", rope._IMPLS, {"N": (7, 0, 1, 33, 127), "heads": ((3, 1), (1, 1), (8, 4), (20, 2)), "D": (8, 2, 34, 80, 128), "dtype": FLOATS,
                          "layout": ("plain", "padded", "misaligned")}, _rope_problem,
    forward=lambda x, s, impl: dict(zip("qk", rope.rope(**x, impl=impl), strict=True)),
    reference=lambda x, s: dict(zip("qk", rope.rope_reference(**x), strict=True)),
    bounds=lambda problem, want: no_worse(problem, want, _peer(ROPE, problem)), wants=("q", "k"), triton={"N": (5, 0, 1, 9)},
    cost=lambda case: case.N * case.D * sum(case.heads))


def _swiglu_problem(case: SimpleNamespace, generator: torch.Generator) -> Problem:
    return Problem({"gate_up": laid_out((case.size * floats(generator, case.N, 2 * case.F)).to(case.dtype), case.layout)}, {},
                   {"y": floats(generator, case.N, case.F, dtype=case.dtype)})


SWIGLU = Entry(
    "swiglu", swiglu._IMPLS, {"N": (7, 0, 1, 33, 127), "F": (33, 1, 31, 1023, 1025), "size": (1.0, 1e-4, 100.0), "dtype": FLOATS,
                              "layout": ("plain", "padded", "misaligned")}, _swiglu_problem,
    forward=lambda x, s, impl: {"y": swiglu.swiglu(x["gate_up"], impl=impl)}, reference=lambda x, s: {"y": swiglu.swiglu_reference(x["gate_up"])},
    bounds=lambda problem, want: no_worse(problem, want, _peer(SWIGLU, problem)), wants=("gate_up",), triton={"N": (5, 0, 1, 9)},
    cost=lambda case: case.N * case.F, fits=lambda case: case.dtype != F16 or case.size < 100)  # their products leave float16


def _attention_problem(case: SimpleNamespace, generator: torch.Generator) -> Problem:
    N, (Hq, Hkv, D) = sum(case.lengths), case.heads
    x = {name: laid_out(floats(generator, N, h, D, dtype=case.dtype), case.layout) for name, h in (("q", Hq), ("k", Hkv), ("v", Hkv))}
    x["cu_seqlens"] = torch.tensor([0, *case.lengths]).cumsum(0).int()
    return Problem(x, {"max_length": max(case.lengths, default=0), "causal": case.causal, "window": case.window},
                   {"o": floats(generator, N, Hq, D, dtype=case.dtype)})


def _attention_reference(x: dict, s: dict) -> Tensors:
    if x["q"].shape[0] == 0:
        return {"o": x["q"] + x["k"].sum() + x["v"].sum()}
    return {"o": attention.varlen_attention_reference(x["q"], x["k"], x["v"], x["cu_seqlens"], causal=s["causal"], window=s["window"])}


VARLEN_ATTENTION = Entry(
    "varlen_attention", attention._IMPLS,
    {"lengths": ((5, 0, 9, 1), (), (0,), (1,), (127, 1, 129), (33,) * 4), "heads": ((4, 2, 8), (3, 3, 18), (5, 1, 1)), "causal": (True, False),
     "window": (None, 1, 4, 100), "dtype": FLOATS, "layout": ("plain", "padded", "misaligned")},
    _attention_problem, forward=lambda x, s, impl: {"o": attention.varlen_attention(**x, **s, impl=impl)}, reference=_attention_reference,
    bounds=lambda problem, want: no_worse(problem, want, _peer(VARLEN_ATTENTION, problem), 4.0, 2.0, 2.0), wants=("q", "k", "v"),
    cost=lambda case: sum(n * n for n in case.lengths))


def _decode_problem(case: SimpleNamespace, generator: torch.Generator) -> Problem:
    heads, kv_heads, D, H, F, V, L, S = 4, 2, 8, 20, 27, 31, 2, 16

    def rand(*shape: int) -> Tensor:
        return (floats(generator, *shape) * shape[-1] ** -0.5).to(case.dtype)

    def norm(size: int) -> Tensor | None:
        return (1 + 0.2 * floats(generator, size)).to(case.dtype)

    layers = tuple(decode_step.LayerWeights(
        norm(H), rand((heads + 2 * kv_heads) * D, H), rand((heads + 2 * kv_heads) * D) if case.bias else None, norm(D) if case.bias else None,
        norm(D) if case.bias else None, rand(H, heads * D), rand(H) if case.bias else None, norm(H), rand(2 * F, H), rand(2 * F) if case.bias else None,
        rand(H, F), rand(H) if case.bias else None, case.window) for _ in range(L))
    embedding = rand(V, H)
    weights = decode_step.DecoderWeights(embedding, layers, norm(H), embedding, 1.0 / 100.0 ** (torch.arange(D // 2) / (D // 2)), 1.0, heads, kv_heads, D, 1e-5)
    # Every sequence from its first position, its tokens in one call; blocks dealt out at random, the rest of the table and of the cache wild.
    positions = torch.cat([torch.arange(n) for n in case.lengths]) if case.lengths else torch.zeros(0, dtype=torch.int64)
    rows = torch.repeat_interleave(torch.arange(len(case.lengths)), torch.tensor(case.lengths, dtype=torch.int64))
    needed = [-(-n // S) for n in case.lengths]
    table = torch.full((max(1, len(case.lengths)), max(needed, default=0) + 1), -1, dtype=torch.int32)
    deal, at = torch.randperm(sum(needed) + 2, generator=generator).int(), 0
    for b, count in enumerate(needed):
        table[b, :count] = deal[at:at + count]
        at += count
    k_cache, v_cache = decode_step.allocate_cache(weights, sum(needed) + 2, S)
    x = {"token_ids": torch.randint(0, V, (len(positions),), generator=generator), "positions": positions, "rows": rows, "block_table": table,
         "k_cache": k_cache.fill_(math.nan), "v_cache": v_cache.fill_(math.nan), "out_slots": torch.arange(len(positions))[::2].contiguous()}
    return Problem(x, {"weights": weights})


def _decode(x: dict, s: dict, impl: str | None) -> Tensors:
    """Also the caches: what was not written is still NaN."""
    return {"hidden": decode_step.decode_step(s["weights"], **x, impl=impl), "k_cache": x["k_cache"], "v_cache": x["v_cache"]}


def _decode_reference(x: dict, s: dict) -> Tensors:
    weights: decode_step.DecoderWeights = s["weights"]
    if x["k_cache"].dtype == torch.float64:
        widen = lambda t: t.double() if isinstance(t, Tensor) else t  # noqa: E731
        weights = weights._replace(**{n: widen(getattr(weights, n)) for n in ("embedding", "norm", "head")},
                                   layers=tuple(decode_step.LayerWeights(*map(widen, layer)) for layer in weights.layers))
    x = x | {name: x[name].clone() for name in ("k_cache", "v_cache")}
    return _decode(x, {"weights": weights}, "torch")


DECODE_STEP = Entry(
    "decode_step", decode_step._IMPLS,
    {"lengths": ((5, 1, 20), (), (1,), (33, 2), (1,) * 33), "bias": (True, False), "window": (0, 3, 17), "dtype": (F32, BF16)},
    _decode_problem, _decode, _decode_reference,
    lambda problem, want: no_worse(problem, want, _decode_reference({n: t for n, t in problem.x.items()}, problem.settings), 1.0, 4.0, 2.0),
    writes=("k_cache", "v_cache"), cost=lambda case: sum(case.lengths) * 1000)


LOGPROB, LOGPROB_ = _logprob_entry(logprob.logprob), _logprob_entry(logprob.logprob_, writes=("logits",), levels={"layout": ("plain", "padded", "misaligned")})
CATALOGUE = {entry.op: entry for entry in vars().copy().values() if isinstance(entry, Entry)}


def pairs(device: str = "cpu") -> list[tuple[str, str]]:
    """(op, implementation) of all that can run here."""
    return [(op, impl) for op, entry in CATALOGUE.items() for impl in entry.implementations(device)]
