"""Labeling, selection and writing as one Apache Beam pipeline (Dataflow, Flink, Spark, one machine).

  shards not yet predicted ─► predict ─► (all are there) ─► select ─► shards ─► write

The steps call the functions of the ordinary commands: `predict.predict` and `write.write_shards` for
one shard, `selection.select` once, since one machine selects from 300 million images in a minute. So
the files are the same to the last byte, finished shards are skipped, and a runner may retry or
duplicate a bundle. The steps share nothing but files: all workers must see the folders.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence

from absl import logging

from efficientnet_ns.config import Config, ConfigError, SelectConfig
from efficientnet_ns.inference.exported import ExportedModel
from efficientnet_ns.inference.teacher import TeacherPredictor
from efficientnet_ns.pseudo_labels import index, predict, write
from efficientnet_ns.pseudo_labels.label_shard import TooManyBadRecords
from efficientnet_ns.pseudo_labels.selection import select

try:
    import apache_beam
    from apache_beam.options.pipeline_options import PipelineOptions
    from apache_beam.runners.runner import PipelineState
    from apache_beam.utils.shared import Shared
except ImportError as e:
    raise ConfigError(
        f"Apache Beam cannot be imported ({e}): pip install 'efficientnet-ns[beam]', or in a clone "
        "pip install -r requirements-beam.txt"
    ) from e


class StepFailed(RuntimeError):
    """A worker failed for a reason that the user can fix, such as unusable data, or was cancelled."""


def label(
    prediction: Config, selection: SelectConfig, beam_arguments: Sequence[str] = ()
) -> dict[str, object]:
    """Labels all shards, selects, and writes the balanced records; finished work is skipped.

    Args:
      prediction: of all `num_shards` shards by all `total_replicas` workers; its shard_id and
        worker_id are ignored.
      selection: from these predictions.
      beam_arguments: for Beam's PipelineOptions, such as `--runner=DataflowRunner`.

    Returns:
      What `selection.select` and `write.write` return, and `unreadable` images.

    Raises:
      ConfigError, DataError, manifests.OutputConflict: see `predict.predict`; existing
        outputs are checked before the pipeline starts.
      StepFailed: the same errors and those of `selection.select` and `write.write`, in a worker of
        another process.
    """
    parts = _parts(prediction)
    units = [(part.predict.worker_id, s) for part in parts for s in predict.unfinished(part)]
    logging.info("%d of %d units to label", len(units), len(parts) * prediction.predict.num_shards)
    options = PipelineOptions(list(beam_arguments))
    with _errors_of_workers(), apache_beam.Pipeline(options=options) as pipeline:
        _build(pipeline, units, prediction, selection)
    if pipeline.result.state != PipelineState.DONE:
        raise StepFailed(
            f"the pipeline ended as {pipeline.result.state}: start the same command again"
        )
    # Everything is finished; these calls verify it and return the totals.
    unreadable = sum(predict.predict(part)["unreadable"] for part in parts)
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


def _build(
    pipeline: apache_beam.Pipeline,
    units: Sequence[tuple[int, int]],
    prediction: Config,
    selection: SelectConfig,
) -> None:
    """Adds the steps; `units` are (worker, shard)."""
    # A reshuffle spreads elements made in one place over the workers. The combined list is one
    # element, which appears only after every unit is finished: a barrier.
    refused = (
        pipeline
        | "units" >> apache_beam.Create(list(units))
        | "spread units" >> apache_beam.Reshuffle()
        | "predict" >> apache_beam.ParDo(_Predict(prediction))
        | "all predicted" >> apache_beam.combiners.ToList()
    )
    (
        refused
        | "select" >> apache_beam.FlatMap(_select, selection)
        | "spread shards" >> apache_beam.Reshuffle()
        | "write" >> apache_beam.Map(lambda shard: write.write_shards(selection, [shard]))
    )


class _Predict(apache_beam.DoFn):
    """Labels (worker, shard); yields the message if too many of its records are unreadable.

    The model is loaded for the first unit, once for all threads of a process.
    """

    def __init__(self, prediction: Config):
        self._prediction, self._shared = prediction, Shared()
        self._teacher: TeacherPredictor | ExportedModel | None = None

    def process(self, unit: tuple[int, int]) -> Iterator[str]:
        worker, shard = unit
        part = self._prediction.override(worker_id=worker, shard_id=str(shard))
        if self._teacher is None:
            self._teacher = self._shared.acquire(self._load)
        try:
            predict.predict(part, self._teacher)
        except TooManyBadRecords as e:
            # Not raised here: a runner would retry this unit, and stop the others.
            logging.error("%s", e)
            yield str(e)

    def _load(self) -> TeacherPredictor | ExportedModel:
        return predict.load_teacher(predict.resolve(self._prediction))


def _select(refused: list[str], selection: SelectConfig) -> list[int]:
    """Selects from all predictions; returns the shards to write.

    Raises:
      TooManyBadRecords: of the first shard with too many.
    """
    if refused:
        raise TooManyBadRecords(min(refused))
    select(selection)
    return index.shards(selection)


# An error of this package in the last lines of another process's traceback.
_OURS = re.compile(r"^efficientnet_ns[\w.]*: (.*?)(?: \[while running '|\Z)", re.M | re.S)


@contextlib.contextmanager
def _errors_of_workers() -> Iterator[None]:
    """Raises the message of our code from an error that another process sent as text."""
    try:
        yield
    except Exception as e:  # Every runner has its own type.
        found = _OURS.search(str(e))
        # Raised in this process, it has its own type.
        if type(e).__module__.startswith("efficientnet_ns") or found is None:
            raise
        raise StepFailed(found[1].strip()) from e
