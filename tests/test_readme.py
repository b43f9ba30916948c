"""What the README says about the code is so."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest
from absl import flags

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^python -m efficientnet_ns\.(\w+)((?:.*\\\n)*.*)$", README, re.MULTILINE)


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([\w./]+)(?:#\w+)?\)", README):
        assert (ROOT / target).exists(), target


def test_differences_link_to_their_lines():
    section = README.split("## How it differs")[1].split("## ")[0]
    links = re.findall(r"^(\d+)\. .*?\((efficientnet_ns/[^)#]+)#L(\d+)\)", section, re.M | re.S)
    marks = [
        (number, str(path.relative_to(ROOT)), str(line))
        for path in (ROOT / "efficientnet_ns").rglob("*.py")
        for line, text in enumerate(path.read_text().splitlines(), start=1)
        for number in re.findall(r"Differs \((\d+)\)", text)
    ]
    assert links == sorted(marks, key=lambda mark: int(mark[0]))


@pytest.mark.parametrize(
    "module, arguments", COMMANDS, ids=[f"{i}-{name}" for i, (name, _) in enumerate(COMMANDS)]
)
def test_commands_have_flags_that_exist(module, arguments, monkeypatch):
    monkeypatch.chdir(ROOT)
    entry = importlib.import_module(f"efficientnet_ns.{module}")
    values = flags.FlagValues()
    for name, define in vars(flags).items():
        if name.startswith("DEFINE_"):
            monkeypatch.setattr(flags, name, with_values(define, values))
    monkeypatch.setattr("efficientnet_ns.config._DEFINE", redirected(values))
    monkeypatch.setattr("efficientnet_ns.config.run", lambda main: None)
    monkeypatch.setattr(flags, "FLAGS", values)
    entry.run()
    values(["program", *shlex.split(arguments.replace("\\\n", " "))])


def with_values(define, values: flags.FlagValues):
    def defined(*args, **kwargs):
        return define(*args, **{**kwargs, "flag_values": values})

    return defined


def redirected(values: flags.FlagValues) -> dict:
    return {
        str: with_values(flags.DEFINE_string, values),
        int: with_values(flags.DEFINE_integer, values),
        float: with_values(flags.DEFINE_float, values),
        bool: with_values(flags.DEFINE_bool, values),
    }


def test_commands_were_found():
    assert {"main", "filter_unlabel", "noisy_student", "export_model"} <= {c[0] for c in COMMANDS}
