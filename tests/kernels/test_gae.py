"""GAE and the returns beside it, against a loop over time in float64.

One file: the loop and the ragged cases that all its functions share.
"""

import math

import pytest
import torch

from fusedrl.engine.tools.verify.catalogue import CATALOGUE
from fusedrl.engine.tools.verify.grid import interpreted
from fusedrl.kernels.gae import ShapedGAE, gae, shaped_gae
from fusedrl.kernels.runtime import native
from fusedrl.kernels.runtime.dispatch import unavailable

MASKS = ["all", "none", "first", "last", "prompt", "random"]


# ---- the definition once more, as a loop over Python floats --------------------------------------
def loop(rewards, values, mask, gamma, lam, last_value=0.0):
    advantages, returns = [0.0] * len(rewards), [0.0] * len(rewards)
    next_value, running = last_value, 0.0
    for t in reversed(range(len(rewards))):
        if mask[t]:
            running = rewards[t] + gamma * next_value - values[t] + gamma * lam * running
            next_value = values[t]
            advantages[t], returns[t] = running, running + values[t]
    return advantages, returns


def by_loop(device, rewards, values, mask, lengths, gamma, lam, last_values=None):
    out, at = ([], []), 0
    for b, length in enumerate(lengths):
        part = slice(at, at + length)
        last = 0.0 if last_values is None else last_values[b].item()
        for whole, piece in zip(
            out,
            loop(
                rewards[part].tolist(), values[part].tolist(), mask[part].tolist(), gamma, lam, last
            ),
            strict=True,
        ):
            whole += piece
        at += length
    return tuple(torch.tensor(x, dtype=torch.float64, device=device) for x in out)


def shaped_by_loop(
    device,
    logp,
    ref_logp,
    values,
    scores,
    mask,
    lengths,
    kl_coef,
    estimator,
    gamma,
    lam,
    token_rewards,
    score_clip,
    whiten,
    unbiased,
):
    formula = {
        "k1": lambda d: d,
        "k2": lambda d: d * d / 2,
        "k3": lambda d: math.exp(-d) - 1 + d,
        "abs": abs,
    }[estimator]
    rewards, kls, clipped, at = [], [], [], 0
    for b, length in enumerate(lengths):
        live = [t for t in range(at, at + length) if mask[t]]
        kl = {t: formula(logp[t].item() - ref_logp[t].item()) for t in live}
        clipped.append(
            scores[b].item()
            if score_clip is None
            else max(-score_clip, min(score_clip, scores[b].item()))
        )
        for t in range(at, at + length):
            extra = token_rewards[t].item() if token_rewards is not None else 0.0
            rewards.append(
                extra - kl_coef * kl[t] + (clipped[b] if t == live[-1] else 0.0) if t in kl else 0.0
            )
        kls.append(sum(kl.values()))
        at += length
    rewards = torch.tensor(rewards, dtype=torch.float64, device=device)
    advantages, returns = by_loop(device, rewards, values, mask, lengths, gamma, lam)
    if whiten and mask.any():
        chosen = advantages[mask]
        variance = ((chosen - chosen.mean()) ** 2).sum() / max(1, len(chosen) - unbiased)
        advantages[mask] = (chosen - chosen.mean()) / (variance + 1e-8).sqrt()
    return ShapedGAE(
        advantages,
        returns,
        rewards,
        torch.tensor(kls, dtype=torch.float64, device=device),
        torch.tensor(clipped, dtype=torch.float64, device=device),
    )


@pytest.fixture
def small_chunks(monkeypatch):
    """Triton's chunk cut to 16 tokens: the interpreter costs time by lane, and carries come into
    play."""
    if unavailable("triton", "cpu") is None:
        from fusedrl.kernels.gae import _triton as gae_triton

        monkeypatch.setattr(gae_triton, "_CHUNK", 16)


