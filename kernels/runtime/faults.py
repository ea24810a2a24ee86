"""Faults: what kernels on a GPU found wrong with the ids they were given, told at the next moment
the host looks anyway.

A kernel cannot raise, and waiting for it would cost every call a synchronisation. An op that meets
such an id makes the row NaN and stores 1 into its slot of the device's flag; `raise_faults` reads
the flag, where the host waits for the device in any case.

The flag is not among the arguments of the custom ops: torch.library differentiates only ops that
mutate nothing. It may stay hidden from functionalization because kernels only ever raise it and no
result is computed from it, so that what it says depends neither on the order nor on the number of
the calls. (A call whose results nobody uses may be dropped from a compiled graph, and its report
with it.) Its memory stays where it is for as long as the process lives: CUDA graphs may hold it.
"""

from __future__ import annotations

import torch
from torch import Tensor

# the slots of a flag; linear_policy_loss scores through linear_logprob
_OPS = ("logprob", "linear_logprob")
_flags: dict[torch.device, Tensor] = {}  # [len(_OPS)] int32 a device


def flag(op: str, device: torch.device) -> Tensor:
    """The slot of `op` on `device`, [1] int32: a kernel stores 1 there. The first call on a device
    allocates; make it before capturing a CUDA graph."""
    if device not in _flags:
        with torch.inference_mode(False):  # an inference tensor could not be cleared elsewhere
            _flags[device] = torch.zeros(len(_OPS), dtype=torch.int32, device=device)
    slot = _OPS.index(op)
    return _flags[device][slot : slot + 1]


def raise_faults(device: torch.device | None = None) -> None:
    """Raise what kernels reported since the last call, on `device` or on every one, and forget it.

    Waits for the current stream of each device that ran such a kernel, so call it where the host
    reads results; costs nothing where none ran.

    Raises:
        IndexError: an op was given an id that is out of range; its row was NaN.
    """
    for where, found in _flags.items():
        if device is None or (where.type == device.type and device.index in (None, where.index)):
            names = [op for op, fault in zip(_OPS, found.tolist(), strict=True) if fault]
            if names:
                found.zero_()
                raise IndexError(
                    f"{', '.join(names)}: expected token ids (and kept ids) in [0, V) or "
                    f"ignore_index, got one outside on {where} since the last "
                    "look; the results of its row are NaN. The same call on CPU tensors names "
                    "the row"
                )
