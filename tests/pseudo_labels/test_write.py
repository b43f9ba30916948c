"""Balanced records from the original's predictions, by command line and in-process."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import re
import shutil
import signal
import socket
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import forks
import numpy as np
import pyarrow.parquet
import pytest
import tensorflow as tf
from fakes import Document

from efficientnet_ns import config as config_lib
from efficientnet_ns.config import FilterConfig, SelectConfig
from efficientnet_ns.files import exclusions, shard_names, tfexamples, tfrecords
from efficientnet_ns.files.errors import DataError
from efficientnet_ns.loop import labeling
from efficientnet_ns.pseudo_labels import index, write, write_shard
from efficientnet_ns.pseudo_labels.selection import SELECTION, select

ROOT = Path(__file__).parents[2]
SHARDS, CLASSES, NUM_IMAGE = 4, 10, 100


def picture(number: int) -> bytes:
    """Returns a 2 x 2 PNG that is unique to the number."""
    pixels = np.frombuffer(number.to_bytes(12, "little"), np.uint8).reshape(2, 2, 3)
    return tf.io.encode_png(pixels).numpy()


def config(folder: Path, output: str, **values) -> SelectConfig:
    settings = {
        "unlabel_data_dir": str(folder / "unlabeled"),
        "prediction_dir": str(folder / "predictions"),
        "prelim_stats_dir": str(folder / output / "prelim_stats"),
        "output_dir": str(folder / output / "filter_data"),
        "file_prefix": "extra",
        "num_shards": SHARDS,
        "num_label_classes": CLASSES,
        "min_threshold": 0.3,
        "num_image": NUM_IMAGE,
    }
    return SelectConfig(**{**settings, **values})


def command(settings: SelectConfig) -> list[str]:
    """Returns the flags that differ from their defaults."""
    defaults = SelectConfig()
    return [
        f"--{name}={value}"
        for name, value in dataclasses.asdict(settings).items()
        if value != getattr(defaults, name)
    ]


class Written(NamedTuple):
    """One record of the output, as its readers see it."""

    image: bytes
    label: int
    prob: float
    probabilities: tuple[float, ...]


def parse(path: Path) -> list[Written]:
    """Reads an output file by the format description alone and allows no other keys."""
    spec = {
        "image/encoded": tf.io.FixedLenFeature([], tf.string),
        "label": tf.io.FixedLenFeature([], tf.int64),
        "prob": tf.io.FixedLenFeature([], tf.float32),
        "probabilities": tf.io.FixedLenFeature([CLASSES], tf.float32),
    }
    result = []
    for serialized in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
        assert set(tf.train.Example.FromString(serialized).features.feature) == set(spec)
        values = [
            tensor.numpy() for tensor in tf.io.parse_single_example(serialized, spec).values()
        ]
        image, label, prob, probabilities = values
        result.append(Written(image, int(label), float(prob), tuple(probabilities.tolist())))
    return result


def files(folder: str) -> dict[str, bytes]:
    """Returns all files below a folder, except partial files of killed processes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file() and not path.name.startswith(".tmp-")
    }


@pytest.fixture(scope="module")
def inputs(goldens, tmp_path_factory) -> Path:
    """The original's predictions and a matching number of images."""
    folder = tmp_path_factory.mktemp("write")
    shutil.copytree(goldens / "filter_unlabel" / "predictions", folder / "predictions")
    (folder / "unlabeled").mkdir()
    for shard in range(SHARDS):
        name = shard_names.shard_name("extra", shard, SHARDS)
        examples = [tfexamples.unlabeled_example(picture(500 * shard + i)) for i in range(500)]
        tfrecords.write(str(folder / "unlabeled" / name), examples)
    return folder


@pytest.fixture(scope="module")
def by_command(inputs) -> tuple[SelectConfig, dict]:
    """Returns settings and printed result of the command line."""
    settings = config(inputs, "by_command")
    done = forks.python(*("-m", "efficientnet_ns.filter_unlabel", "--report"), *command(settings))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    # Other runs, whose files are compared, have no report.
    shutil.move(result["report"], inputs / "report.html")
    return settings, result


