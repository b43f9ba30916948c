"""What files of other programs call the variables of an EfficientNet, and how they are read.

Three ways to name them: the original's TF1 checkpoints, Keras `.h5` files (`tf.keras.applications`
and the `efficientnet` package), and timm's `tf_efficientnet_*` in `.safetensors` or `.pth`.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
from collections.abc import Mapping

import h5py
import numpy as np
import tensorflow as tf

# A variable of our model: the name of its layer, and its own inside the layer.
Key = tuple[str, str]

HEAD: tuple[Key, ...] = (("head_dense", "kernel"), ("head_dense", "bias"))


@dataclasses.dataclass(frozen=True)
class Naming:
    """The names in one kind of file.

    Attributes:
      ends: our layer outside the blocks → theirs.
      block: our layer inside a block, without `blocks_<i>_` → theirs.
      block_without_expansion: what differs in a block that has no expansion.
      scope: what stands before a layer of a block; a format of `index` (of the block in the
        network), `stage` and `repeat` (of the block in its stage), all from 0, and of `number`,
        the stage from 1, and `letter`, the repeat from a.
      separator: between layer and variable.
      leaves: our variable inside a layer → theirs, where they differ.
      ignored: pattern of whole names that such files hold beside the model's.
      axes: (our variable, its rank) → the axes of theirs in our order, where they differ.
    """

    ends: Mapping[str, str]
    block: Mapping[str, str]
    block_without_expansion: Mapping[str, str]
    scope: str
    separator: str
    ignored: str
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
    # TF1 numbers the layers of one class inside a block, in order of creation.
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
    separator="/",
    ignored=r"global_step|.*/(RMSProp|Momentum)(_\d+)?",
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
    block_without_expansion={},
    scope="block{number}{letter}_",
    separator="/",
    # Statistics of the input, which our model has as constants.
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

# The `efficientnet` package calls its head otherwise.
_KERAS_ALIASES = {"probs": "predictions"}


def layer_variables(model: tf.keras.Model) -> dict[Key, tf.Variable]:
    """(layer, variable inside it) → variable, for every weight of a model."""
    return {
        (layer.name, weight.name.split("/")[-1].split(":")[0]): weight
        for layer in model.layers
        for weight in layer.weights
    }


def stored_names(model: tf.keras.Model, naming: Naming) -> dict[Key, str]:
    """The name in a file for every weight of a model made by `build_model`.

    The classifier's (`HEAD`) are among them even when the model has none.

    Raises:
      ValueError: the model has a layer that EfficientNets do not have.
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
    """(stage, repeat in it, whether it expands) of each block.

    Inside a stage nothing but the first block's stride and input width differs, while any two
    neighbouring stages differ in kernel, expansion or a stride.
    """
    layers = {layer.name: layer for layer in model.layers}
    positions: list[tuple[int, int, bool]] = []
    last_kind, stage, repeat = None, -1, 0
    for index in itertools.count():
        depthwise = layers.get(f"blocks_{index}_dw_conv")
        if depthwise is None:
            return positions
        expanded = f"blocks_{index}_expand_conv" in layers
        kind = (depthwise.kernel_size, expanded)
        if kind != last_kind or depthwise.strides != (1, 1):
            stage, repeat = stage + 1, 0
        positions.append((stage, repeat, expanded))
        last_kind, repeat = kind, repeat + 1


def axes(naming: Naming, leaf: str, rank: int) -> tuple[int, ...]:
    """The axes of a stored array in the order of ours: `ours = stored.transpose(axes)`."""
    return naming.axes.get((leaf, rank), tuple(range(rank)))


def inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    """`stored = ours.transpose(inverse(axes))`."""
    return tuple(int(axis) for axis in np.argsort(order))


def timm_tensors(model: tf.keras.Model) -> dict[str, np.ndarray]:
    """The model's weights under timm's names and in its layout; with its counters of batches."""
    names, tensors = stored_names(model, TIMM), {}
    for (layer, leaf), variable in layer_variables(model).items():
        order = inverse(axes(TIMM, leaf, variable.shape.rank))
        name = names[layer, leaf]
        tensors[name] = np.ascontiguousarray(variable.numpy().transpose(order))
        if leaf == "moving_mean":
            tensors[name.rpartition(".")[0] + ".num_batches_tracked"] = np.array(0, np.int64)
    return tensors


# --------------------------------------------------------------------------------------------------
# Readers: a file's bytes → its arrays by name. What they raise on damaged files is the libraries'.


def read_h5(content: bytes, ema: bool) -> dict[str, np.ndarray]:
    """Weights or a whole model saved by Keras as legacy `.h5`: `<layer>/<variable>` → array.

    Args:
      ema: has no meaning here; such a file has one set of weights.

    Raises:
      ValueError: the file is of the newer kind, or its layers are inside another model.
    """
    arrays: dict[str, np.ndarray] = {}

    def take(path: str, item) -> None:
        if not isinstance(item, h5py.Dataset):
            return
        # `stem_conv/stem_conv_1/kernel:0`: the layer comes first, the middle is what TensorFlow
        # made of it.
        parts = path.split("/")
        layer, leaf = _KERAS_ALIASES.get(parts[0], parts[0]), parts[-1].split(":")[0]
        if f"{layer}/{leaf}" in arrays:
            raise ValueError(
                f"{path}: the layer {layer} has several variables of this name. "
                "Save the weights of the EfficientNet itself, not of a model that has it as a layer."
            )
        arrays[f"{layer}/{leaf}"] = item[()]

    with h5py.File(io.BytesIO(content), "r") as f:
        root = f.get("model_weights", f)
        if {"layers", "_layer_checkpoint_dependencies"} & set(root):
            raise ValueError(
                "it is a .weights.h5 file, which does not name the layers; "
                "save the model again with model.save_weights('<name>.h5') of Keras 2"
            )
        root.visititems(take)
    return arrays


def read_safetensors(content: bytes, ema: bool) -> dict[str, np.ndarray]:
    """A `.safetensors` file; it has one set of weights, whatever `ema` says."""
    from safetensors import numpy as safetensors

    return safetensors.load(content)


def read_pth(content: bytes, ema: bool) -> dict[str, np.ndarray]:
    """A state dict saved by PyTorch, or a checkpoint of timm's training script.

    Args:
      ema: of such a checkpoint take the averages, when it has them.

    Raises:
      ImportError: PyTorch is not installed.
    """
    try:
        import torch
    except ImportError as e:
        raise ImportError(
            "PyTorch is needed to read .pth files: pip install torch. "
            "The .safetensors file of the same model can be read without it"
        ) from e
    # Tensors only: nothing in the file is executed.
    loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    if ema and "state_dict_ema" in loaded:
        loaded = loaded["state_dict_ema"]
    state = loaded.get("state_dict", loaded)
    return {name: tensor.float().numpy() for name, tensor in state.items()}


# By the end of the path; anything else is a TF1 checkpoint.
FILES = {
    ".h5": (KERAS, read_h5),
    ".safetensors": (TIMM, read_safetensors),
    ".pth": (TIMM, read_pth),
}
