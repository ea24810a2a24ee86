"""fusedrl judge: its options, and the function that shows what came of it."""

from __future__ import annotations

import argparse
from functools import partial
from typing import TYPE_CHECKING

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
)

if TYPE_CHECKING:
    from fusedrl.engine.actor import HybridActor
    from fusedrl.engine.data.readers import PromptExample
    from fusedrl.engine.generation.sampler import SamplingParams
    from fusedrl.engine.parallel.ranks import Ranks
    from fusedrl.engine.watch.judge import Answers


def judge_options(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add the subcommand. Parsed options run the command by `options.call(options)`."""
    judge = commands.add_parser(
        "judge",
        help="the completions of two models against each other, each pair in both orders",
        allow_abbrev=False,
    )
    judge.set_defaults(call=_judge)
    judge.add_argument("--a", required=True, metavar="DIR", help="directory or id of a model")
    judge.add_argument("--b", required=True, metavar="DIR", help="directory or id of the other")
    judge.add_argument(
        "--data", required=True, metavar="FILE", help="prompts, in any format that train reads"
    )
    by = judge.add_mutually_exclusive_group(required=True)
    by.add_argument(
        "--judge",
        metavar="FILE.py:FUNCTION",
        help='judge(prompts, a, b, **columns) -> list of "a", "b", "tie" or probabilities of a',
    )
    by.add_argument(
        "--reward",
        action="append",
        metavar="SPEC",
        help="file.py:function, a reward model or a ready reward: the higher score wins; "
        "repeatable, then their sum",
    )
    worker_options(judge)
    judge.add_argument(
        "--n", type=count, default=1, help="pairs of each prompt (default: %(default)s)"
    )
    rows_option(judge)
    sampling_options(judge)
    stop_option(judge)
    device_options(judge, several=True)
    judge.add_argument(
        "--output-json",
        type=report_file,
        metavar="FILE",
        help='the figures; "-" is standard output, without the table',
    )


def _judge(options: argparse.Namespace) -> None:
    check_device(options.device)
    check_data([options.data])
    if options.judge is None:
        check_rewards(options.reward, [options.data])
        check_models([options.a, options.b])
    on_devices(options, partial(_judged, options))


def _judged(options: argparse.Namespace, ranks: Ranks) -> None:
    from fusedrl.engine.base.tables import show
    from fusedrl.engine.data.readers import load_prompts
    from fusedrl.engine.rewards.rewards import load_functions
    from fusedrl.engine.rollout.rollout import params_of
    from fusedrl.engine.watch.judge import (
        Pairs,
        RewardJudge,
        judge_pairs,
        load_judge,
        report_table,
    )

    params = params_of(generation_of(options), n=options.n, seed=options.seed)
    given = load_judge(options.judge) if options.judge is not None else None
    functions = load_functions(options.reward or [], options.data)
    examples = load_prompts(options.data)
    if given is not None:
        given.check(examples[0].columns)
    actors = [load_actor(path, options, ranks) for path in (options.a, options.b)]
    by_reward = given is None
    judge = given or RewardJudge(load_rewards(functions, options, actors, ranks))
    examples = some(actors, examples, options)
    total = len(examples)
    # request ids that differ, so that samples differ even if both models are the same
    (prompt_ids, a), (_, b) = (
        _answers(actor, examples, params, range(number * total, (number + 1) * total))
        for number, actor in enumerate(actors)
    )
    owners = [index for index in range(total) for _ in range(options.n)]
    columns = {
        name: [examples[index].columns[name] for index in owners] for name in examples[0].columns
    }
    pairs = Pairs([examples[index].prompt for index in owners], prompt_ids, a, b, columns)
    work = partial(judge_pairs, judge, pairs, owners)
    # every rank scores its part, and a function judges all in one call
    found = work() if by_reward else ranks.once("verdicts", work)
    if ranks.first and found is not None:
        report_json(
            found.to_json(),
            options.output_json,
            lambda: show(report_table(found, (options.a, options.b))),
        )


def _answers(
    actor: HybridActor, examples: list[PromptExample], params: SamplingParams, request_ids: range
) -> tuple[list[list[int]], Answers]:
    """Generate completions of every prompt. Return, for each completion, the token ids of its
    prompt; and all completions."""
    from fusedrl.engine.data.tokenize import encode_prompts
    from fusedrl.engine.watch.judge import Answers

    room = actor.decoder.config.max_positions
    prompt_ids = [ids for _, ids in encode_prompts(actor.tokenizer, examples, room)[0]]
    outs = actor.generate(prompt_ids, params, request_ids)
    drawn = [completion for out in outs for completion in out]
    said = Answers([c.text for c in drawn], [c.token_ids for c in drawn])
    return [c.prompt_ids for c in drawn], said
