"""Checkpoints of the original: names, round trip, refusals, and logits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

import efficientnet_ns as ns
from efficientnet_ns.data import images
from efficientnet_ns.files import json_files
from efficientnet_ns.models import efficientnet, weights

SVHN = {
    "mean": (0.4376821, 0.4437697, 0.47280442),
    "std": (0.19803012, 0.20101562, 0.19703614),
}


def tiny(num_classes: int = 10, **kwargs) -> tf.keras.Model:
    return efficientnet.build_model("efficientnet-test", num_classes, 16, **kwargs)


def counting(model: tf.keras.Model, start: int = 0, suffix: str = "") -> dict[str, np.ndarray]:
    """Returns distinct consecutive numbers for every variable so that mix-ups are detected."""
    values = {}
    for name, variable in weights.variable_names(model).items():
        size = int(np.prod(variable.shape))
        values[name + suffix] = np.arange(start, start + size, dtype=np.float32).reshape(
            variable.shape
        )
        start += size
    return values


def snapshot(model: tf.keras.Model) -> dict[str, np.ndarray]:
    return {name: variable.numpy() for name, variable in weights.variable_names(model).items()}


def assert_values(model: tf.keras.Model, expected: Mapping[str, np.ndarray]) -> None:
    values = snapshot(model)
    assert set(values) == set(expected)
    for name, value in values.items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


@pytest.fixture(scope="module")
def model() -> tf.keras.Model:
    return tiny()


@pytest.fixture
def checkpoint(tmp_path, model) -> Path:
    """A checkpoint like the original's: raw and averaged values, optimizer slots, and a step."""
    prefix = tmp_path / "model.ckpt-1000"
    raw = counting(model)
    slots = {f"{name}/RMSProp": value + 0.5 for name, value in raw.items()}
    averages = counting(model, 100_000, weights.EMA_SUFFIX)
    step = np.array(1000, np.int64)
    weights.write_checkpoint(str(prefix), {**raw, **averages, **slots, "global_step": step})
    return prefix


def test_names_of_the_first_two_blocks(model):
    names = {
        name: variable.shape.as_list() for name, variable in weights.variable_names(model).items()
    }
    # The projection is the block's first convolution without expansion and its second with it.
    assert names["efficientnet-test/blocks_0/conv2d/kernel"] == [1, 1, 8, 8]
    assert "efficientnet-test/blocks_0/conv2d_1/kernel" not in names
    assert names["efficientnet-test/blocks_1/conv2d/kernel"] == [1, 1, 8, 16]
    assert names["efficientnet-test/blocks_1/conv2d_1/kernel"] == [1, 1, 16, 16]
    assert names["efficientnet-test/blocks_1/depthwise_conv2d/depthwise_kernel"] == [3, 3, 16, 1]
    assert names["efficientnet-test/blocks_1/se/conv2d/bias"] == [2]
    assert names["efficientnet-test/blocks_1/se/conv2d_1/bias"] == [16]
    assert names["efficientnet-test/blocks_1/tpu_batch_normalization_2/moving_mean"] == [16]
    assert names["efficientnet-test/head/dense/bias"] == [10]
    assert names["efficientnet-test/stem/conv2d/kernel"] == [3, 3, 3, 8]


# --------------------------------------------------------------------------------------------------
# Round trip


@pytest.mark.parametrize("ema, start", [(False, 0), (True, 100_000)])
def test_round_trip(checkpoint, model, ema, start):
    weights.load_weights(model, str(checkpoint), ema=ema)
    assert_values(model, counting(model, start))


def test_averages_are_the_default(checkpoint, model):
    weights.load_weights(model, str(checkpoint))
    assert_values(model, counting(model, 100_000))


