"""varlen_attention in Triton, through the interpreter: against the definition in float64, over
tiles, forms and layouts."""

import pytest
import torch

from fusedrl.kernels.attention import _triton as attention_triton
from fusedrl.kernels.attention import varlen_attention, varlen_attention_reference
from fusedrl.kernels.runtime.triton import tl, triton

pytestmark = pytest.mark.usefixtures("triton_runs")
FORMS = [
    (True, None, None),
    (True, 1, None),
    (True, 20, 0.7),
    (False, None, None),
    (False, 3, None),
    (False, None, 3.0),
]


def inputs(device, lengths, heads=(2, 1), D=8, dtype=torch.float32, seed=0):
    draw = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(sum(lengths), h, D, generator=draw).to(device).to(dtype)
        for h in (heads[0], heads[1], heads[1])
    )
    return q, k, v, torch.tensor([0, *lengths], device=device).cumsum(0).int()


def run(device, q, k, v, cu_seqlens, attention=varlen_attention, upstream=None, **options):
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = attention(*leaves, cu_seqlens, **options)
    upstream = (
        torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(device)
        if upstream is None
        else upstream
    )
    out.backward(upstream.to(q.dtype))
    return [out.detach(), *(x.grad for x in leaves)]


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 16, so that a short sequence has several."""
    monkeypatch.setattr(
        attention_triton,
        "_shape",
        lambda D, kind, wgmma: {
            "BLOCK_D": max(16, 1 << (D - 1).bit_length()),
            "R": 32 if kind == "q" else 16,
            "C": 32 if kind == "kv" else 16,
            "num_warps": 4,
        },
    )


@pytest.mark.cpu_only("in float32, which Triton does not serve on a card")
@pytest.mark.parametrize(("causal", "window", "softcap"), FORMS)
@pytest.mark.parametrize(
    ("lengths", "heads", "D"),
    [
        ([], (2, 1), 8),
        ([0], (2, 1), 8),
        ([1], (1, 1), 1),
        ([3, 0, 18, 1], (2, 1), 18),
        ([37], (2, 2), 8),
    ],
)
def test_matches_float64(lengths, heads, D, causal, window, softcap, small_tiles, device):
    q, k, v, ends = inputs(device, lengths, heads, D)
    options = {"causal": causal, "window": window, "softcap": softcap, "scale": 0.4}
    got = run(device, q, k, v, ends, max_length=max(lengths, default=0), impl="triton", **options)
    if not sum(lengths):
        assert all(x.shape == y.shape for x, y in zip(got, (q, q, k, v), strict=True))
        return
    want = run(
        device, q.double(), k.double(), v.double(), ends, varlen_attention_reference, **options
    )
    for ours, exact in zip(got, want, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_and_larger_tiles(dtype, device):
    q, k, v, ends = inputs(device, [70, 5], D=32, dtype=dtype)
    got, naive = (
        run(device, q, k, v, ends, max_length=70, impl="triton"),
        run(device, q, k, v, ends, varlen_attention_reference),
    )
    upstream = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(device).to(dtype)
    exact = run(
        device,
        q.double(),
        k.double(),
        v.double(),
        ends,
        varlen_attention_reference,
        upstream=upstream,
    )
    # three, not two: the interpreter truncates to bfloat16
    for ours, other, want in zip(got, naive, exact, strict=True):
        assert (ours.double() - want).norm() <= 3 * (other.double() - want).norm() + 1e-5


@pytest.mark.cpu_only("in float32, which Triton does not serve on a card")
def test_bits_depend_on_the_sequence_alone(small_tiles, device):
    lengths = [18, 3, 20]
    q, k, v, ends = inputs(device, lengths)
    upstream = torch.randn(q.shape, generator=torch.Generator().manual_seed(2)).to(device)
    packed = run(device, q, k, v, ends, upstream=upstream, max_length=20, window=9, impl="triton")
    again = run(device, q, k, v, ends, upstream=upstream, max_length=40, window=9, impl="triton")
    assert all(torch.equal(x, y) for x, y in zip(packed, again, strict=True)), (
        "two runs, more programs than are needed"
    )
    for x in (q, k, v, upstream):
        x[18:21] = float("nan")
    poisoned = run(device, q, k, v, ends, upstream=upstream, max_length=20, window=9, impl="triton")
    for start, length in ((0, 18), (21, 20)):
        at = slice(start, start + length)
        alone = run(
            device,
            q[at],
            k[at],
            v[at],
            torch.tensor([0, length], dtype=torch.int32, device=device),
            upstream=upstream[at],
            max_length=length,
            window=9,
            impl="triton",
        )
        for x, y, z in zip(packed, poisoned, alone, strict=True):
            assert torch.equal(x[at], z)
            assert torch.equal(y[at], z)


@pytest.mark.cpu_only("in float32, which Triton does not serve on a card")
def test_slices_of_a_projection_and_large_scores(small_tiles, device):
    q, k, v, ends = inputs(device, [9, 20])
    views = torch.cat([q, k, v], 1).split((2, 1, 1), 1)
    want = run(device, q, k, v, ends, max_length=20, impl="triton")
    assert torch.equal(varlen_attention(*views, ends, max_length=20, impl="triton"), want[0])
    odd = [x.transpose(0, 2).contiguous().transpose(0, 2) for x in (q, k, v)]
    assert torch.equal(varlen_attention(*odd, ends, max_length=20, impl="triton"), want[0])
    large = run(device, 1000 * q, k, v, ends, max_length=20, impl="triton")
    exact = run(device, 1000 * q.double(), k.double(), v.double(), ends, varlen_attention_reference)
    for ours, other in zip(large, exact, strict=True):
        torch.testing.assert_close(
            ours.double(), other, rtol=1e-3, atol=1e-3 * max(1.0, other.abs().max().item())
        )


@pytest.mark.cpu_only("in float32, which Triton does not serve on a card")
def test_known_wrong_variants_are_seen(small_tiles, device):
    q, k, v, ends = inputs(device, [20, 18])
    right = run(
        device, q.double(), k.double(), v.double(), ends, varlen_attention_reference, window=7
    )
    for options in (
        {"window": 8},
        {"window": 6},
        {"window": 7, "causal": False},
        {"window": 7, "softcap": 1.0},
        {"window": 7, "scale": 0.4},
    ):
        wrong = run(device, q, k, v, ends, max_length=20, impl="triton", **options)
        assert all(
            (x.double() - y).abs().max() > 1e-3 for x, y in zip(wrong, right, strict=True)
        ), options


@pytest.mark.cpu_only("in float32, which Triton does not serve on a card")
def test_as_a_custom_op(device):
    q, k, v, ends = inputs(device, [2, 1], (1, 1), 2)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(attention_triton.varlen_triton, (*leaves, ends, 2, True, 3, 0.5, 2.0))
    torch._dynamo.reset()
    compiled = torch.compile(varlen_attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(
        compiled(*leaves, ends, max_length=2, impl="triton"),
        varlen_attention(*leaves, ends, max_length=2, impl="triton"),
    )
    with pytest.raises(RuntimeError, match="varlen_attention"):
        torch.autograd.grad(
            varlen_attention(*leaves, ends, max_length=2, impl="triton").sum(), q, create_graph=True
        )


@pytest.mark.cpu_only("values are read on the host, or an implementation is named, on a CPU alone")
def test_refuses_what_it_does_not_serve(device):
    q, k, v, ends = inputs(device, [3], D=264)
    with pytest.raises(
        RuntimeError,
        match="'triton' cannot run on cpu: it serves head dims up to 256, and this one is 264",
    ):
        varlen_attention(q, k, v, ends, max_length=3, impl="triton")
    q, k, v, ends = inputs(device, [3], dtype=torch.float64)
    with pytest.raises(RuntimeError, match="'triton' cannot run on cpu: it computes in float32"):
        varlen_attention(q, k, v, ends, max_length=3, impl="triton")


if triton is not None:

    @triton.jit
    def _spans_kernel(
        out_ptr,
        length,
        window,
        KEYS: tl.constexpr,
        CAUSAL: tl.constexpr,
        R: tl.constexpr,
        C: tl.constexpr,
        TILES: tl.constexpr,
    ):
        tile = tl.arange(0, TILES)
        if KEYS:
            spans = attention_triton._keys(tile * R, length, window, CAUSAL, R, C)
        else:
            spans = attention_triton._queries(tile * C, length, window, CAUSAL, R, C)
        for i in tl.static_range(4):
            tl.store(out_ptr + 4 * tile + i, spans[i])


def spans(length, window, keys, causal, R, C):
    """(low, whole, end, high) of every tile of queries (`keys`) or of keys."""
    tiles = -(-length // (R if keys else C))
    out = torch.zeros(1 << (tiles - 1).bit_length(), 4, dtype=torch.int32, device="cpu")
    _spans_kernel[(1,)](out, length, window, KEYS=keys, CAUSAL=causal, R=R, C=C, TILES=len(out))
    return out[:tiles].tolist()


@pytest.mark.cpu_only("arithmetic of positions")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 7, 40, 100])
def test_whole_tiles_are_those_that_need_no_mask(causal, window, device):
    """Where the kernels compute no mask every pair is seen, and what they leave out never is."""
    reach = window or attention_triton._UNBOUNDED
    for length, R, C in ((150, 32, 16), (150, 16, 32), (7, 16, 16), (64, 16, 16)):
        at = torch.arange(length)
        behind = at[:, None] - at[None]
        seen = behind.abs() < reach
        seen = seen & (behind >= 0) if causal else seen
        for keys, side, other, sees in ((True, R, C, seen), (False, C, R, seen.T)):
            for tile, (low, whole, end, high) in enumerate(
                spans(length, reach, keys, causal, R, C)
            ):
                part = sees[tile * side : (tile + 1) * side]
                assert low % other == whole % other == 0
                assert low <= whole <= end <= max(length, whole)
                assert not part[:, :low].any()
                assert not part[:, max(high, end) :].any()
                assert part[:, whole:end].all()


@pytest.mark.cpu_only("arithmetic of positions")
def test_masks_of_a_long_sequence(device):
    """4,096 tokens, causal, tiles of 128 queries and 64 keys; docs/kernel-report.md has the same
    numbers."""
    tiles = spans(4096, attention_triton._UNBOUNDED, True, True, 128, 64)
    masked = sum(-(-(high - end) // 64) for _, _, end, high in tiles)
    whole = sum((end - start) // 64 for _, start, end, _ in tiles)
    assert (masked, masked + whole) == (64, 1056)
