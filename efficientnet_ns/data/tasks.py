"""What is classified: classes, channel statistics, image size and the sets of each task."""

from __future__ import annotations

import dataclasses
import functools
import os
from pathlib import Path

import tensorflow as tf

from efficientnet_ns.data import manifests


@dataclasses.dataclass(frozen=True)
class Task:
    """One classification task.

    Attributes:
      num_classes: number of classes.
      mean, std: channel statistics in units of the full range (0..1).
      image_size: side in pixels, or None for the model's own resolution.
      small_image: train with the small-image model variant and its preprocessing.
      flip: whether a mirrored image keeps its class (house numbers and digits do not).
      train_set, eval_set, test_set: prefixes of the record files; no test set when None.
      num_train_images: size of the training set, which defines an epoch; None counts the records.
      class_names: one per class, or None.
    """

    num_classes: int
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    image_size: int | None = None
    small_image: bool = False
    flip: bool = True
    train_set: str = "train"
    eval_set: str = "validation"
    test_set: str | None = None
    num_train_images: int | None = None
    class_names: tuple[str, ...] | None = None


_DIGIT_NAMES = tuple(str(i) for i in range(10))

TASKS: dict[str, Task] = {
    "imagenet": Task(num_classes=1000, num_train_images=1281167),
    # Statistics of the SVHN training set, as the original's.
    "svhn": Task(
        num_classes=10,
        mean=(0.4376821, 0.4437697, 0.47280442),
        std=(0.19803012, 0.20101562, 0.19703614),
        image_size=32,
        small_image=True,
        flip=False,
        eval_set="dev",
        test_set="test",
        num_train_images=69257,
        class_names=_DIGIT_NAMES,
    ),
    # scikit-learn's bundled scans of handwritten digits (UCI, 1797 images).
    "digits": Task(
        num_classes=10,
        mean=(0.305, 0.305, 0.305),
        std=(0.36, 0.36, 0.36),
        image_size=16,
        small_image=True,
        flip=False,
        eval_set="dev",
        test_set="test",
        class_names=_DIGIT_NAMES,
    ),
}


def get_task(name: str | os.PathLike) -> Task:
    """The task called `name`, or that of the JSON file at this path, with the fields of `Task`.

    Raises:
      ValueError: neither, or a file with unknown or missing fields.
    """
    name = os.fspath(name)
    if name in TASKS:
        return TASKS[name]
    if not name.endswith(".json") or not tf.io.gfile.exists(name):
        raise ValueError(
            f"unknown task {name!r}; known tasks: {', '.join(TASKS)}, or the path of a .json file "
            'with the fields of a task, e.g. {"num_classes": 5}'
        )
    fields = manifests.read_json(name)
    known = {f.name for f in dataclasses.fields(Task)}
    unknown = sorted(set(fields) - known)
    if unknown or "num_classes" not in fields:
        raise ValueError(
            f"{name}: unknown fields {unknown}; allowed: {sorted(known)}; num_classes is required"
        )
    return Task(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})


def write_task(path: str | os.PathLike, **fields) -> None:
    """Writes a task file, or replaces these fields of the one that is there.

    Raises:
      ValueError: see `get_task`.
    """
    existing = dataclasses.asdict(get_task(path)) if tf.io.gfile.exists(path) else {}
    task = dataclasses.asdict(Task(**{**existing, **fields}))
    manifests.write_json(path, {k: v for k, v in task.items() if v is not None}, indent=1)


# Names too many to stand in the table: one per line in a file beside this one.
_NAME_FILES = {TASKS["imagenet"]: "imagenet_classes.txt"}


def class_names(task: str | os.PathLike | Task) -> tuple[str, ...] | None:
    """Short names of a task's classes, in order of their labels; None when it has none.

    ImageNet's are in the order of the sorted WordNet ids.

    Args:
      task: or what `get_task` takes.

    Raises:
      ValueError: see `get_task`.
    """
    task = task if isinstance(task, Task) else get_task(task)
    if task.class_names is None and task in _NAME_FILES:
        return _names_from(_NAME_FILES[task])
    return task.class_names


@functools.lru_cache(maxsize=None)
def _names_from(file_name: str) -> tuple[str, ...]:
    return tuple(Path(__file__).with_name(file_name).read_text(encoding="utf-8").splitlines())