@pytest.fixture(scope="module")
def written(by_command) -> list[list[Written]]:
    """Records of the command's output, by shard."""
    data = Path(by_command[0].output_dir) / "data"
    names = [f"train-0-{shard:05d}-of-{SHARDS:05d}" for shard in range(SHARDS)]
    assert sorted(path.name for path in data.iterdir()) == sorted([*names, "counts.json"])
    return [parse(data / name) for name in names]


def test_command_reports_counts(by_command, written):
    result = by_command[1]
    total = NUM_IMAGE * CLASSES
    assert result["records"] == sum(map(len, written)) == total
    assert result["unique"] == len({record.image for shard in written for record in shard})


def test_report_is_written_when_asked(inputs, by_command):
    settings, result = by_command
    assert result["report"] == f"{settings.output_dir}/report.html"
    summary = Document((inputs / "report.html").read_text(encoding="utf-8")).tables[0]
    assert [row[1] for row in summary if "kept" in row[0]] == [f"{result['unique']:,}"]


def test_every_record_is_its_image_with_its_prediction(inputs, written):
    for shard, rows in enumerate(written):
        name = shard_names.prediction_name(shard, SHARDS, 0)
        predictions = tf.data.TFRecordDataset(str(inputs / "predictions" / name))
        spec = {"probabilities": tf.io.FixedLenFeature([CLASSES], tf.float32)}
        probs = [tf.io.parse_single_example(p, spec)["probabilities"].numpy() for p in predictions]
        place = {picture(500 * shard + i): i for i in range(500)}
        for record in rows:
            own = probs[place[record.image]]
            assert record.probabilities == tuple(own.tolist())
            assert record.label == int(own.argmax())
            assert record.prob == float(own.max()) >= 0.3


def test_classes_are_balanced_exactly(written):
    assert Counter(record.label for shard in written for record in shard) == dict.fromkeys(
        range(CLASSES), NUM_IMAGE
    )


def test_copies_are_those_of_the_selection(by_command, written):
    chosen = pyarrow.parquet.read_table(f"{by_command[0].output_dir}/{SELECTION}").to_pylist()
    for shard, rows in enumerate(written):
        assert Counter(record.image for record in rows) == {
            picture(500 * shard + row["position"]): row["copies"]
            for row in chosen
            if row["shard"] == shard
        }


def test_copies_do_not_stand_together(written):
    for rows in written:
        images = [record.image for record in rows]
        assert not any(a == b for a, b in zip(images, images[1:]))
        # Records are not in input order either.
        assert sorted(images, key=images.index) != sorted(images)


def test_statistics(by_command, written):
    stats = Path(by_command[0].output_dir) / "stats"
    total: Counter[str] = Counter()
    for shard, rows in enumerate(written):
        counts = Counter(str(record.label) for record in rows)
        assert json.loads((stats / f"stats_{shard:05d}_0.json").read_text()) == counts
        total += counts
    final = json.loads((stats / "final_stats.json").read_text())
    assert set(final) == {"cat_count", "cat_sorted_pairs", "total_cnt"}
    assert final["cat_count"] == total
    assert final["total_cnt"] == NUM_IMAGE * CLASSES
    assert sorted(map(tuple, final["cat_sorted_pairs"])) == sorted(total.items())


def test_sample_pictures(by_command, written):
    settings = by_command[0]
    known = {r.image: (shard, r.label, r.prob) for shard, rows in enumerate(written) for r in rows}
    seen = defaultdict(list)
    for path in (Path(settings.output_dir) / "samples").rglob("*.jpeg"):
        shard, index, prob = re.fullmatch(
            r"image_(\d)_0_(\d)_(\d\.\d{4})\.jpeg", path.name
        ).groups()
        label = int(path.parent.name)
        assert known[path.read_bytes()] == (int(shard), label, pytest.approx(float(prob), abs=1e-4))
        seen[int(shard), label].append(int(index))
    for shard, rows in enumerate(written):
        for label in range(CLASSES):
            images = {record.image for record in rows if record.label == label}
            assert sorted(seen[shard, label]) == list(range(min(settings.num_samples, len(images))))


