"""Reads rows of numbers in files of other programs: Parquet, NumPy, CSV and JSON Lines, by block.

A table has one row per image. Its numbers are in a single column of lists, or in one column per class,
named by the header. NumPy files contain an array [N, K]; `.npz` files may also contain keys.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import tensorflow as tf

from efficientnet_ns.files import local_files
from efficientnet_ns.files.errors import DataError
from efficientnet_ns.files.paths import listed

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

_ROWS = 1 << 16  # Maximum rows of a block.
_BLOCK_BYTES = 64 << 20  # Of its numbers, in 64 bits.
_CSV_BYTES = 16 << 20


def block_rows(columns: int) -> int:
    """Returns how many rows of `columns` numbers to process at once, to bound memory."""
    return max(1, min(_ROWS, _BLOCK_BYTES // (8 * max(columns, 1))))


class Block(NamedTuple):
    """Consecutive rows of a file.

    Attributes:
      file: path.
      first: number of the first row in the file, from 0.
      keys: pyarrow strings [N]; None without a key column.
      values: [N, K], in the file's number type.
    """

    file: str
    first: int
    keys: pyarrow.Array | None
    values: np.ndarray

    def row(self, place: int) -> str:
        """Returns the file and number of a row, for messages."""
        return f"{self.file}, row {self.first + place}"


class Table:
    """The rows of a file, or of all supported files in a folder, ordered by name.

    Args:
      source: path of the file or folder.
      key: name of the key column; "" for none.

    Attributes:
      names: column names of a table with one column per class; otherwise None.

    Raises:
      DataError: If there is no such file, its type is unsupported, or it has no such column.
    """

    def __init__(self, source: str, key: str = ""):
        self.source, self._key = source, key
        self.paths = _files(source)
        self._readers: list[_Reader] = []
        for path in self.paths:
            read = _READERS[os.path.splitext(path)[1].lower()]
            with self._errors(path):
                self._readers.append(read(path, key))
        self.names = self._readers[0].names
        for one, path in zip(self._readers, self.paths):
            if one.names != self.names:
                raise DataError(f"{path} does not have the same columns as {self.paths[0]}")

    @contextlib.contextmanager
    def _errors(self, path: str) -> Iterator[None]:
        """Converts errors of the libraries, which do not name the file, to DataError."""
        import pyarrow

        try:
            yield
        except (
            *(pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError),
            # Raised by NumPy for empty or truncated files.
            *(ValueError, EOFError, zipfile.BadZipFile),
        ) as e:
            # Also a ValueError, but raised by this module: it names the file.
            if isinstance(e, DataError):
                raise
            # NumPy's message suggests a setting that would run code in the file.
            objects = "an array of Python objects; save keys with .astype(str)"
            reason = objects if "allow_pickle" in str(e) else e
            raise DataError(f"{path} cannot be read: {reason}{_hint(self._key)}") from e

    def rows(self) -> int | None:
        """Returns the number of rows if reading headers is sufficient; otherwise None."""
        counts = [reader.rows for reader in self._readers]
        return sum(n for n in counts if n is not None) if None not in counts else None

    def blocks(self) -> Iterator[Block]:
        """Yields the rows in order; raises DataError if a file is not a table of numbers."""
        for path, reader in zip(self.paths, self._readers):
            first = 0
            with self._errors(path):
                for keys, values in reader.blocks():
                    yield Block(path, first, keys, values)
                    first += len(values)


def _files(source: str) -> list[str]:
    kinds = ", ".join(_READERS)
    if tf.io.gfile.isdir(source):
        found = listed(source, r"[^.].*(" + "|".join(k.replace(".", r"\.") for k in _READERS) + ")")
        if not found:
            raise DataError(f"{source} contains no {kinds} file")
        return sorted(found)
    if not tf.io.gfile.exists(source):
        raise DataError(f"{source}: no such file or folder")
    if os.path.splitext(source)[1].lower() not in _READERS:
        raise DataError(f"{source}: must be a file of one of these types: {kinds}")
    return [source]


@contextlib.contextmanager
def _local(path: str) -> Iterator[str]:
    with local_files.local_copies([path]) as copies:
        yield copies[path]


class _Reader:
    """Reads one file; subclasses define `rows`, `names` and `blocks`."""

    rows: int | None = None
    names: list[str] | None = None

    def __init__(self, path: str, key: str):
        self._path, self._key = path, key
        self._open()

    def _open(self) -> None:
        """Reads the header."""

    def blocks(self) -> Iterator[tuple[pyarrow.Array | None, np.ndarray]]:
        """Yields (keys or None, values [N, K])."""
        raise NotImplementedError


class _Arrow(_Reader):
    """Files that Arrow reads as batches of named columns."""

    def _columns(self, schema: pyarrow.Schema) -> None:
        """Finds the columns of the values in a schema."""
        names = list(schema.names)
        if self._key and self._key not in names:
            raise DataError(
                f"{self._path} has no column {self._key!r} (--key_column); it has {quoted(names)}"
            )
        others = [name for name in names if name != self._key]
        # A single column of lists must be the values; other columns are then ignored.
        lists = [n for n in others if _is_list(schema.field(n).type)]
        if len(lists) == 1:
            self._values, self.names = lists, None
            return
        texts = [n for n in others if not _is_numeric(schema.field(n).type)]
        if texts or not others:
            raise DataError(
                f"{self._path}: expected one column of lists of numbers, or one column of numbers per "
                f"class; {quoted(texts or names)} {'are' if len(texts) > 1 else 'is'} neither. Remove "
                "other columns, or name the key column with --key_column"
                f"{_hint(self._key)}"
            )
        self._values = self.names = others

    def _split(
        self, batches: Iterable[pyarrow.RecordBatch]
    ) -> Iterator[tuple[pyarrow.Array | None, np.ndarray]]:
        first = 0
        for batch in batches:
            keys = batch.column(self._key).cast("string") if self._key else None
            if self.names is None:
                yield keys, self._lists(batch.column(self._values[0]), first)
            else:
                columns = [batch.column(name).to_numpy(zero_copy_only=False) for name in self.names]
                yield keys, np.stack(columns, 1)
            first += len(batch)

    def _lists(self, column: pyarrow.Array, first: int) -> np.ndarray:
        """Returns the numbers of lists of equal lengths; `first` is the row of the first one."""
        if column.null_count:
            null = int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
            raise DataError(f"{self._path}, row {first + null} has no list of numbers")
        lengths = column.value_lengths().to_numpy(zero_copy_only=False)
        if len(other := np.flatnonzero(lengths != lengths[:1])):
            raise DataError(
                f"{self._path}: lists of {lengths[0]} and, in row {first + other[0]}, of "
                f"{lengths[other[0]]} numbers in one column"
            )
        # Not `column.values`, which ignores that a batch may be a slice of a longer array.
        values = column.flatten().to_numpy(zero_copy_only=False)
        return values.reshape(len(column), -1)


def _is_list(kind: pyarrow.DataType) -> bool:
    """Checks for lists of numbers."""
    import pyarrow.types as kinds

    lists = (kinds.is_list, kinds.is_large_list, kinds.is_fixed_size_list)
    return any(check(kind) for check in lists) and _is_numeric(kind.value_type)


def _is_numeric(kind: pyarrow.DataType) -> bool:
    import pyarrow.types as kinds

    return kinds.is_floating(kind) or kinds.is_integer(kind)


def _hint(key: str) -> str:
    """Returns the end of a message about a table that is read without keys."""
    return "" if key else ". If it has keys, add --key=name or --key=hash"


def quoted(names: Sequence[str]) -> str:
    """Returns the first names and how many more there are, for messages."""
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(map(repr, names[:8])) + more


class _Parquet(_Arrow):
    def _open(self) -> None:
        import pyarrow.parquet

        with _local(self._path) as path:
            metadata = pyarrow.parquet.read_metadata(path)
        self.rows = metadata.num_rows
        self._columns(metadata.schema.to_arrow_schema())

    def blocks(self):
        """See `_Reader`."""
        import pyarrow.parquet

        columns = [*self._values, *([self._key] if self._key else [])]
        with _local(self._path) as path, pyarrow.parquet.ParquetFile(path) as file:
            rows = block_rows(_width(file.metadata))
            yield from self._split(file.iter_batches(rows, columns=columns))


def _width(metadata: pyarrow.parquet.FileMetaData) -> int:
    """Returns the numbers per row, including those of lists, in the first row group."""
    if not metadata.num_row_groups:
        return 0
    group = metadata.row_group(0)
    numbers = sum(group.column(i).num_values for i in range(group.num_columns))
    return numbers // max(group.num_rows, 1)


class _Csv(_Arrow):
    def _open(self) -> None:
        import pyarrow

        with tf.io.gfile.GFile(self._path) as f:
            header = next(csv.reader([f.readline().removeprefix("\ufeff")]), [])
        # pandas names columns 0, 1, 2, …; in a row of data, only 0 and 1 could be probabilities.
        numbered = len(header) > 2 and set(header) == {str(i) for i in range(len(header))}
        if not header or (all(_is_number(name) for name in header) and not numbered):
            raise DataError(f"{self._path}: the first line must name the columns, not {header[:4]}")
        if "" in header:
            raise DataError(
                f"{self._path}: a column has no name, like the index that pandas writes: remove it "
                "(`to_csv(…, index=False)`)"
            )
        if len(set(header)) < len(header):
            raise DataError(f"{self._path}: two columns have the same name")
        # Explicit, because Arrow would infer integers from a column of only "0" and "1".
        self._types = {n: pyarrow.string() if n == self._key else pyarrow.float64() for n in header}
        self._columns(pyarrow.schema(list(self._types.items())))

    def blocks(self):
        """See `_Reader`."""
        import pyarrow.csv

        convert = pyarrow.csv.ConvertOptions(column_types=self._types)
        read = pyarrow.csv.ReadOptions(block_size=_CSV_BYTES)
        with (
            _local(self._path) as path,
            pyarrow.csv.open_csv(path, read_options=read, convert_options=convert) as batches,
        ):
            yield from self._split(batches)


class _Jsonl(_Arrow):
    def _open(self) -> None:
        import pyarrow

        with tf.io.gfile.GFile(self._path) as f:
            line = f.readline()
        if not line.strip():
            raise DataError(f"{self._path}: the first line is empty; each line must be an object")
        first: Any = json.loads(line)
        if not isinstance(first, dict):
            raise DataError(f"{self._path}: each line must be an object, not {line.strip()[:40]}")
        # Even for integers: after a first block of only integers, Arrow would expect no other numbers.
        number = pyarrow.float64()
        types = {
            name: pyarrow.list_(number)
            if isinstance(value, list)
            else (number if isinstance(value, (int, float)) else pyarrow.string())
            for name, value in first.items()
        }
        if isinstance(first.get(self._key), (int, float)):
            raise DataError(f"{self._path}: the keys in {self._key!r} must be strings")
        self._schema = pyarrow.schema(list(types.items()))
        self._columns(self._schema)

    def blocks(self):
        """See `_Reader`."""
        import pyarrow.json

        parse = pyarrow.json.ParseOptions(
            explicit_schema=self._schema, unexpected_field_behavior="error"
        )
        # Blocks must contain whole lines.
        read = pyarrow.json.ReadOptions(block_size=_CSV_BYTES)
        with (
            _local(self._path) as path,
            pyarrow.json.open_json(path, read_options=read, parse_options=parse) as batches,
        ):
            yield from self._split(batches)


class _Numpy(_Reader):
    """`.npy`: an array [N, K]. `.npz`: the two-dimensional array and, by name, an array of keys."""

    def _open(self) -> None:
        with self._arrays() as (keys, values):
            if values.ndim != 2:
                raise DataError(
                    f"{self._path}: expected an array [images, classes], not {values.shape}"
                )
            if values.dtype.kind not in "fiu":
                raise DataError(
                    f"{self._path}: expected an array of numbers, not of {values.dtype}"
                )
            if keys is not None and keys.shape != (len(values),):
                raise DataError(f"{self._path}: {keys.shape} keys for {len(values)} rows")
            self.rows = len(values)

    @contextlib.contextmanager
    def _arrays(self) -> Iterator[tuple[np.ndarray | None, np.ndarray]]:
        with _local(self._path) as path:
            if path.lower().endswith(".npy"):
                if self._key:
                    raise DataError(
                        f"{self._path} has no keys: save them with the array in a .npz file, as "
                        f"{self._key!r}"
                    )
                yield None, np.load(path, mmap_mode="r")
                return
            # Only `.npy` files can be mapped; arrays of a `.npz` file are loaded as a whole.
            with np.load(path) as stored:
                if self._key and self._key not in stored:
                    raise DataError(
                        f"{self._path} has no array {self._key!r} (--key_column); it has "
                        f"{quoted(stored.files)}"
                    )
                others = [name for name in stored.files if name != self._key]
                if len(others) != 1:
                    raise DataError(
                        f"{self._path}: expected one array of numbers, found {quoted(others)}"
                        f"{_hint(self._key)}"
                    )
                yield (stored[self._key] if self._key else None), stored[others[0]]

    def blocks(self):
        """See `_Reader`."""
        import pyarrow

        with self._arrays() as (keys, values):
            rows = block_rows(values.shape[1])
            for start in range(0, len(values), rows):
                part = slice(start, start + rows)
                # astype: keys may be bytes or numbers.
                named = None if keys is None else pyarrow.array(keys[part].astype(str))
                yield named, np.asarray(values[part])


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


_READERS: dict[str, type[_Reader]] = {
    ".parquet": _Parquet,
    ".npy": _Numpy,
    ".npz": _Numpy,
    ".csv": _Csv,
    ".jsonl": _Jsonl,
}
