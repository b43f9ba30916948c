"""The robustness sets as folders, in the layouts in which they are distributed."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import tensorflow as tf

from efficientnet_ns.data import image_conversion, tasks
from efficientnet_ns.files import json_files
from efficientnet_ns.files.errors import DataError
from efficientnet_ns.files.progress import Progress
from efficientnet_ns.ingest import image_sources


class Images(NamedTuple):
    """Images of a set with their classes.

    Attributes:
      source: reads the entries; see `ingest.image_sources`.
      entries: the images, with ImageNet's labels.
      classes: classes that have images, ascending.
    """

    source: image_sources.Source
    entries: list[image_sources.Entry]
    classes: list[int]

    def read(self, what: str) -> Iterator[tuple[str, bytes]]:
        """Yields (name for messages, encoded image); `what` is the title of the progress bar."""
        with self.source.reader(self.entries) as read:
            with Progress(len(self.entries), what, "images") as progress:
                for entry in self.entries:
                    path = os.path.join(self.source.path, entry.name)
                    try:
                        image = read(entry).image
                    except image_conversion.Unusable as e:
                        raise DataError(f"{path} {e}") from e
                    yield path, image
                    progress.update(1)


# --- Classes --------------------------------------------------------------------------------------


def classes_of(name: str = "imagenet") -> dict[str, int]:
    """Maps folder names to ImageNet classes, for all classes of a set, e.g. `imagenet-a`.

    Folder names are WordNet ids. For ImageNet-V2 they are class numbers: `10` is class 10.
    """
    numbers = {wnid: i for i, wnid in enumerate(tasks.wnids())}
    if name == "imagenet-v2":
        return {str(i): i for i in numbers.values()}
    only = tasks.wnids(name.replace("-", "_")) if name in ("imagenet-a", "imagenet-r") else numbers
    return {wnid: numbers[wnid] for wnid in only}


def numbered(names: Sequence[str], where: str) -> list[int]:
    """Returns the ImageNet class of each class name of a set.

    Args:
      names: WordNet ids, or class numbers as in ImageNet-V2.
      where: the set, for messages.

    Raises:
      DataError: If the names are neither.
    """
    for known in (classes_of("imagenet-v2"), classes_of()):
        if all(name in known for name in names):
            return [known[name] for name in names]
    wrong = next(name for name in names if name not in known)
    raise DataError(f"{where}: class {wrong!r} is not the WordNet id of an ImageNet class")


def check_whole(path: str, found: Collection[int], classes: Mapping[str, int]) -> None:
    """Raises DataError with the names of the `classes` (name → class) missing from `found`."""
    have = set(found)
    missing = [name for name, number in classes.items() if number not in have]
    what = f"of {len(classes)} classes are missing (--allow_missing measures the others)"
    refuse(path, what, missing)


# --- Folders --------------------------------------------------------------------------------------


def folders(path: str) -> list[str]:
    """Returns the sorted names of the folders in `path`, except hidden and system folders.

    Raises:
      DataError: If `path` is not a folder.
    """
    if not tf.io.gfile.isdir(path):
        raise DataError(f"{path!r} is not a folder")
    # On object stores, folder names end with a slash.
    names = (name.rstrip("/") for name in tf.io.gfile.listdir(path))
    names = (name for name in names if not image_sources.is_hidden(name))
    return sorted(n for n in names if tf.io.gfile.isdir(os.path.join(path, n)))


def image_files(path: str) -> list[str]:
    """Returns the sorted names of the images directly inside a folder."""
    names = sorted(n for n in tf.io.gfile.listdir(path) if not n.startswith("."))
    return list(filter(image_sources.is_image, names))


def class_folders(path: str, classes: Mapping[str, int]) -> Images:
    """Lists the images of `path/<class>/*`.

    Args:
      path: folder of the class folders.
      classes: folder name → class.

    Raises:
      DataError: If there are no class folders, or unknown or empty ones, which are listed.
    """
    names = folders(path)
    if not names:
        raise DataError(f"{path!r} has no class folders")
    refuse(path, "unknown class folders", [n for n in names if n not in classes])
    # By class, because folder names sort as text, e.g. 10 before 2 in ImageNet-V2.
    names.sort(key=classes.__getitem__)
    files = {name: image_files(os.path.join(path, name)) for name in names}
    refuse(path, "class folders without images", [n for n, found in files.items() if not found])
    return Images(
        image_sources.Folder(path),
        [
            image_sources.Entry(f"{name}/{file}", classes[name])
            for name, found in files.items()
            for file in found
        ],
        [classes[name] for name in names],
    )


def parts(
    path: str,
    found: Sequence[str],
    expected: Sequence[str],
    optional: Sequence[str],
    allow_missing: bool,
) -> list[str]:
    """Sorts the names of corruptions, perturbations or severities into a fixed order.

    Args:
      path: folder that contains them.
      found: their names.
      expected: names in the order of the result.
      optional: additional names, which follow the expected ones.
      allow_missing: whether some of `expected` may be missing.

    Raises:
      DataError: If names are unknown, or missing without `allow_missing`, or `found` is empty.
    """
    refuse(path, "unknown parts", [n for n in found if n not in (*expected, *optional)])
    if not allow_missing:
        refuse(
            path,
            "missing parts (--allow_missing reports the others, without the mean)",
            [n for n in expected if n not in found],
        )
    if not found:
        raise DataError(f"{path!r} has none of the parts {', '.join(expected)}")
    return [n for n in (*expected, *optional) if n in found]


def check_equal_classes(images: Mapping[str, Images]) -> None:
    """Raises DataError with the classes that one set (by path) has and another lacks."""
    union = sorted({c for found in images.values() for c in found.classes})
    names = tasks.wnids()
    for path, found in images.items():
        have = set(found.classes)
        refuse(path, "missing classes", [names[c] for c in union if c not in have])


def refuse(path: str, what: str, names: Sequence[str]) -> None:
    """Raises DataError with the first twenty `names`, if there are any."""
    if names:
        shown = ", ".join(list(names)[:20]) + (" …" if len(names) > 20 else "")
        raise DataError(f"{path}: {len(names)} {what}: {shown}")


# --- ReaL labels ----------------------------------------------------------------------------------


def real_labels(labels_path: str, images_path: str) -> tuple[Images, list[list[int]]]:
    """Returns ImageNet's validation images and the correct classes of each by ReaL labels.

    Entry i of the labels, from 0, belongs to image ILSVRC2012_val_%08d with number i + 1.

    Args:
      labels_path: path of `real.json`.
      images_path: folder of the images or of their class folders.

    Raises:
      DataError: If the labels are invalid, an image has another name, or the numbers of images and
        labels differ.
    """
    right = json_files.read_json(labels_path)
    if not isinstance(right, list) or not all(isinstance(classes, list) for classes in right):
        raise DataError(f"{labels_path} must contain a list of lists of classes, like real.json")
    files = image_files(images_path)
    for folder in folders(images_path):
        files += [f"{folder}/{file}" for file in image_files(os.path.join(images_path, folder))]
    by_place = {}
    for file in files:
        match = re.fullmatch(r"ILSVRC2012_val_(\d{8})", os.path.basename(file).split(".")[0])
        if not match:
            path = os.path.join(images_path, file)
            raise DataError(f"{path}: the name must be ILSVRC2012_val_<8 digits>")
        by_place[int(match[1])] = image_sources.Entry(file)
    if sorted(by_place) != list(range(1, len(right) + 1)):
        raise DataError(
            f"{images_path!r} has {len(by_place)} different images, {labels_path} labels for "
            f"{len(right)}: numbers 1 to {len(right)} are required"
        )
    entries = [by_place[i] for i in sorted(by_place)]
    # No classes, because an image may have several correct ones or none.
    return Images(image_sources.Folder(images_path), entries, []), right
