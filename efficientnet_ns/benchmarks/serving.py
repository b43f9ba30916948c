"""Exported models on encoded and on decoded images: latency and throughput by batch size.

Peers: the export as it was trained, TensorFlow Lite, and the same network in `tf.keras.applications`
under `tf.function`. SavedModels run in TensorFlow's session loader, as a server runs them.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from efficientnet_ns.benchmarks import tables
from efficientnet_ns.config import BenchmarkConfig, Config
from efficientnet_ns.experiment import Experiment
from efficientnet_ns.models import engines
from efficientnet_ns.serving import export
from efficientnet_ns.serving.classifier import Answers

_BATCHES = (1, 8)
_LATENCIES = 40


def run(config: BenchmarkConfig) -> list[tables.Row]:
    """Throughput of everybody in turns, then latencies of the optimised export."""
    settings = Config().override(model_name=config.model_name, input_image_size=config.image_size)
    experiment = Experiment.from_config(settings)
    model = experiment.build_model()
    rows: list[tables.Row] = []
    with tempfile.TemporaryDirectory() as folder:
        sessions = {}
        for name in ("none", "cpu"):
            options = export.Options(Answers(("",) * experiment.num_classes), name)
            base = os.path.join(folder, name)
            path = export.export(model, experiment.preprocessing(), base, 1, options)
            sessions[name] = session(path, "predict_images", config.threads)
        engine = engines.XnnpackEngine(model, config.threads)
        peer = _keras(config)
        for batch in dict.fromkeys((*_BATCHES, config.batch_size)):
            rows += _throughput(config, batch, sessions, engine, peer)
        for batch in _BATCHES:
            rows += _latency(
                f"SavedModel cpu, batch {batch}", sessions["cpu"], _pixels(config, batch)
            )
    return rows


def session(
    folder: str, signature: str, threads: int | None = None
) -> Callable[[np.ndarray], np.ndarray]:
    """Runs a signature of a SavedModel through the session loader: input → probabilities."""
    options = tf.compat.v1.ConfigProto(
        intra_op_parallelism_threads=threads or 0, inter_op_parallelism_threads=threads or 0
    )
    loaded = tf.compat.v1.Session(graph=tf.Graph(), config=options)
    with loaded.graph.as_default():
        meta = tf.compat.v1.saved_model.loader.load(loaded, ["serve"], folder)
    chosen = meta.signature_def[signature]
    (source,) = (info.name for info in chosen.inputs.values())
    call = loaded.make_callable(chosen.outputs["probabilities"].name, [source])
    return call


def _pixels(config: BenchmarkConfig, batch: int) -> np.ndarray:
    size = [batch, config.image_size, config.image_size, 3]
    return np.random.default_rng(0).uniform(0, 255, size).astype(np.float32)


def _keras(config: BenchmarkConfig) -> Callable[[np.ndarray], tf.Tensor]:
    """The variant in tf.keras.applications, which has B0 to B7."""
    name = config.model_name.replace("efficientnet-b", "EfficientNetB")
    shape = (config.image_size, config.image_size, 3)
    model = getattr(tf.keras.applications, name)(weights=None, input_shape=shape)
    return tf.function(lambda images: model(images, training=False))


def _throughput(config: BenchmarkConfig, batch: int, sessions, engine, peer) -> list[tables.Row]:
    pixels = _pixels(config, batch)
    many = np.concatenate([pixels] * -(-engine.lanes * engine.batch_size * 4 // batch))
    lanes = [part for part in np.array_split(many, engine.lanes) if len(part)]

    def lite() -> int:
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(len(lanes)) as pool:
            return sum(len(answer) for answer in pool.map(engine, lanes))

    keras_name = f"tf.keras.applications, batch {batch}"
    names = {"none": f"SavedModel none, batch {batch}", "cpu": f"SavedModel cpu, batch {batch}"}
    lite_name = f"TFLite float32, beside batch {batch}"
    measured = tables.rates(
        {
            names["none"]: lambda: len(sessions["none"](pixels)),
            names["cpu"]: lambda: len(sessions["cpu"](pixels)),
            lite_name: lite,
            keras_name: lambda: len(peer(pixels).numpy()),
        },
        config.seconds,
    )
    peers = {names["cpu"]: names["none"], lite_name: keras_name}
    return [
        tables.Row(
            name,
            rate,
            "images/s",
            rate / measured[peers[name]] if name in peers else None,
            peers.get(name, ""),
        )
        for name, rate in measured.items()
    ]


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
