"""The page itself: what it says of each run, and one file with all that a browser needs.

Its Content-Security-Policy names the three pieces of style and script by their digests and forbids
everything else: nothing that stands in a sample can run, and nothing is loaded. All text is escaped
by the template.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from datetime import datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusedrl.engine.base.errors import ConfigError
from fusedrl.engine.runs.files import write_file
from fusedrl.engine.watch.page.charts import REST, Points, charts
from fusedrl.engine.watch.page.texts import prompts_of
from fusedrl.engine.watch.run_files import RunRecord, config_differences
from fusedrl.engine.watch.run_report import final_values, shown_metrics, unit_of

if TYPE_CHECKING:
    from jinja2 import Template

HERE = Path(__file__).resolve().parent
NONE = "-"  # in place of a number
LIBRARY = "1.6.32"  # the version of uPlot in uplot/
# what a run's card says first: metric, its name there, and whether its first value is said
FACTS = (
    ("reward", "reward", True),
    ("eval_reward", "held-out reward", True),
    ("gold/*", "gold reward", True),
    ("accuracy", "accuracy", True),
    ("eval_accuracy", "held-out accuracy", True),
    ("kl", "KL", False),
    ("completions/mean_length", "length", True),
    ("loss", "loss", True),
    ("eval_loss", "held-out loss", True),
    ("tokens_per_s", "tokens/s", False),
)


def write_page(runs: Sequence[RunRecord], path: Path, *, live: float = 0) -> None:
    """Write the page of some runs, replacing the file atomically.

    Args:
        live: seconds until the page loads itself again; 0 for never.
    Raises:
        ConfigError: the path is a directory, or in a directory that does not exist.
        OSError: the file cannot be written.
    """
    if path.is_dir() or not path.parent.is_dir():
        what = "is a directory" if path.is_dir() else f"{path.parent} does not exist"
        raise ConfigError(f"expected a file to write the page to, got {path}: {what}")
    text = page(runs, live=live).encode("utf-8", "replace")
    try:
        write_file(path, text)
    except OSError as error:
        error.filename = str(path)  # not that of the file beside it, which is written first
        raise


def page(runs: Sequence[RunRecord], *, live: float = 0, made: datetime | None = None) -> str:
    """Return the page as HTML.

    Args:
        live: as in `write_page`.
        made: time of the page; if None, now.
    """
    made = made or datetime.now().astimezone()
    points = Points()
    groups, left_out = charts(runs, points)
    drawn = [chart for some in groups.values() for chart in some]
    for index, chart in enumerate(drawn):
        chart["index"] = index
    calibrated = []
    for index, run in enumerate(runs):
        if run.calibration is not None:
            report = _calibration(run.calibration, index, len(drawn))
            drawn.append(_calibration_chart(run, index, points))
            calibrated.append((run, report))
    data = {
        "made": made.timestamp(),
        "live": live,
        "runs": [{"name": run.name, "alarms": [a.step for a in run.alarms]} for run in runs],
        "steps": points.steps,
        "charts": drawn,
    }
    prompts, prompt_count = prompts_of(runs)
    style, library, script = _parts()
    html = _template().render(
        runs=runs,
        title=f"Run {runs[0].name}" if len(runs) == 1 else f"{len(runs)} runs side by side",
        made=made,
        live=live,
        version=version("fusedrl"),
        uplot=LIBRARY,
        licence=_read("uplot/LICENSE"),
        policy=_policy(style, [library, script]),
        style=style,
        library=library,
        script=script,
        data=_json(data),
        groups=groups,
        rest=REST,
        left_out=left_out,
        thinned=points.thinned,
        anyheld=any(chart["held"] for chart in drawn),
        anyalarm=any(run.alarms for run in runs),
        finals=[final_values(run) for run in runs],
        shown=shown_metrics(runs),
        prompts=prompts,
        prompt_count=prompt_count,
        calibrated=calibrated,
        differences=config_differences(runs),
        facts=_facts,
        progress=_progress,
        duration=duration,
        number=_number,
        unit=unit_of,
        text=lambda value: json.dumps(value, ensure_ascii=False),
    )
    return html.replace("\0", "\ufffd")


# ---- the file's parts ----------------------------------------------------------------------------
@cache
def _read(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


@cache
def _parts() -> tuple[Any, Any, Any]:
    """Return style, library and script, not to be escaped: they are ours."""
    from markupsafe import Markup

    return (
        Markup(_read("uplot/uPlot.min.css") + _read("page.css")),
        Markup(_read("uplot/uPlot.iife.min.js")),
        Markup(_read("page.js")),
    )


@cache
def _template() -> Template:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined
    ).get_template("page.html")


def _policy(style: str, scripts: Iterable[str]) -> str:
    digests = [
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
        for text in (style, *scripts)
    ]
    return (
        f"default-src 'none'; style-src {digests[0]}; script-src {' '.join(digests[1:])}; "
        "base-uri 'none'; form-action 'none'"
    )


def _json(data: Any) -> Any:
    """Return JSON that is safe within a script element."""
    from markupsafe import Markup

    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


# ---- what is said of a run -----------------------------------------------------------------------
def _facts(run: RunRecord) -> list[tuple[str, str, str]]:
    """List (label, value, note) of what a reader looks for first."""
    finals, found = final_values(run), []
    for pattern, label, with_first in FACTS:
        for name, final in finals.items():
            if name != pattern and not (pattern.endswith("*") and name.startswith(pattern[:-1])):
                continue
            note = f"from {_number(final.first)}" if with_first and final.count > 1 else ""
            if name == "kl" and (target := (run.config or {}).get("kl.target")) is not None:
                note = f"target {target}"
            found.append((label, _number(final.last), note))
    return found[:6]


def _progress(run: RunRecord) -> str:
    if not run.series:
        return "no steps"
    of = f" of {run.total:,}" if run.total is not None else ""
    return f"{run.steps:,}{of} step{'' if run.steps == 1 and not of else 's'}"


def duration(seconds: float) -> str:
    """Return a time in words, such as "1 h 5 min"."""
    minutes, hours = round(seconds / 60), int(seconds // 3600)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if hours == 0 else f"{hours} h {minutes - 60 * hours} min"


def _number(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return NONE
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"


# ---- calibration ---------------------------------------------------------------------------------
def _calibration(report: dict[str, Any], index: int, chart: int) -> dict[str, Any]:
    def percent(name: str) -> str:
        value = report.get(name)
        return f"{value:.1%}" if isinstance(value, int | float) else NONE

    def plain(name: str) -> str:
        value = report.get(name)
        return f"{value:.3g}" if isinstance(value, int | float) else NONE

    facts = [
        (
            "accuracy, 95% interval",
            f"{percent('accuracy')} ({percent('accuracy_low')} to {percent('accuracy_high')})",
        ),
        ("accuracy that it expects", percent("confidence")),
        ("calibration error", percent("ece")),
        ("Brier score; a coin's is 0.25", plain("brier")),
        ("temperature of the least loss", plain("temperature")),
        ("correlation with length", plain("length_correlation")),
        ("held-out pairs", plain("pairs")),
    ]
    return {"bins": report["bins"], "facts": facts, "index": index, "chart": chart}


def _calibration_chart(run: RunRecord, index: int, points: Points) -> dict[str, Any]:
    bins = sorted((run.calibration or {})["bins"], key=lambda one: one["predicted"])
    points.steps.append([one["predicted"] for one in bins])
    line = {
        "run": index,
        "name": run.name,
        "held": True,
        "x": len(points.steps) - 1,
        "y": [one["observed"] for one in bins],
    }
    return {
        "title": f"Calibration of {run.name}",
        "names": ["observed"],
        "unit": "",
        "about": "",
        "lines": [line],
        "targets": [],
        "held": True,
        "calibration": True,
    }
