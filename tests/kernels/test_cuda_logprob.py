"""logprob in CUDA C++, on a CPU: the product's launches through csrc/simt
(tests/kernels/conftest.py), against float64."""

import math

import pytest
import torch

from fusedrl.kernels.kept import Kept
from fusedrl.kernels.logprob import _cuda as logprob_cuda
from fusedrl.kernels.logprob import logprob, logprob_reference
from fusedrl.kernels.logprob._cuda import plan_backward, plan_forward
from fusedrl.kernels.runtime import faults

pytestmark = pytest.mark.cpu_only(
    "csrc/simt runs the CUDA sources on a CPU; on a card they are an implementation like the others"
)

EPS = torch.finfo(torch.float32).eps


def run(
    simt,
    logits,
    ids,
    temperature=1.0,
    ignore_index=-100,
    g=None,
    h=None,
    out=None,
    kept=(None, None),
):
    """(logp, entropy, gradient), twice: the same bits in whatever order threads run."""
    value, per_row = (
        (1.0, temperature.float()) if isinstance(temperature, torch.Tensor) else (temperature, None)
    )
    results = []
    for simt.descending in (False, True):
        (logp, entropy, stats), launches = plan_forward(
            logits, ids, value, per_row, True, ignore_index, *kept
        )
        simt.run(launches)
        grad = (
            torch.empty_like(logits).contiguous().fill_(9.0) if out is None else out.copy_(logits)
        )
        simt.run(
            plan_backward(
                g,
                h,
                logits if out is None else grad,
                ids,
                logp,
                stats,
                value,
                per_row,
                ignore_index,
                *kept,
                grad,
            )
        )
        results.append((logp, entropy, grad.clone()))
    simt.descending = False
    assert all(
        torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(*results, strict=True)
    )
    return results[0]


def by_reference(logits, ids, temperature=1.0, ignore_index=-100, g=None, h=None):
    z = logits.double().requires_grad_()
    logp, entropy = logprob_reference(
        z,
        ids,
        temperature.double() if isinstance(temperature, torch.Tensor) else temperature,
        ignore_index,
    )
    loss = sum(
        (torch.where(x.isfinite(), x, 0) * upstream.double()).sum()
        for x, upstream in ((logp, g), (entropy, h))
        if upstream is not None
    )
    (grad,) = torch.autograd.grad(loss, z)
    return logp.detach(), entropy.detach(), grad


def compare(simt, logits, ids, mask=None, **options):
    logp, entropy, grad = run(simt, logits, ids, **options)
    options = {name: value for name, value in options.items() if name not in ("out", "kept")}
    # the definition of `kept`
    logits = logits if mask is None else logits.masked_fill(~mask, -math.inf)
    want_logp, want_entropy, want_grad = by_reference(logits, ids, **options)
    finite = want_logp > -math.inf
    assert torch.equal(logp > -math.inf, finite)
    assert (
        (logp.double() - want_logp)[finite].abs() <= 8 * EPS * want_logp[finite].abs().clamp(min=1)
    ).all()
    torch.testing.assert_close(
        entropy.double(), want_entropy, rtol=0, atol=1e-5 * max(1.0, math.log(logits.shape[-1]))
    )
    assert grad.dtype == logits.dtype
    ulp = {torch.float32: 1e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}[logits.dtype]
    upstream = sum(
        t.abs()[:, None].double() for t in (options.get("g"), options.get("h")) if t is not None
    )
    assert (
        (grad.double() - want_grad).abs()
        <= ulp * want_grad.abs() + 1e-6 * upstream.clamp(min=1.0) * (1 + want_entropy[:, None])
    ).all()
    return logp, entropy, grad


def make(N, V, seed=0, dtype=torch.float32, sd=3.0):
    generator = torch.Generator().manual_seed(seed + V)
    logits = (sd * torch.randn(N, V, generator=generator)).to(dtype)
    g, h = torch.randn(2, N, generator=generator)
    return logits, torch.randint(V, (N,), generator=generator), g, h


# A thread's vector is 4 or 8 columns, a block's step 1024 or 2048, a backward tile 8192. Odd V
# start the rows at every offset from 16 bytes.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("V", [1, 2, 3, 31, 33, 1023, 2049, 8191, 8197, 20001])
def test_is_the_reference(simt, dtype, V):
    N = 5 if V < 8000 else 3
    logits, ids, g, h = make(N, V, dtype=dtype)
    ids[1] = -100
    ids[-1] = V - 1
    logits[1] = float("nan")
    clean = logits.clone()
    clean[1] = 0.0
    for temperature in (1.0, torch.linspace(0.5, 2.0, N)):
        logp, entropy, grad = run(simt, logits, ids, temperature, g=g, h=h)
        assert logp[1] == entropy[1] == 0
        assert (grad[1] == 0).all()
        compare(simt, clean, ids, temperature=temperature, g=g, h=h)
    compare(simt, clean, ids, g=g)
    compare(simt, clean, ids, h=h, out=torch.empty_like(clean))  # in place


