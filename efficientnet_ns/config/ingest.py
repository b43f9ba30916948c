"""Settings of the programs that make records; each field is a flag. TensorFlow is not imported."""

from __future__ import annotations

import dataclasses

from efficientnet_ns.config.fields import Settings, setting


@dataclasses.dataclass(frozen=True)
class MakeConfig(Settings):
    """Images to make records from, and how; the flags of `make_records.py`."""

    source: str = setting(
        "", "Folder, .zip, .tar, .tar.gz (.tgz, .tar.bz2, .tar.xz), or tfds:<name>[:split]."
    )
    output_dir: str = setting("", "Folder of the records and of task.json.")
    labeled: bool = setting(
        True, "Folders (or a TFDS label) are classes; --nolabeled writes only the images."
    )
    image_set: str | None = setting(
        None,
        "Prefix of the files: train, validation, dev, test or extra; default: train, or extra with "
        "--nolabeled; tfds:<name> without a split makes all sets.",
        choices=("train", "validation", "dev", "test", "extra"),
    )
    subfolder: str = setting("", "Only images in this folder of the source, e.g. train.")
    accept_classes: bool = setting(
        False,
        "Use the topmost folders as classes even if they do not look like classes: they have names "
        "of sets, one has all its images in subfolders, or there is only one.",
    )
    imagenet_labels: bool = setting(
        False,
        "The folders are WordNet ids of ImageNet classes, all or some; use ImageNet's labels.",
    )
    num_shards: int | None = setting(
        None, "Files of the set; default: one per 1024 images, at most 1024.", low=1
    )
    validation_fraction: float = setting(
        0.0, "Fraction of each class to split off as --validation_set.", low=0
    )
    validation_set: str = setting(
        "validation",
        "Prefix of the set split off: validation or dev.",
        choices=("validation", "dev"),
    )
    max_side: int | None = setting(
        None,
        "Shrink images whose longer side exceeds this, as JPEG of quality 95; default: never.",
        low=1,
    )
    limit: int | None = setting(
        None, "Maximum number of images, drawn at random with the seed.", low=1
    )
    keep_names: bool = setting(
        True,
        "Store each image's path in the source in its record as image/filename, which "
        "import_predictions can match.",
    )
    check: bool = setting(
        True, "Decode every image; images that cannot be decoded are left out and listed."
    )
    max_bad_fraction: float = setting(
        0.01,
        "Stop when more than this fraction of a set's images, and more than one, cannot be used; 0: none may.",
        low=0,
    )
    num_workers: int | None = setting(None, "Processes; default: one per CPU core.", low=1)
    seed: int = setting(0, "Seed of the order of the images and of the split.", low=0)
    tfds_data_dir: str | None = setting(
        None, "TFDS folder; default: $TFDS_DATA_DIR, else ~/tensorflow_datasets."
    )


@dataclasses.dataclass(frozen=True)
class SvhnConfig(Settings):
    """The flags of `proc_svhn.py`."""

    task_name: str = setting("svhn", "The task; only svhn is supported.")
    raw_data_dir: str | None = setting(
        None, "Folder of train_32x32.mat, test_32x32.mat and extra_32x32.mat."
    )
    output_dir: str = setting(
        "", "Folder of the labeled records and task.json; unlabeled ones go to `unlabeled` in it."
    )
    full_train_data: bool = setting(
        False, "Train on all training images (sets train_full, dev_full = test_full)."
    )
    dev_size: int = setting(4000, "Training images kept for the dev set.", low=1)
    image_format: str = setting(
        "jpeg",
        "jpeg (quality 100, as in the original) or png (lossless).",
        choices=("jpeg", "png"),
    )
    num_shards: int | None = setting(
        None, "Files per set; default: 128 of train and extra, 64 of dev and test.", low=1
    )
    num_workers: int | None = setting(None, "Processes; default: one per CPU core.", low=1)
    seed: int = setting(0, "Seed of the order and of the dev set.", low=0)
