"""On scanned digits, a noised student becomes better than its teacher."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from efficientnet_ns.config import Config
from efficientnet_ns.files import tfexamples, tfrecords
from efficientnet_ns.training import train

# Labeled images are few and by few writers, which leaves much to gain from the others.
LABELS_PER_CLASS, VALIDATION, STEPS = 10, 600, 400


def write_digits(folder: Path, seed: int) -> None:
    """Writes scikit-learn's 1797 scans: 100 labeled, 600 for validation, the rest unlabeled."""
    scans = pytest.importorskip("sklearn.datasets").load_digits()
    pixels = np.round(scans.images[..., None] * (255 / 16)).clip(0, 255).astype(np.uint8)
    encoded, labels = [tf.io.encode_png(image).numpy() for image in pixels], scans.target
    rng = np.random.default_rng(seed)
    # Neighboring scans are by the same writers.
    order = np.roll(np.arange(len(labels)), -rng.integers(len(labels)))
    known = np.concatenate([order[labels[order] == c][:LABELS_PER_CLASS] for c in range(10)])
    rest = np.random.default_rng(seed).permutation(np.setdiff1d(order, known))
    for prefix, chosen in (("train", known), ("validation", rest[:VALIDATION])):
        examples = [tfexamples.labeled_example(encoded[i], int(labels[i])) for i in chosen]
        tfrecords.write_sharded(str(folder / "labeled"), prefix, examples, 2)
    unlabeled = [tfexamples.unlabeled_example(encoded[i]) for i in rest[VALIDATION:]]
    tfrecords.write_sharded(str(folder / "unlabeled"), "extra", unlabeled, 4)
    (folder / "task.json").write_text(
        json.dumps({"num_classes": 10, "image_size": 8, "small_image": True, "flip": False})
    )


def settings(folder: Path, name: str, seed: int, **values) -> Config:
    return Config().override(
        model_name="efficientnet-test",
        task_name=str(folder / "task.json"),
        label_data_dir=str(folder / "labeled"),
        model_dir=str(folder / name),
        train_steps=STEPS,
        train_batch_size=32,
        base_learning_rate=0.08,
        final_base_lr=0.008,
        bn_momentum=0.97,
        moving_average_decay=0.99,
        weight_decay=1e-4,
        eval_batch_size=100,
        iterations_per_loop=50,
        save_checkpoints_steps=1000,
        steps_per_eval=10000,
        preview_images=0,
        seed=seed,
        **values,
    )


@pytest.mark.parametrize(
    "seed", [1, pytest.param(0, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)]
)
def test_larger_student_is_better_than_its_teacher(tmp_path, seed):
    """Seeds 0, 1 and 2 improved from 78.2, 80.2 and 78.2 % to 84.3, 85.8 and 83.5 % with AVX2."""
    write_digits(tmp_path, seed)
    teacher = train.train_and_evaluate(settings(tmp_path, "teacher", seed))
    student = train.train_and_evaluate(
        settings(
            tmp_path,
            "student",
            seed,
            width_coefficient=2.0,
            unlabel_data_dir=str(tmp_path / "unlabeled"),
            unlabel_ratio=3.0,
            teacher_softmax_temp=1.0,
            teacher_model_name="efficientnet-test",
            teacher_model_path=str(tmp_path / f"teacher/model.ckpt-{STEPS}"),
        )
    )
    assert teacher["eval/top1"] > 0.6, "the teacher learned little"
    assert student["eval/top1"] > teacher["eval/top1"] + 0.02
