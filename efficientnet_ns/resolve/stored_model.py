"""Reads (never writes) what is stored with weights: variant, image size, normalization, task.

A training folder contains `config.json` (settings), `model.json` (the input that the model expects)
and `task.json`. An exported version stores the last two in `assets`; a TensorFlow Lite file, in the
archive attached to it; weight files store the second in their metadata. Training folders of earlier
versions have no `task.json`: the task is then the one that `config.json` names, or its fields
there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import zipfile
from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from efficientnet_ns.config.fields import ConfigError, subsections
from efficientnet_ns.config.sections import Config, TrainConfig
from efficientnet_ns.data import tasks
from efficientnet_ns.files import json_files, paths
from efficientnet_ns.models import checkpoint_files, weights
from efficientnet_ns.models.stored_arrays import WeightsError

SETTINGS = "config.json"
# Stage, in a work_dir of a run on pictures, that names the best model of its `rounds`.
BEST = "best model"
# Training settings that later programs need if they are not given.
_OF_TRAINING = (
    *("width_coefficient", "depth_coefficient", "dropout_rate", "stochastic_depth_rate"),
    # These tell `--eval_continuously` which checkpoint is the last.
    *("train_steps", "train_ratio", "train_last_step_num"),
)
# Task fields that shape the model or its input: the model's values override any given task's.
_OF_MODEL = ("mean", "std", "small_image")


@dataclasses.dataclass(frozen=True)
class StoredModel:
    """Stored facts about a model.

    Attributes:
      path: path of its weights, as `weights.load_weights` takes it; for an export, the version's
        folder.
      exported: whether it is a SavedModel or a TensorFlow Lite file of `export_model`, which runs
        unchanged.
      settings: training settings, by flag name.
      images: see `weights.stored_settings`.
      task: the task it was trained for; None: unknown.
      task_name: the task's name in training; None: unknown.
    """

    path: str = ""
    exported: bool = False
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    images: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    task: tasks.Task | None = None
    task_name: str | None = None

    @property
    def variant(self) -> str | None:
        """Variant of the model; None: unknown."""
        return self.images.get("variant") or self.settings.get("model_name")

    @property
    def crop_fraction(self) -> float | None:
        """Fraction of the shorter side that evaluation keeps; None: the published one."""
        # Earlier versions stored it only in the training settings.
        return self.settings.get("crop_fraction", self.images.get("crop_fraction"))

    def complete(self, config: Config) -> Config:
        """Returns `config` with settings not given (equal to their defaults) taken from the model.

        Raises:
          ConfigError: If the given variant is not the model's.
        """
        own, given = self.variant, config.model.model_name
        if own and given not in (None, own):
            raise ConfigError(f"--model_name={given}, but the model in {self.path} is {own}")
        # Raw values, in which None means not given; `as_dict` would fill in defaults.
        default, now = _raw(Config()), _raw(config)
        noted = {name: self.settings[name] for name in _OF_TRAINING if name in self.settings}
        noted["model_name"] = own
        noted["input_image_size"] = self.images.get("image_size")
        noted["crop_fraction"] = self.crop_fraction
        noted["task_name"] = self.task_name
        missing = {n: v for n, v in noted.items() if v is not None and now[n] == default[n]}
        return config.override(**missing)

    def fit(self, task: tasks.Task, name: str) -> tasks.Task:
        """Returns `task` with the normalization and the crop of the model.

        Args:
          name: name of the task, for the message.

        Raises:
          ConfigError: If the task has another number of classes.
        """
        classes = self.task.num_classes if self.task else task.num_classes
        if classes != task.num_classes:
            raise ConfigError(
                f"--task_name={name} has {task.num_classes} classes, but the model in {self.path} "
                f"has {classes}"
            )
        own = {n: self.images[n] for n in _OF_MODEL if n in self.images}
        own = {n: tuple(v) if isinstance(v, list) else v for n, v in own.items()}
        if all(getattr(task, n) == v for n, v in own.items()):
            return task
        # Names are looked up first, because ImageNet's are found only for the unchanged task.
        return dataclasses.replace(task, class_names=tasks.class_names(task), **own)


def _raw(config: Config) -> dict[str, Any]:
    """Returns every setting by flag name; None for those not given that have no default."""
    sections = [getattr(config, name) for name in subsections(Config)]
    return {name: value for section in sections for name, value in vars(section).items()}


def weights_of(train: TrainConfig) -> str:
    """Returns where to read a model: the named checkpoint, else its folder; "" if neither is given.

    With --init_model, the named checkpoint is only the start of the training run in `model_dir`.
    """
    named = None if train.init_model and train.model_dir else train.init_model_path
    return named or train.model_dir or ""


def find(path: str | os.PathLike) -> str:
    """Returns the weights, or the exported version, that a path refers to.

    For a work_dir of noisy_student, that is the best or the last finished model; for a folder of
    exported versions, the highest. Any other path, including "", is returned unchanged.

    Raises:
      ConfigError: If a work_dir has no finished model.
    """
    path = os.path.expanduser(path)
    if path and tf.io.gfile.exists(os.path.join(path, "state.json")):
        return _last_of_loop(path)
    versions = [v for v in paths.listed(path, r"\d+") if is_export(v)] if path else []
    # Compared as numbers: as strings, version 2 would be above 10.
    return max(versions, key=lambda v: int(os.path.basename(v)), default=path)


def is_export(path: str) -> bool:
    """Returns whether `export_model` wrote a path: the folder of a version, or a TFLite file."""
    saved = [os.path.join(path, *name) for name in (["saved_model.pb"], ["assets", "labels.txt"])]
    return all(map(tf.io.gfile.exists, saved)) or is_lite_file(path)


def is_lite_file(path: str) -> bool:
    """Returns whether a path is a TensorFlow Lite file, by its first bytes."""
    if not tf.io.gfile.exists(path) or tf.io.gfile.isdir(path):
        return False
    with tf.io.gfile.GFile(path, "rb") as f:
        # The FlatBuffer identifier, after the offset of the root table.
        return f.read(8)[4:] == b"TFL3"


def _last_of_loop(work_dir: str) -> str:
    """Returns the folder of the best model, else of the last finished one in `state.json`."""
    stages = json_files.read_object(os.path.join(work_dir, "state.json"), "stages")["stages"]
    rounds = os.path.join(work_dir, "rounds")
    if BEST in stages:
        return os.path.join(rounds, f"round-{stages[BEST]['round']}", "model")
    if tf.io.gfile.exists(os.path.join(rounds, "state.json")):
        return _last_of_loop(rounds)
    finished: dict[tuple[int, bool], str] = {}
    for stage in stages:
        match = re.fullmatch(r"round (\d+): (?:teacher|student|fine-tune \S+ at (\d+)).*", stage)
        if match and not stage.endswith(": measure"):
            name = f"finetuned-{match[2]}" if match[2] else "model"
            # In a round, the fine-tuned model comes after its student.
            key = int(match[1]), match[2] is not None
            finished[key] = os.path.join(work_dir, f"round-{match[1]}", name)
    if not finished:
        raise ConfigError(f"{work_dir} has no finished model yet (see its state.json)")
    return finished[max(finished)]


def read(path: str | os.PathLike) -> StoredModel:
    """Reads what is stored with the weights at a path (see `find`); little if they do not exist.

    Raises:
      ConfigError: See `find`.
      BrokenFile, TaskError: If a file is invalid.
    """
    path = find(path)
    if is_lite_file(path):
        return _lite_file(path)
    if is_export(path):
        folder = os.path.join(path, "assets")
        return _described(
            path, folder, _object(folder, checkpoint_files.SETTINGS_FILE), exported=True
        )
    try:
        if weights.file_path(path) is not None:
            return StoredModel(path, images=weights.stored_settings(path))
        folder = os.path.dirname(checkpoint_files.checkpoint_prefix(path))
    except (FileNotFoundError, WeightsError):
        # Reported when they are loaded. Training may not have written its first checkpoint yet.
        folder = path
    return _described(path, folder, _object(folder, checkpoint_files.SETTINGS_FILE))


def _described(
    path: str, folder: str, images: Mapping[str, Any], *, exported: bool = False
) -> StoredModel:
    settings = _object(folder, SETTINGS)
    if "train_steps" not in settings:
        settings = {}  # Other programs also write files of this name.
    task_file = os.path.join(folder, tasks.TASK_FILE)
    if tf.io.gfile.exists(task_file):
        task: tasks.Task | None = tasks.get_task(task_file)
    else:
        task = _named_in_export(folder) if exported else _noted_task(settings)
    name = settings.get("task_name") or (task_file if task else None)
    return StoredModel(path, exported, settings, images, task, name)


# Attached to TensorFlow Lite files, together with `labels.txt`.
LITE_FACTS = "metadata.json"


def _lite_file(path: str) -> StoredModel:
    """Reads what is stored in a TensorFlow Lite file.

    Raises:
      BrokenFile: If `export_model` did not write it.
    """
    with tf.io.gfile.GFile(path, "rb") as f:
        content = f.read()
    try:
        # A ZIP archive may follow other bytes, because it is located from the end of the file.
        with zipfile.ZipFile(io.BytesIO(content)) as attached:
            facts = json.loads(attached.read(LITE_FACTS))
            labels = attached.read("labels.txt").decode()
        images = {"variant": facts["model"], **{k: facts[k] for k in _OF_LITE_FILE if k in facts}}
        names = tuple(labels.split("\n")[:-1])
    except (zipfile.BadZipFile, KeyError, ValueError) as e:
        raise json_files.BrokenFile(
            f"{path} is a TensorFlow Lite file without the labels and {LITE_FACTS} that export_model "
            "attaches: use the file that it wrote"
        ) from e
    name = "imagenet" if names == tasks.class_names("imagenet") else path
    if name == path:
        sets = {key: facts[key] for key in ("eval_set", "test_set") if facts.get(key)}
        task = tasks.Task(len(names), class_names=names, **sets)
    else:
        task = tasks.get_task(name)
    return StoredModel(path, True, {}, images, task, name)


_OF_LITE_FILE = ("image_size", "small_image", "mean", "std", "crop_fraction")


def _named_in_export(folder: str) -> tasks.Task:
    """Returns the task, from the class names, of an export made before tasks were stored."""
    with tf.io.gfile.GFile(os.path.join(folder, "labels.txt")) as f:
        names = tuple(f.read().split("\n")[:-1])
    return tasks.Task(len(names), class_names=names)


def _noted_task(settings: Mapping[str, Any]) -> tasks.Task | None:
    """Returns the task that training settings name, or if it is gone, one from their fields."""
    with contextlib.suppress(tasks.TaskError):
        if settings.get("task_name"):
            return tasks.get_task(settings["task_name"])
    # Training stores the fields of its task as `task.<field>`, tuples as lists.
    noted = {k.removeprefix("task."): v for k, v in settings.items() if k.startswith("task.")}
    tuples: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in noted.items()}
    return tasks.Task(**tuples) if "num_classes" in tuples else None


def _object(folder: str, name: str) -> dict[str, Any]:
    path = os.path.join(folder, name)
    return (json_files.read_object_if_any(path) if folder else None) or {}


def labeled_dir(path: str | os.PathLike) -> str | None:
    """Returns the folder of labeled records that a model was trained on; None: unknown."""
    return read(path).settings.get("label_data_dir")
