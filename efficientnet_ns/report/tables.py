"""Text and tables of a report as HTML; all text is escaped."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

import numpy as np

NOTHING = '<p class="nothing">Nothing to show.</p>'


def escape(value: object) -> str:
    """Escapes plain text for HTML."""
    return html.escape(str(value), quote=True)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)


def format_value(value: object) -> str:
    """Formats a cell as plain text: floats with four significant digits, None as a dash."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, float):
        return str(value)
    # With four significant digits, 10,000 and above would require an exponent.
    if 1e3 <= abs(value) < 1e7:
        return f"{value:.1f}"
    # "#" keeps trailing zeros, but also the decimal point in "1000.".
    return f"{value:#.4g}".rstrip(".")


def _cell(value: object, *, numeric: bool) -> str:
    """Formats a cell; numbers and missing values of numeric columns are right-aligned."""
    right = _is_number(value) or (numeric and value is None)
    kind = ' class="number"' if right else ""
    return f"<td{kind}>{escape(format_value(value))}</td>"


def table(rows: Sequence[Mapping[str, object]], *, highlight_last: bool = False) -> str:
    """Returns a table with one row per mapping.

    Args:
      rows: column name → value. Columns are in the order of the first row, followed by columns that
        only later rows have. Missing values and None are shown as a dash.
      highlight_last: whether to highlight the last row.
    """
    columns = list(dict.fromkeys(column for row in rows for column in row))
    if not columns:
        return NOTHING
    numeric = {column: any(_is_number(row.get(column)) for row in rows) for column in columns}
    head = []
    for column in columns:
        kind = ' class="number"' if numeric[column] else ""
        head.append(f'<th scope="col"{kind}>{escape(column)}</th>')
    body = []
    for index, row in enumerate(rows):
        highlight = highlight_last and index == len(rows) - 1
        cells = "".join(_cell(row.get(column), numeric=numeric[column]) for column in columns)
        body.append(f'<tr class="highlight">{cells}</tr>' if highlight else f"<tr>{cells}</tr>")
    return (
        f'<div class="scroll"><table>\n<thead><tr>{"".join(head)}</tr></thead>\n<tbody>\n'
        + "\n".join(body)
        + "\n</tbody>\n</table></div>\n"
    )


def paragraph(text: str) -> str:
    """Returns plain text as a paragraph."""
    return f"<p>{escape(text)}</p>\n"


def details(summary: str, body: str) -> str:
    """Returns collapsed HTML that opens on a click.

    Args:
      summary: plain text that is always visible.
      body: HTML.
    """
    return f"<details><summary>{escape(summary)}</summary>\n{body}</details>\n"
