"""Which unlabeled images a student learns from: filtering and balancing (paper section 3.1).

Confidence above a threshold, at most `num_image` per class with the highest confidence first,
classes with fewer filled up by copies. All of it is SQL on DuckDB over the columnar index of the
predictions, so the probabilities themselves are never read.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence

import numpy as np
import tensorflow as tf
from absl import logging

from efficientnet_ns.config import SelectConfig
from efficientnet_ns.data import manifests, records
from efficientnet_ns.labeling import predict

SELECTION = "selection.parquet"
_RUNNING_SUM = "total_counts_sum.json"
_THRESHOLDS = [k / 100 for k in range(101)]


def task_number(config: SelectConfig) -> int:
    """The number of the task in file names."""
    return max(config.task, 0)


def input_path(config: SelectConfig, shard: int) -> str:
    """The unlabeled records of a shard."""
    name = records.shard_name(config.file_prefix, shard, config.num_shards)
    return os.path.join(config.input_dir, name)


def prediction_path(config: SelectConfig, shard: int, worker: int) -> str:
    """The predictions of one worker for a shard."""
    name = records.prediction_name(shard, config.num_shards, worker)
    return os.path.join(config.prediction_dir, name)


def count_workers(config: SelectConfig) -> int:
    """How many workers predicted each shard.

    Raises:
      records.DataError: a prediction file is missing; the first is named.
    """
    workers = config.total_label_replicas
    manifest = prediction_path(config, 0, 0) + ".manifest.json"
    if tf.io.gfile.exists(manifest):
        predicted_by = manifests.read_json(manifest)["config"]["total_replicas"]
        if workers not in (-1, predicted_by):
            raise records.DataError(
                f"--total_label_replicas={workers}, but {manifest} says that {predicted_by} "
                "workers shared a shard"
            )
        workers = predicted_by
    if workers < 1:
        workers = 1
        while tf.io.gfile.exists(prediction_path(config, 0, workers)):
            workers += 1
    for shard in range(config.num_shards):
        for worker in range(workers):
            path = prediction_path(config, shard, worker)
            if not tf.io.gfile.exists(path):
                raise records.DataError(f"prediction {path} is missing: predict that shard first")
    return workers


def index_files(config: SelectConfig) -> list[str]:
    """The index of every prediction file, built from the records where it is missing."""
    paths = []
    for worker in range(count_workers(config)):
        for shard in range(config.num_shards):
            name = records.index_name(shard, config.num_shards, worker)
            path = os.path.join(config.prediction_dir, name)
            if not tf.io.gfile.exists(path):
                predict.index_from_predictions(
                    prediction_path(config, shard, worker), path, shard, worker
                )
            paths.append(path)
    return paths


def connect(**tables: Sequence[str]):
    """A DuckDB connection with a view per keyword, over the Parquet files given for it.

    Local files are read by DuckDB, piece by piece; those of other file systems are loaded.
    """
    import duckdb

    db = duckdb.connect()
    db.execute("SET enable_progress_bar = false")
    for name, paths in tables.items():
        if all(_is_local(path) for path in paths):
            listing = ", ".join("'{}'".format(path.replace("'", "''")) for path in paths)
            db.execute(f"CREATE VIEW {name} AS SELECT * FROM read_parquet([{listing}])")
        else:
            db.register(name, _load(paths))
    return db


def _is_local(path: str) -> bool:
    return "://" not in path


def _load(paths: Sequence[str]):
    import pyarrow
    import pyarrow.parquet

    loaded = []
    for path in paths:
        with tf.io.gfile.GFile(path, "rb") as f:
            loaded.append(pyarrow.parquet.read_table(pyarrow.BufferReader(f.read())))
    return pyarrow.concat_tables(loaded)


def _save(db, query: str, path: str) -> None:
    """Writes the result of a query as one Parquet file."""
    with tempfile.TemporaryDirectory() as folder:
        local = path if _is_local(path) else os.path.join(folder, SELECTION)
        quoted = local.replace("'", "''")
        db.execute(f"COPY ({query}) TO '{quoted}' (FORMAT parquet)")
        if local != path:
            tf.io.gfile.copy(local, path)


def write_statistics(db, config: SelectConfig) -> None:
    """Counts per class and 0.01-wide confidence bin, in the original's JSON files.

    `prelim_stats_<shard>_<task>.json` per shard, `total_counts.json` and its running sum from the
    top, `total_counts_sum.json`: {class: [[threshold, count], …]} for thresholds 0.00 … 1.00.
    """
    # The bin is the last threshold k/100 that is not above prob, compared in float64.
    rows = db.execute(
        """
        WITH guess AS (SELECT shard, label, prob::DOUBLE AS p, floor(prob::DOUBLE * 100) AS k
                       FROM predictions WHERE label >= 0)
        SELECT shard, label,
               CASE WHEN p >= (k + 1) / 100 THEN k + 1 WHEN p < k / 100 THEN k - 1 ELSE k END
                 ::INTEGER AS bin,
               count(*)
        FROM guess GROUP BY ALL ORDER BY shard, label, bin
        """
    ).fetchall()
    tf.io.gfile.makedirs(config.prelim_stats_dir)
    total: dict[int, list[int]] = {}
    shards: dict[int, dict[int, list[int]]] = {shard: {} for shard in range(config.num_shards)}
    for shard, label, bin_, count in rows:
        for table in (total, shards[shard]):
            table.setdefault(label, [0] * len(_THRESHOLDS))[bin_] += count
    for shard, table in shards.items():
        name = f"prelim_stats_{shard:05d}_{task_number(config)}.json"
        manifests.write_json(os.path.join(config.prelim_stats_dir, name), _histogram(table))
    running = {label: _sum_from_top(counts) for label, counts in total.items()}
    for name, table in (("total_counts.json", total), (_RUNNING_SUM, running)):
        manifests.write_json(os.path.join(config.prelim_stats_dir, name), _histogram(table))


def _histogram(table: dict[int, list[int]]) -> dict[str, list]:
    return {
        str(label): [[t, n] for t, n in zip(_THRESHOLDS, table[label])] for label in sorted(table)
    }


def _sum_from_top(counts: list[int]) -> list[int]:
    return [sum(counts[k:]) for k in range(len(counts))]


def select(config: SelectConfig) -> dict[str, object]:
    """Writes statistics and the selection; skips what is already there and whole.

    The selection is a Parquet table (shard, worker, position, label, prob, copies). Ties in
    confidence go to the lower (shard, position, worker). A class with n < num_image images gets
    num_image // n copies of each and one more of num_image % n of them, drawn by `seed`.

    Returns:
      `unique` (images selected), `records` (with copies), `available` (predictions read), and
      `classes`: {class: [lowest kept confidence, images]}.
    """
    indexes = index_files(config)
    stage = _stage(config, indexes)
    statistics = os.path.join(config.prelim_stats_dir, _RUNNING_SUM)
    if not config.only_get_stats and stage.done() and tf.io.gfile.exists(statistics):
        return stage.counts()
    _check_classes(config)
    db = connect(predictions=indexes)
    write_statistics(db, config)
    if config.only_get_stats:
        return {"available": _count(db, "predictions")}
    with stage.write() as (temporary, counts):
        _choose(db, config)
        selection, thresholds, total = (temporary[path] for path in stage.outputs)
        _save(db, "FROM chosen ORDER BY shard, worker, position", selection)
        classes = db.execute(
            "SELECT label, min(prob)::DOUBLE, count(*), sum(copies) "
            "FROM chosen GROUP BY label ORDER BY label"
        ).fetchall()
        counts.update(
            available=_count(db, "predictions"),
            unique=sum(n for _, _, n, _ in classes),
            records=int(sum(copies for *_, copies in classes)),
            # Differs (2): the least kept confidence and the images kept.
            classes={str(label): [lowest, n] for label, lowest, n, _ in classes},
        )
        empty = [c for c in range(config.num_label_classes) if str(c) not in counts["classes"]]
        if empty:
            logging.warning(
                "%d of %d classes have no image at or above --min_threshold=%s, the first are %s",
                *(len(empty), config.num_label_classes, config.min_threshold, empty[:10]),
            )
        manifests.write_json(thresholds, counts["classes"])
        # The key is misspelt in the original, whose readers expect it so.
        manifests.write_json(total, {"num_image_acorss_cat": counts["unique"]})
    return stage.counts()


def _check_classes(config: SelectConfig) -> None:
    path = prediction_path(config, 0, 0)
    first = next(records.read(path), None)
    if first is None or first.payload is None:
        return
    classes = len(records.probabilities(first.payload))
    if classes != config.num_label_classes:
        raise records.DataError(
            f"{path} holds probabilities of {classes} classes, but "
            f"--num_label_classes={config.num_label_classes}"
        )


def _stage(config: SelectConfig, indexes: Sequence[str]) -> manifests.Stage:
    settings = {
        "predictions": manifests.fingerprint(indexes),
        **{
            name: getattr(config, name)
            for name in ("num_image", "min_threshold", "upsample", "seed", "num_shards", "task")
        },
    }
    names = (SELECTION, "threshold.json", "num_image_across_cat.json")
    outputs = [os.path.join(config.output_dir, name) for name in names]
    return manifests.Stage(f"{outputs[0]}.manifest.json", outputs, settings)


def _count(db, table: str) -> int:
    return db.execute(f"SELECT count(*) FROM {table}").fetchone()[0]


def _choose(db, config: SelectConfig) -> None:
    """Creates the table `chosen`."""
    # Differs (1): exactly the top images, and copies by a seed.
    db.execute(
        """
        CREATE TABLE kept AS
        SELECT *, count(*) OVER (PARTITION BY label) AS class_size
        FROM (SELECT *, row_number() OVER (PARTITION BY label
                                           ORDER BY prob DESC, shard, position, worker) AS place
              FROM predictions WHERE label >= 0 AND prob::DOUBLE >= $threshold)
        WHERE place <= $num_image
        """,
        {"threshold": config.min_threshold, "num_image": config.num_image},
    )
    # md5 rather than DuckDB's hash(), which may change between its versions.
    db.execute(
        """
        CREATE TABLE chosen AS
        SELECT shard, worker, position, label, prob,
               CASE WHEN $upsample = 0 THEN 1
                    ELSE $num_image // class_size
                         + (row_number() OVER (PARTITION BY label ORDER BY
                              md5(concat_ws(',', $seed, shard, worker, position)))
                            <= $num_image % class_size)::INTEGER
               END::INTEGER AS copies
        FROM kept
        """,
        {"upsample": config.upsample, "num_image": config.num_image, "seed": config.seed},
    )


def load_outcome(config: SelectConfig) -> dict[str, np.ndarray]:
    """Every prediction and what the selection made of it, for sets that fit in memory.

    Returns:
      Columns `shard`, `record` (position in the shard), `label`, `prob`, `copies` (0: rejected),
      each [N], ordered by shard and record.
    """
    workers = count_workers(config)
    selection = os.path.join(config.output_dir, SELECTION)
    db = connect(predictions=index_files(config), selection=[selection])
    return db.execute(
        f"""
        SELECT shard, position * {workers} + worker AS record, label, prob,
               coalesce(copies, 0) AS copies
        FROM predictions LEFT JOIN (SELECT shard, worker, position, copies FROM selection)
             USING (shard, worker, position)
        ORDER BY shard, record
        """
    ).fetchnumpy()
