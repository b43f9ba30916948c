"""Predicts shards of unlabeled records with a teacher (arXiv 1911.04252, algorithm 1, step 2).

Each (shard, worker) produces one prediction file in the format of the original code, a Parquet
index of it without the probabilities, an info file with its count, and a manifest. Unreadable
records and images that cannot be decoded keep their place: they have all-zero probabilities, label
-1 in the index, and an entry with the reason in the manifest and in `quarantine-*.jsonl`.

Any number of processes may work on the same shards; see `files.leases`. After a kill, the same
command continues from the last completed part; see `parts`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Container, Mapping, Sequence
from typing import Any

import tensorflow as tf
from absl import logging

from efficientnet_ns.config import Config, ConfigError, shard_list
from efficientnet_ns.data.tasks import TASK_FILE, write_task
from efficientnet_ns.files import (
    atomic,
    json_files,
    manifests,
    object_stores,
    shard_names,
    tfrecords,
)
from efficientnet_ns.files.errors import DataError
from efficientnet_ns.files.leases import LeaseLost, Leases, unit_of
from efficientnet_ns.inference import engines, exported
from efficientnet_ns.inference.teacher import TeacherPredictor, check_views
from efficientnet_ns.models import weights
from efficientnet_ns.pseudo_labels import parts, unlabeled_set
from efficientnet_ns.pseudo_labels.label_shard import ShardLabeling, ShardTask, TooManyBadRecords
from efficientnet_ns.resolve import stored_model
from efficientnet_ns.resolve.resolved_config import ResolvedConfig, normalization

ENGINE_FILE = "engine.json"


def predict(
    config: Config, teacher: TeacherPredictor | exported.ExportedModel | None = None
) -> dict[str, int]:
    """Labels the configured shards; verifies and skips finished ones.

    Waits for shards that another process is labeling and takes them over if that process dies.

    For one shard of a set on an object store, this requests only its files, because folder listings
    have thousands of names. A later call with all shards removes leftovers of killed processes.

    Args:
      config: specifies teacher, input and outputs; see `resolve`.
      teacher: teacher with the same settings; if None, loads it if there is work.

    Returns:
      Totals over the shards: `records`, `unreadable` and `skipped_shards` (not labeled by this call).

    Raises:
      ConfigError: If a flag is missing or does not fit.
      TooManyBadRecords: For the first such shard, after all others are finished.
      manifests.OutputConflict: If an output was made with other settings; finished shards are kept.
    """
    resolved = resolve(config)
    tasks = Tasks(resolved)
    labeled = 0
    # A finished call loads no teacher.
    if tasks.unfinished():
        labeled = _work(resolved, tasks, teacher)
    _note_classes(resolved)
    tasks.remove_left_behind()
    counts = object_stores.each(lambda name: tasks[name].stage.counts(), tasks.names)
    _warn_of_mixed_engines(resolved.config.predict.output_dir, counts)
    return {
        "records": sum(c["records"] for c in counts),
        "unreadable": sum(len(c["quarantine"]) for c in counts),
        "skipped_shards": len(tasks.names) - labeled,
    }


def _warn_of_mixed_engines(folder: str, counts: Sequence[Mapping[str, Any]]) -> None:
    # Earlier versions did not store the engine.
    found = sorted({c["engine"] for c in counts if "engine" in c})
    if len(found) > 1:
        logging.warning(
            "%s: shards were labeled with different engines (%s), whose predictions differ in the last "
            "bits",
            *(folder, ", ".join(found)),
        )


def unfinished(config: Config) -> list[int]:
    """Returns the configured shards without finished predictions; raises errors like `predict`."""
    tasks = Tasks(resolve(config))
    return [tasks[name].shard for name in tasks.unfinished()]


def resolve(config: Config) -> ResolvedConfig:
    """Returns the settings completed with those of the teacher and the unlabeled set.

    Missing settings of the teacher are read from files next to its weights. `predict_ckpt_path` is
    the path of the weights; `file_prefix` and `num_shards` are those of the records.

    Raises:
      ConfigError: If a flag is missing or does not fit.
      DataError: If the folder has no such records.
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
        logging.warning(
            "labeling only shard 0 of %d; --shard_id=auto labels all of them", num_shards
        )
    info_dir = options.info_dir or options.output_dir
    found = config.override(file_prefix=prefix, num_shards=num_shards, info_dir=info_dir)
    return dataclasses.replace(resolved, config=found)


