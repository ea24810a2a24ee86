"""Formats: small files written by each schema, byte for byte, and what they become for every
use.

One file: the sample files, of which every use reads all.
"""

import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedrl.engine.base.errors import DataError
from fusedrl.engine.data.formats import FORMATS, NOUNS
from fusedrl.engine.data.readers import (
    Demonstration,
    Dialogue,
    PairExample,
    PromptExample,
    RankedExample,
    ReadOptions,
    ScoredExample,
    StepExample,
    UnpairedExample,
    load_demonstrations,
    load_dialogues,
    load_pairs,
    load_prompts,
    load_ranked,
    load_scored,
    load_steps,
    load_unpaired,
)
from fusedrl.engine.data.templates import few_shot, shorten, tldr

LOADERS = {
    PromptExample: load_prompts,
    Demonstration: load_demonstrations,
    Dialogue: load_dialogues,
    PairExample: load_pairs,
    RankedExample: load_ranked,
    UnpairedExample: load_unpaired,
    StepExample: load_steps,
    ScoredExample: load_scored,
}


@pytest.fixture
def jsonl(tmp_path):
    def write(*rows: object, name: str = "data.jsonl"):
        path = tmp_path / name
        raw = b"".join(
            (row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows
        )
        path.write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
        return path

    return write


def _user(text):
    return {"role": "user", "content": text}


def _assistant(text):
    return {"role": "assistant", "content": text}


HH = "\n\nHuman: hi\n\nAssistant:"


# ---- HH-RLHF -------------------------------------------------------------------------------------
def test_hh_rlhf(jsonl, caplog):
    path = jsonl(
        b'{"chosen": "\\n\\nHuman: hi\\n\\nAssistant: yes", "rejected": "\\n\\nHuman: '
        b'hi\\n\\nAssistant: no"}',
        name="train.jsonl.gz",
    )
    assert load_pairs(path) == ([PairExample(HH, " yes", " no")], {})
    assert load_pairs(f"hh-rlhf:{path}")[0] == load_pairs(path)[0]
    assert [example.prompt for example in load_prompts(path)] == [HH]
    assert load_demonstrations(path) == [Demonstration(HH, " yes")]
    assert "not meant for supervised training" in caplog.text


RED_TEAM = {
    "min_harmlessness_score_transcript": -1.5,
    "num_params": "52B",
    "model_type": "rlhf",
    "rating": 4.0,
    "task_description": "d",
    "transcript": "\n\nHuman: how?\n\nAssistant: like so\n\nHuman: more\n\nAssistant: no",
    "red_team_member_id": 3,
    "is_upworker": True,
    "tags": None,
    "task_description_harmlessness_score": 0.5,
}


@pytest.mark.parametrize("form", ["one line", "indented", "jsonl"])
def test_the_red_team_file_is_a_list_of_attacks(tmp_path, form):
    path = tmp_path / "red_team_attempts.jsonl.gz"
    rows = [RED_TEAM, RED_TEAM | {"transcript": "\n\nHuman: b\n\nAssistant:"}]
    text = (
        "\n".join(map(json.dumps, rows))
        if form == "jsonl"
        else json.dumps(rows, indent=1 if form == "indented" else None)
    )
    path.write_bytes(gzip.compress(text.encode()))
    prompts = load_prompts(path)
    assert [example.prompt for example in prompts] == [
        "\n\nHuman: how?\n\nAssistant:",
        "\n\nHuman: b\n\nAssistant:",
    ]
    assert prompts[0].columns == RED_TEAM
    for load in (load_demonstrations, load_dialogues):
        with pytest.raises(
            DataError,
            match=r"hh-red-team is not read as .*: the transcripts are attempts to make an "
            r"assistant do harm",
        ):
            load(path)
    with pytest.raises(
        DataError, match=r"holds prompts, and no pairs: .* Formats that do: shp, webgpt"
    ):
        load_pairs(path)


# ---- SHP, WebGPT ---------------------------------------------------------------------------------
def _shp(post="p1", labels=1, ratio=3.0, a="good", b="bad", **more):
    return {
        "post_id": post,
        "domain": "askculinary_train",
        "upvote_ratio": 0.99,
        "history": "How long?",
        "c_root_id_A": "x",
        "c_root_id_B": "y",
        "created_at_utc_A": 1,
        "created_at_utc_B": 2,
        "score_A": 30,
        "score_B": 10,
        "human_ref_A": a,
        "human_ref_B": b,
        "labels": labels,
        "seconds_difference": 1.0,
        "score_ratio": ratio,
    } | more


def test_shp(jsonl):
    path = jsonl(
        _shp(),
        _shp(labels=0, b="\nbetter"),
        _shp(ratio=1.9),
        *(_shp("p2", a=f"a{i}") for i in range(7)),
    )
    prompt = "\n\nHuman: How long?\n\nAssistant:"
    pairs, dropped = load_pairs(path)
    assert pairs[:2] == [
        PairExample(prompt, " good", " bad"),
        PairExample(prompt, "\nbetter", " good"),
    ]
    assert [pair.chosen for pair in pairs[2:]] == [" a0", " a1", " a2", " a3", " a4"]
    assert dropped == {"the score ratio is below 2": 1, "the post has more than 5 pairs": 2}
    assert (
        len(load_pairs(path, options=ReadOptions(min_score_ratio=1, max_pairs_per_post=100))[0])
        == 10
    )
    assert load_pairs(f"shp/chat:{path}")[0][0] == PairExample([_user("How long?")], "good", "bad")
    assert load_prompts(path)[0] == PromptExample(prompt, _shp())


def _webgpt(score_0, score_1):
    return {
        "question": {"dataset": "eli5", "id": "1", "full_text": "Why?"},
        "quotes_0": {"title": ["t"], "extract": ["e"]},
        "answer_0": "So [1].",
        "tokens_0": {"prefix": [1], "completion": [2]},
        "score_0": score_0,
        "quotes_1": {"title": [], "extract": []},
        "answer_1": "Thus.",
        "tokens_1": {"prefix": [], "completion": []},
        "score_1": score_1,
    }


def test_webgpt(jsonl):
    path = jsonl(_webgpt(0.5, -0.5), _webgpt(-1, 1), _webgpt(0, 0.0))
    prompt = "\n\nHuman: Why?\n\nAssistant:"
    expected = [
        PairExample(prompt, " So [1].", " Thus."),
        PairExample(prompt, " Thus.", " So [1]."),
    ]
    assert load_pairs(path) == (expected, {"a tie": 1})
    assert load_pairs(path, options=ReadOptions(soft_labels=True)) == (
        [*expected, PairExample(prompt, " So [1].", " Thus.", label=0.5)],
        {},
    )
    assert load_prompts(f"webgpt/plain:{path}")[0].prompt == "Why?"


# ---- summaries -----------------------------------------------------------------------------------
POST = {"id": "t3_1", "post": "Line one.\nLine two.", "title": "A title", "subreddit": "tifu"}
QUERY = "SUBREDDIT: r/tifu\n\nTITLE: A title\n\nPOST: Line one.\nLine two.\n\nTL;DR:"


def _summary(text):
    return {"text": text, "policy": "sup", "note": None}


def _comparison(choice, split="train", info=POST):
    return {
        "info": info,
        "summaries": [_summary(" zero"), _summary("one")],
        "choice": choice,
        "worker": "w",
        "batch": "b",
        "split": split,
        "extra": {"confidence": 7},
    }


def test_summarize_comparisons(jsonl):
    article = {"id": "a", "site": "cnn", "title": "T", "article": "News."}
    path = jsonl(_comparison(0), _comparison(1, "valid1"), _comparison(1, info=article))
    assert load_pairs(path)[0] == [
        PairExample(QUERY, " zero", " one"),
        PairExample(QUERY, " one", " zero"),
        PairExample("Article:\nNews.\n\nTL;DR:", " one", " zero"),
    ]
    pairs, dropped = load_pairs(path, options=ReadOptions(split="train"))
    assert len(pairs) == 2
    assert dropped == {"of another split than train": 1}
    assert load_prompts(path)[0].prompt == QUERY


def test_summarize_axis_evals(jsonl):
    axes = {"overall": 6, "accuracy": 7, "coverage": None, "coherence": 5}
    row = {
        "info": POST,
        "split": "valid1",
        "summary": _summary(" s") | {"axes": axes},
        "worker": "w",
        "batch": "b",
    }
    path = jsonl(row, row | {"summary": _summary(" s") | {"axes": {"overall": None}}})
    assert load_scored(path) == (
        [ScoredExample(QUERY, " s", {"overall": 6.0, "accuracy": 7.0, "coherence": 5.0})],
        {"no axis was scored": 1},
    )


def test_tldr_posts(jsonl):
    path = jsonl(POST | {"summary": "I fell."})
    assert load_demonstrations(path) == [Demonstration(QUERY, " I fell.")]
    assert load_prompts(path)[0].columns["summary"] == "I fell."
    shorter = load_demonstrations(
        path, options=ReadOptions(count_tokens=lambda text: len(text.split()), query_tokens=9)
    )
    assert shorter[0].prompt == "SUBREDDIT: r/tifu\n\nTITLE: A title\n\nPOST: Line one.\n\nTL;DR:"


def test_posts_are_cut_at_the_last_line_end_that_fits_and_only_then_within_a_line():
    def words(text):
        return len(text.split())

    for limit in range(8, 20):
        body = (
            tldr("r", "t", "a b c\nd e\nf g h\ni", count_tokens=words, limit=limit)
            .split("POST: ")[1]
            .removesuffix("\n\nTL;DR:")
        )
        room = limit - 6
        assert body == next(
            text
            for text in ("a b c\nd e\nf g h\ni", "a b c\nd e\nf g h", "a b c\nd e", "a b c", "a b ")
            if words(text) <= room
        )
    assert shorten(lambda text: f"<{text}>", "x" * 1000, len, 12) == f"<{'x' * 10}>"
    assert shorten(lambda text: f"<{text}>", "x\nyy", len, 5) == "<x>"
    with pytest.raises(ValueError, match="more than 1 tokens without its text"):
        shorten(lambda text: f"<{text}>", "x", len, 1)


# ---- GSM8K and instructions ----------------------------------------------------------------------
def test_gsm8k(jsonl):
    row = {"question": "How many?", "answer": "6*7=<<6*7=42>>1,042.\n#### 1,042"}
    path = jsonl(row, {"question": "Below?", "answer": "#### -3.5"})
    prompts = load_prompts(path)
    assert prompts[0] == PromptExample("Question: How many?\nAnswer:", row | {"gold": "1042"})
    assert prompts[1].columns["gold"] == "-3.5"
    assert load_demonstrations(path)[0] == Demonstration(
        "Question: How many?\nAnswer:", f" {row['answer']}"
    )
    assert load_prompts(f"gsm8k/chat:{path}")[0].prompt == [_user("How many?")]
    assert (
        load_demonstrations(f"gsm8k/cot:{path}")[0].prompt
        == "Q: How many?\nA: Let's think step by step."
    )
    with pytest.raises(
        DataError,
        match=r"data.jsonl:2: expected \"answer\" to end with \"#### number\" as in GSM8K",
    ):
        load_prompts(jsonl(row, {"question": "Who?", "answer": "Ada"}))


def test_instructions(jsonl):
    path = jsonl(
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Say hi.", "input": "", "output": "hi"},
        {"instruction": "Add.", "output": "5", "cot": "2 and 3 make 5."},
    )
    with_input, without, thought = load_demonstrations(path)
    assert with_input == Demonstration(
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n",
        "3",
    )
    assert without == Demonstration(
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n"
        "### Instruction:\nSay hi.\n\n### Response:\n",
        "hi",
    )
    assert thought.completion == "2 and 3 make 5.\n5"
    assert load_demonstrations(f"instruction/plain:{path}")[0] == Demonstration("Add.\n\n1 2", "3")
    with pytest.raises(DataError, match='missing column "output"'):
        load_demonstrations(jsonl({"instruction": "Add."}))


def test_few_shot_prompts(jsonl):
    row = {
        "instruction": "Translate.",
        "shots": [{"input": "un", "output": "one"}, {"input": "deux", "output": "two"}],
        "input": "trois",
        "output": "three",
    }
    path = jsonl(row)
    text = (
        "Translate.\n\nQuestion: un\nAnswer: one\n\nQuestion: deux\nAnswer: two\n\nQuestion: "
        "trois\nAnswer:"
    )
    assert load_demonstrations(path) == [Demonstration(text, " three")]
    assert few_shot([("un", "one"), ("deux", "two")], "trois", instruction="Translate.") == text
    chat = [
        {"role": "system", "content": "Translate."},
        _user("un"),
        _assistant("one"),
        _user("deux"),
        _assistant("two"),
        _user("trois"),
    ]
    assert load_demonstrations(f"instruction/chat:{path}") == [Demonstration(chat, "three")]
    assert few_shot([], "trois") == "Question: trois\nAnswer:"
    with pytest.raises(DataError, match="unknown prompt template 'qq'; there are plain, chat"):
        few_shot([], "x", form="qq")


# ---- TRL's formats -------------------------------------------------------------------------------
def test_language_modelling(jsonl):
    assert load_demonstrations(jsonl({"text": "t"})) == [Demonstration("", "t")]
    turns = [
        {"role": "system", "content": "s"},
        _user("q"),
        _assistant("a"),
        _user("r"),
        _assistant("b"),
    ]
    path = jsonl({"messages": turns})
    assert load_demonstrations(path) == [Demonstration(turns[:-1], "b")]
    assert load_dialogues(path) == ([Dialogue(turns)], {})
    assert load_prompts(path) == [PromptExample(turns[:-1], {})]
    assert load_prompts(jsonl({"messages": turns[:2]})) == [PromptExample(turns[:2], {})]
    with pytest.raises(DataError, match=r"begin with another turn"):
        load_prompts(jsonl({"messages": [_assistant("a")]}))


def test_prompt_completion(jsonl):
    path = jsonl({"prompt": "p", "completion": "c", "x": 1})
    assert load_demonstrations(path) == [Demonstration("p", "c")]
    assert load_prompts(path) == [PromptExample("p", {"completion": "c", "x": 1})]
    path = jsonl({"prompt": [_user("q")], "completion": [_assistant("a")]})
    assert load_demonstrations(path) == [Demonstration([_user("q")], "a")]
    assert load_dialogues(path)[0] == [Dialogue([_user("q"), _assistant("a")])]


def test_preferences(jsonl):
    explicit = jsonl(
        {"prompt": "p", "chosen": "a", "rejected": "b", "margin": 1},
        {"prompt": "q", "chosen": "a", "rejected": "b", "margin": None},
    )
    assert load_pairs(explicit)[0] == [
        PairExample("p", "a", "b", margin=1.0),
        PairExample("q", "a", "b"),
    ]
    assert load_pairs(f"preference/dialogue:{explicit}")[0][1] == PairExample(
        "\n\nHuman: q\n\nAssistant:", " a", " b"
    )
    implicit = jsonl(
        {"chosen": [_user("q"), _assistant("a")], "rejected": [_user("q"), _assistant("b")]}
    )
    assert load_pairs(implicit)[0] == [PairExample([_user("q")], "a", "b")]
    messages = jsonl(
        {"prompt": [_user("q")], "chosen": [_assistant("a")], "rejected": [_assistant("b")]}
    )
    assert load_pairs(messages)[0] == [PairExample([_user("q")], "a", "b")]
    assert load_demonstrations(messages) == [Demonstration([_user("q")], "a")]


def test_unpaired(jsonl, caplog):
    path = jsonl(
        {"prompt": "p", "completion": "c", "label": True},
        {"prompt": [_user("q")], "completion": [_assistant("d")], "label": False},
    )
    assert load_unpaired(path)[0] == [
        UnpairedExample("p", "c", True),
        UnpairedExample([_user("q")], "d", False),
    ]
    assert load_demonstrations(path) == [Demonstration("p", "c")]
    assert "1 rows dropped: the answer is labelled as not wanted" in caplog.text


def test_a_row_without_its_label_does_not_become_a_demonstration(jsonl):
    with pytest.raises(
        DataError,
        match=r"data.jsonl:2: missing column \"label\" of the format unpaired; found 'prompt', "
        r"'completion'",
    ):
        load_demonstrations(
            jsonl(
                {"prompt": "p", "completion": "c", "label": False},
                {"prompt": "p", "completion": "bad"},
            )
        )


def test_stepwise(jsonl):
    path = jsonl({"prompt": "p", "completions": ["a", "b"], "labels": [True, False]})
    assert load_steps(path)[0] == [StepExample("p", ("a", "b"), (True, False))]
    assert load_prompts(path) == [PromptExample("p", {"labels": [True, False]})]
    for row, reason in (
        (
            {"prompt": "p", "completions": ["a"], "labels": [1]},
            'expected "labels\\[0\\]" to be a boolean, got a number',
        ),
        ({"prompt": "p", "completions": ["a"], "labels": []}, "got 0 and 1"),
        (
            {"prompt": "p", "completions": "a", "labels": [True]},
            'expected "completions" to be a list of strings',
        ),
    ):
        with pytest.raises(DataError, match=reason):
            load_steps(jsonl(row))


TOOLS = [
    {
        "type": "function",
        "function": {"name": "add", "parameters": {"type": "object", "properties": {}}},
    }
]
CALL = {
    "role": "assistant",
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}],
}


