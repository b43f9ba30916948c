"""Classifies photo files one after the other."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import numpy as np
import tensorflow as tf

from efficientnet_ns.config import Config, ConfigError, PhotosConfig
from efficientnet_ns.data import image_conversion, tasks
from efficientnet_ns.files import object_stores
from efficientnet_ns.files.standard_output import escaped, photo_block, printable
from efficientnet_ns.inference import exported
from efficientnet_ns.inference import photos as photos_lib
from efficientnet_ns.ingest import data_source, image_sources
from efficientnet_ns.models import weights
from efficientnet_ns.resolve import stored_model
from efficientnet_ns.resolve.resolved_config import ResolvedConfig

# For up to this many photos, the model runs eagerly: tracing it takes as long as a dozen photos.
_FEW = 8


def predict_images(
    config: Config,
    weights_path: str | os.PathLike,
    photos: Sequence[str | os.PathLike],
    top: int = 5,
    *,
    ema: bool = True,
) -> Iterator[dict[str, Any]]:
    """Yields the predictions for one photo after the other, each as soon as it is known.

    Args:
      config: settings that are not given are read from files next to the weights.
      weights_path: a path that `stored_model.find` accepts: weights, or the folder of a training run,
        of noisy_student or of an export.
      photos: paths of image files (JPEG, PNG, GIF, BMP and others that `image_conversion.prepare`
        accepts) or of folders with such files, at any depth; `-` is standard input.
      top: number of classes per photo.
      ema: whether to use the moving-average weights.

    Yields:
      `photo`, and either `predictions`, a list of {`index`, `name`, `probability`}, best first, or
      `error` if the photo cannot be read.

    Raises:
      ConfigError: If there are no weights or no photos, or a setting does not fit.
      WeightsError, FileNotFoundError: If the weights do not fit the model or do not exist.
    """
    if not weights_path or not photos:
        raise ConfigError(
            "a model and at least one photo are required: --model_dir=run photo.jpg, or "
            "--model_name=efficientnet-lite0 --weights=published photo.jpg"
        )
    found = [file for photo in photos for file in _files(os.fspath(photo))]
    path = stored_model.find(weights_path)
    if stored_model.is_export(path):
        classify, names = _exported(config, path)
    else:
        classify, names = _built(config, path, ema=ema, compiled=len(found) > _FEW)
    for photo, problem in found:
        if problem:
            yield {"photo": photo, "error": problem}
            continue
        try:
            probabilities = _classified(_content(photo), classify)
        except (tf.errors.OpError, image_conversion.Unusable) as error:
            yield {"photo": photo, "error": _reason(getattr(error, "message", str(error)))}
        except UnicodeDecodeError as error:  # The message contains a name that is not UTF-8.
            yield {"photo": photo, "error": error.object.decode(errors="backslashreplace")}
        else:
            best = cast(list[photos_lib.Prediction], photos_lib.top_k(probabilities, names, top))
            yield {"photo": photo, "predictions": [guess._asdict() for guess in best]}


def _files(photo: str) -> list[tuple[str, str]]:
    """Returns (path, "") of a photo or of all images in a folder, or (path, why it is unreadable)."""
    if photo == "-" or image_sources.is_image(photo):  # Without a request for each on a store.
        return [(photo, "")]
    on_store = object_stores.is_object_store(photo)
    if not (tf.io.gfile.isdir(photo) if on_store else os.path.isdir(photo)):
        return [(photo, "")]
    contents = image_sources.Folder(photo).entries()
    names = [entry.name for entry in contents.entries if image_sources.is_image(entry.name)]
    found = [*((name, "") for name in names), *contents.lost]
    shown = [(os.path.join(photo, n), r) for n, r in found if not image_sources.is_hidden(n)]
    return sorted(shown) or [(photo, "a folder without images")]


# Encoded scalar string → probabilities float32 [C]; InvalidArgumentError if it cannot be decoded.
_Classify = Callable[[tf.Tensor], tf.Tensor | np.ndarray]


def _exported(config: Config, path: str) -> tuple[_Classify, Sequence[str] | None]:
    """Loads an exported model and its class names."""
    exported.check(config, stored_model.read(path))
    resolved = ResolvedConfig.from_config(config, path)
    model = exported.ExportedModel(path)
    return lambda raw: model([raw.numpy()])[0], tasks.class_names(resolved.task)


def _built(
    config: Config, path: str, *, ema: bool, compiled: bool
) -> tuple[_Classify, Sequence[str] | None]:
    """Builds the model of these weights and returns it with the class names of its task."""
    resolved = ResolvedConfig.from_config(data_source.with_records(config), path)
    model = resolved.build_model()
    weights.load_weights(model, path, ema=ema)
    prepare = resolved.preprocessing().evaluate

    def run(image: tf.Tensor) -> tf.Tensor:
        return tf.nn.softmax(model(image[tf.newaxis], training=False))[0]

    if compiled:
        run = tf.function(run)  # All images have one shape, so it is traced once.
    return lambda raw: run(prepare(raw)), tasks.class_names(resolved.task)


def _content(photo: str) -> tf.Tensor:
    """Reads a file, standard input for `-`, or a pipe, whose size is unknown."""
    if photo == "-":
        return tf.constant(sys.stdin.buffer.read())
    if os.path.exists(photo) and not os.path.isfile(photo) and not os.path.isdir(photo):
        with open(photo, "rb") as f:
            return tf.constant(f.read())
    return tf.io.read_file(os.fsencode(photo))  # Also supports names that are not UTF-8.


def _classified(raw: tf.Tensor, classify: _Classify) -> tf.Tensor | np.ndarray:
    """Classifies the bytes; converts them as for records if TensorFlow cannot decode them."""
    try:
        return classify(raw)
    except tf.errors.InvalidArgumentError:
        converted, _ = image_conversion.prepare(raw.numpy(), image_conversion.Rules())
        return classify(tf.constant(converted))


def _reason(message: str) -> str:
    """Returns TensorFlow's message without the names of its ops."""
    return re.sub(r"\{\{.*?\}\}|\[Op:.*", "", message, flags=re.DOTALL).strip()


def _text(result: dict[str, Any]) -> str:
    if "error" in result:
        return f"{escaped(result['photo'])}\n  cannot be read: {result['error']}"
    return photo_block(result["photo"], result["predictions"])


def print_predictions(config: Config, options: PhotosConfig, photos: Sequence[str]) -> int:
    """Prints each photo's predictions as soon as known; returns exit code 1 if any is unreadable."""
    path = options.weights or config.train.model_dir or ""
    show = json.dumps if options.json else _text
    failed = False
    for result in predict_images(config, path, photos, options.top, ema=options.ema):
        print(printable(show(result)), flush=True)
        failed |= "error" in result
    return int(failed)
