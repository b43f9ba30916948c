"""Building blocks of an HTML report that is a single file: no scripts, no server, no other files.

Every function but `write_page` turns data into a fragment of HTML and has no other effect; all text
is escaped, images are inlined as data URIs. Plots have a transparent background and mid-tone ink,
so that the same picture reads on a light and on a dark page.

"Top-1 probabilities" are float [N] in [0, 1], masks bool [N] (or 0/1), class indices int [N] in
0..C-1; all may be anything `numpy.asarray` takes. Empty data gives a short paragraph saying so; a
wrong shape or range raises a ValueError that names the argument.
"""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike

NOTHING = '<p class="nothing">Nothing to show.</p>'
OUT_OF_DISTRIBUTION = -1
CALIBRATION_BINS = 15
MAX_CLASSES_AS_BARS = 60
MAX_CLASSES_WITH_COUNTS = 20

_PAGE_WIDTH = 1040  # CSS pixels within the margins of the page.
_INK = "#7b8490"
_PALETTE = (
    "#3b82c4",
    "#e0812b",
    "#3f9e5a",
    "#d1495b",
    "#8d6cc4",
    "#2a9d9d",
    "#a0724a",
    "#d36ba6",
)
_LINE_STYLES = ("solid", "dashed", "dotted")  # Told apart in turn once the palette is used up.
_BEFORE, _KEPT, _REJECTED, _COPIES, _MARK = _INK, "#3b82c4", "#b3bac3", "#8fc1ea", "#d1495b"


class Section(NamedTuple):
    """A part of the page: `title` is plain text, `body` is HTML."""

    title: str
    body: str


# Checks of the input.


def _vector(values: ArrayLike, name: str, length: int | None = None) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"{name} must have one dimension, not shape {list(array.shape)}")
    if length is not None and len(array) != length:
        raise ValueError(f"{name} has {len(array)} entries where {length} are needed")
    return array


def _probabilities(values: ArrayLike, name: str, length: int | None = None) -> np.ndarray:
    array = _vector(values, name, length)
    if array.dtype.kind != "f":
        array = array.astype(np.float64)
    # Rounding may carry a softmax past 1 by a hair; NaN must fail, hence the form of the test.
    if not ((array >= 0) & (array <= 1.001)).all():
        raise ValueError(f"{name} must lie in [0, 1]")
    return np.minimum(array, 1)


def _mask(values: ArrayLike, name: str, length: int) -> np.ndarray:
    array = _vector(values, name, length)
    # A list of indices would otherwise pass for a mask when it happens to have the right length.
    if not np.isin(array, (0, 1)).all():
        raise ValueError(f"{name} must be a mask of booleans")
    return array.astype(bool)


def _integers(
    values: ArrayLike,
    name: str,
    *,
    low: int,
    high: int | None = None,
    length: int | None = None,
) -> np.ndarray:
    """int64 [N] of values in low..high."""
    array = _vector(values, name, length)
    if not (np.mod(array, 1) == 0).all():
        raise ValueError(f"{name} must be integers")
    array = array.astype(np.int64)
    if (array < low).any() or (high is not None and (array > high).any()):
        limit = f"at least {low}" if high is None else f"in {low}..{high}"
        raise ValueError(f"{name} must be {limit}")
    return array


# Text and tables.


def _escape(value: object) -> str:
    return html.escape(str(value), quote=True)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)


