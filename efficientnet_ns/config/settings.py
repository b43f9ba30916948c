"""Configuration: frozen dataclasses whose fields are the flags (name, default, help in one place).

Entries call `define_flags(Config)` and `from_flags(Config)`; everything below them takes the
dataclass or plain arguments. Importing this module does not import TensorFlow, so that `--help` is
quick.
"""

from __future__ import annotations

import dataclasses
import functools
import logging as std_logging
import math
import numbers
import os
import sys
import typing
from collections.abc import Callable, Mapping
from typing import Any

from absl import app, flags, logging

from efficientnet_ns.config import flag_help, preemption
from efficientnet_ns.files import standard_output


class ConfigError(ValueError):
    """A flag has a value that cannot work; the message names it."""


def setting(
    default: Any,
    help: str,  # noqa: A002 - the word absl uses
    *,
    choices: tuple[str, ...] | None = None,
    low: float | None = None,
    high: float | None = None,
    free: bool = False,
) -> Any:
    """A dataclass field that is also a flag.

    Args:
      default: of the flag.
      help: of the flag.
      choices: allowed values.
      low: smallest allowed value.
      high: largest allowed value.
      free: may change between the runs that continue one model_dir.
    """
    metadata = {"help": help, "choices": choices, "low": low, "high": high, "free": free}
    return dataclasses.field(default=default, metadata=metadata)


class Settings:
    """What the dataclasses of settings share: paths may be `pathlib.Path`, and begin with `~`."""

    def __post_init__(self) -> None:
        for name, value in list(vars(self).items()):
            plain = os.fspath(value) if isinstance(value, os.PathLike) else value
            if isinstance(plain, str) and _is_path(name):
                plain = ";".join(map(os.path.expanduser, plain.split(";")))
            if plain is not value:
                object.__setattr__(self, name, plain)


def _is_path(name: str) -> bool:
    """Whether the setting of this name is a path, or several joined with ';'."""
    return name.endswith(("_dir", "_path")) or name in ("task_name", "baseline", "json_file")


@dataclasses.dataclass(frozen=True)
class ModelConfig(Settings):
    """Which network."""

    model_name: str = setting("efficientnet-b0", "Variant: efficientnet-b0 … -b7, -l2, -test.")
    input_image_size: int | None = setting(
        None, "Image side in pixels; default: the task's, else the model's own.", low=8
    )
    num_label_classes: int = setting(1000, "Number of classes; tasks other than imagenet set it.")
    small_image_model: bool = setting(
        False, "Strides of stages 2 and 3 are 1, for images of 32 pixels and less."
    )
    width_coefficient: float | None = setting(
        None, "Overrides the variant's width multiplier.", low=0.01
    )
    depth_coefficient: float | None = setting(
        None, "Overrides the variant's depth multiplier.", low=0.01
    )
    dropout_rate: float | None = setting(
        None, "Overrides the variant's head dropout.", low=0, high=1
    )
    stochastic_depth_rate: float | None = setting(
        None, "Drop probability of the last block, linear from 0; default 0.2.", low=0, high=1
    )


