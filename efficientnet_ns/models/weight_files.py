"""Reads weight files of other programs; their kind is detected by their content.

File names do not matter: `.pth.tar`, `.pt` and `.bin` are usually PyTorch files, `.h5`, `.hdf5` and
`.keras` Keras files, but any of them may be something else, which the error message then names.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import h5py
import numpy as np
import tensorflow as tf

from efficientnet_ns.models import foreign_weights, heads, torch_files
from efficientnet_ns.models.stored_arrays import UnusableFile

Arrays = dict[str, np.ndarray]


class Content(NamedTuple):
    """The content of a weight file.

    Attributes:
      naming: the naming scheme of its variables.
      arrays: name in this scheme → array.
      settings: the images that its model expects, see `heads.settings`; empty if not stored.
    """

    naming: foreign_weights.Naming
    arrays: Arrays
    settings: Mapping[str, Any]


# Usual endings of such files; checkpoints saved here never get one of them by mistake.
SUFFIXES = (".h5", ".hdf5", ".keras", ".safetensors", ".pth", ".pt", ".bin", ".tar")

_HDF5, _ZIP = b"\x89HDF\r\n\x1a\n", b"PK\x03\x04"
# (First bytes, what the file is and what to do).
_OTHERS = (
    (b"\x1f\x8b", "a gzip archive: unpack it (tar -xzf or gunzip) and pass its content"),
    (b"BZh", "a bzip2 archive: unpack it (tar -xjf) and pass its content"),
    (b"\xfd7zXZ", "an xz archive: unpack it (tar -xJf) and pass its content"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file: fetch it with git lfs pull"),
    (b"<", "a web page or XML, not the file: download it again and check its content"),
    (b"model_checkpoint_path", "a list of checkpoints: pass its folder or a checkpoint in it"),
    (b"\x93NUMPY", "one NumPy array: weights of a whole model are required"),
    (b"\x80", "a Python pickle, which can run code when it is read: save the state dict"),
)


def read(content: bytes, model: tf.keras.Model, *, ema: bool = True) -> Content:
    """Reads the arrays in a file.

    Args:
      content: content of the file.
      model: the target; Keras files that do not name layers are read in its order.
      ema: whether to take the moving averages from files that contain both sets.

    Raises:
      UnusableFile: If the file is of another kind; the message names it and what to do.
      Exception: If the file is damaged; raised by the library that reads it.
    """
    if not content.strip(b"\0"):
        raise EOFError("it is empty: copy or download it again")
    if content.startswith(_HDF5):
        return _read_hdf5(content, model)
    if content.startswith(_ZIP):
        names = _zip_names(content)
        if "model.weights.h5" in names:
            return _read_keras(content)
        if torch_files.is_new(names):
            return _read_torch(content, ema)
        raise UnusableFile("it is a zip archive without weights: unpack it and pass its content")
    if torch_files.is_old(content):
        return _read_torch(content, ema)
    if content[8:9] == b"{":
        return _read_safetensors(content)
    raise UnusableFile(f"it is {_described(content)}")


def settings(content: bytes) -> Mapping[str, Any]:
    """Returns the `heads.settings` stored in a file; empty if there are none."""
    if content.startswith(_HDF5):
        with h5py.File(io.BytesIO(content), "r") as f:
            return _hdf5_settings(f)
    if content.startswith(_ZIP):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if "config.json" in archive.namelist():
                return _settings(json.loads(archive.read("config.json")))
    return _safetensors_settings(content) if content[8:9] == b"{" else {}


def _zip_names(content: bytes) -> list[str]:
    try:
        return zipfile.ZipFile(io.BytesIO(content)).namelist()
    except zipfile.BadZipFile as error:
        raise ValueError(
            f"it is an incomplete or damaged zip archive ({error}): copy or download it again"
        ) from error


def _described(content: bytes) -> str:
    if content[257:262] == b"ustar":
        return "a tar archive: unpack it (tar -xf) and pass its content"
    if content[4:8] == b"TFL3":
        return "a TFLite file, which is an export: pass the weights it was made from"
    for magic, words in _OTHERS:
        if content.startswith(magic):
            return words
    return (
        f"of no known kind (it begins with {content[:8]!r}) or damaged. Weights are TensorFlow "
        "checkpoints, .h5, .keras, .safetensors and .pth files; ONNX files are for other programs"
    )


# Keras.

# Variables of a layer in the order in which the Keras 3 format numbers them.
_LEAVES = {
    "Conv2D": ("kernel", "bias"),
    "Dense": ("kernel", "bias"),
    "DepthwiseConv2D": ("depthwise_kernel", "bias"),
    "BatchNorm": ("gamma", "beta", "moving_mean", "moving_variance"),
    "BatchNormalization": ("gamma", "beta", "moving_mean", "moving_variance"),
    "Normalization": ("mean", "variance", "count"),
}
# Class, name and inner layers of a layer.
_Layer = tuple[str, str, list]


def _read_hdf5(content: bytes, model: tf.keras.Model) -> Content:
    with h5py.File(io.BytesIO(content), "r") as f:
        if {"layers", "_layer_checkpoint_dependencies"} & set(f):
            return _keras_content(_numbered(f, _layers_of(model)), {})
        return _keras_content(_by_layer(f.get("model_weights", f)), _hdf5_settings(f))


def _hdf5_settings(f: h5py.File) -> dict[str, Any]:
    described = f.attrs.get("model_config")
    return {} if described is None else _settings(json.loads(described))


def _read_keras(content: bytes) -> Content:
    """Reads a `.keras` file, whose description names the layers."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        description = json.loads(archive.read("config.json"))
        with h5py.File(io.BytesIO(archive.read("model.weights.h5")), "r") as f:
            arrays = _numbered(f, _described_layers(description))
    return _keras_content(arrays, _settings(description))


