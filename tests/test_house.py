"""The rules of the house, read off the sources themselves.

One file: the rules of the house, each of which is looked for among the others.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from itertools import takewhile
from pathlib import Path

import pytest
from tests.support.import_graph import circles, import_graph, imported, rising

ROOT = Path(__file__).resolve().parents[1]
PRODUCT = sorted(p for room in ("kernels", "engine") for p in (ROOT / room).rglob("*.py"))


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


# ---- rooms and floors ----------------------------------------------------------------------------
def test_imports_go_down():
    graph = import_graph(ROOT)
    assert len(graph) == len(PRODUCT)
    assert not rising(graph)
    assert not circles(graph)


PLANTED = {  # (file, what is added at its end, what is said)
    "base reads a run": (
        "engine/base/errors.py",
        "from fusedrl.engine.runs.checkpoint import Checkpoint",
        "engine/base/errors imports engine/runs/checkpoint",
    ),
    "a module reads its reader": (
        "engine/model/families.py",
        "from fusedrl.engine.model.decoder import Decoder",
        "engine/model/families",
    ),
    "for a type only": (
        "engine/base/packing.py",
        "if TYPE_CHECKING:\n    from fusedrl.engine.generation.generator import Generator",
        "engine/base/packing imports engine/generation/generator",
    ),
    "inside a function": (
        "engine/data/readers.py",
        "def f():\n    import fusedrl.engine.stages.sft",
        "engine/data/readers imports engine/stages/sft",
    ),
    "a module of a package": (
        "engine/optim/adamw.py",
        "from fusedrl.engine.policy import control",
        "engine/optim/adamw imports engine/policy/control",
    ),
    "relative": (
        "engine/optim/schedule.py",
        "from ..watch import plan",
        "engine/optim/schedule imports engine/watch/plan",
    ),
    "upwards": (
        "engine/rollout/replay.py",
        "from fusedrl.engine.policy.control import Control",
        "engine/rollout/replay imports engine/policy/control",
    ),
    "kernels read the engine": (
        "kernels/gae/__init__.py",
        "from fusedrl.engine.base import packing",
        "kernels/gae/__init__ imports engine/base/packing",
    ),
    "the facade": (
        "engine/actor.py",
        "from fusedrl.engine import PackedBatch as P",
        "engine/actor imports engine/__init__",
    ),
    "beside": (
        "engine/actor.py",
        "from fusedrl.engine.rollout import rollout",
        "engine/actor imports engine/rollout/rollout",
    ),
    "a new room": (
        "engine/new/thing.py",
        "from fusedrl.engine.cli import main",
        "engine/new/thing is in no room",
    ),
    "a new file": ("engine/thing.py", "", "engine/thing is in no room"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_imports_are_found(name, tmp_path):
    for room in ("engine", "kernels"):
        shutil.copytree(
            ROOT / room,
            tmp_path / room,
            ignore=lambda _, names: [n for n in names if "." in n and not n.endswith(".py")],
        )
    path, line, said = PLANTED[name]
    (tmp_path / path).parent.mkdir(exist_ok=True)
    with open(tmp_path / path, "a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")
    graph = import_graph(tmp_path)
    assert said in str(rising(graph)) + str(circles(graph))


FORBIDDEN_IMPORTS = {
    "pickle",
    "marshal",
    "shelve",
    "socket",
    "socketserver",
    "http.server",
    "cloudpickle",
    "dill",
}
FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "torch.load",
    "torch.save",
    "yaml.load",
    "pickle.load",
    "pickle.loads",
}


@pytest.mark.parametrize("path", PRODUCT, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_unsafe(path):
    assert (
        not imported(_tree(path), path.relative_to(ROOT).with_suffix("").as_posix())
        & FORBIDDEN_IMPORTS
    )
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in FORBIDDEN_CALLS, f"line {node.lineno}"
            assert all(
                ast.unparse(k.value) == "False"
                for k in node.keywords
                if k.arg == "trust_remote_code"
            ), f"line {node.lineno}"
        assert not isinstance(node, ast.Assert), (
            f"line {node.lineno}: python -O removes asserts; raise instead"
        )


LOADERS = re.compile(
    r"from_pretrained|from_config|from_hub|pipeline|load_dataset|get_class_from_dynamic_module|hub\.load"
)
OURS = {"HybridActor", "cls", "best_of_n"}  # what has a loader of that name and runs nothing
LOADING = PRODUCT + sorted(p for room in ("bench", "examples") for p in (ROOT / room).rglob("*.py"))


def _loads_code(source: str) -> list[str]:
    """Calls by which transformers, peft or a hub load something, whatever name they were imported
    under, that do not forbid what comes with it to run."""
    wrong = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").endswith(
            "dynamic_module_utils"
        ):
            wrong.append(f"line {node.lineno}: imports what runs a model's code")
        # `from transformers import pipeline as load` loads as well
        if isinstance(node, ast.ImportFrom):
            wrong += [
                f"line {node.lineno}: {alias.name} under another name"
                for alias in node.names
                if LOADERS.fullmatch(alias.name) and alias.asname
            ]
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == "getattr"
            and len(node.args) > 1
            and LOADERS.search(ast.unparse(node.args[1]))
        ):
            wrong.append(f"line {node.lineno}: {ast.unparse(node)}")
        if (
            isinstance(node, ast.Attribute)
            and node.attr in ("from_pretrained", "from_config")
            and ast.unparse(node.value) not in OURS
        ):
            call = next(
                (
                    c
                    for c in ast.walk(ast.parse(source))
                    if isinstance(c, ast.Call)
                    and ast.dump(c.func, include_attributes=True)
                    == ast.dump(node, include_attributes=True)
                ),
                None,
            )  # not only called: handed on, too
            if call is None or not any(
                k.arg == "trust_remote_code" and ast.unparse(k.value) == "False"
                for k in call.keywords
            ):
                wrong.append(
                    f"line {node.lineno}: {ast.unparse(node)} without trust_remote_code=False"
                )
        elif (
            isinstance(node, ast.Call)
            and LOADERS.fullmatch(
                name := ast.unparse(node.func).removeprefix("transformers.").removeprefix("torch.")
            )
            and not any(
                k.arg == "trust_remote_code" and ast.unparse(k.value) == "False"
                for k in node.keywords
            )
        ):
            wrong.append(f"line {node.lineno}: {name} without trust_remote_code=False")
    return wrong


@pytest.mark.parametrize("path", LOADING, ids=lambda p: str(p.relative_to(ROOT)))
def test_whatever_loads_runs_no_code_that_comes_with_it(path):
    assert not _loads_code(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "source",
    [
        "AutoTokenizer.from_pretrained(path)",
        "transformers.AutoModel.from_pretrained(path, dtype=d)",
        "Auto.from_pretrained(path, **options)",
        "Auto.from_pretrained(path, trust_remote_code=True)",
        "Auto.from_pretrained(path, trust_remote_code=trust)",
        "load = AutoTokenizer.from_pretrained",
        "AutoModel.from_config(config)",
        "pipeline('text-generation', path)",
        "transformers.pipeline(path)",
        "peft.PeftModel.from_pretrained(model, path)",
        "kind().from_pretrained(path)",
        "getattr(AutoModel, 'from_pretrained')(path)",
        "torch.hub.load('owner/name', 'x')",
        "load_dataset('owner/name')",
        "from transformers.dynamic_module_utils import get_class_from_dynamic_module",
        "from transformers import pipeline as go",
    ],
)
def test_planted_loaders_are_found(source):
    assert _loads_code(source)
    assert not _loads_code(
        "AutoTokenizer.from_pretrained(path, trust_remote_code=False); "
        "HybridActor.from_pretrained(path); AutoConfig.for_model(**raw)"
    )


def _unasked(source: str) -> list[str]:
    """Calls by which transformers loads a model's weights and does not say which it drew at random
    since it found none."""
    return [
        f"line {node.lineno}: {ast.unparse(node.func)} without output_loading_info=True"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and re.fullmatch(
            r"(.*\.)?(AutoModel|\w+For[A-Z])\w*\.from_pretrained", ast.unparse(node.func)
        )
        and not any(
            k.arg == "output_loading_info" and ast.unparse(k.value) == "True" for k in node.keywords
        )
    ]


@pytest.mark.parametrize(
    "path",
    [path for path in LOADING if path.relative_to(ROOT).parts[0] in ("engine", "examples")],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_whatever_loads_weights_asks_which_are_missing(path):
    assert not _unasked(path.read_text(encoding="utf-8"))


def test_planted_loaders_that_do_not_ask_are_found():
    assert _unasked("AutoModelForCausalLM.from_pretrained(path)")
    assert _unasked("transformers.AutoModel.from_pretrained(path, output_loading_info=False)")
    assert _unasked("LlamaForCausalLM.from_pretrained(path)")
    assert not _unasked("AutoTokenizer.from_pretrained(path); HybridActor.from_pretrained(path)")
    assert not _unasked("AutoModel.from_pretrained(path, output_loading_info=True)")


def _environment(source: str) -> set[str]:
    """Where the environment is read: the variable's name where it is written out, else the
    expression."""
    found, tree = set(), ast.parse(source)
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.ImportFrom)
            and node.module == "os"
            and {alias.name for alias in node.names} & {"environ", "environb", "getenv", "getenvb"}
        ):
            found.add(ast.unparse(node))
        if isinstance(node, ast.Attribute) and node.attr in (
            "environ",
            "environb",
            "getenv",
            "getenvb",
        ):
            while isinstance(parents.get(node), ast.Attribute | ast.Call | ast.Subscript) and not (
                isinstance(node, ast.Call)
            ):
                node = parents[node]
            names = [
                part.value
                for part in ast.walk(node)
                if isinstance(part, ast.Constant) and isinstance(part.value, str)
            ]
            found.add(names[0] if names else ast.unparse(parents.get(node, node)))
    return found


# ---- temporary files -----------------------------------------------------------------------------
SHARED = re.compile(
    r"(^|[\s'\"=])/(tmp|var/tmp|dev/shm)/+[\w.{-]"
)  # a name in what all users share


def _foretold(source: str) -> set[str]:
    """Temporary files whose names another user of the machine can have taken before."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= {node.value} if SHARED.search(node.value) else set()
        if isinstance(node, ast.JoinedStr):
            text = ast.unparse(node)
            found |= {text} if SHARED.search(text) else set()
        if isinstance(node, ast.Attribute) and node.attr in ("gettempdir", "gettempdirb"):
            found.add(ast.unparse(node))
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "tempfile.mktemp":
            found.add(ast.unparse(node))
        if isinstance(node, ast.ImportFrom) and node.module == "tempfile":
            found |= {n.name for n in node.names} & {"mktemp", "gettempdir", "gettempdirb"}
    return found


