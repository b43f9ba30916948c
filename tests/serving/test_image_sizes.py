"""Image sizes read from file headers."""

from __future__ import annotations

import io
import struct

import pytest
import tensorflow as tf
from PIL import Image
from served_models import (
    jpeg,
    lying_files,
    noise,
)

from efficientnet_ns.serving import image_sizes


@pytest.mark.parametrize("height, width", [(1, 1), (3, 500), (70, 41)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP"])
def test_pixels_are_counted_from_the_header(kind, height, width):
    file = io.BytesIO()
    Image.fromarray(noise(height, width)).save(file, kind)
    assert image_sizes.num_pixels(tf.constant(file.getvalue())) == height * width


def test_pixels_that_files_claim():
    huge = bytearray(jpeg())
    start = huge.index(b"\xff\xc0") + 5  # After the marker, length and bits per sample.
    huge[start : start + 4] = struct.pack(">HH", 65_500, 65_500)
    files = {**lying_files(), "huge.jpg": bytes(huge)}
    sizes = {"bomb.png": 30_000**2, "huge.jpg": 65_500**2, "huge.bmp": 20_000**2}
    sizes.update({"huge.gif": 65_000**2, "empty": 0, "text": 0})
    for name, pixels in sizes.items():
        assert image_sizes.num_pixels(tf.constant(files[name])) == pixels, name
    with pytest.raises(tf.errors.InvalidArgumentError):
        image_sizes.num_pixels(tf.constant(b"\xff\xd8\xff\xc0 and no more"))
    small = files["data missing.bmp"]
    assert image_sizes.refuse_large(tf.constant(small), 8100) == small
    with pytest.raises(tf.errors.InvalidArgumentError, match="larger than 8099 pixels"):
        image_sizes.refuse_large(tf.constant(small), 8099)
