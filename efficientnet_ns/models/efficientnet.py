"""EfficientNet B0–B7 (arXiv 1905.11946, table 1), L2 (1911.04252, table 7) and Lite0–4 in Keras.

Lite is the family for phones and Edge TPUs: it has no squeeze-and-excite, uses relu6, and does not
scale the stem and head (TensorFlow's TPU repository, `models/official/efficientnet/lite`).

Inputs are pixels 0..255; normalization is the first layer. Layer names are stable: `stem_conv`,
`blocks_<i>_{expand,dw,project}_{conv,bn}`, `blocks_<i>_se_{reduce,expand}`, `head_{conv,bn,dense}`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import os
import sys
from collections.abc import Callable, Container, Sequence
from typing import Any

import tensorflow as tf

from efficientnet_ns.models import layers
from efficientnet_ns.models.weights import load_weights, stored_settings

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_LAYERS_PER_BLOCK = 20  # Upper bound, on the longest path through a block.


@dataclasses.dataclass(frozen=True)
class Stage:
    """One row of table 1 of the EfficientNet paper: `repeats` MBConv blocks of one shape."""

    kernel: int
    stride: int
    expand: int
    filters_in: int
    filters_out: int
    repeats: int


_B0_STAGES = (
    Stage(kernel=3, stride=1, expand=1, filters_in=32, filters_out=16, repeats=1),
    Stage(kernel=3, stride=2, expand=6, filters_in=16, filters_out=24, repeats=2),
    Stage(kernel=5, stride=2, expand=6, filters_in=24, filters_out=40, repeats=2),
    Stage(kernel=3, stride=2, expand=6, filters_in=40, filters_out=80, repeats=3),
    Stage(kernel=5, stride=1, expand=6, filters_in=80, filters_out=112, repeats=3),
    Stage(kernel=5, stride=2, expand=6, filters_in=112, filters_out=192, repeats=4),
    Stage(kernel=3, stride=1, expand=6, filters_in=192, filters_out=320, repeats=1),
)
_TEST_STAGES = (
    Stage(kernel=3, stride=1, expand=1, filters_in=8, filters_out=8, repeats=1),
    Stage(kernel=3, stride=2, expand=2, filters_in=8, filters_out=16, repeats=2),
)


@dataclasses.dataclass(frozen=True)
class Variant:
    """One model of the family: its compound-scaling coefficients and other differences.

    Attributes:
      width, depth: multipliers of channels and of block repeats.
      resolution: image side in pixels at which the published model is evaluated.
      dropout_rate: dropout rate of the head.
      stages: the unscaled block table.
      head_filters: unscaled channels of the last convolution.
      activation: a key of `layers.ACTIVATIONS`.
      squeeze_excite: whether blocks weight their channels.
      scale_stem_and_head: whether `width` multiplies the channels of the stem and last convolution.
      deepen_ends: whether `depth` multiplies the repeats of the first and last stage.
      mean, std: channel statistics of the pixels on which the published weights were trained, in
        units of the full range (0..1).
    """

    width: float
    depth: float
    resolution: int
    dropout_rate: float
    stages: tuple[Stage, ...] = _B0_STAGES
    head_filters: int = 1280
    activation: str = "swish"
    squeeze_excite: bool = True
    scale_stem_and_head: bool = True
    deepen_ends: bool = True
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD


_lite = functools.partial(
    Variant,
    activation="relu6",
    squeeze_excite=False,
    scale_stem_and_head=False,
    deepen_ends=False,
    mean=(127 / 255,) * 3,
    std=(128 / 255,) * 3,
)

VARIANTS: dict[str, Variant] = {
    "efficientnet-b0": Variant(1.0, 1.0, 224, 0.2),
    "efficientnet-b1": Variant(1.0, 1.1, 240, 0.2),
    "efficientnet-b2": Variant(1.1, 1.2, 260, 0.3),
    "efficientnet-b3": Variant(1.2, 1.4, 300, 0.3),
    "efficientnet-b4": Variant(1.4, 1.8, 380, 0.4),
    "efficientnet-b5": Variant(1.6, 2.2, 456, 0.4),
    "efficientnet-b6": Variant(1.8, 2.6, 528, 0.5),
    "efficientnet-b7": Variant(2.0, 3.1, 600, 0.5),
    "efficientnet-l2": Variant(4.3, 5.3, 800, 0.5),
    "efficientnet-lite0": _lite(1.0, 1.0, 224, 0.2),
    "efficientnet-lite1": _lite(1.0, 1.1, 240, 0.2),
    "efficientnet-lite2": _lite(1.1, 1.2, 260, 0.3),
    "efficientnet-lite3": _lite(1.2, 1.4, 280, 0.3),
    "efficientnet-lite4": _lite(1.4, 1.8, 300, 0.3),
    # Not a published model: small enough for tests that train.
    "efficientnet-test": Variant(1.0, 1.0, 32, 0.2, _TEST_STAGES, head_filters=32),
}


def round_filters(filters: int, width: float, divisor: int = 8) -> int:
    """Returns the multiple of `divisor` nearest to the product, at most 10 % below it."""
    if width == 1.0:
        return filters
    exact = filters * width
    rounded = max(divisor, int(exact + divisor / 2) // divisor * divisor)
    return rounded if rounded >= 0.9 * exact else rounded + divisor


def round_repeats(repeats: int, depth: float) -> int:
    """Returns the scaled number of blocks of a stage, rounded up."""
    return int(math.ceil(depth * repeats))


def block_table(
    stages: Sequence[Stage],
    width: float,
    depth: float,
    small_image: bool = False,
    *,
    scale_stem: bool = True,
    deepen_ends: bool = True,
) -> list[Stage]:
    """Expands scaled stages into one `Stage(repeats=1)` per MBConv block.

    Args:
      small_image: whether stages 2 and 3 have stride 1 (32-pixel variant for SVHN and CIFAR).
      scale_stem: whether `width` multiplies the input channels of the first block.
      deepen_ends: whether `depth` multiplies the repeats of the first and last stage.
    """
    blocks = []
    for number, stage in enumerate(stages, start=1):
        scale_input = scale_stem or number > 1
        filters_in = round_filters(stage.filters_in, width if scale_input else 1.0)
        filters_out = round_filters(stage.filters_out, width)
        stride = 1 if small_image and number in (2, 3) else stage.stride
        deepen = deepen_ends or number not in (1, len(stages))
        for repeat in range(round_repeats(stage.repeats, depth if deepen else 1.0)):
            blocks.append(
                dataclasses.replace(
                    stage,
                    stride=stride if repeat == 0 else 1,
                    filters_in=filters_in if repeat == 0 else filters_out,
                    filters_out=filters_out,
                    repeats=1,
                )
            )
    return blocks


def get_variant(name: str) -> Variant:
    """Returns the variant called `name`; ValueError with the known names if there is none."""
    if name not in VARIANTS:
        raise ValueError(f"unknown model {name!r}; known models: {', '.join(VARIANTS)}")
    return VARIANTS[name]


@dataclasses.dataclass(frozen=True)
class _Parts:
    """Settings that the layers of one model share."""

    batch_norm: Callable[..., layers.BatchNorm]
    activation: str
    squeeze_excite: bool

    def activate(self, x, name: str):
        return layers.ACTIVATIONS[self.activation](name=f"{name}_{self.activation}")(x)

    def normalize_and_activate(self, x, name: str):
        return self.activate(self.batch_norm(name=f"{name}_bn")(x), name)


def _conv(x, filters: int, kernel: int, stride: int, name: str, use_bias: bool = False):
    return tf.keras.layers.Conv2D(
        filters,
        kernel,
        strides=stride,
        padding="same",
        use_bias=use_bias,
        kernel_initializer=_conv_initializer(),
        name=name,
    )(x)


def _conv_initializer() -> tf.keras.initializers.Initializer:
    # Normal with variance 2 / (k·k·filters_out); for depthwise kernels, Keras' fan_out is k·k, as in
    # the original code.
    return tf.keras.initializers.VarianceScaling(2.0, "fan_out", "untruncated_normal")


def _squeeze_excite(x, filters_in: int, name: str, parts: _Parts):
    # The squeeze width depends on the block's input filters, not on the expanded ones.
    squeezed = max(1, int(filters_in * 0.25))
    s = tf.keras.layers.GlobalAveragePooling2D(keepdims=True, name=f"{name}_se_pool")(x)
    s = _conv(s, squeezed, 1, 1, f"{name}_se_reduce", use_bias=True)
    s = parts.activate(s, f"{name}_se")
    s = _conv(s, x.shape[-1], 1, 1, f"{name}_se_expand", use_bias=True)
    s = tf.keras.layers.Activation("sigmoid", name=f"{name}_se_gate")(s)
    return tf.keras.layers.Multiply(name=f"{name}_se_excite")([x, s])


def _mbconv(x, block: Stage, name: str, survival_prob: float, parts: _Parts):
    shortcut = x
    if block.expand != 1:
        x = _conv(x, block.filters_in * block.expand, 1, 1, f"{name}_expand_conv")
        x = parts.normalize_and_activate(x, f"{name}_expand")
    x = tf.keras.layers.DepthwiseConv2D(
        block.kernel,
        strides=block.stride,
        padding="same",
        use_bias=False,
        depthwise_initializer=_conv_initializer(),
        name=f"{name}_dw_conv",
    )(x)
    x = parts.normalize_and_activate(x, f"{name}_dw")
    if parts.squeeze_excite:
        x = _squeeze_excite(x, block.filters_in, name, parts)
    x = _conv(x, block.filters_out, 1, 1, f"{name}_project_conv")
    x = parts.batch_norm(name=f"{name}_project_bn")(x)
    if block.stride == 1 and block.filters_in == block.filters_out:
        if survival_prob < 1.0:
            x = layers.StochasticDepth(survival_prob, name=f"{name}_stochastic_depth")(x)
        x = tf.keras.layers.Add(name=f"{name}_add")([x, shortcut])
    return x


def _features(
    x,
    spec: Variant,
    width: float,
    blocks: Sequence[Stage],
    survival_prob: float,
    parts: _Parts,
):
    """Maps normalized pixels to pooled features."""
    x = _conv(x, blocks[0].filters_in, 3, 2, "stem_conv")
    x = parts.normalize_and_activate(x, "stem")
    for index, block in enumerate(blocks):
        block_survival = 1.0 - (1.0 - survival_prob) * index / len(blocks)
        x = _mbconv(x, block, f"blocks_{index}", block_survival, parts)
    head_width = width if spec.scale_stem_and_head else 1.0
    x = _conv(x, round_filters(spec.head_filters, head_width), 1, 1, "head_conv")
    x = parts.normalize_and_activate(x, "head")
    return tf.keras.layers.GlobalAveragePooling2D(name="head_pool")(x)


# Number of blocks of L2.
_DEEPEST = 88


def _allow_depth(num_blocks: int) -> None:
    # Keras traverses a model recursively, one level per layer of the longest path, when the model is
    # built or its layers are reused in another model. L2 has nearly as many as Python allows.
    needed = 1000 + _LAYERS_PER_BLOCK * num_blocks
    sys.setrecursionlimit(max(sys.getrecursionlimit(), needed))


def _classifier(x, num_classes: int, dropout_rate: float):
    x = layers.Dropout(dropout_rate, name="head_dropout")(x)
    x = tf.keras.layers.Dense(
        num_classes,
        # Uniform in ±1/sqrt(num_classes), as in the original code.
        kernel_initializer=tf.keras.initializers.VarianceScaling(1 / 3, "fan_out", "uniform"),
        name="head_dense",
    )(x)
    return _float32(x, "logits")


def _float32(x, name: str):
    # Outputs are float32 regardless of the compute dtype.
    return tf.keras.layers.Activation("linear", dtype="float32", name=name)(x)


def _check(num_classes: int, image_size: int, survival_prob: float, dropout_rate: float) -> None:
    for name, value in (("num_classes", num_classes), ("image_size", image_size)):
        if not isinstance(value, numbers.Integral):
            raise ValueError(f"{name} is {value!r}; it must be a whole number")
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    if not 0.0 < survival_prob <= 1.0:
        raise ValueError(f"survival_prob is {survival_prob}; it must be in (0, 1]")
    if not 0.0 <= dropout_rate < 1.0:
        raise ValueError(f"dropout_rate is {dropout_rate}; it must be in [0, 1)")


def _expected_images(
    spec: Variant, weights: str | os.PathLike | None, **given: Any
) -> dict[str, Any]:
    """Returns each setting as given, else as stored with the weights, else as in the variant."""
    stored = {} if weights is None else stored_settings(weights)
    known = {
        "small_image": False,
        "mean": spec.mean,
        "std": spec.std,
        "crop_fraction": None,
        **stored,
    }
    return {name: known[name] if value is None else value for name, value in given.items()}


def build_model(
    variant: str,
    num_classes: int = 1000,
    image_size: int | None = None,
    *,
    small_image: bool | None = None,
    width_coefficient: float | None = None,
    depth_coefficient: float | None = None,
    dropout_rate: float | None = None,
    survival_prob: float = 0.8,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    crop_fraction: float | None = None,
    bn_momentum: float = 0.99,
    num_shards_per_group: int = -1,
    include_top: bool = True,
    weights: str | os.PathLike | None = None,
) -> tf.keras.Model:
    """Builds an EfficientNet that maps pixels to logits, or to pooled features.

    Args:
      variant: a key of `VARIANTS`; also the model's name and the variable scope of its checkpoints.
      num_classes: width of the logits.
      image_size: side of the input in pixels; None uses the variant's resolution.
      small_image: whether stages 2 and 3 have stride 1, for images of up to 32 pixels, which are not
        cropped. If None, as stored with `weights`, else False.
      width_coefficient, depth_coefficient, dropout_rate: override the variant's.
      survival_prob: survival probability of the last block's residual branch; that of block i of N
        is 1 - (1 - survival_prob)·i/N.
      mean, std: channel statistics of the training set in units of the full range (0..1). If None,
        as stored with `weights`, else the variant's.
      crop_fraction: fraction of the shorter side that evaluation images keep, which `preprocess`
        reads from the model. If None, as stored with `weights`, else size / (size + 32).
      bn_momentum: decay of the batch-norm moving averages.
      num_shards_per_group: number of replicas that share batch statistics during training; see
        `layers.replicas_per_group`.
      include_top: whether to include dropout and the classifier; if False, num_classes is ignored.
      weights: file or checkpoint to load, see `load_weights`; None for random initial values.

    Returns:
      A model: float or uint8 [N, image_size, image_size, 3] in 0..255 → float32 [N, num_classes],
      or [N, channels] without the top.

    Raises:
      ValueError: If the variant is unknown or a value is out of range.
      WeightsError, FileNotFoundError: If the weights do not fit or do not exist.
    """
    spec = get_variant(variant)
    size = spec.resolution if image_size is None else image_size
    dropout_rate = spec.dropout_rate if dropout_rate is None else dropout_rate
    _check(num_classes, size, survival_prob, dropout_rate)
    width = width_coefficient or spec.width
    images = _expected_images(
        spec, weights, small_image=small_image, mean=mean, std=std, crop_fraction=crop_fraction
    )
    blocks = block_table(
        spec.stages,
        width,
        depth_coefficient or spec.depth,
        images["small_image"],
        scale_stem=spec.scale_stem_and_head,
        deepen_ends=spec.deepen_ends,
    )
    _allow_depth(len(blocks))
    batch_norm = functools.partial(
        layers.BatchNorm, momentum=bn_momentum, num_shards_per_group=num_shards_per_group
    )
    parts = _Parts(batch_norm, spec.activation, spec.squeeze_excite)
    inputs = tf.keras.Input((size, size, 3), name="image")
    x = layers.PixelNormalization(**images, variant=variant, name="normalization")(inputs)
    x = _features(x, spec, width, blocks, survival_prob, parts)
    x = _classifier(x, num_classes, dropout_rate) if include_top else _float32(x, "pooled")
    model = tf.keras.Model(inputs, x, name=variant)
    if weights is not None:
        load_weights(model, weights)
    return model


def load_model(path: str | os.PathLike) -> tf.keras.Model:
    """Loads a model with layers of this package that Keras saved: `.keras`, `.h5` or SavedModel.

    `tf.keras.models.load_model` does the same if this module is imported and the model is not as
    deep as L2.
    """
    _allow_depth(_DEEPEST)
    return tf.keras.models.load_model(os.path.expanduser(path))


def num_blocks(model: tf.keras.Model) -> int:
    """Returns the number of MBConv blocks of a model made by `build_model`."""
    return sum(layer.name.endswith("_dw_conv") for layer in model.layers)


def freeze(model: tf.keras.Model, blocks: int) -> None:
    """Freezes the stem and the first `blocks` MBConv blocks of a model made by `build_model`.

    Frozen layers get no updates, normalize with their moving statistics, which do not change, and
    drop no residual branches, like `fix_layer_num` in the original code.

    Raises:
      ValueError: If the model has fewer blocks.
    """
    if not 0 <= blocks <= num_blocks(model):
        raise ValueError(f"{blocks} blocks cannot be frozen: {model.name} has {num_blocks(model)}")
    frozen = ("stem_", *(f"blocks_{index}_" for index in range(blocks)))
    for layer in model.layers:
        if layer.name.startswith(frozen):
            layer.trainable = False


def keep_statistics(model: tf.keras.Model) -> None:
    """Makes batch norm use its moving statistics also in training; scale and offset still learn.

    Use it to fine-tune on few images, whose own statistics are unreliable (arXiv 1912.11370 avoids
    batch norm for that reason).
    """
    for layer in model.layers:
        if isinstance(layer, layers.BatchNorm):
            layer.keep_statistics = True


def endpoints(model: tf.keras.Model) -> dict[str, tf.Tensor]:
    """Returns the symbolic intermediate outputs of a model made by `build_model`.

    Returns:
      `stem`; `reduction_1` … (the last map before each halving of the resolution; five for
      224-pixel models); `features` (after the head convolution); `pooled` [N, channels]; `logits`
      unless the model was built without the top.
    """
    names = {layer.name for layer in model.layers}
    outputs = {"stem": model.get_layer(_activation_name(names, "stem")).output}
    blocks = num_blocks(model)
    level = 0
    for index in range(blocks):
        last = index == blocks - 1
        if last or model.get_layer(f"blocks_{index + 1}_dw_conv").strides[0] > 1:
            level += 1
            added = f"blocks_{index}_add"
            name = added if added in names else f"blocks_{index}_project_bn"
            outputs[f"reduction_{level}"] = model.get_layer(name).output
    outputs["features"] = model.get_layer(_activation_name(names, "head")).output
    outputs["pooled"] = model.get_layer("head_pool").output
    if "logits" in names:
        outputs["logits"] = model.output
    return outputs


def _activation_name(names: Container[str], part: str) -> str:
    return next(name for kind in layers.ACTIVATIONS if (name := f"{part}_{kind}") in names)
