"""Which unlabeled images a student learns from: filtering and balancing (paper section 3.1).

Confidence above a threshold, at most `num_image` per class with the highest confidence first,
classes with fewer filled up by copies. All of it reads the columnar index of the predictions only,
never the probabilities themselves.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import multiprocessing
import os
import re
import weakref
from collections.abc import Iterator, Sequence

import numpy as np
import tensorflow as tf
from absl import logging

from efficientnet_ns.config import ConfigError, SelectConfig
from efficientnet_ns.cpus import available_cpus
from efficientnet_ns.data import manifests, records
from efficientnet_ns.labeling import choose, index, scan, statistics

SELECTION = "selection.parquet"
# A process needs seconds to start; with less than this to read, it is not worth it.
_BYTES_PER_PROCESS = 64 << 20
_ROW_GROUP = 1 << 20


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


def shards(config: SelectConfig) -> list[int]:
    """The shards that count: all, the first `only_use_num_shards`, or with `debug` one.

    Raises:
      ConfigError: a shard that is not below num_shards.
    """
    used = config.num_shards if config.only_use_num_shards == -1 else config.only_use_num_shards
    if not 1 <= used <= config.num_shards:
        raise ConfigError(
            f"--only_use_num_shards={used} is not among the 1 … {config.num_shards} of --num_shards"
        )
    if config.shard_id >= used:
        raise ConfigError(f"--shard_id={config.shard_id} is not below the {used} shards in use")
    return [config.shard_id] if config.debug == 1 else list(range(used))


def count_workers(config: SelectConfig) -> int:
    """How many workers predicted each shard.

    Raises:
      records.DataError: a prediction file is missing; the first is named.
    """
    workers = config.total_label_replicas
    manifest = prediction_path(config, 0, 0) + ".manifest.json"
    found = _predicted(config)
    if os.path.basename(manifest) in found:
        predicted_by = manifests.read_json(manifest)["config"]["total_replicas"]
        if workers not in (-1, predicted_by):
            raise records.DataError(
                f"--total_label_replicas={workers}, but {manifest} says that {predicted_by} "
                "workers shared a shard"
            )
        workers = predicted_by
    if workers < 1:
        name = re.compile(rf"train-info-\d{{5}}-of-{config.num_shards:05d}-(\d{{5}})")
        numbers = [int(match[1]) for match in map(name.fullmatch, found) if match]
        workers = 1 + max(numbers, default=0)
    for shard in shards(config):
        for worker in range(workers):
            path = prediction_path(config, shard, worker)
            if os.path.basename(path) not in found:
                raise records.DataError(f"prediction {path} is missing: predict that shard first")
    return workers


def _predicted(config: SelectConfig) -> set[str]:
    """Names in the folder of the predictions, listed once: a look per file takes long on gs://."""
    if not tf.io.gfile.isdir(config.prediction_dir):
        raise records.DataError(f"--prediction_dir={config.prediction_dir} is not a folder")
    return {name.rstrip("/") for name in tf.io.gfile.listdir(config.prediction_dir)}


def index_files(config: SelectConfig) -> dict[int, list[str]]:
    """The index of every prediction file by shard, built from the records where it is missing."""
    workers, found = count_workers(config), _predicted(config)
    files: dict[int, list[str]] = {}
    missing = []
    for shard in shards(config):
        for worker in range(1 if config.debug == 1 else workers):
            name = records.index_name(shard, config.num_shards, worker)
            path = os.path.join(config.prediction_dir, name)
            files.setdefault(shard, []).append(path)
            if name not in found:
                missing.append((prediction_path(config, shard, worker), path, shard, worker))
    _build_indexes(missing)
    return files


