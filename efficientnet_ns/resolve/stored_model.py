"""What is stored with a model's weights: variant, image size, normalization, task. Reads, never writes.

A training folder holds `config.json` (settings), `model.json` (images the model expects) and
`task.json`; the version of an export holds the last two in `assets`, a TensorFlow Lite file in the
archive attached to it; files of weights hold the second in their metadata. Folders of earlier
trainings have no `task.json`: the task is then the one that `config.json` names, or its fields there.
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
# Stage of a work_dir made from pictures that names the best model of its `rounds`.
BEST = "best model"
# Settings of the training that later programs need, where they are not given.
_OF_TRAINING = (
    *("width_coefficient", "depth_coefficient", "dropout_rate", "stochastic_depth_rate"),
    # When `--eval_continuously` has seen the last checkpoint.
    *("train_steps", "train_ratio", "train_last_step_num"),
)
# Fields of a task that shape the model or its input: the model's own hold, whatever task is given.
_OF_MODEL = ("mean", "std", "small_image")


@dataclasses.dataclass(frozen=True)
class StoredModel:
    """What is known of a model.

    Attributes:
      path: of its weights, as `weights.load_weights` takes it; of an export, the version's folder.
      exported: whether it is a SavedModel or a TensorFlow Lite file of `export_model`, which is run as
        it is.
      settings: of its training, by flag name.
      images: see `weights.stored_settings`.
      task: the task it was trained for; None: unknown.
      task_name: what the training called it; None: unknown.
    """

    path: str = ""
    exported: bool = False
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    images: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    task: tasks.Task | None = None
    task_name: str | None = None

    @property
    def variant(self) -> str | None:
        """Its variant; None: unknown."""
        return self.images.get("variant") or self.settings.get("model_name")

    @property
    def crop_fraction(self) -> float | None:
        """Fraction of the shorter side that its evaluation keeps; None: the published one."""
        # Of trainings of earlier versions only the settings have it.
        return self.settings.get("crop_fraction", self.images.get("crop_fraction"))

    def complete(self, config: Config) -> Config:
        """`config` with what is not given, that is, equals its default, taken from the model.

        Raises:
          ConfigError: the variant that is given is not the model's.
        """
        own, given = self.variant, config.model.model_name
        if own and given not in (None, own):
            raise ConfigError(f"--model_name={given}, but the model in {self.path} is {own}")
        # Raw values, where None is not given: `as_dict` has defaults in their place.
        default, now = _raw(Config()), _raw(config)
        noted = {name: self.settings[name] for name in _OF_TRAINING if name in self.settings}
        noted["model_name"] = own
        noted["input_image_size"] = self.images.get("image_size")
        noted["crop_fraction"] = self.crop_fraction
        noted["task_name"] = self.task_name
        missing = {n: v for n, v in noted.items() if v is not None and now[n] == default[n]}
        return config.override(**missing)

    def fit(self, task: tasks.Task, name: str) -> tasks.Task:
        """`task` with the normalization and the crop of the model.

        Args:
          name: of the task, for the message.

        Raises:
          ConfigError: the task has another number of classes.
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
        # Names first: those of ImageNet are found only by the unchanged task.
        return dataclasses.replace(task, class_names=tasks.class_names(task), **own)


def _raw(config: Config) -> dict[str, Any]:
    """Every setting by its flag's name; None for those that are not given and have no default."""
    sections = [getattr(config, name) for name in subsections(Config)]
    return {name: value for section in sections for name, value in vars(section).items()}


def weights_of(train: TrainConfig) -> str:
    """What is read of a model: the checkpoint that is named, else its folder; "" if there is neither.

    With --init_model the named checkpoint is only what the training in `model_dir` starts from.
    """
    named = None if train.init_model and train.model_dir else train.init_model_path
    return named or train.model_dir or ""


def find(path: str | os.PathLike) -> str:
    """The weights, or the version of an export, that a folder refers to.

    Of a work_dir of noisy_student that is the best or the last finished model, of a folder of exported versions
    the highest; any other path, including "", is returned unchanged.

    Raises:
      ConfigError: a work_dir without a finished model.
    """
    path = os.path.expanduser(path)
    if path and tf.io.gfile.exists(os.path.join(path, "state.json")):
        return _last_of_loop(path)
    versions = [v for v in paths.listed(path, r"\d+") if is_export(v)] if path else []
    # As numbers: in the order of texts, version 2 would be above 10.
    return max(versions, key=lambda v: int(os.path.basename(v)), default=path)


