"""Weights by name: strict reading from, and atomic writing to, the files of this and other programs.

A checkpoint of the original (TF1) holds `<variant>/stem/conv2d/kernel` …, the moving-average copy
of each variable under `…/ExponentialMovingAverage`, and the optimizer's slots under `…/RMSProp` and
`…/RMSProp_1`. Files of Keras and timm: see `foreign_weights`.

Every file is checked whole before the first variable is assigned: each variable of the model must
be in it with its shape, and nothing that the model does not have may be.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
import weakref
from collections.abc import Callable, Container, Iterator, Mapping, Sequence

import numpy as np
import tensorflow as tf

from efficientnet_ns.data import manifests, paths
from efficientnet_ns.models import foreign_weights

EMA_SUFFIX = "/ExponentialMovingAverage"
# What the original calls the teacher inside a student's checkpoint.
TEACHER_SCOPE = "teacher_model"

# What to do about weights that do not fit.
_NEW_HEAD = '  To begin with a new classifier: skip=["head/dense/"].\n'
_OTHER_MODEL = (
    "  The model has to be the one these weights are of: name, size and classes as in the flags of "
    "their training.\n"
)


class WeightsError(ValueError):
    """The variables in a file are not those of the model.

    Attributes:
      missing, unexpected, shapes: names that the file lacks; that the model lacks; and
        `name: file […], model […]`. All empty when the error is of another kind.
    """

    def __init__(
        self,
        message: str,
        missing: Sequence[str] = (),
        unexpected: Sequence[str] = (),
        shapes: Sequence[str] = (),
    ):
        super().__init__(message)
        self.missing, self.unexpected, self.shapes = missing, unexpected, shapes


class DamagedFile(WeightsError, tf.errors.DataLossError):
    """A file cannot be read to its end."""

    def __init__(self, message: str):
        tf.errors.DataLossError.__init__(self, None, None, message)
        self.missing, self.unexpected, self.shapes = (), (), ()


@dataclasses.dataclass(frozen=True)
class _Target:
    """Where a stored array goes: `variable.assign(stored.transpose(axes))`."""

    variable: tf.Variable
    axes: tuple[int, ...]

    @property
    def stored_shape(self) -> list[int]:
        shape = self.variable.shape.as_list()
        return [shape[axis] for axis in foreign_weights.inverse(self.axes)]


def _target(
    naming: foreign_weights.Naming, key: foreign_weights.Key, variable: tf.Variable
) -> _Target:
    return _Target(variable, foreign_weights.axes(naming, key[1], variable.shape.rank))


@dataclasses.dataclass(frozen=True)
class _File:
    """An open file: the shape of every array in it, and how to read one."""

    path: str
    shapes: Mapping[str, Sequence[int]]
    read: Callable[[str], np.ndarray]


def variable_names(model: tf.keras.Model) -> dict[str, tf.Variable]:
    """TF1 name → variable for every weight of a model made by `build_model`."""
    names = foreign_weights.stored_names(model, foreign_weights.TF1)
    variables = foreign_weights.layer_variables(model)
    if len(variables) != len(model.weights):
        raise AssertionError(
            f"{model.name}: {len(model.weights)} weights but {len(variables)} names"
        )
    return {f"{model.name}/{names[key]}": variable for key, variable in variables.items()}


def checkpoint_prefix(path: str) -> str:
    """The prefix of the checkpoint that `path` means: a prefix, its `.index` file, or a folder.

    In a folder the newest entry of its `checkpoint` file counts, else a single `*.index` file,
    there or in the folders inside (those of the published archives have various names).

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
        latest = newest_checkpoint(path)
        if latest:
            return latest
        found = manifests.listed(path, r"[^.].*\.index")
        if not found:
            below = manifests.listed(path, r"[^.].*")
            found = [p for f in below for p in manifests.listed(f, r"model\.ckpt.*\.index")]
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


def fingerprint(path: str) -> str:
    """Short hash of the content of weights of any kind that `load_weights` takes.

    Raises:
      FileNotFoundError: nothing there.
      WeightsError: see `checkpoint_prefix`.
    """
    if os.path.splitext(path)[1] not in foreign_weights.FILES:
        # Holds the checksum of every tensor.
        path = checkpoint_prefix(path) + ".index"
    elif not tf.io.gfile.exists(path):
        raise FileNotFoundError(f"no file at {path!r}")
    return manifests.content_hash(path)


