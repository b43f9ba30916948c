"""A folded model arranged for the kernels that TensorFlow has on CPUs.

Two things cost there more than they need to. A convolution of 1 x 1 is a product of matrices, and on
small maps cheaper when started as one; on large ones the convolution is, since oneDNN applies its
activation before the values leave the cache. The expanded maps of the first blocks are so large that
the C library asks the system for fresh pages, which are cleared, for every tensor of their size: they
are computed in slices, since between expansion and projection channels meet only in squeeze and
excitation.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import tensorflow as tf

from efficientnet_ns.inference import folding
from efficientnet_ns.models import efficientnet

# Values per image in a slice of an expanded map. The C library uses memory again up to 32 MB, which
# a batch of 16 then stays below. Smaller slices cost more than they save, in kernels to start.
_SLICE_VALUES = 410_000
# Channels of the narrowest slice, which fill the vector registers of a core.
_SLICE_CHANNELS = 16
# Width of the smallest map whose 1 x 1 convolutions stay convolutions.
_CONVOLVED_WIDTH = 56


def forward(folded: tf.keras.Model) -> Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]]:
    """Pixels float32 [N, S, S, 3] in 0..255 → logits float32 [N, C], pooled features [N, D].

    The weights are constants of the function's graph.

    Args:
      folded: made by `folding.fold_batch_norm`, with the classifier.
    """
    graph = _CpuGraph(folded)
    spec = tf.TensorSpec(folded.input_shape, tf.float32)
    return tf.function(graph, autograph=False).get_concrete_function(spec)


class _CpuGraph:
    def __init__(self, folded: tf.keras.Model):
        self._layers = {layer.name: layer for layer in folded.layers}
        self._blocks = efficientnet.num_blocks(folded)
        dtype = tf.as_dtype(self._layers["stem_conv"].compute_dtype).as_numpy_dtype
        self._weights = {
            name: [values.astype(dtype) for values in layer.get_weights()]
            for name, layer in self._layers.items()
        }

    def __call__(self, images: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        kernel, bias = self._weights["stem_conv"]
        x = self._layers["normalization"](images)
        strides = self._layers["stem_conv"].strides
        x = folding.swish(tf.nn.bias_add(tf.nn.conv2d(x, kernel, strides, "SAME"), bias))
        for block in range(self._blocks):
            x = self._mbconv(x, f"blocks_{block}")
        x = folding.swish(_pointwise(x, *self._weights["head_conv"]))
        pooled = tf.reduce_mean(x, [1, 2])
        kernel, bias = self._weights["head_dense"]
        logits = tf.nn.bias_add(tf.matmul(pooled, kernel), bias)
        return tf.cast(logits, tf.float32), tf.cast(pooled, tf.float32)

    def _mbconv(self, x: tf.Tensor, name: str) -> tf.Tensor:
        parts = self._parts(x, name)
        slices = [self._expanded(x, name, part) for part in parts]
        gates = self._gates(slices, name)
        kernel, bias = self._weights[f"{name}_project_conv"]
        # One of the products takes the bias, which costs nothing there.
        biases = [bias] + [None] * (len(parts) - 1)
        sums = [
            _pointwise(values * gate, kernel[:, :, part], added)
            for values, gate, part, added in zip(slices, gates, parts, biases)
        ]
        projected = tf.add_n(sums)
        return projected + x if f"{name}_add" in self._layers else projected

    def _parts(self, x: tf.Tensor, name: str) -> list[slice]:
        """The slices of channels in which a block's expanded map is computed."""
        channels = self._weights[f"{name}_dw_conv"][0].shape[2]
        wanted = -(-x.shape[1] * x.shape[2] * channels // _SLICE_VALUES)
        count = max(1, min(wanted, channels // _SLICE_CHANNELS))
        if f"{name}_expand_conv" not in self._layers:
            count = 1
        edges = [channels * i // count for i in range(count + 1)]
        return [slice(*pair) for pair in zip(edges, edges[1:])]

    def _expanded(self, x: tf.Tensor, name: str, part: slice) -> tf.Tensor:
        """A block up to its depthwise convolution, for some of the expanded channels."""
        if f"{name}_expand_conv" in self._layers:
            kernel, bias = self._weights[f"{name}_expand_conv"]
            x = folding.swish(_pointwise(x, kernel[..., part], bias[part]))
        kernel, bias = self._weights[f"{name}_dw_conv"]
        stride = self._layers[f"{name}_dw_conv"].strides[0]
        x = tf.nn.depthwise_conv2d(x, kernel[:, :, part], [1, stride, stride, 1], "SAME")
        return folding.swish(tf.nn.bias_add(x, bias[part]))

    def _gates(self, slices: list[tf.Tensor], name: str) -> list[tf.Tensor]:
        """Squeeze and excitation: a factor per image and channel, [N, 1, 1, channels of the slice]."""
        pooled = [tf.reduce_mean(part, [1, 2], keepdims=True) for part in slices]
        squeezed = tf.concat(pooled, -1)
        squeezed = folding.swish(_pointwise(squeezed, *self._weights[f"{name}_se_reduce"]))
        gate = tf.sigmoid(_pointwise(squeezed, *self._weights[f"{name}_se_expand"]))
        return tf.split(gate, [part.shape[-1] for part in slices], -1)


def _pointwise(x: tf.Tensor, kernel: np.ndarray, bias: np.ndarray | None = None) -> tf.Tensor:
    """A 1 x 1 convolution, kernel [1, 1, channels in, channels out]; of small maps as a product."""
    height, width, channels = x.shape[1:]
    convolved = width >= _CONVOLVED_WIDTH
    if convolved:
        y = tf.nn.conv2d(x, kernel, 1, "VALID")
    else:
        y = tf.matmul(tf.reshape(x, [-1, channels]), kernel[0, 0])
    if bias is not None:
        y = tf.nn.bias_add(y, bias)
    return y if convolved else tf.reshape(y, [-1, height, width, kernel.shape[-1]])