def test_tools_and_their_calls(jsonl):
    turns = [_user("q"), CALL, {"role": "tool", "name": "add", "content": "3"}, _assistant("3")]
    for tools in (TOOLS, json.dumps(TOOLS)):
        assert load_demonstrations(jsonl({"messages": turns, "tools": tools})) == [
            Demonstration(turns[:-1], "3", TOOLS)
        ]
        assert load_dialogues(jsonl({"messages": turns, "tools": tools}))[0] == [
            Dialogue(turns, TOOLS)
        ]
        assert load_prompts(jsonl({"prompt": [_user("q")], "tools": tools}))[0].columns == {
            "tools": TOOLS
        }
    # a text takes no tools: a column like others
    assert load_prompts(jsonl({"prompt": "q", "tools": "hammer"}))[0].columns == {"tools": "hammer"}
    with pytest.raises(
        DataError, match="is a call of a tool, which has no text; read the file as dialogues"
    ):
        load_demonstrations(jsonl({"messages": turns[:2]}))
    with pytest.raises(
        DataError, match='expected "tools" to be a list of JSON schemas, got an object'
    ):
        load_prompts(jsonl({"prompt": [_user("q")], "tools": {}}))


# ---- ranked lists, MOSS --------------------------------------------------------------------------
def test_ranked_lists(jsonl):
    row = {"prompt": "p", "completions": ["a", "b", "c", "d"], "ranks": [2, 1, 2, 4]}
    path = jsonl(
        row,
        {"prompt": "p", "completions": ["a", "b"], "ranks": [1, 1]},
        {"prompt": "p", "completions": ["a", " "], "ranks": [1, 2]},
    )
    (example,), dropped = load_ranked(path)
    assert example == RankedExample("p", ("a", "b", "c", "d"), (2, 1, 2, 4))
    assert set(example.pairs()) == {(1, 0), (1, 2), (1, 3), (0, 3), (2, 3)}
    assert dropped == {"all answers tie": 1, "fewer than two answers": 1}
    pairs, _ = load_pairs(path)
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [
        ("a", "d"),
        ("b", "a"),
        ("b", "c"),
        ("b", "d"),
        ("c", "d"),
    ]
    assert sum(pair.weight for pair in pairs) == pytest.approx(1)
    pairs, dropped = load_pairs(
        jsonl({"prompt": "p", "completions": ["a", "a ", "b"], "ranks": [1, 2, 3]})
    )
    assert [(pair.chosen, pair.rejected, pair.weight) for pair in pairs] == [
        ("a", "b", 0.5),
        ("a ", "b", 0.5),
    ]
    for k in range(2, 10):
        ranked = load_ranked(
            jsonl(
                {"prompt": "p", "completions": [f"a{i}" for i in range(k)], "ranks": list(range(k))}
            )
        )[0][0]
        assert len(list(ranked.pairs())) == k * (k - 1) // 2
    for bad, reason in (
        ({"ranks": [1, 2, 3]}, 'as many "ranks" as "completions", got 3 and 4'),
        ({"ranks": [1, 2, 2.5, 3]}, r'"ranks\[2\]" to be a whole number'),
        ({"completions": "abcd"}, "a list of answers, got a string"),
        ({"completions": ["a", 1, "b", "c"]}, r'"completions\[1\]" to be a string'),
    ):
        with pytest.raises(DataError, match=reason):
            load_ranked(jsonl(row | bad))