def test_temporary_files_have_no_name_that_can_be_foretold():
    files = [*PRODUCT, ROOT / "setup.py"]
    for room in ("bench", "tests", "examples"):
        files += (ROOT / room).rglob("*.py")
    assert len(files) > 400
    found = {
        path.relative_to(ROOT).as_posix(): names
        for path in files
        if (names := _foretold(path.read_text(encoding="utf-8")))
    }
    assert not found, "use tempfile.TemporaryDirectory, TemporaryFile or mkstemp"


@pytest.mark.parametrize(
    "source",
    [
        "open('/T/log', 'w')",
        "Path('/var/T/x')",
        "open(f'/T/{os.getpid()}')",
        "run('cp a /T/b')",
        "tempfile.mktemp()",
        "from tempfile import gettempdir",
        "Path(tempfile.gettempdir(), 'x')",
    ],
)
def test_planted_names_of_temporary_files_are_found(source):
    assert _foretold(source.replace("T", "tmp"))
    assert not _foretold("with tempfile.TemporaryDirectory(dir='/dev/shm') as made: pass")


def test_one_environment_variable():
    reads = {
        (p.relative_to(ROOT).as_posix(), name)
        for p in PRODUCT
        for name in _environment(p.read_text(encoding="utf-8"))
    }
    ours = {
        ("kernels/runtime/dispatch.py", "FUSEDRL_IMPL"),
        ("kernels/runtime/dispatch.py", "TRITON_INTERPRET"),
    }
    # to a process of ours
    handed_on = {(path, read) for path, read in reads if read.startswith("os.environ | ")}
    assert reads == ours | handed_on, reads


