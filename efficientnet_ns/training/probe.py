"""A linear probe: trains only the classifier, on the features of a frozen network.

It costs one forward pass over the labeled pictures, is hard to beat with few labels, and is the best
start for fine-tuning the whole network, because gradients of a random classifier would first
distort the features (arXiv 2202.10054).
"""

from __future__ import annotations

import os

import numpy as np
import tensorflow as tf

from efficientnet_ns.config.sections import Config
from efficientnet_ns.files.progress import Progress
from efficientnet_ns.models import weights
from efficientnet_ns.resolve.resolved_config import ResolvedConfig

# The decay applies to standardized features. On photographs with 15 labels per class, 0.01 to 0.3
# are equally accurate, and 0.1 gives the best probabilities; 0.001 is overconfident.
_UPDATES, _RATE, _DECAY = 300, 0.01, 0.1
# Maximum number of pictures, more than a classifier needs.
_MOST = 20_000


def fit(config: Config, initial: str, folder: str) -> dict[str, float]:
    """Writes `folder/model.ckpt-0`: the weights of `initial` with a new classifier for the task.

    Args:
      config: model and labeled records; the first 20,000 are used, preprocessed as in evaluation.
      initial: weights that `weights.load_weights` takes; their classifier is skipped.

    Returns:
      `images`, and the `accuracy` of the classifier on them.
    """
    resolved = ResolvedConfig.from_config(config)
    tf.keras.utils.set_random_seed(config.train.seed)
    model = resolved.build_model()
    weights.load_weights(model, initial, skip=["head/dense/"])
    features, labels = _features(resolved, model)
    kernel, bias = linear_classifier(features, labels, resolved.num_classes)
    dense = model.get_layer("head_dense")
    dense.kernel.assign(kernel)
    dense.bias.assign(bias)
    weights.save_weights(model, os.path.join(folder, "model.ckpt-0"))
    right = (features @ kernel + bias).argmax(1) == labels
    return {"images": len(labels), "accuracy": float(right.mean())}


def _features(resolved: ResolvedConfig, model: tf.keras.Model) -> tuple[np.ndarray, np.ndarray]:
    """Returns pooled features float32 [N, D] and labels int [N] of the labeled pictures."""
    source = resolved.labeled_source()
    source = source.examples(min(source.total, _MOST))
    network = tf.keras.Model(model.input, model.get_layer("head_pool").output)
    forward = tf.function(lambda images: network(images, training=False))
    features, labels = [], []
    with Progress(source.total, "features", "pictures") as progress:
        for batch in resolved.eval_batches(source):
            # The last batch is padded; the mask marks the rows that are pictures.
            real = batch["mask"].numpy() > 0
            features.append(forward(batch["image"]).numpy()[real])
            labels.append(batch["label"].numpy()[real])
            progress.update(int(real.sum()))
    return np.concatenate(features), np.concatenate(labels)


def linear_classifier(
    features: np.ndarray, labels: np.ndarray, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns kernel [D, C] and bias [C] of a logistic regression on features float32 [N, D].

    Features are standardized first, and the result is converted back.
    """
    # The added constant avoids a division by 0 for constant features.
    mean, deviation = features.mean(0), features.std(0) + 1e-3
    inputs = tf.constant((features - mean) / deviation, tf.float32)
    kernel = tf.Variable(tf.zeros([features.shape[1], num_classes]))
    bias = tf.Variable(tf.zeros([num_classes]))
    optimizer = tf.keras.optimizers.Adam(_RATE, jit_compile=False)
    optimizer.build([kernel, bias])

    @tf.function
    def update() -> None:
        with tf.GradientTape() as tape:
            logits = inputs @ kernel + bias
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)
            loss = tf.reduce_mean(losses) + _DECAY * tf.nn.l2_loss(kernel)
        variables = [kernel, bias]
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables))

    for _ in range(_UPDATES):
        update()
    # kernel · (x - mean) / deviation + bias = plain · x + (bias - plain · mean).
    plain = kernel.numpy() / deviation[:, None]
    return plain, bias.numpy() - mean @ plain
