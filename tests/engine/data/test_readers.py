"""Readers: rows of the plain formats, and every way in which a line can be bad. The formats with a
schema of their own are in test_formats.py."""

import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusedrl.engine.base.errors import DataError
from fusedrl.engine.data.readers import (
    Demonstration,
    PairExample,
    PromptExample,
    Source,
    load_demonstrations,
    load_pairs,
    load_prompts,
    parse_data,
)

HH = "\n\nHuman: hi\n\nAssistant:"


def _file(tmp_path, content: bytes, name: str = "data.jsonl"):
    path = tmp_path / name
    path.write_bytes(content)
    return path


def _rows(tmp_path, *rows):
    return _file(tmp_path, b"".join(json.dumps(row).encode() + b"\n" for row in rows))


def _user(text):
    return {"role": "user", "content": text}


def _assistant(text):
    return {"role": "assistant", "content": text}


# ---- forms ---------------------------------------------------------------------------------------
def test_prompts_carry_their_columns(tmp_path):
    path = _rows(
        tmp_path,
        {"prompt": "a", "answer": 3},
        {"prompt": [_user("b")], "level": "x"},
        {"prompt": "c"},
    )
    assert load_prompts(path) == [
        PromptExample("a", {"answer": 3, "level": None}),
        PromptExample([_user("b")], {"answer": None, "level": "x"}),
        PromptExample("c", {"answer": None, "level": None}),
    ]


@pytest.mark.parametrize("empty", ["", " \n", [_user("")], [_user(" "), _user("")]])
def test_an_empty_prompt_is_a_bad_row(tmp_path, empty):
    path = _rows(tmp_path, {"prompt": "a"}, {"prompt": empty})
    with pytest.raises(DataError, match=":2: the prompt is empty, so that nothing is asked"):
        load_prompts(path)
    assert [one.prompt for one in load_prompts(path, skip_bad_lines=True)] == ["a"]


def test_prompts_of_preference_rows_are_the_common_prefix(tmp_path):
    deeper = HH + " yes\n\nHuman: why\n\nAssistant:"
    path = _rows(
        tmp_path,
        {"chosen": HH + " x", "rejected": HH + " y"},
        {"chosen": deeper + " because", "rejected": deeper + ""},
        {"chosen": deeper + " because", "rejected": HH + " no"},
    )
    assert [example.prompt for example in load_prompts(path)] == [HH, deeper, HH]
    longer = [_user("q"), _assistant("a"), _user("why")]
    path = _rows(
        tmp_path,
        {"chosen": [_user("q"), _assistant("a")], "rejected": [_user("q"), _assistant("b")]},
        {"chosen": [*longer, _assistant("x")], "rejected": [*longer, _assistant("y")]},
    )
    assert [example.prompt for example in load_prompts(path)] == [[_user("q")], longer]
    assert [
        example.prompt
        for example in load_prompts(
            _rows(tmp_path, {"prompt": "p", "chosen": "a", "rejected": "b"})
        )
    ] == ["p"]


def test_rows_stay_in_order_and_duplicates_stay(tmp_path):
    rows = [
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": "c", "rejected": "d"},
    ]
    pairs, dropped = load_pairs(_rows(tmp_path, *rows, *rows))
    assert pairs == [PairExample("p", "a", "b"), PairExample("q", "c", "d")] * 2
    assert dropped == {}


def test_pairs_without_a_preference_are_dropped_and_counted(tmp_path):
    other = "\n\nHuman: hello\n\nAssistant:"
    path = _rows(
        tmp_path,
        {"chosen": HH + " a", "rejected": other + " b"},
        {"chosen": HH + " a", "rejected": HH + " a "},
        {"chosen": HH, "rejected": HH + " b"},
        {"chosen": HH + " a\n\nHuman: go on\n\nAssistant: z", "rejected": HH + " b"},
        {"chosen": HH + " a", "rejected": HH + " b"},
    )
    pairs, dropped = load_pairs(path)
    assert pairs == [PairExample(HH, " a", " b")]
    assert dropped == {
        "the prompts of the two answers differ": 2,
        "the answers are equal": 1,
        "an answer is empty": 1,
    }


