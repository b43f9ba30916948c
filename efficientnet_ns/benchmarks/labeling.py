"""Labeling end to end, from records to predictions with their index, beside what limits it.

Peers: the same network in `tf.keras.applications` under `tf.function`, on images that are already
decoded, with TensorFlow as it comes and with its oneDNN kernels off, as they are on CPUs without
AVX512_VNNI; the bare engine on tensors that are ready; ONNX Runtime, if it and tf2onnx are
installed.
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

from efficientnet_ns.benchmarks import tables
from efficientnet_ns.config import BenchmarkConfig, Config, ConfigError
from efficientnet_ns.config.cpus import available_cpus
from efficientnet_ns.files import tfexamples, tfrecords
from efficientnet_ns.inference import engines
from efficientnet_ns.models import weights
from efficientnet_ns.pseudo_labels import predict
from efficientnet_ns.resolve.resolved_config import ResolvedConfig

_FIRST_IMAGES = 64  # Of the shard that warms up.
_TURNS = 5
_EXTENSIONS = (".jpeg", ".jpg", ".png")
_SELF = "predict, records to predictions"
_KERAS = "tf.keras.applications"


def run(config: BenchmarkConfig) -> list[tables.Row]:
    """Images per second of everybody, measured in turns.

    In each turn predict labels a shard that takes it about `config.seconds`, so that what is paid
    once per shard is as small as in real ones.
    """
    images = _images(config.data)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        work, pixels = _predict(config, images, folder)
        contenders = {_SELF: work.label_shard, "bare engine": work.bare_engine}
        contenders[_KERAS] = _keras(config.model_name, pixels)
        without = stack.enter_context(_without_onednn(config.model_name, pixels))
        contenders[f"{_KERAS}, oneDNN off"] = without
        with contextlib.suppress(_Absent):
            contenders.update(_onnxruntime(config, work.model, pixels))
        measured = tables.measure(contenders, config.seconds, _TURNS)
    rows = [tables.Row(_SELF, measured.rate(_SELF), "images/s")]
    for name in contenders:
        if name != _SELF:
            ratio = measured.ratio(_SELF, name)
            peer = f"{name} (predict / this)"
            rows.append(tables.Row(name, measured.rate(name), "images/s", ratio, peer))
    return rows


class _Absent(RuntimeError):
    """A peer is not installed."""


def _images(folder: str) -> list[bytes]:
    """Encoded images of a folder of image files, or made ones."""
    if not folder:
        rng = np.random.default_rng(0)
        smooth = [tf.image.resize(rng.uniform(0, 255, [8, 8, 3]), [375, 500]) for _ in range(32)]
        return [tf.io.encode_jpeg(tf.cast(image, tf.uint8)).numpy() for image in smooth]
    names = sorted(n for n in tf.io.gfile.listdir(folder) if n.lower().endswith(_EXTENSIONS))
    if not names:
        raise ConfigError(f"--data={folder} holds no files named {', '.join(_EXTENSIONS)}")
    images = []
    for name in names:
        with tf.io.gfile.GFile(os.path.join(folder, name), "rb") as f:
            images.append(f.read())
    return images


class _Work:
    """A teacher with random weights, and a shard of records for it."""

    def __init__(self, config: BenchmarkConfig, images: list[bytes], folder: str):
        settings = Config().override(
            model_name=config.model_name,
            input_image_size=config.image_size,
            predict_ckpt_path=os.path.join(folder, "teacher"),
            unlabel_data_dir=os.path.join(folder, "unlabeled"),
            num_shards=1,
        )
        self._examples = [tfexamples.unlabeled_example(image) for image in images]
        self._folder, self._settings, self._runs = folder, settings, 0
        self._seconds = config.seconds
        self._experiment = ResolvedConfig.from_config(settings)
        self.model = self._experiment.build_model()
        weights.save_weights(self.model, settings.predict.predict_ckpt_path)
        self.teacher = predict.TeacherPredictor(
            self._experiment, settings.predict.predict_ckpt_path
        )
        self._ready = np.random.default_rng(0).uniform(
            0, 255, [self.teacher.group, *self.model.input_shape[1:]]
        )
        self._ready = self._ready.astype(np.float32)
        self._write(_FIRST_IMAGES)

    def _write(self, count: int) -> None:
        chosen = [self._examples[i % len(self._examples)] for i in range(count)]
        tfrecords.write_sharded(self._settings.data.unlabel_data_dir, "train", chosen, 1)

    def label_shard(self) -> int:
        """Labels the shard, into a new folder; after the first, a short one, comes the long one."""
        self._runs += 1
        folder = os.path.join(self._folder, str(self._runs))
        settings = self._settings.override(output_dir=folder, info_dir=folder)
        start = time.perf_counter()
        images = predict.predict(settings, teacher=self.teacher)["records"]
        if self._runs == 1:
            rate = images / (time.perf_counter() - start)
            self._write(max(_FIRST_IMAGES, int(rate * self._seconds)))
        return images

    def bare_engine(self) -> int:
        """Every lane of the engine on a group of its own."""
        engine = self.teacher.engine
        concurrency = engine.concurrency if isinstance(engine, engines.XnnpackEngine) else 1
        return _in_threads(concurrency, 8, lambda: engine(self._ready))


def _in_threads(lanes: int, rounds: int, work: Callable[[], np.ndarray]) -> int:
    """Units done: rows of what `work` gives, called `rounds` times on each of `lanes` threads."""

    def lane(_: int) -> int:
        return sum(len(work()) for _ in range(rounds))

    with ThreadPoolExecutor(lanes) as pool:
        return sum(pool.map(lane, range(lanes)))


def _predict(config: BenchmarkConfig, images: list[bytes], folder: str) -> tuple[_Work, np.ndarray]:
    """The work, and the first images decoded: float32 [batch_size, S, S, 3]."""
    work = _Work(config, images, folder)
    preprocessing = work._experiment.preprocessing()
    decoded = [preprocessing.evaluate(image) for image in images[: config.batch_size]]
    return work, tf.stack(decoded).numpy()


def _keras(model_name: str, pixels: np.ndarray) -> Callable[[], int]:
    """The variant in tf.keras.applications, which has B0 to B7."""
    name = model_name.replace("efficientnet-b", "EfficientNetB")
    model = getattr(tf.keras.applications, name)(weights=None)
    batch = tf.image.resize(pixels, model.input_shape[1:3])
    step = tf.function(lambda x: model(x, training=False))

    def work() -> int:
        return sum(len(step(batch).numpy()) for _ in range(3))

    return work


@contextlib.contextmanager
def _without_onednn(model_name: str, pixels: np.ndarray) -> Iterator[Callable[[], int]]:
    """`_keras` in a process of its own, since TensorFlow looks at the variable once."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        1, mp_context=context, initializer=_start_peer, initargs=(model_name, pixels)
    ) as pool:
        with tables.environment(**{tables.ONEDNN: "0"}):
            pool.submit(_peer_works).result()
        yield lambda: pool.submit(_peer_works).result()


