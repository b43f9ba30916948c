"""The index of the predictions, read shard by shard on every core, in bounded memory."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Callable, NamedTuple, TypeVar

import numpy as np
import tensorflow as tf

from efficientnet_ns.cpus import available_cpus
from efficientnet_ns.data import manifests
from efficientnet_ns.progress import Progress

Result = TypeVar("Result")

_ROWS_AT_ONCE = 1 << 19  # Of an index file; bounds memory.
_ROWS_PER_SPAN = 1 << 21  # What is kept of them waits for its turn; bounds memory.
_DATABASE_MEMORY = "2GB"


def database():
    """An empty DuckDB database for reports and joins: up to 2 GB in memory, the rest on disk.

    The disk is that of TMPDIR; files of killed processes are removed.
    """
    import duckdb

    db = duckdb.connect()
    db.execute("SET enable_progress_bar = false")
    db.execute(f"SET threads = {available_cpus()}")
    db.execute(f"SET memory_limit = '{_DATABASE_MEMORY}'")
    # DuckDB makes the folder when it is needed, and removes it.
    db.execute(f"SET temp_directory = {quoted(manifests.scratch_name('duckdb'))}")
    return db


def quoted(text: str) -> str:
    """A string literal of SQL."""
    return "'" + text.replace("'", "''") + "'"


def is_local(path: str) -> bool:
    """Whether DuckDB can open the path itself."""
    return "://" not in path


def parquet(paths: Sequence[str]) -> str:
    """The SQL for the rows of local Parquet files."""
    # DuckDB takes a path for a pattern, and of two folders may read the other one's file.
    literal = (re.sub(r"[*?\[]", r"[\g<0>]", path) for path in paths)
    return f"read_parquet([{', '.join(map(quoted, literal))}])"


@contextlib.contextmanager
def local_copies(paths: Sequence[str]) -> Iterator[dict[str, str]]:
    """Yields path → path on this machine, for other file systems that of a copy below TMPDIR."""
    with contextlib.ExitStack() as stack:
        local = {path: path for path in paths}
        remote = [path for path in paths if not is_local(path)]
        if remote:
            folder = stack.enter_context(manifests.scratch_folder("index"))
            copied = {path: os.path.join(folder, os.path.basename(path)) for path in remote}
            with concurrent.futures.ThreadPoolExecutor(8) as pool:
                # Consumed, so that an error is raised.
                list(pool.map(tf.io.gfile.copy, copied.keys(), copied.values()))
            local.update(copied)
        yield local


class Span(NamedTuple):
    """Consecutive row groups of an index file.

    Attributes:
      worker: of the file.
      path: of the file.
      groups: their numbers.
      start: position of the first row.
      rows: how many.
    """

    worker: int
    path: str
    groups: list[int]
    start: int
    rows: int


def spans(paths: Sequence[str]) -> Iterator[list[Span]]:
    """Cuts the index files of a shard, by worker, into parts of about `_ROWS_PER_SPAN` rows."""
    import pyarrow.parquet

    part: list[Span] = []
    rows = 0
    for worker, path in enumerate(paths):
        metadata = pyarrow.parquet.read_metadata(path)
        start = 0
        for group in range(metadata.num_row_groups):
            size = metadata.row_group(group).num_rows
            if part and rows + size > _ROWS_PER_SPAN:
                yield part
                part, rows = [], 0
            if part and part[-1].worker == worker:
                last = part.pop()
                part.append(last._replace(groups=[*last.groups, group], rows=last.rows + size))
            else:
                part.append(Span(worker, path, [group], start, size))
            start, rows = start + size, rows + size
    # Of an empty shard there is one part, too.
    yield part


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


def pieces(spans: Sequence[Span]) -> Iterator[Piece]:
    """Yields the rows of spans, of one after the other, in bounded memory.

    NumPy rather than SQL: counting by `bincount` and choosing by lookup per class take a few
    nanoseconds per row, a GROUP BY into 100,000 groups per shard or a join far more.
    """
    import pyarrow.parquet

    for span in spans:
        start = span.start
        with pyarrow.parquet.ParquetFile(span.path) as file:
            for batch in file.iter_batches(
                _ROWS_AT_ONCE,
                row_groups=span.groups,
                columns=["label", "prob"],
                use_threads=False,
            ):
                labels, probs = (batch.column(k).to_numpy() for k in range(2))
                # An index has a row per prediction, in their order.
                positions = np.arange(start, start + len(labels))
                size = len(labels)
                if size and labels.min() < 0:
                    known = labels >= 0
                    labels, probs, positions = labels[known], probs[known], positions[known]
                yield Piece(span.worker, start, labels, probs, positions, size)
                start += size


class Scan:
    """Work over the index, a part of a shard at a time and a core for each.

    Args:
      files: local index files by shard, in the order of the workers.
    """

    def __init__(self, files: Mapping[int, Sequence[str]]):
        self.files = dict(files)
        self._parts = [
            (shard, part) for shard, paths in self.files.items() for part in spans(paths)
        ]

    def each(
        self, what: str, work: Callable[[int, Sequence[Span]], Result]
    ) -> Iterator[tuple[int, Result]]:
        """Yields (shard, work(shard, spans)) in the order of the shards, workers and rows.

        A shard has several results when it is large. Only as many results as there are cores wait
        for the reader.
        """
        waiting: collections.deque = collections.deque()
        with (
            concurrent.futures.ThreadPoolExecutor(available_cpus()) as pool,
            Progress(len(self._parts), what, "parts") as progress,
        ):
            for shard, part in self._parts:
                waiting.append((shard, pool.submit(work, shard, part)))
                if len(waiting) > available_cpus():
                    shard, future = waiting.popleft()
                    yield shard, future.result()
                    progress.update(1)
            for shard, future in waiting:
                yield shard, future.result()
                progress.update(1)
