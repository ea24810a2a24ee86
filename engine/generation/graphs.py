"""StepGraphs: the steps of decoding sequences as CUDA graphs, one per padded number of rows.

A small model's step is a few hundred launches of a few microseconds each: issued one by one, the
host is what limits it. Captured once, they are one launch. A graph holds addresses, not values. So
a captured step reads `DecodeState`s that are kept and refilled in place, weights that optimizers
change in place, and a block table at one address; where any address has changed (weights moved, a
cache allocated again), everything is captured anew.

Sizes     rows are padded to 1, 2, 4, 8, then to multiples of 16; more than 512 run as they are,
          since such a step is no longer the host's. Padding rows have ended from the start, at the
          null block. The block table is as wide as the longest row needs, rounded up to a power of
          two: a launch grid covers its width.
Memory    graphs share one pool. Nothing in it outlives a replay, and replays are in order on one
          stream.

Not run on a GPU yet. What may not happen in a captured step (a wait for the host, a size that
follows a value) is tested on fake CUDA tensors, and the control flow on a CPU with a `capture` that
returns the step itself.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import numpy as np
import torch
from torch import Tensor

from fusedrl.engine.generation.state import DecodeState
from fusedrl.kernels.rope import RopeTable

_LARGEST = 512
_NARROWEST = 16  # blocks of the table
_PADDING = {"stops": -1, "temperature": 1, "top_p": 1, "finished": True}  # of rows that pad; else 0

Step = Callable[[], None]


def padded_rows(count: int) -> int | None:
    """Return the number of rows to which a step of `count` is padded; None: it is not captured."""
    if count > _LARGEST:
        return None
    return 1 << (count - 1).bit_length() if count <= 8 else -(-count // 16) * 16


def padded_blocks(count: int, most: int) -> int:
    """Return the number of columns to which the block table of a step is padded whose longest row
    needs `count`."""
    return min(most, max(_NARROWEST, 1 << max(0, count - 1).bit_length()))


def pad(columns: dict[str, np.ndarray], rows: int, null_row: int) -> dict[str, np.ndarray]:
    """The columns of a `DecodeState` with rows behind them that have ended, at the null block."""
    out = {}
    for name, column in columns.items():
        shape = (len(column), rows) if name == "stops" else (rows, *column.shape[1:])
        out[name] = np.full(
            shape, null_row if name == "rows" else _PADDING.get(name, 0), dtype=column.dtype
        )
        out[name][tuple(map(slice, column.shape))] = column
    return out


def addresses(*things: object) -> tuple[Hashable, ...]:
    """Return the addresses and values by which a captured step knows these tensors, numbers and
    (named) tuples of them."""
    found: list[Hashable] = []
    for thing in things:
        if isinstance(thing, Tensor):
            found.append(thing.data_ptr())
        elif isinstance(thing, tuple):
            found.extend(addresses(*thing))
        elif isinstance(thing, RopeTable):
            found.extend(addresses(*thing.tensors))
        else:
            found.append(thing)  # type: ignore[arg-type]
    return tuple(found)


class CudaCapture:
    """Makes a step a CUDA graph: call it with the step and the state that the step moves, get what
    replays it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # a pool is shared by captures of one stream
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Step, state: DecodeState) -> Step:
        finished = state.columns["finished"]
        before = finished.clone()
        # then a step moves no row, and writes what the first real one will write again
        finished.fill_(True)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            # kernels are compiled, and workspaces allocated, outside of the capture
            for _ in range(2):
                state.cursor.zero_()
                step()
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            step()
        finished.copy_(before)
        state.cursor.zero_()
        return graph.replay


class StepGraphs:
    """The states that captured steps read, and the captured steps."""

    def __init__(self, capture: Callable[[Step, DecodeState], Step]) -> None:
        self._capture = capture
        self._states: dict[Hashable, DecodeState] = {}
        self._replays: dict[Hashable, Step] = {}
        self._addresses: tuple[Hashable, ...] = ()

    def state(
        self,
        columns: dict[str, np.ndarray],
        numbers: dict[str, float],
        window: int,
        device: torch.device,
        slots: np.ndarray,
        values: bool = False,
    ) -> DecodeState:
        """The state of these shapes, filled with these columns."""
        key = (
            tuple((name, column.shape) for name, column in sorted(columns.items())),
            tuple(sorted(numbers.items())),
            values,
        )
        state = self._states.get(key)
        if state is None:
            state = self._states[key] = DecodeState(
                columns, numbers, window, device, slots, values=values
            )
        else:
            state.refill(columns, slots)
        return state

    def replay(
        self, step: Step, state: DecodeState, width: int, held: tuple[Hashable, ...]
    ) -> Step:
        """`step`, captured for this state and this width of the block table. `held`: the
        `addresses` of everything else that it reads or writes."""
        if held != self._addresses:
            self._replays.clear()
            self._addresses = held
        key = (id(state), width)
        if key not in self._replays:
            self._replays[key] = self._capture(step, state)
        return self._replays[key]
