"""Extends the pages for `make docs`: lists every program's flags, unlinks source files, keeps flags on one line."""

from __future__ import annotations

import re
import subprocess
import sys

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from efficientnet_ns.config.program_table import PROGRAMS

# In the repository, these lead to the source, which is not part of the site.
_OUTWARD = re.compile(r"\[([^\]]+)\]\(\.\./[^)]*\)")
_INLINE_CODE = re.compile(r"<code>[^<]*</code>")
_FLAG = re.compile(r"(?<![\w-])--\w+")


def on_page_markdown(markdown: str, **_) -> str:
    """Replaces links that lead out of `docs` with their text."""
    return _OUTWARD.sub(lambda match: f"`{match[1].strip('`')}`", markdown)


def on_page_content(html: str, **_) -> str:
    """Marks flags in the text, which browsers would break after their hyphens."""

    def marked(code: re.Match) -> str:
        return _FLAG.sub(r'<span class="flag">\g<0></span>', code[0])

    return _INLINE_CODE.sub(marked, html)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the page with the flags of every program."""
    libraries = "Library flags, which `--helpfull` also lists, are omitted.\n"
    text = "\n".join(["# Flags by program", "", libraries, *map(_flags_of, PROGRAMS)])
    files.append(File.generated(config, "flags.md", content=text))
    return files


def _flags_of(program: str) -> str:
    # The client needs only the standard library, and has no absl flags.
    option = "--help" if program == "serving.client" else "--helpfull"
    command = [sys.executable, "-m", f"efficientnet_ns.{program}", option]
    shown = subprocess.run(command, capture_output=True, text=True).stdout
    own = shown.split("\nOf the library ")[0]
    return f"## {program}\n\n```text\n{own.strip()}\n```\n"
