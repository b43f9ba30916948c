"""Export a trained model: `python -m efficientnet_ns.export_model --model_dir=… --export_dir=…`.

`--format=savedmodel` writes a version for TensorFlow Serving, `--format=tflite` a file for TensorFlow
Lite, `--format=onnx` one for ONNX Runtime. `--init_model_path` takes weights in any supported format: a
checkpoint of this package or of the original code, .h5, .safetensors.
"""

from __future__ import annotations

from efficientnet_ns import config
from efficientnet_ns.config import Config, ExportConfig


def main(settings: Config, options: ExportConfig) -> None:
    from efficientnet_ns.serving import model_export

    print(model_export.export_model(settings, options))


if __name__ == "__main__":
    config.run(main, Config, ExportConfig)
