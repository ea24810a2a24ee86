"""k-step and TD advantages and discounted returns: their definition, and what binds them to gae."""

import pytest
import torch

from fusedrl.engine.tools.verify.grid import interpreted
from fusedrl.kernels.gae import discounted_returns, gae, k_step_advantages, td_advantages
from fusedrl.kernels.runtime.dispatch import unavailable

LENGTHS = [[], [0], [1], [0, 1, 0, 2, 0], [7, 33, 0, 64]]


@pytest.fixture
def small_chunks(monkeypatch):
    """Triton's chunk cut to 16 tokens: the interpreter costs time by lane, and carries come into
    play."""
    if unavailable("triton", "cpu") is None:
        from fusedrl.kernels.gae import _triton as gae_triton

        monkeypatch.setattr(gae_triton, "_CHUNK", 16)


def make(device, lengths, seed=0, dtype=torch.float32, share=0.6):
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, sum(lengths), generator=generator, dtype=dtype).to(device)
    mask = torch.rand(sum(lengths), generator=generator).to(device) < share
    return (
        rewards,
        values,
        mask,
        torch.tensor([0, *lengths], device=device).cumsum(0).int(),
        torch.randn(len(lengths), generator=generator, dtype=dtype).to(device),
    )


def k_step_by_hand(device, rewards, values, mask, lengths, last_values, k, gamma):
    out, at = [0.0] * len(rewards), 0
    for b, length in enumerate(lengths):
        live = [t for t in range(at, at + length) if mask[t]]
        r, v = (
            [rewards[t].item() for t in live],
            [values[t].item() for t in live] + [last_values[b].item()],
        )
        for i, t in enumerate(live):
            n = min(k, len(live) - i)
            out[t] = sum(gamma**j * r[i + j] for j in range(n)) + gamma**n * v[i + n] - v[i]
        at += length
    return torch.tensor(out, dtype=torch.float64, device=device)


