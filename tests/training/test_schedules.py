"""The learning-rate schedule, compared with the original's numbers and its definition."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import tensorflow as tf

from efficientnet_ns.training import schedules

SETTINGS = (
    "imagenet_bs2048_350ep",
    "default_flags_bs4096",
    "imagenet_bs2048_train_ratio2",
    "svhn_script",
    "finetune_last20000",
    "label_data_sample_prob_half_bs512",
)
DEFAULTS = {"train_batch_size": 4096, "train_steps": 109474, "num_train_images": 1281167}


def schedule_of(flags: dict) -> schedules.WarmupStaircase:
    """Returns the schedule for the original's flags."""
    flags = {**DEFAULTS, **flags}
    train_ratio = flags.get("train_ratio", 1.0)
    return schedules.learning_rate(
        base_learning_rate=0.016,
        labeled_batch_size=flags["train_batch_size"],
        # Labeled images dropped by the mask do not count.
        label_data_sample_prob=flags.get("label_data_sample_prob", 1.0),
        num_train_images=flags["num_train_images"],
        train_steps=int(flags["train_steps"] * train_ratio),
        train_ratio=train_ratio,
        final_base_lr=flags.get("final_base_lr"),
        last_steps=flags.get("train_last_step_num"),
    )


@pytest.fixture(scope="module")
def recorded(goldens) -> dict[str, dict]:
    entries = json.loads((goldens / "learning_rate" / "learning_rate.json").read_text())
    return {entry["name"]: entry for entry in entries}


def test_every_recorded_setting_is_tested(recorded):
    assert set(recorded) == set(SETTINGS)


@pytest.mark.parametrize("name", SETTINGS)
def test_equals_original(recorded, name):
    setting = recorded[name]
    schedule = schedule_of(setting["flags"])
    assert schedule.decay_steps == pytest.approx(setting["decay_steps"], rel=1e-12)
    assert schedule.warmup_steps == setting["warmup_steps"]
    assert schedule.start_step == setting["build_learning_rate_args"]["start_from_step"]
    rates = [float(schedule(tf.constant(step, tf.int64))) for step in setting["global_step"]]
    np.testing.assert_allclose(rates, setting["lr"], rtol=2e-6)


def test_ramp_and_staircase_by_hand():
    schedule = schedules.WarmupStaircase(peak=0.5, decay_steps=2.5, warmup_steps=4)
    rates = [float(schedule(tf.constant(step))) for step in range(9)]
    # floor(step / 2.5) is 1 from step 3, 2 from step 5, and 3 from step 8.
    expected = [0.0, 0.125, 0.25, 0.375] + [0.5 * 0.97**stair for stair in (1, 2, 2, 2, 3)]
    np.testing.assert_allclose(rates, expected, rtol=1e-6)


@pytest.mark.parametrize("step", [4, 5, 100])
def test_fine_tuning_continues_the_schedule_without_a_ramp(step):
    whole = schedules.WarmupStaircase(peak=0.1, decay_steps=3.3, warmup_steps=4)
    last = schedules.WarmupStaircase(peak=0.1, decay_steps=3.3, warmup_steps=4, start_step=step)
    for offset in range(5):
        assert float(last(tf.constant(offset))) == float(whole(tf.constant(step + offset)))
    early = schedules.WarmupStaircase(peak=0.1, decay_steps=3.3, warmup_steps=4, start_step=1)
    assert float(early(tf.constant(0))) == pytest.approx(0.1)


def test_no_warm_up():
    schedule = schedules.learning_rate(
        base_learning_rate=0.016,
        labeled_batch_size=512,
        num_train_images=5120,
        train_steps=1000,
        warmup_epochs=0,
    )
    assert schedule.warmup_steps == 0
    assert float(schedule(tf.constant(0))) == pytest.approx(0.032)
    assert float(schedule(tf.constant(24))) == pytest.approx(0.032 * 0.97)


@pytest.mark.parametrize("labeled_batch_size", [128, 64])
def test_final_rate_is_reached_at_the_end(labeled_batch_size):
    final = 0.0002
    schedule = schedules.learning_rate(
        base_learning_rate=0.016,
        labeled_batch_size=labeled_batch_size,
        num_train_images=10_000,
        train_steps=20_000,
        final_base_lr=final,
    )
    after_ramp = tf.constant(20_000 - schedule.warmup_steps)
    target = final * labeled_batch_size / 256
    assert float(schedule(after_ramp)) == pytest.approx(target, rel=1 - schedules.DECAY_FACTOR)
    assert float(schedule(tf.constant(20_000))) < float(schedule(after_ramp))
    stairs = math.log(final / 0.016) / math.log(0.97)
    assert schedule.decay_steps == pytest.approx(
        (20_000 - schedule.warmup_steps) / stairs, rel=1e-3
    )


@pytest.mark.parametrize("train_steps", [300, 400])
def test_the_end_of_a_schedule_that_is_all_warm_up_is_refused(train_steps):
    """The 5 warm-up epochs take 400 steps, which leaves no step for the decay."""
    settings = {
        "base_learning_rate": 0.016,
        "labeled_batch_size": 128,
        "num_train_images": 10_240,
        "final_base_lr": 0.0002,
        "last_steps": 100,
    }
    with pytest.raises(ValueError, match="longer than its warm-up of 5 epochs"):
        schedules.learning_rate(train_steps=train_steps, **settings)
    assert schedules.learning_rate(train_steps=401, **settings).decay_steps > 0


def test_last_step_of_a_long_schedule_is_exact_enough():
    # float32 represents steps exactly up to 2^24.
    schedule = schedules.WarmupStaircase(peak=1.0, decay_steps=12_010.9375, warmup_steps=10)
    for stair in (1, 72, 1000):
        edge = math.ceil(stair * 12_010.9375)
        before, at = (float(schedule(tf.constant(s, tf.int64))) for s in (edge - 1, edge))
        assert at / before == pytest.approx(0.97, rel=1e-4)


def test_config_round_trip():
    schedule = schedules.WarmupStaircase(0.128, 1501.37, 3127, start_step=7)
    config = tf.keras.optimizers.schedules.serialize(schedule)
    restored = tf.keras.optimizers.schedules.deserialize(config)
    assert isinstance(restored, schedules.WarmupStaircase)
    assert restored.get_config() == schedule.get_config()
    assert restored.get_config() == {
        "peak": 0.128,
        "decay_steps": 1501.37,
        "warmup_steps": 3127,
        "start_step": 7,
    }
