"""RandAugment (arXiv 1909.13719) and cutout on uint8 images.

The published recipes use magnitudes 6 to 27 on a scale made for 0 to 10, and the original code
never clips: the numbers in the paper come from what its 8-bit arithmetic does out of range. That
behaviour is the default here (`mode="original"`), written out; `mode="clipped"` avoids it.

Every op takes a uint8 image [H, W, 3] first, H and W static or not, and returns uint8 [H, W, 3].
The arguments of geometric ops and the cutout centre may be scalar tensors; all others are Python
numbers.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable

import numpy as np
import tensorflow as tf

with warnings.catch_warnings():
    # It says at import that it is no longer developed, which users of this package cannot act on.
    warnings.simplefilter("ignore", UserWarning)
    import tensorflow_addons as tfa

FILL = 128
MODES = ("original", "clipped")


def _u8(value: int) -> tf.Tensor:
    return tf.constant(value, tf.uint8)


def _height_width(image: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    shape = tf.shape(image)
    return shape[0], shape[1]


# Colour ops.


def _blend(degenerate: tf.Tensor | float, image: tf.Tensor, factor: float) -> tf.Tensor:
    """Moves from `degenerate` (factor 0) through `image` (1) and beyond; clips, then truncates.

    `degenerate` is float32 and broadcastable to the image. The order of the float operations is
    part of the contract: truncation turns a last-bit difference into a different pixel.
    """
    if factor == 1.0:
        return image
    blended = degenerate + factor * (tf.cast(image, tf.float32) - degenerate)
    return tf.cast(tf.clip_by_value(blended, 0.0, 255.0), tf.uint8)


def color(image: tf.Tensor, factor: float) -> tf.Tensor:
    """Saturation: 0 is grayscale, 1 the image itself."""
    return _blend(tf.cast(tf.image.rgb_to_grayscale(image), tf.float32), image, factor)


def contrast(image: tf.Tensor, factor: float) -> tf.Tensor:
    """Contrast around the constant min(H * W / 256, 255); 0 is that constant, 1 the image itself.

    The original means to use the average gray level but averages the 256 histogram counts instead,
    which depends on the image size alone (196 at 224 x 224, 4 at 32 x 32).
    """
    height, width = _height_width(image)
    # int64 because the product may exceed int32.
    pixels = tf.cast(height, tf.int64) * tf.cast(width, tf.int64)
    return _blend(tf.cast(tf.minimum(pixels // 256, 255), tf.float32), image, factor)


def brightness(image: tf.Tensor, factor: float) -> tf.Tensor:
    """Brightness: 0 is black, 1 the image itself."""
    return _blend(0.0, image, factor)


def sharpness(image: tf.Tensor, factor: float) -> tf.Tensor:
    """Sharpness: 0 is smoothed by the kernel [[1, 1, 1], [1, 5, 1], [1, 1, 1]] / 13, 1 the image.

    The one-pixel border is not smoothed, hence never changes.
    """
    if factor == 1.0:
        return image
    height, width = _height_width(image)
    pixels = tf.cast(image, tf.float32)
    # The sum is rounded after each term in row-major order, as a direct 3x3 convolution does it.
    # Negated terms are subtracted because the graph optimizer reorders chains of additions (but
    # not of subtractions), and convolution kernels round differently from CPU to CPU.
    edge, centre = pixels * np.float32(-1 / 13), pixels * np.float32(-5 / 13)
    terms = [
        (centre if (dy, dx) == (1, 1) else edge)[dy : height - 2 + dy, dx : width - 2 + dx]
        for dy in range(3)
        for dx in range(3)
    ]
    smooth = functools.reduce(tf.subtract, terms[1:], -terms[0])
    smooth = tf.cast(tf.clip_by_value(smooth, 0.0, 255.0), tf.uint8)
    inner = _blend(tf.cast(smooth, tf.float32), image[1:-1, 1:-1], factor)
    # max: in an image of one row (column), the first is the last as well and must not come twice.
    last_row, last_column = tf.maximum(height - 1, 1), tf.maximum(width - 1, 1)
    result = tf.concat([image[1:-1, :1], inner, image[1:-1, last_column:]], axis=1)
    return tf.concat([image[:1], result, image[last_row:]], axis=0)


def auto_contrast(image: tf.Tensor) -> tf.Tensor:
    """Stretches each channel to 0..255; a constant channel stays as it is."""
    low = tf.cast(tf.reduce_min(image, axis=[0, 1]), tf.float32)
    high = tf.cast(tf.reduce_max(image, axis=[0, 1]), tf.float32)
    stretch = high > low
    scale = tf.where(stretch, 255.0 / tf.where(stretch, high - low, 1.0), 1.0)
    offset = tf.where(stretch, -low * scale, 0.0)
    stretched = tf.cast(image, tf.float32) * scale + offset
    return tf.cast(tf.clip_by_value(stretched, 0.0, 255.0), tf.uint8)


def equalize(image: tf.Tensor) -> tf.Tensor:
    """Equalizes the histogram of each channel, with PIL's integer arithmetic."""
    # One table for all channels: channel c looks up entries 256 * c and following.
    index = tf.cast(image, tf.int32) + tf.constant([0, 256, 512])
    counts = tf.math.bincount(tf.reshape(index, [-1]), minlength=768, maxlength=768)
    cumulative = tf.cumsum(tf.reshape(counts, [3, 256]), axis=1)
    total = cumulative[:, -1:]
    # PIL leaves the highest occupied level out of the step: the largest count below the total.
    below_last = tf.reduce_max(tf.where(cumulative < total, cumulative, 0), axis=1, keepdims=True)
    step = below_last // 255
    levels = (cumulative[:, :-1] + step // 2) // tf.maximum(step, 1)
    levels = tf.pad(tf.clip_by_value(levels, 0, 255), [[0, 0], [1, 0]])
    table = tf.where(step > 0, levels, tf.range(256))
    return tf.gather(tf.cast(tf.reshape(table, [768]), tf.uint8), index)


def invert(image: tf.Tensor) -> tf.Tensor:
    """255 - image."""
    return _u8(255) - image


def _kept_bits(bits: int) -> int:
    # The shift 8 - bits is a uint8 in the original: negative ones wrap to about 250, and the kernel
    # limits every shift to 7. Both 0 bits and more than 8 therefore leave one bit.
    return bits if 1 <= bits <= 8 else 1


def posterize(image: tf.Tensor, bits: int) -> tf.Tensor:
    """Keeps the `bits` highest bits; outside 1..8 only one bit is left (see `_kept_bits`)."""
    return tf.bitwise.bitwise_and(image, _u8(0xFF & (0xFF << (8 - _kept_bits(bits)))))


def _invert_from(image: tf.Tensor, threshold: int) -> tf.Tensor:
    """Inverts pixels of `threshold` (0..256) and above."""
    if threshold > 255:
        return image
    # 255 - x is x with all bits flipped; a select costs several times as much.
    mask = tf.cast(image >= _u8(threshold), tf.uint8) * _u8(255)
    return tf.bitwise.bitwise_xor(image, mask)


def solarize(image: tf.Tensor, threshold: int) -> tf.Tensor:
    """Inverts pixels of at least `threshold` modulo 256, as the original's uint8 does."""
    return _invert_from(image, threshold % 256)


def solarize_add(image: tf.Tensor, addition: int, threshold: int = 128) -> tf.Tensor:
    """Adds `addition` to pixels below `threshold` (modulo 256), saturating at 0 and 255."""
    below = tf.cast(image < _u8(threshold % 256), tf.uint8)
    if addition >= 0:
        return image + below * tf.minimum(_u8(min(addition, 255)), _u8(255) - image)
    return image - below * tf.minimum(_u8(min(-addition, 255)), image)


# Geometric ops: nearest neighbour, gray where the source lies outside.


def _transform(image: tf.Tensor, coefficients: list) -> tf.Tensor:
    result = tfa.image.transform(image, coefficients, interpolation="nearest", fill_value=FILL)
    return tf.ensure_shape(result, image.shape)


def rotate(image: tf.Tensor, degrees: tf.Tensor | float) -> tf.Tensor:
    """Rotates about the centre, counterclockwise for positive `degrees`."""
    radians = tf.cast(degrees, tf.float32) * (math.pi / 180.0)
    result = tfa.image.rotate(image, radians, interpolation="nearest", fill_value=FILL)
    return tf.ensure_shape(result, image.shape)


def shear_x(image: tf.Tensor, level: tf.Tensor | float) -> tf.Tensor:
    """Output pixel (y, x) shows (y, x + level * y)."""
    return _transform(image, [1.0, level, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0])


def shear_y(image: tf.Tensor, level: tf.Tensor | float) -> tf.Tensor:
    """Output pixel (y, x) shows (y + level * x, x)."""
    return _transform(image, [1.0, 0.0, 0.0, level, 1.0, 0.0, 0.0, 0.0])


def _shifted_span(size: tf.Tensor, pixels: tf.Tensor | float) -> tuple[tf.Tensor, ...]:
    """Where a line of `size` pixels lands when output i shows input i + pixels.

    Returns (source start, source stop, fill before, fill after), all int32. Coordinates round half
    away from zero, as the projective transform rounds them: -0.5 is outside, 0.5 is pixel 1.
    """
    pixels = tf.cast(pixels, tf.float32)
    shift = tf.cast(tf.floor(pixels + 0.5), tf.int32)
    before = tf.clip_by_value(tf.cast(tf.floor(0.5 - pixels), tf.int32), 0, size)
    stop = tf.clip_by_value(size - shift, before, size)
    start = tf.clip_by_value(before + shift, 0, size)
    return start, start + stop - before, before, size - stop


def translate_x(image: tf.Tensor, pixels: tf.Tensor | float) -> tf.Tensor:
    """Output pixel (y, x) shows (y, x + pixels): positive values move the image to the left."""
    start, stop, before, after = _shifted_span(tf.shape(image)[1], pixels)
    paddings = [[0, 0], [before, after], [0, 0]]
    result = tf.pad(image[:, start:stop], paddings, constant_values=FILL)
    return tf.ensure_shape(result, image.shape)


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

    It covers rows cy - pad_size to cy + pad_size - 1, and columns alike.
    """
    height, width = _height_width(image)
    top, bottom = tf.maximum(cy - pad_size, 0), tf.minimum(cy + pad_size, height)
    left, right = tf.maximum(cx - pad_size, 0), tf.minimum(cx + pad_size, width)
    gray = tf.fill([bottom - top, right - left, 3], _u8(FILL))
    band = tf.concat([image[top:bottom, :left], gray, image[top:bottom, right:]], axis=1)
    result = tf.concat([image[:top], band, image[bottom:]], axis=0)
    return tf.ensure_shape(result, image.shape)


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

RANDAUGMENT_OPS: tuple[str, ...] = tuple(OPS)

# Ops whose argument is negated in half of the draws.
SIGNED_OPS = frozenset({"Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY"})


# Magnitudes.


def _f32(value: float) -> float:
    """Rounds to float32, in which the original carries the signed arguments."""
    return float(np.float32(value))


def _no_args(magnitude: float, cutout_const: float, translate_const: float) -> tuple:
    return ()


def _enhance_args(magnitude: float, cutout_const: float, translate_const: float) -> tuple:
    return (magnitude / 10 * 1.8 + 0.1,)


def _shear_args(magnitude: float, cutout_const: float, translate_const: float) -> tuple:
    return (_f32(magnitude / 10 * 0.3),)


def _translate_args(magnitude: float, cutout_const: float, translate_const: float) -> tuple:
    return (_f32(magnitude / 10 * translate_const),)


# (magnitude, cutout_const, translate_const) -> arguments of the op; nothing is clipped.
LEVEL_TO_ARGS: dict[str, Callable[[float, float, float], tuple]] = {
    "AutoContrast": _no_args,
    "Equalize": _no_args,
    "Invert": _no_args,
    "Rotate": lambda m, _cutout, _translate: (_f32(m / 10 * 30.0),),
    "Posterize": lambda m, _cutout, _translate: (int(m / 10 * 4),),
    "Solarize": lambda m, _cutout, _translate: (int(m / 10 * 256),),
    "Color": _enhance_args,
    "Contrast": _enhance_args,
    "Brightness": _enhance_args,
    "Sharpness": _enhance_args,
    "ShearX": _shear_args,
    "ShearY": _shear_args,
    "TranslateX": _translate_args,
    "TranslateY": _translate_args,
    "SolarizeAdd": lambda m, _cutout, _translate: (int(m / 10 * 110),),
    "Cutout": lambda m, cutout, _translate: (int(m / 10 * cutout),),
}

# mode="clipped": (args, cutout_const, translate_const) -> args in a range that keeps an image.
_CLIP_ARGS: dict[str, Callable[[tuple, float, float], tuple]] = {
    "Posterize": lambda args, _cutout, _translate: (min(max(args[0], 1), 8),),
    "Solarize": lambda args, _cutout, _translate: (min(max(args[0], 0), 256),),
    "SolarizeAdd": lambda args, _cutout, _translate: (min(args[0], 128),),
    "TranslateX": lambda args, _cutout, translate: (min(args[0], _f32(translate)),),
    "TranslateY": lambda args, _cutout, translate: (min(args[0], _f32(translate)),),
    "Cutout": lambda args, cutout, _translate: (min(args[0], int(cutout)),),
}

# A clipped threshold of 256 means "invert nothing", where the original wraps it to 0.
_CLIPPED_OPS = {"Solarize": _invert_from}


def _policy(
    magnitude: float, cutout_const: float, translate_const: float, use_cutout: bool, mode: str
) -> dict[str, tuple]:
    """The ops to draw from, in order, with their (positive) arguments."""
    if mode not in MODES:
        raise ValueError(f"RandAugment mode {mode!r} is unknown; allowed: {', '.join(MODES)}")
    names = [name for name in RANDAUGMENT_OPS if use_cutout or name != "Cutout"]
    policy = {name: LEVEL_TO_ARGS[name](magnitude, cutout_const, translate_const) for name in names}
    if mode == "clipped":
        for name in _CLIP_ARGS.keys() & policy.keys():
            policy[name] = _CLIP_ARGS[name](policy[name], cutout_const, translate_const)
    return policy


def _random_index(draw: tf.Tensor, size: tf.Tensor | int) -> tf.Tensor:
    """Maps a float32 draw from [0, 1) to an int32 in 0..size-1."""
    return tf.cast(draw * tf.cast(size, tf.float32), tf.int32)


def _uniform(seed: tf.Tensor, shape: list[int]) -> tf.Tensor:
    # The algorithm is named so that every kind of device draws the same numbers.
    return tf.random.stateless_uniform(shape, seed, alg="philox")


def rand_augment(
    image: tf.Tensor,
    seed: tf.Tensor,
    *,
    num_layers: int,
    magnitude: float,
    cutout_const: float = 40.0,
    translate_const: float = 100.0,
    use_cutout: bool = True,
    mode: str = "original",
) -> tf.Tensor:
    """Applies `num_layers` ops, each drawn uniformly from `RANDAUGMENT_OPS`.

    Args:
      image: uint8 [H, W, 3].
      seed: int32 or int64 [2]; equal seeds give equal results. Another random op on the same image
        needs another seed.
      num_layers: ops applied one after the other (N of RandAugment).
      magnitude: M of RandAugment; 10 is the nominal maximum, the published recipes go up to 27.
      cutout_const: half side of the Cutout square at magnitude 10, in pixels.
      translate_const: translation at magnitude 10, in pixels.
      use_cutout: whether Cutout is among the ops (16 ops, otherwise 15).
      mode: "original" passes the arguments of `LEVEL_TO_ARGS` on unclipped. Posterize then leaves a
        single bit from magnitude 22.5 up, Solarize uses its threshold modulo 256, SolarizeAdd
        merges all dark pixels into white, Translate and Cutout may gray the whole image.
        "clipped" limits Posterize to 1..8 bits, the Solarize threshold to 0..256 (256 inverts
        nothing), the SolarizeAdd addition to 128 (dark pixels stay distinct), and Translate and
        Cutout to their size at magnitude 10. Rotate, Shear and the four blending ops are the same
        in both modes.

    Returns:
      uint8 [H, W, 3], with the static shape of `image`.
    """
    policy = _policy(magnitude, cutout_const, translate_const, use_cutout, mode)
    # Differs (7), on request only: levels above 10 are clipped.
    ops = {**OPS, **_CLIPPED_OPS} if mode == "clipped" else OPS

    def apply(name: str, image: tf.Tensor, draws: tf.Tensor) -> tf.Tensor:
        args = policy[name]
        if name in SIGNED_OPS:
            args = (tf.where(draws[1] < 0.5, -args[0], args[0]),)
        if name == "Cutout":
            height, width = _height_width(image)
            args += (_random_index(draws[2], height), _random_index(draws[3], width))
        return ops[name](image, *args)

    static_shape = image.shape
    draws = _uniform(seed, [num_layers, 4])  # op, sign, cutout row, cutout column
    for layer in range(num_layers):
        branches = [functools.partial(apply, name, image, draws[layer]) for name in policy]
        image = tf.switch_case(_random_index(draws[layer, 0], len(branches)), branches)
        image = tf.ensure_shape(image, static_shape)
    return image


def cutout(image: tf.Tensor, seed: tf.Tensor, pad_size: int) -> tf.Tensor:
    """Grays a square of side 2 * pad_size centred on a random pixel (SVHN recipe: pad_size 8).

    Args:
      image: uint8 [H, W, 3].
      seed: int32 or int64 [2].
      pad_size: half the side of the square; parts outside the image are cut off.

    Returns:
      uint8 [H, W, 3].
    """
    height, width = _height_width(image)
    draws = _uniform(seed, [2])
    return cutout_at(
        image, pad_size, _random_index(draws[0], height), _random_index(draws[1], width)
    )


# What an argument out of range comes to in mode "original", for the log line.
_EFFECTIVE: dict[str, Callable[[int], int]] = {
    "Posterize": _kept_bits,
    "Solarize": lambda threshold: threshold % 256,
    "SolarizeAdd": lambda addition: min(addition, 255),
}


def _describe_op(name: str, args: tuple, mode: str) -> str:
    if not args:
        return name
    sign = "±" if name in SIGNED_OPS else ""
    effective = _EFFECTIVE.get(name, lambda arg: arg)(args[0])
    note = f"→{effective}" if mode == "original" and effective != args[0] else ""
    return f"{name}({sign}{round(args[0], 4)}{note})"


def describe_rand_augment(
    *,
    num_layers: int,
    magnitude: float,
    cutout_const: float = 40.0,
    translate_const: float = 100.0,
    use_cutout: bool = True,
    mode: str = "original",
) -> str:
    """The policy in one line for logs; `Solarize(691→179)` means 691 was asked for and 179 acts."""
    policy = _policy(magnitude, cutout_const, translate_const, use_cutout, mode)
    ops = ", ".join(_describe_op(name, args, mode) for name, args in policy.items())
    suffix = "" if mode == "original" else f", mode={mode}"
    return f"randaugment(N={num_layers}, M={magnitude}{suffix}): {ops}"
