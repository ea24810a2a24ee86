"""The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer: their suites, then the
fuzzer. `make sanitize` builds them and runs this.

    python -m tests.support.sanitized build/sanitized --minutes 10

The folder holds a whole package, so that the ordinary install stays what it is. Python itself has
no sanitizer, which is why the library is loaded before everything else. Leaks are not looked for:
Python and torch keep what they have until the process ends, and that would be all of the report.
PYTHONMALLOC=malloc lets the sanitizer see Python's own memory too.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = ("libasan.so", "libstdc++.so")  # the second: exceptions are looked for at start-up
# Sources that are compiled in other ways (nvrtc, torch.compile, g++ against simt.h), and none of
# which is in the extension.
OTHERS = ("cuda", "offline", "recompiles", "attention_flash", "attention_triton", "faults")
# Tests that want Triton's ops registered, or that start a process in an environment of its own.
APART = ("triton", "compile", "every_registered_op", "activate_rows", "canaries")
ASAN = "detect_leaks=0:abort_on_error=1:allocator_may_return_null=1:detect_stack_use_after_return=0"
UBSAN = "print_stacktrace=1:halt_on_error=1"


def environment(folder: Path, compiler: str = "gcc") -> dict[str, str]:
    """Return the environment in which python loads the package of `folder`."""
    found = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], check=True, capture_output=True, text=True
        ).stdout.strip()
        for name in LIBRARIES
    ]
    return os.environ | {
        "LD_PRELOAD": " ".join(found),
        "ASAN_OPTIONS": ASAN,
        "UBSAN_OPTIONS": UBSAN,
        "PYTHONMALLOC": "malloc",
        "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]),
        "TRITON_INTERPRET": "0",  # C++ alone
        "OMP_NUM_THREADS": "1",
    }


def suites() -> list[str]:
    """Return the test files of the kernels that C++ has a part in."""
    files = sorted((ROOT / "tests/kernels").glob("test_*.py"))
    return [str(path) for path in files if not any(word in path.stem for word in OTHERS)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=10.0, help="of the fuzzer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("suites", "fuzzer"))
    parser.add_argument("arguments", nargs="*", help="of pytest, in place of all suites")
    options = parser.parse_args()
    folder = options.folder.resolve()
    env, python = environment(folder), [sys.executable]
    seen = "from fusedrl.kernels.runtime import native; print(native.__file__, native.capability)"
    told = subprocess.run([*python, "-c", seen], env=env, capture_output=True, text=True)
    if str(folder) not in told.stdout or "None" in told.stdout:
        raise SystemExit(f"expected the kernels of {folder}, got {told.stdout}{told.stderr}")
    codes, began = [], time.monotonic()
    if options.only != "fuzzer":
        command = ["-m", "pytest", "-q", "-rf", "-p", "no:cacheprovider"]
        command += ["-m", "not full and not real and not page", "-k"]
        command.append(" and ".join(f"not {word}" for word in APART))
        given = options.arguments or suites()
        codes.append(subprocess.run([*python, *command, *given], env=env, cwd=ROOT).returncode)
        print(f"suites: exit status {codes[-1]} after {time.monotonic() - began:.0f} s", flush=True)
    if options.only != "suites":
        note = folder / "fuzzed.txt"
        command = ["-m", "tests.support.fuzz_ops", "--minutes", str(options.minutes)]
        command += ["--seed", str(options.seed), "--note", str(note)]
        codes.append(subprocess.run([*python, *command], env=env, cwd=ROOT).returncode)
        if codes[-1]:
            print(f"to repeat it: python -m tests.support.fuzz_ops {note.read_text()}")
    return max(map(abs, codes))


if __name__ == "__main__":
    raise SystemExit(main())
