"""Runs TensorFlow Lite files: pixels in, probabilities out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import tensorflow as tf

from efficientnet_ns.config.cpus import available_cpus
from efficientnet_ns.data.pipeline import Preprocessing
from efficientnet_ns.inference import engines
from efficientnet_ns.resolve import stored_model


def runner(content: bytes, threads: int | None = None) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a function that runs a file: pixels float32 [N, S, S, 3] → probabilities [N, C]."""
    interpreter = engines.interpreter(content, threads)
    source, target = interpreter.get_input_details()[0], interpreter.get_output_details()[0]

    def one(image: np.ndarray) -> np.ndarray:
        if source["dtype"] != np.float32:
            scale, zero = source["quantization"]
            image = np.clip(np.round(image / scale + zero), 0, 255).astype(source["dtype"])
        interpreter.set_tensor(source["index"], image[None])
        interpreter.invoke()
        probabilities = interpreter.get_tensor(target["index"])[0].astype(np.float32)
        if target["dtype"] != np.float32:
            scale, zero = target["quantization"]
            probabilities = (probabilities - zero) * scale
        return probabilities

    return lambda images: np.stack([one(image) for image in images])


def encoded_runner(path: str) -> Callable[[Sequence[bytes]], dict[str, np.ndarray]]:
    """Returns a function that runs a file of `export_model` on encoded images.

    Safe to call from several threads: each core has a single-threaded interpreter.

    Returns:
      N encoded images → `probabilities` float32 [N, C] and `valid` bool [N], whether each can be
      decoded; the probabilities of undecodable images are 0.
    """
    stored = stored_model.read(path)
    images, classes = stored.images, stored.task.num_classes if stored.task else 0
    preprocessing = Preprocessing(
        images["image_size"],
        images.get("small_image", False),
        crop_fraction=images.get("crop_fraction"),
    )
    with tf.io.gfile.GFile(path, "rb") as f:
        content = f.read()
    cores = available_cpus()
    engine = engines.CpuEngine("tflite", 1, [runner(content, 1) for _ in range(cores)])
    pool = ThreadPoolExecutor(cores)

    def one(encoded: bytes) -> np.ndarray | None:
        try:
            pixels = preprocessing.evaluate(tf.constant(encoded)).numpy()
        except tf.errors.OpError:
            return None
        return engine(pixels[None])[0]

    def of_all(encoded: Sequence[bytes]) -> dict[str, np.ndarray]:
        rows = list(pool.map(one, encoded))
        nothing = np.zeros(classes, np.float32)
        return {
            "probabilities": np.stack([nothing if row is None else row for row in rows]),
            "valid": np.array([row is not None for row in rows]),
        }

    return of_all
