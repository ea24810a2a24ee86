"""Description of the machine that a measurement comes from, and its two ceilings, memory bandwidth
and matrix-product rate, which are measured in the same run."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]


def seconds_of(function: Callable[[], Any], device: torch.device) -> float:
    """Time one call in seconds, including the work that it starts on the device."""
    wait_for(device)
    before = time.perf_counter()
    function()
    wait_for(device)
    return time.perf_counter() - before


def wait_for(device: torch.device) -> None:
    """Wait until all work started on the device is done; on a CPU, do nothing."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@functools.cache
def copy_bandwidth(device: torch.device) -> float:
    """Measure the bytes per second, read plus written, of a copy far larger than the caches; the
    fastest of several."""
    source = torch.rand(1 << (28 if device.type == "cuda" else 25), device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _fastest(lambda: target.copy_(source), device, 11)


@functools.cache
def gemm_rate(device: torch.device) -> float:
    """Measure the flops per second of a large matrix product of random numbers, in float32 on a CPU
    and in bfloat16 on a GPU; the fastest of several."""
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1536, torch.float32)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / _fastest(lambda: a @ b, device, 7)


def _fastest(function: Callable[[], Tensor], device: torch.device, calls: int) -> float:
    # several calls in a row, so that waiting for the device hardly counts
    row = 8 if device.type == "cuda" else 1

    def several() -> None:
        for _ in range(row):
            function()

    several()
    return min(seconds_of(several, device) for _ in range(calls)) / row


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Describe the machine, the versions and the commit of this run. Outside a git checkout the
    commit is "release"."""
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in read_text("/proc/cpuinfo").splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name in (
        "triton",
        "transformers",
        "trl",
        *(["liger-kernel"] if device.type == "cuda" else []),
    ):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    checkout = (ROOT / "bench" / "results").is_dir()
    commit = (
        output_of(["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"])
        if checkout
        else "release"
    )
    dirty = checkout and output_of(
        ["git", "-C", str(ROOT), "status", "--porcelain", "--", ".", ":!bench/results"]
    )
    gpu: dict[str, Any] = {"gpu": None}
    if device.type == "cuda":
        asked = [
            "nvidia-smi",
            "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem",
            "--format=csv,noheader",
            f"--id={device.index or 0}",
        ]
        gpu = {"gpu": torch.cuda.get_device_name(device), "driver and clocks": output_of(asked)}
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "capability": _capability(),
        **gpu,
        "threads": torch.get_num_threads(),
        **versions,
        "commit": commit + ("+changes" if dirty else ""),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def _capability() -> str:
    """Name the processor's vector instructions, and those that multiply bfloat16."""
    found = {
        "BF16": torch.cpu._is_avx512_bf16_supported(),
        "AMX": torch.cpu._is_amx_tile_supported(),
    }
    vectors = torch.backends.cpu.get_cpu_capability()
    return " + ".join([vectors, *(name for name, there in found.items() if there)])


def output_of(command: Sequence[str]) -> str:
    """Return what a command prints; "" if there is no such command."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def read_text(path: str) -> str:
    """Return a file's text; "" if it cannot be read."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""
