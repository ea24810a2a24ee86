"""Make preference pairs from a policy's own samples: the best and the worst of n completions of
each prompt. Also print the mean reward of the best of k samples.

    python examples/sample_pairs.py --model MODEL --data examples/prompts/stories.jsonl \\
        --reward examples/rewards/stories.py:fable --n 16 \\
        --max_new_tokens 128 --out pairs.jsonl
    fusedrl train dpo --model MODEL --data pairs.jsonl --optim.lr 1e-4 --run.dir runs/dpo
"""

from __future__ import annotations

import argparse
import json
import math

import torch
from rich.console import Console
from rich.table import Table

from fusedrl.engine import HybridActor
from fusedrl.engine.config import GenerationConfig
from fusedrl.engine.data.readers import load_prompts
from fusedrl.engine.data.tokenize import encode_prompts
from fusedrl.engine.rewards.rewards import RewardSet, load_reward
from fusedrl.engine.rollout.best_of_n import BestOf, best_of_n, best_of_n_kl, expected_best
from fusedrl.engine.watch.evaluate import Estimate


def asked() -> argparse.Namespace:
    """Parse the options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="model directory or id")
    parser.add_argument(
        "--data", required=True, help="JSONL file of prompts, or of preference pairs"
    )
    parser.add_argument(
        "--reward", required=True, help="file.py:function, or a reward-model directory"
    )
    parser.add_argument(
        "--n", type=int, default=8, help="samples of each prompt (default: %(default)s)"
    )
    parser.add_argument("--out", help="JSONL file of the pairs to write; none: the table alone")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument(
        "--stop_token_ids",
        type=int,
        nargs="*",
        default=[],
        help="ids that end a completion besides the model's own EOS",
    )
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    options = asked()
    actor = HybridActor.from_pretrained(options.model)
    generation = GenerationConfig(
        max_new_tokens=options.max_new_tokens, stop_token_ids=tuple(options.stop_token_ids)
    )
    fitting, dropped = encode_prompts(
        actor.tokenizer,
        load_prompts(options.data),
        actor.decoder.config.max_positions - options.max_new_tokens,
    )
    examples = [example for example, _ in fitting]
    rewards = RewardSet([load_reward(options.reward, tokenizer=actor.tokenizer)])
    found = best_of_n(actor, examples, rewards, options.n, generation, options.seed)

    table = Table(
        title=f"{len(examples)} prompts x {options.n} samples ({dropped})", title_justify="left"
    )
    for name in ("best of", "reward", "KL at most, nats"):
        table.add_column(name, justify="right")
    scores = torch.tensor([one.scores for one in found if not any(map(math.isnan, one.scores))])
    for k in (2**i for i in range(options.n.bit_length())):
        table.add_row(
            str(k), str(Estimate.of(expected_best(scores, k).tolist())), f"{best_of_n_kl(k):.2f}"
        )
    Console().print(table)
    if options.out is not None:
        rows = [
            row
            for example, one in zip(examples, found, strict=True)
            if (row := pair(example.prompt, one)) is not None
        ]
        with open(options.out, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        print(
            f"{options.out}: {len(rows)} pairs; {len(examples) - len(rows)} prompts have one score "
            "for all their samples"
        )


def pair(prompt: object, one: BestOf) -> dict[str, object] | None:
    """Return the best and the worst completion of a prompt, or None if all have the same score."""
    valid = [i for i, score in enumerate(one.scores) if not math.isnan(score)]
    worst = min(valid, key=lambda i: one.scores[i])
    if one.scores[worst] == one.score:
        return None
    texts = {"chosen": one.best.text, "rejected": one.completions[worst].text}
    if not isinstance(prompt, str):  # messages on both sides
        return {"prompt": prompt} | {
            side: [{"role": "assistant", "content": text}] for side, text in texts.items()
        }
    return {"prompt": prompt} | texts


if __name__ == "__main__":
    main()
