"""Images in, named classes out, for whoever has a few pictures and a model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple, Union

import numpy as np
import tensorflow as tf

from efficientnet_ns.data import images as images_lib
from efficientnet_ns.models import efficientnet, heads

# A path, the bytes of an image file, or pixels uint8 [H, W, 3].
Image = Union[str, os.PathLike, bytes, np.ndarray, tf.Tensor]


class Guess(NamedTuple):
    """One class of an answer.

    Attributes:
      index: of the class, from 0.
      name: of the class.
      probability: 0..1.
    """

    index: int
    name: str
    probability: float


def _file_or_pixels(image: Image) -> tf.Tensor:
    """What `images.eval_image` takes: scalar string of encoded bytes, or uint8 [H, W, 3]."""
    if isinstance(image, (str, os.PathLike)):
        return tf.io.read_file(os.fspath(image))
    if isinstance(image, bytes):
        return tf.constant(image)
    pixels = tf.convert_to_tensor(image)
    if pixels.dtype != tf.uint8 or pixels.shape.rank != 3 or pixels.shape[-1] != 3:
        raise ValueError(
            f"an image is {pixels.dtype.name} {pixels.shape.as_list()}; it must be a path, the "
            "bytes of an image file, or pixels, uint8 [H, W, 3] in 0..255"
        )
    return pixels


def _as_list(images: Image | Sequence[Image]) -> list[Image]:
    if isinstance(images, (str, os.PathLike, bytes)):
        return [images]
    if isinstance(images, (np.ndarray, tf.Tensor)):
        return [images] if len(images.shape) == 3 else list(images)
    return list(images)


def preprocess(
    images: Image | Sequence[Image], model: str | tf.keras.Model = "efficientnet-b0"
) -> tf.Tensor:
    """The evaluation preprocessing of a model: its crop, and bicubic resize to its size.

    The centre is cropped out, except for models of small images (SVHN, digits), which get the whole
    image. Normalisation is inside the model.

    Args:
      images: one or several, of any sizes: paths, bytes of image files, or pixels, uint8 [H, W, 3]
        in 0..255; several arrays of one size may be one array [N, H, W, 3].
      model: made by `build_model`, or of its layers; or the name of a variant of ImageNet.

    Returns:
      float32 [N, S, S, 3] in about 0..255.

    Raises:
      ValueError: no images, pixels of another type or shape, an unknown variant, or a model of other
        layers.
      tf.errors.OpError: a file that is not there or cannot be decoded.
    """
    if isinstance(model, str):
        settings = {"image_size": efficientnet.get_variant(model).resolution, "small_image": False}
    else:
        settings = heads.settings(model)
    prepare = images_lib.small_eval_image if settings["small_image"] else images_lib.eval_image
    several = _as_list(images)
    if not several:
        raise ValueError("there are no images")
    return tf.stack([prepare(_file_or_pixels(i), settings["image_size"]) for i in several])


def top_k(
    probabilities: np.ndarray | tf.Tensor, names: Sequence[str] | None = None, k: int = 5
) -> list[Guess] | list[list[Guess]]:
    """The most probable classes, best first; of equal ones the lower index first.

    Args:
      probabilities: float [C], or [N, C] for a list per image.
      names: of the classes, C of them; None names each class by its index.
      k: how many; all of them when there are fewer.

    Raises:
      ValueError: another number of names than of classes, or k below 1.
    """
    probabilities = np.asarray(probabilities)
    if probabilities.ndim == 2:
        return [top_k(row, names, k) for row in probabilities]
    if names is not None and len(names) != len(probabilities):
        raise ValueError(f"{len(names)} names for {len(probabilities)} classes")
    if k < 1:
        raise ValueError(f"k is {k}; it must be at least 1")
    best = np.argsort(-probabilities, kind="stable")[:k]
    return [
        Guess(int(i), str(i) if names is None else names[i], float(probabilities[i])) for i in best
    ]