def test_moss_files(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([["q"], ["q", "a", "r"]]))
    assert [example.prompt for example in load_prompts(path)] == [
        [_user("q")],
        [_user("q"), _assistant("a"), _user("r")],
    ]
    path.write_text(json.dumps([["q", "a", "r", "b"]]))
    assert load_dialogues(path)[0] == [
        Dialogue([_user("q"), _assistant("a"), _user("r"), _assistant("b")])
    ]
    assert load_demonstrations(path)[0].completion == "b"
    path.write_text(json.dumps([{"chosen": ["q", "a"], "rejected": ["q", "b"]}]))
    assert load_pairs(path)[0] == [PairExample([_user("q")], "a", "b")]


# ---- the table -----------------------------------------------------------------------------------
def test_a_use_that_a_format_does_not_have_is_refused_with_what_does(jsonl):
    for entry in FORMATS.values():
        for kind in set(NOUNS) - set(entry.reads):
            with pytest.raises(
                DataError, match=f"of the format {entry.name} (holds|is not read as)"
            ):
                LOADERS[kind](f"{entry.name}:{jsonl(dict.fromkeys(entry.columns))}")


def test_unknown_columns_name_the_nearest_format(jsonl):
    with pytest.raises(
        DataError,
        match=r"found 'prompt', 'choosen', 'rejected'; nearest is preference, which needs "
        r"\"chosen\" too",
    ):
        load_pairs(jsonl({"prompt": "p", "choosen": "a", "rejected": "b"}))
    with pytest.raises(
        DataError,
        match=r"no format of prompts has these columns: found 'promt'; nearest is prompt, which "
        r"needs \"prompt\" too",
    ):
        load_prompts(jsonl({"promt": "p"}))


