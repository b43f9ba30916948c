"""Requests that TensorFlow Serving runs on a new version before the version takes traffic.

The file `assets.extra/tf_serving_warmup_requests` is a TFRecord of `tensorflow.serving.PredictionLog`.
This module encodes its few fields by number, so that exporting does not need TensorFlow Serving.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from efficientnet_ns.files import object_stores, tfexamples, tfrecords
from efficientnet_ns.files.protobuf_wire import field

FILE = os.path.join("assets.extra", "tf_serving_warmup_requests")

# Field numbers in tensorflow_serving/apis/{prediction_log,predict,classification,input,model}.proto.
_CLASSIFY_LOG, _PREDICT_LOG = 2, 6
_REQUEST = 1
_MODEL_SPEC, _INPUTS = 1, 2
_NAME, _SIGNATURE = 1, 3
_EXAMPLE_LIST, _EXAMPLES = 1, 1


def _model_spec(model: str, signature: str) -> bytes:
    return field(_NAME, model.encode()) + field(_SIGNATURE, signature.encode())


def predict_log(model: str, signature: str, argument: str, value: np.ndarray) -> bytes:
    """Returns a serialized PredictionLog of one Predict request."""
    proto = tf.make_tensor_proto(value).SerializeToString()
    # An entry of a map: key, value.
    entry = field(1, argument.encode()) + field(2, proto)
    request = field(_MODEL_SPEC, _model_spec(model, signature)) + field(_INPUTS, entry)
    return field(_PREDICT_LOG, field(_REQUEST, request))


def classify_log(model: str, examples: Sequence[bytes]) -> bytes:
    """Returns a serialized PredictionLog of one Classify request with serialized tf.Examples."""
    listed = b"".join(field(_EXAMPLES, example) for example in examples)
    request = field(_MODEL_SPEC, _model_spec(model, "classify"))
    request += field(_INPUTS, field(_EXAMPLE_LIST, listed))
    return field(_CLASSIFY_LOG, field(_REQUEST, request))


def requests(model: str, size: int, batch_sizes: Sequence[int]) -> list[bytes]:
    """Returns one PredictionLog per signature and batch size, for a gray image of side `size`."""
    pixels = np.full([size, size, 3], 128, np.uint8)
    image = tf.io.encode_jpeg(pixels).numpy()
    logs = []
    for batch in batch_sizes:
        batch_pixels = np.stack([pixels] * batch)
        for signature, argument, value in (
            ("serving_default", "image_bytes", np.array([image] * batch, object)),
            ("features", "image_bytes", np.array([image] * batch, object)),
            ("predict_images", "images", batch_pixels.astype(np.float32)),
            ("predict_images_uint8", "images", batch_pixels),
        ):
            logs.append(predict_log(model, signature, argument, value))
        logs.append(classify_log(model, [tfexamples.unlabeled_example(image)] * batch))
    return logs


def write(folder: str, model: str, size: int, batch_sizes: Sequence[int] = (1, 8)) -> None:
    """Writes the file to a SavedModel's folder."""
    path = os.path.join(folder, FILE)
    object_stores.make_folder(os.path.dirname(path))
    tfrecords.write(path, requests(model, size, batch_sizes))
