"""Reads human decisions about pseudo-labeled images from the JSON file that a review sheet saves.

`{"decisions": [{"file": path, "record": position, "label": class, or null if rejected}, …]}`
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from efficientnet_ns.files import exclusions, json_files
from efficientnet_ns.files.errors import DataError

REJECTED = -1


def read(path: str, num_classes: int) -> dict[str, dict[int, int]]:
    """Reads decisions: absolute path of a file → position of a record → its label, or REJECTED.

    Raises:
      DataError: If the file does not exist or a decision has another form.
    """
    if not tf.io.gfile.exists(path):
        raise DataError(f"--reviewed={path}: the file does not exist")
    decisions = json_files.read_object(path, "decisions")["decisions"]
    found: dict[str, dict[int, int]] = {}
    for number, one in enumerate(decisions):
        try:
            file, record, label = one["file"], one["record"], one["label"]
            good = isinstance(record, int) and (label is None or 0 <= label < num_classes)
        except (TypeError, KeyError):
            good = False
        if not good:
            raise DataError(
                f"--reviewed={path}, decision {number}: expected file, record and a label of "
                f"0..{num_classes - 1} or null, not {one!r}"
            )
        found.setdefault(exclusions.place(file), {})[record] = REJECTED if label is None else label
    return found


def of_files(path: str, files: list[str], num_classes: int) -> dict[int, dict[int, int]]:
    """Returns index in `files` → the decisions about its records.

    Raises:
      DataError: If `read` raises it or no decision is about one of the files.
    """
    decided = read(path, num_classes)
    found = {i: decided[at] for i, at in enumerate(map(exclusions.place, files)) if at in decided}
    if decided and not found:
        raise DataError(
            f"--reviewed={path} has no decisions about the set with {files[0]}, but about records of "
            f"{min(decided)}: was one of them moved?"
        )
    return found


def arrays(decisions: dict[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Converts decisions to positions, int64, ascending, and labels, int32."""
    positions = np.array(sorted(decisions), np.int64)
    return positions, np.array([decisions[p] for p in positions.tolist()], np.int32)
