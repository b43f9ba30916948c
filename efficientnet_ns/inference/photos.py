"""Maps a few images to named classes in a few lines of code."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import tensorflow as tf

from efficientnet_ns.data.pipeline import Preprocessing
from efficientnet_ns.models import efficientnet, heads

# A path, the bytes of an image file, or pixels uint8 [H, W, 3].
Image: TypeAlias = str | os.PathLike | bytes | np.ndarray | tf.Tensor


class Prediction(NamedTuple):
    """One class and its probability.

    Attributes:
      index: index of the class, from 0.
      name: name of the class.
      probability: 0..1.
    """

    index: int  # type: ignore[assignment]  # Hides tuple's method, which is not used here.
    name: str
    probability: float


def _file_or_pixels(image: Image) -> tf.Tensor:
    """Converts to the input of `Preprocessing.evaluate`: encoded scalar string or uint8 [H, W, 3]."""
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
    images: Image | Sequence[Image],
    model: str | tf.keras.Model | Preprocessing = "efficientnet-b0",
) -> tf.Tensor:
    """Crops and resizes images as in evaluation; see `Preprocessing.evaluate`.

    The result shows the center of each image, or the whole image for models for small images (SVHN,
    digits). Normalization is part of the model.

    Args:
      images: one or several images of any sizes: paths, bytes of image files, or pixels, uint8
        [H, W, 3] in 0..255; arrays of one size may be passed as one array [N, H, W, 3].
      model: a model made by `build_model` or from its layers, the name of an ImageNet variant, or
        the preprocessing itself.

    Returns:
      float32 [N, S, S, 3] in about 0..255.

    Raises:
      ValueError: If there are no images, pixels have another dtype or shape, the variant is unknown,
        or the model has other layers.
      tf.errors.OpError: If a file does not exist or cannot be decoded.
    """
    preprocessing = _preprocessing_of(model)
    several = _as_list(images)
    if not several:
        raise ValueError("there are no images")
    return tf.stack([preprocessing.evaluate(_file_or_pixels(image)) for image in several])


def _preprocessing_of(model: str | tf.keras.Model | Preprocessing) -> Preprocessing:
    if isinstance(model, Preprocessing):
        return model
    if isinstance(model, str):
        return Preprocessing(efficientnet.get_variant(model).resolution)
    settings = heads.settings(model)
    return Preprocessing(
        settings["image_size"],
        settings["small_image"],
        crop_fraction=settings.get("crop_fraction"),
    )


def top_k(
    probabilities: np.ndarray | tf.Tensor, names: Sequence[str] | None = None, k: int = 5
) -> list[Prediction] | list[list[Prediction]]:
    """Returns the most probable classes, best first; ties go to the lower index.

    Args:
      probabilities: float [C], or [N, C] for one list per image.
      names: C class names; if None, each class is named by its index.
      k: length of a list; all classes if there are fewer.

    Raises:
      ValueError: If the number of names differs from C or k is less than 1.
    """
    probabilities = np.asarray(probabilities)
    num_classes = probabilities.shape[-1]
    if names is not None and len(names) != num_classes:
        raise ValueError(f"{len(names)} names for {num_classes} classes")
    if k < 1:
        raise ValueError(f"k is {k}; it must be at least 1")
    named = [str(i) for i in range(num_classes)] if names is None else names
    if probabilities.ndim == 2:
        return [_best(row, named, k) for row in probabilities]
    return _best(probabilities, named, k)


def _best(probabilities: np.ndarray, names: Sequence[str], k: int) -> list[Prediction]:
    best = np.argsort(-probabilities, kind="stable")[:k]
    return [Prediction(int(i), names[i], float(probabilities[i])) for i in best]
