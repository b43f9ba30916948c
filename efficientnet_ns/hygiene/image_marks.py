"""Hashes and fingerprints of the images in record files, if no labeling run stored them.

One Parquet file per record file, with a row per image and crop: `record` int64, `crop` int32 (0:
the image itself), and `fingerprints.COLUMNS`. Images that cannot be read have no row.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import tensorflow as tf

from efficientnet_ns.config.cpus import available_cpus
from efficientnet_ns.data import fingerprints, image_headers, images
from efficientnet_ns.files import local_files, manifests, tfexamples, tfrecords
from efficientnet_ns.files.progress import Progress
from efficientnet_ns.pseudo_labels.index import schema

COLUMNS = {"record": np.int64, "crop": np.int32, **dict.fromkeys(fingerprints.COLUMNS, np.uint64)}
_AT_ONCE = 256  # Images.


def write_marks(sources: Sequence[str], folder: str, *, crops: bool) -> list[str]:
    """Writes the marks of each file to `folder`; finished ones are verified and skipped.

    Args:
      sources: record files, with distinct names.
      crops: whether to also mark `fingerprints.crops` of each image.

    Returns:
      The paths of the Parquet files, in the order of `sources`.

    Raises:
      manifests.OutputConflict: If marks in `folder` are of other records or settings.
    """
    made = []
    look = _Look(crops)
    with Progress(len(sources), f"looking at the images of {folder}", "files") as progress:
        for source in sources:
            path = os.path.join(folder, f"{os.path.basename(source)}.parquet")
            # Compared by names and sizes, so that the images are not read again.
            settings = {"input": manifests.fingerprint([source]), "crops": crops}
            stage = manifests.Stage(f"{path}.manifest.json", [path], settings)
            if not stage.done():
                _write(source, stage, look)
            made.append(path)
            progress.update(1)
    return made


def _write(source: str, stage: manifests.Stage, look: _Look) -> None:
    import pyarrow
    import pyarrow.parquet

    # Closed in reverse order: the file is complete, including its footer, before the stage records
    # its size and renames it.
    with (
        stage.write() as (temporary, counts),
        local_files.FileSink(temporary[stage.outputs[0]]) as sink,
        pyarrow.parquet.ParquetWriter(sink, schema(COLUMNS)) as writer,
        ThreadPoolExecutor(available_cpus()) as pool,
    ):
        records, total = _images(source), 0
        while some := list(itertools.islice(records, _AT_ONCE)):
            # `map` keeps the order of the records, so equal records produce equal files.
            found = [rows for rows in pool.map(look, some) if rows is not None]
            if found:
                columns = map(np.concatenate, zip(*found))
                writer.write_table(pyarrow.table(dict(zip(COLUMNS, columns))))
            total += len(found)
        counts.update(images=total)


def _images(source: str) -> Iterator[tuple[int, bytes]]:
    """Yields (position, encoded image) of the records that contain an image."""
    for record in tfrecords.read(source):
        image = tfexamples.image_if_any(record.payload)
        # An image that claims too many pixels must not reach a decoder, which would allocate them.
        if image and not image_headers.problem(image):
            yield record.position, image


class _Look:
    """Maps (record, image) to the columns of its rows; None if it cannot be decoded."""

    def __init__(self, crops: bool):
        @tf.function(input_signature=[tf.TensorSpec([], tf.string)])
        def grids(encoded: tf.Tensor) -> tf.Tensor:
            pixels = images.decode(encoded)
            return fingerprints.crops(pixels) if crops else fingerprints.grid(pixels)[tf.newaxis]

        # Traced now, because many threads call it concurrently.
        self._grids = grids.get_concrete_function()

    def __call__(self, record: tuple[int, bytes]) -> list[np.ndarray] | None:
        position, image = record
        try:
            found = self._grids(tf.constant(image)).numpy()
        except tf.errors.OpError:
            return None
        count = len(found)
        marks = fingerprints.marks([image], found)
        return [np.full(count, position), np.arange(count, dtype=np.int32), *marks.T]
