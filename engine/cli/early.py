"""Checks of what names, files and options tell: before torch is loaded, and long before a model is.
What they refuse would be refused later with the same words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fusedrl.engine.base.errors import ConfigError
from fusedrl.engine.config.base import StageConfig

_ROWS = (".jsonl", ".json", ".csv", ".tsv", ".gz", ".parquet", ".arrow", ".feather")


def check_run(config: StageConfig, *, functions: bool = True) -> None:
    """Check what a run names: its directory, models, data, rewards and loggers. The functions that
    were imported for it are handed to the run.

    Args:
        functions: import rewards and loggers as well.
    Raises:
        ConfigError, DataError, RewardError, SetupError, FileNotFoundError: as the run itself.
    """
    from fusedrl.engine.runs.files import check_new_run
    from fusedrl.engine.runs.loggers import check_loggers
    from fusedrl.engine.runs.names import check_metrics

    run = config.run
    check_metrics("run.columns", [one.strip() for one in run.columns.split(",") if one.strip()])
    # a metric of a user's own is known at the first step, except where it is an evaluation's
    best = run.keep_best.removeprefix("min:").removeprefix("max:")
    check_metrics("run.keep_best", [best] if best.startswith("eval") else [])
    check_new_run(run.dir, resume=run.resume, restart=run.restart)
    parts = [config, *(getattr(config, name, None) for name in ("critic", "ptx", "evaluation"))]
    named = ("model", "reference_model")
    models = [getattr(part, name, None) for part in parts for name in named]
    data = [getattr(part, "data", None) for part in parts]
    if functions:
        check_loggers(run.loggers)
    _check_swapped(config.model, config.data)
    check_data(data)
    if not functions:
        check_models(models)
        return
    judged = [config.data, getattr(getattr(config, "evaluation", None), "data", None)]
    rewards = (*getattr(config, "reward", ()), *getattr(config, "monitor_reward", ()))
    check_rewards(rewards, judged)
    _check_environment(config)
    check_models(models)


def _check_environment(config: Any) -> None:
    """Load the environment or the tools of a run. Errors are those of `Host` and `load_tool`."""
    if not getattr(config, "plays", False):
        return
    from fusedrl.engine.rewards.hosted import Host
    from fusedrl.engine.rewards.tools import load_tool, parser_of

    if config.environment is not None:
        Host({"environment": config.environment})
    for tool in config.tools:
        load_tool(tool)
    parser_of(config.turns.tool_parser)


def check_models(paths: Iterable[str | None]) -> None:
    """Raise FileNotFoundError for a path that is no model's directory, and no id of the hub. Of an
    id config.json is fetched, with one attempt."""
    from fusedrl.engine.model.directories import local_directory, no_model, resolve_config

    for path in filter(None, paths):
        directory = local_directory(path)
        if directory is None:
            resolve_config(path)
        elif not (directory / "config.json").is_file():
            raise FileNotFoundError(no_model(directory))


def check_data(data: Iterable[Any]) -> None:
    """Raise DataError or FileNotFoundError for a source that is no file of a kind that is read, or
    that is written in a way that cannot be."""
    from fusedrl.engine.data.rows import check_source
    from fusedrl.engine.data.sources import parse_data

    for one in filter(bool, data):
        for source in parse_data(one):
            check_source(source)


def check_rewards(specs: Sequence[str], data: Iterable[Any]) -> None:
    """Load the reward functions, and check that the data has the columns that they need; a data set
    of the hub is not read for it. Errors are those of `load_ahead`."""
    from fusedrl.engine.data.sources import parse_data
    from fusedrl.engine.rewards.functions import load_ahead

    here = [one for one in filter(None, data) if not any(s.of_hub for s in parse_data(one))]
    load_ahead(list(map(str, specs)), *here)


def _check_swapped(model: str, data: Any) -> None:
    """Raise ConfigError if a file of rows is given as the model, and a model as the data."""
    if not isinstance(data, str) or not Path(model).is_file() or not Path(data).is_dir():
        return
    if Path(model).suffix in _ROWS and (Path(data) / "config.json").is_file():
        raise ConfigError(
            f"config: model and data are swapped: {model} is a file, and {data} is the directory "
            f"of a model; write --model {data} --data {model}"
        )
