"""Weights of other programs: names, layouts, logits, refusals, and writing."""

from __future__ import annotations

import argparse
import functools
import gzip
import json
import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import h5py
import numpy as np
import pytest
import safetensors.numpy
import tensorflow as tf
import torch_saver

from efficientnet_ns.models import (
    complexity,
    efficientnet,
    foreign_weights,
    heads,
    stored_arrays,
    weight_files,
    weights,
)

PUBLISHED = [f"efficientnet-b{i}" for i in range(8)] + ["efficientnet-l2"]
SCALED = [pytest.param(name, marks=pytest.mark.slow) for name in PUBLISHED[1:]]
IMAGENET = {"mean": efficientnet.IMAGENET_MEAN, "std": efficientnet.IMAGENET_STD}
# Without weights, a Keras model's Normalization layer has no statistics and only divides by 255.
UNNORMALISED = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
SIZE = 72  # Halved: 36, 18, 9, 5, 3. Both kinds of padding occur.


def tiny(num_classes: int = 10, **kwargs) -> tf.keras.Model:
    return efficientnet.build_model("efficientnet-test", num_classes, 16, **kwargs)


def snapshot(model: tf.keras.Model) -> dict[str, np.ndarray]:
    return {name: variable.numpy() for name, variable in weights.variable_names(model).items()}


