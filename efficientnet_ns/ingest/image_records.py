"""Sets of records from the images of a source: parallel, resumable, the same bytes every time.

Each shard is a stage of its own, with a manifest in `manifests/` beside the records. What a shard
holds depends on the source and the settings only, not on the processes that write the shards.
"""

from __future__ import annotations

import concurrent.futures.process
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from absl import logging

from efficientnet_ns.config import preemption
from efficientnet_ns.config.cpus import available_cpus
from efficientnet_ns.data import image_conversion
from efficientnet_ns.files import json_files, manifests, shard_names, tfexamples, tfrecords
from efficientnet_ns.files.errors import DataError
from efficientnet_ns.files.paths import listed
from efficientnet_ns.files.progress import Progress
from efficientnet_ns.ingest.image_sources import Entry, LeftOut, Loaded, printable

_IMAGES_PER_SHARD, _MAX_SHARDS = 1024, 1024
# In the configuration of a shard: what tells images that were replaced by others of the same size.
_VERSIONS = "versions"
# A process spends seconds on loading TensorFlow, in which another one writes so many images.
_IMAGES_PER_WORKER = 2048


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """One set of records to make.

    Attributes:
      folder: of the records.
      prefix: of the files: train, validation, extra …
      entries: the images, in the order of the records.
      num_shards: number of files; each takes its slice of the entries.
      record: (image bytes, label) → serialized Example; picklable.
      identity: settings that determine the records beside the entries, JSON-able.
      num_classes: labels must be below; None for a set without labels.
      lost: images of the source that are no entries, and why.
      drawn: fraction of the source's images that are entries of sets; of the lost as many count as
        unusable.
    """

    folder: str
    prefix: str
    entries: Sequence[Entry]
    num_shards: int
    record: Callable[[bytes, int], bytes]
    identity: dict[str, object]
    num_classes: int | None
    lost: Sequence[LeftOut] = ()
    drawn: float = 1.0

    def shards(self) -> list[_Shard]:
        """What each file holds."""
        bounds = np.linspace(0, len(self.entries), self.num_shards + 1).astype(int)
        return [
            _Shard(self._stage(shard, start, stop), self.entries[start:stop], self.record)
            for shard, (start, stop) in enumerate(zip(bounds[:-1], bounds[1:]))
        ]

    def _stage(self, shard: int, start: int, stop: int) -> manifests.Stage:
        name = shard_names.shard_name(self.prefix, shard, self.num_shards)
        entries = self.entries[start:stop]
        config = {**self.identity, "images": digest((e.name, e.label, e.size) for e in entries)}
        if any(e.version for e in entries):
            config[_VERSIONS] = digest(e.version for e in entries)
        return manifests.Stage(
            os.path.join(self.folder, "manifests", f"{name}.json"),
            [os.path.join(self.folder, name)],
            config,
        )


class _Shard(NamedTuple):
    stage: manifests.Stage
    entries: Sequence[Entry]
    record: Callable[[bytes, int], bytes]


class Made(NamedTuple):
    """A finished set.

    Attributes:
      records: number of records.
      bad: [name, reason] of every image that was left out.
      shape: (height, width) when all images have the same and were decoded, else None.
    """

    records: int
    bad: list[list[str]]
    shape: tuple[int, int] | None


def digest(values: Iterable[object]) -> str:
    """Short hash of a sequence of strings, numbers and tuples of them."""
    sha = hashlib.sha256()
    for value in values:
        sha.update(repr(value).encode("utf-8", "backslashreplace") + b"\n")
    return sha.hexdigest()[:16]


def unlabeled_record(image: bytes, label: int) -> bytes:
    """An unlabeled record; the label is dropped."""
    return tfexamples.unlabeled_example(image)


