"""Labeling end to end, from records to predictions with their index, beside what limits it.

Peers: the same network in `tf.keras.applications` under `tf.function`, on images that are already
decoded; the bare engine on tensors that are ready; ONNX Runtime, if it and tf2onnx are installed.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import tensorflow as tf
from absl import logging

from efficientnet_ns.benchmarks import tables
from efficientnet_ns.config import BenchmarkConfig, Config, ConfigError
from efficientnet_ns.data import records
from efficientnet_ns.experiment import Experiment
from efficientnet_ns.labeling import predict
from efficientnet_ns.models import engines, weights

_IMAGES = 360  # Per shard: long enough to hide what is paid once per shard.
_EXTENSIONS = (".jpeg", ".jpg", ".png")
_SELF = "predict, records to predictions"


def run(config: BenchmarkConfig) -> list[tables.Row]:
    """Images per second of everybody, measured in turns."""
    images = _images(config.data)
    with tempfile.TemporaryDirectory() as folder:
        work, pixels = _predict(config, images, folder)
        contenders = {_SELF: work.label_shard, "bare engine": work.bare_engine}
        contenders["tf.keras.applications"] = _keras(config, pixels)
        with contextlib.suppress(_Absent):
            contenders.update(_onnxruntime(config, work.model, pixels))
        measured = tables.rates(contenders, config.seconds)
    ours = measured[_SELF]
    rows = [tables.Row(_SELF, ours, "images/s")]
    for name, rate in measured.items():
        if name != _SELF:
            rows.append(tables.Row(name, rate, "images/s", ours / rate, f"{name} (predict / this)"))
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
    """One shard of records and a teacher with random weights."""

    def __init__(self, config: BenchmarkConfig, images: list[bytes], folder: str):
        examples = [records.unlabeled_example(images[i % len(images)]) for i in range(_IMAGES)]
        records.write_sharded(os.path.join(folder, "unlabeled"), "train", examples, 1)
        settings = Config().override(
            model_name=config.model_name,
            input_image_size=config.image_size,
            predict_ckpt_path=os.path.join(folder, "teacher"),
            unlabel_data_dir=os.path.join(folder, "unlabeled"),
            num_shards=1,
        )
        self._folder, self._settings, self._runs = folder, settings, 0
        self._experiment = Experiment.from_config(settings)
        self.model = self._experiment.build_model()
        weights.save_weights(self.model, settings.predict.predict_ckpt_path)
        self.labeler = predict.Labeler(self._experiment, settings.predict.predict_ckpt_path)
        self._ready = np.random.default_rng(0).uniform(
            0, 255, [self.labeler.group, *self.model.input_shape[1:]]
        )
        self._ready = self._ready.astype(np.float32)

    def label_shard(self) -> int:
        """Labels the shard once more, into a new folder."""
        self._runs += 1
        folder = os.path.join(self._folder, str(self._runs))
        settings = self._settings.override(output_dir=folder, info_dir=folder)
        return predict.predict(settings, labeler=self.labeler)["records"]

    def bare_engine(self) -> int:
        """Every lane of the engine on a group of its own."""
        engine = self.labeler.engine
        lanes = engine.lanes if isinstance(engine, engines.XnnpackEngine) else 1
        rounds = max(1, _IMAGES // len(self._ready) // lanes)
        return _in_threads(lanes, rounds, lambda: engine(self._ready))


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


def _keras(config: BenchmarkConfig, pixels: np.ndarray) -> Callable[[], int]:
    """The variant in tf.keras.applications, which has B0 to B7."""
    name = config.model_name.replace("efficientnet-b", "EfficientNetB")
    model = getattr(tf.keras.applications, name)(weights=None)
    batch = tf.image.resize(pixels, model.input_shape[1:3])
    step = tf.function(lambda x: model(x, training=False))

    def work() -> int:
        return sum(len(step(batch).numpy()) for _ in range(3))

    return work


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
    lanes = os.cpu_count() or 1

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
