"""Tokenisation: special tokens, the boundary between prompt and completion, limits."""
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fusedrl.engine.data.readers import Demonstration, PairExample, PromptExample, load_pairs
from fusedrl.engine.data.tokenize import Dropped, encode_completion, encode_demonstrations, encode_pairs, encode_prompt, encode_prompts
from fusedrl.engine.errors import DataError

WORDS = ["<unk>", "<s>", "</s>", "a", "b", "c", "user", "assistant"]


def _tokenizer(template: str | None = None, *, bos: str | None = "<s>"):
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if template:
        backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token="</s>", unk_token="<unk>", model_max_length=4)


@pytest.mark.parametrize("template, prompt, expected", [
    (None, "a b", [3, 4]), ("<s> $A", "a b", [1, 3, 4]), ("<s> $A </s>", "a b", [1, 3, 4]), ("$A </s>", "a", [3]),
    ("<s> $A </s>", "a </s>", [1, 3, 2]), (None, "a </s>", [3, 2]), ("<s> $A", "a </s>", [1, 3, 2]),  # an EOS that the author wrote is his
    ("<s> $A </s>", "", [1]), (None, "", [1]), ("<s> $A", "  ", [1]),
])
def test_prompts_have_the_tokenizers_special_tokens_but_no_eos_at_the_end(template, prompt, expected):
    assert encode_prompt(_tokenizer(template), prompt) == expected


def test_an_empty_prompt_without_bos_is_an_error():
    with pytest.raises(DataError, match="needs a BOS token"):
        encode_prompt(_tokenizer(bos=None), "")


def test_bos_and_eos_may_be_one_token():
    tokenizer = _tokenizer("<s> $A", bos="</s>")
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == 2
    assert encode_prompt(tokenizer, "") == [2]


def test_messages_go_through_the_chat_template():
    tokenizer, messages = _tokenizer("<s> $A"), [{"role": "user", "content": "a b"}]
    with pytest.raises(DataError, match="no chat template"):
        encode_prompt(tokenizer, messages)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}assistant{% endif %}"
    assert encode_prompt(tokenizer, messages) == [6, 3, 4, 7]


@pytest.mark.parametrize("template", [None, "<s> $A </s>"])
def test_completions_have_one_eos_and_nothing_else_added(template):
    tokenizer = _tokenizer(template)
    assert encode_completion(tokenizer, "a b", 2) == [3, 4, 2]
    assert encode_completion(tokenizer, "", 2) == [2]


def test_a_completion_is_not_given_a_space_that_the_text_has_not():
    backend = Tokenizer(models.BPE({"▁": 0, "a": 1, "▁a": 2, "\n": 3, "</s>": 4}, [("▁", "a")]))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="</s>")
    assert encode_prompt(tokenizer, "a") == [2]
    assert encode_completion(tokenizer, " a", 4) == [2, 4]  # "a" + " a" is "a a"; with the tokenizer's own space it would be "a  a"
    assert encode_completion(tokenizer, "a", 4) == [1, 4]
    assert encode_completion(tokenizer, "\na", 4) == [3, 1, 4]
    assert encode_completion(tokenizer, "a", 4, first=True) == [2, 4]  # at the beginning of a text the space belongs


def test_limits_drop_and_count():
    tokenizer = _tokenizer("<s> $A")
    pairs = [PairExample("a", "b", "c"), PairExample("a", "b", "c b"), PairExample("a", "b a b", "c")]
    kept, dropped = encode_pairs(tokenizer, pairs, 2, 4)
    assert kept == [([1, 3], [4, 2], [5, 2])]
    assert dropped == Dropped(2, 3, 4)
    assert str(dropped) == "2 of 3 (66.7%) are longer than 4 tokens and were dropped"
    assert encode_demonstrations(tokenizer, [Demonstration("a", "b"), Demonstration("", "a b c")], 2, 4) == ([([1, 3], [4, 2])], Dropped(1, 2, 4))
    example = PromptExample("a b", {"x": 1})
    assert encode_prompts(tokenizer, [example], 3) == ([(example, [1, 3, 4])], Dropped(0, 1, 3))
    assert encode_prompts(tokenizer, [], 3) == ([], Dropped(0, 0, 3))
    with pytest.raises(DataError, match=r"all 3 examples are longer than 2 tokens \(the shortest has 4\)"):
        encode_pairs(tokenizer, pairs, 2, 2)


def test_real_text_survives_the_boundary(shared):
    tokenizer = AutoTokenizer.from_pretrained(str(shared / "models/stories260k"))
    pairs = load_pairs(shared / "data/hh-rlhf/harmless-base-test.jsonl.gz")[0]
    for pair, (prompt, chosen, rejected) in zip(pairs[:200], encode_pairs(tokenizer, pairs[:200], 2, 100_000)[0], strict=True):
        assert tokenizer.decode(prompt[1:] + chosen[:-1]) == pair.prompt + pair.chosen
        assert tokenizer.decode(prompt[1:] + rejected[:-1]) == pair.prompt + pair.rejected
    kept, dropped = encode_pairs(tokenizer, pairs, 2, 512)
    assert (len(kept), dropped.count) == (1606, 697)
    assert encode_prompt(tokenizer, "Once upon a time") == tokenizer("Once upon a time")["input_ids"]