def _keras_content(arrays: Arrays, described: Mapping[str, Any]) -> Content:
    layers = {name.split("/")[0] for name in arrays}
    if not any(re.match(r"blocks_\d+_", layer) for layer in layers):
        # The `efficientnet` package calls its head `probs`.
        return Content(foreign_weights.KERAS, _renamed(arrays, "probs", "predictions"), described)
    # The user may have named the classifier.
    added = [layer for layer in layers if not heads.is_standard(layer)]
    if len(added) == 1 and "head_dense" not in layers:
        arrays = _renamed(arrays, added[0], "head_dense")
    return Content(foreign_weights.OWN, arrays, described)


def _renamed(arrays: Arrays, layer: str, new: str) -> Arrays:
    return {re.sub(rf"^{re.escape(layer)}/", f"{new}/", n): array for n, array in arrays.items()}


def _by_layer(root: h5py.Group) -> Arrays:
    """Reads `<layer>/<variable>` → array from a file that names its layers (`.h5`).

    Raises:
      UnusableFile: If two layers have the same name.
    """
    arrays: Arrays = {}

    def take(path: str, item: Any) -> None:
        if not isinstance(item, h5py.Dataset) or path.split("/")[0] == "optimizer_weights":
            return
        # `stem_conv/stem_conv_1/kernel:0`: the layer, then TensorFlow's unique name for it. In a
        # nested model: `efficientnet-b0/stem_conv_1/kernel:0`.
        parts = path.split("/")
        leaf = parts[-1].split(":")[0]
        layer = re.sub(r"_\d+$", "", parts[-2]) if parts[0] in inner else parts[0]
        if f"{layer}/{leaf}" in arrays:
            raise UnusableFile(f"{path}: there are two layers {layer}; save a single model")
        arrays[f"{layer}/{leaf}"] = item[()]

    inner = {
        name for name, group in root.items() if isinstance(group, h5py.Group) and len(group) > 1
    }
    inner -= {
        name for name in inner if any(isinstance(v, h5py.Dataset) for v in root[name].values())
    }
    root.visititems(take)
    return arrays


