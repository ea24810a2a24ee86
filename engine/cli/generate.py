"""fusedrl generate: print completions of prompts, or the best of several."""

from __future__ import annotations

import argparse
from typing import Any

from fusedrl.engine.base.errors import ConfigError
from fusedrl.engine.cli.common import (
    check_device,
    count,
    sampling_params,
)


# ---- generate ------------------------------------------------------------------------------------
def generate_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `fusedrl generate` to the parser."""
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="directory or id of the model"
    )
    parser.add_argument(
        "--adapter", metavar="DIR", help="a LoRA adapter of that model, in PEFT's files"
    )
    parser.add_argument(
        "--prompt", required=True, action="append", metavar="TEXT", help="repeatable"
    )
    parser.add_argument(
        "--max_new_tokens", type=int, default=256, help="longest completion (default: %(default)s)"
    )
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="divides the logits (default: %(default)s)"
    )
    parser.add_argument(
        "--greedy", action="store_true", help="the likeliest token every time: temperature 0"
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
    parser.add_argument(
        "--n", type=int, default=1, help="completions of each prompt (default: %(default)s)"
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
        help="of --best_of: file.py:function or the directory of a reward model; repeatable",
    )
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16"),
        help="auto: float32 on CPU, bfloat16 on CUDA",
    )
    parser.add_argument("--device", help="cpu or cuda (default: the best there is)")


def run_generate(options: argparse.Namespace) -> None:
    """Run `fusedrl generate`."""
    _check_best_of(options)
    check_device(options.device)
    from fusedrl.engine.actor import HybridActor
    from fusedrl.engine.data.tokenize import no_tokenizer

    params = sampling_params(
        "generate",
        max_new_tokens=options.max_new_tokens,
        temperature=0.0 if options.greedy else options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        min_p=options.min_p,
        n=options.n,
        seed=options.seed,
    )
    actor = HybridActor.from_pretrained(options.model, dtype=options.dtype, device=options.device)
    if actor.tokenizer is None:
        raise no_tokenizer()
    if options.adapter is not None:
        actor.load_adapter(options.adapter)
    if options.best_of is not None:
        _generate_best(actor, options)
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


def _generate_best(actor: Any, options: argparse.Namespace) -> None:
    from fusedrl.engine.config import GenerationConfig
    from fusedrl.engine.data.records import PromptExample
    from fusedrl.engine.rewards.rewards import RewardSet, load_reward
    from fusedrl.engine.rollout.best_of_n import best_of_n

    generation = GenerationConfig(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
    )
    rewards = RewardSet(
        [
            load_reward(spec, device=actor.decoder.device, tokenizer=actor.tokenizer)
            for spec in options.reward
        ]
    )
    found = best_of_n(
        actor,
        [PromptExample(prompt) for prompt in options.prompt],
        rewards,
        options.best_of,
        generation,
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
