"""`load_weights` and `save_weights` for all kinds of files of this and other programs.

For checkpoints of the original code, see `checkpoint_files`; for files of Keras, timm and PyTorch,
`weight_files` and `foreign_weights`; for published weights by name, `published`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from absl import logging

from efficientnet_ns.files import atomic, manifests, object_stores
from efficientnet_ns.files.paths import listed
from efficientnet_ns.models import foreign_weights, heads, published, weight_files
from efficientnet_ns.models.checkpoint_files import (
    CHECKPOINT_FILE,
    EMA_SUFFIX,
    SETTINGS_FILE,
    PathLike,
    checkpoint_prefix,
    folder_settings,
    is_extra,
    open_checkpoint,
    variable_names,
    write_checkpoint,
    write_settings,
)
from efficientnet_ns.models.stored_arrays import (
    StoredFile,
    Target,
    WeightsError,
    assign,
    damage_named,
)


def fingerprint(path: PathLike, variant: str = "") -> str:
    """Returns a short hash of the content of any weights that `load_weights` accepts.

    Args:
      variant: variant of the model, for `published`.

    Raises:
      FileNotFoundError: If the weights do not exist.
      WeightsError: See `checkpoint_prefix`.
    """
    path = published.located(path, variant)
    # The index of a checkpoint contains the checksum of every tensor.
    return manifests.content_hash(file_path(path) or checkpoint_prefix(path) + ".index")


def file_path(path: PathLike) -> str | None:
    """Returns the path if it is a single weight file, or None if it refers to a checkpoint.

    Raises:
      FileNotFoundError: If it does not exist and is named like a file of Keras or timm.
    """
    path = os.path.expanduser(path)
    if tf.io.gfile.exists(path) and not tf.io.gfile.isdir(path):
        prefix, matches = CHECKPOINT_FILE.subn("", path)
        is_part = matches and tf.io.gfile.exists(prefix + ".index")
        return None if is_part else path
    named_as_file = path.lower().endswith(weight_files.SUFFIXES)
    if named_as_file and not any(map(tf.io.gfile.exists, (path, path + ".index"))):
        raise FileNotFoundError(f"no file at {path!r}")
    return None


def load_weights(
    model: tf.keras.Model,
    path: PathLike,
    *,
    ema: bool = True,
    scope: str | None = None,
    skip: str | Sequence[str] = (),
) -> None:
    """Loads weights from a file into a model made by `build_model`.

    The model keeps its own normalization: pixels 0..255 become (x/255 - mean)/std with the mean and
    std it was built with. Files of `tf.keras.applications` with published ImageNet weights, the
    `efficientnet` package and timm's `tf_efficientnet_*` all expect the default mean and std; a
    Keras model made with `weights=None` whose Normalization layer was never adapted expects mean 0
    and std 1. Only the statistics in a Keras file are not read. If `stored_settings` differ from the
    model's, a warning states how to build it.

    A classifier in the file is ignored if the model has none (`include_top=False`). In a model with
    a custom Dense layer on its features, this layer is the classifier.

    Args:
      path: a file of Keras (`.h5`, `.keras`), timm or `efficientnet_pytorch` (`.safetensors`, `.pth`)
        or this package, for the model's variant, with any name; or a checkpoint of this package, the
        original code or Keras, see `checkpoint_prefix`; or `published` or the name of a variant, for
        the weights in an installed package, see `published`.
      ema: whether to load the moving averages, which evaluation and teachers use. Ignored for files
        that have a single set of weights.
      scope: scope of the model's variables in a checkpoint, e.g. `teacher_model`; None if they are
        at the top level.
      skip: one or several regular expressions, searched for in the names of `variable_names`.
        Matching variables keep their values, e.g. `["head/dense/"]` for a new classifier. No other
        variable may be missing.

    Raises:
      FileNotFoundError: If the weights do not exist.
      WeightsError: If the file does not fit, an expression in `skip` is invalid or matches nothing,
        or nothing is left to load.
      DamagedFile: If the file cannot be read completely.
    """
    _check_arguments("load_weights", model, path)
    standard = heads.standard(model)
    path = published.located(path, standard.name)
    file = file_path(path)
    if file is None:
        source = _checkpoint_source(path, model, standard, ema, scope)
    elif scope is None:
        source = _file_source(file, model, standard, ema)
    else:
        raise WeightsError(f"{path} has no scopes; scope={scope!r} is for checkpoints")
    names, kept = source.names, _skipped(variable_names(standard), skip)
    targets = {
        names[key]: Target(
            variable, foreign_weights.axes(source.naming, key[1], variable.shape.rank)
        )
        for key, variable in foreign_weights.layer_variables(standard).items()
        if id(variable) not in kept
    }
    head = [names[key] for key in foreign_weights.HEAD if key in names]
    assign(source.opened, targets, source.known, head)
    if standard is not model:
        heads.take_head(model, standard)
    _warn_of_other_settings(model, source.settings, source.opened.path)


def _check_arguments(function: str, model: object, path: object) -> None:
    if not isinstance(model, tf.keras.Model) or not isinstance(path, (str, os.PathLike)):
        raise TypeError(
            f"{function}(model, path) requires a model and a path, not {type(model).__name__} and "
            f"{type(path).__name__}"
        )


Names = Mapping[foreign_weights.Key, str]


@dataclasses.dataclass(frozen=True)
class _Source:
    """An opened file of weights, and how to read a network's variables from it.

    Attributes:
      names: names of the variables in the file.
      known: whether another name in the file is expected, and so no error.
      naming: whose names and axes these are.
      settings: see `stored_settings`.
    """

    opened: StoredFile
    names: Names
    known: Callable[[str], bool]
    naming: foreign_weights.Naming
    settings: Mapping[str, Any]


def _file_source(path: str, model: tf.keras.Model, standard: tf.keras.Model, ema: bool) -> _Source:
    with damage_named(path):
        with tf.io.gfile.GFile(path, "rb") as f:
            content = weight_files.read(f.read(), model, ema=ema)
        shapes = {name: list(array.shape) for name, array in content.arrays.items()}
    opened = StoredFile(path, shapes, content.arrays.__getitem__)
    names = foreign_weights.stored_names(standard, content.naming)
    known = functools.partial(_known, content.naming, set(names.values()), None)
    return _Source(opened, names, known, content.naming, content.settings)


def _checkpoint_source(
    path: PathLike,
    model: tf.keras.Model,
    standard: tf.keras.Model,
    ema: bool,
    scope: str | None,
) -> _Source:
    file = open_checkpoint(checkpoint_prefix(path))
    folder, naming = os.path.dirname(file.path), foreign_weights.TF1
    above = "" if scope is None else f"{scope}/"
    if _OBJECT_GRAPH in file.shapes:
        layers = {key: above + name for key, name in _object_names(model).items()}
        prefix = f"{above}layer_with_weights"
        settings = folder_settings(folder)
        return _Source(file, layers, lambda n: not n.startswith(prefix), naming, settings)
    above += f"{standard.name}/"
    plain = foreign_weights.stored_names(standard, naming)
    # Includes the other copy of a variable, skipped ones, and a classifier that the model lacks.
    ours = {above + name + copy for name in plain.values() for copy in ("", EMA_SUFFIX)}
    names = {key: above + name + (EMA_SUFFIX if ema else "") for key, name in plain.items()}
    known = functools.partial(_known, naming, ours, scope)
    return _Source(file, names, known, naming, folder_settings(folder))


def _known(
    naming: foreign_weights.Naming, ours: Container[str], scope: str | None, name: str
) -> bool:
    return name in ours or is_extra(naming, name, scope)


# An entry of checkpoints written by Keras, whose names are paths through the layers.
_OBJECT_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"


def _object_names(model: tf.keras.Model, above: str = "") -> dict[foreign_weights.Key, str]:
    """Returns the names that Keras' `model.save_weights(<prefix>)` gives the same variables."""
    names: dict[foreign_weights.Key, str] = {}
    head = heads.own_head(model) if not above else None
    weighted = [layer for layer in model.layers if layer.weights]
    for number, layer in enumerate(weighted):
        path = f"{above}layer_with_weights-{number}/"
        if isinstance(layer, tf.keras.Model):
            names.update(_object_names(layer, path))
            continue
        ours = "head_dense" if layer is head else layer.name
        for weight in layer.weights:
            leaf = weight.name.split("/")[-1].split(":")[0]
            names[ours, leaf] = f"{path}{leaf}/.ATTRIBUTES/VARIABLE_VALUE"
    return names