_names = st.sampled_from(["role", "content", "text", "axes", "post", "tool_calls"])
_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 9)
    | st.floats(-2, 2)
    | st.sampled_from(["", " ", "a", f"{HH} a", "#### 3"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_names, inner, max_size=3),
    max_leaves=8,
)


def _complaint(load, entry):
    try:
        load(entry)
    except DataError as error:
        return str(error)
    return None


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(FORMATS)), st.data())
def test_whatever_the_columns_hold_the_answer_is_records_or_a_data_error(
    tmp_path_factory, name, data
):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    names = {
        *FORMATS[name].columns,
        *data.draw(
            st.sets(
                st.sampled_from(["tools", "margin", "input", "output", "cot", "shots", "split"])
            )
        ),
    }
    row = {column: data.draw(_json) for column in names}
    path.write_text(json.dumps([row]))
    for kind in FORMATS[name].reads:
        for entry in (str(path), f"{name}:{path}"):
            complaint = _complaint(LOADERS[kind], entry)
            assert complaint is None or str(path) in complaint


def test_a_name_that_is_no_format_is_refused_with_the_nearest(jsonl):
    with pytest.raises(DataError, match=r"unknown data format 'hh-rhlf'; did you mean 'hh-rlhf'\?"):
        load_pairs("hh-rhlf:data.jsonl")
    with pytest.raises(DataError, match="the format hh-rlhf takes no prompt template"):
        load_pairs("hh-rlhf/chat:data.jsonl")
    with pytest.raises(DataError, match="unknown prompt template 'chatt'"):
        load_pairs("shp/chatt:data.jsonl")


