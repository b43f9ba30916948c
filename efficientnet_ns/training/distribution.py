"""Where the computation runs."""

from __future__ import annotations

import json
import os

import tensorflow as tf

from efficientnet_ns.config import HardwareConfig


def get_strategy(hardware: HardwareConfig) -> tf.distribute.Strategy:
    """The distribution strategy for the given hardware.

    A TPU when one is named; several workers when TF_CONFIG describes a cluster; several GPUs when
    there are several; else the one local device.
    """
    if hardware.use_tpu and hardware.tpu:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(
            hardware.tpu, zone=hardware.tpu_zone, project=hardware.gcp_project
        )
        if hardware.tpu != "local":
            tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
        return tf.distribute.TPUStrategy(resolver)
    if json.loads(os.environ.get("TF_CONFIG") or "{}").get("cluster"):
        return tf.distribute.MultiWorkerMirroredStrategy()
    if len(tf.config.list_logical_devices("GPU")) > 1:
        return tf.distribute.MirroredStrategy()
    return tf.distribute.get_strategy()


def set_precision(hardware: HardwareConfig, strategy: tf.distribute.Strategy) -> None:
    """mixed_bfloat16 on TPU when asked for, else float32: most CPUs emulate bfloat16."""
    on_tpu = isinstance(strategy, tf.distribute.TPUStrategy)
    policy = "mixed_bfloat16" if on_tpu and hardware.use_bfloat16 else "float32"
    tf.keras.mixed_precision.set_global_policy(policy)
