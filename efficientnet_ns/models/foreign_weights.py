"""The names of an EfficientNet's variables in files of other programs.

There are five naming schemes: TF1 checkpoints of the original code, Keras files of
`tf.keras.applications` and the `efficientnet` package, Keras files of `build_model`'s models, timm's
`tf_efficientnet_*`, and the `efficientnet_pytorch` package, whose names EfficientNet-Lite files use.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping

import numpy as np
import tensorflow as tf

from efficientnet_ns.models import heads

# A variable of our model: the name of its layer and its name inside the layer.
Key = tuple[str, str]

HEAD: tuple[Key, ...] = (("head_dense", "kernel"), ("head_dense", "bias"))


@dataclasses.dataclass(frozen=True)
class Naming:
    """The naming scheme of one kind of file.

    Attributes:
      ends: our layer outside the blocks → theirs.
      block: our layer inside a block, without `blocks_<i>_` → theirs.
      scope: prefix of the layers of a block; a format string with `index` (of the block in the
        network), `stage` and `repeat` (of the block in its stage), all from 0, `number` (the stage
        from 1) and `letter` (the repeat from a).
      ignored: pattern of complete names in such files that do not belong to the model.
      separator: separates layer and variable.
      block_without_expansion: the entries of `block` that differ in blocks without expansion.
      leaves: our variable inside a layer → theirs, if they differ.
      axes: (our variable, its rank) → the axes of theirs in our order, if they differ.
    """

    ends: Mapping[str, str]
    block: Mapping[str, str]
    scope: str
    ignored: str
    separator: str = "/"
    block_without_expansion: Mapping[str, str] = dataclasses.field(default_factory=dict)
    leaves: Mapping[str, str] = dataclasses.field(default_factory=dict)
    axes: Mapping[tuple[str, int], tuple[int, ...]] = dataclasses.field(default_factory=dict)


TF1 = Naming(
    ends={
        "stem_conv": "stem/conv2d",
        "stem_bn": "stem/tpu_batch_normalization",
        "head_conv": "head/conv2d",
        "head_bn": "head/tpu_batch_normalization",
        "head_dense": "head/dense",
    },
    # TF1 numbers the layers of a class inside a block in order of creation.
    block={
        "expand_conv": "conv2d",
        "expand_bn": "tpu_batch_normalization",
        "dw_conv": "depthwise_conv2d",
        "dw_bn": "tpu_batch_normalization_1",
        "se_reduce": "se/conv2d",
        "se_expand": "se/conv2d_1",
        "project_conv": "conv2d_1",
        "project_bn": "tpu_batch_normalization_2",
    },
    block_without_expansion={
        "dw_bn": "tpu_batch_normalization",
        "project_conv": "conv2d",
        "project_bn": "tpu_batch_normalization_1",
    },
    scope="blocks_{index}/",
    ignored=r"global_step|.*/(RMSProp|Momentum|Adam)(_\d+)?",
)

KERAS = Naming(
    ends={
        "stem_conv": "stem_conv",
        "stem_bn": "stem_bn",
        "head_conv": "top_conv",
        "head_bn": "top_bn",
        "head_dense": "predictions",
    },
    block={
        "expand_conv": "expand_conv",
        "expand_bn": "expand_bn",
        "dw_conv": "dwconv",
        "dw_bn": "bn",
        "se_reduce": "se_reduce",
        "se_expand": "se_expand",
        "project_conv": "project_conv",
        "project_bn": "project_bn",
    },
    scope="block{number}{letter}_",
    # Input statistics, which are constants in our model.
    ignored=r"normalization(_\d+)?/(mean|variance|count)",
)

TIMM = Naming(
    ends={
        "stem_conv": "conv_stem",
        "stem_bn": "bn1",
        "head_conv": "conv_head",
        "head_bn": "bn2",
        "head_dense": "classifier",
    },
    block={
        "expand_conv": "conv_pw",
        "expand_bn": "bn1",
        "dw_conv": "conv_dw",
        "dw_bn": "bn2",
        "se_reduce": "se.conv_reduce",
        "se_expand": "se.conv_expand",
        "project_conv": "conv_pwl",
        "project_bn": "bn3",
    },
    block_without_expansion={"dw_bn": "bn1", "project_conv": "conv_pw", "project_bn": "bn2"},
    scope="blocks.{stage}.{repeat}.",
    separator=".",
    leaves={
        "kernel": "weight",
        "depthwise_kernel": "weight",
        "gamma": "weight",
        "beta": "bias",
        "moving_mean": "running_mean",
        "moving_variance": "running_var",
    },
    ignored=r".*\.num_batches_tracked",
    axes={
        ("kernel", 4): (2, 3, 1, 0),  # OIHW → HWIO
        ("depthwise_kernel", 4): (2, 3, 0, 1),  # C1HW → HWC1
        ("kernel", 2): (1, 0),
    },
)

# Layouts and variable names inside layers are PyTorch's, as in timm.
EFFICIENTNET_PYTORCH = dataclasses.replace(
    TIMM,
    ends={
        "stem_conv": "_conv_stem",
        "stem_bn": "_bn0",
        "head_conv": "_conv_head",
        "head_bn": "_bn1",
        "head_dense": "_fc",
    },
    block={
        "expand_conv": "_expand_conv",
        "expand_bn": "_bn0",
        "dw_conv": "_depthwise_conv",
        "dw_bn": "_bn1",
        "se_reduce": "_se_reduce",
        "se_expand": "_se_expand",
        "project_conv": "_project_conv",
        "project_bn": "_bn2",
    },
    block_without_expansion={},
    scope="_blocks.{index}.",
)

# Keras files of a model made by `build_model`.
OWN = Naming(
    ends={name: name for name in TF1.ends},
    block={name: name for name in TF1.block},
    scope="blocks_{index}_",
    ignored=r"normalization/.*",
)


def layer_variables(model: tf.keras.Model) -> dict[Key, tf.Variable]:
    """Maps (layer, variable name inside it) to the variable for every weight of a model."""
    return {
        (layer.name, weight.name.split("/")[-1].split(":")[0]): weight
        for layer in heads.flat_layers(model)
        for weight in layer.weights
    }


def stored_names(model: tf.keras.Model, naming: Naming) -> dict[Key, str]:
    """Returns the name in a file for every weight of a model made by `build_model`.

    Names of the classifier (`HEAD`) are included even if the model has none.

    Raises:
      ValueError: If the model has a layer that no EfficientNet has.
    """
    scopes = _block_scopes(model, naming)
    names = {}
    for layer, leaf in itertools.chain(layer_variables(model), HEAD):
        theirs = naming.ends.get(layer) or scopes.get(layer)
        if theirs is None:
            raise ValueError(f"{model.name} was not made by build_model: it has a layer {layer}")
        names[layer, leaf] = theirs + naming.separator + naming.leaves.get(leaf, leaf)
    return names


def _block_scopes(model: tf.keras.Model, naming: Naming) -> dict[str, str]:
    scopes = {}
    for index, (stage, repeat, expanded) in enumerate(_block_positions(model)):
        scope = naming.scope.format(
            index=index, stage=stage, repeat=repeat, number=stage + 1, letter=chr(ord("a") + repeat)
        )
        layers = naming.block if expanded else {**naming.block, **naming.block_without_expansion}
        for ours, theirs in layers.items():
            scopes[f"blocks_{index}_{ours}"] = scope + theirs
    return scopes


def _block_positions(model: tf.keras.Model) -> list[tuple[int, int, bool]]:
    """Returns (stage, repeat in the stage, whether the block expands) of each block.

    Within a stage, only the first block's stride and input width differ, while consecutive stages
    differ in kernel, expansion or stride.
    """
    layers = {layer.name: layer for layer in heads.flat_layers(model)}
    positions: list[tuple[int, int, bool]] = []
    last_kind, stage, repeat, index = None, -1, 0, 0
    while (depthwise := layers.get(f"blocks_{index}_dw_conv")) is not None:
        expanded = f"blocks_{index}_expand_conv" in layers
        kind = (depthwise.kernel_size, expanded)
        if kind != last_kind or depthwise.strides != (1, 1):
            stage, repeat = stage + 1, 0
        positions.append((stage, repeat, expanded))
        last_kind, repeat, index = kind, repeat + 1, index + 1
    return positions


def axes(naming: Naming, leaf: str, rank: int) -> tuple[int, ...]:
    """Returns the axes of a stored array in our order: `ours = stored.transpose(axes)`."""
    return naming.axes.get((leaf, rank), tuple(range(rank)))


def inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    """Inverts `axes`: `stored = ours.transpose(inverse(axes))`."""
    return tuple(int(axis) for axis in np.argsort(order))


def timm_tensors(model: tf.keras.Model) -> dict[str, np.ndarray]:
    """Returns the model's weights, float32, with timm's names, layout and batch counters."""
    names, tensors = stored_names(model, TIMM), {}
    for (layer, leaf), variable in layer_variables(model).items():
        order = inverse(axes(TIMM, leaf, variable.shape.rank))
        name = names[layer, leaf]
        tensors[name] = np.ascontiguousarray(variable.numpy().transpose(order), np.float32)
        if leaf == "moving_mean":
            tensors[name.rpartition(".")[0] + ".num_batches_tracked"] = np.array(0, np.int64)
    return tensors
