"""Assigns the arrays of a file to the variables of a model: all of them, or none.

Every file is checked completely before the first variable is assigned: it must contain each variable
of the model with its shape and nothing that the model does not have.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from efficientnet_ns.models import foreign_weights

# Advice for weights that do not fit.
_NEW_HEAD = (
    "  Its classes are not the model's{counts}: set the task or the number of classes with "
    "--task_name, --num_label_classes or num_classes.\n"
    '  To start training with a new classifier, use skip=["head/dense/"], on the command line '
    "--init_skip=head/dense/.\n"
)
_OTHER_MODEL = (
    "  The model must be the one that these weights belong to: set the name, size and classes as in "
    "the flags of their training.\n"
)


class WeightsError(ValueError):
    """The variables in a file are not those of the model.

    Attributes:
      missing, unexpected, shapes: names that the file lacks, names that the model lacks, and
        `name: file […], model […]`. All are empty for other kinds of errors.
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
    """A file cannot be read completely."""

    def __init__(self, message: str):
        tf.errors.DataLossError.__init__(self, None, None, message)
        self.missing, self.unexpected, self.shapes = (), (), ()


class UnusableFile(ValueError):
    """A file without readable weights that is not known to be damaged."""


@dataclasses.dataclass(frozen=True)
class Target:
    """The destination of a stored array: `variable.assign(stored.transpose(axes))`."""

    variable: tf.Variable
    axes: tuple[int, ...]

    @property
    def stored_shape(self) -> list[int]:
        """The shape of the array in the file."""
        shape = self.variable.shape.as_list()
        return [shape[axis] for axis in foreign_weights.inverse(self.axes)]


@dataclasses.dataclass(frozen=True)
class StoredFile:
    """An open file: the shape of every array in it and a function that reads one."""

    path: str
    shapes: Mapping[str, Sequence[int]]
    read: Callable[[str], np.ndarray]


@contextlib.contextmanager
def damage_named(path: str, *where: str) -> Iterator[None]:
    """Converts errors of readers inside the block to a WeightsError that names the file.

    Readers raise various types for damaged files, including IndexError and OSError, and rarely name
    the file.
    """
    try:
        yield
    except (MemoryError, UnusableFile) as error:
        raise WeightsError(f"{path} cannot be read: {error}") from error
    except Exception as error:
        message = ": ".join([*where, str(error)])
        raise DamagedFile(f"{path} cannot be read: {message}") from error


def assign(
    file: StoredFile,
    targets: Mapping[str, Target],
    known: Callable[[str], bool],
    head: Container[str] = (),
) -> None:
    """Assigns every target the array stored under its name; nothing is assigned unless all fit.

    Args:
      known: function that checks whether a name that is not in `targets` may be in the file.
      head: names of the classifier; if only these do not fit, the number of classes differs.

    Raises:
      WeightsError: If the file does not fit; lists missing names, unexpected names and other shapes.
      DamagedFile: If an array cannot be read; the message names it.
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
            + _listing("of a different shape", shapes)
            + _listing("only in the file", unexpected)
            + (
                _NEW_HEAD.format(counts=_class_counts(file, targets, other))
                if only_head
                else _OTHER_MODEL
            ),
            missing,
            unexpected,
            sorted(shapes),
        )
    # All values are read before the first is assigned, so that a damaged file changes nothing.
    values = {}
    for name in targets:
        with damage_named(file.path, name):
            values[name] = np.asarray(file.read(name)).transpose(targets[name].axes)
    for name, target in targets.items():
        target.variable.assign(values[name].astype(target.variable.dtype.as_numpy_dtype))


def _class_counts(file: Any, targets: Mapping[str, Any], other: Sequence[str]) -> str:
    """Returns ` (the file has 3, the model 1000)` from the classifier's bias; "" without one."""
    for name in other:
        if len(file.shapes[name]) == len(targets[name].stored_shape) == 1:
            return (
                f" (the file has {file.shapes[name][0]}, the model {targets[name].stored_shape[0]})"
            )
    return ""


def _fits(stored: Sequence[int], target: Target) -> bool:
    return list(stored) == target.stored_shape


def _listing(title: str, names: Sequence[str], limit: int = 8) -> str:
    if not names:
        return ""
    more = f"\n    … and {len(names) - limit} more" if len(names) > limit else ""
    return f"  {title} ({len(names)}):\n    " + "\n    ".join(sorted(names)[:limit]) + more + "\n"
