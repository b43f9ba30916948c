"""Queries of a labeling run: SQL over the indexes and the selection, and its quarantine lists.

No result grows with the number of images. Rejected images are counted as all images minus kept
ones, so that a join holds only the kept ones. Comparisons with true labels and with an earlier
round use out-of-core joins.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import tensorflow as tf

from efficientnet_ns.config import SelectConfig
from efficientnet_ns.config.cpus import available_cpus
from efficientnet_ns.files import manifests, parquet_sql, tfexamples, tfrecords
from efficientnet_ns.files.errors import DataError
from efficientnet_ns.pseudo_labels import index
from efficientnet_ns.pseudo_labels.selection import SELECTION

if TYPE_CHECKING:
    import pyarrow
    from numpy.typing import ArrayLike

    # Labels per shard and record; the path of a CSV or Parquet file; or RECORDS.
    Truth = Sequence[ArrayLike] | str

RECORDS = "records"
_NO_LABEL = -2  # -1 marks an image of no class.

# Ties are sorted by place, so that every report of a run shows the same pictures.
_ORDERS = {"most": "prob DESC, shard, record", "least": "prob, shard, record"}

# Shard and record identify an image in every round and in the truth; worker and position depend
# on the number of workers.
_IMAGES = """
CREATE VIEW {} AS SELECT *, position * {} + worker AS record FROM {} WHERE label >= 0
"""
# Labels joined with the labels of `other`: the truth or an earlier round. `copies` is NULL for
# rejected images, which the selection does not list.
_COMPARED = """
CREATE VIEW {view} AS
SELECT {other}.label AS {column}, images.label, images.prob, copies IS NOT NULL AS kept
FROM images JOIN {other} USING (shard, record)
LEFT JOIN (SELECT shard, record, copies FROM chosen) USING (shard, record)
"""
# The predicted probabilities of kept images, if a person has labeled some: these have probability 1
# in the selection, so only such images are looked up among the predictions.
_KEPT_AS_PREDICTED = """
(SELECT prob FROM chosen WHERE prob < 1
 UNION ALL
 SELECT prob FROM images SEMI JOIN (SELECT shard, record FROM chosen WHERE prob >= 1)
 USING (shard, record))
