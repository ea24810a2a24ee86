"""Log-probabilities and entropies of logits, and their gradients, against float64.

One file: the cases of rows, dtypes and masks that both ways share.
"""

import math

import pytest
import torch

from fusedrl.engine.tools.verify.catalogue import CATALOGUE
from fusedrl.engine.tools.verify.grid import interpreted
from fusedrl.kernels.kept import Kept
from fusedrl.kernels.logprob import logprob, logprob_, logprob_reference
from fusedrl.kernels.runtime import native
from fusedrl.kernels.runtime.dispatch import unavailable

EPS = torch.finfo(torch.float32).eps


def oracle(device, logits, token_ids, temperature=1.0, g=None, h=None):
    """float64, written from the definition, one row at a time; a second opinion beside the
    reference."""
    logps, entropies, grads = [], [], []
    for n in range(logits.shape[0]):
        z, y = logits[n].double(), int(token_ids[n])
        T = float(temperature[n]) if isinstance(temperature, torch.Tensor) else temperature
        if y == -100 or bool((z == -math.inf).all()):
            logps.append(0.0 if y == -100 else -math.inf)
            entropies.append(0.0)
            grads.append(torch.zeros_like(z))
            continue
        log_p = torch.log_softmax(z / T, 0)
        p = log_p.exp()
        H = -(p * log_p.masked_fill(p == 0, 0.0)).sum()
        one = torch.zeros_like(z)
        one[y] = 1.0
        G = 0.0 if g is None or float(log_p[y]) == -math.inf else float(g[n])
        grad = G * (one - p)
        if h is not None:
            grad = grad - float(h[n]) * p * (log_p.masked_fill(p == 0, 0.0) + H)
        logps.append(float(log_p[y]))
        entropies.append(float(H))
        grads.append(grad / T)
    return (
        torch.tensor(logps, dtype=torch.float64, device=device),
        torch.tensor(entropies, dtype=torch.float64, device=device),
        torch.stack(grads),
    )


def assert_logp(got, want):
    finite = want > -math.inf
    assert torch.equal(got > -math.inf, finite)
    error = (got.double() - want)[finite].abs() / want[finite].abs().clamp_min(1.0)
    assert not finite.any() or error.max() <= 8 * EPS, f"{error.max() / EPS:.1f} eps"


def listed(device, mask):
    """Kept of a bool mask [N, V]; a row that is all True is not listed. Nonsense lies behind the
    last id."""
    rows = [
        row.nonzero().squeeze(1).int()
        if not row.all()
        else torch.empty(0, dtype=torch.int32, device=device)
        for row in mask
    ]
    return Kept(
        torch.cat([*rows, torch.tensor([-5, 2**31 - 1], dtype=torch.int32, device=device)]),
        torch.tensor([0, *(len(row) for row in rows)], device=device).cumsum(0),
    )


def compare(device, logits, token_ids, temperature, impl, function=logprob, mask=None):
    kept = None if mask is None else listed(device, mask)
    generator = torch.Generator().manual_seed(1)
    g, h = (torch.randn(token_ids.shape, generator=generator).to(device) for _ in range(2))
    leaf = logits.detach().clone().requires_grad_()
    logp, entropy = function(
        leaf * 1 if function is logprob_ else leaf,
        token_ids,
        temperature=temperature,
        entropy=True,
        kept=kept,
        impl=impl,
    )
    want_logp, want_entropy, want_grad = oracle(
        device,
        logits if mask is None else logits.masked_fill(~mask, -math.inf),
        token_ids,
        temperature,
        g,
        h,
    )
    assert logp.dtype == entropy.dtype == torch.float32
    assert_logp(logp.detach(), want_logp)
    torch.testing.assert_close(
        entropy.double(), want_entropy, rtol=0, atol=1e-5 * max(1.0, math.log(logits.shape[-1]))
    )
    torch.where(logp > -math.inf, logp * g, 0.0).sum().add((entropy * h).sum()).backward()
    assert leaf.grad.dtype == logits.dtype
    if logits.dtype == torch.float32:
        torch.testing.assert_close(leaf.grad.double(), want_grad, rtol=1e-5, atol=1e-6)
    else:
        rounded = want_grad.to(logits.dtype).double()
        ulp = torch.finfo(logits.dtype).eps * rounded.abs()
        assert ((leaf.grad.double() - rounded).abs() <= ulp + 1e-6).all()
    return logp.detach(), entropy.detach(), leaf.grad


