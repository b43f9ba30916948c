"""Batch norm and pixel scaling folded into convolutions, for inference on CPUs."""

from __future__ import annotations

import tensorflow as tf

from efficientnet_ns.models import layers

_CONV, _BN = "_conv", "_bn"
_STEM = "stem_conv"


def fold_batch_norm(model: tf.keras.Model) -> tf.keras.Model:
    """A model for inference that computes the same with convolutions alone.

    Every `<name>_conv` takes over the scale γ/√(σ² + ε) and the shift β - μ·γ/√(σ² + ε) of its
    `<name>_bn`, which becomes the identity. The stem takes over the division of the pixels by their
    standard deviation; the mean is still subtracted, since padding is zero after it. Layer names
    stay, so that `endpoints` works on the result.

    Args:
      model: made by `efficientnet.build_model`.

    Returns:
      A model with the same input and outputs and no batch norm; its weights are copies.
    """
    folded = tf.keras.models.clone_model(model, clone_function=_clone)
    for layer in model.layers:
        if isinstance(layer, layers.BatchNorm) or not layer.weights:
            continue
        values = _folded(layer, model) if layer.name.endswith(_CONV) else layer.get_weights()
        folded.get_layer(layer.name).set_weights(values)
    return folded


@tf.keras.utils.register_keras_serializable("efficientnet_ns")
class Centering(layers.PixelNormalization):
    """x - 255·mean per channel."""

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        dtype = self.compute_dtype
        return tf.cast(inputs, dtype) - tf.constant([255.0 * m for m in self.mean], dtype)


def swish(x: tf.Tensor) -> tf.Tensor:
    """x·σ(x) for inference."""
    # tf.nn.silu carries a gradient of its own, whose ops keep kernels from being fused.
    return x * tf.sigmoid(x)


@tf.keras.utils.register_keras_serializable("efficientnet_ns")
class PlainSwish(tf.keras.layers.Layer):
    """The activation `swish` of a model for inference."""

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        return swish(inputs)


def _clone(layer: tf.keras.layers.Layer) -> tf.keras.layers.Layer:
    if isinstance(layer, layers.BatchNorm):
        return tf.keras.layers.Activation("linear", name=layer.name, dtype=layer.dtype_policy)
    if layer.name.endswith("_swish"):
        return PlainSwish.from_config(layer.get_config())
    config = layer.get_config()
    if isinstance(layer, layers.PixelNormalization):
        return Centering.from_config(config)
    if layer.name.endswith(_CONV):
        config["use_bias"] = True
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
