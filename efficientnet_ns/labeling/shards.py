"""One shard, from its records to the finished prediction file, in parts that survive a kill.

Reading, decoding with inference, and writing overlap: the caller's thread reads records and
gathers answers in order, a pool computes groups of images, and one thread writes parts. Groups are
cut by the number of the record alone, so that a shard resumed anywhere gives the same bits.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import tensorflow as tf
from absl import logging

from efficientnet_ns.config import PredictConfig
from efficientnet_ns.data import headers, manifests, records
from efficientnet_ns.labeling import parts as parts_lib
from efficientnet_ns.labeling.index import UNREADABLE_LABEL, IndexWriter
from efficientnet_ns.labeling.labeler import Labeler
from efficientnet_ns.labeling.queue import Lease
from efficientnet_ns.progress import Progress

# Of finished records held in memory before they are written as a part; a record counts for at least
# what its Python object takes.
_MAX_PART_BYTES = 16 * 2**20
_OBJECT_BYTES = 128


class TooManyBadRecords(records.DataError):
    """More of a shard is unreadable than max_bad_fraction allows."""


@dataclasses.dataclass(frozen=True)
class Unit:
    """A worker's share of a shard.

    Attributes:
      name: unique among the units of an output folder.
      source: the input file.
      shard, worker: their numbers; record i of the file is the worker's when i mod `replicas` is
        `worker`.
      stage: outputs and settings. Outputs are the prediction file, its index and its info file;
        the relabeled file alone when `reassign`.
      reassign: the records are pseudo-labeled ones that get new labels.
    """

    name: str
    source: str
    shard: int
    worker: int
    replicas: int
    stage: manifests.Stage
    reassign: bool

    @property
    def quarantine_path(self) -> str:
        """`quarantine-00003-of-00128-00000.jsonl` beside the output; only there when needed."""
        folder, base = os.path.split(self.stage.outputs[0])
        base = base[len("train-info-") :] if base.startswith("train-info-") else base
        return os.path.join(folder, f"quarantine-{base}.jsonl")


@dataclasses.dataclass
class _Group:
    """Images that are computed together, and where the input goes on after them."""

    images: list[bytes | None] = dataclasses.field(default_factory=list)
    positions: list[int] = dataclasses.field(default_factory=list)
    problems: dict[int, str] = dataclasses.field(default_factory=dict)
    place: tuple[int, int] = (0, 0)
    lost: int = 0
    last: bool = False


def _read_groups(unit: Unit, size: int, place: tuple[int, int]) -> Iterator[_Group]:
    """The worker's records from `place` on, `size` at a time; the last group may be empty."""
    group = _Group()
    for record, end in records.read_from(unit.source, *place):
        group.lost = max(group.lost, record.lost)
        if record.position % unit.replicas == unit.worker:
            image, problem = _image(record)
            if problem:
                group.problems[len(group.images)] = problem
            group.images.append(image)
            group.positions.append(record.position)
        group.place = (record.position + 1, end)
        if len(group.images) == size and not group.lost:
            yield group
            group = _Group(place=group.place)
    group.last = True
    yield group


def _image(record: records.Record) -> tuple[bytes | None, str]:
    """(encoded image, "") or (None, why there is none)."""
    if record.payload is None:
        return None, record.problem
    try:
        image = records.image_bytes(record.payload)
    except records.DataError as e:
        return None, str(e)
    problem = headers.problem(image)
    return (None, problem) if problem else (image, "")


