"""The prediction files of a run and their columnar index, which is all that selection reads.

The index has one Parquet file per prediction file, with a row per prediction in the same order:
`shard` int32, `worker` int32, `position` int64 (in the prediction file), `label` int32 (-1 if
unreadable), `prob` float32 (top-1 probability), and, from a teacher of this package, the image's
`fingerprints.COLUMNS`, uint64: `hash` of the content and the words `f0`–`f3` of its fingerprint. A
selection therefore never reads the probabilities of all classes. Readers scan row groups on all
cores in bounded memory.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import itertools
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
import tensorflow as tf

from efficientnet_ns.config import ConfigError, SelectConfig
from efficientnet_ns.config.cpus import available_cpus
from efficientnet_ns.config.processes import run_each
from efficientnet_ns.data import fingerprints
from efficientnet_ns.files import (
    exclusions,
    local_files,
    manifests,
    object_stores,
    reviews,
    shard_names,
    tfexamples,
    tfrecords,
)
from efficientnet_ns.files.atomic import atomic_path
from efficientnet_ns.files.errors import DataError
from efficientnet_ns.files.progress import Progress

if TYPE_CHECKING:
    import pyarrow

Result = TypeVar("Result")

UNREADABLE_LABEL = -1
# Rows per row group, independent of the calls to `add`, so that equal rows make equal files.
_GROUP = 1 << 16
# Starting a process takes seconds, which pays off only with this many bytes to read.
_BYTES_PER_PROCESS = 64 << 20
_PREDICTIONS_AT_ONCE = 1024
_ROWS_AT_ONCE = 1 << 19  # Rows per RowChunk; bounds memory.
_ROWS_PER_PART = 1 << 21  # Rows per pending result; bounds memory.


def task_number(config: SelectConfig) -> int:
    """Returns the task index used in file names."""
    return max(config.task, 0)


def input_path(config: SelectConfig, shard: int) -> str:
    """Returns the path of the unlabeled records of a shard."""
    name = shard_names.shard_name(config.file_prefix, shard, config.num_shards)
    return os.path.join(config.unlabel_data_dir, name)


def prediction_path(config: SelectConfig, shard: int, worker: int) -> str:
    """Returns the path of a worker's predictions for a shard."""
    name = shard_names.prediction_name(shard, config.num_shards, worker)
    return os.path.join(config.prediction_dir, name)


def shards(config: SelectConfig) -> list[int]:
    """Returns the shards in use: all, the first `only_use_num_shards`, or one with `debug`.

    Raises:
      ConfigError: If a number is out of range.
    """
    used = config.num_shards if config.only_use_num_shards == -1 else config.only_use_num_shards
    if not 1 <= used <= config.num_shards:
        raise ConfigError(
            f"--only_use_num_shards={used} must be between 1 and --num_shards={config.num_shards}"
        )
    first = config.shard_id or 0
    if first >= used:
        raise ConfigError(f"--shard_id={first} is not below the {used} shards in use")
    return [first] if config.debug == 1 else list(range(used))


def count_workers(config: SelectConfig) -> int:
    """Returns the number of workers that predicted each shard.

    Raises:
      DataError: If a prediction file is missing; names the first one.
    """
    workers = config.total_label_replicas
    manifest = prediction_path(config, 0, 0) + ".manifest.json"
    found = _predicted(config)
    # Our predictions store the number; those of the original code have no manifests.
    if os.path.basename(manifest) in found:
        predicted_by = manifests.read_manifest(manifest)["config"].get("total_replicas", 1)
        if workers not in (-1, predicted_by):
            raise DataError(
                f"--total_label_replicas={workers}, but according to {manifest} {predicted_by} "
                "workers shared a shard"
            )
        workers = predicted_by
    if workers < 1:
        # From the file names; the loop below reports gaps as missing.
        name = re.compile(rf"train-info-\d{{5}}-of-{config.num_shards:05d}-(\d{{5}})")
        numbers = [int(match[1]) for match in map(name.fullmatch, found) if match]
        workers = 1 + max(numbers, default=0)
    for shard in shards(config):
        for worker in range(workers):
            path = prediction_path(config, shard, worker)
            if os.path.basename(path) not in found:
                raise DataError(f"prediction {path} is missing: predict that shard first")
    return workers