def rows(device, V, N=5, seed=0, scale=3.0, offset=0.0):
    generator = torch.Generator().manual_seed(seed + V)
    logits = torch.randn(N, V, generator=generator).to(device) * scale + offset
    ids = torch.randint(0, V, (N,), generator=generator).to(device)
    ids[0], ids[N - 1] = 0, V - 1
    if N > 3:
        ids[2] = -100
        logits[2] = torch.nan  # an ignored row may hold anything
    return logits, ids


# V: one or two columns; around a vector (16), around the C++ block (1024) and the Triton block
# (4096), which decides what a tail may see.
@pytest.mark.each_impl("logprob")
@pytest.mark.parametrize("V", [1, 2, 15, 16, 33, 1023, 1025, 4096, 4097, 9001])
def test_matches_float64(impl, V, device):
    logits, ids = rows(device, V)
    compare(device, logits, ids, 1.0, impl)
    compare(device, logits, ids, 0.7, impl, logprob_)
    compare(device, logits, ids, torch.tensor([0.3, 1.0, 2.0, 0.7, 5.0], device=device), impl)


@pytest.mark.parametrize("V", [32000, 50257, 151936])
def test_large_vocabularies(V, device):
    logits, ids = rows(device, V, N=3)
    for impl in CATALOGUE["logprob"].implementations(device):
        if interpreted(impl, device):
            continue
        compare(device, logits, ids, 0.7, impl)


# Offsets at which dividing before subtracting fails; spreads at which exp underflows; rows far
# below zero, where a phantom column of zeros beyond V would take all the mass.
@pytest.mark.each_impl("logprob")
@pytest.mark.parametrize(
    "scale,offset",
    [(1.0, 1e4), (1.0, -1e4), (100.0, 0.0), (0.0, 0.0), (0.01, -200.0), (3.0, 65504.0)],
)
def test_offsets_and_spreads(impl, scale, offset, device):
    for V in (1025, 4097):
        logits, ids = rows(device, V, scale=scale, offset=offset)
        compare(device, logits, ids, 0.7, impl)