def test_the_first_known_row_decides_the_format(jsonl):
    with pytest.raises(DataError) as caught:
        load_pairs(
            jsonl(
                {"x": 1},
                {"chosen": f"{HH} a", "rejected": f"{HH} b"},
                {"prompt": "p", "chosen": "a", "rejected": "b"},
            )
        )
    assert "data.jsonl:1: no format of pairs has these columns: found 'x'" in str(caught.value)
    assert (
        'data.jsonl:3: the file began with rows of the format hh-rlhf, which has no column "prompt"'
        in str(caught.value)
    )
    assert "2 bad lines, 1 good" in str(caught.value)


# ---- one JSON list -------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "document, line, reason",
    [
        (
            '[{"prompt": "a"},\n{"prompt": "b"',
            2,
            "not JSON: Expecting ',' delimiter in the row of the list that begins here",
        ),
        (
            '[{"prompt": "a"}\n',
            2,
            "not JSON: expected ',' or ']' behind a row of the list, but the file ends",
        ),
        (
            '[{"prompt": "a"}\n{"prompt": "b"}]',
            2,
            "not JSON: expected ',' or ']' behind a row of the list, got '{'",
        ),
        ('[{"prompt": "a"}]\nx', 2, "not JSON: expected nothing behind the list of rows, got 'x'"),
        ('[{"prompt": "a"},\n 3]', 2, "expected a JSON object, got a number"),
        ('[{"prompt": "a"},\n{"promt": 1}]', 2, 'missing column "prompt"'),
        ('[{"prompt": "a"},\n\n{"prompt": NaN}]', 3, "NaN is not a JSON value"),
        ("[" * 100_000, 1, "not JSON"),
        ("[\n", 2, "not JSON: Expecting value"),
    ],
)
def test_bad_lists(tmp_path, document, line, reason):
    path = tmp_path / "data.json"
    path.write_text(document)
    with pytest.raises(DataError) as caught:
        load_prompts(path)
    assert f"{path}:{line}: " in str(caught.value)
    assert reason in str(caught.value)


