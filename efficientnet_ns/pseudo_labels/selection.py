"""Selects the unlabeled images for a student: filtering and balancing (paper section 3.1).

The selection keeps images above a confidence threshold, at most `num_image` per class, the most
confident first. Copies fill classes with fewer images. `exact_rules` implements this rule,
`thresholds` the rule of the original code. The selection reads the index of the predictions in
several passes, each on all cores and in memory that does not grow with the number of images:

  1. `_count`: count the images of each class by confidence, in 101 bins of width 0.01, which are the
     statistics that the original code writes. They determine for each class whether all images get
     the same number of copies, and if not, which bin contains the cut: the last image that is kept.
  2. `_narrowed`: if images differ, each has a key: the bits of its confidence or a random draw.
     Count the keys of the relevant range (the bin or all draws) in 128 parts, one of which contains
     the cut.
  3. `_find_cuts`: gather the few images of that part and sort them. The cut is a key; ties are broken
     by the image's place.
  4. `_write_selection`: compare each image with the cut of its class and write the kept images.

This does not use SQL because DuckDB takes 1.7 times the processor time for the same passes, even
without the draws, for which it lacks arithmetic modulo 2**64.
"""

from __future__ import annotations

import functools
import itertools
import operator
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from absl import logging

from efficientnet_ns.config import ConfigError, SelectConfig, check
from efficientnet_ns.data import tasks
from efficientnet_ns.files import (
    atomic,
    json_files,
    local_files,
    manifests,
    name_lists,
    object_stores,
    reviews,
    tfexamples,
    tfrecords,
)
from efficientnet_ns.files.errors import DataError
from efficientnet_ns.files.shard_names import info_name
from efficientnet_ns.pseudo_labels import index
from efficientnet_ns.pseudo_labels.index import IndexScan, RowChunk

SELECTION = "selection.parquet"
TOTAL, RUNNING_SUM = "total_counts.json", "total_counts_sum.json"
# Version of the function `draws`; increment it if the function changes.
DRAWS = 2
# The settings that determine the selection: the rule and its inputs.
RULE_SETTINGS = (
    *("selection", "num_image", "min_threshold", "max_prob", "upsample", "use_top", "use_all"),
    "seed",
)
_DECISIVE = (*RULE_SETTINGS, "num_shards", "num_label_classes", "only_use_num_shards", "debug")
_ROW_GROUP = 1 << 20


def select(config: SelectConfig) -> dict[str, object]:
    """Writes statistics and the selection; skips verified outputs.

    The statistics are the JSON files of the original code: `prelim_stats_<shard>_<task>.json` per
    shard, `total_counts.json`, and its running sum from the top, `total_counts_sum.json`; each
    {class: [[threshold, count], …]} for thresholds 0.00 … 1.00.

    The selection is a Parquet table (shard, worker, position, label, prob, copies), sorted by the
    first three columns. Ties in confidence go to the lower (shard, position, worker). A class with
    n < num_image images gets num_image // n copies of each, and one more of num_image % n of them,
    drawn by `seed`. With `selection="threshold"`, the rule is that of the original code, with draws
    by `seed`.

    Returns:
      `unique` (images selected), `records` (with copies), `available` (predictions read), and
      `classes`: {class: [lowest kept confidence, images]}.

    Raises:
      ConfigError: If settings do not match each other or the predictions.
      DataError: If predictions are missing or do not match the settings, or none is kept.
      manifests.OutputConflict: If the outputs were made with other settings.
    """
    check(config)
    if config.min_threshold > config.max_prob:
        raise ConfigError(
            f"--min_threshold={config.min_threshold} is above --max_prob={config.max_prob}"
        )
    workers = index.count_workers(config)
    names = _statistics_names(config, workers)
    indexes = index.index_files(config)
    paths = [path for files in indexes.values() for path in files]
    sizes = [size or 0 for size in object_stores.sizes(paths)]
    predictions = manifests.fingerprint(paths, sizes)
    statistics = _statistics_stage(config, predictions, names)
    stage = _selection_stage(config, predictions)
    # First, because it may reject the folder.
    selected = config.only_get_stats or stage.done()
    counted = _are_counted(statistics)
    wanted = statistics if config.only_get_stats else stage
    if selected and counted:
        # Of a process that was killed after another one had finished the same selection.
        atomic.remove_abandoned([wanted.manifest, *wanted.outputs])
        return wanted.counts()
    _check_number_of_classes(config)
    with local_files.local_copies(paths) as local:
        found = {s: [local[path] for path in files] for s, files in indexes.items()}
        scan = IndexScan(found, index.changes(config))
        share = workers // config.total_replicas
        count = functools.partial(_count, scan, config, workers_per_task=share)
        counts = count(save={}) if counted else _write_statistics(statistics, names, count)
        if not config.only_get_stats and not stage.done():
            _write_outputs(scan, counts, config, stage)
    return wanted.counts()