def test_two_runs_write_the_same_bytes(inputs, by_command):
    again = config(inputs, "again")
    select(again)
    write.write(again)
    assert files(again.output_dir) == files(by_command[0].output_dir)
    assert files(again.prelim_stats_dir) == files(by_command[0].prelim_stats_dir)


def test_seed_changes_the_order(inputs, by_command):
    other = config(inputs, "seed", seed=1)
    select(other)
    write.write(other)
    name = "data/train-0-00000-of-00004"
    assert files(other.output_dir)[name] != files(by_command[0].output_dir)[name]


def test_number_of_processes_and_runs_does_not_matter(inputs, by_command):
    """Two processes write two shards, one writes the others; the last run writes the totals."""
    settings = config(inputs, "processes", num_workers=2)
    select(settings)
    records_written = write.write(settings, shards=[1, 3])["records"]
    data = Path(settings.output_dir) / "data"
    assert sorted(path.name[-14:-9] for path in data.iterdir()) == ["00001", "00003"]
    assert not (data.parent / "stats" / "final_stats.json").exists()
    records_written += write.write(dataclasses.replace(settings, num_workers=1), shards=[0, 2])[
        "records"
    ]
    assert records_written == NUM_IMAGE * CLASSES
    assert files(settings.output_dir) == files(by_command[0].output_dir)


def test_a_call_per_shard_is_one_call_over_all(inputs, by_command, entry_flags):
    """The original's scripts call once per shard, first for statistics, then for records."""
    settings = config(inputs, "per_shard")
    for only_get_stats in (1, 0):
        for shard in (2, 0, 3, 1):
            step = dataclasses.replace(settings, only_get_stats=only_get_stats)
            values = entry_flags("filter_unlabel", [*command(step), f"--shard_id={shard}"])
            labeling.select_and_write(
                *(config_lib.from_flags(cls, values) for cls in (SelectConfig, FilterConfig))
            )
        written = len(list(Path(settings.output_dir).glob("data/train-*")))
        assert written == (0 if only_get_stats else SHARDS)
    for name in ("prelim_stats_dir", "output_dir"):
        found, expected = (files(getattr(c, name)) for c in (settings, by_command[0]))
        assert found == expected and len(found) > SHARDS


def test_decisions_are_read_once_for_all_shards(inputs, monkeypatch):
    settings = config(inputs, "decisions", exclude=str(inputs / "exclude.csv"))
    rows = [f"{index.input_path(settings, shard)},{shard}\n" for shard in range(SHARDS)]
    (inputs / "exclude.csv").write_text("".join(["file,record\n", *rows]))
    select(settings)
    calls, changes = [], index.changes
    monkeypatch.setattr(index, "changes", lambda *args: (calls.append(args), changes(*args))[1])
    # Excluded images are not in the selection.
    monkeypatch.setattr(exclusions, "of_files", lambda path, *_: pytest.fail(f"{path} was read"))
    assert write.write(settings, shards=[1, 3])["records"] > 0
    assert len(calls) == 1


KILLED_AT_ITS_THIRD_SHARD = """
import os, runpy, signal
import tensorflow as tf

rename = tf.io.gfile.rename

def killing(source, target, overwrite=False):
    if target.endswith("data/train-0-00002-of-00004"):
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target, overwrite)

tf.io.gfile.rename = killing
runpy.run_module("efficientnet_ns.filter_unlabel", run_name="__main__")
"""


