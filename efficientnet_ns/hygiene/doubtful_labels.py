"""Finds labels that are probably wrong, by confident learning (arXiv 1911.00068).

Uses predictions of a model that was not trained on these labels. The threshold of a class is its
mean probability over the images with that label. An image is doubtful if, among the classes whose
probability reaches their threshold, the most probable is not its label. Images are sorted by
margin: the label's probability minus the largest of the other classes. Takes two passes over the
predictions; memory grows only with the classes and the doubtful images.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from efficientnet_ns import report
from efficientnet_ns.config import ConfigError, LabelsConfig, SelectConfig, check, require
from efficientnet_ns.data import tasks
from efficientnet_ns.files import exclusions, object_stores, tfexamples, tfrecords
from efficientnet_ns.files.errors import DataError
from efficientnet_ns.pseudo_labels import index, unlabeled_set

_AT_ONCE = 1024  # Records.
# The page embeds at most this many pictures in all and per class, of at most _PIXELS per side.
_PICTURES, _PER_CLASS, _PIXELS = 48, 12, 192
_LISTED_CLASSES = 30  # With pictures; the table lists all.


class Doubt(NamedTuple):
    """A doubtful image.

    Attributes:
      margin: probability of the label minus the largest of the other classes, in -1..1. It is
        positive if the label is the most probable class but below its threshold.
      file, record: its position.
      name: name of the file that the record was made from; "" if it stores none.
      label, suggested: classes.
      prob: probability of `suggested`.
    """

    margin: float
    file: str
    record: int
    name: str
    label: int
    suggested: int
    prob: float


class _Rows(NamedTuple):
    """A group of predictions for labeled images.

    Attributes:
      probs: probabilities [N, C].
      labels, records: int [N].
      payloads: the N records.
    """

    file: str
    probs: np.ndarray
    labels: np.ndarray
    records: np.ndarray
    payloads: list[bytes]


def check_labels(options: LabelsConfig) -> dict[str, Any]:
    """Writes `doubtful.csv` and `report.html`, the most doubtful first.

    Returns:
      `images`: number with a label and a prediction; `doubtful`: how many of them are doubtful;
      `report`: path of the page.

    Raises:
      ConfigError: If a folder is not given, or there is no folder of predictions.
      tasks.TaskError: If there is no such task, or none next to the predictions.
      DataError: If predictions are missing, or do not match the records.
    """
    check(options)
    require(options, "label_data_dir", "prediction_dir", "output_dir")
    if not tf.io.gfile.isdir(options.prediction_dir):
        raise ConfigError(f"--prediction_dir={options.prediction_dir} is not a folder")
    task = tasks.get_task(
        options.task_name or os.path.join(options.prediction_dir, tasks.TASK_FILE)
    )
    prefix, num_shards = unlabeled_set.find(
        options.label_data_dir, options.file_prefix, options.num_shards, exact=True
    )
    # `index` finds files by selection settings; here, the labeled set acts as the unlabeled one.
    places = SelectConfig(
        unlabel_data_dir=options.label_data_dir,
        prediction_dir=options.prediction_dir,
        file_prefix=prefix,
        num_shards=num_shards,
        num_label_classes=task.num_classes,
    )
    # --- Two passes, because every threshold depends on all images
    thresholds, images = _thresholds(places)
    doubts = [doubt for rows in _rows(places) for doubt in _doubtful(rows, thresholds)]
    doubts.sort()
    # --- List and page
    object_stores.make_folder(options.output_dir)
    names = tasks.class_names(task) or [str(label) for label in range(task.num_classes)]
    _write_list(os.path.join(options.output_dir, "doubtful.csv"), doubts, names)
    path = os.path.join(options.output_dir, "report.html")
    _write_report(path, options, doubts, names, images)
    return {"images": int(images.sum()), "doubtful": len(doubts), "report": path}


def _rows(places: SelectConfig) -> Iterator[_Rows]:
    """Yields the labeled images that have a prediction, in order."""
    workers = index.count_workers(places)
    for shard in index.shards(places):
        source = index.input_path(places, shard)
        paths = [index.prediction_path(places, shard, worker) for worker in range(workers)]
        readers = [tfrecords.read(path) for path in paths]
        # Worker w of W predicted records w, w + W, w + 2W, …: cycling restores their order.
        predictions = itertools.cycle(readers)
        records = tfrecords.read(source)
        while some := list(itertools.islice(records, _AT_ONCE)):
            # Damaged records and images keep their places in both files, so the pairs stay aligned.
            pairs = [(record, next(next(predictions), None)) for record in some]
            if lost := [record.position for record, found in pairs if found is None]:
                path = paths[lost[0] % workers]
                raise DataError(f"{path} has no prediction for record {lost[0]} of {source}")
            good = [
                (record.payload, record.position, tfexamples.label(record.payload), found.payload)
                for record, found in pairs
                if record.payload and found and found.payload
            ]
            if not good:
                continue
            payloads, positions, labels, predicted = zip(*good)
            probs = np.stack([tfexamples.probabilities(payload) for payload in predicted])
            if probs.shape[1] != places.num_label_classes or max(labels) >= probs.shape[1]:
                raise DataError(
                    f"{source}: labels up to {max(labels)} and predictions of {probs.shape[1]} classes, but "
                    f"the task has {places.num_label_classes}"
                )
            # -1 means no label; zeros mean an image that the model could not read.
            known = np.flatnonzero((np.array(labels) >= 0) & (probs.max(1) > 0))
            own = (
                np.array(labels)[known],
                np.array(positions)[known],
                [payloads[i] for i in known],
            )
            yield _Rows(source, probs[known], *own)
        for path, rest in zip(paths, readers):
            if next(rest, None) is not None:
                raise DataError(
                    f"{path} has predictions for more records than {source} holds: they belong to another "
                    "set. Set --file_prefix to the one that was predicted"
                )


def _thresholds(places: SelectConfig) -> tuple[np.ndarray, np.ndarray]:
    """Returns, per class, the mean probability over its images (inf if none), and their number."""
    total, images = np.zeros(places.num_label_classes), np.zeros(places.num_label_classes, np.int64)
    for rows in _rows(places):
        own = rows.probs[np.arange(len(rows.labels)), rows.labels]
        total += np.bincount(rows.labels, own, len(total))
        images += np.bincount(rows.labels, minlength=len(total))
    if not images.any():
        raise DataError(f"no record in {places.unlabel_data_dir} has a label and a prediction")
    # A class without labeled images has no mean; inf keeps it from being suggested.
    return np.where(images > 0, total / np.maximum(images, 1), np.inf), images


def _doubtful(rows: _Rows, thresholds: np.ndarray) -> Iterator[Doubt]:
    # -1 for classes below their thresholds. If all are below, nothing contradicts the label.
    reached = np.where(rows.probs >= thresholds, rows.probs, -1)
    suggested = reached.argmax(1)
    doubtful = (reached.max(1) >= 0) & (suggested != rows.labels)
    for row in np.flatnonzero(doubtful).tolist():
        label, probs = int(rows.labels[row]), rows.probs[row]
        margin = float(probs[label] - np.delete(probs, label).max())
        best, name = int(suggested[row]), tfexamples.file_name(rows.payloads[row])
        record = int(rows.records[row])
        yield Doubt(margin, rows.file, record, name, label, best, float(probs[best]))


def _write_list(path: str, doubts: Sequence[Doubt], names: Sequence[str]) -> None:
    rows = []
    for one in doubts:
        numbers = (f"{one.prob:.4f}", f"{one.margin:.4f}")
        classes = (names[one.label], names[one.suggested])
        rows.append([one.file, one.record, "labeled", one.name, *classes, *numbers])
    columns = [exclusions.SET, "name", "label", "suggested", "probability", "margin"]
    exclusions.write(path, columns, rows)


def _write_report(
    path: str,
    options: LabelsConfig,
    doubts: Sequence[Doubt],
    names: Sequence[str],
    images: np.ndarray,
) -> None:
    by_class: dict[int, list[Doubt]] = {}
    for one in doubts:
        by_class.setdefault(one.label, []).append(one)
    # No division by 0: every doubtful image is counted in `images`.
    order = sorted(by_class, key=lambda label: -len(by_class[label]) / images[label])
    rows = [
        {
            "label": names[label],
            "images": images[label],
            "doubtful": len(by_class[label]),
            "part": len(by_class[label]) / images[label],
            "most often suggested": names[_most_common([d.suggested for d in by_class[label]])],
        }
        for label in order
    ]
    most = doubts[:_PICTURES]
    by_label = {label: by_class[label][:_PER_CLASS] for label in order[:_LISTED_CLASSES]}
    # The records of all grids together, so that every file is read only once.
    shown = itertools.chain(most, *by_label.values())
    payloads = tfrecords.payloads_at((one.file, one.record) for one in shown)
    opened = [
        report.details(
            f"{names[label]}: {len(by_class[label])} doubtful", _grid(some, names, payloads)
        )
        for label, some in by_label.items()
    ]
    report.write_page(
        path,
        title="Doubtful labels",
        intro=(
            f"{len(doubts)} of {images.sum()} images in {options.label_data_dir} have a label that "
            f"the predictions in {options.prediction_dir} contradict, by confident learning. Below "
            "each picture: its label, the suggested one with its probability, and its file. A model "
            "trained on these labels repeats most of their errors: use predictions of one that was "
            "not."
        ),
        sections=[
            report.Section("Most doubtful", _grid(most, names, payloads)),
            report.Section("Classes", report.table(rows)),
            report.Section("Pictures by class", "".join(opened)),
        ],
    )


def _most_common(labels: Sequence[int]) -> int:
    return int(np.bincount(labels).argmax())


def _grid(
    doubts: Sequence[Doubt], names: Sequence[str], payloads: Mapping[tuple[str, int], bytes]
) -> str:
    items = []
    for one in doubts:
        payload = payloads[one.file, one.record]
        caption = f"{names[one.label]} → {names[one.suggested]} {one.prob:.2f}"
        caption += f": {one.name}" if one.name else ""
        items.append((report.thumbnail(tfexamples.image_if_any(payload), _PIXELS), caption))
    return report.image_grid(items, columns=8, pixel_size=96)
