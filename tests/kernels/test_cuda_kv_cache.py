"""rope_and_cache in CUDA C++, on a CPU: the product's launches through csrc/simt
(tests/kernels/conftest.py), against float64."""

import pytest
import torch

from fusedrl.kernels.kv_cache import _cuda as kv_cache_cuda
from fusedrl.kernels.kv_cache import rope_and_cache_reference
from fusedrl.kernels.kv_cache._cuda import plan_rope_and_cache

pytestmark = pytest.mark.cpu_only(
    "csrc/simt runs the CUDA sources on a CPU; on a card they are an implementation like the others"
)

CANARY = 123.0
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# A tile is of 16 tokens, a group of 4 heads, a lane's share 1 or 2 of 32: sizes at and beside each;
# one token, one position a block; groups of heads that hold queries, keys and values. A dtype and a
# D are a build each.
SHAPES = [
    ("float32", 1, 1, 1, 2, 1),
    ("float32", 33, 5, 2, 8, 16),
    ("bfloat16", 16, 2, 1, 8, 16),
    ("bfloat16", 17, 4, 4, 34, 5),
    ("float16", 5, 1, 2, 80, 3),
    ("bfloat16", 3, 7, 1, 128, 16),
    ("float32", 2, 1, 1, 132, 2),
]


