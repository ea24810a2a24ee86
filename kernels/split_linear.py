"""split_linear: a linear layer of float32 inputs and bfloat16 weights on tensor cores, which
multiply two-byte numbers.

    x = hi + lo, hi = x rounded, lo = x - hi rounded      y = hi W^T + lo W^T + b

Shapes    N rows, K inputs, O outputs.
Flops     4 N K O: twice those of one product with rounded x. The weights are read once for up to
          256 rows (hi and lo then share one product), else twice.
Numerics  hi and lo together hold 16 bits of x; sums and results are float32. Rounding x to bfloat16
          would leave 8 bits. Two programs whose float32 sums differ in the last bit would then
          sometimes round to different neighbours. Each such event is an error of 2^-8 in one value,
          and causes more of them in every later layer. Inputs that are not finite give NaN.
Source    Henry, Tang and Heinecke (2019), Leveraging the bfloat16 artificial intelligence datatype
          for higher-precision computations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedrl.kernels.linear_head import add_product, product

_TOGETHER = 256  # largest N for which one product of hi and lo together is faster


def halves(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Split x into (hi, lo) of `dtype`, whose sum is x up to its last bits."""
    hi = x.to(dtype)
    return hi, (x.float() - hi.float()).to(dtype)


def split_linear(x_NK: Tensor, weight_OK: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """Compute x W^T + b, [N, O] float32, for float32 or float16 x and a bfloat16 weight. No
    gradient."""
    hi_NK, lo_NK = halves(x_NK, weight_OK.dtype)
    if x_NK.shape[0] <= _TOGETHER:
        y_NO, rest_NO = product(torch.cat((hi_NK, lo_NK)), weight_OK.T).chunk(2)
        y_NO = y_NO + rest_NO
    else:
        y_NO = product(hi_NK, weight_OK.T)
        add_product(y_NO, lo_NK, weight_OK.T)
    return y_NO if bias_O is None else y_NO.add_(bias_O)
