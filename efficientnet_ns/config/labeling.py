"""Settings of selection and writing, the labeling report, and labeling on many machines.

The settings of a labeling teacher (`--mode=predict`) are `sections.PredictConfig`.
"""

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
    output_dir: str = setting("", "Folder of the selection and the balanced records.")
    num_shards: int = setting(
        128, "Number of shards of the unlabeled set; default: detected.", low=1
    )
    only_use_num_shards: int = setting(
        -1, "Use only the first N shards, for statistics, selection and records; -1: all."
    )
    shard_id: int | None = setting(
        None,
        "Write only the records of this shard; if omitted, of all shards. Statistics and selection "
        "always cover all shards; the first call computes them and later calls reuse them.",
        low=0,
        documented=0,
    )
    total_replicas: int = setting(
        1,
        "Number of tasks that share the workers of a shard. Statistics have a file for each task, but "
        "task 0 writes all records; calls with a --task above 0 write none.",
        low=1,
    )
    total_label_replicas: int = setting(
        -1, "Number of workers that predicted each shard (their total_replicas); -1: detected."
    )
    task: int = setting(-1, "Number in the names of the output files; -1: 0.")
    debug: int = setting(
        0, "1: compute statistics and selection for only the first worker's part of --shard_id."
    )
    num_image: int = setting(1300, "Images per class.", low=0)
    min_threshold: float = setting(0.0, "Minimum confidence to keep.", low=0, high=1)
    max_prob: float = setting(
        2.0,
        "Maximum confidence to keep, except for labels in --reviewed; the default is above 1 because "
        "rounded values may exceed 1.",
        low=0,
    )
    task_name: str | None = setting(
        None, "Task that defines the classes; default: the one stored with the predictions."
    )
    num_label_classes: int = setting(1000, "Number of classes; known tasks set it.", low=1)
    upsample: int = setting(1, "1: fill classes below num_image with copies; 0: do not.", low=0)
    use_top: int = setting(
        1,
        "For classes with more than num_image images, 1: keep the most confident; 0: keep a random "
        "sample of those at or above min_threshold.",
        low=0,
    )
    use_all: bool = setting(
        False, "Keep every image at or above min_threshold once; ignore num_image."
    )
    selection: str = setting(
        "exact",
        "exact: num_image images per class. threshold: as in the 2019 code, thresholds in steps of "
        "0.01 and randomly drawn copies, for an expected total of about num_image.",
        choices=("exact", "threshold"),
    )
    only_get_stats: int = setting(0, "1: stop after the statistics; 0: do not.", low=0)
    file_prefix: str = setting(
        "train", "Prefix of the unlabeled files: train or extra; default: detected."
    )
    data_type: str = setting(
        "tfrecord",
        "Format of the unlabeled files; only tfrecord is supported.",
        choices=("tfrecord",),
    )
    eval_imagenet_p: bool = setting(
        False, "Accepted for old scripts but ignored; the 2019 code did not use it either."
    )
    exclude: str = setting(
        "", "List of records never to select, such as exclude.csv from check_data."
    )
    reviewed: str = setting(
        "",
        "Decisions saved by review sheets: rejected images are never selected; the others get the "
        "reviewer's label with probability 1. Several files are joined with ';', and later ones take "
        "precedence.",
    )
    seed: int = setting(0, "Random seed for the choice of copies and the order of records.", low=0)
    num_samples: int = setting(5, "Number of sample pictures to keep per class and shard.", low=0)
    num_workers: int = setting(
        -1,
        "Number of processes that write shards; -1: one per core, fewer if there is little to write.",
    )


@dataclasses.dataclass(frozen=True)
class FilterConfig(Settings):
    """What `filter_unlabel.py` does in addition to selecting and writing."""

    report: bool = setting(False, "At the end, write report.html as labeling_report does.")


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
        "no class), or `records`: the image/class/label of the unlabeled records.",
    )
    class_names: str = setting(
        "", "Text file with one class name per line; default: the task's names."
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
    report_shards: int = setting(4, "Number of shards to take pictures from.", low=1)


def of_selection(name: str) -> Any:
    """Returns the setting of that name in `SelectConfig`."""
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
        None, "Task that defines the classes; default: task.json next to the unlabeled records."
    )
    key: str = setting(
        "position",
        "How rows are matched to records. position: row i is record i, shard after shard (make_records "
        "shuffles: rows in the order of a folder get wrong labels); name: the record's image/filename; "
        "hash: SHA-256 of the image, in hexadecimal digits.",
        choices=("position", "name", "hash"),
    )
    key_column: str = setting("key", "Column, or array in a .npz file, with the keys.")
    values: str = setting(
        "probabilities", "Kind of values in the source.", choices=("probabilities", "logits")
    )
    temperature: float = setting(
        1.0, "Divisor of the logits; above 1 makes predictions softer.", low=1e-3
    )
    class_map: str = setting(
        "",
        "Text file with one line per class of the source: the name or number of the task's class, or - "
        "for none. Probabilities of classes with the same line are added. Default: columns are matched "
        "by class name, else by number, else in the task's order.",
    )
    min_mass: float = setting(
        0.5,
        "If some columns are not classes of the task, images with less than this probability in the task's classes "
        "get no label; the probabilities of other images are renormalized.",
        low=0,
        high=1,
    )
    combine: str = setting(
        "mean",
        "How to combine several teachers. mean: average their probabilities; agreement: the same, but "
        "images on whose class the teachers disagree get no label.",
        choices=("mean", "agreement"),
    )
    allow_missing: bool = setting(
        False, "Leave records without a row unlabeled; by default, they are an error."
    )
    allow_unknown: bool = setting(
        False, "Ignore rows without a record; by default, they are an error."
    )


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
        "Predictions for the unlabeled records, whose index contains the fingerprints; default: read "
        "the images.",
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
        None, "Task that defines the labels; default: the one stored with the predictions."
    )
    output_dir: str = setting("", "Folder of the report and the list.")


@dataclasses.dataclass(frozen=True)
class PipelineConfig(Settings):
    """Where `label_beam.py` and `label_ray.py` work, and what they select."""

    work_dir: str = setting(
        "",
        "Folder for `predictions`, `info`, `statistics` and `selected`; all workers must have access.",
    )
    selection: str = of_selection("selection")
    num_image: int = of_selection("num_image")
    min_threshold: float = of_selection("min_threshold")
    max_prob: float = of_selection("max_prob")
    upsample: int = of_selection("upsample")
    use_top: int = of_selection("use_top")
    use_all: bool = of_selection("use_all")
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
        "Number of actors to request at the start, so that an autoscaling cluster adds nodes for them.",
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
    """Parses shards: `"0,3,8-11"` → [0, 3, 8, 9, 10, 11]; `"auto"` → all; None (not given) → [0].

    Raises:
      ConfigError: If a part is not a number or range, or is outside 0..num_shards-1.
    """
    if text is None:
        return [0]
    if text == "auto":
        return list(range(num_shards))
    shards: list[int] = []
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdecimal() or (last and not last.isdecimal()):
            raise ConfigError(f"--shard_id={text}: {part!r} is neither a number nor a range a-b")
        part_shards = range(int(first), int(last or first) + 1)
        if not part_shards:
            raise ConfigError(f"--shard_id={text}: the range {part!r} ends before it starts")
        shards += part_shards
    outside = [s for s in shards if s >= num_shards]
    if outside:
        raise ConfigError(f"--shard_id={text}: {outside[0]} is not below --num_shards={num_shards}")
    return list(dict.fromkeys(shards))