def assert_same(values: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    assert set(values) == set(expected)
    for name, value in values.items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


def randomize(model: tf.keras.Model, rng: np.random.Generator) -> None:
    """Gives every vector distinct values so that mix-ups are detected."""
    for variable in model.weights:
        shape = variable.shape
        if "gamma" in variable.name or "variance" in variable.name:
            variable.assign(rng.uniform(0.5, 1.5, shape))
        elif any(leaf in variable.name for leaf in ("mean", "beta", "bias")):
            variable.assign(rng.normal(0.0, 0.1, shape))


def coarse_images(rng: np.random.Generator) -> np.ndarray:
    """Returns four uint8 images of large squares; of fine noise, a network sees mainly the mean."""
    squares = rng.integers(0, 256, (4, SIZE // 8, SIZE // 8, 3), dtype=np.uint8)
    return squares.repeat(8, axis=1).repeat(8, axis=2)


def calibrate_keras(model: tf.keras.Model, images: np.ndarray) -> None:
    """Sets the batch-norm statistics from the images.

    Arbitrary statistics make a deep network's signal, and its rounding errors, vanish or explode.
    """
    for layer in model.layers:
        if isinstance(layer, tf.keras.layers.BatchNormalization):
            layer.momentum = 0.0
        if isinstance(layer, tf.keras.layers.Dropout):
            layer.rate = 0.0
    model(images.astype(np.float32), training=True)


def calibrated_timm(name: str, torch, timm, inputs: np.ndarray):
    """Returns a timm model with random weights and the batch-norm statistics of the inputs."""
    torch.manual_seed(0)
    model = timm.create_model(name.replace("efficientnet-", "tf_efficientnet_"))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0.0, 0.1)
            module.momentum = 1.0
    model.train()(torch.tensor(inputs))
    return model.eval()


def relative_difference(values: np.ndarray, expected: np.ndarray) -> float:
    # Equal logits for all images would prove nothing.
    assert np.std(expected, axis=0).mean() > 1e-2 * np.abs(expected).max()
    return float(np.abs(values - expected).max() / np.abs(expected).max())


@pytest.fixture(scope="module")
def timm_shapes(goldens) -> dict[str, dict[str, list[int]]]:
    """Shapes of timm's variables by model and name."""
    return json.loads(gzip.decompress((goldens / "weights" / "timm.json.gz").read_bytes()))


@pytest.fixture(scope="module")
def b0() -> tf.keras.Model:
    return efficientnet.build_model("efficientnet-b0", image_size=SIZE, **UNNORMALISED)


@pytest.fixture(scope="module")
def model() -> tf.keras.Model:
    """The model that refuses weights; no test changes it."""
    return tiny()


@pytest.fixture(scope="module")
def source() -> tf.keras.Model:
    """The model whose values are in the files."""
    model = tiny()
    randomize(model, np.random.default_rng(1))
    return model


@pytest.fixture(scope="module")
def _target() -> tf.keras.Model:
    return tiny()


@pytest.fixture
def target(_target) -> tf.keras.Model:
    """The model to load into; NaN values ensure that every value comes from the file."""
    _target.set_weights([np.full_like(value, np.nan) for value in _target.get_weights()])
    return _target


# --------------------------------------------------------------------------------------------------
# Files of the tiny model, written without the code under test

# Our variable → its name in Keras, timm and efficientnet_pytorch. Two blocks represent the rest.
BLOCKS = {
    "stem/conv2d/kernel": ("stem_conv/kernel", "conv_stem.weight", "_conv_stem.weight"),
    "stem/tpu_batch_normalization/gamma": ("stem_bn/gamma", "bn1.weight", "_bn0.weight"),
    "blocks_0/depthwise_conv2d/depthwise_kernel": (
        "block1a_dwconv/depthwise_kernel",
        "blocks.0.0.conv_dw.weight",
        "_blocks.0._depthwise_conv.weight",
    ),
    "blocks_0/tpu_batch_normalization/beta": (
        "block1a_bn/beta",
        "blocks.0.0.bn1.bias",
        "_blocks.0._bn1.bias",
    ),
    "blocks_0/conv2d/kernel": (
        "block1a_project_conv/kernel",
        "blocks.0.0.conv_pw.weight",
        "_blocks.0._project_conv.weight",
    ),
    "blocks_0/tpu_batch_normalization_1/moving_mean": (
        "block1a_project_bn/moving_mean",
        "blocks.0.0.bn2.running_mean",
        "_blocks.0._bn2.running_mean",
    ),
    "blocks_1/conv2d/kernel": (
        "block2a_expand_conv/kernel",
        "blocks.1.0.conv_pw.weight",
        "_blocks.1._expand_conv.weight",
    ),
    "blocks_2/conv2d/kernel": (
        "block2b_expand_conv/kernel",
        "blocks.1.1.conv_pw.weight",
        "_blocks.2._expand_conv.weight",
    ),
    "blocks_2/tpu_batch_normalization/gamma": (
        "block2b_expand_bn/gamma",
        "blocks.1.1.bn1.weight",
        "_blocks.2._bn0.weight",
    ),
    "blocks_2/tpu_batch_normalization_1/gamma": (
        "block2b_bn/gamma",
        "blocks.1.1.bn2.weight",
        "_blocks.2._bn1.weight",
    ),
    "blocks_2/se/conv2d/bias": (
        "block2b_se_reduce/bias",
        "blocks.1.1.se.conv_reduce.bias",
        "_blocks.2._se_reduce.bias",
    ),
    "blocks_2/se/conv2d_1/kernel": (
        "block2b_se_expand/kernel",
        "blocks.1.1.se.conv_expand.weight",
        "_blocks.2._se_expand.weight",
    ),
    "blocks_2/conv2d_1/kernel": (
        "block2b_project_conv/kernel",
        "blocks.1.1.conv_pwl.weight",
        "_blocks.2._project_conv.weight",
    ),
    "blocks_2/tpu_batch_normalization_2/moving_variance": (
        "block2b_project_bn/moving_variance",
        "blocks.1.1.bn3.running_var",
        "_blocks.2._bn2.running_var",
    ),
    "head/conv2d/kernel": ("top_conv/kernel", "conv_head.weight", "_conv_head.weight"),
    "head/tpu_batch_normalization/beta": ("top_bn/beta", "bn2.bias", "_bn1.bias"),
    "head/dense/kernel": ("predictions/kernel", "classifier.weight", "_fc.weight"),
    "head/dense/bias": ("predictions/bias", "classifier.bias", "_fc.bias"),
}


def test_names_of_the_tiny_model(model):
    namings = (foreign_weights.KERAS, foreign_weights.TIMM, foreign_weights.EFFICIENTNET_PYTORCH)
    ours = foreign_weights.stored_names(model, foreign_weights.TF1)
    theirs = [foreign_weights.stored_names(model, naming) for naming in namings]
    found = {ours[key]: tuple(names[key] for names in theirs) for key in ours}
    assert {name: found[name] for name in BLOCKS} == BLOCKS
    for names in (ours, *theirs):
        assert len(set(names.values())) == len(model.weights)


def arrays(model: tf.keras.Model, naming: foreign_weights.Naming) -> dict[str, np.ndarray]:
    """Returns the model's values by a file's names; PyTorch values have PyTorch's axis order."""
    names, result = foreign_weights.stored_names(model, naming), {}
    for key, variable in foreign_weights.layer_variables(model).items():
        value = variable.numpy()
        if naming.axes and value.ndim == 4:
            subscripts = "hwcm->cmhw" if key[1] == "depthwise_kernel" else "hwio->oihw"
            value = np.einsum(subscripts, value)
        elif naming.axes and value.ndim == 2:
            value = value.T
        result[names[key]] = value
    return result


def write_h5(
    path: Path, values: Mapping[str, np.ndarray], root: str = "", suffix: str = ""
) -> None:
    """Writes a file as Keras does: a group per layer with TensorFlow's variable names inside."""
    with h5py.File(path, "w") as f:
        for name, value in values.items():
            layer, leaf = name.split("/")
            f[f"{root}{layer}/{layer}{suffix}/{leaf}:0"] = value


def write_safetensors(path: Path, values: Mapping[str, np.ndarray]) -> None:
    content = {name: np.ascontiguousarray(value) for name, value in values.items()}
    safetensors.numpy.save_file(content, path)


def write_pth(path: Path, values: Mapping[str, np.ndarray]) -> None:
    torch_saver.save(path, torch_saver.state_dict(dict(values)), "old")


WRITERS: dict[str, tuple[foreign_weights.Naming, Callable]] = {
    "h5": (foreign_weights.KERAS, write_h5),
    "pth": (foreign_weights.EFFICIENTNET_PYTORCH, write_pth),
    "safetensors": (foreign_weights.TIMM, write_safetensors),
}


@pytest.fixture(params=sorted(WRITERS))
def foreign(request, tmp_path, source) -> tuple[Path, dict[str, np.ndarray], Callable]:
    """A path, the values of `source`, and a function that writes them there."""
    naming, write = WRITERS[request.param]
    path = tmp_path / f"source.{request.param}"
    return path, arrays(source, naming), functools.partial(write, path)


def test_values_arrive(foreign, target):
    path, values, write = foreign
    write(values)
    weights.load_weights(target, str(path))
    naming = WRITERS[path.suffix[1:]][0]
    assert_same(arrays(target, naming), values)


def test_counters_and_input_statistics_are_passed_over(tmp_path, source, target):
    counters = {"blocks.1.0.bn2.num_batches_tracked": np.array(7, np.int64)}
    write_safetensors(
        tmp_path / "a.safetensors", {**arrays(source, foreign_weights.TIMM), **counters}
    )
    statistics = {
        "normalization_3/mean": np.ones(3),
        "normalization_3/variance": np.ones(3),
        "normalization_3/count": np.array(5),
    }
    write_h5(tmp_path / "a.h5", {**arrays(source, foreign_weights.KERAS), **statistics})
    for path in tmp_path.iterdir():
        weights.load_weights(target, str(path))
        assert_same(snapshot(target), snapshot(source))
        target.set_weights([np.zeros_like(value) for value in target.get_weights()])


@pytest.mark.parametrize("root, suffix", [("", "_1"), ("model_weights/", ""), ("", "/nested")])
def test_other_ways_to_write_h5(tmp_path, source, target, root, suffix):
    """Covers the `efficientnet` package's head and numbered names, and a whole model."""
    values = arrays(source, foreign_weights.KERAS)
    values = {name.replace("predictions/", "probs/"): value for name, value in values.items()}
    write_h5(tmp_path / "a.h5", values, root, suffix)
    if root:
        with h5py.File(tmp_path / "a.h5", "a") as f:
            f["optimizer_weights/iteration:0"] = 3
    weights.load_weights(target, str(tmp_path / "a.h5"))
    assert_same(snapshot(target), snapshot(source))


@pytest.mark.parametrize("naming", [foreign_weights.TIMM, foreign_weights.EFFICIENTNET_PYTORCH])
@pytest.mark.parametrize("kind", sorted(torch_saver.WRITERS))
@pytest.mark.parametrize(
    "keys, ema, chosen",
    [
        ((), True, ""),
        (("state_dict",), True, "state_dict"),
        (("model",), False, "model"),
        (("state_dict", "state_dict_ema"), True, "state_dict_ema"),
        (("state_dict", "state_dict_ema"), False, "state_dict"),
        (("model", "model_ema"), True, "model_ema"),
    ],
)
def test_checkpoints_of_pytorch(tmp_path, source, target, naming, kind, keys, ema, chosen):
    """Covers a state dict, and training checkpoints: several states, arguments, wrapped names."""
    states, content = {}, {"epoch": 3, "arch": "b0", "args": argparse.Namespace(lr=0.1)}
    counters = {"bn1.num_batches_tracked": np.array(7, np.int64)}
    for number, key in enumerate(keys or ("",)):
        values = arrays(source, naming)
        states[key] = {name: value + np.float32(number) for name, value in values.items()}
        content[key] = torch_saver.state_dict(
            {**states[key], **counters}, f"module.{'_orig_mod.' * number}"
        )
    path = torch_saver.save(tmp_path / "model_best.pth.tar", content if keys else content[""], kind)
    weights.load_weights(target, path, ema=ema)
    assert_same(arrays(target, naming), states[chosen])


@pytest.mark.parametrize("name", ["a.PT", "pytorch_model.bin", "model_best.pth.tar"])
@pytest.mark.parametrize("new", [True, False])
def test_checkpoint_of_timms_script(tmp_path, source, target, name, new):
    torch = pytest.importorskip("torch")
    state = {n: torch.tensor(v) for n, v in arrays(source, foreign_weights.TIMM).items()}
    script = {"epoch": 3, "arch": "efficientnet", "args": argparse.Namespace(lr=0.1)}
    torch.save({**script, "state_dict": state}, tmp_path / name, _use_new_zipfile_serialization=new)
    weights.load_weights(target, tmp_path / name)
    assert_same(snapshot(target), snapshot(source))


def test_transposed_views_of_pytorch(tmp_path, source, target):
    """Converted files keep TensorFlow's arrays and transpose the view."""
    state = {}
    for number, (name, value) in enumerate(arrays(source, foreign_weights.TIMM).items()):
        stored = np.ascontiguousarray(value.T)
        strides = tuple(step // value.itemsize for step in stored.T.strides)
        storage = torch_saver.Storage(stored.ravel(), str(number))
        state[name] = torch_saver.Tensor(storage, 0, value.shape, strides)
    for kind in torch_saver.WRITERS:
        weights.load_weights(target, torch_saver.save(tmp_path / "a.pth", state, kind))
        assert_same(snapshot(target), snapshot(source))


@pytest.mark.parametrize("name", ["a.SAFETENSORS", "weights", "model.bin"])
def test_content_decides_not_the_name(tmp_path, source, target, name):
    write_safetensors(tmp_path / name, arrays(source, foreign_weights.TIMM))
    weights.load_weights(target, tmp_path / name)
    assert_same(snapshot(target), snapshot(source))
    assert weights.fingerprint(tmp_path / name)


def test_bfloat16_safetensors(tmp_path, source, target):
    bfloat16 = tf.bfloat16.as_numpy_dtype
    values = {n: v.astype(bfloat16) for n, v in arrays(source, foreign_weights.TIMM).items()}
    header, content = {}, b""
    for name, value in values.items():
        offsets = [len(content), len(content) + value.nbytes]
        header[name] = {"dtype": "BF16", "shape": value.shape, "data_offsets": offsets}
        content += value.tobytes()
    head = json.dumps(header).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + content)
    weights.load_weights(target, tmp_path / "a.safetensors")
    expected = {name: value.astype(np.float32) for name, value in values.items()}
    assert_same(arrays(target, foreign_weights.TIMM), expected)


@pytest.mark.parametrize(
    "content, told",
    [
        (gzip.compress(b"tar", mtime=0), "a gzip archive: unpack it"),
        (b"PK\x05\x06" + bytes(18), "of no known kind"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        (b"\x1c\0\0\0TFL3", "a TFLite file"),
        (bytes(257) + b"ustar" + bytes(250), "it is"),
        (b"a.txt" + bytes(252) + b"ustar\x0000" + bytes(247), "a tar archive"),
        (b"\x80\x04\x95", "a Python pickle"),
        (b"some text", "of no known kind"),
    ],
)
@pytest.mark.parametrize("name", ["weights.h5", "weights"])
def test_other_content_is_named(tmp_path, model, untouched, content, told, name):
    (tmp_path / name).write_bytes(content)
    assert told in str(refusal(model, tmp_path / name))


def test_empty_file(tmp_path, model, untouched):
    (tmp_path / "a.pth").touch()
    with pytest.raises(stored_arrays.DamagedFile, match="it is empty"):
        weights.load_weights(model, tmp_path / "a.pth")


def test_zip_archive_without_weights(tmp_path, model, untouched):
    with zipfile.ZipFile(tmp_path / "a.keras", "w") as archive:
        archive.writestr("readme.txt", "")
    assert "a zip archive without weights" in str(refusal(model, tmp_path / "a.keras"))


# --------------------------------------------------------------------------------------------------
# What Keras saves of our own models


def flat(source: tf.keras.Model) -> tf.keras.Model:
    """Builds a classifier on the features, as in the README."""
    pooled = efficientnet.endpoints(source)["pooled"]
    outputs = tf.keras.layers.Dense(5)(tf.keras.layers.Dropout(0.2)(pooled))
    return tf.keras.Model(source.input, outputs)


def nested(source: tf.keras.Model) -> tf.keras.Model:
    features = tiny(include_top=False)
    features.set_weights(source.get_weights()[:-2])
    return tf.keras.Sequential(
        [tf.keras.layers.RandomFlip(), features, tf.keras.layers.Dense(5, name="flowers")]
    )


def cleared(model: tf.keras.Model) -> tf.keras.Model:
    copy = tf.keras.models.clone_model(model)
    copy.build(model.input_shape)
    copy.set_weights([np.full_like(value, np.nan) for value in model.get_weights()])
    return copy


# Every name with the package's model, and one of each kind of file with other models.
def _unless_quick(name: str):
    return [] if name in ("a.weights.h5", "a.keras") else pytest.mark.slow


SAVED_AS = ["a.h5", "a.weights.h5", "a.HDF5", "folder/a", "a.keras", "b.h5"]


@pytest.mark.parametrize(
    "make, name",
    [
        pytest.param(lambda source: source, name, id=f"own-{name}", marks=_unless_quick(name))
        for name in SAVED_AS
    ]
    + [
        pytest.param(make, name, marks=_unless_quick(name) if make is flat else [])
        for make in (flat, nested)
        for name in ("a.h5", "folder/a", "a.keras")
    ],
)
def test_what_keras_saved(tmp_path, source, make, name):
    model = make(source)
    model.build((None, 16, 16, 3))
    path = tmp_path / name
    if name in ("a.keras", "b.h5"):
        model.save(path)
    elif name == "a.HDF5":
        model.save_weights(tmp_path / "a.h5")
        path = (tmp_path / "a.h5").rename(path)
    else:
        model.save_weights(path)
    loaded = cleared(model)
    weights.load_weights(loaded, path)
    for value, expected in zip(loaded.get_weights(), model.get_weights()):
        np.testing.assert_array_equal(value, expected)


def test_saved_model_of_keras(tmp_path, source, target):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "saved_model.pb").touch()
    source.save_weights(tmp_path / "a" / "variables" / "variables")
    weights.load_weights(target, tmp_path / "a")
    assert_same(snapshot(target), snapshot(source))


def test_export_without_variables(tmp_path, model, untouched):
    tf.saved_model.save(tf.Module(), tmp_path / "a")
    for path in (tmp_path / "a" / "variables").iterdir():
        path.unlink()
    assert "an exported model" in str(refusal(model, tmp_path / "a"))


def test_object_checkpoint_of_another_model(tmp_path, model, untouched):
    tiny(depth_coefficient=1.5).save_weights(tmp_path / "a")
    error = refusal(model, tmp_path / "a")
    assert error.shapes or error.unexpected


@pytest.mark.parametrize("make", [flat, nested])
@pytest.mark.parametrize("name", ["a.safetensors", "model.ckpt-0"])
def test_classifier_of_ones_own_is_saved(tmp_path, rng, source, make, name):
    """The file has the names of the standard model, which then computes the same."""
    model = make(source)
    images = rng.integers(0, 256, (3, 16, 16, 3)).astype(np.float32)
    expected = model(images, training=False).numpy()
    weights.save_weights(model, tmp_path / name)
    np.testing.assert_allclose(tiny(5, weights=tmp_path / name)(images), expected, rtol=1e-5)
    loaded = cleared(model)
    weights.load_weights(loaded, tmp_path / name)
    np.testing.assert_array_equal(loaded(images, training=False), expected)


@pytest.mark.parametrize(
    "layers, told",
    [
        ([tf.keras.layers.Dense(8, name="hidden"), tf.keras.layers.Dense(5)], "hidden"),
        ([tf.keras.layers.BatchNormalization(name="norm"), tf.keras.layers.Dense(5)], "norm"),
        ([tf.keras.layers.Dense(5, activation="softmax", name="d")], "must return logits"),
        ([tf.keras.layers.Dense(5, use_bias=False, name="d")], "and a bias"),
    ],
)
def test_heads_that_no_file_has_names_for(tmp_path, layers, told):
    model = tf.keras.Sequential([tiny(include_top=False), *layers])
    with pytest.raises(ValueError, match=told):
        weights.save_weights(model, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a.safetensors", "model.ckpt-0", "a.keras", "a.h5"])
def test_settings_travel_with_the_weights(tmp_path, caplog, name):
    settings = {"small_image": True, "mean": (0.5, 0.25, 0.0), "std": (0.5, 0.25, 1.0)}
    model = tiny(**settings)
    if name in ("a.keras", "a.h5"):
        model.save(tmp_path / name)
    else:
        weights.save_weights(model, tmp_path / name)
    built = tiny(weights=tmp_path / name)
    assert heads.settings(built) == heads.settings(model)
    assert built.get_layer("blocks_1_dw_conv").strides == (1, 1)
    assert "these weights" not in caplog.text
    weights.load_weights(tiny(), tmp_path / name)
    assert "small_image=True, mean=[0.5, 0.25, 0.0]" in caplog.text


# --------------------------------------------------------------------------------------------------
# Refusals, none of which may change the model


@pytest.fixture
def untouched(model):
    before = snapshot(model)
    yield
    assert_same(snapshot(model), before)


def refusal(model: tf.keras.Model, path: Path, **kwargs) -> weights.WeightsError:
    with pytest.raises(weights.WeightsError, match=re.escape(str(path))) as error:
        weights.load_weights(model, str(path), **kwargs)
    return error.value


def test_missing_variable(foreign, model, untouched):
    path, values, write = foreign
    for removed in [name for name in values if "se_reduce" in name or "conv_reduce" in name]:
        write({name: value for name, value in values.items() if name != removed})
        error = refusal(model, path)
        assert (error.missing, error.unexpected, error.shapes) == ([removed], [], [])
        assert f"missing from the file (1):\n    {removed}\n" in str(error)
        assert "the flags of their training" in str(error)


def test_unexpected_variable(foreign, model, untouched):
    path, values, write = foreign
    extra = {".h5": "block9a_bn/gamma", ".pth": "_blocks.9._bn1.weight"}.get(
        path.suffix, "blocks.9.0.bn1.weight"
    )
    write({**values, extra: np.zeros(3, np.float32)})
    error = refusal(model, path)
    assert (error.missing, error.unexpected, error.shapes) == ([], [extra], [])
    assert f"only in the file (1):\n    {extra}\n" in str(error)


def test_another_shape(foreign, model, untouched):
    path, values, write = foreign
    (name,) = (n for n in values if re.search("block1a_dwconv|0.0.conv_dw|_blocks.0._depthwise", n))
    shape = [5 if side == 3 else side for side in values[name].shape]
    write({**values, name: np.zeros(shape, np.float32)})
    error = refusal(model, path)
    expected = f"{name}: file {shape}, model {list(values[name].shape)}"
    assert (error.missing, error.unexpected, error.shapes) == ([], [], [expected])
    assert expected in str(error) and "skip" not in str(error)


def test_other_number_of_classes(foreign, model):
    path, values, write = foreign
    write(values)
    other = tiny(num_classes=7)
    before = snapshot(other)
    error = refusal(other, path)
    assert (error.missing, error.unexpected, len(error.shapes)) == ([], [], 2)
    assert 'skip=["head/dense/"]' in str(error) and "--init_skip=head/dense/" in str(error)
    advice = str(error)
    assert "the model 7)" in advice
    assert advice.index("--num_label_classes") < advice.index("--init_skip")
    bias = {".h5": "predictions/bias", ".pth": "_fc.bias"}.get(path.suffix, "classifier.bias")
    assert bias in str(error)
    assert_same(snapshot(other), before)


def test_another_variant(foreign, b0):
    path, values, write = foreign
    write(values)
    before = b0.get_layer("stem_conv").kernel.numpy()
    error = refusal(b0, path)
    assert error.missing and error.shapes and not error.unexpected
    np.testing.assert_array_equal(b0.get_layer("stem_conv").kernel, before)


def test_deeper_model_in_the_file(foreign, model, untouched):
    """The file has all variables of the model in equal shapes; the extra ones must be noticed."""
    path, _, write = foreign
    naming = WRITERS[path.suffix[1:]][0]
    write(arrays(tiny(depth_coefficient=1.5), naming))
    error = refusal(model, path)
    # With consecutive block numbers, later blocks move.
    assert path.suffix == ".pth" or not (error.missing or error.shapes)
    assert any(
        name.startswith(("block2c_", "blocks.1.2.", "_blocks.4.")) for name in error.unexpected
    )


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.99])
def test_truncated_file(foreign, model, untouched, kept):
    path, values, write = foreign
    write(values)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(stored_arrays.DamagedFile, match=re.escape(f"{path} cannot be read")):
        weights.load_weights(model, str(path))


@pytest.mark.parametrize("suffix", weight_files.SUFFIXES)
def test_file_is_not_there(tmp_path, model, untouched, suffix):
    path = tmp_path / f"none{suffix}"
    with pytest.raises(FileNotFoundError, match=re.escape(f"no file at '{path}'")):
        weights.load_weights(model, str(path))


@pytest.mark.parametrize("kind", sorted(torch_saver.WRITERS))
@pytest.mark.parametrize(
    "content, told",
    [
        ([1], "it contains a list"),
        ({"epoch": 3, "state_dict": {}}, "it contains no tensors, but nothing"),
        ({"epoch": 3, "lr": 0.1}, "it contains no tensors, but epoch, lr"),
        ({"args": torch_saver.Named("os", "system")}, "it names os.system"),
    ],
)
def test_pytorch_files_without_weights(tmp_path, model, untouched, kind, content, told):
    path = torch_saver.save(tmp_path / "a.pth", content, kind)
    error = refusal(model, path)
    assert told in str(error) and not isinstance(error, stored_arrays.DamagedFile)


@pytest.mark.parametrize("kind", sorted(torch_saver.WRITERS))
def test_view_outside_of_its_storage(tmp_path, model, untouched, kind):
    storage = torch_saver.Storage(np.ones(4, np.float32), "0")
    state = {"conv_stem.weight": torch_saver.Tensor(storage, 1, (4,), (1,))}
    with pytest.raises(stored_arrays.DamagedFile, match="a.pth cannot be read: a tensor of shape"):
        weights.load_weights(model, torch_saver.save(tmp_path / "a.pth", state, kind))


def test_h5_without_layer_names(tmp_path, model, untouched):
    keras = tf.keras.Sequential([tf.keras.layers.BatchNormalization(input_shape=(3,))])
    keras.save_weights(tmp_path / "a.weights.h5")
    assert "it does not name its layers" in str(refusal(model, tmp_path / "a.weights.h5"))


def test_h5_of_a_model_around(tmp_path, source, target):
    """The file has a tf.keras.applications model inside another model."""
    with h5py.File(tmp_path / "a.h5", "w") as f:
        for name, value in arrays(source, foreign_weights.KERAS).items():
            f[f"efficientnetb0/{name.replace('/', '_1/')}:0"] = value
    weights.load_weights(target, tmp_path / "a.h5")
    assert_same(snapshot(target), snapshot(source))


def test_h5_of_two_models(tmp_path, model, untouched):
    with h5py.File(tmp_path / "a.h5", "w") as f:
        for name in ("one/stem_bn/beta:0", "one/top_bn/beta:0", "two/stem_bn/beta:0", "two/a/b:0"):
            f[name] = np.zeros(8)
    assert "two layers stem_bn" in str(refusal(model, tmp_path / "a.h5"))


def test_scope_is_for_checkpoints(foreign, model, untouched):
    path, values, write = foreign
    write(values)
    assert "scope='teacher_model'" in str(refusal(model, path, scope="teacher_model"))


# --------------------------------------------------------------------------------------------------
# New heads and no heads


def test_skip(foreign):
    path, values, write = foreign
    write(values)
    target = tiny(num_classes=7)
    head = target.get_layer("head_dense").get_weights()
    weights.load_weights(target, str(path), skip=["head/dense/"])
    for value, expected in zip(target.get_layer("head_dense").get_weights(), head):
        np.testing.assert_array_equal(value, expected)
    stems = {".h5": "stem_conv/kernel", ".pth": "_conv_stem.weight"}
    stem = stems.get(path.suffix, "conv_stem.weight")
    naming = WRITERS[path.suffix[1:]][0]
    np.testing.assert_array_equal(arrays(target, naming)[stem], values[stem])


def test_headless_file(foreign, model, target):
    path, values, write = foreign
    values = {
        n: v for n, v in values.items() if not n.startswith(("predictions", "classifier", "_fc"))
    }
    write(values)
    error = refusal(model, path)
    assert len(error.missing) == 2 and 'skip=["head/dense/"]' in str(error)
    weights.load_weights(target, str(path), skip=["head/dense/"])
    assert np.isnan(target.get_layer("head_dense").kernel).all()
    assert_same(
        arrays(tiny(include_top=False, weights=str(path)), WRITERS[path.suffix[1:]][0]), values
    )


def test_skip_that_matches_nothing(foreign, model, untouched):
    path, values, write = foreign
    write(values)
    with pytest.raises(weights.WeightsError, match="'head/dens/' matches no variable"):
        weights.load_weights(model, str(path), skip=["head/dense/", "head/dens/"])


def test_only_what_is_skipped_may_be_missing(foreign, model, untouched):
    path, values, write = foreign
    write(
        {
            n: v
            for n, v in values.items()
            if not n.startswith(("predictions", "top", "class", "_fc"))
        }
    )
    if path.suffix == ".h5":
        error = refusal(model, path, skip=["head/dense/"])
        assert set(error.missing) >= {"top_conv/kernel", "top_bn/beta"}
        assert "predictions/kernel" not in str(error)
        assert 'skip=["' not in str(error)


@pytest.mark.parametrize("kind", ["h5", "safetensors", "checkpoint"])
def test_model_without_top(tmp_path, rng, source, kind):
    """Files with a head are accepted; the output is what the head would receive."""
    path = tmp_path / f"a.{kind}"
    if kind == "checkpoint":
        weights.save_weights(source, str(path))
    else:
        naming, write = WRITERS[kind]
        write(path, arrays(source, naming))
    features = tiny(include_top=False, weights=str(path))
    images = rng.integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    output = features(images)
    assert output.dtype == tf.float32 and output.shape == (3, 32)
    np.testing.assert_allclose(source.get_layer("head_dense")(output), source(images), rtol=1e-5)
    names = {layer.name for layer in features.layers}
    assert not names & {"head_dropout", "head_dense", "logits"}
    assert set(weights.variable_names(source)) - set(weights.variable_names(features)) == {
        "efficientnet-test/head/dense/kernel",
        "efficientnet-test/head/dense/bias",
    }
    assert "logits" not in efficientnet.endpoints(features)


def test_model_without_top_in_bfloat16():
    tf.keras.mixed_precision.set_global_policy("mixed_bfloat16")
    assert tiny(include_top=False).output.dtype == tf.float32


def test_build_model_with_weights(tmp_path, model):
    weights.save_weights(model, str(tmp_path / "a.safetensors"))
    built = tiny(weights=str(tmp_path / "a.safetensors"))
    assert_same(snapshot(built), snapshot(model))
    with pytest.raises(FileNotFoundError):
        tiny(weights=str(tmp_path / "b.safetensors"))


# --------------------------------------------------------------------------------------------------
# Writing


@pytest.mark.parametrize("name", ["a.safetensors", "folder/model.ckpt-5"])
def test_round_trip(tmp_path, source, target, name):
    weights.save_weights(source, str(tmp_path / name))
    for ema in (False, True):
        target.set_weights([np.full_like(value, np.nan) for value in target.get_weights()])
        weights.load_weights(target, str(tmp_path / name), ema=ema)
        assert_same(snapshot(target), snapshot(source))


def test_both_sets_of_weights(tmp_path, model, source, target):
    raw, averages = model, source
    prefix = str(tmp_path / "model.ckpt-5")
    weights.save_weights(raw, prefix, ema_model=averages, step=5)
    stored = tf.train.load_checkpoint(prefix)
    assert stored.get_tensor("global_step") == 5
    assert stored.get_variable_to_dtype_map()["global_step"] == tf.int64
    assert len(stored.get_variable_to_shape_map()) == 2 * len(raw.weights) + 1
    for ema, source in ((False, raw), (True, averages)):
        weights.load_weights(target, prefix, ema=ema)
        assert_same(snapshot(target), snapshot(source))
    weights.save_weights(raw, str(tmp_path / "a.safetensors"), ema_model=averages)
    weights.load_weights(target, str(tmp_path / "a.safetensors"))
    assert_same(snapshot(target), snapshot(averages))


def test_interrupted_writing_leaves_what_was_there(tmp_path, model, target, monkeypatch):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"earlier")

    def fail(*unused):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(tf.io.gfile.GFile, "write", fail)
        with pytest.raises(OSError, match="disk full"):
            weights.save_weights(model, str(path))
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    assert path.read_bytes() == b"earlier"
    weights.save_weights(model, str(path))
    weights.load_weights(target, str(path))


