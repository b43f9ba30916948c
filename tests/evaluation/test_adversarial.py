"""FGSM and PGD on linear models, compared with their definitions in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from efficientnet_ns.data import pipeline
from efficientnet_ns.evaluation import accuracy, adversarial

SIZE, CLASSES, COUNT, BATCH = 4, 3, 11, 4


def linear(kernel: np.ndarray) -> tf.keras.Model:
    inputs = tf.keras.Input([SIZE, SIZE, 3])
    dense = tf.keras.layers.Dense(kernel.shape[1], use_bias=False)
    model = tf.keras.Model(inputs, dense(tf.keras.layers.Flatten()(inputs)))
    model.set_weights([kernel])
    return model


@pytest.fixture
def problem():
    """Returns pixels (some outside 0..255, as after bicubic resizing), labels and weights."""
    rng = np.random.default_rng(0)
    pixels = rng.uniform(-20, 275, [COUNT, SIZE, SIZE, 3]).astype(np.float32)
    kernel = rng.normal(0, 0.01, [SIZE * SIZE * 3, CLASSES]).astype(np.float32)
    logits = pixels.reshape(COUNT, -1) @ kernel
    # The model classifies about two thirds correctly.
    labels = np.where(rng.random(COUNT) < 0.7, logits.argmax(1), rng.integers(0, CLASSES, COUNT))
    return pixels, labels.astype(np.int32), kernel


def batches(pixels, labels, size=BATCH) -> tf.data.Dataset:
    count = len(labels)
    data = tf.data.Dataset.from_tensor_slices(
        {
            "image": pixels,
            "label": labels,
            "index": np.arange(count, dtype=np.int32),
            "mask": np.ones(count, np.float32),
        }
    ).batch(size)
    return data.map(lambda batch: pipeline.pad_batch(batch, size))


# NumPy reference, one image at a time.


def numpy_gradient(image, label, kernel):
    logits = image.reshape(-1).astype(np.float64) @ kernel.astype(np.float64)
    probs = np.exp(logits - logits.max())
    probs /= probs.sum()
    probs[label] -= 1
    return (kernel.astype(np.float64) @ probs).reshape(image.shape)


def numpy_project(image, clean, epsilon):
    result = image.copy()
    for place, value in np.ndenumerate(clean):
        low = max(value - epsilon, min(0.0, value))
        high = min(value + epsilon, max(255.0, value))
        result[place] = min(max(image[place], low), high)
    return result


def numpy_pgd(start, clean, label, kernel, epsilon, size, steps):
    image = numpy_project(start.astype(np.float64), clean, epsilon)
    for _ in range(steps):
        image = image + size * np.sign(numpy_gradient(image, label, kernel))
        image = numpy_project(image, clean, epsilon)
    return image


def right(images, labels, kernel) -> float:
    logits = np.stack(images).reshape(len(labels), -1) @ kernel.astype(np.float64)
    return np.mean(logits.argmax(1) == labels)


def starts(pixels, epsilon, seed=0):
    index = tf.range(len(pixels))
    return adversarial.random_start(tf.constant(pixels), index, epsilon, seed).numpy()


@pytest.mark.parametrize("epsilon", [0.5, 4, 30])
def test_as_numpy_attacks(problem, epsilon):
    pixels, labels, kernel = problem
    pgd = adversarial.Pgd(steps=5)
    found = adversarial.Attacker(linear(kernel), pgd=pgd)(batches(pixels, labels), COUNT, epsilon)
    fgsm, descent = [], []
    for image, start, label in zip(pixels, starts(pixels, epsilon), labels):
        step = epsilon * np.sign(numpy_gradient(image, label, kernel))
        fgsm.append(numpy_project(image + step, image, epsilon))
        descent.append(numpy_pgd(start, image, label, kernel, epsilon, 2.5 * epsilon / 5, 5))
    assert found == {
        "clean": pytest.approx(right(pixels, labels, kernel)),
        "fgsm": pytest.approx(right(fgsm, labels, kernel)),
        "pgd": pytest.approx(right(descent, labels, kernel)),
        "examples": COUNT,
    }
    if epsilon == 30:
        assert found["fgsm"] < found["clean"] and found["pgd"] < found["clean"]


def test_pixels_as_numpy_moves_them(problem):
    """Compares every pixel, not only the predictions."""
    pixels, labels, kernel = problem
    model, clean = linear(kernel), tf.constant(pixels)

    def gradient(images, of):
        return adversarial.loss_gradient(model, images, of)

    moved = adversarial.fgsm(gradient, clean, labels, 6.0).numpy()
    start = starts(pixels, 6.0)
    descended = adversarial.projected_descent(gradient, clean, labels, 6.0, 2.0, 4, start).numpy()
    for i, (image, label) in enumerate(zip(pixels, labels)):
        step = 6 * np.sign(numpy_gradient(image, label, kernel))
        np.testing.assert_allclose(moved[i], numpy_project(image + step, image, 6), atol=1e-3)
        expected = numpy_pgd(start[i], image, label, kernel, 6, 2, 4)
        np.testing.assert_allclose(descended[i], expected, atol=1e-3)
    for attacked in (moved, descended):
        assert np.abs(attacked - pixels).max() <= 6 + 1e-4
        inside = (pixels >= 0) & (pixels <= 255)
        assert attacked[inside].min() >= 0 and attacked[inside].max() <= 255


def test_two_classes_have_a_closed_form(problem):
    """The gradient's sign is independent of the pixels, so PGD ends in the corner FGSM reaches."""
    pixels, _, kernel = problem
    kernel = kernel[:, :2]
    labels = np.arange(COUNT, dtype=np.int32) % 2
    model, clean, epsilon = linear(kernel), tf.constant(pixels), 3.0
    away = np.sign(kernel[:, 1] - kernel[:, 0]).reshape(SIZE, SIZE, 3)
    sign = np.where(labels == 0, 1, -1)[:, None, None, None]
    corner = np.clip(
        pixels + epsilon * sign * away,
        np.minimum(pixels, np.maximum(pixels - epsilon, 0)),
        np.maximum(pixels, np.minimum(pixels + epsilon, 255)),
    )

    def gradient(images, of):
        return adversarial.loss_gradient(model, images, of)

    moved = adversarial.fgsm(gradient, clean, labels, epsilon)
    np.testing.assert_allclose(moved, corner, atol=1e-4)
    start = starts(pixels, epsilon)
    far = adversarial.projected_descent(gradient, clean, labels, epsilon, 1.5, 5, start)
    np.testing.assert_allclose(far, corner, atol=1e-4)


