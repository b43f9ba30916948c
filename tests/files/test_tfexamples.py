"""Examples built from features of other records, and floats that are read individually."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from efficientnet_ns.files import tfexamples
from efficientnet_ns.files.errors import DataError


def unpacked(probabilities: list[float]) -> bytes:
    """Returns a prediction with unpacked floats, which the format allows."""
    values = b"".join(b"\x0d" + np.float32(p).tobytes() for p in probabilities)
    feature = b"\x12" + bytes([len(values)]) + values
    key = b"probabilities"
    entry = b"\n" + bytes([len(key)]) + key + b"\x12" + bytes([len(feature)]) + feature
    body = b"\n" + bytes([len(entry)]) + entry
    return b"\n" + bytes([len(body)]) + body


@pytest.mark.parametrize(("size", "classes"), [(0, 1), (3, 2), (127, 10), (128, 40), (70000, 1000)])
def test_pseudo_labeled_examples_are_the_same_bytes(size, classes, rng):
    image, probs = rng.bytes(size), rng.random(classes).astype(np.float32)
    feature = tfexamples.feature(tfexamples.unlabeled_example(image), tfexamples.IMAGE)
    floats = tfexamples.Floats(
        tfexamples.feature(
            tfexamples.prediction_examples(np.asarray([probs], np.float32))[0],
            tfexamples.PROBABILITIES,
        )
    )
    assert tfexamples.bytes_value(feature) == image
    assert [floats[i] for i in range(len(floats))] == probs.tolist()
    for label in {0, 1, 127, 128, 300, classes - 1} & set(range(classes)):
        made = tfexamples.pseudo_labeled_from_features(
            feature, floats.feature, label, floats[label]
        )
        plain = tfexamples.pseudo_labeled_example(image, probs, label)
        assert tf.train.Example.FromString(made) == tf.train.Example.FromString(plain)
        assert len(made) == len(plain)


def test_floats_that_were_written_one_by_one():
    prediction = unpacked([0.25, 0.75])
    assert tfexamples.probabilities(prediction).tolist() == [0.25, 0.75]
    floats = tfexamples.Floats(tfexamples.feature(prediction, tfexamples.PROBABILITIES))
    assert [floats[0], floats[1], len(floats)] == [0.25, 0.75, 2]


def test_absent_feature_and_no_example():
    assert tfexamples.feature(tfexamples.unlabeled_example(b"x"), tfexamples.PROBABILITIES) == b""
    assert len(tfexamples.Floats(b"")) == 0
    with pytest.raises(DataError, match=r"not a tf\.train\.Example"):
        tfexamples.feature(b"\xff\xff\xff", tfexamples.IMAGE)
