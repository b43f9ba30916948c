"""A shuffle of more than fits in memory, with the copies of an image far apart.

Every copy gets a place in [0, 2^64) from a hash of (seed, shard, record): the copies of an image
at even distances with some play, so the order of places is a random order with copies spread. Sorting
by place is done in two passes: copies go to buckets, which are ranges of places, in one temporary
file; then one bucket after the other is sorted in memory.
"""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Iterator, Sequence

import numpy as np

# Which function of seed, shard and image gives the order; to be raised when another one does.
ORDER = 2
_BUCKET_BYTES = 64 << 20  # A bucket is held in memory as a whole.
_COPY_BYTES = 128  # What a copy takes while its bucket is sorted, beside its bytes.
_META = np.dtype([("place", "<u8"), ("image", "<i8"), ("length", "<i8")])


def places(seed: int, shard: int, image: np.ndarray, copies: np.ndarray) -> np.ndarray:
    """A place for every copy of every image.

    Args:
      image: numbers of the images in the shard, int64 [N].
      copies: of each image, int64 [N], at least 1.

    Returns:
      uint64 [sum(copies)], the copies of an image in a row. Two copies of an image that has c are
      at least about half of 2^64 / c apart.
    """
    start = _mix(_mix(_mix(np.uint64(seed)) ^ np.uint64(shard)) ^ image.astype(np.uint64))
    step = np.repeat(np.uint64(2**64 - 1) // copies.astype(np.uint64), copies)
    first = np.cumsum(copies) - copies
    number = (np.arange(copies.sum()) - np.repeat(first, copies)).astype(np.uint64)
    start = np.repeat(start, copies)
    play = _mix(start + number) % (step // np.uint64(2) + np.uint64(1))
    with np.errstate(over="ignore"):
        return start + number * step + play  # Around the end of the circle on purpose.


def _mix(values: np.ndarray) -> np.ndarray:
    """A bijection of uint64 that looks random (the finalizer of SplitMix64)."""
    with np.errstate(over="ignore"):
        values = values + np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class Shuffle:
    """Takes copies of byte strings in any order and gives them back in the order of their places.

    The order does not depend on how the input is cut into calls of `add`. The temporary file has no
    name, so that nothing of it is left however the process ends; it is in Python's folder for such
    (TMPDIR) and as large as all copies together.

    Args:
      total: number of copies that will come.
    """

    def __init__(self, total: int):
        self._total = total
        self._buckets = 0
        self._file = tempfile.TemporaryFile()
        # Of every stretch of the file: its bucket, first byte, copies, bytes behind their _META.
        self._stretches = array("q")

    def __enter__(self) -> Shuffle:
        return self

    def __exit__(self, *unused) -> None:
        self._file.close()

    def add(
        self, payloads: Sequence[bytes], image: np.ndarray, copies: np.ndarray, place: np.ndarray
    ) -> None:
        """Takes some images with all their copies.

        Args:
          payloads: N byte strings, held until the call returns.
          image, copies: [N], see `places`.
          place: of every copy, [sum(copies)].
        """
        lengths = np.fromiter(map(len, payloads), np.int64, len(payloads))
        if not self._buckets:
            # The first images stand for all.
            mean = (lengths * copies).sum() / max(copies.sum(), 1) + _COPY_BYTES
            self._buckets = max(1, int(np.ceil(mean * self._total / _BUCKET_BYTES)))
        source = np.repeat(np.arange(len(payloads)), copies)
        meta = np.empty(len(place), _META)
        meta["place"], meta["image"], meta["length"] = place, image[source], lengths[source]
        bucket = ((place >> np.uint64(32)) * np.uint64(self._buckets)) >> np.uint64(32)
        order = np.argsort(bucket, kind="stable")
        ends = np.searchsorted(bucket[order], np.arange(self._buckets), side="right")
        for number, members in enumerate(np.split(order, ends[:-1])):
            if len(members):
                self._append(number, meta[members], [payloads[i] for i in source[members]])

    def _append(self, bucket: int, meta: np.ndarray, payloads: list[bytes]) -> None:
        self._stretches.extend((bucket, self._file.tell(), len(meta), int(meta["length"].sum())))
        self._file.write(meta.tobytes())
        self._file.writelines(payloads)

    def sorted(self) -> Iterator[bytes]:
        """Yields all copies in order; neighbours show different images unless a bucket has but one."""
        stretches = np.array(self._stretches, np.int64).reshape(-1, 4)
        last = -1
        for bucket in range(self._buckets):
            meta, data = self._load(stretches[stretches[:, 0] == bucket])
            order = np.lexsort((meta["image"], meta["place"]))
            order = _apart(meta["image"], order, last)
            last = int(meta["image"][order[-1]]) if len(order) else last
            ends = np.cumsum(meta["length"])
            starts = ends - meta["length"]
            for start, end in zip(starts[order].tolist(), ends[order].tolist()):
                # A copy: a view would keep the whole bucket in memory beside the next one.
                yield data[start:end].tobytes()
            del meta, data, order, starts, ends

    def _load(self, stretches: np.ndarray) -> tuple[np.ndarray, memoryview]:
        """The copies of a bucket: what is known of them, and their bytes one after the other."""
        meta = np.empty(stretches[:, 2].sum(), _META)
        data = memoryview(bytearray(int(stretches[:, 3].sum())))
        copies = read = 0
        for _, offset, count, size in stretches.tolist():
            self._file.seek(offset)
            self._file.readinto(meta[copies : copies + count].view(np.uint8))
            self._file.readinto(data[read : read + size])
            copies, read = copies + count, read + size
        return meta, data


def _apart(image: np.ndarray, order: np.ndarray, last: int) -> np.ndarray:
    """`order`, changed where an image would follow itself; `last` is the image before the first."""
    order = _swap_repeats(image, order, last)
    # What is left stands at the end, with nothing behind it to swap with: the same from the back.
    return _swap_repeats(image, order[::-1], -1)[::-1]


def _swap_repeats(image: np.ndarray, order: np.ndarray, last: int) -> np.ndarray:
    images = image[order]
    repeats = np.flatnonzero(images == np.concatenate([[last], images[:-1]]))
    if not len(repeats):
        return order
    order, images = order.copy(), images.tolist()
    other = 0
    at = int(repeats[0])
    # Only from the first repeat on, because a swap may make new ones behind it.
    for at in range(at, len(images)):
        before = images[at - 1] if at else last
        if images[at] != before:
            continue
        other = max(other, at + 1)
        while other < len(images) and images[other] == before:
            other += 1
        if other == len(images):
            break
        images[at], images[other] = images[other], images[at]
        order[[at, other]] = order[[other, at]]
    return order
