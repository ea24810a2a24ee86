"""policy_value_loss in CUDA C++, on a CPU: the product's launches through csrc/simt
(tests/kernels/conftest.py), against float64."""

import math
import re

import pytest
import torch

from fusedrl.kernels.objective import (
    COEFFICIENTS,
    KINDS,
    KL_ESTIMATORS,
    SEQUENCE_KINDS,
    PolicyStats,
    ValueStats,
)
from fusedrl.kernels.policy_loss import _cuda as policy_loss_cuda
from fusedrl.kernels.policy_loss import value_loss_reference
from fusedrl.kernels.policy_loss._cuda import plan_policy_value_loss
from fusedrl.kernels.runtime import nvrtc

pytestmark = pytest.mark.cpu_only(
    "csrc/simt runs the CUDA sources on a CPU; on a card they are an implementation like the others"
)

CLIP, RATIO, REINFORCE, KL_PENALTY, GSPO, CISPO, SAPO, GEOMETRIC_MEAN, DRO = KINDS[:9]
K1, K2, K3, ABS, SEQUENCE = *KL_ESTIMATORS, "sequence_k2"
# kind -> lower, upper, dual, tau_positive, tau_negative, beta
SCALARS = {
    CLIP: (0.8, 1.28, 3.0, 1.0, 1.0, 0.0),
    GSPO: (0.9, 1.1, math.inf, 1.0, 1.0, 0.0),
    CISPO: (-math.inf, 1.3, math.inf, 1.0, 1.0, 0.0),
    SAPO: (-math.inf, math.inf, math.inf, 1.0, 1.05, 0.0),
    GEOMETRIC_MEAN: (-0.4, 0.4, math.inf, 1.0, 1.0, 0.0),
}
UNBOUNDED = (-math.inf, math.inf, math.inf, 1.0, 1.0, 0.7)
TOKENS = (
    "logp",
    "old_logp",
    "advantages",
    "weights",
    "entropy",
    "values",
    "old_values",
    "returns",
    "ref_logp",
    "correction",
    "sequence_log_ratio",
    "kl_sum",
)


def make(N, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)

    def normal():
        return torch.randn(N, generator=generator)

    x = {
        "old_logp": -torch.rand(N, generator=generator) * 5,
        "advantages": scale * normal(),
        "entropy": normal().abs(),
        "values": normal(),
        "returns": 3 + normal(),
        "correction": normal().abs(),
        "sequence_log_ratio": 0.2 * normal(),
        "kl_sum": normal(),
    }
    x["logp"], x["ref_logp"], x["old_values"] = (
        x["old_logp"] + 0.5 * normal(),
        x["old_logp"] + 0.3 * normal(),
        x["values"] + 0.3 * normal(),
    )
    x["weights"] = torch.where(
        torch.rand(N, generator=generator) < 0.7, 0.5 + torch.rand(N, generator=generator), 0
    )
    return x


def arguments(
    x, kind=CLIP, kl=(0.0, K3, K3), entropy_coef=0.0, value_clip=math.inf, value_coef=0.1
):
    return (
        *(x.get(name) for name in TOKENS),
        kind,
        *kl[1:],
        [*SCALARS.get(kind, UNBOUNDED), kl[0], entropy_coef, value_clip, value_coef],
    )


def run(simt, *given):
    outputs, launches = plan_policy_value_loss(*given)
    simt.run(launches)
    first = [t.clone() for t in outputs]
    for t in outputs:
        t.fill_(float("nan"))
    launches[-1].arguments[0].fill_(float("nan"))
    simt.descending = True  # the same bits in whatever order threads run: no barrier is missing
    simt.run(launches)
    simt.descending = False
    assert all(
        torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
        for a, b in zip(first, outputs, strict=True)
    )
    return outputs


