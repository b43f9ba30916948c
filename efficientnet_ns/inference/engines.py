"""Engines that compute a model's probabilities: TensorFlow, and XNNPACK or OpenVINO on CPUs.

An engine maps pixels, float32 [N, S, S, 3] in about 0..255 with any N, to probabilities, float32
[N, C]. Internally, it processes batches of one static shape and pads the last one. The last bits of a
row may depend on the engine and on `batch_size`, but never on the other rows.

Calls from several threads are safe; up to `concurrency` calls run in parallel.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import tensorflow as tf
from absl import logging

from efficientnet_ns.config import ConfigError
from efficientnet_ns.config.cpus import available_cpus
from efficientnet_ns.devices import stack

try:
    from ai_edge_litert.interpreter import Interpreter
except ImportError:  # With TensorFlow 2.15, whose built-in interpreter is not deprecated.
    Interpreter = tf.lite.Interpreter

# Limit for the packed weights of all interpreters; above it, cores share interpreters.
_MAX_INTERPRETER_BYTES = 4 * 2**30
# A flatbuffer is limited to 2 GB, of which the graph uses the rest.
_MAX_PARAMETERS = 2**31 // 4 - 2**22
# `auto` uses OpenVINO only if it is faster by this factor, so that a tie gives the same engine in every run:
# predictions of another engine cannot continue a shard.
_CLEARLY_FASTER = 1.1
_PARTS_PER_WORKER = 4


class EngineError(ConfigError):
    """The requested engine cannot compute this model."""


class TensorFlowEngine:
    """Runs the model under its distribution strategy; a batch is divided among the replicas.

    While one call computes, others transfer their pixels to the devices and fetch their results.

    Args:
      model: pixels → logits, built under `strategy`.
      batch_size: number of images over all replicas; rounded up to a multiple of their number.
      strategy: distribution strategy; None for the current one.
    """

    def __init__(
        self,
        model: tf.keras.Model,
        batch_size: int,
        strategy: tf.distribute.Strategy | None = None,
    ):
        self._strategy = strategy or tf.distribute.get_strategy()
        self._per_replica = -(-batch_size // self._strategy.num_replicas_in_sync)
        self.name = "tf"
        self.batch_size = self._per_replica * self._strategy.num_replicas_in_sync
        # One call each to prepare, transfer, compute and fetch. Batches are large here, so more of them
        # would use memory without keeping the devices busier.
        self.concurrency = 4
        self._lock = threading.Lock()

        def forward(pixels):
            return tf.nn.softmax(model(pixels, training=False))

        @tf.function
        def step(pixels):
            return self._strategy.run(forward, args=(pixels,))

        self._step = step

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        return _by_batches(self._batch, pixels, self.batch_size)

    def _batch(self, pixels: np.ndarray) -> np.ndarray:
        values = self._transfer(pixels)
        # Replicas of two calls at once would wait for each other.
        with self._lock:
            results = self._step(values)
        return self._fetch(results)

    def _transfer(self, pixels: np.ndarray) -> tf.Tensor | tf.distribute.DistributedValues:
        """Copies each replica's part to its device."""
        if self._strategy.num_replicas_in_sync == 1:
            return tf.constant(pixels)
        devices = self._strategy.extended.worker_devices

        def part(context):
            start = context.replica_id_in_sync_group * self._per_replica
            with tf.device(devices[context.replica_id_in_sync_group]):
                return tf.constant(pixels[start : start + self._per_replica])

        return self._strategy.experimental_distribute_values_from_function(part)

    def _fetch(self, results: tf.Tensor | tf.distribute.DistributedValues) -> np.ndarray:
        local = self._strategy.experimental_local_results(results)
        return np.concatenate([result.numpy() for result in local])


