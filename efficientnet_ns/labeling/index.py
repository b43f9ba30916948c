"""The columnar index of predictions: all that statistics and selection need, without probabilities.

One Parquet file per prediction file, with the columns `shard` int32, `worker` int32, `position`
int64 (in the prediction file), `label` int32 (-1: unreadable), `prob` float32 (top-1 probability).
"""

from __future__ import annotations

import io

import numpy as np
import tensorflow as tf

from efficientnet_ns.data import manifests, records

UNREADABLE_LABEL = -1

# Rows per group of the file, whatever the pieces they come in: equal rows make equal files.
_GROUP = 1 << 16


class _Sink(io.RawIOBase):
    """A file of any file system, as Parquet wants to see it."""

    def __init__(self, path: str):
        super().__init__()
        self._file, self._size = tf.io.gfile.GFile(path, "wb"), 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._size

    def write(self, content) -> int:
        data = bytes(content)
        self._file.write(data)
        self._size += len(data)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


class IndexWriter:
    """Writes the index of one prediction file, piece by piece, in bounded memory.

    Args:
      path: of the index.
      shard, worker: of the prediction file.
    """

    def __init__(self, path: str, shard: int, worker: int):
        import pyarrow
        import pyarrow.parquet

        self._pyarrow = pyarrow
        self._shard, self._worker, self._rows = shard, worker, 0
        self._labels, self._probs = np.zeros(0, np.int32), np.zeros(0, np.float32)
        kinds = {"shard": "int32", "worker": "int32", "position": "int64", "label": "int32"}
        fields = [(name, getattr(pyarrow, kind)()) for name, kind in kinds.items()]
        schema = pyarrow.schema([*fields, ("prob", pyarrow.float32())])
        self._file = _Sink(path)
        self._writer = pyarrow.parquet.ParquetWriter(self._file, schema)

    def add(self, labels: np.ndarray, top_probs: np.ndarray) -> None:
        """Appends rows: labels int32 [N], top-1 probabilities float32 [N]."""
        self._labels = np.concatenate([self._labels, np.asarray(labels, np.int32)])
        self._probs = np.concatenate([self._probs, np.asarray(top_probs, np.float32)])
        while len(self._labels) >= _GROUP:
            self._write(_GROUP)

    def _write(self, n: int) -> None:
        columns = {
            "shard": np.full(n, self._shard, np.int32),
            "worker": np.full(n, self._worker, np.int32),
            "position": np.arange(self._rows, self._rows + n, dtype=np.int64),
            "label": self._labels[:n],
            "prob": self._probs[:n],
        }
        self._writer.write_table(self._pyarrow.table(columns))
        self._labels, self._probs = self._labels[n:], self._probs[n:]
        self._rows += n

    def close(self) -> None:
        if len(self._labels):
            self._write(len(self._labels))
        self._writer.close()
        self._file.close()

    def __enter__(self) -> IndexWriter:
        return self

    def __exit__(self, *unused) -> None:
        self.close()


def write_index(
    path: str, shard: int, worker: int, labels: np.ndarray, top_probs: np.ndarray
) -> None:
    """Writes the index of one prediction file at once; see `IndexWriter.add`."""
    with IndexWriter(path, shard, worker) as writer:
        writer.add(labels, top_probs)


def index_from_predictions(prediction_path: str, index_path: str, shard: int, worker: int) -> None:
    """Builds the index of a prediction file without one, such as the original code's.

    Raises:
      records.DataError: a prediction cannot be read.
    """
    with (
        manifests.atomic_path(index_path) as temporary,
        IndexWriter(temporary, shard, worker) as writer,
    ):
        labels, top_probs = [], []
        for record in records.read(prediction_path):
            if record.payload is None:
                raise records.DataError(
                    f"{prediction_path}, record {record.position}: {record.problem}; "
                    "predict it again"
                )
            probs = records.probabilities(record.payload)
            top = float(probs.max(initial=0.0))
            labels.append(int(probs.argmax()) if top > 0 else UNREADABLE_LABEL)
            top_probs.append(top)
            if len(labels) == _GROUP:
                writer.add(np.array(labels), np.array(top_probs))
                labels, top_probs = [], []
        writer.add(np.array(labels, np.int32), np.array(top_probs, np.float32))
