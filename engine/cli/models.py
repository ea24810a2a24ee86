"""Options and steps that several commands share which sample from models: generate, chat, judge,
eval, reward-check."""

from __future__ import annotations

import argparse
import atexit
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from fusedrl.engine.base.errors import ConfigError
from fusedrl.engine.cli.common import count, count_or_none

if TYPE_CHECKING:
    from fusedrl.engine.actor import HybridActor
    from fusedrl.engine.config import GenerationConfig
    from fusedrl.engine.data.records import PromptExample
    from fusedrl.engine.parallel.ranks import Ranks
    from fusedrl.engine.rewards.pool import Workers
    from fusedrl.engine.rewards.rewards import RewardSet


def sampling_options(parser: argparse.ArgumentParser, *, max_new_tokens: int = 256) -> None:
    """Add the options of how to sample."""
    parser.add_argument(
        "--max_new_tokens",
        type=int,
        default=max_new_tokens,
        help="longest completion (default: %(default)s)",
    )
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="divides the logits (default: %(default)s)"
    )
    parser.add_argument(
        "--top_p",
        type=float,
        default=1.0,
        help="keep the smallest set of this probability (default: all)",
    )
    parser.add_argument(
        "--top_k", type=int, default=0, help="keep the k likeliest tokens (default: all)"
    )
    parser.add_argument(
        "--min_p",
        type=float,
        default=0.0,
        help="keep tokens at least this fraction as probable as the likeliest (default: all)",
    )
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")


def stop_option(parser: argparse.ArgumentParser) -> None:
    """Add the option of further stop tokens."""
    parser.add_argument(
        "--stop_token_ids",
        type=int,
        nargs="*",
        default=[],
        help="ids that end a completion besides the model's own EOS",
    )


def device_options(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """Add the options of where to compute, with `several` those of several devices, too."""
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16"),
        help="auto: float32 on CPU, bfloat16 on CUDA",
    )
    parser.add_argument("--device", help="cpu or cuda (default: the best there is)")
    if several:
        parser.add_argument(
            "--devices",
            type=count,
            default=1,
            metavar="N",
            help="divide the work among N devices of this machine (default: %(default)s)",
        )
        parser.add_argument("--place", help=argparse.SUPPRESS)


def rows_option(parser: argparse.ArgumentParser, which: str = "drawn by the seed") -> None:
    """Add the option of how many rows of the data to use."""
    parser.add_argument(
        "--rows",
        type=count_or_none,
        default=0,
        metavar="N",
        help=f"use at most so many rows of --data, {which}; 0: all (default: all)",
    )


def generation_of(options: argparse.Namespace) -> GenerationConfig:
    """Return the options of sampling. Raise ConfigError, with the names of the command line, if one
    is out of range."""
    from fusedrl.engine.config import GenerationConfig

    try:
        return GenerationConfig(
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            min_p=options.min_p,
            stop_token_ids=tuple(options.stop_token_ids),
        )
    except ConfigError as error:
        said = str(error).replace("config: ", f"{options.command}: ", 1)
        raise ConfigError(said.replace("generation.", "--", 1)) from error


def load_actor(path: str, options: argparse.Namespace, ranks: Ranks | None = None) -> HybridActor:
    """Load a model that reads and writes texts. Raise DataError if it has no tokenizer."""
    from fusedrl.engine.actor import HybridActor
    from fusedrl.engine.data.tokenize import no_tokenizer

    actor = HybridActor.from_pretrained(path, dtype=options.dtype, device=options.device)
    if actor.tokenizer is None:
        raise no_tokenizer()
    if ranks is not None:
        actor.ranks = ranks
    return actor


def worker_options(parser: argparse.ArgumentParser, *, timeout: bool = True) -> None:
    """Add the options of worker processes for reward functions. `timeout`: whether the command has
    no time limit of its own."""
    parser.add_argument(
        "--reward_workers",
        type=count_or_none,
        default=0,
        metavar="N",
        help="worker processes that call reward functions, one completion at a time (default: "
        "none, and functions are called in this process)",
    )
    if timeout:
        parser.add_argument(
            "--reward_timeout",
            type=float,
            default=60.0,
            metavar="SECONDS",
            help="of one call in a worker process (default: %(default)g)",
        )


def workers_of(options: argparse.Namespace, seconds: float) -> Workers:
    """Return the worker processes of a command, which end with it."""
    from fusedrl.engine.rewards.pool import Workers

    if not seconds > 0:
        raise ConfigError(
            f"{options.command}: expected --reward_timeout above 0 seconds, got {seconds:g}"
        )
    workers = Workers(options.reward_workers, seconds)
    atexit.register(workers.close)
    return workers


def load_rewards(
    specs: Sequence[Any],
    options: argparse.Namespace,
    actors: Sequence[HybridActor],
    ranks: Ranks | None = None,
) -> RewardSet:
    """Load rewards of completions of all these models, from what `load_functions` returned before
    the models were loaded. If their tokenizers differ, a reward model reads the texts."""
    from fusedrl.engine.parallel.ranks import ALONE
    from fusedrl.engine.rewards.rewards import RewardSet, load_reward

    first: Any = actors[0].tokenizer
    same = all(first.get_vocab() == other.tokenizer.get_vocab() for other in actors[1:])
    load = partial(
        load_reward,
        device=actors[0].decoder.device,
        tokenizer=first if same else None,
        workers=workers_of(options, options.reward_timeout),
    )
    return RewardSet(list(map(load, specs)), ranks=ALONE if ranks is None else ranks)


def some(
    actors: Sequence[HybridActor], examples: list[PromptExample], options: argparse.Namespace
) -> list[PromptExample]:
    """Return the prompts that all models can complete, at most `options.rows` of them, drawn by
    the seed.

    Raises:
        ConfigError: a model cannot generate so many new tokens, or has no such stop token.
        DataError: all prompts are too long.
    """
    from fusedrl.engine.base.ordering import shuffled
    from fusedrl.engine.config.base import require
    from fusedrl.engine.data.tokenize import encode_prompts
    from fusedrl.engine.rollout.prompts import check_stop_tokens

    for actor in actors:
        positions = actor.decoder.config.max_positions
        check_stop_tokens("--stop_token_ids", options.stop_token_ids, actor.decoder.config)
        require(
            positions > options.max_new_tokens,
            "--max_new_tokens",
            f"below the model's {positions} positions",
            options.max_new_tokens,
        )
        kept, _ = encode_prompts(actor.tokenizer, examples, positions - options.max_new_tokens)
        examples = [example for example, _ in kept]
    return [
        examples[index]
        for index in shuffled(len(examples), options.seed, "judge")[: options.rows or None]
    ]