@pytest.mark.parametrize("sd, offset", [(1.0, 1e4), (100.0, 0.0), (1.0, -200.0), (0.0, 5.0)])
def test_scales_and_offsets(simt, sd, offset):
    logits, ids, g, h = make(4, 3001, sd=sd)
    compare(simt, logits + offset, ids, temperature=0.7, g=g, h=h)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.999, 1.0])
def test_infinite_logits(simt, share):
    logits, ids, g, h = make(6, 2050)
    logits[torch.rand(logits.shape, generator=torch.Generator().manual_seed(1)) < share] = -math.inf
    logits[:, 5] = 1.0 if share < 1 else -math.inf
    ids[0], logits[0, 7], ids[1] = 7, -math.inf, 5
    logp, entropy, grad = run(simt, logits, ids, g=g, h=h)
    assert logp[0] == -math.inf
    compare(simt, logits, ids, g=g, h=h)
    if share == 1:
        assert (entropy == 0).all()
        assert (grad == 0).all()


def test_bad_rows_stay_alone(simt):
    logits, ids, g, h = make(5, 1030)
    logits[1, 3], logits[2, 1029], ids[3] = float("nan"), math.inf, 1030
    logp, entropy, grad = run(simt, logits, ids, g=g, h=h)
    assert logp.isnan().tolist() == [False, True, True, True, False]
    assert entropy.isnan().tolist() == [False, True, True, False, False]
    with pytest.raises(IndexError, match="logprob"):
        faults.raise_faults()
    assert grad.isnan().any(1).tolist() == [False, True, True, True, False]
    alone = run(simt, logits[4:], ids[4:], g=g[4:], h=h[4:])
    assert torch.equal(alone[0], logp[4:])
    assert torch.equal(alone[2], grad[4:])


# Rows: a tenth and the label, without the label, not listed, the label alone, every second one, all
# but one, both ends, ignored. What was not kept is NaN.
def truncated(V, dtype=torch.float32):
    logits, ids, g, h = make(8, V, dtype=dtype)
    column = torch.arange(V)
    mask = torch.rand(8, V, generator=torch.Generator().manual_seed(V)) < 0.1
    mask[0, ids[0]] = True
    mask[1] &= column != ids[1]
    mask[2] = True
    mask[3] = column == ids[3]
    mask[4] = (column % 2 == 0) | (column == ids[4])
    mask[5] = column != (ids[5] + 1) % V
    mask[6] = (column == 0) | (column == V - 1)
    mask[1, (ids[1] + 1) % V] = True
    ids[7] = -100
    listed = [
        row.nonzero().squeeze(1).int() if not row.all() else row.new_empty(0, dtype=torch.int32)
        for row in mask
    ]
    kept = Kept(
        torch.cat([*listed, torch.tensor([-3, 2**31 - 1], dtype=torch.int32)]),
        torch.tensor([0, *map(len, listed)]).cumsum(0),
    )
    return logits.masked_fill(~mask, math.nan), ids, g, h, mask, kept


# Maps of tiles of 8192 columns; a search for each tile's first kept column; rows at every offset
# from 16 bytes.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("V", [2, 9, 1033, 8195, 16387])
def test_kept(simt, dtype, V):
    logits, ids, g, h, mask, kept = truncated(V, dtype)
    mask[7] = True
    logits[7] = 0.0  # by_reference looks at it
    logp, entropy, grad = compare(
        simt, logits, ids, mask, kept=kept, temperature=torch.linspace(0.5, 2.0, 8), g=g, h=h
    )
    assert (logp[1], logp[3], entropy[3]) == (-math.inf, 0.0, 0.0)
    assert (grad[~mask] == 0).all()
    in_place = compare(simt, logits, ids, mask, kept=kept, g=g, h=h, out=torch.empty_like(logits))
    assert (in_place[2][~mask] == 0).all()
    whole = run(simt, logits[2:3], ids[2:3], g=g[2:3], h=h[2:3])  # a row that lists nothing
    assert all(torch.equal(a[2:3], b) for a, b in zip(in_place, whole, strict=True))


