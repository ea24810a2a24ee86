"""fusedrl eval and reward-check: a model measured on prompts, and a reward tried before a run."""

from __future__ import annotations

import argparse
import inspect
import json
import math
import os
import sys
import threading
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from fusedrl.engine.base.errors import ConfigError, RewardError
from fusedrl.engine.cli.common import Parser, check_device, count, report_file, report_json
from fusedrl.engine.cli.devices import on_devices
from fusedrl.engine.cli.early import check_data, check_models, check_rewards
from fusedrl.engine.cli.models import (
    device_options,
    generation_of,
    load_actor,
    load_rewards,
    rows_option,
    sampling_options,
    some,
    stop_option,
    worker_options,
    workers_of,
)

if TYPE_CHECKING:
    from fusedrl.engine.actor import HybridActor
    from fusedrl.engine.parallel.ranks import Ranks
    from fusedrl.engine.watch.reward_check import Sample

_FOREVER = 1e9  # seconds
_SPEC = (
    "file.py:function, the directory of a reward model, or a ready reward such as exact_match or "
    "length:target=200"
)


def add_commands(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add the two subcommands. Parsed options run the command by `options.call(options)`."""
    _eval_options(commands)
    _check_options(commands)


# ---- eval ----------------------------------------------------------------------------------------
def _eval_options(commands: argparse._SubParsersAction[Parser]) -> None:
    text = "rewards, pass@k, win rate, KL and lengths of a model on prompts, with 95%% intervals"
    one = commands.add_parser("eval", help=text, allow_abbrev=False)
    one.set_defaults(call=_eval)
    one.add_argument("model", metavar="MODEL", help="directory or id of the model")
    one.add_argument(
        "--data", required=True, metavar="FILE", help="prompts, in any format that train reads"
    )
    one.add_argument(
        "--reward", required=True, action="append", metavar="SPEC", help=f"{_SPEC}; repeatable"
    )
    one.add_argument(
        "--reference",
        metavar="DIR",
        help="the model that KL and perplexity refer to (default: none)",
    )
    one.add_argument(
        "--against", metavar="DIR", help="another model, measured beside it, for the win rate"
    )
    one.add_argument(
        "--right",
        type=float,
        metavar="REWARD",
        help="for pass@k: from this reward on a completion is right (default: pass@k where every "
        "reward is 0 or 1)",
    )
    one.add_argument(
        "--n", type=count, default=1, help="completions of each prompt (default: %(default)s)"
    )
    rows_option(one)
    worker_options(one)
    sampling_options(one)
    stop_option(one)
    device_options(one, several=True)
    _json_option(one)


def _json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output-json",
        type=report_file,
        metavar="FILE",
        help='the figures; "-" is standard output, without the tables',
    )


def _eval(options: argparse.Namespace) -> None:
    if options.n > 1 and options.temperature == 0:
        raise ConfigError(
            f"eval: expected --n 1 at --temperature 0, where all completions of a prompt are the "
            f"same, got --n {options.n}"
        )
    if options.right is not None and not math.isfinite(options.right):
        raise ConfigError(f"eval: expected --right to be a number, got {options.right}")
    check_device(options.device)
    check_data([options.data])
    if options.place is None and options.devices == 1:
        check_rewards(options.reward, [options.data])
    check_models([options.model, options.reference, options.against])
    on_devices(options, partial(_evaluated, options))


def _evaluated(options: argparse.Namespace, ranks: Ranks) -> None:
    from fusedrl.engine.base.tables import show
    from fusedrl.engine.data.readers import load_prompts
    from fusedrl.engine.rewards.rewards import load_functions
    from fusedrl.engine.watch.evaluate import measure
    from fusedrl.engine.watch.standing import standing, standing_table, win_rate

    generation, functions = generation_of(options), load_functions(options.reward, options.data)
    everything = load_prompts(options.data)
    names = [options.model] + ([options.against] if options.against else [])
    actors = [load_actor(name, options, ranks) for name in names]
    reference = load_actor(options.reference, options, ranks) if options.reference else None
    readers = actors + ([reference] if reference is not None else [])
    if reference is not None:
        _check_reference(reference, actors, options.reference)
    rewards = {"reward": load_rewards(functions, options, actors, ranks)}
    examples = some(readers, everything, options)
    found = []
    for number, (name, actor) in enumerate(zip(names, actors, strict=True)):
        # request ids that differ, so that samples differ even if both models are the same
        ids = range(number * len(examples), (number + 1) * len(examples))
        found.append(
            measure(
                actor,
                reference,
                examples,
                rewards,
                generation,
                seed=options.seed,
                samples=options.n,
                request_ids=list(ids),
            )
        )
        actor.release_cache()
        _check_rewarded(found[-1].scores["reward"], name, options)
    rows = [standing(one, options.n, threshold=options.right) for one in found]
    if len(found) == 2:
        ours, theirs = (one.scores["reward"] for one in found)
        rows[0].rows["win_rate"] = win_rate(ours, theirs, options.n)
    if ranks.first:
        left = len(everything) - len(examples)
        told = {
            "models": [
                {"model": name} | row.to_json() for name, row in zip(names, rows, strict=True)
            ],
            "reference": options.reference,
            "data": options.data,
            "rewards": options.reward,
            "prompts": len(examples),
            "prompts_left_out": left,
            "samples": options.n,
            "temperature": options.temperature,
            "max_new_tokens": options.max_new_tokens,
            "seed": options.seed,
        }
        title = f"{len(examples)} prompts{f' of {len(everything)}' * bool(left)}, {options.n} each"
        report_json(
            told,
            options.output_json,
            lambda: show(standing_table(names, rows, title)),
        )


def _check_rewarded(scores: Sequence[float], name: str, options: argparse.Namespace) -> None:
    if all(map(math.isnan, scores)):
        raise RewardError(
            f"eval: expected rewards of the completions of {name}, and all {len(scores)} are None "
            f"or not finite; try it: fusedrl reward-check {options.reward[0]} --data "
            f"{options.data} --model {name}"
        )


def _check_reference(reference: HybridActor, actors: Sequence[HybridActor], name: str) -> None:
    if any(_words(actor) != _words(reference) for actor in actors):
        raise ConfigError(
            f"eval: expected the reference {name} to have the tokenizer of the models, since it "
            "scores the same tokens, and it has another; leave --reference out"
        )


def _words(actor: HybridActor) -> dict[str, int]:
    tokenizer: Any = actor.tokenizer
    return tokenizer.get_vocab()


# ---- reward-check --------------------------------------------------------------------------------
def _check_options(commands: argparse._SubParsersAction[Parser]) -> None:
    text = "try a reward on completions: its values, failures, time, ties, agreement with another"
    one = commands.add_parser("reward-check", help=text, allow_abbrev=False)
    one.set_defaults(call=_check)
    one.add_argument("reward", metavar="SPEC", help=_SPEC)
    one.add_argument(
        "--data",
        required=True,
        metavar="FILE",
        help="rows with answers, in any format that train reads (chosen and rejected, completion, "
        "...); with --model prompts",
    )
    one.add_argument("--model", metavar="DIR", help="try it on completions of this model")
    one.add_argument(
        "--tokenizer",
        metavar="DIR",
        help="for rewards that read token ids: the tokenizer for answers of the data",
    )
    one.add_argument("--against", metavar="SPEC", help="another reward, to compare with")
    one.add_argument(
        "--n",
        type=count,
        default=4,
        help="with --model: completions of each prompt (default: %(default)s)",
    )
    one.add_argument(
        "--batch", type=count, default=64, help="completions of one call (default: %(default)s)"
    )
    one.add_argument(
        "--timeout",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="of one call, which has failed then; 0: none (default: %(default)g)",
    )
    rows_option(one)
    worker_options(one, timeout=False)
    sampling_options(one)
    stop_option(one)
    device_options(one)
    _json_option(one)


def _check(options: argparse.Namespace) -> None:
    if not 0 <= options.timeout < math.inf:
        raise ConfigError(f"reward-check: expected --timeout >= 0, got {options.timeout:g}")
    if options.model and options.tokenizer:
        raise ConfigError("reward-check: --model has its own tokenizer; leave --tokenizer out")
    specs = [options.reward] + ([] if options.against is None else [options.against])
    check_device(options.device)
    check_data([options.data])
    check_rewards(specs, [options.data] if options.model else ())
    check_models([options.model])
    threads = set(threading.enumerate())
    from fusedrl.engine.base.tables import show
    from fusedrl.engine.rewards.rewards import load_functions, load_reward
    from fusedrl.engine.watch.reward_check import check_reward, check_tables

    # answered rows have columns of their own
    functions = load_functions(specs, *([options.data] if options.model else []))
    tokenizer, samples = _generated(options) if options.model else _given(options)
    workers = workers_of(options, options.timeout or _FOREVER)
    load = partial(load_reward, device=options.device, tokenizer=tokenizer, workers=workers)
    reward, *others = map(load, functions)
    against = others[0] if others else None
    for one in (reward, against):
        if tokenizer is None and one is not None and _reads_ids(one):
            raise ConfigError(
                f"reward-check: {one.name} reads token ids; say whose with --tokenizer DIR, or "
                "give --model DIR"
            )
    found = check_reward(
        reward,
        samples,
        against=against,
        batch=options.batch,
        limit=0.0 if workers.processes else options.timeout,  # of processes it is their own
    )

    def shown() -> None:
        for table in check_tables(found):
            show(table)

    report_json(found.to_json(), options.output_json, shown)
    late = any(kind.startswith("took longer") for kind in found.failures)
    if late and any(not one.daemon for one in set(threading.enumerate()) - threads):
        sys.stdout.flush()
        os._exit(0)  # Python would wait for a call that does not come to an end


def _reads_ids(reward: Any) -> bool:
    """Whether a reward is a function with a parameter for token ids, as far as its signature and,
    of a ready reward, its options tell."""
    function = getattr(getattr(reward, "reward", reward), "function", None)
    if function is None:
        return False
    inner, own = getattr(function, "function", function), getattr(function, "options", {})
    return "completion_ids" in inspect.signature(inner).parameters and (
        own.get("unit", "tokens") == "tokens"
    )


def _generated(options: argparse.Namespace) -> tuple[Any, list[Sample]]:
    """Return the tokenizer, and completions of the data's prompts by the model."""
    from fusedrl.engine.data.readers import load_prompts
    from fusedrl.engine.data.tokenize import encode_prompt
    from fusedrl.engine.rollout.rollout import params_of
    from fusedrl.engine.watch.reward_check import Sample

    generation, examples = generation_of(options), load_prompts(options.data)
    actor = load_actor(options.model, options)
    examples = some([actor], examples, options)
    ids = [encode_prompt(actor.tokenizer, e.prompt, e.columns.get("tools")) for e in examples]
    outs = actor.generate(ids, params_of(generation, n=options.n, seed=options.seed))
    actor.release_cache()
    return actor.tokenizer, [
        Sample(e.prompt, c.prompt_ids, c.text, c.token_ids, e.columns, number)
        for number, (e, group) in enumerate(zip(examples, outs, strict=True))
        for c in group
    ]


def _given(options: argparse.Namespace) -> tuple[Any, list[Sample]]:
    """Return the tokenizer, if there is one, and the data's own answers."""
    from fusedrl.engine.base.ordering import shuffled
    from fusedrl.engine.data.answered import load_answered
    from fusedrl.engine.data.tokenize import encode_completion, encode_prompt, end_of_text
    from fusedrl.engine.model.directories import resolve_directory
    from fusedrl.engine.model.weights import load_tokenizer
    from fusedrl.engine.watch.reward_check import Sample

    rows = load_answered(options.data)
    rows = [
        rows[index] for index in shuffled(len(rows), options.seed, "judge")[: options.rows or None]
    ]
    tokenizer, eos = None, -1
    if options.tokenizer is not None:
        tokenizer = load_tokenizer(resolve_directory(options.tokenizer))
        if tokenizer is None:
            raise ConfigError(f"reward-check: {options.tokenizer} has no tokenizer")
        eos = end_of_text(tokenizer, [])
    groups: dict[str, int] = {}
    samples = []
    for number, row in enumerate(rows):
        group = groups.setdefault(json.dumps(row.prompt, sort_keys=True), len(groups))
        prompt_ids = encode_prompt(tokenizer, row.prompt) if tokenizer is not None else []
        for place, text in enumerate(row.completions):
            ids = encode_completion(tokenizer, text, eos) if tokenizer is not None else []
            rank = row.ranks[place] if row.ranks else None
            samples.append(
                Sample(row.prompt, prompt_ids, text, ids, row.columns, group, rank, number)
            )
    return tokenizer, samples
