"""TFRecords and protocol buffers at the level of bytes: frames, checksums, fields.

A frame is the length (8 bytes), its checksum, the payload, its checksum. A tf.train.Example is
field 1, the features, of which each is an entry (field 1) of key (1) and Feature (2); a Feature is a
bytes list (1), float list (2) or int64 list (3), whose values are field 1, numbers packed.
"""

from __future__ import annotations

import struct

import google_crc32c

HEADER, FOOTER = struct.Struct("<QI"), struct.Struct("<I")
OVERHEAD = HEADER.size + FOOTER.size


def masked_crc(data: bytes) -> int:
    """The checksum of a TFRecord: CRC-32C, rotated and shifted."""
    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def frame(payload: bytes) -> bytes:
    """A payload as it stands in a TFRecord file."""
    length = len(payload).to_bytes(8, "little")
    return b"".join(
        (length, FOOTER.pack(masked_crc(length)), payload, FOOTER.pack(masked_crc(payload)))
    )


def varint(value: int) -> bytes:
    """A variable-length integer, 7 bits per byte, lowest first."""
    groups = bytearray()
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    groups.append(value)
    return bytes(groups)


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """(value, end) of the variable-length integer at a byte; the value is -1 when there is none."""
    value = 0
    for shift, byte in zip(range(0, 70, 7), data[at : at + 10]):
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at + shift // 7 + 1
    return -1, at


def field(number: int, content: bytes) -> bytes:
    """A length-delimited field."""
    return b"".join((bytes((number << 3 | 2,)), varint(len(content)), content))


def entry(key: str, feature: bytes) -> bytes:
    """An entry of an Example's features: a serialized Feature under its key."""
    return field(1, field(1, key.encode()) + field(2, feature))
