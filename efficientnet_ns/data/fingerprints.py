"""Perceptual fingerprints: 256 bits that copies of a photograph share and other photographs do not.

Like PDQ (Facebook 2019, "The TMK+PDQF video-hashing algorithm and the PDQ image-hashing algorithm"),
this takes the discrete cosine transform of the brightness on a 64 x 64 grid and sets one bit for each
of the 16 x 16 lowest non-constant frequencies that is above their median. Copies differ in at most
31 bits. Instead of applying PDQ's filter, each grid point is the mean of whole numbers over its area,
so all machines get the same result. The bits are in order of frequency, the most robust first.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

GRID = 64
# Columns of an image: `hash` of the content, then the words of the fingerprint.
COLUMNS = ("hash", "f0", "f1", "f2", "f3")
WORDS = 4  # Number of uint64 values in a fingerprint.
THRESHOLD = 31  # Maximum number of bits in which copies differ.
_SIDE = 16
_CENTERS = (0.95, 0.9)  # Relative sides of the center crops that `crops` adds.
_LEAST_DEVIATION = 2.0  # Minimum standard deviation of the brightness; flatter images look alike.


def grid(pixels: tf.Tensor) -> tf.Tensor:
    """Converts decoded pixels, uint8 [H, W, 3], to brightness, float32 [GRID, GRID] in 0..255."""
    height, width = tf.unstack(tf.shape(pixels)[:2])
    rows, row_groups, row_counts = _lines(height)
    columns, column_groups, column_counts = _lines(width)
    # A strided slice would copy pixel by pixel in generic code, which is four times slower.
    pixels = tf.cast(tf.gather(tf.gather(pixels, rows), columns, axis=1), tf.float32)
    # Float sums of whole numbers are exact below 2**24, regardless of their order. Summing the rows
    # first leaves fewer colors to convert to brightness.
    colors = tf.math.segment_sum(pixels, row_groups)
    gray = tf.tensordot(colors, tf.constant([299.0, 587.0, 114.0]), 1)
    sums = tf.transpose(tf.math.segment_sum(tf.transpose(gray), column_groups))
    grid = sums / (1000.0 * (row_counts[:, tf.newaxis] * column_counts))
    return tf.ensure_shape(grid, [GRID, GRID])


def _lines(size: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Chooses lines (rows or columns) out of `size` and assigns them to GRID groups.

    For large images, every n-th line is enough and takes a fraction of the work. Images smaller than
    the grid are enlarged by an integer factor.

    Returns:
      (lines int32 [L], their groups int32 [L], lines of each group float32 [GRID]); L >= GRID.
    """
    lines = tf.range(0, size, tf.maximum(size // (2 * GRID), 1))
    lines = tf.repeat(lines, (GRID - 1) // tf.size(lines) + 1)
    count = tf.size(lines)
    groups = tf.range(count) * GRID // count
    return lines, groups, tf.math.segment_sum(tf.ones([count]), groups)


def crops(pixels: tf.Tensor) -> tf.Tensor:
    """Returns the grids of an image and then its center crops, float32 [V, GRID, GRID].

    The grids of the crops identify copies of the image that were cropped.
    """
    shape = tf.shape(pixels)[:2]
    grids = [grid(pixels)]
    for side in _CENTERS:
        size = tf.maximum(tf.cast(tf.cast(shape, tf.float32) * side, tf.int32), 1)
        at = (shape - size) // 2
        grids.append(grid(tf.slice(pixels, [at[0], at[1], 0], [size[0], size[1], 3])))
    return tf.stack(grids)


def marks(images: Sequence[bytes | None], grids: np.ndarray) -> np.ndarray:
    """Returns `COLUMNS`, uint64 [N, 5]: the first 64 bits of the SHA-256 and the fingerprint.

    Args:
      images: encoded images; a single one if all grids are of its crops.
      grids: float32 [N, GRID, GRID].
    """
    hashes = [hashlib.sha256(image or b"").digest()[:8] for image in images]
    first = np.array([int.from_bytes(digest, "big") for digest in hashes], np.uint64)
    found = fingerprints(grids)
    return np.concatenate([np.broadcast_to(first[:, None], [len(found), 1]), found], 1)


@functools.cache
def _cosines() -> np.ndarray:
    """Returns the cosines of the frequencies 1.._SIDE, float64 [_SIDE, GRID]."""
    frequency, place = np.arange(1, _SIDE + 1)[:, None], np.arange(GRID)[None]
    return np.cos(np.pi * frequency * (2 * place + 1) / (2 * GRID))


@functools.cache
def _order() -> np.ndarray:
    """Returns the indices of the frequencies in a 16 x 16 table, the lowest first."""
    down, across = np.divmod(np.arange(_SIDE**2), _SIDE)
    return np.lexsort([down, np.maximum(down, across)])


def fingerprints(grids: np.ndarray) -> np.ndarray:
    """Converts float32 [N, GRID, GRID] to uint64 [N, WORDS]; zeros for images without structure."""
    table = _cosines() @ grids.astype(np.float64) @ _cosines().T
    # Rounding hides the order of additions, which depends on the machine.
    values = np.round(table.reshape(len(grids), -1), 3)[:, _order()]
    bits = values > np.median(values, 1, keepdims=True)
    bits[grids.reshape(len(grids), -1).std(1) < _LEAST_DEVIATION] = False
    packed = np.packbits(bits, axis=1, bitorder="little")
    return np.ascontiguousarray(packed).view("<u8").astype(np.uint64)


def are_copies(marks: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Checks which others an image is a copy of, by equal content or similar fingerprints.

    Args:
      marks: marks of the image, uint64 [5].
      others: marks of the others, uint64 [N, 5].

    Returns:
      bool [N].
    """
    words = np.ascontiguousarray(others[:, 1:] ^ marks[1:]).view(np.uint8)
    near = np.unpackbits(words, axis=1).sum(1) <= THRESHOLD
    structured = marks[1:].any() & others[:, 1:].any(1)
    return (others[:, 0] == marks[0]) | (near & structured)