# ---- the definition once more: live tokens alone, float64, autograd, one formula a kind
def by_definition(x, kind, kl, entropy_coef):
    live = x["weights"] != 0
    t = {name: value[live].double() for name, value in x.items()}
    logp = t["logp"].requires_grad_()
    A, d = t["advantages"], logp - t["old_logp"]
    lower, upper, dual, tau_positive, tau_negative, beta = SCALARS.get(kind, UNBOUNDED)
    ratio = d.clamp(-20, 20).exp()
    if kind in (GSPO, GEOMETRIC_MEAN):
        s = t["sequence_log_ratio"].exp() * (logp - logp.detach()).exp()
    if kind in (CLIP, GSPO):
        r = ratio if kind == CLIP else s
        term = torch.maximum(-A * r, -A * r.clamp(lower, upper))
        term = torch.where(A < 0, torch.minimum(term, -A * dual), term)
    elif kind == GEOMETRIC_MEAN:
        cut = ((A > 0) & (d > upper)) | ((A < 0) & (d < lower))
        term = -A * torch.where(cut, s.detach(), s)
    else:
        tau = torch.where(A > 0, tau_positive, tau_negative)
        term = {
            RATIO: lambda: -A * ratio,
            REINFORCE: lambda: -A * logp,
            KL_PENALTY: lambda: -A * ratio + beta * (ratio - 1 - d),
            CISPO: lambda: -A * ratio.clamp(max=upper).detach() * logp,
            SAPO: lambda: -A * torch.sigmoid(tau * (ratio - 1)) * 4 / tau,
            DRO: lambda: -(A * logp - beta * d * d / 2),
        }[kind]()
    if "correction" in t:
        term = term * t["correction"]
    if "ref_logp" in t:
        k = logp - t["ref_logp"]
        formula = {
            K1: lambda: k,
            K2: lambda: k * k / 2,
            K3: lambda: torch.expm1(-k) + k,
            ABS: lambda: k.abs(),
            SEQUENCE: lambda: t["kl_sum"] * (k.detach() / 2 + k - k.detach()),
        }
        slope = formula[kl[2]]()
        term = term + kl[0] * (formula[kl[1]]().detach() + slope - slope.detach())
    if "entropy" in t:
        term = term - entropy_coef * t["entropy"]
    loss = (t["weights"] * term).sum()
    grad = torch.zeros(len(live), dtype=torch.float64)
    if live.any():
        grad[live] = torch.autograd.grad(loss, logp)[0]
    return loss.detach(), grad, d.detach(), ratio.detach(), A, t


def close(got, want, scale=1.0):
    torch.testing.assert_close(
        torch.as_tensor(got).double(),
        torch.as_tensor(want).double(),
        rtol=2e-6,
        atol=1e-6 * max(1.0, scale),
    )


CASES = [(kind, (0.0, K3, K3), 0.0, ()) for kind in KINDS] + [
    (CLIP, (0.3, K3, K3), 0.01, ("entropy", "ref_logp", "correction")),
    (REINFORCE, (0.3, K1, K2), 0.01, ("entropy", "ref_logp")),
    (GSPO, (0.3, SEQUENCE, SEQUENCE), 0.0, ("ref_logp", "kl_sum")),
    (CISPO, (0.3, ABS, ABS), 0.0, ("ref_logp", "correction")),
    (RATIO, (0.3, K2, K1), 0.0, ("ref_logp",)),
]


@pytest.mark.parametrize("kind, kl, entropy_coef, extra", CASES, ids=str)
def test_policy_is_the_definition(simt, kind, kl, entropy_coef, extra):
    for N in (2501,) if kind != CLIP else (0, 1, 5, 255, 2048, 2049, 4500):
        whole = make(N, seed=N)
        if N:
            whole["weights"][-1] = 1.0
        needed = {"logp", "old_logp", "advantages", "weights", *extra} | (
            {"sequence_log_ratio"} if kind in (GSPO, GEOMETRIC_MEAN) else set()
        )
        x = {name: whole[name] for name in TOKENS if name in needed}
        want, want_grad, d, ratio, A, t = by_definition(x, kind, kl, entropy_coef)
        hidden = {
            name: value
            if name == "weights"
            else torch.where(x["weights"] != 0, value, float("nan"))
            for name, value in x.items()
        }
        loss, stats, grad, values_grad = run(simt, *arguments(hidden, kind, kl, entropy_coef))
        scale = (x["weights"] * x["advantages"]).abs().sum().item()
        close(loss, want, scale)
        close(grad, want_grad, 4.0)
        assert (grad[x["weights"] == 0] == 0).all()
        assert values_grad.numel() == 0
        assert (stats[16:] == 0).all()
        seen = max(1, len(d))
        if kind == CLIP:
            lower, upper, dual, *_ = SCALARS[CLIP]
            for i, chosen in (
                (1, (A < 0) & (ratio < lower)),
                (2, (A > 0) & (ratio > upper)),
                (3, (A < 0) & (ratio > dual)),
            ):
                close(stats[i], chosen.sum() / seen)
        squares = ratio.square().sum() if len(d) else torch.tensor(1.0)
        k = d if "ref_logp" not in t else (t["logp"] - t["ref_logp"]).detach()
        kls = {
            K1: k,
            K2: k * k / 2,
            K3: torch.expm1(-k) + k,
            ABS: k.abs(),
            SEQUENCE: k * t.get("kl_sum", k) / 2,
        }[kl[1]]
        some = len(d) > 0
        correction = t["correction"].sum() / seen if "correction" in t and some else 1.0
        for i, expected in (
            (0, want),
            (4, -d.sum() / seen),
            (5, (d * d).sum() / 2 / seen),
            (6, (torch.expm1(d) - d).sum() / seen),
            (7, ratio.sum() / seen if some else 1.0),
            (8, ratio.min() if some else 1.0),
            (9, ratio.max() if some else 1.0),
            (10, ratio.sum() ** 2 / squares),
            (11, 0.0),
            (12, kls.sum() / seen if "ref_logp" in t else 0.0),
            (13, t["entropy"].sum() / seen if "entropy" in t else 0.0),
            (14, correction),
            (15, float(len(d))),
        ):
            close(stats[i], expected, scale if i in (0, 10) else 1.0)


