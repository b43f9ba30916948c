"""Imports predictions of any model, as if it had labeled the records as the teacher.

Rows of probabilities or logits become prediction files, indexes and counts in the formats of
`predict`. Rows that match records by position are streamed. Rows with keys are joined with the
records' keys by out-of-core SQL and arranged in temporary files of the size of the predictions.
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from absl import logging

from efficientnet_ns.config import ConfigError, ImportConfig, check, require
from efficientnet_ns.config.cpus import available_cpus
from efficientnet_ns.data import tasks
from efficientnet_ns.files import (
    atomic,
    json_files,
    local_files,
    manifests,
    object_stores,
    parquet_sql,
    shard_names,
    tfexamples,
    tfrecords,
)
from efficientnet_ns.files.errors import DataError
from efficientnet_ns.files.progress import Progress
from efficientnet_ns.imported import record_keys
from efficientnet_ns.imported.prediction_tables import Table, block_rows
from efficientnet_ns.imported.probability_rows import Conversion, target_classes
from efficientnet_ns.pseudo_labels import unlabeled_set
from efficientnet_ns.pseudo_labels.index import IndexWriter, top_one

# Why a record has no prediction.
_FOUND, _MISSING, _OUTSIDE, _DISAGREEING = range(4)
_REASONS = {_MISSING: "missing", _OUTSIDE: "outside", _DISAGREEING: "disagreeing"}


def import_predictions(options: ImportConfig) -> dict[str, Any]:
    """Writes predictions, indexes and counts from the rows of `options.source`.

    Verifies and skips finished shards. Records without a prediction keep their position, with
    all-zero probabilities and label -1 in the index.

    Returns:
      The number of `records`, and of those without a prediction: `missing` from the source,
      `outside` the task's classes, or with `disagreeing` teachers.

    Raises:
      ConfigError: If a flag is missing or invalid.
      DataError: If rows and records do not match, or rows are not probabilities.
      manifests.OutputConflict: If an output was made with other settings.
      OSError: If TMPDIR has too little space for rows with keys.
    """
    check(options)
    require(options, "source", "unlabel_data_dir", "output_dir")
    if options.combine == "agreement" and ";" not in options.source:
        raise ConfigError("--combine=agreement requires several sources, joined with ';'")
    task = _task(options)
    _, sources = unlabeled_set.files(
        options.unlabel_data_dir, options.file_prefix, options.num_shards
    )
    counts = tfrecords.count_all(sources, max_bad_fraction=0)
    key = options.key_column if options.key != "position" else ""
    tables = [Table(source, key) for source in options.source.split(";")]
    stages = _stages(options, task, tables, sources)
    if not all(stage.done() for stage in stages):
        _write_all(options, task, tables, sources, counts, stages)
    object_stores.make_folder(options.output_dir)
    tasks.write_task(
        os.path.join(options.output_dir, tasks.TASK_FILE),
        **{k: v for k, v in dataclasses.asdict(task).items() if v is not None},
    )
    total: Counter[str] = Counter()
    for stage in stages:
        total.update({k: v for k, v in stage.counts().items() if k != "quarantine"})
    return dict(total)


def _task(options: ImportConfig) -> tasks.Task:
    beside = os.path.join(options.unlabel_data_dir, tasks.TASK_FILE)
    if not options.task_name and not tf.io.gfile.exists(beside):
        raise ConfigError(
            f"--task_name is required to define the classes: {beside} does not exist; "
            f"{unlabeled_set.described(options.unlabel_data_dir)}"
        )
    return tasks.get_task(options.task_name or beside)


def _stages(
    options: ImportConfig, task: tasks.Task, tables: Sequence[Table], sources: Sequence[str]
) -> list[manifests.Stage]:
    # Not the --allow_* flags: they decide whether predictions are written, not which.
    rules = ("key", "key_column", "values", "temperature", "min_mass", "combine")
    settings = {name: getattr(options, name) for name in rules}
    # In another order, the same columns mean other labels.
    settings["class_names"] = tasks.class_names(task)
    settings["imported"] = [[manifests.content_hash(p) for p in table.paths] for table in tables]
    if options.class_map:
        settings["class_map"] = manifests.content_hash(options.class_map)
    stages = []
    for shard, path in enumerate(sources):
        outputs = shard_names.prediction_paths(
            shard, len(sources), 0, output_dir=options.output_dir, info_dir=options.info_dir
        )
        own = {
            **settings,
            "input": manifests.fingerprint([path]),
            "num_classes": task.num_classes,
            "total_replicas": 1,
        }
        stages.append(manifests.Stage(f"{outputs[0]}.manifest.json", outputs, own))
    return stages


def _write_all(
    options: ImportConfig,
    task: tasks.Task,
    tables: Sequence[Table],
    sources: Sequence[str],
    counts: Sequence[int],
    stages: Sequence[manifests.Stage],
) -> None:
    names = tasks.class_names(task)
    teachers: list[_InOrder | _ByKey] = []
    with atomic.scratch_folder("import") as scratch:
        keys: list[str] = []
        if options.key != "position":
            needed = 4 * sum(counts) * task.num_classes * len(tables)
            local_files.require_bytes(needed, f"the rows of {options.source} in record order")
            keys = record_keys.write_keys(sources, options.output_dir)
        elif first := record_keys.first_name(sources, counts):
            logging.warning(
                "Rows match records by position: those of %s must be in the order of the records, "
                "which make_records shuffles; the first is %r. Rows in another order get wrong "
                "labels; save the file names as their keys, and set --key=name",
                *(options.source, first),
            )
        for number, table in enumerate(tables):
            targets = target_classes(options.class_map, table, names, task.num_classes)
            convert = Conversion(options, task.num_classes, targets)
            if options.key == "position":
                teachers.append(_InOrder(table, convert, sum(counts)))
            else:
                path = os.path.join(scratch, str(number))
                teachers.append(_ByKey(table, convert, options, keys, counts, path))
        with Progress(sum(counts), "importing predictions", "images") as progress:
            for shard, (stage, count) in enumerate(zip(stages, counts)):
                try:
                    _write_shard(options, teachers, stage, shard, count, shard == len(stages) - 1)
                except DataError as e:
                    if not shard:
                        raise
                    raise DataError(
                        f"{e}. Shards written from earlier rows: {shard}. To import a corrected source, "
                        f"set another --output_dir, or delete the files of this import in {options.output_dir}"
                    ) from e
                progress.update(count)


def _write_shard(
    options: ImportConfig,
    teachers: Sequence[_InOrder | _ByKey],
    stage: manifests.Stage,
    shard: int,
    count: int,
    last: bool,
) -> None:
    if stage.done():
        for teacher in teachers:
            teacher.skip(count)
        return
    without: Counter[int] = Counter()
    rows = block_rows(stage.config["num_classes"])
    with stage.write() as (temporary, summary):
        predictions, indexes, info = (temporary[path] for path in stage.outputs)
        with (
            tf.io.gfile.GFile(predictions, "wb") as f,
            IndexWriter(indexes, shard, 0) as index,
        ):
            f.write(b"")  # Creates the file even if the shard is empty.
            for start in range(0, count, rows):
                size = min(rows, count - start)
                probs, why = _combined([t.read(size) for t in teachers], options.combine)
                f.write(tfexamples.framed_predictions(probs))
                index.add(*top_one(probs))
                without.update(why[why != _FOUND].tolist())
        if last:
            for teacher in teachers:
                # The length of a stream is known only at its end; if rows are left, the set must
                # stay incomplete.
                teacher.finish()  # Before the last shard becomes visible.
        json_files.write_json(info, {"image_num": count})
        missing = {name: without[code] for code, name in _REASONS.items()}
        summary.update(records=count, **missing, quarantine={})


def _combined(
    parts: Sequence[tuple[np.ndarray, np.ndarray]], how: str
) -> tuple[np.ndarray, np.ndarray]:
    """Returns probabilities float32 [N, C], zeros if there are none, and the reason, int8 [N]."""
    if len(parts) == 1:
        return parts[0]
    found = np.stack([why == _FOUND for _, why in parts])
    total = np.sum([probs for probs, _ in parts], 0, dtype=np.float64)
    # Averages only teachers that have a prediction; the rows of others are zeros.
    mean = (total / found.sum(0).clip(1)[:, None]).astype(np.float32)
    # If several reasons apply, the last one in `_REASONS` counts.
    why = np.where(found.any(0), _FOUND, np.max([w for _, w in parts], 0)).astype(np.int8)
    if how == "agreement":
        labels = np.stack([probs.argmax(1) for probs, _ in parts])
        # A teacher without a prediction counts as disagreeing; its zeros would look like class 0.
        differ = (labels != labels[0]).any(0) | ~found.all(0)
        why[differ & (why == _FOUND)] = _DISAGREEING
        mean[why != _FOUND] = 0
    return mean, why


class _InOrder:
    """A teacher whose rows are in the order of the records, shard after shard."""

    def __init__(self, table: Table, convert: Conversion, total: int):
        self._table, self._total, self._done = table, total, 0
        # Before anything is written, if the file format states the number.
        rows = table.rows()
        if rows is not None and rows != total:
            raise self._wrong_number(str(rows))
        self._rows = self._converted(convert)
        # Remaining rows of the current block.
        self._probs: np.ndarray = np.zeros((0, convert.num_classes), np.float32)
        self._why: np.ndarray = np.zeros(0, np.int8)

    def _converted(self, convert: Conversion) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for block in self._table.blocks():
            probs, outside = convert(block)
            yield probs, np.where(outside, _OUTSIDE, _FOUND).astype(np.int8)

    def _wrong_number(self, rows: str) -> DataError:
        return DataError(
            f"{self._table.source} has {rows} rows, but there are {self._total} records: rows match "
            "records by position, so their numbers must be equal. Set --key=name or --key=hash to join "
            "by a key column"
        )

    def read(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the next rows: probabilities float32 [size, C] and reasons, int8 [size]."""
        parts = []
        while size:
            if not len(self._why):
                more = next(self._rows, None)
                if more is None:
                    raise self._wrong_number(f"only {self._done}")
                self._probs, self._why = more
            parts.append((self._probs[:size], self._why[:size]))
            taken = len(parts[-1][1])
            self._probs, self._why = self._probs[taken:], self._why[taken:]
            size, self._done = size - taken, self._done + taken
        if len(parts) == 1:
            return parts[0]
        return np.concatenate([p for p, _ in parts]), np.concatenate([w for _, w in parts])

    def skip(self, size: int) -> None:
        """Skips rows of a finished shard."""
        rows = block_rows(self._probs.shape[1])
        for start in range(0, size, rows):
            self.read(min(rows, size - start))

    def finish(self) -> None:
        """Raises DataError if rows are left."""
        if len(self._why) or next(self._rows, None) is not None:
            raise self._wrong_number(f"more than {self._total}")


