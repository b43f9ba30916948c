"""Compares recipes with the papers' tables, and models with both: parameters and multiply-adds."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from efficientnet_ns.data import images
from efficientnet_ns.models import complexity, efficientnet, layers
from efficientnet_ns.models.recipes import RECIPES

ROOT = Path(__file__).parents[2]

# Parameters, multiply-adds, train and test resolution, crop, dropout, epochs, ratio, magnitude,
# top-1 and supervised top-1. No paper states L2's multiply-adds.
PUBLISHED = {
    "efficientnet-b0": (5_288_548, 0.39e9, 224, 224, 0.875, 0.2, 700, 1, None, 78.8, 77.3),
    "efficientnet-b1": (7_794_184, 0.70e9, 240, 240, 0.882, 0.2, 700, 3, None, 81.5, 79.2),
    "efficientnet-b2": (9_109_994, 1.0e9, 260, 260, 0.890, 0.3, 700, 3, 6, 82.4, 80.0),
    "efficientnet-b3": (12_233_232, 1.8e9, 300, 300, 0.904, 0.3, 700, 3, 12, 84.1, 81.7),
    "efficientnet-b4": (19_341_616, 4.2e9, 380, 380, 0.922, 0.4, 700, 3, 15, 85.3, 83.2),
    "efficientnet-b5": (30_389_784, 9.9e9, 456, 456, 0.934, 0.4, 350, 3, 18, 86.1, 84.0),
    "efficientnet-b6": (43_040_704, 19e9, 528, 528, 0.942, 0.5, 350, 3, 24, 86.4, 84.5),
    "efficientnet-b7": (66_347_960, 37e9, 600, 600, 0.949, 0.5, 350, 3, 27, 86.9, 85.0),
    "efficientnet-l2": (480_309_308, 475.7e9, 475, 800, 0.960, 0.5, 350, 14, 27, 88.4, 85.5),
    "efficientnet-lite0": (4_652_008, 407e6, 224, 224, 0.875, 0.2, 700, 1, None, None, 75.1),
    "efficientnet-lite1": (5_416_680, 631e6, 240, 240, 0.882, 0.2, 700, 3, None, None, 76.7),
    "efficientnet-lite2": (6_092_072, 899e6, 260, 260, 0.890, 0.3, 700, 3, 6, None, 77.6),
    "efficientnet-lite3": (8_197_096, 1.44e9, 280, 280, 0.897, 0.3, 700, 3, 12, None, 79.8),
    "efficientnet-lite4": (13_006_568, 2.64e9, 300, 300, 0.904, 0.3, 700, 3, 15, None, 81.5),
}
LITE = [name for name in PUBLISHED if "-lite" in name]
# Building the larger graphs is too slow for every test run.
QUICK = {"efficientnet-b0"}
EACH_MODEL = [
    pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow)
    for name in PUBLISHED
    if name not in LITE
]


def test_every_published_model_has_a_recipe():
    assert list(RECIPES) == [name for name in efficientnet.VARIANTS if name != "efficientnet-test"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_values(name):
    assert dataclasses.astuple(RECIPES[name])[:11] == PUBLISHED[name]


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_that_of_the_variant(name):
    recipe, variant = RECIPES[name], efficientnet.VARIANTS[name]
    assert (recipe.test_resolution, recipe.dropout_rate) == (
        variant.resolution,
        variant.dropout_rate,
    )
    size = recipe.test_resolution
    assert recipe.crop_fraction == pytest.approx(size / (size + images.CROP_PADDING), abs=0.002)


@pytest.mark.parametrize("name", RECIPES)
def test_preset_is_the_recipe(name):
    recipe = RECIPES[name]
    lines = (ROOT / "flags" / "model" / f"{name.split('-')[1]}.flags").read_text().splitlines()
    flags = dict(line[2:].split("=", 1) for line in lines if line.startswith("--"))
    assert flags["model_name"] == name
    assert int(flags.get("input_image_size", recipe.test_resolution)) == recipe.train_resolution
    assert float(flags["unlabel_ratio"]) == recipe.unlabel_ratio
    assert float(flags.get("train_ratio", 1)) * 350 == recipe.epochs
    assert ("augment_name" in flags) == (recipe.randaugment_magnitude is not None)
    assert flags.get("randaug_mag") == (
        str(recipe.randaugment_magnitude) if recipe.randaugment_magnitude else None
    )


@pytest.mark.parametrize("name", LITE)
def test_student_recipe_of_lite_is_that_of_the_same_width_and_depth(name):
    like = name.replace("lite", "b")
    assert dataclasses.astuple(RECIPES[name])[6:9] == dataclasses.astuple(RECIPES[like])[6:9]
    lite, b = efficientnet.VARIANTS[name], efficientnet.VARIANTS[like]
    assert (lite.width, lite.depth) == (b.width, b.depth)


@pytest.mark.parametrize("name", LITE)
def test_names_of_supervised_checkpoints(name):
    recipe = RECIPES[name]
    assert (recipe.tf1_checkpoint, recipe.keras_file) == (name, None)
    assert recipe.timm_name == f"tf_{name.replace('-', '_')}.in1k"


@pytest.mark.parametrize("name", sorted(set(RECIPES) - set(LITE)))
def test_checkpoint_names(name):
    recipe, short = RECIPES[name], name.split("-")[1]
    assert recipe.tf1_checkpoint == f"noisy_student_efficientnet-{short}"
    assert recipe.timm_name == f"tf_efficientnet_{short}.ns_jft_in1k"
    keras_file = None if short == "l2" else f"efficientnet-{short}_noisy-student.h5"
    assert recipe.keras_file == keras_file


# Counting.


@pytest.mark.parametrize("name", EACH_MODEL)
def test_counts_are_the_papers(name):
    counts = complexity.count_variant(name)
    assert counts.params == RECIPES[name].params
    assert counts.multiply_adds == pytest.approx(RECIPES[name].multiply_adds, rel=0.05)


@pytest.mark.parametrize(
    "name", [LITE[0], *(pytest.param(name, marks=pytest.mark.slow) for name in LITE[1:])]
)
def test_counts_of_lite_are_the_published(name):
    with tf.Graph().as_default():
        model = efficientnet.build_model(name)
        counts = complexity.count(model)
        normalized = [layer for layer in model.layers if isinstance(layer, layers.BatchNorm)]
    complexity.restore_classes(model)
    assert counts.params == RECIPES[name].params
    # The published count includes a scale, a shift and an activation for each convolution output.
    values = sum(math.prod(layer.output_shape[1:]) for layer in normalized)
    published = RECIPES[name].multiply_adds
    assert counts.multiply_adds + 3 * values == pytest.approx(published, rel=0.005)


def test_count_by_hand():
    inputs = tf.keras.Input((9, 12, 3))
    x = tf.keras.layers.Conv2D(4, 3, strides=2, padding="same")(inputs)  # 5 x 6 positions
    x = tf.keras.layers.BatchNormalization()(x)
    x = tf.keras.layers.DepthwiseConv2D(5, padding="valid", use_bias=False)(x)  # 1 x 2
    x = tf.keras.layers.GlobalAveragePooling2D()(x)
    model = tf.keras.Model(inputs, tf.keras.layers.Dense(7)(x))
    assert complexity.count(model) == complexity.Complexity(
        multiply_adds=5 * 6 * (3 * 3 * 3 * 4) + 1 * 2 * (5 * 5 * 4) + 4 * 7,
        params=(3 * 3 * 3 * 4 + 4) + 2 * 4 + 5 * 5 * 4 + (4 * 7 + 7),
        statistics=2 * 4,
    )


@pytest.mark.slow
def test_count_of_a_built_model():
    model = efficientnet.build_model("efficientnet-test", num_classes=10)
    counts = complexity.count(model)
    assert counts == complexity.count_variant("efficientnet-test", num_classes=10)
    assert counts.params + counts.statistics == model.count_params()
    model.trainable = False
    assert complexity.count(model) == counts
    larger = complexity.count_variant("efficientnet-test", num_classes=10, image_size=64)
    # Four times the positions, except in the squeeze, the excitation and the dense layer.
    assert 3.9 < larger.multiply_adds / counts.multiply_adds < 4
    assert (larger.params, larger.statistics) == (counts.params, counts.statistics)


def test_counting_leaves_models_as_they_are():
    """By default, building a model in a graph makes Keras invalidate earlier models."""
    model = efficientnet.build_model("efficientnet-test", 3, 16)
    images = tf.ones([1, 16, 16, 3])
    before = model(images)
    complexity.count_variant("efficientnet-test")
    np.testing.assert_array_equal(model(images), before)


def test_unknown_size_is_refused():
    inputs = tf.keras.Input((None, None, 3))
    model = tf.keras.Model(inputs, tf.keras.layers.Conv2D(4, 3, name="first")(inputs))
    with pytest.raises(ValueError, match="first.*set a fixed image size"):
        complexity.count(model)


def test_transposed_convolutions_are_not_taken_for_convolutions():
    inputs = tf.keras.Input((8, 8, 3))
    model = tf.keras.Model(inputs, tf.keras.layers.Conv2DTranspose(4, 3, strides=2)(inputs))
    counts = complexity.count(model)
    assert counts.multiply_adds == 0 and counts.params == math.prod([3, 3, 3, 4]) + 4
