import itertools
import json
import math

import pytest
import torch

from fusedrl.engine.tools.verify.grid import interpreted
from fusedrl.kernels.normalize import GROUP_METHODS, RunningMoments, group_normalize, masked_whiten
from fusedrl.kernels.runtime.dispatch import unavailable


@pytest.fixture
def small_tiles(monkeypatch):
    """Triton's tiles cut down and its programs to two: several blocks a program, several moments a
    merge, at few elements."""
    if unavailable("triton", "cpu") is None:
        from fusedrl.kernels.normalize import _triton as normalize_triton

        for name, size in (("_BLOCK", 32), ("_MERGED", 1), ("_PROGRAMS", 2)):
            monkeypatch.setattr(normalize_triton, name, size)


def definition(device, x, mask, shift_mean, unbiased, eps=1e-8):
    out, chosen = torch.zeros(x.shape, dtype=torch.float64, device=device), x.double()[mask]
    if chosen.numel():
        mean = chosen.mean()
        variance = ((chosen - mean) ** 2).sum() / max(1, chosen.numel() - unbiased)
        out[mask] = (chosen - mean) / (variance + eps).sqrt() + (0 if shift_mean else mean)
    return out


# The vector of "The N implementation details of RLHF with PPO": the variance of
# lm-human-preferences, and Bessel's.
@pytest.mark.each_impl("masked_whiten")
def test_published_vector(impl, device):
    x = torch.tensor([[1.2, 1.3, 1.4], [1.5, 1.6, 1.7], [1.8, 1.9, 2.0]], device=device)
    population = torch.tensor(
        [[0.0508, 0.4381, 0.8254], [1.2127, 1.6000, 1.9873], [2.3746, 2.7619, 3.1492]],
        device=device,
    )
    bessel = torch.tensor(
        [[0.1394, 0.5046, 0.8697], [1.2349, 1.6000, 1.9651], [2.3303, 2.6954, 3.0606]],
        device=device,
    )
    torch.testing.assert_close(
        masked_whiten(x, shift_mean=False, impl=impl), population, atol=5e-5, rtol=0
    )
    torch.testing.assert_close(
        masked_whiten(x, shift_mean=False, unbiased=True, impl=impl), bessel, atol=5e-5, rtol=0
    )


# Around the lanes and the blocks of the kernels; a mean that cancels in E[x^2] - E[x]^2; NaN under
# the mask.
@pytest.mark.each_impl("masked_whiten")
@pytest.mark.parametrize("N", [0, 1, 2, 15, 17, 100, 8192, 30001])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_matches_float64(impl, N, offset, small_tiles, device):
    settings = list(itertools.product((True, False), repeat=2))
    # the interpreter's time goes by programs; test_triton_tiles runs whole ones
    if interpreted(impl, device):
        settings = settings[1:2] if offset else settings[2:3]
        if N in (2, 15, 8192, 30001):
            pytest.skip("long under the interpreter, or as good as another size")
    generator = torch.Generator().manual_seed(N)
    x = torch.randn(N, generator=generator).to(device) + offset
    for mask in (
        torch.ones(N, dtype=torch.bool, device=device),
        torch.zeros(N, dtype=torch.bool, device=device),
        torch.rand(N, generator=generator).to(device) < 0.3,
        torch.arange(N, device=device) == N - 1,
    ):
        for shift_mean, unbiased in settings:
            hidden = torch.where(mask, x, float("nan"))
            got = masked_whiten(hidden, mask, shift_mean=shift_mean, unbiased=unbiased, impl=impl)
            torch.testing.assert_close(
                got.double(),
                definition(device, x, mask, shift_mean, unbiased),
                atol=1e-5,
                rtol=1e-5,
            )
            assert torch.equal(
                got,
                masked_whiten(
                    torch.where(mask, x, -1e30),
                    mask,
                    shift_mean=shift_mean,
                    unbiased=unbiased,
                    impl=impl,
                ),
            )
    torch.testing.assert_close(
        masked_whiten(x, impl=impl),
        masked_whiten(x, torch.ones(N, dtype=torch.bool, device=device), impl=impl),
        atol=2e-7,
        rtol=0,
    )


@pytest.mark.each_impl("masked_whiten")
def test_one_element_layouts_and_no_gradient(impl, device):
    one = torch.tensor([[3.5, float("nan")]], requires_grad=True, device=device)
    mask = torch.tensor([[True, False]], device=device)
    assert masked_whiten(one, mask, unbiased=True, impl=impl).tolist() == [[0.0, 0.0]]
    kept = masked_whiten(one, mask, shift_mean=False, impl=impl)
    assert kept.tolist() == [[3.5, 0.0]]
    assert not kept.requires_grad
    x = torch.randn(6, 7, device=device)
    torch.testing.assert_close(
        masked_whiten(x.t().contiguous().t(), impl=impl),
        masked_whiten(x, impl=impl),
        atol=1e-6,
        rtol=0,
    )
    assert torch.equal(
        masked_whiten(x.bfloat16(), impl=impl), masked_whiten(x.bfloat16().float(), impl=impl)
    )