# A full join keeps rows without a record and records without a row, which `_check_join` counts.
# The null keys of unreadable records match nothing. One row serves all records with its hash.
_JOIN = """
CREATE VIEW known AS
SELECT {key} AS key, first + position AS place FROM records JOIN firsts USING (shard);
CREATE TABLE joined AS SELECT row, key, place FROM source FULL JOIN known USING (key)
"""


class _ByKey:
    """A teacher whose rows have keys; they are arranged in record order in the file `path`."""

    def __init__(
        self,
        table: Table,
        convert: Conversion,
        options: ImportConfig,
        keys: Sequence[str],
        counts: Sequence[int],
        path: str,
    ):
        total = sum(counts)
        rows, places = _joined(table, options, keys, counts)
        # A new file is all zeros, the values for records without a row; it cannot be empty.
        self._probs = np.memmap(path, np.float32, "w+", shape=(max(total, 1), convert.num_classes))
        self._why = np.full(total, _MISSING, np.int8)
        self._at, first = 0, 0
        for block in table.blocks():
            probs, outside = convert(block)
            part = slice(*np.searchsorted(rows, [first, first + len(probs)]))
            row, place = rows[part] - first, places[part]
            first += len(probs)
            # Each position is written once, because `_joined` rejects keys that occur twice.
            self._probs[place] = probs[row]
            self._why[place] = np.where(outside[row], _OUTSIDE, _FOUND)

    def read(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """See `_InOrder.read`."""
        part = slice(self._at, self._at + size)
        self._at += size
        return np.asarray(self._probs[part]), self._why[part]

    def skip(self, size: int) -> None:
        """See `_InOrder.skip`."""
        self._at += size

    def finish(self) -> None:
        """Does nothing: all rows have been placed."""


def _joined(
    table: Table, options: ImportConfig, keys: Sequence[str], counts: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the numbers of matching rows, in order, and of their records, both int64.

    Raises:
      DataError: If a key is blank or occurs twice, or a row or record has no match although the
        options require one.
    """
    import pyarrow
    import pyarrow.compute

    db = parquet_sql.connect(available_cpus(), records=keys)
    firsts = np.cumsum([0, *counts])[:-1]
    db.register("firsts", pyarrow.table({"shard": np.arange(len(counts)), "first": firsts}))
    if options.key == "name":
        _check_names(db)
    db.execute("CREATE TABLE source (row BIGINT, key VARCHAR)")
    first = 0
    for block in table.blocks():
        blank = pyarrow.compute.utf8_trim_whitespace(pyarrow.compute.fill_null(block.keys, ""))
        if (row := pyarrow.compute.index(blank, "").as_py()) >= 0:
            raise DataError(f"{block.row(row)} has no key in {options.key_column!r}")
        # Registered batch by batch: DuckDB would replace errors inside a stream by its own.
        keys_of = pyarrow.table(
            {"row": np.arange(first, first + len(block.values)), "key": block.keys}
        )
        db.register("batch", keys_of)
        db.execute("INSERT INTO source SELECT * FROM batch")
        first += len(block.values)
    # Before the join, which would multiply them by the records of the same content.
    twice = "SELECT key FROM source GROUP BY key HAVING count(*) > 1 ORDER BY key"
    if count := _number(db, twice):
        raise DataError(
            f"{table.source}: {count} keys occur twice, for example {_examples(db, twice)}"
        )
    db.execute(_JOIN.format(key=options.key))
    _check_join(db, table, options)
    # The join does not preserve the order.
    found = "SELECT row, place FROM joined WHERE row IS NOT NULL AND place IS NOT NULL ORDER BY row"
    columns = db.execute(found).fetchnumpy()
    return np.asarray(columns["row"]), np.asarray(columns["place"])


def _check_names(db) -> None:
    """Raises DataError unless all images have different names; unreadable records have none."""
    ((nameless, copies, total),) = db.execute(
        "SELECT count(hash) FILTER (name IS NULL), count(name) - count(DISTINCT name), count(*) "
        "FROM records"
    ).fetchall()
    if nameless:
        raise DataError(
            f"{nameless} of {total} records have no {tfexamples.FILE_NAME!r}, which --key=name "
            "requires: recreate them with make_records, or use --key=hash or --key=position"
        )
    if copies:
        twice = "SELECT name FROM records GROUP BY 1 HAVING count(name) > 1 ORDER BY 1"
        raise DataError(
            f"{copies} of {total} records have the name of an earlier record, for example "
            f"{_examples(db, twice)}: a row would match several records. Remove the copies, or use "
            "another --key"
        )


def _check_join(db, table: Table, options: ImportConfig) -> None:
    source, folder = table.source, options.unlabel_data_dir
    unknown = "SELECT key FROM joined WHERE place IS NULL AND row IS NOT NULL ORDER BY row"
    if (count := _number(db, unknown)) and not options.allow_unknown:
        known = _examples(db, "SELECT key FROM known WHERE key IS NOT NULL ORDER BY place")
        raise DataError(
            f"{source}: {count} keys match no record in {folder}, for example "
            f"{_examples(db, unknown)}, but the records have {known}. Set --allow_unknown if the "
            "table contains more images than the records"
        )
    missing = (
        "SELECT coalesce(key, 'unreadable record ' || place) FROM joined WHERE row IS NULL "
        "ORDER BY place"
    )
    if count := _number(db, missing):
        text = f"{source}: {count} records of {folder} have no row, for example {_examples(db, missing)}"
        if not options.allow_missing:
            raise DataError(f"{text}. Set --allow_missing to leave them unlabeled")
        logging.warning("%s", text)


def _number(db, query: str) -> int:
    return db.execute(f"SELECT count(*) FROM ({query})").fetchall()[0][0]


def _examples(db, query: str) -> str:
    rows = db.execute(f"{query} LIMIT 3").fetchall()
    return ", ".join(repr(key) for (key,) in rows)