def test_an_empty_completion_is_dropped_with_a_warning(tmp_path, caplog):
    path = _rows(tmp_path, {"prompt": "p", "completion": "c"}, {"prompt": "p", "completion": "  "})
    assert load_demonstrations(path) == [Demonstration("p", "c")]
    assert "1 rows dropped: the completion is empty" in caplog.text


def test_encodings_that_are_accepted(tmp_path):
    plain = b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n   \n{"prompt": "\xe2\x82\xac"}'
    for path in (
        _file(tmp_path, plain),
        _file(tmp_path, gzip.compress(plain), "data.jsonl.gz"),
        _file(tmp_path, gzip.compress(plain), "no-suffix"),
    ):
        assert [example.prompt for example in load_prompts(path)] == ["a", "€"]


# ---- bad lines -----------------------------------------------------------------------------------
BAD = {
    b'{"prompt": ': "not JSON",
    b'{"prompt": "a"} x': "not JSON: Extra data at column 17",
    b'["prompt"]': "expected a JSON object, got a list",
    b"3": "expected a JSON object, got a number",
    b"null": "expected a JSON object, got null",
    b'{"promt": "a", "x": 1}': "missing column \"prompt\" of the format prompt; found 'promt', 'x'",
    b"{}": "found none",
    b'{"prompt": 3}': 'expected "prompt" to be a string or a list of messages, got a number',
    b'{"prompt": []}': "empty list of messages",
    b'{"prompt": [{"role": "user"}]}': '"prompt"[0] to be a message',
    b'{"prompt": [{"role": "user", "content": ["x"]}]}': '"prompt"[0] to be a message',
    b'{"prompt": "a\xff"}': "not UTF-8: byte 0xff at column 14",
    b'{"prompt": "a\0"}': "a NUL byte at column 14",
    b'{"prompt": "a", "x": NaN}': "NaN is not a JSON value",
    b'{"prompt": "\\ud800"}': "lone surrogate",
    b'{"prompt": ["a"]}': '"prompt"[0] to be a message',
    b'{"prompt": "a", "prompt": "b"}': "the key 'prompt' occurs twice",
    b"[" * 100_000: "not JSON",
    '{"prompt": "a"}'.encode("utf-16"): "NUL",
}


@pytest.mark.parametrize("raw", BAD, ids=lambda raw: repr(raw[:20]))
def test_a_bad_line_is_named_with_its_reason(tmp_path, raw):
    path = _file(
        tmp_path, b'{"prompt": "fine"}\n' + raw.replace(b"\n", b"") + b'\n{"prompt": "fine"}\n'
    )
    with pytest.raises(DataError) as caught:
        load_prompts(path)
    assert f"{path}:2: " in str(caught.value)
    assert BAD[raw] in str(caught.value)
    assert f"{path}:1" not in str(caught.value)
    assert "1 bad line, 2 good" in str(caught.value)


@pytest.mark.parametrize(
    "raw, reason",
    [
        (b'{"chosen": "a", "rejected": "b"}', "share a prompt"),
        (b'{"chosen": "x"}', 'missing column "rejected"'),
        (b'{"chosen": 1, "rejected": "b"}', 'expected "chosen" to be a string, got a number'),
    ],
)
def test_a_bad_preference_row(tmp_path, raw, reason):
    good = json.dumps({"chosen": HH + " a", "rejected": HH + " b"}).encode()
    with pytest.raises(DataError) as caught:
        load_prompts(_file(tmp_path, good + b"\n" + raw))
    assert f"data.jsonl:2: {reason}" in str(caught.value).replace(
        'expected a "prompt" column, or "chosen" and "rejected" to ', ""
    )


