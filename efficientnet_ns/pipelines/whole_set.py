"""Labeling, selection and writing of a whole set on many machines, as units of work.

A unit is the part of one shard for one of the workers that share it. Schedulers such as Beam and Ray
call these functions, which run the code of the ordinary commands for one unit. Therefore, the files
are byte-identical, finished units are skipped, and a unit may be retried or processed twice.
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import logging

from efficientnet_ns.config import Config, ConfigError, SelectConfig
from efficientnet_ns.inference.exported import ExportedModel
from efficientnet_ns.inference.teacher import TeacherPredictor
from efficientnet_ns.pseudo_labels import index, predict, write
from efficientnet_ns.pseudo_labels.label_shard import TooManyBadRecords
from efficientnet_ns.pseudo_labels.selection import select

Unit = tuple[int, int]  # (worker, shard)
Teacher = TeacherPredictor | ExportedModel


class StepFailed(RuntimeError):
    """A worker failed for a reason that the user can fix, such as unusable data, or was cancelled."""


def unfinished(prediction: Config, selection: SelectConfig) -> list[Unit]:
    """Returns the units to label, after checking for errors that would stop the work later.

    Args:
      prediction: settings for all `num_shards` shards and all `total_replicas` workers; shard_id
        and worker_id are ignored.
      selection: settings of the selection from these predictions.

    Raises:
      ConfigError, DataError, manifests.OutputConflict: See `predict.predict` and `index.decisions`.
    """
    # Read only for its errors: a missing list is reported before hours of labeling, not after.
    index.decisions(selection)
    parts = _parts(prediction)
    units = [(part.predict.worker_id, s) for part in parts for s in predict.unfinished(part)]
    logging.info("%d of %d units to label", len(units), len(parts) * prediction.predict.num_shards)
    return units


def load_teacher(prediction: Config) -> Teacher:
    """Loads the teacher for all units."""
    return predict.load_teacher(predict.resolve(prediction))


def label(prediction: Config, unit: Unit, teacher: Teacher) -> str:
    """Labels a unit; returns an error message if too many records are unreadable, else "".

    The error is not raised, because a scheduler would retry the unit and stop the others.
    """
    worker, shard = unit
    try:
        predict.predict(prediction.override(worker_id=worker, shard_id=str(shard)), teacher)
    except TooManyBadRecords as e:
        logging.error("%s", e)
        return str(e)
    return ""


def select_shards(refused: list[str], selection: SelectConfig) -> list[int]:
    """Selects from all predictions; returns the shards to write.

    Args:
      refused: messages that `label` returned.

    Raises:
      TooManyBadRecords: If a shard has too many; names the first one.
    """
    if messages := list(filter(None, refused)):
        # Units finish in any order, but the message must be the same in every run.
        raise TooManyBadRecords(min(messages))
    select(selection)
    return index.shards(selection)


def groups(shards: Sequence[int], most: int = 1000) -> list[list[int]]:
    """Groups shards to write in one call, in at most `most` groups: each call lists all folders."""
    number = max(1, -(-len(shards) // most))
    return [list(shards[i : i + number]) for i in range(0, len(shards), number)]


def finish(prediction: Config, selection: SelectConfig) -> dict[str, object]:
    """Verifies that everything is finished and returns the totals.

    Returns:
      The values that `selection.select` and `write.write` return, and the number of `unreadable`
      images.
    """
    unreadable = sum(predict.predict(part)["unreadable"] for part in _parts(prediction))
    return {"unreadable": unreadable, **select(selection), **write.write(selection)}


def _parts(prediction: Config) -> list[Config]:
    """Returns the settings for all shards, one per worker."""
    options = prediction.predict
    if options.reassign_label:
        raise ConfigError("--reassign_label does not select records: use main --mode=predict")
    return [
        prediction.override(worker_id=worker, shard_id=f"0-{options.num_shards - 1}")
        for worker in range(options.total_replicas)
    ]
