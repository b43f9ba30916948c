"""Binds a model_dir to a training run: the settings and records that it was started with."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import platform
import socket
import sys
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow as tf
from absl import logging

from efficientnet_ns.config.fields import ConfigError, comparable, needed
from efficientnet_ns.config.sections import Config
from efficientnet_ns.data import pipeline, streams, tasks
from efficientnet_ns.files import atomic, json_files, manifests, metrics_log, object_stores
from efficientnet_ns.files.errors import DataError
from efficientnet_ns.resolve import stored_model
from efficientnet_ns.resolve.resolved_config import normalization
from efficientnet_ns.training import checkpoints, preview

SETTINGS, RECORDS, RUNS = stored_model.SETTINGS, "records.json", "runs.jsonl"
# Stored in addition to the settings: the order of records, and since which step it applies.
_ORDER, _SINCE = "input_order", "input_order_since"
# Task fields that training depends on; stored because the task's file can be edited.
_TASK_FIELDS = (
    *("num_classes", "mean", "std", "image_size", "small_image", "flip"),
    *("train_set", "num_train_images"),
)


class DirectoryConflict(ConfigError):
    """model_dir belongs to another training run."""


def claim(
    config: Config, sources: Mapping[str, pipeline.Source | None], *, writes: bool = True
) -> int:
    """Records settings and data in model_dir, or checks that they match those recorded there.

    A folder without a checkpoint contains nothing to lose, so it is taken over.

    Args:
      sources: records to train on, by name of the set; None: there is no such set.
      writes: False on all workers but the chief.

    Returns:
      The step since which records have been read in the current order; see `streams`.

    Raises:
      DirectoryConflict: If the folder belongs to a run with other settings or records.
    """
    folder = needed(config.train.model_dir, "model_dir")
    begun, noted = checkpoints.saved_steps(folder), _noted_settings(folder)
    difference = _changed_settings(noted, config)
    if difference and begun:
        raise DirectoryConflict(
            f"{folder} belongs to a training run with other settings ({difference}). "
            "Choose another --model_dir, or use the settings it was started with."
        )
    task = tasks.get_task(needed(config.data.task_name, "task_name"))
    _check_task_file(folder, task)
    listing = {name: _listing(source) for name, source in sources.items() if source is not None}
    if begun:
        _check_records(folder, listing)
    # A run that stored another order, or none, changes to this one at its newest checkpoint.
    since = begun[0] if begun else 0
    if begun and noted.get(_ORDER) == streams.ORDER_VERSION:
        since = noted[_SINCE]
    if not writes:
        return since
    if difference:
        logging.warning("taking over %s, which has no checkpoint (%s)", folder, difference)
    # The settings that a run was started with stay unchanged.
    stays = noted and not difference
    settings = noted if stays else {**config.identity(), **_task_fields(config)}
    _write_claim(folder, noted, {**settings, _ORDER: streams.ORDER_VERSION, _SINCE: since})
    # Also if the user deleted the list to continue with new records.
    if not begun or object_stores.size(os.path.join(folder, RECORDS)) is None:
        json_files.write_json(os.path.join(folder, RECORDS), listing, indent=1)
    # The current task, because class names may have been added.
    tasks.write_task(os.path.join(folder, tasks.TASK_FILE), **dataclasses.asdict(task))
    return since


def _write_claim(folder: str, noted: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Creates the folder, removes what a killed process left there, and writes the settings."""
    object_stores.make_folder(folder)
    written = (SETTINGS, tasks.TASK_FILE, RECORDS, preview.FILE, metrics_log.METRICS, RUNS)
    atomic.remove_abandoned([os.path.join(folder, name) for name in (*written, "checkpoint")])
    if settings != noted:
        if since := settings[_SINCE]:
            logging.warning(
                "%s was started with an earlier order of records: at step %d, it continues with the next "
                "epoch, in the current order",
                folder,
                since,
            )
        json_files.write_json(os.path.join(folder, SETTINGS), settings, indent=1)


@contextlib.contextmanager
def expecting_other_records(folder: str) -> Iterator[None]:
    """Deletes the list of records in `folder` if a record proves unusable inside the block.

    The user then repairs or removes it and runs again, which must not be rejected.
    """
    try:
        yield
    except DataError:
        object_stores.remove(os.path.join(folder, RECORDS))
        raise


