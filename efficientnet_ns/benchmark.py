"""Compare speed with other implementations: `python -m efficientnet_ns.benchmark --what=…`.

Libraries that are not installed are skipped with a warning.
"""

from __future__ import annotations

from efficientnet_ns import config
from efficientnet_ns.config import BenchmarkConfig


def main(options: BenchmarkConfig) -> None:
    from efficientnet_ns.benchmarks import registry

    print(registry.run(options))


if __name__ == "__main__":
    config.run(main, BenchmarkConfig)
