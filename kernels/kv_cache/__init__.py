"""rope_and_cache: turn the output of the qkv projection into rotated queries, and write keys and
values into the paged KV cache, in one launch.

    q, k, v of a token = the rows of its projection
    u = norm_weight * x / rms(x) if a head norm is given, else x
    rotated[i] = u[i] cos[i] - u[i + D/2] sin[i]
    rotated[i + D/2] = u[i + D/2] cos[i] + u[i] sin[i]
    q -> result      k, v -> cache, at block slot // S, position slot % S

Shapes    N tokens; Hq query and Hkv key/value heads of D values, in this order in a row of the
          projection; cos and sin of the angles [N, D/2]. k_cache [blocks, Hkv, D, S] holds K
          transposed inside a block, v_cache [blocks, Hkv, S, D]: one layer of `decode_step`'s
          caches.
Bytes     N (2 Hq + 4 Hkv) D s (read, write) and 4 N D of angles. Norms, rotation and copy as
          separate steps would take N (4 Hq + 8 Hkv) D s.
Numerics  norm and rotation in float32 (float64 for float64), rounded once to the caches' dtype when
          stored. Unlike rms_norm alone, the norm does not round before it multiplies by its weight.
          v is copied. A row's results depend only on that row.
Source    rms_norm.py and rope.py, in the order of Qwen3 (norm, then rotation); Kwon et al. (2023),
          PagedAttention.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusedrl.kernels.kv_cache import _cuda
from fusedrl.kernels.rms_norm import rms_norm_reference
from fusedrl.kernels.rope import rope_reference
from fusedrl.kernels.runtime import native
from fusedrl.kernels.runtime.checks import FLOATS, check, check_dtype, check_last_contiguous
from fusedrl.kernels.runtime.dispatch import Implementations
from fusedrl.kernels.runtime.triton import tl, triton

_IMPLS = Implementations(
    "rope_and_cache", cpu=("cpp", "torch", "triton"), cuda=("triton", "torch", "cuda")
)
_IMPLS_FLOAT64 = Implementations("rope_and_cache of float64", cpu=("torch",), cuda=("torch",))
_LONGEST_HEAD = 512  # longest head; the CUDA C++ kernel stages 16 heads in shared memory
_TILE = 1024  # pairs per Triton tile


# ---- reference -----------------------------------------------------------------------------------
def rope_and_cache_reference(
    qkv_NC: Tensor,
    cos_NR: Tensor,
    sin_NR: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots_N: Tensor,
    num_heads: int,
    q_norm_D: Tensor | None = None,
    k_norm_D: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Compute the result by its definition, on any device and in any float dtype. Tests measure the
    other implementations against its float64 result. Slots outside the cache are not written."""
    N, kv_heads, D = qkv_NC.shape[0], k_cache.shape[1], k_cache.shape[2]
    wide = torch.promote_types(qkv_NC.dtype, torch.float32)

    def normed(x: Tensor, weight_D: Tensor | None) -> Tensor:
        return (
            x.to(wide)
            if weight_D is None
            else rms_norm_reference(x.to(wide), weight_D.to(wide), eps)[0]
        )

    q, k, v = qkv_NC.view(N, num_heads + 2 * kv_heads, D).split(
        (num_heads, kv_heads, kv_heads), dim=1
    )
    q, k = rope_reference(normed(q, q_norm_D), normed(k, k_norm_D), cos_NR, sin_NR)
    _write(k.to(k_cache.dtype), v.to(k_cache.dtype), slots_N, k_cache, v_cache)
    return q.to(k_cache.dtype)


