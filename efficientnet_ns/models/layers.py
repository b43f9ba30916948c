"""Layers that Keras does not have in the form EfficientNet was trained with.

All noise is stateless. A training step opens `noise_seed(seed)` around the forward pass; every
noisy layer folds its own name into that seed, so the same (seed, step) always draws the same
noise, whatever ran before. Outside such a scope (plain `model.fit`) the seed comes from
TensorFlow's global generator.
"""

from __future__ import annotations

import contextlib
import threading
import zlib
from collections.abc import Iterator, Sequence

import tensorflow as tf

_scope = threading.local()  # Replica functions of one step run in threads of their own.


@contextlib.contextmanager
def noise_seed(seed: tf.Tensor) -> Iterator[None]:
    """Makes dropout and stochastic depth inside the block draw from `seed`.

    Args:
      seed: int32 [2].
    """
    outer = getattr(_scope, "seed", None)
    _scope.seed = seed
    try:
        yield
    finally:
        _scope.seed = outer


def _layer_seed(name: str) -> tf.Tensor:
    seed = getattr(_scope, "seed", None)
    if seed is None:
        seed = tf.random.uniform([2], maxval=tf.int32.max, dtype=tf.int32)
    return tf.random.experimental.stateless_fold_in(seed, zlib.crc32(name.encode()) & 0x7FFFFFFF)


@tf.keras.utils.register_keras_serializable("efficientnet_ns")
class PixelNormalization(tf.keras.layers.Layer):
    """(x - 255·mean) / (255·std) per channel: pixels 0..255 to about zero mean, unit variance.

    Args:
      mean, std: per channel, in units of the full pixel range (0..1).
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], **kwargs):
        super().__init__(**kwargs)
        self.mean, self.std = tuple(mean), tuple(std)

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        dtype = self.compute_dtype
        offset = tf.constant([255.0 * m for m in self.mean], dtype)
        scale = tf.constant([255.0 * s for s in self.std], dtype)
        return (tf.cast(inputs, dtype) - offset) / scale

    def get_config(self) -> dict:
        return {**super().get_config(), "mean": self.mean, "std": self.std}


@tf.keras.utils.register_keras_serializable("efficientnet_ns")
class BatchNorm(tf.keras.layers.Layer):
    """Batch normalisation over N, H, W whose moving variance is the biased one, as in the original.

    The fused kernel reports the unbiased batch variance (N/(N-1) larger); it is scaled back before
    it enters the moving average. Statistics and parameters are float32 whatever the compute dtype.

    Args:
      momentum: decay of the moving averages.
      epsilon: added to the variance.
    """

    def __init__(self, momentum: float = 0.99, epsilon: float = 1e-3, **kwargs):
        super().__init__(**kwargs)
        self.momentum, self.epsilon = momentum, epsilon

    def build(self, input_shape) -> None:
        def weight(name, init, trainable):
            return self.add_weight(
                name,
                shape=(input_shape[-1],),
                dtype=tf.float32,
                initializer=init,
                trainable=trainable,
                experimental_autocast=False,
                # Each replica keeps its own statistics; reading them averages over replicas.
                synchronization=(
                    tf.VariableSynchronization.AUTO
                    if trainable
                    else tf.VariableSynchronization.ON_READ
                ),
                aggregation=tf.VariableAggregation.MEAN,
            )

        self.gamma = weight("gamma", "ones", True)
        self.beta = weight("beta", "zeros", True)
        self.moving_mean = weight("moving_mean", "zeros", False)
        self.moving_variance = weight("moving_variance", "ones", False)
        super().build(input_shape)

    def call(self, inputs: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        if not (training and self.trainable):
            outputs, *_ = tf.compat.v1.nn.fused_batch_norm(
                inputs,
                self.gamma,
                self.beta,
                mean=self.moving_mean,
                variance=self.moving_variance,
                epsilon=self.epsilon,
                is_training=False,
            )
            return outputs
        outputs, mean, variance = tf.compat.v1.nn.fused_batch_norm(
            inputs, self.gamma, self.beta, epsilon=self.epsilon, is_training=True
        )
        count = tf.cast(tf.size(inputs) // tf.shape(inputs)[-1], tf.float32)
        self._track(self.moving_mean, mean)
        self._track(self.moving_variance, variance * ((count - 1.0) / count))
        return outputs

    def _track(self, moving: tf.Variable, value: tf.Tensor) -> None:
        moving.assign_sub((moving - value) * (1.0 - self.momentum))

    def get_config(self) -> dict:
        return {**super().get_config(), "momentum": self.momentum, "epsilon": self.epsilon}


@tf.keras.utils.register_keras_serializable("efficientnet_ns")
class StochasticDepth(tf.keras.layers.Layer):
    """Drops the whole residual branch of an example, scaling survivors by 1/survival_prob.

    One draw per example; a frozen layer drops nothing. Reference: Huang et al., "Deep Networks with Stochastic Depth" (2016);
    paper section 3.1 uses survival probability 0.8 at the last block, falling linearly from 1.

    Args:
      survival_prob: probability in (0, 1] that the branch is kept.
    """

    def __init__(self, survival_prob: float, **kwargs):
        super().__init__(**kwargs)
        self.survival_prob = survival_prob

    def call(self, inputs: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        if not (training and self.trainable) or self.survival_prob >= 1.0:
            return inputs
        shape = [tf.shape(inputs)[0]] + [1] * (inputs.shape.rank - 1)
        draw = tf.random.stateless_uniform(shape, _layer_seed(self.name))
        kept = tf.cast(draw < self.survival_prob, inputs.dtype)
        return inputs / tf.cast(self.survival_prob, inputs.dtype) * kept

    def get_config(self) -> dict:
        return {**super().get_config(), "survival_prob": self.survival_prob}


@tf.keras.utils.register_keras_serializable("efficientnet_ns")
class Dropout(tf.keras.layers.Layer):
    """Dropout with stateless noise.

    Args:
      rate: fraction of units set to zero, in [0, 1).
    """

    def __init__(self, rate: float, **kwargs):
        super().__init__(**kwargs)
        self.rate = rate

    def call(self, inputs: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        if not training or self.rate == 0.0:
            return inputs
        return tf.nn.experimental.stateless_dropout(inputs, self.rate, seed=_layer_seed(self.name))

    def get_config(self) -> dict:
        return {**super().get_config(), "rate": self.rate}
