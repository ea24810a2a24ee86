import math

import pytest
import torch

from fusedrl.engine.tools.verify.grid import interpreted
from fusedrl.kernels.linear_head import tile_of
from fusedrl.kernels.linear_logprob import linear_logprob, linear_logprob_reference
from fusedrl.kernels.logprob import logprob_reference
from fusedrl.kernels.runtime import native


def workspaces(impl, rows):
    """Rows a workspace holds, of which the interpreter of triton gets one: each of its programs
    costs milliseconds."""
    return rows[1:2] if impl == "triton" else rows


def problem(device, N, H, V, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed + N * 7919 + V)
    hidden = torch.randn(N, H, generator=generator).to(device).to(dtype)
    weight = (torch.randn(V, H, generator=generator).to(device) * 2 / math.sqrt(H)).to(dtype)
    ids, bias = (
        torch.randint(0, V, (N,), generator=generator).to(device),
        torch.randn(V, generator=generator).to(device).to(dtype),
    )
    if N > 3:
        ids[0], ids[1], ids[3] = 0, V - 1, -100
        hidden[3] = torch.nan  # an ignored row may hold anything
    g, h = (
        torch.randn(N, generator=generator).to(device),
        torch.randn(N, generator=generator).to(device),
    )
    if N > 5:
        g[4] = h[4] = 0.0  # a row that no gradient reaches
    return hidden, weight, ids, bias, g, h


def run(function, hidden, weight, ids, bias, g, h, **options):
    leaves = [
        None if t is None else t.detach().clone().requires_grad_() for t in (hidden, weight, bias)
    ]
    logp, entropy = function(leaves[0], leaves[1], ids, leaves[2], **options)
    ((logp * g.to(logp.dtype)).sum() + (entropy * h.to(logp.dtype)).sum()).backward()
    return [logp.detach(), entropy.detach(), *(leaf.grad for leaf in leaves if leaf is not None)]


def ours(impl, **rest):
    return lambda hidden, weight, ids, bias, **options: linear_logprob(
        hidden, weight, ids, bias=bias, entropy=True, impl=impl, **options, **rest
    )


def doubled(tensors):
    return [t.double() if t is not None and t.is_floating_point() else t for t in tensors]


# No rows, one row, a few, several chunks (workspaces of 1, 3 and 8 rows, and the default); V off
# the vector size and past one block.
@pytest.mark.each_impl("linear_logprob")
@pytest.mark.parametrize(
    "N,H,V", [(0, 8, 33), (1, 8, 33), (7, 5, 2), (33, 16, 1025), (20, 64, 3000)]
)
@pytest.mark.parametrize("variant", ["plain", "bias", "softcap", "temperatures"])
def test_matches_float64(impl, N, H, V, variant, device):
    if interpreted(impl, device) and V > 1000:
        V = 260 if V < 3000 else 150  # its interpreter is slow, and its tiles are small
    hidden, weight, ids, bias, g, h = problem(device, N, H, V)
    options = {"softcap": 3.0} if variant == "softcap" else {}
    options["temperature"] = (
        torch.linspace(0.3, 3.0, N, device=device) if variant == "temperatures" else 0.7
    )
    bias = bias if variant in ("bias", "softcap") else None
    wide = {
        **options,
        "temperature": options["temperature"].double() if variant == "temperatures" else 0.7,
    }
    want = run(linear_logprob_reference, *doubled((hidden, weight, ids, bias, g, h)), **wide)
    scale = max(1.0, float((hidden.nan_to_num() @ weight.t()).abs().max())) if N else 1.0
    for rows in workspaces(impl, (1, 3, 8, None)):
        got = run(
            ours(impl, workspace_bytes=None if rows is None else rows * V * 4),
            hidden,
            weight,
            ids,
            bias,
            g,
            h,
            **options,
        )
        assert got[0].dtype == got[1].dtype == torch.float32
        for name, a, b in zip(
            ("logp", "entropy", "hidden", "weight", "bias"), got, want, strict=False
        ):
            torch.testing.assert_close(
                a.double(),
                b,
                rtol=1e-5,
                atol=1e-5 * scale,
                msg=lambda text, name=name: f"{name}: {text}",
            )
        assert N < 4 or ((got[0][3], got[1][3]) == (0, 0) and (got[2][3] == 0).all())
        assert N < 6 or (got[2][4] == 0).all()


