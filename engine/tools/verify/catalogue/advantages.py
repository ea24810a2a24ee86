"""Advantages, normalisation, ranking: gae and its kin, shaped_gae, masked_whiten, group_normalize,
the ranking losses."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from fusedrl.engine.tools.verify import definitions
from fusedrl.engine.tools.verify.grid import Bound, Entry, Problem, Tensors
from fusedrl.kernels import gae, normalize, ranking_loss

from .common import F16, F32, FLOATS, floats, laid_out, token_mask, uniform

# ---- advantages ----------------------------------------------------------------------------------
PACKED = ((5, 0, 17, 11), (), (0,), (1,), (0, 1, 0, 2, 0), (127, 0, 129, 0), (32768,), (1,) * 127)
PADDED = ((3, 7), (2, 0), (0, 5), (1, 127), (3, 129), (2, 32768))  # [B, T]


def _sequences(
    case: SimpleNamespace, generator: torch.Generator
) -> tuple[list[int], list[int] | None, Tensor]:
    """Return the lengths of a case's sequences, the padded shape [B, T] or None if packed, and a
    mask [N]."""
    padded = list(case.shape[1]) if case.shape[0] == "padded" else None
    lengths = [padded[1]] * padded[0] if padded else list(case.shape[1])
    return lengths, padded, token_mask(case.mask, lengths, generator)


def _shaped(t: Tensor, padded: list[int] | None, layout: str) -> Tensor:
    if padded is None:
        return laid_out(t, "misaligned" if layout != "plain" else layout)
    return laid_out(t.view(padded), layout)


_SHAPES = tuple(("packed", lengths) for lengths in PACKED) + tuple(
    ("padded", shape) for shape in PADDED
)
_GAE_LEVELS = {
    "shape": _SHAPES,
    "mask": ("random", "all", "none", "first", "last"),
    "dtype": FLOATS,
    "layout": ("plain", "misaligned", "transposed"),
    "gamma": (1.0, 0.99, 0.0),
    "size": (1.0, 0.0, 1e6),
    "last": (True, False),
}
_GAE_TIMED = {
    "cpu": {"shape": ("packed", (512,) * 512), "mask": "all"},
    "cuda": {"shape": ("packed", (1024,) * 4096), "mask": "all"},
}
_GAE_TRITON = {"shape": _SHAPES[:6] + _SHAPES[8:11]}


def _gae_cost(case: SimpleNamespace) -> int:
    return math.prod(case.shape[1]) if case.shape[0] == "padded" else sum(case.shape[1])


def _gae_problem(case: SimpleNamespace, generator: torch.Generator) -> Problem:
    lengths, padded, live = _sequences(case, generator)
    N = sum(lengths)
    columns = {
        name: (case.size * floats(generator, N)).to(case.dtype) for name in ("rewards", "values")
    }
    x = {
        name: _shaped(torch.where(live, t, math.nan), padded, case.layout)
        for name, t in columns.items()
    }
    x["mask"] = _shaped(live, padded, "plain")
    if padded is None:
        x["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0).int()
    if case.last:
        x["last_values"] = (case.size * floats(generator, len(lengths))).to(case.dtype)
    settings = {"gamma": case.gamma} | ({"k": case.k} if hasattr(case, "k") else {"lam": case.lam})
    return Problem(x, settings, hidden=dict.fromkeys(("rewards", "values"), ~x["mask"]))


def _sequential_error(problem: Problem) -> float:
    """Return the largest error of the recurrence as a sequential float32 loop. It sets the bound
    for lambda 1."""
    x, gamma, lam = problem.x, problem.settings["gamma"], problem.settings["lam"]
    mask, worst = x["mask"].reshape(-1).tolist(), 0.0
    rewards, values = (
        x[name].float().reshape(-1).double().tolist() for name in ("rewards", "values")
    )
    bounds = (
        x["cu_seqlens"].tolist()
        if "cu_seqlens" in x
        else [b * x["mask"].shape[1] for b in range(x["mask"].shape[0] + 1)]
    )
    last = x["last_values"].double().tolist() if "last_values" in x else [0.0] * len(bounds)
    for b, (start, end) in enumerate(itertools.pairwise(bounds)):
        live = [t for t in range(end - 1, start - 1, -1) if mask[t]]
        next_value, running, exact = last[b], np.float32(0), 0.0
        for t in live:
            delta = rewards[t] + gamma * next_value - values[t]
            running, exact, next_value = (
                np.float32(delta) + np.float32(gamma * lam) * running,
                delta + gamma * lam * exact,
                values[t],
            )
            worst = max(worst, abs(float(running) - exact))
    return worst


def _gae_bounds(problem: Problem, want: Tensors) -> dict[str, Bound]:
    """Return the contract's bounds: atol 2e-5, rtol 1e-5 up to lambda .95, for values of size 1; at
    lambda 1 twice the error of a sequential float32 loop."""
    x = problem.x
    size = max(
        [1.0]
        + [
            float(x[name].double().nan_to_num().abs().max()) / 4
            for name in ("rewards", "values")
            if x[name].numel()
        ]
    )
    lam = problem.settings.get("lam", 1.0)
    if lam > 0.95 and "k" not in problem.settings and want["advantages"].numel():
        atol = 2 * _sequential_error(problem) + 1e-6 * size
        return dict.fromkeys(("advantages", "returns"), Bound(1e-6, atol))
    return dict.fromkeys(("advantages", "returns"), Bound(1e-5, 2e-5 * size))


def _pair(result: tuple[Tensor, Tensor]) -> Tensors:
    return dict(zip(("advantages", "returns"), result, strict=True))


def _gae_definition(x: dict, s: dict) -> Tensors:
    return definitions.gae(
        x["rewards"],
        x["values"],
        x["mask"],
        x.get("cu_seqlens"),
        s["gamma"],
        s["lam"],
        x.get("last_values"),
    )


GAE = Entry(
    "gae",
    gae._GAE,
    _GAE_LEVELS | {"lam": (0.95, 1.0, 0.0)},
    _gae_problem,
    forward=lambda x, s, impl: _pair(gae.gae(**x, **s, impl=impl)),
    definition=_gae_definition,
    bounds=_gae_bounds,
    triton=_GAE_TRITON,
    cost=_gae_cost,
    timed=_GAE_TIMED,
)

TD_ADVANTAGES = Entry(
    "td_advantages",
    gae._GAE,
    {**_GAE_LEVELS, "lam": (0.0,)},
    _gae_problem,
    forward=lambda x, s, impl: _pair(gae.td_advantages(**x, gamma=s["gamma"], impl=impl)),
    definition=_gae_definition,
    bounds=_gae_bounds,
    triton=_GAE_TRITON,
    cost=_gae_cost,
    timed=_GAE_TIMED,
)

DISCOUNTED_RETURNS = Entry(
    "discounted_returns",
    gae._GAE,
    {**_GAE_LEVELS, "lam": (1.0,)},
    lambda case, generator: Problem(
        **{
            **vars(p := _gae_problem(case, generator)),
            "x": p.x | {"values": torch.zeros_like(p.x["rewards"])},
        }
    ),
    forward=lambda x, s, impl: {
        "advantages": gae.discounted_returns(
            **{n: t for n, t in x.items() if n != "values"}, gamma=s["gamma"], impl=impl
        )
    },
    definition=lambda x, s: {
        "advantages": definitions.discounted_returns(
            x["rewards"], x["mask"], x.get("cu_seqlens"), s["gamma"], x.get("last_values")
        )
    },
    bounds=_gae_bounds,
    triton=_GAE_TRITON,
    cost=_gae_cost,
    timed=_GAE_TIMED,
)

K_STEP_ADVANTAGES = Entry(
    "k_step_advantages",
    gae._K_STEP,
    _GAE_LEVELS | {"k": (3, 1, 20, 1000)},
    _gae_problem,
    forward=lambda x, s, impl: _pair(gae.k_step_advantages(**x, **s, impl=impl)),
    definition=lambda x, s: definitions.k_step_advantages(
        x["rewards"],
        x["values"],
        x["mask"],
        x.get("cu_seqlens"),
        s["k"],
        s["gamma"],
        x.get("last_values"),
    ),
    bounds=lambda problem, want: {
        name: Bound(
            b.rtol,
            b.atol * (1 if problem.settings["k"] <= 20 or problem.settings["gamma"] < 1 else 10),
        )
        for name, b in _gae_bounds(problem, want).items()
    },
    triton=_GAE_TRITON,
    cost=_gae_cost,
    timed=_GAE_TIMED,
)


def _shaped_gae_problem(case: SimpleNamespace, generator: torch.Generator) -> Problem:
    lengths, padded, live = _sequences(case, generator)
    N = sum(lengths)
    logp = -4 * uniform(generator, N)
    columns = {
        "logp": logp,
        "ref_logp": logp + 0.3 * floats(generator, N),
        "values": floats(generator, N),
    } | ({"token_rewards": floats(generator, N)} if case.token_rewards else {})
    x = {
        name: _shaped(torch.where(live, t, math.nan).to(case.dtype), padded, case.layout)
        for name, t in columns.items()
    }
    hidden = {name: ~live.view(x["logp"].shape) for name in columns}
    x |= {
        "scores": floats(generator, len(lengths)).to(case.dtype) * 3,
        "mask": _shaped(live, padded, "plain"),
        "cu_seqlens": None if padded else torch.tensor([0, *lengths]).cumsum(0).int(),
        "kl_coef": torch.tensor(0.2),
    }
    settings = {
        "gamma": case.gamma,
        "lam": case.lam,
        "kl_estimator": case.estimator,
        "score_clip": case.clip,
        "whiten": case.whiten,
        "whiten_unbiased": case.unbiased,
        "allow_biased_kl": case.estimator != "k1",
    }
    return Problem(x, settings, hidden=hidden)


def _shaped_gae_definition(x: dict, s: dict) -> Tensors:
    x = {"token_rewards": None} | x
    return definitions.shaped_gae(
        x["logp"],
        x["ref_logp"],
        x["values"],
        x["scores"],
        x["mask"],
        x["cu_seqlens"],
        float(x["kl_coef"]),
        s["kl_estimator"],
        s["gamma"],
        s["lam"],
        x["token_rewards"],
        s["score_clip"],
        s["whiten"],
        s["whiten_unbiased"],
    )


SHAPED_GAE = Entry(
    "shaped_gae",
    gae._SHAPED,
    {
        **_GAE_LEVELS,
        "lam": (0.95, 0.0),
        "estimator": ("k1", "k2", "k3", "abs"),
        "token_rewards": (False, True),
        "clip": (None, 1.0),
        "whiten": (True, False),
        "unbiased": (False, True),
    },
    _shaped_gae_problem,
    forward=lambda x, s, impl: gae.shaped_gae(**x, **s, impl=impl)._asdict(),
    definition=_shaped_gae_definition,
    bounds=lambda problem, want: {
        name: Bound(
            1e-5,
            2e-5
            if name != "kl_per_sequence"
            else 2e-5 * max(1.0, problem.x["logp"].numel() / 1000),
        )
        for name in want
    },
    triton=_GAE_TRITON,
    cost=_gae_cost,
    timed=_GAE_TIMED,
)


# ---- normalisation and ranking -------------------------------------------------------------------
def _whiten_problem(case: SimpleNamespace, generator: torch.Generator) -> Problem:
    live = token_mask(case.mask, [case.N], generator)
    x = torch.full((case.N,), 0.3) if case.size == 0.0 else case.size * floats(generator, case.N)
    x = torch.where(live, x + case.offset, math.nan).to(case.dtype)
    if case.layout == "transposed":
        width = next(w for w in (64, 31, 3, 1) if case.N % w == 0)
        x, live = laid_out(x.view(-1, width), "transposed"), live.view(-1, width)
    else:
        x = laid_out(x, case.layout)
    return Problem(
        {"x": x, "mask": live},
        {"shift_mean": case.shift_mean, "unbiased": case.unbiased},
        hidden={"x": ~live},
    )


MASKED_WHITEN = Entry(
    "masked_whiten",
    normalize._IMPLS,
    {
        "N": (33, 0, 1, 127, 4096, 32768),
        "mask": ("random", "all", "none", "first", "last"),
        "offset": (0.0, 1e4),
        "size": (1.0, 0.0, 1e6),
        "dtype": FLOATS,
        "layout": ("plain", "misaligned", "transposed"),
        "shift_mean": (True, False),
        "unbiased": (False, True),
    },
    _whiten_problem,
    forward=lambda x, s, impl: {"whitened": normalize.masked_whiten(**x, **s, impl=impl)},
    definition=lambda x, s: {"whitened": definitions.masked_whiten(x["x"], x["mask"], **s)},
    bounds=lambda problem, want: {"whitened": Bound(1e-5, 1e-5)},
    triton={"N": (33, 0, 1, 1100)},
    cost=lambda case: case.N,
    timed={"cpu": {"N": 1 << 18}, "cuda": {"N": 1 << 22}},
    fits=lambda case: (
        case.dtype == F32 or (case.size <= 1.0 and not (case.dtype == F16 and case.offset))
    ),
)


def _group_problem(case: SimpleNamespace, generator: torch.Generator) -> Problem:
    scores = (case.size * floats(generator, case.N) + case.offset).to(case.dtype)
    scores[: case.N // 4] = 0.1 + case.offset  # groups of a single value
    if case.groups == "ids":
        return Problem(
            {
                "scores": laid_out(scores, case.layout),
                "group_ids": torch.randint(-3, 10, (case.N,), generator=generator) * 10**9,
            },
            {"method": case.method, "unbiased": case.unbiased},
        )
    return Problem(
        {"scores": laid_out(scores, case.layout)},
        {"group_size": case.groups, "method": case.method, "unbiased": case.unbiased},
    )


def _group_definition(x: dict, s: dict) -> Tensors:
    ids = (
        x["group_ids"].tolist()
        if "group_ids" in x
        else [n // s["group_size"] for n in range(len(x["scores"]))]
    )
    return definitions.group_normalize(x["scores"], ids, s["method"], s["unbiased"])


GROUP_NORMALIZE = Entry(
    "group_normalize",
    normalize._GROUP,
    {
        "N": (32, 0, 128, 4096),
        "groups": ("ids", 4, 1, 16),
        "method": normalize.GROUP_METHODS,
        "offset": (0.0, 1e4),
        "size": (1.0, 0.0),
        "dtype": FLOATS,
        "layout": ("plain", "misaligned"),
        "unbiased": (True, False),
    },
    _group_problem,
    forward=lambda x, s, impl: normalize.group_normalize(
        x["scores"], x.get("group_ids"), **s, impl=impl
    )._asdict(),
    definition=_group_definition,
    bounds=lambda problem, want: {"advantages": Bound(1e-6, 1e-6), "zero_variance": Bound()},
    triton={"N": (32, 0, 128)},
    cost=lambda case: case.N,
    timed={"cpu": {"N": 1 << 13, "groups": 16}, "cuda": {"N": 1 << 20, "groups": 16}},
    fits=lambda case: case.dtype != F16 or not case.offset,
)


def _pairwise_problem(case: SimpleNamespace, generator: torch.Generator) -> Problem:
    names = ("chosen", "rejected", "margin") if case.margin else ("chosen", "rejected")
    return Problem(
        {name: laid_out(case.size * floats(generator, case.N), case.layout) for name in names},
        {},
        {"loss": torch.tensor(-2.0)},
    )


PAIRWISE_RANKING_LOSS = Entry(
    "pairwise_ranking_loss",
    ranking_loss._IMPLS,
    {
        "N": (33, 0, 1, 127, 4096),
        "margin": (True, False),
        "size": (1.0, 0.0, 30.0, 1e4),
        "layout": ("plain", "misaligned"),
    },
    _pairwise_problem,
    forward=lambda x, s, impl: {"loss": ranking_loss.pairwise_ranking_loss(**x, impl=impl)},
    definition=lambda x, s: {
        "loss": definitions.pairwise_ranking_loss(x["chosen"], x["rejected"], x.get("margin"))
    },
    bounds=lambda problem, want: (
        dict.fromkeys(want, Bound(1e-5, 1e-6)) | {"loss": Bound(2e-6, 1e-6)}
    ),
    wants=("chosen", "rejected", "margin"),
    triton={"N": (33, 0, 1, 127)},
    cost=lambda case: case.N,
    timed={"cpu": {"N": 1 << 16}, "cuda": {"N": 1 << 20}},
)


def _kwise_problem(case: SimpleNamespace, generator: torch.Generator) -> Problem:
    groups = torch.tensor([0, *case.sizes]).cumsum(0).int()
    M = int(groups[-1])
    ranks = {
        "order": torch.rand(M, generator=generator).argsort() + 1,
        "ties": torch.randint(-2, 3, (M,), generator=generator).int(),
        "all tied": torch.ones(M, dtype=torch.int64),
    }[case.ranks]
    return Problem(
        {
            "scores": laid_out(case.size * floats(generator, M), case.layout),
            "ranks": ranks,
            "cu_groups": groups,
        },
        {},
        {"loss": torch.tensor(3.0)},
    )


KWISE_RANKING_LOSS = Entry(
    "kwise_ranking_loss",
    ranking_loss._KWISE,
    {
        "sizes": ((4, 0, 9, 1, 2), (), (0,), (2,), (40, 2), (2, 3, 4, 5, 6, 7, 8, 9) * 8),
        "ranks": ("order", "ties", "all tied"),
        "size": (1.0, 300.0),
        "layout": ("plain", "misaligned"),
    },
    _kwise_problem,
    forward=lambda x, s, impl: {"loss": ranking_loss.kwise_ranking_loss(**x, impl=impl)},
    definition=lambda x, s: {"loss": definitions.kwise_ranking_loss(**x)},
    bounds=lambda problem, want: {"loss": Bound(2e-6, 1e-6), "d scores": Bound(1e-5, 1e-6)},
    wants=("scores",),
    cost=lambda case: sum(case.sizes) ** 2,
    timed={kind: {"sizes": (4,) * 1024} for kind in ("cpu", "cuda")},
)
