"""Settings of the training rounds (with and without rules), the studies and the demo."""

from __future__ import annotations

import dataclasses

from efficientnet_ns.config.fields import Settings, setting
from efficientnet_ns.config.labeling import of_selection


@dataclasses.dataclass(frozen=True)
class PicturesConfig(Settings):
    """Two sets of pictures, from which rules derive all other settings; flags override the rules."""

    labeled: str = setting(
        "",
        "Labeled pictures: a folder or archive whose top-level folders are the classes, tfds:<name>, or "
        "a folder of records with task.json.",
    )
    unlabeled: str = setting(
        "", "Unlabeled pictures: a folder, archive, tfds:<name>[:split], or a folder of records."
    )
    test: str = setting(
        "",
        "Labeled pictures used only to measure the models; formats and classes as for --labeled.",
    )
    held_out: float | None = setting(
        None,
        "Fraction of each class held out of training to choose the best model; default: by rule.",
        low=0,
        high=0.9,
    )
    max_side: int | None = setting(
        None, "In records, shrink pictures whose longer side exceeds this; default: by rule.", low=8
    )
    control: bool = setting(
        False,
        "Also train on the labeled pictures only, with as many updates as all models combined.",
    )
    dry_run: bool = setting(
        False, "Only print what was found, the settings and the estimated time; write nothing."
    )
    time_limit: str = setting(
        "",
        "Time budget for the whole run, such as 30m or 2h. A measurement before the start determines "
        "the updates, image size and rounds that fit; the run is not stopped.",
    )


@dataclasses.dataclass(frozen=True)
class LoopConfig(Settings):
    """The rounds of `noisy_student.py`; `Config` has the settings of its training runs."""

    work_dir: str = setting("", "Folder of all outputs of the loop.")
    models: str = setting(
        "efficientnet-b0,efficientnet-b0",
        "Variants in order: the first teacher, then each round's student, which teaches the next.",
    )
    teacher_steps: int | None = setting(
        None, "Update steps of the first teacher; default: train_steps.", low=1
    )
    teacher_batch_size: int | None = setting(
        None, "train_batch_size of the first teacher; default: that of the students.", low=1
    )
    teacher_initial_share: float | None = setting(
        None,
        "ema_initial_share of the first teacher; default: that of the students.",
        low=0,
        high=1,
    )
    warm_start: bool = setting(
        False,
        "Start each student from its teacher's weights; all models must be the same variant. With many "
        "updates, students from scratch are sometimes better (arXiv 1911.04252).",
    )
    stop_when_worse: bool = setting(
        False,
        "Stop after a student that is worse than its teacher on the evaluation set by more than the "
        "standard error.",
    )
    published_recipes: bool = setting(
        False,
        "Train each model as published for ImageNet at its size: resolution, RandAugment, epochs "
        "and unlabel_ratio; image_sizes and unlabel_ratios take precedence.",
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
        "augmentation (FixRes); default: no fine-tuning.",
        low=8,
    )
    finetune_epochs: float = setting(
        1.5, "Epochs of the fine-tuning, over the labeled images.", low=0
    )
    finetune_fix_layers: int = setting(-1, "fix_layer_num of the fine-tuning; -1: none.", low=-1)
    num_image: int = setting(1300, "Pseudo-labeled images per class.", low=1)
    min_threshold: float = setting(
        0.3, "Minimum confidence of pseudo labels to keep.", low=0, high=1
    )
    reviewed: str = of_selection("reviewed")


# Maximum update steps in a quick study. With fewer, the teacher learns too little on the digits.
QUICK_TEACHER_STEPS, QUICK_STUDENT_STEPS = 400, 300


@dataclasses.dataclass(frozen=True)
class StudyConfig(Settings):
    """Which questions to study, and with which seeds."""

    studies: str = setting(
        "all",
        "Studies to run, joined with ',', or all: noise, labels, ratio, amount, size, balance, joint, "
        "start, teaching, rounds.",
    )
    seeds: str = setting("0,1,2", "Seeds, joined with ','; every arm runs with each seed.")
    quick: bool = setting(
        False,
        f"Only the most informative arms, and at most {QUICK_TEACHER_STEPS} update steps of the teacher "
        f"and {QUICK_STUDENT_STEPS} of each student.",
    )


@dataclasses.dataclass(frozen=True)
class DemoConfig(Settings):
    """Settings of the demo."""

    output_dir: str = setting("runs/demo", "Folder of all outputs of the demo.")
    seed: int = setting(0, "Random seed for the split, the initial weights and all noise.", low=0)
    seeds: str = setting(
        "", "Seeds, joined with ',', to run in turn; the final table shows their mean and spread."
    )
    labels_per_class: int = setting(5, "Labeled images per class.", low=1, high=300)
    teacher_steps: int = setting(1000, "Update steps of the teacher.", low=1)
    student_steps: int = setting(500, "Update steps of each student.", low=1)
