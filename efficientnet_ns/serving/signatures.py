"""Signatures of a served model: encoded images, pixels or tf.Examples in, named classes out.

TF Serving merges the requests of many clients into one batch, so an image that cannot be decoded
must not fail the others. A `tf.data` pipeline inside the graph prepares the images one by one and
drops the bad ones; their rows are marked as invalid (`valid` false, class -1, name "",
probabilities 0). All ops are standard, so the result loads with TensorFlow only.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import tensorflow as tf
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

from efficientnet_ns.data import image_headers
from efficientnet_ns.data.pipeline import Preprocessing
from efficientnet_ns.files import tfexamples
from efficientnet_ns.models import efficientnet
from efficientnet_ns.serving import image_sizes


@dataclasses.dataclass(frozen=True)
class OutputSpec:
    """Settings of a served model's outputs.

    Attributes:
      class_names: one name per class, in order of the logits.
      top_k: length of the `top_*` outputs and of `classify`.
      max_pixels: an image whose header states more pixels is invalid and never decoded.
    """

    class_names: tuple[str, ...]
    top_k: int = 5
    max_pixels: int = image_headers.MAX_PIXELS


class Classifier(tf.Module):
    """A model whose graph includes the evaluation preprocessing and the class names.

    Args:
      model: pixels → logits, with the weights to serve.
      preprocessing: the evaluation preprocessing of that model.
      outputs: see `OutputSpec`.
      freeze: whether to make the weights constants of the graph, which TensorFlow can rearrange for
        its kernels at load time.
    """

    def __init__(
        self,
        model: tf.keras.Model,
        preprocessing: Preprocessing,
        outputs: OutputSpec,
        *,
        freeze: bool = False,
    ):
        super().__init__()
        self._preprocessing, self._outputs = preprocessing, outputs
        ends = efficientnet.endpoints(model)
        both = tf.keras.Model(model.input, [ends["logits"], ends["pooled"]])
        run = functools.partial(both, training=False)
        self._run: Callable[[tf.Tensor], list[tf.Tensor]] = run
        if freeze:
            self._run = _frozen(run, tf.TensorSpec(model.input_shape, tf.float32))
        else:
            self._model = both  # tf.Module saves the variables of its attributes.

    def _forward(self, images: tf.Tensor) -> list[tf.Tensor]:
        """Returns logits [N, C] and pooled features [N, D] of prepared images [N, S, S, 3], N ≥ 0."""
        count = tf.shape(images)[0]
        # Some CPU kernels reject an empty batch, so one image is added and its row removed.
        missing = tf.cast(count == 0, tf.int32)
        images = tf.pad(images, [[0, missing], [0, 0], [0, 0], [0, 0]])
        logits, pooled = self._run(tf.ensure_shape(images, [None, *self._image_spec.shape]))
        return [tf.cast(values[:count], tf.float32) for values in (logits, pooled)]

    def signatures(self) -> dict[str, Callable]:
        """Returns signature name → function, for `tf.saved_model.save`."""
        strings = tf.TensorSpec([None], tf.string)
        size = [None, None, None, 3]
        specs = {
            "serving_default": (self._image_bytes, "image_bytes", strings),
            # Two, because an input of a signature has one dtype.
            "predict_images": (self._pixels, "images", tf.TensorSpec(size, tf.float32)),
            "predict_images_uint8": (self._pixels, "images", tf.TensorSpec(size, tf.uint8)),
            "features": (self._features, "image_bytes", strings),
            "classify": (self._classify, "inputs", strings),
        }
        return {
            name: tf.function(function, autograph=False).get_concrete_function(
                # Requests refer to the input by the name of its spec.
                tf.TensorSpec(spec.shape, spec.dtype, name=argument)
            )
            for name, (function, argument, spec) in specs.items()
        }

    def _image_bytes(self, image_bytes: tf.Tensor) -> dict[str, tf.Tensor]:
        """Encoded images [N] → see `_described`."""
        images, valid = self._prepared(image_bytes, self._decode)
        return self._described(self._forward(images)[0], valid)

    def _pixels(self, images: tf.Tensor) -> dict[str, tf.Tensor]:
        """Pixels 0..255 [N, H, W, 3] of any size → see `_described`."""
        prepared = tf.map_fn(
            self._preprocessing.evaluate, images, fn_output_signature=self._image_spec
        )
        return self._described(self._forward(prepared)[0], tf.ones(tf.shape(images)[:1], tf.bool))

    def _features(self, image_bytes: tf.Tensor) -> dict[str, tf.Tensor]:
        """Encoded images [N] → `features` float32 [N, D] (pooled), `valid` bool [N]."""
        images, valid = self._prepared(image_bytes, self._decode)
        return {"features": _only(valid, self._forward(images)[1]), "valid": valid}

    def _classify(self, inputs: tf.Tensor) -> dict[str, tf.Tensor]:
        """Serialized tf.Examples [N] with `image/encoded` → `classes`, `scores` [N, top_k]."""
        images, valid = self._prepared(
            inputs, lambda example: self._decode(tfexamples.parse_unlabeled(example))
        )
        described = self._described(self._forward(images)[0], valid)
        return {
            "classes": described["top_class_names"],
            "scores": described["top_probabilities"],
        }

    @property
    def _image_spec(self) -> tf.TensorSpec:
        size = self._preprocessing.image_size
        return tf.TensorSpec([size, size, 3], tf.float32)

    def _decode(self, image_bytes: tf.Tensor) -> tf.Tensor:
        checked = image_sizes.refuse_large(image_bytes, self._outputs.max_pixels)
        return self._preprocessing.evaluate(checked)

    def _prepared(
        self, inputs: tf.Tensor, prepare: Callable[[tf.Tensor], tf.Tensor]
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Applies `prepare` to each string [N]: images [N, S, S, 3], 0 where it fails; valid [N]."""
        count = tf.size(inputs)
        good = tf.data.Dataset.from_tensor_slices((tf.range(count), inputs))
        good = good.map(
            lambda row, text: (row, prepare(text)), num_parallel_calls=tf.data.AUTOTUNE
        ).ignore_errors()
        # One extra element in front, so that there is a batch even if every image fails.
        first = tf.data.Dataset.from_tensors((-1, tf.zeros(self._image_spec.shape)))
        # One batch of all remaining images; rows are indices into `inputs`.
        batch = first.concatenate(good).batch(tf.cast(count, tf.int64) + 1)
        rows, images = batch.get_single_element()
        # [M, 1], as scatter_nd expects indices, and [M, S, S, 3] for M decoded images.
        rows, images = rows[1:, None], images[1:]
        valid = tf.scatter_nd(rows, tf.ones_like(rows[:, 0]), count[None]) > 0
        shape = tf.concat([count[None], self._image_spec.shape], 0)
        # Usually, all images are valid and no copy is made.
        images = tf.cond(
            tf.reduce_all(valid), lambda: images, lambda: tf.scatter_nd(rows, images, shape)
        )
        return tf.ensure_shape(images, [None, *self._image_spec.shape]), valid

    def _described(self, logits: tf.Tensor, valid: tf.Tensor) -> dict[str, tf.Tensor]:
        """Returns outputs by name for logits [N, C] and a mask of decoded images [N].

        `classes` int64 [N], `class_names` string [N], `probabilities` float32 [N, C]; best first,
        `top_classes` int64, `top_class_names` string, `top_probabilities` float32 [N, top_k]; and
        `valid` bool [N].
        """
        names = tf.constant(self._outputs.class_names)
        probabilities = _only(valid, tf.nn.softmax(logits))
        k = min(self._outputs.top_k, len(self._outputs.class_names))
        top_probabilities, top = tf.math.top_k(probabilities, k)
        # All probabilities of an invalid image are 0, so its "best" classes are just the first ones.
        top_names = tf.where(valid[:, None], tf.gather(names, top), "")
        top_classes = tf.where(valid[:, None], tf.cast(top, tf.int64), -1)
        return {
            "classes": top_classes[:, 0],
            "class_names": top_names[:, 0],
            "probabilities": probabilities,
            "top_classes": top_classes,
            "top_class_names": top_names,
            "top_probabilities": top_probabilities,
            "valid": valid,
        }


def _frozen(run: Callable, spec: tf.TensorSpec) -> Callable:
    """Returns `run` as one graph whose variables are constants."""
    function = tf.function(run, autograph=False).get_concrete_function(spec)
    return convert_variables_to_constants_v2(function)


def _only(valid: tf.Tensor, values: tf.Tensor) -> tf.Tensor:
    return tf.where(valid[:, None], values, tf.zeros_like(values))
