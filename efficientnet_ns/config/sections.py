"""`Config`: the settings of `main.py` and of the programs that train or build models, in sections."""

from __future__ import annotations

import dataclasses
from typing import Any

from efficientnet_ns.config.fields import ConfigError, Settings, as_dict, setting, subsections

# An augmentation policy as text; data.pipeline parses it.
_POLICY = r"(randaugment|autoaugment)\(.*"


@dataclasses.dataclass(frozen=True)
class ModelConfig(Settings):
    """Which network to build."""

    model_name: str | None = setting(
        None,
        "Variant: efficientnet-b0 … -b7, -l2, -lite0 … -lite4, -test; default: that of the trained model, "
        "if one is used.",
        documented="efficientnet-b0",
    )
    input_image_size: int | None = setting(
        None, "Image side in pixels; default: the task's, else the model's own.", low=8
    )
    num_label_classes: int | None = setting(
        None, "Number of classes; tasks other than imagenet set it.", documented=1000
    )
    small_image_model: bool = setting(
        False, "Use stride 1 in stages 2 and 3, for images of up to 32 pixels."
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
        None,
        "Drop probability of the last block, rising linearly from 0; default: 0.2.",
        low=0,
        high=1,
    )


@dataclasses.dataclass(frozen=True)
class DataConfig(Settings):
    """Which images to use, and how to process them."""

    task_name: str | None = setting(
        None,
        "imagenet, svhn, digits, or the path of a .json file that describes a task.",
        documented="imagenet",
    )
    data_source: str = setting(
        "",
        "tfds:<name>: a TensorFlow Datasets dataset that provides labeled images and task, instead of "
        "label_data_dir and task_name. Converted to records on first use.",
        free=True,  # The records made from it, in label_data_dir, are not.
    )
    data_cache_dir: str = setting(
        "",
        "Folder for the records of data_source; default: efficientnet_ns in the TFDS folder.",
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
        "Evaluate only the first N images of the evaluation set; default: all.",
        low=1,
        free=True,
    )
    num_test_images: int | None = setting(
        None, "As num_eval_images, for the test set if the task has one.", low=1, free=True
    )
    num_train_shards: int | None = setting(
        None, "Train on only the first N shards of the labeled set; default: all.", low=1
    )
    exclude: str = setting(
        "",
        "List of records neither to train on nor to select, such as exclude.csv from check_data or "
        "doubtful.csv from check_labels.",
    )
    augment_name: str | None = setting(
        None,
        "Augmentation of training images: randaugment (v1 in the original code), autoaugment, none (also "
        "overrides a preset), or a policy as the log prints it, which overrides the flags below: "
        "'randaugment(N=2, M=27, mode=clipped)', 'autoaugment(svhn)'.",
        choices=("randaugment", "v1", "autoaugment", "none"),
        pattern=_POLICY,
    )
    unl_aug: str = setting(
        "default",
        "Augmentation of unlabeled images: default (as for labeled ones), randaugment, v1, autoaugment, "
        "none (crop or shift, and flip), clean (the evaluation crop), or a policy as for augment_name.",
        choices=("default", "randaugment", "v1", "autoaugment", "none", "clean"),
        pattern=_POLICY,
    )
    autoaugment_policy: str | None = setting(
        None,
        "AutoAugment policy, named after the data set it was learned on; default: svhn for that task, "
        "else imagenet (v0, which EfficientNet was trained with).",
        choices=("imagenet", "svhn", "cifar10"),
    )
    randaug_mag: int = setting(27, "RandAugment magnitude M; 10 is the nominal maximum.", low=0)
    randaug_layer: int = setting(2, "RandAugment operations N per image.", low=0)
    randaug_mode: str = setting(
        "original",
        "Magnitudes above 10: original (posterize and solarize wrap, as published) or clipped; also "
        "applies to autoaugment.",
        choices=("original", "clipped"),
    )
    randaug_reach: str = setting(
        "fixed",
        "RandAugment's translation and Cutout size at magnitude 10: fixed (100 and 40 pixels, as "
        "published) or proportional (the same fractions of the image as at 224 pixels).",
        choices=("fixed", "proportional"),
    )
    cutout_op: bool = setting(True, "Include Cutout among RandAugment's operations.")
    remove_aug: bool = setting(
        False, "Train on the evaluation crop without any augmentation (FixRes fine-tuning)."
    )
    crop_fraction: float | None = setting(
        None,
        "Fraction of the shorter side that the evaluation crop keeps; default: size / (size + 32), as "
        "published, which is two thirds at 64 pixels.",
        low=0.1,
        high=1,
    )
    shuffle_buffer: int = setting(
        10000,
        "Undecoded records in the shuffle buffer, over all hosts; limits how far a record can move.",
        low=1,
    )