def make(N, Hq, Hkv, D, S, norm=True, dtype=torch.float32):
    """Every third token is padding whose key and value are NaN; another one's slot lies beyond the
    cache."""
    generator = torch.Generator().manual_seed(N + 31 * Hq + D)

    def rand(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    angles, blocks = 100 * torch.rand(N, D // 2, generator=generator), N // S + 3
    slots = torch.randperm(blocks * S, generator=generator)[:N]
    slots[1::3] = -1 - torch.arange(slots[1::3].numel()) * 2**33
    slots[8:9] = blocks * S
    qkv = rand(N, (Hq + 2 * Hkv) * D)
    qkv[(slots < 0) | (slots == blocks * S), Hq * D :] = torch.nan
    norms = [1 + 0.3 * rand(D) if norm else None for _ in range(2)]
    caches = [
        torch.full(shape, CANARY, dtype=dtype)
        for shape in ((blocks, Hkv, D, S), (blocks, Hkv, S, D))
    ]
    return qkv, angles.cos(), angles.sin(), *caches, slots, Hq, *norms, 1e-6


def run(simt, arguments, width=None):
    """(queries, k_cache, v_cache), twice: the same bits in whatever order threads run."""
    results = []
    for simt.descending in (False, True):
        own = [*arguments[:3], arguments[3].clone(), arguments[4].clone(), *arguments[5:]]
        q, launches = plan_rope_and_cache(*own)
        q.fill_(CANARY)
        if width is not None:
            assert launches[0].options[-1] == f"-DWIDTH={width}"
        simt.run(launches)
        results.append((q, *own[3:5]))
    simt.descending = False
    assert all(
        torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(*results, strict=True)
    )
    return results[0]


def exact(arguments):
    wide = [
        t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t
        for t in arguments
    ]
    return rope_and_cache_reference(*wide), wide[3], wide[4]


def assert_right(got, want, dtype):
    for ours, exact in zip(got, want, strict=True):
        assert ours.dtype == dtype
        assert not ours.isnan().any()
        rounding = 0.0 if dtype == torch.float32 else 0.501 * torch.finfo(dtype).eps * exact.abs()
        assert (
            (ours.double() - exact).abs()
            <= rounding + 6 * 2.0**-23 * exact.abs().amax(-1, keepdim=True)
        ).all()
    for cache, exact in zip(got[1:], want[1:], strict=True):
        assert torch.equal(cache == CANARY, exact == CANARY)
    assert torch.equal(got[2].double(), want[2])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_the_reference(simt, shape):
    for norm in (True, False):
        dtype, arguments = FLOATS[shape[0]], make(*shape[1:], norm, FLOATS[shape[0]])
        assert_right(
            run(simt, arguments, width=2 if shape[4] % 4 == 0 else 1), exact(arguments), dtype
        )


def test_strides_and_alignment(simt):
    qkv, *rest = make(9, 3, 2, 8, 4)
    want = run(simt, (qkv, *rest), width=2)
    for columns, offset, width in (
        (qkv.shape[1] + 6, 2, 2),
        (qkv.shape[1] + 5, 2, 1),
        (qkv.shape[1] + 6, 3, 1),
    ):
        wide = torch.full((9, columns), torch.nan)
        view = wide[:, offset : offset + qkv.shape[1]]
        view.copy_(qkv)
        for ours, same in zip(run(simt, (view, *rest), width), want, strict=True):
            # lanes hold other pairs: the squares are summed in another order
            torch.testing.assert_close(ours, same, rtol=1e-6, atol=1e-6)


def test_rows_stay_alone(simt):
    qkv, cos, sin, k_cache, v_cache, slots, *rest = arguments = make(9, 3, 2, 8, 4)
    want = run(simt, arguments)
    dirty = torch.where(torch.arange(9)[:, None] == 3, qkv, torch.nan)
    block, at = int(slots[3]) // 4, int(slots[3]) % 4
    among = run(simt, (dirty, *arguments[1:]))
    alone = run(simt, (qkv[3:4], cos[3:4], sin[3:4], k_cache, v_cache, slots[3:4], *rest))
    for (q, keys, values), n in ((among, 3), (alone, 0)):
        assert torch.equal(q[n], want[0][3])
        assert torch.equal(keys[block, :, :, at], want[1][block, :, :, at])
        assert torch.equal(values[block, :, at], want[2][block, :, at])


def test_offsets_beyond_two_to_the_31(simt):
    small, cos, sin, keys, values, _, *rest = make(2, 2, 1, 8, 16)
    far, small = 2**31 // (8 * 16), small.nan_to_num()
    want = run(simt, (small, cos, sin, keys, values, torch.tensor([3, 40]), *rest))
    # hardly any page of these is touched
    qkv = torch.empty(2**31 + 32).as_strided((2, 32), (2**31, 1)).copy_(small)
    k_cache, v_cache = (torch.empty(far + 3, *shape) for shape in ((1, 8, 16), (1, 16, 8)))
    q, launches = plan_rope_and_cache(
        qkv, cos, sin, k_cache, v_cache, torch.tensor([3, 16 * far + 40]), *rest
    )
    simt.run(launches)
    assert torch.equal(q, want[0])
    for block, at in ((0, 3), (2, 8)):
        there = block and far + block
        assert torch.equal(k_cache[there, :, :, at], want[1][block, :, :, at])
        assert torch.equal(v_cache[there, :, at], want[2][block, :, at])


def test_ops_as_torch_sees_them(simt):
    def on_cpu(*arguments):
        q, launches = plan_rope_and_cache(*arguments)
        simt.run(launches)
        return q

    kv_cache_cuda.rope_and_cache_cuda.register_kernel("cpu")(on_cpu)
    qkv, *rest = make(5, 2, 1, 8, 4)
    qkv = qkv.nan_to_num()
    torch.library.opcheck(torch.ops.fusedrl.rope_and_cache_cuda, (qkv, *rest))
    want = exact((qkv, *rest))
    compiled = torch.compile(
        torch.ops.fusedrl.rope_and_cache_cuda, fullgraph=True, backend="aot_eager"
    )
    caches = [cache.fill_(CANARY) for cache in rest[2:4]]
    assert_right((compiled(qkv, *rest), *caches), want, torch.float32)


def test_no_tokens(simt):
    qkv, cos, sin, k_cache, v_cache, slots, *rest = make(3, 2, 1, 8, 4)
    q, launches = plan_rope_and_cache(qkv[:0], cos[:0], sin[:0], k_cache, v_cache, slots[:0], *rest)
    assert q.shape == (0, 2, 8)
    assert launches == []