def stored_settings(path: PathLike) -> dict[str, Any]:
    """Returns what is stored with weights about the input that their model expects.

    Files of `save_weights`, training folders and models saved by Keras store it.

    Returns:
      Some of `variant`, `image_size`, `small_image`, `mean`, `std` and `crop_fraction`.

    Raises:
      FileNotFoundError, WeightsError: See `load_weights`.
    """
    if published.is_name(path):
        return {}  # The variant itself determines them.
    file = file_path(path)
    if file is None:
        return folder_settings(os.path.dirname(checkpoint_prefix(path)))
    with damage_named(file), tf.io.gfile.GFile(file, "rb") as f:
        return dict(weight_files.settings(f.read()))


def _warn_of_other_settings(model: tf.keras.Model, stored: Mapping[str, Any], path: str) -> None:
    own = heads.settings(model)
    other = [
        name for name in ("small_image", "mean", "std") if stored.get(name, own[name]) != own[name]
    ]
    if other:
        told = ", ".join(f"{name}={stored[name]}" for name in other)
        logging.warning(
            "%s: these weights belong to a model with %s: build the model with these values unless you retrain it",
            path,
            told,
        )


def _skipped(names: Mapping[str, tf.Variable], skip: str | Sequence[str]) -> set[int]:
    """Returns the ids of the variables whose name matches one of the expressions."""
    kept = set()
    for pattern in [skip] if isinstance(skip, str) else skip:
        try:
            matched = {id(v) for name, v in names.items() if re.search(pattern, name)}
        except re.error as e:
            raise WeightsError(
                f"skip (--init_skip): {pattern!r} is not a regular expression: {e}"
            ) from e
        if not matched:
            raise WeightsError(f"skip (--init_skip): {pattern!r} matches no variable of the model")
        kept |= matched
    if len(kept) == len(names):
        raise WeightsError(f"skip (--init_skip): {skip!r} leaves no variable to load")
    return kept


