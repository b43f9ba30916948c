"""Program `evaluate_robustness.py`: the paper's robustness sets, or attacks on a labeled set."""

from __future__ import annotations

import dataclasses
import os
from operator import methodcaller
from typing import Any

import tensorflow as tf

from efficientnet_ns import report
from efficientnet_ns.config import Config, ConfigError, CustomRobustnessConfig, RobustnessConfig
from efficientnet_ns.evaluation import (
    custom_robustness,
    custom_robustness_report,
    robustness,
    robustness_sets,
    robustness_sources,
)
from efficientnet_ns.files import atomic, json_files, text_table
from efficientnet_ns.files.errors import DataError
from efficientnet_ns.inference.teacher import TeacherPredictor, check_views
from efficientnet_ns.ingest import data_source
from efficientnet_ns.models import weights
from efficientnet_ns.resolve import stored_model
from efficientnet_ns.resolve.resolved_config import ResolvedConfig

# Sets of labeled images: class folders, records or TensorFlow Datasets.
_LABELED = ("imagenet_a", "imagenet_r", "imagenet_v2", "imagenet_sketch")


def evaluate_and_report(config: Config, own: CustomRobustnessConfig, sets: RobustnessConfig) -> str:
    """Measures the paper's sets or the labeled set of `config`; returns a Markdown table.

    Raises:
      ConfigError, DataError: If settings or data are invalid.
    """
    config = data_source.with_records(config)
    sets = _with_weights(config, sets)
    if own.corrupt or own.epsilons:
        given = [f"--{name}" for name, path in sets.places().items() if path]
        if given:
            raise ConfigError(
                f"--corrupt and --epsilons measure the set of --label_data_dir; {given[0]} needs a "
                "separate command"
            )
        found = evaluate_custom_set(config, own, sets)
        return custom_robustness_report.markdown(found)
    if own.baseline:
        raise ConfigError("--baseline requires --corrupt or --epsilons")
    results = evaluate(config, sets)
    resolved = ResolvedConfig.from_config(config, sets.weights)
    rows = robustness.rows(results, resolved.image_size, resolved.model_name)
    return text_table.markdown(rows)


def _with_weights(config: Config, sets: RobustnessConfig) -> RobustnessConfig:
    """Returns `sets` with the path of the weights; the default is the weights in `model_dir`."""
    given = sets.weights or config.train.model_dir or ""
    return dataclasses.replace(sets, weights=stored_model.find(given))


def evaluate(config: Config, sets: RobustnessConfig) -> dict[str, dict[str, Any]]:
    """Measures the given sets; writes robustness.json, .md and .html.

    Args:
      config: the model, with ImageNet's classes; missing settings are read from files next to its
        weights.
      sets: the weights, as in `stored_model.find`, and the sets.

    Returns:
      Set → results, as fractions.

    Raises:
      ConfigError: If the settings do not fit.
      DataError: If a folder has an unexpected layout; raised before any measurement.
      manifests.OutputConflict: If report_dir has parts of other weights, settings or sets.
    """
    sets = _with_weights(config, sets)
    places = _given(sets)
    resolved = ResolvedConfig.from_config(config, sets.weights)
    if resolved.num_classes != 1000:
        raise ConfigError(
            f"--task_name={resolved.config.data.task_name}: the sets require ImageNet's classes"
        )
    check_views(resolved)
    # All sets are checked before a model is built and anything is measured.
    measurements = _open(places, sets.allow_missing, config.data.tfds_data_dir)
    predictor = TeacherPredictor(resolved, sets.weights)
    identity = {
        "weights": sets.weights,
        "model": resolved.model_name,
        "image_size": resolved.image_size,
        "views": config.predict.test_time_views,
    }
    whole = {"imagenet_c", "imagenet_p"} & set(places)
    evaluation = robustness.Evaluation(
        predictor.label,
        predictor.group,
        os.path.join(sets.report_dir, "parts"),
        # By content, because training may continue in the same folder.
        {
            **identity,
            **_not_default(resolved.config),
            "weights": weights.fingerprint(sets.weights, resolved.model_name),
        },
        predictor.of_whole_images().label if whole else None,
    )
    results = {name: measure(evaluation) for name, measure in measurements.items()}
    _write(sets.report_dir, identity, results)
    return results


def _not_default(config: Config) -> dict[str, Any]:
    """Returns non-default settings that change predictions; earlier parts lack the defaults."""
    values, defaults = config.values(), Config().values()
    names = ("crop_fraction", "precision", "inference_dtype", "fast_decode")
    return {name: values[name] for name in names if values[name] != defaults[name]}