class CpuEngine:
    """Runs calls in parallel, each with a separate worker.

    Args:
      name: name of the engine.
      batch_size: number of images that a worker computes at a time.
      workers: functions of pixels float32 [batch_size, S, S, 3] → probabilities float32 [batch_size, C].
    """

    def __init__(
        self, name: str, batch_size: int, workers: list[Callable[[np.ndarray], np.ndarray]]
    ):
        self.name, self.batch_size, self.concurrency = name, batch_size, len(workers)
        # Last in, first out: the tensors of the last worker used are still in the cache.
        self._free: queue.LifoQueue = queue.LifoQueue()
        for worker in workers:
            self._free.put(worker)

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        worker = self._free.get()
        try:
            return _by_batches(worker, pixels, self.batch_size)
        finally:
            self._free.put(worker)


class XnnpackEngine(CpuEngine):
    """Runs the model in TensorFlow Lite on CPUs, with batch norm folded into the convolutions.

    Each core has a single-threaded interpreter. For EfficientNet, this is a third faster than one
    interpreter on all cores, whose threads synchronize after every layer.

    Args:
      model: pixels → logits.
      threads: total number of CPU threads; None for one per available core.

    Raises:
      ValueError: See `convert`.
    """

    def __init__(self, model: tf.keras.Model, threads: int | None = None):
        batch_size = _cache_sized_batch(model.input_shape[1])
        content = convert(model, batch_size)
        threads = threads or available_cpus()
        number = min(threads, max(1, _MAX_INTERPRETER_BYTES // len(content)))

        def worker() -> Callable[[np.ndarray], np.ndarray]:
            own = interpreter(content, max(1, threads // number))
            source = own.get_input_details()[0]["index"]
            target = own.get_output_details()[0]["index"]

            def compute(rows: np.ndarray) -> np.ndarray:
                own.set_tensor(source, rows)
                own.invoke()
                return own.get_tensor(target)

            return compute

        super().__init__("xnnpack", batch_size, [worker() for _ in range(number)])


class OpenVinoEngine(CpuEngine):
    """Runs the model in OpenVINO on CPUs, one stream of one thread per core.

    Args:
      model: pixels → logits.
      threads: total number of CPU threads; None for one per available core.
      dtype: `float32`, or `bfloat16` for CPUs that support it (AVX512_BF16, AMX).

    Raises:
      ValueError: See `convert`.
      EngineError: If OpenVINO is not installed or the CPU does not support `dtype`.
    """

    def __init__(self, model: tf.keras.Model, threads: int | None = None, dtype: str = "float32"):
        openvino = _openvino()
        core = openvino.Core()
        if dtype == "bfloat16" and "BF16" not in core.get_property(
            "CPU", "OPTIMIZATION_CAPABILITIES"
        ):
            raise EngineError(
                "this CPU does not support bfloat16 (AVX512_BF16 or AMX); use --inference_dtype=float32"
            )
        # For B0 at 224 pixels, 2 to 8 are fastest: smaller batches pay per-layer overhead, larger ones
        # exceed the cache.
        batch_size = max(1, min(16, 4 * 224**2 // model.input_shape[1] ** 2))
        threads = threads or available_cpus()
        settings = {
            "INFERENCE_PRECISION_HINT": "f32" if dtype == "float32" else "bf16",
            "NUM_STREAMS": threads,
            "INFERENCE_NUM_THREADS": threads,
            # Pinned threads of two processes would share a core while other cores are idle.
            "ENABLE_CPU_PINNING": False,
        }
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "model.tflite")  # OpenVINO reads it only from files.
            with open(path, "wb") as f:
                f.write(convert(model, batch_size))
            compiled = core.compile_model(path, "CPU", settings)

        def worker() -> Callable[[np.ndarray], np.ndarray]:
            request = compiled.create_infer_request()
            return lambda rows: request.infer([np.ascontiguousarray(rows)], share_inputs=True)[0]

        name = "openvino" if dtype == "float32" else f"openvino-{dtype}"
        super().__init__(name, batch_size, [worker() for _ in range(threads)])


def _openvino():
    """Imports the module.

    Raises:
      EngineError: If it is not installed.
    """
    try:
        import openvino
    except ImportError as e:
        raise EngineError(
            f"OpenVINO cannot be imported ({e}): pip install 'efficientnet-ns[openvino]'"
        ) from e
    return openvino


def interpreter(content: bytes, threads: int | None = None) -> Interpreter:
    """Makes an interpreter of a .tflite file and allocates its tensors.

    Args:
      content: content of the file.
      threads: number of CPU threads; None for TensorFlow Lite's default.
    """
    with stack.without_native_log():
        made = Interpreter(model_content=content, num_threads=threads)
        made.allocate_tensors()
    return made


def on_all_workers(engine) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a function that divides the rows of each call among the workers of an engine.

    For callers with one thread, such as an evaluation. The results are those of the engine.

    Args:
      engine: an engine, or another function of rows with `batch_size` and `concurrency`.
    """
    pool = ThreadPoolExecutor(engine.concurrency)

    def compute(rows: np.ndarray) -> np.ndarray:
        # Several parts per worker, because some cores may be slower. Only the last part is padded.
        most = _PARTS_PER_WORKER * engine.concurrency * engine.batch_size
        part = max(1, -(-len(rows) // most)) * engine.batch_size
        return np.concatenate(
            list(pool.map(engine, [rows[i : i + part] for i in range(0, max(1, len(rows)), part)]))
        )

    return compute


def _by_batches(compute, pixels: np.ndarray, size: int) -> np.ndarray:
    results = []
    for start in range(0, len(pixels), size):
        rows = pixels[start : start + size]
        missing = size - len(rows)
        if missing:
            rows = np.concatenate([rows, np.zeros([missing, *rows.shape[1:]], rows.dtype)])
        results.append(compute(rows)[: size - missing])
    return np.concatenate(results)


def _cache_sized_batch(image_size: int) -> int:
    """Returns the images per invocation, so few that activations stay in a core's cache."""
    return max(1, min(16, 64 * 64 // image_size**2))


def convert(
    model: tf.keras.Model,
    batch_size: int,
    configure: Callable[[tf.lite.TFLiteConverter], None] | None = None,
) -> bytes:
    """Converts to a flatbuffer: pixels float32 [batch_size, S, S, 3] → probabilities float32.

    Args:
      model: pixels → logits.
      batch_size: static batch size of the result.
      configure: function that sets options of the converter, e.g. quantization.

    Raises:
      ConfigError: If the model is too large for a flatbuffer.
      ValueError: If it computes in bfloat16.
    """
    if model.count_params() > _MAX_PARAMETERS:
        raise ConfigError(
            f"{model.name} does not fit into a flatbuffer, which, unlike a SavedModel, is limited to 2 GB"
        )
    if any(layer.compute_dtype == "bfloat16" for layer in model.layers):
        raise ValueError(
            f"{model.name} computes in bfloat16, which TensorFlow Lite does not support"
        )
    shape = [batch_size, *model.input_shape[1:]]

    @tf.function(input_signature=[tf.TensorSpec(shape, tf.float32)])
    def forward(pixels):
        return tf.nn.softmax(model(pixels, training=False))

    # Given the Keras model, the converter would first save it with a trace of every layer, which
    # takes a minute. For this holder, it saves only the one function.
    holder = tf.Module()
    holder.variables_in_use = list(model.variables)
    converter = tf.lite.TFLiteConverter.from_concrete_functions(
        [forward.get_concrete_function()], holder
    )
    if configure is not None:
        configure(converter)
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        with stack.without_native_log():
            return converter.convert()
    finally:
        logging.set_verbosity(verbosity)


def has_accelerator(strategy: tf.distribute.Strategy | None = None) -> bool:
    """Checks whether there is a TPU, a GPU or more than one replica."""
    if strategy is not None and strategy.num_replicas_in_sync > 1:
        return True
    return bool(tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("TPU"))


CPU_ENGINES = {"xnnpack": XnnpackEngine, "openvino": OpenVinoEngine}
Engine = TensorFlowEngine | XnnpackEngine | OpenVinoEngine


def has_choice() -> bool:
    """Checks whether `auto` may have to measure which engine is faster."""
    return importlib.util.find_spec("openvino") is not None


def make(
    kind: str,
    model: tf.keras.Model,
    batch_size: int,
    strategy: tf.distribute.Strategy | None = None,
    *,
    dtype: str = "float32",
) -> Engine:
    """Makes an engine.

    Args:
      kind: `tf`, `xnnpack`, `openvino`, or `auto`: a CPU engine if there is no accelerator and it can
        compute the model, else tf. The CPU engine of `auto` is xnnpack, or openvino if that is
        installed, works, and is clearly faster on this machine.
      model: pixels → logits, with its weights loaded.
      batch_size: batch size of the tf engine; the others choose their own.
      strategy: the strategy under which the model was built; None for the current one.
      dtype: dtype of the computation: float32, or bfloat16, which only openvino supports.

    Raises:
      EngineError: If the engine is not installed or cannot compute the model in `dtype`.
    """
    if dtype != "float32":
        _check_dtype(kind, dtype, strategy)
        with _naming(f"--inference_dtype={dtype}", "use float32"):
            return OpenVinoEngine(model, dtype=dtype)
    if kind in CPU_ENGINES:
        with _naming(f"--inference_engine={kind}", "use tf or auto"):
            return CPU_ENGINES[kind](model)
    if kind not in ("auto", "tf"):
        raise EngineError(f"--inference_engine={kind}: must be auto, tf, {', '.join(CPU_ENGINES)}")
    if kind == "auto" and not has_accelerator(strategy):
        try:
            return _faster(model)
        except ValueError as e:
            logging.warning("%s; using TensorFlow instead", e)
    return TensorFlowEngine(model, batch_size, strategy)


def _check_dtype(kind: str, dtype: str, strategy: tf.distribute.Strategy | None) -> None:
    """Raises EngineError unless OpenVINO is to compute in `dtype`."""
    if kind not in ("auto", "openvino"):
        raise EngineError(
            f"--inference_dtype={dtype}: --inference_engine={kind} computes in the model's own "
            "precision; use openvino, or --precision=mixed_bfloat16 with tf"
        )
    if kind == "auto" and has_accelerator(strategy):
        raise EngineError(
            f"--inference_dtype={dtype} is for CPUs, but there is an accelerator or more than one "
            "replica: set --precision=mixed_bfloat16 instead, or --inference_engine=openvino to use "
            "the CPUs"
        )


@contextlib.contextmanager
def _naming(flag: str, advice: str) -> Iterator[None]:
    """Converts errors of a CPU engine to EngineError and adds the flag that selected the engine."""
    try:
        yield
    except EngineError as e:
        raise EngineError(f"{flag}: {e}") from e
    except (ValueError, RuntimeError) as e:
        raise EngineError(f"{flag}: {_one_line(e)}; {advice}") from e


def _one_line(error: Exception) -> str:
    # Messages of OpenVINO begin with lines that name only its source files.
    return " ".join(str(error).split())


def _faster(model: tf.keras.Model) -> XnnpackEngine | OpenVinoEngine:
    """Returns XNNPACK unless OpenVINO is installed, works and is clearly faster on this machine."""
    xnnpack = XnnpackEngine(model)
    if not has_choice():
        return xnnpack
    try:
        other = OpenVinoEngine(model)
        rates = [_rate(engine, model.input_shape[1:]) for engine in (xnnpack, other)]
    # OpenVINO raises RuntimeError, e.g. if it cannot compile the model for this CPU.
    except (EngineError, RuntimeError) as e:
        logging.warning("%s; using XNNPACK instead", _one_line(e))
        return xnnpack
    faster = other if rates[1] > _CLEARLY_FASTER * rates[0] else xnnpack
    logging.info("xnnpack: %.1f images/s, openvino: %.1f images/s; using %s", *rates, faster.name)
    return faster


def _rate(engine: XnnpackEngine | OpenVinoEngine, shape: tuple[int, ...]) -> float:
    """Measures images per second on all cores in the best of three short runs."""
    pixels = np.zeros([16 * engine.batch_size, *shape], np.float32)
    best = 0.0
    with ThreadPoolExecutor(engine.concurrency) as pool:
        for images in (engine.batch_size, len(pixels), len(pixels)):
            begin = time.perf_counter()
            list(pool.map(engine, [pixels[:images]] * engine.concurrency))
            best = max(best, engine.concurrency * images / (time.perf_counter() - begin))
    return best
