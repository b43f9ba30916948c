"""A teacher that is noised while it labels: what the paper's ablation of noise warns of (§4.1).

All draws are functions of the seed and of the images of a batch, so labels repeat with its size.
"""

from __future__ import annotations

from collections.abc import Callable

import tensorflow as tf

from efficientnet_ns.data import pipeline
from efficientnet_ns.models import layers

_IMAGES, _MODEL = 1, 2  # Salts.


def augmented(preprocessing: pipeline.Preprocessing, seed: int) -> Callable[[tf.Tensor], tf.Tensor]:
    """A function: encoded image → float32 [S, S, 3], augmented by a draw of its own."""

    def prepare(image: tf.Tensor) -> tf.Tensor:
        number = tf.strings.to_hash_bucket_fast(image, 2**31 - 1)
        own = tf.stack([tf.constant(seed, tf.int64), number])
        own = tf.random.experimental.stateless_fold_in(own, _IMAGES)
        return tf.cast(preprocessing.train(image, own), tf.float32)

    return prepare


class NoisedTeacher:
    """`model` with dropout and stochastic depth on; batch norm keeps to its moving statistics.

    Args:
      model: pixels → logits; its batch norm is frozen.
      seed: of the noise, with the pixels of the batch.
    """

    def __init__(self, model: tf.keras.Model, seed: int):
        self._model, self._seed = model, seed
        for layer in model.layers:
            if isinstance(layer, layers.BatchNorm):
                layer.trainable = False

    def __call__(self, pixels: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Pixels float32 [N, S, S, 3] → logits [N, C]; noised whatever `training` is."""
        del training
        # Whole numbers, whose sum does not depend on their order.
        batch = tf.reduce_sum(tf.cast(pixels, tf.int32))
        seed = layers.fold_in(tf.stack([self._seed, batch]), _MODEL)
        with layers.noise_seed(seed):
            return self._model(pixels, training=True)