@pytest.mark.parametrize(
    "source",
    [
        "os.getenv('X')",
        "os.environ['X']",
        "os.environ.get('X', '1')",
        "from os import getenv",
        "from os import environ as e",
        "import os as o; o.environ['X']",
        "'X' in os.environ",
        "dict(os.environ)",
        "os.environ.setdefault('X', '1')",
    ],
)
def test_planted_reads_of_the_environment_are_found(source):
    assert _environment(source)
    assert not any(
        read.startswith("os.environ | ") or read in ("FUSEDRL_IMPL", "TRITON_INTERPRET")
        for read in _environment(source)
    )


def _python(code: str, *path: Path) -> str:
    """What a Python says that finds packages in the working directory, as `python -c` does, then in
    these folders."""
    told = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))},
    )
    assert told.returncode == 0, told.stderr
    return told.stdout


def test_the_folder_kernels_hides_no_package_of_that_name(tmp_path):
    """Hugging Face's `kernels`, which transformers imports, where Python runs in the root of a
    checkout."""
    absent = (
        "import kernels; from transformers.utils.import_utils import is_kernels_available; "
        "print(hasattr(kernels, '__file__'), is_kernels_available())"
    )
    assert _python(absent + "; import transformers.integrations.hub_kernels").split() == [
        "False",
        "False",
    ]
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("from .layer import get_kernel\n")
    (tmp_path / "kernels" / "layer.py").write_text("def get_kernel():\n    return 'theirs'\n")
    there = (
        "import kernels.layer; from kernels import get_kernel; import fusedrl.kernels.gae; "
        "print(get_kernel(), fusedrl.kernels.gae.__name__)"
    )
    assert _python(there, tmp_path, ROOT / "src").split() == ["theirs", "fusedrl.kernels.gae"]


