"""Encodes the few kinds of protocol buffer fields that this package writes as bytes.

It is used in loops over hundreds of millions of records, where building a message per record is too
slow, and for messages whose Python classes are not in a required package.
"""

from __future__ import annotations


def varint(value: int) -> bytes:
    """Encodes a variable-length integer: 7 bits per byte, lowest first; 64 bits if negative."""
    value &= (1 << 64) - 1
    groups = bytearray()
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    groups.append(value)
    return bytes(groups)


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """Decodes (value, end) of the variable-length integer at byte `at`; value -1 if there is none."""
    value = 0
    for shift, byte in zip(range(0, 70, 7), data[at : at + 10]):
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at + shift // 7 + 1
    return -1, at


def field(number: int, content: bytes) -> bytes:
    """Encodes a length-delimited field: a string, message or packed numbers; `number` < 16."""
    # Wire type 2 in the lowest three bits of the tag.
    return b"".join((bytes((number << 3 | 2,)), varint(len(content)), content))
