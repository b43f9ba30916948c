"""Builds datasets that convert records to batches of preprocessed images.

Order, augmentation and batches depend only on (seed, position), never on what was read before: a
dataset started at step n continues exactly where an uninterrupted one would be. `streams` defines
the order and which records each host reads.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import tensorflow as tf

from efficientnet_ns.data import augment, images
from efficientnet_ns.data.autoaugment import AutoAugment
from efficientnet_ns.data.randaugment import RandAugment
from efficientnet_ns.data.streams import WHOLE, Plan, Share, Source, in_order
from efficientnet_ns.files import tfexamples, tfrecords
from efficientnet_ns.files.errors import DataError

_LABELED, _UNLABELED = 1, 2  # Salts: the two streams draw independently from one seed.


Augmentation = RandAugment | AutoAugment


def parse_augmentation(text: str, size: int, small: bool) -> Augmentation:
    """Parses a policy as the log prints it, with or without its list of ops.

    Args:
      size, small: size and kind of the images, which affect the arguments of some ops.

    Raises:
      ValueError: If the form is unknown, or the ops are not those of the policy at this size.
    """
    head, _, ops = text.partition(": ")
    kind = AutoAugment if head.startswith("autoaugment") else RandAugment
    try:
        policy = kind.parse(head)
    except ValueError as e:
        raise ValueError(
            f"{text!r} is not an augmentation; known forms: randaugment, v1, autoaugment, none, "
            f"{RandAugment.forms()}, {AutoAugment.forms()}"
        ) from e
    if ops and policy.describe(**policy.constants(size, small)) != text:
        raise ValueError(
            f"the operations listed in {text!r} are not those of {policy} at {size} pixels; pass only "
            f"{str(policy)!r}"
        )
    return policy


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """Converts encoded bytes to model input.

    Attributes:
      image_size: side of the result in pixels.
      small_image: shift with reflection padding instead of a resized crop (SVHN, CIFAR, digits).
      flip: whether to mirror half of the training images.
      augmentation: policy applied to training images; None for crop (or shift) and flip only.
      clean: whether to train on evaluation crops (FixRes fine-tuning).
      crop_fraction: fraction of the shorter side that the evaluation crop covers; for None, see
        `images.center_crop_box`. Small images are not cropped.
    """

    image_size: int
    small_image: bool = False
    flip: bool = True
    augmentation: Augmentation | None = None
    clean: bool = False
    crop_fraction: float | None = None

    def evaluate(self, image: tf.Tensor) -> tf.Tensor:
        """Converts a scalar string (or uint8 [H, W, 3]) to float32 [S, S, 3] in about 0..255."""
        if self.small_image:
            return images.small_eval_image(image, self.image_size)
        return images.eval_image(image, self.image_size, self.crop_fraction)

    def train(self, image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        """Converts a scalar string to [S, S, 3]; uint8 if augmented or small, else float32.

        Args:
          seed: int [2]; determines every random choice.
        """
        # An undecodable image stops training with an error that names the record (DataError, see
        # resolve/resolved_config.py). Labeling keeps going, up to --max_bad_fraction of a shard
        # (pseudo_labels/label_shard.py).
        if self.clean:
            return self.evaluate(image)
        crop_seed, flip_seed, augment_seed, cutout_seed = images.split_seed(seed, 4)
        if not self.small_image:
            image = images.train_image(image, self.image_size, crop_seed, flip=False)
            if self.augmentation is not None:
                # The ops take bytes. Without ops, the overshoots of the bicubic resize remain.
                image = images.to_uint8(image)
            # The augmentation comes last, as in the original code.
            return self._augment(self._flip(image, flip_seed), augment_seed)
        image = images.to_uint8(images.small_eval_image(image, self.image_size))
        image = self._augment(image, augment_seed)
        if self.augmentation is not None:
            image = augment.cutout(image, cutout_seed, self.image_size // 4)
        # In proportion to the original code's shift of 4 at 32 pixels.
        image = images.reflect_pad_crop(image, crop_seed, pad=self.image_size // 8)
        return self._flip(image, flip_seed)

    def _flip(self, image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        return images.random_flip(image, seed) if self.flip else image

    def _augment(self, image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        if self.augmentation is None:
            return image
        constants = self.augmentation.constants(self.image_size, self.small_image)
        return self.augmentation.apply(image, seed, **constants)

    def describe(self) -> str:
        """Describes the preprocessing of training images in one line for logs."""
        size = self.image_size
        if self.clean:
            return f"evaluation crop at {size} px, no augmentation"
        steps = [] if self.small_image else [f"random crop to {size} px"]
        augmented = []
        if self.augmentation is not None:
            augmented = [
                self.augmentation.describe(**self.augmentation.constants(size, self.small_image))
            ]
        if self.small_image:
            steps += augmented
            if augmented:
                steps.append(f"cutout({size // 4})")
            steps.append(f"shift(±{size // 8})")
        flip = ["flip"] if self.flip else []
        return "; ".join(steps + flip if self.small_image else steps + flip + augmented)


# Differs (8) in docs/differences.md: every draw is a function of the seed and the example, here of
# its position in the stream.
def _sample_seed(seed: int, salt: int, index: tf.Tensor) -> tf.Tensor:
    return tf.random.experimental.stateless_fold_in(tf.constant([seed, salt], tf.int64), index)


def _checked_label(label: tf.Tensor, num_classes: int) -> tf.Tensor:
    # One-hot encoding would silently map such a label to no class.
    check = tf.debugging.Assert(
        (label >= 0) & (label < num_classes),
        [f"label out of range 0..{num_classes - 1} (0-based):", label],
    )
    with tf.control_dependencies([check]):
        return tf.identity(label)


def labeled_batches(
    source: Source,
    preprocessing: Preprocessing,
    *,
    num_classes: int,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    order_since: int = 0,
    shuffle_buffer: int = 10000,
    share: Share = WHOLE,
) -> tf.data.Dataset:
    """Returns endless training batches.

    Args:
      batch_size: number of examples over all replicas.
      order_since: see `streams.Plan.step`.
      share: the rows of each batch to prepare.

    Yields:
      `image` [B, S, S, 3], `label` int32 [B], 0-based; B = batch_size / replicas.
    """

    def prepare(index: tf.Tensor, serialized: tf.Tensor) -> dict[str, tf.Tensor]:
        example = tfexamples.parse_labeled(serialized)
        image = preprocessing.train(example["image"], _sample_seed(seed, _LABELED, index))
        return {"image": image, "label": _checked_label(example["label"], num_classes)}

    plan = Plan(source, batch_size, seed, shuffle_buffer)
    return _batches(plan, prepare, plan.step(start_step, order_since), share)


def unlabeled_batches(
    source: Source,
    preprocessing: Preprocessing,
    *,
    num_classes: int,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    order_since: int = 0,
    shuffle_buffer: int = 10000,
    teacher_preprocessing: Preprocessing | None = None,
    weak_preprocessing: Preprocessing | None = None,
    share: Share = WHOLE,
) -> tf.data.Dataset:
    """Returns endless training batches of pseudo-labeled records.

    Args:
      batch_size: number of examples over all replicas.
      teacher_preprocessing: if given, records need no stored labels, and each image is also
        included clean, at the teacher's resolution.
      weak_preprocessing: if given, records need no stored labels, and each image is also included
        with this preprocessing, drawn independently.
      order_since, share: see `labeled_batches`.

    Yields:
      `unl_image` [B, S, S, 3] and either `unl_label` int32 [B], `unl_probs` float32
      [B, num_classes], or `teacher_image` [B, T, T, 3], or `weak_image` [B, S, S, 3];
      B = batch_size / replicas.
    """

    def prepare(index: tf.Tensor, serialized: tf.Tensor) -> dict[str, tf.Tensor]:
        sample_seed = _sample_seed(seed, _UNLABELED, index)
        if teacher_preprocessing is not None:
            image = tfexamples.parse_unlabeled(serialized)
            return {
                "unl_image": preprocessing.train(image, sample_seed),
                "teacher_image": teacher_preprocessing.evaluate(image),
            }
        if weak_preprocessing is not None:
            image = tfexamples.parse_unlabeled(serialized)
            weak_seed = tf.random.experimental.stateless_fold_in(sample_seed, 1)
            return {
                "unl_image": preprocessing.train(image, sample_seed),
                "weak_image": weak_preprocessing.train(image, weak_seed),
            }
        example = tfexamples.parse_pseudo_labeled(serialized, num_classes)
        return {
            "unl_image": preprocessing.train(example["image"], sample_seed),
            "unl_label": _checked_label(example["label"], num_classes),
            "unl_probs": example["probs"],
        }

    # The seed differs from the labeled set's because both may be the same files.
    plan = Plan(source, batch_size, seed + 1, shuffle_buffer)
    return _batches(plan, prepare, plan.step(start_step, order_since), share)


def _batches(plan: Plan, prepare, step: int, share: Share) -> tf.data.Dataset:
    start = step * plan.batch_size

    def prepare_numbered(number: tf.Tensor, serialized: tf.Tensor) -> dict[str, tf.Tensor]:
        return prepare(plan.index(number, start, share), serialized)

    data = plan.read(start, share)
    data = data.map(prepare_numbered, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    return data.batch(share.per_replica(plan.batch_size), drop_remainder=True)


def join(*datasets: tf.data.Dataset) -> tf.data.Dataset:
    """Zips endless datasets of dicts into one dataset of merged dicts, prefetched."""
    data = datasets[0]
    if len(datasets) > 1:
        data = tf.data.Dataset.zip(datasets).map(
            lambda *parts: {key: value for part in parts for key, value in part.items()}
        )
    # With several workers, shapes are static only if the dataset is known to be infinite.
    endless = tf.data.experimental.assert_cardinality(tf.data.experimental.INFINITE_CARDINALITY)
    return data.apply(endless).prefetch(tf.data.AUTOTUNE)


def eval_batches(
    source: Source,
    preprocessing: Preprocessing,
    *,
    num_classes: int,
    batch_size: int,
    share: Share = WHOLE,
) -> tf.data.Dataset:
    """Returns every record once, in file order; the last batches are padded.

    Args:
      batch_size: number of examples over all replicas.
      share: which part of the set to prepare. Each host prepares, and reads only, a run of as many
        records as it has rows in all batches.

    Yields:
      `image` float32 [B, S, S, 3], `label` int32 [B], `index` int32 [B] (position in the set) and
      `mask` float32 [B] (1 for an example, 0 for padding); B = batch_size / replicas. Every replica
      gets the same number of batches.
    """

    def prepare(index: tf.Tensor, serialized: tf.Tensor) -> dict[str, tf.Tensor]:
        example = tfexamples.parse_labeled(serialized)
        return {
            "image": preprocessing.evaluate(example["image"]),
            "label": _checked_label(example["label"], num_classes),
            "index": tf.cast(index, tf.int32),
            "mask": tf.ones([]),
        }

    steps, (first, end) = -(-source.total // batch_size), share.rows(batch_size)
    begin, end = (min(steps * row, source.total) for row in (first, end))
    data = in_order(source, begin, end).enumerate(begin)
    data = data.map(prepare, num_parallel_calls=tf.data.AUTOTUNE)
    size = share.per_replica(batch_size)
    # Differs (4): the last batch is padded, not dropped.
    data = data.batch(size).map(lambda batch: pad_batch(batch, size))
    # All replicas take part in all steps, so hosts that run out of records add padding.
    pieces = steps * (share.replicas // share.num_hosts)
    nothing = tf.nest.map_structure(lambda s: tf.zeros(s.shape, s.dtype), data.element_spec)
    padding = tf.data.Dataset.from_tensors(nothing).repeat(pieces)
    return data.concatenate(padding).take(pieces).prefetch(tf.data.AUTOTUNE)


def pad_batch(batch: dict[str, tf.Tensor], batch_size: int) -> dict[str, tf.Tensor]:
    """Appends zeros to every tensor of a short batch, so that all batches have one static shape."""

    def pad(x: tf.Tensor) -> tf.Tensor:
        missing = batch_size - tf.shape(x)[0]
        padded = tf.pad(x, [[0, missing]] + [[0, 0]] * (x.shape.rank - 1))
        return tf.ensure_shape(padded, [batch_size, *x.shape[1:]])

    return tf.nest.map_structure(pad, batch)


def name_bad_record(source: Source, check: Callable[[bytes], None]) -> str | None:
    """Finds the first record that cannot be used, for an error message; None if all are usable.

    Args:
      check: function that raises if a payload cannot be used.
    """
    left_out = source.excluded or ((),) * len(source.paths)
    for path, count, excluded in zip(source.paths, source.counts, map(frozenset, left_out)):
        # A truncated tail is neither counted nor read, so it is never the cause.
        for record in itertools.islice(tfrecords.read(path), count):
            problem = record.problem
            # Damage also stops the reading of records that are excluded.
            if record.payload is not None and record.position not in excluded:
                try:
                    check(record.payload)
                except Exception as e:  # Any error: the user needs the location of the record.
                    problem = str(e).splitlines()[0]
            if problem:
                return f"{path}, record {record.position}: {problem}"
    return None


def check_image(payload: bytes) -> None:
    """Raises DataError or a TensorFlow error unless the record has a decodable image."""
    images.decode(tf.constant(tfexamples.image_bytes(payload)))


def check_trainable(payload: bytes, num_classes: int) -> None:
    """Raises DataError or a TensorFlow error unless the image and label are usable."""
    check_image(payload)
    label = tfexamples.label(payload)
    if not 0 <= label < num_classes:
        raise DataError(f"label {label} (0-based) is outside 0..{num_classes - 1}")