def default_num_shards(images: int) -> int:
    """Files for a set of so many images."""
    return max(1, min(_MAX_SHARDS, -(-images // _IMAGES_PER_SHARD)))


def shuffled(entries: Sequence[Entry], seed: int, limit: int | None = None) -> list[Entry]:
    """The entries in the order of a seeded permutation, the first `limit` of them."""
    return [entries[i] for i in np.random.default_rng(seed).permutation(len(entries))[:limit]]


def split(entries: Sequence[Entry], fraction: float) -> tuple[list[Entry], list[Entry]]:
    """(rest, chosen): of each class, the first `fraction` of its entries are chosen.

    At least one of each class that has two, and never all of them.
    """
    totals: dict[int, int] = {}
    for entry in entries:
        totals[entry.label] = totals.get(entry.label, 0) + 1
    left = {c: min(max(round(fraction * n), 1), n - 1) for c, n in totals.items()}
    rest, chosen = [], []
    for entry in entries:
        (chosen if left[entry.label] else rest).append(entry)
        left[entry.label] -= bool(left[entry.label])
    return rest, chosen


def make_sets(
    source,
    sets: Sequence[ImageSet],
    rules: image_conversion.Rules,
    *,
    num_workers: int | None = None,
    max_bad_fraction: float = 0.01,
) -> list[Made]:
    """Writes sets of records from one source; finished shards are verified and skipped.

    Args:
      source: see `sources`; it is sent to the processes.
      num_workers: processes; None: one per CPU core.
      max_bad_fraction: of a set's images, how many may be unusable.

    Returns:
      What became of each set; `<prefix>-quarantine.json` lists what was left out.

    Raises:
      DataError: too many unusable images, or a label out of range.
      manifests.OutputConflict: files in the way.
      WorkerLost: a process was killed.
    """
    for one in sets:
        _refuse_other_sharding(one)
    shards = [(number, shard) for number, one in enumerate(sets) for shard in one.shards()]
    results = [_Result(one, max_bad_fraction) for one in sets]
    pending = []
    for number, shard in shards:
        if _done(shard):
            results[number].add(shard.stage.counts())
        else:
            pending.append((number, shard))
    total = sum(len(shard.entries) for _, shard in shards)
    done = total - sum(len(shard.entries) for _, shard in pending)
    workers = num_workers or min(available_cpus(), 1 + (total - done) // _IMAGES_PER_WORKER)
    batches = list(_batches(source, pending))
    jobs = (
        (numbers, _Job(source, list(part), rules, _limits(sets, numbers)))
        for numbers, part in batches
    )
    with Progress(total, f"records in {sets[0].folder}", "images", done=done) as progress:
        for numbers, job, counts in _run(jobs, min(workers, len(batches))):
            for number, shard, count in zip(numbers, job.shards, counts):
                results[number].add(count)
                progress.update(len(shard.entries))
    made = [result.finish() for result in results]
    for number in range(len(sets)):
        own = [shard.stage for n, shard in shards if n == number]
        counts = [stage.counts()["records"] for stage in own]
        tfrecords.note_counts([stage.outputs[0] for stage in own], counts)
    return made


def _done(shard: _Shard) -> bool:
    """See `manifests.Stage.done`; other images are described by their number."""
    stage = shard.stage
    if not tf.io.gfile.exists(stage.manifest):
        return stage.done()
    noted = manifests.read_manifest(stage.manifest)
    now, before = stage.config, noted["config"]
    if not (_VERSIONS in now and _VERSIONS in before):
        # Earlier versions of this program noted none; where the source lies now, none may be known.
        now = {name: value for name, value in now.items() if name != _VERSIONS}
        now.update({name: before[name] for name in (_VERSIONS,) if name in before})
    try:
        return manifests.Stage(stage.manifest, stage.outputs, now).done()
    except manifests.OutputConflict as e:
        if before.get("images") != now["images"]:
            number = noted["counts"]["records"] + len(noted["counts"]["bad"])
            raise manifests.OutputConflict(
                f"{e} The images are not those it was made from: {number} → {len(shard.entries)}, or "
                "other names, classes or sizes."
            ) from e
        if before.get(_VERSIONS) != now.get(_VERSIONS):
            raise manifests.OutputConflict(
                f"{e} Images were replaced or changed since under the same names. If they are only "
                "copies, give them the times of the originals (cp -p, rsync -t)."
            ) from e
        raise


def _limits(sets: Sequence[ImageSet], numbers: Sequence[int]) -> list[int | None]:
    return [sets[number].num_classes for number in numbers]


def _refuse_other_sharding(one: ImageSet) -> None:
    total = f"-of-{one.num_shards:05d}"
    found = listed(one.folder, re.escape(one.prefix) + "-.{5}-of-.{5}")
    other = [path for path in found if not path.endswith(total)]
    if other:
        raise DataError(
            f"{other[0]} is of a set of another number of shards than {one.num_shards}: the same "
            "images would count twice. Move the old set away, or choose another folder."
        )


def _batches(source, pending: Sequence[tuple[int, _Shard]]) -> Iterator[tuple[list, tuple]]:
    """Shards that are written together: one, or as many as one pass over the source can hold."""
    limit, batch, held = getattr(source, "batch_bytes", 0), [], 0
    for item in pending:
        size = sum(entry.size for entry in item[1].entries)
        if batch and held + size > limit:
            yield tuple(map(list, zip(*batch)))
            batch, held = [], 0
        batch.append(item)
        held += size
    if batch:
        yield tuple(map(list, zip(*batch)))


class _Result:
    """Adds up what the shards of a set report."""

    def __init__(self, one: ImageSet, max_bad_fraction: float):
        self._set, self._allowed = one, max_bad_fraction
        self._records, self._shapes = 0, set()
        self._bad = [list(item) for item in one.lost]
        self._check()

    def add(self, counts: dict) -> None:
        self._records += counts["records"]
        self._bad += counts["bad"]
        # Shards of many shapes, or of images nobody looked at, say None.
        if counts["records"]:
            self._shapes.add(tuple(counts["shape"]) if counts["shape"] else None)
        self._check()

    def _check(self) -> None:
        lost = len(self._set.lost)
        bad = len(self._bad) - lost + round(lost * self._set.drawn)
        images = len(self._set.entries) + round(lost * self._set.drawn)
        if bad > self._allowed * images:
            path = self._write()
            name, reason = self._bad[0]
            raise DataError(
                f"{bad} of {images} images of {self._set.prefix!r} are unusable, "
                f"more than --max_bad_fraction allows. One is {name}: {reason}. "
                f"{path} lists those found so far."
            )

    def finish(self) -> Made:
        self._bad.sort()
        if self._bad:
            path = self._write()
            logging.warning("%d images were left out; %s lists them", len(self._bad), path)
        elif tf.io.gfile.exists(self._path()):
            tf.io.gfile.remove(self._path())  # Of an attempt before the images were mended.
        shape = next(iter(self._shapes)) if len(self._shapes) == 1 else None
        return Made(self._records, self._bad, shape)

    def _path(self) -> str:
        return os.path.join(self._set.folder, f"{self._set.prefix}-quarantine.json")

    def _write(self) -> str:
        path = self._path()
        tf.io.gfile.makedirs(self._set.folder)
        listing = [{"path": name, "reason": reason} for name, reason in sorted(self._bad)]
        json_files.write_json(path, listing, indent=1)
        return path


# --- Processes ------------------------------------------------------------------------------------


class WorkerLost(RuntimeError):
    """A process that wrote records ended without an error of its own."""


class _Job(NamedTuple):
    source: object
    shards: list[_Shard]
    rules: image_conversion.Rules
    num_classes: list[int | None]


def _attached(job: _Job) -> _Job:
    """The job with what only this process has: a source may put pixels into its entries."""
    attach = getattr(job.source, "attach", None)
    if attach is None:
        return job
    return job._replace(shards=[s._replace(entries=attach(s.entries)) for s in job.shards])


def _run(jobs, workers: int) -> Iterator[tuple[list[int], _Job, list[dict]]]:
    """Yields (numbers of the sets, job, counts of its shards), in any order."""
    if workers <= 1:
        for numbers, job in jobs:
            yield numbers, job, _write_shards(_attached(job))
        return
    # Forked children would inherit TensorFlow's threads in an unknown state.
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker)
    running: dict = {}
    try:
        for numbers, job in jobs:
            # Few jobs wait, because they may hold pixels.
            while len(running) >= 2 * workers:
                yield from _finished(running)
            running[pool.submit(_write_shards, _attached(job))] = (numbers, job)
        while running:
            yield from _finished(running)
    except concurrent.futures.process.BrokenProcessPool as e:
        raise WorkerLost(
            f"one of {workers} processes was killed, most often because memory ran out. Finished "
            "shards are kept: start the same command again to continue, with a smaller "
            "--num_workers if it was the memory."
        ) from e
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _finished(running: dict) -> Iterator[tuple[list[int], _Job, list[dict]]]:
    done, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
    for future in done:
        numbers, job = running.pop(future)
        yield numbers, job, future.result()


def _start_worker() -> None:
    """One CPU thread, no accelerator, and no life after the parent's."""
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    for kind in ("GPU", "TPU"):
        tf.config.set_visible_devices([], kind)
    preemption.end_with_parent()


def _write_shards(job: _Job) -> list[dict]:
    """Writes the shards of a job; their counts."""
    everything = [entry for shard in job.shards for entry in shard.entries]
    with job.source.reader(everything) as read:
        return [
            _write_shard(shard, functools.partial(_load, read, job.rules, num_classes))
            for shard, num_classes in zip(job.shards, job.num_classes)
        ]


def _write_shard(shard: _Shard, load: Callable[[Entry], tuple]) -> dict:
    bad: list[list[str]] = []
    shapes = set()

    def payloads() -> Iterator[bytes]:
        for entry in shard.entries:
            try:
                loaded, shape = load(entry)
            except (image_conversion.Unusable, *_UNREADABLE) as e:
                bad.append([printable(entry.name), str(e).replace("\n", " ")])
                continue
            shapes.add(shape)
            yield shard.record(loaded.image, loaded.label)

    with shard.stage.write() as (temporary, counts):
        written = tfrecords.write(temporary[shard.stage.outputs[0]], payloads())
        shape = next(iter(shapes)) if len(shapes) == 1 else None
        counts.update(records=written, bad=bad, shape=shape)
    return json.loads(json.dumps(counts))


_UNREADABLE = (tf.errors.NotFoundError, tf.errors.PermissionDeniedError, FileNotFoundError)


def _load(
    read: Callable[[Entry], Loaded],
    rules: image_conversion.Rules,
    num_classes: int | None,
    entry: Entry,
) -> tuple[Loaded, tuple[int, int] | None]:
    loaded = read(entry)
    if num_classes is not None and not 0 <= loaded.label < num_classes:
        raise DataError(
            f"{printable(entry.name)} has label {loaded.label}, but labels are 0..{num_classes - 1}"
        )
    image, shape = image_conversion.prepare(loaded.image, rules)
    return loaded._replace(image=image), shape
