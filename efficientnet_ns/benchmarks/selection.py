"""Measures statistics, selection and report on a generated index of any size."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import os
import shutil
import tempfile
import time

import numpy as np
import tensorflow as tf

from efficientnet_ns.benchmarks import tables
from efficientnet_ns.benchmarks.tables import Row
from efficientnet_ns.config import BenchmarkConfig, ReportConfig, SelectConfig
from efficientnet_ns.config.cpus import available_cpus
from efficientnet_ns.files import shard_names, tfexamples, tfrecords
from efficientnet_ns.outcomes import labeling_report
from efficientnet_ns.pseudo_labels import index
from efficientnet_ns.pseudo_labels.selection import SELECTION, select

_SHARDS = 128
_BYTES_PER_ROW = 30  # Index, selection and spilled data; measured below 20.
# The paper's 130,000 images per class out of 300 million for 1000 classes.
_SHARE_WANTED = 130_000 * 1000 / 300e6


def run(config: BenchmarkConfig) -> list[Row]:
    """Generates `rows` predictions of `classes` classes in TMPDIR and selects from them.

    Selection and report run in separate processes, so that their peak memory is known.

    Raises:
      ConfigError: If the disk is too small.
    """
    with tempfile.TemporaryDirectory() as folder:
        tables.require_disk(config, folder, _BYTES_PER_ROW)
        settings = SelectConfig(
            unlabel_data_dir=folder,
            prediction_dir=folder,
            prelim_stats_dir=os.path.join(folder, "statistics"),
            num_shards=_SHARDS,
            num_label_classes=config.classes,
            num_image=max(1, round(_SHARE_WANTED * config.rows / config.classes)),
            min_threshold=0.3,
        )
        start = time.perf_counter()
        make_index(settings, config.rows)
        made = time.perf_counter() - start
        size = sum(os.path.getsize(entry) for entry in os.scandir(folder) if entry.is_file())
        rows = [
            Row("making the index (not part of the rest)", made, "s"),
            Row("index on disk", size / 1e6, "MB"),
        ]
        for mode in ("exact", "threshold"):
            # Each mode includes the statistics.
            output = os.path.join(folder, mode)
            chosen = dataclasses.replace(
                settings,
                selection=mode,
                output_dir=output,
                prelim_stats_dir=os.path.join(output, "statistics"),
            )
            rows += _measured(chosen)
            if mode == "exact":
                _make_images(chosen, config.rows)
                watched = tables.in_own_process(labeling_report.write_report, chosen)
                rows += watched.rows("report")
            shutil.rmtree(output)
    return rows


def _measured(settings: SelectConfig) -> list[Row]:
    run = tables.in_own_process(select, settings)
    name = f"statistics + selection, {settings.selection}"
    size = os.path.getsize(os.path.join(settings.output_dir, SELECTION))
    return [
        Row(f"{name}: rate", run.result["available"] / run.seconds, "rows/s"),
        *run.rows(name),
        Row(f"{name}: images selected", run.result["unique"], "images"),
        Row(f"{name}: selection on disk", size / 1e6, "MB"),
    ]


def _shard_rows(rows: int, shard: int) -> int:
    return rows // _SHARDS + (shard < rows % _SHARDS)


def _make_images(settings: SelectConfig, rows: int) -> None:
    """Writes the images of the shards from which a report takes pictures."""
    example = tfexamples.unlabeled_example(tf.io.encode_png(tf.zeros([8, 8, 3], tf.uint8)).numpy())
    for shard in range(ReportConfig().report_shards):
        images = itertools.repeat(example, _shard_rows(rows, shard))
        tfrecords.write(index.input_path(settings, shard), images)


def make_index(settings: SelectConfig, rows: int) -> None:
    """Writes the index of `rows` predictions; the prediction files are empty.

    Classes differ in confidence and, by a factor of about 50, in size. More than half of the
    predictions are above 0.3.
    """
    classes = settings.num_label_classes
    weights = 1 / (np.arange(classes) + 0.02 * classes)
    bounds = np.cumsum(weights / weights.sum())[:-1]
    # Easy classes have many probabilities near 1, hard ones few.
    ease = (0.7 + 3.3 * np.random.default_rng(0).random(classes)).astype(np.float32)

    def make(shard: int) -> None:
        rng = np.random.default_rng([1, shard])
        size = _shard_rows(rows, shard)
        labels = np.searchsorted(bounds, rng.random(size)).astype(np.int32)
        probs = 1 - 0.97 * rng.random(size, np.float32) ** ease[labels]
        name = shard_names.index_name(shard, _SHARDS, 0)
        path = os.path.join(settings.prediction_dir, name)
        with index.IndexWriter(path, shard, 0) as writer:
            writer.add(labels, probs)
        # The file must only exist, because the selection reads the index.
        open(index.prediction_path(settings, shard, 0), "wb").close()

    with concurrent.futures.ThreadPoolExecutor(available_cpus()) as pool:
        for _ in pool.map(make, range(_SHARDS)):
            pass
