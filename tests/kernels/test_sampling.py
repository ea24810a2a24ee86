import math

import pytest
import torch

from fusedrl.kernels import native
from fusedrl.kernels.sampling import philox4x32, sample, uniform

CPP = pytest.param("cpp", marks=pytest.mark.skipif(not native.capability, reason=native.reason))
IMPLS = ["torch", CPP]
INF = math.inf
SETTINGS = [{"temperature": 1.0}, {"temperature": 0.0}, {"temperature": 0.7, "top_k": 5}, {"temperature": 1.3, "top_p": 0.8},
            {"temperature": 1.0, "min_p": 0.1},
            {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "min_p": 0.02}]


def keys_for(B, seed=0):
    return torch.randint(-(2**63), 2**63 - 1, (B, 4), generator=torch.Generator().manual_seed(seed))


def counting_keys(n, seed=5):
    keys = torch.zeros(n, 4, dtype=torch.int64)
    keys[:, 0], keys[:, 3] = seed, torch.arange(n)
    return keys


def by_hand(z, u, temperature, top_k=0, top_p=1.0, min_p=0.0, suppress=()):
    """One row in Python floats: sort, truncate in order, walk. Returns token, logp, logp_processed, entropy, kept."""
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
    return token, z[token] / T - log_all, (z[token] - top) / T - math.log(total), entropy, len(kept)


