"""The index of the predictions, read shard by shard on every core, in bounded memory."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Callable, NamedTuple, TypeVar

import numpy as np
import tensorflow as tf

from efficientnet_ns.progress import Progress

Result = TypeVar("Result")

_ROWS_AT_ONCE = 1 << 19  # Of a shard; bounds memory.


def database():
    """An empty DuckDB database in memory, for reports and joins."""
    import duckdb

    db = duckdb.connect()
    db.execute("SET enable_progress_bar = false")
    db.execute(f"SET threads = {cores()}")
    return db


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def quoted(text: str) -> str:
    """A string literal of SQL."""
    return "'" + text.replace("'", "''") + "'"


def is_local(path: str) -> bool:
    """Whether DuckDB can open the path itself."""
    return "://" not in path


def parquet(paths: Sequence[str]) -> str:
    """The SQL for the rows of local Parquet files."""
    return f"read_parquet([{', '.join(map(quoted, paths))}])"


@contextlib.contextmanager
def local_copies(files: Mapping[int, Sequence[str]]) -> Iterator[dict[int, list[str]]]:
    """Yields the files by shard, those of other file systems as copies below TMPDIR."""
    with tempfile.TemporaryDirectory(prefix="efficientnet_ns-index-") as folder:

        def local(path: str) -> str:
            if is_local(path):
                return path
            copy = os.path.join(folder, os.path.basename(path))
            tf.io.gfile.copy(path, copy)
            return copy

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            yield {shard: list(pool.map(local, paths)) for shard, paths in files.items()}


class Piece(NamedTuple):
    """Consecutive rows of an index file.

    Attributes:
      worker: of the file.
      start: position of the first row.
      labels, probs: int32 and float32, [N]; without the unreadable images.
      positions: int64 [N], in the prediction file.
      size: rows, with the unreadable ones.
    """

    worker: int
    start: int
    labels: np.ndarray
    probs: np.ndarray
    positions: np.ndarray
    size: int


def pieces(paths: Sequence[str]) -> Iterator[Piece]:
    """Yields the rows of a shard, of one worker after the other, in bounded memory.

    NumPy rather than SQL: counting by `bincount` and choosing by lookup per class take a few
    nanoseconds per row, a GROUP BY into 100,000 groups per shard or a join far more.
    """
    import pyarrow.parquet

    for worker, path in enumerate(paths):
        start = 0
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(
                _ROWS_AT_ONCE, columns=["label", "prob"], use_threads=False
            ):
                labels, probs = (batch.column(k).to_numpy() for k in range(2))
                # An index has a row per prediction, in their order.
                positions = np.arange(start, start + len(labels))
                size = len(labels)
                if size and labels.min() < 0:
                    known = labels >= 0
                    labels, probs, positions = labels[known], probs[known], positions[known]
                yield Piece(worker, start, labels, probs, positions, size)
                start += size


class Scan:
    """Work over the index, one shard at a time and a core for each.

    Args:
      files: local index files by shard, in the order of the workers.
    """

    def __init__(self, files: Mapping[int, Sequence[str]]):
        self.files = dict(files)

    def each(
        self, what: str, work: Callable[[int, Sequence[str]], Result]
    ) -> Iterator[tuple[int, Result]]:
        """Yields (shard, work(shard, index files)) in the order of the shards.

        Only as many results as there are cores wait for the reader.
        """
        waiting: collections.deque = collections.deque()
        with (
            concurrent.futures.ThreadPoolExecutor(cores()) as pool,
            Progress(len(self.files), what, "shards") as progress,
        ):
            for shard, paths in self.files.items():
                waiting.append((shard, pool.submit(work, shard, paths)))
                if len(waiting) > cores():
                    shard, future = waiting.popleft()
                    yield shard, future.result()
                    progress.update(1)
            for shard, future in waiting:
                yield shard, future.result()
                progress.update(1)