@pytest.mark.parametrize("N", [0, 1, 3, 1024, 4101])
@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_value_is_the_definition(simt, N, clip, offset):
    x = make(N, seed=N + 1)
    x = {
        "weights": x["weights"],
        **{name: x[name] + offset for name in ("values", "returns", "old_values")},
    }
    values = x["values"].double().requires_grad_()
    want, want_stats = value_loss_reference(
        values, x["old_values"].double(), x["returns"].double(), x["weights"].double(), clip=clip
    )
    (want_grad,) = torch.autograd.grad(want, values)
    hidden = {
        name: value if name == "weights" else torch.where(x["weights"] != 0, value, float("nan"))
        for name, value in x.items()
    }
    if clip is None:
        hidden.pop("old_values")
    loss, stats, logp_grad, grad = run(
        simt, *arguments(hidden, value_clip=clip or math.inf, value_coef=0.5)
    )
    assert logp_grad.numel() == 0
    assert (stats[:16] == 0).all()
    near = 1.0 if offset == 0 else 40.0  # float32 inputs at 1000 resolve 6e-5
    close(loss, want.detach() / 2, near * (1 + want.item()))
    close(grad, want_grad / 2, near)
    for got, expected in zip(stats[16:], want_stats, strict=True):
        close(got, expected, near * (1 + abs(expected.item())))


def test_both_parts_alone_and_together(simt):
    x = make(3001, seed=3)
    together = run(
        simt, *arguments(x, kl=(0.2, K3, K2), entropy_coef=0.01, value_clip=0.2, value_coef=0.3)
    )
    policy = run(
        simt,
        *arguments(
            {name: t for name, t in x.items() if name not in ("values", "old_values", "returns")},
            kl=(0.2, K3, K2),
            entropy_coef=0.01,
        ),
    )
    value = run(
        simt,
        *arguments(
            {name: x[name] for name in ("weights", "values", "old_values", "returns")},
            value_clip=0.2,
            value_coef=0.3,
        ),
    )
    torch.testing.assert_close(together[0], policy[0] + value[0])
    assert torch.equal(together[1], torch.cat([policy[1][:16], value[1][16:]]))
    assert torch.equal(together[2], policy[2])
    assert torch.equal(together[3], value[3])


def test_misaligned_inputs_are_the_same(simt):
    x = make(2053, seed=4)
    moved = {name: torch.cat([t.new_zeros(1), t])[1:] for name, t in x.items()}
    given, away = (
        arguments(x, value_clip=0.2, entropy_coef=0.1),
        arguments(moved, value_clip=0.2, entropy_coef=0.1),
    )
    assert (
        plan_policy_value_loss(*given)[1][0].options != plan_policy_value_loss(*away)[1][0].options
    )
    assert all(map(torch.equal, run(simt, *given), run(simt, *away)))


def test_extremes(simt):
    """The ratio is exactly 1 before the first step; beyond +-20 there is no gradient; NaN that is
    not masked is not hidden."""
    ones = torch.ones(6)
    x = {
        "logp": torch.tensor([-1.0, -2.0, 3.0, -30.0, 25.0, -0.1]),
        "old_logp": torch.tensor([-1.0, -2.0, 3.0, -5.0, 0.0, -0.1]),
        "advantages": ones,
        "weights": ones,
    }
    _, stats, grad, _ = run(simt, *arguments(x, kind=RATIO))
    assert grad.tolist() == [-1.0, -1.0, -1.0, 0.0, 0.0, -1.0]
    close(stats[11], 2 / 6)
    same = run(simt, *arguments(x | {"logp": x["old_logp"]}))[1]
    assert same[1:12].tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 1, 6, 0]
    broken = run(
        simt, *arguments(x | {"logp": x["logp"].index_fill(0, torch.tensor([1]), float("nan"))})
    )
    assert broken[0].isnan()
    assert broken[1][[4, 5, 6, 7, 8, 9, 10]].isnan().all()
    assert broken[2].isnan().tolist() == [False, True, False, False, False, False]


