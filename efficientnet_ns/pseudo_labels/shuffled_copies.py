"""Yields copies of byte strings in random order, with equal copies far apart, in little memory.

A temporary file contains each byte string once. A hash of (seed, shard, number) assigns every copy
a place on a circle, with the copies of a string at equal distances plus jitter. Sorting by place
results in a random order in which copies are spread out.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from array import array
from collections.abc import Iterator

import numpy as np

from efficientnet_ns.files import tfrecords
from efficientnet_ns.pseudo_labels.selection import splitmix64

# Version of the order as a function of seed, shard and number; increment it if that changes.
ORDER = 2
_BUCKET_BYTES = 64 << 20  # Bytes in memory at a time.
_COPY_BYTES = 128  # Overhead of a copy.
# The mean item size is estimated from the first items, up to this total size.
_FIRST_BYTES = 32 << 20
_ITEM_BYTES = 256


class Spool(contextlib.AbstractContextManager):
    """Byte strings on disk, which use 8 bytes of memory each and 40 bytes for each copy.

    A context manager. The file in TMPDIR has no name, so it does not remain after the process ends,
    even if it is killed.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115, closed by __exit__
        self._ends = array("q", [0])

    def __exit__(self, *unused) -> None:
        self._file.close()

    def append(self, item: bytes) -> None:
        """Appends an item."""
        self._file.write(item)
        self._ends.append(self._ends[-1] + len(item))

    def shuffled(
        self, seed: int, shard: int, number: np.ndarray, copies: np.ndarray
    ) -> Iterator[bytes]:
        """Yields all copies of all items; neighbors differ unless a bucket has no other items.

        The order depends on the arguments, and on the item sizes if they exceed a bucket.

        Args:
          seed, shard: determine the order together with `number`.
          number: index of each item in its shard, ascending, int64 [N].
          copies: number of copies of each item, int64 [N], at least 1.
        """
        self._file.flush()
        items = np.repeat(np.arange(len(number)), copies)
        place = places(seed, shard, number, copies)
        order = np.argsort(place, kind="stable")
        items, place = items[order], place[order]
        ends = np.searchsorted(place, _bucket_starts(self._count_buckets(copies)))
        del order, place  # Each uses eight bytes per copy.
        last = -1
        for part in np.split(items, ends):
            part = _apart(part, last)
            last = part[-1] if len(part) else last
            # Reads in file order, for disks that seek.
            held = {item: self._read(item) for item in np.unique(part).tolist()}
            yield from map(held.__getitem__, part.tolist())

    def _count_buckets(self, copies: np.ndarray) -> int:
        sizes = np.diff(np.asarray(self._ends)) + tfrecords.OVERHEAD
        first = np.searchsorted(np.cumsum(sizes + _ITEM_BYTES), _FIRST_BYTES) + 1
        total = (sizes * copies)[:first].sum() / max(copies[:first].sum(), 1) + _COPY_BYTES
        return max(1, int(np.ceil(total * copies.sum() / _BUCKET_BYTES)))

    def _read(self, item: int) -> bytes:
        start, end = self._ends[item : item + 2]
        return os.pread(self._file.fileno(), end - start, start)


def _bucket_starts(buckets: int) -> np.ndarray:
    """Returns the first place of each of `buckets` equal arcs except the first, uint64."""
    return np.array([-((-k << 32) // buckets) << 32 for k in range(1, buckets)], np.uint64)


def places(seed: int, shard: int, number: np.ndarray, copies: np.ndarray) -> np.ndarray:
    """Computes a place for every copy of every item.

    Args:
      number: index of each item in its shard, int64 [N].
      copies: number of copies of each item, int64 [N], at least 1.

    Returns:
      uint64 [sum(copies)], with the copies of an item in sequence. Two of c copies of an item are
      at least about half of 2^64 / c apart.
    """
    start = splitmix64(splitmix64(np.array([seed], np.uint64)) ^ np.uint64(shard))
    start = splitmix64(start ^ number.astype(np.uint64))
    step = np.repeat(np.uint64(2**64 - 1) // copies.astype(np.uint64), copies)
    first = np.cumsum(copies) - copies
    copy = (np.arange(copies.sum()) - np.repeat(first, copies)).astype(np.uint64)
    start = np.repeat(start, copies)
    jitter = splitmix64(start + copy) % (step // np.uint64(2) + np.uint64(1))
    return start + copy * step + jitter  # Modulo 2^64: the circle.


def _apart(items: np.ndarray, last: int) -> np.ndarray:
    """Reorders items that follow themselves; `last` is the item before the first."""
    items = _swap_repeats(items, last)
    # Remaining repeats are at the end, with no items after them to swap, so this goes backward.
    return _swap_repeats(items[::-1], -1)[::-1]


def _swap_repeats(items: np.ndarray, last: int) -> np.ndarray:
    """Swaps each repeat with the next different item."""
    repeats = np.flatnonzero(items == np.concatenate([[last], items[:-1]]))
    if not len(repeats):
        return items
    items, other = items.tolist(), 0
    # Continues to the end, because a swap may create repeats after the first one.
    for at in range(int(repeats[0]), len(items)):
        before = items[at - 1] if at else last
        if items[at] != before:
            continue
        other = max(other, at + 1)
        while other < len(items) and items[other] == before:
            other += 1
        if other == len(items):
            break
        items[at], items[other] = items[other], items[at]
    return np.array(items)