def _selection_stage(config: SelectConfig, predictions: str) -> manifests.Stage:
    settings = {name: getattr(config, name) for name in _DECISIVE}
    settings["predictions"] = predictions
    # Prevents mixing results of two definitions of the draws.
    settings["draws"] = DRAWS
    settings.update(_decisions(config))
    if config.debug == 1:
        settings["shard_id"] = config.shard_id or 0
    names = (SELECTION, "threshold.json", "num_image_across_cat.json")
    outputs = [os.path.join(config.output_dir, name) for name in names]
    return manifests.Stage(f"{outputs[0]}.manifest.json", outputs, settings)


def _decisions(config: SelectConfig) -> dict[str, str]:
    files = {"exclude": [config.exclude], "reviewed": reviews.paths(config.reviewed)}
    return {
        name: ";".join(map(manifests.content_hash, paths))
        for name, paths in files.items()
        if any(paths)
    }


def _check_number_of_classes(config: SelectConfig) -> None:
    # Reads one record to fail early; `write_shard` checks every record that it writes.
    path = index.prediction_path(config, index.shards(config)[0], 0)
    first = next(tfrecords.read(path), None)
    if first is None or first.payload is None:
        return
    classes = len(tfexamples.probabilities(first.payload))
    if classes != config.num_label_classes:
        raise DataError(
            f"{path} contains probabilities of {classes} classes, but "
            f"--num_label_classes={config.num_label_classes}"
        )


EDGES = [k / 100 for k in range(101)]
_LINE = "[" + ", ".join(f"[{edge}, %d]" for edge in EDGES) + "]"


class Counts(NamedTuple):
    """Counts of the first pass.

    Attributes:
      total: int64 [classes, 101], images of each class with EDGES[k] <= prob < EDGES[k + 1].
      eligible: the same, only for images between --min_threshold and --max_prob.
      available: number of predictions, including unreadable images.
    """

    total: np.ndarray
    eligible: np.ndarray
    available: int


def _statistics_names(config: SelectConfig, workers: int) -> dict[tuple[int, int], str]:
    """Maps (shard, task) to the name of its statistics; tasks share a shard's workers evenly."""
    tasks = config.total_replicas
    if workers % tasks:
        raise ConfigError(
            f"--total_replicas={tasks} tasks cannot share the {workers} workers that predicted "
            "each shard evenly"
        )
    if tasks > 1 and config.task >= tasks:
        raise ConfigError(f"--task={config.task} is not below --total_replicas={tasks}")
    numbers = [index.task_number(config)] if tasks == 1 else range(tasks)
    return {
        (shard, place): f"prelim_stats_{shard:05d}_{number}.json"
        for shard in index.shards(config)
        for place, number in enumerate(numbers)
    }


