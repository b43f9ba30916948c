"""The demo: data, table, and a short end-to-end run that is killed once."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import tensorflow as tf

from efficientnet_ns.config import ConfigError, DemoConfig
from efficientnet_ns.files import shard_names, tfexamples, tfrecords
from efficientnet_ns.loop import demo, digits
from efficientnet_ns.loop.state import State

ROOT = Path(__file__).parents[2]
DIGITS, TEST, DEV, TRAIN, SHARDS = 5000, 1000, 500, 50, 4
UNLABELED = DIGITS - TEST - DEV - TRAIN


@pytest.fixture(scope="module", autouse=True)
def loaded_once():
    """Caches the digits: several tests create the sets, and loading dominates their time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "load", functools.cache(digits.load))
        yield


def read(folder: Path, prefix: str) -> list[list[bytes]]:
    """Returns payloads by shard."""
    return [
        [record.payload for record in tfrecords.read(path)]
        for path in shard_names.list_shards(str(folder), prefix)
    ]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("demo")
    return folder, digits.make_records(str(folder), seed=0, labels_per_class=5)


@pytest.fixture(scope="module")
def sets(prepared) -> dict[str, list[bytes]]:
    """All payloads of each set."""
    folder, _ = prepared
    places = {"train": "labeled", "dev": "labeled", "test": "labeled", "extra": "unlabeled"}
    return {
        prefix: [payload for shard in read(folder / place, prefix) for payload in shard]
        for prefix, place in places.items()
    }


@pytest.fixture(scope="module")
def classes() -> dict[bytes, int]:
    """Maps the pixels of each image to its class."""
    pixels, labels = digits.load()
    return {image.tobytes(): int(label) for image, label in zip(pixels, labels)}


def pixels_of(payload: bytes) -> bytes:
    image = tf.io.decode_png(tfexamples.image_bytes(payload))
    assert image.shape == (28, 28, 1) and image.dtype == tf.uint8
    return image.numpy().tobytes()


# --- Data -----------------------------------------------------------------------------------------


def test_sizes(prepared, sets):
    assert {prefix: len(payloads) for prefix, payloads in sets.items()} == {
        "train": TRAIN,
        "dev": DEV,
        "test": TEST,
        "extra": UNLABELED,
    }
    _, data = prepared
    assert (data["train"], data["unlabeled"]) == (TRAIN, UNLABELED)


