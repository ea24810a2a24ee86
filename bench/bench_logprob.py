"""logprob and linear_logprob against eager log_softmax + gather and torch.compile of the same.

    python -m bench.bench_logprob [--rounds 15] [--cases 2048x32000,head]      (cases: the start of a name printed below; all by default)

"forward" runs under no_grad. "forward+backward" is one call and `torch.autograd.grad` of it with a random upstream gradient; the gradient is a
fresh tensor, except for logprob_, whose gradient lands on the logits (each round reads what the round before left there).
"""
from __future__ import annotations

import argparse

import torch
from bench.harness import Row, contest, copy_bandwidth, one_thread, report
from torch import Tensor

from fusedrl.kernels.linear_logprob import linear_logprob
from fusedrl.kernels.logprob import logprob, logprob_


def eager(logits: Tensor, token_ids: Tensor) -> tuple[Tensor]:
    return (torch.log_softmax(logits.float(), -1).gather(-1, token_ids[:, None]).squeeze(-1),)


def eager_entropy(logits: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    log_p = torch.log_softmax(logits.float(), -1)
    return log_p.gather(-1, token_ids[:, None]).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


def close(ours, other) -> None:
    for a, b in zip(ours, other, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=2e-2 if a.dtype == torch.bfloat16 else 1e-4, atol=2e-5)


def from_logits(N: int, V: int, dtype: torch.dtype, entropy: bool, ceiling: float, rounds: int) -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(N, V, generator=generator).to(dtype)
    token_ids = torch.randint(0, V, (N,), generator=generator)
    upstream = [torch.randn(N, generator=generator) for _ in range(2 if entropy else 1)]
    leaf, buffer = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    plain = eager_entropy if entropy else eager
    compiled = torch.compile(plain)

    def ours(z, ids, op=logprob):
        out = op(z, ids, entropy=entropy)
        return out if entropy else (out,)

    def scored(function):
        def call():
            with torch.no_grad():
                return function(logits, token_ids)
        return call

    def trained(function, z=leaf):
        return lambda: torch.autograd.grad(function(z, token_ids), z, upstream)

    def in_place():
        computed = buffer.view(N, V)  # not a leaf, so that its memory may become the gradient
        return torch.autograd.grad(ours(computed, token_ids, logprob_), computed, upstream)

    name, size = f"logprob{' + entropy' if entropy else ''}", f"{N} x {V}"
    kind, bytes_each = str(dtype).removeprefix("torch."), dtype.itemsize
    # Forward must read the logits once; forward and backward read them twice and write their gradient.
    rows = contest(f"{name}, forward", size, kind, {"fusedrl": scored(ours), "eager": scored(plain), "torch.compile": scored(compiled)},
                   bytes_moved=N * V * bytes_each, ceiling=ceiling, rounds=rounds, same=close)
    return rows + contest(f"{name}, forward+backward", size, kind,
                          {"fusedrl": trained(ours), "fusedrl logprob_": in_place, "eager": trained(plain), "torch.compile": trained(compiled)},
                          bytes_moved=3 * N * V * bytes_each, ceiling=ceiling, rounds=rounds, same=close)


def through_head(N: int, H: int, V: int, rounds: int) -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(N, H, generator=generator).requires_grad_(), (torch.randn(V, H, generator=generator) / H**0.5).requires_grad_()
    token_ids, upstream = torch.randint(0, V, (N,), generator=generator), torch.randn(N, generator=generator)

    def plain(h, w):
        return eager(h @ w.t(), token_ids)[0]

    def ours(h, w):
        return linear_logprob(h, w, token_ids)

    compiled = torch.compile(plain)

    def scored(function):
        def call():
            with torch.no_grad():
                return [function(hidden, weight)]
        return call

    def trained(function):
        return lambda: torch.autograd.grad(function(hidden, weight), (hidden, weight), upstream)

    size = f"{N} x {H} x {V}"
    # 2 N H V for the logits; twice that again for the gradients (computing the logits a second time is ours alone and not the problem's).
    rows = contest("linear_logprob, forward", size, "float32",
                   {"fusedrl": scored(ours), "eager": scored(plain), "torch.compile": scored(compiled), "bare GEMM": scored(lambda h, w: h @ w.t())},
                   flops=2 * N * H * V, rounds=rounds, same=lambda a, b: close(a, b) if b[0].ndim == 1 else None)
    return rows + contest("linear_logprob, forward+backward", size, "float32",
                          {"fusedrl": trained(ours), "eager": trained(plain), "torch.compile": trained(compiled)},
                          flops=6 * N * H * V, rounds=rounds, same=close)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--cases", default="")
    arguments = parser.parse_args()
    one_thread()
    ceiling, rounds = copy_bandwidth(), arguments.rounds
    cases = {
        "2048x32000": lambda: from_logits(2048, 32000, torch.float32, False, ceiling, rounds),
        "2048x32000 entropy": lambda: from_logits(2048, 32000, torch.float32, True, ceiling, rounds),
        "512x151936": lambda: from_logits(512, 151936, torch.float32, False, ceiling, rounds),
        "2048x32000 bfloat16": lambda: from_logits(2048, 32000, torch.bfloat16, False, ceiling, rounds),
        "head 64x64x512": lambda: through_head(64, 64, 512, rounds),
        "head 2000x64x512": lambda: through_head(2000, 64, 512, rounds),
        "head 512x512x8192": lambda: through_head(512, 512, 8192, rounds),
    }
    rows: list[Row] = []
    for name, case in cases.items():
        if name.startswith(tuple(arguments.cases.split(","))):
            print(name, flush=True)
            rows += case()
            report("logprob", rows)


if __name__ == "__main__":
    main()
