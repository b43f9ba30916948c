"""ONNX files: pixels in, probabilities out, with labels and normalization attached."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType

import numpy as np
import tensorflow as tf
from absl import logging

from efficientnet_ns.config import ConfigError

_OPSET = 17
# A file is one protocol buffer of up to 2 GB; the rest is for the graph.
_MAX_BYTES = 2**31 - 2**24
_BATCH = 8
INPUT, OUTPUT = "pixels", "probabilities"


def convert(model: tf.keras.Model, facts: Mapping[str, object], labels: Sequence[str]) -> bytes:
    """Converts to pixels float32 [N, S, S, 3] in 0..255 → probabilities float32 [N, C], any N.

    Args:
      model: pixels → logits.
      facts: stored in the file's `metadata_props` as JSON under `facts`.
      labels: class names in order, stored as JSON under `labels`.

    Raises:
      ConfigError: If tf2onnx is not installed, or the model is too large for one file.
    """
    converter = _imported("tf2onnx").convert
    if 4 * model.count_params() > _MAX_BYTES:
        raise ConfigError(
            f"--format=onnx: {model.name} does not fit into an ONNX file, which is limited to 2 GB: "
            "use --format=savedmodel"
        )
    signature = [tf.TensorSpec([None, *model.input_shape[1:]], tf.float32, name=INPUT)]

    @tf.function(input_signature=signature)
    def forward(pixels):
        return {OUTPUT: tf.nn.softmax(model(pixels, training=False))}

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        made, _ = converter.from_function(forward, input_signature=signature, opset=_OPSET)
    finally:
        logging.set_verbosity(verbosity)
    for key, value in {"facts": dict(facts), "labels": list(labels)}.items():
        # Values must be strings.
        made.metadata_props.add(key=key, value=json.dumps(value))
    return made.SerializeToString(deterministic=True)


def check_installed(*, compared: bool) -> None:
    """Raises ConfigError if a package is missing that converts or, if `compared`, runs a file."""
    for name in ("tf2onnx", *(["onnxruntime"] if compared else [])):
        _imported(name)


def runner(content: bytes) -> Callable[[np.ndarray], np.ndarray]:
    """Loads a file as a function: pixels float32 [N, S, S, 3] → probabilities float32 [N, C].

    Raises:
      ConfigError: If onnxruntime is not installed.
    """
    session = _imported("onnxruntime").InferenceSession(content, providers=["CPUExecutionProvider"])

    def run(pixels: np.ndarray) -> np.ndarray:
        parts = [pixels[i : i + _BATCH] for i in range(0, len(pixels), _BATCH)]
        return np.concatenate([session.run([OUTPUT], {INPUT: part})[0] for part in parts])

    return run


def _imported(name: str) -> ModuleType:
    try:
        return __import__(name)
    except ImportError as e:
        raise ConfigError(
            f"--format=onnx: {name} cannot be imported ({e}): pip install 'efficientnet-ns[onnx]'"
        ) from e
