"""Reads TFRecord files past damage, counts their records, and writes them.

A file is a sequence of frames: the length (8 bytes), its checksum, the payload, its checksum.
TensorFlow's own reader stops at the first damage; this one continues if possible and reports losses.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import itertools
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
import tensorflow as tf
from absl import logging

from efficientnet_ns.files import atomic, object_stores
from efficientnet_ns.files.errors import DataError
from efficientnet_ns.files.json_files import BrokenFile, read_object_if_any, write_json
from efficientnet_ns.files.shard_names import shard_name

HEADER, FOOTER = struct.Struct("<QI"), struct.Struct("<I")
OVERHEAD = HEADER.size + FOOTER.size
COUNTS = "counts.json"
_BLOCK = 4 << 20  # Bytes per read.
_THREADS = 32  # For work that waits: requesting sizes and counting on an object store.


# --- Frames ---------------------------------------------------------------------------------------


def masked_crc(data: bytes) -> int:
    """Returns the checksum of a TFRecord: CRC-32C, rotated and shifted."""
    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def frame(payload: bytes) -> bytes:
    """Adds length and checksums to a payload, as in a TFRecord file."""
    length = len(payload).to_bytes(8, "little")
    return b"".join(
        (length, FOOTER.pack(masked_crc(length)), payload, FOOTER.pack(masked_crc(payload)))
    )


def frames(payloads: np.ndarray) -> np.ndarray:
    """Converts payloads, uint8 [N, L], to frames with length and checksums, uint8 [N, L + 16]."""
    count, size = payloads.shape
    length = size.to_bytes(8, "little")
    made = np.empty([count, size + OVERHEAD], np.uint8)
    made[:, : HEADER.size] = np.frombuffer(length + FOOTER.pack(masked_crc(length)), np.uint8)
    made[:, HEADER.size : -FOOTER.size] = payloads
    crc = np.full(count, google_crc32c.value(bytes(size)), np.uint32)
    for table, column in zip(_crc_tables(size), np.ascontiguousarray(payloads.T)):
        # Most bytes around the numbers are equal in all records.
        crc ^= table[column[0]] if (column == column[0]).all() else table[column]
    masked = ((crc >> 15) | (crc << 17)) + np.uint32(0xA282EAD8)
    made[:, -FOOTER.size :] = masked.astype("<u4")[:, None].view(np.uint8)
    return made


@functools.lru_cache(4)
def _crc_tables(size: int) -> np.ndarray:
    """Returns how each value of each byte changes the CRC-32C of `size` bytes, uint32 [size, 256].

    The checksum is linear: that of any content is that of zeros with the changes of all bytes.
    """
    zeros = google_crc32c.value(bytes(size))
    tables = np.zeros([size, 256], np.uint32)
    for place, bit in itertools.product(range(size), range(8)):
        content = bytearray(size)
        content[place] = 1 << bit
        having = (np.arange(256) >> bit & 1).astype(bool)
        tables[place, having] ^= np.uint32(google_crc32c.value(bytes(content)) ^ zeros)
    return tables


def payload_in(content: bytes, at: int) -> tuple[bytes, int]:
    """Returns (payload, end) of the frame that begins at byte `at`, without verifying checksums."""
    begin = at + HEADER.size
    end = begin + int.from_bytes(content[at : at + 8], "little")
    return content[begin:end], end + FOOTER.size


# --- Reading --------------------------------------------------------------------------------------


class Record(NamedTuple):
    """One record of a file.

    Attributes:
      position: position in the file, from 0.
      payload: None if it could not be read.
      problem: why it could not be read.
      lost: number of bytes from here to the end of the file if all of them are lost.
    """

    position: int
    payload: bytes | None
    problem: str = ""
    lost: int = 0


class Scanner:
    """Reads a TFRecord file in order; skipping a record costs only reading its header.

    A record whose payload fails its checksum is reported, and the next one is read. If a length
    is damaged or the file ends inside a record, the rest of the file is one last unreadable record.
    Payloads of skipped records are not checked.

    It is a context manager that closes the file.

    Args:
      path: path of the file.
      position: position of the record that begins at byte `offset`, where reading starts.

    Attributes:
      position: position of the next record.
    """

    def __init__(self, path: str, position: int = 0, offset: int = 0):
        self.position = position
        self._size = tf.io.gfile.stat(path).length
        self._file = tf.io.gfile.GFile(path, "rb")
        # The block starts at byte `_start` of the file, the next record at byte `_at` of the block.
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
        """Skips `count` records, by default all, and returns how many it skipped."""
        first = self.position
        while count is None or self.position - first < count:
            if self.skip_whole() is None and not self._give_up():
                break
        return self.position - first

    def take(self) -> Record | None:
        """Returns the next record, or None at the end of the file."""
        position, offset = self.position, self.offset
        length = self.skip_whole()
        if length is None:
            problem = self._problem(offset)
            if not self._give_up():
                return None
            return Record(position, None, problem, self._size - offset)
        # `skip_whole` has moved past the record, which may extend beyond the block.
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
        """Moves past the next record and returns the length of its payload.

        Returns None and does not move if no complete record follows.
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
        # Checked before it is used, because a damaged length could point anywhere.
        if self._start + end > self._size or masked_crc(block[at : at + 8]) != crc:
            return None
        self._at = end
        self.position += 1
        return length

    def _load(self, offset: int, least: int) -> None:
        """Makes the block start at byte `offset` of the file, with at least `least` bytes if any."""
        known = self._block[offset - self._start :] if offset >= self._start else b""
        # Otherwise, the file position is the end of the block, where reading continues.
        if not known:
            self._file.seek(offset)
        more = self._file.read(max(_BLOCK, least - len(known)))
        self._block, self._start, self._at = known + more, offset, 0

    def _problem(self, offset: int) -> str:
        """Returns why no complete record begins at byte `offset`."""
        header = self._block[self._at : self._at + HEADER.size]
        damaged = len(header) == HEADER.size and masked_crc(header[:8]) != HEADER.unpack(header)[1]
        if damaged:
            return f"damaged length at byte {offset}: the rest is lost"
        return f"truncated at byte {offset}"

    def _give_up(self) -> bool:
        """Counts the rest of the file as one unreadable record; False if there is no rest."""
        left = self.offset < self._size
        self._ended = True
        # A boolean: one record or none.
        self.position += left
        return left