def test_saved_model_gives_the_same_logits(tmp_path, rng):
    source, target = tiny(), tiny()
    images = rng.integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    assert (source(images) != target(images)).numpy().any()
    weights.write_checkpoint(str(tmp_path / "model"), weights.variable_names(source))
    weights.load_weights(target, str(tmp_path / "model"), ema=False)
    np.testing.assert_array_equal(target(images), source(images))


@pytest.mark.parametrize("form", ["prefix", "index", "folder", "slash"])
def test_ways_to_name_a_checkpoint(checkpoint, form):
    path = {
        "prefix": str(checkpoint),
        "index": f"{checkpoint}.index",
        "folder": str(checkpoint.parent),
        "slash": f"{checkpoint.parent}/",
    }[form]
    assert weights.checkpoint_prefix(path) == str(checkpoint)


def test_folder_with_a_checkpoint_file(checkpoint, model):
    newer = checkpoint.parent / "model.ckpt-2000"
    weights.write_checkpoint(str(newer), counting(model))
    (checkpoint.parent / "checkpoint").write_text('model_checkpoint_path: "model.ckpt-1000"\n')
    assert weights.checkpoint_prefix(str(checkpoint.parent)) == str(checkpoint)
    (checkpoint.parent / "checkpoint").write_text('model_checkpoint_path: "model.ckpt-2000"\n')
    assert weights.checkpoint_prefix(str(checkpoint.parent)) == str(newer)


@pytest.mark.parametrize(
    "folder", ["noisy_student_efficientnet-b0", "noisy-student-efficientnet-b1"]
)
def test_unpacked_archive(checkpoint, tmp_path, folder):
    """The inner folder has no fixed name; its `checkpoint` file may refer to another machine."""
    inner = tmp_path / "unpacked" / folder
    inner.mkdir(parents=True)
    for path in checkpoint.parent.glob(f"{checkpoint.name}.*"):
        path.rename(inner / path.name.replace("model.ckpt-1000", "model.ckpt"))
    (inner / "checkpoint").write_text('model_checkpoint_path: "/tmp/elsewhere/model.ckpt"\n')
    assert weights.checkpoint_prefix(str(inner)) == str(inner / "model.ckpt")
    assert weights.checkpoint_prefix(str(tmp_path / "unpacked")) == str(inner / "model.ckpt")


@pytest.fixture
def student_checkpoint(tmp_path) -> Path:
    """A checkpoint like that of the original with an on-the-fly teacher of another size."""
    prefix = tmp_path / "student" / "model.ckpt-9"
    prefix.parent.mkdir()
    student, teacher = tiny(), tiny(depth_coefficient=2.0)
    tensors = {"global_step": np.array(9, np.int64)}
    for model, scope, start in ((student, "", 0), (teacher, "teacher_model/", 300_000)):
        for suffix, first in (("", start), (weights.EMA_SUFFIX, start + 100_000)):
            values = counting(model, first, suffix)
            tensors.update({scope + name: value for name, value in values.items()})
    for name, value in counting(student).items():
        tensors[f"{name}/RMSProp"] = tensors[f"{name}/RMSProp_1"] = value
    weights.write_checkpoint(str(prefix), tensors)
    return prefix


@pytest.mark.parametrize("ema", [False, True])
def test_student_and_teacher_in_one_checkpoint(student_checkpoint, model, ema):
    weights.load_weights(model, str(student_checkpoint), ema=ema)
    assert_values(model, counting(model, 100_000 if ema else 0))
    teacher = tiny(depth_coefficient=2.0)
    weights.load_weights(teacher, str(student_checkpoint), ema=ema, scope="teacher_model")
    assert_values(teacher, counting(teacher, 400_000 if ema else 300_000))


@pytest.mark.parametrize("ema", [False, True])
def test_new_head(checkpoint, ema):
    """Skipped variables keep their values, regardless of their shape in the file."""
    target = tiny(num_classes=7)
    before, values = snapshot(target), counting(tiny(), 100_000 if ema else 0)
    weights.load_weights(target, str(checkpoint), ema=ema, skip=["head/dense/kernel", "dense/bias"])
    after = snapshot(target)
    for name in after:
        expected = before if "head/dense" in name else values
        np.testing.assert_array_equal(after[name], expected[name], err_msg=name)