def test_canaries(simt):
    x = make(2050, seed=5)
    outputs, launches = plan_policy_value_loss(*arguments(x))
    partials = launches[-1].arguments[0]
    guarded = {t.data_ptr(): torch.full((t.numel() + 128,), 123.0) for t in (*outputs, partials)}
    for each in launches:
        swapped = tuple(
            guarded[a.data_ptr()][64:-64]
            if isinstance(a, torch.Tensor) and a.data_ptr() in guarded
            else a
            for a in each.arguments
        )
        simt.run(
            [type(each)(each.source, each.kernel, swapped, each.grid, each.block, each.options)]
        )
    for t in (*outputs, partials):
        whole = guarded[t.data_ptr()]
        assert (whole[:64] == 123.0).all()
        assert (whole[-64:] == 123.0).all()
        assert not (whole[64:-64] == 123.0).any()


def test_gradients_through_the_op(simt):
    def on_cpu(*given):
        outputs, launches = plan_policy_value_loss(*given)
        simt.run(launches)
        return outputs

    policy_loss_cuda._policy_value_loss.register_kernel("cpu")(on_cpu)
    x = make(37, seed=6)
    leaves = {name: x[name].clone().requires_grad_() for name in ("logp", "entropy", "values")}
    given = arguments(x | leaves, entropy_coef=0.1, value_coef=0.5)
    loss, _, logp_grad, values_grad = torch.ops.fusedrl.policy_value_loss_cuda(*given)
    grads = torch.autograd.grad(3.0 * loss, list(leaves.values()), retain_graph=True)
    for got, want in zip(grads, (logp_grad, -0.1 * x["weights"], values_grad), strict=True):
        torch.testing.assert_close(got, 3.0 * want)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(loss, leaves["logp"], create_graph=True)
    torch.library.opcheck(torch.ops.fusedrl.policy_value_loss_cuda, given)
    compiled = torch.compile(
        torch.ops.fusedrl.policy_value_loss_cuda, fullgraph=True, backend="aot_eager"
    )(*given)
    assert torch.equal(compiled[0], loss)


def test_refuses_a_sequence_kind_without_its_input():
    x = make(5)
    with pytest.raises(ValueError, match="expected sequence_log_ratio"):
        plan_policy_value_loss(
            *arguments(
                {name: t for name, t in x.items() if name != "sequence_log_ratio"}, kind=GSPO
            )
        )
    with pytest.raises(ValueError, match="expected kl_sum"):
        plan_policy_value_loss(
            *arguments(
                {name: t for name, t in x.items() if name != "kl_sum"}, kl=(0.1, SEQUENCE, SEQUENCE)
            )
        )


def test_lists_are_those_of_the_header():
    header = (nvrtc.source_folder("shared") / "objectives.h").read_text()
    for macro, names in (
        ("KINDS", KINDS),
        ("KL_ESTIMATORS", (*KL_ESTIMATORS, SEQUENCE)),
        ("COEFFICIENTS", COEFFICIENTS),
    ):
        rows = header.partition(f"#define FUSEDRL_{macro}(ROW)")[2].partition("\n\n")[0]
        assert re.findall(r"ROW\((\w+)\)", rows) == [*names]
    condition = header.partition("bool by_sequence(Kind kind)")[2].partition(";")[0]
    assert tuple(re.findall(r"Kind::(\w+)", condition)) == SEQUENCE_KINDS


def test_statistics_are_where_the_kernels_write_them():
    assert PolicyStats._fields == (
        "loss",
        "clip_fraction_low",
        "clip_fraction_high",
        "clip_fraction_dual",
        "approx_kl_k1",
        "approx_kl_k2",
        "approx_kl_k3",
        "ratio_mean",
        "ratio_min",
        "ratio_max",
        "effective_sample_size",
        "clamped_fraction",
        "ref_kl",
        "entropy",
        "correction_mean",
        "tokens",
    )
    assert ValueStats._fields == (
        "loss",
        "clip_fraction",
        "explained_variance",
        "value_mean",
        "return_mean",
        "tokens",
    )
