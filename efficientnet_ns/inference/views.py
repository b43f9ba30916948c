"""Several views of one image, for test-time augmentation: probabilities are averaged over them."""

from __future__ import annotations

from collections.abc import Callable

import tensorflow as tf

from efficientnet_ns.data import images


def _one(prepare: Callable, image: tf.Tensor, size: int) -> tf.Tensor:
    return prepare(image)[tf.newaxis]


def _mirrored(prepare: Callable, image: tf.Tensor, size: int) -> tf.Tensor:
    pixels = prepare(image)
    return tf.stack([pixels, pixels[:, ::-1]])


def _ten(prepare: Callable, image: tf.Tensor, size: int) -> tf.Tensor:
    """Squares of the evaluation crop's size in the four corners and the centre, and mirrored."""
    pixels = images.decode(image)
    height, width = tf.unstack(tf.shape(pixels)[:2])
    centre = images.center_crop_box(height, width, size)
    bottom, right = height - centre[2], width - centre[2]
    corners = [(0, 0), (0, right), (bottom, 0), (bottom, right)]
    boxes = [centre] + [tf.stack([y, x, centre[2], centre[3]]) for y, x in corners]
    views = tf.stack([images.crop_and_resize(pixels, box, size) for box in boxes])
    return tf.concat([views, views[:, :, ::-1]], 0)


# Number of views → function of (the evaluation preprocessing, encoded image, side in pixels).
VIEWS = {1: _one, 2: _mirrored, 10: _ten}


def decoder(prepare: Callable[[tf.Tensor], tf.Tensor], size: int, views: int = 1) -> Callable:
    """A compiled function: encoded images, string [N] → pixels float32 [N, V, size, size, 3].

    It works through its images one after the other: whoever has several cores calls it from as
    many threads. An image that cannot be decoded raises tf.errors.InvalidArgumentError.

    Args:
      prepare: the evaluation preprocessing of one image; ten views crop by themselves.
      size: side of the result in pixels.
      views: V, one of `VIEWS`.
    """
    signature = tf.TensorSpec([views, size, size, 3], tf.float32)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
    def decode(encoded):
        return tf.map_fn(
            lambda image: tf.ensure_shape(VIEWS[views](prepare, image, size), signature.shape),
            encoded,
            fn_output_signature=signature,
            parallel_iterations=1,
        )

    return decode.get_concrete_function()