# ---- inputs --------------------------------------------------------------------------------------
def make_mask(device, kind, lengths, generator):
    parts = []
    for length in lengths:
        mask = torch.zeros(length, dtype=torch.bool, device=device)
        if kind == "all":
            mask[:] = True
        elif kind == "first":
            mask[:1] = True
        elif kind == "last":
            mask[-1:] = True
        elif kind == "prompt":  # the usual one: a prompt that is not ours, then actions to the end
            mask[length // 3 :] = True
        elif kind == "random":
            mask = torch.rand(length, generator=generator).to(device) < 0.6
        parts.append(mask)
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.bool, device=device)


def make(device, lengths, mask="random", seed=0):
    generator = torch.Generator().manual_seed(seed + len(lengths))
    N, B = sum(lengths), len(lengths)
    tokens = {
        name: torch.randn(N, generator=generator).to(device)
        for name in ("rewards", "values", "token_rewards")
    }
    tokens["logp"] = -torch.rand(N, generator=generator).to(device) * 4
    tokens["ref_logp"] = tokens["logp"] + torch.randn(N, generator=generator).to(device) * 0.3
    sequences = {
        name: torch.randn(B, generator=generator).to(device) for name in ("scores", "last_values")
    }
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    return (
        tokens
        | sequences
        | {"cu_seqlens": cu_seqlens, "mask": make_mask(device, mask, lengths, generator)}
    )


def poisoned(x, mask):
    return torch.where(mask, x, float("nan"))


def run_shaped(x, impl, **options):
    options = {"mask": x["mask"], "cu_seqlens": x["cu_seqlens"], "kl_coef": 0.2} | options
    return shaped_gae(x["logp"], x["ref_logp"], x["values"], x["scores"], impl=impl, **options)


