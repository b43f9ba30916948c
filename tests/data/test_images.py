"""Decoding, crops and resizing: the original's numbers, unusual formats and sizes."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import image_files
import numpy as np
import pytest
import tensorflow as tf

from efficientnet_ns.data import images

GOLDENS = Path(__file__).parents[1] / "goldens" / "preprocessing"


def load(name):
    with np.load(GOLDENS / name) as arrays:
        return {key: arrays[key] for key in arrays.files}


EVAL = load("eval.npz")
TRAIN = load("train_crop.npz")
SMALL = load("small_image.npz")


def to_box(bbox):
    """Converts the original's begin and size, with channels, to (y, x, h, w)."""
    return bbox[[0, 1, 3, 4]]


def sources(name):
    """Returns the golden image as encoded bytes and as pixels, if stored."""
    found = []
    if f"jpeg_bytes|{name}" in EVAL:
        encoded = tf.constant(EVAL[f"jpeg_bytes|{name}"].tobytes())
        found += [encoded, tf.image.decode_jpeg(encoded, channels=3)]
    if f"input|{name}" in EVAL:
        found.append(tf.constant(EVAL[f"input|{name}"]))
    assert found
    return found


def noise(height, width, channels=3, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, channels), np.uint8)


def encode(pixels, file_format, mode=None, **options):
    """Encodes with Pillow, which writes more formats than TensorFlow."""
    from PIL import Image

    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(buffer, file_format, **options)
    return buffer.getvalue()


def map_once(function, element):
    return next(iter(tf.data.Dataset.from_tensors(element).map(function)))


# Evaluation.


def test_center_crop_box_equals_original():
    keys = [key for key in EVAL if key.startswith("bbox")]
    assert len(keys) == 12
    for key in keys:
        _, name, size = key.split("|")
        height, width, _ = EVAL[f"shape|{name}"]
        box = images.center_crop_box(int(height), int(width), int(size))
        assert box.dtype == tf.int32
        np.testing.assert_array_equal(box, to_box(EVAL[key]), err_msg=key)


@pytest.mark.parametrize("key", [key for key in EVAL if key.startswith("eval")])
def test_eval_image_equals_original(key):
    kind, name, size = key.split("|")
    step = {"eval": 1, "eval_rows": 16}[kind]

    def preprocess(image):
        return images.eval_image(image, int(size))

    for image in sources(name):
        result = preprocess(image)
        assert result.dtype == tf.float32 and result.shape == [int(size), int(size), 3]
        np.testing.assert_array_equal(result[::step], EVAL[key])
        np.testing.assert_array_equal(map_once(preprocess, image)[::step], EVAL[key])
        np.testing.assert_array_equal(tf.function(preprocess)(image)[::step], EVAL[key])


def test_eval_image_is_not_clipped():
    result = images.eval_image(noise(200, 200), 224).numpy()
    assert result.min() < -5 and result.max() > 260


def test_decode_equals_original():
    np.testing.assert_array_equal(
        images.decode(EVAL["jpeg_bytes|jpeg2"].tobytes()), EVAL["input|jpeg2"]
    )


def test_whole_image_is_resized_without_cropping():
    encoded = tf.io.encode_png(noise(48, 48))
    np.testing.assert_array_equal(images.whole_image(encoded, 48), noise(48, 48))
    # TF1's resize takes every second pixel when it halves the size.
    np.testing.assert_allclose(images.whole_image(encoded, 24), noise(48, 48)[::2, ::2], atol=1e-3)
    assert images.whole_image(noise(30, 50), 24).shape == (24, 24, 3)


def test_small_eval_image():
    for index in "01":
        result = images.small_eval_image(SMALL[f"input|{index}"], 32)
        assert result.dtype == tf.float32
        np.testing.assert_array_equal(result, SMALL[f"eval|{index}"])
        encoded = tf.io.encode_png(SMALL[f"input|{index}"])
        np.testing.assert_array_equal(images.small_eval_image(encoded, 32), SMALL[f"eval|{index}"])
    resized = map_once(lambda image: images.small_eval_image(image, 32), noise(48, 20)).numpy()
    assert resized.shape == (32, 32, 3)
    assert resized.min() == 0 and resized.max() == 255


