"""Labels one shard, from its records to its prediction file, in parts that survive a kill.

Reading, decoding with inference, and writing overlap: the caller's thread reads records and
collects predictions in order, a pool computes batches of images, and one thread writes parts.
Batches begin at multiples of their size, so a shard resumed anywhere produces the same bits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import tensorflow as tf
from absl import logging

from efficientnet_ns.config import PredictConfig
from efficientnet_ns.data import image_headers
from efficientnet_ns.files import json_files, manifests, object_stores, tfexamples, tfrecords
from efficientnet_ns.files.errors import DataError
from efficientnet_ns.files.leases import Lease
from efficientnet_ns.files.progress import Progress
from efficientnet_ns.inference.exported import ExportedModel
from efficientnet_ns.inference.teacher import TeacherPredictor
from efficientnet_ns.pseudo_labels.index import IndexWriter, top_one
from efficientnet_ns.pseudo_labels.parts import Broken, PartFile, Parts

# Maximum bytes of records in memory before they are written as a part, and the overhead of a
# record's Python object.
_MAX_PART_BYTES = 16 * 2**20
_OBJECT_BYTES = 128


class TooManyBadRecords(DataError):
    """Raised if more of a shard is unreadable than max_bad_fraction allows."""


@dataclasses.dataclass(frozen=True)
class ShardTask:
    """A worker's share of a shard.

    Attributes:
      name: unique among the tasks of an output folder.
      source: the input file.
      shard, worker: indices; record i of the file is the worker's if i mod `replicas` = `worker`.
      replicas: number of workers that share the shard.
      stage: outputs and settings. Outputs are the prediction file, its index and its info file; with
        `reassign`, only the relabeled file.
      reassign: whether the records are pseudo-labeled records that get new labels.
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
        """`quarantine-00003-of-00128-00000.jsonl`, next to the output, if it exists."""
        folder, base = os.path.split(self.stage.outputs[0])
        return os.path.join(folder, f"quarantine-{base.removeprefix('train-info-')}.jsonl")


@dataclasses.dataclass
class EncodedBatch:
    """Images of one inference batch, and the input position after them.

    Attributes:
      images: encoded images; None for unusable records.
      positions: positions of the records in the file.
      problems: index into `images` → reason why the record is unusable.
      place: (position, byte) of the record after the last one.
      lost: see `PartFile`.
      last: whether the input ends here.
    """

    images: list[bytes | None] = dataclasses.field(default_factory=list)
    positions: list[int] = dataclasses.field(default_factory=list)
    problems: dict[int, str] = dataclasses.field(default_factory=dict)
    place: tuple[int, int] = (0, 0)
    lost: int = 0
    last: bool = False


def _read_batches(task: ShardTask, size: int, place: tuple[int, int]) -> Iterator[EncodedBatch]:
    """Yields the worker's records from `place`, in batches of `size`; the last may be empty."""
    batch = EncodedBatch()
    for record, end in tfrecords.read_from(task.source, *place):
        batch.lost = max(batch.lost, record.lost)
        if record.position % task.replicas == task.worker:
            image, problem = _image(record)
            if image is None:
                batch.problems[len(batch.images)] = problem
            batch.images.append(image)
            batch.positions.append(record.position)
        batch.place = (record.position + 1, end)
        # A lost tail is the last record of a file and is reported with the last batch.
        if len(batch.images) == size and not batch.lost:
            yield batch
            batch = EncodedBatch(place=batch.place)
    batch.last = True
    yield batch


def _image(record: tfrecords.Record) -> tuple[bytes | None, str]:
    """Returns (encoded image, "") or (None, the reason)."""
    if record.payload is None:
        return None, record.problem
    try:
        image = tfexamples.image_bytes(record.payload)
    except DataError as e:
        return None, str(e)
    problem = image_headers.problem(image)
    return (None, problem) if problem else (image, "")


