"""SVHN's .mat files into records, as the original's program of this name."""

from __future__ import annotations

import json

from absl import flags

from efficientnet_ns import config
from efficientnet_ns.config.ingest import SvhnConfig


def main(argv: list[str]) -> None:
    config.no_arguments(argv)
    settings = config.from_flags(SvhnConfig, flags.FLAGS)
    for name in ("raw_data_dir", "output_dir"):
        if not getattr(settings, name):
            raise config.ConfigError(f"--{name} is needed")
    from efficientnet_ns.ingest import svhn

    print(json.dumps(svhn.make_records(settings)))


def run() -> None:
    """The command line."""
    config.define_flags(SvhnConfig)
    config.run(main)


if __name__ == "__main__":
    run()