# --------------------------------------------------------------------------------------------------
# Refusals, none of which may change the model


@pytest.fixture
def untouched(model):
    before = snapshot(model)
    yield
    assert_values(model, before)


def test_missing_variable(tmp_path, model, untouched):
    values = counting(model, 7)
    name = "efficientnet-test/blocks_1/se/conv2d_1/bias"
    values["efficientnet-test/blocks_1/se/conv2d_9/bias"] = values.pop(name)
    weights.write_checkpoint(str(tmp_path / "model"), values)
    with pytest.raises(weights.WeightsError, match=f"(?s)missing from the file.*{name}") as error:
        weights.load_weights(model, str(tmp_path / "model"), ema=False)
    assert str(tmp_path / "model") in str(error.value)
    assert error.value.missing == [name]
    assert error.value.unexpected == ["efficientnet-test/blocks_1/se/conv2d_9/bias"]
    assert "efficientnet-test/blocks_1/se/conv2d_9/bias" in str(error.value)
    assert "efficientnet-test/head" not in str(error.value)


def test_missing_averages(tmp_path, model, untouched):
    weights.write_checkpoint(str(tmp_path / "model"), counting(model, 7))
    with pytest.raises(weights.WeightsError) as error:
        weights.load_weights(model, str(tmp_path / "model"))
    count = len(model.weights)
    assert f"missing from the file ({count})" in str(error.value)
    assert "/blocks_0/conv2d/kernel/ExponentialMovingAverage" in str(error.value)
    assert f"and {count - 8} more" in str(error.value)


@pytest.mark.parametrize("ema", [False, True])
@pytest.mark.parametrize(
    "extra",
    [
        "efficientnet-test/blocks_3/conv2d/kernel",
        "efficientnet-test/blocks_0/conv2d_1/kernel/ExponentialMovingAverage",
        "efficientnet-b0/stem/conv2d/kernel",
        "beta1_power",
    ],
)
def test_unexpected_variable(tmp_path, model, untouched, extra, ema):
    """The file has every variable of the model and one more."""
    values = {**counting(model, 7), **counting(model, 9, weights.EMA_SUFFIX), extra: np.zeros(2)}
    weights.write_checkpoint(str(tmp_path / "model"), values)
    with pytest.raises(weights.WeightsError, match="only in the file") as error:
        weights.load_weights(model, str(tmp_path / "model"), ema=ema)
    found = (error.value.missing, error.value.unexpected, error.value.shapes)
    assert found == ([], [extra], [])
    assert extra in str(error.value) and str(tmp_path / "model") in str(error.value)


def test_wrong_scope(student_checkpoint, model, untouched):
    with pytest.raises(weights.WeightsError, match="missing.*\n *teacher/efficientnet-test/"):
        weights.load_weights(model, str(student_checkpoint), scope="teacher")
    # The teacher is deeper than this model.
    with pytest.raises(weights.WeightsError, match="teacher_model/efficientnet-test/blocks_3/"):
        weights.load_weights(model, str(student_checkpoint), scope="teacher_model")


def test_wrong_shape(tmp_path, model, untouched):
    values = counting(model, 7)
    name = "efficientnet-test/blocks_0/depthwise_conv2d/depthwise_kernel"
    values[name] = np.zeros([5, 5, 8, 1], np.float32)
    weights.write_checkpoint(str(tmp_path / "model"), values)
    with pytest.raises(weights.WeightsError) as error:
        weights.load_weights(model, str(tmp_path / "model"), ema=False)
    assert error.value.shapes == [f"{name}: file [5, 5, 8, 1], model [3, 3, 8, 1]"]
    assert f"{name}: file [5, 5, 8, 1], model [3, 3, 8, 1]" in str(error.value)
    assert str(tmp_path / "model") in str(error.value)
    assert "missing" not in str(error.value)


