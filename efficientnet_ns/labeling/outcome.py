"""What a labeling run did, as aggregates: SQL over the indexes and the selection.

No answer grows with the number of images, and rejected images are counted as all but the kept ones,
so that sets of any size are summed up without joining them. Comparisons with true labels and with
an earlier round do join, out of core.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import tensorflow as tf

from efficientnet_ns.config import SelectConfig
from efficientnet_ns.data import records
from efficientnet_ns.labeling import select

if TYPE_CHECKING:
    import pyarrow

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
      records.DataError: there is no selection, or predictions are missing.
    """

    def __init__(
        self, config: SelectConfig, *, truth: pyarrow.Table | None = None, previous_dir: str = ""
    ):
        self.config = config
        selection = os.path.join(config.output_dir, select.SELECTION)
        if not tf.io.gfile.exists(selection):
            raise records.DataError(f"{selection} is missing: run the selection first")
        tables = {"predictions": _indexes(config), "selection": [selection]}
        views = {"images": ("predictions", config), "chosen": ("selection", config)}
        if previous_dir:
            earlier = dataclasses.replace(
                config, prediction_dir=previous_dir, total_label_replicas=-1
            )
            tables["previous"] = _indexes(earlier)
            views["earlier"] = ("previous", earlier)
        self._db = select.connect(**tables)
        for view, (table, predicted) in views.items():
            self._db.execute(_IMAGES.format(view, select.count_workers(predicted), table))
        if truth is not None:
            self._db.register("truth", truth)
            self._db.execute(_JUDGED)
        if previous_dir:
            self._db.execute(_COMPARED)

    def _query(self, query: str, *values: object) -> list[tuple]:
        return self._db.execute(query, list(values)).fetchall()

    def totals(self) -> dict[str, int]:
        """Numbers of `images`, `unreadable`, `confident` (at or above the threshold), `kept`,
        `records` (kept with copies)."""
        images, unreadable, confident = self._query(
            "SELECT count(*), count_if(label < 0), count_if(label >= 0 AND prob::DOUBLE >= $1) "
            "FROM predictions",
            self.config.min_threshold,
        )[0]
        kept, copies = self._query("SELECT count(*), coalesce(sum(copies), 0)::BIGINT FROM chosen")[
            0
        ]
        return {
            "images": images,
            "unreadable": unreadable,
            "confident": confident,
            "kept": kept,
            "records": copies,
        }

    def confidence(self, bins: int) -> dict[str, np.ndarray]:
        """Columns `prob` float64, `kept` bool, `images` int: a row per bin, side of the threshold
        and kept or not; `prob` is one of that bin and side."""
        query = """
            SELECT least(floor(prob::DOUBLE * $1), $1 - 1)::INTEGER AS bin,
                   prob::DOUBLE >= $2 AS confident, max(prob)::DOUBLE, count(*)
            FROM {} GROUP BY ALL ORDER BY ALL
            """
        every, kept = (
            {
                (bin_, confident): (prob, images)
                for bin_, confident, prob, images in self._query(
                    query.format(table), bins, self.config.min_threshold
                )
            }
            for table in ("images", "chosen")
        )
        rows = []
        for key, (prob, images) in every.items():
            inside = kept.get(key, (prob, 0))[1]
            rows += [(prob, True, inside), (prob, False, images - inside)]
        columns = np.array(rows, np.float64).reshape(-1, 3).T
        return {
            "prob": columns[0],
            "kept": columns[1].astype(bool),
            "images": columns[2].astype(np.int64),
        }

    def classes(self) -> dict[str, np.ndarray]:
        """Columns of one entry per class: `predicted`, `confident`, `kept`, `records` int [C],
        `lowest` kept probability float [C] and `quantiles` (10, 50, 90 %) float [C, 3], NaN if
        there is none."""
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
        bin (lower, upper] of confidence."""
        return self._columns(
            "SELECT truth >= 0 AS known, truth = label AS correct, kept, "
            f"greatest(ceil(prob::DOUBLE * {int(bins)}), 1)::INTEGER AS bin, "
            "avg(prob::DOUBLE) AS prob, count(*) AS images FROM judged GROUP BY ALL"
        )

    def agreement(self, bins: int) -> dict[str, np.ndarray]:
        """Columns `bin` (0 … bins-1, of the later confidence), `kept`, `same`, `images`: how many
        labels are those of the earlier round."""
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
    return [path for paths in select.index_files(config).values() for path in paths]