def _statistics_stage(
    config: SelectConfig, predictions: str, names: Mapping[tuple[int, int], str]
) -> manifests.Stage:
    outputs = [
        os.path.join(config.prelim_stats_dir, name)
        for name in (*names.values(), TOTAL, RUNNING_SUM)
    ]
    settings = {
        "predictions": predictions,
        "num_label_classes": config.num_label_classes,
        "num_shards": config.num_shards,
        "only_use_num_shards": config.only_use_num_shards,
        "total_replicas": config.total_replicas,
        "task": index.task_number(config) if config.total_replicas == 1 else None,
        **_decisions(config),
    }
    return manifests.Stage(f"{outputs[-2]}.manifest.json", outputs, settings)


def _are_counted(stage: manifests.Stage) -> bool:
    """Checks whether the statistics are complete; False also if their inputs have changed."""
    noted = manifests.manifest_if_any(stage.manifest)
    if noted is not None and noted["config"] != stage.config:
        # Unlike for a selection, not a conflict: statistics depend only on the predictions.
        old, new = noted["config"], stage.config
        changed = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
        logging.info("%s: %s changed, counting again", stage.manifest, ", ".join(changed))
        return False
    return stage.done()


def _write_statistics(stage: manifests.Stage, names, count: Callable[..., Counts]) -> Counts:
    with stage.write() as (temporary, summary):
        *files, total, running_sum = (temporary[path] for path in stage.outputs)
        counts = count(save=dict(zip(names, files)))
        classes = np.arange(len(counts.total))
        _write_table(total, counts.total, classes)
        _write_table(running_sum, counts.total[:, ::-1].cumsum(1)[:, ::-1], classes)
        summary.update(available=counts.available)
    return counts


def _write_table(path: str, table: np.ndarray, classes: np.ndarray) -> None:
    """Writes `{class: [[edge, count], …]}`, seven times faster than json.dumps."""
    lines = (f'"{c}": {_LINE % tuple(row)}' for c, row in zip(classes, table[classes].tolist()))
    with tf.io.gfile.GFile(path, "w") as f:
        f.write("{" + ", ".join(lines) + "}")


def _count(
    scan: IndexScan,
    config: SelectConfig,
    *,
    workers_per_task: int,
    save: Mapping[tuple[int, int], str],
) -> Counts:
    """Step 1: counts all predictions and writes the statistics of each shard.

    Args:
      workers_per_task: number of workers of a shard that share a statistics file.
      save: (shard, task) → path; other tables are not written.

    Raises:
      DataError: If a label is out of range or the number of predictions is wrong.
    """
    shape = (config.num_label_classes, len(EDGES))
    low, high = _at_least(config.min_threshold), _at_most(config.max_prob)

    def table_of(cells: np.ndarray) -> np.ndarray:
        return np.bincount(cells, minlength=shape[0] * shape[1]).reshape(shape)

    def count_part(chunks: Iterator[RowChunk]):
        """Returns (eligible, task → table, worker → rows) of a part of a shard."""
        fit = np.zeros(shape, np.int64)
        tasks: dict[int, np.ndarray] = {}
        rows: Counter[int] = Counter()
        for chunk in chunks:
            _check_labels(chunk, shape[0])
            # A single index for class and bin, so that one bincount counts both.
            cells = chunk.labels * np.int64(shape[1]) + _bins(chunk.probs)
            fit += table_of(cells[(chunk.probs >= low) & _not_above(chunk, high)])
            task = chunk.worker // workers_per_task
            tasks[task] = tasks.get(task, 0) + table_of(cells)
            rows[chunk.worker] += chunk.size
        return fit, tasks, rows

    total, eligible, available = np.zeros(shape, np.int64), np.zeros(shape, np.int64), 0
    parts = scan.each("counting predictions", count_part)
    for shard, results in itertools.groupby(parts, key=operator.itemgetter(0)):
        tasks = {t: np.zeros(shape, np.int64) for s, t in save if s == shard}
        rows: Counter[int] = Counter()
        for _, (fit, part_tasks, part_rows) in results:
            eligible += fit
            rows += part_rows
            for task, table in part_tasks.items():
                total += table
                if task in tasks:
                    tasks[task] += table
        _check_numbers(config, shard, [rows[w] for w in range(len(scan.files[shard]))])
        available += sum(rows.values())
        for task, table in tasks.items():
            _write_table(save[shard, task], table, np.flatnonzero(table.any(1)))
    return Counts(total, eligible, available)


