"""Convert weights: `python -m efficientnet_ns.convert_checkpoint --source=… --target=…`.

Reads a checkpoint of the original, a `.h5` or `.keras` file of Keras, or a timm `.safetensors` or `.pth`; writes timm's
`.safetensors`, or for any other name a checkpoint that the original can read too. The flags of the
model must fit the source.
"""

from __future__ import annotations

import os

from absl import flags

from efficientnet_ns import config as config_lib
from efficientnet_ns.config import ConfigError, ModelConfig


def convert_checkpoint(
    config: ModelConfig, source: str | os.PathLike, target: str | os.PathLike, *, ema: bool = True
) -> str:
    """Reads the weights at `source` and writes them to `target`, which must not exist.

    Args:
      ema: of a checkpoint with two sets of weights take the moving averages.

    Returns:
      The target.

    Raises:
      ConfigError: a path is missing or taken, or no such model can be built.
      WeightsError, FileNotFoundError: the source does not fit the model, or is not there.
    """
    if not source or not target:
        raise ConfigError("--source and --target are needed")
    source, target = os.fspath(source), os.fspath(target)
    # TensorFlow is loaded here, after --help and wrong flags have been answered.
    import tensorflow as tf

    from efficientnet_ns.models import efficientnet, weights

    for path in (target, f"{target}.index"):
        if tf.io.gfile.exists(path):
            raise ConfigError(f"--target: {path} exists; remove it, or choose another name")
    learned = weights.stored_settings(source)
    try:
        model = efficientnet.build_model(
            config.model_name,
            config.num_label_classes,
            config.input_image_size,
            small_image=config.small_image_model or learned.get("small_image", False),
            width_coefficient=config.width_coefficient,
            depth_coefficient=config.depth_coefficient,
            mean=learned.get("mean"),
            std=learned.get("std"),
        )
    except ValueError as e:
        raise ConfigError(f"no such model: {e}") from e
    weights.load_weights(model, source, ema=ema)
    weights.save_weights(model, target)
    return target


def main(argv: list[str]) -> None:
    config_lib.no_arguments(argv)
    values = flags.FLAGS
    settings = config_lib.from_flags(ModelConfig, values)
    print(convert_checkpoint(settings, values.source, values.target, ema=values.ema))


def run() -> None:
    """The command line."""
    config_lib.define_flags(ModelConfig)
    flags.DEFINE_string("source", "", "Checkpoint, .h5, .keras, .safetensors or .pth file to read.")
    flags.DEFINE_string("target", "", "A .safetensors file, or the prefix of a checkpoint.")
    flags.DEFINE_bool("ema", True, "Read the moving-average weights, not the raw ones.")
    config_lib.run(main)


if __name__ == "__main__":
    run()