def _write(k: Tensor, v: Tensor, slots_N: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    N, end, size = slots_N.shape[0], k_cache.shape[0] * k_cache.shape[3], k_cache.shape[3]
    if N == 0 or end == 0:
        return
    # Sizes must not depend on the slots, since the host would have to wait for them. So every row
    # writes: a row without a valid slot repeats the first valid row. If no row is valid, all rows
    # write back the content of slot 0.
    live = (slots_N >= 0) & (slots_N < end)
    source = torch.where(live, torch.arange(N, device=live.device), live.int().argmax())
    slots, any_live = torch.where(live.any(), slots_N[source], 0), live.any()
    block, at = slots // size, slots % size
    k_cache[block, :, :, at] = torch.where(any_live, k[source], k_cache[block, :, :, at])
    v_cache[block, :, at] = torch.where(any_live, v[source], v_cache[block, :, at])


# ---- Triton --------------------------------------------------------------------------------------
if triton is not None:

    @triton.jit
    # the two halves of a tile of heads
    def _turn(head_ptr, weight_ptr, h, i, cos, sin, eps, COUNT: tl.constexpr, HALF: tl.constexpr):
        inside = (h < COUNT) & (i < HALF)
        x_ptr = head_ptr + h * (2 * HALF) + i
        first = tl.load(x_ptr, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(x_ptr + HALF, mask=inside, other=0.0).to(tl.float32)
        if weight_ptr is not None:
            squares = tl.sum(first * first, 1) + tl.sum(second * second, 1)
            scale = (1.0 / tl.sqrt(squares / (2 * HALF) + eps))[:, None]
            first = first * scale * tl.load(weight_ptr + i, mask=i < HALF, other=0.0).to(tl.float32)
            second = (
                second
                * scale
                * tl.load(weight_ptr + HALF + i, mask=i < HALF, other=0.0).to(tl.float32)
            )
        return first * cos - second * sin, second * cos + first * sin

    @triton.jit
    def _rope_and_cache_kernel(
        qkv_ptr,
        cos_ptr,
        sin_ptr,
        q_norm_ptr,
        k_norm_ptr,
        slots_ptr,
        q_ptr,
        k_cache_ptr,
        v_cache_ptr,
        row_stride,
        end,
        size,
        eps,
        Q_HEADS: tl.constexpr,
        KV_HEADS: tl.constexpr,
        HALF: tl.constexpr,
        HEADS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):  # one program per token
        n = tl.program_id(0).to(tl.int64)
        i = tl.arange(0, BLOCK)[None, :]
        cos = tl.load(cos_ptr + n * HALF + i, mask=i < HALF, other=0.0)
        sin = tl.load(sin_ptr + n * HALF + i, mask=i < HALF, other=0.0)
        row_ptr = qkv_ptr + n * row_stride
        for start in range(0, Q_HEADS, HEADS):
            h = start + tl.arange(0, HEADS)[:, None]
            inside = (h < Q_HEADS) & (i < HALF)
            first, second = _turn(row_ptr, q_norm_ptr, h, i, cos, sin, eps, Q_HEADS, HALF)
            to_ptr = q_ptr + (n * Q_HEADS + h) * (2 * HALF) + i
            tl.store(to_ptr, first, mask=inside)
            tl.store(to_ptr + HALF, second, mask=inside)
        slot = tl.load(slots_ptr + n)
        if (slot >= 0) & (slot < end):
            block, at = slot // size, slot % size
            for start in range(0, KV_HEADS, HEADS):
                h = start + tl.arange(0, HEADS)[:, None]
                inside = (h < KV_HEADS) & (i < HALF)
                first, second = _turn(
                    row_ptr + Q_HEADS * (2 * HALF), k_norm_ptr, h, i, cos, sin, eps, KV_HEADS, HALF
                )
                to_ptr = k_cache_ptr + ((block * KV_HEADS + h) * (2 * HALF) + i) * size + at
                tl.store(to_ptr, first, mask=inside)
                tl.store(to_ptr + HALF * size, second, mask=inside)
                from_ptr = row_ptr + (Q_HEADS + KV_HEADS + h) * (2 * HALF) + i
                to_ptr = v_cache_ptr + ((block * KV_HEADS + h) * size + at) * (2 * HALF) + i
                tl.store(to_ptr, tl.load(from_ptr, mask=inside), mask=inside)
                tl.store(to_ptr + HALF, tl.load(from_ptr + HALF, mask=inside), mask=inside)


# ---- launcher, and the op that torch.compile sees ------------------------------------------------
def _tile(heads: int, half: int) -> dict[str, int]:
    block = triton.next_power_of_2(half)
    return {"HEADS": min(max(1, _TILE // block), triton.next_power_of_2(heads)), "BLOCK": block}


@torch.library.custom_op("fusedrl::rope_and_cache_triton", mutates_args=("k_cache", "v_cache"))
def _rope_and_cache_triton(
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
    N, (blocks, kv_heads, D, size) = qkv.shape[0], k_cache.shape
    q = k_cache.new_empty(N, num_heads, D)
    if N:
        q_norm, k_norm = (
            None if weight is None else weight.contiguous() for weight in (q_norm, k_norm)
        )
        _rope_and_cache_kernel[(N,)](
            qkv,
            cos.float().contiguous(),
            sin.float().contiguous(),
            q_norm,
            k_norm,
            slots.contiguous(),
            q,
            k_cache,
            v_cache,
            qkv.stride(0),
            blocks * size,
            size,
            eps,
            Q_HEADS=num_heads,
            KV_HEADS=kv_heads,
            HALF=D // 2,
            **_tile(max(num_heads, kv_heads), D // 2),
        )
    return q


def _fake(
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
    return k_cache.new_empty(qkv.shape[0], num_heads, k_cache.shape[2])


_rope_and_cache_triton.register_fake(_fake)
_cuda.rope_and_cache_cuda.register_fake(_fake)
if native.capability:
    torch.library.register_fake("fusedrl::rope_and_cache", _fake)


# ---- public --------------------------------------------------------------------------------------
@torch.no_grad()
def rope_and_cache(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    *,
    num_heads: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    impl: str | None = None,
) -> Tensor:
    """Norm and rotate the queries and keys of N tokens; write their keys and values into one layer
    of the paged cache. No gradient.

    Args:
        qkv: [N, (Hq + 2 Hkv) D], the output of the fused projection. The last dimension must be
            contiguous; the stride of the tokens is free.
        cos, sin: [N, D/2] of the angles; float32, or qkv's dtype.
        k_cache, v_cache: [blocks, Hkv, D, S] and [blocks, Hkv, S, D], contiguous: the caches of one
            layer, written in place. Their dtype is that of qkv; triton and torch also allow
            bfloat16 or float16 caches with float32 qkv.
        slots: [N] int64, block * S + position in the block. A row with a negative slot (padding) is
            not written, but its query is computed. If several rows have the same slot, it is
            undefined which of them is written last.
        num_heads: Hq, the number of query heads.
        q_norm, k_norm: [D] weights of the heads' RMS norm, in qkv's dtype. If None, no norm is
            applied.
        eps: added to the mean of the squares.
        impl: "cpp" (CPU), "triton", "cuda" (none of them float64) or "torch"; by default the best
            one for the device.
    Returns:
        [N, Hq, D] rotated queries, contiguous, in the caches' dtype.
    Raises:
        IndexError: a slot is blocks * S or above. On a CPU this is raised before anything is
            written; on a GPU nothing is raised and the row is not written.
        ValueError: sizes, strides or devices do not agree.
        TypeError: a dtype is not supported.
        RuntimeError: `impl` cannot run on this machine.
    """
    op = "rope_and_cache"
    _, C, half, blocks, Hkv, D, size = check(
        op,
        {
            "qkv": (qkv, "N C"),
            "cos": (cos, "N D/2"),
            "sin": (sin, "N D/2"),
            "k_cache": (k_cache, "blocks Hkv D S"),
            "v_cache": (v_cache, "blocks Hkv S D"),
            "slots": (slots, "N"),
            "q_norm": (q_norm, "D"),
            "k_norm": (k_norm, "D"),
        },
    )
    if 2 * half != D or not 0 < D <= _LONGEST_HEAD:
        raise ValueError(
            f"{op}: expected cos and sin [N, D/2] for heads of an even D up to {_LONGEST_HEAD}, "
            f"got {half} angles and a cache of D {D}"
        )
    if num_heads < 1 or Hkv < 1 or (num_heads + 2 * Hkv) * D != C:
        raise ValueError(
            f"{op}: expected qkv [N, (num_heads + 2 Hkv) D] = [N, ({num_heads} + 2 * {Hkv}) * "
            f"{D}], got {list(qkv.shape)}"
        )
    narrower = qkv.dtype == torch.float32 and k_cache.dtype in (torch.bfloat16, torch.float16)
    refused = dict.fromkeys(("cpp", "cuda"), "it takes caches of qkv's dtype") if narrower else {}
    chosen = (_IMPLS_FLOAT64 if qkv.dtype == torch.float64 else _IMPLS).choose(
        qkv.device, impl, refused
    )
    check_dtype(op, "qkv", qkv, FLOATS)
    check_dtype(op, "k_cache", k_cache, {qkv.dtype, k_cache.dtype if narrower else qkv.dtype})
    check_dtype(op, "v_cache", v_cache, (k_cache.dtype,))
    for name, tensor in (("q_norm", q_norm), ("k_norm", k_norm)):
        check_dtype(op, name, tensor, (qkv.dtype,))
    for name, tensor in (("cos", cos), ("sin", sin)):
        check_dtype(op, name, tensor, {qkv.dtype, torch.float32})
    check_dtype(op, "slots", slots, (torch.int64,))
    check_last_contiguous(op, "qkv", qkv)
    for name, tensor in (("k_cache", k_cache), ("v_cache", v_cache)):
        if not tensor.is_contiguous():
            raise ValueError(
                f"{op}: expected {name} contiguous, got strides {tensor.stride()}; allocate it in "
                "this shape"
            )
    if chosen != "cpp" and slots.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = slots >= blocks * size
        if wrong.any():
            n = int(wrong.nonzero()[0])
            raise IndexError(
                f"{op}: expected slots below {blocks * size} ({blocks} blocks of {size}), got "
                f"slots[{n}] = {int(slots[n])}"
            )
    if chosen == "torch":
        return rope_and_cache_reference(
            qkv, cos, sin, k_cache, v_cache, slots, num_heads, q_norm, k_norm, eps
        )
    function = getattr(
        torch.ops.fusedrl, "rope_and_cache" if chosen == "cpp" else f"rope_and_cache_{chosen}"
    )
    return function(qkv, cos, sin, k_cache, v_cache, slots, num_heads, q_norm, k_norm, eps)


def copy_blocks(
    k_cache: Tensor, v_cache: Tensor, pairs: Tensor | Sequence[tuple[int, int]]
) -> None:
    """Copy whole blocks of the cache in all layers, in place, as copy-on-write needs it.

    k_cache, v_cache: [L, blocks, ...]. pairs: [P, 2] of (source, destination). All sources are read
    before any destination is written, and no destination may appear twice.
    """
    pairs = torch.as_tensor(pairs, dtype=torch.int64).reshape(-1, 2).to(k_cache.device)
    for cache in (k_cache, v_cache):
        cache.index_copy_(1, pairs[:, 1], cache.index_select(1, pairs[:, 0]))


# What tests/offline_compile.py compiles: 12 query and 2 key/value heads of 128 without a norm, 16
# and 8 with one, and heads of 80, which fill no power of two.
if triton is not None:
    OFFLINE_KERNELS = {
        "_".join(
            ("rope_and_cache", dtype, *([cached] if cached != dtype else ()), str(2 * half))
            + (("norm",) if norm else ())
        ): {
            "kernel": _rope_and_cache_kernel,
            "signature": dict.fromkeys(
                ("qkv_ptr", *(("q_norm_ptr", "k_norm_ptr") if norm else ())), f"*{dtype}"
            )
            | dict.fromkeys(("q_ptr", "k_cache_ptr", "v_cache_ptr"), f"*{cached}")
            | {
                "cos_ptr": "*fp32",
                "sin_ptr": "*fp32",
                "slots_ptr": "*i64",
                "row_stride": "i64",
                "end": "i64",
                "size": "i32",
                "eps": "fp32",
            },
            "constexprs": {
                "Q_HEADS": heads,
                "KV_HEADS": kv_heads,
                "HALF": half,
                **_tile(heads, half),
            }
            | ({} if norm else {"q_norm_ptr": None, "k_norm_ptr": None}),
        }
        for dtype, cached in (
            ("fp32", "fp32"),
            ("bf16", "bf16"),
            ("fp16", "fp16"),
            ("fp32", "fp16"),
        )
        for heads, kv_heads, half, norm in ((12, 2, 64, False), (16, 8, 64, True), (8, 8, 40, True))
    }
