"""How far an exported model's answers are from the model it was made from."""

from __future__ import annotations

import itertools
import os
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from absl import logging

from efficientnet_ns.data import image_conversion
from efficientnet_ns.files import tfexamples, tfrecords
from efficientnet_ns.files.errors import DataError
from efficientnet_ns.ingest import image_sources, listing

_SHARD = re.compile(r".+-\d+-of-\d+")


class Difference(NamedTuple):
    """Of two models on the same images.

    Attributes:
      images: how many were compared.
      agreement: part of them with the same most probable class.
      largest: absolute difference between two probabilities of one class.
    """

    images: int
    agreement: float
    largest: float

    def __str__(self) -> str:
        return (
            f"top-1 agreement {self.agreement:.1%}, largest difference of a probability "
            f"{self.largest:.2g}, on {self.images} images"
        )


def encoded_images(path: str, limit: int) -> list[bytes]:
    """`limit` encoded images of a folder of images or of class folders, an archive, or record files.

    Every folder gives as many as the others, as long as it has more. What cannot be decoded is named
    in the log and left out.

    Raises:
      DataError: there are none.
    """
    if not tf.io.gfile.exists(path):
        raise DataError(f"{path} does not exist")
    names = sorted(tf.io.gfile.listdir(path)) if tf.io.gfile.isdir(path) else []
    shards = [name for name in names if _SHARD.fullmatch(name)]
    # Pictures that lie beside records are meant; those in folders below them are of something else.
    pictures = any(name.rpartition(".")[2].lower() in image_sources.EXTENSIONS for name in names)
    found = _recorded(path, shards) if shards and not pictures else _listed(path, limit)
    images = list(itertools.islice(_decodable(found), limit))
    if not images:
        raise DataError(
            f"{path} holds neither images that can be decoded nor records (…-00000-of-…)"
        )
    return images


def _recorded(path: str, shards: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    for name in shards:
        for record in tfrecords.read(os.path.join(path, name)):
            where = f"{os.path.join(path, name)}, record {record.position}"
            if record.payload is None:
                logging.warning("%s is left out of the comparison: %s", where, record.problem)
                continue
            try:
                yield where, tfexamples.image_bytes(record.payload)
            except DataError as e:
                raise DataError(f"{where}: {e}") from e


def _listed(path: str, limit: int) -> Iterator[tuple[str, bytes]]:
    source = image_sources.open_source(path)
    entries = _in_turn(listing.list_images(source, labeled=False).entries)
    # A compressed archive is read as far as the images it is asked for, which it holds in memory.
    for start in range(0, len(entries), limit):
        some = entries[start : start + limit]
        with source.reader(some) as read:
            for entry in some:
                try:
                    yield os.path.join(path, entry.name), read(entry).image
                except (image_conversion.Unusable, OSError, tf.errors.OpError) as e:
                    logging.warning("%s/%s is left out of the comparison: %s", path, entry.name, e)


def _in_turn(entries: Sequence[image_sources.Entry]) -> list[image_sources.Entry]:
    """The first of every folder, then the second of every folder …."""
    seen: Counter[str] = Counter()
    places = []
    for entry in entries:
        folder = posixpath.dirname(entry.name)
        places.append(seen[folder])
        seen[folder] += 1
    return [entries[i] for i in sorted(range(len(entries)), key=places.__getitem__)]


def _decodable(images: Iterable[tuple[str, bytes]]) -> Iterator[bytes]:
    """Images as they would be in a record."""
    for name, image in images:
        try:
            yield image_conversion.prepare(image, image_conversion.Rules())[0]
        except image_conversion.Unusable as e:
            logging.warning("%s is left out of the comparison: %s", name, e)


def prepared(images: Sequence[bytes], prepare: Callable[[tf.Tensor], tf.Tensor]) -> np.ndarray:
    """Preprocesses encoded images: float32 [N, S, S, 3]."""
    return np.stack([prepare(tf.constant(image)).numpy() for image in images])


def difference(expected: np.ndarray, answers: np.ndarray) -> Difference:
    """Compares probabilities [N, C] of two models."""
    same = expected.argmax(1) == answers.argmax(1)
    return Difference(len(expected), float(same.mean()), float(np.abs(expected - answers).max()))
