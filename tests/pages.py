"""The pages that users read, and the commands on them: name → text, command → what is shown of its output."""

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
# A block without a language holds commands, one of `text` right after it what they print. In the text, a program with
# flags is a command too.
_BLOCK = re.compile(
    r"^```(?P<language>\w*)\n(?P<body>.*?)^```$|`(?P<inline>(?:python -m (?:efficientnet_ns|pytest)\b|make )[^`]*)`",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    """Commands that stand together, and the lines that the page shows of their output."""

    commands: list[str]
    shown: list[str]


def blocks(text: str) -> list[Block]:
    """The commands of a page, in order; lines that end in a backslash are joined, comments left out."""
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
