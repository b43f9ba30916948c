"""Labeling, selection and writing of a whole set by many machines, as units of work.

A unit is one shard by one of the workers that share it. Whatever spreads the units, such as Beam or
Ray, calls these functions: those of the ordinary commands, for one unit each. So the files are the
same to the last byte, finished units are skipped, and a unit may be tried again, or done twice.
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
    """The units to label, after a look at what would stop the work later.

    Args:
      prediction: of all `num_shards` shards by all `total_replicas` workers; its shard_id and
        worker_id are ignored.
      selection: from these predictions.

    Raises:
      ConfigError, DataError, manifests.OutputConflict: see `predict.predict` and `index.decisions`.
    """
    # Read for its errors only: a missing list is told before hours of labeling, not after.
    index.decisions(selection)
    parts = _parts(prediction)
    units = [(part.predict.worker_id, s) for part in parts for s in predict.unfinished(part)]
    logging.info("%d of %d units to label", len(units), len(parts) * prediction.predict.num_shards)
    return units


def load_teacher(prediction: Config) -> Teacher:
    """The teacher for all units."""
    return predict.load_teacher(predict.resolve(prediction))


def label(prediction: Config, unit: Unit, teacher: Teacher) -> str:
    """Labels a unit; the message if too many of its records are unreadable, else "".

    That is not raised: whoever spreads the units would try it again, and stop the others.
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
      refused: the messages that `label` returned.

    Raises:
      TooManyBadRecords: of the first shard with too many.
    """
    if messages := list(filter(None, refused)):
        # Units finish in any order; the message is to be the same in every run.
        raise TooManyBadRecords(min(messages))
    select(selection)
    return index.shards(selection)


def groups(shards: Sequence[int], most: int = 1000) -> list[list[int]]:
    """Shards written by one call, in at most `most` groups: each call lists all folders."""
    number = max(1, -(-len(shards) // most))
    return [list(shards[i : i + number]) for i in range(0, len(shards), number)]


def finish(prediction: Config, selection: SelectConfig) -> dict[str, object]:
    """Verifies that everything is finished, and returns the totals.

    Returns:
      What `selection.select` and `write.write` return, and `unreadable` images.
    """
    unreadable = sum(predict.predict(part)["unreadable"] for part in _parts(prediction))
    return {"unreadable": unreadable, **select(selection), **write.write(selection)}


def _parts(prediction: Config) -> list[Config]:
    """All shards, by each worker."""
    options = prediction.predict
    if options.reassign_label:
        raise ConfigError("--reassign_label selects nothing: use main --mode=predict")
    return [
        prediction.override(worker_id=worker, shard_id=f"0-{options.num_shards - 1}")
        for worker in range(options.total_replicas)
    ]
