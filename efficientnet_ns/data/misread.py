"""Rejects image files that TensorFlow silently decodes to wrong pixels.

TensorFlow interprets the indices of 8-bit BMPs as gray values, the channels of all 32-bit BMPs as
blue, green and red in this order, transparent GIF pixels as black, and the first frame of a GIF as
the whole image. It decodes PNG and JPEG correctly.
"""

from __future__ import annotations

import tensorflow as tf

_BMP, _GIF, _RIFF = b"BM", b"GIF8", b"RIFF"
SIGNATURES = (_BMP, _GIF, _RIFF)

_FILE_HEADER = 14  # Bytes before the header that gives the size of a BMP.
_COLOR_MASKS = (0xFF0000, 0xFF00, 0xFF)
_STRING = [tf.TensorSpec([], tf.string)]
# Called, not copied into the caller's graph, where skipping the nodes of a check that is not needed
# takes longer than decoding a small JPEG.
CALLED = {"_noinline": True}
_EXTENSION, _IMAGE, _GRAPHIC_CONTROL = 0x21, 0x2C, 0xF9


def refuse(image_bytes: tf.Tensor) -> tf.Tensor:
    """Returns the same bytes, scalar string, unless TensorFlow's decoder would misread them.

    Raises tf.errors.InvalidArgumentError when the op runs on such an image. Damaged files pass,
    because the decoder's message is better.
    """
    faithful, message = tf.case(
        [
            (_starts_with(image_bytes, _BMP), lambda: _bmp(image_bytes)),
            (_starts_with(image_bytes, _GIF), lambda: _gif(image_bytes)),
            # Releases after 2.15 read WebP; records and predictions must not depend on the release.
            (
                _starts_with(image_bytes, _RIFF),
                lambda: (tf.constant(False), tf.constant("not all TensorFlow releases read WebP")),
            ),
        ],
        default=lambda: (tf.constant(True), tf.constant("")),
    )
    if tf.executing_eagerly() and not faithful:  # An assertion would wrap the message.
        raise tf.errors.InvalidArgumentError(None, None, message.numpy().decode())
    with tf.control_dependencies([tf.debugging.Assert(faithful, [message])]):
        return tf.identity(image_bytes)


def _starts_with(text: tf.Tensor, prefix: bytes) -> tf.Tensor:
    return tf.equal(tf.strings.substr(text, 0, len(prefix)), prefix)


def _bytes(image_bytes: tf.Tensor, padding: int) -> tf.Tensor:
    """Returns uint8 [length + padding] with zeros after the end, so every offset can be read."""
    return tf.pad(tf.io.decode_raw(image_bytes, tf.uint8), [[0, padding]])


def _number(values: tf.Tensor, first: int | tf.Tensor, size: int) -> tf.Tensor:
    """Returns the little-endian integer of `size` bytes at `first`, int64."""
    weights = tf.constant([256**place for place in range(size)], tf.int64)
    return tf.reduce_sum(tf.cast(values[first : first + size], tf.int64) * weights)


@tf.function(input_signature=_STRING, autograph=False, experimental_attributes=CALLED)
def _bmp(image_bytes: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    longest = _FILE_HEADER + 124 + 256 * 4
    values = _bytes(tf.strings.substr(image_bytes, 0, longest), longest)
    # File header: offset of the pixels. Second header: its size, bits per pixel, compression and,
    # from byte 54, the channel masks.
    offset, header = _number(values, 10, 4), _number(values, _FILE_HEADER, 4)
    bits, compression = _number(values, 28, 2), _number(values, 30, 4)
    masks = [_number(values, 54 + 4 * place, 4) for place in range(3)]
    ordered = tf.reduce_all(tf.equal(masks, tf.constant(_COLOR_MASKS, tf.int64)))

    # TensorFlow assumes that every palette is the identity gray map.
    start = tf.minimum(_FILE_HEADER + header, longest)
    colors = tf.clip_by_value((offset - start) // 4, 0, 256)
    palette = tf.reshape(values[start : start + 256 * 4], [256, 4])[:, :3]
    place = tf.range(256, dtype=tf.int64)[:, None]
    gray = tf.cast(palette, tf.int64) == place
    gray = (colors > 0) & tf.reduce_all(gray | (place >= colors))

    plain = compression == 0
    # Headers of fewer than 40 bytes have a different layout.
    faithful = (header >= 40) & (
        (plain & (bits == 24))
        | ((plain | ((compression == 3) & ordered)) & (bits == 32))
        | (plain & (bits == 8) & gray)
    )
    return faithful, tf.constant(
        "TensorFlow does not read BMPs with this palette, compression or color order"
    )


@tf.function(input_signature=_STRING, autograph=False, experimental_attributes=CALLED)
def _gif(image_bytes: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    values = _bytes(image_bytes, 16)
    end = tf.size(values, tf.int64) - 16
    flags = _number(values, 10, 1)
    # The global palette, which follows the 13-byte header if the top bit is set.
    table = tf.where(flags >= 128, 3 * 2 ** (flags % 8 + 1), tf.zeros([], tf.int64))

    # Steps through the extensions before the first image and through the blocks of each.
    def more(at: tf.Tensor, within: tf.Tensor, _transparent: tf.Tensor) -> tf.Tensor:
        return (at < end) & (within | (values[at] == _EXTENSION))

    def step(at: tf.Tensor, within: tf.Tensor, transparent: tf.Tensor) -> tuple[tf.Tensor, ...]:
        length = _number(values, at, 1)
        declared = ~within & (values[at + 1] == _GRAPHIC_CONTROL) & (values[at + 3] % 2 == 1)
        after = tf.minimum(at + tf.where(within, length + 1, 2), end)
        return after, ~within | (length > 0), transparent | declared

    at, _, transparent = tf.while_loop(
        more, step, (13 + table, tf.constant(False), tf.constant(False))
    )
    at = tf.minimum(at, end)
    left, top, width, height = [_number(values, at + 1 + 2 * place, 2) for place in range(4)]
    # Not larger either: the header is what limits on the size of images look at.
    whole = (left + top == 0) & (width == _number(values, 6, 2)) & (height == _number(values, 8, 2))
    faithful = (values[at] != _IMAGE) | (whole & ~transparent)
    return faithful, tf.constant(
        "TensorFlow does not read GIFs with transparency or a first frame that is not the whole image"
    )
