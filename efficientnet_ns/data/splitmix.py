"""A hash of integers: draws that depend on what they are for, not on the order of the work."""

from __future__ import annotations

import numpy as np


def splitmix64(values: np.ndarray) -> np.ndarray:
    """The output function of SplitMix64 (Steele et al. 2014), a bijection of uint64 [N]."""
    # Sums and products are modulo 2**64, of which NumPy warns for scalars only.
    with np.errstate(over="ignore"):
        values = values + np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