def _at_least(values) -> np.ndarray:
    """Returns the smallest float32 not below each float64.

    Comparing float32 values with it is as exact as comparing in float64, but cheaper.
    """
    values = np.asarray(values, np.float64)
    near = values.astype(np.float32)
    return np.where(near.astype(np.float64) < values, np.nextafter(near, np.float32(np.inf)), near)


def _at_most(values) -> np.ndarray:
    """Returns the largest float32 not above each float64."""
    return -_at_least(-np.asarray(values, np.float64))


def _not_above(chunk: RowChunk, highest: np.ndarray) -> np.ndarray:
    """Checks which probabilities are not above `highest`, bool [N]; labels by a person never are."""
    return (chunk.probs <= highest) | chunk.decided


_LEAST_OF_BIN = _at_least([*EDGES, np.inf])


def _bins(probs: np.ndarray) -> np.ndarray:
    """Returns k of the last edge k/100 not above each probability (in float64), int32 [N]."""
    # The float32 product may be off by one bin; the bounds correct it.
    bins = (probs * np.float32(100)).astype(np.int32).clip(0, 100)
    bins += probs >= _LEAST_OF_BIN[bins + 1]
    bins -= probs < _LEAST_OF_BIN[bins]
    return bins


def _check_labels(chunk: RowChunk, num_classes: int) -> None:
    highest = chunk.labels.max(initial=-1)
    if highest >= num_classes:
        raise DataError(
            f"a prediction of shard {chunk.shard} has the label {highest}, which is not below "
            f"--num_label_classes={num_classes}"
        )


def _check_numbers(config: SelectConfig, shard: int, rows: Sequence[int]) -> None:
    """Compares each worker's number of predictions with its file in --info_dir, if given."""
    for worker, found in enumerate(rows if config.info_dir else ()):
        path = os.path.join(config.info_dir, info_name(shard, config.num_shards, worker))
        noted = json_files.read_object_if_any(path, "image_num")
        if noted is None:
            raise DataError(f"{path} is missing: predict that shard first")
        expected = noted["image_num"]
        if found != expected:
            raise DataError(
                f"worker {worker} predicted {found} records of shard {shard}, but {path} has "
                f"{expected}: predict that shard again"
            )


_ALIKE, _BY_PROB, _BY_DRAW = 0, 1, 2
_PART_BITS = 7  # 128 parts of a range of keys; a larger table would not fit in the cache.
_ROWS_SORTED_AT_ONCE = 8_000_000  # Bounds memory if many keys are equal.
_IMAGE = np.dtype(
    [("key", "i8"), ("shard", "i4"), ("position", "i8"), ("worker", "i4"), ("label", "i4")]
)
# Lower keys are first; equal keys are ordered by the place of the image.
_ORDER = ("key", "shard", "position", "worker")


_CLASS_RULE = np.dtype(
    [
        ("least", "f8"),  # The lowest probability kept.
        ("kind", "i4"),  # The key that orders the images; _ALIKE: all get the same copies.
        ("cut", _IMAGE),  # The last image that gets `first` copies.
        ("first", "i4"),  # Copies of each image up to the cut.
        ("others", "i4"),  # Copies of each other image.
        ("fraction", "f8"),  # Probability of an additional copy.
    ]
)


