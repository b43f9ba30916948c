"""Labeling, selection and writing as one Apache Beam pipeline (Dataflow, Flink, Spark, one machine).

  shards not yet predicted ─► predict ─► (all predicted) ─► select ─► shards ─► write

The steps call the functions of `whole_set`: labeling and writing per shard, selection only once,
because one machine selects from 300 million images in a minute. A runner may retry or duplicate a
bundle. The steps share only files, so all workers must have access to the folders.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence

from efficientnet_ns.config import Config, ConfigError, SelectConfig
from efficientnet_ns.pipelines import whole_set
from efficientnet_ns.pipelines.whole_set import StepFailed
from efficientnet_ns.pseudo_labels import write

try:
    import apache_beam
    from apache_beam.metrics import Metrics
    from apache_beam.options.pipeline_options import PipelineOptions
    from apache_beam.runners.runner import PipelineState
    from apache_beam.utils.shared import Shared
except ImportError as e:
    raise ConfigError(
        f"Apache Beam cannot be imported ({e}): pip install 'efficientnet-ns[beam]', or in a clone "
        "pip install -r requirements-beam.txt"
    ) from e


def label(
    prediction: Config, selection: SelectConfig, beam_arguments: Sequence[str] = ()
) -> dict[str, object]:
    """Labels all shards, selects, and writes the balanced records; skips finished work.

    Args:
      prediction: see `whole_set.unfinished`.
      selection: settings of the selection from these predictions.
      beam_arguments: arguments of Beam's PipelineOptions, such as `--runner=DataflowRunner`.

    Returns:
      See `whole_set.finish`.

    Raises:
      ConfigError, DataError, manifests.OutputConflict: See `predict.predict`; existing
        outputs are checked before the pipeline starts.
      StepFailed: If one of these errors, or one of `selection.select` or `write.write`, occurs in
        another process.
    """
    units = whole_set.unfinished(prediction, selection)
    options = PipelineOptions(list(beam_arguments))
    with _errors_of_workers(), apache_beam.Pipeline(options=options) as pipeline:
        _build(pipeline, units, prediction, selection)
    if pipeline.result.state != PipelineState.DONE:
        raise StepFailed(
            f"the pipeline ended as {pipeline.result.state}: start the same command again"
        )
    return whole_set.finish(prediction, selection)


def _build(
    pipeline: apache_beam.Pipeline,
    units: Sequence[whole_set.Unit],
    prediction: Config,
    selection: SelectConfig,
) -> None:
    """Adds the steps to the pipeline."""
    # A reshuffle distributes elements created in one place over the workers. The combined list is one
    # element, available only after every unit is finished, so it acts as a barrier.
    refused = (
        pipeline
        | "units" >> apache_beam.Create(list(units))
        | "spread units" >> apache_beam.Reshuffle()
        | "predict" >> apache_beam.ParDo(_Predict(prediction))
        | "all predicted" >> apache_beam.combiners.ToList()
    )
    (
        refused
        | "select" >> apache_beam.Map(whole_set.select_shards, selection)
        | "groups" >> apache_beam.FlatMap(whole_set.groups)
        | "spread shards" >> apache_beam.Reshuffle()
        | "write" >> apache_beam.Map(lambda shards: write.write_shards(selection, shards))
    )


class _Predict(apache_beam.DoFn):
    """Labels a unit; yields what `whole_set.label` returns.

    Loads the model for the first unit, once for all threads of a process. Beam's counters include all
    computed work, see `inference.meter`; the work of a failed bundle is counted with another bundle.
    """

    def __init__(self, prediction: Config):
        self._prediction, self._shared = prediction, Shared()
        self._teacher: whole_set.Teacher | None = None

    def process(self, unit: whole_set.Unit) -> Iterator[str]:
        if self._teacher is None:
            # Not in `setup`, which Beam calls before there is a unit.
            self._teacher = self._shared.acquire(lambda: whole_set.load_teacher(self._prediction))
        yield whole_set.label(self._prediction, unit, self._teacher)
        for name, count in self._teacher.meter.take().items():
            Metrics.counter("efficientnet_ns", name).inc(count)


# An error of this package in the last lines of another process's traceback.
_OURS = re.compile(r"^efficientnet_ns[\w.]*: (.*?)(?: \[while running '|\Z)", re.M | re.S)


@contextlib.contextmanager
def _errors_of_workers() -> Iterator[None]:
    """Converts an error that another process sent as text to StepFailed with our code's message."""
    try:
        yield
    except Exception as e:  # Every runner has its own type.
        found = _OURS.search(str(e))
        # An error raised in this process has its own type.
        if type(e).__module__.startswith("efficientnet_ns") or found is None:
            raise
        raise StepFailed(found[1].strip()) from e
