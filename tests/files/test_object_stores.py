"""Behavior specific to object stores, measured in requests, which are exact, unlike seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import gcs
import pytest
import tensorflow as tf

from efficientnet_ns.files import (
    atomic,
    json_files,
    local_files,
    manifests,
    metrics_log,
    object_stores,
)
from efficientnet_ns.files.leases import LeaseLost, Leases


def requests(store, first: int) -> list[str]:
    return [f"{r.kind} {r.name}" for r in store.requests(first)]


def test_folders_are_not_made(store, bucket):
    with gcs.counted(store) as counted:
        object_stores.make_folder(f"gs://{bucket}/a/b")
        object_stores.make_folder("gs://no-such-bucket/a")  # TensorFlow would retry forever.
    assert counted.requests == 0


def test_json_takes_two_requests_to_write_and_one_to_read(store, bucket):
    path = f"gs://{bucket}/a/b.json"
    with gcs.counted(store) as written:
        json_files.write_json(path, {"a": 1})
    assert written == {"start": 1, "upload": 1, "up": 8, "down": 0}
    with gcs.counted(store) as read:
        assert json_files.read_object(path) == {"a": 1}
    assert read == {"get": 1, "up": 0, "down": 8}
    with gcs.counted(store) as absent:
        assert json_files.read_object_if_any(path + "x") is None
    assert absent.requests == 1


@pytest.mark.parametrize("content", [b"longer than before", b"no", b""])
def test_what_another_machine_rewrites_is_read_as_it_is(store, bucket, content):
    store.put(bucket, "a", b"before")
    assert object_stores.read(f"gs://{bucket}/a") == b"before"
    store.put(bucket, "a", content)
    assert object_stores.read(f"gs://{bucket}/a") == content
    assert object_stores.size(f"gs://{bucket}/a") == len(content)
    store.delete(bucket, "a")
    assert object_stores.read(f"gs://{bucket}/a") is None
    assert object_stores.size(f"gs://{bucket}/a") is None


REMEMBERING = """
import sys
import tensorflow as tf
import efficientnet_ns
from efficientnet_ns.files import object_stores
path = sys.argv[1]
for _ in range(4):
    print(tf.io.gfile.exists(path), object_stores.read(path), flush=True)
    sys.stdin.readline()
