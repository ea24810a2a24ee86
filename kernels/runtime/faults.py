"""Faults: errors in token ids that GPU kernels found. They are raised later, when the host waits
for the device anyway.

A kernel cannot raise, and waiting for each kernel would cost every call a synchronisation. So an op
that meets an id out of range makes the result of its row NaN, and stores 1 into its slot of the
device's flag. `raise_faults` reads the flag at a moment when the host waits in any case.

The flag is not an argument of the custom ops, since torch.library differentiates only ops that
mutate nothing. Functionalization need not know of the flag: kernels only ever set it, and no result
is computed from it. So its content depends neither on the order nor on the number of the calls.
(torch.compile may drop a call whose results are not used, and then its report is lost, too.) The
flag's memory never moves while the process lives, since CUDA graphs may hold its address.
"""

from __future__ import annotations

import torch
from torch import Tensor

# the slots of a flag; linear_policy_loss scores through linear_logprob
_OPS = ("logprob", "linear_logprob")
_flags: dict[torch.device, Tensor] = {}  # per device, [len(_OPS)] int32


def flag(op: str, device: torch.device) -> Tensor:
    """Return the slot of `op` in the flag of `device`, [1] int32, into which a kernel stores 1. The
    first call on a device allocates memory, so make it before capturing a CUDA graph."""
    if device not in _flags:
        with torch.inference_mode(False):  # an inference tensor could not be cleared elsewhere
            _flags[device] = torch.zeros(len(_OPS), dtype=torch.int32, device=device)
    slot = _OPS.index(op)
    return _flags[device][slot : slot + 1]


def raise_faults(device: torch.device | None = None) -> None:
    """Raise for the current stream of each device that ran such a kernel, so call it where the host
    reads results; costs nothing where none ran.

    Raises:
        IndexError: an op was given an id that is out of range, and made the result of its row NaN.
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
