"""Compare a policy before and after training, on prompts of your choice, with fresh samples.

    python examples/compare.py --before MODEL --after runs/stories/model \\
        --data examples/prompts/stories_held_out.jsonl \\
        --reward examples/rewards/stories.py:fable --samples 8 --max_new_tokens 128
"""

from __future__ import annotations

import argparse

import torch
from rich.console import Console

from fusedrl.engine import HybridActor
from fusedrl.engine.config import GenerationConfig
from fusedrl.engine.data.readers import load_prompts
from fusedrl.engine.data.tokenize import encode_prompts
from fusedrl.engine.rewards.rewards import RewardSet, load_reward
from fusedrl.engine.watch.evaluate import comparison, evaluate, side_by_side


def asked() -> argparse.Namespace:
    """Parse the options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--before", required=True, help="model directory; also the reference of KL and perplexity"
    )
    parser.add_argument("--after", required=True, help="model directory")
    parser.add_argument(
        "--data", required=True, help="JSONL file of prompts, or of preference pairs"
    )
    parser.add_argument(
        "--reward", required=True, help="file.py:function, or a reward-model directory"
    )
    parser.add_argument(
        "--prompts", type=int, default=None, help="use this many, drawn by the seed (default: all)"
    )
    parser.add_argument(
        "--samples", type=int, default=1, help="of each prompt (default: %(default)s)"
    )
    parser.add_argument("--max_new_tokens", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument(
        "--stop_token_ids",
        type=int,
        nargs="*",
        default=[],
        help="ids that end a completion besides the model's own EOS",
    )
    parser.add_argument("--kl_target", type=float, default=None, help="to compare the KL with")
    parser.add_argument(
        "--show", type=int, default=4, help="completions to print (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    options = asked()
    before, after = (HybridActor.from_pretrained(path) for path in (options.before, options.after))
    generation = GenerationConfig(
        max_new_tokens=options.max_new_tokens, stop_token_ids=tuple(options.stop_token_ids)
    )
    limit = before.decoder.config.max_positions - options.max_new_tokens
    fitting, dropped = encode_prompts(before.tokenizer, load_prompts(options.data), limit)
    order = torch.randperm(
        len(fitting), generator=torch.Generator().manual_seed(options.seed)
    ).tolist()[: options.prompts]
    examples = [fitting[index][0] for index in order] * options.samples
    rewards = {"reward": RewardSet([load_reward(options.reward, tokenizer=before.tokenizer)])}
    measured = [
        evaluate(actor, before, examples, rewards, generation, seed=options.seed)
        for actor in (before, after)
    ]
    console = Console()
    console.print(f"{len(order)} prompts x {options.samples} samples ({dropped})")
    console.print(comparison(*measured, kl_target=options.kl_target))
    if options.show:
        console.print(
            side_by_side(
                [str(example.prompt) for example in examples],
                *measured,
                score="reward",
                count=options.show,
            )
        )


if __name__ == "__main__":
    main()
