"""A teacher's predictions for shards of unlabeled records (arXiv 1911.04252, algorithm 1, step 2).

Each (shard, worker) gives one prediction file in the original's format, a Parquet index of it
without the probabilities, an info file with its count, and a manifest. Records that cannot be
read, and images that cannot be decoded, keep their place: all-zero probabilities, label -1 in the
index, and an entry with the reason in the manifest and in `quarantine-*.jsonl`.

Any number of processes may work on the same shards, see `files.leases`. A killed process continues
where it was, see `parts`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os

import tensorflow as tf
from absl import logging

from efficientnet_ns.config import Config, ConfigError, shard_list
from efficientnet_ns.data.tasks import TASK_FILE, write_task
from efficientnet_ns.files import manifests, shard_names, tfrecords
from efficientnet_ns.files.errors import DataError
from efficientnet_ns.files.leases import LeaseLost, Leases
from efficientnet_ns.inference import exported
from efficientnet_ns.inference.teacher import TeacherPredictor, check_views
from efficientnet_ns.models import weights
from efficientnet_ns.pseudo_labels import unlabeled_set
from efficientnet_ns.pseudo_labels.label_shard import ShardLabeling, ShardTask, TooManyBadRecords
from efficientnet_ns.resolve import stored_model
from efficientnet_ns.resolve.resolved_config import ResolvedConfig, normalization


def predict(
    config: Config, teacher: TeacherPredictor | exported.ExportedModel | None = None
) -> dict[str, int]:
    """Labels the configured shards; finished ones are verified and skipped.

    Waits for shards that another process is working on, and takes them over if it dies.

    Args:
      config: names teacher, input and outputs; see `resolve`.
      teacher: of the same settings; None: loads it if there is work.

    Returns:
      Totals over the shards: `records`, `unreadable` and `skipped_shards` (not labeled by this call).

    Raises:
      ConfigError: a flag is missing or does not fit.
      TooManyBadRecords: of the first such shard, after all others are done.
      manifests.OutputConflict: an output is of other settings; finished shards are kept.
    """
    resolved = resolve(config)
    tasks = _tasks(resolved)
    labeled = 0
    if not all(task.stage.done() for task in tasks.values()):
        labeled = _work(resolved, tasks, teacher)
    _note_classes(resolved)
    counts = [task.stage.counts() for task in tasks.values()]
    return {
        "records": sum(c["records"] for c in counts),
        "unreadable": sum(len(c["quarantine"]) for c in counts),
        "skipped_shards": len(tasks) - labeled,
    }


def unfinished(config: Config) -> list[int]:
    """The configured shards without finished predictions; raises as `predict`."""
    resolved = resolve(config)
    return [task.shard for task in _tasks(resolved).values() if not task.stage.done()]


def resolve(config: Config) -> ResolvedConfig:
    """The settings with teacher and unlabeled set as they were found.

    What is not given about the teacher is read beside its weights; `predict_ckpt_path` is where they
    are, `file_prefix` and `num_shards` are those of the folder's records.

    Raises:
      ConfigError: a flag is missing or does not fit.
      DataError: the folder has no such records.
    """
    path = stored_model.find(config.predict.predict_ckpt_path or config.train.model_dir or "")
    resolved = ResolvedConfig.from_config(config.override(predict_ckpt_path=path), path)
    _check(resolved)
    config, options = resolved.config, resolved.config.predict
    part = f"-{options.worker_id}" if options.reassign_label else ""
    prefix, num_shards = unlabeled_set.find(
        _input_dir(config), options.file_prefix, options.num_shards, part
    )
    if options.shard_id is None and num_shards > 1:
        logging.warning("only shard 0 of %d is labeled; --shard_id=auto: all of them", num_shards)
    info_dir = options.info_dir or options.output_dir
    found = config.override(file_prefix=prefix, num_shards=num_shards, info_dir=info_dir)
    return dataclasses.replace(resolved, config=found)


def load_teacher(resolved: ResolvedConfig) -> TeacherPredictor | exported.ExportedModel:
    """The teacher of `resolve`d settings."""
    path = resolved.config.predict.predict_ckpt_path
    if stored_model.is_export(path):
        return exported.ExportedModel(path)
    return TeacherPredictor(resolved, path)


def _check(resolved: ResolvedConfig) -> None:
    config = resolved.config
    options = config.predict
    if not options.predict_ckpt_path:
        raise ConfigError("--model_dir (or --predict_ckpt_path) is needed: the teacher")
    if not options.output_dir:
        raise ConfigError("--output_dir is needed for --mode=predict")
    if not _input_dir(config):
        raise ConfigError("--unlabel_data_dir is needed: the folder with the records to label")
    if not options.reassign_label and options.worker_id >= options.total_replicas:
        raise ConfigError(
            f"--worker_id={options.worker_id} is not below "
            f"--total_replicas={options.total_replicas}"
        )
    if stored_model.is_export(options.predict_ckpt_path):
        exported.check(config, stored_model.read(options.predict_ckpt_path))
    check_views(resolved)


def _input_dir(config: Config) -> str:
    # The original's scripts pass the folder to label as label_data_dir.
    folder = config.data.unlabel_data_dir or config.data.label_data_dir or ""
    if config.predict.reassign_label and os.path.abspath(folder) == os.path.abspath(
        config.predict.output_dir
    ):
        raise ConfigError("--output_dir is the folder of the records to label again: name another")
    return folder


def _tasks(resolved: ResolvedConfig) -> dict[str, ShardTask]:
    options = resolved.config.predict
    shards = shard_list(options.shard_id, options.num_shards)
    if options.shard_id == "auto":
        # Processes that start together should begin with different shards.
        start = (os.getpid() * 7919) % len(shards)
        shards = shards[start:] + shards[:start]
    sources = {shard: _input_path(resolved.config, shard) for shard in shards}
    path = options.predict_ckpt_path
    if stored_model.is_export(path):
        checkpoint = exported.fingerprint(path)
    else:
        checkpoint = weights.fingerprint(path, resolved.model_name)
    tasks = [_task(resolved, checkpoint, sources[shard], shard) for shard in shards]
    return {task.name: task for task in tasks}


def _input_path(config: Config, shard: int) -> str:
    options = config.predict
    prefix = options.file_prefix
    if options.reassign_label:
        prefix = f"{prefix}-{options.worker_id}"
    name = shard_names.shard_name(prefix, shard, options.num_shards)
    path = os.path.join(_input_dir(config), name)
    if not tf.io.gfile.exists(path):
        holds = unlabeled_set.described(_input_dir(config))
        raise DataError(f"shard {path} is missing from its folder: {holds}")
    if tf.io.gfile.stat(path).length == 0:
        # DataError unless the folder's counts list the shard as empty.
        tfrecords.count_all([path])
    return path


def _note_classes(resolved: ResolvedConfig) -> None:
    """Leaves the task beside the predictions, for the names of its classes."""
    options = resolved.config.predict
    path = os.path.join(options.output_dir, TASK_FILE)
    if not options.reassign_label and not tf.io.gfile.exists(path):
        tf.io.gfile.makedirs(options.output_dir)
        write_task(path, **dataclasses.asdict(resolved.task))


def _task(resolved: ResolvedConfig, checkpoint: str, path: str, shard: int) -> ShardTask:
    options = resolved.config.predict
    key = (shard, options.num_shards, options.worker_id)
    replicas = options.total_replicas
    outputs = [
        os.path.join(options.output_dir, shard_names.prediction_name(*key)),
        os.path.join(options.output_dir, shard_names.index_name(*key)),
        os.path.join(options.info_dir, shard_names.info_name(*key)),
    ]
    if options.reassign_label:
        outputs, replicas = [os.path.join(options.output_dir, os.path.basename(path))], 1
    settings = {
        "checkpoint": checkpoint,
        "input": manifests.fingerprint([path]),
        "model": resolved.model_name,
        "image_size": resolved.image_size,
        "num_classes": resolved.num_classes,
        "small_image": resolved.small_image,
        **normalization(resolved.model_name, resolved.task),
        "total_replicas": replicas,
    }
    if options.test_time_views > 1:
        settings["test_time_views"] = options.test_time_views
    if resolved.config.data.crop_fraction is not None:
        settings["crop_fraction"] = resolved.config.data.crop_fraction
    if options.noised_teacher:
        model = resolved.config.model
        settings["noised_teacher"] = {
            "seed": resolved.config.train.seed,
            # The noise of an image is drawn with that of the others in its batch.
            "batch_size": resolved.config.train.eval_batch_size,
            "images": resolved.unlabeled_preprocessing.describe(),
            "dropout_rate": model.dropout_rate,
            "stochastic_depth_rate": model.stochastic_depth_rate,
        }
    return ShardTask(
        name=os.path.basename(outputs[0]),
        source=path,
        shard=shard,
        worker=0 if options.reassign_label else options.worker_id,
        replicas=replicas,
        stage=manifests.Stage(f"{outputs[0]}.manifest.json", outputs, settings),
        reassign=options.reassign_label,
    )


def _work(
    resolved: ResolvedConfig,
    tasks: dict[str, ShardTask],
    teacher: TeacherPredictor | exported.ExportedModel | None,
) -> int:
    """Labels tasks until all are done, by this process or others; returns how many it labeled."""
    options = resolved.config.predict
    teacher = teacher or load_teacher(resolved)
    labeled = 0
    failed: dict[str, TooManyBadRecords] = {}
    leases = Leases(options.output_dir, options.lease_seconds)

    def done(name: str) -> bool:
        return name in failed or tasks[name].stage.done()

    claimed = leases.claims(list(tasks), done)
    with contextlib.closing(claimed) as claims:  # type: ignore[type-var]  # A generator.
        for name, lease in claims:
            try:
                ShardLabeling(teacher, tasks[name], options, lease).run()
                labeled += 1
            except LeaseLost as e:
                logging.warning("%s", e)
            except TooManyBadRecords as e:
                logging.error("%s", e)
                failed[name] = e
    if failed:
        raise next(iter(failed.values()))
    return labeled