# k of one bit, of several, of all; k at and beyond the end; gamma 0 and 1.
@pytest.mark.each_impl("k_step_advantages")
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("k", [1, 2, 3, 4, 7, 20, 63, 64, 1000])
def test_k_step_is_the_definition(impl, lengths, k, small_chunks, device):
    if interpreted(impl, device) and k in (2, 4, 20, 63):
        pytest.skip(
            "long under the interpreter; its blocks are of any size, whatever the bits of k"
        )
    rewards, values, mask, cu, last = make(device, lengths, seed=k)
    for gamma in (0.9,) if interpreted(impl, device) and k not in (1, 7) else (0.0, 0.9, 1.0):
        want = k_step_by_hand(device, rewards, values, mask, lengths, last, k, gamma)
        hidden = [torch.where(mask, x, float("nan")) for x in (rewards, values)]
        advantages, returns = k_step_advantages(
            *hidden, k, mask=mask, cu_seqlens=cu, gamma=gamma, last_values=last, impl=impl
        )
        assert advantages.dtype == returns.dtype == torch.float32
        torch.testing.assert_close(advantages.double(), want, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(returns, torch.where(mask, advantages + values, 0))


# Without a mask the values need no bringing together; windows that end with the sequence, in the
# middle of a block and at its end.
@pytest.mark.each_impl("k_step_advantages")
@pytest.mark.parametrize("k", [1, 5, 8, 19, 20, 21])
def test_k_step_without_a_mask(impl, k, small_chunks, device):
    rewards, values, mask, cu, last = make(device, [20, 1], seed=k)
    got = k_step_advantages(
        rewards, values, k, cu_seqlens=cu, gamma=0.9, last_values=last, impl=impl
    )
    want = k_step_by_hand(device, rewards, values, torch.ones_like(mask), [20, 1], last, k, 0.9)
    torch.testing.assert_close(got[0].double(), want, atol=2e-5, rtol=1e-5)
    again = k_step_advantages(
        rewards,
        values,
        k,
        mask=torch.ones_like(mask),
        cu_seqlens=cu,
        gamma=0.9,
        last_values=last,
        impl=impl,
    )
    assert all(map(torch.equal, got, again))
    none = k_step_advantages(rewards, values, k, cu_seqlens=cu, gamma=0.9, impl=impl)[0]
    torch.testing.assert_close(
        none.double(),
        k_step_by_hand(device, rewards, values, torch.ones_like(mask), [20, 1], last * 0, k, 0.9),
        atol=2e-5,
        rtol=1e-5,
    )


@pytest.mark.each_impl("k_step_advantages")
def test_special_cases_of_gae(impl, small_chunks, device):
    rewards, values, mask, cu, last = make(device, [5, 40, 0, 3])
    options = {"mask": mask, "cu_seqlens": cu, "gamma": 0.97, "last_values": last, "impl": impl}
    for got, same in (
        (td_advantages(rewards, values, **options), gae(rewards, values, lam=0.0, **options)),
        (
            k_step_advantages(rewards, values, 1, **options),
            gae(rewards, values, lam=0.0, **options),
        ),
        (
            k_step_advantages(rewards, values, 40, **options),
            gae(rewards, values, lam=1.0, **options),
        ),
    ):
        torch.testing.assert_close(got, same, atol=2e-6, rtol=2e-6)
    to_go = discounted_returns(rewards, **options)
    torch.testing.assert_close(
        gae(rewards, values, lam=1.0, **options)[0],
        torch.where(mask, to_go - values, 0),
        atol=5e-6,
        rtol=1e-5,
    )
    want = k_step_by_hand(
        device, rewards, torch.zeros_like(values), mask, [5, 40, 0, 3], last, 40, 0.97
    )
    torch.testing.assert_close(to_go.double(), want, atol=2e-5, rtol=1e-5)
    bootstrap = torch.where(mask, values, 0)  # one live token a sequence: r + gamma last - V
    alone = torch.tensor([True, False, False], device=device)
    (advantage, _, _), _ = td_advantages(
        rewards[:3],
        bootstrap[:3],
        mask=alone,
        cu_seqlens=torch.tensor([0, 3], dtype=torch.int32, device=device),
        gamma=0.5,
        last_values=last[:1],
        impl=impl,
    )
    torch.testing.assert_close(advantage, rewards[0] + 0.5 * last[0] - bootstrap[0])


# For a finite episode with n steps left. The plain infinite sum, without the last term, is wrong at
# the end; lam = 1 is its limit.
@pytest.mark.each_impl("k_step_advantages")
@pytest.mark.parametrize("lam", [0.0, 0.3, 0.95, 1.0])
def test_gae_is_the_mixture_of_k_steps(impl, lam, small_chunks, device):
    T = 23 if not interpreted(impl, device) else 6
    rewards, values, mask, _, last = make(device, [T] * 3, seed=5)
    rewards, values, mask = (x.view(3, T) for x in (rewards, values, mask))
    options = {"mask": mask, "gamma": 0.9, "last_values": last, "impl": impl}
    steps = torch.stack(
        [k_step_advantages(rewards, values, k, **options)[0].double() for k in range(1, T + 1)]
    )
    want = torch.zeros(3, T, dtype=torch.float64, device=device)
    for b in range(3):
        left = mask[b].flip(0).cumsum(0).flip(0)  # n
        for t in range(T):
            n = int(left[t])
            if mask[b, t]:
                want[b, t] = (1 - lam) * sum(
                    lam ** (k - 1) * steps[k - 1, b, t] for k in range(1, n)
                ) + lam ** (n - 1) * steps[n - 1, b, t]
    torch.testing.assert_close(
        gae(rewards, values, lam=lam, **options)[0].double(), want, atol=2e-5, rtol=1e-5
    )


@pytest.mark.each_impl("k_step_advantages")
def test_padded_is_packed_and_nothing_leaks(impl, small_chunks, device):
    rewards, values, mask, cu, last = make(device, [16, 16, 16])
    for call in (
        lambda r, v, **o: k_step_advantages(r, v, 5, **o),
        td_advantages,
        lambda r, v, **o: (discounted_returns(r, **o),),
    ):
        packed = call(
            rewards, values, mask=mask, cu_seqlens=cu, last_values=last, gamma=0.9, impl=impl
        )
        padded = call(
            rewards.view(3, 16),
            values.view(3, 16),
            mask=mask.view(3, 16),
            last_values=last,
            gamma=0.9,
            impl=impl,
        )
        other, other_values = rewards.clone(), values.clone()
        other[16:], other_values[16:] = 1e6, -1e6
        changed = call(
            other, other_values, mask=mask, cu_seqlens=cu, last_values=last, gamma=0.9, impl=impl
        )
        for a, b, c in zip(packed, padded, changed, strict=True):
            assert torch.equal(a, b.reshape(-1))
            assert torch.equal(a[:16], c[:16])
            assert a[~mask].eq(0).all()


# Windows are summed as windows: a difference of suffix sums over 131072 tokens loses five digits.
# Under the interpreter fewer tokens and larger rewards (the chunk as it is, and one more).
@pytest.mark.each_impl("k_step_advantages")
def test_long_windows_do_not_cancel(impl, device):
    T, k, offset = (1100, 10, 100.0) if interpreted(impl, device) else (131072, 100, 1.0)
    rewards, values, _, cu, _ = make(device, [T], seed=1)
    rewards += offset
    got, _ = k_step_advantages(rewards, values, k, cu_seqlens=cu, impl=impl)
    want, _ = k_step_advantages(rewards.double(), values.double(), k, cu_seqlens=cu, impl="torch")
    torch.testing.assert_close(got.double(), want, atol=5e-5, rtol=1e-6)
    to_go = (
        (rewards + torch.cat([values[1:], torch.zeros(1, device=device)]) - values)
        .flip(0)
        .cumsum(0)
        .flip(0)
    )
    wrong = to_go - torch.cat([to_go[k:], torch.zeros(k, device=device)])
    assert ((wrong - want).abs() > 5e-5 + 1e-6 * want.abs()).any()


@pytest.mark.each_impl("k_step_advantages")
def test_opcheck_compile_and_refusals(impl, small_chunks, device):
    rewards, values, mask, cu, last = make(device, [4, 6])
    if impl != "torch":
        op = (
            torch.ops.fusedrl.k_step_advantages
            if impl == "cpp"
            else torch.ops.fusedrl.k_step_advantages_triton
        )
        torch.library.opcheck(op.default, (rewards, values, mask, cu, 3, 0.9, last))
    for call in (
        lambda r, v: k_step_advantages(r, v, 3, mask=mask, cu_seqlens=cu, impl=impl),
        lambda r, v: discounted_returns(r, cu_seqlens=cu, impl=impl),
    ):
        torch.testing.assert_close(
            torch.compile(call, fullgraph=True, backend="aot_eager")(rewards, values),
            call(rewards, values),
            atol=0,
            rtol=0,
        )
    with pytest.raises(ValueError, match="expected k >= 1, got 0"):
        k_step_advantages(rewards, values, 0, cu_seqlens=cu, impl=impl)
    with pytest.raises(ValueError, match=r"values does not fit its pattern \[N\]"):
        k_step_advantages(rewards, values[:4], 2, cu_seqlens=cu, impl=impl)
    with pytest.raises(TypeError, match="k_step_advantages: expected mask of dtype bool"):
        k_step_advantages(rewards, values, 2, mask=mask.int(), cu_seqlens=cu, impl=impl)
