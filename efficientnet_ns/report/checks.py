"""Checks of the arrays that fragments of a report are made of; a ValueError names the argument."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


def vector(values: ArrayLike, name: str, length: int | None = None) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"{name} must have one dimension, not shape {list(array.shape)}")
    if length is not None and len(array) != length:
        raise ValueError(f"{name} has {len(array)} entries where {length} are needed")
    return array


def probabilities(values: ArrayLike, name: str, length: int | None = None) -> np.ndarray:
    array = vector(values, name, length)
    if array.dtype.kind != "f":
        array = array.astype(np.float64)
    # Rounding may carry a softmax past 1 by a hair; NaN must fail, hence the form of the test.
    if not ((array >= 0) & (array <= 1.001)).all():
        raise ValueError(f"{name} must lie in [0, 1]")
    return np.minimum(array, 1)


def mask(values: ArrayLike, name: str, length: int) -> np.ndarray:
    array = vector(values, name, length)
    # A list of indices would otherwise pass for a mask when it happens to have the right length.
    if not np.isin(array, (0, 1)).all():
        raise ValueError(f"{name} must be a mask of booleans")
    return array.astype(bool)


def integers(
    values: ArrayLike,
    name: str,
    *,
    low: int,
    high: int | None = None,
    length: int | None = None,
) -> np.ndarray:
    """int64 [N] of values in low..high."""
    array = vector(values, name, length)
    if not (np.mod(array, 1) == 0).all():
        raise ValueError(f"{name} must be integers")
    array = array.astype(np.int64)
    if (array < low).any() or (high is not None and (array > high).any()):
        limit = f"at least {low}" if high is None else f"in {low}..{high}"
        raise ValueError(f"{name} must be {limit}")
    return array


def weights(values: ArrayLike | None, length: int) -> np.ndarray:
    """How many images each entry stands for, int64 [length]; one each if not given."""
    if values is None:
        return np.ones(length, np.int64)
    return integers(values, "images", low=0, length=length)
