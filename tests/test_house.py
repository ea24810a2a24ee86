"""The rules of the house, read off the sources themselves."""
import ast
import re
import shutil
import subprocess
import sys
from itertools import takewhile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PRODUCT = sorted(p for room in ("kernels", "engine") for p in (ROOT / room).rglob("*.py"))
# Inside the engine a module imports its own rank or lower ones. `run`, `stages` and what follows them may use everything before.
RANKS = [
    ("errors", "completion", "ordering", "schedule", "machine", "memory", "packing", "algorithms", "config", "control", "data", "checkpoint", "metrics", "optim", "natural_gradient", "estimates",
     "repetition", "alarm"), ("model",), ("generation",), ("actor",),
    ("rewards", "trl_rollout", "advantages", "objectives", "preferences", "preference_losses", "fisher"),
    ("best_of_n", "critic", "plan", "ptx", "reference", "replay", "reward_report", "rollout", "run", "saving", "workloads", "evaluate", "monitor", "judge",
     "run_report"),
    ("stages",), ("bench",), ("demo", "doctor", "verify"), ("cli", "cli_common", "cli_bench", "cli_monitor", "cli_names", "cli_values", "cli_verify"),
]


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def _imports(path: Path) -> set[str]:
    """Modules imported when the program runs: what stands under `if TYPE_CHECKING` names types only."""
    names: set[str] = set()

    def walk(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update({node.module} | {f"{node.module}.{alias.name}" for alias in node.names})
        for child in ast.iter_child_nodes(node):
            walk(child)

    walk(_tree(path))
    return names


def _rank(module: str) -> int | None:
    room = module.removeprefix("fusedrl.engine.").split(".")[0]
    return next((i for i, rooms in enumerate(RANKS) if room in rooms), None)


def test_imports_go_one_way():
    wrong = []
    for path in PRODUCT:
        relative = path.relative_to(ROOT)
        for name in _imports(path):
            if relative.parts[0] == "kernels" and (name.startswith(("fusedrl.engine", "transformers")) or name.split(".")[0] in ("engine", "bench", "tests")):
                wrong.append(f"{relative} imports {name}")
            if relative.parts[0] == "engine" and name.startswith("fusedrl.engine."):
                own, theirs = _rank(".".join(relative.with_suffix("").parts[1:])), _rank(name)
                if own is not None and theirs is not None and theirs > own:
                    wrong.append(f"{relative} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_every_engine_module_has_a_rank():
    unranked = [str(p) for p in (ROOT / "engine").iterdir() if p.suffix == ".py" and p.stem != "__init__" and _rank(p.stem) is None]
    assert not unranked, f"add to RANKS: {unranked}"


FORBIDDEN_IMPORTS = {"pickle", "marshal", "shelve", "socket", "socketserver", "http.server", "cloudpickle", "dill"}
FORBIDDEN_CALLS = {"eval", "exec", "torch.load", "torch.save", "yaml.load", "pickle.load", "pickle.loads"}


@pytest.mark.parametrize("path", PRODUCT, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_unsafe(path):
    assert not _imports(path) & FORBIDDEN_IMPORTS
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in FORBIDDEN_CALLS, f"line {node.lineno}"
            assert all(ast.unparse(k.value) == "False" for k in node.keywords if k.arg == "trust_remote_code"), f"line {node.lineno}"
        assert not isinstance(node, ast.Assert), f"line {node.lineno}: python -O removes asserts; raise instead"


LOADERS = re.compile(r"from_pretrained|from_config|from_hub|pipeline|load_dataset|get_class_from_dynamic_module|hub\.load")
OURS = {"HybridActor", "cls", "best_of_n"}  # what has a loader of that name and runs nothing
LOADING = PRODUCT + sorted(p for room in ("bench", "examples") for p in (ROOT / room).rglob("*.py"))


def _loads_code(source: str) -> list[str]:
    """Calls by which transformers, peft or a hub load something, whatever name they were imported under, that do not forbid what comes with it to run."""
    wrong = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").endswith("dynamic_module_utils"):
            wrong.append(f"line {node.lineno}: imports what runs a model's code")
        if isinstance(node, ast.ImportFrom):  # `from transformers import pipeline as load` loads as well
            wrong += [f"line {node.lineno}: {alias.name} under another name" for alias in node.names if LOADERS.fullmatch(alias.name) and alias.asname]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr" and len(node.args) > 1 and LOADERS.search(
                ast.unparse(node.args[1])):
            wrong.append(f"line {node.lineno}: {ast.unparse(node)}")
        if isinstance(node, ast.Attribute) and node.attr in ("from_pretrained", "from_config") and ast.unparse(node.value) not in OURS:
            call = next((c for c in ast.walk(ast.parse(source)) if isinstance(c, ast.Call) and ast.dump(c.func, include_attributes=True) == ast.dump(
                node, include_attributes=True)), None)  # not only called: handed on, too
            if call is None or not any(k.arg == "trust_remote_code" and ast.unparse(k.value) == "False" for k in call.keywords):
                wrong.append(f"line {node.lineno}: {ast.unparse(node)} without trust_remote_code=False")
        elif isinstance(node, ast.Call) and LOADERS.fullmatch(name := ast.unparse(node.func).removeprefix("transformers.").removeprefix("torch.")) and not any(
                k.arg == "trust_remote_code" and ast.unparse(k.value) == "False" for k in node.keywords):
            wrong.append(f"line {node.lineno}: {name} without trust_remote_code=False")
    return wrong


@pytest.mark.parametrize("path", LOADING, ids=lambda p: str(p.relative_to(ROOT)))
def test_whatever_loads_runs_no_code_that_comes_with_it(path):
    assert not _loads_code(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("source", [
    "AutoTokenizer.from_pretrained(path)", "transformers.AutoModel.from_pretrained(path, dtype=d)", "Auto.from_pretrained(path, **options)",
    "Auto.from_pretrained(path, trust_remote_code=True)", "Auto.from_pretrained(path, trust_remote_code=trust)", "load = AutoTokenizer.from_pretrained",
    "AutoModel.from_config(config)", "pipeline('text-generation', path)", "transformers.pipeline(path)", "peft.PeftModel.from_pretrained(model, path)",
    "kind().from_pretrained(path)", "getattr(AutoModel, 'from_pretrained')(path)", "torch.hub.load('owner/name', 'x')", "load_dataset('owner/name')",
    "from transformers.dynamic_module_utils import get_class_from_dynamic_module", "from transformers import pipeline as go"])
def test_planted_loaders_are_found(source):
    assert _loads_code(source)
    assert not _loads_code("AutoTokenizer.from_pretrained(path, trust_remote_code=False); HybridActor.from_pretrained(path); AutoConfig.for_model(**raw)")


def test_one_environment_variable():
    pattern = r"environ(?:\.get\(|\[)\"([A-Z_]+)\""
    reads = {(p.relative_to(ROOT).as_posix(), name) for p in PRODUCT for name in re.findall(pattern, p.read_text(encoding="utf-8"))}
    assert reads <= {("kernels/dispatch.py", "FUSEDRL_IMPL"), ("kernels/dispatch.py", "TRITON_INTERPRET")}, reads


def test_kernels_is_a_namespace():
    # A regular package of this name in the working directory would shadow Hugging Face's `kernels`, which transformers imports.
    assert not (ROOT / "kernels" / "__init__.py").exists()
    subprocess.run([sys.executable, "-c", "import transformers.integrations.hub_kernels"], cwd=ROOT, check=True, capture_output=True, timeout=120)


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("c++") is None, reason="no C++ compiler on this machine")
def test_native_kernels_are_built():
    from fusedrl.kernels import native
    assert native.capability is not None, native.reason


def test_packages_are_all_listed():
    listed = set(re.findall(r"\"fusedrl\.[a-z.]+\": \"([a-z/]+)\"", (ROOT / "setup.py").read_text(encoding="utf-8")))
    present = {p.parent.relative_to(ROOT).as_posix() for p in PRODUCT}
    assert present == listed


def test_readme_tree_is_the_tree():
    block = re.search(r"```text\n(fusedrl/\n.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert block, "README.md holds no ```text tree that starts with fusedrl/"
    stack: list[str] = []
    named = set()
    for line in block[1].splitlines()[1:]:
        indent = len(line) - len(line.lstrip())
        entries = list(takewhile(lambda word: re.fullmatch(r"\S+\.(py|toml|txt)|\S+/|Makefile", word), line.split()))
        stack = stack[:indent // 2 - 1]
        for entry in entries:
            path = "/".join([*stack, entry.rstrip("/")])
            assert (ROOT / path).exists(), f"README names {path}, which is not there"
            named.add(path)
        if len(entries) == 1 and entries[0].endswith("/"):
            stack.append(entries[0].rstrip("/"))
    missing = {p.relative_to(ROOT).as_posix() for p in PRODUCT if p.stem != "__init__"} - named
    assert not missing, f"README's tree lacks {sorted(missing)}"


# ---- tests on any device ----------------------------------------------------------------------------------------------------
FACTORIES = {f"torch.{name}" for name in ("arange", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm", "tensor", "zeros")}
ON_ANY_DEVICE = sorted((ROOT / "tests" / "kernels").glob("test_*.py")) + [ROOT / "tests" / "engine" / f"test_{name}.py" for name in (
    "actor", "advantages", "correction", "decoder", "generator", "heads", "lora", "optim", "packing", "policy_stage", "preference_losses", "preferences",
    "reward_report", "windows")]


def _cpu_only(node: ast.AST) -> bool:
    """A function that is marked so, or a file."""
    marks = node.decorator_list if isinstance(node, ast.FunctionDef) else [
        each.value for each in getattr(node, "body", []) if isinstance(each, ast.Assign) and ast.unparse(each.targets[0]) == "pytestmark"]
    return any("cpu_only" in ast.unparse(mark) for mark in marks)


def _off_the_device(tree: ast.AST, everywhere: bool = True) -> list[str]:
    """Tensors made without a device, and problems of the catalogue; not in what is cpu_only. Numbers of a generator are drawn on the CPU, alike for every
    device, and moved by `.to`. `everywhere`: also in functions that take no device."""
    found, moved = [], {id(part) for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "to" for part in ast.walk(node.value)}

    def walk(node: ast.AST, where: str, taken: bool) -> None:
        if isinstance(node, ast.FunctionDef | ast.Module):
            if _cpu_only(node):
                return
            where = getattr(node, "name", where)
            taken = taken or (isinstance(node, ast.FunctionDef) and "device" in {a.arg for a in node.args.args})
        if isinstance(node, ast.Call) and (taken or everywhere):
            name, given = ast.unparse(node.func), {k.arg for k in node.keywords}
            if (name in FACTORIES and "device" not in given and id(node) not in moved) or (name.endswith(".problem") and "device" not in given):
                found.append(f"{where}, line {node.lineno}: {ast.unparse(node)}")
        for child in ast.iter_child_nodes(node):
            walk(child, where, taken)

    walk(tree, "module", False)
    return found


@pytest.mark.parametrize("path", ON_ANY_DEVICE, ids=lambda path: path.stem)
def test_what_takes_a_device_makes_its_tensors_there(path):
    tree = _tree(path)
    assert not _off_the_device(tree, everywhere=path.parent.name == "kernels")
    takes = any("device" in {a.arg for a in node.args.args} for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    assert takes or _cpu_only(tree) or all(_cpu_only(node) for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")), (
        "nothing takes a device, and not all of it is marked cpu_only")


def test_the_check_of_devices_sees_what_is_off():
    text = ("def test(device):\n    x = torch.zeros(3)\n    p = entry.problem(case)\n    y = torch.randn(3, generator=g).to(device)\n"
            "    z = torch.ones(1, device=device)\n    w = torch.rand(3, generator=g)")
    wrong = ["torch.zeros(3)", "entry.problem(case)", "torch.rand(3, generator=g)"]
    assert [line.split(": ")[1] for line in _off_the_device(ast.parse(text))] == wrong
    assert not _off_the_device(ast.parse("@pytest.mark.cpu_only('')\n" + text))
    assert not _off_the_device(ast.parse("pytestmark = [pytest.mark.cpu_only('')]\n" + text))
    outside = ast.parse("X = torch.zeros(3)\ndef test():\n    torch.ones(2)")
    assert len(_off_the_device(outside)) == 2
    assert not _off_the_device(outside, everywhere=False)