@pytest.mark.parametrize("suffix", [".h5", ".pth", ".keras", ".PT", ".pth.tar"])
def test_kinds_that_are_not_written(tmp_path, model, suffix):
    with pytest.raises(weights.WeightsError, match=f"a{suffix}: .* files can be read"):
        weights.save_weights(model, str(tmp_path / f"a{suffix}"))


# --------------------------------------------------------------------------------------------------
# timm


def test_timm_names_of_b0(tmp_path, timm_shapes, b0, rng):
    shapes = timm_shapes["efficientnet-b0"]
    values = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    write_safetensors(tmp_path / "a.safetensors", values)
    before = b0.get_weights()
    weights.load_weights(b0, str(tmp_path / "a.safetensors"))
    weights.save_weights(b0, str(tmp_path / "b.safetensors"))
    b0.set_weights(before)
    written = safetensors.numpy.load_file(tmp_path / "b.safetensors")
    assert {name: list(value.shape) for name, value in written.items()} == shapes
    counters = {name for name in shapes if name.endswith("num_batches_tracked")}
    assert all(written[name].dtype == np.int64 for name in counters)
    assert_same(
        {name: value for name, value in written.items() if name not in counters},
        {name: value for name, value in values.items() if name not in counters},
    )


@pytest.mark.parametrize("name", SCALED)
def test_timm_names(name, timm_shapes):
    with tf.Graph().as_default():
        model = efficientnet.build_model(name, image_size=SIZE)
        names = foreign_weights.stored_names(model, foreign_weights.TIMM)
        variables = foreign_weights.layer_variables(model)
    complexity.restore_classes(model)
    found = {}
    for key, variable in variables.items():
        order = foreign_weights.axes(foreign_weights.TIMM, key[1], len(variable.shape))
        found[names[key]] = [variable.shape[axis] for axis in foreign_weights.inverse(order)]
    expected = {n: s for n, s in timm_shapes[name].items() if "num_batches_tracked" not in n}
    assert found == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_timm_logits(name, tmp_path, rng, record_property):
    """The logits equal those of timm's model; see requirements-parity.txt."""
    torch, timm = pytest.importorskip("torch"), pytest.importorskip("timm")
    images = coarse_images(rng)
    inputs = (images / 255.0 - IMAGENET["mean"]) / IMAGENET["std"]
    inputs = inputs.transpose(0, 3, 1, 2).astype(np.float32)
    with torch.no_grad():
        theirs = calibrated_timm(name, torch, timm, inputs)
        expected = theirs(torch.tensor(inputs)).numpy()
    paths = [tmp_path / "a.safetensors"]
    write_safetensors(paths[0], {key: t.numpy() for key, t in theirs.state_dict().items()})
    if name == "efficientnet-b0":
        paths.append(tmp_path / "a.pth")
        torch.save(theirs.state_dict(), paths[1])
    del theirs
    ours = efficientnet.build_model(name, image_size=SIZE, **IMAGENET)
    for path in paths:
        ours.set_weights([np.zeros_like(value) for value in ours.get_weights()])
        weights.load_weights(ours, str(path))
        difference = relative_difference(ours(images).numpy(), expected)
        record_property("relative_difference", difference)
        assert difference < 1e-3


