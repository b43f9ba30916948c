"""How confident the teacher is: images per class and 0.01-wide bin of confidence."""

from __future__ import annotations

import functools
import itertools
import operator
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from efficientnet_ns.config import SelectConfig
from efficientnet_ns.data import manifests, records
from efficientnet_ns.labeling.scan import Scan, Span, pieces

EDGES = [k / 100 for k in range(101)]
_EDGES = np.array(EDGES)
_NEXT_EDGES = np.array([*EDGES[1:], np.inf])
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
    tasks = {shard: [t for s, t in save if s == shard] for shard in scan.files}

    # Bins all of whose images pass; only in the others each is compared.
    whole = (config.min_threshold <= _EDGES) & (_NEXT_EDGES <= config.max_prob)
    partial = ~whole & (_NEXT_EDGES > config.min_threshold) & (_EDGES <= config.max_prob)

    def group(shard: int, spans: Sequence[Span]):
        found, fit = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        tables = {task: np.zeros(shape, np.int64) for task in tasks[shard]}
        rows = np.zeros(len(scan.files[shard]), np.int64)
        for piece in pieces(spans):
            _check_labels(shard, piece.labels, shape[0])
            rows[piece.worker] += piece.size
            bins = _bins(piece.probs)
            place = piece.labels * np.int64(shape[1]) + bins
            table = _table(place, shape)
            found += table
            rest = np.flatnonzero(partial[bins])
            fit += table * whole + _table(place[rest[fits(piece.probs[rest], config)]], shape)
            if (task := piece.worker // workers_per_task) in tables:
                tables[task] += table
        return found, fit, tables, rows

    def counted():
        for shard, (found, fit, *rest) in scan.each("counting predictions", group):
            np.add(total, found, out=total)
            np.add(eligible, fit, out=eligible)
            yield shard, rest

    for shard, parts in itertools.groupby(counted(), key=operator.itemgetter(0)):
        tables, rows = functools.reduce(_joined, (rest for _, rest in parts))
        _check_numbers(shard, rows.tolist(), images)
        for task, table in tables.items():
            _write(save[shard, task], table, np.flatnonzero(table.any(1)))
        available += int(rows.sum())
    return Counts(total, eligible, available)


def _joined(counts, more):
    """The counts by task and by worker of two parts of a shard."""
    tables = {task: table + more[0][task] for task, table in counts[0].items()}
    return tables, counts[1] + more[1]


def _table(place: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    return np.bincount(place, minlength=shape[0] * shape[1]).reshape(shape)


def fits(probs: np.ndarray, config: SelectConfig) -> np.ndarray:
    """Which probabilities --min_threshold and --max_prob let pass, compared in float64."""
    # Arrays: NumPy below 2 compares with a scalar in float32.
    low, high = np.float64([config.min_threshold]), np.float64([config.max_prob])
    return (probs >= low) & (probs <= high)


def at_least(values: np.ndarray) -> np.ndarray:
    """The least float32 that is not below a float64: comparing with it is as exact, and cheaper."""
    near = values.astype(np.float32)
    return np.where(near.astype(np.float64) < values, np.nextafter(near, np.float32(np.inf)), near)


def _bins(probs: np.ndarray) -> np.ndarray:
    """The last edge k/100 that is not above prob, as if compared in float64: int32 [N]."""
    bins = (probs * np.float32(100)).astype(np.int32).clip(0, 100)
    bins += probs >= _LEAST[bins + 1]
    bins -= probs < _LEAST[bins]
    return bins


_LEAST = at_least(np.array([*EDGES, np.inf]))


def _check_labels(shard: int, labels: np.ndarray, num_classes: int) -> None:
    highest = labels.max(initial=-1)
    if highest >= num_classes:
        raise records.DataError(
            f"a prediction of shard {shard} has the label {highest}, which is not below "
            f"--num_label_classes={num_classes}"
        )


def _check_numbers(shard: int, rows: Sequence[int], images: Mapping[tuple[int, int], int]) -> None:
    for worker, found in enumerate(rows):
        expected = images.get((shard, worker), found)
        if found != expected:
            raise records.DataError(
                f"the predictions of shard {shard} by worker {worker} are {found} records, but its "
                f"file in --info_dir says {expected}: predict that shard again"
            )


def write_totals(counts: Counts, total: str, running_sum: str) -> None:
    """Writes the counts of all shards, and their sums from the highest bin down."""
    classes = np.arange(len(counts.total))
    _write(total, counts.total, classes)
    _write(running_sum, counts.total[:, ::-1].cumsum(1)[:, ::-1], classes)


def _texts(lines: Sequence[str]) -> np.ndarray:
    """uint8 [lines, longest], filled with zeros."""
    width = max(map(len, lines))
    return np.frombuffer("".join(x.ljust(width, "\0") for x in lines).encode(), np.uint8).reshape(
        len(lines), width
    )


def _write(path: str, table: np.ndarray, classes: Sequence[int]) -> None:
    """`{class: [[edge, count], …]}`, for the edges 0.00 … 1.00.

    A million of pairs are laid out in columns of equal width, and what is unused is squeezed out.
    """
    import tensorflow as tf

    text = b""
    if len(classes):
        rows = table[classes]
        before, after = _texts([f"[{edge}, " for edge in EDGES]), _texts(["], "])[0]
        digits = len(str(rows.max()))
        width = before.shape[1] + digits + len(after)
        pairs = np.zeros((len(rows), len(EDGES), width), np.uint8)
        pairs[:, :, : before.shape[1]] = before
        pairs[:, :, -len(after) :] = after
        pairs[:, -1, -len(after) + 1 :] = 0
        for k in range(digits):
            digit = 48 + rows % 10
            pairs[:, :, before.shape[1] + digits - 1 - k] = digit if k == 0 else digit * (rows > 0)
            rows = rows // 10
        names = _texts([f'"{c}": [' for c in classes])
        ends = _texts(["], "] * (len(classes) - 1) + ["]"])
        flat = np.concatenate([names, pairs.reshape(len(classes), -1), ends], axis=1)
        text = flat[flat != 0].tobytes()
    with tf.io.gfile.GFile(path, "wb") as f:
        f.write(b"{" + text + b"}")


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
