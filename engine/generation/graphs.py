"""StepGraphs: the steps of decoding sequences as CUDA graphs, one per padded number of rows.

A small model's step is a few hundred launches of a few microseconds each. Issued one by one, they
are limited by the host; captured once, they are one launch. A graph holds addresses, not values. So
a captured step reads `DecodeState`s that are kept and refilled in place, weights that optimizers
change in place, and a block table at one address. If any address has changed (weights moved, a
cache allocated again), everything is captured anew.

Sizes     rows are padded to 1, 2, 4, 8, then to multiples of 16. More than 512 rows run without a
          graph, since the host no longer limits such a step. Padding rows are marked as ended from
          the start, and their blocks are the null block (block 0, which no sequence owns). The
          block table is as wide as the longest row needs, rounded up to a power of two: a launch
          grid covers its width.
Memory    graphs share one pool. Nothing in it outlives a replay, and replays are in order on one
          stream.

Not run on a GPU yet. Tests on fake CUDA tensors check for what a captured step may not do (wait for
the host, choose a size by a value). Tests on a CPU check the control flow, with a `capture` that
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
_PADDING = {"stops": -1, "temperature": 1, "top_p": 1, "finished": True}  # padding rows; else 0

Step = Callable[[], None]


def padded_rows(count: int) -> int | None:
    """Return the number of rows to which a step of `count` rows is padded, or None if such a step
    is not captured."""
    if count > _LARGEST:
        return None
    return 1 << (count - 1).bit_length() if count <= 8 else -(-count // 16) * 16


def padded_blocks(count: int, most: int) -> int:
    """Return the number of columns to which a block table is padded whose longest row needs
    `count`, at most `most`."""
    return min(most, max(_NARROWEST, 1 << max(0, count - 1).bit_length()))


def pad(columns: dict[str, np.ndarray], rows: int, null_row: int) -> dict[str, np.ndarray]:
    """Pad the columns of a `DecodeState` to `rows` rows. The added rows are marked as ended, and
    use row `null_row` of the block table, whose blocks are the null block."""
    out = {}
    for name, column in columns.items():
        shape = (len(column), rows) if name == "stops" else (rows, *column.shape[1:])
        out[name] = np.full(
            shape, null_row if name == "rows" else _PADDING.get(name, 0), dtype=column.dtype
        )
        out[name][tuple(map(slice, column.shape))] = column
    return out


def addresses(*things: object) -> tuple[Hashable, ...]:
    """Return the addresses of tensors, and the values of numbers, by which a captured step
    recognises its inputs. Tuples are flattened."""
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
    """Turns steps into CUDA graphs: called with a step and the state that it advances, it returns a
    function that replays the step."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # a pool is shared by captures of one stream
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Step, state: DecodeState) -> Step:
        finished = state.columns["finished"]
        before = finished.clone()
        # so a warm-up step advances no row, and writes only what the first real step will rewrite
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
    """Captured steps, and the states that they read."""

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
        """Return the state with these shapes, filled with these columns."""
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
        """Return `step`, captured for this state and this width of the block table. `held` are the
        `addresses` of everything else that it reads or writes."""
        if held != self._addresses:
            self._replays.clear()
            self._addresses = held
        key = (id(state), width)
        if key not in self._replays:
            self._replays[key] = self._capture(step, state)
        return self._replays[key]
