import pytest
import torch

from fusedrl.engine.model.layer import LayerWeights
from fusedrl.engine.model.step import DecoderWeights, allocate_cache, decode_step
from fusedrl.kernels.kv_cache import _rope_and_cache_triton, rope_and_cache
from fusedrl.kernels.rope import RopeTable
from fusedrl.kernels.runtime import native

CANARY = 123.0

# No token, one, more than a tile; one head, groups; a head of 2 and of 6 values, halves of no power
# of two, at and off any vector; blocks of one position, of an odd number, of 16. Every third token
# is padding.
SHAPES = [
    (0, 2, 1, 8, 16),
    (1, 1, 1, 2, 1),
    (7, 3, 1, 6, 5),
    (33, 4, 2, 8, 16),
    (5, 7, 7, 34, 3),
    (4, 2, 2, 80, 16),
    (3, 20, 2, 128, 16),
]
NORMS = {"no norm": (False, False), "both": (True, True), "of k": (False, True)}


def make(device, N, Hq, Hkv, D, S, norm="both", dtype=torch.float32, seed=0):
    """Arguments of the op: everything that it may not read is NaN, everything that it may not write
    is a canary."""
    generator = torch.Generator().manual_seed(seed + N + 31 * Hq + D)

    def rand(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device).to(dtype)

    angles, blocks = 100 * torch.rand(N, D // 2, generator=generator).to(device), N // S + 3
    slots = torch.randperm(blocks * S, generator=generator).to(device)[:N]
    slots[1::3] = -1 - torch.arange(slots[1::3].numel(), device=device) * 2**33
    qkv = rand(N, (Hq + 2 * Hkv) * D)
    qkv[slots < 0, Hq * D :] = torch.nan
    q_norm, k_norm = (1 + 0.3 * rand(D) if given else None for given in NORMS[norm])
    k_cache, v_cache = (
        torch.full(shape, CANARY, dtype=dtype, device=device)
        for shape in ((blocks, Hkv, D, S), (blocks, Hkv, S, D))
    )
    return {
        "qkv": qkv,
        "cos": angles.cos(),
        "sin": angles.sin(),
        "k_cache": k_cache,
        "v_cache": v_cache,
        "slots": slots,
        "num_heads": Hq,
        "q_norm": q_norm,
        "k_norm": k_norm,
    }


def with_own_caches(arguments):
    return arguments | {name: arguments[name].clone() for name in ("k_cache", "v_cache")}


def run(arguments, function=rope_and_cache, **options):
    """(queries, k_cache, v_cache)"""
    arguments = with_own_caches(arguments)
    return function(**arguments, **options), arguments["k_cache"], arguments["v_cache"]


def define(
    device,
    qkv,
    cos,
    sin,
    k_cache,
    v_cache,
    slots,
    num_heads,
    q_norm,
    k_norm,
    eps=1e-6,
    rotation_first=False,
    interleaved=False,
):
    """The same in float64, a token and a head at a time, written from the formulas: the halves are
    the parts of complex numbers."""
    heads, D, S = k_cache.shape[1:]
    q = torch.empty(len(slots), num_heads, D, dtype=torch.float64, device=device)
    k_cache, v_cache = k_cache.double().clone(), v_cache.double().clone()

    def norm(x, weight):
        return x if weight is None else weight.double() * x / (x.square().mean() + eps).sqrt()

    def rotate(x, n):
        parts = (x[::2], x[1::2]) if interleaved else (x[: D // 2], x[D // 2 :])
        turned = torch.complex(*parts) * torch.complex(cos[n].double(), sin[n].double())
        return (
            torch.stack([turned.real, turned.imag], 1).reshape(D)
            if interleaved
            else torch.cat([turned.real, turned.imag])
        )

    def turn(x, weight, n):
        return norm(rotate(x, n), weight) if rotation_first else rotate(norm(x, weight), n)

    for n, slot in enumerate(slots.tolist()):
        row = qkv[n].double().view(num_heads + 2 * heads, D)
        for h in range(num_heads):
            q[n, h] = turn(row[h], q_norm, n)
        for h in range(heads if slot >= 0 else 0):
            k_cache[slot // S, h, :, slot % S] = turn(row[num_heads + h], k_norm, n)
            v_cache[slot // S, h, slot % S] = row[num_heads + heads + h]
    return q, k_cache, v_cache


def assert_right(got, want, dtype, impl=None):
    """One rounding to the dtype of a result that float32 computed. (Triton's interpreter truncates
    to bfloat16 where a GPU rounds.)"""
    ulp = 1.001 if (impl, dtype) == ("triton", torch.bfloat16) else 0.501
    for ours, exact in zip(got, want, strict=True):
        assert ours.dtype == dtype
        assert ours.shape == exact.shape
        size = exact.abs().amax(-1, keepdim=True) if exact.numel() else exact
        wide = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        rounding = 0.0 if dtype == torch.float32 else ulp * torch.finfo(dtype).eps * exact.abs()
        assert ((ours.double() - exact).abs() <= rounding + 6 * wide * size).all(), float(
            (ours.double() - exact).abs().max()
        )


@pytest.mark.each_impl("rope_and_cache")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(impl, dtype, shape, device):
    for norm in NORMS if shape[0] < 9 else ["both"]:
        arguments = make(device, *shape, norm, dtype)
        got, want = run(arguments, impl=impl), define(device, **arguments)
        assert_right(got, want, dtype, impl)
        assert got[0].is_contiguous()
        for cache, exact in zip(got[1:], want[1:], strict=True):
            untouched = exact == CANARY
            assert (cache[untouched] == CANARY).all()
            assert not cache.isnan().any()
        assert torch.equal(got[2].double(), want[2])  # values are copied


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wrong_variants_fail(dtype, device):
    arguments = make(device, 9, 4, 2, 80, 16, "both", dtype)
    for wrong in ({"rotation_first": True}, {"interleaved": True}, {"eps": 1e-2}):
        with pytest.raises(AssertionError):
            assert_right(run(arguments), define(device, **arguments, **wrong), dtype)
    if dtype == torch.bfloat16:  # a norm that rounds before the rotation
        from fusedrl.kernels.rms_norm import rms_norm
        from fusedrl.kernels.rope import rope

        q, k, _ = arguments["qkv"].view(9, -1, 80).split((4, 2, 2), 1)
        q, _ = rope(
            rms_norm(q, arguments["q_norm"], eps=1e-6),
            rms_norm(k, arguments["k_norm"], eps=1e-6),
            arguments["cos"],
            arguments["sin"],
        )
        with pytest.raises(AssertionError):
            assert_right((q,), define(device, **arguments)[:1], dtype)


def test_float64_is_the_definition(device):
    arguments = make(device, 7, 3, 1, 10, 5, "both", torch.float64)
    for ours, want in zip(run(arguments), define(device, **arguments), strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-14, atol=1e-14)


@pytest.mark.each_impl("rope_and_cache")
def test_strides_runs_and_companions(impl, device):
    arguments = make(device, 9, 3, 2, 12, 4)
    got = run(arguments, impl=impl)
    wide = torch.full((9, arguments["qkv"].shape[1] + 5), torch.nan, device=device)
    wide[:, 3:-2] = arguments["qkv"]
    assert not wide[:, 3:-2].is_contiguous()
    both = torch.cat([arguments["cos"], arguments["sin"]], 1)
    strided = {
        "qkv": wide[:, 3:-2],
        "cos": both[:, :6],
        "sin": both[:, 6:],
        "slots": torch.stack([arguments["slots"]] * 2, 1)[:, 0],
        "q_norm": torch.stack([arguments["q_norm"]] * 2, 1)[:, 1],
    }
    for again in (arguments, arguments | strided):
        assert all(torch.equal(a, b) for a, b in zip(run(again, impl=impl), got, strict=True))
    # Row 3 among others, and in another slot: its bits are the same, and its neighbours change
    # nothing of it.
    dirty = arguments["qkv"].clone()
    dirty[[0, 1, 2, 4, 5, 6, 7, 8]] = torch.nan
    slots = arguments["slots"].clone()
    block, at = (int(slots[3]) // 4, int(slots[3]) % 4)
    q, k_cache, v_cache = run(arguments | {"qkv": dirty}, impl=impl)
    assert torch.equal(q[3], got[0][3])
    assert torch.equal(k_cache[block, :, :, at], got[1][block, :, :, at])
    assert torch.equal(v_cache[block, :, at], got[2][block, :, at])
    alone = (
        arguments
        | {name: arguments[name][3:4] for name in ("qkv", "cos", "sin")}
        | {"slots": torch.tensor([7], device=device)}
    )
    q, k_cache, v_cache = run(alone, impl=impl)
    assert torch.equal(q[0], got[0][3])
    assert torch.equal(k_cache[1, :, :, 3], got[1][block, :, :, at])
    assert torch.equal(v_cache[1, :, 3], got[2][block, :, at])


@pytest.mark.each_impl("rope_and_cache")
def test_the_cache_may_hold_anything(impl, device):
    arguments = make(device, 8, 3, 2, 12, 4)
    want = run(arguments, impl=impl)
    arguments |= {
        name: torch.full_like(arguments[name], torch.nan) for name in ("k_cache", "v_cache")
    }
    q, *caches = run(arguments, impl=impl)
    assert torch.equal(q, want[0])
    for cache, clean in zip(caches, want[1:], strict=True):
        assert torch.equal(cache.nan_to_num(CANARY), clean)


@pytest.mark.each_impl("rope_and_cache")
def test_offsets_beyond_two_to_the_31(impl, device):
    arguments, far = make(device, 2, 2, 1, 8, 16, dtype=torch.float16), 2**31 // (8 * 16)
    arguments |= {
        "qkv": arguments["qkv"].nan_to_num(),
        "slots": torch.tensor([3, 40], device=device),
    }
    q, keys, values = run(arguments, impl=impl)
    # hardly any page of these is touched
    qkv = (
        torch.empty(2**31 + 32, dtype=torch.float16, device=device)
        .as_strided((2, 32), (2**31, 1))
        .copy_(arguments["qkv"])
    )
    k_cache, v_cache = (
        torch.empty(far + 3, *shape, dtype=torch.float16, device=device)
        for shape in ((1, 8, 16), (1, 16, 8))
    )
    arguments |= {
        "qkv": qkv,
        "k_cache": k_cache,
        "v_cache": v_cache,
        "slots": torch.tensor([3, 16 * far + 40], device=device),
    }
    assert torch.equal(rope_and_cache(**arguments, impl=impl), q)
    for block, at in ((0, 3), (2, 8)):
        there = block and far + block
        assert torch.equal(k_cache[there, :, :, at], keys[block, :, :, at])
        assert torch.equal(v_cache[there, :, at], values[block, :, at])


@pytest.mark.each_impl("rope_and_cache")
def test_only_padding(impl, device):
    arguments = make(device, 4, 3, 2, 12, 4)
    arguments["slots"] = torch.full((4,), -1, device=device)
    q, k_cache, v_cache = run(arguments, impl=impl)
    assert_right((q,), define(device, **arguments)[:1], torch.float32)
    assert (k_cache == CANARY).all()
    assert (v_cache == CANARY).all()
    nothing = {
        "k_cache": torch.empty(0, 2, 12, 4, device=device),
        "v_cache": torch.empty(0, 2, 4, 12, device=device),
    }
    assert torch.equal(run(arguments | nothing, impl=impl)[0], q)


@pytest.mark.each_impl("rope_and_cache")
def test_rounded_angles(impl, device):
    arguments = make(device, 5, 2, 2, 12, 4, dtype=torch.bfloat16)
    rounded = {name: arguments[name].bfloat16() for name in ("cos", "sin")}
    widened = {name: t.float() for name, t in rounded.items()}
    for a, b in zip(
        run(arguments | rounded, impl=impl), run(arguments | widened, impl=impl), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.cpu_only("the C++ kernels")
@pytest.mark.skipif(not native.capability, reason=native.reason)
def test_threads_change_nothing(device):
    arguments = make(device, 1500, 4, 2, 32, 16)
    one = run(arguments, impl="cpp")
    try:
        torch.set_num_threads(3)
        three = run(arguments, impl="cpp")
    finally:
        torch.set_num_threads(1)
    assert all(
        torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(one, three, strict=True)
    )


def small_decoder(device, heads=4, kv_heads=2, D=12, H=24):
    """Two layers of one set of weights, their heads' norms included."""
    generator = torch.Generator().manual_seed(5)

    def rand(*shape):
        return torch.randn(*shape, generator=generator).to(device) * 0.3

    layer = LayerWeights(
        rand(H),
        rand((heads + 2 * kv_heads) * D, H),
        None,
        rand(D),
        rand(D),
        rand(H, heads * D),
        None,
        rand(H),
        rand(34, H),
        None,
        rand(H, 17),
        None,
        0,
    )
    embedding = rand(9, H)
    return DecoderWeights(
        embedding,
        (layer, layer),
        rand(H),
        embedding,
        RopeTable(rand(D // 2).abs(), 1.25),
        heads,
        kv_heads,
        D,
        1e-5,
    )


@pytest.mark.each_impl("rope_and_cache")
def test_fills_the_cache_of_decode_step(impl, device):
    """A decoder step and this op write the same keys and values, from the same hidden states and
    block table."""
    weights, N, S = small_decoder(device), 7, 4
    layer, embedding = weights.layers[0], weights.embedding
    ids, positions, table = (
        torch.arange(N, device=device),
        torch.arange(N, device=device),
        torch.tensor([[3, 1, 2]], dtype=torch.int32, device=device),
    )
    theirs = [cache.fill_(CANARY) for cache in allocate_cache(weights, 5, S)]
    ours = [cache.clone() for cache in theirs]
    decode_step(
        weights,
        ids,
        positions,
        torch.zeros(N, dtype=torch.int64, device=device),
        table,
        *theirs,
        impl="torch",
    )
    hidden = torch.nn.functional.rms_norm(
        embedding[ids], layer.input_norm.shape, layer.input_norm, weights.norm_eps
    )
    angles = positions[:, None] * weights.rope_table.inv_freq
    rope_and_cache(
        hidden @ layer.qkv.T,
        angles.cos() * 1.25,
        angles.sin() * 1.25,
        ours[0][0],
        ours[1][0],
        table[0].long()[positions // S] * S + positions % S,
        num_heads=weights.num_heads,
        q_norm=layer.q_norm,
        k_norm=layer.k_norm,
        eps=weights.norm_eps,
        impl=impl,
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a[0], b[0], rtol=1e-5, atol=1e-5)
        assert (a[1:] == CANARY).all()


@pytest.mark.each_impl("rope_and_cache", only=("cpp", "triton"))
def test_opcheck(impl, device):
    arguments = with_own_caches(make(device, 5, 2, 1, 8, 4, "of k"))
    arguments["qkv"] = arguments["qkv"].nan_to_num()
    op = torch.ops.fusedrl.rope_and_cache.default if impl == "cpp" else _rope_and_cache_triton
    torch.library.opcheck(op, (*arguments.values(), 1e-6))


@pytest.mark.each_impl("rope_and_cache")
def test_compiles_as_one_graph(impl, device):
    arguments = make(device, 5, 2, 1, 8, 4)
    compiled = torch.compile(rope_and_cache, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(arguments, compiled, impl=impl), run(arguments, impl=impl), strict=True):
        assert torch.equal(a, b)
    leaf = arguments | {"qkv": arguments["qkv"].nan_to_num().requires_grad_()}
    assert not run(leaf, impl=impl)[0].requires_grad


@pytest.mark.cpu_only("values are read on the host, or an implementation is named, on a CPU alone")
@pytest.mark.each_impl("rope_and_cache")
def test_a_slot_beyond_the_cache_writes_nothing(impl, device):
    arguments = with_own_caches(make(device, 4, 2, 1, 8, 4))
    arguments["slots"] = torch.tensor([0, 1, arguments["k_cache"].shape[0] * 4, 2], device=device)
    with pytest.raises(
        IndexError, match=r"expected slots below 16 \(4 blocks of 4\), got slots\[2\] = 16"
    ):
        rope_and_cache(**arguments, impl=impl)
    assert (arguments["k_cache"] == CANARY).all()
    assert (arguments["v_cache"] == CANARY).all()


@pytest.mark.cpu_only("values are read on the host, or an implementation is named, on a CPU alone")
def test_refuses_what_it_does_not_support(device):
    good = make(device, 3, 2, 1, 8, 4)
    for change, error, message in (
        (
            {"cos": good["qkv"][:, :8], "sin": good["qkv"][:, :8]},
            ValueError,
            "expected cos and sin .* got 8 angles and a cache of D 8",
        ),
        (
            {"num_heads": 3},
            ValueError,
            r"expected qkv \[N, \(num_heads \+ 2 Hkv\) D\] = \[N, \(3 \+ 2 \* 1\) \* 8\], got \[3, "
            r"32\]",
        ),
        ({"v_cache": good["k_cache"]}, ValueError, "v_cache does not fit its pattern"),
        ({"slots": good["slots"][:2]}, ValueError, "slots does not fit its pattern"),
        ({"q_norm": good["q_norm"][:4]}, ValueError, "q_norm does not fit its pattern"),
        ({"slots": good["slots"].int()}, TypeError, "expected slots of dtype int64"),
        ({"k_cache": good["k_cache"].half()}, TypeError, "expected v_cache of dtype float16"),
        ({"k_norm": good["k_norm"].half()}, TypeError, "expected k_norm of dtype float32"),
        ({"cos": good["cos"].double()}, TypeError, "expected cos of dtype"),
        (
            {"qkv": good["qkv"].T.contiguous().T},
            ValueError,
            "expected qkv with a contiguous last dimension",
        ),
        (
            {"k_cache": good["k_cache"].transpose(2, 3).contiguous().transpose(2, 3)},
            ValueError,
            "expected k_cache contiguous",
        ),
        ({"impl": "cuda"}, RuntimeError, "'cuda' cannot run on cpu"),
    ):
        with pytest.raises(error, match=message):
            rope_and_cache(**(good | change))
    wide = make(device, 1, 1, 1, 514, 1)
    with pytest.raises(ValueError, match="an even D up to 512"):
        rope_and_cache(**wide)
    with pytest.raises(RuntimeError, match="of float64: implementation 'triton' cannot run"):
        rope_and_cache(**make(device, 3, 2, 1, 8, 4, dtype=torch.float64), impl="triton")