@dataclasses.dataclass(frozen=True)
class DataConfig(Settings):
    """Which images, and what is done to them."""

    task_name: str = setting(
        "imagenet", "imagenet, svhn, digits, or the path of a .json file that describes a task."
    )
    data_source: str = setting(
        "",
        "tfds:<name>: a set of TensorFlow Datasets as labeled images and task, in place of "
        "label_data_dir and task_name. Made into records when first used.",
        free=True,  # The records made from it, in label_data_dir, are not.
    )
    data_cache_dir: str = setting(
        "",
        "Where the records of data_source are made; default: efficientnet_ns in the TFDS folder.",
        free=True,
    )
    tfds_data_dir: str | None = setting(
        None, "TFDS folder; default: $TFDS_DATA_DIR, else ~/tensorflow_datasets.", free=True
    )
    label_data_dir: str | None = setting(
        None, "Folder of labeled records; several joined with ';'."
    )
    unlabel_data_dir: str = setting(
        "", "Folder of (pseudo-labeled) unlabeled records; several joined with ';'."
    )
    num_train_images: int | None = setting(
        None, "Labeled images per epoch; default: the task's, else counted.", low=1
    )
    num_eval_images: int | None = setting(
        None,
        "Measure the first so many images of the evaluation set; default: all.",
        low=1,
        free=True,
    )
    num_test_images: int | None = setting(
        None, "The same of the test set, for tasks that have one.", low=1, free=True
    )
    num_train_shards: int | None = setting(
        None, "Train on the first so many shards of the labeled set; default: all.", low=1
    )
    use_cache: bool = setting(
        True,
        "Keep the encoded records of a set in memory after their first reading, when they fit into a "
        "quarter of what is free; changes no bit of the training.",
        free=True,
    )
    augment_name: str | None = setting(
        None,
        "Augmentation of training images: randaugment (the original calls it v1), autoaugment, or "
        "none, also after a preset that names one.",
        choices=("randaugment", "v1", "autoaugment", "none"),
    )
    unl_aug: str = setting(
        "default",
        "Augmentation of unlabeled images: default (as labeled), randaugment, v1, autoaugment, "
        "none (crop or shift, and flip), clean (the evaluation crop).",
        choices=("default", "randaugment", "v1", "autoaugment", "none", "clean"),
    )
    autoaugment_policy: str | None = setting(
        None,
        "Policy of autoaugment, by the images it was found on; default: svhn for that task, else "
        "imagenet (v0, which EfficientNet was trained with).",
        choices=("imagenet", "svhn", "cifar10"),
    )
    randaug_mag: int = setting(27, "RandAugment magnitude M, levels of 10.", low=0)
    randaug_layer: int = setting(2, "RandAugment operations per image N.", low=0)
    randaug_mode: str = setting(
        "original",
        "Levels above 10: original (posterize and solarize wrap, as published) or clipped; also "
        "of autoaugment.",
        choices=("original", "clipped"),
    )
    cutout_op: bool = setting(True, "Include Cutout among RandAugment's operations.")
    remove_aug: bool = setting(
        False, "Train on the evaluation crop without any augmentation (FixRes fine-tuning)."
    )
    shuffle_buffer: int = setting(10000, "Undecoded records held to shuffle from.", low=1)


