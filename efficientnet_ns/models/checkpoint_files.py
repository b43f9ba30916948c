"""Finds, reads and writes TensorFlow checkpoints with the names of the original code.

A checkpoint contains `<variant>/stem/conv2d/kernel` …, the moving-average copy of each variable
under `…/ExponentialMovingAverage`, and the optimizer's slots under `…/RMSProp` and `…/RMSProp_1`.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import weakref
from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from efficientnet_ns.files import json_files, local_files
from efficientnet_ns.files.paths import listed
from efficientnet_ns.models import foreign_weights, heads
from efficientnet_ns.models.stored_arrays import (
    StoredFile,
    Target,
    WeightsError,
    assign,
    damage_named,
)

# A local path, or a path of any file system that TensorFlow supports.
PathLike = str | os.PathLike

EMA_SUFFIX = "/ExponentialMovingAverage"
# The original code's scope for the teacher inside a student's checkpoint.
TEACHER_SCOPE = "teacher_model"
# The endings of a checkpoint's files.
CHECKPOINT_FILE = re.compile(r"\.(index|meta|data-\d{5}-of-\d{5})$")
# Describes the images that the model of the weights in a folder expects.
SETTINGS_FILE = "model.json"


def variable_names(model: tf.keras.Model) -> dict[str, tf.Variable]:
    """Maps the TF1 name of every weight of a model made by `build_model` to its variable.

    For a model with a custom classifier, its variables are copies.
    """
    model = heads.standard(model)
    names = foreign_weights.stored_names(model, foreign_weights.TF1)
    variables = foreign_weights.layer_variables(model)
    if len(variables) != len(model.weights):
        raise AssertionError(
            f"{model.name}: {len(model.weights)} weights but {len(variables)} names"
        )
    return {f"{model.name}/{names[key]}": variable for key, variable in variables.items()}


def checkpoint_prefix(path: PathLike) -> str:
    """Returns the prefix of the checkpoint at `path`: a prefix, a file of a checkpoint or a folder.

    In a folder, this is the newest entry of its `checkpoint` file, else a single `*.index` file in
    the folder or its subfolders (published archives name these differently). For the folder of a
    SavedModel, it is the checkpoint of its variables.

    Raises:
      FileNotFoundError: If there is no checkpoint.
      WeightsError: If a folder has several checkpoints and no `checkpoint` file that selects one.
    """
    path = CHECKPOINT_FILE.sub("", os.path.expanduser(path).rstrip("/"))
    if tf.io.gfile.exists(path + ".index"):
        return path
    if tf.io.gfile.exists(path + "/saved_model.pb"):
        if tf.io.gfile.exists(path + "/variables/variables.index"):
            return path + "/variables/variables"
        raise WeightsError(
            f"{path} is an exported model, whose weights are constants of its graph: pass the "
            "checkpoint it was made from"
        )
    if tf.io.gfile.isdir(path):
        latest = newest_checkpoint(path)
        if latest:
            return latest
        found = listed(path, r"[^.].*\.index")
        if not found:
            below = listed(path, r"[^.].*")
            found = [p for f in below for p in listed(f, r"model\.ckpt.*\.index")]
        if len(found) == 1:
            return found[0][: -len(".index")]
        if found:
            raise WeightsError(
                f"{path} contains {len(found)} checkpoints: pass one, e.g. {found[0]}"
            )
    raise FileNotFoundError(
        f"no checkpoint at {path!r}: expected a folder with one or a prefix like model.ckpt-1000"
    )


def newest_checkpoint(folder: str) -> str | None:
    """Returns the prefix of the newest checkpoint according to the `checkpoint` file of a folder.

    Returns None if there is no such file or the checkpoint no longer exists.
    """
    state = tf.train.get_checkpoint_state(folder)
    prefix = state.model_checkpoint_path if state else ""
    return prefix if prefix and tf.io.gfile.exists(prefix + ".index") else None


def open_checkpoint(prefix: str) -> StoredFile:
    """Opens the checkpoint of a prefix, with any names; DamagedFile if it cannot be read."""
    with damage_named(prefix), contextlib.ExitStack() as stack:
        reader = tf.train.load_checkpoint(
            stack.enter_context(local_files.without_wildcards(prefix))
        )
        file = StoredFile(prefix, reader.get_variable_to_shape_map(), reader.get_tensor)
        # Arrays are read one by one while the file is in use.
        weakref.finalize(file, stack.pop_all().close)
        return file


def read_checkpoint(prefix: str, names: Mapping[str, tf.Variable]) -> None:
    """Assigns each variable the value stored under its name; nothing is assigned unless all fit.

    Raises:
      WeightsError: If names are missing from the file, only in the file, or have a different shape;
        lists each. The file may also contain the optimizer's slots and an on-the-fly teacher.
      DamagedFile: If the file is damaged.
    """
    targets = {
        name: Target(variable, tuple(range(variable.shape.rank)))
        for name, variable in names.items()
    }
    extra = functools.partial(is_extra, foreign_weights.TF1)
    assign(open_checkpoint(prefix), targets, extra)


def is_extra(naming: foreign_weights.Naming, name: str, scope: str | None = None) -> bool:
    """Checks whether a file may contain `name` besides the model's variables under `scope`."""
    if re.fullmatch(naming.ignored, name):
        return True
    if scope is None:
        return name.startswith(f"{TEACHER_SCOPE}/")
    return not name.startswith(f"{scope}/")


def write_checkpoint(prefix: str, tensors: Mapping[str, tf.Tensor]) -> None:
    """Writes a TF1-style checkpoint; `.index` is written last and marks it as complete."""
    names = sorted(tensors)
    tf.raw_ops.SaveV2(
        prefix=prefix,
        tensor_names=names,
        shape_and_slices=[""] * len(names),
        tensors=[tf.convert_to_tensor(tensors[name]) for name in names],
    )


def folder_settings(folder: str) -> dict[str, Any]:
    """Returns what `write_settings` wrote to a folder; empty if it wrote nothing."""
    path = os.path.join(folder, SETTINGS_FILE)
    return json_files.read_object_if_any(path) or {}


def write_settings(folder: str, model: tf.keras.Model) -> None:
    """Writes the images a model expects next to its checkpoints, for `stored_settings`."""
    json_files.write_json(os.path.join(folder, SETTINGS_FILE), heads.settings(model), indent=1)
