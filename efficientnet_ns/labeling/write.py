"""Balanced, pseudo-labeled records from a selection (arXiv 1911.04252, algorithm 1, step 3).

One output file per shard of the unlabeled set, in the original's format and with its side files:
statistics and sample pictures per class. Copies are physical copies, spread by the shuffle.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from efficientnet_ns.config import SelectConfig
from efficientnet_ns.data import manifests, records
from efficientnet_ns.labeling import select
from efficientnet_ns.progress import Progress

_BUFFER = 10000  # Records held to shuffle from; bounds memory.


class Lost(RuntimeError):
    """Records written are not the records selected."""


def write(config: SelectConfig, shards: Sequence[int] | None = None) -> dict[str, int]:
    """Writes the selected records of shards; finished shards are verified and skipped.

    Args:
      shards: numbers of the shards to write, default all; other runs may write the rest.

    Returns:
      `records` written, over the shards asked for.

    Raises:
      records.DataError: a selected record cannot be read.
      Lost: counts of selected, written and read-back records differ.
    """
    workers = select.count_workers(config)
    selection = os.path.join(config.output_dir, select.SELECTION)
    if not tf.io.gfile.exists(selection):
        raise records.DataError(f"{selection} is missing: run the selection first")
    db = select.connect(selection=[selection])
    selection_hash = manifests.content_hash(selection)
    everything = {s: _stage(config, selection_hash, s) for s in select.shards(config)}
    shards = list(everything if shards is None else shards)
    with Progress(len(shards), "writing balanced records", "shards") as progress:
        for shard in shards:
            if not everything[shard].done():
                _write_shard(db, config, everything[shard], shard, workers)
            progress.update(1)
    if all(stage.done() for stage in everything.values()):
        _write_final_stats(config, everything.values())
        records.note_counts([stage.outputs[0] for stage in everything.values()])
    total = sum(everything[shard].counts()["records"] for shard in shards)
    query = "SELECT coalesce(sum(copies), 0) FROM selection WHERE list_contains($1, shard)"
    (selected,) = db.execute(query, [shards]).fetchone()
    if total != selected:
        raise Lost(f"{selected} records were selected, but {total} written to {config.output_dir}")
    return {"records": total}


def _stage(config: SelectConfig, selection_hash: str, shard: int) -> manifests.Stage:
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
    }
    manifest = os.path.join(config.output_dir, "stats", f"manifest_{shard:05d}_{task}.json")
    return manifests.Stage(manifest, [data, stats], settings)


def _write_shard(db, config: SelectConfig, stage, shard: int, workers: int) -> None:
    rows = db.execute(
        "SELECT position * $1 + worker, label, prob, copies FROM selection WHERE shard = $2",
        [workers, shard],
    ).fetchall()
    chosen = {index: _Choice(label, prob, copies) for index, label, prob, copies in rows}
    samples = _Samples(config, shard)
    per_class: Counter[str] = Counter()
    rng = np.random.default_rng([config.seed, shard])
    with stage.write() as (temporary, counts):
        data_path, stats_path = stage.outputs

        def balanced() -> Iterator[bytes]:
            for example, label, copies in _selected(config, shard, workers, chosen, samples):
                per_class[str(label)] += copies
                for _ in range(copies):
                    yield example

        written = records.write(temporary[data_path], _shuffled(balanced(), rng))
        expected = sum(choice.copies for choice in chosen.values())
        read_back = records.count(temporary[data_path])
        if not written == read_back == expected:
            raise Lost(
                f"{data_path}: {expected} records chosen, {written} written, {read_back} read back"
            )
        manifests.write_json(temporary[stats_path], dict(sorted(per_class.items())))
        counts.update(records=written)


class _Choice(NamedTuple):
    """A selected image: its pseudo label, that label's probability, how often it is written."""

    label: int
    prob: float
    copies: int


def _selected(config, shard: int, workers: int, chosen: dict, samples) -> Iterator[tuple]:
    """Yields (example, label, copies) of the chosen records of a shard, in file order."""
    predictions = [records.read(select.prediction_path(config, shard, w)) for w in range(workers)]
    for image_record in records.read(select.input_path(config, shard)):
        # Record i was predicted by worker i mod workers.
        worker = image_record.position % workers
        prediction = next(predictions[worker], None)
        if prediction is None:
            raise records.DataError(
                f"{select.prediction_path(config, shard, worker)} ends before image "
                f"{image_record.position} of the shard: predict it again, or give the "
                f"total_replicas of the prediction as --total_label_replicas (now {workers})"
            )
        if image_record.position not in chosen:
            continue
        for record, path in (
            (image_record, select.input_path(config, shard)),
            (prediction, select.prediction_path(config, shard, worker)),
        ):
            if record.payload is None:
                raise records.DataError(f"{path}, record {record.position}: {record.problem}")
        choice = chosen[image_record.position]
        image = records.image_bytes(image_record.payload)
        probs = records.probabilities(prediction.payload)
        if len(probs) != config.num_label_classes or probs[choice.label] != choice.prob:
            raise records.DataError(
                f"{select.prediction_path(config, shard, worker)}, record {prediction.position} is "
                "not what was selected from: delete its index and the selection, and select again"
            )
        samples.keep(image, choice.label, choice.prob)
        yield (
            records.pseudo_labeled_example(image, probs, choice.label),
            choice.label,
            choice.copies,
        )
    for worker, rest in enumerate(predictions):
        if next(rest, None) is not None:
            raise records.DataError(
                f"{select.prediction_path(config, shard, worker)} has more predictions than "
                f"{select.input_path(config, shard)} has images for {workers} workers"
            )


def _shuffled(payloads: Iterator[bytes], rng: np.random.Generator) -> Iterator[bytes]:
    """Draws at random from a buffer that the input refills; every payload comes out once."""
    buffer: list[bytes] = []
    for payload in payloads:
        if len(buffer) < _BUFFER:
            buffer.append(payload)
            continue
        place = rng.integers(_BUFFER)
        yield buffer[place]
        buffer[place] = payload
    rng.shuffle(buffer)
    yield from buffer


class _Samples:
    """Keeps a few pictures per class as files that people can open."""

    def __init__(self, config: SelectConfig, shard: int):
        self._folder = os.path.join(config.output_dir, "samples")
        self._task, self._shard, self._limit = select.task_number(config), shard, config.num_samples
        self._kept: Counter[int] = Counter()

    def keep(self, image: bytes, label: int, prob: float) -> None:
        """Writes the picture unless its class has enough."""
        index = self._kept[label]
        if index >= self._limit:
            return
        self._kept[label] += 1
        folder = os.path.join(self._folder, str(label))
        tf.io.gfile.makedirs(folder)
        name = f"image_{self._shard}_{self._task}_{index}_{prob:.4f}.jpeg"
        with tf.io.gfile.GFile(os.path.join(folder, name), "wb") as f:
            f.write(image)


def _write_final_stats(config: SelectConfig, stages) -> None:
    total: Counter[str] = Counter()
    for stage in stages:
        total.update(manifests.read_json(stage.outputs[1]))
    pairs = sorted(total.items(), key=lambda pair: -pair[1])
    manifests.write_json(
        os.path.join(config.output_dir, "stats", "final_stats.json"),
        {
            "cat_count": dict(total),
            "cat_sorted_pairs": [list(pair) for pair in pairs],
            "total_cnt": sum(total.values()),
        },
    )
