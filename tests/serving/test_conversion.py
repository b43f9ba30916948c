"""Conversion of weights between formats."""

from __future__ import annotations

import re

import forks
import numpy as np
import pytest
import tensorflow as tf

from efficientnet_ns.config import Config, ConfigError, ModelConfig
from efficientnet_ns.models import efficientnet, weights
from efficientnet_ns.serving import conversion
from efficientnet_ns.training import claim

CLASSES = 10
TINY = ModelConfig(model_name="efficientnet-test", num_label_classes=CLASSES)


def build(seed: int, **values) -> tf.keras.Model:
    tf.keras.utils.set_random_seed(seed)
    return efficientnet.build_model("efficientnet-test", CLASSES, **values)


@pytest.fixture(scope="module")
def models() -> tuple[tf.keras.Model, tf.keras.Model]:
    return build(1), build(2)


def assert_holds(path: str, model: tf.keras.Model) -> None:
    target = tf.keras.models.clone_model(model)
    weights.load_weights(target, path)
    for found, expected in zip(target.weights, model.weights):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("ema", [False, True])
def test_convert(tmp_path, models, ema):
    raw, averages = models
    original = str(tmp_path / "model.ckpt-5")
    weights.save_weights(raw, original, ema_model=averages)
    there, back = str(tmp_path / "a.safetensors"), str(tmp_path / "new" / "model.ckpt-0")
    assert conversion.convert_checkpoint(TINY, original, there, ema=ema) == there
    conversion.convert_checkpoint(TINY, there, back)
    for path in (there, back):
        assert_holds(path, averages if ema else raw)


def test_converter_overwrites_nothing(tmp_path, models):
    source = str(tmp_path / "source.safetensors")
    weights.save_weights(models[0], source)
    for target in ("a.safetensors", "model.ckpt-0"):
        target = str(tmp_path / target)
        conversion.convert_checkpoint(TINY, source, target)
        with pytest.raises(ConfigError, match=re.escape(f"--target: {target}")):
            conversion.convert_checkpoint(TINY, source, target)


@pytest.mark.parametrize("source, target", [("", "b.safetensors"), ("a.safetensors", "")])
def test_converter_needs_both_paths(source, target):
    with pytest.raises(ConfigError, match="--source .* and --target"):
        conversion.convert_checkpoint(TINY, source, target)


@pytest.mark.parametrize(
    "target, message",
    [
        ("new/", "new/ is a folder: pass the name of a file"),
        ("", "is a folder"),
        ("file/model.ckpt-0", "file is a file, not a folder"),
        ("a.keras", ".keras files can be read, but not written"),
    ],
)
def test_converter_looks_at_the_target_first(tmp_path, target, message):
    (tmp_path / "file").touch()
    with pytest.raises(weights.WeightsError, match=message):
        conversion.convert_checkpoint(TINY, "/no/such", f"{tmp_path}/{target}")


def test_converter_with_another_model(tmp_path, models):
    source = tmp_path / "a.safetensors"
    weights.save_weights(models[0], source)
    config = ModelConfig(model_name="efficientnet-b9")
    with pytest.raises(ConfigError, match="efficientnet-b9"):
        conversion.convert_checkpoint(config, source, tmp_path / "b.safetensors")


def test_a_training_tells_the_model(tmp_path):
    """Variant, width and classes come from the training run, without flags."""
    settings = Config().override(
        model_name="efficientnet-test",
        width_coefficient=0.5,
        task_name="digits",
        model_dir=str(tmp_path / "run"),
    )
    claim.claim(settings, {})
    model = build(3, width_coefficient=0.5, image_size=20, small_image=True)
    weights.save_weights(model, tmp_path / "run" / "model.ckpt-4")
    target = str(tmp_path / "a.safetensors")
    conversion.convert_checkpoint(ModelConfig(), tmp_path / "run", target)
    assert_holds(target, model)


def test_command_line(tmp_path, models):
    """A damaged source is reported in one line without a traceback."""
    source, target = tmp_path / "source.safetensors", tmp_path / "target.safetensors"
    weights.save_weights(models[0], str(source))
    source.write_bytes(source.read_bytes()[:-1])
    command = ["-m", "efficientnet_ns.convert_checkpoint"]
    flags = ["--model_name=efficientnet-test", f"--num_label_classes={CLASSES}"]
    done = forks.python(*command, *flags, f"--source={source}", f"--target={target}")
    assert done.returncode == 2, done.stderr
    assert f"{source} cannot be read" in done.stderr
    assert "Traceback" not in done.stderr
    assert not target.exists()