def assert_close(got, want, atol=2e-5, rtol=1e-5):
    for ours, expected in zip(got, want, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(
            ours.double().reshape(-1), expected.reshape(-1), atol=atol, rtol=rtol
        )


# Empty sequences first, between and last; lengths around the 16 lanes and the 1024-token tiles of
# the C++ kernel; nothing at all.
LENGTHS = [
    [],
    [0],
    [1],
    [0, 1, 0, 2, 0],
    [15, 16, 17, 31, 33],
    [127, 0, 129, 48],
    [1024, 1025, 2100],
]


@pytest.mark.each_impl("gae")
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_gae_is_the_loop(impl, lengths, mask, small_chunks, device):
    x = make(device, lengths, mask)
    m = x["mask"]
    settings = (
        (0.9, 0.7, x["last_values"]),
        (1.0, 0.95, None),
        (1.0, 1.0, x["last_values"]),
        (0.99, 0.0, None),
        (0.0, 1.0, None),
    )
    if interpreted(impl, device) and sum(lengths) > 10:
        if sum(lengths) > 200:
            pytest.skip("long under the interpreter; test_triton_chunks runs the chunk as it is")
        settings = settings[:2]
    for gamma, lam, last in settings:
        want = by_loop(device, x["rewards"], x["values"], m, lengths, gamma, lam, last)
        got = gae(
            poisoned(x["rewards"], m),
            poisoned(x["values"], m),
            mask=m,
            cu_seqlens=x["cu_seqlens"],
            gamma=gamma,
            lam=lam,
            last_values=last,
            impl=impl,
        )
        assert_close(got, want)
        if mask == "all":
            again = gae(
                x["rewards"],
                x["values"],
                cu_seqlens=x["cu_seqlens"],
                gamma=gamma,
                lam=lam,
                last_values=last,
                impl=impl,
            )
            assert all(map(torch.equal, got, again))


@pytest.mark.each_impl("shaped_gae")
@pytest.mark.parametrize("mask", MASKS)
def test_shaped_gae_is_the_loop(impl, mask, small_chunks, device):
    lengths = [17, 0, 5, 1, 40]
    x = make(device, lengths, mask)
    m = x["mask"]
    hidden = x | {name: poisoned(x[name], m) for name in ("logp", "ref_logp", "values")}
    for options in (
        {},
        {"whiten": False, "score_clip": 0.5},
        {"whiten_unbiased": True, "token_rewards": x["token_rewards"], "gamma": 0.9, "lam": 0.8},
        {"kl_estimator": "k3", "allow_biased_kl": True, "whiten": False},
        {"kl_estimator": "k2", "allow_biased_kl": True},
        {
            "kl_estimator": "abs",
            "allow_biased_kl": True,
            "kl_coef": torch.tensor(0.7, device=device),
        },
    ):
        full = {
            "kl_coef": 0.2,
            "kl_estimator": "k1",
            "gamma": 1.0,
            "lam": 0.95,
            "token_rewards": None,
            "score_clip": None,
            "whiten": True,
            "whiten_unbiased": False,
        } | options
        want = shaped_by_loop(
            device,
            x["logp"],
            x["ref_logp"],
            x["values"],
            x["scores"],
            m,
            lengths,
            float(full["kl_coef"]),
            full["kl_estimator"],
            full["gamma"],
            full["lam"],
            full["token_rewards"],
            full["score_clip"],
            full["whiten"],
            full["whiten_unbiased"],
        )
        if full["token_rewards"] is not None:
            options = options | {"token_rewards": poisoned(x["token_rewards"], m)}
        got = run_shaped(hidden, impl, **options)
        # An advantage of rounding error alone (one live token) must whiten to 0, not to noise /
        # sqrt(eps).
        assert_close(got, want)


@pytest.mark.each_impl("gae", only=("triton",))
def test_triton_chunks(impl, device):
    """The chunk as it is. Sequences longer than a chunk: carries, also over a gap that spans
    chunks, and a chunk with nothing live."""
    lengths = [1025, 2300, 3]
    x = make(device, lengths, "random")
    x["mask"][1025 + 900 : 1025 + 2200] = False
    options = {"token_rewards": x["token_rewards"], "score_clip": 0.8}
    want = shaped_by_loop(
        device,
        x["logp"],
        x["ref_logp"],
        x["values"],
        x["scores"],
        x["mask"],
        lengths,
        0.2,
        "k1",
        1.0,
        0.95,
        x["token_rewards"],
        0.8,
        True,
        False,
    )
    assert_close(run_shaped(x, impl, **options), want)
    want = by_loop(
        device, x["rewards"], x["values"], x["mask"], lengths, 0.99, 0.95, x["last_values"]
    )
    assert_close(
        gae(
            x["rewards"],
            x["values"],
            mask=x["mask"],
            cu_seqlens=x["cu_seqlens"],
            gamma=0.99,
            last_values=x["last_values"],
            impl=impl,
        ),
        want,
    )


@pytest.mark.each_impl("gae")
def test_nothing_live_and_nothing_there(impl, small_chunks, device):
    for lengths in ([], [0, 0], [4, 2]):
        x = make(device, lengths, "none")
        x["scores"] = x["scores"] * 10
        out = run_shaped(x, impl, score_clip=1.0)
        assert not any(t.any() for t in out[:4])
        # clipped even where it is placed nowhere
        torch.testing.assert_close(out.score_per_sequence, x["scores"].clamp(-1, 1))


@pytest.mark.each_impl("gae")
def test_padded_is_packed(impl, small_chunks, device):
    B, T = 3, 21
    x = make(device, [T] * B, "random")
    packed = run_shaped(x, impl)
    square = {name: x[name].view(B, T) for name in ("logp", "ref_logp", "values", "mask")}
    # another layout of the same numbers
    transposed = {name: t.t().contiguous().t() for name, t in square.items()}
    for form in (square, transposed):
        padded = run_shaped(x | form, impl, cu_seqlens=None, mask=form["mask"])
        for a, b in zip(padded, packed, strict=True):
            assert torch.equal(a.reshape(-1), b)
    packed = gae(
        x["rewards"],
        x["values"],
        mask=x["mask"],
        cu_seqlens=x["cu_seqlens"],
        last_values=x["last_values"],
        impl=impl,
    )
    padded = gae(
        x["rewards"].view(B, T),
        square["values"],
        mask=square["mask"],
        last_values=x["last_values"],
        impl=impl,
    )
    assert all(torch.equal(a.reshape(-1), b) for a, b in zip(padded, packed, strict=True))
    assert gae(torch.zeros(0, 5, device=device), torch.zeros(0, 5, device=device), impl=impl)[
        0
    ].shape == (0, 5)
    assert gae(torch.zeros(5, 0, device=device), torch.zeros(5, 0, device=device), impl=impl)[
        0
    ].shape == (5, 0)


# numpy, under the interpreter, where a live value is infinite
@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.each_impl("gae")
def test_bitwise_whatever_is_masked_and_whoever_is_near(impl, small_chunks, device):
    lengths = [33, 0, 18]
    x = make(device, lengths)
    first = run_shaped(x, impl, token_rewards=x["token_rewards"])
    assert all(map(torch.equal, first, run_shaped(x, impl, token_rewards=x["token_rewards"])))
    for junk in (float("nan"), float("inf"), -1e30):
        hidden = x | {
            name: torch.where(x["mask"], x[name], junk)
            for name in ("logp", "ref_logp", "values", "token_rewards")
        }
        before = {name: t.clone() for name, t in hidden.items()}
        assert all(
            map(torch.equal, first, run_shaped(hidden, impl, token_rewards=hidden["token_rewards"]))
        )
        assert all(
            torch.equal(hidden[name].nan_to_num(), before[name].nan_to_num()) for name in hidden
        )  # inputs are not written to
    kw = {
        "mask": x["mask"],
        "cu_seqlens": x["cu_seqlens"],
        "last_values": x["last_values"],
        "impl": impl,
    }
    alone = gae(x["rewards"], x["values"], **kw)
    assert all(
        map(
            torch.equal,
            alone,
            gae(
                *(torch.where(x["mask"], x[name], float("inf")) for name in ("rewards", "values")),
                **kw,
            ),
        )
    )
    near = torch.cat([x["rewards"][:33], torch.full((18,), float("nan"), device=device)])
    assert all(
        torch.equal(a[:33], b[:33])
        for a, b in zip(alone, gae(near, x["values"], **kw), strict=True)
    )
    plain = run_shaped(x, impl, whiten=False)
    other = x | {
        "values": torch.cat([x["values"][:33], torch.full((18,), float("inf"), device=device)])
    }
    for a, b in zip(plain[:3], run_shaped(other, impl, whiten=False)[:3], strict=True):
        assert torch.equal(a[:33], b[:33])


def test_threads_change_nothing(device):
    x = make(device, [700, 3, 0, 1500, 40, 900], "random")
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(
                [
                    *run_shaped(x, None),
                    *gae(x["rewards"], x["values"], mask=x["mask"], cu_seqlens=x["cu_seqlens"]),
                ]
            )
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.each_impl("gae")
@pytest.mark.parametrize("T", [2100, 32768, 131072])
def test_long(impl, T, device):
    if interpreted(impl, device) and T > 2100:
        pytest.skip("long under the interpreter, and all chunks after the first are alike")
    generator = torch.Generator().manual_seed(T)
    rewards, values = (
        torch.randn(1, T, generator=generator).to(device),
        torch.randn(1, T, generator=generator).to(device),
    )
    mask = torch.ones(1, T, dtype=torch.bool, device=device)
    assert_close(
        gae(rewards, values, impl=impl),
        by_loop(device, rewards[0], values[0], mask[0], [T], 1.0, 0.95),
    )
    # At lambda 1 the error is that of summing: no worse than twice that of the float32 loop.
    want, _ = by_loop(device, rewards[0], values[0], mask[0], [T], 1.0, 1.0)
    delta = rewards[0] + torch.cat([values[0, 1:], torch.zeros(1, device=device)]) - values[0]
    sequential = delta.flip(0).cpu().numpy().cumsum(dtype="float32")[::-1].copy()
    theirs = (torch.from_numpy(sequential).to(device).double() - want).abs().max()
    assert (
        gae(rewards, values, lam=1.0, impl=impl)[0][0].double() - want
    ).abs().max() <= 2 * theirs


@pytest.mark.each_impl("gae")
def test_identities(impl, small_chunks, device):
    x = make(device, [50, 7], "all")
    kw = {"cu_seqlens": x["cu_seqlens"], "impl": impl}
    returns = gae(x["rewards"], x["values"], gamma=0.9, lam=1.0, **kw)[1]
    to_go = gae(x["rewards"], torch.zeros(57, device=device), gamma=0.9, lam=1.0, **kw)[0]
    # lambda 1: the discounted reward to go
    torch.testing.assert_close(returns, to_go, atol=1e-5, rtol=1e-5)
    delta = gae(x["rewards"], x["values"], gamma=0.9, lam=0.0, **kw)[0]
    assert delta[49] == x["rewards"][49] - x["values"][49]
    # A finite episode: (1 - lam) sum_k lam^(k-1) A^k + lam^(n-1) A^n.
    lam, r, v = (
        0.8,
        x["rewards"][:50].double(),
        torch.cat([x["values"][:50].double(), torch.zeros(1, device=device)]),
    )
    k_step = [sum(0.9**i * r[i] for i in range(k)) + 0.9**k * v[k] - v[0] for k in range(1, 51)]
    mixed = (1 - lam) * sum(lam**i * a for i, a in enumerate(k_step[:-1])) + lam**49 * k_step[-1]
    got = gae(x["rewards"], x["values"], gamma=0.9, lam=lam, **kw)[0][0]
    torch.testing.assert_close(got.double(), mixed, atol=2e-5, rtol=1e-5)


@pytest.mark.each_impl("gae")
def test_whitening_survives_a_large_mean(impl, small_chunks, device):
    """Advantages of 1e4 +- 1: what E[x^2] - E[x]^2 gets wrong by thousands. The advantages
    themselves are exact in float32 here."""
    B = 40
    x = make(device, [1] * B, "all")
    x["values"] = torch.zeros(B, device=device)
    x["scores"] = (
        1e4
        + torch.randint(-512, 513, (B,), generator=torch.Generator().manual_seed(0)).to(device)
        / 512
    )
    got = run_shaped(x, impl, kl_coef=0.0).advantages
    want = x["scores"].double()
    want = (want - want.mean()) / want.std(unbiased=False)
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)