_peer: Callable[[], int] | None = None  # Of the process without oneDNN.


def _start_peer(model_name: str, pixels: np.ndarray) -> None:
    global _peer
    _peer = _keras(model_name, pixels)


def _peer_works() -> int:
    return _peer()


def _onnxruntime(
    config: BenchmarkConfig, model: tf.keras.Model, pixels: np.ndarray
) -> Iterator[tuple[str, Callable[[], int]]]:
    """The same network in ONNX Runtime: one session on all cores, and one session per core."""
    try:
        import onnxruntime
        import tf2onnx
    except ImportError as e:
        logging.warning("ONNX Runtime is left out: %s (pip install onnxruntime tf2onnx)", e)
        raise _Absent from e
    signature = [tf.TensorSpec([None, *model.input_shape[1:]], tf.float32, name="pixels")]
    proto, _ = tf2onnx.convert.from_keras(model, input_signature=signature, opset=17)
    content = proto.SerializeToString()
    lanes = available_cpus()

    def session(threads: int) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        return onnxruntime.InferenceSession(content, options, ["CPUExecutionProvider"])

    whole, single = session(lanes), session(1)
    one = pixels[:1]
    yield (
        f"ONNX Runtime, {lanes} threads, batch {len(pixels)}",
        lambda: _in_threads(1, 4, lambda: whole.run(None, {"pixels": pixels})[0]),
    )
    yield (
        "ONNX Runtime, a thread per core, batch 1",
        lambda: _in_threads(lanes, 32, lambda: single.run(None, {"pixels": one})[0]),
    )
