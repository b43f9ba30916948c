"""Numbers that both stacks compute, for test_stack.py.

To write them to a file:

python tests/stack_arrays.py FILE.npz
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import efficientnet_ns  # noqa: F401 - decides which Keras TensorFlow has

# isort: split
import fakes
import numpy as np
import tensorflow as tf

from efficientnet_ns.data import augment, pipeline
from efficientnet_ns.files import metrics_log
from efficientnet_ns.inference import engines
from efficientnet_ns.models import efficientnet, weights
from efficientnet_ns.training import train

# Prefixes of bit-identical arrays: those computed with integers or by the same kernels.
EXACT = ("pixels/", "draws/", "initial/")
SIZE = 32


def compute() -> dict[str, np.ndarray]:
    """Returns arrays by name; every call of one stack on one machine gives the same values."""
    return {**_pixels(), **_draws(), **_model(), **_training()}


def pictures() -> tf.Tensor:
    """Returns six smooth images with some noise, uint8 [6, 40, 52, 3]."""
    y, x = np.mgrid[:40, :52][..., np.newaxis]
    waves = np.sin(0.11 * x + np.arange(3)) + np.cos(0.17 * y * np.arange(1, 4))
    noise = np.random.default_rng(0).normal(0, 12, [6, 40, 52, 3])
    return tf.constant(np.clip(waves * 60 + 128 + noise, 0, 255).astype(np.uint8))


def _pixels() -> dict[str, np.ndarray]:
    noised = pipeline.Preprocessing(SIZE, augmentation=pipeline.RandAugment(2, 15))
    encoded = [tf.io.encode_png(image) for image in pictures()]
    seeds = [tf.constant([number, 7]) for number in range(len(encoded))]
    evaluate, student = tf.function(noised.evaluate), tf.function(noised.train)
    rotated = [augment.rotate(image, tf.constant(11.0 * i)) for i, image in enumerate(pictures())]
    return {
        "pixels/evaluation": np.stack([evaluate(image) for image in encoded[:2]]),
        "pixels/student": np.stack([student(*both) for both in zip(encoded, seeds)]),
        "pixels/rotated": np.stack(rotated)[..., 0],
    }


def _draws() -> dict[str, np.ndarray]:
    seed = tf.constant([3, 4])
    return {
        "draws/integers": tf.random.stateless_uniform([64], seed, 0, 1000, tf.int32).numpy(),
        "draws/uniform": tf.random.stateless_uniform([64], seed).numpy(),
        "draws/split": tf.random.experimental.stateless_split(seed, 8).numpy(),
    }


def _model() -> dict[str, np.ndarray]:
    tf.keras.utils.set_random_seed(5)
    tf.random.set_seed(5)  # conftest.py keeps Keras from doing so.
    model = efficientnet.build_model("efficientnet-test", 10, SIZE)
    values = {name: v.numpy() for name, v in weights.variable_names(model).items()}
    pixels = pictures()[:, :SIZE, :SIZE]
    return {
        "initial/weights": _first_of_each(values),
        "computed/logits": model(pixels, training=False).numpy(),
        "computed/training_logits": model(pixels, training=True).numpy(),
        "computed/xnnpack": engines.XnnpackEngine(model)(tf.cast(pixels, tf.float32).numpy()),
    }


def _training() -> dict[str, np.ndarray]:
    """Trains the noised student for 7 steps; returns its metrics and final weights."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fakes.write_data(folder)
        config = fakes.noised(folder, "student")
        train.train_and_evaluate(config)
        rows = metrics_log.read_metrics(config.train.model_dir)
        values = fakes.tensors(config.train.model_dir, 7)
    return {
        "trained/loss": np.array([row["train/loss"] for row in rows if "train/loss" in row]),
        "trained/weights": _first_of_each(
            {k: v for k, v in values.items() if v.dtype == "float32"}
        ),
    }


def _first_of_each(arrays: dict[str, np.ndarray], count: int = 12) -> np.ndarray:
    return np.concatenate([arrays[name].ravel()[:count] for name in sorted(arrays)])


if __name__ == "__main__":
    np.savez_compressed(sys.argv[1], **compute())
