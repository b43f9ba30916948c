"""Predictions of a model for each picture of a labeled set, with file names."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from efficientnet_ns.config import Config
from efficientnet_ns.data.pipeline import Source
from efficientnet_ns.files import tfexamples, tfrecords
from efficientnet_ns.inference.teacher import TeacherPredictor
from efficientnet_ns.resolve.resolved_config import ResolvedConfig


class Mistake(NamedTuple):
    """A misclassified picture."""

    name: str
    image: bytes
    truth: int
    predicted: int
    prob: float


class Judged(NamedTuple):
    """Predictions for a set.

    Attributes:
      truth, predicted: classes, int [N].
      probs: top-1 probability, float32 [N].
      mistakes: the wrong predictions with the highest probability, worst first.
    """

    truth: np.ndarray
    predicted: np.ndarray
    probs: np.ndarray
    mistakes: list[Mistake]

    @property
    def accuracy(self) -> float:
        """Fraction of the pictures classified correctly."""
        return float((self.truth == self.predicted).mean())


class Judge:
    """Classifies labeled sets with the newest weights of a training run.

    Args:
      config: settings of the training run.
      mistakes: number to keep per set.
    """

    def __init__(self, config: Config, mistakes: int = 36):
        self._resolved = ResolvedConfig.from_config(config)
        self._teacher = TeacherPredictor(self._resolved, config.train.model_dir or "")
        self._most = mistakes

    def __call__(self, prefix: str) -> Judged:
        """Returns predictions for the set with this prefix."""
        source = Source.find(self._resolved.config.data.label_data_dir or "", prefix)
        truth: list[int] = []
        probs: list[np.ndarray] = []
        mistakes: list[Mistake] = []
        group: list[bytes] = []
        for path in source.paths:
            for record in tfrecords.read(path):
                if record.payload is not None:
                    group.append(record.payload)
                # The same groups of pictures have bit-identical predictions in every run.
                if len(group) == self._teacher.group:
                    self._judge(group, truth, probs, mistakes)
                    group = []
        self._judge(group, truth, probs, mistakes)
        every = np.concatenate(probs)
        return Judged(np.array(truth), every.argmax(1), every.max(1), mistakes)

    def _judge(self, group: list[bytes], truth: list, probs: list, mistakes: list) -> None:
        if not group:
            return
        images = [tfexamples.image_bytes(payload) for payload in group]
        found, _ = self._teacher.label(images)
        labels = [tfexamples.label(payload) for payload in group]
        for payload, image, label, row in zip(group, images, labels, found):
            if row.argmax() != label:
                name = tfexamples.file_name(payload)
                mistakes.append(Mistake(name, image, label, int(row.argmax()), float(row.max())))
        # Truncated after each group, because mistakes hold their pictures.
        mistakes.sort(key=lambda mistake: -mistake.prob)
        del mistakes[self._most :]
        truth += labels
        probs.append(found)
