"""`metrics.jsonl` and TensorBoard scalars: the metrics of a training run or its evaluation.

On a local disk, each row is appended as it is logged. Object stores cannot append (TensorFlow's `a`
mode reads and writes the whole object for each line), so the whole file is written before each
checkpoint. A run that continues from the previous checkpoint logs the missing rows again.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Sequence

import tensorflow as tf

from efficientnet_ns.files import json_files, object_stores

METRICS = "metrics.jsonl"


def read_metrics(folder: str) -> list[dict[str, float]]:
    """Reads the rows of `metrics.jsonl` in `folder` by increasing step; empty without a file."""
    return json_files.read_json_lines(os.path.join(folder, METRICS), "step")


class MetricsLog:
    """Writes `metrics.jsonl` and TensorBoard scalars.

    Args:
      folder: folder for both.
      start: step from which the run continues. Rows of later steps, which an interrupted run left
        behind, are dropped.
      writes: False on all workers except the chief; they keep the rows only in memory.

    Attributes:
      rows: all rows so far, `step` and metrics by name.
      writer: TensorBoard writer.
    """

    def __init__(self, folder: str, start: int, writes: bool = True):
        self.path, self._writes, self._lines = os.path.join(folder, METRICS), writes, None
        self.rows = [row for row in read_metrics(folder) if row["step"] <= start]
        self._written = len(self.rows)
        self._drawing: threading.Thread | None = None
        if not writes:
            self.writer = tf.summary.create_noop_writer()
            return
        object_stores.make_folder(folder)
        json_files.write_json_lines(self.path, self.rows)
        if "://" not in folder:
            self._lines = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - until `close`
        self.writer = tf.summary.create_file_writer(folder)

    def add(self, step: int, values: dict[str, float]) -> None:
        """Appends one row and writes the same scalars for TensorBoard."""
        self.rows.append({"step": step, **values})
        if self._lines is not None:
            self._lines.write(json.dumps(self.rows[-1]) + "\n")
            self._lines.flush()
            self._draw(self.rows[-1:])

    def _draw(self, rows: Sequence[dict[str, float]]) -> None:
        """Writes rows for TensorBoard; an object store receives the whole file every time."""
        with self.writer.as_default():
            for row in rows:
                for name, value in row.items():
                    if name != "step":
                        tf.summary.scalar(name, value, int(row["step"]))

    def flush(self) -> None:
        """Ensures that every row is on the disk; call it before writing a checkpoint."""
        if self._lines is not None:
            # Otherwise, a power failure may leave the checkpoint without its row.
            os.fsync(self._lines.fileno())
        elif self._writes and self._written < len(self.rows):
            json_files.write_json_lines(self.path, self.rows)
            self._wait()
            # Training continues meanwhile.
            self._drawing = threading.Thread(target=self._draw, args=(self.rows[self._written :],))
            self._drawing.start()
            self._written = len(self.rows)

    def _wait(self) -> None:
        if self._drawing is not None:
            self._drawing.join()

    def last(self, prefix: str) -> dict[str, float]:
        """Returns the newest row with a metric whose name starts with `prefix`, or an empty row."""
        for row in reversed(self.rows):
            if any(key.startswith(prefix) for key in row):
                return row
        return {}

    def close(self) -> None:
        """Flushes and closes the files."""
        self.flush()
        self._wait()
        self.writer.close()
        if self._lines is not None:
            self._lines.close()