def _format(value: object) -> str:
    """Plain text of a cell: four significant digits of floats, a dash for None."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, float):
        return str(value)
    if 1e3 <= abs(value) < 1e7:
        return f"{value:.1f}"
    return f"{value:#.4g}".rstrip(".")


def _cell(value: object, *, numeric: bool) -> str:
    """A cell of a column that has numbers or not; the dash of a missing number stays with them."""
    right = _is_number(value) or (numeric and value is None)
    kind = ' class="number"' if right else ""
    return f"<td{kind}>{_escape(_format(value))}</td>"


def table(rows: Sequence[Mapping[str, object]], *, highlight_last: bool = False) -> str:
    """A table with one line per mapping.

    Args:
      rows: column name → value. Columns come in the order of the first row; those that only later
        rows have follow. Missing values and None show as a dash.
      highlight_last: whether the last row stands out.
    """
    columns = list(dict.fromkeys(column for row in rows for column in row))
    if not columns:
        return NOTHING
    numeric = {column: any(_is_number(row.get(column)) for row in rows) for column in columns}
    head = []
    for column in columns:
        kind = ' class="number"' if numeric[column] else ""
        head.append(f'<th scope="col"{kind}>{_escape(column)}</th>')
    body = []
    for index, row in enumerate(rows):
        highlight = highlight_last and index == len(rows) - 1
        cells = "".join(_cell(row.get(column), numeric=numeric[column]) for column in columns)
        body.append(f'<tr class="highlight">{cells}</tr>' if highlight else f"<tr>{cells}</tr>")
    return (
        f'<div class="scroll"><table>\n<thead><tr>{"".join(head)}</tr></thead>\n<tbody>\n'
        + "\n".join(body)
        + "\n</tbody>\n</table></div>\n"
    )


def _details(summary: str, body: str) -> str:
    return f"<details><summary>{_escape(summary)}</summary>\n{body}</details>\n"


# Plots.


class _Key(NamedTuple):
    """An entry of a legend; legends are HTML, so that names of any kind stay readable."""

    label: str
    color: str
    style: str = "solid"


def _legend(keys: Iterable[_Key]) -> str:
    entries = "".join(
        f'<span><i style="border-top: 3px {key.style} {key.color}"></i>{_escape(key.label)}</span>'
        for key in keys
    )
    return f'<p class="legend">{entries}</p>\n'


def _axes(width: int, height: int) -> tuple[Figure, Axes]:
    """An empty plot of `width` x `height` CSS pixels in the style of the page."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 100, height / 100), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_INK)
    axes.tick_params(colors=_INK, labelsize=8)
    axes.xaxis.label.set(color=_INK, fontsize=9)
    axes.yaxis.label.set(color=_INK, fontsize=9)
    axes.grid(axis="y", color=_INK, alpha=0.2, linewidth=0.7)
    axes.set_axisbelow(True)
    return figure, axes


def _image(figure: Figure, alt: str) -> str:
    """The figure as an inline PNG, at twice the resolution for dense screens."""
    buffer = io.BytesIO()
    # Without pyplot a PNG is always drawn by Agg, whatever backend the process has chosen.
    figure.savefig(buffer, format="png", dpi=200, transparent=True)
    width, height = (round(inches * 100) for inches in figure.get_size_inches())
    return (
        f'<img class="plot" src="{_data_uri(buffer.getvalue(), "image/png")}" alt="{_escape(alt)}"'
        f' width="{width}" height="{height}">'
    )


def _figure(image: str, caption: str) -> str:
    return f"<figure>{image}<figcaption>{_escape(caption)}</figcaption></figure>\n"


def _tick_labels(names: Sequence[str]) -> list[str]:
    return [name if len(name) <= 24 else name[:23] + "…" for name in names]


# Names are arbitrary text: a dollar sign in one must not start a formula.
_PLAIN = {"parse_math": False}


def _curve(rows: Sequence[Mapping[str, float]], metric: str) -> tuple[list[float], list[float]]:
    """Steps and values of the rows that have the metric."""
    found = [row for row in rows if row.get(metric) is not None]
    if any("step" not in row for row in found):
        raise ValueError('runs has a row without "step"')
    return [row["step"] for row in found], [row[metric] for row in found]