def note_start(folder: str, start: int, flags: Mapping[str, Any]) -> None:
    """Appends this start, with every flag, to `runs.jsonl`, to show who changed what, and when.

    Args:
      folder: model_dir.
      start: step from which training continues.
      flags: values by flag name.
    """
    row = {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "step": start,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "command": sys.argv,
        "python": platform.python_version(),
        "tensorflow": tf.__version__,
        "flags": flags,
    }
    path = os.path.join(folder, RUNS)
    # Rewritten completely: object stores cannot append, and a kill must not leave half a line.
    json_files.write_json_lines(path, [*json_files.read_json_lines(path), row])


def _noted_settings(folder: str) -> dict[str, Any]:
    path = os.path.join(folder, SETTINGS)
    return json_files.read_object_if_any(path) or {}


def _changed_settings(noted: Mapping[str, Any], config: Config) -> str:
    """Describes how settings differ from the recorded ones; "" if they do not, or there are none."""
    if not noted:
        return ""
    # Settings added since then had their defaults; earlier versions did not record the task.
    task = _task_fields(config)
    # Earlier versions did not apply the list; `_check_records` notices what it changes.
    noted = {"exclude": config.data.exclude, **noted}
    noted = comparable({**Config().identity(), **task, **noted})
    noted = {name: value for name, value in noted.items() if name not in (_ORDER, _SINCE)}
    if not noted["unlabel_ratio"]:
        noted["unlabel_data_dir"] = ""  # Earlier versions accepted one that had no effect.
    return manifests.describe_difference(noted, comparable({**config.identity(), **task}))


def _check_task_file(folder: str, task: tasks.Task) -> None:
    """Raises DirectoryConflict if a task file that is not of a run would be overwritten."""
    path, settings = (os.path.join(folder, name) for name in (tasks.TASK_FILE, SETTINGS))
    if not tf.io.gfile.exists(path) or tf.io.gfile.exists(settings):
        return
    if tasks.get_task(path) != task:
        raise DirectoryConflict(
            f"{path} describes a task other than --task_name and does not belong to a training "
            "run: choose another --model_dir"
        )


def _task_fields(config: Config) -> dict[str, Any]:
    """Returns {`task.<field>`: value}, as read back from JSON."""
    task = tasks.get_task(needed(config.data.task_name, "task_name"))
    values = {name: getattr(task, name) for name in _TASK_FIELDS}
    values |= normalization(needed(config.model.model_name, "model_name"), task)
    return {f"task.{k}": list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def _listing(source: pipeline.Source) -> dict[str, dict[str, int]]:
    """Returns sizes and counts, which reveal replaced files without reading them."""
    listing: dict[str, dict[str, int]] = {
        path: {"bytes": file.size, "records": count}
        for path, count, file in zip(source.paths, source.counts, source.files, strict=True)
    }
    for path, excluded in zip(source.paths, source.excluded):
        if excluded:
            content = np.array(excluded, "<i8").tobytes()
            listing[path] |= {"excluded": len(excluded), "excluded_crc32": zlib.crc32(content)}
    return listing


def _check_records(folder: str, listing: Mapping[str, Mapping[str, Any]]) -> None:
    noted_in = os.path.join(folder, RECORDS)
    noted = json_files.read_object_if_any(noted_in)
    if noted is None:  # Started before records were listed.
        return
    changes = [
        f"{path}: {_size(before.get(path))} → {_size(now.get(path))}"
        for before, now in ((noted.get(name, {}), listing.get(name, {})) for name in listing)
        for path in sorted({*before, *now})
        if before.get(path) != now.get(path)
    ]
    if changes:
        more = f", and {len(changes) - 1} more files" if len(changes) > 1 else ""
        raise DirectoryConflict(
            f"the records of the training run in {folder} have changed since it was started "
            f"({changes[0]}{more}). Restore them, choose another --model_dir, or delete "
            f"{noted_in} to continue with the new records."
        )


def _size(entry: Mapping[str, int] | None) -> str:
    if not entry:
        return "no file"
    size = f"{entry['records']} records in {entry['bytes']} bytes"
    if "excluded" not in entry:
        return size
    return f"{size}, {entry['excluded']} excluded (CRC {entry['excluded_crc32']:08x})"
