"""Measures how fast this machine trains a model, in a few seconds and without data."""

from __future__ import annotations

import time

import tensorflow as tf

from efficientnet_ns.config.sections import Config
from efficientnet_ns.devices import distribution
from efficientnet_ns.resolve.resolved_config import ResolvedConfig
from efficientnet_ns.training.optimizers import OPTIMIZERS
from efficientnet_ns.training.student import NoisyStudent
from efficientnet_ns.training.train import build_student

# Approximate share of the cores' time that decoding and augmentation take.
_INPUT_SHARE = 0.15


def images_per_second(config: Config, seconds: float = 6.0, batch_size: int = 16) -> float:
    """Returns the images per second of training `config`'s model, measured on random pixels.

    Updates, including averages, are measured; the share of decoding and augmentation is estimated.

    Args:
      config: training settings.
      seconds: how long to measure, after the graph is built.
      batch_size: images per update.
    """
    # There are neither unlabeled images nor initial weights to average with.
    resolved = ResolvedConfig.from_config(config.override(unlabel_ratio=0.0, ema_initial_share=0.0))
    # For its side effect: once something is computed, the CPU can no longer be divided into the
    # replicas that training may require.
    distribution.get_strategy(config.hardware)
    student = NoisyStudent(build_student(resolved), resolved.build_model(), resolved.config.train)
    student.compile(OPTIMIZERS[config.train.optimizer](1e-4))
    student.optimizer.build(student.student.trainable_variables)
    update = tf.function(student.train_step)
    side = resolved.image_size
    batch = {
        "image": tf.random.stateless_uniform([batch_size, side, side, 3], [0, 0], 0, 255),
        "label": tf.zeros([batch_size], tf.int32),
    }
    # Builds the graph, which is not measured.
    update(batch)
    steps, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds or steps < 2:
        # Converted to float to wait for the result, because devices compute asynchronously.
        float(update(batch)["train/loss"])
        steps += 1
    return steps * batch_size / elapsed * (1 - _INPUT_SHARE)
