"""rope_and_cache in CUDA C++ (csrc/cuda/kv_cache.cu): its launches, and its custom op for
torch.compile. The mathematics is in __init__.py."""

from __future__ import annotations

from ctypes import c_float, c_int32, c_int64

import torch
from torch import Tensor

from fusedrl.kernels.runtime import nvrtc
from fusedrl.kernels.runtime.nvrtc import Launch

_TOKENS, _HEADS = 16, 4  # kTokens and kHeads of kv_cache.cu
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _options(dtype: int, half: int, width: int) -> tuple[str, ...]:
    return f"-DDTYPE={dtype}", f"-DHALF={half}", f"-DWIDTH={width}"


# What tests compile: a file's sets of options.
OFFLINE_SOURCES = {
    "kv_cache.cu": [
        _options(*each)
        for each in (
            (1, 64, 2),
            (0, 64, 2),
            (2, 64, 2),
            (1, 64, 1),
            (1, 40, 2),
            (0, 256, 2),
            (0, 3, 1),
        )
    ]
}


# ---- launcher: allocate, grid --------------------------------------------------------------------
def plan_rope_and_cache(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    num_heads: int,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
) -> tuple[Tensor, list[Launch]]:
    """Allocate the queries [N, Hq, D] and plan the launches, which write them and the caches."""
    N, (blocks, kv_heads, D, size) = qkv.shape[0], k_cache.shape
    q = qkv.new_empty(N, num_heads, D)
    if N == 0:
        return q, []
    cos, sin, slots = cos.float().contiguous(), sin.float().contiguous(), slots.contiguous()
    q_norm, k_norm = (
        None if weight is None else weight.contiguous() for weight in (q_norm, k_norm)
    )
    pairs = D % 4 == 0 and qkv.stride(0) % 2 == 0 and nvrtc.aligned([cos, sin], 8)
    pairs = pairs and nvrtc.aligned([qkv, q, k_cache, v_cache, q_norm, k_norm], 2 * qkv.itemsize)
    arguments = (
        qkv,
        cos,
        sin,
        q_norm,
        k_norm,
        slots,
        q,
        k_cache,
        v_cache,
        c_int64(N),
        c_int64(qkv.stride(0)),
        c_int64(blocks * size),
        c_int32(size),
        c_int32(num_heads),
        c_int32(kv_heads),
        c_float(eps),
    )
    grid = (-(-N // _TOKENS), -(-(num_heads + 2 * kv_heads) // _HEADS), 1)
    return q, [
        Launch(
            "kv_cache.cu",
            "rope_and_cache",
            arguments,
            grid,
            32 * _TOKENS,
            _options(_DTYPES[qkv.dtype], D // 2, 2 if pairs else 1),
        )
    ]


# ---- custom op: what torch.compile sees (its fake is in __init__.py) -----------------------------
@torch.library.custom_op(
    "fusedrl::rope_and_cache_cuda", mutates_args=("k_cache", "v_cache"), device_types="cuda"
)
def rope_and_cache_cuda(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    num_heads: int,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
) -> Tensor:
    """Run rope_and_cache in CUDA C++."""
    q, launches = plan_rope_and_cache(
        qkv, cos, sin, k_cache, v_cache, slots, num_heads, q_norm, k_norm, eps
    )
    nvrtc.run(launches, qkv.device)
    return q
