"""Measures labeling end to end, from records to predictions with their index.

For each installed engine, this measures predict and, as its limit, the bare engine on tensors in
memory. Peers are the same network in `tf.keras.applications` under `tf.function`, on decoded
images, with TensorFlow's defaults and without its oneDNN kernels, as on CPUs without AVX512_VNNI;
and ONNX Runtime, if it and tf2onnx are installed.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import tensorflow as tf
from absl import logging

from efficientnet_ns.benchmarks import inputs, keras_peer, tables
from efficientnet_ns.config import BenchmarkConfig, Config
from efficientnet_ns.config.cpus import available_cpus, limited_cpus
from efficientnet_ns.files import tfexamples, tfrecords
from efficientnet_ns.inference import engines
from efficientnet_ns.models import weights
from efficientnet_ns.pseudo_labels import predict
from efficientnet_ns.resolve.resolved_config import ResolvedConfig

_FIRST_IMAGES = 64  # Number of images in the warm-up shard.
_TURNS = 5
_KERAS = keras_peer.NAME
# Engine → its settings. XNNPACK, which is always available, is the baseline for the others.
_ENGINES = {
    "xnnpack": {"inference_engine": "xnnpack"},
    "openvino": {"inference_engine": "openvino"},
    "openvino-bfloat16": {"inference_engine": "openvino", "inference_dtype": "bfloat16"},
}


def run(config: BenchmarkConfig) -> list[tables.Row]:
    """Measures images per second of all contenders in turns.

    In each turn, predict labels a shard that takes about `config.seconds`, so that the relative
    cost per shard is as small as for real shards.

    Raises:
      ConfigError: If `config.data` has no images, Keras does not have the model, or there are fewer
        cores than `config.threads`.
    """
    # Before TensorFlow starts its threads.
    with limited_cpus(config.threads):
        return _run(config)


def _run(config: BenchmarkConfig) -> list[tables.Row]:
    _, images = inputs.encoded_images(config.data)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        works = _works(config, images, folder)
        contenders: dict[str, Callable[[], int]] = {}
        for name, work in works.items():
            contenders[f"predict, {name}"] = work.label_shard
            contenders[f"bare {name}"] = work.bare_engine
        first = works["xnnpack"]
        pixels = first.decoded(images[: config.batch_size])
        contenders[_KERAS] = _keras(config.model_name, pixels)
        without = stack.enter_context(_without_onednn(config.model_name, pixels))
        contenders[f"{_KERAS}, oneDNN off"] = without
        contenders.update(_onnxruntime(first.model, pixels))
        measured = tables.measure(contenders, config.seconds, _TURNS)
    return [
        tables.Row(name, measured.rate(name), "images/s", spread=measured.spread(name))
        for name in contenders
    ] + _ratios(measured, list(works))


def _ratios(measured: tables.Measured, engine_names: list[str]) -> list[tables.Row]:
    """Compares each engine's predict with its bare engine, the peers, and predict with XNNPACK."""
    rows = []
    for name in engine_names:
        own = f"predict, {name}"
        others = [peer for peer in measured.turns if not peer.startswith(("predict, ", "bare "))]
        limits = [f"bare {engine}" for engine in ("openvino", name) if engine in engine_names]
        above = [] if name == "xnnpack" else ["predict, xnnpack"]
        for peer in dict.fromkeys([*limits, *above, *others]):
            ratio = measured.ratio(own, peer)
            rows.append(tables.Row(own, measured.rate(own), "images/s", ratio, peer))
    return rows


def _works(config: BenchmarkConfig, images: list[bytes], folder: str) -> dict[str, _Work]:
    works = {}
    for name, engine in _ENGINES.items():
        try:
            works[name] = _Work(config, images, os.path.join(folder, name), engine)
        except engines.EngineError as e:
            logging.warning("%s is skipped: %s", name, e)
    return works


