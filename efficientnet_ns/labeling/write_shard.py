"""One file of balanced, pseudo-labeled records: images and predictions of a shard, as selected.

Memory does not grow with the shard: the selection, the images and the predictions are read side by
side in the order of the images, and the copies are shuffled through a temporary file.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from efficientnet_ns.config import SelectConfig
from efficientnet_ns.data import framing, manifests, records, wire
from efficientnet_ns.labeling import select, shuffle

_ROWS = 1 << 14  # Of the selection, held at a time.
_RUN_BYTES = 32 << 20  # Of images, held at a time.
_IMAGE_BYTES = 256  # What an image takes in a run beside its bytes.
_WRITE_BYTES = 8 << 20
_SORT_MEMORY = "128MB"  # Of the selection of a shard, which is sorted by image; beyond, on disk.


class Lost(RuntimeError):
    """Records written are not the records selected."""


def stage(config: SelectConfig, selection_hash: str, shard: int) -> manifests.Stage:
    """Outputs (records, statistics) and manifest of a shard.

    Raises:
      records.DataError: the unlabeled shard is missing.
    """
    task = select.task_number(config)
    data = os.path.join(
        config.output_dir, "data", records.pseudo_label_name(task, shard, config.num_shards)
    )
    stats = os.path.join(config.output_dir, "stats", f"stats_{shard:05d}_{task}.json")
    source = select.input_path(config, shard)
    if not tf.io.gfile.exists(source):
        raise records.DataError(f"shard {source} is missing (check --file_prefix and --num_shards)")
    settings = {
        "selection": selection_hash,
        "input": manifests.fingerprint([source]),
        "seed": config.seed,
        "order": shuffle.ORDER,
    }
    manifest = os.path.join(config.output_dir, "stats", f"manifest_{shard:05d}_{task}.json")
    return manifests.Stage(manifest, [data, stats], settings)


def write_shard(
    config: SelectConfig,
    selection: str,
    stage: manifests.Stage,
    shard: int,
    workers: int,
    progress: Callable[[int], None],
) -> None:
    """Writes the records of a shard, reads them back, and commits them with their statistics.

    Args:
      selection: the file of `select.select`, on this machine.
      workers: how many predicted the shard.
      progress: is told how many more selected images were read.

    Raises:
      records.DataError: a selected record cannot be read, or is not the one that was selected.
      Lost: records selected, written and read back differ, in all or in a class.
    """
    db = select.connect(selection=[selection])
    db.execute("SET threads = 1")
    db.execute(f"SET memory_limit = '{_SORT_MEMORY}'")
    selected = Counter(
        dict(
            db.execute(
                "SELECT label, sum(copies)::BIGINT FROM selection WHERE shard = $1 GROUP BY label",
                [shard],
            ).fetchall()
        )
    )
    data_path, stats_path = stage.outputs
    with stage.write() as (temporary, counts):
        with shuffle.Shuffle(sum(selected.values())) as shuffled:
            for run in _runs(config, db, shard, workers):
                place = shuffle.places(config.seed, shard, run.image, run.copies)
                shuffled.add(run.frames, run.image, run.copies, place)
                progress(len(run.frames))
                del run  # It would be held beside the next one.
            written = _write(temporary[data_path], shuffled.sorted())
        read_back = _labels(temporary[data_path])
        _check_conservation(data_path, selected, written, read_back)
        per_class = {str(label): copies for label, copies in read_back.items()}
        manifests.write_json(temporary[stats_path], dict(sorted(per_class.items())))
        counts.update(records=written)


def _write(path: str, frames: Iterator[bytes]) -> int:
    """Writes a TFRecord file from whole frames; returns how many."""
    total = size = 0
    held: list[bytes] = []
    with tf.io.gfile.GFile(path, "wb") as f:
        for frame in frames:
            held.append(frame)
            size += len(frame)
            if size >= _WRITE_BYTES:
                f.write(b"".join(held))
                total, size, held = total + len(held), 0, []
        f.write(b"".join(held))
    return total + len(held)


def _labels(path: str) -> Counter[int]:
    """How many records of each label a file holds; damaged ones count for none."""
    found: Counter[int] = Counter()
    with framing.Scanner(path) as scanner:
        while (record := scanner.take()) is not None:
            if record.payload is not None:
                found[records.label(record.payload)] += 1
    return found


def _check_conservation(path: str, selected: Counter, written: int, read_back: Counter) -> None:
    total, back = sum(selected.values()), sum(read_back.values())
    if not total == written == back:
        raise Lost(f"{path}: {total} records selected, {written} written, {back} read back")
    for label in selected | read_back:
        if selected[label] != read_back[label]:
            raise Lost(
                f"{path}: {selected[label]} records of class {label} selected, "
                f"{read_back[label]} read back"
            )


# --- Reading --------------------------------------------------------------------------------------


class _Choice(NamedTuple):
    """A selected image: its number in the shard, pseudo label and probability, and its copies."""

    image: int
    label: int
    prob: float
    copies: int


class _Run(NamedTuple):
    """Some selected images as they are written, with their numbers and copies, each [N]."""

    frames: list[bytes]
    image: np.ndarray
    copies: np.ndarray


def _choices(db, shard: int, workers: int) -> Iterator[_Choice]:
    """The selection of a shard in the order of its images."""
    cursor = db.execute(
        "SELECT position * $1 + worker AS image, label, prob, copies FROM selection "
        "WHERE shard = $2 ORDER BY image",
        [workers, shard],
    )
    while rows := cursor.fetchmany(_ROWS):
        yield from map(_Choice._make, rows)


def _runs(config: SelectConfig, db, shard: int, workers: int) -> Iterator[_Run]:
    frames: list[bytes] = []
    chosen: list[tuple[int, int]] = []
    size = 0
    for choice, example in _examples(config, db, shard, workers):
        frames.append(wire.frame(example))
        chosen.append((choice.image, choice.copies))
        size += len(frames[-1]) + _IMAGE_BYTES
        if size >= _RUN_BYTES:
            yield _Run(frames, *np.array(chosen, np.int64).T)
            frames, chosen, size = [], [], 0
    if frames:
        yield _Run(frames, *np.array(chosen, np.int64).T)


def _examples(
    config: SelectConfig, db, shard: int, workers: int
) -> Iterator[tuple[_Choice, bytes]]:
    """The selected images of a shard as pseudo-labeled records, in the order of the shard."""
    paths = [select.prediction_path(config, shard, worker) for worker in range(workers)]
    source = select.input_path(config, shard)
    samples = _Samples(config, shard)
    with contextlib.ExitStack() as opened:
        images = opened.enter_context(framing.Scanner(source))
        predictions = [opened.enter_context(framing.Scanner(path)) for path in paths]
        for choice in _choices(db, shard, workers):
            # Image i was predicted by worker i mod workers.
            worker = choice.image % workers
            image = _feature(images, source, choice.image, records.IMAGE)
            probs = _feature(
                predictions[worker], paths[worker], choice.image // workers, records.PROBABILITIES
            )
            if image is None or probs is None:
                break  # Their numbers differ.
            _check_prediction(config, framing.Floats(probs), choice, paths[worker], workers)
            if samples.wanted(choice.label):
                samples.keep(framing.bytes_value(image), choice.label, choice.prob)
            yield (
                choice,
                framing.pseudo_labeled_example(image, probs, choice.label, choice.prob),
            )
        images.skip()
        for scanner, path in zip(predictions, paths):
            scanner.skip()
            _check_number(images.position, scanner.position, source, path, paths)


def _feature(scanner: framing.Scanner, path: str, position: int, key: str) -> bytes | None:
    """A Feature of the record at a position of a file; None if the file ends before it."""
    scanner.skip(position - scanner.position)
    record = scanner.take()
    if record is None:
        return None
    try:
        if record.payload is None:
            raise records.DataError(record.problem)
        feature = framing.feature(record.payload, key)
        if not feature:
            raise records.DataError(f"the record has no {key!r}")
    except records.DataError as e:
        raise records.DataError(f"{path}, record {position}: {e}") from e
    return feature


def _check_prediction(
    config: SelectConfig, probs: framing.Floats, choice: _Choice, path: str, workers: int
) -> None:
    if len(probs) != config.num_label_classes or probs[choice.label] != choice.prob:
        raise records.DataError(
            f"{path}, record {choice.image // workers} is not what was selected from: "
            "delete its index and the selection, and select again"
        )


def _check_number(images: int, predictions: int, source: str, path: str, paths: list[str]) -> None:
    """Raises DataError unless every image of a worker has its prediction, and nothing else has."""
    worker, workers = paths.index(path), len(paths)
    expected = len(range(worker, images, workers))
    if predictions < expected:
        raise records.DataError(
            f"{path} ends before image {predictions * workers + worker} of the shard: predict it "
            "again, or give the total_replicas of the prediction as --total_label_replicas "
            f"(now {workers})"
        )
    if predictions > expected:
        raise records.DataError(
            f"{path} has more predictions than {source} has images for {workers} workers"
        )


class _Samples:
    """Keeps a few pictures per class as files that people can open."""

    def __init__(self, config: SelectConfig, shard: int):
        self._folder = os.path.join(config.output_dir, "samples")
        self._task, self._shard, self._limit = select.task_number(config), shard, config.num_samples
        self._kept: Counter[int] = Counter()

    def wanted(self, label: int) -> bool:
        """Whether a class has too few yet."""
        return self._kept[label] < self._limit

    def keep(self, image: bytes, label: int, prob: float) -> None:
        """Writes the picture."""
        folder = os.path.join(self._folder, str(label))
        tf.io.gfile.makedirs(folder)
        name = f"image_{self._shard}_{self._task}_{self._kept[label]}_{prob:.4f}.jpeg"
        self._kept[label] += 1
        with tf.io.gfile.GFile(os.path.join(folder, name), "wb") as f:
            f.write(image)
