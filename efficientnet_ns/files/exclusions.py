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
from absl import logging

from efficientnet_ns.files import atomic, local_files
from efficientnet_ns.files.errors import DataError

COLUMNS = ("file", "record")
SET = "set"  # Column of lists that name records of several sets, with one of these values:
_KINDS = ("evaluation", "labeled", "unlabeled")


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


def _read(path: str, kind: str) -> tuple[dict[str, np.ndarray], bool]:
    """Reads absolute path of a file → positions of its records, int64, ascending.

    Returns:
      The records, and whether the list has a column `set`; if so, only those of `kind` are returned.

    Raises:
      DataError: If the list does not exist, lacks a column, or a record is not a number.
    """
    import pyarrow
    import pyarrow.compute
    import pyarrow.csv

    if not tf.io.gfile.exists(path):
        raise DataError(f"--exclude={path}: the file does not exist")
    # The path of a file is stored once, not in each of its rows.
    text = pyarrow.dictionary(pyarrow.int32(), pyarrow.string())
    types = {"file": text, "record": pyarrow.int64(), SET: text}
    try:
        with local_files.local_copies([path]) as local:
            with tf.io.gfile.GFile(local[path]) as f:
                has_sets = SET in next(csv.reader([f.readline().removeprefix("\ufeff")]), [])
            convert = pyarrow.csv.ConvertOptions(
                column_types=types,
                include_columns=[*COLUMNS, SET] if has_sets else COLUMNS,
                null_values=[],  # An empty cell is an error, not a missing number.
            )
            table = pyarrow.csv.read_csv(local[path], convert_options=convert)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowKeyError) as e:
        raise DataError(
            f"--exclude={path} is not a list with the columns {' and '.join(COLUMNS)}: {e}"
        ) from e
    if has_sets:
        _check_kinds(path, table[SET].unique().to_pylist())
        table = table.filter(pyarrow.compute.equal(table[SET], kind))
    names, numbers = table["file"].combine_chunks(), table["record"].to_numpy()
    if numbers.min(initial=0) < 0:
        raise DataError(f"--exclude={path} has the record {numbers.min()}; records count from 0")
    return _by_file(names.dictionary.to_pylist(), names.indices.to_numpy(), numbers), has_sets


def _check_kinds(path: str, found: list[str]) -> None:
    if wrong := set(found) - set(_KINDS):
        raise DataError(
            f"--exclude={path} has {min(wrong)!r} in the column {SET!r}; it must be one of "
            f"{', '.join(_KINDS)}"
        )


def _by_file(names: list[str], index: np.ndarray, records: np.ndarray) -> dict[str, np.ndarray]:
    # One sort groups the records by file.
    groups = np.split(
        records[np.argsort(index, kind="stable")],
        np.cumsum(np.bincount(index, minlength=len(names)))[:-1],
    )
    found: dict[str, list[np.ndarray]] = {}
    for name, group in zip(names, groups):
        if len(group):
            found.setdefault(place(name), []).append(group)
    return {file: np.unique(np.concatenate(parts)) for file, parts in found.items()}


def of_files(
    path: str, files: Sequence[str], kind: str, *, required: bool = True
) -> dict[int, np.ndarray]:
    """Returns index in `files` → positions to leave out, for the files that a list names.

    Args:
      kind: set of these files, "labeled" or "unlabeled". In lists with a column `set`, such as those
        of check_data, only its rows count.
      required: whether a list without this column must name one of the files.

    Raises:
      DataError: If the list cannot be read, or names records of this kind in other files only.
    """
    listed, has_sets = _read(path, kind)
    found = {i: listed[at] for i, at in enumerate(map(place, files)) if at in listed}
    if listed and not found and (required or has_sets):
        raise DataError(
            f"--exclude={path} names records of {min(listed)}, but none of the set with "
            f"{files[0]}: if the records were moved, run the command that wrote the list again"
        )
    if listed and not found:
        logging.warning("--exclude=%s names no record of the set with %s", path, files[0])
    return found
