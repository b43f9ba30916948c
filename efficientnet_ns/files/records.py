"""Every record format in one place: names of files, keys of examples, reading and writing.

Labeled, unlabeled, prediction and pseudo-labeled records are TFRecords of `tf.train.Example`,
unchanged from the original code base, so that its data works here and ours there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from absl import logging

from efficientnet_ns.files import manifests, wire

IMAGE, LABEL_ONE_BASED = "image/encoded", "image/class/label"
PROBABILITIES, CLASSES, LABEL, PROB = "probabilities", "classes", "label", "prob"


class DataError(ValueError):
    """Input files that cannot be used as they are; the message names file, record and value."""


# --- Names of files -------------------------------------------------------------------------------


def shard_name(prefix: str, shard: int, num_shards: int) -> str:
    """`train-00003-of-00128`."""
    return f"{prefix}-{shard:05d}-of-{num_shards:05d}"


def prediction_name(shard: int, num_shards: int, worker: int) -> str:
    """`train-info-00003-of-00128-00000`, whatever the prefix of the input."""
    return f"{shard_name('train-info', shard, num_shards)}-{worker:05d}"


def info_name(shard: int, num_shards: int, worker: int) -> str:
    """`info-00003-of-00128-00000.txt`."""
    return f"{shard_name('info', shard, num_shards)}-{worker:05d}.txt"


def index_name(shard: int, num_shards: int, worker: int) -> str:
    """`index-00003-of-00128-00000.parquet`, beside the prediction file it describes."""
    return f"{shard_name('index', shard, num_shards)}-{worker:05d}.parquet"


def pseudo_label_name(task: int, shard: int, num_shards: int) -> str:
    """`train-0-00003-of-00128`."""
    return shard_name(f"train-{task}", shard, num_shards)


_SHARD = re.compile(r"^(?P<group>.+)-(?P<shard>\d+)-of-(?P<total>\d+)$")


def list_shards(folders: str, prefixes: str | Sequence[str]) -> list[str]:
    """All shards with one of the prefixes in one or several folders.

    Args:
      folders: paths joined with `;`.
      prefixes: e.g. `train` or `("train", "extra")`; `train` also finds `train-0-00000-of-00004`.

    Returns:
      Sorted paths.

    Raises:
      DataError: nothing matches, or a shard of a set is missing.
    """
    prefixes = (prefixes,) if isinstance(prefixes, str) else tuple(prefixes)
    paths = []
    for folder in filter(None, folders.split(";")):
        found = _shards_in(folder, prefixes)
        if not found:
            names = " or ".join(f"{p}-00000-of-…" for p in prefixes)
            raise DataError(f"no record files in {folder!r}: expected names such as {names}")
        paths += found
    if not paths:
        raise DataError("no data folder given; expected one path, or several joined with ';'")
    return paths


def _shards_in(folder: str, prefixes: tuple[str, ...]) -> list[str]:
    if not tf.io.gfile.isdir(folder):
        return []
    groups: dict[tuple[str, int], dict[int, str]] = {}
    for name in tf.io.gfile.listdir(folder):
        match = _SHARD.match(name.rstrip("/"))
        if match and any(re.fullmatch(rf"{re.escape(p)}(-\d+)?", match["group"]) for p in prefixes):
            key = (match["group"], int(match["total"]))
            groups.setdefault(key, {})[int(match["shard"])] = os.path.join(folder, name)
    for (group, total), shards in groups.items():
        totals = sorted(t for g, t in groups if g == group)
        if len(totals) > 1:
            raise DataError(
                f"{folder} holds two sets of {group!r}, of {totals[0]} and of {totals[1]} shards: "
                "the same images would count twice. Move one away."
            )
        missing = [i for i in range(total) if i not in shards]
        if missing:
            first = os.path.join(folder, shard_name(group, missing[0], total))
            raise DataError(f"{len(missing)} of {total} shards are missing, the first is {first}")
    return sorted(path for shards in groups.values() for path in shards.values())


# --- Examples -------------------------------------------------------------------------------------


def _bytes(value: bytes) -> tf.train.Feature:
    return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))


def _ints(*values: int) -> tf.train.Feature:
    return tf.train.Feature(int64_list=tf.train.Int64List(value=values))


def _floats(values: Sequence[float]) -> tf.train.Feature:
    return tf.train.Feature(float_list=tf.train.FloatList(value=values))


def _example(**features: tf.train.Feature) -> bytes:
    names = {"image": IMAGE, "label_one_based": LABEL_ONE_BASED}
    named = {names.get(key, key): value for key, value in features.items()}
    return tf.train.Example(features=tf.train.Features(feature=named)).SerializeToString(
        deterministic=True
    )


def labeled_example(image: bytes, label: int) -> bytes:
    """A labeled record from encoded image bytes and a 0-based label, which is stored 1-based."""
    return _example(image=_bytes(image), label_one_based=_ints(label + 1))


def unlabeled_example(image: bytes) -> bytes:
    """An unlabeled record from encoded image bytes."""
    return _example(image=_bytes(image))


def placeholder_example(image: bytes, label: int, num_classes: int) -> bytes:
    """A labeled record that also has the keys of a pseudo-labeled one, all zero.

    SVHN's unlabeled records are of this kind; who reads them as unlabeled ignores all but the image.
    """
    return _example(
        image=_bytes(image),
        label_one_based=_ints(label + 1),
        probabilities=_floats([0.0] * num_classes),
        label=_ints(0),
        prob=_floats([0.0]),
    )


def prediction_example(probabilities: Sequence[float]) -> bytes:
    """A prediction; `classes` is the argmax, 0-based. All zeros stand for an unreadable image."""
    return _example(
        probabilities=_floats(probabilities), classes=_ints(int(np.argmax(probabilities)))
    )


def prediction_examples(probabilities: np.ndarray) -> list[bytes]:
    """`prediction_example` of many rows, byte for byte the same and much faster.

    Args:
      probabilities: float32 [N, C].
    """
    rows = np.ascontiguousarray(probabilities, "<f4")
    size = 4 * rows.shape[1]

    numbers = wire.entry(PROBABILITIES, wire.field(2, wire.field(1, bytes(size))))
    # The numbers come last, so that all rows of a class share what is before them.
    starts: dict[int, bytes] = {}
    for k in set(classes := rows.argmax(1).tolist()):
        class_entry = wire.entry(CLASSES, wire.field(3, wire.field(1, wire.varint(k))))
        starts[k] = wire.field(1, class_entry + numbers)[:-size]
    return [starts[k] + row.tobytes() for k, row in zip(classes, rows)]


def pseudo_labeled_example(image: bytes, probabilities: Sequence[float], label: int) -> bytes:
    """A pseudo-labeled record: image, class probabilities, 0-based label and its probability."""
    return _example(
        image=_bytes(image),
        probabilities=_floats(probabilities),
        label=_ints(label),
        prob=_floats([probabilities[label]]),
    )


def image_bytes(record: bytes) -> bytes:
    """The encoded image of any record.

    Raises:
      DataError: not an Example, or one without `image/encoded`.
    """
    image = _only_image(record)
    if image is not None:
        return image
    values = _features(record)[IMAGE].bytes_list.value
    if not values:
        raise DataError(f"the record has no {IMAGE!r}")
    return values[0]


# What stands before each of the nested fields of an `unlabeled_example`, and their tags.
_AROUND_IMAGE = (
    (b"", b"\n"),
    (b"", b"\n"),
    (wire.field(1, IMAGE.encode()), b"\x12"),
    (b"", b"\n"),
    (b"", b"\n"),
)


def _only_image(record: bytes) -> bytes | None:
    """The image of a record that holds nothing else, without copying it twice; None for others."""
    at, end = 0, len(record)
    for before, tag in _AROUND_IMAGE:
        if not record.startswith(before, at) or not record.startswith(tag, at + len(before)):
            return None
        size, at = wire.read_varint(record, at + len(before) + 1)
        if at + size != end:
            return None
    return record[at:]


def probabilities(record: bytes) -> np.ndarray:
    """Class probabilities, float32 [C], of a prediction or pseudo-labeled record."""
    return np.asarray(_features(record)[PROBABILITIES].float_list.value, np.float32)


def label(record: bytes) -> int:
    """The 0-based label of a labeled, prediction or pseudo-labeled record; -1 for none."""
    features = _features(record)
    if features[LABEL_ONE_BASED].int64_list.value:
        return features[LABEL_ONE_BASED].int64_list.value[0] - 1
    for key in (CLASSES, LABEL):
        if features[key].int64_list.value:
            return features[key].int64_list.value[0]
    return -1


def _features(record: bytes):
    try:
        return tf.train.Example.FromString(record).features.feature
    except Exception as e:  # protobuf's DecodeError differs between its implementations
        raise DataError(f"the record is not a tf.train.Example: {e}") from e


def parse_labeled(serialized: tf.Tensor) -> dict[str, tf.Tensor]:
    """Scalar string → `image` (encoded, scalar string) and `label` (0-based, int32)."""
    spec = {
        IMAGE: tf.io.FixedLenFeature([], tf.string),
        LABEL_ONE_BASED: tf.io.FixedLenFeature([], tf.int64),
    }
    parsed = tf.io.parse_single_example(serialized, spec)
    return {"image": parsed[IMAGE], "label": tf.cast(parsed[LABEL_ONE_BASED] - 1, tf.int32)}


def parse_unlabeled(serialized: tf.Tensor) -> tf.Tensor:
    """Scalar string → encoded image, scalar string."""
    return tf.io.parse_single_example(serialized, {IMAGE: tf.io.FixedLenFeature([], tf.string)})[
        IMAGE
    ]


def parse_pseudo_labeled(serialized: tf.Tensor, num_classes: int) -> dict[str, tf.Tensor]:
    """Scalar string → `image`, `label` (0-based, int32), `probs` float32 [num_classes]."""
    spec = {
        IMAGE: tf.io.FixedLenFeature([], tf.string),
        LABEL: tf.io.FixedLenFeature([], tf.int64),
        PROBABILITIES: tf.io.FixedLenFeature([num_classes], tf.float32),
    }
    parsed = tf.io.parse_single_example(serialized, spec)
    return {
        "image": parsed[IMAGE],
        "label": tf.cast(parsed[LABEL], tf.int32),
        "probs": parsed[PROBABILITIES],
    }


# --- Reading --------------------------------------------------------------------------------------


class Record(NamedTuple):
    """One record of a file.

    Attributes:
      position: in the file, from 0.
      payload: None when it could not be read.
      problem: why not.
      lost: bytes from here to the end of the file, when all of them are lost.
    """

    position: int
    payload: bytes | None
    problem: str = ""
    lost: int = 0


def read(path: str) -> Iterator[Record]:
    """Reads a TFRecord file past damage.

    A record whose payload fails its checksum is reported and the next one is read. When a length
    cannot be trusted, or the file ends inside a record, the rest of the file is one last
    unreadable record.

    Yields:
      Records in file order, positions counting unreadable ones.
    """
    for record, _ in read_from(path):
        yield record


def read_from(path: str, position: int = 0, offset: int = 0) -> Iterator[tuple[Record, int]]:
    """Like `read`, from the record `position` that begins at byte `offset` on.

    Yields:
      (record, byte where the next one begins).
    """
    size = tf.io.gfile.stat(path).length
    with tf.io.gfile.GFile(path, "rb") as f:
        if offset:
            f.seek(offset)
        while offset < size:
            header = f.read(wire.HEADER.size)
            if len(header) < wire.HEADER.size:
                yield Record(position, None, f"truncated at byte {offset}", size - offset), size
                return
            length, length_crc = wire.HEADER.unpack(header)
            if wire.masked_crc(header[:8]) != length_crc:
                problem = f"damaged length at byte {offset}: the rest is lost"
                yield Record(position, None, problem, size - offset), size
                return
            if offset + wire.HEADER.size + length + wire.FOOTER.size > size:
                yield Record(position, None, f"truncated at byte {offset}", size - offset), size
                return
            payload = f.read(length)
            (crc,) = wire.FOOTER.unpack(f.read(wire.FOOTER.size))
            good = wire.masked_crc(payload) == crc
            problem = "" if good else f"damaged payload at byte {offset}"
            offset += wire.HEADER.size + length + wire.FOOTER.size
            yield Record(position, payload if good else None, problem), offset
            position += 1


def count(path: str) -> int:
    """Number of whole records of a file, by its headers alone; a truncated tail is left out."""
    return _measure(path)[0]


def spans(path: str) -> Iterator[tuple[int, int]]:
    """(first byte, length) of the payload of each whole record, by the headers alone."""
    size, end = tf.io.gfile.stat(path).length, 0
    with tf.io.gfile.GFile(path, "rb") as f:
        while end + wire.HEADER.size <= size:
            f.seek(end)
            length, length_crc = wire.HEADER.unpack(header := f.read(wire.HEADER.size))
            start, end = end + wire.HEADER.size, end + wire.HEADER.size + length + wire.FOOTER.size
            if wire.masked_crc(header[:8]) != length_crc or end > size:
                return
            yield start, length


def _measure(path: str) -> tuple[int, int]:
    """(whole records, bytes after the last whole record)."""
    total = end = 0
    for start, length in spans(path):
        total, end = total + 1, start + length + wire.FOOTER.size
    return total, tf.io.gfile.stat(path).length - end


def count_all(paths: Sequence[str], max_bad_fraction: float = 0.01) -> list[int]:
    """Records per file, from the folder's `counts.json` where it names the file, else counted.

    Args:
      max_bad_fraction: how much of all bytes may lie behind damage, which is left out.

    Raises:
      DataError: a file is empty, or of another size than `counts.json` says, or too much is lost.
    """
    known: dict[str, dict] = {}
    counts, damage, total_bytes = [], [], 0
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in known:
            sidecar = os.path.join(folder, COUNTS)
            known[folder] = _known_counts(sidecar)
        size = tf.io.gfile.stat(path).length
        total_bytes += size
        entry = known[folder].get(name)
        if entry and entry["bytes"] != size:
            raise DataError(
                f"{path} has {size} bytes, but {COUNTS} beside it says {entry['bytes']}: it was "
                f"truncated or changed. Write it again, or delete {COUNTS} if it is meant so."
            )
        if size == 0 and not entry:
            raise DataError(f"{path} is empty: write it again, or delete its whole set")
        whole, rest = (entry["records"], 0) if entry else _measure(path)
        counts.append(whole)
        if rest:
            damage.append((rest, f"{path} is damaged after record {whole}: {rest} bytes left out"))
            logging.warning("%s", damage[-1][1])
    if sum(rest for rest, _ in damage) > max_bad_fraction * total_bytes:
        raise DataError(f"{damage[0][1]}, more than the fraction {max_bad_fraction} of the set")
    return counts


# --- Writing --------------------------------------------------------------------------------------

COUNTS = "counts.json"


def write(path: str, payloads: Iterator[bytes] | Sequence[bytes]) -> int:
    """Writes one TFRecord file under exactly this name and returns the number of records."""
    total = 0
    with tf.io.TFRecordWriter(path) as writer:
        for payload in payloads:
            writer.write(payload)
            total += 1
    return total


def write_sharded(
    folder: str, prefix: str, payloads: Sequence[bytes], num_shards: int
) -> list[str]:
    """Writes `payloads` round-robin to `num_shards` files; each appears by rename when whole.

    Returns:
      The paths.
    """
    tf.io.gfile.makedirs(folder)
    paths = [os.path.join(folder, shard_name(prefix, i, num_shards)) for i in range(num_shards)]
    for shard, path in enumerate(paths):
        with manifests.atomic_path(path) as temporary:
            write(temporary, payloads[shard::num_shards])
    note_counts(paths)
    return paths


def _known_counts(sidecar: str) -> dict:
    """What a `counts.json` has, nothing if it does not exist; DataError if it is damaged."""
    if not tf.io.gfile.exists(sidecar):
        return {}
    try:
        known = manifests.read_json(sidecar)
    except manifests.BrokenFile:
        known = None
    if not isinstance(known, dict):
        raise DataError(
            f"{sidecar} is damaged, perhaps cut off. Delete it: only the numbers of records, which "
            "are then counted again, are in it."
        )
    return known


def note_counts(paths: Sequence[str], counts: Sequence[int] | None = None) -> None:
    """Records the number of records and bytes of files of one folder in its `counts.json`.

    Args:
      counts: records of each file; None: counted.
    """
    folder = os.path.dirname(paths[0])
    sidecar = os.path.join(folder, COUNTS)
    entries = _known_counts(sidecar)
    for path, total in zip(paths, counts or map(count, paths)):
        entries[os.path.basename(path)] = {
            "records": total,
            "bytes": tf.io.gfile.stat(path).length,
        }
    manifests.write_json(sidecar, entries, indent=1)
