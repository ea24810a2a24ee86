"""varlen_attention: packed attention for training, o_i = sum_j softmax_j(z_ij) v_j over the tokens
j that token i may see.

    z_ij = c tanh(scale q_i . k_j / c), or scale q_i . k_j without a softcap c

Shapes    N tokens of B sequences laid end to end, Hq query heads, Hkv key/value heads (Hq / Hkv
          query heads share one key/value head), D head dim, T the longest sequence.
Bytes     in C++ q, k, v and o once each, plus Hq floats per token for the backward. The torch
          implementation adds padded copies. On a CPU, where the lengths are known, it sorts
          sequences into groups of similar length. It pads each group on the right and passes it to
          scaled_dot_product_attention in one call, so that many short sequences cost a few calls.
          With a causal mask, right padding needs no mask of its own: no token sees later ones. A
          softcap needs the T x T scores in memory, which scaled_dot_product_attention avoids.
Numerics  softmax and sums in float32 at least. No value of another sequence, NaN included, reaches
          a sequence; in C++ not even its last bits depend on other sequences. Bitwise reproducible
          on CPU, forward and backward (every index is unique, so no sum has an open order).
On CUDA   flash-attn if it is installed, else torch.nn.attention.varlen, else Triton
          (attention/_triton.py), else the torch implementation: the first that serves the call.
          None has run on a GPU in this project. Before their first call on a device, the first
          three are tested against the reference (attention/_trial.py). A wrong one is not used, and
          a warning says why.
Source    Vaswani et al. (2017), eq. 1; windows as in Mistral 7B (Jiang et al., 2023); softcaps as
          in Gemma 2 (Gemma Team, 2024).
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedrl.kernels.attention import _flash, _trial, _triton
from fusedrl.kernels.paged_attention import paged_attention as paged_attention  # a second address
from fusedrl.kernels.runtime import native
from fusedrl.kernels.runtime.checks import FLOATS, check, check_dtype
from fusedrl.kernels.runtime.dispatch import Implementations, unavailable

_IMPLS = Implementations(
    "varlen_attention",
    cpu=("cpp", "torch", "triton"),
    cuda=("flash_attn", "torch_varlen", "triton", "torch"),
)


# ---- reference -----------------------------------------------------------------------------------
def varlen_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
) -> Tensor:
    """The definition, one sequence at a time, differentiable, on any device and in any float dtype
    (float64 is the oracle)."""
    groups = q.shape[1] // k.shape[1]
    scale = q.shape[2] ** -0.5 if scale is None else scale
    outs = []
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        queries, keys, values = (
            x[start:end].transpose(0, 1)
            for x in (q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1))
        )
        outs.append(
            _attend(
                queries,
                keys,
                values,
                _visible(end - start, causal, window, q.device),
                softcap,
                scale,
            ).transpose(0, 1)
        )
    return torch.cat(outs) if outs else torch.zeros_like(q)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, softcap: float | None, scale: float
) -> Tensor:
    """Attend by explicit scores. q, k and v are [..., T, D] each, `seen` is [..., T, T]."""
    scores = (q @ k.transpose(-1, -2)) * scale
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    # a finite number, since a padded row may see nothing, and NaN would reach the gradients of v
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    return (
        torch.softmax(scores, -1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype) @ v
    )


def _visible(length: int, causal: bool, window: int | None, device: torch.device) -> Tensor:
    """Return [T, T] bool, True at (i, j) if token i may see token j."""
    at = torch.arange(length, device=device)
    behind = at[:, None] - at[None]
    seen = behind >= 0 if causal else torch.ones_like(behind, dtype=torch.bool)
    return seen if window is None else seen & (behind.abs() < window)


# ---- torch: a few padded calls -------------------------------------------------------------------
def _padded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    lengths: Tensor | None,
    B: int,
    T: int,
    causal: bool,
    window: int | None,
    softcap: float | None,
    scale: float,
) -> Tensor:
    """Attend within B sequences whose tokens go to the rows `slots` of a [B * T] layout. `lengths`
    are needed only if attention is not causal."""
    groups = q.shape[1] // k.shape[1]

    def pad(x: Tensor) -> Tensor:
        # else every sequence is T long and the packed layout is the padded one
        if x.shape[0] != B * T:
            x = x.new_zeros(B * T, *x.shape[1:]).index_copy(0, slots, x)
        x = x.view(B, T, *x.shape[1:])
        return x.transpose(1, 2)

    def repeat(x: Tensor) -> Tensor:
        return x if groups == 1 else x[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2)

    window = None if window is not None and window >= T else window
    mask = None
    if window is not None or not causal or softcap is not None:
        mask = _visible(T, causal, window, q.device)
        if lengths is not None:
            mask = mask & (torch.arange(T, device=q.device) < lengths[:, None])[:, None, None]
    queries, keys, values = pad(q), repeat(pad(k)), repeat(pad(v))
    if softcap is None or mask is None:
        o = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=mask is None, scale=scale
        )
    else:
        o = _attend(queries, keys, values, mask, softcap, scale)
    o = o.transpose(1, 2).reshape(B * T, *q.shape[1:])
    return o if q.shape[0] == B * T else o.index_select(0, slots)


def _varlen_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_length: int,
    causal: bool,
    window: int | None,
    softcap: float | None,
    scale: float,
) -> Tensor:
    N, B = q.shape[0], cu_seqlens.shape[0] - 1
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()

    def slots_of(sequences: Tensor, T: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Return, for the tokens of `sequences` in order, their rows in the packed tensors and in
        the padded layout."""
        sizes = lengths[sequences]
        first = sizes.cumsum(0) - sizes
        shift = torch.stack(
            [starts[sequences] - first, torch.arange(len(sequences), device=q.device) * T - first]
        )
        at = torch.arange(tokens, device=q.device)
        packed, padded = torch.repeat_interleave(shift, sizes, dim=1, output_size=tokens) + at
        return packed, padded

    groups = (
        _groups(lengths.tolist())
        if q.device.type == "cpu" and not torch.compiler.is_compiling()
        else [list(range(B))]
    )
    if len(groups) == 1 and len(groups[0]) == B:
        _, slots = slots_of(torch.arange(B, device=q.device), max_length, N)
        return _padded(
            q,
            k,
            v,
            slots,
            None if causal else lengths,
            B,
            max_length,
            causal,
            window,
            softcap,
            scale,
        )
    outs, order, sizes = [], [], lengths.tolist()
    for group in groups:
        T, sequences = sizes[group[0]], torch.tensor(group)
        rows, slots = slots_of(sequences, T, sum(sizes[b] for b in group))
        own_q, own_k, own_v = (x.index_select(0, rows) for x in (q, k, v))
        outs.append(
            _padded(
                own_q,
                own_k,
                own_v,
                slots,
                None if causal else lengths[sequences],
                len(group),
                T,
                causal,
                window,
                softcap,
                scale,
            )
        )
        order.append(rows)
    rows = torch.cat(order)
    return torch.cat(outs).index_select(
        0, torch.empty_like(rows).index_copy_(0, rows, torch.arange(N))
    )


