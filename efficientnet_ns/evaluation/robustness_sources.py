"""Labeled images of a robustness set: class folders, records or TensorFlow Datasets."""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Iterator, Mapping, Sequence

import tensorflow as tf

from efficientnet_ns.data import tasks
from efficientnet_ns.evaluation import robustness_clips
from efficientnet_ns.evaluation import robustness_metrics as metrics
from efficientnet_ns.evaluation import robustness_sets as sets
from efficientnet_ns.files import shard_names, tfexamples, tfrecords
from efficientnet_ns.files.errors import DataError
from efficientnet_ns.files.paths import listed
from efficientnet_ns.ingest import image_sources, tfds_source

# Prefixes of record files; the first one found is read.
_PREFIXES = ("validation", "val", "test", "train")


class Records:
    """The labeled record files `<prefix>-*-of-*` of a folder, as a source."""

    def __init__(self, folder: str, prefix: str):
        self.path, self._prefix = folder, prefix

    def labeled_entries(self) -> list[image_sources.Entry]:
        """Lists all records with their labels; reads every record.

        Raises:
          DataError: If a record is damaged or has no label.
        """
        found = []
        for path in shard_names.list_shards(self.path, self._prefix):
            # `read` checks each record, `spans` returns its position. They stay in step because the
            # first damaged record raises an error.
            spans = tfrecords.spans(path)
            for record in tfrecords.read(path):
                name = f"{os.path.basename(path)}#{record.position}"
                label = -1 if record.payload is None else tfexamples.label(record.payload)
                if label < 0:
                    raise DataError(f"{self.path}/{name}: {record.problem or 'has no label'}")
                found.append(image_sources.Entry(name, label, place=(path, *next(spans))))
        return found

    @contextlib.contextmanager
    def reader(self, entries: Sequence[image_sources.Entry]) -> Iterator[image_sources.Reader]:
        """See `image_sources.Source`."""
        # This does not check the payloads; `labeled_entries` has done so.
        with tfrecords.payload_reader() as payload:
            yield lambda entry: image_sources.Loaded(
                tfexamples.image_bytes(payload(entry.place)), entry.label
            )


def open_images(
    place: str,
    classes: Mapping[str, int],
    tfds_data_dir: str | None = None,
    allow_missing: bool = False,
) -> sets.Images:
    """Returns the images of one set.

    Args:
      place: a folder of class folders, a folder of labeled records, or `tfds:<name>[:split]`.
      classes: folder name → ImageNet class, for all classes of the set.
      tfds_data_dir: data folder of TensorFlow Datasets; None for its default.
      allow_missing: whether some of the classes may be missing.

    Raises:
      DataError: If classes are unknown or missing, or files are damaged.
    """
    if place.startswith(tfds_source.PREFIX):
        images = _of_tfds(place, tfds_data_dir)
    elif prefix := _prefix(place):
        images = _of_records(place, prefix)
    else:
        images = sets.class_folders(place, _naming(place, classes))
    names = {number: name for name, number in classes.items()}
    unknown = [tasks.wnids()[c] for c in images.classes if c not in names]
    sets.refuse(place, "classes that are not in this set", unknown)
    if not allow_missing:
        sets.check_whole(place, images.classes, classes)
    return images


def _naming(place: str, classes: Mapping[str, int]) -> Mapping[str, int]:
    """Maps folder names to classes; accepts WordNet ids even for sets that use numbers (-V2)."""
    if any(name in classes for name in sets.folders(place)):
        return classes
    own = set(classes.values())
    return {wnid: number for wnid, number in sets.classes_of().items() if number in own}


def single_corruption(place: str) -> str | None:
    """Returns `fog/3` for `tfds:imagenet2012_corrupted/fog_3`, a part of ImageNet-C; else None."""
    match = re.fullmatch(rf"{tfds_source.PREFIX}\w+/(\w+)_(\d)(:.*)?", place)
    return match and f"{match[1]}/{match[2]}"


