"""Filter and balance pseudo labels: predictions → statistics → selection → balanced records.

One call handles all shards. Scripts that call it once per shard, with --shard_id, produce the same
files: the first call computes statistics and selection; each call writes the records of its shard.
"""

from __future__ import annotations

import json

from efficientnet_ns import config
from efficientnet_ns.config import FilterConfig, SelectConfig


def main(selection: SelectConfig, options: FilterConfig) -> None:
    from efficientnet_ns.loop import labeling

    print(json.dumps(labeling.select_and_write(selection, options)))


if __name__ == "__main__":
    config.run(main, SelectConfig, FilterConfig)
