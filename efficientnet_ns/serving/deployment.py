"""Files that start TensorFlow Serving on an exported model: `<base>/deploy/`, next to the versions.

TensorFlow Serving ignores entries of a base folder whose names are not numbers.
"""

from __future__ import annotations

import os
import re

import tensorflow as tf
from absl import logging

from efficientnet_ns.files import atomic, object_stores
from efficientnet_ns.serving import templates

FOLDER = "deploy"
# The server pads a batch to the next of these sizes. The last must be its `max_batch_size`.
BATCH_SIZES = (1, 2, 4, 8, 16, 32)


def texts(model: str) -> dict[str, str]:
    """Returns file name → content for a model of that name."""
    values = {
        "model": model,
        # The server of this version reads every SavedModel that this TensorFlow writes.
        "server": tf.__version__,
        # Kubernetes allows only lower-case letters, digits and hyphens in names.
        "label": re.sub(r"[^a-z0-9]+", "-", model.lower()).strip("-"),
        "largest": BATCH_SIZES[-1],
        "allowed": "\n".join(f"allowed_batch_sizes: {size}" for size in BATCH_SIZES),
    }
    return {
        name: templates.fill(os.path.join(FOLDER, name), values) for name in templates.names(FOLDER)
    }


def write(base: str, model: str) -> None:
    """Writes the deployment files to `<base>/deploy/`; never overwrites an existing file.

    If an existing file differs from the new content, a warning names it.

    Args:
      base: the folder of the versions.
      model: name of the model.
    """
    object_stores.make_folder(os.path.join(base, FOLDER))
    for name, text in texts(model).items():
        path = os.path.join(base, FOLDER, name)
        if tf.io.gfile.exists(path):
            with tf.io.gfile.GFile(path) as f:
                if f.read() != text:
                    logging.warning(
                        "keeping %s, which differs from the template for %s", path, model
                    )
        else:
            atomic.write(path, text)
        if name.endswith(".sh") and os.path.exists(path):  # Buckets have no permission bits.
            os.chmod(path, 0o755)
