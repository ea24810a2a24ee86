"""A game of several turns that a tiny model learns: guess a number between 1 and 15. After each
guess the answer is "higher" or "lower", and four guesses suffice for who uses the answers.

    python examples/guess_number.py task
    fusedrl train grpo --model task/model --data task/games.jsonl \\
        --environment examples/guess_number.py:Game --turns.max_turns 4 \\
        --generation.max_new_tokens 1 --prompts_per_step 15 --samples_per_prompt 32 \\
        --steps 200 --kl.coef 0 --optim.lr 3e-3 --evaluation.data task/games.jsonl \\
        --evaluation.samples_per_prompt 32 --evaluation.every 50 --run.dir runs/guess

The model begins with random weights and knows no numbers. Its tokens are words, one of them a turn.
A game is worth 1 if the number was found, and 0 if not.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LARGEST = 15
WORDS = ("<pad>", "<s>", "</s>", "<unk>", "guess", "higher", "lower", "what")
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "dtype": "float32",
}


class Game:
    """One game. The data row has the number to be found in its column `secret`."""

    def reset(self, row: Mapping[str, Any]) -> str:
        """Return the text that the game begins with."""
        self.secret = int(row["secret"])
        return str(row["prompt"])

    def step(self, completion: str) -> tuple[str, float, bool, dict[str, float]]:
        """Answer a guess: (what the model reads, reward, whether the game is over, counts)."""
        guess = completion.strip()
        if not guess.isdecimal():
            return "what", 0.0, False, {"no_number": 1.0}
        if int(guess) == self.secret:
            return "", 1.0, True, {}
        return "higher" if int(guess) < self.secret else "lower", 0.0, False, {}


def write_task(directory: str | Path, seed: int = 0) -> Path:
    """Write model/ (random weights, tokenizer) and games.jsonl, a game for each number. Return the
    directory."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    from fusedrl.engine.model.configuration import model_config
    from fusedrl.engine.model.decoder import Decoder
    from fusedrl.engine.model.weights import save_pretrained

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    words = [*WORDS, *(str(number) for number in range(1, LARGEST + 1))]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    )
    config = model_config(MODEL | {"vocab_size": len(words)})
    save_pretrained(Decoder.random(config, seed=seed), directory / "model", tokenizer=fast)
    games = [{"prompt": "guess", "secret": number} for number in range(1, LARGEST + 1)]
    text = "".join(json.dumps(game) + "\n" for game in games)
    (directory / "games.jsonl").write_text(text, encoding="utf-8")
    return directory


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path, help="where the files are written")
    parser.add_argument("--seed", type=int, default=0, help="of the weights (default: 0)")
    options = parser.parse_args()
    print(f"wrote {write_task(options.directory, options.seed)}")


if __name__ == "__main__":
    main()
