"""Validates the arrays of a report; raises a ValueError that names the argument."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


def vector(values: ArrayLike, name: str, length: int | None = None) -> np.ndarray:
    """Returns the values as an array [N] and checks its length if given.

    Raises:
      ValueError: If the number of dimensions or entries is wrong. The other checks also raise it.
    """
    array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"{name} must have one dimension, not shape {list(array.shape)}")
    if length is not None and len(array) != length:
        raise ValueError(f"{name} has {len(array)} entries; expected {length}")
    return array


def probabilities(values: ArrayLike, name: str, length: int | None = None) -> np.ndarray:
    """Returns values in [0, 1] as float [N]."""
    array = vector(values, name, length)
    if array.dtype.kind != "f":
        array = array.astype(np.float64)
    # Rounding may move a softmax slightly above 1. In this form, NaN also fails.
    if not ((array >= 0) & (array <= 1.001)).all():
        raise ValueError(f"{name} must be in [0, 1]")
    return np.minimum(array, 1)


def mask(values: ArrayLike, name: str, length: int) -> np.ndarray:
    """Returns a mask as bool [length]."""
    array = vector(values, name, length)
    # A list of indices may have the expected length by accident.
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
    """Returns values in low..high as int64 [N]."""
    array = vector(values, name, length)
    # NaN fails here; the cast below would convert it to a number.
    if not (np.mod(array, 1) == 0).all():
        raise ValueError(f"{name} must be integers")
    array = array.astype(np.int64)
    if (array < low).any() or (high is not None and (array > high).any()):
        limit = f"at least {low}" if high is None else f"in {low}..{high}"
        raise ValueError(f"{name} must be {limit}")
    return array


def weights(values: ArrayLike | None, length: int) -> np.ndarray:
    """Returns weights as int64 [length]; ones if None."""
    if values is None:
        return np.ones(length, np.int64)
    return integers(values, "images", low=0, length=length)
