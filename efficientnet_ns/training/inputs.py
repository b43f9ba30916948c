"""The records of one training run, and the batches that every host makes from them."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re

import tensorflow as tf

from efficientnet_ns.data import pipeline
from efficientnet_ns.files import shard_names
from efficientnet_ns.resolve.resolved_config import ResolvedConfig
from efficientnet_ns.training.input_wait import InputWait


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Record files and how they become batches.

    Attributes:
      resolved: the settings.
      labeled: records to train on.
      unlabeled: (pseudo-labeled) records to train on; None if `unlabel_ratio` is 0.
      evaluation: records to evaluate on; None: train without evaluation.
      wait: measures how long training steps wait for their batches.
      order_since: the step since which records are read in the current order, from a new epoch on.
    """

    resolved: ResolvedConfig
    labeled: pipeline.Source
    unlabeled: pipeline.Source | None
    evaluation: pipeline.Source | None
    wait: InputWait
    order_since: int = 0

    @classmethod
    def find(cls, resolved: ResolvedConfig, *, evaluate: bool) -> Inputs:
        """Lists and counts the record files.

        Args:
          evaluate: whether to also find the evaluation set.

        Raises:
          DataError: If a set is missing, incomplete, empty, or damaged beyond the limit.
          ConfigError: If a set is smaller than a flag requires.
        """
        config, unlabeled, evaluation = resolved.config, None, None
        labeled = resolved.labeled_source()
        if config.train.unlabel_ratio:
            # Stores the counts if the records' folder is not writable.
            spare = config.train.model_dir
            # Pseudo-labeled records are named train-<task>-…, unlabeled ones extra-…. The number of
            # images is not limited, as in the original.
            unlabeled = pipeline.Source.find(
                config.data.unlabel_data_dir, ("train", "extra"), spare=spare
            )
            # Pseudo-labeled records have other names, and the selection has left out the listed ones.
            if not _is_pseudo_labeled(unlabeled):
                unlabeled = resolved.without_excluded(unlabeled, "unlabeled")
        if evaluate:
            evaluation = resolved.evaluation_source()
        return cls(resolved, labeled, unlabeled, evaluation, InputWait())

    def training_batches(self, step: int, share: pipeline.Share) -> tf.data.Dataset:
        """Returns a host's share of the endless batches from update `step` on."""
        batches = self.resolved.training_batches(
            self.labeled, self.unlabeled, step, share, self.order_since
        )
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


def _is_pseudo_labeled(source: pipeline.Source) -> bool:
    """Checks whether records were written by `filter_unlabel`: `train-<task>-00000-of-…`."""
    found = shard_names.parse(os.path.basename(source.paths[0]))
    return found is not None and re.fullmatch(r"train-\d+", found[0]) is not None
