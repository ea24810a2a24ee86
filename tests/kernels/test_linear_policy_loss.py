"""The policy loss from hidden states against log-probabilities and a loss of their own in float64.

One file: the definition and the cases of objectives that values and gradients share.
"""

import math

import pytest
import torch

from fusedrl.engine.tools.verify.grid import interpreted
from fusedrl.kernels.linear_logprob import linear_logprob
from fusedrl.kernels.linear_policy_loss import linear_policy_loss, linear_policy_loss_reference
from fusedrl.kernels.logprob import logprob_reference
from fusedrl.kernels.objective import KINDS, PolicyObjective, RolloutCorrection
from fusedrl.kernels.policy_loss import policy_loss
from fusedrl.kernels.runtime import native
from fusedrl.kernels.runtime.dispatch import use_impl

OBJECTIVES = {kind: PolicyObjective(kind=kind) for kind in KINDS} | {
    "clip": PolicyObjective(clip_low=0.05, clip_high=0.1, dual_clip=1.5),
    "gspo": PolicyObjective(kind="gspo", clip_low=0.02, clip_high=0.03),
}
EXTRAS = {
    "plain": {},
    "entropy": {"entropy_coef": 0.05},
    "k3": {"kl_coef": 0.1},
    "k2 under k3": {"kl_coef": 0.1, "kl_gradient": "k2", "entropy_coef": 0.05},
    "sequence": {"kl_coef": 0.01, "kl_estimator": "k2", "kl_level": "sequence"},
    "correction": {
        "rollout_correction": RolloutCorrection(kind="masked", level="sequence", cap=2.0)
    },
}


def workspaces(impl, rows):
    """How many rows of logits make a workspace; the interpreter of triton gets one: each of its
    programs costs milliseconds."""
    return rows[-1:] if impl == "triton" else rows


def problem(device, N, H, V, dtype=torch.float32, seed=0, masked=0.3):
    """Weights of 0 at a third of the rows, where everything else is nonsense; old_logp near the
    policy, so that some ratios are clipped."""
    generator = torch.Generator().manual_seed(seed + 7919 * N + V)
    hidden = torch.randn(N, H, generator=generator).to(device).to(dtype)
    weight = (2 * torch.randn(V, H, generator=generator).to(device) / math.sqrt(H)).to(dtype)
    ids, bias = (
        torch.randint(0, V, (N,), generator=generator).to(device),
        torch.randn(V, generator=generator).to(device).to(dtype),
    )
    weights = torch.where(
        torch.rand(N, generator=generator).to(device) < masked,
        0.0,
        0.5 + torch.rand(N, generator=generator).to(device),
    )
    logp = linear_logprob(hidden, weight, ids, bias=bias, impl="torch")
    columns = {
        name: logp + 0.2 * torch.randn(N, generator=generator).to(device)
        for name in ("old_logp", "ref_logp", "rollout_logp")
    }
    advantages = torch.randn(N, generator=generator).to(device)
    advantages[::7] = 0.0
    gone = weights == 0
    columns = {
        name: torch.where(gone, math.nan, column)
        for name, column in (columns | {"advantages": advantages}).items()
    }
    hidden[gone], ids[gone] = math.nan, -7
    return {
        "hidden": hidden,
        "weight": weight,
        "token_ids": ids,
        "bias": bias,
        "weights": weights,
        **columns,
    }


