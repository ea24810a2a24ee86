"""paged_prefill: tiles of queries over the paged cache, against the definition of paged_attention,
and what they read."""

from itertools import pairwise

import pytest
import torch

from fusedrl.kernels import paged_prefill as module
from fusedrl.kernels.paged_attention import paged_attention, paged_attention_reference
from fusedrl.kernels.paged_prefill import paged_prefill, prefill_tiles, queries_of_a_tile


@pytest.fixture
def tiles_of_16(monkeypatch):
    """Tiles of 16 rows and 16 positions, so that a short prompt has several."""
    monkeypatch.setattr(module, "_tile", lambda D, bytes_, device: module.Tile(16, 16, 4, 2))


def problem(device, runs, heads=(4, 2), D=8, S=4, dtype=torch.float32, fill=float("nan"), seed=0):
    """`runs`: (row, position before the first query, queries), in the order of the queries. Blocks
    are dealt at random. Slots that no row needs hold `fill`, and entries of the table that none
    needs point far away."""
    draw = torch.Generator().manual_seed(seed)
    lens = {}
    for row, before, queries in runs:
        lens[row] = max(lens.get(row, 0), before + queries)
    B, M = max(lens) + 1, max(-(-n // S) for n in lens.values()) + 1
    blocks = sum(-(-n // S) for n in lens.values()) + 1
    table = torch.full((B, M), 2**31 - 1, dtype=torch.int32, device=device)
    free = torch.randperm(blocks, generator=draw).to(device).int()
    k = torch.full((blocks, heads[1], D, S), fill, dtype=dtype, device=device)
    v = torch.full((blocks, heads[1], S, D), fill, dtype=dtype, device=device)
    for row, n in lens.items():
        need, t = -(-n // S), torch.arange(n, device=device)
        table[row, :need], free = free[:need], free[need:]
        block = table[row, t // S].long()
        keys, values = torch.randn(2, n, heads[1], D, generator=draw).to(device).to(dtype)
        k[block, :, :, t % S], v[block, :, t % S] = keys, values
    rows, seen = (
        torch.tensor(column, dtype=torch.int64, device=device)
        for column in (
            [row for row, _, queries in runs for _ in range(queries)],
            [before + i + 1 for _, before, n in runs for i in range(n)],
        )
    )
    q = torch.randn(len(rows), heads[0], D, generator=draw).to(device).to(dtype)
    return q, k, v, table, rows, seen


def reference(q, k, v, table, rows, lens, window=None, softcap=None, scale=None):
    """By the definition of paged_attention, in float64."""
    wide = (x.double() for x in (q, k, v))
    return paged_attention_reference(*wide, table[rows], lens, window, softcap, scale)


RUNS = {
    "one prompt": [(0, 0, 37)],
    "one token": [(0, 20, 1)],
    "behind a prefix": [(0, 17, 21), (1, 4, 5)],
    "decoding beside a chunk": [(1, 6, 1), (3, 30, 1), (0, 9, 22), (2, 0, 1)],
    "rows in turns": [(0, 0, 3), (1, 0, 5), (0, 3, 6), (1, 5, 2), (1, 7, 20)],
    "the same length again": [(0, 4, 2), (1, 6, 3)],
}


# numpy, under the interpreter: a score that is replaced afterwards
@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize(("window", "softcap", "scale"), [(None, None, None), (7, 1.5, 0.9)])
@pytest.mark.parametrize("heads", [(4, 2), (7, 1)], ids=str)  # other groups below
@pytest.mark.parametrize("runs", RUNS)
@pytest.mark.usefixtures("triton_runs", "tiles_of_16")
def test_triton_is_the_definition(runs, heads, window, softcap, scale, device):
    q, k, v, table, rows, lens = problem(device, RUNS[runs], heads)
    how = {"window": window, "softcap": softcap, "scale": scale}
    got = paged_prefill(q, k, v, table, rows, lens, impl="triton", **how)
    want = reference(q, k, v, table, rows, lens, **how)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-6)
    one_by_one = paged_attention(q, k, v, table[rows], lens, impl="triton", **how)
    torch.testing.assert_close(got, one_by_one, rtol=0, atol=2e-6)


# Query heads over key/value heads, and contexts that begin before, at and behind multiples of tiles
# and of paged_attention's splits. The tile is the one of a GPU.
@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.usefixtures("triton_runs")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("heads", "runs", "window"),
    [
        ((2, 2), [(0, 0, 131)], None),
        ((3, 1), [(1, 130, 45), (0, 0, 3)], None),
        ((4, 1), [(0, 1000, 33), (2, 64, 1), (1, 256, 5)], None),
        ((8, 1), [(0, 4000, 99)], None),
        ((8, 2), [(1, 4090, 17), (0, 130, 2)], 1024),
        ((17, 1), [(0, 130, 9)], 100),
    ],
    ids=str,
)
def test_groups_positions_and_dtypes(heads, runs, window, dtype, device):
    q, k, v, table, rows, lens = problem(device, runs, heads, 16, 16, dtype)
    got = paged_prefill(q, k, v, table, rows, lens, window=window, impl="triton").double()
    want = reference(q, k, v, table, rows, lens, window)
    naive = paged_attention_reference(q, k, v, table[rows], lens, window).double()
    # Triton's interpreter truncates to bfloat16
    most = 4 if dtype == torch.bfloat16 else 2
    assert (got - want).norm() <= most * (naive - want).norm() + 1e-5
    beside = reference(q, k, v, table, rows, lens - 1, window)
    assert (got - beside).norm() > 3 * (got - want).norm()  # a position less is told apart


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.usefixtures("triton_runs")
@pytest.mark.parametrize(
    ("table", "D"),
    [(table, D) for table in ("WGMMA", "MMA", "ROCM", "FLOAT32") for D in (64, 80, 256)],
)
def test_each_tile_that_some_gpu_has(table, D, monkeypatch, device):
    dtype, tiles = torch.float32 if table == "FLOAT32" else torch.float16, getattr(module, table)
    tile = tiles[next(most for most in tiles if most >= D)]
    monkeypatch.setattr(module, "_tile", lambda *_: tile)
    q, k, v, *where = problem(device, [(0, 70, 75), (1, 0, 3)], (5, 1), D, 24, dtype)
    got = paged_prefill(q, k, v, *where, window=90, impl="triton").double()
    want = reference(q, k, v, *where, 90)
    assert (got - want).abs().max() <= (2e-5 if dtype == torch.float32 else 2e-3)


def test_a_device_has_its_tile(monkeypatch):
    def of(capability, bytes_=2, D=64, hip=None):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(torch.version, "hip", hip)
        return module._tile(D, bytes_, torch.device("cuda"))

    assert of((9, 0)) == module.WGMMA[64]
    assert of((10, 0), D=80) == module.WGMMA[128]
    assert of((8, 6), D=129) == of((12, 0), D=256) == module.MMA[256]
    assert of((9, 4), hip="6.4") == module.ROCM[64]
    assert of((9, 0), bytes_=4) == module.FLOAT32[64]


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.usefixtures("triton_runs", "tiles_of_16")
@pytest.mark.parametrize("window", [None, 9])
def test_a_query_s_bits_are_its_own(window, device):
    """A prompt at once, in chunks, and beside others: tiles begin elsewhere, the bits stay."""
    q, k, v, table, rows, lens = problem(device, [(0, 0, 40), (1, 3, 11)])
    how = {"window": window, "impl": "triton"}
    want = paged_prefill(q, k, v, table, rows, lens, **how)
    for cut in (1, 13, 16):
        parts = [
            paged_prefill(q[at], k, v, table, rows[at], lens[at], **how)
            for at in (slice(cut), slice(cut, None))
        ]
        assert torch.equal(torch.cat(parts), want)
    order = torch.arange(51, device=device).roll(11)
    other = paged_prefill(q[order], k, v, table, rows[order], lens[order], **how)
    assert torch.equal(other, want[order])


@pytest.mark.parametrize("runs", RUNS)
def test_tiles_cover_every_query_once(runs, device):
    *_, rows, lens = problem(device, RUNS[runs])
    for queries in (1, 4, 9):
        tiles = prefill_tiles(rows, lens, queries)
        ends = tiles.unique().tolist()
        assert ends[0] == 0
        assert ends[-1] == len(rows)
        assert tiles.tolist() == ends + [len(rows)] * (len(rows) + 2 - len(ends))
        for start, end in pairwise(ends):
            assert end - start <= queries
            assert rows[start:end].unique().numel() == 1
            assert (lens[start:end].diff() == 1).all()


def test_cpp_and_torch_are_those_of_paged_attention(device):
    q, k, v, table, rows, lens = problem(device, RUNS["decoding beside a chunk"])
    got = paged_prefill(q, k, v, table, rows, lens, window=7, impl="torch")
    assert torch.equal(got, paged_attention(q, k, v, table[rows], lens, window=7, impl="torch"))
    assert paged_prefill(q[:0], k, v, table, rows[:0], lens[:0]).shape == (0, 4, 8)
    with pytest.raises(ValueError, match=r"paged_prefill: .*rows"):
        paged_prefill(q, k, v, table, rows[:-1], lens, impl="torch")
    with pytest.raises(TypeError, match="expected rows of dtype int64"):
        paged_prefill(q, k, v, table, rows.int(), lens, impl="torch")


@pytest.mark.cpu_only("arithmetic")
@pytest.mark.parametrize(
    ("N", "before", "after"),
    [(1024, 268_697_600, 15_233_024), (4096, 4_296_015_872, 240_588_800)],
)
def test_bytes_read_by_a_prompt(N, before, after, device):
    """Keys and values of a prompt in the shape of Qwen2.5-0.5B: float16, 14 query heads over 2 of
    64. docs/kernel-report.md cites the numbers.

    A tile of 18 queries reads up to its last query's position: N = 18 full + rest tokens make
    18 (1 + ... + full) + N positions. 4,096 = 18 x 227 + 10: 469,900 positions of 512 bytes."""
    lens, per_position = torch.arange(1, N + 1, device=device), 2 * 2 * 64 * 2
    queries = queries_of_a_tile(7, 64, 2, device)
    assert queries == 18
    ends = prefill_tiles(torch.zeros_like(lens), lens, queries).unique()
    full = N // queries
    assert N % queries
    assert int(lens[ends[1:] - 1].sum()) == queries * full * (full + 1) // 2 + N
    assert int(lens.sum()) * per_position == before
    assert int(lens[ends[1:] - 1].sum()) * per_position == after


@pytest.fixture
def allocated(monkeypatch):
    """Bytes of every tensor that is allocated by a name that the two ops use."""
    found = []

    def counts(make):
        def counted(*args, **kwargs):
            made = make(*args, **kwargs)
            found.append(made.nbytes)
            return made

        return counted

    monkeypatch.setattr(torch.Tensor, "new_empty", counts(torch.Tensor.new_empty))
    for name in ("empty", "empty_like", "full", "arange", "ones"):
        monkeypatch.setattr(torch, name, counts(getattr(torch, name)))
    return found


@pytest.mark.usefixtures("triton_runs")
@pytest.mark.parametrize("N", [9, 37])
def test_scratch_of_a_prompt_does_not_grow_with_its_context(N, allocated, device):
    """The table is as wide as contexts of 32,768 positions need. Query by query the splits take
    4 heads x 128 splits x (16 + 2) numbers a query."""
    q, k, v, table, rows, lens = problem(device, [(0, 0, N)], D=16, S=16)
    wide = torch.nn.functional.pad(table, (0, 2048 - table.shape[1]), value=2**31 - 1)
    allocated.clear()
    got = paged_prefill(q, k, v, wide, rows, lens, impl="triton")
    assert sum(allocated) - q.nbytes <= 16 * (N + 2)
    assert torch.equal(got, paged_prefill(q, k, v, table, rows, lens, impl="triton"))
    allocated.clear()
    paged_attention(q, k, v, wide[rows], lens, impl="triton")
    assert sum(allocated) >= N * 4 * 128 * 18 * 4