def test_killed_run_is_continued(inputs, by_command, monkeypatch):
    """The third shard has a manifest but no records, so writing continues with this shard."""
    settings = config(inputs, "killed")
    done = forks.python("-c", KILLED_AT_ITS_THIRD_SHARD, *command(settings))
    assert done.returncode == -signal.SIGKILL, done.stderr
    data = Path(settings.output_dir) / "data"
    finished = {path: path.stat().st_mtime_ns for path in data.glob("train-0-*")}
    assert sorted(path.name for path in finished) == [
        "train-0-00000-of-00004",
        "train-0-00001-of-00004",
    ]
    shards = []
    original = write.write_shard
    monkeypatch.setattr(
        write, "write_shard", lambda *args: (shards.append(args[3]), original(*args))
    )
    select(settings)
    write.write(settings)
    assert shards == [2, 3]
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert files(settings.output_dir) == files(by_command[0].output_dir)


# --- Mismatched inputs ----------------------------------------------------------------------------


def make_small(folder: Path, workers: int = 1, **values) -> SelectConfig:
    """One shard of six images in two classes, selected but not written."""
    probs = np.float32([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3], [0.4, 0.6], [0.6, 0.4], [0.3, 0.7]])
    (folder / "unlabeled").mkdir()
    (folder / "predictions").mkdir()
    settings = config(
        folder, "out", num_shards=1, num_label_classes=2, num_image=3, min_threshold=0.0, **values
    )
    images = [tfexamples.unlabeled_example(picture(i)) for i in range(len(probs))]
    tfrecords.write(index.input_path(settings, 0), images)
    for worker in range(workers):
        path = index.prediction_path(settings, 0, worker)
        tfrecords.write(
            path, tfexamples.prediction_examples(np.asarray(probs[worker::workers], np.float32))
        )
    select(settings)
    return settings


def damage(path: str, record: int) -> None:
    """Flips the last byte of a record's payload."""
    content = bytearray(Path(path).read_bytes())
    offset = 0
    for _ in range(record + 1):
        start, offset = offset, offset + 16 + int.from_bytes(content[offset : offset + 8], "little")
    content[offset - 5] ^= 0xFF
    assert start < offset - 5
    Path(path).write_bytes(content)


def assert_nothing_written(settings: SelectConfig) -> None:
    assert not list(Path(settings.output_dir).glob("data/*"))
    assert not list(Path(settings.output_dir).glob("stats/*"))


def test_what_a_killed_process_left_of_a_finished_shard_is_removed(by_command):
    """Another process may have finished the shard that a killed one began."""
    settings = by_command[0]
    folder, host = Path(settings.output_dir) / "data", socket.gethostname()
    shard = next(folder.glob("train-*")).name
    left = folder / f".tmp-{host}-{2**22 + 1}-{shard}"
    alive = folder / f".tmp-{host}-{os.getpid()}-{shard}"
    for path in (left, alive):
        path.touch()
    write.write(settings)
    assert not left.exists() and alive.exists()
    alive.unlink()


def test_input_with_fewer_records_than_were_selected(tmp_path):
    settings = make_small(tmp_path)
    images = [tfexamples.unlabeled_example(picture(i)) for i in range(4)]
    tfrecords.write(index.input_path(settings, 0), images)
    with pytest.raises(DataError, match="more predictions than .* has images"):
        write.write(settings)
    assert_nothing_written(settings)


def test_records_that_get_lost_on_the_way_are_noticed(tmp_path, monkeypatch):
    settings = make_small(tmp_path)
    original = tfrecords.write
    monkeypatch.setattr(
        tfrecords, "write", lambda path, payloads: original(path, list(payloads)[:4])
    )
    with pytest.raises(write_shard.Lost, match="6 records selected, 4 read back; of class"):
        write.write(settings)
    assert_nothing_written(settings)


def test_damaged_input_record_is_named(tmp_path):
    settings = make_small(tmp_path)
    path = index.input_path(settings, 0)
    damage(path, 4)
    with pytest.raises(DataError, match=f"{path}, record 4: damaged payload"):
        write.write(settings)
    assert_nothing_written(settings)


def test_damaged_record_that_was_not_selected_does_no_harm(tmp_path):
    settings = make_small(tmp_path, upsample=0)
    settings = dataclasses.replace(settings, num_image=2, output_dir=str(tmp_path / "two"))
    select(settings)
    damage(index.input_path(settings, 0), 3)
    assert write.write(settings) == {"records": 4}