def _check_neighbors(folder: str, base: str, model: tf.keras.Model) -> None:
    """Rejects a model that differs from what the `SETTINGS_FILE` of its folder describes."""
    others = set(listed(folder, r"[^.].*\.index")) - {os.path.join(folder, f"{base}.index")}
    stored = folder_settings(folder) if others else {}
    difference = manifests.describe_difference(stored, heads.settings(model)) if stored else ""
    if difference:
        raise WeightsError(
            f"{folder} contains a checkpoint of a model that expects other images ({difference}), "
            f"which its {SETTINGS_FILE} describes: save to another folder or to a .safetensors file"
        )


def check_target(path: PathLike) -> None:
    """Raises WeightsError if `save_weights` cannot write any model to this path."""
    path = os.path.expanduser(path)
    suffix = _suffix(path)
    if suffix not in ("", ".safetensors"):
        raise WeightsError(
            f"{path}: {suffix} files can be read, but not written (use model.save or "
            "model.save_weights of Keras); "
            "use a name that ends in .safetensors or the prefix of a checkpoint like model.ckpt-0"
        )
    folder, base = os.path.split(path)
    if not base or tf.io.gfile.isdir(path):
        raise WeightsError(
            f"{path} is a folder: pass the name of a file or the prefix of a checkpoint in it, e.g. "
            f"{os.path.join(path, 'model.ckpt-0')}"
        )
    while folder and not tf.io.gfile.exists(folder):
        folder = os.path.dirname(folder)
    if folder and not tf.io.gfile.isdir(folder):
        raise WeightsError(f"{path} cannot be written: {folder} is a file, not a folder")


def _suffix(path: str) -> str:
    return next((end for end in weight_files.SUFFIXES if path.lower().endswith(end)), "")


def save_weights(
    model: tf.keras.Model,
    path: PathLike,
    *,
    ema_model: tf.keras.Model | None = None,
    step: int = 0,
) -> None:
    """Writes the weights of a model made by `build_model`; a file is either complete or absent.

    In a model with a custom Dense layer on its features, this layer is the classifier. The images
    that the model expects are also described, in the file or next to the checkpoint.

    Args:
      path: a path that ends in `.safetensors`, for timm's names and layout and one set of weights
        (the averages if both are given), else the prefix of a checkpoint like the original code's.
      ema_model: a model of the same architecture with the moving averages; if None, the model's own
        values are written for both.
      step: the value of `global_step` in the checkpoint.

    Raises:
      WeightsError: If the path ends like a file of another kind or is a folder, or the other
        checkpoints in its folder are of a model that expects other images.
      ValueError: If the model has layers that EfficientNets do not have.
    """
    _check_arguments("save_weights", model, path)
    check_target(path)
    path = os.path.expanduser(path)
    model = heads.standard(model)
    averages = heads.standard(ema_model) if ema_model is not None else model
    folder, base = os.path.split(path)
    folder = folder or "."
    suffix = _suffix(path)
    if not suffix:
        _check_neighbors(folder, base, averages)
    object_stores.make_folder(folder)
    if suffix == ".safetensors":
        from safetensors import numpy as safetensors

        metadata = {
            "format": "pt",
            weight_files.SETTINGS_KEY: json.dumps(heads.settings(averages)),
        }
        content = safetensors.save(foreign_weights.timm_tensors(averages), metadata=metadata)
        with atomic.atomic_path(path) as name, tf.io.gfile.GFile(name, "wb") as f:
            f.write(content)
        return
    tensors = {f"{n}{EMA_SUFFIX}": v for n, v in variable_names(averages).items()}
    write_checkpoint(
        path, {**variable_names(model), **tensors, "global_step": np.array(step, np.int64)}
    )
    write_settings(folder, averages)
