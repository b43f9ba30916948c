"""Finds leaks and duplicates: images that are in several sets, or several times in one set.

Writes to the output folder: `report.html` with totals and pairs of pictures, `copies.csv` with
every image that is a copy of an earlier one, and `exclude.csv`, the copies to exclude. Evaluation
images are always kept; labeled ones are excluded if they are copies of evaluation images, unlabeled
ones if they are copies of any other image.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tensorflow as tf
from absl import logging

from efficientnet_ns import report
from efficientnet_ns.config import CheckConfig, ConfigError, check, require
from efficientnet_ns.data import fingerprints, tasks
from efficientnet_ns.files import (
    exclusions,
    manifests,
    object_stores,
    parquet_sql,
    shard_names,
    tfexamples,
    tfrecords,
)
from efficientnet_ns.files.errors import DataError
from efficientnet_ns.hygiene import image_marks
from efficientnet_ns.hygiene.near_copies import (
    EVALUATION,
    EXCLUDED,
    LABELED,
    ROLES,
    UNLABELED,
    Copy,
    ImageSet,
    Search,
)
from efficientnet_ns.pseudo_labels import unlabeled_set

_PAIRS = 24  # Pictures of pairs per section.
_HELD_OUT = ("validation", "dev", "test")  # Usual names of evaluation and test sets.
_PIXELS = 192


def check_data(options: CheckConfig) -> dict[str, Any]:
    """Finds copies among evaluation, labeled and unlabeled images, and writes the results.

    Returns:
      `copies`: number of images by `<role> of <role>`; `excluded`: number of images in
      `exclude.csv`; `crowded`: see `Search`; `report`: path of the page.

    Raises:
      ConfigError: If no set is given, a folder is given as two kinds of sets, or no task identifies
        the sets of a labeled folder.
      DataError: If a folder has no set, shards of a set are missing, or predictions are of another
        set or cannot be used.
      manifests.OutputConflict: If the fingerprints in the output folder are of other records.
      OSError: If TMPDIR has too little space, see `Search`.
    """
    check(options)
    require(options, "output_dir")
    sets = _sets(options)
    search = Search(sets, near=options.near)
    totals = search.totals()
    object_stores.make_folder(options.output_dir)
    names = _names(search.named())
    for name, where in (("copies.csv", "true"), ("exclude.csv", EXCLUDED)):
        _write_list(os.path.join(options.output_dir, name), search.copies(where), names)
    path = os.path.join(options.output_dir, "report.html")
    _write_report(path, sets, search, totals)
    excluded = sum(out for _, out in totals.values())
    result: dict[str, Any] = {"copies": {}, "excluded": excluded}
    result |= {"crowded": search.crowded, "report": path}
    # Sums equal files and near copies, which the report lists separately.
    for (role, of_role, _), (number, _) in totals.items():
        name = f"{ROLES[role]} of {ROLES[of_role]}"
        result["copies"][name] = result["copies"].get(name, 0) + number
    return result


def _sets(options: CheckConfig) -> list[ImageSet]:
    sets: list[ImageSet] = []

    def add(role: int, folder: str, prefix: str) -> None:
        files = shard_names.list_shards(folder, prefix)
        marks = _marks_folder(options, ROLES[role], prefix, folder)
        # Crops of an image find its cropped copies. They triple the work, so only evaluation
        # images have them.
        made = image_marks.write_marks(files, marks, crops=role == EVALUATION)
        sets.append(ImageSet(role, f"{prefix} of {folder}", files, made))

    labeled, evaluated = (
        list(filter(None, folders.split(";")))
        for folders in (options.label_data_dir, options.eval_data_dir)
    )
    _check_folders(labeled, evaluated)
    for folder in labeled:
        task, before = _task(options, folder), len(sets)
        # A test set that the task does not name must not leak either. No repetition: one set may
        # serve as evaluation and test set.
        for prefix in dict.fromkeys((task.eval_set, task.test_set, *_HELD_OUT)):
            if prefix and prefix != task.train_set and _has(folder, prefix):
                add(EVALUATION, folder, prefix)
        if _has(folder, task.train_set):
            add(LABELED, folder, task.train_set)
        _require_more(sets, before, "label_data_dir", folder)
    for folder in evaluated:
        before = len(sets)
        # Includes `train`, the name of a labeled set in make_records unless --image_set is given.
        for prefix in (*_HELD_OUT, "train"):
            if _has(folder, prefix):
                add(EVALUATION, folder, prefix)
        _require_more(sets, before, "eval_data_dir", folder)
    if options.unlabel_data_dir:
        sets.append(_unlabeled(options))
    if not sets:
        raise ConfigError("--label_data_dir, --eval_data_dir or --unlabel_data_dir is required")
    if not any(one.role == EVALUATION for one in sets):
        logging.warning(
            "no evaluation set was found in --label_data_dir or --eval_data_dir, so copies of evaluation "
            "images are not searched for"
        )
    return sorted(sets, key=lambda one: one.role)


def _check_folders(labeled: Sequence[str], evaluated: Sequence[str]) -> None:
    both = {exclusions.place(folder) for folder in labeled} & set(map(exclusions.place, evaluated))
    if both:
        raise ConfigError(
            f"{min(both)} is in --label_data_dir and --eval_data_dir, where its training set would "
            "count as an evaluation set: pass it only as --label_data_dir, which includes its "
            "evaluation and test sets"
        )


def _require_more(sets: Sequence[ImageSet], before: int, flag: str, folder: str) -> None:
    if len(sets) == before:
        raise DataError(
            f"--{flag}={folder} has no records of a set; {unlabeled_set.described(folder)}"
        )


def _task(options: CheckConfig, folder: str) -> tasks.Task:
    path = options.task_name or os.path.join(folder, tasks.TASK_FILE)
    if not options.task_name and not tf.io.gfile.exists(path):
        raise ConfigError(
            f"--task_name is required to identify the sets in {folder}: it has no {tasks.TASK_FILE}; "
            f"{unlabeled_set.described(folder)}"
        )
    return tasks.get_task(path)


def _has(folder: str, prefix: str) -> bool:
    names = tf.io.gfile.listdir(folder) if tf.io.gfile.isdir(folder) else []
    return any((parsed := shard_names.parse(name)) and parsed[0] == prefix for name in names)


def _marks_folder(options: CheckConfig, role: str, prefix: str, folder: str) -> str:
    """Returns a path that depends only on the set, so that adding sets does not move marks."""
    # Sets of several folders may have the same prefix.
    place = hashlib.sha256(exclusions.place(folder).encode()).hexdigest()[:8]
    return os.path.join(options.output_dir, "marks", f"{role}-{prefix}-{place}")


def _unlabeled(options: CheckConfig) -> ImageSet:
    folder = options.unlabel_data_dir
    prefix, files = unlabeled_set.files(folder, options.file_prefix, options.num_shards)
    name = f"{prefix} of {folder}"
    if options.prediction_dir:
        return ImageSet(UNLABELED, name, files, *_noted(options.prediction_dir, files))
    marks = _marks_folder(options, ROLES[UNLABELED], prefix, folder)
    return ImageSet(UNLABELED, name, files, image_marks.write_marks(files, marks, crops=False))


def _noted(folder: str, files: Sequence[str]) -> tuple[list[str], int]:
    """Returns the indexes of a labeling run, with fingerprints, and the workers per shard."""
    num_shards, workers = len(files), 0
    shards = range(num_shards)
    # Indexes do not store the number of workers; the first shard's applies to all.
    while tf.io.gfile.exists(os.path.join(folder, shard_names.index_name(0, num_shards, workers))):
        workers += 1
    paths = [
        os.path.join(folder, shard_names.index_name(shard, num_shards, worker))
        for shard in shards
        for worker in range(workers)
    ]
    missing = [path for path in paths if not tf.io.gfile.exists(path)]
    if missing or not paths:
        raise DataError(
            f"--prediction_dir={folder} lacks the index of a shard, for example "
            f"{(missing or [shard_names.index_name(0, num_shards, 0)])[0]}: label all shards first"
        )
    # A labeling run writes all indexes with the same columns, so the first one is enough.
    db = parquet_sql.connect(1, first=paths[:1])
    columns = {name for name, *_ in db.execute("DESCRIBE first").fetchall()}
    # Version 1.0.0 also stored fingerprints of images of reduced size, which differ.
    made_with = object_stores.each(lambda shard: _made_with(folder, shard, num_shards), shards)
    reduced = any(settings.get("fast_decode") for settings in made_with)
    if reduced or not set(fingerprints.COLUMNS) <= columns:
        raise DataError(
            f"the index in --prediction_dir={folder} has no usable fingerprints (it is of an import, an "
            "exported model, an earlier version, --fast_decode or --nofingerprints): drop "
            "--prediction_dir to read the images"
        )
    _check_input(folder, files, made_with)
    return paths, workers


def _made_with(folder: str, shard: int, num_shards: int) -> dict[str, Any]:
    """Returns the settings of a shard's predictions; empty if they have no manifest."""
    name = f"{shard_names.prediction_name(shard, num_shards, 0)}.manifest.json"
    manifest = manifests.manifest_if_any(os.path.join(folder, name))
    return manifest["config"] if manifest else {}