def open_corruptions(
    place: str, tfds_data_dir: str | None = None, allow_missing: bool = False
) -> dict[tuple[str, str], sets.Images]:
    """Maps each (corruption, severity) of ImageNet-C to its images.

    Args:
      place: a folder with `<corruption>/<severity>/`, each as in `open_images`, or `tfds:<name>`, a
        set with configurations `<corruption>_<severity>`, of which the prepared ones are used.
      tfds_data_dir: see `open_images`.
      allow_missing: whether classes or entire corruptions may be missing. Severities must not be
        missing, because a corruption's error is the mean over all severities.

    Raises:
      DataError: If parts are unknown or missing, or have different classes.
    """
    if place.startswith(tfds_source.PREFIX):
        severities, place_of = _of_configurations(place, tfds_data_dir)
    else:
        names = sets.folders(place)
        severities = {name: sets.folders(os.path.join(place, name)) for name in names}
        place_of = functools.partial(os.path.join, place)
    needed, extra = tuple(metrics.ALEXNET_ERROR), tuple(metrics.ALEXNET_ERROR_EXTRA)
    places = {}
    for name in sets.parts(place, list(severities), needed, extra, allow_missing):
        where = os.path.join(place, name)
        for severity in sets.parts(where, severities[name], metrics.SEVERITIES, (), False):
            places[name, severity] = place_of(name, severity)
    images = {
        part: open_images(of_part, sets.classes_of(), tfds_data_dir, allow_missing)
        for part, of_part in places.items()
    }
    # Also with allow_missing: the mean over parts with different classes is meaningless.
    sets.check_equal_classes({places[part]: found for part, found in images.items()})
    return images


def _of_configurations(place: str, tfds_data_dir: str | None):
    """Returns corruption → prepared severities, and a function from both to a part's place."""
    name, split = tfds_source.parse(place)
    severities: dict[str, list[str]] = {}
    for configuration in tfds_source.prepared(name, tfds_data_dir):
        if match := re.fullmatch(r"(\w+)_(\d)", configuration):
            severities.setdefault(match[1], []).append(match[2])
    ending = f":{split}" if split else ""

    def place_of(corruption: str, severity: str) -> str:
        return f"{tfds_source.PREFIX}{name}/{corruption}_{severity}{ending}"

    return severities, place_of


def open_perturbations(path: str, allow_missing: bool = False) -> dict[str, robustness_clips.Clips]:
    """Maps each perturbation of ImageNet-P to its clips: `path/<perturbation>/<wnid>/<clip>`.

    Args:
      path: folder of the perturbations.
      allow_missing: whether classes or perturbations may be missing.

    Raises:
      DataError: If parts are unknown or missing; see also `robustness_clips.clips`.
    """
    found = [name for name in sets.folders(path) if name not in metrics.HARDER_SEQUENCES]
    needed, extra = tuple(metrics.ALEXNET_FLIPS), tuple(metrics.ALEXNET_FLIPS_EXTRA)
    clips = {}
    for name in sets.parts(path, found, needed, extra, allow_missing):
        inside = os.path.join(path, name)
        clips[name] = robustness_clips.clips(inside, sets.classes_of())
        if not allow_missing:
            sets.check_whole(inside, clips[name].labels, sets.classes_of())
    return clips


def _of_tfds(place: str, tfds_data_dir: str | None) -> sets.Images:
    name, split = tfds_source.parse(place)
    builder = tfds_source.load_builder(name, tfds_data_dir)
    splits = sorted(builder.info.splits)
    if split is None and len(splits) != 1:
        raise DataError(f"{place}: choose one of its splits, {place}:<{'|'.join(splits)}>")
    source = tfds_source.Tfds(builder, split or splits[0])
    return _with_classes(source, source.class_names)


def _of_records(folder: str, prefix: str) -> sets.Images:
    task = os.path.join(folder, tasks.TASK_FILE)
    # In records made from class folders, class n is the n-th folder. Without class names, labels
    # are ImageNet's.
    names = tasks.get_task(task).class_names if tf.io.gfile.exists(task) else None
    return _with_classes(Records(folder, prefix), names)


def _with_classes(source, names: Sequence[str] | None) -> sets.Images:
    numbers = sets.numbered(names, source.path) if names else range(len(tasks.wnids()))
    entries = []
    for entry in source.labeled_entries():
        if not 0 <= entry.label < len(numbers):
            raise DataError(
                f"{source.path}/{entry.name} has label {entry.label}; expected 0 to "
                f"{len(numbers) - 1}"
            )
        entries.append(entry._replace(label=numbers[entry.label]))
    if not entries:
        raise DataError(f"{source.path} has no images")
    return sets.Images(source, entries, sorted({entry.label for entry in entries}))


def _prefix(folder: str) -> str | None:
    """Returns the prefix of the record files in a folder; None if there are none."""
    return next((p for p in _PREFIXES if listed(folder, f"{p}-.*-of-.*")), None)