def load_teacher(resolved: ResolvedConfig) -> TeacherPredictor | exported.ExportedModel:
    """Loads the teacher of `resolve`d settings.

    Engines differ in the last bits. The engine that `auto` chooses is stored in the output folder, so
    that a resumed run and other workers use the same engine, regardless of what is installed.

    Raises:
      ConfigError: If this machine cannot use the engine of the output folder.
    """
    options, path = resolved.config.predict, resolved.config.predict.predict_ckpt_path
    if stored_model.is_export(path):
        return exported.ExportedModel(path)
    if options.inference_engine != "auto" or options.inference_dtype != "float32":
        return TeacherPredictor(resolved, path)
    note = os.path.join(options.output_dir, ENGINE_FILE)
    kept = json_files.read_object_if_any(note, "engine")
    if kept is None:
        teacher = TeacherPredictor(resolved, path)
        kept = _keep_engine(note, teacher.engine.name, options.lease_seconds)
        if kept["engine"] == teacher.engine.name:
            return teacher
    engine = kept["engine"]
    try:
        config = resolved.config.override(inference_engine=engine)
        teacher = TeacherPredictor(dataclasses.replace(resolved, config=config), path)
    except ConfigError as e:
        raise ConfigError(
            f"{e}; {note} requires {engine} for this folder: install it here, or choose another "
            "--output_dir"
        ) from e
    if engine in engines.CPU_ENGINES and engines.has_accelerator():
        logging.warning(
            "%s: labeling on CPUs with %s, as earlier processes did; to use the accelerator, choose "
            "another --output_dir",
            *(note, engine),
        )
    return teacher


def _keep_engine(note: str, engine: str, lease_seconds: float) -> dict[str, str]:
    """Stores the engine, unless another process was first; returns what is stored."""
    folder, unit = os.path.split(note)
    # Without the lease, two processes could both find no file and keep different engines.
    claimed = Leases(folder, lease_seconds).claims(
        [unit], lambda _: object_stores.size(note) is not None
    )
    with contextlib.closing(claimed) as claims:  # type: ignore[type-var]  # A generator.
        for _, lease in claims:
            with contextlib.suppress(LeaseLost):
                lease.check()
                json_files.write_json(note, {"engine": engine})
    return json_files.read_object(note, "engine")


def _check(resolved: ResolvedConfig) -> None:
    config = resolved.config
    options = config.predict
    if not options.predict_ckpt_path:
        raise ConfigError("--model_dir (or --predict_ckpt_path) is required: the teacher")
    if not options.output_dir:
        raise ConfigError("--output_dir is required for --mode=predict")
    if not _input_dir(config):
        raise ConfigError("--unlabel_data_dir is required: the folder with the records to label")
    if not options.reassign_label and options.worker_id >= options.total_replicas:
        raise ConfigError(
            f"--worker_id={options.worker_id} is not below "
            f"--total_replicas={options.total_replicas}"
        )
    if stored_model.is_export(options.predict_ckpt_path):
        exported.check(config, stored_model.read(options.predict_ckpt_path))
    check_views(resolved)


def _input_dir(config: Config) -> str:
    # The scripts of the original code pass the folder to label as label_data_dir.
    folder = config.data.unlabel_data_dir or config.data.label_data_dir or ""
    if config.predict.reassign_label and os.path.abspath(folder) == os.path.abspath(
        config.predict.output_dir
    ):
        raise ConfigError("--output_dir is the folder of the records to relabel: choose another")
    return folder


# How long a listing of the output folder, where others finish shards, is used: in seconds, or in
# multiples of the time it took. With thousands of shards, it takes many requests.
_LOOK_SECONDS, _LOOK_TIMES = 1.0, 50