def test_kept_that_is_wrong_or_holds_nan(simt):
    logits, ids, g, h, mask, kept = truncated(1033)
    logits[0, ids[0]] = math.nan
    offsets = kept.offsets
    token_ids = kept.token_ids.clone()
    token_ids[offsets[5] - 1] = 1033  # of row 4
    token_ids[offsets[6]] = -1
    logp, entropy, grad = run(simt, logits, ids, g=g, h=h, kept=(token_ids, offsets))
    assert (
        logp.isnan().tolist()
        == entropy.isnan().tolist()
        == [True, False, False, False, True, False, True, False]
    )
    assert grad.isnan().any(1).tolist() == logp.isnan().tolist()
    assert (grad[~mask] == 0).all()
    with pytest.raises(IndexError, match="logprob: expected token ids"):
        faults.raise_faults()


def test_an_id_out_of_range_raises_the_flag(simt):
    faults.raise_faults()
    logits, ids, g, h = make(3, 10)
    run(simt, logits, ids, g=g, h=h)
    ids[0] = -100
    run(simt, logits, ids, g=g, h=h)
    faults.raise_faults()
    for wrong in (10, -1):
        ids[1] = wrong
        run(simt, logits, ids, g=g, h=h)
        with pytest.raises(IndexError, match="logprob: expected token ids"):
            faults.raise_faults()
        faults.raise_faults()


def test_writes_nothing_else(simt):
    """Rows of a wider tensor that starts off a 16-byte boundary: nothing between the rows is read
    into anything or written."""
    logits, ids, g, h = make(4, 1001)
    wide = torch.full((4, 1013), float("nan"))
    view = wide[:, 3:1004]
    view.copy_(logits)
    logp, entropy, grad = run(simt, view, ids, g=g, h=h)
    plain = run(simt, logits, ids, g=g, h=h)
    torch.testing.assert_close(logp, plain[0])
    torch.testing.assert_close(entropy, plain[1])
    assert torch.equal(wide[:, 3:1004], logits)
    assert wide[:, :3].isnan().all()
    assert wide[:, 1004:].isnan().all()
    target = torch.full((4, 1013), 123.0)
    in_place = run(simt, logits, ids, g=g, h=h, out=target[:, 3:1004])[2]
    torch.testing.assert_close(in_place, grad, rtol=1e-5, atol=1e-6)
    assert (target[:, :3] == 123.0).all()
    assert (target[:, 1004:] == 123.0).all()


def test_ops_as_torch_sees_them(simt):
    def forward(*arguments):
        outputs, launches = plan_forward(*arguments)
        simt.run(launches)
        return outputs

    def backward(g, h, logits, *rest):
        simt.run(plan_backward(g, h, rest[-1] if logits is None else logits, *rest))

    logprob_cuda.logprob_cuda.register_kernel("cpu")(forward)
    logprob_cuda._logprob_cuda_backward.register_kernel("cpu")(backward)
    logits, ids, g, h = make(3, 41)
    leaf = logits.clone().requires_grad_()
    kept = Kept(torch.tensor([0, 7, 8, 20, 40], dtype=torch.int32), torch.tensor([0, 3, 5, 5]))
    for truncation in ((None, None), kept):
        torch.library.opcheck(
            torch.ops.fusedrl.logprob_cuda, (leaf, ids, 0.7, None, True, -100, *truncation)
        )
    want = by_reference(logits, ids, 0.7, g=g, h=h)[2]
    compiled = torch.compile(torch.ops.fusedrl.logprob_cuda, fullgraph=True, backend="aot_eager")
    for function in (logprob_cuda.logprob_cuda, logprob_cuda.InPlaceCuda.apply, compiled):
        made = leaf * 1
        logp, entropy, _ = function(made, ids.int(), 0.7, None, True, -100, None, None)
        (grad,) = torch.autograd.grad((logp * g + entropy * h).sum(), made)
        torch.testing.assert_close(grad.double(), want, rtol=1e-5, atol=5e-6)
    # In place: the logits are the gradient now, and whoever saved them is told.
    made = leaf * 1
    saved = made.square()
    logp, _, _ = logprob_cuda.InPlaceCuda.apply(made, ids, 0.7, None, False, -100, None, None)
    (grad,) = torch.autograd.grad(logp.sum(), made, retain_graph=True)
    assert torch.equal(grad, made)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.sum().backward()


def test_no_rows(simt):
    logp, entropy, grad = run(simt, torch.zeros(0, 7), torch.zeros(0, dtype=torch.long))
    assert logp.shape == entropy.shape == (0,)
    assert grad.shape == (0, 7)


def test_is_refused_on_cpu_tensors():
    with pytest.raises(RuntimeError, match=r"'cuda' cannot run on cpu.*CUDA tensors only"):
        logprob(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), impl="cuda")
