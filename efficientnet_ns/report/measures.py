"""Predictions against the truth: counts of confusions, and sums for calibration."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

# As in Guo et al. 2017.
CALIBRATION_BINS = 15


class Confusion(NamedTuple):
    """Images by true class and prediction: each pair that occurs once, in order.

    A matrix of thousands of classes would be mostly zeros.

    Attributes:
      truth: int64 [P]; -1: of no class.
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
          images: weight of each entry, int [N]; None: 1.
        """
        truth, predicted = np.asarray(truth, np.int64), np.asarray(predicted, np.int64)
        classes = predicted.max(initial=0) + 1
        # One int64 per pair: with 46,341 classes and more, the largest exceeds int32.
        keys, place = np.unique(truth * classes + predicted, return_inverse=True)
        total = np.bincount(place, images, len(keys)).astype(np.int64)
        # Both round down, so that a truth of -1 comes back as -1.
        return cls(keys // classes, keys % classes, total)

    def worst(self, limit: int) -> list[tuple[int, int, int]]:
        """(truth, prediction, images) of the most frequent mistakes, at most `limit`.

        Images of no class do not count as mistakes.
        """
        wrong = (self.truth != self.predicted) & (self.truth >= 0) & (self.images > 0)
        order = np.argsort(-self.images[wrong], kind="stable")[:limit]
        return list(zip(*(column[wrong][order].tolist() for column in self)))


class Calibration(NamedTuple):
    """Sums over equal intervals of the top-1 probability (lower, upper], the first with 0.

    Attributes:
      images: float64 [bins].
      confidence: summed top-1 probability, float64 [bins].
      correct: correct predictions, float64 [bins].
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
        """Sums over intervals.

        Args:
          probs: top-1 probabilities, float [N].
          correct: mask of correct predictions, [N].
          images: weight of each entry, int [N], or one weight for all.
          bins: number of intervals, at least 1.
        """
        probs = np.asarray(probs, np.float64)
        # Without the outer ends: a probability that rounding carried past 1 stays in the last bin.
        index = np.searchsorted(np.arange(1, bins) / bins, probs, side="left")
        values = (np.ones_like(probs), probs, np.asarray(correct))
        return cls(*(np.bincount(index, value * images, bins) for value in values))

    @property
    def error(self) -> float:
        """Expected calibration error (Guo et al. 2017, arXiv 1706.04599, equation 3).

        The gap between confidence and accuracy in a bin, averaged over images, in [0, 1]; NaN
        without images.
        """
        images = self.images.sum()
        # Of sums, not means: the number of images in a bin cancels against its weight.
        gaps = np.abs(self.confidence - self.correct).sum()
        return float(gaps / images) if images else float("nan")
