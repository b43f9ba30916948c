"""Measure speed beside that of peers, in one run: `python -m efficientnet_ns.benchmark --what=…`.

Peers that are not installed are left out, and named.
"""

from __future__ import annotations

import importlib

from absl import flags

from efficientnet_ns import config
from efficientnet_ns.config import BenchmarkConfig

# --what → module with `run(BenchmarkConfig) -> list[tables.Row]`.
BENCHMARKS = {
    "input": "inputs",
    "train": "training",
    "predict": "labeling",
    "select": "selection",
    "serving": "serving",
}


def main(argv: list[str]) -> None:
    config.no_arguments(argv)
    settings = config.from_flags(BenchmarkConfig, flags.FLAGS)
    from efficientnet_ns.benchmarks import tables

    module = importlib.import_module(f"efficientnet_ns.benchmarks.{BENCHMARKS[flags.FLAGS.what]}")
    rows = module.run(settings)
    print(tables.format_rows(rows))
    if settings.json_file:
        from efficientnet_ns.files import json_files

        json_files.write_json(settings.json_file, tables.as_json(rows), indent=1)


def run() -> None:
    """The command line."""
    flags.DEFINE_enum("what", None, sorted(BENCHMARKS), "What to measure.", required=True)
    config.define_flags(BenchmarkConfig)
    config.run(main)


if __name__ == "__main__":
    run()