def _metric_plot(
    curves: Sequence[tuple[_Key, list[float], list[float]]], metric: str, width: int
) -> str:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    figure, axes = _axes(width, 250)
    for key, steps, values in curves:
        # A line needs two points; a run evaluated only once would be invisible.
        marker = "o" if len(steps) == 1 else None
        axes.plot(steps, values, color=key.color, linestyle=key.style, linewidth=1.6, marker=marker)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    last = (
        f"{key.label} {_format(values[-1])} at step {_format(steps[-1])}"
        for key, steps, values in curves
    )
    return _figure(_image(figure, f"{metric}: {'; '.join(last)}"), metric)


def learning_curves(
    runs: Mapping[str, Sequence[Mapping[str, float]]], *, metrics: Sequence[str]
) -> str:
    """A row of plots, one per metric, with a line per run.

    Args:
      runs: name of the run → rows in order of time, each with "step" and any of the metrics. A
        line passes over rows that lack its metric; a value that is not finite breaks it.
      metrics: keys of the rows; one that no row has is left out.
    """
    keys = []
    for index, name in enumerate(runs):
        style = _LINE_STYLES[index // len(_PALETTE) % len(_LINE_STYLES)]
        keys.append(_Key(name, _PALETTE[index % len(_PALETTE)], style))
    curves = {}
    for metric in metrics:
        found = [(key, *_curve(rows, metric)) for key, rows in zip(keys, runs.values())]
        curves[metric] = [curve for curve in found if curve[1]]
    curves = {metric: lines for metric, lines in curves.items() if lines}
    if not curves:
        return NOTHING
    width = _PAGE_WIDTH // min(max(len(curves), 2), 3) - 12
    plots = "".join(_metric_plot(lines, metric, width) for metric, lines in curves.items())
    return f'{_legend(keys)}<div class="row">\n{plots}</div>\n'


def confidence_histogram(probs: ArrayLike, kept: ArrayLike, *, threshold: float) -> str:
    """Histogram of the top-1 probability with kept and rejected images stacked.

    Args:
      probs: top-1 probabilities, float [N].
      kept: mask of the images that were kept, [N].
      threshold: smallest probability to keep, in [0, 1]; marked by a line.
    """
    probs = _probabilities(probs, "probs")
    kept = _mask(kept, "kept", len(probs))
    if not 0 <= threshold <= 1:
        raise ValueError("threshold must lie in [0, 1]")
    if not len(probs):
        return NOTHING
    figure, axes = _axes(640, 280)
    axes.hist(
        [probs[kept], probs[~kept]],
        bins=np.linspace(0, 1, 41),
        stacked=True,
        color=[_KEPT, _REJECTED],
    )
    axes.axvline(threshold, color=_MARK, linestyle="dashed", linewidth=1.5)
    axes.set(xlim=(0, 1), xlabel="top-1 probability", ylabel="images")
    # Compared in the type of the probabilities, as the selection did.
    confident = probs >= probs.dtype.type(threshold)
    caption = (
        f"{len(probs)} images: {kept.sum()} kept, {(~kept).sum()} rejected "
        f"({(confident & ~kept).sum()} of them at or above the threshold)."
    )
    legend = _legend(
        [
            _Key("kept", _KEPT),
            _Key("rejected", _REJECTED),
            _Key(f"threshold {float(threshold):g}", _MARK, "dashed"),
        ]
    )
    return legend + _figure(_image(figure, f"Top-1 probability. {caption}"), caption)


def _balance_bars(
    axes: Axes, before: np.ndarray, unique: np.ndarray, copies: np.ndarray, names: Sequence[str]
) -> None:
    places = np.arange(len(names))
    axes.bar(places - 0.2, before, 0.38, color=_BEFORE)
    axes.bar(places + 0.2, unique, 0.38, color=_KEPT)
    axes.bar(places + 0.2, copies, 0.38, bottom=unique, color=_COPIES)
    axes.set_xlim(-0.6, len(names) - 0.4)
    # About 7 pixels per letter: upright labels where they fit, vertical ones elsewhere.
    labels = _tick_labels(names)
    fits = len(names) * (max(map(len, labels)) + 2) * 7 < _PAGE_WIDTH
    axes.set_xticks(places, labels, rotation=0 if fits else 90, **_PLAIN)


def _balance_curves(axes: Axes, before: np.ndarray, unique: np.ndarray, copies: np.ndarray) -> None:
    ranks = np.arange(1, len(before) + 1)
    for counts, color in ((before, _BEFORE), (unique, _KEPT), (unique + copies, _COPIES)):
        axes.plot(ranks, np.sort(counts)[::-1], color=color, linewidth=1.8)
    axes.set_xlabel("classes, largest first (each curve in its own order)")


def class_balance(
    before: ArrayLike, unique: ArrayLike, copies: ArrayLike, class_names: Sequence[str]
) -> str:
    """Images per class before and after selection: bars, or sorted curves above 60 classes.

    The numbers follow in a table that opens on demand.

    Args:
      before: images predicted to be of the class, int [C].
      unique: different images kept, int [C].
      copies: repetitions added on top of `unique` to fill the class up, int [C].
      class_names: C names.
    """
    names = [str(name) for name in class_names]
    before = _integers(before, "before", low=0, length=len(names))
    unique = _integers(unique, "unique", low=0, length=len(names))
    copies = _integers(copies, "copies", low=0, length=len(names))
    if not names:
        return NOTHING
    as_bars = len(names) <= MAX_CLASSES_AS_BARS
    figure, axes = _axes(_PAGE_WIDTH if as_bars else 640, 300)
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
    last = "extra copies" if as_bars else "kept with copies"
    legend = _legend([_Key("predicted", _BEFORE), _Key("kept", _KEPT), _Key(last, _COPIES)])
    rows = [
        {"class": name, "predicted": b, "kept": u, "copies": c, "total": u + c}
        for name, b, u, c in zip(names, before, unique, copies)
    ]
    plot = _figure(_image(figure, f"Class balance. {caption}"), caption)
    return legend + plot + _details("Numbers by class", table(rows))


def confusion(truth: ArrayLike, predicted: ArrayLike, class_names: Sequence[str]) -> str:
    """Heat map of truth against prediction, with counts up to 20 classes, and the worst confusions.

    Args:
      truth: int [N] in 0..C-1, or -1 for images of no class (they get a row of their own).
      predicted: int [N] in 0..C-1.
      class_names: C names.
    """
    names = [str(name) for name in class_names]
    truth = _integers(truth, "truth", low=OUT_OF_DISTRIBUTION, high=len(names) - 1)
    predicted = _integers(predicted, "predicted", low=0, high=len(names) - 1, length=len(truth))
    if not len(truth):
        return NOTHING
    row_names = names + ["(no class)"] * bool((truth == OUT_OF_DISTRIBUTION).any())
    counts = np.zeros((len(names) + 1, len(names)), np.int64)
    np.add.at(counts, (truth, predicted), 1)  # Index -1 is the additional last row.
    counts = counts[: len(row_names)]
    correct, known = np.trace(counts), (truth != OUT_OF_DISTRIBUTION).sum()
    caption = f"{correct} of {known} images of known class are predicted right."
    image = _heat_map(counts, row_names, names, alt=f"Confusion matrix. {caption}")
    return (
        _figure(image, f"{caption} Colour: share of the row.")
        + "<h3>Most frequent confusions</h3>\n"
        + table(_worst_confusions(counts, names))
    )


def _heat_map(
    counts: np.ndarray, row_names: Sequence[str], column_names: Sequence[str], *, alt: str
) -> str:
    """Counts int [R, C] as an image, coloured by the share of their row."""
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size = int(np.clip(140 + 44 * len(column_names), 360, 760))
    figure, axes = _axes(size, size)
    axes.grid(False)
    shown = axes.imshow(share, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    axes.set(xlabel="predicted", ylabel="truth")
    if len(row_names) <= MAX_CLASSES_AS_BARS + 1:
        size = 8 if len(row_names) <= 30 else 6
        labels = _tick_labels(column_names)
        axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=size, **_PLAIN)
        labels = _tick_labels(row_names)
        axes.set_yticks(range(len(labels)), labels, fontsize=size, **_PLAIN)
    if len(column_names) > MAX_CLASSES_WITH_COUNTS:
        bar = figure.colorbar(shown, ax=axes, shrink=0.6)
        bar.ax.tick_params(colors=_INK, labelsize=8)
        bar.outline.set_visible(False)
        return _image(figure, alt)
    for (row, column), count in np.ndenumerate(counts):
        if count:
            color = "white" if share[row, column] > 0.5 else "#24303c"
            axes.text(column, row, count, ha="center", va="center", color=color, fontsize=8)
    return _image(figure, alt)


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


def _bin(correct: np.ndarray, probs: np.ndarray, bins: int) -> _Bins:
    upper = np.arange(1, bins) / bins
    index = np.searchsorted(upper, probs, side="left")
    return _Bins(
        np.bincount(index, minlength=bins),
        np.bincount(index, probs, bins),
        np.bincount(index, correct, bins),
    )


def calibration_error(correct: ArrayLike, probs: ArrayLike, bins: int = CALIBRATION_BINS) -> float:
    """Expected calibration error (Guo et al. 2017, arXiv 1706.04599, equation 3).

    Args:
      correct: mask of right predictions, [N].
      probs: top-1 probabilities, float [N].
      bins: number of intervals of equal width, at least 1.

    Returns:
      The gap between confidence and accuracy in a bin, averaged over images, in [0, 1]. NaN if N=0.
    """
    probs = _probabilities(probs, "probs")
    correct = _mask(correct, "correct", len(probs))
    if bins < 1:
        raise ValueError("bins must be at least 1")
    if not len(probs):
        return float("nan")
    sums = _bin(correct, probs, bins)
    return float(np.abs(sums.confidence - sums.correct).sum() / len(probs))


def _reliability(correct: np.ndarray, probs: np.ndarray) -> str:
    """Accuracy by confidence as a plot and as a table."""
    sums = _bin(correct, probs, CALIBRATION_BINS)
    used = np.flatnonzero(sums.images)
    confidence = sums.confidence[used] / sums.images[used]
    accuracy = sums.correct[used] / sums.images[used]
    figure, axes = _axes(420, 360)
    width = 1 / CALIBRATION_BINS
    axes.bar((used + 0.5) * width, accuracy, 0.9 * width, color=_KEPT, alpha=0.75)
    axes.plot(confidence, accuracy, "o", color=_PALETTE[1], markersize=4)
    axes.plot([0, 1], [0, 1], color=_INK, linestyle="dashed", linewidth=1)
    axes.set(xlim=(0, 1), ylim=(0, 1.03), xlabel="top-1 probability", ylabel="accuracy")
    error = _format(calibration_error(correct, probs))
    caption = f"Expected calibration error {error} ({CALIBRATION_BINS} bins, {len(probs)} images)."
    rows = [
        {
            "confidence": f"{index * width:.2f}–{(index + 1) * width:.2f}",
            "images": sums.images[index],
            "mean confidence": mean,
            "accuracy": share,
        }
        for index, mean, share in zip(used, confidence, accuracy)
    ]
    legend = _legend(
        [
            _Key("accuracy in the bin", _KEPT),
            _Key("at its mean confidence", _PALETTE[1], "dotted"),
            _Key("perfect calibration", _INK, "dashed"),
        ]
    )
    plot = _figure(_image(figure, f"Reliability. {caption}"), caption)
    return legend + plot + _details("Numbers by confidence", table(rows))


def accuracy_of_pseudo_labels(
    truth: ArrayLike, predicted: ArrayLike, probs: ArrayLike, kept: ArrayLike
) -> str:
    """How right the pseudo labels are, where the truth was only hidden from the teacher.

    Accuracy and calibration count images of known class only; no label is right for the others.

    Args:
      truth: hidden labels, int [N], -1 for images of no class (out of distribution).
      predicted: pseudo labels, int [N].
      probs: top-1 probabilities, float [N].
      kept: mask of the images that were kept, [N].
    """
    truth = _integers(truth, "truth", low=OUT_OF_DISTRIBUTION)
    predicted = _integers(predicted, "predicted", low=0, length=len(truth))
    probs = _probabilities(probs, "probs", len(truth))
    kept = _mask(kept, "kept", len(truth))
    if not len(truth):
        return NOTHING
    known = truth != OUT_OF_DISTRIBUTION
    right = truth == predicted
    rows = []
    for name, group in (("all", np.ones_like(kept)), ("kept", kept), ("rejected", ~kept)):
        inside = group & known
        rows.append(
            {
                "pseudo labels": name,
                "images": group.sum(),
                "of known class": inside.sum(),
                "correct": right[inside].sum(),
                "accuracy": right[inside].mean() if inside.any() else None,
                "out of distribution": (group & ~known).sum(),
            }
        )
    plot = _reliability(right[known], probs[known]) if known.any() else NOTHING
    return table(rows) + plot


# Images.


def _data_uri(data: bytes, mime: str) -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode('ascii')}"


