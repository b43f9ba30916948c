"""Convert weights: `python -m efficientnet_ns.convert_checkpoint --model_dir=… --target=…`.

Reads a checkpoint of the original code, a Keras `.h5` or `.keras` file, or timm's `.safetensors` or
`.pth`. Writes timm's `.safetensors` or, for any other name, a checkpoint that the original code can
also read. The flags of the model must match the source.
"""

from __future__ import annotations

from efficientnet_ns import config
from efficientnet_ns.config import ConvertConfig, ModelConfig


def main(model: ModelConfig, options: ConvertConfig) -> None:
    from efficientnet_ns.serving import conversion

    print(
        conversion.convert_checkpoint(
            model, options.source or options.model_dir, options.target, ema=options.ema
        )
    )


if __name__ == "__main__":
    config.run(main, ModelConfig, ConvertConfig)