def test_transposed_variable_of_the_same_size(tmp_path, model, untouched):
    values = counting(model, 7)
    name = "efficientnet-test/head/dense/kernel"
    values[name] = values[name].T
    weights.write_checkpoint(str(tmp_path / "model"), values)
    with pytest.raises(weights.WeightsError, match=f"{name}: file"):
        weights.load_weights(model, str(tmp_path / "model"), ema=False)


def test_other_number_of_classes(checkpoint):
    other = tiny(num_classes=7)
    before = snapshot(other)
    with pytest.raises(weights.WeightsError) as error:
        weights.load_weights(other, str(checkpoint))
    suffix = weights.EMA_SUFFIX
    assert f"efficientnet-test/head/dense/bias{suffix}: file [10], model [7]" in str(error.value)
    assert f"head/dense/kernel{suffix}: file [32, 10], model [32, 7]" in str(error.value)
    assert "of a different shape (2)" in str(error.value)
    assert 'skip=["head/dense/"]' in str(error.value)
    assert_values(other, before)


def test_checkpoint_of_another_model(tmp_path, model, untouched):
    values = {
        name.replace("efficientnet-test/", "efficientnet-b0/"): value
        for name, value in counting(model, 7).items()
    }
    weights.write_checkpoint(str(tmp_path / "model"), values)
    with pytest.raises(weights.WeightsError) as error:
        weights.load_weights(model, str(tmp_path / "model"), ema=False)
    assert "efficientnet-test/blocks_0/conv2d/kernel" in str(error.value)
    assert "only in the file" in str(error.value)
    assert "efficientnet-b0/blocks_0/conv2d/kernel" in str(error.value)


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_truncated_data_file(checkpoint, model, untouched, kept):
    data = Path(f"{checkpoint}.data-00000-of-00001")
    content = data.read_bytes()
    data.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(tf.errors.DataLossError, match="model.ckpt-1000 cannot"):
        weights.load_weights(model, str(checkpoint))


def test_one_wrong_bit(tmp_path, model, untouched):
    weights.write_checkpoint(str(tmp_path / "model.ckpt-7"), counting(model, 7))
    data = tmp_path / "model.ckpt-7.data-00000-of-00001"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(tf.errors.DataLossError, match="model.ckpt-7 cannot be read") as error:
        weights.load_weights(model, str(tmp_path), ema=False)
    assert isinstance(error.value, weights.WeightsError)
    assert any(name in str(error.value) for name in weights.variable_names(model))


def test_missing_data_file(checkpoint, model, untouched):
    Path(f"{checkpoint}.data-00000-of-00001").unlink()
    with pytest.raises(tf.errors.DataLossError, match="model.ckpt-1000.data-00000-of-00001"):
        weights.load_weights(model, str(checkpoint))


def test_damaged_index(checkpoint, model, untouched):
    Path(f"{checkpoint}.index").write_bytes(b"not an index")
    with pytest.raises(tf.errors.DataLossError, match="model.ckpt-1000 cannot"):
        weights.load_weights(model, str(checkpoint))


def test_not_there(tmp_path, model, untouched):
    for path in (tmp_path / "model.ckpt-3", tmp_path, tmp_path / "model.ckpt-3.index"):
        name = str(path).replace(".index", "")
        with pytest.raises(FileNotFoundError, match=f"no checkpoint at '{name}'"):
            weights.load_weights(model, str(path))


def test_skip_that_matches_nothing(checkpoint, model, untouched):
    with pytest.raises(weights.WeightsError, match="'head/fc' matches no variable"):
        weights.load_weights(model, str(checkpoint), skip=["stem", "head/fc"])


