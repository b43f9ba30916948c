"""TensorFlow Lite files and their metadata."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import flatbuffers
import numpy as np
import pytest
import tensorflow as tf
from served_models import (
    NAMES,
    OPTIONS,
    PREPROCESSING,
    SIZE,
    jpeg,
)

from efficientnet_ns import inference
from efficientnet_ns.data import tasks
from efficientnet_ns.inference import engines, lite_files
from efficientnet_ns.models import efficientnet
from efficientnet_ns.serving import export, tflite


@pytest.mark.parametrize(
    "kind, tolerance",
    [("float32", 1e-5)]
    + [pytest.param(k, t, marks=pytest.mark.slow) for k, t in (("float16", 0.01), ("dynamic", 0.1))]
    + [pytest.param("int8", 0.3, marks=pytest.mark.slow)],
)
def test_tflite(model, tmp_path, kind, tolerance):
    images = inference.preprocess([jpeg(seed=i) for i in range(8)], PREPROCESSING).numpy()
    path = str(tmp_path / "model.tflite")
    export.export_tflite(model, PREPROCESSING, path, kind, OPTIONS, images)
    answers = lite_files.runner(Path(path).read_bytes())(images)
    np.testing.assert_allclose(answers, tf.nn.softmax(model(images)), atol=tolerance)
    with zipfile.ZipFile(path) as attached:
        assert attached.read("labels.txt").decode().split() == list(NAMES)
        facts = json.loads(attached.read("metadata.json"))
    assert facts["image_size"] == SIZE and facts["type"] == kind and len(facts["mean"]) == 3
    details = engines.Interpreter(path).get_input_details()[0]
    assert details["dtype"] == (np.uint8 if kind == "int8" else np.float32)


class Fields:
    """A flatbuffer table whose fields are read by position."""

    def __init__(self, data: bytes, position: int | None = None):
        start = int.from_bytes(data[:4], "little") if position is None else position
        self.table = flatbuffers.table.Table(bytearray(data), start)

    def _at(self, slot: int) -> int:
        offset = self.table.Offset(4 + 2 * slot)
        assert offset, f"field {slot} is absent"
        return self.table.Pos + offset

    def number(self, slot: int, kind=flatbuffers.number_types.Uint8Flags) -> int:
        return self.table.Get(kind, self._at(slot))

    def text(self, slot: int) -> str:
        return self.table.String(self._at(slot)).decode()

    def child(self, slot: int) -> Fields:
        return Fields(self.table.Bytes, self.table.Indirect(self._at(slot)))

    def floats(self, slot: int) -> list[float]:
        offset = self._at(slot) - self.table.Pos
        start, count = self.table.Vector(offset), self.table.VectorLen(offset)
        return np.frombuffer(self.table.Bytes, "<f4", count, start).tolist()

    def only(self, slot: int) -> Fields:
        offset = self._at(slot) - self.table.Pos
        assert self.table.VectorLen(offset) == 1
        return Fields(self.table.Bytes, self.table.Indirect(self.table.Vector(offset)))


def test_tflite_metadata_is_of_the_public_schema(model, tmp_path):
    from tensorflow.lite.python import schema_py_generated as schema

    path = str(tmp_path / "model.tflite")
    content = export.export_tflite(model, PREPROCESSING, path, "float32", OPTIONS)
    stored = schema.Model.GetRootAs(content)
    entries = [stored.Metadata(i) for i in range(stored.MetadataLength())]
    (buffer,) = [entry.Buffer() for entry in entries if entry.Name() == b"TFLITE_METADATA"]
    data = stored.Buffers(buffer).DataAsNumpy().tobytes()
    assert data[4:8] == b"M001"
    root = Fields(data)
    assert root.text(0) == "efficientnet-test" and root.text(7) == "1.0.0"
    image, probability = root.only(3).only(2), root.only(3).only(3)
    assert image.child(3).number(0) == 2  # Union type: image properties.
    size = image.child(3).child(1).child(1)
    uint = flatbuffers.number_types.Uint32Flags
    assert (size.number(0, uint), size.number(1, uint)) == (SIZE, SIZE)
    assert image.child(3).child(1).number(0) == 1  # RGB.
    unit = image.only(4)
    # The graph expects 0..255, so the normalization in the metadata must be the identity.
    assert unit.number(0) == 1 and (unit.child(1).floats(0), unit.child(1).floats(1)) == ([0], [1])
    labels = probability.only(6)
    assert labels.number(2) == 2  # Labels of the axis.
    with zipfile.ZipFile(path) as attached:
        assert attached.read(labels.text(0)).decode().split() == list(NAMES)
    for i in range(stored.BuffersLength()):  # Kernels require aligned weights for vector loads.
        if stored.Buffers(i).DataLength():
            address = stored.Buffers(i).DataAsNumpy().__array_interface__["data"][0]
            start = np.frombuffer(content, np.uint8).__array_interface__["data"][0]
            assert (address - start) % 16 == 0


# Integer ops of TensorFlow Lite that the Edge TPU compiler maps.
EDGE_TPU = "ADD CONV_2D DEPTHWISE_CONV_2D FULLY_CONNECTED MEAN MUL QUANTIZE RESHAPE SOFTMAX SUB"


def test_int8_of_lite_is_integers_only(small_lite):
    """Input and output are bytes, and the Edge TPU supports all ops in between."""
    from tensorflow.lite.python import schema_py_generated as schema

    lite = efficientnet.build_model(small_lite, len(NAMES), SIZE)
    # Pale and, as after bicubic resizing, out of range: neither may set the input range.
    images = [np.full([SIZE, SIZE, 3], value, np.float32) for value in (-9.0, 120.0)]
    content = tflite.convert(lite, "int8", images)
    assert images[0].max() == -9.0  # The caller's images are unchanged.
    interpreter = engines.interpreter(content)
    source, target = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
    assert (source["dtype"], target["dtype"]) == (np.uint8, np.uint8)
    assert source["quantization"] == (1.0, 0) and target["quantization"] == (1 / 256, 0)
    stored = schema.ModelT.InitFromPackedBuf(content)
    (graph,) = stored.subgraphs
    names = {number: name for name, number in vars(schema.BuiltinOperator).items()}
    assert {names[code.builtinCode] for code in stored.operatorCodes} <= set(EDGE_TPU.split())
    assert not any(code.customCode for code in stored.operatorCodes)
    integers = {schema.TensorType.INT8, schema.TensorType.UINT8, schema.TensorType.INT32}
    assert {tensor.type for tensor in graph.tensors} <= integers


def test_tflite_refusals(model):
    with pytest.raises(ValueError, match="int8 needs representative"):
        tflite.convert(model, "int8")
    with pytest.raises(ValueError, match="unknown TFLite type 'int4'"):
        tflite.convert(model, "int4")


def test_names_of_imagenet_fit_a_label_file():
    assert not any("\n" in name for name in tasks.class_names("imagenet"))
