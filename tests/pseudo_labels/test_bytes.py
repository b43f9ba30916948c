"""Labeling writes the bytes that commit 689ed74 wrote, so work begun with it continues.

`DIGESTS` were computed by running `digests` of this file with the code of that commit. If one
changes on purpose, increase the version in the manifest (`DRAWS`, `ORDER`) so that files of two
definitions are never mixed.
"""

from __future__ import annotations

import hashlib
import json
import struct
import types
import zlib
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from efficientnet_ns.config import Config, SelectConfig
from efficientnet_ns.files import shard_names, tfexamples, tfrecords
from efficientnet_ns.pseudo_labels import predict, selection, write

CLASSES, SHARDS, WORKERS, ROWS = 5, 2, 2, 230


def png(number: int) -> bytes:
    """Returns an uncompressed PNG of one pixel, so that no library affects its bytes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        crc = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" + number.to_bytes(3, "big"), 0)
    comment = chunk(b"tEXt", b"Comment\0" + b"x" * (number % 50))
    parts = [chunk(b"IHDR", header), comment, chunk(b"IDAT", pixels), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


class Teacher:
    """Predicts probabilities from a hash of the image, the same on every machine.

    Args:
      groups: number of groups to label before the process is "killed".
    """

    group = 16
    engine = types.SimpleNamespace(name="hash", batch_size=4, concurrency=1)

    def __init__(self, groups: int = 10**9):
        self.left, self.labeled = groups, 0

    def label(self, images):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        self.labeled += len(images)
        probs = np.zeros([len(images), CLASSES], np.float32)
        problems = {}
        for place, image in enumerate(images):
            if image is None:
                continue
            row = np.frombuffer(hashlib.sha256(image).digest()[:CLASSES], np.uint8)
            # Few values, so that ties occur.
            row = (row // 32).astype(np.float32) ** 3 + 1
            probs[place] = row / row.sum()
            if image.endswith(b"?"):
                probs[place], problems[place] = 0, "the image cannot be decoded"
        return probs, problems


def make_set(folder: Path) -> Config:
    """Writes unlabeled records, some unreadable; returns the settings for predicting them."""
    (folder / "unlabeled").mkdir(parents=True)
    (folder / "teacher.safetensors").write_bytes(b"weights")
    task = {"num_classes": CLASSES, "image_size": 8, "small_image": True}
    (folder / "task.json").write_text(json.dumps(task))
    for shard in range(SHARDS):
        images = [png(1000 * shard + i) for i in range(ROWS - 7 * shard)]
        images[17] += b"?"
        payloads = [tfexamples.unlabeled_example(image) for image in images]
        payloads[40] = tfexamples.prediction_examples(np.array([[0.5, 0.5]], np.float32))[0]
        name = shard_names.shard_name("train", shard, SHARDS)
        tfrecords.write(str(folder / "unlabeled" / name), payloads)
    return Config().override(
        model_name="efficientnet-test",
        task_name=str(folder / "task.json"),
        predict_ckpt_path=str(folder / "teacher.safetensors"),
        unlabel_data_dir=str(folder / "unlabeled"),
        num_shards=SHARDS,
        total_replicas=WORKERS,
        max_bad_fraction=0.1,
        part_seconds=0.0,
    )


def labeled(config: Config, output: Path, teacher: Teacher) -> None:
    for worker in range(WORKERS):
        predict.predict(
            config.override(
                output_dir=str(output / "predictions"),
                info_dir=str(output / "info"),
                shard_id="0-1",
                worker_id=worker,
            ),
            teacher,
        )


def killed(config: Config, output: Path) -> None:
    """Labels three groups of the first shard and leaves their parts."""
    with pytest.raises(KeyboardInterrupt):
        labeled(config, output, Teacher(groups=3))


def selecting(folder: Path, output: Path, **values) -> SelectConfig:
    return SelectConfig(
        unlabel_data_dir=str(folder / "unlabeled"),
        prediction_dir=str(output / "predictions"),
        info_dir=str(output / "info"),
        prelim_stats_dir=str(output / "statistics"),
        output_dir=str(output / "selected"),
        file_prefix="train",
        num_shards=SHARDS,
        num_label_classes=CLASSES,
        **values,
    )


SELECTIONS = {
    "top": {"num_image": 40, "min_threshold": 0.35},
    "copies": {"num_image": 150, "min_threshold": 0.5, "seed": 3},
    "drawn": {"num_image": 30, "min_threshold": 0.3, "use_top": 0, "seed": 1},
    "threshold": {"num_image": 150, "min_threshold": 0.4, "selection": "threshold"},
    "many copies": {"num_image": 900, "min_threshold": 0.9, "seed": 7},
}


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def parquet_digest(path: Path) -> str:
    """Hashes the rows and row group sizes; Arrow's version determines the file's bytes."""
    with pyarrow.parquet.ParquetFile(path) as file:
        groups = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
        table = file.read()
    columns = [table.column(name).to_numpy().tobytes() for name in table.column_names]
    schema = [(field.name, str(field.type)) for field in table.schema]
    return digest(repr((groups, schema)).encode() + b"".join(columns))


def without_additions(counted: dict) -> None:
    """Removes what 689ed74 did not write and readers do not require: record offsets, the engine."""
    for name in ("every", "marks", "engine"):
        counted.pop(name, None)


def digests_of(folder: Path) -> dict[str, str]:
    """Maps each file to a digest of its content without the folder's path."""
    result = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if not path.is_file() or path.name.startswith((".lease", ".tmp")):
            continue
        if path.name == "task.json":
            continue  # Written for the teacher; 689ed74 did not write it.
        if path.suffix == ".parquet":
            result[name] = parquet_digest(path)
        elif name.endswith(".jsonl"):
            content = path.read_text().replace(str(folder.parent), "")
            result[name] = digest(content.encode())
        elif "manifest" in path.name:
            # Hashes and sizes of Parquet files depend on the version of Arrow.
            manifest = json.loads(path.read_text())
            for key in ("selection", "predictions"):
                if len(str(manifest["config"].get(key))) == 16:
                    manifest["config"].pop(key)
            for key in [k for k in manifest["sizes"] if k.endswith(".parquet")]:
                manifest["sizes"].pop(key)
            without_additions(manifest["counts"])
            result[name] = digest(json.dumps(manifest).encode())
        elif path.name == tfrecords.COUNTS:
            entries = json.loads(path.read_text())
            for entry in entries.values():
                without_additions(entry)
            result[name] = digest(json.dumps(entries, indent=1).encode())
        else:
            result[name] = digest(path.read_bytes())
    return result


