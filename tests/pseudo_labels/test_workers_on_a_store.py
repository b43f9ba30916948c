"""Machines share a set's shards on a slow, busy object store, and some die."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import unlabeled_sets

from efficientnet_ns.files import shard_names, tfexamples, tfrecords

ROOT = Path(__file__).parents[2]
RECORDS, GROUP = 10, 4

# Acts as a separate machine in its leases and temporary names.
WORKER = """
import hashlib, json, socket, sys
import numpy as np

socket.gethostname = lambda: sys.argv[2]
from efficientnet_ns.config import Config
from efficientnet_ns.pseudo_labels import predict

class Engine:
    name, batch_size, concurrency = "fake", 4, 2

class Teacher:
    engine, group = Engine, 4

    def label(self, images):
        digests = [np.frombuffer(hashlib.sha256(image).digest()[:3], np.uint8) for image in images]
        values = np.array(digests, np.float32).reshape(-1, 3) + 1
        return values / values.sum(1, keepdims=True), {}

predict.predict(Config().override(**json.loads(sys.argv[1])), Teacher())
"""
# Kills while saving a part, between the files of an output, and during cleanup.
KILLS = (
    {"pattern": r"upload .*/\.part-", "skip": 1},
    {"pattern": r"upload .*manifest\.json", "after": True},
    {"pattern": r"copy .*/index-", "after": True},
    {"pattern": r"delete .*/\.part-", "skip": 1},
)


def probabilities(image: bytes) -> np.ndarray:
    values = np.frombuffer(hashlib.sha256(image).digest()[:3], np.uint8).astype(np.float32) + 1
    return values / values.sum()


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "shards", "kills"), [(3, 6, 1), (16, 64, 4)])
def test_nothing_is_lost_and_nothing_is_left(store, bucket, tmp_path, rng, workers, shards, kills):
    images = [[unlabeled_sets.png(rng) for _ in range(RECORDS)] for _ in range(shards)]
    for shard, some in enumerate(images):
        frames = [tfrecords.frame(tfexamples.unlabeled_example(image)) for image in some]
        name = shard_names.shard_name("extra", shard, shards)
        store.put(bucket, f"unlabeled/{name}", b"".join(frames))
    unlabeled_sets.save_teacher(tmp_path / "model.ckpt-1", unlabeled_sets.CLASSES, 0)
    for path in tmp_path.glob("model.ckpt-1.*"):
        store.put(bucket, f"teacher/{path.name}", path.read_bytes())
    root = f"gs://{bucket}"
    settings = {
        "model_name": "efficientnet-test",
        "task_name": str(tmp_path / f"task_{unlabeled_sets.CLASSES}.json"),
        "predict_ckpt_path": f"{root}/teacher/model.ckpt-1",
        "unlabel_data_dir": f"{root}/unlabeled",
        "output_dir": f"{root}/predictions",
        "shard_id": "auto",
        "part_seconds": 0.0,
        "lease_seconds": 15.0,
    }
    store.delay(0.03)
    for i in range(30):
        store.fail("(get|stat|list|start|upload|copy|delete) ", code=429, skip=50 * (i + 1))
    running = {}
    for number in range(workers):
        client = f"worker{number}"
        if number < kills:
            store.fail(**KILLS[number], client=client)
        with (tmp_path / f"{client}.log").open("w") as log:
            command = [sys.executable, "-c", WORKER, json.dumps(settings), client]
            environment = {**os.environ, **store.environment(client), "TF_CPP_MIN_LOG_LEVEL": "3"}
            running[client] = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=log
            )
        store.watch(client, running[client].pid)
    codes = {client: process.wait(900) for client, process in running.items()}
    logs = {client: (tmp_path / f"{client}.log").read_text()[-2000:] for client in running}
    assert codes == {f"worker{number}": -9 if number < kills else 0 for number in range(workers)}, (
        logs
    )
    names = store.names(bucket, "predictions/")
    assert [name for name in names if "/." in name] == []
    assert len(names) == 4 * shards + 1  # Four files per shard, and the task.
    for shard, some in enumerate(images):
        name = shard_names.prediction_name(shard, shards, 0)
        expected = tfexamples.prediction_examples(np.stack([probabilities(i) for i in some]))
        assert store.content(bucket, f"predictions/{name}") == b"".join(
            map(tfrecords.frame, expected)
        )
