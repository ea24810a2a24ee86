"""Tokenisation: special tokens, the boundary between prompt and completion, limits."""

import json
from functools import partial

import pytest
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fusedrl.engine.base.errors import DataError
from fusedrl.engine.base.packing import PackedBatch
from fusedrl.engine.data.readers import (
    Demonstration,
    Dialogue,
    PairExample,
    PromptExample,
    ReadOptions,
    load_demonstrations,
    load_pairs,
)
from fusedrl.engine.data.tokenize import (
    Dropped,
    count_tokens,
    encode_completion,
    encode_demonstrations,
    encode_dialogue,
    encode_dialogues,
    encode_prompt,
    encode_prompts,
)
from fusedrl.engine.preference.comparisons import encode_preferences

WORDS = ["<unk>", "<s>", "</s>", "a", "b", "c", "user", "assistant"]


def _tokenizer(template: str | None = None, *, bos: str | None = "<s>"):
    backend = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if template:
        backend.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=4,
    )


@pytest.mark.parametrize(
    "template, prompt, expected",
    [
        (None, "a b", [3, 4]),
        ("<s> $A", "a b", [1, 3, 4]),
        ("<s> $A </s>", "a b", [1, 3, 4]),
        ("$A </s>", "a", [3]),
        # an EOS that the author wrote is his
        ("<s> $A </s>", "a </s>", [1, 3, 2]),
        (None, "a </s>", [3, 2]),
        ("<s> $A", "a </s>", [1, 3, 2]),
        ("<s> $A </s>", "", [1]),
        (None, "", [1]),
        ("<s> $A", "  ", [1]),
    ],
)
def test_prompts_have_the_tokenizers_special_tokens_but_no_eos_at_the_end(
    template, prompt, expected
):
    assert encode_prompt(_tokenizer(template), prompt) == expected


def test_an_empty_prompt_without_bos_is_an_error():
    with pytest.raises(DataError, match="needs a BOS token"):
        encode_prompt(_tokenizer(bos=None), "")


def test_messages_of_which_a_template_makes_nothing_are_an_error():
    tokenizer = _tokenizer()
    tokenizer.chat_template = "{% if tools %}{{ tools }}{% endif %}"
    with pytest.raises(DataError, match=r"makes nothing of the prompt's messages.*'hi'"):
        encode_prompt(tokenizer, [{"role": "user", "content": "hi"}])


@pytest.mark.parametrize("messages", [False, True])
def test_a_lone_surrogate_is_an_error(messages):
    tokenizer, text = _tokenizer(), "a \ud83d b"
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    prompt = [{"role": "user", "content": text}] if messages else text
    with pytest.raises(DataError, match=r"lone surrogate .* not a character: 'a \\ud83d b'"):
        encode_prompt(tokenizer, prompt)


def test_bos_and_eos_may_be_one_token():
    tokenizer = _tokenizer("<s> $A", bos="</s>")
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == 2
    assert encode_prompt(tokenizer, "") == [2]


def test_messages_go_through_the_chat_template():
    tokenizer, messages = _tokenizer("<s> $A"), [{"role": "user", "content": "a b"}]
    with pytest.raises(DataError, match="no chat template"):
        encode_prompt(tokenizer, messages)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% "
        "endfor %}{% if add_generation_prompt %}assistant{% endif %}"
    )
    assert encode_prompt(tokenizer, messages) == [6, 3, 4, 7]


@pytest.mark.parametrize("template", [None, "<s> $A </s>"])
def test_completions_have_one_eos_and_nothing_else_added(template):
    tokenizer = _tokenizer(template)
    assert encode_completion(tokenizer, "a b", 2) == [3, 4, 2]
    assert encode_completion(tokenizer, "", 2) == [2]


