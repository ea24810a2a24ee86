"""sample in CUDA C++ (csrc/cuda/sampling.cu): its launches, and its custom op for torch.compile.
The mathematics is in __init__.py."""

from __future__ import annotations

from ctypes import c_int32, c_int64

import torch
from torch import Tensor

from fusedrl.kernels.runtime import nvrtc
from fusedrl.kernels.runtime.nvrtc import Launch
from fusedrl.kernels.sampling._fused import Outputs, empty_outputs, step

_THREADS = 512  # kThreads of sampling.cu
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# what tests compile: a file's sets of options
OFFLINE_SOURCES = {"sampling.cu": [(f"-DDTYPE={number}",) for number in _DTYPES.values()]}


# ---- launcher: allocate, grid --------------------------------------------------------------------
def plan_sample(
    logits_BV: Tensor,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    keys_B4: Tensor,
    suppress_BV: Tensor | None,
    kept_capacity: int | None,
) -> tuple[Outputs, list[Launch]]:
    """Allocate the outputs of `sample` and plan the launches that write them."""
    B, V = logits_BV.shape
    outputs = empty_outputs(logits_BV, kept_capacity)
    *per_row, kept_ids, offsets = outputs
    if B == 0:
        offsets.zero_()
        return outputs, []
    logits = logits_BV if logits_BV.stride(1) == 1 or V == 1 else logits_BV.contiguous()
    suppress = None if suppress_BV is None else suppress_BV.contiguous()
    cuts_B3 = None if kept_capacity is None else logits.new_empty((B, 3), dtype=torch.int32)
    parameters = [None if t is None else t.contiguous() for t in (temperature, top_k, top_p, min_p)]
    options = (f"-DDTYPE={_DTYPES[logits.dtype]}",)
    arguments = (
        logits,
        *parameters,
        keys_B4.contiguous(),
        suppress,
        *per_row,
        cuts_B3,
        c_int32(V),
        c_int64(logits.stride(0)),
        *(c_int32(step(t)) for t in parameters),
    )
    launches = [Launch("sampling.cu", "sample", arguments, (B, 1, 1), _THREADS, options)]
    if kept_capacity is not None:
        arguments = (
            logits,
            suppress,
            cuts_B3,
            per_row[0],
            kept_ids,
            offsets,
            c_int32(V),
            c_int64(logits.stride(0)),
            c_int64(kept_capacity),
        )
        launches.append(Launch("sampling.cu", "list_kept", arguments, (B, 1, 1), _THREADS, options))
    return outputs, launches


# ---- custom op: what torch.compile sees ----------------------------------------------------------
@torch.library.custom_op("fusedrl::sample_cuda", mutates_args=(), device_types="cuda")
def sample_cuda(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    keys: Tensor,
    suppress: Tensor | None,
    kept_capacity: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run sample in CUDA C++."""
    outputs, launches = plan_sample(
        logits, temperature, top_k, top_p, min_p, keys, suppress, kept_capacity
    )
    nvrtc.run(launches, logits.device)
    return outputs


@sample_cuda.register_fake
def _(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    keys: Tensor,
    suppress: Tensor | None,
    kept_capacity: int | None,
) -> Outputs:
    return empty_outputs(logits, kept_capacity)
