"""Settings of selection and writing, of the labeling report, and of labeling by many machines."""

from __future__ import annotations

import dataclasses
from typing import Any

from efficientnet_ns.config.fields import ConfigError, Settings, setting


@dataclasses.dataclass(frozen=True)
class SelectConfig(Settings):
    """Selection and writing of pseudo-labeled records; the flags of `filter_unlabel.py`."""

    unlabel_data_dir: str = setting("", "Folder of the unlabeled records.", alias="input_dir")
    prediction_dir: str = setting("", "Folder of the predictions.")
    info_dir: str = setting(
        "",
        "Folder of the counts that --mode=predict wrote; if given, they are checked against the "
        "predictions.",
    )
    prelim_stats_dir: str = setting("", "Folder of the statistics.")
    output_dir: str = setting("", "Folder of the selection and of the balanced records.")
    num_shards: int = setting(
        128, "Number of shards of the unlabeled set; default: detected.", low=1
    )
    only_use_num_shards: int = setting(
        -1, "Use only the first N shards, for statistics, selection and records; -1: all."
    )
    shard_id: int | None = setting(
        None,
        "Write only the records of this shard; if omitted, those of all shards. Statistics and "
        "selection always cover all shards; the first call makes them and later calls reuse them.",
        low=0,
        documented=0,
    )
    total_replicas: int = setting(
        1,
        "Tasks that share the workers of a shard: the statistics have a file for each, but task 0 "
        "writes the records of all, so calls with a --task above 0 write none.",
        low=1,
    )
    total_label_replicas: int = setting(
        -1, "Workers that predicted each shard (their total_replicas); -1: detected."
    )
    task: int = setting(-1, "Number in the names of the output files; -1: 0.")
    debug: int = setting(
        0, "1: statistics and selection of only the first worker's part of --shard_id."
    )
    num_image: int = setting(1300, "Images per class.", low=0)
    min_threshold: float = setting(0.0, "Lowest confidence that is kept.", low=0, high=1)
    max_prob: float = setting(
        2.0,
        "Highest confidence that is kept; the default is above 1 because rounding may exceed 1.",
        low=0,
    )
    task_name: str | None = setting(
        None, "Task of the classes; default: the one stored with the predictions."
    )
    num_label_classes: int = setting(1000, "Number of classes; known tasks set it.", low=1)
    upsample: int = setting(1, "Fill classes below num_image with copies: 1 or 0.", low=0)
    use_top: int = setting(
        1,
        "Of classes with more than num_image images, keep 1: the most confident; 0: a random sample "
        "of those at or above min_threshold.",
        low=0,
    )
    use_all: bool = setting(
        False, "Keep every image at or above min_threshold, once; num_image is ignored."
    )
    selection: str = setting(
        "exact",
        "exact: num_image images per class. threshold: as in the 2019 code, thresholds in steps of "
        "0.01, and copies drawn so that about num_image are expected.",
        choices=("exact", "threshold"),
    )
    only_get_stats: int = setting(0, "Stop after the statistics: 1 or 0.", low=0)
    file_prefix: str = setting(
        "train", "Prefix of the unlabeled files: train or extra; default: detected."
    )
    data_type: str = setting(
        "tfrecord",
        "Format of the unlabeled files; only tfrecord is supported.",
        choices=("tfrecord",),
    )
    eval_imagenet_p: bool = setting(
        False, "Accepted for old scripts, without effect; the 2019 code did not use it either."
    )
    exclude: str = setting(
        "", "List of records never to select, such as exclude.csv of check_data."
    )
    reviewed: str = setting(
        "",
        "Decisions saved by a review sheet: rejected images are never selected; the others get the "
        "reviewer's label with probability 1.",
    )
    seed: int = setting(0, "Seed of the choice of copies and of the order of records.", low=0)
    num_samples: int = setting(5, "Sample pictures kept per class and shard.", low=0)
    num_workers: int = setting(
        -1,
        "Processes that write shards in parallel; -1: one per core, fewer if there is little to write.",
    )


@dataclasses.dataclass(frozen=True)
class FilterConfig(Settings):
    """What `filter_unlabel.py` does in addition to selecting and writing."""

    report: bool = setting(False, "Write report.html, as labeling_report does, at the end.")


@dataclasses.dataclass(frozen=True)
class ReportConfig(Settings):
    """What the labeling report shows; `SelectConfig` locates the run."""

    report_path: str = setting("", "File to write; default: report.html in output_dir.")
    previous_prediction_dir: str = setting(
        "", "Predictions of an earlier round for the same images, to compare labels with."
    )
    truth: str = setting(
        "",
        "True labels: a CSV or Parquet file with the columns shard, record and label (0-based; -1: "
        "of no class), or `records`: the image/class/label of the unlabeled records.",
    )
    class_names: str = setting(
        "", "Text file with the name of a class per line; default: the task's names."
    )
    report_classes: int = setting(
        10, "How many worst-covered, best-covered and other classes to show pictures of.", low=0
    )
    review_images: int = setting(
        0,
        "Also write review.html next to the report: a sheet for confirming, correcting or rejecting the "
        "labels of the N least confident images kept per class.",
        low=0,
    )
    label_next: int = setting(
        0,
        "Also write label_next.csv and label_next.html next to the report: up to N images that are most "
        "worth labeling, by the margin between two classes, from all classes, without near copies.",
        low=0,
    )
    report_shards: int = setting(4, "Shards to take pictures from.", low=1)


def of_selection(name: str) -> Any:
    """The setting that filter_unlabel has under that name."""
    field = SelectConfig.__dataclass_fields__[name]
    return dataclasses.field(default=field.default, metadata=field.metadata)


