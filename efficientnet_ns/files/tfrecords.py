"""TFRecord files: reading past damage, counting, writing.

A file is a sequence of frames: the length (8 bytes), its checksum, the payload, its checksum. TensorFlow's
own reader stops at the first damage; this one continues where that is possible and reports what is lost.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import google_crc32c
import numpy as np
import tensorflow as tf
from absl import logging

from efficientnet_ns.files import atomic
from efficientnet_ns.files.errors import DataError
from efficientnet_ns.files.json_files import BrokenFile, read_object, write_json
from efficientnet_ns.files.shard_names import shard_name

HEADER, FOOTER = struct.Struct("<QI"), struct.Struct("<I")
OVERHEAD = HEADER.size + FOOTER.size
COUNTS = "counts.json"
_BLOCK = 4 << 20  # Bytes per read.


# --- Frames ---------------------------------------------------------------------------------------


def masked_crc(data: bytes) -> int:
    """The checksum of a TFRecord: CRC-32C, rotated and shifted."""
    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def frame(payload: bytes) -> bytes:
    """A payload with length and checksums, as in a TFRecord file."""
    length = len(payload).to_bytes(8, "little")
    return b"".join(
        (length, FOOTER.pack(masked_crc(length)), payload, FOOTER.pack(masked_crc(payload)))
    )


def frames(payloads: np.ndarray) -> np.ndarray:
    """Payloads of one length, uint8 [N, L], each with length and checksums, uint8 [N, L + 16]."""
    count, size = payloads.shape
    length = size.to_bytes(8, "little")
    made = np.empty([count, size + OVERHEAD], np.uint8)
    made[:, : HEADER.size] = np.frombuffer(length + FOOTER.pack(masked_crc(length)), np.uint8)
    made[:, HEADER.size : -FOOTER.size] = payloads
    crc = np.full(count, google_crc32c.value(bytes(size)), np.uint32)
    for table, column in zip(_crc_tables(size), np.ascontiguousarray(payloads.T)):
        # Most bytes around the numbers are the same in all records.
        crc ^= table[column[0]] if (column == column[0]).all() else table[column]
    masked = ((crc >> 15) | (crc << 17)) + np.uint32(0xA282EAD8)
    made[:, -FOOTER.size :] = masked.astype("<u4")[:, None].view(np.uint8)
    return made


@functools.lru_cache(4)
def _crc_tables(size: int) -> np.ndarray:
    """What each value of each byte changes in the CRC-32C of `size` bytes, uint32 [size, 256].

    The checksum is linear: that of any content is that of zeros, with the changes of all bytes.
    """
    zeros = google_crc32c.value(bytes(size))
    tables = np.zeros([size, 256], np.uint32)
    for place, bit in itertools.product(range(size), range(8)):
        content = bytearray(size)
        content[place] = 1 << bit
        having = (np.arange(256) >> bit & 1).astype(bool)
        tables[place, having] ^= np.uint32(google_crc32c.value(bytes(content)) ^ zeros)
    return tables


def payload_at(content: bytes, at: int) -> tuple[bytes, int]:
    """(payload, end) of the frame that begins at byte `at`; checksums are not looked at."""
    begin = at + HEADER.size
    end = begin + int.from_bytes(content[at : at + 8], "little")
    return content[begin:end], end + FOOTER.size


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


class Scanner:
    """A TFRecord file read in order, in which records can be skipped at the cost of their header.

    A record whose payload fails its checksum is reported, and the next one is read. When a length
    cannot be trusted, or the file ends inside a record, the rest of the file is one last
    unreadable record. Payloads of skipped records are not checked.

    It is a context manager, which closes the file.

    Args:
      path: of the file.
      position: number of the record that begins at byte `offset`, where reading starts.

    Attributes:
      position: of the next record.
    """

    def __init__(self, path: str, position: int = 0, offset: int = 0):
        self.position = position
        self._size = tf.io.gfile.stat(path).length
        self._file = tf.io.gfile.GFile(path, "rb")
        # The block starts at byte `_start` of the file, the next record at byte `_at` of it.
        self._block, self._start, self._at = b"", offset, 0
        self._ended = False

    def __enter__(self) -> Scanner:
        return self

    def __exit__(self, *unused) -> None:
        self._file.close()

    @property
    def offset(self) -> int:
        """Byte at which the next record begins."""
        return self._size if self._ended else self._start + self._at

    def skip(self, count: int | None = None) -> int:
        """Passes over `count` records, default all; returns how many there were to pass."""
        first = self.position
        while count is None or self.position - first < count:
            if self.skip_whole() is None and not self._give_up():
                break
        return self.position - first

    def take(self) -> Record | None:
        """The next record; None at the end of the file."""
        position, offset = self.position, self.offset
        length = self.skip_whole()
        if length is None:
            problem = self._problem(offset)
            if not self._give_up():
                return None
            return Record(position, None, problem, self._size - offset)
        # `skip_whole` has moved behind the record, which may reach beyond the block.
        end = self._at
        if end > len(self._block) or end < length + OVERHEAD:
            self._load(offset, length + OVERHEAD)
            end = self._at = length + OVERHEAD
        payload = self._block[end - FOOTER.size - length : end - FOOTER.size]
        (crc,) = FOOTER.unpack_from(self._block, end - FOOTER.size)
        if masked_crc(payload) != crc:
            return Record(position, None, f"damaged payload at byte {offset}")
        return Record(position, payload)

    def skip_whole(self) -> int | None:
        """Moves behind the next record and returns the length of its payload.

        Returns None, and does not move, when no whole record follows.
        """
        if self._ended:
            return None
        at = self._at
        if at + HEADER.size > len(self._block):
            self._load(self._start + at, HEADER.size)
            at = 0
        block = self._block
        if len(block) - at < HEADER.size:
            return None
        length, crc = HEADER.unpack_from(block, at)
        end = at + length + OVERHEAD
        # Checked before it is used: a damaged length could lead anywhere.
        if self._start + end > self._size or masked_crc(block[at : at + 8]) != crc:
            return None
        self._at = end
        self.position += 1
        return length

    def _load(self, offset: int, least: int) -> None:
        """Makes the block start at byte `offset` of the file, with `least` bytes if it has them."""
        known = self._block[offset - self._start :] if offset >= self._start else b""
        # Otherwise the file is read up to the end of the block, which is what follows.
        if not known:
            self._file.seek(offset)
        more = self._file.read(max(_BLOCK, least - len(known)))
        self._block, self._start, self._at = known + more, offset, 0

    def _problem(self, offset: int) -> str:
        """Why no whole record begins at byte `offset`."""
        header = self._block[self._at : self._at + HEADER.size]
        damaged = len(header) == HEADER.size and masked_crc(header[:8]) != HEADER.unpack(header)[1]
        if damaged:
            return f"damaged length at byte {offset}: the rest is lost"
        return f"truncated at byte {offset}"

    def _give_up(self) -> bool:
        """Counts what is left of the file as one unreadable record; False if nothing is."""
        left = self.offset < self._size
        self._ended = True
        # A boolean: one record, or none.
        self.position += left
        return left


def read(path: str) -> Iterator[Record]:
    """Reads a TFRecord file past damage, as `Scanner` does.

    Yields:
      Records in file order, positions counting unreadable ones.
    """
    for record, _ in read_from(path):
        yield record


def read_from(path: str, position: int = 0, offset: int = 0) -> Iterator[tuple[Record, int]]:
    """Like `read`, starting with the record `position`, which begins at byte `offset`.

    Yields:
      (record, byte where the next one begins).
    """
    with Scanner(path, position, offset) as scanner:
        while (record := scanner.take()) is not None:
            yield record, scanner.offset


def spans(path: str) -> Iterator[tuple[int, int]]:
    """(first byte, length) of the payload of each whole record; only headers are checked."""
    with Scanner(path) as scanner:
        while (length := scanner.skip_whole()) is not None:
            yield scanner.offset - FOOTER.size - length, length


@contextlib.contextmanager
def payloads_at() -> Iterator[Callable[[tuple[str, int, int]], bytes]]:
    """Yields a function: (path, first byte, length) as of `spans` → the payload, unchecked.

    Files stay open until the block ends.
    """
    with contextlib.ExitStack() as opened:
        files: dict[str, tf.io.gfile.GFile] = {}

        def read(place: tuple[str, int, int]) -> bytes:
            path, start, length = place
            if path not in files:
                files[path] = opened.enter_context(tf.io.gfile.GFile(path, "rb"))
            files[path].seek(start)
            return files[path].read(length)

        yield read


def count(path: str) -> int:
    """Number of whole records of a file by its headers; a truncated tail is left out."""
    return _measure(path)[0]


def _measure(path: str) -> tuple[int, int]:
    """(whole records, bytes after the last whole record)."""
    total = end = 0
    for start, length in spans(path):
        total, end = total + 1, start + length + FOOTER.size
    return total, tf.io.gfile.stat(path).length - end


def count_all(paths: Sequence[str], max_bad_fraction: float = 0.01) -> list[int]:
    """Records per file, from the folder's `counts.json` where it names the file, else counted.

    Args:
      max_bad_fraction: how much of all bytes may lie behind damage, which is left out.

    Raises:
      DataError: a file is empty, or of another size than in `counts.json`, or too much is lost.
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
                f"{path} has {size} bytes, but {entry['bytes']} in {COUNTS} next to it: it was "
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


def write(path: str, payloads: Iterable[bytes]) -> int:
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
        with atomic.atomic_path(path) as temporary:
            write(temporary, payloads[shard::num_shards])
    note_counts(paths)
    return paths


def _known_counts(sidecar: str) -> dict:
    """What a `counts.json` has, nothing if it does not exist; DataError if it is damaged."""
    if not tf.io.gfile.exists(sidecar):
        return {}
    try:
        return read_object(sidecar)
    except BrokenFile as e:
        raise DataError(
            f"{sidecar} is damaged, perhaps cut off. Delete it: only the numbers of records, which "
            "are then counted again, are in it."
        ) from e


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
    write_json(sidecar, entries, indent=1)
