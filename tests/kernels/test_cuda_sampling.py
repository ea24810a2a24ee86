"""sample in CUDA C++, on a CPU: the product's launches through csrc/simt
(tests/kernels/conftest.py), against float64."""

import math

import pytest
import torch

from fusedrl.kernels.sampling import _cuda as sampling_cuda
from fusedrl.kernels.sampling import sample, sample_reference, uniform
from fusedrl.kernels.sampling._cuda import plan_sample

pytestmark = pytest.mark.cpu_only(
    "csrc/simt runs the CUDA sources on a CPU; on a card they are an implementation like the others"
)

INF = math.inf
# One row of each: temperature, top-k, top-p, min-p.
ROWS = [
    (1.0, 0, 1.0, 0.0),
    (0.0, 3, 0.2, 0.9),
    (0.7, 5, 1.0, 0.0),
    (1.3, 0, 0.8, 0.0),
    (1.0, 0, 1.0, 0.1),
    (0.9, 40, 0.9, 0.02),
    (0.05, 0, 1.0, 0.0),
]


def keys_for(B, seed=0):
    return torch.randint(-(2**63), 2**63 - 1, (B, 4), generator=torch.Generator().manual_seed(seed))


def columns(rows):
    return [torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True)]


def run(simt, logits, parameters, keys, suppress=None, capacity=None):
    """The outputs, twice: the same bits in whatever order threads run."""
    results = []
    for simt.descending in (False, True):
        outputs, launches = plan_sample(
            logits, *parameters, keys, suppress, logits.numel() if capacity is None else capacity
        )
        simt.run(launches)
        end = int(outputs[6][-1])
        results.append((*outputs[:5], outputs[5][:end].clone(), outputs[6]))
    simt.descending = False
    assert all(
        torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(*results, strict=True)
    )
    return results[0]


def compare(drawn, logits, parameters, keys, suppress=None):
    ids, logp, processed, entropy, count, kept, offsets = drawn
    want = sample_reference(logits.double(), *parameters, keys, suppress, logits.numel())
    assert torch.equal(ids, want.token_ids)
    assert torch.equal(count, want.kept_count)
    assert torch.equal(offsets, want.kept.offsets)
    assert torch.equal(kept, want.kept.token_ids[: offsets[-1]])
    for got, expected, slack in (
        (logp, want.logp, 1e-6),
        (processed, want.logp_processed, 1e-6),
        (entropy, want.entropy, 1e-5),
    ):
        assert got.dtype == torch.float32
        assert ((got.double() - expected).abs() <= slack * expected.abs().clamp(min=1)).all()


