"""What holds whatever the input: properties of the ops over small cases that hypothesis draws from
the levels of the grid."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fusedrl.engine.tools.verify.catalogue import CATALOGUE
from fusedrl.engine.tools.verify.catalogue.rows import LOGITS, logits_of
from fusedrl.engine.tools.verify.grid import interpreted, run, same_bits
from fusedrl.kernels.full_kl import full_kl
from fusedrl.kernels.gae import (
    discounted_returns,
    gae,
    k_step_advantages,
    shaped_gae,
    td_advantages,
)
from fusedrl.kernels.linear_logprob import linear_logprob
from fusedrl.kernels.logprob import logprob
from fusedrl.kernels.normalize import masked_whiten
from fusedrl.kernels.policy_loss import policy_loss
from fusedrl.kernels.runtime.dispatch import CannotServe

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:invalid value encountered", "ignore:overflow encountered", "ignore:divide by zero"
    ),
    pytest.mark.usefixtures("small_tiles"),
]
POISONS = (math.nan, math.inf, -1e30)


def drawn(examples):
    return settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


def examples_of(impl, device):
    return 2 if interpreted(impl, device) else 5


def small(op, impl, device):
    """Strategy of cases that are small in every factor that has a size."""

    def few(name, levels):
        if name in ("N", "V", "F", "H"):
            return (
                tuple(v for v in levels if v <= (33 if interpreted(impl, device) else 130))
                or levels[:1]
            )
        if name in ("shape", "lengths", "sizes"):
            return levels[:5]
        return levels

    entry = CATALOGUE[op]
    return st.fixed_dictionaries(
        {
            name: st.sampled_from(few(name, levels))
            for name, levels in entry.levels_of(impl, device).items()
        }
    ).filter(lambda case: entry.fits(SimpleNamespace(**case)))


def alike(a, b, impl):
    """The same bits; torch's own kernels take the ends of a tensor another way than its middle, and
    a scan by doubling depends on the longest sequence."""
    return same_bits(a, b) if impl != "torch" else torch.allclose(a, b, rtol=1e-5, atol=1e-5)


def equal(a, b):
    return a.keys() == b.keys() and all(same_bits(a[name], b[name]) for name in a)


# ---- every op ------------------------------------------------------------------------------------
@pytest.mark.each_pair
def test_two_runs_agree_and_what_is_hidden_changes_nothing(op, impl, device):
    entry = CATALOGUE[op]

    @drawn(examples_of(impl, device))
    @given(small(op, impl, device), st.sampled_from(POISONS))
    def check(case, poison):
        problem = entry.problem(case, device=device)
        try:
            first = run(entry, problem, impl)
        except CannotServe:  # on a GPU some serve some dtypes
            return
        assert equal(first, run(entry, problem, impl))
        x = problem.x | {
            name: torch.where(
                hidden,
                torch.tensor(poison, dtype=problem.x[name].dtype, device=device),
                problem.x[name],
            )
            for name, hidden in problem.hidden.items()
        }
        assert equal(first, run(entry, replace(problem, x=x), impl))
        for name, hidden in problem.hidden.items():  # and receives nothing
            if f"d {name}" in first:
                assert not torch.where(hidden, first[f"d {name}"], 0).any()

    check()


@pytest.mark.cpu_only("the C++ kernels are those of a CPU")
@pytest.mark.each_pair(lambda op, impl: impl == "cpp")
def test_threads_change_nothing(op, impl, device):
    entry = CATALOGUE[op]
    changes = (
        {"N": max(n for n in entry.levels["N"] if n <= 4096)}
        if "N" in entry.levels
        else {"shape": ("packed", (700, 3, 0, 1500, 40))}
        if "shape" in entry.levels
        else {"lengths": (127, 1, 129)}
        if op == "varlen_attention"
        else {}
    )
    problem, threads, outcomes = (
        entry.problem(entry.plain(**changes), device=device),
        torch.get_num_threads(),
        [],
    )
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            outcomes.append(run(entry, problem, impl))
    finally:
        torch.set_num_threads(threads)
    assert equal(*outcomes)


# ---- rows of logits ------------------------------------------------------------------------------
def of(*ops):
    """Marks a test that runs with every implementation of these ops."""
    return pytest.mark.each_pair(lambda op, impl: op in ops)


@of("logprob")
def test_logprob(op, impl, device):
    @drawn(4 * examples_of(impl, device))
    @given(
        st.sampled_from([k for k in LOGITS if "inf" not in k]),
        st.integers(1, 40 if interpreted(impl, device) else 300),
        st.integers(0, 2**31),
        st.sampled_from([0.3, 1.0, 2.5]),
    )
    def check(kind, V, seed, T):
        generator = torch.Generator().manual_seed(seed)
        z = logits_of(kind, 4, V, torch.float32, generator).to(device)
        ids = torch.randint(0, V, (4,), generator=generator).to(device)
        g, h = torch.randn(2, 4, generator=generator).to(device).unbind()
        g[1] = h[1] = 0.0
        ids[2] = -100
        leaf = z.clone().requires_grad_()
        logp, entropy = logprob(leaf, ids, temperature=T, entropy=True, impl=impl)
        assert (logp <= 0).all()
        assert (entropy >= -1e-6 * max(1.0, math.log(V))).all()
        assert (entropy <= math.log(V) + 1e-5 * max(1.0, math.log(V))).all()
        (dz,) = torch.autograd.grad((logp, entropy), leaf, (g, h))
        assert dz[1:3].eq(0).all()  # no gradient reaches them, bit for bit
        assert (
            dz.double().sum(-1).abs() <= 2e-6 * (g.abs() + h.abs() * max(1.0, math.log(V))) / T
        ).all()
        one = logprob(z[3:], ids[3:], temperature=T, entropy=True, impl=impl)
        assert alike(one[0], logp[3:].detach(), impl)
        assert alike(one[1], entropy[3:].detach(), impl)

    check()


@of("full_kl")
@pytest.mark.parametrize("direction", ["reverse", "forward", "jsd"])
def test_full_kl(op, impl, device, direction):
    @drawn(2 * examples_of(impl, device))
    @given(
        st.sampled_from(["sd 1", "sd 10", "all equal", "about -200"]),
        st.integers(1, 40 if interpreted(impl, device) else 300),
        st.integers(0, 2**31),
    )
    def check(kind, V, seed):
        generator = torch.Generator().manual_seed(seed)
        z = logits_of(kind, 3, V, torch.float32, generator).to(device)
        x, g = (
            z + torch.randn(3, V, generator=generator).to(device),
            torch.tensor([1.0, 0.0, -2.0], device=device),
        )
        leaf = z.clone().requires_grad_()
        kl = full_kl(leaf, x, direction=direction, impl=impl)
        assert (kl >= 0).all()
        (dz,) = torch.autograd.grad(kl, leaf, g)
        assert dz[1].eq(0).all()
        assert (dz.double().sum(-1).abs() <= 4e-6 * g.abs() * kl.detach().clamp(min=1.0)).all()
        assert alike(full_kl(z[2:], x[2:], direction=direction, impl=impl), kl[2:].detach(), impl)
        assert full_kl(z, z, direction=direction, impl=impl).eq(0).all()

    check()


@of("linear_logprob")
def test_linear_logprob(op, impl, device):
    @drawn(2 * examples_of(impl, device))
    @given(st.integers(1, 9), st.integers(1, 40), st.integers(1, 12), st.integers(0, 2**31))
    def check(N, V, H, seed):
        generator = torch.Generator().manual_seed(seed)
        hidden, weight = (
            torch.randn(rows, H, generator=generator).to(device).requires_grad_() for rows in (N, V)
        )
        ids = torch.randint(0, V, (N,), generator=generator).to(device)
        ids[N // 2] = -100
        logp, entropy = linear_logprob(hidden, weight, ids, entropy=True, impl=impl)
        assert (logp <= 0).all()
        assert (entropy <= math.log(V) + 1e-5 * max(1.0, math.log(V))).all()
        d_hidden, d_weight = torch.autograd.grad(logp.sum() + entropy.sum(), (hidden, weight))
        assert d_hidden[N // 2].eq(0).all()
        assert (
            d_weight.double().sum(0).abs()
            <= 1e-5 * N * hidden.abs().max() * max(1.0, math.log(V)) + 1e-5
        ).all()  # sum_j dz_j = 0, through the head

    check()


@of("policy_loss")
def test_policy_loss_weights(op, impl, device):
    @drawn(2 * examples_of(impl, device))
    @given(st.integers(1, 40), st.integers(0, 2**31))
    def check(N, seed):
        generator = torch.Generator().manual_seed(seed)
        logp, old, A = torch.randn(3, N, generator=generator).to(device).unbind()
        weights = torch.where(
            torch.rand(N, generator=generator) < 0.5, torch.rand(N, generator=generator), 0.0
        ).to(device)
        A[::3] = 0.0
        leaf = logp.clone().requires_grad_()
        loss, stats = policy_loss(leaf, old, A, weights, impl=impl)
        (d,) = torch.autograd.grad(loss, leaf)
        assert d[(weights == 0) | (A == 0)].eq(0).all()  # a zero coefficient
        keep = weights != 0  # packed: what is masked might as well not be there
        alone, same = policy_loss(logp[keep], old[keep], A[keep], weights[keep], impl=impl)
        torch.testing.assert_close(alone, loss.detach(), rtol=2e-6, atol=2e-6)
        assert stats.tokens == same.tokens == keep.sum()

    check()


# ---- packed and padded ---------------------------------------------------------------------------
ADVANTAGES = {
    "gae": lambda t, **o: gae(t["rewards"], t["values"], last_values=t["last"], gamma=0.97, **o),
    "td_advantages": lambda t, **o: td_advantages(
        t["rewards"], t["values"], last_values=t["last"], gamma=0.97, **o
    ),
    "discounted_returns": lambda t, **o: (
        discounted_returns(t["rewards"], last_values=t["last"], gamma=0.97, **o),
    ),
    "k_step_advantages": lambda t, **o: k_step_advantages(
        t["rewards"], t["values"], 3, last_values=t["last"], gamma=0.97, **o
    ),
    "shaped_gae": lambda t, **o: shaped_gae(
        t["rewards"], t["values"], t["values"], t["last"], kl_coef=0.1, whiten=False, **o
    ),
}


@of(*ADVANTAGES)
def test_padded_is_packed(op, impl, device):
    """Sequences of any lengths, packed end to end and padded to [B, T] with NaN behind them: the
    same bits; and none depends on another."""
    call = ADVANTAGES[op]

    @drawn(2 * examples_of(impl, device))
    @given(st.lists(st.integers(0, 20), min_size=1, max_size=5), st.integers(0, 2**31))
    def check(lengths, seed):
        generator = torch.Generator().manual_seed(seed)
        B, T, N = len(lengths), max(lengths) + seed % 3, sum(lengths)
        packed = {
            name: torch.randn(size, generator=generator).to(device)
            for name, size in (("rewards", N), ("values", N), ("last", B))
        }
        mask, cu = (
            (torch.rand(N, generator=generator) < 0.7).to(device),
            torch.tensor([0, *lengths], device=device).cumsum(0).int(),
        )
        inside = torch.arange(T, device=device) < torch.tensor(lengths, device=device)[:, None]
        padded = {
            name: torch.full((B, T), math.nan, device=device).masked_scatter(inside, packed[name])
            for name in ("rewards", "values")
        }
        padded["last"] = packed["last"]
        square = torch.zeros(B, T, dtype=torch.bool, device=device).masked_scatter(inside, mask)
        per_token = 3  # what follows in shaped_gae's result is per sequence
        one, other = (
            call(packed, mask=mask, cu_seqlens=cu, impl=impl),
            call(padded, mask=square, cu_seqlens=None, impl=impl),
        )
        alone = call(
            {name: t[:1] if name == "last" else t[: lengths[0]] for name, t in packed.items()},
            mask=mask[: lengths[0]],
            cu_seqlens=cu[:2],
            impl=impl,
        )
        for a, b, c in zip(one[:per_token], other[:per_token], alone[:per_token], strict=True):
            assert alike(a, b[inside], impl)
            assert not b[~inside].any()
            assert alike(a[: lengths[0]], c, impl)
        for a, b, c in zip(one[per_token:], other[per_token:], alone[per_token:], strict=True):
            assert alike(a, b, impl)
            assert alike(a[:1], c, impl)

    check()


@of("masked_whiten")
def test_whitened_moments(op, impl, device):
    @drawn(2 * examples_of(impl, device))
    @given(st.integers(2, 200), st.sampled_from([0.0, -3.0, 1e4]), st.integers(0, 2**31))
    def check(N, offset, seed):
        generator = torch.Generator().manual_seed(seed)
        mask = (torch.rand(N, generator=generator) < 0.8).to(device)
        mask[:2] = True
        x = torch.where(mask, torch.randn(N, generator=generator).to(device) + offset, math.nan)
        w = masked_whiten(x, mask, impl=impl)
        assert w[~mask].eq(0).all()
        assert abs(w[mask].double().mean()) < 1e-5
        assert abs(w[mask].double().var(correction=0) - 1) < 1e-4
        shuffled = torch.randperm(N, generator=generator).to(device)
        torch.testing.assert_close(
            masked_whiten(x[shuffled], mask[shuffled], impl=impl), w[shuffled], rtol=1e-5, atol=1e-5
        )

    check()