class Tasks:
    """The shards to label. Each shard is checked on its turn; folders are listed once for all.

    For a single shard of many on an object store, this requests only its files.

    Attributes:
      names: names of the tasks, in the order in which this process labels them.
    """

    def __init__(self, resolved: ResolvedConfig):
        options = resolved.config.predict
        shards = shard_list(options.shard_id, options.num_shards)
        if options.shard_id == "auto":
            # Processes that start together should begin with different shards.
            # The factor is prime, so successive process IDs map to different shards.
            start = (os.getpid() * 7919) % len(shards)
            shards = shards[start:] + shards[:start]
        self._resolved = resolved
        folders = (_input_dir(resolved.config), options.output_dir)
        one_of_many = len(shards) == 1 < options.num_shards
        self._lists = not (one_of_many and all(map(object_stores.is_object_store, folders)))
        path = options.predict_ckpt_path
        if stored_model.is_export(path):
            self._checkpoint = exported.fingerprint(path)
        else:
            self._checkpoint = weights.fingerprint(path, resolved.model_name)
        if self._lists:
            inputs = set(object_stores.names(_input_dir(resolved.config)))
        else:
            wanted = [_input_path(resolved.config, shard) for shard in shards]
            inputs = {os.path.basename(path) for path in _found(wanted)}
        self._outputs = {shard: _outputs(resolved.config, shard) for shard in shards}
        self._shards = {os.path.basename(files[0]): s for s, files in self._outputs.items()}
        for shard in shards:
            _check_input(resolved.config, shard, inputs)
        self.names = list(self._shards)
        self._made: dict[str, ShardTask] = {}
        self._finished: set[str] = set()
        self._next_look, self._present = -math.inf, set[str]()
        if not object_stores.is_object_store(_input_dir(resolved.config)):
            for name in self.names:
                _ = self[name]  # Detects empty shards before any work.

    def __getitem__(self, name: str) -> ShardTask:
        if name not in self._made:
            shard = self._shards[name]
            outputs = self._outputs[shard]
            self._made[name] = _task(self._resolved, self._checkpoint, outputs, shard)
        return self._made[name]

    def unfinished(self) -> list[str]:
        """Returns the tasks without complete outputs; verifies the others.

        Raises:
          manifests.OutputConflict: If outputs were made with other settings.
        """
        self._look()
        # Tasks without any file are neither finished nor in conflict.
        begun = [n for n in self.names if self._present & self._basenames(n)]
        done = object_stores.each(lambda name: self[name].stage.done(), begun)
        self._finished.update(name for name, whole in zip(begun, done) if whole)
        return [name for name in self.names if name not in self._finished]

    def finish(self, name: str) -> None:
        """Marks a task as finished."""
        self._finished.add(name)

    def done(self, name: str) -> bool:
        """Checks whether all files of a task existed in the last listing."""
        if name not in self._finished:
            if time.monotonic() > self._next_look:
                self._look()
            # Only by name; see `_work` for the verification of claimed tasks.
            if self._basenames(name) <= self._present:
                self._finished.add(name)
        return name in self._finished

    def remove_left_behind(self) -> None:
        """Removes parts, leases and temporary files left by other processes, if all is finished."""
        # Otherwise, another process may still need its parts.
        if self._finished < set(self.names) or not self._lists:
            return
        self._look()
        ours = set().union(*map(self._basenames, self.names))
        left = [path for path in self._listed if self._is_left(os.path.basename(path), ours)]
        object_stores.each(object_stores.remove, left)

    def _is_left(self, name: str, ours: Container[str]) -> bool:
        task = parts.task_of(name) or unit_of(name)
        return task == ENGINE_FILE or task in self._shards or atomic.is_temporary(name, ours)

    def _look(self) -> None:
        options, began = self._resolved.config.predict, time.monotonic()
        folders = dict.fromkeys((options.output_dir, options.info_dir or options.output_dir))
        if self._lists:
            self._listed = [os.path.join(f, n) for f in folders for n in object_stores.names(f)]
        else:
            outputs = self._outputs.values()
            self._listed = _found(
                [path for files in outputs for path in (*files, _manifest(files))]
            )
        self._present = {os.path.basename(path) for path in self._listed}
        now = time.monotonic()
        self._next_look = now + max(_LOOK_SECONDS, _LOOK_TIMES * (now - began))

    def _basenames(self, name: str) -> set[str]:
        files = {os.path.basename(path) for path in self._outputs[self._shards[name]]}
        return {*files, os.path.basename(_manifest(self._outputs[self._shards[name]]))}


def _found(paths: Sequence[str]) -> list[str]:
    """Returns the paths at which files exist."""
    return [path for path, size in zip(paths, object_stores.sizes(paths)) if size is not None]


