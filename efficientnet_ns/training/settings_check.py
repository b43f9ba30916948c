"""Rejects training settings that contradict each other, before any work."""

from __future__ import annotations

import re

from efficientnet_ns.config.fields import ConfigError, needed
from efficientnet_ns.config.sections import Config, TrainConfig


def check(config: Config) -> str:
    """Checks training settings; returns model_dir.

    Raises:
      ConfigError: If settings conflict; the message names the flags and what to do.
    """
    model_dir = needed(config.train.model_dir, "model_dir", "the folder for checkpoints and logs")
    _check_data(config)
    _check_initial_weights(config.train)
    _check_schedule(config.train)
    return model_dir


def _check_data(config: Config) -> None:
    """Requires labeled records, and unlabeled ones if and only if there is a ratio for them."""
    train, data = config.train, config.data
    needed(data.label_data_dir, "label_data_dir", "the folder with the labeled records")
    if train.unlabel_ratio and not data.unlabel_data_dir:
        raise ConfigError(f"--unlabel_ratio={train.unlabel_ratio} needs --unlabel_data_dir")
    if not (train.unlabel_ratio or train.label_weight):
        raise ConfigError("--label_weight=0 without --unlabel_ratio leaves nothing to learn from")
    if data.unlabel_data_dir and not train.unlabel_ratio:
        raise ConfigError(
            f"--unlabel_data_dir={data.unlabel_data_dir} has no effect without --unlabel_ratio: set "
            "--unlabel_ratio (14 for the paper's students), or pass --unlabel_data_dir= to train a "
            "teacher"
        )
    if bool(train.teacher_model_name) != bool(train.teacher_model_path):
        raise ConfigError("--teacher_model_name and --teacher_model_path must be given together")
    if train.teacher_model_name and not train.unlabel_ratio:
        raise ConfigError(
            f"--teacher_model_name={train.teacher_model_name} has no effect without --unlabel_ratio: "
            "set --unlabel_ratio, or drop the teacher"
        )
    _check_consistency(train)
    if not 0 < train.label_data_sample_prob <= 1:
        raise ConfigError(
            f"--label_data_sample_prob={train.label_data_sample_prob} must be above 0 and at most 1"
        )
    if train.teacher_softmax_temp == 0 or -1 < train.teacher_softmax_temp < 0:
        raise ConfigError(
            f"--teacher_softmax_temp={train.teacher_softmax_temp}: "
            "use -1 for hard labels, or a positive temperature"
        )


def _check_consistency(train: TrainConfig) -> None:
    threshold, smoothing = train.consistency_threshold, train.label_smoothing
    if not threshold:
        return
    if train.teacher_model_name or not train.unlabel_ratio:
        raise ConfigError(
            f"--consistency_threshold={threshold} replaces a teacher and needs unlabeled images: "
            "drop --teacher_model_name and set --unlabel_ratio"
        )
    # With smoothed labels, the probability of a perfectly learned label is about 1 - smoothing.
    if threshold >= 1 - smoothing:
        raise ConfigError(
            f"--consistency_threshold={threshold} cannot be reached with --label_smoothing={smoothing}: "
            "set --label_smoothing=0, or lower the threshold"
        )


def _check_initial_weights(train: TrainConfig) -> None:
    if train.init_weights and train.init_model_path not in (None, train.init_weights):
        raise ConfigError(
            f"--init_weights={train.init_weights} and --init_model_path={train.init_model_path} both "
            "name initial weights: drop one of them"
        )
    if train.init_model and not (train.init_model_path or train.init_weights):
        raise ConfigError("--init_model needs --init_model_path")
    if train.keep_bn_statistics and not (train.init_model or train.init_weights):
        raise ConfigError(
            "--keep_bn_statistics needs --init_weights or --init_model: new weights have none to keep"
        )
    if train.ema_initial_share and not train.keep_bn_statistics:
        # Statistics of mixed weights are not the mix of the statistics.
        raise ConfigError(
            f"--ema_initial_share={train.ema_initial_share} needs --keep_bn_statistics, and --init_weights or "
            "--init_model"
        )
    for pattern in train.init_skip.split(","):
        try:
            re.compile(pattern)
        except re.error as e:
            raise ConfigError(f"--init_skip: {pattern!r} is not a regular expression: {e}") from e


def _check_schedule(train: TrainConfig) -> None:
    # Rounded as in ResolvedConfig: a small train_ratio may leave 0.
    steps = int(train.train_steps * train.train_ratio)
    last = int(train.train_last_step_num * train.train_ratio)
    if steps < 1 or last == 0 or last > steps:
        raise ConfigError(
            f"--train_steps={train.train_steps}, --train_ratio={train.train_ratio} and "
            f"--train_last_step_num={train.train_last_step_num} leave nothing to train: "
            "train_last_step_num must be -1 or in 1..train_steps"
        )
    if train.lr_schedule == "cosine" and train.final_base_lr is not None:
        raise ConfigError(
            "--final_base_lr applies to --lr_schedule=staircase only: a cosine ends at 0"
        )
    if train.final_base_lr is not None and not 0 < train.final_base_lr < train.base_learning_rate:
        raise ConfigError(
            f"--final_base_lr={train.final_base_lr} must be above 0 and below "
            f"--base_learning_rate={train.base_learning_rate}"
        )
