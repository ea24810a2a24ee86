"""Adds the API reference to the site: a page for what `fusedrl.engine` hands out, one for its
options, one for each module of `fusedrl.kernels`.

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


def on_config(config: Any) -> Any:
    pages = [
        "reference/engine.md",
        "reference/config.md",
        *(f"reference/kernels/{name}.md" for name in kernels()),
    ]
    config.nav.append({"API reference": pages})
    return config


def on_files(files: Any, config: Any) -> Any:
    homes = _homes()
    engine = "\n\n".join(f"::: {homes[name]}.{name}" for name in homes)
    pages = {
        "engine": f"# fusedrl.engine\n\n{engine}\n",
        "config": "# fusedrl.engine.config\n\n"
        + "\n\n".join(
            f"::: fusedrl.engine.config.{path.stem}"
            for path in sorted((ROOT / "engine/config").glob("*.py"))
            if path.stem != "__init__"
        )
        + "\n",
    }
    pages |= {f"kernels/{name}": f"# {name}\n\n::: fusedrl.kernels.{name}\n" for name in kernels()}
    for name, content in pages.items():
        files.append(File.generated(config, f"reference/{name}.md", content=content))
    return files


def _homes() -> dict[str, str]:
    """What `fusedrl.engine` hands out, and the module of each: the literal table of its
    __init__.py."""
    for node in ast.parse((ROOT / "engine/__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_HOMES":
            return ast.literal_eval(node.value)
    raise ValueError("engine/__init__.py has no table _HOMES")


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