# ---- random numbers ------------------------------------------------------------------------------------------------------
def test_philox_gives_the_published_words():  # kat_vectors of Random123: philox4x32, 10 rounds
    known = [("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
             ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
             ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1")]
    counter, key, words = (torch.tensor([[int(word, 16) for word in row[i].split()] for row in known]) for i in range(3))
    assert torch.equal(philox4x32(counter, key), words)


def test_uniform_is_uniform_and_every_part_of_the_key_counts():
    u = uniform(counting_keys(200_000))
    assert 0 <= u.min() < 1e-4
    assert 1 - 1e-4 < u.max() < 1
    counts = torch.histc(u.float(), bins=100, min=0, max=1)
    assert ((counts - 2000) ** 2 / 2000).sum() < 99 + 4 * math.sqrt(2 * 99)
    assert abs(torch.corrcoef(torch.stack([u[:-1], u[1:]]))[0, 1]) < 0.01
    keys = [[0, 0, 0, 0], [1, 0, 0, 0], [2**32, 0, 0, 0], [-1, 0, 0, 0], [0, 1, 0, 0], [0, 2**32, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    assert uniform(torch.tensor(keys)).unique().numel() == len(keys)


@pytest.mark.skipif(not native.capability, reason=native.reason)
def test_cpp_draws_from_the_same_numbers():
    # equal logits over 2^20 tokens: the token is floor(u 2^20), so it shows the leading 20 bits of u
    keys = keys_for(8)
    tokens = sample(torch.zeros(1, 1 << 20).expand(8, -1), temperature=1.0, keys=keys, impl="cpp").token_ids
    assert torch.equal(tokens, (uniform(keys) * 2**20).long())


# ---- the draw ------------------------------------------------------------------------------------------------------------
# V: one, around a vector, around a block of the draw; ties everywhere, -inf, suppressed tokens; kept sets that end inside a tie.
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("V", [1, 2, 15, 16, 33, 127, 129, 300])
@pytest.mark.parametrize("suppressed", [False, True])
def test_matches_the_definition(impl, setting, V, suppressed):
    generator, B = torch.Generator().manual_seed(V), 24
    logits = (torch.randn(B, V, generator=generator) * 3 * 4).round() / 4  # quarters: many ties
    logits[::2] += torch.randn(B // 2, V, generator=generator) / 50
    suppress = (torch.rand(B, V, generator=generator) < 0.3) if suppressed else torch.zeros(B, V, dtype=torch.bool)
    suppress[:, V // 2] = False
    logits[:, : V // 3][torch.rand(B, V // 3, generator=generator) < 0.2] = -INF
    keys = keys_for(B)
    drawn = sample(logits, keys=keys, suppress=suppress if suppressed else None, impl=impl, **setting)
    want = [by_hand(logits[b], float(uniform(keys)[b]), suppress=set(suppress[b].nonzero().flatten().tolist()), **setting) for b in range(B)]
    tokens, logp, processed, entropy, kept = (list(column) for column in zip(*want, strict=True))
    assert drawn.token_ids.tolist() == tokens
    assert drawn.kept_count.tolist() == kept
    for got, expected, slack in ((drawn.logp, logp, 1e-6), (drawn.logp_processed, processed, 1e-6), (drawn.entropy, entropy, 1e-5)):
        expected = torch.tensor(expected, dtype=torch.float64)
        assert got.dtype == torch.float32
        assert ((got.double() - expected).abs() <= slack * expected.abs().clamp(min=1)).all()
    assert not suppress.gather(1, drawn.token_ids[:, None]).any()


@pytest.mark.skipif(not native.capability, reason=native.reason)
@pytest.mark.parametrize("V", [1025, 50257])
@pytest.mark.parametrize("scale", [0.0, 1.0, 10.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cpp_and_torch_draw_the_same(V, scale, dtype):
    logits = (torch.randn(6, V, generator=torch.Generator().manual_seed(V)) * scale).to(dtype)
    for setting in SETTINGS:
        ours, torchs = (sample(logits, keys=keys_for(6), impl=impl, **setting) for impl in ("cpp", "torch"))
        exact = sample(logits.double(), keys=keys_for(6), impl="torch", **setting)
        assert torch.equal(ours.token_ids, torchs.token_ids)
        assert torch.equal(ours.kept_count, torchs.kept_count)
        if torch.equal(ours.token_ids, exact.token_ids):  # (float32 x may put a token on the other side of a boundary)
            eps = torch.finfo(torch.float32).eps
            assert ((ours.logp - exact.logp).abs() <= 8 * eps * exact.logp.abs().clamp(min=1)).all()
        assert ((ours.entropy - exact.entropy).abs() <= 1e-5 * math.log(V)).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("setting", [SETTINGS[0], SETTINGS[2], SETTINGS[3], SETTINGS[4]], ids=str)
def test_draws_have_the_distribution(impl, setting):
    n, V = 40_000, 12
    row = torch.randn(V, generator=torch.Generator().manual_seed(1)) * 1.5
    drawn = sample(row.expand(n, V), keys=counting_keys(n), impl=impl, **setting)
    expected = torch.zeros(V, dtype=torch.float64)
    expected[drawn.token_ids] = drawn.logp_processed.double().exp() * n  # what it says of each token is how often it came
    assert abs(expected.sum() / n - 1) < 1e-5
    counts, seen = torch.bincount(drawn.token_ids, minlength=V).double(), expected > 0
    freedom = int(seen.sum()) - 1
    assert freedom >= 2
    assert ((counts - expected)[seen] ** 2 / expected[seen]).sum() < freedom + 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_row_depends_on_nothing_but_itself(impl):
    logits, keys = torch.randn(9, 200, generator=torch.Generator().manual_seed(2)) * 2, keys_for(9)
    parameters = {"temperature": torch.tensor([1.0, 0.0, 0.5] * 3), "top_k": torch.tensor([0, 7, 300, 3, 0, 0, 1, 2, 0]),
                  "top_p": torch.tensor([1.0, 0.5, 0.9] * 3),
                      "min_p": torch.tensor([0.0, 0.0, 0.05] * 3).double()}
    suppress = torch.rand(9, 200, generator=torch.Generator().manual_seed(4)) < 0.5
    whole = sample(logits, keys=keys, suppress=suppress, impl=impl, **parameters)
    wide = torch.full((9, 400), math.nan)  # rows of a wider tensor, between columns of NaN
    wide[:, 100:300] = logits
    strided = sample(wide[:, 100:300], keys=keys, suppress=suppress, impl=impl, **parameters)
    assert all(torch.equal(a, b) for a, b in zip(whole, strided, strict=True))
    transposed = sample(logits.T.contiguous().T, keys=keys, suppress=suppress, impl=impl, **parameters)
    assert all(torch.equal(a, b) for a, b in zip(whole, transposed, strict=True))
    for b in range(9):
        numbers = {name: value[b].item() for name, value in parameters.items()}
        alone = sample(logits[b : b + 1], keys=keys[b : b + 1], suppress=suppress[b : b + 1], impl=impl, **numbers)
        assert all(torch.equal(x[b : b + 1], y) for x, y in zip(whole, alone, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_ties_keep_the_lower_ids(impl):
    equal = torch.zeros(300, 8)
    drawn = sample(equal, temperature=1.0, top_k=3, keys=counting_keys(300), impl=impl)
    assert set(drawn.token_ids.tolist()) == {0, 1, 2}
    drawn = sample(equal, temperature=1.0, top_p=0.5, keys=counting_keys(300), impl=impl)  # exactly half: four of eight
    assert set(drawn.token_ids.tolist()) == {0, 1, 2, 3}
    signed = torch.tensor([[-1.0, 0.0, -0.0, 0.0]])  # 0 and -0 are one value
    assert sample(signed, temperature=1.0, top_k=2, keys=counting_keys(1), impl=impl).kept_count == 2
    assert set(sample(signed.expand(200, 4), temperature=1.0, top_k=2, keys=counting_keys(200), impl=impl).token_ids.tolist()) == {1, 2}
    assert sample(signed, temperature=0.0, keys=counting_keys(1), impl=impl).token_ids == 1


# Tokens of no probability at both ends and around, so that a walk that runs on, or starts at weight 0, would find them.
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("low", [-INF, -1e9, -200.0])
def test_never_draws_what_has_no_probability(impl, low):
    logits = torch.full((5000, 400), low)
    logits[:, 130], logits[:, 131] = 0.0, -16.0
    drawn = sample(logits, temperature=1.0, keys=counting_keys(5000), impl=impl)
    assert set(drawn.token_ids.tolist()) == {130}
    assert (drawn.kept_count == 2).all()
    assert torch.allclose(drawn.logp, torch.tensor(-math.log1p(math.exp(-16.0))))


@pytest.mark.parametrize("impl", IMPLS)
def test_greedy_ignores_the_rest(impl):
    logits = torch.randn(20, 50, generator=torch.Generator().manual_seed(8))
    plain = sample(logits, temperature=1.0, keys=keys_for(20), impl=impl)
    greedy = sample(logits, temperature=0.0, top_k=1, top_p=0.1, min_p=0.9, keys=keys_for(20), impl=impl)
    assert torch.equal(greedy.token_ids, logits.argmax(-1))
    torch.testing.assert_close(greedy.logp, torch.log_softmax(logits, -1).amax(-1), rtol=0, atol=1e-6)
    assert torch.equal(greedy.logp, greedy.logp_processed)
    assert torch.equal(greedy.entropy, plain.entropy)
    assert (greedy.kept_count == 50).all()
    suppress = torch.zeros(20, 50, dtype=torch.bool).scatter(1, logits.argmax(-1, keepdim=True), True)
    second = sample(logits, temperature=0.0, keys=keys_for(20), suppress=suppress, impl=impl)
    assert torch.equal(second.token_ids, logits.topk(2).indices[:, 1])
    torch.testing.assert_close(second.logp, torch.log_softmax(logits, -1).topk(2).values[:, 1], rtol=0, atol=1e-6)


@pytest.mark.skipif(not native.capability, reason=native.reason)
def test_cpp_bits_do_not_depend_on_threads():
    logits, before = torch.randn(40, 5000, generator=torch.Generator().manual_seed(9)), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(sample(logits, temperature=0.8, top_p=0.9, keys=keys_for(40), impl="cpp"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ---- bad input -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("impl", IMPLS)
def test_rows_that_cannot_be_drawn_from_are_named(impl):
    for value, where in ((math.nan, 7), (INF, 7), (-INF, slice(None)), (math.nan, slice(None))):
        for V in (3, 40, 500):
            logits = torch.zeros(5, V)
            logits[3, where if isinstance(where, slice) else V - 1] = value
            with pytest.raises(ValueError, match="row 3 of 5"):
                sample(logits, temperature=1.0, keys=keys_for(5), impl=impl)
            with pytest.raises(ValueError, match="row 3 of 5"):
                sample(logits, temperature=0.0, keys=keys_for(5), impl=impl)
    with pytest.raises(ValueError, match="row 0 of 5"):
        sample(torch.zeros(5, 4), temperature=1.0, keys=keys_for(5), suppress=torch.ones(5, 4, dtype=torch.bool), impl=impl)
    poisoned = torch.zeros(5, 40)
    poisoned[2, 1] = math.nan  # a suppressed NaN is still in the full distribution
    with pytest.raises(ValueError, match="row 2 of 5"):
        sample(poisoned, temperature=1.0, keys=keys_for(5), suppress=poisoned.isnan(), impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_refuses_bad_parameters(impl):
    logits, keys = torch.zeros(2, 4), keys_for(2)
    for bad in ({"temperature": -1.0}, {"temperature": math.nan}, {"top_p": 0.0}, {"top_p": 1.1}, {"min_p": -0.1}, {"min_p": 2.0}, {"top_k": -1}):
        (name, value), = bad.items()
        for given in (value, torch.tensor([1, value])):
            with pytest.raises(ValueError, match=f"expected {name}"):
                sample(logits, **{"temperature": 1.0, name: given}, keys=keys, impl=impl)
    with pytest.raises(ValueError, match="temperature as a number or"):
        sample(logits, temperature=torch.ones(3), keys=keys, impl=impl)
    with pytest.raises(ValueError, match="keys does not fit"):
        sample(logits, temperature=1.0, keys=keys[:, :3], impl=impl)
    with pytest.raises(ValueError, match="at least one token"):
        sample(logits[:, :0], temperature=1.0, keys=keys, impl=impl)
    with pytest.raises(TypeError, match="suppress of dtype bool"):
        sample(logits, temperature=1.0, keys=keys, suppress=torch.zeros(2, 4), impl=impl)
    assert [column.shape for column in sample(logits[:0], temperature=1.0, keys=keys[:0], impl=impl)] == [(0,)] * 5


@pytest.mark.skipif(not native.capability, reason=native.reason)
def test_opcheck_and_compile():
    logits, keys, one = torch.randn(3, 9), keys_for(3), torch.ones(1, dtype=torch.float64)
    torch.library.opcheck(torch.ops.fusedrl.sample.default, (logits, one, 4 * one, 0.5 * torch.ones(3, dtype=torch.float64), None, keys, logits > 5))
    for impl in ("cpp", "torch"):
        def call(logits, keys, impl=impl):
            return sample(logits, temperature=0.7, top_k=3, keys=keys, impl=impl)
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(logits, keys).token_ids, call(logits, keys).token_ids)
