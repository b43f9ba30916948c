"""Label, select and write balanced records in one Apache Beam pipeline: FLAGS -- BEAM_OPTIONS.

Arguments after `--` are passed to Beam: --runner=DirectRunner (this machine, the default),
DataflowRunner, FlinkRunner, SparkRunner and their options. The files are those that `main
--mode=predict` and `filter_unlabel` write; finished shards are skipped, so the same command
continues a stopped run. Requires: pip install 'efficientnet-ns[beam]'.
"""

from __future__ import annotations

import json

from efficientnet_ns import config
from efficientnet_ns.config import Config, PipelineConfig


def main(settings: Config, job: PipelineConfig, beam_options: list[str]) -> None:
    from efficientnet_ns.loop import labeling

    print(json.dumps(labeling.label_on_beam(settings, job, beam_options)))


if __name__ == "__main__":
    config.run(main, Config, PipelineConfig, words=True)
