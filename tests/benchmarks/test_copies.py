"""The generated index has copies, and the search finds all of them and nothing else."""

from __future__ import annotations

import tempfile

import numpy as np
import pytest
import tensorflow as tf

from efficientnet_ns.benchmarks import copies, copy_kinds, selection
from efficientnet_ns.config import BenchmarkConfig, ConfigError
from efficientnet_ns.data import images


def test_planted_copies_are_found(tmp_path):
    sets, planted = copies.make_sets(str(tmp_path), 25_600)
    # One percent of each of 128 shards of 200 images, for each kind of copy.
    assert planted == 2 * 128 * 2
    assert copies.find(sets) == (planted, 0)


@pytest.mark.parametrize("what", [copies, selection])
def test_a_disk_that_is_too_small(what, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(ConfigError, match=f"=1000000000000 needs .* {tmp_path}.*: set TMPDIR"):
        what.run(BenchmarkConfig(rows=10**12))
    assert not list(tmp_path.iterdir())


def test_kinds_of_copies(rng):
    """Small pictures with few details have copies of every kind but crops elsewhere."""
    shapes = [rng.integers(0, 256, [9, 12, 3], np.uint8) for _ in range(6)]
    photos = [tf.image.resize(shape, [120, 160], "bicubic") for shape in shapes]
    encoded = [tf.io.encode_jpeg(images.to_uint8(photo), quality=95).numpy() for photo in photos]
    found = {row.name: row.value for row in copy_kinds.measure(encoded)}
    assert found["JPEG, quality 30: found as copies of training images"] == 100
    assert found["gray: found as copies of evaluation images"] == 100
    assert found["center crop of 90 %: found as copies of evaluation images"] == 100
    assert found["center crop of 90 %: found as copies of training images"] == 0
    assert found["taken for copies of other training images"] == 0
    assert found["taken for copies of other evaluation images"] == 0
    twin = tf.io.encode_jpeg(images.to_uint8(photos[0]), quality=90).numpy()
    found = {row.name: row.value for row in copy_kinds.measure([*encoded, twin])}
    for role in ("training", "evaluation"):
        assert found[f"taken for copies of other {role} images"] == pytest.approx(100 / 7)
