"""Readers: every form of a row, and every way in which a line can be bad."""
import gzip
import json

import pytest

from fusedrl.engine.data.readers import Demonstration, PairExample, PromptExample, load_demonstrations, load_pairs, load_prompts
from fusedrl.engine.errors import DataError

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


# ---- forms --------------------------------------------------------------------------------------------------------------------
def test_prompts_carry_their_columns(tmp_path):
    path = _rows(tmp_path, {"prompt": "a", "answer": 3}, {"prompt": [_user("b")], "level": "x"}, {"prompt": ""})
    assert load_prompts(path) == [PromptExample("a", {"answer": 3, "level": None}), PromptExample([_user("b")], {"answer": None, "level": "x"}),
                                  PromptExample("", {"answer": None, "level": None})]


def test_prompts_of_preference_rows_are_the_common_prefix(tmp_path):
    deeper = HH + " yes\n\nHuman: why\n\nAssistant:"
    path = _rows(tmp_path, {"chosen": HH + " x", "rejected": HH + " y"}, {"chosen": deeper + " because", "rejected": deeper + ""},
                 {"chosen": deeper + " because", "rejected": HH + " no"}, {"chosen": [_user("q"), _assistant("a")], "rejected": [_user("q"), _assistant("b")]},
                 {"prompt": "p", "chosen": "a", "rejected": "b"})
    assert [example.prompt for example in load_prompts(path)] == [HH, deeper, HH, [_user("q")], "p"]


def test_pairs(tmp_path):
    path = _rows(tmp_path, {"prompt": "p", "chosen": "a", "rejected": "b"}, {"chosen": HH + " yes", "rejected": HH + " no"},
                 {"prompt": [_user("q")], "chosen": [_assistant("a")], "rejected": [_assistant("b")]},
                 {"chosen": [_user("q"), _assistant("a")], "rejected": [_user("q"), _assistant("b")]})
    pairs, dropped = load_pairs(path)
    assert pairs == [PairExample("p", "a", "b"), PairExample(HH, " yes", " no"), PairExample([_user("q")], "a", "b"), PairExample([_user("q")], "a", "b")]
    assert dropped == {}


def test_pairs_without_a_preference_are_dropped_and_counted(tmp_path):
    other = "\n\nHuman: hello\n\nAssistant:"
    path = _rows(tmp_path, {"chosen": HH + " a", "rejected": other + " b"}, {"chosen": HH + " a", "rejected": HH + " a "},
                 {"chosen": HH, "rejected": HH + " b"},
                 {"chosen": HH + " a\n\nHuman: go on\n\nAssistant: z", "rejected": HH + " b"}, {"chosen": HH + " a", "rejected": HH + " b"})
    pairs, dropped = load_pairs(path)
    assert pairs == [PairExample(HH, " a", " b")]
    assert dropped == {"the prompts of the two answers differ": 2, "the answers are equal": 1, "an answer is empty": 1}


def test_demonstrations(tmp_path, caplog):
    path = _rows(tmp_path, {"prompt": "p", "completion": "c"}, {"text": "t"}, {"messages": [_user("q"), _assistant("a")]},
                 {"instruction": "i", "input": "x", "output": "o"},
                 {"instruction": "i", "input": "", "output": "o"},
                 {"chosen": HH + " a", "rejected": HH + " b"},
                 {"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "p", "completion": "  "})
    assert load_demonstrations(path) == [Demonstration("p", "c"), Demonstration("", "t"), Demonstration([_user("q")], "a"), Demonstration("i\n\nx\n\n", "o"),
                                         Demonstration("i\n\n", "o"), Demonstration(HH, " a"), Demonstration("p", "a")]
    assert "1 rows dropped: the completion is empty" in caplog.text


def test_encodings_that_are_accepted(tmp_path):
    plain = b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n   \n{"prompt": "\xe2\x82\xac"}'
    for path in (_file(tmp_path, plain), _file(tmp_path, gzip.compress(plain), "data.jsonl.gz"), _file(tmp_path, gzip.compress(plain), "no-suffix")):
        assert [example.prompt for example in load_prompts(path)] == ["a", "€"]


# ---- bad lines ----------------------------------------------------------------------------------------------------------------
BAD = {
    b'{"prompt": ': "not JSON",
    b'{"prompt": "a"} x': "not JSON: Extra data at column 17",
    b'["prompt"]': "expected a JSON object, got a list",
    b"3": "expected a JSON object, got a number",
    b"null": "expected a JSON object, got null",
    b'{"promt": "a", "x": 1}': "missing column \"prompt\" (or \"chosen\" and \"rejected\"); found 'promt', 'x'",
    b"{}": "found none",
    b'{"prompt": 3}': 'expected "prompt" to be a string or a list of messages, got a number',
    b'{"prompt": []}': "empty list of messages",
    b'{"prompt": [{"role": "user"}]}': '"prompt"[0] to be a message',
    b'{"prompt": [{"role": "user", "content": ["x"]}]}': '"prompt"[0] to be a message',
    b'{"prompt": "a\xff"}': "not UTF-8: byte 0xff at column 14",
    b'{"prompt": "a\0"}': "a NUL byte at column 14",
    b'{"prompt": "a", "x": NaN}': "NaN is not a JSON value",
    b'{"prompt": "\\ud800"}': "lone surrogate",
    b'{"chosen": "a", "rejected": "b"}': "share a prompt",
    b'{"chosen": 1, "rejected": "b"}': 'expected "chosen" to be a string, got a number',
    b"[" * 100_000: "not JSON",
    '{"prompt": "a"}'.encode("utf-16"): "NUL",
}


@pytest.mark.parametrize("raw", BAD, ids=lambda raw: repr(raw[:20]))
def test_a_bad_line_is_named_with_its_reason(tmp_path, raw):
    path = _file(tmp_path, b'{"prompt": "fine"}\n' + raw.replace(b"\n", b"") + b'\n{"prompt": "fine"}\n')
    with pytest.raises(DataError) as caught:
        load_prompts(path)
    assert f"{path}:2: " in str(caught.value)
    assert BAD[raw] in str(caught.value)
    assert f"{path}:1" not in str(caught.value)
    assert "1 bad line, 2 good" in str(caught.value)


def test_all_bad_lines_are_reported_at_once(tmp_path):
    path = _file(tmp_path, b"x\n" * 3 + b'{"prompt": "a"}\n' + b"y\n" * 30)
    with pytest.raises(DataError) as caught:
        load_prompts(path)
    message = str(caught.value)
    assert message.count("not JSON") == 20
    assert "... and 13 more" in message
    assert "33 bad lines, 1 good" in message
    assert f"{path}:21: " in message
    assert f"{path}:4: " not in message


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
    path, rejects = _file(tmp_path, b'x\xff\n{"prompt": "a"}\n{"promt": "b"}\n'), tmp_path / "run" / "rejects.jsonl"
    assert [example.prompt for example in load_prompts(path, skip_bad_lines=True, rejects=rejects)] == ["a"]
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


def test_real_preferences(shared):
    path = shared / "data/hh-rlhf/harmless-base-test.jsonl.gz"
    pairs, dropped = load_pairs(path)
    assert len(pairs) == 2303
    assert dropped == {"an answer is empty": 4, "the prompts of the two answers differ": 5}
    assert all(pair.prompt.endswith("\n\nAssistant:") and pair.chosen.startswith(" ") for pair in pairs)
    assert len(load_prompts(path)) == 2312
