"""Export a trained model: `python -m efficientnet_ns.export_model --model_dir=… --export_dir=…`.

`--format=savedmodel` writes a version for TensorFlow Serving, `--format=tflite` a file for TensorFlow
Lite. `--init_model_path` takes weights of any kind: a checkpoint of this package or of the original,
.h5, .safetensors.
"""

from __future__ import annotations

import dataclasses
import os
import re
from typing import Any

from absl import flags

from efficientnet_ns import config as config_lib
from efficientnet_ns.config import Config, ConfigError, Settings, setting


@dataclasses.dataclass(frozen=True)
class ExportConfig(Settings):
    """What is exported."""

    export_dir: str = setting("", "Folder in which the version's folder or file is made.")
    version: int | None = setting(
        None, "Number of the version; servers take the highest. Default: the next one.", low=1
    )
    ema: bool = setting(True, "Export the moving-average weights, not the raw ones.")
    format: str = setting("savedmodel", "Kind of file.", choices=("savedmodel", "tflite"))
    optimize_for: str = setting(
        "cpu",
        "cpu: batch norm folded, weights frozen; accelerator: folded; none: as trained.",
        choices=("cpu", "accelerator", "none"),
    )
    serving_dtype: str = setting(
        "float32", "Arithmetic of the SavedModel.", choices=("float32", "bfloat16")
    )
    tflite_type: str = setting(
        "float32",
        "Numbers of the TFLite file; int8 needs --check_data.",
        choices=("float32", "float16", "dynamic", "int8"),
    )
    top_k: int = setting(5, "Length of the top lists in the answers.", low=1)
    check_data: str = setting(
        "",
        "Folder of images, class folders or records, or an archive of images, on which the export is "
        "compared with the model.",
    )
    check_images: int = setting(200, "How many of them, at most.", low=1)


def export_model(
    config: Config, export_dir: str, version: int | None = None, **settings: Any
) -> str:
    """Exports the newest checkpoint of `model_dir` (or the one at `init_model_path`).

    Args:
      config: the model, as it was trained.
      export_dir, version, settings: fields of `ExportConfig`.

    Returns:
      The folder of the SavedModel, or the path of the TFLite file.

    Raises:
      ConfigError: a path is missing, or a setting does not fit.
      manifests.OutputConflict: that version exists.
    """
    chosen = ExportConfig(export_dir=export_dir, version=version, **settings)
    path = config.train.init_model_path or config.train.model_dir
    if not path or not export_dir:
        raise ConfigError("--export_dir and --model_dir (or --init_model_path) are needed")
    if chosen.format == "tflite" and chosen.tflite_type == "int8" and not chosen.check_data:
        raise ConfigError("--tflite_type=int8 needs --check_data, images to learn ranges from")
    if chosen.format == "tflite" and chosen.serving_dtype != "float32":
        raise ConfigError("--serving_dtype is of SavedModels; a TFLite file has --tflite_type")
    if chosen.format == "savedmodel" and chosen.tflite_type != "float32":
        raise ConfigError(f"--tflite_type={chosen.tflite_type} needs --format=tflite")
    from efficientnet_ns.resolve.resolved_config import ResolvedConfig
    from efficientnet_ns.serving import export

    resolved = ResolvedConfig.from_config(config)
    model = _model(resolved, path, chosen)
    pattern = re.escape(_file_name(model, "NUMBER", chosen)).replace("NUMBER", r"(\d+)")
    number = export.next_version(export_dir, pattern) if version is None else version
    write = _saved_model if chosen.format == "savedmodel" else _tflite
    return write(resolved, model, path, number, chosen)


def _file_name(model, version: int | str, chosen: ExportConfig) -> str:
    if chosen.format == "savedmodel":
        return str(version)
    return f"{model.name}-{version}-{chosen.tflite_type}.tflite"


def _model(resolved, path: str, chosen: ExportConfig):
    import tensorflow as tf

    from efficientnet_ns.models import weights

    before = tf.keras.mixed_precision.global_policy()
    if chosen.serving_dtype == "bfloat16" and chosen.format == "savedmodel":
        tf.keras.mixed_precision.set_global_policy("mixed_bfloat16")
    try:
        model = resolved.build_model()
    finally:
        tf.keras.mixed_precision.set_global_policy(before)
    weights.load_weights(model, path, ema=chosen.ema)
    return model


