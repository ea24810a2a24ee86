"""The one place at which threads of an op in C++ write the same number, under ThreadSanitizer: the
lowest bad row of sample. Everywhere else a thread writes rows or blocks that are its alone.

The op is compiled by itself, with threads that the sanitizer knows (tests/support/threads); python
has to be started with its library loaded first, and has no other build of the op."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "csrc/cpu/ops/sampling.cpp"
pytestmark = [pytest.mark.cpu_only("the C++ kernels"), pytest.mark.full]

CALLS = """
import itertools, sys, torch
torch.ops.load_library(sys.argv[1])
chance, calls, refused = torch.Generator().manual_seed(0), 0, 0
dtypes = (torch.float32, torch.bfloat16, torch.float16)
kinds = ((None, None, None), (3.0, None, None), (None, 0.7, None), (5.0, 0.9, 0.05))
sizes = ((1, 2, 5, 33), (7, 65, 500))
for B, V, dtype, kind, kept in itertools.product(*sizes, dtypes, kinds, (0, 1)):
    z = torch.randn(B, V, generator=chance).to(dtype)
    keys = torch.randint(0, 2**31, (B, 4), generator=chance)
    columns = [None if x is None else torch.full((B,), x).double() for x in (0.8, *kind)]
    given = (*columns, keys, None, B * V if kept else None)
    torch.ops.fusedrl.sample(z, *given)
    calls += 1
    z[::2] = float("nan")
    try:
        torch.ops.fusedrl.sample(z, *given)
    except ValueError as error:
        refused += f"row 0 of {B}" in str(error)  # the lowest, whichever thread came first
print(calls, refused)
"""


def compiled(source: Path, to: Path) -> Path:
    torch_of = Path(torch.__file__).parent
    folders = [ROOT / "tests/support/threads", ROOT / "csrc/cpu/include", ROOT / "csrc/shared"]
    folders += [torch_of / "include", torch_of / "include/torch/csrc/api/include"]
    flags = ["-shared", "-fPIC", "-O1", "-g1", "-std=c++20", "-fno-math-errno", "-Wno-psabi"]
    flags += ["-DCPU_CAPABILITY=DEFAULT", "-DCPU_CAPABILITY_DEFAULT", "-fsanitize=thread"]
    flags += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    flags += [f"-I{folder}" for folder in folders]
    libraries = [f"-L{torch_of / 'lib'}", "-lc10", "-ltorch_cpu"]
    try:
        subprocess.run(["g++", *flags, str(source), "-o", str(to), *libraries], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"g++ makes nothing for ThreadSanitizer here: {error}")
    return to


def run(library: Path) -> subprocess.CompletedProcess:
    found = subprocess.run(
        ["gcc", "-print-file-name=libtsan.so"], check=True, capture_output=True, text=True
    )
    env = os.environ | {"LD_PRELOAD": found.stdout.strip(), "OMP_NUM_THREADS": "1"}
    env["TSAN_OPTIONS"] = "exitcode=66 report_signal_unsafe=0"
    return subprocess.run(
        [sys.executable, "-c", CALLS, str(library)], env=env, capture_output=True, text=True
    )


def test_no_two_threads_touch_the_same_number_unguarded(tmp_path):
    told = run(compiled(SOURCE, tmp_path / "sampling.so"))
    assert (told.returncode, told.stdout.split()) == (0, ["288", "288"]), told.stderr[-3000:]
    assert "ThreadSanitizer" not in told.stderr


def test_a_planted_race_is_found(tmp_path):
    """The same with a plain number in place of the atomic one."""
    text = SOURCE.read_text(encoding="utf-8")
    for old, new in (
        ("std::atomic<int64_t> bad{B};", "int64_t bad = B;"),
        ("!bad.compare_exchange_weak(seen, b)", "(bad = b, false)"),
        ("bad.load()", "bad"),
    ):
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "race.cpp").write_text(text, encoding="utf-8")
    told = run(compiled(tmp_path / "race.cpp", tmp_path / "race.so"))
    assert told.returncode == 66
    assert "ThreadSanitizer: data race" in told.stderr
