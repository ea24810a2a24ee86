"""Digest of the C++ sources: in the compiled kernels when they are built, and compared when they
are loaded.

Without it kernels of an older build, or of another install on the same path, would be loaded
without a word. setup.py runs this file by itself: it imports nothing of the package.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

RECORD = "sources.sha256"  # in the folder of fusedrl.kernels in a wheel, which has no sources


def digest(csrc: Path) -> str:
    """SHA-256 over the names and contents of the *.cpp and *.h files that the compiled kernels are
    built from, in hexadecimal."""
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
    """Digest that the compiled kernels beside this package must carry: recorded in a wheel, of the
    sources themselves in a checkout; None: there is neither. `kernels`: the folder of
    fusedrl.kernels."""
    if (kernels / RECORD).is_file():
        return (kernels / RECORD).read_text().strip()
    checkout = kernels.resolve().parent / "csrc"
    return digest(checkout) if (checkout / "cpu").is_dir() else None
