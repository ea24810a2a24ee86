"""Builds the native CPU kernels once per vector capability; everything declarative is in
pyproject.toml.

Three extensions from the same sources, because one Extension cannot carry per-file flags and
objects built with wider vectors must not share a library with those that are not:
`fusedrl.kernels._C_default`, `_C_avx2`, `_C_avx512`. `kernels/runtime/native.py` imports the one
that fits the processor. Without a C++ compiler the install succeeds and says what is slower.

A wheel travels and has all three. A build in place (`pip install -e .`, `setup.py build_ext
--inplace`) stays where it is and has the one that this processor runs. Torch's headers take longer
than most files' own code, so a build parses those once (csrc/cpu/include/precompiled.h).

`build_ext --sanitize address,undefined` builds what the processor runs with those sanitizers of
the compiler, for `make sanitize` alone: python has to be started with their libraries loaded first.
"""

import platform
import runpy
import shutil
import sys
from pathlib import Path
from typing import ClassVar

import setuptools
from setuptools import find_namespace_packages, setup
from setuptools.command.build_py import build_py

if int(setuptools.__version__.split(".")[0]) < 77:  # `--no-build-isolation` takes what is there
    sys.exit(
        f"fusedrl: expected setuptools >= 77, got {setuptools.__version__}; first: "
        "pip install --upgrade setuptools wheel ninja"
    )

CAPABILITIES = {"default": ("DEFAULT", [])}
if platform.machine() in ("x86_64", "AMD64"):
    CAPABILITIES["avx2"] = ("AVX2", ["-mavx2", "-mfma", "-mf16c"])
    CAPABILITIES["avx512"] = (
        "AVX512",
        ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
    )

# `src` goes on sys.path as it is when this is installed in place, so that type checkers find what
# Python finds. `fusedrl` there is a namespace of links to engine/ and kernels/; an unpacked source
# distribution has none until they are made here. Where git may not make links, it writes files.
for room in ("engine", "kernels"):
    link = Path("src/fusedrl") / room
    try:
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.symlink_to(Path("../..") / room, target_is_directory=True)
        list(link.iterdir())
    except OSError as error:
        sys.exit(
            f"fusedrl: expected {link} to be a symbolic link to {room}/, got: {error}. Put the "
            "sources where links are possible (in a git checkout there: git config core.symlinks "
            "true && git checkout -- src), or install a wheel that was built elsewhere"
        )
PACKAGES = find_namespace_packages("src", exclude=["*__pycache__*"])
PACKAGE_DATA = {
    "fusedrl.engine": ["py.typed"],
    "fusedrl.engine.cli.recipes": ["*.yaml"],  # a link to examples/recipes
    "fusedrl.engine.watch.page": ["page.*", "uplot/*"],
    "fusedrl.kernels": ["py.typed"],
}

SOURCES = runpy.run_path("kernels/runtime/sources.py")


