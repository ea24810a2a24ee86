"""Where guesses come from, how their chances are learnt, and what later calls remember."""

import pytest
import torch

from fusedrl.engine.base.completion import Completion
from fusedrl.engine.base.errors import CheckpointError
from fusedrl.engine.generation import drafts as module
from fusedrl.engine.generation.drafts import Drafts

pytestmark = pytest.mark.cpu_only("tokens are counted by the host")


def completion(prompt, ids):
    return Completion(list(prompt), list(ids), [0.0] * len(ids), "", "stop", [0] * len(ids))


def ids_of(drafts, prompt, text, most=8, sequence=0):
    return drafts.guess(prompt, sequence, list(text), most, 0.0).token_ids


def test_from_the_prompt_and_the_text_itself():
    drafts = Drafts()
    assert ids_of(drafts, [1, 5, 6, 7, 8], [5, 6], 2) == [7, 8]
    assert ids_of(drafts, [1], [20, 21, 22, 23, 20, 21], 2) == [22, 23]
    assert ids_of(Drafts(), [1], [20, 21, 22]) == [], "nothing came before"


def test_the_longest_context_decides_then_the_most_frequent_then_the_newest():
    drafts = Drafts()
    drafts.finish([1], 1, [4, 9, 30, 5, 9, 31, 5, 9, 32, 5, 9, 32])
    assert ids_of(drafts, [1], [4, 9], 1) == [30], "two tokens decide before one"
    assert ids_of(drafts, [1], [5, 9], 1) == [32], "the more frequent"
    assert ids_of(drafts, [1], [8, 9], 1) == [32]
    other = Drafts()
    other.finish([1], 1, [9, 30, 9, 31])
    assert ids_of(other, [1], [8, 9], 1) == [31], "the newer of equals"


def test_siblings_serve_each_other_and_other_prompts_do_not():
    drafts = Drafts()
    drafts.finish([1, 2], 1, [10, 11, 12, 13])
    assert ids_of(drafts, [1, 2], [10], 3) == [11, 12, 13]
    assert ids_of(drafts, [1, 3], [10], 3) == []
    # a sibling that is still being drawn, two tokens at a time
    ids_of(drafts, [1, 3], [40, 41], sequence=7)
    ids_of(drafts, [1, 3], [40, 41, 42, 43], sequence=7)
    assert ids_of(drafts, [1, 3], [41], 2, sequence=8) == [42, 43]


def test_the_first_token_follows_the_prompt():
    drafts = Drafts()
    drafts.finish([1, 2, 3], 1, [10, 11])
    assert ids_of(drafts, [1, 2, 3], [], 2) == [10, 11]


def test_chances_are_learnt_from_what_is_tried():
    drafts = Drafts()
    drafts.finish([1], 1, [10, 11, 12, 13, 14])
    before = drafts.guess([1], 0, [10], 4, 0.0)
    assert before.chances == sorted(before.chances, reverse=True)
    for _ in range(40):
        drafts.judge(before.kinds, 0)
    after = drafts.guess([1], 0, [10], 4, 0.0)
    assert after.chances[0] < 0.05 < before.chances[0]
    assert drafts.guess([1], 0, [10], 4, 0.05).token_ids == []
    assert drafts.of_call == [160, 0, 40]
    drafts.begin()
    assert drafts.of_call == [0, 0, 0]


def test_what_is_kept_serves_later_calls():
    drafts = Drafts()
    drafts.end([[completion([1, 2], [10, 11, 12])]], [[3, 1, 2], [5, 2, 3]])
    assert drafts.metrics() == {
        "speculation/drafted": 8.0,
        "speculation/accepted": 3.0,
        "speculation/tokens_per_verification": 1.6,
    }
    assert ids_of(drafts, [1, 2], [10], 2) == [], "not before it is kept"
    drafts.keep()
    assert ids_of(drafts, [1, 2], [10], 2) == [11, 12]
    assert drafts.metrics() == {"speculation/drafted": 0.0, "speculation/accepted": 0.0}


def test_it_is_bounded(monkeypatch):
    monkeypatch.setattr(module, "_TOKENS", 100)
    drafts = Drafts()
    for prompt in range(30):
        drafts.end([[completion([1, 90 + prompt], range(prompt, prompt + 10))]], [])
        drafts.keep()
    assert len(drafts._texts) == 10
    assert drafts._tokens == 100
    assert ids_of(drafts, [1, 119], [29], 1) == [30]
    assert ids_of(drafts, [1, 93], [3], 1) == []
    for turn in range(40):
        drafts.end([[completion([1, 119], [turn, 60])]], [])
        drafts.keep()
    (texts,) = [texts for texts in drafts._texts.values() if len(texts) > 1]
    assert [text[0] for text in texts] == list(range(24, 40)), "the newest sixteen"
    assert drafts._tokens == sum(len(text) for found in drafts._texts.values() for text in found)


def test_a_checkpoint_holds_it():
    drafts = Drafts()
    assert {name: x.numel() for name, x in drafts.tensors().items() if x.numel()} == {"newest": 1}
    Drafts().load(drafts.tensors())
    for prompt in range(3):
        outs = [[completion([1, prompt], range(prompt, prompt + n)) for n in (3, 0, 5)]]
        drafts.end(outs, [])
    drafts.keep()
    drafts.end([[completion([1], [7, 8])]], [])  # of a step that is not over
    saved = drafts.tensors()
    other = Drafts()
    other.load(saved)
    assert other._texts == drafts._texts
    assert list(other._texts) == list(drafts._texts)
    assert (other._tokens, other.newest) == (drafts._tokens, 1)
    assert ids_of(other, [1], [7], 1) == []
    for change in (
        {"lengths": torch.tensor([1, 2])},
        {"token_ids": torch.zeros(3, dtype=torch.int32)},
        {"counts": torch.tensor([1])},
        {"prompts": torch.tensor([300])},
    ):
        with pytest.raises(CheckpointError, match="drafts holds"):
            Drafts().load(saved | change)
    with pytest.raises(CheckpointError, match="drafts holds no texts"):
        Drafts().load({"steps": torch.zeros(1)})