"""


def made_with(config: SelectConfig) -> dict[str, Any] | None:
    """Returns the settings with which the selection was made; None if it has no manifest."""
    manifest = os.path.join(config.output_dir, f"{SELECTION}.manifest.json")
    if not tf.io.gfile.exists(manifest):
        return None
    return manifests.read_manifest(manifest)["config"]


class Picture(NamedTuple):
    """An image to show, identified by its place in the unlabeled set."""

    shard: int
    record: int
    label: int
    prob: float


class Outcome:
    """The predictions and the selection of a labeling run.

    Args:
      config: settings of the selection.
      truth: columns `shard`, `record`, `label` (0-based, -1 for images of no class) of the images
        with known labels.
      previous_dir: folder of the predictions of an earlier round for the same images.

    Raises:
      DataError: If there is no selection or predictions are missing.
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
            # Detected, because the earlier round may have had a different number of workers.
            earlier = dataclasses.replace(
                config, prediction_dir=previous_dir, total_label_replicas=-1
            )
            tables["previous"] = _indexes(earlier)
            views["earlier"] = ("previous", earlier)
        self._db = parquet_sql.connect(available_cpus(), **tables)
        for view, (table, predicted) in views.items():
            self._db.execute(_IMAGES.format(view, index.count_workers(predicted), table))
        if truth is not None:
            self._db.register("truth", truth)
            self._db.execute(_COMPARED.format(view="judged", other="truth", column="truth"))
        if previous_dir:
            self._db.execute(_COMPARED.format(view="compared", other="earlier", column="before"))

    def _query(self, query: str, *values: object) -> list[tuple]:
        return self._db.execute(query, list(values)).fetchall()

    def totals(self) -> dict[str, int]:
        """Returns the counts `images`, `unreadable`, `confident`, `kept` and `records`.

        Confident images are at or above the threshold; records are kept images and their copies.
        """
        # In float64, as in the selection: the float32 nearest to 0.7 is below 0.7.
        found = self._columns(
            "SELECT * FROM (SELECT count(*) AS images, count_if(label < 0) AS unreadable, "
            "count_if(label >= 0 AND prob::DOUBLE >= $1) AS confident FROM predictions), "
            "(SELECT count(*) AS kept, coalesce(sum(copies), 0)::BIGINT AS records FROM chosen)",
            self.config.min_threshold,
        )
        return {name: int(value[0]) for name, value in found.items()}

    def confidence(self, bins: int) -> dict[str, np.ndarray]:
        """Returns a histogram of the top-1 probability, split by threshold and by kept or rejected.

        Args:
          bins: number of equal intervals of [0, 1].

        Returns:
          Columns `prob` float64 (a value from the bin and side of the threshold), `kept` bool and
          `images` int, with one row for each bin, side and value of `kept`.
        """
        # A probability of 1 belongs to the last bin.
        counted = (
            f"(SELECT least(floor(prob::DOUBLE * {int(bins)}), {int(bins) - 1}) AS bin, "
            f"prob::DOUBLE >= {float(self.config.min_threshold)!r}::DOUBLE AS confident, "
            "max(prob)::DOUBLE AS prob, count(*) AS images FROM {} GROUP BY ALL)"
        )
        settings = made_with(self.config)
        kept = _KEPT_AS_PREDICTED if settings is None or "reviewed" in settings else "chosen"
        return self._columns(
            "SELECT images.prob, kept, CASE WHEN kept THEN coalesce(chosen.images, 0) "
            "ELSE images.images - coalesce(chosen.images, 0) END AS images "
            f"FROM {counted.format('images')} AS images "
            f"LEFT JOIN {counted.format(kept)} AS chosen "
            "USING (bin, confident) "
            "CROSS JOIN (VALUES (true), (false)) AS sides(kept)"
        )

    def classes(self) -> dict[str, np.ndarray]:
        """Returns columns with one entry per class.

        Returns:
          `predicted`, `confident`, `kept` and `records` int64 [C]; `lowest` kept probability float64
          [C] and `quantiles` (10, 50, 90 %) float64 [C, 3], NaN for classes without images.
        """
        count = self.config.num_label_classes
        counted = ("predicted", "confident", "kept", "records")
        columns = {name: np.zeros(count, np.int64) for name in counted}
        columns["lowest"] = np.full(count, np.nan)
        columns["quantiles"] = np.full((count, 3), np.nan)
        # Approximate quantiles use bounded memory; exact ones would store every probability.
        predicted = self._query(
            "SELECT label, count(*), count_if(prob::DOUBLE >= $1), "
            "approx_quantile(prob, [0.1, 0.5, 0.9]) FROM images GROUP BY ALL",
            self.config.min_threshold,
        )
        chosen = self._query(
            "SELECT label, count(*), sum(copies)::BIGINT, min(prob) FROM chosen GROUP BY ALL"
        )
        for names, rows in (
            (("predicted", "confident", "quantiles"), predicted),
            (("kept", "records", "lowest"), chosen),
        ):
            for label, *values in rows:
                for name, value in zip(names, values):
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
        """Returns kept or rejected images in order of confidence.

        Args:
          kept: whether to return kept or rejected images.
          order: "most" or "least", the confidence of the first images.
          limit: maximum number of images; with `labels`, per class.
          shards: use only the first `shards` shards.
          labels: classes to choose from; None for all.
        """
        # The limit on shards is repeated: DuckDB does not push it through an anti join.
        rejected = """
            images ANTI JOIN (SELECT shard, record FROM chosen WHERE shard < $1)
            USING (shard, record)
            """
        source = "chosen" if kept else rejected
        among, partition = "", ""
        values: list[object] = [shards, limit]
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

    def labels(self, shard: int) -> list[tuple[int, float, bool]]:
        """Returns (label, top-1 probability, kept) of a shard's records; label -1 if unreadable."""
        workers = index.count_workers(self.config)
        return self._query(
            f"SELECT p.label, p.prob, copies IS NOT NULL FROM predictions AS p "
            "LEFT JOIN (SELECT shard, worker, position, copies FROM selection) "
            "USING (shard, worker, position) WHERE shard = $1 "
            f"ORDER BY position * {workers} + worker",
            shard,
        )

    def confusion(self) -> dict[str, np.ndarray]:
        """Returns columns `truth`, `label`, `images` int of kept images, a row per pair."""
        return self._columns(
            "SELECT truth, label, count(*) AS images FROM judged WHERE kept GROUP BY ALL"
        )

    def accuracy(self, bins: int) -> dict[str, np.ndarray]:
        """Compares labels with the truth, by confidence in `bins` intervals (lower, upper].

        Returns:
          Columns `known`, `correct`, `kept` bool, `bin` int from 1, mean `prob` and `images`, a row
          per existing combination.
        """
        return self._columns(
            "SELECT truth >= 0 AS known, truth = label AS correct, kept, "
            f"greatest(ceil(prob::DOUBLE * {int(bins)}), 1)::INTEGER AS bin, "
            "avg(prob::DOUBLE) AS prob, count(*) AS images FROM judged GROUP BY ALL"
        )

    def agreement(self, bins: int) -> dict[str, np.ndarray]:
        """Compares labels with those of the earlier round, by the confidence of this round.

        Returns:
          Columns `bin` (0 … bins - 1), `kept`, `same` (images with equal labels) and `images`.
        """
        return self._columns(
            f"SELECT least(floor(prob::DOUBLE * {int(bins)}), {int(bins) - 1})::INTEGER AS bin, "
            "kept, count_if(label = before)::BIGINT AS same, count(*) AS images FROM compared GROUP BY ALL"
        )

    def changes(self, limit: int) -> list[tuple[int, int, int]]:
        """Returns the most frequent changes as (earlier label, later label, images)."""
        return self._query(
            "SELECT before, label, count(*) AS images FROM compared WHERE before != label "
            f"GROUP BY ALL ORDER BY images DESC, before, label LIMIT {int(limit)}"
        )

    def _columns(self, query: str, *values: object) -> dict[str, np.ndarray]:
        # DuckDB's threads return groups in arbitrary order.
        return self._db.execute(f"{query} ORDER BY ALL", list(values)).fetchnumpy()


