"""Exponential moving average of weights, stored as the weights of a second model.

The copies include trainable variables and batch-norm statistics; evaluation, teachers and export
use them.
"""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf


def ramped_decay(decay: float, num_updates: tf.Tensor) -> tf.Tensor:
    """Returns min(decay, (1 + n) / (10 + n)): short memory at first; n includes this step."""
    n = tf.cast(num_updates, tf.float32)
    return tf.minimum(decay, (1.0 + n) / (10.0 + n))


def update(
    copies: Sequence[tf.Variable],
    sources: Sequence[tf.Variable],
    decay: tf.Tensor,
    *,
    anchors: Sequence[tf.Variable] | None = None,
    share: float = 0.0,
) -> None:
    """Copy ← copy - (1 - decay)·(copy - source), pairwise. Call in replica context.

    With `anchors`, share·anchor + (1 - share)·source replaces the source. Copies that start at
    their anchors then always equal share·anchor + (1 - share)·(average of the sources), because averaging
    is linear.

    Batch-norm statistics are stored per replica and averaged when read; averaging is linear, so
    each replica updates its own copy. Mirrored variables are updated once, across replicas.
    """
    mirrored = []
    # Without anchors, the sources are placeholders: `_move` ignores them if the share is 0.
    for copy, source, anchor in zip(copies, sources, anchors or sources):
        if copy.synchronization == tf.VariableSynchronization.ON_READ:
            _move(copy, source, anchor, share, decay)
        else:
            mirrored.append((copy, source, anchor))

    def update_all(strategy, decay):
        for copy, source, anchor in mirrored:
            arguments = (source, anchor, share, decay)
            strategy.extended.update(copy, _move, args=arguments, group=False)

    # As in Keras' optimizers: a step that XLA compiles for several GPUs has no `merge_call`.
    strategy = tf.distribute.get_strategy()
    tf.__internal__.distribute.interim.maybe_merge_call(update_all, strategy, decay)


def _move(
    copy: tf.Variable, source: tf.Variable, anchor: tf.Variable, share: float, decay: tf.Tensor
) -> None:
    target = source + share * (anchor - source) if share else source
    copy.assign_sub((copy - target) * (1.0 - decay))
