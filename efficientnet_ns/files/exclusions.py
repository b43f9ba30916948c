"""Lists of records: CSV with the columns `file` and `record`, and others that depend on the list.

`--exclude` accepts any of them as records to leave out.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from efficientnet_ns.files import atomic, local_files
from efficientnet_ns.files.errors import DataError

COLUMNS = ("file", "record")


def place(path: str) -> str:
    """Returns a path in the form that is compared: absolute and normalized."""
    return path if "://" in path else os.path.abspath(path)


def write(path: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Writes a list of any length, row by row.

    Args:
      columns: names of the columns after `COLUMNS`.
      rows: path of a file, position of a record, and the values of `columns`.
    """
    atomic.remove_abandoned([path])
    with atomic.atomic_path(path) as temporary, tf.io.gfile.GFile(temporary, "w") as f:
        writer = csv.writer(f, lineterminator="\n")
        writer.writerow([*COLUMNS, *columns])
        writer.writerows([place(file), *values] for file, *values in rows)


def read(path: str) -> dict[str, np.ndarray]:
    """Reads a list: absolute path of a file → positions of its records, int64, ascending.

    Raises:
      DataError: If the list does not exist or lacks a column.
    """
    import pyarrow
    import pyarrow.csv

    if not tf.io.gfile.exists(path):
        raise DataError(f"--exclude={path}: the file does not exist")
    # The path of a file is stored once, not in each of its rows.
    types = {
        "file": pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
        "record": pyarrow.int64(),
    }
    # Without `null_values`, an empty cell is an error instead of a missing number.
    convert = pyarrow.csv.ConvertOptions(
        column_types=types, include_columns=list(COLUMNS), null_values=[]
    )
    try:
        with local_files.local_copies([path]) as local:
            table = pyarrow.csv.read_csv(local[path], convert_options=convert)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowKeyError) as e:
        raise DataError(
            f"--exclude={path} is not a list with the columns {' and '.join(COLUMNS)}: {e}"
        ) from e
    names = table["file"].combine_chunks()
    numbers = names.indices.to_numpy()
    # One sort groups the records by file.
    records = table["record"].to_numpy()[np.argsort(numbers, kind="stable")]
    ends = np.cumsum(np.bincount(numbers, minlength=len(names.dictionary)))
    found: dict[str, list[np.ndarray]] = {}
    for name, group in zip(names.dictionary, np.split(records, ends[:-1])):
        found.setdefault(place(name.as_py()), []).append(group)
    return {file: np.unique(np.concatenate(groups)) for file, groups in found.items()}


def of_files(path: str, files: list[str]) -> dict[int, np.ndarray]:
    """Returns index in `files` → positions to leave out, for the files that a list names.

    Raises:
      DataError: If `read` raises it or the list names none of the files.
    """
    listed = read(path)
    found = {i: listed[at] for i, at in enumerate(map(place, files)) if at in listed}
    if listed and not found:
        raise DataError(
            f"--exclude={path} names records of {min(listed)}, but none of the set with "
            f"{files[0]}: if the records were moved, run check_data again"
        )
    return found