def test_low_precision_is_upcast_and_float64_kept(small_chunks, device):
    x = make(device, [9, 4])
    rounded = x | {name: x[name].bfloat16() for name in ("logp", "ref_logp", "values")}
    wide = x | {name: rounded[name].float() for name in ("logp", "ref_logp", "values")}
    for impl in CATALOGUE["shaped_gae"].implementations(device):
        assert all(map(torch.equal, run_shaped(rounded, impl), run_shaped(wide, impl)))
        got = gae(rounded["values"], x["values"].half(), cu_seqlens=x["cu_seqlens"], impl=impl)
        assert all(
            map(
                torch.equal,
                got,
                gae(
                    wide["values"],
                    x["values"].half().float(),
                    cu_seqlens=x["cu_seqlens"],
                    impl=impl,
                ),
            )
        )
    assert (
        run_shaped(
            {k: t.double() if t.is_floating_point() else t for k, t in x.items()}, "torch"
        ).advantages.dtype
        == torch.float64
    )
    assert (
        gae(
            torch.zeros(1, 2, dtype=torch.float64, device=device),
            torch.zeros(1, 2, device=device),
            impl="torch",
        )[0].dtype
        == torch.float64
    )


@pytest.mark.each_impl("gae")
def test_no_gradient(impl, device):
    x = make(device, [5, 3])
    x |= {name: x[name].requires_grad_() for name in ("logp", "values", "scores")}
    assert not any(t.requires_grad for t in run_shaped(x, impl))