@dataclasses.dataclass(frozen=True)
class TrainConfig(Settings):
    """How the student learns."""

    model_dir: str | None = setting(None, "Folder of checkpoints and logs.", free=True)
    train_steps: int = setting(109474, "Update steps of the whole schedule.", low=1)
    train_ratio: float = setting(
        1.0, "Stretches train_steps and the decay period (2 for the 700-epoch recipes).", low=0
    )
    train_last_step_num: int = setting(
        -1, "Train only the last so many steps of the schedule, without warm-up; -1: all."
    )
    train_batch_size: int = setting(4096, "Labeled images per update, over all replicas.", low=1)
    label_data_sample_prob: float = setting(
        1.0,
        "Probability that a labeled image enters the loss, for labeled batches that must be smaller "
        "than the number of replicas: train_batch_size times this counts as the batch.",
        low=0,
        high=1,
    )
    num_shards_per_group: int = setting(
        -1,
        "Replicas that share batch-norm statistics: -1: one up to 8 replicas, else groups of "
        "max(8, replicas/8); 1: one; k: groups of k; -2: all.",
        low=-2,
    )
    base_learning_rate: float = setting(0.016, "Learning rate per 256 labeled images.", low=0)
    final_base_lr: float | None = setting(
        None, "When given, the decay period is chosen to end at this rate per 256."
    )
    warmup_epochs: float = setting(5.0, "Length of the linear warm-up.", low=0)
    moving_average_decay: float = setting(
        0.9999, "Ceiling of the weight average's decay.", low=0, high=1
    )
    bn_momentum: float = setting(0.99, "Decay of the batch-norm moving statistics.", low=0, high=1)
    weight_decay: float = setting(1e-5, "Factor of half the squared norm.", low=0)
    label_smoothing: float = setting(0.1, "Weight of the uniform distribution.", low=0, high=1)
    unlabel_ratio: float = setting(
        0.0, "Unlabeled images per labeled one, and their weight.", low=0
    )
    unl_model_noise: bool = setting(
        True,
        "Dropout and stochastic depth for unlabeled images too; --nounl_model_noise: for labeled ones "
        "alone, an ablation of the paper.",
    )
    label_weight: float = setting(
        1.0,
        "Weight of the labeled loss; 0: labels have no part in the loss (pretraining on pseudo "
        "labels).",
        low=0,
    )
    teacher_softmax_temp: float = setting(
        -1.0, "Temperature of soft pseudo labels; -1: hard labels."
    )
    teacher_model_name: str | None = setting(
        None, "Variant of a teacher that labels on the fly; default: stored labels."
    )
    teacher_model_path: str | None = setting(None, "Checkpoint of the on-the-fly teacher.")
    teacher_image_size: int | None = setting(
        None,
        "Resolution of the on-the-fly teacher; default: its variant's (the task's when small).",
    )
    init_model: bool = setting(False, "Start from the weights at init_model_path.")
    init_model_path: str | None = setting(None, "Checkpoint to start from.")
    fix_layer_num: int = setting(
        -1,
        "Freeze the stem and the first so many blocks: no updates, batch norm with its moving "
        "statistics, no stochastic depth; -1: nothing is frozen.",
        low=-1,
    )
    init_skip: str = setting(
        "",
        "Regular expressions, joined with ',', of variables that keep their initial values with "
        "--init_model: head/dense/ for other classes.",
    )
    seed: int = setting(0, "Of initial weights, data order, augmentation and noise.", low=0)
    steps_per_eval: int = setting(3000, "Evaluate every so many steps.", low=1, free=True)
    eval_batch_size: int = setting(8, "Images per evaluation step.", low=1, free=True)
    eval_ema: bool = setting(
        True, "With --mode=eval: measure the moving-average weights, not the raw ones.", free=True
    )
    eval_image_size: int | None = setting(
        None,
        "With --mode=eval: image side in pixels; default: that of the training.",
        low=8,
        free=True,
    )
    eval_views: int = setting(
        1,
        "With --mode=eval: 2 averages the probabilities with those of the mirrored image.",
        low=1,
        free=True,
    )
    eval_dir: str | None = setting(
        None,
        "With --mode=eval: folder of eval.json and eval_report.html; default: eval in model_dir.",
        free=True,
    )
    save_checkpoints_steps: int = setting(1000, "Save every so many steps.", low=1, free=True)
    keep_checkpoint_max: int = setting(5, "Checkpoints kept.", low=1, free=True)
    iterations_per_loop: int = setting(
        1000,
        "Steps the device runs between two looks from the host: how soon logs and a request to "
        "stop (SIGTERM) are answered.",
        low=1,
        free=True,
    )
    log_step_count_steps: int = setting(
        64, "A log line every so many steps, at ends of host loops.", low=1, free=True
    )
    preview_images: int = setting(
        16,
        "Augmented images of each kind in model_dir/augmented.png and TensorBoard; 0: none.",
        low=0,
        free=True,
    )
    debug: int = setting(
        0, "1: log the whole configuration, the model and the first batch.", low=0, free=True
    )
    eval_continuously: bool = setting(
        False,
        "With --mode=eval: measure every new checkpoint in model_dir until the last step.",
        free=True,
    )


