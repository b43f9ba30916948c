"""Labels, selects and writes balanced records on a Ray cluster, one task per shard.

Actors hold the teacher; --cpus_per_actor, --gpus_per_actor and --resources_per_actor say what each
needs, and Ray places them. Those that join later work too; the shard of a lost one is labeled by
another. The files are those that `main --mode=predict` and `filter_unlabel` make; finished shards are
skipped, so the same command continues a stopped run. Needs: pip install 'efficientnet-ns[ray]'.
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
