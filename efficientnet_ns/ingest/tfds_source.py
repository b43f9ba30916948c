"""Image classification sets of TensorFlow Datasets as sources of encoded images.

Images are copied as stored, without decoding. `tensorflow_datasets` is imported only here, and only
when it is used.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from collections.abc import Iterator, Sequence

import numpy as np
import tensorflow as tf
from absl import logging

from efficientnet_ns.data import image_conversion, tasks
from efficientnet_ns.files import tfrecords
from efficientnet_ns.files.errors import DataError
from efficientnet_ns.files.paths import listed
from efficientnet_ns.ingest.image_sources import Entry, Loaded, Reader

PREFIX = "tfds:"
# A version begins with a digit or an asterisk, a split with a letter or an underscore.
_SPEC = re.compile(r"tfds:(?P<name>[\w/-]+(:[\d*][\w.*]*)?)(:(?P<split>[A-Za-z_].*))?")

# Sets that use the statistics and other constants of a task.
KNOWN_TASKS = {"imagenet2012": "imagenet", "svhn_cropped": "svhn"}
# Name of a split → prefix of its records.
SPLITS = {
    "train": "train",
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    "test": "test",
}


def parse(spec: str) -> tuple[str, str | None]:
    """Parses `tfds:name[/config][:version][:split]` into (name for TFDS, split or None).

    Raises:
      DataError: If `spec` has another form.
    """
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise DataError(
            f"{spec!r} is not of the form tfds:<name>[:split], e.g. tfds:tf_flowers:train[:90%]"
        )
    return match["name"], match["split"]


def load_builder(name: str, data_dir: str | None):
    """Returns the TFDS builder of a set; downloads and prepares the set if it is missing.

    Raises:
      DataError: If the set is unknown or cannot be downloaded; the message explains what to do.
    """
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except tfds.core.registered.DatasetNotFoundError as e:
        folder = data_dir or tfds.core.constants.DATA_DIR
        raise DataError(
            f"tfds:{name}: TensorFlow Datasets {tfds.__version__} has no such set, and none was "
            f"prepared in {folder}. Names: https://www.tensorflow.org/datasets/catalog; for your "
            "own set, pass the folder in which it was built as --tfds_data_dir."
        ) from e
    if _is_prepared(builder):
        return builder
    logging.info("downloading and preparing tfds:%s in %s", name, builder.data_dir)
    try:
        builder.download_and_prepare()
    except Exception as e:  # From urllib, requests, apache_beam, the set's code …
        raise DataError(_how_to_get(builder, name, e)) from e
    return builder


def _is_prepared(builder) -> bool:
    # For a missing set, the package provides the info without files.
    return tf.io.gfile.exists(os.path.join(str(builder.data_dir), "dataset_info.json"))


def root(builder) -> str:
    """Returns the TFDS folder of a builder, which contains `<name>/[<config>/]<version>`."""
    return str(builder.data_dir)[: -len(builder.info.full_name) - 1]


def prepared(name: str, data_dir: str | None) -> list[str]:
    """Returns the sorted names of a set's prepared configurations."""
    import tensorflow_datasets as tfds

    folder = os.path.expanduser(os.path.join(data_dir or tfds.core.constants.DATA_DIR, name))
    return [
        os.path.basename(config)
        for config in listed(folder, ".*")
        if any(listed(v, r"dataset_info\.json") for v in listed(config, ".*"))
    ]


def _how_to_get(builder, name: str, error: Exception) -> str:
    folder = root(builder)
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    manual = builder.MANUAL_DOWNLOAD_INSTRUCTIONS
    if manual:
        get = (
            f"Download it manually into {os.path.join(folder, 'downloads', 'manual')}: "
            f"{' '.join(str(manual).split())} Then run the same command again."
        )
    else:
        get = (
            f"On a machine with a network, run `tfds build {name} --data_dir=DIR`, copy "
            f"DIR/{builder.name} to {os.path.join(folder, builder.name)} and run the same command "
            "again, with --tfds_data_dir if it is elsewhere."
        )
    return f"tfds:{name} is not in {builder.data_dir} and could not be prepared ({reason}). {get}"


