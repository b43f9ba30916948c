"""Formats tables as text for the terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any


def text_table(
    titles: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    right: Collection[str] = (),
    rule: bool = False,
) -> str:
    """Formats aligned columns, two spaces apart, without trailing spaces.

    Args:
      titles: titles of the columns.
      rows: cells, one per title.
      right: titles of the columns to align to the right; the others align to the left.
      rule: whether a line of dashes follows the titles.
    """
    lines = [titles, *rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    if rule:
        lines.insert(1, ["-" * width for width in widths])
    aligns = [">" if title in right else "<" for title in titles]
    return "\n".join(
        "  ".join(f"{cell:{a}{w}}" for cell, a, w in zip(line, aligns, widths)).rstrip()
        for line in lines
    )


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Formats rows with the same columns as a Markdown table; None becomes a dash."""
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns)]
    lines += [["–" if row[c] is None else str(row[c]) for c in columns] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
