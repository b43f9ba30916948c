"""Labeling on a Ray cluster: the files of the ordinary commands, whatever becomes of its nodes."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE

import numpy as np
import pytest
from unlabeled_sets import (
    CLASSES,
    contents,
    corrupt,
    pipeline_stages,
    png,
    save_teacher,
    write_shards,
)

from efficientnet_ns.config import Config, ConfigError, RayConfig, SelectConfig
from efficientnet_ns.files import shard_names, tfexamples
from efficientnet_ns.files.errors import DataError
from efficientnet_ns.pseudo_labels import predict, write
from efficientnet_ns.pseudo_labels.label_shard import TooManyBadRecords
from efficientnet_ns.pseudo_labels.selection import select

ROOT = Path(__file__).parents[2]
SHARDS = 64
# A quarter of a gigabyte is what a node asks for, and more than is needed.
NODE = {"num_cpus": 1, "resources": {"teacher": 1}, "object_store_memory": 80 * 2**20}


@pytest.fixture(scope="module")
def ray_cluster():
    pytest.importorskip("ray")
    from efficientnet_ns.pseudo_labels import ray_cluster

    return ray_cluster


@pytest.fixture(scope="module")
def cluster(ray_cluster) -> Iterator:
    """Three nodes with a place for one actor each."""
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args=NODE)
    try:
        for _ in range(2):
            nodes.add_node(**NODE)
        yield nodes
    finally:
        nodes.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A teacher, and 64 shards of which one has a damaged record."""
    path = tmp_path_factory.mktemp("ray")
    rng = np.random.default_rng(0)
    save_teacher(path / "teacher", CLASSES, seed=1)
    sizes = rng.integers(5, 60, SHARDS)
    payloads = [[tfexamples.unlabeled_example(png(rng)) for _ in range(n)] for n in sizes]
    write_shards(path / "unlabeled", payloads)
    corrupt(path / "unlabeled" / shard_names.shard_name("extra", 1, SHARDS), np.array([4]))
    return path


def stages(folder: Path, work: Path, **values) -> tuple[Config, SelectConfig]:
    return pipeline_stages(folder, work, SHARDS, **values)


def pool(cluster, **values) -> RayConfig:
    own = {"cpus_per_actor": 0.5, "resources_per_actor": "teacher=1", **values}
    return RayConfig(ray_address=cluster.address, **own)


@pytest.fixture(scope="module")
def ordinary(folder) -> Path:
    """What the ordinary functions make."""
    work = folder / "ordinary"
    prediction, selection = stages(folder, work)
    predict.predict(prediction.override(shard_id="auto"))
    select(selection)
    write.write(selection)
    return work


def command(folder: Path, work: Path, cluster) -> list[str]:
    prediction, selection = stages(folder, work)
    own = ("predict_ckpt_path", "num_shards", "file_prefix", "max_bad_fraction")
    chosen = dataclasses.asdict(prediction.predict)
    flags = [f"--{name}={chosen[name]}" for name in own]
    flags += ["--model_name=efficientnet-test", f"--task_name={folder}/task_{CLASSES}.json"]
    flags += [f"--unlabel_data_dir={folder}/unlabeled", "--eval_batch_size=4", "--part_seconds=0"]
    flags += [f"--work_dir={work}", f"--num_image={selection.num_image}"]
    flags += [f"--min_threshold={selection.min_threshold}"]
    flags += [f"--{name}={value}" for name, value in dataclasses.asdict(pool(cluster)).items()]
    return [sys.executable, "-m", "efficientnet_ns.label_ray", *flags]


@pytest.mark.slow
def test_a_node_is_killed_and_one_joins(cluster, folder, ordinary, tmp_path):
    """The files are those of the ordinary commands, and a second run does nothing again."""
    finished = lambda: len(list(tmp_path.glob("predictions/*.manifest.json")))  # noqa: E731
    line = command(folder, tmp_path, cluster)
    started = subprocess.Popen(line, cwd=ROOT, stdout=PIPE, stderr=open("/tmp/raywork/err.log","w"), text=True)
    while finished() < 8 and started.poll() is None:
        time.sleep(0.02)
    cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
    cluster.add_node(**NODE)
    assert finished() < SHARDS
    out, err = started.communicate()
    err = open("/tmp/raywork/err.log").read()
    assert started.returncode == 0, err
    assert contents(tmp_path) == contents(ordinary)
    result = json.loads(out)
    assert result["unreadable"] == 1 and result["records"] == CLASSES * 20
    assert "an actor was lost at shard" in err
