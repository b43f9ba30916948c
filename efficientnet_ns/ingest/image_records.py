"""Writes sets of records from the images of a source: parallel, resumable and deterministic.

Each shard is a separate stage, with a manifest in `manifests/` next to the records. The contents
of a shard depend only on the source and the settings, not on the processes that write it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from absl import logging

from efficientnet_ns.config import preemption
from efficientnet_ns.config.cpus import available_cpus
from efficientnet_ns.config.processes import run_each
from efficientnet_ns.data import image_conversion
from efficientnet_ns.files import (
    atomic,
    json_files,
    manifests,
    object_stores,
    shard_names,
    tfexamples,
    tfrecords,
)
from efficientnet_ns.files.errors import DataError
from efficientnet_ns.files.paths import listed
from efficientnet_ns.files.progress import Progress
from efficientnet_ns.ingest.image_sources import Entry, LeftOut, Reader, Source, readable

_IMAGES_PER_SHARD, _MAX_SHARDS = 1024, 1024
# Key in the configuration of a shard; detects images replaced by others of the same size.
_VERSIONS = "versions"
# Number of images that a process writes while another loads TensorFlow.
_IMAGES_PER_WORKER = 2048


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """One set of records to make.

    Attributes:
      folder: folder of the records.
      prefix: prefix of the files: train, validation, extra …
      entries: the images, in the order of the records.
      num_shards: number of files; each contains a slice of the entries.
      record: (image bytes, label) → serialized Example; picklable.
      keep_names: whether `record` also takes the image's path in the source.
      identity: settings that, with the entries, determine the records; JSON-able.
      num_classes: labels must be below this number; None for a set without labels.
      lost: images of the source that are not entries, with reasons.
      drawn: fraction of the source's images used in sets; the same fraction of `lost` counts as
        unusable.
    """

    folder: str
    prefix: str
    entries: Sequence[Entry]
    num_shards: int
    record: Callable[..., bytes]
    identity: dict[str, object]
    num_classes: int | None
    lost: Sequence[LeftOut] = ()
    drawn: float = 1.0
    keep_names: bool = False

    def shards(self, number: int) -> list[_Shard]:
        """Returns the contents of each file; `number` is the index of the set."""
        # Shard sizes differ by at most one image.
        bounds = np.linspace(0, len(self.entries), self.num_shards + 1).astype(int)
        made = dataclasses.replace(self, entries=(), lost=())  # Processes need no others.
        return [
            _Shard(self._stage(shard, start, stop), self.entries[start:stop], made, number)
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
    of: ImageSet  # Without entries.
    number: int  # Index of the set.


class Made(NamedTuple):
    """A finished set.

    Attributes:
      records: number of records.
      bad: [name, reason] of every omitted image.
      shape: (height, width) if all images were decoded and have the same shape, else None.
    """

    records: int
    bad: list[list[str]]
    shape: tuple[int, int] | None


def digest(values: Iterable[object]) -> str:
    """Returns a short hash of a sequence of strings, numbers and tuples of them."""
    sha = hashlib.sha256()
    for value in values:
        sha.update(repr(value).encode("utf-8", "backslashreplace") + b"\n")
    return sha.hexdigest()[:16]


def unlabeled_record(image: bytes, label: int, name: str = "") -> bytes:
    """Makes an unlabeled record; drops the label."""
    return tfexamples.unlabeled_example(image, name)


def default_num_shards(images: int) -> int:
    """Returns the number of files for a set of `images` images."""
    return max(1, min(_MAX_SHARDS, -(-images // _IMAGES_PER_SHARD)))


def shuffled(entries: Sequence[Entry], seed: int, limit: int | None = None) -> list[Entry]:
    """Returns the first `limit` entries in the order of a seeded permutation."""
    return [entries[i] for i in np.random.default_rng(seed).permutation(len(entries))[:limit]]


def held_out(images: int, fraction: float) -> int:
    """Returns how many images of a class `split` chooses: at least one of two, never all."""
    return min(max(round(fraction * images), 1), images - 1) if images else 0


def split(entries: Sequence[Entry], fraction: float) -> tuple[list[Entry], list[Entry]]:
    """Returns (rest, chosen): the first `fraction` of each class is chosen; see `held_out`."""
    totals = Counter(entry.label for entry in entries)
    left = {c: held_out(n, fraction) for c, n in totals.items()}
    rest: list[Entry] = []
    chosen: list[Entry] = []
    for entry in entries:
        (chosen if left[entry.label] else rest).append(entry)
        # Counts down to 0, after which all entries go to the rest.
        left[entry.label] -= bool(left[entry.label])
    return rest, chosen


def make_sets(
    source: Source,
    sets: Sequence[ImageSet],
    rules: image_conversion.Rules,
    *,
    num_workers: int | None = None,
    max_bad_fraction: float = 0.01,
) -> list[Made]:
    """Writes sets of records from one source; verifies and skips finished shards.

    Args:
      source: source of the images.
      num_workers: number of processes; None for one per CPU core.
      max_bad_fraction: fraction of a set's images that may be unusable.

    Returns:
      The result for each set; `<prefix>-quarantine.json` lists the omitted images.

    Raises:
      DataError: If too many images are unusable or a label is out of range.
      manifests.OutputConflict: If other files are in the way.
      processes.ProcessDied: If a process was killed.
    """
    for one in sets:
        _refuse_other_sharding(one)
    shards = [shard for number, one in enumerate(sets) for shard in one.shards(number)]
    atomic.remove_abandoned([p for s in shards for p in (s.stage.manifest, *s.stage.outputs)])
    results = [_Result(one, max_bad_fraction) for one in sets]
    pending: list[_Shard] = []
    for shard, done in zip(shards, object_stores.each(_done, shards)):
        if done:
            results[shard.number].add(shard.stage.counts())
        else:
            pending.append(shard)
    total, left = (sum(len(shard.entries) for shard in some) for some in (shards, pending))
    workers = num_workers or min(available_cpus(), 1 + left // _IMAGES_PER_WORKER)
    processes = min(workers, len(pending))
    # A generator, so that pixels are attached just before a process takes the shard.
    jobs = ((source, _attached(source, shard), rules) for shard in pending)
    with Progress(total, f"records in {sets[0].folder}", "images", done=total - left) as progress:
        for job, counts in run_each(_write_shard, jobs, processes, initializer=_start_worker):
            results[job[1].number].add(counts)
            progress.update(len(job[1].entries))
    made = [result.finish() for result in results]
    # Last, so that counts.json describes only complete sets.
    for number in range(len(sets)):
        own = [shard.stage for shard in shards if shard.number == number]
        tfrecords.note_counts(
            [stage.outputs[0] for stage in own], [stage.counts() for stage in own]
        )
    return made


def _done(shard: _Shard) -> bool:
    """Like `manifests.Stage.done`, but its error describes how the images differ."""
    stage = shard.stage
    noted = manifests.manifest_if_any(stage.manifest)
    if noted is None:
        return stage.done()
    now, before = stage.config, noted["config"]
    if not (_VERSIONS in now and _VERSIONS in before):
        # Earlier versions did not store them, and some file systems do not provide them.
        now = {name: value for name, value in now.items() if name != _VERSIONS}
        now.update({name: before[name] for name in (_VERSIONS,) if name in before})
    try:
        return manifests.Stage(stage.manifest, stage.outputs, now).done()
    except manifests.OutputConflict as e:
        if before.get("images") != now["images"]:
            number = noted["counts"]["records"] + len(noted["counts"]["bad"])
            raise manifests.OutputConflict(
                f"{e} The images have changed since: {number} → {len(shard.entries)}, or other names, "
                "classes or sizes."
            ) from e
        if before.get(_VERSIONS) != now.get(_VERSIONS):
            raise manifests.OutputConflict(
                f"{e} Images have been replaced or modified since. If they are only copies, restore the "
                "modification times of the originals (cp -p, rsync -t)."
            ) from e
        raise


def _refuse_other_sharding(one: ImageSet) -> None:
    total = f"-of-{one.num_shards:05d}"
    found = listed(one.folder, re.escape(one.prefix) + "-.{5}-of-.{5}")
    other = [path for path in found if not path.endswith(total)]
    if other:
        raise DataError(
            f"{other[0]} belongs to a set with a number of shards other than {one.num_shards}: the same "
            "images would count twice. Move the old set away, or choose another folder."
        )


class _Result:
    """Sums the counts of the shards of a set."""

    def __init__(self, one: ImageSet, max_bad_fraction: float):
        self._set, self._allowed = one, max_bad_fraction
        self._records = 0
        self._shapes: set[tuple[int, int] | None] = set()
        self._bad = [list(item) for item in one.lost]
        # Fails before anything is written if too many images are lost.
        self._check()

    def add(self, counts: dict) -> None:
        self._records += counts["records"]
        self._bad += counts["bad"]
        # None for shards with several shapes or with images that were not decoded.
        if counts["records"]:
            self._shapes.add(tuple(counts["shape"]) if counts["shape"] else None)
        self._check()

    def _check(self) -> None:
        lost = len(self._set.lost)
        bad = len(self._bad) - lost + round(lost * self._set.drawn)
        images = len(self._set.entries) + round(lost * self._set.drawn)
        # A single bad image does not indicate a wrong source, but a lost entry may be a folder.
        least = 1 if self._allowed and not lost else 0
        if bad > max(self._allowed * images, least):
            path = self._write()
            name, reason = self._bad[0]
            raise DataError(
                f"{bad} of {images} images of {self._set.prefix!r} are unusable, "
                f"more than --max_bad_fraction allows, for example {name}: {reason}. "
                f"{path} lists those found so far: repair or remove them, or allow more."
            )

    def finish(self) -> Made:
        # Shards finish in any order.
        self._bad.sort()
        if self._bad:
            path = self._write()
            logging.warning("omitted %d images, listed in %s", len(self._bad), path)
        else:
            object_stores.remove(self._path())  # From an attempt before the images were repaired.
        shape = next(iter(self._shapes)) if len(self._shapes) == 1 else None
        return Made(self._records, self._bad, shape)

    def _path(self) -> str:
        return os.path.join(self._set.folder, f"{self._set.prefix}-quarantine.json")

    def _write(self) -> str:
        path = self._path()
        object_stores.make_folder(self._set.folder)
        listing = [{"path": name, "reason": reason} for name, reason in sorted(self._bad)]
        json_files.write_json(path, listing, indent=1)
        return path


# --- Processes ------------------------------------------------------------------------------------


def _attached(source: Source, shard: _Shard) -> _Shard:
    """Returns the shard with pixels if its source attaches them, which only this process can do."""
    attach = getattr(source, "attach", None)
    return shard._replace(entries=attach(shard.entries)) if attach else shard


def _start_worker() -> None:
    """Limits the process to one CPU thread and no accelerator, and ends it with its parent."""
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    # Otherwise every process would reserve GPU memory.
    for kind in ("GPU", "TPU"):
        tf.config.set_visible_devices([], kind)
    preemption.end_with_parent()


def _write_shard(source: Source, shard: _Shard, rules: image_conversion.Rules) -> dict:
    """Writes a shard; returns its counts."""
    stage, entries, of, _ = shard
    bad: list[list[str]] = []
    shapes = set()

    def payloads(read: Reader) -> Iterator[bytes]:
        for entry in entries:
            try:
                loaded = read(entry)
                _check_label(entry.name, loaded.label, of.num_classes)
                image, shape = image_conversion.prepare(loaded.image, rules)
            except (image_conversion.Unusable, *_UNREADABLE) as e:
                bad.append([readable(entry.name), str(e).replace("\n", " ")])
                continue
            shapes.add(shape)
            name = (readable(entry.name),) if of.keep_names else ()
            yield of.record(image, loaded.label, *name)

    with source.reader(entries) as read, stage.write(clean=False) as (temporary, counts):
        marks = tfrecords.Marks()
        tfrecords.write(temporary[stage.outputs[0]], payloads(read), marks)
        # Writing has run `payloads`, which fills `bad` and `shapes`.
        shape = next(iter(shapes)) if len(shapes) == 1 else None
        counts.update(**marks.noted(), bad=bad, shape=shape)
    # As in the manifest of a skipped shard: lists instead of tuples.
    return json.loads(json.dumps(counts))


# Errors that affect one file; other errors of a file system abort the work.
_UNREADABLE = (tf.errors.NotFoundError, tf.errors.PermissionDeniedError, FileNotFoundError)


def _check_label(name: str, label: int, num_classes: int | None) -> None:
    if num_classes is not None and not 0 <= label < num_classes:
        raise DataError(f"{readable(name)} has label {label}, but labels are 0..{num_classes - 1}")
