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
    monkeypatch.setattr(
        module,
        "_shape",
        lambda group, D, bytes_: {
            "HEADS": min(group, 16),
            "BLOCK_D": max(16, 1 << (D - 1).bit_length()),
            "R": 16,
            "C": 16,
        },
    )


def problem(device, runs, heads=(4, 2), D=8, S=4, dtype=torch.float32, fill=float("nan"), seed=0):
    """`runs`: (row, position before the first query, queries), in the order of the queries. Slots
    that no row needs hold `fill`, and entries of the table that none needs point far away."""
    draw = torch.Generator().manual_seed(seed)
    lens = {}
    for row, before, queries in runs:
        lens[row] = max(lens.get(row, 0), before + queries)
    B, M = max(lens) + 1, max(-(-n // S) for n in lens.values()) + 1
    blocks = sum(-(-n // S) for n in lens.values()) + 1
    table = torch.full((B, M), 2**31 - 1, dtype=torch.int32, device="cpu")
    free = torch.randperm(blocks, generator=draw, device="cpu").tolist()
    k = torch.full((blocks, heads[1], D, S), fill, device="cpu")
    v = torch.full((blocks, heads[1], S, D), fill, device="cpu")
    for row, n in lens.items():
        for t in range(n):
            if t % S == 0:
                table[row, t // S] = free.pop()
            block = int(table[row, t // S])
            k[block, :, :, t % S], v[block, :, t % S] = torch.randn(
                2, heads[1], D, generator=draw, device="cpu"
            )
    rows = torch.tensor([row for row, _, queries in runs for _ in range(queries)], device="cpu")
    seen = torch.tensor([before + i + 1 for _, before, n in runs for i in range(n)], device="cpu")
    q = torch.randn(len(rows), heads[0], D, generator=draw, device="cpu")
    return tuple(
        x.to(device) for x in (q.to(dtype), k.to(dtype), v.to(dtype), table, rows.long(), seen)
    )


RUNS = {
    "one prompt": [(0, 0, 37)],
    "one token": [(0, 20, 1)],
    "decoding beside a chunk": [(1, 6, 1), (3, 30, 1), (0, 9, 22), (2, 0, 1)],
    "rows in turns": [(0, 0, 3), (1, 0, 5), (0, 3, 6), (1, 5, 2), (1, 7, 20)],
    "the same length again": [(0, 4, 2), (1, 6, 3)],
}


# numpy, under the interpreter: a score that is replaced afterwards
@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize(("window", "softcap", "scale"), [(None, None, None), (7, 1.5, 0.9)])
@pytest.mark.parametrize("heads", [(4, 2), (7, 1)], ids=str)
@pytest.mark.parametrize("runs", RUNS)
@pytest.mark.usefixtures("triton_runs", "tiles_of_16")
def test_triton_is_the_definition(runs, heads, window, softcap, scale, device):
    q, k, v, table, rows, lens = problem(device, RUNS[runs], heads)
    how = {"window": window, "softcap": softcap, "scale": scale}
    got = paged_prefill(q, k, v, table, rows, lens, impl="triton", **how)
    want = paged_attention_reference(
        q.double(), k.double(), v.double(), table[rows], lens, window, softcap, scale
    )
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-6)
    one_by_one = paged_attention(q, k, v, table[rows], lens, impl="triton", **how)
    torch.testing.assert_close(got, one_by_one, rtol=0, atol=2e-6)


@pytest.mark.usefixtures("triton_runs")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tiles_as_they_are(dtype, device):
    q, k, v, table, rows, lens = problem(device, [(0, 0, 150)], (7, 1), 16, 16, dtype)
    got = paged_prefill(q, k, v, table, rows, lens, impl="triton").double()
    want = paged_attention_reference(q.double(), k.double(), v.double(), table[rows], lens)
    naive = paged_attention_reference(q, k, v, table[rows], lens).double()
    # Triton's interpreter truncates to bfloat16
    most = 4 if dtype == torch.bfloat16 else 2
    assert (got - want).norm() <= most * (naive - want).norm() + 1e-5


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
    order = torch.cat([torch.arange(40, 51), torch.arange(40)]).to(device)
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
def test_bytes_read_by_a_prompt():
    """Keys and values of a prompt of 4,096 tokens in the shape of Qwen2.5-0.5B: float16, 14 query
    heads over 2 of 64. docs/gpu.md cites the two numbers."""
    lens, per_position = torch.arange(1, 4097), 2 * 2 * 64 * 2
    queries = queries_of_a_tile(7, 64, 2)
    tiles = prefill_tiles(torch.zeros(4096, dtype=torch.int64), lens, queries)
    ends = tiles.unique()
    before, after = int(lens.sum()) * per_position, int(lens[ends[1:] - 1].sum()) * per_position
    assert queries == 18
    assert (before, after) == (4_296_015_872, 239_720_448)
