"""Label, select and write balanced records on a Ray cluster, one task per shard.

Each actor holds the teacher; --cpus_per_actor, --gpus_per_actor and --resources_per_actor set what
it reserves. Ray places the actors. Actors may join later; another actor labels the shard of a lost
one. The files are those that `main --mode=predict` and `filter_unlabel` write; finished shards are
skipped, so the same command continues a stopped run. Requires: pip install 'efficientnet-ns[ray]'.
"""

from __future__ import annotations

import json

from efficientnet_ns import config
from efficientnet_ns.config import Config, PipelineConfig, RayConfig


def main(settings: Config, job: PipelineConfig, pool: RayConfig) -> None:
    from efficientnet_ns.loop import labeling

    print(json.dumps(labeling.label_on_ray(settings, job, pool)))


if __name__ == "__main__":
    config.run(main, Config, PipelineConfig, RayConfig)
