"""The HTML page: a single file without scripts or external resources."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from efficientnet_ns.report import tables


class Section(NamedTuple):
    """A part of the page: `title` is plain text, `body` is HTML."""

    title: str
    body: str


_CSS = Path(__file__).with_name("page.css")
# With this policy, the browser blocks all resources outside the file.
_HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
"""


def _contents(sections: Sequence[Section]) -> str:
    entries = "".join(
        f'<li><a href="#section-{number}">{tables.escape(section.title)}</a></li>\n'
        for number, section in enumerate(sections, 1)
    )
    return f'<nav aria-label="Contents"><ol>\n{entries}</ol></nav>\n'


def _page(title: str, intro: str, sections: Sequence[Section]) -> str:
    paragraphs = [text.strip() for text in intro.split("\n\n")]
    parts = [
        _HEAD,
        f"<title>{tables.escape(title)}</title>\n<style>{_CSS.read_text(encoding='utf-8')}</style>\n</head>\n<body>\n",
        f"<h1>{tables.escape(title)}</h1>\n",
        *(f"<p>{tables.escape(text)}</p>\n" for text in paragraphs if text),
    ]
    if len(sections) > 3:
        parts.append(_contents(sections))
    for number, section in enumerate(sections, 1):
        heading = f"<h2>{tables.escape(section.title)}</h2>"
        parts.append(
            f'<section id="section-{number}">\n{heading}\n{section.body or tables.NOTHING}</section>\n'
        )
    if not sections:
        parts.append(tables.NOTHING)
    parts.append("</body>\n</html>\n")
    return "".join(parts)


def write_page(
    path: str | os.PathLike[str], *, title: str, intro: str, sections: Sequence[Section]
) -> None:
    """Writes the page atomically: readers see either the old file or the new one.

    Args:
      path: path of the HTML file in any file system that TensorFlow supports; missing folders are
        created.
      title: plain text.
      intro: plain text; a blank line starts a new paragraph.
      sections: sections in order; a table of contents lists them if there are more than three.
    """
    from efficientnet_ns.files import atomic, object_stores  # Load TensorFlow.

    path = os.fspath(path)
    page = _page(title, intro, sections)
    object_stores.make_folder(os.path.dirname(path))
    atomic.write(path, page, clean=True)