def test_a_sure_model_is_attacked_too():
    """The gradient of its cross-entropy is exactly 0 in float32."""
    kernel = np.zeros([SIZE * SIZE * 3, CLASSES], np.float32)
    kernel[:, 0], kernel[:, 1] = 1, -1
    pixels = np.full([1, SIZE, SIZE, 3], 100, np.float32)
    logits = linear(kernel)(pixels)
    assert tf.nn.softmax(logits)[0, 0] == 1
    gradient = adversarial.loss_gradient(linear(kernel), tf.constant(pixels), tf.constant([0]))
    np.testing.assert_array_equal(np.sign(gradient), -1)


def test_no_room_is_the_clean_image(problem):
    pixels, labels, kernel = problem
    model = linear(kernel)
    found = adversarial.Attacker(model)(batches(pixels, labels), COUNT, 0)
    clean = accuracy.Evaluator(model)(batches(pixels, labels), COUNT)["top1"]
    assert found == {"clean": clean, "fgsm": clean, "pgd": clean, "examples": COUNT}


def nonlinear() -> tf.keras.Model:
    tf.keras.utils.set_random_seed(3)
    layers = [tf.keras.layers.Flatten(), tf.keras.layers.Rescaling(0.01)]
    layers += [tf.keras.layers.Dense(16, "tanh"), tf.keras.layers.Dense(CLASSES)]
    return tf.keras.Sequential([tf.keras.Input([SIZE, SIZE, 3]), *layers])


def test_results_repeat_on_any_batches(problem):
    pixels, labels, _ = problem
    attacker = adversarial.Attacker(nonlinear(), pgd=adversarial.Pgd(steps=3, seed=5))
    first = attacker(batches(pixels, labels), COUNT, 8)
    assert attacker(batches(pixels, labels), COUNT, 8) == first
    assert attacker(batches(pixels, labels, 11), COUNT, 8) == first


@pytest.mark.slow
def test_results_are_the_same_compiled_and_on_several_devices(problem):
    pixels, labels, _ = problem
    pgd = adversarial.Pgd(steps=3, seed=5)
    first = adversarial.Attacker(nonlinear(), pgd=pgd)(batches(pixels, labels), COUNT, 8)
    compiled = adversarial.Attacker(nonlinear(), pgd=pgd, jit_compile=True)
    assert compiled(batches(pixels, labels), COUNT, 8) == first
    strategy = tf.distribute.MirroredStrategy(
        [f"CPU:{i}" for i in range(4)], cross_device_ops=tf.distribute.ReductionToOneDevice()
    )
    with strategy.scope():
        model = nonlinear()
    assert adversarial.Attacker(model, strategy, pgd)(batches(pixels, labels), COUNT, 8) == first


def test_starts_belong_to_the_image_and_the_seed(problem):
    pixels = problem[0]
    whole = starts(pixels, 2.0)
    assert np.abs(whole - pixels).max() <= 2 and np.abs(whole - pixels).mean() > 0.9
    part = adversarial.random_start(tf.constant(pixels[5:7]), tf.constant([5, 6]), 2.0, 0)
    np.testing.assert_array_equal(part, whole[5:7])
    noise = (whole - pixels)[:2]
    assert not np.allclose(noise[0], noise[1])
    assert not np.allclose(starts(pixels, 2.0, seed=1), whole)


def test_step_size():
    assert adversarial.Pgd(steps=10).size(16) == 4
    assert adversarial.Pgd(steps=10, step_size=1.5).size(16) == 1.5


def test_missing_examples_are_noticed(problem):
    pixels, labels, kernel = problem
    with pytest.raises(accuracy.IncompleteEvaluation, match=f"saw {COUNT} .* has {COUNT + 1}"):
        adversarial.Attacker(linear(kernel))(batches(pixels, labels), COUNT + 1, 1)