@dataclasses.dataclass(frozen=True)
class ImportConfig(Settings):
    """Predictions of another model; the flags of `import_predictions.py`."""

    source: str = setting(
        "",
        "File of probabilities or logits: .parquet, .npy, .npz, .csv or .jsonl, or a folder of such "
        "files; several teachers joined with ';'.",
    )
    unlabel_data_dir: str = setting("", "Folder of the unlabeled records.")
    file_prefix: str = of_selection("file_prefix")
    num_shards: int = of_selection("num_shards")
    output_dir: str = setting("", "Folder of the predictions.")
    info_dir: str = setting("", "Folder of the counts; default: output_dir.")
    task_name: str | None = setting(
        None, "Task of the classes; default: task.json next to the unlabeled records."
    )
    key: str = setting(
        "position",
        "How rows are matched to records. position: row i is record i, shard after shard; name: the "
        "record's image/filename; hash: SHA-256 of the image, in hexadecimal digits.",
        choices=("position", "name", "hash"),
    )
    key_column: str = setting("key", "Column, or array of a .npz file, of the keys.")
    values: str = setting(
        "probabilities", "Kind of the numbers.", choices=("probabilities", "logits")
    )
    temperature: float = setting(
        1.0, "Divides the logits: above 1 for softer predictions.", low=1e-3
    )
    class_map: str = setting(
        "",
        "Text file with one line per class of the source: the name or number of the task's class, or - "
        "for none. Classes with the same line are added. Default: columns matched by class name, else "
        "the task's order.",
    )
    min_mass: float = setting(
        0.5,
        "If --class_map leaves classes out: images with less than this probability in the task's "
        "classes get no label; the probabilities of the others are renormalized.",
        low=0,
        high=1,
    )
    combine: str = setting(
        "mean",
        "How to combine several teachers. mean: average their probabilities; agreement: the same, but "
        "images on whose class they disagree get no label.",
        choices=("mean", "agreement"),
    )
    allow_missing: bool = setting(
        False, "Leave records without a row unlabeled; default: an error."
    )
    allow_unknown: bool = setting(False, "Ignore rows without a record; default: an error.")


@dataclasses.dataclass(frozen=True)
class CheckConfig(Settings):
    """Sets to compare; the flags of `check_data.py`."""

    label_data_dir: str = setting(
        "",
        "Folder of labeled records, whose training, evaluation and test sets are compared; several "
        "joined with ';'.",
    )
    eval_data_dir: str = setting(
        "", "Folder whose sets are all evaluation images; several joined with ';'."
    )
    unlabel_data_dir: str = setting("", "Folder of the unlabeled records.")
    file_prefix: str = of_selection("file_prefix")
    num_shards: int = of_selection("num_shards")
    prediction_dir: str = setting(
        "",
        "Predictions for the unlabeled records, whose index holds the fingerprints; default: read the "
        "images.",
    )
    task_name: str | None = setting(
        None, "Task that names the sets; default: task.json next to the labeled records."
    )
    near: bool = setting(True, "Also find near copies; --nonear: identical files only.")
    output_dir: str = setting("", "Folder of the report, the lists, and the fingerprints.")


@dataclasses.dataclass(frozen=True)
class LabelsConfig(Settings):
    """Labels to check; the flags of `check_labels.py`."""

    label_data_dir: str = setting("", "Folder of the labeled records.")
    prediction_dir: str = setting(
        "", "Predictions for these records by a model that was not trained on their labels."
    )
    file_prefix: str = setting("train", "Prefix of the labeled files.")
    num_shards: int = setting(128, "Number of shards of the labeled set; default: detected.", low=1)
    task_name: str | None = setting(
        None, "Task of the labels; default: the one stored with the predictions."
    )
    output_dir: str = setting("", "Folder of the report and the list.")


@dataclasses.dataclass(frozen=True)
class PipelineConfig(Settings):
    """Where `label_beam.py` and `label_ray.py` work, and what they select."""

    work_dir: str = setting(
        "",
        "Folder for `predictions`, `info`, `statistics` and `selected`; all workers must see it.",
    )
    selection: str = of_selection("selection")
    num_image: int = of_selection("num_image")
    min_threshold: float = of_selection("min_threshold")
    max_prob: float = of_selection("max_prob")
    upsample: int = of_selection("upsample")
    use_top: int = of_selection("use_top")
    use_all: bool = of_selection("use_all")
    exclude: str = of_selection("exclude")
    reviewed: str = of_selection("reviewed")
    num_samples: int = of_selection("num_samples")


@dataclasses.dataclass(frozen=True)
class RayConfig(Settings):
    """The Ray cluster, and the actors of `label_ray.py` that hold the teacher."""

    ray_address: str = setting(
        "",
        "Address of the cluster; default: RAY_ADDRESS, else the cluster that this machine belongs to, "
        "else one on this machine only.",
    )
    min_actors: int = setting(
        1,
        "Actors to request at once, so that an autoscaling cluster adds nodes for them.",
        low=1,
    )
    max_actors: int = setting(
        0, "Maximum number of actors, if the cluster has room; 0: as many as fit.", low=0
    )
    cpus_per_actor: float = setting(1.0, "CPU cores that an actor reserves and uses.", low=0.01)
    gpus_per_actor: float = setting(0.0, "GPUs that an actor reserves.", low=0)
    resources_per_actor: str = setting(
        "", "Other Ray resources that an actor reserves, such as TPU=4,big_disk=1."
    )


def shard_list(text: str | None, num_shards: int) -> list[int]:
    """`"0,3,8-11"` → [0, 3, 8, 9, 10, 11]; `"auto"` → all; None (not given) → [0].

    Raises:
      ConfigError: not numbers and ranges, or outside 0..num_shards-1.
    """
    if text is None:
        return [0]
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