@pytest.mark.each_impl("gae", only=("cpp", "triton"))
def test_opcheck_and_compile(impl, small_chunks, device):
    x = make(device, [9, 0, 4])
    kw = {"mask": x["mask"], "cu_seqlens": x["cu_seqlens"], "impl": impl}
    op, shaped = (
        getattr(torch.ops.fusedrl, name if impl == "cpp" else f"{name}_triton").default
        for name in ("gae", "shaped_gae")
    )
    torch.library.opcheck(
        op, (x["rewards"], x["values"], x["mask"], x["cu_seqlens"], 1.0, 0.95, x["last_values"])
    )
    arguments = (
        x["logp"],
        x["ref_logp"],
        x["values"],
        x["scores"],
        x["mask"],
        x["cu_seqlens"],
        0.1,
        torch.tensor(0.1, device=device),
        0,
        1.0,
        0.95,
        None,
        5.0,
        True,
        False,
    )
    torch.library.opcheck(shaped, arguments)
    compiled = torch.compile(gae, fullgraph=True, backend="aot_eager")
    assert all(
        map(
            torch.equal,
            compiled(x["rewards"], x["values"], **kw),
            gae(x["rewards"], x["values"], **kw),
        )
    )
    compiled = torch.compile(
        lambda *tensors: shaped_gae(*tensors, kl_coef=0.1, **kw),
        fullgraph=True,
        backend="aot_eager",
    )
    tensors = (x["logp"], x["ref_logp"], x["values"], x["scores"])
    assert all(map(torch.equal, compiled(*tensors), shaped_gae(*tensors, kl_coef=0.1, **kw)))


