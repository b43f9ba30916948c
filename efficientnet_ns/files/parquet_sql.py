"""SQL over Parquet files in any file system, in bounded memory."""

from __future__ import annotations

import contextlib
import re
import weakref
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from efficientnet_ns.files import atomic, local_files

if TYPE_CHECKING:
    import duckdb

MEMORY_BYTES = 2 * 10**9


def database(threads: int) -> duckdb.DuckDBPyConnection:
    """Opens an empty DuckDB database with up to 2 GB in memory and the rest in TMPDIR.

    Removes files that killed processes left there.
    """
    import duckdb

    db = duckdb.connect()
    db.execute("SET enable_progress_bar = false")
    db.execute(f"SET threads = {threads}")
    db.execute(f"SET memory_limit = '{MEMORY_BYTES}B'")
    # DuckDB creates the folder when needed and removes it at the end.
    db.execute(f"SET temp_directory = {_quoted(atomic.scratch_name('duckdb'))}")
    return db


def _quoted(text: str) -> str:
    """Returns an SQL string literal."""
    return "'" + text.replace("'", "''") + "'"


def connect(
    threads: int, *, numbered: Collection[str] = (), **tables: Sequence[str]
) -> duckdb.DuckDBPyConnection:
    """Opens a `database` with one view per keyword over the Parquet files given for it.

    Remote files are copied to TMPDIR for the lifetime of the connection.

    Args:
      numbered: names of views with the additional column `file`, the index of a row's file.
    """
    db = database(threads)
    copies = contextlib.ExitStack()
    weakref.finalize(db, copies.close)
    for name, paths in tables.items():
        found = copies.enter_context(local_files.local_copies(paths))
        # DuckDB does so, too, and names files accordingly.
        local = {path: re.sub("/+", "/", at) for path, at in found.items()}
        # DuckDB expands wildcards in paths, so `run[1]/x` would read `run1/x`.
        literal = (re.sub(r"[*?\[]", r"[\g<0>]", path) for path in local.values())
        files = ", ".join(map(_quoted, literal))
        rows = f"SELECT * FROM read_parquet([{files}])"
        if name in numbered:
            numbers = ", ".join(f"({_quoted(at)}, {n})" for n, at in enumerate(local.values()))
            db.execute(f"CREATE TABLE {name}_files (filename VARCHAR, file INT)")
            db.execute(f"INSERT INTO {name}_files VALUES {numbers}")
            rows = (
                f"SELECT * EXCLUDE (filename) FROM read_parquet([{files}], filename = true) "
                f"JOIN {name}_files USING (filename)"
            )
        db.execute(f"CREATE VIEW {name} AS {rows}")
    return db
