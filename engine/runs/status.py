"""How a run stands: <run>/status.json, beside what the lock, the metrics and the checkpoints say.

The file is written when a run begins, when its number of steps is known, and when it ends. A
process that is killed writes nothing more; the lock, which the system releases, tells.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusedrl.engine.runs.files import is_locked, write_file
from fusedrl.engine.runs.metrics import read_rows

FILE = "status.json"
SCORES = ("reward", "eval_accuracy", "accuracy", "rewards/accuracies", "eval_loss", "loss")


def write_status(run_dir: Path, values: Mapping[str, Any]) -> None:
    """Replace <run>/status.json."""
    write_file(run_dir / FILE, (json.dumps(dict(values), indent=1) + "\n").encode())


_KINDS: dict[str, tuple[type, ...]] = {
    "state": (str,),
    "total": (int,),
    "devices": (int,),
    "working_directory": (str,),
    "best": (list,),
}


def read_status(run_dir: Path) -> dict[str, Any]:
    """Return the contents of <run>/status.json, without what is not of its type; empty if there is
    none that can be read."""
    return {
        name: value
        for name, value in _json(run_dir / FILE).items()
        if name not in _KINDS or isinstance(value, _KINDS[name])
    }


@dataclass(frozen=True)
class RunState:
    """State of a run, as its directory tells it.

    Attributes:
        stage: name of its stage, as in `fusedrl train STAGE`.
        state: running, finished, interrupted or failed.
        step: number of steps in metrics.jsonl.
        total: number of steps of the whole run; None if it is not known.
        score: name and last value of the metric that matters most; None if there is none.
        seconds: seconds of all steps together.
        best: (metric, step, value) of the best checkpoint that is kept; None without one.
        message: what ended the run, if it failed or had to be killed.
        resumes: whether `fusedrl resume` can go on with it: it has a checkpoint, or no steps yet.
    """

    directory: Path
    stage: str
    state: str
    step: int
    total: int | None
    score: tuple[str, float] | None
    seconds: float
    best: tuple[str, int, float] | None
    message: str
    resumes: bool


def stage_name(saved: Mapping[str, Any]) -> str | None:
    """Return the name of the stage of a config.json, as in `fusedrl train STAGE`; None if it is not
    one of a run."""
    config = saved.get("config")
    if not isinstance(config, dict):
        return None
    stages = {
        "SFTConfig": "sft",
        "RewardModelConfig": "reward",
        "DPOConfig": "dpo",
        "KTOConfig": "kto",
        "RejectionConfig": "rejection",
        "PolicyConfig": config.get("algorithm", "ppo"),
        "PPOConfig": config.get("algorithm", "ppo"),
    }
    return stages.get(str(saved.get("stage")))


def run_state(run_dir: str | Path) -> RunState | None:
    """Return the state of the run in a directory, or None if there is no run. Only files are read,
    so that it works beside a running run."""
    root = Path(run_dir)
    stage = stage_name(saved := _json(root / "config.json"))
    if stage is None:
        return None
    told = read_status(root)
    step, seconds = 0, 0.0
    last: dict[str, float] = {}
    for row in read_rows(root / "metrics.jsonl"):
        step = max(step, int(row["step"]))
        taken = row.get("timing/step")
        seconds += taken if isinstance(taken, int | float) else 0.0
        last |= {name: value for name, value in row.items() if isinstance(value, int | float)}
    done = (root / "model" / "config.json").is_file()
    state = str(told.get("state", "finished" if done else "interrupted"))
    if is_locked(root):
        state = "running"
    elif state == "running":  # it was killed, and could not say so
        state = "interrupted"
    total = told.get("total", saved["config"].get("steps"))
    best = told.get("best")
    return RunState(
        root,
        stage,
        state,
        step,
        total if isinstance(total, int) else None,
        next(((name, last[name]) for name in SCORES if name in last), None),
        seconds if math.isfinite(seconds) else 0.0,
        (str(best[0]), int(best[1]), float(best[2]))
        if isinstance(best, list) and len(best) == 3
        else None,
        str(told.get("message", "")) if state in ("failed", "interrupted") else "",
        not step or any(root.glob("checkpoints/step_*/MANIFEST.json")),
    )


def find_runs(root: str | Path, depth: int = 3) -> list[RunState]:
    """List the runs in a directory and in the directories within it, `depth` levels down, in the
    order of their names. Directories inside a run are not searched."""
    found: list[RunState] = []
    level = [Path(root)]
    for _ in range(depth + 1):
        inner: list[Path] = []
        for path in level:
            state = run_state(path)
            if state is not None:
                found.append(state)
            else:
                inner += [
                    one for one in path.iterdir() if one.is_dir() and not one.name.startswith(".")
                ]
        level = inner
    return sorted(found, key=lambda one: str(one.directory))


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
