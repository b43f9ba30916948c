"""The index of the predictions, read by DuckDB shard by shard on every core, in bounded memory."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Callable, TypeVar

import tensorflow as tf

from efficientnet_ns.config import ConfigError
from efficientnet_ns.progress import Progress

Result = TypeVar("Result")

# DuckDB takes 80 % of the memory of the machine, or of its container, unless told otherwise.
_SHARE_OF_DEFAULT = 0.75


def database(memory_limit: str = ""):
    """An empty DuckDB database in memory, which spills to files below TMPDIR.

    Args:
      memory_limit: such as `8GB`; default: 60 % of the memory of the machine.

    Raises:
      ConfigError: not an amount of memory.
    """
    import duckdb

    db = duckdb.connect()
    db.execute("SET enable_progress_bar = false")
    if not memory_limit:
        (default,) = db.execute("SELECT current_setting('memory_limit')").fetchone()
        amount, unit = default.split()
        memory_limit = f"{_SHARE_OF_DEFAULT * float(amount)}{unit}"
    try:
        db.execute(f"SET memory_limit = {quoted(memory_limit)}")
    except duckdb.Error as e:
        raise ConfigError(f"--memory_limit={memory_limit}: expected such as 8GB ({e})") from e
    spill = os.path.join(tempfile.gettempdir(), f"efficientnet_ns-spill-{os.getpid()}")
    db.execute(f"SET temp_directory = {quoted(spill)}")
    db.execute(f"SET threads = {cores()}")
    return db


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def quoted(text: str) -> str:
    """A string literal of SQL."""
    return "'" + text.replace("'", "''") + "'"


def double(value: float) -> str:
    """A float64 of SQL; a plain literal would be a decimal, whose conversion is not exact."""
    return f"'{float(value)!r}'::DOUBLE"


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


class Scan:
    """Queries over the index, one shard at a time and a core for each.

    Args:
      db: of `database`; its tables can be used in the queries.
      files: local index files by shard.
    """

    def __init__(self, db, files: Mapping[int, Sequence[str]]):
        self.db, self.files = db, dict(files)

    def each(
        self, what: str, work: Callable[[object, int, str], Result]
    ) -> Iterator[tuple[int, Result]]:
        """Yields (shard, work(cursor, shard, SQL of the shard's rows)) in the order of the shards.

        Only as many results as there are cores wait for the reader.
        """
        waiting: collections.deque = collections.deque()
        with (
            concurrent.futures.ThreadPoolExecutor(cores()) as pool,
            Progress(len(self.files), what, "shards") as progress,
        ):
            for shard, paths in self.files.items():
                future = pool.submit(work, self.db.cursor(), shard, parquet(paths))
                waiting.append((shard, future))
                if len(waiting) > cores():
                    shard, future = waiting.popleft()
                    yield shard, future.result()
                    progress.update(1)
            for shard, future in waiting:
                yield shard, future.result()
                progress.update(1)
