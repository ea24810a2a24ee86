"""Conversations: with a chat template and without, where the context is full, side by side, piped
and on a terminal."""

import io
import os
import pty
import select
import subprocess
import sys
import time

import pytest
from rich.console import Console
from tests.support.ranks import ROOT
from tests.support.talkers import write_talker

from fusedrl.engine.actor import HybridActor
from fusedrl.engine.base.errors import DataError
from fusedrl.engine.cli.main import main
from fusedrl.engine.generation.sampler import SamplingParams
from fusedrl.engine.tools.chat import Chat, Speaker

pytestmark = pytest.mark.cpu_only("the engine's own tests are of devices")

PATH = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
SHORT = SamplingParams(max_new_tokens=12, seed=1)


@pytest.fixture(scope="module")
def talkers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("talkers")
    return {
        "a": write_talker(folder / "a"),
        "b": write_talker(folder / "b", seed=1),
        "plain": write_talker(folder / "plain", template=None),
        "picky": write_talker(
            folder / "picky",
            template="{{ raise_exception('no sunshine') if 'sun' in messages[-1]['content'] }}x",
        ),
        "long": write_talker(folder / "long", positions=16384),
        "small": write_talker(folder / "small", positions=64),
    }


def speaker(path, system=""):
    return Speaker(HybridActor.from_pretrained(path, device="cpu"), "it", system)


def talk(capsys, monkeypatch, said, *argv):
    monkeypatch.setattr("sys.stdin", io.StringIO(said))
    code = main(["chat", *map(str, argv)])
    found = capsys.readouterr()
    return code, found.out, found.err


def test_an_answer_is_what_the_rendered_conversation_generates(talkers):
    one = speaker(talkers["a"], "be kind")
    first = "".join(one.answer("hi \U0001f600", SHORT, 1))
    prompt = "<system>be kind<|end|><user>hi \U0001f600<|end|><assistant>"
    ((whole,),) = one.actor.generate([prompt], SHORT, [1])
    assert first == whole.text
    second = "".join(one.answer("and?", SHORT, 2))
    prompt += f"{first}<|end|><user>and?<|end|><assistant>"
    ((whole,),) = one.actor.generate([prompt], SHORT, [2])
    assert second == whole.text


def test_what_was_read_before_is_not_computed_again(talkers, monkeypatch):
    one = speaker(talkers["a"])
    list(one.answer("x" * 100, SHORT, 1))
    scheduler = one.actor._generator.scheduler
    computed, schedule = [], scheduler.schedule

    def counted(*arguments):
        plan = schedule(*arguments)
        computed.extend(chunk.stop - chunk.start for chunk in plan.chunks)
        return plan

    monkeypatch.setattr(scheduler, "schedule", counted)
    list(one.answer("next", SHORT, 2))
    assert 0 < sum(computed) < 80  # of more than 150


def test_where_the_context_is_full_the_oldest_turns_go_and_the_system_message_stays(talkers):
    one = speaker(talkers["small"], "s")
    for turn, text in enumerate(["first", "next", "more"], 1):
        list(one.answer(text, SHORT, turn))
        if one.notices and "full" in one.notices[0]:
            break
    assert "the context of 64 tokens is full: the 2 oldest messages are left out" in one.notices[0]
    assert [m["role"] for m in one._messages][:2] == ["system", "user"]
    assert all(m["content"] != "first" for m in one._messages)
    with pytest.raises(DataError, match=r"the message has .* tokens .* holds 64"):
        list(one.answer("x" * 100, SHORT, 5))
    assert all(m["content"] != "x" * 100 for m in one._messages)
    assert "".join(one.answer("ok", SHORT, 6)) is not None


def test_a_text_that_is_continued_loses_its_beginning(talkers):
    one = Speaker(HybridActor.from_pretrained(talkers["plain"], device="cpu"), "it")
    one.positions = 64
    first = "".join(one.answer("once", SHORT, 1))
    kept = list(one._ids)
    ((whole,),) = one.actor.generate(["once"], SHORT, [1])
    assert first == whole.text
    assert kept == [*whole.prompt_ids, *whole.token_ids]
    list(one.answer("y" * 40, SHORT, 2))
    assert one.notices[0].startswith("the context of 64 tokens is full: the first ")
    assert len(one._ids) <= 64
    with pytest.raises(DataError, match="no system message"):
        one.reset("be kind")


