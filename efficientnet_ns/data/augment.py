"""The operations of AutoAugment and RandAugment (arXiv 1805.09501, 1909.13719) on uint8 images.

The first argument of every op is a uint8 image [H, W, 3] with static or dynamic H and W, and the
result is uint8 [H, W, 3]. The arguments of geometric ops and the cutout center may be scalar
tensors; all other arguments are Python numbers.

The ops run in the input pipeline of accelerators and are optimized for one thread. They use rows of
W * 3 values instead of pixels of 3, because kernels are slow if the last dimension is short; floats
instead of bytes, because kernels vectorize them; sums instead of selects; and lookup tables for
pairs of values. Each op returns exactly the pixels of the plain formula, which the tests spell out.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from efficientnet_ns.data import images

try:
    with warnings.catch_warnings():
        # Users of this package cannot act on its warning that it is no longer developed.
        warnings.simplefilter("ignore", UserWarning)
        from tensorflow_addons.image.transform_ops import angles_to_projective_transforms
except ImportError:  # TensorFlow 2.15 is the last version it supports.
    angles_to_projective_transforms = None

FILL = 128


def _u8(value: int) -> tf.Tensor:
    return tf.constant(value, tf.uint8)


def _rows(image: tf.Tensor) -> tf.Tensor:
    """Reshapes [H, W, 3] to [H, W * 3]."""
    _, width, _ = image.shape
    if width is not None:
        return tf.reshape(image, [-1, width * 3])
    shape = tf.shape(image)
    return tf.reshape(image, [shape[0], shape[1] * 3])


def _like(rows: tf.Tensor, image: tf.Tensor) -> tf.Tensor:
    """Inverts `_rows` for an image with the shape of `image`."""
    shape = image.shape if image.shape.is_fully_defined() else tf.shape(image)
    return tf.ensure_shape(tf.reshape(rows, shape), image.shape)


def _step(values: tf.Tensor) -> tf.Tensor:
    """Maps float32 whole numbers to 1 if positive, else 0; several times faster than a select."""
    return tf.minimum(tf.maximum(values, 0.0), 1.0)


def _height_width(image: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    shape = tf.shape(image)
    return shape[0], shape[1]


# Color ops.


def _blend(degenerate: tf.Tensor | float, image: tf.Tensor, factor: float) -> tf.Tensor:
    """Blends `degenerate` (factor 0) and `image` (1), or extrapolates; clips, then truncates.

    `degenerate` is float32 and broadcastable to the image. The order of the float operations is
    part of the contract: truncation turns a last-bit difference into a different pixel.
    """
    if factor == 1.0:
        return image
    return images.to_uint8(degenerate + factor * (tf.cast(image, tf.float32) - degenerate))


# Weights of red, green and blue in the gray level.
_LUMA = np.array([[0.2989], [0.587], [0.114]], np.float32)


def color(image: tf.Tensor, factor: float) -> tf.Tensor:
    """Adjusts the saturation: 0 gives grayscale, 1 the image itself."""
    pixels = tf.reshape(image, [-1, 3])
    # Scales and orders operations like tf.image.rgb_to_grayscale, without converting to bytes.
    scaled = tf.cast(pixels, tf.float32) * np.float32(1 / 255)
    gray = tf.floor(scaled @ tf.constant(_LUMA) * 255.5)
    # Multiplying by ones copies the gray level to the channels faster than broadcasting.
    return _like(_blend(gray @ tf.ones([1, 3]), pixels, factor), image)


def contrast(image: tf.Tensor, factor: float) -> tf.Tensor:
    """Adjusts the contrast: 0 gives the constant min(H * W / 256, 255), 1 the image itself.

    The original code is meant to use the average gray level, but averages the 256 histogram counts,
    which depends only on the image size (196 at 224 x 224, 4 at 32 x 32).
    """
    height, width = _height_width(image)
    # int64 because the product may exceed int32.
    pixels = tf.cast(height, tf.int64) * tf.cast(width, tf.int64)
    return _blend(tf.cast(tf.minimum(pixels // 256, 255), tf.float32), image, factor)


def brightness(image: tf.Tensor, factor: float) -> tf.Tensor:
    """Adjusts the brightness: 0 gives black, 1 the image itself."""
    return images.to_uint8(factor * tf.cast(image, tf.float32))


def sharpness(image: tf.Tensor, factor: float) -> tf.Tensor:
    """Sharpens: 0 smooths with the kernel [[1, 1, 1], [1, 5, 1], [1, 1, 1]] / 13, 1 is the image.

    The one-pixel border is not smoothed and therefore never changes.
    """
    if factor == 1.0:
        return image
    height, width = _height_width(image)
    rows = _rows(image)
    pixels = tf.cast(rows, tf.float32)
    middle = _shifted_left(pixels, 1)
    edge, center = pixels * np.float32(-1 / 13), middle * np.float32(-5 / 13)
    edges = [edge, _shifted_left(edge, 1), _shifted_left(edge, 2)]
    # The sum is rounded after each term in row-major order, as in a direct 3x3 convolution.
    # Negated terms are subtracted because the graph optimizer reorders chains of additions (but
    # not of subtractions), and convolution kernels round differently on different CPUs.
    terms = [
        (center if (dy, dx) == (1, 1) else edges[dx])[dy : height - 2 + dy]
        for dy in range(3)
        for dx in range(3)
    ]
    smooth = functools.reduce(tf.subtract, terms[1:], -terms[0])
    inner = _blend(tf.floor(smooth), middle[1 : height - 1], factor)
    # max: the only row (column) of an image is both first and last and must not appear twice.
    last_row, last_column = tf.maximum(height - 1, 1), tf.maximum(width - 1, 1)
    inner = inner[:, : (width - 2) * 3]  # The last two columns wrapped around.
    inner = tf.concat([rows[1:-1, :3], inner, rows[1:-1, last_column * 3 :]], axis=1)
    return _like(tf.concat([rows[:1], inner, rows[last_row:]], axis=0), image)


def _shifted_left(rows: tf.Tensor, pixels: int) -> tf.Tensor:
    """Shifts [H, W * 3] left; the start of the next row moves to the end of each row."""
    values = tf.reshape(rows, [-1])
    moved = tf.concat([values[pixels * 3 :], values[: pixels * 3]], axis=0)
    return tf.ensure_shape(tf.reshape(moved, tf.shape(rows)), rows.shape)


def auto_contrast(image: tf.Tensor) -> tf.Tensor:
    """Stretches each channel to 0..255; a constant channel does not change."""
    # Min and max are four times faster on floats than on bytes.
    rows = tf.cast(_rows(image), tf.float32)
    low, high = (
        reduce(tf.reshape(reduce(rows, axis=0), [-1, 3]), axis=0)
        for reduce in (tf.reduce_min, tf.reduce_max)
    )
    stretch = high > low
    scale = tf.where(stretch, 255.0 / tf.where(stretch, high - low, 1.0), 1.0)
    offset = tf.where(stretch, -low * scale, 0.0)
    width = image.shape[1] or tf.shape(image)[1]
    stretched = rows * tf.tile(scale, [width]) + tf.tile(offset, [width])
    return _like(images.to_uint8(stretched), image)


def equalize(image: tf.Tensor) -> tf.Tensor:
    """Equalizes the histogram of each channel with PIL's integer arithmetic."""
    table = _equalizing_table(image)
    if (image.shape[0] or 0) * (image.shape[1] or 0) >= _PAIRS_FROM and image.shape[1] % 2 == 0:
        return _like(_look_up_pairs(_rows(image), table), image)
    index = tf.cast(image, tf.int32) + tf.constant([0, 256, 512])
    return tf.gather_nd(tf.reshape(table, [768]), index[..., tf.newaxis])


