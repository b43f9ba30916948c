"""Labels, selects and writes balanced records as one Apache Beam pipeline: FLAGS -- BEAM_OPTIONS.

What stands behind `--` goes to Beam: --runner=DirectRunner (this machine, the default),
DataflowRunner, FlinkRunner, SparkRunner and their options. The files are those that `main
--mode=predict` and `filter_unlabel` make; finished shards are skipped, so the same command
continues what was stopped. Needs: pip install 'efficientnet-ns[beam]'.
"""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Any

from absl import flags

from efficientnet_ns import config
from efficientnet_ns.config import Config, ConfigError, SelectConfig, Settings, setting


def _of_selection(name: str) -> Any:
    """The setting that filter_unlabel has under that name."""
    field = SelectConfig.__dataclass_fields__[name]
    return dataclasses.field(default=field.default, metadata=field.metadata)


@dataclasses.dataclass(frozen=True)
class BeamConfig(Settings):
    """Where the job works, and what it selects."""

    work_dir: str = setting(
        "",
        "Folder for `predictions`, `info`, `statistics` and `selected`; all workers must see it.",
    )
    selection: str = _of_selection("selection")
    num_image: int = _of_selection("num_image")
    min_threshold: float = _of_selection("min_threshold")
    max_prob: float = _of_selection("max_prob")
    upsample: int = _of_selection("upsample")
    use_top: int = _of_selection("use_top")
    use_all: bool = _of_selection("use_all")
    num_samples: int = _of_selection("num_samples")


def stages(settings: Config, job: BeamConfig) -> tuple[Config, SelectConfig]:
    """The settings of the prediction and of the selection."""
    from efficientnet_ns.resolve.resolved_config import ResolvedConfig

    folder = {
        name: os.path.join(job.work_dir, name)
        for name in ("predictions", "info", "statistics", "selected")
    }
    prediction = settings.override(output_dir=folder["predictions"], info_dir=folder["info"])
    selection = SelectConfig(
        input_dir=settings.data.unlabel_data_dir or "",
        prediction_dir=folder["predictions"],
        info_dir=folder["info"],
        prelim_stats_dir=folder["statistics"],
        output_dir=folder["selected"],
        num_shards=settings.predict.num_shards,
        file_prefix=settings.predict.file_prefix,
        num_label_classes=ResolvedConfig.from_config(settings).num_classes,
        seed=settings.train.seed,
        **{k: v for k, v in dataclasses.asdict(job).items() if k != "work_dir"},
    )
    return prediction, selection


def _check_no_part_is_asked_for(settings: Config) -> None:
    """ConfigError for flags of main that would change nothing here."""
    for name in ("output_dir", "info_dir", "worker_id"):
        if flags.FLAGS[name].present:
            raise ConfigError(
                f"--{name}: folders are below --work_dir, and all workers' parts done"
            )
    options = settings.predict
    shards = config.shard_list(options.shard_id, options.num_shards)
    if flags.FLAGS["shard_id"].present and len(shards) < options.num_shards:
        raise ConfigError(
            f"--shard_id={options.shard_id}: leave it out, all {options.num_shards} are labeled"
        )


def main(argv: list[str]) -> None:
    if argv[1:] and not argv[1].startswith("-"):
        config.no_arguments(argv)
    settings = config.from_flags(Config, flags.FLAGS)
    job = config.from_flags(BeamConfig, flags.FLAGS)
    if not (job.work_dir and settings.data.unlabel_data_dir):
        raise ConfigError("--work_dir and --unlabel_data_dir are needed")
    _check_no_part_is_asked_for(settings)
    from efficientnet_ns.pseudo_labels import beam

    print(json.dumps(beam.label(*stages(settings, job), argv[1:])))


def run() -> None:
    """The command line."""
    config.define_flags(Config)
    config.define_flags(BeamConfig)
    config.run(main)


if __name__ == "__main__":
    run()
