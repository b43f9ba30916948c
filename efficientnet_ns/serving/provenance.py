"""Origin of exported weights, for the model card: recipe, data and measured accuracy."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from efficientnet_ns.files import json_files
from efficientnet_ns.models import published
from efficientnet_ns.models.recipes import RECIPES, Recipe

# Setting in config.json → its name in the card.
_RECIPE = {
    "train_steps": "Update steps of the whole schedule",
    "train_batch_size": "Labeled images per update",
    "unlabel_ratio": "Unlabeled images per labeled one",
    "input_image_size": "Training resolution",
    "augment_name": "Augmentation",
    "base_learning_rate": "Learning rate per 256 images",
    "weight_decay": "Weight decay",
    "label_smoothing": "Label smoothing",
    "moving_average_decay": "Decay of the moving averages",
    "teacher_model_name": "Teacher on the fly",
    # Two flags with the same meaning share a line of the card.
    "init_model_path": "Started from",
    "init_weights": "Started from",
    "seed": "Seed",
}
NOISY_STUDENT = "Noisy Student Training (arXiv 1911.04252)"
# Required keys of eval.json.
_MEASURED = ("weights", "ema", "views", "sets")
_DATA = {"label_data_dir": "Labeled data", "unlabel_data_dir": "Pseudo-labeled data"}


def of_training(model_dir: str, checkpoint: str = "") -> dict[str, object]:
    """Returns settings, data and accuracy of a training run, name → value; {} without its files.

    Reads `config.json` and `metrics.jsonl` of the run, and `eval/eval.json` of the last
    `--mode=eval` if it measured these weights (for a folder, possibly an earlier checkpoint).

    Args:
      model_dir: training folder.
      checkpoint: name of the exported checkpoint, `model.ckpt-<step>`; empty for the newest.
    """
    settings = _read(os.path.join(model_dir, "config.json"))
    facts: dict[str, object] = {
        title: ", ".join(
            os.path.basename(part.rstrip("/")) for part in str(settings[name]).split(";")
        )
        for name, title in {**_RECIPE, **_DATA}.items()
        if settings.get(name) not in (None, "")
    }
    # The default, 0, is not part of a recipe.
    if not settings.get("unlabel_ratio"):
        facts.pop(_RECIPE["unlabel_ratio"], None)
    if settings.get("consistency_threshold"):
        facts["Method"] = "FixMatch (arXiv 2001.07685)"
    elif settings.get("unlabel_data_dir") or settings.get("teacher_model_name"):
        facts["Method"] = NOISY_STUDENT
    if settings.get("augment_name") in ("randaugment", "v1"):
        facts["Augmentation"] = (
            f"RandAugment, {settings['randaug_layer']} operations of magnitude {settings['randaug_mag']}"
        )
    # For an earlier checkpoint, later evaluations measured other weights.
    step = checkpoint.rpartition("-")[2]
    row = _last_evaluation(
        os.path.join(model_dir, "metrics.jsonl"), float(step) if step.isdigit() else float("inf")
    )
    if row:
        facts[f"Evaluation during training, after {row['step']} steps"] = (
            # Training evaluates only these weights, whichever are exported.
            _accuracy(row, "eval/") + " (moving averages)"
        )
    measured = _read(os.path.join(model_dir, "eval", "eval.json"), *_MEASURED)
    if not measured or not _same(measured["weights"], os.path.join(model_dir, checkpoint)):
        return facts
    how = "moving averages" if measured["ema"] else "raw weights"
    if measured["views"] > 1:
        how += f", {measured['views']} views"
    for name, metrics in measured["sets"].items():
        facts[f"Last evaluation in the folder, on {name}"] = f"{_accuracy(metrics)} ({how})"
    return facts


def _accuracy(metrics: Mapping[str, float], prefix: str = "") -> str:
    top1, top5, examples = (metrics[prefix + name] for name in ("top1", "top5", "examples"))
    return f"top-1 {top1:.2%}, top-5 {top5:.2%} of {examples} images"


def _same(path: str, other: str) -> bool:
    """Checks whether two paths name the same file or folder."""
    first, second = (
        name.rstrip("/") if "://" in name else os.path.abspath(name) for name in (path, other)
    )
    return first == second


def _last_evaluation(path: str, end: float) -> Mapping[str, Any] | None:
    """Returns the last row of a training log that has an evaluation, up to step `end`."""
    rows = json_files.read_json_lines(path, "step")
    found = [row for row in rows if "eval/top1" in row and row["step"] <= end]
    return found[-1] if found else None


def of_publication(variant: str, path: str = "") -> dict[str, object]:
    """Returns training data, settings, accuracy and origin of a published model.

    Args:
      variant: variant with published weights.
      path: path of the weights.
    """
    recipe, origin = RECIPES.get(variant), published.origin(variant, path)
    if recipe is None:  # B8.
        return {
            "Method": "Supervised training",
            "Labeled data": "ImageNet, 1.28 million images",
            "Augmentation": "RandAugment",
            **origin,
        }
    return {**_of_recipe(recipe), **origin}


def _of_recipe(recipe: Recipe) -> dict[str, object]:
    if recipe.top1 is None:
        return {
            "Method": "Supervised training",
            "Labeled data": "ImageNet, 1.28 million images",
            "Training resolution": recipe.train_resolution,
            "Published accuracy": (
                f"ImageNet validation top-1 {recipe.top1_supervised:.1f}% at "
                f"{recipe.test_resolution} pixels; not measured on this export"
            ),
        }
    magnitude = recipe.randaugment_magnitude
    return {
        "Method": NOISY_STUDENT,
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


def is_published(path: str, variant: str) -> bool:
    """Checks whether a path has the name of a variant's published weights, with any extension.

    PyTorch appends a dash and 8 digits of a hash by convention. A longer name denotes other weights: L2
    before fine-tuning (`…-l2_475`), or a training run that started from the published ones.
    """
    names = set(published.names(variant))
    recipe = RECIPES.get(variant)
    if recipe is not None and recipe.keras_file:
        names.add(recipe.keras_file)
    if not names:
        return False
    name = "|".join(map(re.escape, names))
    return any(re.fullmatch(rf"({name})(-[0-9a-f]{{8}})?(\..*)?", p) for p in path.split("/"))


def _read(path: str, *keys: str) -> Mapping[str, Any]:
    return json_files.read_object_if_any(path, *keys) or {}