# Training.


def test_crop_and_resize_equals_original():
    keys = [key for key in TRAIN if key.startswith("uint8")]
    assert len(keys) == 4
    for key in keys:
        _, name, index = key.split("|")
        for image in sources(name):
            box = to_box(TRAIN[f"bbox|{name}|{index}"])
            result = images.crop_and_resize(image, box, 224)
            assert result.dtype == tf.float32
            np.testing.assert_array_equal(images.to_uint8(result), TRAIN[key], err_msg=key)
            rows = TRAIN.get(f"float_rows|{name}|{index}")
            if rows is not None:
                np.testing.assert_array_equal(result[::8], rows)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize(
    ("height", "width"), [(83, 83), (84, 82), (83, 84), (84, 84), (21, 337), (337, 21), (300, 301)]
)
def test_large_and_small_images_are_resized_alike(height, width, dtype):
    # Images of at least 12 * 24 * 24 = 83 * 83.3 pixels are not converted beforehand.
    pixels = noise(height, width).astype(dtype)
    resize = tf.function(
        lambda image: images.resize(image, 24),
        input_signature=[tf.TensorSpec([None, None, 3], dtype)],
    )
    expected = tf.raw_ops.ResizeBicubic(images=pixels[None].astype(np.float32), size=[24, 24])[0]
    np.testing.assert_array_equal(resize(pixels), expected)
    np.testing.assert_array_equal(images.resize(pixels, 24), expected)


def test_checks_of_other_formats_stay_out_of_the_graph():
    """Dead nodes are not free: of JPEG, they took longer than decoding a small image."""
    decode = tf.function(images.decode, input_signature=[tf.TensorSpec([], tf.string)])
    called = decode.get_concrete_function().graph.as_graph_def().library.function
    kept = [f.signature.name for f in called if f.attr["_noinline"].b]
    for check in ("_bmp", "_gif", "_has_transparency", "on_white"):
        assert any(check in name for name in kept), (check, kept)


def test_to_uint8_clips_and_truncates():
    values = tf.constant([-3.2, 0.0, 0.99, 1.0, 254.999, 255.0, 300.0])
    assert images.to_uint8(values).numpy().tolist() == [0, 0, 0, 1, 254, 255, 255]


def photograph(height: int, width: int) -> bytes:
    """Returns a JPEG with waves of several lengths, all of which survive at 1/8 of the size."""
    y, x = np.mgrid[:height, :width] / 64
    waves = np.stack([np.sin(x + y), np.cos(x - 2 * y), np.sin(y) * np.cos(x)], -1)
    return tf.io.encode_jpeg((waves * 100 + 128).astype(np.uint8), quality=95).numpy()


@pytest.mark.parametrize(
    ("size", "fraction", "shape"),
    [
        (64, 1.0, (100, 150)),  # 800 / 64 = 12.5: an eighth.
        (100, 1.0, (100, 150)),  # Exactly 8 times.
        (101, 1.0, (200, 300)),
        (200, 1.0, (200, 300)),
        (224, None, (400, 600)),  # The crop has 700 pixels: 1/3 suffices, 1/4 does not.
        (448, 0.875, (800, 1200)),
    ],
)
def test_large_photographs_are_decoded_no_larger_than_needed(size, fraction, shape):
    encoded = photograph(800, 1200)
    reduced = images.decode_reduced(tf.constant(encoded), size, fraction)
    assert reduced.shape == (*shape, 3)
    exact = images.eval_image(images.decode(encoded), size, fraction).numpy()
    fast = images.eval_image(reduced, size, fraction).numpy()
    # Without half-pixel centers, pixels of the small image are displaced by up to half a pixel.
    assert np.abs(fast - exact).mean() < 6
    assert np.corrcoef(fast.ravel(), exact.ravel())[0, 1] > 0.99