@pytest.mark.each_impl("logprob")
def test_many_equal_terms_do_not_drift(impl, device):
    # one peak and V - 1 equal columns: every rounding has the same sign
    V = 32000 if not interpreted(impl, device) else 5000
    levels = torch.linspace(-1.0, -14.0, 24 if not interpreted(impl, device) else 6, device=device)
    logits = levels[:, None].repeat(1, V)
    logits[:, V // 2] = 0.0
    logp = logprob(logits, torch.full((len(levels),), V // 2, device=device), impl=impl)
    assert_logp(logp, -torch.log1p((V - 1) * torch.exp(logits[:, 0].double())))


@pytest.mark.each_impl("logprob")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits(impl, dtype, device):
    for V in (33, 1025, 4100):
        logits, ids = rows(device, V)
        compare(device, logits.to(dtype), ids, 0.7, impl)
        compare(device, logits.to(dtype), ids, 1.0, impl, logprob_)


@pytest.mark.each_impl("logprob")
@pytest.mark.parametrize("function", [logprob, logprob_])
def test_minus_infinity(impl, function, device):
    logits, ids = rows(device, 4100, N=6)
    logits[0, 1:] = -torch.inf  # only the label is left: logp 0
    logits[1, :4000] = -torch.inf
    logits[1, 0], ids[1] = -torch.inf, 0  # a label on -inf
    logits[3] = -torch.inf
    logits[4, ::2], ids[4] = -torch.inf, 1
    logp, entropy, grad = compare(device, logits, ids, 0.7, impl, function)
    assert (logp[0], entropy[0], logp[3], entropy[3]) == (0.0, 0.0, -math.inf, 0.0)
    assert (grad[torch.isneginf(logits)] == 0).all()
    # a gradient that does reach the label on -inf and the empty row
    leaf = logits.clone().requires_grad_()
    logprob(leaf, ids, impl=impl).nan_to_num(neginf=-1.0).backward(torch.ones(6, device=device))
    assert (leaf.grad[[1, 3]] == 0).all()


@pytest.mark.each_impl("logprob")
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_poison_stays_in_its_row(impl, poison, device):
    clean, ids = rows(device, 2100)
    dirty = clean.clone()
    dirty[1, 1500] = poison
    outs = []
    for logits in (clean, dirty):
        leaf = logits.clone().requires_grad_()
        logp, entropy = logprob(leaf, ids, entropy=True, impl=impl)
        (logp.sum() + entropy.sum()).backward()
        outs.append((logp.detach(), entropy.detach(), leaf.grad))
    others = torch.tensor([0, 2, 3, 4], device=device)
    for a, b in zip(*outs, strict=True):
        assert torch.equal(a[others], b[others])
        assert b[1].isnan().all()


@pytest.mark.each_impl("logprob", but=("torch",))
def test_a_row_without_upstream_gradient_is_zero(impl, device):
    logits, ids = rows(device, 2100)
    logits[1] = torch.nan
    leaf = logits.clone().requires_grad_()
    logp = logprob(leaf, ids, impl=impl)
    logp.backward(torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0], device=device))
    assert (leaf.grad[1:4] == 0).all()
    assert torch.isfinite(leaf.grad).all()


@pytest.mark.each_impl("logprob")
def test_rows_depend_on_nothing_else(impl, device):
    logits, ids = rows(device, 1300, N=9)
    together = logprob(logits, ids, temperature=0.7, entropy=True, impl=impl)
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            together, logprob(logits, ids, temperature=0.7, entropy=True, impl=impl), strict=True
        )
    )
    for n in (0, 4, 8):
        alone = logprob(logits[n : n + 1], ids[n : n + 1], temperature=0.7, entropy=True, impl=impl)
        assert torch.equal(alone[0], together[0][n : n + 1])
        assert torch.equal(alone[1], together[1][n : n + 1])
    # the entropy changes no bit of logp
    assert torch.equal(logprob(logits, ids, temperature=0.7, impl=impl), together[0])


@pytest.mark.cpu_only("the C++ kernels")
@pytest.mark.skipif(not native.capability, reason=native.reason)
def test_thread_count_changes_nothing(device):
    logits, ids = rows(device, 3000, N=64)
    outs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            leaf = logits.clone().requires_grad_()
            logp, entropy = logprob(leaf, ids, entropy=True, impl="cpp")
            (logp.sum() + entropy.sum()).backward()
        finally:
            torch.set_num_threads(1)
        outs.append((logp.detach(), entropy.detach(), leaf.grad))
    assert all(torch.equal(a, b) for out in outs[1:] for a, b in zip(outs[0], out, strict=True))


# Padded vocabulary, every other row, a shifted [B, T, V], rows of an expanded tensor, misaligned
# rows, no leading dimension at all.
LAYOUTS = {
    "padded": lambda t: t.new_zeros(4, 6, 70)[:, :, :67].copy_(t),
    "skipped": lambda t: t.new_zeros(8, 6, 67)[::2].copy_(t),
    "shifted": lambda t: t.new_zeros(4, 9, 67)[:, 1:7].copy_(t),
    "swapped": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "misaligned": lambda t: t.new_zeros(t.numel() + 1)[1:].view(t.shape).copy_(t),
    "four dimensions": lambda t: t.new_zeros(3, 5, 4, 70)[:2, :3, :, :67].copy_(
        t.view(2, 3, 4, 67)
    ),
}


