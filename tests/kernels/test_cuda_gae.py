"""gae and shaped_gae in CUDA C++, on a CPU: the product's launches through csrc/simt
(tests/kernels/conftest.py)."""

import pytest
import torch

from fusedrl.kernels.gae import gae, gae_reference, shaped_gae, shaped_gae_reference
from fusedrl.kernels.gae._cuda import plan_gae, plan_shaped_gae
from fusedrl.kernels.kl import ESTIMATORS

pytestmark = pytest.mark.cpu_only(
    "csrc/simt runs the CUDA sources on a CPU; on a card they are an implementation like the others"
)

MASKS = ["all", "none", "first", "last", "random"]
# Chunks are of 1024 tokens from a multiple of 4 on: lengths on either side of a thread's 4, a
# warp's 128 and a chunk, and empty sequences anywhere.
LENGTHS = [[0], [1], [0, 1, 0, 2, 0], [3, 4, 5, 127, 129], [1023, 0, 1025, 2100]]


def make(lengths, mask, seed=0):
    generator = torch.Generator().manual_seed(seed)
    N, B = sum(lengths), len(lengths)
    x = {
        name: torch.randn(N, generator=generator)
        for name in ("rewards", "values", "token_rewards", "logp")
    }
    x["ref_logp"] = x["logp"] + 0.3 * torch.randn(N, generator=generator)
    x |= {name: torch.randn(B, generator=generator) for name in ("scores", "last_values")}
    live = {
        "all": torch.ones(N),
        "none": torch.zeros(N),
        "random": torch.rand(N, generator=generator).round(),
    }.get(mask, torch.zeros(N)).bool()
    ends = torch.tensor([0, *lengths]).cumsum(0)
    for start, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        if end > start and mask in ("first", "last"):
            live[start if mask == "first" else end - 1] = True
    return x | {"mask": live, "cu_seqlens": ends.int()}


def poisoned(x, mask):
    return torch.where(mask, x, float("nan"))


def shifted(x, by):
    """The same numbers, `by` elements away from an aligned start."""
    return torch.cat([x.new_zeros(by), x])[by:]


def assert_close(got, want):
    for ours, expected in zip(got, want, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), expected, atol=2e-5, rtol=1e-5)


def run(simt, plan, *arguments):
    outputs, launches = plan(*arguments)
    simt.run(launches)
    first = [t.clone() for t in outputs]
    simt.descending = True  # the same bits in whatever order threads run: no barrier is missing
    for t in outputs:
        t.fill_(float("nan"))
    simt.run(launches)
    simt.descending = False
    assert all(
        torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
        for a, b in zip(first, outputs, strict=True)
    )
    return outputs


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_gae_is_the_reference(simt, lengths, mask):
    x = make(lengths, mask)
    m, wide = x["mask"], {name: t.double() for name, t in x.items() if t.is_floating_point()}
    for gamma, lam, last in (
        (1.0, 0.95, None),
        (0.9, 0.7, "last_values"),
        (1.0, 1.0, "last_values"),
        (0.0, 1.0, None),
    ):
        want = gae_reference(
            wide["rewards"], wide["values"], m, x["cu_seqlens"], gamma, lam, wide.get(last)
        )
        assert_close(
            run(
                simt,
                plan_gae,
                poisoned(x["rewards"], m),
                poisoned(x["values"], m),
                m,
                x["cu_seqlens"],
                gamma,
                lam,
                x.get(last),
            ),
            want,
        )
    if mask == "all":
        assert_close(
            run(
                simt,
                plan_gae,
                shifted(x["rewards"], 1),
                x["values"],
                None,
                x["cu_seqlens"],
                1.0,
                0.95,
                None,
            ),
            gae_reference(wide["rewards"], wide["values"], None, x["cu_seqlens"], 1.0, 0.95, None),
        )