def _groups(lengths: list[int]) -> list[list[int]]:
    """Return groups of sequences to pad together. One group holds all if it wastes at most half the
    slots. Otherwise, longest first, each group goes down to half its longest sequence."""
    if len(lengths) * max(lengths) <= 2 * sum(lengths):
        return [list(range(len(lengths)))]
    groups: list[list[int]] = []
    for b in sorted(range(len(lengths)), key=lambda b: -lengths[b]):
        if lengths[b] and (not groups or 2 * lengths[b] <= lengths[groups[-1][0]]):
            groups.append([b])
        elif lengths[b]:
            groups[-1].append(b)
    return groups


# ---- custom ops: what torch.compile sees ---------------------------------------------------------
if native.capability:

    @torch.library.register_fake("fusedrl::varlen_attention_forward")
    def _(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor,
        causal: bool,
        window: int,
        scale: float,
        softcap: float,
    ) -> tuple[Tensor, Tensor]:
        return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)

    @torch.library.register_fake("fusedrl::varlen_attention_backward")
    def _(
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        o: Tensor,
        lse: Tensor,
        cu_seqlens: Tensor,
        causal: bool,
        window: int,
        scale: float,
        softcap: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


# ---- public --------------------------------------------------------------------------------------
def _varlen_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_length: int,
    causal: bool,
    window: int | None,
    softcap: float | None,
    scale: float,
) -> Tensor:
    return _triton.varlen_triton(
        q, k, v, cu_seqlens, max_length, causal, window or 0, scale, softcap or 0.0
    )[0]


ROUTES: dict[str, _trial.Route] = {
    "flash_attn": _flash.flash_attn,
    "torch_varlen": _flash.torch_varlen,
    "triton": _varlen_triton,
    "torch": _varlen_torch,
}


def tried(device: str) -> list[str]:
    """List the installed implementations that must be tested on `device` before use: those of other
    packages and, on a GPU, our Triton kernels, which have not run on one in this project."""
    kind = "cuda" if torch.device(device).type == "cuda" else "cpu"
    names = (
        ("flash_attn", "torch_varlen", "triton")
        if kind == "cuda"
        else ("flash_attn", "torch_varlen")
    )
    return [name for name in names if unavailable(name, kind) is None]


