"""Shows the transparent pixels of images on white, as a page or a viewer does.

The colors that a file stores for its transparent pixels are never seen and are often black, or
streaks that help compression. A decoder that only drops the alpha channel brings them to light.
"""

from __future__ import annotations

import tensorflow as tf

from efficientnet_ns.data import misread

_SIGNATURE, _COLOR_TYPE, _SECOND_CHUNK = b"\x89PNG\r\n\x1a\n", 25, 33
_GRAY_AND_ALPHA, _RGBA = b"\4", b"\6"
_MOST_CHUNKS = 1000
_BLOCK = 1 << 20  # Pixels.
# A chunk: length (4 bytes, big-endian), name (4), content, checksum (4).
_AROUND = 12


def is_transparent_png(image_bytes: tf.Tensor) -> tf.Tensor:
    """Returns whether a scalar string is a PNG with an alpha channel or a tRNS chunk, bool."""
    signature = tf.strings.substr(image_bytes, 0, len(_SIGNATURE))
    return tf.cond(
        tf.equal(signature, _SIGNATURE),
        lambda: _has_transparency(image_bytes),
        lambda: tf.constant(False),
    )


@tf.function(
    input_signature=[tf.TensorSpec([], tf.string)],
    autograph=False,
    experimental_attributes=misread.CALLED,
)
def _has_transparency(png: tf.Tensor) -> tf.Tensor:
    # Zeros after the end, because a damaged file may be shorter; the decoder will name the damage.
    header = tf.strings.join([tf.strings.substr(png, 0, _COLOR_TYPE + 1), b"\0" * _COLOR_TYPE])
    color_type = tf.strings.substr(header, _COLOR_TYPE, 1)
    with_alpha = (color_type == _GRAY_AND_ALPHA) | (color_type == _RGBA)
    return tf.cond(with_alpha, lambda: tf.constant(True), lambda: _has_trns(png))


def _has_trns(png: tf.Tensor) -> tf.Tensor:
    size = tf.cast(tf.strings.length(png), tf.int64)

    # Steps from chunk to chunk up to the first pixels, before which tRNS has to be.
    def more(at: tf.Tensor, name: tf.Tensor) -> tf.Tensor:
        return (at + _AROUND <= size) & (name != b"IDAT") & (name != b"tRNS")

    def step(at: tf.Tensor, _: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        digits = tf.cast(tf.io.decode_raw(tf.strings.substr(png, at, 4), tf.uint8), tf.int64)
        length = tf.reduce_sum(digits * tf.constant([1 << 24, 1 << 16, 1 << 8, 1], tf.int64))
        return at + _AROUND + length, tf.strings.substr(png, at + 4, 4)

    start = (tf.constant(_SECOND_CHUNK, tf.int64), tf.constant(b""))
    # A file made of empty chunks must not occupy a server.
    _, name = tf.while_loop(more, step, start, maximum_iterations=_MOST_CHUNKS)
    return name == b"tRNS"


@tf.function(
    input_signature=[tf.TensorSpec([None, None, 4], tf.uint8)],
    autograph=False,
    experimental_attributes=misread.CALLED,
)
def on_white(pixels: tf.Tensor) -> tf.Tensor:
    """Composites uint8 [H, W, 4] on white: uint8 [H, W, 3]; opaque pixels do not change."""
    # Differs (10) in docs/differences.md.
    flat = tf.reshape(pixels, [-1, 4])
    size = tf.shape(flat)[0]
    blocks = (size + _BLOCK - 1) // _BLOCK
    parts = tf.TensorArray(tf.uint8, blocks, infer_shape=False, element_shape=[None, 3])

    def step(number: tf.Tensor, done: tf.TensorArray) -> tuple[tf.Tensor, tf.TensorArray]:
        at = number * _BLOCK
        return number + 1, done.write(number, _composited(flat[at : at + _BLOCK]))

    # One after the other, for the memory of the wide numbers.
    _, parts = tf.while_loop(
        lambda number, _: number < blocks, step, (0, parts), parallel_iterations=1
    )
    return tf.reshape(parts.concat(), [tf.shape(pixels)[0], tf.shape(pixels)[1], 3])


def _composited(pixels: tf.Tensor) -> tf.Tensor:
    wide = tf.cast(pixels, tf.uint16)
    color, alpha = wide[..., :3], wide[..., 3:]
    # At most 255 * 255, to which 128 and then 254 are added: uint16 suffices.
    mixed = color * alpha + 255 * (255 - alpha) + 128
    # (x + x // 256) // 256 is x / 255, rounded, for all of these x, without a division.
    eight = tf.constant(8, tf.uint16)
    mixed += tf.bitwise.right_shift(mixed, eight)
    return tf.cast(tf.bitwise.right_shift(mixed, eight), tf.uint8)