@contextlib.contextmanager
def _damage_named(path: str, *where: str) -> Iterator[None]:
    # Readers raise types of their own for damaged files, IndexError and OSError among them, mostly
    # without the file.
    try:
        yield
    except (ImportError, MemoryError) as error:
        raise WeightsError(f"{path} cannot be read: {error}") from error
    except Exception as error:
        message = ": ".join([*where, str(error)])
        raise DamagedFile(f"{path} cannot be read: {message}") from error


def _open_checkpoint(prefix: str) -> _File:
    with _damage_named(prefix), contextlib.ExitStack() as stack:
        reader = tf.train.load_checkpoint(stack.enter_context(paths.without_wildcards(prefix)))
        file = _File(prefix, reader.get_variable_to_shape_map(), reader.get_tensor)
        # Arrays are read one by one, as long as the file is in use.
        weakref.finalize(file, stack.pop_all().close)
        return file


def _open_file(path: str, read: Callable[[bytes, bool], dict], ema: bool) -> _File:
    if not tf.io.gfile.exists(path):
        raise FileNotFoundError(f"no file at {path!r}")
    with _damage_named(path):
        with tf.io.gfile.GFile(path, "rb") as f:
            arrays = read(f.read(), ema)
        shapes = {name: list(array.shape) for name, array in arrays.items()}
        return _File(path, shapes, arrays.__getitem__)


def _assign(
    file: _File,
    targets: Mapping[str, _Target],
    known: Callable[[str], bool],
    head: Container[str] = (),
) -> None:
    """Assigns every target the array stored under its name; nothing is assigned unless all fit.

    Args:
      known: whether a name that is not in `targets` may be in the file.
      head: names whose misfit alone means another number of classes.

    Raises:
      WeightsError: with each missing or unexpected name and each other shape.
      DamagedFile: an array cannot be read; the message names it.
    """
    missing = sorted(name for name in targets if name not in file.shapes)
    unexpected = sorted(n for n in file.shapes if n not in targets and not known(n))
    other = [n for n in targets if n not in missing and not _fits(file.shapes[n], targets[n])]
    shapes = [f"{n}: file {list(file.shapes[n])}, model {targets[n].stored_shape}" for n in other]
    if missing or unexpected or shapes:
        only_head = not unexpected and all(name in head for name in [*missing, *other])
        raise WeightsError(
            f"{file.path} does not fit the model.\n"
            + _listing("missing from the file", missing)
            + _listing("of another shape", shapes)
            + _listing("in the file only", unexpected)
            + (_NEW_HEAD if only_head else _OTHER_MODEL),
            missing,
            unexpected,
            sorted(shapes),
        )
    # All values are read before the first is assigned, so that a damaged file changes nothing.
    values = {}
    for name in targets:
        with _damage_named(file.path, name):
            values[name] = np.asarray(file.read(name)).transpose(targets[name].axes)
    for name, target in targets.items():
        target.variable.assign(values[name].astype(target.variable.dtype.as_numpy_dtype))


def _fits(stored: Sequence[int], target: _Target) -> bool:
    return list(stored) == target.stored_shape


def _listing(title: str, names: Sequence[str], limit: int = 8) -> str:
    if not names:
        return ""
    more = f"\n    … and {len(names) - limit} more" if len(names) > limit else ""
    return f"  {title} ({len(names)}):\n    " + "\n    ".join(sorted(names)[:limit]) + more + "\n"


def read_checkpoint(prefix: str, names: Mapping[str, tf.Variable]) -> None:
    """Assigns each variable the value stored under its name; nothing is assigned unless all fit.

    Raises:
      WeightsError: names missing from the file, in the file only, or of another shape, each listed.
        The optimizer's slots and what belongs to an on-the-fly teacher may be in the file.
      DamagedFile: the file is damaged.
    """
    targets = {
        name: _Target(variable, tuple(range(variable.shape.rank)))
        for name, variable in names.items()
    }
    beside = functools.partial(_beside, foreign_weights.TF1)
    _assign(_open_checkpoint(prefix), targets, beside)


def _beside(naming: foreign_weights.Naming, name: str, scope: str | None = None) -> bool:
    """Whether a file may hold `name` beside the variables of the model under `scope`."""
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


