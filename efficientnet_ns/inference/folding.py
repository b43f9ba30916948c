"""Optimizes models for inference: folds batch norm and pixel scaling into convolutions."""

from __future__ import annotations

import functools

import tensorflow as tf

from efficientnet_ns.models import layers

_CONV, _BN = "_conv", "_bn"
_STEM = "stem_conv"
# Width of the smallest map whose 1 x 1 convolutions remain convolutions on CPUs.
_CONVOLVED_WIDTH = 56


def fold_batch_norm(model: tf.keras.Model, *, for_cpu: bool = False) -> tf.keras.Model:
    """Returns a model for inference that computes the same function without batch norm.

    Every `<name>_conv` absorbs the scale γ/√(σ² + ε) and the shift β - μ·γ/√(σ² + ε) of its
    `<name>_bn`, which becomes the identity. The stem also absorbs the division of the pixels by
    their standard deviation. The mean is still subtracted, because the padding that follows must be
    zero. Layer names are kept, so `endpoints` works on the result.

    Args:
      model: a model made by `efficientnet.build_model`.
      for_cpu: whether to compute 1 x 1 convolutions of small maps as matrix products; see
        `Pointwise`.

    Returns:
      A model with the same input and outputs and no batch norm; its weights are copies.
    """
    clone = functools.partial(_clone, for_cpu=for_cpu)
    folded = tf.keras.models.clone_model(model, clone_function=clone)
    for layer in model.layers:
        # Batch norm has no weights in the result: the preceding convolution absorbs its values.
        if isinstance(layer, layers.BatchNorm) or not layer.weights:
            continue
        values = _folded(layer, model) if layer.name.endswith(_CONV) else layer.get_weights()
        folded.get_layer(layer.name).set_weights(values)
    return folded


@tf.keras.utils.register_keras_serializable("efficientnet_ns")
class Centering(layers.PixelNormalization):
    """Computes x - 255·mean per channel."""

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        dtype = self.compute_dtype
        return tf.cast(inputs, dtype) - tf.constant([255.0 * m for m in self.mean], dtype)


def swish(x: tf.Tensor) -> tf.Tensor:
    """Computes x·σ(x) for inference."""
    # tf.nn.silu has a custom gradient, whose ops prevent kernels from being fused.
    return x * tf.sigmoid(x)


@tf.keras.utils.register_keras_serializable("efficientnet_ns")
class PlainSwish(tf.keras.layers.Layer):
    """The activation `swish` of a model for inference."""

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        return swish(inputs)


@tf.keras.utils.register_keras_serializable("efficientnet_ns")
class Pointwise(tf.keras.layers.Conv2D):
    """A 1 x 1 convolution that is computed as a matrix product on small maps.

    TensorFlow's CPU kernels start a matrix product faster than a convolution. On large maps, where
    the start does not matter, the convolution is faster because oneDNN fuses the activation into it.
    """

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        height, width, channels = inputs.shape[1:]
        if width >= _CONVOLVED_WIDTH:
            return super().call(inputs)
        rows = tf.matmul(tf.reshape(inputs, [-1, channels]), tf.squeeze(self.kernel, [0, 1]))
        if self.use_bias:
            rows = tf.nn.bias_add(rows, self.bias)
        return tf.reshape(rows, [-1, height, width, self.filters])


def _clone(layer: tf.keras.layers.Layer, *, for_cpu: bool) -> tf.keras.layers.Layer:
    if isinstance(layer, layers.BatchNorm):
        return tf.keras.layers.Activation("linear", name=layer.name, dtype=layer.dtype_policy)
    if layer.name.endswith("_swish"):
        return PlainSwish.from_config(layer.get_config())
    config = layer.get_config()
    if isinstance(layer, layers.PixelNormalization):
        return Centering.from_config(config)
    if layer.name.endswith(_CONV):
        config["use_bias"] = True
    if for_cpu and type(layer) is tf.keras.layers.Conv2D and layer.kernel_size == (1, 1):
        return Pointwise.from_config(config)
    return type(layer).from_config(config)


def _folded(conv: tf.keras.layers.Layer, model: tf.keras.Model) -> list[tf.Tensor]:
    norm = model.get_layer(conv.name[: -len(_CONV)] + _BN)
    scale = norm.gamma / tf.sqrt(norm.moving_variance + norm.epsilon)
    depthwise = isinstance(conv, tf.keras.layers.DepthwiseConv2D)
    # A depthwise kernel is [k, k, channels, 1], any other [k, k, channels in, channels out].
    kernel = conv.weights[0] * (scale[:, None] if depthwise else scale)
    if conv.name == _STEM:
        deviation = 255.0 * tf.constant(model.get_layer("normalization").std)
        kernel = kernel / deviation[:, None]
    return [kernel.numpy(), (norm.beta - norm.moving_mean * scale).numpy()]
