"""The data that the input pipeline benchmark uses, and its output without peer libraries."""

from __future__ import annotations

import concurrent.futures
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


def test_all_contenders_get_the_same_images(rng):
    pixels = rng.integers(0, 256, (20, 30, 3), np.uint8)
    rgb = tf.io.encode_jpeg(pixels).numpy()
    others = [tf.io.encode_png(pixels).numpy(), tf.io.encode_jpeg(pixels[..., :1]).numpy(), b"none"]
    assert input_peers.common([others[0], rgb, *others[1:]]) == [rgb]


class _InThisProcess:
    """Replaces a pool of one process."""

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, work, *args):
        done = concurrent.futures.Future()
        try:
            done.set_result(work(*args))
        except Exception as e:
            done.set_exception(e)
        return done


def test_a_peer_that_fails_is_skipped(monkeypatch, caplog):
    def fails(image):
        if image == b"odd":
            raise TypeError("an unexpected image")

    libraries = {
        "good": ((), lambda size: {input_peers.EVAL: len}),
        "bad": ((), lambda size: {input_peers.TRAIN: fails}),
    }
    monkeypatch.setattr(input_peers, "_LIBRARIES", libraries)
    monkeypatch.setattr(input_peers, "_images", [])
    monkeypatch.setattr(input_peers, "_kinds", {})
    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", _InThisProcess)
    monkeypatch.setenv("NO_ALBUMENTATIONS_UPDATE", "0")
    with input_peers.installed([b"even", b"odd"], 8, 3) as peers:
        assert [work() for work in peers.values()] == [3]
    assert list(peers) == ["good: evaluation"]
    assert "bad is skipped: an unexpected image" in caplog.text


def test_ratios_are_of_the_same_kind():
    names = {"timm: train, uint8": [1.0], "OpenCV + simplejpeg: evaluation": [2.0]}
    measured = tables.Measured({inputs._TRAIN: [3.0], inputs._EVAL: [5.0], **names})
    rows = inputs._against_peers(measured, list(names))
    ratios = {row.peer: row.ratio for row in rows if row.ratio}
    assert ratios == {"timm: train, uint8": 3.0, "OpenCV + simplejpeg: evaluation": 2.5}