def _build_indexes(missing: Sequence[tuple[str, str, int, int]]) -> None:
    size = sum(tf.io.gfile.stat(prediction).length for prediction, *_ in missing)
    processes = min(len(missing), available_cpus(), size // _BYTES_PER_PROCESS)
    if processes < 2:
        for arguments in missing:
            index.index_from_predictions(*arguments)
        return
    logging.info("building the index of %d prediction files", len(missing))
    # Spawned, since TensorFlow's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool:
        for future in [pool.submit(index.index_from_predictions, *job) for job in missing]:
            future.result()


def connect(**tables: Sequence[str]):
    """A DuckDB connection with a view per keyword, over the Parquet files given for it.

    DuckDB reads them piece by piece. Those of other file systems are copied below TMPDIR, where they
    stay as long as the connection.
    """
    db = scan.database()
    copies = contextlib.ExitStack()
    weakref.finalize(db, copies.close)
    for name, paths in tables.items():
        local = copies.enter_context(scan.local_copies(paths))
        db.execute(f"CREATE VIEW {name} AS SELECT * FROM {scan.parquet([*local.values()])}")
    return db


def select(config: SelectConfig) -> dict[str, object]:
    """Writes statistics and the selection; skips what is already there and whole.

    The statistics are the original's JSON files: `prelim_stats_<shard>_<task>.json` per shard,
    `total_counts.json`, and its running sum from the top, `total_counts_sum.json`; each {class:
    [[threshold, count], …]} for thresholds 0.00 … 1.00.

    The selection is a Parquet table (shard, worker, position, label, prob, copies) in the order of
    the first three. Ties in confidence go to the lower (shard, position, worker). A class with n <
    num_image images gets num_image // n copies of each and one more of num_image % n of them,
    drawn by `seed`. With `selection="threshold"` it is what the original takes, its draws by
    `seed`.

    Returns:
      `unique` (images selected), `records` (with copies), `available` (predictions read), and
      `classes`: {class: [lowest kept confidence, images]}.

    Raises:
      ConfigError, records.DataError, manifests.OutputConflict: see there.
    """
    names = _statistics_names(config, count_workers(config))
    indexes = index_files(config)
    predictions = manifests.fingerprint([path for paths in indexes.values() for path in paths])
    statistics_stage = statistics.stage(config, predictions, names)
    stage = _stage(config, predictions)
    counted = _are_counted(statistics_stage)
    if config.only_get_stats and counted:
        return statistics_stage.counts()
    if not config.only_get_stats and stage.done() and counted:
        return stage.counts()
    _check_classes(config)
    with scan.local_copies([path for paths in indexes.values() for path in paths]) as local:
        source = scan.Scan({s: [local[path] for path in paths] for s, paths in indexes.items()})
        counts = _count(source, config, None if counted else statistics_stage, names)
        if config.only_get_stats:
            return statistics_stage.counts()
        if not stage.done():
            _select(source, counts, config, stage)
    return stage.counts()


def _are_counted(stage: manifests.Stage) -> bool:
    """Whether the statistics are there; those of predictions that changed since are made anew."""
    if tf.io.gfile.exists(stage.manifest):
        if manifests.read_json(stage.manifest)["config"] != stage.config:
            logging.info("%s: of other predictions, counting again", stage.manifest)
            return False
    return stage.done()


def _statistics_names(config: SelectConfig, workers: int) -> dict[tuple[int, int], str]:
    """(shard, task) → name of its file; the workers of a shard are shared among the tasks."""
    tasks = config.total_replicas
    if workers % tasks:
        raise ConfigError(
            f"--total_replicas={tasks} tasks cannot share the {workers} workers that predicted "
            "each shard evenly"
        )
    if tasks > 1 and config.task >= tasks:
        raise ConfigError(f"--task={config.task} is not below --total_replicas={tasks}")
    numbers = [task_number(config)] if tasks == 1 else range(tasks)
    return {
        (shard, place): f"prelim_stats_{shard:05d}_{number}.json"
        for shard in shards(config)
        for place, number in enumerate(numbers)
    }


def _count(source, config: SelectConfig, stage, names) -> statistics.Counts:
    """Counts the predictions; writes the statistics unless `stage` is None."""
    workers = count_workers(config)
    arguments = {
        "images": _image_numbers(config, source.files),
        "workers_per_task": workers // config.total_replicas,
    }
    if stage is None:
        return statistics.count(source, config, save={}, **arguments)
    with stage.write() as (temporary, summary):
        *files, total, running_sum = (temporary[path] for path in stage.outputs)
        counts = statistics.count(source, config, save=dict(zip(names, files)), **arguments)
        statistics.write_totals(counts, total, running_sum)
        summary.update(available=counts.available)
    return counts


def _image_numbers(config: SelectConfig, files) -> dict[tuple[int, int], int]:
    """How many images --info_dir says that each (shard, worker) predicted."""
    if not config.info_dir:
        return {}
    numbers = {}
    for shard, paths in files.items():
        for worker in range(len(paths)):
            name = records.info_name(shard, config.num_shards, worker)
            path = os.path.join(config.info_dir, name)
            if not tf.io.gfile.exists(path):
                raise records.DataError(f"{path} is missing: predict that shard first")
            numbers[shard, worker] = manifests.read_json(path)["image_num"]
    return numbers


def _check_classes(config: SelectConfig) -> None:
    path = prediction_path(config, shards(config)[0], 0)
    first = next(records.read(path), None)
    if first is None or first.payload is None:
        return
    classes = len(records.probabilities(first.payload))
    if classes != config.num_label_classes:
        raise records.DataError(
            f"{path} holds probabilities of {classes} classes, but "
            f"--num_label_classes={config.num_label_classes}"
        )


_DECISIVE = (
    "selection num_image min_threshold max_prob upsample use_top use_all seed num_shards "
    "num_label_classes only_use_num_shards debug"
).split()


def _stage(config: SelectConfig, predictions: str) -> manifests.Stage:
    settings = {name: getattr(config, name) for name in _DECISIVE}
    settings["predictions"] = predictions
    # Results of two definitions of the draws are never mixed.
    settings["draws"] = choose.DRAWS
    if config.debug == 1:
        settings["shard_id"] = config.shard_id
    names = (SELECTION, "threshold.json", "num_image_across_cat.json")
    outputs = [os.path.join(config.output_dir, name) for name in names]
    return manifests.Stage(f"{outputs[0]}.manifest.json", outputs, settings)


def _select(source, counts: statistics.Counts, config: SelectConfig, stage) -> None:
    original = config.selection == "threshold"
    chosen = choose.thresholds(counts.total, config) if original else {}
    with stage.write() as (temporary, summary):
        selection, thresholds, total = (temporary[path] for path in stage.outputs)
        rules = (
            choose.by_thresholds(chosen, config)
            if original
            else choose.exactly(source, counts, config)
        )
        with _local_name(selection) as local:
            rows = _write_selection(source, rules, local)
        summary.update(
            available=counts.available,
            unique=sum(n for _, _, n, _ in rows),
            records=sum(copies for *_, copies in rows),
            classes={str(label): [lowest, n] for label, lowest, n, _ in rows},
        )
        _warn_of_empty_classes(config, {label for label, *_ in rows})
        # Differs (2): the least kept confidence and the images kept.
        content = {str(c): entry for c, entry in chosen.items()} or summary["classes"]
        manifests.write_json(thresholds, content)
        across = sum(min(images, config.num_image) for _, images in chosen.values())
        # The key is misspelt in the original, whose readers expect it so.
        across_classes = {"num_image_acorss_cat": across if original else summary["unique"]}
        manifests.write_json(total, across_classes)


def _warn_of_empty_classes(config: SelectConfig, found: set[int]) -> None:
    empty = [c for c in range(config.num_label_classes) if c not in found]
    if empty:
        logging.warning(
            "%d of %d classes have no image at or above --min_threshold=%s, the first are %s",
            *(len(empty), config.num_label_classes, config.min_threshold, empty[:10]),
        )


@contextlib.contextmanager
def _local_name(path: str) -> Iterator[str]:
    """Yields a name on a local disk; its file ends up at `path`."""
    if scan.is_local(path):
        yield path
        return
    with manifests.scratch_folder("selection") as folder:
        local = os.path.join(folder, SELECTION)
        yield local
        tf.io.gfile.copy(local, path)


def _write_selection(source, rules: choose.Rules, path: str) -> list[tuple[int, float, int, int]]:
    """One Parquet file; a row group holds rows of one shard, so that a reader skips the others.

    Returns:
      (label, least probability, images, copies) of the classes with images.
    """
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.schema(
        [(name, pyarrow.from_numpy_dtype(kind)) for name, kind in choose.COLUMNS.items()]
    )
    classes = len(rules.least)
    lowest = np.full(classes, np.inf, np.float32)
    images, copies = np.zeros(classes, np.int64), np.zeros(classes, np.int64)

    with pyarrow.parquet.ParquetWriter(
        path,
        schema,
        compression="zstd",
        use_dictionary=["shard", "worker", "label", "copies"],
        column_encoding={"position": "DELTA_BINARY_PACKED", "prob": "BYTE_STREAM_SPLIT"},
    ) as writer:
        work = functools.partial(choose.kept, rules=rules)
        for _, tables in source.each("writing the selection", work):
            for table in tables:
                labels = table["label"]
                if not len(labels):
                    continue
                np.minimum.at(lowest, labels, table["prob"])
                images += np.bincount(labels, minlength=classes)
                copies += np.bincount(labels, table["copies"], classes).astype(np.int64)
                writer.write_table(pyarrow.table(table, schema), row_group_size=_ROW_GROUP)
    found = np.flatnonzero(images)
    return list(zip(*(x[found].tolist() for x in (np.arange(classes), lowest, images, copies))))
