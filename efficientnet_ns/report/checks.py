"""Checks of the arrays in a report; a ValueError names the argument."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


def vector(values: ArrayLike, name: str, length: int | None = None) -> np.ndarray:
    """The values as an array [N], of that length if given.

    Raises:
      ValueError: another number of dimensions or entries. The other checks raise it, too.
    """
    array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"{name} must have one dimension, not shape {list(array.shape)}")
    if length is not None and len(array) != length:
        raise ValueError(f"{name} has {len(array)} entries where {length} are needed")
    return array


def probabilities(values: ArrayLike, name: str, length: int | None = None) -> np.ndarray:
    """Float [N] of values in [0, 1]."""
    array = vector(values, name, length)
    if array.dtype.kind != "f":
        array = array.astype(np.float64)
    # Rounding may carry a softmax slightly past 1. Written so that NaN fails.
    if not ((array >= 0) & (array <= 1.001)).all():
        raise ValueError(f"{name} must lie in [0, 1]")
    return np.minimum(array, 1)


def mask(values: ArrayLike, name: str, length: int) -> np.ndarray:
    """Bool [length]."""
    array = vector(values, name, length)
    # A list of indices may happen to have the right length.
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
    # NaN fails here; the cast below would make a number of it.
    if not (np.mod(array, 1) == 0).all():
        raise ValueError(f"{name} must be integers")
    array = array.astype(np.int64)
    if (array < low).any() or (high is not None and (array > high).any()):
        limit = f"at least {low}" if high is None else f"in {low}..{high}"
        raise ValueError(f"{name} must be {limit}")
    return array


def weights(values: ArrayLike | None, length: int) -> np.ndarray:
    """int64 [length] of weights; 1 if not given."""
    if values is None:
        return np.ones(length, np.int64)
    return integers(values, "images", low=0, length=length)
