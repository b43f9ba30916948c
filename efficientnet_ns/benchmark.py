"""Compare speed with that of peers, in one run: `python -m efficientnet_ns.benchmark --what=…`.

Peers that are not installed are left out, and named.
"""

from __future__ import annotations

from efficientnet_ns import config
from efficientnet_ns.config import BenchmarkConfig


def main(options: BenchmarkConfig) -> None:
    from efficientnet_ns.benchmarks import registry

    print(registry.run(options))


if __name__ == "__main__":
    config.run(main, BenchmarkConfig)
