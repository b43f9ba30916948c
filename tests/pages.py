"""The pages for users by name, and the commands on them with the output that the pages show."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").glob("*.md")),
    ]
}
# A block without a language holds commands; a `text` block right after it holds their output.
# Inline code with a program and its flags is also a command.
_BLOCK = re.compile(
    r"^```(?P<language>\w*)\n(?P<body>.*?)^```$|`(?P<inline>(?:python -m (?:efficientnet_ns|pytest)\b|make )[^`]*)`",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    """A block of commands, and the lines of their output that the page shows."""

    commands: list[str]
    shown: list[str]


def blocks(text: str) -> list[Block]:
    """Returns the commands of a page in order, with continued lines joined and comments removed."""
    found: list[Block] = []
    for match in _BLOCK.finditer(text):
        if match["inline"]:
            found.append(Block([" ".join(match["inline"].split())], []))
        elif not match["language"]:
            joined = match["body"].replace("\\\n", " ")
            lines = [re.sub(r"\s#\s.*", "", line) for line in joined.splitlines()]
            found.append(Block([" ".join(line.split()) for line in lines if line.strip()], []))
        elif match["language"] == "text" and found:
            found[-1].shown.extend(line for line in match["body"].splitlines() if line.strip())
    return found
