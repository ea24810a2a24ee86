"""fusedrl generate: completions of prompts, printed or in a file, or the best of several."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

from fusedrl.engine.base.errors import ConfigError
from fusedrl.engine.base.printable import printable
from fusedrl.engine.cli.common import check_device, count, output_file
from fusedrl.engine.cli.early import check_data, check_models, check_rewards
from fusedrl.engine.cli.models import (
    device_options,
    generation_of,
    load_actor,
    load_rewards,
    rows_option,
    sampling_options,
    stop_option,
    worker_options,
)

if TYPE_CHECKING:
    from fusedrl.engine.actor import HybridActor
    from fusedrl.engine.generation.sampler import SamplingParams


# ---- generate ------------------------------------------------------------------------------------
def generate_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `fusedrl generate` to the parser."""
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="directory or id of the model"
    )
    parser.add_argument(
        "--adapter", metavar="DIR", help="a LoRA adapter of that model, in PEFT's files"
    )
    of = parser.add_mutually_exclusive_group(required=True)
    of.add_argument("--prompt", action="append", metavar="TEXT", help="repeatable")
    of.add_argument(
        "--data",
        metavar="FILE",
        help="prompts, texts or messages, in any format that train reads; with --output",
    )
    rows_option(parser, "the first")
    parser.add_argument(
        "--output",
        type=output_file,
        metavar="FILE",
        help="of --data: JSON lines, one a completion, with the columns of its row; interrupted, "
        "the same command goes on",
    )
    parser.add_argument(
        "--logprobs", action="store_true", help="of --data: the tokens and their log-probabilities"
    )
    sampling_options(parser)
    parser.add_argument(
        "--greedy", action="store_true", help="the likeliest token every time: temperature 0"
    )
    stop_option(parser)
    parser.add_argument(
        "--n", type=count, default=1, help="completions of each prompt (default: %(default)s)"
    )
    parser.add_argument(
        "--best_of",
        type=count,
        metavar="N",
        help="of N completions of each prompt print the one that --reward scores highest",
    )
    parser.add_argument(
        "--reward",
        action="append",
        metavar="SPEC",
        help="of --best_of: file.py:function, a reward model or a ready reward; repeatable",
    )
    worker_options(parser)
    device_options(parser)


def run_generate(options: argparse.Namespace) -> None:
    """Run `fusedrl generate`."""
    _check_best_of(options)
    _check_output(options)
    check_device(options.device)
    check_data([options.data])
    check_rewards(options.reward or (), ())
    check_models([options.model])
    from fusedrl.engine.rollout.rollout import params_of

    if options.greedy:
        options.temperature = 0.0
    params = params_of(generation_of(options), n=options.n, seed=options.seed)
    functions: Sequence[Any] = ()
    if options.reward is not None:
        from fusedrl.engine.rewards.rewards import load_functions

        functions = load_functions(options.reward)
    actor = load_actor(options.model, options)
    if options.adapter is not None:
        actor.load_adapter(options.adapter)
    if options.best_of is not None:
        _generate_best(actor, options, functions)
        return
    if options.data is not None:
        _generate_file(actor, options, params)
        return
    for prompt, sample, completion in actor.stream(options.prompt, params):
        label = (
            f"[prompt {prompt + 1}, sample {sample + 1}, {completion.finish_reason}]\n"
            if len(options.prompt) * options.n > 1
            else ""
        )
        text = actor.tokenizer.decode(
            [*completion.prompt_ids, *completion.token_ids], skip_special_tokens=True
        )  # together: parts may lose a space
        if sys.stdout.isatty():
            text = printable(text)
        print(f"{label}{text}", flush=True)


def _check_best_of(options: argparse.Namespace) -> None:
    """Raise ConfigError if --best_of contradicts another option of `generate`."""
    if (options.best_of is None) is not (options.reward is None):
        raise ConfigError(
            "generate: expected --best_of N together with --reward SPEC, which says what is best; "
            "got one of them alone"
        )
    if options.best_of is not None and (
        options.n != 1 or options.greedy or options.temperature == 0
    ):
        raise ConfigError(
            f"generate: expected --best_of {options.best_of} without --n (of each prompt one is "
            "printed) and with a temperature above 0 "
            "(greedy completions are all the same); leave --n, --greedy and --temperature 0 out"
        )