def is_export(path: str) -> bool:
    """Whether a path is what `export_model` wrote: the folder of a version, or a TFLite file."""
    saved = [os.path.join(path, *name) for name in (["saved_model.pb"], ["assets", "labels.txt"])]
    return all(map(tf.io.gfile.exists, saved)) or is_lite_file(path)


def is_lite_file(path: str) -> bool:
    """Whether a path is a TensorFlow Lite file, by its first bytes."""
    if not tf.io.gfile.exists(path) or tf.io.gfile.isdir(path):
        return False
    with tf.io.gfile.GFile(path, "rb") as f:
        # The identifier of the FlatBuffer, after the offset of its root table.
        return f.read(8)[4:] == b"TFL3"


def _last_of_loop(work_dir: str) -> str:
    """The folder of the best model, or else of the last one that `state.json` notes as finished."""
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
    """What is stored with the weights that a path refers to (see `find`); little if they do not exist.

    Raises:
      ConfigError: see `find`.
      BrokenFile, TaskError: a file cannot be used.
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
        # Told when they are loaded. A training may not have written its first checkpoint yet.
        folder = path
    return _described(path, folder, _object(folder, checkpoint_files.SETTINGS_FILE))


def _described(
    path: str, folder: str, images: Mapping[str, Any], *, exported: bool = False
) -> StoredModel:
    settings = _object(folder, SETTINGS)
    if "train_steps" not in settings:
        settings = {}  # Other programs call their files so, too.
    task_file = os.path.join(folder, tasks.TASK_FILE)
    if tf.io.gfile.exists(task_file):
        task: tasks.Task | None = tasks.get_task(task_file)
    else:
        task = _named_in_export(folder) if exported else _noted_task(settings)
    name = settings.get("task_name") or (task_file if task else None)
    return StoredModel(path, exported, settings, images, task, name)


# Attached to TensorFlow Lite files, with `labels.txt`.
LITE_FACTS = "metadata.json"


def _lite_file(path: str) -> StoredModel:
    """What is stored in a TensorFlow Lite file.

    Raises:
      BrokenFile: `export_model` did not write it.
    """
    with tf.io.gfile.GFile(path, "rb") as f:
        content = f.read()
    try:
        # A ZIP archive may follow other bytes: it is found from the end of the file.
        with zipfile.ZipFile(io.BytesIO(content)) as attached:
            facts = json.loads(attached.read(LITE_FACTS))
            labels = attached.read("labels.txt").decode()
        images = {"variant": facts["model"], **{k: facts[k] for k in _OF_LITE_FILE if k in facts}}
        names = tuple(labels.split("\n")[:-1])
    except (zipfile.BadZipFile, KeyError, ValueError) as e:
        raise json_files.BrokenFile(
            f"{path} is a TensorFlow Lite file without the labels and {LITE_FACTS} that export_model "
            "attaches: give the one that it wrote"
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
    """The task by the class names of an export that was made before tasks were stored."""
    with tf.io.gfile.GFile(os.path.join(folder, "labels.txt")) as f:
        names = tuple(f.read().split("\n")[:-1])
    return tasks.Task(len(names), class_names=names)


def _noted_task(settings: Mapping[str, Any]) -> tasks.Task | None:
    """The task that the settings of a training name, or if that is gone, of their fields."""
    with contextlib.suppress(tasks.TaskError):
        if settings.get("task_name"):
            return tasks.get_task(settings["task_name"])
    # Trainings note the fields of their task as `task.<field>`, tuples as lists.
    noted = {k.removeprefix("task."): v for k, v in settings.items() if k.startswith("task.")}
    tuples: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in noted.items()}
    return tasks.Task(**tuples) if "num_classes" in tuples else None


def _object(folder: str, name: str) -> dict[str, Any]:
    path = os.path.join(folder, name)
    return (json_files.read_object_if_any(path) if folder else None) or {}


def labeled_dir(path: str | os.PathLike) -> str | None:
    """The folder of labeled records that the model of a path was trained on; None: unknown."""
    return read(path).settings.get("label_data_dir")