class Rules:
    """Rules for the number of copies kept of each image; initially zero.

    Attributes:
      seed: seed of the draws.
      highest: the highest probability kept of predicted labels, float32.
      of_class: `_CLASS_RULE` [classes].
    """

    def __init__(self, config: SelectConfig):
        self.seed, self.highest = config.seed, _at_most(config.max_prob)
        self.of_class = np.zeros(config.num_label_classes, _CLASS_RULE)
        self.of_class["least"] = np.inf

    def __getitem__(self, name: str) -> np.ndarray:
        """Returns a field of all classes."""
        return self.of_class[name]

    def keys(self, chunk: RowChunk, rows: np.ndarray) -> np.ndarray:
        """Returns keys int64 [rows] of images whose class is not _ALIKE; lower keys are first."""
        # Interpreted as integers, the bits of positive floats sort like the floats.
        keys = -chunk.probs[rows].view(np.int32).astype(np.int64)
        drawn = np.flatnonzero(self["kind"][chunk.labels[rows]] == _BY_DRAW)
        positions = chunk.positions[rows[drawn]]
        keys[drawn] = draws(self.seed, chunk.shard, chunk.worker, positions)
        return keys


def splitmix64(values: np.ndarray) -> np.ndarray:
    """Applies the output function of SplitMix64 (Steele et al. 2014), a bijection of uint64 [N].

    Hashing the identity of a draw makes it independent of the order of computation.
    """
    # Sums and products are modulo 2**64; NumPy warns about this only for scalars.
    with np.errstate(over="ignore"):
        values = values + np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def draws(seed: int, shard: int, worker: int, positions: np.ndarray) -> np.ndarray:
    """Draws int64 [N] in [0, 2**63): mix(mix(mix(mix(seed) + shard) + worker) + position).

    There is one draw per image. Sums are modulo 2**64, mix is splitmix64, and the lowest bit is
    dropped.
    """
    state = splitmix64(np.array([seed % 2**64], np.uint64))
    for value in (shard, worker):
        state = splitmix64(state + np.uint64(value))
    return (splitmix64(state + positions.astype(np.uint64)) >> np.uint64(1)).astype(np.int64)


class _KeyRange(NamedTuple):
    """The range of keys that contains the cut of each class; int64 arrays [classes].

    Attributes:
      low, high: the lowest and highest key, inclusive; low > high if there is no cut.
      places: rank of the cut within the range, from 1.
    """

    low: np.ndarray
    high: np.ndarray
    places: np.ndarray


def exact_rules(scan: IndexScan, counts: Counts, config: SelectConfig) -> Rules:
    """Keeps the num_image most confident images per class; seeded copies fill smaller classes."""
    # Differs (1) in docs/differences.md: exactly the top images, and copies drawn by a seed.
    rules, wanted = Rules(config), config.num_image
    n = len(rules["least"])
    # Ranges are initially empty: without a cut, all images of a class get the same copies.
    keys = _KeyRange(np.zeros(n, np.int64), np.full(n, -1), np.zeros(n, np.int64))
    from_top = counts.eligible[:, ::-1].cumsum(1)[:, ::-1]
    for label, size in enumerate(counts.eligible.sum(1).tolist()):
        if not size or not (wanted or config.use_all):
            continue
        rules["least"][label] = config.min_threshold
        if config.use_all or size == wanted or (size < wanted and not config.upsample):
            rules["others"][label] = 1
        elif size > wanted and config.use_top:
            # The highest bin that, with the bins above it, contains enough images.
            k = int(np.flatnonzero(from_top[label] >= wanted)[-1])
            rules["kind"][label], rules["first"][label] = _BY_PROB, 1
            keys.low[label], keys.high[label] = _keys_of_bin(k)
            # From this bin, the number still missing after the bins above it.
            keys.places[label] = wanted - (from_top[label, k] - counts.eligible[label, k])
        else:
            # Copies if there are too few images; a random subset, with quotient 0, if too many.
            rules["others"][label], rest = divmod(wanted, size)
            rules["first"][label] = rules["others"][label] + 1
            if rest:
                rules["kind"][label] = _BY_DRAW
                keys.high[label], keys.places[label] = 2**63 - 1, rest
    if rules["kind"].any():
        _find_cuts(scan, rules, _narrowed(scan, rules, keys))
    return rules


