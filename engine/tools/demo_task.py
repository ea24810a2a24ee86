"""Task of the demo: very short stories made by rules, a gold reward that a reader can check by eye,
and a simulated rater who is often wrong.

A story has a prompt, "Mia the fox lived by the river and was lonely.", and a completion of one to
seven sentences:

    " She found a broken kite. Tom the owl helped her near the hill. She felt glad. In the end Mia
    was happy."

A story has a hidden mood (cheerful, neutral, gloomy). It starts as the prompt's mood and changes at
random from sentence to sentence. A story may have an ending, about the hero or about someone else.
The preference pairs are labelled by a Bradley-Terry rater (Bradley and Terry, 1952), who prefers a
to b with probability sigmoid((gold(a) - gold(b)) / temperature). So the labels agree with the gold
order about 70% of the time, much like human raters. No reward model can expect a higher accuracy on
them than `noise_ceiling`. Everything is a function of the seed; nothing is downloaded.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

HEROES = dict.fromkeys(("Mia", "Lily", "Anna", "Zoe", "Ruby", "Ivy"), "She") | dict.fromkeys(
    ("Tom", "Ben", "Max", "Leo", "Sam", "Finn"), "He"
)
ANIMALS = ("fox", "bear", "cat", "dog", "mouse", "owl", "duck", "rabbit")
PLACES = ("river", "forest", "garden", "village", "hill", "market")
THINGS = ("ball", "kite", "boat", "cake", "drum", "lamp", "hat", "chair")
TONES = {  # the words that differ between them
    "cheerful": {
        "mood": ("happy", "glad", "proud", "joyful"),
        "look": ("shiny", "lovely", "golden", "sweet"),
        "meet": ("helped", "hugged", "thanked"),
        "deed": ("danced", "laughed", "sang"),
    },
    "neutral": {
        "mood": ("calm", "busy", "quiet", "sleepy"),
        "look": ("big", "small", "red", "round"),
        "meet": ("met", "saw", "passed"),
        "deed": ("walked", "waited", "rested"),
    },
    "gloomy": {
        "mood": ("sad", "angry", "lonely", "afraid"),
        "look": ("broken", "dirty", "torn", "rotten"),
        "meet": ("scolded", "pushed", "teased"),
        "deed": ("cried", "fell", "frowned"),
    },
}
CHEERFUL, NEUTRAL, GLOOMY = (
    frozenset(word for words in table.values() for word in words) for table in TONES.values()
)

_PLAIN = (
    "In",
    "The",
    "Then",
    "She",
    "He",
    "the",
    "lived",
    "by",
    "and",
    "was",
    "found",
    "a",
    "near",
    "her",
    "him",
    "felt",
    "went",
    "home",
    "end",
)
_WORDS = sorted({*_PLAIN, *CHEERFUL, *NEUTRAL, *GLOOMY, *HEROES, *ANIMALS, *PLACES, *THINGS})
_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
_LONGEST = 5  # sentences; each one beyond costs a point

# A decoder of about 150 thousand parameters: grouped queries, tied embeddings. It has no weights
# until it is trained from random ones.
MODEL_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "float32",
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": True,
    "initializer_range": 0.05,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def story_prompt(rng: random.Random) -> tuple[str, str, str]:
    """Draw a prompt, its hero and its tone, such as ("Mia the fox lived by the river and was
    lonely.", "Mia", "gloomy")."""
    hero, tone = rng.choice(list(HEROES)), rng.choice(list(TONES))
    return (
        f"{hero} the {rng.choice(ANIMALS)} lived by the {rng.choice(PLACES)} and was "
        f"{rng.choice(TONES[tone]['mood'])}.",
        hero,
        tone,
    )


def story_completion(rng: random.Random, hero: str, tone: str) -> str:
    """Draw a completion for a prompt with this hero and tone."""
    subject = HEROES[hero]
    them = "her" if subject == "She" else "him"
    sentences: list[str] = []
    things: list[str] = []
    for _ in range(rng.choices((1, 2, 3, 4, 5), (2, 4, 4, 2, 1))[0]):
        if rng.random() < 0.4:
            tone = rng.choice(list(TONES))
        kind = rng.choice(
            ("feel", "find", "meet", "do", "look") if things else ("feel", "find", "meet", "do")
        )
        if kind == "feel":
            sentences.append(f" {subject} felt {rng.choice(TONES[tone]['mood'])}.")
        elif kind == "find":
            things.append(rng.choice(THINGS))
            sentences.append(f" {subject} found a {rng.choice(TONES[tone]['look'])} {things[-1]}.")
        elif kind == "meet":
            other = rng.choice([name for name in HEROES if name != hero])
            sentences.append(
                f" {other} the {rng.choice(ANIMALS)} {rng.choice(TONES[tone]['meet'])} {them} near "
                f"the {rng.choice(PLACES)}."
            )
        elif kind == "do":
            sentences.append(
                f" {subject} {rng.choice(TONES[tone]['deed'])} by the {rng.choice(PLACES)}."
            )
        else:
            sentences.append(f" The {things[-1]} was {rng.choice(TONES[tone]['look'])}.")
    ending = rng.random()
    if ending < 0.35:
        sentences.append(
            f" In the end {hero if rng.random() < 0.6 else rng.choice(list(HEROES))} was "
            f"{rng.choice(TONES[tone]['mood'])}."
        )
    elif ending < 0.6:
        sentences.append(f" Then {hero} went home.")
    return "".join(sentences)


def score_story(prompt: str, completion: str) -> float:
    """Return the gold reward of one story, the sum of:

        +1  each sentence with a cheerful word that no sentence before it used (the prompt's own
            words do not count)
        -1  each gloomy word
        +2  the last sentence is exactly "In the end HERO was WORD.", with the prompt's hero and a
            cheerful word
        -1  each sentence that repeats an earlier one, and each sentence beyond the fifth
        -2  the story breaks off in mid-sentence, or is empty

    The maximum is 7: five sentences, a new cheerful word in each, the last one a happy end.
    """
    *whole, rest = completion.split(".")
    sentences = [sentence.split() for sentence in whole]
    score, seen, told = 0.0, set[str](), set[tuple[str, ...]]()
    for sentence in sentences:
        new = CHEERFUL.intersection(sentence) - seen
        score += (
            (1.0 if new else 0.0)
            - sum(word in GLOOMY for word in sentence)
            - (1.0 if tuple(sentence) in told else 0.0)
        )
        seen |= new
        told.add(tuple(sentence))
    score -= max(0, len(sentences) - _LONGEST)
    if rest.strip() or not sentences:
        return score - 2.0
    hero, last = (prompt.split() or [""])[0], sentences[-1]
    return score + (
        2.0 if last[:-1] == ["In", "the", "end", hero, "was"] and last[-1] in CHEERFUL else 0.0
    )


def gold_reward(
    prompts: Sequence[str], completions: Sequence[str], completion_ids: Any = None, **columns: Any
) -> list[float]:
    """Return `score_story` of each completion, as a reward function. Token ids and other columns
    are not used."""
    return [
        score_story(prompt, completion)
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def build_tokenizer() -> Tokenizer:
    """Make a tokenizer with one token per word, and a beginning-of-text token first. A word keeps
    the space before it, so decoding is concatenation."""
    vocabulary = [*_SPECIAL, ".", *(f" {word}" for word in _WORDS), *HEROES]
    tokenizer = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?[A-Za-z]+|\."), behavior="isolated")  # type: ignore[assignment]
    tokenizer.decoder = decoders.Fuse()  # type: ignore[assignment]
    tokenizer.add_special_tokens(list(_SPECIAL))
    begin = ("<s>", vocabulary.index("<s>"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[begin]
    )  # type: ignore[assignment]
    return tokenizer


def demonstrations(rng: random.Random) -> Iterator[dict[str, str]]:
    """Yield prompts with a completion each, endlessly."""
    while True:
        prompt, hero, tone = story_prompt(rng)
        yield {"prompt": prompt, "completion": story_completion(rng, hero, tone)}


def preference_pairs(rng: random.Random, temperature: float) -> Iterator[dict[str, str]]:
    """Yield pairs of completions of one prompt, ordered by the noisy rater, endlessly. Pairs of
    equal gold reward are drawn again."""
    while True:
        prompt, hero, tone = story_prompt(rng)
        a, b = story_completion(rng, hero, tone), story_completion(rng, hero, tone)
        gap = score_story(prompt, a) - score_story(prompt, b)
        if gap:
            if rng.random() >= _sigmoid(gap / temperature):
                a, b = b, a
            yield {"prompt": prompt, "chosen": a, "rejected": b}


def noise_ceiling(pairs: Sequence[dict[str, str]], temperature: float) -> float:
    """Return the accuracy that the gold reward itself would expect on these labels: the mean of
    sigmoid(|gap| / temperature), gap the difference of gold rewards."""
    gaps = [
        abs(score_story(row["prompt"], row["chosen"]) - score_story(row["prompt"], row["rejected"]))
        for row in pairs
    ]
    return sum(_sigmoid(gap / temperature) for gap in gaps) / len(gaps)


def write_demo_files(
    directory: str | Path,
    seed: int = 0,
    *,
    stories: int = 4096,
    pairs: int = 4096,
    prompts: int = 2048,
    held_out: int = 256,
    rater_temperature: float = 3.0,
) -> Path:
    """Write the task: `model/` (tokenizer and config.json, no weights), `sft.jsonl`, `pairs.jsonl`,
    `prompts.jsonl` and `held_out.jsonl`.

    The files are a function of the arguments, byte for byte. Held-out prompts are distinct and
    occur in none of the other files.

    Args:
        directory: directory for the files; made if missing.
        seed: seed of every random draw.
        stories: number of rows of sft.jsonl, {"prompt", "completion"}.
        pairs: number of rows of pairs.jsonl, {"prompt", "chosen", "rejected"}.
        prompts: number of rows of prompts.jsonl, {"prompt"}.
        held_out: number of rows of held_out.jsonl, {"prompt"}.
        rater_temperature: difference of gold reward at which the rater is right with odds of e : 1.

    Returns:
        The directory.
    """
    directory = Path(directory)
    (directory / "model").mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    evaluation: dict[str, None] = {}
    while len(evaluation) < held_out:
        evaluation.setdefault(story_prompt(rng)[0])

    def fresh(rows: Iterator[dict[str, str]], count: int) -> list[dict[str, str]]:
        kept = (row for row in rows if row["prompt"] not in evaluation)
        return [next(kept) for _ in range(count)]

    _write_jsonl(directory / "sft.jsonl", fresh(demonstrations(rng), stories))
    _write_jsonl(directory / "pairs.jsonl", fresh(preference_pairs(rng, rater_temperature), pairs))
    _write_jsonl(
        directory / "prompts.jsonl",
        fresh(({"prompt": row["prompt"]} for row in demonstrations(rng)), prompts),
    )
    _write_jsonl(directory / "held_out.jsonl", [{"prompt": prompt} for prompt in evaluation])

    tokenizer = build_tokenizer()
    tokenizer.save(str(directory / "model" / "tokenizer.json"))
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    limits = {
        "model_max_length": MODEL_CONFIG["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
    }
    _write_json(
        directory / "model" / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", **limits, **names},
    )
    _write_json(
        directory / "model" / "config.json",
        {**MODEL_CONFIG, "vocab_size": tokenizer.get_vocab_size()},
    )
    return directory


def _sigmoid(x: float) -> float:
    return 0.5 * (1.0 + math.tanh(0.5 * x))


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _write_jsonl(path: Path, rows: Sequence[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
