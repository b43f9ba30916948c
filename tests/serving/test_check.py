"""Images for comparing an export with its model."""

from __future__ import annotations

import zipfile

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from served_models import (
    jpeg,
    noise,
)

from efficientnet_ns.files import tfexamples, tfrecords
from efficientnet_ns.files.errors import DataError
from efficientnet_ns.serving import check


def test_difference():
    one = np.array([[0.6, 0.4], [0.2, 0.8]])
    found = check.difference(one, np.array([[0.45, 0.55], [0.2, 0.8]]))
    assert found.images == 2 and found.agreement == 0.5 and found.largest == pytest.approx(0.15)


def test_check_data(tmp_path, caplog):
    with pytest.raises(DataError, match="there is nothing in"):
        check.encoded_images(str(tmp_path), 3)
    examples = [tfexamples.unlabeled_example(jpeg(i)) for i in range(4)]
    tfrecords.write_sharded(str(tmp_path), "train", examples, 2)
    (tmp_path / "train-00000-of-00002.manifest.json").write_text("{}")
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "x.png").write_bytes(b"of something else")
    assert check.encoded_images(str(tmp_path), 3) == [jpeg(0), jpeg(2), jpeg(1)]
    (tmp_path / "a.jpg").write_bytes(jpeg())
    assert check.encoded_images(str(tmp_path), 3) == [jpeg()]
    (tmp_path / "0.png").write_bytes(b"no picture")
    assert check.encoded_images(str(tmp_path), 1) == [jpeg()]
    assert f"skipping {tmp_path / '0.png'}" in caplog.text
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(DataError, match="neither images that can be decoded nor"):
        check.encoded_images(str(tmp_path), 3)
    with pytest.raises(DataError, match="does not exist"):
        check.encoded_images(str(tmp_path / "nowhere"), 3)


def test_check_data_of_class_folders_takes_from_each(tmp_path):
    images = {"ant": [jpeg(1), jpeg(2), jpeg(3)], "bee": [jpeg(4)], "cat": [jpeg(5), jpeg(6)]}
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for name, of_class in images.items():
            (tmp_path / "all" / name).mkdir(parents=True)
            for i, image in enumerate(of_class):
                (tmp_path / "all" / name / f"{i}.JPG").write_bytes(image)
                archive.writestr(f"all/{name}/{i}.JPG", image)
    (tmp_path / "all" / "notes.txt").write_text("not an image")
    for path in (tmp_path / "all", tmp_path / "all.zip"):
        found = check.encoded_images(str(path), 5)
        assert found == [jpeg(1), jpeg(4), jpeg(5), jpeg(2), jpeg(6)]
        assert len(check.encoded_images(str(path), 100)) == 6


def test_check_data_takes_what_records_take(tmp_path):
    """Accepts formats that are converted when records are made."""
    Image.fromarray(noise()).save(tmp_path / "a.webp", lossless=True)
    (found,) = check.encoded_images(str(tmp_path), 9)
    np.testing.assert_array_equal(tf.io.decode_png(found), noise())


def test_records_without_images_are_named(tmp_path):
    tfrecords.write(
        str(tmp_path / "train-00000-of-00001"),
        tfexamples.prediction_examples(np.array([[0.5, 0.5]], np.float32)),
    )
    with pytest.raises(DataError, match="train-00000-of-00001, record 0: .*image/encoded"):
        check.encoded_images(str(tmp_path), 3)