@pytest.mark.each_impl("gae", only=("torch",))
def test_reference_compiles(impl, device):
    x = make(device, [6, 0, 4])
    kw = {"mask": x["mask"], "cu_seqlens": x["cu_seqlens"], "kl_coef": 0.1, "impl": impl}
    tensors = (x["logp"], x["ref_logp"], x["values"], x["scores"])
    compiled = torch.compile(lambda *t: shaped_gae(*t, **kw), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(tuple(compiled(*tensors)), tuple(shaped_gae(*tensors, **kw)))


def test_refuses_what_it_does_not_support(device):
    x = make(device, [5, 3])
    with pytest.raises(ValueError, match=r"values does not fit its pattern \[N\]"):
        gae(x["rewards"], x["values"][:-1], cu_seqlens=x["cu_seqlens"])
    with pytest.raises(
        ValueError, match=r"expected rewards \[B, T\], or \[N\] together with cu_seqlens"
    ):
        gae(x["rewards"], x["values"])
    with pytest.raises(ValueError, match=r"expected cu_seqlens \[B \+ 1\] for last_values \[B\]"):
        gae(
            x["rewards"],
            x["values"],
            cu_seqlens=x["cu_seqlens"],
            last_values=torch.zeros(3, device=device),
        )
    with pytest.raises(ValueError, match=r"expected lam within \[0, 1\], got 1.5"):
        gae(x["rewards"], x["values"], cu_seqlens=x["cu_seqlens"], lam=1.5)
    with pytest.raises(TypeError, match="expected cu_seqlens of dtype int32"):
        gae(x["rewards"], x["values"], cu_seqlens=x["cu_seqlens"].long())
    with pytest.raises(TypeError, match="expected mask of dtype bool"):
        gae(x["rewards"], x["values"], mask=x["mask"].float(), cu_seqlens=x["cu_seqlens"])
    with pytest.raises(RuntimeError, match="these can: torch"):
        gae(
            x["rewards"],
            x["values"],
            cu_seqlens=x["cu_seqlens"],
            impl="cuda" if device.type == "cpu" else "cpp",
        )
    with pytest.raises(ValueError, match="pass allow_biased_kl=True"):
        run_shaped(x, "torch", kl_estimator="k3")
    with pytest.raises(ValueError, match="expected score_clip >= 0"):
        run_shaped(x, "torch", score_clip=-1.0)
    with pytest.raises(ValueError, match=r"expected cu_seqlens \[B \+ 1\] for scores \[B\]"):
        run_shaped(x | {"scores": torch.zeros(3, device=device)}, "torch")
    if native.capability and device.type == "cpu":
        for wrong in ([0, 5, 9], [1, 5, 8], [0, 9, 8]):
            with pytest.raises(
                ValueError, match="expected cu_seqlens to ascend from 0 to the number of tokens, 8"
            ):
                gae(
                    x["rewards"],
                    x["values"],
                    cu_seqlens=torch.tensor(wrong, device=device).int(),
                    impl="cpp",
                )
        with pytest.raises(TypeError, match="expected rewards of dtype"):
            gae(x["rewards"].double(), x["values"], cu_seqlens=x["cu_seqlens"], impl="cpp")