class _Work:
    """A teacher with random weights and a shard of records for it.

    Args:
      engine: settings that select the engine.

    Raises:
      EngineError: If the engine is not installed or the CPU does not support it.
    """

    def __init__(
        self, config: BenchmarkConfig, images: list[bytes], folder: str, engine: dict[str, str]
    ):
        settings = Config().override(
            **engine,
            model_name=config.model_name,
            input_image_size=config.image_size,
            predict_ckpt_path=os.path.join(folder, "teacher"),
            unlabel_data_dir=os.path.join(folder, "unlabeled"),
            num_shards=1,
        )
        self._examples = [tfexamples.unlabeled_example(image) for image in images]
        self._folder, self._settings, self._runs = folder, settings, 0
        self._seconds = config.seconds
        self._resolved = ResolvedConfig.from_config(settings)
        self.model = self._resolved.build_model()
        tf.io.gfile.makedirs(folder)
        weights.save_weights(self.model, settings.predict.predict_ckpt_path)
        self.teacher = predict.TeacherPredictor(self._resolved, settings.predict.predict_ckpt_path)
        # Pixels for the bare engine, which does not decode images.
        self._ready = np.random.default_rng(0).uniform(
            0, 255, [self.teacher.group, *self.model.input_shape[1:]]
        )
        self._ready = self._ready.astype(np.float32)
        self._write(_FIRST_IMAGES)

    def _write(self, count: int) -> None:
        chosen = [self._examples[i % len(self._examples)] for i in range(count)]
        tfrecords.write_sharded(self._settings.data.unlabel_data_dir, "train", chosen, 1)

    def decoded(self, images: list[bytes]) -> np.ndarray:
        """Returns the evaluation crops of the images, float32 [N, S, S, 3]."""
        evaluate = self._resolved.preprocessing().evaluate
        return tf.stack([evaluate(image) for image in images]).numpy()

    def label_shard(self) -> int:
        """Labels the shard into a new folder; the first, short run sets the size of the next."""
        self._runs += 1
        folder = os.path.join(self._folder, str(self._runs))
        # In the folder of an earlier run, the shard would already be finished and be skipped.
        settings = self._settings.override(output_dir=folder, info_dir=folder)
        start = time.perf_counter()
        images = predict.predict(settings, teacher=self.teacher)["records"]
        if self._runs == 1:
            rate = images / (time.perf_counter() - start)
            self._write(max(_FIRST_IMAGES, int(rate * self._seconds)))
        return images

    def bare_engine(self) -> int:
        """Runs all threads of the engine, each on a separate group of images."""
        engine = self.teacher.engine
        return _in_threads(engine.concurrency, 8, lambda: engine(self._ready))


def _in_threads(threads: int, rounds: int, work: Callable[[], np.ndarray]) -> int:
    """Calls `work` `rounds` times on each of `threads` threads; returns the total rows."""

    def one_thread(_: int) -> int:
        return sum(len(work()) for _ in range(rounds))

    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(one_thread, range(threads)))


def _keras(model_name: str, pixels: np.ndarray) -> Callable[[], int]:
    """Returns a function that runs inference of the same network of Keras."""
    model = keras_peer.build(model_name)
    # Keras builds the variant at its default resolution.
    batch = tf.image.resize(pixels, model.input_shape[1:3])
    step = tf.function(lambda x: model(x, training=False))

    def work() -> int:
        return sum(len(step(batch).numpy()) for _ in range(3))

    return work


@contextlib.contextmanager
def _without_onednn(model_name: str, pixels: np.ndarray) -> Iterator[Callable[[], int]]:
    """Runs `_keras` in a separate process, because TensorFlow reads the variable only once."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        1, mp_context=context, initializer=_start_peer, initargs=(model_name, pixels)
    ) as pool:
        # The process starts with its first task and inherits the environment at that time.
        with tables.environment(**{tables.ONEDNN: "0"}):
            pool.submit(_peer_works).result()
        yield lambda: pool.submit(_peer_works).result()


_peer: list[Callable[[], int]] = []  # In the process without oneDNN: a single one.


def _start_peer(model_name: str, pixels: np.ndarray) -> None:
    _peer.append(_keras(model_name, pixels))


def _peer_works() -> int:
    return _peer[0]()


def _onnxruntime(model: tf.keras.Model, pixels: np.ndarray) -> dict[str, Callable[[], int]]:
    """Runs the same network in ONNX Runtime, on all cores and per core; empty if not installed."""
    try:
        import onnxruntime
        import tf2onnx
    except ImportError as e:
        logging.warning("ONNX Runtime is skipped: %s (pip install onnxruntime tf2onnx)", e)
        return {}
    signature = [tf.TensorSpec([None, *model.input_shape[1:]], tf.float32, name="pixels")]
    proto, _ = tf2onnx.convert.from_keras(model, input_signature=signature, opset=17)
    content = proto.SerializeToString()
    cores = available_cpus()

    def session(threads: int) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        return onnxruntime.InferenceSession(content, options, ["CPUExecutionProvider"])

    whole, single = session(cores), session(1)
    one = pixels[:1]
    return {
        f"ONNX Runtime, {cores} threads, batch {len(pixels)}": lambda: _in_threads(
            1, 4, lambda: whole.run(None, {"pixels": pixels})[0]
        ),
        "ONNX Runtime, a thread per core, batch 1": lambda: _in_threads(
            cores, 32, lambda: single.run(None, {"pixels": one})[0]
        ),
    }
