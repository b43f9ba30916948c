"""The robustness sets as folders, in the layouts in which they are distributed."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import tensorflow as tf

from efficientnet_ns.data import image_conversion
from efficientnet_ns.files import json_files
from efficientnet_ns.files.errors import DataError
from efficientnet_ns.files.progress import Progress
from efficientnet_ns.ingest import image_sources


class Images(NamedTuple):
    """Images of a set with their classes.

    Attributes:
      source: reads the entries; see `data.sources`.
      entries: the images, with ImageNet's labels.
      classes: all that have images, ascending.
    """

    source: object
    entries: list[image_sources.Entry]
    classes: list[int]

    def read(self, what: str) -> Iterator[tuple[str, bytes]]:
        """(name for messages, encoded image) of each; `what` is the title of the progress."""
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


# Sets of some of ImageNet's classes → list of their WordNet ids.
_ONLY = {"imagenet-a": "imagenet_a", "imagenet-r": "imagenet_r"}


def wnids(name: str = "imagenet") -> list[str]:
    """WordNet ids of the classes of `imagenet`, `imagenet_a` or `imagenet_r`, in order of the labels.

    Sources: of the latter, `eval.py` in github.com/hendrycks/natural-adv-examples and
    github.com/hendrycks/imagenet-r; they have 200 each.
    """
    file = Path(image_sources.__file__).with_name(f"{name}_wnids.txt")
    return file.read_text(encoding="utf-8").split()


def by_wnid(only: str = "imagenet") -> dict[str, int]:
    """Folder name → class of ImageNet, of the classes that the set `only` has."""
    numbers = {wnid: i for i, wnid in enumerate(wnids())}
    return {wnid: numbers[wnid] for wnid in wnids(only)}


def by_number(num_classes: int = 1000) -> dict[str, int]:
    """Folder name → class, for -V2, whose folders are numbers: `10` is 10, though it sorts as 2."""
    return {str(i): i for i in range(num_classes)}


def num_classes(name: str) -> int:
    """Number of classes of a set, e.g. `imagenet-a`."""
    return len(wnids(_ONLY.get(name, "imagenet")))


def classes_of(name: str) -> dict[str, int]:
    """Folder name → class, of all classes that a set, e.g. `imagenet-a`, has."""
    return by_number() if name == "imagenet-v2" else by_wnid(_ONLY.get(name, "imagenet"))


def numbered(names: Sequence[str], where: str) -> list[int]:
    """ImageNet's class of each name of a set's classes: WordNet ids, or numbers as -V2 has them.

    Raises:
      DataError: neither.
    """
    for known in (by_wnid(), by_number()):
        if all(name in known for name in names):
            return [known[name] for name in names]
    wrong = next(name for name in names if name not in by_wnid())
    raise DataError(f"{where}: class {wrong!r} is no WordNet id of an ImageNet class")


def check_whole(path: str, found: Collection[int], classes: Mapping[str, int]) -> None:
    """DataError naming the `classes` (name → class) that are not among those `found`."""
    have = set(found)
    missing = [name for name, number in classes.items() if number not in have]
    what = f"of {len(classes)} classes are missing (--allow_missing measures the others)"
    refuse(path, what, missing)


# --- Folders --------------------------------------------------------------------------------------


def folders(path: str) -> list[str]:
    """Names of the folders inside `path`, hidden ones and those of systems left out.

    Raises:
      DataError: there is no such folder.
    """
    if not tf.io.gfile.isdir(path):
        raise DataError(f"{path!r} is not a folder")
    names = (name.rstrip("/") for name in tf.io.gfile.listdir(path))
    names = (name for name in names if not image_sources.is_hidden(name))
    return sorted(n for n in names if tf.io.gfile.isdir(os.path.join(path, n)))


def image_files(path: str) -> list[str]:
    """Names of the images directly inside a folder, sorted."""
    names = sorted(n for n in tf.io.gfile.listdir(path) if not n.startswith("."))
    return [n for n in names if n.rpartition(".")[2].lower() in image_sources.EXTENSIONS]


def class_folders(path: str, classes: Mapping[str, int]) -> Images:
    """The images of `path/<class>/*`.

    Args:
      classes: folder name → class.

    Raises:
      DataError: no folders, unknown or empty ones; all are listed.
    """
    names = folders(path)
    if not names:
        raise DataError(f"{path!r} has no class folders")
    refuse(path, "unknown class folders", [n for n in names if n not in classes])
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
    """Names of the corruptions, perturbations or severities `found` in `path`, in a fixed order.

    Raises:
      DataError: unknown ones, none at all, or missing ones unless `allow_missing`.
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
    """DataError naming the classes that one of the sets (by path) has and another lacks."""
    union = sorted({c for found in images.values() for c in found.classes})
    names = wnids()
    for path, found in images.items():
        have = set(found.classes)
        refuse(path, "missing classes", [names[c] for c in union if c not in have])


def refuse(path: str, what: str, names: Sequence[str]) -> None:
    """DataError that lists `names`, the first twenty, unless there are none."""
    if names:
        shown = ", ".join(list(names)[:20]) + (" …" if len(names) > 20 else "")
        raise DataError(f"{path}: {len(names)} {what}: {shown}")


# --- ReaL labels ----------------------------------------------------------------------------------


def real_labels(labels_path: str, images_path: str) -> tuple[Images, list[list[int]]]:
    """(validation images, right classes of each) of `real.json` and a folder of the images.

    The images may lie in class folders or all in one; entry i of the file, from 0, is that of
    ILSVRC2012_val_%08d with number i + 1.

    Raises:
      DataError: an image has another name, or their number is not that of the labels.
    """
    right = json_files.read_json(labels_path)
    files = image_files(images_path)
    for folder in folders(images_path):
        files += [f"{folder}/{file}" for file in image_files(os.path.join(images_path, folder))]
    by_place = {}
    for file in files:
        match = re.fullmatch(r"ILSVRC2012_val_(\d{8})", os.path.basename(file).split(".")[0])
        if not match:
            path = os.path.join(images_path, file)
            raise DataError(f"{path} is not called ILSVRC2012_val_<8 digits>")
        by_place[int(match[1])] = image_sources.Entry(file)
    if sorted(by_place) != list(range(1, len(right) + 1)):
        raise DataError(
            f"{images_path!r} has {len(by_place)} different images, {labels_path} labels for "
            f"{len(right)}: numbers 1 to {len(right)} are needed"
        )
    entries = [by_place[i] for i in sorted(by_place)]
    return Images(image_sources.Folder(images_path), entries, []), right