def _given(sets: RobustnessConfig) -> dict[str, str]:
    """Returns the paths of the given sets."""
    given = {name: path for name, path in sets.places().items() if path}
    if not sets.weights or not sets.report_dir or not given:
        raise ConfigError(
            "--model_dir (or --weights), --report_dir and at least one set are required: "
            f"{', '.join(f'--{name}' for name in sets.places())}, "
            "or --corrupt or --epsilons for a custom labeled set"
        )
    if ("imagenet_val" in given) != ("real_labels" in given):
        raise ConfigError("--imagenet_val and --real_labels must be set together")
    return given


def _open(folders: dict[str, str], allow_missing: bool, tfds_data_dir: str | None) -> dict:
    """Maps each set to a function that measures it with an `Evaluation`.

    Raises:
      DataError: If a folder or file does not exist or has an unexpected layout.
    """
    absent = [
        f"--{flag}={path}"
        for flag, path in folders.items()
        if not path.startswith("tfds:") and not tf.io.gfile.exists(path)
    ]
    if absent:
        raise DataError(f"no such folder or file: {', '.join(absent)}")
    options, work = (tfds_data_dir, allow_missing), {}
    for flag in _LABELED:
        if flag in folders:
            name = flag.replace("_", "-")
            classes = robustness_sets.classes_of(name)
            images = robustness_sources.open_images(folders[flag], classes, *options)
            # Predictions on ImageNet-A and -R are restricted to their 200 classes.
            among = list(classes.values()) if len(classes) < 1000 else None
            work[name] = methodcaller("accuracy", name, images, among)
    if "real_labels" in folders:
        labels = robustness_sets.real_labels(folders["real_labels"], folders["imagenet_val"])
        work["imagenet-real"] = methodcaller("real", folders["real_labels"], *labels)
    if part := robustness_sources.single_corruption(folders.get("imagenet_c", "")):
        images = robustness_sources.open_images(
            folders["imagenet_c"], robustness_sets.classes_of(), *options
        )
        # CE is a mean over severities, so a single part has none and is treated as a separate set.
        name = f"imagenet-c/{part}"
        work[name] = methodcaller("accuracy", name, images, cropped=True)
    elif "imagenet_c" in folders:
        corruptions = robustness_sources.open_corruptions(folders["imagenet_c"], *options)
        work["imagenet-c"] = methodcaller("corruptions", corruptions)
    if "imagenet_p" in folders:
        clips = robustness_sources.open_perturbations(folders["imagenet_p"], allow_missing)
        work["imagenet-p"] = methodcaller("perturbations", clips)
    return work


def _write(folder: str, identity: dict, results: dict[str, dict]) -> None:
    json_files.write_json(
        os.path.join(folder, "robustness.json"), {**identity, "sets": results}, indent=1
    )
    size, model = identity["image_size"], identity["model"]
    rows = robustness.rows(results, size, model)
    tables = robustness.tables(results, size, model)
    parts = [f"\n### {title}\n\n{text_table.markdown(table)}" for title, table in tables.items()]
    text = text_table.markdown(rows) + "".join(parts)
    atomic.write(os.path.join(folder, "robustness.md"), text)
    details = [
        report.Section(f"{name}: {key}", report.table([{"name": n, key: v} for n, v in of.items()]))
        for name, result in results.items()
        for key, of in result.items()
        if isinstance(of, dict)
    ]
    report.write_page(
        os.path.join(folder, "robustness.html"),
        title=f"Robustness of {identity['model']}",
        intro=f"Weights: {identity['weights']}. Values next to published ones are percent (uT5D: "
        "ranks); those by corruption and perturbation are fractions.",
        sections=[
            report.Section("Measured and published", report.table(rows)),
            *(
                report.Section(title, report.table(table, highlight_last=True))
                for title, table in tables.items()
            ),
            *details,
        ],
    )


def evaluate_custom_set(
    config: Config, own: CustomRobustnessConfig, sets: RobustnessConfig
) -> dict[str, Any]:
    """Attacks and corrupts the labeled set of `config`; writes own_set.json, .md and .html.

    Returns:
      `custom_robustness.Found.results`.

    Raises:
      ConfigError, DataError: If settings or data are invalid.
    """
    sets = _with_weights(config, sets)
    if not sets.weights or not sets.report_dir:
        raise ConfigError("--model_dir (or --weights) and --report_dir are required")
    found = custom_robustness.measure(config, own, sets.weights, sets.report_dir)
    custom_robustness_report.write(sets.report_dir, found)
    return found.results
