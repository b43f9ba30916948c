"""Predictions against the truth: which classes are confused, and how far confidence can be trusted."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

CALIBRATION_BINS = 15


class Confusion(NamedTuple):
    """Images by true class and prediction: the pairs that occur, each once, in order.

    A matrix of thousands of classes would be all zeros.

    Attributes:
      truth: int64 [P]; -1: of no class.
      predicted: int64 [P].
      images: int64 [P].
    """

    truth: np.ndarray
    predicted: np.ndarray
    images: np.ndarray

    @classmethod
    def count(
        cls, truth: ArrayLike, predicted: ArrayLike, images: ArrayLike | None = None
    ) -> Confusion:
        """Counts.

        Args:
          truth: int [N], at least -1.
          predicted: int [N], at least 0.
          images: how many each entry stands for, int [N]; None: one.
        """
        truth, predicted = np.asarray(truth, np.int64), np.asarray(predicted, np.int64)
        classes = predicted.max(initial=0) + 1
        keys, place = np.unique(truth * classes + predicted, return_inverse=True)
        total = np.bincount(place, images, len(keys)).astype(np.int64)
        return cls(*np.divmod(keys, classes), total)

    def worst(self, limit: int) -> list[tuple[int, int, int]]:
        """(truth, prediction, images) of the most frequent mistakes, at most `limit`.

        Images of no class are not confused with another.
        """
        wrong = (self.truth != self.predicted) & (self.truth >= 0) & (self.images > 0)
        order = np.argsort(-self.images[wrong], kind="stable")[:limit]
        return list(zip(*(column[wrong][order].tolist() for column in self)))


class Calibration(NamedTuple):
    """Sums over equal intervals of the top-1 probability (lower, upper], the first with 0.

    Attributes:
      images: float64 [bins].
      confidence: summed top-1 probability, float64 [bins].
      correct: right predictions, float64 [bins].
    """

    images: np.ndarray
    confidence: np.ndarray
    correct: np.ndarray

    @classmethod
    def count(
        cls,
        probs: ArrayLike,
        correct: ArrayLike,
        images: ArrayLike = 1,
        bins: int = CALIBRATION_BINS,
    ) -> Calibration:
        """Counts.

        Args:
          probs: top-1 probabilities, float [N].
          correct: mask of right predictions, [N].
          images: how many each entry stands for, int [N], or the same number for all.
          bins: how many intervals, at least 1.
        """
        probs = np.asarray(probs, np.float64)
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
        gaps = np.abs(self.confidence - self.correct).sum()
        return float(gaps / images) if images else float("nan")
