"""Convert SVHN's .mat files to records, like the original program of this name."""

from __future__ import annotations

import json

from efficientnet_ns import config
from efficientnet_ns.config import SvhnConfig


def main(options: SvhnConfig) -> None:
    from efficientnet_ns.ingest import svhn

    print(json.dumps(svhn.make_records(options)))


if __name__ == "__main__":
    config.run(main, SvhnConfig)
