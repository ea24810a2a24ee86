"""The CUDA C++ sources compile for every GPU with no GPU at hand, by nvcc and by NVRTC, where those
are, and spill on none."""

import errno
import os
import re
import shutil
import subprocess

import pytest
from tests.offline_compile import cuda_sources, nvidia_usage

from fusedrl.kernels.runtime import nvrtc

pytestmark = pytest.mark.cpu_only("compilers alone")
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")


def _sources():
    """The first options of a file always, the others by `make test-full`."""
    return [
        pytest.param(
            source,
            options,
            id=" ".join((source, *options)),
            marks=[] if first else [pytest.mark.full],
        )
        for source, options, first in cuda_sources()
    ]


def _needs_nvrtc():
    if nvrtc.loading_fault() is not None:
        pytest.skip(f"{nvrtc.loading_fault()}: pip install cuda-bindings nvidia-cuda-nvrtc")


def test_every_source_is_listed():
    assert {parameter.values[0] for parameter in _sources()} == {
        path.name for path in nvrtc.source_folder().glob("*.cu")
    }


def test_sources_hold_device_code_only():
    for path in (*nvrtc.source_folder().glob("*.cu"), *nvrtc.headers()):
        text = path.read_text()
        # NVRTC needs nothing but itself
        assert set(re.findall(r"#include (.*)", text)) <= {'"common.cuh"', '"objectives.h"'}, path
        assert "<<<" not in text
        assert not re.search(r"atomic\w*\(", text), "sums are in a fixed order"
        assert text.count("__global__") == text.count('extern "C" __global__')


@pytest.mark.parametrize("source, options", _sources())
def test_nvcc(source, options, tmp_path, record_property):
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc (users need none)")
    targets = [f"-gencode=arch=compute_{a[3:]},code={a}" for a in ARCHITECTURES]
    done = subprocess.run(
        [
            "nvcc",
            "-fatbin",
            "-std=c++17",
            "--resource-usage",
            f"-I{nvrtc.source_folder('shared')}",
            *targets,
            *options,
            "-o",
            str(tmp_path / "x.fatbin"),
            str(nvrtc.source_folder() / source),
        ],
        capture_output=True,
        text=True,
    )
    text = done.stdout + done.stderr
    assert done.returncode == 0, text
    rows = re.findall(
        r"entry function '(\w+)' for '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        text,
        re.DOTALL,
    )
    assert {row[1] for row in rows} == set(ARCHITECTURES)
    for kernel, target, stack, stores, loads, registers in rows:
        record_property(f"{kernel} {target}", f"{registers} registers, {stack} bytes of stack")
        print(
            f"{source} {' '.join(options)} {kernel} {target}: {registers} registers, {stack} "
            f"stack, {stores} + {loads} spilled"
        )
        assert (stack, stores, loads) == ("0", "0", "0"), f"{kernel} spills for {target}"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source, options", _sources())
def test_nvrtc(source, options, architecture):
    _needs_nvrtc()
    cubin = nvrtc.compile_cubin(source, options, architecture)
    assert cubin[:4] == b"\x7fELF"
    pytest.importorskip("triton")
    used = nvidia_usage(cubin)
    assert len(used) == (nvrtc.source_folder() / source).read_text().count("__global__")
    assert not [name for name, usage in used.items() if usage["spills"]], used


def test_cache(tmp_path):
    _needs_nvrtc()
    arguments = ("logprob.cu", ("-DDTYPE=0", "-DKEPT=0"), "sm_90", tmp_path / "cache")
    first = nvrtc.cached_cubin(*arguments)
    (file,) = (tmp_path / "cache").iterdir()
    nvrtc._write_whole(file, b"kept")
    assert nvrtc.cached_cubin(*arguments) == b"kept"
    assert (
        nvrtc.cached_cubin("logprob.cu", ("-DDTYPE=1", "-DKEPT=0"), "sm_90", tmp_path / "cache")
        != first
    )
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="compiled again in every process"):
        assert nvrtc.cached_cubin(*arguments[:3], tmp_path / "file" / "cache") == first


def test_what_a_power_loss_left_in_the_cache_is_compiled_again(tmp_path, monkeypatch):
    _needs_nvrtc()
    compiled = []
    monkeypatch.setattr(
        nvrtc, "compile_cubin", lambda *given: compiled.append(given) or b"\x7fELF" + bytes(99)
    )
    arguments = ("logprob.cu", (), "sm_90", tmp_path)
    whole = nvrtc.cached_cubin(*arguments)
    (file,) = tmp_path.iterdir()
    kept = file.read_bytes()
    damage = (b"", kept[:10], kept[:32], kept[:-1], kept + b"x", bytes(len(kept)), whole)
    for content in damage:
        file.write_bytes(content)
        assert nvrtc.cached_cubin(*arguments) == whole
        assert file.read_bytes() == kept
    assert len(compiled) == 1 + len(damage)
    assert nvrtc.cached_cubin(*arguments) == whole
    assert len(compiled) == 1 + len(damage)


def test_a_cache_that_cannot_be_written_leaves_no_litter(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        nvrtc._write_whole(tmp_path / "x.cubin", b"cubin")
    assert not list(tmp_path.iterdir())


def test_a_refusal_shows_the_log():
    _needs_nvrtc()
    with pytest.raises(
        RuntimeError, match=r"expected NVRTC to compile it for sm_90(.|\n)*#if DTYPE == 0"
    ):
        nvrtc.compile_cubin("logprob.cu", ("-DDTYPE=oops+",), "sm_90")
