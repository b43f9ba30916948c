"""The peer of most benchmarks: the same network in `tf.keras.applications`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from efficientnet_ns.config import ConfigError

if TYPE_CHECKING:
    import tensorflow as tf

NAME = "tf.keras.applications"


def class_name(model_name: str) -> str:
    """`EfficientNetB0` for `efficientnet-b0`.

    Raises:
      ConfigError: Keras does not have the variant.
    """
    variant = model_name.rpartition("-")[2]
    if variant not in [f"b{i}" for i in range(8)]:
        raise ConfigError(f"--model_name={model_name}: {NAME} has efficientnet-b0 to -b7 only")
    return f"EfficientNet{variant.upper()}"


def build(model_name: str, **options: Any) -> tf.keras.Model:
    """The model with random weights; `options` as in `tf.keras.applications.EfficientNetB0`."""
    import tensorflow as tf

    return getattr(tf.keras.applications, class_name(model_name))(weights=None, **options)
