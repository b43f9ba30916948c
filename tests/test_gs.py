"""The whole loop with all inputs and outputs on an object store, counted in requests and bytes.

Both counts are exact, so a change that reads twice or requests each file separately fails. They
exclude heartbeats, which depend on time, and TensorBoard's file, which a thread uploads.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections import Counter

import fakes
import gcs
import numpy as np
import pytest
import tensorflow as tf

from efficientnet_ns.config import Config, ExportConfig, FilterConfig, SelectConfig
from efficientnet_ns.config.ingest import MakeConfig
from efficientnet_ns.files import tfrecords
from efficientnet_ns.ingest import data_source
from efficientnet_ns.loop import labeling
from efficientnet_ns.models import checkpoint_files
from efficientnet_ns.pseudo_labels import predict
from efficientnet_ns.serving import model_export
from efficientnet_ns.training import train

LABELED, UNLABELED, SHARDS = 36, 24, 2
UNCOUNTED = (".lease-", "events.out")


class Run:
    """The requests of each stage, without those that vary."""

    def __init__(self, store, bucket: str):
        self.store, self.bucket, self.requests = store, bucket, {}

    def stage(self, name: str, function, *arguments) -> None:
        first = len(self.store.requests())
        function(*arguments)
        asked = self.store.requests(first)
        self.requests[name] = [r for r in asked if not any(part in r.name for part in UNCOUNTED)]

    def kinds(self, name: str) -> Counter:
        return Counter(request.kind for request in self.requests[name])

    def read(self, name: str, ending: str) -> int:
        """Returns the bytes that a stage read from files with this ending."""
        return sum(r.down for r in self.requests[name] if r.code < 300 and r.name.endswith(ending))

    def size(self, *prefixes: str, ending: str = "") -> int:
        names = [n for prefix in prefixes for n in self.store.names(self.bucket, prefix)]
        return sum(len(self.store.content(self.bucket, n)) for n in names if n.endswith(ending))


def training(root: str, model_dir: str, **values) -> Config:
    settings = {
        **fakes.loop_settings(fakes.ROOT),
        "unlabel_data_dir": "",
        "unlabel_ratio": 0.0,
        "model_name": "efficientnet-test",
        "label_data_dir": f"{root}/data",
        "task_name": f"{root}/data/task.json",
        "model_dir": f"{root}/{model_dir}",
        **values,
    }
    return Config().override(**settings)


def prediction(root: str, **values) -> Config:
    settings = {
        "model_dir": f"{root}/teacher",
        "unlabel_data_dir": f"{root}/unlabeled",
        "output_dir": f"{root}/predictions",
        "shard_id": "auto",
        "inference_engine": "tf",
        "eval_batch_size": 8,
        **values,
    }
    return Config().override(**settings)


class Unsure:
    """A teacher for which all classes are equally likely."""

    name, batch_size, concurrency, group = "unsure", 8, 1, 8

    def __init__(self):
        self.engine = self

    def label(self, images):
        return np.full([len(images), fakes.CLASSES], 1 / fakes.CLASSES, np.float32), {}


@pytest.fixture(scope="module")
def run(store, shared_students) -> Run:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in store.environment().items():
            patch.setenv(name, value)
        # Look every time; otherwise, the number of looks depends on timing.
        patch.setattr(predict, "_LOOK_SECONDS", -1)
        patch.setattr(predict, "_LOOK_TIMES", -1)
        store.create("loop")
        for i, image in enumerate(fakes.pictures(LABELED, 1)):
            store.put("loop", f"pictures/class{i % fakes.CLASSES}/{i:03d}.png", image)
        for i, image in enumerate(fakes.pictures(UNLABELED, 2)):
            store.put("loop", f"more/{i:03d}.png", image)
        run, root = Run(store, "loop"), "gs://loop"
        made = MakeConfig(num_shards=SHARDS, num_workers=1)
        make = data_source.make_records
        places = {"source": f"{root}/pictures", "output_dir": f"{root}/data"}
        labeled = dataclasses.replace(made, **places, validation_fraction=0.2)
        places = {"source": f"{root}/more", "output_dir": f"{root}/unlabeled"}
        unlabeled = dataclasses.replace(made, **places, labeled=False)
        run.stage("labeled", make, labeled)
        run.stage("unlabeled", make, unlabeled)
        run.stage("unlabeled again", make, unlabeled)
        teacher = training(root, "teacher")
        run.stage("train", train.train_and_evaluate, teacher)
        run.stage("train again", train.train_and_evaluate, teacher)
        run.stage("predict", predict.predict, prediction(root))
        run.stage("predict again", predict.predict, prediction(root))
        named = {"file_prefix": "extra", "num_shards": SHARDS, "output_dir": f"{root}/one"}
        one = prediction(root, shard_id="1", **named)
        run.stage("predict one shard", predict.predict, one, Unsure())
        run.stage("predict one shard again", predict.predict, one)
        selection = SelectConfig(
            unlabel_data_dir=f"{root}/unlabeled",
            prediction_dir=f"{root}/predictions",
            prelim_stats_dir=f"{root}/statistics",
            output_dir=f"{root}/selected",
            num_image=8,
            num_samples=2,
        )
        run.stage("filter", labeling.select_and_write, selection, FilterConfig())
        run.stage("filter again", labeling.select_and_write, selection, FilterConfig())
        options = ExportConfig(export_dir=f"{root}/export")
        run.stage("export", model_export.export_model, training(root, "teacher"), options)
        yield run


def test_nothing_temporary_is_left(run):
    left = [n for n in run.store.names(run.bucket) if "/." in n or "tempstate" in n]
    assert left == []


def test_every_record_is_there(run):
    counts = json.loads(run.store.content(run.bucket, "unlabeled/counts.json"))
    assert sum(one["records"] for one in counts.values()) == UNLABELED
    assert sum(tfrecords.count_all([f"gs://loop/selected/data/train-0-00000-of-0000{SHARDS}"])) > 0


# Maps stages to requests and the uploads among them. More of either costs time and money.
REQUESTS = {
    "labeled": (131, 11),
    "unlabeled": (75, 5),
    "unlabeled again": (35, 1),
    "predict": (180, 11),
    "predict again": (77, 0),
    "predict one shard": (121, 6),
    "predict one shard again": (70, 0),
    "filter": (223, 28),
    "filter again": (69, 2),
    "export": (128, 14),
}


@pytest.mark.parametrize("stage", REQUESTS)
def test_requests(run, stage):
    kinds = run.kinds(stage)
    assert (kinds.total(), kinds["upload"]) == REQUESTS[stage], kinds


def test_a_training_writes_each_file_once_per_checkpoint(run):
    asked = [r for r in run.requests["train"] if r.kind == "upload"]
    own = Counter(r.name.split("/")[1] for r in asked if "tempstate" not in r.name)
    assert own == {
        **dict.fromkeys(("config.json", "records.json", "task.json", "runs.jsonl"), 1),
        # At the start, before each of two checkpoints, and after the evaluation.
        "metrics.jsonl": 4,
        **dict.fromkeys(("model.json", "checkpoint"), 2),
    }
    saved = run.store.names(run.bucket, "teacher/model.ckpt-")
    assert len([r for r in asked if "tempstate" in r.name]) == len(saved) == 4


@pytest.mark.parametrize("stage", ["train again", "predict", "export"])
def test_a_checkpoint_is_read_once(run, stage):
    assert run.read(stage, ".data-00000-of-00001") == run.size(
        "teacher/model.ckpt-2", ending=".data-00000-of-00001"
    )


def test_unlabeled_records_are_read_once_by_each_stage(run):
    size = run.size("unlabeled/extra-")
    for stage in ("predict", "filter"):
        assert sum(r.down for r in run.requests[stage] if "unlabeled/extra-" in r.name) == size


@pytest.mark.parametrize("stage", ["predict one shard", "predict one shard again"])
def test_one_shard_of_many_is_no_listing_of_all(run, stage):
    """Otherwise, if every shard listed all shards, the cost would grow quadratically."""
    listed = [r.name for r in run.requests[stage] if r.kind == "list"]
    assert [name for name in listed if name.startswith(("unlabeled/", "one/"))] == []
    name = f"one/train-info-00001-of-0000{SHARDS}-00000"
    assert f"{name}.manifest.json" in run.store.names(run.bucket, name)


def test_every_picture_is_one_request(run):
    for stage, folder, number in (
        ("labeled", "pictures", LABELED),
        ("unlabeled", "more", UNLABELED),
    ):
        asked = [r for r in run.requests[stage] if r.name.startswith(f"{folder}/")]
        assert Counter(r.kind for r in asked if r.name.endswith(".png")) == {"get": number}
        assert sum(r.down for r in asked) == run.size(f"{folder}/")


def test_the_graph_is_uploaded_last(run):
    version = [r.name for r in run.requests["export"] if r.kind == "upload" and "/1/" in r.name]
    assert version[-1] == "export/1/saved_model.pb" and len(set(version)) == len(version)


@pytest.mark.slow
def test_a_restore_reads_a_large_checkpoint_once(store, bucket):
    """Its 80 MB span ten of TensorFlow's blocks and are restored in another order than stored."""
    names = [f"model/{'abcdefghij'[7 * i % 10]}{i}" for i in range(40)]
    values = {name: np.full([1 << 19], i, np.float32) for i, name in enumerate(names)}
    prefix = f"gs://{bucket}/model.ckpt-1"
    checkpoint_files.write_checkpoint(prefix, values)
    variables = {name: tf.Variable(tf.zeros([1 << 19])) for name in names}
    with gcs.counted(store) as read:
        checkpoint_files.read_checkpoint(prefix, variables)
    assert all(variables[name][0] == i for i, name in enumerate(names))
    stored = sum(len(store.content(bucket, name)) for name in store.names(bucket))
    assert stored > 80e6 and read["down"] <= 1.05 * stored
    assert read["get"] <= stored / (8 << 20) + 4


