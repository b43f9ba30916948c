"""Selects the unlabeled images most worth labeling: those between two classes, class by class.

The margin of an image is its largest probability minus the second largest. Each predicted class
ranks its images by margin, smallest first. The list starts with the first image of every class,
followed by the second ones, and so on. It excludes near copies of listed images and images that a
person has reviewed. It takes one pass over the predictions on all cores; memory grows with the
number of classes and the length of the list.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from efficientnet_ns import report
from efficientnet_ns.config import SelectConfig
from efficientnet_ns.config.cpus import available_cpus
from efficientnet_ns.config.processes import run_each
from efficientnet_ns.data import fingerprints
from efficientnet_ns.files import exclusions, object_stores, tfexamples
from efficientnet_ns.files.progress import Progress
from efficientnet_ns.outcomes import outcome
from efficientnet_ns.pseudo_labels import index

LIST, SHEET = "label_next.csv", "label_next.html"
_BYTES_PER_PROCESS = 64 << 20  # A process takes seconds to start.
_SPARE = 2  # Candidates of a class per listed image, because some are copies.
_ROWS = 1 << 16  # Minimum number of candidates that are sorted at once.
_PIXELS = 320


# Dtypes of the fields of an empty `Candidate`.
_KINDS = (np.int64, np.int64, np.float32, np.float32, np.int64, np.int64)


class Candidate(NamedTuple):
    """An image, or many images as arrays.

    Attributes:
      label, second: the most probable class and the second most probable class.
      margin: probability of `label` minus that of `second`.
      prob: probability of `label`.
      shard, record: the place in the unlabeled set; records are numbered from 0 in the input file.
    """

    label: Any
    second: Any
    margin: Any
    prob: Any
    shard: Any
    record: Any


def write(config: SelectConfig, limit: int, folder: str, names: Sequence[str]) -> list[str]:
    """Writes `label_next.csv`, and `label_next.html`, a review sheet of the same images.

    Args:
      config: specifies the predictions, the records and the decisions already made.
      limit: maximum number of images on the list.
      folder: folder of both files.
      names: names of the classes.

    Returns:
      The paths of the list and of the sheet.

    Raises:
      DataError: If predictions are missing or cannot be read.
    """
    chosen = choose(config, limit)
    payloads = outcome.read_records(config, {(one.shard, one.record) for one in chosen})
    rows, images = [], []
    for one in chosen:
        payload = payloads[one.shard, one.record]
        place = exclusions.place(index.input_path(config, one.shard)), one.record
        classes = names[one.label], names[one.second]
        name = tfexamples.file_name(payload) if payload else ""
        rows.append([*place, name, *classes, f"{one.prob:.4f}", f"{one.margin:.4f}"])
        picture = report.thumbnail(tfexamples.image_if_any(payload), _PIXELS)
        images.append(report.ReviewImage(picture, *place, one.label, one.prob, name))
    path, sheet = os.path.join(folder, LIST), os.path.join(folder, SHEET)
    exclusions.write(path, ["name", "label", "second", "probability", "margin"], rows)
    report.write_review(sheet, images, names, "Label these next")
    return [path, sheet]


def choose(config: SelectConfig, limit: int) -> list[Candidate]:
    """Returns up to `limit` images with different content, in the order of the list."""
    index_files, changes = index.index_files(config), index.changes(config)
    workers = index.count_workers(config)
    jobs = []
    for shard in index.shards(config):
        # Only the positions, regardless of the decision.
        decided = [changes.get((shard, worker), ((),))[0] for worker in range(workers)]
        # Each class has enough for the entire list, because the other classes may have no images.
        jobs.append((config, shard, decided, _SPARE * limit))
    files = [index.prediction_path(config, s, w) for _, s, d, _ in jobs for w in range(len(d))]
    size = sum(filter(None, object_stores.sizes(files)))
    processes = min(len(jobs), available_cpus(), size // _BYTES_PER_PROCESS)
    best = _Best(_SPARE * limit)
    with Progress(len(jobs), "margins of predictions", "shards") as progress:
        for _, some in run_each(_candidates, jobs, processes):
            best.add(some)
            progress.update(1)
    joined = best.result()
    by_class: dict[int, deque[Candidate]] = {}
    for row in zip(*(values.tolist() for values in joined)):
        by_class.setdefault(row[0], deque()).append(Candidate(*row))
    return _in_turn(list(by_class.values()), _Copies(joined, index_files, workers), limit)


def _candidates(config: SelectConfig, shard: int, decided: list, limit: int) -> Candidate:
    """Returns the images of a shard with the smallest margins, up to `limit` per class."""
    found = _Best(limit)
    for worker, places in enumerate(decided):
        path, start = index.prediction_path(config, shard, worker), 0
        for probs in index.read_predictions(path, config.num_label_classes):
            positions = np.arange(start, start + len(probs))
            start += len(probs)
            # All probabilities of unreadable images are zero.
            undecided = (probs.max(1) > 0) & ~np.isin(positions, places)
            probs, positions = probs[undecided], positions[undecided]
            best = probs.argmax(1)
            rows = np.arange(len(probs))
            top = probs[rows, best]
            # The mask above made a copy, so this does not modify the reader's array.
            probs[rows, best] = -1
            second = probs.argmax(1)
            margin = top - probs[rows, second]
            # Worker w of n predicts records w, w + n, w + 2n … of a shard.
            record = positions * len(decided) + worker
            found.add(Candidate(best, second, margin, top, np.full(len(best), shard), record))
    return found.result()


class _Best:
    """Collects candidates in bounded memory: those with the smallest margins, per class.

    Args:
      limit: maximum number per class.
    """

    def __init__(self, limit: int):
        self._limit = limit
        self._found = [Candidate(*(np.zeros(0, kind) for kind in _KINDS))]

    def add(self, new: Candidate) -> None:
        """Adds candidates, in any order."""
        self._found.append(new)
        # Sorts only if new candidates outnumber the kept ones, which bounds the cost.
        if sum(len(some.label) for some in self._found[1:]) > max(_ROWS, len(self._found[0].label)):
            self._found = [self.result()]

    def result(self) -> Candidate:
        """Returns up to `limit` candidates per class, sorted by class, then by margin."""
        joined = Candidate(*map(np.concatenate, zip(*self._found)))
        # The last key is the primary key. Ties are sorted by place, because shards finish in any
        # order.
        order = np.lexsort([joined.record, joined.shard, joined.margin, joined.label])
        kept = order[_ranks(joined.label[order]) < self._limit]
        return Candidate(*(values[kept] for values in joined))


def _ranks(labels: np.ndarray) -> np.ndarray:
    """Returns the rank, from 0, of each sorted label within its class."""
    # searchsorted finds the first of equal labels, where the class begins.
    return np.arange(len(labels)) - np.searchsorted(labels, labels)


def _in_turn(classes: list[deque[Candidate]], copies: _Copies, limit: int) -> list[Candidate]:
    """Takes the next image that is no copy from each class in turn; sorts each turn by margin."""
    chosen: list[Candidate] = []
    while classes and len(chosen) < limit:
        turn = []
        # In this order, so that of near copies in two classes, the smaller margin is kept.
        for own in sorted(classes, key=lambda own: own[0].margin):
            while own:
                one = own.popleft()
                if not copies.is_one(one.shard, one.record):
                    turn.append(one)
                    break
        # Sorted again, because skipping copies may have changed the order.
        chosen += sorted(turn, key=lambda one: one.margin)
        classes = [own for own in classes if own]
    return chosen[:limit]


class _Copies:
    """Detects copies of the images passed to it before.

    Args:
      candidates: all images that may be passed to it.
      index_files: index files by shard. Without fingerprints in them, no image is a copy.
    """

    def __init__(self, candidates: Candidate, index_files: dict[int, list[str]], workers: int):
        self._marks: dict[tuple[int, int], np.ndarray] = {}
        self._seen = np.zeros([0, len(fingerprints.COLUMNS)], np.uint64)
        for shard, paths in index_files.items():
            records = candidates.record[candidates.shard == shard]
            for worker, path in enumerate(paths):
                own = records[records % workers == worker]
                marks = index.read_marks(path) if len(own) else None
                if marks is not None:
                    keys = ((shard, record) for record in own.tolist())
                    self._marks.update(zip(keys, marks[own // workers]))

    def is_one(self, shard: int, record: int) -> bool:
        """Checks whether an image is a copy of an earlier one; if not, remembers it."""
        marks = self._marks.get((shard, record))
        if marks is None:
            return False
        if fingerprints.are_copies(marks, self._seen).any():
            return True
        self._seen = np.concatenate([self._seen, marks[None]])
        return False
