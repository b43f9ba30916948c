"""Reads the size of an image from the first bytes of its file, in the graph, before decoding.

A file of a few kilobytes can claim billions of pixels, so a server that accepts untrusted images must
check what decoding would allocate. `data.image_headers` does the same outside graphs.
"""

from __future__ import annotations

import tensorflow as tf

from efficientnet_ns.data.image_headers import MAX_PIXELS

_HEADER = 32  # Bytes; PNG and BMP have their sides within the first 26.
_PNG, _GIF, _BMP = b"\x89PNG\r\n\x1a\n", b"GIF8", b"BM"


def num_pixels(image_bytes: tf.Tensor) -> tf.Tensor:
    """Returns height times width of an encoded image, scalar string → int64 scalar.

    Returns 0 for an unknown format, which no decoder accepts. For a JPEG without a readable header,
    the op raises tf.errors.InvalidArgumentError when it runs.
    """
    start = tf.strings.substr(image_bytes, 0, _HEADER)
    header = tf.cast(tf.io.decode_raw(start, tf.uint8), tf.int64)
    # Pads a short file with zeros, so that it has no pixels; the decoder rejects it.
    header = tf.pad(header, [[0, _HEADER - tf.size(header)]])

    def number(first: int, size: int, little_endian: bool) -> tf.Tensor:
        powers = [256**place for place in range(size)]
        weights = powers if little_endian else powers[::-1]
        return tf.reduce_sum(header[first : first + size] * tf.constant(weights, tf.int64))

    def jpeg() -> tf.Tensor:
        return tf.reduce_prod(tf.cast(tf.image.extract_jpeg_shape(image_bytes)[:2], tf.int64))

    # The height of a BMP is negative (two's complement) if its rows are stored from top to bottom.
    bmp_height = number(22, 4, True)
    bmp_height = tf.where(bmp_height < 2**31, bmp_height, 2**32 - bmp_height)
    # Functions, because extract_jpeg_shape fails on other formats: only the op of the case runs. In
    # PNG, the sides are big-endian, after an 8-byte signature and the 8-byte length and name of a chunk.
    cases = [
        (tf.io.is_jpeg(image_bytes), jpeg),
        (_starts_with(start, _PNG), lambda: number(16, 4, False) * number(20, 4, False)),
        (_starts_with(start, _GIF), lambda: number(6, 2, True) * number(8, 2, True)),
        (_starts_with(start, _BMP), lambda: number(18, 4, True) * bmp_height),
    ]
    return tf.case(cases, default=lambda: tf.zeros([], tf.int64))


def _starts_with(text: tf.Tensor, prefix: bytes) -> tf.Tensor:
    return tf.equal(tf.strings.substr(text, 0, len(prefix)), prefix)


def refuse_large(image_bytes: tf.Tensor, max_pixels: int = MAX_PIXELS) -> tf.Tensor:
    """Passes encoded bytes, scalar string, through unless their header claims too many pixels.

    If it claims more than `max_pixels`, the op raises tf.errors.InvalidArgumentError when it runs.
    """
    pixels = num_pixels(image_bytes)
    check = tf.debugging.Assert(
        pixels <= max_pixels, [f"image larger than {max_pixels} pixels:", pixels]
    )
    with tf.control_dependencies([check]):
        return tf.identity(image_bytes)