def test_closing_an_answer_keeps_what_was_said(talkers):
    one = speaker(talkers["long"])
    stream = one.answer("hi", SamplingParams(max_new_tokens=5000), 1)
    said = next(stream) + next(stream)
    stream.close()
    assert one._messages[-1] == {"role": "assistant", "content": said}
    assert not one.actor._generator.scheduler.busy


# ---- the command, piped --------------------------------------------------------------------------
def test_piped_messages_and_commands(talkers, capsys, monkeypatch):
    options = (talkers["a"], "--max_new_tokens", 6)
    code, alone, err = talk(capsys, monkeypatch, "hi\n", *options)
    assert (code, err) == (0, "" if "cut off" not in err else "(cut off at 6 tokens)\n")
    assert alone.endswith("\n")
    code, out, err = talk(capsys, monkeypatch, "\nhi\n/reset\nhi\n/quit\nnever\n", *options)
    assert code == 0
    assert out.startswith(alone)
    assert "begun again" in err
    code, out, err = talk(capsys, monkeypatch, '"""\nhi\nthere\n"""\n//etc\n/help\n', *options)
    assert (code, "/temperature X" in err) == (0, True)
    code, out, err = talk(capsys, monkeypatch, "hi", *options, "--temperature", "0.5")
    assert (code, len(out) > 0) == (0, True)
    code, again, err = talk(capsys, monkeypatch, "/temperature 0.5\nhi\n", *options)
    assert again == out
    code, out, err = talk(capsys, monkeypatch, "", *options)
    assert (code, out, err) == (0, "", "")


def test_control_characters_do_not_reach_the_terminal(talkers, capsys, monkeypatch):
    _, out, _ = talk(capsys, monkeypatch, "hi\n" * 8, talkers["a"], "--max_new_tokens", 40)
    assert not any(letter < " " and letter not in "\n\t" for letter in out)


def test_a_model_without_a_template_says_so(talkers, capsys, monkeypatch):
    code, _, err = talk(capsys, monkeypatch, "once\n", talkers["plain"], "--max_new_tokens", 4)
    assert code == 0
    assert "has no chat template: it continues your text" in err


@pytest.mark.parametrize(
    "said, options, message",
    [
        ("the sun\n", ["picky"], "chat template refuses these messages: no sunshine"),
        ("/temperature hot\n", ["a"], "expected a number for temperature; got 'hot'"),
        ("/temperature -1\n", ["a"], "expected a number for temperature; SamplingParams"),
        ("/tokens 1.5\n", ["a"], "expected a whole number for max_new_tokens"),
        ("/rest\n", ["a"], "there is no /rest; /help"),
        ("x" * 600 + "\n", ["a"], "the message has"),
        ("hi\n", ["plain", "--system", "s"], "no system message"),
        ("hi\n", [], "expected MODEL, or --a DIR and --b DIR"),
        ("hi\n", ["a", "--a", "b"], "expected MODEL, or --a DIR"),
        ("hi\n", ["--a", "b"], "expected MODEL, or --a DIR"),
        ("hi\n", ["a", "--temperature", "-1"], "temperature"),
    ],
)
def test_mistakes(talkers, capsys, monkeypatch, said, options, message):
    argv = [talkers.get(word, word) for word in options]
    code, _, err = talk(capsys, monkeypatch, said, *argv)
    assert code == 2
    assert message in err
    assert "Traceback" not in err


def test_two_models_one_after_the_other(talkers, capsys, monkeypatch):
    alone = {}
    for name in ("a", "b"):
        alone[name] = talk(capsys, monkeypatch, "hi\n", talkers[name], "--max_new_tokens", 8)[1]
    code, out, _ = talk(
        capsys, monkeypatch, "hi\n", "--a", talkers["a"], "--b", talkers["b"], "--max_new_tokens", 8
    )
    assert code == 0
    assert out == f"[{talkers['a']}]\n{alone['a']}[{talkers['b']}]\n{alone['b']}"


