"""A `Config` resolved against its task and model: sizes, preprocessing, models, datasets."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf
from absl import logging

from efficientnet_ns.config.fields import ConfigError, as_dict, check, needed
from efficientnet_ns.config.sections import Config, DataConfig
from efficientnet_ns.data import pipeline, tasks
from efficientnet_ns.data.autoaugment import AutoAugment
from efficientnet_ns.data.randaugment import RandAugment
from efficientnet_ns.files import exclusions, tfexamples
from efficientnet_ns.files.errors import DataError
from efficientnet_ns.files.paths import listed
from efficientnet_ns.models import efficientnet
from efficientnet_ns.resolve import stored_model


@dataclasses.dataclass(frozen=True)
class ResolvedConfig:
    """Resolved settings of a run.

    Attributes:
      config: the settings.
      task: the classification task.
      image_size: side of the model's input in pixels.
      small_image: whether model and preprocessing are the small-image variants.
      num_classes: width of the logits.
    """

    config: Config
    task: tasks.Task
    image_size: int
    small_image: bool
    num_classes: int

    @classmethod
    def from_config(
        cls, config: Config, weights_path: str | os.PathLike | None = None
    ) -> ResolvedConfig:
        """Resolves and cross-checks settings; reads the task's file and writes nothing.

        Args:
          config: without a `data_source`; see `ingest.data_source.with_records`.
          weights_path: path of the trained model, see `stored_model.find`; supplies the settings
            that are not given.

        Raises:
          ConfigError: If a setting is invalid; the message names its flag.
          json_files.BrokenFile, tasks.TaskError: If a file next to weights or records is invalid.
        """
        check(config)
        if config.data.data_source:
            raise ConfigError(
                f"--data_source={config.data.data_source} has no records yet; create them with "
                "data_source.with_records"
            )
        # --- Settings that are not given: the model's, else the default
        stored = stored_model.read(weights_path) if weights_path else stored_model.StoredModel()
        task = _task(config.data.task_name, stored)
        # Before the name is filled in below, because only a default task needs this check.
        if config.data.task_name is None and stored.task is None:
            _check_task_of_records(config.data.label_data_dir or "", task)
        config = stored.complete(config)
        # None means not given. From here on, documented defaults are settings like any other.
        task_name, model_name = (
            as_dict(config.data)["task_name"],
            as_dict(config.model)["model_name"],
        )
        config = config.override(task_name=task_name, model_name=model_name)
        # --- Cross-checks
        try:
            variant = efficientnet.get_variant(model_name)
        except ValueError as e:
            raise ConfigError(f"--model_name: {e}") from e
        if config.model.num_label_classes not in (None, task.num_classes):
            raise ConfigError(
                f"--num_label_classes={config.model.num_label_classes}, but task "
                f"{task_name!r} has {task.num_classes} classes"
            )
        for name in ("dropout_rate", "stochastic_depth_rate"):
            rate = getattr(config.model, name)
            # The flags accept 1, but what is kept is divided by 1 - rate.
            if rate is not None and rate >= 1:
                raise ConfigError(f"--{name}={rate} must be below 1")
        return cls(
            config=config,
            task=task,
            image_size=config.model.input_image_size or task.image_size or variant.resolution,
            small_image=config.model.small_image_model or task.small_image,
            num_classes=task.num_classes,
        )

    @property
    def model_name(self) -> str:
        """Name of the variant."""
        return needed(self.config.model.model_name, "model_name")

    @property
    def train_steps(self) -> int:
        """Update steps of the whole schedule, stretched by train_ratio."""
        return int(self.config.train.train_steps * self.config.train.train_ratio)

    @property
    def steps_to_run(self) -> int:
        """Update steps to run: the whole schedule, or its last `train_last_step_num`."""
        last = self.config.train.train_last_step_num
        return self.train_steps if last < 0 else int(last * self.config.train.train_ratio)

    @property
    def images_per_step(self) -> int:
        """Images that the student processes per update, over all replicas."""
        return self.config.train.train_batch_size + self.unlabeled_batch_size

    @property
    def unlabeled_batch_size(self) -> int:
        """Unlabeled images per update, over all replicas."""
        return math.ceil(self.counted_batch_size * self.config.train.unlabel_ratio)

    @property
    def counted_batch_size(self) -> float:
        """Labeled images per update that enter the loss, on average."""
        return self.config.train.train_batch_size * self.config.train.label_data_sample_prob

    def labeled_source(self) -> pipeline.Source:
        """Returns the labeled records to train on: the first `num_train_shards` shards, or all.

        Raises:
          DataError: If there are none, or they cannot be counted.
          ConfigError: If there is no `label_data_dir`, or there are fewer shards than
            `num_train_shards`.
        """
        spare = self.config.train.model_dir
        source = pipeline.Source.find(self._label_data_dir, self.task.train_set, spare=spare)
        # First, because a list may name only records of other shards.
        source = self.without_excluded(source, "labeled")
        number = self.config.data.num_train_shards
        return _limited(source, source.shards, "num_train_shards", number)

    def without_excluded(self, source: pipeline.Source, kind: str) -> pipeline.Source:
        """Returns a set without the records in `exclude`.

        Args:
          kind: "labeled" or "unlabeled".

        Raises:
          DataError: If the list cannot be used, or no record is left.
        """
        path = self.config.data.exclude
        if not path:
            return source
        # A list without sets may name records of the other kind only.
        kept = source.without(exclusions.of_files(path, source.paths, kind, required=False))
        out = source.total - kept.total
        logging.info("--exclude: %d of %d %s records are left out", out, source.total, kind)
        return kept

    def evaluation_source(
        self, prefix: str | None = None, limit: str = "num_eval_images"
    ) -> pipeline.Source:
        """Returns the labeled records to evaluate on: all of them, or the first.

        Args:
          prefix: prefix of the set; None: the task's evaluation set.
          limit: name of the setting that states how many.

        Raises:
          DataError: If there are none, or one is damaged.
          ConfigError: If there is no `label_data_dir`, or there are fewer records than the limit.
        """
        # No record may be missing: accuracy on part of a damaged set would not be comparable.
        prefix, folders = prefix or self.task.eval_set, self._label_data_dir
        # Checked first, because the message for a missing evaluation set lists alternatives.
        pattern = rf"{re.escape(prefix)}-\d.*"
        if not any(listed(folder, pattern) for folder in folders.split(";")):
            raise DataError(
                f"no records {prefix}-00000-of-… to evaluate on in {folders}. Make them with make_records "
                "(--validation_fraction=0.1, or --image_set=validation of other images), name an "
                "existing set as eval_set in the task's file (--task_name), or train without "
                "evaluation: --mode=train"
            )
        spare = self.config.train.model_dir
        source = pipeline.Source.find(folders, prefix, max_bad_fraction=0, spare=spare)
        data = self.config.data
        limits = {"num_eval_images": data.num_eval_images, "num_test_images": data.num_test_images}
        return _limited(source, source.examples, limit, limits[limit])

    @property
    def _label_data_dir(self) -> str:
        folder = self.config.data.label_data_dir
        return needed(folder, "label_data_dir", "the folder with the labeled records")

    def epoch_images(self, labeled: pipeline.Source | None = None) -> int:
        """Returns the labeled images per epoch: as configured, the task's, or as many as there are.

        Args:
          labeled: `labeled_source`, if known; otherwise it is found if necessary.
        """
        known = self.config.data.num_train_images or self.task.num_train_images
        return known or (labeled or self.labeled_source()).total

    def build_model(self) -> tf.keras.Model:
        """Builds a new student, with nothing frozen."""
        model, train = self.config.model, self.config.train
        # Only the flag states the drop rate; the model takes the survival probability.
        drop_rate = 0.2 if model.stochastic_depth_rate is None else model.stochastic_depth_rate
        return efficientnet.build_model(
            self.model_name,
            self.num_classes,
            self.image_size,
            small_image=self.small_image,
            width_coefficient=model.width_coefficient,
            depth_coefficient=model.depth_coefficient,
            dropout_rate=model.dropout_rate,
            survival_prob=1.0 - drop_rate,
            **normalization(self.model_name, self.task),
            crop_fraction=self.config.data.crop_fraction,
            bn_momentum=train.bn_momentum,
            num_shards_per_group=train.num_shards_per_group,
        )

    @property
    def teacher_image_size(self) -> int:
        """Resolution of the on-the-fly teacher."""
        # Differs (6) in docs/differences.md: it is configurable.
        if self.config.train.teacher_image_size:
            return self.config.train.teacher_image_size
        if self.small_image:
            return self.image_size
        return efficientnet.get_variant(self.config.train.teacher_model_name or "").resolution

    def build_teacher(self) -> tf.keras.Model:
        """Builds a new on-the-fly teacher with its variant's width and depth."""
        name = self.config.train.teacher_model_name or ""
        return efficientnet.build_model(
            name,
            self.num_classes,
            self.teacher_image_size,
            small_image=self.small_image,
            **normalization(name, self.task),
        )

    def preprocessing(self, augment_name: str | None = None) -> pipeline.Preprocessing:
        """Returns preprocessing at the student's resolution, augmented if a name is given."""
        return pipeline.Preprocessing(
            image_size=self.image_size,
            small_image=self.small_image,
            flip=self.task.flip,
            augmentation=self._augmentation(augment_name),
            clean=self.config.data.remove_aug or augment_name == "clean",
            crop_fraction=self.config.data.crop_fraction,
        )

    def _augmentation(self, name: str | None) -> pipeline.Augmentation | None:
        data = self.config.data
        if name in (None, "none", "clean"):
            return None
        # "v1" is the original's name for RandAugment.
        if name in ("randaugment", "v1"):
            return RandAugment(
                num_layers=data.randaug_layer,
                magnitude=data.randaug_mag,
                mode=data.randaug_mode,
                use_cutout=data.cutout_op,
                proportional=data.randaug_reach == "proportional",
            )
        if name == "autoaugment":
            default = "svhn" if data.task_name == "svhn" else "imagenet"
            return AutoAugment(data.autoaugment_policy or default, data.randaug_mode)
        try:
            return pipeline.parse_augmentation(name, self.image_size, self.small_image)
        except ValueError as e:
            raise ConfigError(f"--augment_name, --unl_aug: {e}") from e

    @property
    def labeled_preprocessing(self) -> pipeline.Preprocessing:
        """Preprocessing of labeled images in training."""
        return self.preprocessing(self.config.data.augment_name)

    @property
    def unlabeled_preprocessing(self) -> pipeline.Preprocessing:
        """Preprocessing of unlabeled images in training."""
        data = self.config.data
        return self.preprocessing(data.augment_name if data.unl_aug == "default" else data.unl_aug)

    def training_batches(
        self,
        labeled: pipeline.Source,
        unlabeled: pipeline.Source | None,
        start_step: int,
        share: pipeline.Share = pipeline.WHOLE,
        order_since: int = 0,
    ) -> tf.data.Dataset:
        """Returns endless joint batches from update `start_step` on; see `student.NoisyStudent`.

        Args:
          share: which rows of each batch to prepare, and how many at a time.
          order_since: see `streams.Plan.step`.
        """
        data, train = self.config.data, self.config.train
        shared: dict[str, Any] = {
            "num_classes": self.num_classes,
            "seed": train.seed,
            "start_step": start_step,
            "order_since": order_since,
            "shuffle_buffer": data.shuffle_buffer,
            "share": share,
        }
        parts = [
            pipeline.labeled_batches(
                labeled,
                self.labeled_preprocessing,
                batch_size=train.train_batch_size,
                **shared,
            )
        ]
        if unlabeled is not None:
            teacher = None
            if train.teacher_model_name:
                # The evaluation crop without augmentation: only the student is noised (paper, 3.1).
                teacher = dataclasses.replace(
                    self.preprocessing(), image_size=self.teacher_image_size
                )
            weak = None
            if train.consistency_threshold:
                # Weak augmentation as in FixMatch: only the student's crop or shift, and flip.
                weak = dataclasses.replace(self.unlabeled_preprocessing, augmentation=None)
            parts.append(
                pipeline.unlabeled_batches(
                    unlabeled,
                    self.unlabeled_preprocessing,
                    batch_size=self.unlabeled_batch_size,
                    teacher_preprocessing=teacher,
                    weak_preprocessing=weak,
                    **shared,
                )
            )
        return pipeline.join(*parts)

    def eval_batches(
        self,
        source: pipeline.Source,
        share: pipeline.Share = pipeline.WHOLE,
        preprocessing: pipeline.Preprocessing | None = None,
    ) -> tf.data.Dataset:
        """Returns batches of every record of `source`, once each; see `pipeline.eval_batches`.

        Args:
          preprocessing: None: `self.preprocessing()`.
        """
        # Rounded up, because the batch must be divisible by the number of replicas.
        per_replica = math.ceil(self.config.evaluation.eval_batch_size / share.replicas)
        return pipeline.eval_batches(
            source,
            preprocessing or self.preprocessing(),
            num_classes=self.num_classes,
            batch_size=per_replica * share.replicas,
            share=share,
        )

    @contextlib.contextmanager
    def naming_bad_records(
        self,
        *labeled: pipeline.Source | None,
        unlabeled: pipeline.Source | None = None,
    ) -> Iterator[None]:
        """Turns an input error inside the block into a DataError that names the record.

        TensorFlow's message does not name it, so the records are read again to find it. An error
        that no record explains is left unchanged.

        Args:
          labeled: sources that the block reads; None means no source.
          unlabeled: the same, for records whose `image/class/label` is not used.
        """
        try:
            yield
        # An invalid image, label or shape; a damaged record.
        except (tf.errors.InvalidArgumentError, tf.errors.DataLossError) as e:
            logging.error("%s\nLooking for the record that caused this.", str(e).splitlines()[0])
            checks = [
                *((s, self._check_labeled) for s in labeled),
                (unlabeled, self._check_unlabeled),
            ]
            for source, check in checks:
                place = source and pipeline.name_bad_record(source, check)
                if place:
                    raise DataError(
                        f"a record cannot be used: {place}. Repair or remove it, and start the same "
                        "command again; finished work is kept."
                    ) from e
            raise

    def _check_labeled(self, payload: bytes) -> None:
        pipeline.check_trainable(payload, self.num_classes)

    def _check_unlabeled(self, payload: bytes) -> None:
        pipeline.check_image(payload)
        # An on-the-fly teacher and FixMatch read only the image, so records need no pseudo labels.
        if not (self.config.train.teacher_model_name or self.config.train.consistency_threshold):
            tfexamples.parse_pseudo_labeled(tf.constant(payload), self.num_classes)
            self._check_labeled(payload)