def test_a_completion_is_not_given_a_space_that_the_text_has_not():
    backend = Tokenizer(models.BPE({"▁": 0, "a": 1, "▁a": 2, "\n": 3, "</s>": 4}, [("▁", "a")]))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", bos_token="</s>"
    )
    assert encode_prompt(tokenizer, "a") == [2]
    # "a" + " a" is "a a"; with the tokenizer's own space it would be "a  a"
    assert encode_completion(tokenizer, " a", 4) == [2, 4]
    assert encode_completion(tokenizer, "a", 4) == [1, 4]
    assert encode_completion(tokenizer, "\na", 4) == [3, 1, 4]
    # at the beginning of a text the space belongs
    assert encode_completion(tokenizer, "a", 4, first=True) == [2, 4]


def test_limits_drop_and_count():
    tokenizer = _tokenizer("<s> $A")
    pairs = [
        PairExample("a", "b", "c"),
        PairExample("a", "b", "c b"),
        PairExample("a", "b a b", "c"),
    ]
    ((kept, found),), dropped = encode_preferences(tokenizer, pairs, 2, 4)
    assert (kept, found.prompt, found.completions) == (pairs[0], [1, 3], ([4, 2], [5, 2]))
    assert dropped == Dropped(2, 3, 4)
    assert str(dropped) == "2 of 3 (66.7%) are longer than 4 tokens and were dropped"
    assert encode_demonstrations(
        tokenizer, [Demonstration("a", "b"), Demonstration("", "a b c")], 2, 4
    ) == ([([1, 3], [4, 2])], Dropped(1, 2, 4))
    example = PromptExample("a b", {"x": 1})
    assert encode_prompts(tokenizer, [example], 3) == ([(example, [1, 3, 4])], Dropped(0, 1, 3))
    assert encode_prompts(tokenizer, [], 3) == ([], Dropped(0, 0, 3))
    with pytest.raises(
        DataError, match=r"all 3 examples are longer than 2 tokens \(the shortest has 4\)"
    ):
        encode_preferences(tokenizer, pairs, 2, 2)


# ---- whole conversations -------------------------------------------------------------------------
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{{ m['content'] or "
    "(m['tool_calls'] | tojson) }}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' "
    "%}{% generation %}"
    "{{ '<think></think>' if loop.last else '' }}{{ m['content'] + '<|im_end|>' }}{%- "
    "endgeneration -%}\n{% else %}"
    "{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt "
    "%}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TURNS = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hi\n"},
    {"role": "assistant", "content": "\n\nhello"},
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": "so so\n"},
    {"role": "user", "content": "bye"},
]


