"""fusedrl chat: its options, and the function that runs it."""

from __future__ import annotations

import argparse
import sys

from fusedrl.engine.base.errors import ConfigError
from fusedrl.engine.cli.common import Parser, check_device
from fusedrl.engine.cli.early import check_models
from fusedrl.engine.cli.models import (
    device_options,
    generation_of,
    load_actor,
    sampling_options,
    stop_option,
)


def chat_options(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add the subcommand. Parsed options run it by `options.call(options)`."""
    text = "talk to a model, or to two side by side; messages from standard input, one a line"
    one = commands.add_parser("chat", help=text, description=text, allow_abbrev=False)
    one.set_defaults(call=_chat)
    one.add_argument("model", nargs="?", metavar="MODEL", help="directory or id of the model")
    one.add_argument("--a", metavar="DIR", help="in place of MODEL: one of two models")
    one.add_argument("--b", metavar="DIR", help="the other one")
    one.add_argument("--adapter", metavar="DIR", help="a LoRA adapter of MODEL, in PEFT's files")
    one.add_argument("--system", default="", metavar="TEXT", help="the system message")
    sampling_options(one, max_new_tokens=512)
    stop_option(one)
    device_options(one)


def _chat(options: argparse.Namespace) -> None:
    paths = [path for path in (options.model, options.a, options.b) if path is not None]
    if len(paths) != (1 if options.model is not None else 2):
        raise ConfigError(
            "chat: expected MODEL, or --a DIR and --b DIR for two models side by side, got "
            f"{' and '.join(paths) or 'none of these'}"
        )
    if options.adapter is not None and options.model is None:
        raise ConfigError("chat: --adapter belongs to MODEL; give --a and --b merged models")
    check_device(options.device)
    check_models(paths)
    from fusedrl.engine.rollout.rollout import params_of
    from fusedrl.engine.tools.chat import Chat, Speaker

    params = params_of(generation_of(options), n=1, seed=options.seed)
    actors = [load_actor(path, options) for path in paths]
    if options.adapter is not None:
        actors[0].load_adapter(options.adapter)
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):  # a byte that is no text is shown as such
            stream.reconfigure(encoding="utf-8", errors="replace")
    if sys.stdin.isatty():
        import readline  # noqa: F401 - lines are edited and remembered
    speakers = [
        Speaker(actor, path, options.system) for actor, path in zip(actors, paths, strict=True)
    ]
    Chat(speakers, params, options.system).run()