def _options(resolved, path: str, chosen: ExportConfig):
    from efficientnet_ns.data import tasks
    from efficientnet_ns.serving import export
    from efficientnet_ns.serving.classifier import OutputSpec

    names = tasks.class_names(resolved.task) or map(str, range(resolved.num_classes))
    facts = {
        "Task": resolved.config.data.task_name,
        "Weights": os.path.basename(path.rstrip("/")) + (" (moving averages)" * chosen.ema),
        "Arithmetic": chosen.serving_dtype,
        "Method": "Noisy Student Training (arXiv 1911.04252)",
        **_provenance(resolved, path),
    }
    return export.Options(OutputSpec(tuple(names), top_k=chosen.top_k), chosen.optimize_for, facts)


def _provenance(resolved, path: str) -> dict[str, object]:
    """Recipe, data and accuracy of published weights or of a training's folder, if these are such."""
    import tensorflow as tf

    from efficientnet_ns.models.recipes import RECIPES
    from efficientnet_ns.serving import provenance

    recipe = RECIPES.get(resolved.config.model.model_name)
    if recipe is not None and provenance.is_published(path, recipe):
        return provenance.of_publication(recipe)
    if tf.io.gfile.isdir(path):
        return provenance.of_training(path)
    return provenance.of_training(*os.path.split(path))


def _check_images(resolved, chosen: ExportConfig):
    """Encoded images, and the same prepared; nothing when none are given."""
    from efficientnet_ns import inference
    from efficientnet_ns.serving import check

    if not chosen.check_data:
        return [], []
    encoded = check.encoded_images(chosen.check_data, chosen.check_images)
    return encoded, inference.preprocess(encoded, resolved.preprocessing()).numpy()


def _float_answers(resolved, path: str, chosen: ExportConfig, images):
    """Probabilities of the model as it was trained, in float32."""
    import numpy as np
    import tensorflow as tf

    model = _model(resolved, path, dataclasses.replace(chosen, serving_dtype="float32"))
    parts = [images[i : i + 8] for i in range(0, len(images), 8)]
    return np.concatenate([tf.nn.softmax(model(part, training=False)) for part in parts])


def _saved_model(resolved, model, path: str, version: int, chosen: ExportConfig) -> str:
    from efficientnet_ns.serving import check, export

    encoded, images = _check_images(resolved, chosen)
    options = _options(resolved, path, chosen)
    folder = export.export(model, resolved.preprocessing(), chosen.export_dir, version, options)
    if encoded:
        answers = export.saved_model_runner(folder)(encoded)
        expected = _float_answers(resolved, path, chosen, images)
        print(f"against the float32 model: {check.difference(expected, answers)}")
    return folder


def _tflite(resolved, model, path: str, version: int, chosen: ExportConfig) -> str:
    from efficientnet_ns.serving import check, export, tflite

    encoded, images = _check_images(resolved, chosen)
    target = os.path.join(chosen.export_dir, _file_name(model, version, chosen))
    content = export.export_tflite(
        model,
        resolved.preprocessing(),
        target,
        chosen.tflite_type,
        _options(resolved, path, chosen),
        images,
    )
    if encoded:
        expected = _float_answers(resolved, path, chosen, images)
        answers = tflite.runner(content)(images)
        print(f"against the float32 model: {check.difference(expected, answers)}")
    return target


def main(argv: list[str]) -> None:
    config_lib.no_arguments(argv)
    settings = config_lib.from_flags(Config, flags.FLAGS)
    chosen = config_lib.from_flags(ExportConfig, flags.FLAGS)
    print(export_model(settings, **dataclasses.asdict(chosen)))


def run() -> None:
    """The command line."""
    config_lib.define_flags(Config)
    config_lib.define_flags(ExportConfig)
    config_lib.run(main)


if __name__ == "__main__":
    run()
