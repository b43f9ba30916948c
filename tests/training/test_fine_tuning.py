"""Fine-tuning on few images: Adam, cosine decay, kept statistics, and a linear probe."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from fakes import assert_same_training, settings, tensors, tiny, write_data

from efficientnet_ns.config import Config, ConfigError
from efficientnet_ns.data.randaugment import RandAugment
from efficientnet_ns.models import efficientnet, weights
from efficientnet_ns.training import probe, schedules, train


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tuning")
    write_data(path)
    return path


ADAM = {"optimizer": "adam", "lr_schedule": "cosine", "base_learning_rate": 1e-3}


def assert_resumes(whole: Config, lost: str) -> None:
    """Checks that a copy without the last checkpoints trains to the same result."""
    folder = Path(whole.train.model_dir)
    resumed = whole.override(model_dir=f"{folder} resumed")
    shutil.copytree(folder, resumed.train.model_dir)
    for path in Path(resumed.train.model_dir).glob(lost):
        path.unlink()
    train.train_and_evaluate(resumed)
    assert_same_training(str(folder), resumed.train.model_dir, whole.train.train_steps)


@pytest.mark.slow
def test_adam_resumes_to_the_same_weights(folder):
    whole = settings(folder, "whole", train_steps=4, keep_checkpoint_max=9, **ADAM)
    metrics = train.train_and_evaluate(whole)
    assert 0 < metrics["train/lr"] < 1e-3
    assert_resumes(whole, "model.ckpt-[34].*")
    names = tensors(whole.train.model_dir, 4)
    assert sum(name.endswith("/Adam") for name in names) == sum(
        n.endswith("/Adam_1") for n in names
    )
    assert not any("RMSProp" in name for name in names)
    # Optimizer slots do not prevent loading the weights.
    weights.load_weights(train.ResolvedConfig.from_config(whole).build_model(), folder / "whole")


def test_cosine():
    kwargs = {"labeled_batch_size": 4, "num_train_images": 40, "train_steps": 100}
    rate = schedules.learning_rate(
        base_learning_rate=0.5, kind="cosine", warmup_epochs=1.0, scaled=False, **kwargs
    )
    values = [float(rate(step)) for step in (0, 4, 10, 50, 100, 120)]
    half = 0.5 * 0.5 * (1 + np.cos(np.pi * 0.04))
    np.testing.assert_allclose(values[1], half * 5 / 11, rtol=1e-5)
    np.testing.assert_allclose(values[3], 0.25, rtol=1e-5)
    assert 0 < values[0] < values[1] < values[2] and values[4] == values[5] == 0
    scaled = schedules.learning_rate(
        base_learning_rate=0.5, kind="cosine", warmup_epochs=0, **kwargs
    )
    np.testing.assert_allclose(float(scaled(50)), 0.25 * 4 / 256, rtol=1e-5)
    clone = schedules.WarmupCosine.from_config(rate.get_config())
    assert float(clone(7)) == float(rate(7))


def test_kept_statistics_stay_and_scales_learn(rng):
    model = tiny(1)
    images = rng.uniform(0, 255, [4, 16, 16, 3]).astype(np.float32)
    efficientnet.keep_statistics(model)
    bn = next(layer for layer in model.layers if layer.name.endswith("_bn"))
    before = bn.moving_mean.numpy()
    network = tf.keras.Model(model.input, model.get_layer("stem_bn").output)
    np.testing.assert_array_equal(network(images, training=True), network(images, training=False))
    np.testing.assert_array_equal(bn.moving_mean, before)
    assert bn.gamma.name in [v.name for v in model.trainable_variables]
    for layer in model.layers:  # Other tests reuse the model.
        if hasattr(layer, "keep_statistics"):
            layer.keep_statistics = False


@pytest.mark.parametrize(
    "values, message",
    [
        ({"keep_bn_statistics": True}, "--keep_bn_statistics needs"),
        ({"ema_initial_share": 0.5}, "--ema_initial_share=0.5 needs --keep_bn_statistics"),
        ({"lr_schedule": "cosine", "final_base_lr": 0.1}, "a cosine ends at 0"),
    ],
)
def test_settings_that_do_not_go_together(folder, values, message):
    with pytest.raises(ConfigError, match=message):
        train.train_and_evaluate(settings(folder, "refused", **values))


@pytest.mark.parametrize("how", [{"init_weights": "absent"}, {"init_model": True}])
def test_statistics_of_any_initial_weights_are_kept(folder, how):
    """Only the weights are missing; keeping their statistics requires no other flag."""
    values = {"init_model_path": "absent", **how, "keep_bn_statistics": True}
    with pytest.raises(FileNotFoundError, match="absent"):
        train.train_and_evaluate(settings(folder, "absent", **values))


@pytest.mark.slow
def test_share_of_the_initial_weights(folder):
    """Raw weights are unaffected; averages keep a share of the initial weights, even if resumed."""
    start = settings(folder, "before", train_steps=1)
    train.train_and_evaluate(start)
    values = {"init_weights": start.train.model_dir, "init_skip": "head/dense/", **ADAM}
    values |= {"keep_bn_statistics": True, "train_steps": 3, "keep_checkpoint_max": 9}
    plain = settings(folder, "plain", **values)
    mixed = settings(folder, "mixed", **values, ema_initial_share=0.25)
    for config in (plain, mixed):
        train.train_and_evaluate(config)
    without, found = (tensors(config.train.model_dir, 3) for config in (plain, mixed))
    initial = train.ResolvedConfig.from_config(plain).build_model()
    weights.load_weights(initial, start.train.model_dir)
    initial = {name: v.numpy() for name, v in weights.variable_names(initial).items()}
    averages = [name for name in found if name.endswith(weights.EMA_SUFFIX)]
    assert len(averages) == len(initial)
    for name in averages:
        raw = name.removesuffix(weights.EMA_SUFFIX)
        np.testing.assert_array_equal(found[raw], without[raw])
        if "head/dense" not in name:  # The head starts from random values.
            expected = 0.25 * initial[raw] + 0.75 * without[name]
            np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-6, err_msg=name)
    kernel = "efficientnet-test/head/dense/kernel" + weights.EMA_SUFFIX
    assert not np.allclose(found[kernel], without[kernel])
    assert_resumes(mixed, "model.ckpt-[23].*")


def test_a_linear_classifier_separates_what_can_be_separated(rng):
    centers = rng.normal(0, 1, [3, 16]).astype(np.float32)
    labels = np.arange(90) % 3
    features = 50 + 7 * (centers[labels] + rng.normal(0, 0.2, [90, 16]).astype(np.float32))
    kernel, bias = probe.linear_classifier(features.astype(np.float32), labels, 3)
    assert (kernel.shape, bias.shape) == ((16, 3), (3,))
    assert ((features @ kernel + bias).argmax(1) == labels).all()


def test_probe_keeps_the_network_and_replaces_the_classifier(folder):
    start = settings(folder, "start", train_steps=1)
    train.train_and_evaluate(start)
    found = probe.fit(start, str(folder / "start"), str(folder / "probe"))
    assert found["images"] == 13 and found["accuracy"] > 0.5
    before, after = tensors(str(folder / "start"), 1), tensors(str(folder / "probe"), 0)
    for name in ("stem/conv2d/kernel", "head/dense/kernel"):
        name = f"efficientnet-test/{name}"
        same = np.array_equal(before[name + weights.EMA_SUFFIX], after[name])
        assert same == ("stem" in name), name


def test_proportional_reach_and_its_text():
    policy = RandAugment(2, 10, "clipped", proportional=True)
    assert policy.constants(224, False) == {"cutout_const": 40.0, "translate_const": 100.0}
    assert policy.constants(112, False) == {"cutout_const": 20.0, "translate_const": 50.0}
    assert str(policy) == "randaugment(N=2, M=10, mode=clipped, reach=proportional)"
    assert RandAugment.parse(str(policy)) == policy
    fixed = RandAugment(2, 10)
    assert fixed.constants(112, False) == {"cutout_const": 40.0, "translate_const": 100.0}
    assert policy.constants(32, True) == fixed.constants(32, True)
