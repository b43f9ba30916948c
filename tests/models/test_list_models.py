"""The list of published models: quick, aligned, without TensorFlow."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

from efficientnet_ns.models import recipe_table
from efficientnet_ns.models.recipes import RECIPES

ROOT = Path(__file__).parents[2]

# Runs the module as `python -m` does, then prints what was imported.
PROGRAM = """
import runpy, sys
try:
    runpy.run_module("efficientnet_ns.list_models", run_name="__main__", alter_sys=True)
finally:
    heavy = {"tensorflow", "numpy", "keras"} & set(sys.modules)
    print(*sorted(heavy), file=sys.stderr, end="")
"""


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=20,  # It takes half a second.
    )


def test_table():
    done = run()
    assert (done.returncode, done.stderr) == (0, "")
    title, *lines = done.stdout.split("\n\n")[0].splitlines()
    assert [line.split()[0] for line in lines] == list(RECIPES)
    assert lines[0].split() == [
        *("efficientnet-b0", "5.29M", "0.39B", "224", "224", "0.875", "0.2", "700", "1", "-"),
        *("78.8", "77.3", "noisy_student_efficientnet-b0", "tf_efficientnet_b0.ns_jft_in1k"),
        "efficientnet-b0_noisy-student.h5",
    ]
    rows = {words[0]: words[1:] for words in map(str.split, lines)}
    assert rows["efficientnet-l2"][:4] == ["480.31M", "476B", "475", "800"]
    assert rows["efficientnet-l2"][-1] == "-"
    assert rows["efficientnet-lite2"] == [
        *("6.09M", "0.899B", "260", "260", "0.890", "0.3", "700", "3", "6", "-", "77.6"),
        *("efficientnet-lite2", "tf_efficientnet_lite2.in1k", "-"),
    ]
    for column in ("TF1 checkpoint", "timm", "Keras file"):
        start = title.index(column)
        assert all(line[start - 2 : start] == "  " != line[start] for line in lines), column
    for column in ("params", "mult-adds", "top-1", "supervised"):
        end = title.index(column) + len(column)
        assert all(re.match(r"\S  ", line[end - 1 :]) for line in lines), column


def test_json():
    done = run("--json")
    assert (done.returncode, done.stderr) == (0, "")
    rows = {row.pop("model"): row for row in json.loads(done.stdout)}
    assert rows == {name: dataclasses.asdict(recipe) for name, recipe in RECIPES.items()}


def test_words_that_are_no_flags_are_refused():
    done = run("efficientnet-b0")
    assert done.returncode == 2 and "'efficientnet-b0'" in done.stderr


def test_counted():
    """Counts a model small enough for every test run, under another model's recipe."""
    name, recipe = "efficientnet-test", RECIPES["efficientnet-b0"]
    row = recipe_table.counted({name: recipe})[name]
    assert row.params == 36_488 and 1e5 < row.multiply_adds < 1e6
    assert row == dataclasses.replace(recipe, params=36_488, multiply_adds=row.multiply_adds)
    assert f"{row.multiply_adds / 1e9:.3g}B" in recipe_table.table({name: row})
