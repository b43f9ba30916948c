"""scikit-learn's scans of handwritten digits as labeled and unlabeled records."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import tensorflow as tf

from efficientnet_ns.files import tfexamples, tfrecords

_SHARDS = 4
_UNLABELED_PREFIX = "extra"
_DEV, _TEST = 300, 500
_OUTLIERS = 200


def make_records(folder: str, *, seed: int, labels_per_class: int) -> dict[str, Any]:
    """Writes the digits as labeled (`train`, `dev`, `test`) and unlabeled (`extra`) records.

    Returns:
      `truth`: true classes of the unlabeled images in record order per shard, -1 for outliers.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    pictures = [encode(image * (255 / 16)) for image in digits.images]
    labels = digits.target
    rng = np.random.default_rng(seed)
    train = labeled_indices(labels, labels_per_class, rng)
    rest = rng.permutation(np.setdiff1d(np.arange(len(labels)), train))
    test, dev, unlabeled = np.split(rest, [_TEST, _TEST + _DEV])
    for prefix, indices in (("train", rng.permutation(train)), ("dev", dev), ("test", test)):
        examples = [tfexamples.labeled_example(pictures[i], int(labels[i])) for i in indices]
        tfrecords.write_sharded(os.path.join(folder, "labeled"), prefix, examples, 2)

    mixed = [(pictures[i], int(labels[i])) for i in unlabeled]
    mixed += [(encode(patch), -1) for patch in outliers(_OUTLIERS, rng)]
    mixed = [mixed[i] for i in rng.permutation(len(mixed))]
    tfrecords.write_sharded(
        os.path.join(folder, "unlabeled"),
        _UNLABELED_PREFIX,
        [tfexamples.unlabeled_example(picture) for picture, _ in mixed],
        _SHARDS,
    )
    truth = [[label for _, label in mixed[shard::_SHARDS]] for shard in range(_SHARDS)]
    return {"truth": truth, "train": len(train), "unlabeled": len(mixed)}


def labeled_indices(labels: np.ndarray, per_class: int, rng: np.random.Generator) -> np.ndarray:
    """Indices of `per_class` images of each class that are close together in the scans.

    Neighbouring scans come from the same few writers, so the labels cover less variety than the
    unlabeled images: the usual motivation for using them.
    """
    from_here = np.roll(np.arange(len(labels)), -rng.integers(len(labels)))
    return np.concatenate([from_here[labels[from_here] == c][:per_class] for c in range(10)])


def encode(gray: np.ndarray) -> bytes:
    """PNG of an 8 × 8 scan (0..255), enlarged twice."""
    enlarged = tf.image.resize(gray[..., None].astype(np.float32), [16, 16], "bicubic")
    return tf.io.encode_png(tf.cast(tf.clip_by_value(tf.round(enlarged), 0, 255), tf.uint8)).numpy()


def outliers(count: int, rng: np.random.Generator) -> list[np.ndarray]:
    """8 × 8 gray patches of photographs: images that belong to no class."""
    from sklearn.datasets import load_sample_images

    photos = [photo.mean(axis=-1)[::8, ::8] for photo in load_sample_images().images]
    patches = []
    for _ in range(count):
        photo = photos[rng.integers(len(photos))]
        y, x = (rng.integers(side - 8) for side in photo.shape)
        patches.append(photo[y : y + 8, x : x + 8])
    return patches
