"""Settings of the programs that make records; each field is a flag. TensorFlow is not imported."""

from __future__ import annotations

import dataclasses

from efficientnet_ns.config.fields import Settings, setting


@dataclasses.dataclass(frozen=True)
class MakeConfig(Settings):
    """Images to convert to records, and how to convert them; the flags of `make_records.py`."""

    source: str = setting(
        "", "Folder, .zip, .tar, .tar.gz (.tgz, .tar.bz2, .tar.xz), or tfds:<name>[:split]."
    )
    output_dir: str = setting("", "Output folder for the records and task.json.")
    labeled: bool = setting(
        True, "Folders (or a TFDS label) are classes; --nolabeled writes only the images."
    )
    image_set: str | None = setting(
        None,
        "Prefix of the files: train, validation, dev, test or extra; default: train, or extra with "
        "--nolabeled; tfds:<name> without a split converts all sets.",
        choices=("train", "validation", "dev", "test", "extra"),
    )
    subfolder: str = setting("", "Use only images in this folder of the source, e.g. train.")
    accept_classes: bool = setting(
        False,
        "Use the top-level folders as classes even if they do not look like classes: they are named "
        "like sets, one has all its images in subfolders, or there is only one.",
    )
    imagenet_labels: bool = setting(
        False,
        "Use ImageNet's labels; folders are named by the WordNet IDs of all or some of its classes.",
    )
    num_shards: int | None = setting(
        None, "Number of files per set; default: one per 1024 images, at most 1024.", low=1
    )
    validation_fraction: float = setting(
        0.0, "Fraction of each class to split off as --validation_set.", low=0
    )
    validation_set: str = setting(
        "validation",
        "Prefix of the split-off set: validation or dev.",
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
        True, "Decode every image; images that cannot be decoded are skipped and listed."
    )
    max_bad_fraction: float = setting(
        0.01,
        "Stop if more than one image and more than this fraction of a set's images are unusable; 0: if any is.",
        low=0,
    )
    num_workers: int | None = setting(
        None, "Number of processes; default: one per CPU core.", low=1
    )
    seed: int = setting(0, "Random seed for the image order and the split.", low=0)
    tfds_data_dir: str | None = setting(
        None, "TFDS folder; default: $TFDS_DATA_DIR, else ~/tensorflow_datasets."
    )


@dataclasses.dataclass(frozen=True)
class SvhnConfig(Settings):
    """The flags of `proc_svhn.py`."""

    task_name: str = setting("svhn", "Task; only svhn is supported.")
    raw_data_dir: str | None = setting(
        None, "Folder with train_32x32.mat, test_32x32.mat and extra_32x32.mat."
    )
    output_dir: str = setting(
        "",
        "Output folder for labeled records and task.json; its subfolder `unlabeled` is for unlabeled records.",
    )
    full_train_data: bool = setting(
        False, "Train on all training images (sets train_full, dev_full = test_full)."
    )
    dev_size: int = setting(4000, "Number of training images held out for the dev set.", low=1)
    image_format: str = setting(
        "jpeg",
        "jpeg (quality 100, as in the original code) or png (lossless).",
        choices=("jpeg", "png"),
    )
    num_shards: int | None = setting(
        None,
        "Number of files per set; default: 128 for train and extra, 64 for dev and test.",
        low=1,
    )
    num_workers: int | None = setting(
        None, "Number of processes; default: one per CPU core.", low=1
    )
    seed: int = setting(0, "Random seed for the order and the dev set.", low=0)