@pytest.mark.slow
def test_timm_reads_what_is_written(tmp_path, b0):
    torch, timm = pytest.importorskip("torch"), pytest.importorskip("timm")
    weights.save_weights(b0, str(tmp_path / "a.safetensors"))
    state = safetensors.numpy.load_file(tmp_path / "a.safetensors")
    theirs = timm.create_model("tf_efficientnet_b0")
    theirs.load_state_dict({name: torch.tensor(value) for name, value in state.items()})


# --------------------------------------------------------------------------------------------------
# Keras


def keras_logits(model: tf.keras.Model, path: Path, images: np.ndarray) -> np.ndarray:
    """Saves the model's weights; returns its output before the softmax."""
    model.save_weights(path)
    logits = model.layers[-1]
    logits.activation = None
    return model(images.astype(np.float32), training=False).numpy()


def keras_model(name: str, rng: np.random.Generator, images: np.ndarray) -> tf.keras.Model:
    make = getattr(tf.keras.applications, "EfficientNet" + name[-2:].upper())
    model = make(weights=None, input_shape=(SIZE, SIZE, 3))
    randomize(model, rng)
    # The Normalization layer belongs to the input and is not imported.
    (layer,) = (la for la in model.layers if isinstance(la, tf.keras.layers.Normalization))
    layer.set_weights([np.zeros(3), np.ones(3), 0])
    calibrate_keras(model, images)
    return model


