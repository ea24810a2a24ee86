"""What setup.py builds: for a wheel all vector capabilities, in place this machine's; and what is said where none fits."""
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fusedrl.kernels import native

ROOT = Path(__file__).resolve().parents[1]
HERE = {"AVX512": "avx512", "AVX2": "avx2"}.get(torch.backends.cpu.get_cpu_capability(), "default")
needs_x86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="one capability is all there is")

FINALIZED = """
import json, sys
from setuptools import Distribution
from distutils.core import run_setup
found = []
for arguments, editable in ((["build_ext"], False), (["build_ext", "--inplace"], False), (["build_ext"], True)):
    command = run_setup("setup.py", arguments, stop_after="commandline").get_command_obj("build_ext")
    command.editable_mode = command.editable_mode or editable
    command.ensure_finalized()
    found.append([extension.name for extension in command.extensions])
print(json.dumps(found))
"""


@needs_x86
def test_a_wheel_has_every_capability_and_a_build_in_place_this_machines():
    told = subprocess.run([sys.executable, "-c", FINALIZED], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    names = [[name.removeprefix("fusedrl.kernels._C_") for name in found] for found in json.loads(told.splitlines()[-1])]
    assert names == [["default", "avx2", "avx512"], [HERE], [HERE]]


def test_a_narrower_machine_is_told_to_reinstall(monkeypatch):
    tried = []

    def none(name):
        tried.append(name)
        raise ImportError("no such build")

    monkeypatch.setattr(native.importlib, "import_module", none)
    monkeypatch.setattr(native.importlib.util, "find_spec", lambda name: name.endswith("_C_avx512") or None)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert native._load() == (None, "_C_avx2: no such build; _C_default: no such build; there is one for avx512, and torch finds AVX2 here; reinstall fusedrl "
                                    "on this machine")
    assert tried == ["fusedrl.kernels._C_avx2", "fusedrl.kernels._C_default"]
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert "reinstall" not in native._load()[1]


BUILD = """
import sys
from distutils.core import run_setup
options = ["--build-lib", sys.argv[2], "--build-temp", sys.argv[2] + "/temp"]
command = run_setup("setup.py", ["build_ext", *options], stop_after="commandline").get_command_obj("build_ext")
command.ensure_finalized()
command.extensions = [extension for extension in command.extensions if extension.name.endswith("_C_" + sys.argv[1])]
command.run()
"""


@pytest.mark.full
@needs_x86
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_the_narrower_builds_keep_the_contract(capability, tmp_path):
    """Compiles one, some minutes, and runs the kernels' tests on it."""
    if not native.capability or capability == HERE:
        pytest.skip("no compiler here, or this is the build that all tests run on")
    subprocess.run([sys.executable, "-c", BUILD, capability, str(tmp_path)], cwd=ROOT, check=True)
    (tmp_path / "fusedrl/engine").symlink_to(ROOT / "engine")  # a tree with this build alone
    (tmp_path / "fusedrl/kernels/cuda_src").symlink_to(ROOT / "csrc/cuda")
    for module in (ROOT / "kernels").glob("*.py"):
        (tmp_path / "fusedrl/kernels" / module.name).symlink_to(module)
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    built = subprocess.run([sys.executable, "-c", "from fusedrl.kernels import native; print(native.capability)"], cwd=ROOT, env=environment, check=True,
                           capture_output=True, text=True).stdout.split()[-1]
    assert built == capability
    subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "not full", "tests/kernels/test_contract.py", "tests/kernels/test_decode_step.py",
                    "-k", "not triton"], cwd=ROOT, env=environment, check=True)
