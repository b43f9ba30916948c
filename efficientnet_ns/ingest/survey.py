"""Examines a folder, archive or set of records before anything is written."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from efficientnet_ns.data import image_conversion, image_headers, tasks
from efficientnet_ns.files import object_stores, shard_names, tfexamples, tfrecords
from efficientnet_ns.files.errors import DataError
from efficientnet_ns.ingest import image_sources, listing, tfds_source
from efficientnet_ns.ingest.image_sources import Entry

# Number of evenly spaced pictures to open.
_SAMPLE = 200
# Assumed shorter side if none of the opened pictures tells its own.
_UNKNOWN_SIDE = 256


class Survey(NamedTuple):
    """The contents of a place.

    Attributes:
      images: number of pictures.
      classes: class → number of its pictures; None if unlabeled.
      median_side: shorter side of the median picture, in pixels.
      refused: (name, reason) of the unusable pictures among the opened ones.
      ignored: number of other files, by kind.
      opened: number of pictures that were decoded.
    """

    images: int
    classes: dict[str, int] | None
    median_side: int
    refused: list[tuple[str, str]]
    ignored: Counter
    opened: int


def is_records(place: str) -> bool:
    """Checks whether a place is a folder of record files."""
    if not tf.io.gfile.isdir(place):
        return False
    try:
        return any(map(shard_names.parse, object_stores.names(place)))
    except UnicodeDecodeError:  # TensorFlow lists no folder with such a name; records have none.
        return False


def survey(
    place: str,
    *,
    labeled: bool,
    class_names: Sequence[str] | None = None,
    advice: listing.Advice = listing.MAKE_RECORDS,
) -> Survey:
    """Examines a folder or archive of pictures, a folder of records, or a TFDS set.

    Args:
      labeled: whether the topmost folders are classes; for records, task.json contains the names.
      class_names: the classes of another set, which this one must share; None for those found.
      advice: what to do if folders are not classes, for messages.

    Raises:
      DataError: If there are no pictures or no classes; see `listing.list_images`.
    """
    if is_records(place):
        return _of_records(place, labeled)
    if place.startswith(tfds_source.PREFIX):
        return _of_tfds(place, labeled)
    if not tf.io.gfile.exists(place):
        raise DataError(f"{place} does not exist: expected a folder or archive of pictures")
    with image_sources.open_source(place) as source:
        found = listing.list_images(source, labeled, class_names, advice=advice)
        if not found.entries:
            raise DataError(f"none of the pictures in {place} is in the folder of a class")
        entries = _spread(found.entries)
        sides, damaged = _look_at(source, entries)
    classes = None
    if labeled and found.class_names is not None:
        counts = Counter(entry.label for entry in found.entries)
        classes = {name: counts[i] for i, name in enumerate(found.class_names)}
    refused = [(item.name, item.reason) for item in found.lost] + damaged
    return Survey(len(found.entries), classes, _median(sides), refused, found.ignored, len(entries))


def _look_at(
    source: image_sources.Source, entries: Sequence[Entry]
) -> tuple[list[int], list[tuple[str, str]]]:
    """Returns (shorter sides, (name, reason) of undecodable entries)."""
    sides: list[int] = []
    refused = []
    with source.reader(entries) as read:
        for entry in entries:
            try:
                image = read(entry).image
                _, shape = image_conversion.prepare(image, image_conversion.Rules())
            except image_conversion.Unusable as e:
                refused.append((image_sources.readable(entry.name), str(e)))
                continue
            # The shape is None if the image was not decoded.
            size = shape or image_headers.declared_size(image)
            sides += [min(size)] if size else []
    return sides, refused


def _spread(items: Sequence) -> list:
    # `unique`, because indices repeat if there are fewer items.
    return [items[i] for i in np.unique(np.linspace(0, len(items) - 1, _SAMPLE).astype(int))]


def _median(sides: Sequence[int]) -> int:
    return int(np.median(sides)) if sides else _UNKNOWN_SIDE


def _of_records(folder: str, labeled: bool) -> Survey:
    """Examines a folder of records in the layout of make_records."""
    task = os.path.join(folder, tasks.TASK_FILE)
    if labeled and not tf.io.gfile.exists(task):
        raise DataError(
            f"{folder} contains records without {tasks.TASK_FILE}, which names their classes: use the "
            "pictures themselves, or records of make_records"
        )
    prefix = tasks.get_task(task).train_set if labeled else ("train", "extra")
    paths = shard_names.list_shards(folder, prefix)
    labels, sides = Counter[int](), []
    for path in paths:
        for number, record in enumerate(tfrecords.read(path)):
            if record.payload is None:
                continue
            labels[tfexamples.label(record.payload) if labeled else 0] += 1
            # From the beginning of each file, because make_records shuffles.
            if number < _SAMPLE // len(paths) + 1:
                size = image_headers.declared_size(tfexamples.image_bytes(record.payload))
                sides += [min(size)] if size else []
    classes = None
    if labeled:
        one = tasks.get_task(task)
        names = tasks.class_names(one) or tuple(map(str, range(one.num_classes)))
        classes = {name: labels[i] for i, name in enumerate(names)}
    return Survey(sum(labels.values()), classes, _median(sides), [], Counter(), len(sides))


def _of_tfds(place: str, labeled: bool) -> Survey:
    name, split = tfds_source.parse(place)
    builder = tfds_source.load_builder(name, None)
    sets = tfds_source.sets_of(builder)
    source = tfds_source.Tfds(builder, split or sets.get("train", next(iter(sets.values()))))
    entries = source.labeled_entries() if labeled else source.entries()
    classes = None
    if labeled:
        if source.class_names is None:
            raise DataError(f"{place} has no labels")
        counts = Counter(entry.label for entry in entries)
        classes = {name: counts[i] for i, name in enumerate(source.class_names)}
    opened = _spread(entries)
    sides, refused = _look_at(source, opened)
    return Survey(len(entries), classes, _median(sides), refused, Counter(), len(opened))
