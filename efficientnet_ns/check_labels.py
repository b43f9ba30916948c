"""Labeled images whose label is probably wrong, by predictions that did not learn from it.

Predictions are those of `main --mode=predict` or `import_predictions` for the labeled records. Writes
report.html with pictures and doubtful.csv, the most doubtful first, below --output_dir.
"""

from __future__ import annotations

import json

from efficientnet_ns import config
from efficientnet_ns.config import LabelsConfig


def main(options: LabelsConfig) -> None:
    from efficientnet_ns.pseudo_labels import doubtful_labels

    print(json.dumps(doubtful_labels.check_labels(options)))


if __name__ == "__main__":
    config.run(main, LabelsConfig)
