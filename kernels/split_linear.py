"""split_linear: a linear layer of float32 inputs and bfloat16 weights on tensor cores, which
multiply two-byte numbers.

    x = hi + lo, hi = x rounded, lo = x - hi rounded      y = (hi W^T + lo W^T) + b

Shapes    N rows, K inputs, O outputs.
Flops     4 N K O: twice those of one product with rounded x. The weights are read once for up to
          256 rows (hi and lo then share one product), else twice.
Launches  on a GPU three: Triton writes both halves in one, a BLAS multiplies, and Triton adds the
          two products and b in one. Beyond 256 rows the BLAS takes two, and b one.
Numerics  hi and lo together hold 16 bits of x; sums and results are float32. Rounding x to bfloat16
          would leave 8 bits. Two programs whose float32 sums differ in the last bit would then
          sometimes round to different neighbours. Each such event is an error of 2^-8 in one value,
          and causes more of them in every later layer. Inputs that are not finite give NaN. With
          and without Triton, halves and sums have the same bits.
Source    Henry, Tang and Heinecke (2019), Leveraging the bfloat16 artificial intelligence datatype
          for higher-precision computations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedrl.kernels.linear_head import add_product, product
from fusedrl.kernels.runtime.triton import tl, triton

_TOGETHER = 256  # largest N for which one product of hi and lo together is faster
_BLOCK = 1024  # elements of a program


# ---- Triton --------------------------------------------------------------------------------------
if triton is not None:

    @triton.jit
    def _rounded(x, INTERPRETED: tl.constexpr):
        """Round float32 to the nearest bfloat16, ties to even. Triton's interpreter would cut the
        bits off; what is finite is rounded there by hand."""
        if INTERPRETED:
            bits = x.to(tl.int32, bitcast=True)
            nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
            bits = tl.where((bits & 0x7F800000) == 0x7F800000, bits, nearest)
            x = bits.to(tl.float32, bitcast=True)
        return x.to(tl.bfloat16)

    @triton.jit(do_not_specialize=["N"])
    def _halves_kernel(
        x_ptr, both_ptr, N, K: tl.constexpr, INTERPRETED: tl.constexpr, BLOCK: tl.constexpr
    ):
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        size = N.to(tl.int64) * K
        x = tl.load(x_ptr + at, mask=at < size, other=0.0).to(tl.float32)
        hi = _rounded(x, INTERPRETED)
        tl.store(both_ptr + at, hi, mask=at < size)
        lo = _rounded(x - hi.to(tl.float32), INTERPRETED)
        tl.store(both_ptr + size + at, lo, mask=at < size)

    @triton.jit(do_not_specialize=["N"])
    def _join_kernel(both_ptr, bias_ptr, y_ptr, N, O: tl.constexpr, BLOCK: tl.constexpr):
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        size = N.to(tl.int64) * O
        y = tl.load(both_ptr + at, mask=at < size, other=0.0)
        y += tl.load(both_ptr + size + at, mask=at < size, other=0.0)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + at % O, mask=at < size, other=0.0).to(tl.float32)
        tl.store(y_ptr + at, y, mask=at < size)


# ---- launchers, and the ops that torch.compile sees ----------------------------------------------
@torch.library.custom_op("fusedrl::split_halves_triton", mutates_args=())
def _split_triton(x: Tensor) -> Tensor:
    """Return [2 N, K] bfloat16: hi, then lo."""
    N, K = x.shape
    both = x.new_empty(2 * N, K, dtype=torch.bfloat16)
    if both.numel():
        _halves_kernel[(triton.cdiv(N * K, _BLOCK),)](
            x.contiguous(), both, N, K=K, INTERPRETED=x.device.type == "cpu", BLOCK=_BLOCK
        )
    return both


@torch.library.custom_op("fusedrl::join_halves_triton", mutates_args=())
def _join_triton(both: Tensor, bias: Tensor | None) -> Tensor:
    """Return [N, O] float32, the sum of the first and the last N rows, and of the bias."""
    N, O = both.shape[0] // 2, both.shape[1]
    y = both.new_empty(N, O)
    if y.numel():
        bias = None if bias is None else bias.contiguous()
        _join_kernel[(triton.cdiv(N * O, _BLOCK),)](
            both.contiguous(), bias, y, N, O=O, BLOCK=_BLOCK
        )
    return y


@_split_triton.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(2 * x.shape[0], x.shape[1], dtype=torch.bfloat16)


@_join_triton.register_fake
def _(both: Tensor, bias: Tensor | None) -> Tensor:
    return both.new_empty(both.shape[0] // 2, both.shape[1])


# ---- public --------------------------------------------------------------------------------------
def halves(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Split x into (hi, lo) of `dtype`, whose sum is x up to its last bits."""
    hi = x.to(dtype)
    return hi, (x.float() - hi.float()).to(dtype)


def split_linear(
    x_NK: Tensor, weight_OK: Tensor, bias_O: Tensor | None = None, *, impl: str | None = None
) -> Tensor:
    """Compute x W^T + b, [N, O] float32, for float32 or float16 x and a bfloat16 weight. No
    gradient. `impl`: "triton" or "torch" splits and adds; by default Triton on a GPU."""
    N, together = x_NK.shape[0], x_NK.shape[0] <= _TOGETHER
    if triton is not None and (x_NK.is_cuda if impl is None else impl == "triton"):
        both_NK = _split_triton(x_NK)
        if together:
            return _join_triton(product(both_NK, weight_OK.T), bias_O)
        hi_NK, lo_NK = both_NK[:N], both_NK[N:]
    else:
        hi_NK, lo_NK = halves(x_NK, weight_OK.dtype)
    if together:
        y_NO, rest_NO = product(torch.cat((hi_NK, lo_NK)), weight_OK.T).chunk(2)
        y_NO = y_NO + rest_NO
    else:
        y_NO = product(hi_NK, weight_OK.T)
        add_product(y_NO, lo_NK, weight_OK.T)
    return y_NO if bias_O is None else y_NO.add_(bias_O)


# What tests/offline_compile.py compiles.
if triton is not None:
    OFFLINE_KERNELS = {
        f"split_{x}_{K}": {
            "kernel": _halves_kernel,
            "signature": {"x_ptr": f"*{x}", "both_ptr": "*bf16", "N": "i32"},
            "constexprs": {"K": K, "INTERPRETED": False, "BLOCK": _BLOCK},
        }
        for x, K in (("fp32", 896), ("fp16", 896), ("fp32", 100))
    } | {
        f"join_896{'_bias' if bias else ''}": {
            "kernel": _join_kernel,
            "signature": {"both_ptr": "*fp32", "y_ptr": "*fp32", "N": "i32"}
            | ({"bias_ptr": "*bf16"} if bias else {}),
            "constexprs": {"O": 896, "BLOCK": _BLOCK} | ({} if bias else {"bias_ptr": None}),
        }
        for bias in (False, True)
    }
