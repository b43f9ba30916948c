"""Measures accuracy, counting every example exactly once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import NamedTuple, TypeAlias

import numpy as np
import tensorflow as tf

from efficientnet_ns.inference import views as views_lib
from efficientnet_ns.report.measures import Calibration, Confusion

# As returned by `pipeline.eval_batches`.
Batches: TypeAlias = tf.data.Dataset | Callable[[tf.distribute.InputContext], tf.data.Dataset]

# Keeps logarithms finite. An export returns zeros for padding, whose loss would be NaN even after
# multiplication by the mask.
_TINY = 1e-30
# Outputs of a step that have one row per image; all other outputs are sums over the batch.
_PREDICTIONS, _CONFIDENCE = "predictions", "confidence"


class IncompleteEvaluation(RuntimeError):
    """Raised if the number of examples seen differs from the size of the set."""


class Measured(NamedTuple):
    """Measurements on one set.

    Attributes:
      metrics: `top1` and `top5` (fractions; top-5 counts min(5, C) classes), `loss` (mean
        cross-entropy without label smoothing), `examples`.
      confusion: images by true class and prediction.
      calibration: images, confidence and correct predictions by top-1 probability.
      num_classes: C, the number of the model's classes.
    """

    metrics: dict[str, float]
    confusion: Confusion
    calibration: Calibration
    num_classes: int

    @property
    def images(self) -> np.ndarray:
        """Number of images of each class, int64 [C]."""
        return self._by_class(self.confusion.images)

    @property
    def per_class(self) -> np.ndarray:
        """Accuracy of each class, float64 [C]; NaN for a class without images."""
        truth, predicted, images = self.confusion
        right = self._by_class(np.where(truth == predicted, images, 0))
        return np.where(self.images > 0, right / np.maximum(self.images, 1), np.nan)

    def _by_class(self, images: np.ndarray) -> np.ndarray:
        # Weighted counts are float64.
        return np.bincount(self.confusion.truth, images, self.num_classes).astype(np.int64)


class Evaluator:
    """Computes top-1, top-5 and loss of a model; may be called repeatedly while the model trains.

    Args:
      model: pixels → logits.
      strategy: the strategy under which the model was built.
      views: 1, or 2 to average the probabilities of the image and its mirror image.
      classify: pixels → probabilities, on one device, instead of the model; see
        `engines.on_all_workers`.
    """

    def __init__(
        self,
        model: tf.keras.Model,
        strategy: tf.distribute.Strategy | None = None,
        *,
        views: int = 1,
        classify: Callable[[np.ndarray], np.ndarray] | None = None,
    ):
        self._strategy = strategy or tf.distribute.get_strategy()
        if views not in views_lib.CROP_VIEWS:
            raise ValueError(f"views is {views}; it must be 1 or 2 (mirrored)")
        forward = functools.partial(model, training=False)

        def compiled(batch):
            return _measures(_logits(forward, batch["image"], views), batch)

        def by_function(batch):
            def logits(pixels):
                # Logits are defined up to a constant, so log-probabilities are logits.
                return tf.math.log(tf.maximum(classify(pixels.numpy()), _TINY))

            return _measures(_logits(logits, batch["image"], views), batch)

        gathered = (_PREDICTIONS, _CONFIDENCE)
        # tf.function cannot trace a NumPy function, so its step runs eagerly.
        self._step = by_function if classify else replicated(self._strategy, compiled, gathered)
        self._num_classes = model.output_shape[-1]

    def __call__(self, batches: Batches, num_examples: int) -> dict[str, float]:
        """Returns the `metrics` of `measure`."""
        return self.measure(batches, num_examples).metrics

    def measure(self, batches: Batches, num_examples: int) -> Measured:
        """Measures one set, using 20 bytes per image regardless of the number of classes.

        Args:
          batches: padded batches with a mask; see `pipeline.eval_batches`. Either a dataset of all
            batches, on one host, or a function that returns one host's share of them.
          num_examples: size of the set.

        Raises:
          IncompleteEvaluation: If the batches contain more or fewer examples.
        """
        predictions, confidence = [], []

        def step(batch):
            sums = dict(self._step(batch))
            # Kept per image: two int64 and a float32, 20 bytes. `add_up` sums all other values.
            predictions.append(sums.pop(_PREDICTIONS).numpy())
            confidence.append(sums.pop(_CONFIDENCE).numpy())
            return sums

        # Also fills the two lists above, through `step`.
        metrics = means(add_up(self._strategy, step, batches), num_examples)
        truth, predicted = np.concatenate(predictions).T
        # `_measures` sets the truth of padding to -1.
        real = truth >= 0
        truth, predicted = truth[real], predicted[real]
        return Measured(
            metrics,
            Confusion.tally(truth, predicted),
            Calibration.tally(np.concatenate(confidence)[real], truth == predicted),
            self._num_classes,
        )


def replicated(
    strategy: tf.distribute.Strategy, measures: Callable, gathered: Collection[str] = ()
) -> Callable:
    """Compiles a step that runs `measures(batch, *more)` on every replica and sums each value.

    Args:
      strategy: the replicas.
      measures: returns values by name.
      gathered: names of values whose rows are concatenated instead.
    """

    @tf.function
    def step(batch, *more):
        partial = strategy.run(measures, args=(batch, *more))
        # Over replicas only (axis None), because `measures` has summed over the rows.
        total = tf.distribute.ReduceOp.SUM
        return {
            key: strategy.gather(value, 0)
            if key in gathered
            else strategy.reduce(total, value, None)
            for key, value in partial.items()
        }

    return step


def add_up(
    strategy: tf.distribute.Strategy, step: Callable, batches: Batches
) -> dict[str, np.ndarray]:
    """Sums the values of `step(batch)` over all batches, in float64.

    Args:
      strategy: the replicas that the batches are distributed to.
      step: maps a distributed batch to values by name; see `replicated`.
      batches: see `Evaluator.measure`.
    """
    sums: dict[str, np.ndarray] = {}
    if callable(batches):
        distributed = strategy.distribute_datasets_from_function(batches)
    else:
        distributed = strategy.experimental_distribute_dataset(batches)
    for batch in distributed:
        for key, value in step(batch).items():
            # A float32 sum of ones stops growing at 2**24.
            sums[key] = sums.get(key, 0.0) + np.asarray(value, np.float64)
    return sums


def means(sums: dict[str, np.ndarray], num_examples: int) -> dict[str, float]:
    """Divides every sum by the sum `examples`.

    Raises:
      IncompleteEvaluation: If `examples` differs from `num_examples`.
    """
    seen = round(float(sums.pop("examples")))
    if seen != num_examples:
        raise IncompleteEvaluation(f"saw {seen} examples, but the set has {num_examples}")
    return {**{key: float(value) / seen for key, value in sums.items()}, "examples": seen}


def _logits(forward, pixels: tf.Tensor, views: int) -> tf.Tensor:
    # Converting to probabilities and back would limit the loss of confident mistakes at _TINY.
    if views == 1:
        return forward(pixels)
    probabilities = views_lib.average(
        lambda view: tf.nn.softmax(forward(view)), views_lib.of_crops(pixels, views)
    )
    return tf.math.log(tf.maximum(probabilities, _TINY))


def _measures(logits: tf.Tensor, batch: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    """Returns sums over the batch and two values per image.

    Per image: (truth, prediction), int64 [B, 2], where the truth of padding is -1; and the
    confidence, float32 [B].
    """
    labels, mask = batch["label"], batch["mask"]
    k = min(5, logits.shape[-1])
    # NaN logits count as misses; ties go to the lower class, as everywhere in this package.
    finite = tf.reduce_all(tf.math.is_finite(logits), -1)
    top_classes = tf.math.top_k(logits, k).indices
    hits = (top_classes == labels[:, None]) & finite[:, None]
    truth = tf.where(mask > 0, labels, -1)
    return {
        "top1": tf.reduce_sum(mask * tf.cast(hits[:, 0], tf.float32)),
        "top5": tf.reduce_sum(mask * tf.cast(tf.reduce_any(hits, -1), tf.float32)),
        "loss": tf.reduce_sum(
            mask * tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)
        ),
        "examples": tf.reduce_sum(mask),
        _PREDICTIONS: tf.cast(tf.stack([truth, top_classes[:, 0]], 1), tf.int64),
        _CONFIDENCE: tf.reduce_max(tf.nn.softmax(logits), -1),
    }


def describe(metrics: dict[str, float]) -> str:
    """Formats metrics: `top-1 88.6%, top-5 99.6%, loss 0.566 on 500 examples`."""
    return (
        f"top-1 {metrics['top1']:.1%}, top-5 {metrics['top5']:.1%}, "
        f"loss {metrics['loss']:.3f} on {metrics['examples']} examples"
    )