class ShardLabeling:
    """Labels the records of one task.

    Args:
      teacher: computes the probabilities.
      task: what to label.
      options: limits.
      lease: lease on the task; checked before any output is published.
    """

    def __init__(
        self,
        teacher: TeacherPredictor | ExportedModel,
        task: ShardTask,
        options: PredictConfig,
        lease: Lease,
    ):
        self._teacher, self._task, self._options, self._lease = teacher, task, options, lease
        # Includes what changes the bits of predictions but is not a setting of the outputs.
        # Fingerprints are stored only if made, so that parts of earlier versions stay valid.
        engine = teacher.engine
        settings = {**task.stage.config, "engine": engine.name, "batch": engine.batch_size}
        # Exported models make no fingerprints.
        self._marked = getattr(teacher, "fingerprinted", False)
        if self._marked:
            settings["fingerprints"] = True
        folder = os.path.dirname(task.stage.outputs[0])
        self._parts = Parts(folder, task.name, {**settings, "group": teacher.group})

    def run(self) -> None:
        """Labels all records not covered by parts, then assembles the outputs from the parts.

        Raises:
          TooManyBadRecords: Keeps the parts for a run with another limit.
          LeaseLost: If another process has taken over the task.
        """
        # Repeats if assembling the outputs finds a damaged part.
        while True:
            done, place, bad, last = 0, (0, 0), [], False
            for part, _ in self._parts.chain():
                done, place, last = done + part.records, part.place, part.last
                bad += part.quarantine
            if done:
                logging.info("%s: continuing after %d labeled images", self._task.name, done)
            if not last:
                self._label(done, place, bad)
            try:
                self._assemble()
                return
            except Broken as e:
                logging.warning("%s: labeling the missing part again", e)

    def _label(self, done: int, place: tuple[int, int], bad: list[list]) -> None:
        concurrency, total = self._teacher.engine.concurrency, self._expected_total()
        waiting: deque[tuple[EncodedBatch, Future]] = deque()
        with (
            ThreadPoolExecutor(concurrency) as pool,
            ThreadPoolExecutor(1) as disk,
            Progress(total or 0, self._task.name, "images", done) as progress,
        ):
            ready: list[PartFile] = []
            # A completed task, so that there is always one to wait for.
            began, writing = time.monotonic(), disk.submit(lambda: None)

            def collect() -> None:
                nonlocal done, ready, began, writing
                batch, prediction = waiting.popleft()
                reassign = self._task.reassign
                ready.append(_part(batch, *prediction.result(), first=done, reassign=reassign))
                done += len(batch.images)
                progress.update(len(batch.images))
                age = time.monotonic() - began
                if batch.last or age > self._options.part_seconds or _size(ready) > _MAX_PART_BYTES:
                    part = PartFile.join(ready)
                    bad.extend(part.quarantine)
                    self._check_bad(part, bad, total)
                    # At most one part waits for the disk; errors of the last one are raised here.
                    writing.result()
                    writing = disk.submit(self._publish, part)
                    ready, began = [], time.monotonic()

            label = getattr(self._teacher, "marked" if self._marked else "label")
            for batch in _read_batches(self._task, self._teacher.group, place):
                waiting.append((batch, pool.submit(label, batch.images)))
                # Enough batches to keep the pool busy while this thread reads; bounds memory.
                if len(waiting) > 2 * concurrency:
                    collect()
            while waiting:
                collect()
            writing.result()

    def _publish(self, part: PartFile) -> None:
        # LeaseLost reaches the caller's thread through the future.
        self._lease.check()
        self._parts.write(part)

    def _expected_total(self) -> int | None:
        """Returns the number of the worker's records; None if reading every header is slow."""
        if "://" in self._task.source:
            return None
        count = tfrecords.count(self._task.source)
        return len(range(self._task.worker, count, self._task.replicas))

    def _check_bad(self, part: PartFile, bad: list[list], expected: int | None) -> None:
        """Raises TooManyBadRecords as soon as the limit is certain to be exceeded."""
        total = part.first + part.records
        if not part.last:
            if expected is None:
                return
            # An unreadable tail counts as one more record.
            total = expected + 1
        limit, source = self._options.max_bad_fraction, self._task.source
        # In bytes, because the number of records in a lost tail is unknown.
        lost = part.lost / max(1, tf.io.gfile.stat(source).length) if part.lost else 0
        if len(bad) <= limit * total and lost <= limit:
            return
        tail = f" and {lost:.1%} of the file cannot be read" if lost else ""
        first = f"record {bad[0][1]}: {bad[0][2]}" if bad else "the tail"
        raise TooManyBadRecords(
            f"{source}: {len(bad)} of {total} records are unreadable{tail}, more than "
            f"--max_bad_fraction={limit}; the first is {first}"
        )

    def _assemble(self) -> None:
        """Publishes the outputs; raises Broken if the parts do not cover the entire input."""
        task, stage = self._task, self._task.stage
        quarantine: list[list] = []
        firsts: list[int] = []
        # `Tasks.remove_left_behind` removes leftovers of killed processes for all tasks at once.
        with stage.write(clean=False) as (temporary, counts), contextlib.ExitStack() as opened:
            index = None
            if not task.reassign:
                path = temporary[stage.outputs[1]]
                index = IndexWriter(path, task.shard, task.worker, marked=self._marked)
                opened.enter_context(index)
            total, whole = 0, False
            with tf.io.gfile.GFile(temporary[stage.outputs[0]], "wb") as f:
                for part, body in self._parts.chain():
                    f.write(body)
                    if index:
                        index.add(part.labels, part.top_probs, part.marks)
                    quarantine += part.quarantine
                    total, whole = total + part.records, part.last
                    firsts.append(part.first)
            if not whole:
                raise Broken(f"{task.name}: a part was damaged or replaced")
            # The index is complete only when it is closed, and the stage stores its size.
            opened.close()
            if not task.reassign:
                json_files.write_json(temporary[stage.outputs[2]], {"image_num": total})
            self._lease.check()
            # From here, two owners may overlap, which is safe because they write the same bytes.
            _write_quarantine(task, quarantine, total)
            counts.update(
                records=total,
                quarantine={str(n): why for n, _, why in quarantine},
                # Not in the configuration, so that outputs of earlier versions still match.
                engine=self._teacher.engine.name,
            )
        # Last, because the next run removes parts that remain after a kill.
        self._parts.remove(firsts)


