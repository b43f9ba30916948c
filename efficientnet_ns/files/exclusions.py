"""Lists of records: CSV with the columns `file` and `record`, and others that depend on the list.

`--exclude` accepts any of them as records to leave out.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from efficientnet_ns.files import atomic
from efficientnet_ns.files.errors import DataError

COLUMNS = ("file", "record")


def place(path: str) -> str:
    """Returns a path in the form that is compared: absolute and normalized."""
    return path if "://" in path else os.path.abspath(path)


def write(path: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Writes a list.

    Args:
      columns: names of the columns after `COLUMNS`.
      rows: path of a file, position of a record, and the values of `columns`.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*COLUMNS, *columns])
    writer.writerows([place(file), *values] for file, *values in rows)
    atomic.write(path, text.getvalue(), clean=True)


def read(path: str) -> dict[str, np.ndarray]:
    """Reads a list: absolute path of a file → positions of its records, int64, ascending.

    Raises:
      DataError: If the list does not exist or lacks a column.
    """
    import pyarrow
    import pyarrow.csv

    if not tf.io.gfile.exists(path):
        raise DataError(f"--exclude={path}: the file does not exist")
    with tf.io.gfile.GFile(path, "rb") as f:
        source = pyarrow.BufferReader(f.read())
    types = {"file": pyarrow.string(), "record": pyarrow.int64()}
    convert = pyarrow.csv.ConvertOptions(column_types=types, include_columns=list(COLUMNS))
    try:
        table = pyarrow.csv.read_csv(source, convert_options=convert)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowKeyError) as e:
        raise DataError(
            f"--exclude={path} is not a list with the columns {' and '.join(COLUMNS)}: {e}"
        ) from e
    files, records = table["file"].combine_chunks().dictionary_encode(), table["record"].to_numpy()
    numbers = files.indices.to_numpy()
    return {
        place(name.as_py()): np.unique(records[numbers == number])
        for number, name in enumerate(files.dictionary)
    }


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
