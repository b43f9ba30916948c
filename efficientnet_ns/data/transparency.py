"""Shows the transparent pixels of images on white, as a page or a viewer does.

The colors that a file stores for its transparent pixels are never seen and are often black, or
streaks that help compression. A decoder that only drops the alpha channel brings them to light.
"""

from __future__ import annotations

import tensorflow as tf

_SIGNATURE, _COLOR_TYPE, _SECOND_CHUNK = b"\x89PNG\r\n\x1a\n", 25, 33
_GRAY_AND_ALPHA, _RGBA = b"\4", b"\6"
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


@tf.function(input_signature=[tf.TensorSpec([], tf.string)], autograph=False)
def _has_transparency(png: tf.Tensor) -> tf.Tensor:
    size = tf.strings.length(png)
    # Zeros after the end, because a damaged file may be shorter; the decoder will name the damage.
    header = tf.strings.join([tf.strings.substr(png, 0, _COLOR_TYPE + 1), b"\0" * _COLOR_TYPE])
    color_type = tf.strings.substr(header, _COLOR_TYPE, 1)

    # Steps from chunk to chunk up to the first pixels, before which tRNS has to be.
    def more(at: tf.Tensor, name: tf.Tensor) -> tf.Tensor:
        return (at + _AROUND <= size) & (name != b"IDAT") & (name != b"tRNS")

    def step(at: tf.Tensor, _: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        digits = tf.cast(tf.io.decode_raw(tf.strings.substr(png, at, 4), tf.uint8), tf.int32)
        length = tf.reduce_sum(digits * tf.constant([0, 1 << 16, 1 << 8, 1]))
        # A chunk of 16 MiB or more is not skipped correctly; before the pixels, there is none.
        return at + _AROUND + length, tf.strings.substr(png, at + 4, 4)

    _, name = tf.while_loop(more, step, (tf.constant(_SECOND_CHUNK), tf.constant(b"")))
    return (color_type == _GRAY_AND_ALPHA) | (color_type == _RGBA) | (name == b"tRNS")


def on_white(pixels: tf.Tensor) -> tf.Tensor:
    """Composites uint8 [H, W, 4] on white: uint8 [H, W, 3]; opaque pixels do not change."""
    # Differs (10) in docs/differences.md.
    wide = tf.cast(pixels, tf.uint16)
    color, alpha = wide[..., :3], wide[..., 3:]
    # At most 255 * 255, to which 128 and then 254 are added: uint16 suffices.
    mixed = color * alpha + 255 * (255 - alpha) + 128
    # (x + x // 256) // 256 is x / 255, rounded, for all of these x, without a division.
    eight = tf.constant(8, tf.uint16)
    mixed += tf.bitwise.right_shift(mixed, eight)
    return tf.cast(tf.bitwise.right_shift(mixed, eight), tf.uint8)