def _equalizing_table(image: tf.Tensor) -> tf.Tensor:
    """Returns the new value of each level of each channel, uint8 [3, 256]."""
    width = image.shape[1] or tf.shape(image)[1]
    # One bincount covers all channels: channel c uses the 256 entries from 256 * c.
    index = tf.cast(_rows(image), tf.int32) + tf.tile([0, 256, 512], [width])
    counts = tf.math.bincount(tf.reshape(index, [-1]), minlength=768, maxlength=768)
    cumulative = tf.cumsum(tf.reshape(counts, [3, 256]), axis=1)
    total = cumulative[:, -1:]
    # PIL excludes the highest occupied level from the step, leaving the largest sum below the total.
    below_last = tf.reduce_max(tf.where(cumulative < total, cumulative, 0), axis=1, keepdims=True)
    step = below_last // 255
    levels = (cumulative[:, :-1] + step // 2) // tf.maximum(step, 1)
    levels = tf.pad(tf.clip_by_value(levels, 0, 255), [[0, 0], [1, 0]])
    return tf.cast(tf.where(step > 0, levels, tf.range(256)), tf.uint8)


# Minimum number of pixels for which building the pair tables, 3 * 65536 entries, pays off.
_PAIRS_FROM = 128 * 128


def _look_up_pairs(rows: tf.Tensor, table: tf.Tensor) -> tf.Tensor:
    """Looks up `rows`, uint8 [H, W * 3] with even W, in `table`, uint8 [3, 256], in pairs.

    A lookup of two bytes costs the same as a lookup of one. The pairs of a row cycle through the
    channels (0, 1), (2, 0) and (1, 2).
    """
    table = tf.cast(table, tf.uint16)
    # In memory order, the first value of a pair is the low byte.
    first = tf.gather(table, [0, 2, 1])[:, tf.newaxis, :]
    second = tf.gather(table, [1, 0, 2])[:, :, tf.newaxis] * tf.constant(256, tf.uint16)
    pairs = tf.reshape(first + second, [-1])
    height, values = rows.shape
    index = tf.cast(tf.bitcast(tf.reshape(rows, [height, values // 2, 2]), tf.uint16), tf.int32)
    index += tf.tile([0, 65536, 131072], [values // 6])
    # gather_nd looks up single elements faster than gather.
    found = tf.gather_nd(pairs, index[..., tf.newaxis])
    return tf.reshape(tf.bitcast(found, tf.uint8), [height, values])


def invert(image: tf.Tensor) -> tf.Tensor:
    """255 - image."""
    return _u8(255) - image


def kept_bits(bits: int) -> int:
    # The original code computes the shift 8 - bits as uint8: negative values wrap to about 250, and
    # the kernel limits every shift to 7. Both 0 bits and more than 8 therefore keep one bit.
    return bits if 1 <= bits <= 8 else 1


def posterize(image: tf.Tensor, bits: int) -> tf.Tensor:
    """Keeps the `bits` highest bits, or only one outside 1..8 (see `kept_bits`)."""
    return tf.bitwise.bitwise_and(image, _u8(0xFF & (0xFF << (8 - kept_bits(bits)))))


def invert_from(image: tf.Tensor, threshold: int) -> tf.Tensor:
    """Inverts pixels of at least `threshold` (0..256)."""
    if threshold > 255:
        return image
    pixels = tf.cast(image, tf.float32)
    return tf.cast(
        pixels + _step(pixels - (threshold - 1.0)) * (255.0 - (pixels + pixels)), tf.uint8
    )


def solarize(image: tf.Tensor, threshold: int) -> tf.Tensor:
    """Inverts pixels of at least `threshold` modulo 256, like the original code's uint8."""
    return invert_from(image, threshold % 256)


def solarize_add(image: tf.Tensor, addition: int, threshold: int = 128) -> tf.Tensor:
    """Adds `addition` to pixels below `threshold` (modulo 256), saturating at 0 and 255."""
    pixels = tf.cast(image, tf.float32)
    return images.to_uint8(pixels + _step(threshold % 256 - pixels) * float(addition))


# Geometric ops: nearest neighbor, gray where the source is outside the image.


# The largest float32 below 0.5. Adding it and dropping the fraction rounds half away from zero, as the
# projective transform does; adding 0.5 would round 0.49999997 to 1.
_BELOW_HALF = np.nextafter(np.float32(0.5), np.float32(0))


# (row numbers [H, 1], column numbers [1, W], argument of the op) -> source rows and columns, float32,
# each [H, W], with size 1 along an axis that they do not depend on.
_Coordinates = Callable[[tf.Tensor, tf.Tensor, tf.Tensor | float], tuple[tf.Tensor, tf.Tensor]]


def _sample(image: tf.Tensor, coordinates: _Coordinates, argument: tf.Tensor | float) -> tf.Tensor:
    """Samples the pixels nearest to the source coordinates, gray outside the image.

    Looks up pixels by index, which takes a third of the time of TensorFlow's projective transform.
    """
    height, width, _ = image.shape
    if None in (height, width) or tf.is_tensor(argument):
        numbers = _source_numbers(*_height_width(image), coordinates, argument)
    else:
        # Computed once, because they never change and take half of the time.
        with tf.init_scope(), tf.device("CPU:0"):
            constant = _source_numbers(height, width, coordinates, argument)
        numbers = tf.constant(tf.get_static_value(constant))
    # Coordinates outside the image select the gray frame.
    framed = tf.pad(_rows(image), [[1, 1], [3, 3]], constant_values=FILL)
    # gather_nd looks up single elements faster than gather.
    pixels = tf.gather_nd(tf.reshape(framed, [-1, 3]), numbers)
    return tf.ensure_shape(pixels, image.shape)


def _source_numbers(
    height: tf.Tensor | int,
    width: tf.Tensor | int,
    coordinates: _Coordinates,
    argument: tf.Tensor | float,
) -> tf.Tensor:
    """Returns the indices of the source pixels in the framed image, int32 [H, W, 1]."""
    y, x = (tf.cast(tf.range(size), tf.float32) for size in (height, width))
    rows, columns = coordinates(y[:, tf.newaxis], x[tf.newaxis], argument)
    return (_framed(rows, height) * (width + 2) + _framed(columns, width))[..., tf.newaxis]


def _framed(coordinate: tf.Tensor, size: tf.Tensor) -> tf.Tensor:
    """Rounds to int32: 0 before the image, 1..size inside, size + 1 after it."""
    # The maximum also keeps the graph optimizer from merging this addition with earlier ones.
    nearest = tf.floor(tf.maximum(coordinate, -1.0) + _BELOW_HALF)
    return tf.minimum(tf.cast(nearest, tf.int32), size) + 1


def rotate(image: tf.Tensor, degrees: tf.Tensor | float) -> tf.Tensor:
    """Rotates about the center, counterclockwise for positive `degrees`."""
    return _sample(image, _rotated, degrees)


def _rotated(y: tf.Tensor, x: tf.Tensor, degrees: tf.Tensor | float) -> tuple[tf.Tensor, ...]:
    radians = tf.cast(degrees, tf.float32) * (math.pi / 180.0)
    height, width = (tf.cast(tf.size(grid), tf.float32) for grid in (y, x))
    matrix = (angles_to_projective_transforms or _rotation)(radians, height, width)
    a, minus = tf.unstack(matrix[0]), tf.unstack(-matrix[0])
    # Subtractions, because the graph optimizer reorders additions, which changes the rounding.
    return a[3] * x - minus[4] * y - minus[5], a[0] * x - minus[1] * y - minus[2]


def _rotation(radians: tf.Tensor, height: tf.Tensor, width: tf.Tensor) -> tf.Tensor:
    """Returns a rotation's projective transform, float32 [1, 8], rounded as in TensorFlow Addons."""
    cos, sin = tf.cos(radians), tf.sin(radians)
    x, y = width - 1, height - 1
    x_offset = (x - (cos * x - sin * y)) / 2
    y_offset = (y - (sin * x + cos * y)) / 2
    zero = tf.zeros_like(cos)
    return tf.stack([cos, -sin, x_offset, sin, cos, y_offset, zero, zero])[tf.newaxis]


def shear_x(image: tf.Tensor, level: tf.Tensor | float) -> tf.Tensor:
    """Output pixel (y, x) shows (y, x + level * y)."""
    return _sample(image, lambda y, x, level: (y, x + level * y), level)


def shear_y(image: tf.Tensor, level: tf.Tensor | float) -> tf.Tensor:
    """Output pixel (y, x) shows (y + level * x, x)."""
    return _sample(image, lambda y, x, level: (level * x + y, x), level)


def _shifted_span(size: tf.Tensor, pixels: tf.Tensor | float) -> tuple[tf.Tensor, ...]:
    """Computes the span that a line of `size` pixels shows if output i shows input i + pixels.

    Returns (source start, source stop, fill before, fill after), all int32. Coordinates round half
    away from zero, as in the projective transform: -0.5 is outside, 0.5 is pixel 1.
    """
    pixels = tf.cast(pixels, tf.float32)
    shift = tf.cast(tf.floor(pixels + 0.5), tf.int32)
    before = tf.clip_by_value(tf.cast(tf.floor(0.5 - pixels), tf.int32), 0, size)
    stop = tf.clip_by_value(size - shift, before, size)
    start = tf.clip_by_value(before + shift, 0, size)
    return start, start + stop - before, before, size - stop


def translate_x(image: tf.Tensor, pixels: tf.Tensor | float) -> tf.Tensor:
    """Output pixel (y, x) shows (y, x + pixels): positive values move the image left."""
    start, stop, before, after = _shifted_span(tf.shape(image)[1], pixels)
    rows = _rows(image)
    height = tf.shape(rows)[0]
    parts = [
        tf.fill([height, before * 3], _u8(FILL)),
        rows[:, start * 3 : stop * 3],
        tf.fill([height, after * 3], _u8(FILL)),
    ]
    return _like(tf.concat(parts, axis=1), image)


def translate_y(image: tf.Tensor, pixels: tf.Tensor | float) -> tf.Tensor:
    """Output pixel (y, x) shows (y + pixels, x): positive values move the image up."""
    start, stop, before, after = _shifted_span(tf.shape(image)[0], pixels)
    paddings = [[before, after], [0, 0], [0, 0]]
    result = tf.pad(image[start:stop], paddings, constant_values=FILL)
    return tf.ensure_shape(result, image.shape)


def cutout_at(
    image: tf.Tensor, pad_size: int, cy: tf.Tensor | int, cx: tf.Tensor | int
) -> tf.Tensor:
    """Grays the square of side 2 * pad_size around row `cy`, column `cx`, clipped to the image.

    The square covers rows cy - pad_size to cy + pad_size - 1, and columns likewise.
    """
    height, width = _height_width(image)
    top, bottom = tf.maximum(cy - pad_size, 0), tf.minimum(cy + pad_size, height)
    left, right = tf.maximum(cx - pad_size, 0), tf.minimum(cx + pad_size, width)
    gray = tf.fill([bottom - top, right - left, 3], _u8(FILL))
    band = tf.concat([image[top:bottom, :left], gray, image[top:bottom, right:]], axis=1)
    result = tf.concat([image[:top], band, image[bottom:]], axis=0)
    return tf.ensure_shape(result, image.shape)


# Name → operation. A new op also needs a row in `levels.LEVEL_TO_ARGS`. RandAugment draws from
# `randaugment.RANDAUGMENT_OPS` only.
OPS: dict[str, Callable[..., tf.Tensor]] = {
    "AutoContrast": auto_contrast,
    "Equalize": equalize,
    "Invert": invert,
    "Rotate": rotate,
    "Posterize": posterize,
    "Solarize": solarize,
    "Color": color,
    "Contrast": contrast,
    "Brightness": brightness,
    "Sharpness": sharpness,
    "ShearX": shear_x,
    "ShearY": shear_y,
    "TranslateX": translate_x,
    "TranslateY": translate_y,
    "SolarizeAdd": solarize_add,
    "Cutout": cutout_at,
}


# Randomness.


def random_index(draw: tf.Tensor, size: tf.Tensor | int) -> tf.Tensor:
    """Maps float32 draws from [0, 1) to int32 in 0..size-1."""
    return tf.cast(draw * tf.cast(size, tf.float32), tf.int32)


def cutout(image: tf.Tensor, seed: tf.Tensor, pad_size: int) -> tf.Tensor:
    """Grays a square of side 2 * pad_size centered on a random pixel (SVHN recipe: pad_size 8).

    Args:
      image: uint8 [H, W, 3].
      seed: int32 or int64 [2].
      pad_size: half the side of the square, which is clipped to the image.

    Returns:
      uint8 [H, W, 3].
    """
    height, width = _height_width(image)
    draws = images.uniform(seed, [2])
    return cutout_at(image, pad_size, random_index(draws[0], height), random_index(draws[1], width))