# A thread's vector is 4 or 8 tokens, a warp's step 128 or 256, the smallest segment of a warp that,
# a block's tile of the draw 2048 or 4096.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("V", [1, 2, 33, 127, 129, 2049, 5003])
@pytest.mark.parametrize("suppressed", [False, True])
def test_is_the_reference(simt, dtype, V, suppressed):
    generator, B = torch.Generator().manual_seed(V), len(ROWS)
    logits = (torch.randn(B, V, generator=generator) * 3 * 4).round() / 4  # quarters: many ties
    logits[1::2] += torch.randn(logits[1::2].shape, generator=generator) / 50
    logits[:, : V // 3][torch.rand(B, V // 3, generator=generator) < 0.2] = -INF
    logits[0] = logits[0].clamp(min=-20)  # the sums of the one read serve
    logits = logits.to(dtype)
    suppress = (torch.rand(B, V, generator=generator) < 0.3) if suppressed else None
    if suppressed:
        suppress[:, V // 2] = False
        logits[:, V // 2] = 1.0
    keys, parameters = keys_for(B, V), columns(ROWS)
    compare(run(simt, logits, parameters, keys, suppress), logits, parameters, keys, suppress)


@pytest.mark.parametrize("B, V", [(40, 9000), (5, 70001)])
def test_a_draw_of_every_segment(simt, B, V):
    # equal logits: the token is floor(u V), in whatever segment and tile; and the numbers are the
    # reference's
    logits, keys, T = (
        torch.zeros(1, V).expand(B, -1),
        keys_for(B),
        torch.ones(1, dtype=torch.float64),
    )
    ids = run(simt, logits, (T, None, None, None), keys)[0]
    assert torch.equal(ids, (uniform(keys) * V).long())
    assert len(ids.unique()) == B


@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0, 1e4])
def test_scales(simt, scale):
    logits = torch.randn(len(ROWS), 3001, generator=torch.Generator().manual_seed(3)) * scale
    keys, parameters = (
        keys_for(len(ROWS)),
        columns([(max(T, 0.5) if T else T, k, p, m) for T, k, p, m in ROWS]),
    )
    compare(run(simt, logits, parameters, keys), logits, parameters, keys)


def test_tiny_temperatures(simt):
    logits, keys = torch.tensor([[1.0, 3.0, 2.0, 3.0]]).expand(20, 4), keys_for(20)
    parameters = columns([(1e-40, 0, 1.0, 0.0)])
    assert set(run(simt, logits, (*parameters[:1], None, None, None), keys)[0].tolist()) == {1, 3}


def test_rows_that_cannot_be_drawn_from_stay_alone(simt):
    B, V = 6, 500
    logits, suppress = torch.zeros(B, V), torch.zeros(B, V, dtype=torch.bool)
    logits[0, 7], logits[1, 499], logits[2], suppress[3], logits[4, 3] = (
        math.nan,
        INF,
        -INF,
        True,
        5.0,
    )
    parameters = columns([(1.0, 0, 0.9, 0.0)] * B)
    ids, logp, processed, entropy, count, _, offsets = run(
        simt, logits, parameters, keys_for(B), suppress
    )
    assert (ids < 0).tolist() == [True] * 4 + [False] * 2
    assert all(x.isnan().tolist() == [True] * 4 + [False] * 2 for x in (logp, processed, entropy))
    assert count[:4].sum() == offsets[4] == 0
    alone = run(
        simt, logits[4:].clone(), [x[4:] for x in parameters], keys_for(B)[4:], suppress[4:]
    )
    assert torch.equal(alone[1], logp[4:])
    assert torch.equal(alone[0], ids[4:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_bits_do_not_depend_on_where_a_row_lies(simt, dtype):
    B, V = len(ROWS), 1001
    logits, keys, parameters = (
        (torch.randn(B, V, generator=torch.Generator().manual_seed(6)) * 2).to(dtype),
        keys_for(B),
        columns(ROWS),
    )
    plain = run(simt, logits, parameters, keys)
    # rows of a wider tensor, off a 16-byte boundary, between NaN
    wide = torch.full((B, V + 12), math.nan, dtype=dtype)
    wide[:, 3 : V + 3] = logits
    for other in (wide[:, 3 : V + 3], logits.T.contiguous().T):
        assert all(
            torch.equal(a, b)
            for a, b in zip(run(simt, other, parameters, keys), plain, strict=True)
        )
    for b in (1, 3, 5):
        alone = run(
            simt, logits[b : b + 1].clone(), [x[b : b + 1] for x in parameters], keys[b : b + 1]
        )
        assert all(torch.equal(x, y[b : b + 1]) for x, y in zip(alone[:5], plain[:5], strict=True))
        assert torch.equal(alone[5], plain[5][plain[6][b] : plain[6][b + 1]])


def test_capacity(simt):
    """Rows of 3, 0, 4 and 2 kept tokens: from the first that does not fit on, those that are listed
    have token -1."""
    logits = torch.arange(10.0).expand(4, 10)
    parameters = columns(
        [(1.0, 3, 1.0, 0.0), (1.0, 0, 1.0, 0.0), (1.0, 4, 1.0, 0.0), (1.0, 2, 1.0, 0.0)]
    )
    for capacity, ends, lost in (
        (9, [3, 3, 7, 9], []),
        (8, [3, 3, 7, 7], [3]),
        (6, [3, 3, 3, 3], [2, 3]),
        (2, [0] * 4, [0, 2, 3]),
        (0, [0] * 4, [0, 2, 3]),
    ):
        drawn = run(simt, logits, parameters, keys_for(4), capacity=capacity)
        assert drawn[6].tolist() == [0, *ends]
        assert (drawn[0] < 0).nonzero().flatten().tolist() == lost
        assert drawn[5].tolist() == ([7, 8, 9] + [6, 7, 8, 9] + [8, 9])[: ends[-1]]
        want = sample_reference(logits, *parameters, keys_for(4), None, capacity)
        assert torch.equal(drawn[0], want.token_ids)
        assert torch.equal(drawn[6], want.kept.offsets)


def test_op_as_torch_sees_it(simt):
    def kernel(*arguments):
        outputs, launches = plan_sample(*arguments)
        simt.run(launches)
        return outputs

    sampling_cuda.sample_cuda.register_kernel("cpu")(kernel)
    logits, keys = torch.randn(3, 41, generator=torch.Generator().manual_seed(1)), keys_for(3)
    one, k = torch.ones(1, dtype=torch.float64), torch.full((3,), 4.0, dtype=torch.float64)
    torch.library.opcheck(
        torch.ops.fusedrl.sample_cuda, (logits, one, k, None, None, keys, None, 12)
    )
    compiled = torch.compile(torch.ops.fusedrl.sample_cuda, fullgraph=True, backend="aot_eager")
    for capacity in (None, 12):
        want = torch.ops.fusedrl.sample_cuda(logits, one, k, None, None, keys, None, capacity)
        assert all(
            torch.equal(a, b)
            for a, b in zip(
                compiled(logits, one, k, None, None, keys, None, capacity), want, strict=True
            )
        )
        assert [x.shape[0] for x in want[5:]] == ([0, 0] if capacity is None else [12, 4])


def test_no_rows(simt):
    outputs, launches = plan_sample(
        torch.zeros(0, 7),
        torch.ones(1, dtype=torch.float64),
        None,
        None,
        None,
        keys_for(0),
        None,
        0,
    )
    assert not launches
    assert outputs[6].tolist() == [0]


def test_is_refused_on_cpu_tensors():
    with pytest.raises(RuntimeError, match=r"'cuda' cannot run on cpu.*CUDA tensors only"):
        sample(torch.zeros(2, 3), temperature=1.0, keys=keys_for(2), impl="cuda")


# top-p searches what can be kept in shared memory, 4,096 tokens at the most: a few of a peaked row,
# more than fit of a flat one, all of a small one; and a p that is nearly 1 searches the row.
@pytest.mark.parametrize("V, scale", [(7, 3.0), (2049, 3.0), (5003, 0.1), (9001, 4.0)])
@pytest.mark.parametrize("suppressed", [False, True])
def test_top_p_in_shared_memory(simt, V, scale, suppressed):
    rows = [(1.0, 0, 0.95, 0.0), (0.8, 20, 0.5, 0.1), (1.0, 0, 0.99999, 0.0), (1.5, 0, 0.6, 0.05)]
    generator = torch.Generator().manual_seed(V)
    logits = torch.randn(4, V, generator=generator) * scale
    logits[3] = (logits[3] * 2).round() / 2  # ties
    logits = logits.bfloat16()
    suppress = (torch.rand(4, V, generator=generator) < 0.3) if suppressed else None
    if suppressed:
        suppress[:, V // 2] = False
    keys, parameters = keys_for(4, V), columns(rows)
    compare(run(simt, logits, parameters, keys, suppress), logits, parameters, keys, suppress)
