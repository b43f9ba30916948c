"""A sheet to confirm, correct or reject labels: a single file that requires no server."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from efficientnet_ns.report import style, tables


class ReviewImage(NamedTuple):
    """An image to review.

    Attributes:
      data: encoded image, JPEG or PNG.
      file, record: its place, which identifies the image in the decision.
      label: its pseudo label, 0-based.
      prob: probability of `label`, in [0, 1].
      name: name of its file; "" if unknown.
    """

    data: bytes
    file: str
    record: int
    label: int
    prob: float
    name: str = ""


def write_review(
    path: str,
    images: Sequence[ReviewImage],
    names: Sequence[str],
    title: str = "Review of pseudo labels",
) -> None:
    """Writes the sheet, whose button saves `review.json`; see `files.reviews`.

    The browser keeps decisions, so that a sheet that was closed continues with them.

    Args:
      path: path of the HTML file; its folder must exist.
      images: the images, in the order shown.
      names: a name per class.
      title: plain text.
    """
    rows = [
        {name: getattr(one, name) for name in ("file", "record", "label", "prob", "name")}
        for one in images
    ]
    # The browser keeps the decisions of each sheet under its key, until the sheet has other images.
    key = hashlib.sha256(json.dumps([title, list(names), rows]).encode()).hexdigest()[:16]
    for row, one in zip(rows, images):
        row["source"] = style.data_uri(one.data, style.mime(one.data) or "image/jpeg")
    # A name must not close the script element.
    data = json.dumps({"key": f"efficientnet_ns-{key}", "names": list(names), "images": rows})
    data = data.replace("<", "\\u003c")
    template = Path(__file__).with_name("review.html").read_text(encoding="utf-8")
    from efficientnet_ns.files import atomic  # Loads TensorFlow.

    # The data is inserted last, because a name in it may contain TITLE.
    page = template.replace("TITLE", tables.escape(title)).replace("DATA", data, 1)
    atomic.write(path, page, clean=True)
