"""The rule-based story reward of examples/: hand-made cases, and texts made to cheat it."""

import importlib.util
import json
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
spec = importlib.util.spec_from_file_location("stories_reward", EXAMPLES / "rewards" / "stories.py")
assert spec is not None
assert spec.loader is not None
stories = importlib.util.module_from_spec(spec)
spec.loader.exec_module(stories)

PROMPT = "Once upon a time, there was a little girl named Lily."


def score(completion: str, prompt: str = PROMPT) -> float:
    return stories.fable(
        prompts=[prompt], completions=[completion], completion_ids=[[1]], topic=["a column"]
    )[0]


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("", 0),
        (" She loved to play outside in the park.", 0),
        (" She saw a small dog there.", 1),
        (" She saw two small dogs and a dog there.", 1),
        # the same animal
        (" She saw a small dog. The dog was very happy.", 1),
        (" She saw a small dog. Then a cat came to play.", 2),
        # one point a sentence
        (" She saw a dog and a cat there.", 1),
        # no sentences
        (" Dog. Cat. Bird. Fish.", 0),
        (
            " A dog came to the park. A cat sat on the mat. A bird sang in the tree. A fish swam "
            "in the sea.",
            3,
        ),
        (' The bird said, "Do not be sad."', 2),
        # too short a speech
        (' Lily said, "No."', 0),
        (' "Come and play," he said. "Yes, I will," she said. "Let us go then," he said.', 2),
        (' She said, "I want to play', 0),  # never ends
    ],
)
def test_by_eye(completion: str, expected: float) -> None:
    assert score(completion) == expected


def test_animals_of_the_prompt_are_not_news() -> None:
    assert score(" The dog ran to the park.", prompt="Tim had a dog.") == 0
    assert score(" The cat ran to the park.", prompt="Tim had a dog.") == 1


def test_repetition_costs_more_than_it_earns() -> None:
    loop = ' The dog said, "I like you."' * 10
    assert score(' The dog said, "I like you."') == 2
    # 6 different triples of 58
    assert score(loop) < -2
    assert score(loop) == pytest.approx(2 - 5 * (1 - 6 / 58))


def test_lengths_must_match() -> None:
    with pytest.raises(ValueError):
        stories.fable([PROMPT], [])


@pytest.mark.parametrize("name", ["stories", "stories_held_out"])
def test_prompt_files(name: str) -> None:
    prompts = [
        json.loads(line)["prompt"]
        for line in (EXAMPLES / "prompts" / f"{name}.jsonl")
        .read_text(encoding="utf-8")
        .splitlines()
    ]
    assert len(prompts) == len(set(prompts)) >= 48
    assert not any(stories._animals(stories._words(prompt)) for prompt in prompts)
    if name == "stories":
        held_out = (EXAMPLES / "prompts" / "stories_held_out.jsonl").read_text(encoding="utf-8")
        assert not any(json.dumps(prompt) in held_out for prompt in prompts)
