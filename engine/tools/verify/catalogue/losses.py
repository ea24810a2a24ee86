"""Losses of tokens: policy_loss, value_loss, policy_value_loss, token_kl, kl_loss."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
from torch import Tensor

from fusedrl.engine.tools.verify import definitions
from fusedrl.engine.tools.verify.grid import EPS, Bound, Entry, Problem, Tensors
from fusedrl.kernels import kl, policy_loss
from fusedrl.kernels.objective import KINDS, PolicyObjective, RolloutCorrection

from .common import floats, laid_out, token_mask, uniform

# ---- policy and value losses ---------------------------------------------------------------------
OBJECTIVES = {kind: PolicyObjective(kind=kind) for kind in KINDS} | {
    "dual": PolicyObjective(clip_low=0.2, clip_high=0.28, dual_clip=3.0),
    "gspo": PolicyObjective(kind="gspo", clip_low=0.02, clip_high=0.03),
}
KL_TERMS: tuple[dict, ...] = (
    {},
    {"kl_coef": 0.1},
    {"kl_coef": 0.1, "kl_gradient": "k2"},
    {"kl_coef": 0.1, "kl_estimator": "k1"},
    {"kl_coef": 0.1, "kl_estimator": "abs"},
    {"kl_coef": 0.01, "kl_estimator": "k2", "kl_level": "sequence"},
)
CORRECTIONS = (
    None,
    RolloutCorrection(),
    RolloutCorrection(kind="masked", cap=1.5, floor=0.5),
    RolloutCorrection(kind="masked", level="sequence"),
)


def token_columns(
    case: SimpleNamespace, generator: torch.Generator, logp: Tensor | None = None
) -> tuple[dict, Tensor]:
    """Make the per-token tensors [N] of a policy loss, NaN where the weight is 0, and a mask of the
    live tokens. Ratios keep away from the clip bounds, where rounding would decide the result."""
    N = case.N
    live = token_mask(case.mask, [N], generator)
    weights = torch.where(live, 0.5 + uniform(generator, N), 0.0)
    logp = -5 * uniform(generator, N) if logp is None else logp
    away = case.apart * floats(generator, N)
    for bound in (
        math.log(0.8),
        math.log(1.2),
        math.log(1.28),
        math.log(3.0),
        math.log(5.0),
        0.4,
        -0.4,
        math.log(0.98),
        math.log(1.03),
        20.0,
        -20.0,
    ):
        away = torch.where((away - bound).abs() < 1e-4, away + 1e-3, away)
    advantages = {
        "normal": floats(generator, N),
        "0": torch.zeros(N),
        "+-1": torch.where(uniform(generator, N) < 0.5, -1.0, 1.0),
        "+-1e6": torch.where(uniform(generator, N) < 0.5, -1e6, 1e6),
    }[case.advantages]
    columns = {
        "old_logp": logp - away,
        "ref_logp": logp - 0.3 * floats(generator, N),
        "rollout_logp": logp - away - 0.3 * floats(generator, N),
        "advantages": advantages,
    }
    x = {
        name: laid_out(torch.where(live, t, math.nan), case.layout) for name, t in columns.items()
    } | {"logp": logp, "weights": weights}
    x["logp"] = laid_out(torch.where(live, logp, math.nan), case.layout)
    x["cu_seqlens"] = torch.tensor([0, N // 3, N // 3, N], dtype=torch.int32)
    return x, live


TOKEN_LEVELS = {
    "N": (33, 0, 1, 127, 4096, 32768),
    "mask": ("random", "all", "none", "first", "last"),
    "apart": (0.5, 1e-3, 0.0, 40.0),
    "advantages": ("normal", "0", "+-1", "+-1e6"),
    "layout": ("plain", "misaligned"),
    "objective": tuple(OBJECTIVES),
    "kl": KL_TERMS,
    "correction": CORRECTIONS,
    "entropy_coef": (0.05, 0.0),
}


TIMED_TOKENS = {"cpu": {"N": 1 << 18, "mask": "all"}, "cuda": {"N": 1 << 22, "mask": "all"}}


def policy_settings(case: SimpleNamespace, x: dict) -> dict:
    """Return the settings of a case of the policy loss, and remove tensors that the case does not
    use from x."""
    settings: dict[str, object] = {
        "objective": OBJECTIVES[case.objective],
        "entropy_coef": case.entropy_coef,
        **case.kl,
    }
    if case.correction is None:
        del x["rollout_logp"]
    else:
        settings["rollout_correction"] = case.correction
    return settings


def _policy_problem(case: SimpleNamespace, generator: torch.Generator) -> Problem:
    x, live = token_columns(case, generator)
    entropy = 4 * uniform(generator, case.N)
    x["entropy"] = laid_out(torch.where(live, entropy, math.nan), case.layout)
    settings = policy_settings(case, x)
    hidden = {name: ~live for name in x if name not in ("weights", "cu_seqlens")}
    return Problem(x, settings, {"loss": torch.tensor(1.5)}, hidden)


def stats_of(loss: Tensor, *stats: tuple) -> Tensors:
    """Return the loss and each statistic by name, from an op's named tuples."""
    return {"loss": loss} | {
        f"{i}.{name}": t for i, group in enumerate(stats) for name, t in group._asdict().items()
    }


