import pytest
import torch

from fusedrl.kernels.attention import varlen_attention, varlen_attention_reference
from fusedrl.kernels.runtime import native

# Lengths: none, one token, empty sequences, alike, and so unlike that they are padded in several
# groups.
LENGTHS = [[], [0], [1], [5, 5], [3, 0, 1, 7, 2], [33, 31, 1, 2, 3, 2, 1, 4, 65]]
FORMS = [
    (True, None, None),
    (True, 1, None),
    (True, 4, None),
    (True, 100, None),
    (False, None, None),
    (False, 3, None),
    (True, None, 0.7),
    (True, 4, 0.7),
    (False, None, 3.0),
    (False, 3, 0.7),
]


def inputs(device, lengths, heads=(6, 2), D=8, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    N = sum(lengths)
    q, k, v = (
        torch.randn(N, h, D, generator=generator).to(device).to(dtype)
        for h in (heads[0], heads[1], heads[1])
    )
    return q, k, v, torch.tensor([0, *lengths], device=device).cumsum(0).int()


def run(q, k, v, cu_seqlens, upstream, attention=varlen_attention, **options):
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = attention(*leaves, cu_seqlens, **options)
    out.backward(upstream)
    return out.detach(), *(x.grad for x in leaves)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize(("causal", "window", "softcap"), FORMS)
@pytest.mark.parametrize("heads", [(6, 2, 8), (3, 3, 18), (5, 1, 1)], ids=str)
@pytest.mark.each_impl("varlen_attention", interpreted=False)
def test_matches_float64(lengths, causal, window, softcap, heads, impl, device):
    q, k, v, cu_seqlens = inputs(device, lengths, heads, heads[2])
    upstream = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(device)
    options = {"causal": causal, "window": window, "softcap": softcap}
    ours = {"impl": impl, **options}
    got = run(q, k, v, cu_seqlens, upstream, max_length=max(lengths, default=0), **ours)
    want = (
        run(
            q.double(),
            k.double(),
            v.double(),
            cu_seqlens,
            upstream.double(),
            varlen_attention_reference,
            **options,
        )
        if lengths
        else None
    )
    for mine, theirs in zip(got, want or got, strict=True):
        torch.testing.assert_close(mine.double(), theirs.double(), rtol=1e-5, atol=5e-6)
    again = run(q, k, v, cu_seqlens, upstream, max_length=max(lengths, default=0) + 3, **ours)
    once_more = run(q, k, v, cu_seqlens, upstream, max_length=max(lengths, default=0) + 3, **ours)
    for mine, same, theirs in zip(again, once_more, got, strict=True):
        assert torch.equal(mine, same)
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("softcap", [None, 0.4])
def test_reference_against_the_definition(softcap, device):
    q, k, v, cu_seqlens = inputs(device, [4, 3], (2, 1), dtype=torch.float64)
    got = varlen_attention_reference(q, k, v, cu_seqlens, window=2, scale=0.7, softcap=softcap)
    for start, end in ((0, 4), (4, 7)):
        for i in range(start, end):
            seen = range(max(start, i - 1), i + 1)
            for head in range(2):
                scores = [0.7 * (q[i, head] @ k[j, 0]) for j in seen]
                weights = torch.stack(
                    [torch.exp(softcap * torch.tanh(z / softcap) if softcap else z) for z in scores]
                )
                by_hand = sum(
                    w * v[j, 0] for w, j in zip(weights / weights.sum(), seen, strict=True)
                )
                torch.testing.assert_close(got[i, head], by_hand)


@pytest.mark.each_impl("varlen_attention", interpreted=False)
def test_softcap_gradients_against_finite_differences(impl, device):
    if impl == "torch":
        q, k, v, cu_seqlens = inputs(device, [4, 3], dtype=torch.float64)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        assert torch.autograd.gradcheck(
            lambda *x: varlen_attention(*x, cu_seqlens, max_length=4, softcap=0.5, impl=impl),
            leaves,
        )
    q, k, v, cu_seqlens = inputs(device, [40, 5])
    upstream = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(device)
    options = {"max_length": 40, "impl": impl}
    capped, plain = (
        run(30 * q, k, v, cu_seqlens, upstream, softcap=cap, **options) for cap in (2.0, None)
    )  # most scores beyond the softcap
    want = run(
        30 * q.double(),
        k.double(),
        v.double(),
        cu_seqlens,
        upstream.double(),
        varlen_attention_reference,
        softcap=2.0,
    )
    for got, exact, wrong in zip(capped, want, plain, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)
        assert (wrong - exact).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.each_impl("varlen_attention", interpreted=False)
def test_low_precision(dtype, impl, device):
    q, k, v, cu_seqlens = inputs(device, [33, 31, 1, 2, 17], dtype=dtype)
    upstream = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(device).to(dtype)
    exact = run(
        q.double(),
        k.double(),
        v.double(),
        cu_seqlens,
        upstream.double(),
        varlen_attention_reference,
    )
    naive = run(q, k, v, cu_seqlens, upstream, varlen_attention_reference)
    for ours, theirs, want in zip(
        run(q, k, v, cu_seqlens, upstream, max_length=33, impl=impl), naive, exact, strict=True
    ):
        assert (ours.double() - want).norm() <= 2 * (theirs.double() - want).norm() + 1e-5


@pytest.mark.parametrize("lengths", [[7, 5, 6], [40, 3, 2, 5, 1, 1]])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.each_impl("varlen_attention", interpreted=False)
def test_companions_are_not_seen(lengths, poison, impl, device):
    q, k, v, cu_seqlens = inputs(device, lengths)
    upstream = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(device)
    clean = run(q, k, v, cu_seqlens, upstream, max_length=max(lengths), impl=impl)
    own = slice(lengths[0], lengths[0] + lengths[1])
    for x in (q, k, v, upstream):
        x[own] = poison
    keep = torch.ones(len(q), dtype=torch.bool, device=device)
    keep[own] = False
    for dirty, want in zip(
        run(q, k, v, cu_seqlens, upstream, max_length=max(lengths), impl=impl), clean, strict=True
    ):
        assert torch.equal(dirty[keep], want[keep])


@pytest.mark.cpu_only("the C++ kernels")
@pytest.mark.skipif(not native.capability, reason=native.reason)
@pytest.mark.parametrize("window", [None, 5])
def test_bits_do_not_depend_on_companions(window, device):
    lengths = [40, 3, 17, 1, 33]
    q, k, v, cu_seqlens = inputs(device, lengths)
    upstream = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(device)
    packed = run(q, k, v, cu_seqlens, upstream, max_length=40, window=window, impl="cpp")
    for start, length in zip(cu_seqlens.tolist(), lengths, strict=False):
        at = slice(start, start + length)
        alone = run(
            q[at],
            k[at],
            v[at],
            torch.tensor([0, length], dtype=torch.int32, device=device),
            upstream[at],
            max_length=length,
            window=window,
            impl="cpp",
        )
        assert all(torch.equal(x[at], y) for x, y in zip(packed, alone, strict=True))


@pytest.mark.each_impl("varlen_attention", interpreted=False)
def test_large_scores(impl, device):
    q, k, v, cu_seqlens = inputs(device, [20, 3])
    q, upstream = (
        q * 1000,
        torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(device),
    )
    want = run(
        q.double(),
        k.double(),
        v.double(),
        cu_seqlens,
        upstream.double(),
        varlen_attention_reference,
    )
    for got, exact in zip(
        run(q, k, v, cu_seqlens, upstream, max_length=20, impl=impl), want, strict=True
    ):
        torch.testing.assert_close(
            got.double(), exact, rtol=1e-3, atol=1e-3 * exact.abs().max().item()
        )


@pytest.mark.each_impl("varlen_attention", interpreted=False)
def test_compiles_and_takes_strided_views(impl, device):
    q, k, v, cu_seqlens = inputs(device, [9, 4, 20])
    qkv = torch.cat([q, k, v], 1)
    views = qkv.split((6, 2, 2), 1)
    want = varlen_attention(q, k, v, cu_seqlens, max_length=20, impl=impl)
    assert torch.equal(varlen_attention(*views, cu_seqlens, max_length=20, impl=impl), want)
    compiled = torch.compile(varlen_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v, cu_seqlens, max_length=20, impl=impl), want)
    capped = varlen_attention(q, k, v, cu_seqlens, max_length=20, softcap=0.5, impl=impl)
    torch.testing.assert_close(
        compiled(q, k, v, cu_seqlens, max_length=20, softcap=0.5, impl=impl), capped
    )