"""


@pytest.mark.slow
def test_lengths_that_tensorflow_remembers(store, bucket):
    """TensorFlow was imported first and therefore caches every length for five seconds."""
    store.put(bucket, "a", b"before")
    child = subprocess.Popen(
        [sys.executable, "-c", REMEMBERING, f"gs://{bucket}/a"],
        env={**os.environ, "GCS_STAT_CACHE_MAX_AGE": "5"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    seen = [child.stdout.readline()]
    for content in (b"longer than before", b"no"):
        store.put(bucket, "a", content)
        print(file=child.stdin, flush=True)
        seen.append(child.stdout.readline())
    store.delete(bucket, "a")
    seen.append(child.communicate("\n\n")[0].splitlines()[0])
    assert [line.split(" ", 1)[1].strip() for line in seen] == [
        *("b'before'", "b'longer than before'", "b'no'", "None"),
    ]


def test_listing_takes_a_request_per_thousand_names(store, bucket):
    for i in range(2001):
        store.put(bucket, f"a/{i:04d}", b"")
    store.put(bucket, "ab", b"")  # A prefix is not a folder.
    with gcs.counted(store) as counted:
        assert object_stores.names(f"gs://{bucket}/a") == [f"{i:04d}" for i in range(2001)]
    assert counted["list"] == 3 and counted.requests <= 4
    assert object_stores.names(f"gs://{bucket}/b") == []


def test_walk_takes_two_requests_per_folder(store, bucket):
    for name in ("b/2", "b/1", "a/x/3", "0"):
        store.put(bucket, f"top/{name}", b"")
    top = f"gs://{bucket}/top"
    with gcs.counted(store) as counted:
        found = list(object_stores.walk(top))
    assert found == [
        (top, ["a", "b"], ["0"]),
        (f"{top}/a", ["x"], []),
        (f"{top}/a/x", [], ["3"]),
        (f"{top}/b", [], ["1", "2"]),
    ]
    assert counted["list"] == 4 and counted.requests <= 8


def test_a_finished_stage(store, bucket):
    path = f"gs://{bucket}/out"
    stage = manifests.Stage(f"{path}.json", [path], {"a": 1})
    with gcs.counted(store) as looked:
        assert not stage.done()
    assert looked.requests == 3  # An absent output takes two requests.
    with gcs.counted(store) as written, stage.write(clean=False) as (temporary, counts):
        with tf.io.gfile.GFile(temporary[path], "w") as f:
            f.write("content")
        counts["records"] = 1
    assert written["start"] == written["upload"] == 2 and written["copy"] == written["delete"] == 1
    assert written.requests <= 9
    with gcs.counted(store) as again:
        assert stage.done() and stage.counts() == {"records": 1}
    assert again == {"get": 1, "stat": 1, "up": 0, "down": again["down"]}
    assert store.names(bucket) == ["out", "out.json"]


def test_failed_work_leaves_nothing(store, bucket):
    path = f"gs://{bucket}/out"
    with (
        pytest.raises(ZeroDivisionError),
        manifests.Stage(f"{path}.json", [path], {}).write() as (temporary, _),
    ):
        with tf.io.gfile.GFile(temporary[path], "w") as f:
            f.write("content")
        raise ZeroDivisionError
    assert store.names(bucket) == []


def test_leases(store, bucket):
    ours, theirs = (Leases(f"gs://{bucket}/x", 5, settle_seconds=0.01) for _ in range(2))
    with gcs.counted(store) as counted:
        lease = ours.claim("a")
    assert counted.requests == 4
    assert theirs.claim("a") is None
    # The lease of a process on another machine, longer and then shorter than ours.
    for host in ("far" * 99, ""):
        content = {"machine": "far", "pid": 1, "token": host}
        store.put(bucket, "x/.lease-a", json.dumps(content).encode())
        with pytest.raises(LeaseLost):
            lease.check()
    store.delete(bucket, "x/.lease-a")
    lease.check_not_taken()
    lease.release()
    assert store.names(bucket) == []


def test_metrics_are_uploaded_before_a_checkpoint_only(store, bucket):
    log = metrics_log.MetricsLog(f"gs://{bucket}/train", 0)
    with gcs.counted(store) as counted:
        for step in range(1, 30):
            log.add(step, {"loss": 1.0})
    assert counted.requests == 0
    log.close()
    assert len(metrics_log.read_metrics(f"gs://{bucket}/train")) == 29
    events = [name for name in store.names(bucket) if "events" in name]
    content = store.content(bucket, events[0])
    assert len(events) == 1 and content.count(b"loss") == 29


def test_copies_are_read_once(store, bucket, tmp_path, monkeypatch):
    prefix = f"gs://{bucket}/model.ckpt-1"
    values = {f"v{i}": tf.random.uniform([1000]) for i in range(9)}
    names = sorted(values)
    tf.raw_ops.SaveV2(
        prefix=prefix,
        tensor_names=names,
        shape_and_slices=[""] * 9,
        tensors=[values[n] for n in names],
    )
    size = sum(len(store.content(bucket, name)) for name in store.names(bucket))
    with gcs.counted(store) as counted, local_files.without_wildcards(prefix) as local:
        reader = tf.train.load_checkpoint(local)
        for name in reversed(names):
            assert (reader.get_tensor(name) == values[name].numpy()).all()
    assert counted["down"] == size
    monkeypatch.setattr("shutil.disk_usage", lambda folder: os.statvfs_result)
    monkeypatch.setattr(os.statvfs_result, "free", 1, raising=False)
    with pytest.raises(OSError, match="Set TMPDIR"), local_files.without_wildcards(prefix):
        pytest.fail("there is no space")


@pytest.mark.parametrize("write", [False, True])
def test_probe(store, bucket, write):
    path = f"gs://{bucket}/not/there"
    object_stores.probe(path, write=write)
    assert store.names(bucket) == []
    with pytest.raises(object_stores.NoBucket):
        object_stores.probe("gs://no-such-bucket/a", write=write)
    store.fail(f"start {bucket}/", code=403, times=99)
    if write:
        with pytest.raises(object_stores.NotAllowed, match="write"):
            object_stores.probe(path, write=True)
    store.fail(f"(stat|probe) {bucket}/", code=403, times=99)
    with pytest.raises(object_stores.NotAllowed, match="read"):
        object_stores.probe(path, write=write)


def test_an_overloaded_store_is_asked_again(store, bucket):
    store.fail(f"upload {bucket}/", code=429)
    store.fail(f"get {bucket}/", code=503)
    atomic.write(f"gs://{bucket}/a", "content")
    assert object_stores.read(f"gs://{bucket}/a") == b"content"
    assert store.heal() == 0
