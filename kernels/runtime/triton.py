"""Triton and its language, or None if they cannot be imported. The Triton kernels are then not
defined, and dispatch gives the reason."""

from __future__ import annotations

fault: str | None = None
"""Why Triton cannot be imported; None when it can."""
try:
    import triton
    import triton.language as tl
except ImportError as error:
    triton, tl, fault = None, None, f"triton is not importable ({error})"  # type: ignore[assignment]
