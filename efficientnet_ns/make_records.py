"""Convert images to records: `python -m efficientnet_ns.make_records --source=photos --output_dir=data`."""

from __future__ import annotations

import json

from efficientnet_ns import config
from efficientnet_ns.config import MakeConfig


def main(options: MakeConfig) -> None:
    from efficientnet_ns.ingest import data_source

    print(json.dumps(data_source.make_records(options)))


if __name__ == "__main__":
    config.run(main, MakeConfig)
