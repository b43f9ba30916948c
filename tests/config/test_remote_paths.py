"""Object-store paths are checked before a program starts work; its uploads leave nothing behind."""

from __future__ import annotations

import os
import re
import tempfile

import gcs
import pytest
import tensorflow as tf

from efficientnet_ns.config import ConfigError, remote_paths


def test_local_paths_are_not_looked_at(monkeypatch):
    monkeypatch.setattr(remote_paths, "_check", lambda paths: pytest.fail("looked"))
    with remote_paths.prepared({"runs/a": "model_dir", "": "output_dir"}):
        pass


def test_a_bucket_that_is_missing_is_named(bucket):
    message = "--output_dir=gs://nowhere/x: there is no bucket gs://nowhere"
    paths = {f"gs://{bucket}/a": "model_dir", "gs://nowhere/x": "output_dir"}
    with pytest.raises(ConfigError, match=re.escape(message)), remote_paths.prepared(paths):
        pytest.fail("begun")


@pytest.mark.parametrize(
    ("kinds", "flag", "may_not"),
    [
        ("stat|probe|list|get", "unlabel_data_dir", "read"),
        ("start|mkdir", "output_dir", "write"),
        ("delete", "export_dir", "write"),
    ],
)
def test_a_missing_permission_is_named(store, bucket, kinds, flag, may_not):
    store.fail(f"({kinds}) {bucket}/", code=403, times=99)
    message = rf"--{flag}=gs://{bucket}/x: this account may not {may_not} .*storage.objects.create"
    with (
        pytest.raises(ConfigError, match=message),
        remote_paths.prepared({f"gs://{bucket}/x": flag}),
    ):
        pytest.fail("begun")


def test_a_bucket_is_looked_at_once(store, bucket):
    flags = ("model_dir", "label_data_dir", "unlabel_data_dir")
    with (
        gcs.counted(store) as counted,
        remote_paths.prepared({f"gs://{bucket}/{flag}": flag for flag in flags}),
    ):
        pass
    assert counted.requests == 2


def test_what_is_uploaded_waits_in_a_scratch_folder(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    with remote_paths.prepared({f"gs://{bucket}/a": "model_dir"}):
        folder = os.environ["TMPDIR"]
        assert os.path.dirname(folder) == str(tmp_path)
        file = tf.io.gfile.GFile(f"gs://{bucket}/file", "w")
        file.write("content")
        assert len(os.listdir(folder)) == 1
        file.close()
    assert os.environ["TMPDIR"] == str(tmp_path) and os.listdir(tmp_path) == []
