"""Behavior of every program: one-line errors, exit codes, help, and output that is not read."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import forks
import pytest
from absl import flags

from efficientnet_ns import config
from efficientnet_ns.config import Config, flag_help, program_table

ROOT = Path(__file__).parents[2]
PROGRAMS = sorted(
    path.stem
    for path in (ROOT / "efficientnet_ns").glob("*.py")
    if path.stem not in ("__init__", "__main__")
)


def run(*arguments: str, timeout: float = 120) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def start(program: str, *arguments: str, **streams) -> subprocess.Popen:
    command = [sys.executable, "-m", f"efficientnet_ns.{program}", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    return subprocess.Popen(command, cwd=ROOT, text=True, **pipes)


def test_unknown_flags_are_wrong_usage():
    """Programs with positional arguments are no exception."""
    programs = ("main", "predict_image", "label_beam", "serving.client")
    running = {program: start(program, "--no_such_flag=1") for program in programs}
    for program, process in running.items():
        errors = process.communicate()[1]
        assert process.returncode == 2, program
        assert "no_such_flag" in errors or "the following arguments" in errors, program
        assert "Traceback" not in errors, program


@pytest.mark.parametrize("arguments", [["--help"], []])
def test_nobody_reads_the_output(arguments):
    """As with `| head`, which has already exited."""
    reader, writer = os.pipe()
    os.close(reader)
    process = start("list_models", *arguments, stdout=writer)
    os.close(writer)
    assert process.communicate()[1] == ""
    assert process.returncode == 141


def test_nobody_reads_help():
    reader, writer = os.pipe()
    os.close(reader)
    running = [start(program, "--help", stdout=writer) for program in ("main", "serving.client")]
    os.close(writer)
    for process in running:
        assert process.communicate()[1] == ""


def test_other_broken_pipes_are_errors():
    code = "raise BrokenPipeError(32, 'of a server')"
    done = run(
        "-c",
        f"from efficientnet_ns.files import standard_output\nwith standard_output.quiet_when_unread():\n    {code}",
    )
    assert done.returncode == 1 and "of a server" in done.stderr


def test_output_was_closed_before():
    done = run("-c", "import os, sys\nos.close(1)\nsys.stdout = None\n" + _LIST_MODELS)
    assert (done.returncode, done.stderr) == (0, "")


_LIST_MODELS = """
import runpy
runpy.run_module("efficientnet_ns.list_models", run_name="__main__")
"""


def test_full_help_has_a_heading_for_each_section():
    shown = run("-m", "efficientnet_ns.main", "--helpfull")
    assert shown.returncode == 0
    lines = shown.stdout.splitlines()
    sections = list(config.subsections(Config).values())
    end = next(i for i, line in enumerate(lines) if line.startswith("Of the library "))
    places = [lines.index(cls.__doc__.splitlines()[0]) for cls in sections]
    assert places == sorted(places)
    for cls, first, last in zip(sections, places, [*places[1:], end]):
        section = "\n".join(lines[first:last])
        for field in dataclasses.fields(cls):
            assert f"--{field.name}=<" in section or f"--[no]{field.name} " in section, field.name
    assert "--mode=<train|eval|train_and_eval|predict>  (default: 'train_and_eval')" in shown.stdout
    assert max(map(len, lines[:end])) <= 100


def test_help_does_not_load_tensorflow():
    """Checks one program; test_architecture checks the imports of all programs in their sources."""
    answer = run("-X", "importtime", "-m", "efficientnet_ns.evaluate_robustness", "--helpshort")
    modules = {line.split("|")[-1].strip() for line in answer.stderr.splitlines()}
    assert {"absl", "efficientnet_ns.config"} <= modules
    assert "tensorflow" not in modules
    assert "--imagenet_sketch=" in answer.stdout
    # The program's own flags, not those of the libraries.
    assert "--logtostderr" not in answer.stdout


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_shows_every_flag(program, entry_flags):
    values = entry_flags(program, [])
    full = flag_help.full(values, sys.argv[0], "What it does.")
    own = set(values) - set(flags.FlagValues()) - {"input_dir"}  # A former name.
    assert own and all(f"--{name}=<" in full or f"--[no]{name} " in full for name in own)
    assert "--input_dir" not in full
    names = program_table.PROGRAMS[program]
    short = flag_help.short(values, sys.argv[0], "What it does.", names)
    shown = re.findall(r"^  --(?:\[no\])?(\w+)", short, re.M)
    assert shown == list(names) or not names and set(shown) == own
    assert "--helpfull" in short.splitlines()[-2]


@pytest.mark.parametrize("entry", ["main", "list_models", "label_beam"])
def test_leftover_words_end_the_program(entry):
    answer = forks.python("-m", f"efficientnet_ns.{entry}", "oops")
    assert answer.returncode == 2
    assert "'oops'" in answer.stderr and "Traceback" not in answer.stderr


@pytest.mark.parametrize(
    "entry, arguments, message",
    [
        ("main", ["--train_steps=0"], "--train_steps=0 is too small"),
        ("noisy_student", ["--teacher_steps=0"], "--teacher_steps=0 is too small"),
        ("filter_unlabel", [], "--unlabel_data_dir is required"),
        (
            "filter_unlabel",
            [f"--{k}_dir=x" for k in ("input", "prediction", "prelim_stats", "output")]
            + ["--report", "--only_get_stats=1"],
            "--report needs a selection",
        ),
    ],
)
def test_wrong_settings_are_one_line(entry, arguments, message):
    answer = forks.python("-m", f"efficientnet_ns.{entry}", *arguments)
    assert answer.returncode == 2
    assert message in answer.stderr and "Traceback" not in answer.stderr


@pytest.mark.parametrize(
    "error, one_line",
    [
        ("config.ConfigError('the message')", True),
        ("FileNotFoundError('the message')", True),
        ("type('FailedPreconditionError', (Exception,), {})('the message: a directory')", True),
        ("ValueError('the message')", False),
        ("TypeError('the message')", False),
    ],
)
def test_run_hides_the_stack_only_of_what_users_can_mend(error, one_line):
    code = f"""
from efficientnet_ns import config
def main():
    raise {error}
config.run(main)
"""
    answer = run("-c", code)
    assert "the message" in answer.stderr
    assert ("Traceback" not in answer.stderr) == one_line
    assert (answer.returncode == 2) == one_line