def _policy(x: dict, s: dict, impl: str | None) -> Tensors:
    x = dict(x)
    positional = [x.pop(name) for name in ("logp", "old_logp", "advantages", "weights")]
    return stats_of(*policy_loss.policy_loss(*positional, **x, **s, impl=impl))


def defined_stats(loss: Tensor, *stats: Tensors) -> Tensors:
    """Return the loss and each statistic by name, from a definition's dictionaries."""
    return {"loss": loss} | {
        f"{i}.{name}": t for i, group in enumerate(stats) for name, t in group.items()
    }


def _policy_definition(x: dict, s: dict) -> Tensors:
    return defined_stats(*definitions.policy_loss(**x, **s))


def _scale_of_terms(problem: Problem) -> float:
    """Return the sum over tokens of |weight| max(1, |term|). The loss's terms may cancel, but each
    has a relative error, so the bound is relative to this sum."""
    x, live = problem.x, problem.x["weights"] != 0
    A, w = x["advantages"][live].double().abs(), x["weights"][live].double().abs()
    d = (x["logp"] - x["old_logp"])[live].double().clamp(-20, 20)
    k = (x["logp"] - x["ref_logp"])[live].double()
    return max(
        1.0,
        float(
            (
                w
                * (
                    A * (d.abs() + x["logp"][live].abs() + 1) * d.exp().clamp(min=1.0) * 2
                    + d * d
                    + k * k
                    + 4
                )
            ).sum()
        ),
    )


def _policy_bounds(problem: Problem, want: Tensors) -> dict[str, Bound]:
    x, live = problem.x, problem.x["weights"] != 0
    A = torch.where(live, x["advantages"].double().abs(), 0).clamp(min=1.0)
    bounds = {name: Bound(2e-6, 1e-6) for name in want}
    # Statistics are sums of exp(d) over tokens, and d is a difference of log-probabilities rounded
    # to float32: the oracle sees the same difference.
    bounds["loss"] = bounds["0.loss"] = Bound(2e-6, 1e-6 * _scale_of_terms(problem))
    if "d logp" in want:
        # Terms in ratio and advantage may cancel (kl_penalty: (beta - A) ratio), so the bound is of
        # the terms, not of what is left of them.
        ratio = torch.where(
            live, (x["logp"] - x["old_logp"]).double().clamp(-20, 20).exp(), 0
        ).clamp(min=1.0)
        bounds["d logp"] = Bound(
            2e-6 if problem.settings.get("rollout_correction") is None else 8e-6, 1e-6 * A * ratio
        )
    return bounds


POLICY_LOSS = Entry(
    "policy_loss",
    policy_loss._IMPLS,
    TOKEN_LEVELS,
    _policy_problem,
    _policy,
    _policy_definition,
    _policy_bounds,
    ("logp", "entropy"),
    {"N": (33, 0, 1, 1100)},
    cost=lambda case: case.N,
    timed=TIMED_TOKENS,
)


def _value_problem(case: SimpleNamespace, generator: torch.Generator) -> Problem:
    live = token_mask(case.mask, [case.N], generator)
    # Keep away from the clip bounds and from the point where both squares are equal: there rounding
    # decides the branch.
    moved, target = 0.4 * floats(generator, case.N), floats(generator, case.N)
    moved = torch.where((moved.abs() - 0.2).abs() < 1e-3, moved * 1.02, moved)
    target = torch.where(
        ((moved + moved.clamp(-0.2, 0.2)) / 2 - target).abs() < 1e-3, target + 0.01, target
    )
    old = case.offset + floats(generator, case.N)
    columns = {"values": old + moved, "old_values": old, "returns": old + target}
    x = {name: laid_out(torch.where(live, t, math.nan), case.layout) for name, t in columns.items()}
    x["weights"] = torch.where(live, 0.5 + uniform(generator, case.N), 0.0)
    return Problem(
        x, {"clip": case.clip}, {"loss": torch.tensor(-0.75)}, dict.fromkeys(columns, ~live)
    )


