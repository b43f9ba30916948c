"""Images into records: `python -m efficientnet_ns.make_records --source=photos --output_dir=data`."""

from __future__ import annotations

import json

from absl import flags

from efficientnet_ns import config
from efficientnet_ns.config.ingest import MakeConfig


def main(argv: list[str]) -> None:
    config.no_arguments(argv)
    settings = config.from_flags(MakeConfig, flags.FLAGS)
    # TensorFlow is loaded here, after --help and wrong flags have been answered.
    from efficientnet_ns.ingest import data_source

    print(json.dumps(data_source.make_records(settings)))


def run() -> None:
    """The command line."""
    config.define_flags(MakeConfig)
    config.run(main)


if __name__ == "__main__":
    run()