@dataclasses.dataclass(frozen=True)
class PredictConfig(Settings):
    """Which shards a teacher labels, and where to."""

    predict_ckpt_path: str = setting(
        "",
        "Weights of the teacher: checkpoint, folder with one, or file of Keras (.h5) or timm "
        "(.safetensors, .pth).",
    )
    output_dir: str = setting("", "Folder of the prediction records.")
    info_dir: str = setting("", "Folder of the per-shard counts.")
    num_shards: int = setting(128, "Number of shards of the unlabeled set.", low=1)
    shard_id: str = setting(
        "0",
        "Shards to label: a list or ranges, e.g. 0,3,8-15; auto: all of them, shared with every "
        "process that was started with the same output_dir.",
    )
    total_replicas: int = setting(1, "Workers that share each shard.", low=1)
    worker_id: int = setting(0, "This worker among total_replicas.", low=0)
    file_prefix: str = setting(
        "train",
        "Prefix of the unlabeled files: train or extra. noisy_student needs it only where other sets "
        "lie beside them.",
    )
    data_type: str = setting("tfrecord", "Kind of the input files.", choices=("tfrecord",))
    reassign_label: bool = setting(
        False,
        "Give new labels to pseudo-labeled records, <file_prefix>-<worker_id>-<shard>-of-<shards>.",
    )
    inference_engine: str = setting(
        "auto",
        "What computes with --mode=predict and --mode=eval: tf (TensorFlow), xnnpack (CPU only), or "
        "auto: xnnpack with one device that is no accelerator, for models that it can compute, else "
        "tf. --eval_continuously, --noised_teacher, attacks and evaluation during training: tf.",
        choices=("auto", "tf", "xnnpack"),
    )
    test_time_views: int = setting(
        1,
        "Views of each image whose probabilities are averaged: 1; 2 (mirrored); 10 (four corners "
        "and centre, each also mirrored).",
        low=1,
    )
    noised_teacher: bool = setting(
        False,
        "Label images augmented as unlabeled ones are for training, with dropout and stochastic depth "
        "on, which makes worse labels: an ablation of the paper.",
    )
    max_bad_fraction: float = setting(
        0.01, "Stop when more than this fraction of a shard's records is unreadable.", low=0, high=1
    )
    part_seconds: float = setting(
        60.0, "Work of a shard that a killed process may lose, in seconds.", low=0
    )
    lease_seconds: float = setting(
        300.0, "A process without a sign of life for so long has lost its shard to others.", low=1
    )


@dataclasses.dataclass(frozen=True)
class HardwareConfig(Settings):
    """What it runs on."""

    use_tpu: bool = setting(
        True, "Use the TPU given by --tpu; without --tpu, the local devices.", free=True
    )
    tpu: str | None = setting(None, "TPU name, 'local' on a TPU VM, or grpc:// address.", free=True)
    tpu_zone: str | None = setting(None, "Zone of the TPU.", free=True)
    gcp_project: str | None = setting(None, "Project of the TPU.", free=True)
    use_bfloat16: bool = setting(
        True, "Compute in bfloat16 on TPU; weights stay float32.", free=True
    )
    precision: str = setting(
        "auto",
        "auto: bfloat16 on TPU with use_bfloat16, else float32 (most CPUs emulate bfloat16); or the "
        "one to use on any device.",
        choices=("auto", "float32", "mixed_bfloat16"),
        free=True,
    )
    num_replicas: int = setting(
        0,
        "Local devices that share each batch: GPUs, or without any, logical CPU devices; 0: all "
        "GPUs, or one CPU. With TF_CONFIG, per worker.",
        low=0,
        free=True,
    )
    jit_compile: bool = setting(
        False,
        "Compile the training step with XLA on one device or on GPUs; TPUs always do.",
        free=True,
    )


