"""The losses of Noisy Student as pure functions on tensors (arXiv 1911.04252, algorithm 1).

Three forms of the joint loss are published: algorithm 1 adds the two means, the text averages over
the joint batch, and the original code adds `unlabel_ratio` times the unlabeled mean.
`student.NoisyStudent` uses the code's form, which produced the published numbers.
"""

from __future__ import annotations

from collections.abc import Iterable

import tensorflow as tf


def smoothed_cross_entropy(logits: tf.Tensor, labels: tf.Tensor, smoothing: float) -> tf.Tensor:
    """Computes cross entropy per example against one-hot labels mixed with a uniform distribution.

    Args:
      logits: float32 [N, C].
      labels: int [N], in 0..C-1.
      smoothing: weight of the uniform distribution, in [0, 1); 0.1 in the paper.

    Returns:
      float32 [N].
    """
    num_classes = logits.shape[-1]
    targets = tf.one_hot(labels, num_classes) * (1.0 - smoothing) + smoothing / num_classes
    return soft_cross_entropy(logits, targets)


def soft_cross_entropy(logits: tf.Tensor, probs: tf.Tensor) -> tf.Tensor:
    """Computes cross entropy per example against distributions; [N, C], [N, C] → float32 [N]."""
    # Not the log of a softmax, which is -inf if a probability underflows to 0.
    return -tf.reduce_sum(probs * tf.nn.log_softmax(logits), axis=-1)


def sharpen(probs: tf.Tensor, temperature: float) -> tf.Tensor:
    """Returns probabilities [N, C] as of a softmax at temperature T: p^(1/T), normalized."""
    if temperature == 1.0:
        return probs
    powered = tf.pow(probs, 1.0 / temperature)
    return powered / tf.reduce_sum(powered, axis=-1, keepdims=True)


def pseudo_label_loss(
    logits: tf.Tensor, labels: tf.Tensor, probs: tf.Tensor | None, *, smoothing: float
) -> tf.Tensor:
    """Computes the loss per unlabeled example.

    Args:
      logits: of the student, float32 [N, C].
      labels: hard pseudo labels, int [N]; used if `probs` is None.
      probs: soft pseudo labels, float32 [N, C], already at their temperature; None for hard ones.
      smoothing: for hard pseudo labels, as for true labels; soft ones are never smoothed.

    Returns:
      float32 [N].
    """
    if probs is None:
        return smoothed_cross_entropy(logits, labels, smoothing)
    return soft_cross_entropy(logits, probs)


def decayed_variables(variables: Iterable[tf.Variable]) -> list[tf.Variable]:
    """Returns the variables subject to weight decay: kernels and biases, except batch norm's."""
    # Keras' names end in `/gamma:0`. The original excludes batch norm by layer name, with the same
    # result, because no other layer has a gamma or a beta.
    return [v for v in variables if v.name.split("/")[-1].split(":")[0] not in ("gamma", "beta")]


def half_squared_norm(variables: Iterable[tf.Variable]) -> tf.Tensor:
    """Returns Σ ½‖v‖², a float32 scalar."""
    return tf.add_n([tf.nn.l2_loss(v) for v in variables])