# Logits are float32 whatever the weight, and so is the sum of the weight's gradient over 20 chunks
# of one row.
@pytest.mark.each_impl("linear_logprob", interpreted=False)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(impl, dtype, device):
    hidden, weight, ids, bias, g, h = problem(device, 20, 64, 1500, dtype)
    want = run(linear_logprob_reference, *doubled((hidden, weight, ids, bias, g, h)))
    for rows in (1, 64):
        got = run(ours(impl, workspace_bytes=rows * 1500 * 4), hidden, weight, ids, bias, g, h)
        assert got[2].dtype == got[3].dtype == got[4].dtype == dtype
        for a, b in zip(got[:2], want[:2], strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-4)
        for a, b in zip(got[2:], want[2:], strict=True):  # one rounding
            torch.testing.assert_close(
                a.double(),
                b.to(dtype).double(),
                rtol=torch.finfo(dtype).eps,
                atol=1e-4 * float(b.abs().max()),
            )


@pytest.mark.cpu_only("the C++ kernels")
@pytest.mark.skipif(not native.capability, reason=native.reason)
def test_weights_wider_than_one_tile(device):
    # 4 MiB of float32 hold 512 rows
    hidden, weight, ids, bias, g, h = problem(device, 9, 2048, 1100, torch.bfloat16)
    want = run(linear_logprob_reference, *doubled((hidden, weight, ids, bias, g, h)))
    got = run(ours("cpp"), hidden, weight, ids, bias, g, h)
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(got[2].double(), want[2], rtol=2**-7, atol=1e-3)


@pytest.mark.cpu_only("tiles of GPUs that are not here, under the interpreter")
@pytest.mark.parametrize("tile", ["narrow", 9, 10])
@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.usefixtures("triton_runs")
def test_each_tile_that_some_gpu_has(tile, everything, device, monkeypatch):
    """Columns in parts and halves, more tiles than programs, and the stored logits."""
    module = pytest.importorskip("fusedrl.kernels.linear_logprob._triton")
    found = module.NARROW if tile == "narrow" else module.WIDE[tile]
    monkeypatch.setattr(module, "_tile", lambda *_: found)
    V, N = 700, 131
    hidden, weight, ids, bias, _, _ = problem(device, N, 24, V, torch.bfloat16)
    hidden, ids = hidden.nan_to_num(), ids.clamp(min=0)  # no row is left out
    bias = bias if everything else None
    head = module.HeadOf(weight, bias, 0.7, 3.0 if everything else 0.0)
    rows = module.Rows(torch.arange(N, device=device), ids, None)
    scores = module.unscored(rows)
    logits = torch.full((N, module.padded(V)), torch.nan, device=device)
    module.score(hidden, head, rows, scores, 0, N, 1 << 20, logits)
    want = hidden.double() @ weight.double().t()
    if everything:
        want = 3.0 * torch.tanh((want + bias.double()) / 3.0)
    torch.testing.assert_close(logits[:, :V].double(), want, rtol=1e-5, atol=1e-5)
    logp = torch.log_softmax(want / 0.7, 1)
    entropy = -(logp.exp() * logp).sum(1)
    picked = logp.gather(1, ids[:, None])[:, 0]
    torch.testing.assert_close(scores.logp.double(), picked, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores.entropy.double(), entropy, rtol=1e-5, atol=1e-5)


@pytest.mark.each_impl("linear_logprob")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scoring_and_training_agree_bitwise(impl, dtype, device):
    N, V = (70, 200) if interpreted(impl, device) else (200, 700)
    hidden, weight, ids, bias, _, _ = problem(device, N, 32, V, dtype)
    options = {"bias": bias, "temperature": 0.7, "impl": impl, "workspace_bytes": 37 * V * 4}
    with torch.no_grad():
        scored = linear_logprob(hidden, weight, ids, **options)
    trained = linear_logprob(
        hidden.clone().requires_grad_(),
        weight.clone().requires_grad_(),
        ids,
        entropy=True,
        **options,
    )[0]
    assert torch.equal(scored, trained)
    assert torch.equal(linear_logprob(hidden, weight, ids, **options), scored)
    poisoned = hidden.clone()
    poisoned[ids == -100] = 1e9
    assert torch.equal(linear_logprob(poisoned, weight, ids, **options), scored)


