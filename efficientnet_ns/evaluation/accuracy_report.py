"""Writes the results of an evaluation as `eval.json` and as an HTML page."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from efficientnet_ns import report as page
from efficientnet_ns.config import Config
from efficientnet_ns.evaluation.accuracy import Measured
from efficientnet_ns.files import json_files, object_stores
from efficientnet_ns.models.recipes import RECIPES, Recipe

# Size of ImageNet's validation set; published values are comparable only on the complete set.
_IMAGENET_VALIDATION = 50_000


def beside_published(config: Config, results: Mapping[str, Measured]) -> list[str]:
    """Compares measured and published top-1 accuracy, in lines; [] for other models and sets.

    Args:
      config: names the model and the task.
      results: prefix of the set → measurements.
    """
    recipe = RECIPES.get(config.model.model_name or "")
    if recipe is None or config.data.task_name not in (None, "imagenet"):
        return []
    return [
        f"{config.model.model_name}, {name}: top-1 {measured.metrics['top1']:.2%} measured; "
        f"published: {_published(recipe)}"
        for name, measured in results.items()
        if measured.metrics["examples"] == _IMAGENET_VALIDATION
    ]


def _published(recipe: Recipe) -> str:
    supervised = f"supervised {recipe.top1_supervised:.1f}%"
    if recipe.top1 is None:
        return supervised
    return f"Noisy Student {recipe.top1:.1f}% (timm's copy of it {recipe.timm_top1:.2f}%), {supervised}"


def write(
    folder: str,
    config: Config,
    weights_path: str,
    results: Mapping[str, Measured],
    class_names: Sequence[str] | None,
) -> None:
    """Writes `eval.json` and `eval_report.html`.

    Args:
      folder: created if it does not exist.
      config: settings of the evaluation.
      weights_path: path of the evaluated weights.
      results: prefix of the set → measurements.
      class_names: names of all classes; None names classes by their indices.
    """
    object_stores.make_folder(folder)
    first = next(iter(results.values()))
    names = class_names or [str(i) for i in range(first.num_classes)]
    contents = {
        "weights": weights_path,
        "ema": config.evaluation.eval_ema,
        "views": config.evaluation.eval_views,
        "sets": {name: _plain(measured, names) for name, measured in results.items()},
    }
    json_files.write_json(os.path.join(folder, "eval.json"), contents, indent=1)
    sections = [s for name, measured in results.items() for s in _sections(name, measured, names)]
    page.write_page(
        os.path.join(folder, "eval_report.html"),
        title=f"Evaluation of {config.model.model_name}",
        intro="\n\n".join([f"Weights: {weights_path}", *beside_published(config, results)]),
        sections=sections,
    )


def _plain(measured: Measured, names: Sequence[str]) -> dict[str, Any]:
    # JSON has no NaN, the value of classes without images.
    accuracies = [None if np.isnan(a) else float(a) for a in measured.per_class]
    return {
        **_metrics(measured),
        "per_class": accuracies,
        "confused": [
            {"truth": names[t], "predicted": names[a], "images": n}
            for t, a, n in measured.confusion.worst(limit=20)
        ],
        "calibration": {
            key: values.tolist() for key, values in measured.calibration._asdict().items()
        },
    }


def _metrics(measured: Measured) -> dict[str, float]:
    return {**measured.metrics, "ece": measured.calibration.error}


def _sections(name: str, measured: Measured, names: Sequence[str]) -> list[page.Section]:
    images, accuracies, pairs = measured.images, measured.per_class, measured.confusion
    by_class = [
        {"class": names[i], "images": int(images[i]), "accuracy": float(accuracies[i])}
        for i in np.argsort(accuracies, kind="stable")
        if images[i]
    ]
    return [
        page.Section(f"{name}: accuracy", page.table([_metrics(measured)])),
        page.Section(f"{name}: calibration", page.reliability(measured.calibration)),
        page.Section(
            f"{name}: classes, worst first", page.details("Accuracy by class", page.table(by_class))
        ),
        page.Section(
            f"{name}: confusion",
            page.confusion(pairs.truth, pairs.predicted, names, images=pairs.images),
        ),
    ]
