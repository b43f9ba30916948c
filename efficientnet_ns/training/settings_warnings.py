"""Warnings before training: a schedule or averages that do not fit the data."""

from __future__ import annotations

from efficientnet_ns.config.sections import TrainConfig
from efficientnet_ns.resolve.resolved_config import ResolvedConfig

# Share of the initial batch-norm statistics in the evaluated ones above which accuracy suffers.
_MAX_SHARE = 0.01
# More passes over the labeled images than in any published recipe (EfficientNet-L2: 700 epochs).
_MANY_EPOCHS = 5000


def settings_warnings(resolved: ResolvedConfig, num_images: int) -> list[str]:
    """Returns a line for each setting that is unlikely to work, with a value to use instead.

    Args:
      resolved: settings of a training run from its first step.
      num_images: number of labeled images.
    """
    found = [_schedule(resolved, num_images), _averages(resolved)]
    return [line for line in found if line]


def _schedule(resolved: ResolvedConfig, num_images: int) -> str:
    train = resolved.config.train
    images = train.train_batch_size * train.label_data_sample_prob
    epochs = resolved.steps_to_run * images / num_images
    default = TrainConfig()
    # The default is 350 epochs of ImageNet; a user who did not set it should learn that.
    whose = "ImageNet's schedule, " if train.train_steps == default.train_steps else ""
    if epochs > _MANY_EPOCHS:
        return (
            f"--train_steps={train.train_steps} of --train_batch_size={train.train_batch_size} are "
            f"{whose}{epochs:,.0f} passes over {num_images} labeled images: use fewer steps; a few "
            "hundred passes are usual"
        )
    if train.train_batch_size > num_images:
        return (
            f"--train_batch_size={train.train_batch_size} exceeds the {num_images} labeled images: "
            "use a smaller batch, e.g. 32"
        )
    warmup = round(train.warmup_epochs * num_images / images)
    if train.train_last_step_num < 0 and warmup > resolved.steps_to_run / 2:
        return (
            f"--warmup_epochs={train.warmup_epochs:g} are {warmup} of {resolved.steps_to_run} steps, in which "
            "the learning rate only rises: use --warmup_epochs=0, or more --train_steps"
        )
    return ""


def _averages(resolved: ResolvedConfig) -> str:
    train, steps = resolved.config.train, resolved.steps_to_run
    if train.init_model or train.init_weights:  # The statistics start from a trained model's.
        return ""
    share = initial_share(train.bn_momentum, train.moving_average_decay, steps)
    if share <= _MAX_SHARE:
        return ""
    return (
        f"after {steps} steps, the initial values will still make up {share:.0%} of the evaluated "
        f"batch-norm statistics: use --bn_momentum={_momentum_for(steps):g} (now "
        f"{train.bn_momentum:g}) and --moving_average_decay={_momentum_for(steps):g} (now "
        f"{train.moving_average_decay:g}), or more --train_steps"
    )


def initial_share(bn_momentum: float, moving_average_decay: float, steps: int) -> float:
    """Returns the share of the initial batch-norm statistics in their average after `steps`, 0..1.

    Statistics move by 1 - bn_momentum in each step, their average by 1 - min(moving_average_decay,
    (1 + n) / (10 + n)) after step n; see `ema.ramped_decay`.
    """
    statistics = average = 1.0
    for n in range(1, steps + 1):
        statistics *= bn_momentum
        decay = min(moving_average_decay, (1 + n) / (10 + n))
        average = decay * average + (1 - decay) * statistics
        if average < _MAX_SHARE / 100 and statistics < average:
            break  # It only decreases from here.
    return average


def _momentum_for(steps: int) -> float:
    """Returns the largest usual decay whose averages converge within `steps`."""
    # Tried for both statistics and average, because the advice names both.
    usual = (0.99, 0.97, 0.95, 0.9, 0.8)
    return next((m for m in usual if initial_share(m, m, steps) <= _MAX_SHARE), 0.5)
