"""What a labeling run did: SQL over the indexes and the selection, and its quarantine lists.

No result grows with the number of images, and rejected images are counted as all but the kept ones,
so that sets of any size are summed up without joining them. Comparisons with true labels and with
an earlier round do join, out of core.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import re
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Union

import numpy as np
import tensorflow as tf

from efficientnet_ns.config import SelectConfig
from efficientnet_ns.config.cpus import available_cpus
from efficientnet_ns.files import atomic, json_files, local_files, tfexamples, tfrecords
from efficientnet_ns.files.errors import DataError
from efficientnet_ns.pseudo_labels import index
from efficientnet_ns.pseudo_labels.selection import SELECTION

if TYPE_CHECKING:
    import pyarrow

RECORDS = "records"
# Labels per shard and record; a CSV or Parquet file; or RECORDS.
Truth = Union[Sequence[Sequence[int]], str]
_NO_LABEL = -2  # Below -1, which means that the image is of no class.
_DATABASE_MEMORY = "2GB"

_ORDERS = {"most": "prob DESC, shard, record", "least": "prob, shard, record"}

# Images are told apart by shard and record, which two rounds and the truth have in common, whatever
# the number of workers.
_IMAGES = """
CREATE VIEW {} AS SELECT *, position * {} + worker AS record FROM {} WHERE label >= 0
"""
_JUDGED = """
CREATE VIEW judged AS
SELECT truth.label AS truth, images.label, images.prob, copies IS NOT NULL AS kept
FROM images JOIN truth USING (shard, record)
LEFT JOIN (SELECT shard, record, copies FROM chosen) USING (shard, record)
"""
_COMPARED = """
CREATE VIEW compared AS
SELECT images.label, earlier.label AS before, images.prob, copies IS NOT NULL AS kept
FROM images JOIN earlier USING (shard, record)
LEFT JOIN (SELECT shard, record, copies FROM chosen) USING (shard, record)
"""


class Picture(NamedTuple):
    """An image to show, by its place in the unlabeled set."""

    shard: int
    record: int
    label: int
    prob: float


class Outcome:
    """The predictions and the selection of a labeling run.

    Args:
      config: of the selection.
      truth: columns `shard`, `record`, `label` (0-based, -1 for images of no class) of the images
        whose class is known.
      previous_dir: folder of the predictions of an earlier round for the same images.

    Raises:
      DataError: there is no selection, or predictions are missing.
    """

    def __init__(
        self, config: SelectConfig, *, truth: pyarrow.Table | None = None, previous_dir: str = ""
    ):
        self.config = config
        selection = os.path.join(config.output_dir, SELECTION)
        if not tf.io.gfile.exists(selection):
            raise DataError(f"{selection} is missing: run the selection first")
        tables = {"predictions": _indexes(config), "selection": [selection]}
        views = {"images": ("predictions", config), "chosen": ("selection", config)}
        if previous_dir:
            earlier = dataclasses.replace(
                config, prediction_dir=previous_dir, total_label_replicas=-1
            )
            tables["previous"] = _indexes(earlier)
            views["earlier"] = ("previous", earlier)
        self._db = connect(**tables)
        for view, (table, predicted) in views.items():
            self._db.execute(_IMAGES.format(view, index.count_workers(predicted), table))
        if truth is not None:
            self._db.register("truth", truth)
            self._db.execute(_JUDGED)
        if previous_dir:
            self._db.execute(_COMPARED)

    def _query(self, query: str, *values: object) -> list[tuple]:
        return self._db.execute(query, list(values)).fetchall()

    def totals(self) -> dict[str, int]:
        """Numbers of `images`, `unreadable`, `confident` (at or above the threshold), `kept`,
        `records` (kept with copies).
        """
        found = self._db.execute(
            "SELECT * FROM (SELECT count(*) AS images, count_if(label < 0) AS unreadable, "
            "count_if(label >= 0 AND prob::DOUBLE >= $1) AS confident FROM predictions), "
            "(SELECT count(*) AS kept, coalesce(sum(copies), 0)::BIGINT AS records FROM chosen)",
            [self.config.min_threshold],
        ).fetchnumpy()
        return {name: int(value[0]) for name, value in found.items()}

    def confidence(self, bins: int) -> dict[str, np.ndarray]:
        """Columns `prob` float64, `kept` bool, `images` int: a row per bin, side of the threshold
        and kept or not; `prob` is one of that bin and side.
        """
        counted = (
            f"(SELECT least(floor(prob::DOUBLE * {int(bins)}), {int(bins) - 1}) AS bin, "
            f"prob::DOUBLE >= {float(self.config.min_threshold)!r}::DOUBLE AS confident, "
            "max(prob)::DOUBLE AS prob, count(*) AS images FROM {} GROUP BY ALL)"
        )
        return self._columns(
            "SELECT images.prob, kept, CASE WHEN kept THEN coalesce(chosen.images, 0) "
            "ELSE images.images - coalesce(chosen.images, 0) END AS images "
            f"FROM {counted.format('images')} AS images "
            f"LEFT JOIN {counted.format('chosen')} AS chosen USING (bin, confident) "
            "CROSS JOIN (VALUES (true), (false)) AS sides(kept)"
        )

    def classes(self) -> dict[str, np.ndarray]:
        """Columns of one entry per class: `predicted`, `confident`, `kept`, `records` int [C],
        `lowest` kept probability float [C] and `quantiles` (10, 50, 90 %) float [C, 3], NaN if
        there is none.
        """
        count = self.config.num_label_classes
        columns = {
            name: np.zeros(count, np.int64)
            for name in ("predicted", "confident", "kept", "records")
        }
        columns["lowest"] = np.full(count, np.nan)
        columns["quantiles"] = np.full((count, 3), np.nan)
        for label, *values in self._query(
            "SELECT label, count(*), count_if(prob::DOUBLE >= $1), "
            "approx_quantile(prob, [0.1, 0.5, 0.9]) FROM images GROUP BY ALL",
            self.config.min_threshold,
        ):
            for name, value in zip(("predicted", "confident", "quantiles"), values):
                columns[name][label] = value
        for label, *values in self._query(
            "SELECT label, count(*), sum(copies)::BIGINT, min(prob) FROM chosen GROUP BY ALL"
        ):
            for name, value in zip(("kept", "records", "lowest"), values):
                columns[name][label] = value
        return columns

    def pictures(
        self,
        *,
        kept: bool,
        order: str,
        limit: int,
        shards: int,
        labels: Sequence[int] | None = None,
    ) -> list[Picture]:
        """Images by their confidence, kept or rejected ones.

        Args:
          order: "most" or "least" confident first.
          limit: how many: in all, or of each class where `labels` are given.
          shards: how many of the first shards to take them from.
          labels: classes to take them from.
        """
        # The limit inside as well: DuckDB does not pass it on to the other side of an anti join.
        rejected = """
            images ANTI JOIN (SELECT shard, record FROM chosen WHERE shard < $1)
            USING (shard, record)
            """
        source = "chosen" if kept else rejected
        among, partition, values = "", "", [shards, limit]
        if labels is not None:
            among, partition = "AND list_contains($3::INTEGER[], label)", "PARTITION BY label"
            values.append(list(labels))
        rows = self._query(
            f"""
            SELECT shard, record, label, prob FROM {source} WHERE shard < $1 {among}
            QUALIFY row_number() OVER ({partition} ORDER BY {_ORDERS[order]}) <= $2
            ORDER BY {_ORDERS[order]}
            """,
            *values,
        )
        return [Picture(*row) for row in rows]

    def confusion(self) -> dict[str, np.ndarray]:
        """Columns `truth`, `label`, `images` of the kept images, a row per pair that occurs."""
        return self._columns(
            "SELECT truth, label, count(*) AS images FROM judged WHERE kept GROUP BY ALL"
        )

    def accuracy(self, bins: int) -> dict[str, np.ndarray]:
        """Columns `known`, `correct`, `kept`, `prob` (their mean) and `images`: a row per kind and
        bin (lower, upper] of confidence.
        """
        return self._columns(
            "SELECT truth >= 0 AS known, truth = label AS correct, kept, "
            f"greatest(ceil(prob::DOUBLE * {int(bins)}), 1)::INTEGER AS bin, "
            "avg(prob::DOUBLE) AS prob, count(*) AS images FROM judged GROUP BY ALL"
        )

    def agreement(self, bins: int) -> dict[str, np.ndarray]:
        """Columns `bin` (0 … bins-1, of the later confidence), `kept`, `same`, `images`: how many
        labels are those of the earlier round.
        """
        return self._columns(
            f"SELECT least(floor(prob::DOUBLE * {int(bins)}), {int(bins) - 1})::INTEGER AS bin, "
            "kept, count_if(label = before)::BIGINT AS same, count(*) AS images FROM compared GROUP BY ALL"
        )

    def changes(self, limit: int) -> list[tuple[int, int, int]]:
        """The most frequent (earlier label, later label, images) that differ."""
        return self._query(
            "SELECT before, label, count(*) AS images FROM compared WHERE before != label "
            f"GROUP BY ALL ORDER BY images DESC, before, label LIMIT {int(limit)}"
        )

    def _columns(self, query: str) -> dict[str, np.ndarray]:
        return self._db.execute(f"{query} ORDER BY ALL").fetchnumpy()


def _indexes(config: SelectConfig) -> list[str]:
    return [path for paths in index.index_files(config).values() for path in paths]


# --- The database ---------------------------------------------------------------------------------


def database():
    """An empty DuckDB database: up to 2 GB in memory, the rest on disk below TMPDIR.

    Files of killed processes are removed.
    """
    import duckdb

    db = duckdb.connect()
    db.execute("SET enable_progress_bar = false")
    db.execute(f"SET threads = {available_cpus()}")
    db.execute(f"SET memory_limit = '{_DATABASE_MEMORY}'")
    # DuckDB makes the folder when it is needed, and removes it.
    db.execute(f"SET temp_directory = {_quoted(atomic.scratch_name('duckdb'))}")
    return db


def _quoted(text: str) -> str:
    """A string literal of SQL."""
    return "'" + text.replace("'", "''") + "'"


def connect(**tables: Sequence[str]):
    """A DuckDB connection with a view per keyword, over the Parquet files given for it.

    Those of other file systems are copied below TMPDIR, where they stay as long as the connection.
    """
    db = database()
    copies = contextlib.ExitStack()
    weakref.finalize(db, copies.close)
    for name, paths in tables.items():
        local = copies.enter_context(local_files.local_copies(paths))
        # DuckDB takes a path for a pattern, and of two folders may read the other one's file.
        literal = (re.sub(r"[*?\[]", r"[\g<0>]", path) for path in local.values())
        files = ", ".join(map(_quoted, literal))
        db.execute(f"CREATE VIEW {name} AS SELECT * FROM read_parquet([{files}])")
    return db


# --- True labels ----------------------------------------------------------------------------------


def read_truth(config: SelectConfig, truth: Truth) -> pyarrow.Table:
    """Columns `shard`, `record`, `label` of the images whose class is known.

    Args:
      truth: 0-based labels per shard and record, -1 for images of no class; a CSV or Parquet file
        with these columns; or RECORDS: the unlabeled records' own `image/class/label`.

    Raises:
      DataError: the file lacks a column, or no record has a label.
    """
    import pyarrow
    import pyarrow.csv
    import pyarrow.parquet

    if truth == RECORDS:
        truth = [_labels(index.input_path(config, s)) for s in index.shards(config)]
        if not any((labels > _NO_LABEL).any() for labels in truth):
            raise DataError(
                f"no record of {config.input_dir} has {tfexamples.LABEL_ONE_BASED!r}: "
                "there is no truth to compare with"
            )
    if isinstance(truth, str):
        with tf.io.gfile.GFile(truth, "rb") as f:
            source = pyarrow.BufferReader(f.read())
        csv = truth.endswith(".csv")
        table = pyarrow.csv.read_csv(source) if csv else pyarrow.parquet.read_table(source)
        if missing := {"shard", "record", "label"} - set(table.column_names):
            raise DataError(f"{truth} has no column {min(missing)!r}")
        return table
    columns = {
        "shard": np.repeat(np.arange(len(truth), dtype=np.int32), [len(part) for part in truth]),
        "record": np.concatenate([np.arange(len(part)) for part in truth]),
        "label": np.concatenate([np.asarray(part, np.int32) for part in truth]),
    }
    return pyarrow.table(columns).filter(columns["label"] > _NO_LABEL)


def _labels(path: str) -> np.ndarray:
    """The labels a shard's records carry, int32 [N]."""
    labels = []
    with tfrecords.Scanner(path) as scanner:
        while (record := scanner.take()) is not None:
            feature = record.payload and tfexamples.feature(
                record.payload, tfexamples.LABEL_ONE_BASED
            )
            value = tf.train.Feature.FromString(feature or b"").int64_list.value
            labels.append(value[0] - 1 if value else _NO_LABEL)
    return np.array(labels, np.int32)


