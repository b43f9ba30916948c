"""The peer of most benchmarks: the same network in `tf.keras.applications`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from efficientnet_ns.config import ConfigError

if TYPE_CHECKING:
    import tensorflow as tf

NAME = "tf.keras.applications"


def class_name(model_name: str) -> str:
    """Returns the Keras class, e.g. `EfficientNetB0` for `efficientnet-b0`.

    Raises:
      ConfigError: If Keras does not have the variant.
    """
    variant = model_name.rpartition("-")[2]
    if variant not in [f"b{i}" for i in range(8)]:
        raise ConfigError(f"--model_name={model_name}: {NAME} only has efficientnet-b0 to -b7")
    return f"EfficientNet{variant.upper()}"


def build(model_name: str, **options: Any) -> tf.keras.Model:
    """Builds the model with random weights; takes `options` of `tf.keras.applications`."""
    import tensorflow as tf

    return getattr(tf.keras.applications, class_name(model_name))(weights=None, **options)
