"""The page: one file without scripts, that loads nothing from elsewhere."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

from efficientnet_ns.report import tables


class Section(NamedTuple):
    """A part of the page: `title` is plain text, `body` is HTML."""

    title: str
    body: str


_CSS = """
:root { --text: #1d242b; --soft: #626b75; --page: #ffffff; --line: #dde2e7; --mark: #eaf3fb; }
@media (prefers-color-scheme: dark) {
  :root { --text: #dfe4e9; --soft: #98a2ad; --page: #15181c; --line: #30363d; --mark: #1b2c3d; }
}
* { box-sizing: border-box; }
body {
  max-width: 1100px; margin: 0 auto; padding: 32px 30px 64px;
  background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 12px; }
h2 {
  font-size: 19px; margin: 44px 0 14px; padding-top: 14px; border-top: 1px solid var(--line);
}
h3 { font-size: 15px; margin: 20px 0 8px; }
a { color: inherit; }
nav ol { margin: 16px 0; padding-left: 22px; color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: 8px 0 16px; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 14px 4px 0; text-align: left; vertical-align: top; }
th { color: var(--soft); font-weight: 600; font-size: 13px; vertical-align: bottom; }
td { border-top: 1px solid var(--line); }
th.number, td.number { text-align: right; padding-left: 14px; white-space: nowrap; }
tr.highlight td { background: var(--mark); font-weight: 600; }
figure { margin: 0 0 12px; }
figcaption, .nothing, .legend, summary { color: var(--soft); font-size: 13px; }
summary { cursor: pointer; }
.plot { display: block; max-width: 100%; height: auto; }
.row { display: flex; flex-wrap: wrap; gap: 12px; }
.row figure { display: flex; flex-direction: column-reverse; }
.row figcaption { font-weight: 600; overflow-wrap: anywhere; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 18px; margin: 8px 0; }
.legend i { display: inline-block; width: 22px; margin-right: 7px; vertical-align: middle; }
.grid { display: grid; gap: 10px 6px; margin: 8px 0 16px; }
.grid figure { margin: 0; min-width: 0; }
.grid img { display: block; object-fit: contain; object-position: left top; }
.grid figcaption { font-size: 11px; line-height: 1.3; margin-top: 3px; overflow-wrap: anywhere; }
.pixelated { image-rendering: pixelated; }
.placeholder {
  width: var(--size); height: var(--size); display: grid; place-content: center;
  border: 1px dashed var(--line); color: var(--soft);
}
"""

# The policy makes the browser itself see to it that the page loads nothing from elsewhere.
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
        f"<title>{tables.escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n",
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
    """Writes the page in one step: readers see the old file or the whole new one.

    Args:
      path: of the HTML file, in any file system TensorFlow knows; its folder is made if needed.
      title: plain text.
      intro: plain text; a blank line starts a new paragraph.
      sections: in order; more than three get a table of contents.
    """
    import tensorflow as tf

    from efficientnet_ns.files import atomic

    path = os.fspath(path)
    page = _page(title, intro, sections)
    tf.io.gfile.makedirs(os.path.dirname(path) or ".")
    atomic.remove_abandoned([path])
    with atomic.atomic_path(path) as temporary, tf.io.gfile.GFile(temporary, "w") as file:
        file.write(page)