def test_damaged_prediction_of_a_worker_is_named(tmp_path):
    """Record 3 of the shard is record 1 of the second worker's predictions."""
    settings = make_small(tmp_path, workers=2)
    path = index.prediction_path(settings, 0, 1)
    damage(path, 1)
    with pytest.raises(DataError, match=f"{path}, record 1: damaged payload"):
        write.write(settings)
    assert_nothing_written(settings)


def test_records_of_two_workers_meet_their_images(tmp_path):
    settings = make_small(tmp_path, workers=2)
    assert write.write(settings) == {"records": 6}
    labels = {r.image: r.label for r in parse_two_classes(settings)}
    assert labels == {picture(i): i % 2 for i in range(6)}


def test_other_file_systems(tmp_path, monkeypatch):
    """Uses TensorFlow's in-memory file system in place of cloud storage."""
    settings = make_small(tmp_path, workers=2)
    write.write(settings)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    remote = dataclasses.replace(
        settings, output_dir="ram://write/out", prelim_stats_dir="ram://write/statistics"
    )
    select(remote)
    assert write.write(remote) == {"records": 6}
    for name, content in files(settings.output_dir).items():
        if name.startswith(("data/", "stats/stats_")):
            with tf.io.gfile.GFile(f"{remote.output_dir}/{name}", "rb") as f:
                assert f.read() == content, name
    # Deletes the local copy of the selection.
    gc.collect()
    assert not list(tmp_path.glob(".tmp-*"))


def parse_two_classes(settings: SelectConfig) -> list[Written]:
    spec = {
        "image/encoded": tf.io.FixedLenFeature([], tf.string),
        "label": tf.io.FixedLenFeature([], tf.int64),
    }
    data = tf.data.TFRecordDataset(f"{settings.output_dir}/data/train-0-00000-of-00001")
    rows = [tf.io.parse_single_example(serialized, spec) for serialized in data]
    return [Written(r["image/encoded"].numpy(), int(r["label"]), 0.0, ()) for r in rows]


def test_missing_input_shard_is_named(tmp_path):
    settings = make_small(tmp_path)
    path = Path(index.input_path(settings, 0))
    path.unlink()
    with pytest.raises(DataError, match=str(path)):
        write.write(settings)


def test_selection_comes_first(tmp_path):
    settings = dataclasses.replace(make_small(tmp_path), output_dir=str(tmp_path / "other"))
    with pytest.raises(DataError, match="other/selection.parquet is missing"):
        write.write(settings)


def test_wrong_number_of_workers_is_noticed(tmp_path):
    """Only two of three prediction files exist, so positions refer to other images."""
    settings = make_small(tmp_path, workers=3)
    Path(index.prediction_path(settings, 0, 2)).unlink()
    settings = dataclasses.replace(
        settings, output_dir=str(tmp_path / "two"), prelim_stats_dir=str(tmp_path / "two_stats")
    )
    select(settings)
    with pytest.raises(DataError, match="total_replicas of the prediction"):
        write.write(settings)
    assert_nothing_written(settings)


def test_predictions_left_over_are_noticed(tmp_path):
    settings = make_small(tmp_path)
    more = [*(r.payload for r in tfrecords.read(index.prediction_path(settings, 0, 0)))] * 2
    tfrecords.write(index.prediction_path(settings, 0, 0), more)
    with pytest.raises(DataError, match="more predictions than"):
        write.write(settings)


def test_predictions_made_again_after_the_selection_are_noticed(tmp_path):
    settings = make_small(tmp_path)
    path = index.prediction_path(settings, 0, 0)
    rows = [tfexamples.probabilities(r.payload)[::-1] for r in tfrecords.read(path)]
    tfrecords.write(path, tfexamples.prediction_examples(np.asarray(rows, np.float32)))
    with pytest.raises(DataError, match="record 0 does not match the selection"):
        write.write(settings)