@pytest.mark.parametrize("lengths", LENGTHS[1:], ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_shaped_gae_is_the_reference(simt, lengths, mask):
    x = make(lengths, mask)
    m, wide = x["mask"], {name: t.double() for name, t in x.items() if t.is_floating_point()}
    for on_device, estimator, gamma, lam, extra, clip, whiten, unbiased, by in (
        (False, "k1", 1.0, 0.95, None, None, True, False, 0),
        (True, "k1", 0.9, 0.8, "token_rewards", 0.5, True, True, 1),
        (False, "k3", 1.0, 0.95, "token_rewards", None, False, False, 0),
        (False, "k2", 0.99, 0.0, None, None, True, False, 3),
        (False, "abs", 1.0, 1.0, None, 0.1, False, False, 0),
    ):
        want = shaped_gae_reference(
            wide["logp"],
            wide["ref_logp"],
            wide["values"],
            wide["scores"],
            m,
            x["cu_seqlens"],
            0.2,
            estimator,
            gamma,
            lam,
            wide.get(extra),
            clip,
            whiten,
            unbiased,
        )
        got = run(
            simt,
            plan_shaped_gae,
            shifted(poisoned(x["logp"], m), by),
            poisoned(x["ref_logp"], m),
            poisoned(x["values"], m),
            x["scores"],
            shifted(m, by),
            x["cu_seqlens"],
            9.0 if on_device else 0.2,
            torch.tensor(0.2) if on_device else None,
            ESTIMATORS.index(estimator),
            gamma,
            lam,
            None if extra is None else poisoned(x[extra], m),
            clip,
            whiten,
            unbiased,
        )
        assert_close(got, want)


def test_padded_is_packed(simt):
    B, T = 3, 1030  # rows start at every offset from a multiple of 4
    x = make([T] * B, "random")
    tokens = [x[name] for name in ("logp", "ref_logp", "values")]
    rest = (0.2, None, 0, 1.0, 0.95, None, None, True, False)
    packed = run(simt, plan_shaped_gae, *tokens, x["scores"], x["mask"], x["cu_seqlens"], *rest)
    padded = run(
        simt,
        plan_shaped_gae,
        *(t.view(B, T) for t in tokens),
        x["scores"],
        x["mask"].view(B, T),
        None,
        *rest,
    )
    strided = run(
        simt,
        plan_shaped_gae,
        *(t.view(B, T).t().contiguous().t() for t in tokens),
        x["scores"],
        x["mask"].view(B, T),
        None,
        *rest,
    )
    assert all(
        torch.equal(a, b.view(a.shape)) and torch.equal(b, c)
        for a, b, c in zip(packed, padded, strided, strict=True)
    )


def test_a_large_mean_whitens_exactly(simt):
    x = make([2000, 1500], "random")
    live = x["mask"]
    raw, far = torch.where(live, x["values"] * 3, 0), torch.where(live, x["values"] * 3 + 1e4, 0)
    for rewards in (raw, far):  # with lam 0 and no values, the advantages are these rewards
        zeros = torch.zeros_like(rewards)
        arguments = (
            zeros,
            zeros,
            zeros,
            torch.zeros(2),
            live,
            x["cu_seqlens"],
            0.0,
            None,
            0,
            0.0,
            0.0,
            rewards,
            None,
            True,
            False,
        )
        got = run(simt, plan_shaped_gae, *arguments)[0].double()[live]
        exact = rewards.double()[live]
        torch.testing.assert_close(
            got,
            (exact - exact.mean()) * (exact.var(unbiased=False) + 1e-8).rsqrt(),
            atol=1e-5,
            rtol=1e-5,
        )


def test_writes_nothing_else(simt):
    """Canaries around the outputs, and what other sequences hold: neighbours share vectors of four
    tokens."""
    x = make([5, 1026, 3], "all")
    tokens = {name: x[name] for name in ("logp", "ref_logp", "values")}
    rest = (
        x["scores"],
        x["mask"],
        x["cu_seqlens"],
        0.2,
        None,
        0,
        1.0,
        0.95,
        None,
        None,
        False,
        False,
    )
    outputs, (launch,) = plan_shaped_gae(*tokens.values(), *rest)
    before = 64
    guarded = {t.data_ptr(): torch.full((t.numel() + 2 * before,), 123.0) for t in outputs}
    arguments = tuple(
        guarded[a.data_ptr()][before:]
        if isinstance(a, torch.Tensor) and a.data_ptr() in guarded
        else a
        for a in launch.arguments
    )
    simt.run(
        [
            launch.__class__(
                launch.source, launch.kernel, arguments, launch.grid, launch.block, launch.options
            )
        ]
    )
    for whole in guarded.values():
        assert (whole[:before] == 123.0).all()
        assert (whole[-before:] == 123.0).all()
        assert not (whole[before:-before] == 123.0).any()
    changed = {
        name: torch.cat([t[:5], torch.full((1026,), float("nan")), t[-3:]])
        for name, t in tokens.items()
    }
    kept = run(simt, plan_shaped_gae, *tokens.values(), *rest)
    others = run(simt, plan_shaped_gae, *changed.values(), *rest)
    for a, b in zip(kept[:3], others[:3], strict=True):
        assert torch.equal(a[:5], b[:5])
        assert torch.equal(a[-3:], b[-3:])


def test_ops_as_torch_sees_them(simt):
    def on_cpu(plan):
        def call(*arguments):
            outputs, launches = plan(*arguments)
            simt.run(launches)
            return outputs

        return call

    from fusedrl.kernels.gae import _cuda as gae_cuda

    gae_cuda._gae_cuda.register_kernel("cpu")(on_cpu(plan_gae))
    gae_cuda._shaped_gae_cuda.register_kernel("cpu")(on_cpu(plan_shaped_gae))
    x = make([5, 0, 9], "random")
    torch.library.opcheck(
        torch.ops.fusedrl.gae_cuda,
        (x["rewards"], x["values"], x["mask"], x["cu_seqlens"], 1.0, 0.95, x["last_values"]),
    )
    arguments = (
        x["logp"],
        x["ref_logp"],
        x["values"],
        x["scores"],
        x["mask"],
        x["cu_seqlens"],
        0.2,
        None,
        0,
        1.0,
        0.95,
        None,
        1.0,
        True,
        False,
    )
    torch.library.opcheck(torch.ops.fusedrl.shaped_gae_cuda, arguments)
    eager = torch.ops.fusedrl.shaped_gae_cuda(*arguments)
    compiled = torch.compile(
        torch.ops.fusedrl.shaped_gae_cuda, fullgraph=True, backend="aot_eager"
    )(*arguments)
    assert all(map(torch.equal, eager, compiled))


def test_nothing_at_all(simt):
    none, empty = torch.zeros(0), torch.zeros(0, dtype=torch.bool)
    cu_seqlens = torch.zeros(1, dtype=torch.int32)
    assert all(
        t.numel() == 0 for t in run(simt, plan_gae, none, none, None, cu_seqlens, 1.0, 0.95, None)
    )
    assert all(
        t.numel() == 0
        for t in run(
            simt,
            plan_shaped_gae,
            none,
            none,
            none,
            none,
            empty,
            cu_seqlens,
            0.1,
            None,
            0,
            1.0,
            0.95,
            None,
            None,
            True,
            False,
        )
    )


def test_is_refused_on_cpu_tensors():
    x = make([4], "all")
    with pytest.raises(RuntimeError, match=r"'cuda' cannot run on cpu.*CUDA tensors only"):
        gae(x["rewards"], x["values"], cu_seqlens=x["cu_seqlens"], impl="cuda")
    with pytest.raises(RuntimeError, match="'cuda' cannot run on cpu"):
        shaped_gae(
            x["logp"],
            x["ref_logp"],
            x["values"],
            x["scores"],
            mask=x["mask"],
            cu_seqlens=x["cu_seqlens"],
            kl_coef=0.1,
            impl="cuda",
        )
