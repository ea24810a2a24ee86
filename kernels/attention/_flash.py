"""varlen_attention by FlashAttention of other packages on CUDA: the package flash-attn, or the one
inside torch (torch.nn.attention.varlen).

runtime/flash.py checks whether these packages are installed. `refused` decides by dtype, head dim
and features, before any launch, whether they support a call. Neither route has run on a GPU in this
project. The tests check the choice and the translation of the arguments, against stand-ins that
compute what these functions document.
Numerics  those of the two packages. flash-attn runs with its deterministic backward; torch's sums
          dq in an open order unless torch.use_deterministic_algorithms(True).
Source    Dao (2023), FlashAttention-2; https://github.com/Dao-AILab/flash-attention;
          torch.nn.attention.varlen.varlen_attn.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedrl.kernels.runtime.flash import FLASH_ATTN, TORCH_VARLEN

_flash_attn, _torch_varlen, _torch_knows = (
    FLASH_ATTN.function,
    TORCH_VARLEN.function,
    TORCH_VARLEN.knows,
)


def refused(dtype: torch.dtype, head_dim: int, softcap: float | None) -> dict[str, str]:
    """Return which of the two packages do not support such a call, each with the reason."""
    if dtype not in (torch.bfloat16, torch.float16):
        return dict.fromkeys(("flash_attn", "torch_varlen"), "it serves bfloat16 and float16 only")
    if head_dim % 8 or head_dim > 256:
        return dict.fromkeys(
            ("flash_attn", "torch_varlen"),
            f"it serves head dims in multiples of 8 up to 256, and this one is {head_dim}",
        )
    if softcap is not None:
        return {"torch_varlen": "it has no softcap"}
    return {}


def _sides(causal: bool, window: int | None) -> tuple[int, int]:
    """Return how many tokens a token sees to its left and to its right, without itself; -1 means no
    limit."""
    reach = -1 if window is None else window - 1
    return reach, 0 if causal else reach


def _dense_heads(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


def flash_attn(
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
    """Compute attention with the package flash-attn."""
    return _flash_attn(
        _dense_heads(q),
        _dense_heads(k),
        _dense_heads(v),
        cu_seqlens,
        cu_seqlens,
        max_length,
        max_length,
        softmax_scale=scale,
        causal=causal,
        window_size=_sides(causal, window),
        softcap=softcap or 0.0,
        deterministic=True,
    )


def torch_varlen(
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
    """Compute attention with torch.nn.attention.varlen. Before it had the option enable_gqa it
    passed grouped heads on as they are; the trial, whose heads are grouped, shows what became of
    them."""
    flag = {"enable_gqa": True} if "enable_gqa" in _torch_knows else {}
    grouped = flag if q.shape[1] != k.shape[1] else {}
    return _torch_varlen(
        _dense_heads(q),
        _dense_heads(k),
        _dense_heads(v),
        cu_seqlens,
        cu_seqlens,
        max_length,
        max_length,
        scale=scale,
        window_size=_sides(causal, window),
        **grouped,
    )