def _predicted(config: SelectConfig) -> set[str]:
    """Lists the names in prediction_dir once, because a request per file is slow on gs://."""
    found = set(object_stores.names(config.prediction_dir))
    if not found and not tf.io.gfile.isdir(config.prediction_dir):
        raise DataError(f"--prediction_dir={config.prediction_dir} is not a folder")
    return found


def index_files(config: SelectConfig) -> dict[int, list[str]]:
    """Returns the index files by shard; builds missing ones from the records."""
    workers, found = count_workers(config), _predicted(config)
    files: dict[int, list[str]] = {}
    missing = []
    for shard in shards(config):
        # --debug=1 reads only one worker of one shard.
        for worker in range(1 if config.debug == 1 else workers):
            name = shard_names.index_name(shard, config.num_shards, worker)
            path = os.path.join(config.prediction_dir, name)
            files.setdefault(shard, []).append(path)
            if name not in found:
                missing.append((prediction_path(config, shard, worker), path, shard, worker))
    size = sum(filter(None, object_stores.sizes([prediction for prediction, *_ in missing])))
    processes = min(len(missing), available_cpus(), size // _BYTES_PER_PROCESS)
    with Progress(len(missing), "building indexes of predictions", "files") as progress:
        for _ in run_each(index_from_predictions, missing, processes):
            progress.update(1)
    return files


_NAMES = ("shard", "worker", "position", "label", "prob")
COLUMNS = dict(zip(_NAMES, (np.int32, np.int32, np.int64, np.int32, np.float32)))


def schema(columns: Mapping[str, type]) -> pyarrow.Schema:
    """Returns the schema of a Parquet file with these columns, {name: NumPy type}."""
    import pyarrow

    return pyarrow.schema([(n, pyarrow.from_numpy_dtype(kind)) for n, kind in columns.items()])


def top_one(probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns labels int32 [N] and top-1 probabilities float32 [N] of probabilities [N, C].

    A row without a positive probability represents an unreadable image, with label -1.
    """
    top = probabilities.max(1, initial=0)
    labels = np.where(top > 0, probabilities.argmax(1), UNREADABLE_LABEL)
    return labels.astype(np.int32), top.astype(np.float32)


class IndexWriter(contextlib.AbstractContextManager):
    """Writes the index of one prediction file incrementally, in bounded memory.

    Args:
      path: path of the index.
      shard, worker: shard and worker of the prediction file.
      marked: whether rows have `fingerprints.marks`.
    """

    def __init__(self, path: str, shard: int, worker: int, *, marked: bool = False):
        import pyarrow.parquet

        self._shard, self._worker, self._rows = shard, worker, 0
        self._labels, self._probs = np.zeros(0, np.int32), np.zeros(0, np.float32)
        self._marks = np.zeros([0, len(fingerprints.COLUMNS) if marked else 0], np.uint64)
        self._columns = {
            **COLUMNS,
            **(dict.fromkeys(fingerprints.COLUMNS, np.uint64) if marked else {}),
        }
        self._file = local_files.FileSink(path)
        self._writer = pyarrow.parquet.ParquetWriter(self._file, schema(self._columns))

    def add(
        self, labels: np.ndarray, top_probs: np.ndarray, marks: np.ndarray | None = None
    ) -> None:
        """Appends rows: labels int32 [N], top-1 probabilities float32 [N], marks uint64 [N, 5]."""
        if marks is not None and marks.size:
            self._marks = np.concatenate([self._marks, marks])
        self._labels = np.concatenate([self._labels, np.asarray(labels, np.int32)])
        self._probs = np.concatenate([self._probs, np.asarray(top_probs, np.float32)])
        while len(self._labels) >= _GROUP:
            self._write(_GROUP)

    def _write(self, n: int) -> None:
        import pyarrow

        position = np.arange(self._rows, self._rows + n, dtype=np.int64)
        places = (np.full(n, self._shard, np.int32), np.full(n, self._worker, np.int32), position)
        # Without marks, the transposed array [0, N] adds no column.
        columns = (*places, self._labels[:n], self._probs[:n], *self._marks[:n].T)
        self._writer.write_table(pyarrow.table(dict(zip(self._columns, columns))))
        self._labels, self._probs, self._marks = self._labels[n:], self._probs[n:], self._marks[n:]
        self._rows += n

    def close(self) -> None:
        """Writes the remaining rows and completes the file."""
        if len(self._labels):
            self._write(len(self._labels))
        self._writer.close()
        self._file.close()

    def __exit__(self, *unused) -> None:
        self.close()


def index_from_predictions(prediction_path: str, index_path: str, shard: int, worker: int) -> None:
    """Builds the index of a prediction file without one, such as a file of the original code.

    Raises:
      DataError: If a prediction cannot be read.
    """
    with (
        atomic_path(index_path) as temporary,
        IndexWriter(temporary, shard, worker) as writer,
    ):
        for probs in read_predictions(prediction_path):
            writer.add(*top_one(probs))


def read_predictions(path: str, num_classes: int = 0) -> Iterator[np.ndarray]:
    """Yields the probabilities of a prediction file in order, in arrays float32 [N, C].

    Args:
      num_classes: C; 0 for that of the first prediction.

    Raises:
      DataError: If a prediction cannot be read or has another number of classes.
    """
    records = tfrecords.read(path)
    while some := list(itertools.islice(records, _PREDICTIONS_AT_ONCE)):
        rows = []
        for record in some:
            rows.append(_prediction(record, path, num_classes))
            num_classes = len(rows[0])
        yield np.stack(rows)


def _prediction(record: tfrecords.Record, path: str, num_classes: int) -> np.ndarray:
    """Returns a record's probabilities, float32 [C]; C may be any number if `num_classes` is 0."""
    problem = record.problem
    if record.payload is not None:
        probs = tfexamples.probabilities(record.payload)
        if len(probs) and num_classes in (0, len(probs)):
            return probs
        problem = f"it has {len(probs)} probabilities, not {num_classes or 'one per class'}"
    raise DataError(f"{path}, record {record.position}: {problem}; predict it again")


def read_marks(index_path: str) -> np.ndarray | None:
    """Reads the `fingerprints.COLUMNS` of an index, uint64 [N, 5]; None if it has none."""
    import pyarrow.parquet

    with local_files.local_copies([index_path]) as local:
        with pyarrow.parquet.ParquetFile(local[index_path]) as file:
            if not set(fingerprints.COLUMNS) <= set(file.schema_arrow.names):
                return None
            table = file.read(columns=list(fingerprints.COLUMNS))
    return np.stack([table[name].to_numpy() for name in fingerprints.COLUMNS], 1)


class RowGroup(NamedTuple):
    """A row group of a worker's index file; it begins at row `start`."""

    worker: int
    path: str
    number: int
    start: int


class RowChunk(NamedTuple):
    """Consecutive rows of an index file.

    Attributes:
      shard, worker: shard and worker of the file.
      start: position of the first row.
      size: number of rows, including unreadable images.
      labels, probs: int32 and float32 [N], without unreadable and excluded images.
      positions: int64 [N], positions in the prediction file.
      decided: bool [N], whether a person assigned the label.
    """

    shard: int
    worker: int
    start: int
    size: int
    labels: np.ndarray
    probs: np.ndarray
    positions: np.ndarray
    decided: np.ndarray


def _parts(paths: Sequence[str]) -> Iterator[list[RowGroup]]:
    """Splits a shard's index files, one per worker, into parts of about `_ROWS_PER_PART` rows."""
    import pyarrow.parquet

    part: list[RowGroup] = []
    rows = 0
    for worker, path in enumerate(paths):
        # Reads only the footer.
        metadata = pyarrow.parquet.read_metadata(path)
        start = 0
        for group in range(metadata.num_row_groups):
            size = metadata.row_group(group).num_rows
            if part and rows + size > _ROWS_PER_PART:
                yield part
                part, rows = [], 0
            part.append(RowGroup(worker, path, group, start))
            start, rows = start + size, rows + size
    # An empty shard also has one part, so that every shard has a result.
    yield part


# Positions, int64, ascending, and their new labels, int32: -1 excludes an image; a person assigned
# the others.
Decisions = tuple[np.ndarray, np.ndarray]
Changes = Mapping[tuple[int, int], Decisions]  # By shard and worker.


def decisions(config: SelectConfig) -> dict[int, Decisions]:
    """Returns the decisions in `config.exclude` and `config.reviewed`, by shard and record.

    Those of a person take precedence.

    Raises:
      DataError: See `exclusions.of_files` and `reviews.of_files`.
    """
    used = shards(config)
    files = [input_path(config, shard) for shard in used]
    excluded = exclusions.of_files(config.exclude, files, "unlabeled") if config.exclude else {}
    reviewed = reviews.of_files(config.reviewed, files, config.num_label_classes)
    nothing = np.zeros(0, np.int64), np.zeros(0, np.int32)
    return {
        used[i]: _overlaid(reviewed.get(i, nothing), excluded.get(i, nothing[0]))
        for i in sorted({*excluded, *reviewed})
    }


def _overlaid(reviewed: Decisions, excluded: np.ndarray) -> Decisions:
    """Returns the decisions of a person, and the label -1 for the other excluded records."""
    # Of equal records, `first` is that of the person.
    records, first = np.unique(np.concatenate([reviewed[0], excluded]), return_index=True)
    left_out = np.full(len(excluded), UNREADABLE_LABEL, np.int32)
    return records, np.concatenate([reviewed[1], left_out])[first]


def changes(config: SelectConfig) -> Changes:
    """Returns the `decisions` by shard and worker; a person's decision has probability 1."""
    if not (config.exclude or config.reviewed):
        return {}
    workers, found = count_workers(config), {}
    for shard, (records, labels) in decisions(config).items():
        for worker in range(workers):
            # Worker w predicted records w, w + workers, w + 2 * workers …, in this order.
            own = records % workers == worker
            found[shard, worker] = records[own] // workers, labels[own]
    return found


def _chunks(shard: int, part: Sequence[RowGroup], changes: Changes) -> Iterator[RowChunk]:
    import pyarrow.parquet

    for (worker, path), same_file in itertools.groupby(part, key=lambda group: group[:2]):
        groups = list(same_file)
        start = groups[0].start
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(
                _ROWS_AT_ONCE,
                [g.number for g in groups],
                columns=["label", "prob"],
                # Parts already run on all cores.
                use_threads=False,
            ):
                labels, probs = (batch.column(k).to_numpy() for k in range(2))
                size = len(labels)
                positions, decided = np.arange(start, start + size), np.zeros(size, bool)
                columns = (labels, probs, positions, decided)
                chunk = RowChunk(shard, worker, start, size, *columns)
                if changed := changes.get((shard, worker)):
                    chunk = _changed(chunk, *changed)
                # Unreadable or excluded by a decision.
                if size and chunk.labels.min() < 0:
                    known = chunk.labels >= 0
                    chunk = RowChunk(*chunk[:4], *(column[known] for column in chunk[4:]))
                yield chunk
                start += size


def _changed(chunk: RowChunk, places: np.ndarray, decided: np.ndarray) -> RowChunk:
    """Applies decisions to the rows of a chunk."""
    first, last = np.searchsorted(places, [chunk.start, chunk.start + chunk.size])
    rows = places[first:last] - chunk.start
    # Arrow's arrays are read-only.
    chunk = chunk._replace(labels=chunk.labels.copy(), probs=chunk.probs.copy())
    chunk.labels[rows], chunk.probs[rows], chunk.decided[rows] = decided[first:last], 1, True
    return chunk


class IndexScan:
    """Scans the index, with the parts of shards distributed over all cores.

    Args:
      files: local index files by shard, in the order of the workers.
      changes: labels that replace those in the index.
    """

    def __init__(self, files: Mapping[int, Sequence[str]], changes: Changes | None = None):
        self.files, self._changes = dict(files), changes or {}
        self._parts = [(s, part) for s, paths in self.files.items() for part in _parts(paths)]

    def _run(self, work: Callable[[Iterator[RowChunk]], Result], shard: int, part) -> Result:
        return work(_chunks(shard, part, self._changes))

    def each(
        self, what: str, work: Callable[[Iterator[RowChunk]], Result]
    ) -> Iterator[tuple[int, Result]]:
        """Yields (shard, work(chunks of a part)) in the order of shards, workers and rows.

        A large shard has several results. At most one result per core is pending.

        Args:
          what: title of the progress bar.
          work: function that runs in several threads concurrently.
        """
        waiting: collections.deque = collections.deque()
        with (
            concurrent.futures.ThreadPoolExecutor(available_cpus()) as pool,
            Progress(len(self._parts), what, "parts") as progress,
        ):
            for shard, part in self._parts:
                waiting.append((shard, pool.submit(self._run, work, shard, part)))
                # Results are in order, so a fast part may wait for an earlier slow one.
                if len(waiting) > available_cpus():
                    shard, future = waiting.popleft()
                    yield shard, future.result()
                    progress.update(1)
            for shard, future in waiting:
                yield shard, future.result()
                progress.update(1)
