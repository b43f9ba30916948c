"""Which training a model_dir belongs to: the settings and the records it was begun with."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Mapping
from typing import Any

import tensorflow as tf
from absl import logging

from efficientnet_ns.config import Config, ConfigError, comparable
from efficientnet_ns.data import pipeline
from efficientnet_ns.files import atomic, json_files, manifests
from efficientnet_ns.training import checkpoints, preview, summaries

SETTINGS, RECORDS = "config.json", "records.json"


class DirectoryConflict(ConfigError):
    """model_dir belongs to another training."""


def claim(
    config: Config, sources: Mapping[str, pipeline.Source | None], *, writes: bool = True
) -> None:
    """Notes in model_dir what its training is made from, or checks that it is the same as noted.

    A folder without a checkpoint holds nothing that could be lost: it is taken over.

    Args:
      sources: records to train on, by the name of the set; None: there is no such set.
      writes: False on all workers but the chief.

    Raises:
      DirectoryConflict: the folder belongs to a training with other settings or records.
    """
    folder = config.train.model_dir
    begun = bool(checkpoints.saved_steps(folder))
    difference = _changed_settings(folder, config)
    if difference and begun:
        raise DirectoryConflict(
            f"{folder} belongs to a training with other settings ({difference}). "
            "Choose another --model_dir, or give the settings it was started with."
        )
    listing = {name: _listing(source) for name, source in sources.items() if source is not None}
    if begun:
        _check_records(folder, listing)
    if not writes:
        return
    if difference:
        _check_nobody_trains(folder)
        logging.warning("%s has no checkpoint: it is taken over (%s)", folder, difference)
    tf.io.gfile.makedirs(folder)
    written = (SETTINGS, RECORDS, preview.FILE, summaries.METRICS, summaries.RUNS, "checkpoint")
    atomic.remove_abandoned([os.path.join(folder, name) for name in written])
    # The settings a training was begun with stay as they were written.
    if difference or not tf.io.gfile.exists(os.path.join(folder, SETTINGS)):
        json_files.write_json(os.path.join(folder, SETTINGS), config.identity(), indent=1)
    if not begun or not tf.io.gfile.exists(os.path.join(folder, RECORDS)):
        json_files.write_json(os.path.join(folder, RECORDS), listing, indent=1)


def expect_other_records(folder: str) -> None:
    """Lets the training go on with records that are changed from now on."""
    with contextlib.suppress(tf.errors.NotFoundError):
        tf.io.gfile.remove(os.path.join(folder, RECORDS))


def _changed_settings(folder: str, config: Config) -> str:
    """How the settings differ from those noted; empty when they do not, or none are."""
    path = os.path.join(folder, SETTINGS)
    if not tf.io.gfile.exists(path):
        return ""
    # Settings that came later had their defaults.
    noted = comparable({**Config().identity(), **json_files.read_json(path)})
    return manifests.describe_difference(noted, comparable(config.identity()))


def _listing(source: pipeline.Source) -> dict[str, dict[str, int]]:
    """What tells replaced files from the ones that were there, without reading them."""
    return {
        path: {"bytes": tf.io.gfile.stat(path).length, "records": count}
        for path, count in zip(source.paths, source.counts)
    }


def _check_records(folder: str, listing: Mapping[str, Mapping[str, Any]]) -> None:
    noted_in = os.path.join(folder, RECORDS)
    if not tf.io.gfile.exists(noted_in):  # Begun before the records were noted.
        return
    noted = json_files.read_json(noted_in)
    changes = [
        f"{path}: {_size(before.get(path))} → {_size(now.get(path))}"
        for before, now in ((noted.get(name, {}), listing.get(name, {})) for name in listing)
        for path in sorted({*before, *now})
        if before.get(path) != now.get(path)
    ]
    if changes:
        more = f", and {len(changes) - 1} more files" if len(changes) > 1 else ""
        raise DirectoryConflict(
            f"the records of the training in {folder} are no longer those it was begun with "
            f"({changes[0]}{more}). Put them back, choose another --model_dir, or delete "
            f"{noted_in} to continue with the records as they are."
        )


def _size(entry: Mapping[str, int] | None) -> str:
    return f"{entry['records']} records in {entry['bytes']} bytes" if entry else "no file"


def _check_nobody_trains(folder: str) -> None:
    starts = json_files.read_json_lines(os.path.join(folder, summaries.RUNS))
    last = starts[-1] if starts else {}
    pid = last.get("pid", os.getpid())
    here = last.get("host") == socket.gethostname()
    if here and pid != os.getpid() and atomic.is_running(pid):
        raise DirectoryConflict(
            f"process {pid} has been training in {folder} with other settings since {last['time']}. "
            "End it, or choose another --model_dir."
        )