def test_labels_are_those_of_the_collection(sets, classes):
    for prefix in ("train", "dev", "test"):
        for payload in sets[prefix]:
            assert tfexamples.label(payload) == classes[pixels_of(payload)]
    counts = Counter(tfexamples.label(payload) for payload in sets["train"])
    assert counts == dict.fromkeys(range(10), TRAIN // 10)


def test_no_picture_is_in_two_sets(sets, classes):
    assert len(classes) == DIGITS
    counts = Counter(pixels_of(payload) for payloads in sets.values() for payload in payloads)
    assert counts == dict.fromkeys(classes, 1)


def test_unlabeled_records_hold_nothing_but_the_picture(sets):
    for payload in sets["extra"]:
        assert list(tf.train.Example.FromString(payload).features.feature) == ["image/encoded"]


def test_truth_is_in_the_order_of_the_records(prepared, classes):
    folder, data = prepared
    shards = read(folder / "unlabeled", "extra")
    assert len(shards) == SHARDS
    for payloads, truth in zip(shards, data["truth"]):
        assert truth == [classes[pixels_of(payload)] for payload in payloads]


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_same_seed_same_data(prepared, tmp_path):
    folder, data = prepared
    assert digits.make_records(str(tmp_path), seed=0, labels_per_class=5) == data
    assert files(tmp_path) == files(folder)


def test_another_seed_has_other_labels_but_the_same_dev_and_test(prepared, tmp_path):
    """Settings chosen on dev with any seed have therefore not seen a test image."""
    folder, _ = prepared
    other = digits.make_records(str(tmp_path), seed=1, labels_per_class=3)
    assert (other["train"], other["unlabeled"]) == (30, UNLABELED + 20)
    ours, theirs = (
        {
            name: set(map(pixels_of, sum(read(path / "labeled", name), [])))
            for name in ("train", "dev", "test")
        }
        for path in (folder, tmp_path)
    )
    assert ours["dev"] == theirs["dev"] and ours["test"] == theirs["test"]
    assert not theirs["train"] <= ours["train"]


def test_configuration_finds_the_data(prepared):
    folder, _ = prepared
    base, loop = demo.settings(DemoConfig(output_dir=str(folder), seed=7, teacher_steps=5))
    assert base.data.label_data_dir == str(folder / "data" / "labeled")
    assert base.data.unlabel_data_dir == str(folder / "data" / "unlabeled")
    assert (base.train.seed, loop.teacher_steps) == (7, 5)


# --- Table ----------------------------------------------------------------------------------------


def test_table():
    rows = [{"round": "teacher", "top-1": "88.6%"}, {"round": "student 1", "top-1": "9.0%"}]
    assert demo.format_table(rows).split("\n") == [
        "round      top-1",
        "---------  -----",
        "teacher    88.6%",
        "student 1  9.0%",
    ]


def test_table_rows():
    measured = {"dev": {"top1": 0.9}, "test": {"top1": 0.8764}}
    result = {"round": 0, "model": "efficientnet-b0", "steps": 4, "measured": measured}
    teacher = demo.table_row(result, 100, 150)
    assert teacher["round"] == "teacher"
    assert teacher["labels used"] == "100"
    assert (teacher["dev top-1"], teacher["test top-1"]) == ("90.0%", "87.6%")
    kept = {"0": [0.5, 120], "4": [0.31, 150], "7": [0.3, 9]}
    student = demo.table_row({**result, "round": 2, "kept": kept}, 100, 150)
    assert student["round"] == "student 2"
    assert student["labels used"] == "100 + 450 pseudo"
    assert student["images kept per class"] == "9 to 150"
    assert demo.table_row({**result, "round": "control"}, 100, 150)["round"] == "control"
    assert "(narrow)  4 " in demo.format_table([teacher, student])


def test_finding_compares_the_last_student():
    results = [{"measured": {"test": {"top1": top1}}} for top1 in (0.8, 0.93, 0.9, 0.87)]
    finding = demo.what_came_out(results)
    assert (
        "last student classifies 90.0 % correctly: 10.0 points more than its first teacher"
        in finding
    )
    assert "3.0 points more than the control" in finding
    results[3]["measured"]["test"]["top1"] = 0.915
    assert "1.5 points fewer than the control" in demo.what_came_out(results)


def results_of(*top1: float) -> list[dict]:
    """Returns results of one seed (teacher, student, control), equal on dev and test."""
    names = [0, 1, "control"]
    return [
        {"round": name, "measured": {"dev": {"top1": value}, "test": {"top1": value}}}
        for name, value in zip(names, top1, strict=True)
    ]


def test_spread_over_seeds():
    rows = demo.spread([results_of(0.90, 0.95, 0.91), results_of(0.86, 0.95, 0.92)])
    cells = {row["top-1, % (n=2)"]: row["test"] for row in rows}
    # Student's t with one degree of freedom: 12.706 standard errors on both sides.
    assert cells == {
        "teacher": "88.0 ± 2.8",
        "student 1": "95.0 ± 0.0",
        "control": "91.5 ± 0.7",
        "last student - teacher": "+7.0 (95 %: -18.4 to +32.4; least +5.0)",
        "last student - control": "+3.5 (95 %: -2.9 to +9.9; least +3.0)",
    }
    assert demo.spread([results_of(0.9, 0.95, 0.91)])[-1]["dev"] == "+4.0"


def test_every_seed_has_its_folder(tmp_path, monkeypatch, capsys):
    begun = []

    def run_seed(config: DemoConfig) -> list[dict]:
        begun.append((config.seed, config.output_dir))
        return results_of(0.90, 0.95, 0.91)

    monkeypatch.setattr(demo, "run_seed", run_seed)
    demo.run_demo(DemoConfig(output_dir=str(tmp_path), seeds="3,0"))
    assert begun == [(3, str(tmp_path / "3")), (0, str(tmp_path / "0"))]
    assert "(n=2)" in capsys.readouterr().out


def test_folder_of_another_demo(tmp_path):
    config = DemoConfig(output_dir=str(tmp_path))
    State(str(tmp_path), dataclasses.asdict(config)).once("data", dict)
    with pytest.raises(ConfigError, match="labels_per_class: 5 → 6"):
        demo.run_demo(dataclasses.replace(config, labels_per_class=6))


# --- End to end -----------------------------------------------------------------------------------

# After four steps no prediction is confident, so every label counts. The models are small because
# compilation takes most of the time.
KILLED_ONCE = """
import dataclasses, os, runpy, signal, sys
from efficientnet_ns.loop import demo
from efficientnet_ns.models import checkpoint_files

moment = sys.argv.pop(1)
settings, save = demo.settings, checkpoint_files.write_checkpoint

def small(config):
    base, loop = settings(config)
    base = base.override(model_name="efficientnet-test")
    models = ",".join(["efficientnet-test"] * 3)
    return base, dataclasses.replace(loop, models=models, min_threshold=0.0)

def killing(prefix, tensors):
    if prefix.endswith(moment):
        os.kill(os.getpid(), signal.SIGKILL)
    save(prefix, tensors)

demo.settings = small
child = os.fork()
if not child:
    checkpoint_files.write_checkpoint = killing
    runpy.run_module("efficientnet_ns.demo", run_name="__main__")
_, status = os.waitpid(child, 0)
print("killed by signal", os.WTERMSIG(status), flush=True)
runpy.run_module("efficientnet_ns.demo", run_name="__main__")
"""


@pytest.mark.slow
def test_whole_demo_killed_once(tmp_path):
    moment = "round-1/model/model.ckpt-4"
    flags = [f"--output_dir={tmp_path}", "--teacher_steps=4", "--student_steps=4"]
    done = subprocess.run(
        [sys.executable, "-c", KILLED_ONCE, moment, *flags],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    killed, printed = done.stdout.split("\n", 1)
    assert killed == f"killed by signal {int(signal.SIGKILL)}"
    for word in ("teacher", "student 1", "student 2", "control", "exported model: "):
        assert word in printed
    assert f"report: {tmp_path / 'report.html'}" in printed
    report = (tmp_path / "report.html").read_text()
    assert "Learning curves" in report and "Round 2: images rejected" in report
    assert (tmp_path / "export" / "1" / "saved_model.pb").stat().st_size > 0
    loop_state = json.loads((tmp_path / "loop" / "state.json").read_text())
    assert len(loop_state["stages"]) == 12
    assert not list((tmp_path / "export").glob(".tmp-*"))
