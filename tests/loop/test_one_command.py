"""The one command: resuming after kills, published weights, and reports of problems."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fakes import ROOT, class_folders, flat_folder

import efficientnet_ns as ns
from efficientnet_ns.config import SelectConfig
from efficientnet_ns.files import tfexamples, tfrecords
from efficientnet_ns.loop import labels_csv, plan, rules, run_checks
from efficientnet_ns.models import weights
from efficientnet_ns.outcomes import outcome
from efficientnet_ns.resolve import stored_model

NAMES = ("Über rot", "grün & gelb", "blue")
# Small enough for a test, but enough to tell colors apart.
QUICK = {
    "models": "efficientnet-test,efficientnet-test",
    "input_image_size": 16,
    "teacher_steps": 40,
    "train_steps": 20,
    "train_batch_size": 8,
    "teacher_batch_size": 8,
    "base_learning_rate": 0.01,
    "moving_average_decay": 0.9,
    "bn_momentum": 0.8,
    "augment_name": "none",
    "min_threshold": 0.3,
    "iterations_per_loop": 10,
    "save_checkpoints_steps": 10,
    "preview_images": 0,
}


def write_pictures(folder: Path) -> dict[str, str]:
    class_folders(folder / "my photos", dict.fromkeys(NAMES, 10))
    class_folders(folder / "test", dict.fromkeys(NAMES, 3), first=100)
    flat_folder(folder / "more", 12, classes=3)
    (folder / "my photos" / "blue" / "broken.jpg").write_bytes(b"no picture")
    (folder / "more" / "empty.png").write_bytes(b"")
    shutil.copy(next((folder / "test" / "blue").iterdir()), folder / "more" / "leak.png")
    names = {"labeled": "my photos", "unlabeled": "more", "test": "test"}
    return {name: str(folder / place) for name, place in names.items()}


@pytest.mark.slow
def test_killed_and_continued(tmp_path):
    """Killed in several stages, it writes the files of an undisturbed run and repeats no work."""
    places, work = write_pictures(tmp_path), tmp_path / "run"
    stretched = {**QUICK, "train_ratio": 1.5}
    arguments = {**places, **stretched, "work_dir": str(work)}
    command = [sys.executable, "-m", "efficientnet_ns.noisy_student", "--control"]
    command += [f"--{name}={value}" for name, value in arguments.items()]
    for killed_when in ("round 0: teacher", "round 1: student", "control", "labels"):
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        for line in process.stderr:
            if f"] {killed_when}" in line:
                process.send_signal(signal.SIGKILL)
                break
        process.stderr.read()
        process.stderr.close()
        assert process.wait() == -signal.SIGKILL, killed_when
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for word in ("teacher", "student 1", "control", "predict_image", "start.sh", "were excluded"):
        assert word in done.stdout
    result = ns.noisy_student(**places, work_dir=tmp_path / "again", control=True, **stretched)
    assert result.accuracy["test"] > 0.6
    for name in ("labels.csv", "report.html"):
        assert (work / name).exists()
    assert (work / "labels.csv").read_bytes() == Path(result.labels).read_bytes()
    mine, theirs = (
        {
            name: stage
            for file in ("rounds/state.json", "state.json")
            for name, stage in json.loads((folder / file).read_text())["stages"].items()
        }
        for folder in (work, tmp_path / "again")
    )
    assert [mine[k] for k in mine if k.endswith("measure")] == [
        theirs[k] for k in theirs if k.endswith("measure")
    ]
    updates = {name.split(":")[0]: stage["step"] for name, stage in mine.items() if "step" in stage}
    assert updates == {"round 0": 60, "round 1": 30, "control": 90}
    rows = list(csv.DictReader((work / "labels.csv").open()))
    assert len(rows) == 12 and {row["label"] for row in rows} <= set(NAMES)
    assert "leak.png" not in {row["file"] for row in rows}
    page = Path(result.report).read_text()
    for text in ("What to look at", "mistakes", "calibration", "broken.jpg", "grün &amp; gelb"):
        assert text in page


@pytest.mark.slow
def test_from_published_weights(tmp_path, monkeypatch):
    """All training runs start from the probe, which is a row of the table."""
    monkeypatch.setattr(plan, "published_models", lambda: ("efficientnet-test",))
    monkeypatch.setattr(rules, "PUBLISHED", ("efficientnet-test",))
    load = weights.load_weights

    def published(model, path, **kwargs):
        if path != "published":
            load(model, path, **kwargs)

    monkeypatch.setattr(weights, "load_weights", published)
    values = {k: v for k, v in QUICK.items() if k != "models"}
    places = write_pictures(tmp_path)
    result = ns.noisy_student(**places, work_dir=tmp_path / "run", fix_layer_num=1, **values)
    assert [row["model"].split(" (")[0] for row in result.rows][:3] == [
        "linear probe",
        "teacher",
        "student 1",
    ]
    assert (tmp_path / "run" / "probe" / "model.ckpt-0.index").exists()
    probed, *trained = (
        json.loads((tmp_path / "run" / name / "state.json").read_text())["stages"]
        for name in ("", "rounds")
    )
    losses = [probed["probe: measure"]["validation"]["loss"]]
    losses += [v["validation"]["loss"] for k, v in trained[0].items() if k.endswith(": measure")]
    assert len(set(losses)) == 3, "each model is measured, not what it starts from"
    assert result.settings["keep_bn_statistics"]
    assert stored_model.find(tmp_path / "run") == result.best
    assert os.path.exists(result.tflite) and os.path.exists(result.saved_model)


def test_labels_csv(tmp_path, monkeypatch):
    names = ["a, b.png", "ü.png", "lost.png"]
    examples = [tfexamples.unlabeled_example(b"x", name) for name in names]
    tfrecords.write_sharded(str(tmp_path / "more"), "extra", examples, 1)

    class Labels:
        def __init__(self, config):
            pass

        def labels(self, shard):
            return [(1, 0.75, True), (0, 0.5, False), (-1, 0.0, False)]

    monkeypatch.setattr(outcome, "Outcome", Labels)
    config = SelectConfig(
        unlabel_data_dir=str(tmp_path / "more"), num_shards=1, file_prefix="extra"
    )
    counts = labels_csv.write(str(tmp_path / "labels.csv"), config, ("cat", "dog"))
    assert counts == {"images": 3, "kept": 1}
    assert (tmp_path / "labels.csv").read_text().splitlines() == [
        "file,label,probability,kept",
        '"a, b.png",dog,0.7500,1',
        "ü.png,cat,0.5000,0",
        "lost.png,,,0",
    ]


@pytest.mark.parametrize(
    "top1, examples, classes, chance",
    [(0.109, 300, 10, True), (0.28, 300, 10, False), (0.5, 40, 2, True), (1.0, 5, 2, False)],
)
def test_chance(top1, examples, classes, chance):
    assert run_checks.is_chance(top1, examples, classes) is chance


def test_quarantine_is_told(tmp_path):
    listing = [{"path": "a.jpg", "reason": "not a picture"}]
    (tmp_path / "train-quarantine.json").write_text(json.dumps(listing))
    (line,) = run_checks.quarantined(str(tmp_path))
    assert "pictures that could not be used: 1, such as a.jpg (not a picture)" in line
    assert run_checks.quarantined(str(tmp_path / "none")) == []
