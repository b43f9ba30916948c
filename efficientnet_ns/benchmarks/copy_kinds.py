"""Measures which kinds of copies of photos the search finds, among evaluation and training images."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow
import pyarrow.parquet
import tensorflow as tf

from efficientnet_ns.benchmarks.tables import Row
from efficientnet_ns.data import fingerprints, images
from efficientnet_ns.hygiene import image_marks
from efficientnet_ns.hygiene.near_copies import EVALUATION, UNLABELED, Copy, ImageSet, Search
from efficientnet_ns.pseudo_labels import index

_QUALITY = 92  # Of copies whose kind does not say it.


def _jpeg(pixels: tf.Tensor, quality: int = _QUALITY) -> tf.Tensor:
    return tf.io.encode_jpeg(images.to_uint8(pixels), quality=quality)


def _smaller(pixels: tf.Tensor, factor: int) -> tf.Tensor:
    return tf.image.resize(pixels, tf.maximum(tf.shape(pixels)[:2] // factor, 1), "area")


def _crop(pixels: tf.Tensor, part: float, at: Sequence[float]) -> tf.Tensor:
    """Cuts out `part` of each side; `at` 0 is the upper left corner, 1 the lower right one."""
    height, width = pixels.shape[:2]
    sides = round(height * part), round(width * part)
    y, x = (int(place * (whole - side)) for place, whole, side in zip(at, (height, width), sides))
    return pixels[y : y + sides[0], x : x + sides[1]]


# Kind → function of decoded pixels, float32 [H, W, 3], and a random generator: the encoded copy.
_KINDS: dict[str, Callable[[tf.Tensor, np.random.Generator], tf.Tensor]] = {
    "JPEG, quality 30": lambda pixels, _: _jpeg(pixels, 30),
    "JPEG, quality 50": lambda pixels, _: _jpeg(pixels, 50),
    "JPEG, quality 75": lambda pixels, _: _jpeg(pixels, 75),
    "JPEG, quality 95": lambda pixels, _: _jpeg(pixels, 95),
    "half size": lambda pixels, _: _jpeg(_smaller(pixels, 2)),
    "half size, quality 30": lambda pixels, _: _jpeg(_smaller(pixels, 2), 30),
    "quarter size": lambda pixels, _: _jpeg(_smaller(pixels, 4)),
    "gray": lambda pixels, _: _jpeg(tf.image.rgb_to_grayscale(pixels)),
    "center crop of 95 %": lambda pixels, _: _jpeg(_crop(pixels, 0.95, (0.5, 0.5))),
    "center crop of 90 %": lambda pixels, _: _jpeg(_crop(pixels, 0.9, (0.5, 0.5))),
    "crop of 90 % anywhere": lambda pixels, rng: _jpeg(_crop(pixels, 0.9, rng.random(2).tolist())),
}


def measure(encoded: Sequence[bytes]) -> list[Row]:
    """Searches for a copy of each kind of each photo."""
    rng = np.random.default_rng(0)
    originals, copies = [], []
    for image in encoded:
        pixels = tf.cast(images.decode(tf.constant(image)), tf.float32)
        originals.append(_marks(image, crops=True))
        # One column per kind.
        copies.append([_marks(make(pixels, rng).numpy())[0] for make in _KINDS.values()])
    whole, kinds = np.stack(originals), np.stack(copies, 1)
    with tempfile.TemporaryDirectory() as folder:
        found = {
            "evaluation": _found(folder, EVALUATION, whole, kinds),
            "training": _found(folder, UNLABELED, whole[:, :1], kinds),
        }
    rows = []
    for number, kind in enumerate(_KINDS, 1):
        for role, pairs in found.items():
            right = sum(one.file == f"{number}" and one.record == one.of_record for one in pairs)
            share = 100 * right / len(encoded)
            rows.append(Row(f"{kind}: found as copies of {role} images", share, "%"))
    for role, pairs in found.items():
        wrong = {one.record for one in pairs if one.record != one.of_record}
        share = 100 * len(wrong) / len(encoded)
        rows.append(Row(f"taken for copies of other {role} images", share, "%"))
    return rows


def _marks(image: bytes, *, crops: bool = False) -> np.ndarray:
    """Returns the marks of an image, and of its crops, uint64 [V, 5]."""
    pixels = images.decode(tf.constant(image))
    grids = fingerprints.crops(pixels) if crops else fingerprints.grid(pixels)[tf.newaxis]
    return fingerprints.marks([image], grids.numpy())


def _found(folder: str, role: int, originals: np.ndarray, kinds: np.ndarray) -> list[Copy]:
    """Returns the copies that a search finds; file "0" has the originals, file k those of kind k.

    Args:
      role: role of the originals; the copies are unlabeled images.
      originals: uint64 [N, V, 5], marks of the images and of their crops.
      kinds: uint64 [K, N, 5].
    """
    every = [originals, *kinds[:, :, None]]
    paths = [os.path.join(folder, f"{role}-{number}.parquet") for number in range(len(every))]
    for path, marks in zip(paths, every):
        number, crops = marks.shape[:2]
        columns = [np.repeat(np.arange(number), crops), np.tile(np.arange(crops), number)]
        table = dict(zip(image_marks.COLUMNS, [*columns, *marks.reshape(-1, marks.shape[-1]).T]))
        schema = index.schema(image_marks.COLUMNS)
        pyarrow.parquet.write_table(pyarrow.table(table, schema), path)
    names = list(map(str, range(len(every))))
    sets = [
        ImageSet(role, "originals", names[:1], paths[:1]),
        ImageSet(UNLABELED, "copies", names[1:], paths[1:]),
    ]
    return [copy for copy in Search(sets).copies() if copy.of_file == "0"]