def _size(parts: list[PartFile]) -> int:
    return sum(len(payload) + _OBJECT_BYTES for part in parts for payload in part.payloads)


def _part(
    batch: EncodedBatch,
    probs: np.ndarray,
    problems: dict[int, str],
    marks: np.ndarray | None = None,
    *,
    first: int,
    reassign: bool,
) -> PartFile:
    """Returns a batch, which begins at the worker's record `first`, with its predictions.

    Args:
      probs: float32 [N, C], zeros for unusable records.
      problems: index into the batch → reason why the image could not be decoded.
      marks: uint64 [N, M] from a teacher that makes fingerprints.
    """
    problems = {**problems, **batch.problems}
    labels, top_probs = top_one(probs)
    if reassign:
        # Records with new labels have no fixed place, so unusable ones are omitted.
        payloads = [
            tfexamples.pseudo_labeled_example(image, probs[i], int(labels[i]))
            for i, image in enumerate(batch.images)
            if image is not None and i not in problems
        ]
    else:
        # Differs (9) in docs/differences.md: an unreadable record keeps its place, with all-zero probabilities.
        payloads = tfexamples.prediction_examples(probs)
    return PartFile(
        first=first,
        records=len(labels),
        place=batch.place,
        last=batch.last,
        lost=batch.lost,
        quarantine=[[first + i, batch.positions[i], problems[i]] for i in sorted(problems)],
        labels=labels,
        top_probs=top_probs,
        payloads=payloads,
        marks=np.zeros([len(labels), 0], np.uint64) if marks is None else marks,
    )


def _write_quarantine(task: ShardTask, quarantine: list[list], total: int) -> None:
    """Writes the unreadable records of a task, one JSON object per line; no file if there are none.

    `file` and `position` locate the record; `prediction` is the index of its prediction.
    """
    if not quarantine:
        object_stores.remove(task.quarantine_path)
        return
    rows = [
        {"file": task.source, "position": position, "prediction": number, "reason": reason}
        for number, position, reason in quarantine
    ]
    json_files.write_json_lines(task.quarantine_path, rows)
    logging.warning(
        "%s: %d of %d records are unreadable, see %s",
        *(task.source, len(quarantine), total, task.quarantine_path),
    )