@dataclasses.dataclass(frozen=True)
class LegacyConfig(Settings):
    """Accepted for old command lines, without effect."""

    master: str | None = setting(
        None, "Accepted for old command lines; --tpu names the TPU.", free=True
    )
    skip_host_call: bool = setting(
        False,
        "Accepted for old command lines; summaries are written between host loops and cost the "
        "device nothing.",
        free=True,
    )
    data_format: str = setting(
        "channels_last",
        "Accepted for old command lines; the compiler chooses the layout on every device.",
        choices=("channels_last", "channels_first"),
        free=True,
    )
    transpose_input: bool = setting(
        True,
        "Accepted for old command lines; the compiler lays out the input for the TPU.",
        free=True,
    )
    num_tpu_cores: int | None = setting(
        None, "Accepted for old command lines; all cores of the TPU are used.", free=True
    )

    def without_effect(self) -> list[str]:
        """`--name=value` of each that is not at its default."""
        return [
            f"--{field.name}={getattr(self, field.name)}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        ]


@dataclasses.dataclass(frozen=True)
class SelectConfig(Settings):
    """Selection and writing of pseudo-labeled records; the flags of `filter_unlabel.py`."""

    input_dir: str = setting("", "Folder of the unlabeled records.")
    prediction_dir: str = setting("", "Folder of the predictions.")
    info_dir: str = setting(
        "",
        "Folder of the counts that the prediction wrote; given, they are compared with the "
        "predictions, which are read in any case.",
    )
    prelim_stats_dir: str = setting("", "Folder of the statistics.")
    output_dir: str = setting("", "Folder of the selection and of the balanced records.")
    num_shards: int = setting(128, "Number of shards of the unlabeled set.", low=1)
    only_use_num_shards: int = setting(
        -1, "Use the first so many shards alone, for statistics, selection and records; -1: all."
    )
    shard_id: int = setting(
        0,
        "Write the records of this shard alone; not given: those of all. Statistics and selection "
        "are of all shards in either case, made by the first call and found by the later ones.",
        low=0,
    )
    total_replicas: int = setting(
        1,
        "Tasks that share the workers of a shard: the statistics have a file for each, but task 0 "
        "writes the records of all, so calls with a --task above 0 write none.",
        low=1,
    )
    total_label_replicas: int = setting(
        -1, "Workers that predicted each shard (their total_replicas); -1: as many as are found."
    )
    task: int = setting(-1, "Number in the names of the output files; -1: 0.")
    debug: int = setting(
        0, "1: statistics and selection of the first worker's part of --shard_id alone."
    )
    num_image: int = setting(1300, "Images per class.", low=0)
    min_threshold: float = setting(0.0, "Lowest confidence that is kept.", low=0, high=1)
    max_prob: float = setting(
        2.0, "Highest confidence that is kept; above 1, since rounding may exceed it.", low=0
    )
    num_label_classes: int = setting(1000, "Number of classes.", low=1)
    upsample: int = setting(1, "Fill classes below num_image with copies: 1 or 0.", low=0)
    use_top: int = setting(
        1,
        "1: the most confident images of classes with more than num_image; 0: a random part of "
        "all from min_threshold on.",
        low=0,
    )
    use_all: bool = setting(
        False, "Every image from min_threshold on, once; num_image is not heeded."
    )
    selection: str = setting(
        "exact",
        "exact: num_image images per class. threshold: as the 2019 code, cut at steps of 0.01, "
        "with copies drawn so that about num_image are expected.",
        choices=("exact", "threshold"),
    )
    only_get_stats: int = setting(0, "Stop after the statistics: 1 or 0.", low=0)
    file_prefix: str = setting("train", "Prefix of the unlabeled files: train or extra.")
    data_type: str = setting(
        "tfrecord", "Of the unlabeled files; there is no other.", choices=("tfrecord",)
    )
    eval_imagenet_p: bool = setting(
        False, "Accepted for old scripts, without effect; the 2019 code did not use it either."
    )
    seed: int = setting(0, "Of the choice of copies and of the order of records.", low=0)
    num_samples: int = setting(5, "Sample pictures kept per class and shard.", low=0)
    num_workers: int = setting(
        -1,
        "Processes that write shards at the same time; -1: one per core, fewer if there is little "
        "to write.",
    )


@dataclasses.dataclass(frozen=True)
class LoopConfig(Settings):
    """The rounds of `noisy_student.py`, beside the settings of its trainings."""

    work_dir: str = setting("", "Folder of everything the loop makes.")
    models: str = setting(
        "efficientnet-b0,efficientnet-b0",
        "Variants in order: the first teacher, then each round's student, which teaches the next.",
    )
    teacher_steps: int | None = setting(
        None, "Update steps of the first teacher; default: train_steps.", low=1
    )
    published_recipes: bool = setting(
        False,
        "Train each model as published for ImageNet at its size: resolution, RandAugment, epochs "
        "and unlabel_ratio, of which image_sizes and unlabel_ratios take precedence.",
    )
    image_sizes: str = setting(
        "", "Image side of each of the models, joined with ','; default: the same for all."
    )
    unlabel_ratios: str = setting(
        "", "unlabel_ratio of each student, joined with ','; default: the same for all."
    )
    finetune_resolution: int | None = setting(
        None,
        "Image side in pixels at which the last student is fine-tuned on labeled images without "
        "augmentation (FixRes); default: it is not.",
        low=8,
    )
    finetune_epochs: float = setting(1.5, "Passes over the labeled images of that.", low=0)
    finetune_fix_layers: int = setting(-1, "fix_layer_num of the fine-tuning; -1: none.", low=-1)
    num_image: int = setting(1300, "Pseudo-labeled images per class.", low=1)
    min_threshold: float = setting(
        0.3, "Lowest confidence of a pseudo label that is kept.", low=0, high=1
    )


@dataclasses.dataclass(frozen=True)
class OwnSetConfig(Settings):
    """Attacks on, and corruptions of, any labeled set: task_name and label_data_dir."""

    epsilons: str = setting(
        "",
        "FGSM and PGD: how far each pixel value of 0..255 may be moved; several joined with ',', "
        "e.g. 2,4,8,16.",
    )
    pgd_steps: int = setting(10, "Gradient steps of PGD.", low=1)
    pgd_step_size: float | None = setting(
        None, "Size of each, in pixel values; default: 2.5 epsilon / pgd_steps.", low=0
    )
    corrupt: str = setting(
        "",
        "Corruptions of ImageNet-C to apply, joined with ','; all: the 15 of its mean. Needs pip "
        "install 'efficientnet-ns[robustness]'.",
    )
    severities: str = setting("1,2,3,4,5", "Their severities, joined with ','.")
    baseline: str = setting(
        "",
        "Weights of another model, which is measured beside it and by which its errors are divided.",
    )
    baseline_model_name: str = setting("", "Variant of the baseline; default: the same model.")
    image_set: str = setting(
        "",
        "Prefix of the records to measure on; default: the task's evaluation set. num_eval_images "
        "takes its first so many.",
    )


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig(Settings):
    """What `benchmark.py` measures, and on what."""

    data: str = setting("", "Folder of images or of records; default: images made for it.")
    model_name: str = setting("efficientnet-b0", "Variant to measure.")
    image_size: int = setting(224, "Image side in pixels.", low=8)
    batch_size: int = setting(16, "Images per step.", low=1)
    seconds: float = setting(10.0, "Duration of each measurement.", low=0.1)
    threads: int | None = setting(None, "CPU threads; default: all.", low=1)
    rows: int = setting(30_000_000, "Predictions to select from (select).", low=1)
    classes: int = setting(1000, "Classes of the predictions (select).", low=1)
    json_file: str = setting("", "Also write the results to this file.")


_SECTIONS = {
    "model": ModelConfig,
    "data": DataConfig,
    "train": TrainConfig,
    "predict": PredictConfig,
    "hardware": HardwareConfig,
    "legacy": LegacyConfig,
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything `main.py` can be told."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    predict: PredictConfig = PredictConfig()
    hardware: HardwareConfig = HardwareConfig()
    legacy: LegacyConfig = LegacyConfig()

    def override(self, **values: Any) -> Config:
        """A copy with fields of any section replaced: `config.override(train_steps=…)`."""
        sections = {name: getattr(self, name) for name in _SECTIONS}
        for key, value in values.items():
            for name, section in sections.items():
                if key in section.__dataclass_fields__:
                    sections[name] = dataclasses.replace(section, **{key: value})
                    break
            else:
                raise ConfigError(f"no setting is called {key!r}")
        return Config(**sections)

    def identity(self) -> dict[str, Any]:
        """The settings that make two trainings the same training; JSON-able."""
        return {
            field.name: getattr(section, field.name)
            for section in (self.model, self.data, self.train)
            for field in dataclasses.fields(section)
            if not field.metadata["free"]
        }

    def values(self) -> dict[str, Any]:
        """Every setting by its flag's name; JSON-able."""
        return {
            field.name: getattr(getattr(self, name), field.name)
            for name, section in _SECTIONS.items()
            for field in dataclasses.fields(section)
        }


def comparable(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without the `/` at the end of paths, which tells no training from another."""

    def plain(name: str, value: Any) -> Any:
        if not _is_path(name) or value is None:
            return value
        return ";".join(part.rstrip("/") for part in value.split(";"))

    return {name: plain(name, value) for name, value in settings.items()}


def _sections(cls: type) -> list[type]:
    return list(_SECTIONS.values()) if cls is Config else [cls]


def _flag_fields(cls: type) -> list[dataclasses.Field]:
    return [f for section in _sections(cls) for f in dataclasses.fields(section)]


def _field_type(cls: type, name: str) -> type:
    for owner in (cls, *_SECTIONS.values()):
        hints = typing.get_type_hints(owner)
        if name in hints:
            arguments = [a for a in typing.get_args(hints[name]) if a is not type(None)]
            return arguments[0] if arguments else hints[name]
    raise KeyError(name)


_DEFINE = {
    str: flags.DEFINE_string,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    bool: flags.DEFINE_bool,
}


def define_flags(cls: type, flag_values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines one absl flag per field of a configuration dataclass."""
    for section in _sections(cls):
        # Attributed to the program and the section, so that --helpshort shows them in groups.
        group = f"{sys.argv[0]}: {section.__doc__.splitlines()[0]}"
        for field in dataclasses.fields(section):
            choices = field.metadata["choices"]
            define = _DEFINE[_field_type(section, field.name)]
            if choices:
                # Without a default, an empty value takes back that of a preset.
                values = [*choices, ""] if field.default is None else [*choices]
                define = functools.partial(flags.DEFINE_enum, enum_values=values)
            define(
                name=field.name,
                default=field.default,
                help=field.metadata["help"],
                flag_values=flag_values,
                module_name=group,
            )


def from_flags(cls: type, values: flags.FlagValues) -> Any:
    """Builds and checks the dataclass from parsed flags.

    Raises:
      ConfigError: a value out of range.
    """
    chosen = {field.name: _value(field, values[field.name].value) for field in _flag_fields(cls)}
    result = Config().override(**chosen) if cls is Config else cls(**chosen)
    check(result)
    for name in sorted(_FOLDERS_WRITTEN & chosen.keys()):
        check_no_file(name, chosen[name] or "")
    return result


_FOLDERS_WRITTEN = {
    *("model_dir", "eval_dir", "data_cache_dir", "output_dir", "info_dir", "prelim_stats_dir"),
    *("work_dir", "export_dir"),
}


def check_no_file(name: str, path: str) -> None:
    """Raises ConfigError where the folder of flag `name` cannot be made: a file is in its place."""
    part = path.rstrip("/")
    while part and not os.path.lexists(part):
        part = os.path.dirname(part)
    if part and not os.path.isdir(part):
        raise ConfigError(f"--{name}={path}: {part} is not a folder; choose another path")


def _value(field: dataclasses.Field, value: Any) -> Any:
    """What a flag's value means; one that names nothing is no value."""
    nothing = field.metadata["choices"] and field.default is None and value in ("", "none")
    return None if nothing else value


def check(config: Any) -> None:
    """Raises ConfigError for the first value of another type, or that is none of its field's.

    Numbers are to be finite and within bounds, texts one of the choices, where there are any.
    """
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise ConfigError(
            f"settings are needed, such as Config().override(train_steps=10), not {config!r}"
        )
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            check(value)
        elif value is not None or field.default is not None:
            _check_type(field, value, _field_type(type(config), field.name))
            if isinstance(value, str):
                _check_text(field, value)
            else:
                _check_bounds(field, value)


_KINDS = {
    str: ("a text", str),
    int: ("a whole number", numbers.Integral),
    float: ("a number", numbers.Real),
    bool: ("True or False", (bool, numbers.Integral)),
}


def _check_type(field: dataclasses.Field, value: Any, kind: type) -> None:
    needed, types = _KINDS[kind]
    if not isinstance(value, types):
        raise ConfigError(f"--{field.name}={value!r}: {needed} is needed")


def _check_text(field: dataclasses.Field, value: str) -> None:
    choices = field.metadata["choices"]
    if choices and value not in choices:
        raise ConfigError(f"--{field.name}={value!r}: one of {', '.join(choices)} is needed")
    # What the command line had for bytes that are not UTF-8; neither TensorFlow nor JSON takes it.
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise ConfigError(f"--{field.name}={value!r} is not UTF-8: rename it, or choose another")


def _check_bounds(field: dataclasses.Field, value: float) -> None:
    low, high = field.metadata["low"], field.metadata["high"]
    if not math.isfinite(value):
        raise ConfigError(f"--{field.name}={value}: a finite number is needed")
    if low is not None and value < low:
        raise ConfigError(f"--{field.name}={value} is too small: at least {low} is needed")
    if high is not None and value > high:
        raise ConfigError(f"--{field.name}={value} is too large: at most {high} is possible")


def no_arguments(argv: list[str]) -> None:
    """Refuses words that are not flags: a mistyped flag must not be ignored for hours."""
    if len(argv) > 1:
        raise ConfigError(f"unexpected argument {argv[1]!r}; every setting is a --flag=value")


def shard_list(text: str, num_shards: int) -> list[int]:
    """`"0,3,8-11"` → [0, 3, 8, 9, 10, 11]; `"auto"` → all.

    Raises:
      ConfigError: not numbers and ranges, or outside 0..num_shards-1.
    """
    if text == "auto":
        return list(range(num_shards))
    shards: list[int] = []
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdigit() or (last and not last.isdigit()):
            raise ConfigError(f"--shard_id={text}: {part!r} is neither a number nor a range a-b")
        part_shards = range(int(first), int(last or first) + 1)
        if not part_shards:
            raise ConfigError(f"--shard_id={text}: the range {part!r} ends before it starts")
        shards += part_shards
    outside = [s for s in shards if s >= num_shards]
    if outside:
        raise ConfigError(f"--shard_id={text}: {outside[0]} is not below --num_shards={num_shards}")
    return list(dict.fromkeys(shards))


_HELP = {"-h", "--h", "-help", "--help", "-helpshort", "--helpshort", "-?", "--?"}
_STORAGE_ERRORS = (
    "NotFoundError",
    "PermissionDeniedError",
    "ResourceExhaustedError",
    "AlreadyExistsError",
)


def run(main: Callable[[list[str]], None]) -> None:
    """`absl.app.run` for an entry point: what the user can mend is one line, not a stack trace.

    Exit code 2 for a wrong flag or unusable data, 75 after a request to stop (see `preemption`),
    141 as of other programs when nobody reads the output any more.
    """
    values = flags.FLAGS
    with standard_output.quiet_when_unread():
        if _HELP & set(sys.argv[1:]):
            print(flag_help.text(values, sys.argv[0], sys.modules["__main__"].__doc__ or ""))
            sys.exit(0)
        _run(main, values)


def _run(main: Callable[[list[str]], None], values: flags.FlagValues) -> None:
    def parse(arguments: list[str]) -> list[str]:
        try:
            return values(arguments)
        except flags.Error as e:
            print(f"{e}\n--help lists the flags.", file=sys.stderr)
            sys.exit(2)

    def guarded(argv: list[str]) -> None:
        try:
            with preemption.StopRequest() as stop, stop.immediate():
                main(argv)
            standard_output.flush()
        except preemption.Preempted as e:
            logging.warning("%s: start the same command again to continue", e)
            sys.exit(preemption.EXIT_CODE)
        except Exception as e:
            if isinstance(e, BrokenPipeError) and standard_output.is_unread():
                raise
            # Storage fails with an OSError or one of TensorFlow's errors, which name the path.
            ours = type(e).__module__.startswith("efficientnet_ns")
            # A precondition is of storage where it is about a folder in place of a file, or a file
            # in place of a folder.
            kind = type(e).__name__
            storage = isinstance(e, OSError) or kind in _STORAGE_ERRORS
            storage = storage or kind == "FailedPreconditionError" and "directory" in str(e)
            if not (ours or storage):
                raise
            logging.error("%s", e)
            sys.exit(2)

    logging.set_verbosity(logging.INFO)
    # Errors of TensorFlow's C++ code reach Python as exceptions; the rest of its log is noise here.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # With several replicas TensorFlow logs how it adds up each variable.
    std_logging.getLogger("tensorflow").addFilter(
        lambda entry: entry.module != "cross_device_ops" or entry.levelno >= std_logging.WARNING
    )
    app.run(guarded, flags_parser=parse)
