"""Every kind of image file compared with Pillow, pixel by pixel: decoded, and stored in records."""

from __future__ import annotations

import io
import sys
import warnings

import image_files
import numpy as np
import pytest
import tensorflow as tf
from fakes import mostly_slow
from PIL import Image

from efficientnet_ns.data import image_conversion, image_headers, images

# Files of supported formats that TensorFlow misreads or rejects; records store them converted.
NOT_BY_TENSORFLOW = {
    "BMP palette 1 bit",
    "BMP palette 4 bit",
    "BMP palette 8 bit",
    "BMP palette 8 bit, 40 colors",
    "BMP palette 8 bit, top-down",
    "BMP palette 8 bit, OS/2",
    "BMP palette 8 bit, header 124",
    "BMP gray 8 bit, reversed",
    "BMP gray 8 bit, 16 grays",
    "BMP gray 1 bit",
    "BMP RLE8",
    "BMP RLE4",
    "BMP 16 bit 555",
    "BMP 16 bit 555 masks",
    "BMP 16 bit 565",
    "BMP 24 bit, bytes behind the end",
    "BMP 24 bit, OS/2",
    "BMP 32 bit, masks RGBX",
    "BMP 32 bit, header 124, masks BGR",
    "GIF no palette",
    "GIF transparent",
    "GIF transparent, background",
    "GIF transparent, not used",
    "GIF transparent, local palette",
    "GIF frame within a larger screen",
    "GIF frame beyond its screen",
    "GIF animated, transparent",
}
# Maps each rejected file to a part of the reason.
UNUSABLE = {
    "BMP 32 bit, masks BGR": "does not read BMPs with this palette, compression or color order",
    "BMP with a JPEG inside": "Unsupported BMP pixel depth",
    "BMP with a PNG inside": "Unsupported BMP pixel depth",
    "TIFF gray 8 bit, signed": "8-bit signed integer pixels have no known range",
    "TIFF gray 16 bit, signed": "16-bit signed integer pixels",
    "TIFF gray 32 bit": "32-bit integer pixels",
    "TIFF gray 32 bit, values to 255": "32-bit integer pixels",
    "TIFF gray 32 bit, signed": "32-bit signed integer pixels",
    "TIFF gray 32 bit, big-endian": "32-bit integer pixels",
    "TIFF RGB 32 bit": "32-bit integer pixels",
    "TIFF float": "32-bit floating-point pixels",
    "TIFF float, big-endian": "32-bit floating-point pixels",
    "TIFF float 16 bit": "16-bit floating-point pixels",
    "TIFF float 64 bit": "64-bit floating-point pixels",
    "PFM": "floating-point pixels have no known range",
}
LOSSY = {name for name in image_files.FILES if name.startswith(("JPEG", "AVIF", "HEIC"))}
LOSSY |= {"WebP lossy", "WebP lossy, alpha", "WebP animated, lossy"}
# Allows for two JPEG decoders, or one more encoding at quality 95.
LARGEST, MEAN = 8, 2.0


def decoded_by_tensorflow(name: str) -> bool:
    right = name.startswith(("PNG", "BMP", "GIF", "JPEG ", "JPEG,")) and "JPEG 2000" not in name
    return right and name not in NOT_BY_TENSORFLOW and name not in UNUSABLE