@pytest.mark.parametrize("kind", ["png", "gray"])
def test_other_images_are_decoded_as_ever(kind, rng):
    pixels = rng.integers(0, 256, (40, 50, 1 if kind == "gray" else 3), np.uint8)
    encoded = {"png": tf.io.encode_png, "gray": tf.io.encode_jpeg}[kind](pixels)
    reduced = images.decode_reduced(encoded, 33)
    np.testing.assert_array_equal(reduced, images.decode(encoded))


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_crop_equals_crop_of_the_decoded_image(subsampling, progressive):
    pytest.importorskip("PIL")
    encoded = encode(noise(75, 91), "JPEG", subsampling=subsampling, progressive=progressive)
    whole = tf.image.decode_jpeg(encoded, channels=3).numpy()
    rng = np.random.default_rng(0)
    for _ in range(40):
        y, x = rng.integers(0, 75), rng.integers(0, 91)
        h, w = rng.integers(1, 75 - y + 1), rng.integers(1, 91 - x + 1)
        result = images.crop_and_resize(encoded, [y, x, h, w], 16)
        expected = images.crop_and_resize(whole, [y, x, h, w], 16)
        np.testing.assert_array_equal(result, expected, err_msg=str((y, x, h, w)))


def test_random_crop_box_stays_in_range():
    draw = tf.function(lambda seed: images.random_crop_box(300, 400, seed))
    boxes = np.array([draw(tf.constant([seed, 1])) for seed in range(300)])
    y, x, h, w = boxes.T
    assert (boxes >= 0).all() and (y + h <= 300).all() and (x + w <= 400).all()
    area, aspect = h * w / (300 * 400), w / h
    # Rounding to whole pixels changes both slightly.
    assert area.min() > 0.099 and area.max() <= 1 and area.min() < 0.15 and area.max() > 0.8
    assert aspect.min() > 0.72 and aspect.max() < 1.37 and np.ptp(aspect) > 0.5
    assert len(np.unique(y)) > 50 and len(np.unique(x)) > 50
    np.testing.assert_array_equal(draw(tf.constant([7, 1])), boxes[7])
    np.testing.assert_array_equal(draw(tf.constant([7, 1], tf.int64)), boxes[7])

    narrow = images.random_crop_box(300, 400, [1, 1], area=(0.5, 0.6), aspect=(1.0, 1.0))
    assert 0.48 < int(narrow[2]) * int(narrow[3]) / (300 * 400) < 0.62


def test_random_crop_box_falls_back_to_the_eval_crop():
    # No box with an aspect ratio of 3/4 to 4/3 covers a tenth of 20 x 2000 pixels.
    expected = images.center_crop_box(20, 2000, 224)
    for seed in range(5):
        np.testing.assert_array_equal(images.random_crop_box(20, 2000, [seed, 0]), [0, 0, 20, 2000])
        np.testing.assert_array_equal(
            images.random_crop_box(20, 2000, [seed, 0], size=224), expected
        )
    image = noise(20, 2000)
    np.testing.assert_array_equal(
        images.train_image(image, 224, [3, 0], flip=False), images.eval_image(image, 224)
    )


def test_train_image_is_the_resized_random_crop():
    encoded = tf.constant(EVAL["jpeg_bytes|jpeg2"].tobytes())
    run = tf.function(lambda image, seed: images.train_image(image, 64, seed, flip=False))
    results = [run(encoded, tf.constant([seed, 0])).numpy() for seed in range(10)]
    assert len({result.tobytes() for result in results}) == 10
    np.testing.assert_array_equal(run(encoded, tf.constant([4, 0])), results[4])
    np.testing.assert_array_equal(
        run(tf.constant(EVAL["input|jpeg2"]), tf.constant([4, 0])), results[4]
    )

    # A horizontal ramp reveals the position and width of the crop.
    ramp = np.broadcast_to(np.arange(250, dtype=np.uint8)[None, :, None], (200, 250, 3))
    firsts, widths = [], []
    for seed in range(30):
        row = images.train_image(ramp, 64, [seed, 1], flip=False)[32, :, 0].numpy()
        assert (np.diff(row) >= 0).all()
        firsts.append(row[0])
        widths.append(row[-1] - row[0])
    assert np.ptp(firsts) > 50 and np.ptp(widths) > 50