class ShardJob:
    """Labels one unit.

    Args:
      labeler: the teacher.
      unit: what to label.
      options: limits.
      lease: on the unit; asked before anything is published.
    """

    def __init__(self, labeler: Labeler, unit: Unit, options: PredictConfig, lease: Lease):
        self._labeler, self._unit, self._options, self._lease = labeler, unit, options, lease
        engine = labeler.engine
        settings = {**unit.stage.config, "engine": engine.name, "batch": engine.batch_size}
        folder = os.path.dirname(unit.stage.outputs[0])
        self._parts = parts_lib.Parts(folder, unit.name, {**settings, "group": labeler.group})

    def run(self) -> None:
        """Labels what no part covers, then puts the parts together.

        Raises:
          TooManyBadRecords: the parts are kept, for a run with another limit.
          LeaseLost: another process goes on with the unit.
        """
        while True:
            done, place, bad, last = 0, (0, 0), [], False
            for part, _ in self._parts.chain():
                done, place, last = done + part.records, part.place, part.last
                bad += part.quarantine
            if done:
                logging.info("%s: %d images were labeled before", self._unit.name, done)
            if not last:
                self._label(done, place, bad)
            try:
                self._assemble()
                return
            except parts_lib.Broken as e:
                logging.warning("%s: labeling the missing part again", e)

    def _label(self, done: int, place: tuple[int, int], bad: list[list]) -> None:
        lanes, total = self._labeler.engine.lanes, self._expected_total()
        waiting: deque[tuple[_Group, Future]] = deque()
        with (
            ThreadPoolExecutor(lanes) as pool,
            ThreadPoolExecutor(1) as disk,
            Progress(total or 0, self._unit.name, "images", done) as progress,
        ):
            builder = _PartBuilder(self._unit.reassign, done)
            writing: Future | None = None

            def gather() -> None:
                nonlocal builder, writing
                group, answer = waiting.popleft()
                builder.add(group, *answer.result())
                progress.update(len(group.images))
                full = builder.size > _MAX_PART_BYTES
                if full or group.last or builder.age > self._options.part_seconds:
                    part = builder.part(group)
                    bad.extend(part.quarantine)
                    self._check_bad(part, bad, total)
                    if writing is not None:
                        writing.result()
                    writing = disk.submit(self._publish, part)
                    builder = _PartBuilder(self._unit.reassign, part.first + part.records)

            for group in _read_groups(self._unit, self._labeler.group, place):
                waiting.append((group, pool.submit(self._labeler.label, group.images)))
                if len(waiting) > 2 * lanes:
                    gather()
            while waiting:
                gather()
            writing.result()

    def _publish(self, part: parts_lib.Part) -> None:
        self._lease.check()
        self._parts.write(part)

    def _expected_total(self) -> int | None:
        """Whole records of this worker; None where looking at every header is slow."""
        if "://" in self._unit.source:
            return None
        count = records.count(self._unit.source)
        return len(range(self._unit.worker, count, self._unit.replicas))

    def _check_bad(self, part: parts_lib.Part, bad: list[list], expected: int | None) -> None:
        """Stops as soon as the limit is sure to be exceeded."""
        total = part.first + part.records
        if not part.last:
            if expected is None:
                return
            # A tail that cannot be read is one more record.
            total = expected + 1
        limit, source = self._options.max_bad_fraction, self._unit.source
        lost = part.lost / max(1, tf.io.gfile.stat(source).length)
        if len(bad) <= limit * total and lost <= limit:
            return
        tail = f" and {lost:.1%} of the file cannot be read" if lost else ""
        first = f"record {bad[0][1]}: {bad[0][2]}" if bad else "the tail"
        raise TooManyBadRecords(
            f"{source}: {len(bad)} of {total} records are unreadable{tail}, more than "
            f"--max_bad_fraction={limit}; the first is {first}"
        )

    def _assemble(self) -> None:
        """Publishes the outputs from the parts; Broken when they do not reach to the end."""
        unit, stage = self._unit, self._unit.stage
        quarantine: list[list] = []
        with stage.write() as (temporary, counts):
            index = None
            if not unit.reassign:
                index = IndexWriter(temporary[stage.outputs[1]], unit.shard, unit.worker)
            total, whole = 0, False
            with tf.io.gfile.GFile(temporary[stage.outputs[0]], "wb") as f:
                for part, body in self._parts.chain():
                    f.write(body)
                    if index:
                        index.add(part.labels, part.top_probs)
                    quarantine += part.quarantine
                    total, whole = total + part.records, part.last
            if index:
                index.close()
            if not whole:
                raise parts_lib.Broken(f"{unit.name}: a part was damaged or replaced")
            if not unit.reassign:
                with tf.io.gfile.GFile(temporary[stage.outputs[2]], "w") as f:
                    f.write(json.dumps({"image_num": total}))
            self._lease.check()
            write_quarantine(unit, quarantine)
            if quarantine:
                logging.warning(
                    "%s: %d of %d records are unreadable, see %s",
                    unit.source,
                    len(quarantine),
                    total,
                    unit.quarantine_path,
                )
            counts.update(records=total, quarantine={str(n): why for n, _, why in quarantine})
        self._parts.remove()


class _PartBuilder:
    """Gathers answers until they are worth a file."""

    def __init__(self, reassign: bool, first: int):
        self._reassign, self._first, self._began = reassign, first, time.monotonic()
        self._payloads: list[bytes] = []
        self._labels: list[np.ndarray] = []
        self._top: list[np.ndarray] = []
        self._quarantine: list[list] = []
        self._records = self.size = 0

    @property
    def age(self) -> float:
        """Seconds since it was begun."""
        return time.monotonic() - self._began

    def add(self, group: _Group, probs: np.ndarray, problems: dict[int, str]) -> None:
        """Appends a group with the answers to it."""
        problems = {**problems, **group.problems}
        labels = probs.argmax(1).astype(np.int32)
        labels[list(problems)] = UNREADABLE_LABEL
        for slot in sorted(problems):
            number = self._first + self._records + slot
            self._quarantine.append([number, group.positions[slot], problems[slot]])
        if self._reassign:
            # Without a label it is of no use to a student, and it has no place to keep.
            payloads = [
                records.pseudo_labeled_example(group.images[i], probs[i], int(labels[i]))
                for i in range(len(labels))
                if i not in problems
            ]
        else:
            # Differs (9): an unreadable record keeps its place with probabilities of zero.
            payloads = records.prediction_examples(probs)
        self._payloads += payloads
        self._labels.append(labels)
        self._top.append(probs.max(1, initial=0))
        self._records += len(labels)
        self.size += sum(map(len, payloads)) + _OBJECT_BYTES * len(payloads)

    def part(self, group: _Group) -> parts_lib.Part:
        """All that was added, up to and with `group`."""
        return parts_lib.Part(
            first=self._first,
            records=self._records,
            place=group.place,
            last=group.last,
            lost=group.lost,
            quarantine=self._quarantine,
            labels=np.concatenate(self._labels),
            top_probs=np.concatenate(self._top),
            payloads=self._payloads,
        )


def write_quarantine(unit: Unit, quarantine: list[list]) -> None:
    """Lists the unreadable records of a unit, one JSON object per line; no file without any.

    `file` and `position` say where the record is, `prediction` which prediction stands for it.
    """
    if not quarantine:
        if tf.io.gfile.exists(unit.quarantine_path):
            tf.io.gfile.remove(unit.quarantine_path)
        return
    with (
        manifests.atomic_path(unit.quarantine_path) as temporary,
        tf.io.gfile.GFile(temporary, "w") as f,
    ):
        for number, position, reason in quarantine:
            entry = {"file": unit.source, "position": position, "prediction": number}
            f.write(json.dumps({**entry, "reason": reason}) + "\n")
