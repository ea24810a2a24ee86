"""Tokens as they are drawn, and the pieces of text that they are."""

import threading

import pytest
from tests.support.talkers import byte_tokenizer, write_talker

from fusedrl.engine.actor import HybridActor
from fusedrl.engine.generation.pieces import Pieces
from fusedrl.engine.generation.sampler import SamplingParams

TEXTS = [
    "plain",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f44d\U0001f3fd",  # a family, a thumb
    "\u05e9\u05dc\u05d5\u05dd and \u0645\u0631\u062d\u0628\u0627",
    "e\u0301\u00e9 \u6f22\u5b57\n\n\tx",
    "",
]


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    return write_talker(tmp_path_factory.mktemp("talker"))


@pytest.mark.cpu_only("texts alone")
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("size", [1, 2, 5])
def test_pieces_are_the_text_and_no_character_is_broken(text, size):
    tokenizer = byte_tokenizer()
    ids = tokenizer(text)["input_ids"]
    pieces = Pieces(tokenizer, tokenizer("before")["input_ids"])
    found = [pieces.add(ids[i : i + size]) for i in range(0, len(ids), size)]
    assert "\ufffd" not in "".join(found)
    assert "".join(found) + pieces.end() == text
    if size == 1 and "\U0001f468" in text:
        assert found[:4] == ["", "", "", "\U0001f468"]


@pytest.mark.cpu_only("texts alone")
def test_bytes_that_are_no_character():
    tokenizer = byte_tokenizer()
    cut = tokenizer("a\U0001f600")["input_ids"][:-1]
    pieces = Pieces(tokenizer)
    assert [pieces.add([token]) for token in cut] == ["a", "", "", ""]
    assert pieces.end() == "\ufffd"
    assert pieces.end() == ""
    pieces = Pieces(tokenizer)
    assert "".join(pieces.add([t]) for t in [*cut, *tokenizer("bc")["input_ids"]]) == "a\ufffdbc"
    # the prompt may end within a character, and its end token adds nothing
    pieces = Pieces(tokenizer, cut)
    whole = tokenizer("\U0001f600")["input_ids"]
    assert pieces.add(whole[-1:]) == "\U0001f600"
    assert pieces.add([tokenizer.eos_token_id]) == ""


@pytest.mark.cpu_only("texts alone")
def test_a_tokenizer_that_drops_the_first_space():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "\u2581a": 1, "\u2581b": 2, "c": 3}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    assert fast.decode([2]) == "b"
    pieces = Pieces(fast, [1])
    assert [pieces.add([t]) for t in (2, 3, 1, 2)] == [" b", "c", " a", " b"]


def test_what_is_followed_is_what_is_generated(talker, device):
    actor = HybridActor.from_pretrained(talker, device=device)
    for params in (
        SamplingParams(max_new_tokens=40, seed=3),
        SamplingParams(max_new_tokens=300, temperature=0.9, seed=1, stop=("ab",)),
        SamplingParams(max_new_tokens=1, temperature=0.0),
    ):
        ((whole,),) = actor.generate(["hello"], params, [7])
        drawn, done = [], []
        for new, completion in actor.follow("hello", params, 7):
            drawn += new
            done.append(completion)
        assert drawn == whole.token_ids
        assert done[:-1] == [None] * (len(done) - 1)
        assert (done[-1].text, done[-1].finish_reason) == (whole.text, whole.finish_reason)
        assert len(done) >= len(drawn)  # a token at a time


def test_following_can_be_left_and_leaves_nothing(talker, device):
    actor = HybridActor.from_pretrained(talker, device=device)
    drawing = actor.follow("hello", SamplingParams(max_new_tokens=300), 0)
    next(drawing)
    drawing.close()
    assert not actor._generator.scheduler.busy
    assert not actor._generator._tickets
    with pytest.raises(ValueError, match="expected n = 1"):
        actor.follow("hello", SamplingParams(n=2))
    with pytest.raises(ValueError, match="exceeds the model's 512 positions"):
        actor.follow("hello", SamplingParams(max_new_tokens=600))


def test_following_beside_another_thread(talker, device):
    actor = HybridActor.from_pretrained(talker, device=device)
    params = SamplingParams(max_new_tokens=60, seed=5)
    prompts = [f"prompt {i}" for i in range(6)]
    alone = actor.generate(prompts, params)
    ((single,),) = actor.generate(["hello"], params, [9])
    found = []
    thread = threading.Thread(target=lambda: found.append(actor.generate(prompts, params)))
    thread.start()
    drawn = [token for new, _ in actor.follow("hello", params, 9) for token in new]
    thread.join()
    assert drawn == single.token_ids
    assert [[c.token_ids for c in out] for out in found[0]] == [
        [c.token_ids for c in out] for out in alone
    ]


def test_an_abort_delivers_what_there_is(talker, device):
    actor = HybridActor.from_pretrained(talker, device=device)
    drawn, done = [], None
    for new, done in actor.follow("hello", SamplingParams(max_new_tokens=300), 0):
        drawn += new
        if len(drawn) == 5 and done is None:
            actor.abort()
    assert (done.finish_reason, done.token_ids) == ("aborted", drawn)
