"""How right predictions are, where the truth is known: confusion and calibration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from efficientnet_ns.report import checks, style, tables

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

OUT_OF_DISTRIBUTION = -1
CALIBRATION_BINS = 15
MAX_CLASSES_WITH_COUNTS = 20


def confusion(
    truth: ArrayLike,
    predicted: ArrayLike,
    class_names: Sequence[str],
    *,
    images: ArrayLike | None = None,
) -> str:
    """Heat map of truth against prediction, with counts up to 20 classes, and the worst confusions.

    Args:
      truth: int [N] in 0..C-1, or -1 for images of no class (they get a row of their own).
      predicted: int [N] in 0..C-1.
      class_names: C names.
      images: how many each entry stands for, int [N].
    """
    names = [str(name) for name in class_names]
    truth = checks.integers(truth, "truth", low=OUT_OF_DISTRIBUTION, high=len(names) - 1)
    predicted = checks.integers(
        predicted, "predicted", low=0, high=len(names) - 1, length=len(truth)
    )
    images = checks.weights(images, len(truth))
    if not len(truth):
        return tables.NOTHING
    row_names = names + ["(no class)"] * bool((truth == OUT_OF_DISTRIBUTION).any())
    counts = np.zeros((len(names) + 1, len(names)), np.int64)
    np.add.at(counts, (truth, predicted), images)  # Index -1 is the additional last row.
    counts = counts[: len(row_names)]
    correct, known = np.trace(counts), images[truth != OUT_OF_DISTRIBUTION].sum()
    caption = f"{correct} of {known} images of known class are predicted right."
    image = _heat_map(counts, row_names, names, alt=f"Confusion matrix. {caption}")
    return (
        style.figure(image, f"{caption} Colour: share of the row.")
        + "<h3>Most frequent confusions</h3>\n"
        + tables.table(_worst_confusions(counts, names))
    )


def _heat_map(
    counts: np.ndarray, row_names: Sequence[str], column_names: Sequence[str], *, alt: str
) -> str:
    """Counts int [R, C] as an image, coloured by the share of their row."""
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size = int(np.clip(140 + 44 * len(column_names), 360, 760))
    figure, axes = style.axes_of(size, size)
    axes.grid(False)
    shown = axes.imshow(share, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    axes.set(xlabel="predicted", ylabel="truth")
    if len(row_names) <= style.MAX_CLASSES_AS_BARS + 1:
        size = 8 if len(row_names) <= 30 else 6
        labels = style.tick_labels(column_names)
        axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=size, **style.PLAIN_TEXT)
        labels = style.tick_labels(row_names)
        axes.set_yticks(range(len(labels)), labels, fontsize=size, **style.PLAIN_TEXT)
    if len(column_names) > MAX_CLASSES_WITH_COUNTS:
        bar = figure.colorbar(shown, ax=axes, shrink=0.6)
        bar.ax.tick_params(colors=style.INK, labelsize=8)
        bar.outline.set_visible(False)
        return style.image(figure, alt)
    for (row, column), count in np.ndenumerate(counts):
        if count:
            color = "white" if share[row, column] > 0.5 else "#24303c"
            axes.text(column, row, count, ha="center", va="center", color=color, fontsize=8)
    return style.image(figure, alt)


def _worst_confusions(
    counts: np.ndarray, names: Sequence[str], limit: int = 10
) -> list[dict[str, object]]:
    """The largest counts beside the diagonal; images of no class are not confused with another."""
    wrong = counts[: len(names)] * ~np.eye(len(names), dtype=bool)
    order = np.argsort(-wrong, axis=None, kind="stable")[:limit]
    return [
        {"truth": names[row], "predicted": names[column], "images": wrong[row, column]}
        for row, column in zip(*np.unravel_index(order, wrong.shape))
        if wrong[row, column]
    ]


# Calibration.


class _Bins(NamedTuple):
    """Sums over equal intervals of confidence (lower, upper], the first with 0; each [bins]."""

    images: np.ndarray
    confidence: np.ndarray
    correct: np.ndarray


def _bin(correct: np.ndarray, probs: np.ndarray, images: np.ndarray, bins: int) -> _Bins:
    upper = np.arange(1, bins) / bins
    index = np.searchsorted(upper, probs, side="left")
    sums = (np.bincount(index, values * images, bins) for values in (1, probs, correct))
    number, confidence, right = sums
    return _Bins(number.astype(np.int64), confidence, right)


def _error(sums: _Bins) -> float:
    return float(np.abs(sums.confidence - sums.correct).sum() / sums.images.sum())


def calibration_error(correct: ArrayLike, probs: ArrayLike, bins: int = CALIBRATION_BINS) -> float:
    """Expected calibration error (Guo et al. 2017, arXiv 1706.04599, equation 3).

    Args:
      correct: mask of right predictions, [N].
      probs: top-1 probabilities, float [N].
      bins: number of intervals of equal width, at least 1.

    Returns:
      The gap between confidence and accuracy in a bin, averaged over images, in [0, 1]. NaN if N=0.
    """
    probs = checks.probabilities(probs, "probs")
    correct = checks.mask(correct, "correct", len(probs))
    if bins < 1:
        raise ValueError("bins must be at least 1")
    if not len(probs):
        return float("nan")
    return _error(_bin(correct, probs, np.ones(len(probs), np.int64), bins))


def reliability(images: ArrayLike, confidence: ArrayLike, correct: ArrayLike) -> str:
    """Accuracy by confidence, of sums made elsewhere.

    Args:
      images, confidence, correct: images, summed top-1 probability and right answers in
        CALIBRATION_BINS equal intervals (lower, upper], float [CALIBRATION_BINS].
    """
    images = checks.integers(np.rint(images).astype(np.int64), "images", low=0)
    if not images.sum():
        return tables.NOTHING
    return _reliability(_Bins(images, np.asarray(confidence), np.asarray(correct)))


def _reliability(sums: _Bins) -> str:
    """Accuracy by confidence as a plot and as a table."""
    used = np.flatnonzero(sums.images)
    confidence = sums.confidence[used] / sums.images[used]
    accuracy = sums.correct[used] / sums.images[used]
    figure, axes = style.axes_of(420, 360)
    width = 1 / CALIBRATION_BINS
    axes.bar((used + 0.5) * width, accuracy, 0.9 * width, color=style.KEPT, alpha=0.75)
    axes.plot(confidence, accuracy, "o", color=style.PALETTE[1], markersize=4)
    axes.plot([0, 1], [0, 1], color=style.INK, linestyle="dashed", linewidth=1)
    axes.set(xlim=(0, 1), ylim=(0, 1.03), xlabel="top-1 probability", ylabel="accuracy")
    caption = (
        f"Expected calibration error {tables.format_value(_error(sums))} "
        f"({CALIBRATION_BINS} bins, {sums.images.sum()} images)."
    )
    rows = [
        {
            "confidence": f"{index * width:.2f}–{(index + 1) * width:.2f}",
            "images": sums.images[index],
            "mean confidence": mean,
            "accuracy": share,
        }
        for index, mean, share in zip(used, confidence, accuracy)
    ]
    legend = style.legend(
        [
            style.Key("accuracy in the bin", style.KEPT),
            style.Key("at its mean confidence", style.PALETTE[1], "dotted"),
            style.Key("perfect calibration", style.INK, "dashed"),
        ]
    )
    plot = style.figure(style.image(figure, f"Reliability. {caption}"), caption)
    return legend + plot + tables.details("Numbers by confidence", tables.table(rows))