@pytest.fixture(scope="module")
def chat():
    """Byte-level BPE in which line ends merge with each other and with letters."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    specials = ["<|im_start|>", "<|im_end|>", "</s>"]
    text = [
        "system\nbe brief",
        "user\nhi\n",
        "assistant\n\n\nhello",
        "assistant\nso so\n",
        "user\nbye",
        "\n\n\nhello",
    ] * 5
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", additional_special_tokens=specials[:2]
    )


def _spoken(tokenizer, ids, actions):
    """The text of each run of actions."""
    runs, last = [], False
    for token, chosen in zip(ids, actions, strict=True):
        if chosen:
            runs = [*runs[:-1], [*runs[-1], token]] if last else [*runs, [token]]
        last = chosen
    return [tokenizer.decode(run) for run in runs]


def test_only_the_assistants_turns_are_actions(chat):
    chat.chat_template = CHATML
    ids, actions = encode_dialogue(chat, Dialogue(TURNS), 2)
    assert chat.decode(ids) == chat.apply_chat_template(TURNS, tokenize=False)
    assert _spoken(chat, ids, actions) == ["\n\nhello<|im_end|>", "so so\n<|im_end|>"]
    assert not actions[0]
    batch = PackedBatch.from_masked([(ids, actions), (ids[:4], actions[:4])])
    assert batch.action_mask.tolist() == actions + actions[:4]
    assert batch.lengths == (len(ids), 4)


def test_no_token_spans_the_beginning_of_a_turn(chat):
    # Tokenised as one text the line end of the header and those of the answer are one token, which
    # the model could never begin with.
    chat.chat_template = CHATML
    whole = chat.apply_chat_template(TURNS, tokenize=True, return_dict=False)
    ids, actions = encode_dialogue(chat, Dialogue(TURNS), 2)
    assert whole != ids
    for turn in (2, 4):
        prompt = encode_prompt(chat, TURNS[:turn])
        start = next(
            i
            for i in range(len(ids))
            if actions[i] and not actions[i - 1] and chat.decode(ids[:i]) == chat.decode(prompt)
        )
        assert ids[start - 2 : start] == prompt[-2:]
    assert encode_dialogue(chat, Dialogue(TURNS[:3]), 2)[0][:-1] == encode_prompt(
        chat, TURNS[:2]
    ) + encode_completion(chat, "\n\nhello", 1)


def test_a_turn_that_no_special_token_ends_gets_the_eos_at_the_end_only(chat):
    chat.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '|' }}{% "
        "endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    ids, actions = encode_dialogue(chat, Dialogue(TURNS[1:5]), 2)
    assert _spoken(chat, ids, actions) == ["\n\nhello|", "so so\n|</s>"]
    ids, actions = encode_dialogue(chat, Dialogue(TURNS[1:4]), 2)
    assert _spoken(chat, ids, actions) == ["\n\nhello|"]
    assert ids[-1] != 2


def test_a_template_that_rewrites_earlier_turns_needs_generation_marks(chat):
    chat.chat_template = MARKED
    dialogue = Dialogue(TURNS[:5])
    ids, actions = encode_dialogue(chat, dialogue, 2)
    assert chat.decode(ids) == chat.apply_chat_template(dialogue.messages, tokenize=False)
    assert _spoken(chat, ids, actions) == [
        "\n\nhello<|im_end|>",
        "<think></think>so so\n<|im_end|>",
    ]
    theirs = chat.apply_chat_template(
        dialogue.messages, return_assistant_tokens_mask=True, return_dict=True
    )
    assert (
        _spoken(chat, theirs["input_ids"], theirs["assistant_masks"])[0]
        == "assistant\n\n\nhello<|im_end|>"
    )  # why we do not take their mask
    chat.chat_template = MARKED.replace("{% generation %}", "").replace("{%- endgeneration -%}", "")
    with pytest.raises(
        DataError, match=r"put \{% generation %\} and \{% endgeneration %\} around them"
    ):
        encode_dialogue(chat, dialogue, 2)


def test_tools_reach_the_chat_template(chat):
    chat.chat_template = "{% for t in tools or [] %}{{ t['name'] }};{% endfor %}" + CHATML
    tools = [{"name": "add"}, {"name": "sub"}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}
    ids, actions = encode_dialogue(
        chat, Dialogue([TURNS[1], call, {"role": "tool", "content": "3"}, TURNS[4]], tools), 2
    )
    assert chat.decode(ids).startswith("add;sub;<|im_start|>user")
    assert _spoken(chat, ids, actions) == ['[{"name": "add"}]<|im_end|>', "so so\n<|im_end|>"]
    prompt = encode_prompt(chat, TURNS[:2], tools)
    assert chat.decode(prompt).startswith("add;sub;")
    assert encode_prompts(chat, [PromptExample(TURNS[:2], {"tools": tools})], 99)[0][0][1] == prompt
    assert (
        encode_demonstrations(chat, [Demonstration(TURNS[:2], "a", tools)], 2, 99)[0][0][0]
        == prompt
    )
    assert (
        encode_preferences(chat, [PairExample(TURNS[:2], "a", "b", tools=tools)], 2, 99)[0][0][
            1
        ].prompt
        == prompt
    )


def test_dialogues_have_a_limit_and_need_a_template(chat):
    chat.chat_template = CHATML
    (short,), dropped = encode_dialogues(chat, [Dialogue(TURNS[1:3]), Dialogue(TURNS * 9)], 2, 60)
    assert len(short[0]) < 60
    assert dropped.count == 1
    with pytest.raises(DataError, match="no chat template"):
        encode_dialogue(_tokenizer(), Dialogue(TURNS), 2)
    with pytest.raises(DataError, match="text needs a tokenizer"):
        encode_dialogue(None, Dialogue(TURNS), 2)
    for wrong in (([1, 2], [True, True]), ([1, 2], [False])):
        with pytest.raises(
            ValueError,
            match="expected an action flag for each token of sequence 0 and none on its first",
        ):
            PackedBatch.from_masked([wrong])


@pytest.mark.parametrize(
    "template, said",
    [
        ("{{ raise_exception('no system') }}", "messages: no system;"),
        ("{{ 1 / 0 }}", "messages: ZeroDivisionError: division by zero;"),
        ("{{ '%(a)s' % {} }}", "messages: KeyError: 'a';"),
        ("{{ '{1}'.format(2) }}", "messages: IndexError: "),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "messages: RecursionError: "),
        ("{{ 'a' + 1 }}", "messages: TypeError: "),
        ("{{ '%d' % 'a' }}", "messages: TypeError: "),
        ("{{ strftime_now(3) }}", "messages: "),
        ("{% for m in messages %}{{ m.content.no.more }}{% endfor %}", "messages: "),
    ],
)
def test_whatever_a_template_raises_is_the_templates(chat, template, said):
    chat.chat_template = template
    for call in (
        lambda: encode_prompt(chat, TURNS[:2]),
        lambda: encode_dialogue(chat, Dialogue(TURNS), 2),
    ):
        with pytest.raises(DataError, match=f"the model's chat template refuses these {said}"):
            call()


@pytest.mark.parametrize("template", ["{{ ... }", "{% for %}", "a\n{% if x %}"])
def test_a_template_that_cannot_be_read_is_not_blamed_on_the_messages(chat, template):
    chat.chat_template = template
    with pytest.raises(DataError, match=r"is no template that can be read: .* \(line \d of it\)"):
        encode_prompt(chat, TURNS[:2])


def test_an_attribute_that_a_template_asks_for_in_vain_is_too(chat, monkeypatch):
    chat.chat_template = CHATML

    def missing(*args, **kwargs):
        raise AttributeError("no such thing")

    monkeypatch.setattr(chat, "apply_chat_template", missing)
    with pytest.raises(DataError, match="messages: AttributeError: no such thing; change their"):
        encode_prompt(chat, TURNS[:2])


def test_posts_to_be_summarized_are_shortened_by_the_models_own_tokens(tmp_path):
    path = tmp_path / "tldr.jsonl"
    path.write_text(
        json.dumps({"subreddit": "a", "title": "b", "post": "a b c\na b\nc c", "summary": "c"})
    )
    tokenizer = _tokenizer("<s> $A")
    for limit, kept in (
        (20, "a b c\na b\nc c"),
        (14, "a b c\na b\nc c"),
        (13, "a b c\na b"),
        (11, "a b c"),
    ):
        options = ReadOptions(count_tokens=partial(count_tokens, tokenizer), query_tokens=limit)
        (example,) = load_demonstrations(path, options=options)
        assert example.prompt == f"SUBREDDIT: r/a\n\nTITLE: b\n\nPOST: {kept}\n\nTL;DR:"
        assert len(encode_prompt(tokenizer, example.prompt)) <= limit


def test_real_text_survives_the_boundary(shared):
    tokenizer = AutoTokenizer.from_pretrained(str(shared / "models/stories260k"))
    pairs = load_pairs(shared / "data/hh-rlhf/harmless-base-test.jsonl.gz")[0]
    for pair, found in encode_preferences(tokenizer, pairs[:200], 2, 100_000)[0]:
        for text, ids in zip((pair.chosen, pair.rejected), found.completions, strict=True):
            assert tokenizer.decode(found.prompt[1:] + ids[:-1]) == pair.prompt + text
    kept, dropped = encode_preferences(tokenizer, pairs, 2, 512)
    assert (len(kept), dropped.count) == (1606, 697)
    assert (
        encode_prompt(tokenizer, "Once upon a time") == tokenizer("Once upon a time")["input_ids"]
    )