@pytest.mark.each_impl("logprob")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_row_strides(impl, layout, device):
    plain = torch.randn(4, 6, 67, generator=torch.Generator().manual_seed(0)).to(device)
    strided = LAYOUTS[layout](plain)
    plain = plain.view(strided.shape)
    ids = torch.randint(0, 67, strided.shape[:-1], generator=torch.Generator().manual_seed(1)).to(
        device
    )
    results = []
    for logits in (plain, strided):
        leaf = logits.detach().requires_grad_()
        before = leaf.detach().clone()
        logp = logprob(leaf, ids, impl=impl)
        logp.sum().backward()
        assert torch.equal(leaf.detach(), before)
        results.append((logp.detach(), leaf.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    computed = torch.empty_strided(strided.shape, strided.stride(), device=device).copy_(leaf)
    assert computed.stride() == strided.stride()
    leaf.grad = None
    if interpreted(impl, device) and layout not in ("padded", "misaligned"):
        with pytest.raises(ValueError, match=r"expected logits that view as \[N, V\]"):
            logprob_(computed, ids, impl=impl)
        return
    logprob_(computed, ids, impl=impl).sum().backward()
    assert torch.equal(leaf.grad, results[0][1])


@pytest.mark.each_impl("logprob")
def test_expanded_rows_and_no_rows(impl, device):
    logits = torch.randn(1, 40, device=device).expand(3, 40)
    assert torch.equal(
        logprob(logits, torch.tensor([5, 5, 6], device=device), impl=impl)[0],
        logprob(logits[0], torch.tensor(5, device=device), impl=impl),
    )
    for shape in ((0,), (0, 3), (2, 0)):
        leaf = torch.randn(*shape, 7, device=device).requires_grad_()
        logp, entropy = logprob(
            leaf, torch.zeros(shape, dtype=torch.int64, device=device), entropy=True, impl=impl
        )
        assert logp.shape == entropy.shape == shape
        (logp.sum() + entropy.sum()).backward()
        assert leaf.grad.shape == leaf.shape
    ids = torch.tensor([3, -100], dtype=torch.int32, device=device)
    assert torch.equal(
        logprob(logits[:2], ids, impl=impl), logprob(logits[:2], ids.long(), impl=impl)
    )


# Element offsets beyond 2^31, on memory that is barely touched.
@pytest.mark.each_impl("logprob", but=("torch",))
def test_offsets_beyond_int32(impl, device):
    V, far = 40, 2**31
    try:
        storage = torch.empty(far + V, device=device)
    except RuntimeError as error:
        pytest.skip(f"no 8 GiB of address space: {error}")
    logits = storage.as_strided((2, V), (far, 1)).copy_(
        torch.randn(2, V, generator=torch.Generator().manual_seed(0)).to(device)
    )
    ids = torch.tensor([1, 39], device=device)
    assert torch.equal(logprob(logits, ids, impl=impl), logprob(logits.clone(), ids, impl=impl))


@pytest.mark.each_impl("logprob")
def test_logprob_in_place_is_refused_where_it_would_be_wrong(impl, device):
    logits, ids = torch.randn(3, 40, device=device), torch.tensor([0, 5, 39], device=device)
    leaf = logits.clone().requires_grad_()
    with pytest.raises(ValueError, match="got a leaf that requires a gradient"):
        logprob_(leaf, ids, impl=impl)
    with pytest.raises(ValueError, match="rows lie apart in memory"):
        logprob_((leaf[:1] * 1).expand(3, 40), ids, impl=impl)
    capped = torch.tanh(leaf)  # saved its own result
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logprob_(capped, ids, impl=impl).sum().backward()
    computed = leaf * 1
    loss = logprob_(computed, ids, impl=impl).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    computed = leaf * 1
    both = logprob(computed, ids, impl=impl).sum() + logprob_(computed, ids, impl=impl).sum()
    leaf.grad = None
    refused = None
    try:
        both.backward()  # right when the reader goes first, refused when it comes second
    except RuntimeError as error:
        refused = str(error)
    if refused is None:
        _, _, want = oracle(device, logits, ids, 1.0, torch.full((3,), 2.0, device=device))
        torch.testing.assert_close(leaf.grad.double(), want, rtol=1e-5, atol=1e-6)
    else:
        assert "modified by an inplace operation" in refused
    with torch.no_grad():
        assert torch.equal(logprob_(logits, ids, impl=impl), logprob(logits, ids, impl=impl))


@pytest.mark.each_impl("logprob")
def test_only_one_of_the_two_gradients(impl, device):
    logits, ids = rows(device, 1100)
    for pick in (0, 1):
        g = torch.randn(5, generator=torch.Generator().manual_seed(3)).to(device)
        leaf = logits.clone().requires_grad_()
        (logprob(leaf, ids, entropy=True, impl=impl)[pick] * g).sum().backward()
        zero = torch.zeros(5, device=device)
        _, _, want = oracle(
            device, logits, ids, 1.0, g if pick == 0 else zero, g if pick == 1 else zero
        )
        torch.testing.assert_close(leaf.grad.double(), want, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            leaf.grad.double().sum(-1),
            torch.zeros(5, dtype=torch.float64, device=device),
            rtol=0,
            atol=1e-5,
        )


# ---- kept: the definition is that of logits masked by -inf ---------------------------------------
def truncated(device, V, seed=0, dtype=torch.float32):
    """(logits, ids, mask) of 8 rows: some kept, label outside, ignored, not listed, only the label,
    half of them, nearly all, both ends. What was not kept is NaN."""
    logits, ids = rows(device, V, N=8, seed=seed)
    mask = torch.rand(8, V, generator=torch.Generator().manual_seed(seed)).to(device) < 0.1
    mask[torch.arange(8, device=device), ids.clamp(min=0)] = True
    mask[1, ids[1]] = V == 1
    mask[3] = True
    mask[4] = torch.arange(V, device=device) == ids[4]
    mask[5] |= torch.arange(V, device=device) % 2 == 0
    mask[6] = torch.arange(V, device=device) != (ids[6] + 1) % V
    mask[7] = (torch.arange(V, device=device) == 0) | (torch.arange(V, device=device) == V - 1)
    if V == 1:
        mask[:] = True
    return logits.to(dtype).masked_fill(~mask, math.nan), ids, mask


@pytest.mark.each_impl("logprob")
@pytest.mark.parametrize("V", [1, 2, 17, 1025, 4097, 9001])
def test_kept_matches_float64(impl, V, device):
    logits, ids, mask = truncated(device, V)
    logp, entropy, grad = compare(device, logits, ids, 0.7, impl, logprob_, mask)
    assert (grad[~mask] == 0).all()
    if V > 1:
        assert (logp[1], logp[4], entropy[4]) == (-math.inf, 0.0, 0.0)
    compare(
        device,
        logits,
        ids,
        torch.tensor([0.3, 1.0, 2.0, 0.7, 5.0, 0.1, 1.5, 1.0], device=device),
        impl,
        logprob,
        mask,
    )
    for dtype in (torch.bfloat16, torch.float16) if V in (17, 4097) else ():
        for function in (logprob, logprob_):
            _, _, grad = compare(
                device, *truncated(device, V, dtype=dtype)[:2], 0.7, impl, function, mask
            )
            assert (grad[~mask] == 0).all()


@pytest.mark.each_impl("logprob")
def test_a_row_that_lists_nothing_is_the_whole_vocabulary(impl, device):
    logits, ids = rows(device, 4100)
    results = []
    for kept in (None, listed(device, torch.ones(5, 4100, dtype=torch.bool, device=device))):
        leaf = logits.clone().requires_grad_()
        logp, entropy = logprob(leaf, ids, temperature=0.7, entropy=True, kept=kept, impl=impl)
        (logp.sum() + entropy.sum()).backward()
        results.append((logp.detach(), entropy.detach(), leaf.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.each_impl("logprob")
@pytest.mark.parametrize("function", [logprob, logprob_])
def test_kept_and_minus_infinity(impl, function, device):
    V = 1100
    logits, ids = rows(device, V, N=4, scale=1.0)
    mask = torch.zeros(4, V, dtype=torch.bool, device=device)
    mask[:, 100:900] = True
    ids[:] = torch.tensor([150, 200, 300, 400], device=device)
    logits[0, 100:140] = -torch.inf
    logits[1, 200] = -torch.inf  # the label itself
    logits[2, 100:900] = -torch.inf  # nothing is left
    logits[3, :100] = 50.0  # mass outside counts for nothing
    logp, entropy, grad = compare(device, logits, ids, 0.7, impl, function, mask)
    assert (logp[1], logp[2], entropy[2]) == (-math.inf, -math.inf, 0.0)
    assert (grad[2] == 0).all()
    assert (grad[torch.isneginf(logits) | ~mask] == 0).all()
    # known wrong: the gradient of the whole row, cut off afterwards
    with pytest.raises(AssertionError):
        leaf = logits.nan_to_num(neginf=-50.0).requires_grad_()
        logprob(leaf, ids, temperature=0.7, impl=impl).sum().backward()
        torch.testing.assert_close(
            torch.where(mask, leaf.grad, 0)[3].double(),
            oracle(
                device, logits.masked_fill(~mask, -math.inf), ids, 0.7, torch.ones(4, device=device)
            )[2][3],
        )


@pytest.mark.each_impl("logprob")
def test_kept_poison_stays_in_its_row(impl, device):
    logits, ids, mask = truncated(device, 1030)
    logits[6, ids[6]] = torch.nan  # a kept one
    ids[1] = -100
    leaf = logits.clone().requires_grad_()
    logp, entropy = logprob(leaf, ids, entropy=True, kept=listed(device, mask), impl=impl)
    (logp.sum() + entropy.sum()).backward()
    others = torch.arange(8, device=device) != 6
    assert logp[6].isnan()
    assert entropy[6].isnan()
    assert leaf.grad[6][mask[6]].isnan().all()
    assert (leaf.grad[~mask] == 0).all()
    assert torch.isfinite(logp[others]).all()
    assert torch.isfinite(leaf.grad[others]).all()


@pytest.mark.each_impl("logprob")
def test_kept_rows_depend_on_nothing_else(impl, device):
    logits, ids, mask = truncated(device, 1300)
    options = {"temperature": 0.7, "entropy": True, "impl": impl}
    together = logprob(logits, ids, kept=listed(device, mask), **options)
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            together, logprob(logits, ids, kept=listed(device, mask), **options), strict=True
        )
    )
    for n in (0, 5, 7):
        alone = logprob(
            logits[n : n + 1], ids[n : n + 1], kept=listed(device, mask[n : n + 1]), **options
        )
        assert torch.equal(alone[0], together[0][n : n + 1])
        assert torch.equal(alone[1], together[1][n : n + 1])
    compact = logprob(
        logits[5][mask[5]], torch.tensor(int(mask[5][: ids[5]].sum()), device=device), **options
    )  # the same tokens as a vocabulary of their own
    torch.testing.assert_close(compact[0], together[0][5], rtol=0, atol=2e-6)
    shaped = torch.full((2, 5, 1400), torch.nan, device=device)[:, 1:, :1300].copy_(
        logits.view(2, 4, 1300)
    )  # leading dimensions with strides of their own
    for a, b in zip(
        logprob(shaped, ids.view(2, 4), kept=listed(device, mask), **options), together, strict=True
    ):
        assert torch.equal(a.flatten(), b)


@pytest.mark.each_impl("logprob")
def test_kept_with_no_rows(impl, device):
    kept = Kept(
        torch.empty(0, dtype=torch.int32, device=device),
        torch.zeros(1, dtype=torch.int64, device=device),
    )
    leaf = torch.randn(0, 7, requires_grad=True, device=device)
    logprob(
        leaf, torch.zeros(0, dtype=torch.int64, device=device), kept=kept, impl=impl
    ).sum().backward()
    assert leaf.grad.shape == (0, 7)


@pytest.mark.each_impl("logprob")
def test_refuses_kept_that_do_not_fit(impl, device):
    logits, ids = torch.zeros(2, 6, device=device), torch.tensor([1, 2], device=device)

    def score(token_ids, offsets, dtypes=(torch.int32, torch.int64)):
        logprob(
            logits,
            ids,
            kept=Kept(
                torch.tensor(token_ids, dtype=dtypes[0], device=device),
                torch.tensor(offsets, dtype=dtypes[1], device=device),
            ),
            impl=impl,
        )

    score([1, 3, 2, 5], [0, 2, 4])
    if device.type != "cpu":
        return  # no value is read there
    for token_ids, found in (
        ([1, 3, 2, 6], "got 6 after 2 in row 1"),
        ([-1, 3, 2, 5], "got -1 after -1 in row 0"),
        ([1, 3, 5, 5], "got 5 after 5 in row 1"),
        ([3, 1, 2, 5], "got 1 after 3 in row 0"),
    ):
        with pytest.raises(
            IndexError, match=r"expected kept ids that ascend in \[0, 6\), " + found
        ):
            score(token_ids, [0, 2, 4])
    for offsets in ([1, 2, 4], [0, 5, 4], [0, 2, 5]):
        with pytest.raises(ValueError, match=r"kept.offsets that ascend from 0 to at most 4"):
            score([1, 3, 2, 5], offsets)
    with pytest.raises(ValueError, match=r"expected 3 kept.offsets, one more than rows, got 2"):
        score([1, 3, 2, 5], [0, 4])
    with pytest.raises(TypeError, match=r"expected kept.token_ids of dtype int32"):
        score([1, 3, 2, 5], [0, 2, 4], (torch.int64, torch.int64))
    with pytest.raises(TypeError, match=r"expected kept.offsets of dtype int64"):
        score([1, 3, 2, 5], [0, 2, 4], (torch.int32, torch.int32))


# ---- what is not theirs stays as it is -----------------------------------------------------------
def bits(tensor):
    return (
        tensor.contiguous().view(torch.int32 if tensor.element_size() == 4 else torch.int16).clone()
    )


@pytest.mark.each_impl("logprob")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("truncate", [False, True])
def test_nothing_beside_the_logits_is_read_or_written(impl, dtype, truncate, device):
    """Rows of a padded vocabulary inside a larger tensor of NaN: forward changes no bit of it, the
    backward in place none outside the view."""
    logits, ids, mask = truncated(device, 1027, dtype=dtype)
    kept = listed(device, mask) if truncate else None
    plain = logits if truncate else logits.nan_to_num(nan=0.5)
    whole = torch.full((10, 1040), torch.nan, dtype=dtype, device=device)
    view = whole[1:9, 5:1032]
    view.copy_(plain)
    inside = torch.zeros(whole.shape, dtype=torch.bool, device=device)
    inside[1:9, 5:1032] = True
    before = bits(whole)
    leaf = view.detach().requires_grad_()
    logp, entropy = logprob(leaf, ids, entropy=True, kept=kept, impl=impl)
    (torch.where(logp > -math.inf, logp, 0.0).sum() + entropy.sum()).backward()
    assert torch.equal(bits(whole), before)
    assert torch.isfinite(leaf.grad).all()
    source, target = plain.clone().requires_grad_(), whole.clone()
    computed = target[1:9, 5:1032].copy_(source)
    logp, entropy = logprob_(computed, ids, entropy=True, kept=kept, impl=impl)
    assert torch.equal(bits(target.detach()), before)
    (torch.where(logp > -math.inf, logp, 0.0).sum() + entropy.sum()).backward()
    assert torch.equal(bits(target.detach())[~inside], before[~inside])
    assert torch.equal(target.detach()[1:9, 5:1032], leaf.grad)


@pytest.mark.parametrize("listed", [None, ([1, 3, 4, 0, 3, 4, 5], [0, 3, 3, 4, 6])])
def test_reference_gradient(listed, device):
    kept = listed and Kept(
        torch.tensor(listed[0], dtype=torch.int32, device=device),
        torch.tensor(listed[1], device=device),
    )
    logits = torch.randn(4, 6, dtype=torch.float64, device=device)
    logits[0, 2] = -torch.inf
    ids = torch.tensor([1, 5, -100, 3], device=device)
    assert torch.autograd.gradcheck(
        lambda z: logprob_reference(
            z.masked_fill(torch.isneginf(logits), -torch.inf), ids, 0.7, kept=kept
        ),
        logits.nan_to_num(neginf=0.0).requires_grad_(),
    )


@pytest.mark.each_impl("logprob")
def test_refuses_what_it_does_not_support(impl, device):
    logits = torch.zeros(3, 4, device=device)
    if device.type == "cpu":  # elsewhere no id is read before the kernel
        with pytest.raises(
            IndexError, match=r"token ids in \[0, 4\) or ignore_index -100, got 4 in row 1"
        ):
            logprob(logits, torch.tensor([0, 4, 1], device=device), impl=impl)
        with pytest.raises(IndexError, match="got -1 in row 2"):
            logprob(logits, torch.tensor([0, 3, -1], device=device), impl=impl)
    with pytest.raises(ValueError, match="token_ids does not fit its pattern"):
        logprob(logits, torch.tensor([0, 1], device=device), impl=impl)
    with pytest.raises(ValueError, match="contiguous last dimension"):
        logprob(
            torch.zeros(4, 3, device=device).t(), torch.tensor([0, 1, 2], device=device), impl=impl
        )
    with pytest.raises(TypeError, match="expected token_ids of dtype int64, int32"):
        logprob(logits, torch.zeros(3, device=device), impl=impl)
    for wrong in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="temperature above 0"):
            logprob(logits, torch.tensor([0, 1, 2], device=device), temperature=wrong, impl=impl)
    if impl != "torch":
        with pytest.raises(TypeError, match="expected logits of dtype"):
            logprob(logits.double(), torch.tensor([0, 1, 2], device=device), impl=impl)
    with pytest.raises(RuntimeError, match="tensors only; these can: torch"):
        logprob(
            logits,
            torch.tensor([0, 1, 2], device=device),
            impl="cuda" if device.type == "cpu" else "cpp",
        )


def test_opcheck_and_compile(device):
    logits, ids = (
        torch.randn(3, 40, requires_grad=True, device=device),
        torch.tensor([0, -100, 39], device=device),
    )
    stats, g, T = (
        torch.ones(3, 3, device=device),
        torch.randn(3, device=device),
        torch.rand(3, device=device) + 0.5,
    )
    kept = Kept(
        torch.tensor([0, 7, 8, 20, 39], dtype=torch.int32, device=device),
        torch.tensor([0, 3, 5, 5], device=device),
    )
    if native.capability and device.type == "cpu":
        ops = torch.ops.fusedrl
        for entropy in (False, True):
            torch.library.opcheck(ops.logprob.default, (logits, ids, 0.7, None, entropy, -100))
            torch.library.opcheck(
                ops.logprob.default, (logits, ids, 0.7, None, entropy, -100, *kept)
            )
            torch.library.opcheck(
                ops.logprob_forward.default, (logits.detach(), ids, 1.0, T, entropy, -100)
            )
        torch.library.opcheck(
            ops.logprob_backward.default, (g, None, logits.detach(), ids, stats, 0.7, None, -100)
        )
        torch.library.opcheck(
            ops.logprob_backward_.default,
            (logits.detach().clone(), None, g, ids, stats, 0.7, None, -100),
        )
        torch.library.opcheck(
            ops.logprob_backward_.default,
            (logits.detach().clone(), None, g, ids, stats, 0.7, None, -100, *kept),
        )
    if not unavailable("triton", device.type):
        torch.library.opcheck(
            torch.ops.fusedrl.logprob_triton.default,
            (logits, ids, 0.7, None, True, -100, None, None),
        )
        torch.library.opcheck(
            torch.ops.fusedrl.logprob_triton.default, (logits, ids, 0.7, None, True, -100, *kept)
        )
    for impl in CATALOGUE["logprob"].implementations(device):

        def loss(z, truncated, impl=impl):
            logp, entropy = logprob(
                z, ids, temperature=0.7, entropy=True, kept=truncated, impl=impl
            )
            return logp.sum() + 0.1 * entropy.sum()

        for truncated in (None, kept):
            leaf, compiled_leaf = (
                logits.detach().clone().requires_grad_(),
                logits.detach().clone().requires_grad_(),
            )
            loss(leaf, truncated).backward()
            torch.compile(loss, fullgraph=True, backend="aot_eager")(
                compiled_leaf, truncated
            ).backward()
            torch.testing.assert_close(compiled_leaf.grad, leaf.grad)


@pytest.mark.cpu_only("what is traced is the same on every device")
@pytest.mark.each_impl("logprob")
def test_new_lengths_do_not_recompile(impl, device):
    compiled = torch.compile(
        lambda z, ids, kept: logprob(z, ids, kept=kept, impl=impl),
        fullgraph=True,
        backend="aot_eager",
        dynamic=True,
    )
    before, counts = torch._dynamo.utils.counters["stats"]["unique_graphs"], []
    for N in (3, 5, 9):
        logits, ids = torch.randn(N, 40, device=device), torch.full((N,), 2, device=device)
        kept = Kept(
            torch.tensor([2, 7] * N, dtype=torch.int32, device=device),
            torch.arange(N + 1, device=device) * 2,
        )
        torch.testing.assert_close(
            compiled(logits, ids, kept), torch.log_softmax(logits[:, [2, 7]], -1)[:, 0]
        )
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert before < counts[0] == counts[-1]
