"""Machine code of compiled kernels, read for what can be counted without a GPU: instructions, the
loops they stand in, and how wide loads and stores are. The disassembler is the one inside
Triton."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")


@dataclass(frozen=True)
class Code:
    """Instructions of a kernel, in order: (address, opcode with its modifiers, operands)."""

    instructions: tuple[tuple[int, str, str], ...]

    def count(self, *prefixes: str) -> int:
        """Number of instructions whose opcode begins with one of the prefixes; with none, of all
        but padding."""
        return sum(
            op.startswith(prefixes) if prefixes else op != "NOP" for _, op, _ in self.instructions
        )

    def opcodes(self) -> Counter[str]:
        """How often each opcode stands there, without its modifiers."""
        return Counter(op.split(".")[0] for _, op, _ in self.instructions)

    def longest_stretch(self) -> Code:
        """The longest run of instructions that nothing branches into or out of."""
        targets = {
            int(found[1], 16)
            for _, op, operands in self.instructions
            if op.startswith("BRA") and (found := re.search(r"0x([0-9a-f]+)\s*$", operands))
        }
        stretches: list[list[tuple[int, str, str]]] = [[]]
        for one in self.instructions:
            if one[0] in targets:
                stretches.append([])
            stretches[-1].append(one)
            if one[1].startswith(("BRA", "EXIT")):
                stretches.append([])
        return max((Code(tuple(each)) for each in stretches), key=Code.count)

    def loops(self) -> list[Code]:
        """The innermost loops, longest first: what lies between a branch back and its target."""
        spans = []
        for at, op, operands in self.instructions:
            found = re.search(r"0x([0-9a-f]+)\s*$", operands)
            if op.startswith("BRA") and found and int(found[1], 16) < at:
                spans.append((int(found[1], 16), at))
        inner = [
            (first, last)
            for first, last in spans
            if not any((a, b) != (first, last) and first <= a and b <= last for a, b in spans)
        ]
        bodies = [
            Code(tuple(one for one in self.instructions if first <= one[0] <= last))
            for first, last in set(inner)
        ]
        return sorted(bodies, key=lambda body: -body.count())


def disassemble(cubin: bytes) -> dict[str, Code]:
    """Kernel -> its code."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        text = subprocess.run(
            [tool, "--dump-sass", path], capture_output=True, text=True, check=True
        ).stdout
    found: dict[str, Code] = {}
    for part in text.split("Function : ")[1:]:
        lines = filter(None, map(_LINE.match, part.splitlines()))
        found[part.split()[0]] = Code(tuple((int(m[1], 16), m[2], m[3].strip()) for m in lines))
    return found
