"""Folding changes how a model computes, not what."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from efficientnet_ns.inference import folding
from efficientnet_ns.models import efficientnet

CLASSES, SIZE = 5, 32


@pytest.mark.parametrize("name", ["efficientnet-test", "efficientnet-lite0"])
def test_folding_changes_no_number(rng, small_lite, name):
    model = efficientnet.build_model(name, CLASSES, SIZE)
    model.set_weights([w + rng.uniform(0, 0.1, w.shape) for w in model.get_weights()])
    folded = folding.fold_batch_norm(model)
    pixels = rng.uniform(0, 255, [3, SIZE, SIZE, 3])
    np.testing.assert_allclose(folded(pixels), model(pixels), atol=1e-4, rtol=1e-4)
    assert not any("moving" in weight.name for weight in folded.weights)


def test_pointwise_convolutions_of_small_maps_are_products(rng):
    """At 128 pixels, the first maps are 64 wide and the others at most 32."""
    model = efficientnet.build_model("efficientnet-test", CLASSES, 128)
    folded = folding.fold_batch_norm(model, for_cpu=True)
    call = tf.function(folded).get_concrete_function(tf.TensorSpec([None, 128, 128, 3]))
    kinds = [op.type for op in call.graph.get_operations()]
    pointwise = [layer for layer in folded.layers if isinstance(layer, folding.Pointwise)]
    convolved = [layer for layer in pointwise if layer.input_shape[2] >= 56]
    assert 0 < len(convolved) < len(pointwise)
    assert kinds.count("Conv2D") == len(convolved) + 1  # The stem.
    assert kinds.count("MatMul") == len(pointwise) - len(convolved) + 1  # The classifier.
    pixels = rng.uniform(0, 255, [2, 128, 128, 3]).astype(np.float32)
    np.testing.assert_allclose(folded(pixels), model(pixels), atol=1e-4, rtol=1e-4)
