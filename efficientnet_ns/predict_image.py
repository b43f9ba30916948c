"""Classify photos: `python -m efficientnet_ns.predict_image --weights=PATH photo.jpg …`."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from efficientnet_ns import config as config_lib
from efficientnet_ns.config import Config, ConfigError

if TYPE_CHECKING:
    import tensorflow as tf

# Up to so many photos the model runs as it is: to trace it takes as long as a dozen of them.
_FEW = 8


def predict_images(
    config: Config,
    weights_path: str | os.PathLike,
    photos: Sequence[str | os.PathLike],
    top: int = 5,
    *,
    ema: bool = True,
) -> Iterator[dict[str, Any]]:
    """Answers for one photo after the other, each as soon as it is known.

    Args:
      config: the model and the task it was trained for.
      weights_path: what `weights.load_weights` takes.
      photos: paths of image files: JPEG, PNG, GIF, BMP and what else `encoded.prepare` takes.
      top: classes per photo.
      ema: take the moving-average weights.

    Yields:
      `photo`, and either `predictions`, a list of {`index`, `name`, `probability`}, best first, or
      `error`, when the photo cannot be read.

    Raises:
      ConfigError: no weights, no photos, or a setting that does not fit.
      WeightsError, FileNotFoundError: the weights do not fit the model, or are not there.
    """
    if not weights_path or not photos:
        raise ConfigError("--weights=PATH and at least one photo are needed")
    import tensorflow as tf  # After --help and wrong flags have been answered.

    from efficientnet_ns import inference
    from efficientnet_ns.data import image_conversion, tasks
    from efficientnet_ns.models import weights
    from efficientnet_ns.resolve.resolved_config import ResolvedConfig

    resolved = ResolvedConfig.from_config(config)
    model = resolved.build_model()
    weights.load_weights(model, weights_path, ema=ema)
    names = tasks.class_names(resolved.task)
    prepare = resolved.preprocessing().evaluate

    def classify(image: tf.Tensor) -> tf.Tensor:
        return tf.nn.softmax(model(image[tf.newaxis], training=False))[0]

    if len(photos) > _FEW:
        classify = tf.function(classify)  # All images have one shape: traced once.
    for photo in map(os.fspath, photos):
        try:
            raw = tf.io.read_file(os.fsencode(photo))  # Names that are not UTF-8 too.
            image = _prepared(raw, prepare)
        except (tf.errors.OpError, image_conversion.Unusable) as error:
            yield {"photo": photo, "error": _reason(getattr(error, "message", str(error)))}
        except UnicodeDecodeError as error:  # TensorFlow's message, with such a name in it.
            yield {"photo": photo, "error": error.object.decode(errors="backslashreplace")}
        else:
            best = inference.top_k(classify(image), names, top)
            yield {"photo": photo, "predictions": [guess._asdict() for guess in best]}


def _prepared(raw: tf.Tensor, prepare: Callable[[tf.Tensor], tf.Tensor]) -> tf.Tensor:
    """`prepare` of the bytes, converted as records are made when TensorFlow cannot decode them."""
    import tensorflow as tf

    from efficientnet_ns.data import image_conversion

    try:
        return prepare(raw)
    except tf.errors.InvalidArgumentError:
        converted, _ = image_conversion.prepare(raw.numpy(), image_conversion.Rules())
        return prepare(tf.constant(converted))


def _reason(message: str) -> str:
    """TensorFlow's message without the names of its ops."""
    return re.sub(r"\{\{.*?\}\}|\[Op:.*", "", message, flags=re.DOTALL).strip()


def _text(answer: dict[str, Any]) -> str:
    if "error" in answer:
        return f"{answer['photo']}\n  cannot be read: {answer['error']}"
    guesses = answer["predictions"]
    width = max(len(guess["name"]) for guess in guesses)
    lines = [f"  {guess['name']:<{width}}  {guess['probability']:.4f}" for guess in guesses]
    return "\n".join([answer["photo"], *lines])


def _printable(text: str) -> str:
    r"""What the output's encoding lacks, and bytes of names that are not UTF-8, as \\x and \\u."""
    coding = sys.stdout.encoding or "utf-8"
    return text.encode(coding, "backslashreplace").decode(coding)


def main(argv: list[str]) -> None:
    settings = config_lib.from_flags(Config, flags.FLAGS)
    values = flags.FLAGS
    show = json.dumps if values.json else _text
    failed = 0
    for answer in predict_images(settings, values.weights, argv[1:], values.top, ema=values.ema):
        print(_printable(show(answer)), flush=True)
        failed += "error" in answer
    if failed:
        sys.exit(1)


def run() -> None:
    """The command line."""
    config_lib.define_flags(Config)
    flags.DEFINE_string("weights", "", "Weights of the model.")
    flags.DEFINE_integer("top", 5, "Classes per photo.", lower_bound=1)
    flags.DEFINE_bool("json", False, "Print one JSON object per photo and line.")
    flags.DEFINE_bool("ema", True, "Use the moving-average weights, not the raw ones.")
    config_lib.run(main)


if __name__ == "__main__":
    run()
