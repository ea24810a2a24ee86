"""fusedrl judge: its options, and the function that shows what came of it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from fusedrl.engine.cli.common import Parser, check_device, output_file, report_json

if TYPE_CHECKING:
    from fusedrl.engine.actor import HybridActor
    from fusedrl.engine.data.readers import PromptExample
    from fusedrl.engine.generation.sampler import SamplingParams
    from fusedrl.engine.watch.judge import Answers, Judge


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
        help="file.py:function or a reward model: the higher score wins; repeatable, then "
        "their sum",
    )
    judge.add_argument(
        "--prompts", type=int, default=0, help="at most so many, drawn by the seed (default: all)"
    )
    judge.add_argument(
        "--n", type=int, default=1, help="pairs of each prompt (default: %(default)s)"
    )
    judge.add_argument(
        "--max_new_tokens", type=int, default=256, help="longest completion (default: %(default)s)"
    )
    judge.add_argument(
        "--temperature", type=float, default=1.0, help="divides the logits (default: %(default)s)"
    )
    judge.add_argument(
        "--stop_token_ids",
        type=int,
        nargs="*",
        default=[],
        help="ids that end a completion besides the model's own EOS",
    )
    judge.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    judge.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16"),
        help="auto: float32 on CPU, bfloat16 on CUDA",
    )
    judge.add_argument("--device", help="cpu or cuda (default: the best there is)")
    judge.add_argument(
        "--output-json",
        type=output_file,
        metavar="FILE",
        help='the figures; "-" is standard output, without the table',
    )


def _judge(options: argparse.Namespace) -> None:
    check_device(options.device)
    from rich.console import Console

    from fusedrl.engine.actor import HybridActor
    from fusedrl.engine.base.ordering import shuffled
    from fusedrl.engine.config.base import require
    from fusedrl.engine.data.readers import load_prompts
    from fusedrl.engine.generation.sampler import SamplingParams
    from fusedrl.engine.watch.judge import Pairs, judge_pairs, load_judge, report_table

    require(options.prompts >= 0, "--prompts", ">= 0", options.prompts)
    params = SamplingParams(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        n=options.n,
        seed=options.seed,
        stop_token_ids=tuple(options.stop_token_ids),
    )
    judge = load_judge(options.judge) if options.judge is not None else None
    examples = load_prompts(options.data)
    actors = [
        HybridActor.from_pretrained(path, dtype=options.dtype, device=options.device)
        for path in (options.a, options.b)
    ]
    judge = judge or _reward_judge(options.reward, *actors)
    for actor in actors:
        examples = _fitting(actor, examples, options)
    examples = [
        examples[index]
        for index in shuffled(len(examples), options.seed, "judge")[: options.prompts or None]
    ]
    count = len(examples)
    # request ids that differ, so that samples differ even if both models are the same
    (prompt_ids, a), (_, b) = (
        _answers(actor, examples, params, range(number * count, (number + 1) * count))
        for number, actor in enumerate(actors)
    )
    owners = [index for index in range(count) for _ in range(options.n)]
    columns = {
        name: [examples[index].columns[name] for index in owners] for name in examples[0].columns
    }
    found = judge_pairs(
        judge,
        Pairs([examples[index].prompt for index in owners], prompt_ids, a, b, columns),
        owners,
    )
    report_json(
        found.to_json(),
        options.output_json,
        lambda: Console().print(report_table(found, (options.a, options.b))),
    )


def _fitting(
    actor: HybridActor, examples: list[PromptExample], options: argparse.Namespace
) -> list[PromptExample]:
    """Leave out prompts that are too long for this model. Raise ConfigError if the model cannot
    generate so many new tokens or has no such stop token."""
    from fusedrl.engine.config.base import require
    from fusedrl.engine.data.tokenize import encode_prompts
    from fusedrl.engine.rollout.prompts import check_stop_tokens

    check_stop_tokens("--stop_token_ids", options.stop_token_ids, actor.decoder.config)
    room = actor.decoder.config.max_positions - options.max_new_tokens
    require(
        room >= 1,
        "--max_new_tokens",
        f"below the model's {actor.decoder.config.max_positions} positions",
        options.max_new_tokens,
    )
    return [example for example, _ in encode_prompts(actor.tokenizer, examples, room)[0]]


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


def _reward_judge(specs: list[str], a: HybridActor, b: HybridActor) -> Judge:
    from fusedrl.engine.rewards.rewards import RewardSet, load_reward
    from fusedrl.engine.watch.judge import RewardJudge

    same = a.tokenizer.get_vocab() == b.tokenizer.get_vocab()  # else a reward model reads texts
    return RewardJudge(
        RewardSet(
            [
                load_reward(spec, device=a.decoder.device, tokenizer=a.tokenizer if same else None)
                for spec in specs
            ]
        )
    )