@dataclasses.dataclass(frozen=True)
class TrainConfig(Settings):
    """How the student is trained."""

    model_dir: str | None = setting(
        None,
        "Training folder, with checkpoints and logs. Programs that use a trained model also accept the "
        "work_dir of noisy_student, and some accept an exported SavedModel; settings not given are read "
        "from it.",
        free=True,
    )
    train_steps: int = setting(109474, "Update steps of the whole schedule.", low=1)
    train_ratio: float = setting(
        1.0, "Multiplies train_steps and the decay period (2 for the 700-epoch recipes).", low=0
    )
    train_last_step_num: int = setting(
        -1, "Train only the last N steps of the schedule, without warm-up; -1: all."
    )
    train_batch_size: int = setting(4096, "Labeled images per update, over all replicas.", low=1)
    label_data_sample_prob: float = setting(
        1.0,
        "Probability that a labeled image counts in the loss, for labeled batches smaller than the "
        "number of replicas: the effective batch is train_batch_size times this.",
        low=0,
        high=1,
    )
    num_shards_per_group: int = setting(
        -1,
        "Number of replicas that share batch-norm statistics. -1: one for up to 8 replicas, else groups "
        "of max(8, replicas/8); 1: one; k: groups of k; -2: all.",
        low=-2,
    )
    optimizer: str = setting(
        "rmsprop",
        "rmsprop (TensorFlow 1's, as published) or adam (for fine-tuning).",
        choices=("rmsprop", "adam"),
    )
    lr_schedule: str = setting(
        "staircase",
        "Learning rate after the warm-up: staircase (0.97 every 2.4 epochs, as published) or cosine (to "
        "0 at train_steps).",
        choices=("staircase", "cosine"),
    )
    base_learning_rate: float = setting(
        0.016,
        "Learning rate per 256 labeled images; with --optimizer=adam, which does not scale with the "
        "batch, the rate itself.",
        low=0,
    )
    final_base_lr: float | None = setting(
        None, "If given, the decay period is chosen to end at this rate per 256 images."
    )
    warmup_epochs: float = setting(5.0, "Length of the linear warm-up.", low=0)
    moving_average_decay: float = setting(
        0.9999, "Maximum decay of the weights' moving average.", low=0, high=1
    )
    bn_momentum: float = setting(0.99, "Decay of the batch-norm moving statistics.", low=0, high=1)
    keep_bn_statistics: bool = setting(
        False,
        "Batch norm uses the moving statistics of the initial weights (--init_model) unchanged; its "
        "scale and offset are still trained. For fine-tuning on few images.",
    )
    weight_decay: float = setting(1e-5, "Weight of the L2 penalty, half the squared norm.", low=0)
    label_smoothing: float = setting(
        0.1, "Label smoothing: weight of the uniform distribution.", low=0, high=1
    )
    unlabel_ratio: float = setting(
        0.0,
        "Unlabeled images per labeled one, and the weight of their loss (1 with --consistency_threshold).",
        low=0,
    )
    unl_model_noise: bool = setting(
        True,
        "Apply dropout and stochastic depth to unlabeled images as well (with --consistency_threshold, only to "
        "the augmented ones); --nounl_model_noise: only to labeled images, an ablation of the paper.",
    )
    label_weight: float = setting(
        1.0,
        "Weight of the labeled loss; 0: learn from pseudo labels only (pretraining).",
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
        "Resolution of the on-the-fly teacher; default: its variant's, or the student's for small images.",
    )
    consistency_threshold: float = setting(
        0.0,
        "Without a teacher: minimum probability at which the student's prediction for an unlabeled image "
        "that is only cropped and flipped, without dropout and stochastic depth, becomes the hard label of the "
        "augmented image, whose loss has weight 1 (FixMatch: 0.95); 0: use a teacher's pseudo labels.",
        low=0,
        high=1,
    )
    init_model: bool = setting(False, "Start from the weights at init_model_path.")
    init_model_path: str | None = setting(None, "Checkpoint to start from.")
    init_weights: str | None = setting(
        None,
        "Weights to start from, as with --init_model --init_model_path: a path, published (those of "
        "the variant in an installed package), or the name of a variant.",
    )
    ema_initial_share: float = setting(
        0.0,
        "Share of the initial weights in the moving averages: the weights for evaluation, export and teaching "
        "interpolate between trained and initial weights (WiSE-FT, arXiv 2109.01903). Requires --init_weights "
        "or --init_model, and --keep_bn_statistics; the initial weights must not change until training ends.",
        low=0,
        high=1,
    )
    fix_layer_num: int = setting(
        -1,
        "Freeze the stem and the first N blocks: no updates, batch norm with its moving "
        "statistics, no stochastic depth; -1: nothing is frozen.",
        low=-1,
    )
    init_skip: str = setting(
        "",
        "Regular expressions, joined with ',', of variables that keep their initial values with "
        "--init_weights or --init_model, e.g. head/dense/ for different classes.",
    )
    seed: int = setting(
        0, "Random seed for initial weights, data order, augmentation and noise.", low=0
    )
    steps_per_eval: int = setting(3000, "Evaluate every N steps.", low=1, free=True)
    patience: int = setting(
        0,
        "Stop training after this many consecutive evaluations without a new best accuracy; 0: never. A "
        "cosine schedule gains most at its end, and accuracy on a small evaluation set is noisy.",
        low=0,
        free=True,
    )
    save_checkpoints_steps: int = setting(1000, "Save every N steps.", low=1, free=True)
    keep_checkpoint_max: int = setting(5, "Number of checkpoints to keep.", low=1, free=True)
    iterations_per_loop: int = setting(
        1000,
        "Steps per host loop. The host logs and reacts to a request to stop (SIGTERM) only between "
        "loops.",
        low=1,
        free=True,
    )
    log_step_count_steps: int = setting(
        64, "Log every N steps, at the ends of host loops.", low=1, free=True
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


@dataclasses.dataclass(frozen=True)
class EvalConfig(Settings):
    """How a trained model is evaluated."""

    eval_batch_size: int = setting(
        8,
        "Images per evaluation step and, with --inference_engine=tf, per labeling step (other engines "
        "choose their own batch size).",
        low=1,
    )
    eval_ema: bool = setting(
        True,
        "With --mode=eval: evaluate the moving-average weights, not the raw ones.",
    )
    eval_image_size: int | None = setting(
        None,
        "With --mode=eval: image side in pixels; default: as in training.",
        low=8,
    )
    eval_views: int = setting(
        1,
        "With --mode=eval: 2 averages the probabilities with those of the mirrored image.",
        low=1,
    )
    eval_dir: str | None = setting(
        None,
        "With --mode=eval: folder of eval.json and eval_report.html; default: eval in model_dir.",
    )
    eval_continuously: bool = setting(
        False,
        "With --mode=eval: evaluate every new checkpoint in model_dir until the last step.",
    )


@dataclasses.dataclass(frozen=True)
class PredictConfig(Settings):
    """How a teacher labels: which shards, by which engine, and where it writes predictions."""

    predict_ckpt_path: str = setting(
        "",
        "Weights of the teacher: checkpoint, folder with one, Keras (.h5) or PyTorch (.safetensors, "
        ".pth) file, or published; default: the model in model_dir.",
    )
    output_dir: str = setting("", "Folder of the prediction records.")
    info_dir: str = setting("", "Folder of the per-shard counts; default: output_dir.")
    num_shards: int = setting(
        128, "Number of shards of the unlabeled set; default: detected.", low=1
    )
    shard_id: str | None = setting(
        None,
        "Shards to label: a list or ranges, e.g. 0,3,8-15; auto: all of them, shared among all "
        "processes started with the same output_dir.",
        documented="0",
    )
    total_replicas: int = setting(1, "Number of workers that share each shard.", low=1)
    worker_id: int = setting(0, "Index of this worker among total_replicas.", low=0)
    file_prefix: str = setting(
        "train",
        "Prefix of the unlabeled files: train or extra; default: detected. Required only if the folder "
        "also contains other sets.",
    )
    data_type: str = setting("tfrecord", "Format of the input files.", choices=("tfrecord",))
    reassign_label: bool = setting(
        False,
        "Give new labels to pseudo-labeled records, <file_prefix>-<worker_id>-<shard>-of-<shards>.",
    )
    inference_engine: str = setting(
        "auto",
        "Engine for --mode=predict and --mode=eval: tf (TensorFlow), xnnpack or openvino (CPU only; openvino "
        "must be installed), or auto: on a single CPU device, the faster of xnnpack and openvino, as measured "
        "at start, if it supports the model; otherwise tf. --eval_continuously, --noised_teacher, attacks and "
        "evaluation during training always use tf.",
        choices=("auto", "tf", "xnnpack", "openvino"),
    )
    inference_dtype: str = setting(
        "float32",
        "Precision of openvino: float32, or bfloat16, which is less exact, needs a CPU with AVX512_BF16 or "
        "AMX, and is not always faster: measure. For tf, set --precision.",
        choices=("float32", "bfloat16"),
    )
    test_time_views: int = setting(
        1,
        "Views of each image whose probabilities are averaged: 1; 2 (mirrored); 10 (four corners "
        "and center, each also mirrored).",
        low=1,
    )
    noised_teacher: bool = setting(
        False,
        "Augment images as in training and keep dropout and stochastic depth on while labeling, which "
        "makes labels worse: an ablation of the paper.",
    )
    fast_decode: bool = setting(
        False,
        "Decode large JPEGs at 1/2, 1/4 or 1/8 of their size, which is faster and changes pixels "
        "slightly; implies --nofingerprints.",
    )
    fingerprints: bool = setting(
        True,
        "Store a hash and a perceptual fingerprint of each image in the index, for check_data; this "
        "requires decoding whole images. Exported models, --noised_teacher and --fast_decode store none.",
    )
    max_bad_fraction: float = setting(
        0.01, "Stop when more than this fraction of a shard's records is unreadable.", low=0, high=1
    )
    part_seconds: float = setting(
        60.0, "Maximum seconds of work on a shard that are lost if a process is killed.", low=0
    )
    lease_seconds: float = setting(
        300.0, "Seconds without a heartbeat before another worker takes over the shard.", low=1
    )


@dataclasses.dataclass(frozen=True)
class HardwareConfig(Settings):
    """Which hardware the program runs on."""

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
        "precision to use on any device.",
        choices=("auto", "float32", "mixed_bfloat16"),
        free=True,
    )
    num_replicas: int = setting(
        0,
        "Number of local devices that share each batch: GPUs, or logical CPU devices if there are none; 0: all "
        "GPUs, or one CPU. With TF_CONFIG, per worker.",
        low=0,
        free=True,
    )
    jit_compile: bool = setting(
        False,
        "Compile the training step with XLA on one device or on GPUs; TPUs always use XLA.",
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
    use_cache: bool = setting(
        True,
        "Accepted for old command lines; the operating system's page cache keeps local records.",
        free=True,
    )
    num_tpu_cores: int | None = setting(
        None, "Accepted for old command lines; all cores of the TPU are used.", free=True
    )

    def without_effect(self) -> list[str]:
        """Returns `--name=value` for each setting that differs from its default."""
        return [
            f"--{field.name}={getattr(self, field.name)}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        ]


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings of `main.py`."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvalConfig = EvalConfig()
    predict: PredictConfig = PredictConfig()
    hardware: HardwareConfig = HardwareConfig()
    legacy: LegacyConfig = LegacyConfig()

    def override(self, **values: Any) -> Config:
        """Returns a copy with fields of any section replaced: `config.override(train_steps=…)`.

        Raises:
          ConfigError: If no section has a field of that name.
        """
        changed = {name: getattr(self, name) for name in subsections(Config)}
        for key, value in values.items():
            for name, section in changed.items():
                if key in section.__dataclass_fields__:
                    changed[name] = dataclasses.replace(section, **{key: value})
                    break
            else:
                raise ConfigError(f"there is no setting {key!r}")
        return Config(**changed)

    def identity(self) -> dict[str, Any]:
        """Returns the settings that identify a training run; JSON-serializable."""
        return {
            name: value
            for section in (self.model, self.data, self.train)
            for name, value in as_dict(section).items()
            if not section.__dataclass_fields__[name].metadata["free"]
        }

    def values(self) -> dict[str, Any]:
        """Returns every setting by flag name; JSON-serializable."""
        sections = [getattr(self, name) for name in subsections(Config)]
        return {name: value for section in sections for name, value in as_dict(section).items()}
