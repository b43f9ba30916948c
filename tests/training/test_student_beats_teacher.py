"""The method works: on scanned digits a noised student becomes better than the teacher it learned from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from efficientnet_ns.config import Config
from efficientnet_ns.files import tfexamples, tfrecords
from efficientnet_ns.training import train

# Labeled images are few and of few hands, so that the teacher has much to gain from the others.
LABELS_PER_CLASS, VALIDATION, SEED = 5, 600, 0
TEACHER_STEPS, STUDENT_STEPS = 200, 300


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """scikit-learn's 1797 scans at 16 × 16 pixels: 50 with labels, 600 to measure, the rest without."""
    folder = tmp_path_factory.mktemp("digits")
    scans = pytest.importorskip("sklearn.datasets").load_digits()
    pixels = tf.image.resize(scans.images[..., None] * (255 / 16), [16, 16], "bicubic")
    pixels = tf.cast(tf.clip_by_value(tf.round(pixels), 0, 255), tf.uint8)
    encoded, labels = [tf.io.encode_png(image).numpy() for image in pixels], scans.target
    rng = np.random.default_rng(SEED)
    # Neighbouring scans come from the same hands.
    order = np.roll(np.arange(len(labels)), -rng.integers(len(labels)))
    known = np.concatenate([order[labels[order] == c][:LABELS_PER_CLASS] for c in range(10)])
    rest = np.random.default_rng(SEED).permutation(np.setdiff1d(order, known))
    for prefix, chosen in (("train", known), ("validation", rest[:VALIDATION])):
        examples = [tfexamples.labeled_example(encoded[i], int(labels[i])) for i in chosen]
        tfrecords.write_sharded(str(folder / "labeled"), prefix, examples, 2)
    unlabeled = [tfexamples.unlabeled_example(encoded[i]) for i in rest[VALIDATION:]]
    tfrecords.write_sharded(str(folder / "unlabeled"), "extra", unlabeled, 4)
    (folder / "task.json").write_text(
        json.dumps({"num_classes": 10, "image_size": 16, "small_image": True})
    )
    return folder


def settings(folder: Path, name: str, steps: int, **values) -> Config:
    return Config().override(
        model_name="efficientnet-test",
        task_name=str(folder / "task.json"),
        label_data_dir=str(folder / "labeled"),
        model_dir=str(folder / name),
        train_steps=steps,
        train_batch_size=32,
        base_learning_rate=0.08,
        final_base_lr=0.008,
        augment_name="randaugment",
        randaug_mag=5,
        bn_momentum=0.97,
        moving_average_decay=0.99,
        weight_decay=1e-4,
        eval_batch_size=100,
        iterations_per_loop=50,
        save_checkpoints_steps=1000,
        steps_per_eval=10000,
        preview_images=0,
        seed=SEED,
        **values,
    )


@pytest.mark.slow
def test_student_is_better_than_its_teacher(digits):
    """Seed 0 went from 36.7 to 45.0 %, seed 1 from 33.7 to 37.7 %; CPU types round differently."""
    teacher = train.train_and_evaluate(settings(digits, "teacher", TEACHER_STEPS))
    student = train.train_and_evaluate(
        settings(
            digits,
            "student",
            STUDENT_STEPS,
            unlabel_data_dir=str(digits / "unlabeled"),
            unlabel_ratio=3.0,
            teacher_softmax_temp=1.0,
            teacher_model_name="efficientnet-test",
            teacher_model_path=str(digits / f"teacher/model.ckpt-{TEACHER_STEPS}"),
        )
    )
    assert teacher["eval/top1"] > 0.2, "the teacher learned nothing"
    assert student["eval/top1"] > teacher["eval/top1"] + 0.03
