"""Search for the directory that a model is read from. For any other kind of path, the error says
what the path is and what to give instead.

A model is a directory with config.json, *.safetensors and a tokenizer, or the id of a model in the
Hugging Face hub, whose files of these kinds are downloaded.
"""

from __future__ import annotations

import json
import re
import stat
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path

from fusedrl.engine.base.errors import no_such, resume_command, unreachable

# no pickles are ever fetched
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model"]
_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z")
PICKLED = (
    "pickled weights only, which can run code when they are read and are refused; convert them "
    "where you trust them: "
    "AutoModelForCausalLM.from_pretrained(...).save_pretrained(directory) writes safetensors"
)


def resolve_directory(path_or_id: str | Path) -> Path:
    """Return the local directory of a model: the path itself if it exists, else the hub's snapshot
    of that id (safetensors, JSON and tokenizer files).

    Raises:
        FileNotFoundError: it is neither a directory nor an id that could be downloaded.
    """
    path = local_directory(path_or_id)
    if path is not None:
        return path
    return _fetched(str(path_or_id), _HUB_FILES)


def resolve_config(model_id: str) -> Path:
    """Return the config.json of a model of the hub; only that is downloaded. Raise
    FileNotFoundError as `resolve_directory` does."""
    return _fetched(model_id, ["config.json"]) / "config.json"


