"""Statistics → selection → balanced pseudo-labeled records, from predictions."""

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
    from efficientnet_ns.labeling import select, write

    result = select.select(settings)
    if not settings.only_get_stats:
        result = {**result, **write.write(settings)}
    print(json.dumps(result))


def run() -> None:
    """The command line."""
    config.define_flags(config.SelectConfig)
    config.run(main)


if __name__ == "__main__":
    run()