def _check_input(folder: str, files: Sequence[str], made_with: Sequence[Mapping[str, Any]]) -> None:
    """Raises DataError if the predictions are of other files, compared by names and sizes.

    Args:
      made_with: see `_made_with`, of each file.
    """

    def differs(shard: int) -> bool:
        noted = made_with[shard].get("input")
        return noted is not None and noted != manifests.fingerprint([files[shard]])

    different = object_stores.each(differs, range(len(files)))
    if any(different):
        raise DataError(
            f"--prediction_dir={folder} has predictions of other records than "
            f"{files[different.index(True)]}: pass the predictions of this set, or drop "
            "--prediction_dir to read the images"
        )


def _write_list(path: str, copies: Iterable[Copy], names: Mapping[tuple[str, int], str]) -> None:
    columns = [exclusions.SET, "of_file", "of_record", "of_set", "distance", "name", "of_name"]
    exclusions.write(path, columns, (_row(copy, names) for copy in copies))


def _row(copy: Copy, names: Mapping[tuple[str, int], str]) -> list[Any]:
    own = (copy.file, copy.record, ROLES[copy.role])
    # `exclusions.write` makes only the first path of a row absolute.
    other = (exclusions.place(copy.of_file), copy.of_record, ROLES[copy.of_role])
    distance = copy.distance if copy.distance >= 0 else "same"
    both = ((copy.file, copy.record), (copy.of_file, copy.of_record))
    return [*own, *other, distance, *(names.get(place, "") for place in both)]


