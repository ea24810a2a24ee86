"""fixed_linear, in which the bits of a row do not depend on the other rows, compared with torch's
product, in which they do."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from bench.harness import Random, agree, compiled, no_grad, on

from fusedrl.kernels.fixed_linear import fixed_linear

# the fixed order is the C++ implementation's
SIZES = on(cpu=[(64, 64, 512), (64, 896, 4864), (1, 896, 4864), (2048, 512, 8192)], cuda=[])


@pytest.mark.parametrize("N, K, O", SIZES)
def bench_fixed_linear(contest, N, K, O):
    random = Random()
    x, weight = random.normal(N, K), random.normal(O, K).div_(K**0.5)
    contestants = {"fusedrl": fixed_linear, "eager": F.linear, "torch.compile": compiled(F.linear)}
    # The weights and x in, y out; 2 N K O flops.
    contest(
        "fixed_linear",
        f"{N} x {K} x {O}",
        torch.float32,
        {name: no_grad(function, x, weight) for name, function in contestants.items()},
        bytes_moved=4 * (N * K + O * K + N * O),
        flops=2 * N * K * O,
        same=agree(rtol=1e-4, of_max=1e-5),
    )
