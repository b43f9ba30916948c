"""Compares the training step with that of `tf.keras.applications` on the same device.

Each contender runs in a separate process, so that its peak memory is known and no contender slows
down another.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

from efficientnet_ns.benchmarks import keras_peer, tables
from efficientnet_ns.benchmarks.tables import Measured, Row
from efficientnet_ns.config import BenchmarkConfig

_KERAS = keras_peer.NAME
# Updates of our model: key → name in the results.
OWN_UPDATES = {
    "ours": "forward, backward, RMSProp",
    "whole": "whole step (weight decay, moving average, metrics)",
    "bfloat16": "whole step in mixed_bfloat16",
}
_TURNS = 8


def run(config: BenchmarkConfig) -> list[Row]:
    """Measures images per second and peak memory of one update of our model and of Keras'.

    Both do the same work: forward and backward pass in training mode, cross entropy with label
    smoothing, RMSProp. Our model is also measured with everything that a student's update adds, in
    float32 and in mixed_bfloat16, which most CPUs emulate.
    Ratios are medians over closely spaced turns, because machine speed drifts.

    Raises:
      ConfigError: If Keras does not have the model.
    """
    keras_peer.class_name(config.model_name)  # The processes would report this late.
    turns = _take_turns(["keras", *OWN_UPDATES], config)
    memory = {key: measured[-1]["megabytes"] for key, measured in turns.items()}
    speed = Measured({key: [turn["rate"] for turn in taken] for key, taken in turns.items()})
    what = f"{config.model_name} at {config.image_size}, batch {config.batch_size}"
    rate, spread = speed.rate("keras"), speed.spread("keras")
    rows = [Row(f"{what}: {_KERAS}", rate, "images/s", spread=spread)]
    for key, name in OWN_UPDATES.items():
        rate, spread, ratio = speed.rate(key), speed.spread(key), speed.ratio(key, "keras")
        rows.append(Row(f"{what}: {name}", rate, "images/s", ratio, _KERAS, spread))
    rows.append(Row(f"peak memory: {_KERAS}", memory["keras"], "MB"))
    for key, name in OWN_UPDATES.items():
        ratio = memory["keras"] / memory[key]
        rows.append(Row(f"peak memory: {name}", memory[key], "MB", ratio, _KERAS))
    return rows


def _take_turns(keys: list[str], config: BenchmarkConfig) -> dict[str, list[dict[str, float]]]:
    """Measures each contender turn by turn; only one process works at a time."""
    share = dataclasses.replace(config, seconds=config.seconds / _TURNS, json_file="")
    settings = json.dumps(dataclasses.asdict(share))
    with contextlib.ExitStack() as stack:
        running = {}
        for key in keys:
            code = f"from {__name__} import contend; contend(*__import__('sys').argv[1:])"
            command = [sys.executable, "-c", code, key, settings]
            pipe = subprocess.PIPE
            process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, bufsize=1)
            running[key] = stack.enter_context(process)
            # Runs first, because exiting the process's context waits for its end.
            stack.callback(process.kill)
            _ask(process)  # Builds, compiles and warms up.
        results: dict[str, list[dict[str, float]]] = {key: [] for key in keys}
        for turn in range(_TURNS):
            for key in tables.rotated(keys, turn):
                results[key].append(_ask(running[key]))
        return results


def _ask(process: subprocess.Popen) -> dict[str, float]:
    """Requests one turn of a contender."""
    assert process.stdout is not None
    print(file=process.stdin, flush=True)
    line = process.stdout.readline()
    if not line:
        raise subprocess.CalledProcessError(process.wait(), process.args)
    return json.loads(line)


def _keras_update(config: BenchmarkConfig) -> Callable:
    """Returns an update of Keras' model without the softmax of its classifier."""
    shape = (config.image_size, config.image_size, 3)
    model = keras_peer.build(config.model_name, input_shape=shape, classifier_activation=None)
    return _plain_update(model)


def _our_update(config: BenchmarkConfig) -> Callable:
    from efficientnet_ns.models import efficientnet

    # The same number of classes as Keras' model.
    return _plain_update(efficientnet.build_model(config.model_name, 1000, config.image_size))


def _plain_update(model) -> Callable:
    import tensorflow as tf

    from efficientnet_ns.training import losses
    from efficientnet_ns.training.optimizers import RMSPropTF1

    optimizer = RMSPropTF1(1e-3)
    optimizer.build(model.trainable_variables)

    def update(batch):
        with tf.GradientTape() as tape:
            logits = model(tf.cast(batch["image"], tf.float32), training=True)
            loss = tf.reduce_mean(losses.smoothed_cross_entropy(logits, batch["label"], 0.1))
        variables = model.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables))
        return loss

    return update


def _whole_update(config: BenchmarkConfig) -> Callable:
    from efficientnet_ns.config import TrainConfig
    from efficientnet_ns.models import efficientnet
    from efficientnet_ns.training.optimizers import RMSPropTF1
    from efficientnet_ns.training.student import NoisyStudent

    student, ema_student = (
        efficientnet.build_model(config.model_name, 1000, config.image_size) for _ in range(2)
    )
    trainer = NoisyStudent(student, ema_student, TrainConfig())
    trainer.compile(RMSPropTF1(1e-3))
    trainer.optimizer.build(student.trainable_variables)
    return trainer.train_step


def _bfloat16_update(config: BenchmarkConfig) -> Callable:
    import tensorflow as tf

    tf.keras.mixed_precision.set_global_policy("mixed_bfloat16")
    return _whole_update(config)


# Key → function of the settings that returns a function: batch → results of the update.
UPDATES = {
    "keras": _keras_update,
    "ours": _our_update,
    "whole": _whole_update,
    "bfloat16": _bfloat16_update,
}


def random_batch(config: BenchmarkConfig) -> dict:
    """Returns images and labels as from the input pipeline: uint8 and int32."""
    import tensorflow as tf

    shape = [config.batch_size, config.image_size, config.image_size, 3]
    return {
        "image": tf.cast(tf.random.uniform(shape, maxval=256, dtype=tf.int32), tf.uint8),
        "label": tf.random.uniform([config.batch_size], maxval=1000, dtype=tf.int32),
    }


def _work(key: str, config: BenchmarkConfig) -> Iterator[dict[str, float]]:
    """Yields images per second and peak memory of this process, turn by turn."""
    import tensorflow as tf

    if config.threads:
        tf.config.threading.set_intra_op_parallelism_threads(config.threads)
        tf.config.threading.set_inter_op_parallelism_threads(config.threads)
    tf.keras.utils.set_random_seed(0)
    batch = random_batch(config)
    update = tf.function(UPDATES[key](config))
    while True:
        steps, start = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - start) < config.seconds or steps < 2:
            # Copying to the host waits for the device.
            tf.nest.map_structure(lambda x: x.numpy(), update(batch))
            steps += 1
        yield {"rate": steps * config.batch_size / elapsed, "megabytes": tables.peak_memory()}


def contend(key: str, settings: str) -> None:
    """The main function of a contender's process: one turn and one output line per input line."""
    turns = _work(key, BenchmarkConfig(**json.loads(settings)))
    for _ in sys.stdin:
        print(json.dumps(next(turns)), flush=True)
