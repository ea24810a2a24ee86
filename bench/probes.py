"""Three looks at a machine that no contest gives, for `make first-light`:

    python -m bench.probes profile --device cuda --output-json FILE
    python -m bench.probes workspace --device cuda --output-json FILE
    python -m bench.probes kernel gae --device cuda --output-json FILE

profile    one call that prefills and one window of captured steps, under torch's profiler: seconds,
           kernels launched, how long the device worked, and the kernels that took longest
workspace  forward and backward of linear_logprob at the default workspace and at 2 GiB, beside its
           three bare products
kernel     the timed case of one op, again and again, for a profiler such as ncu
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fusedrl.engine.base.draws import seed_generators
from fusedrl.engine.generation.cache import CacheConfig
from fusedrl.engine.generation.generator import Generator
from fusedrl.engine.generation.sampler import SamplingParams
from fusedrl.engine.model.configuration import model_config
from fusedrl.engine.model.decoder import Decoder
from fusedrl.engine.tools.machine import seconds_of, wait_for
from fusedrl.engine.tools.verify.catalogue import CATALOGUE
from fusedrl.engine.tools.verify.ops import time_op
from fusedrl.engine.tools.verify.promises import CONFIG
from fusedrl.engine.tools.workloads import SHAPES
from fusedrl.kernels.linear_logprob import linear_logprob

ROUNDS = 5
LONGEST = 12  # kernels that are named


def profiled(device: torch.device, sequences: int, prompt: int) -> dict[str, Any]:
    """Profile the two kinds of calls that generation consists of."""
    shape = SHAPES["qwen2.5-0.5b"] if device.type == "cuda" else CONFIG
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    decoder = Decoder.random(model_config(shape), 0, dtype=dtype, device=device)
    config = CacheConfig(max_sequences=sequences, max_tokens_per_step=max(2048, sequences))
    generator = Generator(decoder, None, config)
    params = SamplingParams(max_new_tokens=64, min_new_tokens=64)
    asked = [[1 + (i + j) % 90 for j in range(prompt)] for i in range(sequences)]
    list(generator.run(asked, params))  # compiles and captures
    generator.bump(1)  # so that no prompt is found in the cache
    ticket, running = generator.prepare(asked, params)
    generator.enqueue(ticket, running)
    found: dict[str, Any] = {"prefill": _call(generator, device)}
    while len(generator.scheduler.decoding) < sequences:
        generator.step()
    generator.step()  # the first window of these rows
    found["window"] = _call(generator, device)
    generator.abort()
    return found | {"sequences": sequences, "prompt": prompt, "dtype": str(dtype)}


def _call(generator: Generator, device: torch.device) -> dict[str, Any]:
    """Profile the generator's next call, and say what it was."""
    kinds = [ProfilerActivity.CPU]
    kinds += [ProfilerActivity.CUDA] if device.type == "cuda" else []
    drawn = generator._activity.tokens
    wait_for(device)
    with profile(activities=kinds) as seen:
        began = time.perf_counter()
        generator.step()
        issued = time.perf_counter() - began
        wait_for(device)
        took = time.perf_counter() - began
    events = seen.key_averages()
    on = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    if device.type == "cuda":
        events = [one for one in events if str(one.device_type).endswith("CUDA")]
    longest = sorted(events, key=lambda one: -getattr(one, on))
    return {
        "seconds": took,
        "seconds_issued": issued,
        "seconds_at_work": sum(getattr(one, on) for one in events) / 1e6,
        "launches": sum(one.count for one in events),
        "tokens_read": generator._activity.tokens - drawn,
        "longest": [
            {"name": one.key[:80], "count": one.count, "us": getattr(one, on)}
            for one in longest[:LONGEST]
        ],
    }


def workspaces(device: torch.device) -> dict[str, Any]:
    """Time linear_logprob under two workspaces, and the three products it cannot do without."""
    N, H, V = (1024, 1536, 151_936) if device.type == "cuda" else (64, 128, 4096)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    hidden = (torch.randn(N, H, device=device) / H**0.5).to(dtype).requires_grad_()
    weight = torch.randn(V, H, device=device).to(dtype).requires_grad_()
    ids = torch.randint(V, (N,), device=device)
    upstream = torch.randn(N, V, device=device).to(dtype)

    def products() -> None:
        with torch.no_grad():
            torch.mm(hidden, weight.t())
            torch.mm(upstream, weight)
            torch.mm(upstream.t(), hidden)

    def head(room: int | None) -> Tensor:
        hidden.grad = weight.grad = None
        logp = linear_logprob(hidden, weight, ids, workspace_bytes=room)
        logp.sum().backward()
        return logp.detach()

    sizes = {"default": None, "2 GiB": 2 << 30}
    if not torch.allclose(head(None), head(2 << 30), atol=1e-4, rtol=1e-4):
        raise SystemExit("linear_logprob: two workspaces, two answers")
    bare = _median(products, device)
    found: dict[str, Any] = {"N": N, "H": H, "V": V, "dtype": str(dtype), "products_ms": 1e3 * bare}
    for name, room in sizes.items():
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            held = torch.cuda.memory_allocated(device)
        took = _median(lambda room=room: head(room), device)
        found[name] = {"ms": 1e3 * took, "over_products": took / bare}
        if device.type == "cuda":
            found[name]["peak_bytes"] = torch.cuda.max_memory_allocated(device) - held
    return found


def _median(call: Any, device: torch.device) -> float:
    call()
    return statistics.median(seconds_of(call, device) for _ in range(ROUNDS))


def kernel(device: torch.device, op: str) -> dict[str, Any]:
    """Run the timed case of an op by the implementation that this device chooses first."""
    impl = CATALOGUE[op].implementations(str(device))[0]
    found = time_op(CATALOGUE[op], impl, device, 1e12, 1e14)
    return {"op": op, "impl": impl, "ms": found.get("ms"), "bytes": found.get("bytes")}


def main() -> None:
    """Run what the command line names, and write what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("profile", "workspace", "kernel"))
    parser.add_argument("op", nargs="?", default="gae", help="of `kernel` (default: gae)")
    parser.add_argument("--device", default="cuda", help="cuda or cpu (default: %(default)s)")
    parser.add_argument("--output-json", type=Path, metavar="FILE")
    options = parser.parse_args()
    device = torch.device(options.device)
    seed_generators(0)
    if options.what == "profile":
        small = device.type == "cpu"
        found = profiled(device, *((4, 16) if small else (64, 256)))
    else:
        found = workspaces(device) if options.what == "workspace" else kernel(device, options.op)
    print(json.dumps(found, indent=1))
    if options.output_json:
        options.output_json.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
