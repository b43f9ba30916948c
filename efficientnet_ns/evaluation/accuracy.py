"""Accuracy over every example exactly once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, Union

import numpy as np
import tensorflow as tf

Batches = Union[
    tf.data.Dataset, Callable[[tf.distribute.InputContext], tf.data.Dataset]
]  # Of `pipeline.eval_batches`.

_TINY = 1e-30


class IncompleteEvaluation(RuntimeError):
    """The number of examples seen is not the number of examples there are."""


CALIBRATION_BINS = 15


class Measured(NamedTuple):
    """One set, looked at closely.

    Attributes:
      metrics: see `Evaluator.__call__`, and `ece`, the expected calibration error.
      confusion: images by true class and answer, int64 [C, C].
      bins: images, summed confidence and right answers in 15 equal intervals (lower, upper] of the
        top-1 probability, float64 [3, 15].
    """

    metrics: dict[str, float]
    confusion: np.ndarray
    bins: np.ndarray

    @property
    def per_class(self) -> np.ndarray:
        """Accuracy of each class, float64 [C]; NaN for a class without images."""
        images = self.confusion.sum(1)
        right = np.diag(self.confusion)
        return np.where(images > 0, right / np.maximum(images, 1), np.nan)

    def confused(self, limit: int = 20) -> list[tuple[int, int, int]]:
        """(true class, answer, images) of the most frequent mistakes."""
        wrong = self.confusion * ~np.eye(len(self.confusion), dtype=bool)
        worst = np.argsort(-wrong, axis=None, kind="stable")[:limit]
        pairs = zip(*np.unravel_index(worst, wrong.shape))
        return [(int(t), int(a), int(wrong[t, a])) for t, a in pairs if wrong[t, a]]


class Evaluator:
    """Top-1, top-5 and loss of a model; may be called again and again while the model learns.

    Args:
      model: pixels → logits.
      strategy: the one the model was built under.
      views: 1, or 2: probabilities are averaged with those of the mirrored image.
      engine: computes the probabilities in place of the model, on one device; see `models.engines`.
    """

    def __init__(
        self,
        model: tf.keras.Model,
        strategy: tf.distribute.Strategy | None = None,
        *,
        views: int = 1,
        engine: Callable[[np.ndarray], np.ndarray] | None = None,
    ):
        self._strategy = strategy or tf.distribute.get_strategy()
        if views not in (1, 2):
            raise ValueError(f"views is {views}; it must be 1 or 2 (mirrored)")
        forward = functools.partial(model, training=False)

        def make_step(detailed: bool):
            def sums(batch):
                return _batch_sums(_logits(forward, batch["image"], views), batch, detailed)

            return replicated(self._strategy, sums)

        def engine_step(batch):
            def answer(pixels):
                # Logarithms of probabilities are logits of them.
                return tf.math.log(tf.maximum(engine(pixels.numpy()), _TINY))

            return _batch_sums(_logits(answer, batch["image"], views), batch, True)

        self._step = make_step(detailed=False)
        self._detailed_step = engine_step if engine else make_step(detailed=True)

    def __call__(self, batches: Batches, num_examples: int) -> dict[str, float]:
        """Measures one set.

        Args:
          batches: padded batches with a mask; see `pipeline.eval_batches`. Either whole batches, on
            one host, or what makes one host's share of them.
          num_examples: size of the set.

        Returns:
          `top1`, `top5` (fractions; top-5 is over min(5, classes)), `loss` (mean cross entropy
          without smoothing), `examples`.

        Raises:
          IncompleteEvaluation: the batches held more or fewer examples.
        """
        return means(add_up(self._strategy, self._step, batches), num_examples)

    def measure(self, batches: Batches, num_examples: int) -> Measured:
        """As a call, with answers by class and the calibration (Guo et al. 2017, equation 3)."""
        sums = add_up(self._strategy, self._detailed_step, batches)
        confusion, bins = sums.pop("confusion"), sums.pop("bins")
        metrics = means(sums, num_examples)
        metrics["ece"] = float(np.abs(bins[1] - bins[2]).sum() / metrics["examples"])
        return Measured(metrics, np.rint(confusion).astype(np.int64), bins)


def replicated(strategy: tf.distribute.Strategy, sums: Callable) -> Callable:
    """A compiled step: `sums(batch, *more)` on every replica, each of its values added up."""

    @tf.function
    def step(batch, *more):
        partial = strategy.run(sums, args=(batch, *more))
        total = tf.distribute.ReduceOp.SUM
        return {key: strategy.reduce(total, value, None) for key, value in partial.items()}

    return step


def add_up(
    strategy: tf.distribute.Strategy, step: Callable, batches: Batches
) -> dict[str, np.ndarray]:
    """The sums of `step(batch)` over all batches, float64."""
    sums: dict[str, np.ndarray] = {}
    if callable(batches):
        distributed = strategy.distribute_datasets_from_function(batches)
    else:
        distributed = strategy.experimental_distribute_dataset(batches)
    for batch in distributed:
        for key, value in step(batch).items():
            sums[key] = sums.get(key, 0.0) + np.asarray(value, np.float64)
    return sums


def means(sums: dict[str, np.ndarray], num_examples: int) -> dict[str, float]:
    """Every sum over the `examples` counted beside it.

    Raises:
      IncompleteEvaluation: there were more or fewer than `num_examples`.
    """
    seen = round(float(sums.pop("examples")))
    if seen != num_examples:
        raise IncompleteEvaluation(f"saw {seen} examples, but the set has {num_examples}")
    return {**{key: float(value) / seen for key, value in sums.items()}, "examples": seen}


def _logits(forward, pixels: tf.Tensor, views: int) -> tf.Tensor:
    if views == 1:
        return forward(pixels)
    both = tf.nn.softmax(forward(pixels)) + tf.nn.softmax(forward(tf.reverse(pixels, [2])))
    return tf.math.log(tf.maximum(both / 2, _TINY))


def _batch_sums(
    logits: tf.Tensor, batch: dict[str, tf.Tensor], detailed: bool
) -> dict[str, tf.Tensor]:
    labels, mask = batch["label"], batch["mask"]
    k = min(5, logits.shape[-1])
    # NaN logits count as misses, ties go to the first class, as wherever one class is answered.
    finite = tf.reduce_all(tf.math.is_finite(logits), -1)
    top_classes = tf.math.top_k(logits, k).indices
    hits = (top_classes == labels[:, None]) & finite[:, None]
    sums = {
        "top1": tf.reduce_sum(mask * tf.cast(hits[:, 0], tf.float32)),
        "top5": tf.reduce_sum(mask * tf.cast(tf.reduce_any(hits, -1), tf.float32)),
        "loss": tf.reduce_sum(
            mask * tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)
        ),
        "examples": tf.reduce_sum(mask),
    }
    if detailed:
        sums.update(_details(logits, top_classes[:, 0], hits[:, 0], labels, mask))
    return sums


def _details(logits, answers, right, labels, mask) -> dict[str, tf.Tensor]:
    classes = logits.shape[-1]
    pairs = labels * classes + answers
    confusion = tf.math.unsorted_segment_sum(mask, pairs, classes * classes)
    confidence = tf.reduce_max(tf.nn.softmax(logits), -1)
    upper = tf.constant(np.arange(1, CALIBRATION_BINS) / CALIBRATION_BINS, tf.float32)
    index = tf.reduce_sum(tf.cast(confidence[:, None] > upper, tf.int32), -1)
    values = (tf.ones_like(mask), confidence, tf.cast(right, tf.float32))
    bins = [tf.math.unsorted_segment_sum(mask * v, index, CALIBRATION_BINS) for v in values]
    return {"confusion": tf.reshape(confusion, [classes, classes]), "bins": tf.stack(bins)}


def describe(metrics: dict[str, float]) -> str:
    """`top-1 88.6%, top-5 99.6%, loss 0.566 on 500 examples`."""
    return (
        f"top-1 {metrics['top1']:.1%}, top-5 {metrics['top5']:.1%}, "
        f"loss {metrics['loss']:.3f} on {metrics['examples']} examples"
    )