@torch.compiler.assume_constant_result  # also runs the test while a call is traced
def fault(name: str, device: str) -> str | None:
    """Return what was wrong with an implementation when it was tested on `device` ("cuda:0"), or
    None if it is sound. Test it now if that has not happened yet."""
    return (
        _trial.fault(name, device, ROUTES[name], varlen_attention_reference, name != "torch_varlen")
        if name in tried(device)
        else None
    )


def _refused(
    device: torch.device, dtype: torch.dtype, head_dim: int, softcap: float | None
) -> dict[str, str]:
    """Return the implementations that do not support such a call, each with the reason."""
    refused = _flash.refused(dtype, head_dim, softcap)
    if dtype == torch.float64:
        return refused | dict.fromkeys(("cpp", "triton"), "it computes in float32")
    if head_dim > _triton.LARGEST_HEAD:
        refused["triton"] = (
            f"it serves head dims up to {_triton.LARGEST_HEAD}, and this one is {head_dim}"
        )
    elif device.type == "cuda" and (dtype == torch.float32 or torch.version.hip is not None):
        refused["triton"] = "it serves bfloat16 and float16 on NVIDIA GPUs"
    return refused


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    max_length: int,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    impl: str | None = None,
) -> Tensor:
    """Compute attention within each of the packed sequences.

    Args:
        q: [N, Hq, D].
        k, v: [N, Hkv, D], of one dtype; Hq a multiple of Hkv.
        cu_seqlens: [B+1] int32, from 0 to N, not decreasing (not read back from a CUDA device to be
            checked).
        max_length: length of the longest sequence, or an upper bound; a number, so that no device
            tensor is read.
        causal: if True, a token sees only itself and the tokens before it.
        window: a token sees only tokens fewer than `window` positions away. If None, there is no
            limit.
        softcap: replaces the scores by softcap * tanh(scores / softcap). If None, they stay
            unchanged.
        scale: factor of the scores; D ** -0.5 by default.
        impl: "cpp" (CPU; not float64), "flash_attn" or "torch_varlen" (CUDA; bfloat16 and float16,
            D a multiple of 8 up to 256; "torch_varlen" without a softcap), "triton" (D up to 256;
            on CUDA bfloat16 and float16), or "torch"; by default the first that supports the call.
    Returns:
        [N, Hq, D]. Differentiable in q, k and v.
    Raises:
        ValueError: sizes, devices or limits do not agree.
        TypeError: a dtype is not supported.
        RuntimeError: `impl` cannot run on this machine, or does not support this call.
    """
    op = "varlen_attention"
    N, Hq, D, Hkv, B1 = check(
        op,
        {
            "q": (q, "N Hq D"),
            "k": (k, "N Hkv D"),
            "v": (v, "N Hkv D"),
            "cu_seqlens": (cu_seqlens, "B+1"),
        },
    )
    if Hkv == 0 or Hq % Hkv or B1 < 1:
        raise ValueError(
            f"{op}: expected query heads in a multiple of the key/value heads and cu_seqlens "
            f"[B+1], got Hq {Hq}, Hkv {Hkv}, B+1 {B1}"
        )
    refused = _refused(q.device, q.dtype, D, softcap)
    chosen = _IMPLS.choose(q.device, impl, refused)
    while (why := fault(chosen, str(q.device))) is not None:
        refused[chosen] = why
        chosen = _IMPLS.choose(q.device, impl, refused)
    check_dtype(op, "q", q, FLOATS)
    for name, x in (("k", k), ("v", v)):
        check_dtype(op, name, x, (q.dtype,))
    check_dtype(op, "cu_seqlens", cu_seqlens, (torch.int32,))
    if window is not None and window < 1:
        raise ValueError(f"{op}: expected window >= 1 or None, got {window}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{op}: expected a softcap above 0 or None, got {softcap}")
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        ends = cu_seqlens.tolist()
        if (
            ends[0] != 0
            or ends[-1] != N
            or any(b < a or b - a > max_length for a, b in pairwise(ends))
        ):
            raise ValueError(
                f"{op}: expected cu_seqlens from 0 to N = {N}, not decreasing, in steps of at most "
                f"max_length {max_length}, "
                f"got {ends[:8]}{'...' if len(ends) > 8 else ''}"
            )
    scale = D**-0.5 if scale is None else scale
    if chosen == "cpp":
        return torch.ops.fusedrl.varlen_attention(
            q, k, v, cu_seqlens, causal, window or 0, scale, softcap or 0.0
        )
    if N == 0:
        return q + (k.sum() + v.sum())  # empty too, and a part of the graph
    return ROUTES[chosen](q, k, v, cu_seqlens, max_length, causal, window, softcap, scale)
