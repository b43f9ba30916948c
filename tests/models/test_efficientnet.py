"""The model family: sizes, names, block arithmetic, layers, noise, compute modes."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import gc
import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from fakes import mostly_slow

from efficientnet_ns.inference import folding
from efficientnet_ns.models import complexity, efficientnet, heads, layers, weights
from efficientnet_ns.training import losses

# At 1000 classes: trainable, batch-norm statistics, total, MBConv blocks, head channels. The published
# models' numbers come from the original code; see goldens/model.
#
# efficientnet-test by hand, k·k·in·out + biases | gamma and beta | moving statistics:
#   stem      3·3·3·8                                                        216 |  16 |  16
#   block 0   dw 9·8, se 8·2+2 + 2·8+8, project 8·8                          178 |  32 |  32
#   block 1   expand 8·16, dw 9·16, se 16·2+2 + 2·16+16, project 16·16       610 |  96 |  96
#   block 2   expand 16·32, dw 9·32, se 32·4+4 + 4·32+32, project 32·16     1604 | 160 | 160
#   head      16·32, dense 32·1000+1000                                    33512 |  64 |  64
SIZES = {
    "efficientnet-b0": (5_288_548, 42_016, 5_330_564, 16, 1280),
    "efficientnet-b1": (7_794_184, 62_048, 7_856_232, 23, 1280),
    "efficientnet-b2": (9_109_994, 67_568, 9_177_562, 23, 1408),
    "efficientnet-b3": (12_233_232, 87_296, 12_320_528, 26, 1536),
    "efficientnet-b4": (19_341_616, 125_200, 19_466_816, 32, 1792),
    "efficientnet-b5": (30_389_784, 172_736, 30_562_520, 39, 2048),
    "efficientnet-b6": (43_040_704, 224_432, 43_265_136, 45, 2304),
    "efficientnet-b7": (66_347_960, 310_720, 66_658_680, 55, 2560),
    "efficientnet-l2": (480_309_308, 1_090_688, 481_399_996, 88, 5504),
    "efficientnet-lite0": (4_652_008, 42_016, 4_694_024, 16, 1280),
    "efficientnet-lite1": (5_416_680, 53_664, 5_470_344, 21, 1280),
    "efficientnet-lite2": (6_092_072, 58_096, 6_150_168, 21, 1280),
    "efficientnet-lite3": (8_197_096, 76_672, 8_273_768, 24, 1280),
    "efficientnet-lite4": (13_006_568, 112_368, 13_118_936, 30, 1280),
    "efficientnet-test": (36_120 + 368, 368, 36_120 + 2 * 368, 3, 32),
}
LITE = [name for name in SIZES if "-lite" in name]
# The variants of the original.
PUBLISHED = sorted({*SIZES} - {"efficientnet-test", *LITE})
# Building the graphs of the larger ones is slow.
QUICK = ("efficientnet-test", "efficientnet-b0", "efficientnet-b2", "efficientnet-lite0")


@dataclasses.dataclass(frozen=True)
class Summary:
    """Properties of a model that was built without memory for its weights."""

    variables: dict[str, tuple[list[int], bool]]  # TF1 name → shape, trainable
    num_decayed: int
    num_blocks: int
    head_filters: int
    strides: list[int]
    squeezed: list[int]
    survival_probs: dict[int, float]
    endpoints: dict[str, tuple[int, ...]]

    def count(self, trainable: bool) -> int:
        return sum(math.prod(shape) for shape, flag in self.variables.values() if flag == trainable)


@functools.cache
def summary(name: str, **kwargs) -> Summary:
    """Summarizes a model built in a temporary graph, where variables are not initialized."""

    def zeros(next_creator, **creator):
        shape, dtype = creator["shape"], creator["dtype"]
        return next_creator(**{**creator, "initial_value": lambda: tf.zeros(shape, dtype)})

    # Layers have no Python control flow to convert, and a graph is many small long-lived objects.
    # Skipping AutoGraph and garbage collection together halves the time.
    build_model = tf.autograph.experimental.do_not_convert(efficientnet.build_model)
    gc.disable()
    try:
        with (
            contextlib.ExitStack() as outside,
            tf.Graph().as_default(),
            tf.variable_creator_scope(zeros),
        ):
            model = build_model(name, **kwargs)
            outside.callback(complexity.restore_classes, model)
            trainable = {id(v) for v in model.trainable_weights}
            decayed = losses.decayed_variables(model.trainable_weights)
            return Summary(
                variables={
                    key: (v.shape.as_list(), id(v) in trainable)
                    for key, v in weights.variable_names(model).items()
                },
                num_decayed=sum(math.prod(v.shape) for v in decayed),
                num_blocks=efficientnet.num_blocks(model),
                head_filters=model.get_layer("head_conv").filters,
                strides=[
                    layer.strides[0] for layer in model.layers if layer.name.endswith("_dw_conv")
                ],
                squeezed=[
                    layer.filters for layer in model.layers if layer.name.endswith("_se_reduce")
                ],
                survival_probs={
                    int(layer.name.split("_")[1]): layer.survival_prob
                    for layer in model.layers
                    if isinstance(layer, layers.StochasticDepth)
                },
                endpoints={
                    key: tuple(output.shape[1:])
                    for key, output in efficientnet.endpoints(model).items()
                },
            )
    finally:
        gc.enable()


@pytest.fixture(scope="module")
def recorded_variables(goldens) -> dict[str, list]:
    return json.loads(gzip.decompress((goldens / "model" / "variables.json.gz").read_bytes()))


@pytest.fixture(scope="module")
def recorded_counts(goldens) -> dict[str, dict]:
    return json.loads((goldens / "model" / "param_counts.json").read_text())


def tiny(num_classes: int = 10, image_size: int = 16, **kwargs) -> tf.keras.Model:
    return efficientnet.build_model("efficientnet-test", num_classes, image_size, **kwargs)


def pixels(rng, count: int = 4, size: int = 16) -> np.ndarray:
    return rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8)


# --------------------------------------------------------------------------------------------------
# Sizes and names


def test_every_variant_has_a_row():
    assert set(SIZES) == set(efficientnet.VARIANTS)


@pytest.mark.parametrize("name", mostly_slow(sorted(SIZES), QUICK))
def test_sizes(name):
    model = summary(name)
    trainable, statistics = model.count(trainable=True), model.count(trainable=False)
    assert (
        trainable,
        statistics,
        trainable + statistics,
        model.num_blocks,
        model.head_filters,
    ) == SIZES[name]


@pytest.mark.parametrize("name", mostly_slow(PUBLISHED, QUICK))
def test_variables_equal_original(name, recorded_variables):
    expected = {key: (shape, trainable) for key, shape, trainable in recorded_variables[name]}
    assert summary(name).variables == expected


@pytest.mark.parametrize("name", mostly_slow(PUBLISHED, QUICK))
def test_coefficients_equal_original(name, recorded_counts):
    recorded, variant = recorded_counts[name], efficientnet.VARIANTS[name]
    assert {
        "width_coefficient": variant.width,
        "depth_coefficient": variant.depth,
        "dropout_rate": variant.dropout_rate,
        "image_size": variant.resolution,
        "trainable_params": SIZES[name][0],
        "total_params_incl_bn_moving_stats": SIZES[name][2],
        "num_blocks": SIZES[name][3],
        "l2_decayed_params": summary(name).num_decayed,
    }.items() <= recorded.items()


def test_variables_of_lite0_are_those_of_b0_without_squeeze(recorded_variables):
    """Widths and depths are equal, so the names of its TF1 checkpoints follow."""
    expected = {
        key.replace("efficientnet-b0/", "efficientnet-lite0/"): (shape, trainable)
        for key, shape, trainable in recorded_variables["efficientnet-b0"]
        if "/se/" not in key
    }
    assert summary("efficientnet-lite0").variables == expected


def test_ends_of_lite_are_not_scaled():
    """Lite3 has the coefficients of B3."""
    lite, b = efficientnet.VARIANTS["efficientnet-lite3"], efficientnet.VARIANTS["efficientnet-b3"]
    table = efficientnet.block_table(
        lite.stages, lite.width, lite.depth, scale_stem=False, deepen_ends=False
    )
    scaled = efficientnet.block_table(b.stages, b.width, b.depth)
    assert table[0] == dataclasses.replace(scaled[0], filters_in=32)
    assert table[1:] == scaled[2:-1], "the first stage and the last have one block"
    shapes = summary("efficientnet-lite3").variables
    assert shapes["efficientnet-lite3/stem/conv2d/kernel"][0] == [3, 3, 3, 32]
    assert shapes["efficientnet-lite3/head/conv2d/kernel"][0] == [1, 1, 384, 1280]


@pytest.mark.parametrize("name", LITE)
def test_row_of_lite(name):
    row = efficientnet.VARIANTS[name]
    assert (row.activation, row.squeeze_excite) == ("relu6", False)
    assert not row.scale_stem_and_head and not row.deepen_ends


def tiny_lite(num_classes: int = 10, image_size: int = 32, **kwargs) -> tf.keras.Model:
    """At width 0.25, the first block outputs as many channels as a scaled stem would feed it."""
    small = {"width_coefficient": 0.25, "depth_coefficient": 0.3}
    return efficientnet.build_model(
        "efficientnet-lite0", num_classes, image_size, **small, **kwargs
    )


def test_layers_of_lite(rng):
    model = tiny_lite()
    names = [layer.name for layer in model.layers]
    assert not any("swish" in name or "_se_" in name for name in names)
    activations = [layer for layer in model.layers if layer.name.endswith("_relu6")]
    activated = [n for n in names if n.endswith("_bn") and not n.endswith("_project_bn")]
    assert len(activations) == len(activated)
    assert activations[0]([-1.0, 5.0, 7.0]).numpy().tolist() == [0.0, 5.0, 6.0]
    assert model.get_layer("stem_bn").epsilon == 1e-3
    outputs = efficientnet.endpoints(model)
    assert outputs["stem"].name.startswith("stem_relu6")
    assert (outputs["features"].shape[-1], outputs["reduction_5"].shape[1]) == (1280, 1)
    images = pixels(rng, size=32)
    normalized = model.get_layer("normalization")(images)
    np.testing.assert_allclose(normalized, (images - 127.0) / 128.0, atol=1e-6)
    copied = tf.keras.models.clone_model(model)
    copied.set_weights(model.get_weights())
    np.testing.assert_array_equal(copied(images), model(images))


def test_small_image_model(recorded_variables, recorded_counts):
    small = summary("efficientnet-b0", num_classes=10, image_size=32, small_image=True)
    name = "efficientnet-b0_small_image_10_classes"
    assert small.variables == {key: (shape, t) for key, shape, t in recorded_variables[name]}
    assert small.count(True) == recorded_counts[name]["trainable_params"] == 4_020_358
    large = summary("efficientnet-b0")
    backbone = {k: v for k, v in large.variables.items() if "/head/dense/" not in k}
    assert backbone.items() <= small.variables.items()
    # Blocks 1 and 3 start stages 2 and 3.
    assert large.strides == [1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1]
    assert small.strides == [1, 1, 1, 1, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1]


@pytest.mark.parametrize(
    "filters, width, expected",
    [
        (16, 1.2, 24),  # 16 would be 17 % below 19.2; in B3, only the guard avoids this
        (40, 1.2, 48),
        (32, 1.1, 32),  # 32 is 9.1 % below 35.2
        (24, 1.1, 24),
        (16, 1.4, 24),
        (16, 4.3, 72),
        (1280, 4.3, 5504),
        (4, 1.1, 8),
        (20, 1.0, 20),
    ],
)
def test_round_filters(filters, width, expected):
    assert efficientnet.round_filters(filters, width) == expected


def test_round_filters_properties():
    for filters in range(8, 400, 8):
        for width in np.arange(0.5, 5.0, 0.1):
            rounded = efficientnet.round_filters(filters, width)
            assert rounded % 8 == 0
            assert rounded >= 0.9 * filters * width
            assert rounded <= filters * width + 8


@pytest.mark.parametrize("repeats, depth, expected", [(1, 1.1, 2), (3, 1.0, 3), (4, 5.3, 22)])
def test_round_repeats(repeats, depth, expected):
    assert efficientnet.round_repeats(repeats, depth) == expected


def test_block_table_of_a_scaled_model():
    stages = (
        efficientnet.Stage(3, 1, 1, filters_in=32, filters_out=16, repeats=1),
        efficientnet.Stage(5, 2, 6, filters_in=16, filters_out=24, repeats=2),
        efficientnet.Stage(3, 2, 6, filters_in=24, filters_out=40, repeats=1),
        efficientnet.Stage(3, 2, 6, filters_in=40, filters_out=80, repeats=1),
    )

    def rows(small_image):
        return [
            (b.kernel, b.stride, b.expand, b.filters_in, b.filters_out, b.repeats)
            for b in efficientnet.block_table(stages, 1.2, 1.4, small_image)
        ]

    expected = [
        (3, 1, 1, 40, 24, 1),
        (3, 1, 1, 24, 24, 1),
        (5, 2, 6, 24, 32, 1),
        (5, 1, 6, 32, 32, 1),
        (5, 1, 6, 32, 32, 1),
        (3, 2, 6, 32, 48, 1),
        (3, 1, 6, 48, 48, 1),
        (3, 2, 6, 48, 96, 1),
        (3, 1, 6, 96, 96, 1),
    ]
    assert rows(small_image=False) == expected
    assert rows(small_image=True) == [
        (kernel, 1 if index in (2, 5) else stride, *rest)
        for index, (kernel, stride, *rest) in enumerate(expected)
    ]


def test_squeeze_width_is_a_quarter_of_the_input():
    # Block 1 expands 16 channels to 96 but squeezes to a quarter of the 16, not of the 96.
    inputs = [32, 16, 24, 24, 40, 40, 80, 80, 80, 112, 112, 112, 192, 192, 192, 192]
    assert summary("efficientnet-b0").squeezed == [filters // 4 for filters in inputs]


def test_overrides():
    plain = tiny(image_size=32)
    wider = tiny(image_size=32, width_coefficient=2.0)
    deeper = tiny(image_size=32, depth_coefficient=1.5, dropout_rate=0.7, bn_momentum=0.9)
    assert wider.get_layer("stem_conv").filters == 2 * plain.get_layer("stem_conv").filters
    assert efficientnet.num_blocks(deeper) == 2 + 3
    assert deeper.get_layer("head_dropout").rate == 0.7
    assert plain.get_layer("head_dropout").rate == 0.2
    assert plain.get_layer("stem_bn").momentum == 0.99
    assert all(
        layer.momentum == 0.9 for layer in deeper.layers if isinstance(layer, layers.BatchNorm)
    )
    assert plain.output_shape == (None, 10)


# --------------------------------------------------------------------------------------------------
# Endpoints


def test_endpoints_of_b0():
    assert summary("efficientnet-b0").endpoints == {
        "stem": (112, 112, 32),
        "reduction_1": (112, 112, 16),
        "reduction_2": (56, 56, 24),
        "reduction_3": (28, 28, 40),
        "reduction_4": (14, 14, 112),
        "reduction_5": (7, 7, 320),
        "features": (7, 7, 1280),
        "pooled": (1280,),
        "logits": (1000,),
    }


def test_endpoint_values_are_those_of_the_forward_pass(rng):
    model = tiny()
    outputs = tf.keras.Model(model.input, efficientnet.endpoints(model))(pixels(rng))
    assert outputs["reduction_2"].shape == (4, 4, 4, 16)  # after the residual addition
    np.testing.assert_allclose(
        outputs["pooled"], tf.reduce_mean(outputs["features"], (1, 2)), rtol=1e-5, atol=1e-6
    )
    kernel, bias = model.get_layer("head_dense").get_weights()
    np.testing.assert_allclose(
        outputs["logits"], outputs["pooled"].numpy() @ kernel + bias, rtol=1e-4, atol=1e-5
    )


# --------------------------------------------------------------------------------------------------
# Bad arguments


def test_unknown_variant_names_the_known_ones():
    with pytest.raises(ValueError, match="unknown model 'efficientnet-b8'") as error:
        efficientnet.build_model("efficientnet-b8")
    assert all(name in str(error.value) for name in efficientnet.VARIANTS)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"survival_prob": 0.0}, "survival_prob is 0.0"),
        ({"survival_prob": -0.5}, "survival_prob is -0.5"),
        ({"survival_prob": 1.01}, "survival_prob is 1.01"),
        ({"dropout_rate": -0.1}, "dropout_rate is -0.1"),
        ({"dropout_rate": 1.0}, "dropout_rate is 1.0"),
        ({"num_classes": 0}, "num_classes is 0"),
        ({"num_classes": "3"}, "num_classes is '3'; it must be a whole number"),
        ({"image_size": 0}, "image_size is 0"),
        ({"image_size": (32, 32)}, r"image_size is \(32, 32\); it must be a whole number"),
    ],
)
def test_out_of_range(kwargs, message):
    with pytest.raises(ValueError, match=message):
        efficientnet.build_model("efficientnet-test", **kwargs)


# --------------------------------------------------------------------------------------------------
# Initial values


@pytest.fixture(scope="module")
def wide() -> tf.keras.Model:
    """The small model, widened so that its weights give precise standard deviations."""
    tf.keras.utils.set_random_seed(1)
    return tiny(num_classes=400, width_coefficient=32.0)


@pytest.mark.parametrize(
    "layer, expected",
    [
        ("stem_conv", math.sqrt(2 / (3 * 3 * 256))),
        ("blocks_1_dw_conv", math.sqrt(2 / (3 * 3))),  # As for one filter.
        ("blocks_1_expand_conv", math.sqrt(2 / 512)),
        ("blocks_2_se_reduce", math.sqrt(2 / 128)),
        ("blocks_2_se_expand", math.sqrt(2 / 1024)),
        ("head_conv", math.sqrt(2 / 1024)),
    ],
)
def test_convolution_initialiser(wide, layer, expected):
    kernel = wide.get_layer(layer).get_weights()[0].ravel()
    error = 5 / math.sqrt(2 * kernel.size)  # five standard errors of a standard deviation
    assert np.std(kernel) == pytest.approx(expected, rel=error)
    assert abs(np.mean(kernel)) < 5 * expected / math.sqrt(kernel.size)
    # A truncated normal distribution would end at 2.27 times this standard deviation.
    assert np.max(np.abs(kernel)) > 2.5 * expected


def test_other_initial_values(wide):
    kernel, bias = wide.get_layer("head_dense").get_weights()
    limit = 1 / math.sqrt(400)
    assert 0.999 * limit < np.max(np.abs(kernel)) <= limit
    assert np.std(kernel) == pytest.approx(limit / math.sqrt(3), rel=0.01)
    assert not bias.any()
    assert not wide.get_layer("blocks_2_se_expand").get_weights()[1].any()
    for layer in wide.layers:
        if isinstance(layer, layers.BatchNorm):
            gamma, beta, mean, variance = layer.get_weights()
            assert (gamma == 1).all() and (variance == 1).all()
            assert not beta.any() and not mean.any()


# --------------------------------------------------------------------------------------------------
# Normalization layers


def test_pixel_normalization():
    layer = layers.PixelNormalization(mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 1.0))
    image = np.array([[[[0.0, 63.75, 0.0]], [[255.0, 127.5, 255.0]]]], np.float32)
    expected = [[[[-1.0, 0.0, 0.0]], [[1.0, 1.0, 1.0]]]]
    np.testing.assert_allclose(layer(image), expected, atol=1e-6)


def test_imagenet_and_given_statistics(rng):
    images = pixels(rng).astype(np.float32)
    default = tiny().get_layer("normalization")(images)
    expected = (images / 255 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    np.testing.assert_allclose(default, expected, rtol=1e-4, atol=1e-5)
    given = tiny(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)).get_layer("normalization")(images)
    expected = (images / 255 - (0.1, 0.2, 0.3)) / (0.4, 0.5, 0.6)
    np.testing.assert_allclose(given, expected, rtol=1e-4, atol=1e-5)


def test_uint8_equals_float(rng):
    model, images = tiny(), pixels(rng)
    np.testing.assert_array_equal(model(images), model(images.astype(np.float32)))


def test_batch_norm_in_training(rng):
    layer = layers.BatchNorm(momentum=0.9, epsilon=1e-3)
    x = rng.normal(3.0, 2.0, (3, 2, 2, 5)).astype(np.float32)
    layer.build(x.shape)
    gamma, beta = rng.normal(size=(2, 5)).astype(np.float32)
    layer.set_weights([gamma, beta, np.full(5, 0.5, np.float32), np.full(5, 2.0, np.float32)])
    mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
    expected = (x - mean) / np.sqrt(variance + 1e-3) * gamma + beta
    np.testing.assert_allclose(layer(x, training=True), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(layer.moving_mean, 0.9 * 0.5 + 0.1 * mean, rtol=1e-5)
    # The biased variance: with N/(N-1) = 12/11, the increment would be 9 % too large.
    np.testing.assert_allclose(layer.moving_variance, 0.9 * 2.0 + 0.1 * variance, rtol=1e-5)


@pytest.mark.parametrize("frozen", [False, True])
def test_batch_norm_at_inference(rng, frozen):
    layer = layers.BatchNorm(epsilon=1e-3)
    x = rng.normal(size=(3, 2, 2, 5)).astype(np.float32)
    layer.build(x.shape)
    values = [*rng.normal(size=(3, 5)), rng.uniform(0.5, 2.0, 5)]
    gamma, beta, mean, variance = values = [v.astype(np.float32) for v in values]
    layer.set_weights(values)
    layer.trainable = not frozen
    expected = (x - mean) / np.sqrt(variance + 1e-3) * gamma + beta
    np.testing.assert_allclose(layer(x, training=frozen), expected, rtol=1e-4, atol=1e-5)
    for variable, value in zip(layer.weights, layer.get_weights()):
        np.testing.assert_array_equal(variable, value)
    np.testing.assert_array_equal(layer.moving_mean, mean)


@pytest.mark.parametrize(
    "layer",
    [
        layers.PixelNormalization((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)),
        layers.BatchNorm(momentum=0.9, epsilon=1e-5),
        layers.StochasticDepth(0.7),
        layers.Dropout(0.3),
        layers.Swish(),
        folding.PlainSwish(),
        folding.Centering((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), small_image=True, variant="a"),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_layer_config_round_trip(layer):
    config = tf.keras.layers.serialize(layer)
    restored = tf.keras.layers.deserialize(json.loads(json.dumps(config)))
    assert type(restored) is type(layer)
    assert json.dumps(restored.get_config()) == json.dumps(layer.get_config())


# --------------------------------------------------------------------------------------------------
# What Keras saves, clones and copies


@pytest.fixture(scope="module", params=["float32", "mixed_bfloat16"])
def saved(request) -> tf.keras.Model:
    tf.keras.mixed_precision.set_global_policy(request.param)
    model = tiny(3, small_image=True, mean=(0.5, 0.25, 0.0))
    tf.keras.mixed_precision.set_global_policy("float32")
    return model


def through_file(name: str, load: Callable = efficientnet.load_model):
    def copy_of(model: tf.keras.Model, folder: Path) -> tf.keras.Model:
        model.save(folder / name)
        return load(folder / name)

    return copy_of


def through_checkpoint_callback(model: tf.keras.Model, folder: Path) -> tf.keras.Model:
    callback = tf.keras.callbacks.ModelCheckpoint(str(folder / "{epoch}.keras"))
    callback.set_model(model)
    callback.on_train_begin()
    callback.on_epoch_end(0, {})
    return tf.keras.models.load_model(folder / "1.keras")


def with_weights_of(make: Callable[[tf.keras.Model], tf.keras.Model]):
    def copy_of(model: tf.keras.Model, folder: Path) -> tf.keras.Model:
        made = make(model)
        made.set_weights(model.get_weights())
        return made

    return copy_of


@pytest.mark.parametrize(
    "copy_of",
    [
        pytest.param(through_file("a.keras"), id="keras"),
        pytest.param(through_file("a.h5"), id="h5", marks=pytest.mark.slow),
        pytest.param(
            through_file("a.keras", tf.keras.models.load_model),
            id="load_model",
            marks=pytest.mark.slow,
        ),
        pytest.param(through_checkpoint_callback, id="ModelCheckpoint", marks=pytest.mark.slow),
        pytest.param(lambda model, folder: copy.deepcopy(model), id="deepcopy"),
        pytest.param(with_weights_of(tf.keras.models.clone_model), id="clone_model"),
        pytest.param(
            with_weights_of(lambda model: tf.keras.models.model_from_json(model.to_json())),
            id="json",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            with_weights_of(lambda model: type(model).from_config(model.get_config())),
            id="from_config",
        ),
    ],
)
def test_copies_compute_the_same(tmp_path, rng, saved, copy_of):
    assert_same_computation(saved, copy_of(saved, tmp_path), rng)


@pytest.mark.slow
@pytest.mark.parametrize(
    "saved", ["mixed_bfloat16", pytest.param("float32", marks=pytest.mark.slow)], indirect=True
)
def test_saved_model_computes_the_same(tmp_path, rng, saved):
    assert_same_computation(saved, through_file("folder")(saved, tmp_path), rng)


def assert_same_computation(saved: tf.keras.Model, made: tf.keras.Model, rng) -> None:
    images = pixels(rng).astype(np.float32)
    np.testing.assert_array_equal(made(images), saved(images))
    assert heads.settings(made) == heads.settings(saved)
    # The layers are ours, with their gradient and noise, not Keras layers of the same name.
    kinds = {type(layer) for layer in saved.layers}
    assert {type(layer) for layer in made.layers} == kinds
    assert {layers.Swish, layers.StochasticDepth, layers.Dropout} <= kinds
    with layers.noise_seed(tf.constant([1, 2])):
        expected = saved(images, training=True)
    with layers.noise_seed(tf.constant([1, 2])):
        np.testing.assert_array_equal(made(images, training=True), expected)


def test_folded_model_is_saved(tmp_path, rng, saved):
    folded = folding.fold_batch_norm(saved)
    folded.save(tmp_path / "a.keras")
    images = pixels(rng).astype(np.float32)
    made = efficientnet.load_model(tmp_path / "a.keras")
    np.testing.assert_array_equal(made(images), folded(images))


def test_swish_layer_has_the_gradient_of_one_pass():
    x = tf.constant([-2.0, 0.0, 3.0])
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layers.Swish()(x)
    gate = tf.sigmoid(x)
    np.testing.assert_allclose(tape.gradient(y, x), gate * (1 + x * (1 - gate)), rtol=1e-5)


# --------------------------------------------------------------------------------------------------
# Noise


def test_survival_falls_linearly():
    # Only blocks with a shortcut have a probability: all but the first of each stage.
    expected = {i: 1 - 0.2 * i / 16 for i in (2, 4, 6, 7, 9, 10, 12, 13, 14)}
    assert summary("efficientnet-b0").survival_probs == pytest.approx(expected)


def test_survival_prob_argument():
    assert tiny(survival_prob=0.4).get_layer("blocks_2_stochastic_depth").survival_prob == (
        pytest.approx(1 - 0.6 * 2 / 3)
    )
    assert not [
        layer for layer in tiny(survival_prob=1.0).layers if "stochastic_depth" in layer.name
    ]


def noise(layer: tf.keras.layers.Layer, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    with layers.noise_seed(tf.constant([seed, 0])):
        return layer(tf.ones(shape), training=True).numpy()


def test_stochastic_depth_drops_whole_examples():
    outputs = noise(layers.StochasticDepth(0.8, name="a"), (8192, 2, 3, 2))
    first = outputs[:, :1, :1, :1]
    np.testing.assert_array_equal(outputs, np.broadcast_to(first, outputs.shape))
    assert set(np.unique(first)) == {0.0, np.float32(1 / 0.8)}
    # The mean of n examples has the standard deviation sqrt((1 - p)/(p·n)) = 0.0055.
    assert first.mean() == pytest.approx(1.0, abs=0.025)


def test_dropout_drops_single_units():
    outputs = noise(layers.Dropout(0.3, name="a"), (64, 256))
    assert set(np.unique(outputs)) == {0.0, np.float32(1 / 0.7)}
    assert outputs.mean() == pytest.approx(1.0, abs=0.025)  # standard deviation 0.0051
    # Every row and every column has kept and dropped units.
    assert outputs.mean(0).min() > 0 and outputs.mean(1).min() > 0
    assert outputs.std(0).min() > 0 and outputs.std(1).min() > 0


NOISY = pytest.mark.parametrize(
    "make, shape",
    [
        (functools.partial(layers.StochasticDepth, 0.5), (64, 1, 1, 2)),
        (functools.partial(layers.Dropout, 0.5), (8, 16)),
    ],
    ids=["stochastic_depth", "dropout"],
)


@NOISY
def test_noise_is_a_function_of_seed_and_layer_name(make, shape):
    drawn = noise(make(name="a"), shape, seed=7)
    np.testing.assert_array_equal(noise(make(name="a"), shape, seed=7), drawn)
    assert (noise(make(name="b"), shape, seed=7) != drawn).any()
    assert (noise(make(name="a"), shape, seed=8) != drawn).any()


@NOISY
def test_noise_does_not_depend_on_what_ran_before(make, shape):
    layer = make(name="a")
    drawn = noise(layer, shape)
    tf.random.uniform([3])
    noise(layer, shape, seed=5)
    np.testing.assert_array_equal(noise(layer, shape), drawn)


@NOISY
def test_noise_outside_a_scope_comes_from_the_global_generator(make, shape):
    layer, inputs = make(name="a"), tf.ones(shape)
    tf.random.set_seed(3)
    first, second = layer(inputs, training=True), layer(inputs, training=True)
    assert (first != second).numpy().any()
    tf.random.set_seed(3)
    np.testing.assert_array_equal(layer(inputs, training=True), first)


def test_noise_seed_scopes_nest():
    layer = layers.Dropout(0.5, name="a")
    with layers.noise_seed(tf.constant([1, 0])):
        with layers.noise_seed(tf.constant([2, 0])):
            layer(tf.ones([8, 16]), training=True)
        outer = layer(tf.ones([8, 16]), training=True)
    np.testing.assert_array_equal(outer, noise(layer, (8, 16), seed=1))


@NOISY
def test_quiet_rows_pass_without_noise(make, shape):
    layer, inputs = make(name="a"), tf.ones(shape)
    with layers.noise_seed(tf.constant([1, 0]), quiet_from=3):
        found = layer(inputs, training=True).numpy()
    expected = noise(layer, shape, seed=1)
    assert (expected[3:] != 1).any()
    np.testing.assert_array_equal(found[:3], expected[:3])
    np.testing.assert_array_equal(found[3:], inputs[3:])


@pytest.mark.parametrize(
    "layer, training",
    [
        (layers.StochasticDepth(0.5), False),
        (layers.StochasticDepth(0.5), None),
        (layers.StochasticDepth(1.0), True),
        (layers.Dropout(0.5), False),
        (layers.Dropout(0.5), None),
        (layers.Dropout(0.0), True),
    ],
)
def test_no_noise(rng, layer, training):
    inputs = rng.normal(size=(64, 1, 1, 2)).astype(np.float32)
    np.testing.assert_array_equal(layer(inputs, training=training), inputs)


def test_model_is_noisy_in_training_only(rng):
    model, images = tiny(survival_prob=0.5, dropout_rate=0.5), pixels(rng, 8)

    def logits(seed, training):
        with layers.noise_seed(tf.constant([seed, 0])):
            return model(images, training=training).numpy()

    np.testing.assert_array_equal(logits(1, training=True), logits(1, training=True))
    assert (logits(1, training=True) != logits(2, training=True)).any()
    np.testing.assert_array_equal(logits(1, training=False), logits(2, training=False))


# --------------------------------------------------------------------------------------------------
# Compute modes


@pytest.mark.parametrize("training", [False, True])
def test_compiled_by_xla_equals_eager(rng, training):
    # Without noise, because XLA on CPU draws different numbers from the same seed.
    model, images = tiny(survival_prob=1.0, dropout_rate=0.0), pixels(rng)

    def forward(images):
        return model(images, training=training)

    statistics = model.get_layer("stem_bn").moving_variance
    before = statistics.numpy()
    eager, moved = forward(images).numpy(), statistics.numpy() - before
    statistics.assign(before)
    compiled = tf.function(forward, jit_compile=True)(images)
    np.testing.assert_allclose(compiled, eager, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(statistics - before, moved, rtol=1e-4, atol=1e-6)
    assert moved.any() == training


def test_noise_compiled_by_xla(rng):
    model, images = tiny(survival_prob=0.5, dropout_rate=0.5), pixels(rng)

    @tf.function(jit_compile=True)
    def forward(seed):
        with layers.noise_seed(seed):
            return model(images, training=True)

    first, again, other = (forward(tf.constant([seed, 0])).numpy() for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_mixed_bfloat16_trains(rng):
    images, full = pixels(rng), tiny()
    tf.keras.mixed_precision.set_global_policy("mixed_bfloat16")
    model = tiny()
    model.set_weights(full.get_weights())
    assert model.get_layer("head_conv").compute_dtype == "bfloat16"
    assert {v.dtype for v in model.weights} == {tf.float32}

    logits = model(images)
    assert logits.dtype == tf.float32
    assert 0 < np.max(np.abs(logits - full(images))) < 0.05 * np.std(full(images))

    loss = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss, run_eagerly=True)
    before = model.get_weights()
    model.fit(images, np.arange(4), verbose=0)
    after = model.get_weights()
    assert {v.dtype for v in model.weights} == {tf.float32}
    assert all(np.isfinite(value).all() for value in after)
    unchanged = {v.name for v, old, new in zip(model.weights, before, after) if (old == new).all()}
    # A batch norm cancels the offsets that precede it, so they have no gradient.
    assert unchanged <= {f"blocks_{i}_project_bn/beta:0" for i in range(3)}
