"""advance_rows_, which records the tokens of a decoding step in one call, compared with the
equivalent dozen torch operations."""

from __future__ import annotations

import pytest
import torch
from bench.harness import DEVICE, Random, agree, compiled, implementations, no_grad

from fusedrl.kernels import advance_rows as module
from fusedrl.kernels.advance_rows import advance_rows_, advance_rows_reference


@pytest.mark.parametrize("R, W", [(64, 2), (512, 2)])
def bench_advance_rows(contest, R, W):
    random = Random()
    drawn, logp, stops = (
        random.integers(0, 50_000, R),
        random.normal(R),
        random.integers(50_000, 50_010, W, R),
    )
    last = torch.full((R,), 1 << 40, device=DEVICE)  # no row ends, so that each call does the same

    def stepping(function):
        zeros = lambda *shape, dtype=torch.int64: torch.zeros(shape, dtype=dtype, device=DEVICE)  # noqa: E731
        token_ids, positions, finished, cursor = (
            zeros(R),
            zeros(2, R),
            zeros(R, dtype=torch.bool),
            zeros(1),
        )
        ring_tokens, ring_logp = zeros(8, R), zeros(8, R, dtype=torch.float32)

        def step():
            cursor.zero_()
            function(
                drawn,
                logp,
                stops,
                last,
                token_ids,
                positions,
                finished,
                ring_tokens,
                ring_logp,
                cursor,
            )
            return token_ids, ring_tokens, ring_logp

        return no_grad(step)

    contestants = {
        name: lambda *a, impl=impl: advance_rows_(*a, impl=impl)
        for name, impl in implementations(module, "advance_rows_").items()
    }
    contestants |= {
        "eager": advance_rows_reference,
        "torch.compile": compiled(advance_rows_reference),
    }
    # Tokens and stop ids, positions and limits read; tokens, positions, the ring's row written. 8
    # bytes each, but for logp and the flags.
    contest(
        "advance_rows_",
        f"{R} rows, {W} stop ids",
        torch.int64,
        {name: stepping(f) for name, f in contestants.items()},
        bytes_moved=R * (8 * (1 + W + 3 + 1 + 2 + 1) + 2 * 4 + 2),
        same=agree(0, 0),
    )
