"""rope: rotary position embedding of queries and keys in one call. Element i of a head's first half
and element i of its second half form the rotated pair.

    y[i]       = x[i] cos[i] - x[i + D/2] sin[i]
    y[i + D/2] = x[i + D/2] cos[i] + x[i] sin[i]

The gradient is the inverse rotation: the same formulas with -sin.

Shapes    N tokens, Hq query and Hkv key heads of D values; cos and sin of the angles, [N, D/2].
Bytes     2 N (Hq + Hkv) D s (read, write), forward and backward. q and k may be slices of the fused
          projection's output; they are read in place.
Numerics  float32 inside, rounded once to the dtype. cos and sin come from `RopeTable`: the products
          of position and frequency are exact, and cos and sin are computed in float64 and rounded
          once. A float32 angle is off by up to 0.002 at position 40,000.
Source    Su et al. (2021), RoFormer, eq. 34; the rotate-half layout is GPT-NeoX's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fusedrl.kernels.runtime import native
from fusedrl.kernels.runtime.checks import FLOATS, check, check_dtype, check_last_contiguous
from fusedrl.kernels.runtime.dispatch import Implementations
from fusedrl.kernels.runtime.triton import tl, triton

_IMPLS = Implementations("rope", cpu=("cpp", "torch", "triton"), cuda=("triton", "torch"))
_IMPLS_FLOAT64 = Implementations("rope of float64", cpu=("torch",), cuda=("torch",))
_TILE = 1024  # pairs


# ---- reference -----------------------------------------------------------------------------------
def rope_reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the result by its definition, differentiably, on any device and in any float dtype.
    Tests measure the other implementations against its float64 result."""
    wide = torch.promote_types(q.dtype, torch.float32)
    cos, sin = cos.to(wide)[:, None], sin.to(wide)[:, None]

    def rotate(x: Tensor) -> Tensor:
        first, second = x.to(wide).chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(
            x.dtype
        )

    return rotate(q), rotate(k)


# ---- angles --------------------------------------------------------------------------------------
_STEP, _CHUNK = 256, 1 << 14  # positions


def _exact(inv_freq_TP: Tensor, positions: range) -> tuple[Tensor, Tensor]:
    """Return cos and sin of position x frequency, [tables, positions, P] float64. The product of a
    17-bit and a 24-bit number is exact. Scalar cos and sin are used because a vector function's
    result can depend on the other values of a vector."""
    tables, pairs = inv_freq_TP.shape
    angles = [p * w for table in inv_freq_TP.tolist() for p in positions for w in table]
    cos, sin = (
        torch.tensor([f(x) for x in angles], dtype=torch.float64).view(
            tables, len(positions), pairs
        )
        for f in (math.cos, math.sin)
    )
    return cos, sin


@torch.library.custom_op("fusedrl::rope_table", mutates_args=())
def _rope_table(inv_freq: Tensor, scale: float, count: int) -> tuple[Tensor, Tensor]:
    cos_l, sin_l = (x[:, None] for x in _exact(inv_freq, range(_STEP)))
    cos, sin = (
        torch.empty(len(inv_freq), count, inv_freq.shape[1], device="cpu") for _ in range(2)
    )
    for first in range(0, count, _CHUNK):
        rows = slice(first, min(count, first + _CHUNK))
        cos_h, sin_h = (x[:, :, None] for x in _exact(inv_freq, range(first, rows.stop, _STEP)))
        cos[:, rows] = ((cos_h * cos_l - sin_h * sin_l) * scale).flatten(1, 2)
        sin[:, rows] = ((sin_h * cos_l + cos_h * sin_l) * scale).flatten(1, 2)
    return cos.to(inv_freq.device), sin.to(inv_freq.device)


@_rope_table.register_fake
def _(inv_freq: Tensor, scale: float, count: int) -> tuple[Tensor, Tensor]:
    shape = (inv_freq.shape[0], count, inv_freq.shape[1])
    return inv_freq.new_empty(shape), inv_freq.new_empty(shape)


def _rounded(count: int) -> int:
    """Return the number of positions that a table stores when `count` positions are requested."""
    return max(_STEP, 1 << (count - 1).bit_length())


