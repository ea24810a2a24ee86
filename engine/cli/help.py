"""Help of `fusedrl train`: its stages, a screen of the options that people set, and an example
command where options are missing."""

from __future__ import annotations

import shlex
import shutil
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fusedrl.engine.cli.fields import defaults_of, docs_of, example_of, needed_of, value_of
from fusedrl.engine.cli.values import group_of, keys_of
from fusedrl.engine.config.algorithms import ADVANTAGES, ALGORITHMS

COMMON = {  # what --help shows, where a stage has it; --help-all shows all
    "what": (
        "model",
        "reference_model",
        "data",
        "reward",
        "environment",
        "critic.model",
        "run.dir",
    ),
    "how much": (
        "epochs",
        "steps",
        "prompts_per_step",
        "samples_per_prompt",
        "minibatches",
        "sequences_per_step",
        "pairs_per_step",
        "answers_per_step",
        "max_length",
        "max_prompt_length",
        "generation.max_new_tokens",
        "generation.temperature",
    ),
    "how": (
        "optim.lr",
        "optim.warmup_steps",
        "lora.rank",
        "loss",
        "beta",
        "keep",
        "kl.coef",
        "kl.target",
    ),
    "watching": ("eval_fraction", "eval_every", "evaluation.data", "monitor_reward"),
    "memory and machine": (
        "tokens_per_microbatch",
        "checkpoint_activations",
        "dtype",
        "device",
    ),
    "going on": ("run.seed", "run.resume", "run.keep_best"),
}


def stages_help(stages: Mapping[str, str]) -> str:
    """Return the help of `fusedrl train`: stages with their titles."""
    listed = "\n".join(f"  {name:22}{title}" for name, title in stages.items())
    return (
        "usage: fusedrl train STAGE [--config run.yaml] [--devices N] [--option value "
        "...]\n\n--devices N divides the run among N devices of this machine.\n\n"
        f"stages:\n{listed}\n\n"
        "fusedrl train STAGE --help shows the options that people set, --help-all all of them; "
        "fusedrl init\nSTAGE writes them into a file."
    )


def short_help(stage: str, cls: type, title: str) -> str:
    """Return one screen: the options of a stage that people set, with the first sentence of their
    documentation and their defaults."""
    config, docs = defaults_of(stage, cls), docs_of(cls)
    known = {
        name: kind
        for name, kind in keys_of(cls)
        if name.partition(".")[0] != "critic" or has_critic(stage)
    }
    required = set(needed_of(stage, cls))
    width = min(100, shutil.get_terminal_size().columns)
    lines = [f"usage: fusedrl train {stage} --option value ...", "", f"{stage}: {title}", ""]
    for heading, names in COMMON.items():
        shown = [name for name in names if name in known and not _is_group(known[name])]
        lines += [f"{heading}:"] if shown else []
        for name in shown:
            default = "required" if name in required else _shown(value_of(config, name))
            text = f"{_first(docs[name])} ({default})"
            lines += _entry(f"--{name}", text, width)
    lines += ["files and devices:"]
    lines += _entry("--config", "YAML file with these options; the command line beats it", width)
    lines += _entry("--devices", "number of devices of this machine to divide the run among", width)
    lines += ["", "for example:", f"  {example(stage, cls)}", ""]
    others = sum(not _is_group(kind) for kind in known.values()) - sum(map(len, _shown_of(known)))
    lines += [f"--help-all shows {others} more; fusedrl init {stage} writes all into a file."]
    return "\n".join(lines)


def _shown_of(known: Mapping[str, Any]) -> Iterable[list[str]]:
    for names in COMMON.values():
        yield [name for name in names if name in known and not _is_group(known[name])]


def has_critic(stage: str) -> bool:
    """Whether a stage is an algorithm with a critic."""
    return stage in ALGORITHMS and ADVANTAGES.get(ALGORITHMS[stage].advantage) == "critic"


def _is_group(kind: Any) -> bool:
    return group_of(kind) is not None


def _entry(name: str, text: str, width: int) -> list[str]:
    lines = textwrap.wrap(text, width - 30, break_on_hyphens=False)
    first = f"  {name:27} {lines[0]}" if len(name) <= 27 else f"  {name}\n{'':30}{lines[0]}"
    return [first, *(f"{'':30}{line}" for line in lines[1:])]


def _first(text: str) -> str:
    """Return the first sentence, or what stands before its semicolon."""
    return text.partition(". ")[0].partition("; ")[0].rstrip(".")


def _shown(value: Any) -> str:
    if value is None or value == "":
        return "default: none"
    if isinstance(value, bool):
        return f"default: {str(value).lower()}"
    if isinstance(value, tuple):
        return f"default: {','.join(map(str, value)) or 'none'}"
    return f"default: {value:g}" if isinstance(value, float) else f"default: {value}"


def example(stage: str, cls: type, argv: Sequence[str] = (), lacking: Sequence[str] = ()) -> str:
    """Return a whole command: what was given, with example values of what is lacking. Without
    arguments, all options without a default are lacking."""
    lacking = lacking or needed_of(stage, cls)
    added = [word for name in lacking for word in (f"--{name}", example_of(stage, name))]
    given = " ".join(map(shlex.quote, argv))
    where = [] if "run.dir" in given else ["--run.dir", f"runs/{stage}"]
    return " ".join(
        [f"fusedrl train {stage}", *([given] if given else []), *map(shlex.quote, added + where)]
    )
