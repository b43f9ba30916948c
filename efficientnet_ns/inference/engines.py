"""What computes a model's probabilities: TensorFlow on any device, or XNNPACK on CPU.

An engine is called with pixels, float32 [N, S, S, 3] in about 0..255 with any N, and answers
probabilities, float32 [N, C]. Inside, it works on batches of one static shape, the last one padded.
A row's answer may depend in its last bits on the engine and on `batch_size`, never on the other
rows' values.

Calls from several threads are safe; `concurrency` of them make progress at the same time.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

import numpy as np
import tensorflow as tf
from absl import logging

from efficientnet_ns.config.cpus import available_cpus
from efficientnet_ns.devices import stack

try:
    from ai_edge_litert.interpreter import Interpreter
except ImportError:  # With TensorFlow 2.15, whose own is not deprecated.
    Interpreter = tf.lite.Interpreter

# Of packed weights over all interpreters, above which cores share interpreters.
_MAX_INTERPRETER_BYTES = 4 * 2**30
# A flatbuffer ends at 2 GB.
_MAX_PARAMETERS = 2**31 // 4 - 2**22


class EngineError(ValueError):
    """The engine that was asked for cannot compute this model."""


class TensorFlowEngine:
    """The model under its distribution strategy; a batch is divided among the replicas.

    Args:
      model: pixels → logits, built under `strategy`.
      batch_size: over all replicas; rounded up to a multiple of their number.
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
        # Callers that prepare the next batches while the device computes.
        self.concurrency = max(2, available_cpus())
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
        with self._lock:
            if self._strategy.num_replicas_in_sync == 1:
                return self._step(tf.constant(pixels)).numpy()

            def part(context):
                start = context.replica_id_in_sync_group * self._per_replica
                return tf.constant(pixels[start : start + self._per_replica])

            values = self._strategy.experimental_distribute_values_from_function(part)
            answers = self._strategy.experimental_local_results(self._step(values))
            return np.concatenate([answer.numpy() for answer in answers])


class XnnpackEngine:
    """The model as TensorFlow Lite runs it on CPU: batch norm folded into the convolutions.

    One single-threaded interpreter per core: on EfficientNet that is a third faster than one
    interpreter on all cores, whose threads wait for each other after every layer.

    Args:
      model: pixels → logits.
      threads: CPU threads in all; None: as many as cores are available.

    Raises:
      ValueError: see `convert`.
    """

    def __init__(self, model: tf.keras.Model, threads: int | None = None):
        self.name = "xnnpack"
        self.batch_size = _cache_sized_batch(model.input_shape[1])
        content = convert(model, self.batch_size)
        threads = threads or available_cpus()
        self.concurrency = min(threads, max(1, _MAX_INTERPRETER_BYTES // len(content)))
        self._free: queue.LifoQueue = queue.LifoQueue()
        for _ in range(self.concurrency):
            self._free.put(interpreter(content, max(1, threads // self.concurrency)))

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        interpreter = self._free.get()
        try:
            source = interpreter.get_input_details()[0]["index"]
            target = interpreter.get_output_details()[0]["index"]

            def batch(rows: np.ndarray) -> np.ndarray:
                interpreter.set_tensor(source, rows)
                interpreter.invoke()
                return interpreter.get_tensor(target)

            return _by_batches(batch, pixels, self.batch_size)
        finally:
            self._free.put(interpreter)


def interpreter(content: bytes, threads: int | None = None) -> Interpreter:
    """What runs a .tflite file, its tensors allocated."""
    with stack.without_native_log():
        made = Interpreter(model_content=content, num_threads=threads)
        made.allocate_tensors()
    return made


def _by_batches(compute, pixels: np.ndarray, size: int) -> np.ndarray:
    answers = []
    for start in range(0, len(pixels), size):
        rows = pixels[start : start + size]
        missing = size - len(rows)
        if missing:
            rows = np.concatenate([rows, np.zeros([missing, *rows.shape[1:]], rows.dtype)])
        answers.append(compute(rows)[: size - missing])
    return np.concatenate(answers)


def _cache_sized_batch(image_size: int) -> int:
    """Images per invocation. Activations that stay in a core's cache beat larger batches."""
    return max(1, min(16, 64 * 64 // image_size**2))


def convert(
    model: tf.keras.Model,
    batch_size: int,
    configure: Callable[[tf.lite.TFLiteConverter], None] | None = None,
) -> bytes:
    """A flatbuffer of pixels float32 [batch_size, S, S, 3] → probabilities float32.

    Args:
      configure: sets options of the converter, e.g. quantization.

    Raises:
      ValueError: the model is too large for one, or computes in bfloat16.
    """
    if model.count_params() > _MAX_PARAMETERS:
        raise ValueError(f"{model.name} does not fit into a flatbuffer, which ends at 2 GB")
    if any(layer.compute_dtype == "bfloat16" for layer in model.layers):
        raise ValueError(f"{model.name} computes in bfloat16, which TensorFlow Lite does not have")
    shape = [batch_size, *model.input_shape[1:]]

    @tf.function(input_signature=[tf.TensorSpec(shape, tf.float32)])
    def forward(pixels):
        return tf.nn.softmax(model(pixels, training=False))

    # Given the Keras model, the converter would first save it with a trace of every layer: a
    # minute. Of this holder it saves the one function.
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
    """Whether a TPU, a GPU, or several devices are to compute."""
    if strategy is not None and strategy.num_replicas_in_sync > 1:
        return True
    return bool(tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("TPU"))


def make(
    kind: str,
    model: tf.keras.Model,
    batch_size: int,
    strategy: tf.distribute.Strategy | None = None,
) -> TensorFlowEngine | XnnpackEngine:
    """The engine of that kind.

    Args:
      kind: `tf`, `xnnpack`, or `auto`: xnnpack without an accelerator, for models that it can
        compute, else tf.
      model: pixels → logits, with its weights loaded.
      batch_size: of the tf engine; xnnpack chooses its own.

    Raises:
      EngineError: `xnnpack` cannot compute the model.
    """
    if kind == "xnnpack" or kind == "auto" and not has_accelerator(strategy):
        try:
            return XnnpackEngine(model)
        except ValueError as e:
            if kind == "xnnpack":
                raise EngineError(f"--inference_engine=xnnpack: {e}; choose tf or auto") from e
            logging.warning("%s: computing with TensorFlow instead", e)
    return TensorFlowEngine(model, batch_size, strategy)
