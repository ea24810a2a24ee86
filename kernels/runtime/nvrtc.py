"""CUDA C++ at run time: launches described as data, compilation by NVRTC, a cache on disk, and the
launch on torch's current stream.

    plan (kernels/*/_cuda.py) -> Launch: source, options, kernel, grid, block, arguments -> `run`

A Launch is complete, so tests can run the same launches on a CPU build of the same sources
(csrc/simt/). The sources are the package data of `fusedrl.kernels.cuda_src` and `shared_src`
(csrc/cuda and csrc/shared in a checkout). They include no CUDA header, so only NVRTC itself is
needed: `cuda-bindings` and `nvidia-cuda-nvrtc`, which the CUDA wheels of torch install. A cubin is
compiled once for a source, its options, an architecture and a compiler version, and stored in
~/.cache/fusedrl/cuda. The first launch of a kernel compiles and loads it, so warm up before
capturing a CUDA graph.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib
import os
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

# an array: a struct of so many
Scalar = ctypes.c_int32 | ctypes.c_int64 | ctypes.c_float | ctypes.Array[ctypes.c_float]


# ---- a launch as data ----------------------------------------------------------------------------
@dataclass(frozen=True)
class Launch:
    """One kernel launch. `arguments` are those of the kernel, in order: tensors (passed as the
    address of their first element), None (a null pointer), or ctypes scalars."""

    source: str  # a file of cuda_src
    kernel: str
    arguments: tuple[Tensor | Scalar | None, ...]
    grid: tuple[int, int, int]
    block: int
    options: tuple[str, ...] = ()

    def packed(self) -> tuple[ctypes.Array, list]:
        """Pack the arguments for cuLaunchKernel. Return an array of addresses, one per argument,
        and the objects at these addresses, which must stay alive until the launch returns."""
        values = [
            ctypes.c_void_p(None if a is None else a.data_ptr())
            if a is None or isinstance(a, Tensor)
            else a
            for a in self.arguments
        ]
        return (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values)), values


def aligned(tensors: Iterable[Tensor | None], bytes_: int = 16) -> bool:
    """Whether the data of all tensors starts at a multiple of `bytes_`, as vector loads need."""
    return all(t is None or t.data_ptr() % bytes_ == 0 for t in tensors)


# ---- sources -------------------------------------------------------------------------------------
def source_folder(name: str = "cuda") -> Path:
    """Find the folder of the .cu files ("shared": of the headers they share with the C++ kernels),
    in the installed package or in the checkout of this file."""
    try:
        installed = [
            Path(path) for path in importlib.import_module(f"fusedrl.kernels.{name}_src").__path__
        ]
    except ImportError:
        installed = []
    return next(
        (path for path in installed if path.is_dir()),
        Path(__file__).resolve().parents[2] / "csrc" / name,
    )


def headers() -> list[Path]:
    """Return the headers that the .cu files may include."""
    return [*sorted(source_folder().glob("*.cuh")), *sorted(source_folder("shared").glob("*.h"))]


# ---- what is available ---------------------------------------------------------------------------
def _bindings() -> tuple[ModuleType, ModuleType]:
    """Return (cuda.bindings.nvrtc, cuda.bindings.driver)."""
    return importlib.import_module("cuda.bindings.nvrtc"), importlib.import_module(
        "cuda.bindings.driver"
    )


def loading_fault() -> str | None:
    """Return why NVRTC does not load, or None if it does. This needs no GPU."""
    try:
        _check("nvrtcVersion", _bindings()[0].nvrtcVersion())
    except (ImportError, RuntimeError) as error:
        return str(error).splitlines()[0]
    return None


def why_not() -> str | None:
    """Return why CUDA C++ kernels cannot run on this machine, or None if they can."""
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    fault = loading_fault()
    if fault is not None:
        major = torch.version.cuda.split(".")[0]
        return (
            f"NVRTC is not usable ({fault}); pip install 'cuda-bindings=={major}.*' "
            f"'nvidia-cuda-nvrtc{'-cu12' if major == '12' else ''}=={major}.*'"
        )
    return (
        None
        if (source_folder() / "common.cuh").is_file()
        else f"the CUDA sources are not in {source_folder()}; reinstall fusedrl"
    )


def _check(what: str, result: tuple) -> tuple:
    """Return the results of a call to cuda.bindings without its status. Raise RuntimeError if the
    status is not success."""
    status, *values = result
    if int(status) != 0:
        raise RuntimeError(f"{what}: expected success, got {getattr(status, 'name', status)}")
    return tuple(values)


# ---- compilation ---------------------------------------------------------------------------------
def compile_cubin(source: str, options: tuple[str, ...], architecture: str) -> bytes:
    """Compile one file of `cuda_src`, such as ("gae.cu", ("-DALIGNED=1",), "sm_90"), to machine
    code. Needs no GPU.

    Raises:
        RuntimeError: the compiler reports an error; the message includes its log.
        ImportError: cuda-bindings is not installed.
    """
    nvrtc, _ = _bindings()
    folder = source_folder()
    included = headers()
    (program,) = _check(
        "nvrtcCreateProgram",
        nvrtc.nvrtcCreateProgram(
            (folder / source).read_bytes(),
            source.encode(),
            len(included),
            [h.read_bytes() for h in included],
            [h.name.encode() for h in included],
        ),
    )
    arguments = [
        option.encode()
        for option in ("--std=c++17", f"--gpu-architecture={architecture}", *options)
    ]
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(arguments), arguments)
        if int(status) != 0:
            log = b" " * _check("nvrtcGetProgramLogSize", nvrtc.nvrtcGetProgramLogSize(program))[0]
            _check("nvrtcGetProgramLog", nvrtc.nvrtcGetProgramLog(program, log))
            raise RuntimeError(
                f"{source} {' '.join(options)}: expected NVRTC to compile it for {architecture}, "
                f"got {status.name}:\n"
                f"{log.rstrip(bytes(1)).decode()}"
            )
        cubin = b" " * _check("nvrtcGetCUBINSize", nvrtc.nvrtcGetCUBINSize(program))[0]
        _check("nvrtcGetCUBIN", nvrtc.nvrtcGetCUBIN(program, cubin))
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return cubin


def cached_cubin(
    source: str, options: tuple[str, ...], architecture: str, cache: Path | None = None
) -> bytes:
    """Return the result of `compile_cubin`, from `cache` if it is there (~/.cache/fusedrl/cuda by
    default). A file there begins with the SHA-256 of the rest, and one that was cut or damaged is
    compiled again. If the cache cannot be written, warn, and compile once per process."""
    folder = source_folder()
    parts = [
        str(_check("nvrtcVersion", _bindings()[0].nvrtcVersion())),
        architecture,
        source,
        *options,
    ]
    contents = [(folder / source).read_bytes(), *(h.read_bytes() for h in headers())]
    key = hashlib.sha256(b"\0".join([*(part.encode() for part in parts), *contents])).hexdigest()
    path = (
        cache or Path.home() / ".cache" / "fusedrl" / "cuda"
    ) / f"{Path(source).stem}-{architecture}-{key[:32]}.cubin"
    if (kept := _whole(path)) is not None:
        return kept
    cubin = compile_cubin(source, options, architecture)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_whole(path, cubin)
    except OSError as error:
        warnings.warn(
            f"{path.parent} cannot be written ({error}): CUDA kernels are compiled again in every "
            "process",
            stacklevel=2,
        )
    return cubin


def _whole(path: Path) -> bytes | None:
    """Return what `_write_whole` wrote; None if it is not there, or not as it was written."""
    try:
        kept = path.read_bytes()
    except OSError:
        return None
    digest, cubin = kept[:32], kept[32:]
    return cubin if cubin and hashlib.sha256(cubin).digest() == digest else None


def _write_whole(path: Path, cubin: bytes) -> None:
    """Replace a file by the SHA-256 of some bytes and the bytes: a reader sees all of it or none,
    and after a power loss `_whole` tells which."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".tmp_", delete=False) as file:
        try:
            file.write(hashlib.sha256(cubin).digest() + cubin)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


