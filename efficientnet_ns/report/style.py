"""The style of the plots: a transparent background and mid-tone colors.

The same plot is readable on light and dark pages. Legends and captions are HTML.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from efficientnet_ns.report import tables

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

MAX_CLASSES_AS_BARS = 60

PAGE_WIDTH = 1040  # In CSS pixels, within the margins of the page.
INK = "#7b8490"
PALETTE = (
    "#3b82c4",
    "#e0812b",
    "#3f9e5a",
    "#d1495b",
    "#8d6cc4",
    "#2a9d9d",
    "#a0724a",
    "#d36ba6",
)
LINE_STYLES = ("solid", "dashed", "dotted")  # Next one once the palette is exhausted.
BEFORE, KEPT, REJECTED, COPIES, MARK = INK, "#3b82c4", "#b3bac3", "#8fc1ea", "#d1495b"


class Key(NamedTuple):
    """An entry of a legend; legends are HTML so that arbitrary names are readable."""

    label: str
    color: str
    style: str = "solid"


def legend(keys: Iterable[Key]) -> str:
    """Returns HTML of a legend."""
    entries = "".join(
        f'<span><i style="border-top: 3px {key.style} {key.color}"></i>{tables.escape(key.label)}</span>'
        for key in keys
    )
    return f'<p class="legend">{entries}</p>\n'


def axes_of(width: int, height: int) -> tuple[Figure, Axes]:
    """Creates an empty plot of `width` x `height` CSS pixels in the style of the page."""
    from matplotlib.figure import Figure

    # Without pyplot, which keeps every figure in memory. An inch is 100 CSS pixels.
    figure = Figure(figsize=(width / 100, height / 100), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.tick_params(colors=INK, labelsize=8)
    axes.xaxis.label.set(color=INK, fontsize=9)
    axes.yaxis.label.set(color=INK, fontsize=9)
    axes.grid(axis="y", color=INK, alpha=0.2, linewidth=0.7)
    axes.set_axisbelow(True)
    return figure, axes


def image(figure: Figure, alt: str) -> str:
    """Returns the figure as an inline PNG with twice the resolution, for high-density screens."""
    buffer = io.BytesIO()
    # Without pyplot, Agg always draws PNGs, regardless of the process's backend.
    figure.savefig(buffer, format="png", dpi=200, transparent=True)
    width, height = (round(inches * 100) for inches in figure.get_size_inches())
    return (
        f'<img class="plot" src="{data_uri(buffer.getvalue(), "image/png")}" alt="{tables.escape(alt)}"'
        f' width="{width}" height="{height}">'
    )


def figure(image: str, caption: str) -> str:
    """Returns HTML of an image with a plain-text caption."""
    return f"<figure>{image}<figcaption>{tables.escape(caption)}</figcaption></figure>\n"


def plot(drawn: Figure, title: str, caption: str, keys: Iterable[Key] = ()) -> str:
    """Returns HTML of a plot with legend and caption; its alternative text is title and caption."""
    keys = tuple(keys)
    shown = figure(image(drawn, f"{title}. {caption}"), caption)
    return (legend(keys) if keys else "") + shown


# Names are arbitrary text, in which a dollar sign must not start a formula.
PLAIN_TEXT: dict[str, Any] = {"parse_math": False}


def _shortened(names: Sequence[str]) -> list[str]:
    return [name if len(name) <= 24 else name[:23] + "…" for name in names]


def name_ticks(axis: Axis, places: Iterable[int], names: Sequence[str], **text: Any) -> None:
    """Labels an axis with arbitrary names; shortens long ones."""
    axis.set_ticks(list(places), _shortened(names), **PLAIN_TEXT, **text)


def rotation(names: Sequence[str]) -> int:
    """Returns the rotation of labels on the x-axis: 0 degrees if they fit side by side, else 90."""
    # Approximately 7 pixels per letter.
    fits = len(names) * (max(map(len, _shortened(names))) + 2) * 7 < PAGE_WIDTH
    return 0 if fits else 90


def mime(data: bytes) -> str | None:
    """Returns the MIME type of a PNG or JPEG file; None for others."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    return "image/jpeg" if data.startswith(b"\xff\xd8\xff") else None


def data_uri(data: bytes, mime: str) -> str:
    """Returns a data URI with the bytes of a file."""
    return f"data:{mime};base64,{base64.b64encode(data).decode('ascii')}"
