"""fusedrl data: what becomes of the first rows of a file or data set."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fusedrl.engine.base.errors import ConfigError
from fusedrl.engine.cli.common import Parser, count, count_or_none, output_file, report_json
from fusedrl.engine.cli.early import check_data, check_models
from fusedrl.engine.config.algorithms import ALGORITHMS

if TYPE_CHECKING:
    from fusedrl.engine.data.sources import Source
    from fusedrl.engine.tools.preview import Wanted

_STAGES = ("sft", "reward", "dpo", "kto", "rejection", *ALGORITHMS)


def add_commands(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add the subcommand. Parsed options run it by `options.call(options)`."""
    data = commands.add_parser(
        "data",
        help="what becomes of the first rows of data: format, lengths, what is trained on",
        allow_abbrev=False,
    )
    data.set_defaults(call=_preview)
    data.add_argument(
        "data", metavar="FILE", help="as --data of train: a file, hf:ID:SPLIT, or several"
    )
    data.add_argument(
        "--model", metavar="DIR", help="counts tokens and renders the chat template with this model"
    )
    data.add_argument(
        "--map",
        action="append",
        default=[],
        metavar="OURS=THEIRS",
        help='a column under another name, such as prompt=question; "image=" leaves one out; '
        "repeatable",
    )
    data.add_argument(
        "--stage",
        choices=_STAGES,
        metavar="STAGE",
        help="read as this stage of train does (default: as the format's first kind of record)",
    )
    data.add_argument(
        "--every_turn", action="store_true", help="as sft does with every_turn: whole conversations"
    )
    data.add_argument(
        "--rows", type=count_or_none, default=1000, help="rows to read; 0: all (default: 1000)"
    )
    data.add_argument(
        "--show", type=count_or_none, default=2, help="examples to show (default: %(default)s)"
    )
    data.add_argument(
        "--max_length",
        type=count,
        metavar="TOKENS",
        help="as max_length of the stage, or max_prompt_length (default: what fits the model)",
    )
    data.add_argument(
        "--max_new_tokens",
        type=count,
        default=64,
        metavar="TOKENS",
        help="as generation.max_new_tokens: room that prompts leave (default: %(default)s)",
    )
    data.add_argument(
        "--output-json",
        type=output_file,
        metavar="FILE",
        help='the same as JSON; "-" is standard output, without the tables',
    )


def _preview(options: argparse.Namespace) -> None:
    sources = _sources(options.data, options.map)
    if options.model is None and options.max_length is not None:
        raise ConfigError("data: --max_length counts tokens, which needs a tokenizer; add --model")
    _check_turns(options.stage, options.every_turn)
    check_models([options.model])
    check_data(sources)
    from fusedrl.engine.tools.preview import load_model, preview, print_preview

    model = None if options.model is None else load_model(options.model)
    found = [preview(source, _wanted(source, options), model) for source in sources]

    def show() -> None:
        for one in found:
            print_preview(one)

    report_json([one.to_json() for one in found], options.output_json, show)


def _sources(data: str, columns: list[str]) -> list[Source]:
    """Return the sources, each with the columns of --map besides its own."""
    from fusedrl.engine.data.sources import parse_data

    given: dict[str, str] = {}
    for entry in columns:
        ours, equals, theirs = entry.partition("=")
        if not equals or not ours:
            raise ConfigError(
                f"data: expected --map OURS=THEIRS, such as prompt=question, got {entry!r}"
            )
        given[ours] = theirs
    return [replace(source, columns={**source.columns, **given}) for source in parse_data(data)]


def _check_turns(stage: str | None, every_turn: bool) -> None:
    if every_turn and stage not in (None, "sft"):
        raise ConfigError(f"data: --every_turn is one of sft, not of {stage}; leave it out")


def _wanted(source: Source, options: argparse.Namespace) -> Wanted:
    from fusedrl.engine.tools.preview import Wanted

    return Wanted(
        _kind(source, options.stage, options.every_turn),
        options.rows,
        options.show,
        options.max_length,
        options.max_new_tokens,
        soft_labels=options.stage == "dpo",
    )


def _kind(source: Source, stage: str | None, every_turn: bool) -> Any:
    """Return the type of record that a stage reads from a source; None without a stage."""
    from fusedrl.engine.data import records
    from fusedrl.engine.preference.answers import is_unpaired
    from fusedrl.engine.preference.comparisons import is_ranked

    if every_turn:
        return records.Dialogue
    if stage == "reward":
        return records.RankedExample if is_ranked(source) else records.PairExample
    if stage == "kto":
        return records.UnpairedExample if is_unpaired(source) else records.PairExample
    kinds = {None: None, "sft": records.Demonstration, "dpo": records.PairExample}
    return kinds.get(stage, records.PromptExample)