def test_skip_may_be_one_expression(checkpoint):
    target = tiny()
    before = snapshot(target)
    weights.load_weights(target, checkpoint, skip="head/dense/")
    kept = [name for name, value in snapshot(target).items() if np.array_equal(value, before[name])]
    assert sorted(name.rsplit("/", 2)[-2:] for name in kept) == [
        ["dense", "bias"],
        ["dense", "kernel"],
    ]


@pytest.mark.parametrize(
    ("skip", "message"), [(".", "leaves no variable"), ("head/[", "not a regular expression")]
)
def test_skip_that_cannot_work(checkpoint, model, untouched, skip, message):
    with pytest.raises(weights.WeightsError, match=message):
        weights.load_weights(model, checkpoint, skip=skip)


def test_folder_with_several_checkpoints(checkpoint, model, untouched):
    weights.write_checkpoint(str(checkpoint.parent / "model.ckpt-2000"), counting(model))
    with pytest.raises(weights.WeightsError, match="contains 2 checkpoints") as error:
        weights.load_weights(model, str(checkpoint.parent))
    assert str(checkpoint.parent) in str(error.value)
    assert "model.ckpt-1000.index" in str(error.value) or "model.ckpt-2000.index" in str(
        error.value
    )


# --------------------------------------------------------------------------------------------------
# Logits, compared with the original's and a second implementation


class NumpyEfficientNet:
    """Evaluates in NumPy, directly from variables under the original's names."""

    def __init__(self, values: Mapping[str, np.ndarray], blocks: list[efficientnet.Stage]):
        self.values, self.blocks = values, blocks

    def __call__(self, images: np.ndarray, mean, std) -> np.ndarray:
        x = (images / 255.0 - mean) / std
        x = swish(self.bn(self.conv(x, "stem/conv2d", 2), "stem/tpu_batch_normalization"))
        for index, block in enumerate(self.blocks):
            x = self.mbconv(x, f"blocks_{index}", block)
        x = swish(self.bn(self.conv(x, "head/conv2d"), "head/tpu_batch_normalization"))
        return self.dense(x.mean((1, 2)), "head/dense")

    def mbconv(self, x: np.ndarray, scope: str, block: efficientnet.Stage) -> np.ndarray:
        shortcut, bn = x, f"{scope}/tpu_batch_normalization"
        if block.expand != 1:
            x = swish(self.bn(self.conv(x, f"{scope}/conv2d"), bn))
            names = (f"{bn}_1", f"{scope}/conv2d_1", f"{bn}_2")
        else:
            names = (bn, f"{scope}/conv2d", f"{bn}_1")
        kernel = self.values[f"{scope}/depthwise_conv2d/depthwise_kernel"]
        # A depthwise convolution is a convolution whose kernel is diagonal in the channels.
        diagonal = kernel * np.eye(kernel.shape[2])
        x = swish(self.bn(convolve(x, diagonal, block.stride), names[0]))
        gate = swish(self.conv(x.mean((1, 2), keepdims=True), f"{scope}/se/conv2d"))
        x = x / (1 + np.exp(-self.conv(gate, f"{scope}/se/conv2d_1")))
        x = self.bn(self.conv(x, names[1]), names[2])
        return x + shortcut if x.shape == shortcut.shape and block.stride == 1 else x

    def conv(self, x: np.ndarray, scope: str, stride: int = 1) -> np.ndarray:
        bias = self.values.get(f"{scope}/bias", 0.0)
        return convolve(x, self.values[f"{scope}/kernel"], stride) + bias

    def bn(self, x: np.ndarray, scope: str) -> np.ndarray:
        mean, variance, gamma, beta = (
            self.values[f"{scope}/{leaf}"]
            for leaf in ("moving_mean", "moving_variance", "gamma", "beta")
        )
        return (x - mean) / np.sqrt(variance + 1e-3) * gamma + beta

    def dense(self, x: np.ndarray, scope: str) -> np.ndarray:
        return x @ self.values[f"{scope}/kernel"] + self.values[f"{scope}/bias"]


