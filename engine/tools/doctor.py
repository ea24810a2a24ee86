"""fusedrl doctor: lists this machine's hardware and packages, which implementations run here and
why the rest do not, and how to get missing parts."""

from __future__ import annotations

import importlib
import os
import pkgutil
import platform
import re
import shutil
import subprocess
import warnings
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement

from fusedrl.engine.base.memory import format_bytes
from fusedrl.engine.model import step
from fusedrl.engine.watch.plan import machine_memory
from fusedrl.kernels import attention
from fusedrl.kernels.runtime import native
from fusedrl.kernels.runtime.dispatch import Implementations, unavailable

_OPTIONAL = ("flash-attn", "torchao", "trl", "cuda-bindings", "nvidia-cuda-nvrtc")


@dataclass(frozen=True)
class Diagnosis:
    """Findings of `diagnose`. `missing` lists required parts that are absent, with the remedy.
    `notes` lists ways to make fusedrl faster here or able to do more."""

    machine: dict[str, str]
    packages: dict[str, str]
    # op -> "cpu" or "cuda" -> implementation, best first -> why it cannot run, None if it can
    ops: dict[str, dict[str, dict[str, str | None]]]
    attention: dict[str, dict[str, str]]  # device -> backend -> "verified", or why it is not used
    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return the findings as JSON values."""
        return dict(vars(self))


def diagnose(device: str | None = None) -> Diagnosis:
    """Examine this machine. If `device` is given ("cuda:1"), that device is required, too."""
    missing: list[str] = []
    notes: list[str] = []
    found = Diagnosis(_machine(), _packages(missing), _ops(), _attention(), missing, notes)
    gpus = torch.cuda.device_count()
    built = torch.version.cuda or torch.version.hip
    if native.capability is None:
        notes.append(
            f"the C++ kernels are not built ({native.reason}): ops on CPU run in torch, 5x to 100x "
            "slower; install a C++ compiler and Python's "
            "headers (Debian: apt-get install g++ python3-dev), then reinstall fusedrl"
        )
    if found.machine["C++ compiler"] == "none":
        notes.append(
            "no C++ compiler: torch.compile on CPU and optim.state = int8 need one (Debian: "
            "apt-get install g++)"
        )
    if found.machine["GPU driver"] != "none" and not gpus:
        remedy = (
            "check that nvidia-smi lists one"
            if built
            else "this torch is a CPU build; install a CUDA build from pytorch.org"
        )
        notes.append(f"there is a GPU driver, but torch sees no GPU: {remedy}")
    if gpus and (why := unavailable("triton", "cuda")) is not None:
        missing.append(f"triton, which every op on a GPU runs on: {why}; pip install triton")
    for where, backends in found.attention.items():
        notes += [
            f"{name} is installed and not used on {where}: {state}"
            for name, state in backends.items()
            if state != "verified"
        ]
    if device is not None:
        wanted = torch.device(device)
        if wanted.type == "cuda" and (wanted.index or 0) >= gpus:
            remedy = (
                "check the driver with nvidia-smi"
                if built
                else "it is a CPU build; install a CUDA build from pytorch.org"
            )
            missing.append(f"device {device}: torch {torch.__version__} sees {gpus} GPUs; {remedy}")
    return found


def _machine() -> dict[str, str]:
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in _read("/proc/cpuinfo").splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    compiler = next((path for path in map(shutil.which, ("c++", "g++", "clang++")) if path), None)
    driver = (
        _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
        or _read("/sys/module/amdgpu/version").strip()
    )
    built = next(
        (
            f"{name} {version}"
            for name, version in (("CUDA", torch.version.cuda), ("ROCm", torch.version.hip))
            if version
        ),
        "CPU alone",
    )
    found = {
        "system": platform.platform(),
        "python": platform.python_version(),
        "processor": f"{cpu}, {os.cpu_count()} threads",
        "vectors": f"{torch.backends.cpu.get_cpu_capability()}; C++ kernels: "
        f"{native.capability or 'not built'}",
        "memory": format_bytes(machine_memory(torch.device("cpu"))),
        "C++ compiler": compiler or "none",
        "GPU driver": driver or "none",
        "torch is built for": built,
    }
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found[f"cuda:{index}"] = (
            f"{properties.name}, sm_{properties.major}{properties.minor}, "
            f"{format_bytes(properties.total_memory)}"
        )
    return found


def _packages(missing: list[str]) -> dict[str, str]:
    """Return the versions of required and of optional packages. Add required packages that are
    absent or too old to `missing`."""
    try:
        required = [Requirement(text) for text in metadata.requires("fusedrl") or ()]
    except metadata.PackageNotFoundError:  # run from its sources
        required = [Requirement(name) for name in ("torch", "numpy", "transformers", "safetensors")]
    versions: dict[str, str] = {}
    for requirement in required:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = _version(requirement.name)
        versions[requirement.name] = version or "missing"
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            missing.append(
                f"{requirement.name}{requirement.specifier}, found {version or 'none'}: pip "
                f"install '{requirement.name}{requirement.specifier}'"
            )
    return versions | {
        name: version for name in _OPTIONAL if (version := _version(name)) is not None
    }


def _ops() -> dict[str, dict[str, dict[str, str | None]]]:
    """List for every op, from its table of implementations, why each cannot run here (None if it
    can)."""
    package = importlib.import_module("fusedrl.kernels")
    names = sorted(
        found.name
        for found in pkgutil.iter_modules(package.__path__)
        if re.fullmatch(r"[a-z]\w*", found.name)
    )
    modules = [importlib.import_module(f"fusedrl.kernels.{name}") for name in names] + [step]
    tables = {
        table.op: table
        for module in modules
        for table in vars(module).values()
        if isinstance(table, Implementations)
    }
    return {
        op: {
            kind: {name: unavailable(name, kind) for name in getattr(table, kind)}
            for kind in ("cpu", "cuda")
        }
        for op, table in sorted(tables.items())
    }


def _attention() -> dict[str, dict[str, str]]:
    """Test, on each device, the attention backends that fusedrl verifies before use. Return
    "verified" or the fault of each."""
    found: dict[str, dict[str, str]] = {}
    for device in ("cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # they are in the table
            states = {
                name: attention.fault(name, device) or "verified"
                for name in attention.tried(device)
            }
        if states:
            found[device] = states
    return found


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _read(path: str) -> str:
    return Path(path).read_text(encoding="utf-8", errors="replace") if Path(path).is_file() else ""


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def print_diagnosis(found: Diagnosis) -> None:
    """Print the findings as tables on standard output."""
    from rich.table import Table

    from fusedrl.engine.base.tables import console, show

    to = console()
    for title, rows in (("machine", found.machine), ("packages", found.packages)):
        table = Table(title=title, title_justify="left", show_header=False)
        for name, value in rows.items():
            table.add_row(name, value)
        show(table, to)
    table = Table(
        "op",
        "on CPU",
        "on CUDA",
        title="implementations that can run, the one used first",
        title_justify="left",
    )
    gpu = torch.cuda.device_count() > 0
    reasons: dict[tuple[str, str], str] = {}
    for op, kinds in found.ops.items():
        can = {
            kind: [name for name, why in names.items() if why is None]
            for kind, names in kinds.items()
        }
        table.add_row(op, ", ".join(can["cpu"]), ", ".join(can["cuda"]) if gpu else "no GPU")
        reasons |= {
            (name, kind): why
            for kind, names in kinds.items()
            for name, why in names.items()
            if why is not None and (gpu or kind == "cpu")
        }
    show(table, to)
    for (name, kind), why in reasons.items():
        to.print(f"{name} cannot run on {kind}: {why}")
    for device, backends in found.attention.items():
        to.print(
            f"attention on {device}: "
            f"{', '.join(f'{name} {state}' for name, state in backends.items())}",
        )
    for text in found.notes:
        to.print(f"note: {text}")
    for text in found.missing:
        to.print(f"missing: {text}")
    to.print("something required is missing" if found.missing else "everything required is here")