def test_train_image_mirrors_half_of_the_images():
    encoded = tf.io.encode_png(noise(12, 12))
    straight, mirrored = 0, 0
    pair = tf.function(
        lambda seed: [images.train_image(encoded, 8, seed, flip=flip) for flip in (False, True)]
    )
    for seed in range(200):
        plain, result = pair(tf.constant([seed, 9]))
        straight += np.array_equal(result, plain)
        mirrored += np.array_equal(result, plain[:, ::-1])
    assert straight + mirrored == 200
    assert 70 < mirrored < 130


@pytest.mark.parametrize("key", [key for key in SMALL if key.startswith("crop")])
def test_reflect_pad_crop_at_equals_original(key):
    _, index, offsets = key.split("|")
    dy, dx = map(int, offsets.split(","))
    image = tf.constant(SMALL[f"input|{index}"])
    result = images.reflect_pad_crop_at(image, dy, dx)
    assert result.dtype == tf.uint8
    np.testing.assert_array_equal(result, SMALL[key])
    in_float = images.reflect_pad_crop_at(tf.cast(image, tf.float32), dy, dx)
    assert in_float.dtype == tf.float32
    np.testing.assert_array_equal(in_float, SMALL[key])


def test_reflect_pad_crop_draws_every_offset():
    image = tf.constant(noise(8, 10))
    offsets = {
        images.reflect_pad_crop_at(image, dy, dx, 2).numpy().tobytes(): (dy, dx)
        for dy in range(5)
        for dx in range(5)
    }
    run = tf.function(lambda seed: images.reflect_pad_crop(image, seed, 2))
    results = [run(tf.constant([seed, 0])).numpy().tobytes() for seed in range(300)]
    assert {offsets[result] for result in results} == set(offsets.values())
    assert run(tf.constant([3, 0])).numpy().tobytes() == results[3]


def test_reflect_pad_crop_refuses_images_that_are_too_small():
    message = "reflect padding by 4 requires an image of at least 5 x 5 pixels"
    with pytest.raises(ValueError, match=message):
        images.reflect_pad_crop(tf.zeros([4, 32, 3]), [0, 0])
    unknown = tf.function(
        lambda image: images.reflect_pad_crop(image, [0, 0]),
        input_signature=[tf.TensorSpec([None, None, 3])],
    )
    assert unknown(tf.zeros([5, 32, 3])).shape == (5, 32, 3)
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        unknown(tf.zeros([32, 4, 3]))


# Static shapes.


def test_static_shapes():
    def outputs(image):
        return (
            images.eval_image(image, 24),
            images.small_eval_image(image, 24),
            images.train_image(image, 24, [0, 0]),
            images.crop_and_resize(image, [0, 0, 5, 5], 24),
        )

    specs = [tf.TensorSpec([], tf.string), tf.TensorSpec([None, None, 3], tf.uint8)]
    for spec in specs:
        dataset = tf.data.Dataset.from_generator(lambda: iter(()), output_signature=spec)
        shapes = [output.shape for output in dataset.map(outputs).element_spec]
        assert shapes == [[24, 24, 3]] * 4


# Formats.


def formats():
    """Maps format names to (bytes, expected pixels)."""
    rgb = noise(14, 18)
    gray = rgb[..., 0]
    gray_as_rgb = np.repeat(gray[..., None], 3, axis=-1)
    alpha = np.concatenate([rgb, gray[..., None]], axis=-1)
    palette_index = gray // 64
    colors = noise(1, 4, seed=1)[0]
    wide = np.random.default_rng(2).integers(0, 65536, (14, 18), np.uint16)
    wide_as_rgb = np.repeat((wide >> 8).astype(np.uint8)[..., None], 3, axis=-1)
    return {
        "png": (encode(rgb, "PNG"), rgb),
        "png, gray": (encode(gray, "PNG"), gray_as_rgb),
        "png, alpha": (encode(alpha, "PNG"), image_files.on_white(alpha)),
        "png, palette": (encode_palette(palette_index, colors, "PNG"), colors[palette_index]),
        "png, 16 bit": (encode(wide, "PNG"), wide_as_rgb),
        "gif": (encode_palette(palette_index, colors, "GIF"), colors[palette_index]),
        "gif, animated": (
            encode_palette(palette_index, colors, "GIF", frames=[3 - palette_index]),
            colors[palette_index],
        ),
        "bmp": (encode(rgb, "BMP"), rgb),
        "bmp, alpha": (encode(alpha, "BMP"), rgb),
    }