def test_the_kernels_show_what_is_there():
    listed = _python(
        "import sys, fusedrl.kernels as k; print(*dir(k), 'torch' in sys.modules)", ROOT / "src"
    ).split()
    assert listed.pop() == "False"  # nor anything else that takes time
    present = {
        path.stem
        for path in (ROOT / "kernels").iterdir()
        if path.suffix == ".py" or (path / "__init__.py").is_file()
    }
    assert set(listed) == {name for name in present if not name.startswith("_")}
    assert len(listed) > 15
    shown = _python(
        "import fusedrl.kernels as k\nhelp(k)\ntry: k.nothing_of_this_name\nexcept AttributeError "
        "as error: print(error)",
        ROOT / "src",
    )
    assert "from fusedrl.kernels.gae import gae" in shown
    assert "has no attribute 'nothing_of_this_name'; it has" in shown
    assert all(f"\n    {name}" in shown for name in listed)


def test_the_engine_shows_what_is_there():
    from fusedrl import engine

    assert dir(engine) == sorted(engine.__all__)
    assert all(getattr(engine, name) for name in engine.__all__)
    assert engine.__version__ == metadata.version("fusedrl")


@pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("c++") is None,
    reason="no C++ compiler on this machine",
)
def test_native_kernels_are_built():
    from fusedrl.kernels.runtime import native

    assert native.capability is not None, native.reason


def test_every_folder_is_a_package():
    assert [
        room for room in {p.parent for p in PRODUCT} if not (room / "__init__.py").is_file()
    ] == []
    assert all(
        (ROOT / "src" / "fusedrl" / room).resolve() == ROOT / room for room in ("engine", "kernels")
    )


