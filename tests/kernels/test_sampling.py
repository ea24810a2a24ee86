"""Draws from logits: their law, their keys, truncation, and rows that cannot be drawn from.

One file: the law of a row, which every kind of truncation is held against.
"""

import math

import pytest
import torch

from fusedrl.engine.tools.verify.grid import interpreted
from fusedrl.kernels.logprob import logprob
from fusedrl.kernels.runtime import native
from fusedrl.kernels.sampling import Sampled, _capacity, philox4x32, sample, uniform

INF = math.inf
SETTINGS = [
    {"temperature": 1.0},
    {"temperature": 0.0},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
]


def keys_for(device, B, seed=0):
    return torch.randint(
        -(2**63), 2**63 - 1, (B, 4), generator=torch.Generator().manual_seed(seed)
    ).to(device)


def counting_keys(device, n, seed=5):
    keys = torch.zeros(n, 4, dtype=torch.int64, device=device)
    keys[:, 0], keys[:, 3] = seed, torch.arange(n, device=device)
    return keys


def by_hand(z, u, temperature, top_k=0, top_p=1.0, min_p=0.0, suppress=()):
    """One row in Python floats: sort, truncate in order, walk. Returns token, logp, logp_processed,
    entropy, kept ids, and those that are listed."""
    z = [float(x) for x in z]
    greedy = temperature == 0
    T = 1.0 if greedy else temperature
    allowed = [v for v in range(len(z)) if v not in suppress and z[v] > -INF]
    log_all = math.log(sum(math.exp((x - max(z)) / T) for x in z)) + max(z) / T
    ranking = sorted(allowed, key=lambda v: (-z[v], v))
    top = z[ranking[0]]
    weight = {v: math.exp((z[v] - top) / T) for v in ranking if (z[v] - top) / T >= -87}
    kept = [v for v in ranking if v in weight]
    if not greedy:
        kept = kept[:top_k] if top_k else kept
        if top_p < 1:
            share, total, prefix = 0.0, math.fsum(weight[v] for v in kept), []
            for v in kept:
                if share >= top_p * total:
                    break
                prefix.append(v)
                share += weight[v]
            kept = prefix
        kept = [v for v in kept if weight[v] >= min_p]
    total = math.fsum(weight[v] for v in kept)
    token, running = ranking[0], 0.0
    if not greedy:
        for v in sorted(kept):
            token, running = v, running + weight[v]
            if running > u * total:
                break
    entropy = -sum(math.exp(x / T - log_all) * (x / T - log_all) for x in z if x > -INF)
    dropped = [v for v in range(len(z)) if (z[v] - max(z)) / T >= -87 and v not in kept]
    return (
        token,
        z[token] / T - log_all,
        (z[token] - top) / T - math.log(total),
        entropy,
        sorted(kept),
        sorted(kept) if dropped else [],
    )


def tensors(drawn: Sampled) -> list[torch.Tensor]:
    return [*drawn._replace(kept=drawn.token_ids), *(drawn.kept or ())]


def rows_of(kept):
    return [
        kept.token_ids[begin:end].tolist()
        for begin, end in zip(kept.offsets.tolist(), kept.offsets.tolist()[1:], strict=False)
    ]


def compare(device, drawn, logits, keys, suppress, settings):
    """Every row against `by_hand`, which truncates by sorting. settings: one a row."""
    B = len(logits)
    banned = [
        set() if suppress is None else set(suppress[b].nonzero().flatten().tolist())
        for b in range(B)
    ]
    want = [
        by_hand(logits[b], float(uniform(keys)[b]), suppress=banned[b], **settings[b])
        for b in range(B)
    ]
    tokens, logp, processed, entropy, kept, listed = (
        list(column) for column in zip(*want, strict=True)
    )
    assert drawn.token_ids.tolist() == tokens
    assert drawn.kept_count.tolist() == [len(ids) for ids in kept]
    assert rows_of(drawn.kept) == listed
    assert drawn.kept.token_ids.dtype == torch.int32
    assert len(drawn.kept.token_ids) == drawn.kept.offsets[-1]
    for got, expected, slack in (
        (drawn.logp, logp, 1e-6),
        (drawn.logp_processed, processed, 1e-6),
        (drawn.entropy, entropy, 1e-5),
    ):
        expected = torch.tensor(expected, dtype=torch.float64, device=device)
        assert got.dtype == torch.float32
        assert ((got.double() - expected).abs() <= slack * expected.abs().clamp(min=1)).all()


