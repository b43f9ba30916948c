"""The robustness sets as folders, in the layouts in which they are distributed."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import tensorflow as tf

from efficientnet_ns.data import manifests, records, sources


class Images(NamedTuple):
    """Files with their classes.

    Attributes:
      paths, labels: of each image.
      classes: all that have a folder, ascending.
    """

    paths: list[str]
    labels: list[int]
    classes: list[int]


def wnids() -> list[str]:
    """WordNet ids of ImageNet's classes, in the order of the labels."""
    file = Path(sources.__file__).with_name("imagenet_wnids.txt")
    return file.read_text(encoding="utf-8").split()


def by_wnid() -> dict[str, int]:
    """Folder name → class, for -A, -R, -Sketch, -C, -P and ImageNet itself."""
    return {wnid: i for i, wnid in enumerate(wnids())}


def by_number(num_classes: int = 1000) -> dict[str, int]:
    """Folder name → class, for -V2, whose folders are numbers: `10` is 10, though it sorts as 2."""
    return {str(i): i for i in range(num_classes)}


def folders(path: str) -> list[str]:
    """Names of the folders inside `path`, hidden ones left out.

    Raises:
      records.DataError: there is no such folder.
    """
    if not tf.io.gfile.isdir(path):
        raise records.DataError(f"{path!r} is not a folder")
    names = (name.rstrip("/") for name in tf.io.gfile.listdir(path))
    return sorted(n for n in names if n[0] != "." and tf.io.gfile.isdir(os.path.join(path, n)))


def image_files(path: str) -> list[str]:
    """Paths of the images directly inside a folder, sorted by name."""
    names = sorted(n for n in tf.io.gfile.listdir(path) if not n.startswith("."))
    return [
        os.path.join(path, n) for n in names if n.rpartition(".")[2].lower() in sources.EXTENSIONS
    ]


def class_folders(path: str, classes: Mapping[str, int], whole: bool = False) -> Images:
    """The images of `path/<class>/*`.

    Args:
      classes: folder name → class.
      whole: every class must have its folder.

    Raises:
      records.DataError: no folders, unknown, empty or (with `whole`) missing ones; all are listed.
    """
    names = folders(path)
    if not names:
        raise records.DataError(f"{path!r} has no class folders")
    _refuse(path, "unknown class folders", [n for n in names if n not in classes])
    if whole:
        _refuse(path, "missing class folders", [n for n in classes if n not in set(names)])
    names.sort(key=classes.__getitem__)
    files = {name: image_files(os.path.join(path, name)) for name in names}
    _refuse(path, "class folders without images", [n for n, found in files.items() if not found])
    return Images(
        [file for found in files.values() for file in found],
        [classes[name] for name, found in files.items() for _ in found],
        [classes[name] for name in names],
    )


def parts(path: str, expected: Sequence[str], optional: Sequence[str], allow_missing: bool):
    """Names of the corruptions or perturbations (or severities) that are folders in `path`.

    Raises:
      records.DataError: unknown ones, none at all, or missing ones unless `allow_missing`.
    """
    found = folders(path)
    _refuse(path, "unknown folders", [n for n in found if n not in (*expected, *optional)])
    if not allow_missing:
        _refuse(
            path,
            "missing folders (--allow_missing reports the others, without the mean)",
            [n for n in expected if n not in found],
        )
    if not found:
        raise records.DataError(f"{path!r} has none of the folders {', '.join(expected)}")
    return [n for n in (*expected, *optional) if n in found]


def check_equal_classes(images: Mapping[str, Images]) -> None:
    """DataError naming the class folders that one of the sets (by path) has and another lacks."""
    union = sorted({c for found in images.values() for c in found.classes})
    names = wnids()
    for path, found in images.items():
        _refuse(path, "missing class folders", [names[c] for c in union if c not in found.classes])


def real_labels(labels_path: str, images_path: str) -> tuple[list[str], list[list[int]]]:
    """(validation images, right classes of each) of `real.json` and a folder of the images.

    The images may lie in class folders or all in one; entry i of the file, from 0, is that of
    ILSVRC2012_val_%08d with number i + 1.

    Raises:
      records.DataError: an image has another name, or their number is not that of the labels.
    """
    right = manifests.read_json(labels_path)
    inside = [os.path.join(images_path, n) for n in folders(images_path)]
    files = [file for folder in [images_path, *inside] for file in image_files(folder)]
    numbered = {}
    for file in files:
        match = re.fullmatch(r"ILSVRC2012_val_(\d{8})", os.path.basename(file).split(".")[0])
        if not match:
            raise records.DataError(f"{file} is not called ILSVRC2012_val_<8 digits>")
        numbered[int(match[1])] = file
    if sorted(numbered) != list(range(1, len(right) + 1)):
        raise records.DataError(
            f"{images_path!r} has {len(numbered)} different images, {labels_path} labels for "
            f"{len(right)}: numbers 1 to {len(right)} are needed"
        )
    return [numbered[i] for i in sorted(numbered)], right


def sequences(path: str) -> list[list[str]]:
    """Frames of each clip of `path/<wnid>/<clip>/*`, sorted by name.

    Raises:
      records.DataError: unknown or empty folders, or clips of fewer than two or of unequal length.
    """
    known, clips = by_wnid(), {}
    names = folders(path)
    _refuse(path, "unknown class folders", [n for n in names if n not in known])
    for name in names:
        for clip in folders(os.path.join(path, name)):
            clips[f"{name}/{clip}"] = image_files(os.path.join(path, name, clip))
    if not clips:
        raise records.DataError(
            f"{path!r} has no clips: folders <wnid>/<clip>/ with a picture per frame are needed. "
            "Videos are not read: unpack them, e.g. with ffmpeg -i CLIP.mp4 CLIP/%03d.png"
        )
    _refuse(path, "clips of fewer than two frames", [n for n, f in clips.items() if len(f) < 2])
    length = max(len(frames) for frames in clips.values())
    _refuse(
        path,
        f"clips shorter than {length} frames",
        [n for n, f in clips.items() if len(f) < length],
    )
    return list(clips.values())


def _refuse(path: str, what: str, names: Sequence[str]) -> None:
    if names:
        shown = ", ".join(list(names)[:20]) + (" …" if len(names) > 20 else "")
        raise records.DataError(f"{path}: {len(names)} {what}: {shown}")
