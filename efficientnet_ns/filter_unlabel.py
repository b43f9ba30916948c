"""Statistics → selection → balanced pseudo-labeled records, from predictions.

One call does all shards. Scripts that call it once per shard, with --shard_id, end in the same
files: the first call makes statistics and selection, each writes the records of its shard.
"""

from __future__ import annotations

import json

from absl import flags

from efficientnet_ns import config


def main(argv: list[str]) -> None:
    config.no_arguments(argv)
    settings = config.from_flags(config.SelectConfig, flags.FLAGS)
    for name in ("input_dir", "prediction_dir", "prelim_stats_dir", "output_dir"):
        if not getattr(settings, name):
            raise config.ConfigError(f"--{name} is needed")
    report = flags.FLAGS.report
    if report and settings.only_get_stats:
        raise config.ConfigError("--report shows a selection: leave --only_get_stats out")
    from efficientnet_ns.pseudo_labels import index, run_report, write
    from efficientnet_ns.pseudo_labels.selection import select

    result = select(settings)
    # Of the tasks that share a shard, the first writes its records.
    if not settings.only_get_stats and (settings.total_replicas == 1 or settings.task < 1):
        one = flags.FLAGS["shard_id"].present
        shards = [settings.shard_id] if one else index.shards(settings)
        result = {**result, **write.write(settings, shards)}
    if report:
        result = {**result, "report": run_report.write_report(settings)}
    print(json.dumps(result))


def run() -> None:
    """The command line."""
    config.define_flags(config.SelectConfig)
    flags.DEFINE_bool("report", False, "Write report.html, as labeling_report does, at the end.")
    config.run(main)


if __name__ == "__main__":
    run()