def test_git_ignores_nothing_of_the_product():
    """A pattern for what runs leave behind would hide a room of that name, and new files in it
    would never be committed."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("this is no checkout")
    places = sorted(
        {
            path.parent / "new.py"
            for path in [*PRODUCT, *(ROOT / "tests").rglob("*.py"), *(ROOT / "bench").rglob("*.py")]
        }
    )
    found = subprocess.run(
        ["git", "check-ignore", *map(str, places)], cwd=ROOT, capture_output=True, text=True
    )
    assert found.returncode == 1, found.stdout


def test_the_tree_of_the_page_is_the_tree():
    block = re.search(
        r"```text\n(fusedrl/\n.*?)```",
        (ROOT / "docs" / "structure.md").read_text(encoding="utf-8"),
        re.DOTALL,
    )
    assert block, "docs/structure.md holds no ```text tree that starts with fusedrl/"
    stack: list[str] = []
    named = set()
    for line in block[1].splitlines()[1:]:
        indent = len(line) - len(line.lstrip())
        entries = list(
            takewhile(
                lambda word: re.fullmatch(r"\S+\.(py|toml|txt)|\S+/|Makefile", word), line.split()
            )
        )
        stack = stack[: indent // 2 - 1]
        for entry in entries:
            path = "/".join([*stack, entry.rstrip("/")])
            assert (ROOT / path).exists(), f"docs/structure.md names {path}, which is not there"
            named.add(path)
        if len(entries) == 1 and entries[0].endswith("/"):
            stack.append(entries[0].rstrip("/"))
    missing = {p.relative_to(ROOT).as_posix() for p in PRODUCT if p.stem != "__init__"} - named
    assert not missing, f"the tree of docs/structure.md lacks {sorted(missing)}"


# ---- sizes ---------------------------------------------------------------------------------------
MOST_LINES, LONGEST_FILE = 60, 600


def _functions(tree: ast.Module) -> dict[str, int]:
    """Name -> lines of its body without the docstring; bodies of GPU kernels are left out."""
    found = {}
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or any(
            "triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list
        ):
            continue
        body = node.body[1:] if ast.get_docstring(node) is not None else node.body
        if body:
            found[node.name] = (body[-1].end_lineno or 0) - body[0].lineno + 1
    return found


def _too_long(source: str, where: str) -> list[str]:
    tree = ast.parse(source)
    found = [
        f"{where}::{name} has {lines} lines"
        for name, lines in _functions(tree).items()
        if lines > MOST_LINES
    ]
    lines = source.count("\n")
    if lines > LONGEST_FILE and "One file: " not in (ast.get_docstring(tree) or ""):
        found.append(f"{where} has {lines} lines, and its first docstring no reason")
    return found


def test_functions_fit_a_screen_and_files_have_a_reason():
    """Those of tests, benchmarks and examples, too."""
    paths = [*PRODUCT]
    for folder in ("tests", "bench", "examples"):
        paths += sorted((ROOT / folder).rglob("*.py"))
    found = [
        line
        for path in paths
        for line in _too_long(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix())
    ]
    assert not found


def test_a_planted_length_is_found():
    body = "\n".join("    x = 1" for _ in range(MOST_LINES))
    assert not _too_long(f"def f():\n    'What it is for.'\n{body}\n", "a.py")
    assert _too_long(f"def f():\n{body}\n    return x\n", "a.py") == ["a.py::f has 61 lines"]
    assert not _too_long(f"@triton.jit\ndef f():\n{body}\n    return x\n", "a.py")
    lines = "x = 1\n" * (LONGEST_FILE + 1)
    assert _too_long(lines, "a.py") == ["a.py has 601 lines, and its first docstring no reason"]
    assert not _too_long(f"'One file: it is one.'\n{lines}", "a.py")


# ---- words ---------------------------------------------------------------------------------------
UNSAID = re.compile(
    "(After|As|At|Before|By|For|From|How|In|It|Its|Of|On|That|They|Those|To|Until|What|When|Where|"
    r"Which|Who|With|Within|Without)\b"
)


def _beginnings(tree: ast.Module) -> list[str]:
    """Public functions and classes whose docstring begins as the rest of a sentence does: it should
    say by a verb or a noun what the thing does or is."""
    return [
        f"{node.lineno}: {node.name}: {text.splitlines()[0]}"
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and node.name[0] != "_"
        and (text := ast.get_docstring(node))
        and UNSAID.match(text)
    ]


@pytest.mark.parametrize("path", PRODUCT, ids=lambda p: str(p.relative_to(ROOT)))
def test_docstrings_begin_with_what_a_thing_does_or_is(path):
    assert _beginnings(_tree(path)) == []


def test_a_planted_docstring_is_found():
    source = '''
class Report:
    """What a step did."""
    def to_json(self):
        """Return JSON values."""
    def _rows(self):
        """Of everything."""
def total(x):
    """Of a batch, what counts."""
'''
    assert [line.split(":")[1].strip() for line in _beginnings(ast.parse(source))] == [
        "Report",
        "total",
    ]


# ---- tests on any device -------------------------------------------------------------------------
FACTORIES = {
    f"torch.{name}"
    for name in (
        "arange",
        "empty",
        "eye",
        "full",
        "linspace",
        "ones",
        "rand",
        "randint",
        "randn",
        "randperm",
        "tensor",
        "zeros",
    )
}
# what is tested here is the same on every machine: Python, files and the command line
OF_NO_DEVICE = {
    "base": ("estimates", "memory"),
    "cli": ("asked", "cli"),
    "config": ("bad_input",),
    "data": ("convert_llama2c", "formats", "mixture", "readers", "tokenize"),
    "generation": ("blocks", "sampler", "scheduler"),
    "model": ("model_code",),
    "policy": ("kl_control",),
    "rewards": ("example_rewards", "story_reward"),
    "rollout": ("repetition",),
    "runs": ("metric_names", "metrics"),
    "tools": ("bench_cli", "demo", "demo_task", "doctor"),
    "watch": ("alarm", "evaluate", "judge", "monitor", "plan", "plan_dpo", "run_report"),
    "engine": ("readme",),
}
ON_ANY_DEVICE = [
    path
    for path in sorted((ROOT / "tests" / "kernels").glob("test_*.py"))
    + sorted((ROOT / "tests" / "engine").rglob("test_*.py"))
    if path.stem.removeprefix("test_") not in OF_NO_DEVICE.get(path.parent.name, ())
]


def _cpu_only(node: ast.AST) -> bool:
    """A function that is marked so, or a file."""
    marks = (
        node.decorator_list
        if isinstance(node, ast.FunctionDef)
        else [
            each.value
            for each in getattr(node, "body", [])
            if isinstance(each, ast.Assign) and ast.unparse(each.targets[0]) == "pytestmark"
        ]
    )
    return any("cpu_only" in ast.unparse(mark) for mark in marks)


def _off_the_device(tree: ast.AST, everywhere: bool = True) -> list[str]:
    """Tensors made without a device, and problems of the catalogue; not in what is cpu_only.
    Numbers of a generator are drawn on the CPU, alike for every device, and moved by `.to` or
    copied; what becomes a list at once stays there. `everywhere`: also in functions that take no
    device."""
    found, moved = (
        [],
        {
            id(part)
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and node.attr in ("to", "tolist", "item")
            for part in ast.walk(node.value)
        },
    )
    moved |= {
        id(part)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".copy_")
        for part in ast.walk(node)
    }

    def walk(node: ast.AST, where: str, taken: bool) -> None:
        if isinstance(node, ast.FunctionDef | ast.Module):
            if _cpu_only(node):
                return
            where = getattr(node, "name", where)
            taken = taken or (
                isinstance(node, ast.FunctionDef) and "device" in {a.arg for a in node.args.args}
            )
        if isinstance(node, ast.Call) and (taken or everywhere):
            name, given = ast.unparse(node.func), {k.arg for k in node.keywords}
            if (name in FACTORIES and "device" not in given and id(node) not in moved) or (
                name.endswith(".problem") and "device" not in given
            ):
                found.append(f"{where}, line {node.lineno}: {ast.unparse(node)}")
        for child in ast.iter_child_nodes(node):
            walk(child, where, taken)

    walk(tree, "module", False)
    return found


@pytest.mark.parametrize("path", ON_ANY_DEVICE, ids=lambda path: path.stem)
def test_what_takes_a_device_makes_its_tensors_there(path):
    tree = _tree(path)
    assert not _off_the_device(tree, everywhere=path.parent.name == "kernels")
    takes = any(
        "device" in {a.arg for a in node.args.args}
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    )
    assert (
        takes
        or _cpu_only(tree)
        or all(
            _cpu_only(node)
            for node in tree.body
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
        )
    ), "nothing takes a device, and not all of it is marked cpu_only"


def test_the_check_of_devices_sees_what_is_off():
    text = (
        "def test(device):\n    x = torch.zeros(3)\n    p = entry.problem(case)\n    y = "
        "torch.randn(3, generator=g).to(device)\n"
        "    z = torch.ones(1, device=device)\n    w = torch.rand(3, generator=g)"
    )
    wrong = ["torch.zeros(3)", "entry.problem(case)", "torch.rand(3, generator=g)"]
    assert [line.split(": ")[1] for line in _off_the_device(ast.parse(text))] == wrong
    assert not _off_the_device(ast.parse("@pytest.mark.cpu_only('')\n" + text))
    assert not _off_the_device(ast.parse("pytestmark = [pytest.mark.cpu_only('')]\n" + text))
    outside = ast.parse("X = torch.zeros(3)\ndef test():\n    torch.ones(2)")
    assert len(_off_the_device(outside)) == 2
    assert not _off_the_device(outside, everywhere=False)
