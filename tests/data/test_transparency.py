"""Transparent pixels: which PNGs have them, and their colors on white."""

from __future__ import annotations

import io
import struct
import zlib

import image_files
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from efficientnet_ns.data import image_conversion, images, transparency
from efficientnet_ns.report import pictures

PNGS = [name for name in image_files.FILES if name.startswith("PNG")]


def test_every_color_and_alpha_on_white():
    values = np.arange(256, dtype=np.uint8)
    color, alpha = np.meshgrid(values, values, indexing="ij")
    pixels = np.stack([color, 255 - color, color, alpha], axis=-1)
    np.testing.assert_array_equal(transparency.on_white(pixels), image_files.on_white(pixels))
    opaque, clear = transparency.on_white(pixels).numpy()[:, [255, 0]].swapaxes(0, 1)
    np.testing.assert_array_equal(opaque, pixels[:, 255, :3])
    assert (clear == 255).all()


def test_which_pngs_are_transparent():
    found = {n for n in PNGS if transparency.is_transparent_png(image_files.FILES[n]())}
    assert found == {n for n in PNGS if "alpha" in n or "RGBA" in n or "tRNS" in n}
    assert 0 < len(found) < len(PNGS)
    others = [n for n in image_files.FILES if n not in PNGS]
    assert not any(transparency.is_transparent_png(image_files.FILES[n]()) for n in others)


def chunk(name: bytes, content: bytes) -> bytes:
    return (
        struct.pack(">I", len(content))
        + name
        + content
        + struct.pack(">I", zlib.crc32(name + content))
    )


@pytest.mark.parametrize("transparent", [b"", b"\0\1\0\2\0\3"])
def test_long_chunks_before_the_pixels_are_skipped(transparent):
    # Looks like tRNS but is inside another chunk.
    long = chunk(b"teXt", b"tRNS" * 70_000)
    content = image_files.png(2, 8, extra=long, transparent=transparent)
    assert bool(transparency.is_transparent_png(content)) == bool(transparent)
    image = Image.open(io.BytesIO(content))
    np.testing.assert_array_equal(images.decode(content), image_files.as_decoded("", image))


def test_pngs_of_many_chunks_are_searched_only_at_their_beginning():
    content = image_files.png(2, 8, extra=chunk(b"teXt", b"") * 2000, transparent=b"\0\1\0\2\0\3")
    assert not transparency.is_transparent_png(content)
    images.decode(content)


def test_images_of_several_blocks(rng):
    pixels = rng.integers(0, 256, [1100, 1000, 4], np.uint8)
    np.testing.assert_array_equal(transparency.on_white(pixels), image_files.on_white(pixels))


def tga(attribute_bits: int) -> bytes:
    """Returns a 32-bit TGA whose pixels have 0 as their fourth byte."""
    header = struct.pack("<BBBHHBHHHHBB", 0, 0, 2, 0, 0, 0, 0, 0, 4, 3, 32, 0x20 | attribute_bits)
    return header + bytes([10, 20, 30, 0]) * 12


def test_an_undefined_fourth_byte_is_no_transparency():
    dib = image_files.FILES["BMP 32 bit, header 124, alpha"]()[14:]
    for content, color in ((tga(0), 30), (tga(8), 255)):
        stored, _ = image_conversion.prepare(content, image_conversion.Rules())
        assert (images.decode(stored).numpy()[..., 0] == color).all()
    stored, _ = image_conversion.prepare(dib, image_conversion.Rules())
    with Image.open(io.BytesIO(dib)) as image:
        assert image.format == "DIB"
        np.testing.assert_array_equal(images.decode(stored), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("length", [8, 20, 26, 33, 40, 60])
def test_cut_off_files_are_named_by_the_decoder(length):
    content = image_files.FILES["PNG RGBA 8 bit"]()[:length]
    with pytest.raises(tf.errors.InvalidArgumentError, match="PNG|Unable to decode"):
        images.decode(content)


@pytest.mark.parametrize("name", ["WebP lossless, alpha", "TIFF RGBA", "GIF transparent"])
def test_converted_images_are_on_white(name):
    content = image_files.FILES[name]()
    stored, _ = image_conversion.prepare(content, image_conversion.Rules())
    with Image.open(io.BytesIO(content)) as image:
        expected = image_files.as_decoded(name, image)
    assert not np.array_equal(expected, np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))
    np.testing.assert_array_equal(images.decode(stored), expected)


def test_thumbnails_are_on_white(rng):
    pixels = rng.integers(0, 256, [64, 64, 4], np.uint8)
    pixels[..., 3] = 0
    small = pictures.thumbnail(tf.io.encode_png(pixels).numpy(), 32)
    assert (np.asarray(Image.open(io.BytesIO(small))) >= 254).all()
