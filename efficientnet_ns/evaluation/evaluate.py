"""`--mode=eval`: measures saved weights once, or every new checkpoint."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator
from typing import cast

import numpy as np
import tensorflow as tf
from absl import logging

from efficientnet_ns.config import Config, ConfigError, needed
from efficientnet_ns.data import pipeline, tasks
from efficientnet_ns.devices import distribution
from efficientnet_ns.evaluation import accuracy, accuracy_report
from efficientnet_ns.files import json_files, manifests
from efficientnet_ns.files.metrics_log import MetricsLog
from efficientnet_ns.inference import engines, exported
from efficientnet_ns.models import checkpoint_files, weights
from efficientnet_ns.resolve import stored_model
from efficientnet_ns.resolve.resolved_config import ResolvedConfig


def evaluate(config: Config) -> dict[str, dict[str, float]]:
    """Measures saved weights on the task's evaluation set and, if there is one, its test set.

    The weights are those of `stored_model.weights_of`, which may also be an export. Missing model
    settings are read from there, and the labeled records default to those of its training. With
    `eval_continuously`, every new checkpoint in `model_dir` is measured until the last step, and the
    metrics are also logged to `model_dir/eval`.

    Returns:
      Prefix of the set → metrics of the last weights measured; see `accuracy.Evaluator`.

    Raises:
      ConfigError, DataError: If settings or data are invalid.
    """
    path = _weights_path(config)
    stored = stored_model.read(path)
    if stored.exported:
        exported.check(config, stored)
    if config.evaluation.eval_image_size:
        config = config.override(input_image_size=config.evaluation.eval_image_size)
    if not config.data.label_data_dir:
        config = config.override(label_data_dir=stored.settings.get("label_data_dir"))
    resolved = ResolvedConfig.from_config(config, path)
    config = resolved.config
    _check(config)
    if stored.exported:
        return _evaluate_export(resolved, path)
    strategy = distribution.get_strategy(config.hardware)
    # Before the model is built, because its layers use the policy set at that time.
    distribution.set_precision(config.hardware, strategy)
    with strategy.scope():
        model = resolved.build_model()
    if config.evaluation.eval_continuously:
        evaluator = accuracy.Evaluator(model, strategy, views=config.evaluation.eval_views)
        return _evaluate_each(resolved, model, evaluator)
    weights.load_weights(model, path, ema=config.evaluation.eval_ema)
    classify = _by_engine(config, model, strategy)
    views = config.evaluation.eval_views
    evaluator = accuracy.Evaluator(model, strategy, views=views, classify=classify)
    results = _measure_sets(resolved, evaluator, path)
    folder = config.evaluation.eval_dir
    if not folder and config.train.model_dir:
        folder = os.path.join(stored_model.find(config.train.model_dir), "eval")
    return _report(resolved, path, results, folder if distribution.is_chief(strategy) else None)


def _evaluate_export(resolved: ResolvedConfig, path: str) -> dict[str, dict[str, float]]:
    """Measures an export, whose graph includes the preprocessing of images."""
    model = exported.ExportedModel(path)
    # The model is never called, because the function computes the probabilities.
    evaluator = accuracy.Evaluator(
        cast(tf.keras.Model, model), classify=engines.on_all_workers(model)
    )
    results = _measure_sets(resolved, evaluator, path, exported.Encoded(resolved.image_size))
    return _report(resolved, path, results, resolved.config.evaluation.eval_dir)


def _report(
    resolved: ResolvedConfig, path: str, results: dict[str, accuracy.Measured], folder: str | None
) -> dict[str, dict[str, float]]:
    """Returns the metrics, logs them next to published ones, and writes them to any `folder`."""
    if folder:
        names = tasks.class_names(resolved.task)
        accuracy_report.write(folder, resolved.config, path, results, names)
    for line in accuracy_report.beside_published(resolved.config, results):
        logging.info(line)
    return {name: measured.metrics for name, measured in results.items()}


def _weights_path(config: Config) -> str:
    train = config.train
    continuous = config.evaluation.eval_continuously
    # Checkpoints that do not exist yet can only be specified by their folder.
    path = train.model_dir if continuous else stored_model.weights_of(train)
    if not path:
        raise ConfigError(
            "--model_dir (or --init_model_path) is required: the model to evaluate, a folder of a "
            "training run, of noisy_student, or of an export"
        )
    return stored_model.find(path)


def _check(config: Config) -> None:
    """Raises ConfigError if the settings are invalid."""
    evaluation, kind = config.evaluation, config.predict.inference_engine
    needed(config.data.label_data_dir, "label_data_dir", "the folder with the labeled records")
    if evaluation.eval_views not in (1, 2):
        raise ConfigError(f"--eval_views={evaluation.eval_views} must be 1 or 2 (mirrored)")
    if evaluation.eval_continuously and os.environ.get("TF_CONFIG"):
        raise ConfigError("--eval_continuously works on one machine: unset TF_CONFIG")
    if evaluation.eval_continuously and kind in engines.CPU_ENGINES:
        raise ConfigError(
            f"--eval_continuously computes with TensorFlow: remove --inference_engine={kind}"
        )


def _by_engine(
    config: Config, model: tf.keras.Model, strategy: tf.distribute.Strategy
) -> Callable[[np.ndarray], np.ndarray] | None:
    """Returns what the CPU engine computes; None to use TensorFlow under the strategy."""
    kind, dtype = config.predict.inference_engine, config.predict.inference_dtype
    if kind in engines.CPU_ENGINES and strategy.num_replicas_in_sync > 1:
        raise ConfigError(
            f"--inference_engine={kind} evaluates on one device: set --num_replicas=1 "
            "and unset TF_CONFIG"
        )
    engine = engines.make(kind, model, config.evaluation.eval_batch_size, strategy, dtype=dtype)
    # The evaluator runs TensorFlow itself, compiled and on all replicas.
    compiled = isinstance(engine, engines.TensorFlowEngine)
    return None if compiled else engines.on_all_workers(engine)


def _measure_sets(
    resolved: ResolvedConfig,
    evaluator: accuracy.Evaluator,
    path: str,
    preprocessing: pipeline.Preprocessing | None = None,
) -> dict[str, accuracy.Measured]:
    """Returns set prefix → measurements of the model's current weights, loaded from `path`.

    Args:
      preprocessing: None for the evaluation preprocessing of the settings.
    """
    results = {}
    limits = {resolved.task.eval_set: "num_eval_images"}
    if resolved.task.test_set is not None:
        limits[resolved.task.test_set] = "num_test_images"
    for prefix, limit in limits.items():
        source = resolved.evaluation_source(prefix, limit)
        batches = functools.partial(
            distribution.eval_share, resolved, source, preprocessing=preprocessing
        )
        with resolved.naming_bad_records(source):
            results[prefix] = evaluator.measure(batches, source.total)
        logging.info("%s, %s: %s", path, prefix, accuracy.describe(results[prefix].metrics))
    return results


def _evaluate_each(
    resolved: ResolvedConfig, model: tf.keras.Model, evaluator: accuracy.Evaluator
) -> dict[str, dict[str, float]]:
    """Measures every new checkpoint in model_dir, up to that of the last step."""
    folder = needed(resolved.config.train.model_dir, "model_dir", "the folder of the checkpoints")
    total = resolved.steps_to_run
    # Keeps all rows of an interrupted evaluation so that it can be resumed.
    log = MetricsLog(os.path.join(folder, "eval"), start=total)
    logged = {row["step"] for row in log.rows}
    results: dict[str, dict[str, float]] = {}
    for path in _each_new_checkpoint(folder):
        # Checked here because training may start after its evaluation.
        _check_length(folder, resolved.config)
        step = _step_of(path)
        try:
            # The last one is measured even if it is already logged: its metrics are returned.
            if step not in logged or step == total:
                weights.load_weights(model, path, ema=resolved.config.evaluation.eval_ema)
                measured = _measure_sets(resolved, evaluator, path)
                results = {name: one.metrics for name, one in measured.items()}
        except (FileNotFoundError, tf.errors.NotFoundError, tf.errors.DataLossError):
            if checkpoint_files.newest_checkpoint(folder) == path:
                raise  # It still exists, so something else is missing or damaged.
            # Training keeps only the newest checkpoints.
            logging.warning("%s was removed before it could be measured", path)
            continue
        if step not in logged:
            log.add(
                step,
                {f"{s}/{k}": value for s, of_set in results.items() for k, value in of_set.items()},
            )
            log.flush()
        if step >= total:
            break
    log.close()
    return results


def _check_length(folder: str, config: Config) -> None:
    """Raises ConfigError if, with these settings, training in a folder ends at another step."""
    path = os.path.join(folder, "config.json")
    if not tf.io.gfile.exists(path):
        return
    noted, train = json_files.read_object(path), config.train
    names = ("train_steps", "train_ratio", "train_last_step_num")
    own = {name: getattr(train, name) for name in names}
    difference = manifests.describe_difference({n: noted.get(n, own[n]) for n in own}, own)
    if difference:
        raise ConfigError(
            f"training in {folder} ends at another step ({difference}): pass the settings it was "
            "started with"
        )


def _step_of(path: str) -> int:
    """Returns the step at the end of the name of a training checkpoint."""
    number = os.path.basename(path).rpartition("-")[2]
    if not number.isdecimal():
        raise ConfigError(
            f"--eval_continuously: the newest checkpoint is {path}, but training names it "
            "model.ckpt-<step>. Pass the folder of a training run as --model_dir"
        )
    return int(number)


def _each_new_checkpoint(folder: str, seconds: float = 1.0) -> Iterator[str]:
    """Yields the prefix of each newest checkpoint once, forever; polls every `seconds`."""
    last = None
    if checkpoint_files.newest_checkpoint(folder) is None:
        logging.info("waiting for the first checkpoint in %s", folder)
    while True:
        newest = checkpoint_files.newest_checkpoint(folder)
        # Of the checkpoints written during a measurement, only the newest is measured.
        if newest is not None and newest != last:
            yield newest
            last = newest
        time.sleep(seconds)
