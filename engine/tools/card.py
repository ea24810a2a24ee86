"""Model cards: README.md of an exported model, filled in from the files of its run."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from fusedrl.engine import config as configs
from fusedrl.engine.config.algorithms import ALGORITHMS
from fusedrl.engine.runs.checkpoint import config_to_dict, flat
from fusedrl.engine.runs.metrics import read_rows
from fusedrl.engine.runs.status import RunState
from fusedrl.engine.watch.run_report import SHOWN

# options that say where something was, not how the model was trained
_PLACES = {"model", "data", "reward", "monitor_reward", "device", "algorithm"} | {
    "evaluation.data",
    "ptx.data",
    "critic.model",
}
# metrics that say how training went, not what the model does
_OF_TRAINING = ("timing/", "mem/", "tokens_per_s", "learning_rate", "grad_norm", "kl_coef") + (
    "sampling/",
    "clip_ratio/",
    "policy/",
    "val/",
)
_TITLES = {
    "sft": "supervised fine-tuning",
    "reward": "reward modelling",
    "dpo": "direct preference optimisation",
    "kto": "Kahneman-Tversky optimisation",
    "rejection": "rejection-sampling fine-tuning",
}


def card(
    name: str,
    directory: str,
    run: RunState | None,
    saved: Mapping[str, Any],
    kind: str,
    step: int | None,
    notes: Sequence[str],
    *,
    chats: bool = False,
) -> str:
    """Return the text of a model card.

    Args:
        name: name of the model.
        directory: name of the directory that the card lies in.
        run: the run that trained the model; None if it is not known.
        saved: contents of the run's config.json.
        kind: merged, adapter or gguf.
        step: step of the checkpoint that was exported; None is the end of the run.
        notes: sentences about this export.
        chats: whether its tokenizer has a chat template.
    """
    base = str(saved.get("config", {}).get("model", ""))
    parts = [_front(run, base, kind), f"# {name}", _opening(run, base, step, notes)]
    parts += ["## Use", _use(directory, kind, run, base, chats)]
    if run is not None:
        parts += ["## Training", _training(run, saved)]
        if options := _options(saved):
            parts += ["Options that are not the defaults:", f"```yaml\n{options}\n```"]
        if results := _results(run.directory, step):
            parts += ["## Results", results]
        if alarms := sum(1 for _ in read_rows(run.directory / "alarms.jsonl")):
            parts.append(
                f"The reward-hacking alarm spoke {alarms} times during this run: the reward may "
                "have risen without the quality that it stands for."
            )
    parts.append("The licence is that of the base model and of the data; it is not stated here.")
    return "\n\n".join(parts) + "\n"


def _front(run: RunState | None, base: str, kind: str) -> str:
    """Return the metadata that model hubs read."""
    lines = [f"library_name: {'peft' if kind == 'adapter' else 'transformers'}"]
    if re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists():
        lines.append(f"base_model: {base}")
    reward = run is not None and run.stage == "reward"
    lines.append(f"pipeline_tag: text-{'classification' if reward else 'generation'}")
    tags = ["fusedrl", *([run.stage] if run else []), *(["gguf"] if kind == "gguf" else [])]
    lines.append("tags: [" + ", ".join(tags) + "]")
    return "---\n" + "\n".join(lines) + "\n---"


def _opening(run: RunState | None, base: str, step: int | None, notes: Sequence[str]) -> str:
    if run is None:
        return " ".join(["Exported by fusedrl; how it was trained is not known here.", *notes])
    title = _TITLES.get(run.stage)
    if title is None:
        row = ALGORITHMS.get(run.stage)
        title = f"`{run.stage}`{'' if row is None else f' ({row.title})'}"
    when = f"the checkpoint of step {step}" if step is not None else f"{run.step} steps"
    return " ".join([f"`{_short(base)}`, trained by {title} with fusedrl: {when}.", *notes])


def _use(directory: str, kind: str, run: RunState | None, base: str, chats: bool) -> str:
    if kind == "gguf":
        return f"```bash\nllama-cli -m {directory}/*.gguf\n```"
    if kind == "adapter":
        return (
            "```python\nfrom peft import PeftConfig, PeftModel\n"
            "from transformers import AutoModelForCausalLM\n\n"
            f'base = PeftConfig.from_pretrained("{directory}").base_model_name_or_path\n'
            f"model = AutoModelForCausalLM.from_pretrained(base)  # {_short(base)}\n"
            f'model = PeftModel.from_pretrained(model, "{directory}")\n```'
        )
    if run is not None and run.stage == "reward":
        return (
            "```python\nfrom transformers import AutoModelForSequenceClassification\n\n"
            f'model = AutoModelForSequenceClassification.from_pretrained("{directory}")\n```'
        )
    prompt = '[{"role": "user", "content": "..."}]' if chats else '"..."'
    code = (
        "```python\nfrom transformers import pipeline\n\n"
        f'generate = pipeline("text-generation", model="{directory}")\n'
        f"print(generate({prompt}, max_new_tokens=64))\n```"
    )
    ours = f"chat {directory}" if chats else f'generate --model {directory} --prompt "..."'
    return f"{code}\n\n```bash\nfusedrl {ours}\n```"


def _training(run: RunState, saved: Mapping[str, Any]) -> str:
    config = saved["config"]
    tokens = sum(
        row["num_tokens"]
        for row in read_rows(run.directory / "metrics.jsonl")
        if isinstance(row.get("num_tokens"), int | float)
    )
    rows = [("base model", f"`{_short(config['model'])}`")]
    if saved.get("model_sha256"):
        rows.append(("SHA-256 of its weights", f"`{saved['model_sha256']}`"))
    rows.append(("data", f"`{_short(config['data'])}`"))
    rows.append(("SHA-256 of the data", f"`{saved.get('data_sha256', 'not recorded')}`"))
    if rewards := config.get("reward"):
        rows.append(("rewards", ", ".join(f"`{_short(one)}`" for one in rewards)))
    rows.append(("steps", f"{run.step} of {run.total}" if run.total else str(run.step)))
    rows += [("tokens", f"{tokens:,.0f}")] if tokens else []
    rows.append(("time of all steps", f"{run.seconds:,.0f} s"))
    return "\n".join(["| | |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows)])


def _options(saved: Mapping[str, Any]) -> str:
    """Return the options that differ from their defaults, as lines of YAML with dotted names."""
    cls: Any = getattr(configs, str(saved["stage"]), None)
    config = saved["config"]
    if cls is None:
        return ""
    needed = {key: config[key] for key in ("model", "data", "reward", "algorithm") if key in config}
    usual = flat(config_to_dict(cls(**needed)))
    return "\n".join(
        f"{key}: {_yaml(value)}"
        for key, value in flat(config).items()
        if key not in _PLACES and not key.startswith("run.") and usual.get(key, None) != value
    )


def _yaml(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    if isinstance(value, list):
        return f"[{', '.join(map(_yaml, value))}]"
    return str(value)


def _results(run_dir: Path, step: int | None) -> str:
    """Return a table of the main metrics: first and last value, up to the exported step."""
    series: dict[str, list[float]] = {}
    for row in read_rows(run_dir / "metrics.jsonl"):
        if step is not None and row["step"] > step:
            continue
        for name, value in row.items():
            if isinstance(value, int | float) and math.isfinite(value):
                series.setdefault(name, []).append(value)
    shown = [
        name
        for pattern in SHOWN
        for name in sorted(series)
        if fnmatch(name, pattern) and not name.startswith(_OF_TRAINING)
    ]
    lines = [f"| {name} | {series[name][0]:.4g} | {series[name][-1]:.4g} |" for name in shown]
    heading = ["| metric | first | last |", "|---|---|---|"]
    return "\n".join([*heading, *lines]) if lines else ""


def _short(place: str) -> str:
    """Return the name of a file or directory without the folders that it lies in; an id or a
    relative path of two parts stays whole."""
    parts = [
        Path(part).name if Path(part).is_absolute() or part.count("/") > 1 else part
        for part in str(place).split(",")
    ]
    return ",".join(parts)
