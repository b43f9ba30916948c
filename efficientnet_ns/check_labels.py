"""Find labels that are probably wrong, from predictions of a model that was not trained on them.

Predictions for the labeled records come from `main --mode=predict` or `import_predictions`. Writes
report.html with pictures, and doubtful.csv, to --output_dir, the most doubtful first.
"""

from __future__ import annotations

import json

from efficientnet_ns import config
from efficientnet_ns.config import LabelsConfig


def main(options: LabelsConfig) -> None:
    from efficientnet_ns.hygiene import doubtful_labels

    print(json.dumps(doubtful_labels.check_labels(options)))


if __name__ == "__main__":
    config.run(main, LabelsConfig)
