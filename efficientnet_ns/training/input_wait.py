"""Measures how long training steps wait for their data."""

from __future__ import annotations

import tensorflow as tf


class InputWait:
    """Measures, inside the dataset, the time between asking for a batch and getting it.

    It costs two clock readings per batch. With several replicas, batches pass through another buffer
    on their way to the device. That buffer then requests the batches, so the time measured is
    slightly longer than the steps waited.
    """

    def __init__(self):
        with tf.device("CPU:0"):
            self._seconds = tf.Variable(0.0, dtype=tf.float64, trainable=False)
        self._read = 0.0

    def measure(self, batches: tf.data.Dataset) -> tf.data.Dataset:
        """Returns the same batches, timed; nothing may be prefetched after this."""
        requested = tf.data.Dataset.range(tf.int64.max).map(lambda _: tf.timestamp())

        def add(asked_at: tf.Tensor, batch):
            self._seconds.assign_add(tf.timestamp() - asked_at)
            return batch

        # Zip reads its inputs in turn: the clock is read just before the batch is requested.
        data = tf.data.Dataset.zip((requested, batches)).map(add)
        if batches.cardinality() == tf.data.INFINITE_CARDINALITY:
            # The clock's range is finite, unlike the batches, and several workers can infer
            # shapes only of infinite datasets.
            data = data.apply(tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY))
        options = tf.data.Options()
        options.experimental_optimization.inject_prefetch = False
        return data.with_options(options)

    def take(self) -> float:
        """Returns the seconds waited since the last call."""
        total = float(self._seconds)
        waited, self._read = total - self._read, total
        return waited
