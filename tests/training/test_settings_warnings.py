"""Warnings about unsuitable settings before training."""

from __future__ import annotations

import pytest
import tensorflow as tf

from efficientnet_ns.config import Config
from efficientnet_ns.resolve.resolved_config import ResolvedConfig
from efficientnet_ns.training import ema, settings_warnings


def told(num_images: int, **values) -> list[str]:
    config = Config().override(task_name="digits", model_name="efficientnet-test", **values)
    return settings_warnings.settings_warnings(ResolvedConfig.from_config(config), num_images)


GOOD = {"train_steps": 700, "train_batch_size": 32, "bn_momentum": 0.9}


def test_nothing_to_tell():
    assert told(100, **GOOD) == []
    assert told(1281167) == []  # The size of ImageNet.


def test_imagenets_schedule_for_few_images():
    (line,) = told(300)
    assert "--train_steps=109474" in line and "ImageNet's schedule, 1,494,685 passes" in line
    assert "300 labeled images" in line


def test_batch_of_more_than_all_images():
    (line,) = told(20, **GOOD)
    assert "--train_batch_size=32 exceeds the 20" in line


def test_warm_up_longer_than_half_of_the_schedule():
    (line,) = told(5000, **{**GOOD, "train_steps": 1000})
    assert "--warmup_epochs=5 are 781 of 1000 steps" in line
    assert told(5000, **{**GOOD, "train_steps": 1000}, warmup_epochs=1) == []
    assert told(5000, **{**GOOD, "train_steps": 1000}, train_last_step_num=500) == []


def test_averages_that_do_not_converge():
    (line,) = told(1000, **{**GOOD, "train_steps": 300, "bn_momentum": 0.99}, warmup_epochs=0)
    assert "--bn_momentum=0.97 (now 0.99)" in line
    # Statistics of trained weights are good from the start.
    given = {"init_model": True, "init_model_path": "w", "train_steps": 300, "bn_momentum": 0.99}
    assert told(1000, **{**GOOD, **given}, warmup_epochs=0) == []
    given = {"init_weights": "w", "train_steps": 300, "bn_momentum": 0.99}
    assert told(1000, **{**GOOD, **given}, warmup_epochs=0) == []


@pytest.mark.parametrize("momentum, decay, steps", [(0.9, 0.9999, 20), (0.99, 0.9, 60)])
def test_initial_share_is_what_the_averages_keep(momentum, decay, steps):
    """Simulates the layers and `ema.update` for a statistic of 1 whose batches give 0."""
    statistic, average = 1.0, tf.Variable(1.0)
    for step in range(1, steps + 1):
        statistic *= momentum
        ema.update([average], [tf.Variable(statistic)], ema.ramped_decay(decay, tf.constant(step)))
    assert settings_warnings.initial_share(momentum, decay, steps) == pytest.approx(
        float(average), rel=1e-4
    )
