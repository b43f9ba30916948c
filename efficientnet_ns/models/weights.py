"""Weights by name: the variable names of the original's TF1 checkpoints, strict reading and atomic
writing.

A checkpoint holds `<variant>/stem/conv2d/kernel` …, the moving-average copy of each variable under
`…/ExponentialMovingAverage`, and the optimizer's slots under `…/RMSProp` and `…/RMSProp_1`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import tensorflow as tf

from efficientnet_ns.models import efficientnet

EMA_SUFFIX = "/ExponentialMovingAverage"
_BN_SLOTS = ("gamma", "beta", "moving_mean", "moving_variance")


class WeightsError(ValueError):
    """The variables in a file are not those of the model."""


def _numbered(name: str, number: int) -> str:
    return name if number == 0 else f"{name}_{number}"


def _layer_scopes(model: tf.keras.Model) -> dict[str, str]:
    """Maps each layer with variables to its TF1 scope below the model's, in order of creation."""
    scopes = {"stem_conv": "stem/conv2d", "stem_bn": "stem/tpu_batch_normalization"}
    for index in range(efficientnet.num_blocks(model)):
        ours, theirs = f"blocks_{index}", f"blocks_{index}"
        has_expand = any(layer.name == f"{ours}_expand_conv" for layer in model.layers)
        parts = ["expand"] * has_expand + ["dw", "project"]
        # TF1 numbers layers of one class inside a block; blocks without expansion start one
        # earlier.
        convs = iter(range(2))
        for number, part in enumerate(parts):
            scopes[f"{ours}_{part}_conv"] = (
                f"{theirs}/depthwise_conv2d"
                if part == "dw"
                else f"{theirs}/{_numbered('conv2d', next(convs))}"
            )
            scopes[f"{ours}_{part}_bn"] = f"{theirs}/{_numbered('tpu_batch_normalization', number)}"
        scopes[f"{ours}_se_reduce"] = f"{theirs}/se/conv2d"
        scopes[f"{ours}_se_expand"] = f"{theirs}/se/conv2d_1"
    scopes.update(
        head_conv="head/conv2d", head_bn="head/tpu_batch_normalization", head_dense="head/dense"
    )
    return scopes


def variable_names(model: tf.keras.Model) -> dict[str, tf.Variable]:
    """TF1 name → variable for every weight of a model made by `build_model`."""
    names = {}
    for layer_name, scope in _layer_scopes(model).items():
        layer = model.get_layer(layer_name)
        for weight in layer.weights:
            leaf = weight.name.split("/")[-1].split(":")[0]
            names[f"{model.name}/{scope}/{leaf}"] = weight
    if len(names) != len(model.weights):
        raise AssertionError(f"{model.name}: {len(model.weights)} weights but {len(names)} names")
    return names


def checkpoint_prefix(path: str) -> str:
    """The prefix of the checkpoint that `path` means: a prefix, its `.index` file, or a folder.

    In a folder the newest entry of its `checkpoint` file counts, else a single `*.index` file.

    Raises:
      FileNotFoundError: nothing there is a checkpoint.
      WeightsError: a folder with several checkpoints and no `checkpoint` file to choose one.
    """
    path = path.rstrip("/")
    if path.endswith(".index"):
        path = path[: -len(".index")]
    if tf.io.gfile.exists(path + ".index"):
        return path
    if tf.io.gfile.isdir(path):
        latest = tf.train.latest_checkpoint(path)
        if latest:
            return latest
        found = tf.io.gfile.glob(path + "/*.index")
        if len(found) == 1:
            return found[0][: -len(".index")]
        if found:
            raise WeightsError(f"{path} holds {len(found)} checkpoints: name one, e.g. {found[0]}")
    raise FileNotFoundError(
        f"no checkpoint at {path!r}: expected a folder with one, or a prefix like model.ckpt-1000"
    )


@contextlib.contextmanager
def _damage_named(prefix: str) -> Iterator[None]:
    # TensorFlow's reader raises several types for this, IndexError among them, mostly without the
    # file.
    try:
        yield
    except (tf.errors.OpError, IndexError, ValueError, RuntimeError) as error:
        raise tf.errors.DataLossError(None, None, f"{prefix} cannot be read: {error}") from error


def read_checkpoint(prefix: str, names: Mapping[str, tf.Variable]) -> None:
    """Assigns each variable the value stored under its name; nothing is assigned unless all fit.

    Raises:
      WeightsError: names missing from the file or of another shape, each listed.
      tf.errors.DataLossError: the file is damaged.
    """
    with _damage_named(prefix):
        reader = tf.train.load_checkpoint(prefix)
    stored = reader.get_variable_to_shape_map()
    missing = [name for name in names if name not in stored]
    shapes = [
        f"{name}: file {list(stored[name])}, model {variable.shape.as_list()}"
        for name, variable in names.items()
        if name in stored and list(stored[name]) != variable.shape.as_list()
    ]
    if missing or shapes:
        unexpected = [name for name in stored if name not in names and "/RMSProp" not in name]
        raise WeightsError(
            f"{prefix} does not fit the model.\n"
            + _listing("missing from the file", missing)
            + _listing("of another shape", shapes)
            + _listing("in the file only", unexpected if missing else [])
        )
    # All values are read before the first is assigned, so that a damaged file changes nothing.
    with _damage_named(prefix):
        values = {name: reader.get_tensor(name) for name in names}
    for name, variable in names.items():
        variable.assign(values[name])


def _listing(title: str, names: list[str], limit: int = 8) -> str:
    if not names:
        return ""
    more = f"\n    … and {len(names) - limit} more" if len(names) > limit else ""
    return f"  {title} ({len(names)}):\n    " + "\n    ".join(sorted(names)[:limit]) + more + "\n"


def write_checkpoint(prefix: str, tensors: Mapping[str, tf.Tensor]) -> None:
    """Writes a TF1-style checkpoint; its `.index` appears last, so a whole one has it."""
    names = sorted(tensors)
    tf.raw_ops.SaveV2(
        prefix=prefix,
        tensor_names=names,
        shape_and_slices=[""] * len(names),
        tensors=[tf.convert_to_tensor(tensors[name]) for name in names],
    )


def load_weights(model: tf.keras.Model, path: str, *, ema: bool = True) -> None:
    """Loads a checkpoint of the original's format into a model made by `build_model`.

    Args:
      path: see `checkpoint_prefix`.
      ema: take the moving-average copies, which is what evaluation and teachers use.

    Raises:
      WeightsError, FileNotFoundError: the file does not fit, or is not there.
    """
    suffix = EMA_SUFFIX if ema else ""
    names = {name + suffix: variable for name, variable in variable_names(model).items()}
    read_checkpoint(checkpoint_prefix(path), names)