class BuildPython(build_py):
    """Gives a wheel what a checkout has in csrc/: the digest of the C++ sources, by which kernels
    of another install on the same path are told apart, and the sources that are compiled on first
    use (kernels/runtime/nvrtc.py): csrc/cuda, and what it includes."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            folder = Path(self.build_lib) / "fusedrl" / "kernels"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / SOURCES["RECORD"]).write_text(SOURCES["digest"](Path("csrc")) + "\n")
            for name in ("cuda", "shared"):
                shutil.copytree(Path("csrc") / name, folder / f"{name}_src", dirs_exist_ok=True)


def capability_here() -> str:
    """As kernels/runtime/native.py chooses."""
    import torch

    found = {"AVX512": "avx512", "AVX2": "avx2"}.get(
        torch.backends.cpu.get_cpu_capability(), "default"
    )
    return found if found in CAPABILITIES else "default"


def precompile(compiler, build_temp: Path, extension, digest: str) -> Path:
    """Parse torch's headers once for an extension. The compiler takes the header as it is where it
    cannot use what was precompiled."""
    directory = build_temp.resolve() / "header"
    directory.mkdir(parents=True, exist_ok=True)
    told = directory / "fusedrl_sources.h"
    # else module.cpp would be compiled at every build
    if not told.is_file() or digest not in told.read_text():
        told.write_text(f'#define FUSEDRL_SOURCES "{digest}"\n')
    extension.include_dirs.append(str(directory))
    header, source, precompiled = (
        directory / f"precompiled{suffix}" for suffix in (".h", ".cpp", ".h.gch")
    )
    shutil.copy("csrc/cpu/include/precompiled.h", header)
    shutil.copy(header, source)
    try:
        (found,) = compiler.compile(
            [str(source)],
            str(directory),
            include_dirs=extension.include_dirs,
            extra_preargs=["-x", "c++-header"],
            extra_postargs=extension.extra_compile_args,
        )
        Path(found).replace(precompiled)
        extension.extra_compile_args["cxx"] += ["-include", str(header)]
    except Exception as error:  # whatever it is, the files themselves will tell
        print(f"fusedrl: torch's headers were not precompiled ({error})", file=sys.stderr)
    return precompiled


def sanitized(extension, names: str) -> None:
    """Have an extension report, with a trace, what the sanitizers find. Conversions of floats that
    no integer holds are looked for, too. Not looked for are types of torch's classes, which it
    hides, and alignment: of vectors that are declared to lie anywhere (csrc/cpu/include/panels.h)
    gcc checks references as if they were not."""
    wanted = [f"-fsanitize={names}"]
    if "undefined" in names:
        wanted += ["-fsanitize=float-cast-overflow", "-fno-sanitize=vptr,alignment"]
    slow = {"-O3": "-O1", "-g0": "-g1"}
    flags = [slow.get(flag, flag) for flag in extension.extra_compile_args["cxx"]]
    extension.extra_compile_args["cxx"] = [*flags, "-fno-omit-frame-pointer", *wanted]
    extension.extra_link_args += wanted


def build_command(base: type, digest: str) -> type:
    """The command that builds the extensions of every capability, or this machine's alone."""

    class Build(base):
        user_options: ClassVar[list] = [
            *base.user_options,
            ("sanitize=", None, "sanitizers of the compiler, such as address,undefined"),
        ]

        def initialize_options(self) -> None:
            super().initialize_options()
            self.sanitize = None

        def finalize_options(self) -> None:
            super().finalize_options()
            if self.inplace and self.sanitize:
                sys.exit(
                    "fusedrl: expected --sanitize without --inplace, got both; use --build-lib"
                )
            if self.inplace or self.sanitize:
                self.extensions = [
                    extension
                    for extension in self.extensions
                    if extension.name.endswith(f"_C_{capability_here()}")
                ]

        def build_extensions(self) -> None:
            wanted, built, build_temp = self.extensions, [], Path(self.build_temp)
            for extension in wanted:
                if self.sanitize:
                    sanitized(extension, self.sanitize)
                self.extensions = [extension]
                # the same sources, other flags: objects and headers of their own
                self.build_temp = str(build_temp / extension.name)
                try:
                    super().build_extensions()
                    built.append(extension)
                # no compiler, no Python.h: the package still works, more slowly
                except Exception as error:
                    print(
                        f"fusedrl: {extension.name} was not built ({error}). Ops run on their "
                        "torch reference, which is 5x to 100x "
                        "slower on CPU. On Debian: apt-get install g++ python3-dev; then "
                        "reinstall.",
                        file=sys.stderr,
                    )
            self.extensions = built

        def build_extension(self, extension) -> None:
            """With torch's headers parsed once."""
            precompiled = precompile(self.compiler, Path(self.build_temp), extension, digest)
            try:
                super().build_extension(extension)
            finally:
                precompiled.unlink(missing_ok=True)  # half a GB

        def copy_extensions_to_source(self) -> None:
            """Without those of other capabilities that an older build has left there."""
            for path in Path("kernels").glob("_C_*") if self.extensions else ():
                path.unlink()
            super().copy_extensions_to_source()

    return Build


def native_extensions() -> dict:
    commands = {"build_py": BuildPython}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        print(
            "fusedrl: torch is not installed in the build environment, so the C++ CPU kernels are "
            "not built and every op "
            "runs on its torch reference (5x to 100x slower on CPU). Install torch, then: pip "
            "install --no-build-isolation -e .",
            file=sys.stderr,
        )
        return {"cmdclass": commands}

    csrc, digest = Path("csrc"), SOURCES["digest"](Path("csrc"))

    sources = sorted(str(path) for path in csrc.glob("cpu/ops/*.cpp"))
    headers = sorted(
        str(path) for pattern in ("cpu/include/*.h", "shared/*.h") for path in csrc.glob(pattern)
    )
    extensions = [
        CppExtension(
            f"fusedrl.kernels._C_{name}",
            sources,
            depends=headers,
            include_dirs=[str((csrc / folder).resolve()) for folder in ("cpu/include", "shared")],
            extra_compile_args={
                "cxx": [
                    "-O3",
                    "-g0",
                    "-std=c++20",
                    "-fopenmp",
                    "-fno-math-errno",
                    "-Wno-psabi",
                    f"-DCPU_CAPABILITY={macro}",
                    f"-DCPU_CAPABILITY_{macro}",
                    f"-DFUSEDRL_MODULE=_C_{name}",
                    *flags,
                ]
            },
            extra_link_args=["-fopenmp"],
            py_limited_api=True,
        )
        for name, (macro, flags) in CAPABILITIES.items()
    ]
    return {
        "ext_modules": extensions,
        "cmdclass": commands | {"build_ext": build_command(BuildExtension, digest)},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


setup(packages=PACKAGES, package_dir={"": "src"}, package_data=PACKAGE_DATA, **native_extensions())
