"""Texts of others on a terminal."""

import pytest

from fusedrl.engine.base.printable import printable, shortened

pytestmark = pytest.mark.cpu_only("texts alone")


def test_nothing_steers_the_terminal():
    text = "".join(map(chr, range(0x2100)))
    shown = printable(text)
    assert set(shown) & set(map(chr, range(32))) == {"\n", "\t"}
    steering = [*range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
    assert not set(shown) & set(map(chr, steering))
    assert "<U+009B>" in shown
    kept = "Text, \u0627\u0644\u0633\u0644\u0627\u0645 \u4f60\u597d \U0001f642\n\tend"
    assert printable(kept) == kept


def test_long_texts_keep_their_ends():
    assert shortened("abcdef", 6) == "abcdef"
    assert (
        shortened("a" * 1500 + "b" * 1500, 2000)
        == f"{'a' * 1000} [... 1,000 characters ...] {'b' * 1000}"
    )
