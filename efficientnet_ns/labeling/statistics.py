"""How confident the teacher is: images per class and 0.01-wide bin of confidence."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from efficientnet_ns.config import SelectConfig
from efficientnet_ns.data import manifests, records
from efficientnet_ns.labeling.scan import Scan, double

EDGES = [k / 100 for k in range(101)]
# The JSON of an edge's small counts, so that a million of them need not be formatted one by one.
_SMALL = 512
_BINS = np.arange(len(EDGES))
TOTAL, RUNNING_SUM = "total_counts.json", "total_counts_sum.json"


class Counts(NamedTuple):
    """What one pass over the index counts.

    Attributes:
      total: int64 [classes, 101], images of each class with EDGES[k] <= prob < EDGES[k + 1].
      eligible: the same of those that --min_threshold and --max_prob let pass.
      available: predictions read, the unreadable ones included.
    """

    total: np.ndarray
    eligible: np.ndarray
    available: int


def count(
    scan: Scan,
    config: SelectConfig,
    *,
    images: Mapping[tuple[int, int], int],
    save: Mapping[tuple[int, int], str],
    workers_per_task: int,
) -> Counts:
    """Counts all predictions, and writes the statistics of each shard.

    Args:
      images: how many predictions a (shard, worker) should have, where that is known.
      save: path of the JSON file of a (shard, task); empty: none are written.

    Raises:
      records.DataError: a label that is no class, or a number of predictions other than `images`.
    """
    shape = (config.num_label_classes, len(EDGES))
    total, eligible, available = np.zeros(shape, np.int64), np.zeros(shape, np.int64), 0
    low, high = double(config.min_threshold), double(config.max_prob)

    def group(cursor, shard: int, rows: str) -> dict[str, np.ndarray]:
        # The bin is the last edge k/100 that is not above prob, compared in float64.
        return cursor.execute(
            f"""
            WITH guess AS (SELECT worker, label, prob::DOUBLE AS p, floor(p * 100) AS k FROM {rows})
            SELECT worker, label,
                   least(CASE WHEN p >= (k + 1) / 100 THEN k + 1 WHEN p < k / 100 THEN k - 1
                              ELSE k END, 100)::INTEGER AS bin,
                   count(*) AS n, count(*) FILTER (p >= {low} AND p <= {high}) AS fit
            FROM guess GROUP BY ALL
            """
        ).fetchnumpy()

    for shard, rows in scan.each("counting predictions", group):
        available += int(rows["n"].sum())
        _check(shard, rows, config.num_label_classes, images)
        known = rows["label"] >= 0
        rows = {name: np.asarray(values)[known] for name, values in rows.items()}
        place = rows["label"], rows["bin"]
        np.add.at(eligible, place, rows["fit"])
        np.add.at(total, place, rows["n"])
        tasks = rows["worker"] // workers_per_task
        for task in [task for s, task in save if s == shard]:
            table, mine = np.zeros(shape, np.int64), tasks == task
            np.add.at(table, tuple(p[mine] for p in place), rows["n"][mine])
            _write(save[shard, task], table, np.flatnonzero(table.any(1)))
    return Counts(total, eligible, available)


def _check(shard: int, rows, num_classes: int, images: Mapping[tuple[int, int], int]) -> None:
    highest = max(rows["label"], default=-1)
    if highest >= num_classes:
        raise records.DataError(
            f"a prediction of shard {shard} has the label {highest}, which is not below "
            f"--num_label_classes={num_classes}"
        )
    for worker in {worker for s, worker in images if s == shard}:
        found = int(rows["n"][rows["worker"] == worker].sum())
        if found != images[shard, worker]:
            raise records.DataError(
                f"the predictions of shard {shard} by worker {worker} are {found} records, but its "
                f"file in --info_dir says {images[shard, worker]}: predict that shard again"
            )


def write_totals(counts: Counts, total: str, running_sum: str) -> None:
    """Writes the counts of all shards, and their sums from the highest bin down."""
    classes = np.arange(len(counts.total))
    _write(total, counts.total, classes)
    _write(running_sum, counts.total[:, ::-1].cumsum(1)[:, ::-1], classes)


@functools.lru_cache(maxsize=1)
def _entries() -> np.ndarray:
    """`[edge, count]` as text, by bin and count."""
    return np.array([[f"[{e}, {n}]" for n in range(_SMALL)] for e in EDGES], dtype=object)


def _write(path: str, table: np.ndarray, classes: Sequence[int]) -> None:
    """`{class: [[edge, count], …]}`, for the edges 0.00 … 1.00."""
    import tensorflow as tf

    entries = _entries()
    small = table[classes].max(1, initial=0) < _SMALL
    lines = []
    for c, is_small in zip(classes, small):
        if is_small:
            line = entries[_BINS, table[c]].tolist()
        else:
            line = [f"[{edge}, {n}]" for edge, n in zip(EDGES, table[c].tolist())]
        lines.append(f'"{c}": [{", ".join(line)}]')
    body = ", ".join(lines)
    with tf.io.gfile.GFile(path, "w") as f:
        f.write("{" + body + "}")


def stage(config: SelectConfig, predictions: str, names: Mapping[tuple[int, int], str]):
    """The statistics as a unit of work: those of each shard and task, the total, its sums."""
    outputs = [os.path.join(config.prelim_stats_dir, name) for name in names.values()]
    outputs += [os.path.join(config.prelim_stats_dir, name) for name in (TOTAL, RUNNING_SUM)]
    settings = {
        "predictions": predictions,
        "num_label_classes": config.num_label_classes,
        "num_shards": config.num_shards,
        "only_use_num_shards": config.only_use_num_shards,
        "total_replicas": config.total_replicas,
        "task": max(config.task, 0) if config.total_replicas == 1 else None,
    }
    return manifests.Stage(f"{outputs[-2]}.manifest.json", outputs, settings)