@pytest.mark.slow
def test_keras_b0(tmp_path, rng):
    # Keras refuses to call models older than one built in a graph, as in `test_timm_names`.
    b0 = efficientnet.build_model("efficientnet-b0", image_size=SIZE, **UNNORMALISED)
    images = coarse_images(rng)
    theirs = keras_model("efficientnet-b0", rng, images)
    expected = keras_logits(theirs, tmp_path / "a.h5", images)
    weights.load_weights(b0, str(tmp_path / "a.h5"))
    assert relative_difference(b0(images).numpy(), expected) < 1e-4
    # Without the top layers.
    headless = tf.keras.Model(theirs.input, theirs.get_layer("top_activation").output)
    headless.save_weights(tmp_path / "notop.h5")
    with pytest.raises(weights.WeightsError, match="predictions/kernel"):
        weights.load_weights(b0, str(tmp_path / "notop.h5"))
    body = [v for name, v in weights.variable_names(b0).items() if "head/dense" not in name]
    before = [variable.numpy() for variable in body]
    for variable in body:
        variable.assign(tf.zeros_like(variable))
    weights.load_weights(b0, str(tmp_path / "notop.h5"), skip=["head/dense/"])
    for variable, value in zip(body, before):
        np.testing.assert_array_equal(variable, value)


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED[1:8])
def test_keras(name, tmp_path, rng, record_property):
    images = coarse_images(rng)
    theirs = keras_model(name, rng, images)
    expected = keras_logits(theirs, tmp_path / "a.h5", images)
    ours = efficientnet.build_model(
        name, image_size=SIZE, weights=str(tmp_path / "a.h5"), **UNNORMALISED
    )
    difference = relative_difference(ours(images).numpy(), expected)
    record_property("relative_difference", difference)
    assert difference < 1e-4