# ---- the launch ----------------------------------------------------------------------------------
@functools.cache
def _context(device: int) -> object:
    """Return torch's CUDA context of a device, which is the primary context."""
    _, driver = _bindings()
    torch.cuda.init()
    (handle,) = _check("cuDeviceGet", driver.cuDeviceGet(device))
    return _check("cuDevicePrimaryCtxRetain", driver.cuDevicePrimaryCtxRetain(handle))[0]


@functools.cache
def _function(source: str, options: tuple[str, ...], kernel: str, device: int) -> object:
    """Load a kernel; the device's context must be current."""
    return _check(
        f"cuModuleGetFunction({kernel})",
        _bindings()[1].cuModuleGetFunction(_module(source, options, device), kernel.encode()),
    )[0]


@functools.cache
def _module(source: str, options: tuple[str, ...], device: int) -> object:
    major, minor = torch.cuda.get_device_capability(device)
    return _check(
        f"cuModuleLoadData({source})",
        _bindings()[1].cuModuleLoadData(cached_cubin(source, options, f"sm_{major}{minor}")),
    )[0]


def run(launches: Iterable[Launch], device: torch.device) -> None:
    """Enqueue launches, in order, on torch's current stream of `device`, without waiting. Raise
    RuntimeError if CUDA reports an error."""
    _, driver = _bindings()
    index = torch.cuda.current_device() if device.index is None else device.index
    with torch.cuda.device(index):
        # threads such as those of autograd may have no context yet
        _check("cuCtxSetCurrent", driver.cuCtxSetCurrent(_context(index)))
        stream = torch.cuda.current_stream(index).cuda_stream
        for each in launches:
            function = _function(each.source, each.options, each.kernel, index)
            addresses, kept = each.packed()
            _check(
                f"cuLaunchKernel({each.kernel})",
                driver.cuLaunchKernel(
                    function,
                    *each.grid,
                    each.block,
                    1,
                    1,
                    0,
                    stream,
                    ctypes.addressof(addresses),
                    0,
                ),
            )
            del kept  # the arguments were copied
