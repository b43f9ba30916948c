"""The records of one training run, and the batches that every host makes of them."""

from __future__ import annotations

import contextlib
import dataclasses
import re

import tensorflow as tf

from efficientnet_ns.data import pipeline
from efficientnet_ns.files.errors import DataError
from efficientnet_ns.files.paths import listed
from efficientnet_ns.resolve.resolved_config import ResolvedConfig, limited
from efficientnet_ns.training.input_wait import InputWait


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Record files and how they become batches.

    Attributes:
      resolved: the settings.
      labeled: records to train on.
      unlabeled: (pseudo-labeled) records to train on; None without `unlabel_ratio`.
      evaluation: records to measure on; None to train without measuring.
      wait: measures how long training steps wait for their batches.
    """

    resolved: ResolvedConfig
    labeled: pipeline.Source
    unlabeled: pipeline.Source | None
    evaluation: pipeline.Source | None
    wait: InputWait

    @classmethod
    def find(cls, resolved: ResolvedConfig, *, evaluate: bool) -> Inputs:
        """Lists and counts the record files.

        Args:
          evaluate: also find the evaluation set.

        Raises:
          DataError: a set is missing, incomplete, empty, or damaged beyond the limit.
          ConfigError: a set is smaller than a flag requires.
        """
        data, unlabeled, evaluation = resolved.config.data, None, None
        labeled = resolved.labeled_source()
        if resolved.config.train.unlabel_ratio:
            # Without a limit on the number of images, as in the original.
            unlabeled = pipeline.Source.find(data.unlabel_data_dir, ("train", "extra"))
        if evaluate:
            evaluation = _evaluation_set(data.label_data_dir or "", resolved.task.eval_set)
            evaluation = limited(
                evaluation, evaluation.examples, "num_eval_images", data.num_eval_images
            )
        return cls(resolved, labeled, unlabeled, evaluation, InputWait())

    def training_batches(self, step: int, share: pipeline.Share) -> tf.data.Dataset:
        """A host's share of the endless batches from update `step` on."""
        batches = self.resolved.training_batches(self.labeled, self.unlabeled, step, share)
        return self.wait.measure(batches)

    @property
    def steps_per_epoch(self) -> float:
        """Updates in one pass over the labeled set."""
        images = self.resolved.epoch_images(self.labeled)
        return images / self.resolved.config.train.train_batch_size

    def naming_bad_records(self) -> contextlib.AbstractContextManager[None]:
        """Turns TensorFlow's input errors inside the block into errors that name the record."""
        return self.resolved.naming_bad_records(
            self.labeled, self.evaluation, unlabeled=self.unlabeled
        )


def _evaluation_set(folders: str, prefix: str) -> pipeline.Source:
    """The records to measure on; DataError that says what to do if there are none."""
    names = [
        name
        for folder in folders.split(";")
        for name in listed(folder, rf"{re.escape(prefix)}-\d.*")
    ]
    if names:
        return pipeline.Source.find(folders, prefix, max_bad_fraction=0)
    raise DataError(
        f"no records {prefix}-00000-of-… to evaluate on in {folders}. Make them with make_records "
        "(--validation_fraction=0.1, or --image_set=validation of other images), name a set that is "
        "there as eval_set in the task's file (--task_name), or train without evaluation: --mode=train"
    )
