"""Reads human decisions about pseudo-labeled images from the JSON files that review sheets save.

`{"decisions": [{"file": path, "record": position, "label": class, or null if rejected}, …]}`
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from efficientnet_ns.files import exclusions, json_files
from efficientnet_ns.files.errors import DataError

REJECTED = -1


def paths(joined: str) -> list[str]:
    """Returns the files of `--reviewed`, which are joined with `;`."""
    return [path for path in joined.split(";") if path]


def read(path: str, num_classes: int) -> dict[str, dict[int, int]]:
    """Reads decisions: absolute path of a file → position of a record → its label, or REJECTED.

    Raises:
      DataError: If the file does not exist or a decision has another form.
    """
    if not tf.io.gfile.exists(path):
        raise DataError(f"--reviewed={path}: the file does not exist")
    decisions = json_files.read_object(path, "decisions")["decisions"]
    if not isinstance(decisions, list):
        kind = type(decisions).__name__
        raise DataError(f"--reviewed={path}: expected a list of decisions, not {kind}")
    found: dict[str, dict[int, int]] = {}
    for number, one in enumerate(decisions):
        if not _is_decision(one, num_classes):
            raise DataError(
                f"--reviewed={path}, decision {number}: expected a file, a record from 0 and a label "
                f"of 0..{num_classes - 1} or null, not {one!r}"
            )
        label = REJECTED if one["label"] is None else one["label"]
        found.setdefault(exclusions.place(one["file"]), {})[one["record"]] = label
    return found


def _is_decision(one: Any, num_classes: int) -> bool:
    def is_below(value: Any, limit: int) -> bool:
        # Not `isinstance`, which accepts true and false.
        return type(value) is int and 0 <= value < limit

    if not (isinstance(one, dict) and {"file", "record", "label"} <= set(one)):
        return False
    label = one["label"]
    return (
        isinstance(one["file"], str)
        and is_below(one["record"], 2**63)
        and (label is None or is_below(label, num_classes))
    )


def of_files(
    joined: str, files: list[str], num_classes: int
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Returns index in `files` → positions of reviewed records, int64, and their labels, int32.

    Args:
      joined: files with decisions, joined with `;`; later ones take precedence.

    Raises:
      DataError: If `read` raises it or a file has only decisions about other records.
    """
    found: dict[int, dict[int, int]] = {}
    for path in paths(joined):
        decided = read(path, num_classes)
        own = {i: decided[at] for i, at in enumerate(map(exclusions.place, files)) if at in decided}
        if decided and not own:
            raise DataError(
                f"--reviewed={path} has no decisions about the set with {files[0]}, but about "
                f"records of {min(decided)}: was one of them moved?"
            )
        for i, labels in own.items():
            found.setdefault(i, {}).update(labels)
    return {
        i: (np.array(list(labels), np.int64), np.array(list(labels.values()), np.int32))
        for i, labels in found.items()
    }
