"""Before triton is imported: its interpreter, where there is no GPU. One thread each: the suite runs one process per core."""
import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(1)

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(autouse=True)
def _nothing_compiled_for_other_tests():
    """torch.compile wraps every op that it is given in one function of its own, and compiles eight variants of a function in a process, no more."""
    yield
    torch.compiler.reset()


@pytest.fixture
def shared() -> Path:
    """The folder with real models and data beside the checkout; tests that use it skip without it."""
    if not SHARED.is_dir():
        pytest.skip(f"no {SHARED.name}/ folder beside the checkout: real models and data are not at hand")
    return SHARED
