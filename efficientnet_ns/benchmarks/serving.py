"""Measures throughput and latency of exported models on decoded images.

Batch size, threads and oneDNN vary. Peers are the export without optimization, TensorFlow Lite, and
the same network in `tf.keras.applications`. All SavedModels run in TensorFlow's session loader, as
in a server. A process has one thread pool and one kind of kernels, so each situation has a separate
process.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from efficientnet_ns.benchmarks import keras_peer, tables
from efficientnet_ns.config import BenchmarkConfig, Config
from efficientnet_ns.config.cpus import available_cpus
from efficientnet_ns.inference import lite_files
from efficientnet_ns.resolve.resolved_config import ResolvedConfig
from efficientnet_ns.serving import export
from efficientnet_ns.serving.signatures import OutputSpec

_BATCHES = (1, 8)
_LATENCIES = 40
_TURNS = 15
_KERAS, _LITE = keras_peer.NAME, "TFLite float32"
_CPU, _NONE, _BFLOAT16 = "SavedModel cpu", "SavedModel none", "SavedModel cpu bfloat16"
# Contender → its peer.
_PEERS = {_CPU: _NONE, _LITE: _KERAS, _BFLOAT16: _CPU}


class Situation(NamedTuple):
    """The number of threads and whether TensorFlow uses oneDNN kernels."""

    threads: int
    onednn: bool

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return f"{threads}, oneDNN {'on' if self.onednn else 'off'}"


def run(config: BenchmarkConfig) -> list[tables.Row]:
    """Exports once, then measures every situation."""
    rows: list[tables.Row] = []
    with tempfile.TemporaryDirectory() as folder:
        _export(config, folder)
        for situation in _situations(config):
            with tables.environment(**{tables.ONEDNN: str(int(situation.onednn))}):
                context = multiprocessing.get_context("spawn")
                with ProcessPoolExecutor(1, context) as process:
                    rows += process.submit(_measure, config, folder, situation).result()
    return rows


def _situations(config: BenchmarkConfig) -> list[Situation]:
    threads = config.threads or available_cpus()
    single = [Situation(1, True)] if config.threads is None and threads > 1 else []
    return [Situation(threads, True), *single, Situation(threads, False)]


def _export(config: BenchmarkConfig, folder: str) -> None:
    """Writes a folder or file with random weights for each contender."""
    settings = Config().override(model_name=config.model_name, input_image_size=config.image_size)
    resolved = ResolvedConfig.from_config(settings)
    model = resolved.build_model()
    # Layers use the policy that is global when they are created.
    tf.keras.mixed_precision.set_global_policy("mixed_bfloat16")
    reduced = resolved.build_model()
    tf.keras.mixed_precision.set_global_policy("float32")
    _shift(model)
    _shift(reduced)
    for name, target, served in (
        (_NONE, "none", model),
        (_CPU, "cpu", model),
        (_BFLOAT16, "cpu", reduced),
    ):
        options = export.Options(OutputSpec(("",) * resolved.num_classes), target)
        export.export(served, resolved.preprocessing(), os.path.join(folder, name), 1, options)
    options = export.Options(OutputSpec(("",) * resolved.num_classes))
    path = os.path.join(folder, _LITE)
    export.export_tflite(model, resolved.preprocessing(), path, "float32", options)
    _export_keras(config, os.path.join(folder, _KERAS, "1"))


def _shift(model: tf.keras.Model) -> None:
    """Makes biases nonzero, as after training, because TensorFlow optimizes away adding zeros."""
    rng = np.random.default_rng(0)
    for variable in model.variables:
        if variable.name.endswith(("/beta:0", "/bias:0")):
            variable.assign(rng.normal(0, 0.1, variable.shape))


def _export_keras(config: BenchmarkConfig, folder: str) -> None:
    """Exports the same network of Keras as a SavedModel."""
    shape = (config.image_size, config.image_size, 3)
    model = keras_peer.build(config.model_name, input_shape=shape)
    holder = tf.Module()
    # The variables of a function must belong to the saved object.
    holder.held = model.variables

    @tf.function(input_signature=[tf.TensorSpec([None, *shape], tf.float32)])
    def predict(images):
        return {"probabilities": model(images, training=False)}

    tf.saved_model.save(holder, folder, signatures={"predict_images": predict})


def _measure(config: BenchmarkConfig, folder: str, situation: Situation) -> list[tables.Row]:
    """Measures throughput of all contenders in turns, then latencies of the optimized export."""
    # Without oneDNN, TensorFlow has no fast kernels for bfloat16.
    names = [_NONE, _CPU, _KERAS] + [_BFLOAT16] * situation.onednn
    calls = {
        name: session(os.path.join(folder, name, "1"), "predict_images", situation.threads)
        for name in names
    }
    with open(os.path.join(folder, _LITE), "rb") as f:
        lite = _lite(f.read(), situation.threads)
    rows: list[tables.Row] = []
    batches = sorted({*_BATCHES, config.batch_size})
    for batch in batches:
        pixels = _pixels(config, batch)
        work: dict[str, Callable[[], int]] = {
            name: functools.partial(_count, call, pixels) for name, call in calls.items()
        }
        work[_LITE] = functools.partial(lite, pixels)
        rows += _throughput(work, f", batch {batch}, {situation}", config.seconds / len(batches))
    for batch in _BATCHES:
        name = f"{_CPU}, batch {batch}, {situation}"
        rows += _latency(name, calls[_CPU], _pixels(config, batch))
    return rows


def _count(call: Callable[[np.ndarray], np.ndarray], pixels: np.ndarray) -> int:
    return len(call(pixels))


def session(
    folder: str, signature: str, threads: int | None = None
) -> Callable[[np.ndarray], np.ndarray]:
    """Loads a signature of a SavedModel with the session loader: input → probabilities.

    Args:
      threads: CPU threads; the first session of a process decides for all. None for all cores.
    """
    options = tf.compat.v1.ConfigProto(
        intra_op_parallelism_threads=threads or 0, inter_op_parallelism_threads=threads or 0
    )
    loaded = tf.compat.v1.Session(graph=tf.Graph(), config=options)
    with loaded.graph.as_default():
        meta = tf.compat.v1.saved_model.loader.load(loaded, ["serve"], folder)
    chosen = meta.signature_def[signature]
    (source,) = (info.name for info in chosen.inputs.values())
    # Cheaper per call than `run`, which looks up its arguments each time.
    return loaded.make_callable(chosen.outputs["probabilities"].name, [source])


def _lite(content: bytes, threads: int) -> Callable[[np.ndarray], int]:
    """Returns a function that divides a batch among an interpreter per thread; returns its size.

    An interpreter processes one image at a time, so a batch of one uses one thread.
    """
    # Threads cannot share an interpreter.
    runners = [lite_files.runner(content, 1) for _ in range(threads)]
    pool = ThreadPoolExecutor(threads)

    def work(pixels: np.ndarray) -> int:
        parts = np.array_split(pixels, min(threads, len(pixels)))
        return sum(len(done) for done in pool.map(lambda run, part: run(part), runners, parts))

    return work


def _pixels(config: BenchmarkConfig, batch: int) -> np.ndarray:
    size = [batch, config.image_size, config.image_size, 3]
    return np.random.default_rng(0).uniform(0, 255, size).astype(np.float32)


def _throughput(work: dict[str, Callable[[], int]], where: str, seconds: float) -> list[tables.Row]:
    measured = tables.measure(work, seconds, _TURNS)
    rows = []
    for name in work:
        peer = _PEERS.get(name, "")
        ratio = measured.ratio(name, peer) if peer else None
        rate, spread = measured.rate(name), measured.spread(name)
        rows.append(tables.Row(name + where, rate, "images/s", ratio, peer, spread))
    return rows


def _latency(name: str, call: Callable, pixels: np.ndarray) -> list[tables.Row]:
    seconds = []
    for _ in range(_LATENCIES):
        start = time.perf_counter()
        call(pixels)
        seconds.append(time.perf_counter() - start)
    return [
        tables.Row(f"{name}, p{percent}", float(np.percentile(seconds, percent)) * 1e3, "ms")
        for percent in (50, 99)
    ]
