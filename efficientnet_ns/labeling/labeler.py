"""A teacher ready to label: encoded images in, probabilities out, from many threads at once."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import tensorflow as tf
from absl import logging

from efficientnet_ns.config import ConfigError
from efficientnet_ns.data import images as images_lib
from efficientnet_ns.data import views
from efficientnet_ns.experiment import Experiment
from efficientnet_ns.labeling.noised import NoisedTeacher, augmented
from efficientnet_ns.models import engines, weights
from efficientnet_ns.training import distribution


class Labeler:
    """The teacher's model, compiled once for any number of shards.

    Args:
      experiment: sizes and preprocessing.
      checkpoint: the teacher's weights, of any kind that `weights.load_weights` takes.

    Attributes:
      engine: computes the probabilities.
      group: images per call of `label`. Answers are the same to the last bit when groups are cut
        at the same places.
    """

    def __init__(self, experiment: Experiment, checkpoint: str):
        config = experiment.config
        strategy = distribution.get_strategy(config.hardware)
        distribution.set_precision(config.hardware, strategy)
        with strategy.scope():
            model = experiment.build_model()
        weights.load_weights(model, checkpoint)
        kind, prepare = config.predict.inference_engine, experiment.preprocessing().evaluate
        if config.predict.noised_teacher:
            model, kind = NoisedTeacher(model, config.train.seed), "tf"
            prepare = augmented(experiment.unlabeled_preprocessing, config.train.seed)
        self.engine = engines.make(kind, model, config.train.eval_batch_size, strategy)
        self.num_classes, self._size = experiment.num_classes, experiment.image_size
        self._views = config.predict.test_time_views
        batch = self.engine.batch_size
        # Small images in larger groups, so that a call costs little beside its images.
        # A core that decodes several and then computes several keeps what either needs in its cache.
        images = max(batch, min(64, 16 * 224**2 // self._size**2))
        self.group = -(-images // batch) * batch
        self._decode = views.decoder(prepare, self._size, self._views)
        logging.info("labeling on %s, %d at a time", self.engine.name, self.engine.lanes)

    def of_whole_images(self) -> Labeler:
        """The same teacher for pictures that are crops already: they are resized, not cropped.

        Raises:
          ConfigError: ten views, which are crops.
        """
        if self._views > 2:
            raise ConfigError(f"--test_time_views={self._views}: these pictures are crops already")
        whole = copy.copy(self)
        whole._decode = views.decoder(
            lambda image: images_lib.whole_image(image, self._size), self._size, self._views
        )
        return whole

    def label(self, images: Sequence[bytes | None]) -> tuple[np.ndarray, dict[int, str]]:
        """Probabilities of up to `group` images.

        Args:
          images: encoded; None for what could not be read, which keeps its place.

        Returns:
          float32 [N, C], zeros where there is no answer; {place: reason} for images that cannot be
          decoded, and for answers that are no numbers.
        """
        probs = np.zeros([len(images), self.num_classes], np.float32)
        if not images:
            return probs, {}
        pixels, problems = self._pixels(images)
        for view in range(self._views):
            probs += self.engine(pixels[:, view])
        if self._views > 1:
            probs /= self._views
        for place in np.flatnonzero(~np.isfinite(probs).all(1)):
            problems[int(place)] = "the model answers NaN"
        empty = [i for i, image in enumerate(images) if image is None or i in problems]
        probs[empty] = 0
        return probs, problems

    def _pixels(self, images: Sequence[bytes | None]) -> tuple[np.ndarray, dict[int, str]]:
        """float32 [N, V, S, S, 3], zeros for what cannot be decoded; and {place: reason}."""
        if all(image is not None for image in images):
            try:
                # `.numpy()` would copy 10 MB.
                return np.asarray(self._decode(tf.constant(images))), {}
            except tf.errors.OpError:
                pass  # One by one, to see which.
        pixels = np.zeros([len(images), self._views, self._size, self._size, 3], np.float32)
        problems = {}
        for place, image in enumerate(images):
            if image is None:
                continue
            try:
                pixels[place] = self._decode(tf.constant([image]))[0].numpy()
            except tf.errors.OpError:
                problems[place] = "the image cannot be decoded"
        return pixels, problems


def check_views(experiment: Experiment) -> None:
    """ConfigError unless the number of test-time views is one that there is."""
    number = experiment.config.predict.test_time_views
    # Small images are not cropped, so there is nothing to move.
    known = [n for n in views.VIEWS if n <= 2 or not experiment.small_image]
    if number not in known:
        raise ConfigError(f"--test_time_views={number}: one of {known} is needed")
    options = experiment.config.predict
    if options.noised_teacher and (number > 1 or options.inference_engine == "xnnpack"):
        raise ConfigError(
            "--noised_teacher: one view (--test_time_views=1), computed by TensorFlow"
        )
