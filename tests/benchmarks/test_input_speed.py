"""The data that the input pipeline benchmark uses, and its output without peer libraries."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tensorflow as tf

from efficientnet_ns.benchmarks import input_peers, inputs, tables
from efficientnet_ns.config import ConfigError
from efficientnet_ns.data import images
from efficientnet_ns.files import tfexamples, tfrecords


def test_images_come_out_of_records_and_are_read_in_batches(tmp_path, rng):
    encoded = [
        tf.io.encode_jpeg(rng.integers(0, 256, (20, 30 + i, 3), np.uint8)).numpy() for i in range(3)
    ]
    shard = str(tmp_path / "train-00000-of-00001")
    tfrecords.write(shard, [tfexamples.unlabeled_example(image) for image in encoded])
    assert inputs.encoded_images(str(tmp_path)) == ([shard], encoded)
    (work,) = inputs._read_stage([shard]).values()
    assert work() == inputs._CHUNK
    stages = inputs._stages(encoded, 16)
    assert stages["decode a random crop"]() == inputs._CHUNK  # The boxes differ in shape.


def test_without_data_images_are_made():
    made = inputs._made_images(count=2, height=40, width=50)
    assert [images.decode(image).shape for image in made] == [(40, 50, 3)] * 2
    assert made[0] != made[1]


def test_a_folder_with_neither_images_nor_records_is_named(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing to see")
    with pytest.raises(ConfigError, match=str(tmp_path)):
        inputs.encoded_images(str(tmp_path))


def test_without_peers_the_table_names_what_to_install(monkeypatch):
    missing = {"a library": (("no_such_module",), lambda size: {})}
    monkeypatch.setattr(input_peers, "_LIBRARIES", missing)
    with pytest.raises(ImportError, match="no_such_module"):
        input_peers._made("a library", 16)
    (row,) = inputs._against_peers(tables.Measured({}), [])
    assert "requirements-peers.txt" in row.name and math.isnan(row.value) and row.ratio is None


@pytest.mark.slow
def test_peers_turn_photographs_into_pixels(rng, caplog):
    """Installed peers decode photographs; the log names the missing ones."""
    encoded = tf.io.encode_jpeg(rng.integers(0, 256, (60, 80, 3), np.uint8)).numpy()
    with input_peers.installed([encoded], 32, 3) as peers:
        for library in input_peers._LIBRARIES:
            works = [peers[name] for name in peers if name.startswith(library)]
            assert works or f"{library} is skipped: No module named" in caplog.text
            assert [work() for work in works] == [3] * len(works)


def test_ratios_are_of_the_same_kind():
    names = {"timm: train, uint8": [1.0], "OpenCV + simplejpeg: evaluation": [2.0]}
    measured = tables.Measured({inputs._TRAIN: [3.0], inputs._EVAL: [5.0], **names})
    rows = inputs._against_peers(measured, list(names))
    ratios = {row.peer: row.ratio for row in rows if row.ratio}
    assert ratios == {"timm: train, uint8": 3.0, "OpenCV + simplejpeg: evaluation": 2.5}
