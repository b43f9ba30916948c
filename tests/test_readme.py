"""What the README says about the code is so."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^python -m efficientnet_ns\.(\w+)((?:.*\\\n)*.*)$", README, re.MULTILINE)


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([\w./]+)(?:#\w+)?\)", README):
        assert (ROOT / target).exists(), target


def test_differences_link_to_their_modules():
    """Each is marked in the module by a comment `Differs (<number>)`."""
    section = README.split("## How it differs")[1].split("## ")[0]
    links = re.findall(r"^(\d+)\. .*?\((efficientnet_ns/[^)#]+)\)", section, re.M | re.S)
    marks = [
        (number, str(path.relative_to(ROOT)))
        for path in (ROOT / "efficientnet_ns").rglob("*.py")
        for number in re.findall(r"Differs \((\d+)\)", path.read_text())
    ]
    assert len(links) > 5
    assert links == sorted(marks, key=lambda mark: int(mark[0]))


@pytest.mark.parametrize(
    "module, arguments", COMMANDS, ids=[f"{i}-{name}" for i, (name, _) in enumerate(COMMANDS)]
)
def test_commands_have_flags_that_exist(module, arguments, entry_flags):
    entry_flags(module, shlex.split(arguments.replace("\\\n", " ")))


def test_commands_were_found():
    assert {"main", "filter_unlabel", "noisy_student", "export_model"} <= {c[0] for c in COMMANDS}
