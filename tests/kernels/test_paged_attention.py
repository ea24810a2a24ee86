import math

import pytest
import torch
import torch.nn.functional as F

from fusedrl.engine.tools.verify.grid import interpreted
from fusedrl.kernels import attention
from fusedrl.kernels import paged_attention as module
from fusedrl.kernels.paged_attention import paged_attention, paged_attention_reference
from fusedrl.kernels.runtime import native

LENS = [0, 1, 16, 17, 33, 70]
# (query heads, key/value heads, head dim, block size): groups of 1, 2, 4, 7, and 17, which takes
# two Triton programs; odd head dims; block sizes at, off, below and above the vector and the tile.
SHAPES = [
    (4, 2, 8, 16),
    (4, 1, 80, 16),
    (7, 1, 5, 24),
    (3, 3, 1, 5),
    (17, 1, 12, 64),
    (2, 2, 33, 1),
]


@pytest.fixture(autouse=True)
def small_splits(monkeypatch):
    """Triton's split cut to 32 positions, in tiles of at most 32: short rows then have several of
    both."""
    if module.triton is not None:
        shape = module._shape
        monkeypatch.setattr(module, "_SPLIT", 32)
        monkeypatch.setattr(
            module, "_shape", lambda D, bytes_: shape(D, bytes_) | {"TILE": 16 if D < 16 else 32}
        )