def _keys_of_bin(k: int) -> tuple[int, int]:
    """Returns the lowest and highest key of a bin's probabilities; keys are negated bits."""
    low, high = (_LEAST_OF_BIN[k : k + 2]).view(np.int32).tolist()
    return 1 - high, -low


def _between(rules: Rules, keys: _KeyRange, chunk: RowChunk) -> tuple[np.ndarray, np.ndarray]:
    """Returns (rows, keys) of a chunk's images whose keys are in the range of their class."""
    # First filters by probability, which is cheap, so that only few images require keys.
    floor, ceiling = _at_least(rules["least"]), np.full(len(rules["least"]), rules.highest)
    by_prob = rules["kind"] == _BY_PROB
    for bound, key, narrower in ((floor, keys.high, np.maximum), (ceiling, keys.low, np.minimum)):
        # Keys are negated bits, so the highest key is the lowest probability.
        bits = -key[by_prob].astype(np.int32)
        bound[by_prob] = narrower(bound[by_prob], bits.view(np.float32))
    floor[rules["kind"] == _ALIKE] = np.inf
    labels = chunk.labels
    rows = np.flatnonzero((chunk.probs >= floor[labels]) & _not_above(chunk, ceiling[labels]))
    found, labels = rules.keys(chunk, rows), labels[rows]
    inside = (found >= keys.low[labels]) & (found <= keys.high[labels])
    return rows[inside], found[inside]


def _narrowed(scan: IndexScan, rules: Rules, keys: _KeyRange) -> _KeyRange:
    """Step 2: finds the part of each range, of up to 128, that contains the cut."""
    width = (keys.high - keys.low).clip(0).tolist()
    # A part has 2**shift keys, the smallest power of two that results in at most 128 parts.
    shift = np.array([max(w.bit_length() - _PART_BITS, 0) for w in width], np.int64)
    shape = (len(shift), 1 << _PART_BITS)

    def count(chunks: Iterator[RowChunk]) -> np.ndarray:
        table = np.zeros(shape, np.int64)
        for chunk in chunks:
            rows, found = _between(rules, keys, chunk)
            labels = chunk.labels[rows]
            cell = labels.astype(np.int64) * shape[1] + (
                (found - keys.low[labels]) >> shift[labels]
            )
            table += np.bincount(cell, minlength=table.size).reshape(shape)
        return table

    table = np.zeros(shape, np.int64)
    for _, found in scan.each("narrowing the cut", count):
        table += found
    # [classes, 128]: images up to the end of each part. The first with enough contains the cut.
    upto = table.cumsum(1)
    part = (upto < keys.places[:, None]).sum(1).clip(0, shape[1] - 1)
    before = (upto - table)[np.arange(shape[0]), part]
    low = keys.low + (part << shift)
    high = np.minimum(low + ((1 << shift) - 1), keys.high)
    return _KeyRange(low, high, keys.places - before)


def _find_cuts(scan: IndexScan, rules: Rules, keys: _KeyRange) -> None:
    """Step 3: sorts the images of the ranges and sets the cuts."""

    def gather(chunks: Iterator[RowChunk]) -> np.ndarray:
        found = [np.zeros(0, _IMAGE)]
        for chunk in chunks:
            rows, key = _between(rules, keys, chunk)
            images = np.zeros(len(rows), _IMAGE)
            images["key"], images["label"] = key, chunk.labels[rows]
            images["shard"], images["worker"] = chunk.shard, chunk.worker
            images["position"] = chunk.positions[rows]
            found.append(images)
        return np.concatenate(found)

    waiting, size = [], 0
    for _, found in scan.each("sorting at the cut", gather):
        waiting.append(found)
        size += len(found)
        if size > _ROWS_SORTED_AT_ONCE:
            waiting, size = [_first(waiting, keys.places)], 0
    first = _first(waiting, keys.places)
    # If a label repeats, NumPy keeps the last assignment: the last image is the cut.
    rules["cut"][first["label"]] = first


