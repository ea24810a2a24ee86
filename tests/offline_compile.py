"""Compiles every Triton kernel of the package for four GPUs, on a machine with none, and reports
what each one uses; and names the CUDA C++ sources.

    python tests/offline_compile.py [MODULE ...] [--json FILE]

with TRITON_INTERPRET unset: the interpreter has nothing to compile.

A module of kernels/ takes part by a table of its own, name -> what `triton.compile` needs to know:

    OFFLINE_KERNELS = {
        "forward_bf16": dict(
            kernel=_forward_kernel,  # the function under @triton.jit
            signature={"logits_ptr": "*bf16", "logp_ptr": "*fp32", "V": "i32"},
            constexprs={"BLOCK": 4096, "WITH_ENTROPY": True},  # every tl.constexpr parameter
            num_warps=8,  # optional, 4 by default
            num_stages=3,  # optional, Triton's own by default
            targets=("sm_90",),  # optional, where it may run; everywhere by default
            divisible=("row",),  # optional, integers that are multiples of 16 in practice
        ),
    }

The signature names every other parameter: "*fp32", "*bf16", "*fp16", "*i64", "*i32", "*i1" for
pointers (16-byte aligned, as torch's are), "i32", "i64", "fp32", "i1" for scalars. A pointer
argument that is None in some call is a constexpr None there. List each variant that runs in
practice (dtype, tile, flags) as an entry of its own. A spill on any target fails.

The launchers of CUDA C++ have a table of their own, `OFFLINE_SOURCES`: a file of csrc/cuda -> the
sets of options that it is compiled with.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}


def _tables(name: str, only: list[str]) -> Iterator[tuple[str, dict]]:
    """(op, its table) of every module of fusedrl.kernels that has one of that name (or of the ops
    named)."""
    import fusedrl.kernels

    for found in sorted(
        pkgutil.walk_packages(fusedrl.kernels.__path__, "fusedrl.kernels."),
        key=lambda found: found.name,
    ):
        module = found.name.removeprefix("fusedrl.kernels.")
        if not module.startswith("_C_") and (not only or module.split(".")[0] in only):
            yield module.split(".")[0], getattr(importlib.import_module(found.name), name, {})


def kernels(only: list[str]) -> dict[str, dict]:
    """ "module.name" -> entry of every Triton kernel, of all modules or of those named."""
    return {
        f"{module}.{name}": entry
        for module, table in _tables("OFFLINE_KERNELS", only)
        for name, entry in table.items()
    }


def cuda_sources() -> list[tuple[str, tuple[str, ...], bool]]:
    """(file of csrc/cuda, its options, whether they are the file's first) for every set of options
    that the launchers list."""
    return [
        (source, options, i == 0)
        for _, table in _tables("OFFLINE_SOURCES", [])
        for source, sets in table.items()
        for i, options in enumerate(sets)
    ]


def compile_entry(entry: dict, target: tuple):
    """One kernel compiled for one GPU, as Triton returns it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, constexprs = entry["kernel"], entry.get("constexprs", {})
    missing = set(kernel.arg_names) ^ (set(entry["signature"]) | set(constexprs))
    if missing:
        raise ValueError(
            f"signature and constexprs do not cover the parameters of {kernel.__name__}: "
            f"{sorted(missing)}"
        )
    signature = {
        name: "constexpr" if name in constexprs else entry["signature"][name]
        for name in kernel.arg_names
    }
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or name in entry.get("divisible", ())
    }
    source = ASTSource(
        kernel,
        signature,
        constexprs={(kernel.arg_names.index(k),): v for k, v in constexprs.items()},
        attrs=aligned,
    )
    # Fusion is named because its default changes between Triton versions.
    options = {"num_warps": entry.get("num_warps", 4), "enable_fp_fusion": True}
    if "num_stages" in entry:
        options["num_stages"] = entry["num_stages"]
    return triton.compile(source, target=GPUTarget(*target), options=options)


def compile_one(entry: dict, target: tuple) -> dict:
    """Registers a thread, spills (bytes on NVIDIA, registers on AMD) and shared bytes of one kernel
    for one GPU; its instructions for the tensor cores of sm_90, and scans that run backwards."""
    compiled = compile_entry(entry, target)
    if target[0] == "cuda":
        (usage,) = nvidia_usage(compiled.asm["cubin"]).values()
        usage["wgmma"] = compiled.asm["ptx"].count("wgmma.mma_async")
    else:
        usage = _amd_usage(compiled.asm["amdgcn"])
    backwards = compiled.asm["ttir"].count("reverse = true")
    return {**usage, "shared": compiled.metadata.shared, "reverse_scans": backwards}


def nvidia_usage(cubin: bytes) -> dict[str, dict]:
    """Kernel -> registers a thread, spilled bytes a thread (stack and local memory) and static
    shared bytes, by the cuobjdump inside Triton."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        text = subprocess.run(
            [tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True
        ).stdout
    found = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
    return {
        name: {
            "registers": int(registers),
            "spills": int(stack) + int(local),
            "shared": int(shared),
        }
        for name, registers, stack, shared, local in found
    }


def _amd_usage(assembly: str) -> dict:
    def count(key: str) -> int:
        return int(re.search(rf"\.{key}:\s+(\d+)", assembly)[1])

    return {
        "registers": count("vgpr_count"),
        "spills": count("vgpr_spill_count") + count("sgpr_spill_count"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "modules",
        nargs="*",
        help="ops, as files and folders of kernels/ are called (all that have a table)",
    )
    parser.add_argument(
        "--target",
        action="append",
        choices=sorted(TARGETS),
        help="for these GPUs alone; repeatable (default: all that a kernel names)",
    )
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET"):
        sys.exit(
            "offline_compile: expected TRITON_INTERPRET unset: under the interpreter there is "
            "nothing to compile"
        )
    rows = []
    for name, entry in kernels(arguments.modules).items():
        for target_name in entry.get("targets", TARGETS):
            if arguments.target and target_name not in arguments.target:
                continue
            target = TARGETS[target_name]
            row = {"kernel": name, "target": target_name}
            try:
                row |= compile_one(entry, target)
            except Exception as error:  # one broken kernel must not hide the others
                row |= {"error": f"{type(error).__name__}: {error}"[:2000]}
            rows.append(row)
            print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