# --- Pictures -------------------------------------------------------------------------------------


def read_images(
    config: SelectConfig, places: Iterable[tuple[int, int]]
) -> dict[tuple[int, int], bytes]:
    """Encoded images by (shard, record); empty for images that cannot be read.

    A shard is read no further than the last image needed from it.
    """
    by_shard = defaultdict(set)
    for shard, record in places:
        by_shard[shard].add(record)
    found = {}
    for shard, wanted in sorted(by_shard.items()):
        with tfrecords.Scanner(index.input_path(config, shard)) as scanner:
            for number in sorted(wanted):
                scanner.skip(number - scanner.position)
                record = scanner.take()
                payload = record.payload if record is not None else None
                feature = payload and tfexamples.feature(payload, tfexamples.IMAGE)
                found[shard, number] = tfexamples.bytes_value(feature) if feature else b""
    return found


# --- Quarantine -----------------------------------------------------------------------------------


class Quarantine(NamedTuple):
    """Records that cannot be labeled.

    Attributes:
      reasons: how many for each reason, without the place it was found at.
      files: how many in each shard's input file that has some.
      examples: (file, record, reason) of the first.
      unknown: prediction files without a manifest, which have no list.
    """

    reasons: Counter[str]
    files: Counter[str]
    examples: list[tuple[str, int, str]]
    unknown: list[str]


def read_quarantine(config: SelectConfig, limit: int = 20) -> Quarantine:
    """The quarantine lists of the manifests of all predictions."""
    workers = index.count_workers(config)
    result = Quarantine(Counter(), Counter(), [], [])
    for shard, worker in itertools.product(index.shards(config), range(workers)):
        name = os.path.basename(index.input_path(config, shard))
        manifest = index.prediction_path(config, shard, worker) + ".manifest.json"
        if not tf.io.gfile.exists(manifest):
            result.unknown.append(manifest)
            continue
        listed = json_files.read_json(manifest)["counts"].get("quarantine", {})
        for position, reason in sorted((int(p), r) for p, r in listed.items()):
            result.reasons[reason.split(" at byte ")[0]] += 1
            result.files[name] += 1
            if len(result.examples) < limit:
                result.examples.append((name, position * workers + worker, reason))
    return result
