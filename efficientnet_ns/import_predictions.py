"""Import predictions of any model for unlabeled records, to filter and train on.

`--source` is a .parquet, .npy, .npz, .csv or .jsonl file of probabilities or logits, or a folder of
such files; separate several teachers with ';'. Rows are matched to records by position, file name or
a hash of the image; see `--key`.
"""

from __future__ import annotations

import json

from efficientnet_ns import config
from efficientnet_ns.config import ImportConfig


def main(options: ImportConfig) -> None:
    from efficientnet_ns.imported.import_predictions import import_predictions

    print(json.dumps(import_predictions(options)))


if __name__ == "__main__":
    config.run(main, ImportConfig)
