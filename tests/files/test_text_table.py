"""Tables for the terminal."""

from __future__ import annotations

from efficientnet_ns.files.text_table import text_table


def test_columns_are_aligned_and_end_without_spaces():
    text = text_table(
        ["name", "rate", ""], [["a", "1.5", "x"], ["longer", "10", ""]], right=["rate"]
    )
    assert text.splitlines() == ["name    rate", "a        1.5  x", "longer    10"]


def test_a_rule_is_as_wide_as_the_columns():
    text = text_table(["a", "b"], [["1", "222"]], rule=True)
    assert text.splitlines() == ["a  b", "-  ---", "1  222"]


def test_titles_stand_alone_without_rows():
    assert text_table(["a", "b"], []) == "a  b"
