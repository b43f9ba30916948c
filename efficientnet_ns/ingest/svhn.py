"""Makes records of Street View House Numbers, cropped digits.

Source: http://ufldl.stanford.edu/housenumbers. Sets, order, encoding and names are those of the
original code: the first 4000 shuffled training images become the dev set; `extra` is unlabeled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import urllib.request
from collections.abc import Iterator, Sequence

import numpy as np
import tensorflow as tf
from absl import logging

from efficientnet_ns.config import ConfigError, needed
from efficientnet_ns.config.ingest import SvhnConfig
from efficientnet_ns.data import image_conversion, tasks
from efficientnet_ns.files import atomic, manifests, object_stores, tfexamples
from efficientnet_ns.files.errors import DataError
from efficientnet_ns.ingest import image_records
from efficientnet_ns.ingest.image_sources import Entry, Loaded, Reader

URL = "http://ufldl.stanford.edu/housenumbers/{}_32x32.mat"
_DOWNLOADS = "downloaded_data"
# Published number of images per file; number of files per set as in the original code.
_PUBLISHED = {"train": 73257, "test": 26032, "extra": 531131}
_NUM_SHARDS = {"train": 128, "extra": 128, "dev": 64, "test": 64}
_SIDE, _CLASSES = 32, 10


class MatFile:
    """Digits of one .mat file: `X` uint8 [32, 32, 3, N] and `y` [N, 1], 1..10 with 10 for 0.

    Pixels are loaded on first use and stay in the process that distributes the work (1.6 GB for
    `extra`, twice that during loading). Pixels of each shard are sent to the process that encodes
    them.

    Raises:
      DataError: If the file has another format or a label is out of range.
    """

    def __init__(self, path: str, image_format: str):
        self.path, self._format = path, image_format
        self._pixels: np.ndarray | None = None
        labels = self._variable("y").reshape(-1)
        if labels.dtype.kind not in "uif":
            raise DataError(
                f"{path}: `y` is of type {labels.dtype}; expected numbers 1..10. Delete "
                "the file to download SVHN's again."
            )
        wrong = np.flatnonzero((labels < 1) | (labels > _CLASSES) | (labels != labels.astype(int)))
        if len(wrong):
            raise DataError(
                f"{path}: label {wrong[0]} of `y` is {labels[wrong[0]]}; expected 1..10"
            )
        self.labels = labels.astype(np.int64) % _CLASSES

    def __getstate__(self) -> dict:
        # Pickled for each shard, whose entries contain their pixels and labels.
        return {**self.__dict__, "_pixels": None, "labels": None}

    def _variable(self, name: str) -> np.ndarray:
        import scipy.io

        try:
            with tf.io.gfile.GFile(self.path, "rb") as f:
                return scipy.io.loadmat(f, variable_names=[name])[name]
        except Exception as e:  # scipy raises many types of errors.
            raise DataError(
                f"{self.path}: cannot read variable {name!r} ({type(e).__name__}: {e}). Delete the file "
                "to download it again."
            ) from e

    def entries(self, prefix: str, order: np.ndarray) -> list[Entry]:
        """Returns entries for the images `order`, named by their positions in the file."""
        return [Entry(f"{prefix}#{i}", int(self.labels[i]), place=int(i)) for i in order]

    def attach(self, entries: Sequence[Entry]) -> list[Entry]:
        """Returns the entries with their pixels, uint8 [32, 32, 3]."""
        if self._pixels is None:
            logging.info("loading %s", self.path)
            loaded = self._variable("X")
            expected = (_SIDE, _SIDE, 3, len(self.labels))
            if loaded.shape != expected or loaded.dtype != np.uint8:
                raise DataError(
                    f"{self.path}: `X` is {loaded.dtype} {loaded.shape}, not uint8 {expected}"
                )
            self._pixels = loaded
        # [32, 32, 3, n] → [n, 32, 32, 3].
        pixels = self._pixels[..., [entry.place for entry in entries]].transpose(3, 0, 1, 2)
        return [e._replace(place=one) for e, one in zip(entries, np.ascontiguousarray(pixels))]

    @contextlib.contextmanager
    def reader(self, entries: Sequence[Entry]) -> Iterator[Reader]:
        encode = _ENCODE[self._format]
        yield lambda entry: Loaded(encode(entry.place), entry.label)


_ENCODE = {
    "jpeg": lambda pixels: tf.io.encode_jpeg(pixels, format="rgb", quality=100).numpy(),
    "png": image_conversion.png,
}


# Record of an unlabeled digit.
_EXTRA = functools.partial(tfexamples.placeholder_example, num_classes=_CLASSES)


def make_records(config: SvhnConfig) -> dict[str, int]:
    """Makes the records of all sets and `task.json`; resumes if called again.

    Returns:
      Prefix → number of records.

    Raises:
      ConfigError: If the task is not SVHN or dev_size leaves no training images.
      DataError: If a file is missing and cannot be downloaded, or is not a file of SVHN.
    """
    raw = needed(config.raw_data_dir, "raw_data_dir")
    needed(config.output_dir, "output_dir")
    if config.task_name != "svhn":
        raise ConfigError(f"--task_name={config.task_name}: this program supports only svhn")
    if tf.io.gfile.exists(raw) and not tf.io.gfile.isdir(raw):
        raise ConfigError(
            f"--raw_data_dir={raw} is a file: expected the folder of train_32x32.mat, test_32x32.mat "
            "and extra_32x32.mat"
        )
    files = {name: MatFile(_path(raw, name), config.image_format) for name in _PUBLISHED}
    for name, file in files.items():
        if len(file.labels) != _PUBLISHED[name]:
            message = "%s has %d images, the published file has %d"
            logging.warning(message, file.path, len(file.labels), _PUBLISHED[name])
    made = {}
    for name, (file, order) in _sets(config, files).items():
        one = _image_set(config, name, file, file.entries(name, order))
        # The images were just encoded, so they can be decoded.
        rules = image_conversion.Rules(check=False)
        (result,) = image_records.make_sets(file, [one], rules, num_workers=config.num_workers)
        made[one.prefix] = result.records
    _write_task(config, made)
    return made


def _sets(config: SvhnConfig, files: dict[str, MatFile]) -> dict[str, tuple[MatFile, np.ndarray]]:
    """Maps the name of each set to its file and the images in order."""
    sizes = {name: len(file.labels) for name, file in files.items()}
    # The generator and order of draws of the original code: the default seed gives the same split.
    rng = np.random.RandomState(config.seed)
    train, extra, test = (np.arange(sizes[name]) for name in ("train", "extra", "test"))
    rng.shuffle(train)
    rng.shuffle(extra)
    sets = {"test": (files["test"], test), "extra": (files["extra"], extra)}
    if config.full_train_data:
        # No training images are left for a dev set.
        return {"train": (files["train"], train), "dev": sets["test"], **sets}
    if config.dev_size >= sizes["train"]:
        raise ConfigError(
            f"--dev_size={config.dev_size} leaves none of {sizes['train']} images for training"
        )
    dev, train = train[: config.dev_size], train[config.dev_size :]
    return {"train": (files["train"], train), "dev": (files["train"], dev), **sets}


def _image_set(
    config: SvhnConfig, name: str, file: MatFile, entries: list[Entry]
) -> image_records.ImageSet:
    extra = name == "extra"
    return image_records.ImageSet(
        folder=os.path.join(config.output_dir, "unlabeled") if extra else config.output_dir,
        prefix=f"{name}_full" if config.full_train_data else name,
        entries=entries,
        num_shards=config.num_shards or _NUM_SHARDS[name],
        record=_EXTRA if extra else tfexamples.labeled_example,
        identity={
            "source": manifests.fingerprint([file.path]),
            "seed": config.seed,
            "image_format": config.image_format,
        },
        num_classes=_CLASSES,
    )


def _write_task(config: SvhnConfig, made: dict[str, int]) -> None:
    suffix = "_full" if config.full_train_data else ""
    fields = dataclasses.asdict(tasks.TASKS["svhn"])
    fields.update(
        {f"{key}_set": prefix + suffix for key, prefix in _ROLES.items()},
        num_train_images=made[f"train{suffix}"],
    )
    tasks.write_task(os.path.join(config.output_dir, tasks.TASK_FILE), **fields)


_ROLES = {"train": "train", "eval": "dev", "test": "test"}


def _path(folder: str, name: str) -> str:
    """Returns the path of the .mat file of a set; downloads it if it is missing.

    Raises:
      DataError: If the download fails.
    """
    url = URL.format(name)
    base = url.rpartition("/")[2]
    places = [os.path.join(folder, base), os.path.join(folder, _DOWNLOADS, base)]
    for path in places:
        if tf.io.gfile.exists(path):
            return path
    logging.info("downloading %s to %s", url, places[1])
    object_stores.make_folder(os.path.dirname(places[1]))
    try:
        with atomic.atomic_path(places[1]) as temporary:
            with urllib.request.urlopen(url, timeout=60) as response:
                with tf.io.gfile.GFile(temporary, "wb") as f:
                    while block := response.read(1 << 20):
                        f.write(block)
    except OSError as e:  # URLError, timeouts and broken connections.
        raise DataError(
            f"{base} is neither {places[0]} nor {places[1]}, and the download failed ({e}). "
            f"Download {url} to {places[0]} and run the same command again."
        ) from e
    return places[1]
