"""Models made from an EfficientNet's layers: with a custom classifier, flat or nested."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from efficientnet_ns.models import layers

# The layers that `build_model` makes.
_STANDARD = re.compile(r"image|normalization|stem_.*|blocks_\d+_.*|head_.*|pooled|logits")


def is_standard(layer_name: str) -> bool:
    """Checks whether a layer of `build_model` may have this name."""
    return _STANDARD.fullmatch(layer_name) is not None


def flat_layers(model: tf.keras.Model) -> Iterator[tf.keras.layers.Layer]:
    """Yields the layers of a model, replacing nested models by their layers."""
    for layer in model.layers:
        if isinstance(layer, tf.keras.Model):
            yield from flat_layers(layer)
        else:
            yield layer


def normalization(model: tf.keras.Model) -> layers.PixelNormalization:
    """Returns the first layer of the EfficientNet that `model` is made from.

    Raises:
      ValueError: If there is none.
    """
    for layer in flat_layers(model):
        if isinstance(layer, layers.PixelNormalization):
            return layer
    raise ValueError(f"{model.name} is not made of the layers of build_model")


def settings(model: tf.keras.Model) -> dict[str, Any]:
    """Describes the images that a model expects, as JSON-serializable values.

    Returns:
      `variant`, `image_size`, `small_image`, `mean`, `std`; `crop_fraction` unless it is the
      published one.

    Raises:
      ValueError: If the model is not made from the layers of `build_model`.
    """
    return {"image_size": model.input_shape[1], **normalization(model).settings()}


def own_head(model: tf.keras.Model) -> tf.keras.layers.Dense | None:
    """Returns the custom classifier on an EfficientNet; None if the model has its own or none.

    Raises:
      ValueError: If the model has other layers on top that change their input.
    """
    added = [layer for layer in flat_layers(model) if not is_standard(layer.name)]
    dense = [layer for layer in added if isinstance(layer, tf.keras.layers.Dense)]
    other = [layer.name for layer in added if layer not in dense and not _passes(layer)]
    has_head = any(layer.name == "head_dense" for layer in flat_layers(model))
    if other or len(dense) + has_head > 1:
        names = ", ".join(other or [layer.name for layer in dense])
        raise ValueError(
            f"{model.name} was not made by build_model: it has a layer {names}. On the features "
            "one Dense layer is expected, with optional dropout before it. Save this model with "
            "model.save('<name>.keras')"
        )
    if dense and (dense[0].activation is not tf.keras.activations.linear or not dense[0].use_bias):
        raise ValueError(
            f"{model.name}: the layer {dense[0].name} must return logits: no activation (train "
            "with from_logits=True), and a bias"
        )
    return dense[0] if dense else None


def _passes(layer: tf.keras.layers.Layer) -> bool:
    """Checks whether a layer returns its input unchanged at inference."""
    if isinstance(layer, tf.keras.layers.Activation):
        return layer.activation is tf.keras.activations.linear
    # Flatten: features are flat.
    names = (tf.keras.layers.InputLayer, tf.keras.layers.Dropout, layers.Dropout)
    return isinstance(layer, (*names, tf.keras.layers.Flatten)) or type(layer).__name__ in (
        "RandomFlip",
        "RandomRotation",
        "RandomTranslation",
        "RandomZoom",
        "RandomContrast",
        "RandomBrightness",
    )


def standard(model: tf.keras.Model) -> tf.keras.Model:
    """Returns the model in the layout of `build_model`; the model itself if it has that layout.

    For a model with a custom classifier, the convolutions are shared and the classifier is copied.

    Raises:
      ValueError: If the model has layers that no EfficientNet has.
    """
    head, network = own_head(model), _network(model)
    if network is None:
        return model  # Not an EfficientNet; looking up names will fail.
    if head is None:
        return network
    pooled = network.get_layer("head_pool").output
    dense = tf.keras.layers.Dense(head.units, name="head_dense", dtype=head.dtype_policy)
    logits = tf.keras.layers.Activation("linear", dtype="float32", name="logits")(dense(pooled))
    dense.set_weights(head.get_weights())
    name = normalization(model).variant or network.name
    return tf.keras.Model(network.input, logits, name=name)


def _network(model: tf.keras.Model) -> tf.keras.Model | None:
    """Finds the model, nested or not, whose direct layers include an EfficientNet's first one."""
    if any(isinstance(layer, layers.PixelNormalization) for layer in model.layers):
        return model
    inner = (_network(layer) for layer in model.layers if isinstance(layer, tf.keras.Model))
    return next((network for network in inner if network is not None), None)


def take_head(model: tf.keras.Model, standardized: tf.keras.Model) -> None:
    """Copies the classifier back from the result of `standard` for a model."""
    head = own_head(model)
    if head is not None:
        head.set_weights(standardized.get_layer("head_dense").get_weights())
