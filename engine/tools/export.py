"""Hand-over of a trained model: a directory for transformers, an adapter for PEFT, or a GGUF file
for llama.cpp, with a model card that tells how it was trained.

The directory is written beside its final place and then renamed, so it is whole or absent. Nothing
is ever overwritten.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fusedrl.engine import config as configs
from fusedrl.engine.actor import HybridActor
from fusedrl.engine.base.errors import ConfigError, no_such, resume_command
from fusedrl.engine.config import LoRAConfig
from fusedrl.engine.model.directories import resolve_directory
from fusedrl.engine.model.gguf_files import dtype_name, write_gguf
from fusedrl.engine.model.heads import (
    VALUE_HEAD_FILE,
    RewardModel,
    load_reward_model,
    save_reward_model,
)
from fusedrl.engine.model.lora import add_adapter
from fusedrl.engine.model.weights import (
    classifier,
    load_config,
    load_decoder,
    load_tokenizer,
    replacing,
)
from fusedrl.engine.runs.checkpoint import checkpoint_of, saved_steps
from fusedrl.engine.runs.saving import trained
from fusedrl.engine.runs.status import RunState, read_status, run_state
from fusedrl.engine.tools.card import card

KINDS = ("merged", "adapter", "gguf")
_TORCH = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True)
class Source:
    """Model to export: its directory, and the run that it is from, if it is of one.

    step: step of a checkpoint that is exported in place of the directory's model.
    """

    model: Path
    run: RunState | None
    saved: dict[str, Any]
    step: int | None = None

    @property
    def name(self) -> str:
        """Name of the model: that of its run, or else of its directory."""
        return (self.model if self.run is None else self.run.directory).resolve().name


def export(
    source: str | Path,
    target: str | Path,
    *,
    kind: str = "merged",
    dtype: str = "auto",
    step: int | str | None = None,
) -> Path:
    """Write a model, and a model card (README.md), into a new directory.

    Args:
        source: the directory of a run, or the directory or id of a model.
        target: the directory to write; it may exist if it is empty.
        kind: merged is a whole model for transformers, adapter the LoRA adapter of a run in PEFT's
            files, gguf one file for llama.cpp.
        dtype: float32, bfloat16 or float16 (gguf only); auto keeps that of the model's files.
        step: export the checkpoint of this step of the run, or of its best one ("best", with
            run.keep_best); None exports the finished model.
    Returns:
        The directory.
    Raises:
        ConfigError: there is no such model, adapter or checkpoint, or it cannot be written in this
            format.
        FileExistsError: the target holds something.
        SetupError: the package gguf is missing.
    """
    if kind not in KINDS or dtype not in ("auto", *_TORCH):
        raise ConfigError(f"export: expected one of {', '.join(KINDS)}, got {kind!r} of {dtype!r}")
    if dtype == "float16" and kind != "gguf":
        raise ConfigError(f"export: float16 is for --format gguf, not for {kind}; take bfloat16")
    final = Path(target)
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise FileExistsError(
            f"export: expected {final} to be a new directory or an empty one; nothing is written "
            "over"
        )
    found = _source(source, step, kind)
    with replacing(final) as temporary:
        notes = _WRITERS[kind](found, temporary, dtype)
        text = card(
            *(found.name, final.name, found.run, found.saved, kind, found.step, notes),
            chats=_chats(temporary),
        )
        (temporary / "README.md").write_text(text, encoding="utf-8")
    return final


def _chats(model: Path) -> bool:
    """Whether the tokenizer of an exported model has a chat template."""
    if (model / "chat_template.jinja").is_file():
        return True
    config = model / "tokenizer_config.json"
    return config.is_file() and bool(json.loads(config.read_bytes()).get("chat_template"))


def _source(source: str | Path, step: int | str | None, kind: str) -> Source:
    """Find out what is to be exported. Errors are those of `export`."""
    path = Path(source)
    run = run_state(path)
    if run is None and path.name == "model" and (run := run_state(path.parent)) is not None:
        path = path.parent
    if run is None:
        if step is not None:
            raise ConfigError(f"export: --step is of a run, and {source} is none; leave it out")
        if kind == "adapter":
            raise ConfigError(f"export: expected the directory of a run, got {source}")
        return Source(resolve_directory(source), None, {})
    saved = json.loads((path / "config.json").read_bytes())
    if step == "best":
        if run.best is None:
            raise ConfigError(
                f"export: {path} keeps no best checkpoint; train with --run.keep_best METRIC, or "
                "give --step N"
            )
        step = run.best[1]
    if step is None and not (path / "model" / "config.json").is_file():
        steps = ", ".join(map(str, sorted(saved_steps(path))))
        raise ConfigError(
            f"export: {path} has no model yet, it is {run.state} at step {run.step}; go on with "
            + resume_command(path)
            + (f", or export a checkpoint with --step N (of {steps})" if steps else "")
        )
    number = None if step is None else int(step)
    return Source(path / "model", run, saved, number)


# ---- the three formats ---------------------------------------------------------------------------
def _merged(source: Source, to: Path, dtype: str) -> list[str]:
    """Write a whole model; return remarks for the card."""
    if source.step is None and dtype == "auto":
        for file in sorted(source.model.iterdir()):
            if file.is_file() and file.name not in (VALUE_HEAD_FILE, "README.md", ".gitattributes"):
                shutil.copyfile(file, to / file.name)
        return []
    save, notes = _opened(source, dtype)
    save(to)
    (to / VALUE_HEAD_FILE).unlink(missing_ok=True)
    return notes


def _adapter(source: Source, to: Path, dtype: str) -> list[str]:
    if source.saved.get("config", {}).get("lora") is None:
        raise ConfigError(
            f"export: {source.name} was trained without LoRA and has no adapter; export it with "
            "--format merged"
        )
    if dtype != "auto":
        raise ConfigError("export: an adapter keeps its dtype; leave --dtype out")
    if source.step is not None:
        actor = _from_checkpoint(source, "auto")
        if not isinstance(actor, HybridActor):
            raise ConfigError("export: a reward model's adapter has no head; use --format merged")
        actor.save_adapter(to, base_model=source.saved["config"]["model"])
        return []
    adapter = source.model.parent / "adapter"
    if not adapter.is_dir():
        raise ConfigError(f"export: {no_such(adapter)}; use --format merged")
    for file in sorted(adapter.iterdir()):
        shutil.copyfile(file, to / file.name)
    return []


def _gguf(source: Source, to: Path, dtype: str) -> list[str]:
    if source.step is None:
        _refuse_classifier(source)
        kept = load_config(source.model).raw
        own = str(kept.get("dtype", kept.get("torch_dtype")))
        name = _TORCH.get(own if dtype == "auto" else dtype, "F32")
        # norms stay as they are in the files, whatever the matrices become
        wide = "bfloat16" if own == "bfloat16" else "float32"
        decoder = load_decoder(source.model, dtype=wide, device="cpu")
        tokenizer = load_tokenizer(source.model)
    else:
        actor = _from_checkpoint(source, "auto")
        if not isinstance(actor, HybridActor):
            raise ConfigError("export: a reward model cannot be written to GGUF")
        decoder, tokenizer = actor.decoder, actor.tokenizer
        name = dtype_name(decoder.dtype) if dtype == "auto" else _TORCH[dtype]
    if tokenizer is None:
        raise ConfigError(f"export: {source.model} has no tokenizer, which a GGUF file needs")
    write_gguf(
        decoder,
        to / f"{source.name}-{name}.gguf",
        tokenizer=tokenizer,
        dtype=name,
        name=source.name,
    )
    return [f"The matrices are {name}."]


_WRITERS: dict[str, Callable[[Source, Path, str], list[str]]] = {
    "merged": _merged,
    "adapter": _adapter,
    "gguf": _gguf,
}


def _refuse_classifier(source: Source) -> None:
    if classifier(load_config(source.model)) is not None:
        raise ConfigError(
            f"export: {source.model} is a reward model, which GGUF has no place for; use --format "
            "merged"
        )


# ---- models in memory ----------------------------------------------------------------------------
def _opened(source: Source, dtype: str) -> tuple[Callable[[Path], None], list[str]]:
    """Return a function that saves the model, in `dtype`, and remarks for the card."""
    if source.step is None and classifier(load_config(source.model)) is None:
        actor = HybridActor.from_pretrained(source.model, dtype=dtype, device="cpu")
        return actor.save_pretrained, []
    if source.step is None:
        model: Any = load_reward_model(source.model, dtype=dtype, device="cpu")
        tokenizer = load_tokenizer(source.model)
        return lambda to: save_reward_model(model, to, tokenizer=tokenizer), []
    model = _from_checkpoint(source, dtype)
    if isinstance(model, HybridActor):
        return model.save_pretrained, []
    tokenizer = load_tokenizer(source.saved["config"]["model"])
    note = "Scores are not shifted to mean 0, which happens at the end of a run."
    return lambda to: save_reward_model(model, to, tokenizer=tokenizer), [note]


def _from_checkpoint(source: Source, dtype: str) -> Any:
    """Return the model (an actor, or a reward model) as it was after a step of its run."""
    root, step, saved = source.model.parent, source.step or 0, source.saved["config"]
    tensors = checkpoint_of(root, step).tensors["model"]
    base = Path(read_status(root).get("working_directory", ".")) / saved["model"]
    base = base if base.is_dir() else saved["model"]
    own = next(iter(tensors.values())).dtype
    lora = None if saved["lora"] is None else LoRAConfig(**_tuples(saved["lora"]))
    kind = getattr(configs, source.saved["stage"], None)
    model: Any
    if kind is configs.RewardModelConfig:
        decoder = load_decoder(base, dtype=own, device="cpu")
        if lora is not None:
            add_adapter(decoder, lora)
        model = RewardModel.from_decoder(decoder, imitation=saved["imitation_coef"] > 0)
        parameters = trained(model)
    else:
        head = any(name.startswith("value_head.") for name in tensors)
        model = HybridActor.from_pretrained(base, dtype=own, device="cpu", value_head=head)
        if lora is not None:
            model.add_adapter(lora)
        parameters = trained(model)
    if parameters.keys() != tensors.keys():
        raise ConfigError(
            f"export: the checkpoint of step {step} does not fit the model that the run began "
            f"with, {saved['model']}"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    if dtype != "auto":
        (model.decoder if isinstance(model, HybridActor) else model).to(getattr(torch, dtype))
    return model


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(x) if isinstance(x, list) else x for name, x in values.items()}
