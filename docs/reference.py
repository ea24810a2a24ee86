"""Adds the API reference to the site: a page for what `fusedrl.engine` hands out, one for each of
its rooms, one for each module of `fusedrl.kernels`.

Modules are found by walking the folders, and their documentation is read from the sources: nothing
is imported.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]


def _public(path: Path) -> bool:
    """Whether a module defines a public function or class with a docstring."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return any(
        isinstance(node, ast.FunctionDef | ast.ClassDef)
        and node.name[0] != "_"
        and ast.get_docstring(node)
        for node in body
    )


def kernels() -> list[str]:
    """Names of the modules of fusedrl.kernels: files, and folders with an __init__.py."""
    found = {path.stem: path for path in (ROOT / "kernels").glob("*.py")}
    found |= {path.parent.name: path for path in (ROOT / "kernels").glob("*/__init__.py")}
    return sorted(name for name, path in found.items() if name[0] != "_" and _public(path))


def rooms() -> dict[str, list[str]]:
    """Rooms of the engine and the modules of each, those of folders within by dotted names; without
    the command line, which has a help of its own, and what implements `fusedrl verify`."""
    found = {
        folder.name: sorted(
            ".".join(path.relative_to(folder).with_suffix("").parts)
            for path in folder.rglob("*.py")
            if path.stem[0] != "_" and "verify" not in path.parts and _public(path)
        )
        for folder in sorted((ROOT / "engine").iterdir())
        if (folder / "__init__.py").is_file() and folder.name != "cli"
    }
    return {room: modules for room, modules in found.items() if modules}


def on_config(config: Any) -> Any:
    pages: list[Any] = ["reference/engine.md"]
    pages.append({"fusedrl.engine": [f"reference/engine/{room}.md" for room in rooms()]})
    pages.append({"fusedrl.kernels": [f"reference/kernels/{name}.md" for name in kernels()]})
    config.nav.append({"API reference": pages})
    return config


def on_files(files: Any, config: Any) -> Any:
    names = "\n".join(f"- [`{name}`][{home}.{name}]" for name, home in _homes().items())
    pages = {
        "engine": "# fusedrl.engine\n\n`fusedrl.engine` itself hands out:\n\n"
        f"{names}\n\n::: fusedrl.engine.actor\n"
    }
    for room, modules in rooms().items():
        shown = "\n\n".join(f"::: fusedrl.engine.{room}.{module}" for module in modules)
        pages[f"engine/{room}"] = f"# {room}\n\n{shown}\n"
    pages |= {f"kernels/{name}": f"# {name}\n\n::: fusedrl.kernels.{name}\n" for name in kernels()}
    for name, content in pages.items():
        files.append(File.generated(config, f"reference/{name}.md", content=content))
    return files


def _homes() -> dict[str, str]:
    """What `fusedrl.engine` hands out, and the module that defines each: by the imports that type
    checkers read in __init__.py."""
    found = {}
    for node in ast.walk(ast.parse((ROOT / "engine/__init__.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fusedrl.engine."):
            found |= {alias.name: node.module or "" for alias in node.names}
    options = ROOT / "engine/config/__init__.py"
    for node in ast.parse(options.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom):
            found |= {a.name: node.module or "" for a in node.names if a.name in found}
    return found


class PlainDocstrings(griffe.Extension):
    """Shows a docstring as it stands: its first paragraph as text, what follows with its
    columns."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            first, _, rest = obj.docstring.value.partition("\n\n")
            parts = re.split(r"(`[^`]*`)", first)
            parts[::2] = [
                re.sub(r"([\\*_\[\]])", r"\\\1", part).replace("<", "&lt;") for part in parts[::2]
            ]
            obj.docstring.value = "".join(parts) + (
                f"\n\n```text\n{rest}\n```" if rest.strip() else ""
            )