def _value_bounds(problem: Problem, want: Tensors) -> dict[str, Bound]:
    total = float(want["loss"].abs())
    x, live = problem.x, problem.x["weights"] != 0
    size = float(x["returns"][live].double().abs().max()) if bool(live.any()) else 1.0
    # Old value + clip is rounded to float32, relative to the size of the values; the squared error
    # of a clipped value includes that rounding.
    clip = problem.settings.get("clip", problem.settings.get("value_clip"))
    rounded = (
        0.0
        if clip is None
        else EPS
        * size
        * float(
            (x["weights"][live].double() * ((x["values"] - x["returns"])[live].abs() + clip)).sum()
        )
    )
    bounds = {name: Bound(2e-6, 1e-6) for name in want} | {
        "loss": Bound(2e-6, 1e-6 * max(1.0, total) + rounded)
    }
    return bounds | {
        "0.loss": bounds["loss"],
        "0.explained_variance": Bound(2e-5, 1e-6),
        "0.clip_fraction": Bound(2e-6, 1e-6 if size < 100 else 0.05),
    }


VALUE_LOSS = Entry(
    "value_loss",
    policy_loss._IMPLS,
    {
        "N": (33, 0, 1, 127, 4096, 32768),
        "mask": ("random", "all", "none", "first", "last"),
        "offset": (0.0, 1e3),
        "clip": (None, 0.2),
        "layout": ("plain", "misaligned"),
    },
    _value_problem,
    forward=lambda x, s, impl: stats_of(
        *policy_loss.value_loss(
            x["values"], x["old_values"], x["returns"], x["weights"], **s, impl=impl
        )
    ),
    definition=lambda x, s: defined_stats(*definitions.value_loss(**x, **s)),
    bounds=_value_bounds,
    wants=("values",),
    triton={"N": (33, 0, 1, 1100)},
    cost=lambda case: case.N,
    timed=TIMED_TOKENS,
)


def _both_problem(case: SimpleNamespace, generator: torch.Generator) -> Problem:
    policy = _policy_problem(case, generator)
    value = _value_problem(SimpleNamespace(**{**vars(case), "mask": "all"}), generator)
    live = policy.x["weights"] != 0
    extra = {
        name: torch.where(live, value.x[name], math.nan)
        for name in ("values", "old_values", "returns")
    }
    return Problem(
        policy.x | extra,
        policy.settings | {"value_clip": case.clip, "value_coef": 0.5},
        policy.upstream,
        policy.hidden | dict.fromkeys(extra, ~live),
    )


def _both(x: dict, s: dict, impl: str | None) -> Tensors:
    x = dict(x)
    names = ("logp", "old_logp", "advantages", "weights", "values", "old_values", "returns")
    return stats_of(
        *policy_loss.policy_value_loss(*[x.pop(name) for name in names], **x, **s, impl=impl)
    )


def _both_definition(x: dict, s: dict) -> Tensors:
    s, x = dict(s), dict(x)
    clip, coef = s.pop("value_clip"), s.pop("value_coef")
    value, value_stats = definitions.value_loss(
        x.pop("values"), x.pop("old_values"), x.pop("returns"), x["weights"], clip
    )
    policy, policy_stats = definitions.policy_loss(**x, **s)
    return defined_stats(policy + coef * value, policy_stats, value_stats)


def _both_bounds(problem: Problem, want: Tensors) -> dict[str, Bound]:
    value = _value_bounds(
        problem,
        {"loss": want["1.loss"]}
        | {name.replace("1.", "0."): t for name, t in want.items() if name.startswith("1.")},
    )
    return (
        _policy_bounds(problem, want)
        | {f"1{name[1:]}": bound for name, bound in value.items() if name.startswith("0.")}
        | {"d values": Bound(2e-6, 1e-6)}
    )


