"""TensorFlow Lite files: pixels in, probabilities out, with labels and normalization attached."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator, Sequence

import numpy as np
import tensorflow as tf

from efficientnet_ns.data import tasks
from efficientnet_ns.inference import engines
from efficientnet_ns.resolve import stored_model
from efficientnet_ns.serving import tflite_metadata

TYPES = ("float32", "float16", "dynamic", "int8")


def convert(model: tf.keras.Model, kind: str, representative: Sequence[np.ndarray] = ()) -> bytes:
    """Converts a model to a flatbuffer of pixels [1, S, S, 3] in 0..255 → probabilities [1, C].

    Args:
      model: pixels → logits.
      kind: one of `TYPES`. Input and output are float32, or uint8 for `int8` (all ops on integers).
      representative: a few hundred prepared images float32 [S, S, 3], from which `int8` calibrates
        its ranges.

    Raises:
      ConfigError: If the model exceeds 2 GB.
      ValueError: If the kind is unknown or `int8` has no images.
    """
    if kind not in TYPES:
        raise ValueError(f"unknown TFLite type {kind!r}; known: {', '.join(TYPES)}")
    if kind == "int8" and not len(representative):
        raise ValueError("int8 needs representative images")

    def configure(converter: tf.lite.TFLiteConverter) -> None:
        if kind == "float32":
            return
        # This default is `dynamic`: 8-bit weights, activations quantized at run time.
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        if kind == "float16":
            converter.target_spec.supported_types = [tf.float16]
        elif kind == "int8":
            converter.representative_dataset = lambda: _calibration(representative)
            # An op without an integer kernel fails the conversion instead of staying in float32.
            converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
            converter.inference_input_type = tf.uint8
            converter.inference_output_type = tf.uint8

    return engines.convert(model, 1, configure)


def _calibration(images: Sequence[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """Yields images in the format of the calibration, with pixels in the range of a byte.

    The input range becomes exactly 0..255, that is, scale 1 and offset 0, because applications pass
    bytes unchanged regardless of a file's settings. Bicubic resizing exceeds this range, and dark or
    pale images do not fill it, so two values of the first image are set to its limits.
    """
    for number, image in enumerate(images):
        image = np.clip(image, 0, 255)
        if number == 0:
            image.flat[0], image.flat[-1] = 0, 255
        yield [image[None]]


def with_metadata(
    content: bytes,
    labels: Sequence[str],
    facts: dict,
    described: tflite_metadata.Description,
) -> bytes:
    """Adds TensorFlow Lite metadata, and `labels.txt` and `metadata.json` as a ZIP archive.

    Interpreters ignore both. `zipfile.ZipFile(path)` and `unzip` read the attached files.

    Args:
      content: the file without metadata.
      labels: class names, in order of the probabilities.
      facts: content of `metadata.json`.
      described: content of TensorFlow Lite's metadata.
    """
    content = tflite_metadata.attach(content, tflite_metadata.encode(described))
    # A flatbuffer is read from its start and a ZIP archive from its end, so a file can be both.
    archive = io.BytesIO(content)
    with zipfile.ZipFile(archive, "a") as files:
        # ZipInfo has a fixed date, so equal models give equal files.
        files.writestr(zipfile.ZipInfo(described.labels_file), tasks.label_lines(labels))
        files.writestr(zipfile.ZipInfo(stored_model.LITE_FACTS), json.dumps(facts, indent=1))
    return archive.getvalue()