def _mime(data: bytes) -> str | None:
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    return "image/jpeg" if data.startswith(b"\xff\xd8\xff") else None


def _is_smaller(data: bytes, size: int) -> bool:
    """Whether the image has fewer than `size` pixels each way; False if its header is damaged."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:  # Reads no more than the header.
            return max(image.size) < size
    except (OSError, ValueError, Image.DecompressionBombError):
        return False


def _grid_item(data: bytes, caption: str, size: int) -> str:
    mime = _mime(data)
    if mime is None:
        image = '<div class="placeholder" title="unknown image format">?</div>'
    else:
        # Enlarged pixels should look like pixels, but a photograph made smaller must stay smooth.
        pixelated = ' class="pixelated"' if _is_smaller(data, size) else ""
        uri = _data_uri(data, mime)
        image = f'<img{pixelated} src="{uri}" alt="" width="{size}" height="{size}">'
    return f"<figure>{image}<figcaption>{_escape(caption)}</figcaption></figure>\n"


def image_grid(
    items: Sequence[tuple[bytes, str]], *, columns: int = 12, pixel_size: int = 56
) -> str:
    """Images in rows, each above its caption.

    Args:
      items: encoded image (JPEG or PNG; anything else shows a placeholder) and caption, plain text.
      columns: images per row.
      pixel_size: side of the square each image is fitted into, CSS pixels.
    """
    if columns < 1:
        raise ValueError("columns must be at least 1")
    if pixel_size < 1:
        raise ValueError("pixel_size must be at least 1")
    if not len(items):
        return NOTHING
    figures = "".join(_grid_item(bytes(data), text, pixel_size) for data, text in items)
    # Columns give captions half as much room again where the page has it.
    tracks = f"repeat({columns}, minmax({pixel_size}px, {pixel_size * 3 // 2}px))"
    style = f"grid-template-columns: {tracks}; --size: {pixel_size}px"
    return f'<div class="scroll"><div class="grid" style="{style}">\n{figures}</div></div>\n'


# The page.

_CSS = """
:root { --text: #1d242b; --soft: #626b75; --page: #ffffff; --line: #dde2e7; --mark: #eaf3fb; }
@media (prefers-color-scheme: dark) {
  :root { --text: #dfe4e9; --soft: #98a2ad; --page: #15181c; --line: #30363d; --mark: #1b2c3d; }
}
* { box-sizing: border-box; }
body {
  max-width: 1100px; margin: 0 auto; padding: 32px 30px 64px;
  background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 12px; }
h2 {
  font-size: 19px; margin: 44px 0 14px; padding-top: 14px; border-top: 1px solid var(--line);
}
h3 { font-size: 15px; margin: 20px 0 8px; }
a { color: inherit; }
nav ol { margin: 16px 0; padding-left: 22px; color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: 8px 0 16px; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 14px 4px 0; text-align: left; vertical-align: top; }
th { color: var(--soft); font-weight: 600; font-size: 13px; vertical-align: bottom; }
td { border-top: 1px solid var(--line); }
th.number, td.number { text-align: right; padding-left: 14px; white-space: nowrap; }
tr.highlight td { background: var(--mark); font-weight: 600; }
figure { margin: 0 0 12px; }
figcaption, .nothing, .legend, summary { color: var(--soft); font-size: 13px; }
summary { cursor: pointer; }
.plot { display: block; max-width: 100%; height: auto; }
.row { display: flex; flex-wrap: wrap; gap: 12px; }
.row figure { display: flex; flex-direction: column-reverse; }
.row figcaption { font-weight: 600; overflow-wrap: anywhere; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 18px; margin: 8px 0; }
.legend i { display: inline-block; width: 22px; margin-right: 7px; vertical-align: middle; }
.grid { display: grid; gap: 10px 6px; margin: 8px 0 16px; }
.grid figure { margin: 0; min-width: 0; }
.grid img { display: block; object-fit: contain; object-position: left top; }
.grid figcaption { font-size: 11px; line-height: 1.3; margin-top: 3px; overflow-wrap: anywhere; }
.pixelated { image-rendering: pixelated; }
.placeholder {
  width: var(--size); height: var(--size); display: grid; place-content: center;
  border: 1px dashed var(--line); color: var(--soft);
}
"""

# The policy makes the browser itself see to it that the page loads nothing from elsewhere.
_HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
"""


def _contents(sections: Sequence[Section]) -> str:
    entries = "".join(
        f'<li><a href="#section-{number}">{_escape(section.title)}</a></li>\n'
        for number, section in enumerate(sections, 1)
    )
    return f'<nav aria-label="Contents"><ol>\n{entries}</ol></nav>\n'


def _page(title: str, intro: str, sections: Sequence[Section]) -> str:
    paragraphs = [text.strip() for text in intro.split("\n\n")]
    parts = [
        _HEAD,
        f"<title>{_escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n",
        f"<h1>{_escape(title)}</h1>\n",
        *(f"<p>{_escape(text)}</p>\n" for text in paragraphs if text),
    ]
    if len(sections) > 3:
        parts.append(_contents(sections))
    for number, section in enumerate(sections, 1):
        heading = f"<h2>{_escape(section.title)}</h2>"
        parts.append(
            f'<section id="section-{number}">\n{heading}\n{section.body or NOTHING}</section>\n'
        )
    if not sections:
        parts.append(NOTHING)
    parts.append("</body>\n</html>\n")
    return "".join(parts)


def write_page(
    path: str | os.PathLike[str], *, title: str, intro: str, sections: Sequence[Section]
) -> None:
    """Writes the page in one step: readers see the old file or the whole new one.

    Args:
      path: of the HTML file, in any file system TensorFlow knows; its folder is made if needed.
      title: plain text.
      intro: plain text; a blank line starts a new paragraph.
      sections: in order; more than three get a table of contents.
    """
    import tensorflow as tf

    path = os.fspath(path)
    page = _page(title, intro, sections)
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".tmp-{os.getpid()}-{name}")
    if folder:
        tf.io.gfile.makedirs(folder)
    try:
        with tf.io.gfile.GFile(temporary, "w") as file:
            file.write(page)
        tf.io.gfile.rename(temporary, path, overwrite=True)
    except BaseException:
        if tf.io.gfile.exists(temporary):
            tf.io.gfile.remove(temporary)
        raise
