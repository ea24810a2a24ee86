"""Chat templates that loop for ever, take all memory or make endless texts: an error that names the
file, in bounded time and memory, after which others are rendered as ever."""

import resource
import signal
import threading
import time
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from fusedrl.engine.base.errors import DataError
from fusedrl.engine.data import rendering
from fusedrl.engine.data.records import Dialogue
from fusedrl.engine.data.tokenize import encode_dialogue, encode_prompt

pytestmark = pytest.mark.cpu_only("texts")

MESSAGES = [{"role": "user", "content": "a"}]
TURNS = [*MESSAGES, {"role": "assistant", "content": "b"}]
HONEST = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
LATE = {
    "ranges within ranges": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}"
    "{% endfor %}",
    "a macro that calls itself twice": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}"
    "{% endif %}{% endmacro %}{{ f(60) }}",
    "a power": "{{ (messages|length + 9) ** (10 ** 8) % 7 }}",
    "a power of constants": "{{ 9 ** (10 ** 8) % 7 }}",
    "with several messages alone": HONEST + "{% if messages|length > 1 %}"
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{% endif %}",
}
GREEDY = {
    "a text of constants": "{{ 'a' * 10 ** 10 }}",
    "a text": "{{ messages[0].content * 10 ** 10 }}",
    "a text in the middle": "{{ 'a'.center(10 ** 10) }}",
    "a filter's width": "{{ 'a'|center(10 ** 10) }}",
    "a format's width": "{{ '%*d' % (2147483647, 1) }}",
    "doubling": "{% set ns = namespace(x='ab') %}{% for i in range(99) %}"
    "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "lists that double": "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}"
    "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "a list of many": "{% set x = range(99999)|list * 99999 %}",
    "many lists": "{% set ns = namespace(x=[]) %}{% for i in range(99999) %}"
    "{% set ns.x = [ns.x, range(99999)|list] %}{% endfor %}",
    "text by text": "{% for i in range(99999) %}{{ 'a' * 10 ** 6 }}{% endfor %}",
    "replacing": "{{ ('a' * 10 ** 6).replace('a', 'b' * 10 ** 6) }}",
}


@pytest.fixture
def tokenizer(tmp_path):
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>")),
        unk_token="<unk>",
        eos_token="<unk>",
    )
    made.name_or_path = str(tmp_path)
    return made


def give(tokenizer, text):
    tokenizer.chat_template = text
    Path(tokenizer.name_or_path, "chat_template.jinja").write_text(text)


def sound(tokenizer):
    """Say whether an honest template is rendered, and the process is as it was."""
    give(tokenizer, HONEST)
    assert rendering.render(tokenizer, TURNS, None) == "user: a\nassistant: b\n"
    assert resource.getrlimit(resource.RLIMIT_DATA)[0] == resource.RLIM_INFINITY
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)
    assert rendering._began is None


@pytest.mark.parametrize("what", LATE)
def test_a_template_that_loops_is_ended_and_named(tokenizer, monkeypatch, what):
    monkeypatch.setattr(rendering, "SECONDS", 0.2)
    monkeypatch.setattr(rendering, "_TICK", 0.05)
    give(tokenizer, LATE[what])
    began = time.thread_time()
    with pytest.raises(DataError, match=r"after 0\.2 seconds of processor time") as told:
        encode_dialogue(tokenizer, Dialogue(TURNS), 0)
    assert time.thread_time() - began < 5
    assert f"Mend {tokenizer.name_or_path}/chat_template.jinja" in str(told.value)
    assert "'content': 'a'" in str(told.value)
    if "messages alone" in what:
        assert rendering.render(tokenizer, MESSAGES, None) == "user: a\n"
    sound(tokenizer)


@pytest.mark.parametrize("what", GREEDY)
def test_a_template_that_takes_memory_is_ended_and_named(tokenizer, monkeypatch, what):
    monkeypatch.setattr(rendering, "MEMORY", 200 << 20)
    give(tokenizer, GREEDY[what])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match="wants more than 200 MiB of memory") as told:
        encode_prompt(tokenizer, MESSAGES)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB
    assert grown < 450 << 10  # twice the limit, since it is tried again, and a little
    assert "chat_template.jinja" in str(told.value)
    assert told.value.__cause__ is None  # else its frames would hold what was made
    sound(tokenizer)


def test_a_text_far_longer_than_what_was_given_is_refused(tokenizer):
    give(tokenizer, "{{ 'x' * 4000000 }}")
    with pytest.raises(DataError, match=r"makes 4,000,000 characters of them, where at most 1,048"):
        encode_prompt(tokenizer, MESSAGES)
    sound(tokenizer)
    long = [{"role": "user", "content": "a" * 4_000_000}]
    give(tokenizer, HONEST)
    assert len(rendering.render(tokenizer, long, None)) == 4_000_007


def test_a_template_that_calls_itself_for_ever_is_refused(tokenizer):
    give(tokenizer, "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}")
    with pytest.raises(DataError, match=r"RecursionError.*chat_template\.jinja"):
        encode_prompt(tokenizer, MESSAGES)
    sound(tokenizer)


def test_a_process_that_has_grown_since_has_its_memory(tokenizer, monkeypatch):
    monkeypatch.setattr(rendering, "MEMORY", 50 << 20)
    monkeypatch.setattr(rendering, "_RECENT", 1e9)
    sound(tokenizer)
    kept = bytearray(300 << 20)
    give(tokenizer, "{{ ('x' * 20000000)|length }}")
    assert rendering.render(tokenizer, MESSAGES, None) == "20000000"
    assert len(kept) == 300 << 20
    sound(tokenizer)


def test_a_limit_that_was_there_stays(tokenizer):
    give(tokenizer, HONEST)
    pages = int(Path("/proc/self/statm").read_text().split()[5])
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    mine = (pages * resource.getpagesize() + (2 << 30), limits[1])
    resource.setrlimit(resource.RLIMIT_DATA, mine)
    try:
        rendering.render(tokenizer, MESSAGES, None)
        assert resource.getrlimit(resource.RLIMIT_DATA) == mine
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)


def test_threads_render_as_well(tokenizer):
    give(tokenizer, HONEST)
    made = []
    threads = [
        threading.Thread(target=lambda: made.append(rendering.render(tokenizer, MESSAGES, None)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for _ in range(100):
        rendering.render(tokenizer, MESSAGES, None)
    for thread in threads:
        thread.join()
    assert made == ["user: a\n"] * 8
    sound(tokenizer)
