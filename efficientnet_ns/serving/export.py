"""SavedModels that answer to encoded images: bytes in, classes and probabilities out."""

from __future__ import annotations

import os

import tensorflow as tf
from absl import logging

from efficientnet_ns.data import manifests
from efficientnet_ns.data.pipeline import Preprocessing


class Classifier(tf.Module):
    """A model with the evaluation preprocessing inside its graph.

    Args:
      model: pixels → logits, with the weights to serve.
      preprocessing: the evaluation preprocessing of that model.
    """

    def __init__(self, model: tf.keras.Model, preprocessing: Preprocessing):
        super().__init__()
        self.model, self._preprocessing = model, preprocessing

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="image_bytes")])
    def __call__(self, image_bytes: tf.Tensor) -> dict[str, tf.Tensor]:
        """Encoded images [N] → `classes` int64 [N], `probabilities` float32 [N, C]."""
        size = self._preprocessing.image_size
        # Decode, crop and resize per image, so that images of different sizes make one batch.
        images = tf.map_fn(
            self._preprocessing.evaluate,
            image_bytes,
            fn_output_signature=tf.TensorSpec([size, size, 3], tf.float32),
        )
        probabilities = tf.nn.softmax(self.model(images, training=False))
        return {"classes": tf.argmax(probabilities, -1), "probabilities": probabilities}


def export(model: tf.keras.Model, preprocessing: Preprocessing, base: str, version: int) -> str:
    """Writes `<base>/<version>/`; it appears by rename, so a server never loads half a model.

    Returns:
      The folder.

    Raises:
      manifests.OutputConflict: that version exists.
    """
    folder = os.path.join(base, str(version))
    if tf.io.gfile.exists(folder):
        raise manifests.OutputConflict(f"{folder} exists: choose another --version, or delete it")
    tf.io.gfile.makedirs(base)
    classifier = Classifier(model, preprocessing)
    temporary = manifests.temporary_name(folder)
    verbosity = logging.get_verbosity()
    # It warns of functions that only Keras would miss, and names the temporary folder.
    logging.set_verbosity(logging.ERROR)
    try:
        tf.saved_model.save(classifier, temporary, signatures=classifier.__call__)
        tf.io.gfile.rename(temporary, folder)
    finally:
        logging.set_verbosity(verbosity)
        if tf.io.gfile.exists(temporary):
            tf.io.gfile.rmtree(temporary)
    return folder