def _outputs(config: Config, shard: int) -> list[str]:
    options = config.predict
    if options.reassign_label:
        return [os.path.join(options.output_dir, os.path.basename(_input_path(config, shard)))]
    key = (shard, options.num_shards, options.worker_id)
    return shard_names.prediction_paths(
        *key, output_dir=options.output_dir, info_dir=options.info_dir
    )


def _manifest(outputs: Sequence[str]) -> str:
    return f"{outputs[0]}.manifest.json"


def _input_path(config: Config, shard: int) -> str:
    options = config.predict
    prefix = options.file_prefix
    if options.reassign_label:
        prefix = f"{prefix}-{options.worker_id}"
    name = shard_names.shard_name(prefix, shard, options.num_shards)
    return os.path.join(_input_dir(config), name)


def _check_input(config: Config, shard: int, present: Container[str]) -> None:
    """Raises DataError if a shard is not among the names in its folder."""
    path = _input_path(config, shard)
    if os.path.basename(path) not in present:
        holds = unlabeled_set.described(_input_dir(config))
        raise DataError(f"shard {path} is missing from its folder: {holds}")


def _note_classes(resolved: ResolvedConfig) -> None:
    """Writes the task next to the predictions, to provide the class names."""
    options = resolved.config.predict
    path = os.path.join(options.output_dir, TASK_FILE)
    if not options.reassign_label and object_stores.size(path) is None:
        object_stores.make_folder(options.output_dir)
        write_task(path, **dataclasses.asdict(resolved.task))


def _task(
    resolved: ResolvedConfig, checkpoint: str, outputs: Sequence[str], shard: int
) -> ShardTask:
    """Returns the task of a shard; DataError if it is empty and the folder's counts disagree."""
    options, path = resolved.config.predict, _input_path(resolved.config, shard)
    replicas = 1 if options.reassign_label else options.total_replicas
    size = tf.io.gfile.stat(path).length
    if not size:
        tfrecords.count_all([path])
    settings: dict[str, Any] = {
        "checkpoint": checkpoint,
        "input": manifests.fingerprint([path], [size]),
        "model": resolved.model_name,
        "image_size": resolved.image_size,
        "num_classes": resolved.num_classes,
        "small_image": resolved.small_image,
        **normalization(resolved.model_name, resolved.task),
        "total_replicas": replicas,
    }
    # Newer settings are stored only if they differ from their defaults, so that outputs of earlier
    # versions still match.
    if options.inference_dtype != "float32":
        settings["inference_dtype"] = options.inference_dtype
    if options.fast_decode:
        settings["fast_decode"] = True
    if options.test_time_views > 1:
        settings["test_time_views"] = options.test_time_views
    if resolved.config.data.crop_fraction is not None:
        settings["crop_fraction"] = resolved.config.data.crop_fraction
        # Earlier versions stored the fraction but did not use it to crop.
        if options.test_time_views == 10:
            settings["ten_views_cropped"] = True
    if options.noised_teacher:
        model = resolved.config.model
        settings["noised_teacher"] = {
            "seed": resolved.config.train.seed,
            # The noise of an image is drawn together with that of its batch.
            "batch_size": resolved.config.evaluation.eval_batch_size,
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
        stage=manifests.Stage(_manifest(outputs), outputs, settings),
        reassign=options.reassign_label,
    )


def _work(
    resolved: ResolvedConfig,
    tasks: Tasks,
    teacher: TeacherPredictor | exported.ExportedModel | None,
) -> int:
    """Labels tasks until this or other processes finish all; returns how many it labeled."""
    options = resolved.config.predict
    teacher = teacher or load_teacher(resolved)
    labeled = 0
    failed: dict[str, TooManyBadRecords] = {}
    leases = Leases(options.output_dir, options.lease_seconds)
    claimed = leases.claims(
        tasks.names,
        lambda name: name in failed or tasks.done(name),
        lambda name: not tasks[name].stage.done(),
    )
    # Closed even after an error, which releases the lease immediately.
    with contextlib.closing(claimed) as claims:  # type: ignore[type-var]  # A generator.
        for name, lease in claims:
            try:
                ShardLabeling(teacher, tasks[name], options, lease).run()
                labeled += 1
                tasks.finish(name)
            # The task is offered again until this or the other process finishes it.
            except LeaseLost as e:
                logging.warning("%s", e)
            except TooManyBadRecords as e:
                logging.error("%s", e)
                failed[name] = e
    if failed:
        raise next(iter(failed.values()))
    return labeled
