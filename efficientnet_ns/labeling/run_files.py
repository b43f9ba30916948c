"""What a report of a labeling run takes from files other than the indexes."""

from __future__ import annotations

import dataclasses
import io
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Union

import numpy as np
import tensorflow as tf

from efficientnet_ns.config import SelectConfig
from efficientnet_ns.data import framing, manifests, records
from efficientnet_ns.labeling import select

if TYPE_CHECKING:
    import pyarrow

RECORDS = "records"
# Labels per shard and record; a CSV or Parquet file; or RECORDS.
Truth = Union[Sequence[Sequence[int]], str]


def read_truth(config: SelectConfig, truth: Truth) -> pyarrow.Table:
    """Columns `shard`, `record`, `label` of the images whose class is known.

    Args:
      truth: 0-based labels per shard and record, -1 for images of no class; a CSV or Parquet file
        with these columns; or RECORDS: the unlabeled records' own `image/class/label`.

    Raises:
      records.DataError: the file lacks a column, or no record has a label.
    """
    import pyarrow
    import pyarrow.csv
    import pyarrow.parquet

    if truth == RECORDS:
        truth = [_labels(select.input_path(config, s)) for s in select.shards(config)]
        if not any((labels > _NO_LABEL).any() for labels in truth):
            raise records.DataError(
                f"no record of {config.input_dir} has {records.LABEL_ONE_BASED!r}: "
                "there is no truth to compare with"
            )
    if isinstance(truth, str):
        with tf.io.gfile.GFile(truth, "rb") as f:
            source = pyarrow.BufferReader(f.read())
        table = (
            pyarrow.csv.read_csv(source)
            if truth.endswith(".csv")
            else pyarrow.parquet.read_table(source)
        )
        missing = {"shard", "record", "label"} - set(table.column_names)
        if missing:
            raise records.DataError(f"{truth} has no column {sorted(missing)[0]!r}")
        return table
    columns = {
        "shard": np.repeat(np.arange(len(truth), dtype=np.int32), [len(part) for part in truth]),
        "record": np.concatenate([np.arange(len(part)) for part in truth]),
        "label": np.concatenate([np.asarray(part, np.int32) for part in truth]),
    }
    table = pyarrow.table(columns)
    return table.filter(columns["label"] > _NO_LABEL)


_NO_LABEL = -2  # Below -1, which says that the image is of no class.


def _labels(path: str) -> np.ndarray:
    """The labels a shard's records carry, int32 [N]."""
    labels = []
    with framing.Scanner(path) as scanner:
        while (record := scanner.take()) is not None:
            feature = record.payload and framing.feature(record.payload, records.LABEL_ONE_BASED)
            value = tf.train.Feature.FromString(feature or b"").int64_list.value
            labels.append(value[0] - 1 if value else _NO_LABEL)
    return np.array(labels, np.int32)


# --- Pictures -------------------------------------------------------------------------------------


def fetch(
    config: SelectConfig, places: Iterable[tuple[int, int]], size: int
) -> dict[tuple[int, int], bytes]:
    """Encoded images by (shard, record), made smaller where they are larger than needed.

    A shard is read no further than the last image needed from it. Images that cannot be read are
    empty.

    Args:
      size: pixels of the larger side that are needed.
    """
    by_shard = defaultdict(set)
    for shard, record in places:
        by_shard[shard].add(record)
    found = {}
    for shard, wanted in sorted(by_shard.items()):
        with framing.Scanner(select.input_path(config, shard)) as scanner:
            for number in sorted(wanted):
                scanner.skip(number - scanner.position)
                record = scanner.take()
                payload = record.payload if record is not None else None
                feature = payload and framing.feature(payload, records.IMAGE)
                image = framing.bytes_value(feature) if feature else b""
                found[shard, number] = _thumbnail(image, size)
    return found


_SMALL_BYTES = 4096  # What a thumbnail would have anyway.


def _thumbnail(data: bytes, size: int) -> bytes:
    """A JPEG of at most `size` pixels each way; small files as they are, undecodable ones empty."""
    from PIL import Image

    if len(data) <= _SMALL_BYTES:
        return data
    buffer = io.BytesIO()
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.draft("RGB", (size, size))
            image.thumbnail((size, size))
            image.convert("RGB").save(buffer, "JPEG", quality=80)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return b""
    return buffer.getvalue()


# --- Quarantine -----------------------------------------------------------------------------------


@dataclasses.dataclass
class Quarantine:
    """Records that the teacher could not label.

    Attributes:
      reasons: how many for each reason.
      files: how many in each shard's input file, files without any left out.
      examples: (file, record, reason) of the first.
      unknown: prediction files without a manifest, of which nothing is known.
    """

    reasons: Counter[str]
    files: Counter[str]
    examples: list[tuple[str, int, str]]
    unknown: int


def read_quarantine(config: SelectConfig, limit: int = 20) -> Quarantine:
    """The quarantine lists of the manifests of all predictions."""
    workers = select.count_workers(config)
    result = Quarantine(Counter(), Counter(), [], 0)
    for shard in select.shards(config):
        name = os.path.basename(select.input_path(config, shard))
        for worker in range(workers):
            manifest = select.prediction_path(config, shard, worker) + ".manifest.json"
            if not tf.io.gfile.exists(manifest):
                result.unknown += 1
                continue
            listed = manifests.read_json(manifest)["counts"].get("quarantine", {})
            for position, reason in sorted((int(p), r) for p, r in listed.items()):
                result.reasons[_kind(reason)] += 1
                result.files[name] += 1
                if len(result.examples) < limit:
                    result.examples.append((name, position * workers + worker, reason))
    return result


def _kind(reason: str) -> str:
    """A reason without the place it was found at."""
    return reason.split(" at byte ")[0]
