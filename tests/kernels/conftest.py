"""CUDA C++ on a CPU: the launches of the product, run by the same .cu files built with g++ against
csrc/simt/simt.h."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from torch import Tensor

from fusedrl.engine.tools.verify import ops
from fusedrl.kernels.runtime import nvrtc
from fusedrl.kernels.runtime.dispatch import unavailable

HEADERS = Path(__file__).resolve().parents[2] / "csrc" / "simt"
KERNEL = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s+)?(\w+)\s*\(")


class Simt:
    """Builds a source once for its options, and runs launches as nvrtc.run does. `descending`: the
    order in which the threads of a block run."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.descending, self._libraries = folder, False, {}

    def library(
        self, source: str, options: tuple[str, ...] = (), sources: Path | None = None
    ) -> ctypes.CDLL:
        sources = sources or nvrtc.source_folder()
        key = (sources / source, options)
        if key not in self._libraries:
            main, built = (
                self.folder / f"{Path(source).stem}{len(self._libraries)}{suffix}"
                for suffix in (".cpp", ".so")
            )
            names = KERNEL.findall((sources / source).read_text())
            main.write_text(
                "\n".join(
                    [
                        '#include "simt.h"',
                        f'#include "{source}"',
                        *(f"SIMT_KERNEL({name})" for name in names),
                        "",
                    ]
                )
            )
            folders = [
                f"-I{folder}" for folder in (HEADERS, sources, nvrtc.source_folder("shared"))
            ]
            subprocess.run(
                [
                    "g++",
                    "-O1",
                    "-std=c++17",
                    "-shared",
                    "-fPIC",
                    "-U_FORTIFY_SOURCE",
                    "-Wno-unknown-pragmas",
                    *folders,
                    *options,
                    str(main),
                    "-o",
                    str(built),
                ],
                check=True,
            )
            self._libraries[key] = ctypes.CDLL(str(built))
        return self._libraries[key]

    def run(self, launches, device=None, sources: Path | None = None) -> None:
        for each in launches:
            library = self.library(each.source, each.options, sources)
            addresses, kept = each.packed()
            sizes = getattr(library, f"simt_sizes_{each.kernel}")
            sizes.restype = ctypes.POINTER(ctypes.c_int)
            expected = []
            while sizes()[len(expected)]:
                expected.append(sizes()[len(expected)])
            assert [ctypes.sizeof(value) for value in kept] == expected, (
                f"{each.kernel}: the sizes of the arguments"
            )
            # rows whose stride is an argument
            strided = each.source in ("kv_cache.cu", "logprob.cu", "sampling.cu")
            assert all(
                a is None or not isinstance(a, Tensor) or a.is_contiguous() or strided
                for a in each.arguments
            )
            call = getattr(library, f"simt_{each.kernel}")
            call.restype = ctypes.c_char_p
            error = call(
                addresses,
                (ctypes.c_uint * 3)(*each.grid),
                ctypes.c_uint(each.block),
                int(self.descending),
            )
            if error is not None:
                raise RuntimeError(f"{each.kernel}: {error.decode()}")


@pytest.fixture(scope="session")
def _simt(tmp_path_factory):
    return Simt(tmp_path_factory.mktemp("simt"))


@pytest.fixture
def simt(_simt):
    """Skips where there is no g++."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ to build the CUDA sources for a CPU")
    yield _simt
    _simt.descending = False


@pytest.fixture
def small_tiles():
    """Triton's tiles cut to what the interpreter runs in milliseconds."""
    with ops.small_tiles():
        yield


@pytest.fixture
def triton_runs(device):
    """Skips where Triton does not run on the device: on a CPU, it needs its interpreter."""
    why = unavailable("triton", device.type)
    if why:
        pytest.skip(why)
