"""Accuracy over every example exactly once."""

from __future__ import annotations

from collections.abc import Callable

import tensorflow as tf


class IncompleteEvaluation(RuntimeError):
    """The number of examples seen is not the number of examples there are."""


class Evaluator:
    """Top-1, top-5 and loss of a model; may be called again and again while the model learns.

    Args:
      model: pixels → logits.
      strategy: the one the model was built under.
    """

    def __init__(self, model: tf.keras.Model, strategy: tf.distribute.Strategy | None = None):
        self._strategy = strategy or tf.distribute.get_strategy()

        @tf.function
        def step(batch):
            partial = self._strategy.run(_batch_sums, args=(model, batch))
            total = tf.distribute.ReduceOp.SUM
            return {k: self._strategy.reduce(total, v, None) for k, v in partial.items()}

        self._step = step

    def __call__(
        self,
        batches: tf.data.Dataset | Callable[[tf.distribute.InputContext], tf.data.Dataset],
        num_examples: int,
    ) -> dict[str, float]:
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
        sums = {"top1": 0.0, "top5": 0.0, "loss": 0.0, "examples": 0.0}
        if callable(batches):
            distributed = self._strategy.distribute_datasets_from_function(batches)
        else:
            distributed = self._strategy.experimental_distribute_dataset(batches)
        for batch in distributed:
            for key, value in self._step(batch).items():
                sums[key] += float(value)
        seen = round(sums.pop("examples"))
        if seen != num_examples:
            raise IncompleteEvaluation(f"saw {seen} examples, but the set has {num_examples}")
        return {**{key: value / seen for key, value in sums.items()}, "examples": seen}


def _batch_sums(model: tf.keras.Model, batch: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    logits = model(batch["image"], training=False)
    labels, mask = batch["label"], batch["mask"]
    k = min(5, logits.shape[-1])
    # NaN logits count as misses, ties go to the first class, as wherever one class is answered.
    finite = tf.reduce_all(tf.math.is_finite(logits), -1)
    top_classes = tf.math.top_k(logits, k).indices
    hits = (top_classes == labels[:, None]) & finite[:, None]
    return {
        "top1": tf.reduce_sum(mask * tf.cast(hits[:, 0], tf.float32)),
        "top5": tf.reduce_sum(mask * tf.cast(tf.reduce_any(hits, -1), tf.float32)),
        "loss": tf.reduce_sum(
            mask * tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)
        ),
        "examples": tf.reduce_sum(mask),
    }


def describe(metrics: dict[str, float]) -> str:
    """`top-1 88.6%, top-5 99.6%, loss 0.566 on 500 examples`."""
    return (
        f"top-1 {metrics['top1']:.1%}, top-5 {metrics['top5']:.1%}, "
        f"loss {metrics['loss']:.3f} on {metrics['examples']} examples"
    )
