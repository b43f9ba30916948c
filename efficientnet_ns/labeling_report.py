"""`report.html` of a labeling run, from its predictions and its selection."""

from __future__ import annotations

import dataclasses

from absl import flags

from efficientnet_ns import config
from efficientnet_ns.config import Settings, setting


@dataclasses.dataclass(frozen=True)
class ReportConfig(Settings):
    """What the report shows; where the run is, SelectConfig says."""

    report_path: str = setting("", "File to write; default: report.html in output_dir.")
    previous_prediction_dir: str = setting(
        "", "Predictions of an earlier round for the same images, to compare labels with."
    )
    truth: str = setting(
        "",
        "True labels: a CSV or Parquet file with the columns shard, record and label (0-based; -1: "
        "of no class), or `records`: the image/class/label of the unlabeled records.",
    )
    class_names: str = setting("", "Text file with the name of a class per line.")
    report_classes: int = setting(
        10, "Worst covered, best covered and other classes whose pictures are shown.", low=0
    )
    report_shards: int = setting(4, "Shards that pictures are taken from.", low=1)


def report_options(settings: ReportConfig):
    """The settings as the report takes them."""
    import tensorflow as tf

    from efficientnet_ns.pseudo_labels import run_report

    names = None
    if settings.class_names:
        with tf.io.gfile.GFile(settings.class_names) as f:
            names = f.read().splitlines()
    return run_report.Options(
        truth=settings.truth or None,
        previous_dir=settings.previous_prediction_dir,
        class_names=names,
        classes=settings.report_classes,
        picture_shards=settings.report_shards,
    )


def main(argv: list[str]) -> None:
    config.no_arguments(argv)
    selection = config.from_flags(config.SelectConfig, flags.FLAGS)
    settings = config.from_flags(ReportConfig, flags.FLAGS)
    for name in ("input_dir", "prediction_dir", "output_dir"):
        if not getattr(selection, name):
            raise config.ConfigError(f"--{name} is needed")
    from efficientnet_ns.pseudo_labels import run_report

    print(run_report.write_report(selection, report_options(settings), settings.report_path))


def run() -> None:
    """The command line."""
    config.define_flags(config.SelectConfig)
    config.define_flags(ReportConfig)
    config.run(main)


if __name__ == "__main__":
    run()