POLICY_VALUE_LOSS = Entry(
    "policy_value_loss",
    policy_loss._IMPLS,
    TOKEN_LEVELS | {"offset": (0.0,), "clip": (0.2, None)},
    _both_problem,
    _both,
    _both_definition,
    _both_bounds,
    ("logp", "entropy", "values"),
    {"N": (33, 0, 1, 1100)},
    cost=lambda case: case.N,
    timed=TIMED_TOKENS,
)


# ---- estimates of a KL ---------------------------------------------------------------------------
def _token_kl_problem(case: SimpleNamespace, generator: torch.Generator) -> Problem:
    logp = -10 * uniform(generator, case.N)
    away = case.apart * floats(generator, case.N)
    # clear of the clamp, where a slope ends
    away = torch.where((away.abs() - 20).abs() < 1e-3, away * 1.01, away)
    x = {"logp": laid_out(logp, case.layout), "ref_logp": laid_out(logp - away, case.layout)}
    if not hasattr(case, "level"):
        return Problem(x, {"estimator": case.estimator})
    live = token_mask(case.mask, [case.N], generator)
    x = {name: torch.where(live, t, math.nan) for name, t in x.items()} | {
        "weights": torch.where(live, uniform(generator, case.N) - 0.2, 0.0)
    }
    if case.level == "sequence":
        x["cu_seqlens"] = torch.tensor([0, case.N // 3, case.N // 3, case.N], dtype=torch.int32)
    return Problem(
        x,
        {"estimator": case.estimator, "gradient": case.gradient, "level": case.level},
        {"loss": torch.tensor(-1.25)},
        dict.fromkeys(("logp", "ref_logp"), ~live),
    )


def _kl_loss_bounds(problem: Problem, want: Tensors) -> dict[str, Bound]:
    x, live = problem.x, problem.x["weights"] != 0
    d = (x["logp"] - x["ref_logp"])[live].double()
    terms = definitions.token_kl(d, problem.settings["estimator"]).abs()
    sizes = (
        float((x["weights"][live].double().abs() * terms).sum())
        if problem.settings["level"] == "token"
        else float(d.abs().sum() ** 2 + math.exp(min(20.0, float(d.abs().sum()))))
    )
    reach = 1.0 if problem.settings["level"] == "token" else max(1.0, float(d.abs().sum()))
    # A slope of the log ratio K of a sequence has the relative error of K, a sum of many.
    return {"loss": Bound(2e-6, 1e-6 * max(1.0, sizes)), "d logp": Bound(1e-5, 1e-6 * reach)}


TOKEN_KL = Entry(
    "token_kl",
    kl._IMPLS,
    {
        "N": (33, 0, 1, 127, 4096, 32768),
        "estimator": ("k3", "k1", "k2", "abs"),
        "apart": (1.0, 1e-4, 0.0, 40.0),
        "layout": ("plain", "misaligned"),
    },
    _token_kl_problem,
    forward=lambda x, s, impl: {"kl": kl.token_kl(x["logp"], x["ref_logp"], **s, impl=impl)},
    definition=lambda x, s: {"kl": definitions.token_kl(x["logp"] - x["ref_logp"], s["estimator"])},
    bounds=lambda problem, want: {"kl": Bound(1e-6, 1e-6)},
    triton={"N": (33, 0, 1, 1100)},
    cost=lambda case: case.N,
    timed={kind: {"N": case["N"]} for kind, case in TIMED_TOKENS.items()},
)

KL_LOSS = Entry(
    "kl_loss",
    kl._LOSS,
    TOKEN_KL.levels
    | {
        "gradient": ("k2", "k1", "k3", "abs"),
        "level": ("token", "sequence"),
        "mask": TOKEN_LEVELS["mask"],
        "apart": (0.5, 1e-3, 0.0, 40.0),
    },
    _token_kl_problem,
    forward=lambda x, s, impl: {"loss": kl.kl_loss(**x, **s, impl=impl)},
    definition=lambda x, s: {
        "loss": definitions.kl_loss(
            x["logp"],
            x["ref_logp"],
            x["weights"],
            s["estimator"],
            s["gradient"],
            x.get("cu_seqlens"),
        )
    },
    bounds=_kl_loss_bounds,
    wants=("logp",),
    triton={"N": (33, 0, 1, 1100)},
    cost=lambda case: case.N,
    timed=TIMED_TOKENS,
    fits=lambda case: not (case.level == "sequence" and (case.N > 127 or case.apart > 1)),
)