def test_characters_that_are_accepted(tmp_path):
    path = _file(
        tmp_path,
        rb'{"prompt": "\ud83d\ude00 \u0000 \u2028 e\u0301", "x": "\\ud800"}'
        + '\n{"prompt": "😀\u2028\x85"}'.encode(),
    )
    assert [example.prompt for example in load_prompts(path)] == [
        "😀 \0 \u2028 e\u0301",
        "😀\u2028\x85",
    ]  # only \n ends a line


def test_all_bad_lines_are_reported_at_once(tmp_path):
    path = _file(tmp_path, b"x\n" * 3 + b'{"prompt": "a"}\n' + b"y\n" * 30)
    with pytest.raises(DataError) as caught:
        load_prompts(path)
    message = str(caught.value)
    assert message.count("not JSON") == 1
    assert "(as in 32 more: 2, 3, 5, 6, 7, " in message
    assert "33 bad lines, 1 good" in message
    assert f"{path}:1: " in message
    path = _file(tmp_path, b"".join(b'{"prompt": %d}x\n' % 10**n for n in range(30)))
    with pytest.raises(DataError) as caught:
        load_prompts(path)
    message = str(caught.value)
    assert message.count("not JSON") == 20
    assert "... and 10 more" in message
    assert f"{path}:20: " in message
    assert f"{path}:21: " not in message


@pytest.mark.parametrize("cut", [9, 30, 200, -9, -4, -1])
def test_a_truncated_gzip_is_an_error_at_every_cut(tmp_path, cut):
    whole = gzip.compress(b"".join(b'{"prompt": "%d"}\n' % (i * 7919) for i in range(500)))
    path = _file(tmp_path, whole[:cut], "cut.jsonl.gz")
    with pytest.raises(DataError, match=r"cut\.jsonl\.gz:\d+: the gzip stream is cut or damaged"):
        load_prompts(path)


