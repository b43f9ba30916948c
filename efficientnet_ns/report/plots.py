"""Plots of metrics over time and of a classifier's predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from efficientnet_ns.report import checks, style, tables

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike

HISTOGRAM_BINS = 40


def _curve(rows: Sequence[Mapping[str, float]], metric: str) -> tuple[list[float], list[float]]:
    """Returns the steps and values of the rows that have the metric."""
    found = [row for row in rows if row.get(metric) is not None]
    if any("step" not in row for row in found):
        raise ValueError('runs has a row without "step"')
    return [row["step"] for row in found], [row[metric] for row in found]


def _metric_plot(
    curves: Sequence[tuple[style.Key, list[float], list[float]]], metric: str, width: int
) -> str:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    figure, axes = style.axes_of(width, 250)
    for key, steps, values in curves:
        # A line needs two points; a single one would be invisible.
        marker = "o" if len(steps) == 1 else None
        axes.plot(steps, values, color=key.color, linestyle=key.style, linewidth=1.6, marker=marker)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    last = (
        f"{key.label} {tables.format_value(values[-1])} at step {tables.format_value(steps[-1])}"
        for key, steps, values in curves
    )
    return style.figure(style.image(figure, f"{metric}: {'; '.join(last)}"), metric)


def learning_curves(
    runs: Mapping[str, Sequence[Mapping[str, float]]], *, metrics: Sequence[str]
) -> str:
    """Returns a row of plots, one per metric, with a line per run.

    Args:
      runs: name of the run → rows in chronological order, each with "step" and any of the metrics.
        A line skips rows without its metric; a non-finite value interrupts it.
      metrics: keys of the rows; metrics that no row has are omitted.
    """
    # One key per run, so that a run looks the same in all plots.
    keys = []
    for index, name in enumerate(runs):
        line = style.LINE_STYLES[index // len(style.PALETTE) % len(style.LINE_STYLES)]
        keys.append(style.Key(name, style.PALETTE[index % len(style.PALETTE)], line))
    curves = {}
    for metric in metrics:
        found = [(key, *_curve(rows, metric)) for key, rows in zip(keys, runs.values())]
        curves[metric] = [curve for curve in found if curve[1]]
    curves = {metric: lines for metric, lines in curves.items() if lines}
    if not curves:
        return tables.NOTHING
    # Two or three in a row, minus the gap of `.row` in page.css.
    width = style.PAGE_WIDTH // min(max(len(curves), 2), 3) - 12
    plots = "".join(_metric_plot(lines, metric, width) for metric, lines in curves.items())
    return f'{style.legend(keys)}<div class="row">\n{plots}</div>\n'


def confidence_histogram(
    probs: ArrayLike, kept: ArrayLike, *, threshold: float, images: ArrayLike | None = None
) -> str:
    """Plots a histogram of the top-1 probability with kept and rejected images stacked.

    Args:
      probs: top-1 probabilities, float [N].
      kept: mask of the images that were kept, [N].
      threshold: smallest probability to keep, in [0, 1]; marked by a line.
      images: weight of each entry, int [N]; None for 1.
    """
    probs = checks.probabilities(probs, "probs")
    kept = checks.mask(kept, "kept", len(probs))
    images = checks.weights(images, len(probs))
    if not 0 <= threshold <= 1:
        raise ValueError("threshold must be in [0, 1]")
    if not len(probs):
        return tables.NOTHING
    figure, axes = style.axes_of(640, 280)
    axes.hist(
        [probs[kept], probs[~kept]],
        bins=np.linspace(0, 1, HISTOGRAM_BINS + 1).tolist(),
        weights=[images[kept], images[~kept]],
        stacked=True,
        color=[style.KEPT, style.REJECTED],
    )
    axes.axvline(threshold, color=style.MARK, linestyle="dashed", linewidth=1.5)
    axes.set(xlim=(0, 1), xlabel="top-1 probability", ylabel="images")
    # Compares in the dtype of the probabilities, because float32(0.7) is below float64 0.7.
    confident = probs >= probs.dtype.type(threshold)
    caption = (
        f"{images.sum()} images: {images[kept].sum()} kept, {images[~kept].sum()} rejected "
        f"({images[confident & ~kept].sum()} of them at or above the threshold)."
    )
    keys = (
        style.Key("kept", style.KEPT),
        style.Key("rejected", style.REJECTED),
        style.Key(f"threshold {float(threshold):g}", style.MARK, "dashed"),
    )
    return style.plot(figure, "Top-1 probability", caption, keys)


def _balance_bars(
    axes: Axes, before: np.ndarray, unique: np.ndarray, copies: np.ndarray, names: Sequence[str]
) -> None:
    places = np.arange(len(names))
    axes.bar(places - 0.2, before, 0.38, color=style.BEFORE)
    axes.bar(places + 0.2, unique, 0.38, color=style.KEPT)
    axes.bar(places + 0.2, copies, 0.38, bottom=unique, color=style.COPIES)
    axes.set_xlim(-0.6, len(names) - 0.4)
    style.name_ticks(axes.xaxis, places, names, rotation=style.rotation(names))


def _balance_curves(axes: Axes, before: np.ndarray, unique: np.ndarray, copies: np.ndarray) -> None:
    ranks = np.arange(1, len(before) + 1)
    curves = {style.BEFORE: before, style.KEPT: unique, style.COPIES: unique + copies}
    for color, counts in curves.items():
        axes.plot(ranks, np.sort(counts)[::-1], color=color, linewidth=1.8)
    axes.set_xlabel("classes, largest first (each curve in its own order)")


def class_balance(
    before: ArrayLike, unique: ArrayLike, copies: ArrayLike, class_names: Sequence[str]
) -> str:
    """Plots images per class before and after selection: bars, or sorted curves above 60 classes.

    A collapsed table contains the numbers.

    Args:
      before: number of images predicted as the class, int [C].
      unique: number of distinct images kept, int [C].
      copies: number of copies added to `unique` to fill the class, int [C].
      class_names: C names.
    """
    names = [str(name) for name in class_names]
    before = checks.integers(before, "before", low=0, length=len(names))
    unique = checks.integers(unique, "unique", low=0, length=len(names))
    copies = checks.integers(copies, "copies", low=0, length=len(names))
    if not names:
        return tables.NOTHING
    as_bars = len(names) <= style.MAX_CLASSES_AS_BARS
    figure, axes = style.axes_of(style.PAGE_WIDTH if as_bars else 640, 300)
    if as_bars:
        _balance_bars(axes, before, unique, copies, names)
    else:
        _balance_curves(axes, before, unique, copies)
    axes.set_ylabel("images")
    axes.set_ylim(bottom=0)
    caption = (
        f"{before.sum()} images predicted over {len(names)} classes, "
        f"{unique.sum()} kept, {copies.sum()} copies added."
    )
    keys = (
        style.Key("predicted", style.BEFORE),
        style.Key("kept", style.KEPT),
        style.Key("extra copies" if as_bars else "kept with copies", style.COPIES),
    )
    rows = [
        {"class": name, "predicted": b, "kept": u, "copies": c, "total": u + c}
        for name, b, u, c in zip(names, before, unique, copies)
    ]
    plot = style.plot(figure, "Class balance", caption, keys)
    return plot + tables.details("Numbers by class", tables.table(rows))


def confidence_by_class(quantiles: ArrayLike, class_names: Sequence[str]) -> str:
    """Plots the spread of the top-1 probability per predicted class, lowest median first.

    Args:
      quantiles: 10th, 50th and 90th percentile of each class, float [C, 3]; classes with NaN, which
        were never predicted, are omitted.
      class_names: C names.
    """
    # Without classes, the array is one-dimensional.
    quantiles = np.asarray(quantiles, np.float64).reshape(-1, 3)
    names = [str(name) for name in class_names]
    if len(quantiles) != len(names):
        raise ValueError(f"quantiles has {len(quantiles)} rows; expected {len(names)}")
    predicted = np.flatnonzero(np.isfinite(quantiles).all(axis=1))
    if not len(predicted):
        return tables.NOTHING
    order = predicted[np.argsort(quantiles[predicted, 1], kind="stable")]
    low, median, high = quantiles[order].T
    ranks = np.arange(1, len(order) + 1)
    as_bars = len(order) <= style.MAX_CLASSES_AS_BARS
    figure, axes = style.axes_of(style.PAGE_WIDTH if as_bars else 640, 300)
    if as_bars:
        axes.vlines(ranks, low, high, color=style.COPIES, linewidth=6)
        axes.plot(ranks, median, "o", color=style.KEPT, markersize=5)
        shown = [names[i] for i in order]
        style.name_ticks(axes.xaxis, ranks, shown, rotation=style.rotation(shown))
    else:
        axes.fill_between(ranks, low, high, color=style.COPIES, alpha=0.6, linewidth=0)
        axes.plot(ranks, median, color=style.KEPT, linewidth=1.8)
        axes.set_xlabel("classes, least confident first")
    axes.set(ylim=(0, 1.03), ylabel="top-1 probability")
    caption = (
        f"{len(order)} of {len(names)} classes were predicted; the median confidence is lowest in "
        f"{names[order[0]]} ({median[0]:.2f}) and highest in {names[order[-1]]} ({median[-1]:.2f})."
    )
    keys = (style.Key("median", style.KEPT), style.Key("10th to 90th percentile", style.COPIES))
    return style.plot(figure, "Confidence by class", caption, keys)


def agreement_by_confidence(confidence: ArrayLike, same: ArrayLike, images: ArrayLike) -> str:
    """Plots how often two models predict the same label, by the confidence of one of them.

    Args:
      confidence: upper bounds of the bins, float [B] in (0, 1].
      same, images: numbers of images with equal labels and of all images in each bin, int [B].
    """
    confidence = checks.probabilities(confidence, "confidence")
    same = checks.integers(same, "same", low=0, length=len(confidence))
    images = checks.integers(images, "images", low=0, length=len(confidence))
    used = images > 0
    if not used.any():
        return tables.NOTHING
    width = 1 / len(confidence)
    figure, axes = style.axes_of(640, 280)
    axes.bar(confidence[used] - width / 2, same[used] / images[used], 0.9 * width, color=style.KEPT)
    axes.set(
        xlim=(0, 1), ylim=(0, 1.03), xlabel="top-1 probability", ylabel="share of equal labels"
    )
    caption = f"{same.sum()} of {images.sum()} labels are equal ({same.sum() / images.sum():.1%})."
    return style.plot(figure, "Agreement", caption)
