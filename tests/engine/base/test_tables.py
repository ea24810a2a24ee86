"""Tables at any width: no word is cut, and what is no terminal gets whole lines."""

import io
import re
import sys

import pytest
from rich.console import Console
from rich.table import Table
from tests.support.screen import Terminal

from fusedrl.engine.base.tables import ANY, READABLE, console, fits, show

pytestmark = pytest.mark.cpu_only("text")
NAMES = ("sampling/sampling_logp_difference/max", "kl", "a name of several words", "中文/指标")
WIDTHS = (40, 48, 60, 72, 80, 100, 200)


def table(values: int = 3, *, header: bool = True, ratio: bool = False) -> Table:
    made = Table(title="runs/with-a-long-name: 6 steps", show_header=header)
    made.add_column("metric", ratio=1 if ratio else None)
    for number in range(values):
        made.add_column(f"value{number}", justify="right", ratio=1 if ratio else None)
    for name in NAMES:
        made.add_row(name, *(f"-9.54{number}e-05 [of] 12" for number in range(values)))
    return made


def printed(made: Table, width: int) -> list[str]:
    out = io.StringIO()
    show(made, Console(file=out, width=width, markup=False))
    return out.getvalue().splitlines()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("values", [1, 3, 9])
@pytest.mark.parametrize("header", [True, False])
@pytest.mark.parametrize("ratio", [True, False])
def test_no_word_is_cut_and_no_line_is_too_long(width, values, header, ratio):
    lines = printed(table(values, header=header, ratio=ratio), width)
    text = "\n".join(lines)
    assert max(map(len, lines)) <= width
    for word in " ".join(NAMES).split():
        assert word in text
    for number in range(values):
        assert text.count(f"-9.54{number}e-05") == len(NAMES)
        assert f"value{number}" in text or not header
    assert "runs/with-a-long-name:" in text


def test_what_fits_is_a_table_and_the_widest_columns_give_first():
    assert fits(table(3), Console(width=200))
    assert "│" in "\n".join(printed(table(3), 100))
    assert not fits(table(9), Console(width=60))
    stacked = printed(table(9), 60)
    assert NAMES[0] in stacked
    assert "│" not in "\n".join(stacked)


def test_one_word_that_is_wider_than_the_terminal_is_not_lost():
    made = Table()
    made.add_column("path")
    made.add_column("b")
    made.add_row("/very/long" * 9, "1")
    assert "/very/long" * 9 in "".join(line.strip() for line in printed(made, 30))
    empty = Table("a", "b")
    assert printed(empty, 30)


def test_without_a_terminal_it_is_as_wide_as_it_needs_to_be(monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(sys, "__stdout__", io.StringIO())
    assert console().width == ANY
    assert console(texts=True).width == READABLE
    show(table(9))
    lines = capsys.readouterr().out.splitlines()
    assert sum(NAMES[0] in line and line.count("e-05") == 9 for line in lines) == 1
    monkeypatch.setenv("COLUMNS", "60")
    assert console().width == 60


def test_a_reader_that_has_gone_is_an_error_of_the_pipe():
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        console(Gone()).print("x")


@pytest.mark.parametrize("width", [60, 80])
def test_on_a_terminal(width):
    program = (
        "from tests.engine.base.test_tables import show, table; show(table(2)); show(table(9))"
    )
    shown = Terminal([sys.executable, "-c", program], width, cwd=".")
    text = shown.read()
    assert shown.wait() == 0
    assert text.count(NAMES[0]) == 2
    plain = re.sub(r"\x1b\[[0-9;]*m|\r", "", text)  # without colours
    assert max(map(len, plain.split("\n"))) <= width
