"""What setup.py builds: for a wheel all vector capabilities, in place this machine's; and what is
said where none fits."""

import importlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from fusedrl.kernels.runtime import native, sources

ROOT = Path(__file__).resolve().parents[1]
HERE = {"AVX512": "avx512", "AVX2": "avx2"}.get(torch.backends.cpu.get_cpu_capability(), "default")
needs_x86 = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="one capability is all there is"
)

FINALIZED = """
import json, sys
from setuptools import Distribution
from distutils.core import run_setup
found = []
ways = ((["build_ext"], False), (["build_ext", "--inplace"], False), (["build_ext"], True))
for arguments, editable in ways:
    distribution = run_setup("setup.py", arguments, stop_after="commandline")
    command = distribution.get_command_obj("build_ext")
    command.editable_mode = command.editable_mode or editable
    command.ensure_finalized()
    found.append([extension.name for extension in command.extensions])
print(json.dumps(found))
"""


@needs_x86
def test_a_wheel_has_every_capability_and_a_build_in_place_this_machines():
    told = subprocess.run(
        [sys.executable, "-c", FINALIZED], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    names = [
        [name.removeprefix("fusedrl.kernels._C_") for name in found]
        for found in json.loads(told.splitlines()[-1])
    ]
    assert names == [["default", "avx2", "avx512"], [HERE], [HERE]]


def test_a_narrower_machine_is_told_to_reinstall(monkeypatch):
    tried = []

    def none(name):
        tried.append(name)
        raise ImportError("no such build")

    monkeypatch.setattr(native.importlib, "import_module", none)
    monkeypatch.setattr(
        native.importlib.util, "find_spec", lambda name: name.endswith("_C_avx512") or None
    )
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert native._load() == (
        None,
        "_C_avx2: no such build; _C_default: no such build; there is one for avx512, and torch "
        "finds AVX2 here; reinstall fusedrl "
        "on this machine",
    )
    assert tried == ["fusedrl.kernels._C_avx2", "fusedrl.kernels._C_default"]
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert "reinstall" not in native._load()[1]


BUILD = """
import sys
from distutils.core import run_setup
options = ["--build-lib", sys.argv[2], "--build-temp", sys.argv[2] + "/temp"]
distribution = run_setup("setup.py", ["build_ext", *options], stop_after="commandline")
command = distribution.get_command_obj("build_ext")
command.ensure_finalized()
wanted = "_C_" + sys.argv[1]
command.extensions = [built for built in command.extensions if built.name.endswith(wanted)]
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
    _tree(tmp_path)  # with this build alone
    built = _run(
        "from fusedrl.kernels.runtime import native; print(native.capability)",
        tmp_path,
        ATEN_CPU_CAPABILITY=capability,
    )
    assert built.stdout.split()[-1:] == [capability], built.stderr
    tests = [
        str(ROOT / "tests/kernels" / name) for name in ("test_contract.py", "test_decode_step.py")
    ]
    options = [
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(ROOT),
        "-c",
        str(ROOT / "pyproject.toml"),
        "-m",
        "not full",
        "-k",
        "not triton",
    ]
    told = _alone(["-m", "pytest", *options, *tests], tmp_path, ATEN_CPU_CAPABILITY=capability)
    assert told.returncode == 0, told.stdout[-5000:]


def _alone(arguments: list[str], *path: Path, **environment: str) -> subprocess.CompletedProcess:
    """Python with these folders and the installed packages, without the editable install of this
    checkout."""
    places = os.pathsep.join([*map(str, path), sysconfig.get_path("purelib")])
    environment = os.environ | {"PYTHONPATH": places} | environment
    return subprocess.run(
        [sys.executable, "-S", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        cwd=path[0],
    )


def _run(
    code: str, *path: Path, warn: str = "default", **environment: str
) -> subprocess.CompletedProcess:
    return _alone(["-W", warn, "-c", code], *path, **environment)


# ---- a source distribution -----------------------------------------------------------------------
@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """The tracked files, without links."""
    checkout = tmp_path_factory.mktemp("clone") / "checkout"
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split("\0")
    if tracked == [""]:
        pytest.skip("no git checkout to make a distribution of")
    for name in filter(None, tracked):
        if (ROOT / name).is_file():
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, checkout / name)
    return checkout


@pytest.fixture(scope="module")
def sdist(checkout) -> Path:
    """An unpacked source distribution."""
    here = checkout.parent
    subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist", "-d", str(here)],
        cwd=checkout,
        check=True,
        capture_output=True,
    )
    (archive,) = here.glob("*.tar.gz")
    shutil.unpack_archive(archive, here, filter="data")
    return next(path for path in here.iterdir() if path.is_dir() and path != checkout)


def test_a_source_distribution_has_all_that_is_compiled_and_tested(sdist):
    wanted = {
        path.relative_to(ROOT)
        for folder in ("csrc", "engine", "kernels", "tests", "examples", "bench")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh")
    }
    assert len(wanted) > 300
    assert not (missing := sorted(str(path) for path in wanted if not (sdist / path).is_file())), (
        missing
    )
    assert (
        sources.digest(sdist / "csrc")
        == sources.digest(ROOT / "csrc")
        == importlib.import_module(f"fusedrl.kernels._C_{HERE}").sources
    )


def test_what_a_wheel_carries_of_others_is_in_its_metadata(sdist):
    """Every licence that lies among the sources, and the page that names them."""
    told = (sdist / "PKG-INFO").read_text(encoding="utf-8")
    listed = set(re.findall(r"^License-File: (.*)$", told, re.MULTILINE))
    lying = {
        path.relative_to(ROOT).as_posix()
        for folder in ("engine", "kernels", "csrc")
        for path in (ROOT / folder).rglob("LICEN*")
    }
    assert listed == {"LICENSE", "THIRD_PARTY.md", *lying}
    assert "License-Expression: Apache-2.0 AND BSD-3-Clause AND MIT" in told
    page = (ROOT / "THIRD_PARTY.md").read_text(encoding="utf-8")
    assert lying
    assert all(name in page for name in lying)
    assert all((sdist / name).is_file() for name in listed)


def test_an_install_has_what_the_page_of_a_run_is_made_of(checkout, tmp_path):
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)],
        cwd=checkout,
        check=True,
        capture_output=True,
    )
    folder = Path("engine/watch/page")
    wanted = {
        path.relative_to(ROOT / folder)
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {Path("page.html"), Path("page.css"), Path("page.js"), Path("uplot/LICENSE")} <= wanted
    there = tmp_path / "fusedrl" / folder
    assert wanted <= {path.relative_to(there) for path in there.rglob("*")}


EDITABLE = "import sys; from setuptools import build_meta; build_meta.build_editable(sys.argv[1])"
TYPED = """
from fusedrl.engine.actor import HybridActor
from fusedrl.kernels.gae import gae
from fusedrl.kernels.not_there import gae as other
rewards: int = gae
actor: int = HybridActor.from_pretrained
"""


@pytest.fixture(scope="module")
def path_in_place(checkout) -> Path:
    """What an install in place puts on sys.path. With no compiler: what is compiled does not matter
    here."""
    wheels = checkout.parent / "wheels"
    wheels.mkdir()
    subprocess.run(
        [sys.executable, "-c", EDITABLE, str(wheels)],
        cwd=checkout,
        env=os.environ | {"CXX": "false", "CC": "false"},
        check=True,
        capture_output=True,
    )
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (pth,) = [name for name in names if name.endswith(".pth")]
        assert not [name for name in names if name.endswith(".py")], (
            "an import hook, which type checkers do not run"
        )
        return Path(archive.read(pth).decode().strip())


def test_an_install_in_place_is_one_folder_on_the_path(checkout, path_in_place):
    assert path_in_place == checkout / "src"
    for room in ("engine", "kernels"):
        assert (path_in_place / "fusedrl" / room).resolve() == checkout / room
        assert (path_in_place / "fusedrl" / room / "py.typed").is_file()


def _setup(folder: Path) -> subprocess.CompletedProcess:
    shutil.copy(ROOT / "setup.py", folder)
    return subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )


def test_a_checkout_without_links_is_told_what_to_do(tmp_path):
    (tmp_path / "src/fusedrl").mkdir(parents=True)
    (tmp_path / "src/fusedrl/engine").write_text("../../engine")  # as git writes a link there
    told = _setup(tmp_path)
    assert told.returncode == 1
    assert "expected src/fusedrl/engine to be a symbolic link to engine/, got:" in told.stderr
    assert "git checkout -- src" in told.stderr


def test_an_old_setuptools_is_told_apart(tmp_path):
    (tmp_path / "setuptools/command").mkdir(parents=True)
    (tmp_path / "setuptools/__init__.py").write_text(
        "__version__ = '65.5.0'\nsetup = find_namespace_packages = None\n"
    )
    (tmp_path / "setuptools/command/build_py.py").write_text("build_py = object\n")
    told = _setup(tmp_path)
    assert told.returncode == 1
    assert "expected setuptools >= 77, got 65.5.0; first: pip install --upgrade" in told.stderr


@pytest.mark.full
def test_type_checkers_see_an_install_in_place(checkout, path_in_place, tmp_path):
    """mypy, and pyright where it is installed, on a file outside the checkout."""
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True
    )
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (site / "fusedrl.pth").write_text(f"{path_in_place}\n{sysconfig.get_path('purelib')}\n")
    (tmp_path / "use.py").write_text(TYPED)
    python = tmp_path / "venv" / "bin" / "python"
    mypy = [
        sys.executable,
        "-m",
        "mypy",
        "--follow-imports",
        "silent",
        "--cache-dir",
        str(tmp_path / "cache"),
    ]
    checkers = [[*mypy, "--python-executable", str(python), "use.py"]]
    if pyright := shutil.which("pyright") or shutil.which("basedpyright"):
        checkers.append([pyright, "--pythonpath", str(python), "use.py"])
    for command in checkers:
        told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout
        errors = sorted({int(line) for line in re.findall(r"use\.py:(\d+):.*error", told)})
        assert errors == [4, 5, 6], told  # it finds the others, and knows their types


INSTALLED = """
import json, torch
from fusedrl.kernels.runtime import native
from fusedrl.kernels.gae import gae
from fusedrl.kernels.runtime.sources import expected
advantages, _ = gae(torch.ones(1, 4), torch.zeros(1, 4))
right = bool(torch.isfinite(advantages).all())
print(json.dumps([native.__file__, native.capability, native.reason, right]))
"""


@pytest.mark.full
def test_a_wheel_from_the_source_distribution_has_the_native_kernels(sdist, tmp_path):
    """Compiles every capability, some minutes."""
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(sdist)],
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run(
        [
            *pip,
            "install",
            "--no-deps",
            "--no-index",
            "--target",
            str(tmp_path / "site"),
            str(wheel),
        ],
        check=True,
    )
    told = _run(INSTALLED, tmp_path / "site", warn="error")
    assert told.returncode == 0, told.stderr
    file, capability, reason, finite = json.loads(told.stdout.splitlines()[-1])
    assert Path(file).is_relative_to(tmp_path / "site")
    assert (capability, reason, finite) == (HERE, "", True)
    assert all(
        (tmp_path / "site/fusedrl" / name).is_file()
        for name in (
            "__main__.py",
            "engine/py.typed",
            "kernels/py.typed",
            "kernels/cuda_src/gae.cu",
            "kernels/shared_src/objectives.h",
        )
    )


# ---- what make installs --------------------------------------------------------------------------
def _pins(name: str) -> dict[str, str]:
    """Return the versions that a list of packages holds, by their normal names."""
    text = (ROOT / name).read_text(encoding="utf-8")
    found = re.findall(r"^([\w.-]+)==([\w.+]+)", text, re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", package).lower(): version for package, version in found}


def _wanted(*extras: str) -> set[str]:
    """Return the packages that fusedrl asks for here, and those that they ask for."""
    left, seen = [("fusedrl", extra) for extra in ("", *extras)], set()
    while left:
        name, extra = one = left.pop()
        if one in seen:
            continue
        seen.add(one)
        for text in metadata.requires(name) or ():
            wanted = Requirement(text)
            if wanted.marker is None or wanted.marker.evaluate({"extra": extra}):
                found = re.sub(r"[-_.]+", "-", wanted.name).lower()
                left += [(found, inner) for inner in ("", *wanted.extras)]
    return {name for name, _ in seen} - {"fusedrl"}


@pytest.mark.skipif(torch.version.cuda is not None, reason="the lists are for torch without CUDA")
@pytest.mark.parametrize(
    "name, extras", [("hashes-demo.txt", ()), ("hashes-tests.txt", ("test", "docs"))]
)
def test_lists_of_hashes_have_all_that_is_installed_at_the_same_versions(name, extras):
    """`make hashes` writes them; whatever they lack would be installed without a hash."""
    listed, fixed = _pins(name), _pins("constraints.txt")
    wanted = _wanted(*extras) | {"setuptools", "wheel", "ninja"}
    assert wanted > {"torch", "triton", "markdown-it-py"}  # rich asks for the last
    assert not wanted - set(listed), f"make hashes: {wanted - set(listed)}"
    free = {"triton", "nvidia-cuda-nvrtc"}  # torch with CUDA asks for versions of its own
    other = {one for one in listed if listed[one].partition("+")[0] != fixed.get(one)}
    assert other <= free, f"make hashes: {other}"
    blocks = re.split(r"^(?=\S)", (ROOT / name).read_text(encoding="utf-8"), flags=re.MULTILINE)
    bare = [one for one in blocks if one and one[0] != "#" and "--hash=sha256:" not in one]
    assert not bare


def test_what_torch_with_cuda_fixes_itself_is_not_fixed_to_something_else():
    """It asks for one version of triton and of NVIDIA's packages. Where another one is fixed here,
    pip finds no solution for whoever has that torch."""
    fixed = _pins("constraints.txt")
    assert fixed["torch"]
    assert not [one for one in fixed if one == "triton" or one.startswith("nvidia-")]


# ---- installs that are not what they seem --------------------------------------------------------
def _tree(folder: Path) -> Path:
    """fusedrl as PYTHONPATH finds it: the modules of this checkout, linked, and no compiled
    kernels."""
    (folder / "fusedrl/kernels").mkdir(parents=True, exist_ok=True)
    (folder / "fusedrl/engine").symlink_to(ROOT / "engine")
    (folder / "fusedrl/kernels/cuda_src").symlink_to(ROOT / "csrc/cuda")
    for module in (
        path
        for path in (ROOT / "kernels").iterdir()
        if path.suffix == ".py" or (path / "__init__.py").is_file()
    ):
        (folder / "fusedrl/kernels" / module.name).symlink_to(module)
    return folder


def _kernels_of(tree: Path) -> None:
    for built in (ROOT / "kernels").glob("_C_*"):
        shutil.copy(built, tree / "fusedrl/kernels" / built.name)


FALLS_BACK = """
import torch
from fusedrl.kernels.gae import gae
from fusedrl.kernels.runtime import native
for _ in range(3):
    gae(torch.ones(1, 4), torch.zeros(1, 4))
print(native.capability, native.reason)
"""


def test_the_first_call_without_the_native_kernels_says_so_once(tmp_path):
    told = _run(FALLS_BACK, _tree(tmp_path))
    assert told.returncode == 0, told.stderr
    assert told.stdout.startswith("None _C_")
    assert told.stderr.count("RuntimeWarning: fusedrl: the native extension is not built") == 1
    assert "5x to 100x slower" in told.stderr
    assert "apt-get install g++" in told.stderr
    # asked for
    assert "RuntimeWarning" not in _run(FALLS_BACK, tmp_path, FUSEDRL_IMPL="torch").stderr


@pytest.mark.skipif(not native.capability, reason="the native extension is not built")
def test_kernels_of_other_sources_are_not_used(tmp_path):
    _kernels_of(_tree(tmp_path))
    assert _run(FALLS_BACK, tmp_path, warn="error").stdout == f"{HERE} \n"
    (tmp_path / "fusedrl/kernels" / sources.RECORD).write_text("0" * 64 + "\n")
    told = _run(FALLS_BACK, tmp_path)
    assert told.returncode == 0, told.stderr
    assert "was built from other C++ sources" in told.stdout
    assert str(tmp_path) in told.stdout
    assert "RuntimeWarning: fusedrl: the native extension is not built" in told.stderr


def test_two_installs_on_one_path_are_not_mixed(tmp_path):
    first, second = _tree(tmp_path / "first"), _tree(tmp_path / "second")
    places = (
        "import fusedrl.engine, fusedrl.kernels.gae as gae; print(fusedrl.engine.__file__, "
        "gae.__file__)"
    )
    assert all(
        Path(file).is_relative_to(first) for file in _run(places, first, second).stdout.split()
    )
    (first / "fusedrl/engine").unlink()  # an engine of one and kernels of the other
    told = _run("import fusedrl.engine", first, second)
    assert told.returncode == 1
    assert "ImportError: fusedrl: expected the kernels of this install" in told.stderr
    assert str(second / "fusedrl/kernels") in told.stderr
    assert "several installs of fusedrl" in told.stderr


def test_a_link_to_the_install_is_no_second_one(tmp_path):
    """As bench/first_light.py makes it, where nothing needs to be installed, beside one that is."""
    first = _tree(tmp_path / "first")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "fusedrl").symlink_to(first / "fusedrl")
    done = _run("import fusedrl.engine", tmp_path / "linked", first)
    assert done.returncode == 0, done.stderr


def test_the_digest_sees_names_and_contents(tmp_path):
    def digest(**files: str) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        for name, text in files.items():
            below = folder / ("shared" if name.endswith("_h") else "cpu/ops")
            below.mkdir(parents=True, exist_ok=True)
            (below / name.replace("_", ".")).write_text(text)
        return sources.digest(folder)

    assert digest(a_cpp="x", b_h="y") == digest(b_h="y", a_cpp="x", c_txt="z")
    assert (
        len(
            {
                digest(a_cpp="x", b_h="y"),
                digest(a_cpp="y", b_h="x"),
                digest(a_cpp="x"),
                digest(a_cpp="xy", b_h=""),
                digest(c_cpp="x", b_h="y"),
            }
        )
        == 5
    )