class RopeTable:
    """Table of cos and sin of every position's angles. Sampler, scorer and trainer all rotate
    queries and keys with the numbers of this table.

    An entry depends only on its position and its frequency, on every machine and device. The cos of
    a vector library does not have this property: if one value of a vector is large, it computes the
    whole vector in another way, which changes the bits of the other values. So position 256 h + l
    is composed from 256 h and l by the addition theorems, in float64, and rounded once.

    inv_freq: [tables, P] or [P] frequencies, float32, with P <= D / 2; the first 2 P values of each
    head are rotated. scale: multiplies cos and sin. device: where the tables are stored. The tables
    take 8 P bytes per position and table, and grow by powers of two as positions are requested.
    """

    def __init__(
        self,
        inv_freq: Tensor | Sequence[Sequence[float]],
        scale: float = 1.0,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        self.inv_freq = torch.atleast_2d(
            torch.as_tensor(inv_freq, dtype=torch.float32, device=device)
        )
        self.scale = scale
        self._cos = self._sin = self.inv_freq.new_empty(
            self.inv_freq.shape[0], 0, self.inv_freq.shape[1]
        )

    @property
    def pairs(self) -> int:
        """P, the number of rotated pairs per head."""
        return self.inv_freq.shape[1]

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """The current (cos, sin). Growing replaces these tensors by larger ones."""
        return self._cos, self._sin

    def upto(self, count: int) -> tuple[Tensor, Tensor]:
        """Return (cos, sin), each [tables, positions, P] float32, for at least the first `count`
        positions."""
        if count > self._cos.shape[1]:
            with torch.inference_mode(False):  # the stored tables must also work under autograd
                self._cos, self._sin = _rope_table(self.inv_freq, self.scale, _rounded(count))
        return self._cos, self._sin

    def bytes_upto(self, count: int) -> int:
        """Return the bytes that the tables take once `count` positions have been requested."""
        return 8 * self.inv_freq.numel() * _rounded(count)

    def at(
        self, positions_N: Tensor, count: int, dtype: torch.dtype
    ) -> list[tuple[Tensor, Tensor]]:
        """Return (cos, sin), each [N, P], of each table at these positions, all below `count`. They
        are float64 if `dtype` is float64, for references in tests; else float32."""
        if dtype == torch.float64:
            turns = [
                positions_N.double()[:, None] * inv_freq.double() for inv_freq in self.inv_freq
            ]
            return [(turn.cos() * self.scale, turn.sin() * self.scale) for turn in turns]
        cos, sin = self.upto(count)
        return [(c[positions_N], s[positions_N]) for c, s in zip(cos, sin, strict=True)]


# ---- Triton --------------------------------------------------------------------------------------
if triton is not None:

    @triton.jit
    def _rotate(
        from_ptr,
        to_ptr,
        head_stride,
        cos,
        sin,
        COUNT: tl.constexpr,
        HALF: tl.constexpr,
        HEADS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        i = tl.arange(0, BLOCK)[None, :]
        for start in range(0, COUNT, HEADS):
            h = (start + tl.arange(0, HEADS)).to(tl.int64)[:, None]
            inside = (h < COUNT) & (i < HALF)
            x_ptr, y_ptr = from_ptr + h * head_stride + i, to_ptr + h * (2 * HALF) + i
            first = tl.load(x_ptr, mask=inside, other=0.0).to(tl.float32)
            second = tl.load(x_ptr + HALF, mask=inside, other=0.0).to(tl.float32)
            tl.store(y_ptr, first * cos - second * sin, mask=inside)
            tl.store(y_ptr + HALF, second * cos + first * sin, mask=inside)

    @triton.jit
    def _rope_kernel(
        q_ptr,
        k_ptr,
        cos_ptr,
        sin_ptr,
        q_out_ptr,
        k_out_ptr,
        q_token,
        q_head,
        k_token,
        k_head,
        Q_HEADS: tl.constexpr,
        K_HEADS: tl.constexpr,
        HALF: tl.constexpr,
        INVERSE: tl.constexpr,
        HEADS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):  # one program per token
        n = tl.program_id(0).to(tl.int64)
        i = tl.arange(0, BLOCK)[None, :]
        cos = tl.load(cos_ptr + n * HALF + i, mask=i < HALF, other=0.0)
        sin = tl.load(sin_ptr + n * HALF + i, mask=i < HALF, other=0.0)
        if INVERSE:
            sin = -sin
        _rotate(
            q_ptr + n * q_token,
            q_out_ptr + n * (2 * Q_HEADS * HALF),
            q_head,
            cos,
            sin,
            Q_HEADS,
            HALF,
            HEADS,
            BLOCK,
        )
        _rotate(
            k_ptr + n * k_token,
            k_out_ptr + n * (2 * K_HEADS * HALF),
            k_head,
            cos,
            sin,
            K_HEADS,
            HALF,
            HEADS,
            BLOCK,
        )


# ---- launcher, and the op that torch.compile sees ------------------------------------------------
def _tile(heads: int, half: int) -> dict[str, int]:
    block = triton.next_power_of_2(half)
    return {"HEADS": min(max(1, _TILE // block), triton.next_power_of_2(heads)), "BLOCK": block}


@torch.library.custom_op("fusedrl::rope_triton", mutates_args=())
def _rope_triton(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool
) -> tuple[Tensor, Tensor]:
    N, Hq, D = q.shape
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    if N:
        _rope_kernel[(N,)](
            q,
            k,
            cos.float().contiguous(),
            sin.float().contiguous(),
            q_out,
            k_out,
            q.stride(0),
            q.stride(1),
            k.stride(0),
            k.stride(1),
            Q_HEADS=Hq,
            K_HEADS=k.shape[1],
            HALF=D // 2,
            INVERSE=inverse,
            **_tile(max(Hq, k.shape[1]), D // 2),
        )
    return q_out, k_out


def _fake(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


_rope_triton.register_fake(_fake)
if native.capability:
    torch.library.register_fake("fusedrl::rope_forward", _fake)


# ---- autograd (that of the C++ implementation is in C++) -----------------------------------------
def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[2:4])
    ctx.inverse = inputs[4]


def _backward(ctx, q_grad: Tensor, k_grad: Tensor):
    cos, sin = ctx.saved_tensors
    return (
        *_rope_triton(q_grad.contiguous(), k_grad.contiguous(), cos, sin, not ctx.inverse),
        None,
        None,
        None,
    )


_rope_triton.register_autograd(_backward, setup_context=_setup_context)


# ---- public --------------------------------------------------------------------------------------
def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, impl: str | None = None
) -> tuple[Tensor, Tensor]:
    """Rotate the pairs (x[i], x[i + D/2]) of every head by the angles of its token.

    Args:
        q: [N, Hq, D].
        k: [N, Hkv, D], of the same dtype. The last dimensions of q and k must be contiguous; their
            other strides are free.
        cos, sin: [N, D/2], cos and sin of the angles; float32, or q's dtype.
        impl: "cpp" (CPU; not float64), "triton" (not float64) or "torch"; by default the best one
            for the device.
    Returns:
        Rotated (q, k), contiguous. Differentiable in q and k; cos and sin are constants.
    Raises:
        ValueError: sizes, strides or devices do not agree.
        TypeError: a dtype is not supported.
        RuntimeError: `impl` cannot run on this machine.
    """
    op = "rope"
    _, _, D, _, half = check(
        op, {"q": (q, "N Hq D"), "k": (k, "N Hkv D"), "cos": (cos, "N D/2"), "sin": (sin, "N D/2")}
    )
    if 2 * half != D:
        raise ValueError(
            f"{op}: expected cos and sin [N, D/2], one angle for every pair of a head, got D {D} "
            f"and {half} angles"
        )
    chosen = (_IMPLS_FLOAT64 if q.dtype == torch.float64 else _IMPLS).choose(q.device, impl)
    check_dtype(op, "q", q, FLOATS)
    check_dtype(op, "k", k, (q.dtype,))
    for name, tensor in (("cos", cos), ("sin", sin)):
        check_dtype(op, name, tensor, {q.dtype, torch.float32})
    for name, tensor in (("q", q), ("k", k)):
        check_last_contiguous(op, name, tensor)
    cos, sin = cos.detach(), sin.detach()
    if chosen == "torch":
        return rope_reference(q, k, cos, sin)
    return (
        torch.ops.fusedrl.rope(q, k, cos, sin)
        if chosen == "cpp"
        else _rope_triton(q, k, cos, sin, False)
    )


# What tests/offline_compile.py compiles: 12 query and 2 key heads of 128, and heads of 80, which
# fill no power of two.
if triton is not None:
    OFFLINE_KERNELS = {
        f"rope_{dtype}_{2 * half}{'_inverse' if inverse else ''}": {
            "kernel": _rope_kernel,
            "signature": dict.fromkeys(("q_ptr", "k_ptr", "q_out_ptr", "k_out_ptr"), f"*{dtype}")
            | {"cos_ptr": "*fp32", "sin_ptr": "*fp32"}
            | dict.fromkeys(("q_token", "q_head", "k_token", "k_head"), "i64"),
            "constexprs": {
                "Q_HEADS": 12,
                "K_HEADS": 2,
                "HALF": half,
                "INVERSE": inverse,
                **_tile(12, half),
            },
        }
        for dtype in ("fp32", "bf16", "fp16")
        for half in (64, 40)
        for inverse in (False, True)
    }