def test_threads_change_nothing(device):
    x = torch.randn(100_003, device=device)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(masked_whiten(x, x > -1))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.each_impl("masked_whiten", only=("triton",))
def test_triton_tiles(impl, device):
    """The tiles as they are, with a mean that cancels. In float32 alone, E[x^2] - E[x]^2 is off by
    the variance, or more."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5000, generator=generator).to(device) + 1e4
    mask = torch.rand(5000, generator=generator).to(device) < 0.5
    torch.testing.assert_close(
        masked_whiten(x, mask, impl=impl).double(),
        definition(device, x, mask, True, False),
        atol=1e-5,
        rtol=1e-5,
    )
    assert (x.square().mean() - x.mean().square() - 1).abs() >= 1
    scores, ids = (
        torch.randn(150, generator=generator).to(device) + 1e4,
        torch.randint(0, 20, (150,), generator=generator).to(device),
    )
    want, _ = groups_by_hand(scores.tolist(), ids.tolist(), "grpo", 1e-6, True)
    torch.testing.assert_close(
        group_normalize(scores, ids, impl=impl).advantages,
        torch.tensor(want, device=device),
        atol=1e-6,
        rtol=1e-6,
    )
    sized = group_normalize(scores, group_size=30, method="batch", impl=impl)
    assert all(
        map(
            torch.equal,
            sized,
            group_normalize(
                scores, torch.arange(150, device=device) // 30, method="batch", impl=impl
            ),
        )
    )


@pytest.mark.each_impl("masked_whiten", but=("torch",))
def test_opcheck_and_compile(impl, device):
    x = torch.randn(3, 5, device=device)
    op = (
        torch.ops.fusedrl.masked_whiten if impl == "cpp" else torch.ops.fusedrl.masked_whiten_triton
    )
    torch.library.opcheck(op.default, (x, x > 0, True, False, 1e-8))
    compiled = torch.compile(masked_whiten, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, x > 0, impl=impl), masked_whiten(x, x > 0, impl=impl))


@pytest.mark.cpu_only("values are read on the host, or an implementation is named, on a CPU alone")
def test_refuses_what_it_does_not_support(device):
    with pytest.raises(
        ValueError, match=r"expected a mask of the shape and device of x, float32\[3\]"
    ):
        masked_whiten(
            torch.zeros(3, device=device), torch.zeros(4, dtype=torch.bool, device=device)
        )
    with pytest.raises(TypeError, match="expected mask of dtype bool"):
        masked_whiten(torch.zeros(3, device=device), torch.zeros(3, device=device))
    with pytest.raises(TypeError, match="expected x of dtype"):
        masked_whiten(torch.zeros(3, dtype=torch.int64, device=device))
    with pytest.raises(RuntimeError, match="these can: torch"):
        masked_whiten(torch.zeros(3, device=device), impl="cuda")


def test_running_moments(device):
    generator = torch.Generator().manual_seed(0)
    parts = [1e4 + torch.randn(n, generator=generator).to(device) for n in (1, 0, 7, 300)]
    moments = RunningMoments()
    assert (moments.mean, moments.std, moments.count) == (0.0, 1.0, 0.0)
    for part in parts:
        moments.update(part)
    everything = torch.cat(parts).double()
    assert moments.count == 308
    assert math.isclose(moments.mean, everything.mean().item(), rel_tol=1e-12)
    assert math.isclose(moments.variance, everything.var(unbiased=False).item(), rel_tol=1e-9)
    assert math.isclose(moments.std, everything.std().item(), rel_tol=1e-9)


def test_running_moments_single_masked_and_resumed(device):
    moments = RunningMoments()
    assert moments.update(
        torch.tensor([2.0, float("nan")], device=device), torch.tensor([True, False], device=device)
    ) == (2.0, 0.0)
    # one element: no division by count - 1
    assert (moments.mean, moments.std, moments.count) == (2.0, 0.0, 1.0)
    moments.update(torch.randn(5, device=device))
    other = RunningMoments()
    other.load_state_dict(json.loads(json.dumps(moments.state_dict())))
    batch = torch.randn(9, device=device)
    assert moments.update(batch) == other.update(batch)
    assert moments.state_dict() == other.state_dict()
    with pytest.raises(ValueError, match="expected finite elements"):
        moments.update(torch.tensor([1.0, float("inf")], device=device))
    assert moments.state_dict() == other.state_dict()  # a refused batch leaves no trace


# ---- groups --------------------------------------------------------------------------------------
def groups_by_hand(scores, ids, method, eps, unbiased):
    out, flat = [], []
    for i, s in enumerate(scores):
        group = [x for x, g in zip(scores, ids, strict=True) if g == ids[i]]
        others = [
            x for j, (x, g) in enumerate(zip(scores, ids, strict=True)) if g == ids[i] and j != i
        ]
        flat.append(len(set(group)) == 1)
        mean = math.fsum(group) / len(group)
        spread = group if method == "grpo" else scores
        centre = math.fsum(spread) / len(spread)
        std = math.sqrt(
            math.fsum((x - centre) ** 2 for x in spread) / max(1, len(spread) - unbiased)
        )
        if method == "none":
            out.append(s)
        elif flat[-1]:
            out.append(0.0)
        elif method == "rloo":
            out.append(s - math.fsum(others) / len(others))
        else:
            out.append(s - mean if method == "dr_grpo" else (s - mean) / (std + eps))
    return out, flat


# Groups of 1 to 40 that lie scattered, sparse and negative ids; an offset that cancels in E[x^2] -
# E[x]^2; equal scores whose mean rounds.
@pytest.mark.each_impl("group_normalize")
@pytest.mark.parametrize("method", GROUP_METHODS)
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_groups_are_the_definition(impl, method, offset, small_tiles, device):
    generator = torch.Generator().manual_seed(3)
    ids = torch.tensor([-7] + [10**12] * 2 + [5] * 7 + [0] * 40 + [1, 2, 3] * 8, device=device)
    scores = torch.randn(len(ids), generator=generator).to(device) + offset
    scores[3:10] = 0.1 + offset
    shuffle = torch.randperm(len(ids), generator=generator).to(device)
    ids, scores = ids[shuffle], scores[shuffle]
    for unbiased in (True, False):
        got = group_normalize(scores, ids, method=method, eps=1e-4, unbiased=unbiased, impl=impl)
        want, flat = groups_by_hand(scores.tolist(), ids.tolist(), method, 1e-4, unbiased)
        torch.testing.assert_close(
            got.advantages, torch.tensor(want, device=device), atol=1e-6, rtol=1e-6
        )
        assert got.zero_variance.tolist() == flat
        assert int(got.zero_variance.sum()) == 8
        if method != "none":
            assert got.advantages[got.zero_variance].eq(0).all()


@pytest.mark.each_impl("group_normalize")
@pytest.mark.parametrize("method", GROUP_METHODS)
def test_group_size_is_consecutive_ids_and_companions_do_not_matter(
    impl, method, small_tiles, device
):
    scores = torch.randn(24, requires_grad=True, device=device)
    got = group_normalize(scores, group_size=4, method=method, impl=impl)
    for other in (
        group_normalize(scores, 4, method=method, impl=impl),
        group_normalize(
            scores, torch.arange(24, device=device).int() // 4, method=method, impl=impl
        ),
    ):
        assert torch.equal(got.advantages, other.advantages)
        assert torch.equal(got.zero_variance, other.zero_variance)
    assert not got.advantages.requires_grad
    if method != "batch":
        changed = torch.cat([scores.detach()[:4], torch.full((20,), float("nan"), device=device)])
        assert torch.equal(
            group_normalize(changed, group_size=4, method=method, impl=impl).advantages[:4],
            got.advantages[:4],
        )
        assert (
            group_normalize(changed, group_size=4, method=method, impl=impl)
            .advantages[4:]
            .isnan()
            .all()
        )
    for size in (1, 5):  # no scores
        assert group_normalize(
            scores[:0], group_size=size, method=method, impl=impl
        ).advantages.shape == (0,)
    alone = group_normalize(
        torch.tensor([3.5, -1.0], device=device), group_size=1, method=method, eps=0.0, impl=impl
    )
    assert alone.zero_variance.all()
    assert alone.advantages.tolist() == ([3.5, -1.0] if method == "none" else [0.0, 0.0])
    half = torch.randn(8, device=device).bfloat16()
    assert torch.equal(
        group_normalize(half, 4, method=method, impl=impl).advantages,
        group_normalize(half.float(), 4, method=method, impl=impl).advantages,
    )


@pytest.mark.each_impl("group_normalize")
def test_group_normalize_opcheck_and_compile(impl, device):
    scores, ids = torch.randn(6, device=device), torch.tensor([1, 1, 0, 0, 0, 4], device=device)
    if impl != "torch":
        op = (
            torch.ops.fusedrl.group_normalize
            if impl == "cpp"
            else torch.ops.fusedrl.group_normalize_triton
        )
        torch.library.opcheck(op.default, (scores, ids, 0, 0, 1e-6, True))
    compiled = torch.compile(group_normalize, fullgraph=True, backend="aot_eager")
    assert torch.equal(
        compiled(scores, ids, impl=impl).advantages,
        group_normalize(scores, ids, impl=impl).advantages,
    )


def test_group_normalize_refuses(device):
    scores = torch.zeros(6, device=device)
    with pytest.raises(ValueError, match="a method of grpo, dr_grpo, rloo, batch, none, got 'gae'"):
        group_normalize(scores, group_size=2, method="gae")
    with pytest.raises(ValueError, match="a group_size that divides the 6 scores, got 4"):
        group_normalize(scores, group_size=4)
    with pytest.raises(ValueError, match=r"either group_ids .* got neither"):
        group_normalize(scores)
    with pytest.raises(ValueError, match="got both"):
        group_normalize(scores, torch.zeros(6, dtype=torch.int64, device=device), group_size=2)
    with pytest.raises(ValueError, match=r"group_ids does not fit its pattern \[B\]"):
        group_normalize(scores, torch.zeros(5, dtype=torch.int64, device=device))
    with pytest.raises(TypeError, match="expected group_ids of dtype int64, int32"):
        group_normalize(scores, torch.zeros(6, device=device))
