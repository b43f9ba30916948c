"""Sizes declared by image files, compared with an independent reader, and false headers."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from PIL import Image

from efficientnet_ns.data import image_headers


def encode(kind: str, width: int, height: int, **kwargs) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, [height, width, 3], np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **kwargs)
    return buffer.getvalue()


@pytest.mark.parametrize("size", [(1, 1), (300, 7), (7, 300)])
@pytest.mark.parametrize(
    "kind, values",
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("JPEG", {"exif": b"Exif\x00\x00" + bytes(500), "comment": b"\xff\xc0" * 50}),
        ("PNG", {}),
        ("GIF", {}),
        ("BMP", {}),
    ],
)
def test_declared_size(kind, values, size):
    image = encode(kind, *size, **values)
    assert image_headers.declared_size(image) == Image.open(io.BytesIO(image)).size == size
    assert image_headers.problem(image) == ""


def test_size_that_is_refused():
    png = bytearray(encode("PNG", 4, 4))
    png[16:24] = struct.pack(">II", 20_000, 10_000)
    assert image_headers.problem(bytes(png)) == ""
    png[16:24] = struct.pack(">II", 20_000, 10_001)
    assert image_headers.problem(bytes(png)) == (
        "the image claims 20000 x 10001 pixels, more than 200 million"
    )


def test_jpeg_of_65535_pixels_a_side():
    jpeg = encode("JPEG", 5, 3)
    place = jpeg.index(b"\xff\xc0") + 5
    assert jpeg[place : place + 4] == struct.pack(">HH", 3, 5)
    huge = jpeg[:place] + b"\xff\xff\xff\xff" + jpeg[place + 4 :]
    assert image_headers.problem(huge).startswith("the image claims 65535 x 65535 pixels")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP"])
def test_cut_off_anywhere(kind):
    image = encode(kind, 5, 3)
    sizes = {image_headers.declared_size(image[:n]) for n in range(len(image))}
    assert sizes == {None, (5, 3)}


def test_what_is_no_image():
    rng = np.random.default_rng(0)
    for start in (b"", b"\xff\xd8", b"\x89PNG\r\n", b"GIF8", b"BM"):
        for _ in range(200):
            image_headers.problem(start + rng.bytes(rng.integers(0, 60)))
    assert image_headers.declared_size(b"some text that is long enough") is None
