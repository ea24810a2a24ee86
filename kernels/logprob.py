"""logprob: logits -> log-probability of one token a row, and the entropy of the row, in one read.

    d_j = (z_j - max z) / T     S = sum e^d     W = sum d e^d     logp = d_y - log S     H = log S - W / S
    dz_j = (g (1[j = y] - p_j) - h p_j (d_j - W / S)) / T          for upstream gradients g of logp and h of H

Shapes    N rows behind any leading dimensions; V vocabulary.
Bytes     forward N V s (one read), backward 2 N V s (read and write); `logprob_` writes the gradient over the logits.
Numerics  float32 inside and out, whatever the logits. The maximum is subtracted before dividing by T (dividing first at an offset of 1e4
          and T = 0.7 costs 4e-4 nats) and the weighted sum is the shifted one (the unshifted one cancels at large logits).
          -inf logits contribute exactly nothing; a label on -inf gives -inf with a zero gradient from g; a row that is all -inf gives
          logp -inf, entropy 0, gradient 0; NaN or +inf in a row gives NaN in its results, and nothing else does.
Source    the log-softmax; online maximum as in Milakov and Gimelshein (2018), Online normalizer calculation for softmax.
"""
from __future__ import annotations

import torch
from torch import Tensor

from fusedrl.kernels import native
from fusedrl.kernels.checks import FLOATS, check, check_dtype, check_last_contiguous
from fusedrl.kernels.dispatch import Implementations
from fusedrl.kernels.logprob_cuda import InPlaceCuda, logprob_cuda

try:
    import triton
    import triton.language as tl
except ImportError:  # dispatch then says that Triton cannot run here
    triton = None

_IMPLS = Implementations("logprob", cpu=("cpp", "torch", "triton"), cuda=("triton", "torch", "cuda"))
_BLOCK, _WARPS = 4096, 8


# ---- reference -------------------------------------------------------------------------------------------------------
def logprob_reference(logits: Tensor, token_ids: Tensor, temperature: float | Tensor = 1.0, ignore_index: int = -100) -> tuple[Tensor, Tensor]:
    """(logp, entropy) by definition, differentiable, on any device and in any float dtype (float64 is the oracle)."""
    ignored = token_ids == ignore_index
    in_range = (token_ids >= 0) & (token_ids < logits.shape[-1])
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)).masked_fill(ignored[..., None], 0.0)  # an ignored row may hold anything
    top = z.detach().amax(-1, keepdim=True).nan_to_num(nan=torch.nan, posinf=torch.nan, neginf=0.0)
    d = (z - top) / (temperature[..., None].to(z.dtype) if isinstance(temperature, Tensor) else temperature)
    missing = d == -torch.inf
    d = d.masked_fill(missing, 0.0)
    e = torch.exp(d).masked_fill(missing, 0.0)
    S = e.sum(-1)
    empty = S == 0
    S = S.masked_fill(empty, 1.0)
    label = token_ids.long().clamp(0, logits.shape[-1] - 1)[..., None]
    logp = d.gather(-1, label).squeeze(-1) - torch.log(S)
    logp = torch.where(missing.gather(-1, label).squeeze(-1) & ~S.isnan(), -torch.inf, logp)
    logp = torch.where(ignored, 0.0, torch.where(in_range, logp, torch.nan))
    entropy = torch.where(ignored | empty, 0.0, torch.log(S) - (d * e).sum(-1) / S)
    return logp, entropy


