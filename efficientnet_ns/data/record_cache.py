"""Encoded records kept in memory after their first reading, for files that are far away.

What a dataset yields does not depend on it: each record is asked for by its place in the files.
"""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

# Of the free memory, that one set of files may take: there are two, a model and decoded images.
_SHARE = 0.25


def fits(paths: Sequence[str]) -> bool:
    """Whether the files together take less than a quarter of the memory that is free now."""
    free = _free_bytes()
    return free is not None and sum(tf.io.gfile.stat(p).length for p in paths) < _SHARE * free


def _free_bytes() -> int | None:
    """Memory that this process may still take; None where the system does not say."""
    try:
        with open("/proc/meminfo") as f:
            fields = dict(line.split(":") for line in f)
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return None
    try:
        # Containers are ended at a limit of their own.
        with open("/sys/fs/cgroup/memory.max") as limit, open("/sys/fs/cgroup/memory.current") as f:
            return min(free, int(limit.read()) - int(f.read()))
    except (OSError, ValueError):
        return free


class RecordCache:
    """Reads files the first time, and answers from memory after that."""

    def __init__(self):
        self._table = tf.lookup.experimental.MutableHashTable(tf.int64, tf.string, "")

    def read(self, path: tf.Tensor, count: tf.Tensor, first: tf.Tensor) -> tf.data.Dataset:
        """The first `count` records of a file, read and kept.

        Args:
          first: number of records in the files before this one.
        """
        return tf.data.TFRecordDataset(path).take(count).enumerate(first).map(self._keep)

    def _keep(self, index: tf.Tensor, record: tf.Tensor) -> tf.Tensor:
        with tf.control_dependencies([self._table.insert(index, record)]):
            return tf.identity(record)

    def recall(self, path: tf.Tensor, count: tf.Tensor, first: tf.Tensor) -> tf.data.Dataset:
        """The same records, after `read` has yielded all of them."""
        del path
        return tf.data.Dataset.range(first, first + count).map(self._table.lookup)