def _indexes(config: SelectConfig) -> list[str]:
    return [path for paths in index.index_files(config).values() for path in paths]


def read_truth(config: SelectConfig, truth: Truth) -> pyarrow.Table:
    """Returns columns `shard`, `record`, `label` of the images with known labels.

    Args:
      truth: 0-based labels per shard and record, -1 for images of no class; a CSV or Parquet file
        with these columns; or RECORDS for the `image/class/label` in the unlabeled records.

    Raises:
      DataError: If the file lacks a column or no record has a label.
    """
    import pyarrow
    import pyarrow.csv
    import pyarrow.parquet

    numbers: Sequence[int] | None = None
    if truth == RECORDS:
        numbers = index.shards(config)
        carried = [_labels(index.input_path(config, s)) for s in numbers]
        if not any((labels > _NO_LABEL).any() for labels in carried):
            raise DataError(
                f"no record of {config.unlabel_data_dir} has {tfexamples.LABEL_ONE_BASED!r}: "
                "there is no truth to compare with"
            )
        truth = carried
    if isinstance(truth, str):
        with tf.io.gfile.GFile(truth, "rb") as f:
            # Arrow does not support TensorFlow's file systems.
            source = pyarrow.BufferReader(f.read())
        csv = truth.endswith(".csv")
        table = pyarrow.csv.read_csv(source) if csv else pyarrow.parquet.read_table(source)
        if missing := {"shard", "record", "label"} - set(table.column_names):
            raise DataError(f"{truth} has no column {min(missing)!r}")
        return table
    labels = [np.asarray(part, np.int32) for part in truth]
    columns = {
        "shard": np.repeat(
            np.asarray(numbers or range(len(labels)), np.int32), [len(part) for part in labels]
        ),
        "record": np.concatenate([np.arange(len(part)) for part in labels]),
        "label": np.concatenate(labels),
    }
    return pyarrow.table(columns).filter(columns["label"] > _NO_LABEL)


def _labels(path: str) -> np.ndarray:
    """Returns the labels stored in a shard's records, int32 [N]; _NO_LABEL if there is none."""
    labels = []
    with tfrecords.Scanner(path) as scanner:
        while (record := scanner.take()) is not None:
            # A damaged record keeps its place and has no label.
            feature = record.payload and tfexamples.feature(
                record.payload, tfexamples.LABEL_ONE_BASED
            )
            value = tf.train.Feature.FromString(feature or b"").int64_list.value
            labels.append(value[0] - 1 if value else _NO_LABEL)
    return np.array(labels, np.int32)


def read_images(
    config: SelectConfig, places: Iterable[tuple[int, int]]
) -> dict[tuple[int, int], bytes]:
    """Returns encoded images by (shard, record); b"" for images that cannot be read."""
    found = read_records(config, places)
    return {place: tfexamples.image_if_any(payload) for place, payload in found.items()}


def read_records(
    config: SelectConfig, places: Iterable[tuple[int, int]]
) -> dict[tuple[int, int], bytes]:
    """Returns records by (shard, record); b"" for records that cannot be read.

    Reads each shard only up to the last of its places.
    """
    paths = {(shard, number): (index.input_path(config, shard), number) for shard, number in places}
    payloads = tfrecords.payloads_at(paths.values())
    return {place: payloads[path] for place, path in paths.items()}


class Quarantine(NamedTuple):
    """Records that cannot be labeled.

    Attributes:
      reasons: number of records per reason; reasons exclude the byte offset.
      files: number of records per input file.
      examples: (file, record, reason) of the first records.
      unknown: paths of missing manifests, whose prediction files therefore have no list.
    """

    reasons: Counter[str]
    files: Counter[str]
    examples: list[tuple[str, int, str]]
    unknown: list[str]


def read_quarantine(config: SelectConfig, limit: int = 20) -> Quarantine:
    """Reads the quarantine lists in the manifests of all predictions."""
    workers = index.count_workers(config)
    result = Quarantine(Counter(), Counter(), [], [])
    for shard, worker in itertools.product(index.shards(config), range(workers)):
        name = os.path.basename(index.input_path(config, shard))
        manifest = index.prediction_path(config, shard, worker) + ".manifest.json"
        if not tf.io.gfile.exists(manifest):
            result.unknown.append(manifest)
            continue
        listed = manifests.read_manifest(manifest)["counts"].get("quarantine", {})
        # Keys of JSON objects are strings, which would sort 10 before 2.
        for position, reason in sorted((int(p), r) for p, r in listed.items()):
            result.reasons[reason.split(" at byte ")[0]] += 1
            result.files[name] += 1
            if len(result.examples) < limit:
                result.examples.append((name, position * workers + worker, reason))
    return result