def swish(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def convolve(x: np.ndarray, kernel: np.ndarray, stride: int) -> np.ndarray:
    """Cross-correlates with TensorFlow's SAME padding: the odd pixel goes to the end."""
    size, side = kernel.shape[0], x.shape[1]
    out = -(-side // stride)
    total = max((out - 1) * stride + size - side, 0)
    pad = (total // 2, total - total // 2)
    x = np.pad(x, ((0, 0), pad, pad, (0, 0)))
    reach = (out - 1) * stride + 1
    return sum(
        x[:, i : i + reach : stride, j : j + reach : stride] @ kernel[i, j]
        for i in range(size)
        for j in range(size)
    )


def numpy_logits(values, name: str, images: np.ndarray, small_image: bool, mean, std) -> np.ndarray:
    spec = efficientnet.VARIANTS[name]
    blocks = efficientnet.block_table(spec.stages, spec.width, spec.depth, small_image)
    values = {key[len(name) + 1 :]: value.astype(np.float64) for key, value in values.items()}
    return NumpyEfficientNet(values, blocks)(images.astype(np.float64), mean, std)


@pytest.mark.parametrize("small_image", [False, True])
def test_logits_equal_numpy(rng, small_image):
    model = tiny(small_image=small_image, **SVHN)
    for name, variable in weights.variable_names(model).items():
        if name.endswith(("moving_variance", "gamma")):
            variable.assign(rng.uniform(0.5, 2.0, variable.shape))
        elif name.endswith(("moving_mean", "beta", "bias")):
            variable.assign(rng.normal(0.0, 0.5, variable.shape))
    images = rng.integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    expected = numpy_logits(snapshot(model), model.name, images, small_image, **SVHN)
    np.testing.assert_allclose(model(images), expected, rtol=1e-4, atol=1e-5)
    assert np.std(expected) > 0.1


def model_of(folder: Path) -> tf.keras.Model:
    config = json.loads((folder / "config.json").read_text())
    return efficientnet.build_model(
        config["model"],
        config["classes"],
        config["size"],
        small_image=config["small"],
        **(SVHN if config["task"] == "svhn" else {}),
    )


@pytest.mark.parametrize("name", ["b0_small32_10", "b0_224_1000"])
def test_logits_equal_original(large_goldens, name):
    folder = large_goldens / "6_model" / name
    model = model_of(folder)
    recorded = np.load(folder / "eval_logits.npz")
    for kind, ema in (("raw", False), ("ema", True)):
        weights.load_weights(model, str(folder), ema=ema)
        logits = model(recorded["images"]).numpy()
        np.testing.assert_allclose(logits, recorded[f"logits_{kind}"], atol=1e-4)
        np.testing.assert_allclose(
            tf.nn.softmax(logits), recorded[f"probabilities_{kind}"], atol=1e-5
        )
    np.testing.assert_array_equal(np.argmax(logits, -1), recorded["classes_ema"])


def test_second_implementation_equals_original(large_goldens):
    folder = large_goldens / "6_model" / "b0_small32_10"
    recorded = np.load(folder / "eval_logits.npz")
    reader = tf.train.load_checkpoint(str(folder / "model.ckpt"))
    values = {
        name: reader.get_tensor(name)
        for name in reader.get_variable_to_shape_map()
        if not name.endswith(weights.EMA_SUFFIX) and name != "global_step"
    }
    logits = numpy_logits(values, "efficientnet-b0", recorded["images"], True, **SVHN)
    np.testing.assert_allclose(logits, recorded["logits_raw"], atol=1e-4)


def test_weights_are_not_saved_under_a_folders_name(tmp_path, model):
    folder = tmp_path / "m0"
    folder.mkdir()
    for path in (folder, f"{folder}/", f"{tmp_path}/new/", f"{folder}.safetensors/"):
        with pytest.raises(weights.WeightsError, match=r"is a folder: .* e\.g\. .*model.ckpt-0"):
            weights.save_weights(model, path)
    assert [p.name for p in tmp_path.rglob("*")] == ["m0"]


def test_one_folder_describes_one_kind_of_model(tmp_path, model):
    weights.save_weights(model, tmp_path / "one")
    weights.save_weights(model, tmp_path / "again")
    other = tiny(mean=(0.1, 0.2, 0.3))
    with pytest.raises(weights.WeightsError, match=r"other images \(mean: .* → \[0.1, 0.2, 0.3\]"):
        weights.save_weights(other, tmp_path / "two")
    assert weights.stored_settings(tmp_path / "one") == weights.stored_settings(tmp_path / "again")
    weights.save_weights(other, tmp_path / "two.safetensors")
    weights.save_weights(other, tmp_path / "elsewhere" / "two")
    weights.save_weights(model, tmp_path / "elsewhere" / "two.safetensors")
    weights.save_weights(model, tmp_path / "elsewhere" / "two")  # Replaces the only checkpoint.


@pytest.mark.parametrize("name", ["model.ckpt-1", "model.safetensors"])
def test_lite_there_and_back(tmp_path, small_lite, name):
    """Its normalization is not set by flags or tasks, but by the variant and the weights."""
    model = efficientnet.build_model(small_lite, 3, 32)
    weights.save_weights(model, tmp_path / name)
    settings = weights.stored_settings(tmp_path / name)
    assert (settings["mean"], settings["std"]) == ([127 / 255] * 3, [128 / 255] * 3)
    loaded = efficientnet.build_model(small_lite, 3, 32, weights=tmp_path / name)
    images = np.full([1, 32, 32, 3], 200, np.uint8)
    np.testing.assert_array_equal(loaded(images), model(images))
    assert loaded.get_layer("normalization")(images).numpy().max() == (200 - 127) / 128


@pytest.mark.parametrize(
    "name", ["model.ckpt-1", "model.safetensors", "model.keras", "model.h5", "folder"]
)
def test_the_crop_travels_with_the_weights(tmp_path, name):
    """`preprocess` uses the crop of the model's evaluation, regardless of the weights' format."""
    model = tiny(crop_fraction=0.5)
    if name.endswith((".keras", ".h5")):
        model.save(tmp_path / name)
        loaded = ns.load_model(tmp_path / name)
    else:
        path = tmp_path / name / "model.ckpt-1" if name == "folder" else tmp_path / name
        weights.save_weights(model, path)
        assert weights.stored_settings(path)["crop_fraction"] == 0.5
        loaded = tiny(weights=path)
    picture = np.random.default_rng(0).integers(0, 255, [60, 80, 3], np.uint8)
    seen = ns.preprocess(picture, loaded)
    size = model.input_shape[1]
    np.testing.assert_array_equal(seen[0], images.eval_image(picture, size, 0.5))
    assert np.abs(seen - ns.preprocess(picture, tiny())).max() > 1


def test_home_folder(tmp_path, model, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    weights.save_weights(model, "~/a/b")
    assert (tmp_path / "a" / "b.index").exists()
    weights.load_weights(model, "~/a")
    weights.save_weights(model, "~/c.safetensors")
    weights.load_weights(model, "~/c.safetensors")


def test_arguments_in_the_wrong_order(checkpoint, model):
    for call in (weights.load_weights, weights.save_weights):
        with pytest.raises(
            TypeError, match="requires a model and a path, not PosixPath and Functional"
        ):
            call(checkpoint, model)


def test_settings_of_another_kind_are_named(checkpoint, model):
    (checkpoint.parent / weights.SETTINGS_FILE).write_text("[]")
    with pytest.raises(json_files.BrokenFile, match="model.json should contain a JSON object"):
        weights.load_weights(model, checkpoint)