@pytest.mark.slow
def test_a_student_learns_from_there(run, bucket):
    noised = {"unlabel_data_dir": "gs://loop/selected/data", "unlabel_ratio": 1.0}
    student = training("gs://loop", "student", teacher_softmax_temp=1.0, **noised)
    run.stage("student", train.train_and_evaluate, student)
    assert run.store.names(run.bucket, "student/model.ckpt-2.index")
    read = sum(r.down for r in run.requests["student"] if "selected/data/train" in r.name)
    assert read >= run.size("selected/data/train-0")


@pytest.mark.slow
@pytest.mark.parametrize("skip", range(0, 12, 3))
def test_an_export_that_is_killed_is_removed_by_the_next(run, bucket, skip):
    """The server kills the program at one of its uploads."""
    run.store.fail(f"upload {bucket}/export/1/", skip=skip, client="killed")
    arguments = ["--model_dir=gs://loop/teacher", f"--export_dir=gs://{bucket}/export"]
    command = [sys.executable, "-m", "efficientnet_ns.export_model", *arguments]
    environment = {**os.environ, **run.store.environment("killed"), "TF_CPP_MIN_LOG_LEVEL": "3"}
    process = subprocess.Popen(command, cwd=fakes.ROOT, env=environment)
    run.store.watch("killed", process.pid)
    assert process.wait(300) == (-9 if skip < 8 else 0)
    graph = "export/1/saved_model.pb"
    if skip < 8:
        assert graph not in run.store.names(bucket)
        assert subprocess.run(command, cwd=fakes.ROOT, env=environment, check=False).returncode == 0
    files = [name.removeprefix("export/") for name in run.store.names("loop", "export/")]
    assert [n.removeprefix("export/") for n in run.store.names(bucket, "export/")] == files
