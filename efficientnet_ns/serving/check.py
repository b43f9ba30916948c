"""How far an exported model's answers are from the model it was made from."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from absl import logging

from efficientnet_ns.data import images as images_lib
from efficientnet_ns.data import records

_EXTENSIONS = (".jpg", ".jpeg", ".png", ".gif", ".bmp")


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
    """The first `limit` encoded images of a folder of image files or of record files.

    What cannot be decoded is named in the log and left out.

    Raises:
      DataError: there are none.
    """
    if not tf.io.gfile.exists(path):
        raise records.DataError(f"{path} does not exist")
    names = sorted(tf.io.gfile.listdir(path)) if tf.io.gfile.isdir(path) else []
    found = list(itertools.islice(_decodable(_named_images(path, names)), limit))
    if not found:
        raise records.DataError(
            f"{path} holds (itself, not in folders below it) neither images ({', '.join(_EXTENSIONS)}) nor records (…-00000-of-…)"
        )
    return found


def _named_images(path: str, names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    pictures = [name for name in names if name.lower().endswith(_EXTENSIONS)]
    for name in pictures:
        with tf.io.gfile.GFile(os.path.join(path, name), "rb") as f:
            yield name, f.read()
    shards = [name for name in names if "-of-" in name and not name.startswith(".")]
    for name in [] if pictures else shards:
        for number, record in enumerate(records.read(os.path.join(path, name))):
            if record.payload is not None:
                yield f"{name}, record {number}", records.image_bytes(record.payload)


def _decodable(images: Iterable[tuple[str, bytes]]) -> Iterator[bytes]:
    for name, image in images:
        try:
            images_lib.decode(image)
        except tf.errors.InvalidArgumentError:
            logging.warning("%s cannot be decoded and is left out of the comparison", name)
            continue
        yield image


def prepared(encoded: Sequence[bytes], prepare: Callable[[tf.Tensor], tf.Tensor]) -> np.ndarray:
    """Preprocesses encoded images: float32 [N, S, S, 3]."""
    return np.stack([prepare(tf.constant(image)).numpy() for image in encoded])


def difference(expected: np.ndarray, answers: np.ndarray) -> Difference:
    """Compares probabilities [N, C] of two models."""
    same = expected.argmax(1) == answers.argmax(1)
    return Difference(len(expected), float(same.mean()), float(np.abs(expected - answers).max()))
