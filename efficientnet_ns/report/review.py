"""A sheet on which a person confirms, corrects or rejects labels: one file, without a server."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from efficientnet_ns.report import style


class ReviewImage(NamedTuple):
    """An image to decide about.

    Attributes:
      data: JPEG or PNG.
      file, record: its place, which the decision names.
      label: its class, 0-based.
      prob: of the class.
    """

    data: bytes
    file: str
    record: int
    label: int
    prob: float


def write_review(path: str, images: Sequence[ReviewImage], names: Sequence[str]) -> None:
    """Writes the sheet, whose button saves `review.json`, see `files.reviews`.

    Args:
      names: of the classes.
    """
    rows = [
        {
            "source": style.data_uri(one.data, style.mime(one.data) or "image/jpeg"),
            **{name: getattr(one, name) for name in ("file", "record", "label", "prob")},
        }
        for one in images
    ]
    # Nothing in a name may end the script.
    data = json.dumps({"names": list(names), "images": rows}).replace("<", "\\u003c")
    template = Path(__file__).with_name("review.html").read_text(encoding="utf-8")
    from efficientnet_ns.files import atomic  # Loads TensorFlow.

    atomic.write(path, template.replace("DATA", data, 1), clean=True)
