"""Accuracy over padded batches counts every example once and agrees with NumPy."""

from __future__ import annotations

import threading
import tracemalloc

import numpy as np
import pytest
import tensorflow as tf

from efficientnet_ns.data import pipeline
from efficientnet_ns.evaluation import accuracy
from efficientnet_ns.inference import engines

BATCH, CLASSES = 8, 7


def passing_logits() -> tf.keras.Model:
    """A model whose "images" are its logits."""
    inputs = tf.keras.Input([CLASSES])
    return tf.keras.Model(inputs, tf.keras.layers.Activation("linear")(inputs))


def batches(logits: np.ndarray, labels: np.ndarray, batch_size: int = BATCH) -> tf.data.Dataset:
    examples = {
        "image": logits.astype(np.float32),
        "label": labels.astype(np.int32),
        "mask": np.ones(len(labels), np.float32),
    }
    data = tf.data.Dataset.from_tensor_slices(examples).batch(batch_size)
    return data.map(lambda batch: pipeline.pad_batch(batch, batch_size))


def examples(rng: np.random.Generator, size: int, classes: int = CLASSES):
    return 3 * rng.standard_normal([size, classes]), rng.integers(0, classes, size)


def by_numpy(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    order = np.argsort(-logits, axis=1)
    own = logits[np.arange(len(labels)), labels]
    return {
        "top1": np.mean(order[:, 0] == labels),
        "top5": np.mean(np.any(order[:, :5] == labels[:, None], axis=1)),
        "loss": np.mean(np.log(np.sum(np.exp(logits), axis=1)) - own),
        "examples": len(labels),
    }


@pytest.fixture(scope="module")
def evaluator() -> accuracy.Evaluator:
    return accuracy.Evaluator(passing_logits())


@pytest.fixture(scope="module")
def evaluator_of_two(two_replicas) -> accuracy.Evaluator:
    with two_replicas.scope():
        model = passing_logits()
    return accuracy.Evaluator(model, two_replicas)


@pytest.mark.parametrize("size", [1, BATCH - 1, BATCH, BATCH + 1, 5 * BATCH + 3])
def test_as_numpy_counts(evaluator, rng, size):
    logits, labels = examples(rng, size)
    result = evaluator(batches(logits, labels), size)
    expected = by_numpy(logits, labels)
    assert result["examples"] == size
    for key in ("top1", "top5"):
        assert round(result[key] * size, 9) == round(expected[key] * size, 9)
    assert result == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("size", [1, BATCH - 1, BATCH, BATCH + 1])
def test_two_replicas_give_the_same_numbers(evaluator, evaluator_of_two, rng, size):
    logits, labels = examples(rng, size)
    alone = evaluator(batches(logits, labels), size)
    shared = evaluator_of_two(batches(logits, labels), size)
    assert shared == pytest.approx(alone, rel=1e-6)
    assert {key: shared[key] for key in ("top1", "top5", "examples")} == {
        key: alone[key] for key in ("top1", "top5", "examples")
    }


def test_again_and_again(evaluator, rng):
    """No state is left from one evaluation to the next."""
    first, second = examples(rng, 5), examples(rng, 11)
    before = evaluator(batches(*first), 5)
    evaluator(batches(*second), 11)
    assert evaluator(batches(*first), 5) == before


def test_later_weights_are_seen():
    model = tf.keras.Sequential([tf.keras.Input([3]), tf.keras.layers.Dense(3, use_bias=False)])
    evaluator = accuracy.Evaluator(model)
    data = batches(np.eye(3), np.arange(3))
    model.set_weights([np.eye(3)])
    assert evaluator(data, 3)["top1"] == 1.0
    model.set_weights([-np.eye(3)])
    assert evaluator(data, 3)["top1"] == 0.0


def test_fewer_than_five_classes(rng):
    inputs = tf.keras.Input([3])
    model = tf.keras.Model(inputs, tf.keras.layers.Activation("linear")(inputs))
    logits, labels = examples(rng, 10, classes=3)
    assert accuracy.Evaluator(model)(batches(logits, labels), 10)["top5"] == 1.0


@pytest.mark.parametrize("claimed", [BATCH, BATCH + 2])
def test_another_number_of_examples(evaluator, rng, claimed):
    logits, labels = examples(rng, BATCH + 1)
    message = f"saw {BATCH + 1} examples, but the set has {claimed}"
    with pytest.raises(accuracy.IncompleteEvaluation, match=message):
        evaluator(batches(logits, labels), claimed)


def test_nan_logits_are_misses(evaluator, rng):
    logits, labels = examples(rng, 6)
    sure = np.eye(CLASSES)[labels] * 20 + logits
    assert evaluator(batches(sure, labels), 6)["top1"] == 1.0
    broken = sure.copy()
    broken[1] = np.nan
    broken[4] = np.nan
    result = evaluator(batches(broken, labels), 6)
    assert (result["top1"], result["top5"]) == (4 / 6, 4 / 6)
    assert np.isnan(result["loss"])


def test_description():
    metrics = {"top1": 0.8861, "top5": 0.9957, "loss": 0.5661, "examples": 500}
    described = accuracy.describe(metrics)
    assert described == "top-1 88.6%, top-5 99.6%, loss 0.566 on 500 examples"


def test_ties_are_not_all_hits(evaluator):
    """Equal logits predict the first class, like argmax."""
    labels = np.arange(CLASSES, dtype=np.int32)
    logits = np.zeros([CLASSES, CLASSES], np.float32)
    measured = evaluator(batches(logits, labels), CLASSES)
    assert measured["top1"] == pytest.approx(1 / CLASSES)
    assert measured["top5"] == pytest.approx(5 / CLASSES)


# Detailed measurements.


def details_by_numpy(logits: np.ndarray, labels: np.ndarray):
    """Computes confusion matrix, ECE and accuracy per class, one example at a time."""
    probs = np.exp(logits.astype(np.float64))
    probs /= probs.sum(1, keepdims=True)
    confusion = np.zeros([CLASSES, CLASSES], int)
    bins = [[] for _ in range(15)]
    for row, label in zip(probs, labels):
        answer = int(np.argmax(row))
        confusion[label, answer] += 1
        place = next(b for b in range(15) if row[answer] <= (b + 1) / 15 or b == 14)
        bins[place].append((row[answer], answer == label))
    ece = 0.0
    for rows in filter(None, bins):
        confidence, right = np.mean(rows, axis=0)
        ece += len(rows) / len(labels) * abs(confidence - right)
    accuracy_of = [np.mean(np.argmax(probs[labels == c], 1) == c) for c in range(CLASSES)]
    return confusion, ece, accuracy_of


def matrix(measured: accuracy.Measured) -> np.ndarray:
    dense = np.zeros([measured.num_classes] * 2, int)
    dense[measured.confusion.truth, measured.confusion.predicted] = measured.confusion.images
    return dense


@pytest.mark.parametrize("size", [60, 5 * BATCH + 3])
def test_details_as_numpy_counts(evaluator, evaluator_of_two, rng, size):
    logits, labels = examples(rng, size)
    confusion, ece, per_class = details_by_numpy(logits, labels)
    for one in (evaluator, evaluator_of_two):
        measured = one.measure(batches(logits, labels), size)
        np.testing.assert_array_equal(matrix(measured), confusion)
        assert measured.calibration.error == pytest.approx(ece, rel=1e-5)
        np.testing.assert_allclose(measured.per_class, per_class)
        assert measured.metrics["top1"] == pytest.approx(np.trace(confusion) / size)
        assert measured.calibration.images.sum() == size
        np.testing.assert_array_equal(measured.images, confusion.sum(1))


def test_a_class_without_images_has_no_accuracy(evaluator, rng):
    logits, labels = examples(rng, 20)
    measured = evaluator.measure(batches(logits, labels % 3), 20)
    assert np.isnan(measured.per_class[3:]).all() and not np.isnan(measured.per_class[:3]).any()


def test_memory_does_not_grow_with_the_square_of_the_classes():
    """A matrix would take 80 GB, and its flat indices would overflow 32 bits."""
    classes = 100_000
    inputs = tf.keras.Input([1])
    logits = tf.keras.layers.Lambda(lambda x: tf.one_hot(tf.cast(x[:, 0], tf.int32), classes))
    evaluator = accuracy.Evaluator(tf.keras.Model(inputs, logits(inputs)))
    labels = np.array([99_999, 46_341, 99_999, 0, 99_999])
    answers = np.array([[99_998], [46_341], [99_998], [99_999], [99_999]])
    tracemalloc.start()
    measured = evaluator.measure(batches(answers, labels), 5)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6, "NumPy's arrays"
    pairs = [(0, 99_999, 1), (46_341, 46_341, 1), (99_999, 99_998, 2), (99_999, 99_999, 1)]
    assert list(zip(*measured.confusion)) == pairs
    assert measured.metrics["top1"] == pytest.approx(2 / 5)
    assert (measured.per_class[0], measured.per_class[46_341]) == (0, 1)
    assert measured.per_class[99_999] == pytest.approx(1 / 3) and measured.images.sum() == 5


def test_four_devices_count_every_example(rng):
    strategy = tf.distribute.MirroredStrategy(
        [f"CPU:{i}" for i in range(4)], cross_device_ops=tf.distribute.ReductionToOneDevice()
    )
    with strategy.scope():
        evaluator = accuracy.Evaluator(passing_logits(), strategy)
    for size in (1, 7, BATCH, 3 * BATCH + 5):
        logits, labels = examples(rng, size)
        measured = evaluator.measure(batches(logits, labels), size)
        assert measured.metrics["examples"] == size
        np.testing.assert_array_equal(matrix(measured), details_by_numpy(logits, labels)[0])


def test_an_engine_computes_the_same(evaluator, rng):
    logits, labels = examples(rng, 13)
    # Broken after the timeout unless four calls overlap.
    barrier = threading.Barrier(4, timeout=30)

    def worker(pixels):
        barrier.wait()
        return tf.nn.softmax(pixels).numpy()

    engine = engines.CpuEngine("waits for the others", 2, [worker] * 4)
    # Each batch of 8 rows is divided into 4 parts.
    other = accuracy.Evaluator(passing_logits(), classify=engines.on_all_workers(engine))
    measured = other.measure(batches(logits, labels), 13)
    expected = evaluator.measure(batches(logits, labels), 13)
    assert measured.metrics == pytest.approx(expected.metrics, rel=1e-5)
    np.testing.assert_array_equal(matrix(measured), matrix(expected))


def test_an_engine_answers_calls_too(rng):
    """The engine replaces the model, whose predictions would be wrong here."""
    _, labels = examples(rng, 13)
    logits = np.eye(CLASSES)[(labels + 1) % CLASSES]
    classify = lambda pixels: np.roll(pixels, -1, axis=1)  # noqa: E731
    assert accuracy.Evaluator(passing_logits(), classify=classify)(batches(logits, labels), 13) == {
        "top1": 1.0,
        "top5": 1.0,
        "loss": pytest.approx(0),
        "examples": 13,
    }


def test_mirrored_view_is_averaged():
    """A model that looks at the left edge sees the right edge in the mirrored view."""
    inputs = tf.keras.Input([2, 2, 3])
    model = tf.keras.Model(inputs, tf.keras.layers.Lambda(lambda x: x[:, 0, 0])(inputs))
    pixels = np.zeros([1, 2, 2, 3], np.float32)
    pixels[0, :, 0], pixels[0, :, 1] = (1, 0, 0), (0, 9, 0)
    batch = tf.data.Dataset.from_tensors(
        {"image": pixels, "label": np.array([1], np.int32), "mask": np.ones(1, np.float32)}
    )
    assert accuracy.Evaluator(model)(batch, 1)["top1"] == 0
    measured = accuracy.Evaluator(model, views=2)(batch, 1)
    left, right = (np.exp(v)[1] / np.exp(v).sum() for v in (pixels[0, 0, 0], pixels[0, 0, 1]))
    assert measured["top1"] == 1
    assert measured["loss"] == pytest.approx(-np.log((left + right) / 2), rel=1e-5)
    with pytest.raises(ValueError, match="views is 3"):
        accuracy.Evaluator(model, views=3)
