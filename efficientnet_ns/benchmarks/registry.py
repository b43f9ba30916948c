"""Runs the measurements of `benchmark.py`, and formats and writes their results."""

from __future__ import annotations

import importlib

from efficientnet_ns.benchmarks import tables
from efficientnet_ns.config import BenchmarkConfig, ConfigError
from efficientnet_ns.files import json_files

# --what → module with `run(BenchmarkConfig) -> list[tables.Row]`. Modules are imported only when
# selected, because each requires different peers.
_MODULES = {
    "input": "inputs",
    "train": "training",
    "predict": "labeling",
    "select": "selection",
    "copies": "copies",
    "serving": "serving",
    "scale": "scale",
    "compiled": "compiled",
}


def run(options: BenchmarkConfig) -> str:
    """Measures `options.what`, returns the table and writes the results to any `json_file`.

    Raises:
      ConfigError: If `what` is not given or another setting does not fit.
    """
    if not options.what:
        raise ConfigError(f"--what is required: one of {', '.join(_MODULES)}")
    module = importlib.import_module(f"efficientnet_ns.benchmarks.{_MODULES[options.what]}")
    rows, machine = module.run(options), tables.machine()
    if options.json_file:
        found = {"machine": machine, "rows": tables.as_json(rows)}
        json_files.write_json(options.json_file, found, indent=1)
    return f"{machine}\n{tables.format_rows(rows)}"
