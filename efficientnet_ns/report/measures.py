"""Compares predictions with the truth: counts of confusions and sums for calibration."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

# As in Guo et al. 2017.
CALIBRATION_BINS = 15


class Confusion(NamedTuple):
    """Images by true class and prediction: each existing pair once, in order.

    With thousands of classes, a matrix would consist mostly of zeros.

    Attributes:
      truth: int64 [P]; -1 for images of no class.
      predicted: int64 [P].
      images: int64 [P].
    """

    truth: np.ndarray
    predicted: np.ndarray
    images: np.ndarray

    @classmethod
    def tally(
        cls, truth: ArrayLike, predicted: ArrayLike, images: ArrayLike | None = None
    ) -> Confusion:
        """Counts images by true class and prediction.

        Args:
          truth: int [N], at least -1.
          predicted: int [N], at least 0.
          images: weight of each entry, int [N]; None for 1.
        """
        truth, predicted = np.asarray(truth, np.int64), np.asarray(predicted, np.int64)
        classes = predicted.max(initial=0) + 1
        # One int64 per pair: with 46,341 or more classes, the largest key exceeds int32.
        keys, place = np.unique(truth * classes + predicted, return_inverse=True)
        total = np.bincount(place, images, len(keys)).astype(np.int64)
        # Both round down, which restores a truth of -1.
        return cls(keys // classes, keys % classes, total)

    def worst(self, limit: int) -> list[tuple[int, int, int]]:
        """Returns (truth, prediction, images) of up to `limit` most frequent mistakes.

        Images of no class do not count as mistakes.
        """
        wrong = (self.truth != self.predicted) & (self.truth >= 0) & (self.images > 0)
        order = np.argsort(-self.images[wrong], kind="stable")[:limit]
        return list(zip(*(column[wrong][order].tolist() for column in self)))


class Calibration(NamedTuple):
    """Sums over equal intervals (lower, upper] of the top-1 probability; the first includes 0.

    Attributes:
      images: float64 [bins].
      confidence: summed top-1 probability, float64 [bins].
      correct: number of correct predictions, float64 [bins].
    """

    images: np.ndarray
    confidence: np.ndarray
    correct: np.ndarray

    @classmethod
    def tally(
        cls,
        probs: ArrayLike,
        correct: ArrayLike,
        images: ArrayLike = 1,
        bins: int = CALIBRATION_BINS,
    ) -> Calibration:
        """Computes the sums over intervals.

        Args:
          probs: top-1 probabilities, float [N].
          correct: mask of correct predictions, [N].
          images: weight of each entry, int [N], or one weight for all.
          bins: number of intervals, at least 1.
        """
        probs = np.asarray(probs, np.float64)
        # Without the outer ends, so a probability rounded above 1 stays in the last bin.
        index = np.searchsorted(np.arange(1, bins) / bins, probs, side="left")
        values = (np.ones_like(probs), probs, np.asarray(correct))
        return cls(*(np.bincount(index, value * images, bins) for value in values))

    @property
    def error(self) -> float:
        """Expected calibration error (Guo et al. 2017, arXiv 1706.04599, equation 3).

        The gap between confidence and accuracy in a bin, averaged over images, in [0, 1]; NaN if
        there are no images.
        """
        images = self.images.sum()
        # Uses sums, not means: the number of images in a bin cancels with its weight.
        gaps = np.abs(self.confidence - self.correct).sum()
        return float(gaps / images) if images else float("nan")
