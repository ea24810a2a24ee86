"""Digests of everything that a run reads: by them a resumed run knows whether it goes on with what
it was started with.

What decides the result is in `data_sha256`, `model_sha256` and `files`: data, weights, the models'
configurations and tokenizers, reward models. `told` holds what may change with a word about it:
users' code, and what is only measured.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import os
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fusedrl.engine.data.rows import check_source, source_digest
from fusedrl.engine.data.sources import Data, parse_data
from fusedrl.engine.model.directories import cached_snapshot
from fusedrl.engine.rewards.ready import READY

# what is read of a model's directory, beside its weights
_BESIDE = (
    "config.json",
    "generation_config.json",
    "*.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates/*",
)
Digests = dict[str, dict[str, str]]  # option -> file -> SHA-256


def data_digest(data: Data) -> str:
    """Return the SHA-256 of a data file's bytes, or of a hub data set's rows; of several sources,
    all digests. Errors are those of `check_source`."""
    sources = parse_data(data)
    for source in sources:
        check_source(source)
    return " ".join(source_digest(source) for source in sources)


def all_data(config: Any) -> str:
    """Return the digest of the data that a run trains on: its data, and the pretraining texts of a
    policy."""
    ptx = getattr(config, "ptx", None)
    return data_digest(config.data) + (f" ptx {data_digest(ptx.data)}" if ptx is not None else "")


def file_digest(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_digest(model: str | Path) -> str | None:
    """Return the SHA-256 over names and bytes of a model directory's safetensors files. Return None
    for a model id that is not a local directory."""
    if not Path(model).is_dir():
        return None
    parts = [
        f"{path.name} {file_digest(path)}" for path in sorted(Path(model).glob("*.safetensors"))
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def files_of(config: Any) -> Digests:
    """Return the digests of what decides a run's result beside its data and its model's weights:
    configurations and tokenizers of models, and the weights of reward models, of a critic and of a
    reference that is another model. Options of which nothing is on this machine are left out."""
    critic = getattr(getattr(config, "critic", None), "model", None)
    found = {"model": _of_model(config.model, weights=False)}
    found |= {
        f"reward {spec}": _of_model(spec)
        for spec in getattr(config, "reward", ())
        if _is_model(spec)
    }
    others = {"critic.model": critic, "reference_model": getattr(config, "reference_model", None)}
    for option, path in others.items():
        if path not in (None, "trunk", "policy"):
            found[option] = _of_model(str(path))
    return {option: files for option, files in found.items() if files}


def told_of(config: Any) -> Digests:
    """Return the digests of files that may change while a run goes on: Python files that the user
    gave, with those of the user's own modules that they import, and data and rewards that are only
    measured."""
    found = {
        f"reward {spec}": _of_code(spec)
        for spec in getattr(config, "reward", ())
        if not _is_model(spec)
    }
    for spec in getattr(config, "monitor_reward", ()):
        found[f"monitor_reward {spec}"] = _of_model(spec) if _is_model(spec) else _of_code(spec)
    turns = getattr(getattr(config, "turns", None), "tool_parser", None)
    for option, spec in (
        ("environment", getattr(config, "environment", None)),
        *(("tools", tool) for tool in getattr(config, "tools", ())),
        ("turns.tool_parser", turns),
    ):
        found[f"{option} {spec}"] = _of_code(spec)
    loss = getattr(config, "loss", None)
    for option in ("advantage", "objective"):
        # checked, and imported, before a run is opened
        module = sys.modules.get(str(getattr(loss, option, None)).rpartition(".")[0])
        if source := getattr(module, "__file__", None):
            found[f"loss.{option}"] = _digests([Path(source)])
    evaluation = getattr(config, "evaluation", None)
    if evaluation is not None:
        found["evaluation.data"] = {"rows": data_digest(evaluation.data)}
    return {option: files for option, files in found.items() if files}


def _is_model(spec: Any) -> bool:
    ready = str(spec).partition(":")[0] in READY
    return isinstance(spec, str) and bool(spec) and not ready and Path(spec).is_dir()


def _of_model(model: str, *, weights: bool = True) -> dict[str, str]:
    """Return the digests of a model's files by their names; of an id in the hub, the commit that
    was fetched."""
    root = Path(model)
    if not root.is_dir():
        snapshot = cached_snapshot(model)
        return {} if snapshot is None else {"commit": snapshot.name}
    patterns = (*_BESIDE, "*.safetensors") if weights else _BESIDE
    return _digests((path for pattern in patterns for path in root.glob(pattern)), root)


def _of_code(spec: Any) -> dict[str, str]:
    path = str(spec).rpartition(":")[0]
    if not path.endswith(".py"):
        return {}
    found: list[Path] = []
    _follow(Path(path).resolve(), found)
    root = Path(path).resolve().parent
    return {os.path.relpath(one, root): file_digest(one) for one in found}


def _follow(path: Path, found: list[Path]) -> None:
    """Add a Python file to `found`, and the files of the modules that it imports, as its text says,
    and theirs. Nothing is imported for that. Left out are the standard library and installed
    packages: their versions are no part of the user's code."""
    if path in found or not path.is_file():
        return
    found.append(path)
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            for one in _files_of_module(name):
                _follow(one, found)


def _files_of_module(name: str) -> list[Path]:
    """Return the Python files of a module of the user's, and of the packages that it is in."""
    top, *rest = name.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError, AttributeError):
        return []
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return []
    at = Path(spec.origin).resolve()
    installed = [Path(sysconfig.get_paths()[key]).resolve() for key in ("stdlib", "purelib")]
    if any(root in at.parents for root in installed) or top == "fusedrl":
        return []
    files, directory = [at], at.parent
    for part in rest:
        files += [directory / f"{part}.py", directory / part / "__init__.py"]
        directory = directory / part
    return [one for one in files if one.is_file()]


def _digests(paths: Iterable[Path], root: Path | None = None) -> dict[str, str]:
    return {
        (path.name if root is None else path.relative_to(root).as_posix()): file_digest(path)
        for path in sorted(set(paths))
        if path.is_file()
    }


def changed_files(saved: Digests, current: Digests) -> list[str]:
    """Return a line for each file that is in both, or under an option that is in both, and whose
    digest differs. Raise TypeError if `saved` is not of that form."""
    if not isinstance(saved, dict) or not all(isinstance(one, dict) for one in saved.values()):
        raise TypeError(f"expected digests of files by option, got {str(saved)[:80]}")
    return [
        f"{option}: {name} holds something else than before: SHA-256 "
        f"{_short(saved[option].get(name))} -> {_short(current[option].get(name))}"
        for option in saved
        if option in current
        for name in dict.fromkeys((*saved[option], *current[option]))
        if saved[option].get(name) != current[option].get(name)
    ]


def _short(digest: str | None) -> str:
    return "absent" if digest is None else f"{digest[:12]}..."
