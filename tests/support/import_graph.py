"""The product's import graph, read off its sources, and what in it goes the wrong way.

Every import counts: at the top of a module, inside a function, under `if TYPE_CHECKING`. A room may
import from the rooms below it on `FLOORS` and from itself; nothing may be in a circle, inside a
room neither.
"""

from __future__ import annotations

import ast
from collections.abc import Collection
from pathlib import Path

FLOORS = (
    "cli",
    "tools",
    "stages",
    "watch",
    "policy",
    "rollout",
    "preference",
    "actor",
    "generation",
    "runs",
    "rewards",
    "model",
    "optim",
    "parallel",
    "data",
    "config",
    "base",
)  # from the top; all of them above kernels
FACADE = "engine/__init__"  # hands out names of all rooms, so that no room may import it

Graph = dict[str, set[str]]  # module -> modules that it imports, both as paths without suffix


def imported(tree: ast.AST, module: str, modules: Collection[str] = ()) -> set[str]:
    """Dotted names that a module imports, relative ones made absolute; `from a import b` is a.b
    where that is one of `modules`, else a."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = ["fusedrl", *module.split("/")][: -node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names.update(
                inner if (inner := f"{base}.{alias.name}") in modules else base
                for alias in node.names
            )
    return names


def import_graph(root: Path) -> Graph:
    """Of `engine` and `kernels` below root."""
    paths = {
        path.relative_to(root).with_suffix("").as_posix(): path
        for room in ("engine", "kernels")
        for path in sorted((root / room).rglob("*.py"))
    }
    modules = {
        "fusedrl." + name.removesuffix("/__init__").replace("/", "."): name for name in paths
    }
    trees = {
        name: ast.parse(path.read_text(encoding="utf-8"), str(path)) for name, path in paths.items()
    }
    return {
        name: {modules[dotted] for dotted in imported(tree, name, modules) if dotted in modules}
        - {name}
        for name, tree in trees.items()
    }


def floor_of(module: str) -> int | None:
    """The floor of a module of `engine`, 0 at the top; None where its room is on no floor."""
    room = module.split("/")[1]
    return FLOORS.index(room) if room in FLOORS else None


def rising(graph: Graph) -> list[str]:
    """Arrows that do not go down, each as "a imports b"; and modules in no room."""
    wrong = [
        f"{name} is in no room of FLOORS"
        for name in graph
        if name.startswith("engine/") and name != FACADE and floor_of(name) is None
    ]
    for name, others in graph.items():
        for other in others:
            up = other.startswith("engine/") and name.startswith("kernels/")
            if name.startswith("engine/") and other.startswith("engine/") and name != FACADE:
                ours, theirs = floor_of(name), floor_of(other)
                apart = name.split("/")[1] != other.split("/")[1]
                up = other == FACADE or (
                    apart and ours is not None and theirs is not None and theirs <= ours
                )
            if up:
                wrong.append(f"{name} imports {other}")
    return sorted(wrong)


def circles(graph: Graph) -> list[list[str]]:
    """Modules that import one another, directly or through others: the strongly connected
    components of more than one (Tarjan, 1972)."""
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        number[name] = low[name] = len(number)
        stack.append(name)
        for other in sorted(graph[name]):
            if other not in number:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], number[other])
        if low[name] == number[name]:
            component = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(component) > 1:
                found.append(sorted(component))

    for name in sorted(graph):
        if name not in number:
            visit(name)
    return found
