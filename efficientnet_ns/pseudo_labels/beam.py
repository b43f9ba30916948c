"""Labeling, selection and writing as one Apache Beam pipeline (Dataflow, Flink, Spark, one machine).

  shards not yet predicted ─► predict ─► (all are there) ─► select ─► shards ─► write

The steps call what the ordinary commands call: `predict.predict` and `write.write_shards` for one
shard, `selection.select` once, since one machine selects from 300 million images in a minute. So the
files are the same to the last byte, finished shards are skipped, and a bundle that a runner starts
again, or twice, does no harm. The steps share only files: all workers must see the folders.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence

from absl import logging

from efficientnet_ns.config import Config, ConfigError, SelectConfig
from efficientnet_ns.inference.teacher import TeacherPredictor
from efficientnet_ns.pseudo_labels import index, predict, write
from efficientnet_ns.pseudo_labels.label_shard import TooManyBadRecords
from efficientnet_ns.pseudo_labels.selection import select
from efficientnet_ns.resolve.resolved_config import ResolvedConfig

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
    """A worker met an error that the user can mend, such as unusable data, or was cancelled."""


def label(
    prediction: Config, selection: SelectConfig, beam_arguments: Sequence[str] = ()
) -> dict[str, object]:
    """Labels all shards, selects, and writes the balanced records; what is finished is skipped.

    Args:
      prediction: of all `num_shards` shards by all `total_replicas` workers, whatever its shard_id
        and worker_id.
      selection: from these predictions.
      beam_arguments: of Beam's PipelineOptions, such as `--runner=DataflowRunner`.

    Returns:
      What `selection.select` and `write.write` return, and `unreadable` images.

    Raises:
      ConfigError, DataError, manifests.OutputConflict: see `predict.predict`; what is
        there already is looked at before the pipeline starts.
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
    # All is finished: these verify it and sum it up.
    unreadable = sum(predict.predict(part)["unreadable"] for part in parts)
    return {"unreadable": unreadable, **select(selection), **write.write(selection)}


def _parts(prediction: Config) -> list[Config]:
    """All shards, by each worker."""
    options = prediction.predict
    if options.reassign_label:
        raise ConfigError("--reassign_label: there is nothing to select; use main --mode=predict")
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
    # A reshuffle spreads what came from one place over the workers. A combination has one element,
    # and that only when all before it is finished.
    refused = (
        pipeline
        | "units" >> apache_beam.Create(list(units))
        | "spread units" >> apache_beam.Reshuffle()
        | "predict" >> apache_beam.ParDo(_Predict(prediction))
        | "all predicted" >> apache_beam.combiners.ToList()
    )
    (
        refused
        | "select" >> apache_beam.ParDo(_Select(selection))
        | "spread shards" >> apache_beam.Reshuffle()
        | "write" >> apache_beam.ParDo(_Write(selection))
    )


class _Predict(apache_beam.DoFn):
    """Labels (worker, shard); yields why, when its records are too bad, and else nothing.

    The model is loaded when there is work for it, once for all threads of a process.
    """

    def __init__(self, prediction: Config):
        self._prediction, self._shared = prediction, Shared()
        self._teacher: TeacherPredictor | None = None

    def process(self, unit: tuple[int, int]) -> Iterator[str]:
        worker, shard = unit
        part = self._prediction.override(worker_id=worker, shard_id=str(shard))
        if self._teacher is None:
            self._teacher = self._shared.acquire(self._load)
        try:
            predict.predict(part, self._teacher)
        except TooManyBadRecords as e:
            # The others go on; a runner would start this one again and again.
            logging.error("%s", e)
            yield str(e)

    def _load(self) -> TeacherPredictor:
        resolved = ResolvedConfig.from_config(self._prediction)
        return TeacherPredictor(resolved, self._prediction.predict.predict_ckpt_path)


class _Select(apache_beam.DoFn):
    """Selects from all predictions; yields the shards to write.

    Raises:
      TooManyBadRecords: of the first shard that was refused.
    """

    def __init__(self, selection: SelectConfig):
        self._selection = selection

    def process(self, refused: list[str]) -> Iterator[int]:
        if refused:
            raise TooManyBadRecords(min(refused))
        select(self._selection)
        yield from index.shards(self._selection)


class _Write(apache_beam.DoFn):
    """Writes the balanced records of a shard."""

    def __init__(self, selection: SelectConfig):
        self._selection = selection

    def process(self, shard: int) -> None:
        write.write_shards(self._selection, [shard])


# An error of this package as the last lines of another process's traceback.
_OURS = re.compile(r"^efficientnet_ns[\w.]*: (.*?)(?: \[while running '|\Z)", re.M | re.S)


@contextlib.contextmanager
def _errors_of_workers() -> Iterator[None]:
    """Of an error that came as text from another process, raises what our code said."""
    try:
        yield
    except Exception as e:  # Every runner has its own.
        found = _OURS.search(str(e))
        if type(e).__module__.startswith("efficientnet_ns") or found is None:
            raise
        raise StepFailed(found[1].strip()) from e