def inputs(device, lens=LENS, shape=SHAPES[0], dtype=torch.float32, fill=math.nan, width=0, seed=0):
    """q, caches of `fill` in which only the rows' own slots are written, and a table whose other
    entries are wild."""
    (Hq, Hkv, D, S), generator = shape, torch.Generator().manual_seed(seed)
    need = [-(-n // S) for n in lens]
    blocks = torch.randperm(sum(need) + 2, generator=generator).to(device).int()
    table = torch.full(
        (len(lens), max([*need, 0]) + width), 2**31 - 1, dtype=torch.int32, device=device
    )
    k, v = (
        torch.full((sum(need) + 2, Hkv, D, S), fill, dtype=dtype, device=device),
        torch.full((sum(need) + 2, Hkv, S, D), fill, dtype=dtype, device=device),
    )
    for row, n in enumerate(lens):
        table[row, : need[row]] = blocks[sum(need[:row]) :][: need[row]]
        for t in range(n):
            block = table[row, t // S]
            k[block, :, :, t % S], v[block, :, t % S] = (
                torch.randn(2, Hkv, D, generator=generator).to(device).to(dtype)
            )
    q = torch.randn(len(lens), Hq, D, generator=generator).to(device).to(dtype)
    return q, k, v, table, torch.tensor(lens, device=device)


def by_hand(device, q, k, v, table, lens, window=None, softcap=None, scale=None):
    """One row, one head at a time, from the words of the docstring."""
    out, S, group = (
        torch.zeros(q.shape, dtype=torch.float64, device=device),
        v.shape[2],
        q.shape[1] // k.shape[1],
    )
    for b, n in enumerate(lens.tolist()):
        seen = range(max(0, n - (window or n)), n)
        for h in range(q.shape[1]):
            z = [
                (q[b, h].double() @ k[table[b, t // S], h // group, :, t % S].double())
                * (scale or q.shape[2] ** -0.5)
                for t in seen
            ]
            z = [softcap * torch.tanh(x / softcap) for x in z] if softcap else z
            weights = torch.tensor(z, dtype=torch.float64, device=device).softmax(0)
            out[b, h] = sum(
                (
                    w * v[table[b, t // S], h // group, t % S].double()
                    for w, t in zip(weights, seen, strict=True)
                ),
                torch.zeros(q.shape[2], device=device),
            )
    return out


def torch_attention(q, k, v, table, lens, window=None):
    """torch's own attention in the same dtype, a row at a time: what the error is measured by."""
    out, S, groups = torch.zeros_like(q), v.shape[2], q.shape[1] // k.shape[1]
    for b, n in enumerate(lens.tolist()):
        slots = range(max(0, n - (window or n)), n)
        if slots:
            keys = torch.stack(
                [k[table[b, t // S], :, :, t % S] for t in slots], 1
            ).repeat_interleave(groups, 0)
            values = torch.stack(
                [v[table[b, t // S], :, t % S] for t in slots], 1
            ).repeat_interleave(groups, 0)
            out[b] = F.scaled_dot_product_attention(q[b, :, None], keys, values)[:, 0]
    return out


@pytest.mark.parametrize(("window", "softcap", "scale"), [(None, None, None), (20, 1.5, 0.9)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reference_against_the_definition(shape, window, softcap, scale, device):
    q, *rest = inputs(device, shape=shape, dtype=torch.float64)
    got = paged_attention(q, *rest, window=window, softcap=softcap, scale=scale)
    torch.testing.assert_close(
        got, by_hand(device, q, *rest, window, softcap, scale), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize(
    ("shape", "window"),
    [
        *((shape, window) for shape in SHAPES for window in (None, 20)),
        (SHAPES[1], 1),
        (SHAPES[1], 1000),
    ],
    ids=str,
)
@pytest.mark.each_impl("paged_attention")
def test_float32_matches_float64(shape, window, impl, device):
    q, k, v, table, lens = inputs(device, shape=shape, width=1)
    want = paged_attention_reference(q.double(), k.double(), v.double(), table, lens, window)
    naive = torch_attention(q, k, v, table, lens, window)
    got = paged_attention(q, k, v, table, lens.int(), window=window, impl=impl)
    assert (got - want).abs().max() <= 2 * (naive - want).abs().max() + 1e-5
    assert torch.equal(got[0], torch.zeros_like(got[0]))  # a row with no context
    assert torch.equal(got, paged_attention(q, k, v, table, lens, window=window, impl=impl))


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[1], SHAPES[4]], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.each_impl("paged_attention")
def test_low_precision(shape, dtype, impl, device):
    q, *rest = inputs(device, shape=shape, dtype=dtype)
    k, v, *rows = rest
    want = paged_attention_reference(q.double(), k.double(), v.double(), *rows)
    got, naive = (
        (x.double() - want).norm()
        for x in (paged_attention(q, *rest, impl=impl), torch_attention(q, *rest))
    )
    # Triton's interpreter truncates to bfloat16: twice the error of a rounding, and all of one
    # sign, in the weights and in the result.
    assert got <= (4 if interpreted(impl, device) and dtype == torch.bfloat16 else 2) * naive + 1e-5


@pytest.mark.cpu_only("the C++ kernels")
@pytest.mark.skipif(not native.capability, reason=native.reason)
def test_every_float16_number_is_widened_exactly(device):
    """One position a row, so that o = v: all normal and subnormal numbers and infinities, by vector
    loads and by what is left of them."""
    numbers = (
        torch.arange(2**16, dtype=torch.int32, device=device).to(torch.int16).view(torch.float16)
    )
    v = numbers[~numbers.isnan()].view(907, 1, 1, 70)
    arguments = (
        torch.arange(907, dtype=torch.int32, device=device)[:, None],
        torch.ones(907, dtype=torch.int64, device=device),
    )
    got = paged_attention(
        torch.zeros(907, 1, 70, device=device).half(),
        torch.zeros(907, 1, 70, 1, device=device).half(),
        v,
        *arguments,
        impl="cpp",
    )
    assert torch.equal(got, v[:, 0])
    v[5, 0, 0, ::3] = math.nan
    got = paged_attention(
        torch.zeros(907, 1, 70, device=device).half(),
        torch.zeros(907, 1, 70, 1, device=device).half(),
        v,
        *arguments,
        impl="cpp",
    )
    assert torch.equal(got.isnan(), v[:, 0].isnan())


@pytest.mark.parametrize("softcap", [0.5, 30.0])
@pytest.mark.each_impl("paged_attention")
def test_softcap(impl, softcap, device):
    q, k, v, table, lens = inputs(device, shape=SHAPES[1])
    q = q * 10  # scores around the softcap, and beyond it
    got = paged_attention(q, k, v, table, lens, softcap=softcap, window=40, impl=impl)
    want = paged_attention_reference(q.double(), k.double(), v.double(), table, lens, 40, softcap)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5)
    wrong = paged_attention_reference(q.double(), k.double(), v.double(), table, lens, 40)
    assert (wrong - want).abs().max() > 1e-2


# numpy, under the interpreter: a score that is replaced afterwards
@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.each_impl("paged_attention")
def test_what_a_row_does_not_see_changes_nothing(impl, device):
    lens, results = [3, 40, 70], []
    for fill in (math.nan, 0.0, math.inf):
        # Triton's tile spans two blocks, one of them before the window
        q, k, v, table, n = inputs(device, lens, (4, 2, 16, 16), fill=fill, width=1)
        results.append(
            [
                paged_attention(q, k, v, table, n, impl=impl),
                paged_attention(q, k, v, table, n, window=20, impl=impl),
            ]
        )
        # written, but before the window: whole blocks, whose entries may be wild too
        for row, size in enumerate(lens):
            gone = max(0, size - 20) // 16
            k[table[row, :gone].long()], v[table[row, :gone].long()] = fill, fill
            table[row, :gone] = 2**31 - 1
        results[-1].append(paged_attention(q, k, v, table, n, window=20, impl=impl))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert torch.equal(results[0][1], results[0][2])
    assert not torch.equal(results[0][0], results[0][1])


@pytest.mark.parametrize("window", [None, 34])
@pytest.mark.each_impl("paged_attention", but=("torch",))
def test_a_row_s_bits_are_its_own(impl, window, device):
    """Alone, in company, in another order and in a wider table: the number of splits that are
    launched changes, a row's arithmetic does not."""
    q, k, v, table, lens = inputs(device, [70, 5, 33, 0, 64])
    want = paged_attention(q, k, v, table, lens, window=window, impl=impl)
    wide = torch.cat([table, torch.full((5, 9), -7, dtype=torch.int32, device=device)], 1)
    assert torch.equal(paged_attention(q, k, v, wide, lens, window=window, impl=impl), want)
    order = torch.tensor([4, 2, 0, 1, 3], device=device)
    assert torch.equal(
        paged_attention(q[order], k, v, wide[order], lens[order], window=window, impl=impl),
        want[order],
    )
    # a table of its own width: one split where one is enough
    for row, n in enumerate(lens.tolist()):
        alone = paged_attention(
            q[row : row + 1],
            k,
            v,
            table[row : row + 1, : -(-n // 16)],
            lens[row : row + 1],
            window=window,
            impl=impl,
        )
        assert torch.equal(alone[0], want[row])


@pytest.mark.usefixtures("triton_runs")
def test_triton_s_own_split_and_many_of_them(monkeypatch, device):
    q, k, v, table, lens = inputs(device, [600, 257, 256], (2, 1, 16, 64))
    monkeypatch.undo()
    want = paged_attention_reference(q.double(), k.double(), v.double(), table, lens)
    torch.testing.assert_close(
        paged_attention(q, k, v, table, lens, impl="triton").double(), want, rtol=0, atol=1e-6
    )
    monkeypatch.setattr(module, "_SPLIT", 16)  # more splits than the merge takes at a time
    torch.testing.assert_close(
        paged_attention(q[:1], k, v, table[:1], lens[:1], impl="triton").double(),
        want[:1],
        rtol=0,
        atol=1e-6,
    )


@pytest.mark.cpu_only("the C++ kernels")
@pytest.mark.skipif(not native.capability, reason=native.reason)
def test_cpp_bits_do_not_depend_on_threads(device):
    arguments, before, results = (
        inputs(device, [300, 290, 5], (8, 4, 64, 16)),
        torch.get_num_threads(),
        [],
    )
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(paged_attention(*arguments, impl="cpp"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.each_impl("paged_attention")
def test_large_scores(impl, device):
    q, k, v, table, lens = inputs(device, [1, 40])
    want = paged_attention_reference(1000 * q.double(), k.double(), v.double(), table, lens)
    torch.testing.assert_close(
        paged_attention(1000 * q, k, v, table, lens, impl=impl).double(), want, rtol=1e-3, atol=1e-3
    )


@pytest.mark.each_impl("paged_attention")
def test_empty_inputs_views_and_gradients(impl, device):
    q, k, v, table, lens = inputs(device, [0, 5, 20])
    assert paged_attention(q[:0], k, v, table[:0], lens[:0], impl=impl).shape == (0, 4, 8)
    # no blocks, and no columns for them
    none = paged_attention(q[:1], k[:0], v[:0], table[:1, :0], lens[:1], impl=impl)
    assert torch.equal(none, torch.zeros(1, 4, 8, device=device))
    want = paged_attention(q, k, v, table, lens, impl=impl)
    qkv, columns = (
        torch.randn(3, 12, 8, device=device),
        torch.full((3, 2 * table.shape[1]), -1, dtype=torch.int32, device=device),
    )
    qkv[:, :4], columns[:, ::2] = q, table
    views = paged_attention(
        qkv[:, :4], k, v, columns[:, ::2], torch.stack([lens, -lens], 1)[:, 0], impl=impl
    )
    assert torch.equal(views, want)
    assert not paged_attention(q.requires_grad_(), k, v, table, lens, impl=impl).requires_grad
    assert attention.paged_attention is paged_attention


@pytest.mark.each_impl("paged_attention")
def test_opcheck_and_compile(impl, device):
    q, k, v, table, lens = inputs(device, [0, 5, 40], fill=0.0)
    if impl != "torch":
        op = (
            torch.ops.fusedrl.paged_attention
            if impl == "cpp"
            else torch.ops.fusedrl.paged_attention_triton
        )
        torch.library.opcheck(op.default, (q, k, v, table.clamp(max=0), lens, 20, 3.0, 0.5))
    compiled = torch.compile(paged_attention, fullgraph=True, backend="aot_eager")
    want = paged_attention(q, k, v, table, lens, window=20, softcap=3.0, impl=impl)
    torch.testing.assert_close(
        compiled(q, k, v, table, lens, window=20, softcap=3.0, impl=impl), want
    )


@pytest.mark.cpu_only("values are read on the host, or an implementation is named, on a CPU alone")
@pytest.mark.each_impl("paged_attention")
def test_refuses_what_lies_out_of_range(impl, device):
    q, k, v, table, lens = inputs(device, [5, 40], width=1)
    for row, entry in ((0, -1), (1, len(k)), (1, 2**31 - 1)):
        broken = table.clone()
        broken[row, 0] = entry
        with pytest.raises(IndexError, match="block_table"):
            paged_attention(q, k, v, broken, lens, impl=impl)
    # the position after the last one that was allotted
    with pytest.raises(IndexError, match="block_table"):
        paged_attention(q, k, v, table, torch.tensor([5, 49], device=device), impl=impl)
    for wrong in (-1, 65):
        with pytest.raises(IndexError, match="context_lens"):
            paged_attention(q, k, v, table, torch.tensor([5, wrong], device=device), impl=impl)


@pytest.mark.cpu_only("values are read on the host, or an implementation is named, on a CPU alone")
def test_refuses_what_it_does_not_support(device):
    q, k, v, table, lens = inputs(device, [5, 40])
    with pytest.raises(ValueError, match=r"v_cache does not fit its pattern \[blocks, Hkv, S, D\]"):
        paged_attention(q, k, k, table, lens)
    with pytest.raises(ValueError, match="multiple of the key/value heads"):
        paged_attention(q[:, :3], k, v, table, lens)
    with pytest.raises(ValueError, match="expected window >= 1"):
        paged_attention(q, k, v, table, lens, window=0)
    with pytest.raises(ValueError, match="expected a softcap above 0"):
        paged_attention(q, k, v, table, lens, softcap=0.0)
    with pytest.raises(TypeError, match="expected block_table of dtype int32"):
        paged_attention(q, k, v, table.long(), lens)
    with pytest.raises(TypeError, match="expected context_lens of dtype int32, int64"):
        paged_attention(q, k, v, table, lens.float())
    with pytest.raises(TypeError, match="expected k_cache of dtype float32"):
        paged_attention(q, k.half(), v, table, lens)
    with pytest.raises(
        RuntimeError, match=r"'cpp' cannot run on cpu: it computes in float32; these can: torch"
    ):
        paged_attention(q.double(), k.double(), v.double(), table, lens, impl="cpp")


@pytest.mark.each_impl("paged_attention", but=("torch",))
def test_refuses_what_an_implementation_does_not_support(impl, device):
    q, k, v, table, lens = inputs(device, [5, 40])
    with pytest.raises(ValueError, match="expected a contiguous k_cache"):
        paged_attention(
            q, k.transpose(2, 3).contiguous().transpose(2, 3), v, table, lens, impl=impl
        )
    if impl == "triton":
        q, k, v, table, lens = inputs(device, [2], (1, 1, 257, 16))
        with pytest.raises(RuntimeError, match="head dims up to 256, and this one is 257"):
            paged_attention(q, k, v, table, lens, impl=impl)


@pytest.mark.usefixtures("triton_runs")
def test_scratch_is_bounded_and_bits_stay(monkeypatch, device):
    """Rows beyond what the scratch holds are computed by further launches, to the same bits."""
    q, k, v, table, lens = inputs(device, [70, 5, 33, 0, 64, 41, 70])
    whole = paged_attention(q, k, v, table, lens, impl="triton")
    allocated, new_empty = [], torch.Tensor.new_empty

    def counted(tensor, size, **options):
        made = new_empty(tensor, size, **options)
        allocated.append(made.nbytes)
        return made

    monkeypatch.setattr(torch.Tensor, "new_empty", counted)
    a_row = 4 * 4 * 3 * (8 + 2)  # bytes of float32: 4 heads, 3 splits, a head dim of 8
    for scratch, rows in ((3 * a_row, 3), (a_row, 1), (0, 1)):
        monkeypatch.setattr(module, "_SCRATCH", scratch)
        allocated.clear()
        assert torch.equal(paged_attention(q, k, v, table, lens, impl="triton"), whole)
        assert sum(allocated) == rows * a_row


@pytest.mark.cpu_only("arithmetic")
def test_rows_at_once():
    """2,048 tokens in the shape of Qwen2.5-0.5B with a context of 32,768 positions: 0.97 GB of
    splits before, which took one launch."""
    rows = module.rows_at_once(14, 128, 64)
    assert 2048 * 4 * 14 * 128 * 66 == 968_884_224
    assert rows == 560
    assert rows * 4 * 14 * 128 * 66 <= module._SCRATCH
    assert module.rows_at_once(14, 1, 64) > 1 << 30  # nothing to merge, no scratch
    assert module.rows_at_once(128, 4096, 256) == 1
