"""Classification tasks: classes, channel statistics, image size and the sets of each task."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tensorflow as tf

from efficientnet_ns.files import json_files

# Describes the task of a folder of records, a training run, predictions or an export.
TASK_FILE = "task.json"


@dataclasses.dataclass(frozen=True)
class Task:
    """One classification task.

    Attributes:
      num_classes: number of classes.
      mean, std: channel statistics in units of the full range (0..1); None for the model's own.
      image_size: side in pixels, or None for the model's own resolution.
      small_image: train with the small-image model variant and its preprocessing.
      flip: whether a mirrored image keeps its class (house numbers and digits do not).
      train_set, eval_set, test_set: prefixes of the record files; no test set if None.
      num_train_images: size of the training set, which defines an epoch; None counts the records.
      class_names: one per class, or None.
    """

    num_classes: int
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
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
    # Statistics of the SVHN training set, as in the original code.
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
    # The demo's 5,000 MNIST digits, 28 pixels wide; at 20 pixels, training takes half the time.
    "digits": Task(
        num_classes=10,
        mean=(0.131, 0.131, 0.131),
        std=(0.309, 0.309, 0.309),
        image_size=20,
        small_image=True,
        flip=False,
        eval_set="dev",
        test_set="test",
        class_names=_DIGIT_NAMES,
    ),
}


class TaskError(ValueError):
    """The task is unknown or its file cannot be used; the message names the file and field."""


class _Rule(NamedTuple):
    """The allowed values of a field, in words and as a test."""

    needed: str
    holds: Callable[[Any], bool]


def _is_positive(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_text(value: Any) -> bool:
    # JSON can encode lone surrogates, which neither files nor TensorFlow accept.
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)


def _are_three(value: Any, holds: Callable[[float], bool]) -> bool:
    # NaN fails every comparison.
    return (
        _is_list(value)
        and len(value) == 3
        and all(type(v) in (int, float) and holds(v) for v in value)
    )


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


_POSITIVE = _Rule("a whole number of at least 1", _is_positive)
_SWITCH = _Rule("true or false", lambda value: isinstance(value, bool))
_PREFIX = _Rule(
    "the prefix of the names of record files, without a folder",
    lambda value: _is_text(value) and value != "" and "/" not in value,
)
_RULES = {
    "num_classes": _POSITIVE,
    "mean": _Rule(
        "three numbers 0..1, fractions of the full range",
        lambda value: _are_three(value, lambda v: 0 <= v <= 1),
    ),
    "std": _Rule(
        "three numbers above 0 and up to 1, fractions of the full range",
        lambda value: _are_three(value, lambda v: 0 < v <= 1),
    ),
    "image_size": _POSITIVE,
    "small_image": _SWITCH,
    "flip": _SWITCH,
    "train_set": _PREFIX,
    "eval_set": _PREFIX,
    "test_set": _PREFIX,
    "num_train_images": _POSITIVE,
    "class_names": _Rule(
        "a list of non-empty strings",
        lambda value: _is_list(value) and all(_is_text(v) and v.strip() for v in value),
    ),
}


def get_task(name: str | os.PathLike) -> Task:
    """Returns the task called `name` or read from this JSON file, which has the fields of `Task`.

    Raises:
      TaskError: If `name` is neither, or the file has unknown, missing or invalid fields.
    """
    name = os.path.expanduser(name)
    if name in TASKS:
        return TASKS[name]
    if not tf.io.gfile.exists(name) or tf.io.gfile.isdir(name):
        raise TaskError(
            f"unknown task {name!r}; known tasks: {', '.join(TASKS)}, or the path of a .json file "
            'with the fields of a task, e.g. {"num_classes": 5}'
        )
    try:
        fields = json_files.read_json(name)
    except json_files.BrokenFile as e:
        raise TaskError(str(e)) from e
    return _checked(name, fields)


def _checked(path: str, fields: Any) -> Task:
    """Returns the task with these fields, which are, or will be, in the file at `path`."""
    if not isinstance(fields, Mapping):
        raise TaskError(
            f'{path} contains {_shown(fields)}; expected an object, e.g. {{"num_classes": 5}}'
        )
    unknown = sorted(set(fields) - set(_RULES))
    if unknown or "num_classes" not in fields:
        raise TaskError(
            f"{path}: unknown fields {unknown}; allowed: {sorted(_RULES)}; num_classes is required"
        )
    defaults = {f.name: f.default for f in dataclasses.fields(Task)}
    # null is treated as a missing field if the default is None.
    fields = {k: v for k, v in fields.items() if v is not None or defaults[k] is not None}
    for name, value in fields.items():
        rule = _RULES[name]
        if not rule.holds(value):
            raise TaskError(f"{path}: {name} is {_shown(value)}; expected {rule.needed}")
    _check_names(path, fields.get("class_names"), fields["num_classes"])
    values: dict[str, Any] = {k: tuple(v) if _is_list(v) else v for k, v in fields.items()}
    return Task(**values)


def _check_names(path: str, names: Sequence[str] | None, num_classes: int) -> None:
    if names is None:
        return
    if len(names) != num_classes:
        raise TaskError(
            f"{path}: class_names has {len(names)} names, but num_classes is {num_classes}"
        )
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        numbers = [i for i, name in enumerate(names) if name == twice[0]]
        raise TaskError(
            f"{path}: class_names has {_shown(twice[0])} for the classes {numbers}; names must differ"
        )


def _shown(value: Any) -> str:
    text = json.dumps(value, default=repr)
    return text if len(text) <= 80 else f"{text[:79]}…"


def write_task(path: str | os.PathLike, **fields) -> None:
    """Writes a task file, or replaces these fields of an existing one.

    Raises:
      TaskError: See `get_task`. Nothing is written.
    """
    path = os.path.expanduser(path)
    existing = dataclasses.asdict(get_task(path)) if tf.io.gfile.exists(path) else {}
    task = dataclasses.asdict(_checked(path, {**existing, **fields}))
    json_files.write_json(path, {k: v for k, v in task.items() if v is not None}, indent=1)


def label_lines(names: Sequence[str]) -> str:
    """Returns a text with exactly one line per class, even if a name has several lines."""
    return "".join(f"{' '.join(name.splitlines())}\n" for name in names)


# Files, next to this one, with names that are too many for the table, one per line.
_NAME_FILES = {TASKS["imagenet"]: "imagenet_classes.txt"}


def class_names(task: str | os.PathLike | Task) -> tuple[str, ...] | None:
    """Returns the short names of a task's classes in label order, or None if it has none.

    ImageNet's are in the order of the sorted WordNet ids.

    Args:
      task: a task, or an argument of `get_task`.

    Raises:
      TaskError: See `get_task`.
    """
    task = task if isinstance(task, Task) else get_task(task)
    if task.class_names is None and task in _NAME_FILES:
        return _names_from(_NAME_FILES[task])
    return task.class_names


@functools.cache
def _names_from(file_name: str) -> tuple[str, ...]:
    return tuple(Path(__file__).with_name(file_name).read_text(encoding="utf-8").splitlines())


def wnids(name: str = "imagenet") -> tuple[str, ...]:
    """Returns the WordNet ids of `imagenet`, `imagenet_a` or `imagenet_r` in label order.

    The last two have 200 classes each. Their sources are `eval.py` in
    github.com/hendrycks/natural-adv-examples and github.com/hendrycks/imagenet-r.
    """
    return _names_from(f"{name}_wnids.txt")