def encode_palette(index, colors, file_format, frames=()):
    from PIL import Image

    def paletted(index):
        image = Image.frombytes("P", index.shape[::-1], index.tobytes())
        image.putpalette(colors.tobytes())
        return image

    buffer = io.BytesIO()
    options = {"save_all": True, "append_images": [paletted(frame) for frame in frames]}
    paletted(index).save(buffer, file_format, **(options if frames else {}))
    return buffer.getvalue()


def test_formats_without_loss():
    pytest.importorskip("PIL")
    decode = tf.function(images.decode)
    preprocess = tf.function(lambda image: images.eval_image(image, 16))
    for name, (encoded, expected) in formats().items():
        result = decode(tf.constant(encoded))
        assert result.dtype == tf.uint8
        np.testing.assert_array_equal(result, expected, err_msg=name)
        np.testing.assert_array_equal(
            preprocess(tf.constant(encoded)), preprocess(tf.constant(expected)), err_msg=name
        )


def test_jpeg_color_spaces():
    pytest.importorskip("PIL")
    rgb = noise(40, 50)
    variants = {
        "gray": encode(rgb, "JPEG", mode="L"),
        "CMYK": encode(rgb, "JPEG", mode="CMYK"),
        "color": encode(rgb, "JPEG"),
    }
    for name, encoded in variants.items():
        expected = tf.image.decode_jpeg(encoded, channels=3)
        assert expected.shape == (40, 50, 3)
        np.testing.assert_array_equal(images.decode(encoded), expected, err_msg=name)
        np.testing.assert_array_equal(
            images.eval_image(encoded, 16), images.eval_image(expected, 16), err_msg=name
        )
        np.testing.assert_array_equal(
            images.train_image(encoded, 16, [1, 2]),
            images.train_image(expected, 16, [1, 2]),
            err_msg=name,
        )
    gray = images.decode(variants["gray"]).numpy()
    np.testing.assert_array_equal(gray[..., 0], gray[..., 2])


@pytest.mark.parametrize("shape", [(1, 1), (1, 60), (60, 1), (2, 3)])
@pytest.mark.parametrize("encoder", [None, tf.io.encode_jpeg, tf.io.encode_png])
def test_tiny_images(shape, encoder):
    image = np.full((*shape, 3), 90, np.uint8)
    source = encoder(image) if encoder else image
    for result in (
        images.eval_image(source, 24),
        images.train_image(source, 24, [1, 2]),
        images.small_eval_image(source, 24),
    ):
        np.testing.assert_allclose(result, np.full((24, 24, 3), 90), atol=1e-4)


def with_png_size(encoded, height, width):
    """Replaces the size in the header of a PNG and updates the checksum."""
    header = b"IHDR" + struct.pack(">II", width, height) + encoded[24:29]
    return encoded[:12] + header + struct.pack(">I", zlib.crc32(header)) + encoded[33:]


def undecodable():
    png = tf.io.encode_png(noise(9, 9)).numpy()
    jpeg = tf.io.encode_jpeg(noise(64, 64)).numpy()
    return {
        "empty": b"",
        "text": b"no image at all",
        "png, truncated": png[:100],
        "png, header of 100 megapixels": with_png_size(png, 10000, 10000),
        "png, header of 3600 megapixels": with_png_size(png, 60000, 60000),
        "jpeg, header alone": jpeg[:30],
        "jpeg, text after the magic bytes": b"\xff\xd8\xff no image",
    }


PREPROCESS = {
    "decode": images.decode,
    "evaluate": lambda image: images.eval_image(image, 24),
    "train": lambda image: images.train_image(image, 24, [1, 2]),
    "evaluate small": lambda image: images.small_eval_image(image, 24),
}


@pytest.mark.parametrize("name", PREPROCESS)
def test_undecodable_bytes_raise(name):
    preprocess = tf.function(PREPROCESS[name], input_signature=[tf.TensorSpec([], tf.string)])
    for what, encoded in undecodable().items():
        with pytest.raises(tf.errors.InvalidArgumentError):
            pytest.fail(f"{what}: {preprocess(encoded)}")