def _first(tables: Sequence[np.ndarray], places: np.ndarray) -> np.ndarray:
    """Returns the first `places` images of each class, ordered by `_ORDER`."""
    table = np.concatenate(tables)
    # The last column is the primary key.
    table = table[np.lexsort([table[name] for name in (*reversed(_ORDER), "label")])]
    starts = np.searchsorted(table["label"], np.arange(len(places)))
    place = np.arange(len(table)) - starts[table["label"]]
    return table[place < places[table["label"]]]


def thresholds(counts: Counts, config: SelectConfig) -> dict[int, tuple[float, int]]:
    """Returns class → (lowest confidence, images at or above it) by the rule of the original code.

    The lowest confidence is the first edge, from the highest bin below --max_prob down, with
    --num_image images at or above it, else --min_threshold.

    Raises:
      ConfigError: If the rule requires a bin that begins at --min_threshold and there is none.
    """
    chosen = {}
    # Below 1, only labels by a person are eligible in the last bin, which the loop leaves out.
    certain = counts.eligible[:, -1] * (config.max_prob < 1)
    for label, (images, bins) in enumerate(zip(certain.tolist(), counts.total.tolist())):
        for edge, count in zip(reversed(EDGES), reversed(bins)):
            if not config.min_threshold <= edge < config.max_prob:
                continue
            images += count
            enough = config.use_top and not config.use_all and images >= config.num_image
            if enough or edge == config.min_threshold:
                chosen[label] = (edge, images)
                break
        else:
            raise ConfigError(
                f"--min_threshold={config.min_threshold}: --selection=threshold needs a multiple "
                f"of 0.01 below --max_prob={config.max_prob}, since class {label} has fewer than "
                f"{config.num_image} images"
            )
    return chosen


def threshold_rules(chosen: dict[int, tuple[float, int]], config: SelectConfig) -> Rules:
    """Keeps num_image / images copies; the fraction is the probability of an additional copy."""
    rules = Rules(config)
    for label, (edge, images) in chosen.items():
        copies = 1.0 if config.use_all else config.num_image / images if images else 0.0
        if not config.upsample:
            copies = min(copies, 1.0)
        rules["least"][label], rules["others"][label] = edge, int(copies)
        rules["fraction"][label] = copies - int(copies)
    return rules


COLUMNS = {**index.COLUMNS, "copies": np.int32}


def _kept(rules: Rules, chunk: RowChunk) -> dict[str, np.ndarray]:
    """Returns the kept rows of a chunk: `COLUMNS`, in the order of the chunk."""
    labels, probs = chunk.labels, chunk.probs
    least = _at_least(rules["least"])
    rows = np.flatnonzero((probs >= least[labels]) & _not_above(chunk, rules.highest))
    labels, positions = labels[rows], chunk.positions[rows]
    copies = rules["others"][labels]
    unlike = np.flatnonzero(rules["kind"][labels])
    before = unlike[_before_cut(rules, chunk, rows[unlike])]
    copies[before] = rules["first"][labels[before]]
    split = np.flatnonzero(rules["fraction"][labels] > 0)
    if len(split):
        # In [0, 1], including 1, because the highest 63-bit draws round up.
        draw = draws(rules.seed, chunk.shard, chunk.worker, positions[split]) / 2.0**63
        copies[split] += draw < rules["fraction"][labels[split]]
    some = np.flatnonzero(copies)
    shard, worker = (np.full(len(some), n, np.int32) for n in (chunk.shard, chunk.worker))
    columns = (shard, worker, positions[some], labels[some], probs[rows[some]], copies[some])
    return dict(zip(COLUMNS, columns))


def _before_cut(rules: Rules, chunk: RowChunk, rows: np.ndarray) -> np.ndarray:
    """Checks which images are at or before the cut of their class, bool [rows]."""
    labels, keys = chunk.labels[rows], rules.keys(chunk, rows)
    limit = rules["cut"]["key"][labels]
    before = keys < limit
    # Only few images have the key of the cut.
    for row in np.flatnonzero(keys == limit).tolist():
        place = (chunk.shard, int(chunk.positions[rows[row]]), chunk.worker)
        before[row] = place <= rules["cut"][labels[row]].item()[1:4]
    return before


