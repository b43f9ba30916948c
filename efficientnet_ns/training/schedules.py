"""Learning-rate schedules: linear warm-up, then a staircase exponential decay (paper section 3.1).

The alternative for short training is half a cosine (arXiv 1608.03983), which ends at 0.
"""

from __future__ import annotations

import math

import tensorflow as tf

WARMUP_EPOCHS = 5.0
DECAY_FACTOR = 0.97
DECAY_EPOCHS = 2.4


@tf.keras.utils.register_keras_serializable("efficientnet_ns")
class WarmupStaircase(tf.keras.optimizers.schedules.LearningRateSchedule):
    """lr(step) = peak · 0.97^⌊step / decay_steps⌋ after a linear ramp from 0 to `peak`.

    Decay counts from step 0, so the ramp ends above the staircase and drops onto it; `decay_steps`
    is not rounded. Both are as in the original. With `start_step` > 0 (fine-tuning at the end of a
    schedule) there is no ramp.

    Args:
      peak: learning rate at the end of the ramp.
      decay_steps: length of one stair in update steps; may be fractional.
      warmup_steps: length of the ramp.
      start_step: added to the optimizer's step.
    """

    def __init__(self, peak: float, decay_steps: float, warmup_steps: int, start_step: int = 0):
        super().__init__()
        self.peak, self.decay_steps = peak, decay_steps
        self.warmup_steps, self.start_step = warmup_steps, start_step

    def __call__(self, step: tf.Tensor) -> tf.Tensor:
        step = tf.cast(step, tf.float32) + float(self.start_step)
        decayed = self.peak * tf.pow(DECAY_FACTOR, tf.floor(step / self.decay_steps))
        if self.start_step > 0 or self.warmup_steps == 0:
            return decayed
        ramp = self.peak * step / float(self.warmup_steps)
        return tf.where(step < self.warmup_steps, ramp, decayed)

    def get_config(self) -> dict:
        return {
            "peak": self.peak,
            "decay_steps": self.decay_steps,
            "warmup_steps": self.warmup_steps,
            "start_step": self.start_step,
        }


@tf.keras.utils.register_keras_serializable("efficientnet_ns")
class WarmupCosine(tf.keras.optimizers.schedules.LearningRateSchedule):
    """lr(step) = peak · (1 + cos(π · step / total_steps)) / 2 after a linear ramp to the curve.

    Args:
      peak: learning rate at the beginning of the curve.
      total_steps: update steps of the whole schedule.
      warmup_steps: length of the ramp, which multiplies the curve.
      start_step: added to the optimizer's step.
    """

    def __init__(self, peak: float, total_steps: int, warmup_steps: int, start_step: int = 0):
        super().__init__()
        self.peak, self.total_steps = peak, total_steps
        self.warmup_steps, self.start_step = warmup_steps, start_step

    def __call__(self, step: tf.Tensor) -> tf.Tensor:
        step = tf.cast(step, tf.float32) + float(self.start_step)
        # Beyond the end, the cosine would rise again.
        done = tf.minimum(step / float(self.total_steps), 1.0)
        curve = self.peak * 0.5 * (1.0 + tf.cos(math.pi * done))
        # The rate of the first update, at step 0, must not be 0.
        return curve * tf.minimum((step + 1.0) / float(self.warmup_steps + 1), 1.0)

    def get_config(self) -> dict:
        return {
            "peak": self.peak,
            "total_steps": self.total_steps,
            "warmup_steps": self.warmup_steps,
            "start_step": self.start_step,
        }


def learning_rate(
    *,
    base_learning_rate: float,
    labeled_batch_size: float,
    num_train_images: int,
    train_steps: int,
    train_ratio: float = 1.0,
    final_base_lr: float | None = None,
    last_steps: int | None = None,
    warmup_epochs: float = WARMUP_EPOCHS,
    label_data_sample_prob: float = 1.0,
    kind: str = "staircase",
    scaled: bool = True,
) -> WarmupStaircase | WarmupCosine:
    """Returns the schedule of a run.

    Args:
      base_learning_rate: per 256 labeled images; 0.016 in the paper.
      labeled_batch_size: labeled images per update.
      num_train_images: size of the labeled set; defines an epoch.
      train_steps: update steps of the whole schedule.
      train_ratio: stretches the decay period (2 for the 700-epoch recipes).
      final_base_lr: if given, the decay period is chosen so that the schedule ends at this rate
        per 256.
      last_steps: train only the last `last_steps` steps of the schedule, without warm-up.
      warmup_epochs: length of the ramp.
      label_data_sample_prob: fraction of the labeled images that enter the loss; only these count,
        except in the length of a schedule that ends at `final_base_lr`, as in the original.
      kind: staircase or cosine, which always ends at 0.
      scaled: whether `base_learning_rate` is per 256 images; else it is the rate itself.

    Raises:
      ValueError: If `final_base_lr` and `last_steps` leave no steps for the decay.
    """
    counted_batch_size = labeled_batch_size * label_data_sample_prob
    steps_per_epoch = num_train_images / counted_batch_size
    decay_epochs = DECAY_EPOCHS * train_ratio
    if final_base_lr is not None:
        epochs = train_steps * labeled_batch_size / num_train_images
        if last_steps not in (None, train_steps) and epochs <= warmup_epochs:
            raise ValueError(
                f"--final_base_lr and --train_last_step_num need a schedule longer than its warm-up of "
                f"{warmup_epochs:g} epochs, but it has {epochs:g}"
            )
        # The number of stairs, each a factor of 0.97, from the first rate to the last.
        stairs = math.log(final_base_lr / base_learning_rate) / math.log(DECAY_FACTOR)
        decay_epochs = (epochs - warmup_epochs) / stairs
    start_step = 0 if last_steps is None else train_steps - last_steps
    peak = base_learning_rate * (counted_batch_size / 256.0 if scaled else 1.0)
    warmup_steps = int(steps_per_epoch * warmup_epochs)
    if kind == "cosine":
        return WarmupCosine(
            peak=peak, total_steps=train_steps, warmup_steps=warmup_steps, start_step=start_step
        )
    decay_steps = steps_per_epoch * decay_epochs
    return WarmupStaircase(
        peak=peak, decay_steps=decay_steps, warmup_steps=warmup_steps, start_step=start_step
    )