def digests(folder: Path) -> dict[str, str]:
    """Labels, selects and writes one small set; returns one digest per step."""
    config = make_set(folder)
    outputs = {"parts of a killed run": folder / "killed", "predictions": folder / "whole"}
    killed(config, outputs["parts of a killed run"])
    labeled(config, outputs["predictions"], Teacher())
    found = {step: digests_of(output) for step, output in outputs.items()}
    for name, values in SELECTIONS.items():
        output = folder / name
        output.mkdir()
        for kind in ("predictions", "info"):
            (output / kind).symlink_to(outputs["predictions"] / kind)
        settings = selecting(folder, output, **values)
        selection.select(settings)
        write.write(settings)
        found[name] = digests_of(output / "statistics") | digests_of(output / "selected")
    # Predictions, index, info, quarantine and manifest.
    assert len(found["predictions"]) == 5 * SHARDS * WORKERS
    return {step: digest(json.dumps(files).encode()) for step, files in found.items()}


DIGESTS = {
    "parts of a killed run": "430b48063e0e4daf",
    "predictions": "d159958f9727315e",
    "top": "d2a8d1102c6b1de4",
    "copies": "1bcb120e1b09ace9",
    "drawn": "835a4a2ebf134ae1",
    "threshold": "f5e50fe50083f552",
    "many copies": "50cf6ecaa986e868",
}


def test_files_are_those_of_689ed74(tmp_path):
    assert digests(tmp_path) == DIGESTS


def test_killed_run_of_689ed74_is_continued(tmp_path):
    """Its parts equal ours (see above), and the records they cover are not labeled again."""
    config = make_set(tmp_path)
    killed(config, tmp_path / "killed")
    parts = len(list((tmp_path / "killed" / "predictions").glob(".part-*")))
    assert parts >= 2
    labeled(config, tmp_path / "whole", Teacher())
    teacher = Teacher()
    labeled(config, tmp_path / "killed", teacher)
    assert teacher.labeled == 2 * ROWS - 7 - Teacher.group * parts
    assert digests_of(tmp_path / "killed") == digests_of(tmp_path / "whole")
