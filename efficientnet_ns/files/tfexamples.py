"""Every kind of `tf.train.Example` in the records: keys, encoding and decoding.

| kind           | keys                                                            |
|----------------|-----------------------------------------------------------------|
| labeled        | `image/encoded`, `image/class/label` (1-based)                  |
| unlabeled      | `image/encoded`                                                 |
| either of them | `image/filename`: path in the source, optional                  |
| prediction     | `probabilities` float [C], `classes` (argmax, 0-based)          |
| pseudo-labeled | `image/encoded`, `probabilities`, `label` (0-based), `prob`     |

The keys are those of the original code, so both programs can use each other's data. Examples are
encoded as bytes, without a protocol buffer per record: selection rewrites hundreds of millions.

An Example has field 1, the features, each of which is an entry (field 1) with key (1) and Feature
(2). A Feature is a bytes list (1), float list (2) or int64 list (3), whose values are field 1;
numbers are packed.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from efficientnet_ns.files import tfrecords
from efficientnet_ns.files.errors import DataError
from efficientnet_ns.files.protobuf_wire import field, read_varint, varint

IMAGE, LABEL_ONE_BASED = "image/encoded", "image/class/label"
FILE_NAME = "image/filename"
PROBABILITIES, CLASSES, LABEL, PROB = "probabilities", "classes", "label", "prob"

_FLOAT = struct.Struct("<f")
_FEW_BYTES = 400  # Below this row size, NumPy's copies of many rows cost less than a Python loop.


# --- Encoding -------------------------------------------------------------------------------------


def _bytes(value: bytes) -> bytes:
    return field(1, field(1, value))


def _floats(values: Sequence[float] | np.ndarray) -> bytes:
    return field(2, field(1, np.asarray(values, "<f4").tobytes()))


def _int(value: int) -> bytes:
    return field(3, field(1, varint(value)))


def _entry(key: str, feature: bytes) -> bytes:
    return field(1, field(1, key.encode()) + field(2, feature))


def _example(features: dict[str, bytes]) -> bytes:
    """Serializes an Example with serialized Features in the order given.

    All formats have their keys in the order of protobuf's deterministic serialization, in which a key
    comes after those that it is a prefix of: `probabilities`, `prob`.
    """
    return field(1, b"".join(_entry(key, feature) for key, feature in features.items()))


def labeled_example(image: bytes, label: int, name: str = "") -> bytes:
    """Makes a labeled record from encoded image bytes and a 0-based label, stored 1-based.

    Args:
      name: file name to store, or "".
    """
    return _example({LABEL_ONE_BASED: _int(label + 1), IMAGE: _bytes(image), **_named(name)})


def unlabeled_example(image: bytes, name: str = "") -> bytes:
    """Makes an unlabeled record from encoded image bytes and its file name unless empty."""
    return _example({IMAGE: _bytes(image), **_named(name)})


def _named(name: str) -> dict[str, bytes]:
    return {FILE_NAME: _bytes(name.encode())} if name else {}


def placeholder_example(image: bytes, label: int, num_classes: int) -> bytes:
    """Makes a labeled record that also has the keys of a pseudo-labeled one, all zero.

    SVHN's unlabeled records are of this kind; readers of unlabeled records use only the image.
    """
    return _example(
        {
            LABEL_ONE_BASED: _int(label + 1),
            IMAGE: _bytes(image),
            LABEL: _int(0),
            PROBABILITIES: _floats([0.0] * num_classes),
            PROB: _floats([0.0]),
        }
    )


def prediction_examples(probabilities: np.ndarray) -> list[bytes]:
    """Serializes a prediction for every row.

    `classes` is the argmax, 0-based. A row of zeros represents an unreadable image.

    Args:
      probabilities: float32 [N, C].
    """
    rows = np.ascontiguousarray(probabilities, "<f4")
    size = 4 * rows.shape[1]
    # The numbers come last, so all rows of a class share the bytes before them.
    starts: dict[int, bytes] = {}
    for k in set(classes := rows.argmax(1).tolist()):
        zeros = np.zeros(rows.shape[1], np.float32)
        starts[k] = _example({CLASSES: _int(k), PROBABILITIES: _floats(zeros)})[:-size]
    return [starts[k] + row.tobytes() for k, row in zip(classes, rows)]


def framed_predictions(probabilities: np.ndarray) -> bytes:
    """Returns `prediction_examples` as TFRecord bytes, several times faster for few classes.

    Args:
      probabilities: float32 [N, C].
    """
    rows = np.ascontiguousarray(probabilities, "<f4")
    if not len(rows):
        return b""
    size = 4 * rows.shape[1]
    if size > _FEW_BYTES:
        return b"".join(map(tfrecords.frame, prediction_examples(rows)))
    classes, which = np.unique(rows.argmax(1), return_inverse=True)
    examples = prediction_examples(np.eye(rows.shape[1], dtype=np.float32)[classes])
    lengths = np.array([len(example) for example in examples])
    pieces: list = [b""] * len(rows)
    # Class numbers take one or more bytes, so a file has records of only a few lengths.
    for length in np.unique(lengths):
        prefixes = np.zeros([len(examples), length - size], np.uint8)
        for place in np.flatnonzero(lengths == length):
            prefixes[place] = np.frombuffer(examples[place][: length - size], np.uint8)
        chosen = np.flatnonzero(lengths[which] == length)
        payloads = np.concatenate([prefixes[which[chosen]], rows[chosen].view(np.uint8)], 1)
        framed = tfrecords.frames(payloads)
        if len(chosen) == len(rows):
            return framed.tobytes()
        for place, piece in zip(chosen.tolist(), framed):
            pieces[place] = piece.data
    return b"".join(pieces)


def pseudo_labeled_example(image: bytes, probabilities: Sequence[float], label: int) -> bytes:
    """Makes a pseudo-labeled record: image, class probabilities, 0-based label, its probability."""
    return pseudo_labeled_from_features(
        _bytes(image), _floats(probabilities), label, probabilities[label]
    )


def pseudo_labeled_from_features(
    image: bytes, probabilities: bytes, label: int, prob: float
) -> bytes:
    """Makes a pseudo-labeled record from Features of two other records, copied without parsing.

    Args:
      image, probabilities: serialized Features.
      label: 0-based label.
      prob: probability of the label.
    """
    # The order of the keys is part of the files' bytes: it must not change.
    return _example(
        {
            IMAGE: image,
            LABEL: _int(label),
            PROBABILITIES: probabilities,
            PROB: field(2, field(1, _FLOAT.pack(prob))),  # Faster than NumPy for one number.
        }
    )


def certain(label: int, num_classes: int) -> bytes:
    """Returns the Feature of probabilities that are 1 for one class and else 0."""
    return _floats(np.eye(num_classes, dtype=np.float32)[label])


# --- Decoding -------------------------------------------------------------------------------------


def image_bytes(record: bytes) -> bytes:
    """Returns the encoded image of any record.

    Raises:
      DataError: If the record is not an Example or has no `image/encoded`.
    """
    image = _only_image(record)
    if image is not None:
        return image
    values = _features(record)[IMAGE].bytes_list.value
    if not values:
        raise DataError(f"the record has no {IMAGE!r}")
    return values[0]


def image_if_any(record: bytes | None) -> bytes:
    """Like `image_bytes`, but b"" for a record that cannot be read or has no image."""
    try:
        return image_bytes(record) if record else b""
    except DataError:
        return b""


def _only_image(record: bytes) -> bytes | None:
    """Returns the image of a record with only an image and file name, copied once; else None."""
    features = _content(record, 0, len(record), b"\n")
    if not features or features[1] != len(record):
        return None
    image = _bytes_entry(record, *features, IMAGE)
    if not image:
        return None
    start, end = image
    if end != len(record):
        name = _bytes_entry(record, end, len(record), FILE_NAME)
        if not name or name[1] != len(record):
            return None
    return record[start:end]


def _bytes_entry(record: bytes, at: int, end: int, key: str) -> tuple[int, int] | None:
    """Returns (start, end) of the only value of the entry at a byte; the entry ends with it."""
    entry = _content(record, at, end, b"\n")
    before = field(1, key.encode())
    if not entry or not record.startswith(before, entry[0]):
        return None
    start, stop = entry[0] + len(before), entry[1]
    # Feature, bytes list, value: each fills its container.
    for tag in (b"\x12", b"\n", b"\n"):
        found = _content(record, start, stop, tag)
        if not found or found[1] != stop:
            return None
        start = found[0]
    return start, stop


def _content(record: bytes, at: int, end: int, tag: bytes) -> tuple[int, int] | None:
    """Returns (start, end) of the content of a field with this tag if it is there, up to `end`."""
    if not record.startswith(tag, at):
        return None
    size, start = read_varint(record, at + 1)
    return (start, start + size) if size >= 0 and start + size <= end else None


def file_name(record: bytes) -> str:
    """Returns the file name stored in a record; "" if there is none, as in an empty record."""
    values = _features(record)[FILE_NAME].bytes_list.value
    return values[0].decode("utf-8", "backslashreplace") if values else ""


def probabilities(record: bytes) -> np.ndarray:
    """Returns the class probabilities, float32 [C], of a prediction or pseudo-labeled record."""
    return np.asarray(_features(record)[PROBABILITIES].float_list.value, np.float32)


def label(record: bytes) -> int:
    """Returns the 0-based label of a labeled, prediction or pseudo-labeled record, or -1."""
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
    """Parses a scalar string to `image` (encoded, scalar string) and `label` (0-based, int32)."""
    spec = {
        IMAGE: tf.io.FixedLenFeature([], tf.string),
        LABEL_ONE_BASED: tf.io.FixedLenFeature([], tf.int64),
    }
    parsed = tf.io.parse_single_example(serialized, spec)
    return {"image": parsed[IMAGE], "label": tf.cast(parsed[LABEL_ONE_BASED] - 1, tf.int32)}


def parse_unlabeled(serialized: tf.Tensor) -> tf.Tensor:
    """Parses a scalar string to the encoded image, scalar string."""
    return tf.io.parse_single_example(serialized, {IMAGE: tf.io.FixedLenFeature([], tf.string)})[
        IMAGE
    ]


def parse_pseudo_labeled(serialized: tf.Tensor, num_classes: int) -> dict[str, tf.Tensor]:
    """Parses a scalar string to `image`, `label` (0-based, int32), `probs` float32 [num_classes]."""
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


def feature(record: bytes, key: str) -> bytes:
    """Returns a record's serialized tf.train.Feature for a key; empty if it has none.

    Raises:
      DataError: If the record is not an Example.
    """
    return _features(record)[key].SerializeToString()


def bytes_value(feature: bytes) -> bytes:
    """Returns the only value of a serialized bytes Feature."""
    return tf.train.Feature.FromString(feature).bytes_list.value[0]


class Floats:
    """A serialized Feature of floats whose values are read individually.

    Attributes:
      feature: the whole Feature.
    """

    def __init__(self, feature: bytes):
        self.feature = feature
        # Field 2 (float_list), its length, field 1 (value, packed), its length, the values.
        _, start = read_varint(feature, 1)
        _, self._start = read_varint(feature, start + 1)

    def __len__(self) -> int:
        return max(len(self.feature) - self._start, 0) // _FLOAT.size

    def __getitem__(self, index: int) -> float:
        """Returns a float32 as a Python float."""
        return _FLOAT.unpack_from(self.feature, self._start + _FLOAT.size * index)[0]
