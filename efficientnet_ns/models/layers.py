"""Layers that Keras does not have in the form in which EfficientNet was trained.

All noise is stateless. A training step opens `noise_seed(seed, …)` around the forward pass; every
layer that adds noise reads it with `current_noise` and folds its own name into the seed, so the same
(seed, step) always draws the same noise, regardless of what ran before. The noise of an example
depends on its row in the global batch, so it is the same on one device and on many. Outside such a
scope (plain `model.fit`), the seed comes from TensorFlow's global generator.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

_PHILOX, _PHILOX_GROUP = 1, 4  # TensorFlow's ID of the algorithm; numbers per counter value.


class Rows(NamedTuple):
    """Consecutive rows of the global batch (over all replicas): `size` rows from `first` on.

    `first` is an int or an int32 scalar tensor (on a TPU, the replica's number is a tensor); `size`
    is an int, so that shapes are static.
    """

    first: int | tf.Tensor
    size: int


@dataclasses.dataclass(frozen=True)
class Noise:
    """The source of the noise of a forward pass; see `noise_seed` for the attributes."""

    seed: tf.Tensor
    rows: tuple[Rows, ...] = ()
    total: int | None = None
    quiet_from: int | None = None

    def uniform(
        self, inputs: tf.Tensor, width: int, layer: str, *, blocks: int | None = None
    ) -> tf.Tensor:
        """Draws numbers in [0, 1), float32 [rows of inputs, width].

        Row r of the global batch gets the numbers r·width … (r+1)·width - 1 of one stream,
        regardless of which replica draws them.

        Args:
          inputs: the batch of this replica, [N, …].
          width: numbers per row.
          layer: name that is folded into the seed, so that layers draw independently.
          blocks: number of entries of `rows` that `inputs` contains, from the first; None for all.
        """
        stream = _stream(fold_in(self.seed, zlib.crc32(layer.encode()) & 0x7FFFFFFF))
        rows = self.rows[:blocks]
        if not rows:
            return _draw(stream, 0, [tf.shape(inputs)[0], width])
        if width % _PHILOX_GROUP:
            # A row may begin inside a counter value: draw the rows of all replicas and take ours.
            whole = _draw(stream, 0, [self.total, width])
            parts = [tf.slice(whole, [first, 0], [size, width]) for first, size in rows]
        else:
            groups = width // _PHILOX_GROUP
            parts = [_draw(stream, first * groups, [size, width]) for first, size in rows]
        return tf.concat(parts, 0)

    def keep_quiet_rows(self, noised: tf.Tensor, inputs: tf.Tensor) -> tf.Tensor:
        """Returns `noised`, [N, …], with the rows of `inputs` from `quiet_from` on."""
        if self.quiet_from is None:
            return noised
        return tf.concat([noised[: self.quiet_from], inputs[self.quiet_from :]], 0)


# Keras cannot pass the noise's arguments to a layer, so layers read them here.
# Thread-local, because the replica functions of a step run in separate threads.
_scope = threading.local()


@contextlib.contextmanager
def noise_seed(
    seed: tf.Tensor,
    rows: Sequence[Rows] = (),
    total: int | None = None,
    quiet_from: int | None = None,
) -> Iterator[None]:
    """Makes dropout and stochastic depth inside the block draw from `seed`.

    Args:
      seed: int32 [2].
      rows: the rows of the global batch that form this replica's batch, in order; empty if this
        batch is the global batch.
      total: number of rows of the global batch; required with `rows`.
      quiet_from: first row of this replica's batch that gets no noise, like all rows after it; None
        adds noise to all rows.
    """
    outer = getattr(_scope, "noise", None)
    _scope.noise = Noise(seed, tuple(rows), total, quiet_from)
    try:
        yield
    finally:
        _scope.noise = outer


def current_noise() -> Noise:
    """Returns the noise of the innermost `noise_seed` block; outside of one, with a new seed."""
    noise = getattr(_scope, "noise", None)
    return noise or Noise(tf.random.uniform([2], maxval=tf.int32.max, dtype=tf.int32))


def fold_in(seed: tf.Tensor, salt: int) -> tf.Tensor:
    """Derives a seed, int32 [2], from an integer one [2]; the same on all devices and under XLA."""
    # If `alg` is not set, TensorFlow's algorithm depends on the device.
    return tf.random.experimental.stateless_fold_in(seed, salt, alg="philox")


def bernoulli(inputs: tf.Tensor, probability: float, name: str) -> tf.Tensor:
    """Draws 1 with `probability`, else 0, [N], for each of the first block's rows `inputs`."""
    draw = current_noise().uniform(inputs, 1, name, blocks=1)
    return tf.cast(draw[:, 0] < probability, inputs.dtype)


def _stream(seed: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns a seed's key, uint64 [1], and first counter, uint64 [2], as TensorFlow does.

    `StatelessRandomGetKeyCounter` is not used because XLA reads negative seeds differently.
    """
    mixed = tf.raw_ops.StatelessRandomUniformFullIntV2(
        shape=[4],
        key=tf.constant([0x02461E293EC8F720], tf.uint64),
        counter=tf.cast(seed, tf.uint64),
        alg=_PHILOX,
        dtype=tf.uint32,
    )
    key, counter = tf.unstack(tf.bitcast(tf.reshape(mixed, [2, 2]), tf.uint64))
    return key[None], tf.stack([tf.zeros_like(counter), counter])


def _draw(
    stream: tuple[tf.Tensor, tf.Tensor], skip: int | tf.Tensor, shape: Sequence[int | tf.Tensor]
) -> tf.Tensor:
    """Draws the numbers of a stream after `skip` counter values, float32 in [0, 1)."""
    key, counter = stream
    skipped = tf.stack([tf.cast(skip, tf.uint64), tf.zeros([], tf.uint64)])
    bits = tf.raw_ops.StatelessRandomUniformFullIntV2(
        shape=shape, key=key, counter=counter + skipped, alg=_PHILOX, dtype=tf.uint32
    )
    # XLA converts bits to floats differently; these equal the floats of TensorFlow's own kernels.
    low = tf.cast(tf.bitwise.bitwise_and(bits, tf.constant(0x7FFFFF, tf.uint32)), tf.int32)
    return tf.cast(low, tf.float32) * 2.0**-23


# Compiled as one kernel: separate operations would each pass over feature maps larger than the cache,
# which takes a sixth of the time of a training step on a CPU.
@tf.function(jit_compile=True)
def _swish_gradient(dy: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
    gate = 0.5 * tf.tanh(0.5 * x) + 0.5  # sigmoid(x); XLA's tanh is faster than its exp.
    return dy * gate * (1.0 + x * (1.0 - gate))


@tf.custom_gradient
def swish(x: tf.Tensor) -> tf.Tensor:
    """Computes x·sigmoid(x); its gradient reads and writes memory once."""
    return x * tf.sigmoid(x), lambda dy: _swish_gradient(dy, x)


@tf.keras.utils.register_keras_serializable("efficientnet_ns")
class Swish(tf.keras.layers.Layer):
    """The activation `swish`.

    It is a layer because Keras restores a saved activation function named swish as its own, whose
    gradient is slower.
    """

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """Maps floats of any shape to the same shape."""
        return swish(inputs)


# Name of an activation → its layer, given the layer's name.
ACTIVATIONS: Mapping[str, Callable[..., tf.keras.layers.Layer]] = {
    "swish": Swish,
    "relu6": functools.partial(tf.keras.layers.ReLU, 6.0),
}


@tf.keras.utils.register_keras_serializable("efficientnet_ns")
class PixelNormalization(tf.keras.layers.Layer):
    """(x - 255·mean) / (255·std) per channel: pixels 0..255 to about zero mean, unit variance.

    As the first layer of every EfficientNet, it also stores the preprocessing of images and the
    variant of the network for programs that load a saved model.

    Args:
      mean, std: channel statistics in units of the full pixel range (0..1).
      small_image: whether images are resized whole, without the evaluation crop (SVHN, digits).
      variant: name of the network.
      crop_fraction: fraction of the shorter side that the evaluation crop keeps; None for the
        published one, see `images.center_crop_box`.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        small_image: bool = False,
        variant: str = "",
        crop_fraction: float | None = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.mean, self.std = tuple(mean), tuple(std)
        self.small_image, self.variant = small_image, variant
        self.crop_fraction = crop_fraction

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """Normalizes pixels 0..255 [N, H, W, 3] of any dtype, in the layer's compute dtype."""
        dtype = self.compute_dtype
        offset = tf.constant([255.0 * m for m in self.mean], dtype)
        scale = tf.constant([255.0 * s for s in self.std], dtype)
        return (tf.cast(inputs, dtype) - offset) / scale

    def get_config(self) -> dict:
        """The constructor's arguments, for Keras."""
        return {
            **super().get_config(),
            **self.settings(),
        }

    def settings(self) -> dict[str, Any]:
        """Returns the constructor's arguments as JSON-serializable values."""
        crop = {} if self.crop_fraction is None else {"crop_fraction": self.crop_fraction}
        return {
            "mean": list(self.mean),
            "std": list(self.std),
            "small_image": self.small_image,
            "variant": self.variant,
            **crop,
        }


def replicas_per_group(num_shards_per_group: int, num_replicas: int) -> int:
    """Returns how many consecutive replicas share batch statistics.

    Args:
      num_shards_per_group: number of replicas. As in the original code, -1 is one for up to 8
        replicas, else max(8, num_replicas / 8). -2 is all replicas.
      num_replicas: number of replicas of the strategy.

    Raises:
      ValueError: If the group size does not divide the number of replicas.
    """
    if num_shards_per_group == -2:
        return num_replicas
    group = num_shards_per_group
    if group == -1:
        group = 1 if num_replicas <= 8 else max(8, num_replicas // 8)
    if num_replicas == 1:
        return 1
    if group < 1 or num_replicas % group:
        raise ValueError(
            f"num_shards_per_group={num_shards_per_group} does not divide {num_replicas} replicas: "
            "use a divisor, -1 (chosen by the number of replicas) or -2 (all replicas)"
        )
    return group


def _group_mean(values: tf.Tensor, context, group: int) -> tf.Tensor:
    """Averages a tensor over the replica's group, with gradients to all its replicas."""
    replicas = context.num_replicas_in_sync
    if group == replicas:
        return context.all_reduce(tf.distribute.ReduceOp.SUM, values) / group
    if isinstance(context.strategy, tf.distribute.TPUStrategy):
        groups = [list(range(first, first + group)) for first in range(0, replicas, group)]
        return tf.raw_ops.CrossReplicaSum(input=values, group_assignment=groups) / group
    # Other strategies can only sum over all replicas, so each group gets its own slot of the sum.
    own = context.replica_id_in_sync_group // group
    place = tf.reshape(tf.one_hot(own, replicas // group), [-1] + [1] * values.shape.rank)
    sums = context.all_reduce(tf.distribute.ReduceOp.SUM, place * values)
    return tf.gather(sums, own) / group


@tf.keras.utils.register_keras_serializable("efficientnet_ns")
class BatchNorm(tf.keras.layers.Layer):
    """Batch normalization over N, H, W with a biased moving variance, as in the original code.

    The fused kernel returns the unbiased batch variance (larger by N/(N-1)), which is scaled back
    before it enters the moving average. Statistics and parameters are always float32.

    If a group of replicas shares batch statistics, these are mean and E[x²] - mean² of averages
    over the group, and the fused kernel is not used.

    Args:
      momentum: decay of the moving averages.
      epsilon: added to the variance.
      num_shards_per_group: see `replicas_per_group`.
    """

    def __init__(
        self,
        momentum: float = 0.99,
        epsilon: float = 1e-3,
        num_shards_per_group: int = -1,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.momentum, self.epsilon = momentum, epsilon
        self.num_shards_per_group = num_shards_per_group
        # Set by training that keeps the moving statistics of its initial weights.
        self.keep_statistics = False

    def build(self, input_shape: tf.TensorShape) -> None:
        """Creates scale, offset and moving statistics, float32 [C]."""

        def weight(name, init, trainable):
            return self.add_weight(
                name,
                shape=(input_shape[-1],),
                dtype=tf.float32,
                initializer=init,
                trainable=trainable,
                experimental_autocast=False,
                # Each replica updates its own statistics; reading them averages over replicas.
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
        """Normalizes [N, H, W, C]; a frozen layer uses its moving statistics even in training."""
        if self.keep_statistics or not (training and self.trainable):
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
        # Keras builds the graph of a model outside any replica.
        context = tf.distribute.get_replica_context()
        replicas = 1 if context is None else context.num_replicas_in_sync
        group = replicas_per_group(self.num_shards_per_group, replicas)
        if group > 1:
            return self._normalize_in_group(inputs, context, group)
        outputs, mean, variance = tf.compat.v1.nn.fused_batch_norm(
            inputs, self.gamma, self.beta, epsilon=self.epsilon, is_training=True
        )
        count = tf.cast(tf.size(inputs) // tf.shape(inputs)[-1], tf.float32)
        self._track(self.moving_mean, mean)
        self._track(self.moving_variance, variance * ((count - 1.0) / count))
        return outputs

    def _normalize_in_group(self, inputs: tf.Tensor, context, group: int) -> tf.Tensor:
        x = tf.cast(inputs, tf.float32)
        axes = list(range(x.shape.rank - 1))
        moments = tf.stack([tf.reduce_mean(x, axes), tf.reduce_mean(tf.square(x), axes)])
        mean, mean_square = tf.unstack(_group_mean(moments, context, group))
        variance = mean_square - tf.square(mean)
        self._track(self.moving_mean, mean)
        self._track(self.moving_variance, variance)
        scale = self.gamma * tf.math.rsqrt(variance + self.epsilon)
        return tf.cast(x * scale + (self.beta - mean * scale), inputs.dtype)

    def _track(self, moving: tf.Variable, value: tf.Tensor) -> None:
        moving.assign_sub((moving - value) * (1.0 - self.momentum))

    def get_config(self) -> dict:
        """The constructor's arguments, for Keras."""
        return {
            **super().get_config(),
            "momentum": self.momentum,
            "epsilon": self.epsilon,
            "num_shards_per_group": self.num_shards_per_group,
        }


@tf.keras.utils.register_keras_serializable("efficientnet_ns")
class StochasticDepth(tf.keras.layers.Layer):
    """Drops the whole residual branch of an example, scaling survivors by 1/survival_prob.

    There is one draw per example from `current_noise`; a frozen layer drops nothing. Reference: Huang
    et al., "Deep Networks with Stochastic Depth" (2016). Noisy Student (section 3.1) uses a survival
    probability that falls linearly from 1 to 0.8 at the last block.

    Args:
      survival_prob: probability in (0, 1] that the branch is kept.
    """

    def __init__(self, survival_prob: float, **kwargs):
        super().__init__(**kwargs)
        self.survival_prob = survival_prob

    def call(self, inputs: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        """Maps [N, …] to the same shape; returns the inputs if not `training`."""
        if not (training and self.trainable) or self.survival_prob >= 1.0:
            return inputs
        noise = current_noise()
        shape = [-1] + [1] * (inputs.shape.rank - 1)
        draw = tf.reshape(noise.uniform(inputs, 1, self.name), shape)
        factors = tf.cast(draw < self.survival_prob, tf.float32) / self.survival_prob
        return noise.keep_quiet_rows(inputs * tf.cast(factors, inputs.dtype), inputs)

    def get_config(self) -> dict:
        """The constructor's arguments, for Keras."""
        return {**super().get_config(), "survival_prob": self.survival_prob}


@tf.keras.utils.register_keras_serializable("efficientnet_ns")
class Dropout(tf.keras.layers.Layer):
    """Dropout with stateless noise from `current_noise`.

    Args:
      rate: fraction of units set to zero, in [0, 1).
    """

    def __init__(self, rate: float, **kwargs):
        super().__init__(**kwargs)
        self.rate = rate

    def call(self, inputs: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        """Maps [N, C] to [N, C]; returns the inputs if not `training`."""
        if not training or self.rate == 0.0:
            return inputs
        noise = current_noise()
        kept = noise.uniform(inputs, inputs.shape[-1], self.name) >= self.rate
        scale = tf.constant(1.0 / (1.0 - self.rate), inputs.dtype)
        noised = tf.where(kept, inputs * scale, tf.zeros([], inputs.dtype))
        return noise.keep_quiet_rows(noised, inputs)

    def get_config(self) -> dict:
        """The constructor's arguments, for Keras."""
        return {**super().get_config(), "rate": self.rate}
