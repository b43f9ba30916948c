"""Converts weights from one format to another."""

from __future__ import annotations

import os

import tensorflow as tf

from efficientnet_ns.config import Config, ConfigError, ModelConfig, as_dict
from efficientnet_ns.models import efficientnet, weights
from efficientnet_ns.resolve import stored_model


def convert_checkpoint(
    config: ModelConfig, source: str | os.PathLike, target: str | os.PathLike, *, ema: bool = True
) -> str:
    """Reads the weights at `source` and writes them to `target`, which must not exist.

    Args:
      config: settings that are not given are read from the source.
      source: weights, as for `stored_model.find`.
      ema: whether to read the moving averages if a checkpoint has two sets of weights.

    Returns:
      The target.

    Raises:
      ConfigError: If a path is missing or already exists, or the model cannot be built.
      WeightsError, FileNotFoundError: If the source does not match the model or does not exist, or
        the target is a folder or has an unsupported format.
    """
    if not source or not target:
        raise ConfigError("--source (or --model_dir) and --target are required")
    source, target = stored_model.find(source), os.fspath(target)
    # Before reading the source, which takes longer.
    weights.check_target(target)
    # A checkpoint is the prefix of its files, of which the index always exists.
    for path in (target, f"{target}.index"):
        if tf.io.gfile.exists(path):
            raise ConfigError(f"--target: {path} already exists; remove it or choose another name")
    stored = stored_model.read(source)
    learned = stored.images
    config = stored.complete(Config(model=config)).model
    classes = stored.task.num_classes if stored.task else as_dict(config)["num_label_classes"]
    try:
        model = efficientnet.build_model(
            as_dict(config)["model_name"],
            config.num_label_classes or classes,
            config.input_image_size,
            small_image=config.small_image_model or learned.get("small_image", False),
            width_coefficient=config.width_coefficient,
            depth_coefficient=config.depth_coefficient,
            # Saved with the weights, so that later programs normalize and crop as in training.
            mean=learned.get("mean"),
            std=learned.get("std"),
            crop_fraction=stored.crop_fraction,
        )
    except ValueError as e:
        raise ConfigError(f"no such model: {e}") from e
    weights.load_weights(model, source, ema=ema)
    weights.save_weights(model, target)
    return target
