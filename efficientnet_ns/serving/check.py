"""Compares the predictions of an exported model with those of the original model."""

from __future__ import annotations

import itertools
import os
import posixpath
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from absl import logging

from efficientnet_ns.data import image_conversion
from efficientnet_ns.files import object_stores, shard_names, tfexamples, tfrecords
from efficientnet_ns.files.errors import DataError
from efficientnet_ns.ingest import image_sources, listing


class Difference(NamedTuple):
    """Difference between the predictions of two models on the same images.

    Attributes:
      images: number of images.
      agreement: fraction of images with the same most probable class, in [0, 1].
      largest: largest absolute difference between the probabilities of one class.
      mean: mean absolute difference of the probability of the expected class.
    """

    images: int
    agreement: float
    largest: float
    mean: float

    def __str__(self) -> str:
        return (
            f"top-1 agreement {self.agreement:.1%}, largest difference between probabilities "
            f"{self.largest:.2g}, mean difference for the top class {self.mean:.2g}, on "
            f"{self.images} images"
        )


def encoded_images(path: str, limit: int) -> list[bytes]:
    """Returns up to `limit` encoded images of a folder, class folders, an archive or record files.

    Takes images from all folders in turn. An image that cannot be decoded is skipped with a
    warning.

    Raises:
      DataError: If the path does not exist or has no usable image.
    """
    if not tf.io.gfile.exists(path):
        raise DataError(f"{path} does not exist")
    # Empty for an archive, which `_listed` opens.
    names = object_stores.names(path)
    shards = [name for name in names if shard_names.parse(name)]
    # Images next to records take precedence over the records; images in subfolders do not.
    pictures = any(map(image_sources.is_image, names))
    found = _recorded(path, shards) if shards and not pictures else _listed(path)
    # All of these are generators, so only the required images are read and decoded.
    images = list(itertools.islice(_decodable(found), limit))
    if not images:
        raise DataError(
            f"{path} contains neither images that can be decoded nor records (…-00000-of-…)"
        )
    return images


def _recorded(path: str, shards: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    for name in shards:
        for record in tfrecords.read(os.path.join(path, name)):
            where = f"{os.path.join(path, name)}, record {record.position}"
            # A damaged record is skipped. An intact record without an image, below, means records of
            # another kind, such as predictions, which would all fail.
            if record.payload is None:
                logging.warning("skipping %s: %s", where, record.problem)
                continue
            try:
                yield where, tfexamples.image_bytes(record.payload)
            except DataError as e:
                raise DataError(f"{where}: {e}") from e


def _listed(path: str) -> Iterator[tuple[str, bytes]]:
    with image_sources.open_source(path) as source:
        entries = _in_turn(listing.list_images(source, labeled=False).entries)
        with source.reader(entries) as read:
            for entry in entries:
                try:
                    yield os.path.join(path, entry.name), read(entry).image
                except (image_conversion.Unusable, OSError, tf.errors.OpError) as e:
                    logging.warning("skipping %s/%s: %s", path, entry.name, e)


def _in_turn(entries: Sequence[image_sources.Entry]) -> list[image_sources.Entry]:
    """Returns the first entry of every folder, then the second of every folder, and so on."""
    seen: Counter[str] = Counter()
    places = []
    for entry in entries:
        folder = posixpath.dirname(entry.name)
        places.append(seen[folder])
        seen[folder] += 1
    # The sort is stable, so folders keep their order within each turn.
    return [entries[i] for i in sorted(range(len(entries)), key=places.__getitem__)]


def _decodable(images: Iterable[tuple[str, bytes]]) -> Iterator[bytes]:
    """Yields the images that can be decoded, converted as for records."""
    for name, image in images:
        try:
            yield image_conversion.prepare(image, image_conversion.Rules())[0]
        except image_conversion.Unusable as e:
            logging.warning("skipping %s: %s", name, e)


def difference(expected: np.ndarray, found: np.ndarray) -> Difference:
    """Compares the probabilities float [N, C] of two models on the same images."""
    same = expected.argmax(1) == found.argmax(1)
    gaps = np.abs(expected - found)
    of_first = np.take_along_axis(gaps, expected.argmax(1)[:, None], 1)
    return Difference(len(expected), float(same.mean()), float(gaps.max()), float(of_first.mean()))