def tied_logits(device, B, V, generator):
    # quarters: many ties
    logits = (torch.randn(B, V, generator=generator).to(device) * 3 * 4).round() / 4
    logits[::2] += torch.randn(logits[::2].shape, generator=generator).to(device) / 50
    suppress = torch.rand(B, V, generator=generator).to(device) < 0.3
    suppress[:, V // 2] = False
    logits[:, : V // 3][torch.rand(B, V // 3, generator=generator).to(device) < 0.2] = -INF
    return logits, suppress


# ---- random numbers ------------------------------------------------------------------------------
# kat_vectors of Random123: philox4x32, 10 rounds
def test_philox_gives_the_published_words(device):
    known = [
        (
            "00000000 00000000 00000000 00000000",
            "00000000 00000000",
            "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
        ),
        (
            "ffffffff ffffffff ffffffff ffffffff",
            "ffffffff ffffffff",
            "408f276d 41c83b0e a20bc7c6 6d5451fd",
        ),
        (
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ]
    counter, key, words = (
        torch.tensor([[int(word, 16) for word in row[i].split()] for row in known], device=device)
        for i in range(3)
    )
    assert torch.equal(philox4x32(counter, key), words)


def test_uniform_is_uniform_and_every_part_of_the_key_counts(device):
    u = uniform(counting_keys(device, 200_000))
    assert 0 <= u.min() < 1e-4
    assert 1 - 1e-4 < u.max() < 1
    counts = torch.histc(u.float(), bins=100, min=0, max=1)
    assert ((counts - 2000) ** 2 / 2000).sum() < 99 + 4 * math.sqrt(2 * 99)
    assert abs(torch.corrcoef(torch.stack([u[:-1], u[1:]]))[0, 1]) < 0.01
    keys = [
        [0, 0, 0, 0],
        [1, 0, 0, 0],
        [2**32, 0, 0, 0],
        [-1, 0, 0, 0],
        [0, 1, 0, 0],
        [0, 2**32, 0, 0],
        [0, 0, 1, 0],
        [0, 0, 0, 1],
    ]
    assert uniform(torch.tensor(keys, device=device)).unique().numel() == len(keys)


@pytest.mark.each_impl("sample", but=("torch",))
def test_draws_from_the_same_numbers(impl, device):
    # equal logits over 2^20 tokens and some: the token is floor(u V), so it shows the leading 20
    # bits of u; Triton's groups are of two tiles
    keys, V = keys_for(device, 8 if impl == "cpp" else 2), 2**20 + 5000
    tokens = sample(
        torch.zeros(1, V, device=device).expand(len(keys), -1),
        temperature=1.0,
        keys=keys,
        impl=impl,
    ).token_ids
    assert torch.equal(tokens, (uniform(keys) * V).long())


@pytest.mark.each_impl("sample")
def test_tiny_temperatures(impl, device):
    n = 100 if not interpreted(impl, device) else 12
    drawn = sample(
        torch.tensor([[1.0, 3.0, 2.0, 3.0]], device=device).expand(n, 4),
        temperature=1e-40,
        keys=counting_keys(device, n),
        impl=impl,
    )
    assert set(drawn.token_ids.tolist()) == {1, 3}
    assert torch.allclose(drawn.logp, torch.tensor(0.5, device=device).log())


# ---- the draw ------------------------------------------------------------------------------------
# V: one, around a vector, around a block of the draw; ties everywhere, -inf, suppressed tokens;
# kept sets that end inside a tie.
@pytest.mark.each_impl("sample", interpreted=False)
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("V", [1, 2, 15, 16, 33, 127, 129, 300])
@pytest.mark.parametrize("suppressed", [False, True])
def test_matches_the_definition(impl, setting, V, suppressed, device):
    B = 24
    logits, suppress = tied_logits(device, B, V, torch.Generator().manual_seed(V))
    drawn = sample(
        logits,
        keys=keys_for(device, B),
        suppress=suppress if suppressed else None,
        return_kept=True,
        impl=impl,
        **setting,
    )
    compare(
        device, drawn, logits, keys_for(device, B), suppress if suppressed else None, [setting] * B
    )
    if suppressed:
        assert not suppress.gather(1, drawn.token_ids[:, None]).any()


# A tile is 4096 tokens, that of the search 2048.
@pytest.mark.each_impl("sample", only=("triton",))
@pytest.mark.parametrize(
    "dtype, V, suppressed",
    [
        (torch.float32, 1, False),
        (torch.float32, 4097, False),
        (torch.float16, 2047, True),
        (torch.bfloat16, 33, True),
    ],
    ids=str,
)
def test_triton_matches_the_definition(impl, dtype, V, suppressed, device):
    settings = [*SETTINGS, {"temperature": 0.04}, {"temperature": 1.0}]
    B = len(settings)
    logits, suppress = tied_logits(device, B, V, torch.Generator().manual_seed(V))
    # the sums of the one read serve
    logits[-1], suppress = logits[-1].clamp(min=-20), suppress if suppressed else None
    logits, default = logits.to(dtype), {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
    parameters = {
        name: torch.tensor([(default | setting)[name] for setting in settings], device=device)
        for name in ("temperature", *default)
    }
    drawn = sample(
        logits,
        keys=keys_for(device, B),
        suppress=suppress,
        return_kept=True,
        impl=impl,
        **parameters,
    )
    compare(device, drawn, logits, keys_for(device, B), suppress, settings)


@pytest.mark.each_impl("sample")
@pytest.mark.parametrize("setting", [{}, {"top_p": 0.9}, {"top_k": 50}], ids=str)
@pytest.mark.parametrize("scale", [0.0, 2.0])
def test_draws_the_token_of_float64(impl, setting, scale, device):
    """Another token than in float64 only where u falls within rounding of the boundary between the
    two."""
    B, V = (2 if setting else 20, 4500) if interpreted(impl, device) else (500, 3000)
    logits, keys = (
        torch.randn(B, V, generator=torch.Generator().manual_seed(11)).to(device) * scale,
        keys_for(device, B, 3),
    )
    ours = sample(logits, temperature=0.9, keys=keys, impl=impl, **setting)
    exact = sample(
        logits.double(), temperature=0.9, keys=keys, impl="torch", return_kept=True, **setting
    )
    assert (ours.kept_count - exact.kept_count).abs().sum() <= 1
    other = (ours.token_ids != exact.token_ids).nonzero().flatten().tolist()
    assert len(other) <= 2
    for b in other:
        w, ids = (
            ((logits[b] - logits[b].max()).double() / 0.9).exp(),
            exact.kept.token_ids[exact.kept.offsets[b] : exact.kept.offsets[b + 1]].long(),
        )
        w = w if len(ids) == 0 else torch.zeros_like(w).index_put((ids,), w[ids])
        boundary = w.cumsum(0)[min(int(ours.token_ids[b]), int(exact.token_ids[b]))]
        assert abs(boundary / w.sum() - uniform(keys[b : b + 1])[0]) < 1e-6


@pytest.mark.cpu_only("the C++ kernels")
@pytest.mark.skipif(not native.capability, reason=native.reason)
@pytest.mark.parametrize("V", [1025, 50257])
@pytest.mark.parametrize("scale", [0.0, 1.0, 10.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cpp_and_torch_draw_the_same(V, scale, dtype, device):
    logits = (torch.randn(6, V, generator=torch.Generator().manual_seed(V)).to(device) * scale).to(
        dtype
    )
    for setting in SETTINGS:
        ours, torchs = (
            sample(logits, keys=keys_for(device, 6), return_kept=True, impl=impl, **setting)
            for impl in ("cpp", "torch")
        )
        exact = sample(logits.double(), keys=keys_for(device, 6), impl="torch", **setting)
        assert torch.equal(ours.token_ids, torchs.token_ids)
        assert all(
            torch.equal(a, b)
            for a, b in zip(
                (ours.kept_count, *ours.kept), (torchs.kept_count, *torchs.kept), strict=True
            )
        )
        # (float32 x may put a token on the other side of a boundary)
        if torch.equal(ours.token_ids, exact.token_ids):
            eps = torch.finfo(torch.float32).eps
            assert ((ours.logp - exact.logp).abs() <= 8 * eps * exact.logp.abs().clamp(min=1)).all()
        assert ((ours.entropy - exact.entropy).abs() <= 1e-5 * math.log(V)).all()


@pytest.mark.each_impl("sample", interpreted=False)
@pytest.mark.parametrize("setting", [SETTINGS[0], SETTINGS[2], SETTINGS[3], SETTINGS[4]], ids=str)
def test_draws_have_the_distribution(impl, setting, device):
    n, V = 40_000, 12
    row = torch.randn(V, generator=torch.Generator().manual_seed(1)).to(device) * 1.5
    drawn = sample(row.expand(n, V), keys=counting_keys(device, n), impl=impl, **setting)
    expected = torch.zeros(V, dtype=torch.float64, device=device)
    # what it says of each token is how often it came
    expected[drawn.token_ids] = drawn.logp_processed.double().exp() * n
    assert abs(expected.sum() / n - 1) < 1e-5
    counts, seen = torch.bincount(drawn.token_ids, minlength=V).double(), expected > 0
    freedom = int(seen.sum()) - 1
    assert freedom >= 2
    assert ((counts - expected)[seen] ** 2 / expected[seen]).sum() < freedom + 4 * math.sqrt(
        2 * freedom
    )


@pytest.mark.each_impl("sample")
def test_a_row_depends_on_nothing_but_itself(impl, device):
    logits, keys = (
        torch.randn(9, 200, generator=torch.Generator().manual_seed(2)).to(device) * 2,
        keys_for(device, 9),
    )
    parameters = {
        "temperature": torch.tensor([1.0, 0.0, 0.5] * 3, device=device),
        "top_k": torch.tensor([0, 7, 300, 3, 0, 0, 1, 2, 0], device=device),
        "top_p": torch.tensor([1.0, 0.5, 0.9] * 3, device=device),
        "min_p": torch.tensor([0.0, 0.0, 0.05] * 3, device=device).double(),
    }
    suppress = torch.rand(9, 200, generator=torch.Generator().manual_seed(4)).to(device) < 0.5
    whole = sample(logits, keys=keys, suppress=suppress, return_kept=True, impl=impl, **parameters)
    # rows of a wider tensor, between columns of NaN
    wide = torch.full((9, 400), math.nan, device=device)
    wide[:, 100:300] = logits
    strided = sample(
        wide[:, 100:300], keys=keys, suppress=suppress, return_kept=True, impl=impl, **parameters
    )
    assert all(torch.equal(a, b) for a, b in zip(tensors(whole), tensors(strided), strict=True))
    transposed = sample(
        logits.T.contiguous().T,
        keys=keys,
        suppress=suppress,
        return_kept=True,
        impl=impl,
        **parameters,
    )
    assert all(torch.equal(a, b) for a, b in zip(tensors(whole), tensors(transposed), strict=True))
    for b in range(9) if not interpreted(impl, device) else (2, 3):
        numbers = {name: value[b].item() for name, value in parameters.items()}
        alone = sample(
            logits[b : b + 1],
            keys=keys[b : b + 1],
            suppress=suppress[b : b + 1],
            return_kept=True,
            impl=impl,
            **numbers,
        )
        assert all(
            torch.equal(x[b : b + 1], y)
            for x, y in zip(tensors(whole)[:6], tensors(alone)[:6], strict=True)
        )
        assert rows_of(alone.kept) == [rows_of(whole.kept)[b]]


@pytest.mark.each_impl("sample")
def test_ties_keep_the_lower_ids(impl, device):
    n = 300 if not interpreted(impl, device) else 1
    equal = torch.zeros(n, 8, device=device)
    for setting, ids in (
        ({"top_k": 3}, [0, 1, 2]),
        ({"top_p": 0.5}, [0, 1, 2, 3]),
        ({"top_k": 7, "top_p": 3 / 7}, [0, 1, 2]),
    ):  # exactly half; three sevenths
        drawn = sample(
            equal,
            temperature=1.0,
            keys=counting_keys(device, n),
            return_kept=True,
            impl=impl,
            **setting,
        )
        assert set(drawn.token_ids.tolist()) <= set(ids)
        assert rows_of(drawn.kept) == [ids] * n
        assert n < 300 or set(drawn.token_ids.tolist()) == set(ids)
    signed = torch.tensor([[-1.0, 0.0, -0.0, 0.0]], device=device)  # 0 and -0 are one value
    assert rows_of(
        sample(
            signed,
            temperature=1.0,
            top_k=2,
            keys=counting_keys(device, 1),
            return_kept=True,
            impl=impl,
        ).kept
    ) == [[1, 2]]
    assert sample(signed, temperature=0.0, keys=counting_keys(device, 1), impl=impl).token_ids == 1


# Tokens of no probability at both ends and around, so that a walk that runs on, or starts at weight
# 0, would find them.
@pytest.mark.each_impl("sample")
@pytest.mark.parametrize("low", [-INF, -1e9, -200.0])
def test_never_draws_what_has_no_probability(impl, low, device):
    n = 5000 if not interpreted(impl, device) else 5
    logits = torch.full((n, 400), low, device=device)
    logits[:, 130], logits[:, 131] = 0.0, -16.0
    drawn = sample(logits, temperature=1.0, keys=counting_keys(device, n), impl=impl)
    assert set(drawn.token_ids.tolist()) == {130}
    assert (drawn.kept_count == 2).all()
    assert torch.allclose(drawn.logp, torch.tensor(-math.log1p(math.exp(-16.0)), device=device))


@pytest.mark.each_impl("sample")
def test_greedy_ignores_the_rest(impl, device):
    n = 20 if not interpreted(impl, device) else 3
    logits = torch.randn(n, 50, generator=torch.Generator().manual_seed(8)).to(device)
    plain = sample(logits, temperature=1.0, keys=keys_for(device, n), impl=impl)
    greedy = sample(
        logits,
        temperature=0.0,
        top_k=1,
        top_p=0.1,
        min_p=0.9,
        keys=keys_for(device, n),
        return_kept=True,
        impl=impl,
    )
    assert torch.equal(greedy.token_ids, logits.argmax(-1))
    torch.testing.assert_close(
        greedy.logp, torch.log_softmax(logits, -1).amax(-1), rtol=0, atol=1e-6
    )
    assert torch.equal(greedy.logp, greedy.logp_processed)
    assert torch.equal(greedy.entropy, plain.entropy)
    assert (greedy.kept_count == 50).all()
    assert (greedy.kept.offsets == 0).all()
    suppress = torch.zeros(n, 50, dtype=torch.bool, device=device).scatter(
        1, logits.argmax(-1, keepdim=True), True
    )
    second = sample(
        logits,
        temperature=0.0,
        keys=keys_for(device, n),
        suppress=suppress,
        return_kept=True,
        impl=impl,
    )
    assert torch.equal(second.token_ids, logits.topk(2).indices[:, 1])
    torch.testing.assert_close(
        second.logp, torch.log_softmax(logits, -1).topk(2).values[:, 1], rtol=0, atol=1e-6
    )
    assert rows_of(second.kept) == [
        [v for v in range(50) if v != best] for best in logits.argmax(-1).tolist()
    ]


@pytest.mark.cpu_only("the C++ kernels")
@pytest.mark.skipif(not native.capability, reason=native.reason)
def test_cpp_bits_do_not_depend_on_threads(device):
    logits, before = (
        torch.randn(40, 5000, generator=torch.Generator().manual_seed(9)).to(device),
        torch.get_num_threads(),
    )
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(
                sample(
                    logits,
                    temperature=0.8,
                    top_p=0.9,
                    keys=keys_for(device, 40),
                    return_kept=True,
                    impl="cpp",
                )
            )
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*map(tensors, results), strict=True))


# ---- bad input -----------------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore:All-NaN:RuntimeWarning")  # numpy's, within the interpreter
@pytest.mark.each_impl("sample")
def test_rows_that_cannot_be_drawn_from_are_named(impl, device):
    for value, where in ((math.nan, 7), (INF, 7), (-INF, slice(None)), (math.nan, slice(None))):
        for V in (3, 40, 500) if not interpreted(impl, device) else (3,):
            logits = torch.zeros(5, V, device=device)
            logits[3, where if isinstance(where, slice) else V - 1] = value
            with pytest.raises(ValueError, match="row 3 of 5"):
                sample(logits, temperature=1.0, keys=keys_for(device, 5), impl=impl)
            with pytest.raises(ValueError, match="row 3 of 5"):
                sample(logits, temperature=0.0, keys=keys_for(device, 5), impl=impl)
    with pytest.raises(ValueError, match="row 0 of 5"):
        sample(
            torch.zeros(5, 4, device=device),
            temperature=1.0,
            keys=keys_for(device, 5),
            suppress=torch.ones(5, 4, dtype=torch.bool, device=device),
            impl=impl,
        )
    poisoned = torch.zeros(5, 40, device=device)
    poisoned[2, 1] = math.nan  # a suppressed NaN is still in the full distribution
    with pytest.raises(ValueError, match="row 2 of 5"):
        sample(
            poisoned,
            temperature=1.0,
            keys=keys_for(device, 5),
            suppress=poisoned.isnan(),
            impl=impl,
        )


@pytest.mark.each_impl("sample")
def test_refuses_bad_parameters(impl, device):
    logits, keys = torch.zeros(2, 4, device=device), keys_for(device, 2)
    for bad in (
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 2.0},
        {"top_k": -1},
    ):
        ((name, value),) = bad.items()
        for given in (value, torch.tensor([1, value], device=device)):
            with pytest.raises(ValueError, match=f"expected {name}"):
                sample(logits, **{"temperature": 1.0, name: given}, keys=keys, impl=impl)
    with pytest.raises(ValueError, match="temperature as a number or"):
        sample(logits, temperature=torch.ones(3, device=device), keys=keys, impl=impl)
    with pytest.raises(ValueError, match="keys does not fit"):
        sample(logits, temperature=1.0, keys=keys[:, :3], impl=impl)
    with pytest.raises(ValueError, match="at least one token"):
        sample(logits[:, :0], temperature=1.0, keys=keys, impl=impl)
    with pytest.raises(TypeError, match="suppress of dtype bool"):
        sample(
            logits, temperature=1.0, keys=keys, suppress=torch.zeros(2, 4, device=device), impl=impl
        )
    with pytest.raises(ValueError, match="kept_capacity of 0 or more"):
        sample(
            logits,
            temperature=1.0,
            top_k=1,
            keys=keys,
            return_kept=True,
            kept_capacity=-1,
            impl=impl,
        )
    drawn = sample(logits[:0], temperature=1.0, top_k=2, keys=keys[:0], return_kept=True, impl=impl)
    assert [column.shape for column in tensors(drawn)] == [(0,)] * 7 + [(1,)]
    assert drawn.kept.offsets == 0


@pytest.mark.each_impl("sample", only=("cpp", "triton"))
def test_opcheck_and_compile(impl, device):
    logits, keys, one = (
        torch.randn(3, 9, device=device),
        keys_for(device, 3),
        torch.ones(1, dtype=torch.float64, device=device),
    )
    op = {"cpp": torch.ops.fusedrl.sample, "triton": torch.ops.fusedrl.sample_triton}[impl].default
    torch.library.opcheck(
        op,
        (
            logits,
            one,
            4 * one,
            0.5 * torch.ones(3, dtype=torch.float64, device=device),
            None,
            keys,
            logits > 5,
            None,
        ),
    )
    # (a buffer with room to spare has garbage in it)
    torch.library.opcheck(op, (logits, one, 4 * one, None, None, keys, None, 12))
    for name in (impl, "torch"):

        def call(logits, keys, name=name):
            return sample(logits, temperature=0.7, top_k=3, keys=keys, return_kept=True, impl=name)

        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        assert all(
            torch.equal(a, b)
            for a, b in zip(
                tensors(compiled(logits, keys)), tensors(call(logits, keys)), strict=True
            )
        )


# ---- the kept set --------------------------------------------------------------------------------
@pytest.mark.each_impl("sample")
def test_the_kept_set_is_the_distribution(impl, device):
    """The trainer's log-probability over the kept ids is the sampler's; without them, top-p 0.8
    biases the ratio of an unchanged policy."""
    B, V = 6 if interpreted(impl, device) else 200, 50
    logits, keys = (
        torch.randn(B, V, generator=torch.Generator().manual_seed(12)).to(device) * 2,
        keys_for(device, B),
    )
    drawn = sample(logits, temperature=0.8, top_p=0.8, keys=keys, return_kept=True, impl=impl)
    full, means, means_kept = torch.log_softmax(logits.double() / 0.8, -1), [], []
    for b, ids in enumerate(rows_of(drawn.kept)):
        # the distribution that was sampled, token by token
        of_kept = torch.log_softmax(logits[b, ids].double() / 0.8, -1)
        scored = of_kept[ids.index(int(drawn.token_ids[b]))]
        assert abs(scored - drawn.logp_processed[b]) < 1e-6
        mass = full[b, ids].exp().sum()
        assert abs((drawn.logp - drawn.logp_processed)[b].double() - mass.log()) < 1e-6
        assert full[b, ids].exp().sum() >= 0.8
        assert full[b, ids].exp().sum() - full[b, ids].exp().min() < 0.8
        # E[ratio] over every token that can be drawn, of a policy that has not changed
        means.append(float((of_kept.exp() * (full[b, ids] - of_kept).exp()).sum()))
        means_kept.append(
            float((of_kept.exp() * (drawn.logp_processed[b].double() - scored).exp()).sum())
        )
    assert 0.8 < sum(means) / B < 0.95
    assert abs(sum(means_kept) / B - 1) < 1e-6


@pytest.mark.each_impl("sample")
def test_kept_capacity(impl, device):
    logits, keys = torch.arange(10.0, device=device).expand(3, 10), keys_for(device, 3)
    arguments = dict(
        temperature=1.0,
        top_k=torch.tensor([3, 0, 4], device=device),
        keys=keys,
        return_kept=True,
        impl=impl,
    )
    assert rows_of(sample(logits, kept_capacity=7, **arguments).kept) == [
        [7, 8, 9],
        [],
        [6, 7, 8, 9],
    ]
    with pytest.raises(ValueError, match="to fit into kept_capacity 6"):
        sample(logits, kept_capacity=6, **arguments)
    assert sample(logits, **(arguments | {"return_kept": False})).kept is None


@pytest.mark.each_impl("sample", only=("triton",))
def test_triton_marks_rows_beyond_the_capacity(impl, device):
    """What a GPU answers, where nothing may raise: as tests/kernels/test_cuda_sampling.py has
    it."""
    logits, keys = torch.arange(10.0, device=device).expand(4, 10), keys_for(device, 4)
    one, k = (
        torch.ones(1, dtype=torch.float64, device=device),
        torch.tensor([3.0, 0.0, 4.0, 2.0], dtype=torch.float64, device=device),
    )
    for capacity, ends, lost in (
        (9, [3, 3, 7, 9], []),
        (8, [3, 3, 7, 7], [3]),
        (6, [3, 3, 3, 3], [2, 3]),
        (0, [0] * 4, [0, 2, 3]),
    ):
        *drawn, kept, offsets = torch.ops.fusedrl.sample_triton(
            logits, one, k, None, None, keys, None, capacity
        )
        assert offsets.tolist() == [0, *ends]
        assert (drawn[0] < 0).nonzero().flatten().tolist() == lost
        assert kept[: ends[-1]].tolist() == ([7, 8, 9] + [6, 7, 8, 9] + [8, 9])[: ends[-1]]


def test_room_for_the_kept_set(device):
    mixed, suppress = (
        torch.tensor([0.0, 1.0, 1.0], device=device),
        torch.zeros(3, 10, dtype=torch.bool, device=device),
    )
    cases = [
        (1.0, 0, False, None, 0),
        (1.0, 4, True, None, 12),
        (1.0, 40, True, None, 30),
        (1.0, 0, True, None, 30),
        (1.0, torch.ones(3, device=device), True, None, 30),
        (mixed, 4, True, None, 12),
        (1.0, 4, True, suppress, 12),
        (0.0, 4, True, suppress, 30),
        (mixed, 4, True, suppress, 30),
        (1.0, 0, False, suppress, 30),
    ]
    for temperature, top_k, truncates, hidden, expected in cases:
        assert _capacity(3, 10, temperature, top_k, truncates, hidden) == expected
    logits, arguments = (
        torch.zeros(3, 10, device=device),
        dict(temperature=1.0, keys=keys_for(device, 3), return_kept=True, impl="torch"),
    )
    for setting, expected in (({"top_k": 4}, 12), ({"top_p": 0.5, "kept_capacity": 17}, 17)):
        compiled = torch.compile(
            lambda z, setting=setting: sample(z, **arguments, **setting).kept.token_ids,
            fullgraph=True,
            backend="aot_eager",
        )
        assert len(compiled(logits)) == expected  # compiled code is not asked how many there are


@pytest.mark.parametrize("scorer", ["torch", "cpp"])
def test_the_scorer_gives_what_was_sampled(scorer, device):
    """From the sampler's kept set the trainer scores the very distribution that the token was drawn
    from."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(40, 300, generator=generator).to(device)
    keys = torch.stack([torch.arange(40, device=device)] * 4, dim=1)
    drawn = sample(
        logits, temperature=0.8, top_k=50, top_p=0.7, min_p=0.01, keys=keys, return_kept=True
    )
    assert drawn.kept is not None
    scored = logprob(logits, drawn.token_ids, temperature=0.8, kept=drawn.kept, impl=scorer)
    torch.testing.assert_close(scored, drawn.logp_processed, atol=1e-6, rtol=1e-6)
    assert (logprob(logits, drawn.token_ids, temperature=0.8, impl=scorer) < scored - 0.01).all(), (
        "which the full distribution is not"
    )