# ---- Triton ----------------------------------------------------------------------------------------------------------
if triton is not None:
    @triton.jit
    def _forward_kernel(logits_ptr, ids_ptr, logp_ptr, entropy_ptr, stats_ptr, temperatures_ptr, temperature, V, row_stride, ignore_index,
                        ENTROPY: tl.constexpr, PER_ROW: tl.constexpr, BLOCK: tl.constexpr):
        n = tl.program_id(0).to(tl.int64)
        label = tl.load(ids_ptr + n)
        row_ptr = logits_ptr + n * row_stride
        T = temperature
        if PER_ROW:
            T = tl.load(temperatures_ptr + n)
        inverse = 1.0 / T
        m = -float("inf")
        S = 0.0
        W = 0.0
        for start in range(0, tl.where(label == ignore_index, 0, V), BLOCK):
            v = start + tl.arange(0, BLOCK)
            z = tl.load(row_ptr + v, mask=v < V, other=-float("inf")).to(tl.float32)
            higher = tl.maximum(m, tl.max(z, 0))
            base = tl.where(higher == -float("inf"), 0.0, higher)
            d = (z - base) * inverse
            e = tl.exp(d)
            shift = tl.where(m == -float("inf"), 0.0, tl.maximum((m - base) * inverse, -200.0))
            factor = tl.exp(shift)
            if ENTROPY:
                W = factor * (W + shift * S) + tl.sum(tl.where(e > 0.0, d, 0.0) * e, 0)
            S = factor * S + tl.sum(e, 0)
            m = higher
        in_range = (label >= 0) & (label < V)
        z_y = tl.load(row_ptr + tl.where(in_range, label, 0), mask=in_range, other=0.0).to(tl.float32)
        log_S = tl.log(tl.where(S == 0.0, 1.0, S))
        logp = tl.where((z_y == -float("inf")) & (S == S), -float("inf"), (z_y - m) / T - log_S)
        logp = tl.where(label == ignore_index, 0.0, tl.where(in_range, logp, float("nan")))
        mean = W / tl.where(S == 0.0, 1.0, S)
        tl.store(logp_ptr + n, logp)
        if ENTROPY:
            tl.store(entropy_ptr + n, log_S - mean)
        tl.store(stats_ptr + n * 3, m)
        tl.store(stats_ptr + n * 3 + 1, S)
        tl.store(stats_ptr + n * 3 + 2, mean)

    @triton.jit
    def _backward_kernel(logp_grad_ptr, entropy_grad_ptr, logits_ptr, ids_ptr, logp_ptr, stats_ptr, grad_ptr, temperatures_ptr, temperature, V,
                         row_stride, grad_stride, ignore_index, ENTROPY: tl.constexpr, PER_ROW: tl.constexpr, BLOCK: tl.constexpr):
        n = tl.program_id(0).to(tl.int64)
        v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        label = tl.load(ids_ptr + n)
        T = temperature
        if PER_ROW:
            T = tl.load(temperatures_ptr + n)
        m = tl.load(stats_ptr + n * 3)
        S = tl.load(stats_ptr + n * 3 + 1)
        mean = tl.load(stats_ptr + n * 3 + 2)
        in_range = (label >= 0) & (label < V)
        # A label on -inf gets nothing from g. The logit itself may be gone: another block of an in-place call may have been here.
        g = tl.where(tl.load(logp_ptr + n) == -float("inf"), 0.0, tl.load(logp_grad_ptr + n))
        h = 0.0
        if ENTROPY:
            h = tl.load(entropy_grad_ptr + n)
        # A row that no gradient reaches is zero whatever it holds; it is not even read.
        live = (label != ignore_index) & ((g != 0.0) | (h != 0.0)) & (S != 0.0)
        z = tl.load(logits_ptr + n * row_stride + v, mask=v < tl.where(live, V, 0), other=-float("inf")).to(tl.float32)
        d = (z - m) * (1.0 / T)
        p = tl.exp(d) / tl.where(live, S, 1.0)
        g = tl.where(in_range, g, float("nan"))
        grad = tl.where(v == label, g, 0.0) - g * p
        if ENTROPY:
            grad -= h * p * (tl.where(p > 0.0, d, 0.0) - mean)
        tl.store(grad_ptr + n * grad_stride + v, tl.where(live, grad / T, 0.0), mask=v < V)

    def _offline(kernel, pointers: dict[str, str], scalars: dict[str, str]) -> dict[str, dict]:
        return {
            f"{kernel.__name__.strip('_')}_{dtype}{'_entropy' if entropy else ''}": {
                "kernel": kernel,
                "signature": {name: kind.replace("logits", dtype) for name, kind in {**pointers, **scalars}.items()},
                "constexprs": {"ENTROPY": entropy, "PER_ROW": entropy, "BLOCK": _BLOCK},
                "num_warps": _WARPS,
            }
            for dtype in ("fp32", "bf16", "fp16") for entropy in (False, True)
        }

    # What tests/offline_compile.py compiles.
    OFFLINE_KERNELS = _offline(
        _forward_kernel,
        {"logits_ptr": "*logits", "ids_ptr": "*i64", "logp_ptr": "*fp32", "entropy_ptr": "*fp32", "stats_ptr": "*fp32", "temperatures_ptr": "*fp32"},
        {"temperature": "fp32", "V": "i32", "row_stride": "i64", "ignore_index": "i32"},
    ) | _offline(
        _backward_kernel,
        {"logp_grad_ptr": "*fp32", "entropy_grad_ptr": "*fp32", "logits_ptr": "*logits", "ids_ptr": "*i64", "logp_ptr": "*fp32", "stats_ptr": "*fp32",
         "grad_ptr": "*logits", "temperatures_ptr": "*fp32"},
        {"temperature": "fp32", "V": "i32", "row_stride": "i64", "grad_stride": "i64", "ignore_index": "i32"},
    )


