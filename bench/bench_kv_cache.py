"""rope_and_cache: QK-norm, rotation and the cache write in one call, compared with the same steps
in torch, eager and compiled."""

from __future__ import annotations

import pytest
import torch
from bench.harness import DEVICE, Random, agree, compiled, implementations, no_grad, on
from bench.paged import cache, scattered
from torch import Tensor

module = pytest.importorskip("fusedrl.kernels.kv_cache")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
EPS, S = 1e-6, 16


def eager(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    heads: int,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
) -> Tensor:
    """RMSNorm of each head, the rotation and two indexed writes, as an engine without a kernel does
    them."""

    def norm(x: Tensor, weight: Tensor | None) -> Tensor:
        return (
            x
            if weight is None
            else weight
            * (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS)).to(x.dtype)
        )

    def rotate(x: Tensor) -> Tensor:
        first, second = x.float().chunk(2, dim=-1)
        return torch.cat(
            [
                first * cos[:, None] - second * sin[:, None],
                second * cos[:, None] + first * sin[:, None],
            ],
            dim=-1,
        ).to(x.dtype)

    Hkv, D, size = k_cache.shape[1:]
    q, k, v = qkv.view(len(qkv), -1, D).split((heads, Hkv, Hkv), dim=1)
    block, offset = slots // size, slots % size
    k_cache[block, :, :, offset] = rotate(norm(k, k_norm))
    v_cache[block, :, offset] = v
    return rotate(norm(q, q_norm))


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize(
    "N, heads",
    on(cpu=[(64, (8, 4, 8)), (4096, (8, 2, 64))], cuda=[(64, (32, 8, 128)), (8192, (32, 8, 128))]),
    ids=str,
)
def bench_rope_and_cache(contest, N, heads, qk_norm):
    Hq, Hkv, D = heads
    random = Random()
    qkv, angles = random.normal(N, (Hq + 2 * Hkv) * D, dtype=DTYPE), 100 * random.uniform(N, D // 2)
    norms = (
        (random.normal(D, dtype=DTYPE), random.normal(D, dtype=DTYPE)) if qk_norm else (None, None)
    )
    cos, sin, slots = angles.cos(), angles.sin(), scattered(random, 2 * N)[:N]

    def writing(function):
        # of its own: what each of them wrote is compared
        k_cache, v_cache = cache(Random(1), 2 * N // S, Hkv, D, S, DTYPE)
        return no_grad(
            lambda: (function(qkv, cos, sin, k_cache, v_cache, slots, Hq, *norms), k_cache, v_cache)
        )

    def ours(impl: str):
        return lambda *a: module.rope_and_cache(
            *a[:6], num_heads=a[6], q_norm=a[7], k_norm=a[8], eps=EPS, impl=impl
        )

    contestants = {
        name: ours(impl) for name, impl in implementations(module, "rope_and_cache").items()
    }
    contestants |= {"eager": eager, "torch.compile": compiled(eager)}
    # The projection is read and as much is written: q, and k and v into the cache; cos and sin are
    # float32.
    tolerance = 1e-5 if torch.float32 == DTYPE else 2e-2
    contest(
        f"rope_and_cache{', QK-norm' if qk_norm else ''}",
        f"{N} x {Hq}/{Hkv} x {D}",
        DTYPE,
        {name: writing(f) for name, f in contestants.items()},
        bytes_moved=2 * qkv.numel() * DTYPE.itemsize + 4 * N * D,
        same=agree(rtol=tolerance, of_max=tolerance),
    )
