"""Where exported weights come from, as lines of the model card: recipe, data and what was measured."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import tensorflow as tf

# Setting in config.json → its name in the card.
_RECIPE = {
    "train_steps": "Update steps",
    "train_batch_size": "Labeled images per update",
    "unlabel_ratio": "Unlabeled images per labeled one",
    "input_image_size": "Training resolution",
    "augment_name": "Augmentation",
    "base_learning_rate": "Learning rate per 256 images",
    "weight_decay": "Weight decay",
    "label_smoothing": "Label smoothing",
    "moving_average_decay": "Decay of the moving averages",
    "teacher_model_name": "Teacher on the fly",
    "init_model_path": "Started from",
    "seed": "Seed",
}
_DATA = {"label_data_dir": "Labeled data", "unlabel_data_dir": "Pseudo-labeled data"}


def of_training(model_dir: str) -> dict[str, object]:
    """Settings, data and measured accuracy of a training, name → value; without the files: nothing.

    Reads `config.json` and `metrics.jsonl`, which the training wrote, and `eval/eval.json` of the last
    `--mode=eval`, which may have measured an earlier checkpoint.
    """
    settings = _read(os.path.join(model_dir, "config.json"))
    facts: dict[str, object] = {
        title: os.path.basename(str(settings[name]).rstrip("/"))
        for name, title in {**_RECIPE, **_DATA}.items()
        if settings.get(name) not in (None, "")
    }
    if settings.get("augment_name") == "randaugment":
        facts["Augmentation"] = (
            f"RandAugment, {settings['randaug_layer']} operations of magnitude {settings['randaug_mag']}"
        )
    row = _last_evaluation(os.path.join(model_dir, "metrics.jsonl"))
    if row:
        facts[f"Evaluation during the training, after {row['step']} steps"] = (
            _accuracy(row, "eval/") + " (moving averages)"
        )
    measured = _read(os.path.join(model_dir, "eval", "eval.json"))
    for name, metrics in measured.get("sets", {}).items():
        facts[f"Last evaluation in the folder, on {name}"] = (
            _accuracy(metrics) + f" ({'moving averages' if measured['ema'] else 'raw weights'})"
        )
    return facts


def _accuracy(metrics: Mapping[str, float], prefix: str = "") -> str:
    top1, top5, examples = (metrics[prefix + name] for name in ("top1", "top5", "examples"))
    return f"top-1 {top1:.2%}, top-5 {top5:.2%} of {examples} images"


def _last_evaluation(path: str) -> Mapping[str, Any] | None:
    """The last row of a training's log that holds an evaluation."""
    if not tf.io.gfile.exists(path):
        return None
    with tf.io.gfile.GFile(path) as f:
        # A killed training may have left half a line.
        lines = [line for line in f if '"eval/top1"' in line and line.endswith("}\n")]
    return json.loads(lines[-1]) if lines else None


def of_publication(recipe: Any) -> dict[str, object]:
    """What a published model (a `recipes.Recipe`) was trained on and reached."""
    magnitude = recipe.randaugment_magnitude
    return {
        "Labeled data": "ImageNet, 1.28 million images",
        "Pseudo-labeled data": "JFT, 130 million images after balancing, labeled by the teacher",
        "Epochs of the labeled data": recipe.epochs,
        "Unlabeled images per labeled one": recipe.unlabel_ratio,
        "Training resolution": recipe.train_resolution,
        "Augmentation": (
            f"RandAugment, 2 operations of magnitude {magnitude}" if magnitude else "crop and flip"
        ),
        "Published accuracy": (
            f"ImageNet validation top-1 {recipe.top1:.1f}%, top-5 {recipe.top5:.1f}% "
            f"(arXiv 1911.04252) at {recipe.test_resolution} pixels; not measured on this export"
        ),
    }


def is_published(path: str, recipe: Any) -> bool:
    """Whether a file or folder is called as the published weights of that recipe are.

    Endings such as `.pth` do not matter. Names that only begin so are other weights: of L2 before its
    fine-tuning (`…-l2_475`), or of a training that started from the published ones.
    """
    names = {recipe.tf1_checkpoint, recipe.timm_name, recipe.keras_file or recipe.timm_name}
    return any(part == n or part.startswith(f"{n}.") for part in path.split("/") for n in names)


def _read(path: str) -> Mapping[str, Any]:
    if not tf.io.gfile.exists(path):
        return {}
    with tf.io.gfile.GFile(path) as f:
        return json.load(f)