def test_good_lists(tmp_path):
    path = tmp_path / "data.json"
    path.write_bytes(b'\xef\xbb\xbf \n[ {"prompt" : "a\xe2\x82\xac"} ,\r\n {"prompt": "b]"}\n]\n')
    assert [example.prompt for example in load_prompts(path)] == ["a€", "b]"]
    path.write_bytes(b"[]")
    with pytest.raises(DataError, match="no usable row"):
        load_prompts(path)
    path.write_bytes(b'[{"prompt": "a"},\n{"prompt": "\xff"}]')
    with pytest.raises(DataError, match=r"data.json:2: not UTF-8: byte 0xff"):
        load_prompts(path)


# ---- real files ----------------------------------------------------------------------------------
def test_real_questions(shared):
    counts = {}
    for split in ("train", "test"):
        path = shared / f"data/gsm8k/{split}.jsonl"
        prompts, demonstrations = load_prompts(path), load_demonstrations(path)
        counts[split] = (
            len(prompts),
            len(demonstrations),
            len({example.prompt for example in prompts}),
        )
        assert all(float(example.columns["gold"]).is_integer() for example in prompts)
        assert all(
            example.completion.endswith(f"#### {example.completion.rpartition('#### ')[2]}")
            for example in demonstrations
        )
    assert counts == {"train": (7473, 7473, 7473), "test": (1319, 1319, 1319)}
    assert load_prompts(shared / "data/gsm8k/train.jsonl")[0].columns["gold"] == "72"
