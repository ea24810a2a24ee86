"""full_kl: the divergence of two rows of logits over the whole vocabulary, and its gradient with
respect to the first row.

    p = softmax(z / T), r = softmax(z_r / T), l = log p - log r, m = (p + r) / 2
    reverse  KL(p || r) = E_p[l]                       dz_j = p_j (l_j - KL) / T
    forward  KL(r || p) = -E_r[l]                      dz_j = (p_j - r_j) / T
    jsd      (KL(p || m) + KL(r || m)) / 2 <= ln 2     dz_j = p_j (log(p_j / m_j) - KL(p || m)) / 2T

Shapes    N rows (any leading dimensions, flattened); V vocabulary size; s bytes per logit.
Bytes     forward 2 N V s (jsd twice), backward 2 N V s read and N V s written.
Numerics  float32 inside and out, whatever the dtype of the logits. reverse and forward take one
          pass: E_p[d - d_r] - (log S - log S_r), with d shifted by the running maxima. They are
          exactly 0 for equal logits, and never below 0. -inf logits contribute exactly nothing.
          Where p > 0 = r (forward: r > 0 = p) the KL is infinite and its gradient 0. A row of only
          -inf also has gradient 0. NaN or +inf in a pair of rows makes the result of that pair NaN;
          nothing else gives NaN.
Source    Kullback and Leibler (1951); Lin (1991) for the Jensen-Shannon divergence; gradients by
          differentiating the softmax.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedrl.kernels.full_kl._reference import full_kl_reference
from fusedrl.kernels.runtime import native
from fusedrl.kernels.runtime.checks import (
    FLOATS,
    check,
    check_dtype,
    check_last_contiguous,
    check_temperature,
)
from fusedrl.kernels.runtime.dispatch import Implementations
from fusedrl.kernels.runtime.triton import triton

# the order of Direction in csrc/cpu/include/full_kl_rows.h
DIRECTIONS = ("reverse", "forward", "jsd")
if triton is not None:
    from fusedrl.kernels.full_kl import _triton  # noqa: F401  (registers fusedrl::full_kl_triton)

_IMPLS = Implementations("full_kl", cpu=("cpp", "torch", "triton"), cuda=("triton", "torch"))


# ---- custom ops: what torch.compile sees ---------------------------------------------------------
if native.capability:

    @torch.library.register_fake("fusedrl::full_kl_forward")
    def _(
        logits: Tensor, ref_logits: Tensor, mask: Tensor | None, temperature: float, direction: int
    ) -> tuple[Tensor, Tensor]:
        return logits.new_empty(logits.shape[0], dtype=torch.float32), logits.new_empty(
            logits.shape[0], 5, dtype=torch.float32
        )

    @torch.library.register_fake("fusedrl::full_kl_backward")
    def _(
        kl_grad: Tensor,
        logits: Tensor,
        ref_logits: Tensor,
        stats: Tensor,
        temperature: float,
        direction: int,
    ) -> Tensor:
        return torch.empty_like(logits, memory_format=torch.contiguous_format)


# ---- public --------------------------------------------------------------------------------------
def check_direction(op: str, direction: str, temperature: float) -> None:
    """Raise ValueError unless `direction` is one of DIRECTIONS and `temperature` is above 0."""
    if direction not in DIRECTIONS:
        raise ValueError(
            f"{op}: expected a direction of {', '.join(DIRECTIONS)}, got {direction!r}"
        )
    check_temperature(op, temperature)


def full_kl(
    logits: Tensor,
    ref_logits: Tensor,
    *,
    temperature: float = 1.0,
    direction: str = "reverse",
    mask: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """Compute the divergence, in nats, of softmax(logits / temperature) from softmax(ref_logits /
    temperature), summed exactly over the vocabulary.

    Args:
        logits, ref_logits: [..., V] float32, bfloat16 or float16 (the torch implementation also
            float64), of one dtype; contiguous last dimension. ref_logits is a constant.
        temperature: above 0; divides both logits.
        direction: "reverse" KL(policy || reference), "forward" KL(reference || policy) or "jsd",
            the Jensen-Shannon divergence.
        mask: [...] bool; False rows are not read and have KL 0 and no gradient. If None, every row
            counts.
        impl: "cpp", "triton" or "torch"; by default the best one for the device.
    Returns:
        [...] float32 (float64 for float64). Differentiable once in `logits`.
    Raises:
        ValueError: the direction is unknown, or the temperature, sizes, devices or strides do not
            fit.
        TypeError: a dtype is not supported.
        RuntimeError: `impl` cannot run on this machine.
    """
    op = "full_kl"
    check_direction(op, direction, temperature)
    leading = " ".join(f"d{i}" for i in range(logits.ndim - 1))
    check(
        op,
        {
            "logits": (logits, f"{leading} V"),
            "ref_logits": (ref_logits, f"{leading} V"),
            "mask": (mask, leading),
        },
    )
    chosen_impl = _IMPLS.choose(logits.device, impl)
    check_dtype(op, "logits", logits, FLOATS if chosen_impl == "torch" else FLOATS[:3])
    check_dtype(op, "ref_logits", ref_logits, (logits.dtype,))
    check_dtype(op, "mask", mask, (torch.bool,))
    check_last_contiguous(op, "logits", logits)
    check_last_contiguous(op, "ref_logits", ref_logits)
    if logits.shape[-1] == 0:
        raise ValueError(f"{op}: expected a vocabulary, got logits of size {list(logits.shape)}")
    ref_logits = ref_logits.detach()
    if chosen_impl == "torch":
        return full_kl_reference(logits, ref_logits, mask, float(temperature), direction)
    V = logits.shape[-1]
    rows = (
        logits.reshape(-1, V),
        ref_logits.reshape(-1, V),
        None if mask is None else mask.reshape(-1),
        float(temperature),
        DIRECTIONS.index(direction),
    )
    kl = (
        torch.ops.fusedrl.full_kl(*rows)
        if chosen_impl == "cpp"
        else torch.ops.fusedrl.full_kl_triton(*rows)[0]
    )
    return kl.view(logits.shape[:-1])
