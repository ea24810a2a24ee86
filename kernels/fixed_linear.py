"""fixed_linear: a linear layer whose rows do not depend on one another, to the last bit.

    y[n] = x[n] W^T + b      with a softcap then softcap tanh(y / softcap)

A BLAS chooses the order of its sums by the number of rows, so the same row among others comes out with other bits. Here it has one order, which depends
on the sizes of the weights alone; it is the order of `decode_step`'s own linear layers.

Shapes    N rows, K inputs, O outputs.
Bytes     the weights once a 64 rows; x and y once. 2 N K O flops.
Numerics  float32 sums and results, whatever the dtype of the inputs ("torch": float64 for float64, and the order is the BLAS's: it is the definition, not the
          promise).
"""
from __future__ import annotations

import torch
from torch import Tensor

from fusedrl.kernels import native
from fusedrl.kernels.checks import FLOATS, check, check_dtype
from fusedrl.kernels.dispatch import Implementations

_IMPLS = Implementations("fixed_linear", cpu=("cpp", "torch"), cuda=("torch",))


# ---- reference -------------------------------------------------------------------------------------------------------
def fixed_linear_reference(x_NK: Tensor, weight_OK: Tensor, bias_O: Tensor | None = None, softcap: float | None = None) -> Tensor:
    """The definition, on any device and in any float dtype (float64 is the oracle)."""
    wide = torch.promote_types(x_NK.dtype, torch.float32)
    y_NO = torch.nn.functional.linear(x_NK.to(wide), weight_OK.to(wide), None if bias_O is None else bias_O.to(wide))
    return y_NO if softcap is None else softcap * torch.tanh(y_NO / softcap)


# ---- custom op: what torch.compile sees --------------------------------------------------------------------------------
if native.capability:
    @torch.library.register_fake("fusedrl::fixed_linear")
    def _(x: Tensor, weight: Tensor, bias: Tensor | None, softcap: float = 0.0) -> Tensor:
        return x.new_empty(x.shape[0], weight.shape[0], dtype=torch.float32)


# ---- public ------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def fixed_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, softcap: float | None = None, impl: str | None = None) -> Tensor:
    """x W^T + b with one order of summation. No gradient.

    Args:
        x: [N, K]. weight: [O, K] and bias: [O] or None, in x's dtype; cpp takes float32 and bfloat16.
        softcap: the results become softcap * tanh(results / softcap), by the same arithmetic wherever they lie.
        impl: "cpp" or "torch"; by default the best one for the device. Only "cpp" has the fixed order.
    Returns:
        [N, O] float32 (float64 for float64).
    Raises:
        ValueError: sizes or devices that do not agree. TypeError: dtypes. RuntimeError: `impl` cannot run here.
    """
    op = "fixed_linear"
    check(op, {"x": (x, "N K"), "weight": (weight, "O K"), "bias": (bias, "O")})
    chosen = _IMPLS.choose(x.device, impl)
    check_dtype(op, "x", x, FLOATS if chosen == "torch" else (torch.float32, torch.bfloat16))
    for name, tensor in (("weight", weight), ("bias", bias)):
        check_dtype(op, name, tensor, (x.dtype,))
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{op}: expected a softcap above 0 or None, got {softcap}")
    return fixed_linear_reference(x, weight, bias, softcap) if chosen == "torch" else torch.ops.fusedrl.fixed_linear(x, weight, bias, softcap or 0.0)
