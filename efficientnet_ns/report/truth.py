"""Compares predictions with the truth: confusion matrix and calibration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from efficientnet_ns.report import checks, style, tables
from efficientnet_ns.report.measures import CALIBRATION_BINS, Calibration, Confusion

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

OUT_OF_DISTRIBUTION = -1
MAX_CLASSES_WITH_COUNTS = 20
# Maximum rows and columns of a heat map, which has no pixels for more.
MAX_CELLS = 1000


def confusion(
    truth: ArrayLike,
    predicted: ArrayLike,
    class_names: Sequence[str],
    *,
    images: ArrayLike | None = None,
) -> str:
    """Plots a heat map of truth and prediction, with counts up to 20 classes, and lists confusions.

    Args:
      truth: int [N] in 0..C-1, or -1 for images of no class (which have a separate row).
      predicted: int [N] in 0..C-1.
      class_names: C names.
      images: weight of each entry, int [N]; None for 1.
    """
    names = [str(name) for name in class_names]
    truth = checks.integers(truth, "truth", low=OUT_OF_DISTRIBUTION, high=len(names) - 1)
    predicted = checks.integers(
        predicted, "predicted", low=0, high=len(names) - 1, length=len(truth)
    )
    images = checks.weights(images, len(truth))
    if not len(truth):
        return tables.NOTHING
    pairs = Confusion.tally(truth, predicted, images)
    correct = pairs.images[pairs.truth == pairs.predicted].sum()
    known = pairs.images[pairs.truth != OUT_OF_DISTRIBUTION].sum()
    caption = f"{correct} of {known} images of known class are predicted correctly."
    image, together = _heat_map(pairs, names, alt=f"Confusion matrix. {caption}")
    cells = f" Each cell covers {together} x {together} classes." if together > 1 else ""
    worst = [
        {"truth": names[t], "predicted": names[p], "images": n} for t, p, n in pairs.worst(limit=10)
    ]
    return (
        style.figure(image, f"{caption} Color: share of the row.{cells}")
        + "<h3>Most frequent confusions</h3>\n"
        + tables.table(worst)
    )


def _cells(pairs: Confusion, num_classes: int) -> tuple[np.ndarray, int]:
    """Returns counts int64 [R, C] with at most MAX_CELLS columns, and the classes per column.

    Images of no class, if any, are in an additional last row.
    """
    # Both are rounded up, so the last cell may cover fewer classes.
    together = -(-num_classes // MAX_CELLS)
    columns = -(-num_classes // together)
    unknown = pairs.truth == OUT_OF_DISTRIBUTION
    counts = np.zeros((columns + bool(unknown.any()), columns), np.int64)
    rows = np.where(unknown, columns, pairs.truth // together)
    # counts[...] += would add only one of the pairs in a cell.
    np.add.at(counts, (rows, pairs.predicted // together), pairs.images)
    return counts, together


def _heat_map(pairs: Confusion, names: Sequence[str], *, alt: str) -> tuple[str, int]:
    """Returns an image of the counts, colored by share of the row, and the classes per column."""
    counts, together = _cells(pairs, len(names))
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size = int(np.clip(140 + 44 * len(names), 360, 760))
    figure, axes = style.axes_of(size, size)
    axes.grid(False)
    shown = axes.imshow(share, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    axes.set(xlabel="predicted", ylabel="truth")
    if len(names) <= style.MAX_CLASSES_AS_BARS:
        # The last row exists only if there are images of no class.
        rows = [*names, "(no class)"][: len(counts)]
        letters = 8 if len(rows) <= 30 else 6
        style.name_ticks(axes.xaxis, range(len(names)), names, rotation=90, fontsize=letters)
        style.name_ticks(axes.yaxis, range(len(rows)), rows, fontsize=letters)
    if len(names) > MAX_CLASSES_WITH_COUNTS:
        bar = figure.colorbar(shown, ax=axes, shrink=0.6)
        bar.ax.tick_params(colors=style.INK, labelsize=8)
        bar.ax.spines["outline"].set_visible(False)
        return style.image(figure, alt), together
    for row, column in np.argwhere(counts):
        color = "white" if share[row, column] > 0.5 else "#24303c"
        text = str(counts[row, column])
        axes.text(column, row, text, ha="center", va="center", color=color, fontsize=8)
    return style.image(figure, alt), together


def reliability(sums: Calibration) -> str:
    """Plots and tabulates accuracy by confidence in CALIBRATION_BINS intervals."""
    used = np.flatnonzero(sums.images)
    if not len(used):
        return tables.NOTHING
    confidence = sums.confidence[used] / sums.images[used]
    accuracy = sums.correct[used] / sums.images[used]
    figure, axes = style.axes_of(420, 360)
    width = 1 / CALIBRATION_BINS
    axes.bar((used + 0.5) * width, accuracy, 0.9 * width, color=style.KEPT, alpha=0.75)
    axes.plot(confidence, accuracy, "o", color=style.PALETTE[1], markersize=4)
    axes.plot([0, 1], [0, 1], color=style.INK, linestyle="dashed", linewidth=1)
    axes.set(xlim=(0, 1), ylim=(0, 1.03), xlabel="top-1 probability", ylabel="accuracy")
    caption = (
        f"Expected calibration error {tables.format_value(sums.error)} "
        f"({CALIBRATION_BINS} bins, {sums.images.sum():.0f} images)."
    )
    rows = [
        {
            "confidence": f"{index * width:.2f}–{(index + 1) * width:.2f}",
            "images": int(sums.images[index]),
            "mean confidence": mean,
            "accuracy": share,
        }
        for index, mean, share in zip(used, confidence, accuracy)
    ]
    keys = (
        style.Key("accuracy in the bin", style.KEPT),
        # Keys are drawn as lines; this one represents the points.
        style.Key("at its mean confidence", style.PALETTE[1], "dotted"),
        style.Key("perfect calibration", style.INK, "dashed"),
    )
    plot = style.plot(figure, "Reliability", caption, keys)
    return plot + tables.details("Numbers by confidence", tables.table(rows))
