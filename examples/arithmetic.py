"""Write the files of an arithmetic task with an exact verifier, and a small untrained model to
start from.

    python examples/arithmetic.py task
    fusedrl train sft --model task/model --data task/sft.jsonl --epochs 8 \\
        --sequences_per_step 64 --optim.lr 3e-3 --run.dir runs/arithmetic-sft
    fusedrl train grpo --model runs/arithmetic-sft/model --data task/prompts.jsonl \\
        --reward examples/rewards/arithmetic.py:exact --steps 200 --minibatches 4 --kl.coef 0 \\
        --generation.max_new_tokens 6 --optim.lr 3e-4 --run.dir runs/arithmetic

A problem is "47+85=" and its answer "231". Two numbers of up to two digits are added or subtracted,
and the digits of the answer begin with the units, which a small decoder learns sooner. Half of the
demonstrations are off by 1 to 9, so imitating them is right half of the time at best. Reinforcement
learning can do better, since its verifier knows the right answers. The held-out problems occur in
none of the other files.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from fusedrl.engine.model.configuration import model_config
from fusedrl.engine.model.decoder import Decoder
from fusedrl.engine.model.weights import load_tokenizer, save_pretrained

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "initializer_range": 0.05,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "dtype": "float32",
}


def problem(rng: random.Random) -> tuple[str, int]:
    """Return (problem, answer)."""
    a, b, plus = rng.randrange(100), rng.randrange(100), rng.random() < 0.5
    return (f"{a}+{b}=", a + b) if plus else (f"{a}-{b}=", a - b)


def written(answer: int) -> str:
    """Write a number with the units first and the sign last."""
    return str(answer)[::-1]


def write_task(
    directory: str | Path,
    seed: int = 0,
    *,
    demonstrations: int = 20000,
    prompts: int = 8000,
    held_out: int = 400,
    wrong: float = 0.5,
) -> Path:
    """Write model/ (random weights, tokenizer), sft.jsonl, prompts.jsonl and held_out.jsonl; a
    function of the arguments. `wrong`: the share of demonstrations whose answer is. Returns the
    directory."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    apart = dict(problem(rng) for _ in range(held_out))

    def fresh(count: int) -> Iterable[tuple[str, int]]:
        while count:
            prompt, answer = problem(rng)
            if prompt not in apart:
                count -= 1
                yield prompt, answer

    def shown(answer: int) -> int:
        return answer + rng.choice((-1, 1)) * rng.randint(1, 9) if rng.random() < wrong else answer

    _write(
        directory / "sft.jsonl",
        (
            {"prompt": prompt, "completion": written(shown(answer))}
            for prompt, answer in fresh(demonstrations)
        ),
    )
    _write(
        directory / "prompts.jsonl",
        ({"prompt": prompt, "answer": written(answer)} for prompt, answer in fresh(prompts)),
    )
    _write(
        directory / "held_out.jsonl",
        ({"prompt": prompt, "answer": written(answer)} for prompt, answer in apart.items()),
    )
    _write_model(directory / "model", seed)
    return directory


def _write(path: Path, rows: Iterable[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _write_model(directory: Path, seed: int) -> None:
    """Write a model with random weights, and a tokenizer with one token per character."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *"0123456789+-="])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")  # type: ignore[assignment]
    tokenizer.decoder = decoders.Fuse()  # type: ignore[assignment]
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )  # type: ignore[assignment]
    directory.mkdir(exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "pad_token": "<pad>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (directory / "tokenizer_config.json").write_text(
        json.dumps(settings, indent=2) + "\n", encoding="utf-8"
    )
    (directory / "config.json").write_text(
        json.dumps(MODEL | {"vocab_size": len(vocabulary)}, indent=2) + "\n", encoding="utf-8"
    )
    save_pretrained(
        Decoder.random(model_config(directory), seed),
        directory,
        tokenizer=load_tokenizer(directory),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", help="made if missing")
    parser.add_argument(
        "--seed", type=int, default=0, help="of problems and weights (default: %(default)s)"
    )
    options = parser.parse_args()
    print(write_task(options.directory, options.seed))
