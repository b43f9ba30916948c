"""Averages the probabilities of several views of an image for test-time augmentation.

Evaluation (`--eval_views`) starts from evaluation crops, labeling (`--test_time_views`) from encoded
images, which ten views require.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import tensorflow as tf

from efficientnet_ns.data import fingerprints, images

VIEWS = (1, 2, 10)
# Numbers of views that only need the crop: itself, and also mirrored. Ten need the whole image.
CROP_VIEWS = (1, 2)

Array = TypeVar("Array", np.ndarray, tf.Tensor)


def of_crops(crops: tf.Tensor, views: int) -> tf.Tensor:
    """Maps evaluation crops [..., S, S, 3] to V views [..., V, S, S, 3]; V is in `CROP_VIEWS`."""
    if views == 1:
        return tf.expand_dims(crops, -4)
    return tf.stack([crops, crops[..., ::-1, :]], -4)


def average(classify: Callable[[Array], Array], pixels: Array) -> Array:
    """Averages the probabilities over the views of each image.

    Args:
      classify: pixels float32 [N, S, S, 3] → probabilities float32 [N, C].
      pixels: float32 [N, V, S, S, 3].

    Returns:
      float32 [N, C].
    """
    # One view at a time uses the memory of one batch, not of all views.
    number = pixels.shape[1]
    total = classify(pixels[:, 0])
    for view in range(1, number):
        total = total + classify(pixels[:, view])
    return total / number


def decoder(
    prepare: Callable[[tf.Tensor], tf.Tensor],
    size: int,
    views: int = 1,
    *,
    crop_fraction: float | None = None,
    grids: bool = False,
    decode_image: Callable[[tf.Tensor], tf.Tensor] | None = None,
) -> Callable:
    """Compiles a function: encoded images, string [N] → pixels float32 [N, V, size, size, 3].

    The function processes its images one after the other on the calling thread; to use several
    cores, call it from several threads. It raises tf.errors.InvalidArgumentError for an image that
    cannot be decoded.

    Args:
      prepare: the evaluation preprocessing of one image, `Preprocessing.evaluate`; ten views crop
        the decoded image themselves.
      size: side of the result in pixels.
      views: V, one of `VIEWS`.
      crop_fraction: crop fraction of the squares of ten views; see `images.center_crop_box`.
      grids: whether to also return `fingerprints.grid` of each image, float32 [N, G, G]. Images are
        then decoded completely, even if a crop would suffice; the pixels are the same.
      decode_image: replaces `images.decode`; images are then decoded completely.
    """
    signature: Any = tf.TensorSpec([views, size, size, 3], tf.float32)
    pixels_shape = signature.shape
    if grids:
        shape = [fingerprints.GRID, fingerprints.GRID]
        signature = (signature, tf.TensorSpec(shape, tf.float32))

    def one(image: tf.Tensor) -> Any:
        if grids or decode_image:
            image = (decode_image or images.decode)(image)
        found = _ten(image, size, crop_fraction) if views == 10 else of_crops(prepare(image), views)
        found = tf.ensure_shape(found, pixels_shape)
        return (found, fingerprints.grid(image)) if grids else found

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
    def decode(encoded):
        return tf.map_fn(one, encoded, fn_output_signature=signature, parallel_iterations=1)

    return decode.get_concrete_function()


def _ten(image: tf.Tensor, size: int, crop_fraction: float | None) -> tf.Tensor:
    """Cuts squares of the evaluation crop's size at the center and corners, then mirrors them."""
    pixels = images.decode(image) if image.dtype == tf.string else image
    height, width = tf.unstack(tf.shape(pixels)[:2])
    center = images.center_crop_box(height, width, size, crop_fraction)
    bottom, right = height - center[2], width - center[2]
    corners = [(0, 0), (0, right), (bottom, 0), (bottom, right)]
    boxes = [center] + [tf.stack([y, x, center[2], center[3]]) for y, x in corners]
    plain = tf.stack([images.crop_and_resize(pixels, box, size) for box in boxes])
    return tf.concat([plain, plain[:, :, ::-1]], 0)
