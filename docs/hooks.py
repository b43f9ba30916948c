"""What `make docs` adds to the pages: every program's flags; file names in place of links to files."""

from __future__ import annotations

import re
import subprocess
import sys

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from efficientnet_ns.config.program_table import PROGRAMS

# In the repository these lead to the source, which is not part of the site.
_OUTWARD = re.compile(r"\[([^\]]+)\]\(\.\./[^)]*\)")


def on_page_markdown(markdown: str, **_) -> str:
    """Replaces links that lead out of `docs` by the names they show."""
    return _OUTWARD.sub(lambda match: f"`{match[1].strip('`')}`", markdown)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the page with the flags of every program."""
    text = "\n".join(["# Flags by program", "", *map(_flags_of, PROGRAMS)])
    files.append(File.generated(config, "flags.md", content=text))
    return files


def _flags_of(program: str) -> str:
    # The client needs only the standard library, and has no flags of absl.
    option = "--help" if program == "serving.client" else "--helpfull"
    command = [sys.executable, "-m", f"efficientnet_ns.{program}", option]
    shown = subprocess.run(command, capture_output=True, text=True).stdout
    return f"## {program}\n\n```text\n{shown.strip()}\n```\n"
