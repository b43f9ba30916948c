"""What a training leaves to look at: `metrics.jsonl`, TensorBoard scalars, and `runs.jsonl`.

Lines are appended on a local disk. An object store knows no appending (TensorFlow's `a` mode reads
and writes the whole object for each line), so there the file is written whole when a checkpoint is
due: what was logged since is logged again by the run that continues from the checkpoint before.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import socket
import sys
from typing import Any

import tensorflow as tf

from efficientnet_ns.files import atomic, json_files

METRICS, RUNS = "metrics.jsonl", "runs.jsonl"


def _write_lines(path: str, rows: list[dict[str, Any]]) -> None:
    with atomic.atomic_path(path) as temporary, tf.io.gfile.GFile(temporary, "w") as f:
        f.write("".join(json.dumps(row) + "\n" for row in rows))


def read_metrics(folder: str) -> list[dict[str, float]]:
    """Rows of the `metrics.jsonl` of a model_dir, in the order of training."""
    return json_files.read_json_lines(os.path.join(folder, METRICS))


def note_start(folder: str, start: int, flags: dict[str, Any]) -> None:
    """Adds this start, with every flag, to `runs.jsonl`: who changed what, and when."""
    row = {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "step": start,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "command": sys.argv,
        "python": platform.python_version(),
        "tensorflow": tf.__version__,
        "flags": flags,
    }
    path = os.path.join(folder, RUNS)
    _write_lines(path, [*json_files.read_json_lines(path), row])


class MetricsLog:
    """`metrics.jsonl` and TensorBoard scalars in model_dir.

    Args:
      folder: model_dir.
      start: step the run continues from; later rows of an interrupted run are dropped.
      writes: False on all workers but the chief: they keep the rows in memory.
    """

    def __init__(self, folder: str, start: int, writes: bool = True):
        self.path, self._writes, self._lines = os.path.join(folder, METRICS), writes, None
        self.rows = [row for row in read_metrics(folder) if row["step"] <= start]
        self._written = len(self.rows)
        if not writes:
            self.writer = tf.summary.create_noop_writer()
            return
        tf.io.gfile.makedirs(folder)
        _write_lines(self.path, self.rows)
        if "://" not in folder:
            self._lines = open(self.path, "a", encoding="utf-8")
        self.writer = tf.summary.create_file_writer(folder)

    def add(self, step: int, values: dict[str, float]) -> None:
        """Appends one row and the same scalars for TensorBoard."""
        self.rows.append({"step": step, **values})
        if self._lines is not None:
            self._lines.write(json.dumps(self.rows[-1]) + "\n")
            self._lines.flush()
        with self.writer.as_default(step):
            for name, value in values.items():
                tf.summary.scalar(name, value)
        self.writer.flush()

    def flush(self) -> None:
        """Makes sure that every row is in the file; to be called before a checkpoint is written."""
        if self._writes and self._lines is None and self._written < len(self.rows):
            _write_lines(self.path, self.rows)
            self._written = len(self.rows)

    def last(self, prefix: str) -> dict[str, float]:
        """The newest row with a metric that starts with `prefix`; empty when there is none."""
        for row in reversed(self.rows):
            if any(key.startswith(prefix) for key in row):
                return row
        return {}

    def close(self) -> None:
        self.flush()
        self.writer.close()
        if self._lines is not None:
            self._lines.close()
