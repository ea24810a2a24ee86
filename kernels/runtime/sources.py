"""Digest of the C++ sources. The build stores it in the compiled kernels, and loading compares it.

Without the digest, kernels of an older build, or of another install on the same path, would be
loaded silently. setup.py runs this file by itself, so it imports nothing of the package.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

RECORD = "sources.sha256"  # in the folder of fusedrl.kernels in a wheel, which has no sources


def digest(csrc: Path) -> str:
    """Return the SHA-256, in hexadecimal, of the names and contents of the *.cpp and *.h files that
    the compiled kernels are built from."""
    found = hashlib.sha256()
    for path in sorted(
        path
        for folder in ("cpu", "shared")
        for path in (csrc / folder).rglob("*")
        if path.suffix in (".cpp", ".h")
    ):
        content = path.read_bytes()
        found.update(f"{path.name} {len(content)}\n".encode())
        found.update(content)
    return found.hexdigest()


def expected(kernels: Path) -> str | None:
    """Return the digest that the compiled kernels of this package must carry. A wheel records it;
    in a checkout it is computed from the sources. Return None if there is neither. `kernels`: the
    folder of fusedrl.kernels."""
    if (kernels / RECORD).is_file():
        return (kernels / RECORD).read_text().strip()
    checkout = kernels.resolve().parent / "csrc"
    return digest(checkout) if (checkout / "cpu").is_dir() else None