def load_weights(
    model: tf.keras.Model,
    path: str,
    *,
    ema: bool = True,
    scope: str | None = None,
    skip: Sequence[str] = (),
) -> None:
    """Loads weights from a file into a model made by `build_model`.

    The model's own normalisation stays: pixels 0..255 become (x/255 - mean)/std with the mean and
    std it was built with. Files of `tf.keras.applications` with published ImageNet weights, the
    `efficientnet` package and timm's `tf_efficientnet_*` all expect what the default mean and std
    give; a Keras model made with `weights=None` whose Normalization layer was never adapted
    expects mean 0 and std 1. Only the statistics in a Keras file are not read.

    A classifier in the file is passed over when the model has none (`include_top=False`).

    Args:
      path: ending in `.h5`, `.safetensors` or `.pth`: a file of Keras or timm, of the model's
        variant. Anything else is a checkpoint of this package or of the original; see
        `checkpoint_prefix`.
      ema: take the moving-average copies, which is what evaluation and teachers use. Files that
        have a single set of weights give that.
      scope: above the model's variables in a checkpoint, e.g. `teacher_model`; None: they are at
        the top.
      skip: regular expressions, searched for in the names of `variable_names`; what they match
        keeps its values, e.g. `["head/dense/"]` for a new classifier. Nothing else may be missing.

    Raises:
      FileNotFoundError: nothing there.
      WeightsError: the file does not fit, an expression in `skip` matches nothing, or a library
        that reads the file is not installed.
      DamagedFile: the file cannot be read to its end.
    """
    naming, read = foreign_weights.FILES.get(os.path.splitext(path)[1], (foreign_weights.TF1, None))
    if read is not None and scope is not None:
        raise WeightsError(f"{path} has no scopes; scope={scope!r} is for checkpoints")
    kept = _skipped(variable_names(model), skip)
    above, below, copies = "", "", [""]
    if read is None:
        above = f"{model.name}/" if scope is None else f"{scope}/{model.name}/"
        below, copies = (EMA_SUFFIX if ema else ""), ["", EMA_SUFFIX]
    names = foreign_weights.stored_names(model, naming)
    targets = {
        above + names[key] + below: _target(naming, key, variable)
        for key, variable in foreign_weights.layer_variables(model).items()
        if id(variable) not in kept
    }
    # The other copy of a variable, what is skipped, and a classifier that the model lacks.
    ours = {above + name + copy for name in names.values() for copy in copies}
    file = _open_file(path, read, ema) if read else _open_checkpoint(checkpoint_prefix(path))
    _assign(
        file,
        targets,
        lambda name: name in ours or _beside(naming, name, scope),
        head=[above + names[key] + below for key in foreign_weights.HEAD],
    )


def _skipped(names: Mapping[str, tf.Variable], skip: Sequence[str]) -> set[int]:
    """Ids of the variables whose name one of the expressions matches."""
    kept = set()
    for pattern in skip:
        matched = {id(v) for name, v in names.items() if re.search(pattern, name)}
        if not matched:
            raise WeightsError(f"skip: {pattern!r} matches no variable of the model")
        kept |= matched
    return kept


def save_weights(
    model: tf.keras.Model, path: str, *, ema_model: tf.keras.Model | None = None, step: int = 0
) -> None:
    """Writes the weights of a model made by `build_model`; a file is either whole or absent.

    Args:
      path: ending in `.safetensors`: timm's names and layout, one set of weights (the averages,
        when both are given). Else the prefix of a checkpoint as the original's.
      ema_model: of the same architecture, holds the moving averages; None: the model's own values
        are written for both.
      step: what the checkpoint says under `global_step`.

    Raises:
      WeightsError: the path ends as a file of another kind.
    """
    averages = ema_model or model
    suffix = os.path.splitext(path)[1]
    if suffix in foreign_weights.FILES and suffix != ".safetensors":
        raise WeightsError(
            f"{path}: {suffix} files are read, not written; "
            "end the name in .safetensors, or give the prefix of a checkpoint like model.ckpt-0"
        )
    tf.io.gfile.makedirs(os.path.dirname(path) or ".")
    if suffix == ".safetensors":
        from safetensors import numpy as safetensors

        content = safetensors.save(
            foreign_weights.timm_tensors(averages), metadata={"format": "pt"}
        )
        with manifests.atomic_path(path) as name, tf.io.gfile.GFile(name, "wb") as f:
            f.write(content)
        return
    tensors = {f"{n}{EMA_SUFFIX}": v for n, v in variable_names(averages).items()}
    write_checkpoint(
        path, {**variable_names(model), **tensors, "global_step": np.array(step, np.int64)}
    )
