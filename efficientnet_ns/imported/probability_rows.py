"""Validates the rows of a table and converts them to probabilities of a task's classes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tensorflow as tf
from absl import logging

from efficientnet_ns.config import ImportConfig
from efficientnet_ns.files.errors import DataError
from efficientnet_ns.imported.prediction_tables import Block, Table, quoted

_NONE = "-"  # In a class map: not a class of the task.
# Maximum deviation of a row's sum from 1. Rounding to 16 bits (bfloat16) changes each probability by
# up to 0.4%, and thus the sum as well.
_TOLERANCE = 0.01


def target_classes(
    path: str, table: Table, names: Sequence[str] | None, num_classes: int
) -> np.ndarray | None:
    """Returns the task's class of each column, int64 [K]; -1 for none. None: column k is class k.

    Args:
      path: path of the class map, a text file with one line per column: name or number of the class,
        or `-`. If "", see `_named_classes`.
      names: names of the classes, if known.

    Raises:
      DataError: If a line names no class, or a class has no line or, by name, no column.
    """
    if not path:
        return None if table.names is None else _named_classes(table, names or (), num_classes)
    numbers = {name: label for label, name in enumerate(names or ())}
    # If the name of a class is a number, the name takes precedence.
    numbers = {**{str(label): label for label in range(num_classes)}, **numbers, _NONE: -1}
    with tf.io.gfile.GFile(path) as f:
        lines = [line.strip() for line in f.read().removeprefix("\ufeff").splitlines()]
    if wrong := [(i, line) for i, line in enumerate(lines, 1) if line not in numbers]:
        raise DataError(
            f"{path}: {len(wrong)} lines name no class of the task; the first is line {wrong[0][0]}, "
            f"{wrong[0][1]!r}; a line must be a class name, a number 0..{num_classes - 1}, or - for none"
        )
    targets = np.array([numbers[line] for line in lines], np.int64)
    if (lacking := np.setdiff1d(np.arange(num_classes), targets)).size:
        raise DataError(
            f"{path}: no line maps to class {lacking[0]}"
            + (f" ({names[lacking[0]]!r})" if names else "")
            + f", nor to {lacking.size - 1} others: no image could get these labels"
        )
    return targets


def _named_classes(table: Table, names: Sequence[str], num_classes: int) -> np.ndarray | None:
    """Matches columns by class name, else by number 0..K-1, else by position.

    If all classes have a column of their name, other columns are not classes of the task.
    """
    header, labels = table.names or [], {name: label for label, name in enumerate(names)}
    numbers = [str(label) for label in range(num_classes)]
    if not (labels.keys() & header):
        if set(header) == set(numbers):
            return np.array(header, np.int64)
        if len(header) == num_classes:  # Otherwise, `Conversion` rejects them.
            logging.warning(
                "%s: columns are neither named after classes nor numbered from 0; %s are taken for "
                "the classes in the order of the task, %s",
                *(table.source, quoted(header), quoted(names or numbers)),
            )
        return None
    extra = [name for name in header if name not in labels]
    found = set(header)
    if missing := [name for name in names if name not in found]:
        unknown = f"; no class is named {quoted(extra)}" if extra else ""
        raise DataError(
            f"{table.source}: some columns are named after classes, but none after {quoted(missing)}"
            f"{unknown}. Rename columns, or set --class_map"
        )
    if extra:
        logging.warning("%s: %s are not classes of the task", table.source, quoted(extra))
    return np.array([labels.get(name, -1) for name in header])


class Conversion:
    """Validates the rows of a block and converts them to probabilities of the task's classes.

    Args:
      options: `values`, `temperature` and `min_mass`.
      num_classes: number of classes, C.
      targets: see `target_classes`.
    """

    def __init__(self, options: ImportConfig, num_classes: int, targets: np.ndarray | None):
        self.num_classes = num_classes
        self._options, self._targets = options, targets
        if targets is not None:
            # Columns sorted by class, so that reduceat adds those of a class.
            order = np.argsort(targets, kind="stable")
            # [K'], the columns of the task's classes, and [C], where each class begins. Each class has
            # a column (see `target_classes`), because reduceat does not return 0 for no columns.
            self._order = order[targets[order] >= 0]
            self._starts = np.searchsorted(targets[self._order], np.arange(num_classes))
            self._whole = (targets >= 0).all()

    def __call__(self, block: Block) -> tuple[np.ndarray, np.ndarray]:
        """Returns (probabilities float32 [N, C], bool [N]: of no class of the task, then zeros).

        Raises:
          DataError: If the number of columns is wrong, or rows contain NaN or are not probabilities.
        """
        values, targets = block.values, self._targets
        expected = self.num_classes if targets is None else len(targets)
        if values.shape[1] != expected:
            raise DataError(
                f"{block.file} has {values.shape[1]} numbers per row, but "
                + (
                    f"the task has {expected} classes: set --class_map or another --task_name"
                    if targets is None
                    else f"there are {expected} classes in the class map"
                )
            )
        # Probabilities that are already float32 are stored unchanged.
        if values.dtype != np.float32 or self._options.values == "logits":
            values = values.astype(np.float64)
        _refuse(block, ~np.isfinite(values).all(1), "NaN, infinite or empty numbers", values)
        if self._options.values == "logits":
            values = _softmax(values / self._options.temperature)
        else:
            values = self._probabilities(block, values)
        outside = np.zeros(len(values), bool)
        if targets is not None:
            values, outside = self._mapped(values)
        return np.ascontiguousarray(values, np.float32), outside

    def _probabilities(self, block: Block, values: np.ndarray) -> np.ndarray:
        sums = values.sum(1, dtype=np.float64)
        wrong = (values.min(1, initial=0) < 0) | (np.abs(sums - 1) > _TOLERANCE)
        what = "numbers that are not probabilities: below 0, or with a sum other than 1"
        _refuse(block, wrong, what, values, "; for logits, set --values=logits")
        temperature = self._options.temperature
        if temperature == 1:
            return values
        # The logarithm of 0 is -inf, which softmax maps back to 0.
        with np.errstate(divide="ignore"):
            return _softmax(np.log(values.astype(np.float64)) / temperature)

    def _mapped(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        values = np.add.reduceat(values[:, self._order], self._starts, axis=1)
        if self._whole:
            return values, np.zeros(len(values), bool)
        mass = values.sum(1, dtype=np.float64)
        outside = mass < self._options.min_mass
        # The quotient is also computed for rows outside, whose mass may be 0.
        return np.where(outside[:, None], 0, values / mass.clip(1e-30)[:, None]), outside


def _softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def _refuse(block: Block, wrong: np.ndarray, what: str, values: np.ndarray, hint: str = "") -> None:
    if not wrong.any():
        return
    first = int(np.flatnonzero(wrong)[0])
    row = values[first]
    shown = ", ".join(f"{v:.4g}" for v in row[:4]) + (", …" if len(row) > 4 else "")
    raise DataError(
        f"{block.row(first)} has {what}: [{shown}], sum {row.sum():.4g} (such "
        f"rows so far: {wrong.sum()}){hint}"
    )