def read(path: str) -> Iterator[Record]:
    """Reads a TFRecord file past damage, like `Scanner`.

    Yields:
      Records in file order; positions include unreadable ones.
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
    """Yields (first byte, length) of each complete record's payload; checks only headers."""
    with Scanner(path) as scanner:
        while (length := scanner.skip_whole()) is not None:
            yield scanner.offset - FOOTER.size - length, length


def payloads_of(path: str, positions: Iterable[int]) -> dict[int, bytes]:
    """Reads the payloads of some records of a file by position; b"" if one cannot be read.

    The file is read only up to the last of them.
    """
    found = {}
    with Scanner(path) as scanner:
        for position in sorted(set(positions)):
            scanner.skip(position - scanner.position)
            record = scanner.take()
            found[position] = (record and record.payload) or b""
    return found


def payloads_at(places: Iterable[tuple[str, int]]) -> dict[tuple[str, int], bytes]:
    """Like `payloads_of`, for (path, position) in several files, each of which is read once."""
    by_file: dict[str, set[int]] = {}
    for path, position in places:
        by_file.setdefault(path, set()).add(position)
    return {
        (path, position): payload
        for path, positions in sorted(by_file.items())
        for position, payload in payloads_of(path, positions).items()
    }


@contextlib.contextmanager
def payload_reader() -> Iterator[Callable[[tuple[str, int, int]], bytes]]:
    """Yields a function: (path, first byte, length) as in `spans` → the payload, unchecked.

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
    """Counts the complete records of a file by its headers, excluding a truncated tail."""
    return _measure(path)[0].records


class Counted(NamedTuple):
    """Facts about a file that are known without reading it.

    Attributes:
      records: number of complete records.
      size: size in bytes.
      every, marks: the bytes at which record 0, `every`, 2·`every` … begin; empty if unknown.
    """

    records: int
    size: int
    every: int = 0
    marks: tuple[int, ...] = ()


class Marks:
    """Notes where the records of a file begin, from the first to the last one.

    Args:
      least: minimum number of marks to keep if there are enough records; up to twice as many.
    """

    def __init__(self, least: int = 256):
        self._least, self._records, self._every = least, 0, 1
        self._offsets: list[int] = []

    def add(self, offset: int) -> None:
        """Notes that the next record begins at byte `offset`."""
        if self._records % self._every == 0:
            self._offsets.append(offset)
        self._records += 1
        if len(self._offsets) > 2 * self._least:
            del self._offsets[1::2]
            self._every *= 2

    def counted(self, size: int) -> Counted:
        """Returns the facts about the whole file of `size` bytes."""
        return Counted(self._records, size, self._every, tuple(self._offsets))

    def noted(self) -> dict[str, Any]:
        """Returns the counts and marks without the size, JSON-serializable."""
        return {key: value for key, value in _entry(self.counted(0)).items() if key != "bytes"}


def _measure(path: str, least: int = 1) -> tuple[Counted, int]:
    """Returns (the file with at least `least` marks, bytes after its last complete record)."""
    marks, end = Marks(least), 0
    for start, length in spans(path):
        marks.add(end)
        end = start + length + FOOTER.size
    size = tf.io.gfile.stat(path).length
    return marks.counted(size), size - end


def count_all(paths: Sequence[str], max_bad_fraction: float = 0.01) -> list[int]:
    """Returns the number of records per file; see `measure_all`."""
    return [file.records for file in measure_all(paths, max_bad_fraction)]


def measure_all(
    paths: Sequence[str], max_bad_fraction: float = 0.01, spare: str | None = None
) -> list[Counted]:
    """Returns the counts of files, from the folder's `counts.json` if listed there, else counted.

    New counts are stored in `counts.json`, so that files are counted once. A file whose size has
    changed since it was counted is counted again. On an object store, which writes files
    atomically, the sizes of files that are listed there are not checked.

    Args:
      max_bad_fraction: fraction of all bytes that may follow damage; they are left out. Damaged
        files are counted each time.
      spare: folder whose `counts.json` is used for files in folders that are not writable.

    Raises:
      DataError: If a file is empty or differs in size from what its writer noted, or too much is
        lost.
    """
    known = _known(paths, spare)
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
        sizes = {path: entry["bytes"] for path, entry in known.items()}
        # An object store writes files atomically; requesting every size would take minutes.
        asked = [path for path in paths if path not in known or "://" not in path]
        sizes.update(zip(asked, threads.map(lambda path: tf.io.gfile.stat(path).length, asked)))
        new = []
        for path in paths:
            entry, size = known.get(path), sizes[path]
            if entry and entry["bytes"] != size and not entry.get("counted"):
                raise DataError(
                    f"{path} has {size} bytes, but {entry['bytes']} in {COUNTS} next to it: it was "
                    f"truncated or changed. Write it again, or delete {COUNTS} if this is intended."
                )
            if size == 0 and not entry:
                raise DataError(f"{path} is empty: write it again, or delete its whole set")
            if not entry or entry["bytes"] != size:
                new.append(path)
        least = marks_per_file(len(paths))
        measured = dict(zip(new, threads.map(lambda path: _measure(path, least), new)))
    _check_damage(measured, sum(sizes[path] for path in paths), max_bad_fraction)
    _keep({path: file for path, (file, rest) in measured.items() if not rest}, spare)
    return [measured[p][0] if p in measured else _counted(known[p]) for p in paths]


def marks_per_file(files: int) -> int:
    """Returns the minimum number of marks in `counts.json` per file of a set of `files` files."""
    # Enough in total to read a set from 256 places at the cost of 1 % of it.
    return max(16, 16384 // files)


def _check_damage(
    measured: Mapping[str, tuple[Counted, int]], total: int, max_fraction: float
) -> None:
    """Logs files with a rest that is left out; DataError if too much of `total` bytes is."""
    damage = [
        f"{path} is damaged after record {file.records}: {rest} bytes left out"
        for path, (file, rest) in measured.items()
        if rest
    ]
    for line in damage:
        logging.warning("%s", line)
    if sum(rest for _, rest in measured.values()) > max_fraction * total:
        raise DataError(f"{damage[0]}, more than the fraction {max_fraction} of the set")


def _known(paths: Sequence[str], spare: str | None) -> dict[str, dict]:
    """Returns path → its entry in the `counts.json` next to it, else in that of `spare`."""
    folders = dict.fromkeys(os.path.dirname(path) for path in paths)
    beside = {folder: _known_counts(os.path.join(folder, COUNTS)) for folder in folders}
    elsewhere = _known_counts(os.path.join(spare, COUNTS)) if spare else {}
    found = {path: beside[os.path.dirname(path)].get(os.path.basename(path)) for path in paths}
    found = {path: entry or elsewhere.get(path) for path, entry in found.items()}
    return {path: entry for path, entry in found.items() if entry}


def _keep(files: Mapping[str, Counted], spare: str | None) -> None:
    """Stores the counts next to the files or, if that is not writable, in `spare`."""
    folders: dict[str, dict[str, dict]] = {}
    for path, file in files.items():
        folder, name = os.path.split(path)
        folders.setdefault(folder, {})[name] = {**_entry(file), "counted": True}
    for folder, entries in folders.items():
        if not _try_to_note(folder, entries) and spare:
            _try_to_note(spare, {os.path.join(folder, name): entries[name] for name in entries})


def _try_to_note(folder: str, entries: Mapping[str, dict]) -> bool:
    try:
        object_stores.make_folder(folder)
        _note(folder, entries)
    except (tf.errors.OpError, OSError) as e:
        reason = str(e).splitlines()[0]
        logging.warning("counts cannot be stored in %s: %s", os.path.join(folder, COUNTS), reason)
        return False
    return True


def _entry(file: Counted) -> dict[str, Any]:
    # As text, because one number per line would make a long file.
    marks = {"every": file.every, "marks": " ".join(map(str, file.marks))} if file.marks else {}
    return {"records": file.records, "bytes": file.size, **marks}


def _counted(entry: Mapping[str, Any]) -> Counted:
    marks = tuple(map(int, entry.get("marks", "").split()))
    return Counted(entry["records"], entry["bytes"], entry.get("every", 0), marks)


# --- Writing --------------------------------------------------------------------------------------


def write(path: str, payloads: Iterable[bytes], marks: Marks | None = None) -> int:
    """Writes one TFRecord file under exactly this name and returns the number of records.

    Args:
      marks: notes where the records begin.
    """
    total = size = 0
    # TensorFlow's writer would hold Python's lock while it uploads and thus stop heartbeats.
    with tf.io.gfile.GFile(path, "wb") as f:
        f.write(b"")  # Creates the file even if there are no records.
        for payload in payloads:
            f.write(frame(payload))
            if marks is not None:
                marks.add(size)
            total, size = total + 1, size + len(payload) + OVERHEAD
    return total


def write_sharded(
    folder: str, prefix: str, payloads: Sequence[bytes], num_shards: int
) -> list[str]:
    """Writes `payloads` round-robin to `num_shards` files, each atomically.

    Returns:
      The paths.
    """
    object_stores.make_folder(folder)
    paths = [os.path.join(folder, shard_name(prefix, i, num_shards)) for i in range(num_shards)]
    for shard, path in enumerate(paths):
        with atomic.atomic_path(path) as temporary:
            write(temporary, payloads[shard::num_shards])
    note_counts(paths)
    return paths


def _known_counts(sidecar: str) -> dict:
    """Reads a `counts.json`; empty if it does not exist, DataError if it is damaged."""
    try:
        return read_object_if_any(sidecar) or {}
    except BrokenFile as e:
        raise DataError(
            f"{sidecar} is damaged, perhaps truncated. Delete it: it contains only record counts, "
            "which are then counted again."
        ) from e


def note_counts(paths: Sequence[str], counts: Sequence[Mapping[str, Any]] | None = None) -> None:
    """Stores the number of records and bytes of files of one folder in its `counts.json`.

    Args:
      counts: for each file, the result of `Marks.noted` or at least its `records`; None counts them.
    """
    least = marks_per_file(len(paths))
    if counts is None:
        files = [_measure(path, least)[0] for path in paths]
    else:
        sizes = object_stores.sizes(paths)
        files = [_thinned(_counted({**n, "bytes": size}), least) for n, size in zip(counts, sizes)]
    _note(os.path.dirname(paths[0]), entries(paths, files))


def entries(paths: Sequence[str], files: Sequence[Counted]) -> dict[str, dict]:
    """Returns the entries of files for the `counts.json` next to them."""
    return {os.path.basename(path): _entry(file) for path, file in zip(paths, files)}


def _thinned(file: Counted, least: int) -> Counted:
    while len(file.marks) > 2 * least:
        file = file._replace(every=2 * file.every, marks=file.marks[::2])
    return file


def _note(folder: str, entries: Mapping[str, dict]) -> None:
    """Adds entries to the `counts.json` of a folder."""
    sidecar = os.path.join(folder, COUNTS)
    write_json(sidecar, {**_known_counts(sidecar), **entries}, indent=1)