def _check_output(options: argparse.Namespace) -> None:
    """Raise ConfigError if --data and --output do not fit together, or the output exists."""
    if (options.data is None) is not (options.output is None) or options.output == "-":
        raise ConfigError(
            "generate: expected --data FILE together with --output FILE, which the completions go "
            f"to; got --data {options.data} and --output {options.output}"
        )
    if options.data is None and (options.logprobs or options.rows):
        name = "--logprobs" if options.logprobs else "--rows"
        raise ConfigError(f"generate: {name} is for --data and --output")
    if options.data is not None and options.best_of is not None:
        raise ConfigError(
            "generate: --best_of is for --prompt; for the best completions of a file write all by "
            "--n, or see fusedrl train rejection"
        )
    if options.output is not None and Path(options.output).exists():
        raise ConfigError(f"{options.output} exists; name another file, or remove it first")


def _generate_file(actor: HybridActor, options: argparse.Namespace, params: SamplingParams) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from fusedrl.engine.config.base import require
    from fusedrl.engine.data.readers import load_prompts
    from fusedrl.engine.rollout.prompts import check_stop_tokens
    from fusedrl.engine.rollout.to_file import encode_all, generate_to_file

    check_stop_tokens("--stop_token_ids", options.stop_token_ids, actor.decoder.config)
    positions = actor.decoder.config.max_positions
    room = positions - options.max_new_tokens
    require(room >= 1, "--max_new_tokens", f"below the model's {positions} positions", positions)
    examples = load_prompts(options.data)[: options.rows or None]
    ids, longer = encode_all(actor, examples, room)
    settings = _settings(actor, options, ids, params)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True)
    with Progress(
        *columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("prompts", total=len(ids))
        try:
            found = generate_to_file(
                actor,
                examples,
                ids,
                params,
                options.output,
                settings,
                logprobs=options.logprobs,
                told=lambda done, tokens: bar.update(
                    task, completed=done, description=f"prompts ({tokens:,} tokens)"
                ),
            )
        except KeyboardInterrupt:
            print(
                f"fusedrl: what is done is in {options.output}.part; the same command goes on",
                file=sys.stderr,
            )
            raise
    print(
        f"{options.output}: {found.completions} completions of {found.prompts} prompts"
        + (f" ({found.resumed} were there)" if found.resumed else "")
        + (f"; {longer} prompts of more than {room} tokens were left out" if longer else "")
        + f"; {found.tokens:,} tokens in {found.seconds:.1f} s"
    )


def _settings(
    actor: HybridActor,
    options: argparse.Namespace,
    ids: Mapping[int, list[int]],
    params: SamplingParams,
) -> dict[str, Any]:
    """Return all that decides the completions."""
    from fusedrl.engine.model.directories import resolve_directory
    from fusedrl.engine.rollout.to_file import sampling_settings, weights_of

    paths = [path for path in (options.model, options.adapter) if path is not None]
    return {
        "model": options.model,
        "weights": [weights_of(resolve_directory(path)) for path in paths],
        "adapter": options.adapter,
        "prompts": crc32(json.dumps(sorted(ids.items())).encode()),
        "dtype": str(actor.decoder.dtype),
        "logprobs": options.logprobs,
    } | sampling_settings(params)


def _generate_best(
    actor: HybridActor, options: argparse.Namespace, functions: Sequence[Any]
) -> None:
    from fusedrl.engine.data.records import PromptExample
    from fusedrl.engine.rollout.best_of_n import best_of_n

    found = best_of_n(
        actor,
        [PromptExample(prompt) for prompt in options.prompt],
        load_rewards(functions, options, [actor]),
        options.best_of,
        generation_of(options),
        options.seed,
    )
    for number, one in enumerate(found):
        text = actor.tokenizer.decode(
            [*one.best.prompt_ids, *one.best.token_ids], skip_special_tokens=True
        )
        print(
            f"[prompt {number + 1}, best of {options.best_of}, score {one.score:.4g}, "
            f"{one.best.finish_reason}]\n{text}",
            flush=True,
        )
