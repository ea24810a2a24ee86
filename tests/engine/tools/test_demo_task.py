"""The demo's task: its files are a function of the seed, its gold reward is what it says, its rater
is as noisy as stated."""

import filecmp
import json
import random
from itertools import islice
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fusedrl.engine.tools import demo_task
from fusedrl.engine.tools.demo_task import (
    build_tokenizer,
    demonstrations,
    gold_reward,
    noise_ceiling,
    preference_pairs,
    score_story,
    write_demo_files,
)

PROMPT = "Mia the fox lived by the river and was lonely."
BEST = (
    " She felt glad. The hat was lovely. She danced by the hill. Tom the owl helped her near "
    "the hill."
)


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        (" She walked by the river.", 0),
        (" She felt glad.", 1),
        (" She felt sad.", -1),
        (" She felt glad. She felt proud.", 2),
        # glad again earns nothing, and the sentence repeats
        (" She felt glad. The kite was lovely. She felt glad.", 2 - 1),
        # the same word, not the same sentence
        (" Tom the owl helped her near the hill. Ben the dog helped her near the hill.", 1),
        # one point a sentence, however many words
        (" She felt glad happy proud joyful.", 1),
        # every gloomy word counts
        (" She felt sad sad.", -2),
        (" She found a shiny kite. In the end Mia was happy.", 1 + 1 + 2),
        # someone else's happy end
        (" She found a shiny kite. In the end Tom was happy.", 1 + 1),
        # not at the end
        (" In the end Mia was happy. She felt glad.", 1 + 1),
        # breaks off
        (" In the end Mia was happy. She felt", 1 - 2),
        (" In the end Mia was calm.", 0),
        (" In the end Mia was sad.", -1),
        ("", -2),
        (".", 0),
        (BEST + " In the end Mia was happy.", 7),
        # the sixth sentence costs what it earns
        (BEST + " Ben the cat hugged her near the hill. In the end Mia was happy.", 7),
        (
            " She felt glad. She felt glad. She felt glad. She felt glad. She felt glad. She felt "
            "glad.",
            1 - 5 - 1,
        ),
    ],
)
def test_gold_reward_by_eye(completion: str, score: float) -> None:
    assert score_story(PROMPT, completion) == score
    assert gold_reward(
        prompts=[PROMPT], completions=[completion], completion_ids=[[1, 2]], topic=["a column"]
    ) == [score]


def test_gold_reward_reads_the_hero_of_its_own_prompt() -> None:
    other = PROMPT.replace("Mia", "Tom")
    assert gold_reward([PROMPT, other], [" In the end Tom was glad."] * 2) == [1.0, 3.0]
    with pytest.raises(ValueError):
        gold_reward([PROMPT], [])


def test_files_are_a_function_of_the_seed(tmp_path: Path) -> None:
    sizes = {"stories": 40, "pairs": 30, "prompts": 50, "held_out": 20}
    first, again, other = (
        write_demo_files(tmp_path / name, seed, **sizes)
        for name, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    names = ["sft.jsonl", "pairs.jsonl", "prompts.jsonl", "held_out.jsonl"]
    names += ["model/tokenizer.json", "model/tokenizer_config.json", "model/config.json"]
    assert sorted(str(path.relative_to(first)) for path in first.rglob("*.json*")) == sorted(names)
    assert filecmp.cmpfiles(first, again, names, shallow=False)[0] == names
    assert all((first / name).read_bytes() != (other / name).read_bytes() for name in names[:4])
    assert [len(rows(first / name)) for name in names[:4]] == [40, 30, 50, 20]
    assert [set(rows(first / name)[0]) for name in names[:4]] == [
        {"prompt", "completion"},
        {"prompt", "chosen", "rejected"},
        {"prompt"},
        {"prompt"},
    ]


def test_held_out_prompts_are_distinct_and_held_out(tmp_path: Path) -> None:
    directory = write_demo_files(tmp_path, 0, stories=300, pairs=300, prompts=300, held_out=1000)
    held_out = {row["prompt"] for row in rows(directory / "held_out.jsonl")}
    assert len(held_out) == 1000
    assert not held_out & {
        row["prompt"]
        for name in ("sft", "pairs", "prompts")
        for row in rows(directory / f"{name}.jsonl")
    }


def test_grammar_leaves_room_on_both_sides() -> None:
    scores = [
        score_story(row["prompt"], row["completion"])
        for row in islice(demonstrations(random.Random(0)), 2000)
    ]
    mean = sum(scores) / len(scores)
    spread = (sum((score - mean) ** 2 for score in scores) / len(scores)) ** 0.5
    assert abs(mean) < 0.5
    assert 2 < spread < 3
    assert min(scores) <= -5
    assert max(scores) == 7
    assert not demo_task.CHEERFUL & demo_task.GLOOMY


def test_rater_agrees_with_gold_as_often_as_its_ceiling_says() -> None:
    pairs = list(islice(preference_pairs(random.Random(0), temperature=3.0), 6000))
    agreement = sum(
        score_story(row["prompt"], row["chosen"]) > score_story(row["prompt"], row["rejected"])
        for row in pairs
    ) / len(pairs)
    assert 0.65 < agreement < 0.75
    # three standard errors of the agreement
    assert abs(agreement - noise_ceiling(pairs, temperature=3.0)) < 0.02
    sharp = list(islice(preference_pairs(random.Random(0), temperature=1e-2), 500))
    assert all(
        score_story(row["prompt"], row["chosen"]) > score_story(row["prompt"], row["rejected"])
        for row in sharp
    )


def test_tokenizer_round_trip_and_boundary(tmp_path: Path) -> None:
    directory = (
        write_demo_files(tmp_path, 0, stories=10, pairs=10, prompts=10, held_out=10) / "model"
    )
    tokenizer = AutoTokenizer.from_pretrained(directory)
    config = AutoConfig.from_pretrained(directory)
    assert [getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")] == [0, 1, 2]
    assert [getattr(config, f"{name}_token_id") for name in ("pad", "bos", "eos")] == [0, 1, 2]
    assert len(tokenizer) == config.vocab_size == build_tokenizer().get_vocab_size()
    for row in islice(demonstrations(random.Random(1)), 300):
        prompt, completion = (
            tokenizer(row["prompt"]).input_ids,
            tokenizer(row["completion"], add_special_tokens=False).input_ids,
        )
        assert prompt[0] == tokenizer.bos_token_id
        # together or apart: the same tokens
        assert tokenizer(row["prompt"] + row["completion"]).input_ids == prompt + completion
        assert tokenizer.unk_token_id not in prompt + completion
        assert tokenizer.decode(completion) == row["completion"]
        assert tokenizer.decode(prompt, skip_special_tokens=True) == row["prompt"]
        assert len(prompt) + len(completion) + 1 <= config.max_position_embeddings


def test_every_word_is_used_and_config_is_a_model(tmp_path: Path) -> None:
    directory = (
        write_demo_files(tmp_path, 0, stories=10, pairs=10, prompts=10, held_out=10) / "model"
    )
    tokenizer = build_tokenizer()
    texts = [
        row["prompt"] + row["completion"] + "</s>"
        for row in islice(demonstrations(random.Random(2)), 2000)
    ]
    used = {token for text in texts for token in tokenizer.encode(text).ids}
    assert set(range(tokenizer.get_vocab_size())) - used == {
        tokenizer.token_to_id("<pad>"),
        tokenizer.token_to_id("<unk>"),
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    assert 100_000 < model.num_parameters() < 200_000
