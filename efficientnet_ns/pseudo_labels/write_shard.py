"""Writes one file of balanced, pseudo-labeled records: the selected images of a shard.

Images and predictions are read together in the order of the images, so neither is kept in memory.
A temporary file contains each selected record once. The records are then written in random order,
with the copies of an image far apart.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from absl import logging

from efficientnet_ns.config import SelectConfig
from efficientnet_ns.files import (
    json_files,
    manifests,
    object_stores,
    shard_names,
    tfexamples,
    tfrecords,
)
from efficientnet_ns.files.errors import DataError
from efficientnet_ns.pseudo_labels import index, shuffled_copies

# Sample pictures that are written together, because on an object store each requires requests.
_PICTURES_AT_ONCE = 64
_ROWS_AT_ONCE = 4096


class Lost(RuntimeError):
    """Raised if the records written are not the selected records."""


def stage(config: SelectConfig, selection_hash: str, shard: int) -> manifests.Stage:
    """Returns the stage of a shard: its outputs (records, statistics) and manifest.

    Raises:
      DataError: If the unlabeled shard is missing.
    """
    task = index.task_number(config)
    data = os.path.join(
        config.output_dir, "data", shard_names.pseudo_label_name(task, shard, config.num_shards)
    )
    stats = os.path.join(config.output_dir, "stats", f"stats_{shard:05d}_{task}.json")
    source = index.input_path(config, shard)
    size = object_stores.size(source)
    if size is None:
        raise DataError(f"shard {source} is missing (check --file_prefix and --num_shards)")
    settings = {
        "selection": selection_hash,
        "input": manifests.fingerprint([source], [size]),
        "seed": config.seed,
        "order": shuffled_copies.ORDER,
    }
    manifest = os.path.join(config.output_dir, "stats", f"manifest_{shard:05d}_{task}.json")
    return manifests.Stage(manifest, [data, stats], settings)


def write_shard(
    config: SelectConfig,
    selection: str,
    stage: manifests.Stage,
    shard: int,
    workers: int,
    changes: index.Changes,
) -> None:
    """Writes the records of a shard, reads them back and commits them with their statistics.

    Args:
      selection: local path of the file from `selection.select`.
      workers: number of workers that predicted the shard.
      changes: result of `index.changes`, for at least this shard; without excluded images.

    Raises:
      DataError: If a selected record cannot be read or differs from the selection.
      Lost: If the records read back are not the selected records.
    """
    chosen = Chosen.read(selection, shard, workers)
    data_path, stats_path = stage.outputs
    images, total = len(chosen.image), chosen.copies.sum()
    logging.info("%s: writing %d records of %d images", data_path, total, images)
    with stage.write(clean=False) as (temporary, counts):
        with shuffled_copies.Spool() as spool:
            for example in _examples(config, chosen, shard, workers, changes):
                spool.append(example)
            copies = spool.shuffled(config.seed, shard, chosen.image, chosen.copies)
            tfrecords.write(temporary[data_path], copies)
        # Records are counted once, here, in the written file.
        found, marks = _labels(temporary[data_path])
        _check_conservation(data_path, chosen.labels(), found)
        per_class = {str(label): copies for label, copies in found.items()}
        json_files.write_json(temporary[stats_path], dict(sorted(per_class.items())))
        counts.update(marks.noted())


def _labels(path: str) -> tuple[Counter[int], tfrecords.Marks]:
    """Counts the records of each label in a file and marks their places; skips damaged records."""
    found: Counter[int] = Counter()
    with tfrecords.Scanner(path) as scanner:
        marks, begin = tfrecords.Marks(), 0
        while (record := scanner.take()) is not None:
            if record.payload is not None:
                marks.add(begin)
                found[tfexamples.label(record.payload)] += 1
            begin = scanner.offset
    return found, marks


def _check_conservation(path: str, selected: Counter[int], found: Counter[int]) -> None:
    if selected == found:
        return
    total, back = sum(selected.values()), sum(found.values())
    label = min(k for k in selected | found if selected[k] != found[k])
    raise Lost(
        f"{path}: {total} records selected, {back} read back; of class {label}, {selected[label]} "
        f"selected, {found[label]} read back"
    )


class Chosen(NamedTuple):
    """The selected images of a shard, each [N], in the order of the shard.

    Attributes:
      image: int64, index in the shard.
      label: int32, pseudo label.
      prob: float32, probability of the label.
      copies: int64, number of copies, at least 1.
    """

    image: np.ndarray
    label: np.ndarray
    prob: np.ndarray
    copies: np.ndarray

    @classmethod
    def read(cls, selection: str, shard: int, workers: int) -> Chosen:
        """Reads the rows of a shard; worker i mod workers predicted image i."""
        import pyarrow
        import pyarrow.parquet

        columns = ["worker", "position", "label", "prob", "copies"]
        # Each row group has rows of one shard, so other groups are not read.
        table = pyarrow.parquet.read_table(
            selection, columns=columns, filters=[("shard", "=", shard)]
        )
        worker, position, label, prob, copies = (table[name].to_numpy() for name in columns)
        del table
        image = position * workers + worker
        order = np.argsort(image)
        read = cls(image[order], label[order], prob[order], copies[order].astype(np.int64))
        del worker, position, label, prob, copies
        pyarrow.default_memory_pool().release_unused()  # Otherwise it is kept until the end.
        return read

    def rows(self) -> Iterator[tuple[int, int, float]]:
        """Yields the index, label and probability of each image."""
        # In parts, because Python numbers use six times the memory of the arrays.
        for start in range(0, len(self.image), _ROWS_AT_ONCE):
            part = slice(start, start + _ROWS_AT_ONCE)
            columns = (column[part].tolist() for column in (self.image, self.label, self.prob))
            yield from zip(*columns)

    def labels(self) -> Counter[int]:
        """Counts the copies of each label to be written."""
        copies = np.bincount(self.label, self.copies).astype(np.int64)
        return Counter({label: n for label, n in enumerate(copies.tolist()) if n})


def _examples(
    config: SelectConfig, chosen: Chosen, shard: int, workers: int, changes: index.Changes
) -> Iterator[bytes]:
    """Yields the selected images of a shard as pseudo-labeled records, in shard order."""
    paths = [index.prediction_path(config, shard, worker) for worker in range(workers)]
    source = index.input_path(config, shard)
    samples: Counter[int] = Counter()
    pictures: list[tuple[str, bytes]] = []
    decided = {
        (worker, position): label
        for worker in range(workers)
        for position, label in zip(*(a.tolist() for a in changes.get((shard, worker), ())))
    }
    with contextlib.ExitStack() as opened:
        images = opened.enter_context(tfrecords.Scanner(source))
        predictions = [opened.enter_context(tfrecords.Scanner(path)) for path in paths]
        # In ascending order, because scanners only move forward.
        for number, label, prob in chosen.rows():
            position, worker = divmod(number, workers)
            image = _feature(images, source, number, tfexamples.IMAGE)
            probs = _feature(predictions[worker], paths[worker], position, tfexamples.PROBABILITIES)
            if image is None or probs is None:
                break  # A file ended early; `_check_number` names it.
            if (worker, position) in decided:
                # A person's label has probability 1, also in the selection.
                probs = tfexamples.certain(label, config.num_label_classes)
            # Values are exactly equal unless the shard was predicted again after the selection.
            values = tfexamples.Floats(probs)
            if len(values) != config.num_label_classes or values[label] != prob:
                raise DataError(
                    f"{paths[worker]}, record {position} does not match the selection: "
                    "delete its index and the selection, and select again"
                )
            if samples[label] < config.num_samples:
                folder = os.path.join(config.output_dir, "samples", str(label))
                name = f"image_{shard}_{index.task_number(config)}_{samples[label]}_{prob:.4f}.jpeg"
                pictures.append((os.path.join(folder, name), tfexamples.bytes_value(image)))
                samples[label] += 1
            if len(pictures) == _PICTURES_AT_ONCE:
                _write_pictures(pictures)
            yield tfexamples.pseudo_labeled_from_features(image, probs, label, prob)
        _write_pictures(pictures)
        # Moves to the ends of the files, to compare their numbers of records.
        images.skip()
        for worker, scanner in enumerate(predictions):
            scanner.skip()
            _check_number(images.position, scanner.position, source, paths, worker)


def _write_pictures(pictures: list[tuple[str, bytes]]) -> None:
    """Writes (path, content) of sample pictures and empties the list."""

    def write(picture: tuple[str, bytes]) -> None:
        object_stores.make_folder(os.path.dirname(picture[0]))
        with tf.io.gfile.GFile(picture[0], "wb") as f:
            f.write(picture[1])

    object_stores.each(write, pictures)
    pictures.clear()


def _feature(scanner: tfrecords.Scanner, path: str, position: int, key: str) -> bytes | None:
    """Returns a Feature of the record at a position; None if the file ends before it."""
    scanner.skip(position - scanner.position)
    record = scanner.take()
    if record is None:
        return None
    try:
        if record.payload is None:
            raise DataError(record.problem)
        feature = tfexamples.feature(record.payload, key)
        if not feature:
            raise DataError(f"the record has no {key!r}")
    except DataError as e:
        raise DataError(f"{path}, record {position}: {e}") from e
    return feature


def _check_number(
    images: int, predictions: int, source: str, paths: list[str], worker: int
) -> None:
    """Raises DataError unless a worker has exactly one prediction per image."""
    path, workers = paths[worker], len(paths)
    expected = len(range(worker, images, workers))
    if predictions < expected:
        raise DataError(
            f"{path} ends before image {predictions * workers + worker} of the shard: predict it "
            "again, or pass the total_replicas of the prediction as --total_label_replicas "
            f"(now {workers})"
        )
    if predictions > expected:
        raise DataError(
            f"{path} has more predictions than {source} has images for {workers} workers"
        )
