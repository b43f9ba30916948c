"""`labels.csv`: one row per unlabeled picture, in the order of the records."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow as tf

from efficientnet_ns.config import SelectConfig
from efficientnet_ns.files import atomic, tfexamples, tfrecords
from efficientnet_ns.outcomes import outcome
from efficientnet_ns.pseudo_labels import index

COLUMNS = ("file", "label", "probability", "kept")


def write(path: str, config: SelectConfig, class_names: Sequence[str] | None) -> dict[str, Any]:
    """Writes `file,label,probability,kept`; pictures without a prediction have an empty label.

    Args:
      config: settings that locate the predictions and the selection, which lists kept pictures.
      class_names: names to write; None: write the numbers.

    Returns:
      `images`, `kept`.
    """
    counts = {"images": 0, "kept": 0}
    with atomic.atomic_path(path) as temporary, tf.io.gfile.GFile(temporary, "w") as f:
        f.write(f"{','.join(COLUMNS)}\n")
        for shard, rows in _predictions(config):
            text = io.StringIO()
            writer = csv.writer(text, lineterminator="\n")
            for name, (label, prob, kept) in zip(_names(config, shard), rows):
                known = label >= 0
                shown = (class_names[label] if class_names else label) if known else ""
                writer.writerow([name, shown, f"{prob:.4f}" if known else "", int(kept)])
                counts["images"] += 1
                counts["kept"] += kept
            f.write(text.getvalue())
    return counts


def _predictions(config: SelectConfig) -> Iterator[tuple[int, list[tuple[int, float, bool]]]]:
    """Yields (shard, [(label, probability, kept) of each record]) for every shard."""
    result = outcome.Outcome(config)
    for shard in index.shards(config):
        yield shard, result.labels(shard)


def _names(config: SelectConfig, shard: int) -> Iterator[str]:
    path = index.input_path(config, shard)
    for number, record in enumerate(tfrecords.read(path)):
        name = tfexamples.file_name(record.payload) if record.payload is not None else ""
        # Records may store no names; then, shard and position identify the picture.
        yield name or f"{path}#{number}"
