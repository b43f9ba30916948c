"""Find leaks and duplicates among evaluation, labeled and unlabeled images.

Writes to --output_dir: report.html with pairs of pictures, copies.csv, and exclude.csv for
`filter_unlabel --exclude`. With --prediction_dir, fingerprints are read from the index that
labeling wrote.
"""

from __future__ import annotations

import json

from efficientnet_ns import config
from efficientnet_ns.config import CheckConfig


def main(options: CheckConfig) -> None:
    from efficientnet_ns.hygiene import check_data

    print(json.dumps(check_data.check_data(options)))


if __name__ == "__main__":
    config.run(main, CheckConfig)
