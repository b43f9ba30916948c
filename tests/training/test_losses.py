"""Losses, compared with hand calculations and with every scalar the original reports."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import tensorflow as tf

from efficientnet_ns.config import TrainConfig
from efficientnet_ns.training import losses, optimizers, student

CASES = (
    "labeled_only",
    "unl_hard_stored_label",
    "unl_hard_teacher_argmax",
    "unl_soft_stored_probs_T1",
    "unl_soft_stored_probs_T0.5",
    "unl_soft_teacher_logits_T1",
    "unl_soft_teacher_logits_T0.5",
    "unl_soft_stored_probs_T2",
    "unl_soft_teacher_logits_T1_wd1e-4_ls0",
)
NUM_LABELED = 8

# Softmax is [1/4, 3/4] and [1/8, 1/4, 5/8].
TWO = tf.constant([[0.0, math.log(3.0)]])
THREE = tf.constant([[0.0, math.log(2.0), math.log(5.0)]])


# --------------------------------------------------------------------------------------------------
# By hand


@pytest.mark.parametrize(
    "logits, label, smoothing, expected",
    [
        (TWO, 1, 0.0, math.log(4 / 3)),
        (TWO, 0, 0.0, math.log(4)),
        # 0.95 on the label, 0.05 on the other class.
        (TWO, 1, 0.1, 0.95 * 0.287682 + 0.05 * 1.386294),
        (TWO, 0, 0.1, 0.95 * 1.386294 + 0.05 * 0.287682),
        # 0.7 + 0.3/3 on the label, 0.3/3 on each other class, whose losses are ln 8 and ln 4.
        (THREE, 2, 0.3, 0.8 * 0.470004 + 0.1 * 2.079442 + 0.1 * 1.386294),
    ],
)
def test_smoothed_cross_entropy(logits, label, smoothing, expected):
    loss = losses.smoothed_cross_entropy(logits, tf.constant([label]), smoothing)
    assert loss.shape == [1]
    assert float(loss[0]) == pytest.approx(expected, rel=1e-5)


def test_soft_cross_entropy():
    logits = tf.concat([THREE, tf.zeros([1, 3])], 0)
    probs = tf.constant([[0.5, 0.25, 0.25], [0.2, 0.3, 0.5]])
    expected = [0.5 * math.log(8) + 0.25 * math.log(4) + 0.25 * math.log(8 / 5), math.log(3)]
    np.testing.assert_allclose(losses.soft_cross_entropy(logits, probs), expected, rtol=1e-6)


def test_losses_of_extreme_logits_are_finite():
    logits = tf.constant([[1e4, -1e4, 0.0]])
    assert float(losses.smoothed_cross_entropy(logits, tf.constant([1]), 0.0)[0]) == 2e4
    assert float(losses.soft_cross_entropy(logits, tf.constant([[1.0, 0.0, 0.0]]))[0]) == 0.0


@pytest.mark.parametrize(
    "temperature, expected",
    [
        (1.0, [0.8, 0.2, 0.0]),
        (0.5, [0.64 / 0.68, 0.04 / 0.68, 0.0]),
        (2.0, [2 / 3, 1 / 3, 0.0]),
    ],
)
def test_sharpen(temperature, expected):
    probs = losses.sharpen(tf.constant([[0.8, 0.2, 0.0]]), temperature)
    np.testing.assert_allclose(probs, [expected], rtol=1e-6)


@pytest.mark.parametrize("temperature", [0.3, 0.5, 1.0, 2.0, 5.0])
def test_sharpened_probabilities_are_a_softmax_at_that_temperature(rng, temperature):
    logits = rng.normal(size=(16, 10)).astype(np.float32)
    sharpened = losses.sharpen(tf.nn.softmax(logits), temperature)
    np.testing.assert_allclose(sharpened, tf.nn.softmax(logits / temperature), rtol=1e-4)


def test_pseudo_label_loss_smooths_hard_labels_only():
    labels, probs = tf.constant([1]), tf.constant([[1.0, 0.0]])
    hard = losses.pseudo_label_loss(TWO, labels, None, smoothing=0.1)
    soft = losses.pseudo_label_loss(TWO, labels, probs, smoothing=0.1)
    assert float(hard[0]) == pytest.approx(0.95 * 0.287682 + 0.05 * 1.386294, rel=1e-5)
    assert float(soft[0]) == pytest.approx(math.log(4), rel=1e-6)


def test_weight_decay_leaves_batch_norm_out():
    variables = [
        tf.Variable([3.0, 4.0], name="stem_conv/kernel"),
        tf.Variable([2.0], name="blocks_0_se_reduce/bias"),
        tf.Variable([[1.0]], name="blocks_0_dw_conv/depthwise_kernel"),
        tf.Variable([100.0], name="stem_bn/gamma"),
        tf.Variable([100.0], name="stem_bn/beta"),
    ]
    decayed = losses.decayed_variables(variables)
    assert [v.name for v in decayed] == [v.name for v in variables[:3]]
    assert float(losses.half_squared_norm(decayed)) == 12.5 + 2.0 + 0.5


# --------------------------------------------------------------------------------------------------
# The original's numbers


@pytest.fixture(scope="module")
def inputs(goldens) -> dict[str, np.ndarray]:
    return dict(np.load(goldens / "losses" / "inputs.npz"))


@pytest.fixture(scope="module")
def cases(goldens) -> dict[str, dict]:
    entries = json.loads((goldens / "losses" / "losses.json").read_text())
    return {entry["name"]: entry for entry in entries}


def variables_of(inputs: dict[str, np.ndarray]) -> list[tf.Variable]:
    return [
        tf.Variable(value, name=key[len("var|") :])
        for key, value in inputs.items()
        if key.startswith("var|")
    ]


def student_half_squared_norm(case: dict) -> float:
    """The student's part of the original's weight decay, the only part with a gradient."""
    return sum(
        value
        for name, value in case["l2_loss_per_variable"].items()
        if not name.startswith("teacher_model/") and "batch_normalization" not in name
    )


def test_every_recorded_case_is_tested(cases):
    assert set(cases) == set(CASES)


@pytest.mark.parametrize("smoothing", ["0.1", "0"])
def test_labeled_loss_per_example_equals_original(inputs, smoothing):
    loss = losses.smoothed_cross_entropy(
        tf.constant(inputs["logits"][:NUM_LABELED]), inputs["labels"][:8], float(smoothing)
    )
    np.testing.assert_allclose(loss, inputs[f"lab_per_example_ls{smoothing}"], rtol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_losses_equal_original(inputs, cases, name):
    case, scalars = cases[name], cases[name]["scalars"]
    logits, labels = tf.constant(inputs["logits"]), inputs["labels"]
    temperature, smoothing = case["teacher_softmax_temp"], case["label_smoothing"]
    labeled = tf.reduce_mean(
        losses.smoothed_cross_entropy(logits[:NUM_LABELED], labels[:NUM_LABELED], smoothing)
    )
    assert float(labeled) == pytest.approx(scalars["lab/loss"], rel=5e-7)
    if not case["unlabel_ratio"]:
        return
    if case["teacher_model"]:
        teacher_logits = inputs["teacher_logits"][NUM_LABELED:]
        pseudo_labels = teacher_logits.argmax(-1)
        probs = tf.nn.softmax(teacher_logits / temperature)
    else:
        pseudo_labels = labels[NUM_LABELED:]
        probs = losses.sharpen(tf.constant(inputs["unl_probs"]), temperature)
    unlabeled = losses.pseudo_label_loss(
        logits[NUM_LABELED:],
        pseudo_labels,
        probs if temperature > 0 else None,
        smoothing=smoothing,
    )
    assert float(tf.reduce_mean(unlabeled)) == pytest.approx(scalars["ext/loss"], rel=5e-7)


@pytest.mark.parametrize("name", CASES)
def test_weight_decay_equals_original(inputs, cases, name):
    case = cases[name]
    variables = variables_of(inputs)
    decayed = losses.decayed_variables(variables)
    assert {v.name.split(":")[0] for v in decayed} == {
        v for v in case["trainable_variables"] if "batch_norm" not in v and "teacher" not in v
    }
    norm = float(losses.half_squared_norm(decayed))
    assert norm == pytest.approx(student_half_squared_norm(case), rel=1e-6)
    if not case["teacher_model"]:
        assert norm == pytest.approx(case["l2_sum_counted"], rel=1e-6)
        term = case["weight_decay"] * norm
        # `wd_term` is a difference of two float32 values near 18.
        assert term == pytest.approx(case["scalars"]["wd_term"], abs=2e-6)


class Given(tf.keras.Model):
    """Returns its images as logits and owns the variables that weight decay counts."""

    def __init__(self, variables: list[tf.Variable]):
        super().__init__()
        self.given = variables

    def call(self, images, training=False):
        return images


@pytest.mark.parametrize("name", CASES)
def test_reported_scalars_equal_original(inputs, cases, name):
    case = cases[name]
    logits, labels = inputs["logits"], inputs["labels"]
    batch = {
        "image": logits[:NUM_LABELED],
        "label": labels[:NUM_LABELED],
        "unl_image": logits[NUM_LABELED:],
        "unl_label": labels[NUM_LABELED:],
        "unl_probs": inputs["unl_probs"],
        "teacher_image": inputs["teacher_logits"][NUM_LABELED:],
    }
    trainer = student.NoisyStudent(
        Given(variables_of(inputs)),
        Given(variables_of(inputs)),
        TrainConfig(
            label_smoothing=case["label_smoothing"],
            weight_decay=case["weight_decay"],
            unlabel_ratio=case["unlabel_ratio"],
            teacher_softmax_temp=case["teacher_softmax_temp"],
        ),
        teacher=Given([]) if case["teacher_model"] else None,
    )
    trainer.compile(optimizers.RMSPropTF1(0.0))
    logs = {key: float(v) for key, v in trainer.train_step(batch_of(batch)).items()}

    expected = {k: v for k, v in case["scalars"].items() if k not in ("train/epoch", "wd_term")}
    # The original includes the teacher's weights in the reported value, but not in the gradient.
    expected["train/loss"] = expected["train/data_loss"] + case[
        "weight_decay"
    ] * student_half_squared_norm(case)
    if not case["teacher_model"]:
        assert expected["train/loss"] == pytest.approx(expected["spec.loss"], rel=1e-6)
    del expected["spec.loss"]
    assert logs == pytest.approx(expected, rel=1e-6)


def batch_of(arrays: dict[str, np.ndarray]) -> dict[str, tf.Tensor]:
    return {key: tf.constant(value) for key, value in arrays.items()}
