"""Counts a model's multiply-adds for one image, parameters and batch-norm statistics."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import tensorflow as tf

from efficientnet_ns.models import efficientnet

# Layers that multiply an image by a kernel. In every kernel layout, each value of the kernel is used
# once per output position.
_KERNELS = {
    tf.keras.layers.Conv2D: "kernel",
    tf.keras.layers.DepthwiseConv2D: "depthwise_kernel",
    tf.keras.layers.Dense: "kernel",
}


@dataclasses.dataclass(frozen=True)
class Complexity:
    """Counts of one model.

    Attributes:
      multiply_adds: in convolutions and dense layers, for one image. As in the paper, this excludes
        normalization, activations, pooling and the excitation's product.
      params: number of trainable values, including those of frozen layers.
      statistics: number of moving means and variances of the batch norms.
    """

    multiply_adds: int
    params: int
    statistics: int


def _layer_multiply_adds(layer: tf.keras.layers.Layer) -> int:
    kernel = _KERNELS.get(type(layer))
    if kernel is None:
        return 0
    positions = layer.output_shape[1:-1]
    if None in positions:
        raise ValueError(f"{layer.name}: the output size is unknown; set a fixed image size")
    return math.prod(positions) * math.prod(getattr(layer, kernel).shape)


def _size(variables: list[tf.Variable]) -> int:
    return sum(math.prod(variable.shape) for variable in variables)


def count(model: tf.keras.Model) -> Complexity:
    """Counts a functional model of fixed image size, such as one made by `build_model`.

    Raises:
      ValueError: If the image size is not fixed.
    """
    return Complexity(
        multiply_adds=sum(_layer_multiply_adds(layer) for layer in model.layers),
        params=_size([variable for variable in model.weights if variable.trainable]),
        statistics=_size([variable for variable in model.weights if not variable.trainable]),
    )


def count_variant(
    variant: str, num_classes: int = 1000, image_size: int | None = None
) -> Complexity:
    """Counts a model by its name, without allocating memory for its weights.

    Args:
      image_size: side of the input in pixels; None uses the variant's resolution.
    """
    with tf.Graph().as_default():  # Where variables are declared, not initialized.
        model = efficientnet.build_model(variant, num_classes, image_size)
        counted = count(model)
    restore_classes(model)
    return counted


def restore_classes(model: tf.keras.Model) -> None:
    """Makes other models usable again after `model` was built in a `tf.Graph`; call it outside.

    In a graph, Keras switches layer classes to their TensorFlow 1 versions, also for existing
    models; the next layer that is created from a class switches it back.
    """
    kinds: set[Any] = {type(model), *map(type, model.layers)}
    for kind in kinds:
        kind.__new__(kind)
