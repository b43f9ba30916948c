"""Runs several stages of labeling in one call, for the programs that filter, report and label."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from efficientnet_ns.config import (
    Config,
    ConfigError,
    FilterConfig,
    PipelineConfig,
    RayConfig,
    ReportConfig,
    SelectConfig,
    check,
    given,
    mark_given,
    require,
    shard_list,
)
from efficientnet_ns.data import tasks
from efficientnet_ns.ingest import data_source
from efficientnet_ns.outcomes import labeling_report
from efficientnet_ns.pseudo_labels import index, predict, unlabeled_set, write
from efficientnet_ns.pseudo_labels.selection import select


def select_and_write(selection: SelectConfig, options: FilterConfig) -> dict[str, Any]:
    """Computes statistics and selection; writes records of all shards or of `selection.shard_id`.

    Returns:
      What `select` and `write` return, with names for the classes if the task has them, and the path
      of the `report`, if one was written.

    Raises:
      ConfigError: If a folder is not given, or settings contradict each other.
    """
    require(selection, "unlabel_data_dir", "prediction_dir", "prelim_stats_dir", "output_dir")
    task = _task(selection)
    selection = _completed(selection, task)
    if options.report and selection.only_get_stats:
        raise ConfigError("--report needs a selection: drop --only_get_stats")
    result: dict[str, Any] = {**select(selection)}
    # Among tasks that share a shard, the first writes its records.
    if not selection.only_get_stats and (selection.total_replicas == 1 or selection.task < 1):
        one = selection.shard_id
        shards = index.shards(selection) if one is None else [one]
        result.update(write.write(selection, shards))
    if "classes" in result:
        names = tasks.class_names(task) if task else None
        # Class numbers are strings, because they come from a JSON manifest.
        named = {names[int(k)] if names else k: kept for k, kept in result["classes"].items()}
        result["classes"] = named
    if options.report:
        result["report"] = labeling_report.write_report(selection)[0]
    return result


def report(selection: SelectConfig, options: ReportConfig) -> list[str]:
    """Writes the labeling report of a finished selection; see `labeling_report.write_report`.

    Raises:
      ConfigError: If a folder is not given.
    """
    require(selection, "unlabel_data_dir", "prediction_dir", "output_dir")
    return labeling_report.write_report(completed(selection), options)


def completed(selection: SelectConfig) -> SelectConfig:
    """Returns the settings with task, number of classes, file prefix and shards filled in.

    The default task is the teacher's, which is stored next to its predictions.

    Raises:
      ConfigError: If the given number of classes is not the task's.
      DataError: See `unlabeled_set.find`.
    """
    return _completed(selection, _task(selection))


def _task_name(selection: SelectConfig) -> str:
    return selection.task_name or os.path.join(selection.prediction_dir, tasks.TASK_FILE)


def _task(selection: SelectConfig) -> tasks.Task | None:
    """Returns the given task, else the teacher's; None if there is neither."""
    name = _task_name(selection)
    return tasks.get_task(name) if selection.task_name or tf.io.gfile.exists(name) else None


def _completed(selection: SelectConfig, task: tasks.Task | None) -> SelectConfig:
    chosen = given(selection)
    if task is not None:
        name, classes = _task_name(selection), task.num_classes
        if chosen.get("num_label_classes", classes) != classes:
            raise ConfigError(
                f"--num_label_classes={selection.num_label_classes}, but task {name!r} has {classes} "
                "classes"
            )
        selection = dataclasses.replace(selection, task_name=name, num_label_classes=classes)
    if selection.only_get_stats:
        return selection  # The records are not needed.
    prefix, num_shards = unlabeled_set.find(
        selection.unlabel_data_dir, selection.file_prefix, selection.num_shards
    )
    selection = dataclasses.replace(selection, file_prefix=prefix, num_shards=num_shards)
    # `dataclasses.replace` loses which settings were given.
    mark_given(selection, chosen)
    return selection


def label_on_beam(
    config: Config, job: PipelineConfig, beam_options: Sequence[str]
) -> dict[str, Any]:
    """Labels, selects and writes as one Beam pipeline.

    Args:
      config: the teacher and the unlabeled set.
      job: the job's folder and selection.
      beam_options: arguments of the pipeline, each beginning with `-`.

    Returns:
      What `beam.label` returns.

    Raises:
      ConfigError: If a setting is missing, or would have no effect in a pipeline.
    """
    if beam_options and not beam_options[0].startswith("-"):
        raise ConfigError(
            f"unexpected argument {beam_options[0]!r}; every setting is a --flag=value"
        )
    _check_whole(config, job)
    from efficientnet_ns.pipelines import beam  # Beam is optional.

    return beam.label(*pipeline_stages(data_source.with_records(config), job), beam_options)


def label_on_ray(config: Config, job: PipelineConfig, pool: RayConfig) -> dict[str, Any]:
    """Labels, selects and writes on a Ray cluster.

    Args:
      config, job: see `label_on_beam`.
      pool: the cluster and its actors.

    Returns:
      What `ray_cluster.label` returns.

    Raises:
      ConfigError: If a setting is missing, or would have no effect in a pipeline.
    """
    _check_whole(config, job)
    check(pool)
    from efficientnet_ns.pipelines import ray_cluster  # Ray is optional.

    return ray_cluster.label(*pipeline_stages(data_source.with_records(config), job), pool)


def _check_whole(config: Config, job: PipelineConfig) -> None:
    """Raises ConfigError for missing folders, and for flags of main that select part of the set."""
    if not (job.work_dir and config.data.unlabel_data_dir):
        raise ConfigError("--work_dir and --unlabel_data_dir are required")
    options = config.predict
    for name in ("output_dir", "info_dir", "worker_id"):
        if getattr(options, name):
            raise ConfigError(
                f"--{name} does not apply to a pipeline, which labels everything below --work_dir"
            )
    # If not given, main labels shard 0, but a pipeline labels all: `pipeline_stages` sets `auto`.
    if options.shard_id is None:
        return
    if len(shard_list(options.shard_id, options.num_shards)) < options.num_shards:
        raise ConfigError(
            f"--shard_id={options.shard_id}: drop it; a pipeline labels all {options.num_shards} "
            "shards"
        )


def pipeline_stages(config: Config, job: PipelineConfig) -> tuple[Config, SelectConfig]:
    """Returns the settings of prediction and selection for a whole set."""
    folder = {
        name: os.path.join(job.work_dir, name)
        for name in ("predictions", "info", "statistics", "selected")
    }
    prediction = config.override(output_dir=folder["predictions"], info_dir=folder["info"])
    resolved = predict.resolve(prediction.override(shard_id="auto"))
    config = resolved.config
    selection = SelectConfig(
        unlabel_data_dir=config.data.unlabel_data_dir,
        prediction_dir=folder["predictions"],
        info_dir=folder["info"],
        prelim_stats_dir=folder["statistics"],
        output_dir=folder["selected"],
        num_shards=config.predict.num_shards,
        file_prefix=config.predict.file_prefix,
        num_label_classes=resolved.num_classes,
        seed=config.train.seed,
        exclude=config.data.exclude,
        **{k: v for k, v in dataclasses.asdict(job).items() if k != "work_dir"},
    )
    return config, selection
