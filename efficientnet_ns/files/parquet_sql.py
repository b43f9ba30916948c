"""SQL over Parquet files in any file system, in bounded memory."""

from __future__ import annotations

import contextlib
import re
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

from efficientnet_ns.files import atomic, local_files

if TYPE_CHECKING:
    import duckdb

_MEMORY = "2GB"


def database(threads: int) -> duckdb.DuckDBPyConnection:
    """An empty DuckDB database: up to 2 GB in memory, the rest on disk below TMPDIR.

    Files that killed processes left there are removed.
    """
    import duckdb

    db = duckdb.connect()
    db.execute("SET enable_progress_bar = false")
    db.execute(f"SET threads = {threads}")
    db.execute(f"SET memory_limit = '{_MEMORY}'")
    # DuckDB creates the folder when it needs it, and removes it at the end.
    db.execute(f"SET temp_directory = {_quoted(atomic.scratch_name('duckdb'))}")
    return db


def _quoted(text: str) -> str:
    """A string literal of SQL."""
    return "'" + text.replace("'", "''") + "'"


def connect(threads: int, **tables: Sequence[str]) -> duckdb.DuckDBPyConnection:
    """A `database` with a view per keyword, over the Parquet files given for it.

    Remote files are copied below TMPDIR for the lifetime of the connection.
    """
    db = database(threads)
    copies = contextlib.ExitStack()
    weakref.finalize(db, copies.close)
    for name, paths in tables.items():
        local = copies.enter_context(local_files.local_copies(paths))
        # DuckDB expands wildcards in paths, so that `run[1]/x` would read `run1/x`.
        literal = (re.sub(r"[*?\[]", r"[\g<0>]", path) for path in local.values())
        files = ", ".join(map(_quoted, literal))
        db.execute(f"CREATE VIEW {name} AS SELECT * FROM read_parquet([{files}])")
    return db
