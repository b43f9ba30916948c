"""Runs exported models as they are: encoded images in, probabilities out.

The graph of a SavedModel crops, resizes and normalizes; a TensorFlow Lite file specifies the crop.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from efficientnet_ns.config import Config, ConfigError
from efficientnet_ns.config.cpus import available_cpus
from efficientnet_ns.data.pipeline import Preprocessing
from efficientnet_ns.files import local_files, manifests
from efficientnet_ns.inference import engines, lite_files
from efficientnet_ns.inference.meter import Meter
from efficientnet_ns.resolve import stored_model

_BATCH = 8
# Settings that an exported graph does not have → what they control.
_WITHOUT = {
    "input_image_size": "the image size",
    "eval_image_size": "the image size",
    "eval_views": "views",
    "test_time_views": "views",
    "noised_teacher": "noise",
    "eval_continuously": "checkpoints",
    "inference_dtype": "the precision",
    "fast_decode": "how images are decoded",
    "crop_fraction": "the crop",
}


def runner(
    folder: str | os.PathLike,
) -> Callable[[Sequence[bytes]], dict[str, np.ndarray]]:
    """Loads an export as a function: N encoded images → outputs by name, each [N, …].

    The outputs of a TensorFlow Lite file are `probabilities` and `valid`.
    """
    if stored_model.is_lite_file(os.fspath(folder)):
        return lite_files.encoded_runner(os.fspath(folder))
    with local_files.without_wildcards(os.fspath(folder)) as literal:
        loaded = tf.saved_model.load(literal)

    def run(encoded: Sequence[bytes]) -> dict[str, np.ndarray]:
        # The signature does not keep the model alive.
        signature = loaded.signatures["serving_default"]
        parts = [encoded[i : i + _BATCH] for i in range(0, len(encoded), _BATCH)]
        results = [signature(image_bytes=tf.constant(part)) for part in parts]
        return {name: np.concatenate([r[name].numpy() for r in results]) for name in results[0]}

    return run


class ExportedModel:
    """A model written by `export_model`, as a function of N encoded images.

    Safe to call from several threads.

    Args:
      folder: folder of the version, or a TensorFlow Lite file.

    Attributes:
      output_shape: (None, C), as for a Keras model.
      name, batch_size, concurrency, group, meter: as for an engine and a `TeacherPredictor`;
        decoding is part of the inference.
      num_classes: number of classes, C.
    """

    def __init__(self, folder: str | os.PathLike):
        self._run = runner(folder)
        task = stored_model.read(folder).task
        self.num_classes = task.num_classes if task else 0
        self.output_shape = (None, self.num_classes)
        self.name, self.batch_size, self.group = "export", _BATCH, 4 * _BATCH
        self.concurrency, self.engine, self.meter = max(2, available_cpus()), self, Meter()

    def run(self, encoded: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Returns probabilities float32 [N, C] and whether each image could be decoded, bool [N]."""
        found = self._run(encoded)
        return found["probabilities"], found["valid"]

    def __call__(self, encoded: Sequence[bytes], training: bool = False) -> np.ndarray:
        """Returns probabilities float32 [N, C] of encoded images; zeros for "", which pads batches.

        Raises:
          tf.errors.InvalidArgumentError: If an image cannot be decoded.
        """
        del training
        probabilities, valid = self.run(encoded)
        if any(image and not good for image, good in zip(encoded, valid)):
            raise tf.errors.InvalidArgumentError(None, None, "an image cannot be decoded")
        return probabilities

    def label(self, images: Sequence[bytes | None]) -> tuple[np.ndarray, dict[int, str]]:
        """See `TeacherPredictor.label`."""
        if not images:
            return np.zeros([0, self.num_classes], np.float32), {}
        with self.meter.timed("inference_us"):
            probabilities, valid = self.run([image or b"" for image in images])
        bad = [i for i, good in enumerate(valid) if not good and images[i] is not None]
        self.meter.add_images(images, len(images) - int(np.sum(valid)))
        return probabilities, dict.fromkeys(bad, "the image cannot be decoded")


class Encoded(Preprocessing):
    """Leaves images encoded, as an exported model expects them."""

    def evaluate(self, image: tf.Tensor) -> tf.Tensor:
        """Returns the encoded scalar string itself."""
        return image


def check(config: Config, stored: stored_model.StoredModel) -> None:
    """Raises ConfigError for settings that an exported graph cannot apply; names the flag.

    Args:
      stored: description of the export.
    """
    values: dict[str, Any] = config.values()
    own = {
        **Config().values(),
        "input_image_size": stored.images.get("image_size"),
        "crop_fraction": stored.crop_fraction,
    }
    for name, what in _WITHOUT.items():
        if values[name] not in (Config().values()[name], own[name]):
            raise ConfigError(
                f"--{name}={values[name]}: {what} of an exported model cannot be changed; omit the "
                "flag or pass the training folder"
            )
    kind = config.predict.inference_engine
    if kind in engines.CPU_ENGINES:
        raise ConfigError(f"--inference_engine={kind}: an exported model is run as it is")


def fingerprint(folder: str) -> str:
    """Returns a short hash of the graph and weights of an export."""
    if stored_model.is_lite_file(folder):
        return manifests.content_hash(folder)
    files = [os.path.join(folder, name) for name in _CONTENT]
    return "-".join(manifests.content_hash(path) for path in files if tf.io.gfile.exists(path))


# Weights that are not constants of the graph are listed with their checksums in the index.
_CONTENT = ("saved_model.pb", "variables/variables.index")