def run(device, function, p, dtype=None, **settings):
    p = {name: t.to(dtype) if dtype and t.is_floating_point() else t for name, t in p.items()}
    leaves = [p[name].clone().requires_grad_() for name in ("hidden", "weight", "bias")]
    N = len(p["weights"])
    if "rollout_correction" in settings:
        settings["rollout_logp"] = p["rollout_logp"]
    loss, stats, *_ = function(
        leaves[0],
        leaves[1],
        leaves[2],
        p["token_ids"],
        p["old_logp"],
        p["advantages"],
        p["weights"],
        ref_logp=p["ref_logp"],
        cu_seqlens=torch.tensor([0, N // 3, N // 3, N], device=device),
        **settings,
    )
    loss.backward()
    return [loss.detach(), torch.stack([*stats]), *(leaf.grad for leaf in leaves)]


def oracle(
    hidden, weight, bias, ids, old_logp, advantages, weights, *, ref_logp, rollout_logp=None, **rest
):
    return linear_policy_loss_reference(
        hidden,
        weight,
        ids,
        old_logp,
        advantages,
        weights,
        bias_V=bias,
        ref_logp_N=ref_logp,
        rollout_logp_N=rollout_logp,
        **rest,
    )


def ours(impl, rows=None):
    def function(hidden, weight, bias, ids, *columns, **settings):
        return linear_policy_loss(
            hidden,
            weight,
            ids,
            *columns,
            bias=bias,
            impl=impl,
            workspace_bytes=rows and rows * weight.shape[0] * 4,
            **settings,
        )

    return function


def two_steps(
    hidden,
    weight,
    bias,
    ids,
    old_logp,
    advantages,
    weights,
    *,
    temperature=1.0,
    softcap=None,
    **settings,
):
    logp, entropy = linear_logprob(
        hidden,
        weight,
        torch.where(weights != 0, ids, -100),
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        entropy=True,
    )
    return policy_loss(logp, old_logp, advantages, weights, entropy=entropy, **settings)


def agree(got, want, rtol=1e-5, atol=2e-5):
    for name, a, b in zip(("loss", "stats", "hidden", "weight", "bias"), got, want, strict=True):
        torch.testing.assert_close(
            a.double(),
            b.double(),
            rtol=rtol,
            atol=atol * max(1.0, float(b.abs().max()) if b.numel() else 1.0),
            msg=lambda text, name=name: f"{name}: {text}",
        )


# ---- the values ----------------------------------------------------------------------------------
@pytest.mark.each_impl("linear_policy_loss")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("extra", EXTRAS)
def test_matches_float64(impl, kind, extra, device):
    p = problem(device, 37, 12, 70)
    settings = EXTRAS[extra] | {"objective": OBJECTIVES[kind], "temperature": 0.8}
    want = run(device, oracle, p, torch.float64, **settings)
    for rows in workspaces(impl, (5, None)):
        agree(run(device, ours(impl, rows), p, **settings), want)
    agree(run(device, two_steps, p, **settings), want)


# No rows, one, more than a workspace (1, 3 and 8 rows, and the default); V off the vector size and
# past one block.
@pytest.mark.each_impl("linear_policy_loss")
@pytest.mark.parametrize(
    "N,H,V", [(0, 8, 33), (1, 8, 33), (7, 5, 2), (33, 16, 1025), (20, 64, 3000)]
)
@pytest.mark.parametrize("masked", [0.0, 0.5, 1.0])
def test_shapes(impl, N, H, V, masked, device):
    if interpreted(impl, device) and V > 1000:
        V = 260 if V < 3000 else 150  # its interpreter is slow, and its tiles are small
    p = problem(device, N, H, V, masked=masked)
    options = (
        {"temperature": torch.linspace(0.3, 3.0, N, device=device), "softcap": 8.0}
        if V > 100
        else {}
    )
    want = run(device, oracle, p, torch.float64, **options)
    # of the 24, 8 are of logits and 16 of gradients
    for rows in (24,) if interpreted(impl, device) else (1, 3, 8, None):
        got = run(device, ours(impl, rows), p, **options)
        agree(got, want)
        assert not got[2][p["weights"] == 0].any()
        if masked == 1.0:
            assert not any(t.any() for t in (got[0], *got[2:]))


@pytest.mark.each_impl("linear_policy_loss", interpreted=False)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(impl, dtype, device):
    p = problem(device, 30, 64, 1500, dtype)
    want = run(device, oracle, p, torch.float64, entropy_coef=0.1)
    for rows in (1, 64):
        got = run(device, ours(impl, rows), p, entropy_coef=0.1)
        assert [t.dtype for t in got] == [torch.float32] * 2 + [dtype] * 3
        agree(
            got[:2] + [t.to(dtype) for t in got[2:]],
            want[:2] + [t.to(dtype) for t in want[2:]],
            rtol=torch.finfo(dtype).eps,
            atol=1e-4,
        )


# ---- rows that are left out ----------------------------------------------------------------------
@pytest.mark.each_impl("linear_policy_loss")
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_inactive_rows_add_exactly_nothing(impl, share, device):
    p = problem(device, 64, 8, 50, masked=0.0)
    active = torch.rand(64, generator=torch.Generator().manual_seed(3)).to(device) < share
    p["advantages"] = torch.where(active, 1.0 + torch.rand(64, device=device), 0.0)
    for rows in workspaces(impl, (2, 7, 64)):
        got = run(device, ours(impl, rows), p, objective=PolicyObjective(kind="ratio"))
        assert not got[2][~active].any()
        assert got[2][active].any(1).all()
        without = {name: t if name in ("weight", "bias") else t[active] for name, t in p.items()}
        kept = run(device, ours(impl, rows), without, objective=PolicyObjective(kind="ratio"))
        torch.testing.assert_close(got[2][active], kept[2], rtol=1e-5, atol=1e-6)
        for a, b in zip(got[3:], kept[3:], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.each_impl("linear_policy_loss")
@pytest.mark.parametrize("rows", [3, None])
def test_same_bits_every_run_and_whatever_is_masked(impl, rows, device):
    # the workspace of 12 rows of logits is one of 4, and 8 of gradients
    rows = 12 if interpreted(impl, device) and rows else rows
    p = problem(device, *(13, 16, 133) if interpreted(impl, device) else (50, 16, 333))
    first = run(device, ours(impl, rows), p, **EXTRAS["k2 under k3"])
    gone = p["weights"] == 0
    other = {name: t.clone() for name, t in p.items()}
    for name in ("hidden", "old_logp", "advantages", "ref_logp"):
        other[name][gone] = 1e30
    other["token_ids"][gone] = 2**40
    for again in (p, other):
        assert all(
            torch.equal(a, b)
            for a, b in zip(
                run(device, ours(impl, rows), again, **EXTRAS["k2 under k3"]), first, strict=True
            )
        )


@pytest.mark.each_impl("linear_policy_loss", but=("torch",))
def test_loss_and_statistics_are_those_of_the_two_steps_bit_for_bit(impl, device):
    p = problem(device, *(14, 16, 133) if interpreted(impl, device) else (50, 16, 333), masked=0.0)
    inputs = [
        p[name]
        for name in ("hidden", "weight", "bias", "token_ids", "old_logp", "advantages", "weights")
    ]
    settings = {"ref_logp": p["ref_logp"], "entropy_coef": 0.1, "kl_coef": 0.1}
    inputs[0].requires_grad_()
    with use_impl(impl):
        (loss, stats, *_), (want, want_stats) = (
            ours(None)(*inputs, **settings),
            two_steps(*inputs, **settings),
        )
    assert loss == want
    assert stats == want_stats


# ---- gradients -----------------------------------------------------------------------------------
@pytest.mark.each_impl("linear_policy_loss")
def test_any_upstream_gradient_any_number_of_times(impl, device):
    p = problem(device, 20, 8, 40)
    leaves = [p[name].requires_grad_() for name in ("hidden", "weight", "bias")]
    loss, stats, *_ = ours(impl)(
        *leaves, *(p[name] for name in ("token_ids", "old_logp", "advantages", "weights"))
    )
    unit = torch.autograd.grad(loss, leaves, retain_graph=True)
    for got, want in zip(
        torch.autograd.grad(-2.5 * loss, leaves, retain_graph=True), unit, strict=True
    ):
        torch.testing.assert_close(got, -2.5 * want, equal_nan=True)
    for _ in range(3):
        loss.backward(retain_graph=True)
    for leaf, want in zip(leaves, unit, strict=True):
        torch.testing.assert_close(leaf.grad, 3 * want)
    assert all(
        torch.equal(a, b) for a, b in zip(torch.autograd.grad(loss, leaves), unit, strict=True)
    )  # accumulation wrote into none of them
    assert not any(s.requires_grad for s in stats)


@pytest.mark.each_impl("linear_policy_loss")
def test_only_what_needs_a_gradient_gets_one(impl, device):
    p = problem(device, 20, 8, 40)
    columns = [p[name] for name in ("token_ids", "old_logp", "advantages", "weights")]
    everything = run(device, ours(impl), p)
    for needed in ((True, False, False), (False, True, False), (False, False, True)):
        leaves = [
            p[name].clone().requires_grad_(n)
            for name, n in zip(("hidden", "weight", "bias"), needed, strict=True)
        ]
        loss, *_ = ours(impl)(*leaves, *columns)
        loss.backward()
        for leaf, n, want in zip(leaves, needed, everything[2:], strict=True):
            assert (leaf.grad is None) != n
            assert not n or torch.equal(leaf.grad, want)
    with torch.no_grad():
        loss, *_ = ours(impl)(*leaves, *columns)
    assert not loss.requires_grad
    assert loss == everything[0]
    hidden, weight = (p[name].clone().requires_grad_() for name in ("hidden", "weight"))
    linear_policy_loss(hidden, weight, *columns, impl=impl)[0].backward()
    assert hidden.grad.shape == hidden.shape
    assert weight.grad.shape == weight.shape


@pytest.mark.each_impl("linear_policy_loss")
def test_double_backward_is_refused(impl, device):
    p = problem(device, 20, 8, 40, masked=0.0)
    weight = p["weight"].requires_grad_()
    loss, *_ = ours(impl)(
        p["hidden"],
        weight,
        p["bias"],
        *(p[name] for name in ("token_ids", "old_logp", "advantages", "weights")),
    )
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(
            (weight * torch.autograd.grad(loss, weight, create_graph=True)[0]).sum(), weight
        )


# ---- refusals, torch's own checks ----------------------------------------------------------------
@pytest.mark.cpu_only("values are read on the host, or an implementation is named, on a CPU alone")
@pytest.mark.each_impl("linear_policy_loss")
def test_refuses_what_it_does_not_support(impl, device):
    h, w, ids, x = (
        torch.zeros(3, 4, device=device),
        torch.zeros(5, 4, device=device),
        torch.zeros(3, dtype=torch.long, device=device),
        torch.ones(3, device=device),
    )
    for arguments, settings, error, message in (
        (
            (h, torch.zeros(5, 3, device=device), ids, x, x, x),
            {},
            ValueError,
            "weight does not fit its pattern",
        ),
        ((h, w.bfloat16(), ids, x, x, x), {}, TypeError, "expected weight of dtype float32"),
        ((h, w, ids, x, x, x.double()), {}, TypeError, "expected weights of dtype float32"),
        (
            (h, w, ids, None, x, x),
            {"objective": PolicyObjective(kind="gspo"), "cu_seqlens": torch.tensor([0, 3])},
            ValueError,
            "expected old_logp for kind 'gspo'",
        ),
        (
            (h, w, ids, None, x, x),
            {"rollout_logp": x, "rollout_correction": RolloutCorrection("truncated")},
            ValueError,
            "expected old_logp with a rollout_correction",
        ),
        ((h, w, ids, x, x, x), {"kl_coef": 1.0}, ValueError, "expected ref_logp"),
        (
            (h, w, ids, x, x, x),
            {"objective": PolicyObjective(kind="gspo")},
            ValueError,
            "expected cu_seqlens",
        ),
        ((h, w, ids, x, x, x), {"temperature": 0.0}, ValueError, "expected a temperature above 0"),
        ((h, w, ids, x, x, x), {"softcap": 0.0}, ValueError, "expected a softcap above 0"),
        (
            (h, w, ids, x, x, x),
            {"workspace_bytes": 0},
            ValueError,
            "expected workspace_bytes above 0",
        ),
        ((h, w, ids + 5, x, x, x), {}, IndexError, "expected token ids in"),
        ((h, w, ids - 1, x, x, x), {}, IndexError, "expected token ids in"),
    ):
        with pytest.raises(error, match=message):
            linear_policy_loss(*arguments, impl=impl, **settings)
    with pytest.raises(RuntimeError, match="implementation 'cuda' cannot run"):
        linear_policy_loss(h, w, ids, x, x, x, impl="cuda")
    assert (
        linear_policy_loss(
            h, w, ids, None, x, x, objective=PolicyObjective(kind="reinforce"), impl=impl
        )[1].ratio_max
        == 1
    )


@pytest.mark.cpu_only("the C++ kernels")
@pytest.mark.skipif(not native.capability, reason=native.reason)
@pytest.mark.parametrize("with_bias", [True, False])
def test_opcheck(with_bias, device):
    p = problem(device, 9, 4, 11, masked=0.0)
    leaves = [p[name].requires_grad_() for name in ("hidden", "weight")] + [
        p["bias"].requires_grad_() if with_bias else None
    ]
    columns = [p[name] for name in ("token_ids", "old_logp", "advantages", "weights", "ref_logp")]
    rest = (
        "clip",
        "k3",
        "k2",
        [0.8, 1.2, math.inf, 1.0, 1.0, 0.0, 0.1, 0.05, math.inf, 0.0],
        1.0,
        0.0,
        -1,
    )
    arguments = (*leaves, *columns, torch.rand(9, device=device), None, None, None, *rest)
    torch.library.opcheck(torch.ops.fusedrl.linear_policy_loss.default, arguments)
    constants = tuple(t.detach() if isinstance(t, torch.Tensor) else t for t in arguments)
    torch.library.opcheck(
        torch.ops.fusedrl.linear_policy_loss_forward.default, (*constants, True, True, with_bias)
    )


@pytest.mark.cpu_only("the C++ kernels")
@pytest.mark.skipif(not native.capability, reason=native.reason)
@pytest.mark.parametrize("kind", ["clip", "gspo"])
def test_compiles_as_one_graph(kind, device):
    p = problem(device, 20, 8, 40)

    def step(hidden, weight):
        loss, stats, *_ = linear_policy_loss(
            hidden,
            weight,
            p["token_ids"],
            p["old_logp"],
            p["advantages"],
            p["weights"],
            objective=OBJECTIVES[kind],
            cu_seqlens=torch.tensor([0, 20], device=device),
            entropy_coef=0.1,
        )
        return 2 * loss, torch.stack([*stats])

    outcomes = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [p[name].clone().requires_grad_() for name in ("hidden", "weight")]
        loss, stats = function(*leaves)
        outcomes.append([loss.detach(), stats, *torch.autograd.grad(loss, leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


# ---- Triton --------------------------------------------------------------------------------------


# Against torch with the logits in the same dtype, both measured against float64.
@pytest.mark.usefixtures("triton_runs")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_error_is_at_most_twice_that_of_torch(dtype, device):
    p = problem(device, 11, 64, 300, dtype)
    want = run(device, oracle, p, torch.float64, entropy_coef=0.1)

    def same_dtype(hidden, weight, bias, ids, old_logp, advantages, weights, **settings):
        ids = torch.where(weights != 0, ids, -100)
        logp, entropy = logprob_reference(
            hidden.masked_fill((ids == -100)[:, None], 0.0) @ weight.t() + bias, ids
        )
        return policy_loss(
            logp, old_logp, advantages, weights, entropy=entropy, impl="torch", **settings
        )

    theirs, got = (
        run(device, same_dtype, p, entropy_coef=0.1),
        run(device, ours("triton", 6), p, entropy_coef=0.1),
    )
    assert [t.dtype for t in got] == [torch.float32] * 2 + [dtype] * 3
    for name, a, b, exact in zip(
        ("loss", "stats", "hidden", "weight", "bias"), got, theirs, want, strict=True
    ):
        ours_off, theirs_off = ((t.double() - exact).abs().max() for t in (a, b))
        truncated = (
            torch.finfo(dtype).eps * exact.abs().max()
            if dtype == torch.bfloat16 and name in ("hidden", "weight", "bias")
            else 0.0
        )
        # to bfloat16 the interpreter cuts, it does not round
        assert ours_off <= 2 * theirs_off + truncated + 1e-5, (name, ours_off, theirs_off)


# Rows gather over chunks of 2 until no other chunk fits 5: with one active row in 3 the last
# products are made twice, not once a chunk.
@pytest.mark.usefixtures("triton_runs")
def test_gradients_of_few_active_rows_gather(monkeypatch, device):
    from fusedrl.kernels.linear_policy_loss import _triton as module

    p = problem(device, 18, 8, 50, masked=0.0)
    p["advantages"] = torch.where(torch.arange(18, device=device) % 3 == 0, 1.0, 0.0)
    want = run(device, oracle, p, torch.float64, objective=PolicyObjective(kind="ratio"))
    thick = []
    monkeypatch.setattr(module, "rows_of", lambda *_: (2, 5))

    def product(a, b):
        if len(a) == 50:  # of weight
            thick.append(a.shape[1])
        return a @ b

    monkeypatch.setattr(module, "product", product)
    monkeypatch.setattr(module, "add_product", lambda into, a, b: into.add_(product(a, b)))
    agree(run(device, ours("triton"), p, objective=PolicyObjective(kind="ratio")), want)
    assert thick == [4, 2]


@pytest.mark.parametrize(
    ("workspace_bytes", "V", "itemsize"),
    [
        (1, 10, 4),
        (1 << 28, 151936, 2),
        (1 << 28, 151936, 4),
        (1 << 31, 32000, 2),
        (4 << 20, 3000, 4),
    ],
)
def test_chunks_fit_the_workspace(workspace_bytes, V, itemsize):
    rows_of = pytest.importorskip("fusedrl.kernels.linear_policy_loss._triton").rows_of
    R, C = rows_of(workspace_bytes, 100_000, V, itemsize)
    assert 1 <= R <= C
    assert R == 1 or (4 * R + itemsize * C) * V <= workspace_bytes
    assert R < 128 or R % 128 == 0


@pytest.mark.usefixtures("triton_runs")
@pytest.mark.parametrize("kind", ["clip", "gspo"])
def test_triton_opcheck_and_compile(kind, device):
    p = problem(device, 7, 4, 11, masked=0.0)
    leaves = [p[name].requires_grad_() for name in ("hidden", "weight", "bias")]
    columns = [p[name] for name in ("token_ids", "old_logp", "advantages", "weights", "ref_logp")]
    rest = (
        "clip",
        "k3",
        "k2",
        [0.8, 1.2, math.inf, 1.0, 1.0, 0.0, 0.1, 0.05, math.inf, 0.0],
        1.0,
        0.0,
        1 << 20,
        None,
        True,
        True,
        True,
    )
    if kind == "clip":
        torch.library.opcheck(
            torch.ops.fusedrl.linear_policy_loss_triton.default,
            (*leaves, *columns, torch.rand(7, device=device), None, None, None, *rest),
        )

    def step(hidden, weight, bias):
        loss, stats, *_ = linear_policy_loss(
            hidden,
            weight,
            *columns[:4],
            bias=bias,
            objective=OBJECTIVES[kind],
            cu_seqlens=torch.tensor([0, 7], device=device),
            entropy_coef=0.1,
            impl="triton",
        )
        return 2 * loss, torch.stack([*stats])

    outcomes = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        loss, stats = function(*leaves)
        outcomes.append([loss.detach(), stats, *torch.autograd.grad(loss, leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


# ---- rows ----------------------------------------------------------------------------------------
@pytest.mark.each_impl("linear_policy_loss")
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_those_of_the_head(impl, dtype, grad, device):
    """Over several chunks, few rows of a chunk active; by definition, and 0 where the weight is
    0."""
    p = problem(device, 40, 24, 90, dtype, masked=0.3)
    p["advantages"] = torch.where(torch.arange(40, device=device) % 3 == 0, p["advantages"], 0.0)
    leaves = [p[name].clone().requires_grad_(grad) for name in ("hidden", "weight", "bias")]
    found = linear_policy_loss(
        *leaves[:2],
        p["token_ids"],
        p["old_logp"],
        p["advantages"],
        p["weights"],
        bias=leaves[2],
        temperature=0.8,
        softcap=20.0,
        workspace_bytes=7 * 90 * 4,
        impl=impl,
    )
    live = p["weights"] != 0
    z = p["hidden"][live].double() @ p["weight"].double().t() + p["bias"].double()
    logs = (20 * torch.tanh(z / 20) / 0.8).log_softmax(1)
    want = logs.gather(1, p["token_ids"][live, None])[:, 0], -(logs.exp() * logs).sum(1)
    for got, exact in zip((found.logp, found.entropy), want, strict=True):
        assert got.dtype == torch.float32
        assert not got.requires_grad
        assert not got[~live].any()
        torch.testing.assert_close(
            got[live].double(), exact, rtol=1e-5, atol=1e-4 if dtype == torch.float32 else 2e-2
        )


@pytest.mark.cpu_only("the C++ kernels")
@pytest.mark.skipif(not native.capability, reason=native.reason)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("V", [90, 5000])
def test_rows_have_the_bits_of_linear_logprob(V, dtype, device):
    """In chunks of the same rows; with half of them inactive, which moves gradients and no
    score."""
    p = problem(device, 300, 48, V, dtype, masked=0.3)
    p["advantages"] = torch.where(torch.arange(300, device=device) % 2 == 0, p["advantages"], 0.0)
    leaves = [p[name].clone().requires_grad_() for name in ("hidden", "weight")]
    found = linear_policy_loss(
        *leaves, p["token_ids"], p["old_logp"], p["advantages"], p["weights"], impl="cpp"
    )
    ids = torch.where(p["weights"] != 0, p["token_ids"], -100)
    logp, entropy = linear_logprob(*leaves, ids, entropy=True, ignore_index=-100, impl="cpp")
    assert torch.equal(found.logp, logp.detach())
    assert torch.equal(found.entropy, entropy.detach())


@pytest.mark.each_impl("linear_policy_loss")
@pytest.mark.parametrize(
    "kind", [kind for kind, objective in OBJECTIVES.items() if not objective.by_sequence]
)
def test_without_old_logp_it_is_the_policys_own(impl, kind, device):
    p = problem(device, 20, 8, 40)
    live, z = (
        p["weights"] != 0,
        p["hidden"].double() @ p["weight"].double().t() + p["bias"].double(),
    )
    z = z[live].requires_grad_()
    logp = z.log_softmax(1).gather(1, p["token_ids"][live, None])[:, 0]
    columns = [p[name][live].double() for name in ("advantages", "weights")]
    want, _ = policy_loss(logp, logp.detach(), *columns, objective=OBJECTIVES[kind], impl="torch")
    want_grad = torch.autograd.grad(want, z)[0].sum(0)
    bias = p["bias"].clone().requires_grad_()
    found = linear_policy_loss(
        p["hidden"],
        p["weight"],
        p["token_ids"],
        None,
        p["advantages"],
        p["weights"],
        bias=bias,
        objective=OBJECTIVES[kind],
        impl=impl,
    )
    assert found.stats.ratio_min == found.stats.ratio_max == 1
    torch.testing.assert_close(found.loss.double(), want.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(found.loss, bias)[0].double(), want_grad, rtol=1e-4, atol=1e-5
    )
