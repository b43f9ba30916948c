"""The programs in order of use, and the flags that `--help` shows for each."""

from __future__ import annotations

import ast
from pathlib import Path

from efficientnet_ns.config import flag_files

# Flags that most training runs set.
_TRAINING = (
    *("label_data_dir", "unlabel_data_dir", "task_name", "data_source", "model_name"),
    *("input_image_size", "train_steps", "train_batch_size", "base_learning_rate", "bn_momentum"),
    *("moving_average_decay", "augment_name", "unlabel_ratio"),
)
_SELECTION = (
    *("unlabel_data_dir", "prediction_dir", "prelim_stats_dir", "output_dir", "task_name"),
    *("num_image", "min_threshold"),
)

# Program → its most important flags; () for all.
PROGRAMS: dict[str, tuple[str, ...]] = {
    "demo": (),
    "make_records": (
        *("source", "output_dir", "labeled", "image_set", "validation_fraction", "subfolder"),
        *(
            "accept_classes",
            "imagenet_labels",
            "max_side",
            "num_shards",
            "limit",
            "max_bad_fraction",
        ),
    ),
    "proc_svhn": (),
    "noisy_student": (
        *(
            "labeled",
            "unlabeled",
            "test",
            "work_dir",
            "dry_run",
            "time_limit",
            "control",
            "held_out",
        ),
        *("models", "teacher_steps", "train_steps", "train_batch_size", "num_image"),
        *("min_threshold", "label_data_dir", "unlabel_data_dir", "task_name"),
    ),
    "main": (
        *("mode", "model_dir", *_TRAINING, "init_model_path"),
        *("predict_ckpt_path", "output_dir", "info_dir", "shard_id"),
    ),
    "import_predictions": (
        *("source", "unlabel_data_dir", "output_dir", "task_name", "key", "key_column", "values"),
        *("temperature", "class_map", "combine"),
    ),
    "check_data": (),
    "check_labels": (),
    "filter_unlabel": (
        *_SELECTION,
        "num_label_classes",
        "max_prob",
        "upsample",
        "exclude",
        "reviewed",
        "report",
    ),
    "labeling_report": (
        *(
            *_SELECTION,
            "report_path",
            "truth",
            "previous_prediction_dir",
            "class_names",
            "review_images",
            "label_next",
        ),
    ),
    "label_beam": (
        *("model_dir", "unlabel_data_dir", "work_dir", "num_image", "min_threshold", "task_name"),
        *("predict_ckpt_path", "total_replicas", "file_prefix", "num_shards", "max_bad_fraction"),
    ),
    "label_ray": (
        *("model_dir", "unlabel_data_dir", "work_dir", "num_image", "min_threshold", "task_name"),
        *("ray_address", "min_actors", "max_actors", "cpus_per_actor", "gpus_per_actor"),
        *("resources_per_actor", "predict_ckpt_path", "file_prefix", "max_bad_fraction"),
    ),
    "predict_image": (
        *("model_dir", "weights", "top", "json", "ema", "model_name", "task_name"),
        "input_image_size",
    ),
    "evaluate_robustness": (
        *("model_dir", "weights", "report_dir", "corrupt", "severities", "epsilons", "baseline"),
        *("label_data_dir", "image_set", "imagenet_a", "imagenet_r", "imagenet_v2"),
        *("imagenet_sketch", "imagenet_c", "imagenet_p", "allow_missing"),
    ),
    "export_model": (
        *("model_dir", "export_dir", "format", "optimize_for", "serving_dtype", "tflite_type"),
        *("check_data", "version", "top_k", "ema", "init_model_path", "model_name", "task_name"),
    ),
    "convert_checkpoint": (
        *("model_dir", "source", "target", "ema", "model_name", "num_label_classes"),
    ),
    "study": (
        *("work_dir", "studies", "seeds", "quick", "models", "teacher_steps", "num_image"),
        *("min_threshold", "label_data_dir", "unlabel_data_dir", "task_name", "train_steps"),
    ),
    "serving.client": (),
    "list_models": (),
    "benchmark": (),
}


def listing() -> str:
    """Returns one line per program with its name and purpose."""
    width = max(map(len, PROGRAMS))
    lines = [f"  {name:<{width}}  {_summary(name)}" for name in PROGRAMS]
    return "\n".join(
        [
            "Noisy Student Training with EfficientNet. Programs:",
            "",
            *lines,
            "",
            "python -m efficientnet_ns.<program> --help",
            f"Presets (--flagfile=flags/…) and scripts for Cloud TPU: {flag_files.presets()}",
        ]
    )


def _summary(program: str) -> str:
    """Returns the first line of a program's docstring, without any command line at its end."""
    source = Path(__file__).parents[1].joinpath(*program.split(".")).with_suffix(".py")
    described = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""
    return described.splitlines()[0].partition(": `")[0].rstrip(".:")
