"""The list of programs, and the flags that `--help` shows first."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from efficientnet_ns.config import program_table

ROOT = Path(__file__).parents[2] / "efficientnet_ns"
OTHERS = {"__init__", "__main__"}


def test_every_program_is_listed_with_what_it_does(capsys, monkeypatch):
    programs = {path.stem for path in ROOT.glob("*.py")} - OTHERS
    assert set(program_table.PROGRAMS) == programs | {"serving.client"}
    monkeypatch.setattr(sys, "argv", ["efficientnet_ns"])
    runpy.run_module("efficientnet_ns", run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    for program in program_table.PROGRAMS:
        (line,) = [line for line in lines if line.split()[:1] == [program]]
        assert len(line.split()) > 2 and "python -m" not in line
    assert max(map(len, lines)) <= 120


def test_a_program_as_a_word_is_not_ignored(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["efficientnet_ns", "predict_image", "photo.jpg"])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_module("efficientnet_ns", run_name="__main__")
    assert exit_.value.code == 2
    assert "python -m efficientnet_ns.predict_image photo.jpg" in capsys.readouterr().err


@pytest.mark.parametrize("program", [p for p, names in program_table.PROGRAMS.items() if names])
def test_main_flags_are_flags(program, entry_flags):
    names = program_table.PROGRAMS[program]
    assert set(names) <= set(entry_flags(program, []))
    assert len(names) == len(set(names)) <= 20
