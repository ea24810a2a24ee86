"""fixed_linear: a linear layer in which each result row depends only on its own input row, to the
last bit.

    y[n] = x[n] W^T + b      with a softcap then softcap tanh(y / softcap)

A BLAS chooses the order of its sums by the number of rows, so the result of a row can change in its
last bits when the number of rows changes. Here the order depends only on the sizes of the weights;
`decode_step` uses the same order in its linear layers.

Shapes    N rows, K inputs, O outputs.
Bytes     the weights once per 64 rows; x and y once. 2 N K O flops.
Numerics  float32 sums and results, whatever the dtype of the inputs ("torch": float64 for float64;
          it uses the order of the BLAS, so it defines the result but has no fixed order).
Triton    one program per tile of 64 rows and 64 outputs, whatever the number of rows. It walks
          along K from the front, 64 inputs at a time (float32 weights: 32 rows, 32 inputs). If the
          weights are bfloat16 and x is not, x is split into a sum of two bfloat16 numbers as in
          split_linear.py: 4 N K O flops. Float32 weights do not use tensor cores. Not run on a GPU
          in this project.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedrl.kernels.runtime import native
from fusedrl.kernels.runtime.checks import FLOATS, check, check_dtype
from fusedrl.kernels.runtime.dispatch import Implementations
from fusedrl.kernels.runtime.triton import tl, triton

if triton is not None:
    from fusedrl.kernels.paged_attention import _tanh
    from fusedrl.kernels.split_linear import _rounded

_IMPLS = Implementations("fixed_linear", cpu=("cpp", "torch", "triton"), cuda=("triton", "torch"))
FIXED_LINEAR_DTYPES = (torch.float32, torch.bfloat16)  # of the weights; "torch" takes more
_STAGES = 3  # pipeline stages of the loop
# neighbouring tiles of rows run next to each other, so that their weights come from a cache
_GROUP = 16


def _tile(float32: bool) -> dict[str, int]:
    """Return the tile sizes. They determine the order of the sums, so they depend only on the dtype
    of the weights."""
    return (
        {"ROWS": 32, "COLUMNS": 64, "STEP": 32}
        if float32
        else {"ROWS": 64, "COLUMNS": 64, "STEP": 64}
    )


# ---- reference -----------------------------------------------------------------------------------
def fixed_linear_reference(
    x_NK: Tensor, weight_OK: Tensor, bias_O: Tensor | None = None, softcap: float | None = None
) -> Tensor:
    """Compute the result by its definition, on any device and in any float dtype. Tests measure the
    other implementations against its float64 result."""
    wide = torch.promote_types(x_NK.dtype, torch.float32)
    y_NO = torch.nn.functional.linear(
        x_NK.to(wide), weight_OK.to(wide), None if bias_O is None else bias_O.to(wide)
    )
    return y_NO if softcap is None else softcap * torch.tanh(y_NO / softcap)


# ---- Triton --------------------------------------------------------------------------------------
if triton is not None:

    @triton.jit(do_not_specialize=["N", "O"])
    def _kernel(
        x_ptr,
        weight_ptr,
        bias_ptr,
        y_ptr,
        N,
        O,
        softcap,
        K: tl.constexpr,
        SPLIT: tl.constexpr,
        CAPPED: tl.constexpr,
        WIDEN: tl.constexpr,
        GROUP: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
        STEP: tl.constexpr,
    ):
        n_tiles, o_tiles = tl.cdiv(N, ROWS), tl.cdiv(O, COLUMNS)
        group, place = tl.program_id(0) // (GROUP * o_tiles), tl.program_id(0) % (GROUP * o_tiles)
        high = tl.minimum(n_tiles - group * GROUP, GROUP)  # number of row tiles in this group
        n = ((group * GROUP + place % high) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        o = (place // high * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)[None, :]
        acc = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, K, STEP):
            k = start + tl.arange(0, STEP)
            x = tl.load(x_ptr + n * K + k[None, :], mask=(n < N) & (k < K)[None, :], other=0.0)
            weight = tl.load(
                weight_ptr + o * K + k[:, None], mask=(o < O) & (k < K)[:, None], other=0.0
            )
            if SPLIT:
                x = x.to(tl.float32)
                hi = _rounded(x, WIDEN)
                lo = _rounded(x - hi.to(tl.float32), WIDEN)
                if WIDEN:
                    hi, lo, weight = hi.to(tl.float32), lo.to(tl.float32), weight.to(tl.float32)
                acc = tl.dot(lo, weight, acc, input_precision="ieee")
                acc = tl.dot(hi, weight, acc, input_precision="ieee")
            else:
                if WIDEN:
                    x, weight = x.to(tl.float32), weight.to(tl.float32)
                acc = tl.dot(x, weight, acc, input_precision="ieee")
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + o, mask=o < O, other=0.0).to(tl.float32)
        if CAPPED:
            acc = _tanh(acc / softcap) * softcap
        tl.store(y_ptr + n * O + o, acc, mask=(n < N) & (o < O))

    # What tests/offline_compile.py compiles: a projection, one with a bias, a head with a softcap,
    # of the inputs and weights that a decoder brings.
    OFFLINE_KERNELS = {
        f"{x}_{weight}_{K}{'_bias' if bias else ''}{'_capped' if capped else ''}": {
            "kernel": _kernel,
            "signature": {
                "x_ptr": f"*{x}",
                "weight_ptr": f"*{weight}",
                "y_ptr": "*fp32",
                "N": "i32",
                "O": "i32",
                "softcap": "fp32",
                **({"bias_ptr": f"*{weight}"} if bias else {}),
            },
            "constexprs": {
                "K": K,
                "SPLIT": x != weight,
                "CAPPED": capped,
                "WIDEN": False,
                "GROUP": _GROUP,
                **_tile(weight == "fp32"),
                **({} if bias else {"bias_ptr": None}),
            },
            "num_warps": 4,
            "num_stages": _STAGES,
        }
        for x, weight, K, bias, capped in (
            ("fp32", "bf16", 4096, False, False),
            ("fp32", "bf16", 896, True, False),
            ("fp16", "bf16", 4096, False, False),
            ("bf16", "bf16", 4096, False, True),
            ("bf16", "bf16", 4096, False, False),
            ("fp32", "fp32", 4096, True, True),
            ("fp32", "fp32", 896, False, False),
            ("fp32", "bf16", 100, False, False),
        )
    }


# ---- launcher, and the ops that torch.compile sees -----------------------------------------------
@torch.library.custom_op("fusedrl::fixed_linear_triton", mutates_args=())
def _fixed_linear_triton(x: Tensor, weight: Tensor, bias: Tensor | None, softcap: float) -> Tensor:
    (N, K), O = x.shape, weight.shape[0]
    y_NO = x.new_empty(N, O, dtype=torch.float32)
    if N and O:
        tile = _tile(weight.dtype == torch.float32)
        x, weight = (
            t if t.data_ptr() % 16 == 0 else t.clone()
            for t in (x.contiguous(), weight.contiguous())
        )  # or it would be another kernel
        # exact; the interpreter would multiply the bits of bfloat16 as integers
        widen = weight.dtype == torch.bfloat16 and x.device.type == "cpu"
        _kernel[(triton.cdiv(N, tile["ROWS"]) * triton.cdiv(O, tile["COLUMNS"]),)](
            x,
            weight,
            None if bias is None else bias.contiguous(),
            y_NO,
            N,
            O,
            softcap or 1.0,
            K=K,
            SPLIT=x.dtype != weight.dtype,
            CAPPED=softcap > 0,
            WIDEN=widen,
            GROUP=_GROUP,
            **tile,
            num_warps=4,
            num_stages=_STAGES,
        )
    return y_NO


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, softcap: float = 0.0) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], dtype=torch.float32)


_fixed_linear_triton.register_fake(_fake)
if native.capability:
    torch.library.register_fake("fusedrl::fixed_linear", _fake)


# ---- public --------------------------------------------------------------------------------------
@torch.no_grad()
def fixed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    softcap: float | None = None,
    impl: str | None = None,
) -> Tensor:
    """Compute x W^T + b with a fixed order of summation. No gradient.

    Args:
        x: [N, K].
        weight: [O, K] and bias: [O] or None, in x's dtype; cpp and triton take float32 and
            bfloat16. triton and torch also take float32 or float16 x with bfloat16 weights.
        softcap: replaces the results by softcap * tanh(results / softcap), with the same arithmetic
            for every element.
        impl: "cpp" (CPU), "triton" or "torch"; by default the best one for the device. "torch" has
            no fixed order.
    Returns:
        [N, O] float32 (float64 for float64).
    Raises:
        ValueError: sizes or devices do not agree.
        TypeError: a dtype is not supported.
        RuntimeError: `impl` cannot run on this machine.
    """
    op = "fixed_linear"
    check(op, {"x": (x, "N K"), "weight": (weight, "O K"), "bias": (bias, "O")})
    mixed = weight.dtype == torch.bfloat16 and x.dtype in (torch.float32, torch.float16)
    chosen = _IMPLS.choose(
        x.device,
        impl,
        {"cpp": f"it takes x and weights of one dtype, got {x.dtype} and bfloat16"}
        if mixed
        else {},
    )
    if not mixed:
        check_dtype(op, "x", x, FLOATS if chosen == "torch" else FIXED_LINEAR_DTYPES)
        check_dtype(op, "weight", weight, (x.dtype,))
    check_dtype(op, "bias", bias, (weight.dtype,))
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{op}: expected a softcap above 0 or None, got {softcap}")
    if chosen == "torch":
        return fixed_linear_reference(x, weight, bias, softcap)
    return (_fixed_linear_triton if chosen == "triton" else torch.ops.fusedrl.fixed_linear)(
        x, weight, bias, softcap or 0.0
    )
