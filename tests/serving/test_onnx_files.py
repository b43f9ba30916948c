"""ONNX files and their metadata; the converter is optional."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from served_models import NAMES, OPTIONS, PREPROCESSING, SIZE, jpeg

from efficientnet_ns import inference
from efficientnet_ns.config import ConfigError
from efficientnet_ns.files import manifests
from efficientnet_ns.serving import export, onnx_files


def test_onnx(model, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("tf2onnx")
    pytest.importorskip("onnxruntime")
    images = inference.preprocess([jpeg(seed=i) for i in range(9)], PREPROCESSING).numpy()
    path = str(tmp_path / "model.onnx")
    content = export.export_onnx(model, PREPROCESSING, path, OPTIONS)
    assert Path(path).read_bytes() == content
    found = onnx_files.runner(content)(images)
    np.testing.assert_allclose(found, tf.nn.softmax(model(images)), atol=1e-5)
    noted = {one.key: json.loads(one.value) for one in onnx.load(path).metadata_props}
    assert noted["labels"] == list(NAMES)
    assert noted["facts"]["image_size"] == SIZE and len(noted["facts"]["mean"]) == 3
    with pytest.raises(manifests.OutputConflict, match="already exists"):
        export.export_onnx(model, PREPROCESSING, path, OPTIONS)


def test_without_the_converter_the_message_says_what_to_install(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tf2onnx", None)
    with pytest.raises(ConfigError, match=r"pip install 'efficientnet-ns\[onnx\]'"):
        export.export_onnx(model, PREPROCESSING, str(tmp_path / "model.onnx"), OPTIONS)
    assert list(tmp_path.iterdir()) == []
