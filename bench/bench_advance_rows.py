"""advance_rows_: what a decoding step leaves behind it, in one call, against the same dozen of torch operations."""
from __future__ import annotations

import pytest
import torch
from bench.harness import DEVICE, Random, agree, compiled, implementations, no_grad

from fusedrl.kernels import advance_rows as module
from fusedrl.kernels.advance_rows import advance_rows_, advance_rows_reference


@pytest.mark.parametrize("R, W", [(64, 2), (512, 2)])
def bench_advance_rows(contest, R, W):
    random = Random()
    drawn, logp, stops = random.integers(0, 50_000, R), random.normal(R), random.integers(50_000, 50_010, W, R)
    last = torch.full((R,), 1 << 40, device=DEVICE)  # no row ends, so that each call does the same

    def stepping(function):
        token_ids, positions, finished = torch.zeros_like(drawn), torch.zeros(2, R, dtype=torch.int64, device=DEVICE), torch.zeros(R, dtype=torch.bool, device=DEVICE)
        ring_tokens, ring_logp = torch.zeros(8, R, dtype=torch.int64, device=DEVICE), torch.zeros(8, R, device=DEVICE)
        cursor = torch.zeros(1, dtype=torch.int64, device=DEVICE)

        def step():
            cursor.zero_()
            function(drawn, logp, stops, last, token_ids, positions, finished, ring_tokens, ring_logp, cursor)
            return token_ids, ring_tokens, ring_logp

        return no_grad(step)

    contestants = {name: lambda *a, impl=impl: advance_rows_(*a, impl=impl) for name, impl in implementations(module, "advance_rows_").items()}
    contestants |= {"eager": advance_rows_reference, "torch.compile": compiled(advance_rows_reference)}
    # Tokens and stop ids, positions and limits read; tokens, positions, the ring's row written. 8 bytes each, but for logp and the flags.
    contest("advance_rows_", f"{R} rows, {W} stop ids", torch.int64, {name: stepping(f) for name, f in contestants.items()},
            bytes_moved=R * (8 * (1 + W + 3 + 1 + 2 + 1) + 2 * 4 + 2), same=agree(0, 0))