@pytest.mark.each_impl("linear_logprob")
def test_two_backward_runs_agree_bitwise_and_inputs_stay(impl, device):
    inputs = problem(device, 12 if interpreted(impl, device) else 50, 16, 300)
    before = [t.clone() for t in inputs]
    first, second = (run(ours(impl, workspace_bytes=7 * 1200), *inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(
        torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(inputs, before, strict=True)
    )


@pytest.mark.each_impl("linear_logprob")
def test_only_what_is_asked_for(impl, device):
    hidden, weight, ids, bias, g, _ = problem(device, 12, 8, 40)
    want = run(
        linear_logprob_reference,
        *doubled((hidden, weight, ids, bias, g, torch.zeros(12, device=device))),
    )
    for which in range(3):
        leaves = [
            t.clone().requires_grad_(i == which) for i, t in enumerate((hidden, weight, bias))
        ]
        (linear_logprob(leaves[0], leaves[1], ids, bias=leaves[2], impl=impl) * g).sum().backward()
        torch.testing.assert_close(
            leaves[which].grad.double(), want[2 + which], rtol=1e-5, atol=1e-5
        )
        assert [leaf.grad is not None for leaf in leaves] == [i == which for i in range(3)]
    ignored = torch.full((12,), -100, device=device)
    leaf = weight.clone().requires_grad_()
    logp = linear_logprob(hidden, leaf, ignored, impl=impl)
    assert torch.equal(logp, torch.zeros(12, device=device))
    logp.sum().backward()
    assert (leaf.grad == 0).all()


@pytest.mark.each_impl("linear_logprob")
def test_transposed_and_strided_inputs(impl, device):
    hidden, weight, ids, _, _, _ = problem(device, 12, 8, 40)
    plain = linear_logprob(hidden, weight, ids, impl=impl)
    strided = torch.zeros(12, 11, device=device)[:, :8].copy_(hidden)
    torch.testing.assert_close(
        linear_logprob(strided, weight.t().contiguous().t(), ids.int(), impl=impl),
        plain,
        rtol=1e-6,
        atol=1e-6,
    )


def test_reference_gradient(device):
    hidden, weight, _, bias, _, _ = doubled(problem(device, 3, 4, 5))
    inputs = tuple(t.requires_grad_() for t in (hidden, weight, bias))
    ids = torch.tensor([1, -100, 4], device=device)
    for function in (
        lambda x, w, b: linear_logprob_reference(x, w, ids, b, 0.7, 2.0),
        lambda x, w, b: linear_logprob(
            x,
            w,
            ids,
            bias=b,
            temperature=0.7,
            softcap=2.0,
            entropy=True,
            workspace_bytes=8,
            impl="torch",
        ),
    ):
        assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.cpu_only("the C++ kernels")
@pytest.mark.skipif(not native.capability, reason=native.reason)
def test_memory_stays_within_the_workspace(device):
    hidden, weight, ids, _, _, _ = problem(device, 4000, 8, 5000)  # 80 MB of logits
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        linear_logprob(hidden, weight, ids, workspace_bytes=1 << 20)
    largest = max(
        event.cpu_memory_usage for event in profile.events() if event.name == "aten::empty"
    )
    assert largest <= 1 << 20


@pytest.mark.cpu_only("values are read on the host, or an implementation is named, on a CPU alone")
@pytest.mark.each_impl("linear_logprob")
def test_refuses_what_it_does_not_support(impl, device):
    hidden, weight, ids = (
        torch.zeros(3, 4, device=device),
        torch.zeros(5, 4, device=device),
        torch.tensor([0, 1, 2], device=device),
    )
    with pytest.raises(
        IndexError,
        match=r"linear_logprob: expected token ids in \[0, 5\) or ignore_index -100, got 5 in "
        r"row 2",
    ):
        linear_logprob(hidden, weight, torch.tensor([0, 1, 5], device=device), impl=impl)
    with pytest.raises(ValueError, match=r"weight does not fit its pattern \[V, H\] with .*'H': 4"):
        linear_logprob(hidden, torch.zeros(5, 3, device=device), ids, impl=impl)
    with pytest.raises(TypeError, match="expected weight of dtype float32, got bfloat16"):
        linear_logprob(hidden, weight.bfloat16(), ids, impl=impl)
    for wrong in ({"temperature": 0.0}, {"softcap": -1.0}, {"workspace_bytes": 0}):
        with pytest.raises(ValueError, match="above 0"):
            linear_logprob(hidden, weight, ids, impl=impl, **wrong)
    with pytest.raises(RuntimeError, match="these can: torch"):
        linear_logprob(hidden, weight, ids, impl="cuda")


@pytest.mark.cpu_only("the C++ kernels")
@pytest.mark.skipif(not native.capability, reason=native.reason)
def test_opcheck_and_compile(device):
    hidden, weight, ids, bias, g, h = problem(device, 6, 8, 40)
    hidden = hidden.nan_to_num()
    leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    for entropy in (False, True):
        torch.library.opcheck(
            torch.ops.fusedrl.linear_logprob.default,
            (leaves[0], leaves[1], ids, leaves[2], 0.7, None, 0.0, entropy, -100, -1),
        )
        torch.library.opcheck(
            torch.ops.fusedrl.linear_logprob_forward.default,
            (hidden, weight, ids, None, 0.7, None, 3.0, entropy, -100, -1, False),
        )
        torch.library.opcheck(
            torch.ops.fusedrl.linear_logprob_forward.default,
            (hidden, weight, ids, None, 0.7, None, 3.0, entropy, -100, -1, True),
        )
    torch.library.opcheck(
        torch.ops.fusedrl.linear_logprob_backward.default,
        (
            g,
            h,
            hidden,
            weight,
            ids,
            bias,
            torch.ones(6, 3, device=device),
            torch.empty(0, 40, device=device),
            0.7,
            None,
            3.0,
            -100,
            -1,
            True,
            True,
            True,
        ),
    )

    def loss(hidden, weight, bias):
        logp, entropy = linear_logprob(
            hidden, weight, ids, bias=bias, temperature=0.7, entropy=True
        )
        return (logp * g).sum() + (entropy * h).sum()

    grads = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.autograd.grad(
        torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves), leaves
    )
    assert all(torch.equal(a, b) for a, b in zip(grads, compiled, strict=True))


# ---- Triton --------------------------------------------------------------------------------------


# Vocabularies around the width whose partial results are kept, and around the tile; logits all
# about -200, and one that holds nearly all.
@pytest.mark.usefixtures("triton_runs")
@pytest.mark.parametrize("V", [31, 32, 33, 127, 128, 129])
@pytest.mark.parametrize("kind", ["negative", "peaked"])
def test_no_phantom_columns(V, kind, device):
    hidden, weight, ids, bias, g, h = problem(device, 5, 33, V, seed=2)
    bias = (
        bias - 200.0
        if kind == "negative"
        else torch.where(torch.arange(V, device=device) == V // 2, 80.0, bias)
    )
    inputs = hidden, weight, ids, bias, g, h
    got, want = run(ours("triton"), *inputs), run(linear_logprob_reference, *doubled(inputs))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5 * 200)
    torch.testing.assert_close(got[0].double(), want[0], rtol=2e-6, atol=4e-5)
    # one column of zeros more, as a load without a mask would make it, is seen
    if kind == "negative":
        padded = (
            torch.cat([weight, torch.zeros(1, 33, device=device)]),
            torch.cat([bias, torch.zeros(1, device=device)]),
        )
        assert (
            linear_logprob(hidden, padded[0], ids, bias=padded[1], impl="triton") - got[0]
        ).abs()[ids != -100].min() > 100


@pytest.mark.usefixtures("triton_runs")
def test_missing_logits_and_ids(device):
    hidden, weight, ids, bias, g, h = problem(device, 6, 8, 150)
    bias[:140] = -torch.inf  # the first tile holds nothing, nor does the first part of the second
    ids[0], ids[1], ids[2] = 5, 149, 141
    inputs = hidden, weight, ids, bias, g, h
    got, want = run(ours("triton"), *inputs), run(linear_logprob_reference, *doubled(inputs))
    assert got[0][0] == -torch.inf
    for a, b in zip(got[:3], want[:3], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[3].double()[140:], want[3][140:], rtol=1e-5, atol=1e-5)
    assert (got[3][:140] == 0).all()
    nothing = run(ours("triton"), hidden, weight, ids, torch.full_like(bias, -torch.inf), g, h)
    assert torch.equal(nothing[0], torch.where(ids == -100, 0.0, -torch.inf))
    assert not any(t.any() for t in nothing[1:])

    hidden[5, 2] = torch.nan
    ids[2], ids[4] = 150, -1  # on a GPU nobody checks them; a row stands for itself
    arguments = [t.requires_grad_() for t in (hidden, weight)]
    logp, entropy, _ = torch.ops.fusedrl.linear_logprob_triton(
        *arguments, ids, None, 0.7, None, 0.0, -100, 1 << 20
    )
    assert logp.isnan().tolist() == [False, False, True, False, True, True]
    assert entropy.isnan().tolist() == [False] * 5 + [True]
    logp[:3].sum().backward()
    assert hidden.grad.isnan().any(1).tolist() == [False, False, True, False, False, False]


@pytest.mark.usefixtures("triton_runs")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_see_the_others(dtype, device):
    hidden, weight, ids, bias, _, _ = problem(device, 70, 32, 150, dtype)
    T = torch.linspace(0.3, 3.0, 70, device=device)

    def score(rows, workspace_bytes):
        return torch.stack(
            linear_logprob(
                hidden[rows],
                weight,
                ids[rows],
                bias=bias,
                temperature=T[rows],
                softcap=4.0,
                entropy=True,
                impl="triton",
                workspace_bytes=workspace_bytes,
            )
        )

    whole = score(torch.arange(70, device=device), None)
    assert torch.equal(
        score(torch.tensor([66, 5, 3, 40], device=device), 1), whole[:, [66, 5, 3, 40]]
    )
    others = torch.arange(70, device=device)
    others[::2] = others[::2].flip(0)
    # and a launch for each tile of rows
    assert torch.equal(score(others, 1)[:, 1::2], whole[:, 1::2])


# Against torch with the logits in the same dtype, both measured against float64.
@pytest.mark.usefixtures("triton_runs")
@pytest.mark.parametrize(("dtype", "cap"), [(torch.bfloat16, 2e-2), (torch.float16, 4e-3)])
def test_narrow_error_is_at_most_twice_that_of_torch(dtype, cap, device):
    inputs = problem(device, 9, 64, 300, dtype)
    want = run(linear_logprob_reference, *doubled(inputs))

    def same_dtype(hidden, weight, ids, bias):
        return logprob_reference(
            hidden.masked_fill((ids == -100)[:, None], 0.0) @ weight.t() + bias, ids
        )

    theirs, got = (
        run(same_dtype, *inputs),
        run(ours("triton", workspace_bytes=9 * 300 * 2), *inputs),
    )
    for name, a, b, exact in zip(
        ("logp", "entropy", "hidden", "weight", "bias"), got, theirs, want, strict=True
    ):
        ours_off, theirs_off = ((t.double() - exact).abs().max() for t in (a, b))
        truncated = (
            torch.finfo(dtype).eps * exact.abs().max()
            if dtype == torch.bfloat16 and name in ("hidden", "weight", "bias")
            else 0.0
        )
        # to bfloat16 the interpreter cuts, it does not round
        assert ours_off <= 2 * theirs_off + truncated + 1e-6, (name, ours_off, theirs_off)
        assert name not in ("logp", "entropy") or ours_off <= cap
    assert [t.dtype for t in got] == [torch.float32] * 2 + [dtype] * 3


@pytest.mark.usefixtures("triton_runs")
def test_the_forward_reads_nothing_on_the_host(device):
    from torch.utils._python_dispatch import TorchDispatchMode

    from fusedrl.kernels.linear_logprob._triton_ops import _linear_logprob_triton

    class Seen(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = set()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.names.add(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    hidden, weight, ids, _, _, _ = problem(device, 6, 8, 40)
    with Seen() as seen:
        _linear_logprob_triton._init_fn(hidden, weight, ids, None, 1.0, None, 0.0, -100, 1 << 20)
    assert "index" in seen.names
    assert not seen.names & {"_local_scalar_dense", "nonzero", "item", "masked_select"}


@pytest.mark.usefixtures("triton_runs")
def test_triton_opcheck_and_compile(device):
    hidden, weight, ids, bias, g, h = problem(device, 6, 8, 40)
    hidden = hidden.nan_to_num()
    leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    torch.library.opcheck(
        torch.ops.fusedrl.linear_logprob_triton.default,
        (leaves[0], leaves[1], ids, leaves[2], 0.7, None, 3.0, -100, 4000),
    )
    torch.library.opcheck(
        torch.ops.fusedrl.linear_logprob_triton.default,
        (leaves[0], leaves[1], ids, None, 1.0, torch.ones(6, device=device), 0.0, -100, 4000),
    )

    def loss(hidden, weight, bias):
        logp, entropy = linear_logprob(
            hidden, weight, ids, bias=bias, temperature=0.7, entropy=True, impl="triton"
        )
        return (logp * g).sum() + (entropy * h).sum()

    grads = torch.autograd.grad(loss(*leaves), leaves, retain_graph=True)
    compiled = torch.autograd.grad(
        torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves), leaves
    )
    assert all(torch.equal(a, b) for a, b in zip(grads, compiled, strict=True))
    with pytest.raises(
        RuntimeError, match="linear_logprob: expected one backward pass, got a double backward"
    ):
        torch.autograd.grad(loss(*leaves), leaves, create_graph=True)


@pytest.mark.parametrize("elements", [1, 7, 100, 4096, 1 << 26])
@pytest.mark.parametrize(("A", "V"), [(0, 5), (1, 1), (3, 100000), (100000, 3), (5000, 5000)])
def test_tiles_fit_the_workspace(elements, A, V):
    R, C = tile_of(elements, A, V)
    assert 1 <= R <= max(A, 1)
    assert 1 <= C <= V
    tile = R * C
    assert tile <= elements
    assert 4 * tile >= min(elements, A * V)  # and use it


@pytest.mark.cpu_only("the C++ kernels")
@pytest.mark.skipif(not native.capability, reason=native.reason)
def test_logits_that_fit_are_kept_and_only_read(device):
    """Of up to 64 MiB, or of the workspace asked for; a second backward pass gives the same bits,
    and a scoring pass keeps nothing."""
    N, H, V = 9, 8, 70
    generator = torch.Generator().manual_seed(3)
    hidden, weight = (
        torch.randn(*shape, generator=generator).requires_grad_() for shape in ((N, H), (V, H))
    )
    ids = torch.randint(V, (N,), generator=generator)
    ids[[2, 5]] = -100
    upstream = torch.randn(N, generator=generator)
    upstream[4] = 0.0  # a row that matters and has no gradient

    def kept(**options):
        shapes = []

        def pack(tensor):
            shapes.append(tuple(tensor.shape))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            logp = linear_logprob(hidden, weight, ids, softcap=2.0, impl="cpp", **options)
        return logp, (N, V) in shapes

    logp, whole = kept()
    again, recomputed = kept(workspace_bytes=4 * N * V - 1)
    assert (whole, recomputed, kept(workspace_bytes=4 * N * V)[1]) == (True, False, True)
    torch.testing.assert_close(again, logp)
    first, second = (
        torch.autograd.grad(logp, (hidden, weight), upstream, retain_graph=True) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    torch.testing.assert_close(torch.autograd.grad(again, (hidden, weight), upstream), first)
    with torch.no_grad():
        assert torch.equal(linear_logprob(hidden, weight, ids, softcap=2.0, impl="cpp"), logp)