# ---- launchers: allocate, grid ------------------------------------------------------------------------------------------
def _forward_triton(logits_NV: Tensor, ids_N: Tensor, temperature: float, temperature_N: Tensor | None, entropy: bool,
                    ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """(logp [N], entropy [N] or [0], stats [N, 3] = max, S, W / S)."""
    N, V = logits_NV.shape
    logp_N, stats_N3 = logits_NV.new_empty(N, dtype=torch.float32), logits_NV.new_empty(N, 3, dtype=torch.float32)
    entropy_N = torch.empty_like(logp_N) if entropy else logp_N.new_empty(0)
    if N:
        _forward_kernel[(N,)](logits_NV, ids_N.contiguous(), logp_N, entropy_N if entropy else logp_N, stats_N3,
                              logp_N if temperature_N is None else temperature_N, temperature, V, logits_NV.stride(0), ignore_index,
                              ENTROPY=entropy, PER_ROW=temperature_N is not None, BLOCK=_BLOCK, num_warps=_WARPS)
    return logp_N, entropy_N, stats_N3


def _backward_triton(logp_grad_N: Tensor | None, entropy_grad_N: Tensor | None, logits_NV: Tensor, ids_N: Tensor, logp_N: Tensor, stats_N3: Tensor,
                     temperature: float, temperature_N: Tensor | None, ignore_index: int, out_NV: Tensor) -> None:
    """The gradient into `out_NV`, which may be the logits."""
    N, V = logits_NV.shape
    if N == 0:
        return
    g_N = torch.zeros_like(logp_N) if logp_grad_N is None else logp_grad_N.contiguous()
    h_N = g_N if entropy_grad_N is None else entropy_grad_N.contiguous()
    _backward_kernel[(N, triton.cdiv(V, _BLOCK))](
        g_N, h_N, logits_NV, ids_N.contiguous(), logp_N, stats_N3, out_NV, logp_N if temperature_N is None else temperature_N, temperature, V,
        logits_NV.stride(0), out_NV.stride(0), ignore_index, ENTROPY=entropy_grad_N is not None, PER_ROW=temperature_N is not None, BLOCK=_BLOCK,
        num_warps=_WARPS)


# ---- custom ops: what torch.compile sees --------------------------------------------------------------------------------
@torch.library.custom_op("fusedrl::logprob_triton", mutates_args=())
def _logprob_triton(logits: Tensor, token_ids: Tensor, temperature: float, temperatures: Tensor | None, entropy: bool,
                    ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    return _forward_triton(logits, token_ids, temperature, temperatures, entropy, ignore_index)


@torch.library.custom_op("fusedrl::logprob_triton_backward", mutates_args=())
def _logprob_triton_backward(logp_grad: Tensor | None, entropy_grad: Tensor | None, logits: Tensor, token_ids: Tensor, logp: Tensor, stats: Tensor,
                             temperature: float, temperatures: Tensor | None, ignore_index: int) -> Tensor:
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    _backward_triton(logp_grad, entropy_grad, logits, token_ids, logp, stats, temperature, temperatures, ignore_index, grad)
    return grad


def _forward_fake(logits: Tensor, token_ids: Tensor, temperature: float, temperatures: Tensor | None, entropy: bool,
                  ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    per_row = logits.new_empty(token_ids.shape, dtype=torch.float32)
    return per_row, torch.empty_like(per_row) if entropy else per_row.new_empty(0), per_row.new_empty(token_ids.numel(), 3)


_logprob_triton.register_fake(_forward_fake)


@_logprob_triton_backward.register_fake
def _(logp_grad: Tensor | None, entropy_grad: Tensor | None, logits: Tensor, token_ids: Tensor, logp: Tensor, stats: Tensor, temperature: float,
      temperatures: Tensor | None, ignore_index: int) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


if native.capability:
    torch.library.register_fake("fusedrl::logprob_forward", _forward_fake)

    @torch.library.register_fake("fusedrl::logprob_backward")
    def _(logp_grad: Tensor | None, entropy_grad: Tensor | None, logits: Tensor, token_ids: Tensor, stats: Tensor, temperature: float,
          temperatures: Tensor | None, ignore_index: int) -> Tensor:
        return torch.empty_like(logits, memory_format=torch.contiguous_format)

    @torch.library.register_fake("fusedrl::logprob_backward_")
    def _(logits: Tensor, logp_grad: Tensor | None, entropy_grad: Tensor | None, token_ids: Tensor, stats: Tensor, temperature: float,
          temperatures: Tensor | None, ignore_index: int) -> None:
        return None


# ---- autograd (that of the C++ implementation is in C++) ------------------------------------------------------------------
def _setup_context(ctx, inputs, output) -> None:
    logits, token_ids, temperature, temperatures, entropy, ignore_index = inputs
    logp, entropies, stats = output
    ctx.save_for_backward(logits, token_ids, logp, stats, temperatures)
    ctx.temperature, ctx.entropy, ctx.ignore_index = temperature, entropy, ignore_index
    ctx.mark_non_differentiable(*([stats] if entropy else [stats, entropies]))
    ctx.set_materialize_grads(False)


def _backward(ctx, logp_grad: Tensor | None, entropy_grad: Tensor | None, _stats_grad: None):
    logits, token_ids, logp, stats, temperatures = ctx.saved_tensors
    grad = _logprob_triton_backward(logp_grad, entropy_grad, logits, token_ids, logp, stats, ctx.temperature, temperatures, ctx.ignore_index)
    return grad, None, None, None, None, None


_logprob_triton.register_autograd(_backward, setup_context=_setup_context)


class _InPlaceTriton(torch.autograd.Function):
    """As above, with the gradient written over the logits."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _forward_triton(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx, logp_grad, entropy_grad, _stats_grad):
        logits, token_ids, logp, stats, temperatures = ctx.saved_tensors  # raises when the logits were written to since
        grad = logits.detach()  # shares the version counter: whoever else saved these logits is told
        _backward_triton(logp_grad, entropy_grad, grad, token_ids, logp, stats, ctx.temperature, temperatures, ctx.ignore_index, grad)
        torch.autograd.graph.increment_version(grad)
        return grad, None, None, None, None, None


class _InPlaceTorch(torch.autograd.Function):
    """The reference, with its gradient copied over the logits."""

    @staticmethod
    def forward(ctx, logits, token_ids, temperature, ignore_index):
        ctx.save_for_backward(logits)
        ctx.rest = (token_ids, temperature, ignore_index)
        return logprob_reference(logits, token_ids, temperature, ignore_index)

    @staticmethod
    def backward(ctx, *grads):
        target = ctx.saved_tensors[0].detach()
        with torch.enable_grad():
            z = target.clone().requires_grad_()
            (grad,) = torch.autograd.grad(logprob_reference(z, *ctx.rest), z, grads)
        return target.copy_(grad), None, None, None


# ---- public ------------------------------------------------------------------------------------------------------------
def logprob(logits: Tensor, token_ids: Tensor, *, temperature: float | Tensor = 1.0, entropy: bool = False, ignore_index: int = -100,
            impl: str | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of one token a row under softmax(logits / temperature), in nats.

    Args:
        logits: [..., V] float32, bfloat16 or float16 (the torch implementation also float64); any row strides, contiguous last dimension.
        token_ids: [...] int64 or int32.
        temperature: above 0; a number, or a tensor [...] with one value a row (it receives no gradient).
        entropy: also return the entropy of each row.
        ignore_index: rows with this id have logp 0, entropy 0 and no gradient, and are not read.
        impl: "cpp", "triton", "cuda" or "torch"; by default the best one for the device.
    Returns:
        logp [...], or (logp [...], entropy [...]); float32. Differentiable, once, in the logits.
    Raises:
        IndexError: an id outside [0, V), on the CPU (on a GPU that row is NaN). ValueError: sizes, devices, strides or a
        temperature that does not fit. TypeError: dtypes. RuntimeError: `impl` cannot run here.
    """
    return _logprob("logprob", logits, token_ids, temperature, entropy, ignore_index, impl, in_place=False)


def logprob_(logits: Tensor, token_ids: Tensor, *, temperature: float | Tensor = 1.0, entropy: bool = False, ignore_index: int = -100,
             impl: str | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """`logprob` whose backward overwrites `logits` with their gradient: no second [..., V] tensor, and no page faults for one.

    Afterwards `logits` holds the gradient. Autograd refuses whatever would read the old values: a second backward through this call, or
    an operation that saved these logits (such as the tanh that made them), raises "modified by an inplace operation" when it is reached.
    Within torch.compile only "cpp" does so; the others are `logprob` there. Arguments, results and errors as `logprob`; in addition:

    Raises:
        ValueError: logits that are a leaf requiring a gradient (its .grad would be the leaf itself), whose rows overlap in memory,
            or whose leading dimensions have more strides of their own than the implementation walks (cpp two, the others one).
    """
    return _logprob("logprob_", logits, token_ids, temperature, entropy, ignore_index, impl, in_place=True)


def _logprob(op: str, logits: Tensor, token_ids: Tensor, temperature: float | Tensor, entropy: bool, ignore_index: int, impl: str | None,
             in_place: bool) -> Tensor | tuple[Tensor, Tensor]:
    leading = " ".join(f"d{i}" for i in range(logits.ndim - 1))
    per_row = temperature if isinstance(temperature, Tensor) else None
    check(op, {"logits": (logits, f"{leading} V"), "token_ids": (token_ids, leading), "temperature": (per_row, leading)})
    chosen = _IMPLS.choose(logits.device, impl)
    check_dtype(op, "logits", logits, FLOATS if chosen == "torch" else FLOATS[:3])
    check_dtype(op, "token_ids", token_ids, (torch.int64, torch.int32))
    check_dtype(op, "temperature", per_row, FLOATS)
    check_last_contiguous(op, "logits", logits)
    if per_row is None and not temperature > 0:
        raise ValueError(f"{op}: expected a temperature above 0, got {temperature}; for greedy scores use temperature=1.0")
    if in_place and logits.requires_grad and torch.is_grad_enabled():
        _check_overwritable(op, logits)
    value, per_row = (1.0, per_row.detach()) if per_row is not None else (float(temperature), None)
    if chosen == "cpp":
        native_op = torch.ops.fusedrl.logprob_in_place if in_place else torch.ops.fusedrl.logprob
        logp, entropies = native_op(logits, token_ids, value, per_row, entropy, ignore_index)
        return (logp, entropies) if entropy else logp
    in_place = in_place and not torch.compiler.is_compiling()  # in a graph these gradients would be opaque; the compiler plans its memory itself
    if logits.device.type == "cpu" and not torch.compiler.is_compiling():
        check_ids(op, token_ids, logits.shape[-1], ignore_index)
    if chosen == "torch":
        scale = value if per_row is None else per_row
        logp, entropies = (_InPlaceTorch.apply if in_place else logprob_reference)(logits, token_ids, scale, ignore_index)
    else:
        V = logits.shape[-1]
        rows = logits.reshape(-1, V)  # a copy where the leading dimensions do not merge
        if in_place and rows.data_ptr() != logits.data_ptr():
            raise ValueError(f"{op}: expected logits that view as [N, V], got sizes {tuple(logits.shape)} with strides {logits.stride()}; "
                             "use logprob")
        temperature_N = None if per_row is None else per_row.reshape(-1).float()
        functions = (logprob_cuda, InPlaceCuda.apply) if chosen == "cuda" else (_logprob_triton, _InPlaceTriton.apply)
        function = functions[in_place]
        logp, entropies, _ = function(rows, token_ids.reshape(-1), value, temperature_N, entropy, ignore_index)
        logp, entropies = logp.view(token_ids.shape), entropies.view(token_ids.shape) if entropy else entropies
    return (logp, entropies) if entropy else logp


def check_ids(op: str, token_ids: Tensor, V: int, ignore_index: int) -> None:
    """Raises IndexError for an id that is neither in [0, V) nor `ignore_index`; it reads the ids, so on a GPU it would wait."""
    wrong = (token_ids != ignore_index) & ((token_ids < 0) | (token_ids >= V))
    if wrong.any():
        row = int(wrong.reshape(-1).nonzero()[0])
        raise IndexError(f"{op}: expected token ids in [0, {V}) or ignore_index {ignore_index}, got {int(token_ids.reshape(-1)[row])} in row {row}")


def _check_overwritable(op: str, logits: Tensor) -> None:
    if logits.is_leaf:
        raise ValueError(f"{op}: expected logits that an operation computed, got a leaf that requires a gradient: its .grad would be the "
                         "overwritten leaf itself; use logprob")
    needed = 1  # elements that one index of the dimension to the right spans
    for size, stride in sorted(zip(logits.shape, logits.stride(), strict=True), key=lambda pair: pair[1]):
        if size > 1 and stride < needed:
            raise ValueError(f"{op}: expected logits whose rows lie apart in memory, got sizes {tuple(logits.shape)} with strides "
                             f"{logits.stride()}; use logprob")
        needed = max(needed, size * stride)