def _numbered(root: h5py.Group, layers: list[_Layer]) -> Arrays:
    """Reads `<layer>/<variable>` → array from a file that numbers layers by class (`.weights.h5`)."""
    arrays: Arrays = {}
    group = root.get("layers", root.get("_layer_checkpoint_dependencies"))
    counts: dict[str, int] = {}
    unknown = set(group)
    for kind, name, inner in layers:
        numbered = re.sub(r"(?<!^)(?=[A-Z][a-z])|(?<=[a-z])(?=[A-Z])", "_", kind).lower()
        number = counts[numbered] = counts.get(numbered, -1) + 1
        numbered += f"_{number}" if number else ""
        key = numbered if numbered in group else name
        if key not in group:
            continue
        found = group[key]
        unknown.discard(key)
        if inner:
            arrays.update(_numbered(found, inner))
            continue
        for index, leaf in enumerate(_LEAVES.get(kind, ())):
            if f"vars/{index}" in found:
                arrays[f"{name}/{leaf}"] = found[f"vars/{index}"][()]
    if unknown:
        raise UnusableFile(
            "it does not name its layers, and they are not those of this model; save the model again "
            "with model.save('<name>.keras') or model.save_weights('<name>.h5')"
        )
    return arrays


def _layers_of(model: tf.keras.Model) -> list[_Layer]:
    def inner(layer: tf.keras.layers.Layer) -> list[_Layer]:
        return _layers_of(layer) if isinstance(layer, tf.keras.Model) else []

    return [(type(layer).__name__, layer.name, inner(layer)) for layer in model.layers]


def _described_layers(description: Mapping[str, Any]) -> list[_Layer]:
    return [
        (layer["class_name"], layer["config"]["name"], _described_layers(layer))
        for layer in description["config"].get("layers", ())
    ]


def _settings(description: Mapping[str, Any]) -> dict[str, Any]:
    """Reads `heads.settings` from Keras' description of a model; empty for other packages."""
    for layer in description["config"].get("layers", ()):
        config = layer["config"]
        if layer["class_name"].endswith("PixelNormalization"):
            names = ("variant", "small_image", "mean", "std", "crop_fraction")
            return {name: config[name] for name in names if name in config}
        if "layers" in config and (found := _settings(layer)):
            return found
    return {}


# timm and PyTorch.

# NumPy has no bfloat16; TensorFlow provides it.
_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": tf.bfloat16.as_numpy_dtype,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
SETTINGS_KEY = "efficientnet_ns"


def _read_safetensors(content: bytes) -> Content:
    import safetensors

    arrays = {}
    for name, tensor in safetensors.deserialize(content):
        if tensor["dtype"] not in _DTYPES:
            raise UnusableFile(f"{name} is {tensor['dtype']}; convert the file to float32")
        flat = np.frombuffer(tensor["data"], _DTYPES[tensor["dtype"]])
        arrays[name] = flat.reshape(tensor["shape"])
    return Content(_torch_naming(arrays), arrays, _safetensors_settings(content))


def _safetensors_settings(content: bytes) -> dict[str, Any]:
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return json.loads(header.get("__metadata__", {}).get(SETTINGS_KEY, "{}"))


# Keys of the weights in checkpoints of training scripts, by `ema`.
_STATES = {True: ("state_dict_ema", "model_ema"), False: ("state_dict", "model")}
# Prefixes that DistributedDataParallel and torch.compile add to every name.
_WRAPPED = re.compile(r"^(module\.|_orig_mod\.)+")


def _read_torch(content: bytes, ema: bool) -> Content:
    """Reads a state dict saved by PyTorch or a training script's checkpoint that contains one."""
    try:
        state = torch_files.read(content)
    except torch_files.Refused as error:
        raise UnusableFile(str(error)) from error
    if not isinstance(state, Mapping):
        raise UnusableFile(
            f"it contains a {type(state).__name__}: save the state dict of the model"
        )
    for key in (*(_STATES[True] if ema else ()), *_STATES[False]):
        if isinstance(state.get(key), Mapping):
            state = state[key]
            break
    arrays = {
        _WRAPPED.sub("", str(name)): value.array()
        for name, value in state.items()
        if isinstance(value, torch_files.Tensor)
    }
    if not arrays:
        raise UnusableFile(
            f"it contains no tensors, but {', '.join(map(str, state)) or 'nothing'}: save the state dict "
            "of the model"
        )
    return Content(_torch_naming(arrays), arrays, {})


def _torch_naming(names: Iterable[str]) -> foreign_weights.Naming:
    is_pytorch = any(name.startswith("_blocks.") for name in names)
    return foreign_weights.EFFICIENTNET_PYTORCH if is_pytorch else foreign_weights.TIMM