def by_pillow(name: str, content: bytes) -> np.ndarray:
    """Returns the first frame on white (BMP: without alpha) as uint8 [H, W, 3], high bytes only."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = Image.open(io.BytesIO(content))
        image.load()
    if name == "JPEG CMYK":  # Not Adobe's, so not inverted as Pillow assumes.
        image = Image.frombytes("CMYK", image.size, (255 - np.asarray(image)).tobytes())
    if image.mode.startswith("I"):
        bits = 12 if "12 bit" in name else 16
        high = (np.asarray(image).astype(np.int64) >> bits - 8).astype(np.uint8)
        image = Image.fromarray(255 - high if "white is 0" in name else high)
    return image_files.as_decoded(name, image)


def assert_close(result: np.ndarray, expected: np.ndarray, *, lossy: bool) -> None:
    assert result.dtype == np.uint8 and result.shape == expected.shape
    difference = np.abs(result.astype(int) - expected)
    assert difference.max() <= (LARGEST if lossy else 0)
    assert difference.mean() <= (MEAN if lossy else 0)


decode = tf.function(images.decode, input_signature=[tf.TensorSpec([], tf.string)])


def test_the_lists_name_files_that_exist():
    assert NOT_BY_TENSORFLOW | set(UNUSABLE) <= set(image_files.FILES)


@pytest.mark.parametrize("name", mostly_slow(image_files.FILES, list(image_files.FILES)[::3]))
def test_decoded_as_pillow_does_or_refused(name):
    content = image_files.FILES[name]()
    if decoded_by_tensorflow(name):
        result = decode(tf.constant(content)).numpy()
        assert_close(result, by_pillow(name, content), lossy=name in LOSSY)
    else:
        with pytest.raises(tf.errors.InvalidArgumentError):
            decode(tf.constant(content))


@pytest.mark.slow
@pytest.mark.parametrize("name", image_files.FILES)
def test_records_show_what_pillow_shows(name):
    content = image_files.FILES[name]()
    if name in UNUSABLE:
        with pytest.raises(image_conversion.Unusable, match=UNUSABLE[name]):
            image_conversion.prepare(content, image_conversion.Rules())
        return
    expected = by_pillow(name, content)
    stored, size = image_conversion.prepare(content, image_conversion.Rules())
    assert size == expected.shape[:2]
    assert (stored == content) == decoded_by_tensorflow(name)
    assert_close(decode(tf.constant(stored)).numpy(), expected, lossy=stored[:2] == b"\xff\xd8")
    assert (stored[:2] == b"\xff\xd8") == (name in LOSSY or name.startswith("JPEG 2000"))


@pytest.mark.parametrize("name", ["BMP palette 8 bit", "GIF transparent", "BMP 24 bit, OS/2"])
def test_what_would_be_misread_is_converted_without_a_check_too(name):
    content = image_files.FILES[name]()
    stored, _ = image_conversion.prepare(content, image_conversion.Rules(check=False))
    np.testing.assert_array_equal(decode(tf.constant(stored)), by_pillow(name, content))


@pytest.mark.parametrize("name", ["JPEG CMYK", "JPEG CMYK, Adobe", "JPEG gray", "JPEG 4:2:0"])
def test_shrunk_images_keep_their_colors(name):
    content = image_files.FILES[name]()
    stored, size = image_conversion.prepare(content, image_conversion.Rules(max_side=32))
    assert size == (24, 32)
    whole = Image.fromarray(by_pillow(name, content))
    expected = np.asarray(whole.resize((32, 24), Image.Resampling.LANCZOS))
    difference = np.abs(decode(tf.constant(stored)).numpy().astype(int) - expected)
    assert difference.mean() < 4  # Chroma has half the resolution; inverted, it is above 100.


@pytest.mark.parametrize(
    "name", [name for name in image_files.FILES if name.startswith(("PNG", "BMP", "GIF", "JPEG "))]
)
def test_sizes_are_declared_as_pillow_reads_them(name):
    content = image_files.FILES[name]()
    found = image_headers.declared_size(content)
    if name.startswith("JPEG 2000"):
        assert found is None
    elif name == "GIF frame beyond its screen":
        assert found == (10, 10)
    elif name not in UNUSABLE:
        assert found == Image.open(io.BytesIO(content)).size


@pytest.mark.parametrize(
    "name", ["BMP palette 8 bit", "BMP 32 bit, masks", "GIF transparent", "GIF"]
)
def test_files_cut_off_are_refused_and_nothing_else(name):
    content = image_files.FILES[name]()
    for cut in (10, 13, 14, 20, 40, 60, 200):
        with pytest.raises(tf.errors.InvalidArgumentError):
            decode(tf.constant(content[:cut]))


def test_gif_frame_that_takes_more_memory_than_the_header_declares_is_refused():
    content = image_files.FILES["GIF frame beyond its screen"]()
    with pytest.raises(tf.errors.InvalidArgumentError, match="not the whole image"):
        decode(tf.constant(content))


def test_random_bytes_behind_a_signature_are_refused(rng):
    for start in (b"BM", b"GIF89a"):
        for _ in range(50):
            with pytest.raises(tf.errors.InvalidArgumentError):
                decode(tf.constant(start + rng.bytes(int(rng.integers(0, 200)))))


# HEIC and AVIF.


def box(brand: bytes, *compatible: bytes) -> bytes:
    body = b"ftyp" + brand + bytes(4) + b"".join(compatible)
    return (len(body) + 4).to_bytes(4, "big") + body + bytes(100)


@pytest.mark.parametrize("content", [box(b"heic"), box(b"mif1", b"mif1", b"heic")])
def test_heic_without_its_package(monkeypatch, content):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(
        image_conversion.Unusable, match="HEIC requires pillow-heif: pip install pillow-heif"
    ):
        image_conversion.prepare(content, image_conversion.Rules())


def test_heic_with_its_package():
    heif = pytest.importorskip("pillow_heif")
    target = io.BytesIO()
    heif.from_pillow(Image.fromarray(image_files.smooth())).save(target, quality=95)
    stored, size = image_conversion.prepare(target.getvalue(), image_conversion.Rules())
    assert stored[:2] == b"\xff\xd8" and size == (48, 64)
    difference = np.abs(decode(tf.constant(stored)).numpy().astype(int) - image_files.smooth())
    assert difference.mean() < 5
    with pytest.raises(
        image_conversion.Unusable, match="not a format TensorFlow decodes; Pillow: "
    ):
        image_conversion.prepare(target.getvalue()[:200], image_conversion.Rules())


@pytest.mark.parametrize("turn", range(1, 9))
def test_heic_is_not_turned_as_no_other_format_is(turn):
    heif = pytest.importorskip("pillow_heif")
    pixels = image_files.smooth()
    target, exif = io.BytesIO(), Image.Exif()
    exif[274] = turn  # Orientation.
    file = heif.from_pillow(Image.fromarray(pixels))
    file.save(target, quality=95, exif=exif.tobytes())
    stored, size = image_conversion.prepare(target.getvalue(), image_conversion.Rules())
    assert size == pixels.shape[:2]
    difference = np.abs(decode(tf.constant(stored)).numpy().astype(int) - pixels)
    assert difference.mean() < 5


@pytest.mark.parametrize("content", [box(b"avif"), box(b"mif1", b"mif1", b"avif")])
def test_avif_without_its_decoder(monkeypatch, content):
    from PIL import features

    monkeypatch.setattr(features, "check", lambda feature: feature != "avif")
    with pytest.raises(
        image_conversion.Unusable, match="AVIF, which this build of Pillow cannot decode"
    ):
        image_conversion.prepare(content, image_conversion.Rules())


def test_films_in_the_same_container_are_no_images():
    with pytest.raises(image_conversion.Unusable, match="cannot identify image file"):
        image_conversion.prepare(box(b"isom", b"mp42"), image_conversion.Rules())
