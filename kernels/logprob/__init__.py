"""logprob: log-probability of one token per row of logits, and the entropy of the row, in one read.

    d_j = (z_j - max z) / T     S = sum e^d     W = sum d e^d
    logp = d_y - log S          H = log S - W / S
    dz_j = (g (1[j = y] - p_j) - h p_j (d_j - W / S)) / T

g and h are the upstream gradients of logp and of H.

Shapes    N rows (any leading dimensions, flattened); V vocabulary size; s bytes per logit.
Bytes     forward N V s (one read), backward 2 N V s (read and write). `logprob_` overwrites the
          logits with their gradient.
Numerics  float32 inside and out, whatever the dtype of the logits. The maximum is subtracted before
          the division by T: dividing first, at an offset of 1e4 and T = 0.7, costs 4e-4 nats. W
          sums the shifted logits d, because a sum of unshifted logits cancels when they are large.
          -inf logits contribute exactly nothing. A label whose logit is -inf has logp -inf and a
          zero gradient from g. A row of only -inf gives logp -inf, entropy 0, gradient 0. NaN or
          +inf in a row makes the results of that row NaN; nothing else gives NaN.
Kept      with `kept`, the sums and j run only over the tokens that truncation (top-k, top-p, min-p)
          left in the row. The other tokens count as -inf, are not read, and get a gradient of
          exactly 0.
Source    the log-softmax; online maximum as in Milakov and Gimelshein (2018), Online normalizer
          calculation for softmax.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedrl.kernels.kept import Kept
from fusedrl.kernels.logprob._cuda import InPlaceCuda, logprob_cuda
from fusedrl.kernels.logprob._reference import logprob_reference
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

if triton is not None:
    from fusedrl.kernels.logprob._triton import InPlaceTriton, logprob_triton

_IMPLS = Implementations(
    "logprob", cpu=("cpp", "torch", "triton"), cuda=("triton", "torch", "cuda")
)


# ---- what torch.compile sees of the C++ ops ------------------------------------------------------
if native.capability:

    @torch.library.register_fake("fusedrl::logprob_forward")
    def _(
        logits: Tensor,
        token_ids: Tensor,
        temperature: float,
        temperatures: Tensor | None,
        entropy: bool,
        ignore_index: int,
        kept_ids: Tensor | None = None,
        kept_offsets: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        per_row = logits.new_empty(token_ids.shape, dtype=torch.float32)
        return (
            per_row,
            torch.empty_like(per_row) if entropy else per_row.new_empty(0),
            per_row.new_empty(token_ids.numel(), 3),
        )

    @torch.library.register_fake("fusedrl::logprob_backward")
    def _(
        logp_grad: Tensor | None,
        entropy_grad: Tensor | None,
        logits: Tensor,
        token_ids: Tensor,
        stats: Tensor,
        temperature: float,
        temperatures: Tensor | None,
        ignore_index: int,
        kept_ids: Tensor | None = None,
        kept_offsets: Tensor | None = None,
    ) -> Tensor:
        return torch.empty_like(logits, memory_format=torch.contiguous_format)

    @torch.library.register_fake("fusedrl::logprob_backward_")
    def _(
        logits: Tensor,
        logp_grad: Tensor | None,
        entropy_grad: Tensor | None,
        token_ids: Tensor,
        stats: Tensor,
        temperature: float,
        temperatures: Tensor | None,
        ignore_index: int,
        kept_ids: Tensor | None = None,
        kept_offsets: Tensor | None = None,
    ) -> None:
        return None


# ---- autograd: the in-place reference (the other implementations bring their own) ----------------
class _InPlaceTorch(torch.autograd.Function):
    """Run the reference and copy its gradient over the logits."""

    @staticmethod
    def forward(ctx, logits, *rest):
        ctx.save_for_backward(logits)
        ctx.rest = rest
        return logprob_reference(logits, *rest)

    @staticmethod
    def backward(ctx, *grads):
        target = ctx.saved_tensors[0].detach()
        with torch.enable_grad():
            z = target.clone().requires_grad_()
            (grad,) = torch.autograd.grad(logprob_reference(z, *ctx.rest), z, grads)
        return target.copy_(grad), *(None,) * len(ctx.rest)


# ---- public --------------------------------------------------------------------------------------
def logprob(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    entropy: bool = False,
    ignore_index: int = -100,
    kept: Kept | None = None,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the log-probability, in nats, of one token per row under softmax(logits /
    temperature).

    Args:
        logits: [..., V] float32, bfloat16 or float16 (the torch implementation also float64); any
            row strides, contiguous last dimension.
        token_ids: [...] int64 or int32.
        temperature: above 0. A number, or a tensor [...] with one value per row, which receives no
            gradient.
        entropy: True also returns the entropy of each row.
        ignore_index: rows whose token id is this number are not read; they have logp 0, entropy 0
            and no gradient.
        kept: for each row in order, the tokens that truncation (top-k, top-p, min-p) left, as
            `sample` returns them. Each row is then scored under the distribution over only these
            tokens. The logits of other tokens are not read and get a gradient of exactly 0; a label
            among other tokens has logp -inf.
        impl: "cpp", "triton", "cuda" or "torch"; by default the best one for the device.
    Returns:
        logp [...], or (logp [...], entropy [...]); float32. Differentiable once in the logits.
    Raises:
        IndexError: an id of a CPU tensor is outside [0, V), or its kept ids do not ascend. On a GPU
            a row with an id outside [0, V) gives NaN, and
            `fusedrl.kernels.runtime.faults.raise_faults` raises the error later (the torch
            implementation only gives NaN). A GPU does not check whether kept ids ascend.
        ValueError: sizes, devices, strides or the temperature do not fit.
        TypeError: a dtype is not supported.
        RuntimeError: `impl` cannot run on this machine.
    """
    return _logprob(
        "logprob", logits, token_ids, temperature, entropy, ignore_index, kept, impl, in_place=False
    )