def test_two_models_in_columns(talkers, capsys, monkeypatch):
    pair = [speaker(talkers["a"]), speaker(talkers["b"])]
    pair[0].name, pair[1].name = "ours[1]", "theirs"
    chat = Chat(pair, SHORT)
    said = io.StringIO()
    chat._out = Console(file=said, force_terminal=True, width=100, height=10, markup=False)
    chat._answers("hi")
    shown = said.getvalue()
    assert "ours[1]" in shown
    assert "theirs" in shown
    chat._out = Console(file=io.StringIO(), force_terminal=True, width=60, markup=False)
    chat._answers("hi")  # narrow: one after the other
    assert "[theirs]" in capsys.readouterr().out


@pytest.mark.real
def test_a_real_model_is_given_the_whole_conversation(smollm2):
    """Its answers are those to the messages, rendered and computed anew."""
    one, greedy = speaker(smollm2), SamplingParams(max_new_tokens=40, temperature=0.0)
    fresh = HybridActor.from_pretrained(smollm2, device="cpu")
    messages = []
    for turn, text in enumerate(["What is the capital of France?", "And of Italy? \U0001f642"]):
        said = "".join(one.answer(text, greedy, turn))
        messages.append({"role": "user", "content": text})
        ((whole,),) = fresh.generate([messages], greedy)
        assert said == whole.text
        messages.append({"role": "assistant", "content": said})
    assert "Paris" in messages[1]["content"]


# ---- the command, on a terminal ------------------------------------------------------------------
class Terminal:
    """`fusedrl chat` on a terminal of its own."""

    def __init__(self, *argv):
        self._ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fusedrl.engine.cli", "chat", *map(str, argv)],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=os.environ | {"PYTHONPATH": PATH, "TERM": "xterm"},
            start_new_session=True,
            preexec_fn=_own_terminal,
        )
        os.close(theirs)
        self.said = ""

    def wait_for(self, text, seconds=60):
        self.wait_until(lambda said: text in said, seconds)
        assert text in self.said, self.said[-2000:]
        self.said = self.said.partition(text)[2]

    def wait_until(self, true, seconds=60):
        last = time.monotonic() + seconds
        while not true(self.said):
            assert time.monotonic() < last, self.said[-2000:]
            if select.select([self._ours], [], [], 0.1)[0]:
                try:
                    self.said += os.read(self._ours, 65536).decode("utf-8", "replace")
                except OSError:  # the other end is closed
                    break

    def type(self, text):
        os.write(self._ours, text.encode())

    def interrupt_until(self, text, tries=30):
        """Press Ctrl-C until `text` is shown, as a person would: Python does not notice one that
        comes between the prompt and its wait for a line before the next key."""
        for _ in range(tries):
            self.type("\x03")
            last = time.monotonic() + 2
            self.wait_until(lambda said, last=last: text in said or time.monotonic() > last)
            if text in self.said:
                break
        self.wait_for(text)


def _own_terminal():
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_ctrl_c_stops_the_answer_and_not_the_program(talkers):
    terminal = Terminal(talkers["long"], "--max_new_tokens", 16000, "--temperature", 0)
    try:
        terminal.wait_for("> ")
        terminal.interrupt_until("/quit or Ctrl-D ends")  # at the prompt: it says how to end
        terminal.wait_for("> ")
        terminal.type("hi\n")
        terminal.wait_for("hi")
        terminal.wait_for("\n")
        terminal.wait_until(lambda said: len(said) > 20)  # the answer has begun
        terminal.type("\x03")
        terminal.wait_for("(stopped)")
        terminal.wait_for("> ")
        terminal.type("/nonsense\n")  # a person is told, and goes on
        terminal.wait_for("there is no /nonsense")
        terminal.type("/tokens 3\nok\n")
        terminal.wait_for("cut off at 3 tokens")
        terminal.wait_for("> ")
        terminal.type("\x04")
        assert terminal.process.wait(30) == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()
