"""Record files at the level of bytes, for loops over hundreds of millions of records.

`records` says what a file and an Example hold; here is the same without building what is not
looked at: skipping a record costs a look at its length, rewriting one costs no protocol buffer.
"""

from __future__ import annotations

import struct

import tensorflow as tf

from efficientnet_ns.files import records, wire

_FLOAT = struct.Struct("<f")
_BLOCK = 4 << 20  # Bytes per read.


class Scanner:
    """A TFRecord file read in order, of which only some records are looked at.

    Records and problems are those of `records.read`; the payloads of skipped ones are not checked.
    It is a context manager, which closes the file.

    Attributes:
      position: of the next record.
    """

    def __init__(self, path: str):
        self.position = 0
        self._size = tf.io.gfile.stat(path).length
        self._file = tf.io.gfile.GFile(path, "rb")
        # The block starts at byte `_start` of the file, the next record at byte `_at` of it.
        self._block, self._start, self._at = b"", 0, 0
        self._ended = False

    def __enter__(self) -> Scanner:
        return self

    def __exit__(self, *unused) -> None:
        self._file.close()

    def skip(self, count: int | None = None) -> int:
        """Passes over `count` records, default all; returns how many there were to pass."""
        first = self.position
        while count is None or self.position - first < count:
            if self._next_length() is None and not self._give_up():
                break
        return self.position - first

    def take(self) -> records.Record | None:
        """The next record; None at the end of the file."""
        position, offset = self.position, self._start + self._at
        length = self._next_length()
        if length is None:
            problem = self._problem(offset)
            if not self._give_up():
                return None
            return records.Record(position, None, problem, self._size - offset)
        # `_next_length` has moved behind the record, which may reach beyond the block.
        end = self._at
        if end > len(self._block) or end < length + wire.FOOTER.size:
            self._load(offset, length + wire.OVERHEAD)
            end = self._at = length + wire.OVERHEAD
        payload = self._block[end - wire.FOOTER.size - length : end - wire.FOOTER.size]
        (crc,) = wire.FOOTER.unpack_from(self._block, end - wire.FOOTER.size)
        if wire.masked_crc(payload) != crc:
            return records.Record(position, None, f"damaged payload at byte {offset}")
        return records.Record(position, payload)

    def _next_length(self) -> int | None:
        """Moves behind the next record and returns its length; None, unmoved, if there is none."""
        if self._ended:
            return None
        at = self._at
        if at + wire.HEADER.size > len(self._block):
            self._load(self._start + at, wire.HEADER.size)
            at = 0
        block = self._block
        if len(block) - at < wire.HEADER.size:
            return None
        length, crc = wire.HEADER.unpack_from(block, at)
        end = at + length + wire.OVERHEAD
        if self._start + end > self._size or wire.masked_crc(block[at : at + 8]) != crc:
            return None
        self._at = end
        self.position += 1
        return length

    def _load(self, offset: int, least: int) -> None:
        """Makes the block start at byte `offset` of the file, with `least` bytes if it has them."""
        known = self._block[offset - self._start :] if offset >= self._start else b""
        if not known:
            self._file.seek(offset)
        more = self._file.read(max(_BLOCK, least - len(known)))
        self._block, self._start, self._at = known + more, offset, 0

    def _problem(self, offset: int) -> str:
        """Why there is no whole record at a byte of the file."""
        header = self._block[self._at : self._at + wire.HEADER.size]
        damaged = len(header) == wire.HEADER.size and (
            wire.masked_crc(header[:8]) != wire.HEADER.unpack(header)[1]
        )
        return (
            f"damaged length at byte {offset}: the rest is lost"
            if damaged
            else f"truncated at byte {offset}"
        )

    def _give_up(self) -> bool:
        """Counts what is left of the file as one unreadable record; False if nothing is."""
        left = not self._ended and self._start + self._at < self._size
        self._ended = True
        self.position += left
        return left


# --- Examples -------------------------------------------------------------------------------------


def feature(record: bytes, key: str) -> bytes:
    """The serialized tf.train.Feature of a record under a key; empty if it has none.

    Raises:
      records.DataError: the record is not an Example.
    """
    try:
        found = tf.train.Example.FromString(record).features.feature
    except Exception as e:  # protobuf's DecodeError differs between its implementations
        raise records.DataError(f"the record is not a tf.train.Example: {e}") from e
    return found[key].SerializeToString()


def bytes_value(feature: bytes) -> bytes:
    """The only value of a serialized Feature of bytes."""
    return tf.train.Feature.FromString(feature).bytes_list.value[0]


class Floats:
    """A serialized Feature of floats, whose values are read singly.

    Attributes:
      feature: all of it.
    """

    def __init__(self, feature: bytes):
        self.feature = feature
        # Field 2 (float_list), its length, field 1 (value, packed), its length, the values.
        self._start = start = 1 + _varint_size(feature, 1)
        self._start = start + 1 + _varint_size(feature, start + 1)

    def __len__(self) -> int:
        return max(len(self.feature) - self._start, 0) // _FLOAT.size

    def __getitem__(self, index: int) -> float:
        """A float32 as a Python float."""
        return _FLOAT.unpack_from(self.feature, self._start + _FLOAT.size * index)[0]


def _varint_size(data: bytes, at: int) -> int:
    size = 1
    while at + size <= len(data) and data[at + size - 1] > 0x7F:
        size += 1
    return size


def pseudo_labeled_example(image: bytes, probabilities: bytes, label: int, prob: float) -> bytes:
    """`records.pseudo_labeled_example`, as long and read the same, from the Features of two other records.

    Args:
      image, probabilities: serialized Features.
      label: 0-based.
      prob: probability of the label.
    """
    features = (
        wire.entry(records.IMAGE, image),
        wire.entry(records.LABEL, wire.field(3, wire.field(1, wire.varint(label)))),
        wire.entry(records.PROBABILITIES, probabilities),
        wire.entry(records.PROB, wire.field(2, wire.field(1, _FLOAT.pack(prob)))),
    )
    return wire.field(1, b"".join(features))