def test_a_damaged_gzip_is_an_error(tmp_path):
    whole = bytearray(gzip.compress(b"".join(b'{"prompt": "%d"}\n' % i for i in range(500))))
    whole[len(whole) // 2] ^= 0xFF
    with pytest.raises(DataError):
        load_prompts(_file(tmp_path, bytes(whole), "bad.jsonl.gz"))


def test_bad_lines_can_be_left_out_into_a_rejects_file(tmp_path, caplog):
    path, rejects = (
        _file(tmp_path, b'x\xff\n{"prompt": "a"}\n{"promt": "b"}\n'),
        tmp_path / "run" / "rejects.jsonl",
    )
    assert [
        example.prompt for example in load_prompts(path, skip_bad_lines=True, rejects=rejects)
    ] == ["a"]
    rows = [json.loads(line) for line in rejects.read_text().splitlines()]
    assert [(row["line"], row["raw"]) for row in rows] == [(1, "x\\xff"), (3, '{"promt": "b"}')]
    assert "not UTF-8" in rows[0]["reason"]
    assert "2 bad lines left out" in caplog.text


@pytest.mark.parametrize("load", [load_prompts, load_pairs, load_demonstrations])
@pytest.mark.parametrize("content", [b"", b"\n\n", b"x\n"])
def test_nothing_usable_is_an_error(tmp_path, load, content):
    with pytest.raises(DataError, match="no usable row"):
        load(_file(tmp_path, content), skip_bad_lines=True)


def test_only_dropped_rows_is_an_error(tmp_path):
    with pytest.raises(DataError, match="2 dropped: the answers are equal"):
        load_pairs(_rows(tmp_path, *[{"prompt": "p", "chosen": "a", "rejected": "a"}] * 2))


def test_what_is_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such data file"):
        load_prompts(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="got a directory"):
        load_prompts(tmp_path)


def test_columns_must_not_collide_with_reward_arguments(tmp_path):
    with pytest.raises(DataError, match="'completions' has the name of an argument"):
        load_prompts(_rows(tmp_path, {"prompt": "a", "completions": []}))


# ---- HH-RLHF's prompts ---------------------------------------------------------------------------
_speech = st.text(st.sampled_from("abA:\n "), max_size=12).filter(
    lambda text: "\n\nAssistant:" not in text and "\n\nHuman:" not in text
)
_turns = st.lists(st.tuples(_speech, _speech), min_size=1, max_size=3)


def _transcript(turns):
    return "".join(f"\n\nHuman: {asked}\n\nAssistant: {answered}" for asked, answered in turns)


@given(_turns, _turns)
def test_the_prompt_of_both_sides_is_what_stands_before_their_last_answers(
    tmp_path_factory, chosen, rejected
):
    path = tmp_path_factory.getbasetemp() / "hypothesis.jsonl"
    path.write_text(
        json.dumps({"chosen": _transcript(chosen), "rejected": _transcript(rejected)}) + "\n"
    )
    prompts = [_transcript(turns)[: -len(turns[-1][1]) - 1] for turns in (chosen, rejected)]
    answers = [f" {turns[-1][1]}" for turns in (chosen, rejected)]
    if prompts[0] != prompts[1]:
        reason = "the prompts of the two answers differ"
    elif not all(answer.strip() for answer in answers):
        reason = "an answer is empty"
    elif answers[0].strip() == answers[1].strip():
        reason = "the answers are equal"
    else:
        assert load_pairs(path) == ([PairExample(prompts[0], *answers)], {})
        return
    with pytest.raises(DataError, match=f"1 dropped: {reason}"):
        load_pairs(path)


# ---- several files -------------------------------------------------------------------------------
def test_what_a_data_option_names(tmp_path):
    odd = _file(tmp_path, b"", "a,b@2:c.jsonl")
    assert parse_data("a.jsonl") == [Source("a.jsonl")]
    assert parse_data(odd) == [Source(str(odd))]  # a file of that name
    other = _file(tmp_path, b"", "c@d.jsonl")
    assert parse_data(f"a@2, shp:b@0.5,gsm8k/chat:{other},{other}@3") == [
        Source("a", weight=2.0),
        Source("b", "shp", weight=0.5),
        Source(str(other), "gsm8k", "chat"),
        Source(str(other), weight=3.0),
    ]
    assert parse_data(["a@1", Source("b")]) == [Source("a", weight=1.0), Source("b")]
    for weight in ("0", "-1", "nan", "inf", "two"):
        with pytest.raises(
            DataError,
            match=f"expected a file and a positive number behind the @ of 'a@{weight}', got "
            f"'{weight}'",
        ):
            parse_data(f"a@{weight}")
    with pytest.raises(DataError, match="expected at least one file"):
        parse_data([])


def test_several_files_are_read_in_order_and_their_faults_reported_together(tmp_path):
    a, b = (
        _file(tmp_path, b'{"prompt": "a"}\nx\n', "a.jsonl"),
        _file(tmp_path, b'y\n{"question": "q", "answer": "#### 1"}\n', "b.jsonl"),
    )
    with pytest.raises(DataError) as caught:
        load_prompts([a, b])
    assert f"{a}:2: not JSON" in str(caught.value)
    assert f"{b}:1: not JSON" in str(caught.value)
    rejects = tmp_path / "rejects.jsonl"
    for _ in range(2):  # reading again, as a resumed run does, changes nothing
        prompts = load_prompts(f"{a},gsm8k/plain:{b}", skip_bad_lines=True, rejects=rejects)
        assert [example.prompt for example in prompts] == ["a", "q"]
        assert [json.loads(line)["file"] for line in rejects.read_text().splitlines()] == [
            str(a),
            str(b),
        ]
    load_prompts(a, skip_bad_lines=True, rejects=rejects)
    assert [json.loads(line)["file"] for line in rejects.read_text().splitlines()] == [
        str(b),
        str(a),
    ]


def test_real_preferences(shared):
    path = shared / "data/hh-rlhf/harmless-base-test.jsonl.gz"
    pairs, dropped = load_pairs(path)
    assert len(pairs) == 2303
    assert dropped == {"an answer is empty": 4, "the prompts of the two answers differ": 5}
    assert all(
        pair.prompt.endswith("\n\nAssistant:") and pair.chosen.startswith(" ") for pair in pairs
    )
    assert len(load_prompts(path)) == 2312
