"""Completed parts of unfinished shards: a killed process loses a minute of work, not a day.

A part is one file, `.part-<task>-<settings>-<first>`: a TFRecord file whose first record is a JSON
header and whose second record contains the labels and top-1 probabilities, followed by the records
of the output. Each part stores the input position at which the next part begins, so the parts of a
shard form a chain. A part is valid only if its checksum matches and it was made with the same
settings. Parts of two processes that work on one shard may overlap or replace each other; any chain
of them produces the same output.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence

import google_crc32c
import numpy as np

from efficientnet_ns.files import atomic, object_stores, tfrecords


@dataclasses.dataclass
class PartFile:
    """Predictions for a part of a shard.

    Attributes:
      first: index of its first record among the worker's records.
      records: number of the worker's records that it covers.
      place: (position, byte) of the first input record after it.
      last: whether the input ends with it.
      lost: number of input bytes after damage, in which the reader cannot find records.
      quarantine: [[index of the record among the worker's, position in the file, reason]].
      labels, top_probs: int32 and float32 [records].
      payloads: records of the output; empty if the part was read.
      marks: uint64 [records, M], see `fingerprints.marks`; M is 0 without fingerprints.
    """

    first: int
    records: int
    place: tuple[int, int]
    last: bool
    lost: int
    quarantine: list[list]
    labels: np.ndarray
    top_probs: np.ndarray
    payloads: list[bytes] = dataclasses.field(default_factory=list)
    marks: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros([0, 0], np.uint64))

    @classmethod
    def join(cls, parts: Sequence[PartFile]) -> PartFile:
        """Joins consecutive parts into one."""
        return dataclasses.replace(
            parts[-1],
            first=parts[0].first,
            records=sum(part.records for part in parts),
            quarantine=[entry for part in parts for entry in part.quarantine],
            labels=np.concatenate([part.labels for part in parts]),
            top_probs=np.concatenate([part.top_probs for part in parts]),
            payloads=[payload for part in parts for payload in part.payloads],
            marks=np.concatenate([part.marks for part in parts]),
        )

    _STORED = ("first", "records", "place", "last", "lost", "quarantine")


class Broken(RuntimeError):
    """Raised if a part is damaged or was replaced while it was read."""


class Parts:
    """The parts of one shard and worker.

    Args:
      folder: folder of the part files.
      task: name of the `ShardTask`.
      settings: all settings that determine the bits of the output.
    """

    def __init__(self, folder: str, task: str, settings: dict):
        self._settings = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
        self._prefix = os.path.join(folder, f".part-{task}-")

    def _path(self, first: int) -> str:
        return f"{self._prefix}{self._settings}-{first:010d}"

    def write(self, part: PartFile) -> None:
        """Writes a part atomically."""
        stored = {name: getattr(part, name) for name in PartFile._STORED}
        numbers = part.labels.astype("<i4").tobytes() + part.top_probs.astype("<f4").tobytes()
        numbers += part.marks.astype("<u8").tobytes()
        body = b"".join(tfrecords.frame(p) for p in [numbers, *part.payloads])
        # A single checksum, because those of the frames are not verified when a part is read.
        stored.update(settings=self._settings, bytes=len(body), crc=google_crc32c.value(body))
        header = tfrecords.frame(json.dumps(stored).encode())
        atomic.write(self._path(part.first), header + body)

    def chain(self) -> Iterator[tuple[PartFile, bytes]]:
        """Yields the completed parts from the first record, and the bytes of their records."""
        first, last = 0, False
        # A part that is missing, damaged or made with other settings ends the chain.
        while not last and (found := self._read(first)) is not None:
            yield found
            first, last = first + found[0].records, found[0].last

    def _read(self, first: int) -> tuple[PartFile, bytes] | None:
        content = object_stores.read(self._path(first))
        if content is None:
            return None
        header, body = tfrecords.payload_in(content, 0)
        try:
            stored = json.loads(header)
            good = stored.pop("settings") == self._settings and stored["first"] == first
            good = good and stored.pop("bytes") == len(content) - body
            if not good or stored.pop("crc") != google_crc32c.value(content[body:]):
                return None
        # The header is not JSON or lacks a field.
        except (ValueError, KeyError):
            return None
        numbers, end = tfrecords.payload_in(content, body)
        # int32 labels, the same number of float32 probabilities, and any marks.
        half = 4 * (count := stored["records"])
        stored["place"] = tuple(stored["place"])
        marks = np.frombuffer(numbers[2 * half :], "<u8")
        part = PartFile(
            **stored,
            labels=np.frombuffer(numbers[:half], "<i4"),
            top_probs=np.frombuffer(numbers[half : 2 * half], "<f4"),
            # NumPy cannot infer a dimension of an array without elements.
            marks=marks.reshape(count, -1) if count else np.zeros([0, 0], np.uint64),
        )
        return part, content[end:]

    def remove(self, firsts: Sequence[int]) -> None:
        """Removes the parts that begin with these records, once the output is finished."""
        object_stores.each(object_stores.remove, [self._path(first) for first in firsts])


def task_of(name: str) -> str | None:
    """Returns the task of a part with this file name; None for other names."""
    match = re.fullmatch(r"\.part-(.+)-[0-9a-f]{16}-\d{10}", name)
    return match[1] if match else None