def _fetched(model_id: str, patterns: list[str]) -> Path:
    """Download files of a model. The hub is asked once: without a network this ends at once."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model_id, allow_patterns=patterns))
    # the hub client's own, its HTTP library's, the system's: all mean that there is no model here
    except Exception as error:
        raise _not_fetched(model_id, error) from error


def cached_snapshot(model_id: str) -> Path | None:
    """Return the directory of a model that was fetched from the hub before, named by its commit;
    None if there is none. Nothing is downloaded."""
    from huggingface_hub import snapshot_download

    with suppress(Exception):  # no such id, no cache: as in `resolve_directory`
        return Path(snapshot_download(model_id, local_files_only=True))
    return None


def local_directory(path_or_id: str | Path) -> Path | None:
    """Return the path if it is a directory; None if it does not exist and may be an id in the hub.

    Raises:
        FileNotFoundError: the path is a file, the directory of a run or a web address, or it
            neither exists nor can be an id.
        ValueError: a file in it is none (a pipe, a socket, a device).
    """
    path, text = Path(path_or_id), str(path_or_id)
    if path.is_dir() and text:
        check_no_run(path)
        _check_files(path)
        return path
    if path.exists() and text:
        raise FileNotFoundError(_of_file(path))
    if not _ID.fullmatch(text) or _is_model_of_run(path):
        raise FileNotFoundError(_of_nothing(text))
    # a name without an owner is mostly a directory that is misspelt; old ids have none either
    if "/" not in text and cached_snapshot(text) is None:
        raise FileNotFoundError(_of_nothing(text))
    return None


def _check_files(directory: Path) -> None:
    """Raise ValueError for a pipe, a socket or a device among the files of a model, or a
    link to one: reading it would take for ever, or all memory."""
    found = []
    for path in sorted(islice(directory.iterdir(), 10_000)):
        with suppress(OSError):  # a link to nothing: who needs the file says so
            if not stat.S_ISREG(mode := path.stat().st_mode) and not stat.S_ISDIR(mode):
                found.append(path)
    if found:
        raise ValueError(
            f"{found[0]}: expected a regular file in the directory of a model, got a pipe, a "
            "socket or a device; remove it, or copy the model anew"
        )


def _not_fetched(model_id: str, error: Exception) -> FileNotFoundError:
    """Return the error for an id that could not be downloaded from the hub."""
    away = unreachable(error)
    reason = (
        "the Hugging Face hub cannot be reached, and it is not in the cache"
        if away
        else "fetching it from the Hugging Face hub failed "
        f"({type(error).__name__}: {str(error).partition(chr(10))[0]})"
    )
    remedy = "the network (HF_HOME says where the cache is)" if away else "the network"
    return FileNotFoundError(
        f"{model_id!r} is no directory here, and {reason}; check the path ({no_such(model_id)}), "
        f"the id or {remedy}"
    )


def check_no_run(path: Path) -> None:
    """Raise FileNotFoundError if the path is the directory of a run, whose model is one level
    below."""
    if not _is_run(path):
        return
    if (path / "model" / "config.json").is_file():
        raise FileNotFoundError(
            f"{path} is the directory of a run, and its model lies in it: use {path / 'model'}"
        )
    raise FileNotFoundError(_unfinished(path))


def no_model(directory: Path) -> str:
    """Return a message for a directory without a model or without weights: what it is, and what to
    give instead."""
    names = (
        sorted(path.name for path in islice(directory.iterdir(), 1000))
        if directory.is_dir()
        else []
    )
    ends = {Path(name).suffix.lower() for name in names}
    if not names:
        return f"expected a model directory with a config.json, and {directory} " + (
            "is empty" if directory.is_dir() else "does not exist"
        )
    if (run := _run_of_checkpoint(directory)) is not None:
        ended = (
            f"its model is {run / 'model'}"
            if (run / "model" / "config.json").is_file()
            else f"when it ends its model is {run / 'model'}"
        )
        return (
            f"{directory} is a checkpoint of the run {run}, from which training goes on, and no "
            f"model; go on with {resume_command(run)}; {ended}"
        )
    if "adapter_config.json" in names:
        return _of_adapter(directory)
    if inside := _models_inside(directory):
        found = " or ".join(map(str, inside))
        return (
            f"{directory} is no model (it has no config.json of one); "
            f"{'models lie' if len(inside) > 1 else 'a model lies'} in it: use {found}"
        )
    if gguf := next((name for name in names if name.endswith(".gguf")), None):
        return f"{directory} holds a model as a GGUF file; {_from_gguf(directory, gguf)}"
    if ends & set(_PICKLES):
        return f"{directory} has {PICKLED}"
    if "params.json" in names or ".distcp" in ends or ".onnx" in ends:
        kind = (
            "of Meta's or Mistral's own layout"
            if "params.json" in names
            else "a sharded training state"
            if ".distcp" in ends
            else "an ONNX graph"
        )
        return (
            f"{directory} is {kind}; expected the Hugging Face layout, config.json and "
            "*.safetensors: convert it, or take the model's release of that kind"
        )
    if "config.json" in names:
        return (
            f"{directory} has no weights: expected model.safetensors or "
            f"model.safetensors.index.json; it has {_some(names)}"
        )
    what = (
        "a tokenizer and no model: expected a config.json and *.safetensors beside it"
        if "tokenizer_config.json" in names or "tokenizer.json" in names
        else "no config.json, and a model directory has one with *.safetensors; it has "
        f"{_some(names)}"
    )
    return f"{directory} has {what}"


def _is_run(path: Path) -> bool:
    return not any(path.glob("*.safetensors")) and (
        (path / "checkpoints").is_dir() or (path / "metrics.jsonl").is_file()
    )


def _is_model_of_run(path: Path) -> bool:
    return path.name == "model" and path.parent.is_dir() and _is_run(path.parent)


def _unfinished(run: Path) -> str:
    return (
        f"{run} is the directory of a run that has no model yet; let it end ({resume_command(run)} "
        f"goes on with it), then use {run / 'model'}"
    )


def _run_of_checkpoint(path: Path) -> Path | None:
    """Return the run that a checkpoint's directory, or the directory of all its checkpoints,
    belongs to."""
    if path.name == "checkpoints" and any(path.glob("step_*")):
        return path.parent
    return (
        path.parent.parent
        if path.parent.name == "checkpoints" and path.name.startswith("step_")
        else None
    )


def _of_adapter(directory: Path) -> str:
    merged = directory.parent / "model"
    if directory.name == "adapter" and (merged / "config.json").is_file():
        return (
            f"{directory} is a LoRA adapter, and a model is expected here; the model with it "
            f"merged is {merged}"
        )
    base = None
    with suppress(OSError, ValueError, AttributeError):
        base = json.loads((directory / "adapter_config.json").read_bytes()).get(
            "base_model_name_or_path"
        )
    return (
        f"{directory} is a LoRA adapter{f' of {base}' if base else ''}, and a model is expected "
        "here; fusedrl generate takes it as --adapter beside its "
        "--model; for anything else merge it with PEFT: "
        f"AutoPeftModelForCausalLM.from_pretrained({str(directory)!r}).merge_and_unload()"
        ".save_pretrained(DIR)"
    )


def _models_inside(directory: Path) -> list[Path]:
    """Return at most three models found up to two levels below the directory."""
    found: list[Path] = []
    with suppress(OSError):
        for config in islice(
            chain(directory.glob("*/config.json"), directory.glob("*/*/config.json")), 30
        ):
            with suppress(OSError, ValueError):
                raw = json.loads(config.read_bytes())
                if isinstance(raw, dict) and "model_type" in raw:
                    found.append(config.parent)
    return sorted(found)[:3]


def _from_gguf(directory: Path, name: str) -> str:
    return (
        "convert it with transformers and the package gguf: "
        f"AutoModelForCausalLM.from_pretrained({str(directory)!r}, gguf_file={name!r})"
        ".save_pretrained(DIR), and AutoTokenizer the same way; take quantization_config out of "
        "its config.json, since what is written is no longer "
        "quantised, and give DIR"
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _of_file(path: Path) -> str:
    """Return a message that tells what a file is that was given instead of a model."""
    head = b""
    with suppress(OSError):
        if path.is_file():
            with open(path, "rb") as file:
                head = file.read(4)
    if head == b"GGUF" or path.suffix.lower() == ".gguf":
        return (
            f"{path} is a GGUF file, and a model directory is expected here; "
            f"{_from_gguf(path.parent, path.name)}"
        )
    if (path.parent / "config.json").is_file() and path.suffix in (".safetensors", ".json"):
        return f"{path} is a file of a model, and its directory is expected here: use {path.parent}"
    if path.suffix.lower() in _PICKLES:
        return (
            f"{path} is a file of pickled weights, which can run code when they are read and "
            "are refused; expected a model directory with *.safetensors"
        )
    if path.suffix.lower() in _ARCHIVES:
        return (
            f"{path} is an archive, and a model directory is expected here; unpack it, and "
            "give the directory with the config.json"
        )
    return (
        f"{path} is {'a file' if path.is_file() else 'no directory'}; expected a model directory "
        "or a Hugging Face id such as 'owner/name'; a model is a "
        "directory with config.json, *.safetensors and a tokenizer"
    )


def _of_nothing(text: str) -> str:
    """Return a message for a path that does not exist and cannot be an id."""
    expected = "expected a model directory or a Hugging Face id such as 'owner/name'"
    if match := re.match(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)", text):
        return f"{expected}, got the address {text!r}; use the id: {match[1]}"
    if "://" in text:
        return (
            f"{expected}, got the address {text!r}, from which nothing is downloaded; fetch it "
            "yourself, and give the directory"
        )
    if not text.strip():
        return f"{expected}, got {text!r}"
    if _is_model_of_run(path := Path(text)):
        return _unfinished(path.parent)
    return f"{no_such(text)}; {expected}, got {text!r}"