def class_names_of(config: SelectConfig) -> Sequence[str]:
    """Returns a name per class; the class index if the task is unknown."""
    names = tasks.class_names(config.task_name) if config.task_name else None
    return names or [str(label) for label in range(config.num_label_classes)]


def _write_outputs(
    scan: IndexScan, counts: Counts, config: SelectConfig, stage: manifests.Stage
) -> None:
    original = config.selection == "threshold"
    # First, because it may reject the settings.
    chosen = thresholds(counts, config) if original else {}
    with stage.write() as (temporary, summary):
        selection, threshold_path, total = (temporary[path] for path in stage.outputs)
        rules = threshold_rules(chosen, config) if original else exact_rules(scan, counts, config)
        rows = _write_selection(scan, rules, selection)
        if not rows:
            raise DataError(
                f"none of {counts.available} predictions is kept with --min_threshold="
                f"{config.min_threshold}, --max_prob={config.max_prob} and "
                f"--num_image={config.num_image}: set a lower --min_threshold"
            )
        summary.update(
            available=counts.available,
            unique=sum(n for _, _, n, _ in rows),
            records=sum(copies for *_, copies in rows),
            classes={str(label): [lowest, n] for label, lowest, n, _ in rows},
        )
        empty = sorted(set(range(config.num_label_classes)) - {label for label, *_ in rows})
        if empty:
            names = class_names_of(config)
            logging.warning(
                "%d of %d classes have no image at or above --min_threshold=%s: %s",
                *(len(empty), config.num_label_classes, config.min_threshold),
                name_lists.shortened([names[label] for label in empty]),
            )
        # Differs (2) in docs/differences.md: the lowest kept confidence and the number of images kept.
        content = {str(c): entry for c, entry in chosen.items()} or summary["classes"]
        json_files.write_json(threshold_path, content)
        across = sum(min(images, config.num_image) for _, images in chosen.values())
        # The key is misspelled in the original code, and its readers expect this spelling.
        across_classes = {"num_image_acorss_cat": across if original else summary["unique"]}
        json_files.write_json(total, across_classes)


def _write_selection(scan: IndexScan, rules: Rules, path: str) -> list[tuple[int, float, int, int]]:
    """Step 4: writes a Parquet file with one shard per row group, so readers can skip the others.

    Returns:
      (label, lowest probability, images, copies) of the classes with images.
    """
    import pyarrow
    import pyarrow.parquet

    schema = index.schema(COLUMNS)
    classes = len(rules["least"])
    lowest = np.full(classes, np.inf, np.float32)
    images, copies = np.zeros(classes, np.int64), np.zeros(classes, np.int64)
    with (
        local_files.FileSink(path) as sink,
        pyarrow.parquet.ParquetWriter(
            sink,
            schema,
            compression="zstd",
            # Positions ascend, so their differences are small; floats compress well if bytes of
            # equal significance are grouped.
            use_dictionary=["shard", "worker", "label", "copies"],
            column_encoding={"position": "DELTA_BINARY_PACKED", "prob": "BYTE_STREAM_SPLIT"},
        ) as writer,
    ):
        parts = scan.each(
            "writing the selection", lambda chunks: [_kept(rules, chunk) for chunk in chunks]
        )
        for table in itertools.chain.from_iterable(tables for _, tables in parts):
            labels = table["label"]
            if not len(labels):
                continue
            # Not `lowest[labels] = …`, which would use only one of several images of a class.
            np.minimum.at(lowest, labels, table["prob"])
            images += np.bincount(labels, minlength=classes)
            copies += np.bincount(labels, table["copies"], classes).astype(np.int64)
            writer.write_table(pyarrow.table(table, schema), row_group_size=_ROW_GROUP)
    found = np.flatnonzero(images)
    return list(zip(*(x[found].tolist() for x in (np.arange(classes), lowest, images, copies))))