def normalization(model_name: str, task: tasks.Task) -> dict[str, Any]:
    """Returns `mean` and `std` of a model's pixels: the task's if given, else the variant's."""
    variant = efficientnet.get_variant(model_name)
    return {"mean": task.mean or variant.mean, "std": task.std or variant.std}


def _limited(
    source: pipeline.Source,
    take: Callable[[int], pipeline.Source],
    setting: str,
    number: int | None,
) -> pipeline.Source:
    """Returns `take(number)`, or all of `source` if the number is None.

    Raises:
      ConfigError: If `take` raises DataError for this number; the message names `setting`.
    """
    try:
        return source if number is None else take(number)
    except DataError as e:
        folder = os.path.dirname(source.paths[0])
        raise ConfigError(f"--{setting}={number}: {e} in {folder}") from e


def _check_task_of_records(folders: str, default: tasks.Task) -> None:
    """Raises ConfigError if the task next to the labeled records has another number of classes."""
    for folder in filter(None, folders.split(";")):
        path = os.path.join(folder, tasks.TASK_FILE)
        if not tf.io.gfile.exists(path):
            continue
        classes = tasks.get_task(path).num_classes
        if classes != default.num_classes:
            raise ConfigError(
                f"{path} describes {classes} classes, but the default task has {default.num_classes}: "
                f"add --task_name={path}"
            )


def _task(name: str | None, stored: stored_model.StoredModel) -> tasks.Task:
    """Returns the given task, else the model's, in both cases with the model's normalization.

    Raises:
      ConfigError: If there is no such task, or it does not fit the model.
    """
    if name is None and stored.task is not None:
        task = stored.task
    else:
        name = name or as_dict(DataConfig())["task_name"]
        try:
            task = tasks.get_task(name)
        except tasks.TaskError as e:
            # The task of the training run, whose file may no longer exist.
            if name != stored.task_name or stored.task is None:
                raise ConfigError(f"--task_name: {e}") from e
            task = stored.task
    return stored.fit(task, name or "")
