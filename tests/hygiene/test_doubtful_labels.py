"""Planted label errors are found, and only predictions that match the records are accepted."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from unlabeled_sets import png

from efficientnet_ns.config import ConfigError, LabelsConfig
from efficientnet_ns.files import shard_names, tfexamples, tfrecords
from efficientnet_ns.files.errors import DataError
from efficientnet_ns.hygiene import doubtful_labels

CLASSES, IMAGES = 4, 400


@pytest.fixture
def truth(rng) -> np.ndarray:
    return rng.integers(0, CLASSES, IMAGES)


@pytest.fixture
def labels(truth) -> np.ndarray:
    """Every 20th label is wrong."""
    return np.where(np.arange(IMAGES) % 20 == 7, (truth + 1) % CLASSES, truth)


@pytest.fixture
def folder(tmp_path, rng, truth, labels) -> Path:
    """Labeled records in two files, and predictions of 98 % accuracy by two workers."""
    image = png(rng)
    examples = [
        tfexamples.labeled_example(image, int(label), f"{n}.png" if n % 2 else "")
        for n, label in enumerate(labels)
    ]
    tfrecords.write_sharded(str(tmp_path / "data"), "train", examples, 2)
    guessed = np.where(rng.random(IMAGES) < 0.02, rng.integers(0, CLASSES, IMAGES), truth)
    sureness = np.where(rng.random([IMAGES, 1]) < 0.1, 2, 15)  # Most are confident, as usual.
    probs = np.eye(CLASSES)[guessed] * sureness + rng.random([IMAGES, CLASSES])
    probs = (probs / probs.sum(1, keepdims=True)).astype(np.float32)
    probs[40] = 0  # Unreadable.
    (tmp_path / "predictions").mkdir()
    for shard in range(2):
        for worker in range(2):
            path = tmp_path / "predictions" / shard_names.prediction_name(shard, 2, worker)
            own = probs[shard::2][worker::2]
            tfrecords.write(str(path), tfexamples.prediction_examples(own))
    names = ["ant", "bee", "cat, wild", "dog"]
    task = {"num_classes": CLASSES, "class_names": names}
    (tmp_path / "predictions" / "task.json").write_text(json.dumps(task))
    np.save(tmp_path / "probs.npy", probs)
    return tmp_path


def options(folder: Path, **values) -> LabelsConfig:
    defaults = {
        "label_data_dir": str(folder / "data"),
        "prediction_dir": str(folder / "predictions"),
        "output_dir": str(folder / "doubts"),
    }
    return LabelsConfig(**{**defaults, **values})


def test_planted_errors_come_first(folder, labels):
    result = doubtful_labels.check_labels(options(folder))
    with (folder / "doubts" / "doubtful.csv").open() as f:
        rows = list(csv.DictReader(f))
    # Records alternate between the files.
    found = [2 * int(row["record"]) + ("00001-of" in row["file"]) for row in rows]
    planted = set(range(7, IMAGES, 20))
    assert result["doubtful"] == len(rows) and result["images"] == IMAGES - 1
    assert len(planted & set(found)) >= 16 and len(planted & set(found[:24])) >= 16
    probs = np.load(folder / "probs.npy")
    thresholds = [
        probs[(labels == c) & (np.arange(IMAGES) != 40), c].mean() for c in range(CLASSES)
    ]
    for number in range(IMAGES):
        reached = [c for c in range(CLASSES) if probs[number, c] >= thresholds[c]]
        best = max(reached, key=lambda c: probs[number, c], default=labels[number])
        assert (number in found) == (best != labels[number]), number
    margins = [float(row["margin"]) for row in rows]
    assert margins == sorted(margins)
    assert [row["name"] for row in rows] == [f"{n}.png" if n % 2 else "" for n in found]


def test_report_has_pictures_by_class(folder, monkeypatch):
    read, payloads_of = [], tfrecords.payloads_of
    monkeypatch.setattr(
        tfrecords, "payloads_of", lambda path, some: (read.append(path), payloads_of(path, some))[1]
    )
    result = doubtful_labels.check_labels(options(folder))
    assert len(read) == len(set(read)) == 2  # Each file once.
    page = Path(result["report"]).read_text()
    assert "cat, wild" in page and page.count("<img") > result["doubtful"]
    with (folder / "doubts" / "doubtful.csv").open() as f:
        first = next(row for row in csv.DictReader(f) if row["name"])
    assert f"→ {first['suggested']} {float(first['probability']):.2f}: {first['name']}" in page


def test_predictions_that_do_not_fit_are_refused(folder):
    with pytest.raises(ConfigError, match="--prediction_dir is required"):
        doubtful_labels.check_labels(options(folder, prediction_dir=""))
    with pytest.raises(ConfigError, match="--prediction_dir=/none is not a folder"):
        doubtful_labels.check_labels(options(folder, prediction_dir="/none"))
    (folder / "task.json").write_text('{"num_classes": 3}')
    with pytest.raises(DataError, match="predictions of 4 classes, but the task has 3"):
        doubtful_labels.check_labels(options(folder, task_name=str(folder / "task.json")))
    path = folder / "predictions" / shard_names.prediction_name(1, 2, 1)
    tfrecords.write(str(path), [r.payload for r in tfrecords.read(str(path))][:-1])
    with pytest.raises(DataError, match=f"{path} has no prediction for record 199"):
        doubtful_labels.check_labels(options(folder))


def test_unlabeled_records_in_the_same_folder_are_no_choice(folder, rng):
    tfrecords.write_sharded(
        str(folder / "data"), "extra", [tfexamples.unlabeled_example(png(rng))], 1
    )
    assert doubtful_labels.check_labels(options(folder))["doubtful"]


def test_predictions_of_a_larger_set_are_refused(folder):
    path = folder / "predictions" / shard_names.prediction_name(1, 2, 0)
    probs = np.full([101, CLASSES], 1 / CLASSES, np.float32)
    tfrecords.write(str(path), tfexamples.prediction_examples(probs))
    with pytest.raises(DataError, match="more records than .*00001-of-00002 holds"):
        doubtful_labels.check_labels(options(folder))
