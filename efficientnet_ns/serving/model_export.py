"""Exports a trained model as a SavedModel, TensorFlow Lite or ONNX file and compares both on images."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from absl import logging

from efficientnet_ns import inference
from efficientnet_ns.config import Config, ConfigError, ExportConfig
from efficientnet_ns.data import tasks
from efficientnet_ns.files import name_lists
from efficientnet_ns.inference import lite_files
from efficientnet_ns.ingest import data_source
from efficientnet_ns.models import published, weights
from efficientnet_ns.resolve import stored_model
from efficientnet_ns.resolve.resolved_config import ResolvedConfig
from efficientnet_ns.serving import check, export, onnx_files, provenance
from efficientnet_ns.serving.signatures import OutputSpec


def export_model(
    config: Config, options: ExportConfig, facts: Mapping[str, object] | None = None
) -> str:
    """Exports the newest checkpoint of `model_dir` (or the one at `init_model_path`).

    Args:
      config: identifies the model, whose other settings are read from its folder unless given.
      options: what to export, and where.
      facts: name → value, for the model card; override those read from the training folder.

    Returns:
      The folder of the SavedModel, or the path of the file.

    Raises:
      ConfigError: If a path is missing, or settings are incompatible.
      manifests.OutputConflict: If that version exists.
    """
    path = stored_model.find(stored_model.weights_of(config.train))
    if not path or not options.export_dir:
        raise ConfigError("--export_dir and --model_dir (or --init_model_path) are required")
    _check(options)
    resolved = ResolvedConfig.from_config(data_source.with_records(config), path)
    path = os.fspath(published.located(path, resolved.model_name))
    model = _model(resolved, path, options)
    number = options.version
    if number is None:
        # Files of each model and type are numbered separately.
        pattern = re.escape(_file_name(model, "NUMBER", options)).replace("NUMBER", r"(\d+)")
        number = export.next_version(options.export_dir, pattern)
    told = _export_options(resolved, options, _facts(resolved, path, options) | dict(facts or {}))
    write = {"savedmodel": _saved_model, "tflite": _tflite, "onnx": _onnx}
    return write[options.format](_Job(resolved, path, options, told), model, number)


class _Job(NamedTuple):
    """What to export, and how.

    Attributes:
      resolved: settings of the model.
      path: path of its weights.
      options: options as given.
      exported: options for the file writers, including the facts for the model card.
    """

    resolved: ResolvedConfig
    path: str
    options: ExportConfig
    exported: export.Options


def _check(options: ExportConfig) -> None:
    """Raises ConfigError for incompatible settings and missing packages."""
    int8 = options.format == "tflite" and options.tflite_type == "int8"
    if int8 and not (options.calibration_data or options.check_data):
        raise ConfigError(
            "--tflite_type=int8 needs images for calibration: "
            "--calibration_data=FOLDER, 100 or more similar to those that the model will see"
        )
    if options.calibration_data and not int8:
        raise ConfigError("--calibration_data needs --format=tflite --tflite_type=int8")
    if options.format != "savedmodel" and options.serving_dtype != "float32":
        raise ConfigError(
            "--serving_dtype applies to SavedModels; use --tflite_type for a TFLite file"
        )
    if options.format == "tflite" and options.optimize_for != "cpu":
        raise ConfigError(
            f"--optimize_for={options.optimize_for} does not apply to --format=tflite, whose "
            "converter always folds batch norm: remove the flag"
        )
    if options.format != "tflite" and options.tflite_type != "float32":
        raise ConfigError(f"--tflite_type={options.tflite_type} needs --format=tflite")
    if options.format == "onnx":
        # Before the model is loaded, and before a file is written that cannot be compared.
        onnx_files.check_installed(compared=bool(options.check_data))


def _file_name(model, version: int | str, options: ExportConfig) -> str:
    if options.format == "savedmodel":
        return str(version)
    if options.format == "onnx":
        return f"{model.name}-{version}.onnx"
    return f"{model.name}-{version}-{options.tflite_type}.tflite"


def _model(resolved: ResolvedConfig, path: str, options: ExportConfig):
    # Layers use the global policy when they are built. It is restored, because `_compare` rebuilds
    # the model in float32.
    before = tf.keras.mixed_precision.global_policy()
    if options.serving_dtype == "bfloat16" and options.format == "savedmodel":
        tf.keras.mixed_precision.set_global_policy("mixed_bfloat16")
    try:
        model = resolved.build_model()
    finally:
        tf.keras.mixed_precision.set_global_policy(before)
    weights.load_weights(model, path, ema=options.ema)
    return model


def _facts(resolved: ResolvedConfig, path: str, options: ExportConfig) -> dict[str, object]:
    names = tasks.class_names(resolved.task)
    return {
        **({"Classes": name_lists.shortened(names)} if names else {}),
        "Weights": f"{os.path.basename(path.rstrip('/'))}{' (moving averages)' if options.ema else ''}",
        "Arithmetic": options.tflite_type if options.format == "tflite" else options.serving_dtype,
        **_provenance(resolved, path),
    }


def _export_options(
    resolved: ResolvedConfig, options: ExportConfig, facts: Mapping[str, object]
) -> export.Options:
    names = tasks.class_names(resolved.task) or map(str, range(resolved.num_classes))
    return export.Options(
        OutputSpec(tuple(names), top_k=options.top_k), options.optimize_for, facts, resolved.task
    )


def _provenance(resolved: ResolvedConfig, path: str) -> dict[str, object]:
    """Returns recipe, data and accuracy if the weights are from a training folder or published."""
    place = (path,) if tf.io.gfile.isdir(path) else os.path.split(path)
    if facts := provenance.of_training(*place):
        return facts  # First, because a training folder may have the name of a published model.
    if provenance.is_published(path, resolved.model_name):
        return provenance.of_publication(resolved.model_name, path)
    return {}


def _images(resolved: ResolvedConfig, place: str, limit: int):
    """Returns the encoded and the prepared images at `place`; none if `place` is empty."""
    if not place:
        return [], []
    encoded = check.encoded_images(place, limit)
    return encoded, inference.preprocess(encoded, resolved.preprocessing()).numpy()


def _float32_probabilities(job: _Job, images):
    """Returns the probabilities of the model as it was trained, in float32."""
    # Rebuilt, because the exported model may compute in bfloat16.
    float32 = dataclasses.replace(job.options, serving_dtype="float32")
    model = _model(job.resolved, job.path, float32)
    parts = [images[i : i + 8] for i in range(0, len(images), 8)]
    return np.concatenate([tf.nn.softmax(model(part, training=False)) for part in parts])


def _saved_model(job: _Job, model, version: int) -> str:
    options, preprocessing = job.options, job.resolved.preprocessing()
    # Before the export, so that unusable images are reported before a version exists.
    encoded, images = _images(job.resolved, options.check_data, options.check_images)
    folder = export.export(model, preprocessing, options.export_dir, version, job.exported)
    # From the encoded images, to include the graph's own decoding and cropping.
    _compare(job, images, lambda: export.saved_model_runner(folder)(encoded))
    return folder


_LOW_AGREEMENT = 0.95  # For int8; published models lose at most a twentieth.
# With fewer images, int8 calibrates its ranges for only these.
_FEW_IMAGES = 50


def _calibration(resolved: ResolvedConfig, options: ExportConfig, images):
    """Returns the prepared images for int8: those of --calibration_data, else `images`."""
    if options.tflite_type != "int8":
        return []
    if options.calibration_data:
        _, images = _images(resolved, options.calibration_data, options.check_images)
    if len(images) < _FEW_IMAGES:
        logging.warning(
            "int8 is calibrated on %d images; 100 or more make it more accurate",
            len(images),
        )
    return images


def _tflite(job: _Job, model, version: int) -> str:
    options = job.options
    _, images = _images(job.resolved, options.check_data, options.check_images)
    target = os.path.join(options.export_dir, _file_name(model, version, options))
    content = export.export_tflite(
        model,
        job.resolved.preprocessing(),
        target,
        options.tflite_type,
        job.exported,
        _calibration(job.resolved, options, images),
    )
    _compare(job, images, lambda: lite_files.runner(content)(images))
    return target


def _onnx(job: _Job, model, version: int) -> str:
    options = job.options
    _, images = _images(job.resolved, options.check_data, options.check_images)
    target = os.path.join(options.export_dir, _file_name(model, version, options))
    content = export.export_onnx(model, job.resolved.preprocessing(), target, job.exported)
    _compare(job, images, lambda: onnx_files.runner(content)(images))
    return target


def _compare(job: _Job, images, predict: Callable[[], np.ndarray]) -> None:
    """Prints how an export's probabilities for the images, if any, differ from the model's."""
    if not len(images):
        return
    difference = check.difference(_float32_probabilities(job, images), predict())
    print(f"against the float32 model: {difference}")
    if job.options.tflite_type == "int8" and difference.agreement < _LOW_AGREEMENT:
        print(
            "int8 changes the class of many images: calibrate with more images similar to those that the "
            "model will see (--calibration_data, --check_images), or export float32 or float16; Lite variants "
            "lose less than the others"
        )