class Tfds:
    """One split of a prepared set; examples are read at their positions in its files.

    Args:
      builder: a TFDS builder.
      split: name of a split, or a part such as `train[:90%]`.

    Raises:
      DataError: If there is no such split or not exactly one image, or files have another format.
    """

    def __init__(self, builder, split: str):
        self.path = f"{PREFIX}{builder.info.full_name}:{split}"
        self._folder = str(builder.data_dir)
        if builder.info.file_format is not None and builder.info.file_format.value != "tfrecord":
            raise DataError(
                f"{self.path} is stored as {builder.info.file_format.value}: prepare it again with "
                "--file_format=tfrecord"
            )
        try:
            self._files = [
                # TFDS selects parts such as train[:90%] by records within files; a `take` of -1
                # means all remaining records.
                (str(f.filename), int(f.skip), None if f.take < 0 else int(f.take))
                for f in builder.info.splits[split].file_instructions
            ]
        except (KeyError, ValueError) as e:
            raise DataError(
                f"{self.path}: no such split; it has {', '.join(sorted(builder.info.splits))}"
            ) from e
        self._image, self._label = _keys(builder, self.path)
        self.class_names = None
        if self._label:
            self.class_names = tuple(builder.info.features[self._label].names)

    def entries(self) -> list[Entry]:
        """Lists all examples in file order; labels become known when the examples are read."""
        return list(itertools.chain.from_iterable(map(_entries_of, self._files)))

    def is_unlabeled(self) -> bool:
        """Checks whether the first example has no true label, as in test sets of competitions."""
        # Scans the files only up to the first one with an example.
        first = next(filter(None, map(_entries_of, self._files)), [])[:1]
        with self.reader(first) as read:
            return bool(self._label and first) and read(first[0]).label < 0

    def labeled_entries(self) -> list[Entry]:
        """Returns `entries` with labels; reads all examples."""
        entries = self.entries()
        with self.reader(entries) as read:
            return [entry._replace(label=read(entry).label) for entry in entries]

    @contextlib.contextmanager
    def reader(self, entries: Sequence[Entry]) -> Iterator[Reader]:
        import tensorflow_datasets as tfds

        features = tfds.builder_from_directory(self._folder).info.features
        skip_decoding = {}
        # Other pictures are pixel tensors, which are encoded as PNG below.
        if isinstance(features[self._image], tfds.features.Image):
            skip_decoding = {self._image: tfds.decode.SkipDecoding()}
        with tfrecords.payload_reader() as payload:

            def read(entry: Entry) -> Loaded:
                example = features.deserialize_example_np(
                    payload(entry.place), decoders=skip_decoding
                )
                image = example[self._image]
                if isinstance(image, np.ndarray):
                    image = image_conversion.png(image)
                return Loaded(image, int(example[self._label]) if self._label else -1)

            yield read


def _entries_of(file: tuple[str, int, int | None]) -> list[Entry]:
    """Lists `take` examples of a file (None for all) after the first `skip` ones."""
    path, skip, take = file
    spans = list(tfrecords.spans(path))[skip : None if take is None else skip + take]
    name = os.path.basename(path)
    return [
        Entry(f"{name}#{skip + i}", size=length, place=(path, start, length))
        for i, (start, length) in enumerate(spans)
    ]


def _keys(builder, path: str) -> tuple[str, str | None]:
    """Returns the names of the image and label features."""
    import tensorflow_datasets as tfds

    features = builder.info.features
    top = dict(features.items()) if hasattr(features, "items") else {}
    pictures = [key for key, feature in top.items() if _is_picture(feature)]
    labels = [key for key, f in top.items() if isinstance(f, tfds.features.ClassLabel)]
    supervised = builder.info.supervised_keys or ()
    # If there are several, the supervised keys decide.
    image = next((key for key in supervised if key in pictures), None)
    label = next((key for key in supervised if key in labels), None)
    image = image or (pictures[0] if len(pictures) == 1 else None)
    label = label or (labels[0] if len(labels) == 1 else None)
    if image is None:
        raise DataError(
            f"{path} is not an image classification set: expected one uint8 image, found {list(top)}"
        )
    return image, label


def _is_picture(feature) -> bool:
    import tensorflow_datasets as tfds

    if isinstance(feature, tfds.features.Image):
        return np.dtype(feature.np_dtype) in (np.uint8, np.uint16)
    shape = tuple(feature.shape) if isinstance(feature, tfds.features.Tensor) else ()
    plain = len(shape) == 3 and shape[-1] in (1, 3)
    return plain and np.dtype(feature.np_dtype) == np.uint8


def sets_of(builder) -> dict[str, str]:
    """Maps the prefix of the records to the split, for the splits of a task, including `train`.

    Raises:
      DataError: If there is no split called train.
    """
    splits = builder.info.splits
    # Reversed, so that of several names for a set, the first in SPLITS is used.
    found = {prefix: name for name, prefix in reversed(SPLITS.items()) if name in splits}
    if "train" not in found:
        raise DataError(
            f"tfds:{builder.info.full_name} has no split called train, only {', '.join(splits)}; "
            "pass one of them to make_records as tfds:<name>:<split> with --image_set"
        )
    return {prefix: found[prefix] for prefix in ("train", "validation", "test") if prefix in found}


def task_fields(builder) -> dict[str, object]:
    """Returns the task fields of a known set; empty for others."""
    known = KNOWN_TASKS.get(builder.name)
    if known is None:
        return {}
    task = tasks.TASKS[known]
    fields = ("mean", "std", "flip", "image_size", "small_image")
    return {name: getattr(task, name) for name in fields}
