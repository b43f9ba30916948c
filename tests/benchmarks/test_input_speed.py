"""What the benchmark of the input pipeline measures on, and what it says without timm."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import tensorflow as tf

from efficientnet_ns.benchmarks import inputs, tables
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
    assert stages["decode a random crop"]() == inputs._CHUNK  # Boxes of different shapes.


def test_without_data_images_are_made():
    made = inputs._made_images(count=2, height=40, width=50)
    assert [images.decode(image).shape for image in made] == [(40, 50, 3)] * 2
    assert made[0] != made[1]


def test_a_folder_with_neither_images_nor_records_is_named(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing to see")
    with pytest.raises(ConfigError, match=str(tmp_path)):
        inputs.encoded_images(str(tmp_path))


def test_without_timm_the_table_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.data", None)
    peers = inputs._timm([b""], 16)
    (row,) = inputs._against_peers(tables.Measured({}), peers)
    assert "timm is not installed" in row.name and math.isnan(row.value) and row.ratio is None
