"""One model predicts the same wherever it computes and however it is stored.

Every variant × precision × placement is compared with the float32 model on one device, directly and
after a round trip through each format.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import tensorflow as tf

from efficientnet_ns.data.pipeline import Preprocessing
from efficientnet_ns.inference import engines, lite_files
from efficientnet_ns.models import efficientnet, weights
from efficientnet_ns.serving import export, tflite
from efficientnet_ns.serving.signatures import OutputSpec

CLASSES, SIZE = 4, 32
# Maps model names to changes of their coefficients.
VARIANTS = {
    "efficientnet-test": {},
    "efficientnet-b0": {"width_coefficient": 0.25, "depth_coefficient": 0.3},
    "efficientnet-lite0": {"width_coefficient": 0.25, "depth_coefficient": 0.3},
}
# Largest allowed difference from the float32 model's probabilities. bfloat16 keeps 8 bits of
# every value, and folded batch norm is rounded again; image predictions are 0.3 apart.
PRECISIONS = {"float32": 1e-5, "mixed_bfloat16": 0.2}
EXACT = 1e-5


class Case(NamedTuple):
    """A model with the weights of its variant, and where it was built."""

    name: str
    policy: str
    strategy: tf.distribute.Strategy
    model: tf.keras.Model


def build(name: str, policy: str = "float32") -> tf.keras.Model:
    tf.keras.mixed_precision.set_global_policy(policy)
    return efficientnet.build_model(name, CLASSES, SIZE, **VARIANTS[name])


def predict(model: tf.keras.Model, pixels: np.ndarray) -> np.ndarray:
    return tf.nn.softmax(tf.cast(model(pixels, training=False), tf.float32)).numpy()


@pytest.fixture(scope="module")
def images() -> list[bytes]:
    """PNG files of colored squares, of the models' size: every path sees the same pixels."""
    rng = np.random.default_rng(0)
    squares = rng.integers(0, 256, [5, 4, 4, 3], np.uint8).repeat(8, 1).repeat(8, 2)
    return [tf.io.encode_png(image).numpy() for image in squares]


@pytest.fixture(scope="module")
def pixels(images) -> np.ndarray:
    prepare = Preprocessing(SIZE, small_image=True).evaluate
    return np.stack([prepare(tf.constant(image)) for image in images])


def randomize(model: tf.keras.Model, pixels: np.ndarray) -> None:
    """Sets random weights and statistics that give the images different, uncertain predictions."""
    rng = np.random.default_rng(1)
    for variable in model.weights:
        if "variance" in variable.name:
            variable.assign(rng.uniform(0.5, 1.5, variable.shape))
        elif "gamma" in variable.name:
            # Above 1, so that differences between the images survive all blocks.
            variable.assign(rng.uniform(1.0, 1.6, variable.shape))
        elif variable.shape.rank == 1:
            variable.assign(rng.uniform(-0.3, 0.3, variable.shape))
    pooled = tf.keras.Model(model.input, efficientnet.endpoints(model)["pooled"])(pixels).numpy()
    head = model.get_layer("head_dense")
    kernel = rng.normal(0, 1, head.kernel.shape)
    logits = pooled @ kernel
    head.kernel.assign(kernel / logits.std(0))
    head.bias.assign(-logits.mean(0) / logits.std(0))


@pytest.fixture(scope="module")
def values(pixels) -> dict[str, list[np.ndarray]]:
    """The weights of each variant."""
    found = {}
    for name in VARIANTS:
        tf.keras.utils.set_random_seed(0)
        model = build(name)
        randomize(model, pixels)
        found[name] = model.get_weights()
    return found


@pytest.fixture(scope="module")
def expected(values, pixels) -> dict[str, np.ndarray]:
    """Probabilities of the float32 model on one device."""
    found = {}
    for name in VARIANTS:
        model = build(name)
        model.set_weights(values[name])
        found[name] = predict(model, pixels)
        assert found[name].std(0).max() > 0.1, "the images must differ for this model"
    return found


# --- Round trips: model, file → predictions of what was stored ------------------------------------


def through_checkpoint(model: tf.keras.Model, folder: Path, images: list[bytes], pixels):
    path = str(folder / "model.ckpt-1")
    weights.save_weights(model, path)
    loaded = tf.keras.models.clone_model(model)  # With initial weights.
    weights.load_weights(loaded, path)
    return predict(loaded, pixels)


def through_keras(model: tf.keras.Model, folder: Path, images: list[bytes], pixels):
    model.save(folder / "model.keras")
    return predict(efficientnet.load_model(folder / "model.keras"), pixels)


def through_saved_model(model: tf.keras.Model, folder: Path, images: list[bytes], pixels):
    names = tuple(str(i) for i in range(CLASSES))
    options = export.Options(OutputSpec(names), "cpu")
    version = export.export(model, Preprocessing(SIZE, small_image=True), folder, 1, options)
    return export.saved_model_runner(version)(images)


def through_tflite(model: tf.keras.Model, folder: Path, images: list[bytes], pixels):
    path = folder / "model.tflite"
    path.write_bytes(tflite.convert(model, "float32"))
    return lite_files.runner(path.read_bytes())(pixels)


FORMATS = {
    "checkpoint": through_checkpoint,
    "keras": through_keras,
    "saved_model": through_saved_model,
    "tflite": through_tflite,
}


EXPORTS = ("saved_model", "tflite")
# Each variant, precision and number of replicas once; the others with `make test-all`.
QUICK = {
    ("efficientnet-test", "float32", 1),
    ("efficientnet-b0", "mixed_bfloat16", 1),
    ("efficientnet-lite0", "float32", 2),
}
CASES = [
    pytest.param(
        (name, policy, replicas),
        id=f"{name}-{policy}-{replicas}",
        marks=[] if (name, policy, replicas) in QUICK else pytest.mark.slow,
    )
    for name in VARIANTS
    for policy in PRECISIONS
    for replicas in (1, 2)
]


@pytest.fixture(scope="module", params=CASES)
def case(request, two_replicas, values) -> Case:
    name, policy, replicas = request.param
    strategy = two_replicas if replicas == 2 else tf.distribute.get_strategy()
    with strategy.scope():
        model = build(name, policy)
    tf.keras.mixed_precision.set_global_policy("float32")
    model.set_weights(values[name])
    return Case(name, policy, strategy, model)


def test_batches(case, expected, pixels):
    """A batch is divided among the replicas; the last one is padded."""
    engine = engines.TensorFlowEngine(case.model, 3, case.strategy)
    assert engine.batch_size == {1: 3, 2: 4}[case.strategy.num_replicas_in_sync]
    found = engine(pixels)
    np.testing.assert_allclose(found, expected[case.name], atol=PRECISIONS[case.policy])


@pytest.mark.parametrize("kind", FORMATS)
def test_format(case, expected, images, pixels, tmp_path, kind):
    if case.strategy.num_replicas_in_sync > 1 and kind in EXPORTS:
        pytest.skip("exports are made from a model on one device")
    if case.policy == "mixed_bfloat16" and kind == "tflite":
        with pytest.raises(ValueError, match="bfloat16"):
            FORMATS[kind](case.model, tmp_path, images, pixels)
        return
    found = FORMATS[kind](case.model, tmp_path, images, pixels)
    np.testing.assert_allclose(found, expected[case.name], atol=PRECISIONS[case.policy])
    if kind in ("checkpoint", "keras"):
        np.testing.assert_allclose(found, predict(case.model, pixels), atol=EXACT)
