"""TensorFlow checkpoints with the original's names: finding, reading and writing them.

A checkpoint holds `<variant>/stem/conv2d/kernel` …, the moving-average copy of each variable under
`…/ExponentialMovingAverage`, and the optimizer's slots under `…/RMSProp` and `…/RMSProp_1`.
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

# A local path, or one of any file system of TensorFlow.
PathLike = str | os.PathLike

EMA_SUFFIX = "/ExponentialMovingAverage"
# What the original calls the teacher inside a student's checkpoint.
TEACHER_SCOPE = "teacher_model"
# What the files of a checkpoint end in.
CHECKPOINT_FILE = re.compile(r"\.(index|meta|data-\d{5}-of-\d{5})$")
# What images the model of the weights in a folder expects.
SETTINGS_FILE = "model.json"


def variable_names(model: tf.keras.Model) -> dict[str, tf.Variable]:
    """TF1 name → variable for every weight of a model made by `build_model`.

    With a classifier of the user's own its variables are copies.
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
    """The prefix of the checkpoint that `path` means: a prefix, a file of it, or a folder.

    In a folder the newest entry of its `checkpoint` file counts, else a single `*.index` file,
    there or in the folders inside (those of the published archives have various names). In the
    folder of a SavedModel it is that of its variables.

    Raises:
      FileNotFoundError: nothing there is a checkpoint.
      WeightsError: a folder with several checkpoints and no `checkpoint` file to choose one.
    """
    path = CHECKPOINT_FILE.sub("", os.path.expanduser(path).rstrip("/"))
    if tf.io.gfile.exists(path + ".index"):
        return path
    if tf.io.gfile.exists(path + "/saved_model.pb"):
        if tf.io.gfile.exists(path + "/variables/variables.index"):
            return path + "/variables/variables"
        raise WeightsError(
            f"{path} is an exported model, whose weights are constants of its graph: give the "
            "checkpoint it was made of"
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
            raise WeightsError(f"{path} holds {len(found)} checkpoints: name one, e.g. {found[0]}")
    raise FileNotFoundError(
        f"no checkpoint at {path!r}: expected a folder with one, or a prefix like model.ckpt-1000"
    )


def newest_checkpoint(folder: str) -> str | None:
    """The prefix of the checkpoint that the `checkpoint` file of a folder names as the newest.

    None without such a file, or when that checkpoint is gone.
    """
    state = tf.train.get_checkpoint_state(folder)
    prefix = state.model_checkpoint_path if state else ""
    return prefix if prefix and tf.io.gfile.exists(prefix + ".index") else None


def open_checkpoint(prefix: str) -> StoredFile:
    """The checkpoint of a prefix, with whatever names; DamagedFile if it cannot be read."""
    with damage_named(prefix), contextlib.ExitStack() as stack:
        reader = tf.train.load_checkpoint(
            stack.enter_context(local_files.without_wildcards(prefix))
        )
        file = StoredFile(prefix, reader.get_variable_to_shape_map(), reader.get_tensor)
        # Arrays are read one by one, as long as the file is in use.
        weakref.finalize(file, stack.pop_all().close)
        return file


def read_checkpoint(prefix: str, names: Mapping[str, tf.Variable]) -> None:
    """Assigns each variable the value stored under its name; nothing is assigned unless all fit.

    Raises:
      WeightsError: names missing from the file, in the file only, or of another shape, each listed.
        The file may also hold the optimizer's slots and an on-the-fly teacher.
      DamagedFile: the file is damaged.
    """
    targets = {
        name: Target(variable, tuple(range(variable.shape.rank)))
        for name, variable in names.items()
    }
    extra = functools.partial(is_extra, foreign_weights.TF1)
    assign(open_checkpoint(prefix), targets, extra)


def is_extra(naming: foreign_weights.Naming, name: str, scope: str | None = None) -> bool:
    """Whether a file may hold `name` in addition to the variables of the model under `scope`."""
    if re.fullmatch(naming.ignored, name):
        return True
    if scope is None:
        return name.startswith(f"{TEACHER_SCOPE}/")
    return not name.startswith(f"{scope}/")


def write_checkpoint(prefix: str, tensors: Mapping[str, tf.Tensor]) -> None:
    """Writes a TF1-style checkpoint; its `.index` appears last, so a whole one has it."""
    names = sorted(tensors)
    tf.raw_ops.SaveV2(
        prefix=prefix,
        tensor_names=names,
        shape_and_slices=[""] * len(names),
        tensors=[tf.convert_to_tensor(tensors[name]) for name in names],
    )


def folder_settings(folder: str) -> dict[str, Any]:
    """What `write_settings` wrote to a folder; empty if nothing is there."""
    path = os.path.join(folder, SETTINGS_FILE)
    return json_files.read_object_if_any(path) or {}


def write_settings(folder: str, model: tf.keras.Model) -> None:
    """Writes what images a model expects next to its checkpoints, where `stored_settings` looks."""
    json_files.write_json(os.path.join(folder, SETTINGS_FILE), heads.settings(model), indent=1)