def _names(named: Mapping[str, set[int]]) -> dict[tuple[str, int], str]:
    """Returns file names by record, for the images that users act on: evaluation and labeled."""
    return {
        (file, record): tfexamples.file_name(payload)
        for file, records in named.items()
        for record, payload in tfrecords.payloads_of(file, records).items()
    }


# --- The page -------------------------------------------------------------------------------------


def _write_report(
    path: str,
    sets: Sequence[ImageSet],
    search: Search,
    totals: dict[tuple[int, int, bool], tuple[int, int]],
) -> None:
    rows = [
        {
            "images": ROLES[role],
            "are copies of": ROLES[of_role],
            "how": "same file" if same else "near",
            "number": copies,
            "to leave out": out,
        }
        for (role, of_role, same), (copies, out) in totals.items()
    ]
    listed = [
        {"set": ROLES[one.role], "records": one.name, "files": len(one.files)} for one in sets
    ]
    found = report.table(rows)
    if search.crowded:
        found += report.paragraph(
            f"{search.crowded} images are similar to too many others to be compared with all of them; "
            "among training images, only exact fingerprint matches of them were found."
        )
    sections = [
        report.Section("Copies", found),
        report.Section("Sets", report.table(listed)),
    ]
    # Leaks of evaluation images first, in every set.
    for role, of_role in sorted({key[:2] for key in totals}, key=lambda pair: (pair[1], pair[0])):
        where = f"place.role = {role} AND origin.role = {of_role}"
        title = f"{ROLES[role].capitalize()} images that are copies of {ROLES[of_role]} images"
        sections.append(report.Section(title, _pairs(search.copies(where, _PAIRS))))
    report.write_page(
        path,
        title="Leaks and duplicates",
        intro=(
            "Each image is listed with the first image that it is a copy of: evaluation images "
            "come first, then labeled ones, then unlabeled ones. Near copies have 256-bit "
            f"fingerprints that differ in at most {fingerprints.THRESHOLD} bits: recompressed, "
            "resized or gray copies, and center crops of evaluation images. Review the pairs before "
            "you use exclude.csv."
        ),
        sections=sections,
    )


def _pairs(copies: Iterable[Copy]) -> str:
    """Renders the pairs as pictures, the most different first."""
    shown = [
        (place, "same file" if copy.distance < 0 else f"{copy.distance} bits")
        for copy in copies
        for place in ((copy.of_file, copy.of_record), (copy.file, copy.record))
    ]
    payloads = tfrecords.payloads_at(place for place, _ in shown)
    items = []
    for (file, record), alike in shown:
        payload = payloads[file, record]
        name = tfexamples.file_name(payload) or f"{os.path.basename(file)} {record}"
        picture = report.thumbnail(tfexamples.image_if_any(payload), _PIXELS)
        items.append((picture, f"{name}: {alike}"))
    text = "Pairs of the first image and its copy, the most different first."
    return report.paragraph(text) + report.image_grid(items, columns=8, pixel_size=96)