@pytest.mark.cpu_only("the C++ kernels")
@pytest.mark.skipif(not native.capability, reason=native.reason)
def test_opcheck(device):
    q, k, v, cu_seqlens = inputs(device, [9, 0, 4])
    leaves = [x.requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(
        torch.ops.fusedrl.varlen_attention.default, (*leaves, cu_seqlens, True, 3, 0.5, 2.0)
    )
    plain = [x.detach() for x in leaves]
    o, lse = torch.ops.fusedrl.varlen_attention_forward(*plain, cu_seqlens, True, 3, 0.5, 2.0)
    torch.library.opcheck(
        torch.ops.fusedrl.varlen_attention_forward.default, (*plain, cu_seqlens, True, 3, 0.5, 2.0)
    )
    torch.library.opcheck(
        torch.ops.fusedrl.varlen_attention_backward.default,
        (o, *plain, o, lse, cu_seqlens, True, 3, 0.5, 2.0),
    )


@pytest.mark.cpu_only("values are read on the host, or an implementation is named, on a CPU alone")
def test_refuses_what_it_does_not_support(device):
    q, k, v, cu_seqlens = inputs(device, [3, 4])
    with pytest.raises(ValueError, match=r"v does not fit its pattern \[N, Hkv, D\]"):
        varlen_attention(q, k, v[:, :1], cu_seqlens, max_length=4)
    with pytest.raises(ValueError, match="multiple of the key/value heads"):
        varlen_attention(q[:, :5], k, v, cu_seqlens, max_length=4)
    with pytest.raises(TypeError, match="cu_seqlens of dtype int32"):
        varlen_attention(q, k, v, cu_seqlens.long(), max_length=4)
    with pytest.raises(TypeError, match="expected k of dtype float32"):
        varlen_attention(q, k.double(), v, cu_seqlens, max_length=4)
    for wrong in ([0, 3, 8], [1, 3, 7], [0, 5, 3, 7]):
        with pytest.raises(ValueError, match="expected cu_seqlens from 0 to N = 7"):
            varlen_attention(
                q, k, v, torch.tensor(wrong, dtype=torch.int32, device=device), max_length=7
            )
    with pytest.raises(ValueError, match="at most max_length 3"):
        varlen_attention(q, k, v, cu_seqlens, max_length=3)
    with pytest.raises(ValueError, match="expected window >= 1"):
        varlen_attention(q, k, v, cu_seqlens, max_length=4, window=0)
    with pytest.raises(ValueError, match="expected a softcap above 0"):
        varlen_attention(q, k, v, cu_seqlens, max_length=4, softcap=0.0)
    with pytest.raises(RuntimeError, match=r"these can: "):
        varlen_attention(q, k, v, cu_seqlens, max_length=4, impl="flash_attn")
    with pytest.raises(
        RuntimeError, match=r"'cpp' cannot run on cpu: it computes in float32; these can: torch"
    ):
        varlen_attention(q.double(), k.double(), v.double(), cu_seqlens, max_length=4, impl="cpp")
