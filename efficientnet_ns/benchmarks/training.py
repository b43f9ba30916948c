"""The training step beside that of `tf.keras.applications` on the same device.

Each contender runs in a process of its own, so that peak memory is its own and nothing that one
leaves behind slows another.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from efficientnet_ns.benchmarks.tables import Row
from efficientnet_ns.config import BenchmarkConfig, ConfigError

_KERAS = "tf.keras.applications"
_SAME_WORK = "forward, backward, RMSProp"
_WHOLE = "whole step (weight decay, moving average, metrics)"
_TURNS = 3


def run(config: BenchmarkConfig) -> list[Row]:
    """Images per second and peak memory of one update, ours and Keras' model.

    The same work: forward and backward pass in training mode, cross entropy with label smoothing,
    the same RMSProp. Ours is measured a second time with all that a student's update adds.
    """
    _peer_name(config.model_name)
    # In turns, so that all see the same machine.
    contenders = {"keras": _KERAS, "ours": _SAME_WORK, "whole": _WHOLE}
    share = dataclasses.replace(config, seconds=config.seconds / _TURNS, json_file="")
    results: dict[str, list[dict[str, float]]] = {}
    for _ in range(_TURNS):
        for key in contenders:
            results.setdefault(key, []).append(_measure(key, share))
    speed = {k: statistics.median(r["rate"] for r in v) for k, v in results.items()}
    memory = {k: statistics.median(r["megabytes"] for r in v) for k, v in results.items()}
    what = f"{config.model_name} at {config.image_size}, batch {config.batch_size}"
    rows = [Row(f"{what}: {_KERAS}", speed["keras"], "images/s")]
    for key in ("ours", "whole"):
        ratio = speed[key] / speed["keras"]
        rows.append(Row(f"{what}: {contenders[key]}", speed[key], "images/s", ratio, _KERAS))
    rows.append(Row(f"peak memory: {_KERAS}", memory["keras"], "MB"))
    for key in ("ours", "whole"):
        ratio = memory["keras"] / memory[key]
        rows.append(Row(f"peak memory: {contenders[key]}", memory[key], "MB", ratio, _KERAS))
    return rows


def _peer_name(model_name: str) -> str:
    """`EfficientNetB0` for `efficientnet-b0`."""
    variant = model_name.rpartition("-")[2]
    if variant not in [f"b{i}" for i in range(8)]:
        raise ConfigError(f"--model_name={model_name}: {_KERAS} has efficientnet-b0 to -b7 only")
    return f"EfficientNet{variant.upper()}"


def _measure(key: str, config: BenchmarkConfig) -> dict[str, float]:
    """One contender in a new process."""
    code = f"from {__name__} import print_work; print_work()"
    command = [sys.executable, "-c", code, key, json.dumps(dataclasses.asdict(config))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _keras_update(config: BenchmarkConfig) -> Callable:
    """Keras' own model, with its classifier's softmax left out."""
    import tensorflow as tf

    make = getattr(tf.keras.applications, _peer_name(config.model_name))
    shape = (config.image_size, config.image_size, 3)
    return _plain_update(make(weights=None, input_shape=shape, classifier_activation=None))


def _our_update(config: BenchmarkConfig) -> Callable:
    from efficientnet_ns.models import efficientnet

    return _plain_update(efficientnet.build_model(config.model_name, 1000, config.image_size))


def _plain_update(model) -> Callable:
    import tensorflow as tf

    from efficientnet_ns.training import losses
    from efficientnet_ns.training.optimizers import RMSPropTF1

    optimizer = RMSPropTF1(1e-3)
    optimizer.build(model.trainable_variables)

    @tf.function
    def update(batch):
        with tf.GradientTape() as tape:
            logits = model(tf.cast(batch["image"], tf.float32), training=True)
            loss = tf.reduce_mean(losses.smoothed_cross_entropy(logits, batch["label"], 0.1))
        variables = model.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables))
        return loss

    return update


def _whole_update(config: BenchmarkConfig) -> Callable:
    import tensorflow as tf

    from efficientnet_ns.models import efficientnet
    from efficientnet_ns.training.optimizers import RMSPropTF1
    from efficientnet_ns.training.student import LossSettings, NoisyStudent

    models = [
        efficientnet.build_model(config.model_name, 1000, config.image_size) for _ in range(2)
    ]
    trainer = NoisyStudent(*models, LossSettings())
    trainer.compile(RMSPropTF1(1e-3))
    trainer.optimizer.build(models[0].trainable_variables)
    return tf.function(trainer.train_step)


_UPDATES = {"keras": _keras_update, "ours": _our_update, "whole": _whole_update}


def _work(key: str, config: BenchmarkConfig) -> dict[str, float]:
    """Rate and peak memory of this process."""
    import tensorflow as tf

    if config.threads:
        tf.config.threading.set_intra_op_parallelism_threads(config.threads)
        tf.config.threading.set_inter_op_parallelism_threads(config.threads)
    tf.keras.utils.set_random_seed(0)
    shape = [config.batch_size, config.image_size, config.image_size, 3]
    batch = {
        "image": tf.cast(tf.random.uniform(shape, maxval=256, dtype=tf.int32), tf.uint8),
        "label": tf.random.uniform([config.batch_size], maxval=1000, dtype=tf.int32),
    }
    update = _UPDATES[key](config)
    for _ in range(2):
        tf.nest.map_structure(lambda x: x.numpy(), update(batch))
    steps, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < config.seconds or steps < 3:
        tf.nest.map_structure(lambda x: x.numpy(), update(batch))
        steps += 1
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # kilobytes on Linux
    return {"rate": steps * config.batch_size / elapsed, "megabytes": peak}


def print_work() -> None:
    """What a contender's process runs; the arguments are its key and its configuration."""
    print(json.dumps(_work(sys.argv[1], BenchmarkConfig(**json.loads(sys.argv[2])))))
