"""Measures the search for copies: what it finds, and its cost on a generated index of any size."""

from __future__ import annotations

import concurrent.futures
import contextlib
import math
import os
import tempfile
import threading
import time
from collections.abc import Iterator

import numpy as np
import pyarrow
import pyarrow.parquet

from efficientnet_ns.benchmarks import copy_kinds, inputs, tables
from efficientnet_ns.benchmarks.tables import Row
from efficientnet_ns.config import BenchmarkConfig
from efficientnet_ns.config.cpus import available_cpus
from efficientnet_ns.data import fingerprints
from efficientnet_ns.files import shard_names
from efficientnet_ns.hygiene import image_marks
from efficientnet_ns.hygiene.near_copies import (
    BYTES_PER_ROW,
    EVALUATION,
    UNLABELED,
    ImageSet,
    Search,
)
from efficientnet_ns.pseudo_labels import index

_SHARDS = 128
_BYTES_PER_ROW = BYTES_PER_ROW + 60  # A row of the index takes 56.
_MOST_PHOTOS = 4096
_EVALUATION_IMAGES = 50_000  # As many as ImageNet's validation images.
# This fraction of the images are copies of evaluation images, and as many are copies of other
# unlabeled images.
_PLANTED = 0.01
# By role of the original: the bits in which planted copies differ, the most that are always found.
_BITS = {EVALUATION: 15, UNLABELED: 7}


def run(config: BenchmarkConfig) -> list[Row]:
    """Finds copies of the photos in `data`, if given, then those in a generated index of `rows`.

    The second search runs in a separate process, so that its peak memory is known.

    Raises:
      ConfigError: If `data` has no images, or the disk of TMPDIR is too small.
    """
    kinds = []
    if config.data:
        kinds = copy_kinds.measure(inputs.encoded_images(config.data, most=_MOST_PHOTOS)[1])
    with tempfile.TemporaryDirectory() as folder:
        tables.require_disk(config, folder, _BYTES_PER_ROW)
        start = time.perf_counter()
        sets, planted = make_sets(folder, config.rows)
        made, size = time.perf_counter() - start, _size(folder)
        with tables.environment(TMPDIR=folder), _largest_size(folder) as largest:
            watched = tables.in_own_process(find, sets)
        found, others = watched.result
        return [
            *kinds,
            Row("making the index (not part of the rest)", made, "s"),
            Row("index on disk", size / 1e6, "MB"),
            Row("search: rate", config.rows / watched.seconds, "rows/s"),
            *watched.rows("search"),
            Row("search: temporary files", (largest[0] - size) / 1e6, "MB"),
            Row("planted copies that were found", 100 * found / (planted or math.nan), "%"),
            Row("other images taken for copies", others, "images"),
        ]


def find(sets: list[ImageSet]) -> tuple[int, int]:
    """Returns how many planted copies, and how many other images, a search finds."""
    found = others = 0
    for copy in Search(sets).copies():
        if copy.distance == _BITS[copy.of_role]:
            found += 1
        else:
            others += 1
    return found, others


def make_sets(folder: str, rows: int) -> tuple[list[ImageSet], int]:
    """Writes the marks of an evaluation set and the index of `rows` unlabeled images.

    Returns:
      The sets, and the number of planted copies.
    """
    images = _random(np.random.default_rng(0), _EVALUATION_IMAGES)
    records = shard_names.shard_name("validation", 0, 1)
    marks = os.path.join(folder, f"{records}.parquet")
    # As `image_marks` writes them, but without crops.
    columns = [np.arange(len(images)), np.zeros(len(images)), *images.T]
    pyarrow.parquet.write_table(
        pyarrow.table(dict(zip(image_marks.COLUMNS, columns)), index.schema(image_marks.COLUMNS)),
        marks,
    )
    sizes = [rows // _SHARDS + (shard < rows % _SHARDS) for shard in range(_SHARDS)]
    names = [shard_names.index_name(shard, _SHARDS, 0) for shard in range(_SHARDS)]
    paths = [os.path.join(folder, name) for name in names]

    def make(shard: int) -> int:
        rng = np.random.default_rng([1, shard])
        planted = int(_PLANTED * sizes[shard])
        own = _random(rng, sizes[shard] - 2 * planted)
        leaks = _copies(rng, images[rng.integers(0, len(images), planted)], _BITS[EVALUATION])
        doubles = _copies(rng, own[:planted], _BITS[UNLABELED])
        with index.IndexWriter(paths[shard], shard, 0, marked=True) as writer:
            zeros = np.zeros(sizes[shard])
            writer.add(zeros, zeros, np.concatenate([own, leaks, doubles]))
        return 2 * planted

    with concurrent.futures.ThreadPoolExecutor(available_cpus()) as pool:
        planted = sum(pool.map(make, range(_SHARDS)))
    evaluation = ImageSet(EVALUATION, "evaluation", [records], [marks])
    return [evaluation, ImageSet(UNLABELED, "unlabeled", names, paths, workers=1)], planted


def _random(rng: np.random.Generator, count: int) -> np.ndarray:
    """Returns random marks, uint64 [N, 5]."""
    return rng.integers(0, 2**64, [count, len(fingerprints.COLUMNS)], np.uint64)


def _copies(rng: np.random.Generator, marks: np.ndarray, bits: int) -> np.ndarray:
    """Returns marks with other hashes, and fingerprints that differ in `bits` bits."""
    chosen = np.tile(np.arange(64 * fingerprints.WORDS) < bits, [len(marks), 1])
    flips = np.packbits(rng.permuted(chosen, axis=1), axis=1).view(np.uint64)
    return np.concatenate([_random(rng, len(marks))[:, :1], marks[:, 1:] ^ flips], 1)


def _size(folder: str) -> int:
    """Returns the bytes in a folder."""
    total = 0
    for at, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # Temporary files come and go.
                total += os.path.getsize(os.path.join(at, name))
    return total


@contextlib.contextmanager
def _largest_size(folder: str) -> Iterator[list[int]]:
    """Yields [bytes]: the most that a folder had while the block ran, looked at every second."""
    largest, over = [_size(folder)], threading.Event()

    def look() -> None:
        while not over.wait(1):
            largest[0] = max(largest[0], _size(folder))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield largest
    finally:
        over.set()
        thread.join()