def logprob_(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    entropy: bool = False,
    ignore_index: int = -100,
    kept: Kept | None = None,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute `logprob`, but let its backward overwrite `logits` with their gradient. This saves a
    second [..., V] tensor and its page faults.

    After backward, `logits` holds the gradient. Autograd then raises "modified by an inplace
    operation" for everything that would read the old values: a second backward through this call,
    or the backward of an operation that saved these logits (such as the tanh that made them).
    Within torch.compile only "cpp" overwrites the logits; the other implementations behave as
    `logprob`. Arguments, results and errors are those of `logprob`; in addition:

    Raises:
        ValueError: the logits are a leaf that requires a gradient (its .grad would be the leaf
            itself), their rows overlap in memory, or their leading dimensions need more independent
            strides than the implementation supports (two in cpp, one in the other implementations).
    """
    return _logprob(
        "logprob_", logits, token_ids, temperature, entropy, ignore_index, kept, impl, in_place=True
    )


def _logprob(
    op: str,
    logits: Tensor,
    token_ids: Tensor,
    temperature: float | Tensor,
    entropy: bool,
    ignore_index: int,
    kept: Kept | None,
    impl: str | None,
    in_place: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    leading = " ".join(f"d{i}" for i in range(logits.ndim - 1))
    per_row = temperature if isinstance(temperature, Tensor) else None
    kept_ids, kept_offsets = (None, None) if kept is None else kept
    check(
        op,
        {
            "logits": (logits, f"{leading} V"),
            "token_ids": (token_ids, leading),
            "temperature": (per_row, leading),
            "kept.token_ids": (kept_ids, "K"),
            "kept.offsets": (kept_offsets, "M"),
        },
    )
    chosen = _IMPLS.choose(logits.device, impl)
    check_dtype(op, "logits", logits, FLOATS if chosen == "torch" else FLOATS[:3])
    check_dtype(op, "token_ids", token_ids, (torch.int64, torch.int32))
    check_dtype(op, "temperature", per_row, FLOATS)
    check_dtype(op, "kept.token_ids", kept_ids, (torch.int32,))
    check_dtype(op, "kept.offsets", kept_offsets, (torch.int64,))
    check_last_contiguous(op, "logits", logits)
    if kept_offsets is not None and kept_offsets.shape[0] != token_ids.numel() + 1:
        raise ValueError(
            f"{op}: expected {token_ids.numel() + 1} kept.offsets, one more than rows, got "
            f"{kept_offsets.shape[0]}; keep what the same rows kept"
        )
    if not isinstance(temperature, Tensor):
        check_temperature(op, temperature)
    if in_place and logits.requires_grad and torch.is_grad_enabled():
        _check_overwritable(op, logits)
    value, per_row = (1.0, per_row.detach()) if per_row is not None else (float(temperature), None)
    if chosen == "cpp":
        native_op = torch.ops.fusedrl.logprob_in_place if in_place else torch.ops.fusedrl.logprob
        logp, entropies = native_op(
            logits, token_ids, value, per_row, entropy, ignore_index, kept_ids, kept_offsets
        )
        return (logp, entropies) if entropy else logp
    # in a graph these gradients would be opaque; the compiler plans its memory itself
    in_place = in_place and not torch.compiler.is_compiling()
    if logits.device.type == "cpu" and not torch.compiler.is_compiling():
        check_ids(op, token_ids, logits.shape[-1], ignore_index)
        if kept is not None:
            _check_kept(op, kept, logits.shape[-1])
    if chosen == "torch":
        scale = value if per_row is None else per_row
        logp, entropies = (_InPlaceTorch.apply if in_place else logprob_reference)(
            logits, token_ids, scale, ignore_index, kept
        )
    else:
        rest = (value, per_row, entropy, ignore_index, kept_ids, kept_offsets)
        logp, entropies = _on_a_gpu(op, chosen, in_place, logits, token_ids, *rest)
    return (logp, entropies) if entropy else logp


def _on_a_gpu(
    op: str,
    impl: str,
    in_place: bool,
    logits: Tensor,
    token_ids: Tensor,
    temperature: float,
    per_row: Tensor | None,
    entropy: bool,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    """Run the Triton or CUDA C++ kernel, which needs the logits as a matrix."""
    rows = logits.reshape(-1, logits.shape[-1])  # copies if the leading dimensions do not merge
    if in_place and rows.data_ptr() != logits.data_ptr():
        raise ValueError(
            f"{op}: expected logits that view as [N, V], got sizes {tuple(logits.shape)} with "
            f"strides {logits.stride()}; use logprob"
        )
    temperature_N = None if per_row is None else per_row.reshape(-1).float()
    if impl == "cuda":
        function = InPlaceCuda.apply if in_place else logprob_cuda
    else:
        function = InPlaceTriton.apply if in_place else logprob_triton
    logp, entropies, _ = function(
        rows, token_ids.reshape(-1), temperature, temperature_N, entropy, *rest
    )
    shape = token_ids.shape
    return logp.view(shape), entropies.view(shape) if entropy else entropies


def check_ids(op: str, token_ids: Tensor, V: int, ignore_index: int) -> None:
    """Raise IndexError if an id is neither in [0, V) nor `ignore_index`. The host reads the ids, so
    on a GPU this would synchronise."""
    wrong = (token_ids != ignore_index) & ((token_ids < 0) | (token_ids >= V))
    if wrong.any():
        row = int(wrong.reshape(-1).nonzero()[0])
        raise IndexError(
            f"{op}: expected token ids in [0, {V}) or ignore_index {ignore_index}, got "
            f"{int(token_ids.reshape(-1)[row])} in row {row}"
        )


def _check_kept(op: str, kept: Kept, V: int) -> None:
    """Raise ValueError if the offsets, or IndexError if the ids, break the rules of `Kept`. The
    host reads both, so on a GPU this would synchronise."""
    ids_K, offsets = kept
    if offsets[0] != 0 or (offsets.diff() < 0).any() or offsets[-1] > len(ids_K):
        raise ValueError(
            f"{op}: expected kept.offsets that ascend from 0 to at most {len(ids_K)}, the number "
            f"of kept ids, got {offsets[0]} to {offsets[-1]}"
        )
    ids_K = ids_K[: int(offsets[-1])].long()
    before_K = ids_K.roll(1)
    before_K[offsets[:-1][offsets.diff() > 0]] = -1  # the first of a row
    wrong = (ids_K >= V) | (ids_K <= before_K)
    if wrong.any():
        place = wrong.nonzero()[0]
        row = int(torch.searchsorted(offsets[1:], place, right=True))
        raise IndexError(
            f"{op}: expected kept ids that ascend in [0, {V}), got {int(ids_K[place])} after "
            f"{int(before_K[place])} in row {row}"
        )


def _check_overwritable(op: str, logits: Tensor) -> None:
    if logits.is_leaf:
        raise ValueError(
            f"{op}: expected logits that an operation computed, got a leaf that requires a "
            "gradient: its .grad would be the "
            "overwritten leaf itself; use logprob"
        )
    needed = 1  # elements spanned by one index of the dimension to the right
    for size, stride in sorted(
        zip(logits.shape, logits.stride(), strict=True), key=lambda pair: pair[1]
    ):
        if size > 1 and stride < needed:
            raise ValueError(
                f"{op}: expected logits whose rows lie apart in memory, got sizes "
                f"{tuple(logits.shape)} with strides "
                f"{logits.stride()}; use logprob"
            )
        needed = max(needed, size * stride)
