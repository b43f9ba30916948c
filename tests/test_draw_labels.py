"""Class folders are divided into labeled, unlabeled and test pictures."""

from __future__ import annotations

import csv
from pathlib import Path

import draw_labels
import pytest


@pytest.fixture
def pictures(tmp_path) -> Path:
    for name, count in (("cat", 20), ("dog", 12)):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(count):
            (tmp_path / "pictures" / name / f"{i}.JPG").write_text(f"{name} {i}")
    return tmp_path / "pictures"


def contents(folder: Path) -> set[str]:
    return {path.read_text() for path in folder.rglob("*.[jJ]*")}


def test_every_picture_is_in_one_part(pictures, tmp_path):
    draw_labels.divide(pictures, tmp_path / "out", labels=3, test=0.25, draw=0)
    parts = [contents(tmp_path / "out" / part) for part in ("labeled", "unlabeled", "test")]
    assert [len(part) for part in parts] == [6, 12 + 6, 5 + 3]
    assert set.union(*parts) == contents(pictures)
    for part in ("labeled", "test"):
        for path in (tmp_path / "out" / part).rglob("*.JPG"):
            assert path.read_text().startswith(path.parent.name)
    with (tmp_path / "out" / "truth.csv").open() as f:
        rows = {row["file"]: row["label"] for row in csv.DictReader(f)}
    files = {path.name: path.read_text() for path in (tmp_path / "out" / "unlabeled").iterdir()}
    assert rows == {name: text.split()[0] for name, text in files.items()}
    labels = [rows[name] for name in sorted(rows)]
    assert labels != sorted(labels)  # The order does not tell the class.


def test_draws_differ_only_in_their_labels(pictures, tmp_path):
    for draw, output in ((0, "a"), (0, "b"), (1, "c")):
        draw_labels.divide(pictures, tmp_path / output, labels=3, test=0.25, draw=draw)
    first, same, other = (
        {part: contents(tmp_path / output / part) for part in ("labeled", "unlabeled", "test")}
        for output in "abc"
    )
    assert first == same
    assert first["test"] == other["test"] and first["labeled"] != other["labeled"]


def test_what_cannot_be_divided(pictures, tmp_path):
    with pytest.raises(SystemExit, match="dog has 9 pictures without those of the test set"):
        draw_labels.divide(pictures, tmp_path / "out", labels=10, test=0.25, draw=0)
    with pytest.raises(SystemExit, match="exists: pass another folder"):
        draw_labels.divide(pictures, pictures, labels=1, test=0, draw=0)
