"""What a person decided about pseudo-labeled images: the JSON file that a review sheet saves.

`{"decisions": [{"file": path, "record": position, "label": class, or null: rejected}, …]}`
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from efficientnet_ns.files import exclusions, json_files
from efficientnet_ns.files.errors import DataError

REJECTED = -1


def read(path: str, num_classes: int) -> dict[str, dict[int, int]]:
    """Absolute path of a file → position of a record → its label, or REJECTED.

    Raises:
      DataError: there is no such file, or a decision is not of that form.
    """
    if not tf.io.gfile.exists(path):
        raise DataError(f"--reviewed={path}: there is no such file")
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
                f"--reviewed={path}, decision {number}: file, record and a label of "
                f"0..{num_classes - 1} or null are needed, not {one!r}"
            )
        found.setdefault(exclusions.place(file), {})[record] = REJECTED if label is None else label
    return found


def of_files(path: str, files: list[str], num_classes: int) -> dict[int, dict[int, int]]:
    """Number in `files` → the decisions about its records.

    Raises:
      DataError: see `read`; or no decision is about one of the files.
    """
    decided = read(path, num_classes)
    found = {i: decided[at] for i, at in enumerate(map(exclusions.place, files)) if at in decided}
    if decided and not found:
        raise DataError(
            f"--reviewed={path} is about no record of the set with {files[0]}, but about such of "
            f"{min(decided)}: was one of them moved?"
        )
    return found


def arrays(decisions: dict[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Positions int64, ascending, and labels int32."""
    positions = np.array(sorted(decisions), np.int64)
    return positions, np.array([decisions[p] for p in positions.tolist()], np.int32)
