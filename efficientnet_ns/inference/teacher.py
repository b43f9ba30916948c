"""A teacher as a predictor: encoded images in, probabilities out, safe to call from many threads.

`--noised_teacher` adds noise during labeling, which the paper's ablation advises against (section
4.1). Every draw depends only on the seed and the images of a batch, so the labels are reproducible
with the same batch size.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import tensorflow as tf
from absl import logging

from efficientnet_ns.config import ConfigError
from efficientnet_ns.config.cpus import available_cpus
from efficientnet_ns.data import fingerprints, pipeline
from efficientnet_ns.data import images as images_lib
from efficientnet_ns.devices import distribution
from efficientnet_ns.inference import engines, views
from efficientnet_ns.inference.meter import Meter
from efficientnet_ns.models import layers, weights
from efficientnet_ns.resolve.resolved_config import ResolvedConfig

_IMAGES, _MODEL = 1, 2  # Salts of the draws.
# A core that decodes several images in a row keeps the code and data of each step in its cache.
_PIECE = 16


class TeacherPredictor:
    """The teacher's model, compiled once for all shards.

    Callers' threads decode for the engines that compute on the caller's core. For TensorFlow, whose
    batches are for devices, all cores decode each group together, so that even shards with few groups,
    and few groups in memory, keep them busy.

    Args:
      resolved: sizes and preprocessing.
      checkpoint: the teacher's weights, in any format that `weights.load_weights` accepts.

    Attributes:
      engine: computes the probabilities.
      num_classes: C, length of a prediction.
      fingerprinted: whether `marked` also returns fingerprints.
      group: maximum number of images per call of `label`. Predictions are bit-identical if groups
        start at the same images.
      meter: counts the teacher's work.
    """

    def __init__(self, resolved: ResolvedConfig, checkpoint: str):
        config = resolved.config
        # Machines share the work by shards, not by batches.
        strategy = distribution.get_strategy(config.hardware, local_only=True)
        distribution.set_precision(config.hardware, strategy)
        with strategy.scope():
            model = resolved.build_model()
        weights.load_weights(model, checkpoint)
        kind = config.predict.inference_engine
        preprocessing = resolved.preprocessing()
        prepare: Callable[[tf.Tensor], tf.Tensor] = preprocessing.evaluate
        if config.predict.noised_teacher:
            model, kind = _NoisedTeacher(model, config.train.seed), "tf"
            prepare = _augmented(resolved.unlabeled_preprocessing, config.train.seed)
        self.engine = engines.make(
            kind,
            model,
            config.evaluation.eval_batch_size,
            strategy,
            dtype=config.predict.inference_dtype,
        )
        self.num_classes, self._size = resolved.num_classes, resolved.image_size
        self._views = config.predict.test_time_views
        batch = self.engine.batch_size
        # Small images form larger groups, which amortize the cost of a call.
        images = max(batch, min(64, _PIECE * 224**2 // self._size**2))
        self.group = -(-images // batch) * batch
        options = config.predict
        # Noise depends on the encoded bytes, and records with new labels have no index. Fingerprints of
        # reduced images differ in several bits from those of whole ones.
        self.fingerprinted = options.fingerprints and not (
            options.noised_teacher or options.reassign_label or options.fast_decode
        )
        self._crop_fraction = preprocessing.crop_fraction
        self._decode_image = None
        if options.fast_decode:
            fraction = 1.0 if resolved.small_image else self._crop_fraction
            self._decode_image = functools.partial(
                images_lib.decode_reduced, size=self._size, fraction=fraction
            )
        self._decode = self._decoder(prepare)
        self.meter = Meter()
        on_devices = isinstance(self.engine, engines.TensorFlowEngine)
        self._cores = ThreadPoolExecutor(available_cpus()) if on_devices else None
        logging.info("labeling on %s, %d at a time", self.engine.name, self.engine.concurrency)

    def of_whole_images(self) -> TeacherPredictor:
        """Returns the same teacher for images that are already cropped: it resizes without cropping.

        Raises:
          ConfigError: If `--test_time_views` is 10, because those views are crops.
        """
        if self._views > 2:
            raise ConfigError(f"--test_time_views={self._views}: these images are already crops")
        # The engine is shared; only the conversion from bytes to pixels differs.
        whole = copy.copy(self)
        whole._decode = self._decoder(lambda image: images_lib.whole_image(image, self._size))
        return whole

    def _decoder(self, prepare: Callable[[tf.Tensor], tf.Tensor]) -> Callable:
        return views.decoder(
            prepare,
            self._size,
            self._views,
            crop_fraction=self._crop_fraction,
            grids=self.fingerprinted,
            decode_image=self._decode_image,
        )

    def label(self, images: Sequence[bytes | None]) -> tuple[np.ndarray, dict[int, str]]:
        """Predicts up to `group` images.

        Args:
          images: N encoded images; None represents an unreadable record.

        Returns:
          Probabilities float32 [N, C], zeros if there is no prediction; {index: reason} for images
          that cannot be decoded and predictions that are not finite.
        """
        probs, problems, _ = self.marked(images)
        return probs, problems

    def marked(
        self, images: Sequence[bytes | None]
    ) -> tuple[np.ndarray, dict[int, str], np.ndarray]:
        """Like `label`, and returns `fingerprints.marks`, uint64 [N, 5], or [N, 0] if disabled."""
        if not images:
            return np.zeros([0, self.num_classes], np.float32), {}, self._marks([], None)
        with self.meter.timed("decode_us"):
            pixels, grids, problems = self._pixels(images)
        with self.meter.timed("inference_us"):
            probs = views.average(self.engine, pixels)
        for place in np.flatnonzero(~np.isfinite(probs).all(1)):
            problems[int(place)] = "the predicted probabilities are NaN or infinite"
        empty = [i for i, image in enumerate(images) if image is None or i in problems]
        probs[empty] = 0
        self.meter.add_images(images, len(empty))
        return probs, problems, self._marks(images, grids)

    def _marks(self, images: Sequence[bytes | None], grids: np.ndarray | None) -> np.ndarray:
        columns = len(fingerprints.COLUMNS) if self.fingerprinted else 0
        if grids is None:
            return np.zeros([len(images), columns], np.uint64)
        return fingerprints.marks(images, grids)

    def _pixels(
        self, images: Sequence[bytes | None]
    ) -> tuple[np.ndarray, np.ndarray | None, dict[int, str]]:
        """Decodes to float32 [N, V, S, S, 3], zeros on failure; grids if enabled; {index: reason}."""
        if self._cores is None or len(images) <= _PIECE:
            return self._piece(images)
        pixels, grids = self._empty(len(images))
        problems = {}

        def decode(start: int) -> None:
            end = start + _PIECE
            pixels[start:end], own, bad = self._piece(images[start:end])
            if grids is not None:
                grids[start:end] = own
            problems.update({start + place: reason for place, reason in bad.items()})

        list(self._cores.map(decode, range(0, len(images), _PIECE)))
        return pixels, grids, problems

    def _empty(self, number: int) -> tuple[np.ndarray, np.ndarray | None]:
        pixels = np.zeros([number, self._views, self._size, self._size, 3], np.float32)
        grid = [number, fingerprints.GRID, fingerprints.GRID]
        return pixels, np.zeros(grid, np.float32) if self.fingerprinted else None

    def _piece(
        self, images: Sequence[bytes | None]
    ) -> tuple[np.ndarray, np.ndarray | None, dict[int, str]]:
        """Like `_pixels`, on the calling thread."""
        if all(image is not None for image in images):
            try:
                # Not `.numpy()`, which would copy 10 MB per group.
                return *self._decoded(images), {}
            except tf.errors.OpError:
                pass  # Decoded one by one below to find out which images fail.
        pixels, grids = self._empty(len(images))
        problems = {}
        for place, image in enumerate(images):
            if image is None:
                continue
            try:
                pixels[place : place + 1], grid = self._decoded([image])
                if grids is not None:
                    grids[place] = grid
            except tf.errors.OpError:
                problems[place] = "the image cannot be decoded"
        return pixels, grids, problems

    def _decoded(self, images: Sequence[bytes | None]) -> tuple[np.ndarray, np.ndarray | None]:
        found = self._decode(tf.constant(images))
        pixels, grids = found if self.fingerprinted else (found, None)
        return np.asarray(pixels), grids if grids is None else np.asarray(grids)


def check_views(resolved: ResolvedConfig) -> None:
    """Raises ConfigError unless the task supports `--test_time_views`."""
    number = resolved.config.predict.test_time_views
    # Small images are not cropped, so there is no crop to move.
    known = [n for n in views.VIEWS if n <= 2 or not resolved.small_image]
    if number not in known:
        raise ConfigError(f"--test_time_views={number}: it must be one of {known}")
    options = resolved.config.predict
    other_engine = options.inference_engine in engines.CPU_ENGINES
    other_engine |= options.inference_dtype != "float32"
    if options.noised_teacher and (number > 1 or other_engine or options.fast_decode):
        raise ConfigError(
            "--noised_teacher requires one view (--test_time_views=1), TensorFlow as the engine "
            "(no --inference_dtype), and images decoded as for training (no --fast_decode)"
        )


def _augmented(
    preprocessing: pipeline.Preprocessing, seed: int
) -> Callable[[tf.Tensor], tf.Tensor]:
    """Returns a function: encoded image → float32 [S, S, 3], augmented as its bytes determine."""

    def prepare(image: tf.Tensor) -> tf.Tensor:
        number = tf.strings.to_hash_bucket_fast(image, 2**31 - 1)
        own = tf.stack([tf.constant(seed, tf.int64), number])
        own = tf.random.experimental.stateless_fold_in(own, _IMAGES)
        return tf.cast(preprocessing.train(image, own), tf.float32)

    return prepare


class _NoisedTeacher:
    """`model` with dropout and stochastic depth; batch norm uses its moving statistics.

    Args:
      model: pixels → logits; its batch norm is frozen.
      seed: with the pixels of the batch, determines the noise.
    """

    def __init__(self, model: tf.keras.Model, seed: int):
        self._model, self._seed = model, seed
        for layer in model.layers:
            if isinstance(layer, layers.BatchNorm):
                layer.trainable = False

    def __call__(self, pixels: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Maps pixels float32 [N, S, S, 3] to logits [N, C], noised regardless of `training`."""
        del training
        # Integers, because their sum does not depend on the order of addition.
        batch = tf.reduce_sum(tf.cast(pixels, tf.int32))
        seed = layers.fold_in(tf.stack([self._seed, batch]), _MODEL)
        with layers.noise_seed(seed):
            return self._model(pixels, training=True)
